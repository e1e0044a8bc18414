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
"""Transformers' own test files, made importable as `transformers_tests`, and our classes made known to them.

The source distribution holds `tests/*.py` and none of the folders beside them, so the few names that those files take
from there are given here. This runs in a process of its own (`make conformance`), because what is registered here
would reach other tests.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto, tokenization_auto


# Most tests called slow there are not slow on models of this size. Read on import.
os.environ["RUN_SLOW"] = "1"

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "transformers_tests"
TESTS = REPOSITORY / ".conformance" / "tests"
NOT_SHIPPED = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {"output_hidden_states": True, "dtype": "float16", "id2label": {0: "label"}}
    },
}
# The pictures that those files take from the Hub are one of the reference data.
PICTURE = REPOSITORY / "tests" / "reference" / "glm4v" / "images" / "wide.png"
FROM_THE_HUB = {"fetch_hub_objects_for_ci": {"url_to_local_path": lambda address: str(PICTURE)}}
# What the library's tests look up by the name of a class.
HEADS = {
    "MODEL_MAPPING_NAMES": ("ChatGLMModel",),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": ("ChatGLMForConditionalGeneration",),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": (
        "ChatGLMForSequenceClassification",
        "GLMForSequenceClassification",
    ),
}
AUTO_CLASSES = {
    AutoModel: "ChatGLMModel",
    AutoModelForCausalLM: "ChatGLMForConditionalGeneration",
    AutoModelForSequenceClassification: "ChatGLMForSequenceClassification",
}


class KnownDeviations:
    """A test class lists in `deviations` the tests that must fail, each with its reason."""

    deviations: dict[str, str] = {}

    def subTest(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:  # noqa: N802
        # What fails in a subtest leaves the test itself passing.
        return nullcontext() if self._testMethodName in self.deviations else super().subTest(*args, **kwargs)


def load_class(name: str) -> type:
    """One of our classes as remote code: `load_class("modeling_chatglm.ChatGLMModel")`."""
    return get_class_from_dynamic_module(name, str(REPOSITORY))


def add_package() -> None:
    if not TESTS.is_dir():
        raise FileNotFoundError(f"{TESTS} is not there yet: `make conformance` fetches it and runs these tests.")
    package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
    package.__path__ = [str(TESTS)]
    given = {f"{PACKAGE}.{name}": contents for name, contents in NOT_SHIPPED.items()} | FROM_THE_HUB
    for name, contents in given.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(contents)


def register() -> None:
    """The library's tests look up by class name what a head is for, and in the Auto classes what is a base model."""
    config = load_class("configuration_chatglm.ChatGLMConfig")
    AutoConfig.register(config.model_type, config)
    AutoTokenizer.register(config, fast_tokenizer_class=load_class("tokenization_chatglm.ChatGLMTokenizer"))
    # A file that names its class is read by that one.
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES["ChatGLM4Tokenizer"] = load_class(
        "tokenization_chatglm.ChatGLM4Tokenizer"
    )
    for auto_class, name in AUTO_CLASSES.items():
        auto_class.register(config, load_class(f"modeling_chatglm.{name}"))
    for names, heads in HEADS.items():
        getattr(modeling_auto, names)[config.model_type] = heads


add_package()
register()
