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
"""Where are the pictures of samples, and how do they get into a batch?

A message has its picture as an `image` or as a part of its content, as OpenAI and the library write it. A path is taken
from the folder of the file that names it. Rows keep the path: pixels are read when a batch is made, as those of one
picture of GLM-4V-9B take 15 MB.

In a row, the placeholder stands once for every vector of the picture (1600 at the published size), so that ids, labels,
positions and weights have one length. `max_length` counts it once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from local_code import load_module
from transformers import PreTrainedConfig, PreTrainedTokenizerBase


# What is no path of a file.
ADDRESSES = ("http://", "https://", "data:")


def located(messages: Sequence[Mapping[str, Any]], folder: Path) -> list[Any]:
    """Messages whose pictures have whole paths, taken from a folder."""

    def locate(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {**value, "url": locate(value.get("url"))}
        is_path = isinstance(value, str) and not value.startswith(ADDRESSES)
        return str((folder / value.removeprefix("file://")).absolute()) if is_path else value

    def locate_part(part: Any) -> Any:
        if not isinstance(part, Mapping) or part.get("type") not in ("image", "image_url"):
            return part
        return {
            key: locate(value) if key in ("image", "image_url", "url", "path") else value
            for key, value in part.items()
        }

    written = []
    for message in messages:
        message = dict(message)
        if message.get("image") is not None:
            message["image"] = locate(message["image"])
        if isinstance(message.get("content"), list):
            message["content"] = [locate_part(part) for part in message["content"]]
        written.append(message)
    return written


def picture_of(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """The picture of a conversation, unopened, or `None`.

    Raises:
        TypeError, ValueError: for a conversation that has no form in this generation.
    """
    # Texts, which are many, are not gone through twice.
    if not any(map(load_module("conversation_messages").may_have_picture, messages)):
        return None
    known = tokenizer.chat_format.normalize_messages(messages)
    return next((message["image"] for message in known if "image" in message), None)


def encode_unopened(
    messages: Sequence[Any], tools: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """The ids of a conversation with a picture, which is not opened, and the mask of what the assistant writes."""
    chat_format = tokenizer.chat_format
    chat = chat_format.add_tools(chat_format.normalize_messages(messages), tools)
    ids, mask = tokenizer.encode_conversation_with_mask(chat, add_generation_prompt=False)
    return ids, mask


def repeat_placeholder(
    columns: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, num_vectors: int
) -> list[list[int]]:
    """Columns of a row, the ids first, with the picture's placeholder once for each vector.

    Raises:
        ValueError: if the picture was cut off.
    """
    begin, _, end = tokenizer.convert_tokens_to_ids(list(tokenizer.chat_format.picture_tokens))
    ids = columns[0]
    place = ids.index(begin) + 1 if begin in ids else len(ids)
    if ids[place + 1 : place + 2] != [end]:
        raise ValueError("max_length cuts off the picture")
    return [[*column[:place], *[column[place]] * num_vectors, *column[place + 1 :]] for column in columns]


@dataclass(frozen=True)
class PictureReader:
    """Reads pictures for a model: float32 `[pictures, 3, image_size, image_size]`.

    Attributes:
        image_size: pixels of a side.
        num_vectors: how many vectors the text part gets for a picture, without those of its begin and end.
    """

    image_size: int
    num_vectors: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "PictureReader | None":
        """That of a model, or `None` if it reads text alone."""
        # CODEPATH: glm-4v-9b; the others have no eyes.
        if config.vision_config is None:
            return None
        vision = load_module("configuration_vision").VisionSettings.from_dict(config.vision_config)
        return cls(vision.image_size, vision.num_patch_vectors)

    def check(self, picture: Any) -> None:
        """Find out whether a picture is there and has a size that can be read, without reading all of it.

        Raises:
            ValueError: if not.
        """
        if not isinstance(picture, str) or picture.startswith(ADDRESSES):
            return
        processing = load_module("image_processing_chatglm")
        try:
            with processing.Image.open(picture) as image:
                processing.check_before_decoding(image)
        except processing.DECODING_ERRORS as error:
            raise ValueError(f"the picture {picture} cannot be read: {error}") from error

    def read(self, pictures: Sequence[Any]) -> torch.Tensor:
        """The pixels of pictures.

        Raises:
            ValueError: for one that cannot be read, with its path.
        """
        size = {"height": self.image_size, "width": self.image_size}
        processor = load_module("image_processing_chatglm").ChatGLMImageProcessorPil(size=size)
        pixels = []
        for picture in pictures:
            try:
                pixels.append(processor(processor.fetch_images(picture), return_tensors="pt")["pixel_values"])
            except ValueError as error:
                raise ValueError(f"{str(picture):.200}: {error}") from error
        return torch.cat(pixels)


__all__ = ["PictureReader", "encode_unopened", "located", "picture_of", "repeat_placeholder"]
