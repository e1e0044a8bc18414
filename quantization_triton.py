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
"""Products with quantized weights on NVIDIA and AMD GPUs, in Triton.

What is unusual here:

- The kernels read the published bytes as they are, int4 as int32 words of eight columns. On NVIDIA, a few lines of
  assembly decode a word in about two instructions for each code; converting integers would be slower than the memory.
- They are fast for few rows of input, where reading the weight is what takes time. For many rows the weight is decoded
  and the vendor's matrix product does the rest.
- Without Triton nothing here can be called but `can_use_triton`, which says so.
"""

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

# The most rows of input that the kernels for few rows take.
FEW_ROWS = 16


def write_int4_assembly(is_bfloat16: bool) -> str:
    """PTX that decodes two int32 words of int4 codes into eight pairs of floats, one from each word.

    The four bits of a code are placed at the end of a float whose last bit is worth 1 (or 16, for the high four bits of
    a byte in float16). That float is `offset + code + 8`, and subtracting `offset + 8` is exact. The lookup table 0x6a
    of `lop3` is `(a & b) ^ c`; it also flips the sign bit of each code.
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
        """The eight int4 codes of each word, column 0 to 7, as float16."""
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
        """The eight int4 codes of each word, column 0 to 7, as bfloat16."""
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

        Eight columns are one int32 word. Columns can be added in any order, so `x` comes as planes `[r, 8, k / 8]`, and
        plane `j` is multiplied with column `j` of all words. The weight is the left operand, as its many rows fill the
        tensor cores. Triton loads more at once the more it knows to divide `num_words`, so that is an argument.
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
    """How the work is cut: rows and words (int4) or columns (int8) of a block, parts of a sum, warps and stages."""

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
    """The blocks for a product with few rows. Better sizes for some GPU, once measured, belong here.

    Narrow layers have fewer blocks than a GPU has multiprocessors, so sums are split until each gets two programs.
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
        if 0 < num_rows <= FEW_ROWS and in_features % 8 == 0:
            is_hip = torch.version.hip is not None
            num_multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
            is_grouped = weight_scale.ndim == 2
            config = few_rows_config(
                bits, is_grouped, num_rows, out_features, in_features, num_multiprocessors, is_hip
            )
            return run_few_rows(x.contiguous(), weight, weight_scale, bias, config, use_assembly=not is_hip)
        decoded = triton_dequantize(weight, weight_scale, in_features, x.dtype)
    return F.linear(x, decoded, None if bias is None else bias.to(x.dtype))


__all__ = ["can_use_triton", "triton_dequantize", "triton_quantized_linear"]
