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
"""Makes something that others load out of what training left: `python examples/export.py merge --adapter output/lora ...`.

    merge    an adapter of PEFT (LoRA, DoRA, AdaLoRA, ...) into its base of any width: a complete checkpoint folder
    prefix   a prefix of P-tuning v2: a complete folder with `pre_seq_len`, or the file that published programs load
    names    an adapter of ChatGLM-6B from the published names of its layers to ours, or back

What is unusual here:

- Integers cannot hold an adapter. A quantized base becomes floats, takes up the adapter, and becomes integers again.
  That rounds, and a small change may drown: the command says how much of it is left, and how far the logits moved.
- Adapters are merged in float32, one layer at a time, and rounded once, to what the folder holds.
- Nothing is ever written over: the output must be a folder that does not exist or is empty.

Exit codes: 0 done, 2 bad settings or files (nothing was written).
"""

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from local_code import REPOSITORY, check_model_type, load_module, load_tokenizer, read_json_object, register
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import logging


EXAMPLES = Path(__file__).resolve().parent
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PUBLISHED_PREFIX = "pytorch_model.bin"
PROBES = ("你好", "请介绍一下你自己。", "What is the capital of France?", "1加1等于几？")


def check_output(folder: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ValueError: if there is something at that place.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; name another one, nothing is written over")


def write_checkpoint(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that loads by itself: weights, configuration, tokenizer and code."""
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for source in REPOSITORY.glob("*.py"):
        shutil.copyfile(source, folder / source.name)


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, in safetensors or in PyTorch's format. Nothing in it is executed.

    Raises:
        ValueError: if there are none.
    """
    for name in ADAPTER_FILES:
        file = folder / name
        if file.is_file():
            try:
                return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            except Exception as error:  # A damaged file raises one of many types.
                raise ValueError(f"{file} cannot be read as weights: {str(error).splitlines()[0]}") from error
    raise ValueError(f"{folder} has none of {', '.join(ADAPTER_FILES)}: it is no adapter of PEFT")


# ---------------------------------------------------------------------------------------------------------------------
# merge
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounding:
    """What rounding did to one layer, as Frobenius norms.

    Attributes:
        layer: its name.
        weight: of the exact sum of base and adapter.
        change: of what the adapter adds.
        error: of what is stored, less the exact sum.
    """

    layer: str
    weight: float
    change: float
    error: float


@dataclass(frozen=True)
class Probe:
    """How far the logits moved from the model with its adapter to what was saved, over a few questions."""

    largest: float
    mean_divergence: float
    same_choice: float


def load_base(folder: str, dtype: str, adapter: Path) -> Any:
    """Load the base of an adapter with this checkout's code: a language model, or a classifier where it adapts one.

    Raises:
        OSError, ValueError: if the folder holds no such model.
    """
    modeling = register()
    check_model_type(folder)
    if read_json_object(adapter / "adapter_config.json").get("task_type") != "SEQ_CLS":
        return modeling.ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    heads = [weight for name, weight in read_adapter_weights(adapter).items() if name.endswith("score.weight")]
    labels = {"num_labels": len(heads[0])} if heads else {}
    return modeling.ChatGLMForSequenceClassification.from_pretrained(folder, dtype=dtype, **labels)


def stored_weight(weight: torch.Tensor, model: Any, dtype: torch.dtype, bits: int, group_size: int | None) -> Any:
    """A float32 weight as the folder will hold it, in float32 again."""
    weight = weight.to(dtype)
    if bits:
        quantization = load_module("quantization")
        # CODEPATH: chatglm-6b rounds scales to float16; chatglm2, chatglm3 and glm4 keep the dtype of the weight.
        default = "float32" if dtype == torch.float32 else "float16"
        scale_dtype = getattr(torch, model.config.published_scale_dtype or default)
        codes, scale = quantization.quantize_weight(weight, bits, "absmax", group_size, scale_dtype)
        weight = quantization.dequantize_weight(codes, scale, weight.shape[1], torch.float32)
    return weight.float()


@torch.no_grad()
def merge_layers(adapted: Any, dtype: torch.dtype, bits: int, group_size: int | None) -> list[Rounding]:
    """Merge every adapted layer in float32, and compare it with how it will be stored; adapters stay in place."""
    found = []
    quantized = {
        name.removesuffix(".base_layer")
        for name in load_module("quantization").names_of_linears(adapted.get_base_model().base_model)
    }
    for name, layer in adapted.named_modules():
        base = getattr(layer, "base_layer", None)
        if not hasattr(layer, "merge") or not isinstance(base, nn.Linear):
            continue
        base.weight.data = base.weight.data.float()
        before = base.weight.data.clone()
        layer.merge(safe_merge=True)
        exact = base.weight.data
        is_quantized = any(name.endswith(one) for one in quantized)
        stored = stored_weight(exact, adapted, dtype, bits if is_quantized else 0, group_size)
        norms = (exact.norm(), (exact - before).norm(), (stored - exact).norm())
        base.weight.data = exact.to(dtype)
        found.append(Rounding(name.removeprefix("base_model.model."), *(norm.item() for norm in norms)))
    return found


@torch.no_grad()
def probe_logits(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """The logits of a few questions, at every token."""
    model.eval()
    found = []
    for text in PROBES:
        ids = tokenizer.build_chat_input(text)["input_ids"].to(model.device)
        logits = model(input_ids=ids).logits.float().cpu()
        found.append(logits.view(-1, logits.shape[-1]))
    return found


def compare_logits(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Probe:
    """Compare the logits of two models on the same texts."""
    old, new = torch.cat(list(before)), torch.cat(list(after))
    divergence = nn.functional.kl_div(new.log_softmax(-1), old.log_softmax(-1), reduction="none", log_target=True)
    return Probe(
        largest=(old - new).abs().max().item(),
        mean_divergence=divergence.sum(-1).mean().item(),
        same_choice=(old.argmax(-1) == new.argmax(-1)).float().mean().item(),
    )


def add_adapter(base: Any, adapter: Path) -> Any:
    """Put an adapter on its base, whichever names its layers have.

    Raises:
        RuntimeError, ValueError: if it is of another model.
    """
    if not needs_our_names(adapter, base.config.published_names):
        return peft.PeftModel.from_pretrained(base, adapter)
    with tempfile.TemporaryDirectory() as folder:
        rename_adapter(adapter, Path(folder), {pub: ours for ours, pub in base.config.published_names.items()})
        return peft.PeftModel.from_pretrained(base, folder)


def merge_report(layers: Sequence[Rounding], probe: Probe, stored_as: str) -> str:
    """What merging and rounding did, in a few lines."""

    def ratio(part: str, whole: str) -> float:
        squares = [sum(getattr(layer, name) ** 2 for layer in layers) for name in (part, whole)]
        return (squares[0] / max(squares[1], 1e-30)) ** 0.5

    worst = max(layers, key=lambda layer: layer.error / max(layer.weight, 1e-30))
    lines = [
        f"{len(layers)} layers merged in float32 and stored as {stored_as}",
        f"what the adapters add, relative to the weights: {ratio('change', 'weight'):.2e}",
        f"rounding, relative to the weights: {ratio('error', 'weight'):.2e} "
        f"(at most {worst.error / max(worst.weight, 1e-30):.2e}, {worst.layer})",
        f"rounding, relative to what the adapters add: {ratio('error', 'change'):.2e}",
        f"logits before and after: at most {probe.largest:.2e} apart, KL {probe.mean_divergence:.2e} a token, the same "
        f"choice at {probe.same_choice:.1%} of the tokens of {len(PROBES)} questions",
    ]
    if ratio("error", "change") > 1:
        lines.append("warning: rounding is larger than what was learnt; keep the adapter unmerged, or use more bits")
    return "\n".join(lines)


def merge(arguments: argparse.Namespace) -> None:
    """Merge an adapter into its base, and write a complete folder.

    Raises:
        OSError, TypeError, ValueError: for an adapter or a base that cannot be read, or that do not fit.
    """
    adapter, output = Path(arguments.adapter), Path(arguments.output)
    settings = read_json_object(adapter / "adapter_config.json")
    folder = arguments.model or settings.get("base_model_name_or_path") or ""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"--model: {folder or 'the base of the adapter'!r} is not a checkpoint folder; name it")
    tokenizer = load_tokenizer(Path(folder))
    # More would only take memory: a layer is merged in float32 all the same.
    base = load_base(folder, "float32" if arguments.dtype == "float32" else "auto", adapter)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else base.dtype
    quantizer = base.hf_quantizer.quantization_config if getattr(base, "is_quantized", False) else None
    bits, group_size = quantizer.stored_form["bits"] if quantizer else 0, quantizer and quantizer.group_size
    if arguments.quantize is not None and arguments.quantize != bits:
        bits, group_size = arguments.quantize, None
    adapted = add_adapter(base, adapter).eval()
    before = probe_logits(adapted, tokenizer)
    if quantizer:
        adapted.dequantize(torch.float32)
    layers = merge_layers(adapted, dtype, bits, group_size)
    if not layers:
        raise ValueError(f"--adapter: {adapter} adapts no linear layer, so there is nothing to merge")
    with warnings.catch_warnings(action="ignore"):  # That everything is merged already.
        merged = adapted.merge_and_unload().to(dtype)
    if bits:
        extra = quantizer.output_layer_bits if quantizer else None
        merged.quantize(bits, group_size=group_size, output_layer_bits=extra)
    stored_as = f"int{bits}" if bits else str(dtype).removeprefix("torch.")
    probe = compare_logits(before, probe_logits(merged, tokenizer))
    write_checkpoint(merged, tokenizer, output)
    report: dict[str, Any] = {
        "base": str(folder),
        "adapter": str(adapter),
        "stored_as": stored_as,
        "logits": asdict(probe),
    }
    report["layers"] = [asdict(layer) for layer in layers]
    (output / "export.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(merge_report(layers, probe, stored_as))


# ---------------------------------------------------------------------------------------------------------------------
# prefix, names
# ---------------------------------------------------------------------------------------------------------------------


def export_prefix(arguments: argparse.Namespace) -> None:
    """Write a prefix into a complete folder with its base, or alone under its published names.

    Raises:
        OSError, ValueError: for a prefix that cannot be read or does not fit the base.
    """
    prefixes = load_module("modeling_prefix")
    path, output = Path(arguments.prefix), Path(arguments.output)
    if arguments.model is None:
        weights = {f"transformer.prefix_encoder.{name}": one for name, one in prefixes.find_prefix(path).items()}
        file = prefixes.write_prefix(weights, output / PUBLISHED_PREFIX)
        print(f"{file}: {len(weights['transformer.prefix_encoder.embedding.weight'])} virtual tokens")
        return
    model = register().ChatGLMForConditionalGeneration.from_pretrained(
        arguments.model, dtype=arguments.dtype or "auto"
    )
    model.load_prefix_encoder(path)
    quantizer = model.hf_quantizer.quantization_config if model.quantized else None
    if arguments.quantize is not None and arguments.quantize != (quantizer.bits if quantizer else 0):
        if quantizer:
            model.dequantize()
        model.quantize(arguments.quantize)
    write_checkpoint(model, load_tokenizer(Path(arguments.model)), output)
    print(f"{output}: {model.config.pre_seq_len} virtual tokens, with their base")


def needs_our_names(adapter: Path, names: Mapping[str, str]) -> bool:
    """Whether an adapter has the published names of layers that are called otherwise here."""
    if not names:
        return False
    return any(f".{names['transformer.encoder.layers.']}" in key for key in read_adapter_weights(adapter))


def rename(value: Any, names: Mapping[str, str]) -> Any:
    """Replace parts of names in texts, lists and dictionaries of any depth."""
    if isinstance(value, str):
        for old, new in names.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, list):
        return [rename(one, names) for one in value]
    if isinstance(value, dict):
        return {rename(key, names): rename(one, names) for key, one in value.items()}
    return value


def convert_names(arguments: argparse.Namespace) -> None:
    """Rename the layers of an adapter, from the published names to ours, or back.

    Raises:
        OSError, ValueError: for an adapter that cannot be read, and where both names are the same.
    """
    adapter, output = Path(arguments.adapter), Path(arguments.output)
    register()
    config = AutoConfig.from_pretrained(arguments.model)
    if not config.published_names:
        raise ValueError(f"--model: layers of {config.model_version} have their published names here; use the adapter")
    to_ours = needs_our_names(adapter, config.published_names)
    names = {pub: ours for ours, pub in config.published_names.items()} if to_ours else config.published_names
    num_tensors = rename_adapter(adapter, output, names, arguments.bin)
    print(f"{output}: {num_tensors} tensors under {'our' if to_ours else 'the published'} names")


def rename_adapter(adapter: Path, output: Path, names: Mapping[str, str], is_bin: bool = False) -> int:
    """Write an adapter under other names of its layers, in the weights and in the settings, and count its tensors."""
    weights = rename(read_adapter_weights(adapter), names)
    settings = rename(read_json_object(adapter / "adapter_config.json"), names)
    output.mkdir(parents=True, exist_ok=True)
    if is_bin:
        torch.save(weights, output / ADAPTER_FILES[1])
    else:
        save_file({key: one.contiguous() for key, one in weights.items()}, output / ADAPTER_FILES[0], {"format": "pt"})
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (output / "adapter_config.json").write_text(f"{text}\n", encoding="utf-8")
    return len(weights)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {name: commands.add_parser(name) for name in ("merge", "prefix", "names")}
    for name, part in parts.items():
        part.add_argument("--output", required=True, help="a folder that does not exist or is empty")
        if name != "names":
            part.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the checkpoint's own else")
            part.add_argument(
                "--quantize", type=int, choices=[8, 4, 0], help="bits of the result, 0 for floats; the base's own else"
            )
    parts["merge"].add_argument("--adapter", required=True, help="a folder of PEFT's")
    parts["merge"].add_argument("--model", help="the base, if not the one that the adapter names")
    parts["prefix"].add_argument("--prefix", required=True, help="a file or folder with a prefix")
    parts["prefix"].add_argument("--model", help="the base; without it, the prefix alone is written")
    parts["names"].add_argument("--adapter", required=True, help="a folder of PEFT's")
    parts["names"].add_argument("--model", required=True, help="the base")
    parts["names"].add_argument("--bin", action="store_true", help="write PyTorch's format, for older programs")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parse_arguments(words)
    try:
        check_output(Path(arguments.output))
        {"merge": merge, "prefix": export_prefix, "names": convert_names}[arguments.command](arguments)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    logging.set_verbosity_error()
    sys.exit(main())
