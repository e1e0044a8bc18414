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
"""How does a file of conversations become rows to train on, and batches of them?

A file has one JSON object in a line, in one of these forms:

- `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "tools": [...]}`, where
  `conversations` is another name for `messages`; tools may also stand in the system message. Calls and their results
  are written as the published checkpoints were taught (`metadata`, role `observation`), as OpenAI's interface has them,
  or as the published fine-tuning example of ChatGLM3 has them:
  `{"role": "tool", "name": ..., "parameters": {...}, "observation": ...}`;
- `{"prompt": ..., "response": ..., "history": [[question, answer], ...]}`, under any names. The history may be left out.

Only what the assistant writes is learnt; the chat template of the tokenizer knows which tokens that are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase


Row = dict[str, list[int]]


@dataclass
class DataArguments:
    """What to train on."""

    train_file: str = field(metadata={"help": "JSON lines to train on; see the top of finetune_data.py"})
    eval_file: str | None = field(default=None, metadata={"help": "JSON lines to evaluate on"})
    prompt_column: str = field(
        default="prompt", metadata={"help": "the key of the question in files without messages"}
    )
    response_column: str = field(default="response", metadata={"help": "the key of the answer"})
    history_column: str = field(default="history", metadata={"help": "the key of earlier (question, answer) pairs"})
    max_length: int = field(default=1024, metadata={"help": "tokens of a sample at most"})
    too_long: Literal["truncate", "refuse"] = field(
        default="truncate", metadata={"help": "what to do with longer ones"}
    )
    packing: bool = field(default=False, metadata={"help": "several samples in a row, up to max_length tokens"})


@dataclass(frozen=True)
class Sample:
    """One conversation, and where it was read."""

    place: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_samples(path: str, arguments: DataArguments) -> list[Sample]:
    """Read a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds no samples, or one in none of the known forms; with the file and the line.
    """
    samples = []
    for place, record in _read_records(Path(path)):
        messages = record.get("messages", record.get("conversations"))
        if messages is None:
            messages = _messages_of_columns(place, record, arguments)
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{place}: the conversation must be a list of messages (objects), got {messages!r:.80}")
        messages = [part for message in messages for part in _split_tool_entry(place, message)]
        if any(_is_empty_answer(message) for message in messages):
            raise ValueError(
                f"{place}: an answer is empty, which would teach the model to say nothing; leave it out with its question"
            )
        samples.append(Sample(place, messages, record.get("tools")))
    if not samples:
        raise ValueError(f"{path} holds no samples")
    return samples


def _read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: this line is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{place}: a line must hold a JSON object, got {type(record).__name__}")
            yield place, record


def _messages_of_columns(place: str, record: Mapping[str, Any], arguments: DataArguments) -> list[dict[str, Any]]:
    columns = (arguments.prompt_column, arguments.response_column)
    if missing := [name for name in columns if name not in record]:
        raise ValueError(
            f"{place}: there is neither `messages` nor `conversations`, and of the columns {columns} "
            f"{missing} are missing; found {sorted(record)}. Set prompt_column and response_column."
        )
    for name in columns:
        if not isinstance(record[name], str):
            raise ValueError(f"{place}: the column {name!r} must hold text, got {record[name]!r}")
    history = record.get(arguments.history_column) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"{place}: {arguments.history_column!r} must hold [question, answer] pairs, got {history!r}")
    pairs = [*history, [record[name] for name in columns]]
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def _split_tool_entry(place: str, message: dict[str, Any]) -> list[dict[str, Any]]:
    """A call and its result stand in one entry of ChatGLM3's published fine-tuning example."""
    if message.get("role") != "tool" or "observation" not in message:
        return [message]
    if not isinstance(message.get("name"), str):
        raise ValueError(f"{place}: a `tool` entry with an `observation` needs the `name` of the tool, got {message}")
    call = {"name": message["name"], "arguments": message.get("parameters") or {}}
    result = message["observation"]
    result = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "observation", "content": result},
    ]


def _is_empty_answer(message: dict[str, Any]) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    is_empty = not content or (isinstance(content, str) and not content.strip())
    is_call = message.get("tool_calls") or message.get("metadata")
    return message.get("role") == "assistant" and is_empty and not is_call


def encode_samples(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments
) -> tuple[list[Row], int]:
    """Encode samples in the conversation format of the tokenizer's generation.

    Returns:
        A row for each, with `input_ids`, `attention_mask` and `labels` (-100 where nothing is learnt), and how many of
        them were truncated.

    Raises:
        ValueError: for a sample that has no form in this generation, one that is too long if those are refused, and one
            without anything to learn.
    """
    rows, num_truncated = [], 0
    limit = arguments.max_length
    for sample in samples:
        template = {"tools": sample.tools, "return_assistant_tokens_mask": True, "return_dict": True}
        try:
            encoded = tokenizer.apply_chat_template(sample.messages, **template)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{sample.place}: {error}") from error
        length = len(encoded["input_ids"])
        if length > limit:
            if arguments.too_long == "refuse":
                raise ValueError(f"{sample.place}: {length} tokens are more than max_length={limit}")
            encoded = tokenizer.apply_chat_template(sample.messages, **template, truncation=True, max_length=limit)
            num_truncated += 1
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        # The first token has no prediction.
        if not any(mask[1:]):
            reason = f"max_length={limit} cuts off the whole answer" if length > limit else "there is no answer"
            raise ValueError(f"{sample.place}: nothing to learn, since {reason} ({length} tokens)")
        labels = [token if is_answer else -100 for token, is_answer in zip(ids, mask)]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows, num_truncated


def pack_rows(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Join rows, in order, into rows of at most `max_length` tokens.

    Positions start again with every sample, and there is no attention mask: this is how the models' mask tells samples
    apart. Nothing is learnt at the first token of a sample (the prefix of the template), so none predicts the next.
    """
    packed: list[Row] = []
    for row in rows:
        length = len(row["input_ids"])
        if not packed or len(packed[-1]["input_ids"]) + length > max_length:
            packed.append({"input_ids": [], "position_ids": [], "labels": []})
        packed[-1]["input_ids"] += row["input_ids"]
        packed[-1]["position_ids"] += range(length)
        packed[-1]["labels"] += row["labels"]
    return packed


@dataclass(frozen=True)
class PaddingCollator:
    """Pads rows on the right, labels with -100, and makes tensors `[batch, seq]` of them.

    ChatGLM-6B needs nothing else: its model reads two-row positions and the bidirectional context off the ids.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        padding = {"input_ids": self.pad_token_id, "attention_mask": 0, "position_ids": 0, "labels": -100}
        length = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([row[name] + [padding[name]] * (length - len(row[name])) for row in rows])
            for name in rows[0]
        }


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
