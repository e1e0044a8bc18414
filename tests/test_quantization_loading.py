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
"""Ways to a quantized model, and back: quantizing in place and while loading, saving, loading, dequantizing."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import GENERATIONS, TINY, every_generation
from quantized import (
    DTYPES,
    HALF_LIMIT,
    LAYER_NAMES,
    SETTINGS,
    ModelMaker,
    assert_near,
    assert_same_layers,
    assert_same_state,
    logits_of,
    maker,
    prompt,
    quantized_layers,
    saved_config,
    with_decoded_weights,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, GPTQConfig
from transformers.quantizers.quantizers_utils import should_convert_module


Named = Callable[[str], Any]


@pytest.fixture
def make(tiny_model: ModelMaker) -> ModelMaker:
    return maker(tiny_model)


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
            "vision_bits": None,
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


NOTHING_BUT_TORCH = """
import os, subprocess, sys, torch
torch.set_num_threads(1)
sys.modules["cpm_kernels"] = None  # an import of it fails
from transformers import AutoModel, AutoTokenizer

def refuse(*args, **kwargs):
    raise AssertionError(f"a program was started: {args}")

subprocess.Popen.__init__ = os.system = os.popen = os.posix_spawn = refuse
published, floats, saved, ids, result = sys.argv[1:]
on_the_fly = {"quantization_config": {"quant_method": "chatglm", "bits": 4}}
for folder, settings in ((published, {}), (floats, on_the_fly)):
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **settings)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        answer, history = model.chat(tokenizer, "hello", do_sample=False, max_new_tokens=4)
model = AutoModel.from_pretrained(floats, trust_remote_code=True).quantize(8)
model.chat(tokenizer, "hello", do_sample=False, max_new_tokens=4)
model = AutoModel.from_pretrained(saved, trust_remote_code=True)
with torch.no_grad():
    torch.save((model(torch.load(ids, weights_only=True)).logits, model.state_dict()), result)
"""


@pytest.mark.floor
def test_another_process_needs_the_folder_and_nothing_else(case_folder: Named, tmp_path: Path) -> None:
    """No compiler, no other package, and a saved folder holds its code; packing never reaches the file."""
    saved, ids, result = tmp_path / "saved", tmp_path / "ids.pt", tmp_path / "result.pt"
    model = AutoModel.from_pretrained(case_folder("chatglm3-32k"), trust_remote_code=True, dtype=torch.bfloat16)
    model.quantize(4).save_pretrained(saved)
    assert {"quantization.py", "quantization_kernels.py"} <= {path.name for path in saved.glob("*.py")}
    torch.save(torch.arange(3, 19).view(2, 8), ids)
    run = subprocess.run(
        [sys.executable, "-c", NOTHING_BUT_TORCH]
        + [str(path) for path in (case_folder("chatglm2-int4"), case_folder("chatglm3"), saved, ids, result)],
        env={"PATH": "", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    logits, state = torch.load(result, weights_only=True)
    assert logits.equal(logits_of(model, torch.load(ids, weights_only=True)))
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype and state[name].equal(tensor), name


def test_other_methods_find_the_layers_of_torch(tiny_model: Any, source: Any) -> None:
    """bitsandbytes looks for that very class, and would quantize nothing without a word."""
    model = tiny_model(quantization_config={"quant_method": "bitsandbytes_8bit", "load_in_8bit": True})
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 9 and {type(module) for module in linears} == {nn.Linear}


def test_other_methods_leave_the_output_layer_eyes_and_prefix_alone(source: Any) -> None:
    quantization = source("quantization_others")
    asked = BitsAndBytesConfig(load_in_8bit=True)
    completed = quantization.complete_settings_of_others(asked, "layers")
    assert asked.llm_int8_skip_modules is None and completed.load_in_8bit
    kept = ("transformer.output_layer", "transformer.vision.transformer.layers.0.mlp.fc1", "prefix_encoder.trans.0")
    for name in (*kept, *(f"{name}.weight" for name in kept)):
        assert not should_convert_module(name, completed.llm_int8_skip_modules), name
    assert should_convert_module("transformer.encoder.layers.0.mlp.dense_h_to_4h", completed.llm_int8_skip_modules)
    own = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["mlp"])
    assert quantization.complete_settings_of_others(own, "layers").llm_int8_skip_modules == ["mlp"]
    as_dict = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    asked_as_dict = quantization.complete_settings_of_others(as_dict, "layers")
    assert asked_as_dict.llm_int8_skip_modules == completed.llm_int8_skip_modules


def test_gptq_is_told_where_the_layers_are(source: Any, tiny_config: Any, tiny_model: Any) -> None:
    """Optimum looks for them under the names of other models, and does not write down where they were."""
    path = type(tiny_config()).path_of_layers
    complete = source("quantization_others").complete_settings_of_others
    asked = GPTQConfig(bits=4)
    assert complete(asked, path).block_name_to_quantize == path and asked.block_name_to_quantize is None
    own = GPTQConfig(bits=4, block_name_to_quantize="elsewhere")
    assert complete(own, path).block_name_to_quantize == "elsewhere"
    stored = {"quant_method": "gptq", "bits": 4}
    for settings in (stored, {**stored, "block_name_to_quantize": None}):
        assert tiny_config(quantization_config=settings).quantization_config["block_name_to_quantize"] == path
    kept = {**stored, "block_name_to_quantize": "elsewhere"}
    assert tiny_config(quantization_config=kept).quantization_config == kept
    check = source("quantization_others").check_path_of_layers
    model = tiny_model()
    model.config.quantization_config = complete(asked, path)
    check(model)
    with pytest.raises(ValueError, match="`transformer.encoder.layers`, which `ChatGLMModel` does not have"):
        check(model.transformer)


@every_generation
def test_what_dir_lists_can_be_read(tiny_model: Any, version: str) -> None:
    """Optimum reads all of it to find the layers that it replaces."""
    for module in tiny_model(**TINY[version]).modules():
        for name in dir(module):
            getattr(module, name)
