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
"""How long the reading of 10,000 hostile answers and the writing of 1,000 hostile messages takes: `make fuzz`.

The longest of each kind is printed; 50 ms are the bound, on a machine that does nothing else.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
from generations import GENERATION_CASES
from hostile import answers, histories, tools
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st


pytestmark = pytest.mark.grid

GENERATE_ONLY = {
    "phases": [Phase.generate],
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
}


class Longest:
    """The longest call so far, and how many there were."""

    def __init__(self) -> None:
        self.seconds, self.count, self.size = 0.0, 0, 0

    def measure(self, call: Callable[[], Any], size: int) -> None:
        start = time.process_time()
        try:
            call()
        except (ValueError, TypeError):
            pass
        seconds = time.process_time() - start
        self.count += 1
        if seconds > self.seconds:
            self.seconds, self.size = seconds, size


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_how_long_hostile_input_takes(case_tokenizer: Callable[[str], Any], name: str, capsys: Any) -> None:
    tokenizer = case_tokenizer(name)
    chat_format = tokenizer.chat_format
    offered = [] if chat_format.uses_pairs else [{"role": "system", "content": "s", "tools": []}]
    reading, library, writing, rendering = Longest(), Longest(), Longest(), Longest()
    tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)

    @settings(max_examples=10_000, **GENERATE_ONLY)
    @given(text=answers())
    def read(text: str) -> None:
        reading.measure(lambda: chat_format.read_answer(text, offered), len(text))
        if tokenizer.response_template is not None and len(text) <= 4000:
            library.measure(lambda: tokenizer.parse_response(text, prefix=""), len(text))

    @settings(max_examples=1000, **GENERATE_ONLY)
    @given(chat=histories(), tool=st.none() | tools())
    def write(chat: Any, tool: Any) -> None:
        size = sum(len(str(message)) for message in chat) if isinstance(chat, list) and len(chat) < 5 else 0
        if size > 20_000:
            return
        for longest, tokenize in ((writing, True), (rendering, False)):
            longest.measure(
                lambda: tokenizer.apply_chat_template(chat, tools=tool, tokenize=tokenize, add_generation_prompt=True),
                size,
            )

    # A collection of the whole heap would count as the call it falls into.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        read()
        write()
    finally:
        gc.enable()
        gc.unfreeze()
    with capsys.disabled():
        for label, longest in (
            ("answers read", reading),
            ("answers read by the library", library),
            ("conversations encoded", writing),
            ("conversations rendered", rendering),
        ):
            print(
                f"\n{name}: {longest.count} {label}, longest {1000 * longest.seconds:.1f} ms ({longest.size})", end=""
            )
    assert reading.count == 10_000 and writing.count > 500
