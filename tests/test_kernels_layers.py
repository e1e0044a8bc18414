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
"""Norms and attention of a few tokens on a CPU: the kernels beside their formulas, and when they are not used."""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from generations import TINY, every_generation
from test_quantization_cpu import OLDER_PROCESSORS, assert_rounded, older_processor, protected_copies
from torch.nn import functional as F
from transformers import PreTrainedModel


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Batch, heads, heads of keys, keys, channels.
SHAPES = (
    (1, 32, 2, 300, 128),
    (3, 6, 2, 17, 48),
    (2, 4, 4, 77, 16),
    (1, 4, 2, 33, 80),
    (2, 3, 1, 5, 32),
    (1, 1, 1, 1, 16),
)


@pytest.fixture(scope="module")
def layers(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("kernels_layers")


@pytest.fixture
def calls(source: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that models have used."""
    found: list[str] = []
    module = source("modeling_layers")

    def watch(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            result = compute(*arguments)
            found.extend([] if result is None else [name])
            return result

        return watched

    for name in ("attend", "norm_rows"):
        monkeypatch.setattr(module, name, watch(name, getattr(module, name)))
    return found


def make_states(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query that is a part of a fused projection, keys and values with room behind them."""
    batch_size, num_heads, num_key_heads, num_keys, head_dim = shape
    query = torch.randn(batch_size, 1, num_heads + 1, head_dim).to(dtype).transpose(1, 2)[:, :num_heads]
    key, value = torch.randn(2, batch_size, num_key_heads, num_keys + 9, head_dim).to(dtype)[:, :, :, :num_keys]
    return query, key, value


def exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(groups, dim=1) for states in (key, value))
    probabilities = (query.double() @ key.transpose(2, 3) * scaling).softmax(-1)
    return (probabilities @ value).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@every_dtype
def test_norms_are_rounded_once(dtype: torch.dtype, weight_dtype: torch.dtype, layers: ModuleType) -> None:
    for length in (16, 48, 4096):
        states, weight = torch.randn(2, 3, length).to(dtype), torch.randn(length).to(weight_dtype)
        for scale in (1e-3, 1.0, 300.0):
            scaled = states * scale
            normed = layers.norm_rows(scaled, weight, 1e-5)
            assert normed.dtype == weight_dtype
            assert_rounded(normed, F.rms_norm(scaled.double(), (length,), weight.double(), 1e-5))
        states[1, 2, 7] = torch.nan
        normed = layers.norm_rows(states, weight, 1e-5)
        assert normed[1, 2].isnan().all() and normed[0].isfinite().all() and normed[1, :2].isfinite().all()


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_attention_is_rounded_once(dtype: torch.dtype, shape: tuple[int, ...], layers: ModuleType) -> None:
    states = make_states(shape, dtype)
    for scaling in (shape[-1] ** -0.5, 0.3):
        assert_rounded(layers.attend(*states, scaling), exact_attention(*states, scaling))


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("lacking", OLDER_PROCESSORS.values(), ids=OLDER_PROCESSORS)
@every_dtype
def test_kernels_of_older_processors(dtype: torch.dtype, lacking: tuple[str, ...], layers: ModuleType) -> None:
    states, weight = torch.randn(2, 64).to(dtype), torch.randn(64).to(dtype)
    heads = make_states((2, 6, 2, 35, 48), dtype)
    with older_processor(lacking, layers):
        assert_rounded(
            layers.norm_rows(states, weight, 1e-5), F.rms_norm(states.double(), (64,), weight.double(), 1e-5)
        )
        assert_rounded(layers.attend(*heads, 0.2), exact_attention(*heads, 0.2))


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
@every_dtype
def test_nothing_behind_a_tensor_is_read(dtype: torch.dtype, layers: ModuleType) -> None:
    """This ends the process, should it fail."""
    states, weight = torch.randn(3, 80).to(dtype), torch.randn(80).to(dtype)
    heads = [part.contiguous() for part in make_states((2, 6, 2, 19, 48), dtype)]
    expected = layers.norm_rows(states, weight, 1e-5), layers.attend(*heads, 0.2)
    assert layers.norm_rows(*protected_copies(states, weight), 1e-5).equal(expected[0])
    assert layers.attend(*protected_copies(*heads), 0.2).equal(expected[1])


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
def test_threads_share_the_heads(layers: ModuleType, set_threads: Callable[[int], None]) -> None:
    heads = make_states((2, 16, 8, 600, 64), torch.bfloat16)
    expected = layers.attend(*heads, 0.1)
    set_threads(2)
    assert layers.attend(*heads, 0.1).equal(expected)


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
def test_scores_of_any_size(layers: ModuleType) -> None:
    query, key, value = make_states((1, 2, 2, 20, 16), torch.float32)
    key[:, :, 3] = 1e4 * query.sign()[:, :, 0]
    key[:, :, 7] = -math.inf * query.sign()[:, :, 0]
    found = layers.attend(query, key, value, 1.0)
    torch.testing.assert_close(found, value[:, :, 3].flatten(1)[:, None])
    key[:, 1, 7] = torch.nan
    found = layers.attend(query, key, value, 1.0)
    assert found[..., :16].isfinite().all() and found[..., 16:].isnan().all()


@pytest.mark.usefixtures("needs_kernels")
def test_what_the_kernels_do_not_take(layers: ModuleType) -> None:
    states, weight = torch.randn(2, 32), torch.randn(32)
    query, key, value = make_states((2, 4, 2, 9, 16), torch.float32)
    with torch.no_grad():
        assert layers.norm_rows(states, weight, 1e-5) is not None
        assert layers.attend(query, key, value, 1.0) is not None
        norms: tuple[tuple[torch.Tensor, torch.Tensor], ...] = (
            (states[:, :24], weight[:24]),
            (states[:0], weight),
            (states.t().contiguous().t(), weight),
            (states.double(), weight),
            (states.to("meta"), weight.to("meta")),
            (states.repeat(layers.MOST_NORMED // 32, 1), weight),
        )
        assert all(layers.norm_rows(*case, 1e-5) is None for case in norms)
        attentions: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...] = (
            (query.repeat(1, 1, 2, 1), key, value),
            (query[..., :8], key[..., :8], value[..., :8]),
            (query, key.transpose(1, 2).contiguous().transpose(1, 2), value),
            (query, key, value[..., :8]),
            (query, key[:, :, :0], value[:, :, :0]),
            (query.half(), key, value),
            (query.to("meta"), key.to("meta"), value.to("meta")),
        )
        assert all(layers.attend(*case, 1.0) is None for case in attentions)
    assert layers.norm_rows(states, weight, 1e-5) is None and layers.attend(query, key, value, 1.0) is None


@pytest.mark.usefixtures("needs_kernels")
@every_generation
@every_dtype
def test_models_decode_by_kernels(
    dtype: torch.dtype,
    version: str,
    layers: ModuleType,
    tiny_model: Callable[..., PreTrainedModel],
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(**TINY[version], hidden_size=64, ffn_hidden_size=96, kv_channels=16).to(dtype)
    prompt, token = torch.randint(3, 80, (3, 6)), {"input_ids": torch.tensor([[7], [8], [9]])}
    if model.config.prefix_lm:
        token |= {"position_ids": torch.tensor([[[3], [1]]]), "token_type_ids": torch.tensor([[0]])}
    has_rms_norm = model.config.rmsnorm
    # With a hook, layers are not computed by one call, which has kernels of its own for the same.
    model.transformer.encoder.layers[0].register_forward_hook(lambda *args: None)
    logits = []
    for has_kernels in (True, False):
        if not has_kernels:
            monkeypatch.setattr(layers, "compile_kernel", lambda *args: None)
        with torch.no_grad():
            cache = model(prompt, use_cache=True).past_key_values
            assert calls.count("attend") == 0
            calls.clear()
            logits.append(model(**token, past_key_values=cache, use_cache=True).logits.float())
        assert calls.count("attend") == (2 if has_kernels else 0)
        assert calls.count("norm_rows") == (5 if has_kernels and has_rms_norm else 0)
        calls.clear()
    limit = {torch.float32: 1e-6, torch.float16: 0.003, torch.bfloat16: 0.02}[dtype]
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < limit


@pytest.mark.usefixtures("needs_kernels")
def test_other_attention_is_left_alone(tiny_model: Callable[..., PreTrainedModel], calls: list[str]) -> None:
    model = tiny_model(hidden_size=64, kv_channels=16)
    prompt, token = torch.randint(3, 80, (2, 6)), torch.tensor([[7], [8]])
    padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        cache = model(prompt, use_cache=True, attention_mask=padded[:, :6]).past_key_values
        calls.clear()
        model(token, past_key_values=cache, attention_mask=padded)
        model.set_attn_implementation("eager")
        weights = model(token, past_key_values=cache, output_attentions=True).attentions
    assert "attend" not in calls and len(weights) == 2


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_programs_hold_torchs_operators(
    layers: ModuleType, tiny_model: Callable[..., PreTrainedModel], calls: list[str]
) -> None:
    norm = tiny_model(hidden_size=64).transformer.encoder.final_layernorm.requires_grad_(False)
    states, other = torch.randn(2, 1, 3, 64)
    with torch.no_grad():
        traced = torch.jit.trace(norm, (states,), check_trace=False)
        exported = torch.export.export(norm, (states,)).module()
        compiled = torch.compile(norm, backend="eager", fullgraph=True)
        assert not calls
        expected = norm(other)
        assert calls == ["norm_rows"]
        for program in (traced, exported, compiled):
            torch.testing.assert_close(program(other), expected)
        batched = torch.vmap(norm)(other[0])
        torch.testing.assert_close(batched, expected[0])


def test_without_kernels_torch_computes(
    layers: ModuleType, source: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    llvm_kernels = source("kernels_llvm")
    monkeypatch.setattr(llvm_kernels, "ir", None)
    monkeypatch.setattr(layers, "compile_kernel", functools.cache(llvm_kernels.compile_kernel.__wrapped__))
    with torch.no_grad():
        assert layers.norm_rows(torch.randn(2, 32), torch.randn(32), 1e-5) is None
        assert layers.attend(*make_states((2, 4, 2, 9, 16), torch.float32), 1.0) is None
