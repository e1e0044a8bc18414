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
"""Plain texts have the ids that the library's way gives, and encodings when they are asked for."""

import copy
import json
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generations import GENERATION_CASES
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import PaddingStrategy


pytestmark = pytest.mark.floor

RUST_CASES = [name for name in GENERATION_CASES if name != "chatglm1"]
PARTS = [
    *("'s", "'LL", "a", "Z", "word", "中", "文字", "あ", "ア", "é", "ñandú", "١", "²", "〇", "ſ", "\u2028", "\ufeff"),
    *("，", "。", "“", "…", "·", "！", "!", "(", '"', "_", "://", "1", "23", "4567"),
    *("\n", "\r\n", "\r", "\t", " ", "  ", "\u3000", "\xa0", "\x0b", "\x1c", "\x00", "\n\n", " \n", "\n "),
    *("<|user|>", "[MASK]", "[gMASK]", "<sop>", "sop", "eop", "</s>", "<new>", "龘龘", "😀"),
]


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return ["", *("".join(generator.choices(PARTS, k=generator.randint(1, 14))) for _ in range(count))]


def encode_by_the_library(tokenizer: PreTrainedTokenizerBase, text: Any, **kwargs: Any) -> BatchEncoding:
    """What the library's class makes of a text, whose method is behind those of this repository."""
    (library,) = (cls for cls in type(tokenizer).__mro__ if cls.__name__ in ("TokenizersBackend", "PythonBackend"))
    return library._encode_plus(tokenizer, text, **kwargs)


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_ids_are_those_of_the_library(case_folder: Callable[[str], Path], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True)
    strings = random_texts(300)
    for added in ([], ["<new>", "龘龘"], [f"<{index}>" for index in range(120)]):
        tokenizer.add_tokens(added)
        for settings in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
            settings = {"split_special_tokens": tokenizer.split_special_tokens, **settings}
            expected = encode_by_the_library(tokenizer, strings, return_attention_mask=False, **settings)["input_ids"]
            assert tokenizer(strings, **settings)["input_ids"] == expected
            assert [tokenizer(text, **settings)["input_ids"] for text in strings[:100]] == expected[:100]
        for text in (*strings[:50], strings[:50]):
            # Settings take the longer way.
            assert dict(tokenizer(text)) == dict(tokenizer(text, verbose=True))


@pytest.mark.parametrize("is_installed", [pytest.param(True, marks=pytest.mark.programs), False])
def test_long_use_gives_the_same_ids(
    case_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    if is_installed:
        pytest.importorskip("tiktoken", reason="needs requirements/programs.txt: make test-programs")
    else:
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = AutoTokenizer.from_pretrained(case_folder("glm4"), trust_remote_code=True)
    encoder = tokenizer._make_texts_encoder()
    module = sys.modules[type(encoder).__module__]
    monkeypatch.setattr(module, "PART_CHARACTERS", 4)
    strings = [*random_texts(600), *("a" * 9, "a " * 9, "\n 中" * 9, "é\u0301" * 9)]
    assert any(len(list(module.cut_into_parts(text))) > 2 for text in strings)
    expected = module.RustEncoder(tokenizer._text_tokenizer())(strings)
    assert encoder(strings) == expected
    monkeypatch.setattr(module, "WORTHWHILE_CHARACTERS", 10)
    assert encoder(strings) == expected
    assert (encoder._encoding is not None) == is_installed


@pytest.mark.parametrize("name", RUST_CASES)
def test_messages_are_encoded_as_with_offsets(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    for text in random_texts(300):
        assert tokenizer._message_ids(text) == tokenizer._message_encoding(text)[0]


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_columns_are_those_of_the_library(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    strings = ["你好", "", "hello world, a longer one", "x"]
    for settings, strategy in (
        ({"padding": True}, PaddingStrategy.LONGEST),
        ({"padding": "max_length", "max_length": 40}, PaddingStrategy.MAX_LENGTH),
        ({"padding": True, "pad_to_multiple_of": 16, "padding_side": "right"}, PaddingStrategy.LONGEST),
        ({"padding": True, "return_tensors": "pt"}, PaddingStrategy.LONGEST),
    ):
        rest = {key: value for key, value in settings.items() if key != "padding"}
        is_plain = name != "chatglm1"
        expected = encode_by_the_library(
            tokenizer, strings, padding_strategy=strategy, return_attention_mask=None if is_plain else True, **rest
        )
        encoded = tokenizer(strings, **settings)
        assert list(encoded)[:2] == list(expected)[:2] == ["input_ids", "attention_mask"]
        assert "position_ids" in encoded
        for column in expected:
            assert repr(encoded[column]) == repr(expected[column])


@pytest.mark.parametrize("name", RUST_CASES)
def test_encodings_are_made_when_asked_for(
    case_folder: Callable[[str], Path], source: Callable[[str], ModuleType], name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True)
    encoded = tokenizer(["你好 hello", "x"], padding=True)
    expected = tokenizer(["你好 hello", "x"], padding=True, return_offsets_mapping=True)
    assert encoded.is_fast
    assert encoded._made_encodings is None
    assert encoded.char_to_token(0, 3) == expected.char_to_token(0, 3) is not None
    assert [encoding.offsets for encoding in encoded.encodings] == expected["offset_mapping"]
    assert encoded.tokens(1) == expected.tokens(1)
    unpickled = pickle.loads(pickle.dumps(encoded))
    assert type(unpickled) is BatchEncoding
    for twin in (unpickled, copy.deepcopy(encoded), copy.copy(tokenizer(["你好 hello", "x"], padding=True))):
        assert dict(twin) == dict(encoded)
        assert twin.word_ids(0) == expected.word_ids(0)
    single = tokenizer("你好 hello")
    tokenizer.add_tokens(["你好 h"])
    with pytest.raises(ValueError, match="encode the text again"):
        single.char_to_token(0)


@pytest.mark.parametrize("name", RUST_CASES)
def test_added_tokens_are_read_without_the_vocabulary(
    case_folder: Callable[[str], Path],
    source: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True)
    tokenizer.add_tokens([f"<new {index}>" for index in range(800)])
    tokenizer.save_pretrained(tmp_path)
    read, load = [], json.load

    def load_and_tell(file: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(Path(file.name).name)
        return load(file, *args, **kwargs)

    monkeypatch.setattr(json, "load", load_and_tell)
    twin = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert "tokenizer_config.json" in read
    assert "tokenizer.json" not in read
    assert twin.added_tokens_decoder == tokenizer.added_tokens_decoder
    assert twin("<new 7> x<new 799>")["input_ids"] == tokenizer("<new 7> x<new 799>")["input_ids"]

    read_added_tokens = source("tokenization_vocabulary").read_added_tokens
    written = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    assert read_added_tokens(tmp_path / "tokenizer.json") == {token.pop("id"): token for token in written}
    Tokenizer.from_file(str(tmp_path / "tokenizer.json")).save(str(tmp_path / "compact.json"), pretty=False)
    assert len(read_added_tokens(tmp_path / "compact.json")) == len(written)
    for text in ("", "{}", '{"version": "1.0", "model": {}}', '{"version": "1.0", "added_tokens": [{"id": 1'):
        (tmp_path / "other.json").write_text(text, "utf-8")
        assert read_added_tokens(tmp_path / "other.json") is None
