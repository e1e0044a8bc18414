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

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from finetune_data import Sample, question_and_answer
from finetune_pictures import PictureReader, picture_of
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import get_logger


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


# Under the library's name, so that its handler prints it.
logger = get_logger("transformers.finetune")


class Answer(NamedTuple):
    """What was asked, what the data says, and what the model says."""

    question: str
    reference: str
    answer: str


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
        pictures = [picture_of(sample.messages, tokenizer) for sample in batch]
        pictures = [picture for picture in pictures if picture is not None]
        if pictures and (reader := PictureReader.of(model.config)) is not None:
            inputs["images"] = reader.read(pictures)
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
    """The scores of the published fine-tuning scripts, means over all answers in percent, and the share that is exact.

    `rouge-1`, `rouge-2`, `rouge-l` and `bleu-4` count the words that `jieba` finds, as the scripts of ChatGLM3 and GLM-4
    do; `bleu-4-characters` is the BLEU-4 of the scripts of ChatGLM-6B and ChatGLM2. Without `jieba`, `rouge-chinese` and
    `nltk` there is `exact` alone.
    """
    exact = statistics.fmean(answer.answer == answer.reference for answer in answers)
    try:
        # Here, because they take a second to import, and few runs score anything.
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    except ImportError as error:
        logger.warning(f"{error}: for ROUGE and BLEU install jieba, rouge-chinese and nltk")
        return {"exact": round(100 * exact, 2)}
    jieba.setLogLevel(logging.WARNING)
    smooth = SmoothingFunction().method3
    rows = []
    for answer in answers:
        given, wanted = (
            [word for word in jieba.cut(text) if word.strip()] for text in (answer.answer, answer.reference)
        )
        row = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu-4-characters"), 0.0)
        # A full stop ends a sentence for `Rouge`, which refuses texts without any.
        if " ".join(given).strip(". ") and " ".join(wanted).strip(". "):
            (found,) = Rouge().get_scores(" ".join(given), " ".join(wanted))
            row |= {name: found[name]["f"] for name in found}
        if given:
            row["bleu-4"] = sentence_bleu([wanted], given, smoothing_function=smooth)
            row["bleu-4-characters"] = sentence_bleu(
                [list(answer.reference)], list(answer.answer), smoothing_function=smooth
            )
        rows.append(row)
    scores = {name: statistics.fmean(row[name] for row in rows) for name in rows[0]} | {"exact": exact}
    return {name: round(100 * score, 2) for name, score in scores.items()}


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
