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
"""The pretraining program and cloze tasks, from the command line to what lies in the output folder."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, auto_classes_left_alone
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


pytest.importorskip("datasets")

EXAMPLES = REPOSITORY / "examples"
SMALL = ["--hidden_size", "32", "--num_layers", "2", "--num_heads", "2", "--num_questions", "6", "--use_cpu", "true"]
QUICK = [
    "--disable_tqdm",
    "true",
    "--warmup_steps",
    "0",
    "--learning_rate",
    "5e-3",
    "--per_device_train_batch_size",
    "4",
    "--logging_steps",
    "2",
]


@pytest.fixture(scope="module")
def programs() -> Iterator[SimpleNamespace]:
    with auto_classes_left_alone(), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import finetune
        import pretrain
        import pretrain_text

        yield SimpleNamespace(finetune=finetune, pretrain=pretrain, text=pretrain_text)


@pytest.fixture(scope="module")
def pretrained(programs: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    words = ["--output_dir", str(folder), "--max_steps", "4", "--save_steps", "2", "--eval_steps", "4"]
    assert programs.pretrain.main([*words, *SMALL, *QUICK]) == 0
    return folder


def test_a_pretrained_folder_is_complete(programs: SimpleNamespace, pretrained: Path) -> None:
    metrics = json.loads((pretrained / "metrics.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert any("exact_match_told_behind" in entry for entry in metrics["history"])
    assert (pretrained / "curves.png").stat().st_size > 0
    config = json.loads((pretrained / "config.json").read_text(encoding="utf-8"))
    assert config["model_version"] == "glm" and config["use_cache"] and "AutoModel" in config["auto_map"]
    names = {path.name for path in pretrained.iterdir()}
    assert {path.name for path in REPOSITORY.glob("*.py")} | {"cog-pretrain.model"} <= names


def test_a_pretrained_folder_loads_by_itself(pretrained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(pretrained, trust_remote_code=True)
    filled = model.infill(tokenizer, "On Monday [MASK] sold two hats in [MASK].", max_new_tokens=3)
    assert len(filled.spans) == 2
    assert filled.text.startswith("On Monday ") and filled.text.endswith(".")


@pytest.mark.grid
def test_a_resumed_run_is_the_same(programs: SimpleNamespace, pretrained: Path, tmp_path: Path) -> None:
    """Blanks depend on the batches alone, so nothing is lost by an interruption."""
    words = ["--output_dir", str(tmp_path), "--max_steps", "4", "--save_strategy", "no", "--eval_steps", "4"]
    checkpoint = ["--resume", str(pretrained / "checkpoint-2"), "--tokenizer", str(pretrained)]
    assert programs.pretrain.main([*words, *SMALL, *QUICK, *checkpoint]) == 0
    wanted, found = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path))
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-5)


def test_questions_are_held_out(programs: SimpleNamespace) -> None:
    questions = programs.text.make_questions(200)
    asked = {question.text.replace("[MASK]", question.answer) for question in questions}
    documents = programs.text.make_documents(1)
    assert not asked & {next(documents)["text"] for _ in range(3000)}
    for question in questions:
        assert question.text.count("[MASK]") == 1
    task = programs.text.make_task(50, 0)
    assert {row["label"] for row in task} == {"more", "fewer"}
    assert not any("bought" in row["text"] or "sold" in row["text"] for row in task)


def test_a_bad_objective_is_named(programs: SimpleNamespace, capsys: Any, tmp_path: Path) -> None:
    assert programs.pretrain.main(["--output_dir", str(tmp_path), "--objective", "glm-10"]) == 2
    assert "objective: must be one of glm-large" in capsys.readouterr().err
    assert programs.pretrain.main(["--output_dir", str(tmp_path), "--max_length", "512"]) == 2
    assert "row_length: 160 is too little for documents of 512 tokens" in capsys.readouterr().err


PATTERN = ["--pattern", "{text} Now there are [MASK].", "--verbalizers", '{"more": "more", "fewer": "fewer"}']


@pytest.mark.parametrize("head", ["choices", pytest.param("linear", marks=pytest.mark.grid)])
def test_cloze_tasks_are_learnt(programs: SimpleNamespace, pretrained: Path, tmp_path: Path, head: str) -> None:
    programs.text.main(tmp_path / "task")
    (tmp_path / "few.jsonl").write_text(
        "".join((tmp_path / "task" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]),
        encoding="utf-8",
    )
    words = ["--method", "cloze", "--model", str(pretrained), "--output_dir", str(tmp_path / "out"), "--head", head]
    files = ["--train_file", str(tmp_path / "few.jsonl"), "--eval_file", str(tmp_path / "few.jsonl")]
    settings = ["--max_steps", "30", "--learning_rate", "5e-3", "--save_strategy", "no", "--use_cpu", "true"]
    assert programs.finetune.main([*words, *files, *PATTERN, *settings, "--disable_tqdm", "true"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["samples"] == 8
    assert metrics["accuracy"]["after"] == 100
    auto_class = AutoModelForCausalLM if head == "choices" else AutoModelForSequenceClassification
    model = auto_class.from_pretrained(tmp_path / "out", trust_remote_code=True)
    wanted = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("classifier_head") for name in wanted) == (head == "linear")
    model.save_pretrained(tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert wanted.keys() == found.keys() and all(found[name].equal(wanted[name]) for name in wanted)


def test_accumulated_batches_of_cloze_tasks_equal_one(
    programs: SimpleNamespace, pretrained: Path, tmp_path: Path
) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in programs.text.make_task(8, 0)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--method", "cloze", "--model", str(pretrained), "--train_file", str(tmp_path / "data.jsonl"), *PATTERN]
    words += ["--max_steps", "1", "--save_strategy", "no", "--use_cpu", "true", "--disable_tqdm", "true"]
    steps = []
    for size, times in ((8, 1), (2, 4)):
        sizes = ["--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(times)]
        folder = tmp_path / str(size)
        assert programs.finetune.main([*words, *sizes, "--logging_steps", "1", "--output_dir", str(folder)]) == 0
        steps.append(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["history"][0])
    assert steps[0]["loss"] == pytest.approx(steps[1]["loss"], rel=1e-4)
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--verbalizers": '{"more": "more"}'}, "verbalizers: must give texts to two labels or more"),
        ({"--verbalizers": "more"}, "verbalizers: must be JSON"),
        ({"--pattern": "{words} [MASK]"}, "line 1: KeyError: 'words'"),
        ({"--pattern": "{text} [MASK] [MASK]"}, "is for one blank"),
        ({"--verbalizers": '{"yes": "more", "no": "fewer"}'}, "is not in list"),
    ],
)
def test_bad_cloze_settings_are_named(
    programs: SimpleNamespace, pretrained: Path, tmp_path: Path, capsys: Any, changes: dict[str, str], message: str
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": "more"}\n', encoding="utf-8")
    settings = dict(zip(PATTERN[::2], PATTERN[1::2])) | {"--train_file": str(tmp_path / "data.jsonl")} | changes
    words = ["--method=cloze", "--model", str(pretrained), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    assert programs.finetune.main([*words, *(word for pair in settings.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.grid
def test_two_processes_pretrain_together(tmp_path: Path) -> None:
    """With gloo on CPUs: each process reads batches of its own, and the result is one folder."""
    words = [
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "3",
        "--save_steps",
        "2",
        "--eval_steps",
        "3",
        *SMALL,
        *QUICK,
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    subprocess.run([*launch, str(EXAMPLES / "pretrain.py"), *words, "--ddp_backend", "gloo"], check=True, timeout=500)
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["history"][-1]["step"] == 3
    weights = load_file(tmp_path / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
