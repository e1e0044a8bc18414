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
"""Text, ids and conversations of the ChatGLM-6B tokenizer.

What the published class gave is recorded on the published `ice_text.model`, which this repository does not hold; the
tests that need it take the fixture `real`. The same code runs on the small vocabulary of the case chatglm1 here.
"""

import copy
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from test_tokenization_chatglm import CONTROL_TEXTS, texts
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase


pytestmark = pytest.mark.floor

# On the small vocabulary.
MASK, GMASK, SOP, EOP, PAD = 250, 251, 254, 255, 3
LITERALS = [
    "<sop>",
    "<eop>",
    "[MASK]",
    "[gMASK]",
    "<pad>",
    "<unk>",
    "</s>",
    "<|blank_3|>",
    "<image_1>",
    *CONTROL_TEXTS,
]
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


@pytest.fixture(scope="module")
def real(
    real_tokenizers: Path, tmp_path_factory: pytest.TempPathFactory, copy_code: Callable
) -> PreTrainedTokenizerBase:
    """The tokenizer on the published vocabulary."""
    folder = tmp_path_factory.mktemp("chatglm")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copyfile(real_tokenizers / "chatglm" / name, folder / name)
    copy_code(folder)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def recorded(reference_dir: Path) -> dict[str, Any]:
    return json.loads((reference_dir / "tokenizer-chatglm" / "tokenizer_cases.json").read_text("utf-8"))


@pytest.fixture
def tokenizer(case_tokenizer: Callable[[str], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """The tokenizer on the small vocabulary, not to be changed."""
    return case_tokenizer("chatglm1")


@pytest.fixture
def fresh(case_folder: Callable[[str], Path]) -> Callable[..., PreTrainedTokenizerBase]:
    """A tokenizer on the small vocabulary that the test may change."""
    return lambda **kwargs: AutoTokenizer.from_pretrained(case_folder("chatglm1"), trust_remote_code=True, **kwargs)


@pytest.fixture
def vocabulary(reference_dir: Path, tmp_path: Path) -> Path:
    """The small vocabulary in a folder without any other file."""
    return Path(shutil.copyfile(reference_dir / "chatglm1" / "ice_text.model", tmp_path / "ice_text.model"))


def rewrite(text: str) -> str:
    """The published text rewriting, as it is described: the longest runs first."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return text


def restore(text: str) -> str:
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    for length in range(2, 81):
        text = text.replace(f"<|blank_{length}|>", " " * length)
    return text


def compare_with_sentencepiece(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    model = SentencePieceProcessor(model_file=tokenizer.vocab_file)
    pieces = [model.id_to_piece(index) for index in range(4, model.get_piece_size() - 344)]
    strings = list(texts(count, [piece.replace("▁", " ") for piece in pieces] + pieces[:200]))
    assert len(set(strings)) > 0.85 * count
    # The search for the named special tokens, which text is split at, is left out here.
    ids = tokenizer(strings, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    expected = model.encode([rewrite(text) for text in strings])
    differing = [text for text, ours, theirs in zip(strings, ids, expected, strict=True) if ours != theirs]
    assert differing == []
    for text, row in list(zip(strings, expected))[: count // 20]:
        message = [{"role": "user", "content": text}]
        assert tokenizer.encode_conversation(message, add_generation_prompt=False) == row, text

    generator = random.Random(1)
    last = model.get_piece_size() - 1
    rows = [[generator.randint(0, last) for _ in range(12)] for _ in range(count // 20)]
    for row in [*ids[: count // 20], *rows, *([index] for index in range(last - 400, last + 1))]:
        assert tokenizer.decode(row, clean_up_tokenization_spaces=False) == restore(model.decode(row)), row


# The published vocabulary


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.grid)])
def test_strings_equal_sentencepiece(real: PreTrainedTokenizerBase, count: int) -> None:
    compare_with_sentencepiece(real, count)


def test_strings_equal_sentencepiece_on_the_small_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    compare_with_sentencepiece(tokenizer, 10_000)


def test_recorded_properties(real: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    for name in ("vocab_size", "all_special_tokens", "all_special_ids", "padding_side"):
        assert getattr(real, name) == recorded[name], name
    assert {token: real.convert_tokens_to_ids(token) for token in recorded["special_ids"]} == recorded["special_ids"]
    assert len(real) == len(real.get_vocab()) == recorded["vocab_size"]
    assert (real.gmask_token_id, real.end_token_id, real.mask_token_id) == (130001, 2, 130000)
    assert real.stop_token_ids() == [real.eos_token_id] == [130005]
    assert real.get_command("[sMASK]") == 130002


def test_recorded_strings(real: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    assert len(recorded["strings"]) == 198
    for case in recorded["strings"]:
        text = case["text"]
        assert real.tokenize(text) == real.convert_ids_to_tokens(case["ids"]) == case["tokens"], text
        assert real.encode(text, add_special_tokens=False) == case["ids"], text
        assert real(text)["input_ids"] == real.encode(text) == case["ids_special"], text
        assert real.decode(case["ids"]) == case["decode_ids"], text
        assert real.decode(case["ids_special"]) == case["decode_special"], text
        assert real.decode(case["ids_special"], skip_special_tokens=True) == case["decode_special_skip"], text


def test_recorded_pairs_and_batches(real: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    for case in recorded["pairs"]:
        pair = (case["a"], case["b"])
        assert real(*pair)["input_ids"] == real.encode(*pair) == case["ids_special"], pair
        assert real([case["a"]], [case["b"]])["input_ids"] == [case["ids_special"]], pair
        assert real(*pair, add_special_tokens=False)["input_ids"] == case["ids"], pair
    for case in recorded["batches"]:
        options = {key: case[key] for key in case if key not in ("texts", *real.model_input_names)}
        encodings = [real(case["texts"], **options)]
        if "truncation" not in options:
            encodings.append(real.pad([real(text) for text in case["texts"]], **options))
        for encoded in encodings:
            assert encoded["input_ids"] == case["input_ids"]
            assert [mask.tolist() for mask in encoded["attention_mask"]] == [[mask] for mask in case["attention_mask"]]
            assert [positions.tolist() for positions in encoded["position_ids"]] == case["position_ids"]
    # As published: what nothing pads has no mask, which grows with the square of a text.
    unpadded = recorded["unpadded"]
    assert dict(real(unpadded["texts"])) == {"input_ids": unpadded["input_ids"]}
    assert dict(real(unpadded["texts"][0])) == {"input_ids": unpadded["input_ids"][0]}


def test_recorded_decoding(real: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    for case in recorded["decode"]:
        ids = case["ids"]
        if isinstance(case["decode"], str):
            assert real.convert_ids_to_tokens(ids) == case["tokens"]
            assert real.decode(ids) == case["decode"], ids
            assert real.decode(ids, skip_special_tokens=True) == case["decode_skip"], ids
        else:
            # On purpose: ids beyond the vocabulary give nothing, where the published class raised.
            assert case["decode"]["error"] == "IndexError"
            assert real.decode(ids) == ""
            assert real.convert_ids_to_tokens(ids) == [""]


# Loading and saving


def same(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    assert type(first).__name__ == type(second).__name__ == "ChatGLM6BTokenizer"
    assert first.get_vocab() == second.get_vocab()
    for name in (
        "all_special_tokens",
        "model_version",
        "num_image_tokens",
        "gmask_token",
        "end_token",
        "chat_template",
    ):
        assert getattr(first, name) == getattr(second, name), name
    assert (first.padding_side, first.model_max_length) == (second.padding_side, second.model_max_length)
    for text in [*LITERALS, "你好 <new><ctl> x", "a  b\n [MASK] c", ""]:
        ours, theirs = (one(text, padding="max_length", max_length=64, return_tensors="pt") for one in (first, second))
        assert all(ours[key].equal(theirs[key]) for key in ours), text
        assert first.encode_conversation([("q", text)], False) == second.encode_conversation([("q", text)], False)
        assert first.decode(ours["input_ids"]) == second.decode(theirs["input_ids"])


def test_folders_load_without_a_word(
    case_folder: Callable[[str], Path], fresh: Callable[..., Any], tmp_path: Path
) -> None:
    """The published one and one that was saved, in a process that knows neither."""
    fresh().save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        f"for folder in {[str(case_folder('chatglm1')), str(tmp_path)]}:\n"
        "    for use_fast in (True, False):\n"
        "        t = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=use_fast)\n"
        "        print(t.model_version, type(t).__name__, 'google.protobuf' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout.splitlines() == ["chatglm ChatGLM6BTokenizer False"] * 4


def test_a_saved_tokenizer_is_the_same(fresh: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = fresh(padding_side="right", model_max_length=77, num_image_tokens=5)
    assert tokenizer.add_tokens(["<new>", "你好"]) == 2
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<ctl>"]}) == 1
    names = {Path(file).name for file in tokenizer.save_pretrained(tmp_path)}
    assert {"ice_text.model", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"} <= names
    assert (tmp_path / "ice_text.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "ChatGLMTokenizer"
    assert settings["auto_map"]["AutoTokenizer"] == ["tokenization_chatglm.ChatGLMTokenizer", None]
    published = {"bos_token": "<sop>", "eos_token": "<eop>", "end_token": "</s>", "gmask_token": "[gMASK]"}
    assert published.items() <= settings.items()
    assert (settings["model_version"], settings["num_image_tokens"]) == ("chatglm", 5)
    assert str(tmp_path.parent) not in json.dumps(settings)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    same(again, tokenizer)
    again.save_pretrained(tmp_path)
    same(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True), tokenizer)


def test_a_tokenizer_pickles_and_copies(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    tokenizer.add_tokens(["<new>"])
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        same(twin, tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": "<sop>", "eos_token": "</s>", "eop_token": "<eop>", "gmask_token": "[gMASK]", "mask_token": "[MASK]",
         "pad_token": "<pad>", "unk_token": "<unk>", "num_image_tokens": 0},
        {"eos_token": "</s>", "eop_token": "<eop>", "image_tokenizer_path": "", "image_tokenizer": None},
        {"bos_token": {"content": "<sop>", "lstrip": False, "normalized": False, "rstrip": False, "__type": "AddedToken"},
         "clean_up_tokenization_spaces": True, "padding_side": "right", "use_fast": False},
        {"padding_side": "right", "split_special_tokens": False, "add_bos_token": True, "image_token": "<unk>",
         "additional_special_tokens": ["<eop>"], "eos_token": None, "model_max_length": 10**30},
        {"added_tokens_decoder": {"250": {"content": "[MASK]", "lstrip": False, "normalized": True, "rstrip": False,
                                          "single_word": False, "special": True}}},
    ],
)  # fmt: skip
def test_files_of_any_version_load(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Path, copy_code: Callable, settings: dict[str, Any]
) -> None:
    folder = vocabulary.parent
    copy_code(folder)
    shutil.copyfile(Path(tokenizer.vocab_file).with_name("config.json"), folder / "config.json")
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    config = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": auto_map}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert loaded.padding_side == settings.get("padding_side", "left")
    assert (loaded.eos_token, loaded.eos_token_id, loaded.pad_token_id) == ("<eop>", EOP, PAD)
    assert loaded.all_special_tokens == tokenizer.all_special_tokens
    for text in [*LITERALS, "a [MASK] b", "Hello, 世界"]:
        assert loaded(text) == tokenizer(text)
        assert loaded(text, text)["input_ids"] == tokenizer(text, text)["input_ids"]


def test_named_tokens_can_be_set(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    tokenizer.pad_token_id = tokenizer.eos_token_id
    tokenizer.eos_token = "</s>"
    assert (tokenizer.pad_token, tokenizer.eos_token_id) == ("<eop>", 2)
    assert tokenizer(["a", "a b c"], padding=True)["input_ids"][0][0] == EOP


def test_image_tokens_come_first(source: Callable[[str], ModuleType], vocabulary: Path) -> None:
    tokenizer_class = source("tokenization_chatglm").ChatGLMTokenizer
    plain = tokenizer_class.from_pretrained(vocabulary.parent, num_image_tokens=0)
    # Nothing but the vocabulary, as in the first published folders.
    for config, shift in ((None, 20_000), ({"bos_token_id": SOP}, 0), ({"bos_token_id": SOP + 20_000}, 20_000)):
        if config is not None:
            vocabulary.with_name("config.json").write_text(json.dumps(config))
        tokenizer = tokenizer_class.from_pretrained(vocabulary.parent)
        assert tokenizer.num_image_tokens == shift
        for text in ("Hi 你好", "a [MASK] b", " "):
            ids = tokenizer.encode(text)
            assert ids == [index + shift for index in plain.encode(text)]
            assert tokenizer.decode(ids) == plain.decode(plain.encode(text))
        assert (tokenizer.pad_token_id, tokenizer.gmask_token_id) == (PAD + shift, GMASK + shift)
        assert tokenizer.stop_token_ids() == [EOP + shift]
        assert len(tokenizer.get_vocab()) == tokenizer.vocab_size == plain.vocab_size + shift
    assert tokenizer.convert_ids_to_tokens([7, 19_999, 20_000]) == ["<image_7>", "<image_19999>", "<unk>"]
    assert tokenizer.convert_tokens_to_ids(["<image_7>", "<image_007>", "<image_20000>"]) == [7, 7, 20_000]
    assert tokenizer.decode([7]) == "<image_7>"


def test_vocabularies_that_are_none_are_named(source: Callable[[str], ModuleType], tmp_path: Path) -> None:
    tokenization = source("tokenization_chatglm")
    tokenizer_class = tokenization.ChatGLM6BTokenizer
    with pytest.raises(ValueError, match=f"{tmp_path} holds no `ice_text.model`"):
        tokenizer_class.from_pretrained(tmp_path)
    file = tmp_path / "ice_text.model"
    file.write_bytes(b"IQ== 0\n")
    with pytest.raises(ValueError, match=f"{file} is not `ice_text.model`"):
        tokenization.ChatGLMTokenizer.from_pretrained(tmp_path)
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 9), model_writer=model, vocab_size=7, minloglevel=2, hard_vocab_limit=False
    )
    file.write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=f"{file} has no control tokens.*current file of THUDM/chatglm-6b"):
        tokenizer_class.from_pretrained(tmp_path)


def test_the_generation_is_that_of_the_vocabulary(fresh: Callable[..., Any], vocabulary: Path) -> None:
    with pytest.raises(ValueError, match=r"ice_text.model is a vocabulary of chatglm, but .* says 'chatglm3'"):
        fresh(model_version="chatglm3")
    assert fresh(model_version="chatglm").model_version == "chatglm"
    # As chatglm2-6b's own tokenizer_config.json shows, names in files say little.
    vocabulary.with_name("config.json").write_text('{"_name_or_path": "THUDM/chatglm2-6b"}')
    assert type(fresh()).from_pretrained(vocabulary.parent).model_version == "chatglm"


# Encoding


def test_control_tokens_are_read_in_text_and_not_in_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.encode("a[MASK] b", add_special_tokens=False) == [
        *tokenizer.encode("a", add_special_tokens=False),
        MASK,
        *tokenizer.encode("b", add_special_tokens=False),
    ]
    assert tokenizer.encode("<sop><eop>", add_special_tokens=False) == [SOP, EOP]
    control = {0, 1, 2, PAD, *range(MASK, MASK + 8)}
    for text in LITERALS:
        ids = tokenizer.build_chat_input(text, [(text, text)])["input_ids"][0].tolist()
        assert [index for index in ids if index in control] == [GMASK, SOP], text
        answer = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        ids = tokenizer.encode_conversation(answer, add_generation_prompt=False)
        assert [index for index in ids if index in control] == [GMASK, SOP, EOP], text


def test_white_space_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    for length in (1, 2, 3, 79, 80, 81, 82, 160, 161, 170):
        text = f"a{' ' * length}b"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    text = "\tif a:\n    b\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    strings = ["a", "", "a longer text", "a [MASK] b"]
    rows = [tokenizer(text, return_tensors="pt") for text in strings]
    options = {"padding_side": side, "pad_to_multiple_of": 8, "return_tensors": "pt"}
    pieces = [{"input_ids": row["input_ids"][0].tolist()} for row in rows]
    tensors = [{key: value[0] for key, value in row.items()} for row in rows]
    lists = [{key: value.tolist() for key, value in row.items()} for row in tensors]
    arrays = [{key: value.numpy() for key, value in row.items()} for row in tensors]
    arrays = [{**row, "input_ids": row["input_ids"].tolist()} for row in arrays]
    for encoded in (
        tokenizer(strings, padding=True, **options),
        *(tokenizer.pad(features, **options) for features in (pieces, tensors, lists, arrays)),
    ):
        assert set(encoded) == {"input_ids", "attention_mask", "position_ids"}
        batch, length = encoded["input_ids"].shape
        assert length % 8 == 0
        assert encoded["attention_mask"].shape == (batch, 1, length, length)
        assert encoded["attention_mask"].dtype == torch.bool
        assert encoded["position_ids"].shape == (batch, 2, length)
        for index, row in enumerate(rows):
            size = row["input_ids"].shape[1]
            kept = slice(length - size, None) if side == "left" else slice(size)
            assert encoded["input_ids"][index, kept].equal(row["input_ids"][0])
            assert encoded["attention_mask"][index, :, kept, kept].equal(row["attention_mask"][0])
            assert encoded["position_ids"][index, :, kept].equal(row["position_ids"][0])
            assert (encoded["input_ids"][index] == PAD).sum() == length - size
            assert (~encoded["attention_mask"][index]).sum() == (~row["attention_mask"]).sum()
            assert encoded["position_ids"][index].sum() == row["position_ids"].sum()
    assert tokenizer.padding_side == "left"


def test_padding_knows_what_is_padding_already(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("a b")
    one = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    for mask_row, row in (([0, 0, *([1] * len(ids))], [PAD, PAD, *ids]), ([*([1] * len(ids)), 0], [*ids, PAD])):
        padded = tokenizer.pad({"input_ids": [row], "attention_mask": [mask_row]}, return_tensors="pt")
        real = torch.tensor(mask_row).bool()
        assert padded["attention_mask"][0, 0][real][:, real].equal(one["attention_mask"][0])
        assert padded["position_ids"][0][:, real].equal(one["position_ids"])
        assert padded["attention_mask"][0, 0][~real].all()
        assert padded["attention_mask"][0, 0][:, ~real].all()
        again = tokenizer.pad({key: padded[key] for key in ("input_ids", "attention_mask")}, return_tensors="pt")
        assert again["position_ids"].equal(padded["position_ids"])
        assert again["attention_mask"].equal(padded["attention_mask"])
    nothing = tokenizer.pad({"input_ids": [[PAD, PAD]], "attention_mask": [[0, 0]]}, return_tensors="pt")
    assert nothing["attention_mask"].all()


def test_every_form_of_a_call(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("ab c")
    assert ids[-2:] == [GMASK, SOP]
    assert tokenizer("ab c").keys() == {"input_ids"}
    assert tokenizer("ab c", return_attention_mask=True).keys() == {"input_ids", "attention_mask", "position_ids"}
    without = tokenizer(["ab c"], padding=True, return_attention_mask=False)
    assert without.keys() == {"input_ids", "position_ids"}
    assert isinstance(tokenizer(["ab c"], return_tensors="np")["attention_mask"], np.ndarray)
    assert tokenizer.encode("ab c", None, False) == ids[:-2]
    assert tokenizer.batch_encode_plus(["ab c"])["input_ids"] == [tokenizer.encode_plus("ab c")["input_ids"]] == [ids]
    cut = tokenizer(["ab c", "a"], max_length=3, truncation=True)
    assert cut["input_ids"] == [[ids[0], GMASK, SOP], [*tokenizer.encode("a")]]
    masks = tokenizer("ab c", "a", return_special_tokens_mask=True)
    assert [index for index, mask in zip(masks["input_ids"], masks["special_tokens_mask"]) if mask] == [
        GMASK,
        SOP,
        EOP,
    ]
    marked = [GMASK, SOP, EOP, MASK, PAD, 2]
    assert tokenizer.get_special_tokens_mask([5, *marked], already_has_special_tokens=True) == [0, *([1] * 6)]
    assert tokenizer("ab c", text_target="ab c")["labels"] == ids
    assert len(tokenizer(["ab c"] * 3, ["d"] * 3, padding=True, return_tensors="pt")["position_ids"]) == 3
    alone = tokenizer("ab c", add_special_tokens=False, return_tensors="pt")
    assert alone["position_ids"].tolist() == [[list(range(len(ids) - 2)), [0] * (len(ids) - 2)]]
    assert not alone["attention_mask"].any()
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []


def test_collators_pad_what_the_tokenizer_gives(tokenizer: PreTrainedTokenizerBase) -> None:
    features = [{**tokenizer(text), "labels": 1} for text in ("a", "a b c")]
    batch = DataCollatorWithPadding(tokenizer)(features)
    assert batch["attention_mask"].shape == (2, 1, *batch["input_ids"].shape[1:] * 2)
    assert batch["labels"].tolist() == [1, 1]


def test_decoding_takes_anything(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("ab 北京", add_special_tokens=False)
    forms = (ids, tuple(ids), torch.tensor(ids), np.array(ids), {"input_ids": ids})
    for form in (*forms, tokenizer("ab 北京", return_tensors="np")):
        assert tokenizer.decode(form) in ("ab 北京", ["ab 北京"])
    for batch in ([ids, []], torch.tensor([ids]), [torch.tensor(ids)]):
        assert tokenizer.batch_decode(batch)[0] == "ab 北京"
    assert tokenizer.decode(ids[1]) == tokenizer.decode(torch.tensor(ids[1])) == tokenizer.decode(ids[1:2])
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([len(tokenizer), 607, -100, 10**9, *ids]) == "ab 北京"
    assert tokenizer.convert_ids_to_tokens(10**6) == ""
    spaced = tokenizer.encode("a .", add_special_tokens=False)
    assert (tokenizer.decode(spaced), tokenizer.decode(spaced, clean_up_tokenization_spaces=False)) == ("a.", "a .")


def test_added_tokens(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    size = tokenizer.vocab_size
    assert tokenizer.add_tokens(["<new>"]) == 1
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<ctl>"]}) == 1
    assert (len(tokenizer), tokenizer.vocab_size) == (size + 2, size)
    ids = tokenizer.encode("a<new>b<ctl>", add_special_tokens=False)
    assert [index for index in ids if index >= size] == [size, size + 1]
    assert tokenizer.decode(ids) == "a<new>b<ctl>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<new>b"
    # In a message a new word is a word, and a new control token is text.
    message = tokenizer.encode_conversation([{"role": "user", "content": "a<new>b<ctl>"}])
    assert [index for index in message if index >= size] == [size]
    assert tokenizer.decode(message) == "a<new>b<ctl>"


def test_other_settings_of_the_text(fresh: Callable[..., Any]) -> None:
    plain, tokenizer = fresh(), fresh(do_lower_case=True, remove_space=True)
    assert tokenizer("  Hi \n THERE ")["input_ids"] == plain("hi there")["input_ids"]


def test_the_inner_tokenizer_of_published_code(tokenizer: PreTrainedTokenizerBase) -> None:
    inner = tokenizer.sp_tokenizer
    ids = inner.encode("ab\n c")
    assert ids == tokenizer.encode("ab\n c", add_special_tokens=False)
    assert inner.decode(ids) == "ab\n c"
    assert inner.tokenize("ab") == tokenizer.tokenize("ab")
    assert (inner["<eop>"], inner[EOP], inner[10**9]) == (EOP, "<eop>", "")
    assert len(inner) == inner.num_tokens == tokenizer.vocab_size


# Conversations


def test_what_the_assistant_writes(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    prompt = tokenizer.build_chat_input("two", [("one", "first")])["input_ids"][0].tolist()
    ids = encoded["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert prompt == tokenizer.encode(tokenizer.build_prompt("two", [("one", "first")]))
    # The model's answer and its end; as in the published training script, `<sop>` too. The first answer lies in the
    # context, which the model sees from both sides.
    assert encoded["assistant_masks"] == [0] * (len(prompt) - 1) + [1] * (len(ids) - len(prompt) + 1)
    assert ids[len(prompt) :] == [*tokenizer.encode("second", add_special_tokens=False), EOP]
    batch = tokenizer.apply_chat_template(
        [CHAT, CHAT[:2]], return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
    )
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    assert batch["assistant_masks"][0].tolist() == encoded["assistant_masks"]
    assert (batch["input_ids"][1] == PAD).sum() == len(ids) - len(tokenizer.encode("one", "first"))
    assert batch["input_ids"][1][-3:].tolist() == tokenizer.encode("one", "first")[-3:]


def test_an_open_answer_can_be_continued(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.apply_chat_template(CHAT, continue_final_message=True, return_dict=False) == whole[:-1]
    text = tokenizer.apply_chat_template(CHAT, continue_final_message=True, tokenize=False)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False).removesuffix("<eop>")
    with pytest.raises(ValueError, match="nothing to answer"):
        tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_context_gives_way_when_truncated(fresh: Callable[..., Any], side: str) -> None:
    tokenizer = fresh()
    tokenizer.truncation_side = side
    options = {"add_generation_prompt": True, "return_dict": False}
    whole = tokenizer.apply_chat_template(CHAT[:3], **options)
    for limit in (1, 2, 5, len(whole) - 1, len(whole), 99):
        cut = tokenizer.apply_chat_template(CHAT[:3], **options, truncation=True, max_length=limit)
        assert len(cut) == min(limit, len(whole))
        assert cut[-2:] == [GMASK, SOP][:limit]
        room = max(len(cut) - 2, 0)
        assert cut[:room] == (whole[:room] if side == "right" else whole[len(whole) - 2 - room : -2])
    no_context = tokenizer.apply_chat_template(CHAT[:1], return_dict=False, truncation=True, max_length=1)
    assert len(no_context) == 1


def test_templates_write_what_the_segments_hold(
    tokenizer: PreTrainedTokenizerBase, source: Callable[[str], ModuleType]
) -> None:
    conversation = source("conversation_chatglm")
    system = {"role": "system", "content": "s"}
    for chat in (
        CHAT[:1],
        CHAT[:2],
        CHAT[:3],
        CHAT,
        [system, *CHAT],
        [system, CHAT[0]],
        [{"role": "user", "content": " \n"}],
    ):
        for prompt in (True, False):
            if prompt and chat[-1]["role"] == "assistant":
                continue
            segments = conversation.CONVERSATION_FORMATS["chatglm"].segments(chat, prompt)
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert text == "".join(segment.text for segment in segments)
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            assert ids == tokenizer.encode_conversation(chat, prompt)
    for wrong in (CHAT[1:], [CHAT[0], CHAT[0]]):
        with pytest.raises(Exception, match="one question and one answer"):
            tokenizer.apply_chat_template(wrong, tokenize=False)
    with pytest.raises(ValueError, match="knows no tools"):
        tokenizer.apply_chat_template(CHAT[:1], tools=[{"name": "f"}])


def test_a_template_of_ones_own(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% for m in messages %}{{ m.content }}<sop>{% endfor %}"
    encoded = tokenizer.apply_chat_template(CHAT[:1], chat_template=template, return_tensors="pt")
    assert encoded["input_ids"].tolist() == [[*tokenizer.encode("one", add_special_tokens=False), SOP]]


def test_bad_arguments_are_named(tokenizer: PreTrainedTokenizerBase, case_tokenizer: Callable[[str], Any]) -> None:
    for arguments, error in [
        ({"chat_format": case_tokenizer("chatglm2").chat_format}, ValueError),
        ({"role": "observation"}, ValueError),
        ({"history": "text"}, TypeError),
        ({"query": 3}, TypeError),
    ]:
        with pytest.raises(error):
            tokenizer.build_chat_input(**{"query": "q", **arguments})
    with pytest.raises(ValueError, match="no form for a single message"):
        tokenizer.build_single_message("user", "", "a")
    with pytest.raises(ValueError, match="'<|user|>' is not a control token of chatglm"):
        tokenizer.get_command("<|user|>")


def test_threads_share_a_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    chats = [[{"role": "user", "content": f"{index} " + "text <sop>\n" * (index % 7)}] for index in range(40)]
    expected = [tokenizer.encode_conversation(chat) for chat in chats]

    def work(index: int) -> bool:
        if index % 4 == 0:
            return len(tokenizer(["a", "b " * 9], padding=True, truncation=True, max_length=9)["input_ids"]) == 2
        return tokenizer.encode_conversation(chats[index % 40]) == expected[index % 40]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(2000)))
