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
"""How far is the model that the web page waits for?

The page is up before the model is. The library shows its progress in the terminal by `tqdm`; a hook of the library's
sees the same bars here.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from local_code import load_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .models import LoadSettings, load_base


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

    def load(self, settings: LoadSettings) -> None:
        """Load a checkpoint folder.

        Raises:
            ValueError: with what the libraries say, which visitors see too.
        """
        previous = logging.set_tqdm_hook(self._watch)
        try:
            self.finish(load_base(settings).eval(), load_tokenizer(settings.folder))
        # Libraries raise kinds of their own, such as safetensors for a file that was cut off.
        except Exception as error:
            self.fail(str(error))
            raise ValueError(f"{settings.folder} cannot be loaded: {error}") from error
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


__all__ = ["LoadingModel"]
