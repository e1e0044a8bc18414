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

The kernels have to compile in every supported version of Triton, which a release of torch brings: 3.2 in torch 2.6 (only
those that decode a weight), 3.3 in torch 2.7, and so on. To compile in another version, here and in `make test-grid`:

    pip install --no-deps --target DIR triton==3.2.0 && PYTHONPATH=DIR python -m pytest tests/test_triton_compile.py
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
# Instructions of the main loop for each weight, everything counted, by the rows of a block. An H200 can issue 3.9 in the
# time that an int4 weight takes from memory, and twice that for int8.
MOST_INSTRUCTIONS = {
    "int4": {8: 2.4, 16: 3.0, 32: 3.9},
    "int4-128": {8: 3.0, 16: 3.7, 32: 4.7},
    "int4-64": {8: 3.0, 16: 3.7, 32: 4.7},
    "int4-32": {8: 3.0, 16: 3.7, 32: 4.7},
    "int8": {8: 3.3, 16: 3.9, 32: 4.9},
}
# Columns at the end of a row that fill no block cost masks.
MASKS = 0.5

WEIGHTS = {"int4": (4, None), "int4-128": (4, 128), "int4-64": (4, 64), "int4-32": (4, 32), "int8": (8, None)}
ROWS = (8, 16, 32)
EVERYTHING = [
    (arch, weight, rows, dtype)
    for arch in SHARED_MEMORY
    for weight in WEIGHTS
    for rows in ROWS
    for dtype in ("fp16", "bf16")
]
# Every weight, dtype and number of rows on the two architectures that data centres have most, together; elsewhere the
# kernels of published checkpoints.
COMMON = {
    (80, "int4", 8, "bf16"), (80, "int4-128", 16, "fp16"), (80, "int4-32", 32, "bf16"), (80, "int8", 16, "fp16"),
    (90, "int4", 16, "fp16"), (90, "int4-64", 16, "bf16"), (90, "int8", 8, "bf16"), (90, "int8", 32, "fp16"),
    (86, "int4", 8, "bf16"), (89, "int4", 16, "fp16"), (100, "int8", 16, "bf16"), (120, "int4", 16, "bf16"),
}  # fmt: skip
COMMON_AMD = {("int4",), ("int4-32",), ("int8",)}
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
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
    """Compile as the runtime would where all pointers and sizes are multiples of 16; it knows nothing of `num_rows`."""
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names if name not in constants}
    aligned = [place for place, name in enumerate(names) if name in signature and name != "num_rows"]
    if TRITON_VERSION < (3, 3):
        from triton.backends.compiler import AttrsDescriptor

        known = {"arg_properties": {"tt.divisibility": aligned, "tt.equal_to": []}, "cls": "AttrsDescriptor"}
        described = {"signature": signature, "constants": constants, "attrs": AttrsDescriptor.from_dict(known)}
    else:
        described = {
            "signature": {name: signature.get(name, "constexpr") for name in names},
            "constexprs": constants,
            "attrs": {(place,): [["tt.divisibility", 16]] for place in aligned},
        }
    source = ASTSource(fn=kernel, **described)
    if isinstance(arch, str) and TRITON_VERSION < (3, 5):
        pytest.skip("this version of Triton needs ROCm's linker")
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


def name_of(arch: int | str) -> str:
    return arch if isinstance(arch, str) else f"sm_{arch}"


def compile_few_rows(
    kernels: ModuleType, arch: int | str, weight: str, rows: int, dtype: str
) -> tuple[Any, Any, bool]:
    """A kernel for few rows in its configuration: whole blocks for 8 rows as in most layers, else with masks."""
    oldest = kernels.OLDEST_TRITON_OF.get(name_of(arch), kernels.OLDEST_TRITON)
    if oldest > TRITON_VERSION or (TRITON_VERSION < (3, 5) and rows < 16):
        pytest.skip("never launched in this version of Triton")
    bits, group_size = WEIGHTS[weight]
    is_hip = isinstance(arch, str)
    config = kernels.few_rows_config(name_of(arch), bits, group_size is not None, rows, TRITON_VERSION)
    assert config.block_rows == rows
    is_even = rows == 8
    types = {"scale_ptr": "*fp16"} | dict.fromkeys(("x_ptr", "bias_ptr", "output_ptr"), f"*{dtype}")
    constants = {"BLOCK_OUT": config.block_out, "BLOCK_IN": config.block_in, "BLOCK_ROWS": config.block_rows}
    constants |= {"PARTS": config.parts, "HAS_BIAS": True, "IS_EVEN": is_even, "ASSEMBLY": not is_hip}
    if bits == 8:
        kernel, types = kernels.int8_few_rows_kernel, types | {"codes_ptr": "*i8"}
    else:
        kernel, types = kernels.int4_few_rows_kernel, types | {"words_ptr": "*i32"}
        constants["GROUP_WORDS"] = (group_size or 0) // 8
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return config, compile_kernel(kernel, types, constants, arch, **options), is_even


@pytest.mark.parametrize(("arch", "weight", "rows", "dtype"), common_first(EVERYTHING, COMMON))
def test_few_rows_on_nvidia(
    kernels: ModuleType, arch: int, weight: str, rows: int, dtype: str, record_property: Callable
) -> None:
    config, compiled, is_even = compile_few_rows(kernels, arch, weight, rows, dtype)
    code, bits = read_machine_code(compiled), WEIGHTS[weight][0]
    weights = config.block_out * config.block_in * config.parts * (8 if bits == 4 else 1)
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
    assert code.count("I2F") == 0
    assert code.count("PRMT") > 0
    assert code.count("LOP3") > 0
    # What is multiplied goes from shared memory into the registers of the tensor cores, not back and forth.
    assert code.count("STS") <= 4 + code.count("LDGSTS")
    if TRITON_VERSION >= (3, 5):
        assert per_weight < MOST_INSTRUCTIONS[weight][rows] + (0 if is_even else MASKS)


@pytest.mark.parametrize("weight", common_first([(weight,) for weight in WEIGHTS], COMMON_AMD))
def test_few_rows_on_amd(kernels: ModuleType, weight: str) -> None:
    _, compiled, _ = compile_few_rows(kernels, "gfx942", weight, 16, "fp16")
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


@pytest.mark.parametrize("triton_version", [(3, 3), (3, 4), (3, 5), (4, 0)], ids=str)
@pytest.mark.parametrize("arch", [*SHARED_MEMORY, 87, 121, "gfx942", "gfx90a"])
def test_no_other_configuration(kernels: ModuleType, arch: int | str, triton_version: tuple[int, int]) -> None:
    """All configurations are compiled above, or are those of a chip that is."""
    has_small_products = triton_version >= (3, 5) and not isinstance(arch, str)
    for bits, is_grouped in ((4, False), (4, True), (8, False)):
        for num_rows in range(1, kernels.FEW_ROWS + 1):
            config = kernels.few_rows_config(name_of(arch), bits, is_grouped, num_rows, triton_version)
            smallest = 8 if has_small_products else 16
            assert config.block_rows == next((rows for rows in ROWS if rows >= max(num_rows, smallest)), ROWS[-1])
            assert config.parts <= config.num_warps
            if arch in (87, 121):  # unknown: what fits everywhere
                assert (
                    config
                    in kernels.SMALL_SHARED_MEMORY["int8" if bits == 8 else ("int4 groups" if is_grouped else "int4")]
                )
    assert set(kernels.FEW_ROWS_CONFIGS) == {name_of(arch) for arch in SHARED_MEMORY} | {"gfx942", "sm", "gfx"}


@pytest.mark.parametrize(
    ("arch", "oldest"),
    [("sm_80", (3, 3)), ("sm_90", (3, 3)), ("gfx942", (3, 3)), ("sm_120", (3, 4)), ("sm_121", (3, 4))],
)
def test_no_kernel_is_launched_that_an_older_triton_cannot_compile(
    kernels: ModuleType, arch: str, oldest: tuple[int, int]
) -> None:
    major, minor = oldest
    for version in ((3, 2), (3, 3), (3, 4), (3, 5), (4, 0)):
        assert kernels.has_few_rows_kernel(arch, 4, None, 1, 4096, version) == (version >= (major, minor))


def test_what_is_decoded_instead(kernels: ModuleType) -> None:
    """Too many rows, columns that are no whole words, and groups that are no power of two."""
    assert kernels.has_few_rows_kernel("sm_90", 4, 32, kernels.FEW_ROWS, 4096, (3, 7))
    for group_size, num_rows, in_features in (
        (32, kernels.FEW_ROWS + 1, 4096),
        (None, 1, 36),
        (96, 1, 960),
        (32, 0, 64),
    ):
        assert not kernels.has_few_rows_kernel("sm_90", 4, group_size, num_rows, in_features, (3, 7))
