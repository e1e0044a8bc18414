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
"""One more token on a CPU, through all layers by one call: as the modules compute it, and only where nothing else is asked."""

import contextlib
import copy
import gc
import multiprocessing
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from generations import TINY, every_generation
from peft import LNTuningConfig, LoraConfig, get_peft_model
from test_quantization_cpu import HALVES, OLDER_PROCESSORS, older_processor
from torch import nn
from transformers import PreTrainedModel


Source = Callable[[str], ModuleType]
# What the kernels of quantized weights take: whole blocks of 128 columns.
SIZES = {"hidden_size": 128, "ffn_hidden_size": 256, "kv_channels": 32}


@pytest.fixture(scope="module")
def decoding(source: Source) -> ModuleType:
    return source("decoding_cpu")


@pytest.fixture
def calls(source: Source, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each token that all layers were asked for at once: whether they gave it."""
    found: list[bool] = []
    module = source("modeling_layers")
    decode = module.decode

    def watched(*arguments: Any) -> Any:
        result = decode(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(module, "decode", watched)
    return found


@pytest.fixture
def make_model(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """A model in 16 bits, or quantized, whose layers kernels compute."""

    def make(version: str = "chatglm3", dtype: torch.dtype = torch.bfloat16, bits: int = 16) -> PreTrainedModel:
        model = tiny_model(**{**TINY[version], **SIZES})
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= 0.4
        model = model.to(dtype)
        return model if bits == 16 else model.quantize(bits=bits)

    return make


def next_token(model: PreTrainedModel, num_rows: int, step: int = 0) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.arange(7 + step, 7 + step + num_rows)[:, None]}
    if model.config.prefix_lm:
        inputs |= {"position_ids": torch.tensor([[[3], [1 + step]]]), "token_type_ids": torch.tensor([[0]])}
    return inputs


@torch.no_grad()
def decode_tokens(model: PreTrainedModel, num_rows: int = 1, num_tokens: int = 4, **kwargs: Any) -> list[torch.Tensor]:
    """The logits of some tokens behind a prompt, and the keys and values of the last layer."""
    torch.manual_seed(1)
    cache = model(torch.randint(3, 80, (num_rows, 6)), use_cache=True).past_key_values
    logits = [
        model(**next_token(model, num_rows, step), past_key_values=cache, use_cache=True, **kwargs).logits.float()
        for step in range(num_tokens)
    ]
    return [torch.cat(logits, dim=1), cache.layers[-1].keys.float(), cache.layers[-1].values.float()]


def by_modules(model: PreTrainedModel, *args: Any) -> list[torch.Tensor]:
    """The same of a model whose modules are called: one of them has a hook."""
    hook = model.transformer.encoder.layers[0].mlp.register_forward_hook(lambda *args: None)
    found = decode_tokens(model, *args)
    hook.remove()
    return found


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() / other.norm() < 0.01


@pytest.mark.usefixtures("needs_kernels")
@every_generation
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_layers_at_once_equal_the_modules(
    dtype: torch.dtype, bits: int, version: str, make_model: Callable[..., PreTrainedModel], calls: list[bool]
) -> None:
    model = make_model(version, dtype, bits)
    for num_rows in (1, 3):
        calls.clear()
        found = decode_tokens(model, num_rows)
        assert calls == [True] * 4
        assert_same(found, by_modules(model, num_rows))
        assert calls == [True] * 4 + [False] * 4


@pytest.mark.usefixtures("needs_kernels")
@every_generation
@pytest.mark.parametrize("lacking", OLDER_PROCESSORS.values(), ids=OLDER_PROCESSORS)
def test_older_processors(
    lacking: tuple[str, ...],
    version: str,
    decoding: ModuleType,
    source: Source,
    make_model: Callable[..., PreTrainedModel],
    calls: list[bool],
) -> None:
    modules = (decoding, *(source(name) for name in ("linear_cpu", "quantization_cpu", "kernels_layers")))
    decoding.PLANS.of_modules.clear()
    for bits in (16, 4):
        model = make_model(version, bits=bits)
        expected = by_modules(model)
        source("linear_cpu").multiplies_pairs.cache_clear()
        with older_processor(lacking, *modules):
            calls.clear()
            assert_same(decode_tokens(model), expected)
            assert all(calls)
        source("linear_cpu").multiplies_pairs.cache_clear()


@pytest.mark.usefixtures("needs_kernels")
@every_generation
def test_generating_takes_one_call_a_token(
    version: str, make_model: Callable[..., PreTrainedModel], calls: list[bool]
) -> None:
    model = make_model(version, torch.float16)
    settings = {"do_sample": False, "max_new_tokens": 90, "eos_token_id": None}
    prompt = (
        torch.tensor([[11, 12, 13, model.config.bos_token_id]])
        if model.config.prefix_lm
        else torch.arange(9, 15)[None]
    )
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    for num_beams in (1, 2):
        calls.clear()
        found = model.generate(prompt, num_beams=num_beams, **settings)
        assert calls == [True] * 89
        hook = model.transformer.encoder.layers[1].register_forward_pre_hook(lambda *args: None)
        expected = model.generate(prompt, num_beams=num_beams, **settings)
        hook.remove()
        if num_beams == 1:
            assert found.sequences.equal(expected.sequences)
        else:
            # Beams that are as likely may change places.
            torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=0.001, atol=0.001)


def add_adapter(model: PreTrainedModel) -> None:
    get_peft_model(model, LoraConfig(target_modules=["query_key_value"], init_lora_weights=False))


def replace_forward(model: PreTrainedModel) -> None:
    """What accelerate does to layers that it offloads."""
    layer = model.transformer.encoder.layers[1].mlp.dense_4h_to_h
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def double_an_output(model: PreTrainedModel) -> None:
    layer = model.transformer.encoder.layers[1].self_attention
    layer.register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))


def change_an_input(model: PreTrainedModel) -> None:
    model.transformer.encoder.layers[1].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def wrap_a_layer(model: PreTrainedModel) -> None:
    layer = model.transformer.encoder.layers[1]
    layer.mlp.dense_h_to_4h = nn.Sequential(layer.mlp.dense_h_to_4h, nn.Tanh())


def attend_eagerly(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


def wrap_the_first_projection(model: PreTrainedModel) -> None:
    attention = model.transformer.encoder.layers[0].self_attention
    attention.query_key_value = nn.Sequential(attention.query_key_value, nn.Tanh())


class WrappedBlock(nn.Module):
    """Passes on what it does not have, as wrappers that steer a model do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.block(*args, **kwargs) + 1


def wrap_a_block(model: PreTrainedModel) -> None:
    layers = model.transformer.encoder.layers
    layers[0] = WrappedBlock(layers[0]).eval()


def take_a_subclass(model: PreTrainedModel) -> None:
    mlp = model.transformer.encoder.layers[0].mlp
    mlp.__class__ = type("Doubled", (type(mlp),), {"forward": lambda self, x: 2 * type(mlp).__base__.forward(self, x)})


def patch_a_method(model: PreTrainedModel) -> None:
    model.transformer.encoder.layers[1].mlp.activate = torch.tanh


def parametrize_a_weight(model: PreTrainedModel) -> None:
    torch.nn.utils.parametrizations.spectral_norm(model.transformer.encoder.layers[1].mlp.dense_4h_to_h)
    model.eval()


def tune_norms(model: PreTrainedModel) -> None:
    tuned = get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm"])).eval()
    for name, parameter in tuned.named_parameters():
        if "ln_tuning_layers" in name:
            parameter.data *= 2


def norm_as_torch(model: PreTrainedModel) -> None:
    model.transformer.encoder.layers[0].input_layernorm = nn.RMSNorm(128, 1e-2, dtype=torch.bfloat16).eval()


CHANGES = (
    add_adapter,
    replace_forward,
    double_an_output,
    change_an_input,
    wrap_a_layer,
    attend_eagerly,
    wrap_the_first_projection,
    wrap_a_block,
    take_a_subclass,
    patch_a_method,
    parametrize_a_weight,
    tune_norms,
    norm_as_torch,
)


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whoever_asks_for_more_gets_the_modules(
    change: Callable[[PreTrainedModel], None],
    make_model: Callable[..., PreTrainedModel],
    calls: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    source: Source,
) -> None:
    model = make_model()
    plain = decode_tokens(model)
    assert calls == [True] * 4
    torch.manual_seed(2)
    change(model)
    changed = decode_tokens(model)
    assert not any(calls[4:])
    # Without the call altogether.
    monkeypatch.setattr(source("modeling_layers"), "decode", lambda *args: None)
    assert all(one.equal(other) for one, other in zip(changed, decode_tokens(model)))
    assert change is attend_eagerly or (changed[0] - plain[0]).norm() / plain[0].norm() > 0.01


@pytest.mark.usefixtures("needs_kernels")
def test_calls_that_ask_for_more(make_model: Callable[..., PreTrainedModel], calls: list[bool]) -> None:
    model = make_model()
    with torch.no_grad():
        cache = model(torch.randint(3, 80, (2, 6)), use_cache=True).past_key_values
    token = {**next_token(model, 2), "past_key_values": cache, "use_cache": True}
    padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        model(**token, attention_mask=padded)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**token)
        assert not any(calls)
        model.train()
        model(**token)
        model.eval()
        assert not any(calls)
        watch = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
        model(**token)
        watch.remove()
        assert not any(calls)
    model(**token).logits.sum().backward()
    assert not any(calls)
    grads = [layer.self_attention.dense.weight.grad for layer in model.transformer.encoder.layers]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    with torch.no_grad():
        model(**token)
        assert calls[-1]
        calls.clear()
        # The library leaves its hooks in the model, so this comes last.
        assert len(model(**token, output_hidden_states=True).hidden_states) == 3
        assert not any(calls)


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
def test_other_caches_are_left_to_the_modules(make_model: Callable[..., PreTrainedModel], calls: list[bool]) -> None:
    model = make_model()
    cache = model(torch.randint(3, 80, (2, 6)), use_cache=True).past_key_values
    held = cache.layers[1]
    for keys in (held.keys.float(), held.keys.to("meta"), held.keys[..., :16], held.keys[:, :1]):
        changed = copy.copy(cache)
        changed.layers = [cache.layers[0], copy.copy(held)]
        changed.layers[1].keys = changed.layers[1].values = keys
        with contextlib.suppress(RuntimeError):
            model(**next_token(model, 2), past_key_values=changed, use_cache=True)
        assert not any(calls)
        assert changed.layers[1].keys.shape[2] <= 7
    tables = [torch.ones(3, 1, 1, 32, dtype=torch.bfloat16)] * 2
    encoder = model.transformer.encoder
    hidden_states = torch.ones(2, 1, 128, dtype=torch.bfloat16)
    before = cache.get_seq_length()
    assert encoder.decode(list(encoder.layers), hidden_states, tables, past_key_values=cache) is None
    assert cache.get_seq_length() == before


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
def test_default_devices_and_dtypes_are_not_taken(
    make_model: Callable[..., PreTrainedModel], calls: list[bool]
) -> None:
    model = make_model()
    cache = model(torch.randint(3, 80, (1, 6)), use_cache=True).past_key_values
    token = next_token(model, 1)
    expected = copy.deepcopy(cache), model(**token, past_key_values=cache, use_cache=True).logits
    with torch.device("meta"):
        model.transformer.encoder.decode(
            list(model.transformer.encoder.layers),
            torch.ones(1, 1, 128, dtype=torch.bfloat16, device="cpu"),
            (torch.ones(1, 1, 1, 32, dtype=torch.bfloat16, device="cpu"),) * 2,
            past_key_values=cache,
        )
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = model(**token, past_key_values=expected[0], use_cache=True).logits
        hook = model.transformer.encoder.layers[0].register_forward_hook(lambda *args: None)
        decode_tokens(model)
        hook.remove()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.equal(expected[1])
    assert calls == [True] * 3 + [False] * 4


@torch.no_grad()
@pytest.mark.usefixtures("needs_kernels")
def test_vmap_takes_the_modules(make_model: Callable[..., PreTrainedModel], calls: list[bool]) -> None:
    model = make_model()
    cache = model(torch.randint(3, 80, (1, 6)), use_cache=True).past_key_values
    encoder = model.transformer.encoder
    tables = (torch.ones(1, 1, 1, 32, dtype=torch.bfloat16),) * 2

    def decode(hidden_states: torch.Tensor) -> torch.Tensor:
        assert encoder.decode(list(encoder.layers), hidden_states, tables, past_key_values=cache) is None
        return hidden_states

    torch.vmap(decode)(torch.ones(2, 1, 1, 128, dtype=torch.bfloat16))
    assert cache.get_seq_length() == 6 and calls == [False]


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("options", [{"pre_seq_len": 5}, {"group_size": 32}], ids=str)
def test_prefixes_and_groups(
    options: dict[str, int],
    tiny_model: Callable[..., PreTrainedModel],
    make_model: Callable[..., PreTrainedModel],
    calls: list[bool],
) -> None:
    if "pre_seq_len" in options:
        model = tiny_model(**SIZES, **options).bfloat16()
    else:
        model = make_model().quantize(bits=4, **options)
    found = decode_tokens(model)
    assert all(calls)
    assert_same(found, by_modules(model))


@pytest.mark.usefixtures("needs_kernels")
def test_changed_settings_are_seen(make_model: Callable[..., PreTrainedModel], calls: list[bool]) -> None:
    model = make_model()
    layer = model.transformer.encoder.layers[1]
    for module, name, value in (
        (layer.self_attention, "scaling", 1.0),
        (layer.input_layernorm, "variance_epsilon", 5.0),
        (layer.mlp, "activation", "gelu_pytorch_tanh"),
        (layer, "residual_scale", 3.0),
        (layer, "residual_post_layernorm", True),
    ):
        before = decode_tokens(model)
        setattr(module, name, value)
        found = decode_tokens(model)
        assert all(calls)
        calls.clear()
        assert_same(found, by_modules(model))
        assert (found[0] - before[0]).norm() / before[0].norm() > 0.005
        calls.clear()


@pytest.mark.usefixtures("needs_kernels")
def test_patched_classes_are_seen(
    make_model: Callable[..., PreTrainedModel], calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    before = decode_tokens(model)
    kind = type(model.transformer.encoder.layers[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, hidden_states: 2 * forward(self, hidden_states))
    found = decode_tokens(model)
    assert calls == [True] * 4 + [False] * 4
    assert (found[0] - before[0]).norm() / before[0].norm() > 0.05


@pytest.mark.usefixtures("needs_kernels")
def test_adapters_that_save_modules_are_switched(
    make_model: Callable[..., PreTrainedModel], calls: list[bool]
) -> None:
    config = LoraConfig(target_modules=["dense"], modules_to_save=["input_layernorm"])
    model = make_model()
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= 3
    changed = decode_tokens(model)
    with adapted.disable_adapter():
        plain = decode_tokens(model)
    assert not any(calls)
    assert (changed[0] - plain[0]).norm() / plain[0].norm() > 0.05


@pytest.mark.usefixtures("needs_kernels")
def test_changed_weights_are_seen(make_model: Callable[..., PreTrainedModel], calls: list[bool]) -> None:
    model = make_model()
    decode_tokens(model)

    def check(num_calls: int) -> None:
        calls.clear()
        found = decode_tokens(model)
        assert calls == [num_calls > 0] * 4
        assert_same(found, by_modules(model))

    layer = model.transformer.encoder.layers[1]
    with torch.no_grad():
        layer.mlp.dense_4h_to_h.weight.mul_(-2)
    check(4)
    layer.self_attention.dense.weight = nn.Parameter(layer.self_attention.dense.weight.detach().flip(0).contiguous())
    check(4)
    layer.mlp.dense_h_to_4h.weight.data = layer.mlp.dense_h_to_4h.weight.data.t().contiguous().t()
    check(0)
    model.load_state_dict({name: 0.9 * tensor for name, tensor in model.state_dict().items()})
    check(0)
    layer.mlp.dense_h_to_4h.weight.data = layer.mlp.dense_h_to_4h.weight.data.contiguous()
    check(4)
    model.half()
    check(4)
    model.quantize(bits=8)
    check(4)
    model.float()
    calls.clear()
    decode_tokens(model)
    assert not any(calls)


@pytest.mark.usefixtures("needs_kernels")
def test_nothing_is_kept_that_was_replaced(make_model: Callable[..., PreTrainedModel], decoding: ModuleType) -> None:
    decoding.PLANS.of_modules.clear()
    model = make_model()
    keys, size = list(model.state_dict()), len(pickle.dumps(model.transformer.encoder))
    decode_tokens(model)
    assert list(model.state_dict()) == keys and len(pickle.dumps(model.transformer.encoder)) == size
    old = weakref.ref(model.transformer.encoder.layers[0].mlp.dense_h_to_4h)
    found = decode_tokens(copy.deepcopy(model))
    model.quantize(bits=4)
    gc.collect()
    assert old() is None
    assert not torch.equal(decode_tokens(model)[0], found[0])
    encoder = weakref.ref(model.transformer.encoder)
    del model
    gc.collect()
    assert encoder() is None and not decoding.PLANS.of_modules


@pytest.mark.usefixtures("needs_kernels")
@every_generation
def test_caches_that_were_changed_go_on(
    version: str, make_model: Callable[..., PreTrainedModel], calls: list[bool]
) -> None:
    model = make_model(version)
    results = []
    for with_hook in (False, True):
        if with_hook:
            model.transformer.encoder.layers[0].register_forward_hook(lambda *args: None)
        with torch.no_grad():
            torch.manual_seed(1)
            cache = model(torch.randint(3, 80, (2, 6)), use_cache=True).past_key_values
            kept = []
            for step in range(12):
                model(**next_token(model, len(cache.layers[0].keys), step), past_key_values=cache, use_cache=True)
                if step == 3:
                    kept = [cache.layers[1].keys, cache.layers[1].keys.clone()]
                    cache.crop(-3)
                if step == 5:
                    cache.reorder_cache(torch.tensor([1, 0]))
                if step == 8:
                    cache.batch_select_indices(torch.tensor([1]))
            # Whoever kept what was there before it was cropped finds it as it was.
            assert kept[0].equal(kept[1])
        results.append([cache.layers[1].keys.float(), cache.layers[1].values.float()])
    assert calls == [True] * 12 + [False] * 12
    assert_same(*results)


@pytest.mark.usefixtures("needs_kernels")
def test_memory_of_inference_mode_is_not_written_to(
    make_model: Callable[..., PreTrainedModel], calls: list[bool]
) -> None:
    model = make_model()
    with torch.inference_mode():
        found = decode_tokens(model)
    assert_same(decode_tokens(model), found)
    with torch.inference_mode():
        cache = model(torch.randint(3, 80, (1, 6)), use_cache=True).past_key_values
        model(**next_token(model, 1), past_key_values=cache, use_cache=True)
    with torch.no_grad():
        model(**next_token(model, 1), past_key_values=cache, use_cache=True)
    assert calls == [True] * 10


@pytest.mark.usefixtures("needs_kernels")
def test_threads_and_numbers_of_threads(
    make_model: Callable[..., PreTrainedModel], calls: list[bool], set_threads: Callable[[int], None]
) -> None:
    models = [make_model(), make_model("chatglm2", bits=4)]
    expected = [decode_tokens(model, 2, 30) for model in models]
    found: dict[int, list[torch.Tensor]] = {}
    set_threads(2)
    assert all(
        one.equal(other)
        for model, results in zip(models, expected)
        for one, other in zip(decode_tokens(model, 2, 30), results)
    )
    set_threads(1)

    def work(number: int) -> None:
        # The seed of the prompt belongs to all threads.
        cache = models[number % 2](prompts[number], use_cache=True).past_key_values
        found[number] = [
            models[number % 2](**next_token(models[0], 1, step), past_key_values=cache, use_cache=True).logits
            for step in range(40)
        ]

    prompts = torch.randint(3, 80, (4, 1, 6))
    with torch.no_grad():
        for number in range(4):
            work(number)
    alone = dict(found)

    def work_without_gradients(number: int) -> None:
        with torch.no_grad():
            work(number)

    threads = [threading.Thread(target=work_without_gradients, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one.equal(other) for number in range(4) for one, other in zip(found[number], alone[number]))
    assert all(calls)


@contextlib.contextmanager
def kernels_in_two_threads(model: PreTrainedModel) -> Iterator[None]:
    """All layers by one call in two threads, and the rest in one."""
    steps = sys.modules[sys.modules[type(model.transformer.encoder).__module__].decode.__module__].Steps
    run = steps.run

    def run_in_two(self: Any) -> None:
        torch.set_num_threads(2)
        run(self)
        torch.set_num_threads(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "run", run_in_two)
        yield


def decode_in_child(model: PreTrainedModel, connection: Any) -> None:
    with kernels_in_two_threads(model):
        connection.send([tensor.tolist() for tensor in decode_tokens(model)])


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forked_processes(make_model: Callable[..., PreTrainedModel], set_threads: Callable[[int], None]) -> None:
    model = make_model()
    set_threads(2)
    expected = decode_tokens(model)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    # Torch's own products would wait for threads that a forked process does not have.
    set_threads(1)
    child = context.Process(target=decode_in_child, args=(model, sender))
    child.start()
    assert receiver.poll(60)
    found = receiver.recv()
    child.join()
    assert found == [tensor.tolist() for tensor in expected]


@pytest.mark.usefixtures("needs_kernels")
@pytest.mark.parametrize("fault", ["no kernels", "no number of threads", "a program that does not compile"])
def test_without_kernels_the_modules_are_called(
    fault: str,
    decoding: ModuleType,
    source: Source,
    make_model: Callable[..., PreTrainedModel],
    calls: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    expected = decode_tokens(model)
    model = copy.deepcopy(model)
    calls.clear()
    if fault == "no kernels":
        monkeypatch.setattr(decoding, "HAS_KERNELS", False)
    elif fault == "no number of threads":
        monkeypatch.setattr(source("kernels_decoding"), "load_function", lambda *args, **kwargs: None)
    else:
        monkeypatch.setattr(decoding, "compile_kernel", lambda *args: None)
    assert_same(decode_tokens(model), expected)
    assert calls == [False] * 4


@pytest.mark.usefixtures("needs_kernels")
def test_all_channels_are_turned_as_by_torch(source: Source, decoding: ModuleType) -> None:
    layers, kernels = source("modeling_layers"), source("kernels_decoding")
    for dtype in HALVES:
        for pair_distance, is_interleaved in ((1, False), (2, True), (8, False), (16, True), (32, False), (48, True)):
            size = max(64, 2 * pair_distance)
            qkv, own, partner = torch.randn(2, 9 * size).to(dtype), *torch.randn(2, 2, size).to(dtype)
            heads = qkv.view(2, 3, 3, size).transpose(1, 2) if is_interleaved else qkv.view(2, 3, 3, size)
            queries, keys, values = (torch.empty(2, 3, size, dtype=dtype) for _ in range(3))
            assert kernels.turns_pairs(size, pair_distance)
            program = decoding.compile_kernel(kernels.TurningProgram, dtype, size, 3, 3, is_interleaved, pair_distance)
            addresses = [tensor.data_ptr() for tensor in (qkv, own, partner)]
            sizes = (keys.data_ptr(), 6 * size, 2 * size, values.data_ptr(), 6 * size, 2 * size)
            decoding.Step(program, 2, *addresses, 2 * size, queries.data_ptr(), *sizes).run(1)
            turned = layers.apply_rotary_pos_emb(
                heads[:, :2], own[:, None, None], partner[:, None, None], pair_distance
            )
            assert torch.stack((queries, keys), dim=1).equal(turned)
            assert values.equal(heads[:, 2])
