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
"""What a row takes in memory while training, besides the weights, at the size of ChatGLM3-6B.

`python benchmarks/finetune_memory.py` runs a forward and a backward pass on tensors without contents, and adds up the
live ones after every operation: nothing is computed, and no memory is taken. Weights are frozen, as with adapters, and
checkpointing is on; a quarter of the tokens is learnt.
"""

import argparse
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from timing import write_report
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import finetune_loss  # noqa: E402
from local_code import REPOSITORY, load_module  # noqa: E402


LEARNT = 0.25


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, each storage once, without those of `ignored`."""

    def __init__(self, ignored: list[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in ignored}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata)
        return result

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)


def peak_bytes(length: int, num_layers: int, num_samples: int = 1, whole_scores: bool = False) -> int:
    """The peak of one step.

    Args:
        num_samples: how many samples share the row.
        whole_scores: with the library's loss, which takes scores at all positions.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = load_module("configuration_chatglm").ChatGLMConfig.from_pretrained(REPOSITORY, num_layers=num_layers)
        model = load_module("modeling_chatglm").ChatGLMForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16
        )
        model.train().requires_grad_(False)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
        ids = torch.zeros(1, length, dtype=torch.long)
        inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
        if num_samples > 1:
            inputs["position_ids"] = torch.arange(length)[None] % (length // num_samples)
        if not whole_scores:
            # There are no contents to tell them from.
            kept = torch.arange(length - 1 - int(length * LEARNT), length - 1)
            finetune_loss.learnt_positions = lambda labels: kept
            model.loss_function, inputs["logits_to_keep"] = finetune_loss.weighted_loss, kept
        with LiveTensors([*model.parameters(), *model.buffers()]) as tensors:
            model(**inputs).loss.backward()
        return tensors.peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures = []
    print("| tokens | one sample | four packed samples (sdpa) | one sample, library's loss |\n|---|---|---|---|")
    for length in arguments.lengths:
        ways: tuple[dict[str, Any], ...] = ({}, {"num_samples": 4}, {"whole_scores": True})
        peaks = [peak_bytes(length, arguments.layers, **way) for way in ways]
        print(f"| {length} | " + " | ".join(f"{peak / 1e9:.1f} GB" for peak in peaks) + " |", flush=True)
        figures.append({"tokens": length, "bytes": peaks})
    write_report(arguments.json, {"figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
