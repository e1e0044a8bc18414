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
"""What code of a model cannot do in its sandbox, and that there is no sandbox where it could."""

import ast
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

sys.path.insert(0, str(EXAMPLES))

import agent_sandbox  # noqa: E402
from agent_sandbox import CodeInterpreter, SandboxError  # noqa: E402


# For what ends by itself: a frozen machine may take its time.
PATIENCE_SECONDS = 300


@cache
def can_lock_in() -> bool:
    try:
        CodeInterpreter(lambda code: True, seconds=PATIENCE_SECONDS)
    except SandboxError:
        return False
    return True


# Only refusing can be tested elsewhere: on other systems, and in containers that forbid namespaces.
needs_a_sandbox = pytest.mark.skipif("not can_lock_in()", reason="this machine cannot lock code in")


@pytest.fixture(scope="module")
def interpreter() -> CodeInterpreter:
    return CodeInterpreter(lambda code: True, seconds=PATIENCE_SECONDS)


PROBE = """
import asyncio, ctypes, os, signal, socket, subprocess, threading, urllib.request

def attempt(name, action):
    try:
        found[name] = repr(action())
    except BaseException as error:
        found[name] = type(error).__name__

found = {}
attempt("network", lambda: socket.create_connection(("127.0.0.1", PORT), 5))
attempt("socket in the file system", lambda: socket.socket(socket.AF_UNIX).connect(SOCKET))
attempt("datagrams", lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].connect(SOCKET))
attempt("sockets of io_uring", lambda: ctypes.CDLL(None).syscall(425, 2, ctypes.create_string_buffer(256)))
attempt("own sockets", lambda: asyncio.run(asyncio.sleep(0)))
attempt("web", lambda: urllib.request.urlopen("http://example.com", timeout=5))
attempt("write outside", lambda: open(OUTSIDE + "/new", "w"))
attempt("read outside", lambda: open(OUTSIDE + "/secret").read())
attempt("list outside", lambda: os.listdir(OUTSIDE))
attempt("write to Python", lambda: open(os.__file__, "a"))
attempt("passwords", lambda: open("/etc/passwd").read())
attempt("other processes", lambda: os.listdir("/proc"))
attempt("kill", lambda: os.kill(PROCESS, signal.SIGKILL))
attempt("fork", os.fork)
attempt("program", lambda: subprocess.run(["true"]))
attempt("mount", lambda: ctypes.CDLL(None).mount(b"none", b"/usr", b"tmpfs", 0, None))
attempt("input", input)
attempt("large file", lambda: open("large", "wb").write(bytes(20 << 20)))
attempt("memory", lambda: len(bytearray(2 << 30)))
attempt("link", lambda: (os.symlink(OUTSIDE + "/secret", "link"), open("link").read()))
attempt("environment", lambda: sorted(name for name in os.environ if "KEY" in name or "TOKEN" in name))
attempt("own file", lambda: (open("own.txt", "w").write("x"), open("own.txt").read()))
attempt("thread", lambda: threading.Thread(target=print).start())
print(found)
"""
REFUSED = {
    "network": "PermissionError",
    "socket in the file system": "PermissionError",
    "datagrams": "PermissionError",
    "sockets of io_uring": "-1",
    "own sockets": "None",
    "web": "URLError",
    "write outside": "PermissionError",
    "read outside": "PermissionError",
    "list outside": "PermissionError",
    "write to Python": "PermissionError",
    "passwords": "PermissionError",
    "other processes": "PermissionError",
    "kill": "ProcessLookupError",
    "fork": "PermissionError",
    "program": "PermissionError",
    "mount": "-1",
    "input": "EOFError",
    "large file": "OSError",
    "memory": "MemoryError",
    "link": "PermissionError",
    "environment": "[]",
    "own file": "(1, 'x')",
    "thread": "None",
}


@needs_a_sandbox
def test_code_is_locked_in(interpreter: CodeInterpreter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    victim = subprocess.Popen(["sleep", "600"])
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        # Of a desktop or of Docker, say. Its path has to be short.
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as local,
    ):
        local.bind(f"{folder}/socket")
        local.listen()
        values = {"PORT": server.getsockname()[1], "OUTSIDE": str(tmp_path), "PROCESS": victim.pid}
        values["SOCKET"] = f"{folder}/socket"
        setup = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        output = interpreter(setup + PROBE)
    assert victim.poll() is None
    os.kill(victim.pid, signal.SIGTERM)
    victim.wait()
    found = ast.literal_eval(output.strip().splitlines()[-1])
    assert {name: value for name, value in found.items() if value != REFUSED[name]} == {}
    assert set(found) == set(REFUSED)
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


@needs_a_sandbox
def test_code_that_does_not_end_is_ended(interpreter: CodeInterpreter) -> None:
    impatient = replace(interpreter, seconds=2)
    with pytest.raises(TimeoutError, match="the code took longer than 2 seconds"):
        impatient("print('started')\nwhile True: pass")


@needs_a_sandbox
@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("```python\nprint(34 * 17)\n```", "578\n"),
        ("x = 1", "(the code printed nothing)"),
        ("print('before')\n1 / 0", "before\nError: ZeroDivisionError: division by zero"),
        ("print('x' * 100_000)", f"{'x' * 4000}\n(and more)\n"),
        ("import ctypes\nctypes.string_at(0)", "Error: the process ended with the status"),
    ],
)
def test_what_was_printed_is_the_result(interpreter: CodeInterpreter, code: str, output: str) -> None:
    assert interpreter(code).startswith(output)


@needs_a_sandbox
def test_nothing_runs_without_a_yes(interpreter: CodeInterpreter) -> None:
    shown: list[str] = []
    careful = replace(interpreter, confirm=lambda code: bool(shown.append(code)))
    with pytest.raises(PermissionError, match="did not allow"):
        careful("```\nprint(1)\n```")
    assert shown == ["print(1)"]


def failing(message: str) -> Callable[..., str]:
    return lambda self, code: f"Error: {message}"


def test_where_code_cannot_be_locked_in_there_is_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CodeInterpreter, "_run", failing("unshare: unshare failed: Operation not permitted"))
        with pytest.raises(SandboxError, match="cannot lock code in: unshare: unshare failed"):
            CodeInterpreter(lambda code: True, seconds=PATIENCE_SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(agent_sandbox.shutil, "which", lambda name: None)
        with pytest.raises(SandboxError, match="needs Linux and the program unshare"):
            CodeInterpreter(lambda code: True, seconds=PATIENCE_SECONDS)


@needs_a_sandbox
@pytest.mark.parametrize("lock", ["lock(", "forbid_processes_and_sockets(", "limit("])
def test_a_lock_that_fails_stops_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lock: str) -> None:
    source = agent_sandbox.INSIDE.read_text(encoding="utf-8")
    inside = tmp_path / "inside.py"
    inside.write_text(source.replace(f"def {lock}", f"def no_{lock}"), encoding="utf-8")
    monkeypatch.setattr(agent_sandbox, "INSIDE", inside)
    with pytest.raises(SandboxError, match="NameError"):
        CodeInterpreter(lambda code: True, seconds=PATIENCE_SECONDS)
