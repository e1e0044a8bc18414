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
"""Text, ids and conversations of the ChatGLM2 and ChatGLM3 tokenizer, and the recorded runs of every generation.

What the published classes gave is recorded on the published `tokenizer.model`, which this repository does not hold;
the tests that need it take the fixture `real_tokenizers`. The same code runs on small synthetic vocabularies here.
"""

import copy
import json
import pickle
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from generations import FLOAT_CASES, RECORDED
from sentencepiece import SentencePieceProcessor
from tokenizers.decoders import DecodeStream
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_template_utils import render_jinja_template


pytestmark = pytest.mark.floor

VERSIONS = ["chatglm2", "chatglm3"]
WEATHER = {"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}
TOOL_CHAT = [
    {"role": "system", "content": "帮忙。"},
    {"role": "user", "content": "北京今天多少度？"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"c": "北'京", "n": [1]}}}]},
    {"role": "tool", "content": '{"t": 12}'},
    {"role": "assistant", "content": "12 度。\n再见"},
]  # fmt: skip
CONTROL_TEXTS = [
    "<|user|>",
    "[gMASK]",
    "sop",
    "</s>",
    "<unk>",
    "<s>",
    "<|assistant|>\n",
    "a<|observation|>b",
    "<0x41>",
]


@pytest.fixture(scope="module")
def real(real_tokenizers: Path, tmp_path_factory: pytest.TempPathFactory, copy_code: Callable) -> Callable[..., Any]:
    """A tokenizer on the published vocabulary: `real("chatglm3", **arguments of from_pretrained)`."""

    def load(version: str, **kwargs: Any) -> PreTrainedTokenizerBase:
        folder = tmp_path_factory.mktemp(version)
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(real_tokenizers / version / name, folder / name)
        copy_code(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, model_version=version, **kwargs)

    return load


@pytest.fixture
def recorded(reference_dir: Path) -> Callable[[str], dict[str, Any]]:
    def read(version: str) -> dict[str, Any]:
        return json.loads((reference_dir / f"tokenizer-{version}" / "tokenizer_cases.json").read_text("utf-8"))

    return read


@pytest.fixture
def fresh(case_folder: Callable[[str], Path]) -> Callable[..., PreTrainedTokenizerBase]:
    """A tokenizer that the test may change: `fresh("chatglm3", **arguments of from_pretrained)`."""
    return lambda name, **kwargs: AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True, **kwargs)


@pytest.fixture
def bare_folder(reference_dir: Path, tmp_path: Path, copy_code: Callable[[Path], None]) -> Path:
    """ChatGLM3's small vocabulary and the code, without any JSON file."""
    shutil.copyfile(reference_dir / "chatglm3" / "tokenizer.model", tmp_path / "tokenizer.model")
    copy_code(tmp_path)
    return tmp_path


def texts(count: int, pieces: list[str]) -> Iterator[str]:
    """Random strings of what has ever told two tokenizers apart."""
    generator = random.Random(0)
    ranges = [(0x20, 0x7F), (0x4E00, 0x9FFF), (0x3040, 0x30FF), (0x400, 0x45F), (0x600, 0x6FF), (0x900, 0x97F)]
    ranges += [(0xAC00, 0xD7A3), (0x300, 0x36F), (0x1F300, 0x1FAFF), (0x2000, 0x206F), (0xFF00, 0xFFEF)]
    ranges += [(0, 0x20), (0x7F, 0xA1), (0xE000, 0xE010), (0xFFF0, 0xFFFE), (0x10000, 0x10FFFF), (0x20000, 0x2A6DF)]
    literals = [
        "▁",
        "<0x41>",
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "[gMASK]",
        "<|user|>",
        "<n>",
        "\u200d",
        "\ufeff",
        "\r\n",
    ]

    def part() -> str:
        kind = generator.randrange(8)
        if kind == 0:
            return generator.choice(literals)
        if kind == 1:
            return generator.choice(" \n\t-=#.。\u3000▁哈a0") * generator.randint(1, 40)
        if kind == 2:
            return chr(generator.randint(*generator.choice(ranges)))
        if kind < 5:
            first, last = generator.choice(ranges)
            return "".join(chr(generator.randint(first, last)) for _ in range(generator.randint(1, 8)))
        return "".join(generator.choices(pieces, k=generator.randint(1, 4)))

    for _ in range(count):
        yield "".join(part() for _ in range(generator.randint(1, 7)))


def compare_with_sentencepiece(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    model = SentencePieceProcessor(model_file=tokenizer.vocab_file)
    pieces = [model.id_to_piece(index) for index in range(259, model.get_piece_size())]
    strings = list(texts(count, [piece.replace("▁", " ") for piece in pieces] + pieces[:200]))
    # Not `input_ids`, for which SentencePiece itself may be asked.
    ids = [encoding.ids for encoding in tokenizer(strings, add_special_tokens=False).encodings]
    assert len(set(strings)) > 0.85 * count
    differing = [
        text for text, ours, theirs in zip(strings, ids, model.encode(strings), strict=True) if ours != theirs
    ]
    assert differing == []
    assert [tokenizer.decode(row) for row in ids[: count // 20]] == model.decode(ids[: count // 20])

    generator = random.Random(1)
    last = model.get_piece_size() - 1
    for _ in range(count // 20):
        row = [generator.choice((generator.randint(3, 258), generator.randint(3, last))) for _ in range(12)]
        assert tokenizer.decode(row) == model.decode(row)


# The published vocabulary


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.grid)])
def test_strings_equal_sentencepiece(real: Callable[..., Any], count: int) -> None:
    compare_with_sentencepiece(real("chatglm3"), count)


def test_strings_equal_sentencepiece_on_the_small_vocabulary(case_tokenizer: Callable[[str], Any]) -> None:
    compare_with_sentencepiece(case_tokenizer("chatglm3"), 10_000)


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_properties(real: Callable[..., Any], recorded: Callable[[str], Any], version: str) -> None:
    tokenizer, cases = real(version), recorded(version)
    for name in ("vocab_size", "pad_token", "pad_token_id", "eos_token", "eos_token_id", "unk_token", "padding_side"):
        assert getattr(tokenizer, name) == cases[name], name
    assert tokenizer.tokenizer.special_tokens == cases["special_ids"]
    assert {token: tokenizer.get_command(token) for token in cases["special_ids"]} == cases["special_ids"]
    assert len(tokenizer) == len(tokenizer.get_vocab()) == tokenizer.tokenizer.n_words == cases["vocab_size"]
    # On purpose: the published class registers no special tokens with the library.
    assert cases["all_special_tokens"] == []
    assert len(tokenizer.all_special_ids) == len(cases["special_ids"])


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_strings(real: Callable[..., Any], recorded: Callable[[str], Any], version: str) -> None:
    tokenizer = real(version)
    strings = recorded(version)["strings"]
    assert len(strings) == 198
    for case in strings:
        text = case["text"]
        assert tokenizer.tokenize(text) == tokenizer.convert_ids_to_tokens(case["ids"]) == case["tokens"], text
        assert tokenizer.encode(text, add_special_tokens=False) == case["ids"], text
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == case["ids_special"], text
        assert tokenizer.decode(case["ids"]) == case["decode_ids"], text
        assert tokenizer.decode(case["ids_special"]) == case["decode_special"], text
        # On purpose: registered special tokens are dropped, so what is left decodes as if alone (chatglm3).
        assert tokenizer.decode(case["ids_special"], skip_special_tokens=True) == case["decode_ids"], text


@pytest.mark.parametrize("is_set_later", [False, True])
def test_recorded_strings_of_the_trainer_mode(
    real: Callable[..., Any], recorded: Callable[[str], Any], is_set_later: bool
) -> None:
    tokenizer = real("chatglm3", encode_special_tokens=not is_set_later)
    tokenizer.encode_special_tokens = True
    for case in recorded("chatglm3")["strings"]:
        text, expected = case["text"], case["encode_special_tokens"]
        assert tokenizer.tokenize(text) == expected["tokens"], text
        assert tokenizer(text)["input_ids"] == expected["ids_special"], text
        assert tokenizer.decode(expected["ids_special"]) == expected["decode_special"], text
        # The content of messages is text in this mode too.
        message = [{"role": "user", "content": text}]
        assert tokenizer.encode_conversation(message, add_generation_prompt=False)[5:] == case["ids"], text


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_pairs_and_batches(real: Callable[..., Any], recorded: Callable[[str], Any], version: str) -> None:
    tokenizer, cases = real(version), recorded(version)
    for case in cases["pairs"]:
        pair = (case["a"], case["b"])
        assert tokenizer(*pair)["input_ids"] == tokenizer.encode(*pair) == case["ids_special"], pair
        assert tokenizer([case["a"]], [case["b"]])["input_ids"] == [case["ids_special"]], pair
        assert tokenizer(*pair, add_special_tokens=False)["input_ids"] == case["ids"], pair
    for case in [*cases["batches"], cases["unpadded"]]:
        options = {key: case[key] for key in case if key not in ("texts", *tokenizer.model_input_names)}
        expected = {key: case[key] for key in tokenizer.model_input_names}
        assert dict(tokenizer(case["texts"], **options)) == expected
        if "truncation" not in options:
            rows = [tokenizer(text) for text in case["texts"]]
            assert dict(tokenizer.pad(rows, **{"padding": False, **options})) == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_decoding(real: Callable[..., Any], recorded: Callable[[str], Any], version: str) -> None:
    tokenizer = real(version)
    special = set(tokenizer.all_special_ids)
    for case in recorded(version)["decode"]:
        ids = case["ids"]
        if isinstance(case["decode"], str):
            assert tokenizer.decode(ids) == case["decode"], ids
            # On purpose: special ids have their names as tokens, so that ids and tokens map to each other.
            tokens = tokenizer.convert_ids_to_tokens(ids)
            published = [token for index, token in zip(ids, case["tokens"]) if index not in special]
            assert [token for index, token in zip(ids, tokens) if index not in special] == published, ids
            kept = [index for index in ids if index not in special]
            assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(kept), ids
        else:
            # On purpose: ids beyond the vocabulary give nothing, where the published ChatGLM2 raised.
            assert version == "chatglm2"
            assert case["decode"]["error"] == "IndexError"
            assert tokenizer.decode(ids) == tokenizer.decode([index for index in ids if index < 64789]), ids


def test_recorded_prompts_of_chatglm2(real: Callable[..., Any], recorded: Callable[[str], Any]) -> None:
    tokenizer = real("chatglm2")
    for case in recorded("chatglm2")["prompts"]:
        query, history, ids = case["query"], case["history"], case["ids_special"]
        assert tokenizer.build_prompt(query, history) == case["prompt"]
        assert tokenizer(case["prompt"])["input_ids"] == ids
        assert tokenizer.build_chat_input(query, history)["input_ids"].tolist() == [ids]
        messages = [
            {"role": role, "content": text}
            for pair in [*(history or []), (query,)]
            for role, text in zip(("user", "assistant"), pair)
        ]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


def test_recorded_conversations_of_chatglm3(real: Callable[..., Any], recorded: Callable[[str], Any]) -> None:
    tokenizer = real("chatglm3")
    cases = recorded("chatglm3")
    for case in cases["single_messages"]:
        ids = tokenizer.build_single_message(case["role"], case["metadata"], case["message"])
        assert ids == case["ids"]
    for case in cases["conversations"]:
        query, history, role = case["query"], case["history"], case["role"]
        before = copy.deepcopy(history)
        if role == "tool":
            # On purpose: the name OpenAI gives to observations is understood.
            ids = tokenizer.build_chat_input(query, history, role="observation")["input_ids"].tolist()
            assert tokenizer.build_chat_input(query, history, role=role)["input_ids"].tolist() == ids
            continue
        if "error" in case:
            with pytest.raises(ValueError, match=repr(case["history"][0]["role"])):
                tokenizer.build_chat_input(query, history, role=role)
            continue
        encoded = tokenizer.build_chat_input(query, history, role=role)
        length = len(case["ids"])
        assert encoded["input_ids"].tolist() == [case["ids"]]
        assert encoded["attention_mask"].tolist() == [[1] * length]
        assert encoded["position_ids"].tolist() == [list(range(length))]
        assert history == before
        messages = [*(history or []), {"role": role, "content": query}]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == case["ids"]


def test_loading_the_published_vocabulary_is_fast(real: Callable[..., Any]) -> None:
    """It takes 0.3 s; ten times as much would be a fault."""
    real("chatglm3")
    start = time.process_time()
    real("chatglm3")
    assert time.process_time() - start < 3


# The recorded conversations of the small checkpoints


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_recorded_chats(
    case: Callable[[str], Any], case_tokenizer: Callable[[str], Any], source: Callable[[str], ModuleType], name: str
) -> None:
    conversation, tokenizer = source("conversation_chatglm"), case_tokenizer(name)
    version = RECORDED[name].model_version
    assert tokenizer.model_version == version
    for section, turns in case(name).expected["chat"].items():
        history: list[Any] = []
        if section == "chat_system_observation":
            history = turns[0]["history"][:1]
        for number, turn in enumerate(turns):
            encoded = tokenizer.build_chat_input(turn["query"], history, role=turn.get("role", "user"))
            # The published second turn on a reused cache feeds other ids than the whole conversation; ours does not.
            if section != "stream_chat_past" or number == 0:
                assert encoded["input_ids"].tolist() == [turn["input_ids"]]
                assert encoded["position_ids"].tolist() == [
                    turn.get("position_ids", encoded["position_ids"][0].tolist())
                ]
            messages = conversation.CONVERSATION_FORMATS[version].normalize_messages(turn["history"])[:-1]
            # The published `chat` of ChatGLM3 drops the last token, taken for the end token.
            has_pairs = version in ("chatglm", "chatglm2")
            ids = turn["new_ids"] if has_pairs else turn["new_ids"][:-1]
            # The published `stream_chat` waits for the end of a character, and may never yield it.
            waits = section.startswith("stream") and version != "chatglm"
            while waits and tokenizer.decode(ids).endswith("\ufffd"):
                ids = ids[:-1]
            response, new = conversation.CONVERSATION_FORMATS[version].read_answer(tokenizer.decode(ids), messages)
            assert response == (turn["response"] if "response" in turn else turn["stream_responses"][-1])
            native = conversation.CONVERSATION_FORMATS[version].native_history(messages + new)
            assert [list(item) if has_pairs else item for item in native] == turn["history"]
            history = turn["history"]


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_recorded_training_examples(
    case: Callable[[str], Any], case_tokenizer: Callable[[str], Any], name: str
) -> None:
    tokenizer, tensors = case_tokenizer(name), case(name).tensors
    example = case(name).expected["loss"]
    messages = [{"role": "user", "content": example["prompt"]}, {"role": "assistant", "content": example["answer"]}]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_tensors="pt")
    ids, labels = tensors["loss.input_ids"].clone(), tensors["loss.labels"].clone()
    # That of GLM-4 was recorded with ChatGLM3's script; its own one closes with the role token.
    ids[0, -1] = labels[0, -1] = tokenizer.special_tokens.get(tokenizer.chat_format.closing_token, ids[0, -1])
    assert RECORDED[name].model_version == "glm4" or ids.equal(tensors["loss.input_ids"])
    assert encoded["input_ids"].equal(ids)
    assert encoded["input_ids"].where(torch.as_tensor(encoded["assistant_masks"]) == 1, -100).equal(labels)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encoded["input_ids"][0, : len(prompt)].tolist() == prompt


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_recorded_batches(case: Callable[[str], Any], case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer, tensors, expected = case_tokenizer(name), case(name).tensors, case(name).expected
    encoded = tokenizer(expected["batch"]["texts"], padding=True, return_tensors="pt")
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert encoded[key].equal(tensors[f"batch.{key}"])
    single = tokenizer(expected["single"]["text"], return_tensors="pt")
    assert single["input_ids"].equal(tensors["single.input_ids"])
    assert single["position_ids"].equal(tensors["single.position_ids"])


# Loading and saving


def test_published_folders_load_without_a_word(case_folder: Callable[[str], Path]) -> None:
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        f"for folder in {[str(case_folder(version)) for version in VERSIONS]}:\n"
        "    for use_fast in (True, False):\n"
        "        t = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=use_fast)\n"
        "        print(t.model_version, type(t).__name__, 'google.protobuf' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout.splitlines() == [f"{version} ChatGLMTokenizer False" for version in VERSIONS for _ in range(2)]


def test_the_generation_is_the_files_own_word_then_that_of_the_model(
    fresh: Callable[..., Any], bare_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert fresh("chatglm3").model_version == "chatglm3"
    assert fresh("chatglm3", model_version="chatglm2").model_version == "chatglm2"
    (bare_folder / "config.json").write_text('{"model_type": "chatglm", "_name_or_path": "THUDM/chatglm2-6b"}')
    # chatglm2-6b's own file says "chatglm-6b" here, which is another generation.
    settings = {
        "name_or_path": "THUDM/chatglm-6b",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (bare_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load = lambda: AutoTokenizer.from_pretrained(bare_folder, trust_remote_code=True).model_version  # noqa: E731
    assert load() == "chatglm2"
    (bare_folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_version": "chatglm3"}))
    assert load() == "chatglm3"


def test_an_untold_generation_is_chatglm3_and_said(source: Callable[[str], Any], bare_folder: Path) -> None:
    code = (
        "from transformers import AutoTokenizer; "
        f"t = [AutoTokenizer.from_pretrained({str(bare_folder)!r}, trust_remote_code=True) for _ in range(2)]; "
        "print(t[0].model_version)"
    )
    (bare_folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", null]}}'
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "chatglm3\n"
    assert run.stderr.count('Set `"model_version": "chatglm2"`') == 1
    with pytest.raises(ValueError, match="'chatglm9'"):
        source("tokenization_chatglm").ChatGLMTokenizer(str(bare_folder / "tokenizer.model"), model_version="chatglm9")


def test_a_folder_without_a_vocabulary_is_named(source: Callable[[str], Any], tmp_path: Path) -> None:
    tokenizer_class = source("tokenization_chatglm").ChatGLMTokenizer
    with pytest.raises(ValueError, match=f"{tmp_path} holds no `tokenizer.model`"):
        tokenizer_class.from_pretrained(tmp_path)
    (tmp_path / "ice_text.model").touch()
    with pytest.raises(ValueError, match="`ice_text.model`"):
        tokenizer_class.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")
    with pytest.raises(ValueError, match="is not the SentencePiece model"):
        tokenizer_class.from_pretrained(tmp_path)


def same(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> None:
    assert first.get_vocab() == second.get_vocab()
    assert first.model_version == second.model_version
    assert first.all_special_tokens == second.all_special_tokens
    assert first.chat_template == second.chat_template
    assert first.response_template == second.response_template
    assert (first.padding_side, first.model_max_length) == (second.padding_side, second.model_max_length)
    for text in [*CONTROL_TEXTS, "你好 <new><ctl> x", ""]:
        assert first(text, padding="max_length", max_length=24) == second(text, padding="max_length", max_length=24)
        chat = [{"role": "user", "content": text}]
        assert first.apply_chat_template(chat) == second.apply_chat_template(chat)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("lost", ["", "tokenizer.json", "tokenizer.model"])
def test_a_saved_tokenizer_is_the_same(fresh: Callable[..., Any], tmp_path: Path, version: str, lost: str) -> None:
    tokenizer = fresh(version, padding_side="right", model_max_length=77)
    if lost != "tokenizer.json":
        assert tokenizer.add_tokens(["<new>", "你好"]) == 2
        assert tokenizer.add_special_tokens({"additional_special_tokens": ["<ctl>"]}) == 1
    files = tokenizer.save_pretrained(tmp_path)
    names = {Path(file).name for file in files}
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(tokenizer.vocab_file).read_bytes()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_version"] == version
    assert settings["auto_map"]["AutoTokenizer"] == ["tokenization_chatglm.ChatGLMTokenizer", None]
    assert str(tmp_path.parent) not in json.dumps(settings)
    if lost:
        (tmp_path / lost).unlink()
    same(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True), tokenizer)


def test_saving_without_the_published_file(fresh: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = fresh("chatglm3")
    tokenizer.vocab_file = str(tmp_path / "gone" / "tokenizer.model")
    names = {Path(file).name for file in tokenizer.save_pretrained(tmp_path)}
    assert "tokenizer.json" in names
    assert "tokenizer.model" not in names
    same(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True), tokenizer)


def test_another_vocabulary_is_saved_and_not_the_old_one(case_folder: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_folder("chatglm3"), trust_remote_code=True)
    trained = tokenizer.train_new_from_iterator(["你好 hello world"] * 20, 300)
    trained.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert not (tmp_path / "tokenizer.model").exists()
    assert len(again) == len(trained) != len(tokenizer)


def test_uploading_saves_everything(
    fresh: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = fresh("chatglm3")
    uploads: list[Any] = []
    monkeypatch.setattr(type(tokenizer), "push_to_hub", lambda self, *args, **kwargs: uploads.append((args, kwargs)))
    assert "tokenizer.model" in {Path(file).name for file in tokenizer.save_pretrained(tmp_path, push_to_hub=True)}
    tokenizer.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/mine", token="t")
    assert uploads == [((tmp_path.name,), {}), (("me/mine",), {"token": "t"})]


def test_a_tokenizer_pickles_and_copies(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh("chatglm3")
    tokenizer.add_tokens(["<new>"])
    tokenizer.build_chat_input("hi")
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        same(twin, tokenizer)
        assert twin.tokenizer.encode("a") == tokenizer.tokenizer.encode("a")


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False},
        {"padding_side": "right", "split_special_tokens": False, "model_max_length": 1000000000000000019884624838656},
        {"additional_special_tokens": ["<|user|>", "<|observation|>"], "encode_special_tokens": False},
        {"eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "__type": "AddedToken"}},
        {
            "added_tokens_decoder": {
                str(index): {"content": token, "lstrip": False, "normalized": normalized, "rstrip": False,
                             "single_word": False, "special": False}
                for index, (token, normalized) in enumerate(
                    [("[gMASK]", False), ("sop", True), ("<|user|>", False), ("</s>", False), ("</s>", False)], 64790
                )
            },
            "remove_space": False,
            "do_lower_case": False,
            "use_fast": False,
        },
        {"image_token": "<unk>", "add_bos_token": True, "add_eos_token": True, "eos_token": None},
    ],
)  # fmt: skip
def test_files_of_any_version_load(
    fresh: Callable[..., Any], case_tokenizer: Callable[[str], Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """What fine-tuning tools and earlier versions of the library wrote beside the same vocabulary."""
    fresh("chatglm3").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    config = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": auto_map, "model_version": "chatglm3"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    plain = case_tokenizer("chatglm3")
    assert tokenizer.padding_side == settings.get("padding_side", "left")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 0, len(plain))
    assert tokenizer.all_special_ids == plain.all_special_ids
    for text in [*CONTROL_TEXTS, "Hello, 世界"]:
        assert tokenizer(text) == plain(text)
        assert tokenizer(text, text)["input_ids"] == plain(text, text)["input_ids"]


def test_named_tokens_can_be_set(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh("chatglm3")
    tokenizer.pad_token_id = tokenizer.eos_token_id
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 2)
    assert tokenizer(["a", "a b c"], padding=True)["input_ids"][0][0] == 2
    tokenizer.eos_token = "<|user|>"
    assert tokenizer.eos_token_id == tokenizer.get_command("<|user|>")


# Encoding


@pytest.mark.parametrize("version", VERSIONS)
def test_text_never_becomes_a_control_token(case_tokenizer: Callable[[str], Any], version: str) -> None:
    tokenizer = case_tokenizer(version)
    control = set(tokenizer.all_special_ids)
    for text in CONTROL_TEXTS:
        assert not control & set(tokenizer(text, add_special_tokens=False)["input_ids"]), text
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
        ids = tokenizer.build_chat_input(text, [(text, text)])["input_ids"][0].tolist()
        assert sum(index in control for index in ids) == {"chatglm2": 2, "chatglm3": 6}[version], text
        if version == "chatglm3":
            message = {"role": "assistant", "metadata": text, "content": text}
            assert sum(index in control for index in tokenizer.encode_conversation([message])) == 4, text


def test_the_trainer_mode_reads_the_role_tokens_only(fresh: Callable[..., Any]) -> None:
    tokenizer, plain = fresh("chatglm3", encode_special_tokens=True), fresh("chatglm3")
    text = "<|user|>\nhi[gMASK]</s>sop<|assistant|>"
    user, assistant = tokenizer.get_command("<|user|>"), tokenizer.get_command("<|assistant|>")
    ids = plain.encode("\nhi[gMASK]</s>sop", add_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False) == [user, *ids, assistant]
    assert tokenizer.build_chat_input(text)["input_ids"].equal(plain.build_chat_input(text)["input_ids"])
    assert tokenizer.decode([user, *ids], skip_special_tokens=True) == plain.decode(ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(case_tokenizer: Callable[[str], Any], side: str) -> None:
    tokenizer = case_tokenizer("chatglm3")
    strings = ["a", "", "a longer text"]
    lengths = [len(tokenizer.encode(text)) for text in strings]
    batch = tokenizer(strings, padding=True, padding_side=side, pad_to_multiple_of=8, return_tensors="pt")
    rows = [tokenizer(text) for text in strings]
    padded = tokenizer.pad(rows, padding_side=side, pad_to_multiple_of=8, return_tensors="pt")
    for encoded in (batch, padded):
        assert list(encoded) == ["input_ids", "attention_mask", "position_ids"]
        assert encoded["input_ids"].shape[1] % 8 == 0
        for row, length in enumerate(lengths):
            real = slice(-length, None) if side == "left" else slice(length)
            assert encoded["input_ids"][row, real].tolist() == rows[row]["input_ids"]
            assert encoded["attention_mask"][row, real].tolist() == [1] * length
            assert encoded["position_ids"][row, real].tolist() == list(range(length))
            assert encoded["attention_mask"][row].sum() == length
            assert encoded["position_ids"][row].sum() == length * (length - 1) // 2
    assert tokenizer.padding_side == "left"


def test_padding_makes_what_is_missing(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm2")
    padded = tokenizer.pad({"input_ids": [[5, 6], [5]]})
    assert padded["attention_mask"] == [[1, 1], [0, 1]]
    assert padded["position_ids"] == [[0, 1], [0, 0]]
    again = tokenizer.pad(
        {key: padded[key] for key in ("input_ids", "attention_mask")}, padding="max_length", max_length=4
    )
    assert again["position_ids"] == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert tokenizer.pad({"input_ids": [5, 6]}, padding=False)["position_ids"] == [0, 1]


def test_every_form_of_a_call(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm3")
    ids = tokenizer.encode("ab c")
    assert tokenizer("ab c", return_tensors="pt")["position_ids"].tolist() == [list(range(len(ids)))]
    assert isinstance(tokenizer(["ab c"], return_tensors="np")["position_ids"], np.ndarray)
    assert tokenizer("ab c", return_attention_mask=False).keys() == {"input_ids", "position_ids"}
    assert tokenizer("", add_special_tokens=False)["position_ids"] == []
    assert tokenizer.encode("ab c", None, False) == ids[2:]
    assert tokenizer.batch_encode_plus(["ab c"])["input_ids"] == [tokenizer.encode_plus("ab c")["input_ids"]] == [ids]
    cut = tokenizer("ab c", max_length=3, truncation=True, return_overflowing_tokens=True)
    assert [len(row) for row in cut["position_ids"]] == [len(row) for row in cut["input_ids"]]
    assert len(cut["input_ids"]) == len(ids) - 2
    labelled = tokenizer("ab c", text_target="ab c")
    assert labelled["labels"] == labelled["input_ids"] == ids
    assert tokenizer(text_target="ab c")["input_ids"] == ids
    tail = tokenizer("ab c", "", return_tensors="pt")
    assert tail["input_ids"].tolist() == [[*ids, 2]]
    assert tail["position_ids"].shape == tail["attention_mask"].shape == (1, len(ids) + 1)
    offsets = tokenizer("ab 北", return_offsets_mapping=True)["offset_mapping"]
    assert offsets[:2] == [(0, 0), (0, 0)]
    assert offsets[-1][1] == 4


def test_decoding_takes_anything(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm3")
    ids = tokenizer.encode("ab 北京", add_special_tokens=False)
    for form in (
        ids,
        tuple(ids),
        torch.tensor(ids),
        np.array(ids),
        {"input_ids": ids},
        tokenizer("ab 北京", add_special_tokens=False),
    ):
        assert tokenizer.decode(form) == "ab 北京"
    for batch in ([ids, []], torch.tensor([ids, ids])[:1], [torch.tensor(ids)]):
        assert tokenizer.batch_decode(batch)[0] == "ab 北京"
    assert tokenizer.decode(ids[1]) == tokenizer.decode(torch.tensor(ids[1])) == tokenizer.decode(ids[1:2])
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([len(tokenizer), 65023, -100, 10**9]) == ""
    assert tokenizer.convert_ids_to_tokens(10**6) == ""
    assert tokenizer.decode([len(tokenizer), *ids]) == "ab 北京"


def test_control_tokens_decode_as_published(case_tokenizer: Callable[[str], Any]) -> None:
    for version, text in (("chatglm2", "a"), ("chatglm3", "[gMASK]sop a")):
        tokenizer = case_tokenizer(version)
        ids = [*tokenizer.encode("a"), *tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"])]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a"
        assert tokenizer.convert_ids_to_tokens(ids) == [
            "[gMASK]",
            "sop",
            *tokenizer.tokenize("a"),
            "<unk>",
            "<s>",
            "</s>",
        ]


def test_incomplete_characters(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm3")
    ids = [3 + byte for byte in "😀".encode()]
    assert [tokenizer.decode(ids[:end]) for end in range(5)] == ["", "�", "��", "���", "😀"]
    assert tokenizer.decode([ids[0], *ids, ids[1]]) == "�😀�"
    assert tokenizer.decode([3 + byte for byte in b"\xed\xa0\x80"]) == "���"


def test_the_rust_decoder_streams(case_tokenizer: Callable[[str], Any]) -> None:
    """The library's server decodes with the Rust tokenizer, token by token."""
    tokenizer = case_tokenizer("chatglm3")
    text = "你好，show me  two 😀"
    stream = DecodeStream([], skip_special_tokens=True)
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert "".join(stream.step(tokenizer.tokenizer._tokenizer, index) or "" for index in ids) == text


def test_added_tokens(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh("chatglm3")
    size = len(tokenizer)
    assert tokenizer.add_tokens(["<new>", AddedToken("北京", single_word=False)]) == 2
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<ctl>", "<|user|>"]}, False) == 1
    assert tokenizer.add_tokens("<seen>", special_tokens=True) == 1
    assert tokenizer.add_tokens(["<new>", "sop", "</s>", "<|user|>"]) == 0
    assert len(tokenizer) == size + 4
    assert tokenizer.vocab_size == size
    new, beijing, ctl, seen = range(size, size + 4)
    assert tokenizer.convert_tokens_to_ids(["<new>", "北京", "<ctl>", "<seen>"]) == [new, beijing, ctl, seen]
    ids = tokenizer.encode("a<new>北京<ctl><seen>", add_special_tokens=False)
    assert ids[-4:] == [new, beijing, ctl, seen]
    assert tokenizer.decode(ids) == "a<new>北京<ctl><seen>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<new>北京"
    assert {ctl, seen} <= set(tokenizer.all_special_ids)
    # In a message a new word is a word, and a new control token is text.
    message = tokenizer.encode_conversation([{"role": "user", "content": "a<new>北京<ctl><seen>"}])
    assert {new, beijing} <= set(message)
    assert not {ctl, seen} & set(message)
    # Nothing of that makes the published control tokens readable.
    assert not set(tokenizer.all_special_ids) & set(tokenizer.encode("sop </s><|user|>", add_special_tokens=False))


def test_the_inner_tokenizer_of_published_code(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm3")
    inner = tokenizer.tokenizer
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert inner.encode("ab") == ids
    assert inner.encode("ab", bos=True, eos=True) == [1, *ids, 2]
    assert inner.decode(ids) == "ab"
    assert inner.special_tokens["<|user|>"] == tokenizer.get_command("<|user|>")
    assert inner("ab") == tokenizer("ab")
    assert inner._tokenizer is tokenizer._tokenizer
    assert copy.copy(inner).n_words == tokenizer.vocab_size
    with pytest.raises(AttributeError):
        inner.nothing  # noqa: B018
    with pytest.raises(ValueError, match="'<|nobody|>' is not a control token of chatglm3"):
        tokenizer.get_command("<|nobody|>")


# Conversations


@pytest.mark.parametrize("version", VERSIONS)
def test_the_models_word_wins(case_tokenizer: Callable[[str], Any], version: str) -> None:
    tokenizer = case_tokenizer(version)
    for other in VERSIONS:
        chat_format = case_tokenizer(other).chat_format
        expected = case_tokenizer(other).build_chat_input("q", [("a", "b")])
        encoded = tokenizer.build_chat_input("q", [("a", "b")], chat_format=chat_format)
        assert encoded["input_ids"].equal(expected["input_ids"])
        chat = [{"role": "user", "content": "q"}]
        for tokenize in (True, False):
            ours = tokenizer.apply_chat_template(chat, chat_format=chat_format, tokenize=tokenize)
            assert ours == case_tokenizer(other).apply_chat_template(chat, tokenize=tokenize)
        ids = encoded["input_ids"][0].tolist()
        assert tokenizer.decode(ids, chat_format=chat_format) == case_tokenizer(other).decode(ids)
    assert tokenizer.model_version == version


def test_stop_tokens(case_tokenizer: Callable[[str], Any]) -> None:
    roles = case_tokenizer("chatglm3").convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    for version in VERSIONS:
        tokenizer = case_tokenizer(version)
        assert tokenizer.stop_token_ids(case_tokenizer("chatglm2").chat_format) == [2]
        assert tokenizer.stop_token_ids(case_tokenizer("chatglm3").chat_format) == [2, *roles]
        assert tokenizer.stop_token_ids() == tokenizer.stop_token_ids(case_tokenizer(version).chat_format)


def test_an_encoding_moves_to_a_device(case_tokenizer: Callable[[str], Any]) -> None:
    encoded = case_tokenizer("chatglm3").build_chat_input("").to("cpu")
    assert encoded["input_ids"].shape == encoded["attention_mask"].shape == encoded["position_ids"].shape
    assert encoded.input_ids.dtype == torch.int64


@pytest.mark.parametrize("name", VERSIONS)
def test_bad_arguments_change_nothing(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    before = copy.deepcopy(history)
    for arguments, error in [
        ({"role": "function"}, ValueError),
        ({"chat_format": case_tokenizer("glm4").chat_format}, ValueError),
        ({"history": "text"}, TypeError),
        ({"history": [("q",)]}, TypeError),
        ({"query": 3}, TypeError),
    ]:
        with pytest.raises(error):
            tokenizer.build_chat_input(**{"query": "q", "history": history, **arguments})
    for conversation, error in [
        ([], ValueError),
        ("text", ValueError),
        ({"role": "user"}, ValueError),
        (["t"], TypeError),
    ]:
        with pytest.raises(error):
            tokenizer.apply_chat_template(conversation)
    with pytest.raises((TypeError, ValueError), match="`tools` must be a list|knows no tools"):
        tokenizer.apply_chat_template(history[:1], tools={"name": "f"})
    assert history == before
    with pytest.raises(TypeError):
        tokenizer.apply_chat_template(history, None, None, None, True)


@pytest.mark.parametrize("version", VERSIONS)
def test_templates_write_what_the_segments_hold(
    case_tokenizer: Callable[[str], Any], source: Callable[[str], ModuleType], version: str
) -> None:
    conversation, tokenizer = source("conversation_chatglm"), case_tokenizer(version)
    chats = [
        [{"role": "user", "content": "q"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "<|user|>\n\n "}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a\n"}],
        [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}, {"role": "user", "content": "q"}],
        [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "{{ x }}"}]}],
    ]
    if version == "chatglm3":
        chats += [
            TOOL_CHAT,
            [{"role": "user", "content": "q"}, {"role": "assistant", "metadata": "m", "content": "a"}] * 2,
            [{"role": "system", "content": "s", "tools": [WEATHER]}, {"role": "observation", "content": "o"}],
            [{"role": "system", "content": "s", "tools": []}],
            [{"role": "assistant", "content": "a"}],
            [{"role": "system", "content": "s", "tools": {"get_weather": WEATHER}}],
            [{"role": "system", "content": "s", "tools": [WEATHER, {"type": "function", "function": WEATHER}]}],
        ]
    prompts = [True, False]
    assert tokenizer.chat_template == conversation.CONVERSATION_FORMATS[version].chat_template
    for chat in chats:
        for prompt in prompts:
            if version == "chatglm2" and prompt and chat[-1]["role"] == "assistant":
                continue
            messages = conversation.CONVERSATION_FORMATS[version].normalize_messages(chat)
            segments = conversation.CONVERSATION_FORMATS[version].segments(messages, prompt)
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert text.replace("\u2060", "") == "[gMASK]sop" + "".join(segment.text for segment in segments)
            # Other programs render it with the messages as they come; this is the only one not of strings.
            if not isinstance(chat[-1]["content"], list):
                options = {"chat_template": tokenizer.chat_template, "add_generation_prompt": prompt}
                assert render_jinja_template([chat], **options)[0] == [text]
    assert tokenizer.apply_chat_template(chats[:2], tokenize=False) == [
        tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats[:2]
    ]


def test_the_template_alone_knows_openai_messages(case_tokenizer: Callable[[str], Any]) -> None:
    """Other programs render it with the messages as they come."""
    tokenizer = case_tokenizer("chatglm3")
    tools = [{"type": "function", "function": WEATHER}]
    for chat in (TOOL_CHAT, TOOL_CHAT[1:]):
        ours = tokenizer.apply_chat_template(chat, tools=tools, tokenize=False)
        rendered, _ = render_jinja_template([chat], tools=tools, chat_template=tokenizer.chat_template)
        assert rendered == [ours]
    for chat in ([{"role": "function", "content": "x"}],):
        with pytest.raises(Exception, match="Unknown role function"):
            render_jinja_template([chat], chat_template=tokenizer.chat_template)
    with pytest.raises(Exception, match="knows no built-in tool python"):
        render_jinja_template([TOOL_CHAT[:2]], tools=[{"type": "python"}], chat_template=tokenizer.chat_template)
    for chat in (TOOL_CHAT[:2] * 2, TOOL_CHAT):
        with pytest.raises(Exception, match="rounds of one question and one answer|knows no tools"):
            render_jinja_template([chat], chat_template=case_tokenizer("chatglm2").chat_template)


def test_openai_messages_and_tools(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm3")

    def get_weather(city: str) -> str:
        """
        Look up the weather.

        Args:
            city: Its name.
        """

    native = [
        {"role": "system", "content": "帮忙。", "tools": [WEATHER]},
        {"role": "user", "content": "北京今天多少度？"},
        {"role": "assistant", "metadata": "get_weather", "content": '```python\ntool_call(c="北\'京", n=[1])\n```'},
        {"role": "observation", "content": '{"t": 12}'},
        {"role": "assistant", "content": "12 度。\n再见"},
    ]
    before = copy.deepcopy(TOOL_CHAT)
    for tools in ([WEATHER], [{"type": "function", "function": WEATHER}]):
        ours = tokenizer.apply_chat_template(TOOL_CHAT, tools=tools, return_dict=False)
        assert ours == tokenizer.encode_conversation(native, add_generation_prompt=False)
    assert before == TOOL_CHAT
    text = tokenizer.apply_chat_template(TOOL_CHAT[1:2], tools=[get_weather], tokenize=False)
    assert 'following tools:\n[\n    {\n        "name": "get_weather"' in text
    assert tokenizer.apply_chat_template(TOOL_CHAT, tools=[]) == tokenizer.apply_chat_template(TOOL_CHAT)
    with pytest.raises(ValueError, match="knows no tools"):
        case_tokenizer("chatglm2").apply_chat_template(TOOL_CHAT[1:2], tools=[WEATHER])


@pytest.mark.parametrize("version", VERSIONS)
def test_batches_of_conversations(case_tokenizer: Callable[[str], Any], version: str) -> None:
    tokenizer = case_tokenizer(version)
    chats = [[{"role": "user", "content": text}] for text in ("a", "a much longer question")]
    rows = [tokenizer.build_chat_input(chat[0]["content"])["input_ids"][0].tolist() for chat in chats]
    options = {"add_generation_prompt": True}
    assert tokenizer.apply_chat_template(chats, **options, return_dict=False) == rows
    batch = tokenizer.apply_chat_template(chats, **options, padding=True, return_tensors="pt")
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    assert list(batch) == list(padded)
    assert all(batch[key].equal(padded[key]) for key in padded)
    right = tokenizer.apply_chat_template(
        chats, **options, padding="max_length", max_length=50, tokenizer_kwargs={"padding_side": "right"}
    )
    assert right["input_ids"][0] == rows[0] + [0] * (50 - len(rows[0]))
    for truncated in (
        tokenizer.apply_chat_template(chats[0], **options, truncation=True, max_length=6),
        tokenizer.apply_chat_template(chats, **options, truncation=True, max_length=6, return_dict=False),
    ):
        assert (truncated["input_ids"] if "input_ids" in truncated else truncated[0]) == rows[0][:6]
    left = copy.deepcopy(tokenizer)
    left.truncation_side = "left"
    cut = left.apply_chat_template(chats[1], **options, truncation=True, max_length=6, return_dict=False)
    assert cut == rows[1][:2] + rows[1][-4:]
    assert left.apply_chat_template(chats[0], **options, truncation=True, return_dict=False) == rows[0]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_open_answer_can_be_continued(case_tokenizer: Callable[[str], Any], version: str) -> None:
    tokenizer = case_tokenizer(version)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "It is"}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.apply_chat_template(chat, continue_final_message=True, return_dict=False) == whole[:-1]
    text = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    assert text == tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("</s>")
    for wrong in ({"add_generation_prompt": True}, {"conversation": chat[:1]}):
        with pytest.raises(ValueError, match="open|nothing to answer"):
            tokenizer.apply_chat_template(**{"conversation": chat, "continue_final_message": True, **wrong})


@pytest.mark.parametrize("version", VERSIONS)
def test_the_mask_of_answers(case_tokenizer: Callable[[str], Any], version: str) -> None:
    tokenizer = case_tokenizer(version)
    chat = [
        {"role": "user", "content": "问：one"},
        {"role": "assistant", "content": "“first” 答"},
        {"role": "user", "content": "问：two"},
        {"role": "assistant", "content": "second\n\n"},
    ]
    encoded = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == tokenizer.apply_chat_template(chat, return_dict=False)
    assert len(encoded["assistant_masks"]) == len(encoded["input_ids"])
    runs = "".join(map(str, encoded["assistant_masks"])).strip("0").split("0")
    assert len([run for run in runs if run]) == 2
    answers = [index for index, mask in zip(encoded["input_ids"], encoded["assistant_masks"]) if mask]
    text = tokenizer.decode(answers)
    assert text == {"chatglm2": "“first” 答 second\n\n", "chatglm3": "\n “first” 答<|user|> \n second\n\n"}[version]
    assert answers[-1] == tokenizer.eos_token_id
    batch = tokenizer.apply_chat_template(
        [chat, chat[:2]], return_assistant_tokens_mask=True, padding=True, return_tensors="pt"
    )
    assert batch["assistant_masks"][0].tolist() == encoded["assistant_masks"]
    assert batch["assistant_masks"][1, 0] == 0
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    again = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, truncation=True, max_length=30)
    assert again["assistant_masks"] == encoded["assistant_masks"][:30]


def test_a_template_of_ones_own(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh("chatglm3")
    template = "[gMASK]sop{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    command = tokenizer.get_command
    sophia = tokenizer.encode("sophia", add_special_tokens=False)
    expected = [command("[gMASK]"), command("sop"), command("<|user|>"), *sophia]
    chat = [{"role": "user", "content": "sophia"}]
    shipped = tokenizer.apply_chat_template(chat)
    assert tokenizer.apply_chat_template(chat, chat_template=template)["input_ids"] == expected
    assert tokenizer.apply_chat_template(chat) == shipped
    assert tokenizer.apply_chat_template(chat, chat_template=tokenizer.chat_template) == shipped
    tokenizer.chat_template = template
    encoded = tokenizer.apply_chat_template(chat, return_tensors="pt")
    assert encoded["input_ids"].tolist() == [expected]
    assert encoded["position_ids"].tolist() == [list(range(len(expected)))]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[gMASK]sop<|user|>sophia"
    assert tokenizer("<|user|>") == fresh("chatglm3")("<|user|>")


def assert_the_library_reads(tokenizer: PreTrainedTokenizerBase, answer: str, message: dict[str, Any]) -> None:
    """With our template Transformers makes the message of the text, of its characters one by one, and of its ids."""
    expected = {"role": "assistant", **message}
    if calls := message.get("tool_calls"):
        expected["tool_calls"] = [
            {"type": "function", "function": {"name": "get_weather", "arguments": arguments}} for arguments in calls
        ]
    prompt = tokenizer.apply_chat_template(TOOL_CHAT[:2], add_generation_prompt=True, tokenize=False)
    for suffix in ("", "" if answer.endswith("|>") else "<|user|>"):
        assert tokenizer.parse_response(answer + suffix, prefix=prompt) == expected
    parser = ResponseParser(tokenizer.response_template, prefix=prompt)
    for character in answer:
        parser.feed(character)
    assert parser.finalize()[0] == expected
    ids = tokenizer.encode_conversation(TOOL_CHAT[:2])
    if "<|" not in answer:
        generated = tokenizer.encode(answer, add_special_tokens=False)
        assert tokenizer.parse_response(generated, prefix=ids) == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("\n 你好。\n再见", {"content": "你好。\n再见"}),
        ("你好", {"content": "你好"}),
        ("interpreter\n```python\n1+1\n```", {"content": "interpreter\n```python\n1+1\n```"}),
        (
            "get_weather\n```python\ntool_call(city='北京', unit=\"it's\", n=3, deep=[1, 'a'], m={'k': 2}, t=True)\n```",
            {"tool_calls": [{"city": "北京", "unit": "it's", "n": 3, "deep": [1, "a"], "m": {"k": 2}, "t": "True"}]},
        ),
        ("get_weather\n```python\ntool_call()\n```<|observation|>", {"tool_calls": [{}]}),
        # The content is encoded on its own, so what a model writes decodes with SentencePiece's leading space.
        ("get_weather\n ```python\ntool_call(c='a')\n```<|observation|>", {"tool_calls": [{"c": "a"}]}),
        (
            "\n 我查。<|assistant|>get_weather\n```python\ntool_call(c='a')\n```<|assistant|>get_weather\n"
            "```python\ntool_call(c='b')\n```<|observation|>",
            {"content": "我查。", "tool_calls": [{"c": "a"}, {"c": "b"}]},
        ),
    ],
)  # fmt: skip
def test_the_library_reads_answers(case_tokenizer: Callable[[str], Any], answer: str, message: dict[str, Any]) -> None:
    assert_the_library_reads(case_tokenizer("chatglm3"), answer, message)


def test_threads_share_a_tokenizer(fresh: Callable[..., Any]) -> None:
    tokenizer = fresh("chatglm3")
    chats = [[{"role": "user", "content": f"{index} " + "text <|user|> " * (index % 7)}] for index in range(40)]
    expected = [tokenizer.encode_conversation(chat) for chat in chats]
    tokenizer = fresh("chatglm3")

    def work(index: int) -> bool:
        if index % 4 == 0:
            # Sets padding, truncation and the reading of special tokens on the Rust tokenizer.
            tokenizer(
                ["<|user|> a", "b " * 30], padding=True, truncation=True, max_length=9, split_special_tokens=False
            )
            return True
        if index % 4 == 1:
            return (
                tokenizer.build_chat_input(chats[index % 40][0]["content"])["input_ids"][0].tolist()
                == expected[index % 40]
            )
        return tokenizer.encode_conversation(chats[index % 40]) == expected[index % 40]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(4000)))


def test_a_long_text_takes_no_longer_than_it_should(case_tokenizer: Callable[[str], Any]) -> None:
    tokenizer = case_tokenizer("chatglm3")
    text = "你好 hello\n" * 30_000
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer.encode_conversation([{"role": "user", "content": text}])) > 100_000
