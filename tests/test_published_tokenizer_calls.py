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
"""Calls on a tokenizer that the official programs and their users make, as they make them."""

import base64
import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generations import GENERATION_CASES, ROLE_CASES
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerBase


# What runs on the Rust backend, and what of that is made from a SentencePiece model.
RUST_CASES = ["chatglm2", "chatglm3", "glm4"]
SENTENCEPIECE_CASES = ["chatglm2", "chatglm3"]
TEXT = "ab 北京 show me"


@pytest.fixture
def fresh(case_folder: Callable[[str], Path]) -> Callable[..., PreTrainedTokenizerBase]:
    """A tokenizer that the test may change: `fresh("chatglm3", **arguments of from_pretrained)`."""
    return lambda name, **kwargs: AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True, **kwargs)


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def listed(encoded: Any) -> dict[str, Any]:
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in encoded.items()}


# Ids in the place of text


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_ready_ids_are_encoded_as_their_text(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    ids, others = plain(tokenizer, TEXT), plain(tokenizer, "b")
    settings = {"return_tensors": "pt", "is_split_into_words": True}
    text = listed(tokenizer([TEXT], return_tensors="pt"))
    assert listed(tokenizer.batch_encode_plus([ids], **settings)) == text
    assert listed(tokenizer.batch_encode_plus([tuple(ids)], **settings)) == text
    assert listed(tokenizer.encode_plus(ids, return_tensors="pt")) == text
    assert tokenizer.encode(ids) == tokenizer.encode(TEXT)
    assert tokenizer.encode(ids, add_special_tokens=False) == ids
    padded = listed(tokenizer([TEXT, "b"], padding=True, return_tensors="pt"))
    assert listed(tokenizer.batch_encode_plus([ids, others], padding=True, **settings)) == padded
    assert listed(tokenizer([ids, others], padding=True, return_tensors="pt")) == padded
    assert tokenizer([ids, others])["input_ids"] == tokenizer([TEXT, "b"])["input_ids"]
    pair = tokenizer.encode(TEXT, "b")
    assert tokenizer.encode_plus(ids, others)["input_ids"] == pair
    assert tokenizer.prepare_for_model(ids, others)["input_ids"] == pair
    assert tokenizer.batch_encode_plus([(ids, others)], is_split_into_words=True)["input_ids"] == [pair]
    extras = ("token_type_ids", "special_tokens_mask", "length")
    for names in (extras, ()):
        asked = {f"return_{name}": name in names for name in extras}
        for encoded, expected in (
            (tokenizer([ids, others], padding=True, **asked), tokenizer([TEXT, "b"], padding=True, **asked)),
            (tokenizer(ids, others, **asked), tokenizer(TEXT, "b", **asked)),
        ):
            assert encoded.keys() == expected.keys()
            # Of one text the library's Rust-backed tokenizers give the length as a list.
            lengths = ("length",) if names and isinstance(expected["input_ids"][0], list) else ()
            for column in ("input_ids", *names[:2], *lengths):
                assert encoded[column] == expected[column]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", GENERATION_CASES)
def test_ready_ids_are_truncated_as_their_text(fresh: Callable[..., Any], name: str, side: str) -> None:
    tokenizer = fresh(name, truncation_side=side)
    ids, others = plain(tokenizer, TEXT), plain(tokenizer, "b 北京")
    for strategy in (True, "only_first", "longest_first"):
        settings = {"truncation": strategy, "max_length": 6}
        assert tokenizer(ids, **settings)["input_ids"] == tokenizer(TEXT, **settings)["input_ids"]
        if strategy == "only_first":
            continue
        cut = tokenizer.encode(ids, others, **settings)
        assert len(cut) == 6
        assert cut == tokenizer.encode(TEXT, "b 北京", **settings)
    kept = {"truncation": "only_second", "max_length": len(ids) + 4}
    assert tokenizer.encode(ids, others, **kept) == tokenizer.encode(TEXT, "b 北京", **kept)
    assert tokenizer.encode(ids, truncation=False) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("name", RUST_CASES)
def test_ids_with_a_target_are_refused(case_tokenizer: Callable[[str], Any], name: str) -> None:
    with pytest.raises(ValueError, match="encode the target on its own"):
        case_tokenizer(name)([5, 6], text_target="b")
    with pytest.raises(ValueError, match="cannot make the other text fit in 3 tokens"):
        case_tokenizer(name).encode([5], [5, 6, 7, 8], truncation="only_first", max_length=6)
    with pytest.raises(TypeError, match="no_such_argument"):
        case_tokenizer(name).batch_encode_plus([[5, 6]], no_such_argument=1)
    # Neither text nor ids; the library says so.
    with pytest.raises((ValueError, TypeError)):
        case_tokenizer(name)([[5, "a"], ["b"]])


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_special_tokens_around_ids(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    ids, others = plain(tokenizer, TEXT), plain(tokenizer, "b")
    assert tokenizer.build_inputs_with_special_tokens(ids) == tokenizer.encode(TEXT)
    assert tokenizer.build_inputs_with_special_tokens(ids, others) == tokenizer.encode(TEXT, "b")
    for texts, given in (((TEXT,), (ids,)), ((TEXT, "b"), (ids, others))):
        encoded = tokenizer(*texts, return_special_tokens_mask=True)
        assert tokenizer.get_special_tokens_mask(*given) == encoded["special_tokens_mask"]
    marked = tokenizer.get_special_tokens_mask(tokenizer.encode(TEXT), already_has_special_tokens=True)
    assert marked == tokenizer.get_special_tokens_mask(ids)


@pytest.mark.parametrize("name", RUST_CASES)
def test_prefix_tokens(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    assert tokenizer.get_prefix_tokens() == tokenizer.encode("")
    assert tokenizer.get_prefix_tokens()[0] == tokenizer.get_command("[gMASK]")


@pytest.mark.parametrize("name", ROLE_CASES)
def test_a_conversation_put_together_by_hand(case_tokenizer: Callable[[str], Any], name: str) -> None:
    """As the official programs make `build_chat_input` of single messages."""
    tokenizer = case_tokenizer(name)
    history = [{"role": "system", "content": "s"}, {"role": "assistant", "metadata": "f", "content": "c"}]
    ids = tokenizer.build_single_message("system", "", "s") + tokenizer.build_single_message("assistant", "f", "c")
    ids += tokenizer.build_single_message("observation", "", "o") + [tokenizer.get_command("<|assistant|>")]
    by_hand = tokenizer.batch_encode_plus([ids], return_tensors="pt", is_split_into_words=True)
    assert listed(by_hand) == listed(tokenizer.build_chat_input("o", history, "observation"))
    assert tokenizer.build_single_message("user", "", "q", False) == "<|user|>\nq"
    head, content = tokenizer.build_single_message("user", "", ""), tokenizer.tokenizer.encode("q")
    assert tokenizer.build_single_message("user", "", "q", True, [7, 8]) == [
        *head[: len(tokenizer.build_single_message("user", "", "q")) - len(content)],
        *(7, 8),
        *content,
    ]
    with pytest.raises(ValueError, match="nobody"):
        tokenizer.build_single_message("nobody", "", "q")


# The inner tokenizer


@pytest.mark.parametrize("name", SENTENCEPIECE_CASES)
def test_the_inner_tokenizer_over_sentencepiece(fresh: Callable[..., Any], name: str) -> None:
    tokenizer = fresh(name)
    assert tokenizer._sentencepiece_model is None
    inner = tokenizer.tokenizer
    model = inner.sp_model
    assert isinstance(model, SentencePieceProcessor)
    assert inner.sp_model is tokenizer.tokenizer.sp_model is model
    assert (inner.bos_id, inner.eos_id, inner.pad_id) == (model.bos_id(), model.eos_id(), model.unk_id())
    assert inner.n_words == len(inner) == model.vocab_size() + len(inner.index_special_tokens)
    # What a program sets there is set.
    inner.padding_side = "right"
    assert tokenizer.padding_side == "right"
    assert inner.encode(TEXT) == model.encode(TEXT)
    assert inner.encode(TEXT, bos=True, eos=True) == [1, *model.encode(TEXT), 2]
    assert inner.decode(model.encode(TEXT)) == inner.decode_tokens(inner.tokenize(TEXT)) == TEXT
    for index in (0, 5, 300, inner.n_words - 1):
        assert inner.convert_token_to_id(inner.convert_id_to_token(index)) == index
    assert inner.convert_id_to_token(10**6) == ""
    assert inner.convert_token_to_id("no such piece") == model.unk_id()
    for token, index in inner.special_tokens.items():
        assert inner.index_special_tokens.get(index) == (token if index > 2 else None)
        assert tokenizer.get_command(token) == index


def test_the_inner_tokenizer_over_ranks(case_tokenizer: Callable[[str], Any], reference_dir: Path) -> None:
    tokenizer = case_tokenizer("glm4")
    inner = tokenizer.tokenizer
    assert inner.n_vocab == inner.n_words == tokenizer.vocab_size
    # It knows no control tokens, as published.
    text = "a<|user|>\n"
    ids = inner.encode(text, disallowed_special=())
    assert ids == inner.encode_ordinary(text) == inner.encode(text, allowed_special="all")
    assert tokenizer.get_command("<|user|>") not in ids
    assert inner.decode(ids) == text
    lines = (reference_dir / "glm4" / "tokenizer.model").read_bytes().split()
    published = {base64.b64decode(string): int(rank) for string, rank in zip(lines[::2], lines[1::2])}
    assert list(tokenizer.mergeable_ranks.items()) == sorted(published.items(), key=lambda item: item[1])


def test_the_sentencepiece_model_is_no_state(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh("chatglm3")
    before = pickle.dumps(tokenizer)
    tokenizer.tokenizer.sp_model  # noqa: B018
    assert pickle.dumps(tokenizer) == before
    for twin in (pickle.loads(before), copy.deepcopy(tokenizer)):
        assert twin.tokenizer.sp_model.encode(TEXT) == tokenizer.tokenizer.encode(TEXT)


def test_a_lost_vocabulary_file_is_named(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(case_folder("chatglm3"), folder, ignore=shutil.ignore_patterns("*.bin", "__pycache__"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(
        ValueError, match=r"`sp_model` is read from `tokenizer.model`, and .*tokenizer.model is no such"
    ):
        tokenizer.tokenizer.sp_model  # noqa: B018
    assert tokenizer.tokenizer.encode(TEXT) == plain(tokenizer, TEXT)


@pytest.mark.parametrize("name", SENTENCEPIECE_CASES)
def test_a_converter_reads_every_id(case_tokenizer: Callable[[str], Any], name: str) -> None:
    """As converters to other engines' files do, up to the padded size of the embedding."""
    tokenizer = case_tokenizer(name)
    model = tokenizer.tokenizer.sp_model
    controls = {"[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>"}
    kinds = []
    for index in range(512):
        piece = tokenizer._convert_id_to_token(index)
        if index < model.vocab_size():
            assert model.id_to_piece(index) == piece
        else:
            kinds.append("control" if piece in controls else piece)
    assert kinds.count("control") == len(controls & {*tokenizer.special_tokens})
    assert kinds[-1] == ""
    assert max(tokenizer.get_vocab().values()) < 512
    assert tokenizer._convert_token_to_id("[gMASK]") == tokenizer.get_command("[gMASK]")


# The trainer mode, set later


def test_the_trainer_mode_may_be_set_after_loading(fresh: Callable[..., Any], tmp_path: Path) -> None:
    text = "<|user|>\nab[gMASK]<new><|assistant|>"
    tokenizer, loaded = fresh("chatglm3"), fresh("chatglm3", encode_special_tokens=True)
    for one in (tokenizer, loaded):
        one.add_tokens(["<new>"])
    expected, literal, message = plain(loaded, text), plain(tokenizer, text), tokenizer.build_chat_input(text)
    tokenizer.encode_special_tokens = True
    assert plain(tokenizer, text) == expected != literal
    assert tokenizer(text)["input_ids"] == loaded(text)["input_ids"]
    assert tokenizer.tokenize(text) == loaded.tokenize(text)
    # What is in a message is text as before.
    assert listed(tokenizer.build_chat_input(text)) == listed(message)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    for twin in (again, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin.encode_special_tokens is True
        assert plain(twin, text) == expected
    tokenizer.encode_special_tokens = False
    assert plain(tokenizer, text) == literal


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "glm4"])
def test_other_generations_have_no_trainer_mode(fresh: Callable[..., Any], name: str) -> None:
    """They read all or none of their control tokens in text, so the setting changes nothing."""
    tokenizer = fresh(name)
    text = "a<|user|><sop>[gMASK]"
    expected = listed(tokenizer(text))
    tokenizer.encode_special_tokens = True
    assert listed(tokenizer(text)) == expected


# Names of special tokens


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_special_tokens_are_named_when_asked_for(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    eos = tokenizer.eos_token_id
    assert tokenizer.decode([eos], skip_special_tokens=False) == tokenizer.decode(eos, False) == tokenizer.eos_token
    assert tokenizer.decode([eos], skip_special_tokens=True) == ""
    assert tokenizer.batch_decode([[eos], []], skip_special_tokens=False) == [tokenizer.eos_token, ""]
    assert tokenizer.batch_decode([[eos]]) == [tokenizer.decode([eos])]
    tokens = [token for token in tokenizer.special_tokens if token not in tokenizer.vocabulary.command_aliases]
    ids = tokenizer.convert_tokens_to_ids([*tokens, *tokenizer.vocabulary.named_tokens.values()])
    names = "".join([*tokens, *tokenizer.vocabulary.named_tokens.values()])
    assert tokenizer.decode(ids, skip_special_tokens=False) == names
    assert tokenizer.decode([*plain(tokenizer, "ab"), eos], skip_special_tokens=False) == f"ab{tokenizer.eos_token}"


# What the official training scripts do


def test_the_training_script_of_chatglm_6b(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm1")
    a_ids = tokenizer.encode(text="ab 北京", add_special_tokens=False)[:3]
    b_ids = tokenizer.encode(text="show", add_special_tokens=False)[:3]
    input_ids = tokenizer.build_inputs_with_special_tokens(a_ids, b_ids)
    context_length = input_ids.index(tokenizer.bos_token_id)
    assert input_ids[context_length - 1] == tokenizer.gmask_token_id
    assert input_ids == [*a_ids, tokenizer.gmask_token_id, tokenizer.bos_token_id, *b_ids, tokenizer.eos_token_id]
    padded = input_ids + [tokenizer.pad_token_id] * 2
    assert tokenizer.decode(padded, skip_special_tokens=True) == tokenizer.decode([*a_ids, *b_ids])
    encoded = tokenizer(["ab", "show me"], max_length=4, truncation=True, padding=True)
    assert [len(row) for row in encoded["input_ids"]] == [4, 4]
    assert [row[-2:] for row in encoded["input_ids"]] == [[tokenizer.gmask_token_id, tokenizer.bos_token_id]] * 2
    assert tokenizer(text_target=["ab"], max_length=4, truncation=True)["input_ids"] == [tokenizer.encode("ab")]
    assert tokenizer.mask_token_id == tokenizer.get_command("[MASK]")


def test_the_training_script_of_chatglm2(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm2")
    prompt = tokenizer.build_prompt("ab", [("q", "a")])
    a_ids = tokenizer.encode(text=prompt, add_special_tokens=True, truncation=True, max_length=64)
    b_ids = tokenizer.encode(text="show", add_special_tokens=False, truncation=True, max_length=2)
    assert a_ids == tokenizer.build_chat_input("ab", [("q", "a")])["input_ids"][0].tolist()
    assert b_ids == plain(tokenizer, "show")[:2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (tokenizer.get_command("<eos>"), 0)


@pytest.mark.parametrize("name", ROLE_CASES)
def test_the_training_scripts_of_roles(fresh: Callable[..., Any], name: str) -> None:
    tokenizer = fresh(name)
    tokenizer.padding_side = "left"
    ids = [tokenizer.get_command(token) for token in tokenizer.chat_format.opening_tokens]
    for role, content in (("user", "ab"), ("assistant", "show")):
        ids += tokenizer.build_single_message(role, "", content)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "show"}]
    assert ids == tokenizer.encode_conversation(chat, add_generation_prompt=False)[: len(ids)]
    assert tokenizer.get_command("<|user|>") == tokenizer.convert_tokens_to_ids("<|user|>") in ids
    padded = tokenizer.pad({"input_ids": [ids, ids[:4]]}, padding="max_length", max_length=32)
    assert padded["input_ids"][1] == [tokenizer.pad_token_id] * 28 + ids[:4]
