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
"""Training on quantized weights: adapters, prefixes, the Trainer, and merging."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner
from quantized import (
    SETTINGS,
    ModelMaker,
    as_argument,
    assert_near,
    assert_same_state,
    logits_of,
    maker,
    prompt,
    quantized_layers,
)
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments


Named = Callable[[str], Any]


@pytest.fixture
def make(tiny_model: ModelMaker) -> ModelMaker:
    return maker(tiny_model)


ADAPTERS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True),
    "adalora": peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=100,
        target_modules=["query_key_value", "dense_h_to_4h"],
        task_type="CAUSAL_LM",
    ),
}


def train(model: nn.Module, steps: int = 12) -> list[float]:
    """The losses of a few steps on one batch."""
    ids = prompt()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ("lora", "int8"),
        ("lora", "int4"),
        ("lora", "groups"),
        ("dora", "int8"),
        ("dora", "groups"),
        ("adalora", "int4"),
    ],
)
def test_peft_adapters_train_on_integers(adapter: str, settings: str, make: ModelMaker) -> None:
    base = make().quantize(**SETTINGS[settings])
    before, expected = copy.deepcopy(base.state_dict()), logits_of(base)
    layers = quantized_layers(base)
    before_wrapping = {id(layer) for layer in layers.values()}
    model = peft.get_peft_model(base, copy.deepcopy(ADAPTERS[adapter])).train()
    # Unmodified: the adapters hold the very layers, and at first change nothing.
    held = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    assert len(held) == (4 if adapter == "adalora" else 8) and held <= before_wrapping
    assert_near(logits_of(model.eval()), expected, 0 if adapter == "lora" else 1e-5)
    losses = train(model.train())
    assert losses[-1] < 0.8 * losses[0]
    assert all("lora" in name for name, weight in model.named_parameters() if weight.requires_grad)
    after = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "QuantizedLinear"}
    assert len(after) == len(layers) == 8
    for name, layer in layers.items():
        for part in ("weight", "weight_scale"):
            assert getattr(layer, part).equal(before[f"{name}.{part}"])
    with model.disable_adapter():
        assert logits_of(model.eval()).equal(expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_lora(use_reentrant: bool, make: ModelMaker) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(make("chatglm").quantize(4), copy.deepcopy(ADAPTERS["lora"])).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            nn.init.normal_(weight, std=0.1)
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_ptuning_trains_on_integers(generation: str, tmp_path: Path, make: ModelMaker) -> None:
    make(generation).save_pretrained(tmp_path)
    model = type(make(generation)).from_pretrained(
        tmp_path, pre_seq_len=4, quantization_config={"quant_method": "chatglm", "bits": 4}
    )
    in_place = make(generation, pre_seq_len=4).quantize(4)
    for one in (model, in_place):
        codes = {name: layer.weight.clone() for name, layer in quantized_layers(one).items()}
        assert len(codes) == 8
        trainable = [name for name, weight in one.named_parameters() if weight.requires_grad]
        assert trainable == ["transformer.prefix_encoder.embedding.weight"]
        losses = train(one.train())
        assert losses[-1] < losses[0]
        assert all(weight.grad is None for name, weight in one.named_parameters() if name not in trainable)
        assert all(layer.weight.equal(codes[name]) for name, layer in quantized_layers(one).items())


@pytest.mark.floor
@pytest.mark.parametrize("way", ["lora", "ptuning"])
def test_trainer_accepts_a_quantized_model(way: str, tmp_path: Path, make: ModelMaker) -> None:
    if way == "lora":
        model = peft.get_peft_model(make().quantize(4), copy.deepcopy(ADAPTERS["lora"]))
    else:
        model = make(pre_seq_len=4).quantize(4)
    rows = [{"input_ids": row, "labels": row} for row in prompt().tolist()]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, learning_rate=0.1, report_to="none", use_cpu=True, save_strategy="no"
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, weight in model.named_parameters() if not weight.equal(before[name])}
    assert changed
    assert all(("lora" if way == "lora" else "prefix_encoder") in name for name in changed)


def test_a_finished_fine_tune_is_saved_as_int4(tmp_path: Path, make: ModelMaker) -> None:
    model = peft.get_peft_model(make(), copy.deepcopy(ADAPTERS["lora"])).train()
    train(model, steps=2)
    merged = model.merge_and_unload().eval().quantize(4)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert_same_state(again, merged)
    assert logits_of(again).equal(logits_of(merged))


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


MERGED: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
    "dora": peft.LoraConfig(r=4, target_modules=["dense_4h_to_h"], use_dora=True),
    "rslora": peft.LoraConfig(r=4, target_modules=["query_key_value"], use_rslora=True),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["dense_h_to_4h"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["dense_4h_to_h"]),
    "ia3": peft.IA3Config(target_modules=["query_key_value"], feedforward_modules=[]),
}


def adapted(model: PreTrainedModel, config: peft.PeftConfig) -> Any:
    """A model with an adapter that does something."""
    model = peft.get_peft_model(model, copy.deepcopy(config)).eval()
    torch.manual_seed(1)
    for weight in (weight for weight in model.parameters() if weight.requires_grad):
        nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("config", MERGED.values(), ids=MERGED)
def test_merging_into_codes_is_refused(config: peft.PeftConfig, settings: dict[str, Any], make: ModelMaker) -> None:
    """And the remedy that the error names merges right."""
    model = adapted(make().quantize(**settings), config)
    expected, state = logits_of(model), copy.deepcopy(model.state_dict())
    for merge in (model.merge_and_unload, model.merge_adapter):
        for safe_merge in (False, True):
            with pytest.raises(ValueError, match=r"adapts a quantized layer.*`dequantize\(\)`.*`quantize\(bits\)`"):
                merge(safe_merge=safe_merge)
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert logits_of(model).equal(expected)
    model.dequantize()
    frozen = [weight for name, weight in model.named_parameters() if ".base_layer." in name]
    assert frozen and not any(weight.requires_grad for weight in frozen)
    merged = model.merge_and_unload()
    assert_near(logits_of(merged), expected, 1e-4)
    assert len(quantized_layers(merged.quantize(**settings))) == 8


def test_merging_several_kinds_at_once_is_refused(make: ModelMaker) -> None:
    """PEFT's model of several kinds of adapters merges in a way of its own."""
    model = peft.get_peft_model(make().quantize(8), copy.deepcopy(MERGED["lora"]), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["dense"]))
    state = copy.deepcopy(model.state_dict())
    for merge in (model.merge_and_unload, model.base_model.merge_adapter):
        with pytest.raises(ValueError, match="adapts a quantized layer"):
            merge()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())


def test_merging_what_came_out_of_a_pickle_is_refused(make: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = pickle.dumps(adapted(make().quantize(4), MERGED["lora"]))
    # As in another process, where nothing has put an adapter on one of these models.
    for name in ("merge_and_unload", "merge_adapter"):
        monkeypatch.setattr(BaseTuner, name, getattr(BaseTuner, name).__wrapped__)
    model = pickle.loads(stored)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="adapts a quantized layer"):
            merge()


def test_merging_what_is_not_on_codes(make: ModelMaker) -> None:
    model = adapted(make().quantize(4), peft.LoraConfig(r=4, target_modules=["output_layer"]))
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert_near(logits_of(merged), expected, 1e-5)
    assert len(quantized_layers(merged)) == 8 and not hasattr(merged, "peft_config")
    model = adapted(make(), MERGED["lora"])
    expected = logits_of(model)
    assert_near(logits_of(model.merge_and_unload(safe_merge=True)), expected, 1e-5)


def test_unloading_an_adapter_leaves_the_codes(make: ModelMaker) -> None:
    base = make().quantize(8)
    expected, state = logits_of(base), copy.deepcopy(base.state_dict())
    unloaded = adapted(base, MERGED["lora"]).unload()
    assert logits_of(unloaded).equal(expected)
    assert all(tensor.equal(state[name]) for name, tensor in unloaded.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# What may train
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.floor
def test_trainer_refuses_integers_without_anything_to_train(tmp_path: Path, make: ModelMaker) -> None:
    """Only a few norms and embeddings would be left."""
    make().save_pretrained(tmp_path)
    loaded = type(make()).from_pretrained(tmp_path, quantization_config=as_argument({"bits": 4}))
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    for model in (make().quantize(4), loaded):
        with pytest.raises(ValueError, match="purely quantized"):
            Trainer(model, arguments)
    Trainer(make(), arguments)
    model.load_prefix_encoder(make(pre_seq_len=4).save_prefix_encoder(tmp_path / "prefix"))
    Trainer(model, arguments)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_everything_but_the_codes_may_train(settings: dict[str, Any], make: ModelMaker) -> None:
    model = make().quantize(**settings)
    parts = {f"{name}.{part}" for name in quantized_layers(model) for part in ("weight", "weight_scale")}
    for flag in (False, True):
        assert model.requires_grad_(flag) is model
        assert all(weight.requires_grad == (flag and name not in parts) for name, weight in model.named_parameters())
    model(input_ids=prompt(), labels=prompt()).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_a_model_that_was_quantized_in_inference_mode(settings: dict[str, Any], make: ModelMaker) -> None:
    models = {name: make() for name in ("quantized", "dequantized", "used")}
    models["dequantized"].quantize(**settings)
    models["used"].quantize(**settings)
    with torch.inference_mode():
        models["quantized"].quantize(**settings)
        models["dequantized"].dequantize()
        models["used"](input_ids=prompt())
    for model in models.values():
        losses = train(peft.get_peft_model(model, copy.deepcopy(ADAPTERS["lora"])).train(), steps=3)
        assert losses[-1] < losses[0]
