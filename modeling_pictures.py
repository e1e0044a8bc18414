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
- `generate` knows the places of the pictures in advance, so a prompt may come in parts, of which one ends within a picture.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .configuration_vision import VisionSettings
from .generation_published import unpack_encoding


@dataclass(frozen=True)
class PictureRows:
    """Where the places of rows with pictures come from, each tensor `[batch, places]` unless it says otherwise."""

    # The columns of the ids; -1 is padding that makes rows with and without a picture equally long.
    columns: torch.Tensor
    # What the picture's vectors take, its begin and end included.
    is_picture: torch.Tensor
    # The vectors behind the first of the N, at which positions stand still.
    is_surplus: torch.Tensor
    # The place where the picture of each row begins, `[batch]`; -1 in a row without one.
    begins: torch.Tensor
    # How many ids there were in a row.
    length: int
    num_pictures: int
    # The place behind the last picture; 0 if there is none.
    end: int

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

    def check_number(self, features: torch.Tensor, config: PreTrainedConfig) -> None:
        """Raise a `ValueError` if there are more pictures than rows that have room for one, or fewer."""
        if self.num_pictures != len(features):
            raise ValueError(
                f"{len(features)} pictures were given, and {self.num_pictures} rows of the ids have room for one: begin, "
                f"placeholder, end ({config.boi_token_id}, ..., {config.eoi_token_id})."
            )


class PlacedPictures:
    """The pictures of a prompt with their places in it, so that `generate` finds them in any part of it.

    Args:
        features: what the decoder reads, `[pictures, N + 2, hidden]`.
        begins: the place of each row's picture, `[batch]`; -1 for none.
    """

    def __init__(self, features: torch.Tensor, begins: torch.Tensor) -> None:
        self.features, self.begins = features, begins
        # On the host, as it is asked for at every step.
        self.end = int(begins.max()) + features.shape[1]

    def put_into(self, embeds: torch.Tensor, first_place: int) -> torch.Tensor:
        """Embeddings `[rows, places, hidden]` from a place on, with the pictures' vectors where they stand.

        Args:
            embeds: of the rows of the prompt, or of several copies of each, one after the other, as beams have them.
            first_place: of which the embeddings are the first.
        """
        num_copies = len(embeds) // len(self.begins)
        begins, features = self.begins.to(embeds.device), self.features.to(embeds.device, embeds.dtype)
        numbers = ((begins >= 0).cumsum(0) - 1).clamp(min=0).repeat_interleave(num_copies)[:, None]
        begins = begins.repeat_interleave(num_copies)[:, None]
        offsets = torch.arange(first_place, first_place + embeds.shape[1], device=embeds.device) - begins
        is_picture = (begins >= 0) & (offsets >= 0) & (offsets < features.shape[1])
        vectors = features[numbers, offsets.clamp(0, features.shape[1] - 1)]
        return torch.where(is_picture[..., None], vectors, embeds)


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
    is_surplus, begins, end_of_all = is_picture.clone(), torch.full((len(rows),), -1), 0
    for row, (columns, span) in enumerate(zip(rows, spans)):
        num_padding = num_places - len(columns)
        columns[:0] = [-1] * num_padding
        if span is not None:
            begin, end = (column + num_padding for column in span)
            is_picture[row, begin : end + 1] = True
            is_surplus[row, begin + 2 : end] = True
            begins[row], end_of_all = begin, max(end_of_all, end + 1)
    device = input_ids.device
    return PictureRows(
        columns=torch.tensor(rows, device=device),
        is_picture=is_picture.to(device),
        is_surplus=is_surplus.to(device),
        begins=begins.to(device),
        length=input_ids.shape[1],
        num_pictures=len(spans) - spans.count(None),
        end=end_of_all,
    )


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
        self.check_eyes()
        return self.base_model.vision(pixel_values)

    def check_eyes(self) -> None:
        """Raise a `ValueError` if this model sees no pictures."""
        if self.base_model.vision is None:
            raise ValueError(
                "This model reads text alone: its config.json has no `vision_config`, as that of GLM-4V-9B has."
            )

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
        rows.check_number(features, self.config)
        return PlacedPictures(features, rows.begins).put_into(self.get_input_embeddings()(input_ids), 0)


class PictureGenerationMixin(PictureModelMixin, GenerationMixin):
    """`generate` with pictures."""

    _check_prompt: Callable[..., None]
    _setting: Callable[..., Any]

    def generate(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate; see [`ChatGLMGenerationMixin.generate`]. `images` or `pixel_values` hold a picture for each row
        whose ids have room for one, with one placeholder or with N.

        `max_length` counts the ids as they were given, not the vectors of pictures, and those are what is returned. A
        picture that `past_key_values` hold already is not looked at again, and need not be given.

        Raises:
            ValueError: for more pictures than room for them, or fewer, and for any if this model reads text alone.
        """
        inputs, kwargs = unpack_encoding(inputs, kwargs)
        given = [kwargs.pop(name, None) for name in ("pixel_values", "images", "image_features")]
        is_given = any(value is not None for value in given)
        # An assistant is handed what its model was given, and drafts from the placeholders.
        is_assistant = kwargs.pop("pictures", None) is not None
        input_ids: Any = kwargs.get("input_ids") if inputs is None else inputs
        is_embedded = input_ids is None or kwargs.get("inputs_embeds") is not None
        if is_given and is_embedded:
            raise ValueError("Pictures go with `input_ids`, which say where they stand, and not with `inputs_embeds`.")
        if is_given:
            self.check_eyes()
        # CODEPATH: glm-4v-9b has eyes; the others read text alone.
        if is_embedded or is_assistant or self.base_model.vision is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        self._check_prompt(input_ids)
        rows = lay_out_pictures(self.config, input_ids)
        surplus = getattr(kwargs.get("past_key_values"), "picture_surplus", None)
        if rows.num_pictures == 0 and surplus is None and not is_given:
            return super().generate(inputs, generation_config, *args, **kwargs)
        kwargs.pop("input_ids", None)
        surplus = self._place_pictures(rows, input_ids, given, kwargs)
        num_more = rows.columns.shape[1] - input_ids.shape[1]
        for name in ("max_length", "min_length") if num_more else ():
            length = self._setting(name, kwargs, generation_config)
            if length and self._setting(name.replace("_", "_new_", 1) + "s", kwargs, generation_config) is None:
                kwargs[name] = length + num_more
        padding = 0 if self.config.pad_token_id is None else self.config.pad_token_id
        outputs = super().generate(rows.spread(input_ids, padding), generation_config, *args, **kwargs)
        is_plain = isinstance(outputs, torch.Tensor)
        sequences = outputs if is_plain else outputs.sequences
        num_copies = len(sequences) // len(input_ids)
        prompts = input_ids.repeat_interleave(num_copies, dim=0).to(sequences.device)
        sequences = torch.cat((prompts, sequences[:, rows.columns.shape[1] :]), dim=1)
        for cache in (kwargs.get("past_key_values"), getattr(outputs, "past_key_values", None)):
            if isinstance(cache, Cache):
                cache.picture_surplus = surplus.repeat_interleave(num_copies, dim=0)
        if is_plain:
            return sequences
        outputs.sequences = sequences
        return outputs

    def _place_pictures(
        self, rows: PictureRows, input_ids: torch.Tensor, given: list[Any], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Make the arguments of `generate` those of the places.

        Returns:
            How much more than positions the prompt, or a cache and what is behind it, have places: `[batch, 1]`.

        Raises:
            ValueError: if a picture is missing, or has no place.
        """
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        # All ids are given, or those that are not in the cache, with a mask for all.
        is_whole = mask is None or mask.shape[-1] <= input_ids.shape[1]
        num_cached = self._count_cached(cache)
        surplus_before = getattr(cache, "picture_surplus", None) if num_cached > 0 and not is_whole else None
        surplus_before = 0 if surplus_before is None else surplus_before
        mask = kwargs["attention_mask"] = expand_mask(rows, input_ids, mask)
        kwargs["position_ids"] = expand_positions(rows, kwargs.get("position_ids"), mask, surplus_before)
        is_given = any(value is not None for value in given)
        if (rows.num_pictures > 0 or is_given) and not (is_whole and 0 < rows.end <= num_cached):
            with torch.no_grad():
                features = self.find_features(*given)
            if features is None:
                raise ValueError(
                    f"{rows.num_pictures} rows of the ids have room for a picture ({self.config.boi_token_id}, ..., "
                    f"{self.config.eoi_token_id}), and none was given: give `images`, as `apply_chat_template` returns them."
                )
            # PEFT puts a method of its own in the place of this model's, and gives embeddings of the ids alone.
            if hasattr(getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", None), "get_prompt"):
                raise ValueError(
                    "A soft prompt of PEFT does not go with pictures. Use LoRA, or P-tuning v2 (`pre_seq_len`)."
                )
            rows.check_number(features, self.config)
            num_before = mask.shape[1] - rows.columns.shape[1]
            kwargs["pictures"] = PlacedPictures(features, torch.where(rows.begins < 0, -1, rows.begins + num_before))
        return rows.is_surplus.sum(1, keepdim=True) + surplus_before

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, pictures: PlacedPictures | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        # A static cache counts on the device, for which a single step behind the prompt does not wait.
        is_step = not kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") == 1
        if pictures is None or (is_step and getattr(cache, "is_compileable", False)):
            return inputs
        first_place = self._count_cached(cache)
        if first_place < pictures.end:
            embeds = self.get_input_embeddings()(inputs["input_ids"])
            inputs["inputs_embeds"], inputs["input_ids"] = pictures.put_into(embeds, first_place), None
        return inputs

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, for text alone.

        Raises:
            ValueError: for pictures, and for ids with room for one, which would be read as words.
        """
        # CODEPATH: glm-4v-9b has eyes; the others read text alone.
        has_room = self.base_model.vision is not None and any(self.config.boi_token_id in ids for ids in inputs)
        if has_room or any(kwargs.get(name) is not None for name in ("pixel_values", "images", "image_features")):
            raise ValueError(
                "`generate_batch` reads no pictures. Use `generate` with a padded batch, or `batch_chat`."
            )
        return super().generate_batch(inputs, *args, **kwargs)

    def _count_cached(self, cache: Any) -> int:
        """How many places are in a cache, without a P-tuning prefix."""
        if not isinstance(cache, Cache) or not cache.is_initialized:
            return 0
        return max(int(cache.get_seq_length()) - (self.config.pre_seq_len or 0), 0)

    def name_cached_tokens(self, prompt_ids: list[int], images: torch.Tensor | None) -> list[Any]:
        """What a reused cache holds of a prompt: ids, and what a picture looks like in each of its places."""
        if images is None:
            return prompt_ids
        rows = lay_out_pictures(self.config, torch.tensor([prompt_ids]))
        name = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        places = zip(rows.spread(torch.tensor([prompt_ids]), 0)[0].tolist(), rows.is_picture[0].tolist())
        return [name if is_picture else token_id for token_id, is_picture in places]


__all__ = [
    "PictureGenerationMixin",
    "PictureModelMixin",
    "PlacedPictures",
    "expand_labels",
    "expand_mask",
    "lay_out_pictures",
    "reads_pictures",
]
