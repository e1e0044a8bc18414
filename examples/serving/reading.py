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
"""How is an answer read while it comes? As `chat` reads it at the end: what it calls a tool call is one here.

The server of Transformers reads calls by the response template of a tokenizer, in which the arguments of ChatGLM3's calls
have the types that the description of the tool names, and are texts without one.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .answers import overlap


# Between the parts of an answer of ChatGLM3 and GLM-4.
SEPARATOR = "<|assistant|>"
# What the first line of a part has to be for a call.
TOOL_NAME = re.compile(r"[\w.:/\-]{1,64}")


@dataclass(frozen=True)
class Call:
    """A tool call; `arguments` is JSON, or the plain text that a built-in tool or a code interpreter takes."""

    name: str
    arguments: str


class CallReader:
    """Makes text and calls of an answer of ChatGLM3 or GLM-4 that comes in pieces.

    A part that may be a call is held back until it is complete. Text is passed on as it comes, without the white space
    around it: every answer begins with a newline.

    Args:
        chat_format: of the model.
        has_tools: whether the request offered any.
    """

    def __init__(self, chat_format: Any, has_tools: bool) -> None:
        self.chat_format = chat_format
        self.messages = [{"role": "system", "content": "", "tools": []}] if has_tools else []
        self.plain_tools = (*chat_format.builtin_tools, *chat_format.unoffered_tools)
        self.has_text = False
        # What could be the beginning of the separator.
        self.held = ""
        self._begin_part()

    def __call__(self, text: str | None) -> list[str | Call]:
        """The items that a piece of text, or `None` at the end, makes certain."""
        *parts, last = (self.held + (text or "")).split(SEPARATOR)
        items: list[str | Call] = []
        for part in parts:
            items += self._read(part, is_end=True)
        split = len(last) - (overlap(last, SEPARATOR) if text is not None else 0)
        self.held = last[split:]
        return items + self._read(last[:split], is_end=text is None)

    def _begin_part(self) -> None:
        self.part = ""
        self.is_text: bool | None = None
        # White space that is given out if more text follows; `None` before the first text.
        self.blanks: str | None = None

    def _read(self, text: str, is_end: bool) -> list[str | Call]:
        self.part += text
        if self.is_text is None:
            self.is_text = self._is_text(is_end)
        items: list[str | Call] = []
        if self.is_text:
            items, self.part = [self._stripped(self.part)], ""
        elif is_end:
            items = [self._call_or_text()]
        if is_end:
            self._begin_part()
        return items

    def _is_text(self, is_end: bool) -> bool | None:
        """Whether a part is text; `None` as long as its first line may become a name."""
        line, newline, _ = self.part.partition("\n")
        if newline:
            return TOOL_NAME.fullmatch(line.strip()) is None
        is_open = not line.strip() or TOOL_NAME.fullmatch(line.strip())
        return None if is_open and not is_end else True

    def _stripped(self, text: str) -> str:
        kept = text.rstrip() if self.blanks is not None else text.strip()
        if not kept:
            self.blanks = None if self.blanks is None else self.blanks + text
            return ""
        is_next = self.blanks is None and self.has_text
        given = ("\n" if is_next else self.blanks or "") + kept
        self.blanks, self.has_text = text[len(text.rstrip()) :], True
        return given

    def _call_or_text(self) -> str | Call:
        answer = self.chat_format.read_answer(self.part, self.messages)[0]
        if isinstance(answer, dict) and "parameters" in answer:
            return Call(answer["name"], json.dumps(answer["parameters"], ensure_ascii=False))
        if isinstance(answer, dict) and answer["name"] in self.plain_tools:
            return Call(answer["name"], answer["content"])
        return self._stripped(self.part)


class PlainReader:
    """Makes of an answer of ChatGLM-6B or ChatGLM2 that comes in pieces what `chat` makes of it."""

    # What the next character may change; see `CHINESE_PUNCTUATION` in conversation_chatglm.py.
    OPEN_ENDS = ",!:;?"

    def __init__(self, chat_format: Any) -> None:
        self.read_answer = chat_format.read_answer
        self.text, self.given = "", ""

    def __call__(self, text: str | None) -> list[str | Call]:
        """The text that a piece, or `None` at the end, makes certain."""
        self.text += text or ""
        answer = self.read_answer(self.text, [])[0]
        if text is not None:
            answer = answer.rstrip(self.OPEN_ENDS)
        if not answer.startswith(self.given):
            return []
        new, self.given = answer[len(self.given) :], answer
        return [new]


def reader_for(chat_format: Any, has_tools: bool) -> Callable[[str | None], list[str | Call]]:
    """What reads an answer of a generation."""
    # CODEPATH: chatglm3 and glm4; chatglm and chatglm2 know no tools, and their histories are pairs.
    return PlainReader(chat_format) if chat_format.uses_pairs else CallReader(chat_format, has_tools)
