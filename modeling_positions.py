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
"""Where tokens stand, and who sees whom.

What is unusual here:

- ChatGLM-6B is a prefix language model, and GLM-130B is. What stands before `<sop>` sees itself both ways. Its tokens
  have two positions, in the text and in the answer, and both are read off the ids; in GLM-130B they are one.
- The tokenizer of ChatGLM-6B returns a mask of its own kind, in which true means hidden.
- GLM reads nothing off the ids. Its masks say who sees whom, in one of three ways.
- Samples that are packed into one row are told apart by positions that start again.
- A mask never hides everything from a query: padding positions get some attention instead of NaN.
"""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.utils import logging


logger = logging.get_logger(__name__)


def reduce_published_mask(attention_mask: torch.Tensor | None, num_tokens: int | None = None) -> torch.Tensor | None:
    """The mask of ChatGLM-6B's tokenizer, bool `[batch, 1, seq, seq]`, true = hidden, as `[batch, seq]`, 1 = real.

    Programs cut a prompt that is too long on the left, and a mask of two dimensions with it; this one they leave as it
    is. So of a published mask, the last `num_tokens` positions are taken, if that is given.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 2 or attention_mask.dtype != torch.bool:
        return attention_mask
    reduced = (~attention_mask).any(dim=-2)[:, 0].long()
    return reduced if num_tokens is None else reduced[:, -num_tokens:]


def read_published_mask(config: PreTrainedConfig, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The masks of ChatGLM-6B and GLM-130B, bool `[batch, 1, seq, seq]`, true = hidden, as 1 = real or visible.

    Other masks stay as they are.
    """
    # CODEPATH: glm-130b builds masks of any form; chatglm-6b's tell what is padding, the ids where its context ends.
    if config.mask_is_whole and attention_mask is not None and attention_mask.dtype == torch.bool:
        return (~attention_mask).long() if attention_mask.ndim == 4 else attention_mask
    return reduce_published_mask(attention_mask)


def make_published_mask(
    config: PreTrainedConfig, input_ids: torch.Tensor, past_key_values: Any, padding_mask: torch.Tensor | None
) -> torch.Tensor:
    """What the published `get_masks` returns: bool, `[batch, 1, seq, cached + seq]`, true = hidden.

    Args:
        config: of the model.
        input_ids: `[batch, seq]`.
        past_key_values: a cache, or a P-tuning prefix as `get_prompt` returns it.
        padding_mask: `[batch, cached + seq]`, 1 for real tokens. Padding may see everything, as published.
    """
    num_cached = 0
    if past_key_values is not None:
        is_cache = isinstance(past_key_values, Cache)
        num_cached = past_key_values.get_seq_length() if is_cache else past_key_values[0][0].shape[0]
    seq_len = input_ids.shape[1]
    visible = torch.ones(seq_len, num_cached + seq_len, dtype=torch.bool, device=input_ids.device).tril(num_cached)
    visible = visible.expand(len(input_ids), -1, -1)
    # CODEPATH: chatglm-6b, whose context sees itself both ways.
    if config.prefix_lm:
        is_context = prefix_lm_positions(config, input_ids, None)[1] == 1
        visible = visible | F.pad(is_context, (num_cached, 0))[:, None, :]
    if padding_mask is not None:
        is_real = padding_mask.bool()
        visible = visible & is_real[:, None, :]
        if num_cached == 0:
            visible = visible | ~is_real[:, :, None]
    return ~visible[:, None]


def make_whole_mask(
    attention_mask: Any, inputs_embeds: torch.Tensor, past_key_values: Cache | None, num_cached: Any
) -> Any:
    """A mask of GLM in any of its meanings, as bool `[batch or 1, 1, seq or 1, cached + seq]`, true = visible.

    Args:
        attention_mask: one element, or one for each row: how many of the new tokens are seen by all of them, the others
            from left to right; `[batch, tokens]`, 1 for real tokens, which all see each other; or
            `[batch, 1, seq, tokens]`, 1 = visible, of which the last rows and columns count. As in the published code,
            a mask of that many elements has the first meaning whatever its form. `None` is causal and stays.
        inputs_embeds: of the new tokens, `[batch, seq, width]`.
        past_key_values: the cache. A whole mask that comes with a static one was made for it and stays.
        num_cached: how many tokens it holds. Where the mask is a number of tokens, all of them are seen.
    """
    static_cache = past_key_values if past_key_values is not None and past_key_values.is_compileable else None
    if not isinstance(attention_mask, torch.Tensor) or (static_cache is not None and attention_mask.ndim == 4):
        return attention_mask
    batch_size, seq_len = inputs_embeds.shape[:2]
    num_cached = int(num_cached)
    if attention_mask.numel() in (1, batch_size):
        columns = torch.arange(seq_len, device=attention_mask.device)
        visible = (columns <= columns[:, None]) | (columns < attention_mask.view(-1, 1, 1))
        visible = F.pad(visible, (num_cached, 0), value=True)[:, None]
    else:
        whole = attention_mask[:, None, None] if attention_mask.ndim == 2 else attention_mask
        # Of any dtype: a published mask of floats holds 0 and 1 too.
        visible = whole[..., -seq_len:, -(num_cached + seq_len) :].bool()
    visible = visible.expand(-1, -1, seq_len, -1)
    num_places = visible.shape[-1] if static_cache is None else static_cache.get_max_length()
    return F.pad(visible, (0, num_places - visible.shape[-1]))


def cut_positions(position_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first positions of `[batch, 2, tokens]` or `[batch, tokens]`, continued where there are too few."""
    num_more = num_tokens - position_ids.shape[-1]
    return continue_positions(position_ids, num_more) if num_more > 0 else position_ids[..., :num_tokens]


def cut_generation_mask(
    mask: torch.Tensor, num_tokens: int, num_new: int, config: PreTrainedConfig, past_key_values: Cache | None
) -> torch.Tensor:
    """What the last `num_new` of `num_tokens` tokens see: a part of GLM's `generation_attention_mask`.

    Args:
        mask: `[batch, 1, whole, whole]`, 1 = visible, for the context and for all of the answer.
        num_tokens: how many tokens there are so far, those in the cache included.
        num_new: how many of them come now.
        config: of the model, which may have a P-tuning prefix.
        past_key_values: the cache; a static one has more places than tokens.

    Raises:
        ValueError: if the mask ends before the tokens do.
    """
    if num_tokens > mask.shape[-1]:
        raise ValueError(
            f"`generation_attention_mask` is for {mask.shape[-1]} tokens, and token {num_tokens} is to come: generate "
            "fewer, or build the inputs with a larger `max_gen_length`."
        )
    cut = mask[..., num_tokens - num_new : num_tokens, :num_tokens]
    if past_key_values is None or not past_key_values.is_compileable:
        return cut
    prefix_length = config.pre_seq_len or 0
    cut = F.pad(cut, (prefix_length, 0), value=1)
    return F.pad(cut, (0, past_key_values.get_max_length() - cut.shape[-1]))


def is_padding_mask(attention_mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether a mask is `[batch, seq]`, 1 for real tokens; a flex attention's mask is no tensor at all."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def is_first_step(cache: Cache | None, num_new_tokens: int) -> bool:
    """Whether a cache holds no tokens yet, `num_new_tokens` being about to come."""
    if cache is None or not cache.is_initialized:
        return True
    length = cache.get_seq_length()
    if not isinstance(length, torch.Tensor):
        return length == 0
    # A static cache that was reset. It counts on the device, and neither compiled code nor a single step waits for that.
    return num_new_tokens > 1 and not torch.compiler.is_compiling() and length.item() == 0


def count_positions(
    attention_mask: torch.Tensor | None, seq_len: int, num_cached: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """Positions `[batch or 1, seq]` of a causal model: real tokens count from 0, padding is 0.

    Args:
        attention_mask: `[batch, cached + seq]`, 1 for real tokens; masks of other forms tell nothing here.
        seq_len: the number of new tokens.
        num_cached: how many tokens the cache holds.
        device: where the positions are needed.
    """
    if is_padding_mask(attention_mask):
        positions = attention_mask.long().cumsum(-1) - 1
        return positions.masked_fill(attention_mask == 0, 0)[:, -seq_len:]
    return (torch.arange(seq_len, device=device) + num_cached).unsqueeze(0)


def prefix_lm_positions(
    config: PreTrainedConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and context of ChatGLM-6B (GLM, https://arxiv.org/abs/2103.10360), read off the ids.

    The context ends where the first `<sop>` stands. The tokens from there on have the position of the mask token that
    they fill, the first `[gMASK]` or else the first `[MASK]`, and count 1, 2, 3, ... in the block. In GLM-130B that is
    the first `[MASK]`, or else the first `[sMASK]`, and behind `[gMASK]` the one position counts on. A row without
    `<sop>` has no answer yet and is read from left to right.

    Args:
        input_ids: `[batch, seq]`, from the first token on.
        attention_mask: `[batch, seq]`, 1 for real tokens.

    Returns:
        Positions, `[batch, 2, seq]` (token and block position) or `[batch, seq]` with `position_encoding_2d: false`,
        and token types, `[batch, seq]`, 1 for the context.
    """
    is_real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    index = (is_real.cumsum(-1) - 1).clamp(min=0)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)

    def first_column(token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = (input_ids == token_id) & is_real
        return found.any(-1, keepdim=True), found.int().argmax(-1, keepdim=True)

    has_start, start = first_column(config.bos_token_id)
    is_answer = has_start & is_real & (columns >= start)
    blank, is_gmask = (start - 1).clamp(min=0), torch.zeros_like(has_start)
    for token_id in reversed(config.blank_token_ids):
        is_there, column = first_column(token_id)
        blank = torch.where(is_there, column, blank)
        is_gmask = torch.where(is_there, token_id == config.gmask_token_id, is_gmask)
    blank_position = index.gather(1, blank)
    token_types = (has_start & is_real & (columns < start)).long()
    # CODEPATH: glm-130b has one-dimensional positions; there `[gMASK]` lets them count on.
    if not config.position_encoding_2d:
        return torch.where(is_answer & ~is_gmask, blank_position, index) * is_real, token_types
    position = torch.where(is_answer, blank_position, index)
    block_position = torch.where(is_answer, columns - start + 1, 0)
    return torch.stack((position, block_position), dim=1), token_types


def continue_positions(position_ids: torch.Tensor, num_new_tokens: int) -> torch.Tensor:
    """Positions `[batch, 2, seq]` or `[batch, seq]` of a prompt and of the answer that follows it."""
    count = torch.arange(1, num_new_tokens + 1, device=position_ids.device)
    new = position_ids[..., -1:] + count
    if position_ids.ndim == 3:
        # The token position stands still in an answer, and the block position counts on.
        new[:, 0] = position_ids[:, 0, -1:]
    return torch.cat((position_ids, new), dim=-1)


def recall_ids(
    cache: Cache | None,
    input_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    is_first_step: bool,
    prefix_length: int,
) -> torch.Tensor | None:
    """All ids that a cache holds with the new ones, `[batch, cached + seq]`; `None` if they are not known.

    ChatGLM-6B's positions depend on all of them. Whoever continues a cache without `position_ids`, as classifier-free
    guidance does, gets them from the cache itself, which keeps the ids until positions are given.
    """
    known_ids = input_ids if is_first_step else None
    if cache is None or cache.is_compileable:
        return known_ids
    held_ids = getattr(cache, "held_ids", None)
    if not is_first_step and held_ids is not None and input_ids is not None:
        held_shape = (input_ids.shape[0], cache.get_seq_length() - prefix_length)
        known_ids = torch.cat((held_ids, input_ids), dim=1) if held_ids.shape == held_shape else None
    cache.held_ids = known_ids if position_ids is None else None
    return known_ids


def refuse_packing(position_ids: torch.Tensor) -> None:
    """Raise a `ValueError` for positions `[batch, 2, seq]` of samples that are packed into one row."""
    if position_ids.ndim != 3:
        return
    in_answer = position_ids[:, 1] > 0
    if (in_answer[:, :-1] & ~in_answer[:, 1:]).any():
        raise ValueError(
            "`position_ids` return to a context after an answer. Samples that are packed into one row would see each "
            "other in ChatGLM-6B: put each into a row of its own, and mask padding with `attention_mask`."
        )


def make_prefix_lm_inputs(
    config: PreTrainedConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    past_key_values: Cache | None,
    is_first_step: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fill in positions and token types of ChatGLM-6B, as far as ids or the other of the two tell them.

    Args:
        config: of the model.
        input_ids: of the new tokens, `[batch, seq]`, if they are given.
        attention_mask: `[batch, cached + seq]`; masks of other forms are not looked at.
        position_ids: of the new tokens, if they are given.
        token_type_ids: of the new tokens, 1 for the context, if they are given.
        past_key_values: the cache, before a prefix is put there.
        is_first_step: whether the new tokens are all there are.

    Raises:
        ValueError: if nothing tells the positions, if they have a row too many, or are those of packed samples.
    """
    known_ids = recall_ids(past_key_values, input_ids, position_ids, is_first_step, config.pre_seq_len or 0)
    # CODEPATH: no published checkpoint has one-dimensional positions, and the tokenizer does not know of them.
    if position_ids is not None and position_ids.ndim == 3 and not config.position_encoding_2d:
        if known_ids is None:
            raise ValueError(
                "`position_ids` have two rows, but this model has `position_encoding_2d: false`. Give one row, of shape "
                "[batch, seq]."
            )
        position_ids = None
    if is_first_step and attention_mask is None and position_ids is not None and not torch.compiler.is_compiling():
        refuse_packing(position_ids)
    if position_ids is not None and token_type_ids is not None:
        return position_ids, token_type_ids
    if known_ids is not None and input_ids is not None:
        seq_len = input_ids.shape[1]
        mask = attention_mask if is_padding_mask(attention_mask) else None
        found_position_ids, found_token_type_ids = prefix_lm_positions(config, known_ids, mask)
        position_ids = found_position_ids[..., -seq_len:] if position_ids is None else position_ids
        token_type_ids = found_token_type_ids[..., -seq_len:] if token_type_ids is None else token_type_ids
    elif position_ids is None and not is_first_step:
        raise ValueError(
            "Give `position_ids` when a cache is continued by hand: those of ChatGLM-6B depend on tokens that are "
            "in the cache already. `generate` computes them."
        )
    elif token_type_ids is None and position_ids is not None and position_ids.ndim == 3:
        token_type_ids = (position_ids[:, 1] == 0).long()
    elif token_type_ids is None and is_first_step:
        logger.warning_once(
            "Embeddings do not tell where the context of ChatGLM-6B ends, so they are read from left to right. Give "
            "`position_ids` of shape [batch, 2, seq] as the tokenizer returns them."
        )
    return position_ids, token_type_ids


def unmask_empty_rows(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Let queries that may see nothing (padding) see everything, since a softmax over nothing is NaN.

    Args:
        attention_mask: what `create_causal_mask` returned; only 4-D tensors `[batch, 1, seq, kv_seq]` are changed.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 4 or attention_mask.shape[2] == 1:
        return attention_mask
    if attention_mask.dtype == torch.bool:
        return attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
    is_empty = (attention_mask == torch.finfo(attention_mask.dtype).min).all(dim=-1, keepdim=True)
    return attention_mask.masked_fill(is_empty, 0.0)


def make_room_for_prefix(attention_mask: Any, prefix_length: int, num_tokens: int | torch.Tensor) -> Any:
    """Let all tokens see a P-tuning prefix that a mask leaves out.

    Args:
        attention_mask: `[batch, tokens]`, `[batch, 1, seq, tokens]`, or a mask that has a place for the prefix.
        prefix_length: how many virtual tokens come before the first token.
        num_tokens: how many tokens are in the cache or new; a static cache's mask is made with the prefix.
    """
    if prefix_length == 0:
        return attention_mask
    is_given = isinstance(attention_mask, torch.Tensor) and isinstance(num_tokens, int)
    if is_padding_mask(attention_mask) or (is_given and attention_mask.shape[-1] == num_tokens):
        return F.pad(attention_mask, (prefix_length, 0), value=0 if attention_mask.is_floating_point() else 1)
    return attention_mask


def adapt_given_mask(attention_mask: torch.Tensor, dtype: torch.dtype, implementation: str | None) -> Any:
    """Bring a mask `[batch, 1, seq, kv_seq]` of the caller into the form that the attention takes.

    Args:
        attention_mask: booleans or integers, true = visible, or floats that are added to the scores.
        dtype: of the model.
        implementation: of the attention. Only SDPA takes booleans; the others add whatever they get.
    """
    if attention_mask.is_floating_point():
        # Minus infinity in a whole row would become NaN.
        return attention_mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    attention_mask = attention_mask.bool()
    if implementation == "sdpa":
        return attention_mask
    if implementation == "flex_attention":
        batch_size, _, seq_len, kv_len = attention_mask.shape

        def is_visible(
            batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            # Blocks reach beyond the ends.
            return attention_mask[batch, 0, query.clamp(max=seq_len - 1), key.clamp(max=kv_len - 1)]

        return create_block_mask(is_visible, batch_size, None, seq_len, kv_len, device=attention_mask.device)
    return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)


def count_in_samples(config: PreTrainedConfig, position_ids: torch.Tensor) -> torch.Tensor:
    """Positions `[batch or 1, seq]` by which samples that are packed into one row are told apart: they count on in each.

    Attention takes every place where positions do not count on for the border of two samples, and in a picture they stand
    still.
    """
    # CODEPATH: glm-4v-9b, where a sample begins wherever there is a 0; the others' positions count on as they are.
    if config.vision_config is None or position_ids.shape[-1] == 1:
        return position_ids
    places = torch.arange(position_ids.shape[-1], device=position_ids.device).expand_as(position_ids)
    return places - places.masked_fill(position_ids != 0, 0).cummax(-1).values


def same_sample_function(position_ids: torch.Tensor, prefix_length: int) -> Callable | None:
    """The mask function of samples that are packed into one row, or `None` if each row holds one sample.

    The library has this for models without a cache, which P-tuning always has.

    Args:
        position_ids: `[batch, seq]`; a sample begins wherever they do not count on.
        prefix_length: virtual tokens that come first and belong to all samples.
    """
    if (samples := find_packed_sequence_indices(position_ids)) is None:
        return None
    samples = F.pad(samples, (prefix_length, 0), value=-1)
    last = samples.shape[1] - 1

    def is_same_sample(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        # A static cache has places that are not filled yet; they come later and are hidden anyway.
        key_sample = samples[batch, key.clamp(max=last)]
        return (key_sample < 0) | (key_sample == samples[batch, query.clamp(max=last)])

    return is_same_sample


def make_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    is_first_step: bool,
) -> Any:
    """The one mask of a forward pass: causal, and for the context of ChatGLM-6B bidirectional.

    Args:
        config: of the model.
        inputs_embeds: `[batch, seq, width]`, of which sizes, dtype and device matter.
        attention_mask: `[batch, prefix + tokens]`, 1 for real tokens, or a whole mask `[batch, 1, seq, kv_seq]`.
        past_key_values: the cache, with the prefix.
        position_ids: `[batch, seq]` as the caller gave them, if they may tell packed samples apart.
        token_type_ids: `[batch, seq]` of ChatGLM-6B, 1 for the context.
        is_first_step: whether the new tokens are all there are.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        attention_mask = attention_mask.expand(inputs_embeds.shape[0], -1, -1, -1)
        return adapt_given_mask(attention_mask, inputs_embeds.dtype, config._attn_implementation)
    prefix_length = config.pre_seq_len or 0
    block_sequence_ids, is_same_sample = None, None
    # CODEPATH: chatglm-6b, whose context is in the first step as a whole; whatever follows sees all of it.
    if config.prefix_lm and is_first_step and token_type_ids is not None:
        block_sequence_ids = F.pad(torch.where(token_type_ids == 1, 0, -1), (prefix_length, 0), value=-1)
    # CODEPATH: chatglm2, chatglm3, glm4; the positions of chatglm-6b, glm and glm-130b stand still.
    if not config.is_bidirectional and is_first_step and attention_mask is None and position_ids is not None:
        position_ids = count_in_samples(config, position_ids.expand(inputs_embeds.shape[0], -1))
        is_same_sample = same_sample_function(position_ids, prefix_length)
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        and_mask_function=is_same_sample,
        block_sequence_ids=block_sequence_ids,
    )


__all__ = [
    "continue_positions",
    "count_in_samples",
    "count_positions",
    "cut_generation_mask",
    "cut_positions",
    "is_first_step",
    "make_mask",
    "make_prefix_lm_inputs",
    "make_published_mask",
    "make_room_for_prefix",
    "make_whole_mask",
    "prefix_lm_positions",
    "read_published_mask",
    "reduce_published_mask",
    "unmask_empty_rows",
]
