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
"""Products with quantized weights: the formats, what computes them, and one operator for all of it.

What is unusual here:

- A weight is int8 codes `[out, in]`, or int4 codes two to a byte `[out, in / 2]` with the even column in the high four
  bits. Codes are two's complement without a zero point; `weight = code * scale`. These are the published files' bytes.
- Scales are `[out]`, or `[out, in / group_size]` when columns are grouped. They may have any float dtype.
- Quantizing divides in float32 and clamps. The published code divides in the dtype of the weight, and in bfloat16 the
  largest weight of a row may then wrap around to the opposite sign.
- Compilers and autograd see one operator, `torch.ops.chatglm.quantized_linear`, which takes and returns tensors and
  keeps no state. What runs behind it is chosen here and nowhere else, by device, dtype and number of rows.
- Exported programs run where this file is not, so they get torch's operators in its place.
- Some processors want the bytes in another order. `pack_weight` makes that copy, which the caller keeps beside the
  weight and passes along; gradients and `dequantize_weight` read the published bytes.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .kernels_llvm import Kernel, Scratch, Step, ask_for_large_pages, can_add_bias, is_exporting, own_name
from .kernels_matmul import find_matmul, multiply_matrices
from .quantization_cpu import (
    BLOCK_COLUMNS,
    can_pack_int4,
    count_rounded_bytes,
    find_kernels,
    make_steps,
    multiply_by_kernels,
    multiply_int8,
    multiply_many_rows,
    multiply_packed_int4,
    pack_group_scales,
    pack_int4_for_cpu,
)
from .quantization_triton import can_use_triton, triton_dequantize, triton_quantized_linear


# Fractions of the largest scale that `method="mse"` tries: 1, which wins a draw, 7/8 where -8 is the largest code, and
# 0.6, 0.62, ... 0.98.
SCALE_FRACTIONS = (1.0, 7 / 8, *(0.6 + 0.02 * step for step in range(20)))

# Weights that are quantized at a time, in elements. A float32 copy of them takes four times as many bytes, and stays in
# a processor's cache; a GPU waits for the start of every operator.
ELEMENTS_AT_A_TIME = 2**20
ELEMENTS_ON_GPU = 2**24

# Rows of input up to which a CPU's kernels, or torch's operators, are faster than decoding the weight for a matrix
# product: their time grows with every row. Measured on an AVX-512 processor with the shapes of ChatGLM3-6B. "Few" is where
# other kernels decode the weight, else torch does.
CPU_KERNEL_FEW_ROWS = 24
CPU_KERNEL_MAX_ROWS = 64
CPU_INT8_MAX_ROWS = 16
CPU_INT4_MAX_ROWS = 40


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Int4 codes, int8 `[out, in]` with an even number of columns -> int8 `[out, in / 2]`, even columns high."""
    # The two bytes of an int16 are two codes: many times faster than every second byte on a CPU.
    pairs = codes.contiguous().view(torch.int16)
    return ((pairs << 4) & 0xF0).bitwise_or_((pairs >> 8).bitwise_and_(15)).to(torch.int8)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Int4 codes out of their bytes.

    Args:
        packed: int8 `[out, in / 2]`, the even column in the high four bits.

    Returns:
        int8 `[out, in]`, each from -8 to 7.
    """
    # Two codes are put into the two bytes of an int16: much faster than `torch.stack` on a CPU.
    even, odd = (packed >> 4).short() & 255, ((packed << 4) >> 4).short() << 8
    return (even | odd).view(torch.int8)


def largest_scale(groups: torch.Tensor, largest_code: int) -> torch.Tensor:
    """`max|weight| / largest_code`, and 1 for a group of zeros: `[rows, groups, columns]` -> `[rows, groups]`."""
    largest = torch.maximum(groups.amax(-1), -groups.amin(-1))
    return torch.where(largest == 0, 1.0, largest / largest_code)


def round_to_codes(
    groups: torch.Tensor, scale: torch.Tensor, code_range: tuple[int, int], out: torch.Tensor | None = None
) -> torch.Tensor:
    """`round(weight / scale)`, halves to even, clamped; `[rows, groups, columns]` in float32."""
    return torch.div(groups, scale[..., None], out=out).round_().clamp_(*code_range)


def best_scale(groups: torch.Tensor, largest_code: int) -> torch.Tensor:
    """The scale of least squared error among fractions of the largest one, `[rows, groups, columns]` -> `[rows, groups]`.

    Clipping the few largest weights of a group lets the others be rounded more finely.
    """
    full_scale = largest_scale(groups, largest_code)
    scale, least_error = full_scale, torch.full_like(full_scale, math.inf)
    for fraction in SCALE_FRACTIONS:
        tried = full_scale * fraction
        codes = round_to_codes(groups, tried, (-largest_code - 1, largest_code))
        error = codes.mul_(tried[..., None]).sub_(groups).square_().sum(-1)
        scale = torch.where(error < least_error, tried, scale)
        least_error = torch.minimum(error, least_error)
    return scale


def in_threads(function: Callable[..., None], *tensors: torch.Tensor) -> None:
    """Call a function on some rows of the tensors in each of as many threads as torch uses.

    torch's own threads wait for each other after every operator. Where other programs run too, that takes many times
    longer than operators on what stays in a processor's cache.
    """
    num_threads = min(torch.get_num_threads(), tensors[0].numel() // ELEMENTS_AT_A_TIME)
    if tensors[0].device.type != "cpu" or num_threads <= 1:
        return function(*tensors)
    before, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def run(parts: tuple[torch.Tensor, ...]) -> None:
        torch.set_num_threads(1)  # In this thread, and in those that begin after it.
        with torch.inference_mode(is_inference):
            function(*parts)

    try:
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(run, zip(*(tensor.chunk(num_threads) for tensor in tensors))))
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor,
    bits: int,
    method: str = "absmax",
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the weight of a linear layer: `code = round(weight / scale)`, `scale = max|weight| / (2^(bits - 1) - 1)`.

    The formula and the bytes are those of the published ChatGLM checkpoints.

    Args:
        weight: `[out, in]`, any float dtype, on any device.
        bits: 8 or 4.
        method: `"absmax"` as published, or `"mse"`, the scale of least squared error in the same format.
        group_size: columns that share a scale; `None` for whole rows, as published.
        scale_dtype: by default float32 for float32 weights and float16 for others. A row of zeros has the scale 1.

    Returns:
        Codes, int8 `[out, in]` or packed `[out, in / 2]`, and scales, `[out]` or `[out, in / group_size]`.

    Raises:
        ValueError: for weights that are not finite, or too large for a scale of that dtype.
    """
    out_features, in_features = weight.shape
    largest_code = 2 ** (bits - 1) - 1
    code_range = (-largest_code - 1 if method == "mse" else -largest_code, largest_code)
    if scale_dtype is None:
        scale_dtype = torch.float32 if weight.dtype == torch.float32 else torch.float16
    codes = weight.new_empty((out_features, in_features * bits // 8), dtype=torch.int8)
    ask_for_large_pages(codes)
    scale = weight.new_empty((out_features, in_features // (group_size or in_features)), dtype=scale_dtype)
    in_threads(partial(quantize_rows, code_range=code_range, method=method), weight, codes, scale)
    if not scale.isfinite().all():
        raise ValueError(f"The weight has values that are not finite, or too large for scales in {scale_dtype}.")
    return codes, scale if group_size else scale[:, 0].contiguous()


@torch.no_grad()
def quantize_rows(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, code_range: tuple[int, int], method: str
) -> None:
    """Fill in codes and scales of some rows, chunk by chunk: on a CPU, new memory costs more than computing."""
    num_elements = ELEMENTS_AT_A_TIME if weight.device.type == "cpu" else ELEMENTS_ON_GPU
    num_rows = max(1, num_elements // weight.shape[1])
    floats = weight.new_empty((min(num_rows, len(weight)), weight.shape[1]), dtype=torch.float32)
    for rows, target, row_scale in zip(weight.split(num_rows), codes.split(num_rows), scale.split(num_rows)):
        groups = floats[: len(rows)].copy_(rows).view(*row_scale.shape, -1)
        found_scale = best_scale(groups, code_range[1]) if method == "mse" else largest_scale(groups, code_range[1])
        row_scale.copy_(found_scale)
        # Weights so small that float16 has no scale for them are zeros.
        row_scale.masked_fill_(row_scale == 0, 1)
        found = round_to_codes(groups, row_scale.float(), code_range, out=groups).view(rows.shape)
        target.copy_(found if target.shape == found.shape else pack_int4(found.to(torch.int8)))


def dequantize_weight(
    weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """`code * scale` in float32, rounded once to `dtype`.

    Args:
        weight: int8 `[out, in]` or `[out, in / 2]`.
        weight_scale: `[out]` or `[out, in / group_size]`.

    Returns:
        `[out, in]` of the given dtype.
    """
    codes = weight if weight.shape[1] == in_features else unpack_int4(weight)
    scale = weight_scale.float().view(weight_scale.shape[0], -1, 1)  # [out, groups, 1]
    return (codes.view(*scale.shape[:2], -1) * scale).view(codes.shape).to(dtype)


class WeightForm(NamedTuple):
    """How the weight of a linear layer is held; `bits` is `None` for floats."""

    bits: int | None = None
    group_size: int | None = None

    def __str__(self) -> str:
        groups = "" if self.group_size is None else f" in groups of {self.group_size}"
        return "floats" if self.bits is None else f"int{self.bits} codes{groups}"


def stored_form(weight: torch.Tensor, weight_scale: torch.Tensor | None, in_features: int) -> WeightForm:
    """The form that the shapes and dtypes of a stored layer tell."""
    if weight.dtype != torch.int8:
        return WeightForm()
    num_groups = None if weight_scale is None or weight_scale.ndim == 1 else weight_scale.shape[1]
    return WeightForm(
        bits=8 if weight.shape[1] == in_features else 4,
        group_size=None if num_groups is None else in_features // num_groups,
    )


def round_to_fixed_point(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16-bit numbers and scales that stand for an input in the CPU kernels: `number * scale` is nearly `x`.

    Args:
        x: `[rows, in]`, any float dtype. It is filled up with zeros to whole blocks of 128 columns.

    Returns:
        Whole numbers from -32639 to 32639 as float32 `[rows, blocks, 128]`, and float32 scales `[rows, blocks, 1]`. The
        scale of a block that is not finite is NaN.
    """
    blocks = F.pad(x, (0, -x.shape[1] % 128)).float().view(len(x), -1, 128)
    # The smallest scale is the smallest normal float, whose inverse is still finite.
    scale = (blocks.abs().amax(-1, keepdim=True) * (1 / 32639)).clamp(min=2.0**-126)
    is_finite = blocks.isfinite().all(-1, keepdim=True)
    numbers = torch.where(is_finite, (blocks * (1 / scale)).round(), 0)
    return numbers, torch.where(is_finite, scale, torch.nan)


def multiply_in_fixed_point(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """What the CPU kernels compute, in plain torch and without their last rounding.

    Args:
        x: `[rows, in]`.
        weight: int8 `[out, in]` or `[out, in / 2]`.
        weight_scale: `[out]` or `[out, in / group_size]`.

    Returns:
        `x @ (code * scale)^T`, float64 `[rows, out]`.
    """
    numbers, scale = round_to_fixed_point(x)
    rounded = (numbers.double() * scale).view(len(x), -1)[:, : x.shape[1]]
    return rounded @ dequantize_weight(weight, weight_scale, x.shape[1], torch.float64).T


def pack_weight(
    weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """What this device needs beside a weight for fast products: its bytes in another order.

    Args:
        weight: int8 `[out, in]` or `[out, in / 2]`.
        weight_scale: `[out]` or `[out, in / group_size]`.

    Returns:
        `packed` and `packed_scales` for [`quantized_linear`], or `None` where nothing is needed. They depend on the
        processor, so they must not be saved, and have to be made again when the weight changes or moves.
    """
    # The kernels for CPUs and GPUs read the published bytes.
    if not can_pack_int4(weight, in_features) or find_kernels(torch.bfloat16, weight, weight_scale, in_features, 1):
        return None
    packed = pack_int4_for_cpu(weight)
    return packed, pack_group_scales(weight_scale, packed) if weight_scale.ndim == 2 else None


class DerivedWeight(NamedTuple):
    """What [`pack_weight`] made of a weight, and what tells that the weight is still the same.

    Whoever changes or replaces a weight without a word (accelerate does, to offload it) leaves a `DerivedWeight` that
    does not belong to it any more.
    """

    source: torch.Tensor
    address: int
    version: int | None
    packed: torch.Tensor
    packed_scales: torch.Tensor | None

    def belongs_to(self, weight: torch.Tensor) -> bool:
        """Whether it was made from this weight as it is now."""
        # Compiled code sees neither addresses nor versions.
        return weight is self.source and (
            torch.compiler.is_compiling() or (weight.data_ptr() == self.address and version_of(weight) == self.version)
        )


def version_of(weight: torch.Tensor) -> int | None:
    """A number that grows when the tensor is written to, or `None` for tensors of `inference_mode`, which have none."""
    return None if weight.is_inference() else weight._version


@torch.inference_mode(False)
@torch.no_grad()
def derive_weight(weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int) -> DerivedWeight | None:
    """[`pack_weight`] of a weight that may not be there yet, on the meta device or still in floats."""
    if weight.is_meta or weight.dtype != torch.int8:
        return None
    packed = pack_weight(weight, weight_scale, in_features)
    return None if packed is None else DerivedWeight(weight, weight.data_ptr(), version_of(weight), *packed)


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def multiply_by_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    packed: torch.Tensor | None,
    packed_scales: torch.Tensor | None,
) -> torch.Tensor:
    """`x @ (code * scale)^T` by torch's operators on a CPU, `[rows, in]` -> `[rows, out]`; float32 is never rounded."""
    num_rows, in_features = x.shape
    if x.dtype not in (torch.float16, torch.bfloat16) or num_rows == 0:
        return multiply_many_rows(x, weight, weight_scale)
    # CPUs multiply bfloat16 many times faster than float16.
    compute = x.bfloat16().contiguous()
    is_int8 = weight.shape[1] == in_features and weight_scale.ndim == 1 and weight.is_contiguous()
    if packed is not None and num_rows <= CPU_INT4_MAX_ROWS:
        product = multiply_packed_int4(compute, packed, weight_scale, packed_scales)
    elif is_int8 and in_features % 32 == 0 and num_rows <= CPU_INT8_MAX_ROWS:
        product = multiply_int8(compute, weight, weight_scale)
    else:
        product = multiply_many_rows(compute, weight, weight_scale)
    return product.to(x.dtype)


def find_matmul_of_many_rows(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> tuple[Kernel, Kernel] | None:
    """The kernels that decode the weight, if there are any and the input has so many rows that they are the fastest."""
    return find_matmul(x, weight, weight_scale, bias) if len(x) > CPU_KERNEL_FEW_ROWS else None


def multiply_by_cpu_kernels(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, is_packed: bool
) -> torch.Tensor | None:
    """`x @ (code * scale)^T + bias` by the kernels for this processor, if there are any: `[rows, in]` -> `[rows, out]`."""
    matmul = find_matmul_of_many_rows(x, weight, weight_scale, bias)
    if matmul is not None:
        return multiply_matrices(x, weight, weight_scale, bias, matmul)
    if is_packed or not 0 < len(x) <= CPU_KERNEL_MAX_ROWS or not can_add_bias(bias, x, weight):
        return None
    kernels = find_kernels(x.dtype, weight, weight_scale, x.shape[1], len(x))
    return None if kernels is None else multiply_by_kernels(x, weight, weight_scale, bias, kernels)


def find_steps(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    scratch: Scratch,
) -> list[Step] | None:
    """The steps that write `x @ (code * scale)^T + bias`, `[rows, in]` -> `[rows, out]`, if kernels for CPUs do."""
    num_rows, in_features = x.shape
    is_whole = in_features % BLOCK_COLUMNS == 0 and 0 < num_rows <= CPU_KERNEL_MAX_ROWS
    if not is_whole or not can_add_bias(bias, x, weight) or find_matmul_of_many_rows(x, weight, weight_scale, bias):
        return None
    kernels = find_kernels(x.dtype, weight, weight_scale, in_features, num_rows)
    if kernels is None:
        return None
    rounded = scratch((sum(count_rounded_bytes(num_rows, in_features)),), torch.uint8)
    *steps, _ = make_steps(x, in_features, weight, weight_scale, bias, output, rounded, kernels)
    return steps


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    packed_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the operator computes, `[rows, in]` -> `[rows, out]`; see [`quantized_linear`]."""
    if can_use_triton(x):
        return triton_quantized_linear(x, weight, weight_scale, bias)
    if x.device.type == "cpu":
        own_bias = None if bias is None else bias.to(x.dtype)
        product = multiply_by_cpu_kernels(x, weight, weight_scale, own_bias, packed is not None)
        if product is not None:
            return product
        product = multiply_by_torch(x, weight, weight_scale, packed, packed_scales)
        return product if bias is None else product.add_(bias.to(product.dtype))
    decoded = dequantize_weight(weight, weight_scale, x.shape[-1], x.dtype)
    return F.linear(x, decoded, None if bias is None else bias.to(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


multiply_operator = torch.library.custom_op(own_name("quantized_linear"), multiply, mutates_args=())


@multiply_operator.register_fake
def _(x, weight, weight_scale, bias=None, packed=None, packed_scales=None):
    return x.new_empty(x.shape[0], weight_scale.shape[0])


@torch.library.custom_op(own_name("quantized_linear_backward"), mutates_args=())
def quantized_linear_backward(
    grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Gradient to the input, `grad @ (code * scale)`: `[rows, out]` -> `[rows, in]`."""
    # CPUs multiply bfloat16 many times faster than float16.
    dtype = torch.bfloat16 if grad.device.type == "cpu" and grad.dtype == torch.float16 else grad.dtype
    if can_use_triton(grad):
        decoded = triton_dequantize(weight, weight_scale, in_features, dtype)
    else:
        decoded = dequantize_weight(weight, weight_scale, in_features, dtype)
    return (grad.to(dtype) @ decoded).to(grad.dtype)


@quantized_linear_backward.register_fake
def _(grad, weight, weight_scale, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, bias, *_ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = quantized_linear_backward(grad.contiguous(), weight, weight_scale, ctx.in_features)
    # `needs_input_grad` is shorter when the last arguments are left at their defaults.
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


multiply_operator.register_autograd(backward, setup_context=setup_context)


def linear_to_export(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The same product by operators that every format of exported programs has; it decodes the weight each time.

    Such formats shift no signed integers and see no bytes of another dtype, so codes are taken apart by division.
    """
    codes = weight.int()
    if weight.shape[1] != x.shape[-1]:
        even = torch.div(codes, 16, rounding_mode="floor")
        odd = codes - 16 * even
        codes = torch.stack((even, torch.where(odd > 7, odd - 16, odd)), dim=-1).flatten(-2)
    scale = weight_scale.float().view(weight_scale.shape[0], -1, 1)  # [out, groups, 1]
    decoded = (codes.float().view(scale.shape[0], scale.shape[1], -1) * scale).view(codes.shape)
    return F.linear(x, decoded.to(x.dtype), None if bias is None else bias.to(x.dtype))


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    packed_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ (code * scale)^T + bias` for int8 or int4 codes, told apart by the width of `weight`.

    Args:
        x: `[..., in]`, float32, float16 or bfloat16.
        weight: int8 `[out, in]` (int8 codes) or `[out, in / 2]` (int4), always the published bytes.
        weight_scale: `[out]` or `[out, in / group_size]`, any float dtype.
        bias: `[out]`, any float dtype.
        packed: the first of what [`pack_weight`] returned for this weight, if anything.
        packed_scales: the second.

    Returns:
        `[..., out]` in the dtype of `x`. It has a gradient to `x` and to `bias`, and keeps no activation for it.

    Raises:
        ValueError: if the tensors are on different devices.
    """
    if not weight.device == weight_scale.device == x.device:
        # torch's operators would read whatever is at the address, or end the process.
        raise ValueError(
            f"The input is on {x.device}, but the quantized weight is on {weight.device} and its scale on "
            f"{weight_scale.device}. Move the model to one device; what is on meta was not loaded."
        )
    if is_exporting():
        return linear_to_export(x, weight, weight_scale, bias)
    # Without gradients the operator would add nothing but the time of its dispatch, a tenth of a millisecond. Tensors
    # of other classes, such as those that torch traces with, have no memory that a kernel could read.
    is_plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or not is_plain
    needs_operator = torch.is_grad_enabled() or is_traced
    run = multiply_operator if needs_operator else multiply
    product = run(x.reshape(-1, x.shape[-1]), weight, weight_scale, bias, packed, packed_scales)
    return product.view(*x.shape[:-1], weight_scale.shape[0])


__all__ = [
    "DerivedWeight",
    "WeightForm",
    "dequantize_weight",
    "derive_weight",
    "pack_int4",
    "pack_weight",
    "quantize_weight",
    "quantized_linear",
    "stored_form",
    "unpack_int4",
]
