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
"""Answers as the vocabularies decode them: both parsers read the same in them, and text is streamed without delay.

An answer is encoded as the model is trained on it, and its ids are decoded, because a vocabulary puts spaces where a
text written by hand has none. On the published vocabularies where `$CHATGLM_REFERENCE_DIR` is set, and on small ones.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generations import CALLING_GENERATIONS, RECORDED, ROLE_CASES
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser


pytestmark = pytest.mark.floor

PARAMETERS = {"days": {"type": "integer"}, "sure": {"type": "boolean"}, "none": {"type": ["string", "null"]}}
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": PARAMETERS}}
QUESTION = [
    {"role": "system", "content": "帮忙。", "tools": [WEATHER]},
    {"role": "user", "content": "北京今天多少度？"},
]
TEXTS = [
    "你好！有什么可以帮助你的吗？",
    "人工智能助手",
    "Hello there.\nHow are you?",
    "春天\n夏天\n{秋天}",
    "```python\nprint(1)\n```\n好了",
    "get_weather\n今天 12 度。",
]
CALLS = [
    {"city": "北京", "days": 3, "code": "010", "number": "123"},
    {},
    {"text": "it's Tom's", "other": "他说：“好”", "deep": [[1, 2], {"a": "b, c"}], "x": -1.5},
    {"sure": True, "none": None, "days": 0},
]
VOCABULARIES = [(version, kind) for version in CALLING_GENERATIONS for kind in ("small", "published")]


@pytest.fixture(scope="module")
def load(
    source: Callable[[str], ModuleType], reference_dir: Path, request: pytest.FixtureRequest
) -> Callable[[str, str], PreTrainedTokenizerBase]:
    @cache
    def tokenizer(version: str, kind: str) -> PreTrainedTokenizerBase:
        folder = reference_dir if kind == "small" else request.getfixturevalue("real_tokenizers")
        name = {"glm4": "ChatGLM4Tokenizer"}.get(version, "ChatGLMTokenizer")
        return getattr(source("tokenization_chatglm"), name).from_pretrained(folder / version, model_version=version)

    return tokenizer


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The ids of the question, and those that the model is trained to write after it."""
    question = tokenizer.encode_conversation(QUESTION)
    whole = tokenizer.encode_conversation([*QUESTION, answer], add_generation_prompt=False)
    assert whole[: len(question)] == question
    return question, whole[len(question) :]


def tool_call(arguments: Any, name: str = "get_weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[Any]:
    """What our parser reads: texts, and calls in OpenAI's form."""
    response, messages = tokenizer.chat_format.read_answer(tokenizer.decode(ids[:-1]), QUESTION)
    if isinstance(response, dict):
        return [tool_call(response.get("parameters", response.get("content")), response["name"])]
    assert len(messages) == 1
    return [response]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> Iterator[str]:
    """What a stream of the ids is given, token by token."""
    shown = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if not text.endswith("\ufffd"):
            yield text.removeprefix(shown)
            shown = text


def stream(tokenizer: PreTrainedTokenizerBase, prefix: str, texts: Iterator[str]) -> tuple[list[str], dict[str, Any]]:
    """What of a text is held back after each piece, and the message in the end."""
    parser = ResponseParser(tokenizer.response_template, prefix=prefix)
    given, sent, held = "", "", []
    for text in texts:
        events = parser.feed(text)
        given += text
        sent += "".join(event["text"] for event in events if event["type"] == "region_chunk")
        held.append(given[len(sent) :])
    return held, parser.finalize()[0]


@pytest.mark.parametrize(("version", "kind"), VOCABULARIES)
@pytest.mark.parametrize("content", TEXTS)
def test_texts_are_texts_and_never_wait(load: Callable[..., Any], version: str, kind: str, content: str) -> None:
    tokenizer = load(version, kind)
    question, ids = answer_ids(tokenizer, {"role": "assistant", "content": content})
    assert read(tokenizer, ids) == [content]
    expected = {"role": "assistant", "content": content}
    assert tokenizer.parse_response(ids, prefix=question) == expected
    held, message = stream(tokenizer, tokenizer.decode(question), pieces(tokenizer, ids[:-1]))
    assert message == expected
    assert set(held) == {""}


@pytest.mark.parametrize(("version", "kind"), VOCABULARIES)
@pytest.mark.parametrize("arguments", CALLS)
def test_calls_are_read_alike(load: Callable[..., Any], version: str, kind: str, arguments: dict[str, Any]) -> None:
    tokenizer = load(version, kind)
    for content in ("", "我来查。"):
        answer = {"role": "assistant", "content": content, "tool_calls": [tool_call(arguments)]}
        question, ids = answer_ids(tokenizer, answer)
        expected = {"role": "assistant", "tool_calls": [tool_call(arguments)]} | (
            {"content": content} if content else {}
        )
        if not content:
            assert read(tokenizer, ids) == [tool_call(arguments)]
        # Python's True and None are no JSON: the library reads them by the types in the description of the tool.
        assert tokenizer.parse_response(ids, prefix=question, tools=[WEATHER]) == expected
        if version == "glm4" or "sure" not in arguments:
            assert tokenizer.parse_response(ids, prefix=question) == expected
            held, message = stream(tokenizer, tokenizer.decode(question), pieces(tokenizer, ids))
            assert message == expected


@pytest.mark.parametrize("kind", ["small", "published"])
@pytest.mark.parametrize("content", ["print(1)\nx = {'a': 1}", 'search("新闻", recency_days=10)', "A red panda."])
def test_texts_for_the_built_in_tools_are_read_alike(load: Callable[..., Any], kind: str, content: str) -> None:
    tokenizer = load("glm4", kind)
    for name in tokenizer.chat_format.builtin_tools:
        call = tool_call(content, name)
        question, ids = answer_ids(tokenizer, {"role": "assistant", "content": None, "tool_calls": [call]})
        assert tokenizer.decode(ids) == f"{name}\n{content}<|user|>"
        assert read(tokenizer, ids) == [call]
        expected = {"role": "assistant", "tool_calls": [call]}
        assert tokenizer.parse_response(ids, prefix=question) == expected
        assert stream(tokenizer, tokenizer.decode(question), pieces(tokenizer, ids))[1] == expected


@pytest.mark.parametrize("name", ROLE_CASES)
def test_every_recorded_answer_is_read_alike(load: Callable[..., Any], case: Callable[[str], Any], name: str) -> None:
    """What the models of `tests/reference` wrote, by our reader and by the library's."""
    tokenizer = load(RECORDED[name].model_version, "small")
    turns = [turn for section in case(name).expected["chat"].values() for turn in section]
    assert len(turns) >= 4
    for turn in turns:
        ids, history = turn["new_ids"], turn["history"]
        written = tokenizer.decode([token for token in ids if token not in turn["eos_token_id"]])
        ours, _ = tokenizer.chat_format.read_answer(written, history[:-1])
        # The published `chat` drops the last token, whether it is a stop token or not.
        assert ours.startswith(turn.get("response", "").rstrip("\ufffd"))
        assert tokenizer.parse_response(ids, prefix=turn["input_ids"]) == {"role": "assistant", "content": ours}


@pytest.mark.parametrize(("version", "kind"), VOCABULARIES)
def test_a_text_without_an_empty_line_waits_for_its_first_mark_only(
    load: Callable[..., Any], version: str, kind: str
) -> None:
    tokenizer = load(version, kind)
    for start, rest in [
        ("你好", "！有什么可以帮助你的吗"),
        ("好的", "\n继续说"),
        ("Sure", ", it is."),
        ("字" * 65, "字"),
    ]:
        held, message = stream(tokenizer, "<|assistant|>", iter(start + rest))
        assert message["content"] == start + rest
        first = len(start) + rest.startswith("\n")
        assert held[first:] == [""] * (len(start + rest) - first)


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
def test_the_library_raises_for_no_answer_and_reads_it_soon(load: Callable[..., Any], version: str) -> None:
    tokenizer = load(version, "small")
    generator = random.Random(0)
    parts = [
        "\n",
        "<|assistant|>",
        "```python\ntool_call(",
        ")",
        "a=",
        "'",
        '"',
        "```",
        "北京",
        " ",
        "{",
        "[",
        "f",
        "\x01",
    ]
    parts += [
        ",",
        "f\n",
        "}",
        "]",
        ":",
        "\\",
        "python\n",
        "<|user|>",
        "None",
        "x" * 70,
        "f\n{",
        "f\n```\ntool_call(a=",
    ]
    start = time.process_time()
    for _ in range(1000):
        text = "".join(generator.choices(parts, k=generator.randrange(12)))
        assert tokenizer.parse_response(text, prefix="")["role"] == "assistant"
    assert tokenizer.parse_response("f\n```\ntool_call(a='\\\x01', b=1)", prefix="")["role"] == "assistant"
    nested = "[" * 2000 + "]" * 2000
    call = "f\n```\ntool_call(a=" if version == "chatglm3" else 'f\n{"a": '
    for long in (call + nested[:2000], call + nested, call + "[1, " * 2000, "x" * 20_000, call + "'\\" * 5000):
        assert tokenizer.parse_response(long, prefix="")["role"] == "assistant"
    assert time.process_time() - start < 10


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
def test_what_an_earlier_version_saved_is_replaced(source: Callable[[str], ModuleType], version: str) -> None:
    chat_format = source("conversation_chatglm").CONVERSATION_FORMATS[version]
    own = {"start_anchor": "x", "fields": {"content": {"content": "text"}}}
    assert chat_format.current_response_template(own) == own
    for nothing in (None, {}):
        assert chat_format.current_response_template(nothing) == chat_format.response_template
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source("conversation_chatglm"), "EARLIER_RESPONSE_TEMPLATES", (digest,))
        assert chat_format.current_response_template(own) == chat_format.response_template


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
@pytest.mark.parametrize("body", ["%s", "[-%s, 1]", '{"b": %s}', "1%s.5"])
def test_a_number_that_python_does_not_read_is_text(load: Callable[..., Any], version: str, body: str) -> None:
    tokenizer = load(version, "small")
    call = "f\n```python\ntool_call(a={})\n```" if version == "chatglm3" else 'f\n{{"a": {}}}'
    for digits in (4301, 10_000):
        answer = call.format(body % ("9" * digits))
        assert tokenizer.parse_response(answer, prefix="")["role"] == "assistant"
        assert isinstance(read(tokenizer, tokenizer.encode(answer, add_special_tokens=False))[0], str)
