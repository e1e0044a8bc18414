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
"""What a run of tests came to, written into a page between two marks: the option `--table=PAGE`.

With `=`, because pytest takes the page for a place of tests while it does not know the option yet.
"""

from pathlib import Path

import pytest


END = "<!-- end -->\n"


class ResultsPage:
    """A plug-in of pytest that writes `tables()` into a page when the run is over.

    Args:
        path: the page.
        command: what makes the tables, as the mark before them says.
    """

    def __init__(self, path: Path, command: str) -> None:
        self.path = path
        self.begin = f"<!-- made by `{command}` -->\n"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        before, _, rest = self.path.read_text(encoding="utf-8").partition(self.begin)
        after = rest.partition(END)[2]
        self.path.write_text(before + self.begin + self.tables() + END + after, encoding="utf-8")

    def tables(self) -> str:
        raise NotImplementedError
