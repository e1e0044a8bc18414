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
"""What a reused cache of a conversation is tied to.

What is unusual here:

- A cache remembers which tokens it holds, and the state of the model that computed them: weights, adapters, dtypes and
  settings. Only the common beginning with a new prompt is used, and nothing at all if the model has changed.
- A state is known by a digest of samples. To compare all weights in every turn would cost more than the cache saves.
"""

import hashlib
import itertools
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer


# How many numbers of each weight `describe_state` looks at, and which attributes of a module it knows already.
NUM_SAMPLES = 256
MODULE_ATTRIBUTES = vars(nn.Module()).keys() - {"training"}


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor itself, or the tensors inside if it is of a subclass such as `DTensor`."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for part in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
        yield from plain_tensors(part) if isinstance(part, torch.Tensor) else ()


def sample_weight(tensor: torch.Tensor) -> torch.Tensor:
    """Up to `NUM_SAMPLES` numbers from all over a tensor, `[samples]`, without a copy of the rest."""
    step = max((tensor.numel() - 1) // (NUM_SAMPLES - 1), 1)
    return tensor.detach().as_strided((min(tensor.numel(), NUM_SAMPLES),), (step,))


def describe_settings(owner: Any) -> list[tuple[str, Any]]:
    """Attributes that are numbers, texts or containers. PEFT keeps there which adapter is active, scaled or merged."""
    kinds = (bool, int, float, str, list, tuple, set, dict)  # Not their subclasses, which may hold whole weights.
    return [pair for pair in vars(owner).items() if type(pair[1]) in kinds and pair[0] not in MODULE_ATTRIBUTES]


def describe_state(model: nn.Module, device_type: str) -> str | None:
    """A digest of everything besides the tokens that a cache depends on: weights, adapters, dtypes and settings.

    A weight is known by its place in memory, by torch's count of its changes and by some of its numbers. The count
    alone is not enough, as PEFT's merging and `model.half()` bypass it. A few numbers changed by `.data` may be missed.

    Returns:
        None if some weights are offloaded, because there is nothing to look at.
    """
    tensors = [part for tensor in (*model.parameters(), *model.buffers()) for part in plain_tensors(tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return None
    samples = defaultdict(list)
    for tensor in tensors:
        samples[tensor.device, tensor.dtype].append(sample_weight(tensor))
    state = (
        [(part.data_ptr(), part.shape, None if part.is_inference() else part._version) for part in tensors],
        [(kind, torch.cat(parts).view(torch.uint8).cpu().numpy().tobytes()) for kind, parts in samples.items()],
        [(type(module).__qualname__, describe_settings(module)) for module in model.modules()],
        describe_settings(model.config),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
    )
    return hashlib.sha256(repr(state).encode()).hexdigest()


class ConversationCache(DynamicCache):
    """A cache that knows its tokens and the state of the model that computed them.

    `token_ids` are its first tokens; it may hold more. In the places of a picture they are not ids, but a name that tells
    it from other pictures. Copies and pickles of it work.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layers: list[Any]
        self.token_ids: list[Any] = []
        self.model_state: str | None = None
        # How many more places than positions a picture takes, for those who continue the cache by hand.
        self.picture_surplus: torch.Tensor | None = None
        # A prefix of P-tuning v2, which comes before all tokens.
        self.prefix_length = 0
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())

    def get_num_tokens(self) -> int:
        """How many tokens every layer holds: a forward pass that was interrupted leaves some layers ahead of others."""
        tensors = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
        lengths = [0 if tensor is None or tensor.numel() == 0 else tensor.shape[-2] for tensor in tensors]
        return max(min(lengths, default=0) - self.prefix_length, 0)

    def reset(self) -> None:
        self.token_ids = []
        self.layers = [DynamicLayer() for _ in self.layers]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.token_ids = self.token_ids[: self.get_num_tokens()]

    def keep_common_prefix(self, token_ids: list[Any]) -> None:
        """Drop everything from the first token on that differs from `token_ids`, and always the last one of them."""
        pairs = zip(self.token_ids[: self.get_num_tokens()], token_ids[:-1])
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if length == 0:
            return self.reset()
        self.token_ids = self.token_ids[:length]
        for layer in self.layers:
            layer.keys = layer.keys[..., : self.prefix_length + length, :]
            layer.values = layer.values[..., : self.prefix_length + length, :]

    @contextmanager
    def turn(self, model: Any, token_ids: list[Any], is_continued: bool) -> Iterator[None]:
        """Keep what applies to the prompt `token_ids`, and let nobody else write until the answer is there.

        Raises:
            ValueError: if another answer is being written.
        """
        model_state = describe_state(model, model._input_device().type)
        if not self.lock.acquire(blocking=False):
            raise ValueError(
                "`past_key_values` belongs to a call of `chat` or to a stream that has not ended. Wait for the call, "
                "exhaust or close the stream, or use one cache for each thread."
            )
        try:
            if model_state is None or model_state != self.model_state:
                self.token_ids = []
                self.layers = DynamicCache(config=model.config).layers
                self.prefix_length = model.config.pre_seq_len or 0
                self.model_state = model_state
            self.keep_common_prefix(token_ids if is_continued else [])
            self.token_ids, self.picture_surplus = token_ids, None
            yield
        finally:
            self.lock.release()


__all__ = ["ConversationCache", "describe_state"]
