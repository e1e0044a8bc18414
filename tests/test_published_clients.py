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
"""Programs that were written for the published repositories, one for each door, in small.

They are written from the calls that the official READMEs describe: what a terminal, a server, a web page, a fine-tuning
script call, in their order and with their arguments. Nothing in a program knows of this repository.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map
from bundled_tools import CLOUDY, WEATHER
from generations import ALL_CASES, GENERATION_CASES, RECORDED, ROLE_CASES
from peft import AutoPeftModelForCausalLM, LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)


ROLE_GENERATIONS = [name for name in GENERATION_CASES if name in ROLE_CASES]
# ChatGLM-6B's streams have no cache.
CACHE_GENERATIONS = [name for name in GENERATION_CASES if RECORDED[name].is_causal]
ENDS = {"chatglm1": "<eop>", "chatglm2": "</s>", "chatglm3": "<|user|>", "glm4": "<|user|>"}
SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Named = Callable[[str], Any]


@pytest.fixture(params=GENERATION_CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(name: str, case_model: Named, case_tokenizer: Named) -> Pair:
    return case_model(name), case_tokenizer(name)


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory, copy_bundled: Callable[[str, Path], Path]) -> Pair:
    """The bundled ChatGLM3, which was taught a weather tool."""
    folder = copy_bundled("tiny-chatglm3", tmp_path_factory.mktemp("clients"))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


class Say(LogitsProcessor):
    """Makes a model answer given texts, one after the other, each to its end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], end: str) -> None:
        end_id = tokenizer.convert_tokens_to_ids(end)
        self.ids = [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False), end_id]]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = torch.full_like(scores, -1e9)
        scores[:, self.ids.pop(0)] = 0.0
        return scores


def saying(name: str, tokenizer: PreTrainedTokenizerBase, *texts: str) -> LogitsProcessorList:
    # A text of ChatGLM3 and GLM-4 comes after a line for the name of a tool.
    start = "\n" if RECORDED[name].has_roles else ""
    return LogitsProcessorList([Say(tokenizer, [start + text for text in texts], ENDS[name])])


# The terminal.


def terminal(model: Any, tokenizer: Any, lines: list[str], **settings: Any) -> tuple[str, Any]:
    printed, history = "", []
    for query in lines:
        if query == "stop":
            break
        if query == "clear":
            history = []
            continue
        shown = 0
        for response, history in model.stream_chat(tokenizer, query, history=history, **settings):
            printed += response[shown:]
            shown = len(response)
        printed += "\n"
    return printed, history


def terminal_with_a_cache(model: Any, tokenizer: Any, lines: list[str], **settings: Any) -> tuple[str, Any]:
    printed, history, past_key_values = "", [], None
    for query in lines:
        if query == "clear":
            past_key_values, history = None, []
            continue
        shown = 0
        for response, history, past_key_values in model.stream_chat(
            tokenizer,
            query,
            history=history,
            top_p=1,
            temperature=0.01,
            past_key_values=past_key_values,
            return_past_key_values=True,
            **settings,
        ):
            printed += response[shown:]
            shown = len(response)
        printed += "\n"
    return printed, history


@pytest.mark.parametrize(
    ("program", "name"),
    [(terminal, name) for name in GENERATION_CASES] + [(terminal_with_a_cache, name) for name in CACHE_GENERATIONS],
)
def test_terminal(program: Callable, name: str, pair: Pair) -> None:
    model, tokenizer = pair
    say = saying(name, tokenizer, "one two", "three", "four")
    printed, history = program(model, tokenizer, ["a", "clear", "b", "c"], logits_processor=say)
    assert printed == "one two\nthree\nfour\n"
    messages = model.chat_format.normalize_messages(history)
    assert [message["content"] for message in messages] == ["b", "three", "c", "four"]


class StopOnTokens(StoppingCriteria):
    def __init__(self, stop_ids: list[int]) -> None:
        self.stop_ids = stop_ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> bool:
        return any(input_ids[0][-1] == stop_id for stop_id in self.stop_ids)


def terminal_with_a_streamer(model: Any, tokenizer: Any, lines: list[str], **settings: Any) -> tuple[str, Any]:
    printed, history = "", []
    for query in lines:
        history.append([query, ""])
        messages = []
        for index, (user, answer) in enumerate(history):
            if index == len(history) - 1 and answer == "":
                messages.append({"role": "user", "content": user})
                break
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        model_inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt"
        ).to(model.device)
        streamer = TextIteratorStreamer(tokenizer=tokenizer, timeout=60, skip_prompt=True, skip_special_tokens=True)
        generate_kwargs = {
            "input_ids": model_inputs,
            "streamer": streamer,
            "max_new_tokens": 64,
            "do_sample": True,
            "top_p": 0.8,
            "temperature": 0.6,
            "stopping_criteria": StoppingCriteriaList([StopOnTokens([0, 2])]),
            "repetition_penalty": 1.2,
            "eos_token_id": tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"]),
            **settings,
        }
        thread = threading.Thread(target=model.generate, kwargs=generate_kwargs)
        thread.start()
        for new_token in streamer:
            if new_token:
                printed += new_token
                history[-1][1] += new_token
        history[-1][1] = history[-1][1].strip()
        thread.join()
    return printed, history


@pytest.mark.parametrize("name", ROLE_GENERATIONS)
def test_terminal_with_a_streamer(name: str, pair: Pair) -> None:
    model, tokenizer = pair
    printed, history = terminal_with_a_streamer(
        model, tokenizer, ["a", "b"], logits_processor=saying(name, tokenizer, "one two", "three")
    )
    assert history == [["a", "one two"], ["b", "three"]]
    assert printed.split() == ["one", "two", "three"]


# The server of `api.py`.


def serve(model: Any, tokenizer: Any) -> HTTPServer:
    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            max_length, top_p = request.get("max_length"), request.get("top_p")
            response, history = model.chat(
                tokenizer,
                request.get("prompt"),
                history=request.get("history"),
                max_length=max_length or 2048,
                top_p=top_p or 0.7,
                temperature=request.get("temperature") or 0.95,
            )
            answer = {
                "response": response,
                "history": history,
                "status": 200,
                "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Keep quiet."""

    return HTTPServer(("127.0.0.1", 0), Api)


def post(port: int, request: dict[str, Any]) -> dict[str, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/", json.dumps(request), {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def test_post_server(pair: Pair) -> None:
    model, tokenizer = pair
    server = serve(model, tokenizer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        history: Any = []
        for prompt in ("你好", "再见"):
            limit = len(tokenizer.build_chat_input(prompt, history=history)["input_ids"][0]) + 8
            request = {"prompt": prompt, "history": history, "max_length": limit, "top_p": 0.8}
            torch.manual_seed(1)
            expected = model.chat(tokenizer, prompt, history=history, max_length=limit, top_p=0.8, temperature=0.95)
            torch.manual_seed(1)
            answer = post(server.server_port, request)
            # As JSON has it: pairs are lists there, and come back as such.
            assert [answer["response"], answer["history"]] == json.loads(json.dumps(expected))
            assert answer["status"] == 200
            history = answer["history"]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# The web page.


def predict(
    model: Any, tokenizer: Any, text: str, chatbot: list, state: tuple[Any, Any], limits: tuple, **settings: Any
) -> Iterator[tuple[list, tuple[Any, Any]]]:
    """One message of a page with a list of questions and answers, and sliders for the limits."""
    max_length, top_p, temperature = limits
    history, past_key_values = state
    chatbot.append((text, ""))
    for response, history, past_key_values in model.stream_chat(
        tokenizer,
        text,
        history,
        past_key_values=past_key_values,
        return_past_key_values=True,
        max_length=max_length,
        top_p=top_p,
        temperature=temperature,
        **settings,
    ):
        chatbot[-1] = (text, response)
        yield chatbot, (history, past_key_values)


def test_web_page(name: str, pair: Pair) -> None:
    model, tokenizer = pair
    chatbot: list = []
    state: tuple[Any, Any] = ([], None)
    say = saying(name, tokenizer, "one two three", "four")
    for text in ("a", "b"):
        shown = []
        for chatbot, state in predict(model, tokenizer, text, chatbot, state, (512, 0.8, 0.95), logits_processor=say):
            shown.append(chatbot[-1][1])
        assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:])) and len(shown) > 1
    assert chatbot == [("a", "one two three"), ("b", "four")]
    # The button that stops: the generator is closed in the middle, and the page goes on.
    say = saying(name, tokenizer, "one two three")
    stopped = predict(model, tokenizer, "c", chatbot, state, (512, 0.8, 0.95), logits_processor=say)
    next(stopped)
    stopped.close()
    say = saying(name, tokenizer, "five")
    for chatbot, state in predict(model, tokenizer, "d", chatbot, state, (512, 0.8, 0.95), logits_processor=say):
        pass
    assert chatbot[-1] == ("d", "five")


# The API in OpenAI's form.


def completions_of_pairs(model: Any, tokenizer: Any, messages: list[dict], **settings: Any) -> Iterator[str]:
    """The pieces of a streamed answer: ChatGLM-6B and ChatGLM2, whose history are pairs."""
    query, before = messages[-1]["content"], messages[:-1]
    if before and before[0]["role"] == "system":
        query = before.pop(0)["content"] + query
    history = []
    for question, answer in zip(before[::2], before[1::2]):
        if question["role"] == "user" and answer["role"] == "assistant":
            history.append([question["content"], answer["content"]])
    sent = 0
    for response, _ in model.stream_chat(tokenizer, query, history, **settings):
        if len(response) > sent:
            yield response[sent:]
            sent = len(response)


@pytest.mark.parametrize("name", [name for name in GENERATION_CASES if name not in ROLE_CASES])
def test_openai_api_of_pairs(name: str, pair: Pair) -> None:
    model, tokenizer = pair
    messages = [
        {"role": "system", "content": "Be kind. "},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    say = saying(name, tokenizer, "one two three")
    pieces = list(completions_of_pairs(model, tokenizer, messages, logits_processor=say))
    assert "".join(pieces) == "one two three" and len(pieces) > 1


class InvalidScores(LogitsProcessor):
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if torch.isnan(scores).any() or torch.isinf(scores).any():
            scores.zero_()
            scores[..., 5] = 5e4
        return scores


def generate_stream(model: Any, tokenizer: Any, body: dict[str, Any], **settings: Any) -> Iterator[str]:
    """The text so far: ChatGLM3 and GLM-4, by `build_chat_input` and `stream_generate`."""
    *history, last = body["messages"]
    inputs = tokenizer.build_chat_input(last["content"], history=history, role=last["role"]).to(model.device)
    input_length = len(inputs["input_ids"][0])
    eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.get_command("<|user|>"),
        tokenizer.get_command("<|observation|>"),
    ]
    gen_kwargs = {
        "max_length": body.get("max_tokens", 64) + input_length,
        "do_sample": body.get("temperature", 0) > 1e-5,
        "top_p": body.get("top_p", 0.8),
        "repetition_penalty": 1.0,
        "logits_processor": [InvalidScores(), *settings.pop("logits_processor", ())],
    }
    for total_ids in model.stream_generate(**inputs, eos_token_id=eos_token_id, **gen_kwargs):
        response = tokenizer.decode(total_ids.tolist()[0][input_length:-1])
        if response and response[-1] != "\ufffd":
            yield response


def completions(model: Any, tokenizer: Any, request: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The message of an answer to a request with tools."""
    messages = []
    if request.get("tools"):
        messages.append(
            {"role": "system", "content": SYSTEM, "tools": [tool["function"] for tool in request["tools"]]}
        )
    for message in request["messages"]:
        if message["role"] in ("function", "tool"):
            messages.append({"role": "observation", "content": message["content"]})
        elif message["role"] == "assistant" and message.get("tool_calls"):
            # The call as the model wrote it, which such a server keeps in the content.
            name, _, content = message["content"].partition("\n")
            messages.append({"role": "assistant", "metadata": name, "content": content})
        else:
            messages.append(message)
    text = ""
    for text in generate_stream(model, tokenizer, {**request, "messages": messages}, **settings):
        pass
    content, _ = model.process_response(text, messages)
    if isinstance(content, dict):
        call = {"name": content["name"], "arguments": json.dumps(content["parameters"], ensure_ascii=False)}
        return {"role": "assistant", "content": text.strip(), "tool_calls": [{"type": "function", "function": call}]}
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("name", ROLE_GENERATIONS)
def test_openai_api_with_tools(name: str, pair: Pair, bundled: Pair) -> None:
    # The bundled ChatGLM3 knows by itself what to say.
    model, tokenizer = bundled if name == "chatglm3" else pair
    said: dict[str, Any] = {}
    if name != "chatglm3":
        texts = ['get_weather\n{"city": "Paris"}', f"\n{CLOUDY}"]
        said = {"logits_processor": [Say(tokenizer, texts, "<|observation|>")]}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather like in Paris?"}]
    request = {"messages": messages, "tools": [{"type": "function", "function": WEATHER}]}
    called = completions(model, tokenizer, request, **said)
    [call] = called["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    observation = {"role": "tool", "content": json.dumps({"temperature": 18, "condition": "cloudy"})}
    request["messages"] = [*messages, called, observation]
    assert completions(model, tokenizer, request, **said) == {"role": "assistant", "content": CLOUDY}


# The registry of tools.


TOOLS: dict[str, tuple[Callable, dict[str, Any]]] = {}


def register_tool(function: Callable) -> Callable:
    TOOLS[function.__name__] = (function, {**WEATHER, "name": function.__name__})
    return function


@register_tool
def get_weather(city: str) -> dict[str, Any]:
    return {"temperature": 18, "condition": "cloudy"} if city == "Paris" else {}


def dispatch_tool(name: str, parameters: dict[str, Any]) -> str:
    if name not in TOOLS:
        return f"Tool `{name}` not found."
    try:
        return json.dumps(TOOLS[name][0](**parameters))
    except Exception as error:
        return str(error)


def run_conversation(model: Any, tokenizer: Any, query: str, tools: Any, **settings: Any) -> tuple[Any, list[dict]]:
    history = [{"role": "system", "content": SYSTEM, "tools": tools}]
    response, history = model.chat(tokenizer, query, history=history, **settings)
    while isinstance(response, dict):
        result = dispatch_tool(response["name"], response["parameters"])
        response, history = model.chat(tokenizer, result, history=history, role="observation", **settings)
    return response, history


@pytest.mark.floor
@pytest.mark.parametrize("form", ["list", "dict"])
@pytest.mark.parametrize("name", ROLE_GENERATIONS)
def test_tool_registry(name: str, form: str, pair: Pair, bundled: Pair) -> None:
    # The bundled ChatGLM3 was taught with a list.
    is_taught = name == "chatglm3" and form == "list"
    model, tokenizer = bundled if is_taught else pair
    calls = {
        "chatglm3": "get_weather\n```python\ntool_call(city='Paris')\n```",
        "glm4": 'get_weather\n{"city": "Paris"}',
    }
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 64}
    if not is_taught:
        settings = {
            "logits_processor": LogitsProcessorList([Say(tokenizer, [calls[name], CLOUDY], "<|observation|>")])
        }
    descriptions = {key: description for key, (_, description) in TOOLS.items()}
    tools = descriptions if form == "dict" else list(descriptions.values())
    query = "What is the weather like in Paris?"
    response, history = run_conversation(model, tokenizer, query, tools, **settings)
    assert response == CLOUDY
    assert [message["role"] for message in history] == ["system", "user", "assistant", "observation", "assistant"]
    assert (
        json.loads(history[3]["content"]) == get_weather("Paris") and history[2]["metadata"].strip() == "get_weather"
    )


# P-tuning v2: train, evaluate, deploy.


def train(model: Any, ids: torch.Tensor, labels: torch.Tensor, steps: int) -> tuple[float, float]:
    """The first and the last loss."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels, return_dict=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("projection", [False, True])
def test_ptuning(name: str, projection: bool, case_folder: Named, tmp_path: Path) -> None:
    folder = case_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def load() -> Any:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config.pre_seq_len = 4
        config.prefix_projection = projection
        return AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)

    # main.py trains in half precision with a prefix in float32; a processor trains all of it in float32.
    model = load().float().train()
    model.transformer.prefix_encoder.float()
    source = tokenizer.encode(text="你好", add_special_tokens=True)
    answer = tokenizer.encode(text="one two", add_special_tokens=False)
    ids = torch.tensor([[*source, *answer, tokenizer.eos_token_id]])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(source), -100)
    first, last = train(model, ids, labels, 12)
    assert last < first
    # Its Trainer saves what was trained, and no more.
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    saved = {key: weight for key, weight in model.state_dict().items() if key in trained}
    torch.save(saved, tmp_path / "pytorch_model.bin")

    # Evaluation and deployment load the prefix by hand.
    deployed = load()
    prefix_state_dict = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    new_prefix_state_dict = {}
    for key, weight in prefix_state_dict.items():
        if key.startswith("transformer.prefix_encoder."):
            new_prefix_state_dict[key[len("transformer.prefix_encoder.") :]] = weight
    assert len(new_prefix_state_dict) == len(saved) == (5 if projection else 1)
    deployed.transformer.prefix_encoder.load_state_dict(new_prefix_state_dict)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert (deployed.float().eval()(ids).logits - expected).abs().max() < 1e-5

    batch = tokenizer(["你好", "a longer text"], max_length=16, truncation=True, padding=True, return_tensors="pt")
    written = deployed.generate(**batch, max_length=24, num_beams=2, do_sample=False)
    assert len(tokenizer.batch_decode(written, skip_special_tokens=True)) == 2

    # On integers: quantize, half precision for all but the prefix.
    deployed = deployed.quantize(4).half()
    deployed.transformer.prefix_encoder.float()
    assert deployed.transformer.prefix_encoder.embedding.weight.dtype == torch.float32
    response, history = deployed.float().eval().chat(tokenizer, "你好", history=[], max_length=40)
    assert len(history) in (1, 2) and response is not None


# Fine-tuning and inference of ChatGLM3 and GLM-4.


def preprocess(tokenizer: Any, conversation: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation; the assistant's messages are learnt."""
    ids = tokenizer.get_prefix_tokens()
    mask = [False] * len(ids)
    for message in conversation:
        new_ids = tokenizer.build_single_message(message["role"], "", message["content"])
        is_learnt = message["role"] not in ("system", "user")
        ids, mask = ids + new_ids, mask + [False] + [is_learnt] * (len(new_ids) - 1)
    ids.append(tokenizer.eos_token_id)
    mask.append(True)
    return ids, [token if is_learnt else -100 for token, is_learnt in zip(ids, mask)]


@pytest.mark.parametrize("name", ROLE_GENERATIONS)
def test_fine_tune_and_infer(name: str, case_folder: Named, tmp_path: Path) -> None:
    folder = str(case_folder(name))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, empty_init=False, use_cache=False)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["query_key_value"]
    )
    model = get_peft_model(model.float(), lora)
    model.print_trainable_parameters()
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    conversation = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "one two"}]
    ids, labels = preprocess(tokenizer, conversation)
    first, last = train(model, torch.tensor([ids]), torch.tensor([labels]), 12)
    assert last < first
    model.save_pretrained(tmp_path)

    # inference_hf.py: a folder with an adapter brings its base and its tokenizer.
    assert (tmp_path / "adapter_config.json").is_file()
    tuned = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path), trust_remote_code=True, device_map="auto")
    tokenizer_dir = tuned.peft_config["default"].base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_dir, trust_remote_code=True, encode_special_tokens=True, use_fast=False
    )
    with torch.no_grad():
        difference = tuned.float()(torch.tensor([ids])).logits - model.eval()(torch.tensor([ids])).logits
    assert difference.abs().max() < 1e-5
    response, history = tuned.chat(tokenizer, "你好", max_length=40)
    assert len(history) >= 2 and response is not None


# Several GPUs.


def device_map_by_hand(num_layers: int, num_gpus: int, names: tuple[str, ...], layer: str) -> dict[str, int]:
    """The ends of the model on the first GPU, the layers one after the other on all of them."""
    return dict.fromkeys(names, 0) | {f"{layer}.{i}": i * num_gpus // num_layers for i in range(num_layers)}


def test_device_map_by_hand(pair: Pair, name: str) -> None:
    model, _ = pair
    newer = ("transformer.embedding", "transformer.rotary_pos_emb", "transformer.output_layer")
    names = {"chatglm1": ("transformer.word_embeddings", "lm_head", "transformer.final_layernorm")}
    layer = {"chatglm1": "transformer.layers"}
    device_map = device_map_by_hand(
        model.config.num_layers,
        2,
        names.get(name, (*newer, "transformer.encoder.final_layernorm")),
        layer.get(name, "transformer.encoder.layers"),
    )
    if name != "chatglm1":
        check_device_map(model, device_map)
        return
    # The modules of ChatGLM-6B have the names of its successors here; only its files have the older ones.
    with pytest.raises(ValueError, match="transformer.embedding.word_embeddings.weight"):
        check_device_map(model, device_map)


# Many prompts at once.


@pytest.mark.parametrize("name", [name for name in ALL_CASES if not RECORDED[name].is_quantized])
def test_batch_inference(name: str, pair: Pair) -> None:
    model, tokenizer = pair
    assert tokenizer.padding_side == "left"
    queries = ["你好", "a longer question", "x"]
    if RECORDED[name].has_roles:
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": query}] for query in queries],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
    else:
        prompts = [tokenizer.build_prompt(query, history=[]) for query in queries]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
    for row, query in enumerate(queries):
        response = tokenizer.decode(outputs[row][len(inputs["input_ids"][row]) :], skip_special_tokens=True)
        alone = tokenizer.build_chat_input(query, history=[])
        expected = model.generate(alone["input_ids"], max_new_tokens=6, do_sample=False)
        assert response == tokenizer.decode(expected[0, alone["input_ids"].shape[1] :], skip_special_tokens=True)
