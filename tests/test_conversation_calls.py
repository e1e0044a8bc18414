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
"""Tool calls: what is written can be read back, and what is read are values of JSON, soon and without a warning."""

import ast
import json
import random
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from generations import CALLING_GENERATIONS


pytestmark = pytest.mark.floor


@pytest.fixture(scope="module")
def calls(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("conversation_chatglm")


@pytest.fixture(scope="module")
def formats(calls: ModuleType) -> dict[str, Any]:
    return calls.CONVERSATION_FORMATS


# Reading


@pytest.mark.parametrize(
    "value",
    [
        "{1, 2}",
        "1j",
        "b'x'",
        "{(1, 2): 3}",
        "{1: 2}",
        "{None: 2}",
        "[{'a': {1}}]",
        "1e999",
        "-1e999",
        r"'\ud800'",
        r"'\ud83d\ude00'",
        r"{'\udfff': 1}",
        r"'\x4'",
        r"'\N{no such character}'",
        "012",
        "1__0",
        "0x" + "f" * 5000,
        "''''",
        '""""',
        "''''''''''",
    ],
)
def test_what_json_cannot_hold_is_text(calls: ModuleType, formats: dict[str, Any], value: str) -> None:
    assert calls.parse_tool_call(f"tool_call(a={value})") is None
    messages = [{"role": "system", "content": "s", "tools": []}]
    response, _ = formats["chatglm3"].read_answer(f"f\n```python\ntool_call(a={value})\n```", messages)
    assert isinstance(response, str)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": [Infinity]}', '{"a": 1e999}', r'{"a": "\ud800"}', r'{"\ud800": 1}']
)
def test_json_is_read_as_the_standard_has_it(calls: ModuleType, text: str) -> None:
    assert calls.parse_tool_call(text) is None
    assert calls.parse_tool_call(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}


def test_an_argument_given_twice_is_no_call(calls: ModuleType) -> None:
    assert calls.parse_tool_call("tool_call(a=1, a=2)") is None


def test_python_literals_are_read_as_python_does(calls: ModuleType) -> None:
    generator = random.Random(0)
    parts = ["'a'", '"b"', r"r'\d'", r"'\n\x41\u4e2d'", r"'\101\N{BULLET}'", "u'q'", "'''x\ny'''", "'it''s'"]
    parts += ["1", "-1", "- 2", "1.5", "1e3", "0x1F", "0b11", "0o17", "1_000", ".5", "5.", "00", "True", "None"]
    parts += [*"[](){},:", "{'k':", "(1)", "(1,)", "()", " ", "\n", "# c\n", "\\\n"]
    read = 0
    for _ in range(10_000):
        source = f"tool_call(x={''.join(generator.choices(parts, k=generator.randint(1, 5)))})"
        try:
            call = ast.parse(source, mode="eval").body
            values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
            expected = (
                json.loads(json.dumps(values, allow_nan=False)) if has_json_keys(values) and not call.args else None
            )
        except (AttributeError, SyntaxError, ValueError, TypeError):
            expected = None
        assert calls.parse_tool_call(source) == expected, source
        read += expected is not None
    assert read > 500


def has_json_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and has_json_keys(value[key]) for key in value)
    return not isinstance(value, (list, tuple)) or all(map(has_json_keys, value))


def test_a_backslash_is_read_without_a_warning(calls: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = calls.parse_tool_call(r"""tool_call(path="C:\d", other='\.\d+')""")
    assert arguments == {"path": r"C:\d", "other": r"\.\d+"}


@pytest.mark.parametrize(
    "value",
    [
        "[" + "1," * 48_000 + "]",
        "[" + "''," * 32_000 + "]",
        "['', 1.5, None]," * 6_000,
        "'x' " * 24_000,
        "'" * 96_000,
        "''''" * 24_000 + "x",
        "'" + "\\" * 95_999 + "'",
        "#\n" * 48_000 + "1",
        " " * 96_000,
        "1e" * 48_000,
        "[" * 96_000,
    ],
    ids=range(11),
)
def test_a_long_call_is_read_soon(calls: ModuleType, value: str) -> None:
    start = time.process_time()
    calls.parse_tool_call(f"tool_call(a={value})")
    # A tenth of it on a machine that has nothing else to do.
    assert time.process_time() - start < 1


def test_a_call_in_python_has_some_thousand_values_at_most(calls: ModuleType, formats: dict[str, Any]) -> None:
    assert calls.parse_tool_call(f"tool_call(a=[{'1, ' * 4900}])") == {"a": [1] * 4900}
    for many in ("[" + "1, " * 6000 + "]", "[" + "[], " * 6000 + "]", "'' " * 6000):
        assert calls.parse_tool_call(f"tool_call(a={many})") is None
    with pytest.raises(ValueError, match="in Python, 5000 values"):
        formats["chatglm3"].write_tool_call("f", {"a": [1] * 6000})


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
def test_of_many_parts_the_last_one_is_read(
    formats: dict[str, Any], monkeypatch: pytest.MonkeyPatch, source: Callable[[str], ModuleType], version: str
) -> None:
    read: list[str] = []
    monkeypatch.setattr(source("conversation_chatglm"), "parse_tool_call", lambda text: read.append(text))
    messages = [{"role": "system", "content": "s", "tools": []}]
    response, answers = formats[version].read_answer("f\n{}<|assistant|>" * 1000 + "g\n{}", messages)
    assert (response, len(answers), read) == ("g\n{}", 1001, ["{}"])


def test_an_unfinished_call_costs_a_stream_nothing(calls: ModuleType) -> None:
    text = "tool_call(a=[" + "1," * 40_000
    start = time.process_time()
    for _ in range(1000):
        assert calls.parse_tool_call(text) is None
    assert time.process_time() - start < 1


# Writing


@pytest.mark.parametrize("name", ["a-b", "x y", "", "1a", "a.b", "a=1, b", "查询 词"])
def test_a_name_that_python_cannot_hold_is_refused(formats: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of an argument. Rename it in the description"):
        formats["chatglm3"].write_tool_call("f", {name: 1})
    message = formats["glm4"].write_tool_call("f", {name: 1})
    assert json.loads(message["content"]) == {name: 1}


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
@pytest.mark.parametrize(
    "value",
    [float("inf"), float("-inf"), float("nan"), [float("nan")], {1}, b"x", 1j, {"k": print}, {(1, 2): 3}],
    ids=str,
)
def test_a_value_without_a_json_form_is_refused(formats: dict[str, Any], version: str, value: Any) -> None:
    with pytest.raises(ValueError, match="'f' have no JSON form .* Give strings, finite numbers"):
        formats[version].write_tool_call("f", {"a": value})


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
@pytest.mark.parametrize("kind", ["half a character", "long", "deep"])
def test_a_call_that_could_not_be_read_back_is_refused(formats: dict[str, Any], version: str, kind: str) -> None:
    value: Any = {"half a character": "\ud800", "long": "x" * 100_000, "deep": []}[kind]
    for _ in range(40 * (kind == "deep")):
        value = [value]
    with pytest.raises(ValueError, match="'f' could not be read back"):
        formats[version].write_tool_call("f", {"a": value})


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
@pytest.mark.parametrize("name", ["", " ", "f\ng", " f"])
def test_a_tool_has_a_name_of_one_line(formats: dict[str, Any], version: str, name: str) -> None:
    with pytest.raises(ValueError, match="The name of a tool must be one line"):
        formats[version].normalize_messages([{"role": "assistant", "tool_calls": [{"function": {"name": name}}]}])


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
def test_what_is_written_is_read(formats: dict[str, Any], version: str) -> None:
    arguments = {"from": (1, 2), "城市": {"深": [None, True, -0.5, 10**30]}, "_ª": "'\"\\\n\x00\u2028😀", "e": 1e-7}
    message = formats[version].write_tool_call("f", arguments)
    answer = f"{message['metadata']}\n{message['content']}"
    response, _ = formats[version].read_answer(answer, [{"role": "system", "content": "s", "tools": []}])
    assert response == {"name": "f", "parameters": json.loads(json.dumps(arguments))}
