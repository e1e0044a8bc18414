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
"""No code here runs what came from outside: no `eval`, no pickles of others, no shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY


SOURCES = sorted(
    path
    for path in REPOSITORY.rglob("*.py")
    if not any(part.startswith(".") or part == "output" for part in path.relative_to(REPOSITORY).parts)
)
# By their full names, whatever they are imported as.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("os.system", "os.popen", "os.startfile", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("marshal.load", "marshal.loads", "shelve.open", "runpy.run_path", "code.InteractiveInterpreter"),
    *(
        f"{module}.{name}"
        for module in ("pickle", "_pickle", "cloudpickle", "dill", "joblib")
        for name in ("load", "loads", "Unpickler")
    ),
    "pandas.read_pickle",
}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader"}
UNSAFE_LOAD = "torch.load without weights_only=True"
# What a test does with what this repository wrote, because that is what it is about.
ALLOWED = {
    # The Python blocks of our pages, and one of our files under an older library.
    *(("tests/test_docs.py", name) for name in ("exec", "compile")),
    *(("tests/test_configuration_chatglm.py", name) for name in ("exec", "compile")),
    # Pickles of a model, a layer and a tokenizer, as a user may make them.
    *(
        ("tests/test_published_tokenizer_calls.py", "pickle.loads"),
        ("tests/test_quantization_training.py", "pickle.loads"),
    ),
    *(("tests/test_quantization_layer.py", UNSAFE_LOAD), ("tests/test_quantization_use.py", UNSAFE_LOAD)),
    # The line that the upgrade prints for a shell.
    ("tests/test_upgrade_checkpoint.py", "shell=True"),
}


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """The lines of a source that could run what they read, with the name of what does."""
    tree = ast.parse(source)
    names = dict(imported_names(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            # `f = eval` or `map(eval, …)` would hide the call.
            if isinstance(node, ast.Name) and node.id in ("eval", "exec") and isinstance(node.ctx, ast.Load):
                yield node.lineno, node.id
            continue
        name = full_name(node.func, names)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        # A copy by way of a pickle: the test has just written it.
        is_copy = (
            name == "pickle.loads" and isinstance(node.args[0], ast.Call) and "dumps" in ast.unparse(node.args[0].func)
        )
        if name in FORBIDDEN and name not in ("eval", "exec") and not is_copy:
            yield node.lineno, name
        elif name == "torch.load" and not is_constant(given.get("weights_only"), True):
            yield node.lineno, UNSAFE_LOAD
        elif name == "yaml.load":
            loader = given.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if loader is None or full_name(loader, names) not in SAFE_LOADERS:
                yield node.lineno, "yaml.load without a safe loader"
        for option in ("shell", "allow_pickle", "allow_dangerous_deserialization"):
            if option in given and not is_constant(given[option], False):
                yield node.lineno, f"{option}={ast.unparse(given[option])}"


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each name that a source imports, and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.split(".")[0],
                    alias.name if alias.asname else alias.name.split(".")[0],
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def is_constant(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_nothing_from_outside_is_run(path: Path) -> None:
    place = path.relative_to(REPOSITORY).as_posix()
    found = [(line, name) for line, name in dangers(path.read_text(encoding="utf-8")) if (place, name) not in ALLOWED]
    assert found == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("eval('1')", "eval"),
        ("list(map(exec, x))", "exec"),
        ("import pickle as p\np.load(f)", "pickle.load"),
        ("from pickle import loads as read\nread(b)", "pickle.loads"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("from torch import load\nload(f, weights_only=flag)", "torch.load without weights_only=True"),
        ("from os import system\nsystem('x')", "os.system"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell=True"),
        ("import yaml\nyaml.load(f)", "yaml.load without a safe loader"),
        ("import yaml\nyaml.load(f, yaml.Loader)", "yaml.load without a safe loader"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("S.load_local(f, e, allow_dangerous_deserialization=True)", "allow_dangerous_deserialization=True"),
    ],
)
def test_a_danger_is_found(source: str, name: str) -> None:
    assert [found for _, found in dangers(source)] == [name]


def test_what_is_safe_is_let_through() -> None:
    source = """
import ast, pickle, torch, yaml
from yaml import SafeLoader
ast.literal_eval("1"), model.eval(), torch.compile(model), re.compile("a")
torch.load(f, weights_only=True), yaml.load(f, Loader=SafeLoader), yaml.safe_load(f)
pickle.loads(pickle.dumps(1)), subprocess.run(["a"], shell=False)
"""
    assert list(dangers(source)) == []
    assert len(SOURCES) > 100
