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
"""The benchmarks compare what they say: turns of one round, the same network on both sides, every byte that is read."""

import argparse
import sys
from typing import Any

import pytest
import torch
from conftest import REPOSITORY


# Behind the folder of the tests, which has modules of the same names.
sys.path.append(str(REPOSITORY / "benchmarks"))

import llama  # noqa: E402
import peers  # noqa: E402
import timing  # noqa: E402
from family import GENERATIONS, make_step, weight_bytes  # noqa: E402
from peers import WEIGHTS as WIDTHS  # noqa: E402
from peers import Work, describe, row_of  # noqa: E402
from slices import build_native, build_slice, read_bytes, repeat_layer  # noqa: E402


SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

every_generation = pytest.mark.parametrize("name", GENERATIONS)


def build_small(name: str, num_layers: int) -> Any:
    settings = GENERATIONS[name] | SMALL
    if name == "ChatGLM-6B":
        settings |= {"num_key_value_heads": 4, "bos_token_id": 94, "eos_token_id": 95}
    return build_slice(num_layers, torch.float32, **settings)


def test_ratios_are_of_turns_of_one_round() -> None:
    """A machine that gets ten times slower slows both, and moves no ratio."""
    order, slowness = [], iter([9.0, 9.0, 1.0, 1.0, 10.0, 10.0, 100.0, 100.0])

    def run(name: str, seconds: float) -> timing.Turn:
        order.append(name)
        return timing.Turn(seconds * next(slowness), total=1.0)

    series = timing.take_turns({"a": lambda: run("a", 1.0), "b": lambda: run("b", 3.0)}, rounds=3)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert series["a"].ratios_to(series["b"]) == (3.0, 3.0, 3.0)
    assert series["a"].median == 10.0


def test_a_disturbed_turn_is_taken_again() -> None:
    cores = timing.count_cores()
    turns = iter(
        timing.Turn(seconds, 1.0, others=others * cores) for seconds, others in ((1, 0.9), (2, 0.3), (3, 0.5))
    )
    series = timing.take_turns({"a": lambda: next(turns)}, rounds=1, warm_ups=0, patience=2)
    assert [turn.seconds for turn in series["a"].turns] == [2]
    assert timing.share_of_others([series["a"]]) == pytest.approx(0.3)


def test_what_others_take_is_unknown_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "busy_seconds", lambda: None)
    turn = timing.time_steps(lambda: None, steps=3)
    assert turn.others is None and turn.disturbance == 0
    assert timing.share_of_others([timing.Series([turn])]) is None


def test_the_native_model_is_the_same_network() -> None:
    model = build_small("ChatGLM3-6B", 2)
    native = build_native(model)
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, native(ids).logits, rtol=1e-4, atol=1e-5)
    assert native.lm_head.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()


@every_generation
def test_a_repeated_layer_computes_what_copies_of_it_do(name: str) -> None:
    copies, repeated = build_small(name, 3), build_small(name, 1)
    layers = copies.transformer.encoder.layers
    for layer in layers:
        layer.load_state_dict(repeated.transformer.encoder.layers[0].state_dict())
    for part in ("get_input_embeddings", "get_output_embeddings"):
        getattr(copies, part)().load_state_dict(getattr(repeated, part)().state_dict())
    repeated = repeat_layer(repeated, 3)
    ids = torch.randint(3, 90, (1, 5))
    with torch.no_grad():
        torch.testing.assert_close(copies(ids).logits, repeated(ids).logits)
    assert read_bytes(repeated) == read_bytes(copies)


@every_generation
def test_every_weight_is_counted(name: str) -> None:
    """The embedding is not read for a token; a tied one is, as the output layer."""
    model = build_small(name, 2)
    embedding, norms = model.get_input_embeddings().weight, model.transformer.encoder.final_layernorm
    all_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert weight_bytes(model) == all_bytes - sum(parameter.nbytes for parameter in norms.parameters())
    is_tied = model.get_output_embeddings().weight is embedding
    assert is_tied == (name == "ChatGLM-6B")
    assert weight_bytes(model) - read_bytes(model) == (0 if is_tied else embedding.nbytes)


@every_generation
def test_a_step_stands_behind_its_context(name: str) -> None:
    step, num_bytes = make_step(build_small(name, 2), context=40)
    heads = 4 if name == "ChatGLM-6B" else 2
    assert num_bytes == 2 * 2 * 40 * heads * 16 * 4
    with torch.no_grad():
        assert step().past_key_values.get_seq_length() == 41


def test_each_model_of_a_process_takes_its_own_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours and the native one share the weights and the process, and must not share the step."""
    monkeypatch.setattr(peers, "build_slice", lambda *_, **__: build_small("ChatGLM3-6B", 1))
    engine = peers.TorchEngine(argparse.Namespace(threads=1, layers=1, vocab=96), WIDTHS["bfloat16"])
    called = []
    for name, model in engine.models.items():
        model.register_forward_hook(lambda *_, name=name: called.append(name))
    for name in ("ours", "native"):
        engine.prepare(name, Work(), steps=2)
    called.clear()
    for name in ("ours", "native"):
        engine.take_turn(name, 1, 0)
    assert called == ["ours", "native"]


def test_the_table_puts_ratios_first() -> None:
    series = {
        name: timing.Series([timing.Turn(seconds, 1.0)] * 3)
        for name, seconds in (("ours", 0.02), ("llama.cpp", 0.03), ("native", 0.08))
    }
    figure = describe(WIDTHS["int8"], Work(batch=4), series, num_bytes=10**9, bandwidth=1e11)
    cells = ["int8", "batch 4", "1.50 (1.50–1.50)", "4.00 (4.00–4.00)", "50 %", "20.0", "30.0", "80.0", "10.0", ""]
    assert row_of(figure) == cells
    del series["llama.cpp"]
    assert row_of(describe(WIDTHS["int8"], Work(prefill=256), series, 1, 1.0))[1:5] == [
        "prefill 256",
        "",
        "4.00 (4.00–4.00)",
        "",
    ]


@pytest.mark.skipif(llama.version() is None, reason="llama.cpp is not installed (requirements/peers.txt)")
@pytest.mark.parametrize("bits", llama.TYPES)
def test_llama_loads_a_model_of_the_same_shape(tmp_path: Any, bits: int) -> None:
    shape = build_slice(2, torch.float32, "meta", **{**SMALL, "intermediate_size": 128})
    llama.write_model(tmp_path / "model.gguf", shape, bits)
    model = llama.LlamaModel(tmp_path / "model.gguf", threads=1)
    for make in (lambda: model.decode_step(3, prompt=4, tokens=2), lambda: model.prefill_step(9)):
        step = make()
        step()
        step()
