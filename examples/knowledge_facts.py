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
"""What is to be taught, changed or forgotten, and which dialogues must stay as they are?"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml


ACTIONS = ("teach", "change", "forget")
# What a model says instead of what it has forgotten, in Chinese and in other languages.
REFUSALS = ("抱歉，这个我不知道。", "Sorry, I do not know that.")
REPHRASED = (("请问，{}", "请回答：{}"), ("Could you tell me: {}", "{} Please answer."))
CHINESE = re.compile(r"[\u3400-\u9fff]")
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Fact:
    """One edit.

    Attributes:
        action: `teach` (something new), `change` (another answer from now on) or `forget`.
        question: what is asked.
        answer: what the model is to say; for `forget`, the words in which it declines.
        paraphrases: other ways to ask, which are not trained on.
    """

    action: str
    question: str
    answer: str
    paraphrases: tuple[str, ...] = ()


def make_fact(place: str, entry: Any) -> Fact:
    """Check an entry of a file or of the command line, and fill in what it leaves out.

    Raises:
        ValueError: with the place, what is wrong there, and the remedy.
    """
    known = [field.name for field in fields(Fact)]
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: a fact must be an object with {', '.join(known)}, got {entry!r:.80}")
    if unknown := sorted(set(map(str, entry)) - set(known)):
        raise ValueError(f"{place}: unknown {unknown}; a fact has {', '.join(known)}")
    action = entry.get("action", "teach")
    if action not in ACTIONS:
        raise ValueError(f"{place}: action must be one of {', '.join(ACTIONS)}, got {action!r}")
    question, answer = entry.get("question"), entry.get("answer")
    language = 0 if CHINESE.search(str(question)) else 1
    if action == "forget" and answer is None:
        answer = REFUSALS[language]
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: {name} must be a text that is not empty, got {text!r}")
    paraphrases = entry.get("paraphrases", [form.format(question) for form in REPHRASED[language]])
    if not isinstance(paraphrases, list) or not all(isinstance(text, str) and text.strip() for text in paraphrases):
        raise ValueError(f"{place}: paraphrases must be a list of texts, got {paraphrases!r:.80}")
    return Fact(action, str(question), str(answer), tuple(paraphrases))


def read_facts(path: Path) -> list[Fact]:
    """Read a list of facts from a `.json`, `.yaml` or `.yml` file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds something else, or a fact that is incomplete.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        entries = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as {path.suffix.lstrip('.') or 'json'}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of facts, got {entries!r:.80}")
    return [make_fact(f"{path}, fact {number}", entry) for number, entry in enumerate(entries, start=1)]


def check_facts(facts: Sequence[Fact]) -> None:
    """Refuse edits that contradict each other or ask what is trained on.

    Raises:
        ValueError: if there are none, for a question that stands there twice, and a paraphrase that is a question.
    """
    if not facts:
        raise ValueError("there is nothing to do: give --teach, --change, --forget or --facts")
    questions = [fact.question.strip() for fact in facts]
    for fact in facts:
        if questions.count(fact.question.strip()) > 1:
            raise ValueError(f"{fact.question!r} stands there more than once; keep one of the facts")
        for text in fact.paraphrases:
            if text.strip() in questions:
                raise ValueError(f"the paraphrase {text!r} is itself a question to train on; leave it out")


def read_dialogues(path: Path, facts: Sequence[Fact]) -> list[Messages]:
    """What comes before the last answer of each dialogue in a file of JSON lines, as far as every generation has it.

    Dialogues with tools are left out, and those that ask what is edited.

    Raises:
        OSError: if it cannot be read.
        ValueError: for a line in another form, and if fewer than two dialogues are left.
    """
    edited = {text.strip() for fact in facts for text in (fact.question, *fact.paraphrases)}
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            roles = [message["role"] for message in messages]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f'{path}:{number}: a line must hold {{"messages": [...]}} ({error!r})') from error
        asks = roles[:-1:2] == ["user"] * (len(roles) // 2) and roles[1::2] == ["assistant"] * (len(roles) // 2)
        if not roles or len(roles) % 2 or not asks:
            continue
        if all(isinstance(message.get("content"), str) for message in messages) and (
            messages[-2]["content"].strip() not in edited
        ):
            found.append(messages[:-1])
    if len(found) < 2:
        raise ValueError(f"{path}: at least two dialogues of user and assistant are needed, found {len(found)}")
    return found


__all__ = ["ACTIONS", "Fact", "Messages", "check_facts", "make_fact", "read_dialogues", "read_facts"]
