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
"""Whatever a caller or a user puts into a conversation: it is written as text, or refused with a message."""

from collections.abc import Callable
from typing import Any

import pytest
from generations import GENERATION_CASES
from hostile import contents, conversations, histories, nothing_runs, texts, tools, values
from hypothesis import given
from hypothesis import strategies as st


def refusal(call: Callable[[], Any]) -> str | None:
    """What a call was refused with; it may raise nothing but a ValueError or a TypeError that says something."""
    try:
        call()
    except (ValueError, TypeError) as error:
        assert str(error)
        assert len(str(error)) < 2000, str(error)[:2000]
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(chat=histories(), offered=st.one_of(st.none(), st.none(), tools()), asks=st.booleans())
def test_any_conversation_is_written_or_refused(
    case_tokenizer: Callable[[str], Any], name: str, chat: Any, offered: Any, asks: bool
) -> None:
    tokenizer = case_tokenizer(name)
    outcomes = [
        refusal(
            lambda tokenize=tokenize: tokenizer.apply_chat_template(
                chat, tools=offered, add_generation_prompt=asks, tokenize=tokenize
            )
        )
        for tokenize in (True, False)
    ]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(query=contents(), history=st.one_of(st.none(), histories()), role=st.sampled_from(["user", "system", "x"]))
def test_any_chat_input_is_built_or_refused(
    case_tokenizer: Callable[[str], Any], name: str, query: Any, history: Any, role: str
) -> None:
    tokenizer = case_tokenizer(name)
    refusal(lambda: tokenizer.build_chat_input(query, history, role))
    refusal(lambda: tokenizer.build_prompt(query, history))
    refusal(lambda: tokenizer.build_single_message(role, "", query))


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(chat=conversations(), asks=st.booleans())
def test_no_control_token_comes_from_text(
    case_tokenizer: Callable[[str], Any], name: str, chat: list[dict[str, Any]], asks: bool
) -> None:
    """The special ids of a conversation are those of its control segments, whatever its messages say."""
    tokenizer = case_tokenizer(name)
    chat_format = tokenizer.chat_format
    chat = chat if asks else [*chat, {"role": "assistant", "content": chat[0]["content"]}]
    encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=asks)["input_ids"]
    segments = chat_format.segments(chat_format.normalize_messages(chat), asks)
    expected = [*chat_format.opening_tokens, *(segment.text for segment in segments if segment.is_special)]
    special_ids = tokenizer._special_ids(chat_format)
    assert [index for index in encoded if index in special_ids.values()] == [special_ids[token] for token in expected]
    if asks:
        query = chat[-1]["content"]
        assert tokenizer.build_chat_input(query, chat[:-1])["input_ids"][0].tolist() == encoded
    # What another program renders to text and encodes later is the same.
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == encoded


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(text=texts(20), has_opening=st.booleans())
def test_any_text_is_encoded_as_if_rendered(
    case_tokenizer: Callable[[str], Any], name: str, text: str, has_opening: bool
) -> None:
    tokenizer = case_tokenizer(name)
    text = "".join(tokenizer.chat_format.opening_tokens) * has_opening + text
    refusal(lambda: tokenizer(text, add_special_tokens=False))
    refusal(lambda: tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast))


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(arguments=values())
def test_calls_with_any_arguments_are_written_or_refused(
    case_tokenizer: Callable[[str], Any], name: str, arguments: Any
) -> None:
    chat_format = case_tokenizer(name).chat_format
    with nothing_runs():
        refusal(lambda: chat_format.write_tool_call("f", arguments))
