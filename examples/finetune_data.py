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
"""How do conversations become rows to train on, and batches of them?

`finetune_files.py` says which files are read, `finetune_formats.py` what their rows may look like. Only what the
assistant writes is learnt; the chat template of the tokenizer knows which tokens that are.

What was encoded is kept in the cache of `datasets` (`HF_DATASETS_CACHE`), under a name made of the texts, the tokenizer,
the settings and the code that encodes, so that a run like an earlier one reads it from there.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import torch
from datasets.fingerprint import Hasher
from finetune_files import find_files, read_records
from finetune_formats import FORMATS, Columns, read_row, recognise
from finetune_loss import IGNORED, sample_weights
from finetune_pictures import PictureReader, encode_unopened, located, picture_of, repeat_placeholder
from local_code import REPOSITORY
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging


# Under the library's name, so that its handler prints it.
logger = logging.get_logger("transformers.finetune")

Row = dict[str, Any]


@dataclass
class DataArguments:
    """What to train on."""

    train_file: str = field(
        metadata={"help": "what to train on: JSON, CSV or Parquet, a folder of such files, or a saved data set"}
    )
    eval_file: str | None = field(default=None, metadata={"help": "what to evaluate on"})
    data_format: Literal["auto", *FORMATS] = field(  # type: ignore[valid-type]
        default="auto", metadata={"help": "what the rows look like, see finetune_formats.py; told by the first row"}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "the column of the question in rows of your own, prompt unless given"}
    )
    response_column: str | None = field(default=None, metadata={"help": "that of the answer, response unless given"})
    history_column: str | None = field(
        default=None, metadata={"help": "that of earlier (question, answer) pairs, history unless given"}
    )
    max_length: int = field(default=1024, metadata={"help": "tokens of a sample at most"})
    too_long: Literal["truncate", "refuse"] = field(
        default="truncate", metadata={"help": "what to do with longer ones"}
    )
    packing: bool = field(default=False, metadata={"help": "several samples in a row, up to max_length tokens"})
    weigh_by: Literal["auto", "token", "sample"] = field(
        default="auto", metadata={"help": "what counts alike in the loss; with packing the sample, else the token"}
    )

    @property
    def by_sample(self) -> bool:
        """Whether samples count alike, however long their answers are."""
        return self.weigh_by == "sample" or (self.weigh_by == "auto" and self.packing)

    @property
    def columns(self) -> Columns:
        """The names of the columns that hold text."""
        given = {"prompt": self.prompt_column, "response": self.response_column, "history": self.history_column}
        return Columns(**{name: column for name, column in given.items() if column})


@dataclass(frozen=True)
class Sample:
    """One conversation, where it was read, and what its row looked like."""

    place: str
    messages: list[dict[str, Any]]
    tools: Any = None
    data_format: str = "messages"


def read_samples(path: str, arguments: DataArguments) -> list[Sample]:
    """Read a file, a folder of files, or a saved data set.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds no samples, or one in none of the known forms; with the file and the line.
    """
    samples = []
    unread: set[str] = set()
    for file in find_files(Path(path)):
        data_format = arguments.data_format
        for place, record in read_records(file):
            try:
                if data_format == "auto":
                    data_format = _recognise(record, arguments)
                conversation = read_row(record, data_format, arguments.columns)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            unread |= conversation.unread
            messages = located(conversation.messages, file.parent)
            samples.append(Sample(place, messages, conversation.tools, data_format))
    if not samples:
        raise ValueError(f"{path} holds no samples")
    if unread:
        logger.warning(f"{path}: nobody reads {', '.join(sorted(unread))}")
    names = [name for name in ("prompt_column", "response_column") if getattr(arguments, name)]
    if names and "columns" not in {sample.data_format for sample in samples}:
        logger.warning(f"{path}: {', '.join(names)}: not used by the format {samples[0].data_format}")
    return samples


def _recognise(record: Any, arguments: DataArguments) -> str:
    named = [name for name in (arguments.prompt_column, arguments.response_column) if name]
    # Named columns are meant, whatever else the rows have.
    return "columns" if named and all(name in record for name in named) else recognise(record, arguments.columns)


def encode_samples(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    reader: PictureReader | None = None,
) -> tuple[list[Row], int]:
    """Encode samples in the conversation format of the tokenizer's generation.

    Returns:
        A row for each, see [`encode_sample`], and how many of them were truncated.

    Raises:
        ValueError: for a sample that `encode_sample` refuses.
    """
    encoded = [encode_sample(sample, tokenizer, arguments, reader) for sample in samples]
    return [row for row, _ in encoded], sum(is_truncated for _, is_truncated in encoded)


def encode_sample(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    reader: PictureReader | None = None,
) -> tuple[Row, bool]:
    """Encode one sample; `reader` is there for a model that sees.

    Returns:
        Its row, with `input_ids`, `attention_mask`, `labels` (-100 where nothing is learnt) and `image` (a path or
        address, or `None`), and whether it was truncated.

    Raises:
        ValueError: for a sample that has no form in this generation, one that is too long if those are refused, one
            without anything to learn, and one with a picture that is not there or that the model cannot see.
    """
    limit = arguments.max_length
    template = {"tools": sample.tools, "return_assistant_tokens_mask": True, "return_dict": True}
    try:
        picture = picture_of(sample.messages, tokenizer)
        if picture is None:
            encoded = tokenizer.apply_chat_template(sample.messages, **template)
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        elif reader is None:
            raise ValueError("there is a picture, and this model reads text alone (no `vision_config`, as GLM-4V has)")
        else:
            reader.check(picture)
            ids, mask = encode_unopened(sample.messages, sample.tools, tokenizer)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{sample.place}: {error}") from error
    length = len(ids)
    if length > limit:
        if arguments.too_long == "refuse":
            raise ValueError(f"{sample.place}: {length} tokens are more than max_length={limit}")
        if picture is None:
            encoded = tokenizer.apply_chat_template(sample.messages, **template, truncation=True, max_length=limit)
            ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        ids, mask = ids[:limit], mask[:limit]
    # The first token has no prediction.
    if not any(mask[1:]):
        reason = f"max_length={limit} cuts off the whole answer" if length > limit else "there is no answer"
        raise ValueError(f"{sample.place}: nothing to learn, since {reason} ({length} tokens)")
    labels = [token if is_answer else IGNORED for token, is_answer in zip(ids, mask)]
    if picture is not None and reader is not None:
        try:
            ids, labels = repeat_placeholder((ids, labels), tokenizer, reader.num_vectors)
        except ValueError as error:
            raise ValueError(f"{sample.place}: {error}") from error
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "image": picture}
    return row, length > limit


class Encoded(NamedTuple):
    """The rows of a file, how many of them were truncated, the seconds it took, and whether the cache had them."""

    rows: Any
    num_truncated: int
    seconds: float
    was_cached: bool


def encode_once(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    reader: PictureReader | None = None,
) -> Encoded:
    """Encode samples as [`encode_samples`] does, or find what an earlier run made of the same samples.

    Raises:
        ValueError: for a sample that `encode_sample` refuses.
    """
    start = time.perf_counter()
    digest = hashlib.sha256(Hasher.hash(tokenizer).encode())
    # A fingerprint of `datasets` knows functions by name; here new code is another one.
    for file in sorted(REPOSITORY.glob("*.py")):
        digest.update(file.read_bytes() if file.name.startswith(("conversation", "tokenization")) else b"")
    digest.update(Path(__file__).read_bytes())
    digest.update(f"{arguments.max_length} {arguments.too_long} {reader}".encode())
    for sample in samples:
        digest.update(json.dumps([sample.messages, sample.tools], default=str).encode())
    name = digest.hexdigest()
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "chatglm-finetune" / f"{name}.arrow"
    cache.parent.mkdir(parents=True, exist_ok=True)
    was_cached = cache.is_file()

    def encode(row: dict[str, int]) -> dict[str, Any]:
        encoded, is_truncated = encode_sample(samples[row["index"]], tokenizer, arguments, reader)
        return {**encoded, "length": len(encoded["input_ids"]), "is_truncated": is_truncated}

    kinds = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
    features = {key: datasets.Sequence(datasets.Value(kind)) for key, kind in kinds.items()}
    features |= {"length": datasets.Value("int32"), "is_truncated": datasets.Value("bool")}
    features["image"] = datasets.Value("string")
    rows = datasets.Dataset.from_dict({"index": range(len(samples))}).map(
        encode,
        remove_columns=["index"],
        features=datasets.Features(features),
        cache_file_name=str(cache),
        new_fingerprint=name,
        desc="encoding",
    )
    num_truncated = sum(rows["is_truncated"])
    return Encoded(rows.remove_columns("is_truncated"), num_truncated, time.perf_counter() - start, was_cached)


def show_row(row: Row, tokenizer: PreTrainedTokenizerBase, width: int = 400) -> str:
    """A row in one line, as the model will see it: control tokens by name, and what is learnt in ⟦ ⟧."""
    text, special = "", {token for token in set(row["input_ids"]) if not tokenizer.decode([token])}
    special |= set(tokenizer.all_special_ids)
    marks = [label != IGNORED for label in row["labels"]]
    pairs = zip(row["input_ids"], marks)
    # Characters may be spread over tokens, so what belongs together is decoded together.
    for (is_learnt, is_special), group in itertools.groupby(pairs, key=lambda pair: (pair[1], pair[0] in special)):
        ids = [token for token, _ in group]
        part = special_names(ids, tokenizer) if is_special else tokenizer.decode(ids)
        text += f"⟦{part}⟧" if is_learnt else part
    text = text.replace("⟧⟦", "")
    text = text.replace("\n", "↵")
    half = width // 2
    return text if len(text) <= width else f"{text[:half]} … {text[-half:]}"


def special_names(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The names of control tokens; one that is repeated, as that of a picture's vectors, with how often."""
    runs = [(tokenizer.convert_ids_to_tokens(token), len(list(run))) for token, run in itertools.groupby(ids)]
    return "".join(name if count == 1 else f"{name}×{count}" for name, count in runs).replace("▁", " ")


@dataclass(frozen=True)
class PackedRows(Sequence[Row]):
    """Rows that hold several samples each; a row is put together when it is asked for."""

    rows: Any
    groups: list[range]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        packed: Row = {"input_ids": [], "position_ids": [], "labels": []}
        for place in self.groups[index]:
            row = self.rows[place]
            packed["input_ids"] += row["input_ids"]
            packed["position_ids"] += range(len(row["input_ids"]))
            packed["labels"] += row["labels"]
        return packed


def pack_rows(rows: Any, max_length: int) -> PackedRows:
    """Join rows, in order, into rows of at most `max_length` tokens.

    Positions start again with every sample, and there is no attention mask: this is how the models' mask tells samples
    apart. Nothing is learnt at the first token of a sample (the prefix of the template), so none predicts the next.
    """
    groups: list[range] = []
    room = 0
    lengths: Iterator[int] = (
        iter(rows["length"]) if isinstance(rows, datasets.Dataset) else (len(row["input_ids"]) for row in rows)
    )
    for index, length in enumerate(lengths):
        if groups and length <= room:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
            room = max_length
        room -= length
    return PackedRows(rows, groups)


@dataclass(frozen=True)
class PaddingCollator:
    """Pads rows on the right, labels with -100, and makes tensors `[batch, seq]` of them, and of what each token counts.

    ChatGLM-6B needs nothing else: its model reads two-row positions and the bidirectional context off the ids. Where
    rows have pictures, there are `pixel_values` of those that do.
    """

    pad_token_id: int
    by_sample: bool = False
    reader: PictureReader | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "position_ids": 0, "labels": IGNORED}
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor([row[name] + [filler] * (length - len(row[name])) for row in rows])
            for name, filler in padding.items()
            if name in rows[0]
        }
        if self.by_sample:
            weights = [sample_weights(row["labels"], row.get("position_ids", range(length))) for row in rows]
            batch["loss_weights"] = torch.tensor([row + [0.0] * (length - len(row)) for row in weights])
        pictures = [row["image"] for row in rows if row.get("image") is not None]
        if pictures and self.reader is not None:
            batch["pixel_values"] = self.reader.read(pictures)
        return batch


def question_and_answer(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that ask for the last answer of a sample, and those of the answer.

    Raises:
        ValueError: if nothing comes before the answer.
    """
    last = max(index for index, message in enumerate(sample.messages) if message["role"] == "assistant")
    if last == 0:
        raise ValueError(f"{sample.place}: nothing asks for the answer, which is the first message")
    question = tokenizer.apply_chat_template(sample.messages[:last], tools=sample.tools, add_generation_prompt=True)
    both = tokenizer.apply_chat_template(sample.messages[: last + 1], tools=sample.tools)
    return question["input_ids"], both["input_ids"][len(question["input_ids"]) :]


def check_questions(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, num_positions: int) -> None:
    """Find out whether the model can be asked for the last answers.

    Raises:
        ValueError: for a sample without a question, or with one of more tokens than the model has positions.
    """
    for sample in samples:
        question, _ = question_and_answer(sample, tokenizer)
        if len(question) > num_positions:
            raise ValueError(
                f"{sample.place}: {len(question)} tokens come before the last answer, and the model has "
                f"{num_positions} positions"
            )
