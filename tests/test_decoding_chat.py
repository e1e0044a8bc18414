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
"""Conversations on a CPU: every way to ask for an answer computes a token by one call, in any number of threads, and what was
interrupted leaves nothing.
"""

import copy
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from generations import TINY, every_generation, every_generation_case
from test_decoding_cpu import SIZES, decode_tokens, next_token
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline


Model = Any
Pair = tuple[Model, PreTrainedTokenizerBase]
NUM_TOKENS = 6
GREEDY = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "eos_token_id": None}


class Interrupt(KeyboardInterrupt):
    """Like Ctrl-C."""


@pytest.fixture
def make_pair(
    chatglm: SimpleNamespace,
    case_model: Callable[[str], PreTrainedModel],
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase],
) -> Callable[[str], Pair]:
    """A case's tokenizer and model, wider and with random weights."""

    def make(name: str) -> Pair:
        config = chatglm.ChatGLMConfig.from_dict({**case_model(name).config.to_dict(), **SIZES})
        return chatglm.ChatGLMForConditionalGeneration(config).bfloat16().eval(), case_tokenizer(name)

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Model], list[bool]]:
    """For each token that the layers of a model were asked for: whether one call gave it."""

    def watch(model: Model) -> list[bool]:
        encoder, found = model.transformer.encoder, list[bool]()
        decode = encoder.decode

        def watched(layers: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            decoded = decode(layers, hidden_states, *args, **kwargs)
            if hidden_states.shape[1] == 1:
                found.append(decoded is not None)
            return decoded

        monkeypatch.setattr(encoder, "decode", watched)
        return found

    return watch


def continue_chat(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    _, history, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    model.chat(tokenizer, "好", history=history, past_key_values=cache, **GREEDY)


def continue_stream(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    *_, (_, history, cache) = model.stream_chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    list(model.stream_chat(tokenizer, "好", history=history, past_key_values=cache, **GREEDY))


def stream_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    list(model.stream_generate(tokenizer("你好", return_tensors="pt"), **GREEDY))


def stop_at_text(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    model.generate(**tokenizer("你好", return_tensors="pt"), tokenizer=tokenizer, stop_strings=["never"], **GREEDY)


def use_pipeline(model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    pipeline("text-generation", model=model, tokenizer=tokenizer)("你好", **GREEDY)


DOORS: dict[str, tuple[int, Callable[[Model, PreTrainedTokenizerBase], Any]]] = {
    "chat": (1, lambda model, tokenizer: model.chat(tokenizer, "你好", **GREEDY)),
    "stream_chat": (1, lambda model, tokenizer: list(model.stream_chat(tokenizer, "你好", **GREEDY))),
    "batch_chat": (1, lambda model, tokenizer: model.batch_chat(tokenizer, ["你好"] * 2, **GREEDY)),
    "chat with a cache": (2, continue_chat),
    "stream_chat with a cache": (2, continue_stream),
    "stream_generate": (1, stream_tokens),
    "generate with a tokenizer": (1, stop_at_text),
    "pipeline": (1, use_pipeline),
}


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("door", DOORS)
@every_generation_case
def test_an_answer_takes_one_call_a_token(
    name: str, door: str, make_pair: Callable[[str], Pair], calls: Callable[[Model], list[bool]]
) -> None:
    model, tokenizer = make_pair(name)
    found = calls(model)
    num_answers, answer = DOORS[door]
    answer(model, tokenizer)
    assert found == [True] * (num_answers * (NUM_TOKENS - 1))


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(
    "place", [("GrowingLayer", "add_place"), ("CacheSteps", "aim"), ("Steps", "run")], ids=".".join
)
@every_generation
def test_a_token_that_was_interrupted_is_not_held(
    version: str,
    place: tuple[str, str],
    tiny_model: Callable[..., PreTrainedModel],
    source: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(**{**TINY[version], **SIZES}).bfloat16()
    token = next_token(model, 2)
    cache = model(torch.randint(3, 80, (2, 6)), use_cache=True).past_key_values
    held, interrupted = copy.deepcopy(cache), []
    expected = model(**token, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    kind, method = getattr(source("decoding_cpu"), place[0]), place[1]
    original = getattr(kind, method)

    def interrupt(self: Any, *args: Any) -> None:
        interrupted.append(self)
        # In the second layer, where there is one.
        if len(interrupted) == 2 or place[0] == "Steps":
            raise Interrupt
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, interrupt)
        with pytest.raises(Interrupt):
            model(**token, past_key_values=cache, use_cache=True)
    for layer, before in zip(cache.layers, held.layers, strict=True):
        assert layer.keys.equal(before.keys) and layer.values.equal(before.values)
    assert model(**token, past_key_values=cache, use_cache=True).logits.equal(expected)


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 13])
def test_any_number_of_threads(
    num_threads: int, tiny_model: Callable[..., PreTrainedModel], set_threads: Callable[[int], None]
) -> None:
    """More than there are processors, too, beside those of another thread that models have computed in."""
    model = tiny_model(**SIZES).bfloat16()
    expected = decode_tokens(model)
    found: list[list[torch.Tensor]] = []
    set_threads(num_threads)
    decode_tokens(model)
    thread = threading.Thread(target=lambda: found.append(decode_tokens(model)))
    thread.start()
    thread.join()
    found.append(decode_tokens(model))
    for one in found:
        assert all(tensor.equal(other) for tensor, other in zip(one, expected, strict=True))
    assert len(found) == 2


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("num_threads", [2, 5])
def test_a_step_waits_for_the_one_before(
    num_threads: int, source: Callable[[str], ModuleType], set_threads: Callable[[int], None]
) -> None:
    kernels = source("kernels_decoding")
    numbers = torch.ones(64 * kernels.TASK_COLUMNS, dtype=torch.bfloat16)
    adding = kernels.compile_kernel(kernels.AddingProgram, numbers.dtype, 1.0)
    # Each doubles in its place what the one before has doubled.
    address = numbers.data_ptr()
    steps = [kernels.Step(adding, numbers.numel(), 1, address, address, address) for _ in range(100)]
    joined = kernels.join_steps(steps)
    set_threads(num_threads)
    for _ in range(20):
        numbers.fill_(2.0**-100)
        joined.run()
        assert numbers.eq(1).all()
