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
"""P-tuning v2: the same answer by every way of computing it, and prefixes that are saved, loaded and refused.

What the published code computes with a prefix is compared in test_parity.py.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import (
    GMASK,
    START,
    TINY,
    every_case,
    every_causal_generation,
    every_generation,
    every_generation_case,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)


ModelMaker = Callable[..., PreTrainedModel]

either_projection = pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 98}
PREFIX = "transformer.prefix_encoder."


@pytest.fixture
def model(tiny_model: ModelMaker) -> ModelMaker:
    """A small model of a generation, by default with a prefix of 5."""

    def make(version: str = "chatglm3", head: str = "ChatGLMForConditionalGeneration", **changes: Any) -> Any:
        return tiny_model(head, **TINY[version] | {"pre_seq_len": 5} | changes)

    return make


def prompt(version: str = "chatglm3", batch: int = 2, length: int = 11) -> torch.Tensor:
    ids = torch.randint(4, 89, (batch, length), generator=torch.Generator().manual_seed(1))
    if version == "chatglm":
        ids[:, -4], ids[:, -3] = GMASK, START
    return ids


def padded(rows: torch.Tensor, side: str, drop: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row whole, the others without their first `drop` tokens, padded."""
    padding = torch.full((len(rows) - 1, drop), 3)
    others = [padding, rows[1:, drop:]] if side == "left" else [rows[1:, drop:], padding]
    masks = [torch.zeros_like(padding), torch.ones_like(rows[1:, drop:])]
    mask = torch.cat(masks if side == "left" else masks[::-1], dim=1)
    return torch.cat((rows[:1], torch.cat(others, dim=1))), torch.cat((torch.ones_like(rows[:1]), mask))


# One answer by every way of computing it.


@pytest.mark.floor
@either_projection
@every_generation
def test_every_cache_gives_the_same_ids(model: ModelMaker, version: str, projection: bool) -> None:
    chatglm, rows = model(version, prefix_projection=projection), prompt(version)
    ids, mask = padded(rows, "left")
    expected = [chatglm.generate(row[None], use_cache=False, **GREEDY)[0, -10:] for row in (rows[0], rows[1, 4:])]
    without = model(version, pre_seq_len=None).generate(ids, attention_mask=mask, **GREEDY)[:, -10:]
    assert not torch.equal(torch.stack(expected), without)
    own = StaticCache(config=chatglm.config, max_cache_len=40)
    ways: list[dict[str, Any]] = [
        {"use_cache": False},
        {"use_cache": True},
        {"past_key_values": DynamicCache(config=chatglm.config)},
        {"cache_implementation": "static"},
        {"past_key_values": own},
    ]
    if version != "chatglm":
        ways += [{"prefill_chunk_size": 4}, {"prefill_chunk_size": 4, "cache_implementation": "static"}]
        embeds = {"inputs_embeds": chatglm.get_input_embeddings()(ids)}
        ways += [embeds, embeds | {"cache_implementation": "static"}]
    for way in ways:
        actual = chatglm.generate(ids, attention_mask=mask, **way, **GREEDY)[:, -10:]
        assert torch.equal(actual, torch.stack(expected)), way
    own.reset()
    actual = chatglm.generate(ids, attention_mask=mask, past_key_values=own, **GREEDY)[:, -10:]
    assert torch.equal(actual, torch.stack(expected))
    own.reset()
    if version != "chatglm":
        logits = chatglm(rows, past_key_values=own).logits
        torch.testing.assert_close(logits, chatglm(rows).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.floor
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_generation
def test_padded_equals_alone(model: ModelMaker, version: str, implementation: str, side: str) -> None:
    chatglm, rows = model(version), prompt(version)
    chatglm.set_attn_implementation(implementation)
    ids, mask = padded(rows, side)
    logits = chatglm(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for row, real, actual in zip((rows[0], rows[1, 4:]), mask.bool(), logits):
        torch.testing.assert_close(actual[real], chatglm(row[None]).logits[0], atol=2e-5, rtol=1e-5)


@every_generation
def test_cached_equals_uncached(model: ModelMaker, version: str) -> None:
    chatglm, ids = model(version), prompt(version)
    positions = {}
    if version == "chatglm":
        # A cache continued by hand needs the positions. The context, eight tokens, ends where the first part tells it.
        positions["position_ids"] = torch.stack((torch.arange(11).clamp(max=7), (torch.arange(11) - 7).clamp(min=0)))
        positions["position_ids"] = positions["position_ids"].expand(2, 2, 11)
    whole = chatglm(ids, **positions).logits
    for cache in (DynamicCache(), StaticCache(config=chatglm.config, max_cache_len=20)):
        parts = []
        for start, end in ((0, 9), (9, 10), (10, 11)):
            part = {name: values[..., start:end] for name, values in positions.items()}
            parts.append(chatglm(ids[:, start:end], past_key_values=cache, **part).logits)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)


@every_generation
def test_beams_do_not_depend_on_the_cache(model: ModelMaker, version: str) -> None:
    chatglm = model(version)
    ids, mask = padded(prompt(version), "left")
    beams = GREEDY | {"num_beams": 3, "num_return_sequences": 3, "attention_mask": mask}
    expected = chatglm.generate(ids, use_cache=False, **beams)
    assert torch.equal(chatglm.generate(ids, **beams), expected)
    assert torch.equal(chatglm.generate(ids, cache_implementation="static", **beams), expected)


@pytest.mark.parametrize("assistant_length", [None, 3, 60])
@every_generation
def test_drafts_do_not_change_the_answer(model: ModelMaker, version: str, assistant_length: int | None) -> None:
    chatglm, ids = model(version), prompt(version, 1)
    greedy = GREEDY | {"max_new_tokens": 25}
    expected = chatglm.generate(ids, **greedy)
    assistant = model(version, num_layers=1, pre_seq_len=assistant_length)
    assert torch.equal(chatglm.generate(ids, assistant_model=assistant, **greedy), expected)
    assert torch.equal(chatglm.generate(ids, prompt_lookup_num_tokens=3, **greedy), expected)


@every_generation
def test_an_assistant_keeps_its_prefix(model: ModelMaker, version: str) -> None:
    """The library takes it for text, and would cut into one that is longer than the text."""
    chatglm, ids = model(version, pre_seq_len=60), prompt(version, 1)
    assistant = model(version, pre_seq_len=60)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    calls: list[int] = []
    chatglm.transformer.encoder.register_forward_hook(lambda *_: calls.append(1))
    chatglm.generate(ids, assistant_model=assistant, **GREEDY | {"max_new_tokens": 24})
    # Every draft of the same model is right: six tokens each time.
    assert len(calls) <= 5


@pytest.mark.floor
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_generation
def test_a_cache_is_continued(model: ModelMaker, version: str, kind: str) -> None:
    chatglm, ids = model(version), prompt(version)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=chatglm.config, max_cache_len=60)
    first = chatglm.generate(ids, past_key_values=cache, **GREEDY | {"max_new_tokens": 4})
    assert int(cache.get_seq_length()) == 5 + first.shape[1] - 1
    longer = torch.cat((first, prompt(batch=2, length=3)), dim=1)
    expected = chatglm.generate(longer, use_cache=False, **GREEDY)
    assert torch.equal(chatglm.generate(longer, past_key_values=cache, **GREEDY), expected)


@pytest.mark.floor
@every_causal_generation
def test_a_prompt_without_padding_in_parts(model: ModelMaker, version: str) -> None:
    """The library leaves its mask out, so nothing but the cache tells what was before a part."""
    chatglm, ids = model(version), prompt(version)
    expected = chatglm.generate(ids, **GREEDY)
    for way in ({}, {"cache_implementation": "static"}):
        assert torch.equal(chatglm.generate(ids, prefill_chunk_size=4, **way, **GREEDY), expected)


def test_a_chunk_cannot_continue_a_cache(model: ModelMaker) -> None:
    chatglm, ids, cache = model(), prompt(), DynamicCache()
    ids = chatglm.generate(ids, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"prefill_chunk_size=4.*pre_seq_len"):
        chatglm.generate(ids, past_key_values=cache, prefill_chunk_size=4, **GREEDY)
    with pytest.raises(ValueError, match=r"generate_batch.*pre_seq_len.*batch_chat"):
        chatglm.generate_batch(inputs=ids.tolist())


@every_generation_case
def test_a_conversation_keeps_its_cache(
    name: str, case_folder: Callable[[str], Path], case_tokenizer: Callable[[str], Any]
) -> None:
    folder, tokenizer = case_folder(name), case_tokenizer(name)
    chatglm = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    chatglm.load_prefix_encoder(folder / "prefix_encoder-noproj.bin")
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    response, history, cache = chatglm.chat(tokenizer, "你好", return_past_key_values=True, **settings)
    assert (response, history) == chatglm.chat(tokenizer, "你好", **settings)
    assert cache.get_seq_length() == 5 + len(cache.token_ids)
    expected = chatglm.chat(tokenizer, "再见", history=history, **settings)
    shared, probe = copy.deepcopy((cache.token_ids, cache))
    probe.keep_common_prefix([*shared[:4], -1])
    assert probe.token_ids == shared[:4]
    assert probe.get_seq_length() == 5 + 4
    *again, longer = chatglm.chat(
        tokenizer, "再见", history=history, past_key_values=cache, return_past_key_values=True, **settings
    )
    assert tuple(again) == expected
    # ChatGLM-6B's context is bidirectional, so it begins anew.
    assert (longer is cache) == (name != "chatglm1")
    assert longer.get_seq_length() == 5 + len(longer.token_ids) > 5 + len(shared)
    chatglm.load_prefix_encoder(folder / "prefix_encoder-proj.bin")
    expected = chatglm.chat(tokenizer, "再见", history=history, **settings)
    assert chatglm.chat(tokenizer, "再见", history=history, past_key_values=longer, **settings) == expected


@pytest.mark.parametrize(
    ("version", "training"),
    [
        ("chatglm3", True),
        *(
            pytest.param(*cell, marks=pytest.mark.grid)
            for cell in (
                ("chatglm", False),
                ("chatglm2", False),
                ("chatglm3", False),
                ("glm4", False),
                ("chatglm", True),
                ("chatglm2", True),
                ("glm4", True),
            )
        ),
    ],
)
def test_full_graph_compile_equals_eager(model: ModelMaker, version: str, training: bool) -> None:
    chatglm, ids = model(version), prompt(version)
    # The models of other tests count as recompilations.
    torch.compiler.reset()
    compiled = torch.compile(chatglm, fullgraph=True, backend="aot_eager")
    if training:
        expected = gradients(chatglm, ids, use_cache=False)
        compiled(ids, labels=ids, use_cache=False).loss.backward()
        torch.testing.assert_close(collect_gradients(chatglm), expected)
        return
    with torch.no_grad():
        expected = chatglm(ids).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
        cache = StaticCache(config=chatglm.config, max_cache_len=16)
        positions = torch.tensor([[7], [3]]).expand(2, 2, 1) if version == "chatglm" else None
        chatglm(ids[:, :-1], past_key_values=cache)
        step = compiled(ids[:, -1:], past_key_values=cache, position_ids=positions)
        torch.testing.assert_close(step.logits[:, 0], expected[:, -1])


# Training.


def collect_gradients(chatglm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients, which are taken away."""
    found = {name: weight.grad.clone() for name, weight in chatglm.named_parameters() if weight.grad is not None}
    chatglm.zero_grad()
    return found


def gradients(chatglm: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    chatglm(ids, labels=ids, **inputs).loss.backward()
    return collect_gradients(chatglm)


@pytest.mark.floor
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@either_projection
@every_generation
def test_checkpointing_changes_no_gradient(
    model: ModelMaker, version: str, projection: bool, implementation: str
) -> None:
    # Of dropout, the prefix has its own.
    changes = {"attention_dropout": 0.2, "hidden_dropout": 0.2, "prefix_projection": projection}
    chatglm = model(version, **changes).train()
    chatglm.set_attn_implementation(implementation)
    seen: set[Any] = set()
    layer = chatglm.transformer.encoder.layers[0]
    for side in ("left", "right"):
        ids, mask = padded(prompt(version), side)
        expected = gradients(chatglm, ids, attention_mask=mask)
        assert len(expected) == (5 if projection else 1)
        assert all(gradient.abs().max() > 0 for gradient in expected.values())
        for use_reentrant in (False, True):
            chatglm.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            hook = layer.register_forward_pre_hook(
                lambda _, args, kw: seen.add(kw["past_key_values"]), with_kwargs=True
            )
            actual = gradients(chatglm, ids, attention_mask=mask)
            hook.remove()
            chatglm.gradient_checkpointing_disable()
            # The library warns where it takes a cache away.
            assert seen == {None}
            torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-5)


def test_checkpointed_layers_cannot_continue_a_cache(model: ModelMaker) -> None:
    chatglm, ids, cache = model().train(), prompt(), DynamicCache()
    chatglm(ids, past_key_values=cache)
    chatglm.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointing.*pre_seq_len.*past_key_values"):
        chatglm(ids, past_key_values=cache)
    # Generating, nothing is computed twice.
    chatglm.eval()
    expected = chatglm.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(chatglm.generate(ids, **GREEDY), expected)


@every_generation
def test_every_row_drops_out_alone_and_in_training_only(model: ModelMaker, version: str) -> None:
    chatglm, ids = model(version), prompt(version, 1).repeat(2, 1)
    calm = chatglm(ids).logits
    torch.testing.assert_close(calm[0], calm[1])
    rough = chatglm.train()(ids).logits
    assert not torch.allclose(rough[0], rough[1])


def trained(chatglm: PreTrainedModel) -> set[str]:
    return {name for name, weight in chatglm.named_parameters() if weight.requires_grad}


@pytest.mark.floor
@every_generation_case
def test_a_new_prefix_is_what_training_scripts_expect(name: str, case_folder: Callable[[str], Path]) -> None:
    load = {"trust_remote_code": True, "pre_seq_len": 40}
    for projection in (False, True):
        chatglm = AutoModel.from_pretrained(case_folder(name), prefix_projection=projection, **load)
        weights = dict(chatglm.transformer.prefix_encoder.named_parameters())
        assert len(weights) == (5 if projection else 1)
        assert trained(chatglm) == {f"{PREFIX}{key}" for key in weights}
        for key, weight in weights.items():
            assert weight.dtype == torch.float32
            if key == "embedding.weight":
                assert abs(weight.mean()) < 0.1
                assert abs(weight.std() - 1) < 0.1
            else:
                # PyTorch's own, uniform between -1 / sqrt(width of the input) and that.
                bound = weights[f"{key.rpartition('.')[0]}.weight"].shape[1] ** -0.5
                assert 0.8 * bound < weight.abs().max() <= bound


def test_a_head_is_trained_with_the_prefix(case_folder: Callable[[str], Path]) -> None:
    load = {"trust_remote_code": True, "pre_seq_len": 4}
    classifier = AutoModelForSequenceClassification.from_pretrained(case_folder("chatglm3"), **load)
    heads = {"classifier_head_score.weight", "classifier_head_score.bias"}
    assert trained(classifier) == {f"{PREFIX}embedding.weight"} | heads
    classifier.load_prefix_encoder(case_folder("chatglm3") / "prefix_encoder-proj.bin")
    assert heads < trained(classifier)
    assert "transformer.output_layer.weight" not in trained(classifier)


@every_generation
def test_nothing_but_the_prefix_is_trained(model: ModelMaker, version: str, tmp_path: Path) -> None:
    alone = {f"{PREFIX}embedding.weight"}
    chatglm = model(version)
    assert trained(chatglm) == alone
    chatglm.resize_token_embeddings(120)
    assert trained(chatglm) == alone
    chatglm.save_pretrained(tmp_path)
    assert trained(type(chatglm).from_pretrained(tmp_path)) == alone
    assert trained(type(chatglm)(chatglm.config)) == alone
    chatglm.quantize(8)
    assert trained(chatglm) == alone
    chatglm.dequantize()
    assert trained(chatglm) == alone
    bare = model(version, pre_seq_len=None)
    bare.resize_token_embeddings(120)
    bare.load_prefix_encoder(tmp_path)
    assert trained(bare) == alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_generation
def test_the_prefix_of_a_half_model_is_float32(
    model: ModelMaker, version: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    whole, ids = model(version, prefix_projection=True), prompt(version)
    whole.save_pretrained(tmp_path)
    chatglm = type(whole).from_pretrained(tmp_path, dtype=dtype)
    for name, weight in chatglm.named_parameters():
        assert weight.dtype == (torch.float32 if name.startswith(PREFIX) else dtype), name
        # Not rounded on the way.
        assert not name.startswith(PREFIX) or torch.equal(weight, whole.get_parameter(name))
    logits = chatglm(ids).logits
    assert logits.dtype == dtype
    assert (logits.float() - whole(ids).logits).abs().mean() < 0.05 * whole(ids).logits.abs().mean()
    assert all(gradient.dtype == torch.float32 for gradient in gradients(chatglm.train(), ids).values())
    chatglm.eval().save_pretrained(tmp_path / "again")
    again = type(whole).from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == dtype
    new = type(whole).from_pretrained(tmp_path / "again", pre_seq_len=9, ignore_mismatched_sizes=True)
    assert new.transformer.prefix_encoder.embedding.weight.dtype == torch.float32
    torch.testing.assert_close(again(ids).logits, chatglm(ids).logits)
    expected = chatglm.generate(ids, use_cache=False, **GREEDY)
    assert chatglm.generate(ids, cache_implementation="static", **GREEDY).shape == expected.shape


def test_a_prefix_made_from_a_configuration_is_float32(case_folder: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(case_folder("chatglm3"), trust_remote_code=True, pre_seq_len=4)
    chatglm = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    assert chatglm.dtype == torch.bfloat16
    assert chatglm.transformer.prefix_encoder.embedding.weight.dtype == torch.float32
    assert chatglm(prompt()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [8, 4])
@every_generation
def test_a_prefix_is_trained_on_a_quantized_model(model: ModelMaker, version: str, bits: int) -> None:
    chatglm, ids = model(version), prompt(version)
    chatglm.quantize(bits)
    chatglm.train()
    expected = gradients(chatglm, ids)
    assert set(expected) == {f"{PREFIX}embedding.weight"}
    chatglm.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(chatglm, ids), expected, atol=1e-7, rtol=1e-5)


# Files.


def described(chatglm: PreTrainedModel) -> tuple[int | None, bool, list[str], set[str]]:
    """What a failure must not change."""
    config = chatglm.config
    return config.pre_seq_len, config.prefix_projection, list(chatglm.state_dict()), trained(chatglm)


@pytest.mark.floor
@pytest.mark.parametrize("variant", ["noproj", "proj"])
@every_case
def test_a_published_prefix_loads_in_one_call(
    name: str, variant: str, case: Callable[[str], Any], case_folder: Callable[[str], Path]
) -> None:
    recorded = case(name)
    numbers, logits = recorded.expected["ptuning"][variant], recorded.tensors[f"ptuning.{variant}.logits"]
    chatglm = AutoModel.from_pretrained(case_folder(name), trust_remote_code=True, dtype=torch.float32).eval()
    chatglm.load_prefix_encoder(str(case_folder(name) / numbers["file"]))
    assert (chatglm.config.pre_seq_len, chatglm.config.prefix_projection) == (5, variant == "proj")
    tokenizer = AutoTokenizer.from_pretrained(case_folder(name), trust_remote_code=True)
    inputs = tokenizer(recorded.expected["single"]["text"], return_tensors="pt")
    with torch.no_grad():
        actual = chatglm(**inputs).logits[:, -logits.shape[1] :]
    assert (actual - logits).abs().max() <= 1e-4
    assert sorted(trained(chatglm)) == sorted(numbers["trainable_parameters"])


@either_projection
@every_generation
def test_a_saved_prefix_comes_back(model: ModelMaker, version: str, projection: bool, tmp_path: Path) -> None:
    chatglm, ids = model(version, prefix_projection=projection), prompt(version)
    names = {f"{PREFIX}{name}" for name, _ in chatglm.transformer.prefix_encoder.named_parameters()}
    assert (
        chatglm.save_prefix_encoder(tmp_path / "new" / "folder") == tmp_path / "new/folder/prefix_encoder.safetensors"
    )
    assert chatglm.save_prefix_encoder(tmp_path / "mine.safetensors") == tmp_path / "mine.safetensors"
    assert chatglm.save_prefix_encoder(str(tmp_path / "mine.bin")) == tmp_path / "mine.bin"
    assert load_file(tmp_path / "mine.safetensors").keys() == names
    assert torch.load(tmp_path / "mine.bin", weights_only=True).keys() == names
    expected = chatglm(ids).logits
    for path in (tmp_path / "new" / "folder", tmp_path / "mine.safetensors", tmp_path / "mine.bin"):
        # Whatever prefix it has, if any.
        for pre_seq_len in (None, 5, 9):
            other = model(version, pre_seq_len=pre_seq_len, prefix_projection=not projection)
            other.load_state_dict({k: v for k, v in chatglm.state_dict().items() if k not in names}, strict=False)
            other.load_prefix_encoder(path)
            assert torch.equal(other(ids).logits, expected)
    base = chatglm.base_model
    base.load_prefix_encoder(base.save_prefix_encoder(tmp_path / "base.bin"))
    assert torch.equal(chatglm(ids).logits, expected)


@pytest.mark.parametrize("form", ["folder", "sharded", "one bin", "sharded bin", "index", "short names"])
@every_generation
def test_a_prefix_is_taken_from_any_checkpoint(model: ModelMaker, version: str, form: str, tmp_path: Path) -> None:
    chatglm, ids = model(version, prefix_projection=True), prompt(version)
    path = tmp_path / "saved"
    weights = chatglm.state_dict()
    if form in ("folder", "sharded", "index"):
        chatglm.save_pretrained(path, max_shard_size="10GB" if form == "folder" else "20KB")
        assert (len(list(path.glob("*.safetensors"))) > 1) == (form != "folder")
        path = path / "model.safetensors.index.json" if form == "index" else path
    elif form == "short names":
        path = tmp_path / "short.safetensors"
        short = {k.removeprefix("transformer."): v for k, v in weights.items() if k.startswith(PREFIX)}
        save_file(short | {"step": torch.tensor(3)}, path)
    else:
        path.mkdir()
        # As the Trainer of the published scripts leaves it: the prefix alone, or with everything else.
        keys = list(weights) if form == "sharded bin" else [key for key in weights if key.startswith(PREFIX)]
        halves = [keys] if form == "one bin" else [keys[::2], keys[1::2]]
        shards = {f"pytorch_model-{i}.bin": half for i, half in enumerate(halves)}
        for name, half in shards.items():
            name = "pytorch_model.bin" if form == "one bin" else name
            # The format of before PyTorch 1.6 is read as well.
            torch.save({k: weights[k] for k in half}, path / name, _use_new_zipfile_serialization=form != "one bin")
        if form == "sharded bin":
            index = {"weight_map": {key: name for name, half in shards.items() for key in half}}
            (path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    bare = model(version, pre_seq_len=None)
    bare.load_state_dict({k: v for k, v in weights.items() if not k.startswith(PREFIX)})
    bare.load_prefix_encoder(path)
    assert torch.equal(bare(ids).logits, chatglm(ids).logits)


def test_no_file_is_lost_by_saving(model: ModelMaker, tmp_path: Path) -> None:
    chatglm, file = model(), tmp_path / "prefix_encoder.safetensors"
    file.write_text("mine", encoding="utf-8")
    chatglm.save_prefix_encoder(tmp_path)
    first = file.read_bytes()
    # The same once more needs no backup.
    chatglm.save_prefix_encoder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, f"{file.name}.bak"]
    with torch.no_grad():
        chatglm.transformer.prefix_encoder.embedding.weight += 1
    chatglm.save_prefix_encoder(tmp_path)
    assert (tmp_path / f"{file.name}.bak").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / f"{file.name}.bak.1").read_bytes() == first != file.read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"transformer.output_layer.weight": (2, 2)}, r"no prefix.*`prefix_encoder\.`.*pre_seq_len"),
        (
            {f"{PREFIX}embedding.weight": (8, 229376)},
            r"229376 .*ChatGLM-6B\).*64 = 2 layers x 2 x 2 key/value heads x 8",
        ),
        ({f"{PREFIX}embedding.weight": (8, 14336)}, r"14336 .*ChatGLM2-6B or ChatGLM3-6B\)"),
        ({f"{PREFIX}embedding.weight": (8, 20480)}, r"20480 .*GLM-4-9B\)"),
        ({f"{PREFIX}embedding.weight": (8, 99)}, r"99 numbers for each virtual token, and this model takes 64"),
        ({f"{PREFIX}embedding.weight": (8, 32)}, r"32 .*hidden size.*`trans` weights are missing"),
        (
            {f"{PREFIX}embedding.bias": (8,)},
            r"without.*missing: \['embedding.weight'\], unknown: \['embedding.bias'\]",
        ),
        (
            {f"{PREFIX}embedding.weight": (8, 64), f"{PREFIX}trans.2.weight": (64, 32)},
            r"with `prefix_projection`.*missing: \['trans.0.bias', 'trans.0.weight', 'trans.2.bias'\]",
        ),
        (
            {
                f"{PREFIX}embedding.weight": (8, 64),
                f"{PREFIX}trans.0.weight": (16, 64),
                f"{PREFIX}trans.0.bias": (16,),
                f"{PREFIX}trans.2.weight": (64, 16),
                f"{PREFIX}trans.2.bias": (64,),
            },
            r"`trans.0.weight` is \(16, 64\).*hidden size 32.*\(32, 64\)",
        ),
    ],
)
@pytest.mark.parametrize("pre_seq_len", [None, 5])
def test_a_prefix_that_does_not_fit_changes_nothing(
    model: ModelMaker, tmp_path: Path, pre_seq_len: int | None, weights: dict[str, tuple[int, ...]], message: str
) -> None:
    chatglm = model(pre_seq_len=pre_seq_len)
    before = described(chatglm), chatglm(prompt()).logits
    torch.save({name: torch.zeros(shape) for name, shape in weights.items()}, tmp_path / "prefix.bin")
    with pytest.raises(ValueError, match=message):
        chatglm.load_prefix_encoder(tmp_path / "prefix.bin")
    assert described(chatglm) == before[0]
    assert torch.equal(chatglm(prompt()).logits, before[1])


def test_what_is_no_file_of_weights_is_said(model: ModelMaker, tmp_path: Path) -> None:
    chatglm = model(pre_seq_len=None)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        chatglm.load_prefix_encoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has none of .*pytorch_model\.bin"):
        chatglm.load_prefix_encoder(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {f"{PREFIX}embedding.weight": "gone.bin"}}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="gone.bin"):
        chatglm.load_prefix_encoder(tmp_path)
    for name in ("a.json", "b.safetensors", "c.bin"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
        with pytest.raises(ValueError, match=f"{name} is not a file of weights"):
            chatglm.load_prefix_encoder(tmp_path / name)
    # Python objects are not read, let alone executed.
    torch.save({f"{PREFIX}embedding.weight": Path("x")}, tmp_path / "d.bin")
    with pytest.raises(ValueError, match=r"d\.bin is not a file of weights, .*more than tensors"):
        chatglm.load_prefix_encoder(tmp_path / "d.bin")
    with pytest.raises(ValueError, match=r"no prefix to save.*pre_seq_len"):
        chatglm.save_prefix_encoder(tmp_path / "new.bin")
    with pytest.raises(ValueError, match=r"c\.bin is a file"):
        model().save_prefix_encoder(tmp_path / "c.bin" / "prefix")
    with pytest.raises(ValueError, match=r"a\.json is a file"):
        model().save_prefix_encoder(tmp_path / "a.json")
    assert not (tmp_path / "new.bin").exists()


@pytest.mark.floor
def test_a_checkpoint_with_a_prefix_is_loaded_as_it_is(model: ModelMaker, tmp_path: Path) -> None:
    chatglm = model()
    load = type(chatglm).from_pretrained
    chatglm.save_pretrained(tmp_path / "whole")
    for settings in ({}, {"pre_seq_len": 5}, {"config": chatglm.config}):
        assert torch.equal(load(tmp_path / "whole", **settings)(prompt()).logits, chatglm(prompt()).logits)
    for name, stored, asked in (("pre_seq_len", 5, 8), ("prefix_projection", False, True)):
        with pytest.raises(ValueError, match=f"`{name}={stored}`.*`{name}={asked}`"):
            load(tmp_path / "whole", **{name: asked})
    config = copy.copy(chatglm.config)
    config.pre_seq_len = 7
    with pytest.raises(ValueError, match="`pre_seq_len=5`.*`pre_seq_len=7`"):
        load(tmp_path / "whole", config=config)
    # With the library's word that sizes may differ, a new prefix is made.
    other = load(tmp_path / "whole", pre_seq_len=8, ignore_mismatched_sizes=True)
    assert abs(other.transformer.prefix_encoder.embedding.weight.std() - 1) < 0.2
    # Of a prefix beside a model without one, loading knows nothing.
    model(pre_seq_len=None).save_pretrained(tmp_path / "beside")
    chatglm.save_prefix_encoder(tmp_path / "beside")
    assert load(tmp_path / "beside", pre_seq_len=8).config.pre_seq_len == 8
