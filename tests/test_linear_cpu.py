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
"""Linear layers of 16-bit floats on a CPU: the kernels beside torch, and when they are not used."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from generations import TINY, every_generation
from peft import LoraConfig, get_peft_model
from test_quantization_cpu import HALVES, OLDER_PROCESSORS, assert_rounded, older_processor, protected_copies
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


# Out and in: the kernels take rows of a weight by fours, 64 of them at a time, and columns by 32.
SHAPES = ((1, 32), (5, 64), (33, 96), (67, 320), (128, 4096))


@pytest.fixture(scope="module")
def linear_cpu(source: Callable[[str], ModuleType]) -> ModuleType:
    return source("linear_cpu")


@pytest.fixture
def count_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many products kernels have computed since the last time, in whatever copy of the code."""
    calls: list[int] = []
    for name, module in list(sys.modules.items()):
        if name.endswith(".linear_cpu"):
            run = module.rows_step
            monkeypatch.setattr(module, "rows_step", lambda *args, run=run: (calls.append(1), run(*args))[1])

    def count() -> int:
        number = len(calls)
        calls.clear()
        return number

    return count


def make_layer(linear_cpu: ModuleType, out_features: int, in_features: int, dtype: torch.dtype, bias: bool) -> Any:
    torch.manual_seed(out_features)
    layer = linear_cpu.ChatGLMLinear(in_features, out_features, bias=bias, dtype=dtype)
    return layer.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_are_rounded_once(
    dtype: torch.dtype, bias: bool, out_features: int, in_features: int, linear_cpu: ModuleType, count_kernels: Any
) -> None:
    layer = make_layer(linear_cpu, out_features, in_features, dtype, bias)
    for num_rows in (1, 2, 3, 4, 5, linear_cpu.most_rows(dtype)):
        x = torch.randn(num_rows, in_features).to(dtype)
        with torch.no_grad():
            product = layer(x)
        assert product.dtype == dtype and count_kernels() == 1
        exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
        assert_rounded(product, exact)


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("lacking", OLDER_PROCESSORS.values(), ids=OLDER_PROCESSORS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernels_of_older_processors(dtype: torch.dtype, lacking: tuple[str, ...], linear_cpu: ModuleType) -> None:
    layer = make_layer(linear_cpu, 37, 320, dtype, True)
    linear_cpu.multiplies_pairs.cache_clear()
    for num_rows in (1, 5):
        x = torch.randn(num_rows, 320).to(dtype)
        with older_processor(lacking, linear_cpu), torch.no_grad():
            product = layer(x)
        assert_rounded(product, F.linear(x.double(), layer.weight.double(), layer.bias.double()))
    linear_cpu.multiplies_pairs.cache_clear()


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, linear_cpu: ModuleType) -> None:
    layer = make_layer(linear_cpu, 70, 256, dtype, True)
    x = torch.randn(7, 256).to(dtype)
    with torch.no_grad():
        expected = torch.cat([layer(row[None]) for row in x])
        assert all(layer(x[:count]).equal(expected[:count]) for count in range(1, 8))
        assert layer(x.view(7, 1, 256)).equal(expected.view(7, 1, 70))
        assert layer(x[1]).equal(expected[1])
        assert layer(x.t().contiguous().t()).equal(expected)
        x[3, 100], x[5, 7] = torch.nan, torch.inf
        changed = layer(x)
    assert changed[[0, 1, 2, 4, 6]].equal(expected[[0, 1, 2, 4, 6]])
    assert changed[3].isnan().all() and not changed[5].isfinite().any()


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nothing_behind_a_tensor_is_read(
    dtype: torch.dtype, out_features: int, in_features: int, linear_cpu: ModuleType
) -> None:
    """A weight may end with a mapped file. This ends the process, should it fail."""
    layer = make_layer(linear_cpu, out_features, in_features, dtype, True)
    x = torch.randn(3, in_features).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        assert linear_cpu.linear(*protected_copies(x, layer.weight, layer.bias)).equal(expected)


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_threads_share_a_weight(
    dtype: torch.dtype, linear_cpu: ModuleType, set_threads: Callable[[int], None]
) -> None:
    layer = make_layer(linear_cpu, 1000, 512, dtype, False)
    x = torch.randn(2, 512).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        set_threads(2)
        assert layer(x).equal(expected)


# ---------------------------------------------------------------------------------------------------------------------
# Where torch multiplies
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_kernels")
def test_what_the_kernels_do_not_take(linear_cpu: ModuleType, count_kernels: Any) -> None:
    layer = make_layer(linear_cpu, 40, 64, torch.bfloat16, True)
    x = torch.randn(2, 64).bfloat16()
    weight, bias = layer.weight, layer.bias
    with torch.no_grad():
        taken = linear_cpu.linear(x, weight, bias)
        assert count_kernels() == 1
        cases = (
            (x.float(), weight.float(), bias.float()),
            (x.repeat(65, 1), weight, bias),
            (x[:0], weight, bias),
            (x[:, :40], weight[:, :40].contiguous(), bias),
            (x, weight.t().contiguous().t(), bias),
            (x, weight, bias.repeat(2)[::2]),
            (x, weight[:0], bias[:0]),
        )
        for case in cases:
            torch.testing.assert_close(linear_cpu.linear(*case), F.linear(*case), rtol=0.02, atol=0.02)
        for case in (
            (x.half(), weight, bias),
            (x, weight[:, :32], bias),
            (x, weight, bias[:8]),
            (x[:, :32], weight, bias),
        ):
            with pytest.raises(RuntimeError):
                linear_cpu.linear(*case)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.to("meta")(x.to("meta")).is_meta
        assert count_kernels() == 0
        batched = torch.vmap(lambda one: linear_cpu.linear(one, weight, bias))(x[:, None])
    torch.testing.assert_close(batched[:, 0], taken, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("out_features", "in_features", "bias"), [(1, 32, True), (67, 33, False), (650, 256, True)])
def test_many_rows_of_float16_are_converted(
    out_features: int,
    in_features: int,
    bias: bool,
    linear_cpu: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_cpu, "is_slow_in_float16", lambda: True)
    monkeypatch.setattr(linear_cpu, "find_matmul", lambda *args: None)
    layer = make_layer(linear_cpu, out_features, in_features, torch.float16, bias)
    x = torch.randn(3, 50, in_features).half()
    calls = []
    convert = linear_cpu.multiply_many_rows
    monkeypatch.setattr(linear_cpu, "multiply_many_rows", lambda *args: (calls.append(1), convert(*args))[1])
    with torch.no_grad():
        product = layer(x)
        assert len(calls) == 1 and product.dtype == torch.float16
        assert layer(x[:, :0]).shape == (3, 0, out_features)
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert_rounded(product, exact)
    assert layer(x).equal(F.linear(x, layer.weight, layer.bias))  # with gradients torch multiplies
    assert len(calls) == 1


@pytest.mark.usefixtures("needs_kernels")
def test_gradients_are_torchs(linear_cpu: ModuleType, count_kernels: Any) -> None:
    layer = make_layer(linear_cpu, 40, 64, torch.bfloat16, True).requires_grad_()
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert count_kernels() == 0
    assert layer.weight.grad is not None and layer.bias.grad.eq(2).all()


@pytest.mark.usefixtures("needs_kernels")
def test_compilers_see_one_operator(linear_cpu: ModuleType, count_kernels: Any) -> None:
    layer = make_layer(linear_cpu, 40, 64, torch.float16, True)
    x = torch.randn(1, 2, 64).half()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        expected = layer(x)
        assert count_kernels() == 1
        assert torch.compile(layer, backend=backend, fullgraph=True)(x).equal(expected)
        assert count_kernels() == 1
    assert len(seen) == 1 and seen[0].startswith("chatglm.linear")
    torch.library.opcheck(linear_cpu.multiply_operator, (x, layer.weight, layer.bias))
    torch.library.opcheck(linear_cpu.multiply_operator, (x, layer.weight))


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_exported_and_traced_programs_have_torchs_layers(linear_cpu: ModuleType) -> None:
    layer = make_layer(linear_cpu, 40, 64, torch.bfloat16, True)
    x, other = torch.randn(2, 2, 64).bfloat16()
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x,))
        torch.testing.assert_close(traced(other), layer(other), rtol=0.02, atol=0.02)
        if hasattr(torch.compiler, "is_exporting"):
            exported = torch.export.export(layer, (x,))
            assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [
                torch.ops.aten.linear.default
            ]


@pytest.mark.parametrize("fault", ["no llvmlite", "old llvmlite", "another processor", "no GOMP_parallel"])
def test_without_kernels_torch_multiplies(
    fault: str, linear_cpu: ModuleType, source: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    llvm_kernels = source("kernels_llvm")
    caches = (llvm_kernels.processor_features, llvm_kernels.rows_at_a_time, linear_cpu.multiplies_pairs)
    if fault == "no llvmlite":
        monkeypatch.setattr(llvm_kernels, "ir", None)
        monkeypatch.setattr(llvm_kernels, "llvm", None)
        for cached in caches:
            cached.cache_clear()
    elif llvm_kernels.ir is None:
        pytest.skip("needs llvmlite")
    elif fault == "old llvmlite":
        monkeypatch.setattr(llvm_kernels.llvm, "llvm_version_info", (15, 0, 7))
    elif fault == "another processor":
        monkeypatch.setattr(llvm_kernels, "processor_features", dict)
    else:
        # As on Windows and macOS, where torch's OpenMP library has no such function.
        monkeypatch.setattr(llvm_kernels.ctypes, "CDLL", lambda path: SimpleNamespace())
        monkeypatch.setattr(llvm_kernels, "load_openmp", functools.cache(llvm_kernels.load_openmp.__wrapped__))
        assert llvm_kernels.load_openmp() is None
    assert not llvm_kernels.has_kernels(linear_cpu.FloatProgram)
    monkeypatch.setattr(linear_cpu, "compile_kernel", functools.cache(llvm_kernels.compile_kernel.__wrapped__))
    layer = make_layer(linear_cpu, 40, 64, torch.bfloat16, True)
    x = torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        assert layer(x).equal(F.linear(x, layer.weight, layer.bias))
    for cached in caches if fault == "no llvmlite" else ():
        cached.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_kernels")
@every_generation
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_models_decode_by_kernels(
    dtype: torch.dtype,
    version: str,
    linear_cpu: ModuleType,
    tiny_model: Callable[..., PreTrainedModel],
    count_kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(**TINY[version], hidden_size=64, ffn_hidden_size=96, kv_channels=16).to(dtype)
    ids = torch.randint(3, 80, (1, 4))
    logits = []
    for has_kernels in (True, False):
        if not has_kernels:
            monkeypatch.setattr(linear_cpu, "compile_kernel", lambda *args: None)
        with torch.no_grad():
            logits.append(model(ids).logits.float())
        assert count_kernels() == (9 if has_kernels else 0)
    assert ((logits[0] - logits[1]).norm() / logits[1].norm()) < (0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.usefixtures("needs_kernels")
def test_adapters_and_quantization_take_the_layers(
    tiny_model: Callable[..., PreTrainedModel], count_kernels: Any
) -> None:
    model = tiny_model(hidden_size=64).bfloat16()
    ids = torch.randint(3, 80, (1, 3))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        assert adapted(ids).logits.isfinite().all()
    # Layers with 48 columns are torch's; those of the adapter are no layers of ours.
    assert count_kernels() == 7
    merged = adapted.merge_and_unload()
    assert type(merged.get_output_embeddings()).__name__ == "ChatGLMLinear"
    merged.quantize(8).dequantize()
    with torch.no_grad():
        assert merged(ids).logits.isfinite().all()
    assert count_kernels() == 7
    kinds = {type(module).__name__ for module in merged.modules() if isinstance(module, nn.Linear)}
    assert kinds == {"ChatGLMLinear"}
