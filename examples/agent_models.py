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
"""Two ways to ask a model for an answer or a call: loaded here, or behind an API in OpenAI's form.

Both keep the conversation in `messages`, so an agent can take back a question that came to nothing, and both are asked
by `say`: the question of a user, or the results of calls.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol

from agent_tools import Call
from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Says to ChatGLM3 that its code interpreter is there, which it was taught to use where no functions are offered.
INTERPRETER_PROMPT = "你是一位智能AI助手，连接着一台电脑，但不能联网。你可以运行 Python 代码，并看到它打印的内容。"
INTERPRETER = "interpreter"
# How a built-in code interpreter is offered to GLM-4.
PYTHON = "python"


class Answer(NamedTuple):
    """What a model wrote: text, and calls that it wants to have run before it goes on."""

    text: str
    calls: list[Call]


class Asked(Protocol):
    """A model with a conversation."""

    messages: list[Any]

    def ask(self, question: str) -> Answer:
        """Answer a user."""

    def observe(self, calls: Sequence[Call], results: Sequence[str]) -> Answer:
        """Go on with the results of calls."""


class LocalModel:
    """A model in this process, in the form of its generation.

    Args:
        tools: descriptions in OpenAI's form; built-in tools by their type.
        system: what is said before the conversation.
        show: is given the text that grows, for a stream.
        generate_kwargs: further arguments of `stream_chat`.

    Raises:
        ValueError: for a generation that knows no tools.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tools: list[dict[str, Any]],
        system: str = "",
        show: Callable[[str], None] = lambda text: None,
        **generate_kwargs: Any,
    ) -> None:
        self.model, self.tokenizer, self.show, self.generate_kwargs = model, tokenizer, show, generate_kwargs
        messages = [{"role": "system", "content": system}] if system else []
        chat_format = model.chat_format
        self.messages = chat_format.add_tools(chat_format.normalize_messages(messages), tools or None)
        self.text_tools = (INTERPRETER, *getattr(chat_format, "builtin_tools", ()))
        self.cache: Any = None

    def ask(self, question: str) -> Answer:
        """See `Asked`."""
        return self._say("user", question)

    def observe(self, calls: Sequence[Call], results: Sequence[str]) -> Answer:
        """See `Asked`; several results are several messages."""
        self.messages = [
            *self.messages,
            *({"role": "observation", "content": result} for result in results[:-1]),
        ]
        return self._say("observation", results[-1])

    def _say(self, role: str, text: str) -> Answer:
        history = self.messages
        settings = {"past_key_values": self.cache, "return_past_key_values": True, **self.generate_kwargs}
        with closing(self.model.stream_chat(self.tokenizer, text, history, role=role, **settings)) as stream:
            for response, messages, self.cache in stream:
                if isinstance(response, str):
                    self.show(response)
        self.messages = messages
        return self._read(messages[len(history) + 1 :], history)

    def _read(self, answers: list[dict[str, Any]], history: list[dict[str, Any]]) -> Answer:
        """An answer may have several parts; each is text or a call."""
        texts, calls = [], []
        for answer in answers:
            written = f"{answer.get('metadata', '')}\n{answer['content']}"
            response, _ = self.model.chat_format.read_answer(written, history)
            # Without functions, any first line of an answer could be the name of a tool that takes text.
            if isinstance(response, str) or ("content" in response and response["name"] not in self.text_tools):
                texts.append(written.strip())
            else:
                calls.append(Call(response["name"], response.get("parameters", response.get("content"))))
        return Answer("\n".join(texts), calls)


class ApiModel:
    """A model behind an API, asked by the package `openai`.

    Args:
        client: an `openai.OpenAI`.
        name: the model's name there.
        tools: descriptions in OpenAI's form.
        system: what is said before the conversation.
        settings: further arguments of `client.chat.completions.create`.
    """

    def __init__(self, client: Any, name: str, tools: list[dict[str, Any]], system: str = "", **settings: Any) -> None:
        self.client, self.name = client, name
        self.settings = {**settings, "tools": tools} if tools else settings
        self.messages: list[Any] = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str) -> Answer:
        """See `Asked`."""
        return self._say([{"role": "user", "content": question}])

    def observe(self, calls: Sequence[Call], results: Sequence[str]) -> Answer:
        """See `Asked`; a result belongs to the call of its identifier."""
        return self._say(
            [
                {"role": "tool", "tool_call_id": call.identifier, "content": result}
                for call, result in zip(calls, results, strict=True)
            ]
        )

    def _say(self, new: list[dict[str, Any]]) -> Answer:
        messages = [*self.messages, *new]
        completion = self.client.chat.completions.create(model=self.name, messages=messages, **self.settings)
        message = completion.choices[0].message
        self.messages = [*messages, message.model_dump(exclude_none=True)]
        calls = [
            Call(call.function.name, read_arguments(call.function.arguments), call.id)
            for call in message.tool_calls or ()
        ]
        return Answer(message.content or "", calls)


def read_arguments(text: str) -> dict[str, Any] | str:
    """The arguments of a call, which an API gives as JSON; text that is no JSON object stays text."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text
