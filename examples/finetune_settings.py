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
"""Which settings does fine-tuning have, and do those given go together?"""

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from finetune_data import DataArguments
from transformers import HfArgumentParser, TrainingArguments


QUANTIZED_BITS = {"int8": 8, "int4": 4}
# Methods whose checkpoints the library cannot resume.
OWN_CHECKPOINTS = ("adalora", "ptuning")


@dataclass
class ModelArguments:
    """What to train, and how."""

    model: str = field(metadata={"help": "a checkpoint folder"})
    method: Literal["full", "lora", "adalora", "ptuning"] = field(metadata={"help": "what is trained"})
    dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] = field(
        default="float32", metadata={"help": "how the weights are held; what a method adds to them is float32"}
    )
    adapter: str | None = field(default=None, metadata={"help": "the result of an earlier run, to train on"})
    target_modules: list[str] = field(
        default_factory=lambda: ["query_key_value"],
        metadata={"help": "the linear layers that get an adapter, or all-linear"},
    )
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters; with adalora their mean at the end"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapters"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in front of the adapters"})
    adalora_initial_rank: int = field(default=12, metadata={"help": "adalora: rank at the beginning"})
    pre_seq_len: int = field(default=128, metadata={"help": "ptuning: length of the prefix"})
    prefix_projection: bool = field(default=False, metadata={"help": "ptuning: make the prefix with a small network"})


@dataclass
class RunArguments(TrainingArguments):
    """The library's arguments, with three more and a few other defaults."""

    resume: str = field(default="no", metadata={"help": "no, auto (the last good checkpoint), or a checkpoint folder"})
    generate_samples: int = field(default=16, metadata={"help": "so many eval samples are answered before and after"})
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of such an answer at most"})
    logging_steps: float = field(default=10, metadata={"help": "log the loss every so many steps"})
    save_total_limit: int | None = field(default=3, metadata={"help": "keep so many checkpoints"})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "trackers to report to"})
    include_num_input_tokens_seen: str = field(default="non_padding", metadata={"help": "how to count tokens"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "the rows have no other columns"})
    label_names: list[str] | None = field(default_factory=lambda: ["labels"], metadata={"help": "the labels' column"})


class ArgumentParser(HfArgumentParser):
    """A parser whose errors can be caught."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def read_arguments(
    words: list[str], description: str | None = None
) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Read `[FILE.yaml] [--name value ...]`.

    Raises:
        OSError, ValueError: for an unreadable file, an unknown name, a value that does not fit or settings that do not
            go together.
    """
    classes = (ModelArguments, DataArguments, RunArguments)
    if words and words[0].endswith((".yaml", ".yml")):
        known = {item.name for kind in classes for item in fields(kind)}
        words = [*_words_of_file(Path(words[0]), known), *words[1:]]
    parser = ArgumentParser(classes, description=description, allow_abbrev=False)
    model, data, run = parser.parse_args_into_dataclasses(words)
    check_arguments(model, data, run)
    return model, data, run


def _words_of_file(path: Path, known: set[str]) -> list[str]:
    content = path.read_text(encoding="utf-8")
    try:
        # Two ways, because the usual one turns `no` into False, and some settings have a value of that name.
        settings, texts = yaml.safe_load(content), yaml.load(content, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold lines of `name: value`")
    words = []
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{path}: unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else texts[name]}")
    return words


def check_arguments(model: ModelArguments, data: DataArguments, run: RunArguments) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ValueError: with the setting and the remedy.
    """
    config_file = Path(model.model) / "config.json"
    if not config_file.is_file():
        raise ValueError(f"model: {model.model} is not a checkpoint folder: it has no config.json")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("model_type") != "chatglm":
        raise ValueError(f"model: the model_type of {model.model} is {config.get('model_type')!r}, not 'chatglm'")
    is_quantized = model.dtype in QUANTIZED_BITS or config.get("quantization_bit") or config.get("quantization_config")
    output = Path(run.output_dir)
    faults = {
        "method: full changes the weights themselves, which int8 and int4 cannot hold; use lora": (
            model.method == "full" and is_quantized
        ),
        "dtype: float16 is too coarse to add up small changes; for full use float32 with fp16: true, or bfloat16": (
            model.method == "full" and model.dtype == "float16"
        ),
        "adapter: full trains no adapter; merge it into the checkpoint first": model.method == "full"
        and model.adapter,
        "adapter: adalora has given out the ranks when its run ends; merge it into the checkpoint first": (
            model.method == "adalora" and model.adapter
        ),
        f"adalora_initial_rank: must be more than lora_rank={model.lora_rank}, to which ranks come down": (
            model.method == "adalora" and model.adalora_initial_rank <= model.lora_rank
        ),
        "packing: ptuning puts its prefix in front of a row, which the later samples of a packed row cannot see": (
            model.method == "ptuning" and data.packing
        ),
        "load_best_model_at_end: not with adalora and ptuning; their checkpoints can be resumed by name": (
            model.method in OWN_CHECKPOINTS and run.load_best_model_at_end
        ),
        "eval_strategy: there is no eval_file": run.eval_strategy != "no" and not data.eval_file,
        "resume_from_checkpoint: use resume, which checks the checkpoint first": run.resume_from_checkpoint,
        f"output_dir: {output} is not empty; use another one, or resume: auto": (
            run.resume == "no" and output.is_dir() and any(output.iterdir())
        ),
    }
    for message, is_fault in faults.items():
        if is_fault:
            raise ValueError(message)
