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
"""The GPU kernels compiled ahead of time, which needs no GPU: what the machine code of each has to look like.

By default one or two kernels are compiled for each architecture, and all of them, with every weight, number of rows and
dtype, for the two architectures of data centres together. `make test-grid ARGS=tests/test_triton_compile.py` compiles
everything for each. Run with `-rP` to read registers and instructions for each weight.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


triton = pytest.importorskip("triton", reason="needs Triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a program may have, by compute capability.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# AMD's local memory is 64 KiB on all of them.
AMD_SHARED_MEMORY = 64
# Instructions of the main loop for each weight, everything counted. An H200 can issue 3.9 in the time that an int4
# weight takes from memory, and twice that for int8.
MOST_INSTRUCTIONS = {"int4": 2.5, "int4-128": 4.2, "int4-64": 4.2, "int4-32": 4.2, "int8": 4.8}

WEIGHTS = {"int4": (4, None), "int4-128": (4, 128), "int4-64": (4, 64), "int4-32": (4, 32), "int8": (8, None)}
ROWS = (8, 16)
EVERYTHING = [
    (arch, weight, rows, dtype)
    for arch in SHARED_MEMORY
    for weight in WEIGHTS
    for rows in ROWS
    for dtype in ("fp16", "bf16")
]
# Every weight on the two architectures that data centres have most, and on both together every dtype with every number of
# rows; elsewhere the kernels of published checkpoints.
COMMON = {
    (80, "int4", 8, "bf16"), (80, "int4-128", 16, "fp16"), (80, "int4-64", 8, "fp16"), (80, "int4-32", 16, "bf16"),
    (80, "int8", 16, "fp16"),
    (90, "int4", 16, "fp16"), (90, "int4-128", 8, "bf16"), (90, "int4-64", 16, "bf16"), (90, "int4-32", 8, "fp16"),
    (90, "int8", 8, "bf16"),
    (86, "int4", 8, "bf16"), (89, "int4", 16, "fp16"), (100, "int4", 8, "fp16"), (100, "int8", 16, "bf16"),
    (120, "int4", 16, "bf16"),
}  # fmt: skip
COMMON_AMD = {("int4",), ("int4-32",), ("int8",)}
COMMON_DEQUANTIZED = {(80, "int4"), (90, "int8"), ("gfx942", "int4")}


def common_first(cases: list[tuple[Any, ...]], common: Any) -> list[Any]:
    """The cases as parameters, all but the common ones left to `make test-grid`."""
    return [pytest.param(*case, marks=() if case in common else pytest.mark.grid) for case in cases]


@dataclass(frozen=True)
class MachineCode:
    """What a kernel became: its instructions, those of its longest loop, and what it takes."""

    instructions: list[str]
    loop: list[str]
    registers: int
    spilled: int
    shared_memory: int

    def count(self, name: str) -> int:
        return sum(name in instruction for instruction in self.loop)


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A compiler cache of these tests' own: a kernel from a user's would not be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def kernels(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_triton")


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int | str, **options: int
) -> Any:
    """Compile as the runtime would where all pointers and sizes are multiples of 16."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs=constants,
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in constants and name != "num_rows"
        },
    )
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options=options)


def read_machine_code(compiled: Any) -> MachineCode:
    """Disassemble for NVIDIA, with the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        text = subprocess.run([NVIDIA_TOOLS / "nvdisasm", "-c", file.name], **run).stdout
        usage = subprocess.run([NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], **run).stdout
    instructions, labels, loop = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    for place, instruction in enumerate(instructions):
        jump = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        start = labels.get(jump[1], place + 1) if jump else place + 1
        if place - start >= len(loop):
            loop = instructions[start : place + 1]
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return MachineCode(instructions, loop, registers, stack, compiled.metadata.shared)


def compile_few_rows(kernels: ModuleType, arch: int | str, weight: str, rows: int, dtype: str) -> tuple[Any, Any]:
    """A kernel for few rows in its configuration: adding the bias for 8 rows, one part of several for 16."""
    bits, group_size = WEIGHTS[weight]
    is_hip = isinstance(arch, str)
    config = kernels.few_rows_config(bits, group_size is not None, rows, 4096, 4096, 132, is_hip)
    assert config.block_rows == rows
    types = {"scale_ptr": "*fp16", "bias_ptr": f"*{dtype}", "output_ptr": f"*{dtype}" if rows == 8 else "*fp32"}
    constants = {"BLOCK_OUT": config.block_out, "BLOCK_IN": config.block_in, "BLOCK_ROWS": config.block_rows}
    constants["HAS_BIAS"] = rows == 8
    if bits == 8:
        kernel, types = kernels.int8_few_rows_kernel, types | {"x_ptr": f"*{dtype}", "codes_ptr": "*i8"}
    else:
        kernel, types = kernels.int4_few_rows_kernel, types | {"planes_ptr": f"*{dtype}", "words_ptr": "*i32"}
        constants |= {"GROUP_SIZE": group_size or 0, "ASSEMBLY": not is_hip}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return config, compile_kernel(kernel, types, constants, arch, **options)


@pytest.mark.parametrize(("arch", "weight", "rows", "dtype"), common_first(EVERYTHING, COMMON))
def test_few_rows_on_nvidia(
    kernels: ModuleType, arch: int, weight: str, rows: int, dtype: str, record_property: Callable
) -> None:
    config, compiled = compile_few_rows(kernels, arch, weight, rows, dtype)
    code, bits = read_machine_code(compiled), WEIGHTS[weight][0]
    weights = config.block_out * config.block_in * 8 if bits == 4 else config.block_out * config.block_in
    per_weight = len(code.loop) * 32 * config.num_warps / weights
    measured = {"registers": code.registers, "shared_memory": code.shared_memory, "instructions": round(per_weight, 2)}
    for name, value in measured.items():
        record_property(name, value)
    print(f"sm_{arch} {weight} {rows} rows {dtype}: {measured}")
    assert code.spilled == 0
    assert not any("LDL" in instruction or "STL" in instruction for instruction in code.instructions)
    assert code.shared_memory <= SHARED_MEMORY[arch] * 1024
    # The tensor cores, and copies that wait in shared memory.
    assert code.count("HMMA") > 0
    assert code.count("LDGSTS") > 0
    assert per_weight < MOST_INSTRUCTIONS[weight]
    if bits == 4:
        assert code.count("I2F") == 0
        assert code.count("PRMT") > 0
        assert code.count("LOP3") > 0


@pytest.mark.parametrize("weight", common_first([(weight,) for weight in WEIGHTS], COMMON_AMD))
def test_few_rows_on_amd(kernels: ModuleType, weight: str) -> None:
    _, compiled = compile_few_rows(kernels, "gfx942", weight, 16, "fp16")
    text = compiled.asm["amdgcn"]
    assert "v_mfma_f32_16x16x" in text
    assert set(re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", text)) == {"0"}
    assert compiled.metadata.shared <= AMD_SHARED_MEMORY * 1024
    registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
    print(f"gfx942 {weight}: {registers} registers")


@pytest.mark.parametrize(
    ("arch", "weight"),
    common_first(list(itertools.product((80, 90, 120, "gfx942"), ("int4", "int8"))), COMMON_DEQUANTIZED),
)
def test_dequantize(kernels: ModuleType, arch: int | str, weight: str) -> None:
    types = {"weight_ptr": "*i8", "scale_ptr": "*fp16", "output_ptr": "*bf16"}
    constants = {"BLOCK_OUT": 8, "BLOCK_BYTES": 256, "BYTES_PER_GROUP": 0, "IS_INT4": weight == "int4"}
    compiled = compile_kernel(kernels.dequantize_kernel, types, constants, arch, num_warps=4)
    if isinstance(arch, str):
        assert set(re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", compiled.asm["amdgcn"])) == {"0"}
        return
    code = read_machine_code(compiled)
    print(f"sm_{arch} dequantize {weight}: {code.registers} registers")
    assert code.spilled == 0
    # Sixteen bytes at a time to memory.
    assert any("STG" in instruction and "128" in instruction for instruction in code.instructions)


@pytest.mark.parametrize("is_hip", [False, True])
@pytest.mark.parametrize("num_rows", range(1, 17))
def test_no_other_configuration(kernels: ModuleType, num_rows: int, is_hip: bool) -> None:
    """All configurations are compiled above: only the splits, which no kernel knows, depend on the sizes."""
    compiled_rows = 8 if num_rows <= 8 else 16
    for bits, is_grouped in ((4, False), (4, True), (8, False)):
        known = kernels.few_rows_config(bits, is_grouped, compiled_rows, 4096, 4096, 132, is_hip)
        for num_out, num_in in ((32, 128), (4096, 4096), (4608, 4096), (27392, 4096), (4096, 13696), (151552, 4096)):
            for multiprocessors in (1, 20, 108, 132, 304):
                config = kernels.few_rows_config(bits, is_grouped, num_rows, num_out, num_in, multiprocessors, is_hip)
                assert config._replace(num_splits=known.num_splits) == known
                blocks_in = -(-num_in // (config.block_in * (8 if bits == 4 else 1)))
                programs = -(-num_out // config.block_out) * config.num_splits
                is_filled = programs >= 2 * multiprocessors
                assert is_filled or config.num_splits == 8 or 2 * config.num_splits > blocks_in
