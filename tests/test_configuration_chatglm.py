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
"""The configuration: every published file, both vocabularies, what is saved, what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generations import RECORDED
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging


pytestmark = pytest.mark.floor

GENERATIONS = {name: case.model_version for name, case in RECORDED.items()}
NAMES = [
    ("num_layers", "num_hidden_layers"),
    ("padded_vocab_size", "vocab_size"),
    ("seq_length", "max_position_embeddings"),
    ("max_sequence_length", "max_position_embeddings"),
    ("ffn_hidden_size", "intermediate_size"),
    ("inner_hidden_size", "intermediate_size"),
    ("kv_channels", "head_dim"),
    ("multi_query_group_num", "num_key_value_heads"),
    ("layernorm_epsilon", "rms_norm_eps"),
]


@pytest.fixture(scope="module")
def config_class(source: Callable[[str], Any]) -> Any:
    return source("configuration_chatglm").ChatGLMConfig


@pytest.fixture(scope="module")
def infer(source: Callable[[str], Any]) -> Callable[[dict[str, Any]], str | None]:
    return source("configuration_chatglm").infer_model_version


def published(reference_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((reference_dir / name / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", GENERATIONS)
def test_published_file_parses_and_saves_under_published_names(
    copy_code: Callable[[Path], None], reference_dir: Path, tmp_path: Path, name: str
) -> None:
    file = published(reference_dir, name)
    # The folder's own name must not give the generation away.
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(reference_dir / name / "config.json", folder)
    copy_code(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_version == GENERATIONS[name]
    for key, value in file.items():
        if key not in ("_name_or_path", "torch_dtype", "transformers_version"):
            assert getattr(config, key) == value, key
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["model_version"] == GENERATIONS[name]
    renewed = {"_name_or_path", "torch_dtype", "transformers_version", "num_hidden_layers", "auto_map"}
    assert {key: saved.get(key) for key in file if key not in renewed} == {
        key: value for key, value in file.items() if key not in renewed
    }
    again = type(config).from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(("published_name", "name"), NAMES)
def test_both_names_are_one_value(config_class: Any, published_name: str, name: str) -> None:
    config = config_class()
    first, second = (0.5, 0.25) if name == "rms_norm_eps" else (16, 8)
    setattr(config, published_name, first)
    assert getattr(config, name) == first
    setattr(config, name, second)
    assert getattr(config, published_name) == second
    for key in (published_name, name):
        changes = {"num_attention_heads": 8, key: second}
        assert getattr(config_class(**changes), name) == changes[key]


def test_published_name_wins_in_a_file_and_overrides_win_over_both(config_class: Any, reference_dir: Path) -> None:
    file = published(reference_dir, "chatglm3") | {"vocab_size": 7, "num_hidden_layers": 99}
    config = config_class.from_dict(dict(file))
    assert (config.vocab_size, config.num_hidden_layers) == (512, 3)
    for override in ("num_layers", "num_hidden_layers"):
        config, unused = config_class.from_dict(dict(file), **{override: 5}, other=1, return_unused_kwargs=True)
        assert (config.num_layers, unused) == (5, {"other": 1})


@pytest.mark.parametrize(
    ("keys", "model_version"),
    [
        ({"model_version": "chatglm2", "_name_or_path": "THUDM/chatglm3-6b"}, "chatglm2"),
        ({"inner_hidden_size": 16384}, "chatglm"),
        ({"position_encoding_2d": True, "vocab_size": 150528}, "chatglm"),
        ({"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}, "glm4"),
        ({"eos_token_id": 2, "pad_token_id": 0, "_name_or_path": "THUDM/chatglm2-6b-int4"}, "chatglm2"),
        ({"_name_or_path": "zai-org/chatglm3-6b-128k"}, "chatglm3"),
        ({"_name_or_path": "THUDM/codegeex2-6b"}, "chatglm2"),
        ({"_name_or_path": "THUDM/codegeex4-all-9b"}, "glm4"),
        ({"name_or_path": "/models/glm-4-9b-chat"}, "glm4"),
        ({"num_layers": 28}, None),
        # Trainers like to pad with the end token.
        ({"eos_token_id": [2, 64795], "pad_token_id": 2, "_name_or_path": "THUDM/chatglm3-6b"}, "chatglm3"),
    ],
)
def test_generation_is_inferred(infer: Callable[..., Any], keys: dict[str, Any], model_version: str | None) -> None:
    assert infer(keys) == model_version


def test_unknown_generation_is_chatglm3_and_says_which_key_settles_it(
    config_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert config_class.from_dict({"num_layers": 2}).model_version == "chatglm3"
    assert '"model_version": "chatglm2"' in caplog.text
    caplog.clear()
    transformers_logging.warning_once.cache_clear()
    assert config_class.from_dict({"num_layers": 2}, model_version="chatglm2").model_version == "chatglm2"
    assert config_class().model_version == "chatglm3"
    assert caplog.text == ""


def test_chatglm_6b_gets_its_own_defaults(config_class: Any) -> None:
    config = config_class(model_version="chatglm", num_attention_heads=8, hidden_size=64)
    assert (config.rmsnorm, config.add_bias_linear, config.tie_word_embeddings) == (False, True, True)
    assert (config.multi_query_attention, config.num_key_value_heads, config.head_dim) == (False, 8, 8)
    assert config_class(multi_query_attention=False, num_attention_heads=8).num_key_value_heads == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_layers": 0}, "num_hidden_layers.*0"),
        ({"num_layers": "three"}, "num_hidden_layers.*'three'"),
        ({"hidden_size": -4}, "hidden_size.*-4"),
        ({"num_attention_heads": 0}, "num_attention_heads.*0"),
        ({"num_attention_heads": 6, "multi_query_group_num": 4}, "6.*4"),
        ({"kv_channels": 6}, "head_dim.*6"),
        ({"padded_vocab_size": 0}, "vocab_size.*0"),
        ({"rope_ratio": 0}, "rope_ratio.*0"),
        ({"rope_ratio": float("nan")}, "rope_ratio.*nan"),
        ({"quantization_bit": 3}, "quantization_bit.*3"),
        ({"pre_seq_len": 0}, "pre_seq_len.*0"),
        ({"hidden_dropout": 1.5}, "hidden_dropout.*1.5"),
        ({"model_version": "glm5"}, "model_version.*'glm5'"),
        ({"torch_dtype": "half a float"}, "torch_dtype.*'half a float'"),
        ({"dtype": "nn"}, "dtype.*'nn'"),
        ({"torch_dtype": 16}, "torch_dtype.*16"),
        ({"to_dict": 1}, "`to_dict` is no setting"),
        ({"layernorm_epsilon": "small"}, "layernorm_epsilon"),
        ({"layernorm_epsilon": None}, "layernorm_epsilon"),
        ({"kv_channels": 8.0}, "kv_channels"),
        ({"prefix_lm": True}, "`prefix_lm` is no setting"),
    ],
)
def test_impossible_values_are_named(config_class: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class(**values)


@pytest.mark.parametrize("name", ["auto_map", "id2label", "quantization_config", "rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", [1, "a", True, [1], 0.5], ids=repr)
def test_a_setting_of_the_library_has_the_form_of_a_dict(config_class: Any, name: str, value: Any) -> None:
    # The oldest supported version of the library checks `id2label` itself, and first.
    ours, theirs = f"`{name}` must be a dict, got {re.escape(repr(value))}", f"'{name}'(.|\n)*dict"
    with pytest.raises((TypeError, StrictDataclassFieldValidationError), match=f"{ours}|{theirs}"):
        config_class.from_dict({name: value, "num_layers": 2, "model_version": "chatglm3"})


def test_wrong_type_is_named(config_class: Any) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match="hidden_size"):
        config_class(hidden_size="wide")


def test_overrides_are_validated_too(config_class: Any, reference_dir: Path) -> None:
    with pytest.raises(ValueError, match="pre_seq_len.*-1"):
        config_class.from_pretrained(reference_dir / "chatglm3", pre_seq_len=-1)


def test_an_older_library_is_named_with_the_remedy(
    source: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = source("configuration_chatglm")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.6")
    with pytest.raises(ImportError, match=r"5\.17.*4\.57\.6.*pip install"):
        exec(compile(Path(module.__file__).read_text(encoding="utf-8"), module.__file__, "exec"), {})


def test_models_with_other_eyes_are_refused(config_class: Any, reference_dir: Path) -> None:
    """As visualglm-6b has; half of its network would be left out."""
    with pytest.raises(ValueError, match="'eva_config', as visualglm-6b does: such eyes are not supported"):
        config_class.from_dict(published(reference_dir, "glm4") | {"eva_config": {}})
    assert config_class.from_dict(published(reference_dir, "glm4") | {"eva_config": None}).model_version == "glm4"


def test_the_published_file_of_glm_4v(config_class: Any, reference_dir: Path, tmp_path: Path) -> None:
    config = config_class.from_pretrained(reference_dir / "glm4v")
    assert (config.model_version, config.boi_token_id, config.eoi_token_id) == ("glm4v", 490, 491)
    assert config.vision_config == published(reference_dir, "glm4v")["vision_config"]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["vision_config"] == config.vision_config
    assert saved["auto_map"]["AutoModelForImageTextToText"] == "modeling_chatglm.ChatGLMForConditionalGeneration"
