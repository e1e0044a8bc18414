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
"""The model behind the web page: loading it while visitors watch, and answering.

What is unusual here:

- The page is up before the model is. `LoadingModel` tells how far the loading is, in the terminal and to the page.
- Closing the iterator of an answer stops the work, whether a visitor pressed the button or went away.
- A function that the model calls is one of `Settings.functions`, called by name with the arguments that were read as
  literals. Whatever goes wrong in it is told to the model as its result.
"""

import inspect
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from local_code import load_module, load_tokenizer
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import get_json_schema, logging

from .web_conversation import Conversation, Message, called_tool, with_messages


# How often a model may call functions before it has to answer.
MAX_CALLS = 5
MAX_RESULT_LENGTH = 10_000

Function = Callable[..., Any]


class LoadingModel:
    """A model on its way into memory.

    Attributes:
        fraction: how much of the weights is there, from 0 to 1.
        error: what went wrong, or an empty string.
    """

    def __init__(self) -> None:
        self.fraction = 0.0
        self.error = ""
        self._is_done = threading.Event()
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def load(self, folder: Path, device: str, dtype: Any, bits: int | None) -> None:
        """Load a checkpoint folder.

        Args:
            bits: 8 or 4 to quantize the weights while they are read; `None` leaves them as they are.

        Raises:
            OSError, ValueError, RuntimeError: what the library says, which visitors see too.
        """
        settings = {} if bits is None else {"quantization_config": {"quant_method": "chatglm", "bits": bits}}
        previous = logging.set_tqdm_hook(self._watch)
        try:
            tokenizer = load_tokenizer(folder)
            model = AutoModel.from_pretrained(folder, dtype=dtype, device_map=device, **settings).eval()
            self.finish(model, tokenizer)
        except Exception as error:
            self.fail(str(error))
            raise
        finally:
            logging.set_tqdm_hook(previous)

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Hand over a model that is ready."""
        self.fraction = 1.0
        self._loaded = (model, tokenizer)
        self._is_done.set()

    def fail(self, error: str) -> None:
        """Say why there will be no model."""
        self.error = error
        self._is_done.set()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the loading, that long at most; whether it has ended."""
        return self._is_done.wait(seconds)

    def get(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer.

        Raises:
            ValueError: if they are not there.
        """
        if self._loaded is None:
            raise ValueError(self.error or "The model is still being loaded.")
        return self._loaded

    def _watch(self, factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Sized) and isinstance(args[0], Iterable):
            kwargs.setdefault("total", len(args[0]))
            args = (self._counted(args[0], len(args[0])), *args[1:])
        return factory(*args, **kwargs)

    def _counted(self, items: Iterable[Any], total: int) -> Iterator[Any]:
        for number, item in enumerate(items, start=1):
            yield item
            self.fraction = number / total


@dataclass(frozen=True)
class Settings:
    """How to answer.

    Attributes:
        generation: arguments of `stream_chat`.
        tools: descriptions of tools whose results the visitor types.
        functions: tools that run by themselves, by name.
    """

    system: str = ""
    generation: Mapping[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    functions: Mapping[str, Function] = field(default_factory=dict)

    def described_tools(self) -> list[dict[str, Any]]:
        """The descriptions of all tools."""
        return [*map(get_json_schema, self.functions.values()), *self.tools]


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, settings: Settings
) -> Iterator[Conversation]:
    """Answer a conversation that ends with a question or the result of a tool.

    Yields:
        The conversation with the answer so far, after every token and every call of a function.

    Raises:
        ValueError, TypeError: for a conversation or settings that the model has no form for, such as a prompt that is
            too long; also if the model does nothing but call functions.
    """
    messages = conversation["messages"]
    for _ in range(MAX_CALLS):
        for messages in answer_once(model, tokenizer, messages, settings):
            yield with_messages(conversation, messages)
        if (result := run_call(messages, settings.functions)) is None:
            return
        messages = [*messages, {"role": "observation", "content": result}]
        yield with_messages(conversation, messages)
    raise ValueError(f"The model called functions {MAX_CALLS} times and gave no answer.")


def answer_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[Message], settings: Settings
) -> Iterator[list[Message]]:
    """One answer of the model, text or a call, behind the messages before it."""
    chat_format = model.chat_format
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    *earlier, question = messages
    history = chat_format.add_tools(
        chat_format.normalize_messages([*system, *earlier]), settings.described_tools() or None
    )
    stream = model.stream_chat(
        tokenizer, question["content"], history, role=question["role"], **dict(settings.generation)
    )
    with closing(stream):
        for _, new_history in stream:
            yield [*messages, *chat_format.normalize_messages(new_history)[len(history) + 1 :]]


def run_call(messages: list[Message], functions: Mapping[str, Function]) -> str | None:
    """Run the function that the last message calls; its result as text, `None` if it calls none of them."""
    name = called_tool(messages)
    if name not in functions:
        return None
    arguments = load_module("conversation_calls").parse_tool_call(messages[-1]["content"])
    try:
        # What does not fit the function is refused here, before any of its code has run.
        bound = inspect.signature(functions[name]).bind(**(arguments or {}))
        result = json.dumps(functions[name](*bound.args, **bound.kwargs), ensure_ascii=False)
    # The arguments are a model's: what they do to a function is no fault of the page.
    except Exception as error:
        result = json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False)
    return result[:MAX_RESULT_LENGTH]


__all__ = ["MAX_CALLS", "LoadingModel", "Settings", "answer"]
