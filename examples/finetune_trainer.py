# Copyright 2026 The ChatGLM Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How is the model of a method loaded, trained and saved on the way?"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from finetune_adapter import PARTS, check_adapter, check_patterns, layers_of, train_parts, trained_parts
from finetune_data import PaddingCollator, Row
from finetune_loss import learnt_positions, weighted_loss
from finetune_pictures import PictureReader
from finetune_resume import OWN_STATE, write_settings
from finetune_settings import (
    OWN_CHECKPOINTS,
    OWN_WEIGHTS,
    QUANTIZED_BITS,
    ModelArguments,
    RunArguments,
    settings_named,
)
from local_code import register
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging


# Under the library's name, so that its handler prints it.
logger = logging.get_logger("transformers.finetune")

# The modules of GLM-4V's eyes, whose layers have names of the text part's.
FROZEN_VISION = r"(.*\.)?vision\..*"
# What AdaLoRA gives ranks by.
ADALORA_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def load_model(model: ModelArguments, run: RunArguments, num_steps: int) -> Any:
    """Load the model and add what the method trains, in float32; all else is frozen.

    `full` and `freeze` train the model itself, or its last layers.

    Raises:
        ValueError: if the folder or the adapter cannot be loaded, or the adapter is of another model.
    """
    if model.adapter:
        check_adapter(
            Path(model.adapter),
            model.method,
            model.target_modules or [],
            load_config(model.model),
            frozen=FROZEN_VISION if model.freeze_vision else None,
        )
    settings: dict[str, Any] = {"dtype": model.dtype}
    if model.attn_implementation:
        settings["attn_implementation"] = model.attn_implementation
    if model.dtype in QUANTIZED_BITS:
        settings["dtype"] = "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"
        settings["quantization_config"] = {"quant_method": "chatglm", "bits": QUANTIZED_BITS[model.dtype]}
    if model.method == "ptuning":
        settings |= {"pre_seq_len": model.pre_seq_len, "prefix_projection": model.prefix_projection}
    with settings_named("model, attn_implementation" if model.attn_implementation else "model"):
        base = AutoModelForCausalLM.from_pretrained(model.model, **settings)
    base.loss_function = partial(weighted_loss, smoothing=run.label_smoothing_factor)
    if model.method == "ptuning":
        if model.adapter:
            base.load_prefix_encoder(model.adapter)
        base.transformer.prefix_encoder.float()
    if model.method == "freeze":
        freeze_but_last_layers(base, model.trainable_layers or 0)
    # CODEPATH: glm-4v-9b; the others have no eyes.
    if model.method in OWN_WEIGHTS and base.transformer.vision is not None:
        base.transformer.vision.requires_grad_(not model.freeze_vision)
    if model.method in (*OWN_WEIGHTS, "ptuning"):
        return base
    adapted = adapt(base, model, num_steps)
    if run.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def freeze_but_last_layers(base: Any, num_layers: int) -> None:
    """Freeze all but the last layers.

    Raises:
        ValueError: if there are not so many.
    """
    layers = base.transformer.encoder.layers
    if num_layers > len(layers):
        raise ValueError(f"trainable_layers: the model has {len(layers)} layers, not {num_layers}")
    base.requires_grad_(False)
    layers[-num_layers:].requires_grad_(True)


def adapt(base: Any, model: ModelArguments, num_steps: int) -> Any:
    """Put an adapter or a prompt of PEFT on a model, a new one or that of an earlier run.

    Raises:
        ValueError: if it does not fit.
    """
    if model.method == "prompt_tuning":
        adapted = peft.get_peft_model(base, adapter_config(model, num_steps))
        if model.adapter:
            # `PeftModel.from_pretrained` loads prompts for use only.
            peft.set_peft_model_state_dict(adapted, peft.load_peft_weights(model.adapter, "cpu"))
        adapted.prompt_encoder.float()
        return adapted
    if model.adapter:
        with settings_named("adapter"):
            adapted = peft.PeftModel.from_pretrained(base, model.adapter, is_trainable=True)
    else:
        with settings_named("target_modules"):
            config = adapter_config(model, num_steps)
            # CODEPATH: glm-4v-9b. PEFT warns of what is excluded from a model without it.
            if base.config.vision_config is not None and model.freeze_vision:
                config.exclude_modules = FROZEN_VISION
            adapted = peft.get_peft_model(base, config)
    if model.method == "lora" and not model.adapter:
        check_patterns(adapted, {name: getattr(model, name) for name in ("rank_pattern", "alpha_pattern")})
    parts = PARTS & set(model.target_modules or ())
    if model.adapter and not parts:
        parts = trained_parts(adapted)
        if parts and parts != PARTS:
            logger.warning(f"adapter: {model.adapter} adapts {', '.join(sorted(parts))} alone, and goes on so")
    if parts and parts != PARTS:
        train_parts(adapted, parts, is_new=not model.adapter)
    return adapted


def load_config(folder: str) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        ValueError: if it has none that can be used.
    """
    register()
    with settings_named("model"):
        return AutoConfig.from_pretrained(folder)


def adapter_config(model: ModelArguments, num_steps: int) -> peft.PeftConfig:
    """The settings of PEFT for a new adapter or prompt."""
    if model.method == "prompt_tuning":
        # It begins as words of the vocabulary, which learns faster than from random vectors.
        return peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=model.pre_seq_len, prompt_tuning_init="SAMPLE_VOCAB"
        )
    layers = layers_of(model.target_modules or [])
    shared = {
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear" if layers == ["all-linear"] else layers,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
    }
    if model.method == "lora":
        patterns = {"rank_pattern": model.rank_pattern, "alpha_pattern": model.alpha_pattern}
        return peft.LoraConfig(r=model.lora_rank, use_dora=model.use_dora, **patterns, **shared)
    return peft.AdaLoraConfig(
        init_r=model.adalora_initial_rank,
        target_r=model.lora_rank,
        # Ranks come down between the first tenth and the last three tenths of the run.
        total_step=num_steps,
        tinit=num_steps // 10,
        tfinal=3 * num_steps // 10,
        deltaT=max(1, num_steps // 50),
        **shared,
    )


class AdaLoraCallback(TrainerCallback):
    """Moves ranks to where they matter, after every step and before the gradients are gone, as PEFT asks for."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        planned = model.peft_config["default"].total_step
        if planned != state.max_steps:
            raise RuntimeError(f"AdaLoRA was planned for {planned} steps, and the run has {state.max_steps}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


class FirstStepCallback(TrainerCallback):
    """Remembers whether anything has been trained."""

    is_done = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_done = True


class FinetuneTrainer(Trainer):
    """The library's Trainer, with checkpoints of its own for the two methods whose checkpoints it cannot resume.

    A prefix is saved without the weights of its model. An AdaLoRA adapter is saved with the ranks it has at the moment,
    and without the scores by which ranks are given.
    """

    arguments: ModelArguments
    first_step: FirstStepCallback

    def get_train_dataloader(self) -> DataLoader:
        """The library's, whose errors name the settings."""
        with settings_named("dataloader_*"):
            return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of a step, and what all their tokens count together."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not any("loss_weights" in batch for batch in batches):
            return batches, count
        count = sum(batch["loss_weights"].sum() for batch in batches).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        # DataParallel gives each of its copies a row.
        return batches, count.expand(self.args.n_gpu, 1) if self.args.n_gpu > 1 else count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The library's, which asks the model; scores are computed where they are needed."""
        # DataParallel would cut the list of positions into pieces, too.
        if self.args.n_gpu <= 1:
            # A prompt of PEFT stands in front of the scores.
            length = (self.arguments.pre_seq_len or 0) if self.arguments.method == "prompt_tuning" else 0
            inputs = {**inputs, "logits_to_keep": learnt_positions(inputs["labels"]) + length}
        # Evaluation has the mean of each batch.
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch if model.training else None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's, whose errors name the settings."""
        with settings_named("optim, optim_args"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> torch.optim.lr_scheduler.LRScheduler:
        """The library's, whose errors name the settings."""
        with settings_named("lr_scheduler_type, lr_scheduler_kwargs, warmup_steps"):
            return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the result; the library calls this for checkpoints too."""
        output_dir = output_dir or self.args.output_dir
        if self.arguments.method != "ptuning":
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.model.save_prefix_encoder(output_dir)
            self.processing_class.save_pretrained(output_dir)
        if _internal_call and self.args.should_save:
            write_settings(Path(output_dir), self.args, self.arguments)
            if self.arguments.method in OWN_CHECKPOINTS:
                torch.save(self.own_state(), Path(output_dir) / OWN_STATE)

    def own_state(self) -> dict[str, Any]:
        """The trained weights, and what AdaLoRA knows of its ranks."""
        state = {"weights": {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}}
        if self.arguments.method == "adalora":
            allocator = self.model.base_model.rankallocator
            state |= {name: getattr(allocator, name) for name in ADALORA_SCORES}
            state["rank_pattern"] = allocator.peft_config.rank_pattern
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # A private hook (Transformers 5.17 to 5.23): no public one lies between building a model and its optimizer.
        if self.arguments.method not in OWN_CHECKPOINTS:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / OWN_STATE
        state = torch.load(file, map_location=self.args.device, weights_only=True)
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        if trained != set(state["weights"]):
            raise ValueError(f"resume: {file} is of another model: it holds {sorted(state['weights'])[:3]}, ...")
        self.model.load_state_dict(state["weights"], strict=False)
        if self.arguments.method == "adalora":
            allocator = self.model.base_model.rankallocator
            for name in ADALORA_SCORES:
                setattr(allocator, name, state[name])
            allocator.peft_config.rank_pattern = state["rank_pattern"]


def count_batches(num_rows: int, size: int, run: RunArguments) -> int:
    """How many batches each process gets of some rows.

    Raises:
        ValueError: if there is not even one, because incomplete batches are dropped.
    """
    share = num_rows / (size * run.world_size)
    num_batches = math.floor(share) if run.dataloader_drop_last else math.ceil(share)
    if num_rows and num_batches == 0:
        raise ValueError(
            f"dataloader_drop_last: {num_rows} rows do not fill one batch of {size} on each of {run.world_size} "
            "processes, so all of them are dropped; lower per_device_train_batch_size or per_device_eval_batch_size"
        )
    return num_batches


def count_steps(num_rows: int, run: RunArguments) -> int:
    """The optimizer steps of a run, as the Trainer counts them.

    Raises:
        ValueError: if there are none.
    """
    num_batches = count_batches(num_rows, run.train_batch_size, run)
    if run.max_steps > 0:
        return run.max_steps
    return math.ceil(math.ceil(num_batches / run.gradient_accumulation_steps) * run.num_train_epochs)


def make_trainer(
    model: ModelArguments,
    run: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Sequence[Row]],
    by_sample: bool = False,
    reader: PictureReader | None = None,
) -> FinetuneTrainer:
    """Load the model, and set the Trainer to rows of `train` and perhaps `eval`.

    Args:
        by_sample: whether samples count alike in the loss, or tokens do.
        reader: reads the pictures of rows.

    Raises:
        ValueError: for settings and a model that do not go together.
    """
    set_seed(run.seed)
    first_step = FirstStepCallback()
    num_steps = count_steps(len(rows["train"]), run)
    count_batches(len(rows.get("eval", [])), run.eval_batch_size, run)
    trainer = FinetuneTrainer(
        load_model(model, run, num_steps),
        run,
        data_collator=PaddingCollator(tokenizer.pad_token_id, by_sample, reader),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval") or None,
        processing_class=tokenizer,
        callbacks=[first_step, AdaLoraCallback()] if model.method == "adalora" else [first_step],
    )
    trainer.arguments, trainer.first_step = model, first_step
    # The model's loss has it.
    trainer.label_smoother = None
    if model.method in OWN_CHECKPOINTS and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(f"method: {model.method} runs in several processes, but not sharded by FSDP or DeepSpeed")
    if PARTS & set(model.target_modules or ()) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError("target_modules: query, key and value are rows of one layer, which FSDP and DeepSpeed shard")
    return trainer
