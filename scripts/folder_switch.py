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

Every new file is first written beside its place, as `NAME.chatglm_new`. Then a journal appears, which holds the bare
names of the files that have to go. A run that is killed before that has changed nothing that anybody reads; after it,
whoever comes next goes on (`recover`): each new file takes its place by one `os.replace`, and the others go.

While that happens, the two files through which every load goes hold a single `raise`, which tells the user to run the
command again: they get it first, and their own content last. That is enough, for only small files change and few
programs load them in those milliseconds. To change all of them in one instant would take symbolic links, which Windows
and some network drives lack.

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
OWN_NAME = re.compile(r"[\w.-]+\.(py|json|jinja|safetensors)(\.bak(\.\d+)?)?")
GUARDED = ("tokenization_chatglm.py", "configuration_chatglm.py")
GUARD = (
    b'raise RuntimeError("The upgrade of this checkpoint folder was cut short: run upgrade_checkpoint.py on it again, '
    b'or with --undo to go back.")\n'
)
# Of the files that are read as a whole: code and JSON.
LARGEST_FILE = 64 * 2**20


class UpgradeError(Exception):
    """Something that the user has to know or to decide; the message is one line."""


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; of one that does not exist, `{}`."""
    if not os.path.lexists(path):
        return {}
    if not path.is_file() or path.stat().st_size > LARGEST_FILE:
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
        self.removed: list[str] = []

    def staged(self, name: str) -> Path:
        """Where the new content of a file is written."""
        return self.folder / f"{name}{STAGED}"

    def sync(self, name: str) -> str:
        """Have what has been written to `staged(name)` on the disk, and return its SHA-256."""
        with open(self.staged(name), "rb+") as file:
            os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    def write(self, name: str, content: bytes) -> str:
        """Add or replace a file, with the mode of the old one, and return the SHA-256 of the content."""
        with open(self.staged(name), "xb") as file:
            file.write(content)
        digest = self.sync(name)
        if (self.folder / name).exists():
            shutil.copymode(self.folder / name, self.staged(name))
        return digest

    def copy(self, source: str, name: str) -> None:
        """Add or replace a file by a copy of another, with its mode and times; a link becomes a link if possible."""
        try:
            os.symlink(os.readlink(self.folder / source), self.staged(name))
        except OSError:  # It is no link, or none can be made.
            self.write(name, (self.folder / source).read_bytes())
            shutil.copystat(self.folder / source, self.staged(name))

    def remove(self, name: str) -> None:
        self.removed.append(name)

    def __enter__(self) -> "Change":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                for name in GUARDED:
                    is_changed = name in self.removed or os.path.lexists(self.staged(name))
                    if not is_changed and os.path.lexists(self.folder / name):
                        self.copy(name, name)
                self.write(JOURNAL, json.dumps({"remove": self.removed}).encode())
                os.replace(self.staged(JOURNAL), self.folder / JOURNAL)
        finally:
            recover(self.folder)


def recover(folder: Path) -> str | None:
    """Finish a change that stands in the journal, or remove what is left of one that does not.

    Returns:
        What was done, or `None` if there was nothing to do.
    """
    staged = _staged_files(folder)
    is_decided = os.path.lexists(folder / JOURNAL)
    removed = [name for name in _read_journal(folder) if os.path.lexists(folder / name)] if is_decided else []
    for path in (*staged.values(), *(folder / name for name in (*staged, *removed))):
        if path.is_dir() and not path.is_symlink():
            raise UpgradeError(
                f"{path} is a folder, and an upgrade writes files only; nothing was done. Move it away."
            )
    if not is_decided:
        for path in staged.values():
            path.unlink()
        return "removed what a killed run had left" if staged else None
    for name in reversed(GUARDED):
        if name in staged or name in removed:
            guard = folder / "chatglm_upgrade_guard.py"
            guard.unlink(missing_ok=True)
            with open(guard, "xb") as file:
                file.write(GUARD)
            os.replace(guard, folder / name)
    for name in sorted([*staged, *removed], key=lambda name: GUARDED.index(name) if name in GUARDED else -1):
        if name in staged:
            os.replace(staged[name], folder / name)
        else:
            (folder / name).unlink()
    (folder / JOURNAL).unlink()
    return "finished what a killed run had begun"


def is_pending(folder: Path) -> bool:
    """Whether a killed run has left something to finish or to remove."""
    return os.path.lexists(folder / JOURNAL) or bool(_staged_files(folder))


def _staged_files(folder: Path) -> dict[str, Path]:
    """The files that wait for their places, by the names they are for."""
    found = {path.name.removesuffix(STAGED): path for path in sorted(folder.glob(f"*{STAGED}"))}
    return {name: path for name, path in found.items() if OWN_NAME.fullmatch(name)}


def _read_journal(folder: Path) -> list[str]:
    names = read_json(folder / JOURNAL).get("remove")
    if not isinstance(names, list) or not all(isinstance(name, str) and OWN_NAME.fullmatch(name) for name in names):
        raise UpgradeError(f"{folder / JOURNAL} is not what an upgrade wrote; nothing was done. Delete it.")
    return list(dict.fromkeys(name for name in names if name != JOURNAL))


__all__ = ["LARGEST_FILE", "OWN_NAME", "Change", "UpgradeError", "is_pending", "lock", "read_json", "recover"]
