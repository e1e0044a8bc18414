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
"""The functions of the web page: tools that run by themselves when the model calls them.

Add yours to `FUNCTIONS`. The type hints and the docstring become the description that the model reads, by the library's
`get_json_schema`; the arguments are what a model wrote, so check them.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any


def get_current_time(utc_offset: float) -> dict[str, str]:
    """
    Get the current date and time of a place on earth.

    Args:
        utc_offset: The hours between its time and UTC, such as 8 for Beijing and -5 for New York in winter
    """
    now = datetime.now(UTC) + timedelta(hours=utc_offset)
    return {"date": now.strftime("%Y-%m-%d"), "weekday": now.strftime("%A"), "time": now.strftime("%H:%M")}


def calculate(left: float, operator: str, right: float) -> dict[str, float]:
    """
    Calculate with two numbers.

    Args:
        left: The first number
        operator: What to do with the numbers (choices: ["+", "-", "*", "/"])
        right: The second number
    """
    if operator == "/":
        return {"result": left / right}
    results = {"+": left + right, "-": left - right, "*": left * right}
    return {"result": results[operator]}


FUNCTIONS: dict[str, Callable[..., Any]] = {function.__name__: function for function in (get_current_time, calculate)}

__all__ = ["FUNCTIONS"]
