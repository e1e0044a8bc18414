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
"""Quantized weights on a real GPU: every kernel against the decoded weight, and what captures and compiles models."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


pytestmark = pytest.mark.gpu

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# The greatest error over the greatest value: one rounding of the result, and for groups one of scales and of products.
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Bits, out, in, columns that share a scale. The first are layers of ChatGLM3-6B, the others fill no block.
SHAPES = {
    "int8-query_key_value": (8, 4608, 4096, None),
    "int8-dense_4h_to_h": (8, 4096, 13696, None),
    "int8-odd": (8, 71, 264, None),
    "int8-narrow": (8, 33, 36, None),
    "int4-query_key_value": (4, 4608, 4096, None),
    "int4-dense_4h_to_h": (4, 4096, 13696, None),
    "int4-odd": (4, 71, 264, None),
    "int4-narrow": (4, 33, 36, None),
    "int4-32": (4, 71, 1120, 32),
    "int4-64": (4, 4096, 13696, 64),
    "int4-128": (4, 67, 640, 128),
}
# From one row to another block, to another number of blocks, and to decoding.
ROWS = (*range(1, 18), 32, 33, 64, 65)
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "groups": {"bits": 4, "group_size": 32},
}


@pytest.fixture(scope="module")
def kernels(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_kernels")


@pytest.fixture(scope="module")
def gpu_kernels(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_triton")


@pytest.fixture(scope="module")
def make_weight(source: Callable[[str], ModuleType]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def make(shape: str, scale_dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
        bits, out_features, in_features, group_size = SHAPES[shape]
        largest = 2 ** (bits - 1)
        codes = torch.randint(-largest, largest, (out_features, in_features), dtype=torch.int8, device="cuda")
        groups = (out_features, in_features // group_size) if group_size else (out_features,)
        scale = (torch.rand(groups, device="cuda") * 0.02 + 0.01).to(scale_dtype)
        return source("quantization").pack_int4(codes) if bits == 4 else codes, scale

    return make


@pytest.fixture
def quantized_model(tiny_model: Callable[..., PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """A tiny ChatGLM3 on the GPU, wide enough for whole blocks."""

    def model(settings: str) -> PreTrainedModel:
        built = tiny_model(hidden_size=128, num_attention_heads=4, kv_channels=32, ffn_hidden_size=192)
        return built.half().cuda().quantize(**SETTINGS[settings])

    return model


def assert_close_to(actual: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    assert actual.isfinite().all()
    error = ((actual.double() - exact.double()).abs().max() / exact.double().abs().max()).item()
    assert error <= limit, f"off by {error:.3g} of the greatest value, the limit is {limit:.3g}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_number_of_rows(
    dtype: torch.dtype, shape: str, kernels: ModuleType, make_weight: Callable[..., tuple[torch.Tensor, torch.Tensor]]
) -> None:
    weight, scale = make_weight(shape)
    in_features = SHAPES[shape][2]
    bias = torch.randn(len(weight), device="cuda", dtype=dtype)
    decoded = kernels.dequantize_weight(weight, scale, in_features, torch.float64)
    for num_rows in ROWS:
        x = torch.randn(num_rows, in_features, device="cuda", dtype=dtype)
        assert kernels.can_use_triton(x)
        exact = x.double() @ decoded.T
        for added in (None, bias):
            product = kernels.quantized_linear(x, weight, scale, added)
            assert product.dtype == dtype
            assert_close_to(product, exact if added is None else exact + added.double(), LIMITS[dtype])


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dequantize_is_exact(
    dtype: torch.dtype, shape: str, scale_dtype: torch.dtype, kernels: ModuleType, make_weight: Callable
) -> None:
    weight, scale = make_weight(shape, scale_dtype)
    arguments = (weight, scale, SHAPES[shape][2], dtype)
    assert kernels.triton_dequantize(*arguments).equal(kernels.dequantize_weight(*arguments))


@pytest.mark.parametrize("shape", ["int8-odd", "int4-odd", "int4-32", "int4-128"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_any_dtype(scale_dtype: torch.dtype, shape: str, kernels: ModuleType, make_weight: Callable) -> None:
    weight, scale = make_weight(shape, scale_dtype)
    decoded = kernels.dequantize_weight(weight, scale, SHAPES[shape][2], torch.float64)
    for dtype, limit in LIMITS.items():
        x = torch.randn(3, SHAPES[shape][2], device="cuda", dtype=dtype)
        assert_close_to(kernels.quantized_linear(x, weight, scale), x.double() @ decoded.T, limit)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", ["int8-query_key_value", "int4-query_key_value", "int4-64"])
def test_any_number_of_parts_gives_the_same_sum_each_time(
    shape: str, parts: int, kernels: ModuleType, gpu_kernels: ModuleType, make_weight: Callable
) -> None:
    bits, out_features, in_features, group_size = SHAPES[shape]
    weight, scale = make_weight(shape)
    x = torch.randn(5, in_features, device="cuda", dtype=torch.float16)
    is_hip = torch.version.hip is not None
    version = gpu_kernels.read_triton_version(gpu_kernels.triton.__version__)
    config = gpu_kernels.few_rows_config("gfx942" if is_hip else "sm_86", bits, group_size is not None, 5, version)
    # With as little under way as fits into any chip.
    config = config._replace(parts=parts, num_stages=1 if is_hip else 2)
    products = [gpu_kernels.run_few_rows(x, weight, scale, None, config, use_assembly=not is_hip) for _ in range(5)]
    product = products[0]
    assert all(again.equal(product) for again in products)
    decoded = kernels.dequantize_weight(weight, scale, in_features, torch.float64)
    assert_close_to(product, x.double() @ decoded.T, LIMITS[torch.float16])


@pytest.mark.parametrize("shape", ["int4-odd", "int4-32", "int4-128"])
def test_the_way_without_assembly(
    shape: str, kernels: ModuleType, gpu_kernels: ModuleType, make_weight: Callable
) -> None:
    bits, out_features, in_features, group_size = SHAPES[shape]
    weight, scale = make_weight(shape)
    decoded = kernels.dequantize_weight(weight, scale, in_features, torch.float64)
    config = gpu_kernels.few_rows_config("gfx942", bits, group_size is not None, 16, (3, 3))
    for dtype, limit in LIMITS.items():
        x = torch.randn(16, in_features, device="cuda", dtype=dtype)
        product = gpu_kernels.run_few_rows(x, weight, scale, None, config, use_assembly=False)
        assert_close_to(product, x.double() @ decoded.T, limit)


def test_float32_goes_without_kernels(kernels: ModuleType, make_weight: Callable) -> None:
    weight, scale = make_weight("int4-odd")
    x = torch.randn(3, 264, device="cuda")
    assert not kernels.can_use_triton(x)
    decoded = kernels.dequantize_weight(weight, scale, 264, torch.float32)
    torch.testing.assert_close(kernels.quantized_linear(x, weight, scale), F.linear(x, decoded))


def test_no_rows(kernels: ModuleType, make_weight: Callable) -> None:
    weight, scale = make_weight("int4-odd")
    assert kernels.quantized_linear(torch.empty(0, 264, device="cuda").half(), weight, scale).shape == (0, 71)


@pytest.mark.parametrize("num_rows", [1, 65])
@pytest.mark.parametrize("shape", ["int8-odd", "int4-odd", "int4-32"])
def test_gradient_to_the_input_and_the_bias(
    shape: str, num_rows: int, kernels: ModuleType, make_weight: Callable
) -> None:
    weight, scale = make_weight(shape)
    in_features = SHAPES[shape][2]
    decoded = kernels.dequantize_weight(weight, scale, in_features, torch.float64)
    x = torch.randn(num_rows, in_features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(71, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(num_rows, 71, device="cuda", dtype=torch.bfloat16)
    kernels.quantized_linear(x, weight, scale, bias).backward(grad)
    assert_close_to(x.grad, grad.double() @ decoded, LIMITS[torch.bfloat16])
    assert_close_to(bias.grad, grad.double().sum(0), LIMITS[torch.bfloat16])


@pytest.mark.parametrize("num_rows", [1, 65])
@pytest.mark.parametrize("shape", ["int8-odd", "int4-odd", "int4-32"])
def test_torch_finds_nothing_wrong_with_the_operators(
    shape: str, num_rows: int, kernels: ModuleType, make_weight: Callable
) -> None:
    weight, scale = make_weight(shape)
    in_features = SHAPES[shape][2]
    x = torch.randn(num_rows, in_features, device="cuda", dtype=torch.float16, requires_grad=True)
    bias = torch.randn(71, device="cuda", dtype=torch.float16, requires_grad=True)
    torch.library.opcheck(kernels.multiply_operator, (x, weight, scale, bias), rtol=1e-2, atol=1e-2)
    grad = torch.randn(num_rows, 71, device="cuda", dtype=torch.float16)
    torch.library.opcheck(kernels.quantized_linear_backward, (grad, weight, scale, in_features), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("num_rows", [1, 33, 65])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_layer_in_a_cuda_graph(settings: str, num_rows: int, source: Callable[[str], ModuleType]) -> None:
    linear = nn.Linear(256, 384).half().cuda()
    layer = source("quantization").QuantizedLinear(linear, **SETTINGS[settings])
    layer.quantize_(linear.weight)
    x = torch.randn(num_rows, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Kernels are compiled at their first launch, which must not be captured.
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert captured.equal(layer(x))


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_compiled_model_equals_eager(settings: str, mode: str, quantized_model: Callable) -> None:
    model = quantized_model(settings)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for length in (1, 11, 40):
            ids = torch.randint(4, 89, (1, length), device="cuda")
            expected = model(ids, use_cache=False).logits
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                assert_close_to(compiled(ids, use_cache=False).logits, expected, 3e-2)


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_are_those_of_the_decoded_model(settings: str, quantized_model: Callable) -> None:
    model = quantized_model(settings)
    ids = torch.randint(4, 89, (2, 11), device="cuda")
    with torch.no_grad():
        logits = [model(ids[:, :length]).logits for length in (1, 11)]
        model.dequantize()
        for length, ours in zip((1, 11), logits):
            assert_close_to(ours, model(ids[:, :length]).logits, 3e-2)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("settings", SETTINGS)
def test_generate_with_a_static_cache(settings: str, quantized_model: Callable) -> None:
    """A static cache makes `generate` compile the model, with CUDA graphs."""
    model = quantized_model(settings)
    ids = torch.randint(4, 89, (2, 7), device="cuda")
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    for _ in range(2):
        assert model.generate(ids, cache_implementation="static", **options).tolist() == expected.tolist()


def test_published_chains(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """As READMEs write them: `.half().quantize(4).cuda()`, and quantized on the GPU a layer at a time."""
    ids = torch.randint(4, 89, (1, 11))
    logits = []
    for model in (tiny_model().half().quantize(4).cuda(), tiny_model().half().quantize(bits=4, device="cuda").cuda()):
        with torch.no_grad():
            logits.append(model.eval()(ids.cuda()).logits)
    assert_close_to(logits[0], logits[1], 3e-2)
