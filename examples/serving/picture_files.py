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
"""What is a picture in a data address (`data:image/png;base64,...`), and how does one become such an address?

Of Pillow's formats, those of browsers are read. Some of the others run programs.
"""

import binascii
import io
import re
from base64 import b64decode, b64encode
from typing import Any

from local_code import load_module


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
DATA_ADDRESS = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
# Bytes of a PNG at most; what is larger is a photograph, which JPEG holds in less.
LARGEST_PNG = 100_000


def read_address(address: str) -> bytes:
    """The file in a data address.

    Raises:
        ValueError: for another address, and for wrong base64.
    """
    match = DATA_ADDRESS.match(address)
    if match is None:
        raise ValueError(
            f"The picture {address!r:.60} is no data address (data:image/png;base64,...). Nothing is fetched from "
            "elsewhere; send the picture itself."
        )
    try:
        return b64decode(address[match.end() :], validate=True)
    except binascii.Error as error:
        raise ValueError(f"The picture's base64 is wrong: {error}.") from None


def read_picture(content: bytes) -> Any:
    """The picture in a file, as RGB and upright.

    Raises:
        ValueError: for what is no picture, and for one that is too large.
    """
    # Here, because those who read text alone may not have Pillow.
    from PIL import UnidentifiedImageError

    processing = load_module("image_processing_chatglm")
    try:
        return processing.read_upright(io.BytesIO(content), FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"The picture cannot be read: it is none of {', '.join(FORMATS)}.") from None
    except processing.DECODING_ERRORS as error:
        raise ValueError(f"The picture cannot be read: {error!s:.200}") from None


def write_address(image: Any, side: int) -> str:
    """A data address of an RGB picture, made smaller until no side is longer than `side`."""
    image = image.copy()
    image.thumbnail((side, side))
    for kind, settings in (("png", {}), ("jpeg", {"quality": 90})):
        file = io.BytesIO()
        image.save(file, kind, **settings)
        if file.tell() <= LARGEST_PNG:
            break
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"


__all__ = ["FORMATS", "read_address", "read_picture", "write_address"]
