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
"""What does a fine-tuning run leave behind for a person to read? Answers before and after, their scores, curves."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from finetune_data import Sample, question_and_answer
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from transformers import PreTrainedTokenizerBase


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


class Answer(NamedTuple):
    """What was asked, what the data says, and what the model says."""

    question: str
    reference: str
    answer: str


class CharacterTokenizer:
    """Splits a text into Chinese characters and words of other scripts, for ROUGE."""

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text, in lower case."""
        return re.findall(
            r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+", text.lower()
        )


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 8
) -> list[Answer]:
    """Let a model write the last answer of each sample, greedily."""
    was_training = model.training
    model.eval()
    answers = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        questions, references = zip(*(question_and_answer(sample, tokenizer) for sample in batch))
        inputs = tokenizer.pad({"input_ids": list(questions)}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        output = model.generate(
            **inputs,
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.stop_token_ids(),
            pad_token_id=tokenizer.pad_token_id,
        )
        for question, reference, row in zip(questions, references, output[:, inputs["input_ids"].shape[1] :]):
            texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (question, reference, row))
            answers.append(Answer(*texts))
    model.train(was_training)
    return answers


def score_answers(answers: Sequence[Answer]) -> dict[str, float]:
    """ROUGE F-measures and BLEU, by characters for Chinese, and the share of answers that are right to the letter.

    All are percentages.
    """
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=CharacterTokenizer())
    rouge = [scorer.score(answer.reference, answer.answer) for answer in answers]
    scores = {name: 100 * sum(row[name].fmeasure for row in rouge) / len(rouge) for name in rouge[0]}
    given, wanted = [answer.answer for answer in answers], [answer.reference for answer in answers]
    # "zh" splits Chinese into characters and leaves other words whole.
    scores["bleu"] = corpus_bleu(given, [wanted], tokenize="zh").score
    scores["exact"] = 100 * sum(answer.answer == answer.reference for answer in answers) / len(answers)
    return {name: round(score, 2) for name, score in scores.items()}


def write_samples(path: Path, before: Sequence[Answer], after: Sequence[Answer]) -> None:
    """Write a Markdown table of the answers before and after training."""

    def cell(text: str) -> str:
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")

    rows = ["| question | wanted | before | after |", "|---|---|---|---|"]
    for old, new in zip(before, after):
        rows.append("| " + " | ".join(map(cell, (new.question, new.reference, old.answer, new.answer))) + " |")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def draw_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Draw the losses of the Trainer's log, by step."""
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points), marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
