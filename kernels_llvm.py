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
"""How a kernel for this processor is written, compiled, and run in torch's threads.

What is unusual here:

- Where llvmlite is installed (numba brings it), kernels are written in LLVM's intermediate code and compiled when they
  are first needed, in about a tenth of a second, without a compiler or files.
- They run in torch's own OpenMP threads, through the OpenMP library that torch has loaded.
"""

import ctypes
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from transformers.utils import logging


try:
    from llvmlite import binding as llvm
    from llvmlite import ir
except (ImportError, OSError):  # not installed, or its library does not load
    llvm = ir = None

logger = logging.get_logger(__name__)

ModuleClass = TypeVar("ModuleClass", bound=torch.nn.Module)
HALF_DTYPES = (torch.float16, torch.bfloat16)
# Tensors of other classes, such as those that torch traces with, have no memory that a kernel could read.
PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
CPU = torch.device("cpu")

# Rows of the weight, and at most of the input, that are multiplied at a time. More would not fit into the registers.
WEIGHT_ROWS = 4
INPUT_ROWS = 4
# How far ahead of what is multiplied a row of the weight is asked for, in bytes.
PREFETCH_BYTES = 2048
# The same two, measured on a Zen 4 processor, for one row of input, whose kernels wait for memory alone: of weights
# that are multiplied as they are, or converted first.
PLAIN_STREAMS = (4, 1024)
CONVERTED_STREAMS = (8, 1536)
# Rows of the weight that a thread takes at a time: within these bounds, so many that each takes some four times.
LEAST_TASK_ROWS, MOST_TASK_ROWS = 32, 128
TASKS_PER_THREAD = 4
TASK_ROWS_STEP = 8
# Whose functions are those of the OpenMP library that it has loaded.
TORCH_LIBRARY = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
# What kernels for a few rows need of a processor.
FEW_ROWS_FEATURES = ("avx2", "fma", "f16c")
# Processors that have these have 32 registers of 64 bytes; others that kernels are for have 16 of 32 bytes.
WIDE_FEATURES = ("avx512f", "avx512bw", "avx512dq", "avx512vl")


# ---------------------------------------------------------------------------------------------------------------------
# How it is written
# ---------------------------------------------------------------------------------------------------------------------


if ir is not None:
    INT1, INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
    FLOAT, HALF, POINTER, VOID = ir.FloatType(), ir.HalfType(), ir.PointerType(), ir.VoidType()

    class BFloatType(ir.Type):
        """bfloat16, which llvmlite has no type for (0.45 to 0.50)."""

        def _to_string(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, BFloatType)

        def __hash__(self) -> int:
            return hash(BFloatType)

    # One vector register.
    BYTES, WORDS, INTS, FLOATS = (
        ir.VectorType(kind, lanes) for kind, lanes in ((INT8, 64), (INT16, 32), (INT32, 16), (FLOAT, 16))
    )
    BFLOATS = ir.VectorType(BFloatType(), 32)
else:
    INT1 = INT8 = INT16 = INT32 = INT64 = FLOAT = HALF = POINTER = VOID = None
    BYTES = WORDS = INTS = FLOATS = BFLOATS = None


class Program:
    """A function of LLVM while it is written. Its arguments are 64-bit integers, and so are addresses.

    Nothing here optimizes: LLVM's code generator, which runs afterwards, is enough for straight loops.
    """

    # What it needs of the processor, by LLVM's names.
    features: tuple[str, ...] = ()

    def __init__(self, num_arguments: int) -> None:
        self.module = ir.Module()
        self.function = ir.Function(self.module, ir.FunctionType(VOID, [INT64] * num_arguments), "run")
        self.builder = ir.IRBuilder(self.function.append_basic_block())

    def constant(self, value: float, kind: Any = None) -> Any:
        """A number, the same in every lane if `kind` is a vector. Addresses and indices are the default."""
        kind = INT64 if kind is None else kind
        return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)

    def lanes(self, numbers: Sequence[int], kind: Any = None) -> Any:
        """A vector of integers, of 32 bits by default."""
        return ir.Constant(ir.VectorType(INT32 if kind is None else kind, len(numbers)), list(numbers))

    def vector(self, kind: Any, lanes: int) -> Any:
        return ir.VectorType(kind, lanes)

    def undefined(self, kind: Any) -> Any:
        return ir.Constant(kind, ir.Undefined)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """An instruction of the processor, or another operation that LLVM gives a name."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return self.builder.call(function, arguments)

    def call_address(self, address: Any, result: Any, *arguments: Any) -> Any:
        """A function of this process."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(self.builder.inttoptr(self.sum(address), kind.as_pointer()), arguments)

    def pointer(self, address: Any) -> Any:
        return self.builder.inttoptr(address, POINTER)

    def load(self, address: Any, kind: Any) -> Any:
        value = self.builder.load(self.pointer(address), typ=kind)
        value.align = 1
        return value

    def load_floats(self, address: Any, dtype: torch.dtype, lanes: int) -> Any:
        """Numbers of any float dtype, as float32."""
        builder, floats, ints = self.builder, ir.VectorType(FLOAT, lanes), ir.VectorType(INT32, lanes)
        if dtype == torch.float32:
            return self.load(address, floats)
        if dtype == torch.float16:
            return builder.fpext(self.load(address, ir.VectorType(HALF, lanes)), floats)
        # A bfloat16 is the first half of a float32.
        bits = builder.zext(self.load(address, ir.VectorType(INT16, lanes)), ints)
        return builder.bitcast(builder.shl(bits, self.constant(16, ints)), floats)

    def load_float(self, address: Any, dtype: torch.dtype) -> Any:
        return self.builder.extract_element(self.load_floats(address, dtype, 1), self.constant(0))

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.pointer(address)).align = 1

    def store_rounded(self, value: Any, address: Any, dtype: torch.dtype) -> None:
        """Write one float32 or a vector of them in any float dtype, rounded to the nearest, halves to even."""
        builder = self.builder
        half, short, word = (
            ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind
            for kind in (HALF, INT16, INT32)
        )
        if dtype == torch.float32:
            self.store(value, address)
        elif dtype == torch.float16:
            self.store(builder.fptrunc(value, half), address)
        else:
            bits = self.bfloat_bits(value, word)
            self.store(builder.trunc(builder.lshr(bits, self.constant(16, word)), short), address)

    def bfloat_bits(self, value: Any, kind: Any) -> Any:
        """The bits of float32 numbers, as integers, whose first 16 are those of the nearest bfloat16."""
        builder, bits = self.builder, self.builder.bitcast(value, kind)
        is_odd = builder.and_(builder.lshr(bits, self.constant(16, kind)), self.constant(1, kind))
        return builder.add(builder.add(bits, self.constant(0x7FFF, kind)), is_odd)

    def round_floats(self, floats: Any, dtype: torch.dtype) -> Any:
        """A vector of float32, each the nearest that a dtype of 16 bits has."""
        builder, lanes = self.builder, floats.type.count
        if dtype == torch.float16:
            return builder.fpext(builder.fptrunc(floats, ir.VectorType(HALF, lanes)), floats.type)
        ints = ir.VectorType(INT32, lanes)
        bits = builder.and_(self.bfloat_bits(floats, ints), self.constant(-(2**16), ints))
        return builder.bitcast(bits, floats.type)

    def sum(self, *terms: Any) -> Any:
        """The sum of addresses, indices and Python numbers; a pair of terms is multiplied first."""
        total = None
        for term in terms:
            if isinstance(term, tuple):
                factors = [self.constant(factor) if isinstance(factor, int) else factor for factor in term]
                term = self.builder.mul(*factors)
            term = self.constant(term) if isinstance(term, int) else term
            total = term if total is None else self.builder.add(total, term)
        return total

    def smaller(self, one: Any, other: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed("<", one, other), one, other)

    def pick(self, vector: Any, lanes: Sequence[int], other: Any = None) -> Any:
        """A vector of the given lanes of one vector, or of one and another behind it."""
        other = self.undefined(vector.type) if other is None else other
        return self.builder.shuffle_vector(vector, other, self.lanes(lanes))

    def spread(self, value: Any, lanes: int) -> Any:
        """A vector with the same value in every lane."""
        one = self.undefined(ir.VectorType(value.type, 1))
        return self.pick(self.builder.insert_element(one, value, self.constant(0)), [0] * lanes)

    def add_lanes(self, floats: Any) -> Any:
        while floats.type.count > 1:
            half = floats.type.count // 2
            floats = self.builder.fadd(self.pick(floats, range(half)), self.pick(floats, range(half, 2 * half)))
        return self.builder.extract_element(floats, self.constant(0))

    def prefetch(self, address: Any) -> None:
        """Ask for 64 bytes that are read soon, into the second cache."""
        options = (self.constant(option, INT32) for option in (0, 2, 1))  # to read, second cache, data
        self.call("llvm.prefetch.p0", VOID, self.pointer(address), *options)

    def multiply_add(self, one: Any, other: Any, total: Any) -> Any:
        """`one * other + total` of floats, rounded once."""
        return self.call(f"llvm.fma.v{total.type.count}f32", total.type, one, other, total)

    def loop(
        self, start: Any, stop: Any, step: int, values: list[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> list[Any]:
        """`for index in range(start, stop, step): values = body(index, values)`, and the values after it."""
        builder, before = self.builder, self.builder.block
        head, inside, after = (self.function.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        index, *carried = (builder.phi(value.type) for value in (start, *values))
        for phi, value in zip((index, *carried), (start, *values)):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, stop), inside, after)
        builder.position_at_end(inside)
        changed = body(index, carried)
        for phi, value in zip((index, *carried), (self.sum(index, step), *changed)):
            phi.add_incoming(value, builder.block)
        builder.branch(head)
        builder.position_at_end(after)
        return carried


def exchanged_lanes(bit: int) -> tuple[list[int], list[int]]:
    """How two vectors of 16 lanes exchange those whose numbers have a bit, or have it not: the lanes of both results."""
    kept = [lane if not lane & bit else (lane ^ bit) + 16 for lane in range(16)]
    given = [lane | bit if not lane & bit else lane + 16 for lane in range(16)]
    return kept, given


class TasksProgram(Program):
    """A function that several threads run at once: each takes some of many numbers at a time, until all are taken.

    Its argument is the address of 64-bit integers, which the threads share. The first counts what is taken.

    Args:
        arguments: names of those integers; tensors are given by their addresses.
        step: how many numbers a thread takes at a time, or the name of that.
        total: the name of how many there are.
    """

    def __init__(self, arguments: tuple[str, ...], step: int | str, total: str) -> None:
        super().__init__(1)
        (address,) = self.function.args
        self.arguments = {name: self.load(self.sum(address, 8 * place), INT64) for place, name in enumerate(arguments)}
        self.begin()
        builder, self.step = self.builder, self.constant(step) if isinstance(step, int) else self.arguments[step]
        check, work, done = (self.function.append_basic_block() for _ in range(3))
        taken, before = self.take(), builder.block
        builder.branch(check)
        builder.position_at_end(check)
        first = builder.phi(INT64)
        first.add_incoming(taken, before)
        builder.cbranch(builder.icmp_signed("<", first, self.arguments[total]), work, done)
        builder.position_at_end(work)
        taken = self.work(first)
        taken = self.take() if taken is None else taken
        first.add_incoming(taken, builder.block)
        builder.branch(check)
        builder.position_at_end(done)
        builder.ret_void()

    def take(self) -> Any:
        """Take the next numbers, and give the first of them."""
        return self.builder.atomic_rmw("add", self.pointer(self.function.args[0]), self.step, "monotonic")

    def begin(self) -> None:
        """What a thread does first."""

    def work(self, first: Any) -> Any:
        """What a thread does with the numbers that it has taken; gives the next ones, if it has taken them already."""
        raise NotImplementedError


class RowsProgram(TasksProgram):
    """A function that multiplies with a few rows of a weight at a time, until the threads have taken all of them.

    A thread goes through its rows in several places at once, each as many of them behind the one before. Memory sends
    that up to 1.7 times as fast as rows beside each other, which are in the same page where they are short.

    What would be a row behind the last one is the last one again: nothing is read that is not the weight's.

    Args:
        arguments: names of what follows the common arguments.
        dtype: of the bias and of the output, float16 or bfloat16.
        input_rows: rows of the input that are multiplied at a time.
        converts: whether the weight's numbers have to be converted before they are multiplied.
    """

    # Two rows of a bias are `bias_step` bytes apart: none, without a bias.
    common_arguments = (
        "next_row", "task_rows", "out_features", "num_rows", "output", "bias", "bias_step", "weight", "row_bytes",
    )  # fmt: skip

    def __init__(self, arguments: tuple[str, ...], dtype: torch.dtype, input_rows: int, converts: bool) -> None:
        self.dtype, self.input_rows = dtype, input_rows
        self.weight_rows, self.prefetch_bytes = WEIGHT_ROWS, PREFETCH_BYTES
        if input_rows == 1 and processor_has(*WIDE_FEATURES):
            self.weight_rows, self.prefetch_bytes = CONVERTED_STREAMS if converts else PLAIN_STREAMS
        super().__init__((*self.common_arguments, *arguments), "task_rows", "out_features")

    def work(self, first: Any) -> None:
        rows_left = self.sum(self.arguments["out_features"], (first, -1))
        num_rows = self.smaller(rows_left, self.arguments["task_rows"])
        distance = self.builder.udiv(self.sum(num_rows, self.weight_rows - 1), self.constant(self.weight_rows))
        stop = self.sum(first, distance)
        self.loop(first, stop, 1, [], lambda row, _: self.multiply_rows(row, distance))

    def multiply_rows(self, row: Any, distance: Any) -> list[Any]:
        """Some rows of the weight, which are as far from each other, with all rows of the input."""
        last_row = self.sum(self.arguments["out_features"], -1)
        rows = [self.smaller(self.sum(row, (distance, step)), last_row) for step in range(self.weight_rows)]

        def multiply(input_row: Any, _: list[Any]) -> list[Any]:
            last_input_row = self.sum(self.arguments["num_rows"], -1)
            steps = range(self.input_rows)
            self.multiply_tile(rows, [self.smaller(self.sum(input_row, step), last_input_row) for step in steps])
            return []

        return self.loop(self.constant(0), self.arguments["num_rows"], self.input_rows, [], multiply)

    def multiply_tile(self, rows: list[Any], input_rows: list[Any]) -> None:
        """Write the products of some rows of the weight and some rows of the input."""
        raise NotImplementedError

    def prefetch_ahead(self, address: Any) -> None:
        """Ask for what is read of a row of the weight soon after what is at an address."""
        self.prefetch(self.sum(address, self.prefetch_bytes))

    def weight_address(self, row: Any, *offset: Any) -> Any:
        return self.sum(self.arguments["weight"], (row, self.arguments["row_bytes"]), *offset)

    def store_product(self, product: Any, row: Any, input_row: Any) -> None:
        """Write the product of a row of the weight and a row of the input, a float32, plus the bias."""
        bias = self.sum(self.arguments["bias"], (row, self.arguments["bias_step"]))
        place = self.sum((input_row, self.arguments["out_features"]), row)
        total = self.builder.fadd(product, self.load_float(bias, self.dtype))
        self.store_rounded(total, self.sum(self.arguments["output"], (place, 2)), self.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# How it is run
# ---------------------------------------------------------------------------------------------------------------------


class Kernel:
    """A program as machine code."""

    def __init__(self, program: Program) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_triple(llvm.get_process_triple())
        features = processor_features().flatten()
        machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)
        module = llvm.parse_assembly(str(program.module))
        module.verify()
        engine = llvm.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        self.address = engine.get_function_address("run")
        self.run = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * len(program.function.args))(self.address)
        # The code is never freed: a thread may still be in it while Python shuts down.
        engine.detach()


def load_function(name: str, library: str | None = TORCH_LIBRARY) -> Any:
    """A function of a library, or `None`; by default of the OpenMP library that torch uses."""
    try:
        return getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return None


@cache
def load_openmp() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, num_threads, flags)` of the OpenMP library that torch uses, if any."""
    parallel = load_function("GOMP_parallel")
    if parallel is not None:
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
    return parallel


@cache
def compile_kernel(write: type[Program], *settings: Any) -> Kernel | None:
    """`write(*settings)` as machine code, or `None` where that cannot be: with a warning if it should have worked."""
    try:
        return Kernel(write(*settings)) if has_kernels(write) else None
    except Exception as error:  # whatever this version of LLVM or this system objects to
        logger.warning_once(
            f"Torch's own operators compute, as kernels for this processor could not be compiled: {error}"
        )
        return None


def has_kernels(write: type[Program]) -> bool:
    """Whether kernels of this kind should compile and run here."""
    # llvmlite before 0.45 writes addresses in another syntax.
    is_known = ir is not None and llvm.llvm_version_info >= (20,)
    return is_known and load_openmp() is not None and processor_has(*write.features)


@cache
def processor_features() -> Any:
    """What this processor has, by LLVM's names: a dictionary of booleans, empty where LLVM is not there to ask."""
    return {} if llvm is None else llvm.get_host_cpu_features()


def processor_has(*features: str) -> bool:
    return all(map(processor_features().get, features))


@cache
def rows_at_a_time() -> int:
    """Rows of the input that a [`RowsProgram`] should multiply at a time."""
    return INPUT_ROWS if processor_has(*WIDE_FEATURES) else 1


# madvise(2) of Linux: "use large pages here".
MADV_HUGEPAGE = 14


def ask_for_large_pages(tensor: torch.Tensor) -> None:
    """Let new memory, which nothing was written to yet, come in pages of 2 MiB where Linux leaves that to programs.

    Kernels then read it up to a tenth faster, as processors do not fetch ahead across the end of a page. Elsewhere, or
    where the system refuses, nothing happens.
    """
    if sys.platform == "linux" and tensor.is_cpu and tensor.nbytes > 0:
        page = os.sysconf("SC_PAGE_SIZE")
        first = -(-tensor.data_ptr() // page) * page
        num_bytes = (tensor.data_ptr() + tensor.nbytes) // page * page - first
        if num_bytes > 0:
            advise = ctypes.CDLL(None).madvise
            advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            advise(first, num_bytes, MADV_HUGEPAGE)


def can_run_kernels(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are on a CPU, and nothing is asked for but a result: no gradient, no trace, no export."""
    return (
        not torch.is_grad_enabled()
        and type(one) in PLAIN_TENSORS
        and type(other) in PLAIN_TENSORS
        and one.device == other.device == CPU
        and not torch.jit.is_tracing()
        and not is_exporting()
    )


# The process whose OpenMP threads the kernels have used.
openmp_process: int | None = None
# The bias of layers that have none: 16 zeros.
NO_BIAS = (ctypes.c_uint16 * 16)()
NO_BIAS_ADDRESS = ctypes.addressof(NO_BIAS)


def can_add_bias(bias: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a bias, if there is one, fits a weight and has the dtype and the device of the input."""
    return bias is None or (
        bias.dtype == x.dtype and bias.is_cpu and bias.shape == weight.shape[:1] and bias.is_contiguous()
    )


def count_threads(num_tasks: int) -> int:
    """In how many of torch's threads tasks are run.

    A forked process inherits the note that those threads exist, but not the threads, and would wait for them forever.
    """
    num_threads = min(torch.get_num_threads(), num_tasks)
    is_alone = num_threads == 1 or load_openmp() is None or openmp_process not in (None, os.getpid())
    return 1 if is_alone else num_threads


def run_in_threads(kernel: Kernel, shared: "array[int]", num_threads: int) -> None:
    """Run a program in several of torch's threads at once, or in this one alone."""
    global openmp_process
    address, _ = shared.buffer_info()
    parallel = load_openmp()
    if num_threads == 1 or parallel is None:
        kernel.run(address)
        return
    openmp_process = os.getpid()
    parallel(kernel.address, address, num_threads, 0)


class Step:
    """A [`TasksProgram`] with its arguments.

    Args:
        kernel: the program.
        arguments: all but the first.
    """

    def __init__(self, kernel: Kernel, *arguments: int) -> None:
        self.kernel, self.arguments = kernel, array("Q", (0, *arguments))

    def run(self, num_tasks: int) -> None:
        """Run it once, in no more threads than there are tasks, which is how often a thread can take something."""
        run_in_threads(self.kernel, self.arguments, count_threads(num_tasks))


def rows_step(
    kernel: Kernel,
    num_rows: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    *arguments: int,
) -> tuple[Step, int]:
    """A step of a [`RowsProgram`], and how many tasks it has.

    Args:
        num_rows: rows of the input.
        weight: `[out, ...]`.
        bias: `[out]`, of the output's dtype.
        output: `[rows, out]`.
        arguments: what follows the common arguments.
    """
    out_features, row_bytes = weight.shape[0], weight.nbytes // weight.shape[0]
    bias_address, bias_step = (NO_BIAS_ADDRESS, 0) if bias is None else (bias.data_ptr(), 2)
    task_rows = out_features // (TASKS_PER_THREAD * torch.get_num_threads())
    task_rows = min(max(task_rows, LEAST_TASK_ROWS), MOST_TASK_ROWS)
    # As many in every place that a thread reads in.
    task_rows = -(-task_rows // TASK_ROWS_STEP) * TASK_ROWS_STEP
    common = (task_rows, out_features, num_rows, output.data_ptr(), bias_address, bias_step)
    return Step(kernel, *common, weight.data_ptr(), row_bytes, *arguments), -(-out_features // task_rows)


def computed_by_steps(
    *methods: str, settings: tuple[str, ...] = ()
) -> Callable[[type[ModuleClass]], type[ModuleClass]]:
    """Mark a class of modules that steps can stand for, while its methods and its modules' settings are what they are.

    Args:
        methods: names of what the steps compute, besides `forward`.
        settings: names of the attributes that they depend on, besides the parameters.
    """

    def mark(kind: type[ModuleClass]) -> type[ModuleClass]:
        marked: Any = kind
        marked.step_methods = {name: getattr(kind, name) for name in ("forward", *methods)}
        marked.step_settings = settings
        return kind

    return mark


# Gives memory of a shape and a dtype, which is free until the same is asked for again.
Scratch = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def own_name(name: str) -> str:
    """`chatglm::name`, or with a number behind it if another checkpoint's copy of this file has taken that.

    Registering a name twice would free the operator that models loaded before still call (torch 2.6 to 2.13).
    """
    numbered, copies = name, 1
    while hasattr(torch.ops.chatglm, numbered):
        copies += 1
        numbered = f"{name}_{copies}"
    return f"chatglm::{numbered}"


def is_exporting() -> bool:
    """Whether `torch.export` is running. Exported programs run where this file is not."""
    # Torch before 2.7 cannot tell it from compiling.
    ask = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return ask()


__all__ = [
    "BFLOATS",
    "BYTES",
    "FEW_ROWS_FEATURES",
    "FLOAT",
    "FLOATS",
    "HALF",
    "HALF_DTYPES",
    "INT1",
    "INT16",
    "INT32",
    "INT64",
    "INT8",
    "INTS",
    "NO_BIAS_ADDRESS",
    "PLAIN_TENSORS",
    "VOID",
    "WIDE_FEATURES",
    "WORDS",
    "Kernel",
    "Program",
    "RowsProgram",
    "Scratch",
    "Step",
    "TasksProgram",
    "ask_for_large_pages",
    "can_add_bias",
    "can_run_kernels",
    "compile_kernel",
    "computed_by_steps",
    "count_threads",
    "exchanged_lanes",
    "has_kernels",
    "is_exporting",
    "load_function",
    "own_name",
    "processor_has",
    "rows_at_a_time",
    "rows_step",
    "run_in_threads",
]
