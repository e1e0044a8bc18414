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
"""What the tests of serving share: servers in threads of this process, and a model that writes what it is told."""

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundled_tools
import pytest
from conftest import REPOSITORY
from waiting import wait_until


pytest.importorskip("fastapi", reason="needs requirements/serving.txt: make test-programs")

sys.path.insert(0, str(REPOSITORY / "examples"))

import uvicorn  # noqa: E402
from serving.answers import AnswerStream  # noqa: E402
from serving.app import build_app  # noqa: E402
from serving.guard import Limits  # noqa: E402
from serving.metrics import Metrics  # noqa: E402
from serving.models import LoadSettings, Models, ServedModel, load_models  # noqa: E402


BUNDLED = REPOSITORY / "examples" / "tiny-chatglm3"
WEATHER = {"type": "function", "function": bundled_tools.WEATHER}


@contextlib.contextmanager
def serving(
    models: Models, metrics: Metrics, limits: Limits | None = None, keys: tuple[str, ...] = ()
) -> Iterator[str]:
    """Serve models from a thread; gives the URL. At the end the engines have stopped."""
    app = build_app(models, metrics, limits or Limits(), keys)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=30))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def serving_folder(folder: Path, limits: Limits | None = None, **settings: Any) -> Iterator[tuple[str, Models]]:
    """Load a folder in float32 and serve it; gives the URL and the models."""
    metrics = Metrics()
    limits = limits or Limits()
    models = load_models(
        LoadSettings(**{"folder": folder, "dtype": "float32", "device": "cpu", "cache_tokens": 2048, **settings}),
        metrics,
        longest_prompt=limits.prompt_tokens,
        seconds=limits.seconds,
    )
    with serving(models, metrics, limits) as url:
        yield url, models


class ScriptedEngine:
    """Answers every request with `ids`, one at a time; without ids it never ends."""

    max_tokens = 4096

    def __init__(self) -> None:
        self.ids: list[int] | None = []
        self.prompts: list[list[int]] = []
        self.num_cancelled = 0

    def start(self, answer: AnswerStream) -> None:
        self.prompts.append(answer.prompt_ids)
        answer.stop_generating = self._count
        for index in self.ids or ():
            answer.loop.call_soon(answer.put, [index])
        if self.ids is not None:
            answer.loop.call_soon(answer.end)

    def _count(self) -> None:
        self.num_cancelled += 1

    def stop(self) -> None:
        """There is no thread."""


def scripted(model: Any, tokenizer: Any, metrics: Metrics, **limits: Any) -> tuple[Models, ScriptedEngine]:
    """A served model whose answers are given beforehand."""
    engine = ScriptedEngine()
    return Models([ServedModel("scripted", model, tokenizer, engine, metrics, **limits)]), engine
