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
"""Copies the weights of `pytorch_model*.bin` into safetensors files, one tensor in memory at a time.

The names, types, shapes and bits stay as they are: tensors stored twice are written twice, buffers too. Every tensor
is read back from the new files and compared with its source. The `.bin` files are only read.
"""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from folder_switch import UpgradeError, write_file
from safetensors import safe_open
from tqdm import tqdm


SINGLE_BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
SINGLE_SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor and where it is stored."""

    name: str
    source: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


class BinReader:
    """Reads tensors of `.bin` files, with the file last used open: memory-mapped if it is of the zip format."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.tensors: dict[str, torch.Tensor] = {}

    def bits(self, entry: Entry) -> torch.Tensor:
        """The bytes of a tensor, in order."""
        if entry.source != self.path:
            self.tensors = {}
            mmap = zipfile.is_zipfile(entry.source)
            self.tensors = torch.load(entry.source, map_location="cpu", mmap=mmap, weights_only=True)
            self.path = entry.source
        return as_bits(self.tensors[entry.name])


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def bin_files(folder: Path) -> list[Path]:
    """The files with the weights in the old format; none if there are none.

    Raises:
        UpgradeError: for a shard that the index names and the folder lacks.
    """
    index = folder / BIN_INDEX
    if not index.is_file():
        return [path for path in [folder / SINGLE_BIN] if path.is_file()]
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.is_file():
            raise UpgradeError(f"{BIN_INDEX} names {path.name}, which is not in the folder.")
    return files


def list_entries(folder: Path) -> list[Entry]:
    """What `.bin` files hold, without reading the values.

    Raises:
        UpgradeError: for what cannot be carried over, so that nothing is dropped silently.
    """
    entries: dict[str, Entry] = {}
    for path in bin_files(folder):
        for name, tensor in torch.load(path, map_location="meta", weights_only=True).items():
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in TYPE_NAMES:
                raise UpgradeError(f"{path.name} holds {name!r}, which is no tensor that safetensors can store.")
            if name in entries:
                raise UpgradeError(f"{name!r} is stored in {entries[name].source.name} and again in {path.name}.")
            size = tensor.numel() * tensor.element_size()
            entries[name] = Entry(name, path, tensor.dtype, tuple(tensor.shape), size)
    if (index := folder / BIN_INDEX).is_file():
        absent = json.loads(index.read_text(encoding="utf-8"))["weight_map"].keys() - entries.keys()
        if absent:
            raise UpgradeError(f"{BIN_INDEX} names {min(absent)!r}, which no file holds.")
    return list(entries.values())


def plan_shards(entries: Sequence[Entry], max_size: int) -> dict[str, list[Entry]]:
    """Spread tensors over files of at most `max_size` bytes of weights (a larger tensor has a file of its own)."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.size > room:
            shards.append([])
            room = max_size
        shards[-1].append(entry)
        room -= entry.size
    if len(shards) == 1:
        return {SINGLE_SAFETENSORS: shards[0]}
    count = len(shards)
    return {f"model-{index:05}-of-{count:05}.safetensors": shard for index, shard in enumerate(shards, start=1)}


def write_shards(shards: dict[str, list[Entry]], target: Path) -> dict[str, str]:
    """Write the files of `plan_shards` and their index, and compare them with their sources.

    Returns:
        The SHA-256 of each file that was written.

    Raises:
        UpgradeError: if a tensor read back differs from its source.
    """
    total = sum(entry.size for shard in shards.values() for entry in shard)
    hashes = {}
    with tqdm(total=2 * total, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for name, shard in shards.items():
            reader = BinReader()
            hashes[name] = _write_shard(target / name, shard, reader, bar)
            _compare_shard(target / name, shard, reader, bar)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in shards.items() for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        content = (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
        hashes[SAFETENSORS_INDEX] = write_file(target / SAFETENSORS_INDEX, [content])
    return hashes


def _write_shard(path: Path, shard: Sequence[Entry], reader: BinReader, bar: tqdm) -> str:
    """The safetensors format: the length of the header, the header, the bytes of the tensors."""
    # Wide types first, so that every tensor is aligned.
    ordered = sorted(shard, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        span = [position, position := position + entry.size]
        header[entry.name] = {"dtype": TYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": span}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks():
        yield len(text).to_bytes(8, "little") + text
        for entry in ordered:
            yield reader.bits(entry).numpy().data
            bar.update(entry.size)

    return write_file(path, chunks())


def _compare_shard(path: Path, shard: Sequence[Entry], reader: BinReader, bar: tqdm) -> None:
    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != {entry.name for entry in shard}:
            raise UpgradeError(f"{path.name} does not hold the tensors it should.")
        for entry in shard:
            tensor = file.get_tensor(entry.name)
            same = tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape
            if not same or not torch.equal(as_bits(tensor), reader.bits(entry)):
                raise UpgradeError(f"{entry.name!r} read back from {path.name} differs from its source.")
            bar.update(entry.size)


__all__ = ["bin_files", "list_entries", "plan_shards", "write_shards"]
