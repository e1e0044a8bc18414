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
"""Text, ids and conversations of the GLM-4 tokenizer.

What the published class gave is recorded on the small vocabulary of the case glm4. So every id is also compared with a
byte-pair encoding written down as plainly as its definition, on the published `tokenizer.model` too where it is at hand.
"""

import base64
import copy
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import regex
import torch
from test_tokenization_chatglm import CONTROL_TEXTS, TOOL_CHAT, WEATHER, assert_the_library_reads, texts
from tokenizers.decoders import DecodeStream
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template


pytestmark = pytest.mark.floor

PUBLISHED_SIZE = 151_329
LITERALS = ["<sop>", "<|endoftext|>", "<|begin_of_image|>", "a[MASK]b", *CONTROL_TEXTS]
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "second"},
]


class ReferenceEncoder:
    """Byte-pair encoding by its definition: the neighbours whose union has the lowest rank merge, leftmost first."""

    def __init__(self, ranks: dict[bytes, int], pattern: str) -> None:
        self.ranks = ranks
        self.pattern = regex.compile(pattern)
        self.known: dict[bytes, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return [index for piece in self.pattern.findall(text) for index in self.encode_piece(piece.encode())]

    def encode_piece(self, piece: bytes) -> list[int]:
        if piece not in self.known:
            self.known[piece] = self.merge(piece)
        return self.known[piece]

    def merge(self, piece: bytes) -> list[int]:
        if piece in self.ranks:
            return [self.ranks[piece]]
        parts = [bytes([byte]) for byte in piece]
        while True:
            unions = [first + second for first, second in zip(parts, parts[1:])]
            mergeable = [(self.ranks[union], index) for index, union in enumerate(unions) if union in self.ranks]
            if not mergeable:
                return [self.ranks[part] for part in parts]
            index = min(mergeable)[1]
            parts[index : index + 2] = [unions[index]]


def assigned(text: str) -> str:
    """Without what is no character yet: whether it will be a letter depends on the year of a program's tables."""
    return "".join(character for character in text if unicodedata.category(character) != "Cn")


def read_ranks(file: Path) -> dict[bytes, int]:
    lines = [line.split() for line in file.read_text("utf-8").splitlines()]
    return {base64.b64decode(string): int(rank) for string, rank in lines}


def write_ranks(file: Path, strings: Iterable[bytes]) -> Path:
    lines = [f"{base64.b64encode(string).decode()} {rank}\n" for rank, string in enumerate(strings)]
    file.write_text("".join(lines), "utf-8")
    return file


def random_strings(generator: random.Random, alphabet: list[bytes], size: int, longest: int) -> list[bytes]:
    """All bytes, then unions of two strings that are there already, with a few that no union gives."""
    strings = dict.fromkeys(bytes([byte]) for byte in range(256))
    pool = list(alphabet)
    while len(strings) < size:
        union = generator.choice(pool) + generator.choice(pool)
        if generator.random() < 0.02:
            union = b"".join(generator.choices(alphabet, k=generator.randint(3, 6)))
        if len(union) <= longest and union not in strings:
            strings[union] = None
            pool.append(union)
    return list(strings)


@pytest.fixture
def recorded(reference_dir: Path) -> dict[str, Any]:
    return json.loads((reference_dir / "tokenizer-glm4-synthetic" / "tokenizer_cases.json").read_text("utf-8"))


@pytest.fixture
def tokenizer(case_tokenizer: Callable[[str], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """The tokenizer of the case glm4, not to be changed."""
    return case_tokenizer("glm4")


@pytest.fixture
def fresh(case_folder: Callable[[str], Path]) -> Callable[..., PreTrainedTokenizerBase]:
    """A tokenizer of the case glm4 that the test may change."""
    return lambda **kwargs: AutoTokenizer.from_pretrained(case_folder("glm4"), trust_remote_code=True, **kwargs)


@pytest.fixture
def tokenizer_class(source: Callable[[str], ModuleType]) -> type[PreTrainedTokenizerBase]:
    return source("tokenization_chatglm").ChatGLM4Tokenizer


def text_ids(tokenizer: PreTrainedTokenizerBase, strings: list[str]) -> list[list[int]]:
    return tokenizer(strings, add_special_tokens=False, split_special_tokens=True)["input_ids"]


# The vocabulary


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.grid)])
def test_strings_equal_the_definition(
    tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any], count: int
) -> None:
    ranks = read_ranks(Path(tokenizer.vocab_file))
    encoder = ReferenceEncoder(ranks, recorded["pattern"])
    pieces = [string.decode(errors="ignore") for string in ranks]
    strings = [assigned(text) for text in texts(count, pieces)]
    strings += ["it'S ’s 'ſ 'LL", "\x85a\u2028\u3000\n b\r\n\r\n", "1234567 ⅷ٣٤٥٦ ½"]
    assert len(set(strings)) > 0.85 * count
    ids = text_ids(tokenizer, strings)
    assert [text for text, row in zip(strings, ids) if encoder.encode(text) != row] == []
    assert [
        text for text, row in zip(strings[-count // 5 :], ids[-count // 5 :]) if tokenizer.decode(row) != text
    ] == []


def test_vocabularies_with_every_kind_of_tie_equal_the_definition(
    tokenizer_class: Any, recorded: dict[str, Any], tmp_path: Path
) -> None:
    """Few letters and many strings: overlaps of one string, several splits of one, strings that no union gives."""
    generator = random.Random(0)
    for _ in range(40):
        letters = [b"a", b"b", "中".encode(), "中".encode()[:1]][: generator.randint(2, 4)]
        strings = random_strings(generator, letters, 256 + generator.randint(2, 60), longest=12)
        generator.shuffle(strings)
        file = write_ranks(tmp_path / "tokenizer.model", strings)
        tokenizer = tokenizer_class(str(file))
        encoder = ReferenceEncoder(read_ranks(file), recorded["pattern"])
        strings = ["".join(generator.choices("ab中", k=generator.randint(1, 40))) for _ in range(200)]
        assert text_ids(tokenizer, strings) == [encoder.encode(text) for text in strings]


@pytest.mark.grid
def test_a_vocabulary_of_the_published_size(tokenizer_class: Any, recorded: dict[str, Any], tmp_path: Path) -> None:
    """It loads in 1.5 s; ten times as much would be a fault."""
    generator = random.Random(0)
    letters = [bytes([byte]) for byte in b" etaoinshrdlu"] + [letter.encode() for letter in "的一是不了人我在"]
    strings = random_strings(generator, letters, PUBLISHED_SIZE, longest=24)
    file = write_ranks(tmp_path / "tokenizer.model", strings)
    start = time.process_time()
    tokenizer = tokenizer_class.from_pretrained(tmp_path)
    assert time.process_time() - start < 15
    special_ids = {token: index + PUBLISHED_SIZE - 480 for token, index in recorded["special_ids"].items()}
    assert tokenizer.special_tokens == special_ids
    assert special_ids["<|user|>"] == 151_336
    encoder = ReferenceEncoder(read_ranks(file), recorded["pattern"])
    samples = [assigned(text) for text in texts(2000, [string.decode(errors="ignore") for string in strings[256:]])]
    assert text_ids(tokenizer, samples) == [encoder.encode(text) for text in samples]


def test_the_published_vocabulary(tokenizer_class: Any, real_tokenizers: Path, recorded: dict[str, Any]) -> None:
    tokenizer = tokenizer_class.from_pretrained(real_tokenizers / "glm4")
    ranks = read_ranks(real_tokenizers / "glm4" / "tokenizer.model")
    assert len(ranks) == PUBLISHED_SIZE and tokenizer.get_command("<|endoftext|>") == PUBLISHED_SIZE
    assert tokenizer.stop_token_ids() == [151_329, 151_336, 151_338]
    encoder = ReferenceEncoder(ranks, recorded["pattern"])
    strings = [assigned(text) for text in texts(10_000, [string.decode(errors="ignore") for string in ranks])]
    ids = text_ids(tokenizer, strings)
    assert [text for text, row in zip(strings, ids) if encoder.encode(text) != row] == []
    assert [text for text, row in zip(strings, ids) if tokenizer.decode(row) != text] == []


def test_recorded_properties(tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    for name in ("vocab_size", "pad_token_id", "eos_token_id", "all_special_ids"):
        assert getattr(tokenizer, name) == recorded[name], name
    assert tokenizer.special_tokens == tokenizer.tokenizer.special_tokens == recorded["special_ids"]
    assert {token: tokenizer.get_command(token) for token in recorded["special_ids"]} == recorded["special_ids"]
    assert len(tokenizer) == len(tokenizer.get_vocab()) == tokenizer.tokenizer.n_words == recorded["vocab_size"]
    assert tokenizer.stop_token_ids() == [480, 487, 489]


def test_recorded_strings(tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    assert len(recorded["strings"]) == 198
    special = set(recorded["special_ids"])
    strings = list(read_ranks(Path(tokenizer.vocab_file)))
    for case in recorded["strings"]:
        text, ids = case["text"], case["ids"]
        # On purpose: tokens are names, as everywhere in the library; the published class had bytes.
        tokens = tokenizer.tokenize(text)
        assert tokens == tokenizer.convert_ids_to_tokens(ids)
        expected = [
            token["special"] if isinstance(token, dict) else bytes.fromhex(token) for token in case["tokens_hex"]
        ]
        assert [token if token in special else strings[index] for token, index in zip(tokens, ids)] == expected, text
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == case["ids_special"], text
        assert text_ids(tokenizer, [text]) == [case["ordinary_ids"]], text
        assert tokenizer.decode(ids) == case["decode_ids"], text
        assert tokenizer.decode(case["ids_special"]) == case["decode_special"], text
        assert tokenizer.decode(case["ids_special"], skip_special_tokens=True) == case["decode_special_skip"], text
        message = tokenizer.encode_conversation([{"role": "user", "content": text}], add_generation_prompt=False)
        assert message == [*tokenizer.encode("<|user|>\n"), *case["ordinary_ids"]], text


def test_recorded_batches_and_the_pair(tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    for case in recorded["batches"]:
        expected = {name: case[name] for name in tokenizer.model_input_names}
        assert dict(tokenizer(case["texts"], padding=True)) == expected
        assert dict(tokenizer.pad([tokenizer(text) for text in case["texts"]])) == expected
    # On purpose: the published class raises for pairs, where it looks for a token it does not have.
    assert recorded["pair"]["error"] == "AssertionError"
    first, second = recorded["pair"]["a"], recorded["pair"]["b"]
    whole = [*tokenizer.encode(first), *tokenizer.encode(second, add_special_tokens=False), 480]
    assert tokenizer(first, second)["input_ids"] == whole
    assert tokenizer("a", "")["input_ids"] == [*tokenizer.encode("a"), 480]


def test_recorded_conversations(tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any]) -> None:
    for case in recorded["conversations"]:
        query, history, role = case["query"], case["history"], case["role"]
        before = copy.deepcopy(history)
        if "error" in case:
            # On purpose: the name OpenAI gives to observations is understood.
            ids = tokenizer.build_chat_input(query, history, role="observation")["input_ids"].tolist()
            assert tokenizer.build_chat_input(query, history, role=role)["input_ids"].tolist() == ids
            continue
        encoded = tokenizer.build_chat_input(query, history, role=role)
        length = len(case["ids"])
        assert encoded["input_ids"].tolist() == [case["ids"]]
        assert encoded["attention_mask"].tolist() == [[1] * length]
        assert encoded["position_ids"].tolist() == [list(range(length))]
        assert history == before
        messages = [*history, {"role": role, "content": query}]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == case["ids"]


# Loading and saving


def same(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    assert type(first).__name__ == type(second).__name__ == "ChatGLM4Tokenizer"
    assert first.get_vocab() == second.get_vocab()
    for name in ("all_special_tokens", "model_version", "chat_template", "response_template", "padding_side"):
        assert getattr(first, name) == getattr(second, name), name
    for text in [*LITERALS, "你好 <new><ctl> x", ""]:
        assert first(text, padding="max_length", max_length=48) == second(text, padding="max_length", max_length=48)
        assert first.encode_conversation([("q", text)], False) == second.encode_conversation([("q", text)], False)
        assert first.decode(first.encode(text)) == second.decode(second.encode(text))


def test_the_published_folder_loads_without_a_word(case_folder: Callable[[str], Path]) -> None:
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "for use_fast in (True, False):\n"
        f"    t = AutoTokenizer.from_pretrained({str(case_folder('glm4'))!r}, trust_remote_code=True, use_fast=use_fast)\n"
        "    print(t.model_version, type(t).__name__, 'tiktoken' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout.splitlines() == ["glm4 ChatGLM4Tokenizer False"] * 2


@pytest.mark.parametrize("lost", ["", "tokenizer.json", "tokenizer.model"])
def test_a_saved_tokenizer_is_the_same(fresh: Callable[..., Any], tmp_path: Path, lost: str) -> None:
    tokenizer = fresh(padding_side="right", model_max_length=77)
    if lost != "tokenizer.json":
        assert tokenizer.add_tokens(["<new>", AddedToken("你好", normalized=True)]) == 2
        assert tokenizer.add_special_tokens({"additional_special_tokens": ["<ctl>"]}) == 1
    names = {Path(file).name for file in tokenizer.save_pretrained(tmp_path)}
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_version"] == "glm4"
    assert settings["auto_map"]["AutoTokenizer"] == ["tokenization_chatglm.ChatGLM4Tokenizer", None]
    assert str(tmp_path.parent) not in json.dumps(settings)
    if lost:
        (tmp_path / lost).unlink()
    same(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True), tokenizer)


def test_a_tokenizer_pickles_and_copies(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    tokenizer.add_tokens(["<new>"])
    tokenizer.build_chat_input("hi")
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        same(twin, tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "right", "remove_space": False},
        {"pad_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False,
                       "__type": "AddedToken"}, "additional_special_tokens": ["<|user|>"], "eos_token": None},
        {"image_size": 1120, "encode_special_tokens": False, "clean_up_tokenization_spaces": True, "use_fast": False,
         "chat_template": None, "extra_special_tokens": {}},
    ],
)  # fmt: skip
def test_files_of_any_version_load(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, copy_code: Callable, settings: dict[str, Any]
) -> None:
    copy_code(tmp_path)
    shutil.copyfile(tokenizer.vocab_file, tmp_path / "tokenizer.model")
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
    config = {"tokenizer_class": "ChatGLM4Tokenizer", "auto_map": auto_map}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | settings))
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.padding_side == settings.get("padding_side", "left")
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (480, 480, len(tokenizer))
    assert loaded.all_special_ids == tokenizer.all_special_ids
    for text in [*LITERALS, "Hello, 世界 ."]:
        assert loaded(text) == tokenizer(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_more_tokens_have_the_ids_of_the_file(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A code model of the family has tokens of its own behind the published ones."""
    shutil.copytree(case_folder("glm4"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["added_tokens_decoder"]["500"] = {"content": "<|code_prefix|>", "special": True}
    file.write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert tokenizer.encode("<|code_prefix|>a<|user|>", add_special_tokens=False) == [500, 64, 487]
    assert tokenizer.decode([64, 500, 499]) == "a<|code_prefix|>"
    message = tokenizer.encode_conversation([{"role": "user", "content": "<|code_prefix|>"}])
    assert 500 not in message
    tokenizer.save_pretrained(tmp_path / "saved")
    same(AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True), tokenizer)


def test_files_that_are_no_vocabulary_are_named(
    tokenizer_class: Any, source: Callable[[str], ModuleType], reference_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} holds no `tokenizer.model`"):
        tokenizer_class.from_pretrained(tmp_path)
    file = tmp_path / "tokenizer.model"
    for content in (b"IQ== 0 1\n", b"IQ== x\n", b"I!= 0\n", (reference_dir / "chatglm3" / file.name).read_bytes()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} is not the vocabulary of GLM-4"):
            tokenizer_class.from_pretrained(tmp_path)
    for content in (b"IQ== 0\nIg== 2\n", b"IQ== 0\nIg== 0\n", b"IQ== 0\nIQ== 1\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file} is not a complete list"):
            tokenizer_class.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.model is a vocabulary of glm4v or glm4, but .* says 'chatglm3'"):
        tokenizer_class.from_pretrained(reference_dir / "glm4", model_version="chatglm3")
    with pytest.raises(ValueError, match="is not the SentencePiece model"):
        source("tokenization_chatglm").ChatGLMTokenizer.from_pretrained(
            reference_dir / "glm4", model_version="chatglm3"
        )


# Encoding and decoding


def test_control_tokens_are_read_in_text_and_not_in_messages(tokenizer: PreTrainedTokenizerBase) -> None:
    control = set(tokenizer.all_special_ids)
    for token, index in tokenizer.special_tokens.items():
        assert tokenizer.encode(f"a{token}b", add_special_tokens=False)[1:-1] == [index]
        assert tokenizer.encode(f"a{token}b", split_special_tokens=True)[2:] == text_ids(tokenizer, [f"a{token}b"])[0]
        message = {"role": "assistant", "metadata": token, "content": token}
        ids = tokenizer.encode_conversation([{"role": "user", "content": token}, message])
        assert [index for index in ids if index in control] == [482, 484, 487, 488, 488]
        assert tokenizer.decode(ids) == f"[gMASK]<sop><|user|>\n{token}<|assistant|>{token}\n{token}<|assistant|>"
    assert tokenizer.build_single_message("user", "m", "<sop>") == [
        487,
        *text_ids(tokenizer, ["m\n"])[0],
        *text_ids(tokenizer, ["<sop>"])[0],
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    strings = ["a", "", "a longer text"]
    rows = [tokenizer(text) for text in strings]
    options = {"padding_side": side, "pad_to_multiple_of": 8, "return_tensors": "pt"}
    for encoded in (tokenizer(strings, padding=True, **options), tokenizer.pad(rows, **options)):
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            real = slice(-length, None) if side == "left" else slice(length)
            assert encoded["input_ids"][index, real].tolist() == row["input_ids"]
            assert encoded["position_ids"][index, real].tolist() == list(range(length))
            assert encoded["attention_mask"][index].sum() == length
            assert (encoded["input_ids"][index] == 480).sum() == encoded["input_ids"].shape[1] - length


def test_decoding_takes_anything(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("ab 北京", add_special_tokens=False)
    for form in (ids, tuple(ids), torch.tensor(ids), np.array(ids), {"input_ids": ids}):
        assert tokenizer.decode(form) == "ab 北京"
    assert tokenizer.batch_decode([ids, []]) == ["ab 北京", ""]
    assert tokenizer.decode(64) == tokenizer.decode([64]) == "a"
    assert tokenizer.decode([494, 511, -100, 10**9, 64]) == "a"
    assert tokenizer.convert_ids_to_tokens(10**6) == ""
    single = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.convert_ids_to_tokens(list(range(480)))]
    assert single == list(range(480))
    smile = text_ids(tokenizer, ["😀"])[0]
    assert [tokenizer.decode(smile[:end]) for end in range(len(smile) + 1)][-2:] == ["�", "😀"]
    assert tokenizer.decode([*smile[:1], 487, *smile]) == "�<|user|>😀"


def test_the_rust_decoder_streams(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "你好，show me  two 😀"
    stream = DecodeStream([], skip_special_tokens=True)
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert "".join(stream.step(tokenizer._tokenizer, index) or "" for index in ids) == text


def test_added_tokens(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    assert tokenizer.add_tokens(["<new>", "<sop>"]) == 1
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<ctl>"]}) == 1
    ids = tokenizer.encode("a<new><ctl><|user|>", add_special_tokens=False)
    assert ids == [64, 494, 495, 487]
    assert tokenizer.decode(ids) == "a<new><ctl><|user|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<new>"
    message = tokenizer.encode_conversation([{"role": "user", "content": "a<new><ctl>"}])
    assert 494 in message
    assert 495 not in message


# Conversations


def test_tools_in_either_form(tokenizer: PreTrainedTokenizerBase, source: Callable[[str], ModuleType]) -> None:
    conversation = source("conversation_chatglm")
    section = (
        f"\n\n## get_weather\n\n{json.dumps(WEATHER, indent=4, ensure_ascii=False)}"
        "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    )
    user = {"role": "user", "content": "q"}
    native = tokenizer.build_chat_input("q", [{"role": "system", "content": "s", "tools": [WEATHER]}])
    assert tokenizer.decode(native["input_ids"]) == [f"[gMASK]<sop><|system|>\ns{section}<|user|>\nq<|assistant|>"]
    for tools in ([WEATHER], [{"type": "function", "function": WEATHER}]):
        for chat, system in (
            ([user], conversation.GLM4_TOOLS_PROMPT),
            ([{"role": "system", "content": "s"}, user], "s"),
        ):
            expected = f"[gMASK]<sop><|system|>\n{system}\n\n# 可用工具{section}<|user|>\nq<|assistant|>"
            options = {"tools": tools, "add_generation_prompt": True}
            assert tokenizer.apply_chat_template(chat, tokenize=False, **options) == expected
            ids = tokenizer.apply_chat_template(chat, **options)["input_ids"]
            assert tokenizer.decode(ids) == expected
            # Other programs render the template with the messages as they come.
            (rendered,), _ = render_jinja_template([chat], chat_template=tokenizer.chat_template, **options)
            assert rendered == expected
    with pytest.raises(ValueError, match="writes the name of a tool"):
        tokenizer.apply_chat_template([user], tools=[{"parameters": {}}])


def test_built_in_tools_in_either_form(
    tokenizer: PreTrainedTokenizerBase, source: Callable[[str], ModuleType]
) -> None:
    texts = source("conversation_templates").GLM4_BUILTIN_TOOLS
    kinds = [{"type": kind} for kind in texts]
    call = {"function": {"name": "python", "arguments": "print(1)"}}
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1\n"},
    ]
    for tools in (kinds, [*kinds, {"type": "function", "function": WEATHER}], [WEATHER, kinds[1]]):
        options = {"tools": tools, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
        for kind in [tool["type"] for tool in tools if tool.get("type") in texts]:
            assert f"\n\n## {kind}\n\n{texts[kind]}" in text
        assert tokenizer.decode(tokenizer.apply_chat_template(chat, **options)["input_ids"]) == text
        assert text.endswith("<|user|>\nq<|assistant|>python\nprint(1)<|observation|>\n1\n<|assistant|>")
        (rendered,), _ = render_jinja_template([chat], chat_template=tokenizer.chat_template, **options)
        assert rendered == text
    with pytest.raises(ValueError, match="'retrieval'"):
        tokenizer.apply_chat_template(chat, tools=[{"type": "retrieval"}])


def test_templates_write_what_the_segments_hold(
    tokenizer: PreTrainedTokenizerBase, source: Callable[[str], ModuleType]
) -> None:
    conversation = source("conversation_chatglm")
    chats = [
        CHAT[1:2],
        [{"role": "system", "content": "s", "tools": {"get_weather": WEATHER, "二": {"name": "二"}}}],
        [
            {
                "role": "system",
                "content": "s",
                "tools": [{"type": "cogview"}, {"type": "function", "function": WEATHER}, {"type": "python"}],
            }
        ],
        *(CHAT[:1], CHAT[:2], CHAT, TOOL_CHAT),
        [{"role": "system", "content": "s"}, {"role": "user", "content": "<|user|>\n\n "}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "metadata": "m", "content": "a"}] * 2,
        [
            {"role": "system", "content": "s", "tools": [WEATHER, {"name": "二"}]},
            {"role": "observation", "content": "o"},
        ],
        [{"role": "system", "content": "s", "tools": []}],
    ]
    for chat in chats:
        for prompt in (True, False):
            messages = conversation.CONVERSATION_FORMATS["glm4"].normalize_messages(chat)
            segments = conversation.CONVERSATION_FORMATS["glm4"].segments(messages, prompt)
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert text.replace("\u2060", "") == "[gMASK]<sop>" + "".join(segment.text for segment in segments)
            (rendered,), _ = render_jinja_template(
                [chat], chat_template=tokenizer.chat_template, add_generation_prompt=prompt
            )
            assert rendered == text
    alone = tokenizer.apply_chat_template(CHAT[1:2], return_dict=False)
    assert alone[2:] == tokenizer.encode("<|assistant|>\nfirst", add_special_tokens=False)
    assert tokenizer.apply_chat_template(CHAT[1:2], continue_final_message=True, return_dict=False) == alone


def test_message_by_message_is_the_whole_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    """As the official fine-tuning encodes: each message on its own, and one closing token behind the last."""
    system = {"role": "system", "content": "s", "tools": [{"type": "python"}, WEATHER]}
    observed = [{"role": "observation", "content": "o"}, {"role": "assistant", "content": "end"}]
    for chat in (CHAT[:2], CHAT, [system, *CHAT], [system, CHAT[0], *TOOL_CHAT[2:3], *observed]):
        pieces = [tokenizer.apply_chat_template([message], return_dict=False) for message in chat]
        assert all(ids[:2] == tokenizer.get_prefix_tokens() for ids in pieces)
        whole = sum((ids[2:] for ids in pieces), tokenizer.get_prefix_tokens())
        closed = [*whole, tokenizer.get_command("<|user|>")]
        assert tokenizer.apply_chat_template(chat, return_dict=False) == closed


def test_the_opening_may_be_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """By an argument of the published class."""
    opening, batch = tokenizer.get_prefix_tokens(), [CHAT, CHAT[:1]]
    for chat in batch:
        ids, text = (tokenizer.apply_chat_template(chat, tokenize=asked, return_dict=False) for asked in (True, False))
        settings = {"add_special_tokens": False, "return_dict": False}
        assert opening + tokenizer.apply_chat_template(chat, **settings) == ids
        assert "[gMASK]<sop>" + tokenizer.apply_chat_template(chat, tokenize=False, **settings) == text
    for tokenize in (True, False):
        rows = tokenizer.apply_chat_template(batch, tokenize=tokenize, **settings)
        assert rows == [tokenizer.apply_chat_template(chat, tokenize=tokenize, **settings) for chat in batch]


def test_a_tokenizer_that_splits_special_tokens_reads_no_conversation(
    case_folder: Callable[[str], Path], tokenizer: PreTrainedTokenizerBase
) -> None:
    splitting = AutoTokenizer.from_pretrained(case_folder("glm4"), trust_remote_code=True, split_special_tokens=True)
    text = "[gMASK]<sop><|user|>\na"
    assert splitting.encode(text, add_special_tokens=False) == splitting.tokenizer.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False)[:2] == tokenizer.get_prefix_tokens()


def test_the_mask_of_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True)
    answers = [index for index, mask in zip(encoded["input_ids"], encoded["assistant_masks"]) if mask]
    assert tokenizer.decode(answers) == "\nfirst<|user|>\nsecond<|user|>"
    batch = tokenizer.apply_chat_template(
        [CHAT, CHAT[:2]], return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
    )
    assert batch["assistant_masks"][0].tolist() == encoded["assistant_masks"]
    assert batch["assistant_masks"][1].sum() == len(tokenizer.encode("\nfirst")) - 1
    open_answer = tokenizer.apply_chat_template(CHAT, continue_final_message=True, return_dict=False)
    assert open_answer == encoded["input_ids"][:-1]
    left = copy.deepcopy(tokenizer)
    left.truncation_side = "left"
    cut = left.apply_chat_template(CHAT, truncation=True, max_length=6, return_dict=False)
    assert cut == [482, 484, *encoded["input_ids"][-4:]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("\n 你好。\n再见", {"content": "你好。\n再见"}),
        ("你好\n再见{}", {"content": "你好\n再见{}"}),
        ('get_weather\n{"city": "北\\"京}", "n": -1.5e3, "deep": [1, {"k": "]"}], "m": {"a": {}}, "t": true, "z": null}',
         {"tool_calls": [{"city": '北"京}', "n": -1500.0, "deep": [1, {"k": "]"}], "m": {"a": {}}, "t": True, "z": None}]}),
        ("get_weather\n{}<|observation|>", {"tool_calls": [{}]}),
        (
            '\n我查。<|assistant|>get_weather\n{"c": "a"}<|assistant|>get_weather\n{\n  "c": "b"\n}\n<|observation|>',
            {"content": "我查。", "tool_calls": [{"c": "a"}, {"c": "b"}]},
        ),
    ],
)  # fmt: skip
def test_the_library_reads_answers(tokenizer: PreTrainedTokenizerBase, answer: str, message: dict[str, Any]) -> None:
    assert_the_library_reads(tokenizer, answer, message)


def test_threads_share_a_tokenizer(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh()
    chats = [[{"role": "user", "content": f"{index} " + "text <|user|> " * (index % 7)}] for index in range(40)]
    expected = [tokenizer.encode_conversation(chat) for chat in chats]

    def work(index: int) -> bool:
        if index % 4 == 0:
            # Sets padding, truncation and the reading of special tokens on the Rust tokenizer.
            tokenizer(
                ["<|user|> a", "b " * 30], padding=True, truncation=True, max_length=9, split_special_tokens=True
            )
            return True
        return tokenizer.encode_conversation(chats[index % 40]) == expected[index % 40]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(4000)))


def test_a_long_text_takes_no_longer_than_it_should(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "你好 hello\n" * 30_000
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
