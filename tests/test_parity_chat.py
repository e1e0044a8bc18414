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
"""The recorded conversations: what is fed, what is generated, what comes back.

The published code has faults that a recording of it holds too, and this repository does otherwise on
purpose. They are met as follows:

* ChatGLM3 and later drop the last token of an answer even when it is no stop token, and stream one token
  late. Every recorded answer ran into `max_length`, so ours is one token longer, and our stream yields once
  more. The recorded history, not ours, goes into the next turn.
* A cache handed to the next turn made the published code feed other ids than the conversation's. Ours has to
  continue as if there were no cache, so it is compared with the recorded stream that had none.
* The caller's history was changed. Ours never is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import groupby
from typing import Any

import pytest
import torch
from generations import ALL_CASES, CAUSAL_CASES, ROLE_CASES
from transformers import BatchEncoding, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


pytestmark = pytest.mark.floor

Named = Callable[[str], Any]
Turn = dict[str, Any]
History = list[Any]


class Recorder(LogitsProcessor):
    """Keeps the ids that generation started from and those it chose, whatever a cache already held."""

    def __init__(self) -> None:
        self.prompt: list[int] = []
        self.new_ids: list[int] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self.prompt:
            self.prompt = input_ids[0].tolist()
        self.new_ids = [*input_ids[0, len(self.prompt) :].tolist(), scores[0].argmax().item()]
        return scores


def recorded_history(history: History) -> History:
    """JSON has no tuples; the published histories of ChatGLM-6B and ChatGLM2 are made of them."""
    return [tuple(turn) if isinstance(turn, list) else turn for turn in history]


def turns(recorded: list[Turn], opening: History | None = None) -> Iterator[tuple[Turn, History]]:
    """Every turn with the history the published code had before it."""
    history = opening or []
    for turn in recorded:
        yield turn, history
        history = recorded_history(turn["history"])


def options(turn: Turn, recorder: Recorder) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_length": turn["max_length"],
        "logits_processor": LogitsProcessorList([recorder]),
    } | ({"role": turn["role"]} if "role" in turn else {})


def whole_answer(turn: Turn, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the recorded ids say, last token included: no recorded answer ends in a stop token."""
    assert turn["new_ids"][-1] not in (turn.get("eos_token_id") or [tokenizer.eos_token_id])
    return tokenizer.decode(turn["new_ids"]).strip()


def with_answer(history: History, answer: str) -> History:
    """The recorded history with the last answer replaced."""
    *before, last = recorded_history(history)
    return [*before, last | {"content": answer} if isinstance(last, dict) else (last[0], answer)]


def distinct(texts: list[str]) -> list[str]:
    return [text for text, _ in groupby(texts)]


def assert_stream(turn: Turn, texts: list[str], final: str) -> None:
    recorded, ours = distinct(turn["stream_responses"]), distinct(texts)
    assert ours[: len(recorded)] == recorded
    assert ours[len(recorded) :] == ([] if final == recorded[-1] else [final])


def opening_of(turn: Turn) -> History:
    """The history handed to the first turn of a conversation: all but its question and answer."""
    return recorded_history(turn["history"])[:-2]


@pytest.mark.parametrize("name", ALL_CASES)
def test_chat(name: str, case: Named, case_model: Named, case_tokenizer: Named):
    check_chat(name, case(name).expected["chat"]["chat"], [], case_model(name), case_tokenizer(name))


@pytest.mark.parametrize("name", ROLE_CASES)
def test_chat_with_system_and_observation(name: str, case: Named, case_model: Named, case_tokenizer: Named):
    recorded = case(name).expected["chat"]["chat_system_observation"]
    opening = opening_of(recorded[0])
    assert [message["role"] for message in opening] == ["system"]
    assert [turn.get("role") for turn in recorded] == [None, "observation"]
    check_chat(name, recorded, opening, case_model(name), case_tokenizer(name))


def check_chat(
    name: str, recorded: list[Turn], opening: History, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(recorded) == 2
    for turn, history in turns(recorded, opening):
        recorder, given = Recorder(), deepcopy(history)
        response, new_history = model.chat(tokenizer, turn["query"], history=given, **options(turn, recorder))
        final = whole_answer(turn, tokenizer)
        assert recorder.prompt == turn["input_ids"]
        assert recorder.new_ids == turn["new_ids"]
        assert response == final
        published = turn["new_ids"][:-1] if name in ROLE_CASES else turn["new_ids"]
        assert turn["response"] == tokenizer.decode(published).strip()
        assert new_history == with_answer(turn["history"], final)
        assert given == history


@pytest.mark.parametrize("name", CAUSAL_CASES)
def test_stream_chat(name: str, case: Named, case_model: Named, case_tokenizer: Named):
    model, tokenizer, recorded = case_model(name), case_tokenizer(name), case(name).expected["chat"]["stream_chat"]
    assert len(recorded) == 2
    for turn, history in turns(recorded):
        recorder, given = Recorder(), deepcopy(history)
        yielded = list(model.stream_chat(tokenizer, turn["query"], history=given, **options(turn, recorder)))
        final = whole_answer(turn, tokenizer)
        assert recorder.prompt == turn["input_ids"]
        assert recorder.new_ids == turn["new_ids"]
        assert_stream(turn, [response for response, _ in yielded], final)
        assert yielded[-1][1] == with_answer(turn["history"], final)
        assert given == history


def test_stream_chat_of_chatglm_6b(case: Named, case_model: Named, case_tokenizer: Named):
    """The published stream ended before the last token, and showed characters of which bytes were missing."""
    model, tokenizer, recorded = case_model("chatglm1"), case_tokenizer("chatglm1"), case("chatglm1").expected["chat"]
    assert len(recorded["stream_chat"]) == 2
    for turn, history in turns(recorded["stream_chat"]):
        recorder = Recorder()
        yielded = list(model.stream_chat(tokenizer, turn["query"], history=history, **options(turn, recorder)))
        assert recorder.prompt == turn["input_ids"]
        assert recorder.new_ids[:-1] == turn["new_ids"]
        complete = [text for text in turn["stream_responses"] if not text.endswith("\ufffd")]
        texts = distinct([response for response, _ in yielded])
        assert texts[: len(distinct(complete))] == distinct(complete)
        expected, _ = model.chat(tokenizer, turn["query"], history=history, **options(turn, Recorder()))
        assert texts[-1] == expected


@contextmanager
def fed_lengths(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens went into the network at each step."""
    lengths: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: lengths.append(ids[0].shape[1]))
    yield lengths
    hook.remove()


def common_prefix(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


@pytest.mark.parametrize("name", CAUSAL_CASES)
def test_stream_chat_with_a_cache(name: str, case: Named, case_model: Named, case_tokenizer: Named):
    model, tokenizer, recorded = case_model(name), case_tokenizer(name), case(name).expected["chat"]
    first, second = recorded["stream_chat_past"][0], recorded["stream_chat"][1]
    past_key_values, cached_ids = None, []
    for turn, history in turns([first, second]):
        recorder = Recorder()
        with fed_lengths(model) as fed:
            yielded = list(
                model.stream_chat(
                    tokenizer,
                    turn["query"],
                    history=deepcopy(history),
                    past_key_values=past_key_values,
                    return_past_key_values=True,
                    **options(turn, recorder),
                )
            )
        assert recorder.prompt == turn["input_ids"]
        assert recorder.new_ids == turn["new_ids"]
        assert_stream(turn, [response for response, *_ in yielded], whole_answer(turn, tokenizer))
        # Only what the cache does not hold already goes in.
        assert fed[0] == len(turn["input_ids"]) - common_prefix(turn["input_ids"], cached_ids)
        # As published, the cache lacks the last token.
        past_key_values, cached_ids = yielded[-1][2], [*turn["input_ids"], *turn["new_ids"][:-1]]
        assert past_key_values.get_seq_length() == len(cached_ids)
    assert fed[0] < len(second["input_ids"])


@pytest.mark.parametrize("name", ALL_CASES)
def test_recorded_turns_are_encoded_by_the_tokenizer(name: str, case: Named, case_tokenizer: Named):
    recorded, tokenizer = case(name).expected["chat"], case_tokenizer(name)
    for kind in recorded.keys() - {"stream_chat_past"}:
        opening = opening_of(recorded[kind][0]) if kind == "chat_system_observation" else []
        for turn, history in turns(recorded[kind], opening):
            encoding = encode(tokenizer, turn, history)
            assert encoding["input_ids"].tolist() == [turn["input_ids"]]
            # Not recorded for ChatGLM-6B, whose cases of the tokenizer hold them.
            if "position_ids" in turn:
                assert encoding["position_ids"].tolist() == [turn["position_ids"]]
                assert encoding["attention_mask"].tolist() == [[1] * turn["attention_mask_length"]]


def encode(tokenizer: PreTrainedTokenizerBase, turn: Turn, history: History) -> BatchEncoding:
    if "prompt" in turn:
        assert tokenizer.build_prompt(turn["query"], history=history) == turn["prompt"]
        return tokenizer(turn["prompt"], return_tensors="pt")
    return tokenizer.build_chat_input(turn["query"], history=history, role=turn.get("role", "user"))
