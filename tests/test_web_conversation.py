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
"""What the web page does with conversations, without a browser: asking, showing, keeping them, calling functions."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoModel


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"

sys.path.insert(0, str(EXAMPLES))

from agent_tools import tool  # noqa: E402
from local_code import load_tokenizer, register  # noqa: E402
from serving import web_conversation as conversations  # noqa: E402
from serving.picture_files import read_address, read_picture, write_address  # noqa: E402
from serving.web_answers import MAX_CALLS, Settings, answer  # noqa: E402
from serving.web_texts import TEXTS, pick_language  # noqa: E402


pytestmark = pytest.mark.usefixtures("leave_the_auto_classes_alone")

PICTURE = write_address(Image.new("RGB", (40, 20), "red"), 32)
CALL = {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='Paris')\n```"}
TALK: dict[str, Any] = {
    "id": "1",
    "messages": [
        {"role": "user", "content": "What is the weather like?"},
        CALL,
        {"role": "observation", "content": "```18```"},
        {"role": "assistant", "metadata": "", "content": "18 degrees."},
    ],
}


def roles(conversation: dict[str, Any]) -> str:
    return "".join(message["role"][0] for message in conversation["messages"])


def test_steps_back_and_forth() -> None:
    assert roles(conversations.with_question(TALK, "And now?")) == "uaoau"
    waiting = conversations.without_last_answer(TALK)
    assert roles(waiting) == "uao"
    called, result = conversations.without_open_question(waiting)
    assert (roles(called), result) == ("ua", "```18```")
    assert conversations.called_tool(called["messages"]) == "get_weather"
    assert roles(conversations.with_question(called, "19")) == "uao"
    assert conversations.without_open_question(TALK) == (TALK, "")
    assert conversations.without_last_question(TALK) == ({"id": "1", "messages": []}, "What is the weather like?")
    assert conversations.without_last_question({"id": "1", "messages": []}) == ({"id": "1", "messages": []}, "")
    edited = conversations.with_edited(TALK, 0, "Hello!")
    assert edited["messages"] == [{"role": "user", "content": "Hello!"}]
    assert conversations.with_edited(TALK, 4, "Hello!") == TALK
    # Nothing of this has changed it.
    assert roles(TALK) == "uaoa"


def test_calls_and_results_are_shown_as_code() -> None:
    bubbles = conversations.shown(TALK["messages"], TEXTS["en"])
    assert [bubble.get("metadata", {}).get("title") for bubble in bubbles] == [
        None,
        "Call of get_weather",
        "Result of get_weather",
        None,
    ]
    assert bubbles[1]["content"] == '```json\n{\n  "city": "Paris"\n}\n```'
    # A fence in it does not end the code.
    assert bubbles[2]["content"] == "````json\n```18```\n````"
    unreadable = [{**CALL, "content": "tool_call(os.system('ls'))"}]
    assert "tool_call(os.system('ls'))" in conversations.shown(unreadable, TEXTS["zh"])[0]["content"]


@pytest.mark.parametrize(
    "stored",
    [
        None,
        "text",
        {"id": "1"},
        [1, "2", None, {}, {"id": 1, "messages": []}, {"id": "1", "messages": []}, {"id": "1", "messages": [{}]}],
        [{"id": "1", "messages": [{"role": "system", "content": "Obey."}]}],
        [{"id": "1", "messages": [{"role": "user", "content": ["a"]}]}],
        [{"id": "1", "messages": [{"role": "user", "content": "a", "tools": []}]}],
        [{"id": "1", "messages": [{"role": "user", "content": "a", "image": "/etc/passwd"}]}],
        [{"id": "1", "messages": [{"role": "user", "content": "a", "image": "http://127.0.0.1/x.png"}]}],
        [{"id": "1", "messages": [{"role": "user", "content": "a", "image": 'data:image/png;base64,"><script>'}]}],
    ],
)
def test_nothing_else_is_taken_for_an_old_conversation(stored: Any) -> None:
    assert conversations.read_saved(stored) == []


def test_old_conversations_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    for number in range(conversations.MAX_SAVED + 1):
        saved = conversations.with_saved(saved, {"id": str(number), "messages": TALK["messages"]})
    assert len(saved) == conversations.MAX_SAVED
    assert (saved[0]["id"], saved[-1]["id"]) == ("50", "1")
    assert [item["id"] for item in conversations.with_saved(saved, {**TALK, "id": "7"})[:2]] == ["7", "50"]
    assert conversations.read_saved(saved) == saved
    monkeypatch.setattr(conversations, "MAX_SAVED_CHARACTERS", 1000)
    assert 0 < len(conversations.with_saved(saved, TALK)) < 5
    assert conversations.title({"messages": [{"role": "user", "content": "a b\n" * 20}]}) == f"{'a b ' * 10}…"


def test_a_picture_comes_and_goes_with_its_question(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = {"id": "1", "messages": []}
    asked = conversations.with_question(empty, "What is it?", PICTURE)
    assert conversations.has_picture(asked) and not conversations.has_picture(TALK)
    back, question = conversations.without_open_question(asked)
    assert (back, question) == (empty, "What is it?")
    assert conversations.picture_taken_back(asked, back) == PICTURE
    assert conversations.picture_taken_back(TALK, empty) == ""
    assert conversations.with_edited(asked, 0, "Why?")["messages"] == [{**asked["messages"][0], "content": "Why?"}]
    (bubble,) = conversations.shown(asked["messages"], TEXTS["en"])
    assert bubble == {"role": "user", "content": "What is it?", "image": PICTURE}
    # The newest pictures are kept, and of the others a note.
    assert conversations.read_saved([asked]) == [asked]
    monkeypatch.setattr(conversations, "MAX_PICTURE_CHARACTERS", 2 * len(PICTURE))
    saved: list[dict[str, Any]] = []
    for number in range(4):
        saved = conversations.with_saved(saved, {**asked, "id": str(number)})
    assert [conversations.has_picture(conversation) for conversation in saved] == [True, True, False, False]
    assert conversations.read_saved(saved) == saved
    (bubble,) = conversations.shown(saved[-1]["messages"], TEXTS["en"])
    assert bubble["content"] == "*This picture was not kept.*\n\nWhat is it?" and "image" not in bubble


def test_pictures_are_kept_no_larger_than_the_model_sees_them() -> None:
    opened = read_picture(read_address(PICTURE))
    assert (opened.size, opened.getpixel((3, 3))) == ((32, 16), (255, 0, 0))
    assert PICTURE.startswith("data:image/png;base64,")
    noise = Image.effect_noise((1120, 1120), 90).convert("RGB")
    assert write_address(noise, 1120).startswith("data:image/jpeg;base64,")


def test_models_that_see_are_shown_pictures(reference_dir: Path) -> None:
    register()
    folder = reference_dir / "glm4v"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), load_tokenizer(folder)
    settings = Settings(generation={"temperature": 0, "max_new_tokens": 6}, sees=True)
    answers = []
    for picture, sees in ((PICTURE, True), (PICTURE, False), ("", True)):
        talk = conversations.with_question(conversations.new_conversation(), "What is it?", picture)
        *_, talk = answer(model, tokenizer, talk, replace(settings, sees=sees))
        answers.append(talk["messages"][-1]["content"])
        assert conversations.has_picture(talk) == bool(picture)
        # It is there in the next turn.
        *_, talk = answer(model, tokenizer, conversations.with_question(talk, "Why?"), replace(settings, sees=sees))
        assert roles(talk) == "uaua"
    assert answers[0] != answers[1] == answers[2]


@pytest.mark.parametrize("text", ["{", "{}", '["a"]', "[" * 100_000, '"a"', "NaN"])
def test_descriptions_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        conversations.read_tools(text)
    assert conversations.read_tools(" \n".strip()) == []


def test_every_word_is_there_in_both_languages() -> None:
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    for key, text in TEXTS["en"].items():
        assert text.count("{") == TEXTS["zh"][key].count("{"), key
    assert [pick_language(name) for name in ("zh-CN", "zh", "en-US", "de", None, 1)] == ["zh", "zh", *["en"] * 4]


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_every_generation_answers(reference_dir: Path, name: str) -> None:
    register()
    folder = reference_dir / name
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), load_tokenizer(folder)
    talk = conversations.with_question(conversations.new_conversation(), "你好")
    for question in ("再见", ""):
        settings = Settings(system="Be brief.", generation={"temperature": 0, "max_new_tokens": 4})
        *_, talk = answer(model, tokenizer, talk, settings)
        assert roles(talk).endswith("ua")
        if question:
            talk = conversations.with_question(talk, question)
    assert roles(talk) == "uaua"


class CallingModel:
    """A model that calls a function until it has a result, or for ever."""

    def __init__(self, chat_format: Any, call: dict[str, Any], always: bool = False) -> None:
        self.chat_format, self.call, self.always = chat_format, call, always
        self.histories: list[Any] = []

    def stream_chat(self, tokenizer: Any, query: str, history: Any, role: str) -> Iterator[Any]:
        self.histories.append(history)
        before = [*history, {"role": role, "content": query}]
        done = role == "observation" and not self.always
        yield "", [*before, {"role": "assistant", "content": "Done."} if done else self.call]


@tool
def get_weather(city: str) -> dict[str, int]:
    """
    Get the weather

    Args:
        city: A city
    """
    return {"temperature": len(city)}


@pytest.mark.parametrize(
    ("content", "result"),
    [
        ("tool_call(city='Paris')", '{"temperature": 5}'),
        ("tool_call(town='Paris')", "Error: missing a required argument: 'city'"),
        ("tool_call(city=1)", "Error: the argument city must be string, got 1"),
        ("import os", "Error: the arguments of get_weather must be a JSON object"),
    ],
)
def test_functions_run_when_they_are_called(content: str, result: str) -> None:
    chat_format = conversations.load_module("conversation_chatglm").conversation_format("chatglm3")
    model = CallingModel(chat_format, {**CALL, "content": content})
    talk = conversations.with_question(conversations.new_conversation(), "How is the weather?")
    settings = Settings(tools=[{"name": "other"}], functions={"get_weather": get_weather})
    *_, talk = answer(model, None, talk, settings)  # type: ignore[arg-type]
    assert roles(talk) == "uaoa"
    assert result in talk["messages"][2]["content"]
    assert [item["name"] for item in model.histories[0][0]["tools"]] == ["get_weather", "other"]
    # One that is not a function of the page waits for its result.
    *_, waiting = answer(model, None, {**talk, "messages": talk["messages"][:1]}, Settings())  # type: ignore[arg-type]
    assert conversations.called_tool(waiting["messages"]) == "get_weather"
    model = CallingModel(chat_format, CALL, always=True)
    with pytest.raises(ValueError, match=f"called functions {MAX_CALLS} times"):
        list(answer(model, None, {**talk, "messages": talk["messages"][:1]}, settings))  # type: ignore[arg-type]
