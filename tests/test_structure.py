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
"""The house stays as CONTRIBUTING.md draws it: who imports whom, and how long files and functions may be."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY


CODE = sorted(REPOSITORY.glob("*.py"))
EVERYTHING = [
    *CODE,
    *(
        path
        for folder in ("scripts", "examples", "examples/serving")
        for path in sorted((REPOSITORY / folder).glob("*.py"))
    ),
]
MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 55

# Each file that a checkpoint folder gets, and which of the others it may import.
ARROWS: dict[str, set[str]] = {
    "blank_infilling": set(),
    "configuration_chatglm": {"configuration_generations", "configuration_vision"},
    "configuration_generations": set(),
    "configuration_vision": set(),
    "conversation_chatglm": {"conversation_calls", "conversation_messages", "conversation_templates"},
    "conversation_calls": {"conversation_templates"},
    "conversation_messages": set(),
    "conversation_rendering": {"conversation_chatglm", "conversation_templates"},
    "conversation_templates": set(),
    "decoding_cpu": {"kernels_decoding", "kernels_layers", "kernels_llvm", "modeling_cache"},
    "generation_blanks": {"blank_infilling", "configuration_generations"},
    "generation_cache": set(),
    "generation_chatglm": {
        "conversation_chatglm",
        "generation_cache",
        "generation_published",
        "generation_streaming",
    },
    "generation_published": set(),
    "generation_streaming": set(),
    "image_processing_chatglm": {"configuration_generations", "configuration_vision"},
    "kernels_llvm": set(),
    "kernels_decoding": {"kernels_layers", "kernels_llvm"},
    "kernels_layers": {"kernels_llvm"},
    "kernels_matmul": {"kernels_llvm"},
    "linear_cpu": {"kernels_decoding", "kernels_llvm", "kernels_matmul"},
    "modeling_chatglm": {
        "configuration_chatglm",
        "configuration_generations",
        "generation_blanks",
        "generation_chatglm",
        "linear_cpu",
        "modeling_cache",
        "modeling_classification",
        "modeling_layers",
        "modeling_pictures",
        "modeling_positions",
        "modeling_prefix",
        "quantization",
        "vision_chatglm",
    },
    "modeling_cache": set(),
    "modeling_classification": set(),
    "modeling_glm": {"configuration_chatglm", "modeling_chatglm", "modeling_classification"},
    "modeling_layers": {"configuration_chatglm", "decoding_cpu", "kernels_layers", "kernels_llvm", "linear_cpu"},
    "modeling_pictures": {"configuration_vision", "generation_published"},
    "modeling_positions": set(),
    "modeling_prefix": set(),
    "processing_chatglm": set(),
    "quantization": {"linear_cpu", "quantization_kernels", "quantization_layers", "quantization_others"},
    "quantization_cpu": {"kernels_llvm", "kernels_matmul"},
    "quantization_kernels": {"kernels_llvm", "kernels_matmul", "quantization_cpu", "quantization_triton"},
    "quantization_layers": {"kernels_llvm", "quantization_kernels"},
    "quantization_others": {"linear_cpu"},
    "quantization_triton": set(),
    "tokenization_chatglm": {
        "configuration_chatglm",
        "conversation_chatglm",
        "conversation_messages",
        "image_processing_chatglm",
        "tokenization_chatglm_6b",
        "tokenization_conversation",
        "tokenization_plain",
        "tokenization_published",
        "tokenization_vocabulary",
    },
    "tokenization_chatglm_6b": {
        "conversation_chatglm",
        "tokenization_conversation",
        "tokenization_plain",
        "tokenization_vocabulary",
    },
    "tokenization_conversation": {
        "conversation_chatglm",
        "conversation_rendering",
        "tokenization_streaming",
        "tokenization_vocabulary",
    },
    "tokenization_glm": {"tokenization_conversation"},
    "tokenization_plain": {"conversation_chatglm", "tokenization_vocabulary"},
    "tokenization_published": {"tokenization_conversation", "tokenization_plain"},
    "tokenization_streaming": set(),
    "tokenization_vocabulary": set(),
    "vision_chatglm": {"configuration_chatglm", "configuration_vision", "linear_cpu", "modeling_layers"},
}


def siblings(source: str) -> set[str]:
    """The files of the same folder that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module} if node.module else {name.name for name in node.names}
    return found


def long_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{node.name}: {lines} lines"


def is_about_one_generation(comparison: ast.AST) -> bool:
    """Whether a generation is named in a comparison. "chatglm" is also the model type of all of them."""
    constants = {node.value for node in ast.walk(comparison) if isinstance(node, ast.Constant)}
    names = ("chatglm", "chatglm2", "chatglm3", "glm4", "glm4v", "glm", "glm130b")
    return bool(constants.intersection(names[1:] if "model_type" in ast.unparse(comparison) else names))


def test_imports_follow_the_arrows() -> None:
    assert {path.stem: siblings(path.read_text(encoding="utf-8")) for path in CODE} == ARROWS


def test_arrows_have_no_cycle() -> None:
    settled: set[str] = set()
    while more := {name for name, targets in ARROWS.items() if targets <= settled} - settled:
        settled |= more
    assert settled == ARROWS.keys()


def test_the_picture_shows_the_arrows() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = re.search(r"```mermaid\n(.*?)```", text, flags=re.DOTALL)[1]
    drawn = {(source, target) for source, target in re.findall(r"^ *(\w+) --> (\w+)$", picture, flags=re.MULTILINE)}
    assert drawn == {(source, target) for source, targets in ARROWS.items() for target in targets}


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.name)
def test_files_and_functions_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    assert list(long_functions(source)) == []


def test_a_violation_is_found() -> None:
    assert siblings(
        "from .b import c\nfrom . import d\nimport e\nfrom f import g\ndef h():\n    from .i import j\n"
    ) == {
        "b",
        "d",
        "i",
    }
    assert list(long_functions("def f():\n" + "    pass\n" * MAX_FUNCTION_LINES)) == ["f: 56 lines"]


def test_generations_are_data() -> None:
    """`model_version` is a name to look things up by; nothing asks whether it is this or that one."""
    compared = [
        f"{path.name}:{node.lineno}"
        for path in EVERYTHING
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and is_about_one_generation(node)
    ]
    assert compared == []
    assert is_about_one_generation(ast.parse("config.model_version == 'chatglm'", mode="eval").body)
    assert not is_about_one_generation(ast.parse("config['model_type'] == 'chatglm'", mode="eval").body)


def missing_tests(text: str) -> list[str]:
    """The tests that tables name, as `file.py::test` or `::another` of the same file, and that do not exist."""
    missing = []
    for row in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE):
        file = None
        for name, test in re.findall(r"`([\w/]+\.py)?::(\w+)`", row):
            file = REPOSITORY / "tests" / name if name else file
            if file is None or not file.is_file() or f"def {test}(" not in file.read_text(encoding="utf-8"):
                missing.append(f"{name}::{test}")
    return missing


def test_tests_named_in_the_table_exist() -> None:
    """CONTRIBUTING.md names a test for everything that users of the published code hit."""
    assert missing_tests((REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")) == []
    assert missing_tests("| a | `no_such.py::test_a` |") == ["no_such.py::test_a"]


def test_every_row_of_compatibility_names_its_test() -> None:
    text = (REPOSITORY / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE) if not re.match(r"\|(---| call or)", row)]
    assert [row for row in rows if not re.search(r"\| `[\w/]+\.py::\w+`[^|]*\|$", row)] == []
    assert missing_tests(text) == []
