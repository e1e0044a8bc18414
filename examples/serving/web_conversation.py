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
- A message of the user may have an `image`, a data address: the picture as the model is shown it, no larger. In the
  browser there is room for a few. An empty one says that there was a picture, which was not kept.
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
# Of these, what pictures may take: four or so of GLM-4V-9B's size. The newest conversations keep theirs.
MAX_PICTURE_CHARACTERS = 1_000_000
MAX_TITLE_LENGTH = 40
MESSAGE_KEYS = {"role", "content", "metadata", "image"}
PICTURE = re.compile(r"(data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*)?")
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


def has_picture(conversation: Conversation) -> bool:
    """Whether there is a picture in a conversation; the models take one."""
    return any(message.get("image") for message in conversation["messages"])


def with_question(conversation: Conversation, text: str, picture: str = "") -> Conversation:
    """Add what the user typed: the result of a tool if one was called, else a question, perhaps about a picture."""
    role = "observation" if called_tool(conversation["messages"]) else "user"
    message = {"role": role, "content": text} | ({"image": picture} if picture else {})
    return with_messages(conversation, [*conversation["messages"], message])


def picture_taken_back(before: Conversation, after: Conversation) -> str:
    """The picture of the messages that a conversation had before and has no longer, if there was one."""
    gone = before["messages"][len(after["messages"]) :]
    return next((message["image"] for message in gone if message.get("image")), "")


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

    Where a message has a picture, its bubble has it as `image`, which is for the page to show.

    Args:
        texts: the words of one language, out of `TEXTS`.
    """
    bubbles: list[dict[str, Any]] = []
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
        if message.get("image"):
            bubble["image"] = message["image"]
        elif "image" in message:
            bubble["content"] = f"*{texts['no_picture']}*\n\n{content}"
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
        and isinstance(value.get("image", ""), str)
        and PICTURE.fullmatch(value.get("image", "")) is not None
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


def without_picture(conversation: Conversation) -> Conversation:
    """The conversation with a note in the place of its picture."""
    messages = [{**message, "image": ""} if "image" in message else message for message in conversation["messages"]]
    return with_messages(conversation, messages)


def with_saved(saved: list[Conversation], conversation: Conversation) -> list[Conversation]:
    """Put a conversation first. The oldest ones go where there is no room for all, and before them their pictures."""
    kept: list[Conversation] = []
    room, picture_room = MAX_SAVED_CHARACTERS, MAX_PICTURE_CHARACTERS
    for other in [conversation, *without(saved, conversation["id"])][:MAX_SAVED]:
        picture_room -= sum(len(message.get("image", "")) for message in other["messages"])
        other = without_picture(other) if picture_room < 0 else other
        room -= len(json.dumps(other))
        if not other["messages"] or room < 0:
            continue
        kept.append(other)
    return kept


__all__ = [
    "called_tool",
    "has_picture",
    "new_conversation",
    "picture_taken_back",
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
