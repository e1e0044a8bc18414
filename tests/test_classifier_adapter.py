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
"""PEFT's adapters of a sequence classifier, whose head is trained and saved with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generations import TINY, every_generation
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


ModelMaker = Callable[..., PreTrainedModel]

IDS = torch.arange(4, 18).view(2, 7)


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("modules_to_save", [None, ["classifier_head"]])
@every_generation
def test_the_head_is_trained_and_saved(
    tiny_model: ModelMaker, version: str, modules_to_save: list[str] | None, tmp_path: Path
) -> None:
    def classifier() -> PreTrainedModel:
        return tiny_model("ChatGLMForSequenceClassification", **TINY[version])

    settings = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=modules_to_save)
    model = get_peft_model(classifier(), settings)
    train(model.train())
    model.eval().save_pretrained(tmp_path / "adapter")
    names = [name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if "lora" not in name]
    assert names
    assert all("classifier_head" in name for name in names)
    again = PeftModel.from_pretrained(classifier(), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    before = classifier()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, again(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(merged.classifier_head.weight, before.classifier_head.weight)
    merged.save_pretrained(tmp_path / "merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(stored["classifier_head.weight"], merged.classifier_head.weight)
    assert "classifier_head.bias" in stored
    loaded = type(before).from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def test_an_adapter_with_the_published_name_is_loaded(tiny_model: ModelMaker, tmp_path: Path) -> None:
    settings = LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["classifier_head"])
    model = get_peft_model(tiny_model("ChatGLMForSequenceClassification"), settings)
    train(model.train())
    model.eval().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = {
        name.replace("classifier_head_score", "classifier_head"): weight for name, weight in load_file(file).items()
    }
    assert "base_model.model.classifier_head.weight" in stored
    save_file(stored, file)
    again = PeftModel.from_pretrained(tiny_model("ChatGLMForSequenceClassification"), tmp_path)
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@every_generation
def test_all_linear_layers_leave_the_head_out(tiny_model: ModelMaker, version: str) -> None:
    classifier = tiny_model("ChatGLMForSequenceClassification", **TINY[version])
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
    assert not any("classifier_head" in name and "lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_soft_prompts_train_the_head(tiny_model: ModelMaker, kind: type) -> None:
    classifier = tiny_model("ChatGLMForSequenceClassification")
    model = get_peft_model(classifier, kind(task_type="SEQ_CLS", num_virtual_tokens=3))
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    train(model.train())
    changed = {name for name, weight in before.items() if not torch.equal(weight, model.get_parameter(name))}
    assert any("classifier_head" in name for name in changed)
