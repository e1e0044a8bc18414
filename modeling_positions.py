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

- ChatGLM-6B is a prefix language model. What stands before `<sop>` sees itself both ways. Its tokens have two
  positions, in the text and in the answer, and both are read off the ids.
- The tokenizer of ChatGLM-6B returns a mask of its own kind, in which true means hidden.
- Samples that are packed into one row are told apart by positions that start again.
- A mask never hides everything from a query: padding positions get some attention instead of NaN.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging


logger = logging.get_logger(__name__)


def reduce_published_mask(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of ChatGLM-6B's tokenizer, bool `[batch, 1, seq, seq]`, true = hidden, as `[batch, seq]`, 1 = real."""
    if attention_mask is None or attention_mask.ndim == 2 or attention_mask.dtype != torch.bool:
        return attention_mask
    return (~attention_mask).any(dim=-2)[:, 0].long()


def count_positions(
    attention_mask: torch.Tensor | None, seq_len: int, num_cached: int | torch.Tensor, device: torch.device
) -> torch.LongTensor:
    """Positions `[batch or 1, seq]` of a causal model: real tokens count from 0, padding is 0.

    Args:
        attention_mask: `[batch, cached + seq]`, 1 for real tokens; masks of other forms tell nothing here.
        seq_len: the number of new tokens.
        num_cached: how many tokens the cache holds.
        device: where the positions are needed.
    """
    if attention_mask is not None and attention_mask.ndim == 2:
        positions = attention_mask.long().cumsum(-1) - 1
        return positions.masked_fill(attention_mask == 0, 0)[:, -seq_len:]
    return (torch.arange(seq_len, device=device) + num_cached).unsqueeze(0)


def prefix_lm_positions(
    config: PreTrainedConfig, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Positions and context of ChatGLM-6B (GLM, https://arxiv.org/abs/2103.10360), read off the ids.

    The context ends where the first `<sop>` stands. The tokens from there on have the position of the mask token that
    they fill, the first `[gMASK]` or else the first `[MASK]`, and count 1, 2, 3, ... in the block. A row without
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
    has_gmask, gmask = first_column(config.gmask_token_id)
    has_mask, mask = first_column(config.mask_token_id)
    is_answer = has_start & is_real & (columns >= start)
    blank = torch.where(has_gmask, gmask, torch.where(has_mask, mask, (start - 1).clamp(min=0)))
    blank_position = index.gather(1, blank)
    token_types = (has_start & is_real & (columns < start)).long()
    # CODEPATH: no published checkpoint has one-dimensional positions; there `[gMASK]` lets them count on.
    if not config.position_encoding_2d:
        return torch.where(is_answer & ~has_gmask, blank_position, index) * is_real, token_types
    position = torch.where(is_answer, blank_position, index)
    block_position = torch.where(is_answer, columns - start + 1, 0)
    return torch.stack((position, block_position), dim=1), token_types


def make_prefix_lm_inputs(
    config: PreTrainedConfig,
    input_ids: torch.LongTensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    token_type_ids: torch.LongTensor | None,
    is_first_step: bool,
) -> tuple[torch.LongTensor | None, torch.LongTensor | None]:
    """Fill in positions and token types of ChatGLM-6B, as far as ids or the other of the two tell them."""
    if position_ids is not None and token_type_ids is not None:
        return position_ids, token_type_ids
    if input_ids is not None and is_first_step:
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        found_position_ids, found_token_type_ids = prefix_lm_positions(config, input_ids, mask)
        position_ids = found_position_ids if position_ids is None else position_ids
        token_type_ids = found_token_type_ids if token_type_ids is None else token_type_ids
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


def make_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.LongTensor,
    token_type_ids: torch.LongTensor | None,
    is_first_step: bool,
) -> Any:
    """The one mask of a forward pass: causal, and for the context of ChatGLM-6B bidirectional."""
    block_sequence_ids = None
    # CODEPATH: chatglm-6b, whose context is in the first step as a whole; whatever follows sees all of it.
    if config.prefix_lm and is_first_step and token_type_ids is not None:
        block_sequence_ids = torch.where(token_type_ids == 1, 0, -1)
        # CODEPATH: chatglm-6b with a P-tuning prefix, which everything sees because it comes first.
        if config.pre_seq_len is not None:
            block_sequence_ids = F.pad(block_sequence_ids, (config.pre_seq_len, 0), value=-1)
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        # CODEPATH: chatglm-6b; positions tell packed sequences apart, but its own stand still and come in two rows.
        position_ids=None if config.prefix_lm else position_ids,
        block_sequence_ids=block_sequence_ids,
    )


__all__ = [
    "count_positions",
    "make_mask",
    "make_prefix_lm_inputs",
    "prefix_lm_positions",
    "reduce_published_mask",
    "unmask_empty_rows",
]
