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
"""A P-tuning prefix in caches that are reset, and in files that are read when they are needed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generations import TINY, every_causal_generation, every_generation
from safetensors.torch import load_file
from transformers import PreTrainedModel, StaticCache


ModelMaker = Callable[..., PreTrainedModel]

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 98}


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(4, 89, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 4])
@every_causal_generation
def test_a_static_cache_that_was_reset_gets_the_prefix_again(
    tiny_model: ModelMaker, version: str, length: int
) -> None:
    chatglm, ids = tiny_model(**TINY[version], pre_seq_len=5), ids_of(2, length)
    expected = chatglm(ids).logits
    answer = chatglm.generate(ids, use_cache=False, **GREEDY)
    cache = StaticCache(config=chatglm.config, max_cache_len=30)
    for _ in range(3):
        logits = chatglm(ids, past_key_values=cache).logits
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        assert int(cache.get_seq_length()) == 5 + length
        cache.reset()
        assert torch.equal(chatglm.generate(ids, past_key_values=cache, **GREEDY), answer)
        cache.reset()


def test_a_cache_that_was_made_ahead_gets_the_prefix(tiny_model: ModelMaker) -> None:
    chatglm, ids = tiny_model(pre_seq_len=5), ids_of(2, 1)
    cache = StaticCache(config=chatglm.config, max_cache_len=30)
    cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
    logits = chatglm(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, chatglm(ids).logits, atol=2e-5, rtol=1e-5)


def test_compiled_code_puts_the_prefix_into_a_reset_cache(tiny_model: ModelMaker) -> None:
    chatglm, ids = tiny_model(pre_seq_len=5), ids_of(2, 4)
    torch.compiler.reset()
    compiled = torch.compile(chatglm, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=chatglm.config, max_cache_len=30)
    with torch.no_grad():
        expected = chatglm(ids).logits
        for _ in range(2):
            logits = compiled(ids, past_key_values=cache).logits
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
            cache.reset()


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("place", ["disk", "cpu"])
@every_generation
def test_an_offloaded_prefix_is_used_and_saved(
    tiny_model: ModelMaker, version: str, place: str, projection: bool, tmp_path: Path
) -> None:
    whole = tiny_model(**TINY[version], pre_seq_len=5, prefix_projection=projection)
    whole.save_pretrained(tmp_path / "model")
    ids = ids_of(2, 7)
    names = ("embedding", "rotary_pos_emb", "encoder", "output_layer")
    device_map = {f"transformer.{name}": "cpu" for name in names} | {"transformer.prefix_encoder": place}
    chatglm = type(whole).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert chatglm.transformer.prefix_encoder.embedding.weight.is_meta == (place == "disk")
    torch.testing.assert_close(chatglm(ids).logits, whole(ids).logits)
    assert torch.equal(chatglm.generate(ids, **GREEDY), whole.generate(ids, **GREEDY))
    static = GREEDY | {"cache_implementation": "static"}
    assert torch.equal(chatglm.generate(ids, **static), whole.generate(ids, **GREEDY))
    stored = load_file(chatglm.save_prefix_encoder(tmp_path / "prefix"))
    expected = load_file(whole.save_prefix_encoder(tmp_path / "expected"))
    torch.testing.assert_close(stored, expected)
