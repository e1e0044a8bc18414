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
"""Every way of generating that the library has itself: the answer is the same, or there is none and an error says why.

`docs/generation.md` has them in a table, with the tests of quantized caches, compiled decoding and chunked prefill that
stand elsewhere.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES, GMASK, START, TINY, every_causal_generation, every_generation
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    WatermarkDetector,
    WatermarkingConfig,
    pipeline,
)


ModelMaker = Callable[..., PreTrainedModel]

NUM_PROMPT, NUM_NEW = 12, 10
LENGTH = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "pad_token_id": 0}
GREEDY = {"do_sample": False, **LENGTH}
MANY = list(range(10, 60))
# What the library calls a way of decoding, with what it needs of the model's own.
CACHES: dict[str, dict[str, Any]] = {
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "hybrid": {"cache_implementation": "hybrid"},
    "sliding window": {"cache_implementation": "sliding_window"},
}
DRAFTS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
}
FETCHED = {
    "constraints": {"force_words_ids": [[20]], "num_beams": 2},
    "group beams": {"num_beam_groups": 2, "num_beams": 2, "diversity_penalty": 1.0},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
}


def prompt(version: str, num_rows: int = 1) -> torch.Tensor:
    ids = torch.randint(10, 60, (num_rows, NUM_PROMPT), generator=torch.Generator().manual_seed(3))
    if version == "chatglm":
        ids[:, -2:] = torch.tensor([GMASK, START])
    return ids


@every_generation
@pytest.mark.parametrize("pre_seq_len", [None, 3])
def test_no_way_changes_the_answer(tiny_model: ModelMaker, version: str, pre_seq_len: int | None) -> None:
    model, ids = tiny_model(**TINY[version], pre_seq_len=pre_seq_len), prompt(version)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    sampled = {**LENGTH, "do_sample": True, "top_k": 10}

    def answers(**way: Any) -> list[torch.Tensor]:
        torch.manual_seed(1)
        return [model.generate(ids, **mode, **way) for mode in (GREEDY, beams, sampled)]

    expected = answers()
    for name, way in CACHES.items():
        for actual, answer in zip(answers(**way), expected, strict=True):
            assert torch.equal(actual, answer), name
    drafts = {**DRAFTS, "draft model": {"assistant_model": tiny_model(**TINY[version], num_layers=1)}}
    for name, way in drafts.items():
        assert torch.equal(model.generate(ids, **GREEDY, **way), expected[0]), name


@pytest.mark.gpu
@every_generation
def test_offloaded_caches_change_nothing(tiny_model: ModelMaker, version: str) -> None:
    model, ids = tiny_model(**TINY[version]).cuda(), prompt(version).cuda()
    expected = model.generate(ids, **GREEDY)
    for name in ("offloaded", "offloaded_static", "offloaded_hybrid"):
        actual = model.generate(ids, **GREEDY, cache_implementation=name, disable_compile=True)
        assert torch.equal(actual, expected), name


@every_generation
def test_tokens_can_be_constrained(tiny_model: ModelMaker, version: str) -> None:
    model, ids = tiny_model(**TINY[version]), prompt(version)
    even = [token for token in MANY if token % 2 == 0]
    for mode in (GREEDY, {**GREEDY, "num_beams": 2}, {**LENGTH, "do_sample": True}):
        output = model.generate(ids, **mode, prefix_allowed_tokens_fn=lambda row, so_far: even)
        assert set(output[0, NUM_PROMPT:].tolist()) <= set(even)
    first = model.generate(ids, **GREEDY)[0, NUM_PROMPT].item()
    assert model.generate(ids, **GREEDY, bad_words_ids=[[first]])[0, NUM_PROMPT] != first


@every_generation
def test_a_watermark_is_found(tiny_model: ModelMaker, version: str) -> None:
    model, ids = tiny_model(**TINY[version]), prompt(version, 2)
    length = {"max_new_tokens": 30, "min_new_tokens": 30}
    mark = WatermarkingConfig(bias=5.0, seeding_scheme="lefthash")
    # The library's detector asks for a first token, which ChatGLM2 to GLM-4 do not have.
    config = SimpleNamespace(vocab_size=model.config.vocab_size, bos_token_id=-1, is_encoder_decoder=False)
    detector = WatermarkDetector(model_config=config, device="cpu", watermarking_config=mark)
    found = []
    for way in ({"watermarking_config": mark}, {}):
        output = model.generate(ids, **{**GREEDY, **length}, **way)
        found.append(detector(output[:, NUM_PROMPT:], return_dict=True).z_score)
    assert (found[0] > found[1] + 1).all()


@every_generation
@pytest.mark.parametrize("way", FETCHED)
def test_what_is_fetched_from_a_hub_is_refused_by_the_library(tiny_model: ModelMaker, version: str, way: str) -> None:
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        tiny_model(**TINY[version]).generate(prompt(version), **GREEDY, **FETCHED[way])


@every_causal_generation
def test_continuous_batching_equals_generate(tiny_model: ModelMaker, version: str) -> None:
    model = tiny_model(**TINY[version], seq_length=512)
    prompts = [row[:length].tolist() for row, length in zip(prompt(version, 3), (12, 3, 11))]
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 98, "pad_token_id": 0}
    # By default the library takes most of the machine's free memory for the cache.
    few = ContinuousBatchingConfig(num_blocks=16)
    results = model.generate_batch(prompts, GenerationConfig(**greedy), continuous_batching_config=few)
    batched = [results[key].generated_tokens for key in sorted(results, key=lambda key: int(key.split("_")[-1]))]
    alone = [model.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() for ids in prompts]
    assert batched == alone


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_streamers_stop_strings_and_pipelines(
    name: str, case_model: Callable[[str], PreTrainedModel], case_tokenizer: Callable[[str], Any]
) -> None:
    model, tokenizer = case_model(name), case_tokenizer(name)
    messages = [{"role": "user", "content": "你好"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **options)
    new_ids = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    text = tokenizer.decode(new_ids, skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, **GREEDY, streamer=streamer)
    assert "".join(streamer) == text
    # A whole character of the answer; half a one has no text to stop at.
    stop = next(character for character in text[2:] if character.isalpha())
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=NUM_NEW, stop_strings=[stop], tokenizer=tokenizer
    )
    stopped = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert stopped == new_ids[: len(stopped)]
    assert stop in tokenizer.decode(stopped)
    assert stop not in tokenizer.decode(stopped[:-1])
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [result] = generator(messages, **GREEDY)
    assert result["generated_text"] == [*messages, {"role": "assistant", "content": text}]
