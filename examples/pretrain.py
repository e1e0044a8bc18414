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
"""Pretrains a GLM by blank infilling: `python examples/pretrain.py --output_dir output/pretrained`.

Without further settings it is a small model on bilingual text that `pretrain_text.py` makes without end, with GLM-10B's
mixture of short spans, sentences and documents; some minutes on one core. It fills held-out blanks as it goes, which shows
in `curves.png` and `metrics.json`, beside what always answering the commonest word gives. `--objective causal` trains the
same network from left to right instead.

Of your own: `--tokenizer` is a folder with a tokenizer of GLM or ChatGLM-6B, and `--train_file` names text files, a
document in a line, which are streamed. `--model` goes on from a checkpoint. Every one of the library's
`TrainingArguments` is a setting, and with `accelerate launch` or `torchrun` in place of `python` it runs in several
processes. The output folder is a checkpoint that loads by itself. `--resume auto` goes on after an interruption.
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import torch
from local_code import REPOSITORY, load_module, load_tokenizer, register
from pretrain_text import Question, make_documents, make_questions, train_vocabulary
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402


blank_infilling = load_module("blank_infilling")
OBJECTIVES: dict[str, Any] = blank_infilling.OBJECTIVES
CAUSAL = "causal"


@dataclass
class PretrainArguments:
    """What to train, and on what."""

    objective: str = field(default="glm-10b", metadata={"help": f"{', '.join(OBJECTIVES)}, or causal"})
    model: str | None = field(
        default=None, metadata={"help": "a checkpoint to go on from; a new small GLM by default"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "a folder with one; by default one is trained"})
    train_file: list[str] | None = field(default=None, metadata={"help": "text files, a document in a line"})
    max_length: int = field(default=128, metadata={"help": "tokens of a document; longer ones are cut"})
    row_length: int = field(default=160, metadata={"help": "tokens of a row, into which several samples are packed"})
    hidden_size: int = field(default=128, metadata={"help": "of a new model"})
    num_layers: int = field(default=3, metadata={"help": "of a new model"})
    num_heads: int = field(default=4, metadata={"help": "of a new model"})
    embedding_gradient: float = field(default=1.0, metadata={"help": "share that trains the embedding; GLM-130B: 0.1"})
    num_questions: int = field(default=300, metadata={"help": "held-out blanks, with the text that is made here"})
    resume: str = field(default="no", metadata={"help": "no, auto (the last checkpoint), or a checkpoint folder"})


@dataclass
class RunArguments(TrainingArguments):
    """The library's arguments with other defaults."""

    max_steps: int = field(default=2000, metadata={"help": "there are no epochs: the text is a stream"})
    per_device_train_batch_size: int = field(default=24, metadata={"help": "documents of a batch"})
    learning_rate: float = field(default=2e-3, metadata={"help": "the highest"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "how it goes down"})
    warmup_steps: float = field(default=50, metadata={"help": "in which it goes up"})
    weight_decay: float = field(default=0.01, metadata={"help": "of AdamW"})
    logging_steps: float = field(default=25, metadata={"help": "between two logged losses"})
    eval_steps: float | None = field(default=250, metadata={"help": "between two rounds of questions"})
    save_steps: float = field(default=500, metadata={"help": "between two checkpoints"})
    save_total_limit: int | None = field(default=2, metadata={"help": "how many checkpoints are kept"})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "trackers to report to"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "the collator reads the columns"})
    # Every process reads the stream and takes its own batches, whose numbers of rows differ.
    accelerator_config: Any = field(
        default_factory=lambda: {"dispatch_batches": False}, metadata={"help": "of accelerate"}
    )


@dataclass
class CausalCollator:
    """Rows for reading from left to right, with labels where they are predicted: GLM without blanks."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows) - 1

        def pad(values: list[int], padding: int) -> list[int]:
            return values + [padding] * (length - len(values))

        return {
            "input_ids": torch.tensor([pad(row["input_ids"][:-1], self.pad_token_id) for row in rows]),
            "labels": torch.tensor([pad(row["input_ids"][1:], blank_infilling.IGNORED) for row in rows]),
            # No token sees a later one.
            "attention_mask": torch.zeros(len(rows), dtype=torch.long),
        }


def make_stream(arguments: PretrainArguments, tokenizer: PreTrainedTokenizerBase, ids: Any, seed: int) -> Any:
    """The documents as rows of ids, numbered, with what the generation begins and ends them with."""
    if arguments.train_file:
        stream = datasets.load_dataset("text", data_files=arguments.train_file, split="train", streaming=True)
        # Never ends: the number of steps does.
        stream = stream.shuffle(seed=seed, buffer_size=10_000).repeat(None)
    else:
        stream = datasets.IterableDataset.from_generator(make_documents, gen_kwargs={"seed": seed + 1})
    first, last = ([token] if token is not None else [] for token in (ids.start_of_text, ids.end_of_text))
    room = arguments.max_length - len(first) - len(last)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        return {"input_ids": [*first, *tokenizer.encode(row["text"], add_special_tokens=False)[:room], *last]}

    rows = stream.map(encode, remove_columns=["text"]).filter(lambda row: len(row["input_ids"]) > 3)
    return blank_infilling.number_rows(rows)


def make_tokenizer(arguments: PretrainArguments, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or a new one for the text that is made here."""
    if source := arguments.tokenizer or arguments.model:
        return load_tokenizer(Path(source))
    train_vocabulary(folder)
    return load_tokenizer(folder)


def make_model(arguments: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model of a folder, or a new GLM."""
    modeling = register()
    if arguments.model:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = load_module("configuration_chatglm").ChatGLMConfig(
        model_version="glm",
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.num_heads,
        # Some tokens of GLM's vocabularies have no name.
        vocab_size=-(-(len(tokenizer) + 2) // 16) * 16,
        max_sequence_length=max(arguments.max_length, arguments.row_length),
    )
    # The folder loads by itself.
    config.auto_map = {**load_module("configuration_generations").AUTO_MAP, **config.features.auto_map}
    return modeling.ChatGLMForConditionalGeneration(config)


@torch.no_grad()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], is_causal: bool
) -> list[str]:
    """What a model writes into the blanks; from left to right it reads what stands before them."""
    was_training = model.training
    model.eval()
    answers = []
    for start in range(0, len(questions), 50):
        batch = questions[start : start + 50]
        if not is_causal:
            filled = model.infill(tokenizer, [question.text for question in batch], max_new_tokens=6)
            answers += [one.spans[0] for one in filled]
            continue
        for question in batch:
            prompt = tokenizer.encode(question.text.partition("[MASK]")[0].rstrip(), add_special_tokens=False)
            length = len(tokenizer.encode(question.answer, add_special_tokens=False))
            input_ids = torch.tensor([[tokenizer.cls_token_id, *prompt]], device=model.device)
            settings = {"do_sample": False, "max_new_tokens": length, "pad_token_id": tokenizer.pad_token_id}
            output = model.generate(input_ids, **settings)
            answers.append(
                tokenizer.decode(output[0, input_ids.shape[1] :].tolist(), skip_special_tokens=True).strip()
            )
    model.train(was_training)
    return answers


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Exact match in percent: of all blanks, of those that are told before already, and of those told only behind.

    What follows the answer does not count: a model that reads from left to right does not know where a blank ends.
    """
    right = [given.startswith(question.answer) for question, given in zip(questions, answers)]
    parts = {"": right}
    for name, is_second in (("_told_before", True), ("_told_behind", False)):
        parts[name] = [value for value, question in zip(right, questions) if question.is_second == is_second]
    return {f"exact_match{name}": round(100 * sum(part) / max(len(part), 1), 2) for name, part in parts.items()}


def unigram_score(questions: Sequence[Question], num_documents: int = 5000) -> float:
    """Exact match in percent of the word that is commonest among all answers to such questions."""
    training = make_questions(num_documents, seed=1)
    ((word, _),) = Counter(question.answer for question in training).most_common(1)
    return round(100 * sum(question.answer == word for question in questions) / len(questions), 2)


@dataclass
class AskingCallback(TrainerCallback):
    """Fills held-out blanks every so many steps, and logs how many are right."""

    trainer: Any
    questions: Sequence[Question]
    is_causal: bool

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        is_due = state.global_step % int(args.eval_steps or 1) == 0 or state.global_step == state.max_steps
        if is_due and state.is_world_process_zero and self.questions:
            tokenizer = self.trainer.processing_class
            answers = answer(self.trainer.accelerator.unwrap_model(model), tokenizer, self.questions, self.is_causal)
            is_loss_due = control.should_log
            self.trainer.log(score(self.questions, answers))
            # It would be taken for the log of the loss.
            control.should_log = is_loss_due


def draw_curves(path: Path, history: Sequence[dict[str, float]], unigram: float | None) -> None:
    """Draw the loss and the exact match by step."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    names = {
        "loss": (panels[0], "training"),
        "exact_match": (panels[1], "all"),
        "exact_match_told_before": (panels[1], "told before the blank"),
        "exact_match_told_behind": (panels[1], "told behind it"),
    }
    for name, (axes, label) in names.items():
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points), marker=".", label=label)
    if unigram is not None:
        panels[1].axhline(unigram, color="grey", linestyle=":", label="commonest word")
    for axes, title in zip(panels, ("loss", "exact match of held-out blanks, %")):
        axes.set_xlabel("step")
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def make_trainer(arguments: PretrainArguments, run: RunArguments) -> Trainer:
    """Put everything together.

    Raises:
        ValueError: for an unknown objective, or a model that cannot have it.
    """
    if arguments.objective not in (*OBJECTIVES, CAUSAL):
        raise ValueError(f"objective: must be one of {', '.join(OBJECTIVES)} or causal, got {arguments.objective}")
    # Each span needs a blank, a start and an end. Fifteen tokens in a hundred are cut out, in spans of one at the shortest.
    if arguments.objective != CAUSAL and arguments.row_length < 1.25 * arguments.max_length:
        raise ValueError(
            f"row_length: {arguments.row_length} is too little for documents of {arguments.max_length} tokens and what "
            f"their blanks add; give {round(1.3 * arguments.max_length)}, or a smaller max_length"
        )
    set_seed(run.seed)
    # One process makes the tokenizer, and the others find it.
    with run.main_process_first():
        tokenizer = make_tokenizer(arguments, Path(run.output_dir or "output"))
    model = make_model(arguments, tokenizer)
    ids = blank_infilling.BlankTokens.of(tokenizer)
    is_causal = arguments.objective == CAUSAL
    collator = CausalCollator(ids.pad)
    if not is_causal:
        collator = blank_infilling.BlankInfillingCollator(
            ids,
            OBJECTIVES[arguments.objective],
            blank_infilling.BlankFormat.of(model.config),
            seed=run.seed,
            row_length=arguments.row_length,
        )
    if arguments.embedding_gradient != 1.0:
        blank_infilling.shrink_embedding_gradients(model, arguments.embedding_gradient)
    trainer = Trainer(
        model,
        run,
        data_collator=collator,
        train_dataset=make_stream(arguments, tokenizer, ids, run.seed),
        processing_class=tokenizer,
    )
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    asks = not arguments.train_file and not is_sharded
    questions = make_questions(arguments.num_questions) if asks else []
    trainer.add_callback(AskingCallback(trainer, questions, is_causal))
    return trainer


def main(words: list[str] | None = None) -> int:
    """Run the program with the words of a command line, those of this process by default."""
    parser = HfArgumentParser((PretrainArguments, RunArguments), description=__doc__)
    arguments, run = parser.parse_args_into_dataclasses(words)
    try:
        trainer = make_trainer(arguments, run)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    checkpoint = get_last_checkpoint(run.output_dir) if arguments.resume == "auto" else arguments.resume
    trainer.train(resume_from_checkpoint=None if checkpoint == "no" else checkpoint)
    # The Trainer turned it off, and the result is used with it.
    trainer.model.config.use_cache = True
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return 0
    folder = Path(run.output_dir or "output")
    for source in REPOSITORY.glob("*.py"):
        shutil.copyfile(source, folder / source.name)
    questions = [] if arguments.train_file else make_questions(arguments.num_questions)
    unigram = unigram_score(questions) if questions else None
    metrics = {"settings": vars(arguments), "commonest_word": unigram, "history": trainer.state.log_history}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw_curves(folder / "curves.png", trainer.state.log_history, unigram)
    return 0


if __name__ == "__main__":
    sys.exit(main())
