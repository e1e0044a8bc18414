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
"""The numbers the published implementations gave, case by case (see tests/reference/README.md).

Everything is loaded the way a user loads it. The limits are those of the reference: several times the
spread of the published code over library versions, thread counts and attention kernels.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import ALL_CASES, CAUSAL_CASES, CLASSIFIER_CASES, FLOAT_CASES
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


pytestmark = pytest.mark.floor

# ChatGLM-6B's prompts with a `[MASK]` in the text, with and without a `[gMASK]` at its end.
PROMPTS = [*((name, "single") for name in ALL_CASES), ("chatglm1", "mask"), ("chatglm1", "both")]
# Half precision of what is quantized already was not recorded.
# The published auto_map of the others does not have AutoModelForCausalLM.
CAUSAL_FLOAT_CASES = [name for name in FLOAT_CASES if name in CAUSAL_CASES]

# ChatGLM-6B's published names of parameters, and ours.
CHATGLM_6B_NAMES = {
    "transformer.word_embeddings.": "transformer.embedding.word_embeddings.",
    "transformer.layers.": "transformer.encoder.layers.",
    ".attention.": ".self_attention.",
}

LOGITS_LIMIT = 1e-4
HIDDEN_LIMIT = 5e-5  # of the greatest value
LOSS_LIMIT = 2e-5
GRADIENT_LIMIT = 1e-4  # of the greatest value
CLASSIFIER_LIMIT = 5e-5
HALF_LIMIT = {"float16": 0.15, "bfloat16": 0.8}

# Fixtures are functions of a case's name.
Named = Callable[[str], Any]


@dataclass(frozen=True)
class Prefix:
    """One of the two P-tuning v2 prefix encoders of a case."""

    variant: str
    numbers: dict[str, Any]
    logits: torch.Tensor
    gradient: torch.Tensor


def assert_within(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= limit, f"differs by {difference:.3g}, the limit is {limit:.3g}"


def assert_within_relative(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert_within(actual, expected, limit * expected.abs().max().item())


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The end tokens the recorded searches had forbidden: those of config.json, not the stops of a chat."""
    ids = model.config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def greedy(model: PreTrainedModel, inputs: BatchEncoding, count: int = 24) -> list[list[int]]:
    """Greedy new ids of every row, with the end tokens forbidden."""
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=end_tokens(model)
    )
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def encode(tokenizer: PreTrainedTokenizerBase, case: Any) -> tuple[BatchEncoding, BatchEncoding]:
    single = tokenizer(case.expected["single"]["text"], return_tensors="pt")
    batch = tokenizer(case.expected["batch"]["texts"], padding=True, return_tensors="pt")
    return single, batch


def load(folder: Path, auto_class: type = AutoModel, **options: Any) -> PreTrainedModel:
    return auto_class.from_pretrained(folder, trust_remote_code=True, **options)


def own_name(name: str) -> str:
    for published, ours in CHATGLM_6B_NAMES.items():
        name = name.replace(published, ours)
    return name


def loss_and_gradients(
    model: PreTrainedModel, case: Any, names: list[str]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    loss = model(case.tensors["loss.input_ids"], labels=case.tensors["loss.labels"]).loss
    parameters = dict(model.named_parameters())
    return loss.detach(), torch.autograd.grad(loss, [parameters[own_name(name)] for name in names])


@pytest.mark.parametrize("name", ALL_CASES)
def test_tokenizer_gives_the_recorded_ids_and_positions(name: str, case: Named, case_tokenizer: Named):
    recorded = case(name)
    single, batch = encode(case_tokenizer(name), recorded)
    for encoding, key in ((single, "single"), (batch, "batch")):
        assert encoding["input_ids"].equal(recorded.tensors[f"{key}.input_ids"])
        assert encoding["position_ids"].equal(recorded.tensors[f"{key}.position_ids"])
    assert batch["attention_mask"].equal(recorded.tensors["batch.attention_mask"])
    assert single["input_ids"].shape[1] == recorded.expected["single"]["length"]
    if "single.attention_mask" in recorded.tensors:
        assert single["attention_mask"].equal(recorded.tensors["single.attention_mask"])
    else:
        assert single["attention_mask"].all()
        assert batch["attention_mask"].sum(1).tolist() == recorded.expected["batch"]["lengths"]


@pytest.mark.parametrize("name", ALL_CASES)
def test_single_prompt(name: str, case: Named, case_model: Named, case_tokenizer: Named):
    tensors, model = case(name).tensors, case_model(name)
    single, _ = encode(case_tokenizer(name), case(name))
    with torch.no_grad():
        output = model(**single, output_hidden_states=True)
        last_hidden_state = model.transformer(**single).last_hidden_state
    assert_within(output.logits, tensors["single.logits"], LOGITS_LIMIT)
    assert_within_relative(last_hidden_state, tensors["single.last_hidden_state"], HIDDEN_LIMIT)
    # The last entry is before the final norm, as published; ChatGLM-6B's alone is behind it.
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    for index, hidden_state in enumerate(output.hidden_states):
        assert_within_relative(hidden_state, tensors[f"single.hidden_states.{index}"], HIDDEN_LIMIT)


@pytest.mark.parametrize("name", ALL_CASES)
def test_positions_may_be_left_out(name: str, case: Named, case_model: Named):
    tensors, model = case(name).tensors, case_model(name)
    with torch.no_grad():
        single_logits = model(tensors["single.input_ids"]).logits
        batch_logits = model(tensors["batch.input_ids"], attention_mask=tensors["batch.attention_mask"]).logits
    assert_within(single_logits, tensors["single.logits"], LOGITS_LIMIT)
    for row, start in enumerate(case(name).expected["batch"]["real_from"]):
        assert_within(batch_logits[row, start:], tensors["batch.logits"][row, start:], LOGITS_LIMIT)


@pytest.mark.parametrize("key", ["mask", "both"])
def test_mask_token_in_the_text(key: str, case: Named, case_model: Named):
    tensors, model = case("chatglm1").tensors, case_model("chatglm1")
    input_ids, position_ids = tensors[f"{key}.input_ids"], tensors[f"{key}.position_ids"]
    with torch.no_grad():
        assert_within(model(input_ids).logits, tensors[f"{key}.logits"], LOGITS_LIMIT)
        assert_within(model(input_ids, position_ids=position_ids).logits, tensors[f"{key}.logits"], LOGITS_LIMIT)


@pytest.mark.parametrize(("name", "prompt"), PROMPTS)
def test_greedy_search(name: str, prompt: str, case: Named, case_model: Named):
    inputs = BatchEncoding({"input_ids": case(name).tensors[f"{prompt}.input_ids"]})
    assert greedy(case_model(name), inputs) == [case(name).expected[prompt]["greedy_new_ids"]]


@pytest.mark.parametrize(("name", "prompt"), PROMPTS)
def test_beam_search(name: str, prompt: str, case: Named, case_model: Named):
    model, expected = case_model(name), case(name).expected[prompt]
    output = model.generate(
        case(name).tensors[f"{prompt}.input_ids"],
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,  # scores are plain sums of log-probabilities
        max_new_tokens=12,
        min_new_tokens=12,
        eos_token_id=end_tokens(model),
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, expected["length"] :].tolist() == expected["beam3_new_ids"]
    assert_within(output.sequences_scores, torch.tensor(expected["beam3_sum_logprobs"]), LOGITS_LIMIT)


@pytest.mark.parametrize("name", ALL_CASES)
def test_padded_batch(name: str, case: Named, case_model: Named, case_tokenizer: Named):
    tensors, expected = case(name).tensors, case(name).expected["batch"]
    _, batch = encode(case_tokenizer(name), case(name))
    with torch.no_grad():
        logits = case_model(name)(**batch).logits
    for row, start in enumerate(expected["real_from"]):
        assert_within(logits[row, start:], tensors["batch.logits"][row, start:], LOGITS_LIMIT)
    assert greedy(case_model(name), batch) == expected["greedy_new_ids"]


@pytest.mark.parametrize("rows", ["single", "batch"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_early_stop(name: str, rows: str, case: Named, case_model: Named, case_tokenizer: Named):
    expected = case(name).expected["early_stop"][rows]
    single, batch = encode(case_tokenizer(name), case(name))
    inputs = single if rows == "single" else batch
    options = {key: expected[key] for key in ("eos_token_id", "pad_token_id", "max_new_tokens") if key in expected}
    new_ids = case_model(name).generate(**inputs, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :]
    assert new_ids.tolist() == ([expected["new_ids"]] if rows == "single" else expected["new_ids"])


@pytest.mark.parametrize("name", ALL_CASES)
def test_loss_and_gradients(name: str, case: Named, case_model: Named):
    recorded = case(name)
    names = [key.removeprefix("grad.") for key in recorded.tensors if key.startswith("grad.")]
    loss, gradients = loss_and_gradients(case_model(name), recorded, names)
    assert_within(loss, torch.tensor(recorded.expected["loss"]["value"]), LOSS_LIMIT)
    # Of quantized weights there is no gradient, and that of the embeddings comes through all of them.
    assert len(names) == (1 if name == "chatglm2-int4" else 3)
    for parameter, gradient in zip(names, gradients, strict=True):
        assert_within_relative(gradient, recorded.tensors[f"grad.{parameter}"], GRADIENT_LIMIT)


@pytest.fixture(params=["noproj", "proj"])
def prefix(request: pytest.FixtureRequest, name: str, case: Named) -> Prefix:
    tensors, variant = case(name).tensors, request.param
    return Prefix(
        variant,
        case(name).expected["ptuning"][variant],
        tensors[f"ptuning.{variant}.logits"],
        tensors[f"ptuning.{variant}.grad.transformer.prefix_encoder.embedding.weight"],
    )


@pytest.mark.parametrize("name", ALL_CASES)
def test_ptuning(name: str, prefix: Prefix, case: Named, case_folder: Named, case_tokenizer: Named):
    recorded, numbers = case(name), prefix.numbers
    model = load(
        case_folder(name),
        pre_seq_len=recorded.expected["ptuning"]["pre_seq_len"],
        prefix_projection=numbers["prefix_projection"],
        dtype=torch.float32,
    )
    weights = torch.load(case_folder(name) / numbers["file"], weights_only=True)
    model.transformer.prefix_encoder.load_state_dict(
        {key.removeprefix("transformer.prefix_encoder."): weight for key, weight in weights.items()}
    )

    single, batch = encode(case_tokenizer(name), recorded)
    with torch.no_grad():
        logits = model(**single).logits
    assert_within(logits[:, -prefix.logits.shape[1] :], prefix.logits, LOGITS_LIMIT)
    assert greedy(model, single) == [numbers["greedy_new_ids"]]
    assert greedy(model, batch) == numbers["batch_greedy_new_ids"]

    trainable = [parameter for parameter, weight in model.named_parameters() if weight.requires_grad]
    assert trainable == numbers["trainable_parameters"]
    loss, (gradient,) = loss_and_gradients(model, recorded, ["transformer.prefix_encoder.embedding.weight"])
    assert_within(loss, torch.tensor(numbers["loss"]), LOSS_LIMIT)
    assert_within_relative(gradient, prefix.gradient, GRADIENT_LIMIT)


def add_classifier_head(folder: Path) -> None:
    """Rewrites the checkpoint of a case as one file that holds the classifier head too."""
    weights: dict[str, torch.Tensor] = {}
    for file in (*sorted(folder.glob("pytorch_model*.bin")), folder / "classifier_head.bin"):
        weights |= torch.load(file, weights_only=True)
        file.unlink()
    (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize("name", CLASSIFIER_CASES)
def test_sequence_classification(name: str, tmp_path: Path, case: Named, case_folder: Named, case_tokenizer: Named):
    tensors, expected = case(name).tensors, case(name).expected["seqcls"]
    folder = shutil.copytree(case_folder(name), tmp_path / name)
    add_classifier_head(folder)
    model = load(folder, AutoModelForSequenceClassification, num_labels=expected["num_labels"], dtype=torch.float32)
    single, batch = encode(case_tokenizer(name), case(name))
    with torch.no_grad():
        output = model(**single, labels=torch.tensor([expected["label"]]))
        batch_logits = model(**batch).logits
    assert_within(output.logits, tensors["seqcls.logits"], CLASSIFIER_LIMIT)
    assert_within(output.loss, torch.tensor(expected["loss"]), LOSS_LIMIT)
    assert_within(batch_logits, tensors["seqcls.batch_logits"], CLASSIFIER_LIMIT)


@pytest.mark.parametrize("dtype", HALF_LIMIT)
@pytest.mark.parametrize("name", FLOAT_CASES)
def test_half_precision(name: str, dtype: str, case: Named, case_folder: Named, case_tokenizer: Named):
    expected = case(name).tensors[f"{dtype}.logits"]
    single, _ = encode(case_tokenizer(name), case(name))
    model = load(case_folder(name), dtype=getattr(torch, dtype))
    with torch.no_grad():
        logits = model(**single).logits[:, -expected.shape[1] :]
    assert logits.dtype == expected.dtype
    assert_within(logits, expected, HALF_LIMIT[dtype])


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
@pytest.mark.parametrize("name", CAUSAL_FLOAT_CASES)
def test_every_auto_class_gives_the_same_model(
    name: str, auto_class: type, case: Named, case_folder: Named, case_model: Named
):
    model = load(case_folder(name), auto_class, dtype=torch.float32)
    # Not the class itself: where another test has registered the classes of this checkout, the model is one of them.
    assert type(model).__name__ == type(case_model(name)).__name__ == "ChatGLMForConditionalGeneration"
    for key, weight in case_model(name).state_dict().items():
        assert weight.equal(model.state_dict()[key])


LOAD_QUIETLY = """
import locale, logging as logs, os, random, signal, sys, threading, warnings
import accelerate, numpy, sentencepiece, torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

def state():
    return {
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_device())),
        "chance": (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()),
        "process": (dict(os.environ), os.getcwd(), locale.getlocale(), sys.excepthook, threading.active_count()),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "messages": (warnings.filters[:], warnings.showwarning, logs.root.level, logs.root.handlers[:], logging.get_verbosity()),
    }

logging.disable_progress_bar()
warnings.simplefilter("error")
before, packages = state(), {name.partition(".")[0] for name in sys.modules}
for name in ("tokenization_chatglm.ChatGLMTokenizer", "modeling_chatglm.ChatGLMForConditionalGeneration"):
    get_class_from_dynamic_module(name, sys.argv[1])
# What takes seconds to import (numba, scipy, peft, triton, ...) is not among them.
new = {name.partition(".")[0] for name in sys.modules} - packages
assert new <= {"transformers_modules", "llvmlite"}, new
for folder in sys.argv[1:]:
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.chat(tokenizer, "1 + 1", do_sample=False, max_length=None, max_new_tokens=3)
    list(model.stream_chat(tokenizer, "1 + 1", do_sample=False, max_length=None, max_new_tokens=3))
changed = [name for name, value in state().items() if value != before[name]]
assert not changed, changed
"""


def test_loading_prints_nothing(case_folder: Named):
    """Neither does chatting. No warning about stored rotary buffers, unknown keys or anything else, the process is left as
    it was, and importing the code imports nothing else that takes long.
    """
    folders = [str(case_folder(name)) for name in ALL_CASES]
    result = subprocess.run([sys.executable, "-c", LOAD_QUIETLY, *folders], capture_output=True, text=True)
    assert result.stdout + result.stderr == ""
    assert result.returncode == 0
