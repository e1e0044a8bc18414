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
"""Trains the small ChatGLM3 checkpoint of this folder, `tiny-chatglm3`, from the dialogues in `dialogues.jsonl`.

`python examples/train_tiny.py` takes some 20 minutes on one core: it trains a SentencePiece model on the text, then the
model on the dialogues, saves the folder as the published checkpoints are laid out, and checks that the model answers
every dialogue as it was taught. It shows fine-tuning from beginning to end with the public interface: messages go
through `apply_chat_template`, which also tells which tokens the assistant writes.

`dialogues.jsonl` has one dialogue in a line. Those with `"first": true` make sense at the beginning of a conversation
only ("What is my name?" before the name was told); the others are joined into longer conversations at random, so that
the model answers in any turn.
"""

import argparse
import io
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from local_code import REPOSITORY, register
from sentencepiece import SentencePieceTrainer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging


EXAMPLES = Path(__file__).resolve().parent
NUM_PIECES = 1600
# Together with the pieces and the nine control tokens.
VOCAB_SIZE = 1632
TOKENS_PER_BATCH = 512
MAX_MESSAGES = 10
# What is copied from a question or from the result of a tool.
CITY = re.compile(r"(?<=city=')[^']+")
CONDITION = re.compile(r'(?<="condition": ")[^"]+')

Message = dict[str, Any]


def read_dialogues(path: Path) -> list[dict[str, Any]]:
    """The dialogues of a file: dicts with `messages` and perhaps `first`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_vocabulary(dialogues: list[dict[str, Any]], folder: Path) -> None:
    """Train a SentencePiece model with the settings of ChatGLM3-6B's and write it with its configuration file."""
    texts = []
    for message in (message for dialogue in dialogues for message in dialogue["messages"]):
        tools = json.dumps(message["tools"], indent=4, ensure_ascii=False) if "tools" in message else ""
        texts += f"{message['content']}\n{tools}\n{message.get('metadata', '')}".splitlines()
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=1,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "model_version": "chatglm3",
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model with the configuration of ChatGLM3-6B, except for the sizes."""
    config = AutoConfig.from_pretrained(
        REPOSITORY,
        num_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        kv_channels=32,
        ffn_hidden_size=384,
        padded_vocab_size=VOCAB_SIZE,
        seq_length=1024,
    )
    model = AutoModel.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.stop_token_ids(), pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


class Variation:
    """Writes dialogues as they might also have been, with what other dialogues hold.

    Questions lose their capitals and punctuation marks; numbers, cities and the weather change, so that they are copied
    instead of known; tools are offered in any order, in any description that some dialogue has, and in vain.
    """

    def __init__(self, dialogues: list[dict[str, Any]]) -> None:
        self.tools: dict[str, list[dict[str, Any]]] = {}
        self.prompts: list[str] = []
        # Dicts keep the order of the file, which a set would change from run to run.
        cities: dict[str, None] = {}
        conditions: dict[str, None] = {}
        for message in (message for dialogue in dialogues for message in dialogue["messages"]):
            cities |= dict.fromkeys(CITY.findall(message["content"]))
            conditions |= dict.fromkeys(CONDITION.findall(message["content"]))
            self.prompts += [message["content"]] if "tools" in message else []
            for tool in message.get("tools", ()):
                known = self.tools.setdefault(tool["name"], [])
                known += [tool] if tool not in known else []
        self.cities, self.conditions = list(cities), list(conditions)

    def vary(self, messages: list[Message], rng: random.Random) -> list[Message]:
        """Another form of one dialogue."""
        changes = self._changes(messages, rng)
        # The longest first, as one may hold another.
        pattern = re.compile("|".join(sorted(map(re.escape, changes), key=len, reverse=True)) or r"\b\B")
        is_lower = rng.random() < 0.25
        varied = []
        for message in messages:
            content = pattern.sub(lambda match: changes[match[0]], message["content"])
            if message["role"] == "user" and rng.random() < 0.25:
                content = content.rstrip(".!?。！？")
            if message["role"] == "user" and is_lower and not changes.keys() & set(self.cities):
                content = content.lower()
            message = {**message, "content": content}
            varied.append({**message, "tools": self._offer(message["tools"], rng)} if "tools" in message else message)
        return varied

    def offer_in_vain(self, messages: list[Message], rng: random.Random) -> list[Message]:
        """A conversation that needs no tools, with some."""
        named = rng.choice(list(self.tools.values()))
        return [
            {"role": "system", "content": rng.choice(self.prompts), "tools": self._offer(named[:1], rng)},
            *messages,
        ]

    def _offer(self, needed: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
        names = [name for name in self.tools if rng.random() < 0.5 or name in [tool["name"] for tool in needed]]
        return [rng.choice(self.tools[name]) for name in rng.sample(names, len(names))]

    def _changes(self, messages: list[Message], rng: random.Random) -> dict[str, str]:
        """What stands for what in this form of a dialogue, in all of its messages."""
        text = "\n".join(message["content"] for message in messages)
        changes: dict[str, str] = {}
        # In a dialogue of several turns a number is told and then repeated, so any number does.
        if len(messages) > 3 and rng.random() < 0.6:
            changes |= {number: str(rng.randrange(1, 10 ** rng.randint(1, 5))) for number in re.findall(r"\d+", text)}
        if rng.random() < 0.6:
            for found, known in ((CITY.findall(text), self.cities), (CONDITION.findall(text), self.conditions)):
                for word in dict.fromkeys(found if "tool_call" in text else ()):
                    others = [other for other in known if other.isascii() == word.isascii()]
                    first, second = rng.choices(others, k=2)
                    # Half of one name and half of another are a name that no dialogue has.
                    is_new = known is self.cities and rng.random() < 0.5
                    changes[word] = first[: len(first) // 2 + 1] + second[len(second) // 2 + 1 :] if is_new else first
        return changes


def join_dialogues(dialogues: list[dict[str, Any]], rng: random.Random) -> list[list[Message]]:
    """Make conversations of one or more dialogues; each dialogue is in one of them."""
    variation = Variation(dialogues)
    conversations: list[list[Message]] = []
    for dialogue in rng.sample(dialogues, len(dialogues)):
        messages = variation.vary(dialogue["messages"], rng)
        is_first = dialogue.get("first", False) or messages[0]["role"] == "system"
        previous = rng.choice(conversations) if conversations else []
        is_alone = is_first or not previous or len(previous) + len(messages) > MAX_MESSAGES
        if is_alone or rng.random() < 0.5:
            # Some dialogues that come first are about tools that are not there.
            has_no_tools = is_first or rng.random() < 0.8
            conversations.append(messages if has_no_tools else variation.offer_in_vain(messages, rng))
        else:
            previous.extend(messages)
    return conversations


def batches(
    dialogues: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> Iterator[dict[str, torch.Tensor]]:
    """One pass over the dialogues, in batches of conversations of similar length, in random order."""
    encoded = tokenizer.apply_chat_template(
        join_dialogues(dialogues, rng), return_dict=True, return_assistant_tokens_mask=True
    )
    rows = sorted(zip(encoded["input_ids"], encoded["assistant_masks"]), key=lambda row: len(row[0]))
    groups: list[list[Any]] = [[]]
    for row in rows:
        if (len(groups[-1]) + 1) * len(row[0]) > TOKENS_PER_BATCH and groups[-1]:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    for group in groups:
        yield as_batch(group, tokenizer)


def as_batch(
    rows: Sequence[tuple[list[int], list[int]]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Pad rows of ids, each with the mask of what the assistant writes; only that is learnt."""
    inputs = tokenizer.pad({"input_ids": [ids for ids, _ in rows]}, padding_side="right", return_tensors="pt")
    labels = torch.full_like(inputs["input_ids"], -100)
    for label, (ids, mask) in zip(labels, rows):
        label[: len(ids)] = torch.tensor(ids).where(torch.tensor(mask, dtype=torch.bool), -100)
    return {**inputs, "labels": labels}


def train(
    model: torch.nn.Module,
    epoch_batches: Callable[[random.Random], Iterable[dict[str, torch.Tensor]]],
    num_epochs: int,
    learning_rate: float,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> None:
    """Train with AdamW; the learning rate rises shortly and falls along a cosine.

    Args:
        epoch_batches: makes the batches of an epoch.
        after_epoch: is told the number of an epoch, from 1 on, and its mean loss.
    """
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start = time.perf_counter()
    model.train()
    for epoch in range(num_epochs):
        losses = []
        made = list(epoch_batches(rng))
        for index, batch in enumerate(made):
            progress = (epoch + index / len(made)) / num_epochs
            rate = learning_rate * min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        if epoch % 5 == 4:
            seconds = time.perf_counter() - start
            print(f"epoch {epoch + 1}/{num_epochs}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
        after_epoch(epoch + 1, mean)


def wrong_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]], batch_size: int = 64
) -> list[str]:
    """Ask every question again, after the conversation as it was taught, and describe the answers that differ."""
    taught = [
        (dialogue["messages"][: index - 1], *dialogue["messages"][index - 1 : index + 1])
        for dialogue in dialogues
        for index, message in enumerate(dialogue["messages"])
        if message["role"] == "assistant"
    ]
    wrong = []
    for role in ("user", "observation"):
        asked = [(history, question, answer) for history, question, answer in taught if question["role"] == role]
        for start in range(0, len(asked), batch_size):
            histories, questions, answers = zip(*asked[start : start + batch_size])
            queries = [question["content"] for question in questions]
            _, new_histories = model.batch_chat(
                tokenizer, queries, list(histories), role=role, temperature=0, max_new_tokens=100
            )
            for query, answer, history in zip(queries, answers, new_histories):
                given = {**history[-1], "content": history[-1]["content"].strip()}
                if given != {"metadata": "", **answer}:
                    wrong.append(f"{query!r}: {given} instead of {answer}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=EXAMPLES / "tiny-chatglm3")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    register()
    logging.disable_progress_bar()
    # The matrices are too small for a second thread, and one always adds up in the same order.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dialogues = read_dialogues(EXAMPLES / "dialogues.jsonl")
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_vocabulary(dialogues, arguments.output)
    tokenizer = AutoTokenizer.from_pretrained(arguments.output)
    model = build_model(tokenizer)
    print(f"{len(dialogues)} dialogues, {model.num_parameters():,} parameters", flush=True)
    train(model, partial(batches, dialogues, tokenizer), arguments.epochs, arguments.learning_rate)
    model.to(torch.float16).save_pretrained(arguments.output)
    num_wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModel.from_pretrained(arguments.output, dtype=dtype)
        wrong = wrong_answers(model, tokenizer, dialogues)
        print(f"{len(wrong)} wrong answers in {dtype}", *wrong, sep="\n  ")
        num_wrong += len(wrong)
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
