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
"""The generations beside each other: speed at their published depth and width, and the memory of their weights.

`python benchmarks/family.py` times a token of each generation in 16, 8 and 4 bits (embeddings and output layer in
16, as in the published integer checkpoints) behind a short and a long context, in turns, with random weights. All layers
of a model share those of the first, which is read again for each of them, so it takes the memory of one layer and the
time of all (`slices.repeat_layer`).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from slices import build_slice, read_bytes, repeat_layer
from timing import Turn, print_table, read_bandwidth, share_of_others, take_turns, time_steps, write_report


# What a configuration says besides ChatGLM3-6B's.
GENERATIONS: dict[str, dict[str, Any]] = {
    "ChatGLM-6B": {
        "model_version": "chatglm",
        "vocab_size": 130528,
        "intermediate_size": 16384,
        "multi_query_attention": False,
        "add_bias_linear": True,
        "tie_word_embeddings": True,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "pad_token_id": 3,
    },
    "ChatGLM2-6B": {"model_version": "chatglm2"},
    "ChatGLM3-6B": {"model_version": "chatglm3"},
    "GLM-4-9B": {"model_version": "glm4", "vocab_size": 151552, "rope_ratio": 500},
}
DEPTHS = {"GLM-4-9B": 40}
# Width -> GB of GPU memory that ChatGLM-6B's authors name for it.
CLAIMED = {16: 13, 8: 10, 4: 6}
FIRST, SECOND = "ChatGLM-6B", "ChatGLM2-6B"


def build(name: str, bits: int, arguments: argparse.Namespace) -> Any:
    settings = GENERATIONS[name] | ({"vocab_size": arguments.vocab} if arguments.vocab else {})
    if arguments.vocab and name == FIRST:
        settings |= {"bos_token_id": arguments.vocab - 2, "eos_token_id": arguments.vocab - 1}
    model = build_slice(1, getattr(torch, arguments.dtype), **settings)
    if bits < 16:
        model.quantize(bits=bits)
    return repeat_layer(model, arguments.layers or DEPTHS.get(name, 28))


def weight_bytes(model: Any) -> int:
    """All weights, as a checkpoint of this depth has them."""
    embedding = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings().weight is embedding
    return read_bytes(model) + (0 if is_tied else embedding.nbytes)


@torch.no_grad()
def make_step(model: Any, context: int) -> tuple[Callable[[], Any], int]:
    """A step behind that many tokens of random keys and values, and the bytes that these take."""
    ids = torch.randint(3, 64, (1, 2))
    cache = model(ids[:, :1], use_cache=True).past_key_values
    shape = list(cache.layers[0].keys.shape)
    shape[-2] = context - 1
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape, dtype=model.dtype), torch.randn(shape, dtype=model.dtype), layer)
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    # ChatGLM-6B has two positions for each token: of the mask, and behind it.
    positions = {"position_ids": torch.tensor([[[context - 1], [1]]])} if model.config.prefix_lm else {}

    def step() -> Any:
        return model(ids[:, 1:], past_key_values=cache, use_cache=True, logits_to_keep=1, **positions)

    return step, num_bytes


@torch.no_grad()
def take_turn(step: Callable[[], Any], num_steps: int) -> Turn:
    return time_steps(step, num_steps, untimed=1)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    bandwidth = read_bandwidth(torch.get_num_threads())
    print(f"read bandwidth: {bandwidth / 1e9:.1f} GB/s")
    figures = []
    for bits in arguments.bits:
        models = {name: build(name, bits, arguments) for name in arguments.generations}
        for context in arguments.contexts:
            made = {name: make_step(model, context) for name, model in models.items()}
            runs = {name: lambda step=step: take_turn(step, arguments.steps) for name, (step, _) in made.items()}
            series = take_turns(runs, arguments.rounds, patience=arguments.patience)
            bandwidth = max(bandwidth, read_bandwidth(torch.get_num_threads()))
            for name, one in series.items():
                read = read_bytes(models[name]) + made[name][1]
                figures.append(
                    {
                        "generation": name,
                        "layers": models[name].config.num_hidden_layers,
                        "bits": bits,
                        "context": context,
                        "weight_bytes": weight_bytes(models[name]),
                        "cache_bytes": made[name][1],
                        "seconds": one.quartiles,
                        "of_limit": read / bandwidth / one.median,
                        "ratio_to_first": one.ratios_to(series[FIRST]) if FIRST in series else None,
                        "others": share_of_others([one]),
                    }
                )
                print("| " + " | ".join(row_of(figures[-1])) + " |", flush=True)
        del models
    return figures


HEADER = [
    "bits",
    "context",
    "generation",
    f"× {FIRST}",
    "ms per token",
    "of limit",
    "weights, GB",
    "cache, GB",
    "others",
]


def row_of(figure: dict[str, Any]) -> list[str]:
    ratio = figure["ratio_to_first"]
    others = figure["others"]
    return [
        str(figure["bits"]),
        str(figure["context"]),
        f"{figure['generation']}, {figure['layers']} layers",
        "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})",
        f"{1e3 * figure['seconds'][1]:.1f}",
        f"{100 * figure['of_limit']:.0f} %",
        f"{figure['weight_bytes'] / 1e9:.2f}",
        f"{figure['cache_bytes'] / 1e9:.2f}",
        "" if others is None else f"{100 * others:.0f} %",
    ]


def print_report(figures: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    title = f"A token, batch 1, {torch.get_num_threads()} threads, {arguments.dtype}"
    print_table(title, HEADER, [row_of(figure) for figure in figures])
    ratios = {
        (figure["bits"], figure["context"]): figure["ratio_to_first"][1]
        for figure in figures
        if figure["generation"] == SECOND and figure["ratio_to_first"]
    }
    if (bits := max((bits for bits, _ in ratios), default=None)) is not None:
        context = max(context for _, context in ratios)
        print(
            f"\n{SECOND} is {100 * ratios[bits, context] - 100:.0f} % faster than {FIRST} behind {context} tokens in ",
            end="",
        )
        print(f"{bits} bits; its authors name 42 % for their code on a GPU")
    for figure in figures:
        if figure["generation"] == FIRST and figure["context"] == max(arguments.contexts):
            total = (figure["weight_bytes"] + figure["cache_bytes"]) / 1e9
            print(f"{FIRST} in {figure['bits']} bits: {total:.1f} GB with its cache; its authors name ", end="")
            print(f"{CLAIMED[figure['bits']]} GB of GPU memory")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=list(GENERATIONS), metavar="NAME")
    parser.add_argument("--bits", type=int, nargs="+", choices=CLAIMED, default=list(CLAIMED), metavar="BITS")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 2048])
    parser.add_argument("--layers", type=int, help="of every model; as published by default")
    parser.add_argument("--vocab", type=int, help="ids of every model; as published by default")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="of what is not quantized"
    )
    parser.add_argument("--steps", type=int, default=2, help="tokens in each turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=int, default=2, help="how often a turn is repeated that others disturbed")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    figures = measure(arguments)
    print_report(figures, arguments)
    write_report(arguments.json, {"figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
