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
"""Quantizers that are not ours, through `quantization_config`: torchao, bitsandbytes, and GPTQ and AWQ by gptqmodel.

A native Llama of the same size is the control: what fails there too is theirs.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generations import GENERATIONS, TINY
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)


pytestmark = pytest.mark.engines

# torchao wants groups of 32, bitsandbytes blocks of 64.
SIZES = {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 128, "padded_vocab_size": 128}
LINEARS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
METHODS = ["torchao int8", "torchao int4", "bitsandbytes int8", "bitsandbytes nf4"]
# How far the logits of these random weights move at most, relative to their norm.
LARGEST_ERROR = {"torchao int8": 0.05, "torchao int4": 0.5, "bitsandbytes int8": 0.1, "bitsandbytes nf4": 0.5}


def settings(method: str) -> Any:
    if method.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        groups = pytest.importorskip("torchao.quantization.granularity")
        if method == "torchao int8":
            return TorchAoConfig(quantization.Int8WeightOnlyConfig())
        # `Int4WeightOnlyConfig` has no format for CPUs (0.18).
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups.PerGroup(32))
        return TorchAoConfig(config)
    pytest.importorskip("bitsandbytes")
    if method == "bitsandbytes int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4")


def is_quantized(module: nn.Module) -> bool:
    """Whether another method holds the weight of a layer."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and type(weight) is not nn.Parameter


def prompt() -> torch.Tensor:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    # The start of an answer of the tiny ChatGLM-6B.
    ids[:, -2:] = torch.tensor([91, 94])
    return ids


def logits(model: PreTrainedModel) -> torch.Tensor:
    # In training mode, without dropout: bitsandbytes packs 4-bit weights anew for inference on a CPU.
    with torch.no_grad():
        return model.train()(prompt()).logits.float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def train(model: PreTrainedModel, targets: str | list[str]) -> list[float]:
    """The losses of a few steps of LoRA."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)).train()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.AdamW(weights, lr=1e-2), []
    for _ in range(3):
        loss = adapted(input_ids=prompt(), attention_mask=torch.ones_like(prompt()), labels=prompt()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **options))


@pytest.fixture
def folder(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Callable[[str], Path]:
    def make(version: str) -> Path:
        tiny_model(**SIZES | TINY[version]).save_pretrained(tmp_path / "floats")
        return tmp_path / "floats"

    return make


@pytest.fixture
def load(chatglm: SimpleNamespace) -> Callable[..., Any]:
    def from_folder(path: Path, **options: Any) -> Any:
        with warnings.catch_warnings(action="ignore"):
            return chatglm.ChatGLMForConditionalGeneration.from_pretrained(path, device_map="cpu", **options)

    return from_folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("version", GENERATIONS)
def test_load_save_and_train(
    folder: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path, version: str, method: str
) -> None:
    path, float32 = folder(version), {"dtype": torch.float32}
    floats = load(path, **float32)
    model = load(path, quantization_config=settings(method), **float32)
    names = {name for name, module in model.named_modules() if is_quantized(module)}
    assert names == {f"transformer.encoder.layers.{index}.{name}" for index in range(2) for name in LINEARS}
    found = logits(model)
    assert 0 < relative_error(found, logits(floats)) < LARGEST_ERROR[method]
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized")
    assert torch.equal(logits(again), found)
    for targets in (["query_key_value"], "all-linear"):
        losses = train(load(tmp_path / "quantized"), targets)
        assert losses[-1] < losses[0] < 20
    assert model.eval().generate(prompt(), max_new_tokens=4, do_sample=False).shape[1] > prompt().shape[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_eyes_of_glm_4v_stay_floats(case_folder: Callable[[str], Path], method: str) -> None:
    # The reference has no width for blocks of 64 in all layers.
    if method == "torchao int4":
        pytest.skip("the widths of the recorded checkpoint do not divide by 32")
    model = AutoModel.from_pretrained(
        case_folder("glm4v"), trust_remote_code=True, device_map="cpu", quantization_config=settings(method)
    )
    names = {name for name, module in model.named_modules() if is_quantized(module)}
    assert len(names) == 4 * model.config.num_hidden_layers
    assert all(name.startswith("transformer.encoder.layers.") for name in names)


def test_what_is_asked_to_stay_is_all_that_stays(folder: Callable[[str], Path], load: Callable[..., Any]) -> None:
    pytest.importorskip("bitsandbytes")
    asked = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[".*mlp", ".*output_layer"])
    model = load(folder("chatglm3"), quantization_config=asked)
    names = {name for name, module in model.named_modules() if is_quantized(module)}
    assert len(names) == 4 and not any("mlp" in name for name in names)
    assert asked.llm_int8_skip_modules == [".*mlp", ".*output_layer"]


def test_training_behind_inference_fails_for_llama_too(tmp_path: Path) -> None:
    """bitsandbytes packs 4-bit weights for inference on the first call without gradients, and has none from then on."""
    pytest.importorskip("bitsandbytes")
    llama(attention_bias=True).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings("bitsandbytes nf4"), dtype=torch.float32, device_map="cpu"
    )
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs weights anew on processors with AVX512-BF16 only")
    with torch.no_grad():
        model.eval()(prompt())
    with pytest.raises(RuntimeError, match="a view of a leaf Variable"):
        train(model, ["q_proj", "k_proj", "v_proj"])


def test_torchaos_int4_has_no_format_for_cpus() -> None:
    """With torch's own layer, so it is not a matter of these models."""
    quantization = pytest.importorskip("torchao.quantization")
    for packing in ("plain", "plain_int32", "tile_packed_to_4d"):
        layer = nn.Sequential(nn.Linear(128, 128, dtype=torch.bfloat16))
        with pytest.raises((AssertionError, ImportError, NotImplementedError, ValueError)):
            quantization.quantize_(layer, quantization.Int4WeightOnlyConfig(32, int4_packing_format=packing))


# gptqmodel compiles an extension for minutes where it may choose the kernel.
TORCH_GPTQ, TORCH_AWQ = "gptq_torch", "torch_awq"
GROUP_SIZE = 32


def gptq(**options: Any) -> GPTQConfig:
    pytest.importorskip("gptqmodel")
    return GPTQConfig(bits=4, group_size=GROUP_SIZE, backend=TORCH_GPTQ, **options)


def calibration() -> list[dict[str, Any]]:
    ids = torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(1))
    ids[:, -2:] = prompt()[0, -2:]
    return [{"input_ids": row[None].tolist(), "attention_mask": torch.ones_like(row)[None].tolist()} for row in ids]


def packed_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "qweight")}


@pytest.mark.parametrize("version", GENERATIONS)
def test_gptq(folder: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path, version: str) -> None:
    path = folder(version)
    model = load(path, quantization_config=gptq(dataset=calibration()), dtype=torch.float32)
    assert packed_layers(model) == {f"transformer.encoder.layers.{i}.{name}" for i in range(2) for name in LINEARS}
    found = logits(model)
    assert 0 < relative_error(found, logits(load(path))) < 0.5
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", quantization_config=gptq(), dtype=torch.float32)
    assert packed_layers(again) == packed_layers(model) and torch.equal(logits(again), found)
    assert again.eval().generate(prompt(), max_new_tokens=4, do_sample=False).shape[1] > prompt().shape[1]
    with pytest.raises(ValueError, match="`transformer.encoder.layers`, which `ChatGLMModel` does not have"):
        type(again.transformer).from_pretrained(tmp_path / "quantized", quantization_config=gptq())
    losses = train(again, ["query_key_value"])
    assert losses[-1] < losses[0] < 20


def test_all_linear_finds_no_packed_layer_in_llama_either(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=gptq(dataset=calibration()), dtype=torch.float32, device_map="cpu"
    )
    with pytest.raises(ValueError, match="No `target_modules` passed"):
        train(model, "all-linear")
    assert train(model, ["q_proj", "down_proj"])


def pack_as_autoawq(codes: torch.Tensor) -> torch.Tensor:
    """Four bits each, eight in a word in AutoAWQ's order of columns: `[rows, columns]` to `[rows, columns / 8]`."""
    ordered = codes.to(torch.int64).view(len(codes), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    return (ordered << torch.arange(0, 32, 4)).sum(dim=-1).to(torch.int32)


def quantize_as_autoawq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of the GEMM form, which have input channels in rows, and the weight that they stand for."""
    num_outputs = len(weight)
    groups = weight.t().reshape(-1, GROUP_SIZE, num_outputs)
    smallest, largest = groups.amin(dim=1), groups.amax(dim=1)
    scales = ((largest - smallest) / 15).half()
    zeros = (-smallest / scales).round().clamp(0, 15)
    codes = ((groups / scales[:, None]).round() + zeros[:, None]).clamp(0, 15)
    decoded = ((codes - zeros[:, None]) * scales[:, None]).view(-1, num_outputs).t().contiguous()
    codes = codes.view(-1, num_outputs)
    return {"qweight": pack_as_autoawq(codes), "qzeros": pack_as_autoawq(zeros), "scales": scales}, decoded


def write_awq_folders(model: PreTrainedModel, place: Path) -> tuple[Path, Path]:
    """The same weights in AutoAWQ's form and as floats."""
    packed, floats = place / "awq", place / "decoded"
    for path in (packed, floats):
        model.save_pretrained(path)
    stored = load_file(packed / "model.safetensors")
    decoded = dict(stored)
    for name in [name for name, weight in stored.items() if weight.dim() == 2 and ".layers." in name]:
        parts, decoded[name] = quantize_as_autoawq(stored.pop(name))
        stored |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    save_file(stored, packed / "model.safetensors", metadata={"format": "pt"})
    save_file(decoded, floats / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((packed / "config.json").read_text("utf-8"))
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), encoding="utf-8")
    return packed, floats


@pytest.mark.parametrize("version", GENERATIONS)
def test_a_folder_of_autoawq(
    tiny_model: Callable[..., PreTrainedModel], load: Callable[..., Any], tmp_path: Path, version: str
) -> None:
    pytest.importorskip("gptqmodel")
    settings = AwqConfig(backend=TORCH_AWQ)
    packed, floats = write_awq_folders(tiny_model(**SIZES | TINY[version]), tmp_path)
    model = load(packed, quantization_config=settings, dtype=torch.float32)
    assert packed_layers(model) == {f"transformer.encoder.layers.{i}.{name}" for i in range(2) for name in LINEARS}
    found = logits(model)
    # Its kernel computes in float16.
    assert relative_error(found, logits(load(floats, dtype=torch.float32))) < 0.01
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", quantization_config=settings, dtype=torch.float32)
    assert torch.equal(logits(again), found)
    losses = train(again, ["query_key_value"])
    assert losses[-1] < losses[0] < 20
