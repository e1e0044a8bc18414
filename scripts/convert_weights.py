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
"""Copies the weights of `pytorch_model*.bin` into safetensors files, one file in memory at a time.

Names, types, shapes and bits stay as they are: tensors stored twice are written twice, buffers too. Every tensor is
read back from the new files and compared with its source. The `.bin` files are only read.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from folder_switch import Change, UpgradeError
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.modeling_utils import load_state_dict


INDEX = "model.safetensors.index.json"


class Weights(dict[str, torch.Tensor]):
    """Tensors by name. Those of a subclass may have no values until they are read."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor with its values."""
        return self[name]


class StoredWeights(Weights):
    """The tensors of safetensors files, each without values until it is read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files: dict[str, Path] = {}
        for path in files:
            try:
                # Safetensors' own function has no device without memory.
                tensors = load_state_dict(str(path), "meta")
            except SafetensorError as error:
                raise UpgradeError(f"{path.name} cannot be read as weights: {error}") from error
            self.files |= dict.fromkeys(tensors, path)
            self.update(tensors)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


def read_weights(files: Sequence[Path], index: Mapping[str, Any]) -> Weights:
    """All tensors of the `.bin` files. Their values stay on the disk until they are used.

    Raises:
        UpgradeError: for what cannot be carried over, so that nothing is dropped silently.
    """
    weights = Weights()
    for path in files:
        try:
            # The oldest format cannot be mapped into memory.
            content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        except Exception as error:  # A damaged file raises one of many types, with several lines of advice.
            raise UpgradeError(f"{path.name} cannot be read as weights: {str(error).splitlines()[0]}") from error
        for name, tensor in content.items() if isinstance(content, dict) else [("no names", content)]:
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.is_complex():
                raise UpgradeError(f"{path.name} holds {name!r}, which is no tensor that safetensors can store.")
            if name in weights:
                raise UpgradeError(f"{name!r} is stored in {path.name} and in a file before it.")
            weights[name] = tensor
    weight_map = index.get("weight_map", {})
    if not isinstance(weight_map, dict) or weight_map.keys() - weights.keys():
        raise UpgradeError("pytorch_model.bin.index.json names weights that none of the .bin files holds.")
    return weights


def convert(weights: Weights, max_shard_size: str, change: Change) -> dict[str, str]:
    """Write the safetensors files and their index, and return their SHA-256 by name.

    Raises:
        UpgradeError: if a tensor read back differs from its source.
    """
    split = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    hashes = {}
    for name, keys in tqdm(split.filename_to_tensors.items(), desc="converting", disable=None):
        # Copies, because the format cannot hold tensors that share memory.
        shard = {key: weights.read(key).detach().clone(memory_format=torch.contiguous_format) for key in keys}
        try:
            save_file(shard, change.staged(name), metadata={"format": "pt"})
        except SafetensorError as error:  # The disk is full, for example.
            raise UpgradeError(f"{name} cannot be written: {error}") from error
        hashes[name] = change.sync(name)
        stored = load_file(change.staged(name))
        for key, tensor in shard.items():
            copy = stored[key]
            if (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape) or not torch.equal(
                as_bits(copy), as_bits(tensor)
            ):
                raise UpgradeError(f"{key!r} read back from {name} differs from its source.")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        hashes[INDEX] = change.write(INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
    return hashes


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


__all__ = ["StoredWeights", "Weights", "convert", "read_weights"]
