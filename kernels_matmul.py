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
  while they are in the processor's cache. No more of the weight is ever decoded.
- The input is rounded to bfloat16 and put in order once. Sums are float32; the scale of a row is applied to them, the
  bias is added, and the result is rounded once. Torch's own products of bfloat16 round their result to bfloat16.
"""

from typing import Any

import torch

from .kernels_llvm import (
    BFLOATS,
    FLOATS,
    HALF,
    HALF_DTYPES,
    INT8,
    INT16,
    INT32,
    INTS,
    NO_BIAS_ADDRESS,
    WIDE_FEATURES,
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
# Rows of the input that are multiplied at a time. With the sums of 12 the registers are full; up to 16 rows are two
# tiles of 8.
TILE_ROWS = 12
FEW_TILE_ROWS = 8
# Columns that are decoded at a time: 128 KiB of bfloat16, which stay in the second cache.
PANEL_COLUMNS = 2048
# Columns of a row that are decoded in one step: 16 pairs.
STEP_COLUMNS = 32
# Bytes of the input that are put in order at a time: they stay in the third cache while all of the weight passes by.
INPUT_BYTES = 2**23


def choose_tile_rows(num_rows: int) -> int:
    """Rows of a tile for an input of so many rows."""
    return FEW_TILE_ROWS if num_rows <= 2 * FEW_TILE_ROWS else TILE_ROWS


def load_pairs(program: Program, address: Any, dtype: torch.dtype) -> Any:
    """16 pairs of 16-bit floats as pairs of bfloat16."""
    if dtype == torch.bfloat16:
        return program.load(address, INTS)
    floats = program.load_floats(address, dtype, STEP_COLUMNS)
    first, last = program.pick(floats, range(16)), program.pick(floats, range(16, 32))
    pairs = program.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", BFLOATS, last, first)
    return program.builder.bitcast(pairs, INTS)


def transpose(program: Program, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 pairs, of rows, as vectors of columns."""
    for bit in (1, 2, 4, 8):
        # Vectors whose numbers differ in one bit exchange the lanes whose numbers differ in it.
        kept, given = exchanged_lanes(bit)
        exchanged = list(rows)
        for number in range(16):
            if not number & bit:
                one, other = rows[number], rows[number | bit]
                exchanged[number] = program.pick(one, kept, other)
                exchanged[number | bit] = program.pick(one, given, other)
        rows = exchanged
    return rows


class PackingProgram(TasksProgram):
    """A function that rounds the input to bfloat16, in tiles of some rows: `[tiles, in / 2, tile_rows, 2]`.

    Rows behind the last one are the last one again.
    """

    features = PROCESSOR_FEATURES

    def __init__(self, dtype: torch.dtype, tile_rows: int) -> None:
        self.dtype, self.tile_rows = dtype, tile_rows
        super().__init__(("next_tile", "num_tiles", "x", "num_rows", "in_features", "packed"), 1, "num_tiles")

    def work(self, tile: Any) -> None:
        arguments = self.arguments
        last_row = self.sum(arguments["num_rows"], -1)
        rows = [self.smaller(self.sum((tile, self.tile_rows), step), last_row) for step in range(self.tile_rows)]
        rows = [self.sum(arguments["x"], (self.sum((row, arguments["in_features"])), 2)) for row in rows]
        target = self.sum(arguments["packed"], (self.sum((tile, arguments["in_features"])), 2 * self.tile_rows))

        def pack(column: Any, _: list[Any]) -> list[Any]:
            pairs = [load_pairs(self, self.sum(row, (column, 2)), self.dtype) for row in rows]
            pairs += [self.constant(0, INTS)] * (16 - self.tile_rows)
            for number, vector in enumerate(transpose(self, pairs)):
                place = self.sum(target, (column, 2 * self.tile_rows), 4 * self.tile_rows * number)
                self.store(self.pick(vector, range(self.tile_rows)), place)
            return []

        self.loop(self.constant(0), arguments["in_features"], STEP_COLUMNS, [], pack)


MATMUL_ARGUMENTS = (
    "next_row", "out_features", "next_thread", "memory", "memory_bytes", "weight", "row_bytes", "weight_scale",
    "num_groups", "packed", "num_tiles", "in_features", "output", "num_rows", "bias", "bias_step",
)  # fmt: skip


class MatmulProgram(TasksProgram):
    """A function that multiplies a weight with an input that a [`PackingProgram`] has put in order.

    A thread has memory of its own: the rows of the weight that it has decoded, `[PANEL_COLUMNS / 2, 32, 2]` in bfloat16,
    and their sums, `[rows, 32]` in float32.

    Args:
        bits: 8 or 4 for codes, `None` for float16.
        group_size: columns of int4 codes that share a scale; `None` for whole rows.
        scale_dtype: of the weight's scales, if any.
        dtype: of the bias and the output, float16 or bfloat16.
        tile_rows: rows of the input that are multiplied at a time.
    """

    features = PROCESSOR_FEATURES

    def __init__(
        self,
        bits: int | None,
        group_size: int | None,
        scale_dtype: torch.dtype | None,
        dtype: torch.dtype,
        tile_rows: int,
    ) -> None:
        self.bits, self.group_size, self.scale_dtype, self.dtype = bits, group_size, scale_dtype, dtype
        self.tile_rows = tile_rows
        super().__init__(MATMUL_ARGUMENTS, PANEL_ROWS, "out_features")

    def begin(self) -> None:
        next_thread = self.pointer(self.sum(self.function.args[0], 8 * 2))
        thread = self.builder.atomic_rmw("add", next_thread, self.constant(1), "monotonic")
        self.panel = self.sum(self.arguments["memory"], (thread, self.arguments["memory_bytes"]))
        self.sums = self.sum(self.panel, 2 * PANEL_ROWS * PANEL_COLUMNS)

    def work(self, row: Any) -> None:
        arguments = self.arguments
        # The last rows are multiplied a second time, if need be, so that there are always 32.
        row = self.smaller(row, self.sum(arguments["out_features"], -PANEL_ROWS))

        def clear(number: Any, _: list[Any]) -> list[Any]:
            self.store(self.constant(0.0, FLOATS), self.sum(self.sums, (number, 64)))
            return []

        def multiply(start: Any, _: list[Any]) -> list[Any]:
            stop = self.smaller(self.sum(start, PANEL_COLUMNS), arguments["in_features"])
            self.loop(start, stop, STEP_COLUMNS, [], lambda column, _: self.decode_columns(row, start, column))
            num_pairs = self.builder.lshr(self.sum(stop, (start, -1)), self.constant(1))
            tiles = arguments["num_tiles"]
            self.loop(self.constant(0), tiles, 1, [], lambda tile, _: self.multiply_tile(tile, start, num_pairs))
            return []

        self.loop(self.constant(0), self.sum((arguments["num_tiles"], 2 * self.tile_rows)), 1, [], clear)
        self.loop(self.constant(0), arguments["in_features"], PANEL_COLUMNS, [], multiply)
        self.loop(self.constant(0), arguments["num_rows"], 1, [], lambda input_row, _: self.finish(row, input_row))

    def decode_columns(self, row: Any, start: Any, column: Any) -> list[Any]:
        """Write 32 columns of 32 rows of the weight into the panel, which starts with another column."""
        for half in (0, 1):
            pairs = [self.decode(self.sum(row, 16 * half + step), column) for step in range(16)]
            for number, vector in enumerate(transpose(self, pairs)):
                place = self.sum(self.panel, (column, 2 * PANEL_ROWS), (start, -2 * PANEL_ROWS))
                self.store(vector, self.sum(place, 4 * PANEL_ROWS * number + 64 * half))
        return []

    def decode(self, row: Any, column: Any) -> Any:
        """32 columns of a row of the weight, as 16 pairs of bfloat16."""
        builder = self.builder
        address = self.sum(self.arguments["weight"], (row, self.arguments["row_bytes"]))
        if self.bits is None:
            return load_pairs(self, self.sum(address, (column, 2)), torch.float16)
        # A pair of codes is 16 bits or 8: moved to the top and back down again, each repeats its sign.
        if self.bits == 8:
            pairs = builder.sext(self.load(self.sum(address, column), self.vector(INT16, 16)), INTS)
            unused = (24, 16)
        else:
            half = builder.lshr(column, self.constant(1))
            pairs = builder.sext(self.load(self.sum(address, half), self.vector(INT8, 16)), INTS)
            unused = (24, 28)  # the first of two int4 codes has the high bits
        moved = [builder.shl(pairs, self.constant(bits, INTS)) for bits in unused]
        codes = [builder.ashr(bits, self.constant(32 - self.bits, INTS)) for bits in moved]
        first, last = (builder.sitofp(code, FLOATS) for code in codes)
        if self.group_size is None or self.scale_dtype is None:
            # Codes are bfloat16 as they are: the first 16 bits of a float32.
            high = builder.and_(builder.bitcast(last, INTS), self.constant(-(2**16), INTS))
            return builder.or_(builder.lshr(builder.bitcast(first, INTS), self.constant(16, INTS)), high)
        group = builder.udiv(column, self.constant(self.group_size))
        place = self.sum((row, self.arguments["num_groups"]), group)
        scale = self.load_float(
            self.sum(self.arguments["weight_scale"], (place, self.scale_dtype.itemsize)), self.scale_dtype
        )
        scales = self.spread(scale, FLOATS.count)
        low, high = (self.round_to_bfloats(builder.fmul(codes, scales)) for codes in (first, last))
        words = self.vector(INT16, 16)
        low, high = (builder.zext(builder.bitcast(bits, words), INTS) for bits in (low, high))
        return builder.or_(low, builder.shl(high, self.constant(16, INTS)))

    def round_to_bfloats(self, floats: Any) -> Any:
        return self.call("llvm.x86.avx512bf16.cvtneps2bf16.512", self.vector(BFLOATS.element, 16), floats)

    def multiply_tile(self, tile: Any, start: Any, num_pairs: Any) -> list[Any]:
        """Add the products of the panel and of the rows of a tile of the input to their sums."""
        builder = self.builder
        sums_address = self.sum(self.sums, (tile, 4 * PANEL_ROWS * self.tile_rows))
        packed = self.sum((tile, self.arguments["in_features"]), start)
        packed = self.sum(self.arguments["packed"], (packed, 2 * self.tile_rows))

        def multiply_pairs(pair: Any, sums: list[Any]) -> list[Any]:
            panel = self.sum(self.panel, (pair, 4 * PANEL_ROWS))
            weights = [self.load(self.sum(panel, 64 * half), BFLOATS) for half in (0, 1)]
            changed: list[Any] = []
            for row in range(self.tile_rows):
                inputs = self.load(self.sum(packed, (pair, 4 * self.tile_rows), 4 * row), INT32)
                inputs = builder.bitcast(self.spread(inputs, INTS.count), BFLOATS)
                for weight in weights:
                    total = sums[len(changed)]
                    changed.append(self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, weight, inputs))
            return changed

        places = [self.sum(sums_address, 64 * number) for number in range(2 * self.tile_rows)]
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
            is_half = self.dtype == torch.float16
            rounded = builder.fptrunc(total, self.vector(HALF, 16)) if is_half else self.round_to_bfloats(total)
            place = self.sum((input_row, arguments["out_features"]), first)
            self.store(rounded, self.sum(arguments["output"], (place, 2)))
        return []


def find_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[Kernel, Kernel] | None:
    """The kernels that put an input `[rows, in]` in order and multiply it with this weight, if there are any.

    Args:
        weight: float16 `[out, in]`, or int8 `[out, in]` or `[out, in / 2]`.
        weight_scale: `[out]` or `[out, in / group_size]` for codes.
    """
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    if in_features % STEP_COLUMNS != 0 or out_features < PANEL_ROWS or num_rows == 0 or x.dtype not in HALF_DTYPES:
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
    if not can_add_bias(bias, x, weight):
        return None
    tile_rows = choose_tile_rows(num_rows)
    packing = compile_kernel(PackingProgram, x.dtype, tile_rows)
    product = compile_kernel(MatmulProgram, bits, group_size, scale_dtype, x.dtype, tile_rows)
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
    tile_rows = choose_tile_rows(len(x))
    in_features, out_features = x.shape[1], weight.shape[0]
    output = x.new_empty((len(x), out_features))
    num_threads = count_threads(-(-out_features // PANEL_ROWS))
    scales = (0, 0) if weight_scale is None else (weight_scale.data_ptr(), weight_scale.numel() // out_features)
    own_bias = (NO_BIAS_ADDRESS, 0) if bias is None else (bias.data_ptr(), 2)
    num_parts = -(-2 * x.numel() // INPUT_BYTES)
    part_rows = -(-len(x) // (num_parts * tile_rows)) * tile_rows
    for rows, target in zip(x.contiguous().split(part_rows), output.split(part_rows)):
        num_tiles = -(-len(rows) // tile_rows)
        packed = x.new_empty((num_tiles, in_features, tile_rows), dtype=torch.bfloat16)
        Step(packing, num_tiles, rows.data_ptr(), len(rows), in_features, packed.data_ptr()).run(num_tiles)
        memory_bytes = 2 * PANEL_ROWS * PANEL_COLUMNS + 4 * PANEL_ROWS * tile_rows * num_tiles
        memory = torch.empty((num_threads, memory_bytes), dtype=torch.uint8, device="cpu")
        own_memory = (0, memory.data_ptr(), memory_bytes)
        weights = (weight.data_ptr(), weight.nbytes // out_features, *scales)
        inputs = (packed.data_ptr(), num_tiles, in_features)
        outputs = (target.data_ptr(), len(rows), *own_bias)
        Step(product, out_features, *own_memory, *weights, *inputs, *outputs).run(-(-out_features // PANEL_ROWS))
    return output


def multiply_new_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x @ rows^T` by torch, `[n, in]` and `[m, in]` -> `[n, m]`, of rows of a weight that it has just converted or decoded.

    Each thread should read the rows that it has written itself, as those of others come slowly.
    """
    # In float32 threads split the rows of the first matrix: 1/4 to 2/3 of the time for few rows of input (2.13).
    return (rows @ x.t()).t() if x.dtype == torch.float32 else x @ rows.t()


__all__ = ["find_matmul", "multiply_matrices", "multiply_new_rows"]
