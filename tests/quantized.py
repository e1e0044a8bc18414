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
"""What the tests of quantization share: settings, tiny models, and what is compared."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generations import GMASK, START, TINY
from torch import nn
from transformers import PreTrainedModel


ModelMaker = Callable[..., PreTrainedModel]

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "groups": {"bits": 4, "group_size": 32},
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the greatest logit: what rounding in half precision adds up to, of weights, results and group scales.
HALF_LIMIT = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.06}
LAYER_NAMES = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LAYERS = [f"transformer.encoder.layers.{i}.{name}" for i in range(2) for name in LAYER_NAMES]


def as_argument(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as the argument `quantization_config` of `from_pretrained`."""
    return {"quant_method": "chatglm", **settings}


def maker(tiny_model: ModelMaker) -> ModelMaker:
    """Makes a tiny float model of a generation, with widths that divide by 32."""

    def make(version: str = "chatglm3", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        return tiny_model(**{"ffn_hidden_size": 64} | TINY[version] | changes).to(dtype)

    return make


def prompt(batch: int = 2, length: int = 11) -> torch.Tensor:
    """Ids that every generation reads, with ChatGLM-6B's start of the answer among them."""
    ids = torch.randint(4, 89, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, 6], ids[:, 7] = GMASK, START
    return ids


def logits_of(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt() if ids is None else ids).logits


def assert_near(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Within a part of the greatest expected value."""
    assert actual.isfinite().all()
    error = ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    assert error <= limit, f"off by {error:.3g} of the greatest value, the limit is {limit:.3g}"


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """Bitwise, dtypes included."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].equal(tensor), name


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "QuantizedLinear"}


def assert_same_layers(actual: nn.Module, expected: nn.Module) -> None:
    """Bits and groups are in no tensor, and neither is what trains."""
    ours, theirs = quantized_layers(actual), quantized_layers(expected)
    assert [*ours] == [*theirs]
    for name, layer in theirs.items():
        assert (ours[name].bits, ours[name].group_size) == (layer.bits, layer.group_size), name
        assert not ours[name].weight.requires_grad and not ours[name].weight_scale.requires_grad


def with_decoded_weights(model: PreTrainedModel, float_model: PreTrainedModel) -> PreTrainedModel:
    """The float model with what the quantized weights stand for in float32, rounded to its own dtype."""
    twin = copy.deepcopy(float_model)
    for name, layer in quantized_layers(model).items():
        linear = twin.get_submodule(name)
        linear.weight = nn.Parameter(layer.dequantize(torch.float32).to(linear.weight.dtype), requires_grad=False)
    return twin


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change_config(folder: Path, **changes: Any) -> None:
    """Replaces keys of a folder's config.json; `None` takes one out."""
    config = saved_config(folder) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(file, weights_only=True)
    return weights


def recorded_layers(case: Any, kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Published name of a layer -> its recorded codes and scales."""
    end = ".weight_scale"
    names = [key[len(f"quant.{kind}.") : -len(end)] for key in case.tensors if key.startswith(f"quant.{kind}.")]
    names = [name for name in names if f"quant.{kind}.{name}{end}" in case.tensors]
    layers = {
        name: (case.tensors[f"quant.{kind}.{name}.weight"], case.tensors[f"quant.{kind}.{name}{end}"])
        for name in names
    }
    assert len(layers) == 12
    return layers


def write_published_folder(folder: Path, case: Any, kind: str) -> None:
    """Turns the folder of a float checkpoint into that of a quantized one, as the published ones are laid out."""
    weights = stored_weights(folder)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    for layer, (codes, scale) in recorded_layers(case, kind).items():
        weights |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
    torch.save(weights, folder / "pytorch_model.bin")
    change_config(folder, quantization_bit=int(kind[-1]))
