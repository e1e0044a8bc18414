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
"""A code interpreter that runs what a model wrote in a process of its own, locked in by the Linux kernel.

What the code can do there:

- no network: it has a network namespace of its own, without any device that is up (`unshare --net`), and it opens
  no socket, not even one in the file system, behind which there may be a desktop or Docker (seccomp);
- no other processes: it sees none (`--pid`) and starts none, only threads (seccomp);
- files: it writes in one folder, a file system in memory that is gone afterwards, and reads Python's standard library
  and the system's libraries; the kernel refuses it everything else (Landlock);
- memory, processor time and the size of files are limited (`setrlimit`), and so is the time;
- no environment variables of this process, so no keys, and no input.

Where any of this is missing, there is no interpreter: `CodeInterpreter()` tries it and raises.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO


# The output is a file too.
MAX_FILE_SIZE = 16 << 20
INSIDE = Path(__file__).with_name("agent_sandbox_inside.py")
# Namespaces for users, the network, mounts, processes and shared memory; the user is root in them, and nowhere else.
NAMESPACES = ("--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--ipc")
# A file system in memory over an empty folder, then Python in it.
ENTER = 'mount -t tmpfs -o size="$1",mode=700 tmpfs "$2" && cd "$2" && shift 2 && exec "$@"'


class SandboxError(Exception):
    """This machine cannot lock code in."""


@dataclass(frozen=True)
class CodeInterpreter:
    """Runs Python code in a sandbox, after `confirm` has allowed it.

    Args:
        confirm: is shown the code, and tells whether it may run.
        seconds: time for a run.
        megabytes: memory of a process. The folder in memory is as large again.
        max_output: characters of the output that are kept.

    Raises:
        SandboxError: where the kernel or the system's programs cannot lock code in.
    """

    confirm: Callable[[str], bool]
    seconds: int = 10
    megabytes: int = 512
    max_output: int = 4000
    interpreter: str = field(default_factory=lambda: os.path.realpath(sys.executable))

    def __post_init__(self) -> None:
        if sys.platform != "linux" or shutil.which("unshare") is None:
            raise SandboxError("running code needs Linux and the program unshare (util-linux)")
        output = self._run("print('locked in')")
        if output != "locked in\n":
            raise SandboxError(f"this machine cannot lock code in: {output.removeprefix('Error: ')}")

    def __call__(self, code: str) -> str:
        """Run `code`, in a Markdown fence or bare, and return what it printed.

        Raises:
            PermissionError: if it was not allowed.
            TimeoutError: if it did not end in time.
        """
        code = strip_fence(code)
        if not self.confirm(code):
            raise PermissionError("the user did not allow this code to run")
        return self._run(code) or "(the code printed nothing)"

    def _run(self, code: str) -> str:
        with (
            tempfile.TemporaryDirectory() as folder,
            tempfile.TemporaryFile() as output,
            tempfile.TemporaryFile() as errors,
        ):
            limits = [str(self.megabytes << 20), str(self.seconds), str(MAX_FILE_SIZE)]
            python = [self.interpreter, "-I", "-c", INSIDE.read_text(encoding="utf-8"), *limits]
            process = subprocess.Popen(
                ["unshare", *NAMESPACES, "sh", "-c", ENTER, "sh", f"{self.megabytes}m", folder, *python],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=errors,
                cwd="/",
                env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8", "HOME": folder},
                start_new_session=True,
            )
            try:
                process.communicate(code.encode(errors="replace"), timeout=self.seconds)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the code took longer than {self.seconds} seconds") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            printed, said = self._read(output), self._read(errors)
        if process.returncode == 0:
            return printed + said
        # The last line of a traceback says what happened; a process that was killed says nothing.
        reason = (said.strip().splitlines() or [f"the process ended with the status {process.returncode}"])[-1]
        return f"{printed}Error: {reason}"

    def _read(self, file: IO[bytes]) -> str:
        file.seek(0)
        # Four bytes are the longest character.
        text = file.read(4 * self.max_output + 1).decode(errors="replace")
        return text if len(text) <= self.max_output else f"{text[: self.max_output]}\n(and more)\n"


def strip_fence(code: str) -> str:
    """The code inside of a Markdown fence, or all of it where there is none."""
    lines = code.strip().split("\n")
    if lines[0].startswith("```"):
        return "\n".join(lines[1:-1] if lines[-1].strip() == "```" else lines[1:])
    return code
