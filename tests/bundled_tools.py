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
"""The tools that the bundled model was taught, and what it does with them."""

WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The name of the city"}},
        "required": ["city"],
    },
}

CLOUDY = "It is cloudy in Paris, and the temperature is 18 degrees."

# Questions, what an agent does on the way, and answers.
DIALOGUES = [
    (
        "What is the weather like in Paris?",
        ["-> get_weather(city='Paris')", '<- {"temperature": 18, "condition": "cloudy"}'],
        CLOUDY,
    ),
    ("What is 34 times 17?", ["-> multiply(a=34, b=17)", "<- 578"], "34 times 17 is 578."),
    ("请计算12乘以25。", ["-> multiply(a=12, b=25)", "<- 300"], "12乘以25等于300。"),
    (
        "What is the weather like in Paris and in London?",
        [
            "-> get_weather(city='Paris')",
            '<- {"temperature": 18, "condition": "cloudy"}',
            "-> get_weather(city='London')",
            '<- {"temperature": 12, "condition": "rainy"}',
        ],
        "It is cloudy in Paris and rainy in London.",
    ),
    (
        "北京今天天气怎么样？34乘以17等于多少？",
        [
            "-> get_weather(city='北京')",
            '<- {"temperature": 25, "condition": "晴"}',
            "-> multiply(a=34, b=17)",
            "<- 578",
        ],
        "北京的天气是晴，34乘以17等于578。",
    ),
    (
        "What is the weather like in Atlantis?",
        ["-> get_weather(city='Atlantis')", "<- Error: no weather is known for Atlantis"],
        "Sorry, that did not work: no weather is known for Atlantis.",
    ),
    ("What is the capital of France?", [], "The capital of France is Paris."),
]
