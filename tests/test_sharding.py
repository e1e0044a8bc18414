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
"""A model in parts: of several processes, on the CPU and the disk, and how much memory the parts take.

Tensor parallelism in two processes is in `test_modeling_chatglm.py`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from generations import GENERATION_CASES, TINY, every_generation
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, PreTrainedModel
from transformers.distributed import DistributedConfig
from waiting import run_in_two_processes


sys.path.insert(0, str(REPOSITORY / "scripts"))

import memory  # noqa: E402


ModelMaker = Callable[..., PreTrainedModel]
IDS = torch.arange(5, 21).view(2, 8)

SHARDED = """
import sys
import torch
import torch.distributed as dist
from transformers import AutoModel
from transformers.distributed import DistributedConfig

torch.set_num_threads(1)
dist.init_process_group("gloo")
ids = torch.arange(5, 21).view(2, 8)
for folder in sys.argv[1:]:
    whole = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    config = DistributedConfig(fsdp_size=2)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, distributed_config=config)
    for _ in range(2):
        weight = model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight
        assert 2 * weight.to_local().shape[0] == weight.shape[0], folder
        loss, expected = model(ids, labels=ids).loss, whole(ids, labels=ids).loss
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        if any(parameter.requires_grad for parameter in model.parameters()):
            loss.backward()
dist.destroy_process_group()
"""

# Layers by torch's schedules: each process keeps its share of them, as `pp_plan` says. Positions tell ChatGLM-6B where its
# context ends; every process makes them of the ids.
PIPELINE = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from transformers import AutoModel


class Part(nn.Module):
    def __init__(self, model, rank, size):
        super().__init__()
        self.model, self.is_last, self.takes = model, rank == size - 1, "inputs_embeds" if rank else "input_ids"
        names = list(model.pp_plan)
        [middle] = [index for index, name in enumerate(names) if isinstance(model.get_submodule(name), nn.ModuleList)]
        layers = model.get_submodule(names[middle])
        self.own = own = torch.arange(len(layers)).tensor_split(size)[rank].tolist()
        model.set_submodule(names[middle], nn.ModuleList(layers[index] for index in own))
        for name in names[: middle if rank else 0] + ([] if self.is_last else names[middle + 1 :]):
            model.set_submodule(name, nn.Identity())

    def forward(self, hidden, ids):
        inputs = {self.takes: hidden, "position_ids": self.model.get_position_ids(ids), "use_cache": False}
        return self.model(**inputs).logits if self.is_last else self.model.base_model(**inputs).last_hidden_state


def mean_loss(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
for folder in sys.argv[1:]:
    ids = torch.arange(5, 37).view(4, 8)
    whole = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    if whole.config.prefix_lm:
        ids[:, 3:5] = torch.tensor([whole.config.gmask_token_id, whole.config.bos_token_id])
    part = Part(AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32), rank, size)
    assert sum(map(torch.numel, part.parameters())) < sum(map(torch.numel, whole.parameters()))
    schedule = ScheduleGPipe(PipelineStage(part, rank, size, torch.device("cpu")), 2, loss_fn=mean_loss)
    losses = []
    logits = schedule.step(*(() if rank else (ids,)), ids=ids, target=ids, losses=losses)
    expected = whole(ids, labels=ids)
    expected.loss.backward()
    if part.is_last:
        torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sum(losses) / 2, expected.loss)
    for (name, weight), (_, other) in zip(
        part.model.transformer.encoder.layers[0].named_parameters(),
        whole.transformer.encoder.layers[part.own[0]].named_parameters(),
        strict=True,
    ):
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-5, rtol=1e-4, msg=f"{folder}: {name}")
dist.destroy_process_group()
"""
# Without the copy of the weights that a process keeps below a size, which would be all of so small a model.
ZERO3 = """
import os, sys
import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.integrations import HfDeepSpeedConfig

os.chdir(sys.argv[1])
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
ids = torch.arange(5, 37).view(4, 8)
own = ids.chunk(size)[rank]
greedy = {"max_new_tokens": 6, "do_sample": False}
settings = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "train_micro_batch_size_per_gpu": len(own),
    "train_batch_size": len(ids),
}
folder = sys.argv[2]
whole = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
answers = whole.generate(ids, **greedy)
served = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
served = deepspeed.init_inference(served, dtype=torch.float32, replace_with_kernel_inject=False)
assert torch.equal(served.generate(ids, **greedy), answers)
# As long as it lives, models are split while they are loaded.
split_from_now_on = HfDeepSpeedConfig(settings)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
engine = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)[0]
assert sum(weight.ds_tensor.numel() for weight in model.parameters()) < 0.6 * sum(map(torch.numel, whole.parameters()))
assert torch.equal(model.generate(ids, synced_gpus=True, **greedy), answers)
# What is saved has the names that it came with.
if rank == 0:
    for name, one in (("whole", whole), ("split", model)):
        one.save_pretrained(name, state_dict=whole.state_dict())
    assert load_file("split/model.safetensors").keys() == load_file("whole/model.safetensors").keys()
engine.train()
optimizer = torch.optim.SGD(whole.train().parameters(), lr=0.1)
for _ in range(3):
    loss = engine(input_ids=own, labels=own).loss
    engine.backward(loss)
    engine.step()
    expected = whole(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    expected.backward()
    optimizer.step()
    dist.all_reduce(mean := loss.detach() / size)
    torch.testing.assert_close(mean, expected.detach(), atol=1e-4, rtol=1e-4)
dist.destroy_process_group()
"""
PROGRAMS = {"fully sharded": SHARDED, "pipeline": PIPELINE}


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_two_processes_equal_one(program: str, case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The library's sharding (`DistributedConfig`), which splits every layer by itself, and pipelines of layers."""
    (tmp_path / "program.py").write_text(PROGRAMS[program], encoding="utf-8")
    run_in_two_processes(tmp_path / "program.py", *map(case_folder, GENERATION_CASES), seconds=600)


@pytest.mark.parametrize("settings", [{"pp_size": 2}, DistributedConfig(pp_size=2)], ids=["dict", "settings"])
def test_the_pipeline_of_the_library_is_refused(settings: Any, case_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="Pipeline parallelism .`pp_size`.*device_map"):
        AutoModel.from_pretrained(case_folder("chatglm3"), trust_remote_code=True, distributed_config=settings)


@pytest.mark.engines
@pytest.mark.compiler
@pytest.mark.parametrize("name", GENERATION_CASES)
def test_zero3_equals_one_process(name: str, case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs requirements/engines.txt: make test-engines")
    (tmp_path / "program.py").write_text(ZERO3, encoding="utf-8")
    # The first run on a machine compiles a part of DeepSpeed.
    run_in_two_processes(tmp_path / "program.py", tmp_path, case_folder(name), seconds=1200)


@every_generation
def test_weights_and_cache_are_as_large_as_estimated(tiny_model: ModelMaker, version: str) -> None:
    model = tiny_model(**TINY[version])
    found = memory.estimate(model.config)

    def weights() -> int:
        # ChatGLM-6B's output layer is its word embedding.
        tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
        return sum(tensor.nbytes for tensor in tensors.values())

    cache = model(IDS[:1], use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert size == found.cache_per_token["float32"] * IDS.shape[1]
    assert weights() == found.weights["float32"]
    model.to(torch.bfloat16)
    assert weights() == found.weights["bfloat16"]
    for bits in (8, 4):
        model.quantize(bits)
        assert weights() == found.weights[f"int{bits}"]
        model.dequantize()


@every_generation
def test_training_takes_what_was_estimated(tiny_model: ModelMaker, version: str) -> None:
    model = tiny_model(**TINY[version])
    found = memory.estimate(model.config, rank=4, prefix_length=3)

    def trained(network: Any) -> int:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters)
        network(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        return sum(tensor.nbytes for group in (parameters, [p.grad for p in parameters], moments) for tensor in group)

    assert trained(model) == found.training["full in float32"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert trained(adapted) == found.training["LoRA on int4"] - found.weights["int4"]
    with_prefix = tiny_model(**TINY[version], pre_seq_len=3)
    assert trained(with_prefix) == found.training["P-tuning v2 on int4"] - found.weights["int4"]


def test_the_estimate_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert memory.main([str(REPOSITORY)]) == 0
    assert "| bfloat16 | 12.49 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        memory.main([str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*GENERATION_CASES, "chatglm2-int4"])
def test_parts_on_the_cpu_and_the_disk(name: str, case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = case_folder(name)
    options = {"trust_remote_code": True, "dtype": torch.float32}
    whole = AutoModel.from_pretrained(folder, **options)
    size = sum(parameter.nbytes for parameter in whole.parameters())
    split = AutoModel.from_pretrained(
        folder, **options, device_map="auto", max_memory={"cpu": size * 3 // 4}, offload_folder=tmp_path
    )
    assert "disk" in split.hf_device_map.values()
    with torch.no_grad():
        torch.testing.assert_close(split(IDS).logits, whole(IDS).logits)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(split.generate(IDS, **greedy), whole.generate(IDS, **greedy))
