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
"""The terminal chat: what it prints, through a pipe and for one question, its commands, and what it refuses."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundled_tools import WEATHER
from generations import GENERATION_CASES, RECORDED
from transformers import PreTrainedModel, PreTrainedTokenizerBase


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
BUNDLED = EXAMPLES / "tiny-chatglm3"
HELLO = "你好！我是一个很小的演示模型，很高兴见到你。有什么可以帮你的吗？"

sys.path.insert(0, str(EXAMPLES))

import chat  # noqa: E402
import chat_commands  # noqa: E402
import terminal  # noqa: E402


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


@pytest.mark.grid
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
    conversation = chat.Conversation(*loaded, {"temperature": 0})
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


@pytest.fixture
def talk(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[list[str], list[str], chat.Conversation]]:
    """Says lines to the bundled model: the answers, what else was said, and the conversation."""

    def run(*lines: str, **changes: Any) -> tuple[list[str], list[str], chat.Conversation]:
        remaining = iter(lines)

        def read(prompt: str) -> str:
            for line in remaining:
                return line
            raise EOFError

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        conversation = chat.Conversation(*loaded, {"temperature": 0}, **changes)
        chat.converse(conversation, terminal.LineReader(None))
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err.splitlines(), conversation

    return run


def test_a_question_that_is_too_long_does_not_end_the_chat(talk: Callable[..., Any]) -> None:
    answers, errors, _ = talk("é" * 2000, "谢谢", "stop")
    assert answers == ["不客气！"]
    assert len(errors) == 1 and "1024 positions" in errors[0]


def test_a_text_of_several_lines(talk: Callable[..., Any]) -> None:
    _, _, conversation = talk('"""', "Hello!", "", "/help", '"""', '"""', "你好")
    assert [message["content"] for message in conversation.history[::2]] == ["Hello!\n\n/help", "你好"]


def test_help_names_every_command(talk: Callable[..., Any]) -> None:
    _, notes, _ = talk("/help")
    named = {line.split()[0].removeprefix("/") for line in notes}
    assert named == {*chat_commands.COMMANDS, "stop", '"""'}
    _, errors, _ = talk("/nothing")
    assert errors == ["error: there is no command /nothing; /help lists them"]


def test_what_only_looks_like_a_command_is_a_question(talk: Callable[..., Any]) -> None:
    answers, errors, conversation = talk("/etc/passwd", "/ help")
    assert len(conversation.history) == 4 and errors == []


def test_the_system_message_stays_and_the_conversation_goes(talk: Callable[..., Any]) -> None:
    answers, _, conversation = talk("/system 你是一个乐于助人的助手。", "我叫小红。", "/clear", "你是谁？")
    assert [message["content"] for message in conversation.history] == ["你是谁？", answers[-1]]
    assert "ChatGLM3" in answers[-1]
    assert conversation.beginning() == [{"role": "system", "content": "你是一个乐于助人的助手。"}]
    assert talk("/system x", "/system")[2].beginning() == []


def test_a_question_is_asked_again(talk: Callable[..., Any]) -> None:
    answers, errors, conversation = talk("/retry", "My name is Lily.", "What is my name?", "/retry")
    assert errors == ["error: nothing was said yet"]
    assert answers == ["Nice to meet you, Lily!", "Your name is Lily.", "Your name is Lily."]
    assert len(conversation.history) == 4


def test_stats_count_tokens(talk: Callable[..., Any], loaded: tuple[PreTrainedModel, Any]) -> None:
    _, notes, conversation = talk("/stats", "你好", "/stats")
    assert notes[0] == "error: there is no answer yet"
    prompt = loaded[1].encode_conversation(conversation.history[:1])
    written = loaded[1].encode_conversation(conversation.history, add_generation_prompt=False)
    assert notes[1].startswith(f"{len(prompt)} tokens to read, {len(written) - len(prompt)} written; ")
    assert "tokens a second" in notes[1]


@pytest.mark.usefixtures("leave_the_auto_classes_alone")
def test_a_picture_goes_with_the_next_question(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase], reference_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="reads text alone"):
        chat_commands.run_command("/image a.png", chat.Conversation(*loaded))
    picture = reference_dir / "glm4v" / "images" / "square.png"
    seeing = chat.load(reference_dir / "glm4v", "cpu", "float32")
    conversation = chat.Conversation(*seeing, {"temperature": 0, "max_new_tokens": 3})
    with pytest.raises(ValueError, match="nothing.png"):
        chat_commands.run_command("/image nothing.png", conversation)
    chat_commands.run_command(f"/image {picture}", conversation)
    conversation.say("What is this?")
    conversation.say("And what else?")
    assert [message.get("image") for message in conversation.history] == [str(picture), None, None, None]
    saved = tmp_path / "saved.json"
    chat_commands.run_command(f"/save {saved}", conversation)
    chat_commands.run_command("/clear", conversation)
    chat_commands.run_command(f"/load {saved}", conversation)
    before = list(conversation.history)
    chat_commands.run_command("/retry", conversation)
    assert conversation.history == before
    chat_commands.run_command("/clear", conversation)
    chat_commands.run_command(f"/image {picture}", conversation)
    conversation.say("What is this?")
    chat_commands.run_command("/retry", conversation)
    assert conversation.history[0]["image"] == str(picture)


def test_tools_of_a_file_are_called_and_given_results(talk: Callable[..., Any], tmp_path: Path) -> None:
    file, saved = tmp_path / "tools.json", tmp_path / "saved.json"
    file.write_text(json.dumps([WEATHER]), encoding="utf-8")
    question, result = "What is the weather like in Paris?", '{"temperature": 18, "condition": "cloudy"}'
    answers, _, conversation = talk(f"/tools {file}", question, f"/save {saved}", result)
    call, answer = '{"name": "get_weather", "parameters": {"city": "Paris"}}', answers[-1]
    # A call is recognised when it is complete; until then its text was shown.
    assert call in answers and answer == "It is cloudy in Paris, and the temperature is 18 degrees."
    assert [message["role"] for message in conversation.history] == ["user", "assistant", "observation", "assistant"]
    # The result may also come in another run.
    answers, notes, again = talk(f"/load {saved}", result)
    assert answers == [answer] and again.history == conversation.history
    assert notes == [f"2 messages from {saved}"]
    assert talk(f"/tools {file}", "/tools", question)[0] == [
        "I cannot look up the weather: I was given no tool for it."
    ]


BAD_FILES = {
    "nothing": "cannot be read: No such file",
    "folder": "cannot be read: Is a directory",
    "binary": "is not JSON",
    "deep": "is not JSON",
    "number": "",
    "text": "",
    "strange": "",
}


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\x00{")
    for name, content in {
        "deep": "[" * 100_000,
        "number": "1",
        "text": '["a"]',
        "strange": '[{"role": 1}, [2]]',
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("command", ["/tools", "/load"])
def test_a_bad_file_loses_nothing(talk: Callable[..., Any], bad_files: Path, command: str) -> None:
    lines = [f"{command} {bad_files / name}" for name in BAD_FILES]
    answers, errors, conversation = talk("My name is Lily.", *lines, "/load", "What is my name?")
    assert answers[-1] == "Your name is Lily."
    assert conversation.beginning() == []
    for error, reason in zip(errors, [*BAD_FILES.values(), "which file?"], strict=True):
        assert error.startswith("error: ") and reason in error


def test_a_conversation_that_cannot_go_on_is_not_loaded(talk: Callable[..., Any], tmp_path: Path) -> None:
    for messages, reason in (
        ([{"role": "user", "content": "a"}], "must be an answer"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ud800"}], "surrogate"),
    ):
        (tmp_path / "file").write_text(json.dumps({"messages": messages}), encoding="utf-8")
        _, errors, conversation = talk(f"/load {tmp_path / 'file'}")
        assert conversation.history == [] and reason in errors[0]


def test_a_file_that_cannot_be_written_is_named(talk: Callable[..., Any], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old", encoding="utf-8")
    (tmp_path / "old.json.new").mkdir()
    _, errors, _ = talk("你好", f"/save {tmp_path / 'nowhere' / 'file'}", f"/save {old}", "/save")
    assert "nowhere" in errors[0] and "old.json" in errors[1] and "which file?" in errors[2]
    assert old.read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_conversations_of_every_generation(
    case_model: Callable[[str], Any],
    case_tokenizer: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    settings = {"temperature": 0, "max_new_tokens": 4}
    conversation = chat.Conversation(case_model(name), case_tokenizer(name), settings, system="s")
    for line in ("a", "b"):
        conversation.say(line)
    assert [message["role"] for message in conversation.history] == ["user", "assistant"] * 2
    file = tmp_path / "saved.json"
    chat_commands.run_command(f"/save {file}", conversation)
    loaded = chat.Conversation(case_model(name), case_tokenizer(name), settings)
    chat_commands.run_command(f"/load {file}", loaded)
    assert (loaded.system, loaded.history) == ("s", conversation.history)
    file.write_text(json.dumps([WEATHER]), encoding="utf-8")
    if RECORDED[name].has_roles:
        chat_commands.run_command(f"/tools {file}", loaded)
        assert "get_weather" in json.dumps(loaded.beginning())
    else:
        with pytest.raises(ValueError, match="knows no tools"):
            chat_commands.run_command(f"/tools {file}", loaded)
        assert loaded.tools is None


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\x07\tb\n你好 👨‍👩‍👧\x9b"
    assert terminal.harmless(text) == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert terminal.harmless(text) == "a\ufffd[2J\ufffd\tb\n你好 👨‍👩‍👧\ufffd"
    assert terminal.visible("x = 1 \u202e# \x1b[2K你好\n") == "x = 1 \\u202e# \\x1b[2K你好\n"
