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
"""Settings of `chat` in every form that they come in: what counts, what is refused, and that nothing is warned about."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging


GREEDY = {"do_sample": False, "max_new_tokens": 8}
REPOSITORY = Path(__file__).resolve().parent.parent

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture
def make_pair(case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]) -> Callable[[str], Pair]:
    """A model whose configuration a test may change, and its tokenizer."""

    def make(name: str) -> Pair:
        model = copy.copy(case_model(name))
        model.generation_config = copy.deepcopy(model.generation_config)
        return model, case_tokenizer(name)

    return make


@pytest.fixture
def pair(make_pair: Callable[[str], Pair]) -> Pair:
    return make_pair("chatglm3")


class Force(LogitsProcessor):
    """Makes each row say given ids, one after the other."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = torch.full_like(scores, -1e9)
        for row, ids in enumerate(self.rows):
            scores[row, ids[min(self.step, len(ids) - 1)]] = 0.0
        self.step += 1
        return scores


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The `max_length` of every generation from now on."""
    seen: list[int] = []
    original = GenerationMixin._validate_generated_length

    def note(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(generation_config.max_length)
        original(self, generation_config, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_validate_generated_length", note)
    return seen


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What the library and Python warned about."""
    logging.enable_propagation()
    logger = logging.get_logger("transformers")
    level = logger.level
    logger.setLevel("WARNING")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught] + [record.getMessage() for record in caplog.records]
    logger.setLevel(level)
    logging.disable_propagation()


@pytest.mark.parametrize("has_stop_ids", [True, False])
@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_what_follows_a_stop_string_is_no_part_of_the_answer(
    make_pair: Callable[[str], Pair], name: str, has_stop_ids: bool
) -> None:
    model, tokenizer = make_pair(name)
    end = ids_of(tokenizer, "!")[-1]
    first, second = ids_of(tokenizer, "one two"), ids_of(tokenizer, "a b c d e f g h i j k")
    settings = {
        "logits_processor": LogitsProcessorList([Force([first, [*second, end]])]),
        "stop_strings": ["two"],
        "eos_token_id": end if has_stop_ids else None,
        "do_sample": False,
        "max_new_tokens": len(second) + has_stop_ids,
    }
    responses, histories = model.batch_chat(tokenizer, ["x", "y"], **settings)
    assert [response.strip() for response in responses] == ["one two", "a b c d e f g h i j k"]
    for response, history in zip(responses, histories):
        last = history[-1][1] if isinstance(history[-1], tuple) else history[-1]["content"]
        assert last == response


@pytest.mark.parametrize(
    "value", [9, (9, 10), [9, 10], {9}, np.int64(9), np.array([9, 10]), torch.tensor(9), torch.tensor([9, 10])]
)
def test_stop_ids_in_every_form(pair: Pair, value: Any) -> None:
    model, tokenizer = pair
    expected = ids_of(tokenizer, "one two")
    assert not {9, 10} & set(expected)
    prompt = tokenizer.build_chat_input("x")["input_ids"]

    def forced() -> dict[str, Any]:
        processors = LogitsProcessorList([Force([[*expected, 9, 9]])])
        return {"logits_processor": processors, "do_sample": False, "max_new_tokens": 12}

    config = GenerationConfig(eos_token_id=value, do_sample=False, max_new_tokens=12)
    for settings in ({"eos_token_id": value, **forced()}, {**forced(), "generation_config": config}):
        assert model.chat(tokenizer, "x", **settings)[0] == "one two"
        settings["logits_processor"] = forced()["logits_processor"]
        assert list(model.stream_chat(tokenizer, "x", **settings))[-1][0] == "one two"
        settings["logits_processor"] = forced()["logits_processor"]
        assert model.batch_chat(tokenizer, ["x"], **settings)[0] == ["one two"]
    output = model.generate(prompt, eos_token_id=value, **forced())
    assert output[0, prompt.shape[1] :].tolist() == [*expected, 9]
    *_, output = model.stream_generate(prompt, eos_token_id=value, **forced())
    assert output[0, prompt.shape[1] :].tolist() == [*expected, 9]


@pytest.mark.parametrize("value", ["</s>", 2.5, [None], object()])
def test_what_is_no_stop_id_is_named(pair: Pair, value: Any) -> None:
    model, tokenizer = pair
    with pytest.raises(TypeError, match="eos_token_id.*must be an id"):
        model.chat(tokenizer, "x", eos_token_id=value)


def test_no_length_is_the_default(pair: Pair, limits: list[int]) -> None:
    model, tokenizer = pair
    expected = model.chat(tokenizer, "你好", do_sample=False, eos_token_id=list(range(500)))
    settings = {"do_sample": False, "max_length": None, "max_new_tokens": None, "eos_token_id": list(range(500))}
    assert model.chat(tokenizer, "你好", **settings) == expected
    assert list(model.stream_chat(tokenizer, "你好", **settings))[-1] == expected
    assert model.batch_chat(tokenizer, ["你好"], **settings)[0] == [expected[0]]
    assert limits == [model.config.max_position_embeddings] * 4
    ids = torch.tensor([[5, 6]])
    plain = model.generate(ids, do_sample=False)
    assert torch.equal(model.generate(ids, do_sample=False, max_length=None), plain)
    assert torch.equal(list(model.stream_generate(ids, do_sample=False, max_length=None))[-1], plain)


@pytest.mark.parametrize("ids", [torch.zeros((1, 0), dtype=torch.long), torch.tensor([5, 6]), [[5, 6]], "你好"])
def test_a_prompt_of_no_or_another_kind_of_ids_is_named(pair: Pair, ids: Any) -> None:
    model, _ = pair
    for method in (model.generate, model.stream_generate):
        with pytest.raises(ValueError, match="tensor of at least one id"):
            method(ids, **GREEDY)


def answer_at_random(self: Any, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
    logits = torch.zeros(input_ids.shape[0], 1, self.config.vocab_size)
    return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_a_prompt_that_the_published_length_has_no_room_for(
    make_pair: Callable[[str], Pair], name: str, monkeypatch: pytest.MonkeyPatch, limits: list[int]
) -> None:
    model, tokenizer = make_pair(name)
    published = {"chatglm1": 2048, "chatglm2": 8192, "chatglm3": None, "glm4": 8192}[name]
    monkeypatch.setattr(model.config, "max_position_embeddings", 40000)
    monkeypatch.setattr(type(model), "forward", answer_at_random)
    for extra, expected in ((-1, published), (0, 40000), (1, 40000)):
        length = (published or 8192) + extra
        monkeypatch.setattr(type(tokenizer), "encode_conversation", lambda *_, ids=[5] * length, **__: ids)
        limits.clear()
        model.chat(tokenizer, "x", eos_token_id=list(range(500)))
        list(model.stream_chat(tokenizer, "x", eos_token_id=list(range(500))))
        model.batch_chat(tokenizer, ["x"], eos_token_id=list(range(500)))
        assert limits == [expected or 40000] * 3
        # What the caller says counts.
        model.chat(tokenizer, "x", eos_token_id=list(range(500)), max_new_tokens=3)
        model.chat(tokenizer, "x", eos_token_id=list(range(500)), max_length=39000)
        assert limits[3:] == [length + 3, 39000]
        with pytest.raises(ValueError, match="max_length"):
            model.chat(tokenizer, "x", max_length=100)


def test_the_file_of_the_repository_limits_nothing() -> None:
    assert GenerationConfig.from_pretrained(REPOSITORY).max_length is None


@pytest.mark.floor
@pytest.mark.parametrize("limit", [None, 8192])
def test_nothing_is_warned_about(pair: Pair, messages: Callable[[], list[str]], limit: int | None) -> None:
    """`limit` stands in the generation_config.json of published folders, and stood in ours."""
    model, tokenizer = pair
    model.generation_config = GenerationConfig.from_pretrained(REPOSITORY, max_length=limit)
    stops = list(range(500))
    for settings in (
        {"max_new_tokens": 3},
        {"max_length": 100},
        {},
        {"max_new_tokens": 3, "temperature": 0},
        {"max_new_tokens": 3, "do_sample": False},
        {"generation_config": GenerationConfig(max_new_tokens=3)},
        {"generation_config": GenerationConfig(max_length=100)},
        {"generation_config": GenerationConfig(do_sample=False, max_new_tokens=3)},
        {"generation_config": GenerationConfig(do_sample=True, temperature=0.5)},
        {"generation_config": GenerationConfig(max_length=100), "max_new_tokens": 3},
        {"generation_config": GenerationConfig(max_new_tokens=3), "max_length": 100, "temperature": 0},
    ):
        settings = {"eos_token_id": stops, **settings}
        model.chat(tokenizer, "你好", **settings)
        list(model.stream_chat(tokenizer, "你好", **settings))
        model.batch_chat(tokenizer, ["你好", "a longer message"], **settings)
        assert messages() == [], settings
    if limit is None:
        ids = torch.tensor([[5, 6]])
        model.generate(ids, max_new_tokens=3)
        list(model.stream_generate(ids, max_new_tokens=3))
        assert messages() == []


def test_the_limit_of_the_caller_counts(pair: Pair, limits: list[int]) -> None:
    model, tokenizer = pair
    model.generation_config = GenerationConfig(max_length=7, max_new_tokens=5)
    length, stops = len(tokenizer.build_chat_input("你好")["input_ids"][0]), list(range(500))
    for settings, expected in (
        ({"max_new_tokens": 3}, length + 3),
        ({"max_length": 100}, 100),
        ({}, model.config.max_position_embeddings),
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, length + 3),
        ({"generation_config": GenerationConfig(max_new_tokens=3), "max_length": 100}, 100),
        ({"generation_config": GenerationConfig(max_length=100), "max_new_tokens": 3}, length + 3),
        ({"generation_config": GenerationConfig(max_length=100)}, 100),
        (
            {"generation_config": GenerationConfig(do_sample=True, temperature=0.5)},
            model.config.max_position_embeddings,
        ),
    ):
        limits.clear()
        model.chat(tokenizer, "你好", eos_token_id=stops, **settings)
        assert limits == [expected], settings


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_beams_and_several_sequences_are_refused_wherever_they_are_asked_for(pair: Pair, where: str) -> None:
    model, tokenizer = pair

    def settings(**values: Any) -> dict[str, Any]:
        model.generation_config = GenerationConfig(**values) if where == "model" else GenerationConfig()
        return {"config": {"generation_config": GenerationConfig(**values)}, "argument": values, "model": {}}[where]

    *_, cache = model.chat(tokenizer, "a", return_past_key_values=True, **GREEDY)
    given = settings(num_beams=2)
    for cached in ({"return_past_key_values": True}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="beams"):
            model.chat(tokenizer, "a", **cached, **given)
    with pytest.raises(ValueError, match="num_beams=2"):
        model.stream_chat(tokenizer, "a", **given)
    with pytest.raises(ValueError, match="num_beams=2"):
        model.stream_generate(torch.tensor([[5, 6]]), **given)
    assert model.chat(tokenizer, "a", max_new_tokens=3, **given)[0]
    given = settings(num_return_sequences=2, do_sample=True)
    for method, query in ((model.chat, "a"), (model.stream_chat, "a"), (model.batch_chat, ["a", "b"])):
        with pytest.raises(ValueError, match="num_return_sequences"):
            method(tokenizer, query, **given)


def test_other_kinds_of_configuration_are_named(pair: Pair) -> None:
    model, tokenizer = pair
    with pytest.raises(TypeError, match="GenerationConfig, got dict"):
        model.chat(tokenizer, "a", generation_config={"max_new_tokens": 3})
