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
"""`scripts/upgrade_checkpoint.py` makes folders of GLM load by the Auto classes, and one of the ranks of GLM-130B."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import REFERENCE
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)


sys.path.insert(0, str(REFERENCE.parent.parent / "scripts"))

import upgrade_checkpoint  # noqa: E402


TOKENIZERS = {"glm-chinese": "GLMChineseTokenizer", "glm-gpt2": "GLMGPT2Tokenizer"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_published_folder_of_glm(
    name: str, tmp_path: Path, source: Callable[[str], ModuleType], case: Callable[[str], Any]
) -> None:
    folder = shutil.copytree(REFERENCE / name, tmp_path / name, ignore=shutil.ignore_patterns("expected.*"))
    (folder / "modeling_glm.py").write_text("raise ImportError('the published code')\n", encoding="utf-8")
    before = contents(folder)
    assert upgrade_checkpoint.main([str(folder)]) == 0
    config = read(folder / "config.json")
    assert (config["model_type"], config["model_version"]) == ("chatglm", "glm")
    heads = {
        AutoModel: "GLMForConditionalGeneration",
        AutoModelForCausalLM: "GLMForConditionalGeneration",
        AutoModelForSeq2SeqLM: "GLMForConditionalGeneration",
        AutoModelForMultipleChoice: "GLMForMultipleChoice",
        AutoModelForSequenceClassification: "GLMForSequenceClassification",
    }
    # Every class once is enough.
    heads = heads if name == "glm-chinese" else {AutoModelForSeq2SeqLM: "GLMForConditionalGeneration"}
    models = {
        auto_class: auto_class.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        for auto_class in heads
    }
    assert {auto_class: type(model).__name__ for auto_class, model in models.items()} == heads
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == TOKENIZERS[name]
    expected, model = case(name).expected, models[AutoModelForSeq2SeqLM]
    stop_ids = [tokenizer.eop_token_id, tokenizer.eos_token_id]
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (stop_ids, stop_ids[1])
    # Of glm-10b-chinese, where an id must never be generated that has the row of another.
    assert model.generation_config.bad_words_ids == read(REFERENCE / name / "config.json").get("bad_words_ids")
    inputs = tokenizer(expected["document"]["text"], return_tensors="pt")
    inputs = tokenizer.build_inputs_for_generation(inputs, max_gen_length=12)
    assert model.generate(**inputs, do_sample=False).tolist() == expected["document"]["generate_output"]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    again = AutoModelForMultipleChoice.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again).__name__ == "GLMForMultipleChoice"
    assert read(tmp_path / "saved" / "config.json")["model_type"] == "chatglm"
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again("a [MASK]。")["input_ids"] == tokenizer("a [MASK]。")["input_ids"]
    assert upgrade_checkpoint.main([str(folder), "--undo"]) == 0
    assert contents(folder) == before


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_of_glm_130b_become_a_folder(
    num_ranks: int, tmp_path: Path, case: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    reference = REFERENCE / "glm-130b"
    ranks = reference if num_ranks == 1 else reference / "tp2"
    folder = tmp_path / "glm-130b"
    shutil.copytree(ranks / "1", folder / "1")
    for file in (ranks / "latest", reference / "args.json"):
        shutil.copy(file, folder)
    before = contents(folder)
    assert upgrade_checkpoint.main([str(folder), "--max-shard-size", "100KB"]) == 0
    assert f"names and shapes of the weights of {num_ranks} ranks" in capsys.readouterr().out
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert model.config.features.residual_counts_layers and model.generation_config.eos_token_id == [261, 2]
    stored = torch.load(reference / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    model.save_pretrained(tmp_path / "saved", max_shard_size="1GB")
    loaded = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert loaded.get_input_embeddings().weight.equal(stored["transformer.word_embeddings.weight"].float())
    for layer in range(3):
        ours, theirs = f"transformer.encoder.layers.{layer}.mlp", f"transformer.layers.{layer}.mlp"
        for part in ("dense_h_to_4h.weight", "dense_h_to_4h.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias"):
            assert model.state_dict()[f"{ours}.{part}"].equal(stored[f"{theirs}.{part}"].float())
    tensors = case("glm-130b").tensors
    with torch.no_grad():
        logits = model(tensors["gmask.input_ids"]).logits
    torch.testing.assert_close(logits, tensors["gmask.logits"], rtol=0, atol=3e-5 * tensors["gmask.logits"].max())
    assert upgrade_checkpoint.main([str(folder)]) == 0
    assert "Already up to date" in capsys.readouterr().out
    assert upgrade_checkpoint.main([str(folder), "--undo"]) == 0
    assert contents(folder) == before


def test_glm_515m_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its vocabulary is BERT's."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n", encoding="utf-8")
    shutil.copy(REFERENCE / "glm-gpt2" / "config.json", tmp_path)
    before = contents(tmp_path)
    assert upgrade_checkpoint.main([str(tmp_path)]) == 1
    assert "has no vocabulary" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_glm_130b_reads_text_by_the_vocabulary_of_chatglm_6b(tmp_path: Path) -> None:
    """Where the user brings `ice_text.model`, whose ids are counted from that of `<sop>`."""
    folder = shutil.copytree(REFERENCE / "glm-130b" / "tp2", tmp_path / "glm-130b")
    shutil.copy(REFERENCE / "chatglm1" / "ice_text.model", folder)
    shutil.copy(REFERENCE / "glm-130b" / "args.json", folder)
    change(folder, "args.json", command_ids={"sop": 254, "eop": 255, "eos": 2})
    assert upgrade_checkpoint.main([str(folder)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(tokenizer).__name__ == "ChatGLM6BTokenizer"
    names = ("[MASK]", "[sMASK]", "[gMASK]", "<sop>", "<eop>")
    ids = [*model.config.blank_token_ids, model.config.bos_token_id, model.config.eos_token_id[0]]
    assert tokenizer.convert_tokens_to_ids(list(names)) == ids


def change(folder: Path, name: str, **changes: Any) -> None:
    """Set keys of a JSON file; the value `None` removes one."""
    content = {key: value for key, value in (read(folder / name) | changes).items() if value is not None}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def change_rank(folder: Path, key: str, tensor: torch.Tensor | None) -> None:
    path = folder / "1" / "mp_rank_01_model_states.pt"
    stored = torch.load(path, weights_only=True)
    stored["module"] = {name: one for name, one in (stored["module"] | {key: tensor}).items() if one is not None}
    torch.save(stored, path)


NORM = "transformer.layers.1.input_layernorm.weight"
REFUSALS: dict[str, Callable[[Path], Any]] = {
    r"lacks the files of ranks \[0\] of 2": lambda folder: (folder / "1" / "mp_rank_00_model_states.pt").unlink(),
    "has other tensors than": lambda folder: change_rank(folder, NORM, None),
    "'transformer.layers.1.input_layernorm.weight' differs between the ranks": lambda folder: change_rank(
        folder, NORM, torch.zeros(48, dtype=torch.float16)
    ),
    "cannot be read as a rank's weights": lambda folder: (folder / "1" / "mp_rank_01_model_states.pt").write_bytes(
        b"broken"
    ),
    "args.json says that `num_layers` is 5, and the weights say 3": lambda folder: change(
        folder, "args.json", num_layers=5
    ),
    "num_attention_heads, command_ids.sop.* are not in them": lambda folder: change(
        folder, "args.json", num_attention_heads=None, command_ids={"eop": 1, "eos": 2}
    ),
    "has no config.json": lambda folder: (folder / "latest").write_text("../1"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_ranks_that_do_not_fit_change_nothing(
    message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "glm-130b"
    shutil.copytree(REFERENCE / "glm-130b" / "tp2", folder)
    shutil.copy(REFERENCE / "glm-130b" / "args.json", folder)
    REFUSALS[message](folder)
    before = contents(folder)
    assert upgrade_checkpoint.main([str(folder)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert contents(folder) == before
