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
"""Blanks are filled and choices scored as the published programs do it, and as doing it by hand does."""

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import REFERENCE, Case
from generations import CAUSAL_CASES, GENERATION_CASES
from safetensors.torch import load_file
from test_glm import write_folder
from test_tokenization_glm import CLASSES
from transformers import PreTrainedModel


GLM_NAMES = {
    "ENC": "[CLS]",
    "eos": "<|endoftext|>",
    "MASK": "[MASK]",
    "sMASK": "[sMASK]",
    "gMASK": "[gMASK]",
    "sop": "<|startofpiece|>",
    "eop": "<|endofpiece|>",
}
# Recorded checkpoints, and the kind of their tokenizer in the cloze cases.
GLM_KINDS = {"glm-chinese": "chinese", "glm-gpt2": "gpt2"}
every_glm = pytest.mark.parametrize("name", GLM_KINDS)
WORDS = ("47 88 [MASK] 12 49 [sMASK] 112", "12 [MASK] 60 [gMASK]", "47 88 90 91")
TEXTS = ("今天[MASK]，我们去[MASK]。", "hello [MASK] world [gMASK]", "你好")


class WordTokenizer:
    """Texts are ids, written as words, and the names of special tokens."""

    def __init__(self, special: dict[str, int]) -> None:
        self.special = special
        self.names = {token_id: name for name, token_id in special.items()}

    def convert_tokens_to_ids(self, name: str) -> int | None:
        return self.special.get(name)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.names.get(token_id, str(token_id))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        for name in self.special:
            text = text.replace(name, f" {name} ")
        return [self.special[word] if word in self.special else int(word) for word in text.split()]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.write(token_ids)

    def write(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.convert_ids_to_tokens(token_id) for token_id in token_ids)


@cache
def cloze_cases() -> dict[str, Any]:
    return json.loads((REFERENCE / "glm-cloze" / "cases.json").read_text(encoding="utf-8"))


@cache
def cloze_scores() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / "glm-cloze" / "cases.safetensors")


def glm_words(kind: str) -> WordTokenizer:
    commands = cloze_cases()[kind]["commands"]
    return WordTokenizer({name: commands[key] for key, name in GLM_NAMES.items()})


def words_130b(case: Callable[[str], Case]) -> WordTokenizer:
    names = {"sop": "<sop>", "eop": "<eop>", "eos": "</s>"}
    commands = case("glm-130b").expected["commands"]
    return WordTokenizer({names.get(key, key): token_id for key, token_id in commands.items()})


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-5 * max(1.0, wanted.abs().max().item()))


@pytest.fixture(scope="module")
def blank_model(
    chatglm: SimpleNamespace,
    case_model: Callable[[str], PreTrainedModel],
    reference_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], PreTrainedModel]:
    """The model of a case, also of the older GLM."""

    @cache
    def model(name: str) -> PreTrainedModel:
        if name not in (*GLM_KINDS, "glm-130b"):
            return case_model(name)
        folder = write_folder(reference_dir / name, tmp_path_factory.mktemp("glm") / name)
        return chatglm.ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    return model


@pytest.fixture(scope="module")
def glm_tokenizer(source: Callable[[str], ModuleType], reference_dir: Path) -> Callable[[str], Any]:
    module = source("tokenization_glm")
    return cache(lambda name: getattr(module, CLASSES[name]).from_pretrained(reference_dir / name))


@every_glm
def test_blanks_of_glm_are_filled_as_recorded(
    name: str, case: Callable[[str], Case], blank_model: Callable[[str], PreTrainedModel]
) -> None:
    recorded, tokenizer = case(name).expected["blanks"], glm_words(GLM_KINDS[name])
    # Without what the text begins and ends with.
    text = tokenizer.write(recorded["context_ids"][1:-1])
    filled = blank_model(name).infill(tokenizer, text, max_new_tokens=recorded["out_seq_length"])
    assert filled.span_ids == [span[1:] for span in recorded["spans"]]
    assert filled.spans == [tokenizer.decode(span[1:]) for span in recorded["spans"]]


@every_glm
def test_text_is_filled_as_recorded(
    name: str,
    case: Callable[[str], Case],
    blank_model: Callable[[str], PreTrainedModel],
    glm_tokenizer: Callable[[str], Any],
) -> None:
    """The same from the text itself, by the tokenizer of the checkpoint."""
    recorded, tokenizer = case(name).expected["blanks"], glm_tokenizer(name)
    filled = blank_model(name).infill(tokenizer, recorded["text"], max_new_tokens=recorded["out_seq_length"])
    assert filled.span_ids == [span[1:] for span in recorded["spans"]]
    assert not any(mask in filled.text for mask in ("[MASK]", "[sMASK]", "[gMASK]"))
    parts = recorded["text"].replace("[sMASK]", "[MASK]").split("[MASK]")
    assert filled.text.startswith(parts[0] + filled.spans[0]) and filled.text.endswith(parts[-1])


@every_glm
def test_what_is_read_is_as_recorded(
    name: str, case: Callable[[str], Case], source: Callable[[str], ModuleType]
) -> None:
    """An answer that was cut off is kept whole, and its last token is never read."""
    module, tokenizer = source("generation_blanks"), glm_words(GLM_KINDS[name])
    recorded, tensors = case(name).expected["blanks"], case(name).tensors
    text = tokenizer.write(recorded["context_ids"][1:-1])
    blanks = module.find_blanks(module.InfillFormat(), tokenizer, text)
    assert [blanks.mask_position(blank) for blank in range(3)] == recorded["mask_positions"]
    end = tokenizer.special["<|endofpiece|>"]
    for span in recorded["spans"]:
        was_cut = len(span) - 1 == recorded["out_seq_length"]
        blanks.read_answer([*span[1:], *([] if was_cut else [end])], [end])
    ids, positions, num_context = blanks.append_answers(tokenizer.special["<|startofpiece|>"])
    assert [ids] == tensors["blanks.fed_ids"].tolist()
    assert [list(positions)] == tensors["blanks.position_ids"].tolist()
    assert num_context == len(recorded["context_ids"])


@pytest.mark.parametrize("kind", ["mask", "smask", "gmask", "none", "many", "end_mask"])
def test_blanks_of_glm_130b_are_filled_as_recorded(
    kind: str, case: Callable[[str], Case], blank_model: Callable[[str], PreTrainedModel]
) -> None:
    """Each answer is written into the text, and the next blank is filled in the new text."""
    recorded, tokenizer = case("glm-130b").expected["fill_blanks"][kind], words_130b(case)
    # The published limit is one of all tokens, answers included.
    filled = blank_model("glm-130b").infill(
        tokenizer, recorded["text"], max_new_tokens=None, max_length=recorded["out_seq_length"]
    )
    assert filled.spans == recorded["blanks"][0]
    assert filled.text.split() == recorded["answers"][0].split()


def encode_with_masks(tokenizer: Any, text: str) -> list[int]:
    """ChatGLM-6B's tokenizer does not look for `[gMASK]` in a text."""
    ids = []
    for part in re.split(r" *(\[g?MASK\]) *", text):
        is_mask = part.endswith("MASK]")
        ids += [tokenizer.convert_tokens_to_ids(part)] if is_mask else tokenizer.encode(part, add_special_tokens=False)
    return ids


def fill_by_hand(model: PreTrainedModel, tokenizer: Any, text: str, limit: int) -> list[list[int]]:
    """ChatGLM-6B, one whole forward pass for every token: first `[gMASK]`, then each `[MASK]`, written into the text."""
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<sop>", "<eop>"))
    ids, answers = encode_with_masks(tokenizer, text), []
    masks = [tokenizer.convert_tokens_to_ids(name) for name in ("[gMASK]", "[MASK]")]
    while mask := next((mask for mask in masks if mask in ids), None):
        place, new = ids.index(mask), []
        while len(new) < limit and end not in new:
            with torch.no_grad():
                logits = model(torch.tensor([[*ids, start, *new]])).logits[0, -1]
            logits[masks] = -torch.inf
            new.append(logits.argmax().item())
        answers.append([token_id for token_id in new if token_id != end])
        ids[place : place + 1] = answers[-1]
    return answers


def test_filling_equals_filling_by_hand(
    blank_model: Callable[[str], PreTrainedModel], case_tokenizer: Callable[[str], Any]
) -> None:
    model, tokenizer = blank_model("chatglm1"), case_tokenizer("chatglm1")
    for text in TEXTS:
        span_ids = model.infill(tokenizer, text, max_new_tokens=5).span_ids
        # The blank of the document comes first.
        span_ids = span_ids[-1:] + span_ids[:-1] if text.endswith("[gMASK]") else span_ids
        by_hand = fill_by_hand(model, tokenizer, text if "MASK]" in text else text + "[gMASK]", 5)
        assert span_ids == by_hand


@pytest.mark.parametrize("name", ["chatglm1", *GLM_KINDS, "glm-130b"])
def test_batch_stream_and_beams(
    name: str,
    case: Callable[[str], Case],
    blank_model: Callable[[str], PreTrainedModel],
    case_tokenizer: Callable[[str], Any],
) -> None:
    model, texts = blank_model(name), list(WORDS)
    if name == "chatglm1":
        tokenizer, texts = case_tokenizer(name), list(TEXTS)
    else:
        tokenizer = words_130b(case) if name == "glm-130b" else glm_words(GLM_KINDS[name])
    alone = [model.infill(tokenizer, text, max_new_tokens=5) for text in texts]
    assert model.infill(tokenizer, texts, max_new_tokens=5) == alone
    *_, last = model.stream_infill(tokenizer, texts[0], max_new_tokens=5)
    assert last == alone[0]
    beams = model.infill(tokenizer, texts, max_new_tokens=4, num_beams=3)
    assert beams == [model.infill(tokenizer, text, max_new_tokens=4, num_beams=3) for text in texts]
    torch.manual_seed(1)
    sampled = model.infill(tokenizer, texts[0], max_new_tokens=5, do_sample=True)
    torch.manual_seed(1)
    assert model.infill(tokenizer, texts[0], max_new_tokens=5, do_sample=True) == sampled
    for one, text in zip((*alone, *beams, sampled), (*texts, *texts, texts[0])):
        assert len(one.spans) == max(text.count("MASK]"), 1)
        assert "MASK]" not in one.text and one.text.startswith(text.split("[")[0].rstrip())


@every_glm
def test_answers_take_no_positions_of_the_text(name: str, blank_model: Callable[[str], PreTrainedModel]) -> None:
    """A text and its first answer may have more tokens than the model has positions."""
    model, tokenizer = blank_model(name), glm_words(GLM_KINDS[name])
    limit = model.config.max_prompt_length
    text = "[MASK] " + "12 " * (limit - 12) + "[MASK]"
    filled = model.infill(tokenizer, text, max_new_tokens=20, min_new_tokens=20)
    assert [len(ids) for ids in filled.span_ids] == [20, 20]
    with pytest.raises(ValueError, match=f"more than the {limit} positions"):
        model.infill(tokenizer, text + "12 " * 20, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"An answer of {limit} tokens has more than the {limit - 1} positions"):
        model.infill(tokenizer, "12 [MASK]", max_new_tokens=limit)
    spans = model.infill(tokenizer, "12 [MASK]", max_new_tokens=limit - 1, min_new_tokens=limit - 1).span_ids
    assert len(spans[0]) == limit - 1


@every_glm
def test_choices_are_scored_as_recorded(name: str, blank_model: Callable[[str], PreTrainedModel]) -> None:
    kind, model = GLM_KINDS[name], blank_model(name)
    tokenizer, scores = glm_words(kind), cloze_scores()
    batch = cloze_cases()[kind]["multi"]["batch"]
    # What stands between the start and the end of each text, and the choices without the end of the piece.
    texts = [tokenizer.write(rows[0][1 : seen[0] - 1]) for rows, seen in zip(batch["text"], batch["mask"])]
    choices = [
        [[token for token, counts in zip(*choice) if counts][:-1] for choice in zip(targets, counted)]
        for targets, counted in zip(batch["target"], batch["logit_mask"])
    ]
    found = model.score_choices(tokenizer, texts, choices, with_end=True)
    close(found, scores[f"{kind}.multi.scores_hf"])
    close(found, scores[f"{kind}.fast.scores_hf"])
    found = model.score_choices(tokenizer, texts, choices, with_end=True, length_penalty=1.0, batch_size=2)
    close(found, scores[f"{kind}.multi_length_penalty.scores_hf"])
    batch = cloze_cases()[kind]["single"]["batch"]
    texts = [tokenizer.write(row[1 : length - 1]) for row, length in zip(batch["text"], batch["mask"])]
    found = model.score_choices(tokenizer, texts, [[[token] for token in row] for row in batch["target"]])
    close(found, scores[f"{kind}.single_softmax.scores_hf"])


@every_glm
def test_choices_of_multiple_choice_are_scored_as_recorded(
    name: str,
    case: Callable[[str], Case],
    blank_model: Callable[[str], PreTrainedModel],
    glm_tokenizer: Callable[[str], Any],
) -> None:
    recorded, tensors = case(name).expected["mc"], case(name).tensors
    found = blank_model(name).score_choices(glm_tokenizer(name), recorded["texts"], recorded["choices"])
    close(found, tensors["mc.scores"])


@pytest.mark.parametrize("task", ["choice_single", "choice_multi"])
def test_choices_of_glm_130b_are_scored_as_recorded(
    task: str, case: Callable[[str], Case], blank_model: Callable[[str], PreTrainedModel]
) -> None:
    recorded, tokenizer = case("glm-130b").expected[task], words_130b(case)
    # "unified", which counts positions on from a mask token that is not in the text, belongs to one training stage.
    ends = {"append_mask": " [MASK]", "blank": "", "gmask": " [gMASK]"}
    for kind, ids, choices, wanted in zip(*(recorded[key] for key in ("kinds", "texts", "choices", "log_probs"))):
        if kind in ends:
            found = blank_model("glm-130b").score_choices(tokenizer, [tokenizer.write(ids) + ends[kind]], [choices])
            close(found, torch.tensor([wanted]))


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_choices_are_scored_as_one_by_one(
    name: str, blank_model: Callable[[str], PreTrainedModel], case_tokenizer: Callable[[str], Any]
) -> None:
    """Of every generation: all choices in one row, and each choice in a row of its own."""
    model, tokenizer = blank_model(name), case_tokenizer(name)
    is_causal = name in CAUSAL_CASES
    texts = ["你好，今天", "How are you"] if is_causal else ["今天[MASK]很好。", "How are[gMASK]"]
    choices = ["好", "不知道", "hello you"]
    found = model.score_choices(tokenizer, texts, choices)
    assert found.shape == (2, 3)
    for text, row in zip(texts, found):
        for choice, score in zip(choices, row):
            target = tokenizer.encode(choice, add_special_tokens=False)
            if is_causal:
                context = tokenizer.encode(text)
            else:
                context = [*encode_with_masks(tokenizer, text), tokenizer.convert_tokens_to_ids("<sop>")]
            with torch.no_grad():
                logits = model(torch.tensor([[*context, *target]])).logits[0, len(context) - 1 : -1]
            wanted = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum()
            torch.testing.assert_close(score, wanted, atol=1e-4, rtol=1e-5)
    different = model.score_choices(tokenizer, texts, [choices[:1], choices], batch_size=1)
    torch.testing.assert_close(different[0, 0], found[0, 0])
    torch.testing.assert_close(different[1], found[1])
    assert different[0, 1:].tolist() == [-torch.inf] * 2


def test_bad_questions_are_refused(
    blank_model: Callable[[str], PreTrainedModel], case_tokenizer: Callable[[str], Any]
) -> None:
    model, tokenizer = blank_model("chatglm1"), case_tokenizer("chatglm1")
    with pytest.raises(ValueError, match="at least one"):
        model.infill(tokenizer, [])
    # Read as answers to the texts one after the other, the second would be that of the first text again.
    with pytest.raises(ValueError, match="`num_return_sequences` is 2"):
        model.infill(tokenizer, ["a [MASK]", "b [MASK]"], num_beams=2, num_return_sequences=2)
    with pytest.raises(ValueError, match="`max_new_tokens` is None: give `max_length`"):
        model.infill(tokenizer, "a [MASK]", max_new_tokens=None)
    with pytest.raises(TypeError, match="must be a string"):
        model.infill(tokenizer, [3])
    with pytest.raises(TypeError, match="One text"):
        model.stream_infill(tokenizer, ["a", "b"])
    with pytest.raises(ValueError, match="never taught to fill blanks"):
        blank_model("chatglm3").infill(case_tokenizer("chatglm3"), "a [MASK]")
    for texts, choices, message in (
        ([], ["a"], "at least one text"),
        ("a [MASK]", ["a"], "must be a list"),
        (["[MASK] and [MASK]"], ["a"], "for one blank"),
        (["a [MASK]"], [], "at least one token"),
        (["a [MASK]"], "yes", "must be a list, got 'yes'"),
        (["a [MASK]"], [["a"], ["b"]], "choices for 2"),
        (["a [MASK]"], [""], "at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            model.score_choices(tokenizer, texts, choices)
