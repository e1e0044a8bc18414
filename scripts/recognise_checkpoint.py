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
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folder_switch import UpgradeError, read_json


CODE = Path(__file__).resolve().parent.parent

# Kinds of vocabulary: the generations that have them.
ICE_TEXT = "the vocabulary ice_text.model"
SENTENCEPIECE = "a SentencePiece vocabulary"
TIKTOKEN = "a tiktoken vocabulary"
FAST = "a tokenizer.json"
VOCABULARIES = {ICE_TEXT: ("chatglm",), SENTENCEPIECE: ("chatglm2", "chatglm3"), TIKTOKEN: ("glm4",), FAST: ()}

# Keys of relatives that see images.
IMAGE_KEYS = ("vision_config", "eva_config", "qformer_config", "image_size", "image_length", "boi_token_id")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was recognised."""

    folder: Path
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    generation: str
    reason: str

    @property
    def weights(self) -> list[Path]:
        return sorted({*self.folder.glob("pytorch_model*.bin"), *self.folder.glob("model*.safetensors")})

    @property
    def tokenizer_class(self) -> str:
        return "ChatGLM4Tokenizer" if self.generation in VOCABULARIES[TIKTOKEN] else "ChatGLMTokenizer"


def recognise(folder: Path, asked: str | None) -> Checkpoint:
    """Tell the generation of a published folder.

    Args:
        folder: the checkpoint.
        asked: the generation according to the user, if they say.

    Raises:
        UpgradeError: for anything that is not a ChatGLM checkpoint, or not clearly of one generation.
    """
    config = read_json(folder / "config.json")
    if not config:
        is_adapter = (folder / "adapter_config.json").exists()
        hint = " It holds an adapter: upgrade the folder of its base model instead." if is_adapter else ""
        raise UpgradeError(f"{folder} has no config.json, so it is not a checkpoint folder.{hint}")
    refuse_other_families(config)
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    vocabulary = find_vocabulary(folder)
    try:
        generation, reason = tell_generation(folder, config, tokenizer_config, vocabulary, asked)
    except (ValueError, TypeError) as error:  # A name that does not exist, or that is no text.
        raise UpgradeError(f"{'--model-version' if asked else 'config.json'}: {error}") from error
    if VOCABULARIES[vocabulary] and generation not in VOCABULARIES[vocabulary]:
        raise UpgradeError(
            f"the folder contradicts itself: {reason} says {generation}, but it holds {vocabulary}, which is that of "
            f"{' and '.join(VOCABULARIES[vocabulary])}. If no files of two checkpoints were mixed, settle it with "
            "--model-version."
        )
    checkpoint = Checkpoint(folder, config, tokenizer_config, generation, f"{reason}; {vocabulary}")
    for path in checkpoint.weights:
        read_start(path)
    return checkpoint


def refuse_other_families(config: Mapping[str, Any]) -> None:
    """Stop at checkpoints that only look alike."""
    model_type = config.get("model_type")
    if image_keys := [key for key in IMAGE_KEYS if key in config]:
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
            return FAST
        raise UpgradeError(
            f"{folder} has no vocabulary (ice_text.model or tokenizer.model). Copy it and tokenizer_config.json from the "
            "checkpoint that this one was made from."
        )
    start = read_start(folder / names[0])
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", start):
        return TIKTOKEN
    if start.startswith(b"\n"):  # The first field of a protobuf message.
        return ICE_TEXT if names[0] == "ice_text.model" else SENTENCEPIECE
    raise UpgradeError(f"{names[0]} is no SentencePiece model and no list of base64 tokens and ranks.")


def read_start(path: Path) -> bytes:
    """The first bytes of a file that Git LFS has really fetched."""
    with open(path, "rb") as file:
        start = file.read(200)
    if start.startswith(b"version https://git-lfs"):
        raise UpgradeError(f"{path.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder.")
    return start


def tell_generation(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], vocabulary: str, asked: str | None
) -> tuple[str, str]:
    """The generation and what tells it, the surest first; a name that somebody gave the checkpoint comes last.

    The name in tokenizer_config.json tells nothing: ChatGLM2-6B's is "THUDM/chatglm-6b".
    """
    sys.path.insert(0, str(CODE))
    try:  # Not before, for the library behind it takes its time.
        from configuration_chatglm import infer_model_version as infer_generation
    finally:
        sys.path.remove(str(CODE))
    if asked is not None:
        infer_generation({"model_version": asked})  # Refuses a name that does not exist.
        return asked, "--model-version"
    unnamed = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    if generation := infer_generation(unnamed):
        return generation, "config.json"
    if len(VOCABULARIES[vocabulary]) == 1:
        return VOCABULARIES[vocabulary][0], "the vocabulary"
    if vocabulary == SENTENCEPIECE and (generation := generation_of_tokenizer(folder, tokenizer_config)):
        return generation, "the tokenizer's files"
    if generation := infer_generation(dict(config)):
        return generation, "the name in config.json"
    # In a cache of the Hub the folder has the name of the revision, and the one above it that of the repository.
    for name in (folder.name, folder.parent.parent.name if folder.parent.name == "snapshots" else ""):
        if generation := infer_generation({"_name_or_path": name}):
            return generation, f"the folder's name, {name}"
    raise UpgradeError(
        "nothing tells ChatGLM2 from ChatGLM3 here: say --model-version chatglm2 or --model-version chatglm3."
    )


def generation_of_tokenizer(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """ChatGLM3 has role tokens, ChatGLM2 writes rounds; the published tokenizer code has one of the two."""
    if "<|observation|>" in json.dumps(tokenizer_config):
        return "chatglm3"
    code = folder / "tokenization_chatglm.py"
    text = code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""
    has_roles, has_rounds = "<|observation|>" in text, "[Round" in text
    # This repository's own code is the same for every generation; it alone has imports of this form.
    if has_roles == has_rounds or "\nfrom ." in text:
        return None
    return "chatglm3" if has_roles else "chatglm2"


__all__ = ["CODE", "Checkpoint", "recognise"]
