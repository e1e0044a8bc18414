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
"""Transformers' common tokenizer tests, on the small tokenizers of the reference data."""

import unittest

from library import REPOSITORY, KnownDeviations, load_class
from sentencepiece import SentencePieceProcessor
from transformers_tests.test_tokenization_common import TokenizersBackendTesterMixin, TokenizerTesterMixin


REFERENCE = REPOSITORY / "tests" / "reference"
PUBLISHED_NAME = load_class("tokenization_chatglm.ChatGLMTokenizer")
TEXT = TokenizerTesterMixin.integration_test_input_string
TRAINED = "compares the decoded text with the normalized one, in which `▁` stands for every space"
WHOLE_MASK = "the published mask is [1, length, length], and there only where rows are padded or made a tensor"
START = "`<s>` is the first token even where a file says None, as published"
ONE_WORD = "the words of a text are one word to the Rust tokenizer, which splits nowhere"


def written_by_sentencepiece(name: str) -> tuple[list[str], list[int], str]:
    """The library's text as pieces, as ids, and decoded again."""
    pieces = SentencePieceProcessor(model_file=str(REFERENCE / name / "tokenizer.model"))
    ids = pieces.encode(TEXT)
    return pieces.encode(TEXT, out_type=str), ids, pieces.decode(ids)


class TokenizerConformanceTest(KnownDeviations, TokenizerTesterMixin):
    tokenizer_class = PUBLISHED_NAME
    # The classes read `tokenizer.model` or `ice_text.model`; they are not made from a vocabulary and merges.
    test_tokenizer_from_extractor = False


class RustTokenizerConformanceTest(TokenizersBackendTesterMixin, TokenizerConformanceTest):
    tokenizer_class = PUBLISHED_NAME
    deviations = {
        "test_add_bos_token_without_bos_token": START,
        "test_alignment_methods": ONE_WORD,
        "test_training_new_tokenizer": TRAINED,
        "test_training_new_tokenizer_with_special_tokens_change": TRAINED,
    }

    @classmethod
    def setUpClass(cls) -> None:
        TokenizersBackendTesterMixin.setUpClass.__func__(cls)
        TokenizerTesterMixin.setUpClass.__func__(cls)


class ChatGLM6BTokenizerConformanceTest(TokenizerConformanceTest, unittest.TestCase):
    from_pretrained_id = str(REFERENCE / "chatglm1")
    deviations = {
        "test_added_tokens_serialization": "named tokens are kept as text, as published",
        "test_batch_encode_dynamic_overflowing": WHOLE_MASK,
        "test_batch_encode_plus_batch_sequence_length": WHOLE_MASK,
        "test_batch_encode_plus_padding": WHOLE_MASK,
        "test_encode_plus_with_padding_0": WHOLE_MASK,
        "test_encode_plus_with_padding_1": WHOLE_MASK,
        "test_padding_to_multiple_of": WHOLE_MASK,
        "test_padding_with_attention_mask": WHOLE_MASK,
        "test_prepare_seq2seq_batch": WHOLE_MASK,
    }


class ChatGLM2TokenizerConformanceTest(RustTokenizerConformanceTest, unittest.TestCase):
    from_pretrained_id = str(REFERENCE / "chatglm2")
    integration_expected_tokens, integration_expected_token_ids, integration_expected_decoded_text = (
        written_by_sentencepiece("chatglm2")
    )


class ChatGLM3TokenizerConformanceTest(RustTokenizerConformanceTest, unittest.TestCase):
    from_pretrained_id = str(REFERENCE / "chatglm3")
    integration_expected_tokens, integration_expected_token_ids, integration_expected_decoded_text = (
        written_by_sentencepiece("chatglm3")
    )


class GLM4TokenizerConformanceTest(RustTokenizerConformanceTest, unittest.TestCase):
    tokenizer_class = load_class("tokenization_chatglm.ChatGLM4Tokenizer")
    from_pretrained_id = str(REFERENCE / "glm4")
    deviations = {
        "test_add_bos_token_without_bos_token": "`[gMASK]<sop>` come first whatever a file says, as published"
    }
