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
"""What other engines read of a folder: keys of config.json, names of weights, attributes of tokenizers.

The engines themselves run in `make test-engines`. This is what they rely on, read in their sources: vLLM 0.32,
llama.cpp's converter as of llama-cpp-python 0.3.36, xgrammar 0.2.8, outlines 1.3.3; and SGLang 0.5.23 and LMDeploy 0.18.0,
which need a GPU and were not run.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generations import CAUSAL_GENERATIONS, GENERATION_CASES, RECORDED, TINY, every_generation
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


# What vLLM's classes `ChatGLMConfig` and `ChatGLMForCausalLM` read. SGLang's and LMDeploy's read no others.
VLLM_KEYS = (
    *("add_bias_linear", "add_qkv_bias", "apply_residual_connection_post_layernorm", "ffn_hidden_size"),
    *("fp32_residual_connection", "hidden_dropout", "hidden_size", "kv_channels", "layernorm_epsilon"),
    *("multi_query_attention", "multi_query_group_num", "num_attention_heads", "num_layers", "original_rope"),
    *("padded_vocab_size", "post_layer_norm", "rmsnorm", "rope_ratio", "seq_length", "tie_word_embeddings"),
)
# What llama.cpp's converter reads beside them.
LLAMA_KEYS = ("vocab_size",)
ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
LAYER_WEIGHTS = (
    *("input_layernorm.weight", "mlp.dense_4h_to_h.weight", "mlp.dense_h_to_4h.weight"),
    *("post_attention_layernorm.weight", "self_attention.dense.weight"),
    *("self_attention.query_key_value.bias", "self_attention.query_key_value.weight"),
)
OTHER_WEIGHTS = (
    *("transformer.embedding.word_embeddings.weight", "transformer.encoder.final_layernorm.weight"),
    "transformer.output_layer.weight",
)
CAUSAL_CASES = [name for name in GENERATION_CASES if RECORDED[name].is_causal]
SENTENCEPIECE_CASES = ["chatglm2", "chatglm3"]

Tokenizers = Callable[[str], PreTrainedTokenizerBase]


@pytest.mark.parametrize("version", CAUSAL_GENERATIONS)
def test_keys_of_a_saved_configuration(tiny_config: Callable[..., Any], version: str) -> None:
    saved = tiny_config(**TINY[version]).to_diff_dict()
    assert not {*VLLM_KEYS, *LLAMA_KEYS} - saved.keys()
    assert saved["vocab_size"] == saved["padded_vocab_size"] == 99
    assert saved["original_rope"] is True and saved["model_type"] == "chatglm"


@every_generation
def test_no_engine_takes_a_saved_configuration_for_another_model(
    tiny_config: Callable[..., Any], version: str
) -> None:
    saved = tiny_config(**TINY[version]).to_diff_dict()
    # vLLM asks whether the first is there, and builds ChatGLM-6B as its successors unless the last is missing.
    assert not {"vision_config", "boi_token_id", "eoi_token_id"} & saved.keys()
    assert ("original_rope" in saved) == (version in CAUSAL_GENERATIONS)


def test_values_of_a_file_are_kept(chatglm: Any) -> None:
    again = chatglm.ChatGLMConfig.from_dict({"model_version": "glm4", "original_rope": False, "padded_vocab_size": 64})
    assert again.to_diff_dict()["original_rope"] is False
    # Where somebody changes one of the two names in a file, the published one counts.
    changed = {**again.to_diff_dict(), "padded_vocab_size": 128}
    assert chatglm.ChatGLMConfig.from_dict(changed).vocab_size == 128


@pytest.mark.parametrize("name", CAUSAL_CASES)
def test_names_of_weights_and_class(case_model: Callable[[str], PreTrainedModel], name: str) -> None:
    model = case_model(name)
    layers = range(model.config.num_hidden_layers)
    expected = {f"transformer.encoder.layers.{layer}.{weight}" for layer in layers for weight in LAYER_WEIGHTS}
    assert set(model.state_dict()) == expected | {*OTHER_WEIGHTS}
    assert type(model).__name__ in ARCHITECTURES


@pytest.mark.parametrize("name", CAUSAL_CASES)
def test_what_names_the_class(case_model: Callable[[str], PreTrainedModel], tmp_path: Path, name: str) -> None:
    case_model(name).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    # LMDeploy looks here, vLLM there; SGLang there too, but for the name in published files alone.
    assert saved["auto_map"]["AutoModelForCausalLM"].split(".")[-1] == "ChatGLMForConditionalGeneration"
    assert set(saved["architectures"]) <= {*ARCHITECTURES}


@pytest.mark.parametrize("name", SENTENCEPIECE_CASES)
def test_pieces_for_llama_cpp(case_tokenizer: Tokenizers, name: str) -> None:
    tokenizer: Any = case_tokenizer(name)
    pieces = tokenizer.tokenizer.sp_model
    assert pieces.vocab_size() == len(pieces) < len(tokenizer)
    for index in (0, 1, 2, 3, len(pieces) - 1):
        assert isinstance(pieces.get_score(index), float)
        assert {pieces.is_unknown(index), pieces.is_control(index), pieces.is_byte(index)} <= {True, False}
    vocabulary = tokenizer.get_vocab()
    # Ids of the padding of the embeddings, too.
    for index in range(512):
        piece = tokenizer._convert_id_to_token(index)
        assert isinstance(piece, str) and (piece == "" or vocabulary[piece] == index)


def test_bytes_for_llama_cpp(case_tokenizer: Tokenizers) -> None:
    tokenizer: Any = case_tokenizer("glm4")
    added = tokenizer.get_added_vocab()
    assert {"<|endoftext|>", "<|user|>"} <= added.keys() and max(tokenizer.vocab.values()) < 512
    assert all(tokenizer.added_tokens_decoder[index].content == token for token, index in added.items())


@pytest.mark.parametrize("name", CAUSAL_CASES)
def test_what_says_how_tokens_become_bytes(case_tokenizer: Tokenizers, name: str) -> None:
    """xgrammar looks for the kind of decoder, and for the pieces of bytes."""
    tokenizer: Any = case_tokenizer(name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.is_fast
    is_byte_level = '"type":"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
    has_bytes = '"type":"ByteFallback"' in tokenizer.backend_tokenizer.to_str()
    assert (is_byte_level, has_bytes) == ((False, True) if name in SENTENCEPIECE_CASES else (True, False))
    assert ("<0x0A>" in tokenizer.get_vocab()) == has_bytes


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_what_every_engine_asks_a_tokenizer(case_tokenizer: Tokenizers, name: str) -> None:
    tokenizer: Any = case_tokenizer(name)
    vocabulary = tokenizer.get_vocab()
    assert vocabulary[tokenizer.eos_token] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in tokenizer.stop_token_ids()
    assert set(tokenizer.all_special_tokens) <= vocabulary.keys()
    # outlines asks for the text of each token alone.
    texts = {tokenizer.convert_tokens_to_string([token]) for token in list(vocabulary)[:400]}
    assert all(isinstance(text, str) for text in texts) and len(texts) > 100


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_vllm_wraps_a_copy_of_a_tokenizer(case_tokenizer: Tokenizers, name: str) -> None:
    tokenizer: Any = case_tokenizer(name)
    wrapped = copy.copy(tokenizer)
    wrapped.__class__ = type("Cached", (type(tokenizer),), {"all_special_ids": property(lambda self: [0])})
    # The plug-in of examples/serving asks for it, and its server for the template.
    assert wrapped.chat_format is tokenizer.chat_format
    assert wrapped.get_chat_template() == tokenizer.chat_template
    text = wrapped.apply_chat_template(
        [{"role": "user", "content": "你好"}], tokenize=False, add_generation_prompt=True
    )
    ids = wrapped.encode(text, add_special_tokens=False)
    assert ids == tokenizer.build_chat_input("你好")["input_ids"][0].tolist()
