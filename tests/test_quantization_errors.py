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
"""What cannot be quantized or loaded is refused in plain words, before anything changes."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from quantized import (
    SETTINGS,
    ModelMaker,
    as_argument,
    assert_same_state,
    change_config,
    logits_of,
    maker,
    quantized_layers,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel


Named = Callable[[str], Any]


@pytest.fixture
def make(tiny_model: ModelMaker) -> ModelMaker:
    return maker(tiny_model)


WRONG_SETTINGS = {
    "bits-3": ({"bits": 3}, ValueError, "`bits` must be one of .*3"),
    "bits-5": ({"bits": 5}, ValueError, "`bits`.*5"),
    "bits-true": ({"bits": True}, ValueError, "`bits`.*True"),
    "bits-text": ({"bits": "4"}, ValueError, "`bits`.*'4'"),
    "bits-float": ({"bits": 4.0}, ValueError, "`bits`.*4.0"),
    "method": ({"bits": 4, "method": "gptq"}, ValueError, "`method`.*gptq"),
    "group-size": ({"bits": 4, "group_size": 48}, ValueError, "`group_size`.*48"),
    "group-width": ({"bits": 4, "group_size": 128}, ValueError, "query_key_value` has 32 columns.*128"),
    "output-layer": ({"bits": 4, "output_layer_bits": 2}, ValueError, "`output_layer_bits`.*2"),
}


@pytest.mark.parametrize(("settings", "error", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_wrong_settings_change_nothing(
    settings: dict[str, Any], error: type, message: str, tmp_path: Path, make: ModelMaker
) -> None:
    model = make("chatglm")
    untouched, config = copy.deepcopy(model), model.config.to_dict()
    with pytest.raises(error, match=message):
        model.quantize(**settings)
    assert_same_state(model, untouched)
    assert model.config.to_dict() == config
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        type(model).from_pretrained(tmp_path, quantization_config={"quant_method": "chatglm", **settings})


def test_quantizing_twice_is_refused_or_changes_nothing(make: ModelMaker) -> None:
    model = make().quantize(8)
    expected = copy.deepcopy(model.state_dict())
    for settings in ({"bits": 4}, {"bits": 8, "output_layer_bits": 8}):
        with pytest.raises(ValueError, match="quantized already.*dequantize"):
            model.quantize(**settings)
    # Published programs quantize checkpoints that are quantized.
    assert model.quantize(8) is model
    assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.quantization_bit == 8


def test_what_cannot_be_quantized_stays_as_it_is(make: ModelMaker) -> None:
    adapted = make()
    peft_model = peft.get_peft_model(adapted, peft.LoraConfig(r=2, target_modules=["dense_h_to_4h"]))
    broken = make()
    with torch.no_grad():
        broken.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight[3, 4] = float("nan")
    infinite = make("chatglm2", torch.float16)
    with torch.no_grad():
        infinite.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight[3, 4] = float("inf")
    for model, error, message in (
        (adapted, TypeError, r"dense_h_to_4h.*Quantize before adding adapters"),
        (peft_model, TypeError, r"dense_h_to_4h.*Quantize before adding adapters"),
        (broken, ValueError, r"layers\.1\.mlp\.dense_4h_to_h.*not finite"),
        (infinite, ValueError, r"layers\.0\.mlp\.dense_4h_to_h.*not finite"),
        (make().to("meta"), ValueError, "offloaded.*quantization_config"),
    ):
        types = [type(module) for module in model.modules()]
        with pytest.raises(error, match=message):
            model.quantize(4)
        assert [type(module) for module in model.modules()] == types
        assert not getattr(model, "is_quantized", False)
        assert not model.config.quantization_bit


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint holds, and what its configuration says
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["chatglm", "chatglm3"])
def folders(request: pytest.FixtureRequest, tmp_path: Path, make: ModelMaker) -> dict[str, Path]:
    """Checkpoints of each form of weights."""
    for name, settings in SETTINGS.items():
        make(request.param, torch.float16).quantize(**settings).save_pretrained(tmp_path / name)
    make(request.param, torch.float16).save_pretrained(tmp_path / "float")
    return {name: tmp_path / name for name in ("float", *SETTINGS)}


SAID: dict[str, dict[str, Any]] = {
    "float": {"quantization_bit": 0, "quantization_config": None},
    "int8": {"quantization_bit": 8, "quantization_config": None},
    "int4": {"quantization_bit": 4, "quantization_config": None},
    "groups": {"quantization_bit": 0, "quantization_config": as_argument(SETTINGS["groups"])},
}
REMEDIES = {
    "float": "holds floats.*Remove `quantization_bit`.*quantization_config=",
    "int8": 'holds int8 codes.*Set `"quantization_bit": 8`',
    "int4": 'holds int4 codes,.*Set `"quantization_bit": 4`',
    "groups": 'holds int4 codes in groups of 32.*Set `"quantization_config":.*"group_size": 32',
}


@pytest.mark.floor
@pytest.mark.parametrize("as_bin", [False, True], ids=["safetensors", "bin"])
def test_a_configuration_that_disagrees_with_the_tensors(
    as_bin: bool, folders: dict[str, Path], make: ModelMaker
) -> None:
    """Loading floats as codes, or codes as floats, used to give noise."""
    load = type(make()).from_pretrained
    for stored, folder in folders.items():
        if as_bin:
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        for said, keys in SAID.items():
            change_config(folder, **keys)
            if said == stored:
                assert len(quantized_layers(load(folder))) == (0 if said == "float" else 8)
                continue
            with pytest.raises(ValueError, match=REMEDIES[stored]):
                load(folder)


def test_the_remedies_work(folders: dict[str, Path], make: ModelMaker) -> None:
    load = type(make()).from_pretrained
    expected = {name: load(folder) for name, folder in folders.items()}
    with pytest.raises(ValueError, match="floats"):
        load(folders["float"], quantization_bit=8)
    assert_same_state(load(folders["float"], quantization_config=as_argument({"bits": 8})), expected["int8"])
    change_config(folders["int4"], quantization_bit=None)
    for options in ({}, {"quantization_config": as_argument({"bits": 4})}):
        with pytest.raises(ValueError, match="`transformer.*.weight` of this checkpoint holds int4 codes"):
            load(folders["int4"], **options)
    assert_same_state(load(folders["int4"], quantization_bit=4), expected["int4"])


def test_tensors_that_are_handed_over(make: ModelMaker) -> None:
    """`state_dict` instead of files."""
    model = make().quantize(8)
    load = type(model).from_pretrained
    config, state = make().config, model.state_dict()
    with pytest.raises(ValueError, match='holds int8 codes.*"quantization_bit": 8'):
        load(None, config=config, state_dict=state)
    config = copy.deepcopy(config)
    config.quantization_config = as_argument({"bits": 8})
    assert_same_state(load(None, config=config, state_dict=state), model)


def test_an_output_layer_that_the_configuration_does_not_know(tmp_path: Path, make: ModelMaker) -> None:
    model = make().quantize(8, output_layer_bits=4)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=as_argument({"bits": 8}))
    with pytest.raises(ValueError, match='output_layer.weight` .*holds int4.*"output_layer_bits": 4'):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("version", ["chatglm", "chatglm3"])
def test_quantized_embeddings(version: str, tmp_path: Path, make: ModelMaker) -> None:
    """As chatglm-6b-int4-qe has them."""
    model = make(version).quantize(4)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    weights |= {name: weights[name][:, ::2].to(torch.int8), f"{name}_scale": torch.ones(99)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"word_embeddings.weight` .*holds int4 codes.*not supported"):
        type(model).from_pretrained(tmp_path)


def test_two_settings_that_contradict_each_other(folders: dict[str, Path], make: ModelMaker) -> None:
    change_config(folders["int4"], quantization_bit=8, quantization_config=as_argument({"bits": 4}))
    with pytest.raises(ValueError, match="`quantization_bit` is 8, but `bits` of `quantization_config` is 4"):
        type(make()).from_pretrained(folders["int4"])


AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
}


@pytest.mark.parametrize("way", ["dictionary", "object", "auto"])
def test_asking_for_what_a_checkpoint_is_already(
    way: str, folders: dict[str, Path], make: ModelMaker, source: Callable[[str], ModuleType], copy_code: Named
) -> None:
    load = type(make()).from_pretrained
    for stored, folder in folders.items():
        if way == "auto":
            if stored != "int4":
                continue
            copy_code(folder)
            change_config(folder, auto_map=AUTO_MAP)
            load = partial(AutoModel.from_pretrained, trust_remote_code=True)
        for asked, settings in SETTINGS.items():
            argument = as_argument(settings)
            if way == "object":
                argument = source("quantization").ChatGLMQuantizationConfig(**settings)
            if stored in (asked, "float"):
                assert len(quantized_layers(load(folder, quantization_config=argument))) == 8
                continue
            with pytest.raises(ValueError, match="quantized already, with .*cannot be loaded with"):
                load(folder, quantization_config=argument)


def test_a_quantized_output_layer_cannot_be_resized(make: ModelMaker) -> None:
    model = make().quantize(4, output_layer_bits=8)
    state, expected = copy.deepcopy(model.state_dict()), logits_of(model)
    for options in ({"new_num_tokens": 120}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ValueError, match="output layer is quantized.*dequantize"):
            model.resize_token_embeddings(**options)
    assert model.resize_token_embeddings().num_embeddings == 99
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
    assert logits_of(model).equal(expected) and model.config.vocab_size == 99
    model.dequantize().resize_token_embeddings(120)
    assert logits_of(model.quantize(4, output_layer_bits=8)).shape[-1] == 120
    # Only the output layer is in the way.
    assert logits_of(make().quantize(4)).shape[-1] == 99
    model = make().quantize(4)
    model.resize_token_embeddings(120)
    assert logits_of(model).shape[-1] == 120
