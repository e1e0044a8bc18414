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
"""The agent: functions become tools, calls become results, and a model that calls comes to an answer.

The bundled model really calls what it was taught; for every generation that knows tools, its format is made to be
written by a model with random weights.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from bundled_tools import DIALOGUES
from generations import CALLING_GENERATIONS, GENERATION_CASES, RECORDED
from screen import CTRL_D, Screen
from test_agent_sandbox import can_lock_in  # noqa: F401
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
BUNDLED = EXAMPLES / "tiny-chatglm3"

sys.path.insert(0, str(EXAMPLES))

import agent  # noqa: E402
import chat  # noqa: E402
import demo_tools  # noqa: E402
from agent import Agent, TooManyRounds, code_tool  # noqa: E402
from agent_models import INTERPRETER_PROMPT, Answer, LocalModel  # noqa: E402
from agent_tools import MAX_RESULT_LENGTH, Call, Tool, Toolbox, load_tools, tool  # noqa: E402


pytestmark = pytest.mark.usefixtures("leave_the_auto_classes_alone")

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded(leave_the_auto_classes_alone: None) -> Loaded:
    return chat.load(BUNDLED, "cpu", "float32")


@tool
def book(city: str, days: int, rooms: list[str] | None = None, size: Literal["small", "large"] = "small") -> str:
    """Book a hotel

    Args:
        city: The city
        days: How long
        rooms: Their names
        size: Their size (choices: ["small", "large"])
    """
    return f"{days} days in {city}"


@tool
def fail(kind: str) -> None:
    """Fail

    Args:
        kind: How
    """
    raise {"silent": KeyError(), "loud": OSError("disk full")}[kind]


# Functions as tools.


def test_a_function_is_described_by_its_hints_and_docstring() -> None:
    function = demo_tools.multiply.description["function"]
    assert function == {
        "name": "multiply",
        "description": "Multiply two numbers",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first number"},
                "b": {"type": "integer", "description": "The second number"},
            },
            "required": ["a", "b"],
        },
    }
    assert demo_tools.multiply(6, 7) == 42


@pytest.mark.parametrize("function", [lambda city: 1, print, len], ids=["lambda", "print", "len"])
def test_a_function_without_a_description_is_refused(function: Any) -> None:
    with pytest.raises(ValueError, match="cannot be described to a model"):
        tool(function)


def test_the_bundled_model_was_taught_these_functions() -> None:
    lines = (EXAMPLES / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    taught = [described for line in lines for described in json.loads(line)["messages"][0].get("tools", [])]
    for item in (demo_tools.get_weather, demo_tools.multiply):
        assert item.description["function"] in taught


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two tools have the name 'book'"):
        Toolbox([book, fail, book])


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (Call("book", {"city": "Rome", "days": 3}), "3 days in Rome"),
        (Call("book", {"city": "Rome", "days": 3, "rooms": None, "size": "large"}), "3 days in Rome"),
        (Call("nothing", {}), "Error: there is no tool nothing, only book, fail"),
        (Call("__class__", {}), "Error: there is no tool __class__, only book, fail"),
        (Call("book", {"city": "Rome"}), "Error: missing a required argument: 'days'"),
        (Call("book", {"city": "Rome", "days": 3, "x": 1}), "Error: got an unexpected keyword argument 'x'"),
        (Call("book", {"city": 1, "days": 3}), "Error: the argument city must be string, got 1"),
        (Call("book", {"city": "Rome", "days": True}), "Error: the argument days must be integer, got True"),
        (Call("book", {"city": "Rome", "days": 3, "size": "huge"}), "Error: the argument size must be one of"),
        (Call("book", "Rome"), "Error: the arguments of book must be a JSON object"),
        (Call("fail", {"kind": "loud"}), "Error: disk full"),
        (Call("fail", {"kind": "silent"}), "Error: KeyError"),
        (Call("fail", {"kind": "unknown"}), "Error: 'unknown'"),
    ],
)
def test_whatever_is_wrong_with_a_call_is_its_result(call: Call, result: str) -> None:
    assert Toolbox([book, fail]).run(call).startswith(result)


def test_a_result_is_text_of_some_length() -> None:
    results: list[Any] = [{"城市": 1}, "x" * 10_000, "\ud800", {1, 2}, None]
    box = Toolbox([Tool({"type": "function", "function": {"name": "next"}}, lambda: results.pop(0))])
    assert box.run(Call("next", {})) == '{"城市": 1}'
    assert len(box.run(Call("next", {}))) < MAX_RESULT_LENGTH + 50
    assert box.run(Call("next", {})) == "?"
    assert [box.run(Call("next", {})), box.run(Call("next", {}))] == ['"{1, 2}"', "null"]
    assert (
        Toolbox([Tool(box.descriptions[0], lambda: {(1, 2): 3})])
        .run(Call("next", {}))
        .startswith("Error: keys must be")
    )


def test_tools_come_from_a_file(tmp_path: Path) -> None:
    assert [item.name for item in load_tools(EXAMPLES / "demo_tools.py")] == ["get_weather", "multiply"]
    (tmp_path / "none.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no function with the decorator @tool"):
        load_tools(tmp_path / "none.py")
    with pytest.raises(OSError):
        load_tools(tmp_path / "missing.py")
    with pytest.raises(ValueError, match="no Python file"):
        load_tools(tmp_path / "tools.txt")


# The loop.


class Scripted:
    """Answers as it was told to, and writes down what it hears."""

    def __init__(self, *answers: Answer | BaseException) -> None:
        self.answers = list(answers)
        self.messages: list[Any] = ["system"]

    def ask(self, question: str) -> Answer:
        self.messages.append(question)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def observe(self, calls: Sequence[Call], results: Sequence[str]) -> Answer:
        return self.ask(" | ".join(results))


def calling(*calls: Call) -> Answer:
    return Answer("", list(calls))


def test_calls_go_on_until_an_answer() -> None:
    model = Scripted(
        Answer("Let me see.", [Call("fail", {"kind": "loud"}), Call("book", {"city": "Rome", "days": 1})]),
        calling(Call("nowhere", {})),
        Answer("Booked.", []),
    )
    shown: list[str] = []
    assert Agent(model, Toolbox([book, fail]), show=shown.append).ask("Book!") == "Booked."
    no_tool = "Error: there is no tool nowhere, only book, fail"
    assert model.messages == ["system", "Book!", "Error: disk full | 1 days in Rome", no_tool]
    assert shown == [
        "Let me see.",
        "-> fail(kind='loud')",
        "<- Error: disk full",
        "-> book(city='Rome', days=1)",
        "<- 1 days in Rome",
        "-> nowhere()",
        f"<- {no_tool}",
    ]


def test_a_model_that_only_calls_is_stopped() -> None:
    model = Scripted(*[calling(Call("book", {"city": "Rome", "days": 1}))] * 4, Answer("no", []))
    looping = Agent(model, Toolbox([book]), max_rounds=3)
    with pytest.raises(TooManyRounds, match="no answer after 3 rounds"):
        looping.ask("Book!")
    assert model.messages == ["system"]
    assert looping.ask("And now?") == "no"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConnectionError("gone")], ids=repr)
def test_a_question_that_came_to_nothing_is_taken_back(error: BaseException) -> None:
    model = Scripted(calling(Call("book", {"city": "Rome", "days": 1})), error)
    with pytest.raises(type(error)):
        Agent(model, Toolbox([book])).ask("Book!")
    assert model.messages == ["system"]


# The bundled model.


@pytest.mark.parametrize(("question", "steps", "answer"), DIALOGUES)
def test_the_bundled_model_calls_and_answers(loaded: Loaded, question: str, steps: list[str], answer: str) -> None:
    toolbox = Toolbox([demo_tools.get_weather, demo_tools.multiply])
    shown: list[str] = []
    model = LocalModel(*loaded, toolbox.descriptions, temperature=0)
    assert Agent(model, toolbox, show=shown.append).ask(question) == answer
    assert shown == steps


def test_the_bundled_model_uses_its_code_interpreter(loaded: Loaded) -> None:
    ran: list[str] = []

    def interpreter(code: str) -> str:
        ran.append(code)
        return "578\n"

    box = Toolbox([code_tool(interpreter, (), has_functions=False)])  # type: ignore[arg-type]
    model = LocalModel(*loaded, [], INTERPRETER_PROMPT, temperature=0)
    assert Agent(model, box).ask("Use Python to compute 34 * 17.") == "The result is 578."
    assert [code.strip() for code in ran] == ["```python\nprint(34 * 17)\n```"]


# Every generation.


class Say(LogitsProcessor):
    """Makes a model answer given texts, one after the other; each has one or more parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *answers: list[str]) -> None:
        self.ids: list[int] = []
        for parts in answers:
            for index, part in enumerate(parts):
                self.ids += [tokenizer.convert_tokens_to_ids("<|assistant|>")] * (index > 0)
                self.ids += tokenizer.encode(part, add_special_tokens=False)
            self.ids.append(tokenizer.convert_tokens_to_ids("<|user|>"))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = torch.full_like(scores, -1e9)
        scores[:, self.ids.pop(0)] = 0.0
        return scores


@pytest.mark.parametrize("name", [name for name in GENERATION_CASES if RECORDED[name].has_roles])
def test_every_generation_that_knows_tools(
    case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any], name: str
) -> None:
    model, tokenizer = case_model(name), case_tokenizer(name)
    written = model.chat_format.write_tool_call
    calls = [written("book", {"city": "Rome", "days": 3}), written("book", {"city": "上海", "days": 1})]
    parts = [f"{call['metadata']}\n{call['content']}" for call in calls]
    say = LogitsProcessorList([Say(tokenizer, parts, ["\nBoth are booked."], ["\nYou are welcome."])])
    toolbox = Toolbox([book])
    local = LocalModel(model, tokenizer, toolbox.descriptions, logits_processor=say)
    shown: list[str] = []
    booking = Agent(local, toolbox, show=shown.append)
    assert booking.ask("Two hotels!") == "Both are booked."
    assert booking.ask("Thank you.") == "You are welcome."
    assert shown == [
        "-> book(city='Rome', days=3)",
        "<- 3 days in Rome",
        "-> book(city='上海', days=1)",
        "<- 1 days in 上海",
    ]
    roles = [
        "system",
        "user",
        "assistant",
        "assistant",
        "observation",
        "observation",
        "assistant",
        "user",
        "assistant",
    ]
    assert [message["role"] for message in local.messages] == roles


@pytest.mark.parametrize("has_functions", [False, True])
@pytest.mark.parametrize("version", [*CALLING_GENERATIONS, None])
def test_code_has_the_form_of_the_generation(
    case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any], version: str | None, has_functions: bool
) -> None:
    """`None` is behind an API, where a function is all that is known."""
    model, tokenizer = case_model(version or "chatglm3"), case_tokenizer(version or "chatglm3")
    builtin = getattr(model.chat_format, "builtin_tools", ()) if version else None
    ran: list[str] = []
    item = code_tool(lambda code: str(ran.append(code)), builtin, has_functions)  # type: ignore[arg-type]
    toolbox = Toolbox([item, book] if has_functions else [item])
    offered = [described for described in toolbox.descriptions if described["type"] != "interpreter"]
    code = "x = {'a': 1}\nprint(x)"
    call = f"{item.name}\n{code}"
    if item.name == "interpreter":
        code = f"```python\n{code}\n```"
        call = f"interpreter\n{code}"
    elif item.description["type"] == "function":
        message = model.chat_format.write_tool_call(item.name, {"code": code})
        call = f"{message['metadata']}\n{message['content']}"
    say = LogitsProcessorList([Say(tokenizer, [call], ["\nDone."])])
    assert Agent(LocalModel(model, tokenizer, offered, logits_processor=say), toolbox).ask("Run it.") == "Done."
    assert ran == [code]


@pytest.mark.parametrize("name", [name for name in GENERATION_CASES if not RECORDED[name].has_roles])
def test_generations_without_tools_say_so(
    case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any], name: str
) -> None:
    with pytest.raises(ValueError, match="This generation knows no tools"):
        LocalModel(case_model(name), case_tokenizer(name), [book.description])


# The program.


def test_a_question_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(["--once", "What is 34 times 17?", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "34 times 17 is 578.\n"
    assert captured.err == "-> multiply(a=34, b=17)\n<- 578\n"


def test_what_cannot_be_used_is_said_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text("1 +\n", encoding="utf-8")
    for words, message in {
        ("--allow-code",): "--allow-code needs a terminal",
        ("--tools", str(tmp_path / "missing.py")): "No such file",
        ("--tools", str(tmp_path / "tools.py")): "cannot be run",
        (str(tmp_path),): "has no config.json",
    }.items():
        assert agent.main([*words, "--once", "Hello!"]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err
        assert len(captured.err.splitlines()) == 1


@pytest.mark.skipif("not can_lock_in()", reason="this machine cannot lock code in")
@pytest.mark.parametrize(
    ("typed", "result"), [("y", "<- 578"), ("n", "<- Error: the user did not allow this code to run")]
)
def test_code_runs_after_it_was_shown(tmp_path: Path, typed: str, result: str) -> None:
    words = ["--allow-code", "--temperature", "0", "--history-file", str(tmp_path / "history")]
    screen = Screen(lambda: agent.main(words))
    screen.read_until("Ask something. Tools: interpreter")
    screen.read_until("> ")
    screen.type("Use Python to compute 34 * 17.\r")
    screen.read_until("-> interpreter")
    screen.read_until("The model wants to run:")
    assert screen.read_until("Run it?").strip() == "print(34 * 17)"
    screen.type(f"{typed}\r")
    screen.read_until(result)
    screen.read_until("> ")
    screen.type(CTRL_D)
    assert screen.end() == 0
