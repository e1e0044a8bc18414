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
"""What programs in a terminal share: reading what a user types, and showing what a model wrote.

Lines are read by `prompt_toolkit` where it is installed, else by Python's `input` with `readline`: both know how wide
Chinese characters are, edit lines, and keep them in a history file. Alt-Enter begins a new line in the former; in both,
and in a pipe, a line of three double quotes opens a text of several lines and closes it.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path


# Gives `input` line editing, and Ctrl-C at once. Windows does without.
try:
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]

try:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings
except ImportError:
    PromptSession = None

QUOTES = '"""'
MAX_HISTORY = 1000
# All but tabs and newlines: they could move the cursor, change the colours, or write what is not there.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def use_utf8() -> None:
    """Read and write UTF-8, whatever the environment asks for."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def default_history_file() -> Path:
    """Where lines are kept, as the XDG base directories have it."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "chatglm" / "history"


def harmless(text: str) -> str:
    """A text of a model for a terminal, which obeys control characters; a pipe gets it as it is."""
    return CONTROL_CHARACTERS.sub("\ufffd", text) if sys.stdout.isatty() else text


def visible(text: str) -> str:
    """A text with everything written out that does not show, such as marks that turn the direction of writing."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def note(text: str) -> None:
    """Say something about the program, beside the answers."""
    print(text, file=sys.stderr, flush=True)


class LineReader:
    """Reads what a user says.

    Args:
        history_file: where lines are kept from one run to the next; `None` keeps none.
    """

    def __init__(self, history_file: Path | None) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._read_line: Callable[[str], str] = lambda prompt: input(prompt if self.is_terminal else "")
        if not self.is_terminal:
            return
        if PromptSession is not None:
            self._read_line = self._with_prompt_toolkit(_writable(history_file))
        elif readline is not None and (file := _writable(history_file)) is not None:
            self._with_readline(file)

    def read(self, prompt: str = "> ") -> str:
        """What is typed next, without blanks around it.

        Raises:
            EOFError: at the end of the input.
            KeyboardInterrupt: for Ctrl-C.
        """
        line = self._read_line(prompt)
        if line.strip() == QUOTES:
            lines: list[str] = []
            with suppress(EOFError):
                while (line := self._read_line(". ")).strip() != QUOTES:
                    lines.append(line)
            line = "\n".join(lines)
        return line.strip()

    def confirm(self, question: str) -> bool:
        """Whether a user agrees; anything but yes is no."""
        try:
            return input(f"{question} [y/N] ").strip().lower() in ("y", "yes", "是", "好")
        except (EOFError, KeyboardInterrupt):
            return False

    def _with_prompt_toolkit(self, file: Path | None) -> Callable[[str], str]:
        bindings = KeyBindings()

        @bindings.add("escape", "enter")
        def _(event: "object") -> None:
            event.current_buffer.insert_text("\n")  # type: ignore[attr-defined]

        session = PromptSession(history=FileHistory(str(file)) if file else None, key_bindings=bindings)
        return session.prompt

    def _with_readline(self, file: Path) -> None:
        readline.set_history_length(MAX_HISTORY)
        with suppress(OSError):
            readline.read_history_file(file)

        def read_and_keep(prompt: str) -> str:
            line = input(prompt)
            with suppress(OSError):
                readline.write_history_file(file)
            return line

        self._read_line = read_and_keep


def _writable(file: Path | None) -> Path | None:
    """The history file, for nobody else to read; `None` if it cannot be there."""
    if file is None:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
    except OSError as error:
        note(f"without a history: {error}")
        return None
    return file
