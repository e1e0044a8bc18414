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
"""The library's exporters on these models: `torch.export`, ONNX and OpenVINO, prefill and steps, with either cache.

`generate` runs the exported programs in the place of the model, so everything that it gives them is compared too.
"""

import copy
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generations import GENERATIONS, GMASK, START, TINY
from transformers import GenerationConfig, PreTrainedModel
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter


ModelMaker = Callable[..., PreTrainedModel]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 98, "pad_token_id": 0, "use_cache": True}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "max_cache_len": 32, "disable_compile": True},
}


def padded(version: str, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and a mask that hides the beginning of the first row."""
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))
    # CODEPATH: chatglm-6b, whose context ends where an answer starts.
    if TINY[version].get("bos_token_id") == START:
        ids[:, -2:] = torch.tensor([GMASK, START])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def run_exported(model: PreTrainedModel, version: str, exported: Any, is_static: bool, **options: Any) -> None:
    """Generate by the exported programs, and compare with the model: the logits of each step, and the answer."""
    runners, errors = exported.to(**options).runners, []
    # A program with a growing cache takes other batches and lengths than it was made with.
    ids, mask = padded(version, 2, 9) if is_static else padded(version, 3, 12)
    config = GenerationConfig(**GREEDY, **CACHES["static" if is_static else "dynamic"])
    expected = model.generate(ids, attention_mask=mask, generation_config=config)
    forward = model.forward

    def run(**kwargs: Any) -> Any:
        kwargs.pop("logits_to_keep", None)
        runner = runners["decode" if errors else "prefill"]
        given = copy.deepcopy(kwargs)
        outputs = runner(**{name: value for name, value in kwargs.items() if name in runner.metadata.kwargs})
        errors.append((outputs.logits[:, -1] - forward(**given).logits[:, -1]).abs().max().item())
        return outputs

    run.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = run
    try:
        answer = model.generate(ids, attention_mask=mask, generation_config=config)
    finally:
        model.forward = forward
    assert len(errors) == 5 and max(errors) < 1e-4
    assert torch.equal(answer, expected)


def export(exporter: Any, config: Any, model: PreTrainedModel, version: str, cache: str) -> Any:
    ids, mask = padded(version, 2, 9)
    settings = GenerationConfig(**GREEDY, **CACHES[cache])
    return exporter.export_for_generation(
        model, {"input_ids": ids, "attention_mask": mask}, config, generation_config=settings
    )


# `make test` has one, and the others take the same ways.
@pytest.mark.parametrize(
    ("version", "cache"),
    [
        pytest.param(version, cache, marks=[] if (version, cache) == ("glm4", "static") else pytest.mark.grid)
        for version in GENERATIONS
        for cache in CACHES
    ],
)
def test_torch_export(tiny_model: ModelMaker, version: str, cache: str) -> None:
    model, is_static = tiny_model(**TINY[version]), cache == "static"
    exported = export(DynamoExporter(), DynamoConfig(dynamic=not is_static), model, version, cache)
    run_exported(model, version, exported, is_static)


@pytest.mark.engines
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("version", GENERATIONS)
def test_onnx(tiny_model: ModelMaker, version: str, cache: str) -> None:
    pytest.importorskip("onnxruntime")
    model, is_static = tiny_model(**TINY[version]), cache == "static"
    exported = export(OnnxExporter(), OnnxConfig(dynamic=not is_static), model, version, cache)
    run_exported(model, version, exported, is_static)


@pytest.mark.engines
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("version", GENERATIONS)
def test_openvino(tiny_model: ModelMaker, version: str, cache: str) -> None:
    pytest.importorskip("openvino")
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    model, is_static = tiny_model(**TINY[version]), cache == "static"
    settings = OpenVINOConfig(dynamic=not is_static, stateful=False)
    exported = export(OpenVINOExporter(), settings, model, version, cache)
    # OpenVINO computes in bfloat16 on CPUs that can, unless it is told otherwise.
    run_exported(model, version, exported, is_static, config={"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.engines
@pytest.mark.parametrize("version", GENERATIONS)
def test_openvino_reads_what_torch_exported(tiny_model: ModelMaker, version: str) -> None:
    openvino = pytest.importorskip("openvino")
    model, (ids, _) = tiny_model(**TINY[version]), padded(version, 2, 9)
    model.config.use_cache = False
    program = torch.export.export(model, (), {"input_ids": ids}, strict=False)
    compiled = openvino.Core().compile_model(
        openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    logits = torch.from_numpy(compiled({"input_ids": ids.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.engines
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("program", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize("version", ["chatglm", "glm4"])
def test_quantized_models(tiny_model: ModelMaker, version: str, program: str, bits: int) -> None:
    if program != "torch" and importlib.util.find_spec(program) is None:
        pytest.skip(f"needs {program}")
    model, (ids, _) = tiny_model(**TINY[version]).quantize(bits), padded(version, 2, 9)
    exporters = {"torch": (DynamoExporter, DynamoConfig), "onnx": (OnnxExporter, OnnxConfig)}
    options = {}
    if program == "openvino":
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        exporters["openvino"] = OpenVINOExporter, OpenVINOConfig
        options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}}
    exporter, config = exporters[program]
    exported = exporter().export(model, {"input_ids": ids, "use_cache": False}, config())
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(exported.to(**options)(input_ids=ids).logits, expected, atol=1e-4, rtol=0)
