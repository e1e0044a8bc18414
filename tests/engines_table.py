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
"""What `make test-engines` came to: a row for each test, a column for each generation (`--table=docs/engines.md`).

A test that shows a refusal says so with pytest's own `record_property("refused", message)`, and one of another result, by
design or by mistake of the engine, with `record_property("differs", reason)`.
"""

import platform
import re
import sys
import time
from collections import Counter, defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from results_page import ResultsPage


REPOSITORY = Path(__file__).resolve().parent.parent
# How names of recorded checkpoints and of generations begin. The first that fits counts.
COLUMNS = {
    "glm4v": "GLM-4V",
    "glm4": "GLM-4",
    "chatglm3": "ChatGLM3",
    "chatglm2": "ChatGLM2",
    "chatglm": "ChatGLM-6B",
    "": "others",
}
ORDER = ("ChatGLM-6B", "ChatGLM2", "ChatGLM3", "GLM-4", "GLM-4V", "others")
# Parameters of tests that are a door of their own.
DOORS = ("method", "program", "kind")
# Where the programs are installed, from which files of requirements; what is not there was skipped.
ENVIRONMENTS = {
    ".venv-engines": ("engines.txt", "gptqmodel.txt"),
    ".venv-vllm": ("vllm.txt",),
    ".venv-swift": ("swift.txt",),
}


def column_of(parameters: dict[str, Any]) -> str:
    """The generation of a test, by whichever of its parameters begins with the name of one."""
    words = [value for value in parameters.values() if isinstance(value, str)]
    begins = (begin for word in words for begin in COLUMNS if begin and word.startswith(begin))
    return COLUMNS[next(begins, "")]


def row_of(item: pytest.Item) -> tuple[str, str, str]:
    """The file of a test, its name, and the door that its parameters name."""
    call = getattr(item, "callspec", None)
    parameters = call.params if call is not None else {}
    doors = [str(value) for name, value in parameters.items() if name in DOORS]
    return item.path.name, getattr(item, "originalname", item.name), ", ".join(doors)


class EnginesTable(ResultsPage):
    """Collects what becomes of each test, and how long it took."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "make test-engines")
        self.start = time.monotonic()
        self.places: dict[str, tuple[tuple[str, str, str], str]] = {}
        self.seconds: Counter[tuple[str, str, str]] = Counter()
        self.outcomes: dict[tuple[tuple[str, str, str], str], Counter[str]] = defaultdict(Counter)
        self.notes: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            call = getattr(item, "callspec", None)
            self.places[item.nodeid] = row_of(item), column_of(call.params if call is not None else {})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row, column = self.places[report.nodeid]
        self.seconds[row] += report.duration
        if report.when != "call" and report.passed:
            return
        outcome = report.outcome
        if report.skipped:
            outcome = f"skipped ({self.note(report.longrepr[2].removeprefix('Skipped: '))})"
        elif report.passed and report.user_properties:
            word, text = report.user_properties[0]
            outcome = f"{word} ({self.note(str(text))})"
        self.outcomes[row, column][outcome] += 1

    def note(self, text: str) -> int:
        """The number under which a message or a reason stands below the tables."""
        text = " ".join(text.split()).replace(f"{REPOSITORY}/", "").replace("|", "\\|")
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1

    def cell(self, row: tuple[str, str, str], column: str) -> str:
        counts = self.outcomes[row, column]
        return ", ".join(outcome if count == 1 else f"{count} {outcome}" for outcome, count in counts.items())

    def tables(self) -> str:
        took = time.monotonic() - self.start
        lines = [
            f"{sum(counts.total() for counts in self.outcomes.values())} tests in {took / 60:.0f} minutes, "
            f"one after another, Python {platform.python_version()} on {platform.system()} ({platform.machine()}).",
            "",
            "| environment | programs |",
            "|---|---|",
            *(f"| `{name}` | {', '.join(versions(name))} |" for name in ENVIRONMENTS if (REPOSITORY / name).is_dir()),
        ]
        rows = list(dict.fromkeys(row for row, _ in self.places.values()))
        for file in dict.fromkeys(row[0] for row in rows):
            of_file = [row for row in rows if row[0] == file]
            minutes = sum(self.seconds[row] for row in of_file) / 60
            lines += ["", f"`{file}`, {minutes:.1f} minutes:", ""]
            lines += [f"| test | {' | '.join(ORDER)} | seconds |", "|---" * (len(ORDER) + 2) + "|"]
            for row in of_file:
                name = f"`{row[1]}`" + f", {row[2]}" * bool(row[2])
                cells = [name, *(self.cell(row, column) for column in ORDER), f"{self.seconds[row]:.1f}"]
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"{number}. {text}" for number, text in enumerate(self.notes, start=1)), ""]
        return "\n".join(lines)


def programs(requirements: Path) -> list[str]:
    """The packages that stand first in a file of requirements, in front of those that they need."""
    text = requirements.read_text(encoding="utf-8").partition("# Needed by")[0]
    others = re.findall(r"^-r (.+)$", text, flags=re.MULTILINE)
    names = [name for other in others for name in programs(requirements.with_name(other))]
    return names + re.findall(r"^([\w.-]+)[^=\n]*==", text, flags=re.MULTILINE)


def versions(environment: str) -> list[str]:
    """What an environment is for, and what that runs on, with the versions that are installed."""
    names = [name for file in ENVIRONMENTS[environment] for name in programs(REPOSITORY / "requirements" / file)]
    packages = [*(REPOSITORY / environment).glob("lib/python*/site-packages")]
    found = []
    for name in dict.fromkeys([*names, "torch", "transformers"]):
        # Its own, or that of the newest environment behind it.
        places = [str(place) for place in packages] + sys.path
        distribution = next(iter(metadata.distributions(name=name, path=places)), None)
        found.append(f"{name} {distribution.version if distribution else '(not installed)'}")
    return found


__all__ = ["EnginesTable"]
