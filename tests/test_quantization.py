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
"""Int8 and int4 weights: the published format, quantizing, saving and loading, training on top, and plain errors.

The products themselves are tested in test_quantization_kernels.py, the published int4 checkpoint with the others in
test_parity.py and test_parity_chat.py.
"""

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, PreTrainedModel, StaticCache, Trainer, TrainingArguments


ModelMaker = Callable[..., PreTrainedModel]
Named = Callable[[str], Any]

CASES = ["chatglm1", "chatglm2", "chatglm2-32k", "chatglm3", "chatglm3-32k", "glm4"]
RECORDED = ["fp16.int8", "fp16.int4", "fp32.int8", "fp32.int4"]
SOURCES = {"fp16": torch.float16, "fp32": torch.float32}
LOGITS_LIMIT = 1e-4

GMASK, START = 91, 94
# All widths divide by 32; ChatGLM-6B ties its output layer, which the others do not.
GENERATIONS: dict[str, dict[str, Any]] = {
    "chatglm": {
        "model_version": "chatglm",
        "multi_query_attention": False,
        "add_bias_linear": True,
        "bos_token_id": START,
        "eos_token_id": 95,
        "pad_token_id": 3,
    },
    "chatglm2": {"model_version": "chatglm2", "rope_ratio": 4},
    "chatglm3": {},
    "glm4": {"model_version": "glm4", "multi_query_group_num": 4, "layernorm_epsilon": 1.5625e-07},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "groups": {"bits": 4, "group_size": 32},
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of the greatest logit: what rounding in half precision adds up to, of weights, results and group scales.
HALF_LIMIT = {torch.float32: 1e-5, torch.float16: 0.03, torch.bfloat16: 0.06}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 98}
LAYER_NAMES = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


@pytest.fixture(scope="module")
def quantization(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization")


@pytest.fixture
def make(tiny_model: ModelMaker) -> ModelMaker:
    """A tiny float model of a generation."""

    def model(generation: str = "chatglm3", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
        return tiny_model(**{"ffn_hidden_size": 64} | GENERATIONS[generation] | changes).to(dtype)

    return model


def prompt(batch: int = 2, length: int = 11) -> torch.Tensor:
    """Ids that every generation reads, with ChatGLM-6B's start of the answer among them."""
    ids = torch.randint(4, 89, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, 6], ids[:, 7] = GMASK, START
    return ids


def logits_of(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt() if ids is None else ids).logits


def assert_near(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Within a part of the greatest expected value."""
    assert actual.isfinite().all()
    error = ((actual.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    assert error <= limit, f"off by {error:.3g} of the greatest value, the limit is {limit:.3g}"


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """Bitwise, dtypes included."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].equal(tensor), name


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "QuantizedLinear"}


def assert_same_layers(actual: nn.Module, expected: nn.Module) -> None:
    """Bits and groups are in no tensor, and neither is what is trained."""
    ours, theirs = quantized_layers(actual), quantized_layers(expected)
    assert [*ours] == [*theirs]
    for name, layer in theirs.items():
        assert (ours[name].bits, ours[name].group_size) == (layer.bits, layer.group_size), name
        assert not ours[name].weight.requires_grad and not ours[name].weight_scale.requires_grad


def with_decoded_weights(model: PreTrainedModel, float_model: PreTrainedModel) -> PreTrainedModel:
    """The float model with what the quantized weights stand for in float32, rounded to its own dtype."""
    twin = copy.deepcopy(float_model)
    for name, layer in quantized_layers(model).items():
        linear = twin.get_submodule(name)
        linear.weight = nn.Parameter(layer.dequantize(torch.float32).to(linear.weight.dtype), requires_grad=False)
    return twin


# ---------------------------------------------------------------------------------------------------------------------
# The format
# ---------------------------------------------------------------------------------------------------------------------


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("pytorch_model*.bin")):
        weights |= torch.load(file, weights_only=True)
    return weights


def recorded_layers(case: Any, kind: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Published name of a layer -> its recorded codes and scales."""
    end = ".weight_scale"
    names = [key[len(f"quant.{kind}.") : -len(end)] for key in case.tensors if key.startswith(f"quant.{kind}.")]
    names = [name for name in names if f"quant.{kind}.{name}{end}" in case.tensors]
    layers = {
        name: tuple(case.tensors[f"quant.{kind}.{name}.{part}"] for part in ("weight", "weight_scale"))
        for name in names
    }
    assert len(layers) == 12
    return layers


@pytest.mark.floor
@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("name", CASES)
def test_codes_and_scales_are_the_recorded_ones(
    name: str, kind: str, case: Named, case_folder: Named, quantization: ModuleType
) -> None:
    dtype, bits = SOURCES[kind[:4]], int(kind[-1])
    scale_dtype = torch.float16 if name == "chatglm1" else None
    weights, changed, total = stored_weights(case_folder(name)), 0, 0
    for layer, (codes, scale) in recorded_layers(case(name), kind).items():
        ours, our_scale = quantization.quantize_weight(
            weights[f"{layer}.weight"].to(dtype), bits, scale_dtype=scale_dtype
        )
        assert (ours.dtype, our_scale.dtype) == (torch.int8, scale.dtype)
        assert our_scale.equal(scale)
        if bits == 4:
            ours, codes = quantization.unpack_int4(ours), quantization.unpack_int4(codes)
        steps = (ours.int() - codes.int()).abs()
        assert steps.max() <= 1
        changed, total = changed + steps.sum().item(), total + steps.numel()
    # The published code divides in float16, which may round a code to its neighbour.
    assert changed <= (0.02 * total if dtype == torch.float16 else 0)


@pytest.mark.parametrize("kind", ["fp16.int8", "fp16.int4"])
@pytest.mark.parametrize("name", CASES)
def test_recorded_codes_decode_exactly(name: str, kind: str, case: Named, quantization: ModuleType) -> None:
    for layer, (codes, scale) in recorded_layers(case(name), kind).items():
        expected = case(name).tensors[f"quant.{kind}.{layer}.dequantized"]
        assert quantization.dequantize_weight(codes, scale, expected.shape[1], torch.float32).equal(expected)


def write_published_folder(folder: Path, case: Any, kind: str) -> None:
    """Turns the folder of a float checkpoint into that of a quantized one, as the published ones are laid out."""
    weights = stored_weights(folder)
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    for layer, (codes, scale) in recorded_layers(case, kind).items():
        weights |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
    torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_bit"] = int(kind[-1])
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.floor
@pytest.mark.parametrize("kind", RECORDED)
@pytest.mark.parametrize("name", CASES)
def test_published_layout_loads_and_gives_the_recorded_logits(
    name: str, kind: str, tmp_path: Path, case: Named, case_folder: Named
) -> None:
    folder = shutil.copytree(case_folder(name), tmp_path / name)
    write_published_folder(folder, case(name), kind)
    model, info = AutoModel.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tensors = case(name).tensors
    expected = tensors[f"quant.{kind}.logits"]
    logits = logits_of(model, tensors["single.input_ids"])[:, -expected.shape[1] :]
    assert (logits - expected).abs().max() <= LOGITS_LIMIT
    scale_dtype = next(iter(recorded_layers(case(name), kind).values()))[1].dtype
    for layer in quantized_layers(model).values():
        assert layer.weight_scale.dtype == scale_dtype


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_largest_weight_of_a_row_keeps_its_sign(dtype: torch.dtype, bits: int, quantization: ModuleType) -> None:
    """In bfloat16 the published code divides up to 127.5, which wraps around to -128."""
    weight = (torch.randn(512, 256) * 0.02).to(dtype)
    codes, scale = quantization.quantize_weight(weight, bits)
    codes = codes if bits == 8 else quantization.unpack_int4(codes)
    at = weight.float().abs().argmax(1, keepdim=True)
    largest = 2 ** (bits - 1) - 1
    assert codes.gather(1, at).float().equal(weight.float().gather(1, at).sign() * largest)
    assert codes.abs().max() == largest
    # Made in float32 and rounded once.
    assert scale.equal((weight.float().abs().amax(1) / largest).to(scale.dtype))
    decoded = codes.float() * scale.float()[:, None]
    # Half a step, and what rounding the scale to float16 adds.
    assert ((decoded - weight.float()).abs() <= 0.5 * scale.float()[:, None] * (1 + 2**-11 * 2 * largest)).all()


@pytest.mark.parametrize("method", ["absmax", "mse"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_nearly_nothing(bits: int, method: str, quantization: ModuleType) -> None:
    weight = torch.randn(6, 64).half()
    weight[1] = 0
    weight[2] = torch.randint(-1, 2, (64,)) * 2.0**-24  # the smallest float16
    weight[3] = weight[3] * 2.0**-16  # largest value near 1e-5, scale below the smallest float16 for int8
    codes, scale = quantization.quantize_weight(weight, bits, method)
    decoded = quantization.dequantize_weight(codes, scale, 64, torch.float32)
    assert scale[1] == 1 and not decoded[1].any()
    assert scale.isfinite().all() and (scale > 0).all()
    # No sign is flipped and nothing grows, however coarse float16 scales are down there.
    assert (decoded * weight.float() >= 0).all()
    assert (decoded.abs().amax(1) <= 1.5 * weight.float().abs().amax(1)).all()
    assert quantization.quantize_weight(weight.float(), bits)[1].dtype == torch.float32


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
def test_mse_is_never_worse_in_the_same_format(bits: int, group_size: int | None, quantization: ModuleType) -> None:
    weight = torch.randn(40, 256)
    weight[:8, :3] *= 20  # outliers
    error = {}
    for method in ("absmax", "mse"):
        codes, scale = quantization.quantize_weight(weight, bits, method, group_size)
        assert codes.shape == (40, 256 * bits // 8)
        assert scale.shape == ((40, 256 // group_size) if group_size else (40,))
        decoded = quantization.dequantize_weight(codes, scale, 256, torch.float32)
        groups = (decoded - weight).view(40, -1, group_size or 256)
        error[method] = groups.square().sum(-1)
    assert (error["mse"] <= error["absmax"] * (1 + 1e-5)).all()
    assert bits == 8 or error["mse"].sum() < 0.9 * error["absmax"].sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_are_rows_of_their_own(bits: int, quantization: ModuleType) -> None:
    weight = torch.randn(5, 96)
    codes, scale = quantization.quantize_weight(weight, bits, group_size=32)
    alone = [quantization.quantize_weight(part, bits) for part in weight.split(32, dim=1)]
    assert codes.equal(torch.cat([part for part, _ in alone], dim=1))
    assert scale.equal(torch.stack([part for _, part in alone], dim=1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weights_in_any_memory_layout(
    dtype: torch.dtype, quantization: ModuleType, source: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 70).to(dtype)
    for bits in (8, 4):
        expected = quantization.quantize_weight(weight.t().contiguous(), bits)
        assert expected[1].dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
        for stored in (weight.t(), torch.cat((weight, weight)).t()[:, :64], nn.Parameter(weight.t())):
            codes, scale = quantization.quantize_weight(stored, bits)
            assert codes.is_contiguous() and scale.is_contiguous()
            assert codes.equal(expected[0]) and scale.equal(expected[1])
        monkeypatch.setattr(source("quantization_kernels"), "ELEMENTS_AT_A_TIME", 200)  # three rows at a time
        pieces = quantization.quantize_weight(weight.t(), bits)
        assert pieces[0].equal(expected[0]) and pieces[1].equal(expected[1])
        monkeypatch.undo()


# ---------------------------------------------------------------------------------------------------------------------
# Quantizing, saving and loading
# ---------------------------------------------------------------------------------------------------------------------


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.floor
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_quantize_save_and_load(
    generation: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, make: ModelMaker
) -> None:
    """The three ways to a quantized model give the same one, bit for bit."""
    float_model = make(generation, dtype)
    float_model.save_pretrained(tmp_path / "float")
    model = copy.deepcopy(float_model)
    assert model.quantize(**settings) is model
    assert [*quantized_layers(model)] == [
        f"transformer.encoder.layers.{i}.{name}" for i in range(2) for name in LAYER_NAMES
    ]
    assert all(layer.bits == settings["bits"] for layer in quantized_layers(model).values())
    scale_dtype = torch.float32 if (dtype, generation == "chatglm") == (torch.float32, False) else torch.float16
    assert {layer.weight_scale.dtype for layer in quantized_layers(model).values()} == {scale_dtype}
    logits = logits_of(model)
    assert logits.dtype == dtype
    assert_near(logits, logits_of(with_decoded_weights(model, float_model)), HALF_LIMIT[dtype])

    model.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) > 1
    again = type(model).from_pretrained(tmp_path / "saved")
    on_the_fly = type(model).from_pretrained(
        tmp_path / "float", dtype=dtype, quantization_config={"quant_method": "chatglm", **settings}
    )
    for other in (again, on_the_fly):
        assert not other.training
        assert_same_state(other, model)
        assert_same_layers(other, model)
        assert logits_of(other).equal(logits)
    again.save_pretrained(tmp_path / "again")
    assert saved_config(tmp_path / "again") == saved_config(tmp_path / "saved")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_the_saved_file_is_a_published_one(
    generation: str, settings: dict[str, Any], tmp_path: Path, make: ModelMaker
) -> None:
    """`quantization_bit` alone in the published format; what published code cannot read does not look like it."""
    model = make(generation, torch.float16).quantize(**settings)
    model.save_pretrained(tmp_path)
    config = saved_config(tmp_path)
    if "group_size" in settings:
        assert not config.get("quantization_bit")
        assert config["quantization_config"] == {
            "quant_method": "chatglm",
            "bits": 4,
            "method": "absmax",
            "group_size": 32,
            "output_layer_bits": None,
        }
    else:
        assert config["quantization_bit"] == settings["bits"]
        assert "quantization_config" not in config
    weights = load_file(tmp_path / "model.safetensors")
    layer = "transformer.encoder.layers.1.mlp.dense_4h_to_h"
    columns = 64 * settings["bits"] // 8
    assert weights[f"{layer}.weight"].shape == (32, columns) and weights[f"{layer}.weight"].dtype == torch.int8
    assert weights[f"{layer}.weight_scale"].shape == ((32, 2) if "group_size" in settings else (32,))
    assert weights[f"{layer}.weight_scale"].dtype == torch.float16
    assert weights["transformer.embedding.word_embeddings.weight"].dtype == torch.float16
    assert sum(name.endswith("weight_scale") for name in weights) == 8


def test_mse_is_the_published_format_too(tmp_path: Path, make: ModelMaker) -> None:
    """Only the scales differ, so that the file does not say how they were found."""
    make().save_pretrained(tmp_path / "float")
    model, absmax = make().quantize(4, method="mse"), make().quantize(4)
    model.save_pretrained(tmp_path / "saved")
    config = saved_config(tmp_path / "saved")
    assert config["quantization_bit"] == 4 and "quantization_config" not in config
    on_the_fly = type(model).from_pretrained(
        tmp_path / "float", quantization_config={"quant_method": "chatglm", "bits": 4, "method": "mse"}
    )
    for other in (type(model).from_pretrained(tmp_path / "saved"), on_the_fly):
        assert_same_state(other, model)
    layer = "transformer.encoder.layers.0.mlp.dense_h_to_4h"
    assert not model.get_submodule(layer).weight_scale.equal(absmax.get_submodule(layer).weight_scale)


RELOAD = """
import sys, torch
from transformers import AutoModel
torch.set_num_threads(1)
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    logits = model(torch.load(sys.argv[2])).logits
torch.save((logits, model.state_dict()), sys.argv[3])
"""


@pytest.mark.floor
def test_a_saved_folder_is_complete_for_another_process(tmp_path: Path, case_folder: Named) -> None:
    """Code files included, and packing for the processor never reaches the file."""
    folder, ids = tmp_path / "saved", torch.arange(3, 19).view(2, 8)
    model = AutoModel.from_pretrained(case_folder("chatglm3-32k"), trust_remote_code=True, dtype=torch.bfloat16)
    model.quantize(4)
    logits = logits_of(model, ids)
    model.save_pretrained(folder)
    assert {"quantization.py", "quantization_kernels.py"} <= {path.name for path in folder.glob("*.py")}
    torch.save(ids, tmp_path / "ids.pt")
    command = [sys.executable, "-c", RELOAD, folder, tmp_path / "ids.pt", tmp_path / "result.pt"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    again, state = torch.load(tmp_path / "result.pt")
    assert again.equal(logits)
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype and state[name].equal(tensor), name


@pytest.mark.floor
@pytest.mark.parametrize(
    "settings", [{"bits": 4, "output_layer_bits": 8}, {"bits": 8, "group_size": 32, "output_layer_bits": 4}]
)
@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_the_output_layer_on_request(
    generation: str, settings: dict[str, Any], tmp_path: Path, make: ModelMaker
) -> None:
    """ChatGLM-6B's is the word embedding; the embedding stays and the two are apart from then on."""
    float_model = make(generation)
    float_model.save_pretrained(tmp_path / "float")
    embedding = float_model.get_input_embeddings().weight.clone()
    model = copy.deepcopy(float_model).quantize(**settings)
    output_layer = model.get_output_embeddings()
    assert (output_layer.bits, output_layer.group_size) == (settings["output_layer_bits"], settings.get("group_size"))
    assert model.get_input_embeddings().weight.equal(embedding)
    assert model.config.tie_word_embeddings is False
    twin = with_decoded_weights(model, float_model)
    twin.get_output_embeddings().weight = nn.Parameter(output_layer.dequantize(torch.float32))
    assert_near(logits_of(model), logits_of(twin), 1e-5)
    model.tie_weights()
    assert model.get_output_embeddings() is output_layer and output_layer.weight.dtype == torch.int8
    model.save_pretrained(tmp_path / "saved")
    config = saved_config(tmp_path / "saved")
    assert not config.get("quantization_bit")
    assert config["quantization_config"]["output_layer_bits"] == settings["output_layer_bits"]
    again = type(model).from_pretrained(tmp_path / "saved")
    on_the_fly = type(model).from_pretrained(
        tmp_path / "float", quantization_config={"quant_method": "chatglm", **settings}
    )
    for other in (again, on_the_fly):
        assert_same_state(other, model)
        assert_same_layers(other, model)
        assert logits_of(other).equal(logits_of(model))


def test_the_tied_output_layer_of_a_published_file(case_folder: Named) -> None:
    """ChatGLM-6B's files hold it a second time."""
    load = {"trust_remote_code": True, "dtype": torch.float32}
    settings = {"bits": 4, "output_layer_bits": 8}
    model = AutoModel.from_pretrained(case_folder("chatglm1"), **load)
    embedding = model.get_input_embeddings().weight.clone()
    on_the_fly = AutoModel.from_pretrained(
        case_folder("chatglm1"), quantization_config={"quant_method": "chatglm", **settings}, **load
    )
    assert on_the_fly.get_input_embeddings().weight.equal(embedding)
    assert_same_state(on_the_fly, model.quantize(**settings))
    assert logits_of(on_the_fly).equal(logits_of(model))


def test_a_float_model_of_a_quantized_configuration_is_saved_as_one(tmp_path: Path, make: ModelMaker) -> None:
    model = make(quantization_bit=4)
    assert not quantized_layers(model)
    model.save_pretrained(tmp_path)
    config = saved_config(tmp_path)
    assert not config.get("quantization_bit") and "quantization_config" not in config
    assert_same_state(type(model).from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_dequantize(generation: str, dtype: torch.dtype, tmp_path: Path, make: ModelMaker) -> None:
    float_model = make(generation, dtype)
    model = copy.deepcopy(float_model).quantize(4)
    twin = with_decoded_weights(model, float_model)
    logits_of(model)
    assert model.dequantize() is model
    assert not quantized_layers(model)
    assert_same_state(model, twin)
    assert logits_of(model).equal(logits_of(twin))
    assert not getattr(model, "is_quantized", False) and not model.config.quantization_bit
    model.save_pretrained(tmp_path)
    config = saved_config(tmp_path)
    assert "quantization_config" not in config and not config.get("quantization_bit")
    assert_same_state(type(model).from_pretrained(tmp_path), model)
    assert_near(logits_of(model.quantize(8)), logits_of(twin), 0.3)


def test_dequantize_to_another_dtype(make: ModelMaker) -> None:
    model = make().quantize(4, group_size=32).dequantize(torch.float32)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("head", ["ChatGLMModel", "ChatGLMForSequenceClassification"])
def test_models_with_other_heads(head: str, tmp_path: Path, tiny_model: ModelMaker) -> None:
    model = tiny_model(head, num_labels=3).quantize(4)
    assert len(quantized_layers(model)) == 8
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same_state(again, model)
    with torch.no_grad():
        assert again(prompt())[0].equal(model(prompt())[0])


@pytest.mark.floor
def test_weights_that_no_file_has_are_initialized(tmp_path: Path, make: ModelMaker) -> None:
    """As if normal weights had been quantized, and not whatever the memory held."""
    model = make().quantize(4)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    layer = "transformer.encoder.layers.1.mlp.dense_h_to_4h"
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(layer)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(kept, tmp_path / "pytorch_model.bin")
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {f"{layer}.weight", f"{layer}.weight_scale"}
    drawn = again.get_submodule(layer)
    decoded = drawn.dequantize(torch.float32)
    assert decoded.std().item() == pytest.approx(model.config.initializer_range, rel=0.15)
    assert drawn.weight.dtype == torch.int8 and not drawn.weight.requires_grad
    assert logits_of(again).isfinite().all()
    for name, tensor in again.state_dict().items():
        assert name.startswith(layer) or tensor.equal(weights[name])


def test_two_copies_of_the_code_in_one_process(tmp_path: Path, case_folder: Named, make: ModelMaker) -> None:
    """Every checkpoint folder brings its own; the library knows one quantizer for all of them."""
    first = make().quantize(4)
    expected = logits_of(first)
    model = AutoModel.from_pretrained(case_folder("chatglm2-int4"), trust_remote_code=True)
    folder = tmp_path / "other"
    shutil.copytree(case_folder("chatglm2-int4"), folder)
    (folder / "quantization.py").write_text(
        (folder / "quantization.py").read_text(encoding="utf-8") + "\n# Another copy.\n", encoding="utf-8"
    )
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del weights["transformer.encoder.layers.0.self_attention.dense.weight"]
    del weights["transformer.encoder.layers.0.self_attention.dense.weight_scale"]
    torch.save(weights, folder / "pytorch_model.bin")
    other = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(other) is not type(model)
    assert logits_of(other).isfinite().all()
    drawn = other.transformer.encoder.layers[0].self_attention.dense.dequantize(torch.float32)
    assert drawn.std().item() == pytest.approx(other.config.initializer_range, rel=0.15)
    assert len(quantized_layers(other)) == len(quantized_layers(model)) == 12
    # The operator of the first copy is still there; training calls it.
    assert_near(first(prompt()).logits, expected, 1e-6)
    for one in (other, model):
        assert not quantized_layers(one.dequantize())


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


WRONG_SETTINGS = {
    "bits-3": ({"bits": 3}, ValueError, "`bits` must be one of .*3"),
    "bits-5": ({"bits": 5}, ValueError, "`bits`.*5"),
    "bits-0": ({"bits": 0}, ValueError, "`bits`.*0"),
    "bits-true": ({"bits": True}, ValueError, "`bits`.*True"),
    "bits-text": ({"bits": "4"}, ValueError, "`bits`.*'4'"),
    "bits-float": ({"bits": 4.0}, ValueError, "`bits`.*4.0"),
    "method": ({"bits": 4, "method": "gptq"}, ValueError, "`method`.*gptq"),
    "group-size": ({"bits": 4, "group_size": 48}, ValueError, "`group_size`.*48"),
    "group-width": ({"bits": 4, "group_size": 128}, ValueError, "query_key_value` has 32 columns.*128"),
    "output-layer": ({"bits": 4, "output_layer_bits": 2}, ValueError, "`output_layer_bits`.*2"),
}


@pytest.mark.parametrize(("settings", "error", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_wrong_settings_change_nothing(
    settings: dict[str, Any], error: type, message: str, tmp_path: Path, make: ModelMaker
) -> None:
    model = make("chatglm")
    untouched, config = copy.deepcopy(model), model.config.to_dict()
    with pytest.raises(error, match=message):
        model.quantize(**settings)
    assert_same_state(model, untouched)
    assert model.config.to_dict() == config
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        type(model).from_pretrained(tmp_path, quantization_config={"quant_method": "chatglm", **settings})


def test_quantizing_twice_is_refused(make: ModelMaker) -> None:
    model = make().quantize(8)
    expected = copy.deepcopy(model.state_dict())
    for bits in (8, 4):
        with pytest.raises(ValueError, match="quantized already.*dequantize"):
            model.quantize(bits)
    assert all(tensor.equal(expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.quantization_bit == 8


def test_what_cannot_be_quantized_stays_as_it_is(make: ModelMaker) -> None:
    adapted = make()
    peft_model = peft.get_peft_model(adapted, peft.LoraConfig(r=2, target_modules=["dense_h_to_4h"]))
    broken = make()
    with torch.no_grad():
        broken.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight[3, 4] = float("nan")
    infinite = make("chatglm2", torch.float16)
    with torch.no_grad():
        infinite.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight[3, 4] = float("inf")
    for model, error, message in (
        (adapted, TypeError, r"dense_h_to_4h.*Quantize before adding adapters"),
        (peft_model, TypeError, r"dense_h_to_4h.*Quantize before adding adapters"),
        (broken, ValueError, r"layers\.1\.mlp\.dense_4h_to_h.*not finite"),
        (infinite, ValueError, r"layers\.0\.mlp\.dense_4h_to_h.*not finite"),
        (make().to("meta"), ValueError, "offloaded.*quantization_config"),
    ):
        types = [type(module) for module in model.modules()]
        with pytest.raises(error, match=message):
            model.quantize(4)
        assert [type(module) for module in model.modules()] == types
        assert not getattr(model, "is_quantized", False)
        assert not model.config.quantization_bit


def test_offloaded_weights_are_refused(tmp_path: Path, make: ModelMaker) -> None:
    make().save_pretrained(tmp_path / "float")
    model = type(make()).from_pretrained(
        tmp_path / "float",
        device_map={"transformer.embedding": "cpu", "transformer.encoder": "disk", "transformer.output_layer": "cpu"},
        offload_folder=tmp_path / "disk",
    )
    with pytest.raises(ValueError, match="offloaded"):
        model.quantize(4)
    assert logits_of(model).equal(logits_of(make()))


# ---------------------------------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_layer(quantization: ModuleType) -> Callable[..., nn.Module]:
    def layer(
        settings: str = "int4",
        in_features: int = 64,
        out_features: int = 70,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> nn.Module:
        torch.manual_seed(0)
        linear = nn.Linear(in_features, out_features, bias, dtype=dtype)
        bits, group_size = SETTINGS[settings]["bits"], SETTINGS[settings].get("group_size")
        scale_dtype = torch.float32 if dtype == torch.float32 else torch.float16
        return quantization.QuantizedLinear(linear, bits, group_size, scale_dtype).quantize_(linear.weight)

    return layer


def decoded(layer: nn.Module) -> nn.Linear:
    """The float layer that a quantized one stands for, in float32."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight = nn.Parameter(layer.dequantize(torch.float32))
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().float())
    return linear


def is_packed(layer: nn.Module) -> bool:
    return layer.derived is not None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradients_are_those_of_the_decoded_layer(
    settings: str, bias: bool, make_layer: Callable[..., nn.Module]
) -> None:
    layer = make_layer(settings, bias=bias)
    twin = decoded(layer)
    x = torch.randn(2, 5, 64, requires_grad=True)
    inputs = [(x, *([one.bias] if bias else [])) for one in (layer, twin)]
    grads = [torch.autograd.grad(one(x).square().sum(), wanted) for one, wanted in zip((layer, twin), inputs)]
    torch.testing.assert_close(*grads)
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.weight_scale.grad is None


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_activation_is_kept_for_the_gradient(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    layer, saved = make_layer(settings), []
    x = torch.randn(50, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(x).sum().backward()
    assert saved
    kept = {layer.weight.data_ptr(), layer.weight_scale.data_ptr()}
    assert {tensor.data_ptr() for tensor in saved} == kept


@pytest.mark.parametrize("settings", SETTINGS)
def test_no_conversion_touches_codes_or_scales(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    layer = make_layer(settings)
    codes, scale = layer.weight.clone(), layer.weight_scale.clone()
    for move, dtype in (
        (lambda module: module.to(torch.bfloat16), torch.bfloat16),
        (lambda module: module.half(), torch.float16),
        (lambda module: module.float(), torch.float32),
        (lambda module: module.to("cpu", torch.float64), torch.float64),
        (lambda module: module.bfloat16(), torch.bfloat16),
        (lambda module: module.to(torch.float32), torch.float32),
    ):
        assert move(layer) is layer
        assert layer.bias.dtype == dtype
        assert layer.weight.dtype == torch.int8 and layer.weight.equal(codes)
        assert layer.weight_scale.dtype == torch.float32 and layer.weight_scale.equal(scale)
        if dtype != torch.float64:
            assert layer(torch.zeros(1, 64, dtype=dtype)).dtype == dtype
    assert layer.to("meta").weight.is_meta and layer.weight_scale.is_meta


def test_a_model_may_be_converted(make: ModelMaker) -> None:
    model = make().quantize(4)
    scale = model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight_scale.clone()
    for convert, dtype in (
        (lambda: model.half(), torch.float16),
        (lambda: model.to(torch.bfloat16), torch.bfloat16),
        (lambda: model.float(), torch.float32),
        (lambda: model.bfloat16(), torch.bfloat16),
        (lambda: model.to(dtype=torch.float32), torch.float32),
    ):
        assert convert() is model
        assert logits_of(model).dtype == model.dtype == dtype
        assert logits_of(model).isfinite().all()
        kept = model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight_scale
        assert kept.dtype == scale.dtype and kept.equal(scale)


def test_the_layer_says_what_it_is(make_layer: Callable[..., nn.Module]) -> None:
    assert repr(make_layer("int8")) == "QuantizedLinear(in_features=64, out_features=70, bias=True, bits=8)"
    assert "bits=4, group_size=32)" in repr(make_layer("groups"))
    for settings, size in (("int8", 70 * 64), ("int4", 70 * 32)):
        layer = make_layer(settings)
        assert {name: weight.numel() for name, weight in layer.named_parameters()} == {
            "weight": size,
            "weight_scale": 70,
            "bias": 70,
        }


@pytest.mark.parametrize("settings", SETTINGS)
def test_autocast(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    layer, x = make_layer(settings), torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_near(out, decoded(layer)(x), 0.02)
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer(x).dtype == torch.float32


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize("settings", SETTINGS)
def test_copies_of_a_layer_that_was_used(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    layer, x = make_layer(settings, dtype=torch.bfloat16), torch.randn(3, 64).bfloat16()
    codes = layer.weight.clone()
    with torch.no_grad():
        out = layer(x)
        assert is_packed(layer) == (settings != "int8")
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert again(x).equal(out)
            assert again.state_dict()["weight"].equal(codes)
        fresh = make_layer(settings, dtype=torch.bfloat16)
        fresh.weight.data = torch.zeros_like(fresh.weight)
        fresh(x)
        state = layer.state_dict()
        assert state["weight"].dtype == torch.int8 and state["weight"].equal(codes)
        assert set(state) == {"weight", "weight_scale", "bias"}
        fresh.load_state_dict(state)
        assert fresh(x).equal(out)
        fresh.load_state_dict(state, assign=True)
        assert fresh(x).equal(out)


# ---------------------------------------------------------------------------------------------------------------------
# Packing for the CPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize("settings", ["int4", "groups"])
def test_packing_leaves_the_published_bytes(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    layer = make_layer(settings, dtype=torch.bfloat16)
    codes = layer.weight.clone()
    assert is_packed(layer)
    with torch.no_grad():
        layer(torch.randn(3, 64).bfloat16())
    assert layer.weight.equal(codes) and set(layer.state_dict()) == {"weight", "weight_scale", "bias"}


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize(("settings", "in_features"), [("int8", 64), ("int4", 36)])
def test_what_torch_cannot_take_is_never_packed(
    settings: str, in_features: int, make_layer: Callable[..., nn.Module]
) -> None:
    layer = make_layer(settings, in_features, dtype=torch.bfloat16)
    x = torch.randn(2, in_features).bfloat16()
    with torch.no_grad():
        out = layer(x)
    assert not is_packed(layer)
    assert_near(out, decoded(layer)(x.float()), 0.01)


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize("settings", ["int4", "groups"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_packed_model_gives_the_same(
    dtype: torch.dtype,
    settings: str,
    make: ModelMaker,
    source: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And so it does on a processor whose order of bytes is not known, where nothing is packed."""
    model = make(dtype=dtype).quantize(**SETTINGS[settings])
    assert all(is_packed(layer) for layer in quantized_layers(model).values())
    logits = logits_of(model)
    monkeypatch.setattr(source("quantization_cpu"), "int4_layout", lambda: None)
    unpacked = copy.deepcopy(model)
    assert not any(is_packed(layer) for layer in quantized_layers(unpacked).values())
    assert_near(logits, logits_of(unpacked), HALF_LIMIT[dtype])
    assert_same_state(unpacked, model)


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize("settings", ["int4", "groups"])
def test_training_after_inference(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    layer, twin = make_layer(settings, dtype=torch.bfloat16), make_layer(settings, dtype=torch.bfloat16)
    for num_rows in (3, 50):
        x = torch.randn(num_rows, 64).bfloat16().requires_grad_()
        with torch.no_grad():
            layer(x[:3])
        assert is_packed(layer)
        out, expected = layer(x), twin(x)
        assert_near(out, expected, 0.02)
        for one in (layer, twin):
            one.bias.grad = None
        grad, expected_grad = (torch.autograd.grad(one.sum(), x)[0] for one in (out, expected))
        assert grad.equal(expected_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Models in use
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_static_cache_equals_dynamic_cache(generation: str, settings: dict[str, Any], make: ModelMaker) -> None:
    model = make(generation).quantize(**settings)
    ids = model.generate(prompt(), **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert model.generate(prompt(), past_key_values=cache, **GREEDY).equal(ids)
    # Step by step is the same as all at once, however the rows are multiplied.
    logits = logits_of(model, ids)[:, -9:-1]
    assert logits.argmax(-1).equal(ids[:, -8:])


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_chat_on_a_quantized_model(name: str, case_folder: Named, case_tokenizer: Named) -> None:
    options = {"do_sample": False, "max_new_tokens": 12}
    answers = []
    for settings in ({}, {"quantization_config": {"quant_method": "chatglm", "bits": 8}}):
        model = AutoModel.from_pretrained(
            case_folder(name), trust_remote_code=True, dtype=torch.float32, **settings
        ).eval()
        model = model if settings else model.quantize(8)
        answers.append(model.chat(case_tokenizer(name), "你好", **options))
        *_, last = model.stream_chat(case_tokenizer(name), "你好", **options)
        assert last[0] == answers[-1][0]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_full_graph_compile_equals_eager(settings: dict[str, Any], make: ModelMaker) -> None:
    model = make(num_layers=1).quantize(**settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 13):
        ids = prompt(length=length)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        expected, logits = (one(inputs_embeds=embeds).logits for one in (model, compiled))
        torch.testing.assert_close(logits, expected)
        grads = [torch.autograd.grad(one.square().sum(), embeds)[0] for one in (logits, expected)]
        torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


@pytest.mark.usefixtures("without_cpu_kernels")
def test_compiled_after_packing(make_layer: Callable[..., nn.Module]) -> None:
    layer, x = make_layer("groups", dtype=torch.bfloat16), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        assert is_packed(layer)
        assert torch.compile(layer, fullgraph=True, backend="aot_eager")(x).equal(expected)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
def test_device_maps(device_map: Any, tmp_path: Path, make: ModelMaker) -> None:
    float_model = make()
    float_model.save_pretrained(tmp_path / "float")
    model = copy.deepcopy(float_model).quantize(4)
    model.save_pretrained(tmp_path / "saved")
    for folder, settings in (
        ("saved", {}),
        ("float", {"quantization_config": {"quant_method": "chatglm", "bits": 4}}),
    ):
        loaded = type(model).from_pretrained(tmp_path / folder, device_map=device_map, **settings)
        assert_same_state(loaded, model)
        assert logits_of(loaded).equal(logits_of(model))


# ---------------------------------------------------------------------------------------------------------------------
# Training on top
# ---------------------------------------------------------------------------------------------------------------------


ADAPTERS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True),
    "adalora": peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        total_step=100,
        target_modules=["query_key_value", "dense_h_to_4h"],
        task_type="CAUSAL_LM",
    ),
}


def train(model: nn.Module, steps: int = 12) -> list[float]:
    """The losses of a few steps on one batch."""
    ids = prompt()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ("lora", "int8"),
        ("lora", "int4"),
        ("lora", "groups"),
        ("dora", "int8"),
        ("dora", "groups"),
        ("adalora", "int4"),
    ],
)
def test_peft_adapters_train_on_integers(adapter: str, settings: str, make: ModelMaker) -> None:
    base = make().quantize(**SETTINGS[settings])
    before, expected = copy.deepcopy(base.state_dict()), logits_of(base)
    layers = quantized_layers(base)
    before_wrapping = {id(layer) for layer in layers.values()}
    model = peft.get_peft_model(base, copy.deepcopy(ADAPTERS[adapter])).train()
    # Unmodified: the adapters hold the very layers, and at first change nothing.
    held = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    assert len(held) == (4 if adapter == "adalora" else 8) and held <= before_wrapping
    assert_near(logits_of(model.eval()), expected, 0 if adapter == "lora" else 1e-5)
    losses = train(model.train())
    assert losses[-1] < 0.8 * losses[0]
    assert all("lora" in name for name, weight in model.named_parameters() if weight.requires_grad)
    after = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "QuantizedLinear"}
    assert len(after) == len(layers) == 8
    for name, layer in layers.items():
        for part in ("weight", "weight_scale"):
            assert getattr(layer, part).equal(before[f"{name}.{part}"])
    with model.disable_adapter():
        assert logits_of(model.eval()).equal(expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_with_lora(use_reentrant: bool, make: ModelMaker) -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(make("chatglm").quantize(4), copy.deepcopy(ADAPTERS["lora"])).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        for weight in (weight for weight in model.parameters() if weight.requires_grad):
            nn.init.normal_(weight, std=0.1)
        model(input_ids=prompt(), labels=prompt()).loss.backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("generation", ["chatglm", "chatglm3"])
def test_ptuning_trains_on_integers(generation: str, tmp_path: Path, make: ModelMaker) -> None:
    make(generation).save_pretrained(tmp_path)
    model = type(make(generation)).from_pretrained(
        tmp_path, pre_seq_len=4, quantization_config={"quant_method": "chatglm", "bits": 4}
    )
    in_place = make(generation, pre_seq_len=4).quantize(4)
    for one in (model, in_place):
        codes = {name: layer.weight.clone() for name, layer in quantized_layers(one).items()}
        assert len(codes) == 8
        trainable = [name for name, weight in one.named_parameters() if weight.requires_grad]
        assert trainable == ["transformer.prefix_encoder.embedding.weight"]
        losses = train(one.train())
        assert losses[-1] < losses[0]
        assert all(weight.grad is None for name, weight in one.named_parameters() if name not in trainable)
        assert all(layer.weight.equal(codes[name]) for name, layer in quantized_layers(one).items())


@pytest.mark.floor
@pytest.mark.parametrize("way", ["lora", "ptuning"])
def test_trainer_accepts_a_quantized_model(way: str, tmp_path: Path, make: ModelMaker) -> None:
    if way == "lora":
        model = peft.get_peft_model(make().quantize(4), copy.deepcopy(ADAPTERS["lora"]))
    else:
        model = make(pre_seq_len=4).quantize(4)
    rows = [{"input_ids": row, "labels": row} for row in prompt().tolist()]
    arguments = TrainingArguments(
        tmp_path, max_steps=1, learning_rate=0.1, report_to="none", use_cpu=True, save_strategy="no"
    )
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    Trainer(model, arguments, train_dataset=rows).train()
    changed = {name for name, weight in model.named_parameters() if not weight.equal(before[name])}
    assert changed
    assert all(("lora" if way == "lora" else "prefix_encoder") in name for name in changed)


def test_a_finished_fine_tune_is_saved_as_int4(tmp_path: Path, make: ModelMaker) -> None:
    model = peft.get_peft_model(make(), copy.deepcopy(ADAPTERS["lora"])).train()
    train(model, steps=2)
    merged = model.merge_and_unload().eval().quantize(4)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path)
    assert_same_state(again, merged)
    assert logits_of(again).equal(logits_of(merged))


# ---------------------------------------------------------------------------------------------------------------------
# What the published code needed and broke
# ---------------------------------------------------------------------------------------------------------------------


NOTHING_BUT_TORCH = """
import os, subprocess, sys, torch
torch.set_num_threads(1)
sys.modules["cpm_kernels"] = None  # an import of it fails
from transformers import AutoModel, AutoTokenizer

def refuse(*args, **kwargs):
    raise AssertionError(f"a program was started: {args}")

subprocess.Popen.__init__ = os.system = os.popen = os.posix_spawn = refuse
for folder, settings in ((sys.argv[1], {}), (sys.argv[2], {"quantization_config": {"quant_method": "chatglm", "bits": 4}})):
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **settings)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        answer, history = model.chat(tokenizer, "hello", do_sample=False, max_new_tokens=4)
model = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True).quantize(8)
model.chat(tokenizer, "hello", do_sample=False, max_new_tokens=4)
print("done")
"""


@pytest.mark.floor
def test_nothing_is_compiled_and_no_other_package_is_needed(case_folder: Named, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", NOTHING_BUT_TORCH, case_folder("chatglm2-int4"), case_folder("chatglm3")],
        env={"PATH": "", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr[-3000:]


@pytest.mark.parametrize("settings", SETTINGS)
def test_one_token_does_not_decode_the_whole_weight(
    settings: str,
    make_layer: Callable[..., nn.Module],
    source: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What made published int4 slower than float16. In half precision, torch's operators read the codes themselves."""

    def refuse(*args: Any) -> None:
        raise AssertionError("the weight was decoded")

    for name in ("dequantize_weight", "unpack_int4"):
        monkeypatch.setattr(source("quantization_kernels"), name, refuse)
    monkeypatch.setattr(source("quantization_cpu"), "decode_rows", refuse)
    for dtype in (torch.bfloat16, torch.float16):
        layer = make_layer(settings, dtype=dtype)
        with torch.no_grad():
            assert layer(torch.ones(1, 64, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_of_any_dtype_load_without_loss(scale_dtype: torch.dtype, tmp_path: Path, case_folder: Named) -> None:
    """Beside stored rotary buffers, and whatever dtype the model is loaded in."""
    folder = shutil.copytree(case_folder("chatglm2-int4"), tmp_path / "chatglm2-int4")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert any(name.endswith("inv_freq") for name in weights)
    scales = {name: value.to(scale_dtype) for name, value in weights.items() if name.endswith("weight_scale")}
    scales = {name: value * (1 + 2**-12) if scale_dtype == torch.float32 else value for name, value in scales.items()}
    torch.save(weights | scales, folder / "pytorch_model.bin")
    for dtype in DTYPES.values():
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        assert {
            weight.dtype
            for name, weight in model.named_parameters()
            if not name.endswith(("weight_scale",)) and weight.is_floating_point()
        } == {dtype}
        for name, scale in scales.items():
            assert model.state_dict()[name].double().equal(scale.double())
        assert logits_of(model).isfinite().all()
