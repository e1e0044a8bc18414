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
"""Fine-tuning: how settings are read, and which are refused, in one line that names them."""

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import count_steps

from .short_runs import BUNDLED, CONFIGS, EXAMPLES, RECORDS, finetune, prepare, read_arguments, write_lines


DIALOGUES = str(EXAMPLES / "dialogues.jsonl")
BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "lorra"}, "argument --method: invalid choice: 'lorra'"),
    "key": ({"lerning_rate": 1}, "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
    "value": ({"lora_rank": "many"}, "argument --lora_rank"),
    "folder": ({"model": "nowhere"}, "nowhere is not a checkpoint folder"),
    "quantized": ({"method": "full", "dtype": "int4"}, "use lora"),
    "half": ({"method": "full", "dtype": "float16"}, "float16 is too coarse"),
    "ranks": ({"method": "adalora", "lora_rank": 12}, "adalora_initial_rank: must be more than lora_rank=12"),
    "packed prefix": ({"method": "ptuning", "packing": True}, "packing: ptuning"),
    "evaluation": ({"eval_strategy": "steps"}, "eval_strategy: there is no eval_file"),
    "evaluation at first": ({"eval_on_start": True}, "eval_on_start: there is no eval_file"),
    "metric": ({"metric_for_best_model": "f1"}, "metric_for_best_model: f1 is not measured"),
    "no epochs": ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs: must be more than 0, got 0"),
    "workers": (
        {"dataloader_persistent_workers": True},
        "dataloader_persistent_workers: needs dataloader_num_workers",
    ),
    "dropped rows": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 9},
        "dataloader_drop_last: 8 rows do not fill one batch of 9",
    ),
    "dropped eval rows": (
        {
            "dataloader_drop_last": True,
            "eval_file": DIALOGUES,
            "per_device_eval_batch_size": 1000,
            "generate_samples": 0,
        },
        "dataloader_drop_last: 429 rows do not fill one batch of 1000",
    ),
    "tracker": ({"report_to": "nobody"}, "report_to: nobody is not supported"),
    "checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}},
        "error: gradient_checkpointing_kwargs: ",
    ),
    "layers": ({"target_modules": ["nothing"]}, "target_modules: Target modules {'nothing'} not found"),
    "no data": ({"train_file": "nowhere.jsonl"}, "train_file: [Errno 2] No such file or directory: 'nowhere.jsonl'"),
    "no adapter": ({"adapter": "nowhere"}, "nowhere has no adapter_model.safetensors"),
    "no checkpoint": ({"resume": "nowhere"}, "nowhere cannot be used: there is no such folder"),
}
RANGES = {
    "max_length": ("-5", "0"),
    "max_new_tokens": ("0",),
    "generate_samples": ("-1",),
    "lora_rank": ("0", "-1"),
    "lora_alpha": ("0",),
    "lora_dropout": ("1", "nan"),
    "adalora_initial_rank": ("0",),
    "pre_seq_len": ("0", "-1"),
    "per_device_train_batch_size": ("0",),
    "per_device_eval_batch_size": ("0",),
    "gradient_accumulation_steps": ("0",),
    "eval_accumulation_steps": ("0",),
    "learning_rate": ("-1", "nan", "inf"),
    "weight_decay": ("nan",),
    "max_steps": ("0",),
}
BAD_SETTINGS |= {
    f"{name} {value}": ({name: value}, f"error: {name}: must be ")
    for name, values in RANGES.items()
    for value in values
}
# What only the library checks, while it builds what training needs.
BAD_SETTINGS |= {
    "scheduler that lacks kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_kwargs, warmup_steps: One of min_lr or min_lr_rate should be set",
    ),
    "unknown kwargs of a scheduler": (
        {"lr_scheduler_kwargs": {"foo": 1}},
        "lr_scheduler_kwargs, warmup_steps: get_linear_schedule_with_warmup() got an unexpected keyword argument 'foo'",
    ),
    "arguments of an optimizer": ({"optim_args": "foo"}, "optim, optim_args: not enough values to unpack"),
    "accelerator": ({"accelerator_config": {"foo": 1}}, "AcceleratorConfig.__init__() got an unexpected keyword"),
    "prefetching": ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor can only be set when"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    changes, message = BAD_SETTINGS[name]
    assert finetune.main(make_settings(**changes)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


PACKAGES = {
    "wandb": {"report_to": "wandb"},
    "tensorboard": {"report_to": "tensorboard"},
    "liger_kernel": {"use_liger_kernel": True},
    "galore_torch": {"optim": "galore_adamw", "optim_target_modules": ["attention"]},
    "bitsandbytes": {"optim": "adamw_bnb_8bit"},
    "deepspeed": {"deepspeed": str(CONFIGS / "zero3.json")},
}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_that_are_not_installed(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], package: str
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    assert finetune.main(make_settings(**PACKAGES[package])) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert package.partition("_")[0] in error


def test_an_error_while_training_keeps_its_traceback(
    make_settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("a bug")

    # Saving after the fifth step.
    monkeypatch.setattr(finetune.FinetuneTrainer, "save_model", fail)
    with pytest.raises(KeyError, match="a bug"):
        finetune.main(make_settings())


def test_files_of_the_model_that_are_damaged(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    for name, content, message in (
        (
            "model.safetensors",
            (BUNDLED / "model.safetensors").read_bytes()[:5000],
            "error: model: .*deserializing header",
        ),
        ("config.json", b"[1, 2]", "error: model: .*config.json must hold a JSON object, not a list"),
        ("config.json", b"{", "error: model: .*config.json is not JSON"),
        ("config.json", b'{"model_type": "llama"}', "error: model: the model_type of .* is 'llama', not 'chatglm'"),
        ("config.json", b'{"model_type": "chatglm", "num_layers": -1}', "error: model: .*-1"),
        ("tokenizer_config.json", b"[]", "error: model: .*tokenizer_config.json must hold a JSON object"),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert finetune.main(make_settings(model=str(folder))) == 2
        assert re.search(message, capsys.readouterr().err)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize(("num_rows", "drop", "expected"), [(9, False, 6), (9, True, 4)])
def test_steps_are_counted_as_the_trainer_counts_them(
    make_settings: Callable[..., list[str]], tmp_path: Path, num_rows: int, drop: bool, expected: int
) -> None:
    file = write_lines(tmp_path / "rows.jsonl", (RECORDS * 2)[:num_rows])
    changes = {"max_steps": -1, "num_train_epochs": 2, "learning_rate": 0, "lora_rank": 1, "adalora_initial_rank": 2}
    words = make_settings("adalora", train_file=file, dataloader_drop_last=drop, save_strategy="no", **changes)
    job = prepare(words)
    assert count_steps(num_rows, job.trainer.args) == expected
    # AdaLoRA's plan is compared with the Trainer's when training starts.
    job.trainer.train()
    assert job.trainer.state.global_step == expected


def test_chatglm_6b_is_not_packed(
    make_settings: Callable[..., list[str]], reference_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="packing: ChatGLM-6B"):
        prepare(make_settings(model=str(reference_dir / "chatglm1"), packing=True))


def test_results_are_not_written_over(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert finetune.main(make_settings()) == 2


def test_the_command_line_wins(make_settings: Callable[..., list[str]]) -> None:
    model, _, run_arguments = read_arguments([*make_settings(), "--lora_rank", "3", "--learning_rate", "0.5"])
    assert (model.lora_rank, run_arguments.learning_rate, run_arguments.max_steps) == (3, 0.5, 10)


def test_values_of_a_file(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    words = make_settings(gradient_checkpointing_kwargs={"use_reentrant": True}, adapter=None, packing=True)
    with (tmp_path / "settings.yaml").open("a", encoding="utf-8") as file:
        # Which YAML takes for a truth value and for text.
        file.write("eval_strategy: no\nweight_decay: 1e-2\n")
    model, data, run_arguments = read_arguments(words)
    assert run_arguments.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert (run_arguments.eval_strategy, run_arguments.weight_decay) == ("no", 0.01)
    assert (model.adapter, model.target_modules, data.packing) == (None, ["all-linear"], True)


def test_interrupted(make_settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune.FinetuneTrainer, "train", interrupt)
    assert finetune.main(make_settings()) == 130
