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
"""Fine-tuning: what a run learns and leaves behind, on weights of every precision."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import finetune_report
import nltk
import pytest
import torch
from safetensors.torch import load_file

from .short_runs import BUNDLED, METHODS, RECORDS, finetune, losses, prepare


@pytest.mark.floor
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_reports(finished: dict[str, tuple[finetune.Job, str]], method: str) -> None:
    job, answer = finished[method]
    folder = Path(job.trainer.args.output_dir)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert losses(folder)[-1] < 0.7 * losses(folder)[0]
    assert len(losses(folder)) == metrics["steps"] == 40
    assert metrics["config"]["method"] == method
    assert metrics["tokens_per_second"] > 0
    assert metrics["eval"]["eval_loss"] > 0
    assert metrics["answers"]["after"]["rouge-l"] > metrics["answers"]["before"]["rouge-l"]
    assert set(metrics["answers"]["after"]) == {*SCORES, "exact"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "samples.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 4
    assert answer in table[2]
    assert (metrics["trainable_parameters"] == metrics["parameters"]) == (method == "full")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_else_is_trained(finished: dict[str, tuple[finetune.Job, str]], method: str) -> None:
    model = finished[method][0].trainer.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    marks = {"full": "", "lora": "lora_", "adalora": "lora_", "ptuning": "prefix_encoder"}
    assert trained == {name for name, _ in model.named_parameters() if marks[method] in name}


def test_adalora_moves_ranks(finished: dict[str, tuple[finetune.Job, str]]) -> None:
    model = finished["adalora"][0].trainer.model
    config = model.peft_config["default"]
    ranks = {name: sum(kept) for name, kept in config.rank_pattern.items()}
    assert config.total_step == 40
    # 16 linear layers: rank 12 in each at first, 8 in the mean at the end, and not the same everywhere.
    assert len(ranks) == 16
    assert sum(ranks.values()) == 8 * 16
    assert len(set(ranks.values())) > 1


RELOAD = """
import sys
import peft
from transformers import AutoModel, AutoTokenizer

base, full, lora, adalora, ptuning, question = sys.argv[1:]
def load(folder, **settings):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32", **settings)
tokenizer = AutoTokenizer.from_pretrained(full, trust_remote_code=True)
prefixed = load(base, pre_seq_len=8)
prefixed.load_prefix_encoder(ptuning)
adapters = [peft.PeftModel.from_pretrained(load(base), folder) for folder in (lora, adalora)]
for model in (load(full), *adapters, prefixed):
    print("answer:", model.eval().chat(tokenizer, question, temperature=0, max_new_tokens=32)[0])
"""


@pytest.mark.grid
def test_the_result_answers_the_same_in_a_new_process(
    finished: dict[str, tuple[finetune.Job, str]], tmp_path: Path, copy_bundled: Callable[[str, Path], Path]
) -> None:
    base = copy_bundled(BUNDLED.name, tmp_path)
    folders = [job.trainer.args.output_dir for job, _ in finished.values()]
    question = RECORDS[0]["messages"][0]["content"]
    command = [sys.executable, "-c", RELOAD, str(base), *folders, question]
    output = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert output.returncode == 0, output.stderr
    answers = re.findall(r"^answer: (.*)$", output.stdout, flags=re.MULTILINE)
    assert answers == [answer for _, answer in finished.values()]


SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu-4-characters")


def test_scores_are_those_of_the_published_scripts() -> None:
    """By hand: 我 爱 北京 天安门 against 我 爱 南京 天安门, three of four words, one of three pairs; BLEU as nltk has it."""
    answers = [finetune_report.Answer("", "我爱北京天安门", "我爱南京天安门")]
    scores = finetune_report.score_answers(answers)
    assert (scores["rouge-1"], scores["rouge-2"], scores["rouge-l"]) == (75.0, 33.33, 75.0)
    words = nltk.translate.bleu_score.SmoothingFunction().method3
    expected = [["我", "爱", "北京", "天安门"]], ["我", "爱", "南京", "天安门"]
    bleu = nltk.translate.bleu_score.sentence_bleu(*expected, smoothing_function=words)
    assert scores["bleu-4"] == pytest.approx(100 * bleu, abs=0.01)
    # 6/7, 4/6, 2/5 and 1/4 of the runs of characters.
    assert scores["bleu-4-characters"] == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25, abs=0.01)
    assert scores["exact"] == 0
    same = finetune_report.score_answers([finetune_report.Answer("", "我爱北京天安门。", "我爱北京天安门。")])
    assert [same[name] for name in (*SCORES, "exact")] == [100] * 6
    # Nothing said, and nothing but a full stop.
    empty = [finetune_report.Answer("", "我爱", text) for text in ("", ".", "\n")]
    assert finetune_report.score_answers(empty) == dict.fromkeys((*SCORES, "exact"), 0)


def test_scores_need_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(finetune_report.logger, "warning", said.append)
    monkeypatch.setitem(sys.modules, "rouge_chinese", None)
    assert finetune_report.score_answers([finetune_report.Answer("", "a", "a")]) == {"exact": 100}
    assert "install jieba, rouge-chinese and nltk" in said[0]


# Precision and memory.


@pytest.mark.parametrize("method", ["full", "lora", "ptuning"])
def test_bfloat16_and_gradient_checkpointing(
    make_settings: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    settings = make_settings(method, dtype="bfloat16", gradient_checkpointing=True, bf16=True)
    job = prepare(settings)
    assert {weight.dtype for weight in job.trainer.model.parameters() if weight.requires_grad} == {
        torch.bfloat16 if method == "full" else torch.float32
    }
    assert {weight.dtype for weight in job.trainer.model.parameters() if not weight.requires_grad} <= {torch.bfloat16}
    assert finetune.main(settings) == 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_gradient_checkpointing_changes_no_loss(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    for method in ("lora", "ptuning"):
        found = []
        for checkpointing in (False, True):
            out = tmp_path / f"{method}{checkpointing}"
            settings = make_settings(
                method, gradient_checkpointing=checkpointing, output_dir=str(out), max_steps=4, learning_rate=1e-3
            )
            assert finetune.main(settings) == 0
            found.append(losses(out))
        # The prefix has a dropout, drawn twice or once.
        assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("method", ["lora", "adalora", "ptuning"])
def test_on_quantized_weights(
    make_settings: Callable[..., list[str]], tmp_path: Path, method: str, dtype: str
) -> None:
    assert finetune.main(make_settings(method, dtype=dtype)) == 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


@pytest.mark.parametrize("setting", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluating_in_half_precision_rounds_no_result(
    make_settings: Callable[..., list[str]], tmp_path: Path, setting: str
) -> None:
    for method, name in (("full", "model.safetensors"), ("lora", "adapter_model.safetensors")):
        found = []
        for out, changes in (("whole", {}), ("rounded", {setting: True})):
            words = make_settings(method, max_steps=1, save_strategy="no", output_dir=str(tmp_path / out), **changes)
            assert finetune.main([*words, f"--eval_file={tmp_path / 'train.jsonl'}", "--generate_samples=1"]) == 0
            found.append(load_file(tmp_path / out / name))
            shutil.rmtree(tmp_path / out)
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(weight, found[1][key]) for key, weight in found[0].items())
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in found[1].values())
