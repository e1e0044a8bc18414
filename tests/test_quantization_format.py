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
"""The format of quantized weights: the recorded codes and scales, and what rounding does to special weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from generations import FLOAT_CASES
from quantized import (
    DTYPES,
    logits_of,
    quantized_layers,
    recorded_layers,
    stored_weights,
    write_published_folder,
)
from torch import nn
from transformers import AutoModel


Named = Callable[[str], Any]


RECORDED = ["fp16.int8", "fp16.int4", "fp32.int8", "fp32.int4"]


SOURCES = {"fp16": torch.float16, "fp32": torch.float32}


LOGITS_LIMIT = 1e-4


@pytest.fixture(scope="module")
def quantization(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization")


@pytest.mark.floor
@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("name", FLOAT_CASES)
def test_codes_and_scales_are_the_recorded_ones(
    name: str, kind: str, case: Named, case_folder: Named, quantization: ModuleType
) -> None:
    dtype, bits = SOURCES[kind[:4]], int(kind[-1])
    scale_dtype = torch.float16 if name == "chatglm1" else None
    weights, changed, total = stored_weights(case_folder(name)), 0, 0
    for layer, (codes, scale) in recorded_layers(case(name), kind).items():
        ours, our_scale = quantization.quantize_weight(
            weights[f"{layer}.weight"].to(dtype), bits, scale_dtype=scale_dtype
        )
        assert (ours.dtype, our_scale.dtype) == (torch.int8, scale.dtype)
        assert our_scale.equal(scale)
        if bits == 4:
            ours, codes = quantization.unpack_int4(ours), quantization.unpack_int4(codes)
        steps = (ours.int() - codes.int()).abs()
        assert steps.max() <= 1
        changed, total = changed + steps.sum().item(), total + steps.numel()
    # The published code divides in float16, which may round a code to its neighbour.
    assert changed <= (0.02 * total if dtype == torch.float16 else 0)


@pytest.mark.parametrize("kind", ["fp16.int8", "fp16.int4"])
@pytest.mark.parametrize("name", FLOAT_CASES)
def test_recorded_codes_decode_exactly(name: str, kind: str, case: Named, quantization: ModuleType) -> None:
    for layer, (codes, scale) in recorded_layers(case(name), kind).items():
        expected = case(name).tensors[f"quant.{kind}.{layer}.dequantized"]
        assert quantization.dequantize_weight(codes, scale, expected.shape[1], torch.float32).equal(expected)


@pytest.mark.floor
@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("name", FLOAT_CASES)
def test_published_layout_loads_and_gives_the_recorded_logits(
    name: str, kind: str, tmp_path: Path, case: Named, case_folder: Named
) -> None:
    folder = shutil.copytree(case_folder(name), tmp_path / name)
    write_published_folder(folder, case(name), kind)
    model, info = AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors = case(name).tensors
    expected = tensors[f"quant.{kind}.logits"]
    logits = logits_of(model, tensors["single.input_ids"])[:, -expected.shape[1] :]
    assert (logits - expected).abs().max() <= LOGITS_LIMIT
    scale_dtype = next(iter(recorded_layers(case(name), kind).values()))[1].dtype
    for layer in quantized_layers(model).values():
        assert layer.weight_scale.dtype == scale_dtype


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_largest_weight_of_a_row_keeps_its_sign(dtype: torch.dtype, bits: int, quantization: ModuleType) -> None:
    """In bfloat16 the published code divides up to 127.5, which wraps around to -128."""
    weight = (torch.randn(512, 256) * 0.02).to(dtype)
    codes, scale = quantization.quantize_weight(weight, bits)
    codes = codes if bits == 8 else quantization.unpack_int4(codes)
    at = weight.float().abs().argmax(1, keepdim=True)
    largest = 2 ** (bits - 1) - 1
    assert codes.gather(1, at).float().equal(weight.float().gather(1, at).sign() * largest)
    assert codes.abs().max() == largest
    # Made in float32 and rounded once.
    assert scale.equal((weight.float().abs().amax(1) / largest).to(scale.dtype))
    decoded = codes.float() * scale.float()[:, None]
    # Half a step, and what rounding the scale to float16 adds.
    assert ((decoded - weight.float()).abs() <= 0.5 * scale.float()[:, None] * (1 + 2**-11 * 2 * largest)).all()


@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_nearly_nothing(bits: int, method: str, quantization: ModuleType) -> None:
    weight = torch.randn(6, 64).half()
    weight[1] = 0
    weight[2] = torch.randint(-1, 2, (64,)) * 2.0**-24  # the smallest float16
    weight[3] = weight[3] * 2.0**-16  # largest value near 1e-5, scale below the smallest float16 for int8
    codes, scale = quantization.quantize_weight(weight, bits, method)
    decoded = quantization.dequantize_weight(codes, scale, 64, torch.float32)
    assert scale[1] == 1 and not decoded[1].any()
    assert scale.isfinite().all() and (scale > 0).all()
    # No sign is flipped and nothing grows, however coarse float16 scales are down there.
    assert (decoded * weight.float() >= 0).all()
    assert (decoded.abs().amax(1) <= 1.5 * weight.float().abs().amax(1)).all()
    assert quantization.quantize_weight(weight.float(), bits)[1].dtype == torch.float32


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_mse_is_never_worse_in_the_same_format(bits: int, group_size: int | None, quantization: ModuleType) -> None:
    weight = torch.randn(40, 256)
    weight[:8, :3] *= 20  # outliers
    error = {}
    for method in ("absmax", "mse"):
        codes, scale = quantization.quantize_weight(weight, bits, method, group_size)
        assert codes.shape == (40, 256 * bits // 8)
        assert scale.shape == ((40, 256 // group_size) if group_size else (40,))
        decoded = quantization.dequantize_weight(codes, scale, 256, torch.float32)
        groups = (decoded - weight).view(40, -1, group_size or 256)
        error[method] = groups.square().sum(-1)
    assert (error["mse"] <= error["absmax"] * (1 + 1e-5)).all()
    assert bits == 8 or error["mse"].sum() < 0.9 * error["absmax"].sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_are_rows_of_their_own(bits: int, quantization: ModuleType) -> None:
    weight = torch.randn(5, 96)
    codes, scale = quantization.quantize_weight(weight, bits, group_size=32)
    alone = [quantization.quantize_weight(part, bits) for part in weight.split(32, dim=1)]
    assert codes.equal(torch.cat([part for part, _ in alone], dim=1))
    assert scale.equal(torch.stack([part for _, part in alone], dim=1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weights_in_any_memory_layout(
    dtype: torch.dtype, quantization: ModuleType, source: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 70).to(dtype)
    for bits in (8, 4):
        expected = quantization.quantize_weight(weight.t().contiguous(), bits)
        assert expected[1].dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
        for stored in (weight.t(), torch.cat((weight, weight)).t()[:, :64], nn.Parameter(weight.t())):
            codes, scale = quantization.quantize_weight(stored, bits)
            assert codes.is_contiguous() and scale.is_contiguous()
            assert codes.equal(expected[0]) and scale.equal(expected[1])
        monkeypatch.setattr(source("quantization_kernels"), "ELEMENTS_AT_A_TIME", 200)  # three rows at a time
        before = torch.get_num_threads()
        for num_threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda num_threads=num_threads: num_threads)
            pieces = quantization.quantize_weight(weight.t(), bits)
            assert pieces[0].equal(expected[0]) and pieces[1].equal(expected[1])
        monkeypatch.undo()
        torch.set_num_threads(before)


def test_threads_go_on_as_they_were(quantization: ModuleType, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    weight = torch.randn(1024, 4096)
    weight[1000, 7] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantization.quantize_weight(weight, 4)
    with torch.inference_mode():
        codes, _ = quantization.quantize_weight(weight.nan_to_num(), 4)
    assert codes.is_inference() and torch.get_num_threads() == 2
