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
"""Who may come in, how much at once, and what if a client goes away?

One layer of ASGI around the application. It reads the whole body before anything else sees the request, so that a slow or
endless one costs a limited amount of memory and no slot of the model.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .errors import RequestError, error_response
from .metrics import Metrics


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Answers without a key: what watches a server has none.
OPEN_PATHS = ("/health",)
# Seconds that a body may take to arrive.
BODY_SECONDS = 60
# Seconds that a client may take to read an answer, after the time that the answer may take.
READING_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server lets its clients do.

    Attributes:
        requests: requests at once, those that wait for their turn included.
        body_bytes: bytes of a body.
        prompt_tokens: tokens of a prompt, if fewer than the model takes.
        seconds: how long an answer may take.
    """

    requests: int = 64
    body_bytes: int = 1 << 20
    prompt_tokens: int | None = None
    seconds: float = 600.0


class Disconnected(Exception):
    """The client went away before its request was complete."""


class Guard:
    """Checks the key, the number of requests and the body, and cancels what nobody waits for any more."""

    def __init__(self, app: Any, limits: Limits, api_keys: tuple[str, ...], metrics: Metrics) -> None:
        self.app, self.limits, self.api_keys, self.metrics = app, limits, api_keys, metrics
        self.num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        status = 499  # As nginx has it: the client has closed the connection.

        async def watched_send(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_counted = scope["method"] == "POST"
        self.num_running += is_counted
        try:
            self._check_key(scope)
            if is_counted and self.num_running > self.limits.requests:
                raise RequestError(
                    f"The server answers {self.limits.requests} requests at once. Try again.", status=429
                )
            body = await read_body(scope, receive, self.limits.body_bytes)
            seconds = self.limits.seconds + READING_SECONDS
            await run_until_disconnect(self.app, scope, body, receive, watched_send, seconds)
        except RequestError as error:
            await error_response(scope["path"], error)(scope, receive, watched_send)
        except Disconnected:
            pass
        finally:
            self.num_running -= is_counted
            self.metrics.requests.labels(known_path(scope), str(status)).inc()

    def _check_key(self, scope: Scope) -> None:
        if not self.api_keys:
            return
        header = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, given = header.partition(b" ")
        # Compared in constant time, and with every key.
        matches = [hmac.compare_digest(given.strip(), key.encode()) for key in self.api_keys]
        if kind.lower() != b"bearer" or not any(matches):
            raise RequestError("Send a valid key as 'Authorization: Bearer KEY'.", status=401, code="invalid_api_key")


def known_path(scope: Scope) -> str:
    """The path of a request, if the application has it; others would make a counter each."""
    route = scope.get("route")
    return getattr(route, "path", None) or "other"


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The body of a request; that of a POST is a JSON object.

    Raises:
        RequestError: if it is too large, arrives too slowly, or is no JSON object in UTF-8.
        Disconnected: if the client goes away.
    """
    too_large = RequestError(f"The body is larger than {limit} bytes.", status=413)
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise RequestError(f"The body took longer than {BODY_SECONDS} seconds to arrive.", status=408) from None
    if scope["method"] == "POST":
        check_json(bytes(body))
    return bytes(body)


def check_json(body: bytes) -> None:
    """See that a body is a JSON object in UTF-8, whose texts can be written as UTF-8 again.

    Raises:
        RequestError: if it is something else.
    """
    try:
        content = json.loads(body.decode("utf-8"))
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        kind = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"The body is not JSON in UTF-8: {kind}"[:500]) from None
    if not isinstance(content, dict):
        raise RequestError(f"The body must be a JSON object, not {type(content).__name__}.")


async def run_until_disconnect(
    app: Any, scope: Scope, body: bytes, receive: Receive, send: Send, seconds: float
) -> None:
    """Run the application with a body that was read, and cancel it when the client goes away.

    By itself, an answer that is not streamed would be generated to its end, and a client that stays and reads nothing
    would keep its place for ever: it has this many seconds.
    """
    is_read, is_gone = False, asyncio.Event()

    async def replay() -> MutableMapping[str, Any]:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await is_gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone.set()

    work, watcher = asyncio.create_task(app(scope, replay, send)), asyncio.create_task(watch())
    try:
        await asyncio.wait({work, watcher}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Whoever is cancelled here has nothing left to do: the response is complete, or nobody reads it.
        watcher.cancel()
        if not work.done():
            work.cancel()
        with suppress(asyncio.CancelledError):
            await work
