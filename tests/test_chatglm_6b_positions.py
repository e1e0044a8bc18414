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
"""Two-row positions of ChatGLM-6B where the library, or a caller, knows less about them than `generate` does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generations import GMASK, MASK, START, TINY
from transformers import DynamicCache, PreTrainedModel, StaticCache


ModelMaker = Callable[..., PreTrainedModel]

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 98}


@pytest.fixture
def model(tiny_model: ModelMaker) -> ModelMaker:
    return lambda **changes: tiny_model(**TINY["chatglm"] | changes)


def prompt(blank: int = GMASK) -> torch.Tensor:
    """Two prompts of eight tokens; of `[MASK]`, one stands in the middle."""
    ids = torch.randint(4, 89, (2, 8), generator=torch.Generator().manual_seed(1))
    ids[:, -2 if blank == GMASK else 3], ids[:, -1] = blank, START
    return ids


def positions_of(ids: torch.Tensor) -> torch.Tensor:
    """`[batch, 2, seq]` as the tokenizer returns them."""
    length = ids.shape[1]
    blank = (ids == GMASK).int().argmax(-1, keepdim=True)
    start = (ids == START).int().argmax(-1, keepdim=True)
    index = torch.arange(length).expand_as(ids)
    return torch.stack((torch.where(index >= start, blank, index), (index - start + 1).clamp(min=0)), dim=1)


@pytest.mark.parametrize("blank", [GMASK, MASK])
@pytest.mark.parametrize("pre_seq_len", [None, 5])
def test_a_cache_is_continued_without_positions(model: ModelMaker, pre_seq_len: int | None, blank: int) -> None:
    chatglm = model(pre_seq_len=pre_seq_len)
    ids = torch.cat((prompt(blank), torch.tensor([[5, 6, 7], [8, 9, 10]])), dim=1)
    expected, cache = chatglm(ids).logits, DynamicCache(config=chatglm.config)
    parts = [chatglm(part, past_key_values=cache).logits for part in ids.split((8, 1, 2), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=1e-5)
    # A padded row, of which the mask tells.
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected, cache = chatglm(ids, attention_mask=mask).logits, DynamicCache(config=chatglm.config)
    parts = [chatglm(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits]
    parts.append(chatglm(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


def test_positions_are_not_guessed(model: ModelMaker) -> None:
    chatglm, ids, cache = model(), prompt(), DynamicCache()
    chatglm(ids, position_ids=positions_of(ids), past_key_values=cache)
    with pytest.raises(ValueError, match=r"position_ids.*cache"):
        chatglm(torch.tensor([[5], [6]]), past_key_values=cache)
    cache = DynamicCache()
    chatglm(ids, past_key_values=cache)
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"position_ids.*cache"):
        chatglm(torch.tensor([[5], [6]]), past_key_values=cache)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_guidance_equals_its_formula(model: ModelMaker, use_cache: bool, negative: bool) -> None:
    chatglm, ids = model(), prompt()
    # Without a negative prompt the library starts from the last token.
    other = ids.flip(0) if negative else ids[:, -1:]
    given = {"negative_prompt_ids": other} if negative else {}
    actual = chatglm.generate(ids, guidance_scale=4.0, use_cache=use_cache, **given, **GREEDY)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            guided = chatglm(expected).logits[:, -1].log_softmax(-1)
            free = chatglm(other).logits[:, -1].log_softmax(-1)
            new = (free + 4.0 * (guided - free)).argmax(-1, keepdim=True)
            expected, other = torch.cat((expected, new), dim=1), torch.cat((other, new), dim=1)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, chatglm.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"num_beams": 3, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_embeddings_with_positions_equal_ids(model: ModelMaker, settings: dict[str, Any]) -> None:
    chatglm, ids = model(), prompt()
    settings = GREEDY | settings
    torch.manual_seed(5)
    expected = chatglm.generate(ids, **settings)[:, ids.shape[1] :]
    torch.manual_seed(5)
    embeds = chatglm.get_input_embeddings()(ids)
    actual = chatglm.generate(inputs_embeds=embeds, position_ids=positions_of(ids), **settings)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_row_of_positions_takes_what_the_tokenizer_returns(
    model: ModelMaker, case_tokenizer: Callable[[str], Any], side: str
) -> None:
    tokenizer = case_tokenizer("chatglm1")
    numbers = {"gmask_token_id": tokenizer.convert_tokens_to_ids("[gMASK]"), "bos_token_id": tokenizer.bos_token_id}
    numbers["mask_token_id"] = tokenizer.convert_tokens_to_ids("[MASK]")
    changes = {"position_encoding_2d": False, "padded_vocab_size": 608, "pad_token_id": tokenizer.pad_token_id}
    chatglm = model(**changes, **numbers)
    texts = ["你好", "The quick brown fox jumps over the lazy dog."]
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    assert batch["position_ids"].shape[:2] == (2, 2)
    logits = chatglm(**batch).logits
    settings = GREEDY | {"eos_token_id": None}
    answers = chatglm.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]
    for row, text in enumerate(texts):
        single = tokenizer(text, return_tensors="pt")
        length = single["input_ids"].shape[1]
        real = slice(-length, None) if side == "left" else slice(length)
        torch.testing.assert_close(logits[row, real], chatglm(**single).logits[0], atol=2e-5, rtol=1e-5)
        if side == "left":
            assert torch.equal(answers[row], chatglm.generate(**single, **settings)[0, length:])
    with pytest.raises(ValueError, match=r"two rows.*position_encoding_2d: false"):
        embeds = chatglm.get_input_embeddings()(batch["input_ids"])
        chatglm(inputs_embeds=embeds, position_ids=batch["position_ids"])


def test_a_reset_static_cache_sees_the_context_both_ways(model: ModelMaker) -> None:
    chatglm, ids = model(), prompt()
    cache = StaticCache(config=chatglm.config, max_cache_len=20)
    for _ in range(2):
        logits = chatglm(ids, past_key_values=cache).logits
        torch.testing.assert_close(logits, chatglm(ids).logits, atol=2e-5, rtol=1e-5)
        cache.reset()


def test_packed_samples_are_refused(model: ModelMaker) -> None:
    chatglm, ids = model(), torch.cat((prompt(), torch.tensor([[5, 6], [7, 8]])), dim=1)
    positions = positions_of(ids)
    expected = chatglm(ids).logits
    torch.testing.assert_close(chatglm(ids, position_ids=positions).logits, expected)
    with pytest.raises(ValueError, match=r"packed into one row.*ChatGLM-6B"):
        chatglm(ids.repeat(1, 2), position_ids=positions.repeat(1, 1, 2))
