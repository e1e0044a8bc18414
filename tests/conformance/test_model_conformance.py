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
"""Transformers' common configuration, model and training tests, on tiny models of every generation."""

import unittest
from typing import Any

import pytest
import torch
from generations import TINY
from library import KnownDeviations, load_class
from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification, GlmModel
from transformers.testing_utils import torch_device
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin


ChatGLMConfig = load_class("configuration_chatglm.ChatGLMConfig")
ChatGLMModel = load_class("modeling_chatglm.ChatGLMModel")
ChatGLMForConditionalGeneration = load_class("modeling_chatglm.ChatGLMForConditionalGeneration")
ChatGLMForSequenceClassification = load_class("modeling_chatglm.ChatGLMForSequenceClassification")

GLMForSequenceClassification = load_class("modeling_glm.GLMForSequenceClassification")

DECODERS = (ChatGLMModel, ChatGLMForConditionalGeneration)
GENERATION = {"test_generation_tester_mixin_inheritance": "the source distribution has no GenerationTesterMixin"}
RENAMING = {"test_reverse_loading_mapping": "names are those a checkpoint came with; a new model has one of two sets"}


class ChatGLMModelTester:
    """What the mixins ask for: the sizes, a configuration with them, and an input."""

    batch_size, seq_length, is_training = 4, 7, True
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 32, 4, 99
    causal_lm_class = ChatGLMForConditionalGeneration

    def __init__(self, **options: Any) -> None:
        self.options = options

    def get_config(self) -> Any:
        sizes = {
            "num_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "kv_channels": 8,
            "multi_query_group_num": 2,
            "ffn_hidden_size": 48,
            "padded_vocab_size": self.vocab_size,
            "seq_length": 128,
        }
        return ChatGLMConfig(**sizes | self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        # Padding on the left: none in the first row, one more in each that follows.
        attention_mask = torch.ones_like(input_ids).triu()
        inputs = {"input_ids": input_ids.to(torch_device), "attention_mask": attention_mask.to(torch_device)}
        return self.get_config(), inputs


class VisionSettings(dict[str, Any]):
    """A dict, as in `config.json`; the library's tests set attributes on it."""


class PictureModelTester(ChatGLMModelTester):
    """The same with a picture in each row, behind the padding, its placeholder written once for each of its vectors."""

    vision_config = VisionSettings(
        image_size=56,
        patch_size=14,
        num_positions=17,
        hidden_size=24,
        num_heads=4,
        num_hidden_layers=2,
        intermediate_size=40,
    )
    num_vectors, seq_length = 4, 11
    begin, placeholder, end = 3, 4, 5

    def get_config(self) -> Any:
        self.options |= {"vision_config": self.vision_config, "boi_token_id": self.begin, "eoi_token_id": self.end}
        return super().get_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        config, inputs = super().prepare_config_and_inputs_for_common()
        picture = [self.begin, *[self.placeholder] * self.num_vectors, self.end]
        first = self.batch_size - 1
        ids = inputs["input_ids"].clamp(min=self.end + 1)
        ids[:, first : first + len(picture)] = torch.tensor(picture, device=ids.device)
        pixels = torch.rand(self.batch_size, 3, 56, 56, generator=torch.Generator().manual_seed(1))
        return config, {**inputs, "input_ids": ids, "pixel_values": pixels.to(torch_device)}


class TextAlone:
    """For configurations without eyes, whose classes have the method that GLM-4V's needs."""

    def _image_features_prepare_config_and_inputs(self) -> Any:
        self.skipTest("the model reads text alone; `get_image_features` says so")


class GenerationConformanceTest(KnownDeviations, TextAlone, ModelTesterMixin, TrainingTesterMixin):
    """The bare model, the language model and the classifier of a generation."""

    all_model_classes = (*DECODERS, ChatGLMForSequenceClassification)
    deviations = GENERATION | RENAMING

    def test_config(self) -> None:
        ConfigTester(self, config_class=ChatGLMConfig, hidden_size=128).run_common_tests()


class ChatGLM6BConformanceTest(GenerationConformanceTest, unittest.TestCase):
    model_tester = ChatGLMModelTester(**TINY["chatglm"])


# ChatGLM2 and GLM-4 have the network of ChatGLM3, with other positions.
@pytest.mark.grid
class ChatGLM2ConformanceTest(GenerationConformanceTest, unittest.TestCase):
    model_tester = ChatGLMModelTester(**TINY["chatglm2"])


class ChatGLM3ConformanceTest(GenerationConformanceTest, unittest.TestCase):
    model_tester = ChatGLMModelTester(model_version="chatglm3")


@pytest.mark.grid
class GLM4ConformanceTest(GenerationConformanceTest, unittest.TestCase):
    model_tester = ChatGLMModelTester(**TINY["glm4"])


class GLMConformanceTest(GenerationConformanceTest, unittest.TestCase):
    """GLM-10B and its relatives, with a classifier of their own."""

    all_model_classes = (*DECODERS, GLMForSequenceClassification)
    model_tester = ChatGLMModelTester(model_version="glm")
    deviations = {
        **GENERATION,
        **RENAMING,
        "test_load_with_mismatched_shapes": "of a model type the Auto classes know one classifier; folders name theirs",
        "test_training_overfit": "labels of GLM are aligned with its ids, so what it learns here is to repeat a token",
    }


class PrefixConformanceTest(KnownDeviations, TextAlone, ModelTesterMixin, unittest.TestCase):
    """With a prefix of P-tuning v2, which alone is trained."""

    all_model_classes = DECODERS
    model_tester = ChatGLMModelTester(model_version="chatglm3", pre_seq_len=4)
    deviations = {
        **GENERATION,
        **RENAMING,
        "test_attention_outputs": "tokens attend to the prefix as well",
        "test_retain_grad_hidden_states_attentions": "before the first layer nothing is trained",
    }


class GLM4VConformanceTest(KnownDeviations, ModelTesterMixin, unittest.TestCase):
    """With pictures."""

    all_model_classes = (*DECODERS, ChatGLMForSequenceClassification)
    model_tester = PictureModelTester(model_version="glm4")
    deviations = {
        **GENERATION,
        **RENAMING,
        "test_inputs_embeds": "only ids say where a picture stands",
        "test_inputs_embeds_matches_input_ids": "only ids say where a picture stands",
    }


class NativeGlmTester(ChatGLMModelTester):
    causal_lm_class = GlmForCausalLM

    def get_config(self) -> Any:
        return GlmConfig(
            num_hidden_layers=self.num_hidden_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            head_dim=8,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=self.vocab_size,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )


@pytest.mark.grid
class NativeGlmConformanceTest(KnownDeviations, ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """For comparison: the library's own GLM-4."""

    all_model_classes = (GlmModel, GlmForCausalLM, GlmForSequenceClassification)
    model_tester = NativeGlmTester()
    deviations = GENERATION
