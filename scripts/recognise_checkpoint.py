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
"""Tells which generation a published checkpoint folder belongs to, and refuses folders of other models.

Whether the weights and the vocabulary are those of that generation shows when the folder is tried.
"""

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from folder_switch import UpgradeError, read_json


CODE = Path(__file__).resolve().parent.parent
# Transformers has models of its own under these names.
LIBRARY_MODEL_TYPES = ("glm", "glm4")
# The name under which the modules there are importable, so that `from .x import y` works in them.
CODE_PACKAGE = "chatglm_code"
VOCABULARIES = ("ice_text.model", "tokenizer.model", "cog-pretrain.model", "vocab.json", "tokenizer.json")
# Generations whose published folders hold no vocabulary.
WITHOUT_VOCABULARY = ("glm130b",)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was recognised."""

    folder: Path
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    generation: str
    reason: str
    # GLM-130B's, which are in the files of its ranks.
    merged: Any = None

    @property
    def tokenizer_class(self) -> str:
        names = {"glm4": "ChatGLM4Tokenizer", "glm4v": "ChatGLM4Tokenizer", "glm": "GLMGPT2Tokenizer"}
        if (self.folder / "cog-pretrain.model").is_file():
            return "GLMChineseTokenizer"
        return names.get(self.generation, "ChatGLMTokenizer")

    @property
    def tokenizer_module(self) -> str:
        return {"glm": "tokenization_glm"}.get(self.generation, "tokenization_chatglm")

    @property
    def tokenizer_generation(self) -> str:
        """Whose vocabulary it is: GLM-130B's is that of the first ChatGLM-6B."""
        return {"glm130b": "chatglm"}.get(self.generation, self.generation)

    @property
    def has_vocabulary(self) -> bool:
        return any((self.folder / name).is_file() for name in VOCABULARIES)

    @property
    def weights(self) -> list[Path]:
        return sorted({*self.folder.glob("pytorch_model*.bin"), *self.folder.glob("model*.safetensors")})


def recognise(folder: Path, asked: str | None) -> Checkpoint:
    """Tell the generation of a published folder.

    Args:
        folder: the checkpoint.
        asked: the generation according to the user, if they say.

    Raises:
        UpgradeError: for anything that is not a ChatGLM checkpoint, or not clearly of one generation.
    """
    config, merged = read_json(folder / "config.json"), merge_ranks(folder)
    if merged is not None and not config:
        # Imported late, for torch takes its time.
        from merge_ranks import make_config

        config = make_config(folder, merged)
    if not config:
        is_adapter = (folder / "adapter_config.json").exists()
        hint = " It holds an adapter: upgrade the folder of its base model instead." if is_adapter else ""
        raise UpgradeError(f"{folder} has no config.json, so it is not a checkpoint folder.{hint}")
    refuse_other_models(config)
    vocabularies = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
    if not vocabularies and config.get("model_version") not in WITHOUT_VOCABULARY:
        raise UpgradeError(
            f"{folder} has no vocabulary ({' or '.join(VOCABULARIES)}). Copy it and tokenizer_config.json from the "
            "checkpoint that this one was made from."
        )
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    try:
        generation, reason = tell_generation(folder, config, tokenizer_config, asked)
    except (ValueError, TypeError) as error:  # A name that does not exist, or that is no text.
        raise UpgradeError(f"{'--model-version' if asked else 'config.json'}: {error}") from error
    checkpoint = Checkpoint(folder, config, tokenizer_config, generation, reason, merged)
    for path in [*vocabularies, *checkpoint.weights]:
        if read_start(path).startswith("version https://git-lfs"):
            raise UpgradeError(f"{path.name} is a Git LFS pointer, not the file: run `git lfs pull` in the folder.")
    return checkpoint


def merge_ranks(folder: Path) -> Any:
    """The weights of a published folder of GLM-130B, `None` for all others, and where they are merged already."""
    if not (folder / "latest").is_file() or any(folder.glob("model*.safetensors*")):
        return None
    from merge_ranks import MergedWeights, find_rank_files

    files = find_rank_files(folder)
    return MergedWeights(files) if files else None


def is_first_glm(config: Mapping[str, Any]) -> bool:
    """Whether this is the GLM of before ChatGLM, whose model type the library has given to another network."""
    code = load_code("configuration_generations")
    generation = code.infer_model_version({key: value for key, value in config.items() if key != "model_version"})
    features = code.GENERATION_FEATURES.get(generation)
    return features is not None and features.published_model_type == config.get("model_type")


def refuse_other_models(config: Mapping[str, Any]) -> None:
    """Raise an `UpgradeError` for what is no ChatGLM and no GLM, or sees images too."""
    if (model_type := config.get("model_type")) != "chatglm" and not is_first_glm(config):
        hint = ""
        if model_type in LIBRARY_MODEL_TYPES:
            hint = " This is one of the library's own folders (`-hf`): load it as it is, without `trust_remote_code`."
        raise UpgradeError(f"config.json has the model type {model_type!r}; ChatGLM checkpoints have 'chatglm'.{hint}")
    try:
        load_code("configuration_generations").refuse_images(config)
    except ValueError as error:
        raise UpgradeError(str(error)) from error


def read_start(path: Path) -> str:
    """As much of a file as code needs, empty if there is no such file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(2**18).decode(errors="replace")


def load_code(name: str) -> ModuleType:
    """One of this repository's modules. Not loaded before it is needed: the library behind some takes its time."""
    package = sys.modules.setdefault(CODE_PACKAGE, ModuleType(CODE_PACKAGE))
    package.__path__ = [str(CODE)]
    return importlib.import_module(f"{CODE_PACKAGE}.{name}")


def tell_generation(
    folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], asked: str | None
) -> tuple[str, str]:
    """The generation and what tells it, the surest first; a name that somebody gave the checkpoint comes last.

    The name in tokenizer_config.json tells nothing: ChatGLM2-6B's is "THUDM/chatglm-6b".
    """
    infer_generation = load_code("configuration_generations").infer_model_version
    unnamed = {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}
    # In a cache of the Hub the folder has the name of the revision, and the one above it that of the repository.
    name = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    for generation, reason in (
        (asked and infer_generation({"model_version": asked}), "--model-version"),
        (infer_generation(unnamed), "the keys of config.json"),
        (generation_of_tokenizer(folder, tokenizer_config), "the tokenizer's files"),
        (infer_generation(dict(config)), "the name in config.json"),
        (infer_generation({"_name_or_path": name}), f"the folder's name, {name}"),
    ):
        if generation:
            return generation, reason
    raise UpgradeError(
        "nothing tells which generation this is: say --model-version chatglm2 or --model-version chatglm3, for example."
    )


def generation_of_tokenizer(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """What the files of the tokenizer say: ChatGLM3 has role tokens, ChatGLM2's published code writes rounds."""
    if (folder / "ice_text.model").is_file():
        return "chatglm"
    text = read_start(folder / "tokenization_chatglm.py")
    if "\nfrom ." in text:  # This repository's own code: it is the same for every generation.
        text = ""
    text += json.dumps(tokenizer_config)
    signs = {"ChatGLM4Tokenizer": "glm4", "<|observation|>": "chatglm3", "[Round": "chatglm2"}
    return next((generation for sign, generation in signs.items() if sign in text), None)


__all__ = ["CODE", "WITHOUT_VOCABULARY", "Checkpoint", "load_code", "read_start", "recognise"]
