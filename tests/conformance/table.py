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
"""What a run of the library's tests came to, as the tables of `docs/conformance.md` (`--table FILE`)."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from results_page import ResultsPage


SUFFIX = "ConformanceTest"


class Results(ResultsPage):
    """Counts what becomes of each test, by its class."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "make conformance")
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.deviations: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.skips: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Subtests report for themselves; what counts is the whole.
        if type(report) is not pytest.TestReport or (report.when != "call" and report.passed):
            return
        name, test = report.nodeid.split("::")[-2:]
        name = name.removesuffix(SUFFIX)
        reason = getattr(report, "wasxfail", None)
        outcome = "deviates" if reason is not None else report.outcome
        self.outcomes[name][outcome] += 1
        if reason is not None:
            self.deviations[test, reason].append(name)
        elif report.skipped:
            text = report.longrepr[2].removeprefix("Skipped: ")
            self.skips[neutral(text)][name] += 1

    def tables(self) -> str:
        lines = [f"Transformers {transformers.__version__}, torch {torch.__version__}, on a CPU.", ""]
        lines += ["| tests of | passed | failed | deviate | skipped |", "|---|---|---|---|---|"]
        for name, counts in self.outcomes.items():
            counted = (counts[outcome] for outcome in ("passed", "failed", "deviates", "skipped"))
            lines.append(f"| {name} | {' | '.join(map(str, counted))} |")
        lines += ["", "| deviation | reason | of |", "|---|---|---|"]
        lines += [f"| `{test}` | {why} | {', '.join(names)} |" for (test, why), names in self.deviations.items()]
        lines += ["", "| tests were skipped because | ours | NativeGlm |", "|---|---|---|"]
        for reason, counts in sorted(self.skips.items()):
            native = counts["NativeGlm"]
            lines.append(f"| {reason} | {counts.total() - native} | {native} |")
        return "\n".join([*lines, ""])


def neutral(reason: str) -> str:
    """A reason without the names of the classes that it was given for."""
    reason = re.sub(
        r"<class '[^']*'>|\b(ChatGLM|GLM|Glm)\w*(Model|LM|Generation|Classification)\b", "the class", reason
    )
    return reason.rstrip(".").replace("|", "\\|")
