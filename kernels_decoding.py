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
"""What stands between the products of one more token on a CPU, rotations, activations and sums, and how all run in a row.

What is unusual here:

- Torch's operators for these take far longer to begin than to compute, as does all that Python does between them: a
  weight that was just read has pushed their code and data out of the processor's caches.
- So each is a program of a few tasks, which runs in a row with the products, all by one call, in threads that wait for
  each other in between. Numbers are float32 inside, and rounded where torch's operators round.
"""

import ctypes
from array import array
from typing import Any

import torch

from .kernels_layers import LANES, exponential
from .kernels_llvm import (
    FEW_ROWS_FEATURES,
    FLOATS,
    INT32,
    INT64,
    INTS,
    VOID,
    Kernel,
    Program,
    Step,
    TasksProgram,
    compile_kernel,
    count_threads,
    load_function,
    run_in_threads,
)


# Numbers that a thread takes at a time.
TASK_COLUMNS = 1024
# Distances of two channels of a pair that fit vectors.
PAIR_DISTANCES_INSIDE = (1, 2, 4, 8)
# How often a thread looks for others before it lets something else run, some 30 µs.
MOST_LOOKS = 2000


class ColumnsProgram(TasksProgram):
    """A function that computes rows of numbers, 16 columns at a time, which all have to fit.

    Args:
        arguments: names of what follows the common arguments.
        dtype: of what it reads and writes, if that is the same.
    """

    features = FEW_ROWS_FEATURES
    common_arguments = ("next_column", "num_columns", "num_rows")

    def __init__(self, arguments: tuple[str, ...], dtype: torch.dtype) -> None:
        self.dtype = dtype
        super().__init__((*self.common_arguments, *arguments), TASK_COLUMNS, "num_columns")

    def work(self, first: Any) -> None:
        stop = self.smaller(self.sum(first, TASK_COLUMNS), self.arguments["num_columns"])

        def take_row(row: Any, _: list[Any]) -> list[Any]:
            def take_columns(column: Any, _: list[Any]) -> list[Any]:
                self.compute(row, column)
                return []

            return self.loop(first, stop, LANES, [], take_columns)

        self.loop(self.constant(0), self.arguments["num_rows"], 1, [], take_row)

    def place(self, name: str, row: Any, column: Any, itemsize: int) -> Any:
        number = self.sum((row, self.arguments["num_columns"]), column)
        return self.sum(self.arguments[name], (number, itemsize))

    def load_row(self, name: str, row: Any, column: Any) -> Any:
        return self.load_floats(self.place(name, row, column, self.dtype.itemsize), self.dtype, LANES)

    def compute(self, row: Any, column: Any) -> None:
        """Write 16 columns of a row."""
        raise NotImplementedError


class ConvertingProgram(ColumnsProgram):
    """A function that writes 16-bit floats as float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(("x", "output"), dtype)

    def compute(self, row: Any, column: Any) -> None:
        self.store(self.load_row("x", row, column), self.place("output", row, column, 4))


class AddingProgram(ColumnsProgram):
    """A function that computes `output = states + scale * residual`."""

    def __init__(self, dtype: torch.dtype, scale: float) -> None:
        self.scale = scale
        super().__init__(("states", "residual", "output"), dtype)

    def compute(self, row: Any, column: Any) -> None:
        states, residual = (self.load_row(name, row, column) for name in ("states", "residual"))
        total = self.multiply_add(residual, self.constant(self.scale, FLOATS), states)
        self.store_rounded(total, self.place("output", row, column, self.dtype.itemsize), self.dtype)


class ActivatingProgram(ColumnsProgram):
    """A function that computes SiLU, or GELU by its formula with tanh, of `[rows, columns]`.

    `x * sigmoid(x)` is SiLU (https://arxiv.org/abs/1702.03118). As `1 + tanh(z) = 2 sigmoid(2 z)`, GELU
    (https://arxiv.org/abs/1606.08415) is `x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x³))`.

    Args:
        dtype: of the states and the output.
        is_gelu: GELU instead of SiLU.
        is_gated: the first half of `[rows, 2 * columns]` is activated, and multiplied with the second.
    """

    def __init__(self, dtype: torch.dtype, is_gelu: bool, is_gated: bool) -> None:
        self.is_gelu, self.is_gated = is_gelu, is_gated
        super().__init__(("states", "output"), dtype)

    def compute(self, row: Any, column: Any) -> None:
        if self.is_gated:
            gate, states = (self.load_row("states", self.sum((row, 2), half), column) for half in (0, 1))
            # Torch rounds between the two.
            activated = self.builder.fmul(self.round_floats(self.activate(gate), self.dtype), states)
        else:
            activated = self.activate(self.load_row("states", row, column))
        self.store_rounded(activated, self.place("output", row, column, self.dtype.itemsize), self.dtype)

    def activate(self, x: Any) -> Any:
        builder = self.builder
        power = x
        if self.is_gelu:
            cube = builder.fmul(builder.fmul(x, x), x)
            power = self.multiply_add(cube, self.constant(0.044715, FLOATS), x)
            power = builder.fmul(power, self.constant(1.5957691216057308, FLOATS))
        is_positive = builder.fcmp_ordered(">=", power, self.constant(0.0, FLOATS))
        negative = builder.or_(builder.bitcast(power, INTS), self.constant(-(2**31), INTS))
        power = exponential(self, builder.bitcast(negative, FLOATS))
        one = self.constant(1.0, FLOATS)
        sigmoid = builder.fdiv(builder.select(is_positive, one, power), builder.fadd(one, power))
        return builder.fmul(x, sigmoid)


def turns_pairs(head_dim: int, pair_distance: int) -> bool:
    """Whether a [`TurningProgram`] is there for heads with pairs of channels so far from each other."""
    is_across = pair_distance % LANES == 0 and head_dim % (2 * pair_distance) == 0
    return head_dim % LANES == 0 and (pair_distance in PAIR_DISTANCES_INSIDE or is_across)


class TurningProgram(TasksProgram):
    """A function that turns queries and keys of one token by its position, and writes keys and values into the cache.

    Args:
        dtype: of the states and the tables.
        head_dim: channels of a head.
        num_heads, num_key_heads: heads of queries, and of keys and of values.
        is_interleaved: query, key and value of a head are beside each other; otherwise all queries come first.
        pair_distance: how far apart the channels of a pair are.
    """

    features = FEW_ROWS_FEATURES
    # The tables of two rows are `table_bytes` apart, those of `spread_rotary_tables`: none, if they have the same.
    names = (
        "next_row", "num_rows", "qkv", "own", "partner", "table_bytes", "queries",
        "keys", "key_row_bytes", "key_head_bytes", "values", "value_row_bytes", "value_head_bytes",
    )  # fmt: skip

    def __init__(
        self,
        dtype: torch.dtype,
        head_dim: int,
        num_heads: int,
        num_key_heads: int,
        is_interleaved: bool,
        pair_distance: int,
    ) -> None:
        self.dtype, self.head_dim, self.pair_distance = dtype, head_dim, pair_distance
        self.num_heads, self.num_key_heads, self.is_interleaved = num_heads, num_key_heads, is_interleaved
        super().__init__(self.names, 1, "num_rows")

    def work(self, row: Any) -> None:
        arguments, head_bytes = self.arguments, self.head_dim * self.dtype.itemsize
        qkv = self.sum(arguments["qkv"], (row, (self.num_heads + 2 * self.num_key_heads) * head_bytes))
        tables = [self.sum(arguments[name], (row, arguments["table_bytes"])) for name in ("own", "partner")]
        # Where the first head of each kind is, in heads.
        firsts = (0, 1, 2) if self.is_interleaved else (0, self.num_heads, self.num_heads + self.num_key_heads)
        distance = (3 if self.is_interleaved else 1) * head_bytes

        def for_heads(kind: int, target: Any, target_distance: Any, is_turned: bool) -> None:
            def take(head: Any, _: list[Any]) -> list[Any]:
                source = self.sum(qkv, firsts[kind] * head_bytes, (head, distance))
                self.write_head(source, self.sum(target, (head, target_distance)), tables if is_turned else None)
                return []

            num_heads = self.num_key_heads if kind else self.num_heads
            self.loop(self.constant(0), self.constant(num_heads), 1, [], take)

        for_heads(0, self.sum(arguments["queries"], (row, self.num_heads * head_bytes)), head_bytes, True)
        for kind, name in ((1, "key"), (2, "value")):
            target = self.sum(arguments[f"{name}s"], (row, arguments[f"{name}_row_bytes"]))
            for_heads(kind, target, arguments[f"{name}_head_bytes"], kind == 1)

    def write_head(self, source: Any, target: Any, tables: list[Any] | None) -> None:
        """Write a head as it is, or turned."""

        def load(address: Any, channel: int) -> Any:
            return self.load_floats(self.sum(address, channel * self.dtype.itemsize), self.dtype, LANES)

        for channel in range(0, self.head_dim, LANES):
            states = load(source, channel)
            if tables is not None:
                if self.pair_distance < LANES:
                    partners = self.pick(states, [lane ^ self.pair_distance for lane in range(LANES)])
                else:
                    is_second = channel // self.pair_distance % 2
                    partners = load(source, channel + (-self.pair_distance if is_second else self.pair_distance))
                own, partner = (load(table, channel) for table in tables)
                # Torch rounds between the two.
                turned = self.round_floats(self.builder.fmul(states, own), self.dtype)
                states = self.multiply_add(partners, partner, turned)
            self.store_rounded(states, self.sum(target, channel * self.dtype.itemsize), self.dtype)


class SequenceProgram(Program):
    """A function that runs many [`TasksProgram`]s in the same threads, each when all threads are done with the one before.

    Its argument is the address of 64-bit integers: how many programs there are, the address of a number that counts the
    threads that are done with one, 0 at first, and for each program the addresses of its code and of its own argument,
    where what counts its tasks is set back.

    OpenMP's own barrier puts threads to sleep at once where there are more of them than processors, as where a model
    answers in another thread than it was loaded in. To wake them a few hundred times a token takes a tenth of its time.

    Args:
        get_num_threads: the address of `omp_get_num_threads()`.
        give_way: the address of `sched_yield()`.
    """

    def __init__(self, get_num_threads: int, give_way: int) -> None:
        super().__init__(1)
        builder, (table,) = self.builder, self.function.args
        self.give_way, self.arrived = give_way, self.load(self.sum(table, 8), INT64)
        num_threads = builder.zext(self.call_address(get_num_threads, INT32), INT64)

        def run(number: Any, arrivals: list[Any]) -> list[Any]:
            place = self.sum(table, 16, (number, 16))
            argument = self.load(self.sum(place, 8), INT64)
            self.call_address(self.load(place, INT64), VOID, argument)
            arrivals = [self.sum(arrivals[0], num_threads)]
            self.wait_for(arrivals[0])
            self.store(self.constant(0), argument)
            return arrivals

        self.loop(self.constant(0), self.load(table, INT64), 1, [self.constant(0)], run)
        builder.ret_void()

    def wait_for(self, arrivals: Any) -> None:
        """Count this thread, and wait until so many were counted; after a while, let other threads run meanwhile."""
        builder, arrived = self.builder, self.pointer(self.arrived)
        builder.atomic_rmw("add", arrived, self.constant(1), "acq_rel")
        before = builder.block
        look, pause, yield_, done = (self.function.append_basic_block() for _ in range(4))
        builder.branch(look)
        builder.position_at_end(look)
        looks = builder.phi(INT64)
        looks.add_incoming(self.constant(0), before)
        found = builder.load_atomic(arrived, "acquire", 8, typ=INT64)
        builder.cbranch(builder.icmp_signed(">=", found, arrivals), done, pause)
        builder.position_at_end(pause)
        self.call("llvm.x86.sse2.pause", VOID)
        more = self.sum(looks, 1)
        looks.add_incoming(more, pause)
        builder.cbranch(builder.icmp_signed("<", more, self.constant(MOST_LOOKS)), look, yield_)
        builder.position_at_end(yield_)
        self.call_address(self.give_way, INT32)
        looks.add_incoming(more, yield_)
        builder.branch(look)
        builder.position_at_end(done)


class Steps:
    """Steps that are run one after the other, all by one call, in as many threads as torch has."""

    def __init__(self, kernel: Kernel, steps: list[Step]) -> None:
        self.kernel, self.steps = kernel, steps
        self.arrived = array("Q", [0])
        addresses = [(step.kernel.address, step.arguments.buffer_info()[0]) for step in steps]
        places = (address for pair in addresses for address in pair)
        self.table = array("Q", (len(steps), self.arrived.buffer_info()[0], *places))

    def run(self) -> None:
        self.arrived[0] = 0
        run_in_threads(self.kernel, self.table, count_threads(torch.get_num_threads()))


def join_steps(steps: list[Step]) -> Steps | None:
    """Steps in a row, where kernels can tell how many threads OpenMP has given them."""
    functions = load_function("omp_get_num_threads"), load_function("sched_yield", library=None)
    if None in functions:
        return None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    kernel = compile_kernel(SequenceProgram, *addresses)
    return None if kernel is None else Steps(kernel, steps)


__all__ = [
    "ActivatingProgram",
    "AddingProgram",
    "ConvertingProgram",
    "Steps",
    "TurningProgram",
    "join_steps",
    "turns_pairs",
]
