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
"""Puts a checkpoint of GLM-130B together from the files of its ranks, as many as there are.

The published folder holds `latest`, the number of an iteration, and `<iteration>/mp_rank_*_model_states.pt`: each rank
has a part of every matrix. It says nothing of the model's sizes: most of them show in the shapes, and the others are those
of GLM-130B unless an `args.json` says otherwise. The parts stay on the disk until a tensor is read.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from convert_weights import Weights
from folder_switch import UpgradeError, read_json


RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
# The frequencies of rotary positions are computed from the configuration.
COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
# Split by rows, by columns, and by the rows of both halves of a gated layer; the others are in every rank as a whole.
ROWS = re.compile(r"(word_embeddings|query_key_value)\.(weight|bias)$")
COLUMNS = re.compile(r"(attention\.dense|dense_4h_to_h)\.weight$")
ROWS_OF_HALVES = re.compile(r"dense_h_to_4h\.(weight|bias)$")
# What is not in the files of GLM-130B.
PUBLISHED_SIZES = {"num_attention_heads": 96, "max_sequence_length": 2048}
PUBLISHED_WIDTH, PUBLISHED_VOCABULARY = 12288, 150528
PUBLISHED_COMMANDS = {"sop": 150004, "eop": 150005, "eos": 20002}


def find_rank_files(folder: Path) -> list[Path]:
    """The files of all ranks of the iteration that `latest` names, in order; none in another kind of folder.

    Raises:
        UpgradeError: if a rank is missing.
    """
    if not (folder / "latest").is_file():
        return []
    with open(folder / "latest", encoding="utf-8", errors="replace") as file:
        iteration = file.read(64).strip()
    if not re.fullmatch(r"\w+", iteration) or not (folder / iteration).is_dir():
        return []
    ranks = {
        int(found[1]): path for path in (folder / iteration).iterdir() if (found := RANK_FILE.fullmatch(path.name))
    }
    if missing := sorted({*range(max(ranks, default=-1) + 1)} - ranks.keys()):
        raise UpgradeError(f"{folder / iteration} lacks the files of ranks {missing} of {max(ranks) + 1}.")
    return [ranks[number] for number in sorted(ranks)]


class MergedWeights(Weights):
    """The tensors of all ranks by name, each without values until it is read."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.ranks = [_read_rank(path) for path in files]
        names = [name for name in self.ranks[0] if not COMPUTED.search(name)]
        for path, rank in zip(files, self.ranks):
            if {name for name in rank if not COMPUTED.search(name)} != {*names}:
                raise UpgradeError(f"{path} has other tensors than {files[0]}.")
        super().__init__({name: self._outline(name) for name in names})

    def _outline(self, name: str) -> torch.Tensor:
        shape = list(self.ranks[0][name].shape)
        if ROWS.search(name) or ROWS_OF_HALVES.search(name):
            shape[0] = sum(rank[name].shape[0] for rank in self.ranks)
        elif COLUMNS.search(name):
            shape[1] = sum(rank[name].shape[1] for rank in self.ranks)
        return torch.empty(shape, dtype=self.ranks[0][name].dtype, device="meta")

    def read(self, name: str) -> torch.Tensor:
        """Put a tensor together.

        Raises:
            UpgradeError: if the ranks differ in what they should share.
        """
        parts = [rank[name] for rank in self.ranks]
        if ROWS.search(name):
            return torch.cat(parts)
        if COLUMNS.search(name):
            return torch.cat(parts, dim=1)
        if ROWS_OF_HALVES.search(name):
            return torch.cat([half for halves in zip(*(part.chunk(2) for part in parts)) for half in halves])
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise UpgradeError(f"{name!r} differs between the ranks, which should all have the same.")
        return parts[0]


def _read_rank(path: Path) -> dict[str, torch.Tensor]:
    try:
        # The oldest format cannot be mapped into memory.
        content = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        weights = content["module"]
        if not all(isinstance(one, torch.Tensor) for one in weights.values()):
            raise TypeError("not all of it is tensors")
    except Exception as error:  # A damaged file raises one of many types, with several lines of advice.
        raise UpgradeError(f"{path} cannot be read as a rank's weights: {str(error).splitlines()[0]}") from error
    return weights


def make_config(folder: Path, weights: MergedWeights) -> dict[str, Any]:
    """The configuration of a merged checkpoint: from the shapes, from `args.json`, and else what GLM-130B has.

    Raises:
        UpgradeError: if a size is unknown, or is not that of the weights.
    """
    arguments = read_json(folder / "args.json")
    embedding = weights.get("transformer.word_embeddings.weight")
    first_layer = weights.get("transformer.layers.0.mlp.dense_4h_to_h.weight")
    if embedding is None or first_layer is None:
        raise UpgradeError(f"{weights.files[0]} has no word embeddings or no layers, so it is not of GLM-130B.")
    shapes = {
        "num_layers": sum(name.endswith("mlp.dense_4h_to_h.weight") for name in weights),
        "hidden_size": embedding.shape[1],
        "inner_hidden_size": first_layer.shape[1],
        "vocab_size": embedding.shape[0],
    }
    for name, size in shapes.items():
        if arguments.get(name, size) != size:
            raise UpgradeError(f"args.json says that `{name}` is {arguments[name]}, and the weights say {size}.")
    is_published = (shapes["hidden_size"], shapes["vocab_size"]) == (PUBLISHED_WIDTH, PUBLISHED_VOCABULARY)
    known: Mapping[str, Any] = {**(PUBLISHED_SIZES if is_published else {}), **arguments}
    commands: Mapping[str, Any] = {**(PUBLISHED_COMMANDS if is_published else {}), **(known.get("command_ids") or {})}
    missing = [name for name in PUBLISHED_SIZES if name not in known]
    missing += [f"command_ids.{name}" for name in PUBLISHED_COMMANDS if name not in commands]
    if missing:
        raise UpgradeError(
            f"the weights are of another size than GLM-130B's, and {', '.join(missing)} are not in them: write them "
            f"into {folder / 'args.json'}."
        )
    return {
        "model_type": "chatglm",
        "model_version": "glm130b",
        "architectures": ["GLMForConditionalGeneration"],
        **shapes,
        **{name: known[name] for name in PUBLISHED_SIZES},
        "bos_token_id": commands["sop"],
        "eos_token_id": [commands["eop"], commands["eos"]],
        "pad_token_id": commands["eos"],
        "torch_dtype": str(embedding.dtype).removeprefix("torch."),
    }


__all__ = ["MergedWeights", "find_rank_files", "make_config"]
