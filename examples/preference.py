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
"""Trains on preferences with TRL: `python examples/preference.py --method dpo --output_dir output/dpo`.

The methods are `dpo`, `kto`, `grpo` and `reward` (a model that scores answers). Each is TRL's trainer as it is, with a
LoRA adapter on a base of any width. A line of the data holds `prompt`, `chosen` and `rejected`: texts, or lists of
messages; `dpo`, `kto` and `reward` need all three. `kto` also takes `prompt`, `completion` and `label`. `grpo` samples
answers itself and rewards likeness to `chosen`, or what a reward model says (`--reward_model`).

What is unusual here:

- Texts become messages. TRL encodes a plain text with the tokenizer's own opening tokens, and joins prompt and answer
  before it does: ChatGLM-6B would read its answer as a part of the question, and no end token would be learnt.
- A reward model scores the sampled ids themselves. TRL would render the answers to text and encode that.

The output folder gets the adapter, `metrics.json` (settings and everything TRL logged) and `curves.png`. Exit codes:
0 done, 2 bad settings or data.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import peft
import torch
from datasets import Dataset
from local_code import check_model_type, load_tokenizer, read_json_object, register
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


EXAMPLES = Path(__file__).resolve().parent
TRAINERS: dict[str, tuple[Any, Any]] = {
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "reward": (RewardTrainer, RewardConfig),
    "grpo": (GRPOTrainer, GRPOConfig),
}
# What tells whether a method works, under TRL's names; `eval_` stands before them for held-out data.
CURVES = {
    "dpo": ("rewards/accuracies", "rewards/margins", "loss"),
    "kto": ("rewards/margins", "rewards/chosen", "rewards/rejected", "loss"),
    "reward": ("accuracy", "margin", "loss"),
    "grpo": ("reward", "reward_std", "completions/mean_length"),
}
# The columns that a method needs, any of these sets.
COLUMNS = {
    "dpo": (("prompt", "chosen", "rejected"),),
    "kto": (("prompt", "completion", "label"), ("prompt", "chosen", "rejected")),
    "reward": (("prompt", "chosen", "rejected"),),
    "grpo": (("prompt",),),
}
QUANTIZED_BITS = {"int8": 8, "int4": 4}


def as_messages(value: Any, role: str) -> list[dict[str, Any]]:
    """A text as a list with one message; a list of messages as it is.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    raise ValueError(f"must be a text or a list of messages, got {value!r:.80}")


def read_preferences(path: Path, method: str) -> list[dict[str, Any]]:
    """Read a file of JSON lines, with the columns of a method only.

    Raises:
        OSError: if it cannot be read.
        ValueError: for a line that the method cannot use, with its number.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            columns = next((names for names in COLUMNS[method] if set(names) <= set(record)), None)
            if columns is None:
                raise ValueError(f"{method} needs {' or '.join(map(str, COLUMNS[method]))}, found {sorted(record)}")
            roles = {name: "user" if name == "prompt" else "assistant" for name in columns if name != "label"}
            kept: dict[str, Any] = {name: as_messages(record[name], role) for name, role in roles.items()}
            if "label" in columns:
                kept["label"] = bool(record["label"])
            # GRPO hands a reward function what else stands in a line.
            if method == "grpo":
                chosen = as_messages(record["chosen"], "assistant") if record.get("chosen") else [{}]
                kept["chosen"] = str(chosen[-1].get("content") or "")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        records.append(kept)
    if not records:
        raise ValueError(f"{path} holds no samples")
    return records


def likeness(completions: list[Any], chosen: list[str], **kwargs: Any) -> list[float]:
    """How alike answers and chosen answers are, from 0 to 1."""
    texts = [str(messages[0].get("content") or "").strip() for messages in completions]
    return [difflib.SequenceMatcher(None, text, good).ratio() for text, good in zip(texts, chosen)]


def reward_function(model: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """What a reward model says of sampled answers, for GRPO.

    The answers' ids follow those of their prompts, as the reward model was trained; the token that ends an answer is
    among them.
    """

    @torch.no_grad()
    def scores(prompts: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        asked = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        rows = {"input_ids": [question + answer for question, answer in zip(asked, completion_ids)]}
        inputs = tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(model.device)
        # ChatGLM-6B's positions are made from the ids where none are given.
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].tolist()

    return scores


def load_model(folder: str, dtype: str, is_reward: bool) -> Any:
    """Load a model with this checkout's code, with a head that gives one score where it `is_reward`.

    Raises:
        OSError, ValueError: if the folder holds no such model.
    """
    modeling = register()
    check_model_type(folder)
    settings: dict[str, Any] = {"dtype": "float32" if dtype in QUANTIZED_BITS else dtype}
    if dtype in QUANTIZED_BITS:
        settings["quantization_config"] = {"quant_method": "chatglm", "bits": QUANTIZED_BITS[dtype]}
    if is_reward:
        return modeling.ChatGLMForSequenceClassification.from_pretrained(folder, num_labels=1, **settings)
    return modeling.ChatGLMForConditionalGeneration.from_pretrained(folder, **settings)


def load_reward_model(adapter: str) -> Any:
    """The reward model that this program left in a folder.

    Raises:
        OSError, ValueError: if there is none.
    """
    settings = read_json_object(Path(adapter) / "adapter_config.json")
    base = load_model(settings["base_model_name_or_path"], "float32", is_reward=True)
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def training_settings(arguments: argparse.Namespace, is_evaluated: bool) -> dict[str, Any]:
    """The settings that TRL's configurations have in common, and those of the method."""
    settings: dict[str, Any] = {
        "output_dir": arguments.output_dir,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "cosine",
        "logging_steps": max(1, arguments.steps // 20),
        "eval_strategy": "steps" if is_evaluated else "no",
        "eval_on_start": is_evaluated,
        "eval_steps": max(1, arguments.steps // 4),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "bf16": arguments.dtype == "bfloat16",
        "seed": arguments.seed,
    }
    if arguments.method in ("dpo", "kto"):
        settings["beta"] = arguments.beta
    if arguments.method == "grpo":
        settings |= {
            "num_generations": arguments.generations,
            "max_completion_length": arguments.max_new_tokens,
            "temperature": arguments.temperature,
        }
    return settings


def make_trainer(
    arguments: argparse.Namespace, records: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]] = ()
) -> Any:
    """TRL's trainer of the method, on a new adapter.

    Raises:
        OSError, ValueError: if a model cannot be loaded.
    """
    is_reward = arguments.method == "reward"
    tokenizer = load_tokenizer(Path(arguments.model))
    model = load_model(arguments.model, arguments.dtype, is_reward)
    trainer_class, config_class = TRAINERS[arguments.method]
    extra: dict[str, Any] = {}
    if arguments.method == "grpo":
        # Answers end at any of these, and a config.json as published names one of them.
        model.generation_config.eos_token_id = tokenizer.stop_token_ids()
        extra["reward_funcs"] = likeness
        if arguments.reward_model:
            extra["reward_funcs"] = reward_function(load_reward_model(arguments.reward_model), tokenizer)
    adapter = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules="all-linear",
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
    )
    return trainer_class(
        model,
        args=config_class(**training_settings(arguments, bool(held_out))),
        train_dataset=Dataset.from_list(list(records)),
        eval_dataset=Dataset.from_list(list(held_out)) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
        **extra,
    )


def draw_curves(path: Path, history: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    """Draw what TRL logged, one picture below the other, by step."""
    figure, rows = pyplot.subplots(len(names), figsize=(8, 2.5 * len(names)), sharex=True, squeeze=False)
    for axes, name in zip(rows[:, 0], names):
        for key, label in ((name, "training"), (f"eval_{name}", "held out")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axes.plot(*zip(*points), marker=".", label=label)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    rows[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=TRAINERS, required=True)
    parser.add_argument("--model", default=str(EXAMPLES / "tiny-chatglm3"), help="a checkpoint folder")
    parser.add_argument("--data", type=Path, default=EXAMPLES / "preferences.jsonl", help="JSON lines")
    parser.add_argument("--held_out", type=int, default=10, help="lines at the end to evaluate on")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", *QUANTIZED_BITS], default="float32")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA adapter")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--beta", type=float, default=0.1, help="dpo, kto: how closely the base is kept to")
    parser.add_argument("--generations", type=int, default=8, help="grpo: answers to one question")
    parser.add_argument("--temperature", type=float, default=1.0, help="grpo: of the sampling")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="grpo: of a sampled answer")
    parser.add_argument("--reward_model", help="grpo: what `--method reward` left in its output_dir")
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args(words)
    for name in ("rank", "steps", "batch_size", "generations", "max_new_tokens", "learning_rate", "temperature"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name} must be more than 0, got {getattr(arguments, name)}")
    if arguments.held_out < 0:
        parser.error(f"--held_out must be 0 or more, got {arguments.held_out}")
    output = Path(arguments.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"--output_dir: {output} is not an empty folder")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run the program with the words of a command line, those of this process by default."""
    arguments = parse_arguments(words)
    try:
        records = read_preferences(arguments.data, arguments.method)
        split = len(records) - arguments.held_out
        if split <= 0:
            raise ValueError(f"--held_out: {arguments.held_out} of {len(records)} lines leave nothing to train on")
        trainer = make_trainer(arguments, records[:split], records[split:])
    except (OSError, KeyError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    trainer.train()
    trainer.save_model()
    folder, names = Path(arguments.output_dir), CURVES[arguments.method]
    history = trainer.state.log_history
    metrics = {"settings": vars(arguments) | {"data": str(arguments.data)}, "history": history}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_curves(folder / "curves.png", history, names)
    print("| | first | last |\n|---|---|---|")
    for name in [*names, *(f"eval_{name}" for name in names)]:
        values = [entry[name] for entry in history if name in entry]
        if values:
            print(f"| {name} | {values[0]:.3f} | {values[-1]:.3f} |")
    return 0


if __name__ == "__main__":
    logging.set_verbosity_error()
    sys.exit(main())
