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
"""Does `examples/serve.py` answer as its page says, whatever comes in?

One real process serves the bundled model; the clients are the `openai` package and plain HTTP.
"""

import concurrent.futures
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from serving_help import BUNDLED, WEATHER
from waiting import free_port, wait_until


sys.path.insert(0, str(REPOSITORY / "scripts"))

import docs_check  # noqa: E402


httpx = pytest.importorskip("httpx", reason="needs requirements/serving.txt: make test-programs")
openai = pytest.importorskip("openai", reason="needs requirements/serving.txt: make test-programs")

pytestmark = pytest.mark.programs

NAME = BUNDLED.name
HELLO = "你好！我是一个很小的演示模型，很高兴见到你。有什么可以帮你的吗？"
QUESTIONS = (
    "你好",
    "法国的首都是哪里？",
    "What is the capital of Italy?",
    "What can you do?",
    "1加1等于几？",
    "What is the weather like in Paris?",
    "谢谢",
    "Who are you?",
)
Ask = Callable[..., Any]
# One client for everything: each new one reads all certificates of the system.
HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=None))


class Server:
    """A process of `serve.py`."""

    def __init__(self, *words: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(REPOSITORY / "examples" / "serve.py"), str(BUNDLED), "--port", str(self.port)]
        self.process = subprocess.Popen([*command, *words], env=environment, stderr=subprocess.PIPE, text=True)
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
        try:
            return bool(HTTP.get(f"{self.url}/health").status_code == 200)
        except httpx.TransportError:
            return False

    def metric(self, line: str) -> float:
        """A number of `/metrics`, 0 if it is not there yet."""
        text = HTTP.get(f"{self.url}/metrics").text
        return float(next((row.split()[-1] for row in text.splitlines() if row.startswith(line)), 0))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def ask(client: Any) -> Ask:
    """Sends one question; gives the choice, or the chunks of a stream."""

    def ask(question: str, **settings: Any) -> Any:
        messages = [{"role": "user", "content": question}]
        answer = client.chat.completions.create(**{"model": NAME, "messages": messages, **settings})
        return list(answer) if settings.get("stream") else answer.choices[0]

    return ask


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def post(server: Server, path: str, body: Any, **options: Any) -> Any:
    return HTTP.post(server.url + path, json=body, **options)


def test_an_answer_in_openai_form(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    answer = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "你好"}])
    assert (answer.object, answer.model) == ("chat.completion", NAME) and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.content == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    messages = [{"role": "developer", "content": ""}, {"role": "user", "content": parts}]
    assert client.chat.completions.create(model=NAME, messages=messages).choices[0].message.role == "assistant"


def test_a_stream_gives_the_same_text(ask: Ask) -> None:
    chunks = ask("你好", stream=True)
    assert text_of(chunks) == HELLO and len(chunks) > 5
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage is None
    counted = ask("你好", stream=True, stream_options={"include_usage": True})
    assert counted[-1].choices == [] and counted[-1].usage.completion_tokens == 11


def test_stream_events_are_as_clients_expect(server: Server) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "你好"}], "stream": True}
    answer = post(server, "/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and all(event.startswith("data: {") for event in events[:-1])


def test_stops(ask: Ask) -> None:
    for stop, expected in (
        ("演示", HELLO[: HELLO.index("演示")]),
        (["不存在", "高兴见"], HELLO[: HELLO.index("高兴见")]),
        ("\n", HELLO),
        ("有什么可以帮你的吗？？", HELLO),
    ):
        choice = ask("你好", stop=stop)
        assert (choice.message.content, choice.finish_reason) == (expected, "stop")
        assert text_of(ask("你好", stop=stop, stream=True)) == expected


def test_lengths(ask: Ask, client: Any) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = ask("你好", **{name: 4})
        assert choice.finish_reason == "length" and HELLO.startswith(choice.message.content)
    assert ask("你好", max_tokens=10**6).message.content == HELLO
    assert ask("你好", max_tokens=4, stream=True)[-1].choices[0].finish_reason == "length"
    text = client.completions.create(model=NAME, prompt="你好")
    assert text.usage.completion_tokens <= 16


def test_everybody_has_sampling_settings_of_their_own(ask: Ask) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        wild = [pool.submit(ask, "你好", temperature=50, max_tokens=30) for _ in range(4)]
        sure = [pool.submit(ask, "你好", temperature=0) for _ in range(2)]
        nucleus = [pool.submit(ask, "你好", temperature=1.0, top_p=1e-6) for _ in range(2)]
        assert len({future.result().message.content for future in wild}) > 1
        assert {future.result().message.content for future in [*sure, *nucleus]} == {HELLO}
    assert ask("你好", temperature=0, seed=7).message.content == HELLO


def test_text_completions(client: Any) -> None:
    whole = client.completions.create(model=NAME, prompt="你好", max_tokens=8, temperature=0)
    assert whole.object == "text_completion" and whole.choices[0].text
    pieces = client.completions.create(model=NAME, prompt=["你好"], max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    ids = client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=3)
    assert ids.usage.prompt_tokens == 3


def test_a_tool_from_call_to_answer(ask: Ask, client: Any) -> None:
    question = "What is the weather like in Paris?"
    choice = ask(question, tools=[WEATHER])
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    chunks = ask(question, tools=[WEATHER], stream=True)
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert [(delta.index, delta.function.name) for delta in deltas] == [(0, "get_weather")]
    assert deltas[0].id != call.id and chunks[-1].choices[0].finish_reason == "tool_calls"
    messages = [
        {"role": "user", "content": question},
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 18, "condition": "cloudy"}'},
    ]
    answer = client.chat.completions.create(model=NAME, messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "It is cloudy in Paris, and the temperature is 18 degrees."
    assert ask(question, tools=[WEATHER], tool_choice="none").message.tool_calls is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"5": 1}),
        ("parallel_tool_calls", False),
        ("functions", []),
        ("generation_config", "{}"),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("min_p", 0.1),
        ("seed", 1),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 2),
        ("stop", [""]),
        ("stop", 5),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", ["x"]),
        ("tools", [{"type": "function", "function": 3}]),
        ("tools", [{"type": "python"}]),
        ("model", "gpt-4"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(server: Server, field: str, value: Any) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "你好"}], "temperature": 1.0, field: value}
    answer = post(server, "/v1/chat/completions", body)
    error = answer.json()["error"]
    assert answer.status_code == (404 if field == "model" else 400)
    assert error["param"] == field and error["type"] == "invalid_request_error"
    assert error["code"] == ("model_not_found" if field == "model" else None)


def test_defaults_said_aloud_are_no_reason_to_refuse(ask: Ask) -> None:
    settings = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0,
        "response_format": {"type": "text"},
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "user": "somebody",
    }
    assert ask("你好", **settings).message.content == HELLO


def test_a_prompt_that_is_too_long(server: Server, client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "你好" * 3000}])
    assert caught.value.code == "context_length_exceeded" and "1023" in str(caught.value)
    answer = post(server, "/", {"prompt": "你好" * 3000})
    assert answer.status_code == 400 and "tokens" in answer.json()["error"]


BAD_BODIES = (
    b'{"prompt": ',
    b'{"prompt": "\xff\xfe"}',
    b"[]",
    b"null",
    b"",
    b"[" * 100_000,
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "x", "max_length": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x" "y"}',
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/", "/stream"])
def test_bad_bodies_get_an_error_in_the_form_of_the_door(server: Server, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    for body in BAD_BODIES:
        answer = HTTP.post(server.url + path, content=body, headers=headers)
        assert answer.status_code == 400, body[:80]
        if path.startswith("/v1"):
            assert answer.json()["error"]["message"]
        else:
            assert answer.json()["status"] == 400 and answer.json()["error"]
    large = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    assert HTTP.post(server.url + path, content=large, headers=headers).status_code == 413
    # Without a declared length, as somebody would send it who wants to get past the limit.
    pieces = (large[start : start + 65536] for start in range(0, len(large), 65536))
    try:
        assert HTTP.post(server.url + path, content=pieces, headers=headers).status_code == 413
    except httpx.TransportError:
        pass  # The server has answered and closed before all was sent.
    assert post(server, path, "text").status_code == 400
    # Any web page may have a browser send this without asking.
    assert (
        HTTP.post(server.url + path, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}).status_code
        == 400
    )
    assert post(server, "/", {"prompt": "你好"}).json()["response"] == HELLO


def test_a_schema_that_leads_to_itself_is_text(ask: Ask) -> None:
    cyclic = json.loads(json.dumps(WEATHER))
    cyclic["function"]["parameters"] = {"$ref": "#/definitions/a", "definitions": {"a": {"$ref": "#/definitions/a"}}}
    assert ask("你好", tools=[cyclic], max_tokens=4).message is not None


def test_unknown_paths(server: Server) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("POST", "/reset", 404),
        ("POST", "/load_model", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/chat/completions", 405),
    ):
        answer = HTTP.request(method, server.url + path, json={})
        assert answer.status_code == status
        assert ("error" in answer.json()) and isinstance(answer.json()["error"], dict) == path.startswith("/v1")


def test_eight_streams_at_once_are_as_each_alone(ask: Ask) -> None:
    alone = [text_of(ask(question, stream=True)) for question in QUESTIONS]
    assert len(set(alone)) == len(QUESTIONS)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: text_of(ask(question, stream=True)), QUESTIONS))
    assert together == alone


def test_a_hundred_connections_at_once(server: Server, ask: Ask) -> None:
    expected = {question: ask(question).message.content for question in QUESTIONS}
    questions = [QUESTIONS[index % len(QUESTIONS)] for index in range(100)]
    barrier = threading.Barrier(100)

    def send(question: str) -> tuple[str, Any]:
        barrier.wait()
        body = {"model": NAME, "messages": [{"role": "user", "content": question}]}
        return question, post(server, "/v1/chat/completions", body, headers={"x-request-id": "the same for all"})

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(send, questions))
    assert {answer.status_code for _, answer in answers} <= {200, 429}
    answered = [(question, answer.json()) for question, answer in answers if answer.status_code == 200]
    assert len(answered) >= 64
    for question, answer in answered:
        assert answer["choices"][0]["message"]["content"] == expected[question]
    for _, answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["type"] == "rate_limit_error" and answer.headers["retry-after"]


def test_the_tutorials_api(server: Server) -> None:
    first = post(server, "/", {"prompt": "我叫小明。", "history": []}).json()
    assert first["status"] == 200 and re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", first["time"])
    assert [message["role"] for message in first["history"]] == ["user", "assistant"]
    body = {"prompt": "你好", "history": first["history"], "max_length": 2048, "top_p": 0.7, "temperature": 0.01}
    second = post(server, "/", body).json()
    assert second["history"][:2] == first["history"] and second["history"][-1]["content"] == second["response"]
    pairs = post(server, "/", {"prompt": "你好", "history": [["1加1等于几？", "1加1等于2。"]]}).json()
    assert pairs["response"] == HELLO and len(pairs["history"]) == 4


def test_the_tutorials_stream(server: Server) -> None:
    answer = post(server, "/stream", {"prompt": "你好"})
    events = [json.loads(event.removeprefix("data: ")) for event in answer.text.strip().split("\n\n")]
    assert "".join(event["delta"] for event in events) == HELLO
    assert [event["finished"] for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1] == post(server, "/", {"prompt": "你好"}).json() | {
        "delta": events[-1]["delta"],
        "finished": True,
        "time": events[-1]["time"],
    }


def test_the_tutorials_errors(server: Server) -> None:
    for body, word in (
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "history": "y"}, "history"),
        ({"prompt": "x", "max_length": 3}, "max_length"),
        ({"prompt": "x", "max_tokens": 3}, "max_tokens"),
    ):
        answer = post(server, "/", body)
        content = answer.json()
        assert answer.status_code == content["status"] == 400 and word in content["error"]
        assert set(content) == {"response", "history", "status", "time", "error"}


def test_a_tool_call_of_the_tutorials_is_an_object(server: Server) -> None:
    system = {
        "role": "system",
        "content": "Answer the following questions as best as you can. You have access to the ",
    }
    system["content"] += "following tools:"
    history = [system | {"tools": [WEATHER["function"]]}]
    content = post(server, "/", {"prompt": "What is the weather like in Paris?", "history": history}).json()
    assert content["response"] == {"name": "get_weather", "parameters": {"city": "Paris"}}


def page_blocks(needs: str) -> list[docs_check.Block]:
    page = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    return [block for block in docs_check.read_blocks(page) if needs in (block.needs or "")]


def test_the_commands_of_the_page_for_a_running_server(server: Server, tmp_path: Path) -> None:
    def here(code: str) -> str:
        return code.replace("http://127.0.0.1:8000", server.url).replace("chatglm3-6b", NAME)

    blocks = page_blocks("the server above")
    shell = "\n".join(here(block.code) for block in blocks if block.language == "bash")
    # `python` is the one that runs the tests.
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    run = {"capture_output": True, "text": True, "check": True, "cwd": REPOSITORY}
    done = subprocess.run(["bash", "-ec", shell], **run, env={**os.environ, "PATH": paths})
    assert done.stdout.count(HELLO) >= 4 and "error" not in done.stdout
    program = "\n".join(here(block.code) for block in blocks if block.language == "python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "It is cloudy in Paris" in done.stdout and "get_weather" in done.stdout


def test_the_commands_of_the_page_that_start_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import serve

    blocks = page_blocks("a terminal of its own")
    assert len(blocks) >= 5
    for block in blocks:
        words = shlex.split(block.code)
        words = words[words.index("examples/serve.py") :]
        monkeypatch.setattr(sys, "argv", words)
        arguments = serve.read_arguments()
        serve.check_limits(arguments)
        assert serve.read_adapters(arguments.adapter).keys() == ({"polite", "law"} if "--adapter" in words else set())


@pytest.mark.parametrize(
    ("words", "variable", "keys"),
    [([], "", ()), (["one"], "", ("one",)), (["one"], "two, three ", ("one", "two", "three"))],
)
def test_keys_of_the_command_line_and_the_environment(words: list[str], variable: str, keys: tuple[str, ...]) -> None:
    import serve

    assert serve.read_keys(words, variable) == keys
    # Such as "$KEY" that is not set: a server that everybody may use is not what was asked for.
    with pytest.raises(ValueError, match="empty"):
        serve.read_keys([*words, ""], variable)
    with pytest.raises(ValueError, match="empty"):
        serve.read_keys(words, f"{variable},")


def test_metrics(server: Server, ask: Ask) -> None:
    names = ('chatglm_requests_total{path="/v1/chat/completions",status="200"}', "chatglm_generated_tokens_total")
    before = [server.metric(name) for name in names]
    ask("你好")
    assert [server.metric(name) for name in names] == [before[0] + 1, before[1] + 11]
    assert server.metric("chatglm_prompt_tokens_total") > 0
    assert server.metric("chatglm_first_token_seconds_count") > 0
    wait_until(lambda: server.metric("chatglm_answers_running") == 0)
    assert server.metric("chatglm_answers_waiting") == 0


def test_sigterm_finishes_what_runs(server: Server) -> None:
    # The last test of this file: it ends the server.
    body = {"model": NAME, "messages": [{"role": "user", "content": QUESTIONS[3]}], "stream": True}
    begun = server.metric("chatglm_prompt_tokens_total")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        pending = [pool.submit(post, server, "/v1/chat/completions", body) for _ in range(16)]
        # All have been read; a few have been answered already.
        num_tokens = 16 * 9
        wait_until(lambda: server.metric("chatglm_prompt_tokens_total") >= begun + num_tokens)
        server.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in pending]
    assert {answer.status_code for answer in answers} == {200}
    assert len({re.sub(r'"(id|created)":[^,]*,', "", answer.text) for answer in answers}) == 1
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    # uvicorn ends by the signal it was sent, once everything has stopped.
    assert server.process.wait(60) == -signal.SIGTERM
