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
"""The upgrade command tells the generation of a folder from whatever is in it, and asks where nothing tells."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generations import RECORDED


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

from folder_switch import UpgradeError  # noqa: E402
from recognise_checkpoint import CODE, recognise  # noqa: E402


Published = Callable[..., Path]


@pytest.fixture
def published(reference_dir: Path, tmp_path: Path) -> Published:
    """A fresh folder in the published layout, with other keys in its config.json; `...` removes a key."""

    def folder(case: str = "chatglm3", name: str = "folder", **changes: Any) -> Path:
        target = tmp_path / name
        shutil.copytree(reference_dir / case, target, ignore=shutil.ignore_patterns("expected.*"))
        config = json.loads((target / "config.json").read_text(encoding="utf-8")) | changes
        config = {key: value for key, value in config.items() if value is not ...}
        (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return target

    return folder


def generation(folder: Path, asked: str | None = None) -> str:
    return recognise(folder, asked).generation


@pytest.mark.parametrize("case", RECORDED)
def test_reference_cases(case: str, published: Published) -> None:
    assert generation(published(case)) == RECORDED[case].model_version


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("chatglm2-6b-32k", "chatglm2"),
        ("my-ChatGLM3-6B", "chatglm3"),
        ("codegeex2-6b-int4", "chatglm2"),
        ("models--THUDM--chatglm3-6b-base/snapshots/0123", "chatglm3"),
    ],
)
def test_by_the_name_of_the_folder(name: str, version: str, published: Published) -> None:
    folder = published("chatglm2", name=name, _name_or_path="/data/export")
    assert generation(folder) == version


@pytest.mark.parametrize(
    ("file", "content", "version"),
    [
        ("tokenization_chatglm.py", '"[Round {}]\\n\\n问："', "chatglm2"),
        ("tokenization_chatglm.py", '["<|user|>", "<|observation|>"]', "chatglm3"),
        ("tokenizer_config.json", '{"additional_special_tokens": ["<|observation|>"]}', "chatglm3"),
    ],
)
@pytest.mark.parametrize("name", ["/data/export", "THUDM/chatglm2-6b", "THUDM/chatglm3-6b"])
def test_the_published_tokenizer_tells_more_than_a_name(
    name: str, file: str, content: str, version: str, published: Published
) -> None:
    folder = published(_name_or_path=name)
    (folder / file).write_text(content, encoding="utf-8")
    assert generation(folder) == version


@pytest.mark.parametrize("version", ["chatglm2", "chatglm3"])
def test_our_own_code_tells_nothing(version: str, published: Published) -> None:
    named, unnamed = published(version, name="a"), published(version, name="b", _name_or_path=...)
    for folder in (named, unnamed):
        shutil.copyfile(CODE / "tokenization_chatglm.py", folder / "tokenization_chatglm.py")
    assert generation(named) == generation(unnamed, version) == version
    with pytest.raises(UpgradeError, match="nothing tells which generation"):
        generation(unnamed)


@pytest.mark.parametrize("case", ["chatglm1", "glm4"])
def test_by_the_vocabulary_or_the_class_of_the_tokenizer(case: str, published: Published) -> None:
    gone = ("max_sequence_length", "inner_hidden_size", "position_encoding_2d", "gmask_token_id", "_name_or_path")
    folder = published(case, eos_token_id=2, **dict.fromkeys(gone, ...))
    assert generation(folder) == RECORDED[case].model_version
