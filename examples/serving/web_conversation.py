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
"""What the web page does with a conversation: asking, undoing, editing, showing it, and keeping it for later.

What is unusual here:

- A conversation is a dict, `{"id", "messages"}`, that JSON can hold: it lives in the visitor's browser. What comes back
  from there is read by `read_saved`, which trusts nothing of it.
- Its messages are those of `conversation_chatglm.py`, without the system message, which is a setting of the page. There
  is one bubble for each, so a bubble's index is a message's.
- Nothing is changed in place: every function returns a new conversation.

Nothing here needs torch or Gradio.
"""

import json
import re
import uuid
from typing import Any

from local_code import load_module


Message = dict[str, Any]
Conversation = dict[str, Any]

MAX_SAVED = 50
# A browser keeps about five million characters for a site.
MAX_SAVED_CHARACTERS = 2_000_000
MAX_TITLE_LENGTH = 40
MESSAGE_KEYS = {"role", "content", "metadata"}
ROLES = ("user", "assistant", "observation")


def new_conversation() -> Conversation:
    """A conversation without a word in it."""
    return {"id": uuid.uuid4().hex, "messages": []}


def with_messages(conversation: Conversation, messages: list[Message]) -> Conversation:
    """The conversation with other messages."""
    return {**conversation, "messages": messages}


def called_tool(messages: list[Message]) -> str:
    """The tool that a conversation waits for: the one its last message calls, or an empty string."""
    return messages[-1].get("metadata", "").strip() if messages else ""


def with_question(conversation: Conversation, text: str) -> Conversation:
    """Add what the user typed: the result of a tool if one was called, else a question."""
    role = "observation" if called_tool(conversation["messages"]) else "user"
    return with_messages(conversation, [*conversation["messages"], {"role": role, "content": text}])


def without_last_answer(conversation: Conversation) -> Conversation:
    """The conversation up to the last question or result of a tool, to be answered again."""
    messages = list(conversation["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return with_messages(conversation, messages)


def without_last_question(conversation: Conversation) -> tuple[Conversation, str]:
    """Take back the last question and all that came of it.

    Returns:
        The conversation before it, and the question.
    """
    messages = list(conversation["messages"])
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    question = messages.pop()["content"] if messages else ""
    return with_messages(conversation, messages), question


def without_open_question(conversation: Conversation) -> tuple[Conversation, str]:
    """Take back a question, or a result, that was not answered; the text is empty where all were."""
    messages = conversation["messages"]
    if not messages or messages[-1]["role"] == "assistant":
        return conversation, ""
    return with_messages(conversation, messages[:-1]), messages[-1]["content"]


def with_edited(conversation: Conversation, index: int, text: str) -> Conversation:
    """The conversation up to a message of the user, which says something else now."""
    messages = conversation["messages"]
    if not 0 <= index < len(messages):
        return conversation
    return with_messages(conversation, [*messages[:index], {**messages[index], "content": text}])


def title(conversation: Conversation) -> str:
    """What a list shows of a conversation: its first question, cut short."""
    questions = [message["content"] for message in conversation["messages"] if message["role"] == "user"]
    text = " ".join(questions[0].split()) if questions else ""
    return text if len(text) <= MAX_TITLE_LENGTH else f"{text[:MAX_TITLE_LENGTH]}…"


def fenced(text: str, language: str = "") -> str:
    """A text as a block of code in Markdown, whatever is in it."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def shown(messages: list[Message], texts: dict[str, str]) -> list[dict[str, Any]]:
    """The bubbles of a conversation, one for each message, as Gradio's `Chatbot` takes them.

    Args:
        texts: the words of one language, out of `TEXTS`.
    """
    bubbles = []
    called = ""
    for message in messages:
        name = message.get("metadata", "").strip()
        content = message["content"]
        bubble = {"role": message["role"], "content": content}
        if name:
            arguments = load_module("conversation_calls").parse_tool_call(content)
            text = content if arguments is None else json.dumps(arguments, ensure_ascii=False, indent=2)
            bubble = tool_bubble(texts["call"].format(name=name), text)
        elif message["role"] == "observation":
            bubble = tool_bubble(texts["result_of"].format(name=called), content)
        bubbles.append(bubble)
        called = name
    return bubbles


def tool_bubble(heading: str, text: str) -> dict[str, Any]:
    """A bubble that can be folded, with something that a program wrote or reads."""
    return {"role": "assistant", "content": fenced(text, "json"), "metadata": {"title": heading}}


def read_tools(text: str) -> list[dict[str, Any]]:
    """Read the descriptions of tools that a visitor typed.

    Raises:
        ValueError: if they are no JSON list of objects.
    """
    try:
        tools = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"got {text[:40]!r}")
    return tools


def is_message(value: Any) -> bool:
    """Whether something out of a browser is a message."""
    return (
        isinstance(value, dict)
        and set(value) <= MESSAGE_KEYS
        and value.get("role") in ROLES
        and isinstance(value.get("content"), str)
        and isinstance(value.get("metadata", ""), str)
    )


def read_saved(value: Any) -> list[Conversation]:
    """The conversations that a browser kept, the newest first, without what was never written there."""
    return [
        {"id": item["id"], "messages": item["messages"]}
        for item in (value[:MAX_SAVED] if isinstance(value, list) else [])
        if isinstance(item, dict)
        and isinstance(item.get("id"), str)
        and isinstance(item.get("messages"), list)
        and item["messages"]
        and all(is_message(message) for message in item["messages"])
    ]


def without(saved: list[Conversation], conversation_id: str) -> list[Conversation]:
    """The saved conversations without one of them."""
    return [other for other in saved if other["id"] != conversation_id]


def with_saved(saved: list[Conversation], conversation: Conversation) -> list[Conversation]:
    """Put a conversation first. The oldest ones go where there is no room for all."""
    kept: list[Conversation] = []
    room = MAX_SAVED_CHARACTERS
    for other in [conversation, *without(saved, conversation["id"])][:MAX_SAVED]:
        room -= len(json.dumps(other))
        if not other["messages"] or room < 0:
            continue
        kept.append(other)
    return kept


__all__ = [
    "called_tool",
    "new_conversation",
    "read_saved",
    "read_tools",
    "shown",
    "title",
    "with_edited",
    "with_messages",
    "with_question",
    "with_saved",
    "without",
    "without_last_answer",
    "without_last_question",
    "without_open_question",
]
