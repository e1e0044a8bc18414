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
"""One quantized layer: gradients, conversions, copies, and the packed weight that some processors get beside it."""

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from quantized import (
    SETTINGS,
    assert_near,
)
from torch import nn


Named = Callable[[str], Any]


@pytest.fixture(scope="module")
def quantization(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("quantization")


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


@pytest.mark.usefixtures("without_cpu_kernels")
@pytest.mark.parametrize("settings", SETTINGS)
def test_no_use_replaces_the_weight(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    """Whoever holds it, another thread or a hook of accelerate's, holds the published bytes."""
    layer, x = make_layer(settings, dtype=torch.bfloat16), torch.randn(3, 64).bfloat16()
    weight, codes = layer.weight, layer.weight.clone()
    with torch.no_grad():
        layer(x)
        assert layer.weight is weight and weight.dtype == torch.int8
        assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
        copy.deepcopy(layer)
        pickle.dumps(layer)
        layer.dequantize()
        layer.to("cpu", torch.float16)
    layer(x.half().requires_grad_()).sum().backward()
    assert layer.weight is weight and weight.equal(codes)
    assert is_packed(layer) == (settings != "int8")


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


@pytest.mark.usefixtures("without_cpu_kernels")
def test_compiled_after_packing(make_layer: Callable[..., nn.Module]) -> None:
    layer, x = make_layer("groups", dtype=torch.bfloat16), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        assert is_packed(layer)
        assert torch.compile(layer, fullgraph=True, backend="aot_eager")(x).equal(expected)


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


# ---------------------------------------------------------------------------------------------------------------------
# The packed weight of a processor without our kernels
# ---------------------------------------------------------------------------------------------------------------------


def test_a_packed_weight_is_in_no_pickle(make_layer: Callable[..., nn.Module], without_cpu_kernels: None) -> None:
    """It is made for this processor. Whoever reads the pickle makes its own."""
    layer = make_layer("groups", dtype=torch.bfloat16)
    assert is_packed(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert is_packed(again) and again.derived.packed.data_ptr() != layer.derived.packed.data_ptr()
    for copied in (layer.__reduce_ex__(4)[2], layer.__getstate__()):
        assert copied["derived"] is None
    assert again.weight.equal(layer.weight) and again.weight.dtype == torch.int8


CHANGES: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "replaced": lambda layer, codes: setattr(layer, "weight", nn.Parameter(codes, requires_grad=False)),
    "replaced behind the layer": lambda layer, codes: layer._parameters.update(
        weight=nn.Parameter(codes, requires_grad=False)
    ),
    "data replaced": lambda layer, codes: setattr(layer.weight, "data", codes),
    "written to": lambda layer, codes: layer.weight.copy_(codes),
    "loaded": lambda layer, codes: layer.load_state_dict(layer.state_dict() | {"weight": codes}),
    "loaded and assigned": lambda layer, codes: layer.load_state_dict(
        layer.state_dict() | {"weight": codes}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_changed_weight_leaves_its_packed_copy_behind(
    settings: str,
    change: Callable[[nn.Module, torch.Tensor], Any],
    make_layer: Callable[..., nn.Module],
    without_cpu_kernels: None,
) -> None:
    layer, x = make_layer(settings, dtype=torch.bfloat16), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        layer(x)
        change(layer, layer.weight.flip(0).contiguous())
        expected = decoded(layer)(x.float())
        for _ in range(2):
            assert_near(layer(x), expected, 0.02)


def test_a_packed_layer_that_moves(make_layer: Callable[..., nn.Module], without_cpu_kernels: None) -> None:
    layer, x = make_layer("int4", dtype=torch.bfloat16), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        expected, packed = layer(x), layer.derived
        # Codes have no other dtype, so nothing is made anew.
        assert layer.to(torch.float16).to(torch.bfloat16).derived is packed
        state = layer.state_dict()
        assert layer.to("meta").derived is None
        layer.to_empty(device="cpu").load_state_dict(state | {"bias": make_layer("int4").bias})
        layer.load_state_dict(make_layer("int4", dtype=torch.bfloat16).state_dict())
        assert is_packed(layer) and layer(x).equal(expected)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("packs", [False, True], ids=["published", "packed"])
def test_training_after_inference_mode(
    packs: bool, settings: str, make_layer: Callable[..., nn.Module], request: pytest.FixtureRequest
) -> None:
    """Tensors that were made under `inference_mode` cannot be saved for a gradient."""
    if packs:
        request.getfixturevalue("without_cpu_kernels")
    used, made = (make_layer(settings, dtype=torch.bfloat16) for _ in range(2))
    x, weight = torch.randn(3, 64).bfloat16().requires_grad_(), made.dequantize()
    expected = torch.autograd.grad(used(x).sum(), x)[0]
    with torch.inference_mode():
        used(x)
        made.quantize_(weight)
        made(x)
    for layer in (used, made):
        assert_near(torch.autograd.grad(layer(x).sum(), x)[0], expected, 0.01)


@pytest.mark.parametrize("settings", SETTINGS)
def test_floats_are_not_loaded_into_codes(settings: str, make_layer: Callable[..., nn.Module]) -> None:
    """Torch would truncate them to integers."""
    layer = make_layer(settings)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"`weight` is torch.float32, but this layer holds int\d codes"):
        layer.load_state_dict(before | {"weight": torch.randn(layer.weight.shape)})
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


def test_a_scale_is_not_rounded_even_for_a_moment(make_layer: Callable[..., nn.Module]) -> None:
    """Another thread may use the layer while it is moved."""
    layer = make_layer("int8")
    scale = layer.weight_scale.clone()
    seen = []

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if tensor is layer.bias:  # the last of the three
            seen.append(layer.weight_scale.clone())
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    layer._apply(cast)
    assert layer.bias.dtype == torch.bfloat16
    assert seen[0].equal(scale) and layer.weight_scale.equal(scale)


def test_scales_are_loaded_as_they_are(make_layer: Callable[..., nn.Module], without_cpu_kernels: None) -> None:
    """In their own dtype, and what was packed with the older ones is packed anew."""
    layer = make_layer("groups")
    x = torch.randn(1, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        before = layer(x)
        scale = layer.weight_scale.double() * 2 + 1e-7
        layer.load_state_dict({"weight_scale": scale}, strict=False)
        assert torch.equal(layer.weight_scale, scale)
        torch.testing.assert_close(layer(x).float(), 2 * before.float() - layer.bias, atol=0.1, rtol=0.02)
