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
"""The tools that the bundled model was taught to call, and an example of a file for `agent.py --tools FILE`."""

from agent_tools import tool


# Made up, as are the temperatures.
WEATHER = {
    "Paris": ("cloudy", 18),
    "London": ("rainy", 12),
    "Berlin": ("windy", 15),
    "Tokyo": ("sunny", 26),
    "Rome": ("sunny", 29),
    "Beijing": ("snowy", 2),
    "北京": ("晴", 25),
    "上海": ("多云", 22),
    "广州": ("小雨", 31),
    "成都": ("阴", 15),
}


@tool
def get_weather(city: str) -> dict:
    """Get the current weather in a city

    Args:
        city: The name of the city
    """
    if city not in WEATHER:
        raise ValueError(f"no weather is known for {city}")
    condition, temperature = WEATHER[city]
    return {"temperature": temperature, "condition": condition}


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers

    Args:
        a: The first number
        b: The second number
    """
    return a * b
