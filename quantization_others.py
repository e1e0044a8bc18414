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
"""What do other methods of quantization, the library's, need to be told about these networks?

What is unusual here:

- Each of them (bitsandbytes, torchao, GPTQ, AWQ) finds layers in a way of its own, and what it does not find it leaves as it
  is without a word.
"""

import copy
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from .linear_cpu import ChatGLMLinear


# What other methods leave as it is, unless they are told otherwise: the library itself knows of the output layer alone.
# As patterns of whole names, of modules and of weights.
KEPT_BY_OTHERS = [rf"(transformer\.)?{name}" for name in ("output_layer", "vision", "prefix_encoder")]
# Where the configurations of other methods have such names: bitsandbytes, and torchao and the rest.
KEPT_SETTINGS = ("llm_int8_skip_modules", "modules_to_not_convert")


def complete_settings_of_others(quantization_config: Any, path_of_layers: str) -> Any:
    """A copy of a `quantization_config` that leaves the output layer, GLM-4V's eyes and a prefix as they are.

    Args:
        quantization_config: of another method, an object or a dictionary.
        path_of_layers: what GPTQ is told to quantize, the name of the list of layers.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    completed = copy.copy(quantization_config)
    for name in KEPT_SETTINGS:
        if getattr(completed, name, ()) is None:
            setattr(completed, name, list(KEPT_BY_OTHERS))
    if completed.quant_method == "gptq" and completed.block_name_to_quantize is None:
        completed.block_name_to_quantize = path_of_layers
    return completed


def check_path_of_layers(model: PreTrainedModel) -> None:
    """Raise a `ValueError` if GPTQ is to find layers where there are none: it would leave them out without a word."""
    settings = getattr(model.config, "quantization_config", None)
    path = getattr(settings, "block_name_to_quantize", None)
    if path is not None and path not in dict(model.named_modules()):
        raise ValueError(
            f"GPTQ quantizes `{path}`, which `{type(model).__name__}` does not have. Use a model with a head."
        )


def use_layers_of_torch(model: PreTrainedModel) -> None:
    """Make the linear layers torch's own, for another method to replace them.

    bitsandbytes looks for that very class (Transformers 5.23), and would quantize nothing without a word.
    """
    for module in model.modules():
        if type(module) is ChatGLMLinear:
            module.__class__ = nn.Linear


__all__ = ["check_path_of_layers", "complete_settings_of_others", "use_layers_of_torch"]
