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
"""The GPU kernels in Triton's interpreter, each against the decoded weight and a plain product.

The interpreter has to be chosen before the kernels are imported, so that all of it runs in one other process: this
file, which prints the error of every case. It cannot multiply bfloat16 and knows no assembly: the assembly is followed
here instruction by instruction, for every byte. What is launched is counted there too.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


# Out, in, columns that share a scale. No number of columns but the last fills its blocks; 24 is less than one.
INT8_SHAPES = ((67, 300, None), (33, 24, None), (32, 1024, None))
INT4_SHAPES = ((67, 1000, None), (33, 24, None), (32, 2048, None))
GROUP_SHAPES = ((67, 1120, 32), (33, 64, 32), (67, 1088, 64), (35, 128, 64), (67, 640, 128), (33, 1024, 256))
SHAPES = [("int8", *shape) for shape in INT8_SHAPES] + [("int4", *shape) for shape in INT4_SHAPES + GROUP_SHAPES]
# Rows, parts, dtypes of `x` and of the scales, whether there is a bias. 37 rows are a block and five of another.
LAUNCHES = (
    (1, 1, "float16", "float16", False),
    (1, 2, "float32", "float32", True),
    (5, 4, "float16", "float32", True),
    (8, 8, "float32", "bfloat16", True),
    (16, 1, "float16", "float16", True),
    (37, 4, "float32", "float16", False),
)
DECODED = [*SHAPES, ("int8", 5, 66, None), ("int4", 5, 66, None)]

# Of the two shapes with groups of 32, 64 and more columns each takes every second launch.
PRODUCTS = [
    (*shape, *launch)
    for place, shape in enumerate(SHAPES)
    for launch in (LAUNCHES if shape[3] is None else LAUNCHES[place % 2 :: 2])
]
DEQUANTIZED = [(*shape, dtype) for shape in DECODED for dtype in ("float16", "float32")]
# The greatest error over the greatest value. Codes are multiplied exactly and added in float32; only scales of groups
# are rounded to the dtype of `x`, and so are their products with codes.
LIMITS = {"float16": 1e-3, "float32": 2e-6}


def name(values: tuple[Any, ...]) -> str:
    return "-".join(str(value) for value in values)


def run_interpreter() -> dict[str, Any]:
    """The error of every case, from the other process."""
    pytest.importorskip("triton", reason="needs Triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


LINEAR = ["int8-3", "int4-3", "int4-17", "int4-64", "int4-65", "int4-narrow", "int4-old-triton"]
LAUNCHED = {
    "int8-3": ["int8_few_rows_kernel"],
    "int4-3": ["int4_few_rows_kernel"],
    "int4-64": ["int4_few_rows_kernel"],
    "int4-65": ["dequantize_kernel"],
    "int4-narrow": ["dequantize_kernel"],
    "int4-old-triton": ["dequantize_kernel"],
}


def test_every_case(subtests: pytest.Subtests) -> None:
    """One test, so that tests that run side by side do not start the other process twice."""
    errors = run_interpreter()
    for case in PRODUCTS:
        with subtests.test("product", case=name(case)):
            assert errors[name(case)] < LIMITS[case[6]]
    for case in DEQUANTIZED:
        with subtests.test("dequantizing is exact", case=name(case)):
            assert errors[name(case)] == 0
    for linear in LINEAR:
        with subtests.test("a linear layer chooses a kernel", case=linear):
            assert errors[f"linear-{linear}"] < LIMITS["float32"]
    for linear, kernels in LAUNCHED.items():
        # The input is read as it is and no parts are added afterwards, and nothing but the result takes memory.
        with subtests.test("a product is one launch", case=linear):
            launched, operators = errors[f"launched-{linear}"]
            assert launched == kernels
            # Views launch nothing.
            work = [operator for operator in operators if operator not in ("aten.view", "aten.t", "aten.detach")]
            assert work == (["aten.empty"] if "few_rows" in launched[0] else ["aten.empty", "aten.addmm"])
    with subtests.test("old versions of Triton are named"):
        (message,) = errors["warnings"]
        assert "on gfx942" in message
        assert "need Triton 3.3 (torch 2.7) or newer, and this is Triton 3.2.0" in message


def float16_value(bits: int) -> float:
    return torch.tensor(bits - (bits >> 15 << 16), dtype=torch.int16).view(torch.float16).item()


def bfloat16_value(bits: int) -> float:
    return torch.tensor(bits - (bits >> 15 << 16), dtype=torch.int16).view(torch.bfloat16).item()


def run_assembly(text: str, words: tuple[int, ...]) -> list[tuple[float, float]]:
    """What the assembly puts into its outputs, as pairs of numbers; an instruction it does not know fails."""
    num_outputs = 8 if "$8" in text else 2
    registers = {f"${num_outputs + place}": word for place, word in enumerate(words)}
    value = bfloat16_value if "bf16x2" in text else float16_value

    def read(operand: str) -> int:
        return int(operand, 16) if operand.startswith("0x") else registers[operand]

    def halves(operand: str) -> tuple[float, float]:
        return value(read(operand) & 0xFFFF), value(read(operand) >> 16)

    outputs = {}
    for line in text.splitlines():
        if line in "{}" or line.startswith(".reg"):
            continue
        operation, target, *operands = re.findall(r"[^\s,;]+", line)
        if operation == "mov.b32":
            registers[target] = read(operands[0])
        elif operation == "prmt.b32":
            source = words_to_bytes(read(operands[0]), read(operands[1]))
            selectors = [(read(operands[2]) >> shift) & 15 for shift in (0, 4, 8, 12)]
            registers[target] = int.from_bytes(bytes(source[selector] for selector in selectors), "little")
        elif operation == "xor.b32":
            registers[target] = read(operands[0]) ^ read(operands[1])
        elif operation == "shr.u32":
            registers[target] = read(operands[0]) >> int(operands[1])
        elif operation == "lop3.b32":
            assert operands[3] == "0x6a"
            registers[target] = (read(operands[0]) & read(operands[1])) ^ read(operands[2])
        elif operation.startswith("fma.rn."):
            parts = zip(*(halves(operand) for operand in operands))
            outputs[target] = tuple(a * b + c for a, b, c in parts)
        else:
            assert operation == "add.rn.f16x2", line
            outputs[target] = tuple(a + b for a, b in zip(*(halves(operand) for operand in operands)))
    return [outputs[f"${index}"] for index in range(num_outputs)]


def words_to_bytes(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_assembly_decodes_every_byte(source: Callable[[str], ModuleType], is_bfloat16: bool) -> None:
    kernels = source("quantization_kernels")
    text = source("quantization_triton").write_int4_assembly(is_bfloat16)
    for first in range(256):
        # Four different bytes in each word, so that one taken from a wrong place shows.
        stored = bytes((first + step) % 256 for step in (0, 37, 74, 111, 148, 185, 222, 3))
        codes = kernels.unpack_int4(torch.tensor(list(stored), dtype=torch.uint8).view(torch.int8)[None])
        expected = codes.view(2, 8).t().tolist()
        words = [int.from_bytes(stored[start : start + 4], "little") for start in (0, 4)]
        assert [list(pair) for pair in run_assembly(text, words)] == expected


@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_assembly_decodes_every_int8(source: Callable[[str], ModuleType], is_bfloat16: bool) -> None:
    text = source("quantization_triton").write_int8_assembly(is_bfloat16)
    for first in range(256):
        stored = bytes((first + step) % 256 for step in (0, 37, 74, 111))
        pairs = run_assembly(text, (int.from_bytes(stored, "little"),))
        assert [value for pair in pairs for value in pair] == [byte - (byte >> 7 << 8) for byte in stored]


# ---------------------------------------------------------------------------------------------------------------------
# The other process
# ---------------------------------------------------------------------------------------------------------------------


def make_weight(layout: str, out_features: int, in_features: int, group_size: int | None, scale_dtype: str):
    largest = 8 if layout == "int4" else 128
    codes = torch.randint(-largest, largest, (out_features, in_features), dtype=torch.int8)
    weight = (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15) if layout == "int4" else codes
    shape = (out_features, in_features // group_size) if group_size else (out_features,)
    return weight, (torch.rand(shape) * 0.02 + 0.01).to(getattr(torch, scale_dtype))


def greatest_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Over the greatest expected value; not a number counts as infinite, which JSON has."""
    error = (result.double() - expected.double()).abs().max() / expected.double().abs().max()
    return torch.nan_to_num(error, nan=float("inf")).item()


def product_error(
    kernels: ModuleType, gpu_kernels: ModuleType, layout: str, out_features: int, in_features: int, group_size, *launch
) -> float:
    rows, parts, dtype, scale_dtype, has_bias = launch
    weight, scale = make_weight(layout, out_features, in_features, group_size, scale_dtype)
    x = torch.randn(rows, in_features).to(getattr(torch, dtype))
    bias = torch.randn(out_features) if has_bias else None
    bits = 8 if layout == "int8" else 4
    config = gpu_kernels.few_rows_config("sm_80", bits, group_size is not None, rows, (3, 7))
    result = gpu_kernels.run_few_rows(x, weight, scale, bias, config._replace(parts=parts), use_assembly=False)
    decoded = kernels.dequantize_weight(weight, scale, in_features, torch.float64)
    assert result.dtype == x.dtype
    return greatest_error(result, F.linear(x.double(), decoded, None if bias is None else bias.double()))


def linear_error(kernels: ModuleType, layout: str, rows: int, in_features: int = 264) -> float:
    weight, scale = make_weight(layout, 35, in_features, None, "float16")
    x, bias = torch.randn(rows, in_features), torch.randn(35)
    decoded = kernels.dequantize_weight(weight, scale, in_features, torch.float64)
    expected = F.linear(x.double(), decoded, bias.double())
    return greatest_error(kernels.triton_quantized_linear(x, weight, scale, bias), expected)


class Recorder(TorchDispatchMode):
    """The operators of torch that run, and the kernels that would be launched on a GPU, which it stands in for."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []
        self.operators: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(function.overloadpacket))
        return function(*args, **kwargs or {})

    def stand_in(self, name: str) -> Any:
        recorder = self

        class Kernel:
            def __getitem__(self, grid: Any) -> Any:
                return lambda *args, **options: recorder.launched.append(name)

        return Kernel()


def record_launches(
    kernels: ModuleType, gpu_kernels: ModuleType, layout: str, rows: int, in_features: int = 264
) -> Any:
    weight, scale = make_weight(layout, 35, in_features, None, "float16")
    x, bias = torch.randn(rows, in_features), torch.randn(35)
    recorder = Recorder()
    names = ("int8_few_rows_kernel", "int4_few_rows_kernel", "dequantize_kernel")
    replaced = {name: recorder.stand_in(name) for name in names}
    with patch.multiple(gpu_kernels, **replaced), recorder:
        kernels.triton_quantized_linear(x, weight, scale, bias)
    return recorder.launched, recorder.operators


def print_errors() -> None:
    package = sys.modules["chatglm_source"] = ModuleType("chatglm_source")
    package.__path__ = [str(Path(__file__).resolve().parent.parent)]
    kernels, gpu_kernels = (
        importlib.import_module(f"chatglm_source.quantization_{name}") for name in ("kernels", "triton")
    )
    torch.manual_seed(0)
    found: dict[str, Any] = {name(case): product_error(kernels, gpu_kernels, *case) for case in PRODUCTS}
    for layout, out_features, in_features, group_size, dtype in DEQUANTIZED:
        weight, scale = make_weight(layout, out_features, in_features, group_size, "float16")
        arguments = (weight, scale, in_features, getattr(torch, dtype))
        expected, result = kernels.dequantize_weight(*arguments), kernels.triton_dequantize(*arguments)
        found[name((layout, out_features, in_features, group_size, dtype))] = greatest_error(result, expected)
    # As on an AMD GPU, whose kernels have no assembly.
    torch.version.hip = "6.0"
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(gcnArchName="gfx942:sramecc+")
    for layout, rows in (("int8", 3), ("int4", 3), ("int4", 17), ("int4", 64), ("int4", 65)):
        found[f"linear-{layout}-{rows}"] = linear_error(kernels, layout, rows)
        found[f"launched-{layout}-{rows}"] = record_launches(kernels, gpu_kernels, layout, rows)
    found["linear-int4-narrow"] = linear_error(kernels, "int4", 3, in_features=36)
    found["launched-int4-narrow"] = record_launches(kernels, gpu_kernels, "int4", 3, in_features=36)
    with patch.object(gpu_kernels.triton, "__version__", "3.2.0"), patch.object(gpu_kernels, "logger") as logger:
        found["linear-int4-old-triton"] = linear_error(kernels, "int4", 3)
        found["warnings"] = [call.args[0] for call in logger.warning_once.call_args_list]
        found["launched-int4-old-triton"] = record_launches(kernels, gpu_kernels, "int4", 3)
    print(json.dumps(found))


if __name__ == "__main__":
    print_errors()
