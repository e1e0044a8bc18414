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
"""Brings a published checkpoint folder up to date: `python scripts/upgrade_checkpoint.py PATH`.

Any generation, float or quantized: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B, GLM-4V-9B and what was made from
them, and before them GLM (glm-large, glm-2b, glm-10b) and GLM-130B, whose ranks are merged into safetensors files. The
`.py` files of this repository go in; `config.json` and `tokenizer_config.json` get `model_version` and the whole
`auto_map` and keep everything else, and GLM-4V gets a `preprocessor_config.json`; a `generation_config.json` with all
stop ids is written where there is none. A chat template that later revisions of the published folders carry is replaced
by ours; one of your own stays. `--safetensors` also copies `.bin` weights into safetensors files; the weights that are
there stay as they are.

- What is replaced stays beside it as `NAME.bak`; a `.py` file that nothing needs any more stays.
- The folder is tried first, with the new files, in a temporary place: unless that loads, nothing is changed.
- If a run is killed, the folder loads as before or as after, or says when it is loaded that this command has to be run
  again (see `folder_switch.py`). Nothing outside the folder is changed, and no code in it is run.
- `--undo` gives back the folder as it was before the first upgrade, from `chatglm_upgrade.json`.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from folder_switch import JOURNAL, LARGEST_FILE, OWN_NAME, Change, UpgradeError, is_pending, lock, read_json, recover
from recognise_checkpoint import CODE, WITHOUT_VOCABULARY, Checkpoint, load_code, read_start, recognise


MANIFEST = "chatglm_upgrade.json"
TEMPLATE_FILE = "chat_template.jinja"
PREPROCESSOR_FILE = "preprocessor_config.json"
BIN_FILES = "pytorch_model*.bin"
# A file of GLM-130B's, in the folder of an iteration.
RANK_NAME = re.compile(r"\w+/mp_rank_\d+_model_states\.pt")
# Left on the disk after a conversion.
SPARE_BYTES = 64 * 10**6


def to_json(content: Mapping[str, Any]) -> bytes:
    # What UTF-8 cannot hold, half a surrogate pair, is written as the escape that JSON has for it.
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """What earlier upgrades noted for `--undo`: a record for each changed file, and the sizes of converted weights.

    Raises:
        UpgradeError: for another form, or names that an upgrade does not give.
    """
    if not os.path.lexists(folder / MANIFEST):
        return {}, {}
    manifest = read_json(folder / MANIFEST)
    try:
        records = {record["name"]: record for record in manifest["files"]}
        for name, record in records.items():
            is_named = OWN_NAME.fullmatch(name) and OWN_NAME.fullmatch(record["backup"] or name)
            is_own = {name, record["backup"]} & {MANIFEST, JOURNAL} or name == record["backup"]
            if not is_named or is_own or not {"sha256", "backup_sha256"} <= record.keys():
                raise ValueError(name)
        if not all(Path(name).name == name or RANK_NAME.fullmatch(name) for name in manifest["converted_from"].keys()):
            raise ValueError("converted_from")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UpgradeError(f"{folder / MANIFEST} is not what an upgrade wrote: {error!r}.") from error
    return records, manifest["converted_from"]


def code_version(folder: Path) -> str:
    """The version of this repository's code in a folder, empty if it has none."""
    text = read_start(folder / "configuration_chatglm.py")
    if found := re.search(r'^__version__ = "(\d+(?:\.\d+)*)"', text, re.MULTILINE):
        return found[1]
    return "0.1.0" if "def infer_model_version" in text else ""  # Before 0.2.0 there was no number.


def describe_code(folder: Path) -> str:
    own, held = code_version(CODE), code_version(folder)
    if held in ("", own):
        return f"version {own} of the code"
    numbers = [[int(part) for part in version.split(".")] for version in (held, own)]
    order = "an older" if numbers[0] < numbers[1] else "a newer"
    return f"version {own} of the code; the folder holds {order} one, {held}"


def new_contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The code and the configurations as they should be; only the files that are not so yet."""
    contents = {path.name: path.read_bytes() for path in sorted(CODE.glob("*.py"))}
    configuration = load_code("configuration_generations")
    own_map = {**configuration.AUTO_MAP, **configuration.GENERATION_FEATURES[checkpoint.generation].auto_map}
    own_map |= configuration.VISION_AUTO_MAP if checkpoint.config.get("vision_config") else {}
    tokenizer_map = {"AutoTokenizer": [f"{checkpoint.tokenizer_module}.{checkpoint.tokenizer_class}", None]}
    files = [
        ("config.json", checkpoint.config, own_map, {"model_type": "chatglm", "model_version": checkpoint.generation})
    ]
    if checkpoint.has_vocabulary:
        settings = {} if checkpoint.tokenizer_config else {"tokenizer_class": checkpoint.tokenizer_class}
        settings |= {"model_version": checkpoint.tokenizer_generation}
        files.append(("tokenizer_config.json", checkpoint.tokenizer_config, tokenizer_map, settings))
    if checkpoint.config.get("vision_config"):
        preprocessor_config = read_json(checkpoint.folder / PREPROCESSOR_FILE)
        settings = picture_settings(checkpoint)
        files.append((PREPROCESSOR_FILE, preprocessor_config, configuration.PREPROCESSOR_AUTO_MAP, settings))
    for name, old, own_map, own in files:
        new = dict(old)
        # The oldest tokenizer_config.json have the list itself here.
        auto_map = new.get("auto_map")
        auto_map = {**(auto_map if isinstance(auto_map, dict) else {}), **own_map}
        new |= {**own, "auto_map": auto_map}
        if new.get("chat_template"):
            new["chat_template"] = current_template(checkpoint, new["chat_template"])
        if new != old or not (checkpoint.folder / name).is_file():
            contents[name] = to_json(new)
    if (template := checkpoint.folder / TEMPLATE_FILE).is_file():
        # What is not UTF-8 is no known template, and stays.
        text = template.read_bytes().decode(errors="surrogateescape")
        contents[TEMPLATE_FILE] = current_template(checkpoint, text).encode(errors="surrogateescape")
    return {name: content for name, content in contents.items() if not has_content(checkpoint.folder / name, content)}


def picture_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What GLM-4V's image processor is told: its own name, and the sizes that config.json has.

    Raises:
        UpgradeError: for sizes that no picture can have.
    """
    try:
        vision = load_code("configuration_vision").VisionSettings.from_dict(checkpoint.config["vision_config"])
    except (ValueError, TypeError) as error:
        raise UpgradeError(f"config.json: {error}") from error
    size = {"height": vision.image_size, "width": vision.image_size}
    return {"image_processor_type": "ChatGLMImageProcessor", "size": size, "patch_size": vision.patch_size}


def current_template(checkpoint: Checkpoint, saved: Any) -> Any:
    """A saved chat template with ours in the place of a published one, in the form that tokenizer_config.json has."""
    formats = load_code("conversation_chatglm").CONVERSATION_FORMATS
    # GLM and GLM-130B have no conversations, so a template is one of its owner's.
    if checkpoint.generation not in formats:
        return saved
    template = formats[checkpoint.generation].current_template(saved)
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def has_content(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def generation_config(checkpoint: Checkpoint, tokenizer: Any) -> bytes:
    """All stop ids of the vocabulary. The file replaces what the library takes from config.json, so that goes in too."""
    # Whose folder may lack a vocabulary has them all in its configuration, which was made here.
    is_made_here = checkpoint.config.get("model_version") in WITHOUT_VOCABULARY
    stop_ids = checkpoint.config["eos_token_id"] if is_made_here else tokenizer.stop_token_ids()
    content = {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    content |= {key: checkpoint.config.get(key) for key in ("bos_token_id", "pad_token_id", "bad_words_ids")}
    # CODEPATH: glm's files name no end token.
    if checkpoint.config.get("eos_token_id") is None and content["pad_token_id"] is None:
        content["pad_token_id"] = tokenizer.pad_token_id
    return to_json({key: value for key, value in content.items() if value is not None})


def weights_to_convert(folder: Path) -> Any:
    """The tensors of the `.bin` files, `{}` where the folder has safetensors files already.

    Raises:
        UpgradeError: if there is nothing to convert, or no room on the disk.
    """
    from convert_weights import read_weights

    if any(folder.glob("model*.safetensors*")):
        return {}
    weights = read_weights(sorted(folder.glob(BIN_FILES)), read_json(folder / "pytorch_model.bin.index.json"))
    if not weights:
        raise UpgradeError("--safetensors: the folder has no pytorch_model.bin to convert.")
    check_room(folder, weights, "--safetensors")
    return weights


def check_room(folder: Path, weights: Mapping[str, Any], reason: str) -> None:
    """Raise an `UpgradeError` if the disk has no room for weights."""
    needed, free = sum(tensor.nbytes for tensor in weights.values()) + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise UpgradeError(f"{reason} needs {needed / 1e6:.0f} MB of disk space, {free / 1e6:.0f} MB are free.")


def is_ours(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file is as an upgrade wrote it."""
    path = folder / record["name"]
    return path.is_file() and not path.is_symlink() and sha256(path) == record["sha256"]


def free_backup(folder: Path, name: str) -> str:
    """The first of NAME.bak, NAME.bak.1, ... that does not exist."""
    backup, count = f"{name}.bak", 0
    while os.path.lexists(folder / backup):
        count += 1
        backup = f"{name}.bak.{count}"
    return backup


def print_plan(folder: Path, contents: Mapping[str, bytes], has_weights: bool) -> dict[str, str]:
    """Say what is going to happen to each file.

    Returns:
        The names of the backups: of files that are there and that no earlier upgrade wrote.

    Raises:
        UpgradeError: if something else than a small file has one of the names.
    """
    records, _ = read_manifest(folder)
    backups = {}
    for name in contents:
        if not os.path.lexists(folder / name):
            print(f"  add      {name}")
        elif not (folder / name).is_file() or (folder / name).stat().st_size > LARGEST_FILE:
            raise UpgradeError(f"{folder / name} is not a file, or too large for its name; nothing was changed.")
        elif name in records and is_ours(folder, records[name]):
            print(f"  replace  {name} (an earlier upgrade wrote it)")
        else:
            backups[name] = free_backup(folder, name)
            print(f"  replace  {name} (backup {backups[name]})")
    if has_weights:
        print("  add      the weights as safetensors")
    print(f"  {'replace' if records else 'add    '}  {MANIFEST} (for --undo)")
    if unneeded := sorted({path.name for path in folder.glob("*.py")} - {path.name for path in CODE.glob("*.py")}):
        print(f"  leave    {', '.join(unneeded)} (the new code does not use them)")
    return backups


def apply_upgrade(
    folder: Path, contents: Mapping[str, bytes], backups: Mapping[str, str], weights: Any, shard_size: str
) -> None:
    """Write everything, and note for `--undo` what was there before the first upgrade."""
    records, sources = read_manifest(folder)
    with Change(folder) as change:
        for name, backup in backups.items():
            change.copy(name, backup)
        hashes = {name: change.write(name, content) for name, content in contents.items()}
        if weights:
            from convert_weights import convert

            hashes |= convert(weights, shard_size, change)
            merged = [path.relative_to(folder) for path in getattr(weights, "files", ())]
            files = merged or [path.relative_to(folder) for path in folder.glob(BIN_FILES)]
            sources = {path.as_posix(): (folder / path).stat().st_size for path in files}
        for name, digest in hashes.items():
            old = backups.get(name)
            first = {"name": name, "backup": old, "backup_sha256": sha256(folder / name) if old else None}
            records[name] = {**first, **records.get(name, {}), "sha256": digest}
        about = "Written by upgrade_checkpoint.py, which needs it for --undo."
        manifest = {"about": about, "files": list(records.values()), "converted_from": sources}
        change.write(MANIFEST, to_json(manifest))


def upgrade(folder: Path, args: argparse.Namespace) -> None:
    """Plan, try, and unless it is a dry run, do."""
    checkpoint = recognise(folder, args.model_version)
    print(f"{folder}: {checkpoint.generation} (by {checkpoint.reason})")
    print(f"This is {describe_code(folder)}.")
    contents = new_contents(checkpoint)
    weights = checkpoint.merged
    if weights is not None:
        check_room(folder, weights, f"Merging {len(weights.files)} ranks")
    elif args.safetensors:
        weights = weights_to_convert(folder)
    lacks_generation_config = not os.path.lexists(folder / "generation_config.json")
    if contents or weights or lacks_generation_config:
        # Imported late, for torch takes its time and the refusals above need not wait.
        from try_checkpoint import try_loading

        try:
            tokenizer, found = try_loading(checkpoint, contents)
            if lacks_generation_config:
                contents["generation_config.json"] = generation_config(checkpoint, tokenizer)
        except UpgradeError as error:
            if not args.force:
                raise UpgradeError(f"{error}. Nothing was changed; --force upgrades it all the same.") from error
            found = f"--force: {error}"
    if not (contents or weights):
        print("Already up to date.")
        return
    backups = print_plan(folder, contents, bool(weights))
    print(f"  tried    {found}")
    if args.dry_run:
        print("Nothing was changed (--dry-run).")
        return
    apply_upgrade(folder, contents, backups, weights, args.max_shard_size)
    if weights:
        print("Every tensor was read back and is the same. The old files stay; if you delete them, --undo leaves the")
        print("safetensors files in their place.")
    if folder.parent.name == "snapshots":
        print("This is the Hub's cache: load the folder by its path. By its name, the Hub is asked for the new files.")
    # Whole paths, which begin with no dash.
    command = ["python", str(Path(__file__).resolve()), str(folder), "--undo"]
    print(f"Done. To undo: {subprocess.list2cmdline(command) if os.name == 'nt' else shlex.join(command)}")


def undo(folder: Path, dry_run: bool) -> None:
    """Take all upgrades of the folder back. What the user has changed since is kept as one more backup.

    Raises:
        UpgradeError: if a backup is missing or changed.
    """
    records, sources = read_manifest(folder)
    if not records:
        raise UpgradeError(f"{folder} has no {MANIFEST}: there is no upgrade to undo.")
    present = [name for name in records if os.path.lexists(folder / name)]
    changed = {name for name in present if not is_ours(folder, records[name])}
    sizes = {name: (folder / name).stat().st_size for name in sources if (folder / name).is_file()}
    weights = {name for name in records if ".safetensors" in name}
    kept = {}
    if weights and (changed & weights or not sources or sizes != sources):
        print("  leave    the safetensors files: they were changed, or the .bin files that they were made from")
        records = {name: record for name, record in records.items() if name not in weights}
    for name, record in records.items():
        backup = record["backup"]
        if backup and not ((folder / backup).is_file() and sha256(folder / backup) == record["backup_sha256"]):
            raise UpgradeError(f"{backup} is missing or changed, so {name} cannot be restored; nothing was undone.")
        print(f"  restore  {name} from {backup}" if backup else f"  remove   {name}")
        if name in changed:
            kept[name] = free_backup(folder, name)
            print(f"  keep     {name} as it is now, changed since the upgrade, as {kept[name]}")
    if dry_run:
        print("Nothing was changed (--dry-run).")
        return
    with Change(folder) as change:
        for name, copy in kept.items():
            change.copy(name, copy)
        for name, record in records.items():
            if record["backup"]:
                change.copy(record["backup"], name)
            change.remove(record["backup"] or name)
        change.remove(MANIFEST)
    print("Undone.")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", 1)[-1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the checkpoint folder")
    parser.add_argument("--model-version", metavar="NAME", help="chatglm, chatglm2, ..., where the files do not tell")
    parser.add_argument("--safetensors", action="store_true", help="also convert .bin weights")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--force", action="store_true", help="upgrade a folder that does not load afterwards")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    parser.add_argument("--undo", action="store_true", help="restore the folder as it was before the first upgrade")
    args = parser.parse_args(arguments)
    if not re.fullmatch(r"[1-9]\d*(\.\d+)? ?[KMGT]B", args.max_shard_size, re.IGNORECASE):
        parser.error(f"--max-shard-size: {args.max_shard_size!r} is not a size such as 5GB or 500MB")
    return args


def run(args: argparse.Namespace) -> None:
    """The command without its error messages."""
    if not args.path.is_dir():
        raise UpgradeError(f"{args.path} {'is not a folder' if args.path.exists() else 'does not exist'}.")
    folder = args.path.resolve()
    if args.dry_run:
        if is_pending(folder):
            raise UpgradeError(f"a killed run has to be finished in {folder} first: run again without --dry-run.")
        undo(folder, True) if args.undo else upgrade(folder, args)
        return
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UpgradeError(f"{folder} cannot be written to.")
    with lock(folder):
        recovered = recover(folder)
        if recovered:
            print(f"First {recovered}.")
        if not args.undo:
            upgrade(folder, args)
        elif not recovered or os.path.lexists(folder / MANIFEST):
            undo(folder, False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse_arguments(arguments)
    try:
        run(args)
    except UpgradeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (OSError, KeyboardInterrupt) as error:
        is_half = args.path.is_dir() and is_pending(args.path)
        state = "half changed: run this again, or with --undo" if is_half else "whole, as before or as after"
        print(f"error: {str(error) or 'interrupted'}. The folder is {state}.", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # A path may have signs that the terminal lacks.
    sys.exit(main())
