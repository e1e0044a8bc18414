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
"""`examples/export.py`: merged adapters, prefixes and published names, written as others load them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import REPOSITORY
from generations import every_generation_case
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel


sys.path.insert(0, str(REPOSITORY / "examples"))

import export  # noqa: E402


IDS = torch.arange(5, 25).view(1, -1)
ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["query_key_value"], use_dora=True, task_type="CAUSAL_LM"),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=6, target_r=4, total_step=9, target_modules=["dense_h_to_4h", "dense"], task_type="CAUSAL_LM"
    ),
}


@pytest.fixture(autouse=True, scope="module")
def registers(leave_the_auto_classes_alone: None) -> None:
    """The program registers this repository's classes."""


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    settings = {"dtype": torch.float32, **settings}
    return export.register().ChatGLMForConditionalGeneration.from_pretrained(folder, **settings)


def make_adapter(base: PreTrainedModel, kind: str, folder: Path) -> torch.Tensor:
    """Save an adapter that does something, and return the logits with it."""
    adapted = peft.get_peft_model(base, ADAPTERS[kind]())
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    return logits(adapted)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("chatglm1", "lora"), ("chatglm2", "dora"), ("chatglm3", "adalora"), ("glm4", "lora"), ("chatglm2-int4", "lora")],
)
def test_a_merged_folder_is_complete(
    reference_dir: Path, name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, output = reference_dir / name, tmp_path / "adapter", tmp_path / "out"
    expected = make_adapter(load(base), kind, adapter)
    words = ["merge", "--adapter", str(adapter), "--output", str(output), "--dtype", "float32", "--quantize", "0"]
    assert export.main(words) == 0
    merged = load(output)
    assert not getattr(merged, "is_quantized", False) and not merged.config.quantization_bit
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    names = {path.name for path in output.iterdir()}
    assert {path.name for path in REPOSITORY.glob("*.py")} | {"config.json", "tokenizer_config.json"} <= names
    report = json.loads((output / "export.json").read_text(encoding="utf-8"))
    assert report["logits"]["largest"] < 1e-3 and report["logits"]["same_choice"] == 1
    assert all(layer["error"] == 0 < layer["change"] for layer in report["layers"])
    assert "layers merged in float32 and stored as float32" in capsys.readouterr().out


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model.chat(tokenizer, "你好", max_new_tokens=2)
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(5, 25).view(1, -1)).logits, sys.argv[2])
"""


@pytest.mark.grid
def test_another_process_needs_the_folder_and_nothing_else(reference_dir: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "out", tmp_path / "logits.pt"
    make_adapter(load(reference_dir / "chatglm1"), "lora", tmp_path / "adapter")
    assert export.main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(output)]) == 0
    subprocess.run([sys.executable, "-c", SCRIPT, str(output), str(file)], check=True, cwd=tmp_path, timeout=300)
    torch.testing.assert_close(
        torch.load(file, weights_only=True).float(), logits(load(output, dtype="auto")), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "words", "bits", "dtype"),
    [
        ("chatglm2-int4", [], 4, "torch.float16"),
        ("glm4", ["--quantize", "8"], 8, "torch.float32"),
        ("chatglm1", ["--quantize", "4", "--dtype", "bfloat16"], 4, "torch.bfloat16"),
        ("chatglm3", ["--dtype", "float16"], 0, "torch.float16"),
    ],
)
def test_rounding_is_reported(
    reference_dir: Path,
    name: str,
    words: list[str],
    bits: int,
    dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The numbers are those of the folder, held against base and adapter in float32."""
    base, adapter, output = reference_dir / name, tmp_path / "adapter", tmp_path / "out"
    make_adapter(load(base), "lora", adapter)
    assert export.main(["merge", "--adapter", str(adapter), "--output", str(output), *words]) == 0
    merged = load(output, dtype="auto")
    assert (getattr(merged, "is_quantized", False), merged.config.quantization_bit) == (bits > 0, bits)
    assert str(merged.dtype) == dtype
    exact = peft.PeftModel.from_pretrained(load(base), adapter)
    if getattr(exact.get_base_model(), "is_quantized", False):
        exact.dequantize(torch.float32)
    exact = exact.merge_and_unload()
    report = json.loads((output / "export.json").read_text(encoding="utf-8"))
    assert len(report["layers"]) == 4 * merged.config.num_hidden_layers
    for layer in report["layers"]:
        there, here = (model.get_submodule(layer["layer"]) for model in (exact, merged))
        stored = here.dequantize(torch.float32) if bits else here.weight.float()
        assert (stored - there.weight).norm().item() == pytest.approx(layer["error"], rel=1e-2) != 0
        assert there.weight.norm().item() == pytest.approx(layer["weight"], rel=1e-3)
    assert report["logits"]["mean_divergence"] > 0
    said = capsys.readouterr().out
    assert "rounding, relative to the weights: " in said and "logits before and after: at most " in said


def test_a_change_that_drowns_is_said(reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    make_adapter(load(reference_dir / "chatglm3"), "lora", adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({key: weight * 0.1 for key, weight in load_file(file).items()}, file)
    words = ["merge", "--adapter", str(adapter), "--quantize", "4", "--output", str(tmp_path / "out")]
    assert export.main(words) == 0
    assert "warning: rounding is larger than what was learnt" in capsys.readouterr().out


def test_a_reward_model_is_merged(reference_dir: Path, tmp_path: Path) -> None:
    modeling, base = export.register(), reference_dir / "chatglm2"
    model = modeling.ChatGLMForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    for weight in (weight for weight in adapted.parameters() if weight.requires_grad):
        torch.nn.init.normal_(weight, std=0.1)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert export.main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]) == 0
    again = modeling.ChatGLMForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, atol=1e-3, rtol=1e-3)


@every_generation_case
def test_prefixes(reference_dir: Path, name: str, tmp_path: Path) -> None:
    """Into a complete folder, and under the published names and back."""
    base = load(reference_dir / name, pre_seq_len=4)
    expected = logits(base)
    prefix = base.save_prefix_encoder(tmp_path / "trained")
    words = ["prefix", "--prefix", str(prefix)]
    assert export.main([*words, "--model", str(reference_dir / name), "--output", str(tmp_path / "whole")]) == 0
    whole = load(tmp_path / "whole")
    assert whole.config.pre_seq_len == 4
    torch.testing.assert_close(logits(whole), expected, atol=1e-4, rtol=1e-4)
    assert export.main([*words, "--output", str(tmp_path / "alone")]) == 0
    stored = torch.load(tmp_path / "alone" / "pytorch_model.bin", weights_only=True)
    assert set(stored) == {"transformer.prefix_encoder.embedding.weight"}
    again = load(reference_dir / name)
    again.load_prefix_encoder(tmp_path / "alone")
    assert logits(again).equal(expected)


@pytest.mark.parametrize(("asked", "bits"), [([], 4), (["--quantize", "8"], 8), (["--quantize", "0"], 0)])
def test_a_prefix_with_an_integer_base_of_other_bits(
    reference_dir: Path, asked: list[str], bits: int, tmp_path: Path
) -> None:
    base = reference_dir / "chatglm2-int4"
    words = ["prefix", "--prefix", str(base / "prefix_encoder-noproj.bin"), "--model", str(base)]
    assert export.main([*words, *asked, "--output", str(tmp_path / "whole")]) == 0
    whole = load(tmp_path / "whole")
    assert whole.quantized == bool(bits) and whole.config.pre_seq_len
    assert not bits or whole.hf_quantizer.quantization_config.bits == bits


@pytest.mark.parametrize("is_bin", [False, True])
def test_names_of_chatglm_6b(reference_dir: Path, is_bin: bool, tmp_path: Path) -> None:
    base, folders = reference_dir / "chatglm1", [tmp_path / name for name in ("ours", "published", "back", "merged")]
    ours, published, back, merged = folders
    expected = make_adapter(load(base), "lora", ours)
    words = ["names", "--model", str(base), "--adapter"]
    assert export.main([*words, str(ours), "--output", str(published), *["--bin"] * is_bin]) == 0
    names = set(export.read_adapter_weights(published))
    assert "base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight" in names
    assert not any("encoder" in name or "self_attention" in name for name in names)
    # PEFT loads it with the mapping that the page tells, merging takes it as it is, and it goes back.
    assert export.main([*words, str(published), "--output", str(back)]) == 0
    again = peft.PeftModel.from_pretrained(load(base), back)
    assert logits(again).equal(expected)
    assert export.main(["merge", "--adapter", str(published), "--output", str(merged), "--dtype", "float32"]) == 0
    torch.testing.assert_close(logits(load(merged)), expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_exported(reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written then, and the output is never written over."""
    adapter, full = tmp_path / "adapter", tmp_path / "full"
    make_adapter(load(reference_dir / "glm4"), "lora", adapter)
    full.mkdir()
    (full / "mine.txt").write_text("mine", encoding="utf-8")
    out, base = str(tmp_path / "out"), str(reference_dir / "glm4")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(load(reference_dir / "glm4"), prompt).save_pretrained(tmp_path / "prompt")
    refused = [
        (["merge", "--adapter", str(tmp_path / "prompt"), "--output", out], "adapts no linear layer"),
        (["merge", "--adapter", str(adapter), "--output", str(full)], "is not an empty folder"),
        (["merge", "--adapter", str(full), "--output", out], "adapter_config.json"),
        (["merge", "--adapter", str(adapter), "--model", str(full), "--output", out], "is not a checkpoint folder"),
        (["merge", "--adapter", str(adapter), "--model", str(reference_dir / "chatglm3"), "--output", out], "size"),
        (["prefix", "--prefix", base, "--output", out], "There is no prefix"),
        (["names", "--adapter", str(adapter), "--model", base, "--output", out], "have their published names here"),
    ]
    for words, message in refused:
        assert export.main(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
