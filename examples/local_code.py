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

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


REPOSITORY = Path(__file__).resolve().parent.parent
# The files import each other as `from .x import y`, so they need a package around them.
PACKAGE = "chatglm_transformers"


def register() -> ModuleType:
    """Register the classes and return the module of the models."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(REPOSITORY)]
    sys.modules.setdefault(PACKAGE, package)
    configuration, tokenization, modeling = (
        importlib.import_module(f"{PACKAGE}.{name}_chatglm") for name in ("configuration", "tokenization", "modeling")
    )
    config_class = configuration.ChatGLMConfig
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(config_class, modeling.ChatGLMForConditionalGeneration, exist_ok=True)
    AutoTokenizer.register(config_class, tokenizer_class=tokenization.ChatGLMTokenizer, exist_ok=True)
    return modeling


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder with the class its tokenizer_config.json names."""
    register()
    tokenization = importlib.import_module(f"{PACKAGE}.tokenization_chatglm")
    settings = folder / "tokenizer_config.json"
    name = json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") if settings.is_file() else None
    # `AutoTokenizer` can hold one class for a configuration, and GLM-4 has one of its own.
    return getattr(tokenization, name or "", tokenization.ChatGLMTokenizer).from_pretrained(folder)
