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
"""Functions that a model may call: what describes them to it, and how a call becomes a result.

A function becomes a tool by the decorator `tool`. The library's `get_json_schema` makes the description out of its type
hints and its docstring, in Google's style:

    @tool
    def get_weather(city: str) -> dict:
        \"""Get the current weather in a city

        Args:
            city: The name of the city
        \"""

A call is what a model wrote, so anything may be in it. Whatever is wrong with it, and whatever a function raises, goes
back to the model as its result; nothing is raised.
"""

import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import get_json_schema


# Of a result, so that it does not fill what the model can read.
MAX_RESULT_LENGTH = 4000
JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Call:
    """What a model wants to have run.

    Attributes:
        name: the tool.
        arguments: its arguments; text for a tool that is called with text, such as a code interpreter.
        identifier: what an API wants to see beside the result.
    """

    name: str
    arguments: dict[str, Any] | str
    identifier: str = ""

    def __str__(self) -> str:
        if isinstance(self.arguments, str):
            return f"{self.name}: {self.arguments}"
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


@dataclass(frozen=True)
class Tool:
    """A function and its description. Called in a program, it is the function.

    Attributes:
        description: in OpenAI's form; a type alone for a tool that is built into a model.
        function: what runs.
        takes_text: whether a model may write text instead of arguments.
    """

    description: dict[str, Any]
    function: Callable[..., Any]
    takes_text: bool = False

    @property
    def name(self) -> str:
        """What a model calls it. A built-in tool is offered by its type alone."""
        return self.description.get("function", {}).get("name") or self.description["type"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def tool(function: Callable[..., Any]) -> Tool:
    """Make a function a tool.

    Raises:
        ValueError: if a type hint or a part of the docstring is missing.
    """
    try:
        description = get_json_schema(function)
    except Exception as error:  # The library's own kinds of exceptions, two in 5.23, are not public.
        name = getattr(function, "__name__", repr(function))
        raise ValueError(f"the function {name} cannot be described to a model: {error}") from error
    # No model was taught to read what comes back.
    description["function"].pop("return", None)
    return Tool(description, function)


def load_tools(file: Path) -> list[Tool]:
    """Run a Python file of the user's and return its tools.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it has no tools.
    """
    specification = importlib.util.spec_from_file_location(file.stem, file)
    if specification is None or specification.loader is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except OSError:
        raise
    except Exception as error:  # Anything may be in a program.
        raise ValueError(f"{file} cannot be run: {error}") from error
    tools = [value for value in vars(module).values() if isinstance(value, Tool)]
    if not tools:
        raise ValueError(f"{file} has no function with the decorator @tool")
    return tools


class Toolbox:
    """The tools that a model is offered, by name.

    Raises:
        ValueError: if two have the same name.
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.tools: dict[str, Tool] = {}
        for item in tools:
            if item.name in self.tools:
                raise ValueError(f"two tools have the name {item.name!r}")
            self.tools[item.name] = item

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """All of them in OpenAI's form."""
        return [item.description for item in self.tools.values()]

    def run(self, call: Call) -> str:
        """What a call gives, as text; what went wrong begins with `Error:`."""
        try:
            result = self._run(call)
            # A result may have no form in JSON.
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except Exception as error:
            text = f"Error: {error}" if str(error) else f"Error: {type(error).__name__}"
        if len(text) > MAX_RESULT_LENGTH:
            text = f"{text[:MAX_RESULT_LENGTH]} (and {len(text) - MAX_RESULT_LENGTH} characters more)"
        # Half of a surrogate pair could not be encoded.
        return text.encode(errors="replace").decode()

    def _run(self, call: Call) -> Any:
        if call.name not in self.tools:
            raise ValueError(f"there is no tool {call.name}, only {', '.join(self.tools)}")
        item = self.tools[call.name]
        if isinstance(call.arguments, str):
            if not item.takes_text:
                raise ValueError(f"the arguments of {call.name} must be a JSON object")
            return item(call.arguments)
        check_arguments(item, call.arguments)
        return item(**call.arguments)


def check_arguments(item: Tool, arguments: dict[str, Any]) -> None:
    """Compare the names and types of arguments with what a function takes.

    Raises:
        TypeError, ValueError: for the first that does not fit.
    """
    inspect.signature(item.function).bind(**arguments)
    properties = item.description.get("function", {}).get("parameters", {}).get("properties", {})
    for name, value in arguments.items():
        schema = properties.get(name, {})
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if schema.get("nullable"):
            kinds = [*kinds, "null"]
        if not kinds:
            continue
        # In Python, True is an integer.
        fits = isinstance(value, tuple(kind for name in kinds for kind in JSON_TYPES.get(name, (object,))))
        if not fits or (isinstance(value, bool) and "boolean" not in kinds):
            raise TypeError(f"the argument {name} must be {' or '.join(kinds)}, got {value!r}")
        if "enum" in schema and value not in schema["enum"]:
            raise ValueError(f"the argument {name} must be one of {schema['enum']}, got {value!r}")
