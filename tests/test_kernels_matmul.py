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
"""Products with many rows of input on a CPU, beside plain torch."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from test_quantization_cpu import HALVES, assert_rounded, protected_copies, random_weight


# Bits, columns that share a scale; out and in. Threads take 32 rows of a weight, and 2048 columns at a time, 64 bytes of
# a row at once.
FORMS = ((None, None), (8, None), (4, None), (4, 32), (4, 128))
SHAPES = ((32, 128), (45, 384), (70, 2176), (33, 2112), (33, 2080))
# PyTorch multiplies bfloat16 as fast.
CASES = [
    (dtype, *form, *shape)
    for dtype in HALVES
    for form in FORMS
    for shape in SHAPES
    if shape[1] % (512 // (form[0] or 16)) == 0 and (form[0] is not None or dtype == torch.float16)
]


@pytest.fixture(scope="module")
def matmul(source: Callable[[str], ModuleType]) -> ModuleType:
    module = source("kernels_matmul")
    if module.compile_kernel(module.PackingProgram, torch.float16, 1) is None:
        pytest.skip("needs a processor that multiplies bfloat16, and llvmlite")
    return module


@pytest.fixture(scope="module")
def kernels(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_kernels")


def make_weight(
    bits: int | None, group_size: int | None, out_features: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if bits is None:
        return torch.randn(out_features, in_features).half(), None
    return random_weight(bits, out_features, in_features, group_size)


def twin(
    kernels: ModuleType, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """`bfloat16(x) @ bfloat16(weight)^T + bias` in float64. The scale of a whole row is applied to the sum."""
    if scale is None:
        decoded = weight.bfloat16().double()
    else:
        dtype = torch.float64 if scale.ndim == 1 else torch.bfloat16
        decoded = kernels.dequantize_weight(weight, scale, x.shape[1], dtype).double()
    product = x.bfloat16().double() @ decoded.T
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize(("dtype", "bits", "group_size", "out_features", "in_features"), CASES)
def test_products_equal_the_twin(
    dtype: torch.dtype,
    bits: int | None,
    group_size: int | None,
    out_features: int,
    in_features: int,
    matmul: ModuleType,
    kernels: ModuleType,
    set_threads: Callable[[int], None],
) -> None:
    weight, scale = make_weight(bits, group_size, out_features, in_features)
    bias = torch.randn(out_features).to(dtype)
    for num_rows in (1, 12, 27, 35, 67):
        x = torch.randn(num_rows, in_features).to(dtype)
        found = matmul.find_matmul(x, weight, scale, bias)
        product = matmul.multiply_matrices(x, weight, scale, bias, found)
        assert product.dtype == dtype
        assert_rounded(product, twin(kernels, x, weight, scale, bias))
        # This ends the process, should something behind a tensor be read.
        copies = protected_copies(x, weight, bias, *([] if scale is None else [scale]))
        copied_scale = None if scale is None else copies[3]
        assert matmul.multiply_matrices(*copies[:2], copied_scale, copies[2], found).equal(product)
        set_threads(2)
        assert matmul.multiply_matrices(x, weight, scale, bias, found).equal(product)
        set_threads(1)
        without_bias = matmul.multiply_matrices(x, weight, scale, None, found)
        assert_rounded(without_bias, twin(kernels, x, weight, scale, None))


def test_tiles_for_any_number_of_rows(source: Callable[[str], ModuleType]) -> None:
    matmul = source("kernels_matmul")
    for num_rows in range(1, 300):
        num_wide, num_tiles = matmul.split_rows(num_rows)
        unused = matmul.WIDE_TILE_ROWS * num_wide + matmul.TILE_ROWS * num_tiles - num_rows
        # While the last tiles are multiplied, the weight's next part is asked for.
        assert 0 <= unused < (4 if num_rows > 20 else 8)
        assert num_tiles >= 2 or num_rows <= 8


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_other_dtypes(scale_dtype: torch.dtype, matmul: ModuleType, kernels: ModuleType) -> None:
    for group_size in (None, 64):
        weight, scale = random_weight(4, 40, 128, group_size, scale_dtype)
        x = torch.randn(80, 128).bfloat16()
        assert_rounded(kernels.quantized_linear(x, weight, scale), twin(kernels, x, weight, scale, None))


def test_several_rows_of_float16_are_multiplied_in_pairs(
    matmul: ModuleType, source: Callable[[str], ModuleType]
) -> None:
    linear_cpu = source("linear_cpu")
    if not linear_cpu.is_slow_in_float16():
        pytest.skip("torch is set to another processor")
    weight = torch.randn(40, 64).half()
    for num_rows, in_pairs in ((12, False), (13, True)):
        x = torch.randn(num_rows, 64).half()
        found = matmul.find_matmul(x, weight, None, None)
        with torch.no_grad():
            product = linear_cpu.linear(x, weight, None)
        exact = x.double() @ weight.double().T
        assert product.equal(matmul.multiply_matrices(x, weight, None, None, found)) is in_pairs
        torch.testing.assert_close(product.double(), exact, rtol=1e-2, atol=0.1)


def test_long_inputs_are_multiplied_in_parts(
    matmul: ModuleType,
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    set_threads: Callable[[int], None],
) -> None:
    weight, scale = random_weight(8, 100, 64, None)
    x = torch.randn(150, 64).half()
    found = matmul.find_matmul(x, weight, scale, None)
    expected = matmul.multiply_matrices(x, weight, scale, None, found)
    monkeypatch.setattr(matmul, "INPUT_BYTES", 5000)
    assert matmul.multiply_matrices(x, weight, scale, None, found).equal(expected)
    set_threads(2)
    assert matmul.multiply_matrices(x, weight, scale, None, found).equal(expected)
    set_threads(1)
    x[70, 3] = torch.nan
    changed = matmul.multiply_matrices(x, weight, scale, None, found)
    assert changed[70].isnan().all() and changed[:70].equal(expected[:70]) and changed[71:].equal(expected[71:])


def test_what_the_kernels_do_not_take(matmul: ModuleType) -> None:
    weight, scale = random_weight(4, 40, 128, None)
    x = torch.randn(80, 128).half()

    def takes(x: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> bool:
        return matmul.find_matmul(x, weight, *(*others, None)[:2]) is not None

    assert takes(x, weight, scale) and takes(x, torch.randn(40, 128).half(), None)
    assert not takes(x.float(), weight, scale)
    assert not takes(x.to("meta"), weight, scale) and not takes(x, weight, scale.to("meta"))
    assert not takes(x[:0], weight, scale) and not takes(x[:, :0], torch.zeros(40, 0, dtype=torch.int8), scale)
    assert not takes(x, weight[:31], scale[:31])
    assert not takes(x, weight, scale[:31]) and not takes(x, weight[:, :20], scale)
    assert not takes(x, weight, torch.ones(40, 8)) and not takes(x, weight, torch.ones(40, 0))
    assert not takes(x, weight, scale.double())
    # The last of 65 groups of 128 would have half as many columns again.
    assert not takes(torch.randn(80, 8384).half(), torch.zeros(40, 8384, dtype=torch.int8), torch.ones(40, 65))
    assert not takes(x, weight, scale, torch.ones(41).half()) and not takes(x, weight, scale, torch.ones(40))
    # Not whole steps of 64 bytes: of int4 and int8 codes, and of float16.
    assert not takes(x[:, :64], weight[:, :32].contiguous(), scale)
    assert takes(x[:, :64], weight, scale) and not takes(x[:, :32], weight[:, :32].contiguous(), scale)
    assert takes(x[:, :32], torch.randn(40, 32).half(), None) and not takes(
        x[:, :48], torch.randn(40, 48).half(), None
    )
    assert not takes(x, torch.randn(40, 128).bfloat16(), None)
    assert not takes(x, torch.randn(128, 40).half().t(), None)


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_are_more_precise_than_torchs(
    bits: int, matmul: ModuleType, kernels: ModuleType, request: pytest.FixtureRequest
) -> None:
    weight, scale = random_weight(bits, 64, 256, None)
    x = torch.randn(100, 256).half()
    exact = x.double() @ kernels.dequantize_weight(weight, scale, 256, torch.float64).T
    ours = (kernels.quantized_linear(x, weight, scale).double() - exact).norm()
    request.getfixturevalue("without_cpu_kernels")
    assert ours < 0.8 * (kernels.quantized_linear(x, weight, scale).double() - exact).norm()
