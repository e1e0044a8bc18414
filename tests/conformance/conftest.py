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
"""The marks of the library's tests, and those of our known deviations."""

import pytest
from library import KnownDeviations
from table import Results


MARKERS = ("accelerate_tests", "all_flash_attn_test", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--table")) is not None:
        config.pluginmanager.register(Results(path))
    for marker in (*MARKERS, "is_training_test", "torch_compile_test"):
        config.addinivalue_line("markers", f"{marker}: one of Transformers' own")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.cls is None or not issubclass(item.cls, KnownDeviations):
            continue
        for name in item.cls.deviations:
            assert hasattr(item.cls, name), f"{item.cls.__name__}.deviations: there is no {name}"
        if reason := item.cls.deviations.get(item.name):
            # One that passes is an error, so that it leaves the list.
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
