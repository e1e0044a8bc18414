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
- Compilers and autograd see one operator, `torch.ops.chatglm.quantized_linear`, which takes and returns tensors and
  keeps no state. What runs behind it is chosen at each call, in `multiply`, by device, dtype and number of rows.
- Some processors want the bytes in another order. `pack_weight` makes that copy, which the caller keeps beside the
  weight and passes along; gradients and `dequantize_weight` read the published bytes.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .quantization_cpu import cpu_quantized_linear, pack_weight_for_cpu
from .quantization_triton import can_use_triton, triton_dequantize, triton_quantized_linear


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
    return pack_weight_for_cpu(weight, weight_scale, in_features) if weight.device.type == "cpu" else None


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
        product = cpu_quantized_linear(x, weight, weight_scale, packed, packed_scales)
        return product if bias is None else product.add_(bias.to(product.dtype))
    decoded = dequantize_weight(weight, weight_scale, x.shape[-1], x.dtype)
    return F.linear(x, decoded, None if bias is None else bias.to(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


def own_name(name: str) -> str:
    """`chatglm::name`, or with a number behind it if another checkpoint's copy of this file has taken that.

    Registering a name twice would free the operator that models loaded before still call (torch 2.6 to 2.13).
    """
    numbered, copies = name, 1
    while hasattr(torch.ops.chatglm, numbered):
        copies += 1
        numbered = f"{name}_{copies}"
    return f"chatglm::{numbered}"


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
    """
    # Without gradients the operator would add nothing but the time of its dispatch, a tenth of a millisecond.
    needs_operator = torch.is_grad_enabled() or torch.compiler.is_compiling()
    run = multiply_operator if needs_operator else multiply
    product = run(x.reshape(-1, x.shape[-1]), weight, weight_scale, bias, packed, packed_scales)
    return product.view(*x.shape[:-1], weight_scale.shape[0])


__all__ = ["dequantize_weight", "pack_weight", "quantized_linear", "unpack_int4"]
