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
"""Fine-tuning: what of a file of conversations is learnt, and what files are refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .short_runs import RECORDS, ask, data_arguments, finetune, finetune_data, prepare, write_lines


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_only_answers_are_learnt(
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path, name: str
) -> None:
    tokenizer = case_tokenizer(name)
    file = write_lines(tmp_path / "data.jsonl", [ask("你好", "我是")])
    (row,), _ = finetune_data.encode_samples(
        finetune_data.read_samples(file, data_arguments()), tokenizer, data_arguments()
    )
    learnt = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learnt, skip_special_tokens=True).strip() == "我是"
    assert learnt[-1] in tokenizer.stop_token_ids()
    assert all(label in (token, -100) for token, label in zip(row["input_ids"], row["labels"]))


TOOLS = [{"name": "get_weather", "description": "weather", "parameters": {"type": "object", "properties": {}}}]
CALL = "```python\ntool_call(city='Paris')\n```"
TOOL_TURNS = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "metadata": "get_weather", "content": CALL},
    {"role": "observation", "content": '{"sun": 1}'},
    {"role": "assistant", "content": "Sun."},
]
OPENAI_CALL = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
SYSTEM = {"role": "system", "content": "Help."}
FORMS = {
    "published": {"messages": [SYSTEM | {"tools": TOOLS}, *TOOL_TURNS]},
    "tools beside": {"conversations": [SYSTEM, *TOOL_TURNS], "tools": TOOLS},
    "chatglm3 demo": {
        "tools": TOOLS,
        "conversations": [
            SYSTEM,
            TOOL_TURNS[0],
            {"role": "tool", "name": "get_weather", "parameters": {"city": "Paris"}, "observation": {"sun": 1}},
            TOOL_TURNS[3],
        ],
    },
    "openai": {
        "tools": [{"type": "function", "function": TOOLS[0]}],
        "messages": [
            SYSTEM,
            TOOL_TURNS[0],
            {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
            {"role": "tool", "content": '{"sun": 1}'},
            TOOL_TURNS[3],
        ],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_gives_the_same_ids(
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path, form: str
) -> None:
    tokenizer, arguments = case_tokenizer("chatglm3"), data_arguments()
    samples = finetune_data.read_samples(write_lines(tmp_path / "data.jsonl", [FORMS[form]]), arguments)
    (row,), _ = finetune_data.encode_samples(samples, tokenizer, arguments)
    expected = tokenizer.apply_chat_template(FORMS["published"]["messages"], return_assistant_tokens_mask=True)
    assert row["input_ids"] == expected["input_ids"]
    assert [int(label != -100) for label in row["labels"]] == expected["assistant_masks"]
    question, answer = finetune_data.question_and_answer(samples[0], tokenizer)
    assert question + answer == row["input_ids"]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "Sun."


def test_columns_of_any_name(case_tokenizer: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path) -> None:
    tokenizer = case_tokenizer("chatglm2")
    record = {"content": "你好", "summary": "我是", "old": [["a", "b"]]}
    arguments = data_arguments(prompt_column="content", response_column="summary", history_column="old")
    samples = finetune_data.read_samples(write_lines(tmp_path / "data.jsonl", [record]), arguments)
    (row,), _ = finetune_data.encode_samples(samples, tokenizer, arguments)
    prompt = tokenizer.build_chat_input("你好", history=[("a", "b")])["input_ids"][0].tolist()
    assert row["input_ids"][: len(prompt)] == prompt
    assert finetune_data.question_and_answer(samples[0], tokenizer)[0] == prompt
    learnt = tokenizer.decode([token for token in row["labels"] if token != -100], skip_special_tokens=True)
    assert learnt.replace(" ", "") == "b我是"


def rows_of(tokenizer: PreTrainedTokenizerBase, *lengths: int) -> list[dict[str, list[int]]]:
    samples = [finetune_data.Sample("", ask("你好" * length, "我是" * length)["messages"]) for length in lengths]
    return finetune_data.encode_samples(samples, tokenizer, data_arguments())[0]


@pytest.mark.floor
def test_packed_samples_do_not_see_each_other(
    case_model: Callable[[str], PreTrainedModel], case_tokenizer: Callable[[str], PreTrainedTokenizerBase]
) -> None:
    model, tokenizer = case_model("chatglm3"), case_tokenizer("chatglm3")
    rows = rows_of(tokenizer, 3, 1, 2, 4)
    lengths = [len(row["input_ids"]) for row in rows]
    packed = finetune_data.pack_rows(rows, max_length=sum(lengths[:2]))
    assert [len(row["input_ids"]) for row in packed] == [sum(lengths[:2]), lengths[2], lengths[3]]
    batch = finetune_data.PaddingCollator(tokenizer.pad_token_id)(packed)
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits
        alone = [model(torch.tensor([row["input_ids"]])).logits[0] for row in rows]
        first, second = together[0, : lengths[0]], together[0, lengths[0] : sum(lengths[:2])]
        for logits, expected in zip((first, second, together[1, : lengths[2]]), alone):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    learnt = [label for row in rows for label in row["labels"] if label != -100]
    assert [label for label in batch["labels"].flatten().tolist() if label != -100] == learnt


@pytest.mark.parametrize("name", ["chatglm1", "chatglm3"])
def test_a_batch_has_the_loss_of_its_samples(
    case_model: Callable[[str], PreTrainedModel], case_tokenizer: Callable[[str], PreTrainedTokenizerBase], name: str
) -> None:
    model, tokenizer = case_model(name), case_tokenizer(name)
    rows = rows_of(tokenizer, 1, 3)
    counts = [sum(label != -100 for label in row["labels"]) for row in rows]
    batch = finetune_data.PaddingCollator(tokenizer.pad_token_id)(rows)
    assert (batch["labels"][0, len(rows[0]["input_ids"]) :] == -100).all()
    with torch.no_grad():
        together = model(**batch).loss
        alone = []
        for row in rows:
            # The layout of the tokenizer: for ChatGLM-6B two rows of positions, and its mask.
            inputs = tokenizer.pad({"input_ids": [row["input_ids"]]}, return_tensors="pt")
            alone.append(model(**inputs, labels=torch.tensor([row["labels"]])).loss)
    expected = sum(loss * count for loss, count in zip(alone, counts)) / sum(counts)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)


def test_long_samples_are_cut_and_counted(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    long = ask("Hi!", "a very long answer " * 30)
    file = write_lines(tmp_path / "long.jsonl", [*RECORDS, long])
    assert finetune.main(make_settings(train_file=file, max_length=40, max_steps=1)) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["train_truncated"], metrics["train_samples"]) == (1, 9)
    with pytest.raises(ValueError, match=r"long.jsonl:9: \d+ tokens are more than max_length=40"):
        prepare(make_settings(train_file=file, max_length=40, too_long="refuse", output_dir=str(tmp_path / "other")))


BAD_DATA = {
    "empty": ([], "holds no samples"),
    "columns": (
        [{"question": "a", "answer": "b"}],
        r"\['prompt', 'response'\] are missing; found \['answer', 'question'\]",
    ),
    "no text": ([{"prompt": 1, "response": "b"}], "the column 'prompt' must hold text"),
    "not a list": ([{"messages": "hi"}], "must be a list of messages \\(objects\\), got 'hi'"),
    "no object": (["hi"], "must be a JSON object"),
    "role": ([*RECORDS, {"messages": [{"role": "robot", "content": "hi"}]}], ":9: .* has the role 'robot'"),
    "no answer": (
        [{"messages": [{"role": "user", "content": "hi"}]}],
        ":1: nothing to learn, since there is no answer",
    ),
    "cut answer": ([ask("word " * 200, "b")], ":1: nothing to learn, since max_length=64 cuts off the whole answer"),
    "empty answer": ([{"prompt": "a", "response": "b", "history": [["c", ""]]}], ":1: an answer is empty"),
    "empty parts": (
        [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "text", "text": ""}]},
                ]
            }
        ],
        ":1: an answer is empty",
    ),
    "blank answer": ([ask("a", " \n")], ":1: an answer is empty"),
    "no tool": ([{"messages": [{"role": "tool", "observation": "x"}]}], "needs the `name` of the tool"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    records, message = BAD_DATA[name]
    file = write_lines(tmp_path / "bad.jsonl", records)
    assert finetune.main(make_settings(train_file=file, max_length=64)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_line_that_is_not_json(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(RECORDS[0]) + "\n{'a': 1}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad.jsonl:2: this line is not JSON"):
        prepare(make_settings(train_file=str(tmp_path / "bad.jsonl")))


BAD_QUESTIONS = {
    "none": (
        {"messages": [{"role": "assistant", "content": "hi"}]},
        "error: generate_samples: .*eval.jsonl:1: nothing asks for the answer",
    ),
    "too long": (
        {
            "messages": [
                *ask("a", "b")["messages"],
                {"role": "user", "content": "word " * 600},
                {"role": "assistant", "content": "c"},
            ]
        },
        r"error: generate_samples: .*eval.jsonl:1: \d+ tokens come before the last answer, and the model has 1024",
    ),
}


@pytest.mark.parametrize("name", BAD_QUESTIONS)
def test_eval_samples_that_cannot_be_asked(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    record, message = BAD_QUESTIONS[name]
    file = write_lines(tmp_path / "eval.jsonl", [record])
    assert finetune.main(make_settings(eval_file=file, max_length=64)) == 2
    assert re.search(message, capsys.readouterr().err)
    # Their loss can be measured.
    words = make_settings(eval_file=file, max_length=64, generate_samples=0, max_steps=1, save_strategy="no")
    assert finetune.main(words) == 0
