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
"""ms-swift, the real one, on upgraded folders: `make test-engines`.

It runs in its own environment, with an older Transformers: `swift_program.py` does all its jobs in one process.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from engines_help import upgraded_folder
from job_program import results_of
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer


pytestmark = pytest.mark.engines

PYTHON = REPOSITORY / ".venv-swift" / "bin" / "python"
PROGRAM = REPOSITORY / "tests" / "swift_program.py"
# What ms-swift calls the models, and their templates.
NAMES = {
    "chatglm2": ("chatglm2", "chatglm2"),
    "chatglm3": ("chatglm3", "chatglm4"),
    "glm4": ("chatglm4", "chatglm4"),
}
CONVERSATIONS = [
    [
        {"role": "user", "content": "what is the weather?"},
        {"role": "assistant", "content": "It is fine."},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "Still fine."},
    ],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！很高兴见到你。"},
    ],
]
# What its templates make of the first conversation, with the tokens that close it.
RENDERED = {
    "chatglm2": "[Round 1]\n\n问：what is the weather?\n\n答： It is fine. \n\n[Round 2]\n\n问：and now?\n\n答： Still fine.",
    "chatglm3": "[gMASK]sop<|user|> \nwhat is the weather?<|assistant|> \n It is fine."
    "<|user|> \nand now?<|assistant|> \n Still fine.<|user|>",
}


def job_of(place: Path, name: str) -> dict[str, Any]:
    folder = upgraded_folder(place / name, name)
    # Role tokens in its template are text otherwise; for GLM-4 its loader sees to that.
    if name == "chatglm3":
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(settings | {"encode_special_tokens": True}), encoding="utf-8")
    model_type, template = NAMES[name]
    job = {"folder": str(folder), "model_type": model_type, "template": template, "steps": 3}
    return {**job, "conversations": CONVERSATIONS, "output": str(place / f"{name}-output")}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not PYTHON.is_file():
        pytest.skip("needs .venv-swift: make test-engines")
    place = tmp_path_factory.mktemp("swift")
    data = place / "data.jsonl"
    data.write_text("\n".join(json.dumps({"messages": messages}) for messages in CONVERSATIONS), encoding="utf-8")
    return {name: {**job_of(place, name), "dataset": str(data)} for name in NAMES}


@pytest.fixture(scope="module")
def results(jobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("results")
    # It asks ModelScope where it is not told to ask the other hub, which is told to be offline.
    environment = {"USE_HF": "1", "HF_HUB_OFFLINE": "1", "MODELSCOPE_CACHE": str(place / "modelscope")}
    return results_of([PYTHON, PROGRAM], jobs, place, {"OMP_NUM_THREADS": "1", **environment}, cwd=place)


@pytest.mark.parametrize("name", NAMES)
def test_lora(jobs: dict[str, Any], results: dict[str, Any], name: str) -> None:
    """The adapter that ms-swift trained works here."""
    assert "error" not in results[name], results[name]["error"]
    losses = results[name]["losses"]
    assert len(losses) == jobs[name]["steps"] and losses[-1] < losses[0] < 20
    model = AutoModel.from_pretrained(jobs[name]["folder"], trust_remote_code=True, dtype=torch.float32).eval()
    inputs = {key: torch.tensor([value]) for key, value in results[name]["ids"][0].items()}
    with torch.no_grad():
        before = model(**inputs).loss
        after = PeftModel.from_pretrained(model, results[name]["adapter"]).eval()(**inputs).loss
    assert after < before - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_its_template(jobs: dict[str, Any], results: dict[str, Any], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(jobs[name]["folder"], trust_remote_code=True)
    found = [encoded["input_ids"] for encoded in results[name]["ids"]]
    if name in RENDERED:
        assert tokenizer.decode(found[0]) == RENDERED[name]
    else:
        ours = [tokenizer.apply_chat_template(messages)["input_ids"] for messages in CONVERSATIONS]
        assert found == ours
    prefix = tokenizer.build_inputs_with_special_tokens([])
    assert all(ids[: len(prefix)] == prefix for ids in found)
    for encoded in results[name]["ids"]:
        learnt = [label for label in encoded["labels"] if label != -100]
        assert 0 < len(learnt) < len(encoded["labels"]) and learnt[-1] == encoded["input_ids"][-1]
