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
"""Which classes the Auto classes find in a folder that a model was saved to."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from generations import GENERATION_CASES
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification


@pytest.mark.parametrize(
    ("name", "auto_class"),
    [(name, AutoModel) for name in GENERATION_CASES] + [("chatglm3", AutoModelForSequenceClassification)],
)
def test_a_saved_folder_names_every_class(
    name: str,
    auto_class: type,
    case_folder: Callable[[str], Path],
    source: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    auto_class.from_pretrained(case_folder(name), trust_remote_code=True).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]
    assert auto_map == source("configuration_generations").AUTO_MAP
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(model).__name__ == "ChatGLMForConditionalGeneration"


def test_a_model_without_a_folder_names_every_class(
    case_folder: Callable[[str], Path], source: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(case_folder("chatglm1"), trust_remote_code=True)
    del config.auto_map["AutoModelForSeq2SeqLM"]
    AutoModel.from_config(config, trust_remote_code=True).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["auto_map"]
    assert auto_map == source("configuration_generations").AUTO_MAP


def test_names_of_a_hub_become_local_and_own_classes_stay(source: Callable[[str], ModuleType]) -> None:
    module = source("configuration_chatglm")
    published = {
        "AutoConfig": "THUDM/chatglm3-6b--configuration_chatglm.ChatGLMConfig",
        "AutoModel": "THUDM/chatglm3-6b--modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "mine.MyModel",
        "AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None],
    }
    saved = module.ChatGLMConfig(auto_map=published).to_diff_dict()["auto_map"]
    kept = {name: published[name] for name in ("AutoModelForCausalLM", "AutoTokenizer")}
    assert saved == module.AUTO_MAP | kept
    assert "auto_map" not in module.ChatGLMConfig().to_diff_dict()
