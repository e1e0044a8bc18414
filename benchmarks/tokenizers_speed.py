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
"""Characters a second that the tokenizers encode, beside `sentencepiece` and (where it is installed) `tiktoken`.

Processor time of one thread, on the pages of `docs/` and the code of this repository without the names of control
tokens. What is compared takes turns; the ratio is the median over the rounds. As tokenizers and packages get things ready
when they are needed first, `--warmup` characters come before. Without `--folders`, the vocabulary of the bundled
checkpoint is taken, which is small: it shows that the benchmark works.
"""

import os


# Before the libraries read them.
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import argparse  # noqa: E402
import base64  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from sentencepiece import SentencePieceProcessor  # noqa: E402
from slices import REPOSITORY, load_module  # noqa: E402
from timing import print_table, write_report  # noqa: E402


BUNDLED = REPOSITORY / "examples" / "tiny-chatglm3"
CONTROL_TOKENS = re.compile(r"<\|?\w+\|?>|\[\w+\]|</s>|sop|eop")
LINE = 200

# Encodes texts in a batch, or one by one.
Encode = Callable[[Sequence[str], bool], Any]


def read_texts(characters: int) -> dict[str, str]:
    """English with some Chinese, and code."""
    pages = {"docs": sorted((REPOSITORY / "docs").glob("*.md")), "code": sorted(REPOSITORY.glob("*.py"))}
    pages["docs"].append(REPOSITORY / "README_zh.md")
    return {
        name: CONTROL_TOKENS.sub("", "\n".join(file.read_text(encoding="utf-8") for file in files))[:characters]
        for name, files in pages.items()
    }


def find_encoders(folder: Path) -> dict[str, Encode]:
    """The tokenizer of a folder, and the package that the published one uses."""
    module = load_module("tokenization_chatglm")
    file = next(file for name in ("ice_text.model", "tokenizer.model") if (file := folder / name).is_file())
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        tokenizer = module.ChatGLM4Tokenizer(str(file))
        return {"ours": encode_by(tokenizer), **find_tiktoken(file)}
    tokenizer = module.ChatGLMTokenizer.from_pretrained(folder)
    # Its batches start threads.
    return {"ours": encode_by(tokenizer), "sentencepiece": lambda texts, singly: [model.encode(t) for t in texts]}


def encode_by(tokenizer: Any) -> Encode:
    return lambda texts, singly: [tokenizer(text) for text in texts] if singly else tokenizer(texts)


def find_tiktoken(file: Path) -> dict[str, Encode]:
    try:
        from tiktoken import Encoding
    except ImportError:
        return {}
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in file.read_bytes().splitlines()}
    pattern = load_module("tokenization_vocabulary").GLM4_PATTERN
    encoding = Encoding("glm4", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return {"tiktoken": lambda texts, singly: [encoding.encode_ordinary(text) for text in texts]}


def compare(encoders: dict[str, Encode], texts: Sequence[str], singly: bool, rounds: int) -> dict[str, float]:
    """Million characters a second of each, and how many times as fast ours is as the other, if there is one."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.process_time()
            encode(texts, singly)
            seconds[name].append(time.process_time() - start)
    millions = sum(map(len, texts)) / 1e6
    speeds = {name: millions / statistics.median(values) for name, values in seconds.items()}
    others = [values for name, values in seconds.items() if name != "ours"]
    ratios = [other / ours for ours, other in zip(seconds["ours"], others[0])] if others else []
    return speeds | ({"ratio": statistics.median(ratios)} if ratios else {})


def describe(figures: dict[str, float]) -> list[str]:
    return [f"{value:.2f}" if name in ("ours", "ratio") else f"{name} {value:.2f}" for name, value in figures.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folders", type=Path, nargs="+", default=[BUNDLED], help="folders with published vocabularies"
    )
    parser.add_argument("--characters", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1_500_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, report = [], []
    for folder in arguments.folders:
        encoders = find_encoders(folder)
        kinds = read_texts(arguments.characters)
        for _ in range(-(-arguments.warmup // sum(map(len, kinds.values())))):
            for encode in encoders.values():
                encode(list(kinds.values()), False)
        for kind, text in kinds.items():
            lines = [text[start : start + LINE] for start in range(0, len(text), LINE)]
            for form, texts, singly in (("one text", [text], False), ("batch", lines, False), ("singly", lines, True)):
                figures = compare(encoders, texts, singly, arguments.rounds)
                report.append({"folder": folder.name, "text": kind, "form": form, **figures})
                rows.append([folder.name, kind, form, *describe(figures)])
    header = ["folder", "text", "form", "ours", "package", "ratio"]
    print_table("Million characters a second", header, [(row + ["", ""])[: len(header)] for row in rows])
    write_report(arguments.json, {"settings": vars(arguments), "speeds": report})


if __name__ == "__main__":
    main()
