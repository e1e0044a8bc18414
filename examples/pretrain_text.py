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
"""The bilingual text that `pretrain.py` learns from where no other is given, and questions on it.

A document tells one event in English and in Chinese, in either order: who did what, with how many of what, where and when.
Each language can be told from the other, so a blank has one answer, which stands before it or behind it. Some documents
say what came of it, for two of the six verbs alone. `python examples/pretrain_text.py FOLDER` writes a task with two
classes for `finetune_cloze.py`, which is about the other four verbs.
"""

import io
import json
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceTrainer


# English and Chinese of everything that varies.
WORDS: dict[str, list[tuple[str, str]]] = {
    "name": [
        ("Anna", "安娜"),
        ("Tom", "汤姆"),
        ("Mary", "玛丽"),
        ("Jack", "杰克"),
        ("Lucy", "露西"),
        ("Peter", "彼得"),
        ("Alice", "爱丽丝"),
        ("David", "大卫"),
        ("Linda", "琳达"),
        ("Frank", "弗兰克"),
    ],
    "number": [
        ("two", "两"),
        ("three", "三"),
        ("four", "四"),
        ("five", "五"),
        ("six", "六"),
        ("seven", "七"),
        ("eight", "八"),
        ("nine", "九"),
    ],
    "colour": [
        ("red", "红色"),
        ("green", "绿色"),
        ("blue", "蓝色"),
        ("yellow", "黄色"),
        ("black", "黑色"),
        ("white", "白色"),
    ],
    "thing": [
        ("cups", "杯子"),
        ("boxes", "箱子"),
        ("balls", "球"),
        ("hats", "帽子"),
        ("bags", "包"),
        ("clocks", "钟"),
        ("lamps", "灯"),
        ("toys", "玩具"),
        ("chairs", "椅子"),
        ("plates", "盘子"),
    ],
    "city": [
        ("Paris", "巴黎"),
        ("London", "伦敦"),
        ("Beijing", "北京"),
        ("Tokyo", "东京"),
        ("Rome", "罗马"),
        ("Berlin", "柏林"),
        ("Madrid", "马德里"),
        ("Shanghai", "上海"),
    ],
    "day": [
        ("Monday", "周一"),
        ("Tuesday", "周二"),
        ("Wednesday", "周三"),
        ("Thursday", "周四"),
        ("Friday", "周五"),
        ("Saturday", "周六"),
    ],
}


class Verb(NamedTuple):
    """What is done, in English and Chinese, and whether there are more afterwards."""

    words: tuple[str, str]
    brings_more: bool


# The outcome of the first two is told in some documents.
VERBS = [
    Verb(("bought", "买了"), True),
    Verb(("sold", "卖了"), False),
    Verb(("found", "找到了"), True),
    Verb(("lost", "丢了"), False),
    Verb(("got", "得到了"), True),
    Verb(("gave", "送出了"), False),
]
NUM_TOLD_VERBS = 2
OUTCOMES = {True: ("more", "多"), False: ("fewer", "少")}
ENGLISH = "On {day} {name} {verb} {number} {colour} {thing} in {city}."
CHINESE = "{day}{name}在{city}{verb}{number}个{colour}的{thing}。"
OUTCOME_PATTERNS = ("Now there are {}.", "现在{}了。")
# One event in this many is held out.
HELD_OUT = 20
# Of the bundled grammar's text; the nine control tokens come on top.
NUM_PIECES = 300


class Event(NamedTuple):
    """What is told: for each slot an index into its words, the verb, and the order of the two languages."""

    choices: dict[str, int]
    verb: int
    is_chinese_first: bool
    tells_outcome: bool

    @property
    def is_held_out(self) -> bool:
        """Whether this event is for questions; it does not depend on the order of the languages."""
        return zlib.crc32(repr((sorted(self.choices.items()), self.verb)).encode()) % HELD_OUT == 0

    def slots(self, language: int, blank: str | None = None, mask: str = "[MASK]") -> dict[str, str]:
        """The words of a language, 0 for English, with a mask in the place of one of them."""
        words = {slot: WORDS[slot][index][language] for slot, index in self.choices.items()}
        words["verb"] = VERBS[self.verb].words[language]
        return words | ({blank: mask} if blank else {})

    def write(self, blank: str | None = None, blank_language: int = 0) -> str:
        """The document, perhaps with a blank in one of its languages."""
        sentences = [
            pattern.format(**self.slots(language, blank if language == blank_language else None))
            for language, pattern in enumerate((ENGLISH, CHINESE))
        ]
        order = (1, 0) if self.is_chinese_first else (0, 1)
        text = " ".join(sentences[language] for language in order)
        if self.tells_outcome:
            outcome = OUTCOMES[VERBS[self.verb].brings_more]
            text += " " + " ".join(OUTCOME_PATTERNS[language].format(outcome[language]) for language in order)
        return text


def draw_event(rng: random.Random) -> Event:
    """Any event."""
    choices = {slot: rng.randrange(len(words)) for slot, words in WORDS.items()}
    verb = rng.randrange(len(VERBS))
    return Event(choices, verb, rng.random() < 0.5, verb < NUM_TOLD_VERBS and rng.random() < 0.5)


def make_documents(seed: int) -> Iterator[dict[str, str]]:
    """Documents without end, as rows; those held out are not among them."""
    rng = random.Random(seed)
    while True:
        event = draw_event(rng)
        if not event.is_held_out:
            yield {"text": event.write()}


class Question(NamedTuple):
    """A text with one `[MASK]`, the answer, and whether the same is told before the blank already."""

    text: str
    answer: str
    is_second: bool


def make_questions(count: int, seed: int = 0) -> list[Question]:
    """Held-out events with one word left out."""
    rng = random.Random(f"questions {seed}")
    questions: list[Question] = []
    while len(questions) < count:
        event = draw_event(rng)._replace(tells_outcome=False)
        if event.is_held_out:
            slot, language = rng.choice([*WORDS, "verb"]), rng.randrange(2)
            answer = event.slots(language)[slot]
            questions.append(Question(event.write(slot, language), answer, language == (not event.is_chinese_first)))
    return questions


def make_task(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of the two-class task: whether there are more or fewer afterwards, for verbs that were never told."""
    rng = random.Random(f"task {seed}")
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        event = draw_event(rng)
        if event.verb >= NUM_TOLD_VERBS:
            label = "more" if VERBS[event.verb].brings_more else "fewer"
            rows.append({"text": event.write(), "label": label})
    return rows


def train_vocabulary(folder: Path) -> None:
    """Train a SentencePiece model on the text and write it with its files, as those of GLM-10B-Chinese are laid out."""
    documents, model = make_documents(seed=0), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(next(documents)["text"] for _ in range(4000)),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        # Chinese words have no spaces around them, and would be joined with their neighbours.
        user_defined_symbols=sorted(
            {word for words in WORDS.values() for _, word in words} | {verb.words[1] for verb in VERBS}
        ),
        num_threads=1,
        minloglevel=1,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cog-pretrain.model").write_bytes(model.getvalue())
    name = "GLMChineseTokenizer"
    config = {"tokenizer_class": name, "auto_map": {"AutoTokenizer": [f"tokenization_glm.{name}", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Write the two-class task: 1,000 samples to learn from, and 500 to measure the accuracy on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 1000, 0), ("eval", 500, 1)):
        lines = [json.dumps(row, ensure_ascii=False) for row in make_task(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))


__all__ = ["Question", "make_documents", "make_questions", "make_task", "train_vocabulary"]
