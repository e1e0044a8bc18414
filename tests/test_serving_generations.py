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
"""Do the doors of `examples/serve.py` give what `chat` gives, for every generation, adapter, prefix and bit width?

Servers run in threads of this process, on the small recorded checkpoints. Their weights are random, so a scripted engine
writes the answers with tool calls.
"""

import asyncio
import concurrent.futures
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REFERENCE, auto_classes_left_alone
from generations import GENERATION_CASES, GENERATIONS, RECORDED, ROLE_CASES, every_generation_case
from serving_help import (
    WEATHER,
    Limits,
    Metrics,
    ScriptedEngine,
    scripted,
    serving,
    serving_folder,
    wait_until,
)


httpx = pytest.importorskip("httpx", reason="needs requirements/serving.txt: make test-programs")
openai = pytest.importorskip("openai", reason="needs requirements/serving.txt: make test-programs")

from local_code import load_module  # noqa: E402
from serving import guard  # noqa: E402
from serving.app import build_app  # noqa: E402
from serving.engines import BatchingEngine, QueueEngine  # noqa: E402
from serving.reading import Call, reader_for  # noqa: E402
from serving.sampling import request_processors  # noqa: E402


pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("leave_the_auto_classes_alone")]

HTTP = httpx.Client(timeout=120)
QUESTIONS = ("你好", "法国的首都是哪里？", "What is 2 + 3?", "a")
NEW_TOKENS = 12
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS}


@pytest.fixture(scope="module")
def served(leave_the_auto_classes_alone: None) -> Iterator[Callable[[str], tuple[str, Any]]]:
    """The URL and the models of a running server for a recorded checkpoint; one for all tests."""
    running: dict[str, tuple[Any, str, Any]] = {}

    def start(name: str) -> tuple[str, Any]:
        if name not in running:
            context = serving_folder(REFERENCE / name)
            running[name] = (context, *context.__enter__())
        return running[name][1:]

    yield start
    for context, *_ in running.values():
        context.__exit__(None, None, None)


def client_of(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url: str, question: str, **settings: Any) -> str:
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, **GREEDY, **settings}
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"].get("content") or "")


def stream(url: str, question: str, **settings: Any) -> str:
    messages = [{"role": "user", "content": question}]
    chunks = client_of(url).chat.completions.create(
        model=settings.pop("model", None), messages=messages, stream=True, **GREEDY, **settings
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def chat(model: Any, tokenizer: Any, question: str) -> Any:
    with torch.no_grad():
        return model.chat(tokenizer, question, do_sample=False, max_new_tokens=NEW_TOKENS)


@every_generation_case
def test_every_door_answers_as_chat_does(served: Callable[[str], tuple[str, Any]], name: str) -> None:
    url, models = served(name)
    default = models.default
    assert isinstance(default.engine, BatchingEngine if RECORDED[name].is_causal else QueueEngine)
    for question in QUESTIONS[:2]:
        response, history = chat(default.model, default.tokenizer, question)
        text = response if isinstance(response, str) else ""
        assert not text or ask(url, question) == text == stream(url, question, model=name)
        length = len(default.tokenizer.build_chat_input(question)["input_ids"][0]) + NEW_TOKENS
        tutorial = HTTP.post(url, json={"prompt": question, "temperature": 0, "max_length": length}).json()
        assert tutorial["response"] == response
        assert tutorial["history"] == json.loads(json.dumps(history))
    prompt = HTTP.post(f"{url}/v1/completions", json={"prompt": "你好", **GREEDY}).json()["choices"][0]["text"]
    ids = default.tokenizer("你好", return_tensors="pt")["input_ids"]
    whole = default.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    stops = [index for index, token in enumerate(whole) if token in default.tokenizer.stop_token_ids()]
    assert prompt == default.tokenizer.decode(whole[: stops[0]] if stops else whole)


@every_generation_case
def test_requests_at_once_are_as_each_alone(served: Callable[[str], tuple[str, Any]], name: str) -> None:
    url, _ = served(name)
    alone = [ask(url, question) for question in QUESTIONS]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: ask(url, question), QUESTIONS * 2))
    assert together == alone * 2


@pytest.mark.parametrize("name", [name for name in GENERATION_CASES if name not in ROLE_CASES])
def test_generations_without_tools_say_so(served: Callable[[str], tuple[str, Any]], name: str) -> None:
    url, _ = served(name)
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER]}
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"


def test_adapters_by_name(tmp_path: Path) -> None:
    import peft
    from serving.models import LoadSettings, load_base, load_tokenizer

    folder = REFERENCE / "chatglm3"
    expected, tokenizer = {}, load_tokenizer(folder)
    for index, name in enumerate(("first", "second")):
        torch.manual_seed(index)
        base = load_base(LoadSettings(folder=folder, dtype="float32", device="cpu"))
        expected["chatglm3"] = chat(base, tokenizer, "你好")[0]
        config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["query_key_value"], init_lora_weights=False)
        adapted = peft.get_peft_model(base, config).eval()
        adapted.save_pretrained(tmp_path / name)
        expected[f"chatglm3:{name}"] = chat(adapted.get_base_model(), tokenizer, "你好")[0]
    assert len(set(map(str, expected.values()))) == 3
    adapters = {name: tmp_path / name for name in ("first", "second")}
    with serving_folder(folder, adapters=adapters) as (url, models):
        assert [model["id"] for model in HTTP.get(f"{url}/v1/models").json()["data"]] == list(expected)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda model: ask(url, "你好", model=model), list(expected) * 2))
        assert answers == list(expected.values()) * 2
        answer = HTTP.post(f"{url}/v1/chat/completions", json={"model": "chatglm3:third", "messages": []})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        weights = [served.model.get_input_embeddings().weight.data_ptr() for served in models.by_name.values()]
        assert len(set(weights)) == 1


def test_a_soft_prompt_cannot_be_an_adapter(tmp_path: Path) -> None:
    import peft
    from serving.models import load_models

    (tmp_path / "adapter_config.json").write_text(
        json.dumps(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4).to_dict(), default=list)
    )
    from serving.models import LoadSettings

    settings = LoadSettings(folder=REFERENCE / "chatglm3", device="cpu", adapters={"soft": tmp_path})
    with pytest.raises(ValueError, match="soft prompt"):
        load_models(settings, Metrics())


@every_generation_case
def test_a_prefix_of_p_tuning(name: str, tmp_path: Path) -> None:
    prefix = shutil.copyfile(REFERENCE / name / "prefix_encoder-noproj.bin", tmp_path / "pytorch_model.bin")
    with serving_folder(REFERENCE / name, prefix=prefix) as (url, models):
        default = models.default
        assert isinstance(default.engine, QueueEngine) and default.model.config.pre_seq_len
        response = chat(default.model, default.tokenizer, "你好")[0]
        length = len(default.tokenizer.build_chat_input("你好")["input_ids"][0])
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            bodies = [{"prompt": "你好", "temperature": 0, "max_length": NEW_TOKENS + length}] * 3
            answers = list(pool.map(lambda body: HTTP.post(url, json=body).json(), bodies))
        assert [answer["response"] for answer in answers] == [response] * 3


@pytest.mark.parametrize(("name", "bits"), [("chatglm1", 4), ("chatglm3", 8), ("glm4", 4), ("chatglm2-int4", 0)])
def test_quantized(name: str, bits: int) -> None:
    with serving_folder(REFERENCE / name, bits=bits) as (url, models):
        default = models.default
        assert default.model.config.quantization_bit in (4, 8)
        response = chat(default.model, default.tokenizer, "你好")[0]
        assert ask(url, "你好") == response


class Scene:
    """A scripted server for one generation."""

    def __init__(self, name: str, url: str, engine: ScriptedEngine, tokenizer: Any) -> None:
        self.name, self.url, self.engine, self.tokenizer = name, url, engine, tokenizer

    def write(self, *parts: str) -> None:
        """What the model will write: texts and the names of control tokens."""
        ids = self.tokenizer._special_ids(self.tokenizer.chat_format)
        self.engine.ids = []
        for part in parts:
            self.engine.ids += [ids[part]] if part in ids else self.tokenizer._message_encoding(part)[0]

    def ask(self, messages: list[Any], tools: Any = None) -> tuple[str | None, list[tuple[str, str]], str]:
        """Text, calls and the reason of the end; by a stream and at once, which have to agree."""
        offered = {"tools": tools} if tools else {}
        client = client_of(self.url)
        choice = client.chat.completions.create(model="scripted", messages=messages, **offered).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        chunks = list(client.chat.completions.create(model="scripted", messages=messages, stream=True, **offered))
        deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
        assert [(delta.function.name, delta.function.arguments) for delta in deltas] == calls
        assert [delta.index for delta in deltas] == list(range(len(calls)))
        identities = {delta.id for delta in deltas}
        assert len(identities) == len(calls) and None not in identities
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == (choice.message.content or "")
        assert chunks[-1].choices[0].finish_reason == choice.finish_reason
        return choice.message.content, calls, choice.finish_reason


@pytest.fixture(scope="module", params=[name for name in ROLE_CASES if RECORDED[name].is_first])
def scene(request: pytest.FixtureRequest, served: Callable[[str], tuple[str, Any]]) -> Iterator[Scene]:
    default = served(request.param)[1].default
    metrics = Metrics()
    models, engine = scripted(default.model, default.tokenizer, metrics)
    with serving(models, metrics) as url:
        yield Scene(request.param, url, engine, default.tokenizer)


def as_calls(tokenizer: Any, *calls: tuple[str, dict[str, Any]]) -> list[str]:
    """What a model writes to call functions, the last one closed by the token that asks for a result."""
    parts: list[str] = []
    for name, arguments in calls:
        message = tokenizer.chat_format.write_tool_call(name, arguments)
        parts += ["<|assistant|>", f"{name}\n", message["content"]]
    return [*parts[1:], "<|observation|>"]


QUESTION = [{"role": "user", "content": "weather?"}]


def test_several_calls_of_one_answer(scene: Scene) -> None:
    arguments = [{"city": "巴黎", "days": 3, "exact": True, "unit": None}, {"city": 'it\'s "Rome"'}]
    scene.write(*as_calls(scene.tokenizer, *(("get_weather", values) for values in arguments)))
    text, calls, reason = scene.ask(QUESTION, [WEATHER])
    assert [name for name, _ in calls] == ["get_weather"] * 2 and reason == "tool_calls" and not text
    assert [json.loads(values) for _, values in calls] == arguments


def test_text_before_a_call(scene: Scene) -> None:
    call = as_calls(scene.tokenizer, ("get_weather", {"city": "Rome"}))
    scene.write("\n", "let me see", "<|assistant|>", *call)
    text, calls, _ = scene.ask(QUESTION, [WEATHER])
    assert text == "let me see" and calls == [("get_weather", '{"city": "Rome"}')]


def test_a_call_that_was_cut_off_is_text(scene: Scene) -> None:
    scene.write(*as_calls(scene.tokenizer, ("get_weather", {"city": "Rome"}))[:-1])
    assert scene.engine.ids is not None
    del scene.engine.ids[-(len(scene.engine.ids) // 3) :]
    text, calls, _ = scene.ask(QUESTION, [WEATHER])
    assert calls == [] and text and text.startswith("get_weather")


def test_what_comes_back_is_read_as_the_model_wrote_it(scene: Scene) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18"},
    ]
    scene.write("\n", "fine")
    assert scene.ask(messages, [WEATHER])[0] == "fine"
    expected = scene.tokenizer.apply_chat_template(
        messages, tools=[WEATHER], add_generation_prompt=True, return_dict=False
    )
    assert scene.engine.prompts[-1] == expected


def test_tools_that_take_plain_text(scene: Scene) -> None:
    # CODEPATH: glm4 is offered its built-in tools by type; chatglm3 calls its code interpreter where nothing is offered.
    is_glm4 = bool(scene.tokenizer.chat_format.builtin_tools)
    name, tools = ("python", [{"type": "python"}]) if is_glm4 else ("interpreter", None)
    code = "print(1)\nprint('a')" if is_glm4 else "```python\nprint(1)\nprint('a')\n```"
    scene.write(f"{name}\n", code, "<|observation|>")
    _, calls, reason = scene.ask(QUESTION, tools)
    assert [called for called, _ in calls] == [name] and reason == "tool_calls"
    assert calls[0][1].strip() == code
    # Its result goes back as any other tool's.
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": calls[0][1]}}
    result = {"role": "tool", "tool_call_id": "c", "content": "1"}
    scene.write("\n", "one")
    assert scene.ask([*QUESTION, {"role": "assistant", "tool_calls": [call]}, result], tools)[0] == "one"
    decoded = scene.tokenizer.decode(scene.engine.prompts[-1], skip_special_tokens=False)
    assert f"<|assistant|> {name}" in decoded.replace("<|assistant|>", "<|assistant|> ").replace("  ", " ")
    assert "print(1)" in decoded


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_top_p_keeps_what_the_library_keeps(spread: float) -> None:
    processor = request_processors().logits_processor[1]
    scores = torch.randn(6, 2000) * spread
    asked = torch.tensor([0.05, 0.5, 0.8, 0.95, 1.0, 0.999]).view(torch.int32)
    expected = super(type(processor), processor).__call__(scores, asked)
    kept = processor(scores, asked)
    assert torch.equal(kept[4], scores[4])
    for row in (0, 1, 2, 3, 5):
        assert torch.equal(kept[row].isinf(), expected[row].isinf()) and torch.equal(kept[row], expected[row])


ANSWERS = (
    "\n 你好",
    "你好, world!  \n\n 再见 \n",
    "get_weather\n```python\ntool_call(city='巴黎')\n```",
    'get_weather\n{"city": "Rome"}<|assistant|>\n done <|assist',
    '\n let me see<|assistant|>get_weather\n{"city": "Rome"}',
    "interpreter\n```python\nprint(1)\n```",
    "no name at all\nand a second line",
    "python\nprint('<|assistant|>')",
    "",
    "a" * 70 + "\nb",
)


@pytest.mark.parametrize("version", GENERATIONS)
@pytest.mark.parametrize("has_tools", [True, False])
def test_an_answer_is_read_alike_in_pieces_of_any_size(version: str, has_tools: bool) -> None:
    chat_format = load_module("conversation_chatglm").conversation_format(version)

    def read(text: str, size: int) -> tuple[str, list[Any]]:
        reader = reader_for(chat_format, has_tools)
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        items = [item for piece in [*pieces, None] for item in reader(piece)]
        return "".join(item for item in items if isinstance(item, str)), [
            item for item in items if isinstance(item, Call)
        ]

    for answer in ANSWERS:
        whole, calls = read(answer, max(len(answer), 1))
        assert read(answer, 1) == read(answer, 3) == (whole, calls)
        response = chat_format.read_answer(answer, [])[0]
        if "<|assistant|>" not in answer and not calls and isinstance(response, str):
            assert whole == response


@pytest.fixture
def endless(
    request: pytest.FixtureRequest, served: Callable[[str], tuple[str, Any]]
) -> Iterator[tuple[str, ScriptedEngine, Metrics]]:
    """A server whose answers never end."""
    default = served("chatglm3")[1].default
    metrics = Metrics()
    seconds = getattr(request, "param", 1.0)
    models, engine = scripted(default.model, default.tokenizer, metrics, seconds=seconds)
    engine.ids = None
    with serving(models, metrics, Limits(requests=2)) as url:
        yield url, engine, metrics


BODY = {"messages": [{"role": "user", "content": "x"}]}


def test_an_answer_that_takes_too_long(endless: tuple[str, ScriptedEngine, Metrics]) -> None:
    url, engine, metrics = endless
    answer = HTTP.post(f"{url}/v1/chat/completions", json=BODY)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert HTTP.post(url, json={"prompt": "x"}).json()["status"] == 504
    with pytest.raises(openai.APIError, match="longer than 1 seconds"):
        list(client_of(url).chat.completions.create(model="scripted", stream=True, **BODY))
    events = HTTP.post(f"{url}/stream", json={"prompt": "x"}).text
    assert json.loads(events.removeprefix("data: "))["status"] == 504
    assert engine.num_cancelled == 4
    assert metrics.registry.get_sample_value("chatglm_answers_running") == 0


def test_more_requests_than_allowed(endless: tuple[str, ScriptedEngine, Metrics]) -> None:
    url, _, _ = endless
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: HTTP.post(url, json={"prompt": "x"}), range(6)))
    assert sorted({answer.status_code for answer in answers}) == [429, 504]
    assert all(answer.json()["status"] == answer.status_code for answer in answers)


@pytest.mark.parametrize("endless", [600.0], indirect=True)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_goes_away(endless: tuple[str, ScriptedEngine, Metrics], is_streamed: bool) -> None:
    url, engine, metrics = endless
    body = {**BODY, "stream": is_streamed}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as client:
        client.post(f"{url}/v1/chat/completions", json=body)
    wait_until(lambda: engine.num_cancelled == 1)
    wait_until(lambda: metrics.registry.get_sample_value("chatglm_answers_running") == 0)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/stream"])
def test_a_client_that_goes_away_or_reads_nothing(
    served: Callable[[str], tuple[str, Any]], path: str, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "READING_SECONDS", 0)
    default = served("chatglm3")[1].default
    models, engine = scripted(default.model, default.tokenizer, Metrics())
    engine.ids = None
    body = {"prompt": "x"} if path == "/stream" else {**BODY, "stream": True}
    body = {"prompt": "x", "stream": True} if path == "/v1/completions" else body

    async def leave() -> None:
        has_begun = asyncio.Event()
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await has_begun.wait()
            if stays:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            has_begun.set()
            await asyncio.Event().wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        # As uvicorn has it, whose responses do not look for a client that goes away.
        scope |= {"asgi": {"version": "3.0", "spec_version": "2.4"}}
        app = build_app(models, Metrics(), Limits(seconds=0.5 if stays else 600))
        await app(scope, receive, send)
        assert app.num_running == 0

    asyncio.run(leave())
    # A server that is slow may not have begun in half a second.
    assert engine.num_cancelled == len(engine.prompts) <= 1 and (stays or engine.prompts)


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2"])
def test_the_slot_of_a_client_that_goes_away_is_free(served: Callable[[str], tuple[str, Any]], name: str) -> None:
    url, models = served(name)
    body = {"prompt": "你好", "temperature": 0, "max_tokens": 1900, "stream": True}
    read = models.default.metrics.generated_tokens.labels(name)._value.get
    before = read()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
        next(answer.iter_lines())
    wait_until(lambda: models.default.metrics.running._value.get() == 0)
    assert ask(url, "你好")
    assert read() - before < 1900
    if isinstance(models.default.engine, BatchingEngine):
        manager = models.default.engine.manager
        assert not manager.batch_processor.scheduler.active_requests
        assert not manager.output_router.result_handlers


def test_an_error_while_generating_is_told_and_forgotten(
    served: Callable[[str], tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chatglm1", "chatglm2"):
        url, models = served(name)
        expected = ask(url, "你好")
        with monkeypatch.context() as patch:
            patch.setattr(models.default.model, "forward", lambda *args, **kwargs: 1 / 0)
            answer = HTTP.post(f"{url}/v1/chat/completions", json=BODY)
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
            # What went wrong is the server's business.
            assert "division" not in answer.text and "log" in answer.json()["error"]["message"]
        assert ask(url, "你好") == expected


def test_keys(served: Callable[[str], tuple[str, Any]]) -> None:
    default = served("chatglm3")[1].default
    metrics = Metrics()
    models, engine = scripted(default.model, default.tokenizer, metrics)
    with serving(models, metrics, keys=("first", "zweiter-Schlüssel")) as url:
        assert HTTP.get(f"{url}/health").json() == {"status": "ok"}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
            answer = HTTP.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert HTTP.post(url, json={"prompt": "x"}, headers=headers).json()["status"] == 401
            assert HTTP.get(f"{url}/metrics", headers=headers).status_code == 401
        for key in ("first", "zweiter-Schlüssel"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert HTTP.get(f"{url}/v1/models", headers=headers).status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="first")
        assert client.chat.completions.create(model="scripted", **BODY).choices[0].finish_reason == "stop"
        assert len(engine.prompts) == 1


def test_a_limit_of_prompts(served: Callable[[str], tuple[str, Any]]) -> None:
    with auto_classes_left_alone(), serving_folder(REFERENCE / "chatglm3", Limits(prompt_tokens=20)) as (url, _):
        assert ask(url, "x") is not None
        answer = HTTP.post(f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "你好" * 30}]})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
