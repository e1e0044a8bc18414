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
"""The POST API of the tutorials: `POST /` with a prompt and a history, and `POST /stream` for the same in pieces.

A history is what the answer before returned: pairs for ChatGLM-6B and ChatGLM2, dicts for ChatGLM3 and GLM-4; either is
understood. An answer is read as `chat` reads it, so a tool call is an object. GLM-4V takes an `image`, a data address,
which stays in the history.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter

from .answers import AnswerResponse, AnswerStream
from .errors import RequestError, error_body, now
from .models import Models, ServedModel
from .pictures import encode_chat
from .requests import TUTORIAL_FIELDS, check_fields, read_tutorial_settings


class Conversation:
    """One request: its messages, and the answer that is being generated."""

    def __init__(self, served: ServedModel, messages: list[dict[str, Any]], answer: AnswerStream) -> None:
        self.served, self.messages, self.answer = served, messages, answer

    @classmethod
    async def start(cls, served: ServedModel, body: dict[str, Any]) -> "Conversation":
        """Read a body and begin the answer.

        Raises:
            RequestError: for a body that asks for something else.
        """
        check_fields(body, TUTORIAL_FIELDS)
        prompt, history = body.get("prompt"), body.get("history") or []
        if not isinstance(prompt, str):
            raise RequestError(f"'prompt' must be a text, not {prompt!r:.100}.", "prompt")
        chat_format = served.model.chat_format
        question = {"role": "user", "content": prompt, "image": body.get("image")}
        try:
            messages = chat_format.normalize_messages(history)
            messages += chat_format.normalize_messages([question])
            images = None
            if any("image" in message for message in messages):
                prompt_ids, images = await asyncio.to_thread(encode_chat, served, messages)
            else:
                prompt_ids = await asyncio.to_thread(
                    served.tokenizer.encode_conversation, messages, chat_format=chat_format
                )
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(str(error), "history") from None
        room = served.room_for(prompt_ids, "prompt")
        settings = read_tutorial_settings(body, served, len(prompt_ids), room)
        return cls(served, messages, served.start(prompt_ids, settings, images=images))

    def result(self, text: str) -> dict[str, Any]:
        """What the tutorials return, for the text so far."""
        chat_format = self.served.model.chat_format
        response, answers = chat_format.read_answer(text, self.messages)
        history = chat_format.native_history(self.messages + answers)
        return {"response": response, "history": history, "status": 200, "time": now()}

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events: the result so far, what is new in it, and whether it is `finished`."""
        text, shown = "", ""
        while (item := await self.answer.queue.get()) is not None:
            if isinstance(item, RequestError):
                yield as_event({**error_body("/", item), "finished": True})
                return
            text += item
            result = self.result(text)
            response = result["response"]
            # A call is known as one when it is complete.
            if isinstance(response, str) and response.startswith(shown):
                yield as_event({**result, "delta": response[len(shown) :], "finished": False})
                shown = response
        result = self.result(text)
        response = result["response"]
        is_longer = isinstance(response, str) and response.startswith(shown)
        yield as_event({**result, "delta": response[len(shown) :] if is_longer else "", "finished": True})


def as_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def build_tutorial_door(models: Models) -> APIRouter:
    """The routes of the door, which knows one model."""
    router = APIRouter()

    @router.post("/")
    async def answer(body: dict[str, Any]) -> dict[str, Any]:
        conversation = await Conversation.start(models.default, body)
        return conversation.result("".join(await conversation.answer.collect()))

    @router.post("/stream")
    async def stream(body: dict[str, Any]) -> AnswerResponse:
        conversation = await Conversation.start(models.default, body)
        return AnswerResponse(conversation.events(), conversation.answer)

    return router
