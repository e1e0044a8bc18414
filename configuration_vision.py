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
"""The sizes of GLM-4V's eyes: the dict `vision_config` of its `config.json`, in the published names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class VisionSettings:
    """What `vision_config` says. The defaults are those of GLM-4V-9B."""

    image_size: int = 1120
    patch_size: int = 14
    num_positions: int = 6401
    in_channels: int = 3
    hidden_size: int = 1792
    num_heads: int = 16
    num_hidden_layers: int = 63
    intermediate_size: int = 15360
    hidden_act: str = "gelu"
    dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-6
    scaling_factor: float = 8.0

    @property
    def grid(self) -> int:
        """How many patches stand side by side in a picture."""
        return self.image_size // self.patch_size

    @property
    def num_patch_vectors(self) -> int:
        """How many vectors the decoder gets for a picture, without those of its begin and its end.

        Two by two patches become one vector; the last row and column of an odd number of patches are left out.
        """
        return (self.grid // 2) ** 2

    @classmethod
    def from_dict(cls, settings: Any) -> "VisionSettings":
        """Read `vision_config`. Keys that are not known are left alone.

        Raises:
            TypeError: if it is no dict.
            ValueError: for a size that no picture or network can have, with its name and value.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"`vision_config` must be a dict, got {settings!r}.")
        known = {field.name for field in fields(cls)}
        vision = cls(**{name: value for name, value in settings.items() if name in known})
        vision.validate()
        return vision

    def validate(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), isinstance(field.default, int)
            if field.name in ("hidden_act", "dropout_prob"):
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not value > 0:
                kind = "whole number" if whole else "number"
                raise ValueError(f"`vision_config.{field.name}` must be a positive {kind}, got {value!r}.")
        if self.hidden_act != "gelu":
            raise ValueError(f'`vision_config.hidden_act` must be "gelu", got {self.hidden_act!r}.')
        if isinstance(self.dropout_prob, bool) or not isinstance(self.dropout_prob, (int, float)):
            raise ValueError(f"`vision_config.dropout_prob` must be a number, got {self.dropout_prob!r}.")
        if not 0 <= self.dropout_prob < 1:
            raise ValueError(f"`vision_config.dropout_prob` must lie in [0, 1), got {self.dropout_prob!r}.")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"`vision_config.hidden_size` ({self.hidden_size}) must be a multiple of `num_heads` ({self.num_heads})."
            )
        if self.num_patch_vectors == 0 or self.num_positions != self.grid**2 + 1:
            raise ValueError(
                f"`vision_config.num_positions` must be {self.grid**2 + 1} for pictures of {self.image_size} pixels in "
                f"patches of {self.patch_size}, at least two by two of them; got {self.num_positions}."
            )


__all__ = ["VisionSettings"]
