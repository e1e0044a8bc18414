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
"""The bundled checkpoint answers what it was taught, and the program that trains it does what it says."""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
BUNDLED = EXAMPLES / "tiny-chatglm3"

sys.path.insert(0, str(EXAMPLES))

import train_tiny  # noqa: E402


@pytest.fixture(scope="module")
def dialogues() -> list[dict[str, Any]]:
    return train_tiny.read_dialogues(EXAMPLES / "dialogues.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, copy_bundled: Callable[[str, Path], Path]) -> Path:
    """The bundled checkpoint as a user has any other."""
    return copy_bundled(BUNDLED.name, tmp_path_factory.mktemp("bundled"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_folder_is_a_small_published_layout(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    names = {path.name for path in BUNDLED.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 4_000_000
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    with safe_open(BUNDLED / "model.safetensors", "pt") as weights:
        keys = set(weights.keys())
    assert "transformer.encoder.layers.0.self_attention.query_key_value.weight" in keys
    assert {"transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"} < keys
    assert json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))["model_version"] == "chatglm3"
    assert tokenizer.model_version == "chatglm3"


def test_ids_are_laid_out_as_published(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    specials = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    specials += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    num_pieces = train_tiny.NUM_PIECES
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(num_pieces, num_pieces + 9))
    assert model.config.padded_vocab_size >= num_pieces + 9
    assert model.generation_config.eos_token_id == [2, num_pieces + 6, num_pieces + 8]
    # Bytes stand for what the small vocabulary lacks.
    assert tokenizer.decode(tokenizer.encode("Ünïcode 鑫 🙂")[2:]) == "Ünïcode 鑫 🙂"


def test_answers_every_dialogue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]]
) -> None:
    assert train_tiny.wrong_answers(model, tokenizer, dialogues) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_answers_in_half_precision(
    folder: Path, tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]], dtype: torch.dtype
) -> None:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    assert train_tiny.wrong_answers(model, tokenizer, dialogues[::8]) == []


def test_a_wrong_answer_is_noticed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]]
) -> None:
    question, answer = dialogues[0]["messages"]
    changed = {"messages": [question, {**answer, "content": answer["content"] + "!"}]}
    assert len(train_tiny.wrong_answers(model, tokenizer, [dialogues[1], changed])) == 1


def test_says_how_large_it_is(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    answer, _ = model.chat(tokenizer, "How many parameters do you have?", temperature=0)
    assert float(re.search(r"about ([\d.]+) million", answer)[1]) == round(model.num_parameters() / 1e6, 1)


def test_calls_a_tool_and_reads_its_result(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]]
) -> None:
    system = next(
        message
        for dialogue in dialogues
        for message in dialogue["messages"]
        if "城市" in json.dumps(message.get("tools"), ensure_ascii=False)
    )
    call, history = model.chat(tokenizer, "北京今天天气怎么样？", [system], temperature=0)
    assert call == {"name": "get_weather", "parameters": {"city": "北京"}}
    result = json.dumps({"temperature": 25, "condition": "晴"}, ensure_ascii=False)
    answer, history = model.chat(tokenizer, result, history, role="observation", temperature=0)
    assert answer == "北京现在的天气是晴，气温25度。"
    assert [message["role"] for message in history] == ["system", "user", "assistant", "observation", "assistant"]


@pytest.mark.parametrize(
    ("telling", "asking", "answer"),
    [
        ("My name is Emma.", "What is my name?", "Your name is Emma."),
        ("My name is Jack.", "What is my name?", "Your name is Jack."),
        ("我叫小红。", "我叫什么名字？", "你叫小红。"),
        ("我住在上海。", "我住在哪里？", "你住在上海。"),
    ],
)
def test_remembers_with_and_without_the_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, telling: str, asking: str, answer: str
) -> None:
    _, history, cache = model.chat(tokenizer, telling, return_past_key_values=True, temperature=0)
    assert model.chat(tokenizer, asking, history, temperature=0)[0] == answer
    assert model.chat(tokenizer, asking, history, past_key_values=cache, temperature=0)[0] == answer


def test_keeps_answering_in_a_longer_conversation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    history: list[Any] = []
    answers = []
    for query in ("Hello!", "My name is Bob.", "What is the capital of France?", "中国的首都是哪里？", "谢谢"):
        answer, history = model.chat(tokenizer, query, history, temperature=0)
        answers.append(answer)
    assert answers[1:] == [
        "Nice to meet you, Bob!",
        "The capital of France is Paris.",
        "中国的首都是北京。",
        "不客气！",
    ]


def test_training_text_reaches_the_model_once_and_in_order(dialogues: list[dict[str, Any]]) -> None:
    conversations = train_tiny.join_dialogues(dialogues, random.Random(0))
    # Some get tools that they do not need, in a system message of their own.
    sizes = [
        sum(message["role"] != "system" for message in messages)
        for messages in (*conversations, *(dialogue["messages"] for dialogue in dialogues))
    ]
    assert sum(sizes[: len(conversations)]) == sum(sizes[len(conversations) :])
    only_first = {dialogue["messages"][0]["content"] for dialogue in dialogues if dialogue.get("first")}
    answers = {dialogue["messages"][1]["content"] for dialogue in dialogues if dialogue.get("first")}
    for conversation in conversations:
        assert not answers & {message["content"] for message in conversation[2:]}
        assert all(message["role"] != "system" for message in conversation[1:])
    assert only_first


def test_variations_keep_what_belongs_together(dialogues: list[dict[str, Any]]) -> None:
    variation, rng = train_tiny.Variation(dialogues), random.Random(0)
    tooled = [dialogue["messages"] for dialogue in dialogues if "tools" in dialogue["messages"][0]]
    changed = 0
    for messages in tooled:
        for _ in range(5):
            varied = variation.vary(messages, rng)
            offered = {tool["name"] for tool in varied[0]["tools"]}
            question = varied[1]["content"].lower()
            for message in varied:
                if message.get("metadata"):
                    assert message["metadata"] in offered
                    # A city or a number that is called with was asked for.
                    for word in re.findall(r"'(.+?)'|(\d+)", message["content"]):
                        assert "".join(word).lower() in question
            changed += varied[1:] != messages[1:]
    assert changed > 3 * len(tooled)


def test_only_answers_are_learnt(tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]]) -> None:
    # In longer dialogues the numbers are replaced.
    taught = {dialogue["messages"][-1]["content"] for dialogue in dialogues if len(dialogue["messages"]) <= 3}
    learnt: set[str] = set()
    stops = set(tokenizer.stop_token_ids())
    for batch in train_tiny.batches(dialogues, tokenizer, random.Random(0)):
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            kept = labels != -100
            assert torch.equal(labels[kept], ids[kept])
            assert int(labels[kept][-1]) in stops
            learnt.update(part.strip() for part in re.split(r"<\|\w+\|>", tokenizer.decode(labels[kept])))
    assert taught <= learnt


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.usefixtures("leave_the_auto_classes_alone")
def test_training_script_reports_an_untrained_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--epochs", "1", "--output", str(tmp_path)])
    # An untrained model never ends its answers, so a few must do.
    ask_all = train_tiny.wrong_answers
    monkeypatch.setattr(
        train_tiny, "wrong_answers", lambda model, tokenizer, taught: ask_all(model, tokenizer, taught[::40])
    )
    assert train_tiny.main() == 1
    assert "wrong answers" in capsys.readouterr().out
    # The vocabulary is the same in every run, and holds no path of the machine it was made on.
    assert (tmp_path / "tokenizer.model").read_bytes() == (BUNDLED / "tokenizer.model").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in BUNDLED.iterdir()} - {"README.md"}
