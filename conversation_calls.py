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
"""How a tool call is written as text and read back, and how tools are described.

What is unusual here:

- ChatGLM3 was taught to write a call as Python source, `tool_call(name=value, ...)`, GLM-4 to write a JSON object.
- What a model wrote is never evaluated and never given to Python's own parser, which warns about `"C:\\d"`, takes
  seconds for a long list, and has ended whole interpreters over deep nesting. `CallReader` reads literals only, once
  from left to right.
- The values are those that JSON can hold, because other programs get them. What is written here can be read back.
"""

import copy
import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from .conversation_templates import GLM4_BUILTIN_TOOLS, GLM4_TOOL_NOTE


# Limits of what is taken for a tool call; anything larger is an answer in plain text.
MAX_CALL_LENGTH = 100_000
MAX_CALL_DEPTH = 32
MAX_NUMBER_LENGTH = 1000
# Of Python source, which is read word by word, so that it takes a few milliseconds at most.
MAX_CALL_WORDS = 5000
# Limits of what a caller puts into a message or into the description of a tool.
MAX_DEPTH = 100
MAX_VALUES = 100_000

# The words of Python source that a call may hold. None of the patterns goes back over what it has matched.
BLANKS = re.compile(r"(?:\s++|#[^\n]*+|\\\n)*+")
WORD = re.compile(r"[^\s()\[\]{},:=\"'#\\-]++")
NUMBER = re.compile(r"0[xXoObB]\w++|(?:[0-9][0-9_]*+\.?[0-9_]*+|\.[0-9][0-9_]*+)(?:[eE][+-]?[0-9_]++)?+")
STRING = re.compile(
    r"""([uUrR]?)(?:
        \'\'\'((?:[^'\\]|\\.|'(?!''))*+)\'\'\'
        |\"\"\"((?:[^"\\]|\\.|"(?!""))*+)\"\"\"
        |(?!\'\'\')'((?:[^'\\\n]|\\.)*+)'
        |(?!\"\"\")"((?:[^"\\\n]|\\.)*+)"
    )""",
    re.DOTALL | re.VERBOSE,
)
ESCAPE = re.compile(
    r"""\\(?:
        ([0-7]{1,3})
        |x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})
        |N\{([^}]*)\}
        |([\n\\'"abfnrtvxuUN])
    )""",
    re.VERBOSE,
)
ESCAPED_CHARACTERS = {"\n": "", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
CONSTANTS = {"True": True, "False": False, "None": None}


def parse_tool_call(text: str) -> dict[str, Any] | None:
    """Read the arguments of a tool call, or return `None` if `text` is not one.

    Args:
        text: `tool_call(name=literal, ...)` or a JSON object, in a Markdown fence or bare. Python's keywords are fine
            as names (`from='Paris'`), as schemas have such parameters.

    Returns:
        Values that JSON can hold: what Python alone has (sets, bytes, complex numbers, keys that are no strings) is
        not a call, and tuples become lists.
    """
    code = text.strip()
    if code.startswith("```"):
        code = code.partition("\n")[2].removesuffix("```").strip()
    # A stream shows the call at every token, so what has not ended must cost nothing.
    if len(code) > MAX_CALL_LENGTH or not code.endswith((")", "}")):
        return None
    try:
        arguments = CallReader(code).read() if code.startswith("tool_call") else json.loads(code)
        _check_json_value(arguments, 0)
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None


def write_call(name: str, arguments: Any, call_text: Callable[[Mapping[str, Any]], str]) -> str:
    """Write the arguments of a call so that `parse_tool_call` reads the same back.

    Args:
        name: the function.
        arguments: its arguments, as a dict or as the JSON text that OpenAI's API uses.
        call_text: `call_as_python` or `call_as_json`.

    Raises:
        ValueError: for a name or arguments that could not be read back.
    """
    if not name.strip() or name != name.strip() or "\n" in name:
        raise ValueError(f"The name of a tool must be one line with no space around it, got {reprlib.repr(name)}.")
    values = json_arguments(name, arguments)
    text = call_text(values)
    if parse_tool_call(text) != values:
        raise ValueError(
            f"The tool call {reprlib.repr(name)} could not be read back as it is written. A call has at most {MAX_CALL_LENGTH} "
            f"characters and {MAX_CALL_DEPTH} levels of nesting (in Python, {MAX_CALL_WORDS} values and strings), a "
            f"number at most {MAX_NUMBER_LENGTH} digits, and no text holds half of a surrogate pair: {reprlib.repr(values)}."
        )
    return text


def check_size(value: Any, place: str) -> None:
    """Refuse a value that cannot be copied and written in good time: lists and dicts that hold themselves, too.

    Args:
        value: anything.
        place: what the message calls it.

    Raises:
        ValueError: for more than `MAX_DEPTH` levels of nesting or `MAX_VALUES` values.
    """
    waiting = [(value, 0)]
    count = 0
    while waiting:
        item, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(
                f"{place} may have {MAX_DEPTH} levels of nesting and {MAX_VALUES} values at most, and no list or dict "
                f"may hold itself: {reprlib.repr(value)}."
            )
        if isinstance(item, Mapping):
            waiting += [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += [(inner, depth + 1) for inner in item]


def json_arguments(name: str, arguments: Any) -> dict[str, Any]:
    """The arguments of a call as plain JSON values, new ones, from a dict or a JSON text."""
    try:
        values = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The arguments of the tool call {reprlib.repr(name)} are not JSON: {error}.") from error
    if not isinstance(values, Mapping):
        raise ValueError(
            f"The arguments of the tool call {reprlib.repr(name)} must be a dict, got {reprlib.repr(values)}."
        )
    check_size(values, f"The arguments of the tool call {reprlib.repr(name)}")
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"The arguments of the tool call {reprlib.repr(name)} have no JSON form ({error}): {reprlib.repr(values)}. Give "
            "strings, finite numbers, booleans, None, lists and dicts."
        ) from error


def call_as_python(arguments: Mapping[str, Any]) -> str:
    """The arguments of a call as ChatGLM3 was taught to write them."""
    for name in arguments:
        if not name.isidentifier():
            raise ValueError(
                f"ChatGLM3 writes a call as Python source, where {reprlib.repr(name)} cannot be the name of an argument. Rename "
                "it in the description of the tool, to letters, digits and underscores."
            )
    source = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"```python\ntool_call({source})\n```"


def call_as_json(arguments: Mapping[str, Any]) -> str:
    """The arguments of a call as GLM-4 was taught to write them."""
    return json.dumps(arguments, ensure_ascii=False)


def normalize_tools(tools: Any, place: str) -> Any:
    """Descriptions of tools without the wrapping of OpenAI's API, new ones, in a list or in a dict by name.

    Args:
        tools: what was given.
        place: what the message calls it.

    Raises:
        TypeError: for anything but descriptions that JSON can hold.
        ValueError: for more than `check_size` lets through.
    """
    # The published `get_tools` give a dict, which ChatGLM3 writes as it is.
    descriptions = list(tools.values()) if isinstance(tools, Mapping) else tools
    if not isinstance(descriptions, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in descriptions):
        raise TypeError(
            f"{place} must be a list of function descriptions (dicts), or a dict of them by name, got "
            f"{reprlib.repr(tools)}."
        )
    functions = [tool.get("function", tool) for tool in descriptions]
    for function in functions:
        if not isinstance(function, Mapping):
            raise TypeError(
                f"Each of {place} must describe a function by a dict with its `name` and `parameters`, got "
                f"{reprlib.repr(function)}."
            )
    written = dict(tools) if isinstance(tools, Mapping) else [dict(function) for function in functions]
    check_size(written, place)
    try:
        json.dumps(written)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{place} must hold JSON values ({error}), got {reprlib.repr(written)}.") from error
    return copy.deepcopy(written)


def _type_without_name(tool: Mapping[str, Any]) -> str:
    """The type of a built-in tool, which has nothing else; empty for a function."""
    kind = tool.get("type")
    return kind if isinstance(kind, str) and "name" not in tool else ""


def tools_as_list(tools: Any) -> str:
    """The descriptions of tools as ChatGLM3 reads them, behind the system text."""
    for tool in tools if not isinstance(tools, Mapping) else ():
        if kind := _type_without_name(tool):
            raise ValueError(
                f"The tool of type {reprlib.repr(kind)} is built into GLM-4, not into ChatGLM3, which has to be told the `name` and "
                "`parameters` of a tool. Its code interpreter answers where no tools are offered."
            )
    return "\n" + json.dumps(tools, indent=4, ensure_ascii=False)


def tools_as_sections(tools: Any) -> str:
    """The descriptions of tools as GLM-4 reads them, behind the system text."""
    text = ""
    for item in tools.values() if isinstance(tools, Mapping) else tools:
        tool = item.get("function", item)
        if (kind := _type_without_name(tool)) in GLM4_BUILTIN_TOOLS:
            text += f"\n\n## {kind}\n\n{GLM4_BUILTIN_TOOLS[kind]}"
        elif isinstance(tool.get("name"), str):
            text += f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}{GLM4_TOOL_NOTE}"
        else:
            raise ValueError(
                f"GLM-4 writes the name of a tool above it, and this one has none: {reprlib.repr(tool)}. Its built-in "
                f"tools are the types {', '.join(GLM4_BUILTIN_TOOLS)}."
            )
    return text


def _check_json_value(value: Any, depth: int) -> None:
    """Raise for what `json.loads` accepts beyond JSON, and for what other programs may not be able to handle."""
    if depth > MAX_CALL_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    elif isinstance(value, dict):
        for key, item in value.items():
            key.encode()
            _check_json_value(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_json_value(item, depth + 1)


class CallReader:
    """Reads `tool_call(name=literal, ...)`. Anything else is a `ValueError`."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.position = 0
        self.words = 0

    def read(self) -> dict[str, Any]:
        self._expect("tool_call")
        self._expect("(")
        arguments: dict[str, Any] = {}
        while not self._skip(")"):
            name = self._take(WORD)[0]
            if not name.isidentifier() or name in arguments:
                raise ValueError(f"not a new argument: {name}")
            self._expect("=")
            arguments[name] = self._value(1)
            if not self._skip(","):
                self._expect(")")
                break
        self._skip_blanks()
        if self.position != len(self.source):
            raise ValueError("more than a call")
        return arguments

    def _value(self, depth: int) -> Any:
        if depth > MAX_CALL_DEPTH:
            raise ValueError("nested too deeply")
        self._count()
        self._skip_blanks()
        mark = self.source[self.position : self.position + 1]
        if mark in ("[", "("):
            self.position += 1
            items, has_comma = self._items("]" if mark == "[" else ")", depth)
            # Parentheses around one value are no tuple.
            return items[0] if mark == "(" and len(items) == 1 and not has_comma else items
        if mark == "{":
            self.position += 1
            return self._pairs(depth)
        if mark == "-":
            self.position += 1
            return -self._number()
        if mark in tuple("0123456789."):
            return self._number()
        if (match := STRING.match(self.source, self.position)) is not None:
            return self._strings(match)
        word = self._take(WORD)[0]
        if word not in CONSTANTS:
            raise ValueError(f"not a literal: {word}")
        return CONSTANTS[word]

    def _items(self, end: str, depth: int) -> tuple[list[Any], bool]:
        items: list[Any] = []
        has_comma = False
        while not self._skip(end):
            items.append(self._value(depth + 1))
            has_comma = self._skip(",")
            if not has_comma:
                self._expect(end)
                break
        return items, has_comma

    def _pairs(self, depth: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while not self._skip("}"):
            key = self._strings(self._take(STRING))
            self._expect(":")
            pairs[key] = self._value(depth + 1)
            if not self._skip(","):
                self._expect("}")
                break
        return pairs

    def _strings(self, match: re.Match[str] | None) -> str:
        """One string, or several that stand side by side."""
        texts = []
        while match is not None:
            self._count()
            self.position = match.end()
            prefix = match[1]
            text = next(group for group in match.groups()[1:] if group is not None)
            texts.append(text if prefix in ("r", "R") else ESCAPE.sub(_unescape, text))
            self._skip_blanks()
            match = STRING.match(self.source, self.position)
        return "".join(texts)

    def _number(self) -> int | float:
        word = self._take(NUMBER)[0]
        if len(word) > MAX_NUMBER_LENGTH:
            raise ValueError("too long a number")
        is_float = word[1:2] not in ("x", "X") and any(character in ".eE" for character in word)
        return float(word) if is_float else int(word, 0)

    def _count(self) -> None:
        self.words += 1
        if self.words > MAX_CALL_WORDS:
            raise ValueError("too many values")

    def _take(self, pattern: re.Pattern[str]) -> re.Match[str]:
        self._skip_blanks()
        match = pattern.match(self.source, self.position)
        if match is None:
            raise ValueError(f"unexpected at {self.position}")
        self.position = match.end()
        return match

    def _skip(self, mark: str) -> bool:
        if not self.source.startswith(mark, self.position):
            self._skip_blanks()
        is_there = self.source.startswith(mark, self.position)
        self.position += len(mark) * is_there
        return is_there

    def _expect(self, mark: str) -> None:
        if not self._skip(mark):
            raise ValueError(f"no {mark} at {self.position}")

    def _skip_blanks(self) -> None:
        match = BLANKS.match(self.source, self.position)
        self.position = match.end() if match else self.position


def _unescape(match: re.Match[str]) -> str:
    """What an escape sequence in Python source stands for."""
    octal, *hexadecimal, name, character = match.groups()
    if octal is not None:
        return chr(int(octal, 8))
    for digits in hexadecimal:
        if digits is not None:
            return chr(int(digits, 16))
    if name is not None:
        try:
            return unicodedata.lookup(name)
        except KeyError as error:
            raise ValueError(f"no character {name}") from error
    if character in "xuUN":
        raise ValueError(f"half an escape sequence: {match[0]}")
    return ESCAPED_CHARACTERS.get(character, character)


__all__ = [
    "call_as_json",
    "call_as_python",
    "check_size",
    "normalize_tools",
    "parse_tool_call",
    "tools_as_list",
    "tools_as_sections",
    "write_call",
]
