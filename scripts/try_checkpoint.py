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
"""Tries a checkpoint folder as it would be with new files, in a temporary place: does it load, do the weights fit?

Only this repository's code runs, never that of the folder.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from folder_switch import UpgradeError
from recognise_checkpoint import Checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer
from transformers.utils import logging


ROUND_TRIP = "Hello, 你好 42"
# Larger files are left out where no links can be made.
LARGEST_COPY = 64 * 2**20


@contextmanager
def assembled(folder: Path, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary folder that looks as the checkpoint is going to look."""
    with tempfile.TemporaryDirectory(prefix="chatglm-upgrade-") as temporary:
        trial = Path(temporary) / "checkpoint"
        trial.mkdir()
        # The library would follow an adapter's configuration to another folder, and run the code there. It would also
        # run `custom_generate/generate.py`, so folders stay out.
        names = {path.name for path in folder.iterdir() if path.is_file()}
        for name in {name for name in names if name.lower() != "adapter_config.json"} - contents.keys():
            try:
                os.symlink(folder / name, trial / name)
            except OSError:  # Windows, without the right to make links.
                if (folder / name).stat().st_size <= LARGEST_COPY:
                    shutil.copyfile(folder / name, trial / name)
        for name, content in contents.items():
            (trial / name).write_bytes(content)
        yield trial


def try_loading(checkpoint: Checkpoint, contents: Mapping[str, bytes]) -> tuple[Any, str]:
    """Load the folder as it will be: tokenizer round trip, names and shapes of the weights, one forward without values.

    Returns:
        The tokenizer, and what was found in words.

    Raises:
        UpgradeError: with what the code says if it does not load.
    """
    is_classifier = "Classification" in str(checkpoint.config.get("architectures"))
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModel
    options = {"trust_remote_code": True, "local_files_only": True}
    logging.disable_progress_bar()
    try:
        with assembled(checkpoint.folder, contents) as trial:
            tokenizer, ids, tried = None, [5, 6, 7], "no tokenizer (there is no vocabulary)"
            if checkpoint.has_vocabulary:
                tokenizer = AutoTokenizer.from_pretrained(trial, **options)
                ids, tried = try_tokenizer(tokenizer), "tokenizer round trip"
            if tokenizer is not None and checkpoint.config.get("vision_config"):
                tried += f", {try_processor(trial, options)}"
            weights = [trial / path.name for path in checkpoint.weights]
            if weights and all(path.exists() for path in weights):
                model, info = auto_class.from_pretrained(
                    trial, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True, **options
                )
                compare_weights(info)
                fit = "names and shapes of the weights"
            else:
                config = AutoConfig.from_pretrained(trial, **options)
                with torch.device("meta"):
                    model = auto_class.from_config(config, trust_remote_code=True)
                fit = f"no weights compared ({'no links can be made here' if weights else 'there are none'})"
            if checkpoint.merged is not None:
                model.load_state_dict(dict(checkpoint.merged), strict=True, assign=True)
                fit = f"names and shapes of the weights of {len(checkpoint.merged.files)} ranks"
            model.eval()(input_ids=torch.tensor([ids], device="meta"))
    except Exception as error:  # The remote code may raise anything, and all of it means: does not load.
        # The message may name the temporary folder, and have several lines.
        message = " ".join(re.sub(r"\S*[/\\]chatglm-upgrade-\w+[/\\]checkpoint", ".", str(error)).split())
        raise UpgradeError(
            f"with the new files the folder does not load: {message} ({type(error).__name__})"
        ) from error
    return tokenizer, f"{tried}, {fit}, one forward on the meta device"


def try_tokenizer(tokenizer: Any) -> list[int]:
    """The ids of a text that comes back, as far as the vocabulary knows its characters.

    Raises:
        ValueError: if another text comes back.
    """
    ids = tokenizer.encode(ROUND_TRIP, add_special_tokens=False)
    text = str(tokenizer.decode(ids)).strip()
    if text != ROUND_TRIP and tokenizer.unk_token_id not in ids:
        raise ValueError(f"the tokenizer turns {ROUND_TRIP!r} into {text!r}")
    return tokenizer.encode(ROUND_TRIP)


def try_processor(trial: Path, options: Mapping[str, Any]) -> str:
    """Load GLM-4V's processor, and say so; who has no Pillow may still read text."""
    if find_spec("PIL") is None:
        return "no processor (pip install pillow)"
    AutoProcessor.from_pretrained(trial, **options)
    return "processor"


def compare_weights(info: Mapping[str, Any]) -> None:
    """See that the stored tensors are those of the model, by name and shape."""
    # The prefix of P-tuning v2 comes from a file of its own.
    missing = sorted(key for key in info["missing_keys"] if "prefix_encoder" not in key)
    unexpected = sorted(info["unexpected_keys"])
    for keys, fault in ((missing, "weights are missing"), (unexpected, "weights are not known")):
        if keys:
            raise ValueError(f"{len(keys)} {fault}, such as {keys[0]}")
    if info["mismatched_keys"]:
        raise ValueError(f"a weight has another shape than config.json says: {min(info['mismatched_keys'])}")


__all__ = ["try_loading"]
