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
"""Decode speed beside Transformers' native `GlmForCausalLM` of the same shape, in one run.

`python benchmarks/decode.py` builds a slice of ChatGLM3-6B (its width, few layers, random weights) and the native model
of the same shape, checks that both compute the same from the same weights, and times greedy decoding of one sequence.
The two take turns, so that a machine that slows down slows both; the ratio is the median over the rounds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import GlmConfig, GlmForCausalLM


# The examples' helper loads this checkout's code.
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from local_code import REPOSITORY, load_module  # noqa: E402


def build_models(num_layers: int, dtype: torch.dtype, device: str) -> dict[str, torch.nn.Module]:
    """This repository's model and the native one, with the same random weights."""
    model_class = load_module("modeling_chatglm").ChatGLMForConditionalGeneration
    config = model_class.config_class.from_pretrained(REPOSITORY, num_hidden_layers=num_layers, dtype=dtype)
    native_config = GlmConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        pad_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    models = {"chatglm": model_class(config), "native glm": GlmForCausalLM(native_config)}
    torch.set_default_dtype(torch.float32)
    copy_weights(*models.values())
    return {name: model.to(device).eval() for name, model in models.items()}


@torch.no_grad()
def copy_weights(model: torch.nn.Module, native: torch.nn.Module) -> None:
    """Give the native model our weights: its query, key and value projections are separate."""
    for ours, theirs in zip(model.transformer.encoder.layers, native.model.layers):
        attention = theirs.self_attn
        sizes = [projection.weight.shape[0] for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        for name in ("weight", "bias"):
            parts = getattr(ours.self_attention.query_key_value, name).split(sizes)
            for part, projection in zip(parts, (attention.q_proj, attention.k_proj, attention.v_proj)):
                getattr(projection, name).copy_(part)
        attention.o_proj.weight.copy_(ours.self_attention.dense.weight)
        theirs.mlp.gate_up_proj.weight.copy_(ours.mlp.dense_h_to_4h.weight)
        theirs.mlp.down_proj.weight.copy_(ours.mlp.dense_4h_to_h.weight)
    native.model.embed_tokens.weight.copy_(model.get_input_embeddings().weight)
    native.lm_head.weight.copy_(model.get_output_embeddings().weight)


def time_decode(model: torch.nn.Module, prompt: torch.Tensor, num_tokens: int) -> float:
    """Seconds per new token, without the prefill: long minus short generation over the difference in tokens."""
    seconds = []
    for length in (1, 1 + num_tokens):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        if prompt.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / num_tokens


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens generated in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    models = build_models(arguments.layers, getattr(torch, arguments.dtype), arguments.device)
    prompt = torch.randint(3, 60000, (1, arguments.prompt), device=arguments.device)
    logits = [model(prompt).logits.float() for model in models.values()]
    print(f"largest difference of the logits: {(logits[0] - logits[1]).abs().max().item():.3g}")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(arguments.rounds + 1):
        for name, model in models.items():
            seconds[name].append(time_decode(model, prompt, arguments.tokens))
    seconds = {name: values[1:] for name, values in seconds.items()}  # The first round warms up.
    ratios = [native / ours for ours, native in zip(seconds["chatglm"], seconds["native glm"])]
    figures = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in figures.items():
        print(f"{name:12} {1000 * value:8.1f} ms per token, {1 / value:6.2f} tokens/s")
    print(f"speed relative to the native model: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    if arguments.json:
        report = {"seconds_per_token": seconds, "ratio": statistics.median(ratios), "threads": torch.get_num_threads()}
        arguments.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
