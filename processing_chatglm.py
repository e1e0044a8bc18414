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
"""Messages or texts, and pictures, to what GLM-4V is given.

What is unusual here:

- A conversation is encoded piece by piece by the tokenizer, as everywhere in these files. The library's way, to render it
  to text, to write the placeholder many times into the text and to encode that, could not give the published ids.
- The placeholder is written once for each vector of the picture, behind its begin and before its end. So ids, mask,
  labels and cache have one length. Positions stand still over the picture, as in the model.
- A text says where its picture stands by the three tokens that `apply_chat_template(tokenize=False)` writes. A text
  without them that comes with a picture is a user's question about it.
"""

import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, ProcessorMixin, TextKwargs


# What a call may say about texts beside padding and truncation.
ENCODING_NAMES = (
    "add_special_tokens",
    "return_offsets_mapping",
    "return_special_tokens_mask",
    "return_token_type_ids",
)
PADDING_NAMES = ("max_length", "pad_to_multiple_of", "padding", "padding_side", "return_attention_mask")

# What `apply_chat_template` keeps for itself; everything else goes to the tokenizer's, and to a template of one's own.
PROCESSING_NAMES = {
    name for kwargs in (TextKwargs, ImagesKwargs, ProcessingKwargs) for name in kwargs.__annotations__
} - {"add_special_tokens"}

Row = dict[str, list[Any]]


class ChatGLMProcessor(ProcessorMixin):
    """
    GLM-4V's processor: conversations, or texts and pictures, to `input_ids`, `attention_mask` and `position_ids`,
    `[batch, length]`, and `pixel_values`, float32 `[pictures, 3, image_size, image_size]`, for `forward` and `generate`.

    Args:
        image_processor: a `ChatGLMImageProcessor` or `ChatGLMImageProcessorPil`.
        tokenizer: that of GLM-4V.

    Raises:
        ValueError: for the tokenizer of a generation that reads text alone.
    """

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        if not tokenizer.chat_format.picture_tokens:
            raise ValueError(
                f"The tokenizer is that of {tokenizer.chat_format.name}, which reads text alone and needs no processor."
            )
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: Any = None,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write one conversation or a batch of them as text, or encode it with its pictures.

        Args:
            conversation: messages of any form that the tokenizer takes, of which one may have a picture: `image` beside
                the content, or a part of the type `image` (with `image`, `url`, `path` or `base64`) or `image_url`.
                Where only the text is written, a part `{"type": "image"}` may stand for a picture that comes later.
            tools, documents, chat_template, add_generation_prompt, continue_final_message: as the tokenizer's.
            tokenize: encode it. The text alone is read back by the processor with the same ids.
            return_dict: return everything, not `input_ids` alone.
            processor_kwargs: padding, truncation and settings of the image processor; they may also stand alone.

        Returns:
            A string or a list of them; or what calling the processor gives, and `assistant_masks` if they are asked for.

        Raises:
            TypeError, ValueError: for a conversation that has no form, and for a picture that cannot be read.
        """
        kwargs = {**(processor_kwargs or {}), **kwargs}
        processing = {name: kwargs.pop(name) for name in list(kwargs) if name in PROCESSING_NAMES}
        written = partial(
            self.tokenizer.apply_chat_template,
            conversation,
            tools,
            documents,
            chat_template or (self.chat_template if isinstance(self.chat_template, str) else None),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        if not tokenize:
            return written(tokenize=False)
        text, images = self._settings(processing)
        encoded = written(
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            image_processor=partial(self.image_processor, **images),
        )
        output = self._assemble_chats(encoded, text, None if return_tensors == "auto" else return_tensors)
        return output if return_dict else output["input_ids"]

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Encode texts with pictures.

        Args:
            images: a picture or a list of them, in the order of the texts that have a place for one; also in one list
                for each text, which may be empty. See the image processor for what a picture is.
            text: a text or a list of them, of which some may have a place for a picture. If pictures are given and no
                text has a place for one, each text becomes a user's question about the picture at its place in the list.
            kwargs: as the library's; `padding`, `truncation` and `max_length` count the vectors of pictures, too.
                `return_tensors` is `"pt"` or `"np"`; there are lists where it is left out.

        Returns:
            `input_ids`, `attention_mask`, `position_ids` and `pixel_values`, always with a dimension for the batch.

        Raises:
            ValueError: if there are more pictures than places for them, or fewer; if truncation would cut a picture.
            TypeError: for texts that are none.
        """
        settings, image_settings = self._settings(kwargs)
        return_tensors = settings.get("return_tensors")
        if images is None and text is None:
            raise ValueError("There is nothing to process: give `text`, `images` or both.")
        pixel_values = None
        if images is not None:
            pixel_values = self.image_processor(images, return_tensors="pt", **image_settings)["pixel_values"]
        if text is None:
            return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(item, str) for item in texts):
            raise TypeError(f"`text` must be a string or a list of strings, got {reprlib.repr(text)}.")
        encoding = {name: settings[name] for name in ENCODING_NAMES if settings.get(name) is not None}
        rows = [self._encode_text(item, encoding) for item in texts]
        if pixel_values is not None and not any(self._find_place(row["input_ids"]) for row in rows):
            if len(pixel_values) != len(texts) or _has_groups_of_others(images):
                raise ValueError(
                    f"No text has a place for a picture, so each of the {len(texts)} texts needs one picture; got "
                    f"{len(pixel_values)}. Write {''.join(self._picture_tokens)} where a picture stands."
                )
            rows = [self._encode_question(item) for item in texts]
        return self._assemble(rows, pixel_values, settings, return_tensors)

    @property
    def _picture_tokens(self) -> tuple[str, ...]:
        return self.tokenizer.chat_format.picture_tokens

    def _settings(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a call says about texts, and about pictures."""
        # The hook that the library documents for processors, private by its name (5.17 to 5.23).
        merged = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **given)
        text, images = merged["text_kwargs"], merged["images_kwargs"]
        images.pop("return_tensors", None)
        known = {*ENCODING_NAMES, *PADDING_NAMES, "truncation", "return_tensors", "verbose"}
        if unknown := sorted(name for name, value in text.items() if value and name not in known):
            raise ValueError(f"The processor cannot encode with {', '.join(unknown)}; the tokenizer may.")
        return text, images

    def _encode_text(self, text: str, encoding: Mapping[str, Any]) -> Row:
        # A text that a template wrote has its opening tokens, and is read piece by piece without further ones.
        is_rendered = text.startswith("".join(self.tokenizer.chat_format.opening_tokens))
        return dict(self.tokenizer(text, **{"add_special_tokens": not is_rendered, **encoding}))

    def _encode_question(self, text: str) -> Row:
        message = {"role": "user", "image": True, "content": text}
        return {"input_ids": self.tokenizer.encode_conversation([message])}

    def _find_place(self, ids: Sequence[int]) -> int | None:
        """Where in a row the placeholder of a picture stands; `None` if it has none.

        Raises:
            ValueError: for a second picture.
        """
        tokens = self.tokenizer.convert_tokens_to_ids(list(self._picture_tokens))
        found = [
            index + 1 for index, token in enumerate(ids) if token == tokens[0] and ids[index : index + 3] == tokens
        ]
        if len(found) > 1:
            raise ValueError(f"A conversation may hold one picture, as the model was trained; got {len(found)}.")
        return found[0] if found else None

    def _assemble_chats(self, encoded: Any, text: Mapping[str, Any], return_tensors: Any) -> BatchFeature:
        """Make one of what the tokenizer gave for one conversation or for several."""
        pixel_values = encoded.pop("images", None)
        is_batch = isinstance(encoded["input_ids"][0], list)
        columns = {name: values if is_batch else [values] for name, values in encoded.items()}
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        return self._assemble(rows, pixel_values, text, return_tensors)

    def _assemble(
        self, rows: list[Row], pixel_values: torch.Tensor | None, text: Mapping[str, Any], return_tensors: Any
    ) -> BatchFeature:
        """Write the placeholders, truncate, pad, and put everything into one."""
        places = [self._find_place(row["input_ids"]) for row in rows]
        num_pictures = 0 if pixel_values is None else len(pixel_values)
        num_places = sum(place is not None for place in places)
        if num_pictures != num_places:
            raise ValueError(
                f"{num_pictures} pictures were given, and {num_places} texts have a place for one: "
                f"{''.join(self._picture_tokens)}."
            )
        num_vectors = 0 if pixel_values is None else self.image_processor.num_patch_vectors(pixel_values.shape[-1])
        truncation = {"truncation": text.get("truncation"), "max_length": text.get("max_length")}
        finished = [self._finish(row, place, num_vectors, **truncation) for row, place in zip(rows, places)]
        columns = {name: [row[name] for row in finished] for name in finished[0]} if finished else {}
        padding = {name: text[name] for name in PADDING_NAMES if text.get(name) is not None}
        data = dict(self.tokenizer.pad(columns, **{"padding": False, **padding}))
        if pixel_values is not None:
            data["pixel_values"] = pixel_values
        return BatchFeature(data, tensor_type=return_tensors)

    def _finish(
        self, row: Row, place: int | None, num_vectors: int, truncation: bool | str | None, max_length: int | None
    ) -> Row:
        """A row with the placeholder written for each vector, truncated, with positions that stand still over them."""
        row = {name: list(values) for name, values in row.items() if name not in ("attention_mask", "position_ids")}
        row["position_ids"] = [1] * len(row["input_ids"])
        picture = range(0)
        if place is not None:
            for values in row.values():
                values[place : place + 1] = values[place : place + 1] * num_vectors
            row["position_ids"][place + 1 : place + num_vectors] = [0] * (num_vectors - 1)
            picture = range(place - 1, place + num_vectors + 1)
        kept = self.tokenizer.kept_if_truncated(row["input_ids"], truncation, max_length)
        if not set(picture).issubset(kept):
            raise ValueError(
                f"Truncation to {len(kept)} places would cut the picture, which takes {len(picture)} of them: allow more "
                "places, or leave out messages."
            )
        row = {name: [values[index] for index in kept] for name, values in row.items()}
        return {**row, "position_ids": [count - 1 for count in accumulate(row["position_ids"])]}

    def to_dict(self) -> dict[str, Any]:
        """What is saved, with the place where the Auto class finds this one."""
        settings = super().to_dict()
        auto_map = {**settings.get("auto_map", {}), "AutoProcessor": "processing_chatglm.ChatGLMProcessor"}
        return {**settings, "auto_map": auto_map}


def _has_groups_of_others(images: Any) -> bool:
    """Whether pictures come in lists, of which some do not hold one."""
    groups = images if isinstance(images, (list, tuple)) else []
    return any(isinstance(group, (list, tuple)) and len(group) != 1 for group in groups)


__all__ = ["ChatGLMProcessor"]
