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
"""How do tokens reach another thread while they are generated?

`generate` runs in a thread that hands over the tokens as they come. Closing the iterator stops the thread, and so does
the end of the program.
"""

import atexit
import queue
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.generation import BaseStreamer


class StreamClosed(Exception):
    """Ends `generate` when nobody waits for more tokens."""


class TokenQueue(BaseStreamer):
    """A streamer that hands new tokens to another thread, `[batch]` at a time and without the prompt."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[torch.Tensor | BaseException | None] = queue.SimpleQueue()
        self.batch_size: int | None = None
        self.is_closed = False

    def put(self, value: torch.Tensor) -> None:
        if self.is_closed:
            raise StreamClosed
        # The prompt comes first, and speculative decoding brings several tokens at once.
        for tokens in value.reshape(self.batch_size, -1).unbind(1) if self.batch_size is not None else ():
            self.queue.put(tokens)
        self.batch_size = value.shape[0] if self.batch_size is None else self.batch_size

    def end(self) -> None:
        """The end is marked by the thread, which knows whether it was an error."""


# A thread that still computes while the interpreter shuts down would abort the process.
OPEN_STREAMS: set[tuple[TokenQueue, threading.Thread]] = set()


@atexit.register
def close_open_streams() -> None:
    """Let every stream finish the token it is at, and no more."""
    streams = list(OPEN_STREAMS)
    for tokens, _ in streams:
        tokens.is_closed = True
    for _, thread in streams:
        thread.join()


def stream_ids(generate: Callable, input_ids: torch.Tensor, cache: Cache | None) -> Generator[Any, None, None]:
    """Run `generate(streamer=...)` in a thread; yield all ids so far, `[batch, seq]`, or pairs of them and the cache."""
    device_type = input_ids.device.type
    # These belong to a thread.
    is_inference, is_autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(device_type)
    autocast = torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), enabled=is_autocast)
    streamer = TokenQueue()

    def run() -> None:
        try:
            with autocast, torch.inference_mode(is_inference):
                generate(streamer=streamer)
            streamer.queue.put(None)
        except BaseException as error:  # Whatever it is belongs to the caller, who waits at the queue.
            streamer.queue.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    OPEN_STREAMS.add((streamer, thread))
    try:
        while (tokens := streamer.queue.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            input_ids = torch.cat([input_ids, tokens.to(input_ids.device)[:, None]], dim=-1)
            yield input_ids if cache is None else (input_ids, cache)
    finally:
        streamer.is_closed = True
        while thread.is_alive():
            # A second Ctrl-C must not leave the thread behind, which may still be writing to the cache.
            with suppress(KeyboardInterrupt):
                thread.join()
        OPEN_STREAMS.discard((streamer, thread))


__all__ = ["TokenQueue", "stream_ids"]
