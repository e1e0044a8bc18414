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
"""The files of a P-tuning v2 prefix.

What is unusual here: the published training scripts save the prefix alone, under its names in the whole model
(`transformer.prefix_encoder.embedding.weight`, ...), in a checkpoint folder of the Trainer. It is looked for in any file
or folder that a prefix or a model is saved as.
"""

import filecmp
import json
import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig


# Where weights are in a folder, in the library's order, and what a prefix alone is saved as.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREFIX_FILES = ("prefix_encoder.safetensors", "prefix_encoder.bin")
PREFIX_KEY = "prefix_encoder."


def read_prefix_file(file: Path) -> dict[str, torch.Tensor]:
    """Read the prefix encoder out of a file of weights, `.safetensors`, a `.json` index of shards, or else PyTorch's.

    Returns:
        Its tensors, by their names in a [`PrefixEncoder`]; nothing if there is none in the file.

    Raises:
        OSError: if the file or a shard of it is not there.
        ValueError: if it is not a file of weights. Nothing in it is executed.
    """
    try:
        if file.suffix == ".json":
            shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({shard for key, shard in shards.items() if PREFIX_KEY in key})
            return {name: tensor for shard in files for name, tensor in read_prefix_file(file.parent / shard).items()}
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                return {key.split(PREFIX_KEY)[1]: stored.get_tensor(key) for key in stored.keys() if PREFIX_KEY in key}
        # Only what is used is read of a whole model. Files of old versions of PyTorch are not zipped.
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {key.split(PREFIX_KEY)[1]: tensor.clone() for key, tensor in stored.items() if PREFIX_KEY in key}
    except (AttributeError, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is not a file of weights: {error}") from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        # What PyTorch says invites to execute whatever is in the file.
        raise ValueError(f"{file} is not a file of weights, or is damaged or holds more than tensors.") from error


def find_prefix(path: Path) -> dict[str, torch.Tensor]:
    """Read the prefix encoder out of a file, or of the files in a folder that a prefix or a model is saved as.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no weights in the folder.
        ValueError: if there are weights, but none of a prefix encoder.
    """
    files = [path]
    if path.is_dir():
        files = [path / name for name in PREFIX_FILES + WEIGHT_FILES if (path / name).is_file()]
    if not files or not path.exists():
        what = f"has none of {PREFIX_FILES + WEIGHT_FILES}" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"There is no prefix to load: {path} {what}.")
    for file in files:
        if weights := read_prefix_file(file):
            return weights
    raise ValueError(
        f"There is no prefix in {', '.join(map(str, files))}: no name of a weight holds `{PREFIX_KEY}`, as "
        "`transformer.prefix_encoder.embedding.weight` does. Was it trained without `pre_seq_len`?"
    )


def check_stored_prefix(config: PreTrainedConfig, folder: Path) -> None:
    """Compare the prefix in a checkpoint folder, if it has one, with the one that is asked for.

    Raises:
        ValueError: with both lengths, or both values of `prefix_projection`.
    """
    weights = next((read_prefix_file(folder / name) for name in WEIGHT_FILES if (folder / name).is_file()), {})
    if "embedding.weight" not in weights:
        return
    stored = {
        "pre_seq_len": len(weights["embedding.weight"]),
        "prefix_projection": any(name.startswith("trans.") for name in weights),
    }
    for name, value in stored.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{folder} holds a trained prefix with `{name}={value}`, and `{name}={getattr(config, name)}` is asked "
                "for. Ask for what is stored, or train a new prefix on a checkpoint without one."
            )


def free_backup(file: Path) -> Path:
    """The first of NAME.bak, NAME.bak.1, ... that does not exist."""
    backup, count = file.with_name(f"{file.name}.bak"), 0
    while os.path.lexists(backup):
        count += 1
        backup = file.with_name(f"{file.name}.bak.{count}")
    return backup


def write_prefix(weights: dict[str, torch.Tensor], path: Path) -> Path:
    """Write a prefix in float32; a different file of that name becomes `NAME.bak`, or `NAME.bak.1`, ...

    Args:
        weights: by the names they get in the file.
        path: a name that ends in `.safetensors` or `.bin` (PyTorch's format), or else a folder, which is made.

    Returns:
        The file.

    Raises:
        ValueError: if a file is where the folder should be.
    """
    file = path if path.suffix in (".safetensors", ".bin") else path / PREFIX_FILES[0]
    if blocking := [str(folder) for folder in file.parents if folder.is_file()]:
        raise ValueError(f"{blocking[0]} is a file. Give a folder, or a name that ends in .safetensors or .bin.")
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        if file.suffix == ".bin":
            with new.open("wb") as stream:
                torch.save(weights, stream)
        else:
            save_file(weights, new, metadata={"format": "pt"})
        if file.is_file() and not filecmp.cmp(new, file, shallow=False):
            file.rename(free_backup(file))
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    return file


__all__ = ["PREFIX_KEY", "check_stored_prefix", "find_prefix", "write_prefix"]
