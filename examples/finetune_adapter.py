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

import re
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from local_code import load_module, read_json_object
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig


ADAPTER_FILE = "adapter_model.safetensors"
# The parts of the fused projection `query_key_value`, which can be adapted by themselves.
PARTS = {"query", "key", "value"}


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
    if method == "prompt_tuning":
        return {"pre_seq_len": read_prompt(folder)[0]}
    return {
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in read_sizes(folder)}),
        "lora_rank": settings.get("r"),
        "lora_alpha": settings.get("lora_alpha"),
        "lora_dropout": settings.get("lora_dropout"),
        # Adapters made before PEFT had these have none.
        "use_dora": bool(settings.get("use_dora")),
        "rank_pattern": settings.get("rank_pattern") or {},
        "alpha_pattern": settings.get("alpha_pattern") or {},
    }


def read_prompt(folder: Path) -> tuple[int, int]:
    """The length and the width of a prompt that PEFT trained.

    Raises:
        ValueError: if the file is damaged, or holds something else.
    """
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as tensors:
            length, width = tensors.get_slice("prompt_embeddings").get_shape()
    except SafetensorError as error:
        raise ValueError(f"{folder / ADAPTER_FILE} is damaged, or holds no prompt ({error})") from error
    return length, width


def layers_of(target_modules: Sequence[str]) -> list[str]:
    """The layers that get adapters, where some names may be parts of the fused projection."""
    return list(dict.fromkeys("query_key_value" if name in PARTS else name for name in target_modules))


def rows_of(attention: Any, parts: Collection[str]) -> torch.Tensor:
    """Which rows of the fused projection of a layer make some parts of it: `[out]`, bool."""
    config = attention.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    # CODEPATH: chatglm2, chatglm3, glm4: one part after the other; chatglm-6b: head by head.
    if config.multi_query_attention:
        blocks = ["query"] * heads + ["key"] * groups + ["value"] * groups
    else:
        blocks = ["query", "key", "value"] * heads
    return torch.tensor([block in parts for block in blocks]).repeat_interleave(config.head_dim)


def trained_parts(adapted: torch.nn.Module) -> set[str]:
    """The parts of the fused projections to which adapters add something."""
    return {
        part
        for attention in fused_projections(adapted)
        for part in PARTS
        if weights_of(attention)[0][rows_of(attention, {part})].any()
    }


def fused_projections(adapted: torch.nn.Module) -> list[Any]:
    """The attention layers whose fused projection has an adapter."""
    return [layer for layer in adapted.modules() if hasattr(getattr(layer, "query_key_value", None), "lora_B")]


def weights_of(attention: Any) -> list[torch.nn.Parameter]:
    """The weights of an adapter that have the rows of the fused projection: `lora_B` first, then the sizes of DoRA."""
    layer = attention.query_key_value
    # AdaLoRA has parameters where the others have layers.
    held = [layer.lora_B["default"], *layer.lora_magnitude_vector.values()]
    return [item if isinstance(item, torch.nn.Parameter) else item.weight for item in held]


def train_parts(adapted: torch.nn.Module, parts: Collection[str], is_new: bool) -> None:
    """Let adapters train some parts of the fused projections only; of a new adapter, the rest adds nothing.

    They stay ordinary adapters: what they leave alone are zeros, which get no gradient.
    """
    for attention in fused_projections(adapted):
        rows = rows_of(attention, parts)
        b, *sizes = weights_of(attention)
        if is_new:
            with torch.no_grad():
                b[~rows] = 0
        for weight in (b, *sizes):
            weight.register_hook(partial(_keep_rows, rows))


def _keep_rows(rows: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient * rows.to(gradient).view(-1, *[1] * (gradient.dim() - 1))


def check_patterns(adapted: Any, patterns: dict[str, dict[str, int]]) -> None:
    """Find names in the settings of a new adapter that no adapted layer has.

    Raises:
        ValueError: with the setting and the name.
    """
    layers = [name for name, layer in adapted.base_model.model.named_modules() if hasattr(layer, "lora_A")]
    for setting, pattern in patterns.items():
        for key in pattern:
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers):
                names = sorted({name.rpartition(".")[2] for name in layers})
                raise ValueError(f"{setting}: no adapted layer is called {key!r}; there are {', '.join(names)}")


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


def check_adapter(
    folder: Path, method: str, target_modules: list[str], config: PreTrainedConfig, frozen: str | None = None
) -> None:
    """Compare an adapter with the model of a configuration, whose weights need not be loaded yet.

    Args:
        frozen: a pattern of layers that are not to be adapted, whatever they are called.

    Raises:
        ValueError: if it was made for another model, or for other layers than `target_modules` names.
    """
    file = folder / "tokenizer_config.json"
    made_for = read_json_object(file).get("model_version") if file.is_file() else None
    if made_for not in (None, config.model_version):
        raise ValueError(f"adapter: {folder} was made for {made_for}, and the model is {config.model_version}")
    if method == "prompt_tuning" and read_prompt(folder)[1] != config.hidden_size:
        raise ValueError(
            f"adapter: {folder} is of another model: its prompt is {read_prompt(folder)[1]} wide, the model "
            f"{config.hidden_size}"
        )
    if method != "lora":
        return
    target_modules = layers_of(target_modules)
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
    targeted = {name for name in targeted if not (frozen and re.fullmatch(frozen, name))}
    names = sorted({name.rpartition(".")[2] for name in adapted})
    if targeted != adapted and target_modules != names:
        raise ValueError(
            f"target_modules: {folder} adapts {len(adapted)} layers ({', '.join(names)}), and {target_modules} names "
            f"{len(targeted)}; leave target_modules out to go on with what is there"
        )
