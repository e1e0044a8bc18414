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
"""Makes the Auto classes of Transformers load ChatGLM checkpoints with this repository's code.

A checkpoint folder then needs no `.py` files, and those it has are left alone and not run.
"""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


REPOSITORY = Path(__file__).resolve().parent.parent
# The files import each other as `from .x import y`, so they need a package around them.
PACKAGE = "chatglm_transformers"


def load_module(name: str) -> ModuleType:
    """One of the files at the top of the repository, by its name without `.py`."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(REPOSITORY)]
    sys.modules.setdefault(PACKAGE, package)
    return importlib.import_module(f"{PACKAGE}.{name}")


def register() -> ModuleType:
    """Register the classes and return the module of the models."""
    modeling = load_module("modeling_chatglm")
    config_class = load_module("configuration_chatglm").ChatGLMConfig
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(config_class, modeling.ChatGLMForConditionalGeneration, exist_ok=True)
    tokenizer_class = load_module("tokenization_chatglm").ChatGLMTokenizer
    AutoTokenizer.register(config_class, tokenizer_class=tokenizer_class, exist_ok=True)
    return modeling


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder with the class its tokenizer_config.json names."""
    register()
    tokenization = load_module("tokenization_chatglm")
    settings = folder / "tokenizer_config.json"
    name = read_json_object(settings).get("tokenizer_class") if settings.is_file() else None
    # `AutoTokenizer` can hold one class for a configuration, and GLM-4 and GLM have their own.
    default = getattr(load_module("tokenization_glm"), str(name), tokenization.ChatGLMTokenizer)
    return getattr(tokenization, str(name), default).from_pretrained(folder)


def pick_device(name: str) -> str:
    """Replace `auto` by the best device there is.

    Raises:
        ValueError: for a device that is not there.
    """
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {error}") from error
    return name


def pick_dtype(name: str, folder: Path, device: str) -> str | torch.dtype:
    """Replace `auto` by the dtype of a checkpoint folder, or by a faster one on this device."""
    if name != "auto":
        return name
    dtype = AutoConfig.from_pretrained(folder).dtype or torch.float32
    # Processors compute slowly in float16, or not at all.
    return torch.bfloat16 if device == "cpu" and dtype == torch.float16 else dtype


def check_model_type(folder: str | Path) -> None:
    """See that a folder has the config.json of a ChatGLM.

    Raises:
        OSError, ValueError: if it has none, or another model's.
    """
    model_type = read_json_object(Path(folder) / "config.json").get("model_type")
    if model_type != "chatglm":
        raise ValueError(f"the model_type of {folder} is {model_type!r}, not 'chatglm'")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, or something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
