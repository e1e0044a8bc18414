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

Any generation, float or quantized: ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B and what was made from them. The
`.py` files of this repository go in; `config.json` and `tokenizer_config.json` get `model_version` and the whole
`auto_map` and keep everything else; a `generation_config.json` with all stop ids is written where there is none.
`--safetensors` also copies `.bin` weights into safetensors files.

- What is replaced stays beside it as `NAME.bak`. Nothing is deleted; a `.py` file that nothing needs any more stays.
- The folder is tried first, with the new files, in a temporary place: unless that loads, nothing is changed.
- All files change at one instant (see `folder_switch.py`). A killed run leaves the old folder or the new one, and the
  next run clears up after it.
- `--undo` gives back the folder as it was before the first upgrade, from `chatglm_upgrade.json`.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from folder_switch import SAVED, STAGED, Swap, UpgradeError, is_pending, lock, prepare, recover, switch, write_file
from recognise_checkpoint import CODE, MODEL_VERSIONS, Checkpoint, read_json, recognise


MANIFEST = "chatglm_upgrade.json"

AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_chatglm.ChatGLMForSequenceClassification",
}
# What ends an answer; GLM-4 has the list in its config.json.
STOP_TOKENS = {
    "chatglm": ("<eop>",),
    "chatglm2": ("</s>",),
    "chatglm3": ("</s>", "<|user|>", "<|observation|>"),
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Left on the disk after a conversion.
SPARE_BYTES = 64 * 10**6


def to_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What earlier upgrades noted for `--undo`, `{}` if there were none."""
    manifest = read_json(folder / MANIFEST)
    if manifest and not {"files", "converted_from"} <= manifest.keys():
        raise UpgradeError(f"{folder / MANIFEST} is not what an upgrade wrote.")
    return manifest


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if match is None or (size := int(float(match[1]) * UNITS[match[2] or ""])) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size


def format_size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def with_key(content: Mapping[str, Any], key: str, value: Any, after: str) -> dict[str, Any]:
    """Set a key; a new one stands behind `after`, or at the end."""
    if key in content or after not in content:
        return {**content, key: value}
    items = list(content.items())
    place = list(content).index(after) + 1
    return dict([*items[:place], (key, value), *items[place:]])


def new_contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The code and the two configurations as they should be; only the files that are not so yet."""
    contents = {path.name: path.read_bytes() for path in sorted(CODE.glob("*.py"))}
    config = with_key(checkpoint.config, "model_version", checkpoint.model_version, after="model_type")
    config = with_key(config, "auto_map", {**(config.get("auto_map") or {}), **AUTO_MAP}, after="architectures")
    tokenizer_class = "ChatGLM4Tokenizer" if checkpoint.model_version == "glm4" else "ChatGLMTokenizer"
    tokenizer = checkpoint.tokenizer_config or {"tokenizer_class": tokenizer_class}
    tokenizer = with_key(tokenizer, "model_version", checkpoint.model_version, after="name_or_path")
    # The oldest files have the list itself here.
    auto_map = tokenizer.get("auto_map") if isinstance(tokenizer.get("auto_map"), dict) else {}
    auto_map = {**auto_map, "AutoTokenizer": [f"tokenization_chatglm.{tokenizer_class}", None]}
    tokenizer = with_key(tokenizer, "auto_map", auto_map, after="tokenizer_class")
    for name, before, after in (
        ("config.json", checkpoint.config, config),
        ("tokenizer_config.json", checkpoint.tokenizer_config, tokenizer),
    ):
        if json.dumps(before) != json.dumps(after):
            contents[name] = to_json(after)
    folder = checkpoint.folder
    is_there = {
        name: (folder / name).is_file() and (folder / name).read_bytes() == contents[name] for name in contents
    }
    return {name: content for name, content in contents.items() if not is_there[name]}


def generation_config(checkpoint: Checkpoint, tokenizer: Any) -> bytes:
    """Stop ids from the vocabulary. The file replaces what the library takes from config.json, so that goes in too.

    Raises:
        UpgradeError: for a vocabulary without one of the tokens.
    """
    config = checkpoint.config
    if checkpoint.model_version in STOP_TOKENS:
        tokens = list(STOP_TOKENS[checkpoint.model_version])
        stop_ids = tokenizer.convert_tokens_to_ids(tokens)
        if tokenizer.convert_ids_to_tokens(stop_ids) != tokens:
            raise UpgradeError(f"the vocabulary lacks one of the stop tokens {', '.join(tokens)}.")
    else:
        stop_ids = config.get("eos_token_id")
    content = {"eos_token_id": stop_ids[0] if isinstance(stop_ids, list) and len(stop_ids) == 1 else stop_ids}
    content |= {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    return to_json(content)


def plan_conversion(folder: Path, max_shard_size: int) -> dict[str, list[Any]]:
    """The safetensors files to write, empty where the folder has some already.

    Raises:
        UpgradeError: if there is no room on the disk.
    """
    from convert_weights import list_entries, plan_shards

    if any(folder.glob("model*.safetensors*")):
        return {}
    entries = list_entries(folder)
    if not entries:
        raise UpgradeError("--safetensors: the folder has no pytorch_model.bin to convert.")
    needed, free = sum(entry.size for entry in entries) + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise UpgradeError(f"--safetensors needs {format_size(needed)} of disk space, {format_size(free)} are free.")
    return plan_shards(entries, max_shard_size)


def free_backup(folder: Path, name: str) -> str:
    """The first of NAME.bak, NAME.bak.1, ... that does not exist."""
    backup, count = f"{name}.bak", 0
    while os.path.lexists(folder / backup):
        count += 1
        backup = f"{name}.bak.{count}"
    return backup


def is_ours(folder: Path, record: Mapping[str, Any] | None) -> bool:
    """Whether a file is as an upgrade wrote it."""
    if record is None:
        return False
    path = folder / record["name"]
    return path.is_file() and not path.is_symlink() and sha256(path) == record["sha256"]


def plan_swaps(folder: Path, names: Sequence[str], records: Mapping[str, Mapping[str, Any]]) -> list[Swap]:
    """What becomes of the present files: backups, except of those that an earlier upgrade wrote."""
    swaps = []
    for name in names:
        old = None
        if os.path.lexists(folder / name):
            old = f"{SAVED}/{name}" if is_ours(folder, records.get(name)) else free_backup(folder, name)
        swaps.append(Swap(name, old, f"{STAGED}/{name}"))
    return swaps


def new_manifest(
    checkpoint: Checkpoint,
    swaps: Sequence[Swap],
    hashes: Mapping[str, str],
    manifest: Mapping[str, Any],
    sources: Mapping[str, int],
) -> bytes:
    """What `--undo` needs: for each file what was written and what was there before the first upgrade."""
    records = {record["name"]: record for record in manifest.get("files", [])}
    for swap in swaps:
        first = {"name": swap.name, "backup": swap.old, "backup_sha256": None}
        if swap.old is not None:
            first["backup_sha256"] = sha256(checkpoint.folder / swap.name)
        records[swap.name] = records.get(swap.name, first) | {"sha256": hashes[swap.name]}
    return to_json(
        {
            "about": "Written by upgrade_checkpoint.py, which needs it for --undo.",
            "model_version": checkpoint.model_version,
            "files": list(records.values()),
            "converted_from": sources or manifest.get("converted_from", {}),
        }
    )


def apply_upgrade(
    checkpoint: Checkpoint, contents: Mapping[str, bytes], shards: Mapping[str, list[Any]], force: bool
) -> None:
    """Write everything to temporary names and switch."""
    folder = checkpoint.folder
    manifest = read_manifest(folder)
    records = {record["name"]: record for record in manifest.get("files", [])}
    try:
        staged = prepare(folder)
        hashes = {}
        for name, content in contents.items():
            hashes[name] = write_file(staged / name, [content])
            if (folder / name).exists():
                shutil.copymode(folder / name, staged / name)
        sources: dict[str, int] = {}
        if shards:
            from convert_weights import write_shards
            from try_checkpoint import try_loading

            hashes |= write_shards(shards, staged)
            sources = {entry.source.name: entry.source.stat().st_size for shard in shards.values() for entry in shard}
            if not force:
                try_loading(checkpoint, {name: staged / name for name in hashes})
        swaps = plan_swaps(folder, list(hashes), records)
        write_file(staged / MANIFEST, [new_manifest(checkpoint, swaps, hashes, manifest, sources)])
        old_manifest = f"{SAVED}/{MANIFEST}" if manifest else None
        switch(folder, [*swaps, Swap(MANIFEST, old_manifest, f"{STAGED}/{MANIFEST}")])
    except BaseException:
        recover(folder)
        raise


def plan_undo(folder: Path, manifest: Mapping[str, Any]) -> tuple[list[Swap], list[str]]:
    """How to get back to the folder before the first upgrade, and what stays.

    Raises:
        UpgradeError: if a backup is missing or changed.
    """
    swaps, notes = [], []
    weights = [record for record in manifest["files"] if fnmatch(record["name"], "model*.safetensors*")]
    sources = {folder / name: size for name, size in manifest["converted_from"].items()}
    if any(not path.is_file() or path.stat().st_size != size for path, size in sources.items()):
        notes.append("the safetensors files stay: the .bin files they were made from are gone or changed")
    elif not all(is_ours(folder, record) for record in weights):
        notes.append("the safetensors files stay: they were changed since the upgrade")
    keeps_weights = bool(notes)
    for record in manifest["files"]:
        name, backup = record["name"], record["backup"]
        if backup and not ((folder / backup).is_file() and sha256(folder / backup) == record["backup_sha256"]):
            raise UpgradeError(f"{backup} is missing or changed, so {name} cannot be restored; nothing was undone.")
        if record in weights:
            swaps += [] if keeps_weights else [Swap(name, f"{SAVED}/{name}", None)]
        elif is_ours(folder, record):
            swaps.append(Swap(name, f"{SAVED}/{name}", backup))
        elif not os.path.lexists(folder / name):
            swaps += [Swap(name, None, backup)] if backup else []
        elif backup:
            kept = free_backup(folder, name)
            swaps.append(Swap(name, kept, backup))
            notes.append(f"{name} was changed since the upgrade; it is kept as {kept}")
        else:
            notes.append(f"{name} was changed since the upgrade, so it stays")
    return [*swaps, Swap(MANIFEST, f"{SAVED}/{MANIFEST}", None)], notes


def undo(folder: Path, dry_run: bool, recovered: str | None) -> None:
    """Take all upgrades of the folder back."""
    if not (folder / MANIFEST).is_file():
        if recovered is None:
            raise UpgradeError(f"{folder} has no {MANIFEST}: there is no upgrade to undo.")
        return
    swaps, notes = plan_undo(folder, read_manifest(folder))
    for swap in swaps:
        print(f"  {'restore' if swap.new else 'remove '}  {swap.name}" + (f" from {swap.new}" if swap.new else ""))
    for note in notes:
        print(f"  note: {note}")
    if dry_run:
        print("Nothing was changed (--dry-run).")
        return
    try:
        prepare(folder)
        switch(folder, swaps)
    except BaseException:
        recover(folder)
        raise
    print("Undone.")


def print_plan(checkpoint: Checkpoint, contents: Mapping[str, bytes], shards: Mapping[str, list[Any]]) -> None:
    """What is going to happen to each file."""
    folder = checkpoint.folder
    records = {record["name"]: record for record in read_manifest(folder).get("files", [])}
    swaps = plan_swaps(folder, list(contents), records)
    for swap in swaps:
        if swap.old is None:
            print(f"  add      {swap.name}")
        else:
            backup = "an earlier upgrade wrote it" if swap.old.startswith(SAVED) else f"backup {swap.old}"
            print(f"  replace  {swap.name} ({backup})")
    for name, shard in shards.items():
        print(f"  add      {name} ({format_size(sum(entry.size for entry in shard))} of weights)")
    print(f"  {'replace' if records else 'add    '}  {MANIFEST} (for --undo)")
    ours = {path.name for path in CODE.glob("*.py")}
    for path in sorted(folder.glob("*.py")):
        if path.name not in ours:
            print(f"  leave    {path.name} (the new code does not use it)")


def upgrade(folder: Path, args: argparse.Namespace) -> None:
    """Plan, try, and unless it is a dry run, do."""
    checkpoint = recognise(folder, args.model_version)
    bits = checkpoint.config.get("quantization_bit")
    quantized = f", int{bits} weights" if bits else ""
    print(f"{folder}: {checkpoint.model_version}{quantized} (by {checkpoint.reason})")
    contents = new_contents(checkpoint)
    shards = plan_conversion(folder, args.max_shard_size) if args.safetensors else {}
    lacks_generation_config = not os.path.lexists(folder / "generation_config.json")
    if not (contents or shards or lacks_generation_config):
        print("Already up to date.")
        return
    # Imported late, for torch takes its time and the refusals above need not wait.
    from try_checkpoint import try_loading

    try:
        tokenizer, found = try_loading(checkpoint, contents)
        if lacks_generation_config:
            contents["generation_config.json"] = generation_config(checkpoint, tokenizer)
    except UpgradeError as error:
        if not args.force:
            raise UpgradeError(f"{error} Nothing was changed; --force upgrades the folder all the same.") from error
        found = f"--force: {error}"
    if not (contents or shards):
        print("Already up to date.")
        return
    print_plan(checkpoint, contents, shards)
    print(f"  tried    {found}")
    if args.dry_run:
        print("Nothing was changed (--dry-run).")
        return
    apply_upgrade(checkpoint, contents, shards, args.force)
    if shards:
        sources = {entry.source for shard in shards.values() for entry in shard}
        size = format_size(sum(path.stat().st_size for path in sources))
        print(f"Every tensor was read back and is the same. The .bin files stay; without them {size} would be free,")
        print("but --undo would leave the safetensors files in their place.")
    if folder.parent.name == "snapshots":
        print(
            "This is the Hub's cache: load the folder by its path. By its name, the Hub would be asked for the new files."
        )
    print(f"Done. To undo: python {shlex.quote(sys.argv[0])} {shlex.quote(str(args.path))} --undo")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="the checkpoint folder")
    parser.add_argument("--model-version", choices=MODEL_VERSIONS, help="the generation, where the files do not tell")
    parser.add_argument("--safetensors", action="store_true", help="also convert .bin weights")
    parser.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="default: 5GB")
    parser.add_argument("--force", action="store_true", help="upgrade a folder that does not load afterwards")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    parser.add_argument("--undo", action="store_true", help="restore the folder as it was before the first upgrade")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """The command without its error messages."""
    if not args.path.is_dir():
        raise UpgradeError(f"{args.path} {'is not a folder' if args.path.exists() else 'does not exist'}.")
    folder = args.path.resolve()
    if args.dry_run:
        if is_pending(folder):
            raise UpgradeError(f"a killed run has to be cleared up in {folder} first: run again without --dry-run.")
        undo(folder, True, None) if args.undo else upgrade(folder, args)
        return
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UpgradeError(f"{folder} cannot be written to.")
    with lock(folder):
        recovered = recover(folder)
        if recovered:
            print(f"First {recovered}.")
        undo(folder, False, recovered) if args.undo else upgrade(folder, args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse_arguments(arguments)
    try:
        run(args)
    except UpgradeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}. The folder is as it was, or as it is to be.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. The folder is as it was, or as it is to be.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
