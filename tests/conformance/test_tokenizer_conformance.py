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
"""Transformers' common tokenizer tests, on the small ChatGLM3 tokenizer of the reference data."""

import unittest

from library import REPOSITORY, KnownDeviations, load_class
from sentencepiece import SentencePieceProcessor
from transformers_tests.test_tokenization_common import TokenizersBackendTesterMixin, TokenizerTesterMixin


CHECKPOINT = REPOSITORY / "tests" / "reference" / "chatglm3"
TEXT = TokenizerTesterMixin.integration_test_input_string
PIECES = SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
TRAINED = "compares the decoded text with the normalized one, in which `▁` stands for every space"


class TokenizerConformanceTest(KnownDeviations, TokenizersBackendTesterMixin, TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = load_class("tokenization_chatglm.ChatGLMTokenizer")
    from_pretrained_id = str(CHECKPOINT)
    integration_expected_tokens = PIECES.encode(TEXT, out_type=str)
    integration_expected_token_ids = PIECES.encode(TEXT)
    integration_expected_decoded_text = PIECES.decode(PIECES.encode(TEXT))
    # The class reads `tokenizer.model`; it is not made from a vocabulary and merges.
    test_tokenizer_from_extractor = False
    deviations = {
        "test_add_bos_token_without_bos_token": "`<s>` is the first token even where a file says None, as published",
        "test_alignment_methods": "the words of a text are one word to the Rust tokenizer, which splits nowhere",
        "test_training_new_tokenizer": TRAINED,
        "test_training_new_tokenizer_with_special_tokens_change": TRAINED,
    }

    @classmethod
    def setUpClass(cls) -> None:
        TokenizersBackendTesterMixin.setUpClass.__func__(cls)
        TokenizerTesterMixin.setUpClass.__func__(cls)
