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
"""How is a row of each known format turned into messages?

| format | columns that are read | whose it is |
|---|---|---|
| `messages` | `messages` or `conversations` (lists of `role` and `content`), `tools` | OpenAI, ChatGLM3, GLM-4 |
| `sharegpt` | `conversations` or `messages` (lists of `from` and `value`), `system`, `tools` | ShareGPT, FastChat |
| `alpaca` | `instruction`, `input`, `output`, `system`, `history` | Alpaca, Belle |
| `adgen` | `content`, `summary`, `history` | the published P-tuning scripts |
| `columns` | `prompt`, `response`, `history`, or other names that the settings give | anybody |

Calls and their results are written as the published checkpoints were taught (`metadata`, role `observation`), as
OpenAI's interface has them (`tool_calls`, role `tool`), as ChatGLM3's published example has them (one entry with
`name`, `parameters` and `observation`), or as ShareGPT's relatives do (`function_call`, `observation`). A message of the
first format may have a picture, see `finetune_pictures.py`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


Record = Mapping[str, Any]
Message = dict[str, Any]


class Columns(NamedTuple):
    """The names of columns that hold text."""

    prompt: str = "prompt"
    response: str = "response"
    history: str = "history"


@dataclass(frozen=True)
class Conversation:
    """What a row says, and which of its columns (and keys of messages, as `messages[].key`) nobody reads."""

    messages: list[Message]
    tools: Any = None
    unread: frozenset[str] = frozenset()


# Who speaks, under the names that ShareGPT's many copies have.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "observation",
    "tool": "observation",
    "function_response": "observation",
}
MESSAGE_KEYS = frozenset(
    (
        "role",
        "content",
        "image",
        "metadata",
        "tools",
        "tool_calls",
        "tool_call_id",
        "name",
        "parameters",
        "observation",
    )
)
SHAREGPT_KEYS = frozenset(("from", "value"))
LISTS = ("messages", "conversations")


def recognise(record: Record, columns: Columns) -> str:
    """The format of a row, told by its columns.

    Raises:
        ValueError: if no format has such columns.
    """
    turns = next((record[name] for name in LISTS if name in record), None)
    if turns is not None:
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, dict) and first.keys() >= SHAREGPT_KEYS else "messages"
    for name in ("columns", "alpaca", "adgen"):
        if all(column in record for column in _text_columns(name, columns)):
            return name
    missing = [name for name in columns[:2] if name not in record]
    raise ValueError(
        f"no known format has these columns: there is neither `messages` nor `conversations`, and of the columns "
        f"{columns[:2]} {missing} are missing; found {sorted(record)}. Set prompt_column and response_column."
    )


def read_row(record: Record, format_name: str, columns: Columns) -> Conversation:
    """The conversation of a row.

    Raises:
        ValueError: if the row does not have the format.
    """
    conversation = FORMATS[format_name](record, columns)
    if any(is_empty_answer(message) for message in conversation.messages):
        raise ValueError(
            "an answer is empty, which would teach the model to say nothing; leave it out with its question"
        )
    return conversation


def _text_columns(format_name: str, columns: Columns) -> tuple[str, str]:
    """The columns of the question and of the answer."""
    names = {"alpaca": ("instruction", "output"), "adgen": ("content", "summary")}
    return names.get(format_name, columns[:2])


def _read_columns(record: Record, columns: Columns, format_name: str = "columns") -> Conversation:
    names = _text_columns(format_name, columns)
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"of the columns {names} of the format {format_name}, {missing} are missing")
    optional = ("input", "system") if format_name == "alpaca" else ()
    texts: dict[str, Any] = {name: record.get(name) for name in (*names, *optional)}
    for name, text in texts.items():
        if not isinstance(text, str) and (name in names or text is not None):
            raise ValueError(f"the column {name!r} must hold text, got {text!r:.80}")
    question = "\n".join(text for text in (texts[names[0]], texts.get("input")) if text)
    pairs = [*_read_history(record.get(columns.history), columns.history), [question, texts[names[1]]]]
    messages = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    if system := texts.get("system"):
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, unread=frozenset(record) - {*texts, columns.history})


def _read_alpaca(record: Record, columns: Columns) -> Conversation:
    return _read_columns(record, columns, "alpaca")


def _read_adgen(record: Record, columns: Columns) -> Conversation:
    return _read_columns(record, columns, "adgen")


def _read_history(history: Any, name: str) -> list[list[str]]:
    """Earlier (question, answer) pairs; CSV files have them as JSON."""
    if isinstance(history, str) and history.strip():
        history = _from_json(history, name)
    history = history or []
    is_pairs = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    )
    if not is_pairs:
        raise ValueError(f"{name!r} must hold [question, answer] pairs, got {history!r:.80}")
    return history


def _from_json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name!r} holds text that is not JSON ({error}): {text!r:.80}") from error


def _read_turns(record: Record) -> tuple[str, list[Message]]:
    """The column that holds a list of messages, and the list."""
    name = next((name for name in LISTS if name in record), None)
    if name is None:
        raise ValueError(f"there is neither `messages` nor `conversations`; found {sorted(record)}")
    turns = record[name]
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _from_json(turns, name)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"the conversation must be a list of messages (objects), got {turns!r:.80}")
    return name, turns


def _read_tools(record: Record) -> Any:
    """Tools beside the messages; where they hold text, as in tables, it is JSON."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, "tools") if tools.strip() else None
    return tools or None


def _read_messages(record: Record, columns: Columns) -> Conversation:
    name, turns = _read_turns(record)
    keys = {key for turn in turns for key in turn} - MESSAGE_KEYS
    unread = {*record, *(f"{name}[].{key}" for key in keys)} - {name, "tools"}
    messages = [message for turn in turns for message in _split_tool_entry(turn)]
    return Conversation(messages, _read_tools(record), frozenset(unread))


def _split_tool_entry(message: Message) -> Iterator[Message]:
    """A call and its result stand in one entry of ChatGLM3's published fine-tuning example."""
    if message.get("role") != "tool" or "observation" not in message:
        yield message
        return
    if not isinstance(message.get("name"), str):
        raise ValueError(f"a `tool` entry with an `observation` needs the `name` of the tool, got {message}")
    yield _call(message["name"], message.get("parameters"))
    result = message["observation"]
    result = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    yield {"role": "observation", "content": result}


def _call(name: str, arguments: Any) -> Message:
    function = {"name": name, "arguments": arguments or {}}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def _read_sharegpt(record: Record, columns: Columns) -> Conversation:
    name, turns = _read_turns(record)
    messages: list[Message] = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for turn in turns:
        role = SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise ValueError(f"a turn is `from` {turn.get('from')!r}; known are {', '.join(SHAREGPT_ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"the `value` of a turn must be text, got {turn.get('value')!r:.80}")
        if role == "function_call":
            call = _from_json(turn["value"], "value")
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                raise ValueError(
                    f"the `value` of a function_call needs a `name` and `arguments`, got {turn['value']:.80}"
                )
            messages.append(_call(call["name"], call.get("arguments")))
        # Conversations cut out of longer ones may begin with an answer to nothing.
        elif role != "assistant" or any(message["role"] == "user" for message in messages):
            messages.append({"role": role, "content": turn["value"]})
    keys = {key for turn in turns for key in turn} - SHAREGPT_KEYS
    unread = {*record, *(f"{name}[].{key}" for key in keys)} - {name, "tools", "system"}
    return Conversation(messages, _read_tools(record), frozenset(unread))


def is_empty_answer(message: Message) -> bool:
    """Whether the assistant says nothing and calls nothing."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    is_empty = not content or (isinstance(content, str) and not content.strip())
    is_call = message.get("tool_calls") or message.get("metadata")
    return message.get("role") == "assistant" and is_empty and not is_call


FORMATS: dict[str, Callable[[Record, Columns], Conversation]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "adgen": _read_adgen,
    "columns": _read_columns,
}


__all__ = ["FORMATS", "Columns", "Conversation", "Record", "is_empty_answer", "read_row", "recognise"]
