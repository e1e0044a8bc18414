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
"""Fixtures of the tests of fine-tuning."""

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from conftest import auto_classes_left_alone


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import finetune_report  # noqa: E402

from .short_runs import BUNDLED, LEARNING_RATES, METHODS, RECORDS, SETTINGS, finetune, prepare, write_lines  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def registers(leave_the_auto_classes_alone: None) -> None:
    """The programs register this repository's classes."""


@pytest.fixture(autouse=True, scope="package")
def collect_garbage_faster() -> Iterator[None]:
    """Every run begins with a collection, which takes most of a second with all that is imported here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="package")
def cache_of_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where encoded rows are kept, apart from what the user has."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture
def make_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The command line of a short run; the output folder is `tmp_path / "out"` unless named, and None leaves out."""
    # As long as the training itself; `finished` has curves.
    monkeypatch.setattr(finetune, "draw_curves", lambda path, history: None)
    train_file = write_lines(tmp_path / "train.jsonl", RECORDS)

    def settings(method: str = "lora", **changes: Any) -> list[str]:
        values = SETTINGS | {
            "method": method,
            "train_file": train_file,
            "output_dir": str(tmp_path / "out"),
            "learning_rate": LEARNING_RATES.get(method, 1e-3),
        }
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
        return [str(file)]

    return settings


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[finetune.Job, str]]:
    """A run of every method on 4 records, and what its model answers to the first."""
    jobs = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        file = write_lines(folder / "data.jsonl", RECORDS[:4])
        settings = f"--model={BUNDLED} --method={method} --train_file={file} --eval_file={file} --pre_seq_len=8"
        settings += f" --target_modules all-linear --learning_rate={LEARNING_RATES[method]} --output_dir={folder}/out"
        settings += " --max_steps=40 --logging_steps=1 --eval_strategy=steps --eval_steps=20 --save_steps=20"
        settings += " --per_device_train_batch_size=4 --use_cpu=true --disable_tqdm=true --max_new_tokens=24"
        with auto_classes_left_alone():
            job = prepare(settings.split())
            finetune.train(job)
        (answer,) = finetune_report.generate_answers(
            job.trainer.model, job.trainer.processing_class, job.samples[:1], max_new_tokens=32
        )
        jobs[method] = job, answer.answer
    return jobs
