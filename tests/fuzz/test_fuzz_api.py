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
"""Whatever a client sends and whatever the model writes: every door of the server answers in its form, and goes on."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from generations import GENERATION_CASES
from hostile import answers, json_values, whole_texts
from hypothesis import given
from hypothesis import strategies as st


pytest.importorskip("fastapi", reason="needs requirements/serving.txt: make test-programs")
# Finds the package `serving` for the imports below.
serving_help = pytest.importorskip("serving_help")

from serving.app import build_app  # noqa: E402
from serving.guard import Limits  # noqa: E402
from serving.metrics import Metrics  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402


pytestmark = pytest.mark.programs

DOORS = ("/v1/chat/completions", "/v1/completions", "/", "/stream")
Door = tuple[TestClient, Any, Any]


@pytest.fixture(scope="module")
def door(case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]) -> Iterator[Callable[[str], Door]]:
    """The server of a generation in this process; what its model writes is told to the engine."""
    opened: dict[str, Door] = {}
    with ExitStack() as stack:

        def of(name: str) -> Door:
            if name not in opened:
                metrics = Metrics()
                models, engine = serving_help.scripted(case_model(name), case_tokenizer(name), metrics)
                app = build_app(models, metrics, Limits(), ())
                client = stack.enter_context(TestClient(app, raise_server_exceptions=False))
                opened[name] = (client, engine, case_tokenizer(name))
            return opened[name]

        yield of


def bodies() -> st.SearchStrategy[dict[str, Any]]:
    """Requests of every door, well-formed or not."""
    any_value = json_values()
    message = st.fixed_dictionaries(
        {"role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool", "developer"]), any_value)},
        optional={"content": st.one_of(whole_texts(), any_value), "tool_calls": any_value, "name": any_value},
    )
    plain = st.fixed_dictionaries({"role": st.just("user"), "content": whole_texts()})
    tool = st.fixed_dictionaries(
        {"type": st.just("function")},
        optional={
            "function": st.fixed_dictionaries(
                {"name": st.one_of(whole_texts(2), any_value)}, optional={"parameters": any_value}
            )
        },
    )
    fields = ("model", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "logprobs", "response_format")
    more = ("tool_choice", "stream_options", "user", "max_length", "history", "max_completion_tokens", "logit_bias")
    return st.fixed_dictionaries(
        {},
        optional={
            "messages": st.one_of(st.lists(plain, min_size=1, max_size=2), st.lists(message, max_size=3), any_value),
            "prompt": st.one_of(whole_texts(), any_value),
            "stream": st.one_of(st.booleans(), any_value),
            "tools": st.one_of(st.lists(tool, max_size=2), any_value),
            **dict.fromkeys((*fields, *more), any_value),
        },
    )


def check(path: str, status: int, text: str) -> None:
    """An answer or a refusal, in the form of the door, and no failure of the server."""
    assert status < 500, text
    if path.startswith("/v1") and status >= 400:
        assert json.loads(text)["error"]["message"]


def is_alive(client: TestClient, engine: Any) -> bool:
    engine.ids = []
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    return client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(path=st.sampled_from(DOORS), body=bodies(), written=st.lists(st.integers(0, 400), max_size=12))
def test_any_request_is_answered_or_refused(
    door: Callable[[str], Door], name: str, path: str, body: dict[str, Any], written: list[int]
) -> None:
    client, engine, _ = door(name)
    engine.ids = written
    answer = client.post(path, content=json.dumps(body))
    check(path, answer.status_code, answer.text)
    assert is_alive(client, engine)


@given(path=st.sampled_from(DOORS), content=st.one_of(st.binary(max_size=40), json_values().map(json.dumps)))
def test_any_bytes_are_answered_or_refused(door: Callable[[str], Door], path: str, content: bytes | str) -> None:
    client, engine, _ = door("chatglm3")
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    check(path, answer.status_code, answer.text)
    assert is_alive(client, engine)


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(text=answers(), streams=st.booleans(), offers=st.booleans())
def test_any_answer_of_the_model_is_passed_on(
    door: Callable[[str], Door], name: str, text: str, streams: bool, offers: bool
) -> None:
    client, engine, tokenizer = door(name)
    text = text[:1000].encode(errors="replace").decode()
    engine.ids = tokenizer._message_encoding(text)[0]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "stream": streams}
    if offers and not tokenizer.chat_format.uses_pairs:
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert '"error"' not in answer.text or '"error"' in text
    for path in ("/", "/stream"):
        engine.ids = tokenizer._message_encoding(text)[0]
        assert client.post(path, json={"prompt": "x"}).status_code == 200
