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
"""What does a picture cost? GLM-4V-9B in int4 on this machine: loading, the first token, and where the time goes.

`python benchmarks/pictures.py` writes a folder of GLM-4V-9B's published shape (40 layers, a tower of 63, pictures of
1120 × 1120) with random codes, loads it in a process of its own and generates behind one picture. 11 GB are written and
removed again; the memory that counts is what the process has besides mapped files.

Beside the seconds on the clock stand those that the process computed, divided by its threads: what an undisturbed machine
would take at best.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from slices import load_module
from timing import anonymous_bytes, read_bandwidth, write_report
from torch import nn


# As the published config.json has them; `boi_token_id` and `eoi_token_id` in the quick run lie within its vocabulary.
GLM4V: dict[str, Any] = {
    "model_version": "glm4v",
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_group_num": 2,
    "layernorm_epsilon": 1.5625e-07,
    "seq_length": 8192,
    "eos_token_id": [],
    "pad_token_id": 0,
}
SHARD_BYTES = 2**30
BLOCK_BYTES = 2**26
# Standard deviations of random codes of 8 and of 4 bits, and the one that weights have.
CODE_DEVIATIONS = {8: 73.9, 4: 4.6}
DEVIATION = 0.02
BEFORE, BEHIND = 5, 24


class PeakMemory:
    """The most that the process has besides mapped files, seen fifty times a second."""

    def __init__(self) -> None:
        self.bytes, self.is_done = anonymous_bytes(), threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while not self.is_done.wait(0.02):
            self.bytes = max(self.bytes, anonymous_bytes())


class Times:
    """Seconds on the clock and of computing by name; a part of another one counts in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, start: tuple[float, float]) -> None:
        clock, computed = self.seconds.setdefault(name, [0.0, 0.0])
        now = self.now()
        self.seconds[name] = [clock + now[0] - start[0], computed + now[1] - start[1]]

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time() / torch.get_num_threads()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.add(name, start)

    def watch(self, name: str, module: nn.Module) -> None:
        starts: list[tuple[float, float]] = []
        module.register_forward_pre_hook(lambda *_: starts.append(self.now()))
        module.register_forward_hook(lambda *_: self.add(name, starts.pop()))


def make_config(arguments: argparse.Namespace) -> Any:
    patches = arguments.image_size // 14
    vision = {
        "image_size": arguments.image_size,
        "num_positions": patches**2 + 1,
        "num_hidden_layers": arguments.vision_layers,
    }
    return load_module("configuration_chatglm").ChatGLMConfig(
        **GLM4V,
        num_layers=arguments.layers,
        padded_vocab_size=arguments.vocab,
        boi_token_id=arguments.vocab - 2,
        eoi_token_id=arguments.vocab - 1,
        vision_config=vision,
        dtype=torch.bfloat16,
    )


def make_tensor(name: str, tensor: torch.Tensor, block: torch.Tensor, bits: dict[str, int]) -> torch.Tensor:
    """Random codes or floats of the shape of an empty tensor, cheaply: codes come from one block of random bytes."""
    if tensor.dtype == torch.int8:
        return block.repeat(-(-tensor.numel() // block.numel()))[: tensor.numel()].view(tensor.shape).clone()
    if name.endswith("weight_scale"):
        return torch.full(tensor.shape, DEVIATION / CODE_DEVIATIONS[bits[name.removesuffix(".weight_scale")]]).to(
            tensor.dtype
        )
    if "norm" in name:
        return (torch.zeros if name.endswith("bias") else torch.ones)(tensor.shape, dtype=tensor.dtype)
    return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0.0, DEVIATION)


def write_folder(arguments: argparse.Namespace, folder: Path) -> int:
    """A checkpoint with random weights, a shard at a time; its bytes."""
    quantization, config = load_module("quantization"), make_config(arguments)
    settings = quantization.ChatGLMQuantizationConfig(arguments.bits, vision_bits=arguments.vision_bits)
    with torch.device("meta"):
        model = load_module("modeling_chatglm").ChatGLMForConditionalGeneration(config).to(torch.bfloat16)
    bits = quantization.linears_to_quantize(model, settings)
    for name, number in bits.items():
        model.set_submodule(name, quantization.make_quantized_layer(model, name, number, settings))
    config.quantization_config = settings.to_dict()
    config.save_pretrained(folder)
    block = torch.empty(BLOCK_BYTES, dtype=torch.int8).random_(-128, 128)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    total = 0
    state = model.state_dict()
    for number, (name, tensor) in enumerate(state.items(), start=1):
        shard[name] = make_tensor(name, tensor, block, bits)
        total += shard[name].nbytes
        if sum(part.nbytes for part in shard.values()) >= SHARD_BYTES or number == len(state):
            file = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def watch_parts(model: Any, times: Times) -> None:
    vision, encoder = model.transformer.vision, model.transformer.encoder
    times.watch("eyes", vision)
    times.watch("eyes: adapter", vision.linear_proj)
    for layer in vision.transformer.layers:
        times.watch("eyes: feed-forward", layer.mlp)
        times.watch("eyes: attention with its projections", layer.attention)
        times.watch("eyes: projections of attention", layer.attention.query_key_value)
        times.watch("eyes: projections of attention", layer.attention.dense)
    times.watch("decoder", encoder)


class FirstTokens:
    """A streamer that notes when tokens come, and what the first one took; the prompt comes first."""

    def __init__(self, parts: Times) -> None:
        self.times: list[tuple[float, float]] = []
        self.parts, self.seconds = parts, dict[str, list[float]]()

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(Times.now())
        if len(self.times) == 2:
            self.seconds = dict(self.parts.seconds)

    def end(self) -> None:
        """Nothing is kept."""


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Load the folder and generate behind a picture, in this process."""
    torch.set_num_threads(arguments.threads)
    before, peak, times = anonymous_bytes(), PeakMemory(), Times()
    model_class = load_module("modeling_chatglm").ChatGLMForConditionalGeneration
    with times.measure("loading"):
        model = model_class.from_pretrained(folder, dtype="auto").eval()
    figures: dict[str, Any] = {"loaded_bytes": anonymous_bytes() - before, "peak_loading_bytes": peak.bytes - before}
    # The kernels are compiled at their first use.
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    watch_parts(model, times)
    ids = torch.randint(3, arguments.vocab - 2, (1, BEFORE + 3 + BEHIND))
    ids[0, BEFORE : BEFORE + 3] = torch.tensor([arguments.vocab - 2, 0, arguments.vocab - 1])
    picture = torch.randn(1, 3, arguments.image_size, arguments.image_size)
    peak.bytes, tokens, start = anonymous_bytes(), FirstTokens(times), Times.now()
    model.generate(ids, images=picture, max_new_tokens=arguments.tokens, do_sample=False, streamer=tokens)
    _, first, *_, last = tokens.times
    peak.is_done.set()
    seconds = tokens.seconds | {"first token": [now - then for now, then in zip(first, start)]}
    later = [(now - then) / (arguments.tokens - 1) for now, then in zip(last, first)]
    figures |= {
        "peak_generating_bytes": peak.bytes - before,
        "seconds": seconds,
        "seconds_per_later_token": later,
    }
    return figures


def show(figures: dict[str, Any]) -> None:
    print(
        f"files {figures['file_bytes'] / 1e9:.1f} GB, memory besides mapped files: {figures['loaded_bytes'] / 1e9:.2f} GB ",
        end="",
    )
    print(f"once loaded, {figures['peak_loading_bytes'] / 1e9:.2f} GB at most while loading, ", end="")
    print(f"{figures['peak_generating_bytes'] / 1e9:.2f} GB while generating")
    print("| part | seconds | of computing |\n|---|---|---|")
    for name, (clock, computed) in figures["seconds"].items():
        print(f"| {name} | {clock:.1f} | {computed:.1f} |")
    clock, computed = figures["seconds_per_later_token"]
    print(f"| each later token | {clock:.3f} | {computed:.3f} |")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--vision-layers", type=int, default=63)
    parser.add_argument("--image-size", type=int, default=1120, help="a multiple of 14")
    parser.add_argument("--vocab", type=int, default=151552)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--vision-bits", type=int, choices=(4, 8), help="of the tower and the adapter", default=8)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the files are written for a while")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments, arguments.measure)))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start = time.perf_counter()
        file_bytes = write_folder(arguments, Path(folder))
        print(f"{file_bytes / 1e9:.1f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", folder]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures = {"file_bytes": file_bytes, "threads": arguments.threads, **json.loads(output.splitlines()[-1])}
    figures["read_bandwidth"] = read_bandwidth(arguments.threads)
    show(figures)
    write_report(arguments.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
