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
"""From which checkpoint does a run go on, and was it made by a run like this one?"""

import json
import zipfile
from pathlib import Path
from typing import Any

from finetune_adapter import ADAPTER_FILE
from finetune_settings import METHOD_SETTINGS, OWN_CHECKPOINTS, OWN_WEIGHTS, ModelArguments, RunArguments
from local_code import read_json_object
from safetensors import SafetensorError, safe_open
from transformers.utils import logging


# Under the library's name, so that its handler prints it.
logger = logging.get_logger("transformers.finetune")

# Beside the files of checkpoints that the library cannot resume by itself: the trained weights.
OWN_STATE = "trained_state.pt"
# The settings a checkpoint was made with.
SETTINGS_FILE = "finetune_settings.json"


def check_checkpoint(folder: Path, method: str) -> str | None:
    """What is wrong with a checkpoint of the Trainer, if anything: a file that is missing, cut off or unreadable."""
    if not folder.is_dir():
        return "there is no such folder"
    paths = {path.name: path for path in folder.iterdir()}
    # The state is written last: without it the run ended while saving.
    needed = {"trainer_state.json"}
    if not any(name.startswith(("pytorch_model_fsdp", "global_step")) for name in paths):
        is_split = "model.safetensors.index.json" in paths
        full = "model.safetensors.index.json" if is_split else "model.safetensors"
        needed |= {"optimizer.pt", "scheduler.pt"}
        needed.add(OWN_STATE if method in OWN_CHECKPOINTS else full if method in OWN_WEIGHTS else ADAPTER_FILE)
    for path in paths.values():
        try:
            needed |= _check_file(path)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} is damaged ({error})"
    missing = sorted(needed - set(paths))
    return f"{', '.join(missing)} is missing" if missing else None


def _check_file(path: Path) -> set[str]:
    """The files that this one needs beside it.

    Raises:
        OSError, ValueError, SafetensorError, BadZipFile: if it is damaged.
    """
    if path.suffix == ".json":
        shards = read_json_object(path).get("weight_map", {})
        return set(shards.values()) if isinstance(shards, dict) else set()
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
    return set()


def find_checkpoint(run: RunArguments, model: ModelArguments) -> Path | None:
    """The checkpoint to resume from; damaged ones are passed over with a warning, unless asked for by name.

    Raises:
        ValueError: if the checkpoint asked for is damaged, or a run with other settings made it.
    """
    if run.resume == "no":
        return None
    # Settings are compared first: a checkpoint of another method has other files too.
    if run.resume != "auto":
        compare_settings(Path(run.resume), run, model)
        if fault := check_checkpoint(Path(run.resume), model.method):
            raise ValueError(f"resume: {run.resume} cannot be used: {fault}")
        return Path(run.resume)
    folders = [path for path in Path(run.output_dir or "").glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        compare_settings(folder, run, model)
        fault = check_checkpoint(folder, model.method)
        if fault is None:
            return folder
        logger.warning(f"{folder} is passed over: {fault}")
    logger.warning(f"{run.output_dir} has no checkpoint to resume from: starting from the beginning")
    return None


def settings_to_keep(run: RunArguments, model: ModelArguments) -> dict[str, Any]:
    """The settings without which weights or the optimizer's state would mean something else."""
    kept = {name: getattr(model, name) for name in ("method", *METHOD_SETTINGS[model.method])}
    return kept | {"optim": str(run.optim.value)}


def write_settings(folder: Path, run: RunArguments, model: ModelArguments) -> None:
    """Leave a note in a checkpoint of what it was made with."""
    text = json.dumps(settings_to_keep(run, model), indent=2, ensure_ascii=False)
    # The library makes the folder later where shards of the model are all that it saves.
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")


def compare_settings(folder: Path, run: RunArguments, model: ModelArguments) -> None:
    """Compare the settings of a run with those a checkpoint was made with, if it says so.

    Raises:
        ValueError: with the first setting that differs, and both values.
    """
    try:
        made_with = read_json_object(folder / SETTINGS_FILE)
    except (OSError, ValueError):
        # Made by an earlier version, or damaged, which `check_checkpoint` finds out.
        return
    for name, value in settings_to_keep(run, model).items():
        if name in made_with and made_with[name] != value:
            raise ValueError(
                f"{name}: {folder} was made with {made_with[name]}, not {value}; set it so to go on, or use another "
                "output_dir to start anew"
            )
