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
- A product is one launch that reads `x` as it is and leaves nothing behind: narrow layers keep a whole GPU busy because
  the warps of a program add parts of one sum, not because programs do. No counter, no workspace, always the same order.
- Without Triton nothing here can be called but `can_use_triton`, which says so.
"""

import functools
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

# The most rows of input that the kernels for few rows take; for more, the weight is decoded.
FEW_ROWS = 64
# Versions before it, such as that of torch 2.6, cannot compile those kernels; chips that came later need a later one.
OLDEST_TRITON = (3, 3)
OLDEST_TRITON_OF = {"sm_120": (3, 4), "sm_121": (3, 4)}


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


def write_int8_assembly(is_bfloat16: bool) -> str:
    """PTX that decodes four int8 codes, one int32, into two pairs of floats.

    A byte becomes the end of a float whose last bit is worth 1: in float16 `1024 + code + 128`. bfloat16 has no room for
    all eight bits: the difference of `128 + (the low seven bits)` and `128`, or `256` for a negative code, is exact too.
    """
    if not is_bfloat16:
        lines = [".reg .b32 s, p0, p1, k;", "mov.b32 k, 0xE480E480;", "xor.b32 s, $2, 0x80808080;"]
        lines += [f"prmt.b32 p{pair}, s, 0x64646464, 0x4{2 * pair + 1}4{2 * pair};" for pair in (0, 1)]
        lines += [f"add.rn.f16x2 ${pair}, p{pair}, k;" for pair in (0, 1)]
        return "\n".join(["{", *lines, "}"])
    lines = [".reg .b32 p<2>, l<2>, s<2>, k;", "mov.b32 k, 0xBF80BF80;"]
    for pair in (0, 1):
        lines += [f"prmt.b32 p{pair}, $2, $2, 0x{2 * pair + 1}{2 * pair + 1}{2 * pair}{2 * pair};"]
        lines += [f"lop3.b32 l{pair}, p{pair}, 0x007F007F, 0x43004300, 0x6a;"]
        lines += [f"lop3.b32 s{pair}, p{pair}, 0x00800080, 0x43004300, 0x6a;"]
        lines += [f"fma.rn.bf16x2 ${pair}, s{pair}, k, l{pair};"]
    return "\n".join(["{", *lines, "}"])


if triton is not None:
    FLOAT16_ASSEMBLY = tl.constexpr(write_int4_assembly(is_bfloat16=False))
    BFLOAT16_ASSEMBLY = tl.constexpr(write_int4_assembly(is_bfloat16=True))
    ASSEMBLY_OPERANDS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r")
    INT8_FLOAT16_ASSEMBLY = tl.constexpr(write_int8_assembly(is_bfloat16=False))
    INT8_BFLOAT16_ASSEMBLY = tl.constexpr(write_int8_assembly(is_bfloat16=True))

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
    def decode_int8_by_assembly(codes, dtype: tl.constexpr):
        """Int8 codes as floats, four at a time."""
        if dtype == tl.float16:
            decoded = tl.inline_asm_elementwise(
                INT8_FLOAT16_ASSEMBLY, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
            )
        else:
            decoded = tl.inline_asm_elementwise(
                INT8_BFLOAT16_ASSEMBLY, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        return decoded

    @triton.jit
    def decode_column(words, column: tl.constexpr, dtype: tl.constexpr):
        """One of the eight int4 codes of each word, on any device: byte `column // 2`, high four bits if even."""
        return ((((words >> (8 * (column // 2) + 4 * (1 - column % 2))) & 0xF) ^ 8) - 8).to(dtype)

    @triton.jit
    def decode_int4(words, dtype: tl.constexpr, ASSEMBLY: tl.constexpr):
        """The eight int4 codes of each word, column 0 to 7."""
        if not ASSEMBLY:
            c0, c1 = decode_column(words, 0, dtype), decode_column(words, 1, dtype)
            c2, c3 = decode_column(words, 2, dtype), decode_column(words, 3, dtype)
            c4, c5 = decode_column(words, 4, dtype), decode_column(words, 5, dtype)
            c6, c7 = decode_column(words, 6, dtype), decode_column(words, 7, dtype)
        elif dtype == tl.float16:
            c0, c1, c2, c3, c4, c5, c6, c7 = decode_float16(words)
        else:
            c0, c1, c2, c3, c4, c5, c6, c7 = decode_bfloat16(words)
        return c0, c1, c2, c3, c4, c5, c6, c7

    @triton.jit
    def split_columns(x):
        """`[parts, rows, 8 * words]` -> the eight columns of all words, each `[parts, words, rows]`."""
        x = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 8, 2, 2, 2))
        even, odd = tl.split(x)
        x04, x26 = tl.split(even)
        x15, x37 = tl.split(odd)
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        return (
            tl.permute(x0, 0, 2, 1), tl.permute(x1, 0, 2, 1), tl.permute(x2, 0, 2, 1), tl.permute(x3, 0, 2, 1),
            tl.permute(x4, 0, 2, 1), tl.permute(x5, 0, 2, 1), tl.permute(x6, 0, 2, 1), tl.permute(x7, 0, 2, 1),
        )  # fmt: skip

    @triton.jit
    def load_columns(x_ptr, first_row, start, num_columns, num_rows, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
                     BLOCK_IN: tl.constexpr, IS_EVEN: tl.constexpr):  # fmt: skip
        """The rows of `x` for a block, `[parts, rows, columns]`; rows and columns that are not there are zeros."""
        row = first_row + tl.arange(0, BLOCK_ROWS)[None, :, None]
        column = start + tl.arange(0, PARTS)[:, None, None] * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, None, :]
        is_input = row < num_rows
        if not IS_EVEN:
            is_input = is_input & (column < num_columns)
        return tl.load(x_ptr + row * num_columns + column, mask=is_input, other=0)

    @triton.jit
    def load_scales(scale_ptr, weight_row, start, num_groups, GROUP_WORDS: tl.constexpr, NUM_SCALES: tl.constexpr,
                    BLOCK_IN: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
        """The scales of a block, `[parts, out, scales]`: one for each group, or for each part of a wider one."""
        part = tl.arange(0, PARTS)[:, None, None]
        if GROUP_WORDS <= BLOCK_IN:
            group = start // GROUP_WORDS + part * NUM_SCALES + tl.arange(0, NUM_SCALES)[None, None, :]
        else:
            group = (start + part * BLOCK_IN) // GROUP_WORDS
        return tl.load(scale_ptr + weight_row * num_groups + group, mask=group < num_groups, other=0)

    @triton.jit
    def store_sums(sums, scale_ptr, bias_ptr, output_ptr, first_row, out, out_features, num_rows,
                   HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
        """Add the parts `[parts, out, rows]`, always in the same order, scale them, add the bias and round once."""
        row = first_row + tl.arange(0, sums.shape[2])
        is_out = out < out_features
        total = tl.sum(sums, 0)
        if HAS_SCALE:
            total *= tl.load(scale_ptr + out, mask=is_out, other=0).to(tl.float32)[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + out, mask=is_out, other=0).to(tl.float32)[:, None]
        is_output = (row[None, :] < num_rows) & is_out[:, None]
        offset = row[None, :].to(tl.int64) * out_features + out[:, None]
        tl.store(output_ptr + offset, total.to(output_ptr.dtype.element_ty), mask=is_output)

    # Triton would compile once more for one row, and once more for multiples of 16.
    @triton.jit(do_not_specialize=["num_rows"])
    def int4_few_rows_kernel(
        x_ptr, words_ptr, scale_ptr, bias_ptr, output_ptr, out_features, num_words, num_groups, num_rows,
        BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
        GROUP_WORDS: tl.constexpr, HAS_BIAS: tl.constexpr, IS_EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
    ):  # fmt: skip
        """`y[r, n] = sum_k x[r, k] * code[n, k] * scale[n or n, k / group_size] (+ bias[n])`.

        Eight columns are one int32 word. Columns can be added in any order, so column `j` of all words is multiplied with
        every eighth column of `x`. The weight is the left operand, as its many rows fill the tensor cores. Triton loads
        more at once the more it knows to divide `num_words` and `num_groups`, so those are arguments.
        """
        first_row = tl.program_id(0) * BLOCK_ROWS
        out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        # Rows behind the last are the last once more, which needs no mask; they are not stored.
        weight_row = tl.minimum(out, out_features - 1)[None, :, None]
        part = tl.arange(0, PARTS)[:, None, None]
        # Words that share a scale: a group, or as much of a wider one as is in a part.
        SHARED: tl.constexpr = GROUP_WORDS if GROUP_WORDS > 0 and GROUP_WORDS < BLOCK_IN else BLOCK_IN
        NUM_SCALES: tl.constexpr = BLOCK_IN // SHARED
        if GROUP_WORDS > 0:
            scale = load_scales(scale_ptr, weight_row, 0, num_groups, GROUP_WORDS, NUM_SCALES, BLOCK_IN, PARTS)
        sums = tl.zeros((PARTS, BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for start in range(0, num_words, PARTS * BLOCK_IN):
            word = start + part * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, None, :]
            word_ptrs = words_ptr + weight_row.to(tl.int64) * num_words + word
            words = tl.load(word_ptrs) if IS_EVEN else tl.load(word_ptrs, mask=word < num_words, other=0)
            x = load_columns(
                x_ptr, first_row, start * 8, num_words * 8, num_rows, BLOCK_ROWS, PARTS, BLOCK_IN * 8, IS_EVEN
            )
            x0, x1, x2, x3, x4, x5, x6, x7 = split_columns(x)
            c0, c1, c2, c3, c4, c5, c6, c7 = decode_int4(words, x.dtype, ASSEMBLY)
            if GROUP_WORDS > 0:
                shared = tl.broadcast_to(scale.to(x.dtype)[:, :, :, None], (PARTS, BLOCK_OUT, NUM_SCALES, SHARED))
                shared = tl.reshape(shared, (PARTS, BLOCK_OUT, BLOCK_IN))
                c0, c1, c2, c3 = c0 * shared, c1 * shared, c2 * shared, c3 * shared
                c4, c5, c6, c7 = c4 * shared, c5 * shared, c6 * shared, c7 * shared
                # Too small for copies that wait in shared memory: those of the next block are under way in registers.
                following = start + PARTS * BLOCK_IN
                scale = load_scales(
                    scale_ptr, weight_row, following, num_groups, GROUP_WORDS, NUM_SCALES, BLOCK_IN, PARTS
                )
            sums = tl.dot(c0, x0, sums)
            sums = tl.dot(c1, x1, sums)
            sums = tl.dot(c2, x2, sums)
            sums = tl.dot(c3, x3, sums)
            sums = tl.dot(c4, x4, sums)
            sums = tl.dot(c5, x5, sums)
            sums = tl.dot(c6, x6, sums)
            sums = tl.dot(c7, x7, sums)
        store_sums(
            sums, scale_ptr, bias_ptr, output_ptr, first_row, out, out_features, num_rows, GROUP_WORDS == 0, HAS_BIAS
        )

    @triton.jit(do_not_specialize=["num_rows"])
    def int8_few_rows_kernel(
        x_ptr, codes_ptr, scale_ptr, bias_ptr, output_ptr, out_features, in_features, num_rows,
        BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
        HAS_BIAS: tl.constexpr, IS_EVEN: tl.constexpr, ASSEMBLY: tl.constexpr,
    ):  # fmt: skip
        """`y[r, n] = scale[n] * sum_k x[r, k] * code[n, k] (+ bias[n])`."""
        first_row = tl.program_id(0) * BLOCK_ROWS
        out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        weight_row = tl.minimum(out, out_features - 1)[None, :, None]
        part = tl.arange(0, PARTS)[:, None, None]
        sums = tl.zeros((PARTS, BLOCK_OUT, BLOCK_ROWS), tl.float32)
        for start in range(0, in_features, PARTS * BLOCK_IN):
            column = start + part * BLOCK_IN + tl.arange(0, BLOCK_IN)[None, None, :]
            code_ptrs = codes_ptr + weight_row.to(tl.int64) * in_features + column
            codes = tl.load(code_ptrs) if IS_EVEN else tl.load(code_ptrs, mask=column < in_features, other=0)
            x = load_columns(x_ptr, first_row, start, in_features, num_rows, BLOCK_ROWS, PARTS, BLOCK_IN, IS_EVEN)
            decoded = decode_int8_by_assembly(codes, x.dtype) if ASSEMBLY else codes.to(x.dtype)
            sums = tl.dot(decoded, tl.permute(x, 0, 2, 1), sums)
        store_sums(sums, scale_ptr, bias_ptr, output_ptr, first_row, out, out_features, num_rows, True, HAS_BIAS)

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
    """How the work is cut: weight rows, words (int4) or columns (int8) and input rows of a block; parts of a sum that one
    program adds at the same time, a warp or more each; warps, and loads that are under way."""

    block_out: int
    block_in: int
    block_rows: int
    parts: int
    num_warps: int
    num_stages: int


# For each number of input rows of a block. Chosen by what the compiled kernels take in registers, shared memory and
# instructions, not yet by the clock: whoever measures better ones on a GPU writes them here.
LARGE_SHARED_MEMORY: dict[str, tuple[FewRowsConfig, ...]] = {
    "int4": (
        FewRowsConfig(32, 32, 8, 8, 8, 3),
        FewRowsConfig(32, 16, 16, 8, 8, 3),
        FewRowsConfig(32, 16, 32, 4, 4, 3),
    ),
    "int4 groups": (
        FewRowsConfig(32, 32, 8, 8, 8, 3),
        FewRowsConfig(32, 16, 16, 8, 8, 3),
        FewRowsConfig(32, 16, 32, 4, 4, 3),
    ),
    "int8": (
        FewRowsConfig(32, 128, 8, 8, 8, 4),
        FewRowsConfig(32, 128, 16, 8, 8, 3),
        FewRowsConfig(32, 128, 32, 4, 4, 3),
    ),
}
# A hundred KiB for all programs on a multiprocessor.
SMALL_SHARED_MEMORY: dict[str, tuple[FewRowsConfig, ...]] = {
    "int4": (
        FewRowsConfig(32, 32, 8, 4, 4, 3),
        FewRowsConfig(32, 16, 16, 4, 4, 3),
        FewRowsConfig(32, 16, 32, 4, 4, 3),
    ),
    "int4 groups": (
        FewRowsConfig(32, 32, 8, 4, 4, 3),
        FewRowsConfig(32, 16, 16, 4, 4, 3),
        FewRowsConfig(32, 16, 32, 4, 4, 3),
    ),
    "int8": (
        FewRowsConfig(32, 128, 8, 4, 4, 3),
        FewRowsConfig(32, 128, 16, 4, 4, 3),
        FewRowsConfig(32, 128, 32, 4, 4, 3),
    ),
}
# AMD's matrix instructions need 16 rows, and its programs share 64 KiB.
AMD: dict[str, tuple[FewRowsConfig, ...]] = {
    "int4": (FewRowsConfig(32, 16, 16, 4, 4, 2), FewRowsConfig(32, 16, 32, 4, 4, 2)),
    "int4 groups": (FewRowsConfig(32, 16, 16, 4, 4, 2), FewRowsConfig(32, 16, 32, 4, 4, 2)),
    "int8": (FewRowsConfig(32, 128, 16, 4, 4, 2), FewRowsConfig(32, 64, 32, 4, 4, 2)),
}
# By what `torch.cuda.get_device_properties` calls them; the last two are for chips that are not listed.
FEW_ROWS_CONFIGS = {
    "sm_80": LARGE_SHARED_MEMORY,
    "sm_86": SMALL_SHARED_MEMORY,
    "sm_89": SMALL_SHARED_MEMORY,
    "sm_90": LARGE_SHARED_MEMORY,
    "sm_100": LARGE_SHARED_MEMORY,
    "sm_120": SMALL_SHARED_MEMORY,
    "gfx942": AMD,
    "sm": SMALL_SHARED_MEMORY,
    "gfx": AMD,
}


def read_triton_version(version: str) -> tuple[int, int]:
    """The first two numbers of a version such as `3.2.0+git`."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def name_architecture(device: torch.device) -> str:
    """The chip of a GPU as the table above names it: `sm_90`, `gfx942`."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def few_rows_config(
    architecture: str, bits: int, is_grouped: bool, num_rows: int, triton_version: tuple[int, int]
) -> FewRowsConfig:
    """The blocks for a product with few rows: of the configurations of the chip, the first that takes all rows."""
    default = "gfx" if architecture.startswith("gfx") else "sm"
    configs = FEW_ROWS_CONFIGS.get(architecture, FEW_ROWS_CONFIGS[default])
    layout = "int8" if bits == 8 else "int4 groups" if is_grouped else "int4"
    # Triton pads products of fewer than 16 rows since 3.5, and refuses them before.
    fitting = [config for config in configs[layout] if config.block_rows >= 16 or triton_version >= (3, 5)]
    return next((config for config in fitting if config.block_rows >= num_rows), fitting[-1])


def run_few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    config: FewRowsConfig,
    use_assembly: bool,
) -> torch.Tensor:
    """`[rows, in]` -> `[rows, out]` by the kernel of the weight's width, in one launch; `in` is a multiple of 8 for int4."""
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    is_int4 = weight.shape[1] != in_features
    output = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    length = in_features // 8 if is_int4 else in_features
    options = {
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "BLOCK_ROWS": config.block_rows,
        "PARTS": config.parts,
        "HAS_BIAS": bias is not None,
        "IS_EVEN": length % (config.block_in * config.parts) == 0,
        "ASSEMBLY": use_assembly,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    kernel, codes, sizes = int8_few_rows_kernel, weight, [out_features, length]
    if is_int4:
        num_groups = 0 if weight_scale.ndim == 1 else weight_scale.shape[1]
        kernel, codes, sizes = int4_few_rows_kernel, weight.view(torch.int32), [*sizes, num_groups]
        options["GROUP_WORDS"] = length // num_groups if num_groups else 0
    # Programs that read the same weight start one after the other, and find it in the cache.
    grid = (triton.cdiv(num_rows, config.block_rows), triton.cdiv(out_features, config.block_out))
    kernel[grid](x, codes, weight_scale, weight_scale if bias is None else bias, output, *sizes, num_rows, **options)
    return output


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


def has_few_rows_kernel(
    architecture: str,
    bits: int,
    group_size: int | None,
    num_rows: int,
    in_features: int,
    triton_version: tuple[int, int],
) -> bool:
    """Whether a kernel multiplies the weight as it is stored; else it is decoded, which any version of Triton does."""
    has_blocks = group_size is None or (bits == 4 and group_size >= 8 and group_size & (group_size - 1) == 0)
    if not (0 < num_rows <= FEW_ROWS and in_features % 8 == 0 and has_blocks):
        return False
    major, minor = OLDEST_TRITON_OF.get(architecture, OLDEST_TRITON)
    if triton_version < (major, minor):
        logger.warning_once(
            f"Quantized weights are decoded for every product, which is slow: on {architecture} the kernels that read them "
            f"as they are need Triton {major}.{minor} (torch 2.{minor + 4}) or newer, and this is Triton "
            f"{triton.__version__}."
        )
        return False
    return True


def triton_quantized_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x @ (code * scale)^T + bias` on a GPU; for many rows the weight is decoded for the vendor's product."""
    num_rows, in_features = x.shape
    bits = 8 * weight.shape[1] // in_features
    is_grouped = weight_scale.ndim == 2
    group_size = in_features // weight_scale.shape[1] if is_grouped else None
    architecture, version = name_architecture(x.device), read_triton_version(triton.__version__)
    with torch.cuda.device_of(x):
        if has_few_rows_kernel(architecture, bits, group_size, num_rows, in_features, version):
            config = few_rows_config(architecture, bits, is_grouped, num_rows, version)
            use_assembly = torch.version.hip is None
            return run_few_rows(x.contiguous(), weight, weight_scale, bias, config, use_assembly)
        decoded = triton_dequantize(weight, weight_scale, in_features, x.dtype)
    return F.linear(x, decoded, None if bias is None else bias.to(x.dtype))


__all__ = ["can_use_triton", "triton_dequantize", "triton_quantized_linear"]
