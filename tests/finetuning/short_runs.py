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
"""What the tests of fine-tuning share: a few dialogues, and the settings of a run that takes a second."""

import json
from pathlib import Path
from typing import Any

import finetune
import finetune_data
from finetune_settings import read_arguments


REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
BUNDLED = EXAMPLES / "tiny-chatglm3"
CONFIGS = EXAMPLES / "configs"
METHODS = ("full", "lora", "adalora", "ptuning")
LEARNING_RATES = {"full": 2e-3, "lora": 2e-2, "adalora": 5e-2, "ptuning": 5e-2}


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def ask(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


COLORS = ["red", "blue", "green", "black", "white", "yellow", "brown", "grey"]
# New to the model, so that there is something to learn.
RECORDS = [ask(f"What color is number {index}?", f"It is {color}.") for index, color in enumerate(COLORS)]


SETTINGS: dict[str, Any] = {
    "model": str(BUNDLED),
    "pre_seq_len": 8,
    "target_modules": ["all-linear"],
    "max_steps": 10,
    "save_steps": 5,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "disable_tqdm": True,
}


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["loss_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def prepare(words: list[str]) -> finetune.Job:
    return finetune.prepare(*read_arguments(words))


def data_arguments(**changes: Any) -> finetune_data.DataArguments:
    return finetune_data.DataArguments(**{"train_file": "", **changes})
