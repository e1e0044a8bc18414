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
"""What becomes of arguments that were written for the published code.

What is unusual here:

- The published `chat` and `stream_chat` of each generation take their arguments in an order of their own, which is a
  field of the `ConversationFormat`. Given by position, they find their names here.
- The published `chat` refused a keyword that nothing knows, and so does ours, before anything runs. The published
  streaming ignored it; here it is dropped with a warning.
- Where the published code got a tensor from the tokenizer, Transformers 5 gives it a mapping with the tensor inside.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

from transformers import GenerationConfig, GenerationMixin
from transformers.utils import TransformersKwargs, logging


logger = logging.get_logger(__name__)

# Names that other programs have for what `generate` can do.
NAMES_ELSEWHERE = {"stop": "stop_strings", "stop_sequences": "stop_strings", "max_tokens": "max_new_tokens"}


def takes_published_order(arguments: str) -> Callable[[Callable], Callable]:
    """Let a method `(self, tokenizer, query, ...)` take what follows by position as the published one does.

    Args:
        arguments: the field of the model's `ConversationFormat` that has the order.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(self: Any, tokenizer: Any, query: Any, *values: Any, **given: Any) -> Any:
            order = getattr(self.chat_format, arguments)
            return method(self, tokenizer, query, **name_arguments(method.__name__, order, values, given))

        return wrapper

    return decorate


def name_arguments(
    method: str, order: tuple[str, ...], values: tuple[Any, ...], given: dict[str, Any]
) -> dict[str, Any]:
    """Arguments that were given by position and by name, all by name.

    Raises:
        TypeError: if there are more than the published method takes, or one is given twice.
    """
    # A role may stand behind the history in every generation. No other argument there is a text.
    if "role" not in order and len(values) > 1 and isinstance(values[1], str):
        order = (order[0], "role", *order[1:])
    if len(values) > len(order):
        raise TypeError(
            f"`{method}` takes {len(order) + 2} positional arguments at most, got {len(values) + 2}. They are tokenizer, "
            f"query, {', '.join(order)}."
        )
    named = dict(zip(order, values))
    if twice := named.keys() & given.keys():
        raise TypeError(f"`{method}` got `{min(twice)}` twice, by position and by name.")
    return named | given


def unknown_settings(model: Any, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The names among settings for `generate` that nothing knows, each with what may have been meant.

    Args:
        model: ours, not one of PEFT around it.
        settings: the arguments. A `custom_generate` may take any.
    """
    if settings.get("custom_generate") is not None:
        return
    known = {"tokenizer", "assistant_tokenizer", "trust_remote_code", *TransformersKwargs.__optional_keys__}
    known |= {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for method in (GenerationMixin.generate, model.prepare_inputs_for_generation, model.forward):
        parameters = inspect.signature(method).parameters.values()
        known |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    for name in settings.keys() - known:
        close = difflib.get_close_matches(name, known, 1, 0.8)
        meant = NAMES_ELSEWHERE.get(name) or next(iter(close), None)
        yield name, f"`{name}`" + (f" (did you mean `{meant}`?)" if meant else "")


def refuse_unknown_settings(model: Any, settings: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names what nothing knows."""
    if hints := [hint for name, hint in unknown_settings(model, settings) if settings[name] is not None]:
        raise ValueError(f"Neither this model nor `generate` knows the argument {', '.join(sorted(hints))}.")


def drop_unknown_settings(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without what nothing knows, which a warning names."""
    unknown = dict(unknown_settings(model, settings))
    if hints := [hint for name, hint in unknown.items() if settings[name] is not None]:
        logger.warning_once(
            f"Ignored, as neither this model nor `generate` knows the argument: {', '.join(sorted(hints))}."
        )
    return {name: value for name, value in settings.items() if name not in unknown}


def unpack_encoding(inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Take apart what a tokenizer returned, if it stands where `generate` wants ids.

    Args:
        inputs: what was given as `inputs`, maybe nothing.
        kwargs: the other arguments of `generate`, of which `input_ids` may be such a mapping. They win over it.
    """
    encoding = kwargs.get("input_ids") if inputs is None else inputs
    if not isinstance(encoding, Mapping) or "input_ids" not in encoding:
        return inputs, kwargs
    others = {name: value for name, value in encoding.items() if kwargs.get(name) is None}
    return None, {**kwargs, **others, "input_ids": encoding["input_ids"]}


__all__ = [
    "drop_unknown_settings",
    "name_arguments",
    "refuse_unknown_settings",
    "takes_published_order",
    "unknown_settings",
    "unpack_encoding",
]
