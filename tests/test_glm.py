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
"""The networks of GLM-large, GLM-10B and GLM-130B compute what the published code computed, every recorded entry of it.

`glm-chinese` and `glm-gpt2` were recorded with the published files of GLM, `glm-130b` with GLM-130B's repository.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GlmConfig, GlmForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import configuration_auto


pytestmark = pytest.mark.floor

GLM_CASES = ["glm-chinese", "glm-gpt2"]
ALL_CASES = [*GLM_CASES, "glm-130b"]
PROMPTS = ["single", "sentence", "document", "blanks_hf", "batch_right", "batch_left"]

# Of the greatest value, or of 1 if that is less; exact and tanh GELU differ by more.
LIMIT = 3e-5
LOSS_LIMIT = 2e-5
HALF_LIMIT = {"float16": 2e-2, "bfloat16": 2e-1}
# How much further from float32 than the published run in float16.
HALF_FACTOR_130B = 2.0

every_glm = pytest.mark.parametrize("name", GLM_CASES)
every_old = pytest.mark.parametrize("name", ALL_CASES)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= limit * max(1.0, expected.float().abs().max().item())


def write_folder(source: Path, folder: Path) -> Path:
    """A checkpoint folder of a recorded case, with the configuration that the published one is turned into."""
    folder.mkdir()
    if (source / "config.json").is_file():
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config |= {"model_type": "chatglm"}
        config.pop("auto_map")
        shutil.copy(source / "pytorch_model.bin", folder)
    else:
        arguments = json.loads((source / "args.json").read_text(encoding="utf-8"))
        ids = arguments["command_ids"]
        names = ("num_layers", "hidden_size", "inner_hidden_size", "num_attention_heads", "vocab_size")
        config = {name: arguments[name] for name in (*names, "max_sequence_length")}
        config |= {"model_type": "chatglm", "model_version": "glm130b", "bos_token_id": ids["sop"]}
        config |= {"eos_token_id": [ids["eop"], ids["eos"]], "pad_token_id": ids["eos"]}
        stored = torch.load(source / "1" / "mp_rank_00_model_states.pt", weights_only=True)
        torch.save(stored["module"], folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reference_dir: Path) -> Callable[[str], Path]:
    return cache(lambda name: write_folder(reference_dir / name, tmp_path_factory.mktemp("glm") / name))


@pytest.fixture(scope="module")
def model(folder: Callable[[str], Path], chatglm: SimpleNamespace) -> Callable[[str], PreTrainedModel]:
    """One for the whole file, in float32, so not to be changed."""
    load = chatglm.ChatGLMForConditionalGeneration.from_pretrained
    return cache(lambda name: load(folder(name), dtype=torch.float32))


@every_glm
def test_a_published_configuration_is_recognised(source: Callable[[str], ModuleType], reference_dir: Path, name: str):
    module = source("configuration_chatglm")
    file = json.loads((reference_dir / name / "config.json").read_text(encoding="utf-8"))
    config = module.ChatGLMConfig.from_dict(dict(file))
    assert (config.model_version, config.model_type) == ("glm", "chatglm")
    assert config.has_block_positions and config.learned_positions and config.aligned_labels
    assert (config.intermediate_size, config.layernorm_epsilon) == (4 * config.hidden_size, 1e-5)
    assert (config.eos_token_id, config.pad_token_id) == (None, None)
    saved = config.to_diff_dict()
    assert saved["model_type"] == "chatglm"
    changed = ("model_type", "auto_map", "bad_words_ids", "torch_dtype", "transformers_version", "architectures")
    assert {key: saved.get(key) for key in file.keys() - {*changed}} == {
        key: value for key, value in file.items() if key not in changed
    }
    # As a program writes it that leaves out what is the default, and as the library's own "glm" has it.
    few = {"model_type": "glm", "num_layers": 24, "hidden_size": 1024}
    assert module.infer_model_version(few) == "glm"
    assert module.infer_model_version({**few, "rms_norm_eps": 1e-5}) is None


def test_the_librarys_own_glm_is_left_alone(model: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model("glm-chinese")
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = GlmConfig(**sizes, intermediate_size=32, head_dim=16, vocab_size=50, pad_token_id=0, eos_token_id=1)
    GlmForCausalLM(config).save_pretrained(tmp_path)
    again = GlmForCausalLM.from_pretrained(tmp_path)
    assert (
        type(again).__module__.startswith("transformers.") and again.generate(torch.tensor([[5]]), max_length=4).any()
    )
    assert configuration_auto.CONFIG_MAPPING["glm"] is GlmConfig
    assert "glm" not in configuration_auto.CONFIG_MAPPING._extra_content


@every_glm
@torch.no_grad()
def test_a_mask_has_its_published_meanings(case: Callable, model: Callable, name: str) -> None:
    recorded, glm = case(name), model(name)
    tensors, sep = recorded.tensors, recorded.expected["context"]["sep"]
    ids = tensors["context.input_ids"]
    whole = torch.ones(1, 1, ids.shape[1], ids.shape[1])
    masks = {
        "no_mask": None,
        "2d_mask": torch.ones_like(ids),
        "sep": torch.tensor([sep]),
        "sep_all": torch.tensor([[ids.shape[1]]]),
    }
    for key, mask in masks.items():
        assert_close(glm(ids, attention_mask=mask).logits, tensors[f"context.logits_{key}"])
    for mask in (whole, whole.bool(), whole.long()):
        assert_close(glm(ids, attention_mask=mask).logits, tensors["context.logits_2d_mask"])
    assert_close(glm(ids, attention_mask=whole.tril()).logits, tensors["context.logits_no_mask"])
    batch, seps = tensors["context.batch_input_ids"], tensors["context.batch_sep"]
    for mask in (seps, seps[:, None]):
        assert_close(glm(batch, attention_mask=mask).logits, tensors["context.batch_logits_sep"])
    output = glm.transformer(ids, attention_mask=masks["sep_all"], output_hidden_states=True)
    assert_close(output.last_hidden_state, tensors["context.last_hidden_state"])
    for index, states in enumerate(output.hidden_states):
        assert_close(states, tensors[f"context.mems.{index}"])


@every_glm
@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_logits_with_and_without_a_cache(case: Callable, model: Callable, name: str, prompt: str) -> None:
    recorded, glm = case(name), model(name)
    tensors, start = recorded.tensors, recorded.expected[prompt]["path_logits_from"]
    ids, context = tensors[f"{prompt}.path_ids"], tensors[f"{prompt}.context_ids"].shape[1]
    length = ids.shape[1]
    positions = tensors[f"{prompt}.position_ids"][..., :length]
    mask = tensors[f"{prompt}.generation_attention_mask"][..., :length, :length]
    output = glm(ids, attention_mask=mask, position_ids=positions)
    assert_close(output.logits[:, start:], tensors[f"{prompt}.path_logits"])
    # The context at once, the start piece and two more at once, and the others one by one.
    cache, cached = None, []
    for first, last in [(0, context), (context, context + 2), *((k, k + 1) for k in range(context + 2, length))]:
        step = glm(
            ids[:, first:last],
            # The last rows and columns count.
            attention_mask=mask[..., :last, :last],
            position_ids=positions[..., first:last],
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        cached.append(step.logits)
    assert_close(torch.cat(cached, dim=1), output.logits)


def builder_inputs(recorded: Any, prompt: str) -> dict[str, torch.Tensor]:
    names = ("input_ids", "position_ids", "generation_attention_mask")
    return {name: recorded.tensors[f"{prompt}.{name}"] for name in names}


@every_glm
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_search(case: Callable, model: Callable, name: str, prompt: str) -> None:
    recorded, ids = case(name), case(name).expected["special_ids"]
    settings = {"do_sample": False, "eos_token_id": ids["eop"], "pad_token_id": ids["pad"]}
    settings["max_new_tokens"] = recorded.expected[prompt]["max_new_tokens"]
    inputs = builder_inputs(recorded, prompt)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        output = model(name).generate(**inputs, **settings, **options)
        assert output.tolist() == recorded.expected[prompt]["generate_output"]


@every_glm
def test_beam_search(case: Callable, model: Callable, name: str) -> None:
    recorded, glm, ids = case(name), model(name), case(name).expected["special_ids"]
    inputs, expected = builder_inputs(recorded, "single"), recorded.expected["single"]
    length = inputs["input_ids"].shape[1]
    rows = torch.tensor(expected["beam3_sequences"])
    ended = [[*row, ids["eop"]].index(ids["eop"]) for row in expected["beam3_sequences"]]
    # Recorded by a library that divided by the length of the whole row, which no setting of today's does.
    sums = torch.tensor([score * (length + end) for score, end in zip(expected["beam3_scores"], ended)])
    output = glm.generate(
        **inputs,
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        max_new_tokens=8,
        eos_token_id=ids["eop"],
        pad_token_id=ids["pad"],
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, length:].tolist() == rows[:2].tolist()
    assert_close(output.sequences_scores, sums[:2])
    whole = torch.cat((inputs["input_ids"].expand(3, -1), rows), dim=1)[:, :-1]
    mask = inputs["generation_attention_mask"][..., : whole.shape[1], : whole.shape[1]]
    positions = inputs["position_ids"][..., : whole.shape[1]]
    with torch.no_grad():
        logits = glm(whole, attention_mask=mask.expand(3, -1, -1, -1), position_ids=positions.expand(3, -1, -1)).logits
    chosen = logits[:, length - 1 :].log_softmax(-1).gather(-1, rows[..., None])[..., 0]
    assert_close(torch.stack([row[: end + 1].sum() for row, end in zip(chosen, ended)]), sums)


@every_glm
@torch.no_grad()
def test_several_blanks_one_after_the_other(case: Callable, model: Callable, name: str) -> None:
    tensors, context = case(name).tensors, case(name).expected["blanks"]["context_ids"]
    ids, positions = tensors["blanks.fed_ids"], tensors["blanks.position_ids"]
    output = model(name)(ids, attention_mask=torch.tensor([len(context)]), position_ids=positions)
    assert_close(output.logits, tensors["blanks.logits"])
    # What is in a cache is seen by all that follows.
    cut = len(context) + 3
    first = model(name)(
        ids[:, :cut], attention_mask=torch.tensor([len(context)]), position_ids=positions[..., :cut], use_cache=True
    )
    rest = model(name)(
        ids[:, cut:], position_ids=positions[..., cut:], attention_mask=torch.tensor([0]),
        past_key_values=first.past_key_values,
    )  # fmt: skip
    assert_close(rest.logits, tensors["blanks.logits"][:, cut:])


def own_name(name: str) -> str:
    renamed = {"word_embeddings.": "transformer.embedding.word_embeddings.", "transformer.layers.": "transformer.encoder.layers."}  # fmt: skip
    for published, ours in renamed.items():
        name = ours + name.removeprefix(published) if name.startswith(published) else name
    return name.replace(".attention.", ".self_attention.")


@every_glm
@pytest.mark.parametrize("key", ["loss", "loss_padded", "loss_single"])
def test_labels_are_not_shifted(case: Callable, model: Callable, name: str, key: str) -> None:
    recorded, glm = case(name), model(name)
    inputs = {
        part: recorded.tensors[f"{key}.{part}"] for part in ("input_ids", "position_ids", "attention_mask", "labels")
    }
    output = glm(**inputs)
    assert abs(output.loss.item() - recorded.expected[key]["value"]) <= LOSS_LIMIT
    if key != "loss":
        return
    assert_close(output.logits.detach(), recorded.tensors["loss.logits"])
    names = [name.removeprefix("grad.") for name in recorded.tensors if name.startswith("grad.")]
    parameters = dict(glm.named_parameters())
    gradients = torch.autograd.grad(output.loss, [parameters[own_name(name)] for name in names])
    assert len(names) == 15
    for one, gradient in zip(names, gradients, strict=True):
        expected = recorded.tensors[f"grad.{one}"]
        assert (gradient - expected).abs().max() <= LIMIT * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, dtype) for name in GLM_CASES for dtype in HALF_LIMIT), ("glm-130b", "float16")]
)
@torch.no_grad()
def test_half_precision(case: Callable, folder: Callable, chatglm: SimpleNamespace, name: str, dtype: str) -> None:
    tensors = case(name).tensors
    glm = chatglm.ChatGLMForConditionalGeneration.from_pretrained(folder(name), dtype=getattr(torch, dtype))
    if name == "glm-130b":
        logits = glm(tensors["gmask.input_ids"]).logits
        # Its small network amplifies rounding: two runs in float16 differ by more than either does from float32.
        exact, published = tensors["gmask.logits"], tensors["gmask.logits_float16"].float()
        assert (logits.float() - exact).abs().mean() <= HALF_FACTOR_130B * (published - exact).abs().mean()
        assert (logits.float() - exact).abs().max() <= HALF_FACTOR_130B * (published - exact).abs().max()
        return
    ids = tensors["single.path_ids"]
    positions, mask = tensors["single.position_ids"], tensors["single.generation_attention_mask"]
    length = ids.shape[1]
    logits = glm(ids, attention_mask=mask[..., :length, :length], position_ids=positions[..., :length]).logits
    assert_close(logits, tensors[f"single.{dtype}_logits"], HALF_LIMIT[dtype])


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in ALL_CASES for form in ("as published", "ours")]
    + [(name, "with a prefix") for name in GLM_CASES],
)
def test_saved_again_is_the_same(
    model: Callable, folder: Callable, chatglm: SimpleNamespace, tmp_path: Path, name: str, form: str
) -> None:
    """Under the names that a checkpoint came with: those of the files, ours, and those of the published head classes."""
    glm, start = model(name), folder(name)
    if form == "ours":
        start = tmp_path / "first"
        chatglm.ChatGLMForConditionalGeneration(glm.config).save_pretrained(start)
    elif form == "with a prefix":
        start = shutil.copytree(start, tmp_path / "first")
        weights = torch.load(start / "pytorch_model.bin", weights_only=True)
        torch.save({f"glm.{key}": value for key, value in weights.items()}, start / "pytorch_model.bin")
    load = chatglm.ChatGLMForConditionalGeneration.from_pretrained
    first, info = load(start, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    first.load_state_dict(glm.state_dict())
    first.save_pretrained(tmp_path / "second")
    stored = load_file(tmp_path / "second" / "model.safetensors").keys()
    assert ("transformer.encoder.layers.0.self_attention.dense.weight" in stored) == (form == "ours")
    again = load(tmp_path / "second")
    assert again.config.to_diff_dict() == first.config.to_diff_dict()
    for key, weight in glm.state_dict().items():
        assert weight.equal(again.state_dict()[key])
    other = chatglm.ChatGLMForConditionalGeneration(glm.config)
    other.load_state_dict(load_file(tmp_path / "second" / "model.safetensors"), strict=True)
    assert other.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight.equal(
        glm.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight
    )


def test_names_of_other_networks_are_left_alone(source: Callable[[str], ModuleType]) -> None:
    """As those of the layers that GLM-4V sees with."""
    name = "transformer.vision.transformer.layers.3.attention.query_key_value.weight"
    renamings = source("modeling_chatglm").weight_renamings()
    assert {renaming.rename_source_key(name) for renaming in renamings} == {(name, None)}
    # A prefix is put back only where there was one.
    back = [renaming.reverse_transform() for renaming in renamings if type(renaming) is WeightRenaming]
    assert {renaming.rename_source_key(name) for renaming in back} == {(name, None)}


@every_old
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized(
    folder: Callable, model: Callable, chatglm: SimpleNamespace, tmp_path: Path, name: str, bits: int
) -> None:
    load = chatglm.ChatGLMForConditionalGeneration.from_pretrained
    glm, ids = load(folder(name), dtype=torch.float32).quantize(bits), torch.arange(5, 25).view(1, -1)
    with torch.no_grad():
        logits = glm(ids).logits
        glm.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path).eval()(ids).logits, logits)
        assert not torch.allclose(logits, model(name)(ids).logits)
        assert_close(logits, glm.dequantize()(ids).logits, 1e-4)


@pytest.mark.parametrize("prompt", ["gmask", "mask"])
@torch.no_grad()
def test_glm_130b_reads_positions_and_context_off_the_ids(case: Callable, model: Callable, prompt: str) -> None:
    tensors, glm = case("glm-130b").tensors, model("glm-130b")
    ids, positions = tensors[f"{prompt}.input_ids"], tensors[f"{prompt}.position_ids"]
    hidden = tensors[f"{prompt}.attention_mask"].bool()
    assert glm.get_position_ids(ids).equal(positions) and glm.get_masks(ids).equal(hidden)
    for inputs in ({}, {"position_ids": positions, "attention_mask": hidden}, {"attention_mask": (~hidden).long()}):
        output = glm(ids, **inputs, output_hidden_states=True)
        assert_close(output.logits, tensors[f"{prompt}.logits"])
        for index, states in enumerate(output.hidden_states[1:]):
            assert_close(states, tensors[f"{prompt}.hidden_states.{index}"])


@torch.no_grad()
def test_glm_130b_scores_choices_that_do_not_see_each_other(case: Callable, model: Callable) -> None:
    recorded, glm = case("glm-130b"), model("glm-130b")
    for key in ("choice_single", "choice_multi"):
        tensors = [recorded.tensors[f"{key}.{part}"] for part in ("tokens", "position_ids", "not_attended")]
        logits = glm(tensors[0], position_ids=tensors[1], attention_mask=tensors[2][:, None].bool()).logits
        expected = recorded.expected[key]
        for row, scores in enumerate(expected["log_probs"]):
            choices, places = expected["choices"][row], expected["choice_target_ids"][row]
            # Choices of one token share the piece that they follow.
            places = [places] * len(choices) if key == "choice_single" else places
            chosen = [logits[row].log_softmax(-1)[place, choice].sum() for place, choice in zip(places, choices)]
            assert_close(torch.stack(chosen), torch.tensor(scores))


@torch.no_grad()
def test_glm_130b_models_language(case: Callable, model: Callable) -> None:
    recorded, glm = case("glm-130b"), model("glm-130b")
    for index, expected in enumerate(recorded.expected["lm"]["losses"]):
        ids, positions, targets, kept, hidden = (
            recorded.tensors[f"lm.{index}.{part}"]
            for part in ("tokens", "position_ids", "targets", "loss_masks", "not_attended")
        )
        labels = targets.masked_fill(kept == 0, -100)
        mask = hidden[:, None].bool()
        loss = glm(ids, position_ids=positions, attention_mask=mask, labels=labels, num_items_in_batch=1).loss
        assert abs(loss.item() - expected) <= 1e-5 * expected


@pytest.mark.parametrize("kind", ["mask", "smask", "gmask", "none", "many", "end_mask"])
def test_glm_130b_fills_blanks(case: Callable, model: Callable, kind: str) -> None:
    recorded = case("glm-130b").expected["fill_blanks"][kind]
    for one in recorded["rounds"]:
        output = model("glm-130b").generate(
            torch.tensor([one["input"]]), do_sample=False, max_length=recorded["out_seq_length"]
        )
        assert output[0].tolist() == [token_id for token_id in one["output"] if token_id >= 0]


@torch.no_grad()
def test_glm_130b_generates_in_a_batch(case: Callable, model: Callable) -> None:
    """Rows with the text before `<sop>` and behind it, with `[gMASK]`, `[MASK]` at the end and within."""
    recorded, glm = case("glm-130b"), model("glm-130b")
    lengths = recorded.tensors["generation.context_length"].tolist()
    assert len(set(lengths)) == 1
    rows = recorded.tensors["generation.tokens"][:, : lengths[0]]
    positions = recorded.tensors["generation.position_ids"][:, : lengths[0]]
    assert glm.get_position_ids(rows).equal(positions)
    padded = torch.nn.functional.pad(rows, (3, 0), value=2)
    for ids, mask in ((rows, None), (padded, torch.nn.functional.pad(torch.ones_like(rows), (3, 0)))):
        output = glm.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8)[:, ids.shape[1] :].tolist()
        ends = [[*row, 261].index(261) for row in output]
        answers = [one["generated"] for one in recorded.expected["generation"]["items"]]
        assert [row[:end] for row, end in zip(output, ends)] == answers


@every_old
def test_every_way_of_computing_agrees(
    case: Callable, folder: Callable, model: Callable, chatglm: SimpleNamespace, name: str
) -> None:
    tensors, glm = case(name).tensors, model(name)
    inputs = {"input_ids": tensors["mask.input_ids"]} if name == "glm-130b" else None
    if inputs is None:
        inputs = {"input_ids": tensors["single.path_ids"]}
        length = inputs["input_ids"].shape[1]
        inputs["position_ids"] = tensors["single.position_ids"][..., :length]
        inputs["attention_mask"] = tensors["single.generation_attention_mask"][..., :length, :length]
    load = chatglm.ChatGLMForConditionalGeneration.from_pretrained
    with torch.no_grad():
        logits = glm(**inputs).logits
        eager = load(folder(name), dtype=torch.float32, attn_implementation="eager")
        assert_close(eager(**inputs).logits, logits)
        embedded = {**inputs, "inputs_embeds": glm.get_input_embeddings()(inputs["input_ids"]), "input_ids": None}
        if name == "glm-130b":
            embedded |= {
                "position_ids": tensors["mask.position_ids"],
                "attention_mask": tensors["mask.attention_mask"].bool(),
            }
        assert_close(glm(**embedded).logits, logits)
    with pytest.raises(ValueError, match="would silently drop the mask"):
        load(folder(name), attn_implementation="flash_attention_2")
    trained = load(folder(name), hidden_dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0, dtype=torch.float32)
    gradients = []
    for enable in (lambda: None, trained.train().gradient_checkpointing_enable):
        enable()
        loss = trained(**inputs, labels=inputs["input_ids"]).loss
        gradients.append(torch.autograd.grad(loss, list(trained.parameters())))
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(*gradients))


@every_old
def test_a_prefix_of_ptuning(case: Callable, folder: Callable, chatglm: SimpleNamespace, name: str) -> None:
    load = chatglm.ChatGLMForConditionalGeneration.from_pretrained
    glm = load(folder(name), pre_seq_len=4, dtype=torch.float32)
    torch.nn.init.normal_(glm.transformer.prefix_encoder.embedding.weight, std=0.5)
    inputs = (
        {"inputs": case(name).tensors["mask.input_ids"]}
        if name == "glm-130b"
        else builder_inputs(case(name), "single")
    )
    answers = [
        glm.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=1, **options).tolist()
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True})
    ]
    assert answers[0] == answers[1] == answers[2]
    assert [one for one, weight in glm.named_parameters() if weight.requires_grad] == [
        "transformer.prefix_encoder.embedding.weight"
    ]


@every_glm
def test_what_cannot_be_generated_is_refused(case: Callable, model: Callable, name: str) -> None:
    glm, inputs = model(name), builder_inputs(case(name), "single")
    ids, limit = inputs["input_ids"], model(name).config.max_prompt_length
    with pytest.raises(ValueError, match=f"Token {limit + 1} is to come, and the model has {limit} positions"):
        glm.generate(ids, do_sample=False, max_new_tokens=limit, eos_token_id=1)
    with pytest.raises(ValueError, match="generate fewer, or build the inputs with a larger `max_gen_length`"):
        glm.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=1)
    with pytest.raises(ValueError, match="`prefill_chunk_size` cannot be used with ChatGLM-6B and the older GLM"):
        glm.generate(ids, prefill_chunk_size=2)
    with pytest.raises(ValueError, match="GLM and GLM-130B know no conversation: use `generate`"):
        glm.chat(None, "你好")
    # Without the builder's mask from left to right, padding hidden.
    padded, mask = torch.nn.functional.pad(ids, (3, 0), value=1), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": 1}
    positions = torch.nn.functional.pad(torch.arange(ids.shape[1]).expand(1, 2, -1) * torch.tensor([[1], [0]]), (3, 0))
    answer = glm.generate(ids, **settings)[:, ids.shape[1] :]
    with torch.no_grad():
        assert answer[0, 0] == glm(ids).logits[0, -1].argmax()
    again = glm.generate(padded, attention_mask=mask, position_ids=positions, **settings)[:, padded.shape[1] :]
    assert again[:, :1].equal(answer[:, :1])


@every_glm
@pytest.mark.parametrize("key", ["mc", "mc_left"])
def test_multiple_choice(case: Callable, folder: Callable, source: Callable, name: str, key: str) -> None:
    recorded, expected = case(name), case(name).expected
    glm = source("modeling_glm").GLMForMultipleChoice.from_pretrained(folder(name), dtype=torch.float32)
    inputs = {part: recorded.tensors[f"{key}.{part}"] for part in ("input_ids", "position_ids", "attention_mask")}
    choices = {
        "choice_ids": [[torch.tensor(one) for one in row] for row in expected["mc"]["choice_ids"]],
        "choice_indices": [[torch.tensor(one) for one in row] for row in expected[key]["choice_indices"]],
    }
    with torch.no_grad():
        output = glm(**inputs, **choices, labels=torch.tensor(expected["mc"]["labels"]))
        fewer = {part: [rows[0][:1], *rows[1:]] for part, rows in choices.items()}
        fewer_logits = glm(**inputs, **fewer).logits
    assert_close(output.logits, recorded.tensors[f"{key}.scores"])
    if key == "mc":
        is_real = inputs["attention_mask"].bool().any(-1)[:, 0]
        assert_close(output.lm_logits[is_real], recorded.tensors["mc.lm_logits"][is_real])
        assert abs(output.loss.item() - expected["mc"]["loss"]) <= LOSS_LIMIT
    assert fewer_logits[0, 0] == output.logits[0, 0] and fewer_logits[0].argmax() == 0
    with pytest.raises(ValueError, match="`choice_ids` and `choice_indices` for each row"):
        glm(**inputs)


@every_glm
def test_sequence_classification(
    case: Callable, folder: Callable, source: Callable, reference_dir: Path, tmp_path: Path, name: str
) -> None:
    recorded, expected = case(name), case(name).expected["seqcls"]
    start = shutil.copytree(folder(name), tmp_path / name)
    weights = torch.load(start / "pytorch_model.bin", weights_only=True)
    weights = {f"glm.{key}": weight for key, weight in weights.items()}
    weights |= torch.load(reference_dir / name / "classifier_head.bin", weights_only=True)
    torch.save(weights, start / "pytorch_model.bin")
    head = source("modeling_glm").GLMForSequenceClassification
    glm, info = head.from_pretrained(start, num_labels=3, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    inputs = {part: recorded.tensors[f"seqcls.{part}"] for part in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = glm(**inputs, labels=torch.tensor(expected["labels"]))
        assert_close(output.logits, recorded.tensors["seqcls.logits"])
        assert abs(output.loss.item() - expected["loss"]) <= LOSS_LIMIT
        glm.save_pretrained(tmp_path / "saved")
        assert head.from_pretrained(tmp_path / "saved")(**inputs).logits.equal(output.logits)
