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
"""What may come in from outside, as strategies of hypothesis: texts, values, messages, tools, ids.

What is unusual here:

- A text is put together from what some part of the code looks for (control tokens, marks, the beginning of a call) and
  from anything else, so that combinations come up that random characters would never make.
- Beside the values of JSON there are those that only a Python caller can give: cycles, nesting deeper than Python's
  stack, sets, bytes, numbers of any size.
- `make test` runs the same few inputs each time, `make fuzz` many new ones: as many of each kind as $FUZZ_EXAMPLES says.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


NUM_EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
settings.register_profile(
    "hostile",
    max_examples=int(NUM_EXAMPLES or 12),
    derandomize=NUM_EXAMPLES is None,
    # A busy machine is slow, and the values are large on purpose.
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
settings.load_profile("hostile")

JOINER = "\u2060"
# What the code looks for in texts.
FRAGMENTS = [
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>", "<|begin_of_image|>"),
    *("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "sop", "eop", "<s>", "</s>", "<unk>", "<pad>", "<ENC>"),
    *("<image_0>", "<n>", "<|tab|>", "<|blank_3|>", "<|blank_99|>", "<0x0A>", "<0xFF>", "\u2581", "Ġ", "\ufffd"),
    *(JOINER, 2 * JOINER, f"<{JOINER}|user|>", f"[{JOINER}gMASK]", f"{JOINER}\n", "[gMASK]sop", "[gMASK]<sop>"),
    *(
        "\n",
        "\r\n",
        "\t",
        "   ",
        "[Round 0]\n问：",
        "[Round 1]\n\n问：",
        "\n答：",
        "\n\n答：",
        "\u2028",
        "\x00",
        "\x85",
    ),
    *("```python\ntool_call(", "```json\n", "```", "tool_call(", "a=", "b = ", ")", "(", "[", "]", "{", "}", ",", ":"),
    *("'", '"', "'''", '"""', "\\", r"\n", r"\x41", r"\u4e2d", r"\N{BULLET}", r"\ud800", "#", "-", "0x", "1e9", "1_0"),
    *(
        "True",
        "None",
        "null",
        "NaN",
        "-Infinity",
        "9" * 400,
        "__import__('os').system('true')",
        "f\n",
        "simple_browser\n",
    ),
    *(
        '{"a": ',
        '{"name": "f", "arguments": {}}',
        "{{ 7 * 7 }}",
        "{% for x in y %}",
        "%s",
        "{0.__class__}",
        "[[训练时间]]",
    ),
    *("你好", "，", "中!文", "é", "e\u0301", "😀", "\u202e", "\ud83d\ude00", "ﷺ", "İ"),
]
HALF_CHARACTERS = ["\ud800", "\udfff", "\udc80"]


def texts(max_size: int = 12) -> st.SearchStrategy[str]:
    """Texts made of fragments, some of them with half of a surrogate pair, some long."""
    piece = st.one_of(
        st.sampled_from(FRAGMENTS),
        st.sampled_from(FRAGMENTS),
        st.text(max_size=6),
        st.sampled_from(HALF_CHARACTERS),
    )
    short = st.lists(piece, max_size=max_size).map("".join)
    long = st.builds(lambda part, times, rest: part * times + rest, piece, st.integers(2, 200), short)
    return st.one_of(short, short, short, long)


def whole_texts(max_size: int = 12) -> st.SearchStrategy[str]:
    """Texts that have a UTF-8 form."""
    return texts(max_size).map(lambda text: text.encode(errors="replace").decode())


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, -(2**70), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(FRAGMENTS),
)


def json_values(max_leaves: int = 8) -> st.SearchStrategy[Any]:
    """What a JSON reader may give, its `NaN` included."""
    return st.recursive(
        SCALARS,
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FRAGMENTS) | st.text(max_size=8), inner)
        ),
        max_leaves=max_leaves,
    )


def nested(value: Any, depth: int, as_dict: bool = False) -> Any:
    """`value` inside of `depth` lists or dicts."""
    for _ in range(depth):
        value = {"a": value} if as_dict else [value]
    return value


def cycle(as_dict: bool) -> Any:
    """A list or a dict that holds itself."""
    value: Any = {} if as_dict else []
    value.update(a=[value]) if as_dict else value.append({"a": value})
    return value


DEEP = st.builds(nested, st.sampled_from([0, "a"]), st.sampled_from([40, 150, 400, 900, 5000]), st.booleans())
CYCLES = st.builds(cycle, st.booleans())
ONLY_PYTHON = st.one_of(
    st.binary(max_size=4),
    st.sets(st.integers(), max_size=2),
    st.tuples(st.integers(), st.text(max_size=3)),
    st.builds(complex, st.integers(0, 3), st.integers(0, 3)),
    st.builds(object),
    st.builds(lambda: iter(())),
    st.builds(lambda: np.zeros(2)),
    st.builds(lambda: torch.zeros(2)),
    st.builds(lambda: {(1, 2): 3, None: 4}),
)


def values() -> st.SearchStrategy[Any]:
    """Anything that a Python caller may give."""
    return st.one_of(json_values(), json_values(), ONLY_PYTHON, DEEP, CYCLES)


def calls() -> st.SearchStrategy[Any]:
    """A tool call in OpenAI's form, well-formed or not."""
    arguments = st.one_of(st.dictionaries(texts(2), values(), max_size=3), texts(4), values())
    function = st.fixed_dictionaries({}, optional={"name": st.one_of(texts(2), values()), "arguments": arguments})
    call = st.fixed_dictionaries(
        {}, optional={"id": values(), "type": values(), "function": st.one_of(function, values())}
    )
    return st.one_of(call, function, values())


def tools() -> st.SearchStrategy[Any]:
    """What may be given as `tools`."""
    schema = st.fixed_dictionaries(
        {},
        optional={
            "name": st.one_of(texts(2), values()),
            "description": st.one_of(texts(3), values()),
            "parameters": st.one_of(
                values(), st.dictionaries(st.sampled_from(["type", "properties", "$ref", "required"]), values())
            ),
        },
    )
    wrapped = st.fixed_dictionaries(
        {"type": st.one_of(st.sampled_from(["function", "python", "cogview", "code"]), values())},
        optional={"function": st.one_of(schema, values())},
    )
    tool = st.one_of(schema, wrapped, values())
    return st.one_of(st.lists(tool, max_size=3), st.dictionaries(texts(2), tool, max_size=3), values())


def contents() -> st.SearchStrategy[Any]:
    """What may be given as the content of a message."""
    part = st.fixed_dictionaries(
        {"type": st.one_of(st.just("text"), values())}, optional={"text": st.one_of(texts(), values()), "x": values()}
    )
    return st.one_of(texts(), texts(), st.lists(st.one_of(part, values()), max_size=3), values())


def messages() -> st.SearchStrategy[Any]:
    """One message of a history, well-formed or not."""
    roles = st.sampled_from(["system", "user", "assistant", "observation", "tool"])
    message = st.fixed_dictionaries(
        {"role": st.one_of(roles, roles, roles, values())},
        optional={
            "content": contents(),
            "metadata": st.one_of(texts(3), values()),
            "tools": tools(),
            "tool_calls": st.one_of(st.lists(calls(), max_size=2), values()),
            "name": values(),
        },
    )
    plain = st.fixed_dictionaries({"role": roles, "content": texts()})
    return st.one_of(plain, plain, message, st.tuples(texts(), texts()), values())


def histories() -> st.SearchStrategy[Any]:
    """What may be given as a conversation."""
    return st.one_of(st.lists(messages(), max_size=4), conversations(), values())


def conversations() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rounds that every generation can write, ending with a question."""
    rounds = st.lists(st.tuples(whole_texts(), whole_texts()), max_size=2)

    def written(system: str | None, said: list[tuple[str, str]], question: str) -> list[dict[str, Any]]:
        chat = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in said:
            chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*chat, {"role": "user", "content": question}]

    return st.builds(written, st.none() | whole_texts(), rounds, whole_texts())


def answers() -> st.SearchStrategy[str]:
    """What a model may write: fragments, or a call with arguments that are nearly literals."""
    arguments = st.lists(texts(4), max_size=4).map(", ".join)
    heads = st.sampled_from(["", "f", " f ", "\n", "simple_browser", "a b", "<|assistant|>"])
    bodies = st.sampled_from(["```python\ntool_call({})\n```", "tool_call(a={})", '{{"a": {}}}', "{}"])
    return st.one_of(
        texts(20),
        st.builds(lambda head, body, inside: f"{head}\n{body.format(inside)}", heads, bodies, arguments),
        st.builds(
            lambda head, mark, depth: f"{head}\n" + (mark * depth),
            st.sampled_from(['f\n{"a":', "f\n```python\ntool_call(a="]),
            st.sampled_from(["[", "{", '{"a":', "(", "'\\", "[[1,"]),
            st.integers(1, 3000),
        ),
    )


def ids() -> st.SearchStrategy[Any]:
    """What may be given to `decode`."""
    number = st.one_of(st.integers(0, 700), st.integers(0, 160_000), st.integers())
    row = st.lists(number, max_size=8)
    small = st.lists(st.integers(-5, 700), max_size=6)
    rows = st.lists(small, min_size=2, max_size=2).filter(lambda pair: len(pair[0]) == len(pair[1]))
    made: list[Callable[[Any], Any]] = [np.array, torch.tensor, tuple, lambda given: {"input_ids": given}]
    arrays = st.builds(lambda make, given: make(given), st.sampled_from(made), st.one_of(small, rows))
    return st.one_of(number, row, st.lists(row, max_size=3), arrays, st.lists(st.one_of(number, values())), values())


# What a program does when it runs code, starts a program, or reads and sends what nobody asked for.
FORBIDDEN = (
    *("exec", "compile", "import", "open", "marshal.loads", "pickle.find_class", "ctypes.dlopen", "os.system"),
    *("os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo"),
)
watched: list[list[str]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watched and event in FORBIDDEN:
        watched[-1].append(f"{event} {arguments!r:.200}")


sys.addaudithook(_audit)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail if the code inside compiles or runs Python, starts a program, or opens a file or a connection."""
    watched.append([])
    try:
        yield
    finally:
        events = watched.pop()
    assert events == []


def same(first: Any, second: Any) -> bool:
    """Whether two values of JSON are the same, where `NaN` equals itself."""
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first):
        return math.isnan(second)
    return type(first) is type(second) and first == second
