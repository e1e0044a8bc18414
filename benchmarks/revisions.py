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
"""Decoding and loading by this checkout beside an older revision of it, in one run.

`python benchmarks/revisions.py d74a78d` takes the `.py` files of that revision out of git, writes a slice of ChatGLM3-6B
(its width, few layers, random weights), quantizes it with both codes in every width, and decodes. The two take turns at
every single token, so that a machine that slows down slows both; the ratio is the median over the tokens.

`--narrow` makes the network 64 channels wide, where weights cost nothing and the host's work for a token is left:
`python benchmarks/revisions.py d74a78d --narrow --layers 28 --weights float --loads 0`.

Quantizing while loading is measured in a process for each code, as only one of them can be the library's quantizer:
seconds, and the memory that the loaded model takes besides mapped files.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import anonymous_bytes, quartiles, write_report
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module


REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, Any]] = {
    "float": {},
    "int8": {"bits": 8},
    "int8, output 8": {"bits": 8, "output_layer_bits": 8},
    "int4": {"bits": 4},
    "int4, output 4": {"bits": 4, "output_layer_bits": 4},
    "int4, groups of 128": {"bits": 4, "group_size": 128},
    "int4, groups of 32": {"bits": 4, "group_size": 32},
}


# With `--narrow`.
NARROW = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 128}


def load_class(folder: Path) -> Any:
    return get_class_from_dynamic_module("modeling_chatglm.ChatGLMForConditionalGeneration", str(folder))


def extract_revision(revision: str, folder: Path) -> Path:
    """The top level of a revision, in a folder whose name tells its module from this checkout's."""
    archive = subprocess.run(["git", "archive", revision], cwd=REPOSITORY, check=True, capture_output=True).stdout
    target = folder / "older_revision"
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(target, filter="data")
    return target


def write_checkpoint(model_class: Any, num_layers: int, changes: dict[str, int], folder: Path) -> Path:
    """A slice of ChatGLM3-6B in float16, the dtype of most published checkpoints."""
    config = model_class.config_class.from_pretrained(
        REPOSITORY, num_hidden_layers=num_layers, dtype=torch.float16, **changes
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    model_class(config).save_pretrained(folder / "checkpoint")
    torch.set_default_dtype(torch.float32)
    return folder / "checkpoint"


def load(model_class: Any, folder: Path, dtype: torch.dtype, settings: dict[str, Any]) -> nn.Module:
    model = model_class.from_pretrained(folder, dtype=dtype).eval()
    return model.quantize(**settings) if settings else model


def print_load(code: str, folder: str, bits: int) -> None:
    """Quantize while loading, in a process of its own, and print seconds and bytes as JSON."""
    model_class = load_class(Path(code))
    before, start = anonymous_bytes(), time.perf_counter()
    settings = {"quant_method": "chatglm", "bits": bits}
    model = model_class.from_pretrained(folder, dtype=torch.float16, quantization_config=settings)
    seconds = time.perf_counter() - start
    # Some revisions prepare weights when they are first used.
    with torch.inference_mode():
        model(torch.tensor([[64790, 64792]]))
    print(json.dumps([seconds, anonymous_bytes() - before]))


def compare_loading(codes: list[Path], folder: Path, rounds: int) -> list[dict[str, Any]]:
    figures = []
    for bits in (8, 4):
        loads: list[list[list[float]]] = [[], []]
        for _ in range(rounds):
            for code, found in zip(codes, loads):
                call = f"import revisions; revisions.print_load({str(code)!r}, {str(folder)!r}, {bits})"
                output = subprocess.run(
                    [sys.executable, "-c", call], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
                ).stdout
                found.append(json.loads(output.splitlines()[-1]))
        (older, older_bytes), (this, this_bytes) = ([min(values) for values in zip(*found)] for found in loads)
        print(f"loading in int{bits}: {older:.1f} s and {older_bytes / 1e9:.2f} GB before, ", end="")
        print(f"{this:.1f} s and {this_bytes / 1e9:.2f} GB now", flush=True)
        figures.append({"bits": bits, "seconds": [older, this], "bytes": [older_bytes, this_bytes]})
    return figures


@torch.inference_mode()
def time_tokens(models: list[nn.Module], batch: int, arguments: argparse.Namespace) -> tuple[list[list[float]], float]:
    """Seconds of every token of each model, and the greatest difference of their logits over the greatest logit."""
    prompt = torch.randint(3, 60000, (batch, arguments.prompt))
    caches = [model(prompt, use_cache=True).past_key_values for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    difference = 0.0
    for step in range(arguments.tokens + 2):
        token = torch.randint(3, 60000, (batch, 1))
        logits = []
        for place in (0, 1) if step % 2 else (1, 0):
            start = time.perf_counter()
            logits.append(models[place](token, past_key_values=caches[place], use_cache=True).logits)
            seconds[place].append(time.perf_counter() - start)
        difference = max(difference, ((logits[0] - logits[1]).abs().max() / logits[0].abs().max()).item())
    return [times[2:] for times in seconds], difference  # The first two warm up.


def compare(classes: list[Any], folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    print("| weights | other tensors | batch | older, ms | this, ms | this / older | quartiles | logits differ by |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.weights:
        for dtype in arguments.dtypes:
            models = [load(model_class, folder, getattr(torch, dtype), SETTINGS[name]) for model_class in classes]
            for batch in arguments.batches:
                seconds, difference = time_tokens(models, batch, arguments)
                ratios = [new / old for old, new in zip(*seconds)]
                low, ratio, high = quartiles(ratios)
                older, this = (1e3 * statistics.median(times) for times in seconds)
                print(
                    f"| {name} | {dtype} | {batch} | {older:.1f} | {this:.1f} | {ratio:.3f} | {low:.2f}-{high:.2f} | "
                    f"{difference:.1e} |",
                    flush=True,
                )
                figure = {"weights": name, "dtype": dtype, "batch": batch, "ratio": ratio, "seconds": seconds}
                figures.append(figure)
            del models
    return figures


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "revision", nargs="?", default="HEAD", help="in git, such as a tag; by default the last commit"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--narrow", action="store_true", help="make the network 64 channels wide")
    parser.add_argument("--weights", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="WIDTH")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float16", "bfloat16", "float32"), default=["float16", "bfloat16"]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=40, help="tokens that are timed")
    parser.add_argument("--loads", type=int, default=2, help="how often a model is loaded with each code; 0 for never")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("HF_MODULES_CACHE", f"{scratch}/modules")
        older = extract_revision(arguments.revision, Path(scratch))
        classes = [load_class(folder) for folder in (older, REPOSITORY)]
        checkpoint = write_checkpoint(classes[0], arguments.layers, NARROW if arguments.narrow else {}, Path(scratch))
        figures = compare(classes, checkpoint, arguments)
        loads = compare_loading([older, REPOSITORY], checkpoint, arguments.loads) if arguments.loads else []
    slowest = max(figures, key=lambda figure: figure["ratio"])
    print(f"\nslowest beside the older code: {slowest['weights']}, batch {slowest['batch']}: {slowest['ratio']:.3f}")
    write_report(arguments.json, {"figures": figures, "loads": loads})
    return 0


if __name__ == "__main__":
    sys.exit(main())
