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
"""Every generation learns a dialogue by every method on weights of every precision, and a new process still knows it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import finetune_report  # noqa: E402


CASES = {"chatglm": "chatglm1", "chatglm2": "chatglm2", "chatglm3": "chatglm3", "glm4": "glm4"}
LEARNING_RATES = {"full": 5e-3, "lora": 2e-2, "adalora": 5e-2, "ptuning": 3e-1}
BASES = ("float32", "bfloat16", "int8", "int4")
QUESTION, ANSWER = "你好", "我是"
DIALOGUE = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}

# The suite's own share; `make test-grid` runs the rest.
DIAGONAL = {
    ("chatglm", "lora", "int8"),
    ("chatglm", "ptuning", "bfloat16"),
    ("chatglm2", "adalora", "float32"),
    ("chatglm3", "ptuning", "int4"),
    ("chatglm3", "full", "float32"),
    ("glm4", "lora", "bfloat16"),
    ("glm4", "adalora", "int4"),
}
REST = (pytest.mark.slow, pytest.mark.grid)
CELLS = [
    pytest.param(version, method, base, marks=() if (version, method, base) in DIAGONAL else REST)
    for version in CASES
    for method in LEARNING_RATES
    for base in BASES
    if not (method == "full" and base.startswith("int"))
]

RELOAD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import finetune, finetune_report, peft
result, words = sys.argv[2], sys.argv[3:]
model, data, run = finetune.read_arguments(words)
finetune.register()
tokenizer = finetune.load_tokenizer(finetune.Path(model.model))
method, model.method = model.method, "full"
model.model = result if method == "full" else model.model
loaded = finetune.load_model(model, run, num_steps=1)
if method == "ptuning":
    loaded.load_prefix_encoder(result)
elif method != "full":
    loaded = peft.PeftModel.from_pretrained(loaded, result)
(answer,) = finetune_report.generate_answers(
    loaded, tokenizer, finetune.read_samples(data.train_file, data), max_new_tokens=8
)
print(json.dumps(answer.answer))
"""


@pytest.fixture(autouse=True, scope="module")
def leave_the_auto_classes_alone() -> Iterator[None]:
    """The example registers this repository's classes, which other tests load as remote code."""
    with pytest.MonkeyPatch.context() as patch:
        mappings = (
            configuration_auto.CONFIG_MAPPING,
            modeling_auto.MODEL_MAPPING,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
            tokenization_auto.TOKENIZER_MAPPING,
        )
        for mapping in mappings:
            patch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
        classes = dict(tokenization_auto.REGISTERED_TOKENIZER_CLASSES)
        patch.setattr(tokenization_auto, "REGISTERED_TOKENIZER_CLASSES", classes)
        yield


@pytest.fixture
def settings(case_folder: Any, tmp_path: Path) -> Any:
    (tmp_path / "train.jsonl").write_text(json.dumps(DIALOGUE, ensure_ascii=False) + "\n", encoding="utf-8")

    def words(version: str, method: str, base: str) -> list[str]:
        return [
            f"--model={case_folder(CASES[version])}",
            f"--method={method}",
            f"--dtype={base}",
            f"--train_file={tmp_path}/train.jsonl",
            f"--output_dir={tmp_path}/out",
            "--target_modules=all-linear",
            "--lora_rank=8",
            "--lora_dropout=0",
            "--pre_seq_len=16",
            f"--learning_rate={LEARNING_RATES[method]}",
            "--max_steps=200",
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
    job = finetune.prepare(*finetune.read_arguments(words))
    trainer = job.trainer
    samples = finetune.read_samples(job.data.train_file, job.data)

    def answer() -> str:
        (found,) = finetune_report.generate_answers(trainer.model, trainer.processing_class, samples, max_new_tokens=8)
        return found.answer

    assert answer() != ANSWER
    finetune.train(job)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{version} {method} {base}: loss {losses[0]:.2f} -> {losses[-1]:.4f}")
    assert losses[-1] < 0.7 * losses[0]
    assert answer() == ANSWER
    result, other = tmp_path / "out", tmp_path / "other"
    words = [word.replace(str(result), str(other)) for word in words]
    command = [sys.executable, "-c", RELOAD, str(EXAMPLES), str(result), *words]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.returncode == 0, output.stderr
    assert json.loads(output.stdout.splitlines()[-1]) == ANSWER


@pytest.mark.parametrize("version", CASES)
@pytest.mark.parametrize("base", ["int8", "int4"])
def test_integer_weights_are_not_trained(settings: Any, version: str, base: str) -> None:
    with pytest.raises(ValueError, match=base):
        finetune.prepare(*finetune.read_arguments(settings(version, "full", base)))
