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


@pytest.mark.grid
@pytest.mark.slow
def test_fully_sharded_equals_one_process(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The library's own sharding (`DistributedConfig`), which splits every layer by itself."""
    (tmp_path / "sharded.py").write_text(SHARDED, encoding="utf-8")
    run_in_two_processes(tmp_path / "sharded.py", *map(case_folder, GENERATION_CASES), seconds=600)


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
