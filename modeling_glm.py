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
"""What stands on top of the network in GLM and GLM-130B, under the names that GLM's published files have.

What is unusual here:

- The network is that of `modeling_chatglm.py`; its configuration says what is different.
- Labels are not shifted, and these classes are not on the library's list of those whose labels are.
- Choices of one row are read at once. They do not see each other, as the tokenizer's mask has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, MultipleChoiceModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple

from .configuration_chatglm import ChatGLMConfig
from .modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel, ChatGLMPreTrainedModel
from .modeling_classification import SequenceClassificationMixin


@auto_docstring(custom_intro="The language model: `generate` with what the tokenizer builds, and aligned labels.")
class GLMForConditionalGeneration(ChatGLMForConditionalGeneration):
    pass


@auto_docstring(custom_intro="Scores of choices, and what they were computed from.")
@dataclass
class GLMMultipleChoiceOutput(MultipleChoiceModelOutput):
    r"""
    loss (`torch.FloatTensor`, *optional*):
        Cross-entropy over the choices.
    logits (`torch.FloatTensor` of shape `(batch_size, num_choices)`):
        The summed log-probabilities of each choice.
    lm_logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
        What they were computed from.
    """

    lm_logits: torch.FloatTensor | None = None


@auto_docstring(custom_intro="The language model as a judge: which of several answers to a blank is the likeliest?")
class GLMForMultipleChoice(ChatGLMPreTrainedModel):
    # The loss is the mean of a batch, so Trainer must divide it by the number of batches that it accumulates.
    accepts_loss_kwargs = False
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    @can_return_tuple
    @auto_docstring(
        custom_intro="""
        Score choices, as `build_inputs_for_multiple_choice` of the tokenizer lays them out. What ends an answer is not in
        the sum, as published.
        """
    )
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        choice_ids: Sequence[Sequence[torch.Tensor]] = (),
        choice_indices: Sequence[Sequence[torch.Tensor]] = (),
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> GLMMultipleChoiceOutput:
        r"""
        choice_ids (`list[list[torch.Tensor]]`):
            For each row and choice its ids. A row may have fewer choices than others; the missing ones score lowest.
        choice_indices (`list[list[torch.Tensor]]`):
            For each row and choice the columns where they are predicted.
        """
        if not len(choice_ids) == len(choice_indices) > 0:
            raise ValueError(
                f"Give `choice_ids` and `choice_indices` for each row, got {len(choice_ids)} and {len(choice_indices)}."
            )
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
        lm_logits = self.transformer.output_layer(outputs.last_hidden_state)
        num_choices = max(map(len, choice_ids))
        rows = []
        for row_logits, ids, indices in zip(lm_logits, choice_ids, choice_indices, strict=True):
            scores = row_logits.float().log_softmax(-1)
            sums = [scores[places, one].sum() for one, places in zip(ids, indices, strict=True)]
            sums += [scores.new_tensor(torch.finfo(scores.dtype).min)] * (num_choices - len(sums))
            rows.append(torch.stack(sums))
        logits = torch.stack(rows)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.to(logits.device))
        return GLMMultipleChoiceOutput(
            loss=loss,
            logits=logits,
            lm_logits=lm_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(
    custom_intro="""
    A classifier with one hidden layer on the first token of each row, `[CLS]`. Pad on the right, where the tokenizer does.
    """
)
class GLMForSequenceClassification(SequenceClassificationMixin, ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        dropout = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.freeze_base_model()
        self.post_init()

    def classify(
        self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        pooled = torch.tanh(self.dense(self.dropout(hidden_states[:, 0])))
        return self.out_proj(self.dropout(pooled))


__all__ = [
    "GLMForConditionalGeneration",
    "GLMForMultipleChoice",
    "GLMForSequenceClassification",
    "GLMMultipleChoiceOutput",
]
