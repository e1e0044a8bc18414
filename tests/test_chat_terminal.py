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
"""The terminal chat in a terminal: line editing, history, Ctrl-C, through readline and through prompt_toolkit."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from screen import ALT_ENTER, BACKSPACE, CTRL_C, CTRL_D, UP, Screen
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ENDLESS = "Tell me everything."
HELLO = "你好！我是一个很小的演示模型，很高兴见到你。有什么可以帮你的吗？"

sys.path.insert(0, str(EXAMPLES))

import chat  # noqa: E402
import terminal  # noqa: E402


pytestmark = pytest.mark.usefixtures("leave_the_auto_classes_alone")


class EndlessWhenAsked(LogitsProcessor):
    """Makes the answer to one question go on until it is stopped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, question: str) -> None:
        self.question = tokenizer.encode(question, add_special_tokens=False)[-3:]
        self.word = tokenizer.encode("很", add_special_tokens=False)[-1]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ids = input_ids[0].tolist()
        length = len(self.question)
        starts = [start for start in range(len(ids)) if ids[start : start + length] == self.question]
        # The last question of the conversation has nothing but its answer behind it.
        if starts and set(ids[starts[-1] + length + 1 :]) <= {self.word}:
            time.sleep(0.02)
            scores = torch.full_like(scores, -1e9)
            scores[:, self.word] = 0.0
        return scores


@pytest.fixture(scope="module")
def loaded(leave_the_auto_classes_alone: None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return chat.load(EXAMPLES / "tiny-chatglm3", "cpu", "float32")


@pytest.fixture
def start(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path) -> Callable[[], Screen]:
    def run() -> None:
        endless = LogitsProcessorList([EndlessWhenAsked(loaded[1], ENDLESS)])
        conversation = chat.Conversation(*loaded, {"temperature": 0, "logits_processor": endless})
        chat.converse(conversation, terminal.LineReader(tmp_path / "state" / "history"))

    return lambda: Screen(run)


def say_two_things(screen: Screen) -> None:
    screen.read_until("Ctrl-D")
    screen.read_until(">")
    # Two cells wide, and three bytes long: all of it has to go.
    screen.type("你号")
    screen.type(BACKSPACE)
    screen.type("好\r")
    # The terminal breaks the line, nobody else does.
    screen.read_until(HELLO)
    screen.read_until(">")
    screen.type("My name is Lily.\r")
    screen.read_until("Nice to meet you, Lily!")
    screen.read_until(">")


def stop_an_answer(screen: Screen) -> None:
    screen.type(f"{ENDLESS}\r")
    screen.read_until("很很很")
    screen.type(CTRL_C)
    screen.read_until(">")
    screen.type("half a line")
    screen.read_until("half a line")
    screen.type(CTRL_C)
    screen.read_until(">")
    screen.type("/clear\r")
    screen.read_until(">")


def test_a_chat_in_a_terminal(start: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(terminal, "PromptSession", None)
    screen = start()
    say_two_things(screen)
    stop_an_answer(screen)
    # The line before the last one, from the history.
    screen.type(UP + UP + UP)
    screen.type("\r")
    screen.read_until("Nice to meet you, Lily!")
    screen.read_until(">")
    screen.type(CTRL_D)
    assert screen.end() == 0
    lines = (tmp_path / "state" / "history").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "_HiStOrY" not in line][:2] == ["你好", "My name is Lily."]
    assert (tmp_path / "state" / "history").stat().st_mode & 0o077 == 0
    # In another run, the history is there.
    screen = start()
    screen.read_until(">")
    screen.type(UP)
    screen.read_until("My name is Lily.")
    screen.type(CTRL_C)
    screen.read_until(">")
    screen.type("stop\r")
    assert screen.end() == 0


@pytest.mark.programs
def test_a_chat_with_prompt_toolkit(
    start: Callable[[], Screen], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert terminal.PromptSession is not None
    # A pseudo-terminal answers no questions about the cursor.
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    screen = start()
    say_two_things(screen)
    stop_an_answer(screen)
    screen.type("Hello!")
    screen.type(ALT_ENTER)
    screen.type("/help")
    screen.type("\r")
    screen.read_until(">")
    screen.type("/save " + str(tmp_path / "saved.json") + "\r")
    screen.read_until("2 messages in")
    screen.read_until(">")
    screen.type(CTRL_D)
    assert screen.end() == 0
    saved = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert saved["messages"][0] == {"role": "user", "content": "Hello!\n/help"}


def test_without_a_place_for_the_history(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert terminal._writable(tmp_path / "file" / "history") is None
    assert "without a history" in capsys.readouterr().err
