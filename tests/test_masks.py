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
"""Who sees whom: masks that the caller makes, and samples that are packed into one row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generations import TINY, every_causal_generation
from transformers import DynamicCache, PreTrainedModel, StaticCache


ModelMaker = Callable[..., PreTrainedModel]

either_prefix = pytest.mark.parametrize("pre_seq_len", [None, 5], ids=["bare", "prefix"])
every_attention = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4, 89, (batch, length), generator=torch.Generator().manual_seed(1))


def tree_mask() -> torch.Tensor:
    """Booleans `[1, 1, 7, 7]`, true = visible: tokens 3, 4 and 5, 6 both follow 0, 1, 2."""
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[5:, 3:5] = False
    return mask[None, None]


FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bool": lambda mask: mask,
    "int": lambda mask: mask.long(),
    "float": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min),
    "infinite": lambda mask: torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf),
}


@either_prefix
@pytest.mark.parametrize("form", FORMS)
@every_attention
def test_a_whole_mask_hides_what_it_says(
    tiny_model: ModelMaker, implementation: str, form: str, pre_seq_len: int | None
) -> None:
    chatglm, ids = tiny_model(pre_seq_len=pre_seq_len), ids_of(2, 7)
    chatglm.set_attn_implementation(implementation)
    branch = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
    for use_cache in (False, True):
        given = FORMS[form](tree_mask())
        actual = chatglm(ids, attention_mask=given, position_ids=branch, use_cache=use_cache).logits
        expected = chatglm(ids[:, [0, 1, 2, 5, 6]]).logits
        torch.testing.assert_close(actual[:, :5], chatglm(ids[:, :5]).logits, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(actual[:, 5:], expected[:, 3:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_whole_mask_of_another_dtype_fits_a_half_model(tiny_model: ModelMaker, implementation: str) -> None:
    chatglm, ids = tiny_model().to(torch.bfloat16), ids_of(1, 7)
    chatglm.set_attn_implementation(implementation)
    expected = chatglm(ids, attention_mask=FORMS["bool"](tree_mask())).logits
    assert not torch.equal(expected, chatglm(ids).logits)
    for form in FORMS:
        actual = chatglm(ids, attention_mask=FORMS[form](tree_mask())).logits
        torch.testing.assert_close(actual, expected)


@either_prefix
@every_attention
@every_causal_generation
def test_packed_samples_do_not_see_each_other(
    tiny_model: ModelMaker, version: str, implementation: str, pre_seq_len: int | None
) -> None:
    chatglm = tiny_model(**TINY[version], pre_seq_len=pre_seq_len)
    chatglm.set_attn_implementation(implementation)
    ids, positions = ids_of(2, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    expected = torch.cat((chatglm(ids[:, :4]).logits, chatglm(ids[:, 4:]).logits), dim=1)
    static = StaticCache(config=chatglm.config, max_cache_len=20)
    ways: list[dict[str, Any]] = [
        {"use_cache": False},
        {"use_cache": True},
        {"past_key_values": DynamicCache()},
        {"past_key_values": static},
    ]
    for way in ways:
        actual = chatglm(ids, position_ids=positions, **way).logits
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.compiler
@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("way", ["packed", "given"])
@torch.no_grad()
def test_flex_equals_sdpa(tiny_model: ModelMaker, way: str) -> None:
    chatglm, ids = tiny_model(pre_seq_len=5), ids_of(2, 7)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
    inputs = packed if way == "packed" else {"attention_mask": tree_mask()}
    expected = chatglm(ids, **inputs).logits
    chatglm.set_attn_implementation("flex_attention")
    torch.testing.assert_close(chatglm(ids, **inputs).logits, expected, atol=2e-5, rtol=1e-5)


def test_packed_samples_of_a_prefix_train_apart(tiny_model: ModelMaker) -> None:
    chatglm, ids = tiny_model(pre_seq_len=5).train(), ids_of(1, 9)
    chatglm.transformer.prefix_encoder.eval()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    expected = torch.cat((chatglm(ids[:, :4]).logits, chatglm(ids[:, 4:]).logits), dim=1)
    for use_reentrant in (False, True):
        chatglm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        actual = chatglm(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_a_prompt_without_padding_needs_no_mask(tiny_model: ModelMaker) -> None:
    """A mask of a long prompt would take more memory than the model."""
    chatglm, ids = tiny_model(), ids_of(2, 9)
    seen: list[Any] = []
    layer = chatglm.transformer.encoder.layers[0]
    layer.register_forward_pre_hook(lambda _, args, kw: seen.append(kw["attention_mask"]), with_kwargs=True)
    chatglm(ids)
    chatglm(ids, position_ids=torch.arange(9)[None], use_cache=True)
    chatglm.generate(ids, max_new_tokens=3, do_sample=False)
    assert seen == [None] * 5
