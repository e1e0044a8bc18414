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
"""Checkpoints of the library's Trainer, which it loads by `load_state_dict` to resume and to end with the best model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import TINY, every_generation
from safetensors.torch import load_file
from transformers import AutoModel, PreTrainedModel, Trainer, TrainingArguments


ModelMaker = Callable[..., PreTrainedModel]

DATA = [{"input_ids": row, "labels": row} for row in torch.arange(4, 28).view(4, 6).tolist()]


def train(model: PreTrainedModel, folder: Path, resume: str | None = None, **settings: Any) -> Trainer:
    defaults = {"max_steps": 2, "save_steps": 1, "learning_rate": 0.05, "report_to": "none", "logging_steps": 1}
    arguments = TrainingArguments(str(folder), disable_tqdm=True, use_cpu=True, **defaults | settings)
    trainer = Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@every_generation
def test_resuming_continues_where_it_stopped(
    tiny_model: ModelMaker, version: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny_model(**TINY[version]), tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "checkpoint-2" / "model.safetensors")
    again = train(tiny_model(**TINY[version]), tmp_path / "again", str(tmp_path / "whole" / "checkpoint-1"))
    torch.testing.assert_close(load_file(tmp_path / "again" / "checkpoint-2" / "model.safetensors"), expected)
    assert again.state.global_step == 2
    assert "missing keys" not in caplog.text


def published(folder: Path, sharded: bool) -> PreTrainedModel:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    if sharded:
        save = model.save_pretrained
        model.save_pretrained = lambda *args, **kwargs: save(*args, **kwargs | {"max_shard_size": "100KB"})
    return model


@pytest.mark.parametrize("sharded", [False, True])
def test_names_of_the_published_folder_resume(
    case_folder: Callable[[str], Path], tmp_path: Path, sharded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """ChatGLM-6B is saved under its published names, which are not those of the modules."""
    folder = case_folder("chatglm1")
    first = published(folder, sharded)
    train(first, tmp_path / "first", max_steps=1)
    checkpoint = tmp_path / "first" / "checkpoint-1"
    names = set().union(*(load_file(file) for file in checkpoint.glob("*.safetensors")))
    assert "transformer.layers.0.attention.query_key_value.weight" in names
    assert len(list(checkpoint.glob("model*.safetensors"))) == 1 or sharded
    second = published(folder, sharded)
    # Nothing is learnt any more, so what is there at the end was loaded.
    train(second, tmp_path / "second", str(checkpoint), max_steps=1)
    torch.testing.assert_close(weights(second), weights(first))
    assert sharded or "missing keys" not in caplog.text
    assert second.get_output_embeddings().weight is second.get_input_embeddings().weight


@pytest.mark.parametrize("sharded", [False, True])
def test_the_best_model_is_loaded_at_the_end(
    case_folder: Callable[[str], Path], tmp_path: Path, sharded: bool
) -> None:
    model = published(case_folder("chatglm1"), sharded)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1.0}
    # The loss is greater after the first step, so that the last checkpoint is not the best.
    trainer = train(model, tmp_path, greater_is_better=True, **settings)
    best = Path(trainer.state.best_model_checkpoint)
    expected = AutoModel.from_pretrained(best, trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(weights(model), weights(expected))
    last = AutoModel.from_pretrained(tmp_path / "checkpoint-2", trust_remote_code=True, dtype=torch.float32)
    assert best.name == "checkpoint-1"
    assert not torch.equal(last.get_input_embeddings().weight, model.get_input_embeddings().weight)


@every_generation
@pytest.mark.parametrize(
    "head", ["ChatGLMForConditionalGeneration", "ChatGLMForSequenceClassification", "ChatGLMModel"]
)
def test_a_state_dict_takes_published_names(tiny_model: ModelMaker, version: str, head: str, tmp_path: Path) -> None:
    saved, other = tiny_model(head, **TINY[version]), tiny_model(head, **TINY[version])
    saved.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    if version == "chatglm" and head != "ChatGLMModel":
        for ours, theirs in saved.config.published_names.items():
            stored = {name.replace(ours, theirs): weight for name, weight in stored.items()}
        assert "transformer.layers.0.attention.dense.weight" in stored
    if head == "ChatGLMForSequenceClassification":
        assert {"classifier_head.weight", "classifier_head.bias"} < stored.keys()
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    other.load_state_dict(stored, strict=True)
    torch.testing.assert_close(weights(other), weights(saved))
    other.load_state_dict(saved.state_dict(), strict=True)
