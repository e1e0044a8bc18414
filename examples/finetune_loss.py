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
"""What is the loss of a batch?

It is the library's, the mean over all learnt tokens of all batches of a step, computed where something is learnt only: a
long row of mostly questions then needs no scores for them, and scores are the largest tensor of all. They are turned into
float32 a piece at a time.

Where samples of different lengths share rows, a mean over tokens lets long answers drown short ones. `by_sample` weighs
each token with one over the learnt tokens of its sample, so that a step has the mean of its samples' own means, however
they were packed ("LongAlign", arXiv:2401.18058, section 3.2).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint


IGNORED = -100
# Positions whose scores are float32 at the same time.
PIECE = 256


def sample_weights(labels: Sequence[int], position_ids: Sequence[int]) -> list[float]:
    """One over the learnt tokens of a token's sample, or 0 where nothing is learnt; a sample begins at position 0."""
    samples, current = [], 0
    for position in position_ids:
        current += position == 0
        samples.append(current)
    counts = Counter(sample for sample, label in zip(samples, labels) if label != IGNORED)
    return [1 / counts[sample] if label != IGNORED else 0.0 for sample, label in zip(samples, labels)]


def learnt_positions(labels: torch.Tensor) -> torch.Tensor:
    """The positions whose scores are needed: those before a token that is learnt in any row."""
    return (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    loss_weights: torch.Tensor | None = None,
    smoothing: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """A `loss_function` for models of the library, which call it with what they know.

    Args:
        logits: scores at all positions, or at those of `learnt_positions(labels)` alone.
        labels: what is learnt, `[batch, seq]`, not shifted. With a prompt of PEFT it is longer than the weights.
        num_items_in_batch: what all learnt tokens of a step count together; what they count here, if not given.
        loss_weights: what each token counts; 1 unless given.
        smoothing: see `label_smoothing_factor` of `TrainingArguments`.
    """

    def loss_of_piece(scores: torch.Tensor, wanted: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(scores.float(), wanted, reduction="none", label_smoothing=smoothing)
        return (losses * counts).sum()

    weights = (labels != IGNORED).float()
    if loss_weights is not None:
        weights = pad(loss_weights, (labels.shape[1] - loss_weights.shape[1], 0))
    kept = learnt_positions(labels)
    if logits.shape[1] == labels.shape[1]:
        logits = logits[:, kept]
    labels, weights = labels[:, kept + 1].to(logits.device), weights[:, kept + 1].to(logits.device)
    pieces = list(zip(*(tensor.flatten(0, 1).split(PIECE) for tensor in (logits, labels, weights))))
    if len(pieces) == 1:
        total = loss_of_piece(*pieces[0])
    else:
        total = torch.stack([checkpoint(loss_of_piece, *piece, use_reentrant=False) for piece in pieces]).sum()
    count = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(total.device)
    return total / count.flatten()[0]


__all__ = ["IGNORED", "learnt_positions", "sample_weights", "weighted_loss"]
