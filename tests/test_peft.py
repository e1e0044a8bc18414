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
"""Adapters of PEFT: published ones, several at once, on a part of the fused projection, and merged."""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from generations import TINY
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


ModelMaker = Callable[..., PreTrainedModel]
IDS = torch.arange(5, 17).view(1, -1)
# What the published code of ChatGLM-6B calls its layers, and what they are called here.
CHATGLM_6B_ADAPTER_NAMES = {r"transformer\.layers": "transformer.encoder.layers", r"\.attention\.": ".self_attention."}


@pytest.fixture
def make_model(tiny_model: ModelMaker) -> ModelMaker:
    def make(version: str = "chatglm3") -> PreTrainedModel:
        return tiny_model(**TINY[version])

    return make


def add_lora(model: PreTrainedModel, **settings: object) -> peft.PeftModel:
    """An adapter that does something: one that is new has no effect."""
    settings = {"r": 4, "target_modules": ["query_key_value"], **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return adapted


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, position_ids=torch.arange(IDS.shape[1])[None]).logits


@pytest.mark.parametrize("version", TINY)
def test_all_linear_is_all_but_the_output_layer(make_model: ModelMaker, version: str) -> None:
    adapted = add_lora(make_model(version), target_modules="all-linear")
    wrapped = {name.rpartition(".")[2] for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


@pytest.mark.parametrize("version", TINY)
def test_published_adapters_load(make_model: ModelMaker, version: str, tmp_path: Path) -> None:
    adapted = add_lora(make_model(version))
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights, mapping = load_file(file), None
    if version == "chatglm":
        mapping = CHATGLM_6B_ADAPTER_NAMES
        weights = {
            key.replace("transformer.encoder.layers", "transformer.layers").replace(
                ".self_attention.", ".attention."
            ): weight
            for key, weight in weights.items()
        }
        save_file(weights, file)
    layers, attention = ("layers", "attention") if version == "chatglm" else ("encoder.layers", "self_attention")
    assert f"base_model.model.transformer.{layers}.0.{attention}.query_key_value.lora_A.weight" in weights
    again = peft.PeftModel.from_pretrained(make_model(version), tmp_path, key_mapping=mapping).eval()
    assert logits(again).equal(expected)


def test_adapters_are_swapped(make_model: ModelMaker, tmp_path: Path) -> None:
    plain = logits(make_model())
    adapted = add_lora(make_model())
    first = logits(adapted)
    adapted.save_pretrained(tmp_path)
    adapted.add_adapter("second", peft.LoraConfig(r=2, target_modules=["dense"], init_lora_weights=False))
    adapted.set_adapter("second")
    second = logits(adapted)
    adapted.set_adapter("default")
    assert logits(adapted).equal(first)
    assert not first.allclose(second) and not first.allclose(plain)
    with adapted.disable_adapter():
        assert logits(adapted).equal(plain)
    # The library's own way to the same file.
    model = make_model()
    model.load_adapter(str(tmp_path))
    assert logits(model.eval()).equal(first)


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_with_integers_needs_floats_first(make_model: ModelMaker, bits: int) -> None:
    adapted = add_lora(make_model().quantize(bits))
    expected = logits(adapted)
    # Nothing is rounded in silence.
    with pytest.raises(ValueError, match="dequantize"):
        adapted.merge_and_unload()
    adapted.dequantize()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("version", ["chatglm2", "chatglm3", "glm4"])
def test_queries_and_values_alone(make_model: ModelMaker, version: str) -> None:
    """The rows of the fused projection that are keys get no gradient, so `lora_B` keeps its zeros there."""
    model = make_model(version)
    query_size, key_size = (
        heads * model.config.head_dim for heads in (model.config.num_attention_heads, model.config.num_key_value_heads)
    )
    keys = slice(query_size, query_size + key_size)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query_key_value"])).train()
    trained = [weight for name, weight in adapted.named_parameters() if "lora_B" in name]
    for weight in trained:
        trains = torch.ones(weight.shape[0], 1)
        trains[keys] = 0
        weight.register_hook(lambda gradient, trains=trains: gradient * trains)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight in trained:
        assert not weight[keys].any()
        assert weight[: keys.start].any() and weight[keys.stop :].any()


@pytest.mark.parametrize("version", TINY)
def test_adalora_moves_ranks(make_model: ModelMaker, version: str) -> None:
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=2,
        tinit=2,
        tfinal=4,
        deltaT=1,
        total_step=20,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(make_model(version), config).train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=5e-2)
    for step in range(20):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        adapted.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    ranks = [sum(kept) for kept in adapted.peft_config["default"].rank_pattern.values()]
    assert sum(ranks) == 2 * len(ranks) == 16
    assert len(set(ranks)) > 1
