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
"""Which pictures may a request bring, and how are they opened?

What is unusual here:

- The tokenizer would open whatever a message names, files of this machine and addresses of its network among it. So
  pictures are opened here, by rules of the server's own, and messages go on without any name in them.
- A picture is a data address, or a file in the one folder that the command line allows. Nothing is fetched.
- One picture is opened at a time: it may take 300 MB until it has the model's size.
"""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from .errors import RequestError
from .models import ServedModel
from .picture_files import read_address, read_picture


# Bytes of a local file.
LARGEST_FILE = 64 << 20
ONE_AT_A_TIME = threading.Lock()


def encode_chat(
    served: ServedModel, messages: Sequence[Any], tools: Any = None
) -> tuple[list[int], torch.Tensor | None]:
    """The ids of a conversation that asks for an answer, and the pixels of its picture, if it has one.

    Raises:
        RequestError: for a picture that is not taken.
        TypeError, ValueError, RecursionError, TemplateError: for a conversation that has no form in this generation.
    """
    addresses = [address for message in messages for address in addresses_of(message)]
    if not addresses:
        return encode(served, messages, tools)
    if not served.sees:
        raise RequestError(f"{served.name} reads text alone, and a message has a picture.", "messages")
    if len(addresses) > 1:
        raise RequestError(f"A conversation may hold one picture; this one has {len(addresses)}.", "messages")
    with ONE_AT_A_TIME:
        picture = open_picture(addresses[0], served.media_folder)
        return encode(served, [with_opened(message, picture) for message in messages], tools)


def encode(served: ServedModel, messages: Sequence[Any], tools: Any) -> tuple[list[int], torch.Tensor | None]:
    encoded = served.tokenizer.apply_chat_template(
        messages, tools=tools, chat_format=served.model.chat_format, add_generation_prompt=True, return_dict=True
    )
    return encoded["input_ids"], encoded.get("images")


def picture_parts(message: Any) -> list[Mapping[str, Any]]:
    """The parts of a message's content that are pictures, in any form that the tokenizer takes."""
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, Mapping) and part.get("type") in ("image", "image_url")]


def addresses_of(message: Any) -> list[str]:
    """The addresses of the pictures in a message: an `image` beside the content, and OpenAI's parts `image_url`.

    Raises:
        RequestError: for a picture of another form.
    """
    if not isinstance(message, Mapping):
        return []
    found = [message["image"]] if message.get("image") is not None else []
    for part in picture_parts(message):
        value = part.get("image_url") if part["type"] == "image_url" else None
        found.append(value.get("url") if isinstance(value, Mapping) else value)
    if not all(isinstance(address, str) for address in found):
        raise RequestError(
            'A picture is a part {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}.', "messages"
        )
    return found


def with_opened(message: Any, picture: Any) -> Any:
    """A message with its picture in the place of the address; one without stays as it is."""
    if not addresses_of(message):
        return message
    parts = picture_parts(message)
    content = message.get("content")
    if parts:
        content = [part for part in content if not any(part is other for other in parts)]
    return {**message, "content": content, "image": picture}


def open_picture(address: str, media_folder: Path | None = None) -> Any:
    """Open the picture at an address, as RGB and upright.

    Args:
        media_folder: the folder whose files may be named; none if there is none.

    Raises:
        RequestError: for another address, and for what is no picture, or is too large.
    """
    is_local = address[:5].lower() == "file:"
    try:
        return read_picture(read_local(address, media_folder) if is_local else read_address(address))
    except ValueError as error:
        raise RequestError(str(error), "messages") from None


def read_local(address: str, media_folder: Path | None) -> bytes:
    """The content of a file that may be named by its address.

    Raises:
        RequestError: for any other file, whether it is there or not.
    """
    parts = urlsplit(address)
    refused = RequestError(
        "Files of the server are read from the folder of --allowed-local-media-path only; send the picture as a data "
        "address.",
        "messages",
    )
    if media_folder is None or parts.netloc not in ("", "localhost"):
        raise refused
    try:
        path = Path(unquote(parts.path)).resolve()
        if not path.is_relative_to(media_folder.resolve()):
            raise refused
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            raise RequestError(f"There is no picture of up to {LARGEST_FILE >> 20} MiB at that address.", "messages")
        return path.read_bytes()
    except (OSError, ValueError):
        raise RequestError("The picture at that address cannot be read.", "messages") from None


__all__ = ["encode_chat", "open_picture"]
