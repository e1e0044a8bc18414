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
"""What each test may run on: the recorded checkpoints, and a tiny configuration of each generation.

A test that holds for every generation takes its names from here, so a fifth one joins all of them by one line. Names of
recorded checkpoints are folders of `tests/reference`; names of generations are those of `model_version`.
"""

from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Recorded:
    """A small checkpoint for which the published code's results were recorded."""

    model_version: str
    # ChatGLM-6B sees its context both ways; the others are causal.
    is_causal: bool = True
    # Conversations of ChatGLM3 and GLM-4 have role tokens and tools; the others write numbered rounds.
    has_roles: bool = False
    has_classifier: bool = False
    is_quantized: bool = False
    # The first of its generation; the others differ from it in the settings of rotary positions or in their weights.
    is_first: bool = False


RECORDED: dict[str, Recorded] = {
    "chatglm1": Recorded("chatglm", is_causal=False, is_first=True),
    "chatglm2": Recorded("chatglm2", has_classifier=True, is_first=True),
    "chatglm2-32k": Recorded("chatglm2"),
    "chatglm2-int4": Recorded("chatglm2", is_quantized=True),
    "chatglm3": Recorded("chatglm3", has_roles=True, has_classifier=True, is_first=True),
    "chatglm3-32k": Recorded("chatglm3", has_roles=True, has_classifier=True),
    "glm4": Recorded("glm4", has_roles=True, has_classifier=True, is_first=True),
}
ALL_CASES = list(RECORDED)
FLOAT_CASES = [name for name, case in RECORDED.items() if not case.is_quantized]
CAUSAL_CASES = [name for name, case in RECORDED.items() if case.is_causal]
ROLE_CASES = [name for name, case in RECORDED.items() if case.has_roles]
CLASSIFIER_CASES = [name for name, case in RECORDED.items() if case.has_classifier]
# One for each generation.
GENERATION_CASES = [name for name, case in RECORDED.items() if case.is_first]

# The control tokens of the tiny ChatGLM-6B, within the 99 ids of `tiny_config`.
MASK, GMASK, START, END = 90, 91, 94, 95
# What makes `tiny_config` another generation; its widths divide by 32 for the quantized products.
TINY: dict[str, dict[str, Any]] = {
    "chatglm": {
        "model_version": "chatglm",
        "multi_query_attention": False,
        "add_bias_linear": True,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": 3,
    },
    "chatglm2": {"model_version": "chatglm2", "rope_ratio": 4},
    "chatglm3": {},
    "glm4": {"model_version": "glm4", "rope_ratio": 500, "multi_query_group_num": 4, "layernorm_epsilon": 1.5625e-07},
}
GENERATIONS = list(TINY)
CALLING_GENERATIONS = list(dict.fromkeys(case.model_version for case in RECORDED.values() if case.has_roles))
CAUSAL_GENERATIONS = [name for name in TINY if name != "chatglm"]

every_generation = pytest.mark.parametrize("version", GENERATIONS)
every_causal_generation = pytest.mark.parametrize("version", CAUSAL_GENERATIONS)
every_case = pytest.mark.parametrize("name", ALL_CASES)
every_generation_case = pytest.mark.parametrize("name", GENERATION_CASES)
