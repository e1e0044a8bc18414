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
"""Peak memory of prefilling long prompts, whole and in chunks: it grows with the length, not with its square.

`python benchmarks/prefill_memory.py` builds a model of small width with GLM-4's positions and measures, for each
length in a process of its own, how much the peak resident memory rises above what the model alone takes.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
from slices import load_module
from timing import write_report


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(length: int, chunk: int | None) -> float:
    """Megabytes that generating one token after `length` tokens adds to the peak."""
    model_class = load_module("modeling_chatglm").ChatGLMForConditionalGeneration
    config = model_class.config_class(
        model_version="glm4",
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=856,
        num_attention_heads=8,
        vocab_size=151552,
        max_position_embeddings=1048576,
        rope_ratio=10000,
    )
    model = model_class(config).eval()
    model.generate(torch.ones(1, 8, dtype=torch.long), max_new_tokens=1, do_sample=False)
    before = peak_megabytes()
    prompt = torch.randint(3, 1000, (1, length))
    model.generate(prompt, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk)
    return peak_megabytes() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument(
        "--one", type=int, nargs=2, metavar=("LENGTH", "CHUNK"), help="measure one case; chunk 0: whole"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.one:
        length, chunk = arguments.one
        print(measure(length, chunk or None))
        return 0
    print(f"{'tokens':>8} {'whole, MB':>12} {f'by {arguments.chunk}, MB':>14}")
    figures = []
    for length in arguments.lengths:
        megabytes = [
            float(subprocess.check_output([sys.executable, __file__, "--one", str(length), str(chunk)], text=True))
            for chunk in (0, arguments.chunk)
        ]
        print(f"{length:8} {megabytes[0]:12.0f} {megabytes[1]:14.0f}", flush=True)
        figures.append({"tokens": length, "whole": megabytes[0], "in_chunks": megabytes[1]})
    write_report(arguments.json, {"megabytes": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
