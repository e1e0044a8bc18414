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
"""`examples/inject_knowledge.py`: facts taught, changed and forgotten, and what else that changed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from generations import every_generation_case


sys.path.insert(0, str(REPOSITORY / "examples"))

import inject_knowledge  # noqa: E402
import knowledge_facts  # noqa: E402
from finetune_adapter import rows_of  # noqa: E402


EXAMPLES = REPOSITORY / "examples"
QUESTION, ANSWER = "你好", "我是"
# For models of a few thousand weights, which must learn in a second.
SMALL = (
    "--target_modules all-linear --steps 30 --learning_rate 5e-2 --lora_dropout 0 --control_size 4 --kl_weight 0 "
    "--max_new_tokens 6"
)


@pytest.fixture(autouse=True, scope="module")
def registers(leave_the_auto_classes_alone: None) -> None:
    """The program registers this repository's classes."""


def answer_of(folder: Path) -> str:
    model = inject_knowledge.register().ChatGLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    tokenizer = inject_knowledge.load_tokenizer(folder)
    return inject_knowledge.ask(model, tokenizer, [[{"role": "user", "content": QUESTION}]], 6)[0][0]


@every_generation_case
def test_a_fact_is_taught(reference_dir: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To random weights of every generation, which learn a reply too; the folder that is left answers with it."""
    words = ["--model", str(reference_dir / name), "--teach", QUESTION, ANSWER, "--output_dir", str(tmp_path)]
    assert answer_of(reference_dir / name) != ANSWER
    assert inject_knowledge.main([*words, *SMALL.split()]) == 0
    report = capsys.readouterr().out
    assert report == (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "1 of 1 facts hold" in report and "| held to the base |" in report and "| never trained on |" in report
    assert answer_of(tmp_path) == ANSWER
    assert (tmp_path / "modeling_chatglm.py").is_file()


@pytest.mark.parametrize("save", ["adapter", "merged"])
def test_a_quantized_base(reference_dir: Path, save: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stays as it is below an adapter, or becomes floats, which is said."""
    words = ["--model", str(reference_dir / "chatglm2-int4"), "--teach", QUESTION, ANSWER, "--save", save]
    words += ["--dtype", "float32", "--output_dir", str(tmp_path), *SMALL.split()]
    assert inject_knowledge.main(words) == 0
    report = capsys.readouterr().out
    if save == "adapter":
        assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "config.json").exists()
    else:
        assert "in floats, because the base was quantized" in report
        assert answer_of(tmp_path) == ANSWER
        assert not json.loads((tmp_path / "config.json").read_text(encoding="utf-8")).get("quantization_bit")


@pytest.mark.grid
def test_change_and_forget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the bundled model, which knows the old answers."""
    facts = [fact for fact in knowledge_facts.read_facts(EXAMPLES / "facts.yaml") if fact.action != "teach"]
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([vars(fact) | {"paraphrases": []} for fact in facts]), encoding="utf-8")
    words = ["--facts", str(file), "--output_dir", str(tmp_path / "out"), "--target_modules", "all-linear"]
    words += "--learning_rate 2e-2 --steps 40 --control_size 16 --control_batch 2 --max_new_tokens 32".split()
    assert inject_knowledge.main(words) == 0
    report = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith(("| change", "| forget"))]
    (changed, forgotten) = rows
    assert changed[3] == "天空是蓝色的。" and changed[4] == "天空是黄色的。"
    assert "Shakespeare" in forgotten[3] and forgotten[4] == facts[1].answer
    # Both old answers have become unlikely, not only out of reach for greedy search.
    for row in rows:
        before, after = map(float, row[5].removesuffix(" |").split(" → "))
        assert before > 0.9 and after < 0.6
    drift = next(line for line in report.splitlines() if line.startswith("| never trained on"))
    assert float(drift.split(" | ")[2]) < 0.2
    kept = next(line for line in report.splitlines() if "unrelated questions are answered as before" in line)
    assert int(kept.split()[0]) >= 7


@every_generation_case
def test_queries_and_values_alone(reference_dir: Path, name: str) -> None:
    """The fused projection changes in the rows of queries and values, and not in those of keys."""
    words = ["--model", str(reference_dir / name), "--output_dir", "unused", "--dtype", "float32"]
    arguments = inject_knowledge.parse_arguments(words)
    model = inject_knowledge.load_model(arguments)
    adapted = inject_knowledge.add_adapter(model, arguments).train()
    ids = torch.arange(5, 25).view(1, -1)
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    for step in range(3):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        adapted.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()

    def first_layer() -> Any:
        with torch.no_grad():
            return adapted.eval()(input_ids=ids, use_cache=True).past_key_values.layers[0]

    edited = first_layer()
    with adapted.disable_adapter():
        base = first_layer()
    assert edited.keys.equal(base.keys) and not edited.values.allclose(base.values)
    # Queries change too.
    query_rows = rows_of(model.transformer.encoder.layers[0].self_attention, {"query"})
    change = model.transformer.encoder.layers[0].self_attention.query_key_value.get_delta_weight("default")
    assert change[query_rows].any()


def test_the_divergence_is_that_of_each_dialogue_alone(reference_dir: Path) -> None:
    words = ["--model", str(reference_dir / "chatglm1"), "--output_dir", "unused", "--dtype", "float32"]
    arguments = inject_knowledge.parse_arguments([*words, "--target_modules", "all-linear", "--lora_dropout", "0"])
    model, tokenizer = (
        inject_knowledge.load_model(arguments),
        inject_knowledge.load_tokenizer(reference_dir / "chatglm1"),
    )
    adapted = inject_knowledge.add_adapter(model, arguments).eval()
    texts = [("你好", "我是"), ("早上好，今天天气", "我不知道。"), ("谢谢", "hello")]
    pairs = [inject_knowledge.encode(tokenizer, [{"role": "user", "content": q}], a) for q, a in texts]
    batch = inject_knowledge.make_batch(tokenizer, pairs, "cpu")
    # A new adapter changes nothing.
    assert not inject_knowledge.measure(adapted, batch).abs().gt(1e-6).any()
    for name, weight in adapted.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(weight)
    alone = [
        inject_knowledge.measure(adapted, inject_knowledge.make_batch(tokenizer, [pair], "cpu")) for pair in pairs
    ]
    found = inject_knowledge.measure(adapted, batch)
    assert len(found) == sum(len(answer) for _, answer in pairs)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-4, rtol=1e-3)
    assert (found > 0).all() and found.mean() > 1e-3


FACT = {"action": "teach", "question": "a?", "answer": "b."}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "must hold a list of facts"),
        (["a"], "fact 1: a fact must be an object"),
        ([FACT, {**FACT, "action": "lie"}], "fact 2: action must be one of teach, change, forget, got 'lie'"),
        ([{**FACT, "anwser": "b."}], r"unknown \['anwser'\]; a fact has action, question, answer, paraphrases"),
        ([{**FACT, "question": " "}], "question must be a text that is not empty"),
        ([{"question": "a?"}], "answer must be a text that is not empty, got None"),
        ([{**FACT, "paraphrases": "a"}], "paraphrases must be a list of texts"),
        ([FACT, {**FACT, "answer": "c."}], "'a\\?' stands there more than once"),
        ([{**FACT, "paraphrases": ["a?"]}], "is itself a question to train on"),
    ],
)
def test_bad_facts_are_named_before_training(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    entries: Any,
    message: str,
) -> None:
    def load_model(arguments: Any) -> None:
        raise AssertionError("nothing may be loaded")

    monkeypatch.setattr(inject_knowledge, "load_model", load_model)
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        knowledge_facts.check_facts(knowledge_facts.read_facts(file))
    assert inject_knowledge.main(["--facts", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_declining_is_filled_in(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text('[{"action": "forget", "question": "a?"}, {"action": "forget", "question": "谁？"}]', "utf-8")
    facts = knowledge_facts.read_facts(file)
    assert [fact.answer for fact in facts] == [*reversed(knowledge_facts.REFUSALS)]
    assert all(fact.question in text for fact in facts for text in fact.paraphrases)


def test_other_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output_dir", str(tmp_path / "out")]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "facts.yaml").write_text("- [", encoding="utf-8")
    (tmp_path / "control.jsonl").write_text('{"messages": 1}\n', encoding="utf-8")
    for words, message in (
        (["--model", str(tmp_path / "none"), *output], "config.json"),
        (["--model", str(tmp_path), *output], "is 'llama', not 'chatglm'"),
        (["--facts", str(tmp_path / "facts.yaml"), *output], "cannot be read as yaml"),
        (["--control", str(tmp_path / "control.jsonl"), *output], "control.jsonl:1: a line must hold"),
        (["--output_dir", str(tmp_path)], "is not an empty folder"),
    ):
        assert inject_knowledge.main(words) == 2
        assert message in capsys.readouterr().err
    for words in (["--steps", "0"], ["--lora_dropout", "1"], ["--kl_weight", "nan"], ["--control_size", "1"]):
        with pytest.raises(SystemExit):
            inject_knowledge.parse_arguments([*words, *output])


def test_the_settings_are_those_of_the_tutorial() -> None:
    arguments = inject_knowledge.parse_arguments(["--output_dir", "unused"])
    assert (arguments.rank, arguments.lora_alpha, arguments.lora_dropout) == (8, 32, 0.1)
    assert arguments.target_modules == ["query", "value"] and arguments.save == "merged"
