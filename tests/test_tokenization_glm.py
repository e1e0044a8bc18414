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
"""The tokenizers of GLM give the recorded ids, texts and inputs of the published ones, in both vocabularies."""

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase


pytestmark = pytest.mark.floor

CLASSES = {"glm-chinese": "GLMChineseTokenizer", "glm-gpt2": "GLMGPT2Tokenizer"}
PROMPTS = ["single", "sentence", "document", "blanks_hf", "batch_right", "batch_left"]

every_glm = pytest.mark.parametrize("name", CLASSES)
Named = Callable[[str], Any]


@pytest.fixture(scope="module")
def tokenizer(source: Callable[[str], ModuleType], reference_dir: Path) -> Named:
    module = source("tokenization_glm")
    return cache(lambda name: getattr(module, CLASSES[name]).from_pretrained(reference_dir / name))


@pytest.fixture(scope="module")
def recorded(reference_dir: Path) -> Named:
    return cache(lambda name: json.loads((reference_dir / name / "tokenizer_cases.json").read_text(encoding="utf-8")))


def assert_recorded(tokenizer: PreTrainedTokenizerBase, cases: dict[str, Any]) -> None:
    for one in cases["strings"]:
        text = one["text"]
        assert tokenizer.tokenize(text) == one["tokens"], text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == one["ids"], text
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == one["ids_special"], text
        assert tokenizer.decode(one["ids_special"]) == one["decode_special"], text
        assert tokenizer.decode(one["ids_special"], skip_special_tokens=True) == one["decode_special_skip"], text
        assert tokenizer.decode(one["ids"], clean_up_tokenization_spaces=False) == one["decode_ids_noclean"], text


@every_glm
def test_texts(name: str, tokenizer: Named, recorded: Named, case: Named) -> None:
    glm, cases = tokenizer(name), recorded(name)
    assert_recorded(glm, cases)
    assert (len(glm), glm.vocab_size) == (cases["len"], cases["vocab_size"])
    ids = {
        key: getattr(glm, f"{key}_token_id") for key in ("sop", "eop", "cls", "mask", "smask", "gmask", "eos", "pad")
    }
    assert ids == {key: case(name).expected["special_ids"][key] for key in ids}
    assert glm.mask_token_ids == [ids["mask"], ids["smask"], ids["gmask"]]
    assert glm.stop_token_ids() == [ids["eop"], ids["eos"]]
    for ids_of_row, text in zip(case(name).expected["batch_left"]["generate_output"], case(name).expected["batch_left"]["decoded"]):  # fmt: skip
        assert glm.decode(ids_of_row) == text


@every_glm
def test_batches_and_truncation(name: str, tokenizer: Named, recorded: Named) -> None:
    glm, cases = tokenizer(name), recorded(name)
    assert (glm.padding_side, glm.truncation_side) == (cases["default_padding_side"], cases["truncation_side"])
    for side in ("right", "left"):
        batch = glm(cases["batches"]["texts"], padding=True, padding_side=side)
        assert {key: batch[key] for key in ("input_ids", "attention_mask")} == cases["batches"][side]
    cut = cases["truncation"]
    assert glm(cut["text"], truncation=True, max_length=cut["max_length"])["input_ids"] == cut["input_ids"]
    for call in (lambda: glm("a", "b"), lambda: glm("a", text_pair="b")):
        with pytest.raises(ValueError, match="pair of texts"):
            call()


@every_glm
def test_saved_again_is_the_same(name: str, tokenizer: Named, recorded: Named, tmp_path: Path) -> None:
    glm = tokenizer(name)
    glm.save_pretrained(tmp_path)
    assert_recorded(type(glm).from_pretrained(tmp_path), recorded(name))
    glm.save_vocabulary(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (tmp_path / file).unlink(missing_ok=True)
    # The vocabulary alone: the ids behind it are those of the published vocabularies.
    assert_recorded(type(glm).from_pretrained(tmp_path), recorded(name))
    copied = pickle.loads(pickle.dumps(glm))
    assert copied.encode("中文 [MASK]。") == glm.encode("中文 [MASK]。")


@every_glm
def test_masks_may_strip_on_the_left_alone(name: str, tokenizer: Named, recorded: Named, reference_dir: Path) -> None:
    """As in GLM's own training."""
    tokens = {}
    for index, token in tokenizer(name).added_tokens_decoder.items():
        is_mask = token.content in ("[MASK]", "[sMASK]", "[gMASK]")
        tokens[index] = AddedToken(token.content, lstrip=True, rstrip=not is_mask)
    glm = type(tokenizer(name)).from_pretrained(reference_dir / name, added_tokens_decoder=tokens)
    for one in recorded(name)["strings"]:
        assert glm(one["text"], add_special_tokens=False)["input_ids"] == one["ids_lstrip_masks"]


def assert_tensors(inputs: Any, tensors: dict[str, torch.Tensor], key: str, names: tuple[str, ...]) -> None:
    assert set(inputs) >= set(names)
    for name in names:
        assert inputs[name].long().equal(tensors[f"{key}.{name}"].long()), name


@every_glm
@pytest.mark.parametrize("prompt", PROMPTS)
def test_inputs_for_generation(name: str, prompt: str, tokenizer: Named, case: Named) -> None:
    expected, tensors = case(name).expected[prompt], case(name).tensors
    texts = [expected["text"]] if isinstance(expected["text"], str) else expected["text"]
    inputs = tokenizer(name)(texts, padding=True, padding_side=expected["padding_side"], return_tensors="pt")
    assert inputs["input_ids"].equal(tensors[f"{prompt}.context_ids"])
    assert inputs["attention_mask"].equal(tensors[f"{prompt}.context_attention_mask"])
    built = tokenizer(name).build_inputs_for_generation(inputs, max_gen_length=expected["max_gen_length"])
    assert_tensors(built, tensors, prompt, ("input_ids", "position_ids", "generation_attention_mask"))


@every_glm
@pytest.mark.parametrize("key", ["loss", "loss_padded", "loss_single"])
def test_inputs_for_training(name: str, key: str, tokenizer: Named, case: Named) -> None:
    expected = case(name).expected[key]
    glm = tokenizer(name)
    inputs = glm(expected.get("texts", expected.get("text")), padding=True, return_tensors="pt")
    targets = expected.get("targets", expected.get("target"))
    settings = {name: expected[name] for name in ("max_gen_length", "padding") if name in expected}
    for given in (
        targets,
        [glm.encode(one, add_special_tokens=False) for one in targets] if key == "loss" else targets,
    ):
        built = glm.build_inputs_for_generation(inputs, targets=given, **settings)
        assert_tensors(built, case(name).tensors, key, ("input_ids", "position_ids", "attention_mask", "labels"))
    with pytest.raises(ValueError, match="targets; give one for each row"):
        glm.build_inputs_for_generation(inputs, targets=["a"] * 9)


@every_glm
@pytest.mark.parametrize("key", ["mc", "mc_left"])
def test_inputs_for_multiple_choice(name: str, key: str, tokenizer: Named, case: Named) -> None:
    expected, side = case(name).expected["mc"], "left" if key == "mc_left" else "right"
    glm = tokenizer(name)
    inputs = glm(expected["texts"], padding=True, padding_side=side, return_tensors="pt")
    built = glm.build_inputs_for_multiple_choice(inputs, expected["choices"])
    assert_tensors(built, case(name).tensors, key, ("input_ids", "position_ids", "attention_mask"))
    for part, values in (("choice_ids", expected["choice_ids"]), ("choice_indices", case(name).expected[key]["choice_indices"])):  # fmt: skip
        assert [[one.tolist() for one in row] for row in built[part]] == values
    with pytest.raises(ValueError, match="at least one choice for each of 2 rows"):
        glm.build_inputs_for_multiple_choice(inputs, [["a"], []])
    with pytest.raises(ValueError, match="A choice has no text"):
        glm.build_inputs_for_multiple_choice(inputs, [["a"], ["b", ""]])


@every_glm
def test_a_text_without_a_blank_is_refused(name: str, tokenizer: Named) -> None:
    inputs = tokenizer(name)(["a [MASK]", "b"], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"Row 1 has no blank.*\[sMASK\]"):
        tokenizer(name).build_inputs_for_generation(inputs)


@every_glm
def test_a_folder_without_a_vocabulary_says_what_is_missing(name: str, tokenizer: Named) -> None:
    with pytest.raises(ValueError, match="Copy (it|them) from the published checkpoint"):
        type(tokenizer(name))()
