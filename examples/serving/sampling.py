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
"""How is the next token chosen, for each request its own way?

Continuous batching computes many answers in one batch. By default its sampling settings are those of the first request,
for everybody. These processors take `temperature` and `top_p` of each request, and temperature 0 as the likeliest token.
"""

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.generation import LogitsProcessorList

# Not in the library's public namespace (run with Transformers 5.17.0 and 5.23.0), which has settings of a request for temperatures
# above zero only: its greedy decoding is a choice for all requests.
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
    ContinuousBatchingTemperatureLogitsWarper,
    ContinuousBatchingTopPLogitsWarper,
)


class TemperatureOrGreedy(ContinuousBatchingTemperatureLogitsWarper):
    """Divide the scores of each row, `[rows, vocabulary]`, by its temperature; with 0, leave its best token only."""

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        temperatures = tensor_arg[: len(scores)].view(torch.float32)[:, None]
        is_greedy = temperatures == 0
        best = torch.full_like(scores, float("-inf")).scatter_(-1, scores.argmax(-1, keepdim=True), 0.0)
        return torch.where(is_greedy, best, scores / temperatures.masked_fill(is_greedy, 1.0))


class QuickTopP(ContinuousBatchingTopPLogitsWarper):
    """Top-p as the library does it, without sorting a whole vocabulary on a CPU, which takes milliseconds for each row."""

    NUM_CANDIDATES = 256

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        if scores.device.type != "cpu":
            return super().__call__(
                scores, tensor_arg
            )  # What follows looks at values, for which a GPU would be waited.
        top_p = tensor_arg[: len(scores)].view(torch.float32)[:, None]
        is_asked = top_p < 1
        if not is_asked.any():
            return scores
        best, best_ids = scores.topk(min(self.NUM_CANDIDATES, scores.shape[-1]), dim=-1)
        probabilities = (best - scores.logsumexp(dim=-1, keepdim=True)).exp()
        cumulative = probabilities.cumsum(dim=-1)
        if (is_asked & (cumulative[:, -1:] < top_p)).any():
            return super().__call__(scores, tensor_arg)  # The probability is spread over more tokens than these.
        best = best.masked_fill(cumulative - probabilities >= top_p, float("-inf"))
        kept = torch.full_like(scores, float("-inf")).scatter(-1, best_ids, best)
        return torch.where(is_asked, kept, scores)


def request_processors() -> ContinuousBatchingLogitsProcessorList:
    """Processors that take `temperature` and `top_p`, floats, of each request."""
    temperature, top_p = TemperatureLogitsWarper(1.0), TopPLogitsWarper(1.0)
    processors = ContinuousBatchingLogitsProcessorList(
        LogitsProcessorList([temperature, top_p]), per_request_processors=True
    )
    # The list has counted both, and made room for their settings.
    processors.logits_processor[:] = [TemperatureOrGreedy(temperature), QuickTopP(top_p)]
    return processors
