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
"""Quantized models with a part on the disk or on another device: accelerate takes weights away and brings them back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from quantized import (
    DTYPES,
    HALF_LIMIT,
    SETTINGS,
    ModelMaker,
    as_argument,
    assert_near,
    assert_same_state,
    logits_of,
    maker,
    quantized_layers,
)
from transformers import PreTrainedModel


every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
both_layouts = pytest.mark.parametrize("version", ["chatglm", "chatglm3"])

ON_DISK = {"transformer.embedding": "cpu", "transformer.encoder": "disk", "transformer.output_layer": "cpu"}


@pytest.fixture
def make(tiny_model: ModelMaker) -> ModelMaker:
    return maker(tiny_model)


def assert_still_right(model: PreTrainedModel, expected: torch.Tensor) -> None:
    """From the second forward on, too: the first must not change what the hooks bring back."""
    # Without a packed copy, another way of multiplying is chosen.
    first = logits_of(model)
    assert_near(first, expected, HALF_LIMIT[first.dtype])
    for _ in range(2):
        assert logits_of(model).equal(first)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@every_dtype
@every_setting
@both_layouts
def test_weights_that_accelerate_takes_away_and_brings_back(
    version: str, settings: dict[str, Any], dtype: torch.dtype, on_disk: bool, tmp_path: Path, make: ModelMaker
) -> None:
    model = make(version, dtype).quantize(**settings)
    expected = logits_of(model)
    if on_disk:
        disk_offload(model, tmp_path, execution_device="cpu")
    else:
        cpu_offload(model, execution_device="cpu")
    assert_still_right(model, expected)


@pytest.mark.floor
@every_dtype
@every_setting
@both_layouts
def test_quantizing_while_loading_to_the_disk(
    version: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, make: ModelMaker
) -> None:
    """The file on the disk is the float one, and what stays there has to be written anew."""
    float_model = make(version, dtype)
    float_model.save_pretrained(tmp_path / "float")
    options = {"dtype": dtype, "device_map": ON_DISK, "offload_folder": tmp_path / "disk"}
    model = type(float_model).from_pretrained(tmp_path / "float", quantization_config=as_argument(settings), **options)
    assert all(layer.weight.is_meta for layer in quantized_layers(model).values())
    twin = float_model.quantize(**settings)
    assert_still_right(model, logits_of(twin))
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(type(twin).from_pretrained(tmp_path / "saved"), twin)
    options["offload_folder"] = tmp_path / "again"
    again = type(model).from_pretrained(tmp_path / "saved", **options)
    assert_still_right(again, logits_of(twin))


@pytest.mark.floor
@both_layouts
def test_device_maps_count_quantized_weights(version: str, tmp_path: Path, make: ModelMaker) -> None:
    """What fits as int4 is not sent to the disk because its floats would not."""
    float_model = make(version, num_layers=6)
    float_model.save_pretrained(tmp_path)
    size = sum(weight.nbytes for weight in float_model.parameters())
    for settings in ({}, {"quantization_config": as_argument({"bits": 4, "output_layer_bits": 8})}):
        model = type(float_model).from_pretrained(
            tmp_path,
            device_map="auto",
            max_memory={"cpu": int(0.6 * size)},
            offload_folder=tmp_path / "disk",
            **settings,
        )
        assert any(weight.is_meta for weight in model.parameters()) == (not settings)


@both_layouts
def test_an_output_layer_that_is_quantized_to_the_disk(version: str, tmp_path: Path, make: ModelMaker) -> None:
    """ChatGLM-6B's is the word embedding, and no file holds it a second time."""
    float_model, settings = make(version), {"bits": 4, "output_layer_bits": 8}
    float_model.save_pretrained(tmp_path / "float")
    model = type(float_model).from_pretrained(
        tmp_path / "float",
        quantization_config=as_argument(settings),
        device_map={"transformer.embedding": "cpu", "transformer.encoder": "cpu", "transformer.output_layer": "disk"},
        offload_folder=tmp_path / "disk",
    )
    assert model.get_output_embeddings().weight.is_meta
    assert_still_right(model, logits_of(float_model.quantize(**settings)))


def test_weights_that_are_away_are_refused(tmp_path: Path, make: ModelMaker) -> None:
    make().save_pretrained(tmp_path / "float")
    make().quantize(4).save_pretrained(tmp_path / "int4")
    load = type(make()).from_pretrained
    options = {"device_map": ON_DISK, "offload_folder": tmp_path / "disk"}
    model = load(tmp_path / "float", **options)
    with pytest.raises(ValueError, match="offloaded.*quantization_config.*from_pretrained"):
        model.quantize(4)
    assert logits_of(model).equal(logits_of(make()))
    # The way that the error names.
    model = load(tmp_path / "float", quantization_config=as_argument({"bits": 4}), **options)
    for quantized in (model, load(tmp_path / "int4", **options)):
        expected = logits_of(quantized)
        assert_near(expected, logits_of(make().quantize(4)), 1e-5)
        with pytest.raises(ValueError, match="offloaded.*without offloading"):
            quantized.dequantize()
        assert quantized.is_quantized and quantized.config.quantization_bit == 4
        assert logits_of(quantized).equal(expected)


def test_layers_keep_the_hooks_that_move_their_input(make: ModelMaker) -> None:
    """On several devices, accelerate puts one on every layer."""
    model = make()
    names = ["transformer.output_layer", "transformer.encoder.layers.0.mlp.dense_h_to_4h"]
    for name in names:
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook("cpu", io_same_device=True))
    model.quantize(4, output_layer_bits=8)
    expected = logits_of(model)
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer).__name__ == "QuantizedLinear" and layer._hf_hook.execution_device == "cpu"
    model.dequantize()
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer).__name__ == "ChatGLMLinear" and hasattr(layer, "_hf_hook")
    assert (logits_of(model) - expected).abs().max() < 1e-4
