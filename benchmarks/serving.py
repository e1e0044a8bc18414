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
"""How fast is `examples/serve.py`, does its memory grow, and does it lose requests? `python benchmarks/serving.py`

A server of its own answers on this machine, by default with the bundled model; `--slice N` takes N layers at the width of
ChatGLM3-6B with random weights. What is measured:

- answers one after the other, and many at once, in tokens per second;
- the server's memory after 50 requests and after all of them;
- how many of 32 requests are not answered to their end when the server gets SIGTERM while they run.

It needs `pip install -r requirements/serving.txt`, and does nothing without.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from slices import REPOSITORY, build_slice


try:
    import httpx
except ImportError:
    httpx = None

BUNDLED = REPOSITORY / "examples" / "tiny-chatglm3"
QUESTIONS = ("你好", "What can you do?", "法国的首都是哪里？", "What is the weather like in Paris?")
MEGABYTE = 1 << 20


def make_slice(folder: Path, num_layers: int, vocab_size: int) -> Path:
    """Write a checkpoint of a few wide layers, with the tokenizer of the bundled model."""
    model = build_slice(num_layers, torch.bfloat16, padded_vocab_size=vocab_size)
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, folder / name)
    return folder


class Server:
    """A running server and a client for it."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        program = REPOSITORY / "examples" / "serve.py"
        self.process = subprocess.Popen([sys.executable, str(program), str(folder), "--port", str(port), *words])
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits)
        while True:
            try:
                self.client.get("/health")
                return
            except httpx.TransportError:
                if self.process.poll() is not None:
                    sys.exit("the server did not start")
                time.sleep(0.2)

    def ask(self, index: int, num_tokens: int) -> int:
        """Answer a question; the number of tokens."""
        question = {"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}
        body = {"messages": [question], "temperature": 0, "max_tokens": num_tokens}
        answer = self.client.post("/v1/chat/completions", json=body).raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    def megabytes(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / MEGABYTE)


def tokens_per_second(ask: Callable[[int], int], num_requests: int, num_clients: int) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as pool:
        num_tokens = sum(pool.map(ask, range(num_requests)))
    return num_tokens / (time.perf_counter() - start)


def count_lost(server: Server, num_tokens: int) -> int:
    """Send 32 requests, SIGTERM as soon as all have been read, and count those without a whole answer."""
    before = count_prompts(server)

    def stream(index: int) -> bool:
        question = {"role": "user", "content": QUESTIONS[index % len(QUESTIONS)]}
        body = {"messages": [question], "temperature": 0, "max_tokens": num_tokens, "stream": True}
        try:
            return server.client.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")
        except httpx.TransportError:
            return False

    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(stream, index) for index in range(32)]
        while count_prompts(server) < before + 32:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        lost = [answer for answer in answers if not answer.result()]
    server.process.wait()
    return len(lost)


def count_prompts(server: Server) -> int:
    """Answers that have been begun so far."""
    rows = server.client.get("/metrics").text.splitlines()
    names = ("chatglm_first_token_seconds_count", "chatglm_answers_waiting")
    return int(sum(float(row.split()[-1]) for row in rows if row.startswith(names)))


def measure(server: Server, arguments: argparse.Namespace) -> dict[str, Any]:
    def ask(index: int) -> int:
        return server.ask(index, arguments.tokens)

    for index in range(len(QUESTIONS)):
        ask(index)  # Kernels are compiled, buffers are made.
    figures: dict[str, Any] = {"threads": os.environ.get("OMP_NUM_THREADS"), "tokens_per_second": {}}
    for num_clients in arguments.clients:
        num_requests = arguments.timed * min(num_clients, 4)
        figures["tokens_per_second"][num_clients] = round(tokens_per_second(ask, num_requests, num_clients), 1)
    if arguments.requests:
        tokens_per_second(ask, 50, 8)
        after_50 = server.megabytes()
        tokens_per_second(ask, arguments.requests - 50, 8)
        figures["megabytes_after_50"], figures["megabytes_after_all"] = (
            round(after_50, 1),
            round(server.megabytes(), 1),
        )
        figures["requests"] = arguments.requests
    figures["lost_by_sigterm"] = count_lost(server, arguments.tokens)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=BUNDLED)
    parser.add_argument(
        "--slice", type=int, metavar="LAYERS", help="random weights at the width of ChatGLM3-6B instead"
    )
    parser.add_argument("--vocab", type=int, default=8192, help="of the slice")
    parser.add_argument(
        "--server", nargs="*", default=[], metavar="WORD", help="further arguments of serve.py, without --"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--timed", type=int, default=16, help="requests of one client that are timed")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--requests", type=int, default=500, help="between the two looks at the memory; 0 for none")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()
    if httpx is None:
        print("nothing was measured: pip install -r requirements/serving.txt")
        return 0
    words = [f"--{word}" for word in arguments.server]
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder
        if arguments.slice:
            folder = make_slice(Path(name) / "slice", arguments.slice, arguments.vocab)
        server = Server(folder, words)
        try:
            figures = measure(server, arguments)
        finally:
            server.process.kill()
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
