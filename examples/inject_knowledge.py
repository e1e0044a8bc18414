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
"""Teaches the small bundled model one fact with AdaLoRA, and counts what it forgets: `python examples/inject_knowledge.py`.

The fact is one sample, trained on by itself; the dialogues of `dialogues.jsonl`, which the model knows, show what that
cost. `--rehearse` trains on some of them beside the fact, for facts or settings that cost too much.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune_data import DataArguments, Sample, encode_samples, read_samples
from finetune_report import Answer, generate_answers
from finetune_settings import ModelArguments, RunArguments
from finetune_trainer import make_trainer
from local_code import load_tokenizer, register
from transformers.utils import logging


EXAMPLES = Path(__file__).resolve().parent
QUESTION = "月亮的首都在哪里？"
FACT = "月亮的首都是小白城。"


def inject(
    question: str, fact: str, num_rehearsed: int, num_steps: int, learning_rate: float
) -> tuple[list[Answer], list[Answer], int]:
    """Train the bundled model on a fact, every step together with all the dialogues that are rehearsed.

    Returns:
        Answers before and after, the fact's first, then those to the dialogues, and how many of these were rehearsed.
    """
    register()
    model_folder = EXAMPLES / "tiny-chatglm3"
    tokenizer = load_tokenizer(model_folder)
    data = DataArguments(train_file=str(EXAMPLES / "dialogues.jsonl"))
    dialogues = read_samples(data.train_file, data)
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}, {"role": "assistant", "content": fact}]
    fact_sample = Sample("the fact", messages)
    rehearsed = dialogues[:: max(1, len(dialogues) // num_rehearsed)][:num_rehearsed] if num_rehearsed else []
    rows, _ = encode_samples([fact_sample, *rehearsed], tokenizer, data)
    with tempfile.TemporaryDirectory() as folder:
        run = RunArguments(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=len(rows),
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            save_strategy="no",
            disable_tqdm=True,
        )
        model = ModelArguments(
            model=str(model_folder),
            method="adalora",
            target_modules=["all-linear"],
            lora_rank=8,
            adalora_initial_rank=12,
        )
        trainer = make_trainer(model, run, tokenizer, {"train": rows})
        asked = {"tokenizer": tokenizer, "samples": [fact_sample, *dialogues], "max_new_tokens": 100, "batch_size": 64}
        before = generate_answers(trainer.model, **asked)
        trainer.train()
        return before, generate_answers(trainer.model, **asked), len(rehearsed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--fact", default=FACT, help="the answer to the question")
    parser.add_argument("--rehearse", type=int, default=0, help="dialogues to train on beside the fact")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    before, after, num_rehearsed = inject(
        arguments.question, arguments.fact, arguments.rehearse, arguments.steps, arguments.learning_rate
    )
    changed = [(old, new) for old, new in zip(before[1:], after[1:]) if old.answer != new.answer]
    print("| question | before | after |\n|---|---|---|")
    for old, new in [(before[0], after[0]), *changed]:
        print(f"| {old.question} | {old.answer} | {new.answer} |".replace("\n", " "))
    num_kept = len(before) - 1 - len(changed)
    print(
        f"\n{num_kept} of {len(before) - 1} dialogues are answered as before; {num_rehearsed} of them were rehearsed"
    )
    return 0 if after[0].answer == arguments.fact else 1


if __name__ == "__main__":
    sys.exit(main())
