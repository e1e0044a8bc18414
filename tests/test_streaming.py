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
"""Streams take their arguments when they are called, and end with the program."""

import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


GREEDY = {"do_sample": False, "max_new_tokens": 8}

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module", params=["chatglm1", "chatglm3"])
def pair(
    request: pytest.FixtureRequest, case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]
) -> Pair:
    return case_model(request.param), case_tokenizer(request.param)


@pytest.mark.floor
def test_history_is_taken_at_the_call(pair: Pair) -> None:
    model, tokenizer = pair
    message = {"role": "user", "content": "hello"}
    history = [message, {"role": "assistant", "content": "hi"}]
    expected = model.chat(tokenizer, "你好", history=history, **GREEDY)
    stream = model.stream_chat(tokenizer, "你好", history=history, **GREEDY)
    history.clear()
    message["content"] = "something else"
    assert list(stream)[-1] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": 5}, "query"),
        ({"query": "x", "role": "admin"}, "admin"),
        ({"query": "x", "history": "hello"}, "hello"),
        ({"query": "x", "num_beams": 2}, "num_beams=2"),
        ({"query": "x", "generation_config": GenerationConfig(num_beams=2)}, "num_beams=2"),
        ({"query": "x", "past_key_values": ()}, "past_key_values.*tuple"),
        ({"query": "x " * 9000}, "positions"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(pair: Pair, arguments: dict[str, Any], message: str) -> None:
    model, tokenizer = pair
    with pytest.raises((TypeError, ValueError), match=message):
        model.stream_chat(tokenizer, **arguments)


def test_bad_prompts_are_refused_at_the_call(pair: Pair) -> None:
    model, _ = pair
    for ids in (torch.zeros((1, 0), dtype=torch.long), torch.tensor([[999999]])):
        with pytest.raises(ValueError, match="prompt"):
            model.stream_generate(ids, **GREEDY)
    with pytest.raises(ValueError, match="num_beams=2"):
        model.stream_generate(torch.tensor([[5, 6]]), generation_config=GenerationConfig(num_beams=2))


def test_a_second_interruption_waits_for_the_thread(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair
    before, joins = threading.active_count(), []
    join = threading.Thread.join

    def interrupted_join(self: threading.Thread, timeout: float | None = None) -> None:
        joins.append(self)
        if len(joins) == 1:
            raise KeyboardInterrupt
        join(self, timeout)

    *_, cache = model.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    stream = model.stream_chat(tokenizer, "你好", past_key_values=cache, do_sample=False, eos_token_id=None)
    next(stream)
    monkeypatch.setattr(threading.Thread, "join", interrupted_join)
    stream.close()
    assert len(joins) == 2
    assert threading.active_count() == before


@pytest.mark.floor
@pytest.mark.parametrize("name", GENERATION_CASES)
def test_a_growing_text_is_what_decode_gives(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    generator = random.Random(0)
    texts = ["你好，世界。", " a dog ' s n't 5 ' ' x", "<n>\n\t    <|blank_5|> .", "é😀 😀ſ", "it 's <|tab|> fine . "]
    words = [token_id for text in texts for token_id in tokenizer.encode(text, add_special_tokens=False)]
    # Ids without a text of their own, which do not begin one either.
    silent = [token_id for token_id in range(tokenizer.vocab_size + 3) if not tokenizer.decode([token_id])]
    words += [silent[-1], tokenizer.vocab_size + 2] * 4
    for size in (tokenizer.vocab_size + 3, len(words)):
        for _ in range(30):
            ids = [generator.randrange(tokenizer.vocab_size + 3) for _ in range(8)]
            ids += [words[generator.randrange(size) % len(words)] for _ in range(30)]
            generator.shuffle(ids) if generator.random() < 0.5 else None
            growing = tokenizer.growing_text()
            grown = [growing.add(token_id) for token_id in ids]
            assert grown == [tokenizer.decode(ids[: index + 1]) for index in range(len(ids))]


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_a_long_answer_costs_no_more_for_every_token(
    case_tokenizer: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokenizer = case_tokenizer(name)
    ids = tokenizer.encode("你好，世界。 A dog barks 😀.\n" * 200, add_special_tokens=False)[:2000]
    decode_ids, counts = type(tokenizer)._decode_ids, []

    def count(self: PreTrainedTokenizerBase, *args: Any) -> str:
        counts[-1] += len(args[-1])
        return decode_ids(self, *args)

    monkeypatch.setattr(type(tokenizer), "_decode_ids", count)
    growing = tokenizer.growing_text()
    for token_id in ids:
        counts.append(0)
        text = growing.add(token_id)
    assert max(counts) < 60
    assert sum(counts[-500:]) <= sum(counts[:500]) + 500
    assert text == tokenizer.decode(ids)


PROGRAM = """
import sys
import torch
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
settings = {"do_sample": False, "max_new_tokens": 8000, "eos_token_id": None}
streams = [model.stream_chat(tokenizer, "你好", **settings) for _ in range(2)]
# Forward passes that outlast the end of the program.
model.register_forward_hook(lambda *_: [torch.ones(600, 600) @ torch.ones(600, 600) for _ in range(5)] and None)
for stream in streams:
    next(stream)
print("answered")
"""


@pytest.mark.grid
def test_open_streams_end_with_the_program(case_folder: Callable[[str], Path]) -> None:
    command = [sys.executable, "-c", PROGRAM, str(case_folder("chatglm3"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout) == (0, "answered\n"), result.stderr
