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
"""The losses that the library's Trainer computes with these models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments


ModelMaker = Callable[..., PreTrainedModel]


def rows(num_rows: int, labels: list[Any] | None = None) -> list[dict[str, Any]]:
    ids = torch.randint(4, 89, (num_rows, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row if labels is None else labels[index]} for index, row in enumerate(ids)]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(model: PreTrainedModel, data: list[dict[str, Any]], **settings: Any) -> Trainer:
        defaults = {
            "max_steps": 1,
            "logging_steps": 1,
            "learning_rate": 0.0,
            "report_to": "none",
            "save_strategy": "no",
        }
        arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, use_cpu=True, **defaults | settings)
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    return make


def logged_loss(trainer: Trainer) -> float:
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("adapter", [False, True])
def test_label_smoothing_predicts_the_next_token(
    tiny_model: ModelMaker, trainer: Callable[..., Trainer], adapter: bool
) -> None:
    chatglm, data = tiny_model(), rows(2)
    ids = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        logits = chatglm(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.2).item()
    model = get_peft_model(chatglm, LoraConfig(task_type="CAUSAL_LM", r=2)) if adapter else chatglm
    settings = {"label_smoothing_factor": 0.2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    smoothing = trainer(model, data, **settings)
    assert logged_loss(smoothing) == pytest.approx(expected, rel=1e-4)
    assert smoothing.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("head", "adapter", "label_smoothing_factor"),
    [
        ("ChatGLMForConditionalGeneration", False, 0.2),
        ("ChatGLMForSequenceClassification", False, 0.0),
        ("ChatGLMForSequenceClassification", True, 0.0),
        ("ChatGLMForSequenceClassification", False, 0.2),
    ],
)
def test_accumulation_does_not_change_the_loss(
    tiny_model: ModelMaker,
    trainer: Callable[..., Trainer],
    head: str,
    adapter: bool,
    label_smoothing_factor: float,
) -> None:
    is_classifier = head == "ChatGLMForSequenceClassification"
    data = rows(4, [0, 1, 1, 0] if is_classifier else None)
    losses = []
    for batch_size in (4, 2):
        model = tiny_model(head)
        if adapter:
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2))
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        losses.append(logged_loss(trainer(model, data, label_smoothing_factor=label_smoothing_factor, **settings)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
