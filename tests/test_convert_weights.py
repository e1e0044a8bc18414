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
"""`--safetensors` of the upgrade command carries every bit of a `.bin` file over, or refuses."""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import convert_weights  # noqa: E402
from folder_switch import Change, UpgradeError  # noqa: E402


def odd_tensors() -> dict[str, torch.Tensor]:
    """What a checkpoint may hold: shared and strided storage, scalars, nothing, a NaN with a payload."""
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    types = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return {
        "lm_head.weight": shared,
        "word_embeddings.weight": shared,
        "row": shared[1],
        "transposed": shared.t(),
        "inv_freq": torch.tensor([0x7E01], dtype=torch.int16).view(torch.float16),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "权重": torch.tensor([-0.0, float("nan")], dtype=torch.float64),
        **{str(dtype): torch.tensor([1, 2, 3]).to(dtype) for dtype in types},
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("max_size", ["0.001KB", "0.06KB", "1GB"])
def test_same_bits(zipped: bool, max_size: str, tmp_path: Path) -> None:
    tensors = odd_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with Change(tmp_path) as change:
        hashes = convert_weights.convert(
            convert_weights.read_weights([tmp_path / "pytorch_model.bin"], {}), max_size, change
        )
    for name, digest in hashes.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    files = {name: load_file(tmp_path / name) for name in hashes.keys() - {convert_weights.INDEX}}
    stored = {key: tensor for part in files.values() for key, tensor in part.items()}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (tensor.dtype, tensor.shape)
        assert convert_weights.as_bits(stored[name]).tolist() == convert_weights.as_bits(tensor).tolist(), name
    assert (len(files) == 1) == (max_size == "1GB")
    if len(files) > 1:
        weight_map = json.loads((tmp_path / convert_weights.INDEX).read_bytes())["weight_map"]
        assert weight_map == {key: name for name, part in files.items() for key in part}


def test_a_damaged_copy_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(odd_tensors(), tmp_path / "pytorch_model.bin")

    def damage(tensors: Any, path: Path, save_file: Any = convert_weights.save_file, **options: Any) -> None:
        save_file(tensors, path, **options)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    monkeypatch.setattr(convert_weights, "save_file", damage)
    with pytest.raises(UpgradeError, match="differs from its source"), Change(tmp_path) as change:
        convert_weights.convert(convert_weights.read_weights([tmp_path / "pytorch_model.bin"], {}), "1GB", change)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"weight": torch.ones(1)}}, "'state_dict', which is no tensor"),
        ({"phase": torch.ones(1, dtype=torch.complex64)}, "'phase', which is no tensor"),
        ({1: torch.ones(1)}, "1, which is no tensor"),
        ([torch.ones(1)], "which is no tensor"),
        ({"weight": torch.ones(1)}, "'weight' is stored in b.bin and in a file before it"),
    ],
)
def test_what_cannot_be_carried_over(content: Any, message: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in files:
        torch.save(content, path)
    with pytest.raises(UpgradeError, match=message):
        convert_weights.read_weights(files, {})
