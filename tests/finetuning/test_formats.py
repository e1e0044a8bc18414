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
"""Fine-tuning: files as people have them, of the published scripts and of the tutorials, are read as they are."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from finetune_formats import FORMATS
from transformers import PreTrainedTokenizerBase

from .short_runs import ask, data_arguments, finetune, finetune_data, prepare, read_arguments, write_lines


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(*rows: Any) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=2).encode()


ADGEN = {"content": "类型#裤*版型#宽松*风格#性感", "summary": "宽松的阔腿裤这两年真的吸粉不少。"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OPENAI_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "北京"}'},
}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}],
}
QUESTION, ANSWER = {"role": "user", "content": "天气怎么样？"}, {"role": "assistant", "content": "晴天。"}


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


# A file as published, the format it has, and the first conversation in it.
FILES: dict[str, tuple[str, bytes, str, list[dict[str, Any]]]] = {
    # JSON lines under the name .json, as published.
    "AdvertiseGen": ("train.json", lines(ADGEN, ADGEN), "adgen", turns(ADGEN["content"], ADGEN["summary"])),
    "alpaca": (
        "alpaca_data.json",
        array(
            {"instruction": "Translate.", "input": "Hello", "output": "Bonjour"},
            {"instruction": "Name a color.", "input": "", "output": "Red"},
        ),
        "alpaca",
        turns("Translate.\nHello", "Bonjour"),
    ),
    "Belle": (
        "Belle_open_source_0.5M.json",
        lines({"instruction": "给出三个颜色。\n", "input": "", "output": "红、黄、蓝。"}),
        "alpaca",
        turns("给出三个颜色。\n", "红、黄、蓝。"),
    ),
    "ShareGPT": (
        "ShareGPT_V3.json",
        array(
            {
                "id": "a_0",
                "conversations": [
                    {"from": "gpt", "value": "…"},
                    {"from": "human", "value": "Hi!"},
                    {"from": "gpt", "value": "Hello."},
                    {"from": "human", "value": "Bye!"},
                ],
            }
        ),
        "sharegpt",
        turns("Hi!", "Hello.", "Bye!"),
    ),
    "ShareGPT with tools": (
        "glaive.json",
        array(
            {
                "system": "Help.",
                "tools": json.dumps([WEATHER]),
                "conversations": [
                    {"from": "human", "value": "天气怎么样？"},
                    {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "北京"}}'},
                    {"from": "observation", "value": "晴"},
                    {"from": "gpt", "value": "晴天。"},
                ],
            }
        ),
        "sharegpt",
        [
            {"role": "system", "content": "Help."},
            QUESTION,
            CALLED,
            {"role": "observation", "content": "晴"},
            ANSWER,
        ],
    ),
    "OpenAI": (
        "openai.jsonl",
        lines(
            {
                "messages": [
                    QUESTION,
                    {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
                    {"role": "tool", "tool_call_id": "call_1", "content": "晴"},
                    ANSWER,
                ],
                "tools": [WEATHER],
            }
        ),
        "messages",
        [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "晴"},
            ANSWER,
        ],
    ),
    "ChatGLM3": ("train.json", lines({"conversations": [QUESTION, ANSWER]}), "messages", [QUESTION, ANSWER]),
    "ChatGLM3 with tools": (
        "tool_alpaca.jsonl",
        lines(
            {
                "tools": [WEATHER["function"]],
                "conversations": [
                    {"role": "system", "content": "Help."},
                    QUESTION,
                    {"role": "assistant", "content": "Let me see."},
                    {"role": "tool", "name": "get_weather", "parameters": {"city": "北京"}, "observation": "晴"},
                    ANSWER,
                ],
            }
        ),
        "messages",
        [
            {"role": "system", "content": "Help."},
            QUESTION,
            {"role": "assistant", "content": "Let me see."},
            CALLED,
            {"role": "observation", "content": "晴"},
            ANSWER,
        ],
    ),
    "ptuning with history": (
        "chat.json",
        lines(
            {"prompt": "B", "response": "b", "history": [["A", "a"]]},
            {"prompt": "A", "response": "a", "history": []},
        ),
        "columns",
        turns("A", "a", "B", "b"),
    ),
    "byte-order mark": (
        "excel.csv",
        b"\xef\xbb\xbf" + '类型,content,summary\r\nx,"你好，\n世界",NA\r\n'.encode(),
        "adgen",
        turns("你好，\n世界", "NA"),
    ),
    "array with a byte-order mark": (
        "array.json",
        b"\xef\xbb\xbf" + array(ADGEN),
        "adgen",
        turns(ADGEN["content"], ADGEN["summary"]),
    ),
}


def write(folder: Path, name: str) -> str:
    file = folder / FILES[name][0]
    file.write_bytes(FILES[name][1])
    return str(file)


@pytest.mark.parametrize("name", FILES)
def test_files_are_read_as_published(tmp_path: Path, name: str) -> None:
    _, _, data_format, messages = FILES[name]
    sample = finetune_data.read_samples(write(tmp_path, name), data_arguments())[0]
    assert (sample.data_format, sample.messages) == (data_format, messages)
    named = finetune_data.read_samples(write(tmp_path, name), data_arguments(data_format=data_format))[0]
    assert named == sample


@pytest.mark.parametrize("name", FILES)
def test_the_bundled_model_learns_from_every_file(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    file = write(tmp_path, name)
    words = make_settings(train_file=file, max_steps=3, save_strategy="no", per_device_train_batch_size=1)
    assert finetune.main(words) == 0
    history = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["loss_history"]
    assert all(entry["loss"] > 0 for entry in history if "loss" in entry)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(file)]
    assert f"format {FILES[name][2]}, " in said
    # The answer as it is learnt, whatever else the line shows.
    answer = next(message for message in FILES[name][3] if message["role"] == "assistant" and message["content"])
    assert answer["content"] in re.sub(" …|↵", "\n", said)


def columns_of(rows: list[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


PAIRS = [{"prompt": f"{number}?", "response": f"{number}!", "history": '[["a", "b"]]'} for number in range(3)]
# Arrow gives each of these two the arguments of the other.
CALLS = [
    {"messages": [{**ask("a", "b")["messages"][0]}, {"role": "assistant", "tool_calls": [{"function": function}]}]}
    for function in ({"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "2"}})
]


def test_every_kind_of_file_holds_the_same(tmp_path: Path) -> None:
    records = [{**row, "history": json.loads(row["history"])} for row in PAIRS]
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "a.jsonl", records[:1])
    (folder / "b.json").write_bytes(array(*records[1:]))
    (folder / "README.md").write_text("# Data\n", encoding="utf-8")
    (tmp_path / "c.csv").write_bytes(columns_of(PAIRS))
    table = datasets.Dataset.from_list(records)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "split")
    expected = [turns("a", "b", row["prompt"], row["response"]) for row in PAIRS]
    for name in ("folder", "c.csv", "d.parquet", "saved", "split"):
        samples = finetune_data.read_samples(str(tmp_path / name), data_arguments())
        assert [sample.messages for sample in samples] == expected, name
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"several splits; name one of .*two/test, .*two/train"):
        finetune_data.read_samples(str(tmp_path / "two"), data_arguments())
    # As ADGEN comes.
    (folder / "a.jsonl").rename(folder / "train.json")
    (folder / "b.json").rename(folder / "dev.json")
    with pytest.raises(ValueError, match=r"several splits; name one of .*/dev.json, .*/train.json"):
        finetune_data.read_samples(str(folder), data_arguments())


def test_tables_lend_no_arguments_to_other_calls(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(CALLS)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        samples = finetune_data.read_samples(str(tmp_path / name), data_arguments())
        assert [sample.messages for sample in samples] == [row["messages"] for row in CALLS]


def test_columns_that_nobody_reads_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_settings: Callable[..., list[str]]
) -> None:
    said: list[str] = []
    monkeypatch.setattr(finetune_data.logger, "warning", said.append)
    rows = [
        {"messages": [{**message, "weight": 0} for message in ask("a", "b")["messages"]], "source": "web"},
        {**ask("c", "d"), "id": 7},
    ]
    file = write_lines(tmp_path / "a.jsonl", rows)
    prepare(make_settings(train_file=file, prompt_column="question"))
    assert [line for line in said if line.startswith(file)] == [
        f"{file}: nobody reads id, messages[].weight, source",
        f"{file}: prompt_column: not used by the format messages",
    ]


def test_the_first_example_is_shown_as_the_model_sees_it(
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    samples = finetune_data.read_samples(write_lines(tmp_path / "a", [ask("a\nb", "word " * 300)]), data_arguments())
    tokenizer = case_tokenizer("chatglm3")
    (row,), _ = finetune_data.encode_samples(samples, tokenizer, data_arguments())
    shown = finetune_data.show_row(row, tokenizer, width=10_000)
    assert "\n" not in shown
    before, _, learnt = shown.partition("⟦")
    assert "<|user|>" in before and "a↵b" in before and before.endswith("<|assistant|>")
    assert learnt.count("word") == 300 and learnt.endswith("</s>⟧")
    assert len(finetune_data.show_row(row, tokenizer)) < 410


def test_a_second_run_reads_what_the_first_encoded(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_lines(tmp_path / "many.jsonl", [ask(f"{number}?", f"{number}!" * 9) for number in range(400)])
    seconds, said = [], []
    for _ in range(2):
        job = prepare(make_settings(train_file=file, packing=True))
        seconds.append(job.counts["train_encoding_seconds"])
        said.append(capsys.readouterr().out)
        rows = job.trainer.train_dataset[:]
    assert "encoded in" in said[0] and "read from the cache in" in said[1]
    assert seconds[1] < 0.5 * seconds[0]
    # Another setting, or another text, is encoded.
    prepare(make_settings(train_file=file, packing=True, max_length=256))
    assert "encoded in" in capsys.readouterr().out
    samples = finetune_data.read_samples(file, job.data)
    fresh, _ = finetune_data.encode_samples(samples, job.trainer.processing_class, job.data)
    assert finetune_data.pack_rows(fresh, job.data.max_length)[:] == rows


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "array": ("a.json", b'[{"prompt": "a",\n"response": }]', r"a.json:2: the array is not JSON"),
    "spread object": ("a.json", b'{\n"prompt": "a"}', r"a.json:1: this line is not JSON.*one object in a line"),
    "no objects": ("a.json", b"[[1]]", r"a.json: element 1: a row must be a JSON object, got list"),
    "gbk": ("a.csv", "prompt,response\n你好,你好\n".encode("gbk"), r"a.csv is not UTF-8 .*iconv -f gb18030"),
    "fields": ("a.csv", b"prompt,response\na,b,c\n", r"a.csv:2: the row has not as many fields as the header \(2\)"),
    "quotes": ("a.csv", b'prompt,response\na,"b\n', r"a.csv:\d: this is not CSV"),
    "history": ("a.csv", b"prompt,response,history\na,b,c\n", r"a.csv:2: 'history' holds text that is not JSON"),
    "pairs": ("a.json", lines({"prompt": "a", "response": "b", "history": [1]}), "must hold .question, answer. pairs"),
    "parquet": ("a.parquet", b"PAR1", r"a.parquet is damaged, or no Parquet file"),
    "from": ("a.json", lines({"conversations": [{"from": "me", "value": "a"}]}), r"a.json:1: a turn is `from` 'me'"),
    "value": ("a.json", lines({"conversations": [{"from": "human", "value": 1}]}), r"must be text, got 1"),
    "call": (
        "a.json",
        lines({"conversations": [{"from": "function_call", "value": "{}"}]}),
        "a function_call needs a `name`",
    ),
    "tools": ("a.json", lines({**ask("a", "b"), "tools": "x"}), r"a.json:1: 'tools' holds text that is not JSON"),
    "another format": (
        "a.json",
        lines(ADGEN, {"prompt": "a", "response": "b"}),
        r"a.json:2: of the columns .*adgen, \['content', 'summary'\] are missing",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_cannot_be_read(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    assert finetune.main(make_settings(train_file=str(tmp_path / file))) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: train_file: ")
    assert re.search(message, error)


def test_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds neither a saved data set nor files of .json, "):
        finetune_data.read_samples(str(tmp_path), data_arguments())


def test_the_format_can_be_named(make_settings: Callable[..., list[str]]) -> None:
    for name in FORMATS:
        assert read_arguments([*make_settings(), f"--data_format={name}"])[1].data_format == name
