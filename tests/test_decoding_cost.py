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
"""What a token costs on the processor besides its weights: few operators, no copies, and the same answers."""

import copy
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from generations import CAUSAL_GENERATIONS, TINY, every_generation
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.profiler import profile
from transformers import DynamicCache, PreTrainedModel, StaticCache, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer


ModelMaker = Callable[..., PreTrainedModel]
Source = Callable[[str], ModuleType]


@torch.inference_mode()
def count_operators(model: PreTrainedModel) -> int:
    """Operators of one step of one sequence, those that operators call included."""
    inputs = {"input_ids": torch.tensor([[7]])}
    cache = model(torch.randint(10, 80, (1, 5)), use_cache=True).past_key_values
    if model.config.prefix_lm:
        inputs |= {"position_ids": torch.tensor([[[3], [1]]]), "token_type_ids": torch.tensor([[0]])}
    with profile() as recorded:
        model(**inputs, past_key_values=cache, use_cache=True)
    return sum(event.count for event in recorded.key_averages())


@every_generation
def test_a_layer_takes_few_operators(tiny_model: ModelMaker, version: str) -> None:
    models = [tiny_model(**TINY[version], num_layers=num_layers) for num_layers in (2, 3)]
    fewer, more = (count_operators(model) for model in models)
    # It was 164 in ChatGLM-6B and 233 in the others.
    assert more - fewer <= 140


def test_tracing_leaves_nothing_behind(tiny_model: ModelMaker, source: Source) -> None:
    model, ids = tiny_model(), torch.tensor([[5, 6, 7]])
    source("modeling_layers").constant.cache_clear()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model(ids)
        assert type(model(ids).logits) is torch.Tensor


def test_float64_is_kept(tiny_model: ModelMaker) -> None:
    norm = tiny_model().double().transformer.encoder.final_layernorm
    states = torch.randn(2, 5, norm.weight.shape[0], dtype=torch.float64)
    trained = norm(states)
    with torch.no_grad():
        assert norm(states).equal(trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_with_and_without_gradients_agree(tiny_model: ModelMaker, dtype: torch.dtype) -> None:
    norm = tiny_model().to(dtype).transformer.encoder.final_layernorm
    norm.weight.data.normal_(1.0, 0.1)
    for scale in (1e-3, 1.0, 300.0):
        states = (torch.randn(2, 5, norm.weight.shape[0]) * scale).to(dtype)
        trained = norm(states)
        with torch.no_grad():
            torch.testing.assert_close(norm(states), trained)
            assert norm(torch.zeros_like(states)).eq(0).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.01, 0.8, 0.999])
def test_quick_top_p_is_the_librarys(source: Source, scale: float, top_p: float) -> None:
    scores = torch.randn(3, 5000) * scale + torch.arange(5000) * 1e-3
    scores[1, 7:] = -torch.inf
    quick = source("generation_chatglm").QuickTopP(top_p, min_tokens_to_keep=2)
    assert torch.equal(quick(None, scores), TopPLogitsWarper(top_p, min_tokens_to_keep=2)(None, scores))


def test_generate_takes_the_quick_top_p(
    tiny_model: ModelMaker, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = tiny_model(), torch.tensor([[5, 6, 7]])
    answers = []
    calls = []
    quick = source("generation_chatglm").QuickTopP
    for call in (quick.__call__, TopPLogitsWarper.__call__):
        monkeypatch.setattr(quick, "__call__", lambda *args, call=call: calls.append(call) or call(*args))
        torch.manual_seed(1)
        answers.append(model.generate(prompt, do_sample=True, top_p=0.6, max_new_tokens=8))
    assert torch.equal(*answers) and len(calls) == 16


@pytest.fixture
def growing(source: Source, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of growing caches, in which no cache is too small for room."""
    module = source("modeling_cache")
    monkeypatch.setattr(module, "SMALL", 0)
    return module


@every_generation
@pytest.mark.parametrize("beams", [1, 2])
def test_growing_equals_the_librarys_cache(
    growing: ModuleType,
    tiny_model: ModelMaker,
    version: str,
    beams: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompt = tiny_model(**TINY[version]), torch.randint(10, 80, (2, 6))
    settings = {"do_sample": False, "num_beams": beams, "max_new_tokens": 70, "return_dict_in_generate": True}
    grown = model.generate(prompt, **settings)
    assert {type(layer) for layer in grown.past_key_values.layers} == {growing.GrowingLayer}
    monkeypatch.setattr(growing, "SMALL", 1 << 40)
    copied = model.generate(prompt, **settings)
    assert torch.equal(grown.sequences, copied.sequences)
    for layer, other in zip(grown.past_key_values.layers, copied.past_key_values.layers):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def states(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, num_tokens, 4), torch.randn(2, 3, num_tokens, 4)


@torch.no_grad()
def test_a_token_moves_nothing_that_is_there(growing: ModuleType) -> None:
    layer, library = growing.GrowingLayer(), DynamicLayer()
    places = set()
    for num_tokens in (9, *[1] * 200):
        new = states(num_tokens)
        layer.update(*new)
        library.update(*new)
        places.add(layer.keys.data_ptr())
        assert torch.equal(layer.keys, library.keys) and torch.equal(layer.values, library.values)
    assert len(places) <= 4


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "reorder", "select", "repeat", "reset", "copy", "pickle"])
def test_a_changed_layer_goes_on(growing: ModuleType, change: str) -> None:
    layer, library = growing.GrowingLayer(), DynamicLayer()
    for num_tokens in (9, 1, 3):
        new = states(num_tokens)
        kept_keys, _ = layer.update(*new)
        library.update(*new)
    before = kept_keys.clone()
    if change in ("copy", "pickle"):
        assert len(pickle.dumps(layer)) < 4000
        layer = copy.deepcopy(layer) if change == "copy" else pickle.loads(pickle.dumps(layer))
        # Any program can read it, and in a model it has room again.
        assert type(layer) is DynamicLayer
        layer = growing.give_room(layer)
    else:
        for one in (layer, library):
            index = torch.tensor([1, 0])
            calls = {
                "crop": lambda: one.crop(-2),
                "reorder": lambda: one.reorder_cache(index),
                "select": lambda: one.batch_select_indices(index),
                "repeat": lambda: one.batch_repeat_interleave(1),
                "reset": one.reset,
            }
            calls[change]()
    new = states(2)
    keys, values = layer.update(*new)
    other_keys, other_values = library.update(*new)
    assert torch.equal(keys, other_keys) and torch.equal(values, other_values)
    if change in ("crop", "reorder", "select", "copy", "pickle"):
        assert torch.equal(kept_keys, before)


def test_growing_leaves_inference_mode_and_gradients_alone(growing: ModuleType) -> None:
    layer = growing.GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(3))
    with torch.no_grad():
        layer.update(*states(1))
    keys, values = (state.requires_grad_() for state in states(1))
    kept, _ = layer.update(keys, values)
    layer.update(*states(1))
    kept.sum().backward()
    assert keys.grad.eq(1).all()


def test_caches_of_other_kinds_stay_what_they_are(growing: ModuleType, tiny_config: Callable[..., Any]) -> None:
    static, offloaded = StaticCache(tiny_config(), max_cache_len=8), DynamicCache()
    offloaded.offloading = True
    kept = list(static.layers)
    for cache in (static, offloaded, None):
        growing.let_cache_grow(cache)
    assert static.layers == kept and offloaded.layer_class_to_replicate is DynamicLayer


@torch.no_grad()
def test_a_cache_that_holds_something_grows_too(growing: ModuleType) -> None:
    cache, library = DynamicCache(), DynamicCache()
    first, more = states(5), states(1)
    for one in (cache, library):
        one.update(*first, 0)
    growing.let_cache_grow(cache)
    assert type(cache.layers[0]) is growing.GrowingLayer and cache.get_seq_length() == 5
    for one in (cache, library):
        one.update(*more, 0)
    assert torch.equal(cache.layers[0].keys, library.layers[0].keys)


@torch.inference_mode()
@pytest.mark.parametrize("version", CAUSAL_GENERATIONS)
def test_attention_of_float16_in_float32(
    tiny_model: ModelMaker, source: Source, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**TINY[version] | {"multi_query_group_num": 2}).half()
    prompt = torch.randint(10, 80, (2, 9))
    whole, seen = model(prompt).logits[:, -1:], []
    attend = functional.scaled_dot_product_attention

    def watch(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.dtype)
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(source("modeling_layers"), "attend", lambda *args: None)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    for limit, dtype in ((0, torch.float16), (1 << 30, torch.float32)):
        monkeypatch.setattr(source("modeling_layers"), "MOST_IN_FLOAT32", limit)
        cache = model(prompt[:, :-1], use_cache=True).past_key_values
        seen.clear()
        logits = model(prompt[:, -1:], past_key_values=cache, use_cache=True).logits
        assert set(seen) == {dtype} and logits.dtype == torch.float16
        torch.testing.assert_close(logits, whole, rtol=0.02, atol=0.02)


@every_generation
def test_prompts_of_float16_are_attended_in_float32(
    tiny_model: ModelMaker, source: Source, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layers = tiny_model(**TINY[version]).half(), source("modeling_layers")
    prompt, seen = torch.randint(10, 80, (2, layers.LEAST_IN_FLOAT32)), []
    padded = torch.ones_like(prompt)
    padded[0, :3] = 0
    attend = functional.scaled_dot_product_attention

    def watch(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.dtype)
        return attend(query, *args, **kwargs)

    def run(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        seen.clear()
        logits = model(prompt, attention_mask=mask).logits
        assert set(seen) == {dtype} and logits.dtype == torch.float16
        return logits

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watch)
    for mask in (None, padded):
        assert run(mask, torch.float16).requires_grad
        with torch.no_grad():
            found = run(mask, torch.float32)
            with monkeypatch.context() as patch:
                patch.setattr(layers, "LEAST_IN_FLOAT32", 1 << 30)
                torch.testing.assert_close(found[:, 3:], run(mask, torch.float16)[:, 3:], rtol=0.02, atol=0.02)
