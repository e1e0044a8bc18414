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
"""Whatever a model writes: reading it raises nothing, runs nothing, and gives values that JSON can hold."""

import ast
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from generations import CALLING_GENERATIONS, GENERATION_CASES, GENERATIONS
from hostile import answers, json_values, nothing_runs, texts
from hypothesis import given
from hypothesis import strategies as st


# What may stand before an answer: nothing, a system message with tools, or one without.
OFFERS: list[list[dict[str, Any]]] = [
    [],
    [{"role": "system", "content": "s", "tools": []}, {"role": "user", "content": "q"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
]


@pytest.fixture(scope="module")
def conversation(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("conversation_chatglm")


def is_json(value: Any) -> bool:
    """Whether a value is one that any program can read back from its JSON text."""
    return json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("version", GENERATIONS)
@given(text=answers(), offer=st.sampled_from(OFFERS))
def test_any_answer_is_read(conversation: ModuleType, version: str, text: str, offer: list[dict[str, Any]]) -> None:
    chat_format = conversation.CONVERSATION_FORMATS[version]
    # The generations that know no tools are asked without.
    messages = [
        {key: value for key, value in message.items() if key != "tools" or not chat_format.uses_pairs}
        for message in offer
    ]
    with nothing_runs():
        response, added = chat_format.read_answer(text, messages)
        history = chat_format.native_history(messages + added)
    assert isinstance(response, str) or set(response) in ({"name", "parameters"}, {"name", "content"})
    assert isinstance(response, str) or isinstance(response["name"], str)
    if isinstance(response, dict) and "parameters" in response:
        assert isinstance(response["parameters"], dict)
        assert is_json(response["parameters"])
    assert added and all(message["role"] == "assistant" for message in added)
    # The conversation goes on from there.
    assert chat_format.normalize_messages(history)


@given(text=st.one_of(texts(24), answers()))
def test_any_text_is_a_call_or_none(conversation: ModuleType, text: str) -> None:
    with nothing_runs():
        arguments = conversation.parse_tool_call(text)
    assert arguments is None or is_json(arguments)


@given(text=texts(8))
def test_a_call_in_python_is_what_python_reads(conversation: ModuleType, text: str) -> None:
    arguments = conversation.parse_tool_call(f"tool_call(a={text})")
    if arguments is None:
        return
    call = ast.parse(f"tool_call(a={text}\n)", mode="eval").body
    assert isinstance(call, ast.Call)
    expected = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert arguments == json.loads(json.dumps(expected))


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
@given(
    name=texts(3),
    arguments=st.dictionaries(st.one_of(st.just("a"), st.text(max_size=6)), json_values(), max_size=3),
)
def test_a_call_that_is_written_is_read(
    conversation: ModuleType, version: str, name: str, arguments: dict[str, Any]
) -> None:
    chat_format = conversation.CONVERSATION_FORMATS[version]
    try:
        message = chat_format.write_tool_call(name, arguments)
    except ValueError as error:
        assert str(error)
        return
    answer = f"{message['metadata']}\n{message['content']}"
    response, _ = chat_format.read_answer(answer, OFFERS[1])
    # An answer of several parts gives the last one.
    if "<|assistant|>" not in answer:
        # As JSON has them: two halves of a character that stand together are that character.
        assert response == {"name": name, "parameters": json.loads(json.dumps(arguments))}


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(text=answers(), prefix=texts(2))
def test_the_library_reads_any_answer(case_tokenizer: Callable[[str], Any], name: str, text: str, prefix: str) -> None:
    tokenizer = case_tokenizer(name)
    if tokenizer.response_template is not None:
        # The library's parser takes time by the square of an answer that has no end.
        text = text[:4000]
        assert tokenizer.parse_response(text, prefix=prefix)["role"] == "assistant"
