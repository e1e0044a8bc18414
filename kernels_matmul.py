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
"""Products with many rows of input on a CPU that multiplies pairs of bfloat16.

What is unusual here:

- The weight is float16, or the published bytes of int8 and int4 codes. A thread takes 32 of its rows, decodes some
  columns of them into bfloat16, in the order in which they are multiplied, and multiplies them with the whole input
  while they are in the processor's cache. No more of the weight is ever decoded. While the last rows of the input are
  multiplied, memory is asked for what the thread decodes next.
- The input is rounded to bfloat16 and put in order once. Sums are float32; the scale of a row is applied to them, the
  bias is added, and the result is rounded once. Torch's own products of bfloat16 round their result to bfloat16.
"""

from collections.abc import Callable
from typing import Any

import torch

from .kernels_llvm import (
    BFLOATS,
    FLOATS,
    HALF_DTYPES,
    INT16,
    INT32,
    INTS,
    NO_BIAS_ADDRESS,
    WIDE_FEATURES,
    WORDS,
    Kernel,
    Program,
    Step,
    TasksProgram,
    can_add_bias,
    compile_kernel,
    count_threads,
    exchanged_lanes,
)


PROCESSOR_FEATURES = (*WIDE_FEATURES, "avx512bf16")
# Rows of the weight that a thread takes at a time: two vectors of 16.
PANEL_ROWS = 32
# Rows of the input that are multiplied at a time. With the sums of 12 the registers are full. The last tiles are of 8:
# of both, tiles are made for any number of rows.
WIDE_TILE_ROWS, TILE_ROWS = 12, 8
# Rows of the input that are put in order at a time, in tiles of either kind.
PACKED_ROWS = 4
# Columns that are decoded at a time: 128 KiB of bfloat16, which stay in the second cache.
PANEL_COLUMNS = 2048
# Columns of the input that are put in order in one step: 16 pairs.
STEP_COLUMNS = 32
# Of eight int4 codes in 32 bits, a shift brings two that are so many columns from each other to the lowest bits of each
# 16. They become a pair.
INT4_PAIR_DISTANCE = 4
# The float32 that has a byte as its lowest bits, minus this, is what the byte is minus 128.
BYTE_FLOAT_BITS, BYTE_FLOAT = 0x4B000000, 2.0**23 + 128
LINE_BYTES = 64
# Bytes of the input that are put in order at a time: they stay in the third cache while all of the weight passes by.
INPUT_BYTES = 2**23


def count_line_columns(bits: int | None) -> int:
    """Columns of a row of the weight that are decoded in one step, as 64 bytes come from memory together."""
    return 8 * LINE_BYTES // (bits or 16)


def split_rows(num_rows: int) -> tuple[int, int]:
    """How many wide and how many other tiles an input of so many rows has.

    The tiles have fewer than 4 rows more than the input, or fewer than 8 if it has up to 20.
    """
    fours = -(-num_rows // 4)
    for num_tiles in (2, 3, 4):
        num_wide, rest = divmod(fours - 2 * num_tiles, 3)
        if num_wide >= 0 and rest == 0:
            return num_wide, num_tiles
    return 0, -(-num_rows // TILE_ROWS)


def load_pairs(program: Program, address: Any, dtype: torch.dtype) -> Any:
    """16 pairs of 16-bit floats as pairs of bfloat16."""
    if dtype == torch.bfloat16:
        return program.load(address, INTS)
    floats = program.load_floats(address, dtype, STEP_COLUMNS)
    first, last = program.pick(floats, range(16)), program.pick(floats, range(16, 32))
    pairs = program.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", BFLOATS, last, first)
    return program.builder.bitcast(pairs, INTS)


def transpose(program: Program, vectors: list[Any]) -> list[Any]:
    """16 vectors of 16 pairs, of rows, as vectors of columns. Of 4 vectors, each four lanes are exchanged so."""
    bit = 1
    while bit < len(vectors):
        # Vectors whose numbers differ in one bit exchange the lanes whose numbers differ in it.
        kept, given = exchanged_lanes(bit)
        exchanged = list(vectors)
        for number in range(len(vectors)):
            if not number & bit:
                one, other = vectors[number], vectors[number | bit]
                exchanged[number] = program.pick(one, kept, other)
                exchanged[number | bit] = program.pick(one, given, other)
        vectors, bit = exchanged, 2 * bit
    return vectors


class PackingProgram(TasksProgram):
    """A function that rounds the input to bfloat16, in tiles of some rows: `[tiles, in / 2, tile rows, 2]`.

    The wide tiles come first. Rows behind the last one are the last one again.

    Args:
        dtype: of the input, float16 or bfloat16.
        pair_distance: of every twice as many columns, column i and column i + pair_distance are a pair.
    """

    features = PROCESSOR_FEATURES

    def __init__(self, dtype: torch.dtype, pair_distance: int) -> None:
        self.dtype, self.pair_distance = dtype, pair_distance
        super().__init__(
            ("next_tile", "num_tiles", "num_wide", "x", "num_rows", "in_features", "packed"), 1, "num_tiles"
        )

    def work(self, tile: Any) -> None:
        arguments, builder = self.arguments, self.builder
        is_wide = builder.icmp_signed("<", tile, arguments["num_wide"])
        tile_rows = builder.select(is_wide, self.constant(WIDE_TILE_ROWS), self.constant(TILE_ROWS))
        wide_rows = self.sum((self.smaller(tile, arguments["num_wide"]), WIDE_TILE_ROWS - TILE_ROWS))
        first_row = self.sum((tile, TILE_ROWS), wide_rows)
        target = self.sum(arguments["packed"], (first_row, self.sum((arguments["in_features"], 2))))

        def pack(row: Any, _: list[Any]) -> list[Any]:
            self.pack_rows(self.sum(first_row, row), self.sum(target, (row, 4)), tile_rows)
            return []

        self.loop(self.constant(0), tile_rows, PACKED_ROWS, [], pack)

    def pack_rows(self, first_row: Any, target: Any, tile_rows: Any) -> None:
        """Write four rows to their places in a tile."""
        arguments = self.arguments
        last_row = self.sum(arguments["num_rows"], -1)
        rows = [self.smaller(self.sum(first_row, step), last_row) for step in range(PACKED_ROWS)]
        addresses = [self.sum(arguments["x"], (self.sum((row, arguments["in_features"])), 2)) for row in rows]

        def pack(column: Any, _: list[Any]) -> list[Any]:
            pairs = [self.load_ordered_pairs(self.sum(address, (column, 2))) for address in addresses]
            first_pair = self.builder.lshr(column, self.constant(1))
            for step, vector in enumerate(transpose(self, pairs)):
                for start in range(0, FLOATS.count, PACKED_ROWS):
                    place = self.sum((self.sum(first_pair, start + step), tile_rows))
                    self.store(self.pick(vector, range(start, start + PACKED_ROWS)), self.sum(target, (place, 4)))
            return []

        self.loop(self.constant(0), arguments["in_features"], STEP_COLUMNS, [], pack)

    def load_ordered_pairs(self, address: Any) -> Any:
        pairs, distance = load_pairs(self, address, self.dtype), self.pair_distance
        if distance == 1:
            return pairs
        columns = range(0, STEP_COLUMNS, 2 * distance)
        order = [start + column + part for start in columns for column in range(distance) for part in (0, distance)]
        return self.builder.bitcast(self.pick(self.builder.bitcast(pairs, WORDS), order), INTS)


MATMUL_ARGUMENTS = (
    "next_row", "out_features", "next_thread", "memory", "memory_bytes", "weight", "row_bytes", "weight_scale",
    "num_groups", "packed", "rows_in_tiles", "rows_in_wide_tiles", "in_features", "output", "num_rows", "bias",
    "bias_step",
)  # fmt: skip


class MatmulProgram(TasksProgram):
    """A function that multiplies a weight with an input that a [`PackingProgram`] has put in order.

    `x @ weight^T + bias`, where `weight` is `code * scale` if there are codes. The scale of a whole row is applied to the
    sum, that of a group to its codes.

    A thread has memory of its own: the rows of the weight that it has decoded, `[PANEL_COLUMNS / 2, 32, 2]` in bfloat16,
    in pairs as those of the input, and their sums, `[rows, 32]` in float32.

    Args:
        bits: 8 or 4 for codes, `None` for float16.
        group_size: columns of int4 codes that share a scale; `None` for whole rows.
        scale_dtype: of the weight's scales, if any.
        dtype: of the bias and the output, float16 or bfloat16.
    """

    features = PROCESSOR_FEATURES

    def __init__(
        self, bits: int | None, group_size: int | None, scale_dtype: torch.dtype | None, dtype: torch.dtype
    ) -> None:
        self.bits, self.group_size, self.scale_dtype, self.dtype = bits, group_size, scale_dtype, dtype
        self.line_columns = count_line_columns(bits)
        super().__init__(MATMUL_ARGUMENTS, PANEL_ROWS, "out_features")

    def begin(self) -> None:
        next_thread = self.pointer(self.sum(self.function.args[0], 8 * 2))
        thread = self.builder.atomic_rmw("add", next_thread, self.constant(1), "monotonic")
        self.panel = self.sum(self.arguments["memory"], (thread, self.arguments["memory_bytes"]))
        self.sums = self.sum(self.panel, 2 * PANEL_ROWS * PANEL_COLUMNS)

    def work(self, first_row: Any) -> Any:
        arguments, next_row = self.arguments, self.take()
        # The last rows are multiplied a second time, if need be, so that there are always 32.
        last_row = self.sum(arguments["out_features"], -PANEL_ROWS)
        row, row_behind = self.smaller(first_row, last_row), self.smaller(next_row, last_row)

        def clear(number: Any, _: list[Any]) -> list[Any]:
            self.store(self.constant(0.0, FLOATS), self.sum(self.sums, (number, 64)))
            return []

        def multiply(start: Any, _: list[Any]) -> list[Any]:
            stop = self.smaller(self.sum(start, PANEL_COLUMNS), arguments["in_features"])
            self.loop(start, stop, self.line_columns, [], lambda column, _: self.decode_columns(row, start, column))
            self.multiply_tiles(row, row_behind, start, stop)
            return []

        self.loop(self.constant(0), self.sum((arguments["rows_in_tiles"], 2)), 1, [], clear)
        self.loop(self.constant(0), arguments["in_features"], PANEL_COLUMNS, [], multiply)
        self.loop(self.constant(0), arguments["num_rows"], 1, [], lambda input_row, _: self.finish(row, input_row))
        return next_row

    def decode_columns(self, row: Any, start: Any, column: Any) -> list[Any]:
        """Write 64 bytes of 32 rows of the weight into the panel, which starts with another column.

        Codes change places before they are decoded, as they are half or a quarter of what they become.
        """
        arguments = self.arguments
        for half in (0, 1):
            first_row = self.sum(row, 16 * half)
            address = self.weight_address(first_row, column)
            addresses = [self.sum(address, (arguments["row_bytes"], step)) for step in range(16)]
            if self.bits is None:
                pairs = transpose(self, [load_pairs(self, address, torch.float16) for address in addresses])
            else:
                columns = transpose(self, [self.load(address, INTS) for address in addresses])
                pairs = [pair for codes in columns for pair in self.decode(codes)]
            if self.group_size is not None and self.scale_dtype is not None:
                pairs = self.scale_pairs(pairs, first_row, column, self.group_size, self.scale_dtype)
            for number, pair in enumerate(pairs):
                place = self.sum(self.panel, (column, 2 * PANEL_ROWS), (start, -2 * PANEL_ROWS))
                self.store(pair, self.sum(place, 4 * PANEL_ROWS * number + 64 * half))
        return []

    def decode(self, codes: Any) -> list[Any]:
        """The codes in 32 bits of each row as pairs of bfloat16."""
        return self.decode_bytes(codes) if self.bits == 8 else self.decode_nibbles(codes)

    def decode_bytes(self, codes: Any) -> list[Any]:
        """Two pairs, of four int8 codes."""
        builder, floats = self.builder, []
        codes = builder.xor(codes, self.constant(-0x7F7F7F80, INTS))  # the codes plus 128
        for place in (0, 8, 16, 24):
            byte = builder.and_(builder.lshr(codes, self.constant(place, INTS)), self.constant(255, INTS))
            bits = builder.or_(byte, self.constant(BYTE_FLOAT_BITS, INTS))
            floats.append(builder.fsub(builder.bitcast(bits, FLOATS), self.constant(BYTE_FLOAT, FLOATS)))
        return [self.join_pair(*floats[:2]), self.join_pair(*floats[2:])]

    def join_pair(self, *floats: Any) -> Any:
        """A pair of float32 that are bfloat16 already."""
        builder = self.builder
        first, last = (builder.bitcast(number, INTS) for number in floats)
        high_bits = builder.and_(last, self.constant(-(2**16), INTS))
        return builder.or_(builder.lshr(first, self.constant(16, INTS)), high_bits)

    def decode_nibbles(self, codes: Any) -> list[Any]:
        """Four pairs, of eight int4 codes, which are looked up by five bits: the highest of them is another code's."""
        builder = self.builder
        values = torch.tensor([*range(8), *range(-8, 0)] * 2).bfloat16().view(torch.int16)
        table = self.lanes(values.tolist(), INT16)
        pairs = []
        for place in (4, 0, 12, 8):  # the first of the two codes in a byte has the high bits
            words = builder.bitcast(builder.lshr(codes, self.constant(place, INTS)), WORDS)
            pairs.append(builder.bitcast(self.call("llvm.x86.avx512.permvar.hi.512", WORDS, table, words), INTS))
        return pairs

    def scale_pairs(self, pairs: list[Any], row: Any, column: Any, group_size: int, dtype: torch.dtype) -> list[Any]:
        """Pairs of 16 rows times the scales of their groups, rounded to bfloat16."""
        builder, scales, scaled = self.builder, None, []
        for number, pair in enumerate(pairs):
            if number % (group_size // 2) == 0:
                group = builder.udiv(self.sum(column, 2 * number), self.constant(group_size))
                scales = self.load_scales(row, group, dtype)
            high_bits = builder.and_(pair, self.constant(-(2**16), INTS))
            parts = (builder.shl(pair, self.constant(16, INTS)), high_bits)
            first, last = (builder.fmul(builder.bitcast(part, FLOATS), scales) for part in parts)
            rounded = self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", BFLOATS, last, first)
            order = [lane + part for lane in range(16) for part in (0, 16)]
            scaled.append(builder.bitcast(self.pick(builder.bitcast(rounded, WORDS), order), INTS))
        return scaled

    def load_scales(self, row: Any, group: Any, dtype: torch.dtype) -> Any:
        """The scales of 16 rows in one group, as float32."""
        arguments, scales = self.arguments, self.undefined(FLOATS)
        for step in range(FLOATS.count):
            place = self.sum((self.sum(row, step), arguments["num_groups"]), group)
            scale = self.load_float(self.sum(arguments["weight_scale"], (place, dtype.itemsize)), dtype)
            scales = self.builder.insert_element(scales, scale, self.constant(step, INT32))
        return scales

    def multiply_tiles(self, row: Any, row_behind: Any, start: Any, stop: Any) -> None:
        """Multiply the panel with the whole input, and with the last tiles ask for what this thread decodes next.

        That are the columns of these rows that begin where the panel stops, or the first ones of the rows behind them.
        """
        builder, arguments = self.builder, self.arguments
        num_pairs = builder.lshr(builder.sub(stop, start), self.constant(1))
        rows, wide_rows = arguments["rows_in_tiles"], arguments["rows_in_wide_tiles"]
        is_last = builder.icmp_signed(">=", stop, arguments["in_features"])
        row, start_behind = builder.select(is_last, row_behind, row), builder.select(is_last, self.constant(0), stop)
        panel_behind = self.weight_address(row, start_behind)
        num_columns = self.smaller(builder.sub(arguments["in_features"], start_behind), self.constant(PANEL_COLUMNS))
        # Of all rows; and how many for a pair and a row of the last tiles, times 2^16.
        num_lines = builder.udiv(self.sum((num_columns, PANEL_ROWS)), self.constant(self.line_columns))
        num_steps = builder.mul(builder.sub(rows, wide_rows), num_pairs)
        lines_per_step = builder.udiv(builder.shl(num_lines, self.constant(16)), num_steps)

        def prefetch(step: Any) -> None:
            line = builder.lshr(builder.mul(step, lines_per_step), self.constant(16))
            line_row = builder.urem(line, self.constant(PANEL_ROWS))
            place = builder.udiv(line, self.constant(PANEL_ROWS))
            self.prefetch(self.sum(panel_behind, (line_row, arguments["row_bytes"]), (place, LINE_BYTES)))

        def multiply_wide(first_row: Any, _: list[Any]) -> list[Any]:
            return self.multiply_tile(WIDE_TILE_ROWS, first_row, start, num_pairs)

        def multiply(first_row: Any, _: list[Any]) -> list[Any]:
            first_step = builder.mul(builder.sub(first_row, wide_rows), num_pairs)
            return self.multiply_tile(
                TILE_ROWS, first_row, start, num_pairs, lambda pair: prefetch(self.sum(first_step, (pair, TILE_ROWS)))
            )

        self.loop(self.constant(0), wide_rows, WIDE_TILE_ROWS, [], multiply_wide)
        self.loop(wide_rows, rows, TILE_ROWS, [], multiply)

    def weight_address(self, row: Any, column: Any) -> Any:
        num_bytes = self.builder.lshr(self.builder.mul(column, self.constant(self.bits or 16)), self.constant(3))
        return self.sum(self.arguments["weight"], (row, self.arguments["row_bytes"]), num_bytes)

    def multiply_tile(
        self,
        tile_rows: int,
        first_row: Any,
        start: Any,
        num_pairs: Any,
        prefetch: Callable[[Any], None] = lambda pair: None,
    ) -> list[Any]:
        """Add the products of the panel and of the rows of a tile of the input to their sums."""
        builder, arguments = self.builder, self.arguments
        sums_address = self.sum(self.sums, (first_row, 4 * PANEL_ROWS))
        packed = self.sum(
            arguments["packed"], (first_row, self.sum((arguments["in_features"], 2))), (start, 2 * tile_rows)
        )

        def multiply_pairs(pair: Any, sums: list[Any]) -> list[Any]:
            prefetch(pair)
            panel = self.sum(self.panel, (pair, 4 * PANEL_ROWS))
            weights = [self.load(self.sum(panel, 64 * half), BFLOATS) for half in (0, 1)]
            changed: list[Any] = []
            for row in range(tile_rows):
                inputs = self.load(self.sum(packed, (pair, 4 * tile_rows), 4 * row), INT32)
                inputs = builder.bitcast(self.spread(inputs, INTS.count), BFLOATS)
                for weight in weights:
                    total = sums[len(changed)]
                    changed.append(self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, weight, inputs))
            return changed

        places = [self.sum(sums_address, 64 * number) for number in range(2 * tile_rows)]
        sums = [self.load(place, FLOATS) for place in places]
        sums = self.loop(self.constant(0), num_pairs, 1, sums, multiply_pairs)
        for place, total in zip(places, sums):
            self.store(total, place)
        return []

    def finish(self, row: Any, input_row: Any) -> list[Any]:
        """Write the products of 32 rows of the weight and one row of the input."""
        arguments, builder = self.arguments, self.builder
        for half in (0, 1):
            first = self.sum(row, 16 * half)
            total = self.load(self.sum(self.sums, (input_row, 4 * PANEL_ROWS), 64 * half), FLOATS)
            if self.scale_dtype is not None and self.group_size is None:
                address = self.sum(arguments["weight_scale"], (first, self.scale_dtype.itemsize))
                total = builder.fmul(total, self.load_floats(address, self.scale_dtype, FLOATS.count))
            bias = self.sum(arguments["bias"], (first, arguments["bias_step"]))
            total = builder.fadd(total, self.load_floats(bias, self.dtype, FLOATS.count))
            place = self.sum((input_row, arguments["out_features"]), first)
            self.store_rounded(total, self.sum(arguments["output"], (place, 2)), self.dtype)
        return []


def find_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[Kernel, Kernel] | None:
    """The kernels that put an input `[rows, in]` in order and multiply it with this weight, if there are any.

    Args:
        weight: float16 `[out, in]`, or int8 `[out, in]` or `[out, in / 2]`.
        weight_scale: `[out]` or `[out, in / group_size]` for codes.
    """
    in_features, out_features = x.shape[1], weight.shape[0]
    if out_features < PANEL_ROWS or x.numel() == 0 or x.dtype not in HALF_DTYPES:
        return None
    tensors = [tensor for tensor in (weight, weight_scale) if tensor is not None]
    if not x.is_cpu or not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return None
    bits = group_size = scale_dtype = None
    if weight_scale is None:
        if weight.dtype != torch.float16 or x.dtype != torch.float16 or weight.shape[1] != in_features:
            return None
    else:
        bits, scale_dtype = {in_features: 8, in_features // 2: 4}.get(weight.shape[1]), weight_scale.dtype
        if weight_scale.ndim == 2:
            group_size = in_features // weight_scale.shape[1] if weight_scale.shape[1] else 0
        shape = (out_features,) if group_size is None else (out_features, in_features // max(1, group_size))
        is_known = weight.dtype == torch.int8 and scale_dtype in (*HALF_DTYPES, torch.float32)
        if bits is None or not is_known or weight_scale.shape != shape or group_size not in (None, 32, 64, 128):
            return None
        if group_size is not None and in_features % group_size != 0:
            return None
    if in_features % count_line_columns(bits) != 0 or not can_add_bias(bias, x, weight):
        return None
    packing = compile_kernel(PackingProgram, x.dtype, INT4_PAIR_DISTANCE if bits == 4 else 1)
    product = compile_kernel(MatmulProgram, bits, group_size, scale_dtype, x.dtype)
    return None if packing is None or product is None else (packing, product)


def multiply_matrices(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernels: tuple[Kernel, Kernel],
) -> torch.Tensor:
    """`x @ weight^T + bias` by what `find_matmul` found, `[rows, in]` -> `[rows, out]`."""
    packing, product = kernels
    in_features, out_features = x.shape[1], weight.shape[0]
    output = x.new_empty((len(x), out_features))
    num_threads = count_threads(-(-out_features // PANEL_ROWS))
    scales = (0, 0) if weight_scale is None else (weight_scale.data_ptr(), weight_scale.numel() // out_features)
    own_bias = (NO_BIAS_ADDRESS, 0) if bias is None else (bias.data_ptr(), 2)
    part_rows = -(-len(x) // -(-2 * x.numel() // INPUT_BYTES))
    for rows, target in zip(x.contiguous().split(part_rows), output.split(part_rows)):
        num_wide, num_others = split_rows(len(rows))
        wide_rows = num_wide * WIDE_TILE_ROWS
        rows_in_tiles, num_tiles = wide_rows + num_others * TILE_ROWS, num_wide + num_others
        packed = x.new_empty((rows_in_tiles, in_features), dtype=torch.bfloat16)
        inputs = (rows.data_ptr(), len(rows), in_features, packed.data_ptr())
        Step(packing, num_tiles, num_wide, *inputs).run(num_tiles)
        memory_bytes = 2 * PANEL_ROWS * PANEL_COLUMNS + 4 * PANEL_ROWS * rows_in_tiles
        memory = torch.empty((num_threads, memory_bytes), dtype=torch.uint8, device="cpu")
        own_memory = (0, memory.data_ptr(), memory_bytes)
        weights = (weight.data_ptr(), weight.nbytes // out_features, *scales)
        tiles = (packed.data_ptr(), rows_in_tiles, wide_rows, in_features)
        outputs = (target.data_ptr(), len(rows), *own_bias)
        Step(product, out_features, *own_memory, *weights, *tiles, *outputs).run(-(-out_features // PANEL_ROWS))
    return output


def multiply_new_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x @ rows^T` by torch, `[n, in]` and `[m, in]` -> `[n, m]`, of rows of a weight that it has just converted or decoded.

    Each thread should read the rows that it has written itself, as those of others come slowly.
    """
    # In float32 threads split the rows of the first matrix: 1/4 to 2/3 of the time for few rows of input (2.13).
    return (rows @ x.t()).t() if x.dtype == torch.float32 else x @ rows.t()


__all__ = ["find_matmul", "multiply_matrices", "multiply_new_rows"]
