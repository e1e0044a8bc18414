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
"""Compiled decoding: one switch, the same answers, and one compilation for all turns of a conversation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES
from transformers import CompileConfig, PreTrainedModel


GREEDY = {"do_sample": False, "max_new_tokens": 6}


class Compiler:
    """Runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward

    def __deepcopy__(self, memo: Any) -> "Compiler":
        return self  # The library copies configurations for every call.

    def settings(self) -> dict[str, Any]:
        config = CompileConfig(backend=self, mode=None, fullgraph=True)
        return {"cache_implementation": "static", "compile_config": config}


@pytest.fixture
def compiler() -> Compiler:
    torch.compiler.reset()
    return Compiler()


def test_compiling_can_be_switched_off(tiny_model: Callable[..., PreTrainedModel], compiler: Compiler) -> None:
    model, prompt = tiny_model(), torch.tensor([[5, 6, 7]])
    answer = model.generate(prompt, **GREEDY, **compiler.settings(), disable_compile=True)
    assert compiler.num_graphs == 0
    assert torch.equal(answer, model.generate(prompt, **GREEDY))


def test_lengths_of_static_caches(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model, lengths = tiny_model(seq_length=1500), []
    for num_tokens in (5, 400, 600, 1490):
        settings = {**GREEDY, "cache_implementation": "static", "return_dict_in_generate": True}
        cache = model.generate(torch.randint(10, 80, (1, num_tokens)), **settings).past_key_values
        lengths.append(cache.layers[0].keys.shape[-2])
    assert lengths == [512, 512, 1024, 1500]


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_turns_of_a_conversation_share_one_graph(
    case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any], compiler: Compiler, name: str
) -> None:
    model, tokenizer = case_model(name), case_tokenizer(name)
    history: Any = []
    for query in ("你好", "晚上睡不着应该怎么办" * 4, "Why?"):
        expected, _ = model.chat(tokenizer, query, history, **GREEDY)
        answer, history = model.chat(tokenizer, query, history, **GREEDY, **compiler.settings())
        assert answer == expected
    assert compiler.num_graphs == 1
