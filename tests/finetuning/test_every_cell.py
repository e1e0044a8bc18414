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
"""Every generation learns a dialogue by every method on weights of every precision, and a model loaded from the result knows it."""

import json
from pathlib import Path
from typing import Any

import finetune_report
import peft
import pytest
from finetune_trainer import load_model
from local_code import load_tokenizer

from .short_runs import finetune, finetune_data, prepare, read_arguments


CASES = {"chatglm": "chatglm1", "chatglm2": "chatglm2", "chatglm3": "chatglm3", "glm4": "glm4"}
LEARNING_RATES = {
    "full": 5e-3,
    "freeze": 5e-3,
    "lora": 2e-2,
    "dora": 2e-2,
    "adalora": 5e-2,
    "ptuning": 3e-1,
    "prompt_tuning": 5e-1,
}
OWN_WEIGHTS = ("full", "freeze")
BASES = ("float32", "bfloat16", "int8", "int4")
QUESTION, ANSWER = "你好", "我是"
DIALOGUE = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}

# The suite's own share; `make test-grid` runs the rest.
DIAGONAL = {
    ("chatglm", "lora", "int8"),
    ("chatglm3", "ptuning", "int4"),
    ("chatglm3", "full", "float32"),
    ("glm4", "adalora", "int4"),
    ("chatglm", "freeze", "float32"),
    ("chatglm2", "prompt_tuning", "int8"),
}
REST = (pytest.mark.slow, pytest.mark.grid)
CELLS = [
    pytest.param(version, method, base, marks=() if (version, method, base) in DIAGONAL else REST)
    for version in CASES
    for method in LEARNING_RATES
    for base in BASES
    if not (method in OWN_WEIGHTS and base.startswith("int"))
    # ChatGLM-6B cannot have a prompt of PEFT.
    if (version, method) != ("chatglm", "prompt_tuning")
]


def answer_of(model: Any, tokenizer: Any, samples: list[finetune_data.Sample]) -> str:
    (found,) = finetune_report.generate_answers(model, tokenizer, samples, max_new_tokens=8)
    return found.answer


def reload(words: list[str], result: Path) -> Any:
    """The model of the settings with what training left in a folder."""
    model, _, run = read_arguments(words)
    method, model.method = model.method, "full"
    model.model = str(result) if method in OWN_WEIGHTS else model.model
    loaded = load_model(model, run, num_steps=1)
    if method == "ptuning":
        loaded.load_prefix_encoder(result)
    elif method not in OWN_WEIGHTS:
        loaded = peft.PeftModel.from_pretrained(loaded, result)
    return loaded


@pytest.fixture
def settings(case_folder: Any, tmp_path: Path) -> Any:
    (tmp_path / "train.jsonl").write_text(json.dumps(DIALOGUE, ensure_ascii=False) + "\n", encoding="utf-8")

    def words(version: str, method: str, base: str) -> list[str]:
        return [
            f"--model={case_folder(CASES[version])}",
            f"--method={'lora' if method == 'dora' else method}",
            f"--use_dora={method == 'dora'}",
            f"--dtype={base}",
            f"--train_file={tmp_path}/train.jsonl",
            f"--output_dir={tmp_path}/out",
            "--target_modules=all-linear",
            "--lora_rank=8",
            "--lora_dropout=0",
            "--pre_seq_len=16",
            f"--learning_rate={LEARNING_RATES[method]}",
            "--max_steps=100",
            "--logging_first_step=true",
            "--logging_steps=10",
            "--save_strategy=no",
            "--use_cpu=true",
            "--disable_tqdm=true",
            "--lr_scheduler_type=cosine",
        ]

    return words


@pytest.mark.parametrize(("version", "method", "base"), CELLS)
def test_a_dialogue_is_learnt_and_kept(settings: Any, version: str, method: str, base: str, tmp_path: Path) -> None:
    words = settings(version, method, base)
    job = prepare(words)
    trainer = job.trainer
    samples = finetune_data.read_samples(job.data.train_file, job.data)
    assert answer_of(trainer.model, trainer.processing_class, samples) != ANSWER
    finetune.train(job)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{version} {method} {base}: loss {losses[0]:.2f} -> {losses[-1]:.4f}")
    assert losses[-1] < 0.7 * losses[0]
    assert answer_of(trainer.model, trainer.processing_class, samples) == ANSWER
    result = tmp_path / "out"
    other = [word.replace(str(result), str(tmp_path / "other")) for word in words]
    tokenizer = load_tokenizer(Path(job.model.model))
    assert answer_of(reload(other, result), tokenizer, samples) == ANSWER


@pytest.mark.parametrize("version", CASES)
@pytest.mark.parametrize("base", ["int8", "int4"])
def test_integer_weights_are_not_trained(settings: Any, version: str, base: str) -> None:
    with pytest.raises(ValueError, match=base):
        prepare(settings(version, "full", base))
