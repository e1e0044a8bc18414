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
"""The terminal chat: what it prints, through a pipe and for one question, and what it refuses."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
BUNDLED = EXAMPLES / "tiny-chatglm3"
HELLO = "你好！我是一个很小的演示模型，很高兴见到你。有什么可以帮你的吗？"

sys.path.insert(0, str(EXAMPLES))

import chat  # noqa: E402


pytestmark = pytest.mark.usefixtures("leave_the_auto_classes_alone")


@pytest.fixture(scope="module")
def loaded(leave_the_auto_classes_alone: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return chat.load(BUNDLED, "cpu", "float32")


@pytest.fixture
def run_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Calls the program with a command line: the exit code, what it printed, and its errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        code = chat.main()
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "glm4"])
def test_a_checkpoint_of_every_generation(
    run_chat: Callable[..., tuple[int, str, str]], reference_dir: Path, name: str
) -> None:
    words = ["--once", "你好", "--max-length", "40", "--temperature", "0"]
    code, output, errors = run_chat(str(reference_dir / name), *words)
    assert (code, errors) == (0, "")
    assert output.strip()


def test_one_question(run_chat: Callable[..., tuple[int, str, str]]) -> None:
    assert run_chat("--once", "你好") == (0, f"{HELLO}\n", "")


def test_through_a_pipe() -> None:
    lines = ["你好", "My name is Lily.", "", "What is my name?", "clear", "What is my name?", "stop", "Hello!"]
    # Where the environment asks for another encoding than UTF-8, as on Windows.
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, str(EXAMPLES / "chat.py"), str(BUNDLED)]
    result = subprocess.run(
        command, input="\n".join(lines), env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        HELLO,
        "Nice to meet you, Lily!",
        "Your name is Lily.",
        "You have not told me your name yet.",
    ]


def test_a_wrong_folder_fails_in_one_line(run_chat: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    assert run_chat(str(folder), "--once", "你好") == (1, "", f"error: there is no folder {folder}\n")


def test_it_names_what_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no config.json"):
        chat.load(tmp_path, "cpu", "auto")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match="not a ChatGLM checkpoint.*'llama'"):
        chat.load(tmp_path, "cpu", "auto")
    shutil.copyfile(BUNDLED / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match="no tokenizer file"):
        chat.load(tmp_path, "cpu", "auto")


def test_interrupting_an_answer_keeps_what_was_shown(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    conversation = chat.Conversation(*loaded, temperature=0)
    printed: list[str] = []

    def print_and_interrupt(text: str = "", **kwargs: Any) -> None:
        printed.append(text)
        if len(printed) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chat, "print", print_and_interrupt, raising=False)
        conversation.say("你好")
    beginning = "".join(printed)
    assert beginning and HELLO.startswith(beginning) and beginning != HELLO
    assert conversation.history[-1]["content"] == beginning
    conversation.say("谢谢")
    assert capsys.readouterr().out == "不客气！\n"


def test_a_question_that_is_too_long_does_not_end_the_chat(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = iter(["é" * 2000, "谢谢", "stop"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.converse(chat.Conversation(*loaded, temperature=0))
    captured = capsys.readouterr()
    assert captured.out == "不客气！\n"
    assert "1024 positions" in captured.err
