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
"""`chat` and its relatives: the same answer by every way of asking for it, and clear errors."""

import copy
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)


GREEDY = {"do_sample": False, "max_new_tokens": 24}

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module", params=GENERATION_CASES)
def pair(
    request: pytest.FixtureRequest, case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]
) -> Pair:
    return case_model(request.param), case_tokenizer(request.param)


@pytest.fixture(scope="module")
def chatglm3(case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]) -> Pair:
    return case_model("chatglm3"), case_tokenizer("chatglm3")


@pytest.fixture(scope="module")
def chatglm2(case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]) -> Pair:
    return case_model("chatglm2"), case_tokenizer("chatglm2")


class Force(LogitsProcessor):
    """Makes a model say given ids, one after the other, whatever the prompt is."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = list(ids)
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = torch.full_like(scores, -1e9)
        scores[:, self.ids[self.step]] = 0.0
        self.step += 1
        return scores


def saying(tokenizer: PreTrainedTokenizerBase, text: str, end: str) -> dict[str, Any]:
    """Arguments that make `chat` answer `text`."""
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.convert_tokens_to_ids(end)]
    return {"logits_processor": LogitsProcessorList([Force(ids)]), "do_sample": False, "max_length": 4096}


@pytest.mark.floor
def test_last_yield_equals_chat(pair: Pair) -> None:
    model, tokenizer = pair
    history = None
    for query in ("你好", "What is 1+1?", ""):
        expected = model.chat(tokenizer, query, history=history, **GREEDY)
        yielded = list(model.stream_chat(tokenizer, query, history=history, **GREEDY))
        assert yielded[-1] == expected
        assert all(isinstance(response, str) and response for response, _ in yielded[:-1])
        history = expected[1]


def test_every_token_is_yielded(chatglm2: Pair) -> None:
    model, tokenizer = chatglm2
    text = "one two three"
    yielded = [response for response, _ in model.stream_chat(tokenizer, "x", **saying(tokenizer, text, "</s>"))]
    assert yielded[-1] == text
    assert len(yielded) >= len(tokenizer.tokenize(text))
    assert all(text.startswith(response) for response in yielded)


def test_half_a_character_is_held_back(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    text = "\n好𝄞"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) >= 6, "the character has to be spelt in bytes"
    yielded = [response for response, _ in model.stream_chat(tokenizer, "x", **saying(tokenizer, text, "</s>"))]
    assert yielded[-1] == "好𝄞"
    assert not any("\ufffd" in response for response in yielded)
    # Cut off in the middle of a character, the last yield is what `chat` returns all the same.
    cut = {"max_length": None, "max_new_tokens": len(ids) - 1}
    expected = model.chat(tokenizer, "x", **saying(tokenizer, text, "</s>") | cut)
    yielded = list(model.stream_chat(tokenizer, "x", **saying(tokenizer, text, "</s>") | cut))
    assert expected[0].endswith("\ufffd")
    assert yielded[-1] == expected


@pytest.mark.floor
def test_reused_cache_changes_nothing(pair: Pair) -> None:
    model, tokenizer = pair
    history, cache = None, None
    for turn, query in enumerate(("你好", "tell me more", "再见")):
        expected = model.chat(tokenizer, query, history=history, **GREEDY)
        held = cache.get_seq_length() if cache is not None else 0
        *answer, cache = model.chat(
            tokenizer, query, history=history, past_key_values=cache, return_past_key_values=True, **GREEDY
        )
        assert tuple(answer) == expected
        assert cache.get_seq_length() == len(cache.token_ids) > held
        history = expected[1]


def test_reused_cache_is_used(chatglm3: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = chatglm3
    # An answer that is encoded again as it was generated, so that the whole of the first turn can be kept.
    ids = [*tokenizer.build_single_message("assistant", "", "我是")[1:], tokenizer.get_command("<|user|>")]
    settings = {"logits_processor": LogitsProcessorList([Force(ids)]), "do_sample": False}
    first = model.chat(tokenizer, "你好", return_past_key_values=True, **settings)
    fed = []
    forward = type(model).forward

    @wraps(forward)
    def spy(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        fed.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    whole = len(tokenizer.build_chat_input("再见", history=first[1])["input_ids"][0])
    kept = len(first[2].token_ids)
    model.chat(tokenizer, "再见", history=first[1], past_key_values=first[2], **GREEDY)
    assert fed[0] == whole - kept
    assert kept > 5
    assert set(fed[1:]) == {1}


def test_cache_of_another_conversation_changes_nothing(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    *_, cache = model.chat(tokenizer, "something else", return_past_key_values=True, **GREEDY)
    expected = model.chat(tokenizer, "你好", **GREEDY)
    assert model.chat(tokenizer, "你好", past_key_values=cache, **GREEDY) == expected
    # Also when it holds more than the whole prompt.
    longer = model.chat(tokenizer, "你好", past_key_values=cache, return_past_key_values=True, **GREEDY)
    assert model.chat(tokenizer, "你好", past_key_values=longer[2], **GREEDY) == expected


def test_stream_returns_a_cache_that_the_next_turn_can_use(pair: Pair) -> None:
    model, tokenizer = pair
    for _, history, cache in model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY):
        pass
    assert cache.get_seq_length() == len(cache.token_ids)
    expected = model.chat(tokenizer, "再见", history=history, **GREEDY)
    *_, last = model.stream_chat(tokenizer, "再见", history=history, past_key_values=cache, **GREEDY)
    assert last == expected
    # A stream that was closed early leaves a cache that can be used as well, though it may be ahead of what was shown.
    stream = model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    _, _, cache = next(stream)
    stream.close()
    assert cache.get_seq_length() >= len(cache.token_ids) > 0
    assert model.chat(tokenizer, "再见", history=history, past_key_values=cache, **GREEDY) == expected


def test_foreign_cache_is_refused(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    for cache in (DynamicCache(), ((torch.zeros(1), torch.zeros(1)),)):
        with pytest.raises(TypeError, match=type(cache).__name__):
            model.chat(tokenizer, "你好", past_key_values=cache, **GREEDY)


def test_closing_a_stream_stops_the_work(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    before = threading.active_count()
    stream = model.stream_chat(tokenizer, "你好", do_sample=False, max_new_tokens=8000)
    next(stream)
    assert threading.active_count() == before + 1
    start = time.monotonic()
    stream.close()
    assert threading.active_count() == before
    assert time.monotonic() - start < 5


def test_errors_inside_a_stream_reach_the_caller(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    before = threading.active_count()
    with pytest.raises(IndexError):
        list(
            model.stream_chat(tokenizer, "你好", logits_processor=LogitsProcessorList([Force([9])]), max_new_tokens=2)
        )
    assert threading.active_count() == before


def test_threads_chat_at_the_same_time(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    queries = ["你好", "hello", "1+1=?", "再见", "who are you?", "天气", "a", "b"]
    expected = [model.chat(tokenizer, query, **GREEDY) for query in queries]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda query: model.chat(tokenizer, query, **GREEDY), queries)) == expected
        streams = threads.map(lambda query: list(model.stream_chat(tokenizer, query, **GREEDY))[-1], queries)
        assert list(streams) == expected


@pytest.mark.floor
def test_batch_equals_one_by_one(pair: Pair) -> None:
    model, tokenizer = pair
    queries = ["你好", "a much longer question than the other ones, with many words in it", ""]
    histories = [None, [("one", "two")], [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]
    responses, new_histories = model.batch_chat(tokenizer, queries, histories, **GREEDY)
    for query, history, *answer in zip(queries, histories, responses, new_histories):
        assert tuple(answer) == model.chat(tokenizer, query, history=history, **GREEDY)
    assert model.batch_chat(tokenizer, queries[:1], **GREEDY)[0] == [model.chat(tokenizer, queries[0], **GREEDY)[0]]
    with pytest.raises(ValueError, match="2 queries but 1 histories"):
        model.batch_chat(tokenizer, ["a", "b"], [None])
    for queries in ("a", []):
        with pytest.raises(ValueError, match="list of at least one"):
            model.batch_chat(tokenizer, queries)


def test_histories_in_either_form_give_one_answer_in_the_native_form(pair: Pair) -> None:
    model, tokenizer = pair
    pairs = [("你好", "我是"), ("a", "b")]
    dicts = [
        {"role": role, "content": text}
        for turn in pairs
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    lists = [list(turn) for turn in pairs]
    answers = []
    for history in (pairs, dicts, lists):
        before = copy.deepcopy(history)
        answers.append(model.chat(tokenizer, "再见", history=history, **GREEDY))
        assert history == before
    response, history = answers[0]
    assert [answer[0] for answer in answers] == [response] * 3
    if model.config.model_version in ("chatglm", "chatglm2"):
        assert history == [*pairs, ("再见", response)]
    else:
        texts = ["你好", "我是", "a", "b", "再见", response]
        for _, history in answers:
            assert [message["role"] for message in history] == ["user", "assistant"] * 3
            assert [message["content"] for message in history] == texts
            assert history[-1]["metadata"] == ""


TOOLS = [{"name": "weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}]
SYSTEM = {"role": "system", "content": "Answer.", "tools": TOOLS}


@pytest.mark.floor
def test_tool_call_is_parsed_and_never_executed(chatglm3: Pair, tmp_path: Path) -> None:
    model, tokenizer = chatglm3
    call = "weather\n ```python\ntool_call(city='北京', days=[1, 2])\n```"
    response, history = model.chat(tokenizer, "天气?", history=[SYSTEM], **saying(tokenizer, call, "<|observation|>"))
    assert response == {"name": "weather", "parameters": {"city": "北京", "days": [1, 2]}}
    assert history[-1]["metadata"] == "weather"
    # The observation goes back with its own role, and the history it returned is accepted.
    response, history = model.chat(
        tokenizer, "晴", history=history, role="observation", **saying(tokenizer, "\n晴天", "<|user|>")
    )
    assert response == "晴天"
    assert [message["role"] for message in history] == ["system", "user", "assistant", "observation", "assistant"]

    evidence = tmp_path / "evidence"
    for text in (
        f"weather\n```python\ntool_call(x=open({str(evidence)!r}, 'w'))\n```",
        f"weather\n```python\n__import__('pathlib').Path({str(evidence)!r}).touch()\n```",
        "weather\n```python\ntool_call(**{'a': 1})\n```",
        "weather\ntool_call(",
        "weather",
        "\n",
    ):
        for history in ([SYSTEM], None):
            response, _ = model.chat(tokenizer, "?", history=history, **saying(tokenizer, text, "</s>"))
            assert isinstance(response, (str, dict))
    assert not evidence.exists()


def test_code_for_a_built_in_tool_is_content_and_never_executed(
    case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any], tmp_path: Path
) -> None:
    model, tokenizer = case_model("glm4"), case_tokenizer("glm4")
    code = f"open({str(tmp_path / 'evidence')!r}, 'w')"
    history = [{"role": "system", "content": "s", "tools": [{"type": "python"}]}]
    answer = (f"python\n{code}", "<|observation|>")
    *_, streamed = model.stream_chat(tokenizer, "算", history=history, **saying(tokenizer, *answer))
    response, history = model.chat(tokenizer, "算", history=history, **saying(tokenizer, *answer))
    assert response == {"name": "python", "content": code}
    assert streamed == (response, history)
    options = saying(tokenizer, "\n2", "<|user|>")
    response, history = model.chat(tokenizer, "2", history=history, role="observation", **options)
    assert response == "2"
    assert [message["role"] for message in history] == ["system", "user", "assistant", "observation", "assistant"]
    assert not list(tmp_path.iterdir())


def test_only_stop_tokens_are_dropped(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    for end in ("</s>", "<|user|>", "<|observation|>"):
        response, _ = model.chat(tokenizer, "x", **saying(tokenizer, "\nfine", end))
        assert response == "fine"
    ids = tokenizer.encode("\nabc def", add_special_tokens=False)
    whole = model.chat(
        tokenizer, "x", **saying(tokenizer, "\nabc def", "</s>") | {"max_length": None, "max_new_tokens": len(ids)}
    )
    assert whole[0] == "abc def"


def test_length_limits(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    prompt = len(tokenizer.build_chat_input("你好")["input_ids"][0])
    never_end = {"do_sample": False, "eos_token_id": 9}
    for limits, expected in (({"max_length": prompt + 3}, 3), ({"max_new_tokens": 5}, 5)):
        steps = list(model.stream_generate(tokenizer.build_chat_input("你好")["input_ids"], **never_end, **limits))
        assert len(steps) == expected
        *_, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **never_end, **limits)
        assert cache.get_seq_length() == prompt + expected - 1


def test_temperature_zero_is_greedy(pair: Pair) -> None:
    model, tokenizer = pair
    expected = model.chat(tokenizer, "你好", **GREEDY)
    inputs = tokenizer("你好", return_tensors="pt")
    for settings in ({"temperature": 0}, {"temperature": 0.0, "do_sample": True, "top_p": 0.5}):
        assert model.chat(tokenizer, "你好", max_new_tokens=24, **settings) == expected
        assert list(model.stream_chat(tokenizer, "你好", max_new_tokens=24, **settings))[-1] == expected
        assert model.batch_chat(tokenizer, ["你好"], max_new_tokens=24, **settings)[0] == [expected[0]]
        greedy = model.generate(**inputs, **GREEDY)
        assert torch.equal(list(model.stream_generate(**inputs, max_new_tokens=24, **settings))[-1], greedy)
    torch.manual_seed(3)
    sampled = {model.chat(tokenizer, "你好", max_new_tokens=24, temperature=1.5)[0] for _ in range(4)}
    assert len(sampled) > 1


def test_a_generation_config_is_taken_at_its_word(chatglm3: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = chatglm3
    expected = model.chat(tokenizer, "你好", **GREEDY)
    given = GenerationConfig(do_sample=False, max_new_tokens=24)
    before = given.to_dict()
    for _ in range(2):
        assert model.chat(tokenizer, "你好", generation_config=given) == expected
        assert list(model.stream_chat(tokenizer, "你好", generation_config=given))[-1] == expected
    assert given.to_dict() == before
    # What the checkpoint's own file says does not shorten what the caller asked for, nor change what `chat` gets back.
    prompt = len(tokenizer.build_chat_input("你好")["input_ids"][0])
    monkeypatch.setattr(model.generation_config, "max_new_tokens", 3)
    monkeypatch.setattr(model.generation_config, "return_dict_in_generate", True)
    assert model.chat(tokenizer, "你好", do_sample=False, max_length=prompt + 24) == expected


def test_drafted_tokens_stream_too(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    query = "one two three four one two three four one two"
    expected = list(model.stream_chat(tokenizer, query, **GREEDY))
    assert list(model.stream_chat(tokenizer, query, prompt_lookup_num_tokens=3, **GREEDY)) == expected


def test_no_stop_tokens_at_all(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    steps = list(model.stream_chat(tokenizer, "你好", do_sample=False, max_new_tokens=9, eos_token_id=None))
    assert steps[-1] == model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=9, eos_token_id=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"streamer": 1}, "streamer"),
    ],
)
def test_what_cannot_be_streamed_is_refused(chatglm3: Pair, settings: dict[str, Any], message: str) -> None:
    model, tokenizer = chatglm3
    with pytest.raises(ValueError, match=message):
        list(model.stream_chat(tokenizer, "你好", max_new_tokens=4, **settings))
    with pytest.raises(ValueError, match=message):
        list(model.stream_generate(torch.tensor([[5, 6]]), max_new_tokens=4, **settings))


def test_what_one_conversation_cannot_have_is_refused(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.batch_chat(tokenizer, ["a", "b"], num_beams=2, num_return_sequences=2, **GREEDY)
    with pytest.raises(ValueError, match="beams"):
        model.chat(tokenizer, "a", num_beams=2, return_past_key_values=True, **GREEDY)
    for name in ("past_key_values", "return_past_key_values"):
        with pytest.raises(ValueError, match=name):
            model.batch_chat(tokenizer, ["a", "b"], **{name: True}, **GREEDY)
    stream = model.stream_chat(tokenizer, "a", return_past_key_values=True, **GREEDY)
    cache = next(stream)[2]
    with pytest.raises(ValueError, match="has not ended"):
        model.chat(tokenizer, "a", past_key_values=cache, **GREEDY)
    stream.close()
    assert model.chat(tokenizer, "a", past_key_values=cache, **GREEDY) == model.chat(tokenizer, "a", **GREEDY)


def test_chat_with_an_offloaded_embedding(case_folder: Callable[[str], Path], chatglm3: Pair, tmp_path: Path) -> None:
    model, tokenizer = chatglm3
    devices = {"transformer": "cpu", "transformer.embedding": "disk"}
    devices |= {f"transformer.{name}": "cpu" for name in ("rotary_pos_emb", "encoder", "output_layer")}
    del devices["transformer"]
    split = AutoModelForCausalLM.from_pretrained(
        case_folder("chatglm3"),
        trust_remote_code=True,
        device_map=devices,
        offload_folder=tmp_path,
        dtype=torch.float32,
    )
    assert split.device.type == "meta"
    expected = model.chat(tokenizer, "你好", **GREEDY)
    assert split.chat(tokenizer, "你好", **GREEDY) == expected
    assert list(split.stream_chat(tokenizer, "你好", **GREEDY))[-1] == expected
    assert split.batch_chat(tokenizer, ["你好"], **GREEDY)[0] == [expected[0]]


def test_published_client_code_runs(chatglm3: Pair, chatglm2: Pair) -> None:
    """The calls that programs written for the published code make, in their form."""
    model, tokenizer = chatglm3
    model = model.eval()
    past_key_values, history = None, []
    for query in ("你好", "再见"):
        current_length = 0
        for response, history, past_key_values in model.stream_chat(
            tokenizer,
            query,
            history=history,
            top_p=1,
            temperature=0.01,
            past_key_values=past_key_values,
            return_past_key_values=True,
            max_new_tokens=20,
        ):
            current_length = max(current_length, len(response))
    assert len(history) == 4

    gen_kwargs = {"max_length": 80, "do_sample": True, "top_p": 0.8, "temperature": 0.8, "num_beams": 1}
    inputs = tokenizer.build_chat_input("你好", history=history, role="user").to(model.device)
    eos_token_id = [
        tokenizer.eos_token_id,
        tokenizer.get_command("<|user|>"),
        tokenizer.get_command("<|observation|>"),
    ]
    gen_kwargs["max_length"] += len(inputs["input_ids"][0])
    for total_ids in model.stream_generate(**inputs, eos_token_id=eos_token_id, **gen_kwargs):
        total_ids = total_ids.tolist()[0]
        output_ids = total_ids[len(inputs["input_ids"][0]) : -1]
        assert isinstance(tokenizer.decode(output_ids), str)
    outputs = model.generate(**inputs, eos_token_id=eos_token_id, **gen_kwargs)
    assert isinstance(tokenizer.decode(outputs.tolist()[0]), str)

    model, tokenizer = chatglm2
    response, history = model.chat(tokenizer, "你好", history=[], max_length=80, top_p=0.7, temperature=0.95)
    assert history == [("你好", response)]
    inputs = tokenizer([tokenizer.build_prompt("你好", history=history)], return_tensors="pt")
    assert model.generate(**inputs, max_length=120).shape[1] <= 120


@pytest.mark.floor
def test_stream_generate_equals_generate(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    inputs = tokenizer(["你好", "a longer text"], padding=True, return_tensors="pt")
    expected = model.generate(**inputs, **GREEDY)
    steps = list(model.stream_generate(**inputs, streamer=None, **GREEDY))
    assert [step.shape[1] for step in steps] == list(range(inputs["input_ids"].shape[1] + 1, expected.shape[1] + 1))
    assert torch.equal(steps[-1], expected)
    for ids, cache in model.stream_generate(**inputs, return_past_key_values=True, **GREEDY):
        pass
    assert cache.get_seq_length() == ids.shape[1] - 1

    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], input_ids.shape[1] >= inputs["input_ids"].shape[1] + 3)

    assert (
        len(list(model.stream_generate(**inputs, stopping_criteria=StoppingCriteriaList([AfterThree()]), **GREEDY)))
        == 3
    )


def test_modes_of_the_calling_thread_hold_in_a_stream(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, ids = tiny_model(), torch.arange(3, 13)[None]
    seen = []
    model.register_forward_hook(
        lambda module, args, output: seen.append((output.logits.dtype, output.logits.is_inference()))
    )
    list(model.stream_generate(ids, max_new_tokens=2, do_sample=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        list(model.stream_generate(ids, max_new_tokens=2, do_sample=False))
    with torch.inference_mode():
        list(model.stream_generate(ids, max_new_tokens=2, do_sample=False))
    expected = [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
    assert seen[::2] == seen[1::2] == expected


def test_stop_strings(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    settings = saying(tokenizer, "\none two three", "</s>")
    response, _ = model.chat(tokenizer, "x", stop_strings=["two"], **settings)
    assert response == "one two"
    settings = saying(tokenizer, "\none two three", "</s>")
    assert list(model.stream_chat(tokenizer, "x", stop_strings=["two"], **settings))[-1][0] == "one two"
    settings = saying(tokenizer, "\none two three", "</s>")
    assert model.batch_chat(tokenizer, ["x"], stop_strings=["two"], **settings)[0] == ["one two"]


def test_an_unk_in_the_prompt_is_not_padding(chatglm3: Pair) -> None:
    model, _ = chatglm3
    ids = torch.tensor([[5, 0, 0, 7, 9, 0, 11]])
    with_mask = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), with_mask)
    assert torch.equal(model.generate(input_ids=ids, **GREEDY), with_mask)


@pytest.mark.floor
def test_bad_prompts_are_refused_before_anything_runs(chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    with pytest.raises(ValueError, match=r"id 512, outside the vocabulary of 512"):
        model.generate(torch.tensor([[5, 512]]))
    with pytest.raises(ValueError, match=r"id -1, outside"):
        model.generate(input_ids=torch.tensor([[5, -1]]))
    too_long = torch.full((1, 8193), 5)
    with pytest.raises(ValueError, match="8193 tokens, more than the 8192 positions"):
        model.generate(too_long)
    with pytest.raises(ValueError, match="more than the 8192 positions"):
        model.chat(tokenizer, "x " * 9000)
    # Never inside forward: interpolation and evaluation beyond the trained length stay possible.
    assert model(too_long[:, :1], position_ids=torch.tensor([[9000]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": 5}, TypeError, "query.*int"),
        ({"query": None}, TypeError, "query.*NoneType"),
        ({"query": "x", "role": "admin"}, ValueError, "admin"),
        ({"query": "x", "history": "hello"}, TypeError, "hello"),
        ({"query": "x", "history": [("a", "b", "c")]}, TypeError, "'c'"),
        ({"query": "x", "history": [{"role": "user"}]}, (TypeError, ValueError), "content"),
        ({"query": "x", "history": [{"role": "system", "content": "", "tools": "x"}]}, TypeError, "tools"),
    ],
)
def test_bad_conversations_are_named_and_change_nothing(
    chatglm3: Pair, arguments: dict[str, Any], error: Any, message: str
) -> None:
    model, tokenizer = chatglm3
    before = copy.deepcopy(arguments)
    for method in (model.chat, lambda *args, **kwargs: next(model.stream_chat(*args, **kwargs))):
        with pytest.raises(error, match=message):
            method(tokenizer, **arguments)
    assert arguments == before


def test_scores_that_are_not_numbers_are_explained(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model().half()
    with torch.no_grad():
        model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight.fill_(60000)
    for do_sample in (False, True):
        with pytest.raises(ValueError, match=r"not numbers.*float16.*bfloat16"):
            model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=do_sample)


def test_text_generation_pipeline(case_folder: Callable[[str], Path], chatglm3: Pair) -> None:
    model, tokenizer = chatglm3
    folder = str(case_folder("chatglm3"))
    generator = pipeline("text-generation", model=folder, trust_remote_code=True, dtype=torch.float32)
    [result] = generator("你好", return_full_text=False, **GREEDY)
    inputs = tokenizer("你好", return_tensors="pt")
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert result["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
    messages = [{"role": "user", "content": "你好"}]
    [result] = generator(messages, **GREEDY)
    assert result["generated_text"][:-1] == messages
    assert result["generated_text"][-1]["role"] == "assistant"


def test_generation_config_of_the_repository_stops_at_all_three_tokens(case_folder: Callable[[str], Path]) -> None:
    # The ids of the published vocabulary: 64789 pieces, five control tokens, four roles.
    repository = Path(__file__).resolve().parent.parent
    assert GenerationConfig.from_pretrained(repository).eos_token_id == [2, 64795, 64797]
    tokenizer = AutoTokenizer.from_pretrained(case_folder("chatglm3"), trust_remote_code=True)
    offset = 64795 - tokenizer.get_command("<|user|>")
    assert tokenizer.get_command("<|observation|>") + offset == 64797
