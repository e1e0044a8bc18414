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
"""Products with quantized weights, each device's fastest way.

What is unusual here:

- A weight is int8 codes `[out, in]`, or int4 codes two to a byte `[out, in / 2]` with the even column in the high four
  bits. Codes are two's complement without a zero point; `weight = code * scale`. These are the published files' bytes.
- Scales are `[out]`, or `[out, in / group_size]` when columns are grouped. They may have any float dtype.
- Compilers and autograd see one operator, `torch.ops.chatglm.quantized_linear`. What runs behind it is chosen at each
  call by device, dtype and number of rows.
- The GPU kernels are Triton's and read the published bytes as they are, int4 as int32 words of eight columns. On NVIDIA
  a few lines of assembly decode a word in about two instructions for each code; conversions of integers would be
  slower than the memory.
- On CPUs int4 has a second layout, made at run time by `pack_for_cpu` and never saved: torch's int4 operator reads
  bytes in an order that depends on the processor. Such a weight is uint8.
- The kernels are fast for few rows, where the weight's bytes are what takes time. For many rows the weight is decoded
  and the vendor's matrix product does the rest.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.utils import logging


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.get_logger(__name__)

# Rows up to which torch's CPU operators beat decoding the weight and a matrix product: their time grows with every
# row. Measured with two threads of an AVX-512 processor on the shapes of ChatGLM3-6B.
CPU_INT8_MAX_ROWS = 16
CPU_INT4_MAX_ROWS = 40

# The operator's int4 codes are 8 more than ours and unsigned: the highest bit of each, in two bytes, is the other way.
CPU_INT4_SIGNS = -0x7778

# Rows of the weight that are decoded at a time on a CPU, so that they stay in its cache.
CPU_DECODED_ROWS = 512


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
        weight: int8 `[out, in]` or `[out, in / 2]`, or the uint8 of `pack_for_cpu`.
        weight_scale: `[out]` or `[out, in / group_size]`.

    Returns:
        `[out, in]` of the given dtype.
    """
    if weight.dtype == torch.uint8:
        weight = unpack_for_cpu(weight, weight_scale.shape[0])
    codes = weight if weight.shape[1] == in_features else unpack_int4(weight)
    scale = weight_scale.float().view(weight_scale.shape[0], -1, 1)  # [out, groups, 1]
    return (codes.view(*scale.shape[:2], -1) * scale).view(codes.shape).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# CPU
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache
def cpu_int4_layout() -> tuple[int, list[slice]] | None:
    """How torch's int4 packing orders rows on this processor (AVX-512, AVX2 and others differ).

    It writes blocks of 64 or 32 rows, `[in, rows / 2]` bytes with two rows each. Which rows is found by packing the
    row numbers themselves.

    Returns:
        The rows of a block, and those in the first to the fourth four bits of every two bytes; `None` where the
        packing is missing or writes something else.
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


def can_pack_for_cpu(weight: torch.Tensor, in_features: int) -> bool:
    """Whether torch's int4 operator takes this weight: int4 bytes on a CPU, columns in thirty-twos."""
    is_int4 = weight.dtype == torch.int8 and 2 * weight.shape[1] == in_features
    return is_int4 and weight.device.type == "cpu" and in_features % 32 == 0 and cpu_int4_layout() is not None


def pack_for_cpu(weight: torch.Tensor) -> torch.Tensor:
    """Int4 bytes in the order that torch's int4 operator reads on this processor.

    Args:
        weight: int8 `[out, in / 2]`, as published.

    Returns:
        uint8 `[out, in / 2]`, with rows of zeros behind up to whole blocks. Not to be saved.
    """
    block_rows, row_slices = cpu_int4_layout()
    weight = F.pad(weight, (0, 0, 0, -len(weight) % block_rows))
    packed = torch.empty_like(weight, dtype=torch.uint8)
    for rows, target in zip(weight.split(CPU_DECODED_ROWS), packed.split(CPU_DECODED_ROWS)):
        target = target.view(torch.int16).view(-1, rows.shape[1], 2, block_rows // 4)  # [blocks, in / 2, 2, rows / 4]
        for column, codes in enumerate((rows >> 4, rows)):
            codes = codes.view(-1, block_rows, rows.shape[1]) & 15
            parts = [codes[:, row_slice].short() << shift for shift, row_slice in zip((0, 4, 8, 12), row_slices)]
            words = (parts[0] | parts[1] | parts[2] | parts[3]) ^ CPU_INT4_SIGNS
            target[:, :, column].copy_(words.transpose(1, 2))
    return packed


def unpack_for_cpu(packed: torch.Tensor, out_features: int) -> torch.Tensor:
    """Int4 codes, int8 `[out, in]`, of a weight that `pack_for_cpu` returned."""
    codes = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.int8)
    decoded = torch.empty(cpu_int4_layout()[0], codes.shape[1], dtype=torch.int16)
    for rows, target in zip(packed.split(len(decoded)), codes.split(len(decoded))):
        factor = decode_rows(rows, decoded)
        target.copy_(decoded.div_(factor, rounding_mode="trunc"))
    return codes[:out_features]


def decode_rows(rows: torch.Tensor, decoded: torch.Tensor) -> int:
    """Write the codes of some rows, times a power of two that makes it quick, and return that power.

    Args:
        rows: int8 `[rows, in]` or `[rows, in / 2]`, or whole blocks of `pack_for_cpu`.
        decoded: the output, `[rows, in]`, of any dtype that holds 16 bits with at most 4 of them significant. The
            columns of int8 `[rows, in / 2]` come as all even ones, then all odd ones.
    """
    if rows.dtype == torch.uint8:
        block_rows, row_slices = cpu_int4_layout()
        blocks = decoded.view(-1, block_rows, decoded.shape[1])
        # Two bytes are transposed together, much faster than single ones.
        words = rows.view(len(blocks), -1, block_rows // 2).view(torch.int16) ^ CPU_INT4_SIGNS
        words = words.transpose(1, 2).contiguous()  # [blocks, block_rows / 4, in]
        for shift, row_slice in zip((12, 8, 4, 0), row_slices):
            blocks[:, row_slice].copy_((words << shift) & -4096)
        return 4096
    if rows.shape[1] == decoded.shape[1]:
        decoded.copy_(rows)
        return 1
    even, odd = decoded.chunk(2, dim=1)
    even.copy_(rows & -16)
    odd.copy_(rows << 4)
    return 16


def drop_padding(product: torch.Tensor, out_features: int) -> torch.Tensor:
    """Leave out the rows that `pack_for_cpu` put behind a weight; no view, which an operator must not return."""
    return product if product.shape[1] == out_features else product[:, :out_features].contiguous()


def cpu_many_rows(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """`x @ (code * scale)^T` with some rows of the weight decoded at a time, as it is fast for many rows of `x`.

    A scale per row is applied to the product, where it costs least and rounds least.
    """
    out_features, in_features = weight_scale.shape[0], x.shape[1]
    # Columns of a group lie together, but in published int4 bytes half of them in each of two places.
    halves = 2 if weight.dtype == torch.int8 and weight.shape[1] != in_features else 1
    if halves == 2:
        x = torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)
    scale = F.pad(weight_scale.float().view(out_features, -1), (0, 0, 0, len(weight) - out_features))
    num_groups = scale.shape[1]
    buffer = torch.empty(min(CPU_DECODED_ROWS, len(weight)), in_features, dtype=x.dtype)
    products = []
    for rows, row_scale in zip(weight.split(CPU_DECODED_ROWS), scale.split(CPU_DECODED_ROWS)):
        decoded = buffer[: len(rows)]
        row_scale = row_scale / decode_rows(rows, decoded)
        if num_groups == 1:
            products.append((x @ decoded.t()).float().mul_(row_scale[:, 0]).to(x.dtype))
            continue
        groups = decoded.view(len(rows), halves, num_groups, -1)
        groups.copy_(groups.float() * row_scale[:, None, :, None])
        products.append(x @ decoded.t())
    return drop_padding(torch.cat(products, dim=1), out_features)


@lru_cache
def unit_scales(*shape: int) -> torch.Tensor:
    """Ones for the operators' own scales, which would be rounded to bfloat16; the last of two is a zero point."""
    scales = torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) == 3:
        scales[..., 1] = 0
    return scales


def cpu_group_scales(weight_scale: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Scales per group `[out, groups]` as torch's int4 operator reads them, bfloat16 `[groups, out, 2]`."""
    scales = F.pad(weight_scale, (0, 0, 0, len(packed) - len(weight_scale))).t().bfloat16()
    return torch.stack((scales, torch.zeros_like(scales)), dim=-1).contiguous()


def cpu_few_rows(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, group_scales: torch.Tensor | None
) -> torch.Tensor:
    """`x @ (code * scale)^T` by torch's weight-only operators, bfloat16 `[rows, in]` -> float32 `[rows, out]`.

    With a scale for each group, the result is bfloat16.
    """
    out_features, in_features = weight_scale.shape[0], x.shape[1]
    if weight.dtype == torch.int8:
        product = torch._weight_int8pack_mm(x, weight, unit_scales(out_features))
    elif group_scales is not None:
        group_size = in_features // weight_scale.shape[1]
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, group_scales)
        return drop_padding(product, out_features)
    else:
        group_size = next(size for size in (256, 128, 64, 32) if in_features % size == 0)
        scales = unit_scales(in_features // group_size, len(weight), 2)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scales)
        product = drop_padding(product, out_features)
    return product.float().mul_(weight_scale)


def cpu_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, group_scales: torch.Tensor | None
) -> torch.Tensor:
    """`x @ (code * scale)^T` on a CPU, `[rows, in]` -> `[rows, out]`; float16 is computed in bfloat16."""
    num_rows, in_features = x.shape
    # Processors multiply bfloat16 many times faster than float16, and torch's operators are fast in it alone.
    compute = x.bfloat16() if x.dtype == torch.float16 else x
    is_packed = weight.dtype == torch.uint8
    # In bfloat16 the int8 operator is wrong, or crashes, where columns do not come in thirty-twos.
    is_int8 = weight.shape[1] == in_features and weight_scale.ndim == 1 and in_features % 32 == 0
    max_rows = CPU_INT4_MAX_ROWS if is_packed else CPU_INT8_MAX_ROWS if is_int8 else 0
    if compute.dtype == torch.bfloat16 and 0 < num_rows <= max_rows:
        return cpu_few_rows(compute.contiguous(), weight, weight_scale, group_scales).to(x.dtype)
    return cpu_many_rows(compute, weight, weight_scale).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# GPU
# ---------------------------------------------------------------------------------------------------------------------

# The most rows that the kernels for few rows take.
GPU_FEW_ROWS = 16


def write_int4_assembly(is_bfloat16: bool) -> str:
    """PTX that decodes two int32 words of int4 codes into eight pairs of floats, one from each word.

    Bits of the codes are put under those of a float whose last bit counts as 1 (or 16, for the high four bits of a byte
    in float16), which makes `offset + code + 8`; subtracting what is too much is exact. The lookup table 0x6a of `lop3`
    is `(a & b) ^ c`; it also flips the sign bit of each code.
    """
    magic, offset, one = (
        ("0x43084308", "0xC308C308", "0x3F803F80") if is_bfloat16 else ("0x64086408", "0xE408E408", "")
    )
    lines = ["{", ".reg .b32 p<4>, e<4>, k0, k1, k2;", f"mov.b32 k0, {offset};"]
    if is_bfloat16:
        lines += [f"mov.b32 k1, {one};"]
    else:
        lines += ["mov.b32 k1, 0x2C002C00;", "mov.b32 k2, 0xD480D480;"]
    for byte in range(4):
        even, odd = f"${2 * byte}", f"${2 * byte + 1}"
        low = f"lop3.b32 e{byte}, p{byte}, 0x000F000F, {magic}, 0x6a;"
        # The same byte of both words, into the low bytes of two halves.
        lines += [f"prmt.b32 p{byte}, $8, $9, 0x{(4 + byte) << 8 | byte:04x};"]
        if is_bfloat16:
            # 128 + (code + 8), minus 136. `fma` because `add.bf16x2` needs compute capability 9.0.
            lines += [low, f"fma.rn.bf16x2 {odd}, e{byte}, k1, k0;", f"shr.u32 p{byte}, p{byte}, 4;"]
            lines += [low, f"fma.rn.bf16x2 {even}, e{byte}, k1, k0;"]
        else:
            # 1024 + (code + 8), minus 1032; and 1024 + 16 * (code + 8), by 1/16, minus 72.
            lines += [low, f"add.rn.f16x2 {odd}, e{byte}, k0;"]
            lines += [f"lop3.b32 e{byte}, p{byte}, 0x00F000F0, 0x64806480, 0x6a;"]
            lines += [f"fma.rn.f16x2 {even}, e{byte}, k1, k2;"]
    return "\n".join([*lines, "}"])


if triton is not None:
    FLOAT16_ASSEMBLY = tl.constexpr(write_int4_assembly(is_bfloat16=False))
    BFLOAT16_ASSEMBLY = tl.constexpr(write_int4_assembly(is_bfloat16=True))
    ASSEMBLY_OPERANDS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r")

    @triton.jit
    def decode_float16(words):
        """Eight int4 codes of each word, column 0 to 7, as float16."""
        dtype = tl.float16
        return tl.inline_asm_elementwise(
            FLOAT16_ASSEMBLY,
            ASSEMBLY_OPERANDS,
            [words],
            dtype=(dtype, dtype, dtype, dtype, dtype, dtype, dtype, dtype),
            is_pure=True,
            pack=2,
        )

    @triton.jit
    def decode_bfloat16(words):
        """Eight int4 codes of each word, column 0 to 7, as bfloat16."""
        dtype = tl.bfloat16
        return tl.inline_asm_elementwise(
            BFLOAT16_ASSEMBLY,
            ASSEMBLY_OPERANDS,
            [words],
            dtype=(dtype, dtype, dtype, dtype, dtype, dtype, dtype, dtype),
            is_pure=True,
            pack=2,
        )

    @triton.jit
    def decode_column(words, column: tl.constexpr):
        """One of the eight int4 codes of each word, on any device: byte `column // 2`, high four bits if even."""
        return (((words >> (8 * (column // 2) + 4 * (1 - column % 2))) & 0xF) ^ 8) - 8

    @triton.jit
    def int4_few_rows_kernel(
        planes_ptr, words_ptr, scale_ptr, bias_ptr, output_ptr,
        out_features, num_words, num_rows, words_per_split,
        BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
        GROUP_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, ASSEMBLY: tl.constexpr,
    ):  # fmt: skip
        """`y[split, r, n] = sum_k x[r, k] * code[n, k] * scale[n or n, k / GROUP_SIZE] (+ bias[n])`.

        Eight columns are one int32 word. The sum runs over columns in any order, so `x` comes as planes `[r, 8, k / 8]`
        and plane `j` meets column `j` of all words. The weight is the left operand: its rows fill the tensor cores.
        The words of a row are an argument: what is known to divide it decides how wide loads are.
        """
        row = tl.arange(0, BLOCK_ROWS)
        out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        first_word = tl.program_id(1) * words_per_split
        last_word = min(first_word + words_per_split, num_words)
        sums = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for start in range(first_word, last_word, BLOCK_IN):
            word = start + tl.arange(0, BLOCK_IN)
            is_weight = (out[:, None] < out_features) & (word[None, :] < last_word)
            words = tl.load(words_ptr + out[:, None].to(tl.int64) * num_words + word[None, :], mask=is_weight, other=0)
            if GROUP_SIZE > 0:
                group_words: tl.constexpr = GROUP_SIZE // 8
                offset = out[:, None] * (num_words // group_words) + word[None, :] // group_words
                group_scale = tl.load(scale_ptr + offset, mask=is_weight, other=0).to(planes_ptr.dtype.element_ty)
            if ASSEMBLY:
                codes = decode_float16(words) if planes_ptr.dtype.element_ty == tl.float16 else decode_bfloat16(words)
            for column in tl.static_range(8):
                x = tl.load(
                    planes_ptr + (row[None, :] * 8 + column) * num_words + word[:, None],
                    mask=(row[None, :] < num_rows) & (word[:, None] < last_word),
                    other=0,
                )
                weight = codes[column] if ASSEMBLY else decode_column(words, column).to(x.dtype)
                if GROUP_SIZE > 0:
                    weight = weight * group_scale
                sums = tl.dot(weight, x, sums)
        is_out = out < out_features
        if GROUP_SIZE == 0:
            sums *= tl.load(scale_ptr + out, mask=is_out, other=0).to(tl.float32)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias_ptr + out, mask=is_out, other=0).to(tl.float32)[:, None]
        offset = (tl.program_id(1) * num_rows + row[None, :]) * out_features + out[:, None]
        is_output = (row[None, :] < num_rows) & is_out[:, None]
        tl.store(output_ptr + offset, sums.to(output_ptr.dtype.element_ty), mask=is_output)

    @triton.jit
    def int8_few_rows_kernel(
        x_ptr, codes_ptr, scale_ptr, bias_ptr, output_ptr,
        out_features, in_features, num_rows, columns_per_split,
        BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ):  # fmt: skip
        """`y[split, r, n] = scale[n] * sum_k x[r, k] * code[n, k] (+ bias[n])`, the sum over the columns of the split."""
        row = tl.arange(0, BLOCK_ROWS)
        out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        first_column = tl.program_id(1) * columns_per_split
        last_column = min(first_column + columns_per_split, in_features)
        sums = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for start in range(first_column, last_column, BLOCK_IN):
            column = start + tl.arange(0, BLOCK_IN)
            codes = tl.load(
                codes_ptr + out[:, None].to(tl.int64) * in_features + column[None, :],
                mask=(out[:, None] < out_features) & (column[None, :] < last_column),
                other=0,
            )
            x = tl.load(
                x_ptr + row[None, :] * in_features + column[:, None],
                mask=(row[None, :] < num_rows) & (column[:, None] < last_column),
                other=0,
            )
            sums = tl.dot(codes.to(x.dtype), x, sums)
        is_out = out < out_features
        sums *= tl.load(scale_ptr + out, mask=is_out, other=0).to(tl.float32)[:, None]
        if HAS_BIAS:
            sums += tl.load(bias_ptr + out, mask=is_out, other=0).to(tl.float32)[:, None]
        offset = (tl.program_id(1) * num_rows + row[None, :]) * out_features + out[:, None]
        is_output = (row[None, :] < num_rows) & is_out[:, None]
        tl.store(output_ptr + offset, sums.to(output_ptr.dtype.element_ty), mask=is_output)

    @triton.jit
    def dequantize_kernel(
        weight_ptr, scale_ptr, output_ptr, out_features, num_bytes,
        BLOCK_OUT: tl.constexpr, BLOCK_BYTES: tl.constexpr, BYTES_PER_GROUP: tl.constexpr, IS_INT4: tl.constexpr,
    ):  # fmt: skip
        """`w[n, k] = code[n, k] * scale[n or n, k / group_size]` in float32, rounded once; `num_bytes` are of a row."""
        out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        byte = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
        is_weight = (out[:, None] < out_features) & (byte[None, :] < num_bytes)
        packed = tl.load(weight_ptr + out[:, None].to(tl.int64) * num_bytes + byte[None, :], mask=is_weight, other=0)
        if BYTES_PER_GROUP > 0:
            offset = out[:, None] * (num_bytes // BYTES_PER_GROUP) + byte[None, :] // BYTES_PER_GROUP
            scale = tl.load(scale_ptr + offset, mask=is_weight, other=0).to(tl.float32)
        else:
            scale = tl.load(scale_ptr + out, mask=out < out_features, other=0).to(tl.float32)[:, None]
        if IS_INT4:
            odd = (packed << 4).to(tl.int8) >> 4
            decoded = tl.interleave((packed >> 4).to(tl.float32) * scale, odd.to(tl.float32) * scale)
            column = tl.program_id(1) * 2 * BLOCK_BYTES + tl.arange(0, 2 * BLOCK_BYTES)
            in_features = 2 * num_bytes
        else:
            decoded = packed.to(tl.float32) * scale
            column, in_features = byte, num_bytes
        tl.store(
            output_ptr + out[:, None].to(tl.int64) * in_features + column[None, :],
            decoded.to(output_ptr.dtype.element_ty),
            mask=(out[:, None] < out_features) & (column[None, :] < in_features),
        )


class FewRowsConfig(NamedTuple):
    """How the weight is cut: rows and words (int4) or columns (int8) of a block, parts of a sum, warps and stages."""

    block_out: int
    block_in: int
    block_rows: int
    num_splits: int
    num_warps: int
    num_stages: int


def few_rows_config(
    bits: int,
    is_grouped: bool,
    num_rows: int,
    out_features: int,
    in_features: int,
    num_multiprocessors: int,
    is_hip: bool,
) -> FewRowsConfig:
    """Blocks for a product with few rows. What a measurement finds better on some GPU belongs here.

    A sum is split until there are two programs for every multiprocessor: narrow layers have too few rows of blocks.
    """
    # AMD's matrix instructions need 16 rows; NVIDIA's take 8, with less to load.
    block_rows = 8 if num_rows <= 8 and not is_hip else 16
    # Larger blocks, or one more on its way, would not fit into the registers.
    block_out, block_in, num_stages = 32, 256, 4
    if bits == 4:
        block_in, num_stages = (32, 3) if is_grouped else (64, 4)
    num_blocks = triton.cdiv(in_features // 8 if bits == 4 else in_features, block_in)
    num_splits = 1
    while num_splits < 8 and 2 * num_splits <= num_blocks:
        if triton.cdiv(out_features, block_out) * num_splits >= 2 * num_multiprocessors:
            break
        num_splits *= 2
    return FewRowsConfig(block_out, block_in, block_rows, num_splits, 2, 2 if is_hip else num_stages)


def run_few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    config: FewRowsConfig,
    use_assembly: bool,
) -> torch.Tensor:
    """`[rows, in]` -> `[rows, out]` by the kernel of the weight's width; `in` is a multiple of 8 for int4."""
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    is_int4 = weight.shape[1] != in_features
    is_whole = config.num_splits == 1
    shape = (config.num_splits, num_rows, out_features)
    output = torch.empty(
        shape[1:] if is_whole else shape, dtype=x.dtype if is_whole else torch.float32, device=x.device
    )
    length = in_features // 8 if is_int4 else in_features
    blocks_per_split = triton.cdiv(triton.cdiv(length, config.block_in), config.num_splits)
    options = {
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "BLOCK_ROWS": config.block_rows,
        "HAS_BIAS": is_whole and bias is not None,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    kernel, codes = int8_few_rows_kernel, weight
    if is_int4:
        kernel, codes = int4_few_rows_kernel, weight.view(torch.int32)
        x = x.view(num_rows, length, 8).transpose(1, 2).contiguous()
        options["GROUP_SIZE"] = 0 if weight_scale.ndim == 1 else in_features // weight_scale.shape[1]
        options["ASSEMBLY"] = use_assembly
    sizes = (out_features, length, num_rows, blocks_per_split * config.block_in)
    grid = (triton.cdiv(out_features, config.block_out), config.num_splits)
    kernel[grid](x, codes, weight_scale, weight_scale if bias is None else bias, output, *sizes, **options)
    if is_whole:
        return output
    total = output.sum(0)
    return (total if bias is None else total.add_(bias)).to(x.dtype)


def triton_dequantize(
    weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """[`dequantize_weight`] in one kernel."""
    out_features, num_bytes = weight.shape
    output = torch.empty(out_features, in_features, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(out_features, 8), triton.cdiv(num_bytes, 256))
    dequantize_kernel[grid](
        weight, weight_scale, output, out_features, num_bytes,
        BLOCK_OUT=8,
        BLOCK_BYTES=256,
        BYTES_PER_GROUP=0 if weight_scale.ndim == 1 else num_bytes // weight_scale.shape[1],
        IS_INT4=num_bytes != in_features,
    )  # fmt: skip
    return output


def can_use_triton(x: torch.Tensor) -> bool:
    """Whether the kernels run on this tensor's device and in its dtype."""
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if triton is None or (torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0)):
        logger.warning_once(
            "Quantized layers run without kernels, slowly: those need Triton and a GPU of compute capability 8.0 (Ampere) "
            "or newer, or one of AMD's."
        )
        return False
    return True


def triton_quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x @ (code * scale)^T + bias` on a GPU; for many rows the weight is decoded for the vendor's product."""
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    bits = 8 * weight.shape[1] // in_features
    with torch.cuda.device_of(x):
        if 0 < num_rows <= GPU_FEW_ROWS and in_features % 8 == 0:
            is_hip = torch.version.hip is not None
            num_multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
            is_grouped = weight_scale.ndim == 2
            config = few_rows_config(
                bits, is_grouped, num_rows, out_features, in_features, num_multiprocessors, is_hip
            )
            return run_few_rows(x.contiguous(), weight, weight_scale, bias, config, use_assembly=not is_hip)
        decoded = triton_dequantize(weight, weight_scale, in_features, x.dtype)
    return F.linear(x, decoded, None if bias is None else bias.to(x.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


def own_name(name: str) -> str:
    """`chatglm::name`, with a number behind it where another checkpoint's copy of this file has that one.

    To register a name again frees the operator that models loaded before still call (torch 2.6 to 2.13).
    """
    numbered, copies = name, 1
    while hasattr(torch.ops.chatglm, numbered):
        copies += 1
        numbered = f"{name}_{copies}"
    return f"chatglm::{numbered}"


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the operator computes, `[rows, in]` -> `[rows, out]`; see [`quantized_linear`]."""
    if can_use_triton(x):
        return triton_quantized_linear(x, weight, weight_scale, bias)
    if x.device.type == "cpu":
        product = cpu_linear(x, weight, weight_scale, group_scales)
        return product if bias is None else product.add_(bias.to(product.dtype))
    decoded = dequantize_weight(weight, weight_scale, x.shape[-1], x.dtype)
    return F.linear(x, decoded, None if bias is None else bias.to(x.dtype))


multiply_operator = torch.library.custom_op(own_name("quantized_linear"), multiply, mutates_args=())


@multiply_operator.register_fake
def _(x, weight, weight_scale, bias=None, group_scales=None):
    return x.new_empty(x.shape[0], weight_scale.shape[0])


@torch.library.custom_op(own_name("quantized_linear_backward"), mutates_args=())
def quantized_linear_backward(
    grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Gradient to the input, `grad @ (code * scale)`: `[rows, out]` -> `[rows, in]`."""
    # As in `cpu_linear`.
    dtype = torch.bfloat16 if grad.device.type == "cpu" and grad.dtype == torch.float16 else grad.dtype
    if can_use_triton(grad):
        decoded = triton_dequantize(weight, weight_scale, in_features, dtype)
    else:
        decoded = dequantize_weight(weight, weight_scale, in_features, dtype)
    return (grad.to(dtype) @ decoded).to(grad.dtype)


@quantized_linear_backward.register_fake
def _(grad, weight, weight_scale, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def setup_context(ctx, inputs, output):
    x, weight, weight_scale, bias, _ = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def backward(ctx, grad):
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = quantized_linear_backward(grad.contiguous(), weight, weight_scale, ctx.in_features)
    # The last arguments are not counted where they are left at their defaults.
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


multiply_operator.register_autograd(backward, setup_context=setup_context)


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    group_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ (code * scale)^T + bias` for int8 or int4 codes, told by the width of `weight`.

    Args:
        x: `[..., in]`, float32, float16 or bfloat16.
        weight: int8 `[out, in]` (int8 codes) or `[out, in / 2]` (int4), or the uint8 of `pack_for_cpu`.
        weight_scale: `[out]` or `[out, in / group_size]`, any float dtype.
        bias: `[out]`, any float dtype.
        group_scales: for grouped weights of `pack_for_cpu`, what `cpu_group_scales` returned.

    Returns:
        `[..., out]` in the dtype of `x`. It has a gradient to `x` and to `bias`, and keeps no activation for it.
    """
    # Without gradients the operator would add nothing but its dispatch, a tenth of a millisecond.
    needs_operator = torch.is_grad_enabled() or torch.compiler.is_compiling()
    run = multiply_operator if needs_operator else multiply
    product = run(x.reshape(-1, x.shape[-1]), weight, weight_scale, bias, group_scales)
    return product.view(*x.shape[:-1], weight_scale.shape[0])


__all__ = [
    "can_pack_for_cpu",
    "cpu_group_scales",
    "dequantize_weight",
    "pack_for_cpu",
    "quantized_linear",
    "unpack_for_cpu",
    "unpack_int4",
]
