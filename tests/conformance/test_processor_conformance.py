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
"""Transformers' common tests of processors and image processors, on GLM-4V's with the sizes of the reference data."""

import unittest
from typing import Any

from library import REPOSITORY, KnownDeviations, load_class
from transformers import AutoConfig, AutoImageProcessor
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin


REFERENCE = REPOSITORY / "tests" / "reference" / "glm4v"
PILLOW = load_class("image_processing_chatglm.ChatGLMImageProcessorPil")
TWICE = "the tokenizer writes the opening tokens of a rendered text once more, as published; the processor does not"
SETTINGS: dict[str, Any] = {"size": {"height": 32, "width": 32}, "patch_size": 4}

AutoImageProcessor.register(type(AutoConfig.from_pretrained(REFERENCE)), image_processor_classes={"pil": PILLOW})


class ChatGLMProcessorConformanceTest(KnownDeviations, ProcessorTesterMixin, unittest.TestCase):
    processor_class = load_class("processing_chatglm.ChatGLMProcessor")
    image_token = "<|begin_of_image|><|endoftext|><|end_of_image|>"
    deviations = {f"test_apply_chat_template_image_{index}": TWICE for index in range(2)}

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return load_class("tokenization_chatglm.ChatGLM4Tokenizer").from_pretrained(REFERENCE)

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return PILLOW(**SETTINGS)


class ChatGLMImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent: Any) -> None:
        super().__init__(parent, **SETTINGS)

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": PILLOW}


class ChatGLMImageProcessorConformanceTest(KnownDeviations, ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ChatGLMImageProcessingTester
    deviations = {
        "test_call_numpy_4_channels": "every picture becomes RGB",
        "test_new_models_require_torchvision_backend": "there is one, and no torchvision in this environment",
        "test_pil_can_run_without_torchvision": "does not say that it trusts remote code",
    }
