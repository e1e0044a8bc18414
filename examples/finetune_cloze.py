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
"""Teaches a model a task as a cloze question: `python examples/finetune.py --method cloze ...`, or this file itself.

A pattern makes a text with a blank of each sample, and verbalizers name what stands there for each label (pattern-exploiting
training, https://arxiv.org/abs/2001.07676). The scores of the choices are the logits of the labels:

    python examples/finetune.py --method cloze --model FOLDER --train_file train.jsonl --eval_file eval.jsonl \\
        --pattern '{text} Now there are [MASK].' --verbalizers '{"more": "more", "fewer": "fewer"}' --output_dir output

A line of the data is an object with a `label` and whatever the pattern names. ChatGLM2, ChatGLM3 and GLM-4 know no blanks:
their patterns end where the choice comes. `--head linear` trains a linear head on the same data instead, to compare.
The output folder gets the model and `metrics.json`, with the accuracy before and after.
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from finetune_settings import ArgumentParser, RunArguments, error_line, expand_file, settings_named
from local_code import REPOSITORY, load_module, load_tokenizer, register
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, set_seed


generation_blanks = load_module("generation_blanks")


@dataclass
class ClozeArguments:
    """The task."""

    model: str = field(metadata={"help": "a checkpoint folder"})
    train_file: str = field(metadata={"help": "JSON lines with a label and what the pattern names"})
    pattern: str = field(metadata={"help": "a text with one blank, such as '{text} It is [MASK].'"})
    verbalizers: str = field(metadata={"help": 'what each label writes there, as {"1": "good", "0": "bad"}'})
    eval_file: str | None = field(default=None, metadata={"help": "the same, to measure the accuracy on"})
    method: Literal["cloze"] = field(default="cloze", metadata={"help": "the only one here"})
    head: Literal["choices", "linear"] = field(default="choices", metadata={"help": "linear: a head, no cloze"})
    max_samples: int | None = field(default=None, metadata={"help": "how many samples to learn from; all by default"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "how the weights are held"})

    @property
    def labels(self) -> dict[str, str]:
        """What each label writes into the blank, in the order of the outputs.

        Raises:
            ValueError: if the setting is no JSON object of at least two texts.
        """
        try:
            labels = json.loads(self.verbalizers)
        except json.JSONDecodeError as error:
            raise ValueError(f"verbalizers: must be JSON, got {self.verbalizers!r} ({error})") from error
        texts = labels.values() if isinstance(labels, dict) else []
        if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"verbalizers: must give texts to two labels or more, got {self.verbalizers!r}")
        return labels


def is_cloze(words: Sequence[str]) -> bool:
    """Whether a command line, or the file that it begins with, asks for this method."""
    method = None
    if words and words[0].endswith((".yaml", ".yml")) and Path(words[0]).is_file():
        try:
            settings = yaml.safe_load(Path(words[0]).read_text(encoding="utf-8"))
        except yaml.YAMLError:
            settings = None
        method = settings.get("method") if isinstance(settings, dict) else None
    for index, word in enumerate(words):
        if word.startswith("--method="):
            method = word.removeprefix("--method=")
        elif word == "--method" and index + 1 < len(words):
            method = words[index + 1]
    return method == "cloze"


def read_samples(path: str, arguments: ClozeArguments) -> tuple[list[str], list[int]]:
    """Texts by the pattern, and the numbers of their labels.

    Raises:
        OSError, ValueError: for a file that cannot be read, with the line.
    """
    texts, labels = [], []
    names = list(arguments.labels)
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            sample = json.loads(line)
            texts.append(arguments.pattern.format_map(sample))
            labels.append(names.index(str(sample["label"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    if not texts:
        raise ValueError(f"{path} is empty")
    return texts, labels


@dataclass
class ChoiceCollator:
    """Batches of rows with choices."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        labels = torch.tensor([sample["label"] for sample in samples])
        return {"rows": [sample["row"] for sample in samples], "labels": labels}


@dataclass
class TextCollator:
    """Batches of ids for a linear head, padded on the right."""

    pad_token_id: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        length = max(len(sample["ids"]) for sample in samples)
        rows = [sample["ids"] + [self.pad_token_id] * (length - len(sample["ids"])) for sample in samples]
        lengths = torch.tensor([len(sample["ids"]) for sample in samples])
        return {
            "input_ids": torch.tensor(rows),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
            "labels": torch.tensor([sample["label"] for sample in samples]),
        }


class ClozeTrainer(Trainer):
    """Trains on the cross-entropy over the choices, or over the outputs of a head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The loss is the mean of a batch, so it must be divided by the number of batches that are accumulated.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The mean over a batch; the outputs are the scores, `[batch, choices]`."""
        labels = inputs["labels"]
        if "rows" in inputs:
            scores = generation_blanks.score_rows(model, inputs["rows"])
        else:
            scores = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
        loss = F.cross_entropy(scores, labels.to(scores.device))
        return (loss, {"scores": scores}) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss, scores and labels of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, outputs["scores"], inputs["labels"]


def measure(prediction: Any) -> dict[str, float]:
    """The accuracy in percent."""
    right = np.argmax(prediction.predictions, axis=-1) == prediction.label_ids
    return {"accuracy": round(100 * float(right.mean()), 2)}


def make_rows(
    arguments: ClozeArguments, path: str | None, model: Any, tokenizer: PreTrainedTokenizerBase
) -> list[Any]:
    """What the model reads of each sample of a file."""
    if path is None:
        return []
    with settings_named("pattern, verbalizers, data"):
        texts, labels = read_samples(path, arguments)
        if arguments.head == "linear":
            rows = [{"ids": tokenizer.encode(strip_masks(text))} for text in texts]
        else:
            choices = list(arguments.labels.values())
            rows = [
                {"row": row} for row in generation_blanks.make_choice_rows(model.config, tokenizer, texts, choices)
            ]
    return [row | {"label": label} for row, label in zip(rows, labels)]


def strip_masks(text: str) -> str:
    """A text without mask tokens, for a head."""
    return re.sub(r"\[[gs]?MASK\]", "", text)


def make_trainer(arguments: ClozeArguments, run: RunArguments) -> ClozeTrainer:
    """Load and check everything.

    Raises:
        OSError, ValueError: for a model or data that cannot be used.
    """
    set_seed(run.seed)
    num_labels = len(arguments.labels)
    modeling, tokenizer = register(), load_tokenizer(Path(arguments.model))
    with settings_named("model"):
        if arguments.head == "linear":
            model = modeling.ChatGLMForSequenceClassification.from_pretrained(
                arguments.model, dtype=arguments.dtype, num_labels=num_labels
            )
            # In a folder of GLM the name stands for the published head, which has other weights.
            head_class = {"AutoModelForSequenceClassification": f"modeling_chatglm.{type(model).__name__}"}
            model.config.auto_map = {**(getattr(model.config, "auto_map", None) or {}), **head_class}
        else:
            model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    train = make_rows(arguments, arguments.train_file, model, tokenizer)[: arguments.max_samples]
    collator = ChoiceCollator() if arguments.head == "choices" else TextCollator(tokenizer.pad_token_id or 0)
    return ClozeTrainer(
        model,
        run,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=make_rows(arguments, arguments.eval_file, model, tokenizer) or None,
        processing_class=tokenizer,
        compute_metrics=measure,
    )


def main(words: list[str] | None = None) -> int:
    """Run the program with the words of a command line, those of this process by default."""
    try:
        classes = (ClozeArguments, RunArguments)
        parser = ArgumentParser(classes, description=__doc__, allow_abbrev=False)
        given = expand_file(sys.argv[1:] if words is None else words, classes)
        arguments, run = parser.parse_args_into_dataclasses(given)
        # The rows hold choices, which have no padding to be left out of the count.
        run.include_num_input_tokens_seen = "no"
        trainer = make_trainer(arguments, run)
    except (OSError, TypeError, ValueError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return 2
    before = trainer.evaluate() if arguments.eval_file else {}
    trainer.train()
    trainer.save_model()
    after = trainer.evaluate() if arguments.eval_file else {}
    if not trainer.is_world_process_zero():
        return 0
    folder = Path(run.output_dir or "output")
    for source in REPOSITORY.glob("*.py"):
        shutil.copyfile(source, folder / source.name)
    metrics = {
        "samples": len(trainer.train_dataset),
        "accuracy": {"before": before.get("eval_accuracy"), "after": after.get("eval_accuracy")},
        "history": trainer.state.log_history,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"accuracy: {metrics['accuracy']['before']} before, {metrics['accuracy']['after']} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
