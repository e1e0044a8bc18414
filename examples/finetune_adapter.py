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
"""What did an earlier run leave in a folder, and can this run go on training it?"""

from pathlib import Path
from typing import Any

import torch
from local_code import load_module, read_json_object
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig


ADAPTER_FILE = "adapter_model.safetensors"


def read_adapter(folder: Path, method: str) -> dict[str, Any]:
    """The settings that an adapter or a prefix was made with, under this program's names.

    Raises:
        OSError, ValueError: if there is none in the folder, it is damaged, or another method made it.
    """
    if method == "ptuning":
        weights = load_module("modeling_prefix").find_prefix(folder)
        return {
            "pre_seq_len": len(weights["embedding.weight"]),
            "prefix_projection": any(name.startswith("trans.") for name in weights),
        }
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{folder} has no {ADAPTER_FILE}")
    settings = read_json_object(folder / "adapter_config.json")
    made_by = str(settings.get("peft_type")).lower()
    if made_by != method:
        raise ValueError(f"{folder} was made by {made_by}, and the method is {method}")
    return {
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in read_sizes(folder)}),
        "lora_rank": settings.get("r"),
        "lora_alpha": settings.get("lora_alpha"),
        "lora_dropout": settings.get("lora_dropout"),
    }


def read_sizes(folder: Path) -> dict[tuple[str, str], int]:
    """The widths of the linear layers an adapter was made for, by their name and `in_features` or `out_features`.

    Raises:
        ValueError: if the file is damaged.
    """
    sizes = {}
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as tensors:
            for key in tensors.keys():
                name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
                if part.startswith("A"):
                    sizes[name, "in_features"] = tensors.get_slice(key).get_shape()[1]
                elif part.startswith("B"):
                    sizes[name, "out_features"] = tensors.get_slice(key).get_shape()[0]
    except SafetensorError as error:
        raise ValueError(f"{folder / ADAPTER_FILE} is damaged ({error})") from error
    return sizes


def check_adapter(folder: Path, method: str, target_modules: list[str], config: PreTrainedConfig) -> None:
    """Compare an adapter with the model of a configuration, whose weights need not be loaded yet.

    Raises:
        ValueError: if it was made for another model, or for other layers than `target_modules` names.
    """
    file = folder / "tokenizer_config.json"
    made_for = read_json_object(file).get("model_version") if file.is_file() else None
    if made_for not in (None, config.model_version):
        raise ValueError(f"adapter: {folder} was made for {made_for}, and the model is {config.model_version}")
    if method == "ptuning":
        return
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    layers = {name: layer for name, layer in skeleton.named_modules() if isinstance(layer, torch.nn.Linear)}
    sizes = read_sizes(folder)
    for (name, side), there in sizes.items():
        here = getattr(layers.get(name), side, None)
        if here != there:
            raise ValueError(f"adapter: {folder} is of another model: {name} is {there} wide there, {here} here")
    adapted = {name for name, _ in sizes}
    if target_modules == ["all-linear"]:
        targeted = {name for name, layer in layers.items() if layer is not skeleton.get_output_embeddings()}
    else:
        targeted = {name for name in layers if any(f".{name}".endswith(f".{target}") for target in target_modules)}
    names = sorted({name.rpartition(".")[2] for name in adapted})
    if targeted != adapted and target_modules != names:
        raise ValueError(
            f"target_modules: {folder} adapts {len(adapted)} layers ({', '.join(names)}), and {target_modules} names "
            f"{len(targeted)}; leave target_modules out to go on with what is there"
        )
