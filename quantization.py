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
"""Int8 and int4 weights in the format of the published checkpoints.

What is unusual here:

- The four linears of every layer are quantized, and the output layer on request; embeddings, norms and biases stay
  as they are. Rounding is symmetric without a zero point, with one scale for each row of a weight.
- int4 packs two columns into a byte, the even one in the high four bits.
- Quantizing divides in float32 and clamps. The published code divides in the dtype of the weight, and in bfloat16 the
  largest weight of a row may then wrap around to the opposite sign.
- A scale is never rounded once it is made: `model.to(torch.bfloat16)` leaves it alone.
- There are three ways in: `model.quantize(bits)`, `from_pretrained(..., quantization_config=...)`, and checkpoints that
  are quantized already. The last two go through `ChatGLMQuantizer`, which the library finds by the name "chatglm".
- On a CPU an int4 weight is repacked at its first use, into a copy beside it that saving and moving drop.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantization_kernels import dequantize_weight, pack_weight, quantized_linear, unpack_int4


QUANT_METHOD = "chatglm"
LAYER_LINEARS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")

# Fractions of the largest scale that `method="mse"` tries: 1, which wins a draw, 7/8 where -8 is the largest code, and
# 0.6, 0.62, ... 0.98.
SCALE_FRACTIONS = (1.0, 7 / 8, *(0.6 + 0.02 * step for step in range(20)))

# Weights that are quantized at a time, in elements: what a float32 copy of them takes is four times as many bytes.
QUANTIZED_ELEMENTS = 2**24


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Int4 codes, int8 `[out, in]` with an even number of columns -> int8 `[out, in / 2]`, even columns high."""
    return (codes[:, 0::2] << 4) | (codes[:, 1::2] & 15)


def largest_scale(groups: torch.Tensor, largest_code: int) -> torch.Tensor:
    """`max|weight| / largest_code`, and 1 for a group of zeros: `[rows, groups, columns]` -> `[rows, groups]`."""
    largest = groups.abs().amax(-1)
    return torch.where(largest == 0, 1.0, largest / largest_code)


def encode(groups: torch.Tensor, scale: torch.Tensor, smallest_code: int, largest_code: int) -> torch.Tensor:
    """`round(weight / scale)`, halves to even, clamped; `[rows, groups, columns]` in float32."""
    return (groups / scale[..., None]).round_().clamp_(smallest_code, largest_code)


def best_scale(groups: torch.Tensor, largest_code: int) -> torch.Tensor:
    """The scale of least squared error among fractions of the largest one, `[rows, groups, columns]` -> `[rows, groups]`.

    Clipping the few largest weights of a group lets the others be rounded more finely.
    """
    full_scale = largest_scale(groups, largest_code)
    scale, least_error = full_scale, torch.full_like(full_scale, math.inf)
    for fraction in SCALE_FRACTIONS:
        tried = full_scale * fraction
        codes = encode(groups, tried, -largest_code - 1, largest_code)
        error = codes.mul_(tried[..., None]).sub_(groups).square_().sum(-1)
        scale = torch.where(error < least_error, tried, scale)
        least_error = torch.minimum(error, least_error)
    return scale


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor,
    bits: int,
    method: str = "absmax",
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the weight of a linear layer: `code = round(weight / scale)`, `scale = max|weight| / (2^(bits - 1) - 1)`.

    The formula and the bytes are those of the published ChatGLM checkpoints.

    Args:
        weight: `[out, in]`, any float dtype, on any device.
        bits: 8 or 4.
        method: `"absmax"` as published, or `"mse"`, the scale of least squared error in the same format.
        group_size: columns that share a scale; `None` for whole rows, as published.
        scale_dtype: by default float32 for float32 weights and float16 for others. A row of zeros has the scale 1.

    Returns:
        Codes, int8 `[out, in]` or packed `[out, in / 2]`, and scales, `[out]` or `[out, in / group_size]`.
    """
    out_features, in_features = weight.shape
    largest_code = 2 ** (bits - 1) - 1
    smallest_code = -largest_code - 1 if method == "mse" else -largest_code
    if scale_dtype is None:
        scale_dtype = torch.float32 if weight.dtype == torch.float32 else torch.float16
    codes = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scales = []
    for rows, target in zip(*(t.split(max(1, QUANTIZED_ELEMENTS // in_features)) for t in (weight, codes))):
        groups = rows.float().view(len(rows), -1, group_size or in_features)
        scale = best_scale(groups, largest_code) if method == "mse" else largest_scale(groups, largest_code)
        # Weights so small that float16 has no scale for them are zeros.
        scale = scale.to(scale_dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        scales.append(scale)
        target.copy_(encode(groups, scale.float(), smallest_code, largest_code).view_as(target))
    scale = torch.cat(scales)
    return pack_int4(codes) if bits == 4 else codes, scale if group_size else scale[:, 0].contiguous()


def unpack_first(module: "QuantizedLinear", *args: Any) -> None:
    """Hook before codes are read or written under their published name. Not a lambda, which cannot be pickled."""
    module.unpack()


class QuantizedLinear(nn.Linear):
    """A linear layer with int8 or int4 weight, named in files as published: `weight`, `weight_scale`, `bias`.

    It is an `nn.Linear` for PEFT, and has a gradient to its input. `weight` is int8 `[out, in]`, or `[out, in / 2]` for
    4 bits; `weight_scale` is `[out]` or `[out, in / group_size]`.

    Args:
        linear: the layer whose sizes and bias are taken over. Codes and scales are on the meta device until
            `quantize_` or a checkpoint gives them.
        bits: 8 or 4.
        group_size: columns of 4-bit weights that share a scale, or `None` for whole rows. With 8 bits, a scale for
            each row is precise enough.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, group_size if bits == 4 else None
        codes = torch.empty(self.out_features, self.in_features * bits // 8, dtype=torch.int8, device="meta")
        num_groups = self.in_features // group_size if self.group_size else None
        scale_shape = (self.out_features,) if num_groups is None else (self.out_features, num_groups)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale = torch.empty(scale_shape, dtype=torch.float32, device="meta")
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias
        self.train(linear.training)
        # What `pack_weight` made of the weight.
        self.packed: torch.Tensor | None = None
        self.packed_scales: torch.Tensor | None = None
        self.register_state_dict_pre_hook(unpack_first)
        self.register_load_state_dict_pre_hook(unpack_first)

    def quantize_(self, weight: torch.Tensor, method: str, scale_dtype: torch.dtype | None) -> "QuantizedLinear":
        """Take the codes and scales of a float weight `[out, in]`, on its device."""
        codes, scale = quantize_weight(weight, self.bits, method, self.group_size, scale_dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        return self

    def settle_scale(self) -> None:
        """Keep a scale that a file brought in float16, if it is one; it was loaded in float32 to lose nothing."""
        half = self.weight_scale.data.half()
        is_half = not half.is_meta and half.float().equal(self.weight_scale.data.float())
        self.weight_scale = nn.Parameter(half if is_half else self.weight_scale.data, requires_grad=False)

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
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled()) and self.is_worth_packing(x):
            self.pack()
        return quantized_linear(x, self.weight, self.weight_scale, self.bias, self.packed, self.packed_scales)

    def is_worth_packing(self, x: torch.Tensor) -> bool:
        """Whether a packed weight would be used for this input."""
        return self.packed is None and x.dtype in (torch.float16, torch.bfloat16)

    def pack(self) -> None:
        """Make the copy of the weight that this device multiplies with fastest, if it wants one."""
        packed = pack_weight(self.weight, self.weight_scale, self.in_features)
        if packed is not None:
            # In this order, for another thread that multiplies meanwhile.
            self.packed_scales, self.packed = packed[1], packed[0]

    def unpack(self) -> None:
        """Drop that copy."""
        self.packed = self.packed_scales = None

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as floats, `[out, in]`; by default in the dtype of the bias, or of the scale where there is none."""
        dtype = dtype or (self.weight_scale if self.bias is None else self.bias).dtype
        return dequantize_weight(self.weight, self.weight_scale, self.in_features, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        # The one place that `.to`, `.half()` and `.cuda()` share (torch 2.6 to 2.13); scales keep their dtype.
        self.unpack()
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype and not self.weight_scale.is_meta:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"{super().extra_repr()}, bits={self.bits}{groups}"


def init_quantized_linear(module: QuantizedLinear, std: float) -> None:
    """Fill a layer that no checkpoint filled as if normal weights had been quantized."""
    weight = torch.empty(module.out_features, module.in_features, device=module.weight.device).normal_(0.0, std)
    codes, scale = quantize_weight(weight, module.bits, group_size=module.group_size)
    init.copy_(module.weight, codes)
    init.copy_(module.weight_scale, scale)
    if module.bias is not None:
        init.zeros_(module.bias)


ALLOWED_SETTINGS = {
    "bits": (8, 4),
    "method": ("absmax", "mse"),
    "group_size": (None, 32, 64, 128),
    "output_layer_bits": (None, 8, 4),
}


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """How a model is quantized, for `from_pretrained(..., quantization_config=...)`; a dictionary does as well.

    Args:
        bits: 8 or 4.
        method: `"absmax"` as published, or `"mse"`: the scale of least squared error, in the same format.
        group_size: columns of int4 weights that share a scale, 32, 64 or 128; `None` for whole rows, as published.
        output_layer_bits: 8 or 4 to quantize the output layer too; `None` leaves it as it is, as published.

    Raises:
        ValueError: for any other value.
    """

    def __init__(
        self,
        bits: int = 8,
        method: str = "absmax",
        group_size: int | None = None,
        output_layer_bits: int | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.bits = bits
        self.method = method
        self.group_size = group_size
        self.output_layer_bits = output_layer_bits
        for name, allowed in ALLOWED_SETTINGS.items():
            value = getattr(self, name)
            if value not in allowed or isinstance(value, float):
                raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")

    @property
    def is_published_format(self) -> bool:
        """Whether the published code reads such a checkpoint, told by `quantization_bit` alone."""
        return self.group_size is None and self.output_layer_bits is None


def linears_to_quantize(model: nn.Module, settings: ChatGLMQuantizationConfig) -> dict[str, int]:
    """Names of the layers that the settings ask for, and their bits.

    Raises:
        TypeError: for a layer that is no plain linear layer, such as one with an adapter.
        ValueError: for a width that the settings do not divide.
    """
    base_model = model.base_model
    prefix = "" if base_model is model else f"{model.base_model_prefix}."
    num_layers = len(base_model.encoder.layers)
    bits = {f"{prefix}encoder.layers.{i}.{name}": settings.bits for i in range(num_layers) for name in LAYER_LINEARS}
    if settings.output_layer_bits is not None:
        bits[f"{prefix}output_layer"] = settings.output_layer_bits
    for name in bits:
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"Only plain linear layers can be quantized, but `{name}` is a {type(linear).__name__}. Quantize before "
                "adding adapters, or merge them first."
            )
        if linear.in_features % (settings.group_size or 2) != 0:
            raise ValueError(
                f"`{name}` has {linear.in_features} columns, which cannot be divided into groups of "
                f"{settings.group_size or 2}; choose another `group_size`."
            )
    return bits


def published_scale_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of all scales where the published code has a fixed one, else `None` for that of the weights."""
    # CODEPATH: chatglm-6b rounds scales to float16 first; chatglm2, chatglm3 and glm4 keep the dtype of the weight.
    name = model.config.published_scale_dtype
    return None if name is None else getattr(torch, name)


def quantize_layer(
    model: nn.Module, name: str, bits: int, settings: ChatGLMQuantizationConfig, weight: torch.Tensor | None = None
) -> QuantizedLinear:
    """Replace a linear layer by its quantized form, made from its own weight or from a given one."""
    linear = model.get_submodule(name)
    quantized = QuantizedLinear(linear, bits, settings.group_size)
    scale_dtype = published_scale_dtype(model)
    quantized.quantize_(linear.weight if weight is None else weight, settings.method, scale_dtype)
    model.set_submodule(name, quantized)
    return quantized


def untie_output_layer(model: nn.Module) -> None:
    """Let the output layer be quantized where it was the word embedding, which stays as it is."""
    model.config.tie_word_embeddings = False
    for module in model.modules():
        if hasattr(module, "get_expanded_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


class QuantizeWhileLoading(ConversionOps):
    """Quantizes a weight when it is read, so that no more than one is there in floats."""

    def __init__(self, settings: ChatGLMQuantizationConfig, bits: dict[str, int]) -> None:
        self.settings = settings
        self.bits = bits

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        weight = next(iter(input_dict.values()))
        weight = weight[0] if isinstance(weight, list) else weight
        name = full_layer_name.removesuffix(".weight")
        quantized = quantize_layer(model, name, self.bits[name], self.settings, weight)
        # The library assigns these to the new layer, and a bias that comes later.
        return {full_layer_name: quantized.weight.data, f"{name}.weight_scale": quantized.weight_scale.data}


class ChatGLMQuantizer(HfQuantizer):
    """What the library asks about a quantized ChatGLM model: how it is loaded, saved, trained and decoded."""

    def __init__(self, quantization_config: ChatGLMQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # The layers that are still to be quantized: all of a float model, none of a quantized checkpoint.
        self.waiting: dict[str, int] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        bits = linears_to_quantize(model, self.quantization_config)
        if not self.pre_quantized:
            self.waiting = bits
            return
        for name, layer_bits in bits.items():
            quantized = QuantizedLinear(model.get_submodule(name), layer_bits, self.quantization_config.group_size)
            model.set_submodule(name, quantized)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        name, _, tensor_name = param_name.rpartition(".")
        # A tied output layer has no weight of its own until everything is loaded.
        return tensor_name == "weight" and name in self.waiting and param_name not in model.all_tied_weights_keys

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, for device maps."""
        return self.quantization_config.bits / 8

    def get_quantize_ops(self) -> QuantizeWhileLoading:
        return QuantizeWhileLoading(self.quantization_config, self.waiting)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        settings = self.quantization_config
        for name, bits in self.waiting.items():
            # Layers of a model in memory, those that no file had, and a tied output layer.
            if not isinstance(model.get_submodule(name), QuantizedLinear):
                quantize_layer(model, name, bits, settings)
        self.waiting = {}
        if settings.output_layer_bits is not None:
            untie_output_layer(model)
        model.config.quantization_bit = settings.bits if settings.is_published_format else 0
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.settle_scale()

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(module.dequantize(dtype))
                linear.bias = module.bias
                model.set_submodule(name, linear.train(module.training))
        model.config.quantization_bit = 0
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on quantized weights."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer asks this of a model without adapters of PEFT, and P-tuning v2 is one."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


# Another checkpoint's copy of this file may have been loaded before.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(ChatGLMQuantizationConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(ChatGLMQuantizer)


class ChatGLMQuantizationMixin:
    """What every ChatGLM model can do about quantization."""

    def quantize(
        self,
        bits: int,
        method: str = "absmax",
        group_size: int | None = None,
        output_layer_bits: int | None = None,
    ) -> "ChatGLMQuantizationMixin":
        """Quantize the linear layers in place, one at a time, each on its own device.

        Args:
            bits, method, group_size, output_layer_bits: see [`ChatGLMQuantizationConfig`].

        Returns:
            The model itself.

        Raises:
            ValueError: for settings that do not exist, a model that is quantized already, weights that are offloaded
                or not finite. Nothing is changed then.
            TypeError: for a model with adapters.
        """
        settings = ChatGLMQuantizationConfig(bits, method, group_size, output_layer_bits)
        if getattr(self, "is_quantized", False):
            raise ValueError("This model is quantized already. Call `model.dequantize()` first.")
        for name in linears_to_quantize(self, settings):
            weight = self.get_submodule(name).weight
            if weight.is_meta:
                raise ValueError(
                    f"`{name}` is offloaded. Give `quantization_config` to `from_pretrained` to quantize while loading."
                )
            if not weight.isfinite().all():
                raise ValueError(f"`{name}` has weights that are not finite; no scale fits them.")
        quantizer = ChatGLMQuantizer(settings, pre_quantized=False)
        quantizer.preprocess_model(self)
        quantizer.postprocess_model(self)
        self.hf_quantizer = quantizer
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> "ChatGLMQuantizationMixin":
        """Turn quantized weights back into floats, by default of the dtype that the model has otherwise."""
        return super().dequantize(dtype or self.dtype)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # A model made from a configuration has float weights, whatever the checkpoint of that configuration has.
        if not getattr(self, "is_quantized", False):
            self.config.quantization_bit = 0
            self.config.__dict__.pop("quantization_config", None)
        return super().save_pretrained(*args, **kwargs)

    def half(self, *args: Any) -> "ChatGLMQuantizationMixin":
        # The library refuses this for every quantized model; here it is safe, and the published recipes call it.
        return self.to(torch.float16) if getattr(self, "is_quantized", False) else super().half(*args)

    def float(self, *args: Any) -> "ChatGLMQuantizationMixin":
        return self.to(torch.float32) if getattr(self, "is_quantized", False) else super().float(*args)


__all__ = [
    "ChatGLMQuantizationConfig",
    "ChatGLMQuantizationMixin",
    "ChatGLMQuantizer",
    "QuantizedLinear",
    "dequantize_weight",
    "init_quantized_linear",
    "pack_int4",
    "quantize_weight",
    "unpack_int4",
]
