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
"""Tells which generation a published checkpoint folder belongs to, and refuses folders that only look alike.

The configuration is asked first. The vocabulary has to agree with it: ChatGLM-6B has `ice_text.model`, ChatGLM2 and
ChatGLM3 share a SentencePiece `tokenizer.model`, GLM-4's `tokenizer.model` lists base64 tokens and their ranks.
"""

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folder_switch import UpgradeError


CODE = Path(__file__).resolve().parent.parent

MODEL_VERSIONS = ("chatglm", "chatglm2", "chatglm3", "glm4")
# Kinds of vocabulary, and the generations that have them.
VOCABULARIES = {
    "the vocabulary ice_text.model": ("chatglm",),
    "a SentencePiece vocabulary": ("chatglm2", "chatglm3"),
    "a tiktoken vocabulary": ("glm4",),
    "a tokenizer.json": MODEL_VERSIONS,
}
# Keys of relatives that see images.
IMAGE_KEYS = ("vision_config", "eva_config", "qformer_config", "image_size", "image_length", "boi_token_id")
WEIGHTS = ("pytorch_model*.bin", "model*.safetensors")
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was recognised."""

    folder: Path
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    model_version: str
    reason: str

    @property
    def weights(self) -> list[Path]:
        return sorted({path for pattern in WEIGHTS for path in self.folder.glob(pattern)})


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; of one that does not exist, `{}`."""
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UpgradeError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UpgradeError(f"{path} does not hold a JSON object.")
    return content


def recognise(folder: Path, asked: str | None) -> Checkpoint:
    """Tell the generation of a published folder.

    Args:
        folder: the checkpoint.
        asked: the generation according to the user, if they say.

    Raises:
        UpgradeError: for anything that is not a ChatGLM checkpoint, or not clearly of one generation.
    """
    if not (folder / "config.json").exists():
        hint = ""
        if (folder / "adapter_config.json").exists():
            hint = " It holds an adapter: upgrade the folder of its base model instead."
        raise UpgradeError(f"{folder} has no config.json, so it is not a checkpoint folder.{hint}")
    config = read_json(folder / "config.json")
    refuse_other_families(config)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    vocabulary = find_vocabulary(folder)
    model_version, reason = tell_version(folder, config, tokenizer_config, vocabulary, asked)
    if model_version not in VOCABULARIES[vocabulary]:
        raise UpgradeError(
            f"the folder contradicts itself: {reason} says {model_version}, but it holds {vocabulary}, which is that of "
            f"{' and '.join(VOCABULARIES[vocabulary])}. If no files of two checkpoints were mixed, settle it with "
            "--model-version."
        )
    checkpoint = Checkpoint(folder, config, tokenizer_config, model_version, f"{reason}; {vocabulary}")
    for path in checkpoint.weights:
        refuse_pointer(path)
    return checkpoint


def refuse_other_families(config: Mapping[str, Any]) -> None:
    """Stop at checkpoints that only look alike."""
    model_type = config.get("model_type")
    image_keys = [key for key in IMAGE_KEYS if key in config]
    if image_keys:
        raise UpgradeError(
            f"config.json has {image_keys[0]!r}, so this model sees images (GLM-4V, VisualGLM, CogVLM, ...); those are "
            "not supported."
        )
    if str(model_type).startswith("glm") and "auto_map" not in config:
        raise UpgradeError(
            f"config.json has the model type {model_type!r}, which Transformers loads itself, without remote code: there "
            "is nothing to upgrade. Load the folder without trust_remote_code."
        )
    if model_type != "chatglm":
        raise UpgradeError(f"config.json has the model type {model_type!r}; ChatGLM checkpoints have 'chatglm'.")


def find_vocabulary(folder: Path) -> str:
    """Tell the kind of vocabulary, a key of `VOCABULARIES`, by the content of the file."""
    names = [name for name in ("ice_text.model", "tokenizer.model") if (folder / name).is_file()]
    if len(names) == 2:
        raise UpgradeError(
            "the folder holds two vocabularies, ice_text.model and tokenizer.model; one is of another model."
        )
    if not names:
        if (folder / "tokenizer.json").is_file():
            return "a tokenizer.json"
        raise UpgradeError(
            f"{folder} has no vocabulary (ice_text.model or tokenizer.model). Copy it and tokenizer_config.json from the "
            "checkpoint that this one was made from."
        )
    start = refuse_pointer(folder / names[0])
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", start):
        kind = "a tiktoken vocabulary"
    elif start.startswith(b"\n"):  # The first field of a protobuf message.
        kind = "the vocabulary ice_text.model" if names[0] == "ice_text.model" else "a SentencePiece vocabulary"
    else:
        raise UpgradeError(f"{names[0]} is no SentencePiece model and no list of base64 tokens and ranks.")
    return kind


def refuse_pointer(path: Path) -> bytes:
    """The first bytes of a file that Git LFS has really fetched."""
    with open(path, "rb") as file:
        start = file.read(200)
    if start.startswith(LFS_POINTER):
        raise UpgradeError(f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder.")
    return start


def tell_version(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], vocabulary: str, asked: str | None
) -> tuple[str, str]:
    """The generation and what tells it: the user, the configuration, the vocabulary, the tokenizer, the folder's name.

    The name in tokenizer_config.json tells nothing: ChatGLM2-6B's is "THUDM/chatglm-6b".
    """
    sys.path.insert(0, str(CODE))
    try:
        from configuration_chatglm import infer_model_version
    finally:
        sys.path.remove(str(CODE))
    names = ("model_version", "_name_or_path", "name_or_path")
    by_keys = infer_model_version({key: value for key, value in config.items() if key not in names})
    if asked is not None:
        if by_keys not in (None, asked):
            raise UpgradeError(f"--model-version {asked}, but the keys of config.json are those of {by_keys}.")
        return asked, "--model-version"
    try:
        by_config = infer_model_version(dict(config))
    except ValueError as error:
        raise UpgradeError(f"config.json: {error}") from error
    of_vocabulary = VOCABULARIES[vocabulary]
    if by_config is None and len(of_vocabulary) == 1:
        return of_vocabulary[0], "the vocabulary"
    by_tokenizer = version_of_tokenizer(folder, tokenizer_config) if vocabulary.startswith("a SentencePiece") else None
    is_open = "model_version" not in config and by_config in ("chatglm2", "chatglm3", None)
    if is_open and by_tokenizer and by_config not in (None, by_tokenizer):
        raise UpgradeError(
            f"config.json says {by_config}, the tokenizer's files say {by_tokenizer}: settle it with --model-version "
            f"{by_config} or --model-version {by_tokenizer}."
        )
    if by_config or by_tokenizer:
        return by_config or by_tokenizer, "config.json" if by_config else "the tokenizer's files"
    # In a cache of the Hub the folder has the name of the revision, and the one above it that of the repository.
    names = [folder.name, folder.parent.parent.name if folder.parent.name == "snapshots" else ""]
    for name in names:
        if by_name := infer_model_version({"_name_or_path": name}):
            return by_name, f"the folder's name, {name}"
    raise UpgradeError(
        "nothing tells ChatGLM2 from ChatGLM3 here: say --model-version chatglm2 or --model-version chatglm3."
    )


def version_of_tokenizer(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """ChatGLM3 has role tokens, ChatGLM2 writes rounds; the published tokenizer code has one of the two."""
    if "<|observation|>" in json.dumps(tokenizer_config):
        return "chatglm3"
    code = folder / "tokenization_chatglm.py"
    text = code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""
    has_roles, has_rounds = "<|observation|>" in text, "[Round" in text
    # This repository's own code, copied in by hand, is the same for every generation.
    if has_roles == has_rounds or "conversation_chatglm" in text:
        return None
    return "chatglm3" if has_roles else "chatglm2"


__all__ = ["CODE", "MODEL_VERSIONS", "Checkpoint", "read_json", "recognise"]
