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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES, RECORDED
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

# At its top level, 5.17.0 has none without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))

import folder_switch  # noqa: E402
import recognise_checkpoint  # noqa: E402
import try_checkpoint  # noqa: E402
import upgrade_checkpoint  # noqa: E402


STOP_IDS = {"chatglm1": 255, "chatglm2-int4": 2, "chatglm3": [2, 486, 488], "glm4": [480, 487, 489]}
CONVERT = ("--safetensors", "--max-shard-size", "100KB")
STAGED, JOURNAL, MANIFEST = folder_switch.STAGED, folder_switch.JOURNAL, upgrade_checkpoint.MANIFEST
BIN_INDEX = "pytorch_model.bin.index.json"
# What a program tells Python's audit hooks before it changes a file system.
CHANGES = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Workshop:
    """Makes folders and runs the script on them."""

    code: Path
    place: Path
    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def folder(self, case: str = "chatglm3", name: str = "folder", old_code: bool = False) -> Path:
        """A fresh folder in the published layout, on request with older code in it."""
        target = self.place / name
        source = REPOSITORY / "tests" / "reference" / case
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected.*"))
        for path in [*self.code.glob("*.py"), Path("cli_demo.py")] if old_code else []:
            (target / path.name).write_text("def infer_model_version(): pass  # Older.\n", encoding="utf-8")
        return target

    def change_code(self, **lines: str) -> Path:
        """From now on the script has other code, with a line added to some files."""
        other = shutil.copytree(self.code, self.place / "other code")
        for name, line in lines.items():
            with open(other / f"{name}.py", "a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")
        self.patch.setattr(upgrade_checkpoint, "CODE", other)
        return other

    def run(self, folder: Path, *arguments: str) -> int:
        return upgrade_checkpoint.main([str(folder), *arguments])

    def said(self) -> str:
        """What was printed since the last time, errors at the end."""
        return "".join(self.capsys.readouterr())


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory, copy_code: Callable[[Path], None]) -> Path:
    """A copy of the `.py` files, so that an edit during the run changes nothing."""
    code = tmp_path_factory.mktemp("code")
    copy_code(code)
    return code


@pytest.fixture
def full(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Workshop:
    for module in (recognise_checkpoint, upgrade_checkpoint):
        monkeypatch.setattr(module, "CODE", code)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # Only a power cut would show the difference.
    return Workshop(code, tmp_path, monkeypatch, capsys)


@pytest.fixture
def shop(full: Workshop) -> Workshop:
    """Without the trial, which takes its time and changes nothing in the folder."""
    tokenizer = SimpleNamespace(stop_token_ids=lambda: [2, 486, 488])
    full.patch.setattr(try_checkpoint, "try_loading", lambda checkpoint, contents: (tokenizer, "nothing"))
    return full


@pytest.fixture
def small(shop: Workshop) -> Workshop:
    """With few files of code, so that there are few changes to stop before."""
    few = [*folder_switch.GUARDED, "modeling_chatglm.py"]
    shop.code = shutil.copytree(shop.code, shop.place / "few", ignore=lambda _, names: set(names) - set(few))
    shop.patch.setattr(upgrade_checkpoint, "CODE", shop.code)
    return shop


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
    names = [name for name in os.listdir(folder) if not any(part in name for part in (".bak", STAGED, "_upgrade"))]
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Sets keys, and removes those whose value is `...`."""
    content = {key: value for key, value in (read(folder, name) | changes).items() if value is not ...}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


class Watch:
    """Calls a function with the number and the path of each change to the file system while it is used as a context."""

    def __init__(self, action: Callable[[int, Path], object]) -> None:
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
        self, case: str, full: Workshop, case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]
    ) -> None:
        folder = full.folder(case)
        (folder / "logs").mkdir()
        before = tree(folder)
        assert full.run(folder, *(() if case == "chatglm1" else CONVERT)) == 0
        added = {"generation_config.json", MANIFEST, "config.json.bak", "tokenizer_config.json.bak"}
        added |= {path.name for path in full.code.glob("*.py")}
        weights = {path.name for path in folder.glob("model*.safetensors*")}
        assert set(os.listdir(folder)) == before.keys() | added | weights
        assert len(weights) > 2 or case == "chatglm1"
        for path in folder.glob("pytorch_model*") if weights else ():
            shutil.move(path, folder / "logs")
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert model.config.model_version == tokenizer.model_version == RECORDED[case].model_version
        assert model.generation_config.eos_token_id == STOP_IDS[case]
        expected = case_model(case)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        arguments = {"do_sample": False, "max_length": 60}
        assert model.chat(tokenizer, "你好", **arguments) == expected.chat(case_tokenizer(case), "你好", **arguments)
        for path in (folder / "logs").iterdir():
            shutil.move(path, folder)
        assert full.run(folder, "--undo") == 0
        assert tree(folder) == before

    def test_a_folder_of_glm_4v_has_a_processor(self, full: Workshop, case: Callable[[str], Any]) -> None:
        folder, recorded = full.folder("glm4v"), case("glm4v")
        before = tree(folder)
        assert full.run(folder) == 0
        assert "tokenizer round trip, processor, names and shapes of the weights" in full.said()
        assert set(os.listdir(folder)) - before.keys() >= {"preprocessor_config.json", "processing_chatglm.py"}
        assert read(folder, "config.json")["model_version"] == "glm4v"
        options = {"trust_remote_code": True}
        processor, pictures = (auto.from_pretrained(folder, **options) for auto in (AutoProcessor, AutoImageProcessor))
        single = recorded.expected["single"]
        file = recorded.files / recorded.expected["preprocess"]["wide"]["file"]
        assert pictures(str(file), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
        (message,) = single["messages"]
        given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{**message, "image": str(file)}], **given)
        for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
            model = auto.from_pretrained(folder, **options)
            output = model.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=[480, 487, 489])
            assert output[0, -5:].tolist() == single["greedy_new_ids"][:5]
        assert full.run(folder) == 0 and "Already up to date" in full.said()
        assert full.run(folder, "--undo") == 0
        assert tree(folder) == before

    def test_settings_of_pictures(self, shop: Workshop) -> None:
        """Those of the model go in, and the owner's others stay."""
        folder = shop.folder("glm4v")
        (folder / "preprocessor_config.json").write_text(
            '{"size": 5, "own": 1, "auto_map": {"AutoProcessor": "a--b.C"}}'
        )
        assert shop.run(folder) == 0
        settings = read(folder, "preprocessor_config.json")
        assert (settings["size"], settings["patch_size"], settings["own"]) == ({"height": 32, "width": 32}, 4, 1)
        assert settings["auto_map"]["AutoProcessor"] == "processing_chatglm.ChatGLMProcessor"
        folder = shop.folder("glm4v", "wrong")
        edit(folder, "config.json", vision_config={"patch_size": 0})
        assert shop.run(folder) == 1
        assert "config.json: `vision_config.patch_size` must be a positive whole number, got 0" in shop.said()
        folder = shop.folder("glm4", "text")
        assert shop.run(folder) == 0
        assert not (folder / "preprocessor_config.json").exists()
        assert "AutoProcessor" not in read(folder, "config.json")["auto_map"]

    def test_configurations_keep_what_they_have(self, shop: Workshop) -> None:
        folder = shop.folder("chatglm2-32k")
        config, tokenizer_config = read(folder, "config.json"), read(folder, "tokenizer_config.json")
        config = {"备注": "我的模型", **config, "small": 1.5625e-07, "big": 1000000000000000019884624838656}
        config |= {
            "half": "\ud83d",
            "auto_map": {"AutoModelForTokenClassification": "mine.Mine", "AutoModel": "a--b.C"},
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "generation_config.json").write_text('{"eos_token_id":7}', encoding="utf-8")
        assert shop.run(folder) == 0
        auto_map = {
            "AutoModelForTokenClassification": "mine.Mine",
            **recognise_checkpoint.load_code("configuration_chatglm").AUTO_MAP,
        }
        expected = config | {"auto_map": auto_map, "model_version": "chatglm2"}
        assert list(read(folder, "config.json").items()) == list(expected.items())
        text = (folder / "config.json").read_text(encoding="utf-8")
        assert "我的模型" in text and "1.5625e-07" in text and "1000000000000000019884624838656" in text
        auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
        expected = tokenizer_config | {"auto_map": auto_map, "model_version": "chatglm2"}
        assert read(folder, "tokenizer_config.json") == expected
        assert (folder / "generation_config.json").read_text(encoding="utf-8") == '{"eos_token_id":7}'

    @pytest.mark.parametrize("case", GENERATION_CASES)
    def test_published_templates_are_replaced_and_others_stay(self, case: str, shop: Workshop) -> None:
        known, own = "{% published %}", "{{ 1 }}\r\n"
        digest = hashlib.sha256(b"{%published%}").hexdigest()
        shop.patch.setattr(recognise_checkpoint.load_code("conversation_chatglm"), "PUBLISHED_TEMPLATES", (digest,))
        formats = recognise_checkpoint.load_code("conversation_chatglm").CONVERSATION_FORMATS
        ours = formats[RECORDED[case].model_version].chat_template
        folder = shop.folder(case, "late")
        edit(folder, "tokenizer_config.json", chat_template=known)
        before = tree(folder)
        (folder / "chat_template.jinja").write_bytes(f" {known}\n".encode())
        assert shop.run(folder) == 0
        assert read(folder, "tokenizer_config.json")["chat_template"] == ours
        assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == ours
        assert "replace  chat_template.jinja (backup chat_template.jinja.bak)" in shop.said()
        assert shop.run(folder) == 0 and "Already up to date" in shop.said()
        assert shop.run(folder, "--undo") == 0
        (folder / "chat_template.jinja").unlink()
        assert tree(folder) == before
        names = [{"name": "default", "template": known}, {"name": "own", "template": own}]
        for number, (saved, expected) in enumerate([(own, own), (names, [{**names[0], "template": ours}, names[1]])]):
            folder = shop.folder(case, f"own {number}")
            edit(folder, "tokenizer_config.json", chat_template=saved)
            (folder / "chat_template.jinja").write_bytes(own.encode() + b"\xff")
            assert shop.run(folder) == 0
            assert read(folder, "tokenizer_config.json")["chat_template"] == expected
            assert (folder / "chat_template.jinja").read_bytes() == own.encode() + b"\xff"

    @pytest.mark.parametrize("auto_map", [..., ["tokenization_chatglm.ChatGLMTokenizer", None], "text", None, 1])
    def test_auto_maps_of_another_form(self, auto_map: Any, shop: Workshop) -> None:
        folder = shop.folder("glm4")
        edit(folder, "tokenizer_config.json", auto_map=auto_map)
        edit(folder, "config.json", auto_map=auto_map)
        assert shop.run(folder) == 0
        assert (
            read(folder, "config.json")["auto_map"] == recognise_checkpoint.load_code("configuration_chatglm").AUTO_MAP
        )
        auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
        assert read(folder, "tokenizer_config.json")["auto_map"] == auto_map

    def test_replaced_code_has_backups_and_unneeded_code_stays(self, shop: Workshop) -> None:
        folder = shop.folder(old_code=True)
        (folder / "modeling_chatglm.py.bak").write_text("mine", encoding="utf-8")
        old = view(folder)
        (folder / "config.json").chmod(0o600)
        assert shop.run(folder) == 0
        for path in shop.code.glob("*.py"):
            backup = f"{path.name}.bak.1" if path.name == "modeling_chatglm.py" else f"{path.name}.bak"
            assert (folder / backup).read_bytes() == old[path.name]
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert (folder / "modeling_chatglm.py.bak").read_text(encoding="utf-8") == "mine"
        assert (folder / "config.json").stat().st_mode & 0o777 == 0o600
        assert "leave    cli_demo.py (the new code does not use them)" in shop.said()
        assert (folder / "cli_demo.py").exists()

    def test_dry_run_says_the_same_and_twice_is_once(self, shop: Workshop) -> None:
        folder = shop.folder("chatglm2", old_code=True)
        before = tree(folder)
        assert shop.run(folder, *CONVERT, "--dry-run") == 0
        assert tree(folder) == before
        plan = shop.said().removesuffix("Nothing was changed (--dry-run).\n")
        assert plan.count("\n") > 8
        assert shop.run(folder, *CONVERT) == 0
        assert shop.said().startswith(plan)
        done = tree(folder)
        assert shop.run(folder, "--undo", "--dry-run") == 0
        assert shop.run(folder, "--safetensors", "--max-shard-size", "1GB") == 0
        assert "Already up to date." in shop.said()
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
    def test_says_which_version_of_the_code_the_folder_holds(self, held: str, message: str, shop: Workshop) -> None:
        folder, newer = shop.folder(), shop.change_code()
        for place, version in ((newer, "1.10.0"), (folder, held)):
            text = f'__version__ = "{version}"\n\ndef infer_model_version(): pass\n'
            if version is not None:
                text = text if version else text.partition("\n")[2]
                (place / "configuration_chatglm.py").write_text(f"import math\n\n{text}", encoding="utf-8")
        assert shop.run(folder, "--dry-run") == 0
        assert message in shop.said()

    def test_undo_hint_of_a_folder_with_a_dash(self, shop: Workshop) -> None:
        folder = shop.folder(name="-x '它")
        before = tree(folder)
        (shop.place / "link").symlink_to(folder)
        (shop.place / "python").symlink_to(sys.executable)
        shop.patch.chdir(shop.place)
        for path in ("./-x '它", "link"):
            assert upgrade_checkpoint.main([path]) == 0
            hint = re.search("To undo: (.*)", shop.said())[1]
            command = f"PATH={shop.place}:$PATH {hint}"
            done = subprocess.run(command, shell=True, cwd="/", capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, "")
            assert tree(folder) == before

    def test_windows(self, full: Workshop) -> None:
        """No links, no `fcntl`, no handle of the folder, no renaming onto a file, and nothing in use is replaced."""
        folder = full.folder(old_code=True)
        before = tree(folder)

        def refuse(*args: Any, **kwargs: Any) -> int:
            raise OSError("A required privilege is not held by the client")

        def open_file(path: Any, *args: Any, open_file: Any = os.open, **kwargs: Any) -> int:
            return refuse() if path == folder else open_file(path, *args, **kwargs)

        def replace(source: Any, target: Any, replace: Any = os.replace) -> None:
            in_use = Path("/proc/self/maps").read_text(encoding="utf-8") if sys.platform == "linux" else ""
            assert f"{source}\n" not in in_use and f"{target}\n" not in in_use
            replace(source, target)

        for name in ("symlink", "link", "rename"):
            full.patch.setattr(os, name, refuse)
        full.patch.setattr(os, "open", open_file)
        full.patch.setattr(os, "replace", replace)
        full.patch.setattr(folder_switch, "fcntl", None)
        assert full.run(folder, *CONVERT) == 0
        assert "names and shapes of the weights" in full.said()
        assert (folder / "model.safetensors.index.json").exists()
        assert full.run(folder, "--undo") == 0
        assert tree(folder) == before
        full.patch.setattr(try_checkpoint, "LARGEST_COPY", 10**5)  # The shards are larger.
        assert full.run(folder, "--dry-run") == 0
        assert "no weights compared (no links can be made here)" in full.said()


class TestUndo:
    def test_goes_back_to_before_the_first_upgrade(self, shop: Workshop) -> None:
        folder = shop.folder(old_code=True)
        before = tree(folder)
        assert shop.run(folder) == 0
        shop.change_code(modeling_chatglm="# Newer.", generation_chatglm="# Newer.")
        (folder / "generation_chatglm.py").write_text("# Changed by the user.\n", encoding="utf-8")
        assert shop.run(folder, *CONVERT) == 0
        assert (folder / "modeling_chatglm.py").read_text(encoding="utf-8").endswith("# Newer.\n")
        # The script's own older file needs no backup, that of the user has one.
        assert not (folder / "modeling_chatglm.py.bak.1").exists()
        mine = folder / "generation_chatglm.py.bak.1"
        assert mine.read_text(encoding="utf-8") == "# Changed by the user.\n"
        assert shop.run(folder, "--undo") == 0
        mine.unlink()
        assert tree(folder) == before

    def test_keeps_what_the_user_changed_since(self, shop: Workshop) -> None:
        folder = shop.folder()
        before = view(folder)
        assert shop.run(folder) == 0
        edit(folder, "config.json", pre_seq_len=5)
        edit(folder, "generation_config.json", temperature=0.5)
        (folder / "conversation_chatglm.py").unlink()
        assert shop.run(folder, "--undo") == 0
        assert view(folder) == before
        assert read(folder, "generation_config.json.bak")["temperature"] == 0.5
        assert not (folder / "config.json.bak").exists()
        assert read(folder, "config.json.bak.1")["pre_seq_len"] == 5
        assert "config.json as it is now, changed since the upgrade, as config.json.bak.1" in shop.said()

    @pytest.mark.parametrize("pattern", ["pytorch_model-*.bin", "model-00001*"])
    def test_never_leaves_a_folder_without_weights(self, pattern: str, shop: Workshop) -> None:
        folder = shop.folder()
        assert shop.run(folder, *CONVERT) == 0
        for path in folder.glob(pattern):
            path.write_bytes(b"changed")
        weights = {name: content for name, content in view(folder).items() if name.startswith("model-")}
        assert shop.run(folder, "--undo") == 0
        assert len(weights) > 1 and weights.items() <= view(folder).items()
        assert not (folder / "modeling_chatglm.py").exists()

    def test_refuses_without_its_backup(self, shop: Workshop) -> None:
        folder = shop.folder()
        assert shop.run(folder, "--undo") == 1
        assert "no upgrade to undo" in shop.said()
        assert shop.run(folder) == 0
        (folder / "config.json.bak").write_text("{}", encoding="utf-8")
        before = tree(folder)
        assert shop.run(folder, "--undo") == 1
        assert tree(folder) == before
        assert "config.json.bak is missing or changed" in shop.said()


def clone(source: Path, target: Path) -> Path:
    """Copies a folder; files that nobody is still writing get a hard link, which is faster."""

    def copy(name: str, other: str) -> None:
        (shutil.copy2 if name.endswith(STAGED) else os.link)(name, other, follow_symlinks=False)

    return shutil.copytree(source, target, symlinks=True, copy_function=copy)


class TestKill:
    """What is in the folder when the process dies, at every change to the file system there is."""

    def states(self, shop: Workshop, folder: Path, *arguments: str) -> list[Path]:
        """What SIGKILL leaves behind, before each change to the folder that the script makes; the last is complete.

        A process that dies changes no file, so a copy made at that instant is what it leaves.
        """
        states: list[Path] = []

        def copy(number: int, path: Path) -> None:
            assert path.parent == folder  # Nothing outside is touched.
            # Beside the folder, so that relative links still lead to the same files.
            states.append(clone(folder, folder.with_name(f"state{number}")))

        with Watch(copy) as watch:
            assert shop.run(folder, *arguments) == 0
        return [*states, clone(folder, folder.with_name(f"state{watch.count + 1}"))]

    def check(self, shop: Workshop, start: Path, arguments: tuple[str, ...], original: dict[str, bytes]) -> None:
        before, names_before = view(start), set(os.listdir(start))
        states = self.states(shop, start, *arguments)
        after, names_after = view(start), set(os.listdir(start))
        seen = []
        for number, folder in enumerate(states):
            now, is_decided = view(folder), (folder / JOURNAL).exists()
            seen.append("new" if now == after else "old" if now == before else "guarded")
            if seen[-1] == "guarded":  # The library loads this file first, whatever is asked for.
                assert is_decided and now["configuration_chatglm.py"] == folder_switch.GUARD
            if number % 10 == 0 or (is_decided and number % 3 == 0):
                other, again = (clone(folder, start.with_name(folder.name + name)) for name in ("other", "again"))
                is_undone = arguments == ("--undo",) and seen[-1] == "new" and not is_decided
                assert shop.run(again, *arguments) == (1 if is_undone else 0)
                assert (view(again), set(os.listdir(again))) == (after, names_after)
                shop.run(other, "--undo")
                assert (view(other), set(os.listdir(other))) == (original, original.keys())
            folder_switch.recover(folder)
            is_new = is_decided or seen[-1] == "new"
            expected = (after, names_after) if is_new else (before, names_before)
            assert (view(folder), set(os.listdir(folder))) == expected
        assert len(seen) > 20
        assert seen == sorted(seen, key=["old", "guarded", "new"].index)
        assert set(seen) == {"old", "guarded", "new"}

    def test_upgrade(self, small: Workshop) -> None:
        start = small.folder(old_code=True)
        self.check(small, start, CONVERT, view(start))

    def test_upgrade_in_the_cache_of_the_hub(self, small: Workshop) -> None:
        folder, cache = small.folder(old_code=True), small.place / "models--THUDM--chatglm3-6b"
        original = view(folder)
        shutil.move(folder, cache / "blobs")
        (snapshot := cache / "snapshots" / "0123").mkdir(parents=True)
        for path in (cache / "blobs").iterdir():
            os.symlink(f"../../blobs/{path.name}", snapshot / path.name)
        before, blobs = tree(snapshot), tree(cache / "blobs")
        self.check(small, snapshot, (), original)
        assert "load the folder by its path" in small.said()
        assert (snapshot / "config.json.bak").is_symlink() and not (snapshot / "config.json").is_symlink()
        assert small.run(snapshot, "--undo") == 0
        assert (tree(snapshot), tree(cache / "blobs")) == (before, blobs)

    @pytest.mark.parametrize("old_code", [False, True])
    def test_undo(self, old_code: bool, small: Workshop) -> None:
        start = small.folder(old_code=old_code)
        original = view(start)
        assert small.run(start, *CONVERT) == 0
        self.check(small, start, ("--undo",), original)

    def test_loading_says_what_to_do(self, shop: Workshop) -> None:
        start = shop.folder()
        original = view(start)
        states = [state for state in self.states(shop, start) if view(state) not in (original, view(start))]
        message = (
            "^The upgrade of this checkpoint folder was cut short: run upgrade_checkpoint.py on it again, or with "
        )
        for state in (states[0], states[len(states) // 2], states[-1]):
            for auto_class in (AutoConfig, AutoModel, AutoTokenizer):
                with pytest.raises(RuntimeError, match=f"{message}--undo to go back.$"):
                    auto_class.from_pretrained(state, trust_remote_code=True)
        assert shop.run(states[0]) == 0
        assert AutoTokenizer.from_pretrained(states[0], trust_remote_code=True).model_version == "chatglm3"

    def test_finishing_is_killed_as_well(self, small: Workshop) -> None:
        """By SIGKILL, in earnest."""
        start = small.folder(old_code=True)
        original = view(start)
        half = next(state for state in self.states(small, start) if view(state) not in (original, view(start)))
        for number in (3, 12, 20):
            folder = clone(half, small.place / f"killed {number}")
            child = os.fork()
            if child == 0:
                with Watch(lambda count, path, last=number: count < last or os.kill(os.getpid(), signal.SIGKILL)):
                    small.run(folder, "--undo")
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            assert small.run(folder, "--undo") == 0
            assert view(folder) == original

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
    @pytest.mark.parametrize("place", [(shutil, "copystat"), (os, "replace")], ids=["copystat", "replace"])
    def test_error_in_the_middle(self, error: BaseException, place: tuple[Any, str], shop: Workshop) -> None:
        folder = shop.folder(old_code=True)
        before = tree(folder)
        function, calls = getattr(*place), []

        def failing(*args: Any, **kwargs: Any) -> None:
            calls.append(args)
            if len(calls) == 5:
                raise error
            function(*args, **kwargs)

        shop.patch.setattr(*place, failing)
        assert shop.run(folder, *CONVERT) == (130 if isinstance(error, KeyboardInterrupt) else 1)
        if place[0] is shutil:
            assert "The folder is whole, as before or as after" in shop.said()
        else:
            assert "The folder is half changed: run this again, or with --undo" in shop.said()
            assert shop.run(folder, "--undo", "--dry-run") == 1
            assert "has to be finished" in shop.said()
            assert shop.run(folder, "--undo") == 0
        assert tree(folder) == before

    def test_a_second_run_waits_for_nobody(self, shop: Workshop) -> None:
        folder = shop.folder()
        before = tree(folder)
        with folder_switch.lock(folder):
            assert shop.run(folder) == 1
        assert "another run is at work" in shop.said()
        assert tree(folder) == before


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "config.json", **changes)


def index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, BIN_INDEX, weight_map=read(folder, BIN_INDEX)["weight_map"] | changes)


def write(name: str, content: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


def huge(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).touch()
        os.truncate(folder / name, folder_switch.LARGEST_FILE + 1)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def refused(message: str, change: Callable[[Path], object], options: str = "", case: str = "chatglm3") -> Any:
    return pytest.param(case, change, options, message, id=message[:30])


RECORD = {"name": "config.json", "backup": None, "sha256": "", "backup_sha256": None}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
FIRST_BIN = "pytorch_model-00001-of-00002.bin"
# What is said, what is wrong with the folder, and the options.
REFUSALS = [
    refused("has no config.json", remove("config.json")),
    refused("upgrade the folder of its base", lambda f: (f / "config.json").rename(f / "adapter_config.json")),
    refused("not valid JSON", write("config.json", b"{,")),
    refused("not valid JSON", write("config.json", b'{"a": "\xff"}')),
    refused("not valid JSON", write("config.json", b'{"a":' * 10**5)),
    refused("does not hold a JSON object", write("config.json", [])),
    refused("or larger than any JSON file", huge("config.json")),
    refused(
        "config.json is not a file", lambda folder: (remove("config.json")(folder), (folder / "config.json").mkdir())
    ),
    refused("quantization.py is not a file", lambda folder: (folder / "quantization.py").mkdir(), "--force"),
    refused("quantization.py .*too large", huge("quantization.py"), "--force"),
    refused("model type 'llama'", config(model_type="llama")),
    refused("model type .'chatglm'.; ChatGLM", config(model_type=["chatglm"])),
    refused(
        "the library's own folders .*: load it as it is", config(model_type="glm4", architectures=["Glm4ForCausalLM"])
    ),
    refused("model type 'glm4'.*load it as it is", config(model_type="glm4")),
    refused("model type 'glm'.*load it as it is", config(model_type="glm", rms_norm_eps=1e-5)),
    refused("'eva_config', as visualglm-6b does", config(eva_config={}, image_length=32), case="chatglm1"),
    refused("not the vocabulary of GLM-4", config(eos_token_id=[5, 6], pad_token_id=5)),
    refused("not the SentencePiece model of ChatGLM2", lambda folder: None, "--model-version chatglm3", "glm4"),
    refused("a vocabulary of chatglm2 or chatglm3", write("ice_text.model", b"\n")),
    refused("must be one of .*chatglm4", config(model_version="chatglm4")),
    refused("config.json: ", config(model_version=[])),
    refused("must be one of .*chatglm4", lambda folder: None, "--model-version chatglm4"),
    refused("say --model-version chatglm2 or --model-version chatglm3", config(_name_or_path=...)),
    refused("has no vocabulary", remove("tokenizer.model")),
    refused("tokenizer.model is a Git LFS pointer", write("tokenizer.model", POINTER)),
    refused("pytorch_model.bin is a Git LFS pointer", write("pytorch_model.bin", POINTER), case="chatglm2"),
    refused("does not load", write("tokenizer.model", b"\n\x0ebroken")),
    refused("7 weights are missing, such as transformer.encoder.layers.3", config(num_layers=4), case="chatglm2"),
    refused("weights are not known, such as transformer.encoder.layers.2", config(num_layers=2), case="chatglm2"),
    refused("has another shape", config(ffn_hidden_size=80), case="chatglm2"),
    refused("does not load: .*quantization_bit", config(quantization_bit=...), case="chatglm2-int4"),
    refused("weights that none of the .bin files holds", remove(FIRST_BIN), "--safetensors"),
    refused("weights that none of the .bin files holds", index(extra="../x.bin"), "--safetensors"),
    refused("weights that none of the .bin files holds", write(BIN_INDEX, {"weight_map": []}), "--safetensors"),
    refused("cannot be read as weights", write("pytorch_model.bin", b"broken"), "--safetensors", "chatglm2"),
    refused("no pytorch_model.bin to convert", remove("pytorch_model.bin"), "--safetensors", "chatglm2"),
]
# Of a journal or a manifest that came with the folder.
NOT_OURS = "json.*(is not what an upgrade wrote|does not hold a JSON object)"
OUTSIDE = ("../outside.py", "/tmp/outside.py", "C:outside.py", "..\\outside.py", "pytorch_model.bin", 1)
FILES = [
    *([RECORD | {key: name}] for key in ("name", "backup") for name in OUTSIDE),
    *([{"name": "config.json"}], {"a": 1}, ["a"], 5, None),
]
SOURCES = ({"../outside.bin": 1}, ["a.bin"], None)
MANIFESTS = [{"files": files, "converted_from": {}} for files in FILES]
MANIFESTS += [{"files": [RECORD], "converted_from": sources} for sources in SOURCES]
OWN_FILES = [[RECORD | {key: name}] for key in ("name", "backup") for name in (MANIFEST, JOURNAL)]
MANIFESTS += [{"files": files, "converted_from": {}} for files in (*OWN_FILES, [RECORD | {"backup": "config.json"}])]
JOURNALS = [{"remove": names} for names in (*([name] for name in OUTSIDE), "config.json", 5)]
REFUSALS += [refused(NOT_OURS, write(JOURNAL, content), "--undo") for content in (*JOURNALS, {}, [])]
REFUSALS += [refused(NOT_OURS, write(MANIFEST, content), "--undo") for content in (*MANIFESTS, {}, [])]
REFUSALS += [refused(NOT_OURS, write(MANIFEST, content), "--force") for content in MANIFESTS[::5]]


def folders(journal: Any, *names: str) -> Callable[[Path], object]:
    """A journal, or none, and folders where files should be."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).mkdir()
        if journal is not None:
            write(JOURNAL, journal)(folder)

    return change


REFUSALS += [
    refused("is a folder, and an upgrade writes files only", folders(None, "quantization.py.chatglm_new")),
    refused("is a folder, and an upgrade writes files only", folders({"remove": []}, "quantization.py.chatglm_new")),
    refused(
        "is a folder, and an upgrade writes files only", folders({"remove": ["quantization.py"]}, "quantization.py")
    ),
]


class TestRefusals:
    @pytest.mark.parametrize(("case", "change", "options", "message"), REFUSALS)
    def test_refused(
        self, case: str, change: Any, options: str, message: str, full: Workshop, request: pytest.FixtureRequest
    ) -> None:
        shop = request.getfixturevalue("shop") if options == "--force" else full
        folder = shop.folder(case)
        (shop.place / "outside.py").write_text("{}", encoding="utf-8")
        change(folder)
        before = tree(shop.place)
        assert shop.run(folder, *options.split()) == 1
        assert tree(shop.place) == before
        error = shop.capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(message, error)

    def test_links_that_lead_outside_are_replaced_themselves(self, shop: Workshop) -> None:
        folder, outside = shop.folder(), shop.place / "outside"
        outside.write_text("{}", encoding="utf-8")
        leftovers = (MANIFEST + STAGED, JOURNAL + STAGED)
        for name in ("quantization.py", "configuration_chatglm.py", "tokenizer_config.json", *leftovers):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(outside)
        before = tree(folder)
        assert shop.run(folder, *CONVERT) == 0
        assert (folder / "quantization.py.bak").is_symlink() and not (folder / "quantization.py").is_symlink()
        assert shop.run(folder, "--undo") == 0
        assert tree(folder) == {name: entry for name, entry in before.items() if name not in leftovers}
        assert outside.read_text(encoding="utf-8") == "{}"

    def test_a_journal_that_repeats_itself(self, shop: Workshop) -> None:
        folder = shop.folder()
        write("quantization.py", b"")(folder)
        write(JOURNAL, {"remove": ["quantization.py", "quantization.py", JOURNAL]})(folder)
        folder_switch.recover(folder)
        assert not (folder / "quantization.py").exists() and not (folder / JOURNAL).exists()

    def test_the_trial_runs_no_code_of_the_folder(self, full: Workshop) -> None:
        """Neither its modules nor, by way of an adapter's configuration, those of another folder."""
        folder, evil = full.folder(), full.folder(name="evil")
        for place in (folder, evil):
            for name in ("configuration_chatglm.py", "modeling_chatglm.py", "mine.py"):
                (place / name).write_text("raise SystemExit('the code of the folder was run')", encoding="utf-8")
            edit(place, "config.json", auto_map={"AutoModel": "mine.Mine", "AutoConfig": "mine.Mine"})
        adapter = {"base_model_name_or_path": str(evil), "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
        # The library runs this file of any folder that a model is loaded from.
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text("raise SystemExit('was run')", encoding="utf-8")
        assert full.run(folder) == 0

    def test_folders_that_cannot_be_changed(self, shop: Workshop) -> None:
        (shop.place / "file").touch()
        for name, fault in (("file", "is not a folder"), ("missing", "does not exist")):
            assert shop.run(shop.place / name) == 1
            assert shop.said() == f"error: {shop.place}/{name} {fault}.\n"
        folder = shop.folder()
        shop.patch.setattr(os, "access", lambda *args, **kwargs: False)
        assert shop.run(folder) == 1
        assert shop.said() == f"error: {folder} cannot be written to.\n"
        shop.patch.undo()
        shop.patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 * 10**6))
        assert shop.run(folder, *CONVERT) == 1
        assert "of disk space, 64 MB are free" in shop.said()

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
    def test_code_that_does_not_load(self, line: str, message: str, full: Workshop) -> None:
        """What the code says is shown; --force goes on, and --undo goes back."""
        folder = full.folder()
        before = tree(folder)
        broken = full.change_code(tokenization_chatglm=line)
        assert full.run(folder) == 1
        assert re.search(f"does not load: .*{message}", full.said())
        assert tree(folder) == before
        assert full.run(folder, "--force") == 0
        assert (folder / "tokenization_chatglm.py").read_bytes() == (broken / "tokenization_chatglm.py").read_bytes()
        assert full.run(folder, "--undo") == 0
        assert tree(folder) == before

    @pytest.mark.parametrize("text", ["", "0GB", "-5GB", "5PB", "much"])
    def test_no_sizes(self, text: str, shop: Workshop) -> None:
        with pytest.raises(SystemExit):
            shop.run(shop.place, f"--max-shard-size={text}")
        assert "is not a size such as 5GB" in shop.said()
