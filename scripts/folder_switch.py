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
"""Changes several files of a folder at one instant, whatever kills the program meanwhile.

A file system renames one file at a time. So each file first becomes a symbolic link to its own content, by way of one
link to a directory that all of them share:

    config.json -> .chatglm_upgrade/current/config.json
                   .chatglm_upgrade/current -> old
                   .chatglm_upgrade/old/config.json -> ../../config.json.bak, the file as it was
                   .chatglm_upgrade/new/config.json -> ../staged/config.json, the file to be

Up to here every name in the folder reads as before, and the link of a file that is to be added leads nowhere. One
rename turns `current` from `old` to `new`, and with it all the files. Then what the links lead to is moved to where
they stand, which changes no content. A journal, written before the first link, lets the next run clear up: back to the
old files before the turn, on to the new ones after it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WORK = ".chatglm_upgrade"
STAGED = f"{WORK}/staged"
SAVED = f"{WORK}/saved"
# What is no longer needed gets this name at one instant before it is deleted file by file.
TRASH = ".chatglm_upgrade.trash"
JOURNAL = "journal.json"


class UpgradeError(Exception):
    """Something that the user has to know or to decide; the message is one line."""


@dataclass(frozen=True)
class Swap:
    """What happens to one name of the folder. The paths are relative to the folder.

    Args:
        name: the file that changes.
        old: where its present content is kept, `None` if there is none. Below `SAVED`: until the switch is over.
        new: where its new content lies, `None` if the file goes.
    """

    name: str
    old: str | None
    new: str | None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder. The lock goes with the process, however that ends."""
    if fcntl is None:
        raise UpgradeError("Windows is not supported, use WSL there: the upgrade needs POSIX renames and links.")
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpgradeError(f"another run is at work in {folder}.") from None
        except OSError:
            pass  # A network file system without locks.
        yield
    finally:
        os.close(handle)


def is_pending(folder: Path) -> bool:
    """Whether a killed run has left something to clear up."""
    return os.path.lexists(folder / WORK) or os.path.lexists(folder / TRASH)


def prepare(folder: Path) -> Path:
    """Make room for the new contents and return the folder to write them to."""
    (folder / WORK).mkdir()
    for name in ("staged", "saved", "old", "new"):
        (folder / WORK / name).mkdir()
    return folder / STAGED


def switch(folder: Path, swaps: Sequence[Swap]) -> None:
    """Change all files at one instant, after `prepare` and with the new contents in place.

    Raises:
        UpgradeError: where the file system has no symbolic links. Nothing is changed then.
    """
    work = folder / WORK
    for swap in swaps:
        for side, target in (("old", swap.old), ("new", swap.new)):
            if target is not None:
                _symlink(f"../../{target}", work / side / swap.name)
    _symlink("old", work / "current")
    _write_journal(work, swaps)
    for directory in (folder / STAGED, work / "old", work / "new", work, folder):
        sync(directory)
    for swap in swaps:
        path = folder / swap.name
        if swap.old is not None:
            _duplicate(path, folder / swap.old)
        _symlink(_link_of(swap), work / "link")
        os.replace(work / "link", path)
    sync(folder / SAVED)
    sync(folder)
    _symlink("new", work / "link")
    os.replace(work / "link", work / "current")  # The instant.
    sync(work)
    recover(folder)


def recover(folder: Path) -> str | None:
    """Clear up after `switch`, or after a run that was killed: on if the files have switched, else back.

    Returns:
        What was done, or `None` if there was nothing to do.
    """
    work, trash = folder / WORK, folder / TRASH
    done = None
    if trash.exists():
        shutil.rmtree(trash)
        done = "removed what a killed run had left"
    if not work.exists():
        return done
    done = "removed what a killed run had prepared"
    if (work / JOURNAL).exists():
        swaps = [Swap(**swap) for swap in json.loads((work / JOURNAL).read_text(encoding="utf-8"))]
        switched = os.readlink(work / "current") == "new"
        for swap in swaps:
            _settle(folder, swap, switched)
        sync(folder)
        done = "finished a killed run" if switched else "rolled a killed run back"
    os.rename(work, trash)
    sync(folder)
    shutil.rmtree(trash)
    return done


def _settle(folder: Path, swap: Swap, switched: bool) -> None:
    """Put the content that the link of one file leads to in the place of the link; doing it twice does no harm."""
    path = folder / swap.name
    content = swap.new if switched else swap.old
    if path.is_symlink() and os.readlink(path) == _link_of(swap):
        if content is None:
            path.unlink()
        else:
            os.replace(folder / content, path)
    elif not switched and swap.old is not None:
        (folder / swap.old).unlink(missing_ok=True)  # Kept, but its link had not been made.


def _link_of(swap: Swap) -> str:
    return f"{WORK}/current/{swap.name}"


def _write_journal(work: Path, swaps: Sequence[Swap]) -> None:
    # Under another name first: a journal that exists is complete.
    write_file(work / "journal", [json.dumps([asdict(swap) for swap in swaps]).encode()])
    os.replace(work / "journal", work / JOURNAL)


def _symlink(target: str, path: Path) -> None:
    try:
        os.symlink(target, path)
    except (OSError, NotImplementedError) as error:
        raise UpgradeError(
            f"no symbolic link can be made in {path.parent} ({error}); the upgrade needs them to change all files at "
            "one instant. Upgrade a copy of the folder on another file system."
        ) from error


def _duplicate(source: Path, target: Path) -> None:
    """Give a file a second name: a link as the same link, a file as a hard link where that exists, else as a copy."""
    if source.is_symlink():
        os.symlink(os.readlink(source), target)
        return
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)
    sync(target)


def write_file(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a new file through to the disk and return its SHA-256."""
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Have a file or the names of a folder on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "SAVED",
    "STAGED",
    "Swap",
    "UpgradeError",
    "is_pending",
    "lock",
    "prepare",
    "recover",
    "switch",
    "write_file",
]
