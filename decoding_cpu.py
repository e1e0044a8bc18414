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
"""All layers by one call, for one more token on a CPU.

What is unusual here:

- Between two products, Python and torch take far longer than what they compute, as the weights that were just read have
  pushed everything else out of the processor's caches: a tenth of the time of a token and more. Here the steps of all
  layers are laid out once, and run one after the other in the same threads.
- The modules stay what the model is. They are asked for their steps, and asked before every token whether they are what
  they were: their classes, weights and hooks. Where anything else is asked for than the plain computation, or a kernel
  is missing, callers get `None` and call the modules.
- Steps are kept beside the model, for each thread, so that they are in no file, copy or pickle. Weights are not kept:
  only their addresses are, which are compared.
"""

import threading
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers.cache_utils import Cache, DynamicCache

from .kernels_decoding import ActivatingProgram, AddingProgram, Steps, TurningProgram, join_steps, turns_pairs
from .kernels_layers import LANES, AttentionProgram, NormProgram, count_places, find_addresses
from .kernels_llvm import (
    HALF_DTYPES,
    PLAIN_TENSORS,
    Program,
    Step,
    can_run_kernels,
    compile_kernel,
    has_kernels,
)
from .modeling_cache import GrowingLayer


# Asked once: without kernels a token should cost no more than it did.
HAS_KERNELS = has_kernels(TurningProgram)
# Activations that there is a kernel for: whether they are GELU.
ACTIVATIONS = {"silu": False, "gelu_pytorch_tanh": True}
# Plans of one model in one thread: of other batches, and of fewer layers.
MOST_PLANS = 4
# Where the arguments are that change with every token.
TURNING = {name: place for place, name in enumerate(TurningProgram.names)}
ATTENDING = {name: place for place, name in enumerate(AttentionProgram.names)}


class NoKernelError(Exception):
    """A layer that kernels do not compute."""


def make_step(program: type[Program], settings: tuple[Any, ...], *arguments: int) -> Step:
    kernel = compile_kernel(program, *settings)
    if kernel is None:
        raise NoKernelError
    return Step(kernel, *arguments)


class States:
    """Memory for what passes between the steps, `[rows, ...]`. All layers share it."""

    def __init__(self, layer: Any, num_rows: int, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attention, layer.mlp
        self.dtype = dtype
        self.others: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}
        hidden_size, qkv_size = attention.query_key_value.in_features, attention.query_key_value.out_features
        query_size = attention.dense.in_features
        up_size, intermediate_size = mlp.dense_h_to_4h.out_features, mlp.dense_4h_to_h.in_features
        if any(size % LANES != 0 for size in (hidden_size, qkv_size, query_size, up_size, intermediate_size)):
            raise NoKernelError
        self.hidden, self.normed, self.output = (self.make((num_rows, hidden_size)) for _ in range(3))
        self.queries, self.attended = (self.make((num_rows, query_size)) for _ in range(2))
        self.qkv, self.up = self.make((num_rows, qkv_size)), self.make((num_rows, up_size))
        self.activated = self.make((num_rows, intermediate_size))

    def make(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        # Tensors of `inference_mode` could not be written to outside of it.
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype or self.dtype, device="cpu")

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory for what is needed within a layer's product; the same for the same shape."""
        if (shape, dtype) not in self.others:
            self.others[shape, dtype] = self.make(shape, dtype)
        return self.others[shape, dtype]


def plan_product(linear: Any, x: torch.Tensor, output: torch.Tensor, states: States) -> list[Step]:
    fits_states = (linear.in_features, linear.out_features) == (x.shape[1], output.shape[1])
    # A weight that is no parameter may be made anew for every call.
    if linear._parameters.get("weight") is None or not fits_states:
        raise NoKernelError
    steps = linear.find_steps(x, output, states.scratch)
    if steps is None:
        raise NoKernelError
    return steps


def plan_norm(norm: Any, states: States) -> Step:
    is_layer_norm, hidden_size = isinstance(norm, nn.LayerNorm), states.hidden.shape[1]
    epsilon = norm.eps if is_layer_norm else norm.variance_epsilon
    names = ("weight", "bias") if is_layer_norm else ("weight",)
    parameters = [norm._parameters.get(name) for name in names]
    for parameter in parameters:
        is_known = parameter is not None and parameter.dtype == states.dtype and parameter.shape == (hidden_size,)
        if not is_known or not parameter.is_contiguous():
            raise NoKernelError
    addresses = [parameter.data_ptr() for parameter in parameters]
    arguments = (*addresses, *[0] * (2 - len(addresses)), states.normed.data_ptr(), hidden_size)
    settings = (states.dtype, states.dtype, epsilon, is_layer_norm)
    return make_step(NormProgram, settings, len(states.hidden), states.hidden.data_ptr(), *arguments)


def plan_sum(layer: Any, states: States) -> Step:
    """Adds a sublayer's output to the residual stream."""
    residual = states.normed if layer.residual_post_layernorm else states.hidden
    num_rows, hidden_size = states.hidden.shape
    addresses = (states.output.data_ptr(), residual.data_ptr(), states.hidden.data_ptr())
    return make_step(AddingProgram, (states.dtype, float(layer.residual_scale)), hidden_size, num_rows, *addresses)


def plan_activation(mlp: Any, states: States) -> Step:
    # CODEPATH: glm and glm-130b have the exact GELU, glm-130b activates the second half; there is no kernel for these.
    if mlp.activation not in ACTIVATIONS or (mlp.is_gated and not mlp.gate_comes_first):
        raise NoKernelError
    num_rows, num_columns = states.activated.shape
    if states.up.shape[1] != num_columns * (2 if mlp.is_gated else 1):
        raise NoKernelError
    settings = (states.dtype, ACTIVATIONS[mlp.activation], mlp.is_gated)
    addresses = (states.up.data_ptr(), states.activated.data_ptr())
    return make_step(ActivatingProgram, settings, num_columns, num_rows, *addresses)


@dataclass
class CacheSteps:
    """The steps of a layer that read and write the cache, whose arguments change with every token."""

    layer_idx: int
    num_heads: int
    turning: Step
    attending: Step

    def aim(self, layer: GrowingLayer, own: torch.Tensor, partner: torch.Tensor, memory: torch.Tensor) -> None:
        """Write into the last place of a layer of the cache, and look at all of them.

        Args:
            own, partner: the rotation's tables, `[1 or rows, 1, 1, head_dim]`.
            memory: for the scores, float32.
        """
        itemsize, head_dim, num_keys = own.itemsize, own.shape[-1], layer.keys.shape[-2]
        keys, values = layer.keys, layer.values
        row_bytes, head_bytes, key_bytes = (itemsize * step for step in keys.stride()[:3])
        offset = (num_keys - 1) * key_bytes
        turning, attending = self.turning.arguments, self.attending.arguments
        turning[TURNING["own"]], turning[TURNING["partner"]] = own.data_ptr(), partner.data_ptr()
        turning[TURNING["table_bytes"]] = head_dim * itemsize if len(own) > 1 else 0
        attending[ATTENDING["memory"]], attending[ATTENDING["num_keys"]] = memory.data_ptr(), num_keys
        attending[ATTENDING["num_places"]] = count_places(num_keys)
        for name, address in (("key", keys.data_ptr()), ("value", values.data_ptr())):
            turning[TURNING[f"{name}s"]] = address + offset
            turning[TURNING[f"{name}_row_bytes"]] = row_bytes
            turning[TURNING[f"{name}_head_bytes"]] = attending[ATTENDING[f"{name}_head_bytes"]] = head_bytes
            attending[ATTENDING[f"{name}s"]], attending[ATTENDING[f"{name}_bytes"]] = address, key_bytes


def plan_attention(attention: Any, states: States) -> tuple[list[Step], CacheSteps]:
    num_heads, num_key_heads = attention.num_query_heads, attention.num_key_value_heads
    dtype, num_rows, head_dim = states.dtype, len(states.hidden), attention.head_dim
    if not turns_pairs(head_dim, attention.pair_distance):
        raise NoKernelError
    settings = (dtype, head_dim, num_heads, num_key_heads, attention.is_qkv_interleaved, attention.pair_distance)
    turning = make_step(TurningProgram, settings, *[0] * (len(TURNING) - 1))
    attending = make_step(
        AttentionProgram, (dtype, head_dim, num_heads // num_key_heads, attention.scaling), *[0] * (len(ATTENDING) - 1)
    )
    queries = states.queries.data_ptr()
    for name, value in (("num_rows", num_rows), ("qkv", states.qkv.data_ptr()), ("queries", queries)):
        turning.arguments[TURNING[name]] = value
    output = states.attended.data_ptr()
    for name, value in (("num_heads", num_rows * num_key_heads), ("queries", queries), ("output", output)):
        attending.arguments[ATTENDING[name]] = value
    steps = [
        *plan_product(attention.query_key_value, states.normed, states.qkv, states),
        turning,
        attending,
        *plan_product(attention.dense, states.attended, states.output, states),
    ]
    return steps, CacheSteps(attention.layer_idx, num_heads, turning, attending)


def plan_layer(layer: Any, states: States) -> tuple[list[Step], CacheSteps]:
    attention_steps, cache_steps = plan_attention(layer.self_attention, states)
    steps = [
        plan_norm(layer.input_layernorm, states),
        *attention_steps,
        plan_sum(layer, states),
        plan_norm(layer.post_attention_layernorm, states),
        *plan_product(layer.mlp.dense_h_to_4h, states.normed, states.up, states),
        plan_activation(layer.mlp, states),
        *plan_product(layer.mlp.dense_4h_to_h, states.activated, states.output, states),
        plan_sum(layer, states),
    ]
    return steps, cache_steps


@dataclass
class Plan:
    """The steps of some layers for one more token of each sequence, or none if kernels do not compute them.

    Args:
        facts: what `describe` said of the layers.
    """

    facts: list[Any]
    steps: Steps | None = None
    states: States | None = None
    cache_steps: list[CacheSteps] = field(default_factory=list)
    # For the scores; grows with the cache.
    memory: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def run(
        self, hidden_states: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], cache: Cache
    ) -> torch.Tensor | None:
        """`[rows, 1, hidden]` -> `[rows, 1, hidden]`; the cache holds one more token afterwards."""
        if self.steps is None or self.states is None:
            return None
        own, partner = tables
        layers = [cache.layers[steps.layer_idx] for steps in self.cache_steps]
        lengths = [layer.keys.shape[-2] for layer in layers]
        num_places = count_places(1 + max(lengths))
        num_scores = len(hidden_states) * self.cache_steps[0].num_heads * (num_places + own.shape[-1])
        if self.memory.numel() < num_scores:
            self.memory = self.states.make((2 * num_scores,), torch.float32)
        try:
            for layer in layers:
                layer.add_place()
            for steps, layer in zip(self.cache_steps, layers):
                steps.aim(layer, own, partner, self.memory)
            self.states.hidden.copy_(hidden_states[:, 0])
            self.steps.run()
        except BaseException:
            # Whoever goes on with the cache, as `chat` does, would take what was not written for a token.
            for layer, length in zip(layers, lengths):
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            raise
        return self.states.hidden.clone()[:, None]


def make_plan(layers: list[Any], num_rows: int, dtype: torch.dtype, facts: list[Any]) -> Plan:
    try:
        states = States(layers[0], num_rows, dtype)
        planned = [plan_layer(layer, states) for layer in layers]
    except NoKernelError:
        return Plan(facts)
    steps = join_steps([step for layer_steps, _ in planned for step in layer_steps])
    return Plan(facts, steps, states, [cache_steps for _, cache_steps in planned])


def is_as_marked(kind: Any) -> bool:
    """Whether steps stand for a class of modules: for itself, as a subclass may compute something else, and unpatched."""
    methods = vars(kind).get("step_methods")
    return methods is not None and all(getattr(kind, name) is method for name, method in methods.items())


def describe(layers: list[Any]) -> tuple[list[Any], list[torch.Tensor]] | None:
    """What the steps of layers depend on, or `None` where a module has a hook, a wrapper or a patch, or is trained.

    It runs before every token, hence what is short here.

    Returns:
        Facts to compare, and the parameters.
    """
    facts: list[Any] = []
    parameters: list[torch.Tensor | None] = []
    kinds: set[type] = set()
    modules = list(layers)
    while modules:
        module = modules.pop()
        kind, own = type(module), module.__dict__
        if kind not in kinds:
            if not is_as_marked(kind):
                return None
            kinds.add(kind)
        # Torch's names, 2.6 to 2.13.
        if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None
        for name, method in kind.step_methods.items():
            # Whoever offloads layers writes another `forward`, and the same again afterwards.
            if name in own and getattr(own[name], "__func__", None) is not method:
                return None
        facts.append(kind)
        for name in kind.step_settings:
            facts.append(own[name])
        parameters += own["_parameters"].values()
        modules += own["_modules"].values()
    weights = [parameter for parameter in parameters if parameter is not None]
    addresses = find_addresses(*weights)
    if addresses is None or not all(type(tensor) in PLAIN_TENSORS and tensor.is_cpu for tensor in weights):
        return None
    facts += addresses
    facts += [(tensor.dtype, tensor.shape, tensor.is_contiguous()) for tensor in weights]
    return facts, weights


class Plans(threading.local):
    """The plans of one thread, by the module whose layers they are for."""

    def __init__(self) -> None:
        self.of_modules: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


PLANS = Plans()


def fits(cache: DynamicCache, num_rows: int, layers: list[Any], head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the layers of a cache are such as are written to here, and hold something already."""
    attentions = [layer.self_attention for layer in layers]
    if len(cache.layers) <= max(attention.layer_idx for attention in attentions):
        return False
    return all(
        type(held) is GrowingLayer
        and held.is_initialized
        and held.keys.dtype == held.values.dtype == dtype
        and held.keys.is_cpu
        and held.values.is_cpu
        and held.keys.shape == held.values.shape
        and held.keys.shape[:2] == (num_rows, attention.num_key_value_heads)
        and held.keys.shape[2] > 0
        and held.keys.shape[3] == attention.head_dim == head_dim
        for attention in attentions
        for held in (cache.layers[attention.layer_idx],)
    )


def decode(
    owner: nn.Module,
    layers: list[Any],
    hidden_states: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    cache: Any,
) -> torch.Tensor | None:
    """The output of some layers for one more token, which sees all that the cache holds and is put behind it.

    Args:
        owner: the module that the layers belong to.
        hidden_states: `[rows, 1, hidden]`.
        tables: of `spread_rotary_tables`, `[1 or rows, 1, 1, head_dim]` each.
        cache: what the tokens before have left.

    Returns:
        `[rows, 1, hidden]`, or `None`, with nothing changed, where the modules have to be called.
    """
    num_rows, dtype = len(hidden_states), hidden_states.dtype
    if torch.compiler.is_compiling() or not HAS_KERNELS or not can_run_kernels(hidden_states, tables[0]):
        return None
    shape = tables[0].shape
    is_known = dtype in HALF_DTYPES and len(shape) == 4 and shape[0] in (1, num_rows) and shape[1:3] == (1, 1)
    is_known = is_known and all(
        table.dtype == dtype and table.shape == shape and table.is_contiguous() for table in tables
    )
    # Torch's name, 2.6 to 2.13.
    if not is_known or torch.is_autocast_enabled("cpu") or torch_modules._has_any_global_hook():
        return None
    # `chat` has a class of its own, which puts tokens behind each other as this one does.
    is_dynamic = isinstance(cache, DynamicCache) and type(cache).update is DynamicCache.update
    if not is_dynamic or cache.offloading or find_addresses(hidden_states, *tables) is None:
        return None
    if not layers or (described := describe(layers)) is None or not fits(cache, num_rows, layers, shape[3], dtype):
        return None
    # The parameters are held until they were read: another thread may replace them.
    facts, _ = described
    plans = PLANS.of_modules.setdefault(owner, {})
    key = (len(layers), num_rows, dtype, torch.get_num_threads())
    plan = plans.get(key)
    if plan is None or plan.facts != facts:
        if len(plans) >= MOST_PLANS:
            plans.clear()
        plan = plans[key] = make_plan(layers, num_rows, dtype, facts)
    return plan.run(hidden_states, tables, cache)


__all__ = ["decode"]
