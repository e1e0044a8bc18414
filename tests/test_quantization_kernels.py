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
"""Products with quantized weights on a CPU: every way of computing them against the decoded weight in float64."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F


# The greatest error over the greatest value. Half precision: one rounding of the result, and of float16 to bfloat16.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 8e-3}
# Group scales are rounded to bfloat16 for torch's operator, and decoded weights to the dtype of the input.
GROUP_LIMIT = 1.6e-2
ROWS = (1, 3, 16, 17, 40, 41)
# Out, in, columns that share a scale. 70 rows fill no block; 36 columns are what torch's operators cannot take.
SHAPES = {
    "rows": (64, 256, None),
    "odd": (71, 96, None),
    "narrow": (33, 36, None),
    "wide": (1100, 64, None),
    "groups-32": (70, 96, 32),
    "groups-64": (64, 128, 64),
    "groups-128": (33, 256, 128),
    "wide-groups": (1100, 64, 32),
}
# "torch" is a processor without kernels of ours, where int4 weights are packed.
LAYOUTS = ("int8", "int4", "int8-torch", "int4-torch")
WEIGHTS = [(layout, shape) for layout in LAYOUTS for shape in SHAPES]


@dataclass(frozen=True)
class Weight:
    """Codes as they are stored, their scales, the same weight in float64 `[out, in]`, and its packed form if it has one."""

    codes: torch.Tensor
    scale: torch.Tensor
    exact: torch.Tensor
    packed: torch.Tensor | None = None
    packed_scales: torch.Tensor | None = None

    def tensors(self, bias: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        """What `quantized_linear` takes behind `x`."""
        return self.codes, self.scale, bias, self.packed, self.packed_scales


@pytest.fixture(scope="module")
def kernels(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_kernels")


@pytest.fixture(scope="module")
def pack_int4(source: Callable[[str], ModuleType]) -> Callable[[torch.Tensor], torch.Tensor]:
    return source("quantization").pack_int4


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    largest = 2 ** (bits - 1)
    codes = torch.randint(-largest, largest, shape, generator=torch.Generator().manual_seed(2))
    return codes.to(torch.int8)


@pytest.fixture
def make_weight(kernels: ModuleType, pack_int4: Callable, request: pytest.FixtureRequest) -> Callable[..., Weight]:
    def make(
        layout: str, shape: str | tuple[int, int, int | None], scale_dtype: torch.dtype = torch.float32
    ) -> Weight:
        out_features, in_features, group_size = SHAPES[shape] if isinstance(shape, str) else shape
        bits, is_torch = (4 if "int4" in layout else 8), layout.endswith("torch")
        if is_torch:
            request.getfixturevalue("without_cpu_kernels")
        codes = random_codes(bits, out_features, in_features)
        scale = torch.rand(out_features, in_features // group_size if group_size else 1) * 0.02 + 0.01
        scale = scale.to(scale_dtype)
        exact = codes.double() * scale.double().repeat_interleave(group_size or in_features, dim=1)
        scale = scale if group_size else scale[:, 0].contiguous()
        stored = codes if bits == 8 else pack_int4(codes)
        packed = kernels.pack_weight(stored, scale, in_features)
        # torch's operator takes columns in thirty-twos.
        assert not is_torch or (packed is not None) == (bits == 4 and in_features % 32 == 0)
        return Weight(stored, scale, exact, *packed or ())

    return make


def assert_close_to(actual: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    assert actual.shape == exact.shape
    error = ((actual.double() - exact).abs().max() / exact.abs().max()).item()
    assert error <= limit, f"off by {error:.3g} of the greatest value, the limit is {limit:.3g}"


def limit_for(weight: Weight, dtype: torch.dtype) -> float:
    return GROUP_LIMIT if weight.scale.ndim == 2 and dtype != torch.float32 else LIMITS[dtype]


@pytest.mark.parametrize(("layout", "shape"), WEIGHTS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_every_way_is_the_product_with_the_decoded_weight(
    dtype: torch.dtype, layout: str, shape: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    weight = make_weight(layout, shape)
    bias = torch.randn(len(weight.exact))
    for num_rows in ROWS:
        x = torch.randn(num_rows, weight.exact.shape[1]).to(dtype)
        exact = x.double() @ weight.exact.T
        product = kernels.quantized_linear(x, *weight.tensors())
        assert product.dtype == dtype
        assert_close_to(product, exact, limit_for(weight, dtype))
        with_bias = kernels.quantized_linear(x, *weight.tensors(bias))
        assert_close_to(with_bias, exact + bias, limit_for(weight, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_dimensions(layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]) -> None:
    weight = make_weight(layout, "rows")
    x = torch.randn(2, 3, 4, 256)
    flat = kernels.quantized_linear(x.view(24, 256), *weight.tensors())
    for shaped in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert kernels.quantized_linear(shaped, *weight.tensors()).equal(flat.view(2, 3, 4, 64))
    one = kernels.quantized_linear(x[0, 0, 0], *weight.tensors())
    torch.testing.assert_close(one, flat[0], atol=1e-4, rtol=1e-5)
    for half in (x.bfloat16(), x.bfloat16()[:, :0]):
        assert kernels.quantized_linear(half, *weight.tensors()).shape == (*half.shape[:-1], 64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_of_any_dtype(
    scale_dtype: torch.dtype, layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    weight = make_weight(layout, "rows", scale_dtype)
    for dtype in LIMITS:
        x = torch.randn(2, 256).to(dtype)
        assert_close_to(kernels.quantized_linear(x, *weight.tensors()), x.double() @ weight.exact.T, LIMITS[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scales_of_rows_are_not_rounded_to_bfloat16(
    layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    """A row of zeros with a single one picks a column, and the only rounding is that of the result."""
    weight = make_weight(layout, "rows")
    product = kernels.quantized_linear(torch.eye(256)[:16].bfloat16(), *weight.tensors())
    assert product.equal(weight.exact[:, :16].T.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["int8", "int4"])
def test_decoding_is_exact(layout: str, shape: str, kernels: ModuleType, make_weight: Callable[..., Weight]) -> None:
    weight = make_weight(layout, shape)
    decoded = kernels.dequantize_weight(weight.codes, weight.scale, weight.exact.shape[1], torch.float32)
    assert decoded.equal(weight.exact.float())
    half = kernels.dequantize_weight(weight.codes, weight.scale, weight.exact.shape[1], torch.bfloat16)
    assert half.equal(decoded.bfloat16())


@pytest.mark.parametrize(("layout", "shape"), WEIGHTS)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_gradient_to_the_input_and_the_bias(
    dtype: torch.dtype, layout: str, shape: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    weight = make_weight(layout, shape)
    x = torch.randn(2, 3, weight.exact.shape[1]).to(dtype).requires_grad_()
    bias = torch.randn(len(weight.exact)).to(dtype).requires_grad_()
    out = kernels.quantized_linear(x, *weight.tensors(bias))
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    assert x.grad.dtype == bias.grad.dtype == dtype
    # What is decoded for a gradient has the dtype of the input.
    assert_close_to(x.grad, grad.double() @ weight.exact, LIMITS[dtype])
    assert_close_to(bias.grad, grad.double().sum((0, 1)), LIMITS[dtype])


@pytest.mark.parametrize(("layout", "shape"), WEIGHTS)
def test_the_output_may_be_changed_in_place(
    layout: str, shape: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    """As some adapters do, with and without a gradient."""
    weight = make_weight(layout, shape)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, weight.exact.shape[1]).to(dtype).requires_grad_()
        out = kernels.quantized_linear(x, *weight.tensors())
        out += 1
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert_close_to(gradient, weight.exact.sum(0).expand(2, 3, -1), LIMITS[dtype])


def test_gradient_where_only_one_is_wanted(kernels: ModuleType, make_weight: Callable[..., Weight]) -> None:
    weight = make_weight("int4", "rows")
    x = torch.randn(3, 256, requires_grad=True)
    bias = torch.randn(64, requires_grad=True)
    for arguments in ((), (None,), (bias.detach(),)):
        out = kernels.quantized_linear(x, weight.codes, weight.scale, *arguments)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert_close_to(gradient, weight.exact.sum(0).expand(3, -1), 1e-5)
    out = kernels.quantized_linear(x.detach(), weight.codes, weight.scale, bias)
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert gradient.equal(torch.full((64,), 3.0))


# ---------------------------------------------------------------------------------------------------------------------
# torch's own operators and compiler
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "shape"), [("int8", "odd"), ("int4", "odd"), ("int4-torch", "odd"), ("int4-torch", "groups-32")]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_torch_finds_nothing_wrong_with_the_operators(
    has_bias: bool, layout: str, shape: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    weight = make_weight(layout, shape)
    bias = torch.randn(len(weight.exact), requires_grad=True) if has_bias else None
    x = torch.randn(5, weight.exact.shape[1], requires_grad=True)
    arguments = (x, *weight.tensors(bias))
    torch.library.opcheck(kernels.multiply_operator, arguments)
    grad = torch.randn(5, len(weight.exact))
    torch.library.opcheck(kernels.quantized_linear_backward, (grad, weight.codes, weight.scale, weight.exact.shape[1]))


def test_an_operator_is_never_registered_again(kernels: ModuleType) -> None:
    """That would free it under models that another checkpoint's copy of the code made."""
    name = kernels.own_name("quantized_linear")
    assert name.startswith("chatglm::quantized_linear_") and not hasattr(torch.ops.chatglm, name.split("::")[1])
    assert kernels.own_name("unheard_of") == "chatglm::unheard_of"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_eager_for_any_number_of_rows(
    layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    weight = make_weight(layout, "rows")

    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return kernels.quantized_linear(x * 2, *weight.tensors(bias)).relu()

    num_graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Callable:
        nonlocal num_graphs
        num_graphs += 1
        return graph

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    counted = torch.compile(run, fullgraph=True, backend=count, dynamic=True)
    for num_rows in (2, 5, 17, 50):
        x, bias = torch.randn(num_rows, 256, requires_grad=True), torch.randn(64, requires_grad=True)
        expected = run(x, bias)
        torch.testing.assert_close(compiled(x, bias), expected)
        torch.testing.assert_close(counted(x, bias), expected)
        grads = [torch.autograd.grad(out.sum(), (x, bias)) for out in (compiled(x, bias), expected)]
        torch.testing.assert_close(*grads)
    assert num_graphs == 1


# ---------------------------------------------------------------------------------------------------------------------
# The published bytes
# ---------------------------------------------------------------------------------------------------------------------


def test_bytes_of_int4(kernels: ModuleType, pack_int4: Callable) -> None:
    """The even column is in the high four bits; the example is what the published code made of these codes."""
    codes = torch.tensor([[5, 2, 0, -4, -4, -8, -7, -8]], dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.int8
    assert (packed.int() & 255).tolist() == [[0x52, 0x0C, 0xC8, 0x98]]
    every_pair = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(every_pair)
    assert len(packed.unique()) == 256
    assert kernels.unpack_int4(packed).equal(every_pair)
    assert pack_int4(kernels.unpack_int4(packed)).equal(packed)
    assert kernels.unpack_int4(pack_int4(random_codes(4, 5, 6)[:, ::3].repeat(1, 2)))[:, :2].equal(
        random_codes(4, 5, 6)[:, ::3]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_sums_do_not_overflow_float16(
    layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    """Sums of codes are larger than those of weights; what is large is scaled before it is rounded to float16."""
    weight = make_weight(layout, "rows")
    weight = replace(weight, scale=weight.scale * 1e-3, exact=weight.exact * 1e-3)
    for num_rows in (1, 80):
        x = torch.full((num_rows, 256), 2048.0, dtype=torch.float16)
        exact = x.double() @ weight.exact.T
        assert_close_to(kernels.quantized_linear(x, *weight.tensors()), exact, LIMITS[torch.float16])


@pytest.mark.parametrize("layout", ["int8", "int4"])
def test_tracing_reads_no_memory(layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]) -> None:
    """Tensors that torch traces with say that they are on a CPU, and have no values."""
    weight = make_weight(layout, "rows")
    arguments = (torch.randn(3, 256).bfloat16(), *weight.tensors())
    with torch.no_grad():
        graph = make_fx(kernels.quantized_linear, tracing_mode="symbolic")(*arguments)
        assert graph(*arguments).equal(kernels.quantized_linear(*arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_on_different_devices_are_refused(
    layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    """torch's operators answer garbage for a weight that was never loaded, or end the process."""
    weight = make_weight(layout, "rows")
    for missing in ({"codes": weight.codes.to("meta")}, {"scale": weight.scale.to("meta")}):
        for dtype, has_gradient in itertools.product(LIMITS, (False, True)):
            x = torch.randn(2, 256, dtype=dtype)
            with torch.set_grad_enabled(has_gradient), pytest.raises(ValueError, match="on cpu, but .* meta"):
                kernels.quantized_linear(x, *replace(weight, **missing).tensors())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_mode_leaves_nothing_behind(
    layout: str, kernels: ModuleType, make_weight: Callable[..., Weight]
) -> None:
    """What is made there cannot be used in training."""
    weight = make_weight(layout, "odd")
    x = torch.randn(3, 96).bfloat16()
    with torch.inference_mode():
        inference = kernels.quantized_linear(x, *weight.tensors())
    x.requires_grad_()
    product = kernels.quantized_linear(x, *weight.tensors())
    assert product.equal(inference)
    product.sum().backward()
    assert x.grad.isfinite().all()


def test_the_kernel_twin_for_other_devices(kernels: ModuleType, make_weight: Callable[..., Weight]) -> None:
    """Elsewhere the weight is decoded whole; the CPU takes the same route through the public functions."""
    weight = make_weight("int4", "groups-64")
    x = torch.randn(5, 128)
    decoded = kernels.dequantize_weight(weight.codes, weight.scale, 128, torch.float32)
    torch.testing.assert_close(kernels.quantized_linear(x, *weight.tensors()), F.linear(x, decoded))
