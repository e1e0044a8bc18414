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
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from finetune_adapter import PARTS, read_adapter
from finetune_data import DataArguments
from local_code import read_json_object
from torch.utils.checkpoint import checkpoint
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging


# Under the library's name, so that its handler prints it.
logger = logging.get_logger("transformers.finetune")

QUANTIZED_BITS = {"int8": 8, "int4": 4}
# Methods whose checkpoints the library cannot resume.
OWN_CHECKPOINTS = ("adalora", "ptuning")
# Defaults for a new adapter or prefix. One from `adapter` keeps the settings it was made with.
NEW_ADAPTER: dict[str, Any] = {
    "trainable_layers": 2,
    "target_modules": ["query_key_value"],
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "adalora_initial_rank": 12,
    "pre_seq_len": 128,
    "prefix_projection": False,
}
# What the trained weights mean depends on these, so a run must have the same ones to go on.
METHOD_SETTINGS: dict[str, tuple[str, ...]] = {
    "full": ("freeze_vision",),
    "freeze": ("trainable_layers", "freeze_vision"),
    "lora": (
        "target_modules",
        "lora_rank",
        "lora_alpha",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "freeze_vision",
    ),
    "adalora": ("target_modules", "lora_rank", "lora_alpha", "adalora_initial_rank", "freeze_vision"),
    "ptuning": ("pre_seq_len", "prefix_projection"),
    "prompt_tuning": ("pre_seq_len",),
}
# Methods that train weights of the model itself.
OWN_WEIGHTS = ("full", "freeze")
# Methods whose adapters can be trained on.
GO_ON = ("lora", "ptuning", "prompt_tuning")


@dataclass
class ModelArguments:
    """What to train, and how."""

    model: str = field(metadata={"help": "a checkpoint folder"})
    method: Literal["full", "freeze", "lora", "adalora", "ptuning", "prompt_tuning"] = field(
        metadata={"help": "what is trained"}
    )
    dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] = field(
        default="float32", metadata={"help": "how the weights are held; what a method adds to them is float32"}
    )
    attn_implementation: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] | None = field(
        default=None, metadata={"help": "how attention is computed; flex and flash need no mask for packed rows"}
    )
    adapter: str | None = field(
        default=None, metadata={"help": "the result of an earlier run, to go on training; it brings its own sizes"}
    )
    freeze_vision: bool = field(
        default=True, metadata={"help": "GLM-4V: train the text part alone, and leave its eyes as they are"}
    )
    trainable_layers: int | None = field(
        default=None, metadata={"help": "freeze: how many of the last layers are trained, 2 unless given"}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "the linear layers that get an adapter, or all-linear; query_key_value unless given, of which "
            "query, key and value are parts"
        },
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "rank of the adapters, 8 unless given; with adalora their mean at the end"}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "scale of the adapters, 32 unless given"})
    lora_dropout: float | None = field(default=None, metadata={"help": "dropout before the adapters, 0 unless given"})
    use_dora: bool | None = field(
        default=None,
        metadata={"help": "lora: train the lengths of the weights' rows too", "nargs": "?", "const": True},
    )
    rank_pattern: dict | str | None = field(
        default=None, metadata={"help": 'lora: other ranks for some layers, as {"dense": 4}'}
    )
    alpha_pattern: dict | str | None = field(
        default=None, metadata={"help": 'lora: other scales for some layers, as {"dense": 16}'}
    )
    adalora_initial_rank: int | None = field(
        default=None, metadata={"help": "adalora: rank at the beginning, 12 unless given"}
    )
    pre_seq_len: int | None = field(
        default=None, metadata={"help": "ptuning, prompt_tuning: length of the prefix or prompt, 128 unless given"}
    )
    prefix_projection: bool | None = field(
        default=None,
        metadata={"help": "ptuning: make the prefix with a small network", "nargs": "?", "const": True},
    )

    def __post_init__(self) -> None:
        """Fill in what was not given.

        Raises:
            OSError, ValueError: if `adapter` cannot be read, or was made with other settings than those given.
        """
        if self.target_modules:
            self.target_modules = [name for names in self.target_modules for name in names.split(",") if name]
        for name in ("rank_pattern", "alpha_pattern"):
            setattr(self, name, _read_pattern(name, getattr(self, name)))
        used = {
            *METHOD_SETTINGS[self.method],
            *(["lora_dropout"] if "lora_rank" in METHOD_SETTINGS[self.method] else []),
        }
        unused = [name for name in NEW_ADAPTER if getattr(self, name) is not None and name not in used]
        if unused:
            logger.warning(f"{', '.join(unused)}: not used by the method {self.method}")
        made_with: dict[str, Any] = {}
        if self.adapter and self.method in GO_ON:
            with settings_named("adapter"):
                made_with = read_adapter(Path(self.adapter), self.method)
        for name, value in (NEW_ADAPTER | made_with).items():
            given = getattr(self, name)
            if given is None:
                setattr(self, name, value)
            # Names of layers are compared in `check_adapter`, where the model is known.
            elif name in made_with and name != "target_modules" and given != value:
                raise ValueError(f"{name}: {self.adapter} was made with {value}, not {given}; leave {name} out")


def _read_pattern(name: str, pattern: Any) -> dict[str, int] | None:
    """A setting that gives numbers to layers."""
    if isinstance(pattern, str):
        try:
            pattern = json.loads(pattern)
        except json.JSONDecodeError as error:
            raise ValueError(f'{name}: must be JSON like {{"dense": 4}}, got {pattern!r} ({error})') from error
    is_pattern = isinstance(pattern, dict) and all(type(number) is int and number > 0 for number in pattern.values())
    if pattern is not None and not is_pattern:
        raise ValueError(f"{name}: must give whole numbers of 1 or more to layers, got {pattern!r}")
    return pattern


@dataclass
class RunArguments(TrainingArguments):
    """The library's arguments, with three more and a few other defaults."""

    resume: str = field(default="no", metadata={"help": "no, auto (the last good checkpoint), or a checkpoint folder"})
    generate_samples: int = field(default=16, metadata={"help": "how many eval samples are answered before and after"})
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of such an answer at most"})
    logging_steps: float = field(default=10, metadata={"help": "how many steps between two logged losses"})
    save_total_limit: int | None = field(default=3, metadata={"help": "how many checkpoints are kept"})
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
    parser = ArgumentParser(classes, description=description, allow_abbrev=False)
    model, data, run = parser.parse_args_into_dataclasses(expand_file(words, classes))
    check_arguments(model, data, run)
    return model, data, run


def expand_file(words: list[str], classes: Sequence[type]) -> list[str]:
    """Words of a command line, with those that a YAML file in the first place stands for.

    Raises:
        OSError, ValueError: for an unreadable file or an unknown name.
    """
    if not words or not words[0].endswith((".yaml", ".yml")):
        return words
    known = {item.name for kind in classes for item in fields(kind)}
    return [*_words_of_file(Path(words[0]), known), *words[1:]]


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


class Rule(NamedTuple):
    """What the values of some settings must be."""

    names: tuple[str, ...]
    holds: Callable[[Any], bool]
    says: str


# Only what the library does not check itself, or not by the setting's name.
RULES = (
    Rule(
        (
            "max_length",
            "max_new_tokens",
            "lora_rank",
            "lora_alpha",
            "adalora_initial_rank",
            "trainable_layers",
            "pre_seq_len",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
        ),
        lambda value: value > 0,
        "must be more than 0",
    ),
    Rule(
        (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "neftune_noise_alpha",
            "generate_samples",
            "dataloader_num_workers",
        ),
        lambda value: 0 <= value < math.inf,
        "must be 0 or more, and finite",
    ),
    Rule(
        ("lora_dropout", "adam_beta1", "adam_beta2", "label_smoothing_factor"),
        lambda value: 0 <= value < 1,
        "must be at least 0 and less than 1",
    ),
    Rule(("max_steps",), bool, "must be more than 0, or -1 to go by num_train_epochs"),
)


def check_arguments(model: ModelArguments, data: DataArguments, run: RunArguments) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        ValueError: with the setting and the remedy.
    """
    settings = vars(model) | vars(data) | vars(run)
    for rule in RULES:
        for name in rule.names:
            if settings[name] is not None and not rule.holds(settings[name]):
                raise ValueError(f"{name}: {rule.says}, got {settings[name]}")
    for message, is_fault in (_faults_of_model(model) | _faults_of_run(model, data, run)).items():
        if is_fault:
            raise ValueError(message)
    _try_out(run)


def _try_out(run: RunArguments) -> None:
    """Let the libraries check what they otherwise do when the model is loaded or takes its first step."""
    with settings_named("report_to"):
        for tracker in get_reporting_integration_callbacks(run.report_to):
            tracker()
    if run.gradient_checkpointing and run.gradient_checkpointing_kwargs:
        with settings_named("gradient_checkpointing_kwargs"):
            # These two never reach torch.
            kwargs = {
                name: value
                for name, value in run.gradient_checkpointing_kwargs.items()
                if name not in ("every_n_layers", "offload")
            }
            checkpoint(torch.nn.Identity(), torch.zeros(1, requires_grad=True), **{"use_reentrant": False} | kwargs)


def _faults_of_model(model: ModelArguments) -> dict[str, Any]:
    """What may be wrong with the model and the method, and whether it is."""
    config_file = Path(model.model) / "config.json"
    if not config_file.is_file():
        raise ValueError(f"model: {model.model} is not a checkpoint folder: it has no config.json")
    with settings_named("model"):
        config = read_json_object(config_file)
    own_weights = model.method in OWN_WEIGHTS
    is_quantized = model.dtype in QUANTIZED_BITS or config.get("quantization_bit") or config.get("quantization_config")
    return {
        f"model: the model_type of {model.model} is {config.get('model_type')!r}, not 'chatglm'": (
            config.get("model_type") != "chatglm"
        ),
        f"method: {model.method} changes the weights themselves, which int8 and int4 cannot hold; use lora": (
            own_weights and is_quantized
        ),
        f"dtype: float16 is too coarse to add up small changes; for {model.method} use float32 with fp16: true, or "
        "bfloat16": (own_weights and model.dtype == "float16"),
        f"adapter: {model.method} trains no adapter; merge it into the checkpoint first": own_weights
        and model.adapter,
        "adapter: the ranks of adalora are settled when its run ends; merge it into the checkpoint first": (
            model.method == "adalora" and model.adapter
        ),
        f"adalora_initial_rank: must be more than lora_rank={model.lora_rank}, to which ranks come down": (
            model.method == "adalora" and (model.adalora_initial_rank or 0) <= (model.lora_rank or 0)
        ),
        "freeze_vision: query, key and value are parts of the text part's layers alone; name query_key_value": (
            PARTS & set(model.target_modules or ()) and config.get("vision_config") and not model.freeze_vision
        ),
        "target_modules: query, key and value are the parts of query_key_value; name it or some of them": (
            PARTS & set(model.target_modules or ())
            and {"query_key_value", "all-linear"} & set(model.target_modules or ())
        ),
    }


def _faults_of_run(model: ModelArguments, data: DataArguments, run: RunArguments) -> dict[str, Any]:
    """What may be wrong with the rest, and whether it is."""
    output = Path(run.output_dir or "")
    metric = str(run.metric_for_best_model).removeprefix("eval_")
    return {
        f"packing: {model.method} puts its prefix in front of a row, which the later samples of a packed row cannot "
        "see": (model.method in ("ptuning", "prompt_tuning") and data.packing),
        "weight_decay: shrinks all of the rows of query_key_value, also those that target_modules leaves alone; set 0": (
            run.weight_decay and PARTS & set(model.target_modules or ()) and (model.use_dora or model.adapter)
        ),
        "load_best_model_at_end: not with adalora and ptuning; their checkpoints can be resumed by name": (
            model.method in OWN_CHECKPOINTS and run.load_best_model_at_end
        ),
        f"metric_for_best_model: {run.metric_for_best_model} is not measured; only eval_loss is": (
            metric not in ("None", "loss")
        ),
        "eval_strategy: there is no eval_file": run.eval_strategy != "no" and not data.eval_file,
        "eval_on_start: there is no eval_file": run.eval_on_start and not data.eval_file,
        "dataloader_persistent_workers: needs dataloader_num_workers of 1 or more": (
            run.dataloader_persistent_workers and run.dataloader_num_workers == 0
        ),
        f"num_train_epochs: must be more than 0, got {run.num_train_epochs}": (
            run.max_steps < 0 and not 0 < run.num_train_epochs < math.inf
        ),
        "resume_from_checkpoint: use resume, which checks the checkpoint first": run.resume_from_checkpoint,
        f"output_dir: {output} is not empty; use another one, or resume: auto": (
            run.resume == "no" and output.is_dir() and any(output.iterdir())
        ),
    }


def error_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = " ".join(str(error).split())
    says_enough = isinstance(error, (OSError, ValueError, TypeError, ImportError, RuntimeError)) and text
    return text if says_enough else f"{type(error).__name__}: {text}"


@contextmanager
def settings_named(names: str) -> Iterator[None]:
    """Put the names of settings in front of what a library says of them.

    Raises:
        ValueError: in place of any exception.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{names}: {error_line(error)}") from error
