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
"""Keys and values that grow in place.

What is unusual here:

- The library's dynamic cache copies all that it holds for every new token. Here each layer's memory has room behind it
  that new tokens are written to, so a token costs what reading the cache costs and no more.
- Where something else needs the old tensors unchanged (gradients) or cannot follow (compilation), layers grow as the
  library's do, which they are.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


# Below this many bytes a copy is quicker than looking for room.
SMALL = 1 << 16
# Tokens that find room at least, and their share of those that are there.
LEAST_ROOM, SHARE_OF_ROOM = 64, 8


def is_front_of(held: torch.Tensor, room: torch.Tensor | None) -> bool:
    """Whether `held` is the front of `room`; it is something else after beams were reordered, for one."""
    return (
        room is not None
        and held.data_ptr() == room.data_ptr()
        and held.stride() == room.stride()
        and held.shape[:2] == room.shape[:2]
        # Outside of inference mode nothing may be written to its tensors.
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )


def make_room(held: torch.Tensor, room: torch.Tensor | None, num_new: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put places for new tokens, with anything in them, behind `held`, `[batch, heads, tokens, head_dim]`.

    Args:
        held: what is there.
        room: what an earlier call returned.
        num_new: how many tokens come.

    Returns:
        All of it, and the memory that it is the front of.
    """
    num_held = held.shape[-2]
    num_tokens = num_held + num_new
    if not is_front_of(held, room) or room is None or room.shape[-2] < num_tokens:
        num_places = num_tokens + max(num_tokens // SHARE_OF_ROOM, LEAST_ROOM)
        room = held.new_empty((*held.shape[:2], num_places, held.shape[-1]))
        if num_held > 0:
            room[:, :, :num_held].copy_(held)
    return room.narrow(2, 0, num_tokens), room


def append(
    held: torch.Tensor, room: torch.Tensor | None, new: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Put `new` behind `held`, which is of any shape if there is nothing yet. Returns what `make_room` does."""
    num_new = new.shape[-2]
    whole, room = make_room(held if held.numel() > 0 else new[:, :, :0], room, num_new)
    whole[:, :, -num_new:].copy_(new)
    return whole, room


class GrowingLayer(DynamicLayer):
    """A layer of a dynamic cache with room behind its keys and values."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.key_room: torch.Tensor | None = None
        self.value_room: torch.Tensor | None = None
        # Tokens that the rooms hold. Fewer are held after a crop, and whoever kept the others must find them unchanged.
        self.num_written = 0

    def __reduce__(self) -> tuple[type, tuple[()], dict[str, Any]]:
        """Copies and pickles are the library's layers, without the room: exported programs and files know no other."""
        state = {
            name: held for name, held in vars(self).items() if name not in ("key_room", "value_room", "num_written")
        }
        state |= {name: held.contiguous() for name, held in state.items() if isinstance(held, torch.Tensor)}
        return DynamicLayer, (), state

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        is_plain = type(key_states) is torch.Tensor and key_states.dtype == self.dtype
        is_fixed = torch.is_grad_enabled() or torch.compiler.is_compiling()
        is_small = (self.keys.numel() + key_states.numel()) * key_states.element_size() < SMALL
        if not is_plain or is_fixed or is_small:
            self.key_room = self.value_room = None
        self.leave_changed_room()
        if not is_plain or is_fixed or is_small:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.key_room = append(self.keys, self.key_room, key_states)
        self.values, self.value_room = append(self.values, self.value_room, value_states)
        self.num_written = self.keys.shape[-2]
        return self.keys, self.values

    def leave_changed_room(self) -> None:
        """Forget the rooms if something else than this class has changed what is held."""
        if self.keys.shape[-2:-1] != (self.num_written,):
            self.key_room = self.value_room = None

    def add_place(self) -> None:
        """Hold one more token, whose keys and values the caller writes. The layer has to hold some already."""
        self.leave_changed_room()
        self.keys, self.key_room = make_room(self.keys, self.key_room, 1)
        self.values, self.value_room = make_room(self.values, self.value_room, 1)
        self.num_written = self.keys.shape[-2]


def give_room(layer: DynamicLayer) -> GrowingLayer:
    """The same layer, with room for what comes next."""
    grown = GrowingLayer()
    grown.__dict__.update(layer.__dict__)
    return grown


def let_cache_grow(cache: Cache | None) -> None:
    """Make the layers of a dynamic cache layers with room.

    Args:
        cache: any cache; those of other kinds, and those that offload their layers, stay what they are.
    """
    if torch.compiler.is_compiling() or not isinstance(cache, DynamicCache) or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    if any(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [give_room(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]


__all__ = ["GrowingLayer", "let_cache_grow"]
