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
"""How do ids become text while they come, and when does it end?"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from .errors import RequestError


logger = logging.getLogger("uvicorn.error")

# Ids that are decoded again with every new one. A character has four bytes at most, each with a token of its own.
WINDOW = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an answer is generated.

    Attributes:
        max_new_tokens: tokens of the answer at most.
        temperature: 0 always takes the likeliest token.
        top_p: the share of probability to choose from, above 0 and up to 1.
        stop: texts that end the answer and are no part of it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


class IncrementalDecoder:
    """Decodes ids one by one, with a tokenizer of any kind; half a character is held back until the rest has come."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.ids: list[int] = []
        # Up to here, text has been given out; the ids before it give a tokenizer the left side that it looks at.
        self.num_given = 0

    def step(self, token_id: int) -> str:
        self.ids.append(token_id)
        return self._take(is_end=False)

    def finish(self) -> str:
        """What was held back: half a character, which nothing can complete any more."""
        return self._take(is_end=True)

    def _take(self, is_end: bool) -> str:
        given = self.decode(self.ids[: self.num_given])
        text = self.decode(self.ids)
        if text.endswith("\ufffd") and not is_end and len(self.ids) - self.num_given < WINDOW:
            return ""
        self.ids = self.ids[-WINDOW:] if len(self.ids) > 2 * WINDOW else self.ids
        self.num_given = len(self.ids)
        return text[len(given) :]


def overlap(text: str, string: str) -> int:
    """How many characters at the end of a text could be the beginning of a string."""
    longest = min(len(string) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)


class StopStrings:
    """Cuts a text off before the first of some strings, holding back what could be the beginning of one."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(strings)
        self.held = ""
        self.is_hit = False

    def feed(self, text: str) -> str:
        """The part of the text so far that is certain and was not given out before."""
        self.held += text
        places = [place for place in map(self.held.find, self.strings) if place >= 0]
        if places:
            self.is_hit = True
            given, self.held = self.held[: min(places)], ""
            return given
        length = max((overlap(self.held, string) for string in self.strings), default=0)
        split = len(self.held) - length
        given, self.held = self.held[:split], self.held[split:]
        return given


class AnswerStream:
    """One answer, from its first token to its last.

    It belongs to the event loop it was made in. Whoever generates calls `put`, `end` and `fail` there; whoever asked
    takes items from `queue`: pieces of text, what `read` made of them, and at the end `None` or a `RequestError`.

    Args:
        prompt_ids: what the model reads.
        settings: how the answer is generated.
        tokenizer: decodes the ids.
        stop_ids: the tokens that end an answer.
        read: turns a piece of text, or `None` at the end, into items; see `reading.py`.
        on_token: called with the number of tokens so far after each.
        images: the pixels of the prompt's picture, if it has one.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        read: Callable[[str | None], list[Any]] | None = None,
        on_token: Callable[[int], None] = lambda total: None,
        images: torch.Tensor | None = None,
    ) -> None:
        self.prompt_ids, self.settings, self.stop_ids = prompt_ids, settings, frozenset(stop_ids)
        self.images = images
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.total_tokens = 0
        self.finish_reason: str | None = None
        self.started = time.perf_counter()
        # What stops the generation; whoever generates sets it.
        self.stop_generating: Callable[[], None] = lambda: None
        self.when_done: list[Callable[[], None]] = []
        self._read, self._on_token = read, on_token
        self._decoder = IncrementalDecoder(tokenizer.decode)
        self._stops = StopStrings(settings.stop)

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    def put(self, new_ids: Iterable[int]) -> None:
        """Take new tokens. What comes after the end of the answer is dropped."""
        try:
            for token_id in new_ids:
                if not self.is_done:
                    self._put(token_id)
        except Exception as error:  # Nobody above could tell who waits for this answer.
            self._fail_unexpectedly(error)

    def end(self) -> None:
        """Nothing more comes."""
        if self.is_done:
            return
        try:
            self._finish("length" if self.total_tokens >= self.settings.max_new_tokens else "stop")
        except Exception as error:  # As above.
            self._fail_unexpectedly(error)

    def fail(self, error: RequestError) -> None:
        """Nothing more comes, because of an error."""
        if not self.is_done:
            self._close("error", error)
            self.stop_generating()

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        if not self.is_done:
            self._close("cancelled", None)
            self.stop_generating()

    def _put(self, token_id: int) -> None:
        self.total_tokens += 1
        self._on_token(self.total_tokens)
        if token_id in self.stop_ids:
            self._finish("stop")
            return
        self._give(self._decoder.step(token_id))
        if self._stops.is_hit:
            self._close("stop", None)
            self.stop_generating()

    def _give(self, text: str | None) -> None:
        items = [text] if self._read is None else self._read(text)
        for item in items:
            if self._stops.is_hit:
                return
            if isinstance(item, str):
                item = self._stops.feed(item)
            elif item is not None:
                self._give_held()
            if item:
                self.queue.put_nowait(item)

    def _give_held(self) -> None:
        if self._stops.held:
            self.queue.put_nowait(self._stops.held)
            self._stops.held = ""

    def _finish(self, reason: str) -> None:
        self._give(self._decoder.finish())
        self._give(None)
        self._give_held()
        self._close("stop" if self._stops.is_hit else reason, None)

    def _fail_unexpectedly(self, error: Exception) -> None:
        logger.error("an answer could not be read", exc_info=error)
        self.fail(RequestError("The server failed to read the answer; its log says why.", status=500))

    def _close(self, reason: str, item: RequestError | None) -> None:
        self.finish_reason = reason
        self.queue.put_nowait(item)
        for callback in self.when_done:
            callback()

    async def collect(self) -> list[Any]:
        """All items of the answer; stops the generation if the caller is cancelled.

        Raises:
            RequestError: if the answer failed.
        """
        items = []
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, RequestError):
                    raise item
                items.append(item)
        finally:
            self.cancel()
        return items


class AnswerResponse(StreamingResponse):
    """Server-sent events of an answer, which ends when the client goes away, even before the first of them."""

    def __init__(self, events: AsyncGenerator[str, None], answer: AnswerStream) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # The generator cannot do it: where nothing was read from it, its `finally` never runs.
            self.answer.cancel()
