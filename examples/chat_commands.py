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
"""The commands of the terminal chat: lines that begin with a slash and a word.

A command either does all of what it says or raises, and then nothing has changed.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from terminal import note


COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)
HELP = {
    "/help": "this list",
    "/clear": "forget the conversation; the system message and the tools stay",
    "/system TEXT": "what is said before the conversation; without a text, nothing",
    "/tools FILE": "offer the tools of a JSON file, a list of descriptions; without a file, none",
    "/image FILE": "show a picture with the next question, to a model that sees; without a file, none",
    "/save FILE": "write the conversation to a JSON file",
    "/load FILE": "go on with such a conversation",
    "/retry": "ask the last question again",
    "/stats": "how long the last answer took, and how many tokens it has",
    "stop": "end; Ctrl-D does too",
    '"""': "begin a text of several lines, and end it; Alt-Enter makes a new line where prompt_toolkit is installed",
}


def run_command(line: str, conversation: Any) -> bool:
    """Run a line that is a command, and tell whether it was one.

    Raises:
        OSError, ValueError, TypeError: if it cannot be done; the conversation is as it was.
    """
    match = COMMAND.fullmatch("/clear" if line == "clear" else line)
    if match is None:
        return False
    if match[1] not in COMMANDS:
        raise ValueError(f"there is no command /{match[1]}; /help lists them")
    COMMANDS[match[1]](conversation, (match[2] or "").strip())
    return True


def show_help(conversation: Any, text: str) -> None:
    width = max(map(len, HELP))
    note("\n".join(f"{name:{width}}  {meaning}" for name, meaning in HELP.items()))


def clear(conversation: Any, text: str) -> None:
    conversation.clear()


def set_system(conversation: Any, text: str) -> None:
    conversation.replace(system=text)


def set_tools(conversation: Any, text: str) -> None:
    tools = read_json(text) if text else None
    conversation.replace(tools=tools)
    if tools:
        note(f"{len(tools)} tools are offered. What you say after a call is its result.")


def show_image(conversation: Any, text: str) -> None:
    if text and conversation.model.config.vision_config is None:
        raise ValueError("this model reads text alone; GLM-4V sees pictures")
    image = str(path_of(text)) if text else None
    if image:
        conversation.tokenizer.encode_pictures([image])
        note(f"{image} goes with the next question")
    conversation.image = image


def save(conversation: Any, text: str) -> None:
    """The form is OpenAI's for training: the tools beside the messages."""
    path = path_of(text)
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    saved = {"messages": system + conversation.history} | ({"tools": conversation.tools} if conversation.tools else {})
    content = json.dumps(saved, ensure_ascii=False, indent=1) + "\n"
    # A file that is there stays whole until the new one is.
    new = path.with_name(f"{path.name}.new")
    new.write_text(content, encoding="utf-8")
    os.replace(new, path)
    note(f"{len(saved['messages'])} messages in {path}")


def load(conversation: Any, text: str) -> None:
    content = read_json(text)
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list):
        raise ValueError(f"{text} holds no conversation: a list of messages, or an object with `messages`")
    chat_format = conversation.model.chat_format
    messages = chat_format.normalize_messages(messages)
    first = messages.pop(0) if messages and messages[0]["role"] == "system" else {"content": ""}
    # The tools may also stand in the system message, below a heading that goes with them.
    system = first["content"].removesuffix(getattr(chat_format, "tools_heading", "") if "tools" in first else "")
    tools = first.get("tools") or (content.get("tools") if isinstance(content, dict) else None)
    conversation.replace(system=system, tools=tools, history=messages)
    note(f"{len(messages)} messages from {text}")


def retry(conversation: Any, text: str) -> None:
    conversation.retry()


def show_stats(conversation: Any, text: str) -> None:
    if conversation.clock is None or conversation.clock.tokens == 0:
        raise ValueError("there is no answer yet")
    note(str(conversation.clock))


def path_of(text: str) -> Path:
    if not text:
        raise ValueError("which file? Write its name behind the command")
    return Path(text).expanduser()


def read_json(text: str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: if it cannot be read, or is no JSON.
    """
    path = path_of(text)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


COMMANDS: dict[str, Callable[[Any, str], None]] = {
    "help": show_help,
    "clear": clear,
    "system": set_system,
    "tools": set_tools,
    "image": show_image,
    "save": save,
    "load": load,
    "retry": retry,
    "stats": show_stats,
}
