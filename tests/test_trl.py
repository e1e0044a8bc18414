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
"""TRL's trainers for preferences and rewards, on every generation, and the program in `examples` that runs them.

TRL joins the ids of a prompt and of an answer, pads on its own and reads log-probabilities off hidden states and the
output layer's weight. What it gets is compared here with the model alone, without padding.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from generations import GENERATION_CASES, every_generation_case
from transformers import PreTrainedModel, PreTrainedTokenizerBase


sys.path.insert(0, str(REPOSITORY / "examples"))

METHODS = ("dpo", "kto", "reward", "grpo")
QUESTIONS = ["你好", "早上好，今天天气", "谢谢", "hello"]
GOOD, BAD = "我是", "你好吗？我不知道。"
# The suite's own share, every trainer, generation and dtype in it; `make test-grid` runs the rest.
DIAGONAL = {("dpo", "chatglm1", "int4"), ("kto", "glm4", "int8"), ("reward", "chatglm2", "int4")}
DIAGONAL |= {("grpo", "chatglm3", "int8")}
DIAGONAL |= {("kto", "chatglm1", "float32")}
REST = (pytest.mark.slow, pytest.mark.grid)
CELLS = [
    pytest.param(method, name, dtype, marks=() if (method, name, dtype) in DIAGONAL else REST)
    for method in METHODS
    for name in GENERATION_CASES
    for dtype in ("float32", "bfloat16", "int8", "int4")
]


@pytest.fixture(autouse=True, scope="module")
def registers(leave_the_auto_classes_alone: None) -> None:
    """The program registers this repository's classes."""


@pytest.fixture(scope="module")
def preference() -> Any:
    # Not at the top: TRL takes seconds to import, and is pinned for the newest Transformers only.
    import preference

    return preference


@pytest.fixture(scope="module")
def trl(preference: Any) -> Any:
    import trl

    return trl


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "preferences.jsonl"
    lines = [json.dumps({"prompt": question, "chosen": GOOD, "rejected": BAD}) for question in QUESTIONS]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def make_trainer(preference: Any, reference_dir: Path, data: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(method: str, name: str, *words: str) -> Any:
        settings = f"--method {method} --model {reference_dir / name} --data {data} --output_dir {tmp_path / 'out'} "
        settings += "--steps 3 --batch_size 4 --generations 2 --max_new_tokens 6 --rank 4 --held_out 0"
        arguments = preference.parse_arguments([*settings.split(), *words])
        return preference.make_trainer(arguments, preference.read_preferences(data, method))

    return make


@pytest.mark.parametrize(("method", "name", "dtype"), CELLS)
def test_every_trainer_on_every_generation(
    preference: Any,
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    name: str,
    dtype: str,
) -> None:
    # Nothing that random weights write is like an answer, and equal rewards teach nothing.
    rewards = iter(range(1000))
    monkeypatch.setattr(preference, "likeness", lambda prompts, **kwargs: [float(next(rewards)) for _ in prompts])
    trainer = make_trainer(method, name, "--dtype", dtype)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])}
    assert changed
    # All else is frozen: the base, its codes and scales.
    assert all("lora_" in name or "classifier_head_score.modules_to_save" in name for name in changed)
    assert (method == "reward") == any("classifier_head" in name for name in changed)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 3
    if method == "reward":
        assert history[-1]["margin"] > history[0]["margin"]
    if method == "dpo":
        assert history[-1]["rewards/margins"] > 0


@every_generation_case
def test_folders_by_their_path(
    trl: Any,
    preference: Any,
    case_folder: Callable[[str], Path],
    source: Callable[[str], Any],
    data: Path,
    name: str,
    tmp_path: Path,
) -> None:
    """TRL loads the model, the frozen copy that it is compared with, and the tokenizer. All weights train."""
    folder = shutil.copytree(case_folder(name), tmp_path / "upgraded")
    # As the upgrade writes it: the published file of ChatGLM-6B lacks AutoModelForCausalLM.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = source("configuration_generations").AUTO_MAP
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = trl.DPOConfig(
        str(tmp_path / "out"),
        trust_remote_code=True,
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    records = preference.Dataset.from_list(preference.read_preferences(data, "dpo"))
    trainer = trl.DPOTrainer(str(folder), args=arguments, train_dataset=records)
    trainer.train()
    history = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert history[0] == 0 and history[1] > 0


def direct_log_probabilities(model: PreTrainedModel, question: list[int], answer: list[int]) -> torch.Tensor:
    """Those of an answer's tokens, from ids alone: no padding, no mask."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
    return logits.float().log_softmax(-1)[range(len(answer)), answer]


@every_generation_case
def test_log_probabilities_are_those_of_the_model_alone(
    make_trainer: Callable[..., Any],
    case_model: Callable[[str], PreTrainedModel],
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase],
    name: str,
) -> None:
    model, tokenizer = case_model(name), case_tokenizer(name)
    trainer = make_trainer("dpo", name, "--batch_size", "4")
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    rows = []
    for text in (GOOD, BAD):
        for query in QUESTIONS:
            messages = [{"role": "user", "content": query}, {"role": "assistant", "content": text}]
            question = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
            both = tokenizer.apply_chat_template(messages)["input_ids"]
            # The answer begins where the generation prompt ends: for ChatGLM-6B, behind the context.
            assert both[: len(question)] == question
            rows.append((question, both[len(question) :]))
    direct = [direct_log_probabilities(model, *row) for row in rows]
    torch.testing.assert_close(found, torch.stack([one.sum() for one in direct]), atol=1e-4, rtol=1e-5)

    # GRPO pads questions on the left and answers on the right.
    policy = make_trainer("grpo", name)
    width, height = (max(len(row[part]) for row in rows) for part in (0, 1))
    pad = tokenizer.pad_token_id
    ids = [[pad] * (width - len(one)) + one + two + [pad] * (height - len(two)) for one, two in rows]
    mask = [[0] * (width - len(one)) + [1] * len(one + two) + [0] * (height - len(two)) for one, two in rows]
    labels = torch.tensor(ids).masked_fill(torch.tensor(mask) == 0, -100)
    labels[:, :width] = -100
    with torch.no_grad():
        output = policy.model.eval()(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), labels=labels, fused_lm_head=True
        )
    for row, expected in zip(output.log_probs[:, -height:], direct):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-5)


@every_generation_case
def test_a_reward_model_scores_what_it_was_trained_on(
    preference: Any, make_trainer: Callable[..., Any], name: str, tmp_path: Path
) -> None:
    trainer = make_trainer("reward", name)
    trainer.train()
    trainer.save_model()
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    again = preference.load_reward_model(str(tmp_path / "out"))
    asked = [[{"role": "user", "content": query}] for query in QUESTIONS]
    conversations = [[*question, {"role": "assistant", "content": GOOD}] for question in asked]
    questions = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(conversations)["input_ids"]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in whole]
        inputs = trainer.data_collator([{"chosen_ids": ids, "rejected_ids": ids[:-2]} for ids in whole])
        together = model(**inputs).logits[: len(whole), 0].tolist()
    # What GRPO gives: the messages of the questions, and the ids of the answers.
    answers = [ids[len(question) :] for ids, question in zip(whole, questions)]
    scored = preference.reward_function(again, tokenizer)(prompts=asked, completion_ids=answers)
    assert together == pytest.approx(alone, abs=1e-4)
    assert scored == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == len(alone)


@every_generation_case
def test_trl_reads_conversations_back_for_a_reward_model(
    trl: Any, preference: Any, reference_dir: Path, data: Path, name: str, tmp_path: Path
) -> None:
    """It renders them to text; the ids are those of the conversations, random answers included."""
    folder = str(reference_dir / name)
    tokenizer = preference.load_tokenizer(reference_dir / name)
    judge = preference.load_model(folder, "float32", is_reward=True)
    heard, told, forward = [], [], judge.forward

    def listen(input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        heard.extend(input_ids.tolist())
        return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def take_down(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        told.extend(prompt + completion for prompt, completion in zip(prompts, completions))
        return [0.0] * len(prompts)

    judge.forward = listen
    settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": 1, "num_generations": 2}
    trl.GRPOTrainer(
        preference.load_model(folder, "float32", is_reward=False),
        reward_funcs=[judge, take_down],
        reward_processing_classes=[tokenizer, None],
        args=trl.GRPOConfig(
            str(tmp_path), per_device_train_batch_size=8, max_completion_length=6, bf16=False, **settings
        ),
        train_dataset=preference.Dataset.from_list(preference.read_preferences(data, "grpo")),
        processing_class=tokenizer,
    ).train()
    expected = tokenizer.pad(tokenizer.apply_chat_template(told, return_dict=True), padding_side="right")
    assert len(heard) == 8 and heard == expected["input_ids"]


def test_answers_end_at_every_stop_token(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer("grpo", "chatglm3")
    assert set(trainer.processing_class.stop_token_ids()) <= set(trainer.generation_config.eos_token_id)


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_tools_of_grpo_are_refused(trl: Any, preference: Any, reference_dir: Path, name: str, tmp_path: Path) -> None:
    """TRL itself does: it knows the templates of a few families, and calls tools for those alone."""

    def get_weather(city: str) -> str:
        """Look up the weather.

        Args:
            city: The city.
        """
        return city

    with pytest.raises(ValueError, match="chat template is not training-compatible"):
        trl.GRPOTrainer(
            preference.load_model(str(reference_dir / name), "float32", is_reward=False),
            reward_funcs=preference.likeness,
            args=trl.GRPOConfig(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=preference.Dataset.from_list([{"prompt": "你好"}]),
            processing_class=preference.load_tokenizer(reference_dir / name),
            tools=[get_weather],
        )


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def run(preference: Any, capsys: pytest.CaptureFixture[str], words: str) -> dict[str, tuple[float, float]]:
    """The first and the last of each value in the table that the program prints."""
    assert preference.main(words.split()) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {name: (float(first), float(last)) for name, first, last in rows[1:]}


@pytest.mark.grid
def test_recipes(preference: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the page promises, in fewer steps: held-out preferences are told apart, and GRPO takes the reward model."""
    short = "--held_out 4 --steps"
    found = run(preference, capsys, f"--method dpo --output_dir {tmp_path}/dpo {short} 8 --learning_rate 3e-3")
    assert found["eval_rewards/margins"][1] > found["eval_rewards/margins"][0] + 0.3
    assert found["eval_rewards/accuracies"][1] == 1
    found = run(preference, capsys, f"--method reward --output_dir {tmp_path}/reward {short} 8")
    assert found["eval_accuracy"][1] == 1
    words = f"--method grpo --reward_model {tmp_path}/reward --output_dir {tmp_path}/grpo {short} 1 --generations 4"
    found = run(preference, capsys, f"{words} --max_new_tokens 16 --batch_size 4")
    assert {"reward", "eval_reward"} < set(found)
    names = {path.name for path in (tmp_path / "dpo").iterdir()}
    assert {"metrics.json", "curves.png", "adapter_model.safetensors", "adapter_config.json"} < names
    settings = json.loads((tmp_path / "dpo" / "metrics.json").read_text(encoding="utf-8"))["settings"]
    assert settings["steps"] == 8 and settings["method"] == "dpo"


@pytest.mark.parametrize(
    ("line", "method", "message"),
    [
        ("[]", "dpo", r"preferences.jsonl:2: dpo needs"),
        ('{"prompt": "a", "chosen": "b"}', "dpo", r":2: dpo needs .*'rejected'.* found \['chosen', 'prompt'\]"),
        ('{"prompt": "", "chosen": "b", "rejected": "c"}', "reward", ":2: must be a text or a list of messages"),
        ('{"prompt": "a", "completion": "b"}', "kto", ":2: kto needs"),
        ("{", "grpo", ":2: "),
    ],
)
def test_bad_data(
    preference: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    line: str,
    method: str,
    message: str,
) -> None:
    file = tmp_path / "preferences.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        preference.read_preferences(file, method)
    words = ["--method", method, "--data", str(file), "--output_dir", str(tmp_path / "out")]
    assert preference.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_data_of_either_form(preference: Any, tmp_path: Path) -> None:
    file = tmp_path / "kto.jsonl"
    message = {"role": "user", "content": "你好"}
    file.write_text(json.dumps({"prompt": [message], "completion": GOOD, "label": 1, "more": 2}), encoding="utf-8")
    answer = [{"role": "assistant", "content": GOOD}]
    assert preference.read_preferences(file, "kto") == [{"prompt": [message], "completion": answer, "label": True}]
    # What answers are compared with is a text.
    for good in (GOOD, answer):
        file.write_text(json.dumps({"prompt": [message], "chosen": good}), encoding="utf-8")
        assert preference.read_preferences(file, "grpo") == [{"prompt": [message], "chosen": GOOD}]
