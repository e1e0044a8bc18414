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
"""What is a message? The forms that its text and its picture come in.

A message is a dict with a role and a content. The content is a string, or a list of parts, of which each is a text or a
picture, in the library's form or in OpenAI's. The picture of GLM-4V may also stand beside the content, as published.

Nothing here needs torch or transformers, and nothing opens a picture.
"""

import reprlib
from collections.abc import Mapping
from typing import Any


Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "observation")


def check_text(text: str) -> None:
    """Refuse a text with half of a surrogate pair in it, which has no UTF-8 form and therefore no tokens.

    Raises:
        ValueError: with the half character, its place, and what repairs the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Character {error.start} of a text is {text[error.start]!r}, half of a surrogate pair, which cannot be "
            f"encoded: {reprlib.repr(text)}. Repair it with text.encode('utf-16', 'surrogatepass').decode('utf-16', "
            "'replace')."
        ) from None


def content_text(content: Any, place: str) -> str:
    """The text of a message, of which `content` is a string, a list of parts, or nothing.

    Raises:
        TypeError, ValueError: for anything else, with the value and where it stands.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise TypeError(
            f"The content of {place} must be a string, got {reprlib.repr(content)}. Write structured data as text, "
            "for example with json.dumps."
        )
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'The content of {place} may hold parts {{"type": "text", "text": ...}} only, got {reprlib.repr(part)}.'
            )
        texts.append(part["text"])
    return "".join(texts)


def may_have_picture(message: Any) -> bool:
    """Whether a message has more than a text, so that looking for a picture in it is worth the time."""
    return isinstance(message, Mapping) and (
        message.get("image") is not None or isinstance(message.get("content"), (list, tuple))
    )


def take_picture(message: Mapping[str, Any], place: str) -> tuple[Mapping[str, Any], Any]:
    """A message without its picture, and the picture: that of `image`, or of a part in a form of the library or OpenAI.

    Returns:
        The message, and the picture as it was given; `True` for a part `{"type": "image"}` alone, whose picture is given
        elsewhere; `None` where there is none.

    Raises:
        ValueError: for a second picture, and for a part that names several.
    """
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else ()
    found = [part for part in parts if isinstance(part, Mapping) and part.get("type") in ("image", "image_url")]
    pictures = [message["image"]] if message.get("image") is not None else []
    for part in found:
        values = [part[key] for key in ("image", "url", "path", "base64", "image_url") if part.get(key) is not None]
        if len(values) > 1 or (not values and part["type"] != "image"):
            raise ValueError(f"A picture of {place} needs one of `image`, `url`, `path`, `base64` and `image_url`.")
        value = values[0] if values else True
        pictures.append(value["url"] if isinstance(value, Mapping) and "url" in value else value)
    if len(pictures) > 1:
        raise ValueError(
            f"A conversation may hold one picture, as the model was trained; {place} has {len(pictures)}."
        )
    without = {key: value for key, value in message.items() if key != "image"}
    if found:
        without["content"] = [part for part in parts if not any(part is picture for picture in found)]
    return without, pictures[0] if pictures else None


__all__ = ["Message", "ROLES", "check_text", "content_text", "may_have_picture", "take_picture"]
