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
"""Where does a picture stand in the text? Rows of ids with pictures, and what they are computed from.

What is unusual here:

- Ids hold three tokens for a picture, begin, placeholder and end, and the vectors of the picture take the places of all
  three: `length` ids become `length + N - 1` places. A processor may have written the placeholder N times already; both
  forms are taken.
- All N vectors between begin and end have one position, so the text behind counts as if the picture were one token. A
  cache is therefore longer than its positions; it is told how much longer (`picture_surplus`), for those who continue it
  by hand without `position_ids`.
- The placeholder has the id of padding and of an end token. What is a picture is found by its begin and its end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_vision import VisionSettings
from .generation_published import unpack_encoding


@dataclass(frozen=True)
class PictureRows:
    """Where the places of rows with pictures come from, each tensor `[batch, places]`."""

    # The columns of the ids; -1 is padding that makes rows with and without a picture equally long.
    columns: torch.Tensor
    # What the picture's vectors take, its begin and end included.
    is_picture: torch.Tensor
    # The vectors behind the first of the N, at which positions stand still.
    is_surplus: torch.Tensor

    def spread(self, values: torch.Tensor, padding: int, patches: int | None = None) -> torch.Tensor:
        """Values `[batch, length]` of the ids, or of them and what came before, at the places.

        Args:
            values: of which the last are those of the ids.
            padding: for places that are padding.
            patches: for the N places of a picture's vectors; the placeholder's value if there is none.
        """
        length = self.length
        before, values = values[:, :-length], values[:, -length:]
        spread = values.gather(1, self.columns.clamp(min=0).to(values.device))
        spread = spread.masked_fill((self.columns < 0).to(values.device), padding)
        if patches is not None:
            is_patch = self.is_picture & self.is_picture.roll(1, 1) & self.is_picture.roll(-1, 1)
            spread = spread.masked_fill(is_patch.to(values.device), patches)
        return torch.cat((before, spread), dim=1)

    @property
    def length(self) -> int:
        """How many ids there were in a row."""
        return int(self.columns.max()) + 1

    @property
    def num_pictures(self) -> int:
        return int(self.is_picture.any(1).sum())


def find_picture(ids: list[int], config: PreTrainedConfig, num_vectors: int) -> tuple[int, int] | None:
    """The columns of a picture's begin and end in one row, with one placeholder or N between them.

    Raises:
        ValueError: for a second picture, which the model was not trained for.
    """
    found = [
        (begin, end)
        for begin, token_id in enumerate(ids)
        if token_id == config.boi_token_id
        for end in sorted({begin + 2, begin + num_vectors + 1})
        if end < len(ids) and ids[end] == config.eoi_token_id
    ]
    if len(found) > 1:
        raise ValueError(f"A conversation may hold one picture, and a row of the ids holds {len(found)}.")
    return found[0] if found else None


def lay_out_pictures(config: PreTrainedConfig, input_ids: torch.Tensor) -> PictureRows:
    """Make room for the pictures of ids `[batch, length]`; rows that stay shorter are padded on the left."""
    num_vectors = VisionSettings.from_dict(config.vision_config).num_patch_vectors
    rows, spans = [], []
    for ids in input_ids.tolist():
        columns, span = list(range(len(ids))), find_picture(ids, config, num_vectors)
        if span is not None:
            begin, end = span
            if end == begin + 2:
                columns[begin + 1 : end] = [begin + 1] * num_vectors
            span = (begin, begin + num_vectors + 1)
        rows.append(columns)
        spans.append(span)
    num_places = max(len(columns) for columns in rows)
    is_picture = torch.zeros(len(rows), num_places, dtype=torch.bool)
    is_surplus = is_picture.clone()
    for row, (columns, span) in enumerate(zip(rows, spans)):
        num_padding = num_places - len(columns)
        columns[:0] = [-1] * num_padding
        if span is not None:
            begin, end = (column + num_padding for column in span)
            is_picture[row, begin : end + 1] = True
            is_surplus[row, begin + 2 : end] = True
    tensors = (torch.tensor(rows), is_picture, is_surplus)
    return PictureRows(*(tensor.to(input_ids.device) for tensor in tensors))


def expand_mask(
    rows: PictureRows, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, num_cached: int = 0
) -> torch.Tensor:
    """The mask `[batch, cached + places]` for one of the ids, `[batch, cached + length]`, or for none.

    Raises:
        ValueError: for a mask of another form, which does not tell where a picture's vectors would go.
    """
    if attention_mask is None:
        attention_mask = input_ids.new_ones(len(input_ids), num_cached + input_ids.shape[1])
    if attention_mask.ndim != 2 or attention_mask.shape[1] < input_ids.shape[1]:
        raise ValueError(
            f"With pictures, `attention_mask` must be [batch, length], got {tuple(attention_mask.shape)}."
        )
    return rows.spread(attention_mask, 0)


def expand_positions(
    rows: PictureRows,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor,
    surplus_before: torch.Tensor | int = 0,
) -> torch.Tensor:
    """Positions `[batch, places]`: those of the ids, spread, or counted from the mask of the places."""
    if position_ids is not None:
        if position_ids.shape[-1] == rows.columns.shape[1]:
            return position_ids
        return rows.spread(position_ids.expand(len(rows.columns), -1), 0)
    num_before = attention_mask.shape[1] - rows.is_surplus.shape[1]
    is_counted = attention_mask.bool() & ~F.pad(rows.is_surplus, (num_before, 0)).to(attention_mask.device)
    positions = (is_counted.cumsum(-1) - 1)[:, num_before:] - surplus_before
    return positions.clamp(min=0).masked_fill(attention_mask[:, num_before:] == 0, 0)


def expand_labels(config: PreTrainedConfig, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Labels `[batch, places]` for those of the ids, `[batch, length]`, with -100 where a picture's vectors are."""
    return lay_out_pictures(config, input_ids).spread(labels, -100, patches=-100)


def reads_pictures(forward: Callable) -> Callable:
    """Let the `forward` of the decoder take pictures: `pixel_values`, or `images` as published, or `image_features`."""

    @wraps(forward)
    def wrapper(
        self: Any,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        images: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        features = self.find_features(pixel_values, images, image_features)
        surplus: torch.Tensor | int | None = getattr(past_key_values, "picture_surplus", None)
        if features is None and (surplus is None or position_ids is not None):
            return forward(self, input_ids, attention_mask, position_ids, past_key_values, *args, **kwargs)
        prefix_length = self.config.pre_seq_len or 0
        num_cached = 0 if past_key_values is None else max(past_key_values.get_seq_length() - prefix_length, 0)
        surplus = 0 if surplus is None or num_cached == 0 else surplus
        if features is None:
            given = kwargs["inputs_embeds"] if input_ids is None else input_ids
            mask = given.new_ones(given.shape[0], num_cached + given.shape[1], dtype=torch.long)
            mask = mask if attention_mask is None else attention_mask
            position_ids = (mask.long().cumsum(-1) - 1 - surplus).clamp(min=0)[:, -given.shape[1] :]
            return forward(self, input_ids, attention_mask, position_ids, past_key_values, *args, **kwargs)
        if input_ids is None or kwargs.pop("inputs_embeds", None) is not None:
            raise ValueError("Pictures go with `input_ids`, which say where they stand, and not with `inputs_embeds`.")
        rows = lay_out_pictures(self.config, input_ids)
        attention_mask = expand_mask(rows, input_ids, attention_mask, num_cached)
        position_ids = expand_positions(rows, position_ids, attention_mask, surplus)
        embeds = self.embed_with_pictures(rows.spread(input_ids, 0), rows, features)
        outputs = forward(
            self, None, attention_mask, position_ids, past_key_values, *args, inputs_embeds=embeds, **kwargs
        )
        if outputs.past_key_values is not None:
            outputs.past_key_values.picture_surplus = rows.is_surplus.sum(1, keepdim=True) + surplus
        return outputs

    return wrapper


class PictureModelMixin:
    """The part of the decoder that has eyes, if it has any."""

    config: Any
    base_model: Any
    get_input_embeddings: Callable[..., Any]

    @capture_outputs(tie_last_hidden_states=False)
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """What the eyes make of pictures, `[pictures, 3, image_size, image_size]`.

        Returns:
            `pooler_output`, the vectors as the decoder reads them, `[pictures, N + 2, hidden]`, begin and end included, and
            `last_hidden_state`, the tower's, `[pictures, 1 + patches, width]`; with `output_hidden_states` and
            `output_attentions` those of the tower; with `return_dict=False` a tuple.

        Raises:
            ValueError: if this model sees no pictures, or for pixels of another shape than its own.
        """
        if self.base_model.vision is None:
            raise ValueError(
                "This model reads text alone: its config.json has no `vision_config`, as that of GLM-4V-9B has."
            )
        return self.base_model.vision(pixel_values)

    def find_features(
        self, pixel_values: torch.Tensor | None, images: torch.Tensor | None, image_features: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The vectors of the pictures that were given under one of their names, or `None`."""
        given = [value for value in (pixel_values, images, image_features) if value is not None]
        if not given:
            return None
        if len(given) > 1:
            raise ValueError("Give pictures once: `images` and `pixel_values` are two names of one argument.")
        return (
            image_features
            if image_features is not None
            else self.get_image_features(given[0], return_dict=True).pooler_output
        )

    def embed_with_pictures(self, input_ids: torch.Tensor, rows: PictureRows, features: torch.Tensor) -> torch.Tensor:
        """Embeddings `[batch, places, hidden]` with the pictures' vectors where they stand.

        Raises:
            ValueError: if there are more pictures than rows that have room for one, or fewer.
        """
        if rows.num_pictures != len(features):
            raise ValueError(
                f"{len(features)} pictures were given, and {rows.num_pictures} rows of the ids have room for one: begin, "
                f"placeholder, end ({self.config.boi_token_id}, ..., {self.config.eoi_token_id})."
            )
        embeds = self.get_input_embeddings()(input_ids)
        is_picture = rows.is_picture.to(embeds.device)[..., None]
        return embeds.masked_scatter(is_picture, features.to(embeds.device, embeds.dtype))


class PictureGenerationMixin(PictureModelMixin, GenerationMixin):
    """`generate` with pictures."""

    _check_prompt: Callable[..., None]
    _setting: Callable[..., Any]

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate; see [`ChatGLMGenerationMixin.generate`]. `images` or `pixel_values` hold a picture for each row
        whose ids have room for one, with one placeholder or with N.

        `max_length` counts the ids as they were given, not the vectors of pictures, and those are what is returned.
        """
        inputs, kwargs = unpack_encoding(inputs, kwargs)
        given = [kwargs.pop(name, None) for name in ("pixel_values", "images", "image_features")]
        if all(value is None for value in given):
            return super().generate(inputs, generation_config, *args, **kwargs)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("Pictures go with `input_ids`, which say where they stand, and not with `inputs_embeds`.")
        with torch.no_grad():
            features = self.find_features(*given)
        rows = lay_out_pictures(self.config, input_ids)
        num_more = rows.columns.shape[1] - input_ids.shape[1]
        mask = expand_mask(rows, input_ids, kwargs.pop("attention_mask", None))
        self._check_prompt(input_ids)
        for name in ("max_length", "min_length"):
            length = self._setting(name, kwargs, generation_config)
            if length and self._setting(name.replace("_", "_new_", 1) + "s", kwargs, generation_config) is None:
                kwargs[name] = length + num_more
        outputs = super().generate(
            rows.spread(input_ids, 0 if self.config.pad_token_id is None else self.config.pad_token_id),
            generation_config,
            *args,
            attention_mask=mask,
            position_ids=expand_positions(rows, kwargs.pop("position_ids", None), mask),
            image_features=features,
            **kwargs,
        )
        is_plain = isinstance(outputs, torch.Tensor)
        sequences = outputs if is_plain else outputs.sequences
        prompts = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0).to(sequences.device)
        sequences = torch.cat((prompts, sequences[:, rows.columns.shape[1] :]), dim=1)
        if is_plain:
            return sequences
        outputs.sequences = sequences
        return outputs

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, image_features: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if image_features is None:
            return inputs
        # A picture that is in the cache does not come again; one is longer than any step behind the prompt.
        new_ids, begin = inputs.get("input_ids"), self.config.boi_token_id
        if new_ids is not None and new_ids.shape[1] >= image_features.shape[1] and begin in new_ids:
            inputs["image_features"] = image_features
        return inputs


__all__ = [
    "PictureGenerationMixin",
    "PictureModelMixin",
    "expand_labels",
    "expand_mask",
    "lay_out_pictures",
    "reads_pictures",
]
