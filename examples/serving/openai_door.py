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
"""OpenAI's `/v1`, on the server that comes with Transformers.

Its application, routes and the form of its results are used. What a request may ask for, how its answer is generated and
what an error looks like is this package's: the library ignores stop strings and all settings of a request but the first
one's under continuous batching, drops fields it does not know, takes the names of requests from their clients, and
answers a long prompt with status 500.
"""

import asyncio
import inspect
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageToolCall
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall
from openai.types.completion_usage import CompletionUsage

# The one place that imports the server of Transformers. The library keeps it for its own command line and promises
# nothing about it (run with 5.17.0 and 5.23.0); its command can load no model with code of its own.
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from .answers import AnswerResponse, AnswerStream
from .errors import RequestError, error_body
from .models import Models, ServedModel
from .pictures import encode_chat
from .reading import Call, reader_for
from .requests import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    COMPLETION_TOKENS,
    check_fields,
    read_flag,
    read_settings,
    read_usage_wanted,
)


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models")
STREAM_END = "data: [DONE]\n\n"


class Handler:
    """What both kinds of completions share."""

    models: Models
    fields: tuple[str, ...]

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request; `request_id` is the client's, if it sent one, and names nothing here."""
        served = self.models.find(body.get("model"))
        check_fields(body, self.fields)
        is_streamed, wants_usage = read_flag(body, "stream"), read_usage_wanted(body)
        answer = await self._start(body, served)
        name = f"{self.prefix}-{uuid.uuid4().hex}"
        if is_streamed:
            return AnswerResponse(self._events(name, served, answer, wants_usage), answer)
        items = await answer.collect()
        return JSONResponse(self._result(name, served, answer, items))

    prefix: str

    async def _start(self, body: dict[str, Any], served: ServedModel) -> AnswerStream:
        raise NotImplementedError

    def _result(self, name: str, served: ServedModel, answer: AnswerStream, items: list[Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _first_events(self, name: str, served: ServedModel) -> str:
        return ""

    def _event(self, name: str, served: ServedModel, item: Any, num_calls: int) -> str:
        raise NotImplementedError

    def _last_events(self, name: str, served: ServedModel, reason: str, usage: CompletionUsage | None) -> str:
        raise NotImplementedError

    async def _events(
        self, name: str, served: ServedModel, answer: AnswerStream, wants_usage: bool
    ) -> AsyncGenerator[str, None]:
        num_calls = 0
        yield self._first_events(name, served)
        while (item := await answer.queue.get()) is not None:
            if isinstance(item, RequestError):
                yield f"data: {json.dumps(error_body('/v1', item))}\n\n"
                return
            yield self._event(name, served, item, num_calls)
            num_calls += isinstance(item, Call)
        usage = usage_of(answer) if wants_usage else None
        yield self._last_events(name, served, finish_reason(answer, num_calls), usage)
        yield STREAM_END


class ChatHandler(Handler, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    fields, prefix = CHAT_FIELDS, "chatcmpl"

    async def _start(self, body: dict[str, Any], served: ServedModel) -> AnswerStream:
        tools = body.get("tools") or None
        messages = body.get("messages")
        if (
            not isinstance(messages, list)
            or not all(isinstance(message, dict) for message in messages)
            or not messages
        ):
            raise RequestError("'messages' must be a list of at least one message.", "messages")
        # Not to be called is not to be offered.
        offered = None if body.get("tool_choice") == "none" else tools
        messages = [
            {**message, "role": "system"} if message.get("role") == "developer" else message for message in messages
        ]
        try:
            if offered is not None and not isinstance(offered, list):
                raise TypeError("`tools` must be a list")
            prompt_ids, images = await asyncio.to_thread(encode_chat, served, messages, offered)
        except (TypeError, ValueError, RecursionError, TemplateError) as error:
            raise RequestError(str(error), "tools" if "tools" in str(error) else "messages") from None
        room = served.room_for(prompt_ids, "messages")
        settings = read_settings(body, served, room, ("max_completion_tokens", "max_tokens"))
        has_tools = bool(offered) or any("tools" in message for message in messages)
        return served.start(prompt_ids, settings, reader_for(served.model.chat_format, has_tools), images)

    def _result(self, name: str, served: ServedModel, answer: AnswerStream, items: list[Any]) -> dict[str, Any]:
        calls = [
            ChatCompletionMessageToolCall(id=call_id(), type="function", function=as_function(item))
            for item in items
            if isinstance(item, Call)
        ]
        text = "".join(item for item in items if isinstance(item, str))
        return self._build_completion(
            name,
            text or (None if calls else ""),
            served.name,
            finish_reason=finish_reason(answer, len(calls)),
            usage=usage_of(answer),
            tool_calls=calls or None,
        )

    def _first_events(self, name: str, served: ServedModel) -> str:
        return self._build_chunk_sse(name, role="assistant", content="", model=served.name)

    def _event(self, name: str, served: ServedModel, item: Any, num_calls: int) -> str:
        if isinstance(item, Call):
            call = ChoiceDeltaToolCall(index=num_calls, type="function", id=call_id(), function=as_function(item))
            return self._build_chunk_sse(name, model=served.name, tool_calls=[call])
        return self._build_chunk_sse(name, model=served.name, content=item)

    def _last_events(self, name: str, served: ServedModel, reason: str, usage: CompletionUsage | None) -> str:
        events = self._build_chunk_sse(name, model=served.name, finish_reason=reason)
        if usage is not None:
            chunk = ChatCompletionChunk(
                id=name,
                created=int(time.time()),
                model=served.name,
                choices=[],
                usage=usage,
                object="chat.completion.chunk",
            )
            events += self.chunk_to_sse(chunk)
        return events


class TextHandler(Handler, CompletionHandler):
    """`/v1/completions`."""

    fields, prefix = COMPLETION_FIELDS, "cmpl"

    async def _start(self, body: dict[str, Any], served: ServedModel) -> AnswerStream:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            prompt_ids = (await asyncio.to_thread(served.tokenizer, prompt))["input_ids"]
        elif isinstance(prompt, list) and all(type(index) is int for index in prompt):
            prompt_ids = prompt
            size = served.model.config.vocab_size
            if not all(0 <= index < size for index in prompt):
                raise RequestError(f"'prompt' holds an id that is not below {size}.", "prompt")
        else:
            raise RequestError("'prompt' must be one text, or one list of ids.", "prompt")
        room = served.room_for(prompt_ids, "prompt")
        return served.start(prompt_ids, read_settings(body, served, room, ("max_tokens",), COMPLETION_TOKENS))

    def _result(self, name: str, served: ServedModel, answer: AnswerStream, items: list[Any]) -> dict[str, Any]:
        reason = finish_reason(answer, 0)
        choice = {"text": "".join(items), "index": 0, "finish_reason": reason}
        result = Completion.model_validate(
            {
                "id": name,
                "created": int(time.time()),
                "model": served.name,
                "choices": [choice],
                "object": "text_completion",
                "usage": usage_of(answer),
            }
        )
        return result.model_dump(exclude_none=True)

    def _event(self, name: str, served: ServedModel, item: Any, num_calls: int) -> str:
        return self._build_chunk_sse(name, served.name, text=item)

    def _last_events(self, name: str, served: ServedModel, reason: str, usage: CompletionUsage | None) -> str:
        return self._build_chunk_sse(name, served.name, finish_reason=reason, usage=usage)


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def as_function(call: Call) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


def finish_reason(answer: AnswerStream, num_calls: int) -> str:
    """OpenAI's name for why an answer ended."""
    return "tool_calls" if num_calls else answer.finish_reason or "stop"


def usage_of(answer: AnswerStream) -> CompletionUsage:
    read, written = len(answer.prompt_ids), answer.total_tokens
    return CompletionUsage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


class ModelList:
    """What the library's application asks its manager of models."""

    def __init__(self, models: Models) -> None:
        self.models = models

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The entries of `/v1/models`."""
        return [
            {"id": served.name, "object": "model", "created": served.created, "owned_by": "chatglm"}
            for served in self.models.by_name.values()
        ]

    def shutdown(self) -> None:
        """Called when the server has answered its last request."""
        self.models.stop()


def build_openai_door(models: Models) -> FastAPI:
    """The library's application with the routes in `PATHS` and no others: it can also load and unload models."""
    manager, state = ModelList(models), GenerationState()
    chat, text = ChatHandler(manager, state), TextHandler(manager, state)
    chat.models = text.models = models
    # Newer versions have more kinds of requests, which lead nowhere here.
    others = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    handlers = {**dict.fromkeys(others), "chat_handler": chat, "completion_handler": text}
    app: FastAPI = build_server(manager, **handlers, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    return app
