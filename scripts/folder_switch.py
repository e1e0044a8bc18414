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
"""Changes several files of a folder together, so that a killed run never leaves a mixture that loads.

Every new file is first written beside its place, as `NAME.chatglm_new`. Then a journal of bare file names says which
file moves where, and each move is one `os.replace`. A run that is killed before the journal stands has changed nothing
that anybody reads; after that, whoever comes next carries out the rest of the journal (`recover`).

While files move, the two through which every load goes hold a single `raise`, which tells the user to run the command
again: they get it first, and their own content last. That is enough, for the files are small and few programs load
them in those milliseconds. To change all of them in one instant would take symbolic links, which Windows and some
network drives lack.

A journal may come with a downloaded folder, so its names are checked: nothing outside the folder is touched, and of a
link the link itself is replaced, never what it leads to.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second run out there.
    fcntl = None  # type: ignore[assignment]

JOURNAL = "chatglm_upgrade_journal.json"
STAGED = ".chatglm_new"
# The names that an upgrade gives.
OWN_NAME = re.compile(r"[\w.-]+\.(py|json|safetensors)(\.bak(\.\d+)?)?(\.guard)?(\.chatglm_new)?")
GUARDED = ("tokenization_chatglm.py", "configuration_chatglm.py")
GUARD = (
    b'raise RuntimeError("The upgrade of this checkpoint folder was cut short: run upgrade_checkpoint.py on it again, '
    b'or with --undo to go back.")\n'
)
LARGEST_JSON = 64 * 2**20


class UpgradeError(Exception):
    """Something that the user has to know or to decide; the message is one line."""


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; of one that does not exist, `{}`."""
    if not os.path.lexists(path):
        return {}
    if not path.is_file() or path.stat().st_size > LARGEST_JSON:
        raise UpgradeError(f"{path} is not a file, or larger than any JSON file of a checkpoint.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UpgradeError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UpgradeError(f"{path} does not hold a JSON object.")
    return content


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder. The lock goes with the process, however that ends."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpgradeError(f"another run is at work in {folder}.") from None
        except OSError:
            pass  # A network drive without locks.
        yield
    finally:
        os.close(handle)


class Change:
    """Changes of a folder, made together when the `with` block ends; none of them if it raises."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Names in the folder: which file takes the place of which; `None` removes the other.
        self.steps: list[tuple[str | None, str]] = []

    def staged(self, name: str) -> Path:
        """Where the new content of a file is written."""
        return self.folder / f"{name}{STAGED}"

    def add(self, name: str) -> str:
        """Take in the file that has been written to `staged(name)`, and return its SHA-256."""
        with open(self.staged(name), "rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256")
        self.steps.append((self.staged(name).name, name))
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> str:
        """Add or replace a file, with the mode of the old one, and return the SHA-256 of the content."""
        with open(self.staged(name), "xb") as file:
            file.write(content)
        digest = self.add(name)
        if (self.folder / name).exists():
            shutil.copymode(self.folder / name, self.staged(name))
        return digest

    def copy(self, source: str, name: str) -> None:
        """Add or replace a file by a copy of another, with its mode and times; a link becomes a link if possible."""
        try:
            os.symlink(os.readlink(self.folder / source), self.staged(name))
            self.steps.append((self.staged(name).name, name))
        except OSError:  # It is no link, or none can be made.
            self.write(name, (self.folder / source).read_bytes())
            shutil.copystat(self.folder / source, self.staged(name))

    def move(self, source: str | None, name: str) -> None:
        """Let one file take the place of another; `None` removes that one."""
        self.steps.append((source, name))

    def __enter__(self) -> "Change":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._write_journal()
        finally:
            recover(self.folder)

    def _write_journal(self) -> None:
        for name in GUARDED:
            if all(target != name for _, target in self.steps):
                if os.path.lexists(self.folder / name):
                    self.copy(name, name)
                else:
                    self.move(None, name)
        last = sorted((step for step in self.steps if step[1] in GUARDED), key=lambda step: GUARDED.index(step[1]))
        others = [step for step in self.steps if step not in last]
        for name in GUARDED:
            self.write(f"{name}.guard", GUARD)
        guards = [(f"{name}.guard{STAGED}", name) for name in reversed(GUARDED)]
        self.write(JOURNAL, json.dumps({"steps": [*guards, *others, *last]}).encode())
        os.replace(self.staged(JOURNAL), self.folder / JOURNAL)


def recover(folder: Path) -> str | None:
    """Finish what the journal says, if there is one, and remove what else a killed run has left.

    Returns:
        What was done, or `None` if there was nothing to do.
    """
    done = None
    for source, target in _read_journal(folder):
        done = "finished what a killed run had begun"
        if source is None:
            (folder / target).unlink(missing_ok=True)
        elif os.path.lexists(folder / source):
            os.replace(folder / source, folder / target)
    (folder / JOURNAL).unlink(missing_ok=True)
    for path in _leftovers(folder):
        done = done or "removed what a killed run had left"
        path.unlink()
    return done


def is_pending(folder: Path) -> bool:
    """Whether a killed run has left something to finish or to remove."""
    return os.path.lexists(folder / JOURNAL) or bool(_leftovers(folder))


def _leftovers(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{STAGED}") if path.is_symlink() or not path.is_dir())


def _read_journal(folder: Path) -> list[tuple[str | None, str]]:
    if not os.path.lexists(folder / JOURNAL):
        return []
    try:
        steps = [(source, target) for source, target in read_json(folder / JOURNAL)["steps"]]
        if not all(OWN_NAME.fullmatch(name) for step in steps for name in step if name is not None):
            raise ValueError(steps)
    except (ValueError, TypeError, KeyError) as error:
        raise UpgradeError(f"{folder / JOURNAL} is not what an upgrade wrote; nothing was done. Delete it.") from error
    return steps


__all__ = ["OWN_NAME", "STAGED", "Change", "UpgradeError", "is_pending", "lock", "read_json", "recover"]
