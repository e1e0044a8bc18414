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
"""How is a conversation on the web page answered?

What is unusual here:

- Closing the iterator of an answer stops the work, whether a visitor pressed the button or went away.
- A function that the model calls is one of `Settings.functions`, called by name with the arguments that were read as
  literals. Whatever goes wrong in it is told to the model as its result.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from agent_tools import Call, Tool, Toolbox
from local_code import load_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .picture_files import read_address, read_picture
from .web_conversation import Conversation, Message, called_tool, with_messages


# How often a model may call functions before it has to answer.
MAX_CALLS = 5


@dataclass(frozen=True)
class Settings:
    """How to answer.

    Attributes:
        generation: arguments of `stream_chat`.
        tools: descriptions of tools whose results the visitor types.
        functions: tools that run by themselves, by name.
        sees: whether the model is shown pictures; one that reads text alone gets the rest of a conversation.
    """

    system: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    functions: Mapping[str, Tool] = field(default_factory=dict)
    sees: bool = False

    def described_tools(self) -> list[dict[str, Any]]:
        """The descriptions of all tools."""
        return [*(function.description for function in self.functions.values()), *self.tools]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, settings: Settings
) -> Iterator[Conversation]:
    """Answer a conversation that ends with a question or the result of a tool.

    Yields:
        The conversation with the answer so far, after every token and every call of a function.

    Raises:
        ValueError, TypeError: for a conversation or settings that the model has no form for, such as a prompt that is
            too long; also if the model does nothing but call functions.
    """
    messages = conversation["messages"]
    for _ in range(MAX_CALLS):
        for messages in answer_once(model, tokenizer, messages, settings):
            yield with_messages(conversation, messages)
        if (result := run_call(messages, settings.functions)) is None:
            return
        messages = [*messages, {"role": "observation", "content": result}]
        yield with_messages(conversation, messages)
    raise ValueError(f"The model called functions {MAX_CALLS} times and gave no answer.")


def answer_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[Message], settings: Settings
) -> Iterator[list[Message]]:
    """One answer of the model, text or a call, behind the messages before it."""
    chat_format = model.chat_format
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    *earlier, question = (with_opened(message, settings.sees) for message in messages)
    history = chat_format.add_tools(
        chat_format.normalize_messages([*system, *earlier]), settings.described_tools() or None
    )
    picture = {"image": question["image"]} if "image" in question else {}
    stream = model.stream_chat(
        tokenizer, question["content"], history, role=question["role"], **picture, **dict(settings.generation)
    )
    with closing(stream):
        for _, new_history in stream:
            yield [*messages, *chat_format.normalize_messages(new_history)[len(history) + 1 :]]


def with_opened(message: Message, sees: bool) -> Message:
    """A message with its picture in the place of the data address, or without it.

    Raises:
        ValueError: if there is no picture in the address.
    """
    opened = {name: value for name, value in message.items() if name != "image"}
    if sees and message.get("image"):
        opened["image"] = read_picture(read_address(message["image"]))
    return opened


def run_call(messages: list[Message], functions: Mapping[str, Tool]) -> str | None:
    """Run the function that the last message calls; its result as text, `None` if it calls none of them."""
    name = called_tool(messages)
    if name not in functions:
        return None
    content = messages[-1]["content"]
    arguments = load_module("conversation_calls").parse_tool_call(content)
    return Toolbox(functions.values()).run(Call(name, content if arguments is None else arguments))


__all__ = ["MAX_CALLS", "Settings", "answer"]
