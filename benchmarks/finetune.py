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
"""Training speed beside Transformers' native `GlmForCausalLM`, and what each method trains.

`python benchmarks/finetune.py` counts the trained parameters of each method at the size of ChatGLM3-6B, on the meta
device, and times forward and backward passes of a slice of it (its width, few layers, random weights) beside the native
model with the same weights. The two take turns; the ratio is the median over the rounds.
"""

import argparse
import sys
from pathlib import Path

import peft
import torch
from slices import REPOSITORY, build_native, build_slice, load_module
from timing import take_turns, time_steps, write_report


# Bytes for each trained parameter: its gradient and two moments of Adam in float32, and itself in float32.
BYTES_PER_TRAINED = 16


def count_parameters(model_class: type) -> list[tuple[str, int, int]]:
    """Name, trained and all parameters of each method at the size of ChatGLM3-6B."""
    config_class = model_class.config_class

    def make(**settings) -> torch.nn.Module:
        with torch.device("meta"):
            return model_class(config_class.from_pretrained(REPOSITORY, **settings))

    def adapt(config: peft.PeftConfig) -> torch.nn.Module:
        return peft.get_peft_model(make(), config)

    models = {
        "full": make(),
        "LoRA, rank 8, query_key_value": adapt(peft.LoraConfig(r=8, target_modules=["query_key_value"])),
        "LoRA, rank 8, all linear layers": adapt(peft.LoraConfig(r=8, target_modules="all-linear")),
        "AdaLoRA, rank 12 to 8, query_key_value": adapt(
            peft.AdaLoraConfig(init_r=12, target_r=8, total_step=1000, target_modules=["query_key_value"])
        ),
        "P-tuning v2, 128 tokens": make(pre_seq_len=128),
        "P-tuning v2, 128 tokens, projected": make(pre_seq_len=128, prefix_projection=True),
    }
    return [
        (
            name,
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            sum(parameter.numel() for parameter in model.parameters()),
        )
        for name, model in models.items()
    ]


def take_step(model: torch.nn.Module, input_ids: torch.Tensor) -> None:
    """A forward and a backward pass."""
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    model.zero_grad(set_to_none=True)


def adapt(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """LoRA on the projections to queries, keys and values: one module here, three in the native model."""
    targets = ["query_key_value"] if name == "chatglm" else ["q_proj", "k_proj", "v_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Tokens per second of both models, with all weights and with LoRA, with and without gradient checkpointing."""
    model = build_slice(arguments.layers, getattr(torch, arguments.dtype), arguments.device)
    models = {"chatglm": model, "native glm": build_native(model)}
    input_ids = torch.randint(3, 60000, (arguments.batch, arguments.length), device=arguments.device)
    figures = []
    for method in ("full", "LoRA"):
        if method == "LoRA":
            models = {name: adapt(model, name) for name, model in models.items()}
        for checkpointing in (False, True):
            for model in models.values():
                model.train()
                if method == "LoRA":
                    model.enable_input_require_grads()
                (model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable)()
            series = take_turns(
                {
                    name: lambda model=model: time_steps(lambda: take_step(model, input_ids), device=arguments.device)
                    for name, model in models.items()
                },
                arguments.rounds,
            )
            low, ratio, high = series["chatglm"].ratios_to(series["native glm"])
            figure: dict[str, object] = {"method": method, "checkpointing": checkpointing}
            figure |= {name: input_ids.numel() / one.median for name, one in series.items()}
            figures.append(figure | {"ratio": ratio})
            print(
                f"{method:5} checkpointing {'on ' if checkpointing else 'off'} "
                + ", ".join(f"{name} {figure[name]:6.1f} tokens/s" for name in models)
                + f", ratio {ratio:.3f} ({low:.3f}-{high:.3f})",
                flush=True,
            )
    return figures


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="tokens in each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    counts = count_parameters(load_module("modeling_chatglm").ChatGLMForConditionalGeneration)
    for name, trained, total in counts:
        print(
            f"{name:40} {trained / 1e6:9.2f} of {total / 1e6:.0f} million parameters trained, "
            f"{trained * BYTES_PER_TRAINED / 1e9:6.2f} GB for them, their gradients and Adam"
        )
    figures = measure(arguments)
    write_report(arguments.json, {"parameters": counts, "speed": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
