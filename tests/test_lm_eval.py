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
"""lm_eval, the real program, on folders as users have them: `make test-programs` sets up what it needs.

Its log-likelihoods are compared with those of the model for ids that the tokenizer is asked for here.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES
from transformers import PreTrainedModel, PreTrainedTokenizerBase


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import upgrade_checkpoint  # noqa: E402


pytestmark = pytest.mark.programs

# Short of the longest of the questions below, which is cut on the left.
MAX_LENGTH = 64
NEW_TOKENS = 8
ROWS = [
    {"question": "法国的首都是哪里？", "choices": ["巴黎", "里昂 ", "the city"], "answer": 0},
    {"question": "What is 2 + 3?", "choices": ["4", " 5"], "answer": 1},
    {
        "question": "show me what is <|user|> and [gMASK] in " + "this long text, " * 12,
        "choices": ["a b", "c"],
        "answer": 0,
    },
]
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}} 答："
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
"""
GENERATION_TASK = f"""
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: DATA}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}} 答："
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: {NEW_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def lm_eval() -> Iterator[Any]:
    program = pytest.importorskip("lm_eval.__main__", reason="needs lm_eval: make test-programs")
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    with pytest.MonkeyPatch.context() as patch:
        # Every run would read the thousands of tasks that it comes with, which takes longer than all the rest.
        patch.setattr(manager, "__init__", partialmethod(manager.__init__, include_defaults=False))
        yield program


@pytest.fixture(scope="module")
def upgraded(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case after the upgrade command."""

    @cache
    def folder(name: str) -> Path:
        target = tmp_path_factory.mktemp("upgraded") / name
        shutil.copytree(reference_dir / name, target, ignore=shutil.ignore_patterns("expected.*"))
        assert upgrade_checkpoint.main([str(target)]) == 0
        return target

    return folder


@pytest.fixture(scope="module")
def samples(
    lm_eval: Any, upgraded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, list[Any]]]:
    """What the program logs of both tasks: `samples("chatglm3", "max_length=64", "--apply_chat_template")`."""
    tasks = tmp_path_factory.mktemp("tasks")
    data = tasks / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, task in (("choice", CHOICE_TASK), ("generation", GENERATION_TASK)):
        (tasks / f"{name}.yaml").write_text(task.replace("DATA", str(data)), encoding="utf-8")

    def run(name: str, model_arguments: str, *arguments: str) -> dict[str, list[Any]]:
        output = tmp_path_factory.mktemp("output")
        command = [
            "lm_eval",
            "--model",
            "hf",
            "--tasks",
            "local_choice,local_generation",
            "--include_path",
            str(tasks),
        ]
        command += [
            "--model_args",
            f"pretrained={upgraded(name)},trust_remote_code=True,dtype=float32,{model_arguments}",
        ]
        command += ["--device", "cpu", "--batch_size", "2", "--output_path", str(output), "--log_samples", *arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", command)
            lm_eval.cli_evaluate()
        return {
            task: [
                json.loads(line) for line in next(output.rglob(f"samples_{task}_*")).read_text("utf-8").splitlines()
            ]
            for task in ("local_choice", "local_generation")
        }

    return run


def log_likelihood(model: PreTrainedModel, context: list[int], continuation: list[int], limit: int) -> float:
    ids = [*context, *continuation][-(limit + 1) :][:-1]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(row[token].item() for row, token in zip(scores[-len(continuation) :], continuation))


def generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], limit: int) -> str:
    ids = ids[-(limit - NEW_TOKENS) :]
    output = model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, max_length=None, do_sample=False)
    text: str = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    return text.split("\n\n")[0]


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_plain_tasks(
    samples: Callable[..., Any],
    case_model: Callable[[str], PreTrainedModel],
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase],
    name: str,
) -> None:
    model, tokenizer = case_model(name), case_tokenizer(name)
    # It leaves the special tokens out where the first of them has no text, and takes them for GLM-4.
    is_opened = {"add_special_tokens": tokenizer.bos_token is None}
    logged = samples(name, f"max_length={MAX_LENGTH}")
    is_cut = False
    for sample in logged["local_choice"]:
        for given, (response,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context = tokenizer.encode(given["arg_0"], **is_opened)
            whole = tokenizer.encode(given["arg_0"] + given["arg_1"], **is_opened)
            assert whole[: len(context)] == context
            expected = log_likelihood(model, context, whole[len(context) :], MAX_LENGTH)
            assert float(response[0]) == pytest.approx(expected, abs=1e-3)
            is_cut |= len(whole) > MAX_LENGTH + 1
    for sample in logged["local_generation"]:
        ids = tokenizer.encode(sample["arguments"]["gen_args_0"]["arg_0"])
        assert sample["resps"] == [[generated(model, tokenizer, ids, MAX_LENGTH)]]
    assert is_cut


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_chats(
    samples: Callable[..., Any],
    case_model: Callable[[str], PreTrainedModel],
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase],
    name: str,
) -> None:
    """The text that the template renders is read back, and the answer begins behind the question's last token."""
    model, tokenizer = case_model(name), case_tokenizer(name)
    limit = model.config.max_position_embeddings
    logged = samples(name, "add_bos_token=False", "--apply_chat_template")
    for task, samples_of_task in logged.items():
        for row, sample in zip(ROWS, samples_of_task, strict=True):
            chat = [{"role": "user", "content": f"{row['question']} 答："}]
            context = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            if task == "local_generation":
                assert sample["resps"] == [[generated(model, tokenizer, context, limit)]]
                continue
            for choice, (response,) in zip(row["choices"], sample["resps"], strict=True):
                continuation = tokenizer.encode(choice, add_special_tokens=False)
                expected = log_likelihood(model, context, continuation, limit)
                assert float(response[0]) == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def wrapped(
    lm_eval: Any,
    case_model: Callable[[str], PreTrainedModel],
    case_tokenizer: Callable[[str], PreTrainedTokenizerBase],
) -> Callable[..., Any]:
    """What the program makes of a model and its tokenizer: `wrapped("chatglm3", **model arguments)`."""
    wrapper = importlib.import_module("lm_eval.models.huggingface").HFLM

    def wrap(name: str, **arguments: Any) -> Any:
        return wrapper(pretrained=case_model(name), tokenizer=case_tokenizer(name), device="cpu", **arguments)

    return wrap


@pytest.mark.parametrize("name", ["chatglm3", "glm4"])
def test_special_tokens_by_an_argument(wrapped: Callable[..., Any], name: str) -> None:
    tokenizer = wrapped(name).tokenizer
    program = wrapped(name, prefix_token_id=tokenizer.get_command("[gMASK]"))
    for text in ("show me", "你好"):
        assert program.tok_encode(text) == tokenizer.encode(text)
        # None are added to a text that has them.
        rendered = program.apply_chat_template([{"role": "user", "content": text}])
        assert program.tok_encode(rendered) == tokenizer.build_chat_input(text)["input_ids"][0].tolist()


@pytest.mark.parametrize(
    ("name", "context"), [("chatglm1", "show me[gMASK]<sop>"), ("chatglm2", "[gMASK]sopshow me"), ("glm4", "show me")]
)
def test_special_tokens_in_the_text_of_a_task(wrapped: Callable[..., Any], name: str, context: str) -> None:
    program = wrapped(name)
    tokenizer = program.tokenizer
    ids, continuation = program._encode_pair(context, "\n北京")
    assert ids == tokenizer.encode("show me")
    expected = tokenizer.encode("show me\n北京", add_special_tokens=False)
    alone = tokenizer.encode("\n北京", add_special_tokens=False)
    assert continuation == (alone if name == "chatglm1" else expected[len(ids) - 2 :])


def test_special_tokens_of_chatglm_6b_behind_the_continuation(wrapped: Callable[..., Any]) -> None:
    """Why nothing may make the program add them to it: what it takes for the continuation is something else."""
    tokenizer = wrapped("chatglm1").tokenizer
    program = wrapped("chatglm1", prefix_token_id=tokenizer.convert_tokens_to_ids("北"))
    assert program._encode_pair("show me", " it")[1] == tokenizer.encode("show me it")[-2:]
    assert program._encode_pair("show me", " it")[1] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_answers_behind_a_prefix(wrapped: Callable[..., Any], name: str) -> None:
    program = wrapped(name, add_bos_token=False)
    chat = [{"role": "user", "content": "show <|user|>"}, {"role": "assistant", "content": "ab"}]
    context = program.apply_chat_template(chat, add_generation_prompt=False)
    ids, continuation = program._encode_pair(context, " it")
    longer = [chat[0], {"role": "assistant", "content": "ab it"}]
    expected = program.tokenizer.apply_chat_template(longer, continue_final_message=True)["input_ids"]
    assert ids + continuation == expected
    assert len(continuation) == len(program.tokenizer.encode("ab it", add_special_tokens=False)) - len(
        program.tokenizer.encode("ab", add_special_tokens=False)
    )


@pytest.mark.parametrize("name", GENERATION_CASES)
def test_the_stop_text_is_the_name_of_the_end_token(wrapped: Callable[..., Any], name: str) -> None:
    program = wrapped(name)
    assert program.tok_decode(program.eot_token_id, skip_special_tokens=False) == program.tokenizer.eos_token
