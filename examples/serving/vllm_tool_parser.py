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
"""How does vLLM's server read an answer? As `chat` reads it: a plug-in for `vllm serve`.

    vllm serve FOLDER --trust-remote-code --enable-auto-tool-choice --tool-call-parser chatglm \
        --tool-parser-plugin examples/serving/vllm_tool_parser.py

Answers of every generation go through it, with tools or without. What a model writes is never executed, and what cannot
be read as a call is text.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaFunctionCall,
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager


# vLLM imports this file alone, by its path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from serving.reading import Call, reader_for  # noqa: E402


class ChatGLMToolParser(ToolParser):
    """Makes vLLM's messages of answers, by the format of the conversation that the folder's tokenizer has."""

    # With it, vLLM (0.32) asks for every text, not for those that may hold calls alone, and tells when a stream ends.
    engine_based_streaming = True

    def __init__(self, tokenizer: Any, tools: Any = None) -> None:
        super().__init__(tokenizer, tools)
        self.chat_format = tokenizer.chat_format
        # Of the one answer that an instance reads as a stream.
        self.reader: Any = None
        self.takes_calls = False
        self.num_calls = 0

    def adjust_request(self, request: Any) -> Any:
        """Keep the special tokens, among them those between the parts of an answer."""
        request = super().adjust_request(request)
        request.skip_special_tokens = False
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """Read a whole answer."""
        self._begin(request)
        texts, calls = self._sort([*self.reader(model_output), *self.reader(None)])
        written = [
            ToolCall(id=make_tool_call_id(), function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in calls
        ]
        return ExtractedToolCallInformation(tools_called=bool(calls), tool_calls=written, content=texts or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """Read the next piece of an answer."""
        if self.reader is None:
            self._begin(request)
        return self._message(self.reader(delta_text))

    def finish_streaming(self) -> DeltaMessage | None:
        """Give out what was held back, as nothing more comes."""
        return None if self.reader is None else self._message(self.reader(None))

    def _begin(self, request: Any) -> None:
        self.takes_calls = bool(request.tools) and request.tool_choice != "none"
        self.reader = reader_for(self.chat_format, has_tools=self.takes_calls)

    def _sort(self, items: Iterable[str | Call]) -> tuple[str, list[Call]]:
        """The text of an answer, and its calls; where nobody asked for calls, they are text, too."""
        texts, calls = "", []
        for item in items:
            if isinstance(item, str):
                texts += item
            elif self.takes_calls:
                calls.append(item)
            else:
                texts += f"{item.name}\n{item.arguments}"
        return texts, calls

    def _message(self, items: Iterable[str | Call]) -> DeltaMessage | None:
        texts, calls = self._sort(items)
        written = []
        for call in calls:
            function = DeltaFunctionCall(name=call.name, arguments=call.arguments)
            written.append(
                DeltaToolCall(index=self.num_calls, id=make_tool_call_id(), type="function", function=function)
            )
            self.num_calls += 1
        if not texts and not written:
            return None
        return DeltaMessage(content=texts or None, tool_calls=written)


ToolParserManager.register_module("chatglm", module=ChatGLMToolParser)

__all__ = ["ChatGLMToolParser"]
