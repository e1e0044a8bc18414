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
"""Choosing among the ways to multiply on a CPU, and the order of bytes that torch's int4 operator wants."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def cpu(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization_cpu")


@pytest.fixture(scope="module")
def pack_int4(source: Callable[[str], ModuleType]) -> Callable[[torch.Tensor], torch.Tensor]:
    return source("quantization").pack_int4


def random_codes(out_features: int, in_features: int) -> torch.Tensor:
    return torch.randint(-8, 8, (out_features, in_features), generator=torch.Generator().manual_seed(2)).to(torch.int8)


@pytest.mark.parametrize("out_features", [1, 31, 33, 64, 65, 127, 512, 577])
def test_packing_equals_torch(out_features: int, cpu: ModuleType, pack_int4: Callable) -> None:
    """Rows that fill no block are followed by rows of zeros."""
    codes = random_codes(out_features, 96)
    block_rows = cpu.int4_layout()[0]
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -out_features % block_rows))
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded.int() + 8, 1)
    assert cpu.pack_int4_for_cpu(pack_int4(codes)).equal(expected.view(len(padded), 48))


def test_what_can_be_packed(cpu: ModuleType) -> None:
    weight = torch.zeros(32, 32, dtype=torch.int8)
    assert cpu.can_pack_int4(weight, 64)
    assert not cpu.can_pack_int4(weight, 32)  # int8 codes
    assert not cpu.can_pack_int4(weight[:, :18], 36)
    assert not cpu.can_pack_int4(cpu.pack_int4_for_cpu(weight), 64)
    assert not cpu.can_pack_int4(weight.to("meta"), 64)


@pytest.mark.parametrize("fault", ["missing", "other order", "nothing"])
def test_a_processor_with_another_layout(fault: str, cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(weight: torch.Tensor, inner_k_tiles: int) -> torch.Tensor:
        if fault == "missing":
            raise RuntimeError("not on this processor")
        highest = 1 if fault == "nothing" else 256
        return torch.randint(0, highest, (weight.shape[0], weight.shape[1] // 2), dtype=torch.uint8)

    cpu.int4_layout.cache_clear()
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", convert)
    assert cpu.int4_layout() is None
    assert cpu.pack_weight_for_cpu(torch.zeros(32, 32, dtype=torch.int8), torch.ones(32), 64) is None
    cpu.int4_layout.cache_clear()


def test_few_rows_go_to_the_operators_of_torch(
    cpu: ModuleType, pack_int4: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which way is taken shows in no result, only in the time it takes."""
    taken = []
    for name in ("multiply_int8", "multiply_packed_int4", "multiply_many_rows"):
        original = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *args, original=original: taken.append(original.__name__) or original(*args)
        )

    def way(layout: str, num_rows: int, dtype: torch.dtype, in_features: int = 64, num_groups: int = 0) -> str:
        codes = random_codes(48, in_features)
        weight = codes if layout == "int8" else pack_int4(codes)
        scale = torch.ones(48, num_groups) if num_groups else torch.ones(48)
        packed = cpu.pack_weight_for_cpu(weight, scale, in_features) if layout == "packed" else ()
        cpu.cpu_quantized_linear(torch.zeros(num_rows, in_features, dtype=dtype), weight, scale, *packed)
        return taken.pop().removeprefix("multiply_")

    for dtype in (torch.bfloat16, torch.float16):
        assert [way("int8", rows, dtype) for rows in (0, 1, 16, 17)] == ["many_rows", "int8", "int8", "many_rows"]
        rows = (0, 1, 40, 41)
        assert [way("packed", rows, dtype) for rows in rows] == [
            "many_rows",
            "packed_int4",
            "packed_int4",
            "many_rows",
        ]
        assert way("packed", 1, dtype, num_groups=2) == "packed_int4"
        # In bfloat16 the int8 operator is wrong unless columns are a multiple of 32.
        assert way("int8", 1, dtype, in_features=36) == way("int4", 1, dtype) == "many_rows"
    assert way("int8", 1, torch.float32) == way("packed", 1, torch.float32) == "many_rows"
