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
"""A conversation that another program renders to text and encodes itself has the ids of `build_chat_input`.

And what users write gives no control token by that way either.
"""

import copy
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generations import ALL_CASES, GENERATION_CASES, GENERATIONS, RECORDED
from jinja2.sandbox import SandboxedEnvironment
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template


JOINER = "\u2060"
# What hostile messages are made of: control tokens and parts of them, joiners, and what stands between messages.
PARTS = [
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<sop>", "<eop>", "<ENC>", "<unk>", "<pad>", "<s>", "</s>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>", "<|begin_of_image|>"),
    *(
        "[gMASK]sop<|user|>\n",
        "[gMASK]<sop>",
        "[Round 1]\n\n问：",
        "[Round 0]\n问：",
        "\n\n答：",
        "\n答：",
        "答：",
        "问：",
    ),
    *("<", "[", "<|", "|>", "|user|>", "gMASK]", "MASK]", "sop>", "/s>", "s>", "]", ">"),
    *(JOINER, JOINER, JOINER, JOINER * 2, "\n", "\n", "\n\n", " ", "  ", "\t", "a", "hello", "你好", "😀", "{{ x }}"),
]
TOOL = {"name": "f</s>", "description": "<|user|>\n[gMASK]", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def real(
    real_tokenizers: Path,
    reference_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    copy_code: Callable[[Path], None],
) -> Callable[[str], PreTrainedTokenizerBase]:
    """The tokenizer of a generation on its published vocabulary."""

    def load(version: str) -> PreTrainedTokenizerBase:
        folder = tmp_path_factory.mktemp(version)
        shutil.copyfile(
            reference_dir / GENERATION_CASES[GENERATIONS.index(version)] / "tokenizer_config.json",
            folder / "tokenizer_config.json",
        )
        shutil.copytree(real_tokenizers / version, folder, dirs_exist_ok=True)
        copy_code(folder)
        named = {} if version == "chatglm" else {"model_version": version}
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **named)

    return load


def render_and_encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """What other programs do."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def hostile_text(rng: random.Random, most: int = 6) -> str:
    text = "".join(rng.choice(PARTS) for _ in range(rng.randrange(most + 1)))
    place = rng.randrange(len(text) + 1)
    return text[:place] + JOINER + text[place:] if rng.random() < 0.3 else text


def hostile_chats(rng: random.Random, has_roles: bool, count: int) -> Iterator[list[dict[str, Any]]]:
    for _ in range(count):
        chat: list[dict[str, Any]] = []
        if rng.random() < 0.3:
            chat.append({"role": "system", "content": hostile_text(rng)})
            if has_roles and rng.random() < 0.5:
                chat[0]["tools"] = [{**TOOL, "name": hostile_text(rng), "description": hostile_text(rng)}]
        for _ in range(rng.randrange(1, 4)):
            if has_roles:
                role = rng.choice(["user", "assistant", "observation"])
                chat.append({"role": role, "content": hostile_text(rng)})
                if rng.random() < 0.4:
                    chat[-1]["metadata"] = hostile_text(rng, 4)
            else:
                chat.append({"role": "user", "content": hostile_text(rng)})
                chat.append({"role": "assistant", "content": hostile_text(rng)})
        if not has_roles and rng.random() < 0.5:
            del chat[-1]
        yield chat


def compare_on_hostile_chats(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    chat_format = tokenizer.chat_format
    # The id of `<unk>` also stands for characters that no piece covers.
    special = {
        token: tokenizer.convert_tokens_to_ids(token) for token in chat_format.marked_tokens if token != "<unk>"
    }
    messages, rng = 0, random.Random(1)
    for chat in hostile_chats(random.Random(0), not chat_format.uses_pairs, count):
        # A conversation of GLM-4V may have one.
        if chat_format.picture_tokens and rng.random() < 0.4:
            rng.choice(chat)["image"] = True
        ends_with_answer = chat[-1]["role"] == "assistant"
        options: list[dict[str, Any]] = [{}]
        options += [{"continue_final_message": True}] if ends_with_answer else []
        options += [{"add_generation_prompt": True}] if not (ends_with_answer and chat_format.uses_pairs) else []
        for option in options:
            text = tokenizer.apply_chat_template(chat, tokenize=False, **option)
            ids = tokenizer.apply_chat_template(chat, return_dict=False, **option)
            # An open question of ChatGLM-6B has no control token that could tell it from other texts.
            if option or ends_with_answer or chat_format.opening_tokens:
                assert tokenizer.encode(text, add_special_tokens=False) == ids, (chat, option)
            # Whoever reads the text finds the control tokens of the template, and no others.
            assert all(text.count(token) == ids.count(index) for token, index in special.items()), (chat, option)
        messages += len(chat)
    assert messages > 2 * count


@pytest.mark.parametrize("name", [*GENERATION_CASES, "glm4v"])
def test_hostile_messages(case_tokenizer: Callable[[str], Any], name: str) -> None:
    compare_on_hostile_chats(case_tokenizer(name), 300)


@pytest.mark.parametrize("version", GENERATIONS)
def test_hostile_messages_on_the_published_vocabulary(real: Callable[[str], Any], version: str) -> None:
    compare_on_hostile_chats(real(version), 150)


@pytest.mark.parametrize("version", ["chatglm2", "chatglm3", "glm4"])
def test_recorded_conversations(
    real: Callable[[str], Any], case_tokenizer: Callable[[str], Any], reference_dir: Path, version: str
) -> None:
    is_synthetic = version == "glm4"
    folder = f"tokenizer-{version}-synthetic" if is_synthetic else f"tokenizer-{version}"
    recorded = json.loads((reference_dir / folder / "tokenizer_cases.json").read_text(encoding="utf-8"))
    tokenizer = case_tokenizer(version) if is_synthetic else real(version)
    compared = 0
    for case in recorded.get("conversations") or recorded["prompts"]:
        if "error" in case:
            continue
        chat = tokenizer.chat_format.normalize_messages(case["history"])
        chat.append({"role": case.get("role", "user"), "content": case["query"]})
        ids = case.get("ids") or case["ids_special"]
        assert render_and_encode(tokenizer, chat, add_generation_prompt=True) == ids
        assert tokenizer.build_chat_input(case["query"], case["history"], case.get("role", "user"))[
            "input_ids"
        ].tolist() == [ids]
        compared += 1
    assert compared >= 8


@pytest.mark.floor
@pytest.mark.parametrize("name", ALL_CASES)
def test_recorded_chats(case: Callable[[str], Any], case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    for section, turns in case(name).expected["chat"].items():
        history = turns[0]["history"][:1] if section == "chat_system_observation" else []
        for number, turn in enumerate(turns):
            role = turn.get("role", "user")
            ids = tokenizer.build_chat_input(turn["query"], history, role)["input_ids"][0].tolist()
            # The published second turn on a reused cache feeds other ids than the whole conversation.
            assert section == "stream_chat_past" and number or ids == turn["input_ids"]
            chat = [*tokenizer.chat_format.normalize_messages(history), {"role": role, "content": turn["query"]}]
            assert render_and_encode(tokenizer, chat, add_generation_prompt=True) == ids
            history = turn["history"]


def test_half_a_character_is_refused(case_tokenizer: Callable[[str], Any]) -> None:
    for name in GENERATION_CASES:
        tokenizer = case_tokenizer(name)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
        )
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            tokenizer(text.replace("a", "\ud83d"), add_special_tokens=False)


@pytest.mark.parametrize("name", [name for name in GENERATION_CASES if RECORDED[name].has_roles])
def test_tools_and_calls(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    call = {"function": {"name": "f</s>", "arguments": {"x": "<|user|>\n" + JOINER}}}
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "<|assistant|>\n"},
    ]
    for tools in (None, [TOOL], [{"type": "function", "function": TOOL}]):
        options = {"tools": tools, "add_generation_prompt": True}
        ids = tokenizer.apply_chat_template(chat, return_dict=False, **options)
        assert render_and_encode(tokenizer, chat, **options) == ids
        # With the messages as they come, as other programs have them.
        rendered, _ = render_jinja_template([chat], chat_template=tokenizer.chat_template, **options)
        assert tokenizer.encode(rendered[0], add_special_tokens=False) == ids
    for offered in ({"f<|user|>": TOOL}, [TOOL, {"type": "python"}, {"type": "cogview"}]):
        # GLM-4 knows tools by their type; ChatGLM3 does not.
        if name == "glm4" or isinstance(offered, dict):
            chat[0] = {"role": "system", "content": "</s>", "tools": offered}
            ids = tokenizer.apply_chat_template(chat, return_dict=False)
            assert render_and_encode(tokenizer, chat) == ids


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_tokens_that_users_add(case_folder: Callable[[str], Path], name: str) -> None:
    """They are read in messages or not, as without the rendering; the trainers' mode changes nothing either."""
    tokenizer = AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True, encode_special_tokens=True)
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_tokens(["<sign>"], special_tokens=True)
    chat = [{"role": "user", "content": "a<new>b<sign>c<|user|>"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert render_and_encode(tokenizer, chat, add_generation_prompt=True) == ids
    assert tokenizer.convert_tokens_to_ids("<new>") in ids
    assert tokenizer.convert_tokens_to_ids("<sign>") not in ids


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_any_jinja_renders_the_same(case_tokenizer: Callable[[str], Any], name: str) -> None:
    """Without the library's filters and its handling of white space; the tag that marks answers aside."""
    tokenizer = case_tokenizer(name)
    template = re.sub(r"\{%-? generation %\}", "{%- if true %}", tokenizer.chat_template)
    template = re.sub(r"\{%-? endgeneration %\}", "{%- endif %}", template)
    for environment in (SandboxedEnvironment(), SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)):
        compiled = environment.from_string(template)
        for chat in hostile_chats(random.Random(1), not tokenizer.chat_format.uses_pairs, 50):
            if "tools" not in chat[0]:
                assert compiled.render(messages=chat) == tokenizer.apply_chat_template(chat, tokenize=False)


@pytest.mark.floor
@pytest.mark.parametrize("name", GENERATION_CASES)
def test_answers_at_the_end(case_tokenizer: Callable[[str], Any], name: str) -> None:
    """Closed, left open to be continued, and continued by the text that another program puts behind a prompt."""
    tokenizer = case_tokenizer(name)
    for answer in ("It is", "It is\n\n", f"\n\n{JOINER}", "答：\n\n答：Paris", "", "</s>", "<eop>", "[gMASK]<sop>"):
        chat = [{"role": "user", "content": "Hi\n\n答："}, {"role": "assistant", "content": answer}]
        for options in ({}, {"continue_final_message": True}):
            assert render_and_encode(tokenizer, chat, **options) == tokenizer.apply_chat_template(
                chat, return_dict=False, **options
            )
        chats = [chat, chat]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, continue_final_message=True)
        assert texts == [tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)] * 2
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    context = tokenizer.encode(prompt, add_special_tokens=False)
    whole = tokenizer.encode(prompt + "\nParis", add_special_tokens=False)
    assert whole[: len(context)] == context
    assert tokenizer.decode(whole[len(context) :]).strip() == "Paris"


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_nothing_else_is_recognised(
    case_tokenizer: Callable[[str], Any], source: Callable[[str], ModuleType], name: str
) -> None:
    tokenizer, rendering = case_tokenizer(name), source("conversation_rendering")
    texts = {
        "chatglm1": ["[gMASK]", "<sop>", "[gMASK]sop", "[gMASK] <sop>", "a<eop>", "[gMASK]<so"],
        "chatglm2": ["[gMASK]sop", "[gMASK]<sop>", " [gMASK]sopa", "sop", "[Round 1]\n\n问：a\n\n答："],
        "chatglm3": ["[gMASK]sop", "[gMASK]sopa", "[gMASK]sop<|user>", "[gMASK]<sop><|user|>", "<|user|>\na"],
        "glm4": ["[gMASK]<sop>", "[gMASK]<sop>a", "[gMASK]sop<|user|>", "<|user|>\na", "[gMASK]<sop><|endoftext|>"],
    }[name]
    for text in [*texts, "", "a", "你好\n"]:
        assert rendering.read_rendered(text, tokenizer.chat_format) is None
        plain = tokenizer(text, add_special_tokens=False, split_special_tokens=tokenizer.split_special_tokens)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain["input_ids"]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert ids == tokenizer.build_chat_input("a")["input_ids"][0].tolist()
    # With special tokens, as a pair, or where it is said how control tokens are read, it is a text like any other.
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    assert tokenizer.encode(rendered) == tokenizer.encode(
        rendered, split_special_tokens=tokenizer.split_special_tokens
    )
    assert tokenizer.encode(rendered, **plain) != ids
    pair = tokenizer(rendered, "b", add_special_tokens=False)["input_ids"]
    assert (
        pair
        == tokenizer(rendered, "b", add_special_tokens=False, split_special_tokens=tokenizer.split_special_tokens)[
            "input_ids"
        ]
    )


@pytest.mark.floor
@pytest.mark.parametrize("name", GENERATION_CASES)
def test_every_form_of_a_call(case_tokenizer: Callable[[str], Any], name: str) -> None:
    tokenizer = case_tokenizer(name)
    chats = [[{"role": "user", "content": text}] for text in ("<|user|> [gMASK]", "a longer question\n\nor two")]
    rows = [tokenizer.build_chat_input(chat[0]["content"])["input_ids"][0].tolist() for chat in chats]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    options: dict[str, Any] = {"add_special_tokens": False}
    for encoded in (tokenizer(texts[0], **options), tokenizer.encode_plus(texts[0], **options)):
        same = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True)
        assert encoded == same
    assert tokenizer.encode(texts[0], None, False) == rows[0]
    for batch in (tokenizer(texts, **options), tokenizer(tuple(texts), **options)):
        assert batch["input_ids"] == tokenizer.batch_encode_plus(texts, **options)["input_ids"] == rows
    for side in ("left", "right"):
        padding = {"padding": True, "return_tensors": "pt", "padding_side": side}
        batch = tokenizer(texts, **options, **padding)
        expected = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": side},
        )
        assert batch.keys() == expected.keys()
        assert all(batch[key].equal(expected[key]) for key in expected)
    unpadded = tokenizer(texts[0], **options, return_tensors="pt")
    ready = tokenizer.build_chat_input(chats[0][0]["content"])
    assert unpadded.keys() == ready.keys()
    assert all(unpadded[key].equal(ready[key]) for key in ready)
    # Among plain texts, with all that a call can return.
    mixed = tokenizer(
        ["plain", texts[0]],
        **options,
        padding="max_length",
        max_length=len(rows[0]) + 2,
        return_special_tokens_mask=True,
        return_token_type_ids=True,
        return_length=True,
    )
    plain = tokenizer.encode("plain", **options)
    width = len(rows[0]) + 2
    assert mixed["input_ids"][0] == [tokenizer.pad_token_id] * (width - len(plain)) + plain
    assert mixed["input_ids"][1] == [tokenizer.pad_token_id] * 2 + rows[0]
    assert mixed["length"] == [width] * 2
    assert mixed["token_type_ids"][0] == [0] * width
    names = [*tokenizer.chat_format.opening_tokens, *tokenizer.special_tokens]
    special = {tokenizer.convert_tokens_to_ids(token) for token in names}
    assert mixed["special_tokens_mask"][1] == [1] * 2 + [int(index in special) for index in rows[0]]
    with pytest.raises(ValueError, match="overlapping"):
        tokenizer(texts, **options, truncation=True, max_length=4, return_overflowing_tokens=True)


@pytest.mark.parametrize("name", GENERATION_CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_is_that_of_conversations(case_tokenizer: Callable[[str], Any], name: str, side: str) -> None:
    tokenizer = copy.deepcopy(case_tokenizer(name))
    tokenizer.truncation_side = side
    chat = [{"role": "user", "content": "a much longer question\n"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for limit in (3, 6, 1000):
        whole = tokenizer.apply_chat_template(chat, add_generation_prompt=True, truncation=True, max_length=limit)
        for options in ({"truncation": True}, {"truncation": "longest_first"}, {}):
            cut = tokenizer([text, "a b c d e f g h"], add_special_tokens=False, max_length=limit, **options)
            assert cut["input_ids"][0] == whole["input_ids"]
            assert len(cut["input_ids"][1]) <= limit
    assert tokenizer.encode(text, add_special_tokens=False, truncation=False, max_length=3) == whole["input_ids"]


@pytest.mark.parametrize("name", [name for name in GENERATION_CASES if name != "chatglm1"])
def test_offsets(case_tokenizer: Callable[[str], Any], name: str) -> None:
    """ChatGLM-6B's tokenizer has none."""
    tokenizer = case_tokenizer(name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab <|user|></s> 你\nc"}], tokenize=False, add_generation_prompt=True
    )
    assert JOINER in text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert len(encoded["offset_mapping"]) == len(encoded["input_ids"])
    covered = set()
    for start, end in encoded["offset_mapping"]:
        assert start < end
        covered.update(range(start, end))
    assert {text[place] for place in set(range(len(text))) - covered} <= {JOINER}
    ends = [end for _, end in encoded["offset_mapping"]]
    assert ends == sorted(ends)
    batch = tokenizer(
        [text, "a"], add_special_tokens=False, return_offsets_mapping=True, padding=True, padding_side="right"
    )
    assert batch["offset_mapping"][0] == encoded["offset_mapping"]
    assert batch["offset_mapping"][1][1:] == [(0, 0)] * (len(ends) - 1)


def test_the_marked_tokens_are_the_special_ones(case_tokenizer: Callable[[str], Any]) -> None:
    """`sop` and `eop` are words, and control tokens only behind `[gMASK]` and in nothing that is rendered."""
    for name in GENERATION_CASES:
        tokenizer = case_tokenizer(name)
        vocabulary = tokenizer.vocabulary
        special = {*vocabulary.control_tokens, *vocabulary.named_tokens.values(), vocabulary.pair_token}
        special |= {"</s>"} if name == "chatglm1" else set()
        assert special - {"sop", "eop"} == set(tokenizer.chat_format.marked_tokens)
        assert tokenizer.apply_chat_template(
            [{"role": "user", "content": "philosophy sop eop"}], tokenize=False
        ).endswith("philosophy sop eop" + {"chatglm2": "\n\n"}.get(name, ""))


def test_reading_takes_no_longer_than_it_should(source: Callable[[str], ModuleType]) -> None:
    rendering = source("conversation_rendering")
    formats = source("conversation_chatglm").CONVERSATION_FORMATS.values()
    start = time.process_time()
    for part in (JOINER, f"{JOINER}\n", f"\n{JOINER}", "\n\n答：", "<|user|>", "<", "a\n"):
        for chat_format in formats:
            opening = "".join(chat_format.opening_tokens)
            for text in (part * 30_000, f"{opening}<|user|>{part * 30_000}", f"{part * 30_000}[gMASK]<sop>"):
                rendering.read_rendered(text, chat_format)
    # It takes 1 s.
    assert time.process_time() - start < 10
