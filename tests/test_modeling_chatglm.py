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
"""What must hold for the decoder whatever its weights are: the same answer by every way of computing it."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import GENERATION_CASES
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from waiting import run_in_two_processes


ModelMaker = Callable[..., PreTrainedModel]

# Every choice of the decoder that a published configuration can make, together and alone.
FLAGS: dict[str, dict[str, Any]] = {
    "chatglm3": {},
    "one_group": {"multi_query_group_num": 1},
    "multi_head": {"multi_query_attention": False},
    "bias": {"add_bias_linear": True},
    "no_qkv_bias": {"add_qkv_bias": False},
    "layernorm": {"rmsnorm": False},
    "residual_post_layernorm": {"apply_residual_connection_post_layernorm": True},
    "no_final_norm": {"post_layer_norm": False},
    "fp32_residual": {"fp32_residual_connection": True},
    "interpolated": {"model_version": "chatglm2", "rope_ratio": 4},
    "raised_base": {"rope_ratio": 50},
    "glm4": {"model_version": "glm4", "rope_ratio": 500, "multi_query_group_num": 4, "layernorm_epsilon": 1.5625e-07},
    "all": {
        "multi_query_attention": False,
        "add_bias_linear": True,
        "rmsnorm": False,
        "apply_residual_connection_post_layernorm": True,
        "post_layer_norm": False,
        "fp32_residual_connection": True,
    },
}


def prompt(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def norm_by_hand(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, config: Any) -> torch.Tensor:
    if config.rmsnorm:
        return x / (x.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt() * weights[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear_by_hand(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def rotate_by_hand(vector: torch.Tensor, position: int, config: Any) -> torch.Tensor:
    rotated, width = vector.clone(), vector.shape[-1] // 2
    for pair in range(width // 2):
        if config.model_version == "chatglm2":
            angle = position / config.rope_ratio * 10000 ** (-2 * pair / width)
        else:
            angle = position * (10000 * config.rope_ratio) ** (-2 * pair / width)
        a, b = vector[..., 2 * pair], vector[..., 2 * pair + 1]
        rotated[..., 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        rotated[..., 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return rotated


def attention_by_hand(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str, config: Any) -> torch.Tensor:
    """Attention of one sequence `[seq, hidden]`, position by position and head by head."""
    heads, width = config.num_attention_heads, config.kv_channels
    groups = config.multi_query_group_num if config.multi_query_attention else heads
    fused = linear_by_hand(x, weights, f"{name}.query_key_value")
    if config.multi_query_attention:
        q, k, v = (part.unflatten(-1, (-1, width)) for part in fused.split([heads * width, *[groups * width] * 2], -1))
    else:
        q, k, v = fused.unflatten(-1, (heads, 3, width)).unbind(-2)
    q = torch.stack([rotate_by_hand(row, position, config) for position, row in enumerate(q)])
    k = torch.stack([rotate_by_hand(row, position, config) for position, row in enumerate(k)])
    output = torch.zeros(len(x), heads, width, dtype=x.dtype)
    for position in range(len(x)):
        for head in range(heads):
            group = head * groups // heads
            scores = k[: position + 1, group] @ q[position, head] / math.sqrt(width)
            output[position, head] = scores.softmax(0) @ v[: position + 1, group]
    return linear_by_hand(output.flatten(1), weights, f"{name}.dense")


def logits_by_hand(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The network written down once more, in float64 and without any batching, after the published description."""
    config = model.config
    weights = {name.removeprefix("transformer."): value.double() for name, value in model.state_dict().items()}
    x = weights["embedding.word_embeddings.weight"][ids]
    for layer in range(config.num_layers):
        name = f"encoder.layers.{layer}"
        normed = norm_by_hand(x, weights, f"{name}.input_layernorm", config)
        residual = normed if config.apply_residual_connection_post_layernorm else x
        x = residual + attention_by_hand(normed, weights, f"{name}.self_attention", config)
        normed = norm_by_hand(x, weights, f"{name}.post_attention_layernorm", config)
        residual = normed if config.apply_residual_connection_post_layernorm else x
        gate, up = linear_by_hand(normed, weights, f"{name}.mlp.dense_h_to_4h").chunk(2, dim=-1)
        x = residual + linear_by_hand(gate * gate.sigmoid() * up, weights, f"{name}.mlp.dense_4h_to_h")
    if config.post_layer_norm:
        x = norm_by_hand(x, weights, "encoder.final_layernorm", config)
    return linear_by_hand(x, weights, "output_layer")


@pytest.mark.floor
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_published_flag_computes_what_it_says(tiny_model: ModelMaker, flags: dict[str, Any]) -> None:
    model, ids = tiny_model(**flags), prompt(1)
    expected = logits_by_hand(model, ids[0])
    torch.testing.assert_close(model(ids).logits[0].double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_cached_equals_uncached(tiny_model: ModelMaker, flags: dict[str, Any]) -> None:
    model, ids = tiny_model(**flags), prompt()
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in ids.split([4, 1, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 98}
    assert torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))


@pytest.mark.floor
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padded_equals_alone(tiny_model: ModelMaker, side: str, implementation: str) -> None:
    model = tiny_model(rope_ratio=4)
    model.set_attn_implementation(implementation)
    rows, lengths = prompt(3, 12), (12, 5, 1)
    ids, mask = torch.zeros_like(rows), torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        real = slice(12 - length, 12) if side == "left" else slice(0, length)
        ids[row, real], mask[row, real] = rows[row, :length], 1
    padded = model(ids, attention_mask=mask).logits
    assert padded.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(rows[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(padded[row][mask[row].bool()], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_reads_the_last_real_token(tiny_model: ModelMaker, side: str) -> None:
    model = tiny_model("ChatGLMForSequenceClassification", num_labels=3)
    row = prompt(1, 6)
    # A real token may have the id of the padding.
    row[0, -1] = 0
    padding, zeros = torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long)
    parts = ([padding, row], [zeros, torch.ones_like(row)])
    ids, mask = (torch.cat(part if side == "left" else part[::-1], dim=1) for part in parts)
    alone = model(row, labels=torch.tensor([1]))
    padded = model(ids, attention_mask=mask, labels=torch.tensor([1]))
    torch.testing.assert_close(padded.logits, alone.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.loss, -alone.logits.log_softmax(-1)[0, 1])
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, padded.logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_nothing_but_padding_stay_finite(tiny_model: ModelMaker, dtype: torch.dtype) -> None:
    for implementation in ("eager", "sdpa"):
        model = tiny_model().to(dtype).train()
        model.set_attn_implementation(implementation)
        mask = torch.tensor([[0] * 11, [0] * 6 + [1] * 5])
        outputs = model(prompt(), attention_mask=mask, labels=torch.where(mask == 1, prompt(), -100))
        outputs.loss.backward()
        assert outputs.logits.isfinite().all()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_eager_equals_sdpa(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = model(ids, attention_mask=mask).logits
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    actual = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


@pytest.mark.compiler
@pytest.mark.slow
def test_flex_equals_sdpa(tiny_model: ModelMaker) -> None:
    # flex attention on a CPU wants heads of 16 channels at least.
    model, ids = tiny_model(kv_channels=16), prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        actual = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-5)


def test_static_cache_equals_dynamic_cache(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    greedy = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 98}
    expected = model.generate(ids, **greedy)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), expected)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(model.generate(ids, past_key_values=cache, **greedy), expected)


@pytest.mark.parametrize("training", [False, True])
def test_full_graph_compile_equals_eager(tiny_model: ModelMaker, training: bool) -> None:
    model, ids = tiny_model().train(training), prompt()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if training:
        model(ids, labels=ids, use_cache=False).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        compiled(ids, labels=ids, use_cache=False).loss.backward()
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
        return
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :-1], past_key_values=cache)
        torch.testing.assert_close(compiled(ids[:, -1:], past_key_values=cache).logits[:, 0], expected[:, -1])


@pytest.mark.compiler
@pytest.mark.slow
def test_inductor_equals_eager(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(compiled, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_export_equals_eager(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(input_ids=ids, use_cache=False).logits, model(ids).logits)


def test_beams_do_not_depend_on_the_cache(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    beams = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, "do_sample": False, "eos_token_id": 98}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


def test_inputs_embeds_equal_ids(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 98}
    expected = model.generate(ids, **greedy)[:, ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **greedy), expected)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_chunked_prefill_equals_whole(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt(2, 23)
    greedy = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 98}
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **greedy), model.generate(ids, **greedy))


def test_logits_to_keep(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_attentions_and_hidden_states_are_real(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model(), prompt()
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 11, 11)] * 2
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 11))
        assert torch.equal(weights, weights.tril())
    assert len(outputs.hidden_states) == 3
    torch.testing.assert_close(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    last = model.transformer.encoder.final_layernorm(outputs.hidden_states[-1])
    torch.testing.assert_close(model.transformer.output_layer(last), outputs.logits)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model().train(), prompt()
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    for use_reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
        model.gradient_checkpointing_disable()


def test_dropout_acts_in_training_only(tiny_model: ModelMaker) -> None:
    ids = prompt()
    for name in ("hidden_dropout", "attention_dropout"):
        model = tiny_model(**{name: 0.5})
        torch.testing.assert_close(model(ids).logits, tiny_model()(ids).logits)
        model.train()
        assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_embeddings_can_be_replaced_and_resized(tiny_model: ModelMaker, tmp_path: Path) -> None:
    for head in ("ChatGLMForConditionalGeneration", "ChatGLMModel", "ChatGLMForSequenceClassification"):
        model, ids = tiny_model(head), prompt()
        before = model(ids)[0]
        model.resize_token_embeddings(120)
        assert model.config.padded_vocab_size == model.config.vocab_size == 120
        assert type(model.get_output_embeddings()).__name__ == "ChatGLMLinear"
        assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (120, 32)
        torch.testing.assert_close(model(ids)[0][..., : before.shape[-1]], before)
        model.save_pretrained(tmp_path / head)
        torch.testing.assert_close(type(model).from_pretrained(tmp_path / head)(ids)[0], model(ids)[0])


def test_base_model_is_a_text_encoder(tiny_model: ModelMaker, chatglm: Any, tmp_path: Path) -> None:
    model, ids = tiny_model(), prompt()
    model.save_pretrained(tmp_path)
    encoder = chatglm.ChatGLMModel.from_pretrained(tmp_path)
    outputs = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    torch.testing.assert_close(encoder.output_layer(outputs.last_hidden_state), model(ids).logits)
    assert outputs.hidden_states[-2].shape == (2, 11, 32)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_a_prompt_without_padding_needs_nothing_of_size_seq_by_seq(tiny_model: ModelMaker) -> None:
    length = 4096
    model = tiny_model(seq_length=length)
    with torch.no_grad(), LargestTensor() as largest:
        model.generate(prompt(1, length), max_new_tokens=1, do_sample=False)
    # Nothing grows faster than the widest activation: two times 48 channels for each token.
    assert largest.numel <= 96 * length


def test_forward_never_waits_for_the_device(tiny_model: ModelMaker) -> None:
    # On the meta device there are no values, so whatever reads one fails.
    model = tiny_model().to("meta")
    assert model(prompt().to("meta"), labels=prompt().to("meta")).logits.shape == (2, 11, 99)
    cache = DynamicCache(config=model.config)
    for part in prompt().to("meta").split([10, 1], dim=1):
        assert model(part, past_key_values=cache).logits.shape[1] == part.shape[1]


def test_half_precision_residual_stream_in_float32(tiny_model: ModelMaker) -> None:
    ids = prompt()
    for post_layer_norm in (True, False):
        model = tiny_model(fp32_residual_connection=True, post_layer_norm=post_layer_norm)
        expected = model(ids).logits
        outputs = model.to(torch.bfloat16)(ids, output_hidden_states=True)
        assert [states.dtype for states in outputs.hidden_states[1:]] == [torch.float32] * 2
        assert outputs.logits.dtype == torch.bfloat16
        assert (outputs.logits - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_saved_again_is_the_same(case_folder: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    stored: dict[str, torch.Tensor] = {}
    for file in case_folder(name).glob("pytorch_model*.bin"):
        stored |= torch.load(file, weights_only=True)
    stored.pop("transformer.rotary_pos_emb.inv_freq")
    model = AutoModel.from_pretrained(case_folder(name), trust_remote_code=True)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        saved = load_file(folder / "model.safetensors")
        assert {key: value.dtype for key, value in saved.items()} == {
            key: value.dtype for key, value in stored.items()
        }
        assert all(torch.equal(saved[key], stored[key]) for key in stored)
        assert {file.name for file in folder.glob("*.py")} >= {"modeling_chatglm.py", "conversation_chatglm.py"}
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name
    sharded = tmp_path / "sharded"
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    again = AutoModel.from_pretrained(sharded, trust_remote_code=True)
    assert all(torch.equal(value, stored[key]) for key, value in again.state_dict().items())


def std_is(tensor: torch.Tensor, std: float) -> bool:
    return bool(tensor.isfinite().all()) and abs(tensor.float().std().item() - std) < 0.25 * std


def test_missing_weights_are_initialized(case_folder: Callable[[str], Path]) -> None:
    folder = case_folder("chatglm3-32k")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=40)
    assert std_is(classifier.classifier_head.weight, 0.02)
    assert torch.equal(classifier.classifier_head.bias, torch.zeros(40))
    unused = {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}
    assert unused == {"transformer.output_layer.weight"}


def test_everything_missing_is_initialized(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    reference = AutoModel.from_pretrained(case_folder("chatglm3"), trust_remote_code=True)
    folder = tmp_path / "empty"
    shutil.copytree(case_folder("chatglm3"), folder, ignore=shutil.ignore_patterns("*.bin*"))
    torch.save({}, folder / "pytorch_model.bin")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith("bias"):
            assert torch.equal(weight, torch.zeros_like(weight)), name
        else:
            assert std_is(weight, 0.02), name
    assert torch.equal(model.transformer.rotary_pos_emb.inv_freq, reference.transformer.rotary_pos_emb.inv_freq)
    assert model.transformer.rotary_pos_emb.inv_freq[0] == 1.0


@pytest.mark.parametrize("way", ["from_pretrained", "half", "bfloat16", "to"])
def test_rotary_angles_survive_half_precision(tiny_model: ModelMaker, tmp_path: Path, way: str) -> None:
    model = tiny_model(kv_channels=128)
    dtype = torch.float16 if way == "half" else torch.bfloat16
    if way == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path, dtype=dtype)
    else:
        model = model.to(dtype) if way == "to" else getattr(model, way)()
    positions = torch.tensor([[1000, 8000]])
    cos, sin = model.transformer.rotary_pos_emb(torch.zeros(1, 1, 1, dtype=dtype), positions)
    angles = positions[0, :, None] * 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    assert cos.dtype == dtype
    torch.testing.assert_close(cos[0, 0, :, 0].double(), angles.cos(), atol=4e-3, rtol=0)
    torch.testing.assert_close(sin[0, 0, :, 0].double(), angles.sin(), atol=4e-3, rtol=0)


def test_arguments_of_published_training_scripts_are_accepted(case_folder: Callable[[str], Path]) -> None:
    model = AutoModel.from_pretrained(case_folder("chatglm3"), trust_remote_code=True, empty_init=False)
    assert model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight.isfinite().all()


def test_classification_wants_a_mask_of_rows(tiny_model: ModelMaker) -> None:
    model, ids = tiny_model("ChatGLMForSequenceClassification"), prompt()
    with pytest.raises(ValueError, match="2, 1, 11, 11"):
        model(ids, attention_mask=torch.zeros(2, 1, 11, 11))


@pytest.fixture
def tensor_parallel_script(tmp_path: Path) -> Iterator[Path]:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from transformers import AutoModel\n"
        "torch.set_num_threads(1)\n"
        "ids = torch.arange(3, 19).view(2, 8)\n"
        "for folder in sys.argv[2:]:\n"
        "    options = {'trust_remote_code': True, 'dtype': torch.float32}\n"
        "    whole = AutoModel.from_pretrained(folder, **options)(ids).logits\n"
        "    model = AutoModel.from_pretrained(folder, **options, tp_plan='auto')\n"
        "    logits = model(ids).logits\n"
        "    logits = getattr(logits, 'full_tensor', lambda: logits)()\n"
        "    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)\n"
        "    weight = model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight\n"
        "    assert 2 * weight.to_local().shape[0] == weight.shape[0]\n"
        "try:\n"
        "    AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, tp_plan='auto')\n"
        "except ValueError as error:\n"
        "    assert 'cannot split quantized weights' in str(error)\n"
        "else:\n"
        "    raise AssertionError('quantized weights were split')\n",
        encoding="utf-8",
    )
    yield script


@pytest.mark.grid
@pytest.mark.slow
def test_tensor_parallel_equals_one_process(case_folder: Callable[[str], Path], tensor_parallel_script: Path) -> None:
    run_in_two_processes(tensor_parallel_script, *map(case_folder, ("chatglm2-int4", *GENERATION_CASES)))
