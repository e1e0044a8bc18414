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
"""What tests of other processes share: a free port, waiting for something, and two processes that work together."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(is_so: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something that is bound to happen; the time is there for what never does."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail(f"did not happen within {seconds} seconds")
        time.sleep(0.02)


def run_in_two_processes(
    script: Path, *words: str | Path, launcher: tuple[str, ...] = TORCHRUN, seconds: float = 240
) -> str:
    """Run a script with two processes of one thread each, without GPUs; what it printed.

    The launcher, a module with its options, runs in the repository, from where shipped settings name each other.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # DeepSpeed compiles with the `ninja` of this environment.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    run = subprocess.run(
        [sys.executable, "-m", *launcher, script, *words],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        encoding="utf-8",
        timeout=seconds,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
