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
"""The network of a folder that `scripts/export_native.py` wrote, for mlx-lm. A copy stands in the folder, as its `model_file`.

mlx-lm has a class of its own for `glm`, but that one (0.32.2) turns whole heads where the network turns the first half of
each, and takes no base and no factor from `rope_parameters`: its answers are wrong, and nothing says so. mlx-lm runs this
file with `trust_remote_code=True` alone, and refuses the folder otherwise.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_lm.models import glm
from mlx_lm.models.rope_utils import initialize_rope


@dataclass
class ModelArgs(glm.ModelArgs):
    """What mlx-lm reads of config.json: what its own class does, and `rope_parameters` as Transformers 5 writes them."""

    rope_parameters: dict[str, Any] = field(default_factory=dict)


class Model(glm.Model):
    """mlx-lm's own network, with the positions of `GlmForCausalLM`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        rope = args.rope_parameters
        turned = int(args.head_dim * rope["partial_rotary_factor"])
        for layer in self.layers:
            layer.self_attn.rope = initialize_rope(turned, rope["rope_theta"], traditional=True, scaling_config=rope)


__all__ = ["Model", "ModelArgs"]
