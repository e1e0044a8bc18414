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
"""Whatever stands in a config.json: it is a configuration that saves and loads, or refused with a message."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generations import GENERATION_CASES
from hostile import SCALARS, json_values, same
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st


pytestmark = pytest.mark.floor

# The library's own checks of types raise the last one, with the field and the value.
REFUSALS = (ValueError, TypeError, StrictDataclassError)
SIZES = [0, 1, 2, 3, 4, 8, 64, -1, 2**31, 10**30, True, 2.5, "4", None]


@pytest.fixture(scope="module")
def configuration(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("configuration_chatglm")


@pytest.fixture(scope="module")
def image_keys(source: Callable[[str], ModuleType]) -> list[str]:
    return list(source("configuration_generations").IMAGE_KEYS)


def published(reference_dir: Path, name: str) -> dict[str, Any]:
    return json.loads((reference_dir / name / "config.json").read_text(encoding="utf-8"))


def changes(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    value = st.one_of(st.sampled_from(SIZES), SCALARS, json_values())
    return st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=6)), value, max_size=4)


@pytest.mark.parametrize("name", GENERATION_CASES)
@given(data=st.data())
def test_any_settings_are_taken_or_refused(
    configuration: ModuleType, image_keys: list[str], reference_dir: Path, name: str, data: st.DataObject
) -> None:
    file = published(reference_dir, name)
    config_class = configuration.ChatGLMConfig
    names = [*file, *configuration.own_field_names(), *config_class.attribute_map, *image_keys]
    changed = data.draw(changes(sorted(set(names))))
    start = file if data.draw(st.booleans()) else {}
    try:
        config = config_class.from_dict({**start, **changed})
    except REFUSALS as error:
        assert str(error)
        return
    saved = json.loads(config.to_json_string())
    again = json.loads(config_class.from_dict(saved).to_json_string())
    assert saved.keys() == again.keys()
    assert all(same(saved[key], again[key]) for key in saved)
