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
"""Programs that do jobs for tests in an environment of their own: `PYTHON PROGRAM JOBS OUT`.

JOBS is a file with a JSON object of jobs by name, OUT the file for what comes of each. To start an engine takes longer than
the work, so all jobs share a process. Tests start a program with `results_of`, and it calls `run_jobs`: this file is
imported in both environments, so it imports nothing but the standard library.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def run_jobs(run: Callable[[dict[str, Any]], Any], clean_up: Callable[[], None] = lambda: None) -> None:
    """All that a program does: the jobs of its command line. One that fails gives `{"error": "TypeOfError: message"}`.

    Args:
        run: gives the result of a job, as JSON has it.
        clean_up: called after each job, also after one that failed.
    """
    jobs, out = (Path(name) for name in sys.argv[1:])
    results = {}
    for name, job in json.loads(jobs.read_text("utf-8")).items():
        try:
            results[name] = run(job)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        clean_up()
    out.write_text(json.dumps(results), encoding="utf-8")


def results_of(
    command: list[Path], jobs: dict[str, Any], place: Path, environment: dict[str, str], cwd: Path | None = None
) -> dict[str, Any]:
    """What a program makes of jobs. What it prints is shown where it fails.

    Args:
        command: Python of the other environment, and the program.
        jobs: by name.
        place: a folder for the files of jobs and results, and for the code of models.
        environment: variables beside those of this process, and in place of them.
        cwd: where the program runs; as this process by default.
    """
    jobs_file, results_file = place / "jobs.json", place / "results.json"
    jobs_file.write_text(json.dumps(jobs), encoding="utf-8")
    variables = {**os.environ, "HF_MODULES_CACHE": str(place / "modules"), **environment}
    words = [str(word) for word in (*command, jobs_file, results_file)]
    done = subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(results_file.read_text("utf-8")))
