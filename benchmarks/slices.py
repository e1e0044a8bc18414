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
"""The models that are timed: ChatGLM's own widths, few layers, random weights; and the native model of the same weights."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GlmForCausalLM


# The examples' helper loads this checkout's code, and a script knows the native model's settings.
sys.path += [str(Path(__file__).resolve().parent.parent / folder) for folder in ("examples", "scripts")]

from export_native import native_config  # noqa: E402
from local_code import REPOSITORY, load_module, load_tokenizer  # noqa: E402


def build_slice(num_layers: int, dtype: torch.dtype, device: str = "cpu", **settings: Any) -> Any:
    """This repository's model at ChatGLM3-6B's width, unless `settings` of its configuration say otherwise."""
    model_class = load_module("modeling_chatglm").ChatGLMForConditionalGeneration
    config = model_class.config_class.from_pretrained(
        REPOSITORY, num_hidden_layers=num_layers, dtype=dtype, **settings
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def build_native(model: Any) -> GlmForCausalLM:
    """Transformers' native model of the same shape, on the very weights of ours, so it takes no memory of its own."""
    config = native_config(model.config, model.dtype, stop_ids=[2])
    with torch.device("meta"):
        native = GlmForCausalLM(config)
    # Its frequencies are no weights.
    native.model.rotary_emb = type(native.model.rotary_emb)(config).to(model.device)
    share_weights(model, native)
    return native.eval()


def share_weights(model: Any, native: Any) -> None:
    """Give the native model our weights: its query, key and value projections are parts of ours."""

    def share(module: nn.Module, weight: torch.Tensor, name: str = "weight") -> None:
        setattr(module, name, nn.Parameter(weight.detach()))

    for ours, theirs in zip(model.transformer.encoder.layers, native.model.layers):
        attention = theirs.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for name in ("weight", "bias"):
            parts = getattr(ours.self_attention.query_key_value, name).split([one.out_features for one in projections])
            for part, projection in zip(parts, projections):
                share(projection, part, name)
        share(attention.o_proj, ours.self_attention.dense.weight)
        share(theirs.mlp.gate_up_proj, ours.mlp.dense_h_to_4h.weight)
        share(theirs.mlp.down_proj, ours.mlp.dense_4h_to_h.weight)
        share(theirs.input_layernorm, ours.input_layernorm.weight)
        share(theirs.post_attention_layernorm, ours.post_attention_layernorm.weight)
    share(native.model.norm, model.transformer.encoder.final_layernorm.weight)
    share(native.model.embed_tokens, model.get_input_embeddings().weight)
    share(native.lm_head, model.get_output_embeddings().weight)


def repeat_layer(model: Any, num_layers: int) -> Any:
    """Give a model of one layer its published depth: all layers have the weights of the first.

    A layer is far larger than the processor's cache, so every one of them is read from memory as if it were another,
    and the time is that of the whole model, in the memory of one layer.
    """

    def repeat(block: nn.Module, index: int) -> nn.Module:
        block = copy.copy(block)
        block._modules = dict(block._modules)
        attention = copy.copy(block.self_attention)
        attention.layer_idx = index
        block.self_attention = attention
        return block

    encoder = model.transformer.encoder
    encoder.layers = nn.ModuleList([repeat(encoder.layers[0], index) for index in range(num_layers)])
    model.config.num_hidden_layers = num_layers
    return model


def read_bytes(model: Any) -> int:
    """Bytes that one token has to read: every weight but the input embedding, of which it takes a row."""
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    is_tied = getattr(output, "weight", None) is embedding
    # `parameters()` of the modules, not of the model, which counts a repeated layer once.
    layers = sum(parameter.nbytes for layer in model.transformer.encoder.layers for parameter in layer.parameters())
    return layers + sum(parameter.nbytes for parameter in output.parameters() if is_tied or parameter is not embedding)


__all__ = [
    "REPOSITORY",
    "build_native",
    "build_slice",
    "load_module",
    "load_tokenizer",
    "read_bytes",
    "repeat_layer",
    "share_weights",
]
