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
"""The eyes of GLM-4V: pictures to vectors that stand in the text.

What is unusual here:

- The tower is that of EVA2-CLIP-E (https://arxiv.org/abs/2303.15389). Its norms stand on what a sublayer returns, not on
  what it reads, whatever their published names say, and there is none before or after the layers.
- The first norm of the adapter has PyTorch's epsilon, not that of the configuration.
- Everything that goes to the decoder, both learnt vectors included, is divided by `scaling_factor`, last of all.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_chatglm import ChatGLMConfig
from .configuration_vision import VisionSettings
from .linear_cpu import ChatGLMLinear
from .modeling_layers import eager_attention_forward


class ChatGLMPatchEmbedding(nn.Module):
    """Pixels `[pictures, 3, size, size]` to `[pictures, 1 + patches, width]`, a vector for the class first."""

    def __init__(self, vision: VisionSettings) -> None:
        super().__init__()
        self.image_size = vision.image_size
        self.proj = nn.Conv2d(vision.in_channels, vision.hidden_size, vision.patch_size, stride=vision.patch_size)
        self.cls_embedding = nn.Parameter(torch.empty(1, vision.hidden_size))
        self.position_embedding = nn.Embedding(vision.num_positions, vision.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        classes = self.cls_embedding.expand(len(patches), -1, -1)
        # The module is called, as it may be offloaded: then there is no weight until it is.
        positions = torch.arange(patches.shape[1] + 1, device=patches.device)
        return torch.cat((classes, patches), dim=1) + self.position_embedding(positions)


class ChatGLMVisionAttention(nn.Module):
    """All patches see each other; one fused projection makes all queries, all keys, all values."""

    def __init__(self, config: ChatGLMConfig, vision: VisionSettings) -> None:
        super().__init__()
        self.config = config
        self.head_dim = vision.hidden_size // vision.num_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.dropout = vision.dropout_prob
        self.is_causal = False
        self.query_key_value = ChatGLMLinear(vision.hidden_size, 3 * vision.hidden_size)
        self.dense = ChatGLMLinear(vision.hidden_size, vision.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is added to the stream, and the attention's weights where its implementation has them."""
        heads = self.query_key_value(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        # In this order torch's CPU kernel takes three quarters of the time (2.13).
        query, key, value = heads.permute(2, 0, 3, 1, 4).contiguous()
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention_interface(self, query, key, value, None, scaling=self.scaling, is_causal=False)
        # As published, dropout is behind the projection, not on the attention's weights.
        return F.dropout(self.dense(output.reshape(hidden_states.shape)), self.dropout, self.training), weights


class ChatGLMVisionMLP(nn.Module):
    """Feed-forward with the exact GELU."""

    def __init__(self, vision: VisionSettings) -> None:
        super().__init__()
        self.fc1 = ChatGLMLinear(vision.hidden_size, vision.intermediate_size)
        self.fc2 = ChatGLMLinear(vision.intermediate_size, vision.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class ChatGLMVisionLayer(GradientCheckpointingLayer):
    """One layer of the tower: the outputs of attention and feed-forward are normed, then added to the stream."""

    def __init__(self, config: ChatGLMConfig, vision: VisionSettings) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.attention = ChatGLMVisionAttention(config, vision)
        self.mlp = ChatGLMVisionMLP(vision)
        self.post_attention_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.input_layernorm(self.attention(hidden_states)[0])
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class ChatGLMVisionTransformer(nn.Module):
    """The layers of the tower."""

    def __init__(self, config: ChatGLMConfig, vision: VisionSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ChatGLMVisionLayer(config, vision) for _ in range(vision.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class ChatGLMVisionAdapter(nn.Module):
    """From the tower to the decoder: a normed projection, then SwiGLU with two matrices of its own."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.linear_proj = ChatGLMLinear(hidden_size, hidden_size, bias=False)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.dense_h_to_4h = ChatGLMLinear(hidden_size, intermediate_size, bias=False)
        self.gate_proj = ChatGLMLinear(hidden_size, intermediate_size, bias=False)
        self.dense_4h_to_h = ChatGLMLinear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.gelu(self.norm1(self.linear_proj(hidden_states)))
        return self.dense_4h_to_h(F.silu(self.gate_proj(hidden_states)) * self.dense_h_to_4h(hidden_states))


class ChatGLMVisionModel(nn.Module):
    """Pictures to what stands in their places in the text."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        vision = VisionSettings.from_dict(config.vision_config)
        self.grid, self.scaling_factor = vision.grid, vision.scaling_factor
        self.pixel_shape = (vision.in_channels, vision.image_size, vision.image_size)
        self.patch_embedding = ChatGLMPatchEmbedding(vision)
        self.transformer = ChatGLMVisionTransformer(config, vision)
        self.conv = nn.Conv2d(vision.hidden_size, config.hidden_size, 2, stride=2)
        self.linear_proj = ChatGLMVisionAdapter(config)
        self.boi = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.empty(1, 1, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """What the tower makes of pictures, and the vectors that stand in the text.

        Args:
            pixel_values: `[pictures, 3, image_size, image_size]`, normed as the image processor does it.

        Returns:
            `last_hidden_state`, the tower's, `[pictures, 1 + patches, width]`, and `pooler_output`, begin and end included,
            `[pictures, N + 2, hidden]`, N being `VisionSettings.num_patch_vectors`.

        Raises:
            ValueError: for pixels of another shape.
        """
        shape = getattr(pixel_values, "shape", type(pixel_values).__name__)
        if not isinstance(pixel_values, torch.Tensor) or tuple(shape[1:]) != self.pixel_shape:
            raise ValueError(
                f"Pictures must be a tensor [pictures, {', '.join(map(str, self.pixel_shape))}], got {shape}."
            )
        weight = self.patch_embedding.proj.weight
        # A weight that is offloaded is on the meta device until its module is called, and does not tell where that is.
        device = pixel_values.device if weight.is_meta else weight.device
        hidden_states = self.transformer(self.patch_embedding(pixel_values.to(device, weight.dtype)))
        patches = hidden_states[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        vectors = self.linear_proj(self.conv(patches).flatten(2).transpose(1, 2))
        begin, end = (vector.expand(len(vectors), -1, -1).to(vectors.device) for vector in (self.boi, self.eoi))
        features = torch.cat((begin, vectors, end), dim=1) / self.scaling_factor
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=features)


__all__ = ["ChatGLMVisionAttention", "ChatGLMVisionLayer", "ChatGLMVisionModel"]
