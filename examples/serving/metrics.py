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
"""What the server counts, in Prometheus' form."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import Response


# Seconds; the first token of a long prompt takes minutes on a processor.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counters of one server, in a registry of its own, so that several servers fit in a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        shared = {"namespace": "chatglm", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests answered, by path and HTTP status.", ["path", "status"], **shared
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **shared)
        self.generated_tokens = Counter("generated_tokens", "Tokens of answers.", ["model"], **shared)
        self.running = Gauge("answers_running", "Answers that are being generated.", **shared)
        self.waiting = Gauge("answers_waiting", "Answers that wait for their first token.", **shared)
        self.first_token = Histogram(
            "first_token_seconds", "Time from a request to its first token.", ["model"], buckets=BUCKETS, **shared
        )

    def response(self) -> Response:
        """The counters as `/metrics` shows them."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
