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
"""Fine-tuning in several processes equals fine-tuning in one."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from waiting import run_in_two_processes

from .short_runs import BUNDLED, CONFIGS, EXAMPLES, finetune, losses


ACCELERATE = ("accelerate.commands.launch", "--num_processes=2", "--dynamo_backend=no", "--mixed_precision=no")
# `--cpu` would ask for MPI; this way the processes are torchrun's, and `use_cpu` makes them talk through gloo.
LAUNCHERS = {
    "copies": (*ACCELERATE, "--multi_gpu", "--num_machines=1"),
    "fsdp": (*ACCELERATE, f"--config_file={CONFIGS / 'fsdp.yaml'}"),
    "zero3": (*ACCELERATE, f"--config_file={CONFIGS / 'zero3.yaml'}"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        pytest.param("copies", marks=pytest.mark.grid),
        pytest.param("fsdp", marks=pytest.mark.grid),
        pytest.param("zero3", marks=[pytest.mark.engines, pytest.mark.compiler]),
    ],
)
def test_two_processes_equal_one_with_the_batch_of_both(
    way: str, make_settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    """By the shipped settings, too: what they train is a folder that loads without them."""
    if way == "zero3":
        pytest.importorskip("deepspeed", reason="needs requirements/engines.txt: make test-engines")
    settings = {"method": "full", "max_steps": 5}
    assert finetune.main(make_settings(**settings, per_device_train_batch_size=8)) == 0
    words = make_settings(**settings, per_device_train_batch_size=4)
    words.append(f"--output_dir={tmp_path / 'two'}")
    # The first run of DeepSpeed on a machine compiles a part of it.
    run_in_two_processes(EXAMPLES / "finetune.py", *words, launcher=LAUNCHERS[way], seconds=1200)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "out"), rel=1e-3)
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "out"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-3, rtol=1e-2, msg=name)


SHARDED = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

sys.path.insert(0, sys.argv[1])
from local_code import register

register()
dist.init_process_group("gloo")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
for layer in model.transformer.encoder.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.arange(5, 69).view(4, 16)[dist.get_rank() * 2 :][:2]
losses = []
for _ in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total := loss.detach().clone())
    losses.append(total.item() / 2)
if dist.get_rank() == 0:
    print("losses:", json.dumps(losses))
dist.destroy_process_group()
"""


@pytest.mark.grid
@pytest.mark.slow
def test_sharded_equals_whole(chatglm: Any, tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED, encoding="utf-8")
    output = run_in_two_processes(tmp_path / "sharded.py", EXAMPLES, BUNDLED, seconds=600)
    sharded = json.loads(re.search(r"losses: (.*)", output)[1])
    model = chatglm.ChatGLMForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(5, 69).view(4, 16)
    whole = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole.append(loss.item())
    assert whole[-1] < whole[0]
    assert sharded == pytest.approx(whole, rel=1e-4)
