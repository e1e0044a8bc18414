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
"""Runs the command blocks of the READMEs and of docs/: `python scripts/docs_check.py [PAGE ...]`.

Every page gets a copy of the repository to itself, so nothing is left behind in this one.

- Shell blocks (```bash) run first, one after the other, with this Python first on the path. `/path/to/chatglm3-6b` is
  the bundled checkpoint, without any code in it, as a published folder is before its upgrade.
- The Python blocks of a page then run as one program. `/path/to/chatglm3-6b` has this repository's code here.
- A block right behind `<!-- needs: a GPU -->` does not run; it is listed with what it needs.
- A page with the same commands as an earlier one, in another language, is not run again.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "README_zh.md",
    "examples/tiny-chatglm3/README.md",
    *sorted(f"docs/{path.name}" for path in REPOSITORY.glob("docs/*.md")),
)
RUN_LANGUAGES = ("bash", "python")
# Shown as they are.
DATA_LANGUAGES = ("json", "mermaid", "text", "yaml")
NEEDS = re.compile(r"<!-- needs: (.+) -->")
TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: the line its code starts on, and what it needs besides this repository."""

    line: int
    language: str
    code: str
    needs: str | None

    def commands(self) -> str:
        """The code without comments and layout, which differ between translations of a page."""
        if self.language == "python":
            return ast.unparse(ast.parse(self.code))
        lines = (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in self.code.splitlines())
        return "\n".join(line for line in lines if line)


def read_blocks(text: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: for a block without a known language, and one that does not end.
    """
    blocks, needs, lines = [], None, iter(enumerate(text.splitlines(), start=1))
    for number, line in lines:
        if line.startswith("```"):
            language = line.removeprefix("```")
            if language not in RUN_LANGUAGES + DATA_LANGUAGES:
                raise ValueError(f"line {number}: the language of a block must be named, got {line!r}")
            code = []
            for _, line in lines:
                if line == "```":
                    break
                code.append(f"{line}\n")
            else:
                raise ValueError(f"line {number}: this block does not end")
            blocks.append(Block(number + 1, language, "".join(code), needs))
        needs = match[1] if (match := NEEDS.fullmatch(line)) else None
    return blocks


def commands_of(blocks: Sequence[Block]) -> list[tuple[str, str, str | None]]:
    """What a page lets its reader run, in any language of its prose."""
    return [(block.language, block.commands(), block.needs) for block in blocks if block.language in RUN_LANGUAGES]


def make_sandbox(folder: Path) -> Path:
    """A copy of the repository, and the bundled checkpoint beside it twice: as published, and with the code."""
    copy = folder / "repository"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "output", "tests"))
    (copy / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    for name in RUN_LANGUAGES:
        checkpoint = folder / name / "chatglm3-6b"
        shutil.copytree(REPOSITORY / "examples" / "tiny-chatglm3", checkpoint)
        if name == "python":
            for source in REPOSITORY.glob("*.py"):
                shutil.copyfile(source, checkpoint / source.name)
    return copy


def run_page(blocks: Sequence[Block]) -> str | None:
    """Run the blocks of one page; what went wrong, if anything."""
    blocks = [block for block in blocks if block.needs is None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy = make_sandbox(folder)
        for block in blocks:
            if block.language == "bash":
                script = f"set -eo pipefail\n{block.code}"
                if fault := _run(["bash", "-c", script.replace("/path/to", str(folder / "bash"))], copy):
                    return f"line {block.line}: {fault}"
        # Every line stays where it is in the page, so a traceback tells the right one.
        program: list[str] = []
        for block in blocks:
            if block.language == "python":
                program += [""] * (block.line - 1 - len(program)) + block.code.splitlines()
        if not program:
            return None
        (folder / "page.py").write_text("\n".join(program).replace("/path/to", str(folder / "python")), "utf-8")
        return _run([sys.executable, str(folder / "page.py")], copy)


def _run(command: list[str], folder: Path) -> str | None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", "")]),
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
        # There is a page for each processor, and more threads than processors wait for each other.
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return f"still running after {TIMEOUT_SECONDS} seconds"
    return f"exit code {done.returncode}\n{done.stdout}" if done.returncode else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", default=PAGES, metavar="PAGE")
    pages: dict[str, tuple[str, list[Block]]] = {}
    for name in parser.parse_args().pages:
        blocks = read_blocks((REPOSITORY / name).read_text(encoding="utf-8"))
        pages.setdefault(str(commands_of(blocks)), (name, blocks))
    names, all_blocks = zip(*pages.values())
    failed = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, fault in zip(names, pool.map(run_page, all_blocks)):
            print(f"{name}: {f'FAILED, {fault}' if fault else 'ok'}", flush=True)
            failed |= fault is not None
    for name, blocks in pages.values():
        for block in blocks:
            if block.needs:
                print(f"{name}:{block.line}: not run, needs {block.needs}: {block.code.splitlines()[0]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
