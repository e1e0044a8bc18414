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
"""What the README shows runs, and what it counts is counted."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel


REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


# What the README says of a section, and the generations it is for.
ONLY_FOR = {'"tools"': ("chatglm3", "glm4"), "prefill_chunk_size": ("chatglm2", "chatglm3", "glm4")}


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_every_snippet_runs(
    case_folder: Callable[[str], Path], case_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # The random weights of the case would chat on for thousands of tokens.
    monkeypatch.setitem(case_model(name).chat_format.chat_defaults, "max_new_tokens", 24)
    namespace: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        if all(name in names for word, names in ONLY_FOR.items() if word in snippet):
            snippet = snippet.replace("/path/to/chatglm3-6b", str(case_folder(name)))
            exec(compile(snippet, "README.md", "exec"), namespace)
    assert {"response", "history", "cache", "responses", "output"} <= namespace.keys()


def test_memory_table(chatglm: Any) -> None:
    config = chatglm.ChatGLMConfig.from_pretrained(REPOSITORY)
    with torch.device("meta"):
        model: PreTrainedModel = chatglm.ChatGLMForConditionalGeneration(config)
        cache = model(torch.zeros(1, 1000, dtype=torch.long)).past_key_values
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"{parameters / 1e9:.2f} billion parameters" in README
    assert f"| {2 * parameters / 1e9:.1f} GB | {4 * parameters / 1e9:.1f} GB |" in README
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert f"| {2 * elements / 1e6:.1f} MB | {4 * elements / 1e6:.1f} MB |" in README
