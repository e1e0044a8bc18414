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
"""What may a request ask for? Bodies of both doors become `Settings`; what a field cannot mean here is refused by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from .answers import Settings
from .errors import RequestError
from .models import ServedModel


# Stop strings of a request at most, and characters of each.
MAX_STOPS, MAX_STOP_LENGTH = 16, 1000

# Fields of OpenAI's that this server does not follow, with the values that ask for what happens anyway.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "chat_template_kwargs": (None, {}),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None,),
    "functions": (None,),
    "generation_config": (None,),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "auto", "none"),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Labels for whoever pays; they change no answer.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")
SHARED_FIELDS = ("model", "max_tokens", "temperature", "top_p", "stop", "stream", "stream_options", "seed")
CHAT_FIELDS = ("messages", "tools", "max_completion_tokens", *SHARED_FIELDS)
COMPLETION_FIELDS = ("prompt", *SHARED_FIELDS)
TUTORIAL_FIELDS = ("prompt", "image", "history", "max_length", "top_p", "temperature")

# The tutorials' own.
TUTORIAL_MAX_LENGTH = 2048
# OpenAI's own for `/v1/completions`.
COMPLETION_TOKENS = 16


def check_fields(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse fields that would be ignored.

    Raises:
        RequestError: that names the field.
    """
    for name, value in body.items():
        if name in known or name in LABELS:
            continue
        if name not in HARMLESS:
            raise RequestError(f"There is no field {name!r:.100}; there is {', '.join(known)}.", f"{name:.100}")
        if not any(type(value) is type(harmless) and value == harmless for harmless in HARMLESS[name]) and not (
            isinstance(value, float) and value in HARMLESS[name]
        ):
            allowed = " or ".join(repr(harmless) for harmless in HARMLESS[name] if harmless is not None)
            remedy = f"Leave it out{', or give ' + allowed if allowed else ''}."
            raise RequestError(f"{name!r} is not supported with the value {value!r:.100}. {remedy}", name)


def read_number(
    body: Mapping[str, Any],
    name: str,
    default: Any,
    is_valid: Callable[[Any], bool],
    expected: str,
    is_whole: bool = False,
) -> Any:
    """A number of the body, or the default where it is missing or null.

    Raises:
        RequestError: for anything else than such a number.
    """
    value = body.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int) or (isinstance(value, float) and not is_whole and math.isfinite(value))
    if isinstance(value, bool) or not is_number or not is_valid(value):
        raise RequestError(f"{name!r} must be {expected}, not {value!r:.100}.", name)
    return value if is_whole else float(value)


def read_flag(body: Mapping[str, Any], name: str) -> bool:
    """A boolean of the body; missing and null are false."""
    value = body.get(name)
    if not isinstance(value, (bool, type(None))):
        raise RequestError(f"{name!r} must be true or false, not {value!r:.100}.", name)
    return bool(value)


def read_usage_wanted(body: Mapping[str, Any]) -> bool:
    """Whether a stream ends with the number of tokens."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not body.get("stream"):
        raise RequestError("'stream_options' belongs to 'stream': true.", "stream_options")
    if not isinstance(options, Mapping) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise RequestError(f"'stream_options' may hold 'include_usage', not {options!r:.100}.", "stream_options")
    return read_flag(options, "include_usage")


def read_stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop strings of a body: one, or a list of them."""
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_list or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise RequestError(
            f"'stop' must be a text or a list of up to {MAX_STOPS} texts, each of 1 to {MAX_STOP_LENGTH} characters, "
            f"not {value!r:.100}.",
            "stop",
        )
    return tuple(stops)


def read_sampling(body: Mapping[str, Any], served: ServedModel) -> dict[str, Any]:
    """`temperature` and `top_p`: the request's, or what the checkpoint does by itself.

    Raises:
        RequestError: for other values, and for a seed where tokens are drawn: requests of one batch share the draws.
    """
    defaults = served.default_sampling
    temperature = read_number(
        body, "temperature", None, lambda value: 0 <= value <= 100, "a number from 0 (always the likeliest token) on"
    )
    top_p = read_number(body, "top_p", None, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    # Whoever asks for `top_p` alone wants tokens to be drawn.
    if temperature is None:
        temperature = defaults["temperature"] if top_p is None or defaults["temperature"] > 0 else 1.0
    top_p = defaults["top_p"] if top_p is None else top_p
    if temperature < 1e-4 or top_p == 0:
        temperature, top_p = 0.0, 1.0
    seed = read_number(body, "seed", None, lambda value: True, "a whole number", is_whole=True)
    if seed is not None and temperature > 0:
        raise RequestError("'seed' is supported with 'temperature': 0 only, where it changes nothing.", "seed")
    return {"temperature": temperature, "top_p": top_p}


def read_settings(
    body: Mapping[str, Any], served: ServedModel, room: int, names: tuple[str, ...], default: int | None = None
) -> Settings:
    """The settings of a request of OpenAI's.

    Args:
        room: how many tokens an answer may have after this prompt; more are not refused, but not generated either.
        names: the fields that may hold the number of tokens, the first of them that is given counts.
        default: that number where none is given.
    """
    wanted = default
    for name in reversed(names):
        wanted = read_number(
            body, name, wanted, lambda value: value >= 1, "a whole number of at least 1", is_whole=True
        )
    return Settings(
        max_new_tokens=room if wanted is None else min(wanted, room),
        stop=read_stops(body),
        **read_sampling(body, served),
    )


def read_tutorial_settings(body: Mapping[str, Any], served: ServedModel, prompt_length: int, room: int) -> Settings:
    """The settings of a request of the tutorials, whose `max_length` counts the prompt."""
    longest = read_number(
        body,
        "max_length",
        None,
        lambda value: value > prompt_length,
        f"a whole number that counts the prompt, and so more than its {prompt_length} tokens",
        is_whole=True,
    )
    if longest is None:
        longest = TUTORIAL_MAX_LENGTH if prompt_length < TUTORIAL_MAX_LENGTH else prompt_length + room
    return Settings(max_new_tokens=min(longest - prompt_length, room), **read_sampling(body, served))
