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
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = REPOSITORY / "scripts"

sys.path.insert(0, str(SCRIPTS))

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
# The cases whose generation the code loads.
LOADED = ["chatglm1", "chatglm2", "chatglm2-32k", "chatglm2-int4", "chatglm3", "chatglm3-32k", "glm4"]
STOP_IDS = {"chatglm1": 255, "chatglm2": 2, "chatglm3": [2, 486, 488], "glm4": [480, 487, 489]}

OLD_CODE = {
    "configuration_chatglm.py": "\nRELEASE = 'old'\n",
    "modeling_chatglm.py": "\nfrom .configuration_chatglm import RELEASE\n",
    "tokenization_chatglm.py": "\nfrom .configuration_chatglm import RELEASE\n",
    "conversation_chatglm.py": "",
    "generation_chatglm.py": "",
    "quantization.py": "",
    "quantization_kernels.py": "",
    "modeling_positions.py": "",
    "modeling_prefix.py": "",
}
CONVERT = ("--safetensors", "--max-shard-size", "100KB")
# What a program tells Python's audit hooks before it changes a file system; "upgrade.bits" is between two tensors.
CHANGES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "upgrade.bits")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the `.py` files, so that an edit during the run changes nothing."""
    code = tmp_path_factory.mktemp("code")
    for source in REPOSITORY.glob("*.py"):
        shutil.copyfile(source, code / source.name)
    return code


@pytest.fixture(autouse=True)
def use_code(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recognise_checkpoint, upgrade_checkpoint):
        monkeypatch.setattr(module, "CODE", code)
    # Only a power cut would show the difference.
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def published(reference_dir: Path, code: Path, tmp_path: Path) -> Callable[..., Path]:
    """A fresh folder in the published layout, on request with older code that loads as well."""

    def folder(case: str, name: str | None = None, old_code: bool = False) -> Path:
        target = tmp_path / (name or case)
        target.mkdir(parents=True)
        for source in (reference_dir / case).iterdir():
            if not source.name.startswith("expected."):
                shutil.copyfile(source, target / source.name)
        if old_code:
            for file, end in OLD_CODE.items():
                text = (code / file).read_text(encoding="utf-8")
                (target / file).write_text(f"# An older release.\n{text}{end}", encoding="utf-8")
            (target / "cli_demo.py").write_text("# Nothing needs it any more.\n", encoding="utf-8")
        return target

    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, case_tokenizer: Callable[[str], Any]) -> None:
    """Skips the trial, which changes nothing in the folder: for tests that run the script a hundred times."""
    found = (case_tokenizer("chatglm3"), "nothing")
    monkeypatch.setattr(try_checkpoint, "try_loading", lambda checkpoint, contents: found)


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


def view(folder: Path) -> dict[str, str]:
    """What a program finds that opens the files of a folder by name."""
    names = [name for name in os.listdir(folder) if ".bak" not in name and (folder / name).is_file()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)}


def edit_json(path: Path, **changes: Any) -> None:
    """Sets keys, and removes those whose value is `...`."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def release_of(instance: Any) -> str:
    """Whose code an object has: that of `published(old_code=True)`, or the new one."""
    return getattr(sys.modules[type(instance).__module__], "RELEASE", "new")


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


class TestUpgrade:
    @pytest.mark.parametrize("options", [(), CONVERT], ids=["code", "safetensors"])
    @pytest.mark.parametrize("case", LOADED)
    def test_loads_and_chats(
        self,
        case: str,
        options: tuple[str, ...],
        published: Callable[..., Path],
        case_model: Callable[[str], Any],
        case_tokenizer: Callable[[str], Any],
        code: Path,
    ) -> None:
        folder = published(case)
        before = set(os.listdir(folder))
        assert run(folder, *options) == 0
        added = {path.name for path in code.glob("*.py")} | {"generation_config.json", "chatglm_upgrade.json"}
        added |= {"config.json.bak", "tokenizer_config.json.bak"}
        after = set(os.listdir(folder))
        if options:
            added |= {name for name in after if name.startswith("model")}
            assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
            for path in folder.glob("pytorch_model*"):
                path.unlink()
        assert after == before | added
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert model.config.model_version == tokenizer.model_version == VERSIONS[case]
        expected = case_model(case)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        arguments = {"do_sample": False, "max_length": 60}
        assert model.chat(tokenizer, "你好", **arguments) == expected.chat(case_tokenizer(case), "你好", **arguments)
        assert (
            type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__ == type(model).__name__
        )

    @pytest.mark.parametrize("case", [case for case in STOP_IDS if case in LOADED])
    def test_generation_config_has_all_stop_ids(self, case: str, published: Callable[..., Path]) -> None:
        folder = published(case)
        run(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
        written = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        assert written == {"eos_token_id": STOP_IDS[case], **kept}

    def test_generation_config_of_the_user_stays(self, published: Callable[..., Path]) -> None:
        folder = published("chatglm3")
        (folder / "generation_config.json").write_text('{"eos_token_id":7}', encoding="utf-8")
        assert run(folder) == 0
        assert (folder / "generation_config.json").read_text(encoding="utf-8") == '{"eos_token_id":7}'

    def test_configurations_keep_what_they_have(self, published: Callable[..., Path]) -> None:
        folder = published("chatglm2-32k")
        config_file, tokenizer_file = folder / "config.json", folder / "tokenizer_config.json"
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config = {"备注": "我的模型", **config, "small": 1.5625e-07, "big": 1000000000000000019884624838656}
        config["auto_map"] = {"AutoModelForTokenClassification": "mine.Mine", "AutoModel": "elsewhere--modeling.Model"}
        config_file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        tokenizer_config = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        assert run(folder) == 0
        after = json.loads(config_file.read_text(encoding="utf-8"))
        assert after.pop("model_version") == "chatglm2"
        auto_map = after.pop("auto_map")
        assert auto_map.pop("AutoModelForTokenClassification") == "mine.Mine"
        assert auto_map == upgrade_checkpoint.AUTO_MAP
        del config["auto_map"]
        assert list(after.items()) == list(config.items())
        text = config_file.read_text(encoding="utf-8")
        assert "我的模型" in text and "1.5625e-07" in text and "1000000000000000019884624838656" in text
        after = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        assert after.pop("model_version") == "chatglm2"
        assert after["auto_map"] == {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
        assert list(after.items()) == list(tokenizer_config.items())

    def test_glm4_has_its_own_tokenizer_class(self, published: Callable[..., Path]) -> None:
        checkpoint = recognise_checkpoint.recognise(published("glm4"), None)
        written = json.loads(upgrade_checkpoint.new_contents(checkpoint)["tokenizer_config.json"])
        assert written["auto_map"] == {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}

    @pytest.mark.parametrize("auto_map", [..., ["tokenization_chatglm.ChatGLMTokenizer", None]])
    def test_tokenizer_config_without_a_map(self, auto_map: Any, published: Callable[..., Path]) -> None:
        folder = published("chatglm3")
        edit_json(folder / "tokenizer_config.json", auto_map=auto_map)
        assert run(folder) == 0
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).model_version == "chatglm3"

    def test_no_tokenizer_config(self, published: Callable[..., Path]) -> None:
        folder = published("chatglm3")
        (folder / "tokenizer_config.json").unlink()
        assert run(folder) == 0
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).model_version == "chatglm3"
        assert run(folder, "--undo") == 0
        assert not (folder / "tokenizer_config.json").exists()

    def test_replaced_code_has_backups_and_unneeded_code_stays(
        self, published: Callable[..., Path], capsys: pytest.CaptureFixture[str], code: Path
    ) -> None:
        folder = published("chatglm3", old_code=True)
        (folder / "modeling_chatglm.py.bak").write_text("mine", encoding="utf-8")
        old = {name: (folder / name).read_bytes() for name in OLD_CODE}
        (folder / "config.json").chmod(0o600)
        assert run(folder) == 0
        for name, content in old.items():
            backup = f"{name}.bak.1" if name == "modeling_chatglm.py" else f"{name}.bak"
            assert (folder / backup).read_bytes() == content
            assert (folder / name).read_bytes() == (code / name).read_bytes()
        assert (folder / "modeling_chatglm.py.bak").read_text(encoding="utf-8") == "mine"
        assert (folder / "config.json").stat().st_mode & 0o777 == 0o600
        assert "leave    cli_demo.py" in capsys.readouterr().out
        assert (folder / "cli_demo.py").exists()

    @pytest.mark.parametrize("options", [(), CONVERT], ids=["code", "safetensors"])
    def test_twice_is_once(
        self, options: tuple[str, ...], published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm2", old_code=True)
        assert run(folder, *options) == 0
        once = tree(folder)
        capsys.readouterr()
        assert run(folder, *options) == 0
        assert tree(folder) == once
        assert "Already up to date." in capsys.readouterr().out

    @pytest.mark.parametrize("options", [(), CONVERT], ids=["code", "safetensors"])
    def test_dry_run_changes_nothing_and_says_the_same(
        self, options: tuple[str, ...], published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm3", old_code=True)
        before = tree(folder)
        assert run(folder, *options, "--dry-run") == 0
        assert tree(folder) == before
        plan = capsys.readouterr().out.removesuffix("Nothing was changed (--dry-run).\n")
        assert plan.count("\n") > 8
        assert run(folder, *options) == 0
        assert capsys.readouterr().out.startswith(plan)
        done = tree(folder)
        assert run(folder, "--undo", "--dry-run") == 0
        assert tree(folder) == done

    def test_hub_cache_keeps_its_blobs(
        self, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        snapshot = as_hub_cache(published("chatglm3", old_code=True))
        blobs, before = tree(snapshot.parent.parent / "blobs"), tree(snapshot)
        assert run(snapshot, *CONVERT) == 0
        assert "load the folder by its path" in capsys.readouterr().out
        assert tree(snapshot.parent.parent / "blobs") == blobs
        assert not (snapshot / "config.json").is_symlink()
        assert (snapshot / "config.json.bak").is_symlink()
        assert release_of(AutoModel.from_pretrained(snapshot, trust_remote_code=True)) == "new"
        assert run(snapshot, "--undo") == 0
        assert tree(snapshot) == before
        assert tree(snapshot.parent.parent / "blobs") == blobs

    def test_link_to_a_folder(self, published: Callable[..., Path], tmp_path: Path) -> None:
        folder = published("chatglm3")
        os.symlink(folder, tmp_path / "link")
        assert run(tmp_path / "link") == 0
        assert (tmp_path / "link").is_symlink()
        assert (folder / "chatglm_upgrade.json").exists()

    def test_command_line(self, published: Callable[..., Path], tmp_path: Path) -> None:
        folder = published("chatglm3")
        command = [sys.executable, str(SCRIPTS / "upgrade_checkpoint.py")]
        done = subprocess.run([*command, str(folder), *CONVERT], capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        undo = re.search("To undo: python (.*)", done.stdout)[1].split()
        assert subprocess.run([sys.executable, *undo], capture_output=True, cwd=tmp_path).returncode == 0
        assert "config.json.bak" not in os.listdir(folder)
        refused = subprocess.run([*command, "nowhere"], capture_output=True, text=True, cwd=tmp_path)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr == "error: nowhere does not exist.\n"


class TestUndo:
    @pytest.mark.parametrize("options", [(), CONVERT], ids=["code", "safetensors"])
    @pytest.mark.parametrize("case", LOADED)
    def test_restores_byte_for_byte(self, case: str, options: tuple[str, ...], published: Callable[..., Path]) -> None:
        folder = published(case, old_code=case == "chatglm3")
        (folder / "logs").mkdir()
        (folder / "logs" / "mine.txt").write_text("mine", encoding="utf-8")
        before = tree(folder)
        assert run(folder, *options) == 0
        assert tree(folder) != before
        assert run(folder, "--undo") == 0
        assert tree(folder) == before

    def test_goes_back_to_before_the_first_upgrade(
        self, published: Callable[..., Path], code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = published("chatglm3", old_code=True)
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
        self, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm3")
        before = view(folder)
        assert run(folder) == 0
        edit_json(folder / "config.json", pre_seq_len=5)
        edit_json(folder / "generation_config.json", temperature=0.5)
        (folder / "conversation_chatglm.py").unlink()
        edited = (folder / "config.json").read_bytes()
        assert run(folder, "--undo") == 0
        after = view(folder)
        assert "temperature" in (folder / "generation_config.json").read_text(encoding="utf-8")
        del after["generation_config.json"]
        assert after == before
        assert not (folder / "config.json.bak").exists()
        assert (folder / "config.json.bak.1").read_bytes() == edited
        assert "config.json was changed since the upgrade; it is kept as config.json.bak.1" in capsys.readouterr().out

    def test_never_leaves_a_folder_without_weights(self, published: Callable[..., Path]) -> None:
        folder = published("chatglm3")
        assert run(folder, *CONVERT) == 0
        for path in folder.glob("pytorch_model-*.bin"):
            path.unlink()
        weights = {name: content for name, content in view(folder).items() if name.startswith("model-")}
        assert run(folder, "--undo") == 0
        after = view(folder)
        assert weights.items() <= after.items()
        assert "modeling_chatglm.py" not in after

    def test_refuses_without_its_backup(
        self, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm3")
        assert run(folder) == 0
        (folder / "config.json.bak").write_text("{}", encoding="utf-8")
        before = tree(folder)
        assert run(folder, "--undo") == 1
        assert tree(folder) == before
        assert "config.json.bak is missing or changed" in capsys.readouterr().err

    def test_nothing_to_undo(self, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
        folder = published("chatglm3")
        assert run(folder, "--undo") == 1
        assert "no upgrade to undo" in capsys.readouterr().err


class Watch:
    """Calls a function before each change to the file system while it is used as a context.

    The function gets the number of the change, and the path of a file that is going to be written.
    """

    def __init__(self, action: Callable[[int, Path | None], None]) -> None:
        self.action = action
        self.count = 0
        self.is_on = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        is_writing = event == "open" and isinstance(args[2], int) and args[2] & WRITING
        if self.is_on and (is_writing or event in CHANGES):
            self.is_on = False  # The action may change files itself.
            self.count += 1
            self.action(self.count, Path(args[0]) if is_writing else None)
            self.is_on = True

    def __enter__(self) -> None:
        self.is_on = True

    def __exit__(self, *exception: object) -> None:
        self.is_on = False


def clone(source: Path, target: Path) -> Path:
    """Copies a folder; files that nobody is still writing get a hard link, which is faster."""

    def copy(name: str, other: str) -> None:
        (shutil.copy2 if "/.chatglm_upgrade/" in name else os.link)(name, other)

    return shutil.copytree(source, target, symlinks=True, copy_function=copy)


def killed_states(start: Path, arguments: list[str], scratch: Path) -> list[Path]:
    """What SIGKILL leaves behind, before each change to the file system that the script makes; the last is complete.

    A process that dies changes no file, so a copy made at that instant is what it leaves. Of a file being written there
    is a second copy, in which nothing of it has reached the disk yet. `test_sigkill` does it in earnest.
    """
    folder = clone(start, scratch / "folder")

    def copy(number: int, written: Path | None) -> None:
        clone(folder, scratch / f"{number:03}")
        if written is not None and written.is_relative_to(folder):
            empty = clone(folder, scratch / f"{number:03}-empty") / written.relative_to(folder)
            empty.unlink(missing_ok=True)
            empty.touch()

    watch = Watch(copy)
    with watch:
        assert run(folder, *arguments) == 0
    clone(folder, scratch / f"{watch.count + 1:03}")
    return sorted(path for path in scratch.iterdir() if path != folder)


def run_and_kill(folder: Path, arguments: list[str], number: int) -> None:
    """Run the script in a process that gets SIGKILL before its n-th change to the file system."""
    child = os.fork()
    if child == 0:
        try:
            with Watch(lambda count, written: os.kill(os.getpid(), signal.SIGKILL) if count == number else None):
                run(folder, *arguments)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.usefixtures("quick")
class TestKill:
    """What is in the folder when the process dies, at every change to the file system there is."""

    @pytest.fixture(autouse=True)
    def fixed_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whole folders are deleted in the order of the names, whatever the file system's order is."""
        scandir = os.scandir

        @contextmanager
        def in_order(path: Any) -> Iterator[Iterator[os.DirEntry]]:
            with scandir(path) as entries:
                yield iter(sorted(entries, key=lambda entry: entry.name))

        monkeypatch.setattr(os, "scandir", in_order)

    @pytest.fixture(autouse=True)
    def count_tensors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also dies in the middle of a conversion: between any two tensors written or compared."""
        bits = convert_weights.BinReader.bits

        def audited(reader: Any, entry: Any) -> torch.Tensor:
            sys.audit("upgrade.bits")
            return bits(reader, entry)

        monkeypatch.setattr(convert_weights.BinReader, "bits", audited)

    def check(self, start: Path, arguments: list[str], scratch: Path, original: dict[str, str]) -> None:
        """The folder is as before or as after at each point, whichever way it goes on from there."""
        complete = clone(start, scratch / "complete")
        assert run(complete, *arguments) == 0
        before, after, names = view(start), view(complete), sorted(os.listdir(complete))
        assert before != after
        seen = []
        for folder in killed_states(start, arguments, scratch / "states"):
            now = view(folder)
            assert now in (before, after), f"killed before change {folder.name}"
            seen.append(now == after)
            other = clone(folder, scratch / "other" / folder.name)
            nothing_left = arguments == ["--undo"] and now == after and not folder_switch.is_pending(folder)
            assert run(folder, *arguments) == (1 if nothing_left else 0)
            assert view(folder) == after
            assert sorted(os.listdir(folder)) == names
            run(other, "--undo")
            assert view(other) == original
            assert not any(name.startswith(".chatglm") or ".bak" in name for name in os.listdir(other))
        assert len(seen) > 50
        assert seen == sorted(seen)
        assert set(seen) == {False, True}

    @pytest.mark.parametrize("in_hub_cache", [False, True], ids=["folder", "hub cache"])
    def test_upgrade(self, in_hub_cache: bool, published: Callable[..., Path], tmp_path: Path) -> None:
        start = published("chatglm3", old_code=True)
        if in_hub_cache:
            links = published("chatglm3", name="cache/folder", old_code=True)
            shutil.rmtree(start)
            start = links
            for path in list(start.iterdir()):
                (tmp_path / "blobs").mkdir(exist_ok=True)
                shutil.move(path, tmp_path / "blobs" / path.name)
                os.symlink(tmp_path / "blobs" / path.name, path)
        self.check(start, [] if in_hub_cache else list(CONVERT), tmp_path / "scratch", view(start))

    def test_undo(self, published: Callable[..., Path], tmp_path: Path) -> None:
        start = published("chatglm3", old_code=True)
        original = view(start)
        assert run(start, *CONVERT) == 0
        self.check(start, ["--undo"], tmp_path / "scratch", original)

    def test_clearing_up(self, published: Callable[..., Path], tmp_path: Path) -> None:
        """A run that clears up after a killed one is killed as well."""
        start = published("chatglm3", old_code=True)
        before = view(start)
        halves: dict[bool, Path] = {}
        for folder in killed_states(start, [], tmp_path / "first"):
            if (folder / "tokenizer_config.json").is_symlink():
                halves.setdefault(view(folder) != before, folder)
        assert set(halves) == {False, True}
        for is_new, half in halves.items():
            now = view(half)
            for folder in killed_states(half, ["--undo"], tmp_path / f"second-{is_new}"):
                assert view(folder) in (now, before)
                run(folder, "--undo")
                assert view(folder) == before

    def test_sigkill(self, published: Callable[..., Path], tmp_path: Path) -> None:
        start = published("chatglm3", old_code=True)
        states = killed_states(start, list(CONVERT), tmp_path / "states")
        states = [folder for folder in states if "empty" not in folder.name]
        assert len(states) > 100
        for number in range(1, len(states), len(states) // 12):
            folder = clone(start, tmp_path / str(number))
            run_and_kill(folder, list(CONVERT), number)
            assert view(folder) == view(states[number - 1])
            assert sorted(os.listdir(folder)) == sorted(os.listdir(states[number - 1]))
            assert run(folder, *CONVERT) == 0
            assert view(folder) == view(states[-1])

    def test_each_state_loads(self, published: Callable[..., Path], tmp_path: Path) -> None:
        """The last state with the old content and the first with the new one, full of links, loaded by the library."""
        start = published("chatglm3", old_code=True)
        before = view(start)
        states = killed_states(start, list(CONVERT), tmp_path / "states")
        first_new = next(index for index, folder in enumerate(states) if view(folder) != before)
        for release, folder in (("old", states[first_new - 1]), ("new", states[first_new])):
            assert (folder / "config.json").is_symlink()
            model = AutoModel.from_pretrained(folder, trust_remote_code=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            assert release_of(model) == release_of(tokenizer) == release
            assert model.chat(tokenizer, "你好", do_sample=False, max_length=40)[0]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
    def test_error_in_the_middle(
        self, error: Any, published: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = published("chatglm3", old_code=True)
        before = tree(folder)
        replace, calls = os.replace, []

        def failing(source: Any, target: Any) -> None:
            calls.append(target)
            if len(calls) == 5:
                raise error
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        assert run(folder, *CONVERT) == (130 if error is KeyboardInterrupt else 1)
        assert len(calls) > 5
        assert tree(folder) == before

    def test_a_second_run_waits_for_nobody(
        self, published: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm3")
        before = tree(folder)
        with folder_switch.lock(folder):
            assert run(folder) == 1
        assert "another run is at work" in capsys.readouterr().err
        assert tree(folder) == before

    def test_no_links_no_upgrade(
        self, published: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm3")
        before = tree(folder)

        def refuse(*args: Any) -> None:
            raise PermissionError("Operation not permitted")

        monkeypatch.setattr(os, "symlink", refuse)
        assert run(folder) == 1
        assert "no symbolic link can be made" in capsys.readouterr().err
        assert tree(folder) == before

    def test_no_hard_links(self, published: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
        folder = published("chatglm3", old_code=True)
        before = view(folder)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise PermissionError("Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        assert run(folder, *CONVERT) == 0
        assert run(folder, "--undo") == 0
        assert view(folder) == before


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def keep_only(name: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name != name] and None


def nothing(folder: Path) -> None:
    pass


def other_index(folder: Path) -> None:
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    index["weight_map"]["transformer.extra"] = "pytorch_model-00001-of-00002.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


UNNAMED = {"_name_or_path": ...}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
REFUSALS = [
    ("chatglm3", remove("config.json"), "", "has no config.json"),
    ("chatglm3", keep_only("tokenizer.model"), "", "has no config.json"),
    (
        "chatglm3",
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "",
        "upgrade the folder of its base",
    ),
    ("chatglm3", write("config.json", b"{,"), "", "not valid JSON"),
    ("chatglm3", write("config.json", b"[]"), "", "does not hold a JSON object"),
    ("chatglm3", set_config(model_type="llama"), "", "model type 'llama'"),
    ("chatglm3", set_config(model_type="glm", auto_map=...), "", "nothing to upgrade"),
    ("chatglm3", set_config(model_type="glm4", auto_map=...), "", "nothing to upgrade"),
    ("chatglm3", set_config(model_type="glm"), "", "model type 'glm'; ChatGLM"),
    ("glm4", set_config(vision_config={}), "", "'vision_config'.*GLM-4V"),
    ("glm4", set_config(boi_token_id=151339), "", "'boi_token_id'.*GLM-4V"),
    ("chatglm1", set_config(eva_config={}, qformer_config={}, image_length=32), "", "'eva_config'.*VisualGLM"),
    ("chatglm3", set_config(eos_token_id=[5, 6], pad_token_id=5), "", "says glm4, but it holds a SentencePiece"),
    (
        "glm4",
        set_config(eos_token_id=2, pad_token_id=0, **UNNAMED),
        "--model-version chatglm3",
        "a tiktoken voc.*glm4",
    ),
    (
        "chatglm1",
        lambda f: (f / "ice_text.model").rename(f / "tokenizer.model"),
        "",
        "says chatglm, but.*chatglm2 and",
    ),
    ("chatglm3", set_config(model_version="chatglm4"), "", "must be one of .*chatglm4"),
    ("chatglm3", set_config(**UNNAMED), "", "say --model-version chatglm2 or --model-version chatglm3"),
    ("chatglm2", write("tokenization_chatglm.py", b'"<|observation|>"'), "", "settle it with --model-version"),
    ("glm4", nothing, "--model-version chatglm3", "the keys of config.json are those of glm4"),
    ("chatglm3", write("ice_text.model", b"\n"), "", "two vocabularies"),
    ("chatglm3", remove("tokenizer.model"), "", "has no vocabulary"),
    ("chatglm3", write("tokenizer.model", b"not a vocabulary"), "", "tokenizer.model is no SentencePiece model"),
    ("chatglm3", write("tokenizer.model", POINTER), "", "tokenizer.model is a Git LFS pointer"),
    ("chatglm2", write("pytorch_model.bin", POINTER), "", "pytorch_model.bin is a Git LFS pointer"),
    ("chatglm2", write("tokenizer.model", b"\n\x0ebroken"), "", "does not load"),
    ("chatglm2", set_config(num_layers=4), "", "7 weights are missing, such as transformer.encoder.layers.3"),
    ("chatglm2", set_config(num_layers=2), "", "weights are not known, such as transformer.encoder.layers.2"),
    ("chatglm2", set_config(ffn_hidden_size=80), "", "has another shape"),
    (
        "chatglm2-int4",
        set_config(quantization_bit=...),
        "",
        "weights are quantized, but config.json has no quantization",
    ),
    ("chatglm3", remove("pytorch_model-00002-of-00002.bin"), "--safetensors", "00002.bin, which is not in the folder"),
    ("chatglm3", other_index, "--safetensors", "'transformer.extra', which no file holds"),
    ("chatglm2", remove("pytorch_model.bin"), "--safetensors", "no pytorch_model.bin to convert"),
    ("chatglm3", write("chatglm_upgrade.json", b'{"a": 1}'), "", "is not what an upgrade wrote"),
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
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = published(case, name="folder")
        change(folder)
        before = tree(folder)
        assert run(folder, *options.split()) == 1
        assert tree(folder) == before
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(message, error)

    def test_a_path_that_is_no_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").touch()
        assert run(tmp_path / "file") == run(tmp_path / "missing") == 1
        assert capsys.readouterr().err.splitlines() == [
            f"error: {tmp_path}/file is not a folder.",
            f"error: {tmp_path}/missing does not exist.",
        ]

    def test_full_disk(
        self, published: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm3")
        before = tree(folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 10**6))
        assert run(folder, *CONVERT) == 1
        assert "of disk space, 64.0 MB are free" in capsys.readouterr().err
        assert tree(folder) == before
        assert run(folder) == 0

    def test_read_only_folder(self, reference_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        # Not below pytest's folder, which root alone may enter: root may write anywhere and has to become somebody else.
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "chatglm3"
            shutil.copytree(reference_dir / "chatglm3", folder)
            os.chmod(temporary, 0o755)
            folder.chmod(0o555)
            before, user = tree(folder), os.geteuid()
            try:
                if user == 0:
                    os.seteuid(65534)
                assert run(folder) == 1
            finally:
                os.seteuid(user)
            assert capsys.readouterr().err == f"error: {folder} cannot be written to.\n"
            assert tree(folder) == before
            folder.chmod(0o755)

    def test_code_that_does_not_load(
        self,
        published: Callable[..., Path],
        code: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """What the code says is shown; --force goes on, and --undo goes back."""
        folder = published("chatglm3", old_code=True)
        before = tree(folder)
        broken = shutil.copytree(code, tmp_path / "broken")
        with open(broken / "tokenization_chatglm.py", "a", encoding="utf-8") as file:
            file.write("\nraise NotImplementedError('not\\nsupported yet')\n")
        monkeypatch.setattr(upgrade_checkpoint, "CODE", broken)
        assert run(folder) == 1
        assert "does not load: not supported yet (NotImplementedError)" in capsys.readouterr().err
        assert tree(folder) == before
        assert run(folder, "--force") == 0
        assert (folder / "tokenization_chatglm.py").read_bytes() == (broken / "tokenization_chatglm.py").read_bytes()
        assert run(folder, "--undo") == 0
        assert tree(folder) == before

    def test_tokenizer_that_loses_text(
        self, published: Callable[..., Path], code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = shutil.copytree(code, tmp_path / "broken")
        with open(broken / "tokenization_chatglm.py", "a", encoding="utf-8") as file:
            file.write("\nChatGLMTokenizer.decode = lambda self, ids, **kwargs: 'something'\n")
        monkeypatch.setattr(upgrade_checkpoint, "CODE", broken)
        assert run(published("chatglm3")) == 1


class TestRecognition:
    @pytest.mark.parametrize(("case", "version"), VERSIONS.items())
    def test_reference_cases(self, case: str, version: str, published: Callable[..., Path]) -> None:
        checkpoint = recognise_checkpoint.recognise(published(case, name="folder"), None)
        assert checkpoint.model_version == version

    @pytest.mark.parametrize(
        ("name", "version"),
        [
            ("chatglm2-6b-32k", "chatglm2"),
            ("my-ChatGLM3-6B", "chatglm3"),
            ("codegeex2-6b-int4", "chatglm2"),
            ("models--THUDM--chatglm2-6b/snapshots/0123", "chatglm2"),
            ("models--THUDM--chatglm3-6b-base/snapshots/0123", "chatglm3"),
        ],
    )
    def test_by_the_name_of_the_folder(self, name: str, version: str, published: Callable[..., Path]) -> None:
        folder = published("chatglm2", name=name)
        edit_json(folder / "config.json", _name_or_path="/data/export")
        assert recognise_checkpoint.recognise(folder, None).model_version == version

    @pytest.mark.parametrize(
        ("change", "version"),
        [
            (write("tokenization_chatglm.py", '"[Round {}]\\n\\n问："'.encode()), "chatglm2"),
            (write("tokenization_chatglm.py", b'["<|user|>", "<|observation|>"]'), "chatglm3"),
            (write("tokenizer_config.json", b'{"additional_special_tokens": ["<|observation|>"]}'), "chatglm3"),
        ],
    )
    def test_by_the_published_tokenizer(
        self, change: Callable[[Path], None], version: str, published: Callable[..., Path]
    ) -> None:
        folder = published("chatglm3", name="folder")
        edit_json(folder / "config.json", **UNNAMED)
        change(folder)
        assert recognise_checkpoint.recognise(folder, None).model_version == version

    @pytest.mark.parametrize("version", ["chatglm2", "chatglm3"])
    def test_code_copied_by_hand_tells_nothing(self, version: str, code: Path, published: Callable[..., Path]) -> None:
        folder = published(version, name="folder")
        shutil.copyfile(code / "tokenization_chatglm.py", folder / "tokenization_chatglm.py")
        assert recognise_checkpoint.recognise(folder, None).model_version == version
        edit_json(folder / "config.json", **UNNAMED)
        with pytest.raises(folder_switch.UpgradeError, match="nothing tells ChatGLM2 from ChatGLM3"):
            recognise_checkpoint.recognise(folder, None)

    @pytest.mark.parametrize("case", ["chatglm1", "glm4"])
    def test_by_the_vocabulary(self, case: str, published: Callable[..., Path]) -> None:
        folder = published(case, name="folder")
        only_chatglm_has = {"max_sequence_length": ..., "inner_hidden_size": ..., "position_encoding_2d": ...}
        edit_json(folder / "config.json", gmask_token_id=..., eos_token_id=2, **only_chatglm_has, **UNNAMED)
        assert recognise_checkpoint.recognise(folder, None).model_version == VERSIONS[case]

    @pytest.mark.parametrize("version", ["chatglm2", "chatglm3"])
    def test_by_the_option(self, version: str, published: Callable[..., Path]) -> None:
        folder = published("chatglm2-32k", name="folder")
        edit_json(folder / "config.json", **UNNAMED)
        assert run(folder, "--model-version", version) == 0
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert model.config.model_version == tokenizer.model_version == version

    def test_real_vocabularies(self, real_tokenizers: Path, published: Callable[..., Path]) -> None:
        for case in ("chatglm1", "chatglm2", "chatglm3"):
            folder = published(case)
            for source in (real_tokenizers / VERSIONS[case]).iterdir():
                shutil.copyfile(source, folder / source.name)
            assert recognise_checkpoint.recognise(folder, None).model_version == VERSIONS[case]


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
    @pytest.mark.parametrize("max_size", [1, 60, 10**9])
    def test_same_bits(self, zipped: bool, max_size: int, tmp_path: Path) -> None:
        tensors = odd_tensors()
        torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        shards = convert_weights.plan_shards(convert_weights.list_entries(tmp_path), max_size)
        (tmp_path / "new").mkdir()
        hashes = convert_weights.write_shards(shards, tmp_path / "new")
        assert {path.name for path in (tmp_path / "new").iterdir()} == hashes.keys()
        read: dict[str, torch.Tensor] = {}
        for name, shard in shards.items():
            assert sum(entry.size for entry in shard) <= max_size or len(shard) == 1
            part = load_file(tmp_path / "new" / name)
            assert not part.keys() & read.keys()
            read |= part
            content = (tmp_path / "new" / name).read_bytes()
            header_end = 8 + int.from_bytes(content[:8], "little")
            header = json.loads(content[8:header_end])
            assert header.pop("__metadata__") == {"format": "pt"}
            for key, entry in header.items():
                assert (header_end + entry["data_offsets"][0]) % tensors[key].itemsize == 0, f"{key} is not aligned"
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(convert_weights.as_bits(read[name]), convert_weights.as_bits(tensor)), name
        for name, content in hashes.items():
            assert hashlib.sha256((tmp_path / "new" / name).read_bytes()).hexdigest() == content

    @pytest.mark.parametrize("case", VERSIONS)
    def test_reference_cases(self, case: str, reference_dir: Path, tmp_path: Path) -> None:
        source = reference_dir / case
        shards = convert_weights.plan_shards(convert_weights.list_entries(source), 10**5)
        convert_weights.write_shards(shards, tmp_path)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        stored: dict[str, torch.Tensor] = {}
        for path in source.glob("pytorch_model*.bin"):
            stored |= torch.load(path, weights_only=True)
        assert index["weight_map"].keys() == stored.keys()
        for name, tensor in stored.items():
            with safe_open(tmp_path / index["weight_map"][name], framework="pt") as file:
                read = file.get_tensor(name)
            assert torch.equal(read, tensor) and read.dtype == tensor.dtype
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())

    def test_a_damaged_copy_is_noticed(
        self, published: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = published("chatglm3")
        before = tree(folder)
        write_shard = convert_weights._write_shard

        def damage(path: Path, *args: Any) -> str:
            digest = write_shard(path, *args)
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last[0] ^ 1]))
            return digest

        monkeypatch.setattr(convert_weights, "_write_shard", damage)
        assert run(folder, *CONVERT) == 1
        assert "differs from its source" in capsys.readouterr().err
        assert tree(folder) == before

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"state_dict": {"weight": torch.ones(1)}}, "'state_dict', which is no tensor"),
            ({"phase": torch.ones(1, dtype=torch.complex64)}, "'phase', which is no tensor"),
        ],
    )
    def test_what_cannot_be_carried_over(self, content: dict[str, Any], message: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(folder_switch.UpgradeError, match=message):
            convert_weights.list_entries(tmp_path)

    def test_a_name_stored_twice(self, tmp_path: Path) -> None:
        for name in ("a.bin", "b.bin"):
            torch.save({"weight": torch.ones(1)}, tmp_path / name)
        index = {"weight_map": {"weight": "a.bin", "other": "b.bin"}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
        with pytest.raises(folder_switch.UpgradeError, match="stored in a.bin and again in b.bin"):
            convert_weights.list_entries(tmp_path)

    def test_a_second_conversion_does_nothing(self, published: Callable[..., Path]) -> None:
        folder = published("chatglm3")
        assert run(folder) == 0
        assert run(folder, *CONVERT) == 0
        converted = tree(folder)
        assert run(folder, "--safetensors", "--max-shard-size", "1GB") == 0
        assert tree(folder) == converted

    @pytest.mark.parametrize(
        ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("700", 700), ("1KiB", 1024)]
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert upgrade_checkpoint.parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "0", "-5GB", "5TB", "much"])
    def test_no_sizes(self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run(tmp_path, f"--max-shard-size={text}")
        assert "is not a size such as 5GB" in capsys.readouterr().err
