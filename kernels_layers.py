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
"""How are norms and attention of a few tokens computed fast on a CPU?

What is unusual here:

- Torch computes an RMSNorm in five steps or more, each of which takes longer to begin than to compute for one token. Here
  it is one kernel, which reads the states as they are, computes in float32, and rounds once.
- Torch's attention (2.13) takes several times as long as reading the keys and values does where one token looks back.
  Here a kernel reads them once, as they are. Scores, probabilities and sums are float32.
- Kernels have no gradient and see no masks. Where either is asked for, and where programs are traced, compiled or
  exported, callers get `None` and compute by torch's operators, which are the same formulas.
"""

from collections.abc import Callable
from typing import Any

import torch

from .kernels_llvm import (
    FEW_ROWS_FEATURES,
    FLOATS,
    HALF_DTYPES,
    INT32,
    INTS,
    Program,
    Step,
    TasksProgram,
    can_run_kernels,
    compile_kernel,
    exchanged_lanes,
    has_kernels,
)


FLOAT_DTYPES = (*HALF_DTYPES, torch.float32)
# The lanes of the vectors that the kernels are written in.
LANES = 16
# Numbers that one thread norms faster than torch's threads do; 32 tokens of ChatGLM3-6B.
MOST_NORMED = 2**17
# Keys that all queries of a head are multiplied with before the next ones are read.
BLOCK_KEYS = 256


class NormProgram(TasksProgram):
    """A function that computes a norm of rows, `weight * x / sqrt(mean(x²) + epsilon)`.

    That is RMSNorm (https://arxiv.org/abs/1910.07467). LayerNorm (https://arxiv.org/abs/1607.06450) takes the mean off
    every `x` first, and adds a bias.

    Args:
        dtype: of the states.
        weight_dtype: of the weight, the bias and the output.
        epsilon: what is added to the mean of the squares.
        is_layer_norm: LayerNorm instead of RMSNorm.
    """

    features = FEW_ROWS_FEATURES
    names = ("next_row", "num_rows", "states", "weight", "bias", "output", "length")

    def __init__(
        self, dtype: torch.dtype, weight_dtype: torch.dtype, epsilon: float, is_layer_norm: bool = False
    ) -> None:
        self.dtype, self.weight_dtype, self.epsilon = dtype, weight_dtype, epsilon
        self.is_layer_norm = is_layer_norm
        super().__init__(self.names, 1, "num_rows")

    def work(self, row: Any) -> None:
        builder, arguments, length = self.builder, self.arguments, self.arguments["length"]
        start, nothing = self.sum((row, length)), self.constant(0)
        states = self.sum(arguments["states"], (start, self.dtype.itemsize))
        output = self.sum(arguments["output"], (start, self.weight_dtype.itemsize))

        def load(column: Any) -> Any:
            return self.load_floats(self.sum(states, (column, self.dtype.itemsize)), self.dtype, LANES)

        def mean_of(value: Callable[[Any], Any]) -> Any:
            def add(column: Any, sums: list[Any]) -> list[Any]:
                return [builder.fadd(sums[0], value(load(column)))]

            (lanes,) = self.loop(nothing, length, LANES, [self.constant(0.0, FLOATS)], add)
            return builder.fdiv(self.add_lanes(lanes), builder.sitofp(length, FLOATS.element))

        mean = self.spread(mean_of(lambda numbers: numbers), LANES) if self.is_layer_norm else None

        def center(numbers: Any) -> Any:
            return numbers if mean is None else builder.fsub(numbers, mean)

        variance = mean_of(lambda numbers: builder.fmul(center(numbers), center(numbers)))
        variance = builder.fadd(variance, self.constant(self.epsilon, variance.type))
        root = self.call("llvm.sqrt.f32", variance.type, variance)
        factor = self.spread(builder.fdiv(self.constant(1.0, root.type), root), LANES)

        def scale(column: Any, _: list[Any]) -> list[Any]:
            place = (column, self.weight_dtype.itemsize)
            weights = self.load_floats(self.sum(arguments["weight"], place), self.weight_dtype, LANES)
            normed = builder.fmul(builder.fmul(center(load(column)), factor), weights)
            if self.is_layer_norm:
                bias = self.load_floats(self.sum(arguments["bias"], place), self.weight_dtype, LANES)
                normed = builder.fadd(normed, bias)
            self.store_rounded(normed, self.sum(output, place), self.weight_dtype)
            return []

        self.loop(nothing, length, LANES, [], scale)


# Asked once: without kernels a token should cost no more than torch's operators.
HAS_KERNELS = has_kernels(NormProgram)


def find_addresses(*tensors: torch.Tensor) -> tuple[int, ...] | None:
    """Where tensors are in memory; those that `torch.vmap` makes are nowhere."""
    try:
        return tuple([tensor.data_ptr() for tensor in tensors])
    except RuntimeError:
        return None


def norm_rows(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor | None:
    """`weight * states / sqrt(mean(states²) + epsilon)` in float32, rounded once to the dtype of the weight.

    Args:
        states: `[..., length]`, any float dtype.
        weight: `[length]`.

    Returns:
        `[..., length]`, or `None` where no kernel computes it.
    """
    if torch.compiler.is_compiling() or not HAS_KERNELS or not can_run_kernels(states, weight):
        return None
    length = weight.shape[0]
    is_known = states.dtype in FLOAT_DTYPES and weight.dtype in FLOAT_DTYPES and states.shape[-1] == length
    if not is_known or length % LANES != 0 or not 0 < states.numel() <= MOST_NORMED:
        return None
    if not states.is_contiguous() or not weight.is_contiguous():
        return None
    kernel = compile_kernel(NormProgram, states.dtype, weight.dtype, epsilon)
    if kernel is None or (addresses := find_addresses(states, weight)) is None:
        return None
    output = torch.empty_like(states, dtype=weight.dtype)
    Step(kernel, states.numel() // length, *addresses, 0, output.data_ptr(), length).run(1)
    return output


def add_lanes_of_all(program: Program, vectors: list[Any]) -> Any:
    """The sums of the lanes of 16 vectors, as one vector."""
    for bit in (1, 2, 4, 8):
        kept, given = exchanged_lanes(bit)
        pairs = zip(vectors[0::2], vectors[1::2])
        vectors = [
            program.builder.fadd(program.pick(one, kept, other), program.pick(one, given, other))
            for one, other in pairs
        ]
    return vectors[0]


def exponential(program: Program, powers: Any) -> Any:
    """`exp` of 16 floats that are not greater than 0, to the last bit or two; with the polynomial of Cephes' `expf`."""

    def number(value: float) -> Any:
        return program.constant(value, FLOATS)

    builder, lowest = program.builder, number(-87.0)
    is_zero = builder.fcmp_ordered("<", powers, lowest)
    powers = builder.select(is_zero, lowest, powers)
    twos = program.call("llvm.rint.v16f32", FLOATS, builder.fmul(powers, number(1.44269504088896341)))
    # ln 2 in two parts, the first of which has few digits.
    rest = program.multiply_add(twos, number(-0.693359375), powers)
    rest = program.multiply_add(twos, number(2.12194440e-4), rest)
    total = number(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        total = program.multiply_add(total, rest, number(factor))
    exponent = builder.add(builder.fptosi(twos, INTS), program.constant(127, INTS))
    power_of_two = builder.bitcast(builder.shl(exponent, program.constant(23, INTS)), FLOATS)
    return builder.select(is_zero, number(0.0), builder.fmul(total, power_of_two))


class AttentionProgram(TasksProgram):
    """A function that computes attention of one token, `groups` queries for each head of keys and values.

    A thread takes a head at a time. It writes float32 scores, makes them probabilities, and sums the values. Keys and
    values are read once, some of them at a time, for all queries of the head.

    Args:
        dtype: of queries, keys, values and the output.
        head_dim: channels of a head.
        groups: queries of a head of keys.
        scaling: what scores are multiplied with.
    """

    features = FEW_ROWS_FEATURES
    # A row of `memory` has room for the scores of `num_places` keys, whole vectors, and for the sums of a head.
    names = (
        "next_head", "num_heads", "num_keys", "num_places", "memory", "queries", "output",
        "keys", "key_head_bytes", "key_bytes", "values", "value_head_bytes", "value_bytes",
    )  # fmt: skip

    def __init__(self, dtype: torch.dtype, head_dim: int, groups: int, scaling: float) -> None:
        self.dtype, self.head_dim, self.groups, self.scaling = dtype, head_dim, groups, scaling
        # Queries and channels that are computed at a time. Queries behind the last one are the last one again.
        self.tile_queries = {1: 1, 2: 2}.get(groups, 4)
        self.tile_channels = next(channels for channels in (64, 32, LANES) if head_dim % channels == 0)
        super().__init__(self.names, 1, "num_heads")

    def work(self, head: Any) -> None:
        nothing, num_places = self.constant(0), self.arguments["num_places"]
        groups, tile_queries = self.constant(self.groups), self.tile_queries

        def for_tiles(work: Callable[[Any, list[Any], Any, Any], None]) -> None:
            """Call it with the head, some queries, and the first and the last but one of some keys, for all of them."""

            def take_keys(first: Any, _: list[Any]) -> list[Any]:
                stop = self.smaller(self.sum(first, BLOCK_KEYS), num_places)

                def take_queries(query: Any, _: list[Any]) -> list[Any]:
                    last = self.constant(self.groups - 1)
                    queries = [self.smaller(self.sum(query, step), last) for step in range(tile_queries)]
                    work(head, [self.sum((head, self.groups), query) for query in queries], first, stop)
                    return []

                return self.loop(nothing, groups, tile_queries, [], take_queries)

            self.loop(nothing, num_places, BLOCK_KEYS, [], take_keys)

        def for_queries(work: Callable[[Any], list[Any]]) -> None:
            self.loop(nothing, groups, 1, [], lambda query, _: work(self.sum((head, self.groups), query)))

        for_tiles(self.score_keys)
        for_queries(self.make_probabilities)
        for_tiles(self.add_values)
        for_queries(self.round_sums)

    def memory_address(self, query: Any, place: Any, offset: Any = 0) -> Any:
        row = (query, self.sum(self.arguments["num_places"], self.head_dim))
        return self.sum(self.arguments["memory"], (self.sum(row, place, offset), 4))

    def sums_address(self, query: Any, channel: Any) -> Any:
        return self.memory_address(query, self.arguments["num_places"], channel)

    def load_states(self, address: Any, channel: Any) -> Any:
        """Some channels of a query, a key or a value."""
        return self.load_floats(self.sum(address, (channel, self.dtype.itemsize)), self.dtype, LANES)

    def score_keys(self, head: Any, queries: list[Any], first: Any, stop: Any) -> None:
        """Write the scaled products of queries and keys, and minus infinity into the places behind the last key."""
        arguments, query_bytes = self.arguments, self.head_dim * self.dtype.itemsize
        addresses = [self.sum(arguments["queries"], (query, query_bytes)) for query in queries]
        tile_keys = LANES // len(queries)

        def score(key: Any, _: list[Any]) -> list[Any]:
            scores = self.multiply_tile(head, key, addresses)
            for number, query in enumerate(queries):
                lanes = range(number * tile_keys, (number + 1) * tile_keys)
                self.store(self.pick(scores, lanes), self.memory_address(query, key))
            return []

        self.loop(first, stop, tile_keys, [], score)

    def multiply_tile(self, head: Any, key: Any, queries: list[Any]) -> Any:
        """16 scores: of some keys from one on, for one query after the other."""
        arguments, num_keys = self.arguments, LANES // len(queries)
        keys = self.sum(arguments["keys"], (head, arguments["key_head_bytes"]))
        last_key = self.sum(arguments["num_keys"], -1)
        numbers = [self.smaller(self.sum(key, step), last_key) for step in range(num_keys)]
        rows = [self.sum(keys, (number, arguments["key_bytes"])) for number in numbers]

        def add_channels(channel: Any, sums: list[Any]) -> list[Any]:
            states = [self.load_states(row, channel) for row in rows]
            own_states = [self.load_states(query, channel) for query in queries]
            pairs = [(own, state) for own in own_states for state in states]
            return [self.multiply_add(own, state, total) for (own, state), total in zip(pairs, sums)]

        sums = [self.constant(0.0, FLOATS)] * LANES
        sums = self.loop(self.constant(0), self.constant(self.head_dim), LANES, sums, add_channels)
        scores = self.builder.fmul(add_lanes_of_all(self, sums), self.constant(self.scaling, FLOATS))
        num_left = self.builder.trunc(self.builder.sub(arguments["num_keys"], key), INT32)
        steps = self.lanes([lane % num_keys for lane in range(LANES)])
        is_key = self.builder.icmp_signed("<", steps, self.spread(num_left, LANES))
        return self.builder.select(is_key, scores, self.constant(float("-inf"), FLOATS))

    def make_probabilities(self, query: Any) -> list[Any]:
        """Turn the scores of a query into probabilities, and set its sums to zero."""
        builder, nothing, num_places = self.builder, self.constant(0), self.arguments["num_places"]

        def greater(one: Any, other: Any) -> Any:
            return self.call(f"llvm.maximum.v{one.type.count}f32", one.type, one, other)

        def find_largest(place: Any, values: list[Any]) -> list[Any]:
            return [greater(values[0], self.load(self.memory_address(query, place), FLOATS))]

        (largest,) = self.loop(nothing, num_places, LANES, [self.constant(float("-inf"), FLOATS)], find_largest)
        for bit in (1, 2, 4, 8):
            largest = greater(largest, self.pick(largest, [lane ^ bit for lane in range(LANES)]))

        def add_powers(place: Any, values: list[Any]) -> list[Any]:
            address = self.memory_address(query, place)
            power = exponential(self, builder.fsub(self.load(address, FLOATS), largest))
            self.store(power, address)
            return [builder.fadd(values[0], power)]

        (powers,) = self.loop(nothing, num_places, LANES, [self.constant(0.0, FLOATS)], add_powers)
        total = self.add_lanes(powers)
        factor = self.spread(builder.fdiv(self.constant(1.0, total.type), total), LANES)

        def scale(place: Any, _: list[Any]) -> list[Any]:
            address = self.memory_address(query, place)
            self.store(builder.fmul(self.load(address, FLOATS), factor), address)
            return []

        self.loop(nothing, num_places, LANES, [], scale)
        for channel in range(0, self.head_dim, LANES):
            self.store(self.constant(0.0, FLOATS), self.sums_address(query, channel))
        return []

    def add_values(self, head: Any, queries: list[Any], first: Any, stop: Any) -> None:
        """Add some values, each times its probability, to the sums of some queries."""
        arguments, steps = self.arguments, range(0, self.tile_channels, LANES)
        values = self.sum(arguments["values"], (head, arguments["value_head_bytes"]))
        stop = self.smaller(stop, arguments["num_keys"])

        def take_channels(channel: Any, _: list[Any]) -> list[Any]:
            def add_value(key: Any, sums: list[Any]) -> list[Any]:
                row = self.sum(values, (key, arguments["value_bytes"]))
                states = [self.load_states(row, self.sum(channel, step)) for step in steps]
                places = [self.memory_address(query, key) for query in queries]
                probabilities = [self.spread(self.load_float(place, torch.float32), LANES) for place in places]
                pairs = [(one, state) for one in probabilities for state in states]
                return [self.multiply_add(one, state, total) for (one, state), total in zip(pairs, sums)]

            places = [self.sums_address(query, self.sum(channel, step)) for query in queries for step in steps]
            sums = self.loop(first, stop, 1, [self.load(place, FLOATS) for place in places], add_value)
            for place, total in zip(places, sums):
                self.store(total, place)
            return []

        self.loop(self.constant(0), self.constant(self.head_dim), self.tile_channels, [], take_channels)

    def round_sums(self, query: Any) -> list[Any]:
        """Write the sums of a query as its output."""
        for channel in range(0, self.head_dim, LANES):
            place = self.sum((query, self.head_dim), channel)
            address = self.sum(self.arguments["output"], (place, self.dtype.itemsize))
            self.store_rounded(self.load(self.sums_address(query, channel), FLOATS), address, self.dtype)
        return []


def head_distance(states: torch.Tensor) -> int | None:
    """How far the heads of `[batch, heads, keys, head_dim]` are from each other, if that is equally far for all."""
    batch_stride, head_stride, _, channel_stride = states.stride()
    is_even = states.shape[0] == 1 or batch_stride == head_stride * states.shape[1]
    return head_stride * states.itemsize if is_even and channel_stride == 1 else None


def count_places(num_keys: int) -> int:
    """Places that scores of so many keys take: whole vectors."""
    return -(-num_keys // LANES) * LANES


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor | None:
    """Attention of one token that sees all keys: `softmax(scaling * query @ key^T) @ value`, rounded once.

    Args:
        query: `[batch, heads, 1, head_dim]`.
        key, value: `[batch, kv_heads, keys, head_dim]`, of the same dtype.
        scaling: what scores are multiplied with.

    Returns:
        `[batch, 1, heads * head_dim]`, or `None` where no kernel computes it.
    """
    if torch.compiler.is_compiling() or not HAS_KERNELS or not can_run_kernels(query, key):
        return None
    dtype, (batch_size, num_heads, num_queries, head_dim) = query.dtype, query.shape
    if num_queries != 1 or dtype not in FLOAT_DTYPES or head_dim % LANES != 0:
        return None
    is_known = key.dtype == value.dtype == dtype and key.shape == value.shape and value.is_cpu and key.numel() > 0
    if (
        not is_known
        or (key_distance := head_distance(key)) is None
        or (value_distance := head_distance(value)) is None
    ):
        return None
    _, num_key_heads, num_keys, _ = key.shape
    kernel = compile_kernel(AttentionProgram, dtype, head_dim, num_heads // num_key_heads, scaling)
    if kernel is None or (addresses := find_addresses(query, key, value)) is None:
        return None
    num_places, num_tasks = count_places(num_keys), batch_size * num_key_heads
    memory = torch.empty((batch_size * num_heads, num_places + head_dim), dtype=torch.float32, device="cpu")
    # Of one sequence this is no copy.
    query = query.reshape(batch_size, 1, num_heads * head_dim).contiguous()
    output = torch.empty_like(query)
    keys = (addresses[1], key_distance, key.stride(2) * key.itemsize)
    values = (addresses[2], value_distance, value.stride(2) * value.itemsize)
    places = (memory.data_ptr(), query.data_ptr(), output.data_ptr())
    Step(kernel, num_tasks, num_keys, num_places, *places, *keys, *values).run(num_tasks)
    return output


__all__ = [
    "LANES",
    "AttentionProgram",
    "NormProgram",
    "attend",
    "count_places",
    "exponential",
    "find_addresses",
    "norm_rows",
]
