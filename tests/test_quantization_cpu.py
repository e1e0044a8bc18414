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
"""Kernels for CPUs beside their twins in plain torch; and what a processor without them does."""

import ctypes
import functools
import mmap
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


# Out, in, columns that share a scale: of one code, of less than a block, of some blocks and a part of one. The kernels
# take rows of a weight by fours, and 32 of them at a time.
INT8_SHAPES = ((1, 1, None), (2, 63, None), (5, 65, None), (33, 127, None), (64, 128, None), (67, 300, None))
INT4_SHAPES = ((1, 2, None), (2, 62, None), (5, 66, None), (33, 130, None), (64, 256, None), (67, 300, None))
GROUP_SHAPES = ((1, 32, 32), (3, 96, 32), (37, 288, 32), (5, 64, 64), (66, 320, 64), (35, 128, 128), (34, 384, 128))
SHAPES = (
    *((8, *shape) for shape in INT8_SHAPES),
    *((4, *shape) for shape in INT4_SHAPES),
    *((4, *shape) for shape in GROUP_SHAPES),
)
HALVES = (torch.bfloat16, torch.float16)
# Half of the distance between two numbers around 1: what the last rounding may be off.
ROUNDING = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module")
def cpu(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_cpu")


@pytest.fixture(scope="module")
def kernels(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_kernels")


@pytest.fixture(scope="module")
def llvm_kernels(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("kernels_llvm")


@pytest.fixture
def two_threads(set_threads: Callable[[int], None]) -> None:
    set_threads(2)


def random_weight(
    bits: int, out_features: int, in_features: int, group_size: int | None, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out_features)
    weight = torch.randint(-128, 128, (out_features, in_features * bits // 8), generator=generator).to(torch.int8)
    shape = (out_features, in_features // group_size) if group_size else (out_features,)
    return weight, (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(scale_dtype)


def assert_rounded(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Rounded once from float64, but for what sums in float32 lose."""
    exact = exact.double()
    allowed = ROUNDING[actual.dtype] * exact.abs() + 2e-6 * exact.abs().max()
    assert actual.shape == exact.shape
    assert ((actual.double() - exact).abs() <= allowed).all()


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("bits", "out_features", "in_features", "group_size"), SHAPES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_equal_the_twin(
    dtype: torch.dtype,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int | None,
    cpu: ModuleType,
    kernels: ModuleType,
) -> None:
    weight, scale = random_weight(bits, out_features, in_features, group_size)
    for num_rows in (1, 2, 3, 4, 5, 7, 64):
        x = torch.randn(num_rows, in_features).to(dtype)
        found = cpu.find_kernels(dtype, weight, scale, in_features, num_rows)
        product = cpu.multiply_by_kernels(x, weight, scale, None, found)
        assert product.dtype == dtype
        assert_rounded(product, kernels.multiply_in_fixed_point(x, weight, scale))


# Features that older processors lack, by the beginning of LLVM's names.
OLDER_PROCESSORS = {"AVX-512 without VNNI": ("avx512vnni", "avx512bf16"), "AVX2": ("avx512",)}


@contextmanager
def older_processor(lacking: tuple[str, ...], *modules: ModuleType) -> Iterator[None]:
    """In these modules, kernels are compiled as for a processor that lacks something. All of them ran on this one."""
    llvm_kernels = sys.modules[modules[0].compile_kernel.__module__]
    features = llvm_kernels.llvm.get_host_cpu_features()
    features.update({name: False for name in features if name.startswith(lacking)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llvm_kernels, "processor_features", lambda: features)
        for module in modules:
            patch.setattr(module, "compile_kernel", functools.cache(llvm_kernels.compile_kernel.__wrapped__))
        llvm_kernels.rows_at_a_time.cache_clear()
        yield
    llvm_kernels.rows_at_a_time.cache_clear()


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("lacking", OLDER_PROCESSORS.values(), ids=OLDER_PROCESSORS)
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 32)])
def test_kernels_of_older_processors_equal_the_twin(
    bits: int, group_size: int | None, lacking: tuple[str, ...], cpu: ModuleType, kernels: ModuleType
) -> None:
    weight, scale = random_weight(bits, 37, 320, group_size)
    for num_rows in (1, 5):
        x = torch.randn(num_rows, 320).half()
        with older_processor(lacking, cpu):
            found = cpu.find_kernels(x.dtype, weight, scale, 320, num_rows)
            product = cpu.multiply_by_kernels(x, weight, scale, None, found)
        assert_rounded(product, kernels.multiply_in_fixed_point(x, weight, scale))


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("bits", "in_bytes"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_inputs_are_rounded_as_by_the_twin(
    dtype: torch.dtype, bits: int, in_bytes: bool, cpu: ModuleType, kernels: ModuleType
) -> None:
    if in_bytes and not cpu.multiplies_bytes(bits, 1):
        pytest.skip("needs a processor that multiplies bytes")
    greatest = torch.finfo(dtype).max
    special = (0, 1e-6, 1e-30, 1e-38, 1e-40, greatest, -greatest, torch.inf, -torch.inf, torch.nan)
    x = torch.randn(4 + len(special), 256) * torch.logspace(-6, 3, 4 + len(special))[:, None]
    for row, value in enumerate(special):
        x[row, 128:] *= 1e-3
        x[row, 77], x[row, 200] = (value, 0) if row % 2 else (0, value)
    x[0], x[1, :128] = 0, 1e-39
    x = x.to(dtype)
    planes, scales = torch.empty(len(x), 2, cpu.plane_bytes(in_bytes), dtype=torch.int8), torch.empty(len(x), 2)
    kernel = cpu.compile_kernel(cpu.RoundingProgram, dtype, bits, in_bytes)
    cpu.Step(kernel, 2 * len(x), x.data_ptr(), planes.data_ptr(), scales.data_ptr()).run(1)
    numbers, expected_scales = kernels.round_to_fixed_point(x)
    torch.testing.assert_close(scales, expected_scales[..., 0], rtol=0, atol=0, equal_nan=True)
    ordered = numbers[..., cpu.plane_columns(bits, in_bytes)]
    if in_bytes:
        high, low = planes[..., :256].float().chunk(2, dim=-1)
        assert (256 * high + low).equal(ordered)
        sums = planes[..., 256:].contiguous().view(torch.int32)
        assert sums.float().equal(-8 * numbers.unflatten(-1, (16, 8)).sum(-1))
    else:
        assert planes.view(torch.int16).float().equal(ordered)
    # 15 bits of the greatest number of each block.
    error = (numbers * expected_scales - x.float().view(-1, 2, 128)).abs().amax(-1)
    is_finite = expected_scales[..., 0].isfinite()
    assert is_finite.sum() == 2 * len(x) - 3
    assert (error <= expected_scales[..., 0] * 0.502)[is_finite].all()


def mapping_flags(address: int) -> list[str]:
    """What Linux says of the memory at an address: two letters each, such as `hg` for large pages."""
    is_here = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        name, *values = line.split()
        if "-" in name:
            start, stop = (int(bound, 16) for bound in name.split("-"))
            is_here = start <= address < stop
        elif is_here and name == "VmFlags:":
            return values
    return []


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists() or not Path("/proc/self/smaps").exists(),
    reason="needs Linux with large pages",
)
def test_codes_ask_for_large_pages(kernels: ModuleType) -> None:
    codes, _ = kernels.quantize_weight(torch.ones(2048, 4096), 8)
    assert "hg" in mapping_flags(codes.data_ptr() + codes.nbytes // 2)
    # Nothing to ask for.
    llvm_kernels = sys.modules[kernels.own_name.__module__]
    for tensor in (torch.empty(0), torch.empty(3), torch.empty(5, device="meta")):
        llvm_kernels.ask_for_large_pages(tensor)


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 32)])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_of_other_dtypes(
    scale_dtype: torch.dtype, bits: int, group_size: int | None, kernels: ModuleType
) -> None:
    weight, scale = random_weight(bits, 35, 160, group_size, scale_dtype)
    for dtype in HALVES:
        x = torch.randn(3, 160).to(dtype)
        assert kernels.pack_weight(weight, scale, 160) is None
        assert_rounded(kernels.quantized_linear(x, weight, scale), kernels.multiply_in_fixed_point(x, weight, scale))


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, None), (4, 32)])
def test_the_kernels_are_more_precise_than_torch(
    bits: int, group_size: int | None, kernels: ModuleType, request: pytest.FixtureRequest
) -> None:
    weight, scale = random_weight(bits, 64, 1024, group_size)
    decoded = kernels.dequantize_weight(weight, scale, 1024, torch.float64)
    # One number of each block is far greater than the others, as in real models.
    x = torch.randn(16, 1024)
    x[:, 5::128] *= 30
    errors: dict[torch.dtype, list[float]] = {dtype: [] for dtype in HALVES}
    for _ in range(2):
        packed = kernels.pack_weight(weight, scale, 1024) or ()
        for dtype, found in errors.items():
            exact = x.to(dtype).double() @ decoded.T
            product = kernels.quantized_linear(x.to(dtype), weight, scale, None, *packed)
            found.append(((product.double() - exact).norm() / exact.norm()).item())
        request.getfixturevalue("without_cpu_kernels")
    for dtype, (ours, torchs) in errors.items():
        assert ours <= torchs
        assert ours < 0.5 * ROUNDING[dtype]


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_stays_in_its_row(bits: int, kernels: ModuleType) -> None:
    weight, scale = random_weight(bits, 9, 160, None)
    x = torch.randn(5, 160).bfloat16()
    expected = kernels.quantized_linear(x, weight, scale)
    for row, value in ((1, torch.nan), (2, torch.inf), (4, -torch.inf)):
        x[row, 130] = value
    product = kernels.quantized_linear(x, weight, scale)
    assert product[[0, 3]].equal(expected[[0, 3]])
    assert product[[1, 2, 4]].isnan().all()


def protected_copies(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies that end where a page of memory does, with a page behind it that nobody may read."""
    libc = ctypes.CDLL(None)
    copies = []
    for tensor in tensors:
        size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(-1, size + mmap.PAGESIZE)
        copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
        end = ctypes.c_void_p(copy.data_ptr() + tensor.nbytes)
        assert libc.mprotect(end, mmap.PAGESIZE, 0) == 0
        copies.append(copy.view(tensor.shape).copy_(tensor))
    return copies


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("bits", "out_features", "in_features", "group_size"), SHAPES)
def test_nothing_behind_a_tensor_is_read(
    bits: int, out_features: int, in_features: int, group_size: int | None, kernels: ModuleType
) -> None:
    """A weight may end with a mapped file. This ends the process, should it fail."""
    weight, scale = random_weight(bits, out_features, in_features, group_size)
    x = torch.randn(3, in_features).bfloat16()
    expected = kernels.quantized_linear(x, weight, scale)
    assert kernels.quantized_linear(*protected_copies(x, weight, scale)).equal(expected)


@pytest.mark.usefixtures("needs_kernels", "two_threads")
def test_threads_share_a_weight(kernels: ModuleType) -> None:
    """Each of them runs several threads of its own."""
    weight, scale = random_weight(4, 1000, 512, None)
    inputs = [torch.randn(num_rows, 512).bfloat16() for num_rows in (1, 2, 3, 5) * 5]
    with torch.no_grad():
        torch.set_num_threads(1)
        expected = [kernels.quantized_linear(x, weight, scale) for x in inputs]
        torch.set_num_threads(2)
        with ThreadPoolExecutor(4) as pool:
            products = pool.map(lambda x: kernels.quantized_linear(x, weight, scale), inputs)
            assert all(product.equal(one) for product, one in zip(products, expected))


@pytest.mark.usefixtures("needs_kernels", "two_threads")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_waits_for_no_thread(cpu: ModuleType, kernels: ModuleType) -> None:
    weight, scale = random_weight(8, 100, 160, None)
    x = torch.randn(2, 160).bfloat16()
    found = cpu.find_kernels(x.dtype, weight, scale, 160, 2)
    expected = cpu.multiply_by_kernels(x, weight, scale, None, found)
    process = os.fork()
    if process == 0:
        signal.alarm(20)
        product = cpu.multiply_by_kernels(x, weight, scale, None, found)
        os._exit(0 if product.tolist() == expected.tolist() else 1)
    assert os.waitpid(process, 0)[1] == 0


def test_what_the_kernels_do_not_take(cpu: ModuleType, kernels: ModuleType) -> None:
    """Another way is found for it, or torch says what is wrong."""
    weight, scale = random_weight(4, 32, 64, None)
    codes = kernels.unpack_int4(weight)
    bfloat16 = torch.bfloat16

    def takes(weight: torch.Tensor, scale: torch.Tensor, in_features: int = 64, dtype: torch.dtype = bfloat16) -> bool:
        return cpu.find_kernels(dtype, weight, scale, in_features, 1) is not None

    assert not takes(weight, scale, dtype=torch.float32)
    assert not takes(weight, torch.ones(32, 4))  # groups of 16
    assert not takes(codes, torch.ones(32, 2))  # groups of int8
    assert not takes(codes.t().contiguous().t(), scale)
    assert not takes(weight, torch.ones(32, 2)[:, 0])
    assert not takes(weight, scale.double())
    assert not takes(weight.to("meta"), scale) and not takes(weight, scale.to("meta"))
    assert not takes(weight[:, :20], scale) and not takes(weight, scale[:31]) and not takes(weight, scale, 48)
    assert not takes(weight, torch.ones(32, 1)[:, [0, 0, 0]])
    x = torch.randn(2, 64).bfloat16()
    for one, other in ((weight[:, :20], scale), (weight, scale[:31])):
        with pytest.raises(RuntimeError):
            kernels.quantized_linear(x, one, other)
    strided = torch.empty(64, 32, dtype=torch.int8).t().copy_(codes)
    torch.testing.assert_close(
        kernels.quantized_linear(x, strided, scale), kernels.quantized_linear(x, codes, scale), rtol=0.02, atol=0.02
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processors without kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("fault", ["no llvmlite", "old llvmlite", "another processor", "no OpenMP", "compiling fails"])
def test_without_kernels_weights_are_packed(
    fault: str,
    cpu: ModuleType,
    llvm_kernels: ModuleType,
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if fault == "no llvmlite":
        monkeypatch.setattr(llvm_kernels, "ir", None)
    elif fault == "old llvmlite":
        monkeypatch.setattr(llvm_kernels.llvm, "llvm_version_info", (15, 0, 7))
    elif fault == "another processor":
        monkeypatch.setattr(llvm_kernels, "processor_features", dict)
    elif fault == "no OpenMP":
        monkeypatch.setattr(llvm_kernels, "load_openmp", lambda: None)
    else:
        monkeypatch.setattr(llvm_kernels.llvm, "parse_assembly", lambda text: 1 / 0)
    monkeypatch.setattr(llvm_kernels.logger, "propagate", True)
    monkeypatch.setattr(cpu, "compile_kernel", functools.cache(cpu.compile_kernel.__wrapped__))
    weight, scale = random_weight(4, 70, 64, 32)
    packed = kernels.pack_weight(weight, scale, 64)
    assert packed is not None and kernels.pack_weight(weight, scale, 64) is not None
    x = torch.randn(3, 64).bfloat16()
    product = kernels.quantized_linear(x, weight, scale, None, *packed)
    expected = kernels.multiply_in_fixed_point(x, weight, scale)
    assert ((product - expected).abs().max() / expected.abs().max()) < 0.016
    assert kernels.quantized_linear(x, weight, scale).shape == (3, 70)
    assert len(caplog.records) == (1 if fault == "compiling fails" else 0)


@pytest.mark.parametrize("out_features", [1, 31, 33, 64, 65, 127, 512, 577])
def test_packing_equals_torch(out_features: int, cpu: ModuleType, kernels: ModuleType) -> None:
    """Rows that fill no block are followed by rows of zeros."""
    codes = torch.randint(-8, 8, (out_features, 96), dtype=torch.int8)
    block_rows = cpu.int4_layout()[0]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -out_features % block_rows))
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded.int() + 8, 1)
    assert cpu.pack_int4_for_cpu(kernels.pack_int4(codes)).equal(expected.view(len(padded), 48))


def test_what_can_be_packed(cpu: ModuleType) -> None:
    weight = torch.zeros(32, 32, dtype=torch.int8)
    assert cpu.can_pack_int4(weight, 64)
    assert not cpu.can_pack_int4(weight, 32)  # int8 codes
    assert not cpu.can_pack_int4(weight[:, :18], 36)
    assert not cpu.can_pack_int4(cpu.pack_int4_for_cpu(weight), 64)
    assert not cpu.can_pack_int4(weight.to("meta"), 64)


@pytest.mark.parametrize("fault", ["missing", "other order", "nothing"])
@pytest.mark.usefixtures("without_cpu_kernels")
def test_a_processor_with_another_layout(
    fault: str, cpu: ModuleType, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(weight: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
        if fault == "missing":
            raise RuntimeError("not on this processor")
        highest = 1 if fault == "nothing" else 256
        return torch.randint(0, highest, (weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8)

    cpu.int4_layout.cache_clear()
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", convert)
    assert cpu.int4_layout() is None
    assert kernels.pack_weight(torch.zeros(32, 32, dtype=torch.int8), torch.ones(32), 64) is None
    cpu.int4_layout.cache_clear()


@pytest.mark.parametrize("has_kernels", [True, False])
def test_few_rows_are_multiplied_without_decoding(
    has_kernels: bool, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Which way is taken shows in no result, only in the time it takes."""
    request.getfixturevalue("needs_kernels" if has_kernels else "without_cpu_kernels")
    taken: list[str] = []

    def watch(name: str) -> None:
        original = getattr(kernels, name)

        def multiply(*args: Any) -> torch.Tensor:
            taken.append(name.removeprefix("multiply_"))
            return original(*args)

        monkeypatch.setattr(kernels, name, multiply)

    names = ("by_kernels", "matrices", "int8", "packed_int4", "many_rows")
    for name in [f"multiply_{name}" for name in names]:
        watch(name)

    def ways(
        bits: int, rows: tuple[int, ...], dtype: torch.dtype, in_features: int = 128, group_size: int | None = None
    ) -> list[str]:
        weight, scale = random_weight(bits, 48, in_features, group_size)
        packed = kernels.pack_weight(weight, scale, in_features) or ()
        for num_rows in rows:
            kernels.quantized_linear(torch.zeros(num_rows, in_features, dtype=dtype), weight, scale, None, *packed)
        found = taken.copy()
        taken.clear()
        return found

    def new_memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    matmul = kernels.find_matmul(torch.zeros(25, 64).half(), *random_weight(8, 48, 64, None), None)
    several_rows, many_rows = ("by_kernels", "many_rows") if matmul is None else ("matrices", "matrices")
    for dtype in HALVES:
        if has_kernels:
            for bits, group_size in ((8, None), (4, None), (4, 32)):
                found = ways(bits, (0, 1, 24, 25, 64, 65), dtype, group_size=group_size)
                assert found == ["many_rows", *2 * ["by_kernels"], *2 * [several_rows], many_rows]
                # Decoding all layers by one call is for what these kernels are the fastest for.
                for num_rows in (24, 25):
                    x = torch.zeros(num_rows, 128, dtype=dtype)
                    weight, scale = random_weight(bits, 48, 128, group_size)
                    steps = kernels.find_steps(x, weight, scale, None, x.new_empty(num_rows, 48), new_memory)
                    assert (steps is None) is (num_rows == 25 and several_rows == "matrices")
                found = ways(bits, (1, 64, 65), dtype, in_features=160, group_size=group_size)
                assert found == ["by_kernels", "by_kernels", "many_rows"]
            continue
        assert ways(8, (0, 1, 16, 17), dtype) == ["many_rows", "int8", "int8", "many_rows"]
        assert ways(4, (0, 1, 40, 41), dtype) == ["many_rows", "packed_int4", "packed_int4", "many_rows"]
        assert ways(4, (1,), dtype, group_size=32) == ["packed_int4"]
        # torch's operators take columns in thirty-twos.
        assert ways(8, (1,), dtype, in_features=36) == ways(4, (1,), dtype, in_features=36) == ["many_rows"]
    assert ways(8, (1,), torch.float32) == ways(4, (1,), torch.float32) == ["many_rows"]
