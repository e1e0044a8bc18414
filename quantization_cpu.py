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
"""Products with quantized weights on a CPU, by torch's own operators.

What is unusual here:

- For few rows of input, torch has operators that read quantized weights directly. The one for int8 takes the published
  codes. The one for int4 wants them in an order that depends on the processor, which `pack_int4` makes from the
  published bytes; that copy is never saved.
- For many rows a part of the weight is decoded at a time, into the processor's cache, and multiplied with.
- float16 is computed in bfloat16, which processors multiply many times faster; float32 stays float32.
"""

from functools import lru_cache

import torch
from torch.nn import functional as F


# Rows of input up to which torch's operators are faster than decoding the weight for a matrix product: their time grows
# with every row. Measured with two threads of an AVX-512 processor on the shapes of ChatGLM3-6B.
INT8_MAX_ROWS = 16
INT4_MAX_ROWS = 40

# torch's int4 operator wants codes plus 8, as unsigned numbers. That flips the highest bit of each, here of the four
# in two bytes.
INT4_SIGNS = -0x7778

# Rows of the weight that are decoded at a time, so that they stay in the processor's cache.
DECODED_ROWS = 512


@lru_cache
def int4_layout() -> tuple[int, list[slice]] | None:
    """The order in which torch's int4 packing stores rows on this processor (AVX-512, AVX2 and others differ).

    It writes blocks of 64 or 32 rows, `[in, rows / 2]` bytes with two rows in each. Packing the numbers of the rows
    themselves shows where each one goes.

    Returns:
        The rows of a block, and which of them are in the first to the fourth four bits of every two bytes; `None`
        where torch has no packing or its order is another.
    """
    for block_rows in (64, 32):
        numbers = torch.arange(block_rows, dtype=torch.int32)[:, None].expand(-1, 32)
        try:
            packed = [
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 1).view(32, block_rows // 2)
                for digit in (numbers % 16, numbers // 16)
            ]
        except (AttributeError, RuntimeError):
            return None
        low_rows = (packed[0] & 15) + 16 * (packed[1] & 15)  # [in, rows / 2]
        high_rows = (packed[0] >> 4) + 16 * (packed[1] >> 4)
        rows = [half[:, first::2] for first in (0, 1) for half in (low_rows, high_rows)]  # 4 x [in, rows / 4]
        ranges = [range(int(part[0, 0]), int(part[0, -1]) + 1, int(part[0, 1] - part[0, 0]) or 1) for part in rows]
        if all(part.tolist() == [list(found)] * len(part) for part, found in zip(rows, ranges)):
            return block_rows, [slice(found.start, found.stop, found.step) for found in ranges]
    return None


def can_pack_int4(weight: torch.Tensor, in_features: int) -> bool:
    """Whether torch's int4 operator can multiply with this weight: int4 on a CPU, a multiple of 32 columns."""
    is_int4 = weight.dtype == torch.int8 and 2 * weight.shape[1] == in_features
    return is_int4 and weight.device.type == "cpu" and in_features % 32 == 0 and int4_layout() is not None


def pack_int4_for_cpu(weight: torch.Tensor) -> torch.Tensor:
    """Int4 bytes in the order that torch's int4 operator reads on this processor.

    Args:
        weight: int8 `[out, in / 2]`, as published.

    Returns:
        uint8 `[out, in / 2]`, filled up with rows of zeros to whole blocks.
    """
    layout = int4_layout()
    if layout is None:
        raise RuntimeError("This version of torch has no int4 packing for CPUs whose order is known.")
    block_rows, row_slices = layout
    weight = F.pad(weight, (0, 0, 0, -len(weight) % block_rows))
    packed = torch.empty_like(weight, dtype=torch.uint8)
    for rows, target in zip(weight.split(DECODED_ROWS), packed.split(DECODED_ROWS)):
        target = target.view(torch.int16).view(-1, rows.shape[1], 2, block_rows // 4)  # [blocks, in / 2, 2, rows / 4]
        for column, codes in enumerate((rows >> 4, rows)):
            codes = codes.view(-1, block_rows, rows.shape[1]) & 15
            parts = [codes[:, row_slice].short() << shift for shift, row_slice in zip((0, 4, 8, 12), row_slices)]
            words = (parts[0] | parts[1] | parts[2] | parts[3]) ^ INT4_SIGNS
            target[:, :, column].copy_(words.transpose(1, 2))
    return packed


def pack_group_scales(weight_scale: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Scales of groups `[out, groups]` as torch's int4 operator reads them, bfloat16 `[groups, out, 2]`."""
    scales = F.pad(weight_scale, (0, 0, 0, len(packed) - len(weight_scale))).t().bfloat16()
    # The second of two is a zero point.
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()


def pack_weight_for_cpu(
    weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """A weight and its scales of groups in the form that torch's int4 operator reads, or `None` where it is not used."""
    if not can_pack_int4(weight, in_features):
        return None
    packed = pack_int4_for_cpu(weight)
    return packed, pack_group_scales(weight_scale, packed) if weight_scale.ndim == 2 else None


def decode_rows(rows: torch.Tensor, decoded: torch.Tensor) -> int:
    """Write the codes of some rows times a number that makes decoding quick, and return that number.

    Args:
        rows: int8 `[rows, in]` or `[rows, in / 2]`.
        decoded: the output, float `[rows, in]`. The columns of int8 `[rows, in / 2]` are written as all even ones, then
            all odd ones.
    """
    if rows.shape[1] == decoded.shape[1]:
        decoded.copy_(rows)
        return 1
    even, odd = decoded.chunk(2, dim=1)
    even.copy_(rows & -16)
    odd.copy_(rows << 4)
    return 16


def multiply_many_rows(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """`x @ (code * scale)^T`, fast for many rows of `x`: some rows of the weight are decoded at a time.

    The scale of a row is applied to the product, where it costs least and rounds least.
    """
    out_features, in_features = weight.shape[0], x.shape[1]
    is_int4 = weight.shape[1] != in_features
    if is_int4:
        x = torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)
    scale = weight_scale.float().view(out_features, -1)
    num_groups = scale.shape[1]
    buffer = torch.empty(min(DECODED_ROWS, out_features), in_features, dtype=x.dtype)
    products = []
    for rows, row_scale in zip(weight.split(DECODED_ROWS), scale.split(DECODED_ROWS)):
        decoded = buffer[: len(rows)]
        row_scale = row_scale / decode_rows(rows, decoded)
        if num_groups == 1:
            products.append((x @ decoded.t()).float().mul_(row_scale[:, 0]).to(x.dtype))
            continue
        # Even columns of all groups come first, then odd ones: a group has a part in each half.
        groups = decoded.view(len(rows), 2 if is_int4 else 1, num_groups, -1)
        groups.copy_(groups.float() * row_scale[:, None, :, None])
        products.append(x @ decoded.t())
    return torch.cat(products, dim=1)


@lru_cache
def unit_scales(*shape: int) -> torch.Tensor:
    """Scales of 1 for torch's operators, which would round ours to bfloat16; the second of two is a zero point."""
    scales = torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) == 3:
        scales[..., 1] = 0
    return scales


def multiply_int8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """`x @ (code * scale)^T` by torch's int8 operator, bfloat16 `[rows, in]` -> float32 `[rows, out]`."""
    product = torch._weight_int8pack_mm(x, weight, unit_scales(weight.shape[0]))
    return product.float().mul_(weight_scale)


def multiply_packed_int4(
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, packed_scales: torch.Tensor | None
) -> torch.Tensor:
    """`x @ (code * scale)^T` by torch's int4 operator, bfloat16 `[rows, in]` -> float32 `[rows, out]`.

    With scales of groups the result is bfloat16.
    """
    out_features, in_features = weight_scale.shape[0], x.shape[1]
    if packed_scales is not None:
        group_size, scales = in_features // weight_scale.shape[1], packed_scales
    else:
        group_size = next(size for size in (256, 128, 64, 32) if in_features % size == 0)
        scales = unit_scales(in_features // group_size, len(packed), 2)
    product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)
    if len(packed) != out_features:
        # A copy: an operator must not return a view.
        product = product[:, :out_features].contiguous()
    return product if packed_scales is not None else product.float().mul_(weight_scale)


def cpu_quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    packed: torch.Tensor | None = None,
    packed_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ (code * scale)^T` on a CPU, `[rows, in]` -> `[rows, out]` in the dtype of `x`.

    `packed` and `packed_scales` are what `pack_weight_for_cpu` returned for this weight.
    """
    num_rows, in_features = x.shape
    compute = x.bfloat16() if x.dtype == torch.float16 else x
    if compute.dtype == torch.bfloat16 and num_rows > 0:
        if packed is not None and num_rows <= INT4_MAX_ROWS:
            return multiply_packed_int4(compute.contiguous(), packed, weight_scale, packed_scales).to(x.dtype)
        # In bfloat16 the int8 operator is wrong, or crashes, unless columns are a multiple of 32.
        is_int8 = weight.shape[1] == in_features and weight_scale.ndim == 1 and in_features % 32 == 0
        if is_int8 and num_rows <= INT8_MAX_ROWS:
            return multiply_int8(compute.contiguous(), weight, weight_scale).to(x.dtype)
    return multiply_many_rows(compute, weight, weight_scale).to(x.dtype)


__all__ = ["cpu_quantized_linear", "pack_weight_for_cpu"]
