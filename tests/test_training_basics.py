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
"""What every trainer relies on, for every generation: dropout, checkpointing, frozen weights, new tokens, losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import GMASK, START, TINY, every_generation
from transformers import PreTrainedModel


ModelMaker = Callable[..., PreTrainedModel]

every_attention = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


@pytest.fixture
def model(tiny_model: ModelMaker) -> ModelMaker:
    def make(version: str, **changes: Any) -> PreTrainedModel:
        return tiny_model(**TINY[version] | changes)

    return make


def prompt(version: str, batch: int = 2, length: int = 11) -> torch.Tensor:
    ids = torch.randint(4, 89, (batch, length), generator=torch.Generator().manual_seed(1))
    if version == "chatglm":
        ids[:, -4], ids[:, -3] = GMASK, START
    return ids


def gradients(chatglm: PreTrainedModel, **inputs: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step from one seed; none is left behind."""
    torch.manual_seed(7)
    chatglm(**inputs).loss.backward()
    found = {name: weight.grad.clone() for name, weight in chatglm.named_parameters() if weight.grad is not None}
    chatglm.zero_grad()
    return found


@every_attention
@pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout"])
@every_generation
def test_dropout_acts_in_training_only(model: ModelMaker, version: str, name: str, implementation: str) -> None:
    ids, chatglm = prompt(version), model(version, **{name: 0.5})
    chatglm.set_attn_implementation(implementation)
    torch.testing.assert_close(chatglm(ids).logits, model(version)(ids).logits)
    chatglm.train()
    first, second = chatglm(ids).logits, chatglm(ids).logits
    assert not torch.allclose(first, second)
    torch.testing.assert_close(model(version).train()(ids).logits, model(version)(ids).logits)


@pytest.mark.floor
@pytest.mark.parametrize("use_reentrant", [False, True])
@every_generation
def test_checkpointing_changes_no_gradient(model: ModelMaker, version: str, use_reentrant: bool) -> None:
    chatglm = model(version, attention_dropout=0.2, hidden_dropout=0.2).train()
    inputs = {"input_ids": prompt(version), "labels": prompt(version)}
    expected = gradients(chatglm, **inputs)
    assert len(expected) == len(list(chatglm.parameters()))
    chatglm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    chatglm.enable_input_require_grads()
    torch.testing.assert_close(gradients(chatglm, **inputs), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_generation
def test_an_adapter_in_a_frozen_model_gets_its_gradient(model: ModelMaker, version: str, use_reentrant: bool) -> None:
    chatglm = model(version).train()
    inputs = {"input_ids": prompt(version), "labels": prompt(version)}
    name = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
    expected = gradients(chatglm, **inputs)[name]
    chatglm.requires_grad_(False)
    chatglm.get_parameter(name).requires_grad_(True)
    chatglm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    chatglm.enable_input_require_grads()
    actual = gradients(chatglm, **inputs)
    assert set(actual) == {name}
    torch.testing.assert_close(actual[name], expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 0


@every_generation
def test_new_tokens_are_learnt_and_saved(model: ModelMaker, version: str, tmp_path: Path) -> None:
    chatglm, ids = model(version).train(), prompt(version)
    with torch.no_grad():
        before = chatglm(ids).logits
    chatglm.resize_token_embeddings(104)
    torch.testing.assert_close(chatglm(ids).logits[..., :99], before)
    # Tokens 99 to 103 are new.
    ids[:, 0] = 101
    labels = torch.full_like(ids, -100)
    labels[:, -1] = 103
    weight = chatglm.get_input_embeddings().weight
    old = weight[101].detach().clone()
    optimizer = torch.optim.AdamW([p for p in chatglm.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(16):
        losses.append(chatglm(ids, labels=labels).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.allclose(weight[101], old)
    tied = weight is chatglm.get_output_embeddings().weight
    assert tied == chatglm.config.tie_word_embeddings == (version == "chatglm")
    chatglm.eval().save_pretrained(tmp_path)
    again = type(chatglm).from_pretrained(tmp_path)
    assert again.config.vocab_size == again.config.padded_vocab_size == 104
    torch.testing.assert_close(again(ids).logits, chatglm(ids).logits)


@every_generation
def test_the_loss_of_half_logits_is_float32(model: ModelMaker, version: str) -> None:
    ids = prompt(version)
    for dtype in (torch.bfloat16, torch.float16):
        output = model(version).to(dtype)(ids, labels=ids)
        assert output.logits.dtype == dtype
        assert output.loss.dtype == torch.float32
        expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)


@pytest.mark.floor
@pytest.mark.parametrize("pre_seq_len", [None, 4])
@every_attention
@every_generation
def test_empty_rows_make_nothing_infinite(
    model: ModelMaker, version: str, implementation: str, pre_seq_len: int | None
) -> None:
    chatglm, ids = model(version, pre_seq_len=pre_seq_len).train(), prompt(version)
    chatglm.transformer.set_attn_implementation(implementation)
    if pre_seq_len is not None:
        chatglm.transformer.prefix_encoder.eval()
    alone = gradients(chatglm, input_ids=ids[1:], labels=ids[1:])
    # A row of padding, or one of which nothing is to be learnt, beside one that must not notice.
    empty, full, ignored = torch.zeros(11, dtype=torch.long), torch.ones(11, dtype=torch.long), torch.full((11,), -100)
    for first_mask in (empty, full):
        inputs = {"attention_mask": torch.stack((first_mask, full)), "labels": torch.stack((ignored, ids[1]))}
        loss = chatglm(ids, **inputs).loss
        torch.testing.assert_close(loss, chatglm(ids[1:], labels=ids[1:]).loss, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients(chatglm, input_ids=ids, **inputs), alone, atol=1e-4, rtol=1e-4)
