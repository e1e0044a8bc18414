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
"""How much memory does a checkpoint take? Its weights at every width, its cache, and training by each method.

`python scripts/memory.py FOLDER` reads nothing but the folder's config.json: the network is built without memory (on
torch's meta device), and its tensors are counted. Activations are not in the figures: they depend on the batch, the length
and on gradient checkpointing.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from local_code import load_module  # noqa: E402


# Bytes of a trained parameter: itself, its gradient and AdamW's two moments, in float32.
TRAINED_BYTES = 4 * 4
FLOAT_WIDTHS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INTEGER_WIDTHS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Estimate:
    """Bytes of a checkpoint's parts."""

    weights: dict[str, int]
    cache_per_token: dict[str, int]
    training: dict[str, int]


def build(modeling: ModuleType, config: PreTrainedConfig, **changes: Any) -> PreTrainedModel:
    """The network of a configuration, without memory."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return modeling.ChatGLMForConditionalGeneration(config)


def count_weights(model: PreTrainedModel, bits: int | None, dtype: torch.dtype) -> int:
    """Bytes of the weights, those of the layers at `bits`, with a scale for each row, and the others in `dtype`."""
    quantized = 0
    names = []
    if bits is not None:
        quantization = load_module("quantization")
        settings = quantization.ChatGLMQuantizationConfig(bits=bits)
        names = list(quantization.linears_to_quantize(model, settings))
    for name in names:
        weight = model.get_submodule(name).weight
        quantized += weight.numel() * bits // 8 + len(weight) * dtype.itemsize - weight.numel() * dtype.itemsize
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize + quantized


def count_cache(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


def count_adapter(model: PreTrainedModel, rank: int) -> int:
    """Parameters of LoRA on all linear layers of the decoder: `rank` rows of their inputs and columns of their outputs."""
    base = model.base_model
    linears = [module for module in base.encoder.modules() if isinstance(module, nn.Linear)]
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def estimate(config: PreTrainedConfig, rank: int = 8, prefix_length: int = 128) -> Estimate:
    """Count the tensors of a configuration.

    Args:
        config: a `ChatGLMConfig`; what it says of quantized weights and of a prefix is left out.
        rank: of LoRA.
        prefix_length: of P-tuning v2, without projection.
    """
    modeling = load_module("modeling_chatglm")
    model = build(modeling, config, quantization_bit=0, pre_seq_len=None)
    weights = {name: count_weights(model, None, dtype) for name, dtype in FLOAT_WIDTHS.items()}
    for name, bits in INTEGER_WIDTHS.items():
        weights[name] = count_weights(model, bits, torch.bfloat16)
    with_prefix = build(modeling, config, quantization_bit=0, pre_seq_len=prefix_length)
    trained = {
        "full": sum(parameter.numel() for parameter in model.parameters()),
        "LoRA": count_adapter(model, rank),
        "P-tuning v2": sum(parameter.numel() for parameter in with_prefix.transformer.prefix_encoder.parameters()),
    }
    training = {"full in float32": TRAINED_BYTES * trained["full"]}
    for method, base in (("LoRA", "bfloat16"), ("LoRA", "int8"), ("LoRA", "int4"), ("P-tuning v2", "int4")):
        training[f"{method} on {base}"] = weights[base] + TRAINED_BYTES * trained[method]
    cache = {name: count_cache(config, dtype) for name, dtype in FLOAT_WIDTHS.items()}
    return Estimate(weights, cache, training)


def table(found: Estimate) -> str:
    """The figures, in GB of 10^9 bytes and MB of 10^6."""
    lines = ["| weights | GB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e9:.2f} |" for name, size in found.weights.items()]
    lines += ["", "| cache of 1,000 tokens | MB |", "|---|---|"]
    lines += [f"| {name} | {1000 * size / 1e6:.1f} |" for name, size in found.cache_per_token.items()]
    lines += ["", "| training, without activations | GB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e9:.2f} |" for name, size in found.training.items()]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a checkpoint folder, or one with its config.json alone"
    )
    parser.add_argument("--rank", type=int, default=8, metavar="N", help="of LoRA (default: 8)")
    parser.add_argument("--prefix", type=int, default=128, metavar="N", help="tokens of P-tuning v2 (default: 128)")
    arguments = parser.parse_args(words)
    if not (arguments.folder / "config.json").is_file():
        parser.error(f"{arguments.folder} has no config.json")
    config = load_module("configuration_chatglm").ChatGLMConfig.from_pretrained(arguments.folder)
    print(table(estimate(config, arguments.rank, arguments.prefix)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
