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
"""Quantized weights beside bfloat16 and float16: speed of layers and of a model, memory while loading, quality.

`python benchmarks/quantized.py` runs all four parts on a CPU in some minutes; `--device cuda --layers 28` is the
command for a GPU. Everything is measured in one run and taken in turns, so that a machine that slows down slows all.

- layers: the linears of ChatGLM3-6B. Bandwidth is the bytes of the weight over the time; the fraction is of the copy
  bandwidth (bytes read and written) that this run measures first.
- model: a slice of ChatGLM3-6B, its width and few layers, random weights. Prefill, and decoding of one sequence after
  32 tokens.
- memory: the peak while quantizing on load, in a process of its own.
- quality: perplexity of the bundled checkpoint on its dialogues, and how far its distributions move. It knows them so
  well that the perplexity hardly tells the settings apart; the divergence does.
"""

import argparse
import copy
import json
import math
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from slices import REPOSITORY, build_native, build_slice, load_module, load_tokenizer
from timing import anonymous_bytes, median_seconds, print_table, write_report
from torch import nn


BUNDLED = REPOSITORY / "examples" / "tiny-chatglm3"
PARTS = ("layers", "model", "memory", "quality")
# Name -> out, in of ChatGLM3-6B.
SHAPES = {
    "query_key_value": (4608, 4096),
    "dense": (4096, 4096),
    "dense_h_to_4h": (27392, 4096),
    "dense_4h_to_h": (4096, 13696),
    "output_layer": (65024, 4096),
}
LAYER_SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4, groups of 128": {"bits": 4, "group_size": 128},
}
MODEL_SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int8, output 8": {"bits": 8, "output_layer_bits": 8},
    "int4": {"bits": 4},
    "int4, output 8": {"bits": 4, "output_layer_bits": 8},
    "int4, output 4": {"bits": 4, "output_layer_bits": 4},
    "int4, groups of 128, output 8": {"bits": 4, "group_size": 128, "output_layer_bits": 8},
}
QUALITY_SETTINGS: dict[str, dict[str, Any]] = {
    f"int{bits} {method}" + (f", groups of {group_size}" if group_size else ""): {
        "bits": bits,
        "method": method,
        "group_size": group_size,
    }
    for bits in (8, 4)
    for method in ("absmax", "mse")
    for group_size in (None, 128, 64, 32)
}


def load_code() -> tuple[ModuleType, type]:
    """The module of quantization, and the model class."""
    return load_module("quantization"), load_module("modeling_chatglm").ChatGLMForConditionalGeneration


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second when a large tensor is copied."""
    source = torch.ones(2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds({"copy": lambda: target.copy_(source)}, 9, device)["copy"]


@torch.no_grad()
def measure_layers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    quantization, _ = load_code()
    bandwidth = copy_bandwidth(arguments.device)
    print(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s")
    figures = []
    for layer_name, (out_features, in_features) in SHAPES.items():
        layers: dict[str, nn.Module] = {}
        linear = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16, device=arguments.device)
        for dtype in (torch.bfloat16, torch.float16):
            layers[str(dtype).removeprefix("torch.")] = copy.deepcopy(linear).to(dtype)
        for name, settings in LAYER_SETTINGS.items():
            quantized = quantization.QuantizedLinear(linear, settings["bits"], settings.get("group_size"))
            layers[name] = quantized.quantize_(linear.weight)
        for num_rows in arguments.rows:
            inputs = {
                name: torch.randn(
                    num_rows,
                    in_features,
                    dtype=torch.float16 if name == "float16" else torch.bfloat16,
                    device=arguments.device,
                )
                for name in layers
            }
            runs = {name: lambda name=name: layers[name](inputs[name]) for name in layers}
            seconds = median_seconds(runs, arguments.rounds, arguments.device, repeats=20 if num_rows <= 16 else 3)
            for name, value in seconds.items():
                num_bytes = sum(parameter.nbytes for parameter in layers[name].parameters())
                figures.append(
                    {
                        "layer": layer_name,
                        "rows": num_rows,
                        "weights": name,
                        "seconds": value,
                        "bytes_per_second": num_bytes / value,
                        "fraction_of_copy": num_bytes / value / bandwidth,
                        "speed_of_bfloat16": seconds["bfloat16"] / value,
                    }
                )
    rows = [
        [
            figure["layer"],
            str(figure["rows"]),
            figure["weights"],
            f"{1e3 * figure['seconds']:.3f}",
            f"{figure['bytes_per_second'] / 1e9:.1f}",
            f"{100 * figure['fraction_of_copy']:.0f} %",
            f"{figure['speed_of_bfloat16']:.2f}",
        ]
        for figure in figures
    ]
    print_table("Layers", ["layer", "rows", "weights", "ms", "GB/s", "of copy", "x bfloat16"], rows)
    return figures


def build_models(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """The slice in bfloat16 and float16, quantized from float16, as most are published, and the native one in bfloat16."""
    model = build_slice(arguments.layers, torch.float16, arguments.device, vocab_size=arguments.vocab)
    models = {"bfloat16": copy.deepcopy(model).bfloat16(), "float16": model}
    dtype = getattr(torch, arguments.dtype)
    for name, settings in MODEL_SETTINGS.items():
        models[name] = copy.deepcopy(model).to(dtype).quantize(**settings)
    models["native glm, bfloat16"] = build_native(models["bfloat16"])
    return models


@torch.no_grad()
def measure_model(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    models = build_models(arguments)
    prompt = torch.randint(3, arguments.vocab, (1, arguments.prompt), device=arguments.device)
    # On a GPU the library compiles the step with a static cache, which records it as a CUDA graph.
    settings = {"do_sample": False}
    if arguments.device.startswith("cuda"):
        settings["cache_implementation"] = "static"

    def generate(model: nn.Module, num_tokens: int) -> None:
        model.generate(prompt[:, :32], max_new_tokens=num_tokens, min_new_tokens=num_tokens, **settings)

    prefill = median_seconds(
        {name: lambda model=model: model(prompt, logits_to_keep=1) for name, model in models.items()},
        arguments.rounds,
        arguments.device,
    )
    short, long = (
        median_seconds(
            {name: lambda model=model: generate(model, num_tokens) for name, model in models.items()},
            arguments.rounds,
            arguments.device,
        )
        for num_tokens in (2, 2 + arguments.tokens)
    )
    decode = {name: (long[name] - short[name]) / arguments.tokens for name in models}
    figures = [
        {
            "weights": name,
            "bytes": sum(parameter.nbytes for parameter in model.parameters()),
            "decode_seconds": decode[name],
            "decode_speed_of_bfloat16": decode["bfloat16"] / decode[name],
            "prefill_seconds": prefill[name],
            "prefill_time_of_bfloat16": prefill[name] / prefill["bfloat16"],
        }
        for name, model in models.items()
    ]
    rows = [
        [
            figure["weights"],
            f"{figure['bytes'] / 1e9:.2f}",
            f"{1e3 * figure['decode_seconds']:.2f}",
            f"{figure['decode_speed_of_bfloat16']:.2f}",
            f"{1e3 * figure['prefill_seconds']:.0f}",
            f"{figure['prefill_time_of_bfloat16']:.2f}",
        ]
        for figure in figures
    ]
    header = ["weights", "GB", "ms/token", "x bfloat16", f"prefill of {arguments.prompt}, ms", "time of bfloat16"]
    print_table(f"{arguments.layers} layers of ChatGLM3-6B, other tensors {arguments.dtype}", header, rows)
    return figures


def load_quantized(folder: str, device: str, bits: int) -> None:
    """Quantize on load and print, as JSON, the peak of memory, the model's size and its largest float tensor."""
    _, model_class = load_code()
    before, peak, is_loaded = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_loaded.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    settings = {"quant_method": "chatglm", "bits": bits}
    model = model_class.from_pretrained(
        folder, dtype=torch.float16, quantization_config=settings, device_map={"": device}
    )
    is_loaded.set()
    watcher.join()
    parameters = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    largest = max(2 * math.prod(shape) for shape in SHAPES.values())
    on_gpu = device.startswith("cuda")
    report = {
        "peak": torch.cuda.max_memory_allocated() if on_gpu else peak - before,
        "model": sum(parameters.values()),
        "largest_float_tensor": largest,
    }
    print(json.dumps(report))


def measure_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        build_slice(arguments.layers, torch.float16).save_pretrained(folder)
        for bits in (8, 4):
            call = f"import quantized; quantized.load_quantized({folder!r}, {arguments.device!r}, {bits})"
            output = subprocess.run(
                [sys.executable, "-c", call], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
            )
            figures.append({"weights": f"int{bits}", **json.loads(output.stdout.splitlines()[-1])})
    for figure in figures:
        figure["of_model_and_tensor"] = figure["peak"] / (figure["model"] + figure["largest_float_tensor"])
    rows = [
        [
            figure["weights"],
            *(f"{figure[key] / 1e9:.2f}" for key in ("model", "largest_float_tensor", "peak")),
            f"{figure['of_model_and_tensor']:.2f}",
        ]
        for figure in figures
    ]
    header = ["weights", "model, GB", "largest float tensor, GB", "peak, GB", "peak / (model + tensor)"]
    print_table("Memory while quantizing on load", header, rows)
    return figures


def read_conversations(num_conversations: int = 100, num_turns: int = 4) -> list[dict[str, list[int]]]:
    """Ids and answers of conversations made of several of the bundled dialogues in a row.

    The bundled checkpoint knows each dialogue by heart; of several in a row it is less sure.
    """
    tokenizer = load_tokenizer(BUNDLED)
    lines = (REPOSITORY / "examples" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    dialogues = [json.loads(line)["messages"] for line in lines]
    dialogues = [
        messages for messages in dialogues if [message["role"] for message in messages] == ["user", "assistant"]
    ]
    draw = random.Random(0)
    return [
        tokenizer.apply_chat_template(
            sum((draw.choice(dialogues) for _ in range(num_turns)), []),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for _ in range(num_conversations)
    ]


@torch.no_grad()
def answer_scores(model: nn.Module, conversations: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of every token, `[answer tokens, vocabulary]`, and the right ones, `[answer tokens]`."""
    scores, targets = [], []
    for conversation in conversations:
        input_ids, is_answer = (torch.tensor(conversation[key]) for key in ("input_ids", "assistant_masks"))
        kept = is_answer[1:] == 1
        scores.append(model(input_ids[None].to(model.device)).logits[0, :-1].float().cpu()[kept].log_softmax(-1))
        targets.append(input_ids[1:][kept])
    return torch.cat(scores), torch.cat(targets)


def measure_quality(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    _, model_class = load_code()
    conversations = read_conversations()
    model = model_class.from_pretrained(BUNDLED, dtype=torch.float32).to(arguments.device).eval()
    expected, targets = answer_scores(model, conversations)
    figures = []
    for name, settings in {"float32": None, **QUALITY_SETTINGS}.items():
        quantized = copy.deepcopy(model)
        if settings is not None:
            quantized.quantize(**settings)
        scores, _ = answer_scores(quantized, conversations)
        figures.append(
            {
                "weights": name,
                "perplexity": nn.functional.nll_loss(scores, targets).exp().item(),
                "divergence": (expected.exp() * (expected - scores)).sum(-1).mean().item(),
            }
        )
    rows = [
        [
            figure["weights"],
            f"{figure['perplexity']:.4f}",
            f"{100 * (figure['perplexity'] / figures[0]['perplexity'] - 1):+.2f} %",
            f"{1e6 * figure['divergence']:.1f}",
        ]
        for figure in figures
    ]
    header = ["weights", "perplexity", "beside float32", "divergence from float32, 1e-6 nats per token"]
    print_table("The bundled checkpoint on its dialogues", header, rows)
    return figures


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=65024, help="ids of the model; fewer take less memory")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="of what is not quantized")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 256])
    parser.add_argument("--prompt", type=int, default=256, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens generated in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    # Not by `choices`, which Python 3.11 applies to the default as a whole.
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {unknown.pop()!r}; there are {', '.join(PARTS)}")
    arguments.parts = arguments.parts or list(PARTS)
    return arguments


def main() -> int:
    arguments = read_arguments()
    measures = {"layers": measure_layers, "model": measure_model, "memory": measure_memory, "quality": measure_quality}
    report = {part: measures[part](arguments) for part in PARTS if part in arguments.parts}
    write_report(arguments.json, {**report, "settings": vars(arguments)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
