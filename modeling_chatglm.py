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
"""The ChatGLM decoder.

What is unusual here:

- Module names are those of the published checkpoints (`transformer.encoder.layers.0.self_attention.query_key_value`,
  ...), so weights load without renaming and adapters trained elsewhere fit. The output layer is a part of the base
  model, as in the published files.
- Queries, keys and values come from one projection, gate and up from another.
- Rotary positions turn only the first half of every head, in interleaved pairs (0, 1), (2, 3), ...
- `rope_ratio` stretches positions in ChatGLM2 and raises the base in ChatGLM3 and GLM-4.
- A prefix of P-tuning v2 is the initial content of the cache; real tokens still count from position 0.
- A mask never hides everything from a query: padding positions get some attention instead of NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_chatglm import ChatGLMConfig
from .generation_chatglm import ChatGLMGenerationMixin


class ChatGLMRMSNorm(nn.Module):
    """RMSNorm (https://arxiv.org/abs/1910.07467): `weight * x / sqrt(mean(x²) + eps)`, in float32, rounded once."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)
        normed = F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        # The residual stream may be float32 while the layers compute in half precision.
        return normed.to(self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class ChatGLMLayerNorm(nn.LayerNorm):
    """LayerNorm with bias, in float32, rounded once."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


def make_norm(config: ChatGLMConfig) -> nn.Module:
    """The norm that the configuration asks for."""
    # CODEPATH: chatglm2, chatglm3, glm4 use RMSNorm; chatglm-6b LayerNorm.
    norm_class = ChatGLMRMSNorm if config.rmsnorm else ChatGLMLayerNorm
    return norm_class(config.hidden_size, eps=config.layernorm_epsilon)


class ChatGLMMLP(nn.Module):
    """SwiGLU feed-forward (https://arxiv.org/abs/2002.05202), gate and up in one projection."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up_states = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up_states)


class ChatGLMRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (https://arxiv.org/abs/2104.09864), for half of each head."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = "default"
        inv_freq, self.attention_scaling = self.compute_default_rope_parameters(config)
        # Two buffers under the names that the library recomputes after building a model on the meta device.
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: ChatGLMConfig, device: torch.device | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Frequencies `base^(-2i / dim)` in float32, shape `[head_dim / 4]`, and a scaling of 1 for cos and sin."""
        dim = config.head_dim // 2
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        # CODEPATH: chatglm2-6b-32k divides the position by the ratio; chatglm3-6b-32k/-128k and glm4 raise the base.
        if config.model_version == "chatglm2":
            return 10000.0**-exponents / config.rope_ratio, 1.0
        return (10000.0 * config.rope_ratio) ** -exponents, 1.0

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Half precision cannot tell neighbouring positions apart beyond 2048.
        angles = position_ids[:, None, :, None].float() * self.inv_freq.float()  # [batch, 1, seq, head_dim / 4]
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved pairs of the first half of each head.

    Args:
        states: queries or keys, `[batch, heads, seq, head_dim]`.
        cos, sin: `[batch, 1, seq, head_dim / 4]`.

    Returns:
        `[batch, heads, seq, head_dim]`, the second half of `head_dim` unchanged.
    """
    rotary_dim = 2 * cos.shape[-1]
    rotated, kept = states[..., :rotary_dim], states[..., rotary_dim:]
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated, kept), dim=-1)


def repeat_kv(states: torch.Tensor, num_key_value_groups: int) -> torch.Tensor:
    """`[batch, kv_heads, seq, head_dim]` -> `[batch, kv_heads * num_key_value_groups, seq, head_dim]`."""
    return states if num_key_value_groups == 1 else states.repeat_interleave(num_key_value_groups, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; returns the output `[batch, seq, heads, head_dim]` and the attention weights."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # [batch, heads, seq, kv_seq]
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ChatGLMAttention(nn.Module):
    """Attention with one fused query/key/value projection."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_size = config.num_attention_heads * self.head_dim
        self.key_value_size = config.num_key_value_heads * self.head_dim
        qkv_size = self.query_size + 2 * self.key_value_size
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, qkv_size, bias=qkv_bias)
        self.dense = nn.Linear(self.query_size, config.hidden_size, bias=config.add_bias_linear)

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[batch, seq, fused]` -> queries, keys and values, each `[batch, heads, seq, head_dim]`."""
        # CODEPATH: chatglm2, chatglm3, glm4: all queries, then all keys, then all values.
        if self.config.multi_query_attention:
            parts = qkv.split((self.query_size, self.key_value_size, self.key_value_size), dim=-1)
            return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        # CODEPATH: chatglm-6b: query, key and value of head 0, then those of head 1, ...
        return qkv.unflatten(-1, (-1, 3 * self.head_dim)).transpose(1, 2).chunk(3, dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_states, key_states, value_states = self.split_heads(self.query_key_value(hidden_states))
        query_states = apply_rotary_pos_emb(query_states, *position_embeddings)
        key_states = apply_rotary_pos_emb(key_states, *position_embeddings)

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.dense(attn_output.flatten(2)), attn_weights


class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer: attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.residual_post_layernorm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = make_norm(config)
        self.self_attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = ChatGLMMLP(config)

    def add_residual(self, inputs: torch.Tensor, normed: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add a sublayer's output to its input, or to the norm of its input. All `[batch, seq, hidden]`."""
        residual = normed if self.residual_post_layernorm else inputs
        return residual + F.dropout(output, p=self.hidden_dropout, training=self.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attention(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self.add_residual(hidden_states, normed, attn_output)
        normed = self.post_attention_layernorm(hidden_states)
        return self.add_residual(hidden_states, normed, self.mlp(normed))


class ChatGLMEncoder(nn.Module):
    """The stack of layers and, where there is one, the final norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        # CODEPATH: every published checkpoint has the final norm; models trained without it take the else.
        self.final_layernorm = make_norm(config) if config.post_layer_norm else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.final_layernorm(hidden_states)


class PrefixEncoder(nn.Module):
    """The trained prefix of P-tuning v2 (https://arxiv.org/abs/2110.07602): keys and values for every layer."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.pre_seq_len = config.pre_seq_len
        self.num_layers = config.num_hidden_layers
        self.num_key_value_heads = config.num_key_value_heads
        kv_size = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
        self.embedding = nn.Embedding(config.pre_seq_len, kv_size)
        self.prefix_projection = config.prefix_projection
        if self.prefix_projection:
            # Their published keys are `trans.0` and `trans.2`.
            self.trans = nn.Sequential(  # trf-ignore: TRF036
                nn.Linear(kv_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, kv_size)
            )
        self.dropout = nn.Dropout(0.1)

    def forward(self, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, `[batch, kv_heads, prefix, head_dim]` each."""
        prefix = self.embedding.weight  # [prefix, layers * 2 * kv_heads * head_dim]
        if self.prefix_projection:
            prefix = self.trans(prefix)
        prefix = prefix.view(self.pre_seq_len, self.num_layers, 2, self.num_key_value_heads, -1)
        prefix = prefix.expand(batch_size, -1, -1, -1, -1, -1).permute(2, 3, 0, 4, 1, 5)
        # [layers, 2, batch, kv_heads, prefix, head_dim]; every row of the batch has a dropout mask of its own.
        return [(layer[0], layer[1]) for layer in self.dropout(prefix)]


def unmask_empty_rows(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Let queries that may see nothing (padding) see everything, since a softmax over nothing is NaN.

    Args:
        attention_mask: what `create_causal_mask` returned; only 4-D tensors `[batch, 1, seq, kv_seq]` are changed.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 4 or attention_mask.shape[2] == 1:
        return attention_mask
    if attention_mask.dtype == torch.bool:
        return attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
    is_empty = (attention_mask == torch.finfo(attention_mask.dtype).min).all(dim=-1, keepdim=True)
    return attention_mask.masked_fill(is_empty, 0.0)


@auto_docstring
class ChatGLMPreTrainedModel(PreTrainedModel):
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # Published files store these buffers; they follow from the configuration.
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq$"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading replaces the parameters by new ones, which all require a gradient.
        if model.base_model.prefix_encoder is not None:
            model.base_model.freeze_all_but_prefix()
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embedding.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.base_model.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.base_model.output_layer = new_embeddings


@auto_docstring(custom_intro="The decoder without a head on top, usable alone as a text encoder.")
class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        if config.model_version == "chatglm":
            raise ValueError("`model_version='chatglm'` (ChatGLM-6B) has no network here yet, only its configuration.")
        if config.quantization_bit:
            raise ValueError(
                f"`quantization_bit={config.quantization_bit}`: quantized checkpoints cannot be loaded yet. Use the "
                "checkpoint with float weights."
            )
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size)})
        self.rotary_pos_emb = ChatGLMRotaryEmbedding(config)
        self.encoder = ChatGLMEncoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.prefix_encoder = None
        # CODEPATH: checkpoints with a P-tuning prefix; no published base model has one.
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
            self.freeze_all_but_prefix()
        self.gradient_checkpointing = False
        self.post_init()

    def freeze_all_but_prefix(self) -> None:
        """P-tuning v2 trains the prefix and nothing else."""
        self.requires_grad_(False)
        self.prefix_encoder.requires_grad_(True)

    def add_prefix(self, past_key_values: Cache | None, inputs_embeds: torch.Tensor) -> Cache:
        """Put the prefix into a cache that holds nothing yet, making the cache if there is none."""
        past_key_values = DynamicCache() if past_key_values is None else past_key_values
        if not past_key_values.is_initialized:
            for layer_idx, (keys, values) in enumerate(self.prefix_encoder(inputs_embeds.shape[0])):
                past_key_values.update(keys.to(inputs_embeds.dtype), values.to(inputs_embeds.dtype), layer_idx)
        return past_key_values

    def make_position_ids(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.LongTensor:
        """Positions `[batch or 1, seq]`: real tokens count from 0, padding is 0 and a prefix has none."""
        seq_len = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            positions = attention_mask.long().cumsum(-1) - 1
            return positions.masked_fill(attention_mask == 0, 0)[:, -seq_len:]
        past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
        if self.prefix_encoder is not None:
            past_seen_tokens = past_seen_tokens - self.config.pre_seq_len
        return (torch.arange(seq_len, device=inputs_embeds.device) + past_seen_tokens).unsqueeze(0)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(
        custom_intro="""
        Run the decoder. Real tokens count from position 0 by default, and the attention mask leaves a P-tuning prefix
        out. `hidden_states[0]` are the embeddings and `hidden_states[i]` the output of layer `i`; the last one is
        before the final norm, as published.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if self.prefix_encoder is not None:
            past_key_values = self.add_prefix(past_key_values, inputs_embeds)
        if position_ids is None:
            position_ids = self.make_position_ids(inputs_embeds, attention_mask, past_key_values)
        if self.prefix_encoder is not None and attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = F.pad(attention_mask, (self.config.pre_seq_len, 0), value=1)

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        # CODEPATH: no published checkpoint keeps the residual stream in float32; the flag is for trainers.
        hidden_states = inputs_embeds.float() if self.config.fp32_residual_connection else inputs_embeds
        hidden_states = self.encoder(
            hidden_states,
            position_embeddings=self.rotary_pos_emb(inputs_embeds, position_ids),
            attention_mask=unmask_empty_rows(mask),
            past_key_values=past_key_values,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states.to(inputs_embeds.dtype),
            past_key_values=past_key_values if use_cache else None,
        )


@auto_docstring(
    custom_intro="The language model: `generate`, and `chat` in the conversation format of its generation."
)
class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, ChatGLMGenerationMixin):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Predict the next token at every position. Labels are the input ids, with -100 where no loss is wanted; they are
        shifted here, and the loss is computed in float32.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(custom_intro="A linear classifier on the last real token of each row.")
class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Classify the last real token of each row. Padding may be on either side, but must be masked.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        last_token = -1
        if attention_mask is not None:
            real_tokens = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device)
            last_token = (real_tokens * torch.arange(hidden_states.shape[1], device=hidden_states.device)).argmax(-1)
        logits = self.classifier_head(self.dropout(hidden_states[rows, last_token]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
]
