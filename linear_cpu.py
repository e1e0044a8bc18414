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
"""Linear layers of 16-bit floats, and their products on a CPU.

What is unusual here:

- For a few rows of input a product takes as long as reading the weight does. Torch's own (2.13) take two to three times
  as long, hence the kernels here: they read the weight as it is, multiply and add in float32, and round once.
- Kernels have no gradient. Wherever one may be asked for, where a program is traced or exported, and for tensors of
  other classes, the layer is torch's.
- Many rows of float16 are multiplied in bfloat16, where the processor does that in pairs, with sums in float32; and in
  float32, a part of the weight at a time, elsewhere. In float16 itself most CPUs are several times slower.
- Compilers see one operator, `torch.ops.chatglm.linear`.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .kernels_decoding import ConvertingProgram
from .kernels_llvm import (
    BFLOATS,
    FEW_ROWS_FEATURES,
    FLOATS,
    Kernel,
    RowsProgram,
    Scratch,
    Step,
    can_add_bias,
    can_run_kernels,
    compile_kernel,
    computed_by_steps,
    has_kernels,
    own_name,
    processor_has,
    rows_at_a_time,
    rows_step,
)
from .kernels_matmul import find_matmul, multiply_matrices, multiply_new_rows


# Columns that a kernel multiplies at a time.
STEP_COLUMNS = 32
# Rows of input up to which the kernels are faster than torch, and up to which they are faster than products of float16
# in pairs of bfloat16. Measured on an AVX-512 processor with the shapes of ChatGLM3-6B.
MAX_ROWS = {torch.bfloat16: 16, torch.float16: 32}
MAX_ROWS_WITH_PAIRS = {**MAX_ROWS, torch.float16: 12}
# Rows of float16 from which on converting the weight costs less than torch's product of float16 takes longer.
MIN_CONVERTED_ROWS = 8
# Rows of the weight that are converted at a time, so that they stay in the processor's cache.
CONVERTED_ROWS = 256


@cache
def multiplies_pairs(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies two numbers each of this dtype and adds both products to a float32."""
    return dtype == torch.bfloat16 and processor_has("avx512bf16")


class FloatProgram(RowsProgram):
    """A function that multiplies weights of 16-bit floats, `x @ weight^T + bias`, with sums in float32.

    The input is bfloat16 where the processor multiplies pairs of it, and float32 elsewhere.

    Args:
        dtype: of the weight, the bias and the output.
        input_rows: rows of the input that are multiplied at a time.
    """

    features = FEW_ROWS_FEATURES
    own_arguments = ("x", "in_features")

    def __init__(self, dtype: torch.dtype, input_rows: int) -> None:
        self.in_pairs = multiplies_pairs(dtype)
        super().__init__(self.own_arguments, dtype, input_rows, converts=not self.in_pairs)

    def multiply_tile(self, rows: list[Any], input_rows: list[Any]) -> None:
        arguments = self.arguments
        number_bytes = 2 if self.in_pairs else 4
        weights = [self.weight_address(row) for row in rows]
        inputs = [
            self.sum(arguments["x"], (self.sum((row, arguments["in_features"])), number_bytes)) for row in input_rows
        ]

        def add_columns(column: Any, sums: list[Any]) -> list[Any]:
            changed: list[Any] = []
            for weight in weights:
                address = self.sum(weight, (column, 2))
                self.prefetch_ahead(address)
                numbers = self.load_columns(address, self.dtype)
                for x in inputs:
                    x_numbers = self.load_columns(self.sum(x, (column, number_bytes)), torch.float32)
                    changed.append(self.add_products(sums[len(changed)], numbers, x_numbers))
            return changed

        sums = [self.constant(0.0, FLOATS)] * (len(rows) * len(input_rows))
        sums = self.loop(self.constant(0), arguments["in_features"], STEP_COLUMNS, sums, add_columns)
        pairs = [(row, input_row) for row in rows for input_row in input_rows]
        for (row, input_row), lanes in zip(pairs, sums):
            self.store_product(self.add_lanes(lanes), row, input_row)

    def load_columns(self, address: Any, dtype: torch.dtype) -> list[Any]:
        """32 numbers: of bfloat16 as they are where they are multiplied in pairs, else as float32, in two vectors."""
        if self.in_pairs:
            return [self.load(address, BFLOATS)]
        return [self.load_floats(self.sum(address, 16 * half * dtype.itemsize), dtype, 16) for half in (0, 1)]

    def add_products(self, total: Any, numbers: list[Any], others: list[Any]) -> Any:
        for one, other in zip(numbers, others):
            if self.in_pairs:
                total = self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, one, other)
            else:
                total = self.multiply_add(one, other, total)
        return total


def most_rows(dtype: torch.dtype) -> int:
    """Rows of input up to which the kernels of this file are the fastest."""
    has_pairs = dtype == torch.float16 and is_slow_in_float16() and multiplies_pairs(torch.bfloat16)
    return (MAX_ROWS_WITH_PAIRS if has_pairs else MAX_ROWS).get(dtype, 0)


def find_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Kernel | None:
    """The kernel that multiplies an input `[..., in]` with this weight, if there is one."""
    out_features, in_features = weight.shape
    num_rows = x.numel() // in_features if in_features else 0
    if not 0 < num_rows <= most_rows(x.dtype) or in_features % STEP_COLUMNS != 0 or out_features == 0:
        return None
    is_known = weight.dtype == x.dtype and weight.is_contiguous()
    if not is_known or x.shape[-1] != in_features or not can_add_bias(bias, x, weight):
        return None
    return compile_kernel(FloatProgram, x.dtype, min(num_rows, rows_at_a_time()))


@cache
def is_slow_in_float16() -> bool:
    """Whether torch multiplies float16 much more slowly than float32: so it is on most x86 processors."""
    # Torch knows those with instructions for it under a private name (2.6 to 2.13).
    has_float16 = getattr(torch.cpu, "_is_amx_fp16_supported", bool)()
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and not has_float16


def multiply_many_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight^T + bias` of float16 in float32, `[rows, in]` -> `[rows, out]`: some rows of the weight at a time."""
    out_features, in_features = weight.shape
    x, output = x.float(), x.new_empty(len(x), out_features)
    floats = torch.empty(min(CONVERTED_ROWS, out_features), in_features)
    for start in range(0, out_features, CONVERTED_ROWS):
        rows = weight[start : start + CONVERTED_ROWS]
        product = multiply_new_rows(x, floats[: len(rows)].copy_(rows))
        if bias is not None:
            product += bias[start : start + CONVERTED_ROWS]
        output[:, start : start + CONVERTED_ROWS] = product
    return output


def should_convert(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether torch would compute a product of float16 more slowly than one of other floats."""
    is_float16 = x.dtype == weight.dtype == torch.float16 and is_slow_in_float16()
    is_known = is_float16 and weight.is_cpu and x.shape[-1] == weight.shape[1] and can_add_bias(bias, x, weight)
    return is_known and weight.numel() > 0 and x.numel() >= MIN_CONVERTED_ROWS * x.shape[-1]


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What the operator computes, `x @ weight^T + bias`: `[..., in]` -> `[..., out]`."""
    kernel = find_kernel(x, weight, bias)
    if kernel is None and should_convert(x, weight, bias):
        rows = x.reshape(-1, x.shape[-1])
        kernels = find_matmul(rows, weight, None, bias)
        product = (
            multiply_many_rows(rows, weight, bias)
            if kernels is None
            else multiply_matrices(rows, weight, None, bias, kernels)
        )
        return product.view(*x.shape[:-1], len(weight))
    if kernel is None:
        return F.linear(x, weight, bias)
    numbers = (x if multiplies_pairs(x.dtype) else x.float()).contiguous()
    out_features, in_features = weight.shape
    output = weight.new_empty((*x.shape[:-1], out_features))
    num_rows = x.numel() // in_features
    step, num_tasks = rows_step(kernel, num_rows, weight, bias, output, numbers.data_ptr(), in_features)
    step.run(num_tasks)
    return output


multiply_operator = torch.library.custom_op(own_name("linear"), multiply, mutates_args=())


@multiply_operator.register_fake
def _(x, weight, bias=None):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# Asked once, as compilers cannot.
HAS_KERNELS = has_kernels(FloatProgram)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight^T + bias` as `F.linear` computes it, by a kernel where there is one: `[..., in]` -> `[..., out]`."""
    if x.dtype not in MAX_ROWS or not can_run_kernels(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return multiply_operator(x, weight, bias) if HAS_KERNELS else F.linear(x, weight, bias)
    try:
        return multiply(x, weight, bias)
    except RuntimeError:  # of tensors without an address, as `torch.vmap` makes them; or torch says what is wrong
        return F.linear(x, weight, bias)


@computed_by_steps()
class ChatGLMLinear(nn.Linear):
    """`nn.Linear`, which multiplies few rows of 16-bit floats faster on a CPU."""

    # `isinstance` would fail for a class from another checkpoint's copy of this code.
    is_float_layer = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def find_steps(self, x: torch.Tensor, output: torch.Tensor, scratch: Scratch) -> list[Step] | None:
        """The steps that compute this layer, `[rows, in]` -> `[rows, out]`, if kernels do."""
        kernel = find_kernel(x, self.weight, self.bias)
        if kernel is None:
            return None
        num_rows, in_features = x.shape
        steps, numbers = [], x
        if not multiplies_pairs(x.dtype):
            numbers = scratch((num_rows, in_features), torch.float32)
            converting = compile_kernel(ConvertingProgram, x.dtype)
            if converting is None:
                return None
            steps.append(Step(converting, x.numel(), 1, x.data_ptr(), numbers.data_ptr()))
        step, _ = rows_step(kernel, num_rows, self.weight, self.bias, output, numbers.data_ptr(), in_features)
        return [*steps, step]


__all__ = ["ChatGLMLinear"]
