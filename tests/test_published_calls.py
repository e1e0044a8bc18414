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
"""The calls that were written for the published models: their arguments, in their order, and their helpers.

`docs/compatibility.md` says what becomes of each.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generations import CAUSAL_CASES, FLOAT_CASES, GENERATION_CASES, RECORDED, every_generation, every_generation_case
from quantized import ModelMaker, logits_of, maker, quantized_layers
from transformers import AutoModel, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


GREEDY = {"do_sample": False, "max_new_tokens": 6}
# What the published methods take after `tokenizer` and `query`, in their order.
SAMPLING = ["do_sample", "top_p", "temperature", "logits_processor"]
CHAT_ORDERS = {
    "chatglm1": ["history", "max_length", "num_beams", *SAMPLING],
    "chatglm2": ["history", "max_length", "num_beams", *SAMPLING],
    "chatglm3": ["history", "role", "max_length", "num_beams", *SAMPLING],
    "glm4": ["history", "role", "max_length", "num_beams", *SAMPLING],
}
STREAM_ORDERS = {
    "chatglm1": ["history", "max_length", *SAMPLING],
    "chatglm2": ["history", "past_key_values", "max_length", *SAMPLING, "return_past_key_values"],
    "chatglm3": ["history", "role", "past_key_values", "max_length", *SAMPLING, "return_past_key_values"],
    "glm4": ["history", "role", "past_key_values", "max_length", *SAMPLING, "return_past_key_values"],
}
PROCESSORS = LogitsProcessorList()
GIVEN = {
    "history": [("a", "b")],
    "role": "user",
    "past_key_values": None,
    "max_length": 77,
    "num_beams": 1,
    "do_sample": False,
    "top_p": 0.3,
    "temperature": 0.4,
    "logits_processor": PROCESSORS,
    "return_past_key_values": True,
}

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Named = Callable[[str], Any]


@pytest.fixture(params=GENERATION_CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(name: str, case_model: Named, case_tokenizer: Named) -> Pair:
    return case_model(name), case_tokenizer(name)


@pytest.fixture
def make(tiny_model: ModelMaker) -> ModelMaker:
    return maker(tiny_model)


@pytest.fixture
def started(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `generate` and `stream_generate` are called with; they answer nothing."""
    model, calls = pair[0], []

    def generate(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        calls.append(settings)
        return ids

    def stream_generate(ids: torch.Tensor, **settings: Any) -> Iterator[torch.Tensor]:
        yield generate(ids, **settings)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(model, "stream_generate", stream_generate)
    return calls


@pytest.mark.parametrize(("method", "orders"), [("chat", CHAT_ORDERS), ("stream_chat", STREAM_ORDERS)])
def test_arguments_by_position_come_in_the_published_order(
    method: str, orders: dict[str, list[str]], name: str, pair: Pair, started: list[dict[str, Any]]
) -> None:
    model, tokenizer = pair
    call, order = getattr(model, method), orders[name]
    for count in range(len(order) + 1):
        answers = call(tokenizer, "x", *(GIVEN[argument] for argument in order[:count]))
        answer = answers if method == "chat" else list(answers)[-1]
        settings = started.pop()
        for argument in order[:count]:
            if argument not in ("history", "role", "past_key_values", "return_past_key_values"):
                assert settings[argument] == GIVEN[argument]
        assert len(answer) == (3 if "return_past_key_values" in order[:count] else 2)
        assert len(model.chat_format.normalize_messages(answer[1])) == (2 if count == 0 else 4)
    with pytest.raises(TypeError, match=f"{len(order) + 2} positional arguments.*{order[-1]}"):
        call(tokenizer, "x", *(GIVEN[argument] for argument in order), 1)
    with pytest.raises(TypeError, match="`max_length` twice"):
        call(tokenizer, "x", *(GIVEN[argument] for argument in order), max_length=5)
    # A role behind the history is read as one in every generation, and a role that does not exist is named.
    assert call(tokenizer, "x", [], "user") is not None
    with pytest.raises(ValueError, match="'nobody'"):
        call(tokenizer, "x", [], "nobody")


def test_signatures_can_be_read(pair: Pair) -> None:
    model, _ = pair
    for method in (model.chat, model.stream_chat):
        assert list(inspect.signature(method).parameters)[:4] == ["tokenizer", "query", "history", "role"]
        assert method.__doc__.startswith("Answer")


@pytest.mark.floor
def test_positions_answer_like_keywords(name: str, pair: Pair) -> None:
    model, tokenizer = pair
    values = GIVEN | {"history": [], "max_length": 40, "logits_processor": None}
    order = CHAT_ORDERS[name]
    by_name = model.chat(tokenizer, "你好", **{argument: values[argument] for argument in order})
    assert model.chat(tokenizer, "你好", *(values[argument] for argument in order)) == by_name
    order = STREAM_ORDERS[name]
    *_, last = model.stream_chat(tokenizer, "你好", *(values[argument] for argument in order))
    assert last[:2] == by_name


def test_an_unknown_argument_of_chat_is_named(pair: Pair, started: list[dict[str, Any]]) -> None:
    model, tokenizer = pair
    calls = {
        "chat": lambda **settings: model.chat(tokenizer, "x", **settings),
        "batch_chat": lambda **settings: model.batch_chat(tokenizer, ["x"], **settings),
    }
    for method, call in calls.items():
        with pytest.raises(ValueError, match="`max_new_token`.*`max_new_tokens`.*`nonsense`"):
            call(max_new_token=5, nonsense=1)
        assert not started, method
        call(max_new_tokens=5, repetition_penalty=1.1, output_scores=False, stop_strings=["a"])
        started.clear()


@pytest.mark.floor
def test_streaming_drops_unknown_arguments(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = pair
    ids = model.build_inputs(tokenizer, "你好")["input_ids"]
    unknown = {"stop_sequences": ["<|observation|>"], "max_new_token": 99, "echo": False, "unused": None}
    expected = list(model.stream_generate(ids, **GREEDY))
    assert not caplog.records
    for _ in range(2):
        found = list(model.stream_generate(ids, **GREEDY, **unknown))
        assert all(map(torch.equal, found, expected)) and len(found) == len(expected)
    assert caplog.text.count("`stop_sequences` (did you mean `stop_strings`?)") == 1
    assert "`max_new_token` (did you mean `max_new_tokens`?)" in caplog.text and "`echo`" in caplog.text
    assert "unused" not in caplog.text
    expected = list(model.stream_chat(tokenizer, "你好", **GREEDY))
    assert list(model.stream_chat(tokenizer, "你好", **GREEDY, stop_sequences=["a"])) == expected


def test_a_limit_below_the_prompt_is_named(pair: Pair, started: list[dict[str, Any]]) -> None:
    model, tokenizer = pair
    length = len(model.build_inputs(tokenizer, "hello")["input_ids"][0])
    for limit in (5, length):
        with pytest.raises(ValueError, match=f"`max_length={limit}`.* {length} tokens"):
            model.chat(tokenizer, "hello", max_length=limit)
        with pytest.raises(ValueError, match=f"`max_length={limit}`.* {length} tokens"):
            model.stream_chat(tokenizer, "hello", max_length=limit)
    assert not started
    model.chat(tokenizer, "hello", max_length=length + 1)


@pytest.mark.floor
def test_what_a_tokenizer_returned_is_a_prompt(pair: Pair) -> None:
    model, tokenizer = pair
    encoding = tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert not isinstance(encoding, torch.Tensor)
    expected = model.generate(encoding["input_ids"], **GREEDY)
    assert model.generate(encoding, **GREEDY).equal(expected)
    assert model.generate(input_ids=encoding, **GREEDY).equal(expected)
    mask = torch.ones_like(encoding["input_ids"])
    assert model.generate(inputs=encoding, attention_mask=mask, **GREEDY).equal(expected)
    *_, last = model.stream_generate(encoding, **GREEDY)
    assert last.equal(expected)
    *_, last = model.stream_generate(input_ids=encoding, **GREEDY)
    assert last.equal(expected)
    batch = tokenizer(["你好", "a longer text"], padding=True, return_tensors="pt")
    assert model.generate(batch, **GREEDY).equal(model.generate(**batch, **GREEDY))
    with pytest.raises(ValueError, match="tensor of at least one id.*dict"):
        model.generate({"attention_mask": mask}, **GREEDY)


def test_process_response(name: str, pair: Pair) -> None:
    model, _ = pair
    # ChatGLM-6B and ChatGLM2: text to text.
    assert model.process_response(" 现在是[[训练时间]] ") == "现在是2023年"
    # ChatGLM3 and GLM-4: with the history that ends with the question.
    history = [{"role": "user", "content": "你好"}]
    kept = copy.deepcopy(history)
    content, new_history = model.process_response("\n 你好！", history)
    assert content == "你好！" and history == kept
    assert model.chat_format.normalize_messages(new_history)[-1]["content"] == "你好！"
    if not RECORDED[name].has_roles:
        return
    assert new_history == [*history, {"role": "assistant", "metadata": "", "content": "你好！"}]
    history = [{"role": "system", "content": "", "tools": [{"name": "track"}]}, *history]
    call = {"chatglm3": "track\n```python\ntool_call(symbol='10111')\n```", "glm4": 'track\n{"symbol": "10111"}'}[name]
    content, new_history = model.process_response(call, history)
    assert content == {"name": "track", "parameters": {"symbol": "10111"}}
    assert new_history[-1]["metadata"] == "track" and len(new_history) == 3


def test_build_inputs(pair: Pair) -> None:
    model, tokenizer = pair
    history = [("你好", "你好！")]
    expected = tokenizer.build_chat_input("再见", history)
    for build in (model.build_inputs, model.build_stream_inputs):
        inputs = build(tokenizer, "再见", history)
        assert inputs["input_ids"].equal(expected["input_ids"]) and inputs["input_ids"].device == model.device
        assert build(tokenizer, "再见", history=history).keys() == inputs.keys()
    *_, (ids, cache) = model.stream_generate(**inputs, return_past_key_values=True, **GREEDY)
    assert ids.equal(model.generate(**inputs, **GREEDY)) and cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_published_masks_and_positions(name: str, case_model: Named, case: Named) -> None:
    model, tensors = case_model(name), case(name).tensors
    ids = tensors["single.input_ids"]
    for base in (model, model.transformer):
        assert base.get_position_ids(ids, device=ids.device).equal(tensors["single.position_ids"])
        masks = base.get_masks(ids, past_key_values=None, padding_mask=None)
        assert masks.dtype == torch.bool and masks.shape == (1, 1, ids.shape[1], ids.shape[1])
        assert base.get_masks(ids, ids.device).equal(masks)
    if RECORDED[name].is_causal:
        assert model.get_position_ids(ids, ids.device).equal(tensors["single.position_ids"])
        assert masks[0, 0].equal(torch.ones_like(masks[0, 0]).triu(1))
    else:
        assert masks.equal(tensors["single.attention_mask"])
        mask_positions = [ids[0].tolist().index(model.config.gmask_token_id)]
        positions = model.get_position_ids(ids, mask_positions, ids.device, use_gmasks=[True])
        assert positions.equal(tensors["single.position_ids"])
    with torch.no_grad():
        logits = model(ids, full_attention_mask=masks).logits
        hidden = model.transformer(input_ids=ids, full_attention_mask=masks)[0]
    assert (logits - tensors["single.logits"]).abs().max() < 1e-4
    assert model.transformer.output_layer(hidden).allclose(logits, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CAUSAL_CASES if not RECORDED[name].is_quantized])
def test_a_published_mask_of_padded_rows_and_of_a_cache(name: str, case_model: Named, case: Named) -> None:
    model, tensors = case_model(name), case(name).tensors
    ids, padding = tensors["batch.input_ids"], tensors["batch.attention_mask"]
    masks = model.get_masks(ids, None, padding_mask=padding)
    row, column = int(padding.sum(-1).argmin()), 0
    assert padding[row, column] == 0
    # Real tokens see no padding; padding sees everything, as published.
    assert masks[row, 0, padding[row].bool(), column].all() and not masks[row, 0, column].any()
    with torch.no_grad():
        whole = model(ids, full_attention_mask=masks, position_ids=tensors["batch.position_ids"])
        begun = model(ids[:, :-3], attention_mask=padding[:, :-3], use_cache=True)
        later = model.get_masks(ids[:, -3:], begun.past_key_values, padding_mask=padding)
        assert later.shape == (len(ids), 1, 3, ids.shape[1])
        ended = model(
            ids[:, -3:],
            past_key_values=begun.past_key_values,
            full_attention_mask=later,
            position_ids=tensors["batch.position_ids"][:, -3:],
        )
    expected = tensors["batch.logits"]
    kept = min(expected.shape[1], int(padding.sum(-1).min()))
    assert (whole.logits[:, -kept:] - expected[:, -kept:]).abs().max() < 1e-4
    assert (ended.logits - whole.logits[:, -3:]).abs().max() < 1e-4


@every_generation
def test_a_prefix_in_the_published_form(version: str, make: ModelMaker) -> None:
    model = make(version, pre_seq_len=5)
    config = model.config
    prompt = model.transformer.get_prompt(3, model.device, dtype=torch.float32)
    sizes = (2, 5, 3, config.num_key_value_heads, config.head_dim)
    assert [tuple(layer.shape) for layer in prompt] == [sizes] * config.num_hidden_layers
    assert model.transformer.get_prompt(1, "cpu")[0].dtype == torch.float16
    assert model.transformer.pre_seq_len == 5
    cache = model(torch.full((3, 4), 7), use_cache=True).past_key_values
    for states, layer in zip(prompt, cache.layers):
        assert states[0].permute(1, 2, 0, 3).equal(layer.keys[:, :, :5])
        assert states[1].permute(1, 2, 0, 3).equal(layer.values[:, :, :5])
    assert model.get_masks(torch.full((3, 4), 7), prompt).shape == (3, 1, 4, 9)
    plain = make(version)
    assert plain.transformer.pre_seq_len is None
    with pytest.raises(ValueError, match="no prefix"):
        plain.transformer.get_prompt(1, "cpu")


@every_generation
def test_small_published_names(version: str, make: ModelMaker) -> None:
    model = make(version)
    assert model.max_sequence_length == model.transformer.max_sequence_length == 256
    ids = torch.full((2, 5), 7)
    with torch.no_grad():
        last = model(ids, return_last_logit=True).logits
        assert last.equal(model(ids, logits_to_keep=1).logits) and last.shape[1] == 1
    embedding = model.get_input_embeddings()
    assert embedding is model.transformer.embedding.word_embeddings
    model.set_input_embeddings(copy.deepcopy(embedding))
    assert model.transformer.embedding.word_embeddings is not embedding


@every_generation
def test_quantize_with_published_arguments(version: str, make: ModelMaker) -> None:
    model = make(version)
    expected = logits_of(model)
    assert not model.quantized
    assert model.quantize(0) is model and not model.quantized and logits_of(model).equal(expected)
    with pytest.raises(TypeError, match="'nonsense'"):
        model.quantize(4, nonsense=1)
    missing = "xpu:7" if not torch.xpu.is_available() else "cuda:7"
    with pytest.raises(ValueError, match=f"`device='{missing}'`"):
        model.quantize(4, device=missing)
    assert not model.quantized and logits_of(model).equal(expected)
    quantized = logits_of(copy.deepcopy(model).quantize(4))
    asked = model.quantize(bits=4, device="cpu", empty_init=False, use_quantization_cache=True)
    assert asked is model and model.quantized and logits_of(model).equal(quantized)
    # As the README of every generation chains it, on a processor.
    chained = make(version).half().quantize(4).float().to("cpu").eval()
    assert chained.quantized and chained.dtype == torch.float32 and logits_of(chained).isfinite().all()


@every_generation_case
def test_load_in_bits(name: str, case_folder: Named, caplog: pytest.LogCaptureFixture) -> None:
    folder = case_folder(name)
    for bits in (8, 4):
        argument = f"load_in_{bits}bit"
        loaded = AutoModel.from_pretrained(folder, trust_remote_code=True, **{argument: True})
        assert loaded.config.quantization_bit == bits and loaded.quantized
        assert sum(argument in record.getMessage() for record in caplog.records) == 1
    caplog.clear()
    plain = AutoModel.from_pretrained(
        folder, trust_remote_code=True, load_in_8bit=False, load_in_4bit=False, device="cpu", empty_init=False
    )
    assert not plain.quantized and plain.device.type == "cpu" and not caplog.records
    with pytest.raises(ValueError, match="Give one of"):
        AutoModel.from_pretrained(folder, trust_remote_code=True, load_in_8bit=True, load_in_4bit=True)


def test_a_quantized_folder_quantized_once_more(case_folder: Named) -> None:
    folder = case_folder("chatglm2-int4")
    for settings in ({}, {"load_in_4bit": True}):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, **settings)
        layers = quantized_layers(model)
        assert layers and quantized_layers(model.quantize(4)) == layers
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize(8)
    with pytest.raises(ValueError, match="quantized already"):
        AutoModel.from_pretrained(folder, trust_remote_code=True, load_in_8bit=True)
