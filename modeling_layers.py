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
"""The layers of the ChatGLM decoder.

What is unusual here:

- Queries, keys and values come from one projection, gate and up from another.
- Rotary positions turn only the first half of every head, in interleaved pairs (0, 1), (2, 3), ...; `rope_ratio`
  stretches positions in ChatGLM2 and raises the base in ChatGLM3 and GLM-4.
- In ChatGLM-6B a token has two positions, and each turns one half of every head. Its residual starts from the output
  of the norm, scaled; so does that of GLM-130B, where one position turns the whole head.
- In GLM nothing is turned: positions are a part of the embeddings.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_chatglm import ChatGLMConfig
from .decoding_cpu import decode
from .kernels_layers import attend, norm_rows
from .kernels_llvm import computed_by_steps
from .linear_cpu import ChatGLMLinear


@cache
def constant(value: float) -> torch.Tensor:
    """A number as a float32 tensor on the CPU, where making one costs as much time as computing with it."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


@computed_by_steps(settings=("variance_epsilon",))
class ChatGLMRMSNorm(nn.Module):
    """RMSNorm (https://arxiv.org/abs/1910.07467): `weight * x / sqrt(mean(x²) + eps)`, in float32, rounded once."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self.weight
        dtype = weight.dtype
        if (normed := norm_rows(hidden_states, weight, self.variance_epsilon)) is not None:
            return normed
        # Tensors of other classes are traced: a constant that was made for them would be kept for all.
        is_plain = type(hidden_states) is torch.Tensor and hidden_states.device.type == "cpu"
        # In training `F.rms_norm` keeps less for the gradient.
        if torch.is_grad_enabled() or not is_plain or dtype == torch.float64 or torch.compiler.is_compiling():
            weight = weight.to(hidden_states.dtype)
            # The residual stream may be float32 while the layers compute in half precision.
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon).to(dtype)
        # The same in half as many operators as `F.rms_norm` is made of on CPUs (torch 2.13).
        hidden_states = hidden_states.float()
        length = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
        variance = torch.addcmul(constant(self.variance_epsilon), length, length, value=1 / hidden_states.shape[-1])
        return (hidden_states * variance.rsqrt_()).mul_(weight.float()).to(dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


@computed_by_steps(settings=("eps",))
class ChatGLMLayerNorm(nn.LayerNorm):
    """LayerNorm with bias, in float32, rounded once."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == self.weight.dtype:
            # torch computes in float32 and rounds at the end by itself.
            return super().forward(hidden_states)
        weight, bias = self.weight.float(), self.bias.float()
        normed = F.layer_norm(hidden_states.float(), self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


def make_norm(config: ChatGLMConfig) -> nn.Module:
    """The norm that the configuration asks for."""
    # CODEPATH: chatglm2, chatglm3, glm4 use RMSNorm; chatglm-6b, glm and glm-130b LayerNorm.
    norm_class = ChatGLMRMSNorm if config.rmsnorm else ChatGLMLayerNorm
    return norm_class(config.hidden_size, eps=config.layernorm_epsilon)


# CODEPATH: chatglm2, chatglm3, glm4 have the first, chatglm-6b the second, glm and glm-130b the exact GELU.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


@computed_by_steps("activate", settings=("activation", "is_gated", "gate_comes_first"))
class ChatGLMMLP(nn.Module):
    """Feed-forward: SwiGLU or GeGLU (https://arxiv.org/abs/2002.05202) with both halves in one projection, or GELU."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        bias = config.add_bias_linear
        # CODEPATH: chatglm2, chatglm3, glm4 and glm-130b have a gate; chatglm-6b and glm have none.
        self.is_gated = config.is_mlp_gated
        # CODEPATH: chatglm2, chatglm3, glm4 activate the first half of a gated layer; glm-130b the second.
        self.gate_comes_first = config.gate_comes_first
        self.activation = config.activation
        up_size = 2 * config.intermediate_size if self.is_gated else config.intermediate_size
        self.dense_h_to_4h = ChatGLMLinear(config.hidden_size, up_size, bias=bias)
        self.dense_4h_to_h = ChatGLMLinear(config.intermediate_size, config.hidden_size, bias=bias)

    def activate(self, states: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[self.activation](states)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up_states = self.dense_h_to_4h(hidden_states)
        if not self.is_gated:
            return self.dense_4h_to_h(self.activate(up_states))
        gate, up_states = up_states.chunk(2, dim=-1)
        if not self.gate_comes_first:
            gate, up_states = up_states, gate
        activated = self.activate(gate)
        # A prompt's states are so large that new memory for them is mapped page by page, 3 % of its time on a CPU.
        activated = activated * up_states if torch.is_grad_enabled() else activated.mul_(up_states)
        return self.dense_4h_to_h(activated)


def count_turned_channels(config: ChatGLMConfig) -> int:
    """How many channels of a head one position turns."""
    # CODEPATH: glm-130b turns the whole head by one position, as chatglm-6b may; the others turn half a head.
    return config.head_dim if config.rotary_whole_head else config.head_dim // 2


class ChatGLMRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (https://arxiv.org/abs/2104.09864)."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = "default"
        inv_freq, self.attention_scaling = self.compute_default_rope_parameters(config)
        # The library recomputes buffers of these two names after it has built a model on the meta device.
        self.inv_freq: torch.Tensor = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq: torch.Tensor = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: ChatGLMConfig, device: torch.device | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Frequencies `base^(-2i / dim)` in float32, shape `[dim / 2]`, and a scaling of 1 for cos and sin."""
        dim = count_turned_channels(config)
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        # CODEPATH: chatglm-6b and glm-130b were trained with frequencies that were rounded once.
        if config.rounds_rotary_frequencies:
            return (1.0 / 10000.0**exponents).half().float(), 1.0
        # CODEPATH: chatglm2-6b-32k divides the position by the ratio; chatglm3-6b-32k/-128k and glm4 raise the base.
        if config.scales_positions:
            return 10000.0**-exponents / config.rope_ratio, 1.0
        return (10000.0 * config.rope_ratio) ** -exponents, 1.0

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions `[batch, seq]` or, in two dimensions, `[batch, 2, seq]` -> cos, sin `[batch, 1, seq, 1 or 2, freq]`."""
        position_ids = position_ids.unflatten(0, (-1, 1)) if position_ids.ndim == 2 else position_ids
        inv_freq = self.inv_freq
        # `model.half()` rounds buffers too, and half precision cannot tell neighbouring positions apart beyond 2048.
        if inv_freq.dtype != torch.float32:
            inv_freq, _ = self.compute_default_rope_parameters(self.config, inv_freq.device)
        angles = position_ids.transpose(1, 2)[:, None, :, :, None].float() * inv_freq
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def spread_rotary_tables(
    cos: torch.Tensor, sin: torch.Tensor, head_dim: int, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `apply_rotary_pos_emb` multiplies each channel and its partner with, made once for all layers.

    Args:
        cos, sin: `[batch, 1, seq, positions, frequencies]`; each position turns `2 * frequencies` channels.
        head_dim: channels of a head; those beyond the turned ones get the factors 1 and 0.
        interleaved: pairs are (0, 1), (2, 3), ...; otherwise the first half of those channels with the second half.

    Returns:
        Two tensors `[batch, 1, seq, head_dim]`.
    """
    pair_dim = -1 if interleaved else -2
    own = torch.stack((cos, cos), dim=pair_dim).flatten(-3)
    partner = torch.stack((-sin, sin), dim=pair_dim).flatten(-3)
    num_unturned = head_dim - own.shape[-1]
    if num_unturned == 0:
        return own, partner
    return F.pad(own, (0, num_unturned), value=1.0), F.pad(partner, (0, num_unturned))


def apply_rotary_pos_emb(
    states: torch.Tensor, own: torch.Tensor, partner: torch.Tensor, pair_distance: int
) -> torch.Tensor:
    """Rotate pairs of channels by the angles of their positions.

    Args:
        states: queries and keys, `[..., head_dim]`.
        own, partner: factors from `spread_rotary_tables` that broadcast to the states.
        pair_distance: how far apart the channels of a pair are.
    """
    partners = states.view(*states.shape[:-1], -1, 2, pair_distance).flip(-2).flatten(-3)
    return torch.addcmul(states * own, partners, partner)


def repeat_kv(states: torch.Tensor, num_key_value_groups: int) -> torch.Tensor:
    """`[batch, kv_heads, seq, head_dim]` -> `[batch, kv_heads * num_key_value_groups, seq, head_dim]`."""
    return states if num_key_value_groups == 1 else states.repeat_interleave(num_key_value_groups, dim=1)


def eager_attention_forward(
    module: Any,
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


# Keys of one layer that are turned into float32 for a token. A larger copy would be given new memory for every token,
# which takes longer than float16 does.
MOST_IN_FLOAT32 = 2**22
# Tokens of a prompt from which on all states are turned into float32.
LEAST_IN_FLOAT32 = 32

# Stands in for the attention module when query heads are folded: then each head has its own keys, and sees all of them.
FOLDED_HEADS = SimpleNamespace(num_key_value_groups=1, is_causal=False)


@computed_by_steps("make_states", settings=("layer_idx", "scaling", "pair_distance", "is_qkv_interleaved"))
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
        # CODEPATH: chatglm2, chatglm3, glm4 turn neighbours; chatglm-6b and glm-130b turn halves.
        self.pair_distance = 1 if config.rotary_interleaved else count_turned_channels(config) // 2
        # CODEPATH: chatglm2, chatglm3, glm4 and glm: all queries, all keys, all values; chatglm-6b, glm-130b by head.
        self.is_qkv_interleaved = config.is_qkv_interleaved
        self.num_query_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        query_size = self.num_query_heads * self.head_dim
        qkv_size = query_size + 2 * self.num_key_value_heads * self.head_dim
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = ChatGLMLinear(config.hidden_size, qkv_size, bias=qkv_bias)
        self.dense = ChatGLMLinear(query_size, config.hidden_size, bias=config.add_bias_linear)

    def make_states(
        self, qkv: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, ...]:
        """`[batch, seq, fused]` -> turned queries and keys, and values, each `[batch, heads, seq, head_dim]`."""
        # On CPUs, one token costs as much time as there are operators. Queries and keys are turned together.
        batch_size, seq_len, _ = qkv.shape
        # CODEPATH: glm, whose positions are in the embeddings.
        if position_embeddings is None:
            return qkv.view(batch_size, seq_len, 3, -1, self.head_dim).transpose(1, 3).unbind(2)
        own, partner = position_embeddings
        if self.is_qkv_interleaved:
            heads = qkv.view(batch_size, seq_len, -1, 3, self.head_dim).transpose(1, 2)
            own, partner = own.unsqueeze(-2), partner.unsqueeze(-2)
            turned = apply_rotary_pos_emb(heads[..., :2, :], own, partner, self.pair_distance)
            return *turned.unbind(3), heads[..., 2, :]
        heads = qkv.view(batch_size, seq_len, -1, self.head_dim).transpose(1, 2)
        num_turned = self.num_query_heads + self.num_key_value_heads
        turned = apply_rotary_pos_emb(heads[:, :num_turned], own, partner, self.pair_distance)
        return turned[:, : self.num_query_heads], turned[:, self.num_query_heads :], heads[:, num_turned:]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix_cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.query_key_value(hidden_states)
        query_states, key_states, value_states = self.make_states(qkv, position_embeddings)
        # Gradient checkpointing, which needs `prefix_cache`, sets `past_key_values` to None.
        held = past_key_values if prefix_cache is None else prefix_cache
        if held is not None:
            key_states, value_states = held.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # One token on a CPU: the kernel stands for torch's, which takes several times as long as reading the cache.
        if attention_mask is None and attention_interface is sdpa_attention_forward and "cache" not in kwargs:
            attended = attend(query_states, key_states, value_states, self.scaling)
            if attended is not None:
                return self.dense(attended), None
        module: Any = self
        value_dtype = value_states.dtype
        is_folded = attention_mask is None and self.should_fold_query_heads(attention_interface, query_states)
        if is_folded:
            module = FOLDED_HEADS
            query_states, key_states, value_states = self.fold_heads(query_states, key_states, value_states)
        elif self.should_attend_in_float32(attention_interface, query_states, key_states, attention_mask):
            query_states, key_states, value_states = (s.float() for s in (query_states, key_states, value_states))
        attn_output, attn_weights = attention_interface(
            module,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:2], -1).to(value_dtype)
        return self.dense(attn_output), attn_weights

    def fold_heads(self, *states: torch.Tensor) -> list[torch.Tensor]:
        """`[batch, heads, seq, head_dim]` -> `[batch * kv_heads, 1, groups or seq, head_dim]`.

        One query for each head becomes several queries for each head of keys and values. float16 becomes float32, in
        which torch's CPU kernel takes a fifth of the time at 512 tokens and half at 16384 (2.13).
        """
        num_folded = states[0].shape[0] * self.num_key_value_heads
        folded = [part.reshape(num_folded, 1, -1, self.head_dim) for part in states]
        is_slow = folded[0].dtype == torch.float16 and folded[1].numel() <= MOST_IN_FLOAT32
        return [part.float() for part in folded] if is_slow else folded

    def should_attend_in_float32(
        self,
        attention_interface: Callable,
        query_states: torch.Tensor,
        key_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> bool:
        """Whether prompts in float16 take less time in float32: in torch's CPU kernel, three quarters of it (2.13)."""
        return (
            attention_interface is sdpa_attention_forward
            and query_states.dtype == key_states.dtype == torch.float16
            and query_states.device.type == "cpu"
            and query_states.shape[2] >= LEAST_IN_FLOAT32
            # Other masks have to have the dtype of the states.
            and (attention_mask is None or attention_mask.dtype == torch.bool)
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )

    def should_fold_query_heads(self, attention_interface: Callable, query_states: torch.Tensor) -> bool:
        """Whether one query for each head is quicker without grouped heads.

        For grouped heads torch's CPU kernel takes ten times as long (2.13).
        """
        return (
            attention_interface is sdpa_attention_forward
            and query_states.shape[2] == 1
            and query_states.device.type == "cpu"
            and self.num_key_value_groups > 1
            and not torch.compiler.is_compiling()
        )


@computed_by_steps("add_residual", settings=("residual_scale", "residual_post_layernorm"))
class ChatGLMBlock(GradientCheckpointingLayer):
    """One layer: attention and feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.residual_post_layernorm = config.apply_residual_connection_post_layernorm
        self.residual_scale = config.residual_scale
        self.input_layernorm = make_norm(config)
        self.self_attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = ChatGLMMLP(config)

    def add_residual(self, inputs: torch.Tensor, normed: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Add a sublayer's output to its input, or to the norm of its input. All `[batch, seq, hidden]`."""
        residual = normed if self.residual_post_layernorm else inputs
        if self.training:
            output = F.dropout(output, p=self.hidden_dropout)
        return torch.add(output, residual, alpha=self.residual_scale)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
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
        self.config = config
        self.head_dim, self.rotary_interleaved = config.head_dim, config.rotary_interleaved
        self.layers = nn.ModuleList([ChatGLMBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        # CODEPATH: every published checkpoint has the final norm; models trained without it take the else.
        self.final_layernorm = make_norm(config) if config.post_layer_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        tables = None
        if position_embeddings is not None:
            tables = spread_rotary_tables(*position_embeddings, self.head_dim, self.rotary_interleaved)
        # The library drafts with the first layers alone by writing fewer of them here (`assistant_early_exit`).
        layers = list(islice(self.layers, self.config.num_hidden_layers))
        decoded = self.decode(layers, hidden_states, tables, **kwargs)
        if decoded is not None:
            return self.final_layernorm(decoded)
        for layer in layers:
            hidden_states = layer(hidden_states, position_embeddings=tables, **kwargs)
        return self.final_layernorm(hidden_states)

    def decode(
        self,
        layers: list[nn.Module],
        hidden_states: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix_cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | None:
        """All layers by one call, for one token of each sequence on a CPU, where nothing is asked for but the result."""
        is_plain = attention_mask is None and prefix_cache is None and past_key_values is not None and not kwargs
        if not is_plain or tables is None or hidden_states.shape[1] != 1:
            return None
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if attention_interface is not sdpa_attention_forward:
            return None
        return decode(self, layers, hidden_states, tables, past_key_values)


__all__ = ["ChatGLMAttention", "ChatGLMBlock", "ChatGLMEncoder", "ChatGLMRotaryEmbedding", "eager_attention_forward"]
