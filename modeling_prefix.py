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
"""P-tuning v2: a trained prefix of keys and values for every layer.

What is unusual here:

- A prefix is the initial content of the cache; real tokens still count from position 0. The layers do not know about
  it. Only gradient checkpointing, which computes layers twice, gives them a cache that holds nothing else.
- Its weights stay float32 whatever the model is loaded in.
- The published training scripts save the prefix alone, under its names in the whole model
  (`transformer.prefix_encoder.embedding.weight`, ...), in a checkpoint folder of the Trainer. A prefix is looked for in
  any file or folder that a prefix or a model is saved as.
"""

import copy
import filecmp
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


try:
    from accelerate.utils import align_module_device
except ImportError:
    # Without accelerate, nothing can be offloaded.
    from contextlib import nullcontext as align_module_device


# Size of a prefix per virtual token (layers x 2 x key/value heads x width of a head) -> the models of that size.
PUBLISHED_PREFIX_WIDTHS = {229376: "ChatGLM-6B", 14336: "ChatGLM2-6B or ChatGLM3-6B", 20480: "GLM-4-9B"}

# The files that may hold a model's weights, in the order in which the library looks for them, and a prefix alone.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
PREFIX_FILES = ("prefix_encoder.safetensors", "prefix_encoder.bin")
PREFIX_KEY = "prefix_encoder."


def read_prefix_file(file: Path) -> dict[str, torch.Tensor]:
    """Read the prefix encoder out of a file of weights: `.safetensors`, a `.json` index of shards, or PyTorch's format.

    Returns:
        Its tensors, by their names in a [`PrefixEncoder`]; nothing if there is none in the file.

    Raises:
        OSError: if the file or a shard of it is not there.
        ValueError: if it is not a file of weights. Nothing in it is executed.
    """
    try:
        if file.suffix == ".json":
            shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({shard for key, shard in shards.items() if PREFIX_KEY in key})
            return {name: tensor for shard in files for name, tensor in read_prefix_file(file.parent / shard).items()}
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                return {key.split(PREFIX_KEY)[1]: stored.get_tensor(key) for key in stored.keys() if PREFIX_KEY in key}
        # Mapped into memory, so that only the prefix is read. Old versions of PyTorch wrote files that cannot be mapped.
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        return {key.split(PREFIX_KEY)[1]: tensor.clone() for key, tensor in stored.items() if PREFIX_KEY in key}
    except (AttributeError, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} is not a file of weights: {error}") from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        # PyTorch's own message suggests loading the file in a way that executes whatever is in it.
        raise ValueError(f"{file} is not a file of weights, or is damaged or holds more than tensors.") from error


def find_prefix(path: Path) -> dict[str, torch.Tensor]:
    """Read the prefix encoder out of a file, or of the files in a folder that a prefix or a model is saved as.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no weights in the folder.
        ValueError: if there are weights, but none of a prefix encoder.
    """
    files = [path]
    if path.is_dir():
        files = [path / name for name in PREFIX_FILES + WEIGHT_FILES if (path / name).is_file()]
    if not files or not path.exists():
        what = f"has none of {PREFIX_FILES + WEIGHT_FILES}" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"There is no prefix to load: {path} {what}.")
    for file in files:
        if weights := read_prefix_file(file):
            return weights
    raise ValueError(
        f"There is no prefix in {', '.join(map(str, files))}: no name of a weight holds `{PREFIX_KEY}`, as "
        "`transformer.prefix_encoder.embedding.weight` does. Was it trained without `pre_seq_len`?"
    )


def compare_stored_prefix(config: PreTrainedConfig, folder: Path) -> None:
    """Compare the prefix in a checkpoint folder, if it has one, with the one that is asked for.

    Raises:
        ValueError: with both lengths, or both values of `prefix_projection`.
    """
    weights = next((read_prefix_file(folder / name) for name in WEIGHT_FILES if (folder / name).is_file()), {})
    if "embedding.weight" not in weights:
        return
    stored = {
        "pre_seq_len": len(weights["embedding.weight"]),
        "prefix_projection": any(name.startswith("trans.") for name in weights),
    }
    for name, value in stored.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{folder} holds a trained prefix with `{name}={value}`, and `{name}={getattr(config, name)}` is asked "
                "for. Ask for what is stored, or train a new prefix on a checkpoint without one."
            )


def free_backup(file: Path) -> Path:
    """The first of NAME.bak, NAME.bak.1, ... that does not exist."""
    backup, count = file.with_name(f"{file.name}.bak"), 0
    while os.path.lexists(backup):
        count += 1
        backup = file.with_name(f"{file.name}.bak.{count}")
    return backup


def write_prefix(weights: dict[str, torch.Tensor], path: Path) -> Path:
    """Write a prefix in float32; a different file of that name becomes `NAME.bak`, or `NAME.bak.1`, ...

    Args:
        weights: by the names they get in the file.
        path: a name that ends in `.safetensors` or `.bin` (PyTorch's format), or else a folder, which is made.

    Returns:
        The file.

    Raises:
        ValueError: if a file is where the folder should be.
    """
    file = path if path.suffix in (".safetensors", ".bin") else path / PREFIX_FILES[0]
    if blocking := [str(folder) for folder in file.parents if folder.is_file()]:
        raise ValueError(f"{blocking[0]} is a file. Give a folder, or a name that ends in .safetensors or .bin.")
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in weights.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.tmp-{os.getpid()}")
    try:
        if file.suffix == ".bin":
            with new.open("wb") as stream:
                torch.save(weights, stream)
        else:
            save_file(weights, new, metadata={"format": "pt"})
        if file.is_file() and not filecmp.cmp(new, file, shallow=False):
            file.rename(free_backup(file))
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)
    return file


class PrefixEncoder(nn.Module):
    """The trained prefix of P-tuning v2 (https://arxiv.org/abs/2110.07602): keys and values for every layer."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.pre_seq_len = config.pre_seq_len
        self.num_layers = config.num_hidden_layers
        self.num_key_value_heads = config.num_key_value_heads
        self.prefix_projection = config.prefix_projection
        embedding_size = config.prefix_embedding_size
        # Half precision would round small training steps away. A dtype named here outlives `dtype` in loading.
        self.embedding = nn.Embedding(config.pre_seq_len, embedding_size, dtype=torch.float32)
        if self.prefix_projection:
            # A Sequential because the published names are `trans.0` and `trans.2`.
            self.trans = nn.Sequential(  # trf-ignore: TRF036
                nn.Linear(embedding_size, config.hidden_size, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(config.hidden_size, config.prefix_size, dtype=torch.float32),
            )
        self.dropout = nn.Dropout(0.1)

    def forward(self, batch_size: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, `[batch, kv_heads, prefix, head_dim]` each.

        Args:
            batch_size: of the keys and values.
            device: that of the model's input, in case the weights are offloaded.
        """
        # Offloaded weights are on the meta device until their module is called, so `embedding.weight` is not read here.
        device = device if self.embedding.weight.is_meta else self.embedding.weight.device
        prefix = self.embedding(torch.arange(self.pre_seq_len, device=device))  # [prefix, width of the embedding]
        if self.prefix_projection:
            prefix = self.trans(prefix)
        prefix = prefix.view(self.pre_seq_len, self.num_layers, 2, self.num_key_value_heads, -1)
        # [layers, 2, batch, kv_heads, prefix, head_dim]
        prefix = prefix.expand(batch_size, -1, -1, -1, -1, -1).permute(2, 3, 0, 4, 1, 5)
        # Every row of the batch has a dropout mask of its own.
        return [(layer[0], layer[1]) for layer in self.dropout(prefix)]


def make_prefix_encoder(config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> PrefixEncoder:
    """Make a prefix encoder from its weights, in float32 on the CPU; `config` is not changed.

    Args:
        config: of the model that the prefix is for.
        weights: by their names in a [`PrefixEncoder`]; their shapes tell its length and whether it has a projection.

    Raises:
        ValueError: if weights are missing or unknown, or were made for another model.
    """
    config = copy.copy(config)
    config.prefix_projection = has_projection = any(name.startswith("trans.") for name in weights)
    config.pre_seq_len = len(weights.get("embedding.weight", ()))
    with torch.device("meta"):
        encoder = PrefixEncoder(config)
    shapes = {name: tuple(weight.shape) for name, weight in encoder.named_parameters()}
    missing, unknown = sorted(shapes.keys() - weights.keys()), sorted(weights.keys() - shapes.keys())
    if missing or unknown:
        kind = "with" if has_projection else "without"
        raise ValueError(
            f"The weights of this prefix are incomplete or of another kind. A prefix {kind} `prefix_projection` consists "
            f"of {sorted(shapes)}; missing: {missing or 'none'}, unknown: {unknown or 'none'}."
        )
    name, dim = ("trans.2.weight", 0) if has_projection else ("embedding.weight", -1)
    found, wanted, hidden_size = weights[name].shape[dim], shapes[name][dim], config.hidden_size
    if found != wanted:
        origin = f" ({PUBLISHED_PREFIX_WIDTHS[found]})" if found in PUBLISHED_PREFIX_WIDTHS else ""
        if found == hidden_size and not has_projection:
            origin = " (the hidden size: is this the embedding of a prefix whose `trans` weights are missing?)"
        raise ValueError(
            f"This prefix was made for another model: it has {found} numbers for each virtual token{origin}, and this "
            f"model takes {wanted} = {config.num_hidden_layers} layers x 2 x {config.num_key_value_heads} key/value heads "
            f"x {config.head_dim}."
        )
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"This prefix was made for another model: `{name}` is {tuple(weights[name].shape)}, and this model "
                f"(hidden size {hidden_size}, prefix of {config.pre_seq_len}) takes {shape}."
            )
    encoder.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return encoder


def lacks_prefix(cache: Cache | None) -> bool:
    """Whether a cache holds nothing yet, not even a prefix."""
    if cache is None or not cache.is_initialized:
        return True
    return not getattr(cache, "holds_prefix", False) if cache.is_compileable else cache.get_seq_length() == 0


class PrefixReset:
    """Takes the place of `reset` in a static cache with a prefix, and notes that the prefix is gone.

    Such a cache counts its tokens on the device, and neither compiled code nor a single step should wait for that.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __call__(self) -> None:
        type(self.cache).reset(self.cache)
        self.cache.holds_prefix = False


class PrefixLayer(DynamicLayer):
    """One layer of a [`PrefixCache`]: puts the prefix before what it is given, and keeps nothing of it."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Under autocast, the states have another dtype than the model.
        keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)


class PrefixCache(Cache):
    """The prefix alone, for layers that gradient checkpointing computes twice.

    Reentrant checkpointing runs backward once for each layer, and each time would run through the prefix encoder and
    free its graph. So the layers get copies, and `pass_gradients` hands the copies' gradients on.

    Args:
        prefix: keys and values `[batch, kv_heads, prefix, head_dim]` of each layer.
    """

    def __init__(self, prefix: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.originals = self.copies = [tensor for pair in prefix for tensor in pair]
        # A compiler would lose the gradients of copies, and needs none: compiled code runs backward once.
        if not torch.compiler.is_compiling():
            self.copies = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.originals]
        pairs = zip(self.copies[::2], self.copies[1::2])
        super().__init__(layers=[PrefixLayer(keys, values) for keys, values in pairs])

    def pass_gradients(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the first layer's input unchanged. Backward gets here after all layers, and then fills in the prefix."""
        if self.copies is self.originals:
            return hidden_states
        return PrefixGradients.apply(hidden_states, self.copies, *self.originals)


class PrefixGradients(torch.autograd.Function):
    """The identity. Its backward hands the gradients that the copies have collected over to the originals."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, copies: list[torch.Tensor], *originals: torch.Tensor
    ) -> torch.Tensor:
        ctx.copies = copies
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = [copied.grad for copied in ctx.copies]
        for copied in ctx.copies:
            copied.grad = None
        return gradient, None, *gradients


class PrefixTuningMixin:
    """What every ChatGLM model does about a prefix."""

    # Attributes of the model that this is mixed into.
    config: Any
    config_class: Any
    base_model: Any
    training: bool
    get_input_embeddings: Callable[[], nn.Embedding]

    @classmethod
    def check_stored_prefix(cls, path: Any = None, *args: Any, config: Any = None, **kwargs: Any) -> None:
        # On its own, the library would load part of such a prefix, or name the shapes that differ but not the setting.
        path = path or kwargs.get("pretrained_model_name_or_path") or ""
        asked = {name: kwargs[name] for name in ("pre_seq_len", "prefix_projection") if name in kwargs}
        if not os.path.isdir(path) or kwargs.get("ignore_mismatched_sizes"):
            return
        if not hasattr(config, "pre_seq_len"):
            config = cls.config_class.from_pretrained(config or path, subfolder=kwargs.get("subfolder") or "", **asked)
        # CODEPATH: checkpoints with a P-tuning prefix; no published base model has one.
        if config.pre_seq_len is not None:
            compare_stored_prefix(config, Path(path, kwargs.get("subfolder") or ""))

    def freeze_base_model(self) -> None:
        """With a prefix, take the gradient off everything else; a head on top of the model keeps its own."""
        if (prefix_encoder := self.base_model.prefix_encoder) is not None:
            self.base_model.requires_grad_(False)
            prefix_encoder.requires_grad_(True)

    def load_prefix_encoder(self, path: str | os.PathLike) -> None:
        """Give the model a trained prefix of P-tuning v2, in place of the one it has; all else is frozen.

        `pre_seq_len` and `prefix_projection` follow from the weights. A conversation starts its cache anew.

        Args:
            path: a file (`.safetensors`, PyTorch's `.bin`, or an index of shards) or a folder as `save_prefix_encoder`,
                `save_pretrained` or the library's Trainer write it. Of a whole model, the prefix is taken.

        Raises:
            FileNotFoundError: if there is no such file or folder, or no weights in the folder.
            ValueError: if there is no prefix in it, or it is incomplete or of another model. Nothing is changed then.
        """
        encoder = make_prefix_encoder(self.config, find_prefix(Path(path)))
        # An embedding that is offloaded is on the meta device until it is used.
        device = self.get_input_embeddings().weight.device
        encoder.to("cpu" if device.type == "meta" else device).train(self.training)
        self.base_model.prefix_encoder = encoder
        self.config.pre_seq_len = encoder.pre_seq_len
        self.config.prefix_projection = encoder.prefix_projection
        self.freeze_base_model()

    def save_prefix_encoder(self, path: str | os.PathLike) -> Path:
        """Save the prefix alone, in float32 and under its published names (`transformer.prefix_encoder.*`).

        A different file of that name becomes `NAME.bak`, or `NAME.bak.1`, ... if there is one.

        Args:
            path: a name that ends in `.safetensors` or `.bin` (PyTorch's format), or else a folder, which is made and
                gets `prefix_encoder.safetensors`.

        Returns:
            The file.

        Raises:
            ValueError: if the model has no prefix, or a file is where the folder should be.
        """
        if (encoder := self.base_model.prefix_encoder) is None:
            raise ValueError("This model has no prefix to save. Load it with `pre_seq_len=128`, say, and train it.")
        with ExitStack() as loaded:
            for module in encoder.modules():
                loaded.enter_context(align_module_device(module))
            weights = {f"transformer.{PREFIX_KEY}{name}": weight for name, weight in encoder.named_parameters()}
            return write_prefix(weights, Path(path))


class PrefixModelMixin:
    """How the model below the heads uses a prefix."""

    # Attributes of the model that this is mixed into.
    config: Any
    encoder: Any
    prefix_encoder: Any
    gradient_checkpointing: bool
    training: bool

    @property
    def pre_seq_len(self) -> int | None:
        """How many virtual tokens the prefix has, if there is one."""
        return self.config.pre_seq_len

    def get_prompt(
        self, batch_size: int, device: torch.device | str, dtype: torch.dtype = torch.float16
    ) -> tuple[torch.Tensor, ...]:
        """The prefix in the published form: for each layer keys and values, `[2, prefix, batch, kv_heads, head_dim]`.

        Raises:
            ValueError: if the model has no prefix.
        """
        if self.prefix_encoder is None:
            raise ValueError(
                "This model has no prefix. Load it with `pre_seq_len=128`, say, or load a trained prefix."
            )
        prefix = self.prefix_encoder(batch_size, torch.device(device))
        return tuple(torch.stack(states).permute(0, 3, 1, 2, 4).to(dtype) for states in prefix)

    def make_prefix(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values `[batch, kv_heads, prefix, head_dim]` of each layer, on the device where that layer is."""
        prefix = []
        for layer, states in zip(self.encoder.layers, self.prefix_encoder(batch_size, device)):
            weight = layer.input_layernorm.weight
            # An offloaded layer is on the meta device and does not tell where it will be computed.
            layer_device = device if weight.is_meta else weight.device
            prefix.append((states[0].to(layer_device, dtype), states[1].to(layer_device, dtype)))
        return prefix

    def put_prefix(self, cache: Cache, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Put the prefix into an empty cache."""
        # Fewer layers while the first of them draft alone (`assistant_early_exit`).
        layers = range(self.config.num_hidden_layers)
        for layer_idx, (keys, values) in zip(layers, self.make_prefix(batch_size, dtype, device)):
            cache.update(keys, values, layer_idx)
        if cache.is_compileable:
            cache.holds_prefix, cache.reset = True, PrefixReset(cache)

    def add_prefix(
        self, past_key_values: Cache | None, inputs_embeds: torch.Tensor
    ) -> tuple[Cache, PrefixCache | None]:
        """Put the prefix into a cache that holds nothing yet, making the cache if there is none.

        Returns:
            The cache, and once more where gradient checkpointing needs a [`PrefixCache`].

        Raises:
            ValueError: if layers that are computed twice should continue a cache.
        """
        batch_size, dtype, device = inputs_embeds.shape[0], inputs_embeds.dtype, inputs_embeds.device
        is_checkpointed = self.gradient_checkpointing and self.training
        if not lacks_prefix(past_key_values):
            if is_checkpointed:
                raise ValueError(
                    "Gradient checkpointing computes layers twice, so a cache with a P-tuning prefix (`pre_seq_len`) "
                    "cannot be continued: leave `past_key_values` out, or call `gradient_checkpointing_disable`."
                )
            return past_key_values, None
        if is_checkpointed:
            prefix_cache = PrefixCache(self.make_prefix(batch_size, dtype, device))
            return prefix_cache, prefix_cache
        past_key_values = DynamicCache() if past_key_values is None else past_key_values
        self.put_prefix(past_key_values, batch_size, dtype, device)
        return past_key_values, None


class PrefixGenerationMixin:
    """How `generate` gets along with a prefix, which the library would take for tokens."""

    # Attributes of the model that this is mixed into.
    config: Any
    transformer: Any
    get_input_embeddings: Callable[[], nn.Embedding]
    _input_device: Callable[[], torch.device]

    def count_new_tokens(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache,
        next_sequence_length: int | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> int | None:
        """How many ids are not in the cache yet. The library counts the prefix among the tokens that are."""
        is_static = past_key_values.is_compileable
        # A static cache counts on the device; asking it at every step would make the processor wait each time.
        if is_static and not is_first_iteration and past_key_values.is_initialized and next_sequence_length == 1:
            return next_sequence_length
        if is_static and lacks_prefix(past_key_values):
            # The mask of a static cache is made ahead of the forward pass.
            dtype = self.get_input_embeddings().weight.dtype
            self.transformer.put_prefix(past_key_values, len(input_ids), dtype, self._input_device())
        length = int(past_key_values.get_seq_length())
        num_cached = length - self.config.pre_seq_len
        if length > 0 > num_cached:
            # The library crops the cache of an assistant to the length of its text.
            past_key_values.crop(-length)
        if attention_mask is None and next_sequence_length is None:
            return None  # A part of a prompt, which comes without what is before it.
        seen = input_ids.shape[1] if attention_mask is None else attention_mask.shape[-1]
        return seen - max(num_cached, 0)


__all__ = [
    "PrefixCache",
    "PrefixEncoder",
    "PrefixGenerationMixin",
    "PrefixModelMixin",
    "PrefixTuningMixin",
    "find_prefix",
    "lacks_prefix",
    "make_prefix_encoder",
]
