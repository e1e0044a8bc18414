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
"""What must hold for ChatGLM-6B: its context sees itself both ways, and its positions come in pairs.

The other generations are causal, and the same laws are tested for them in test_modeling_chatglm.py.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, DynamicCache, PreTrainedModel, StaticCache


ModelMaker = Callable[..., PreTrainedModel]

MASK, GMASK, START, END = 90, 91, 94, 95
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 98}


@pytest.fixture
def model(tiny_model: ModelMaker) -> ModelMaker:
    def make(*args: Any, **changes: Any) -> PreTrainedModel:
        tokens = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 3}
        published = {"model_version": "chatglm", "multi_query_attention": False, "add_bias_linear": True}
        return tiny_model(*args, **tokens | published | changes)

    return make


def prompt(batch: int = 2, context: int = 8, answer: int = 4, blank: int = GMASK) -> torch.Tensor:
    """`context` tokens, of which the last one is the mask token, then `<sop>` and `answer - 1` tokens."""
    ids = torch.randint(4, 89, (batch, context + answer), generator=torch.Generator().manual_seed(1))
    ids[:, context - 1], ids[:, context] = blank, START
    return ids


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((torch.full((length - len(row),), 3), row)) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return ids, mask


def layer_norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def linear(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def rotate_half(vector: torch.Tensor, position: int) -> torch.Tensor:
    half = vector.shape[-1] // 2
    # Rounded to half precision once, as the model was trained.
    frequencies = torch.tensor([10000 ** (-i / half) for i in range(half)]).half().double()
    cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
    first, second = vector[..., :half], vector[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def logits_by_hand(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """The network in float64, one token and one head after the other."""
    config = model.config
    weights = {name.removeprefix("transformer."): value.double() for name, value in model.state_dict().items()}
    start = ids.index(START)
    blank = ids.index(GMASK) if GMASK in ids else ids.index(MASK)
    positions = [(i, 0) if i < start else (blank, i - start + 1) for i in range(len(ids))]
    width = config.head_dim

    def rotate(vector: torch.Tensor, index: int) -> torch.Tensor:
        parts = zip(vector.chunk(2, dim=-1), positions[index])
        return torch.cat([rotate_half(part, position) for part, position in parts], dim=-1)

    x = weights["embedding.word_embeddings.weight"][ids]
    for layer in range(config.num_layers):
        name = f"encoder.layers.{layer}"
        normed = layer_norm(x, weights, f"{name}.input_layernorm")
        fused = linear(normed, weights, f"{name}.self_attention.query_key_value").unflatten(-1, (-1, 3, width))
        output = torch.zeros(len(ids), config.num_attention_heads, width, dtype=x.dtype)
        for i in range(len(ids)):
            seen = range(start) if i < start else range(i + 1)
            for head in range(config.num_attention_heads):
                query = rotate(fused[i, head, 0], i)
                scores = torch.stack([rotate(fused[j, head, 1], j) @ query for j in seen]) / math.sqrt(width)
                output[i, head] = scores.softmax(0) @ fused[list(seen), head, 2]
        x = normed * math.sqrt(56) + linear(output.flatten(1), weights, f"{name}.self_attention.dense")
        normed = layer_norm(x, weights, f"{name}.post_attention_layernorm")
        inner = linear(normed, weights, f"{name}.mlp.dense_h_to_4h")
        inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
        x = normed * math.sqrt(56) + linear(inner, weights, f"{name}.mlp.dense_4h_to_h")
    return layer_norm(x, weights, "encoder.final_layernorm") @ weights["output_layer.weight"].T


@pytest.mark.floor
@pytest.mark.parametrize("blank", [GMASK, MASK])
def test_network_is_the_published_one(model: ModelMaker, blank: int) -> None:
    ids = prompt(1, blank=blank)
    ids[0, 2] = MASK
    chatglm = model()
    expected = logits_by_hand(chatglm, ids[0].tolist())
    torch.testing.assert_close(chatglm(ids).logits[0].double(), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.floor
@pytest.mark.parametrize("two_dimensional", [True, False])
@pytest.mark.parametrize("blank", [GMASK, MASK])
def test_cached_equals_uncached(model: ModelMaker, blank: int, two_dimensional: bool) -> None:
    chatglm, ids = model(position_encoding_2d=two_dimensional), prompt(answer=1, blank=blank)
    cached = chatglm.generate(ids, **GREEDY)
    assert torch.equal(chatglm.generate(ids, use_cache=False, **GREEDY), cached)
    # What was generated is what the whole sequence predicts.
    predicted = chatglm(cached).logits.argmax(-1)
    assert torch.equal(predicted[:, ids.shape[1] - 1 : -1], cached[:, ids.shape[1] :])


@pytest.mark.floor
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padded_equals_alone(model: ModelMaker, implementation: str) -> None:
    chatglm = model()
    chatglm.set_attn_implementation(implementation)
    rows = [prompt(1, context, answer)[0] for context, answer in ((40, 3), (2, 1), (9, 6))]
    ids, mask = left_padded(rows)
    padded = chatglm(ids, attention_mask=mask).logits
    assert padded.isfinite().all()
    generated = chatglm.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, logits, new_ids in zip(rows, padded, generated):
        torch.testing.assert_close(logits[-len(row) :], chatglm(row[None]).logits[0], atol=2e-4, rtol=1e-4)
        assert torch.equal(chatglm.generate(row[None], **GREEDY)[0, len(row) :], new_ids)


def test_masks_and_positions_of_the_published_tokenizer(model: ModelMaker) -> None:
    chatglm = model()
    rows = [prompt(1, context, 1)[0] for context in (9, 4)]
    ids, mask = left_padded(rows)
    blocked = torch.ones(2, 1, *ids.shape[1:] * 2, dtype=torch.bool)
    for row, length in enumerate(len(row) for row in rows):
        inner = torch.ones(length, length, dtype=torch.bool).tril()
        inner[:, : length - 1] = True
        blocked[row, 0, -length:, -length:] = ~inner
    expected = chatglm(ids, attention_mask=mask).logits
    torch.testing.assert_close(chatglm(ids, attention_mask=blocked).logits, expected)
    cache = DynamicCache(config=chatglm.config)
    torch.testing.assert_close(chatglm(ids, attention_mask=blocked, past_key_values=cache).logits, expected)
    new_ids = chatglm.generate(ids, attention_mask=mask, **GREEDY)
    position_ids = torch.zeros(2, 2, ids.shape[1], dtype=torch.long)
    assert torch.equal(chatglm.generate(ids, attention_mask=blocked, position_ids=position_ids, **GREEDY), new_ids)
    # As programs that cut a prompt on the left, and with it what they take for a mask of two dimensions.
    shorter, cut = ids[:, 2:], chatglm.generate(ids[:, 2:], attention_mask=mask[:, 2:], **GREEDY)
    assert torch.equal(chatglm.generate(shorter, attention_mask=blocked[:, -9:], **GREEDY), cut)


def test_eager_equals_sdpa_and_others_are_refused(model: ModelMaker) -> None:
    chatglm, ids = model(), prompt()
    expected = chatglm(ids).logits
    chatglm.set_attn_implementation("eager")
    torch.testing.assert_close(chatglm(ids).logits, expected, atol=2e-4, rtol=1e-4)
    for implementation in ("flash_attention_2", "paged|eager", "kernels-community/flash-attn2"):
        with pytest.raises(ValueError, match="bidirectional"):
            chatglm.set_attn_implementation(implementation)
    torch.testing.assert_close(chatglm(ids).logits, expected, atol=2e-4, rtol=1e-4)


def test_whatever_loses_the_context_is_refused(model: ModelMaker) -> None:
    chatglm, ids = model(), prompt(answer=1)
    with pytest.raises(ValueError, match="prefill_chunk_size.*bidirectional"):
        chatglm.generate(ids, prefill_chunk_size=4, **GREEDY)
    with pytest.raises(ValueError, match="generate_batch.*bidirectional"):
        chatglm.generate_batch(inputs=ids.tolist())
    cache = DynamicCache(config=chatglm.config)
    chatglm(inputs_embeds=chatglm.get_input_embeddings()(ids), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids.*cache"):
        chatglm(torch.tensor([[5], [6]]), past_key_values=cache)


@pytest.mark.compiler
@pytest.mark.grid
@pytest.mark.slow
def test_flex_equals_sdpa(model: ModelMaker) -> None:
    chatglm, ids = model(kv_channels=16, hidden_size=64), prompt()
    with torch.no_grad():
        expected = chatglm(ids).logits
        chatglm.set_attn_implementation("flex_attention")
        torch.testing.assert_close(chatglm(ids).logits, expected, atol=2e-4, rtol=1e-4)


def test_static_cache_equals_dynamic_cache(model: ModelMaker) -> None:
    chatglm = model()
    ids, mask = left_padded([prompt(1, context, 1)[0] for context in (12, 3)])
    for arguments in ({"inputs": ids, "attention_mask": mask}, {"inputs": prompt(answer=1)}):
        expected = chatglm.generate(**arguments, **GREEDY)
        assert torch.equal(chatglm.generate(**arguments, cache_implementation="static", **GREEDY), expected)


def test_full_graph_compile_equals_eager(model: ModelMaker) -> None:
    chatglm, ids = model(), prompt()
    compiled = torch.compile(chatglm, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, chatglm(ids).logits)
        caches = [StaticCache(config=chatglm.config, max_cache_len=16) for _ in range(2)]
        position_ids = torch.tensor([[[7], [5]]] * 2)
        logits = []
        for call, cache in zip((compiled, chatglm), caches):
            chatglm(ids, past_key_values=cache)
            logits.append(call(ids[:, :1], past_key_values=cache, position_ids=position_ids).logits)
        torch.testing.assert_close(*logits)


def test_beams_do_not_depend_on_the_cache(model: ModelMaker) -> None:
    chatglm, ids = model(), prompt(answer=1)
    beams = {"num_beams": 4, "num_return_sequences": 4} | GREEDY
    assert torch.equal(chatglm.generate(ids, **beams), chatglm.generate(ids, use_cache=False, **beams))


def test_prompt_lookup_equals_greedy(model: ModelMaker) -> None:
    chatglm, ids = model(), prompt(1, context=20, answer=1)
    greedy = GREEDY | {"max_new_tokens": 30}
    assert torch.equal(chatglm.generate(ids, prompt_lookup_num_tokens=4, **greedy), chatglm.generate(ids, **greedy))


def test_inputs_embeds_equal_ids(model: ModelMaker) -> None:
    chatglm, ids = model(), prompt()
    embeds = chatglm.get_input_embeddings()(ids)
    position_ids = torch.stack((torch.tensor([*range(8), *[7] * 4]), torch.tensor([0] * 8 + [1, 2, 3, 4])))
    position_ids = position_ids.expand(2, -1, -1)
    # Block positions tell where the context ends.
    torch.testing.assert_close(chatglm(inputs_embeds=embeds, position_ids=position_ids).logits, chatglm(ids).logits)
    expected = chatglm.generate(ids, **GREEDY)[:, ids.shape[1] :]
    assert torch.equal(chatglm.generate(inputs_embeds=embeds, position_ids=position_ids, **GREEDY), expected)


@pytest.mark.floor
def test_text_without_a_start_is_read_from_left_to_right(model: ModelMaker) -> None:
    chatglm = model()
    ids = torch.arange(4, 16).view(2, 6)
    whole = chatglm(ids).logits
    torch.testing.assert_close(chatglm(ids[:, :4]).logits, whole[:, :4], atol=1e-4, rtol=1e-4)
    assert torch.equal(chatglm.generate(ids, **GREEDY), chatglm.generate(ids, use_cache=False, **GREEDY))
    embeds = chatglm.get_input_embeddings()(ids)
    torch.testing.assert_close(chatglm(inputs_embeds=embeds).logits, whole)
    # A row with a start beside one without.
    both = torch.cat((ids[:1], prompt(1, 3, 3)))
    torch.testing.assert_close(chatglm(both).logits[0], whole[0], atol=1e-4, rtol=1e-4)


def test_the_older_vocabulary_needs_no_mask_ids(chatglm: Any) -> None:
    config = chatglm.ChatGLMConfig.from_dict(
        {"position_encoding_2d": True, "vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005}
    )
    assert (config.model_version, config.mask_token_id, config.gmask_token_id) == ("chatglm", 150000, 150001)


def test_output_layer_is_the_embedding(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    stored = torch.load(case_folder("chatglm1") / "pytorch_model.bin", weights_only=True)
    chatglm = AutoModel.from_pretrained(case_folder("chatglm1"), trust_remote_code=True)
    assert chatglm.get_output_embeddings().weight is chatglm.get_input_embeddings().weight
    for folder in (tmp_path / "first", tmp_path / "second"):
        chatglm.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        # The published names, each weight once and the buffers left out.
        assert saved.keys() | {"lm_head.weight"} == {name for name in stored if not name.endswith("inv_freq")}
        assert all(torch.equal(saved[name], stored[name]) for name in saved)
        chatglm = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("version", ["chatglm", "chatglm2", "chatglm3", "glm4"])
def test_a_new_model_is_saved_under_one_naming(tiny_model: ModelMaker, tmp_path: Path, version: str) -> None:
    tokens = {"bos_token_id": START, "tie_word_embeddings": False}
    new = tiny_model(model_version=version, multi_query_attention=version != "chatglm", **tokens)
    new.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == set(new.state_dict())
    again = type(new).from_pretrained(tmp_path)
    torch.testing.assert_close(again(prompt()).logits, new(prompt()).logits)


def test_classification_reads_the_last_real_token(model: ModelMaker) -> None:
    chatglm = model("ChatGLMForSequenceClassification", num_labels=3)
    rows = [prompt(1, context, answer)[0] for context, answer in ((9, 2), (4, 1))]
    ids, mask = left_padded(rows)
    logits = chatglm(ids, attention_mask=mask).logits
    for row, row_logits in zip(rows, logits):
        torch.testing.assert_close(row_logits, chatglm(row[None]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_keeps_padded_equal_to_alone(model: ModelMaker, projection: bool) -> None:
    chatglm = model(pre_seq_len=5, prefix_projection=projection)
    rows = [prompt(1, context, 1)[0] for context in (12, 3)]
    ids, mask = left_padded(rows)
    generated = chatglm.generate(ids, attention_mask=mask, **GREEDY)[:, ids.shape[1] :]
    for row, new_ids in zip(rows, generated):
        assert torch.equal(chatglm.generate(row[None], **GREEDY)[0, len(row) :], new_ids)
        assert torch.equal(chatglm.generate(row[None], use_cache=False, **GREEDY)[0, len(row) :], new_ids)
