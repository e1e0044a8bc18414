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
"""A generation is data: a made-up fifth one is added from outside, and loads, chats, saves and quantizes.

It numbers its rounds like ChatGLM2 from 7 on, has ChatGLM3's vocabulary and network, but divides positions.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


def add_generation(source: Callable[[str], ModuleType]) -> None:
    """Everything that `chatglm5` takes."""
    configuration, conversation = source("configuration_chatglm"), source("conversation_chatglm")
    tokenizer_class = source("tokenization_chatglm").ChatGLMTokenizer
    configuration.GENERATION_FEATURES["chatglm5"] = configuration.GenerationFeatures(
        repository_names=("chatglm5",), own_keys=("fifth_key",), scales_positions=True
    )
    conversation.CONVERSATION_FORMATS["chatglm5"] = dataclasses.replace(
        conversation.CONVERSATION_FORMATS["chatglm2"],
        name="chatglm5",
        first_round=7,
        stop_tokens=("eop",),
        closing_token="eop",
        chat_defaults={"max_length": 64, "do_sample": False},
    )
    tokenizer_class.vocabularies = {
        "chatglm5": tokenizer_class.vocabularies["chatglm3"],
        **tokenizer_class.vocabularies,
    }


@pytest.fixture
def fifth(
    source: Callable[[str], ModuleType], chatglm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, case_folder: Any
) -> SimpleNamespace:
    """The classes with the fifth generation, which is gone after the test."""
    configuration, conversation = source("configuration_chatglm"), source("conversation_chatglm")
    for registry in (configuration.GENERATION_FEATURES, conversation.CONVERSATION_FORMATS):
        # Remembers that there was none, and takes it out again.
        monkeypatch.setitem(registry, "chatglm5", None)
    monkeypatch.setattr(chatglm.ChatGLMTokenizer, "vocabularies", chatglm.ChatGLMTokenizer.vocabularies)
    add_generation(source)
    return chatglm


@pytest.fixture
def folder(case_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of ChatGLM3 with the key by which the fifth generation is recognised."""
    target = Path(
        shutil.copytree(case_folder("chatglm3"), tmp_path / "chatglm5", ignore=shutil.ignore_patterns("*.py"))
    )
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("model_version", None)
    (target / "config.json").write_text(json.dumps(config | {"fifth_key": 1, "rope_ratio": 4}), encoding="utf-8")
    return target


def test_a_fifth_generation_is_a_few_lines_of_data(fifth: SimpleNamespace, folder: Path, tmp_path: Path) -> None:
    model = fifth.ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = fifth.ChatGLMTokenizer.from_pretrained(folder)
    assert model.config.model_version == tokenizer.model_version == "chatglm5"
    response, history = model.chat(tokenizer, "你好")
    assert history == [("你好", response)]
    prompt = tokenizer.build_prompt("再见", history)
    assert prompt.startswith("[Round 7]") and "[Round 8]" in prompt
    assert tokenizer.stop_token_ids() == [tokenizer.get_command("eop")]
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = fifth.ChatGLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.model_version == "chatglm5"
    assert again.chat(fifth.ChatGLMTokenizer.from_pretrained(tmp_path / "saved"), "你好") == (response, history)
    again.quantize(8)
    ids = tokenizer("你好", return_tensors="pt").input_ids
    assert (again(ids).logits - model(ids).logits).abs().max() < 0.1 * model(ids).logits.abs().max()


def test_its_network_is_chosen_by_its_features(fifth: SimpleNamespace, folder: Path) -> None:
    load = fifth.ChatGLMForConditionalGeneration.from_pretrained
    ids = torch.arange(5, 25).view(1, -1)
    logits = {
        version: load(folder, model_version=version, dtype=torch.float32)(ids).logits
        for version in ("chatglm5", "chatglm2", "chatglm3")
    }
    assert torch.equal(logits["chatglm5"], logits["chatglm2"])
    assert not torch.allclose(logits["chatglm5"], logits["chatglm3"])


def test_the_generation_is_unknown_before(chatglm: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="chatglm5"):
        chatglm.ChatGLMConfig(model_version="chatglm5")
