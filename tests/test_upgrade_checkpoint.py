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
"""`scripts/upgrade_checkpoint.py` makes published folders load and chat, and nothing that stops it does harm."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))

import convert_weights  # noqa: E402
import folder_switch  # noqa: E402
import recognise_checkpoint  # noqa: E402
import try_checkpoint  # noqa: E402
import upgrade_checkpoint  # noqa: E402


VERSIONS = {
    "chatglm1": "chatglm",
    "chatglm2": "chatglm2",
    "chatglm2-32k": "chatglm2",
    "chatglm2-int4": "chatglm2",
    "chatglm3": "chatglm3",
    "chatglm3-32k": "chatglm3",
    "glm4": "glm4",
}
STOP_IDS = {"chatglm1": 255, "chatglm2-int4": 2, "chatglm3": [2, 486, 488], "glm4": [480, 487, 489]}
CONVERT = ("--safetensors", "--max-shard-size", "100KB")
# What a program tells Python's audit hooks before it changes a file system.
CHANGES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MESSAGE = "The upgrade of this checkpoint folder was cut short: run upgrade_checkpoint.py on it again"


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory, copy_code: Callable[[Path], None]) -> Path:
    """A copy of the `.py` files, so that an edit during the run changes nothing."""
    code = tmp_path_factory.mktemp("code")
    copy_code(code)
    return code


@pytest.fixture(autouse=True)
def use_code(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recognise_checkpoint, upgrade_checkpoint):
        monkeypatch.setattr(module, "CODE", code)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # Only a power cut would show the difference.


@pytest.fixture
def published(reference_dir: Path, code: Path, tmp_path: Path) -> Callable[..., Path]:
    """A fresh folder in the published layout, on request with older code in it."""

    def folder(case: str = "chatglm3", name: str = "folder", old_code: bool = False) -> Path:
        target = tmp_path / name
        shutil.copytree(reference_dir / case, target, ignore=shutil.ignore_patterns("expected.*"))
        if old_code:
            for source in [*code.glob("*.py"), Path("cli_demo.py")]:
                (target / source.name).write_text("def infer_model_version(): pass  # Older.\n", encoding="utf-8")
        return target

    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the trial, which changes nothing in the folder."""
    tokenizer = SimpleNamespace(stop_token_ids=lambda: [2, 486, 488])
    monkeypatch.setattr(try_checkpoint, "try_loading", lambda checkpoint, contents: (tokenizer, "nothing"))


def run(folder: Path, *arguments: str) -> int:
    return upgrade_checkpoint.main([str(folder), *arguments])


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Every name below a folder: content, kind, mode and time of change."""

    def entry(path: Path) -> tuple[Any, ...]:
        if path.is_symlink():
            return ("link", os.readlink(path))
        status = path.stat()
        if path.is_dir():
            return ("folder", status.st_mode)
        return (hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mode, status.st_mtime_ns)

    return {str(path.relative_to(folder)): entry(path) for path in sorted(folder.rglob("*"))}


def view(folder: Path) -> dict[str, bytes]:
    """What a program finds that opens the files of a folder by name."""
    own = (".bak", folder_switch.STAGED, "chatglm_upgrade")
    names = [name for name in os.listdir(folder) if not any(part in name for part in own)]
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys, and removes those whose value is `...`."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def as_hub_cache(folder: Path) -> Path:
    """Turns a folder into a snapshot of the Hub's cache: links to blobs."""
    repository = folder.parent / "models--THUDM--chatglm3-6b"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, repository / "blobs" / blob)
        os.symlink(f"../../blobs/{blob}", snapshot / path.name)
    return snapshot


class Watch:
    """Calls a function with the number and the path of each change to the file system while it is used as a context."""

    def __init__(self, action: Callable[[int, Path], None]) -> None:
        self.action = action
        self.count = 0
        self.is_on = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        is_writing = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if self.is_on and (is_writing or event in CHANGES):
            self.is_on = False  # The action may change files itself.
            self.count += 1
            self.action(self.count, Path(args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0]))
            self.is_on = True

    def __enter__(self) -> "Watch":
        self.is_on = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_on = False


class TestUpgrade:
    @pytest.mark.parametrize("case", STOP_IDS)
    def test_loads_and_chats_and_goes_back(
        self,
        case: str,
        published: Callable[..., Path],
        case_model: Callable[[str], Any],
        case_tokenizer: Callable[[str], Any],
        code: Path,
    ) -> None:
        folder = published(case)
        (folder / "logs").mkdir()
        before = tree(folder)
        assert run(folder, *(() if case == "chatglm1" else CONVERT)) == 0
        added = {path.name for path in code.glob("*.py")} | {"generation_config.json", "chatglm_upgrade.json"}
        added |= {"config.json.bak", "tokenizer_config.json.bak"}
        weights = {path.name for path in folder.glob("model*.safetensors*")}
        assert set(os.listdir(folder)) == before.keys() | added | weights
        assert len(weights) > 2 or case == "chatglm1"
        for path in folder.glob("pytorch_model*") if weights else ():
            shutil.move(path, folder / "logs")
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert model.config.model_version == tokenizer.model_version == VERSIONS[case]
        assert model.generation_config.eos_token_id == STOP_IDS[case]
        expected = case_model(case)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        arguments = {"do_sample": False, "max_length": 60}
        assert model.chat(tokenizer, "你好", **arguments) == expected.chat(case_tokenizer(case), "你好", **arguments)
        for path in (folder / "logs").iterdir():
            shutil.move(path, folder)
        assert run(folder, "--undo") == 0
        assert tree(folder) == before

    def test_configurations_keep_what_they_have(self, quick: None, published: Callable[..., Path]) -> None:
        folder = published("chatglm2-32k")
        config_file, tokenizer_file = folder / "config.json", folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config = {"备注": "我的模型", **config, "small": 1.5625e-07, "big": 1000000000000000019884624838656}
        config |= {
            "half": "\ud83d",
            "auto_map": {"AutoModelForTokenClassification": "mine.Mine", "AutoModel": "a--b.C"},
        }
        config_file.write_text(json.dumps(config), encoding="utf-8")
        tokenizer_config = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        (folder / "generation_config.json").write_text('{"eos_token_id":7}', encoding="utf-8")
        assert run(folder) == 0
        after = json.loads(config_file.read_text(encoding="utf-8"))
        assert after.pop("model_version") == "chatglm2"
        assert after.pop("auto_map") == {"AutoModelForTokenClassification": "mine.Mine", **upgrade_checkpoint.AUTO_MAP}
        del config["auto_map"]
        assert list(after.items()) == list(config.items())
        text = config_file.read_text(encoding="utf-8")
        assert "我的模型" in text and "1.5625e-07" in text and "1000000000000000019884624838656" in text
        after = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        assert after.pop("model_version") == "chatglm2"
        assert after["auto_map"] == {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
        assert after == tokenizer_config | {"auto_map": after["auto_map"]}
        assert (folder / "generation_config.json").read_text(encoding="utf-8") == '{"eos_token_id":7}'

    @pytest.mark.parametrize("auto_map", [..., ["tokenization_chatglm.ChatGLMTokenizer", None], "text", None, 1])
    def test_auto_maps_of_another_form(self, auto_map: Any, quick: None, published: Callable[..., Path]) -> None:
        folder = published("glm4")
        edit_json(folder / "tokenizer_config.json", auto_map=auto_map)
        edit_json(folder / "config.json", auto_map=auto_map)
        assert run(folder) == 0
        written = [json.loads((folder / name).read_bytes()) for name in ("config.json", "tokenizer_config.json")]
        assert written[0]["auto_map"] == upgrade_checkpoint.AUTO_MAP
        assert written[1]["auto_map"] == {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}

    def test_no_tokenizer_config(self, published: Callable[..., Path]) -> None:
        folder = published()
        (folder / "tokenizer_config.json").unlink()
        assert run(folder) == 0
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).model_version == "chatglm3"
        assert run(folder, "--undo") == 0
        assert not (folder / "tokenizer_config.json").exists()

    def test_replaced_code_has_backups_and_unneeded_code_stays(
        self, quick: None, published: Callable[..., Path], capsys: pytest.CaptureFixture[str], code: Path
    ) -> None:
        folder = published(old_code=True)
        (folder / "modeling_chatglm.py.bak").write_text("mine", encoding="utf-8")
        old = view(folder)
        (folder / "config.json").chmod(0o600)
        assert run(folder) == 0
        for path in code.glob("*.py"):
            backup = f"{path.name}.bak.1" if path.name == "modeling_chatglm.py" else f"{path.name}.bak"
            assert (folder / backup).read_bytes() == old[path.name]
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert (folder / "modeling_chatglm.py.bak").read_text(encoding="utf-8") == "mine"
        assert (folder / "config.json").stat().st_mode & 0o777 == 0o600
        assert "leave    cli_demo.py (the new code does not use them)" in capsys.readouterr().out
        assert (folder / "cli_demo.py").exists()

    def test_dry_run_says_the_same_and_twice_is_once(
        self, quick: None, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm2", old_code=True)
        before = tree(folder)
        assert run(folder, *CONVERT, "--dry-run") == 0
        assert tree(folder) == before
        plan = capsys.readouterr().out.removesuffix("Nothing was changed (--dry-run).\n")
        assert plan.count("\n") > 8
        assert run(folder, *CONVERT) == 0
        assert capsys.readouterr().out.startswith(plan)
        done = tree(folder)
        assert run(folder, "--undo", "--dry-run") == 0
        assert run(folder, "--safetensors", "--max-shard-size", "1GB") == 0
        assert "Already up to date." in capsys.readouterr().out
        assert tree(folder) == done

    @pytest.mark.parametrize(
        ("held", "message"),
        [
            (None, "This is version 1.10.0 of the code."),
            ("1.10.0", "This is version 1.10.0 of the code."),
            ("1.9.2", "This is version 1.10.0 of the code; the folder holds an older one, 1.9.2."),
            ("2.0", "the folder holds a newer one, 2.0."),
            ("", "the folder holds an older one, 0.1.0."),
        ],
    )
    def test_says_which_version_of_the_code_the_folder_holds(
        self,
        held: str | None,
        message: str,
        quick: None,
        published: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def write(folder: Path, version: str) -> None:
            number = f'__version__ = "{version}"\n' if version else ""
            text = f"import math\n\n{number}\ndef infer_model_version(): pass\n"
            (folder / "configuration_chatglm.py").write_text(text, encoding="utf-8")

        folder, newer = published(), tmp_path / "newer"
        newer.mkdir()
        write(newer, "1.10.0")
        monkeypatch.setattr(upgrade_checkpoint, "CODE", newer)
        if held is not None:
            write(folder, held)
        assert run(folder, "--dry-run") == 0
        assert message in capsys.readouterr().out

    def test_hub_cache_keeps_its_blobs(
        self, quick: None, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        snapshot = as_hub_cache(published(old_code=True))
        cache, before = snapshot.parent.parent, tree(snapshot)
        others = {name: entry for name, entry in tree(cache).items() if not name.startswith("snapshots/0")}
        touched: set[Path] = set()
        with Watch(lambda count, path: touched.add(path)):
            assert run(snapshot, *CONVERT) == 0
            assert "load the folder by its path" in capsys.readouterr().out
            assert not (snapshot / "config.json").is_symlink()
            assert (snapshot / "config.json.bak").is_symlink()
            assert run(snapshot, "--undo") == 0
        assert {path.parent for path in touched} == {snapshot}
        assert tree(snapshot) == before
        assert {name: entry for name, entry in tree(cache).items() if not name.startswith("snapshots/0")} == others

    def test_undo_hint_of_a_folder_with_a_dash(
        self,
        quick: None,
        published: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = published(name="-x '它")
        before = tree(folder)
        (tmp_path / "link").symlink_to(folder)
        (tmp_path / "python").symlink_to(sys.executable)
        monkeypatch.chdir(tmp_path)
        for path in ("./-x '它", "link"):
            assert upgrade_checkpoint.main([path]) == 0
            hint = re.search("To undo: (.*)", capsys.readouterr().out)[1]
            done = subprocess.run(f"PATH={tmp_path}:$PATH {hint}", shell=True, cwd="/", capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            assert tree(folder) == before

    def test_command_line(self, tmp_path: Path) -> None:
        command = [sys.executable, str(REPOSITORY / "scripts" / "upgrade_checkpoint.py"), "nowhere"]
        refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == "error: nowhere does not exist.\n"

    def test_windows(self, published: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """No links, no `fcntl`, no handle of the folder, no renaming onto a file, and nothing in use is replaced."""
        folder = published(old_code=True)
        before = tree(folder)

        def refuse(*args: Any, **kwargs: Any) -> int:
            raise OSError("A required privilege is not held by the client")

        def open_file(path: Any, *args: Any, open_file: Any = os.open, **kwargs: Any) -> int:
            return refuse() if path == folder else open_file(path, *args, **kwargs)

        def replace(source: Any, target: Any, replace: Any = os.replace) -> None:
            used = Path("/proc/self/maps").read_text(encoding="utf-8") if sys.platform == "linux" else ""
            assert f"{source}\n" not in used and f"{target}\n" not in used
            replace(source, target)

        for name in ("symlink", "link", "rename"):
            monkeypatch.setattr(os, name, refuse)
        monkeypatch.setattr(os, "open", open_file)
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(folder_switch, "fcntl", None)
        assert run(folder, *CONVERT) == 0
        assert (folder / "model.safetensors.index.json").exists()
        assert run(folder, "--undo") == 0
        assert tree(folder) == before


class TestUndo:
    def test_goes_back_to_before_the_first_upgrade(
        self, quick: None, published: Callable[..., Path], code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = published(old_code=True)
        before = tree(folder)
        assert run(folder) == 0
        newer = shutil.copytree(code, tmp_path / "newer")
        for name in ("modeling_chatglm.py", "generation_chatglm.py"):
            with open(newer / name, "a", encoding="utf-8") as file:
                file.write("# Newer.\n")
        monkeypatch.setattr(upgrade_checkpoint, "CODE", newer)
        (folder / "generation_chatglm.py").write_text("# Changed by the user.\n", encoding="utf-8")
        assert run(folder, *CONVERT) == 0
        assert (folder / "modeling_chatglm.py").read_text(encoding="utf-8").endswith("# Newer.\n")
        # The script's own older file needs no backup, that of the user has one.
        assert not (folder / "modeling_chatglm.py.bak.1").exists()
        mine = folder / "generation_chatglm.py.bak.1"
        assert mine.read_text(encoding="utf-8") == "# Changed by the user.\n"
        assert run(folder, "--undo") == 0
        mine.unlink()
        assert tree(folder) == before

    def test_keeps_what_the_user_changed_since(
        self, quick: None, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published()
        before = view(folder)
        assert run(folder) == 0
        edit_json(folder / "config.json", pre_seq_len=5)
        edit_json(folder / "generation_config.json", temperature=0.5)
        (folder / "conversation_chatglm.py").unlink()
        edited = (folder / "config.json").read_bytes()
        assert run(folder, "--undo") == 0
        assert view(folder) == before
        assert "temperature" in (folder / "generation_config.json.bak").read_text(encoding="utf-8")
        assert not (folder / "config.json.bak").exists()
        assert (folder / "config.json.bak.1").read_bytes() == edited
        assert "keep     config.json as it is now, changed since the upgrade, as config" in capsys.readouterr().out

    @pytest.mark.parametrize("pattern", ["pytorch_model-*.bin", "model-00001*"])
    def test_never_leaves_a_folder_without_weights(
        self, pattern: str, quick: None, published: Callable[..., Path]
    ) -> None:
        folder = published()
        assert run(folder, *CONVERT) == 0
        for path in folder.glob(pattern):
            path.write_bytes(b"changed")
        weights = {name: content for name, content in view(folder).items() if name.startswith("model-")}
        assert len(weights) > 1
        assert run(folder, "--undo") == 0
        after = view(folder)
        assert weights.items() <= after.items()
        assert "modeling_chatglm.py" not in after

    def test_refuses_without_its_backup(
        self, quick: None, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published()
        assert run(folder, "--undo") == 1
        assert "no upgrade to undo" in capsys.readouterr().err
        assert run(folder) == 0
        (folder / "config.json.bak").write_text("{}", encoding="utf-8")
        before = tree(folder)
        assert run(folder, "--undo") == 1
        assert tree(folder) == before
        assert "config.json.bak is missing or changed" in capsys.readouterr().err


def clone(source: Path, target: Path) -> Path:
    """Copies a folder; files that nobody is still writing get a hard link, which is faster."""

    def copy(name: str, other: str) -> None:
        (shutil.copy2 if name.endswith(folder_switch.STAGED) else os.link)(name, other, follow_symlinks=False)

    return shutil.copytree(source, target, symlinks=True, copy_function=copy)


def killed_states(folder: Path, arguments: list[str], scratch: Path) -> list[Path]:
    """What SIGKILL leaves behind, before each change to the folder that the script makes; the last is complete.

    A process that dies changes no file, so a copy made at that instant is what it leaves.
    """
    with Watch(lambda number, path: clone(folder, scratch / f"{number:03}") and None) as watch:
        assert run(folder, *arguments) == 0
    clone(folder, scratch / f"{watch.count + 1:03}")
    return sorted(scratch.iterdir())


@pytest.mark.usefixtures("quick")
class TestKill:
    """What is in the folder when the process dies, at every change to the file system there is."""

    def check(self, start: Path, arguments: list[str], scratch: Path, original: dict[str, bytes]) -> None:
        before, names_before = view(start), set(os.listdir(start))
        states = killed_states(start, arguments, scratch / "states")
        after, names_after = view(start), set(os.listdir(start))
        seen = []
        for number, folder in enumerate(states):
            now, is_decided = view(folder), (folder / folder_switch.JOURNAL).exists()
            seen.append("new" if now == after else "old" if now == before else "guarded")
            if seen[-1] == "guarded":  # The library loads this file first, whatever is asked for.
                assert is_decided and now["configuration_chatglm.py"] == folder_switch.GUARD
            if number % 20 == 0 or is_decided and number % 6 == 0:
                other, again = (clone(folder, scratch / name / folder.name) for name in ("other", "again"))
                is_undone = arguments == ["--undo"] and seen[-1] == "new" and not is_decided
                assert run(again, *arguments) == (1 if is_undone else 0)
                assert (view(again), set(os.listdir(again))) == (after, names_after)
                run(other, "--undo")
                assert view(other) == original
                assert not any(
                    "chatglm_" in name or ".bak" in name for name in set(os.listdir(other)) - original.keys()
                )
            folder_switch.recover(folder)
            is_new = is_decided or seen[-1] == "new"
            expected = (after, names_after) if is_new else (before, names_before)
            assert (view(folder), set(os.listdir(folder))) == expected
        assert len(seen) > 30
        assert seen == sorted(seen, key=["old", "guarded", "new"].index)
        assert set(seen) == {"old", "guarded", "new"}

    @pytest.mark.parametrize("in_hub_cache", [False, True], ids=["folder", "hub cache"])
    def test_upgrade(self, in_hub_cache: bool, published: Callable[..., Path], tmp_path: Path) -> None:
        start = published(old_code=True)
        original = view(start)
        if in_hub_cache:
            (tmp_path / "blobs").mkdir()
            for path in list(start.iterdir()):
                path.rename(tmp_path / "blobs" / path.name)
                path.symlink_to(tmp_path / "blobs" / path.name)
        blobs = tree(tmp_path / "blobs")
        self.check(start, [] if in_hub_cache else list(CONVERT), tmp_path / "scratch", original)
        assert tree(tmp_path / "blobs") == blobs

    @pytest.mark.parametrize("old_code", [False, True])
    def test_undo(self, old_code: bool, published: Callable[..., Path], tmp_path: Path) -> None:
        start = published(old_code=old_code)
        original = view(start)
        assert run(start, *CONVERT) == 0
        self.check(start, ["--undo"], tmp_path / "scratch", original)

    def test_clearing_up(self, published: Callable[..., Path], tmp_path: Path) -> None:
        """A run that finishes a killed one is killed as well, at each point and in earnest."""
        start = published(old_code=True)
        original = view(start)
        states = killed_states(clone(start, tmp_path / "start"), [], tmp_path / "states")
        half = next(state for state in states if view(state) not in (original, view(states[-1])))
        for number in range(1, 200, 19):
            folder = clone(half, tmp_path / "killed" / str(number))
            child = os.fork()
            if child == 0:
                with Watch(
                    lambda count, path, at=number: os.kill(os.getpid(), signal.SIGKILL) if count == at else None
                ):
                    run(folder, "--undo")
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
                break
            run(folder, "--undo")
            assert view(folder) == original
        assert number > 20

    def test_loading_says_what_to_do(self, published: Callable[..., Path], tmp_path: Path) -> None:
        start = published()
        before = view(start)
        states = killed_states(start, [], tmp_path / "states")
        guarded = [state for state in states if view(state) not in (before, view(start))]
        for state in (guarded[0], guarded[len(guarded) // 2], guarded[-1]):
            for auto_class in (AutoConfig, AutoModel, AutoTokenizer):
                with pytest.raises(RuntimeError, match=f"^{MESSAGE}, or with --undo to go back.$"):
                    auto_class.from_pretrained(state, trust_remote_code=True)
        assert run(guarded[0]) == 0
        assert AutoTokenizer.from_pretrained(guarded[0], trust_remote_code=True).model_version == "chatglm3"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
    @pytest.mark.parametrize("place", ["copystat", "replace"])
    def test_error_in_the_middle(
        self,
        error: BaseException,
        place: str,
        published: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = published(old_code=True)
        before = tree(folder)
        module = {"copystat": shutil, "replace": os}[place]
        function, calls = getattr(module, place), []

        def failing(*args: Any, **kwargs: Any) -> None:
            calls.append(args)
            if len(calls) == 5:
                raise error
            function(*args, **kwargs)

        monkeypatch.setattr(module, place, failing)
        assert run(folder, *CONVERT) == (130 if isinstance(error, KeyboardInterrupt) else 1)
        message = capsys.readouterr().err
        if place == "copystat":
            assert "The folder is whole, as before or as after" in message
        else:
            assert "The folder is half changed: run this again, or with --undo" in message
            assert run(folder, "--undo", "--dry-run") == 1
            assert "has to be finished" in capsys.readouterr().err
            assert run(folder, "--undo") == 0
        assert tree(folder) == before

    def test_a_second_run_waits_for_nobody(
        self, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published()
        before = tree(folder)
        with folder_switch.lock(folder):
            assert run(folder) == 1
        assert "another run is at work" in capsys.readouterr().err
        assert tree(folder) == before


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name: str, content: Any) -> Callable[[Path], None]:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def make_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def change_index(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        index["weight_map"] |= changes
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return change


INDEX = "pytorch_model.bin.index.json"
JOURNAL, MANIFEST = folder_switch.JOURNAL, upgrade_checkpoint.MANIFEST
RECORD = {"name": "config.json", "backup": None, "sha256": "", "backup_sha256": None}
UNNAMED = {"_name_or_path": ...}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
# What is wrong with the folder, the options, and what is said about it.
REFUSALS = [
    ("chatglm3", remove("config.json"), "", "has no config.json"),
    (
        "chatglm3",
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "",
        "upgrade the folder of its base",
    ),
    ("chatglm3", write("config.json", b"{,"), "", "not valid JSON"),
    ("chatglm3", write("config.json", b'{"a": "\xff"}'), "", "not valid JSON"),
    ("chatglm3", write("config.json", b'{"a":' * 10**5), "", "not valid JSON"),
    ("chatglm3", write("config.json", []), "", "does not hold a JSON object"),
    ("chatglm3", make_folder("config.json"), "", "config.json is not a file"),
    (
        "chatglm3",
        lambda f: os.truncate(f / "config.json", 2**26 + 1),
        "",
        "or larger than any JSON file of a checkpoint",
    ),
    ("chatglm3", make_folder("quantization.py"), "--force", "quantization.py is not a file, so it cannot be replaced"),
    ("chatglm3", set_config(model_type="llama"), "", "model type 'llama'"),
    ("chatglm3", set_config(model_type=["chatglm"]), "", "model type .'chatglm'.; ChatGLM"),
    ("chatglm3", set_config(model_type="glm4", auto_map=...), "", "nothing to upgrade"),
    ("chatglm3", set_config(model_type="glm"), "", "model type 'glm'; ChatGLM"),
    ("glm4", set_config(vision_config={}), "", "'vision_config'.*GLM-4V"),
    ("chatglm1", set_config(eva_config={}, qformer_config={}, image_length=32), "", "'eva_config'.*VisualGLM"),
    ("chatglm3", set_config(eos_token_id=[5, 6], pad_token_id=5), "", "says glm4, but it holds a SentencePiece"),
    ("glm4", set_config(eos_token_id=2, pad_token_id=0), "--model-version chatglm3", "a tiktoken voc.*glm4"),
    (
        "chatglm1",
        lambda f: (f / "ice_text.model").rename(f / "tokenizer.model"),
        "",
        "says chatglm, but.*chatglm2 and",
    ),
    ("chatglm3", set_config(model_version="chatglm4"), "", "must be one of .*chatglm4"),
    ("chatglm3", set_config(model_version=[]), "", "config.json: "),
    ("chatglm3", lambda f: None, "--model-version chatglm4", "must be one of .*chatglm4"),
    ("chatglm3", set_config(**UNNAMED), "", "say --model-version chatglm2 or --model-version chatglm3"),
    ("chatglm3", write("ice_text.model", b"\n"), "", "two vocabularies"),
    ("chatglm3", remove("tokenizer.model"), "", "has no vocabulary"),
    ("chatglm3", write("tokenizer.model", b"not a vocabulary"), "", "tokenizer.model is no SentencePiece model"),
    ("chatglm3", write("tokenizer.model", POINTER), "", "tokenizer.model is a Git LFS pointer"),
    ("chatglm2", write("pytorch_model.bin", POINTER), "", "pytorch_model.bin is a Git LFS pointer"),
    ("chatglm2", write("tokenizer.model", b"\n\x0ebroken"), "", "does not load"),
    ("chatglm2", set_config(num_layers=4), "", "7 weights are missing, such as transformer.encoder.layers.3"),
    ("chatglm2", set_config(num_layers=2), "", "weights are not known, such as transformer.encoder.layers.2"),
    ("chatglm2", set_config(ffn_hidden_size=80), "", "has another shape"),
    ("chatglm2-int4", set_config(quantization_bit=...), "", "quantiz"),
    ("chatglm3", remove("pytorch_model-00002-of-00002.bin"), "--safetensors", "00002.bin, which is not in the folder"),
    ("chatglm3", change_index(extra="pytorch_model-00001-of-00002.bin"), "--safetensors", "'extra', which no file"),
    ("chatglm3", change_index(extra="../x.bin"), "--safetensors", "which file of the folder holds it"),
    ("chatglm3", change_index(extra=1), "--safetensors", "which file of the folder holds it"),
    ("chatglm3", write(INDEX, {"weight_map": []}), "--safetensors", "which file of the folder holds it"),
    (
        "chatglm2",
        write("pytorch_model.bin", b"broken"),
        "--safetensors",
        "pytorch_model.bin cannot be read as weights",
    ),
    ("chatglm2", remove("pytorch_model.bin"), "--safetensors", "no pytorch_model.bin to convert"),
    # A journal or a manifest that came with the folder: everything stays inside it, and nothing ends in a traceback.
    *[
        ("chatglm3", write(JOURNAL, content), "--undo", "journal.json.*(is not what an upgrade wrote|JSON object)")
        for content in (
            {"steps": [[None, "../outside.py"]]},
            {"steps": [["../outside.py", "config.json"]]},
            {"steps": [["config.json", "/tmp/outside.py"]]},
            {"steps": [["config.json", "C:outside.py"]]},
            {"steps": [["config.json", "..\\outside.py"]]},
            {"steps": [[None, "pytorch_model-00001-of-00002.bin"]]},
            {"steps": [["config.json"]]},
            {"steps": [[1, 2]]},
            {"steps": 5},
            {},
            [],
        )
    ],
    *[
        ("chatglm3", write(MANIFEST, content), option, "upgrade.json.*(is not what an upgrade wrote|JSON object)")
        for option in ("", "--undo")
        for content in (
            {"files": [RECORD | {"name": "../outside.py"}], "converted_from": {}},
            {"files": [RECORD | {"backup": "../outside.py"}], "converted_from": {}},
            {"files": [RECORD | {"name": "pytorch_model-00001-of-00002.bin"}], "converted_from": {}},
            {"files": [RECORD], "converted_from": {"../outside.bin": 1}},
            {"files": [RECORD], "converted_from": ["a.bin"]},
            {"files": [RECORD | {"name": 1}], "converted_from": {}},
            {"files": [{"name": "config.json"}], "converted_from": {}},
            {"files": {"a": 1}, "converted_from": {}},
            {"files": 5, "converted_from": {}},
            {"a": 1},
            [],
        )
    ],
]


class TestRefusals:
    @pytest.mark.parametrize(("case", "change", "options", "message"), REFUSALS, ids=[row[3][:30] for row in REFUSALS])
    def test_refused(
        self,
        case: str,
        change: Callable[[Path], None],
        options: str,
        message: str,
        published: Callable[..., Path],
        request: pytest.FixtureRequest,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        if "upgrade.json" in message or options == "--force":
            request.getfixturevalue("quick")
        folder = published(case)
        (tmp_path / "outside.py").write_text("{}", encoding="utf-8")
        change(folder)
        before = tree(tmp_path)
        assert run(folder, *options.split()) == 1
        assert tree(tmp_path) == before
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(message, error)

    def test_links_that_lead_outside_are_replaced_themselves(
        self, quick: None, published: Callable[..., Path], tmp_path: Path
    ) -> None:
        folder = published()
        outside = tmp_path / "outside"
        outside.write_text("{}", encoding="utf-8")
        names = [
            "quantization.py",
            "configuration_chatglm.py",
            MANIFEST + folder_switch.STAGED,
            JOURNAL + ".chatglm_new",
        ]
        for name in (*names, "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(outside)
        before, content = view(folder), tree(folder)
        assert run(folder, *CONVERT) == 0
        assert (folder / "quantization.py.bak").is_symlink() and not (folder / "quantization.py").is_symlink()
        assert run(folder, "--undo") == 0
        assert view(folder) == before
        assert tree(folder) == {name: entry for name, entry in content.items() if not name.endswith(".chatglm_new")}
        assert outside.read_text(encoding="utf-8") == "{}"

    def test_the_trial_runs_no_code_of_the_folder(self, published: Callable[..., Path], tmp_path: Path) -> None:
        """Neither its modules nor, by way of an adapter's configuration, those of another folder."""
        folder, evil = published(), tmp_path / "evil"
        for place in (folder, evil):
            place.mkdir(exist_ok=True)
            for name in ("configuration_chatglm.py", "modeling_chatglm.py", "mine.py"):
                (place / name).write_text("raise SystemExit('the code of the folder was run')", encoding="utf-8")
        shutil.copyfile(folder / "config.json", evil / "config.json")
        adapter = {"base_model_name_or_path": str(evil), "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
        edit_json(folder / "config.json", auto_map={"AutoModel": "mine.Mine", "AutoModelForX": "mine.Mine"})
        assert run(folder) == 0

    def test_a_path_that_is_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert run(tmp_path / "file") == 1
        assert capsys.readouterr().err == f"error: {tmp_path}/file is not a folder.\n"

    def test_full_disk(
        self, published: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 10**6))
        assert run(published(), *CONVERT) == 1
        assert "of disk space, 64 MB are free" in capsys.readouterr().err

    def test_read_only_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for path in (
            tmp_path,
            *list(tmp_path.parents)[:2],
        ):  # Root may write anywhere and has to become somebody else.
            path.chmod(0o755)
        (tmp_path / "folder").mkdir(mode=0o555)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            assert run(tmp_path / "folder") == 1
        finally:
            os.seteuid(user)
        assert capsys.readouterr().err == f"error: {tmp_path / 'folder'} cannot be written to.\n"

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("raise NotImplementedError('not\\nsupported yet')", "not supported yet .NotImplementedError"),
            (
                "ChatGLMTokenizer.decode = lambda *args, **kwargs: 'something'",
                "turns 'Hello, 你好 42' into 'something'",
            ),
        ],
    )
    def test_code_that_does_not_load(
        self,
        line: str,
        message: str,
        published: Callable[..., Path],
        code: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """What the code says is shown; --force goes on, and --undo goes back."""
        folder = published()
        before = tree(folder)
        broken = shutil.copytree(code, tmp_path / "broken")
        with open(broken / "tokenization_chatglm.py", "a", encoding="utf-8") as file:
            file.write(f"\n{line}\n")
        monkeypatch.setattr(upgrade_checkpoint, "CODE", broken)
        assert run(folder) == 1
        assert re.search(f"does not load: .*{message}", capsys.readouterr().err)
        assert tree(folder) == before
        assert run(folder, "--force") == 0
        assert (folder / "tokenization_chatglm.py").read_bytes() == (broken / "tokenization_chatglm.py").read_bytes()
        assert run(folder, "--undo") == 0
        assert tree(folder) == before


class TestRecognition:
    @pytest.mark.parametrize(("case", "version"), VERSIONS.items())
    def test_reference_cases(self, case: str, version: str, published: Callable[..., Path]) -> None:
        assert recognise_checkpoint.recognise(published(case), None).generation == version

    @pytest.mark.parametrize(
        ("name", "version"),
        [
            ("chatglm2-6b-32k", "chatglm2"),
            ("my-ChatGLM3-6B", "chatglm3"),
            ("codegeex2-6b-int4", "chatglm2"),
            ("models--THUDM--chatglm3-6b-base/snapshots/0123", "chatglm3"),
        ],
    )
    def test_by_the_name_of_the_folder(self, name: str, version: str, published: Callable[..., Path]) -> None:
        folder = published("chatglm2", name=name)
        edit_json(folder / "config.json", _name_or_path="/data/export")
        assert recognise_checkpoint.recognise(folder, None).generation == version

    @pytest.mark.parametrize(
        ("change", "version"),
        [
            (write("tokenization_chatglm.py", '"[Round {}]\\n\\n问："'.encode()), "chatglm2"),
            (write("tokenization_chatglm.py", b'["<|user|>", "<|observation|>"]'), "chatglm3"),
            (write("tokenizer_config.json", {"additional_special_tokens": ["<|observation|>"]}), "chatglm3"),
        ],
    )
    @pytest.mark.parametrize("name", ["/data/export", "THUDM/chatglm2-6b", "THUDM/chatglm3-6b"])
    def test_the_published_tokenizer_tells_more_than_a_name(
        self, name: str, change: Callable[[Path], None], version: str, published: Callable[..., Path]
    ) -> None:
        folder = published()
        edit_json(folder / "config.json", _name_or_path=name)
        change(folder)
        assert recognise_checkpoint.recognise(folder, None).generation == version

    @pytest.mark.parametrize("version", ["chatglm2", "chatglm3"])
    def test_our_own_code_tells_nothing(self, version: str, code: Path, published: Callable[..., Path]) -> None:
        folder = published(version)
        shutil.copyfile(code / "tokenization_chatglm.py", folder / "tokenization_chatglm.py")
        assert recognise_checkpoint.recognise(folder, None).generation == version
        edit_json(folder / "config.json", **UNNAMED)
        with pytest.raises(folder_switch.UpgradeError, match="nothing tells ChatGLM2 from ChatGLM3"):
            recognise_checkpoint.recognise(folder, None)
        assert recognise_checkpoint.recognise(folder, version).generation == version

    @pytest.mark.parametrize("case", ["chatglm1", "glm4"])
    def test_by_the_vocabulary(self, case: str, published: Callable[..., Path]) -> None:
        folder = published(case)
        only_chatglm_has = {"max_sequence_length": ..., "inner_hidden_size": ..., "position_encoding_2d": ...}
        edit_json(folder / "config.json", gmask_token_id=..., eos_token_id=2, **only_chatglm_has, **UNNAMED)
        assert recognise_checkpoint.recognise(folder, None).generation == VERSIONS[case]

    def test_real_vocabularies(self, real_tokenizers: Path, published: Callable[..., Path]) -> None:
        for case in ("chatglm1", "chatglm2", "chatglm3"):
            folder = published(case, name=case)
            for source in (real_tokenizers / VERSIONS[case]).iterdir():
                shutil.copyfile(source, folder / source.name)
            assert recognise_checkpoint.recognise(folder, None).generation == VERSIONS[case]


def odd_tensors() -> dict[str, torch.Tensor]:
    """What a checkpoint may hold: shared and strided storage, scalars, nothing, a NaN with a payload."""
    shared = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "lm_head.weight": shared,
        "word_embeddings.weight": shared,
        "row": shared[1],
        "transposed": shared.t(),
        "inv_freq": torch.tensor([0x7E01], dtype=torch.int16).view(torch.float16),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
        "权重": torch.tensor([-0.0, float("nan")], dtype=torch.float64),
    }
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        tensors[str(dtype)] = torch.tensor([1, 2, 3]).to(dtype)
    return tensors


class TestConversion:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("max_size", ["0.001KB", "0.06KB", "1GB"])
    def test_same_bits(self, zipped: bool, max_size: str, tmp_path: Path) -> None:
        tensors = odd_tensors()
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with folder_switch.Change(tmp_path) as change:
            hashes = convert_weights.convert(convert_weights.read_weights(tmp_path), max_size, change)
        read: dict[str, torch.Tensor] = {}
        for name in hashes.keys() - {convert_weights.INDEX}:
            part = load_file(tmp_path / name)
            assert not part.keys() & read.keys()
            read |= part
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            assert convert_weights.as_bits(read[name]).tolist() == convert_weights.as_bits(tensor).tolist(), name
        for name, digest in hashes.items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
        assert (len(hashes) == 1) == (max_size == "1GB")
        if len(hashes) > 1:
            index = json.loads((tmp_path / convert_weights.INDEX).read_bytes())
            assert index["weight_map"].keys() == tensors.keys()

    def test_a_damaged_copy_is_noticed(
        self,
        quick: None,
        published: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = published()
        before = tree(folder)
        save_file = convert_weights.save_file

        def damage(tensors: Any, path: Path, **options: Any) -> None:
            save_file(tensors, path, **options)
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

        monkeypatch.setattr(convert_weights, "save_file", damage)
        assert run(folder, *CONVERT) == 1
        assert "differs from its source" in capsys.readouterr().err
        assert tree(folder) == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"state_dict": {"weight": torch.ones(1)}}, "'state_dict', which is no tensor"),
            ({"phase": torch.ones(1, dtype=torch.complex64)}, "'phase', which is no tensor"),
            ({1: torch.ones(1)}, "1, which is no tensor"),
            ([torch.ones(1)], "which is no tensor"),
        ],
    )
    def test_what_cannot_be_carried_over(self, content: Any, message: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(folder_switch.UpgradeError, match=message):
            convert_weights.read_weights(tmp_path)

    def test_a_name_stored_twice(self, tmp_path: Path) -> None:
        for name in ("a.bin", "b.bin"):
            torch.save({"weight": torch.ones(1)}, tmp_path / name)
        index = {"weight_map": {"weight": "a.bin", "other": "b.bin"}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(folder_switch.UpgradeError, match="'weight' is stored in b.bin and in a file before it"):
            convert_weights.read_weights(tmp_path)

    @pytest.mark.parametrize("text", ["", "0GB", "-5GB", "5PB", "much"])
    def test_no_sizes(self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run(tmp_path, f"--max-shard-size={text}")
        assert "is not a size such as 5GB" in capsys.readouterr().err
