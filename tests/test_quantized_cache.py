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
"""The library's quantized cache holds the keys and values of every generation."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generations import GMASK, START, TINY, every_generation
from transformers import QuantizedCache


pytestmark = pytest.mark.programs

NUM_PROMPT, NUM_NEW = 20, 60


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """quanto builds this one function in C++ before it first unpacks, which takes a minute."""
    extension = importlib.import_module("optimum.quanto.library.extensions.cpp").ext
    monkeypatch.setattr(extension, "_lib", SimpleNamespace(unpack=unpack))


@every_generation
def test_generating_with_a_quantized_cache(tiny_model: Callable[..., Any], version: str) -> None:
    # Numbers are quantized by 64 of them.
    settings = {"kv_channels": 64, "num_attention_heads": 2, "hidden_size": 128, "multi_query_group_num": 2}
    model = tiny_model(**{**TINY[version], **settings})
    prompt = torch.randint(10, 80, (1, NUM_PROMPT))
    prompt[0, -2:] = torch.tensor([GMASK, START])
    arguments = {"do_sample": False, "max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW}
    cached = {"cache_implementation": "quantized", "return_dict_in_generate": True, "output_logits": True}
    whole = model.generate(prompt, **arguments, return_dict_in_generate=True, output_logits=True)
    errors = []
    for bits in (2, 4):
        # The newest tokens stay as they are, by default 128 of them.
        config = {"backend": "quanto", "nbits": bits, "residual_length": 8}
        output = model.generate(prompt, **arguments, **cached, cache_config=config)
        assert isinstance(output.past_key_values, QuantizedCache)
        assert output.past_key_values.get_seq_length() == NUM_PROMPT + NUM_NEW - 1
        assert output.sequences.shape == whole.sequences.shape
        # The first token comes before anything is quantized.
        assert torch.equal(output.logits[0], whole.logits[0])
        errors.append((output.logits[1] - whole.logits[1]).norm() / whole.logits[1].norm())
    assert 0 < errors[1] < errors[0] < 1
