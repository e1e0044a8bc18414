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
"""How a model gets int8 and int4 weights in the published format, loads and saves them.

What is unusual here:

- The four linears of every layer are quantized, and on request the output layer and the linears of GLM-4V's eyes;
  embeddings, norms, biases stay. Rounding is symmetric, without a zero point, with one scale for each row of a weight.
- There are three ways in: `model.quantize(bits)`, `from_pretrained(..., quantization_config=...)`, and checkpoints that
  are quantized already. The last two go through `ChatGLMQuantizer`, which the library finds by the name "chatglm".
- The tensors of a checkpoint tell whether it is quantized. Where the configuration says otherwise, loading stops.
"""

import json
import re
import sys
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_utils import PreTrainedModel, load_state_dict
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .linear_cpu import ChatGLMLinear
from .quantization_kernels import WeightForm, dequantize_weight, pack_int4, quantize_weight, stored_form, unpack_int4
from .quantization_layers import (
    QUANT_METHOD,
    QuantizedLinear,
    init_quantized_linear,
    is_quantized_layer,
    quantized_layers,
    refuse_tensor_parallelism,
)
from .quantization_others import check_path_of_layers, complete_settings_of_others, use_layers_of_torch


logger = logging.get_logger(__name__)

try:
    from accelerate.hooks import add_hook_to_module
except ImportError:
    add_hook_to_module = None

LAYER_LINEARS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
# Of GLM-4V's eyes: those of every layer of the tower, and those of the adapter behind it.
TOWER_LINEARS = ("attention.query_key_value", "attention.dense", "mlp.fc1", "mlp.fc2")
ADAPTER_LINEARS = tuple(
    f"linear_proj.{name}" for name in ("linear_proj", "dense_h_to_4h", "gate_proj", "dense_4h_to_h")
)

ALLOWED_SETTINGS = {
    "bits": (8, 4),
    "method": ("absmax", "mse"),
    "group_size": (None, 32, 64, 128),
    "output_layer_bits": (None, 8, 4),
    "vision_bits": (None, 8, 4),
}


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """How a model is quantized, for `from_pretrained(..., quantization_config=...)`; a dictionary does as well.

    Args:
        bits: 8 or 4.
        method: `"absmax"` as published, or `"mse"`: the scale of least squared error, in the same format.
        group_size: columns of int4 weights that share a scale, 32, 64 or 128; `None` for whole rows, as published.
        output_layer_bits: 8 or 4 to quantize the output layer too; `None` leaves it as it is, as published.
        vision_bits: 8 or 4 to quantize the linears of GLM-4V's eyes too; `None` leaves them as they are.

    Raises:
        ValueError: for any other value.
    """

    def __init__(
        self,
        bits: int = 8,
        method: str = "absmax",
        group_size: int | None = None,
        output_layer_bits: int | None = None,
        vision_bits: int | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method = quant_method
        self.bits = bits
        self.method = method
        self.group_size = group_size
        self.output_layer_bits = output_layer_bits
        self.vision_bits = vision_bits
        for name, allowed in ALLOWED_SETTINGS.items():
            value = getattr(self, name)
            if value not in allowed or isinstance(value, float):
                raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")

    @property
    def stored_form(self) -> dict[str, int | None]:
        """The settings that show in a checkpoint; how its scales were found does not."""
        names = ("bits", "group_size", "output_layer_bits", "vision_bits")
        return {name: getattr(self, name) for name in names}

    @property
    def is_published_format(self) -> bool:
        """Whether the published code reads such a checkpoint, told by `quantization_bit` alone."""
        return self.group_size is None and self.output_layer_bits is None and self.vision_bits is None


def names_of_linears(base_model: PreTrainedModel) -> list[str]:
    """The linears of all layers."""
    num_layers = len(base_model.encoder.layers)
    return [f"encoder.layers.{i}.{name}" for i in range(num_layers) for name in LAYER_LINEARS]


def names_of_vision_linears(base_model: PreTrainedModel) -> list[str]:
    """The linears of GLM-4V's eyes; none where there are no eyes."""
    # CODEPATH: glm-4v-9b; the others read text alone.
    if base_model.vision is None:
        return []
    layers = [f"transformer.layers.{i}." for i in range(len(base_model.vision.transformer.layers))]
    names = [layer + name for layer in layers for name in TOWER_LINEARS]
    return [f"vision.{name}" for name in (*names, *ADAPTER_LINEARS)]


def linears_to_quantize(model: PreTrainedModel, settings: ChatGLMQuantizationConfig) -> dict[str, int]:
    """Names of the layers that the settings ask for, and their bits.

    Raises:
        TypeError: for a layer that is no plain linear layer, such as one with an adapter.
        ValueError: for a width that the settings do not divide, and for `vision_bits` without eyes.
    """
    base_model = model.base_model
    prefix = "" if base_model is model else f"{model.base_model_prefix}."
    bits = {prefix + name: settings.bits for name in names_of_linears(base_model)}
    if settings.output_layer_bits is not None:
        bits[f"{prefix}output_layer"] = settings.output_layer_bits
    if settings.vision_bits is not None:
        vision_names = names_of_vision_linears(base_model)
        if not vision_names:
            raise ValueError(f"`vision_bits={settings.vision_bits}` is for GLM-4V, and this model reads text alone.")
        bits |= {prefix + name: settings.vision_bits for name in vision_names}
    for name in bits:
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear and not hasattr(linear, "is_float_layer"):
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


def make_quantized_layer(
    model: PreTrainedModel, name: str, bits: int, settings: ChatGLMQuantizationConfig
) -> QuantizedLinear:
    """A layer without codes for the place of a linear layer of the model."""
    linear = model.get_submodule(name)
    # CODEPATH: chatglm-6b rounds scales to float16; chatglm2, chatglm3 and glm4 keep the dtype of the weight.
    default = "float32" if linear.weight.dtype == torch.float32 else "float16"
    scale_dtype = getattr(torch, model.config.published_scale_dtype or default)
    return QuantizedLinear(linear, bits, settings.group_size, scale_dtype)


def replace_layer(model: PreTrainedModel, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another, with the hook by which accelerate moves inputs between devices."""
    hook = getattr(model.get_submodule(name), "_hf_hook", None)
    model.set_submodule(name, layer)
    if hook is not None:
        add_hook_to_module(layer, hook)


def untie_output_layer(model: PreTrainedModel) -> None:
    """Let the output layer be quantized where it was the word embedding, which stays as it is."""
    model.config.tie_word_embeddings = False
    for module in model.modules():
        if hasattr(module, "get_expanded_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def read_stored_tensors(files: list[str] | None, weights_only: bool) -> dict[str, torch.Tensor]:
    """The tensors of checkpoint files, on the meta device: their names, shapes and dtypes. No values are read."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files or ():
        # Safetensors' header is enough. PyTorch's files are mapped into memory, which does not work for meta.
        device = "meta" if file.endswith(".safetensors") else "cpu"
        stored = load_state_dict(file, device, weights_only)
        tensors |= {name: tensor.to("meta") for name, tensor in stored.items()}
    return tensors


def expect_stored_weights(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Compare the layers of a model with the tensors that they are about to be loaded from, by this model's names.

    Quantized layers take over the dtype of the stored scales, which loading would round otherwise.

    Raises:
        ValueError: where one is quantized and the other is not, or in another way.
    """
    base_model, prefix = model.base_model, f"{model.base_model_prefix}."
    own_names = (*names_of_linears(base_model), *names_of_vision_linears(base_model))
    for name in (*own_names, "output_layer", "embedding.word_embeddings"):
        layer: Any = base_model.get_submodule(name)
        full_name = next((full for full in (name, prefix + name) if f"{full}.weight" in tensors), None)
        if full_name is None or not isinstance(layer, nn.Linear | nn.Embedding):
            continue
        weight_scale = tensors.get(f"{full_name}.weight_scale")
        in_features = layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.in_features
        stored = stored_form(tensors[f"{full_name}.weight"], weight_scale, in_features)
        # Floats are expected by a layer that is to be quantized while it is loaded, too.
        is_expected = is_quantized_layer(layer) and layer.weight.dtype == torch.int8
        expected = WeightForm(layer.bits, layer.group_size) if is_expected else WeightForm()
        if stored != expected:
            raise ValueError(wrong_form_message(full_name, stored, expected))
        if is_expected and weight_scale is not None:
            empty_scale: torch.Tensor = getattr(layer, "weight_scale")
            layer.weight_scale = nn.Parameter(empty_scale.to(weight_scale.dtype), requires_grad=False)


def wrong_form_message(name: str, stored: WeightForm, expected: WeightForm) -> str:
    """What is wrong with a checkpoint, and what to do about it."""
    settings: dict[str, Any] = {"quant_method": QUANT_METHOD, "bits": stored.bits or expected.bits}
    is_vision = re.search(r"(^|\.)vision\.", name) is not None
    part = "vision_bits" if is_vision else "output_layer_bits" if name.endswith("output_layer") else None
    if stored.bits is None and part is not None:
        remedy = f"Remove `{part}` from the `quantization_config` of config.json."
    elif stored.bits is None:
        remedy = (
            "Remove `quantization_bit` and `quantization_config` from config.json. To quantize these weights while they "
            f"are loaded, pass `quantization_config={json.dumps(settings)}` to `from_pretrained`."
        )
    elif name.endswith("word_embeddings"):
        remedy = "Quantized embeddings are not supported: chatglm-6b-int4, say, is, and chatglm-6b-int4-qe is not."
    elif part is not None and stored.bits != expected.bits:
        remedy = f'Set `"{part}": {stored.bits}` in the `quantization_config` of config.json.'
    elif stored.group_size is None:
        remedy = f'Set `"quantization_bit": {stored.bits}` in config.json, without a `quantization_config`.'
    else:
        settings["group_size"] = stored.group_size
        remedy = f'Set `"quantization_config": {json.dumps(settings)}` in config.json.'
    return f"`{name}.weight` of this checkpoint holds {stored}, but {expected} were expected. {remedy}"


class KeepWeight(ConversionOps):
    """Leaves a weight as it is.

    The library writes a weight that stays on the disk anew only if an operation was applied to it. What
    `QuantizeWhileLoading` does counts for nothing there (Transformers 5.17 to 5.23).
    """

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        return {target_patterns[0]: next(iter(input_dict.values()))}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class QuantizeWhileLoading(ConversionOps):
    """Quantizes a weight when it is read, so that no more than one is there in floats."""

    def __init__(self, method: str, tied_layers: dict[str, str]) -> None:
        self.method = method
        # Weights that another layer is made from, and the name of that layer.
        self.tied_layers = tied_layers

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        weight = next(iter(input_dict.values()))
        weight = weight[0] if isinstance(weight, list) else weight
        kept = {full_layer_name: weight} if full_layer_name in self.tied_layers else {}
        name = self.tied_layers.get(full_layer_name, full_layer_name.removesuffix(".weight"))
        if kept and missing_keys is not None and f"{name}.weight" not in missing_keys:
            return kept  # The checkpoint holds the layer a second time, and it was loaded from there.
        layer = model.get_submodule(name)
        codes, scale = quantize_weight(weight, layer.bits, self.method, layer.group_size, layer.weight_scale.dtype)
        # The loader sets the weight, unless it stays on the disk.
        layer.weight = nn.Parameter(codes.to("meta"), requires_grad=False)
        return {**kept, f"{name}.weight": codes, f"{name}.weight_scale": scale}


class ChatGLMQuantizer(HfQuantizer):
    """What the library asks about a quantized ChatGLM model: how it is loaded, saved, trained and decoded."""

    def __init__(self, quantization_config: ChatGLMQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Weights that are to be quantized while they are loaded: all of a float model, none of a quantized one.
        self.waiting: set[str] = set()
        self.tied_layers: dict[str, str] = {}
        self.model_config: Any = None

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        refuse_tensor_parallelism(getattr(model.config, "distributed_config", None))
        settings = self.quantization_config
        quantization_bit = model.config.quantization_bit
        if self.pre_quantized and quantization_bit and quantization_bit != settings.bits:
            raise ValueError(
                f"`quantization_bit` is {quantization_bit}, but `bits` of `quantization_config` is {settings.bits}. "
                "Keep the one that is right in config.json, and remove the other."
            )
        for name, bits in linears_to_quantize(model, settings).items():
            layer = make_quantized_layer(model, name, bits, settings)
            if not self.pre_quantized:
                # The loader reads a weight in the dtype that it finds here, on the meta device.
                layer.weight = model.get_submodule(name).weight
                self.waiting.add(f"{name}.weight")
            model.set_submodule(name, layer)
        if settings.output_layer_bits is not None:
            tied = {target: source for target, source in model.all_tied_weights_keys.items() if target in self.waiting}
            self.tied_layers = {source: target.removesuffix(".weight") for target, source in tied.items()}
            untie_output_layer(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.waiting or param_name in self.tied_layers

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes per weight, for device maps."""
        if param_name in self.waiting:
            return model.get_submodule(param_name.removesuffix(".weight")).bits / 8
        return param.element_size()

    def get_quantize_ops(self) -> QuantizeWhileLoading:
        return QuantizeWhileLoading(self.quantization_config.method, self.tied_layers)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.waiting:
            return []
        names = (*LAYER_LINEARS, *TOWER_LINEARS, *ADAPTER_LINEARS, "output_layer", "word_embeddings")
        return [WeightConverter(f"{name}.weight", f"{name}.weight", [KeepWeight()]) for name in names]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        settings = self.quantization_config
        self.waiting, self.tied_layers, self.model_config = set(), {}, model.config
        model.config.quantization_bit = settings.bits if settings.is_published_format else 0
        for layer in quantized_layers(model).values():
            # The library's loader lets everything train that is a float.
            layer.weight_scale.requires_grad_(False)
            layer.derive()

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in quantized_layers(model).items():
            linear = ChatGLMLinear(layer.in_features, layer.out_features, bias=False, device="meta")
            with torch.inference_mode(False):
                # Below an adapter of PEFT, the weight stays frozen.
                linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=not name.endswith(".base_layer"))
            linear.bias = layer.bias
            replace_layer(model, name, linear.train(layer.training))
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
        """Whether Trainer takes a model without adapters of PEFT: one that trains a prefix of P-tuning v2."""
        return self.model_config is not None and self.model_config.pre_seq_len is not None

    @property
    def is_compileable(self) -> bool:
        return True


# Another checkpoint's copy of this file may have been loaded before.
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(ChatGLMQuantizationConfig)
if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(ChatGLMQuantizer)


def read_settings(value: Any) -> ChatGLMQuantizationConfig | None:
    """Our settings in a `quantization_config`, a dictionary or an object; `None` for other methods and for nothing."""
    values = value if isinstance(value, dict) else getattr(value, "to_dict", dict)()
    return ChatGLMQuantizationConfig.from_dict(values) if values.get("quant_method") == QUANT_METHOD else None


def is_quantized_as_asked(
    model_class: Any, asked: Any, path: Any = None, *args: Any, config: Any = None, **kwargs: Any
) -> bool:
    """Whether a checkpoint is quantized already as the argument `quantization_config` of `from_pretrained` asks for.

    Raises:
        ValueError: if it is quantized in another way.
    """
    if (wanted := read_settings(asked)) is None:
        return False
    if not hasattr(config, "quantization_bit"):
        path = path or kwargs.pop("pretrained_model_name_or_path", None)
        config = model_class.config_class.from_pretrained(config or path, **kwargs)
    if (stored := read_settings(getattr(config, "quantization_config", None))) is None:
        return False
    if stored.stored_form != wanted.stored_form:
        raise ValueError(
            f"This checkpoint is quantized already, with {stored.stored_form}, so it cannot be loaded with "
            f"{wanted.stored_form}. Leave `quantization_config` out, or start from a checkpoint of floats."
        )
    return True


def refuse_merging_into_codes() -> None:
    """Let PEFT refuse to merge adapters into quantized layers, before it changes anything."""
    tuners: Any = sys.modules["peft.tuners.tuners_utils"]

    def refusing(merge: Any) -> Any:
        @wraps(merge)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            for name, module in self.model.named_modules():
                if isinstance(module, tuners.BaseTunerLayer) and is_quantized_layer(module.get_base_layer()):
                    raise ValueError(
                        f"`{name}` adapts a quantized layer, and integers cannot hold what the adapter adds. Call "
                        "`dequantize()` of the model first, merge then, and `quantize(bits)` the result again."
                    )
            return merge(self, *args, **kwargs)

        setattr(wrapper, "knows_quantized_layers", True)
        return wrapper

    for name in ("merge_and_unload", "merge_adapter"):
        merge = getattr(tuners.BaseTuner, name)
        if not hasattr(merge, "knows_quantized_layers"):
            setattr(tuners.BaseTuner, name, refusing(merge))


def check_device(device: torch.device | str | None) -> None:
    """Raise a `ValueError` for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(f"`device={device!r}` cannot be used to quantize: {error}") from error


def check_weights(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Raise a `ValueError` for weights of layers that cannot be quantized."""
    for name in names:
        weight: Any = model.get_submodule(name).weight
        if weight.is_meta:
            raise ValueError(
                f"`{name}` is offloaded. Give `quantization_config` to `from_pretrained` to quantize while loading."
            )
        if not weight.isfinite().all():
            raise ValueError(f"`{name}` has weights that are not finite; no scale fits them.")


def take_bits(kwargs: dict[str, Any], quantization_config: Any) -> Any:
    """What `load_in_8bit` and `load_in_4bit`, taken out of `kwargs`, ask for; else the other argument as it is.

    Raises:
        ValueError: if more than one of the three asks for something.
    """
    asked = [bits for bits in (8, 4) if kwargs.pop(f"load_in_{bits}bit", False)]
    if not asked:
        return quantization_config
    if len(asked) > 1 or quantization_config is not None:
        raise ValueError("Give one of `load_in_8bit`, `load_in_4bit` and `quantization_config`, not several.")
    logger.warning_once(
        f"`load_in_{asked[0]}bit=True`: the weights become int{asked[0]} in the format of the published checkpoints, "
        "without bitsandbytes."
    )
    return {"quant_method": QUANT_METHOD, "bits": asked[0]}


class ChatGLMQuantizationMixin(PreTrainedModel):
    """What every ChatGLM model can do about quantization."""

    def post_init(self) -> None:
        super().post_init()
        settings = getattr(self.config, "quantization_config", None)
        if settings is not None and read_settings(settings) is None:
            use_layers_of_torch(self)

    @property
    def quantized(self) -> bool:
        """Whether the weights are quantized, by its published name."""
        return bool(getattr(self, "is_quantized", False))

    def quantize(
        self,
        bits: int,
        method: str = "absmax",
        group_size: int | None = None,
        output_layer_bits: int | None = None,
        vision_bits: int | None = None,
        *,
        device: torch.device | str | None = None,
        empty_init: bool = False,
        use_quantization_cache: bool = False,
    ) -> "ChatGLMQuantizationMixin":
        """Quantize the linear layers in place, one at a time, each on its own device, and return the model.

        Args:
            bits, method, group_size, output_layer_bits, vision_bits: see [`ChatGLMQuantizationConfig`]. 0 bits, or what
                the model has already, change nothing.
            device: where the layers are quantized and stay, if not where they are.
            empty_init, use_quantization_cache: of published programs. They change nothing here.

        Raises:
            ValueError: for settings that do not exist, a model that is quantized otherwise, weights that are offloaded
                or not finite, and a device that is not there. Nothing is changed then.
            TypeError: for a model with adapters.
        """
        if bits == 0 and type(bits) is int:
            return self
        settings = ChatGLMQuantizationConfig(bits, method, group_size, output_layer_bits, vision_bits)
        if self.quantized:
            stored = read_settings(getattr(self.config, "quantization_config", None))
            if stored is not None and stored.stored_form == settings.stored_form:
                return self
            raise ValueError("This model is quantized already, in another way. Call `model.dequantize()` first.")
        check_device(device)
        bits_of_layers = linears_to_quantize(self, settings)
        check_weights(self, bits_of_layers)
        for name, layer_bits in bits_of_layers.items():
            layer = make_quantized_layer(self, name, layer_bits, settings)
            layer.quantize_(self.get_submodule(name).weight.to(device), method)
            replace_layer(self, name, layer if device is None else layer.to(device))
        if output_layer_bits is not None:
            untie_output_layer(self)
        self.is_quantized, self.quantization_method = True, QUANT_METHOD
        self.hf_quantizer = ChatGLMQuantizer(settings)
        self.hf_quantizer.postprocess_model(self)
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> "ChatGLMQuantizationMixin":
        """Turn quantized weights back into floats, by default of the dtype that the model has otherwise.

        Raises:
            ValueError: if the model is not quantized, or a layer is offloaded. Nothing is changed then.
        """
        for name, layer in quantized_layers(self).items():
            if layer.weight.is_meta:
                raise ValueError(
                    f"`{name}` is offloaded to the CPU or the disk. Load the model without offloading to dequantize it."
                )
        return super().dequantize(dtype or self.dtype)

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        quantization_config = take_bits(kwargs, quantization_config)
        if is_quantized_as_asked(cls, quantization_config, *args, **kwargs):
            quantization_config = None
        if quantization_config is not None and read_settings(quantization_config) is None:
            quantization_config = complete_settings_of_others(quantization_config, cls.config_class.path_of_layers)
        return super().from_pretrained(*args, quantization_config=quantization_config, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # A private hook (Transformers 5.17 to 5.23), and the only place that knows the files of a checkpoint whose
        # configuration does not say that it is quantized. Another quantization method has its own formats.
        if getattr(model, "quantization_method", QUANT_METHOD) == QUANT_METHOD:
            tensors = state_dict or read_stored_tensors(checkpoint_files, load_config.weights_only)
            for renaming in load_config.weight_mapping or ():
                if isinstance(renaming, WeightRenaming):
                    tensors = {renaming.rename_source_key(name)[0]: tensor for name, tensor in tensors.items()}
            expect_stored_weights(model, tensors)
        check_path_of_layers(model)
        load = PreTrainedModel._load_pretrained_model
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # A model made from a configuration has float weights, whatever the checkpoint of that configuration has.
        if not self.quantized:
            self.config.quantization_bit = 0
            self.config.__dict__.pop("quantization_config", None)
        return super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any
    ) -> nn.Module:
        is_resized = new_num_tokens is not None or pad_to_multiple_of is not None
        if is_resized and is_quantized_layer(self.get_output_embeddings()):
            raise ValueError(
                "The output layer is quantized and cannot be resized. Call `model.dequantize()` first, and quantize "
                "again afterwards."
            )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> "ChatGLMQuantizationMixin":
        """Let the float weights train, or freeze them. Codes and their scales stay frozen."""
        layers = quantized_layers(self).values()
        frozen = {id(weight) for layer in layers for weight in (layer.weight, layer.weight_scale)}
        for weight in self.parameters():
            if id(weight) not in frozen:
                weight.requires_grad_(requires_grad)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # What PEFT gives a model when it adds adapters. A property would be listed by `dir` before it can be read, which
        # stops optimum: it reads all that is listed.
        if name == "peft_config":
            refuse_merging_into_codes()
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Another process may have added the adapters that come out of a pickle.
        if "peft_config" in state:
            refuse_merging_into_codes()

    def half(self, *args: Any) -> "ChatGLMQuantizationMixin":
        # The library refuses this for every quantized model; here it is safe, and the published recipes call it.
        return self.to(torch.float16) if self.quantized else super().half(*args)

    def float(self, *args: Any) -> "ChatGLMQuantizationMixin":
        return self.to(torch.float32) if self.quantized else super().float(*args)


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
