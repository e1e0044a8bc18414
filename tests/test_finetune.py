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
"""Fine-tuning: what is learnt, what a run leaves behind, what it refuses, and that it goes on where it was stopped."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from transformers.models.auto import configuration_auto, modeling_auto, tokenization_auto
from transformers.utils import logging


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
CONFIGS = EXAMPLES / "configs"
BUNDLED = EXAMPLES / "tiny-chatglm3"
METHODS = ("full", "lora", "adalora", "ptuning")
LEARNING_RATES = {"full": 2e-3, "lora": 2e-2, "adalora": 5e-2, "ptuning": 5e-2}

sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
import finetune_data  # noqa: E402
import finetune_report  # noqa: E402
import inject_knowledge  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def leave_the_auto_classes_alone() -> Iterator[None]:
    """The example registers this repository's classes, which other tests load as remote code."""
    with pytest.MonkeyPatch.context() as patch:
        mappings = (
            configuration_auto.CONFIG_MAPPING,
            modeling_auto.MODEL_MAPPING,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
            tokenization_auto.TOKENIZER_MAPPING,
        )
        for mapping in mappings:
            patch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
        classes = dict(tokenization_auto.REGISTERED_TOKENIZER_CLASSES)
        patch.setattr(tokenization_auto, "REGISTERED_TOKENIZER_CLASSES", classes)
        yield


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def ask(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


COLORS = ["red", "blue", "green", "black", "white", "yellow", "brown", "grey"]
# New to the model, so that there is something to learn.
RECORDS = [ask(f"What color is number {index}?", f"It is {color}.") for index, color in enumerate(COLORS)]


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a short run; the output folder is `tmp_path / "out"` unless named."""
    train_file = write_lines(tmp_path / "train.jsonl", RECORDS)

    def settings(method: str = "lora", **changes: Any) -> list[str]:
        values = {
            "model": str(BUNDLED),
            "method": method,
            "train_file": train_file,
            "output_dir": str(tmp_path / "out"),
            "pre_seq_len": 8,
            "target_modules": ["all-linear"],
            "learning_rate": LEARNING_RATES.get(method, 1e-3),
            "max_steps": 10,
            "save_steps": 5,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "disable_tqdm": True,
        }
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
        return [str(file)]

    return settings


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """Call the program's `main` with a command line."""

    def call(words: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *words])
        return finetune.main()

    return call


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["loss_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def prepare(words: list[str]) -> finetune.Job:
    return finetune.prepare(*finetune.read_arguments(words))


def data_arguments(**changes: Any) -> finetune_data.DataArguments:
    return finetune_data.DataArguments(**{"train_file": "", **changes})


# What is learnt.


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


def test_long_samples_are_cut_and_counted(
    run: Callable[[list[str]], int], make_settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    long = ask("Hi!", "a very long answer " * 30)
    file = write_lines(tmp_path / "long.jsonl", [*RECORDS, long])
    assert run(make_settings(train_file=file, max_length=40, max_steps=1)) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["train_truncated"], metrics["train_samples"]) == (1, 9)
    with pytest.raises(ValueError, match=r"long.jsonl:9: \d+ tokens are more than max_length=40"):
        prepare(make_settings(train_file=file, max_length=40, too_long="refuse", output_dir=str(tmp_path / "other")))


# What a run leaves behind.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[finetune.Job, str]]:
    """A run of every method on 4 records, and what its model answers to the first."""
    jobs = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        file = write_lines(folder / "data.jsonl", RECORDS[:4])
        settings = f"--model={BUNDLED} --method={method} --train_file={file} --eval_file={file} --pre_seq_len=8"
        settings += f" --target_modules all-linear --learning_rate={LEARNING_RATES[method]} --output_dir={folder}/out"
        settings += " --max_steps=40 --logging_steps=1 --eval_strategy=steps --eval_steps=20 --save_steps=20"
        settings += " --per_device_train_batch_size=4 --use_cpu=true --disable_tqdm=true"
        job = prepare(settings.split())
        finetune.train(job)
        (answer,) = finetune_report.generate_answers(
            job.trainer.model, job.trainer.processing_class, job.samples[:1], max_new_tokens=32
        )
        jobs[method] = job, answer.answer
    return jobs


@pytest.mark.floor
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_reports(finished: dict[str, tuple[finetune.Job, str]], method: str) -> None:
    job, answer = finished[method]
    folder = Path(job.trainer.args.output_dir)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert losses(folder)[-1] < 0.7 * losses(folder)[0]
    assert len(losses(folder)) == metrics["steps"] == 40
    assert metrics["config"]["method"] == method
    assert metrics["tokens_per_second"] > 0
    assert metrics["eval"]["eval_loss"] > 0
    assert metrics["answers"]["after"]["rougeL"] > metrics["answers"]["before"]["rougeL"]
    assert set(metrics["answers"]["after"]) == {"rouge1", "rouge2", "rougeL", "bleu", "exact"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "samples.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 4
    assert answer in table[2]
    assert (metrics["trainable_parameters"] == metrics["parameters"]) == (method == "full")


@pytest.mark.parametrize("method", METHODS)
def test_nothing_else_is_trained(finished: dict[str, tuple[finetune.Job, str]], method: str) -> None:
    model = finished[method][0].trainer.model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    marks = {"full": "", "lora": "lora_", "adalora": "lora_", "ptuning": "prefix_encoder"}
    assert trained == {name for name, _ in model.named_parameters() if marks[method] in name}


def test_adalora_moves_ranks(finished: dict[str, tuple[finetune.Job, str]]) -> None:
    model = finished["adalora"][0].trainer.model
    config = model.peft_config["default"]
    ranks = {name: sum(kept) for name, kept in config.rank_pattern.items()}
    assert config.total_step == 40
    # 16 linear layers: rank 12 in each at first, 8 in the mean at the end, and not the same everywhere.
    assert len(ranks) == 16
    assert sum(ranks.values()) == 8 * 16
    assert len(set(ranks.values())) > 1


RELOAD = """
import sys
import peft
from transformers import AutoModel, AutoTokenizer

base, full, lora, adalora, ptuning, question = sys.argv[1:]
def load(folder, **settings):
    return AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32", **settings)
tokenizer = AutoTokenizer.from_pretrained(full, trust_remote_code=True)
prefixed = load(base, pre_seq_len=8)
prefixed.load_prefix_encoder(ptuning)
adapters = [peft.PeftModel.from_pretrained(load(base), folder) for folder in (lora, adalora)]
for model in (load(full), *adapters, prefixed):
    print("answer:", model.eval().chat(tokenizer, question, temperature=0, max_new_tokens=32)[0])
"""


def test_the_result_answers_the_same_in_a_new_process(
    finished: dict[str, tuple[finetune.Job, str]], tmp_path: Path, copy_code: Callable[[Path], None]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in BUNDLED.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    copy_code(base)
    folders = [job.trainer.args.output_dir for job, _ in finished.values()]
    question = RECORDS[0]["messages"][0]["content"]
    command = [sys.executable, "-c", RELOAD, str(base), *folders, question]
    output = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert output.returncode == 0, output.stderr
    answers = re.findall(r"^answer: (.*)$", output.stdout, flags=re.MULTILINE)
    assert answers == [answer for _, answer in finished.values()]


def test_an_adapter_is_trained_on(
    finished: dict[str, tuple[finetune.Job, str]],
    run: Callable,
    make_settings: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    for method in ("lora", "ptuning"):
        job, out = finished[method][0], tmp_path / method
        settings = make_settings(
            method,
            adapter=job.trainer.args.output_dir,
            train_file=job.data.train_file,
            max_steps=2,
            output_dir=str(out),
        )
        assert run(settings) == 0
        # It begins where the other run ended.
        assert losses(out)[0] < 1.5 * losses(Path(job.trainer.args.output_dir))[-1]


def test_scores_count_chinese_by_characters() -> None:
    answers = [
        finetune_report.Answer("", "我爱北京", "我爱南京"),
        finetune_report.Answer("", "Hello World", "hello world"),
    ]
    scores = finetune_report.score_answers(answers)
    assert scores["rouge1"] == 87.5
    assert scores["exact"] == 0
    assert finetune_report.score_answers([finetune_report.Answer("", "我爱北京", "我爱北京")])["bleu"] == 100


# Precision and memory.


@pytest.mark.parametrize("method", ["full", "lora", "ptuning"])
def test_bfloat16_and_gradient_checkpointing(
    run: Callable, make_settings: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    settings = make_settings(method, dtype="bfloat16", gradient_checkpointing=True, bf16=True)
    job = prepare(settings)
    assert {weight.dtype for weight in job.trainer.model.parameters() if weight.requires_grad} == {
        torch.bfloat16 if method == "full" else torch.float32
    }
    assert {weight.dtype for weight in job.trainer.model.parameters() if not weight.requires_grad} <= {torch.bfloat16}
    assert run(settings) == 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


def test_gradient_checkpointing_changes_no_loss(
    run: Callable, make_settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    for method in ("lora", "ptuning"):
        found = []
        for checkpointing in (False, True):
            out = tmp_path / f"{method}{checkpointing}"
            settings = make_settings(
                method, gradient_checkpointing=checkpointing, output_dir=str(out), max_steps=4, learning_rate=1e-3
            )
            assert run(settings) == 0
            found.append(losses(out))
        # The prefix has a dropout, drawn twice or once.
        assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("method", ["lora", "adalora", "ptuning"])
def test_on_quantized_weights(
    run: Callable, make_settings: Callable[..., list[str]], tmp_path: Path, method: str, dtype: str
) -> None:
    assert run(make_settings(method, dtype=dtype)) == 0
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]


# What is refused.

BAD_SETTINGS = {
    "method": ({"method": "lorra"}, "argument --method: invalid choice: 'lorra'"),
    "key": ({"lerning_rate": 1}, "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
    "value": ({"lora_rank": "many"}, "argument --lora_rank"),
    "folder": ({"model": "nowhere"}, "nowhere is not a checkpoint folder"),
    "quantized": ({"method": "full", "dtype": "int4"}, "use lora"),
    "half": ({"method": "full", "dtype": "float16"}, "float16 is too coarse"),
    "ranks": ({"method": "adalora", "lora_rank": 12}, "adalora_initial_rank: must be more than lora_rank=12"),
    "packed prefix": ({"method": "ptuning", "packing": True}, "packing: ptuning"),
    "evaluation": ({"eval_strategy": "steps"}, "eval_strategy: there is no eval_file"),
    "no data": ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
    "no adapter": ({"adapter": "nowhere"}, "nowhere has no adapter_model.safetensors"),
    "no checkpoint": ({"resume": "nowhere"}, "nowhere cannot be used: there is no such folder"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(
    run: Callable,
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    changes, message = BAD_SETTINGS[name]
    assert run(make_settings(**changes)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


BAD_DATA = {
    "empty": ([], "holds no samples"),
    "columns": (
        [{"question": "a", "answer": "b"}],
        r"\['prompt', 'response'\] are missing; found \['answer', 'question'\]",
    ),
    "no text": ([{"prompt": 1, "response": "b"}], "the column 'prompt' must hold text"),
    "not a list": ([{"messages": "hi"}], "must be a list of messages \\(objects\\), got 'hi'"),
    "no object": (["hi"], "must hold a JSON object"),
    "role": ([*RECORDS, {"messages": [{"role": "robot", "content": "hi"}]}], ":9: .* has the role 'robot'"),
    "no answer": (
        [{"messages": [{"role": "user", "content": "hi"}]}],
        ":1: nothing to learn, since there is no answer",
    ),
    "cut answer": ([ask("word " * 200, "b")], ":1: nothing to learn, since max_length=64 cuts off the whole answer"),
    "no tool": ([{"messages": [{"role": "tool", "observation": "x"}]}], "needs the `name` of the tool"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(
    run: Callable,
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
) -> None:
    records, message = BAD_DATA[name]
    file = write_lines(tmp_path / "bad.jsonl", records)
    assert run(make_settings(train_file=file, max_length=64)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_line_that_is_not_json(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(RECORDS[0]) + "\n{'a': 1}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad.jsonl:2: this line is not JSON"):
        prepare(make_settings(train_file=str(tmp_path / "bad.jsonl")))


def test_chatglm_6b_is_not_packed(
    make_settings: Callable[..., list[str]], reference_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="packing: ChatGLM-6B"):
        prepare(make_settings(model=str(reference_dir / "chatglm1"), packing=True))


def test_adapters_of_other_models(
    finished: dict[str, tuple[finetune.Job, str]],
    make_settings: Callable[..., list[str]],
    reference_dir: Path,
    tmp_path: Path,
) -> None:
    adapter = finished["lora"][0].trainer.args.output_dir
    with pytest.raises(ValueError, match="was made for chatglm3, and .* is glm4"):
        prepare(make_settings(model=str(reference_dir / "glm4"), adapter=adapter))
    with pytest.raises(ValueError, match=r"is of another model: .* is \d+ wide there, \d+ here"):
        prepare(make_settings(model=str(reference_dir / "chatglm3"), adapter=adapter))
    adapter = finished["adalora"][0].trainer.args.output_dir
    with pytest.raises(ValueError, match="was made by adalora, and the method is lora"):
        prepare(make_settings(adapter=adapter))
    with pytest.raises(ValueError, match="merge it into the checkpoint first"):
        prepare(make_settings("adalora", adapter=adapter))


def test_results_are_not_written_over(run: Callable, make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    assert run(make_settings()) == 2


def test_the_command_line_wins(make_settings: Callable[..., list[str]]) -> None:
    model, _, run_arguments = finetune.read_arguments([*make_settings(), "--lora_rank", "3", "--learning_rate", "0.5"])
    assert (model.lora_rank, run_arguments.learning_rate, run_arguments.max_steps) == (3, 0.5, 10)


def test_values_of_a_file(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    words = make_settings(gradient_checkpointing_kwargs={"use_reentrant": True}, adapter=None, packing=True)
    with (tmp_path / "settings.yaml").open("a", encoding="utf-8") as file:
        # Which YAML takes for a truth value and for text.
        file.write("eval_strategy: no\nweight_decay: 1e-2\n")
    model, data, run_arguments = finetune.read_arguments(words)
    assert run_arguments.gradient_checkpointing_kwargs == {"use_reentrant": True}
    assert (run_arguments.eval_strategy, run_arguments.weight_decay) == ("no", 0.01)
    assert (model.adapter, model.target_modules, data.packing) == (None, ["all-linear"], True)


def test_interrupted(run: Callable, make_settings: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune.FinetuneTrainer, "train", interrupt)
    assert run(make_settings()) == 130


# Going on.


@pytest.mark.floor
@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(
    run: Callable, make_settings: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    assert run(make_settings(method)) == 0
    expected = losses(tmp_path / "out")
    whole = json.loads((tmp_path / "out" / "checkpoint-10" / "trainer_state.json").read_text(encoding="utf-8"))
    (tmp_path / "out" / "checkpoint-10" / "trainer_state.json").unlink()
    assert run([*make_settings(method), "--resume=auto"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    again = json.loads((tmp_path / "out" / "checkpoint-10" / "trainer_state.json").read_text(encoding="utf-8"))
    assert again["num_input_tokens_seen"] == whole["num_input_tokens_seen"]
    # A run that has ended has nothing left to do.
    assert run([*make_settings(method), "--resume=auto"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)


KILLED = """
import os, signal, sys
import finetune
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

job = finetune.prepare(*finetune.read_arguments(sys.argv[1:]))
job.trainer.add_callback(Kill())
finetune.train(job)
"""


def test_killed_and_resumed_in_a_new_process(
    run: Callable, make_settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *make_settings()], cwd=EXAMPLES, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert prepare([*make_settings(), "--resume=auto"]).checkpoint.name == "checkpoint-5"
    assert run([*make_settings(), "--resume=auto"]) == 0
    assert run([*make_settings(), f"--output_dir={tmp_path / 'whole'}"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]
        )


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_damaged_checkpoints_are_found(
    run: Callable,
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    method: str,
) -> None:
    assert run(make_settings(method)) == 0
    folder = tmp_path / "out" / "checkpoint-10"
    assert finetune.check_checkpoint(folder, method) is None
    files = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    files += ["adapter_model.safetensors"] if method == "lora" else [finetune.OWN_STATE]
    for name in files:
        whole = (folder / name).read_bytes()
        # A number changed in a safetensors file cannot be told from a number.
        changes = [] if name.endswith((".json", ".safetensors")) else ["changed"]
        for kind in ["missing", "cut off", "empty", *changes]:
            if (kind, name) == ("missing", "rng_state.pth"):
                continue
            damage(folder / name, kind)
            assert name in (finetune.check_checkpoint(folder, method) or ""), (kind, name)
            (folder / name).write_bytes(whole)


def test_damaged_checkpoints_are_passed_over(
    run: Callable, make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(make_settings()) == 0
    expected = losses(tmp_path / "out")
    damage(tmp_path / "out" / "checkpoint-10" / "optimizer.pt", "cut off")
    capsys.readouterr()
    assert run([*make_settings(), f"--resume={tmp_path / 'out' / 'checkpoint-10'}"]) == 2
    assert "checkpoint-10 cannot be used: optimizer.pt is damaged" in capsys.readouterr().err
    assert prepare([*make_settings(), "--resume=auto"]).checkpoint.name == "checkpoint-5"
    named = tmp_path / "out" / "checkpoint-5"
    assert prepare([*make_settings(), f"--resume={named}"]).checkpoint == named
    assert run([*make_settings(), "--resume=auto"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)


# Several processes.


def launch(words: list[str], num_processes: int) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines=1",
        "--mixed_precision=no",
    ]
    command += [f"--num_processes={num_processes}", "--dynamo_backend=no", str(EXAMPLES / "finetune.py"), *words]
    # `--cpu` would ask for MPI; this way the processes are torchrun's, and `use_cpu` makes them talk through gloo.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert output.returncode == 0, output.stderr


@pytest.mark.slow
def test_two_processes_equal_one_with_the_batch_of_both(
    run: Callable, make_settings: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert run(make_settings(per_device_train_batch_size=8)) == 0
    launch([*make_settings(per_device_train_batch_size=4), f"--output_dir={tmp_path / 'two'}"], num_processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "out"), rel=1e-4)


SHARDED = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

sys.path.insert(0, sys.argv[1])
from local_code import register

register()
dist.init_process_group("gloo")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
for layer in model.transformer.encoder.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.arange(5, 69).view(4, 16)[dist.get_rank() * 2 :][:2]
losses = []
for _ in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total := loss.detach().clone())
    losses.append(total.item() / 2)
if dist.get_rank() == 0:
    print("losses:", json.dumps(losses))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_equals_whole(chatglm: Any, tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "sharded.py"), str(EXAMPLES), str(BUNDLED)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    output = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=600)
    assert output.returncode == 0, output.stderr
    sharded = json.loads(re.search(r"losses: (.*)", output.stdout)[1])
    model = chatglm.ChatGLMForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(5, 69).view(4, 16)
    whole = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        whole.append(loss.item())
    assert whole[-1] < whole[0]
    assert sharded == pytest.approx(whole, rel=1e-4)


# The shipped settings.


@pytest.mark.parametrize("method", METHODS)
def test_shipped_settings_run(run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = [f"examples/configs/{method}.yaml", f"--output_dir={tmp_path / 'out'}", "--max_steps=2", "--use_cpu=true"]
    assert run(words) == 0
    assert finetune.read_arguments([words[0]])[0].method == method


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_accelerate_reads_the_shipped_settings(chatglm: Any, name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    known = {name for action in launch_command_parser()._actions for name in action.option_strings}
    for key in [*config.fsdp_config, *config.deepspeed_config]:
        assert f"--{key}" in known
    layer = config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap")
    assert layer in (None, *chatglm.ChatGLMForConditionalGeneration._no_split_modules)
    assert (layer is not None) == (name == "fsdp")


def test_deepspeed_settings_fit_the_trainer(make_settings: Callable[..., list[str]], chatglm: Any) -> None:
    launcher = load_config_from_file(str(CONFIGS / "zero3.yaml")).deepspeed_config
    # The library's checks stand on Accelerate's class, but are out of reach without the package deepspeed.
    checks = {name: value for name, value in vars(HfTrainerDeepSpeedConfig).items() if not name.startswith("__")}
    config = type("Config", (HfDeepSpeedConfig,), checks)(str(REPOSITORY / launcher["deepspeed_config_file"]))
    config._dtype, config.mismatches = None, []
    assert config.is_zero3()
    _, _, arguments = finetune.read_arguments(make_settings("full"))
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, chatglm.ChatGLMForConditionalGeneration.from_pretrained(BUNDLED), 10)
    # Nothing is left to a guess, and nothing contradicts the Trainer.
    assert "auto" not in json.dumps(config.config)
    assert config.get_value("train_micro_batch_size_per_gpu") == 4


# Knowledge, and other trainers.


def test_one_fact_is_learnt_and_the_rest_is_kept() -> None:
    logging.set_verbosity_error()
    question, fact = inject_knowledge.QUESTION, inject_knowledge.FACT
    before, after, num_rehearsed = inject_knowledge.inject(question, fact, 0, 60, 2e-2)
    assert before[0].answer != fact
    assert after[0].answer == fact
    assert num_rehearsed == 0
    kept = sum(old.answer == new.answer for old, new in zip(before[1:], after[1:]))
    assert kept >= 0.98 * len(before[1:])


@pytest.mark.slow
def test_sft_trainer_of_trl(
    case_folder: Callable[[str], Path], case_tokenizer: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    # Here, because it takes seconds to import, and is pinned for the newest Transformers only.
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = case_tokenizer("chatglm3")
    model = AutoModelForCausalLM.from_pretrained(case_folder("chatglm3"), trust_remote_code=True, dtype=torch.float32)
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        assistant_only_loss=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    dataset = Dataset.from_list([ask("你好", "我是")] * 8)
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < 0.1 * history[0]
    assert model.eval().chat(tokenizer, "你好", temperature=0, max_new_tokens=8)[0] == "我是"
