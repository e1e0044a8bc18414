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
"""How are answers generated: many in one batch, or one after the other?

- `BatchingEngine`, for the causal generations: the library's continuous batching, with a paged cache for all requests.
- `QueueEngine`, for ChatGLM-6B, whose context is bidirectional, and for a P-tuning prefix, which every conversation
  begins with: `generate`, one request at a time.
- `SeeingEngine`, for GLM-4V: continuous batching, which takes ids alone, for texts, and a queue for pictures.

A thread of the engine generates. `start` is called in the event loop, and an answer gets its tokens there.
"""

import copy
import itertools
import logging
import queue
import threading
import uuid
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer, StoppingCriteriaList

from .answers import AnswerStream
from .errors import RequestError
from .sampling import request_processors


logger = logging.getLogger("uvicorn.error")

# Tokens in a page of the cache, as the library has it by default.
PAGE_SIZE = 256
# Tokens that one step of the network reads at most. A longer prompt is read in parts, between which others get theirs.
# The mask of a step has this many rows, one column for every token that the cache holds.
BATCH_TOKENS = 512


def failure() -> RequestError:
    """What a client is told of an error while its answer was generated, whose text may hold paths of this machine."""
    return RequestError("The answer could not be generated; the server's log says why.", status=500)


class Engine(Protocol):
    """What generates the answers of one model."""

    def start(self, answer: AnswerStream) -> None:
        """Begin an answer; in the event loop."""

    def stop(self) -> None:
        """End the thread, after the answers that have begun."""

    @property
    def max_tokens(self) -> int:
        """Tokens that a prompt and its answer have together at most."""


class BatchingEngine:
    """Continuous batching: every step computes the next token of all requests.

    Args:
        model: of a causal generation, without a P-tuning prefix.
        cache_tokens: tokens that the cache holds, of all requests together. By default the library would take most of
            the free memory, and a good part of a minute for it.
    """

    def __init__(self, model: PreTrainedModel, cache_tokens: int) -> None:
        self.model = model
        self.num_blocks = max(-(-cache_tokens // PAGE_SIZE), 1)
        self.is_stopping = False
        self.manager = self._new_manager()

    @property
    def max_tokens(self) -> int:
        return min(self.model.config.max_position_embeddings, self.num_blocks * PAGE_SIZE)

    def _new_manager(self) -> Any:
        config = GenerationConfig(
            do_sample=True,  # `sampling.py` leaves one token where a request wants the likeliest.
            max_new_tokens=self.max_tokens,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.model.generation_config.pad_token_id,
        )
        settings = ContinuousBatchingConfig(num_blocks=self.num_blocks, max_batch_tokens=BATCH_TOKENS)
        manager = self.model.init_continuous_batching(generation_config=config, continuous_batching_config=settings)
        manager.logit_processor = request_processors()
        manager.start()
        return manager

    def start(self, answer: AnswerStream) -> None:
        """See `Engine.start`; a thread that died of an error is replaced, so that the next request is answered."""
        is_begun = self._begin(answer)
        if not is_begun and not self.is_stopping:
            self.manager = self._new_manager()
            is_begun = self._begin(answer)
        if not is_begun:
            answer.fail(RequestError("The server is stopping.", status=503))

    def _begin(self, answer: AnswerStream) -> bool:
        """Hand an answer to the thread; whether it takes any."""
        manager, settings = self.manager, answer.settings
        # Never a name that a client chose: two with the same one would read each other's answers.
        request_id = uuid.uuid4().hex
        num_seen = 0

        def take(output: Any) -> None:
            nonlocal num_seen
            new_ids, num_seen = output.generated_tokens[num_seen:], len(output.generated_tokens)
            if output.error is not None:
                logger.error("an answer could not be generated: %s", output.error)
                answer.fail(failure())
                return
            answer.put(new_ids)
            if output.is_finished():
                answer.end()

        answer.stop_generating = partial(self._cancel, manager, request_id)
        manager.register_result_handler(request_id, take)
        taken = manager.add_request(
            answer.prompt_ids,
            request_id=request_id,
            max_new_tokens=settings.max_new_tokens,
            streaming=True,
            eos_token_id=sorted(answer.stop_ids),
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        return taken is not None

    @staticmethod
    def _cancel(manager: Any, request_id: str) -> None:
        manager.cancel_request(request_id)
        # The library keeps the handler of a cancelled request, and what is still computed for it, forever.
        manager.output_router.result_handlers.pop(request_id, None)
        with suppress(queue.Empty):
            while True:
                manager.output_router.output_queue.get_nowait()

    def stop(self) -> None:
        """See `Engine.stop`."""
        self.is_stopping = True
        self.manager.stop(block=True)


class TokenCallback(BaseStreamer):
    """Hands tokens of `generate` to an answer in its event loop."""

    def __init__(self, answer: AnswerStream) -> None:
        self.answer = answer
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.answer.loop.call_soon_threadsafe(self.answer.put, value.reshape(-1).tolist())
        self.is_prompt = False

    def end(self) -> None:
        """The engine says when an answer ends."""


class QueueEngine:
    """One answer after the other, by `generate`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.waiting: queue.SimpleQueue[AnswerStream | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    @property
    def max_tokens(self) -> int:
        return self.model.config.max_position_embeddings

    def start(self, answer: AnswerStream) -> None:
        """See `Engine.start`."""
        self.waiting.put(answer)

    def stop(self) -> None:
        """See `Engine.stop`."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (answer := self.waiting.get()) is not None:
            finish = answer.end
            try:
                if not answer.is_done:
                    self._generate(answer)
            except Exception as error:  # Whatever it is belongs to this request, and not to those behind it.
                logger.error("an answer could not be generated", exc_info=error)
                finish = partial(answer.fail, failure())
            with suppress(RuntimeError):  # The loop has ended: nobody waits.
                answer.loop.call_soon_threadsafe(finish)

    def _generate(self, answer: AnswerStream) -> None:
        settings = answer.settings
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}

        def is_unwanted(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), answer.is_done, dtype=torch.bool, device=input_ids.device)

        pictures = {} if answer.images is None else {"images": answer.images}
        self.model.generate(
            torch.tensor([answer.prompt_ids], device=self.model.device),
            **pictures,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=sorted(answer.stop_ids),
            streamer=TokenCallback(answer),
            stopping_criteria=StoppingCriteriaList([is_unwanted]),
            **sampling,
        )


class SeeingEngine:
    """Texts in a batch, and pictures one after the other, on the same weights."""

    def __init__(self, model: PreTrainedModel, cache_tokens: int) -> None:
        # Before continuous batching gives the model attention of its own.
        self.pictures = QueueEngine(with_same_weights(model))
        self.texts = BatchingEngine(model, cache_tokens)

    @property
    def max_tokens(self) -> int:
        return self.texts.max_tokens

    def start(self, answer: AnswerStream) -> None:
        """See `Engine.start`."""
        engine: Engine = self.texts if answer.images is None else self.pictures
        engine.start(answer)

    def stop(self) -> None:
        """See `Engine.stop`."""
        self.texts.stop()
        self.pictures.stop()


def with_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules and a configuration of its own around the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def engine_for(model: PreTrainedModel, cache_tokens: int) -> Engine:
    """The engine that can serve a model."""
    # CODEPATH: chatglm-6b and checkpoints with a P-tuning prefix; chatglm2, chatglm3 and glm4 take the other.
    if model.config.prefix_lm or model.config.pre_seq_len is not None:
        return QueueEngine(model)
    # CODEPATH: glm-4v-9b; chatglm2, chatglm3 and glm-4-9b read text alone.
    return (
        BatchingEngine(model, cache_tokens)
        if model.config.vision_config is None
        else SeeingEngine(model, cache_tokens)
    )
