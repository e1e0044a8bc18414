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
"""What a tokenizer refuses: the same for text and for ids, with the value and the remedy; and ids of any size."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template


pytestmark = pytest.mark.floor

WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


# Conversations and tools, most of which one generation or another has no form for; the first seven need tools.
CONVERSATIONS: dict[str, tuple[list[Any], Any]] = {
    "tools": ([USER], [WEATHER]),
    "tools of the system message": ([{"role": "system", "content": "s", "tools": [WEATHER]}, USER], None),
    "a tool call": ([USER, call(a=1), {"role": "tool", "content": "1"}], None),
    "a tool call and text": ([USER, {**call(a=1), "content": "a"}], None),
    "metadata": ([USER, {**ANSWER, "metadata": "f"}], None),
    "only tools": ([{"role": "system", "content": "s", "tools": [WEATHER]}], None),
    "an observation": ([USER, {"role": "observation", "content": "o"}], None),
    "two questions": ([USER, USER], None),
    "an answer first": ([ANSWER], None),
    "a question": ([USER], None),
    "an answer": ([USER, ANSWER], None),
    "no messages": ([], None),
    "a tool without a name": ([USER], [{"parameters": {}}]),
    "a tool that is a word": ([USER], [{"function": "f"}]),
    "a list of words": ([USER], ["f"]),
    "an argument that is no name": ([USER, call(**{"a-b": 1})], None),
    "an argument that is no number": ([USER, call(a=float("nan"))], None),
    "a question that calls": ([{**USER, "tool_calls": call(a=1)["tool_calls"]}], None),
    "a tool with a set": ([USER], [{"name": "f", "parameters": {1, 2}}]),
    "half a character": ([{"role": "user", "content": "a\ud800"}], None),
    "half a character in a tool": ([USER], [{"name": "f", "description": "\ud800"}]),
    "half a character in metadata": ([USER, {**ANSWER, "metadata": "\udfff"}], None),
}


@pytest.mark.parametrize("name", GENERATION_CASES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_text_is_refused_where_ids_are(case_tokenizer: Callable[[str], Any], name: str, conversation: str) -> None:
    messages, tools = CONVERSATIONS[conversation]
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        outcomes = []
        for tokenize in (True, False):
            try:
                case_tokenizer(name).apply_chat_template(messages, tools=tools, tokenize=tokenize, **options)
                outcomes.append("")
            except (TypeError, ValueError) as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        assert outcomes[0] == outcomes[1], options


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2"])
@pytest.mark.parametrize("conversation", list(CONVERSATIONS)[:7])
def test_a_text_of_rounds_loses_no_tools(case_tokenizer: Callable[[str], Any], name: str, conversation: str) -> None:
    messages, tools = CONVERSATIONS[conversation]
    with pytest.raises(ValueError, match="knows no tools"):
        case_tokenizer(name).apply_chat_template(messages, tools=tools, tokenize=False)


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2"])
@pytest.mark.parametrize("conversation", list(CONVERSATIONS)[:7])
def test_a_template_of_rounds_loses_no_tools(
    case_tokenizer: Callable[[str], Any], name: str, conversation: str
) -> None:
    """Other programs render it without the tokenizer."""
    messages, tools = CONVERSATIONS[conversation]
    with pytest.raises(TemplateError, match="knows no tools|rounds of one question and one answer"):
        render_jinja_template([messages], tools=tools, chat_template=case_tokenizer(name).chat_template)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_half_a_character_is_named_wherever_it_comes_in(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    half = "\ud800ab"
    for encode in (
        lambda: tokenizer(half),
        lambda: tokenizer(["a", half], padding=True),
        lambda: tokenizer("a", half),
        lambda: tokenizer("a", text_target=half),
        lambda: tokenizer.encode(half),
        lambda: tokenizer.tokenize(half),
        lambda: tokenizer.build_chat_input("a", [(half, "b")]),
        lambda: tokenizer.build_prompt(half),
    ):
        with pytest.raises(
            ValueError, match=r"Character \d+ of a text is '\\ud800', half of a surrogate .* Repair it"
        ):
            encode()
    # The remedy that the message names.
    assert "\ud83d\ude00\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace") == "😀\ufffd"


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_a_tool_without_a_description_is_named(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    for tools in ([{"function": "f"}], [{"type": "function", "function": ["f"]}]):
        system = {"role": "system", "content": "s", "tools": tools}
        for messages, options in (([USER], {"tools": tools}), ([system, USER], {})):
            with pytest.raises(TypeError, match=r"must describe a function by a dict with its `name`.*got \[?'f'"):
                tokenizer.apply_chat_template(messages, **options)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_ids_of_any_size_give_nothing(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    ids = tokenizer.encode("ab", add_special_tokens=False)
    for index in (-1, -(2**70), 2**31, 2**32 - 1, 2**32, 2**40, 2**70):
        assert tokenizer.convert_ids_to_tokens(index) == ""
        assert tokenizer.convert_ids_to_tokens([index, *ids]) == ["", *tokenizer.convert_ids_to_tokens(ids)]
        assert tokenizer.convert_ids_to_tokens([index], skip_special_tokens=True) == [""]
        assert tokenizer.decode(index) == tokenizer.decode([index], skip_special_tokens=True) == ""
        assert tokenizer.decode([*ids, index]) == "ab"
        assert tokenizer.batch_decode([[index], ids]) == ["", "ab"]


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_special_tokens_are_marked_where_they_stand(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    encoded = tokenizer("ab", return_special_tokens_mask=True)
    again = tokenizer.get_special_tokens_mask(encoded["input_ids"], already_has_special_tokens=True)
    assert again == encoded["special_tokens_mask"]
    assert sum(again) == 2


def test_pairs_are_messages_of_one_conversation(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm3")
    ids = tokenizer.apply_chat_template([("q", "a"), {"role": "user", "content": "b"}], add_generation_prompt=True)
    assert ids["input_ids"] == tokenizer.build_chat_input("b", [("q", "a")])["input_ids"][0].tolist()


def test_an_upload_is_told_everything_about_the_repository(
    case_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_folder("chatglm3"), trust_remote_code=True)
    told: dict[str, Any] = {}
    monkeypatch.setattr(
        type(tokenizer), "push_to_hub", lambda self, name, **options: told.update(name=name, **options)
    )
    tokenizer.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/mine", private=True, commit_message="first")
    assert told == {"name": "me/mine", "private": True, "commit_message": "first"}


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2"])
def test_rounds_refuse_tools_in_any_message(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer, chat = case_tokenizer(name), [{"role": "user", "content": "q", "tools": [{"name": "f"}]}]
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="tools"):
            tokenizer.apply_chat_template(chat, tokenize=tokenize, add_generation_prompt=True)


def held_by_itself(kind: type) -> Any:
    value: Any = kind()
    value.update(a=value) if kind is dict else value.append(value)
    return value


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def shared(depth: int) -> Any:
    """A value of 200 small lists that is 2 ** 200 values long when it is written."""
    value: Any = 0
    for _ in range(depth):
        value = [value, value]
    return value


ENDLESS = {
    "a list in itself": held_by_itself(list),
    "a dict in itself": held_by_itself(dict),
    "a deep list": nested(5000),
    "a list that is deep for copies only": nested(400),
    "a list of lists that are one": shared(90),
}


@pytest.mark.parametrize("name", GENERATION_CASES)
@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_refused_wherever_it_comes_in(
    case_tokenizer: Callable[[str], Any], name: str, kind: str
) -> None:
    tokenizer, value = case_tokenizer(name), ENDLESS[kind]
    refused = "levels of nesting and 100000 values at most"
    for message in ({**USER, "extra": value}, {**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": value}}]}):
        for tokenize in (True, False):
            with pytest.raises(ValueError, match=refused):
                tokenizer.apply_chat_template([message], tokenize=tokenize)
        with pytest.raises(ValueError, match=refused):
            tokenizer.build_chat_input("q", [message])
    tool = {"name": "f", "parameters": value}
    with pytest.raises(ValueError, match="knows no tools" if tokenizer.chat_format.uses_pairs else refused):
        tokenizer.apply_chat_template([USER], tools=[tool])
    for conversation in (value, [value]):
        with pytest.raises((ValueError, TypeError)) as error:
            tokenizer.apply_chat_template(conversation)
        assert len(str(error.value)) < 1000
    if kind != "a list of lists that are one":
        for decode in (tokenizer.decode, tokenizer.batch_decode, tokenizer.convert_ids_to_tokens):
            with pytest.raises(TypeError, match="Ids are whole numbers|not supported between"):
                decode([1, value])
        with suppress(ValueError, TypeError):
            tokenizer([value])


@pytest.mark.parametrize("name", GENERATION_CASES)
@pytest.mark.parametrize(
    "given", [{}, {"a": [1]}, "ab", ["a"], [1.5], [[1], 2], [1, [2]], [[[1]]], None, [None], b"a"]
)
def test_what_is_no_id_is_named(case_tokenizer: Callable[[str], Any], name: str, given: Any) -> None:
    for decode in (case_tokenizer(name).decode, case_tokenizer(name).batch_decode):
        with pytest.raises(TypeError, match=r"Ids are whole numbers.*got (\{|'|\[|None|b)"):
            decode(given)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_nothing_and_no_text_are_refused(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    for options in ({}, {"padding": True}, {"add_special_tokens": False}):
        with pytest.raises(ValueError, match="the batch of texts is empty"):
            tokenizer([], **options)
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="at least one message"):
            tokenizer.apply_chat_template([[]], tokenize=tokenize)
    for given in (b"ab", 1, None, [], ("a", "b"), torch.zeros(2)):
        with pytest.raises(TypeError, match="takes one text, got"):
            tokenizer.tokenize(given)
    for given in ([], (), {}):
        ids = tokenizer.apply_chat_template([USER], tools=given)["input_ids"]
        assert ids == tokenizer.apply_chat_template([USER])["input_ids"]
    with pytest.raises((TypeError, ValueError), match="tools"):
        tokenizer.apply_chat_template([USER], tools=torch.zeros(2))
