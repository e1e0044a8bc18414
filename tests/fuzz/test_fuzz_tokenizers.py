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
"""Whatever is given to a tokenizer for ids or for a text: it is decoded and encoded, or refused with a message."""

from collections.abc import Callable
from typing import Any

import pytest
from generations import GENERATION_CASES
from hostile import ids, texts, values, whole_texts
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_conversations import refusal


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(given_ids=ids(), skips=st.sampled_from([None, True, False]))
def test_any_ids_are_decoded_or_refused(
    case_tokenizer: Callable[[str], Any], name: str, given_ids: Any, skips: bool | None
) -> None:
    tokenizer = case_tokenizer(name)
    refusal(lambda: tokenizer.decode(given_ids, skip_special_tokens=skips))
    refusal(lambda: tokenizer.batch_decode(given_ids, skip_special_tokens=skips))
    refusal(lambda: tokenizer.convert_ids_to_tokens(given_ids))


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(row=st.lists(st.one_of(st.integers(0, 700), st.integers()), max_size=12))
def test_any_numbers_give_a_text(case_tokenizer: Callable[[str], Any], name: str, row: list[int]) -> None:
    tokenizer = case_tokenizer(name)
    text = tokenizer.decode(row)
    assert isinstance(text, str)
    assert text.encode().decode() == text
    assert tokenizer.batch_decode([row, row]) == [text, text]


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "glm4"])
@given(text=whole_texts())
def test_the_text_of_a_message_comes_back(case_tokenizer: Callable[[str], Any], name: str, text: str) -> None:
    # SentencePiece writes a space that way, and cannot tell the two apart.
    tokenizer, text = case_tokenizer(name), text.replace("\u2581", " ")
    encoded, spans = tokenizer._message_encoding(text)
    assert len(encoded) == len(spans)
    assert tokenizer.decode(encoded) == text


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(text=st.one_of(texts(), st.lists(texts(), max_size=3), values()), pair=st.one_of(st.none(), texts(), values()))
def test_any_text_is_encoded_or_refused(case_tokenizer: Callable[[str], Any], name: str, text: Any, pair: Any) -> None:
    tokenizer = case_tokenizer(name)
    refusal(lambda: tokenizer(text, pair))
