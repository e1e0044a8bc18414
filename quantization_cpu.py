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
"""Products with quantized weights on a CPU.

What is unusual here:

- The kernels, where there are any, read the published bytes as they are.
- They round the input to 16-bit fixed point, with one scale for each 128 columns of a row. From there on the
  processor multiplies and adds whole numbers, exactly, until the sums of each 128 columns are scaled in float32.
- One row of input and int4 codes are multiplied as bytes, where the processor does that: those codes are bytes with
  fewer instructions than 16-bit numbers, and for one row this is what takes time.
- Without kernels, torch's operators multiply. The one for int8 takes the published codes. The one for int4 wants them
  in an order that depends on the processor; `pack_int4_for_cpu` makes it, and it is never saved.
- For many rows of input a part of the weight is decoded at a time, into the processor's cache, and multiplied with.
"""

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from .kernels_llvm import (
    BYTES,
    FEW_ROWS_FEATURES,
    FLOAT,
    FLOATS,
    HALF_DTYPES,
    INT1,
    INT8,
    INT16,
    INT32,
    INTS,
    WIDE_FEATURES,
    WORDS,
    Kernel,
    Program,
    RowsProgram,
    Step,
    TasksProgram,
    compile_kernel,
    processor_has,
    rows_at_a_time,
    rows_step,
)
from .kernels_matmul import multiply_new_rows


# torch's int4 operator wants codes plus 8, as unsigned numbers. That flips the highest bit of each, here of the four
# in two bytes.
INT4_SIGNS = -0x7778

# Rows of the weight that are decoded at a time, so that they stay in the processor's cache.
DECODED_ROWS = 512

# Dtypes of scales that the kernels read.
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32)
# What multiplying bytes needs.
BYTES_FEATURES = (*WIDE_FEATURES, "avx512vnni")
# Columns of the input that share a scale, as 16-bit numbers in four vectors of 64 bytes; and how many such blocks a
# thread takes at a time.
BLOCK_COLUMNS = 128
ROUNDED_BLOCKS = 16
# The largest fixed-point number is 127 * 256 + 127: both its bytes have a sign. The smallest scale is the smallest
# normal float, whose inverse is still finite.
LARGEST_FIXED_POINT = 32639
SMALLEST_SCALE = 2.0**-126


# ---------------------------------------------------------------------------------------------------------------------
# torch's operators
# ---------------------------------------------------------------------------------------------------------------------


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


def decode_rows(rows: torch.Tensor, decoded: torch.Tensor) -> int:
    """Write the codes of some rows times a number that makes decoding quick, and return that number.

    Args:
        rows: int8 `[rows, in]` or `[rows, in / 2]`.
        decoded: the output, float `[rows, in]`. Columns of int4 codes are written as all even ones, then all odd ones.
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
            products.append(multiply_new_rows(x, decoded).float().mul_(row_scale[:, 0]).to(x.dtype))
            continue
        # Even columns of all groups come first, then odd ones: a group has a part in each half.
        groups = decoded.view(len(rows), 2 if is_int4 else 1, num_groups, -1)
        groups.copy_(groups.float() * row_scale[:, None, :, None])
        products.append(multiply_new_rows(x, decoded))
    return torch.cat(products, dim=1)


@lru_cache
def unit_scales(*shape: int) -> torch.Tensor:
    """Scales of 1 for torch's operators, which would round ours to bfloat16; the second of two is a zero point."""
    scales = torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) == 3:
        scales[..., 1] = 0
    return scales


def multiply_int8(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """`x @ (code * scale)^T` by torch's int8 operator, bfloat16 `[rows, in]` -> float32 `[rows, out]`.

    `in` has to be a multiple of 32: in bfloat16 the operator is wrong otherwise, or crashes.
    """
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


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def multiplies_bytes(bits: int, num_rows: int) -> bool:
    """Whether codes are multiplied as bytes with this many rows of input."""
    return bits == 4 and num_rows == 1 and processor_has(*BYTES_FEATURES)


def plane_bytes(in_bytes: bool) -> int:
    """Bytes of a block of the input: 128 fixed-point numbers and, with bytes, 16 numbers of 32 bits."""
    return 2 * BLOCK_COLUMNS + (64 if in_bytes else 0)


def add_byte_products(program: Program, sums: Any, unsigned: Any, signed: Any) -> Any:
    """Add the products of 64 pairs of bytes, of which one has a sign, to 16 sums: four that are beside each other."""
    pair = [program.builder.bitcast(values, INTS) for values in (unsigned, signed)]
    return program.call("llvm.x86.avx512.vpdpbusd.512", INTS, sums, *pair)


class RoundingProgram(TasksProgram):
    """A function that rounds blocks of the input, float16 or bfloat16, to fixed point.

    The 128 numbers of a block are ordered as the codes of a weight come out of their bytes.

    With bytes, `256 * high + low` is a number: 128 high bytes come first, then 128 low ones, both from -128 to 127.
    As the processor wants bytes without sign from the other side, codes are multiplied as `code + 8`. What their sums
    have to begin with instead of 0, `-8 * sum(numbers)`, is behind the bytes.
    """

    features = FEW_ROWS_FEATURES

    def __init__(self, dtype: torch.dtype, bits: int, in_bytes: bool) -> None:
        self.dtype, self.bits, self.in_bytes = dtype, bits, in_bytes
        super().__init__(("next_block", "num_blocks", "x", "planes", "scales"), ROUNDED_BLOCKS, "num_blocks")

    def work(self, first: Any) -> None:
        stop = self.smaller(self.sum(first, ROUNDED_BLOCKS), self.arguments["num_blocks"])
        self.loop(first, stop, 1, [], self.round_block)

    def round_block(self, block: Any, _: list[Any]) -> list[Any]:
        builder = self.builder
        x, planes, scales = (self.arguments[name] for name in ("x", "planes", "scales"))
        ints, floats = self.vector(INT32, BLOCK_COLUMNS), self.vector(FLOAT, BLOCK_COLUMNS)
        smallest, not_a_number = self.constant(SMALLEST_SCALE, FLOAT), self.constant(float("nan"), FLOAT)
        numbers = self.load_floats(self.sum(x, (block, 2 * BLOCK_COLUMNS)), self.dtype, BLOCK_COLUMNS)
        # The bits of positive floats are ordered as the floats are, and those of infinity and NaN are the greatest.
        positive = builder.and_(builder.bitcast(numbers, ints), self.constant(0x7FFFFFFF, ints))
        largest = self.call(f"llvm.vector.reduce.umax.v{BLOCK_COLUMNS}i32", INT32, positive)
        is_finite = builder.icmp_unsigned("<", largest, self.constant(0x7F800000, INT32))
        scale = builder.fmul(builder.bitcast(largest, FLOAT), self.constant(1 / LARGEST_FIXED_POINT, FLOAT))
        scale = builder.select(builder.fcmp_ordered(">", scale, smallest), scale, smallest)
        factor = self.spread(builder.fdiv(self.constant(1.0, FLOAT), scale), BLOCK_COLUMNS)
        numbers = builder.fmul(numbers, factor)
        numbers = builder.select(self.spread(is_finite, BLOCK_COLUMNS), numbers, self.constant(0.0, floats))
        rounded = self.call(f"llvm.rint.v{BLOCK_COLUMNS}f32", floats, numbers)
        words = builder.trunc(builder.fptosi(rounded, ints), self.vector(INT16, BLOCK_COLUMNS))
        words = self.pick(words, plane_columns(self.bits, self.in_bytes))
        store = self.store_bytes if self.in_bytes else self.store
        store(words, self.sum(planes, (block, plane_bytes(self.in_bytes))))
        self.store(builder.select(is_finite, scale, not_a_number), self.sum(scales, (block, 4)))
        return []

    def store_bytes(self, words: Any, address: Any) -> None:
        builder, kind = self.builder, self.vector(INT8, BLOCK_COLUMNS)
        rounded = builder.add(words, self.constant(128, words.type))
        high = builder.trunc(builder.ashr(rounded, self.constant(8, words.type)), kind)
        low = builder.trunc(words, kind)
        sums = self.constant(0, INTS)
        for plane, values in enumerate((high, low)):
            self.store(values, self.sum(address, BLOCK_COLUMNS * plane))
            sums = builder.shl(sums, self.constant(8, INTS))
            for half in (range(64), range(64, 128)):
                sums = add_byte_products(self, sums, self.constant(1, BYTES), self.pick(values, half))
        self.store(builder.mul(sums, self.constant(-8, INTS)), self.sum(address, 2 * BLOCK_COLUMNS))


def plane_columns(bits: int, in_bytes: bool) -> list[int]:
    """The columns of a block in the order in which the kernels get a weight's codes: four vectors of 32 each.

    A 16-bit word of the weight has two int8 codes, the first one lower, or four int4 codes. Codes come from the same
    place of all words at once. A byte has two int4 codes, the first one higher.
    """
    if in_bytes:
        return [column + place for place in (0, 1) for column in range(0, BLOCK_COLUMNS, 2)]
    if bits == 8:
        return [half + 2 * word + place for half in (0, 64) for place in (0, 1) for word in range(32)]
    return [4 * word + column for column in (1, 0, 3, 2) for word in range(32)]


class ProductProgram(RowsProgram):
    """A function that multiplies quantized weights with an input in fixed point.

    Bytes behind the last column are masked: nothing is read that is not the weight's.

    Args:
        bits: 8 or 4.
        group_size: columns that share a scale, 32, 64 or 128; `None` for whole rows.
        dtype: of the output, float16 or bfloat16.
        scale_dtype: of the weight's scales.
        input_rows: rows of the input that are multiplied at a time.
        has_tail: whether the last block has fewer than 128 columns.
        in_bytes: whether codes and inputs are multiplied as bytes, of int4 codes.
    """

    features = FEW_ROWS_FEATURES
    own_arguments = ("weight_scale", "num_groups", "planes", "plane_scales", "num_blocks", "first_mask", "second_mask")

    def __init__(
        self,
        bits: int,
        group_size: int | None,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        input_rows: int,
        has_tail: bool,
        in_bytes: bool,
    ) -> None:
        self.bits, self.group_size, self.scale_dtype, self.has_tail = bits, group_size, scale_dtype, has_tail
        self.in_bytes = in_bytes
        self.block_bytes = BLOCK_COLUMNS * bits // 8
        super().__init__(self.own_arguments, dtype, input_rows, converts=bits == 4)

    def multiply_tile(self, rows: list[Any], input_rows: list[Any]) -> None:
        sums = [self.constant(0.0, FLOATS)] * (len(rows) * len(input_rows))
        num_blocks = self.sum(self.arguments["num_blocks"], -1 if self.has_tail else 0)

        def add_block(block: Any, sums: list[Any], is_last: bool = False) -> list[Any]:
            return self.add_block(rows, input_rows, block, sums, is_last)

        sums = self.loop(self.constant(0), num_blocks, 1, sums, add_block)
        if self.has_tail:
            sums = add_block(num_blocks, sums, is_last=True)
        pairs = [(row, input_row) for row in rows for input_row in input_rows]
        for (row, input_row), lanes in zip(pairs, sums):
            total = self.add_lanes(lanes)
            if self.group_size is None:
                total = self.builder.fmul(total, self.load_float(self.scale_address(row), self.scale_dtype))
            self.store_product(total, row, input_row)

    def add_block(
        self, rows: list[Any], input_rows: list[Any], block: Any, sums: list[Any], is_last: bool
    ) -> list[Any]:
        """Add the products of 128 columns to the sums, ordered by rows of the weight, then of the input."""
        builder = self.builder
        inputs = [self.load_inputs(row, block) for row in input_rows]
        changed: list[Any] = []
        for row in rows:
            codes = self.load_codes(row, block, is_last)
            group_scales = None
            if self.group_size is not None:
                group_scales = self.load_group_scales(row, block, self.group_size, is_last)
            for vectors, scale in inputs:
                products = self.multiply_codes(codes, vectors)
                scale = scale if group_scales is None else builder.fmul(scale, group_scales)
                total = sums[len(changed)]
                changed.append(self.multiply_add(builder.sitofp(products, FLOATS), scale, total))
        return changed

    def load_inputs(self, row: Any, block: Any) -> tuple[list[Any], Any]:
        """What `RoundingProgram` has written of 128 columns of a row of the input, and their scale."""
        place = self.sum((row, self.arguments["num_blocks"]), block)
        planes = self.sum(self.arguments["planes"], (place, plane_bytes(self.in_bytes)))
        kinds = [BYTES, BYTES, BYTES, BYTES, INTS] if self.in_bytes else [WORDS] * 4
        vectors = [self.load(self.sum(planes, 64 * number), kind) for number, kind in enumerate(kinds)]
        scale = self.load(self.sum(self.arguments["plane_scales"], (place, 4)), FLOAT)
        return vectors, self.spread(scale, FLOATS.count)

    def multiply_codes(self, codes: list[Any], vectors: list[Any]) -> Any:
        """16 sums of the products of 128 codes with 128 fixed-point numbers."""
        sums = self.constant(0, INTS)
        if not self.in_bytes:
            for code, vector in zip(codes, vectors):
                sums = self.add_products(sums, code, vector)
            return sums
        *planes, low_sums = vectors
        for code, high, low in zip(codes, planes[:2], planes[2:]):
            sums = add_byte_products(self, sums, code, high)
            low_sums = add_byte_products(self, low_sums, code, low)
        return self.builder.add(self.builder.shl(sums, self.constant(8, INTS)), low_sums)

    def add_products(self, sums: Any, words: Any, other_words: Any) -> Any:
        """Add the products of 32 pairs of 16-bit numbers to 16 sums; with VNNI it is one instruction, `vpdpwssd`."""
        if processor_has(*WIDE_FEATURES):
            products = self.call("llvm.x86.avx512.pmaddw.d.512", INTS, words, other_words)
            return self.builder.add(sums, products)
        halves = []
        for lanes in (range(16), range(16, 32)):
            one, other = self.pick(words, lanes), self.pick(other_words, lanes)
            halves.append(self.call("llvm.x86.avx2.pmadd.wd", self.vector(INT32, 8), one, other))
        return self.builder.add(sums, self.pick(halves[0], range(16), halves[1]))

    def load_codes(self, row: Any, block: Any, is_last: bool) -> list[Any]:
        """The codes of 128 columns in the order of `plane_columns`: four vectors of 16-bit numbers, or two of bytes."""
        arguments, builder = self.arguments, self.builder
        address = self.weight_address(row, (block, self.block_bytes))
        codes = []
        for start, mask in zip(range(0, self.block_bytes, 64), ("first_mask", "second_mask")):
            if is_last:
                is_weight = builder.bitcast(arguments[mask], self.vector(INT1, 64))
                where = (self.pointer(self.sum(address, start)), self.constant(1, INT32), is_weight)
                loaded = self.call("llvm.masked.load.v64i8.p0", BYTES, *where, self.constant(0, BYTES))
            else:
                loaded = self.load(self.sum(address, start), BYTES)
                self.prefetch_ahead(self.sum(address, start))
            codes += self.split_bytes(loaded) if self.in_bytes else self.split_words(loaded)
        return codes

    def split_words(self, loaded: Any) -> list[Any]:
        """The codes of 64 bytes as 16-bit numbers."""
        builder, words = self.builder, self.builder.bitcast(loaded, WORDS)
        codes = []
        # A code is moved to the top and back down again, which repeats its sign. The last is at the top already.
        for unused in range(16 - self.bits, -1, -self.bits):
            moved = builder.shl(words, self.constant(unused, WORDS)) if unused else words
            codes.append(builder.ashr(moved, self.constant(16 - self.bits, WORDS)))
        return codes

    def split_bytes(self, loaded: Any) -> list[Any]:
        """The int4 codes of 64 bytes plus 8, as bytes without sign: that flips the highest of their four bits."""
        builder = self.builder
        halves = (builder.lshr(loaded, self.constant(4, BYTES)), builder.and_(loaded, self.constant(15, BYTES)))
        return [builder.xor(half, self.constant(8, BYTES)) for half in halves]

    def scale_address(self, row: Any, group: Any = 0) -> Any:
        place = self.sum((row, self.arguments["num_groups"]), group)
        return self.sum(self.arguments["weight_scale"], (place, self.scale_dtype.itemsize))

    def load_group_scales(self, row: Any, block: Any, group_size: int, is_last: bool) -> Any:
        """The scales of 128 columns of int4 codes, in float32: one for each lane, which holds eight columns."""
        num_groups = BLOCK_COLUMNS // group_size
        first = self.sum((block, num_groups))
        if is_last:
            last = self.sum(self.arguments["num_groups"], -1)
            scales = self.undefined(self.vector(FLOAT, num_groups))
            for group in range(num_groups):
                address = self.scale_address(row, self.smaller(self.sum(first, group), last))
                scale = self.load_float(address, self.scale_dtype)
                scales = self.builder.insert_element(scales, scale, self.constant(group))
        else:
            scales = self.load_floats(self.scale_address(row, first), self.scale_dtype, num_groups)
        return self.pick(scales, [8 * lane // group_size for lane in range(FLOATS.count)])


def find_kernels(
    dtype: torch.dtype, weight: torch.Tensor, weight_scale: torch.Tensor, in_features: int, num_rows: int
) -> tuple[Kernel, Kernel] | None:
    """The kernels that round an input of some rows and multiply it with this weight, if there are any."""
    out_features, row_bytes = weight.shape
    bits = 8 if row_bytes == in_features else 4 if 2 * row_bytes == in_features else None
    if (
        bits is None
        or dtype not in HALF_DTYPES
        or weight.dtype != torch.int8
        or weight_scale.dtype not in FLOAT_DTYPES
    ):
        return None
    group_size = None
    if weight_scale.ndim > 1:
        group_size = in_features // weight_scale.shape[1]
        if bits == 8 or group_size not in (32, 64, 128) or group_size * weight_scale.shape[1] != in_features:
            return None
    is_here = weight.is_cpu and weight.is_contiguous() and weight_scale.is_cpu and weight_scale.is_contiguous()
    if not is_here or weight_scale.shape[0] != out_features:
        return None
    input_rows = min(num_rows, rows_at_a_time())
    has_tail, in_bytes = in_features % BLOCK_COLUMNS != 0, multiplies_bytes(bits, num_rows)
    rounding = compile_kernel(RoundingProgram, dtype, bits, in_bytes)
    product = compile_kernel(
        ProductProgram, bits, group_size, dtype, weight_scale.dtype, input_rows, has_tail, in_bytes
    )
    return None if rounding is None or product is None else (rounding, product)


def count_rounded_bytes(num_rows: int, in_features: int) -> tuple[int, int]:
    """Bytes that an input takes in fixed point, of any kind, and those of its scales, which are behind them."""
    num_blocks = num_rows * -(-in_features // BLOCK_COLUMNS)
    return num_blocks * plane_bytes(in_bytes=True), 4 * num_blocks


def make_steps(
    x: torch.Tensor,
    in_features: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    rounded: torch.Tensor,
    kernels: tuple[Kernel, Kernel],
) -> tuple[Step, Step, int]:
    """The steps that write `x @ (code * scale)^T + bias`, and how many tasks the last one has.

    Args:
        x: `[rows, columns]`, contiguous, with zeros behind the last column up to a whole block.
        in_features: columns of the weight.
        output: `[rows, out]`.
        rounded: uint8 with as many bytes as `count_rounded_bytes` says.
        kernels: what `find_kernels` found.
    """
    (num_rows, num_columns), (out_features, row_bytes) = x.shape, weight.shape
    num_blocks = num_columns // BLOCK_COLUMNS
    planes, (plane_size, _) = rounded.data_ptr(), count_rounded_bytes(num_rows, num_columns)
    blocks = (planes, planes + plane_size)
    rounding, product = kernels
    # One bit for each byte of the last block.
    mask = (1 << (row_bytes - (num_blocks - 1) * BLOCK_COLUMNS * row_bytes // in_features)) - 1
    scales = (weight_scale.data_ptr(), weight_scale.numel() // out_features)
    masks = (mask & (2**64 - 1), mask >> 64)
    multiplying, num_tasks = rows_step(product, num_rows, weight, bias, output, *scales, *blocks, num_blocks, *masks)
    return Step(rounding, num_rows * num_blocks, x.data_ptr(), *blocks), multiplying, num_tasks


def multiply_by_kernels(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernels: tuple[Kernel, Kernel],
) -> torch.Tensor:
    """`x @ (code * scale)^T + bias` by what `find_kernels` found, `[rows, in]` -> `[rows, out]`."""
    num_rows, in_features = x.shape
    x = (
        F.pad(x, (0, -in_features % BLOCK_COLUMNS)).contiguous()
        if in_features % BLOCK_COLUMNS != 0
        else x.contiguous()
    )
    # An allocation for the numbers and their scales takes less time than two.
    rounded = torch.empty(sum(count_rounded_bytes(num_rows, in_features)), dtype=torch.uint8, device="cpu")
    output = torch.empty((num_rows, weight.shape[0]), dtype=x.dtype, device="cpu")
    rounding, multiplying, num_tasks = make_steps(x, in_features, weight, weight_scale, bias, output, rounded, kernels)
    rounding.run(1)
    multiplying.run(num_tasks)
    return output


__all__ = [
    "BLOCK_COLUMNS",
    "can_pack_int4",
    "count_rounded_bytes",
    "find_kernels",
    "make_steps",
    "multiply_by_kernels",
    "multiply_int8",
    "multiply_many_rows",
    "multiply_packed_int4",
    "pack_group_scales",
    "pack_int4_for_cpu",
]
