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
"""`datasets` takes a fingerprint of a tokenizer, to find again what it has mapped with it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generations import GENERATION_CASES
from transformers import AutoTokenizer


datasets = pytest.importorskip("datasets")
Hasher = pytest.importorskip("datasets.fingerprint").Hasher

# Another process for all generations, as Python and the libraries take seconds to start.
SCRIPT = """
import json, sys
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer

load = lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(json.dumps([Hasher.hash(load(folder)) for folder in sys.argv[1:]]))
"""


@pytest.mark.grid
def test_fingerprints_are_equal_in_every_process(case_folder: Callable[[str], Path]) -> None:
    folders = [str(case_folder(name)) for name in GENERATION_CASES]
    run = subprocess.run([sys.executable, "-c", SCRIPT, *folders], stdout=subprocess.PIPE, text=True, check=True)
    tokenizers = [AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in folders]
    hashes = [Hasher.hash(tokenizer) for tokenizer in tokenizers]
    assert json.loads(run.stdout) == hashes
    assert len(set(hashes)) == len(folders)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_a_tokenizer_in_use_keeps_its_fingerprint(case_folder: Callable[[str], Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True)
    before = Hasher.hash(tokenizer)
    tokenizer("text")
    tokenizer.build_chat_input("text")
    assert Hasher.hash(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert Hasher.hash(tokenizer) != before


def test_what_two_processes_mapped_is_found_again(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"{row} 你好"}) + "\n" for row in range(16)))
    maps: list[Any] = []
    for _ in range(2):
        # Loaded anew, as the next run of a program does.
        tokenizer = AutoTokenizer.from_pretrained(case_folder("chatglm3"), trust_remote_code=True)
        data = datasets.load_dataset(
            "json", data_files=str(tmp_path / "data.jsonl"), cache_dir=str(tmp_path / "cache")
        )
        maps.append(data["train"].map(lambda row, t=tokenizer: {"ids": t(row["text"])["input_ids"]}, num_proc=2))
    files = [[Path(file["filename"]) for file in mapped.cache_files] for mapped in maps]
    assert files[0] == files[1]
    assert maps[0]["ids"][15] == tokenizer("15 你好")["input_ids"]
