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
"""A reused cache never changes an answer, whatever happened to the model or to the cache in between."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


GREEDY = {"do_sample": False, "max_new_tokens": 8}
FIRST, SECOND = "one two three four one two three four one two", "再见"

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Model = Any


@pytest.fixture
def pair(case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]) -> Pair:
    """A model that a test may change."""
    return copy.deepcopy(case_model("chatglm3")), case_tokenizer("chatglm3")


@pytest.fixture
def other_model(case_model: Callable[[str], Any]) -> PreTrainedModel:
    """A model of the same sizes."""
    model = copy.deepcopy(case_model("chatglm3"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return model


class Recorder(LogitsProcessor):
    """Keeps the scores of every step: answers may be equal by chance, scores are not."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.scores.append(scores.float().clone())
        return scores


def ask(model: Model, tokenizer: PreTrainedTokenizerBase, history: Any = None, **settings: Any) -> tuple[Any, Any]:
    recorder = Recorder()
    settings = GREEDY | {"logits_processor": LogitsProcessorList([recorder])} | settings
    return model.chat(tokenizer, SECOND, history=history, **settings)[0], torch.stack(recorder.scores)


def check_same(model: Model, tokenizer: PreTrainedTokenizerBase, history: Any, cache: Any, **settings: Any) -> None:
    """The answer with a cache is the one without, now and when the cache is used once more."""
    expected, scores = ask(model, tokenizer, history)
    for _ in range(2):
        answer, found = ask(model, tokenizer, history, past_key_values=cache, **settings)
        assert answer == expected
        torch.testing.assert_close(found, scores, atol=1e-4, rtol=1e-3)


def start(model: Model, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    _, history, cache = model.chat(tokenizer, FIRST, return_past_key_values=True, **GREEDY)
    return history, cache


def add_lora(model: Model) -> Any:
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False, lora_alpha=32)
    return peft.get_peft_model(model, settings).eval()


def attention(model: Model) -> Any:
    return model.transformer.encoder.layers[0].self_attention.query_key_value


def replace_weight(model: Model) -> None:
    attention(model).weight = torch.nn.Parameter(attention(model).weight.detach() * 1.5)


def swap_layers(model: Model) -> None:
    layers = model.transformer.encoder.layers
    layers[0], layers[1] = layers[1], layers[0]
    for index, layer in enumerate(layers):
        layer.self_attention.layer_idx = index


CHANGES: dict[str, Callable[[Any], Any]] = {
    "quantized": lambda model: model.quantize(4),
    "another dtype": lambda model: model.to(torch.bfloat16),
    "rounded": lambda model: model.to(torch.bfloat16).float(),
    "weight changed": lambda model: attention(model).weight.detach().mul_(1.5),
    "weight changed past autograd": lambda model: attention(model).weight.data.mul_(1.5),
    "weight replaced": replace_weight,
    "layers swapped": swap_layers,
    "adapter added": add_lora,
    "adapter merged": lambda model: add_lora(model).merge_and_unload(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_model_changed_in_between(pair: Pair, change: str) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    CHANGES[change](model)
    check_same(model, tokenizer, history, cache)


def train_step(adapted: Any) -> None:
    adapted.train()
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    ids = torch.arange(5, 17)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    adapted.eval()


def set_scale(adapted: Any) -> None:
    for module in adapted.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


ADAPTER_CHANGES: dict[str, Callable[[Any], Any]] = {
    "switched": lambda adapted: adapted.set_adapter("second"),
    "disabled": lambda adapted: adapted.base_model.disable_adapter_layers(),
    "merged": lambda adapted: adapted.merge_adapter(["default", "second"]),
    "scaled": set_scale,
    "trained": train_step,
    "unloaded": lambda adapted: adapted.unload(),
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_adapter_changed_in_between(pair: Pair, change: str) -> None:
    model, tokenizer = pair
    adapted = add_lora(model)
    settings = peft.LoraConfig(r=4, target_modules=["query_key_value"], init_lora_weights=False, lora_alpha=32)
    adapted.add_adapter("second", settings)
    adapted.eval()
    history, cache = start(adapted, tokenizer)
    ADAPTER_CHANGES[change](adapted)
    check_same(model, tokenizer, history, cache)
    # And back again.
    history, cache = start(adapted, tokenizer)
    with adapted.disable_adapter() if change != "unloaded" else torch.no_grad():
        check_same(adapted, tokenizer, history, cache)
    check_same(adapted, tokenizer, history, cache)


@pytest.mark.floor
def test_cache_of_another_model(pair: Pair, other_model: PreTrainedModel) -> None:
    model, tokenizer = pair
    history, cache = start(other_model, tokenizer)
    check_same(model, tokenizer, history, cache)
    check_same(other_model, tokenizer, history, cache)


def test_cache_of_a_model_loaded_from_another_folder(
    pair: Pair, case_model: Callable[[str], Any], case_tokenizer: Callable[[str], Any]
) -> None:
    model, tokenizer = pair
    # Its code is another module, and it has another number of key and value heads or of layers.
    _, cache = start(case_model("glm4"), case_tokenizer("glm4"))
    check_same(model, tokenizer, None, cache)


def test_autocast_in_between(pair: Pair) -> None:
    model, tokenizer = pair
    with torch.autocast("cpu", dtype=torch.bfloat16):
        history, cache = start(model, tokenizer)
    check_same(model, tokenizer, history, cache)


def test_dropout_in_between(pair: Pair) -> None:
    model, tokenizer = pair
    for layer in model.transformer.encoder.layers:
        layer.hidden_dropout = 0.5
    model.train()
    history, cache = start(model, tokenizer)
    check_same(model.eval(), tokenizer, history, cache)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_in_between(pair: Pair, mode: Any) -> None:
    model, tokenizer = pair
    with torch.inference_mode():
        history, cache = start(model, tokenizer)
    with mode():
        check_same(model, tokenizer, history, cache)


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize("setting", [{"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_settings_that_go_without_what_is_cached(pair: Pair, setting: dict[str, Any], in_config: bool) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    expected, _ = ask(model, tokenizer, history)
    settings = {"generation_config": GenerationConfig(**setting)} if in_config else setting
    for returned in (False, True):
        cached = {"past_key_values": cache, "return_past_key_values": returned}
        answer = model.chat(tokenizer, SECOND, history, **cached, **GREEDY, **settings)
        assert answer[0] == expected
        check_same(model, tokenizer, history, answer[2] if returned else cache)
    streamed = list(model.stream_chat(tokenizer, SECOND, history, past_key_values=cache, **GREEDY, **settings))
    assert streamed[-1][0] == expected
    check_same(model, tokenizer, history, cache)


def test_settings_of_the_model_that_go_without(pair: Pair) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    expected, _ = ask(model, tokenizer, history)
    model.generation_config.use_cache = False
    assert ask(model, tokenizer, history, past_key_values=cache)[0] == expected


def test_assistant_model(pair: Pair, other_model: PreTrainedModel) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    expected, _ = ask(model, tokenizer, history)
    for _ in range(2):
        cached = {"past_key_values": cache, "return_past_key_values": True}
        answer, _, cache = model.chat(tokenizer, SECOND, history, **cached, assistant_model=other_model, **GREEDY)
        assert answer == expected
    check_same(model, tokenizer, history, cache)


def test_generate_refuses_a_cache_that_the_settings_do_not_allow_for(pair: Pair) -> None:
    model, tokenizer = pair
    _, cache = start(model, tokenizer)
    held = cache.get_seq_length()
    ids = torch.tensor([[*cache.token_ids, 5, 6]])
    with pytest.raises(ValueError, match="prompt lookup"):
        model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, **GREEDY)
    for settings in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
        with pytest.raises(ValueError, match="use_cache=False"):
            model.generate(ids, past_key_values=cache, **settings)
        with pytest.raises(ValueError, match="use_cache=False"):
            list(model.stream_generate(ids, return_past_key_values=True, max_new_tokens=3, **settings))
    assert cache.get_seq_length() == held


class Interrupt(BaseException):
    """Like Ctrl-C."""


@pytest.fixture
def interrupt(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, int, int], None]:
    """`interrupt(cache, layer, forward_pass)` lets that forward pass, counted from 1, fail at that layer."""

    def interrupt(cache: Any, layer: int, forward_pass: int) -> None:
        passes = []
        update = type(cache).update

        def fail(self: Any, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if layer_idx == layer:
                passes.append(None)
                if len(passes) == forward_pass:
                    monkeypatch.undo()
                    raise Interrupt
            return update(self, keys, values, layer_idx, *args, **kwargs)

        monkeypatch.setattr(type(cache), "update", fail, raising=False)

    return interrupt


@pytest.mark.parametrize("forward_pass", [1, 3])
@pytest.mark.parametrize("streamed", [False, True])
def test_forward_pass_that_failed(pair: Pair, interrupt: Any, forward_pass: int, streamed: bool) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    interrupt(cache, 1, forward_pass)
    with pytest.raises(Interrupt):
        if streamed:
            list(model.stream_chat(tokenizer, SECOND, history, past_key_values=cache, **GREEDY))
        else:
            model.chat(tokenizer, SECOND, history, past_key_values=cache, **GREEDY)
    assert len({layer.get_seq_length() for layer in cache.layers}) == 2
    check_same(model, tokenizer, history, cache)


@pytest.mark.floor
def test_first_forward_pass_of_a_cache_that_failed(pair: Pair, interrupt: Any) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    cache.reset()
    interrupt(cache, 1, 1)
    with pytest.raises(Interrupt):
        model.chat(tokenizer, SECOND, history, past_key_values=cache, **GREEDY)
    check_same(model, tokenizer, history, cache)


def test_what_every_layer_holds_after_a_failure_is_used(pair: Pair, interrupt: Any) -> None:
    model, tokenizer = pair
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    _, cache = start(model, tokenizer)
    cache.reset()
    interrupt(cache, 1, 3)
    with pytest.raises(Interrupt):
        model.chat(tokenizer, FIRST, past_key_values=cache, **GREEDY)
    fed.clear()
    model.chat(tokenizer, FIRST, past_key_values=cache, **GREEDY)
    assert fed[0] == 1


def test_p_tuning_prefix_survives_a_failure(
    pair: Pair, interrupt: Any, case_folder: Callable[[str], Any], case_tokenizer: Callable[[str], Any]
) -> None:
    model, tokenizer = pair
    model = type(model).from_pretrained(case_folder("chatglm3"), pre_seq_len=5, dtype=torch.float32).eval()
    history, cache = start(model, tokenizer)
    for layer, forward_pass in ((0, 1), (0, 3), (1, 2)):
        interrupt(cache, layer, forward_pass)
        with pytest.raises(Interrupt):
            model.chat(tokenizer, SECOND, history, past_key_values=cache, **GREEDY)
        check_same(model, tokenizer, history, cache)
    with torch.no_grad():
        model.transformer.prefix_encoder.embedding.weight.mul_(2)
    check_same(model, tokenizer, history, cache)


@pytest.mark.floor
def test_one_call_at_a_time(pair: Pair) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    expected, _ = ask(model, tokenizer, history)
    inside, goes_on = threading.Event(), threading.Event()

    class Wait(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            inside.set()
            assert goes_on.wait(20)
            return scores

    answers = []

    def answer_slowly() -> None:
        settings = GREEDY | {"past_key_values": cache, "logits_processor": LogitsProcessorList([Wait()])}
        answers.append(model.chat(tokenizer, SECOND, history, **settings))

    thread = threading.Thread(target=answer_slowly)
    thread.start()
    assert inside.wait(20)
    with pytest.raises(ValueError, match="one cache for each thread"):
        model.chat(tokenizer, SECOND, history=history, past_key_values=cache, **GREEDY)
    stream = model.stream_chat(tokenizer, SECOND, history=history, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="has not ended"):
        next(stream)
    # A copy is a cache of its own.
    copied = copy.deepcopy(cache)
    goes_on.set()
    thread.join()
    assert answers[0][0] == expected
    check_same(model, tokenizer, history, cache)
    check_same(model, tokenizer, history, copied)


def test_streams_that_never_began_hold_nothing(pair: Pair) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    stream = model.stream_chat(tokenizer, SECOND, history=history, past_key_values=cache, **GREEDY)
    check_same(model, tokenizer, history, cache)
    expected, _ = ask(model, tokenizer, history)
    assert list(stream)[-1][0] == expected


def test_copies_pickles_and_crops(pair: Pair) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.token_ids == cache.token_ids and other.get_num_tokens() == cache.get_num_tokens()
        check_same(model, tokenizer, history, other)
    for change in (lambda: cache.crop(-5), cache.reset):
        change()
        check_same(model, tokenizer, history, cache)
    # Other tokens than those that were cut off.
    cache.crop(-5)
    model.generate(torch.tensor([[*cache.token_ids, 7, 8, 9]]), past_key_values=cache, **GREEDY)
    check_same(model, tokenizer, history, cache)


def test_unchanged_models_use_their_caches(pair: Pair) -> None:
    """Every way of changing nothing."""
    model, tokenizer = pair
    adapted = add_lora(model)
    fed: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    _, cache = start(adapted, tokenizer)

    def nothing() -> None:
        pass

    def adapter_off_and_on() -> None:
        with adapted.disable_adapter():
            adapted.chat(tokenizer, FIRST, **GREEDY)

    def trained_and_not() -> None:
        adapted.train()
        adapted.eval()

    for change in (nothing, adapter_off_and_on, trained_and_not):
        change()
        fed.clear()
        adapted.chat(tokenizer, FIRST, past_key_values=cache, **GREEDY)
        assert fed[0] == 1, change.__name__


def test_shards_of_distributed_training_are_looked_into(pair: Pair, source: Callable[[str], Any]) -> None:
    model, _ = pair
    describe_state = source("generation_cache").describe_state
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        weight = distribute_tensor(attention(model).weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        attention(model).weight = torch.nn.Parameter(weight)
        before = describe_state(model, "cpu")
        assert describe_state(model, "cpu") == before
        weight.to_local().mul_(2)
        assert describe_state(model, "cpu") != before
    finally:
        distributed.destroy_process_group()


def test_offloaded_weights_are_computed_anew(pair: Pair) -> None:
    model, tokenizer = pair
    history, cache = start(model, tokenizer)
    accelerate.cpu_offload(model)
    check_same(model, tokenizer, history, cache)
