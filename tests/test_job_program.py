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
"""Programs that do jobs in another environment, with one that needs none: `job_program.py`."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import job_program
import pytest


# Like the real ones, it stands beside the file that it imports.
PROGRAM = """
import os
import sys

from job_program import run_jobs

cleaned = []


def run(job):
    if "exit" in job:
        sys.exit(job["exit"])
    quotient = 12 // job["by"]
    return [quotient, len(cleaned), os.getcwd(), os.environ["MOOD"], os.environ["HF_MODULES_CACHE"]]


if __name__ == "__main__":
    run_jobs(run, lambda: cleaned.append(1))
"""


def results_of(place: Path, jobs: dict[str, Any], **options: Any) -> dict[str, Any]:
    shutil.copy(job_program.__file__, place)
    program = place / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    return job_program.results_of([Path(sys.executable), program], jobs, place, {"MOOD": "好"}, **options)


def test_results_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of jobs that fail, too; what is cleaned up is cleaned up after each."""
    monkeypatch.setenv("MOOD", "replaced")
    jobs = {"first": {"by": 3}, "fails": {"by": 0}, "再": {"by": 4}}
    told = ["好", str(tmp_path / "modules")]
    results = results_of(tmp_path, jobs)
    assert results["first"] == [4, 0, os.getcwd(), *told]
    assert results["fails"].keys() == {"error"} and results["fails"]["error"].startswith("ZeroDivisionError: ")
    assert results["再"] == [3, 2, os.getcwd(), *told]
    results = results_of(tmp_path, {"elsewhere": {"by": 1}}, cwd=tmp_path)
    assert results == {"elsewhere": [12, 0, str(tmp_path), *told]}


def test_a_program_that_ends_early(tmp_path: Path) -> None:
    """It has no results, and says why."""
    with pytest.raises(AssertionError, match="no such engine"):
        results_of(tmp_path, {"first": {"by": 3}, "ends": {"exit": "no such engine"}})
