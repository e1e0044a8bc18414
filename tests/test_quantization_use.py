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
"""Quantized models in use: caches, chat, compiling, device maps and conversions."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quantized import (
    HALF_LIMIT,
    SETTINGS,
    ModelMaker,
    assert_near,
    assert_same_state,
    logits_of,
    maker,
    prompt,
    quantized_layers,
)
from transformers import AutoModel, StaticCache


Named = Callable[[str], Any]


@pytest.fixture
def make(tiny_model: ModelMaker) -> ModelMaker:
    return maker(tiny_model)


GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 98}


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


def test_full_graph_compile_equals_eager(make: ModelMaker) -> None:
    """The operator is compiled for every form of weights in test_quantization_kernels.py."""
    model = make(num_layers=1).quantize(**SETTINGS["groups"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 13):
        ids = prompt(length=length)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        expected, logits = (one(inputs_embeds=embeds).logits for one in (model, compiled))
        torch.testing.assert_close(logits, expected)
        grads = [torch.autograd.grad(one.square().sum(), embeds)[0] for one in (logits, expected)]
        torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


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
    assert all(layer.derived is not None for layer in quantized_layers(model).values())
    logits = logits_of(model)
    monkeypatch.setattr(source("quantization_cpu"), "int4_layout", lambda: None)
    unpacked = copy.deepcopy(model)
    assert all(layer.derived is None for layer in quantized_layers(unpacked).values())
    assert_near(logits, logits_of(unpacked), HALF_LIMIT[dtype])
    assert_same_state(unpacked, model)


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_saving_while_threads_use_the_model(settings: dict[str, Any], tmp_path: Path, make: ModelMaker) -> None:
    model = make(dtype=torch.bfloat16).quantize(**settings)
    expected, state = logits_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    done = threading.Event()

    def use() -> bool:
        count = 0
        while not done.is_set() or count < 3:
            if not logits_of(model).equal(expected):
                return False
            count += 1
        return True

    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(use) for _ in range(3)]
        try:
            for _ in range(10):
                assert all(value.equal(state[name]) for name, value in model.state_dict().items())
                model.to(torch.bfloat16)
            model.save_pretrained(tmp_path)
        finally:
            done.set()
        assert all(user.result() for user in users)
    assert logits_of(type(model).from_pretrained(tmp_path)).equal(expected)


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_pickled_model(settings: dict[str, Any], tmp_path: Path, make: ModelMaker) -> None:
    """`torch.save` of a whole model, and copies of one, hold the published bytes alone."""
    model = make("chatglm", torch.bfloat16).quantize(**settings)
    expected = logits_of(model)
    torch.save(model, tmp_path / "model.pt")
    kept = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (tmp_path / "model.pt").stat().st_size < kept + 150_000
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        for name, layer in quantized_layers(model).items():
            assert again.get_submodule(name).weight.equal(layer.weight)
            assert again.get_submodule(name).weight.dtype == torch.int8
        assert_same_state(again, model)
        assert logits_of(again).equal(expected)
