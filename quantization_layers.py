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
"""What a quantized linear layer is.

What is unusual here:

- `weight` always holds the published bytes. A processor that multiplies faster with another order of them gets a copy
  beside it (see `DerivedWeight`), which is never saved or pickled.
- A scale is never rounded once it is made: `model.to(torch.bfloat16)` leaves it alone.
- Layers are recognised by an attribute, not by their class, which may come from another checkpoint's copy of this file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .kernels_llvm import Scratch, Step, computed_by_steps
from .quantization_kernels import (
    DerivedWeight,
    dequantize_weight,
    derive_weight,
    find_steps,
    quantize_weight,
    quantized_linear,
)


QUANT_METHOD = "chatglm"


@computed_by_steps()
class QuantizedLinear(nn.Linear):
    """A linear layer with int8 or int4 weight, named in files as published: `weight`, `weight_scale`, `bias`.

    It is an `nn.Linear` for PEFT, and has a gradient to its input. `weight` is int8 `[out, in]`, or `[out, in / 2]` for
    4 bits; `weight_scale` is `[out]` or `[out, in / group_size]`.

    Args:
        linear: the layer whose sizes and bias are taken over. Codes and scales are on the meta device until
            `quantize_` or a checkpoint gives them.
        bits: 8 or 4.
        group_size: columns that share a scale (with 4 bits only), or `None` for whole rows.
        scale_dtype: dtype of the scales.
    """

    quant_method = QUANT_METHOD

    def __init__(
        self, linear: nn.Linear, bits: int, group_size: int | None = None, scale_dtype: torch.dtype = torch.float16
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, group_size if bits == 4 else None
        codes = torch.empty(self.out_features, self.in_features * bits // 8, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        groups = () if self.group_size is None else (self.in_features // self.group_size,)
        scale = torch.empty(self.out_features, *groups, dtype=scale_dtype, device="meta")
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)
        self.derived: DerivedWeight | None = None

    def quantize_(self, weight: torch.Tensor, method: str = "absmax") -> "QuantizedLinear":
        """Take the codes and scales of a float weight `[out, in]`, on its device."""
        # Tensors made under `inference_mode` could never be trained on.
        with torch.inference_mode(False):
            codes, scale = quantize_weight(weight, self.bits, method, self.group_size, self.weight_scale.dtype)
            self.weight = nn.Parameter(codes, requires_grad=False)
            self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.derive()
        return self

    def derive(self) -> None:
        """Make what this device needs beside the codes for fast products, unless it is there or nothing is needed."""
        if self.derived is None or not self.derived.belongs_to(self.weight):
            self.derived = derive_weight(self.weight, self.weight_scale, self.in_features)

    @property
    def W_q(self) -> torch.Tensor:
        """The codes. PEFT calls `dequantize` of layers that have an attribute of this name (DoRA needs it)."""
        return self.weight

    def reset_parameters(self) -> None:
        """There is nothing to draw: `init_quantized_linear` fills what no checkpoint fills."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Autocast does not know the meta device.
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # Read once, as another thread may be moving the layer.
        weight, derived = self.weight, self.derived
        if derived is None or not derived.belongs_to(weight):
            return quantized_linear(x, weight, self.weight_scale, self.bias)
        return quantized_linear(x, weight, self.weight_scale, self.bias, derived.packed, derived.packed_scales)

    def find_steps(self, x: torch.Tensor, output: torch.Tensor, scratch: Scratch) -> list[Step] | None:
        """The steps that compute this layer on a CPU, `[rows, in]` -> `[rows, out]`, if kernels do."""
        if self.derived is not None:
            return None
        return find_steps(x, self.weight, self.weight_scale, self.bias, output, scratch)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as floats, `[out, in]`; by default in the dtype of the bias, or else of the scale."""
        dtype = dtype or (self.weight_scale if self.bias is None else self.bias).dtype
        return dequantize_weight(self.weight, self.weight_scale, self.in_features, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        # `.to`, `.half()` and `.cuda()` share this (torch 2.6 to 2.13). A scale is never rounded, as threads may be using it.
        def keep_scale(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_cast = tensor is self.weight_scale and moved.dtype != tensor.dtype and not moved.is_meta
            return tensor.to(moved.device) if is_cast else moved

        super()._apply(keep_scale, recurse)
        self.derive()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # `load_state_dict` of any module arrives here (torch 2.6 to 2.13). Torch would copy floats into codes, or round.
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}weight_scale")
        if weight is not None and weight.dtype != torch.int8:
            message = f"`{prefix}weight` is {weight.dtype}, but this layer holds int{self.bits} codes. "
            args[-1].append(message + "Load it into a float model, and call `quantize` then.")
            return
        if scale is not None:
            self.weight_scale = nn.Parameter(self.weight_scale.to(scale.dtype), requires_grad=False)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.derived = None  # It may have been made from the older scales.
        self.derive()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "derived": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.derive()

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}, bits={self.bits}{groups}"


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether this is a `QuantizedLinear`, of whatever copy of this file."""
    return getattr(module, "quant_method", None) == QUANT_METHOD


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if is_quantized_layer(module)}


def init_quantized_linear(module: QuantizedLinear, std: float) -> None:
    """Fill a layer that no checkpoint filled as if normal weights had been quantized."""
    # The library marks what it loaded. What is on the disk stays on the meta device.
    if not module.weight.is_meta and not getattr(module.weight, "_is_hf_initialized", False):
        weight = torch.empty(module.out_features, module.in_features, device=module.weight.device)
        module.quantize_(weight.normal_(0.0, std))
    if module.bias is not None:
        init.zeros_(module.bias)


def refuse_tensor_parallelism(distributed_config: Any) -> None:
    """Raise a `ValueError` if the library's `DistributedConfig` asks to split the layers."""
    tp_plan, tp_size = (getattr(distributed_config, name, None) for name in ("tp_plan", "tp_size"))
    if tp_plan or (tp_size or 1) > 1:
        raise ValueError(
            "Tensor parallelism (`tp_plan`, `tp_size`) cannot split quantized weights: a scale belongs to a whole row. "
            'Split float weights, or leave it out and use `device_map="auto"`.'
        )


__all__ = [
    "QUANT_METHOD",
    "QuantizedLinear",
    "init_quantized_linear",
    "is_quantized_layer",
    "quantized_layers",
    "refuse_tensor_parallelism",
]
