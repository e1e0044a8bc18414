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
"""How conversations are written down and answers are read, without a tokenizer or a model."""

import ast
import copy
import json
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generations import CALLING_GENERATIONS, GENERATIONS


pytestmark = pytest.mark.floor

WEATHER = {"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}
OPENAI_WEATHER = {"type": "function", "function": WEATHER}
CALL = "```python\ntool_call(city='北京', days=3)\n```"


@pytest.fixture(scope="module")
def conversation(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("conversation_chatglm")


@pytest.fixture(scope="module")
def formats(conversation: ModuleType) -> dict[str, Any]:
    return conversation.CONVERSATION_FORMATS


@pytest.fixture
def written(conversation: ModuleType) -> Callable[..., str]:
    """The text of a conversation, with `{}` around what counts as answer."""

    def write(messages: list[Any], version: str = "chatglm3", add_generation_prompt: bool = True) -> str:
        chat_format = conversation.conversation_format(version)
        text = ""
        for segment in chat_format.segments(chat_format.normalize_messages(messages), add_generation_prompt):
            piece = segment.text
            for start, end in reversed(segment.answer_spans):
                piece = f"{piece[:start]}{{{piece[start:end]}}}{piece[end:]}"
            text += f"{{{piece}}}" if segment.is_answer else piece
        return text.replace("}{", "")

    return write


@pytest.mark.parametrize("name", ["conversation_chatglm", "conversation_calls", "conversation_templates"])
def test_it_imports_nothing_but_the_standard_library(source: Callable[[str], ModuleType], name: str) -> None:
    tree = ast.parse(Path(source(name).__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= set(sys.stdlib_module_names) | {"collections.abc"}


# Forms of a conversation


def test_pairs_and_dicts_are_the_same_conversation(formats: dict[str, Any]) -> None:
    dicts = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "metadata": "", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    for mixed in ([("q", "a"), dicts[2]], [["q", "a"], dicts[2]], dicts, tuple(dicts)):
        assert formats["chatglm3"].normalize_messages(mixed) == dicts
    assert formats["chatglm2"].normalize_messages(None) == []


def test_openai_messages_take_the_published_form(formats: dict[str, Any]) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "北京", "days": 3}'}
    messages = [
        {"role": "system", "content": "Help.", "tools": [OPENAI_WEATHER]},
        {"role": "user", "content": [{"type": "text", "text": "北"}, {"type": "text", "text": "京?"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "12"},
        {"role": "assistant", "content": "It is 12.", "tool_calls": None},
    ]
    assert formats["chatglm3"].normalize_messages(messages) == [
        {"role": "system", "content": "Help.", "tools": [WEATHER]},
        {"role": "user", "content": "北京?"},
        {"role": "assistant", "metadata": "get_weather", "content": CALL},
        {"role": "observation", "content": "12"},
        {"role": "assistant", "content": "It is 12."},
    ]


def test_text_beside_tool_calls_is_a_part_of_its_own(formats: dict[str, Any]) -> None:
    calls = [{"function": {"name": name, "arguments": {"n": None}}} for name in ("one", "two")]
    message = {"role": "assistant", "content": "Two calls.", "tool_calls": calls}
    normalized = formats["chatglm3"].normalize_messages([message])
    assert [part.get("metadata", "") for part in normalized] == ["", "one", "two"]
    assert normalized[2]["content"] == "```python\ntool_call(n=None)\n```"


def test_nothing_of_the_caller_is_changed_or_shared(formats: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "s", "tools": [copy.deepcopy(WEATHER)]},
        {"role": "user", "content": "q", "note": ["mine"]},
        ["q", "a"],
    ]
    before = copy.deepcopy(messages)
    normalized = formats["chatglm3"].normalize_messages(messages)
    formats["chatglm3"].segments(normalized)
    normalized[0]["tools"][0]["parameters"]["type"] = "changed"
    normalized[1]["note"].append("changed")
    formats["chatglm3"].add_tools(normalized[1:], [WEATHER])[0]["tools"][0]["parameters"]["type"] = "changed"
    formats["chatglm3"].native_history(normalized)[1]["note"].append("changed")
    assert messages == before
    assert normalized[1]["note"] == ["mine", "changed"]
    assert WEATHER["parameters"]["type"] == "object"


@pytest.mark.parametrize("version", GENERATIONS)
def test_normalizing_twice_changes_nothing(formats: dict[str, Any], version: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": [1, "'"]}}]}
    once = formats[version].normalize_messages([("q", "a"), *([call] if version in CALLING_GENERATIONS else [])])
    assert formats[version].normalize_messages(once) == once


@pytest.mark.parametrize(
    ("history", "error", "message"),
    [
        ("hi", TypeError, "must be a list of messages or of pairs, got 'hi'"),
        ({"role": "user", "content": "q"}, TypeError, "must be a list of messages"),
        (["hi"], TypeError, r"messages\[0\] must be a dict .* got 'hi'"),
        ([("q", None)], TypeError, r"messages\[0\].*\(question, answer\) pair of strings, got \('q', None\)"),
        ([("q", "a", "b")], TypeError, "pair"),
        ([("q", "a"), {"content": "q"}], ValueError, r"messages\[1\] has the role None"),
        ([{"role": "function", "content": "q"}], ValueError, "'function'; the roles are system, user, assistant, obs"),
        ([{"role": "user"}], ValueError, r"messages\[0\] has no `content`: {'role': 'user'}"),
        ([{"role": "user", "content": 3}], TypeError, r"content of messages\[0\] must be a string, got 3"),
        ([{"role": "observation", "content": {"t": 1}}], TypeError, "json.dumps"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, "image_url"),
        ([{"role": "assistant", "content": "a", "metadata": 1}], TypeError, "metadata"),
        (
            [{"role": "system", "content": "s", "tools": "weather"}],
            TypeError,
            r"`tools` of messages\[0\] must be a list",
        ),
        ([{"role": "system", "content": "s", "tools": ["weather"]}], TypeError, r"\['weather'\]"),
        ([{"role": "assistant", "tool_calls": "f"}], TypeError, "`tool_calls`"),
        ([{"role": "assistant", "tool_calls": ["f"]}], ValueError, "no function name: 'f'"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], ValueError, "'f' are not JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], ValueError, r"got \[1\]"),
    ],
)
def test_what_has_no_form_is_named(
    formats: dict[str, Any], history: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        formats["chatglm3"].normalize_messages(history)


def test_an_unknown_generation_is_named(conversation: ModuleType) -> None:
    with pytest.raises(ValueError, match="must be one of .*'glm4'.*, got 'chatglm9'"):
        conversation.conversation_format("chatglm9")


def test_tools_join_the_system_message(conversation: ModuleType, formats: dict[str, Any]) -> None:
    user = {"role": "user", "content": "q"}
    system = {"role": "system", "content": "s"}
    assert formats["chatglm3"].add_tools([user], None) == [user]
    assert formats["chatglm3"].add_tools([system, user], [OPENAI_WEATHER]) == [
        {**system, "tools": [WEATHER]},
        user,
    ]
    made = formats["chatglm3"].add_tools([user], [WEATHER])
    assert made == [{"role": "system", "content": conversation.TOOLS_PROMPT, "tools": [WEATHER]}, user]
    assert system == {"role": "system", "content": "s"}
    with pytest.raises(ValueError, match="given twice"):
        formats["chatglm3"].add_tools(made, [WEATHER])
    with pytest.raises(TypeError, match="must be a list"):
        formats["chatglm3"].add_tools([user], WEATHER)


# Writing a conversation down


def test_every_piece_of_chatglm3_is_a_segment(formats: dict[str, Any]) -> None:
    messages = [
        {"role": "system", "content": "s", "tools": [{"name": "查"}]},
        {"role": "user", "content": "<|user|>"},
    ]
    assert formats["chatglm3"].segments(messages) == [
        ("<|system|>", True, False, ()),
        ("\n", False, False, ()),
        ('s\n[\n    {\n        "name": "查"\n    }\n]', False, False, ()),
        ("<|user|>", True, False, ()),
        ("\n", False, False, ()),
        ("<|user|>", False, False, ()),
        ("<|assistant|>", True, False, ()),
    ]


def test_answers_of_chatglm3_include_what_closes_them(written: Callable[..., str]) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "metadata": "f", "content": "call"},
        {"role": "observation", "content": "o"},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "end"},
    ]
    head = "<|user|>\nq<|assistant|>{f\ncall<|observation|>}\no<|assistant|>{\none<|assistant|>\ntwo<|user|>}\nr"
    assert written(messages, add_generation_prompt=False) == head + "<|assistant|>{\nend</s>}"
    assert written(messages[:-1]) == head + "<|assistant|>"


def test_rounds_of_chatglm2(written: Callable[..., str]) -> None:
    history = [("q", "a"), ("", "")]
    query = {"role": "user", "content": "r"}
    rounds = "[Round 1]\n\n问：q\n\n答：{a}\n\n[Round 2]\n\n问：\n\n答：{}\n\n"
    assert written([*history, query], "chatglm2") == rounds + "[Round 3]\n\n问：r\n\n答："
    assert written([*history, query], "chatglm2", False) == rounds + "[Round 3]\n\n问：r\n\n"
    assert written(history[:1], "chatglm2", False) == "[Round 1]\n\n问：q\n\n答：{a</s>}"
    system = {"role": "system", "content": "s"}
    assert written([system, query], "chatglm2") == "s\n\n[Round 1]\n\n问：r\n\n答："


def test_the_last_answer_of_chatglm2_is_encoded_on_its_own(formats: dict[str, Any]) -> None:
    messages = formats["chatglm2"].normalize_messages([("q", "a"), ("r", "b")])
    prompt, answer, end = formats["chatglm2"].segments(messages, add_generation_prompt=False)
    assert prompt == formats["chatglm2"].segments(messages[:-1])[0]
    assert [prompt.text[start:end] for start, end in prompt.answer_spans] == ["a"]
    assert (answer, end) == (("b", False, True, ()), ("</s>", True, True, ()))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "observation", "content": "o"}], "knows no tools"),
        ([{"role": "system", "content": "s", "tools": [WEATHER]}, {"role": "user", "content": "q"}], "knows no tools"),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "metadata": "f", "content": "a"}], "knows no tools"),
        (
            [{"role": "user", "content": "q"}, {"role": "user", "content": "second"}],
            "'assistant' must come .*'second'",
        ),
        ([{"role": "assistant", "content": "a"}], "'user' must come"),
        ([("q", "a")], "nothing to answer"),
    ],
)
def test_what_rounds_cannot_hold_is_refused(formats: dict[str, Any], messages: list[Any], message: str) -> None:
    for version in ("chatglm", "chatglm2"):
        with pytest.raises(ValueError, match=message):
            formats[version].segments(formats[version].normalize_messages(messages))


def test_rounds_of_chatglm_6b(written: Callable[..., str]) -> None:
    history = [("q", "a"), ("", "")]
    query = {"role": "user", "content": "r"}
    rounds = "[Round 0]\n问：q\n答：a\n[Round 1]\n问：\n答：\n[Round 2]\n问：r\n"
    assert written([query], "chatglm") == "r[gMASK]<sop>"
    assert written([query], "chatglm", False) == "r"
    assert written([*history, query], "chatglm") == rounds + "答：[gMASK]<sop>"
    assert written([*history, query], "chatglm", False) == rounds
    # Only the last answer counts: the model sees the ones before it from both sides.
    assert written([*history, ("r", "b")], "chatglm", False) == rounds + "答：[gMASK]{<sop>b<eop>}"
    assert written(history[:1], "chatglm", False) == "q[gMASK]{<sop>a<eop>}"
    assert written([{"role": "system", "content": "s"}, query], "chatglm") == "s\nr[gMASK]<sop>"


def test_tools_of_glm4(conversation: ModuleType, formats: dict[str, Any], written: Callable[..., str]) -> None:
    user = {"role": "user", "content": "q"}
    system = {"role": "system", "content": "s", "tools": [OPENAI_WEATHER, {"name": "查"}]}
    note = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    sections = "".join(
        f"\n\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}{note}"
        for tool in (WEATHER, {"name": "查"})
    )
    assert written([system, user], "glm4") == f"<|system|>\ns{sections}<|user|>\nq<|assistant|>"
    offered = formats["glm4"].add_tools([{"role": "system", "content": "s"}, user], system["tools"])
    assert written(offered, "glm4") == f"<|system|>\ns\n\n# 可用工具{sections}<|user|>\nq<|assistant|>"
    (made, _) = formats["glm4"].add_tools([user], [WEATHER])
    assert made["content"] == conversation.GLM4_TOOLS_PROMPT + "\n\n# 可用工具"
    with pytest.raises(ValueError, match="writes the name of a tool above it.*'parameters'"):
        written(formats["glm4"].add_tools([user], [{"parameters": {}}]), "glm4")


@pytest.mark.parametrize("version", GENERATIONS)
def test_built_in_tools_are_those_of_glm4(conversation: ModuleType, written: Callable[..., str], version: str) -> None:
    user = {"role": "user", "content": "q"}
    for kind, text in conversation.GLM4_BUILTIN_TOOLS.items():
        messages = [{"role": "system", "content": "s", "tools": [{"type": kind}, OPENAI_WEATHER]}, user]
        if version == "glm4":
            assert written(messages, version).startswith(
                f"<|system|>\ns\n\n## {kind}\n\n{text}\n\n## get_weather\n\n{{"
            )
        else:
            with pytest.raises(ValueError, match=f"'{kind}'"):
                written(messages, version)
    with pytest.raises(ValueError, match="'retrieval'"):
        written([{"role": "system", "content": "s", "tools": [{"type": "retrieval"}]}, user], version)


@pytest.mark.parametrize("version", CALLING_GENERATIONS)
def test_tools_in_a_dict_by_name(formats: dict[str, Any], written: Callable[..., str], version: str) -> None:
    """As the official `get_tools` give them."""
    tools = {"get_weather": WEATHER, "查": {"name": "查", "params": []}}
    as_list = [{"role": "system", "content": "s", "tools": list(tools.values())}]
    as_dict = [{"role": "system", "content": "s", "tools": tools}]
    if version == "chatglm3":
        assert written(as_dict) == f"<|system|>\ns\n{json.dumps(tools, indent=4, ensure_ascii=False)}<|assistant|>"
    else:
        assert written(as_dict, version) == written(as_list, version)
    normalized = formats[version].normalize_messages(as_dict)
    assert normalized == as_dict and normalized[0]["tools"]["查"] is not tools["查"]
    assert formats[version].normalize_messages(normalized) == normalized
    [made] = formats[version].add_tools([], tools)
    assert made["tools"] == tools
    for wrong in ({"f": "x"}, {"f": {"function": 1}}, {"f": {"name": {1}}}):
        with pytest.raises(TypeError, match="`tools`"):
            formats[version].add_tools([], wrong)


@pytest.mark.parametrize(
    "content",
    ["print(1)\n\nprint('<|x|>')", "search('新闻', recency_days=10)", "A red panda.", "", "```python\n1+1\n```"],
)
def test_what_a_built_in_tool_is_called_with_is_text(formats: dict[str, Any], content: str) -> None:
    for kind in formats["glm4"].builtin_tools:
        for tools in ([{"type": kind}], [WEATHER, {"type": kind}]):
            messages = [{"role": "system", "content": "s", "tools": tools}]
            response, new = formats["glm4"].read_answer(f"\n我来。<|assistant|>{kind}\n{content}", messages)
            assert response == {"name": kind, "content": content}
            assert new[1] == {"role": "assistant", "metadata": kind, "content": content}
            call = {"type": "function", "function": {"name": kind, "arguments": content or None}}
            [again] = formats["glm4"].normalize_messages([{"role": "assistant", "tool_calls": [call]}])
            assert again == new[1] or not content
    # Other names take an object, and a function of the same name too.
    messages = [{"role": "system", "content": "s", "tools": [{"name": "python"}]}]
    assert formats["glm4"].read_answer(f"run\n{content}", messages)[0] == f"run\n{content}".strip()
    call = {"name": "python", "parameters": {"code": "1"}}
    assert formats["glm4"].read_answer('python\n{"code": "1"}', messages)[0] == call


def test_answers_of_glm4_include_what_closes_them(written: Callable[..., str]) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"城": "北京", "n": None}}}]},
        {"role": "tool", "content": "o"},
        {"role": "assistant", "content": "end"},
    ]
    call = 'f\n{"城": "北京", "n": null}'
    head = f"<|user|>\nq<|assistant|>{{{call}<|observation|>}}\no<|assistant|>{{\nend<|user|>}}"
    assert written(messages, "glm4", False) == head


@pytest.mark.parametrize("version", GENERATIONS)
def test_only_what_answers_something_is_closed_and_once(written: Callable[..., str], version: str) -> None:
    closing = {"chatglm": "<eop>", "chatglm2": "</s>", "chatglm3": "</s>", "glm4": "<|user|>"}[version]
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "last"}
    for before in ([question], [("a", "b"), question], [{"role": "system", "content": "s"}, question]):
        text = written([*before, answer], version, add_generation_prompt=False)
        assert text.endswith(f"last{closing}}}")
        # A role token of the next message belongs to the answer before it, and is no second end.
        assert text.count(closing) == (1 if version != "glm4" else written(before, version, False).count(closing) + 1)
        assert written(before, version, False) + "" in text
    assert not written([question], version, add_generation_prompt=False).endswith(closing)
    if version in CALLING_GENERATIONS:
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
        for alone in ([answer], [answer, answer], [{**call, "content": "I look."}]):
            assert closing not in written(alone, version, add_generation_prompt=False)
        observed = [{"role": "observation", "content": "o"}, answer]
        assert written(observed, version, add_generation_prompt=False).endswith(f"last{closing}}}")


# Reading an answer


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm2-32k", "chatglm3", "chatglm3-32k", "glm4"])
def test_recorded_prompts_and_histories(formats: dict[str, Any], case: Callable[[str], Any], name: str) -> None:
    version = "chatglm" if name == "chatglm1" else name.split("-")[0]
    turns = [turn for section in case(name).expected["chat"].values() for turn in section]
    assert len(turns) >= 4
    for turn in turns:
        history = formats[version].normalize_messages(turn["history"])
        native = formats[version].native_history(history)
        assert [list(item) if isinstance(item, tuple) else item for item in native] == turn["history"]
        if prompt := turn.get("prompt"):
            segment, *control = formats[version].segments(history[:-1])
            assert segment.text == prompt
            assert [token.text for token in control] == (["[gMASK]", "<sop>"] if version == "chatglm" else [])


def test_an_answer_of_chatglm2_is_text(formats: dict[str, Any]) -> None:
    text = " get_weather\n训练于[[训练时间]]。\n"
    answer = "get_weather\n训练于2023年。"
    messages = [{"role": "user", "content": "q"}]
    response, new = formats["chatglm2"].read_answer(text, messages)
    assert (response, new) == (answer, [{"role": "assistant", "content": answer}])
    assert formats["chatglm2"].native_history(messages + new) == [("q", answer)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 训练于[[训练时间]]。\n", "训练于2023年。"),
        ("你好,世界!好:是;吗?", "你好，世界！好：是；吗？"),
        ("a,b c:d 1,2", "a,b c:d 1,2"),
        ("a,中 中,a (中)? 中.", "a，中 中，a (中)? 中."),
        ("中,,文 ?!中", "中，，文 ?！中"),
        ("中，!，文 ー! 한,", "中，!，文 ー! 한,"),
    ],
)
def test_answers_of_chatglm_6b(formats: dict[str, Any], text: str, answer: str) -> None:
    response, new = formats["chatglm"].read_answer(text, [{"role": "user", "content": "q"}])
    assert (response, new) == (answer, [{"role": "assistant", "content": answer}])
    assert formats["chatglm"].native_history([{"role": "user", "content": "q"}, *new]) == [("q", answer)]


def test_calls_of_glm4_are_json(formats: dict[str, Any]) -> None:
    offered = [{"role": "system", "content": "s", "tools": [WEATHER]}, {"role": "user", "content": "q"}]
    text = '\n我查。<|assistant|>get_weather\n{"city": "北京", "deep": {"a": [1, null]}}'
    call = {"city": "北京", "deep": {"a": [1, None]}}
    response, new = formats["glm4"].read_answer(text, offered)
    assert response == {"name": "get_weather", "parameters": call}
    assert [message["metadata"] for message in new] == ["", "get_weather"]
    assert formats["glm4"].native_history(new) == new
    assert formats["glm4"].read_answer("f\n{'a': 1}", offered)[0] == "f\n{'a': 1}"
    assert formats["glm4"].read_answer("python\n1+1", [])[0] == {
        "name": "python",
        "content": "1+1",
    }


def test_pairs_that_would_lose_a_message_stay_dicts(formats: dict[str, Any]) -> None:
    messages = formats["chatglm2"].normalize_messages([{"role": "system", "content": "s"}, ("q", "a")])
    assert formats["chatglm2"].native_history(messages) == messages


@pytest.mark.parametrize(
    ("text", "response", "message"),
    [
        ("\n 你好 ", "你好", {"metadata": "", "content": "你好"}),
        ("你好", "你好", {"metadata": "", "content": "你好"}),
        ("", "", {"metadata": "", "content": ""}),
        ("\n", "", {"metadata": "", "content": ""}),
        (" \n[[训练时间]]", "2023年", {"metadata": " ", "content": "[[训练时间]]"}),
        (
            "interpreter\n```python\n1+1\n```",
            {"name": "interpreter", "content": "```python\n1+1\n```"},
            {"metadata": "interpreter", "content": "```python\n1+1\n```"},
        ),
    ],
)
def test_answers_of_chatglm3(formats: dict[str, Any], text: str, response: Any, message: dict[str, str]) -> None:
    read = formats["chatglm3"].read_answer(text, [{"role": "user", "content": "q"}])
    assert read == (response, [{"role": "assistant", **message}])


def test_a_call_of_an_offered_tool(formats: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "s", "tools": [WEATHER]}, {"role": "user", "content": "q"}]
    text = f"\n 我来查。<|assistant|> get_weather\n{CALL}"
    response, new = formats["chatglm3"].read_answer(text, messages)
    assert response == {"name": "get_weather", "parameters": {"city": "北京", "days": 3}}
    assert new == [
        {"role": "assistant", "metadata": "", "content": "我来查。"},
        {"role": "assistant", "metadata": " get_weather", "content": CALL},
    ]


def test_an_unreadable_call_is_text(formats: dict[str, Any]) -> None:
    messages = [{"role": "system", "content": "s", "tools": [WEATHER]}]
    text = "get_weather\n```python\ntool_call(city=__import__('os').getcwd())\n```"
    response, new = formats["chatglm3"].read_answer(text, messages)
    assert response == text
    assert new[0]["metadata"] == "get_weather"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (CALL, {"city": "北京", "days": 3}),
        ("```python\ntool_call(city='北京', days=3)", {"city": "北京", "days": 3}),
        ("tool_call()", {}),
        ("tool_call(a=-1, b=1.5e3, c=True, d=None, e=[1, {'k': (2,)}],)", None),
        ("tool_call(\n    a='x',  # note\n    b=\"it's\"\n)", {"a": "x", "b": "it's"}),
        ("tool_call(from='a, to=1', to='b=2', class='c')", {"from": "a, to=1", "to": "b=2", "class": "c"}),
        ("tool_call(城市='a' 'b', code='''x\ny''')", {"城市": "ab", "code": "x\ny"}),
        ("tool_call(p=r'C:\\d', q='```')", {"p": "C:\\d", "q": "```"}),
        ('```json\n{"city": "北京"}\n```', {"city": "北京"}),
        ('{"a": [1, null]}', {"a": [1, None]}),
    ],
)
def test_calls_that_are_read(conversation: ModuleType, text: str, arguments: dict[str, Any] | None) -> None:
    if arguments is None:
        arguments = {"a": -1, "b": 1500.0, "c": True, "d": None, "e": [1, {"k": [2]}]}
    assert conversation.parse_tool_call(text) == arguments


HOSTILE = [
    "",
    "```",
    "hello",
    "tool_call",
    "tool_call(",
    "tool_call)",
    "tool_call('x')",
    "tool_call(1, 2)",
    "tool_call(1: 2)",
    "tool_call('a' = 1)",
    "tool_call(= 1)",
    "tool_call(a=)",
    "tool_call(a=1, **{'b': 2})",
    "tool_call(*[1])",
    "tool_call(a=b)",
    "tool_call(a=b.c)",
    "tool_call(a=print('x'))",
    "tool_call(a=__import__('os').system('true'))",
    "tool_call(a=[x for x in ()])",
    "tool_call(a=lambda: 1)",
    "tool_call(a=f'{1}')",
    "tool_call(a=f'" + "{" * 500 + "')",
    "tool_call(a=b'x')",
    "tool_call(a=1+1)",
    "tool_call(a=2**99999999)",
    "tool_call(a=1); import os",
    "tool_call(a=1) + tool_call(b=2)",
    "tool_call(a=(1)) or (2)",
    "other(a=1)",
    "x = tool_call(a=1)",
    "tool_call(a={[]: 1})",
    "tool_call(a='" + "x" * 200_000 + "')",
    "tool_call(a=" + "9" * 5000 + ")",
    "tool_call(a=" + "[" * 50_000 + ")",
    "tool_call(a=" + "[" * 40 + "]" * 40 + ")",
    "tool_call(a=" + "-" * 50_000 + "1)",
    "tool_call(a=" + "not " * 20_000 + "1)",
    "tool_call(a=1" + "-1" * 20_000 + ")",
    "tool_call(a=" + "(" * 30_000,
    "tool_call(a='\x00')\x00",
    "tool_call(a=\\\n1",
    "    tool_call(a=1)\n  x",
    "[" * 90_000,
    '{"a":' * 15_000,
    "[1, 2]",
    "1" * 90_000,
    "\ufeff\u2028\udc80",
]


def test_anything_else_is_not_a_call(conversation: ModuleType) -> None:
    """In a thread, whose stack is smaller than the main one: exhausting it would end the interpreter."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(conversation.parse_tool_call(text) for text in HOSTILE))
    thread.start()
    thread.join()
    assert results == [None] * len(HOSTILE)


def test_calls_are_written_as_they_are_read(conversation: ModuleType, formats: dict[str, Any]) -> None:
    generator = random.Random(0)

    def value(depth: int) -> Any:
        kind = generator.randrange(8 if depth < 4 else 6)
        if kind == 6:
            return [value(depth + 1) for _ in range(generator.randrange(3))]
        if kind == 7:
            return {f"{'键'}{index}": value(depth + 1) for index in range(generator.randrange(3))}
        text = "".join(generator.choices("a'\"\\\n\t ,)(=:北😀`{}", k=5))
        return (text, generator.randint(-99, 99), generator.uniform(-9, 9), True, None, "")[kind]

    for _ in range(500):
        arguments = {name: value(0) for name in generator.sample(["city", "from", "城市", "_x"], k=2)}
        for given in (arguments, json.dumps(arguments)):
            for version in ("chatglm3", "glm4"):
                message = formats[version].write_tool_call("f", given)
                assert message["metadata"] == "f"
                assert conversation.parse_tool_call(message["content"]) == arguments


@pytest.mark.parametrize("version", GENERATIONS)
def test_no_answer_raises(formats: dict[str, Any], version: str) -> None:
    generator = random.Random(1)
    parts = ["\n", "<|assistant|>", "tool_call(", ")", "a=", "'", "```python\n", "```", "北京", " ", "{", '"', "f"]
    plain = [{"role": "user", "content": "q"}]
    offered = [{"role": "system", "content": "s", "tools": []}]
    for text in [*HOSTILE, *("".join(generator.choices(parts, k=generator.randrange(9))) for _ in range(2000))]:
        for messages in (plain, offered, []):
            response, new = formats[version].read_answer(text, messages)
            assert isinstance(response, (str, dict))
            assert [message["role"] for message in new] == ["assistant"] * len(new)
            assert new


@pytest.mark.parametrize("version", GENERATIONS)
def test_a_call_of_the_interpreter_goes_back_as_it_came(formats: dict[str, Any], version: str) -> None:
    code = "```python\nprint({'a': 1})\n```"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "interpreter", "arguments": code}}]}
    question = {"role": "user", "content": "1"}
    if version != "chatglm3":
        with pytest.raises(ValueError):
            chat_format = formats[version]
            chat_format.segments(chat_format.normalize_messages([question, call]))
        return
    chat_format = formats[version]
    messages = chat_format.normalize_messages([question, call])
    assert messages[1] == {"role": "assistant", "metadata": "interpreter", "content": code}
    assert chat_format.read_answer(f"interpreter\n{code}", messages[:1])[0] == {"name": "interpreter", "content": code}
    # A function of that name is called like any other.
    function = chat_format.write_tool_call("interpreter", '{"code": "1"}')
    assert function["content"] == "```python\ntool_call(code='1')\n```"
