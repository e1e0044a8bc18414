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
"""Fine-tunes a ChatGLM checkpoint: `python examples/finetune.py examples/configs/lora.yaml --learning_rate 1e-4`.

Methods: `full`, `lora`, `adalora` (PEFT) and `ptuning` (P-tuning v2). Settings come from a YAML file, the command line,
or both; the command line wins. Every one of the library's `TrainingArguments` is a setting. `finetune_data.py` says what
the files with the data hold. With `accelerate launch` in place of `python` it runs in several processes.

The output folder gets the result (an adapter, a prefix, or a whole checkpoint that loads by itself), checkpoints to
resume from, `metrics.json`, `curves.png` and `samples.md` (answers before and after).

Exit codes: 0 done, 1 failed, 2 bad settings or data (nothing was trained), 130 interrupted.
"""

import json
import math
import shutil
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from finetune_data import DataArguments, PaddingCollator, Row, Sample, encode_samples, pack_rows, read_samples
from finetune_report import draw_curves, generate_answers, score_answers, write_samples
from finetune_settings import OWN_CHECKPOINTS, QUANTIZED_BITS, ModelArguments, RunArguments, read_arguments
from local_code import REPOSITORY, load_tokenizer, register
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.utils import logging


# Under the library's name, so that its handler prints it.
logger = logging.get_logger("transformers.finetune")

# What makes up for it in checkpoints that the library cannot resume.
OWN_STATE = "trained_state.pt"
# What AdaLoRA gives ranks by.
ADALORA_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass(frozen=True)
class Job:
    """Everything that was checked and loaded, ready to train."""

    trainer: "FinetuneTrainer"
    model: ModelArguments
    data: DataArguments
    checkpoint: Path | None
    samples: list[Sample]
    counts: dict[str, int]


def check_checkpoint(folder: Path, method: str) -> str | None:
    """What is wrong with a checkpoint of the Trainer, if anything: a file that is missing, cut off or unreadable."""
    if not folder.is_dir():
        return "there is no such folder"
    paths = {path.name: path for path in folder.iterdir()}
    # The state is written last: without it the run ended while saving.
    needed = {"trainer_state.json"}
    if not any(name.startswith(("pytorch_model_fsdp", "global_step")) for name in paths):
        is_split = "model.safetensors.index.json" in paths
        full = "model.safetensors.index.json" if is_split else "model.safetensors"
        needed |= {"optimizer.pt", "scheduler.pt"}
        needed.add({"full": full, "lora": "adapter_model.safetensors"}.get(method, OWN_STATE))
    for path in paths.values():
        try:
            if path.suffix == ".json":
                needed |= set(json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values())
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip():
                        return f"{path.name} is damaged"
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} is damaged ({error})"
    missing = sorted(needed - set(paths))
    return f"{', '.join(missing)} is missing" if missing else None


def find_checkpoint(run: RunArguments, method: str) -> Path | None:
    """The checkpoint to resume from; damaged ones are passed over with a warning, unless asked for by name.

    Raises:
        ValueError: if the checkpoint asked for is damaged.
    """
    if run.resume == "no":
        return None
    if run.resume != "auto":
        if fault := check_checkpoint(Path(run.resume), method):
            raise ValueError(f"resume: {run.resume} cannot be used: {fault}")
        return Path(run.resume)
    folders = [path for path in Path(run.output_dir).glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        fault = check_checkpoint(folder, method)
        if fault is None:
            return folder
        logger.warning(f"{folder} is passed over: {fault}")
    logger.warning(f"{run.output_dir} has no checkpoint to resume from: starting from the beginning")
    return None


def load_model(model: ModelArguments, run: RunArguments, num_steps: int) -> Any:
    """Load the model and add what the method trains, in float32; all else is frozen. `full` trains the model itself.

    Raises:
        ValueError: if the adapter to train on is of another model or method.
    """
    settings: dict[str, Any] = {"dtype": model.dtype}
    if model.dtype in QUANTIZED_BITS:
        settings["dtype"] = "bfloat16" if run.bf16 else "float16" if run.fp16 else "float32"
        settings["quantization_config"] = {"quant_method": "chatglm", "bits": QUANTIZED_BITS[model.dtype]}
    if model.method == "ptuning":
        settings |= {"pre_seq_len": model.pre_seq_len, "prefix_projection": model.prefix_projection}
    base = AutoModelForCausalLM.from_pretrained(model.model, **settings)
    if model.adapter:
        check_adapter(model, base)
    if model.method == "ptuning":
        if model.adapter:
            base.load_prefix_encoder(model.adapter)
        base.transformer.prefix_encoder.float()
    if model.method in ("full", "ptuning"):
        return base
    if model.adapter:
        adapted = peft.PeftModel.from_pretrained(base, model.adapter, is_trainable=True)
    else:
        adapted = peft.get_peft_model(base, adapter_config(model, num_steps))
    if run.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def adapter_config(model: ModelArguments, num_steps: int) -> peft.PeftConfig:
    """The settings of PEFT for a new adapter."""
    shared = {
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear" if model.target_modules == ["all-linear"] else model.target_modules,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": model.lora_dropout,
    }
    if model.method == "lora":
        return peft.LoraConfig(r=model.lora_rank, **shared)
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


def check_adapter(model: ModelArguments, base: Any) -> None:
    """Compare the result of an earlier run with the model that is to train it on.

    Raises:
        ValueError: if it is none, is of another method, or was made for another model.
    """
    folder = Path(model.adapter)
    settings = folder / "tokenizer_config.json"
    made_for = json.loads(settings.read_text(encoding="utf-8")).get("model_version") if settings.is_file() else None
    if made_for not in (None, base.config.model_version):
        raise ValueError(
            f"adapter: {folder} was made for {made_for}, and {model.model} is {base.config.model_version}"
        )
    if model.method == "ptuning":
        return
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"adapter: {folder} has no {file.name}")
    kind = peft.PeftConfig.from_pretrained(str(folder)).peft_type.value.lower()
    if kind != model.method:
        raise ValueError(f"adapter: {folder} was made by {kind}, and the method is {model.method}")
    modules = dict(base.named_modules())
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():
            name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            if part[:1] not in ("A", "B"):
                continue
            there = tensors.get_slice(key).get_shape()[1 if part[0] == "A" else 0]
            module = modules.get(name)
            here = getattr(module, "in_features" if part[0] == "A" else "out_features", None)
            if here != there:
                raise ValueError(f"adapter: {folder} is of another model: {name} is {there} wide there, {here} here")


class AdaLoraCallback(TrainerCallback):
    """Moves ranks to where they matter, after every step and before the gradients are gone, as PEFT asks for."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        planned = model.peft_config["default"].total_step
        if planned != state.max_steps:
            raise RuntimeError(f"AdaLoRA was planned for {planned} steps, and the run has {state.max_steps}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


class FinetuneTrainer(Trainer):
    """The library's Trainer, with checkpoints of its own for the two methods whose ones it cannot resume.

    A prefix comes without the weights of its model. An AdaLoRA adapter is saved at the ranks of the moment, and without
    the scores by which ranks are given.
    """

    method: str

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the result; the library calls this for checkpoints too."""
        output_dir = output_dir or self.args.output_dir
        if self.method != "ptuning":
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self.model.save_prefix_encoder(output_dir)
            self.processing_class.save_pretrained(output_dir)
        if _internal_call and self.method in OWN_CHECKPOINTS and self.args.should_save:
            torch.save(self.own_state(), Path(output_dir) / OWN_STATE)

    def own_state(self) -> dict[str, Any]:
        """The trained weights, and what AdaLoRA knows of its ranks."""
        state = {"weights": {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}}
        if self.method == "adalora":
            allocator = self.model.base_model.rankallocator
            state |= {name: getattr(allocator, name) for name in ADALORA_SCORES}
            state["rank_pattern"] = allocator.peft_config.rank_pattern
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # A private hook (Transformers 5.17 to 5.23): no public one lies between building a model and its optimizer.
        if self.method not in OWN_CHECKPOINTS:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / OWN_STATE
        state = torch.load(file, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["weights"], strict=False)
        if self.method == "adalora":
            allocator = self.model.base_model.rankallocator
            for name in ADALORA_SCORES:
                setattr(allocator, name, state[name])
            allocator.peft_config.rank_pattern = state["rank_pattern"]


def count_steps(num_rows: int, run: RunArguments) -> int:
    """The optimizer steps of a run, as the Trainer counts them."""
    if run.max_steps > 0:
        return run.max_steps
    rows_per_step = run.train_batch_size * run.gradient_accumulation_steps * run.world_size
    return math.ceil(math.ceil(num_rows / rows_per_step) * run.num_train_epochs)


def make_trainer(
    model: ModelArguments, run: RunArguments, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[Row]]
) -> FinetuneTrainer:
    """Load the model, and set the Trainer to rows of `train` and perhaps `eval`."""
    set_seed(run.seed)
    trainer = FinetuneTrainer(
        load_model(model, run, count_steps(len(rows["train"]), run)),
        run,
        data_collator=PaddingCollator(tokenizer.pad_token_id),
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval") or None,
        processing_class=tokenizer,
        callbacks=[AdaLoraCallback()] if model.method == "adalora" else [],
    )
    trainer.method = model.method
    if model.method in OWN_CHECKPOINTS and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(f"method: {model.method} runs in several processes, but not sharded by FSDP or DeepSpeed")
    return trainer


def prepare(model: ModelArguments, data: DataArguments, run: RunArguments) -> Job:
    """Read and check everything, and load the model.

    Raises:
        OSError, TypeError, ValueError: for data, an adapter or a checkpoint that cannot be used.
    """
    checkpoint = find_checkpoint(run, model.method)
    register()
    # CODEPATH: chatglm-6b; the others are causal.
    if data.packing and AutoConfig.from_pretrained(model.model).prefix_lm:
        raise ValueError("packing: ChatGLM-6B reads its context both ways and cannot have two samples in a row")
    tokenizer = load_tokenizer(Path(model.model))
    samples, rows, counts = {}, {}, {}
    for name, file in (("train", data.train_file), ("eval", data.eval_file)):
        samples[name] = read_samples(file, data) if file else []
        rows[name], num_truncated = encode_samples(samples[name], tokenizer, data)
        counts |= {f"{name}_samples": len(samples[name]), f"{name}_truncated": num_truncated}
        if num_truncated:
            logger.warning(f"{num_truncated} samples of {file} were cut to max_length={data.max_length} tokens")
    if data.packing:
        rows["train"] = pack_rows(rows["train"], data.max_length)
    counts["train_rows"] = len(rows["train"])
    trainer = make_trainer(model, run, tokenizer, rows)
    weights = list(trainer.model.parameters())
    # ZeRO-3 leaves nothing but a number in the place of a weight.
    sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in weights]
    counts["parameters"] = sum(sizes)
    counts["trainable_parameters"] = sum(size for size, weight in zip(sizes, weights) if weight.requires_grad)
    return Job(trainer, model, data, checkpoint, samples["eval"][: run.generate_samples], counts)


def train(job: Job) -> None:
    """Train, evaluate, and save the result and the report."""
    trainer, run, is_main = job.trainer, job.trainer.args, job.trainer.is_world_process_zero()
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if job.samples and is_sharded:
        logger.warning("samples.md is left out: one process cannot generate with a sharded model")
    samples = job.samples if is_main and not is_sharded else []
    asked = {"samples": samples, "tokenizer": trainer.processing_class, "max_new_tokens": run.max_new_tokens}
    before = generate_answers(trainer.model, **asked)
    state = TrainerState()
    if job.checkpoint:
        state = TrainerState.load_from_json(str(job.checkpoint / "trainer_state.json"))
    result = trainer.train(resume_from_checkpoint=job.checkpoint and str(job.checkpoint))
    num_tokens = trainer.state.num_input_tokens_seen - state.num_input_tokens_seen
    evaluation = trainer.evaluate() if job.data.eval_file else {}
    # The Trainer turned it off for training.
    trainer.model.config.use_cache = True
    trainer.save_model()
    after = generate_answers(trainer.model, **asked)
    if not is_main:
        return
    folder = Path(run.output_dir)
    if job.model.method == "full":
        for source in REPOSITORY.glob("*.py"):
            shutil.copyfile(source, folder / source.name)
    metrics = {
        "config": asdict(job.model) | asdict(job.data) | run.to_dict(),
        **job.counts,
        "steps": trainer.state.global_step,
        "tokens_per_second": num_tokens / max(result.metrics["train_runtime"], 1e-3),
        "eval": evaluation,
        "answers": {"before": score_answers(before), "after": score_answers(after)} if samples else None,
        "loss_history": trainer.state.log_history,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_curves(folder / "curves.png", trainer.state.log_history)
    if samples:
        write_samples(folder / "samples.md", before, after)


def main() -> int:
    try:
        try:
            job = prepare(*read_arguments(sys.argv[1:], description=__doc__))
        except (OSError, TypeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        train(job)
    except KeyboardInterrupt:
        print("interrupted; `resume: auto` goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
