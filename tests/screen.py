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
"""A pseudo-terminal for the tests of programs in a terminal: keys are typed, and what it shows is read.

The program is a fork of this process, which has imported everything already.
"""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

import pytest


# Columns: far fewer than the answers have.
WIDTH = 24
# A frozen machine may take its time; nothing waits for as long as this otherwise.
PATIENCE_SECONDS = 120
CTRL_C, CTRL_D, BACKSPACE, UP, ALT_ENTER = b"\x03", b"\x04", b"\x7f", b"\x1b[A", b"\x1b\r"
# Colours and movements of the cursor.
ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])")


class Screen:
    """A program in a pseudo-terminal."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.process, self.terminal = pty.fork()
        if self.process == 0:
            try:
                fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
                signal.signal(signal.SIGINT, signal.default_int_handler)
                # Those of this process are captured.
                sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")
                sys.stderr = open(2, "w", encoding="utf-8")
                run()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.received = ""

    def type(self, keys: str | bytes) -> None:
        # Python's line editor sees Ctrl-C at the next key only, if it comes while a line is drawn.
        if keys == CTRL_C:
            time.sleep(0.3)
        os.write(self.terminal, keys.encode() if isinstance(keys, str) else keys)

    def read_until(self, text: str) -> str:
        """What is shown up to a text, which is waited for."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in (shown := ESCAPE_SEQUENCE.sub("", self.received)):
            assert time.monotonic() < deadline, shown
            if select.select([self.terminal], [], [], 1)[0]:
                try:
                    self.received += self.decoder.decode(os.read(self.terminal, 4096))
                except OSError:  # On Linux, this is how a terminal ends.
                    pytest.fail(f"the program ended without showing {text!r}: {shown!r}")
        before, _, self.received = shown.partition(text)
        return before

    def end(self) -> int:
        """The exit code, when it has ended."""
        with suppress(OSError):
            while os.read(self.terminal, 4096):
                pass
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
