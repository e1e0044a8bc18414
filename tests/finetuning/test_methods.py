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
"""Fine-tuning: the last layers alone, DoRA, parts of the fused projection, ranks by layer, and prompts of PEFT."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_adapter
import finetune_report
import finetune_settings
import peft
import pytest
import torch
from finetune_trainer import load_model
from generations import GENERATION_CASES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .short_runs import BUNDLED, finetune, finetune_data, losses, prepare, read_arguments


RATES = {"freeze": 5e-3, "lora": 2e-2, "adalora": 5e-2, "prompt_tuning": 5e-1}


@pytest.mark.parametrize(("method", "changes"), [("freeze", {}), ("lora", {"use_dora": True}), ("prompt_tuning", {})])
def test_it_learns_resumes_and_loads(
    make_settings: Callable[..., list[str]], tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    words = make_settings(method, learning_rate=RATES[method], max_steps=20, save_steps=10, **changes)
    job = prepare(words)
    finetune.train(job)
    expected = losses(tmp_path / "out")
    assert expected[-1] < 0.8 * expected[0]
    trained = {name for name, weight in job.trainer.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in job.trainer.model.parameters() if weight.requires_grad} == {torch.float32}
    marks = {"freeze": r"layers\.[23]\.", "lora": "lora_", "prompt_tuning": "prompt_encoder"}
    assert trained == {name for name, _ in job.trainer.model.named_parameters() if re.search(marks[method], name)}
    (tmp_path / "out" / "checkpoint-20" / "trainer_state.json").unlink()
    assert finetune.main([*words, "--resume=auto"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    # A model loaded from the result, by the library and PEFT alone, says the same.
    load = {"dtype": torch.float32}
    if method == "freeze":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **load)
        before = load_file(BUNDLED / "model.safetensors")
        changed = {name for name, weight in loaded.state_dict().items() if not weight.equal(before[name].float())}
        assert {re.search(r"layers\.(\d)\.", name)[1] for name in changed} == {"2", "3"}
    else:
        loaded = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(BUNDLED, **load), tmp_path / "out"
        )
    samples = finetune_data.read_samples(job.data.train_file, job.data)[:3]
    tokenizer = job.trainer.processing_class
    answers = [
        finetune_report.generate_answers(model, tokenizer, samples, max_new_tokens=12)
        for model in (loaded.eval(), job.trainer.model)
    ]
    assert answers[0] == answers[1]


WAYS = [("lora", False, name) for name in GENERATION_CASES] + [("lora", True, "chatglm1"), ("adalora", False, "glm4")]


@pytest.mark.parametrize(("method", "dora", "name"), WAYS)
def test_queries_and_values_alone(
    make_settings: Callable[..., list[str]],
    case_folder: Callable[[str], Path],
    tmp_path: Path,
    method: str,
    dora: bool,
    name: str,
) -> None:
    changes: dict[str, Any] = {"use_dora": True} if dora else {}
    words = make_settings(
        method,
        model=str(case_folder(name)),
        target_modules=["query,value", "dense"],
        max_steps=3,
        save_strategy="no",
        learning_rate=RATES[method],
        **changes,
    )
    assert finetune.main(words) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(config["target_modules"]) == {"query_key_value", "dense"}
    base, merged = (
        AutoModelForCausalLM.from_pretrained(case_folder(name), dtype=torch.float32, attn_implementation="eager")
        for _ in range(2)
    )
    merged = peft.PeftModel.from_pretrained(merged, tmp_path / "out").merge_and_unload()
    with torch.no_grad():
        outputs = [
            model.eval()(torch.arange(5, 25)[None], use_cache=True, output_attentions=True) for model in (base, merged)
        ]
    # The first layer reads the same in both, so its keys say whether they were adapted.
    (keys, values), (other_keys, other_values) = (
        (output.past_key_values.layers[0].keys, output.past_key_values.layers[0].values) for output in outputs
    )
    torch.testing.assert_close(keys, other_keys)
    assert not torch.allclose(values, other_values, atol=1e-3)
    # Other weights on the same keys are those of other queries.
    assert not torch.allclose(outputs[0].attentions[0], outputs[1].attentions[0], atol=1e-5)


def test_an_adapter_of_queries_goes_on_as_one(
    make_settings: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_settings(target_modules=["query"], max_steps=2, output_dir=str(tmp_path / "first"))
    assert finetune.main(first) == 0
    said: list[str] = []
    monkeypatch.setattr("finetune_trainer.logger.warning", said.append)
    go_on = {"adapter": str(tmp_path / "first"), "max_steps": 2}
    assert finetune.main(make_settings(**go_on, target_modules=None, output_dir=str(tmp_path / "second"))) == 0
    assert said[-1] == f"adapter: {tmp_path / 'first'} adapts query alone, and goes on so"
    weights = load_file(tmp_path / "second" / "adapter_model.safetensors")
    for name, weight in weights.items():
        if "lora_B" in name:
            assert weight[:128].any() and not weight[128:].any()
    # Said again, which is no contradiction.
    job = prepare(make_settings(**go_on, target_modules=["query"]))
    assert finetune_adapter.trained_parts(job.trainer.model) == {"query"}


def test_layers_with_other_ranks(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"dense": 2, r"layers\.0\.mlp\.dense_4h_to_h": 3}, "alpha_pattern": {"dense": 4}}
    assert finetune.main(make_settings(max_steps=1, **patterns)) == 0
    for name, weight in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        if "lora_A" in name:
            expected = 2 if ".dense." in name else 3 if "layers.0.mlp.dense_4h" in name else 8
            assert len(weight) == expected, name
    # The result brings them along.
    model, _, _ = read_arguments(make_settings(adapter=str(tmp_path / "out"), output_dir=str(tmp_path / "other")))
    assert (model.rank_pattern, model.alpha_pattern) == (patterns["rank_pattern"], patterns["alpha_pattern"])


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lora", "float16"), ("lora", "int4"), ("prompt_tuning", "bfloat16"), ("prompt_tuning", "int8")],
)
def test_dora_and_prompts_on_other_weights(
    make_settings: Callable[..., list[str]], tmp_path: Path, method: str, dtype: str
) -> None:
    changes: dict[str, Any] = {"lora": {"use_dora": True, "learning_rate": 1e-2}}.get(method, {"learning_rate": 1e-1})
    words = make_settings(method, dtype=dtype, max_steps=8, save_strategy="no", **changes)
    assert finetune.main(words) == 0
    found = losses(tmp_path / "out")
    assert found[-1] < found[0]


def test_dora_begins_where_the_quantized_model_is(make_settings: Callable[..., list[str]]) -> None:
    """The lengths of the rows are those of the decoded weights, not of the codes."""
    model, _, run = read_arguments(make_settings(dtype="int8", use_dora=True))
    adapted = load_model(model, run, num_steps=1).eval()
    ids = torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"method": "freeze", "trainable_layers": 5}, "trainable_layers: the model has 4 layers, not 5"),
    "freeze and integers": ({"method": "freeze", "dtype": "int8"}, "method: freeze changes the weights themselves"),
    "freeze and float16": ({"method": "freeze", "dtype": "float16"}, "dtype: float16 is too coarse"),
    "packed prompt": ({"method": "prompt_tuning", "packing": True}, "packing: prompt_tuning puts its prefix"),
    "all and a part": ({"target_modules": ["query", "query_key_value"]}, "target_modules: query, key and value are"),
    "ranks": ({"rank_pattern": {"nothing": 3}}, "rank_pattern: no adapted layer is called 'nothing'; there are dense"),
    "rank of 0": ({"alpha_pattern": {"dense": 0}}, "alpha_pattern: must give whole numbers of 1 or more"),
    "no JSON": ({"rank_pattern": "dense"}, "rank_pattern: must be JSON like"),
    "decay": (
        {"target_modules": ["query"], "use_dora": True, "weight_decay": 0.1},
        "weight_decay: shrinks all of the rows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    changes, message = BAD[name]
    assert finetune.main(make_settings(**changes)) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_chatglm_6b_has_no_prompt_of_peft(
    make_settings: Callable[..., list[str]], case_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match="method: ChatGLM-6B cannot have a prompt of PEFT"):
        prepare(make_settings("prompt_tuning", model=str(case_folder("chatglm1"))))


def test_a_prompt_of_another_model(
    make_settings: Callable[..., list[str]], case_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    first = str(tmp_path / "first")
    assert finetune.main(make_settings("prompt_tuning", max_steps=1, output_dir=first)) == 0
    job = prepare(make_settings("prompt_tuning", adapter=first, pre_seq_len=None))
    assert job.model.pre_seq_len == 8
    (Path(first) / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="is of another model: its prompt is 128 wide, the model 40"):
        prepare(make_settings("prompt_tuning", adapter=first, model=str(case_folder("chatglm3"))))


def test_settings_that_the_method_does_not_use_are_named(
    make_settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(finetune_settings.logger, "warning", said.append)
    read_arguments(make_settings("full", lora_rank=4))
    read_arguments(make_settings("lora", pre_seq_len=None, lora_dropout=0.1))
    assert said == ["target_modules, lora_rank, pre_seq_len: not used by the method full"]


def test_attention_is_a_setting(make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for attention in (None, "eager"):
        job = prepare(make_settings(attn_implementation=attention))
        assert job.trainer.model.config._attn_implementation == (attention or "sdpa")
        batch = job.trainer.data_collator([job.trainer.train_dataset[0]])
        with torch.no_grad():
            found.append(job.trainer.compute_loss(job.trainer.model.eval(), batch).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    if importlib.util.find_spec("flash_attn") is None:
        assert finetune.main(make_settings(attn_implementation="flash_attention_2")) == 2
        assert "error: model, attn_implementation: " in capsys.readouterr().err
