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
"""Pictures to the numbers that GLM-4V's eyes read.

What is unusual here:

- A picture becomes a square of the model's size whatever its form is: nothing is cut off, nothing is padded.
- There are two processors, named as the library names such pairs. `ChatGLMImageProcessorPil` resizes with Pillow on whole
  numbers, and everything behind that is float32, in the published order: its numbers are the published ones bit for bit.
  `ChatGLMImageProcessor` resizes with torchvision, on a GPU as well. On CPUs it is off by two of 255 levels at most, where
  a picture grows, and by one where it shrinks, in less than a value of a hundred (measured on noise).
- A picture is resized in two passes, and which comes first shows in the numbers: Pillow chose it otherwise before version
  13, by which the published numbers were recorded. So both take the passes one by one; see [`resize_passes`].
- Both open pictures with Pillow. What the library opens for torchvision knows fewer kinds of files and no limit of size.
- Transparency is dropped, as the published programs do, not blended with a background.
- A picture is refused by its size before it is decoded, so that a small file cannot fill the memory.
"""

import base64
import binascii
import io
import os
import reprlib
import struct
from typing import Any

import numpy as np
import torch


# Before the imports of the library that need it.
try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise ImportError("Pictures are read by Pillow: pip install pillow") from error

from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    load_image,
)
from transformers.processing_utils import ImagesKwargs

from .configuration_generations import PREPROCESSOR_AUTO_MAP
from .configuration_vision import VisionSettings


# As many as a picture of 10,000 × 10,000 has. As RGB that is 300 MB.
MOST_PIXELS = 100_000_000

# What Pillow raises for files that are broken, beside its own errors, which are among these.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, ArithmeticError, struct.error),
    Image.DecompressionBombError,
)


def check_before_decoding(image: Image.Image) -> None:
    """Refuse a picture with more than `MOST_PIXELS`, with none, or of PostScript, by a `ValueError`."""
    width, height = image.size
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(
            f"A picture has {width} × {height} pixels; there must be one at least, and {MOST_PIXELS:,} at most. Make it "
            "smaller first."
        )
    if image.format == "EPS":
        raise ValueError("A picture is PostScript, which another program would have to run: convert it to PNG first.")


def read_upright(file: Any, formats: list[str] | tuple[str, ...] | None = None) -> Image.Image:
    """The picture in a file as RGB, turned upright as the file says.

    Args:
        file: a path, or a file that is open.
        formats: those of Pillow that are read; all it has where there are none.

    Raises:
        UnidentifiedImageError: for what is no picture of these formats.
        ValueError, OSError, ...: one of `DECODING_ERRORS`, for one that is broken or has too many pixels.
    """
    with Image.open(file, formats=formats) as image:
        check_before_decoding(image)
        ImageOps.exif_transpose(image, in_place=True)
        return as_rgb(image)


def open_picture(source: str | os.PathLike[str]) -> Image.Image:
    """Open a picture as RGB, turned upright as its file says.

    Args:
        source: the path of a file, base64 (also as a `data:` address), or an address, which the library loads.

    Raises:
        ValueError: for what cannot be read as a picture, is no longer there or has too many pixels.
    """
    name = os.fspath(source)
    shown = f"{name!r:.200}"
    if name.startswith(("http://", "https://")):
        try:
            return load_image(name)
        except Exception as error:  # Of the library that it loads with, which changes, or of Pillow.
            raise ValueError(f"The picture {shown} cannot be loaded: {error}") from error
    is_file = os.path.isfile(name)
    try:
        file: Any = name if is_file else io.BytesIO(base64.b64decode(name.partition(",")[2] or name))
        return read_upright(file)
    except (binascii.Error, UnidentifiedImageError):
        what = (
            "this file is no picture" if is_file else "this is no file, no address (http, https) and no base64 of one"
        )
        raise ValueError(f"The picture {shown} cannot be read: {what}.") from None
    except DECODING_ERRORS as error:
        raise ValueError(f"The picture {shown} cannot be read: {error}") from error


def as_rgb(image: Any, input_data_format: Any = None) -> Image.Image:
    """A picture of any kind as RGB.

    Args:
        image: of Pillow, in any mode (of an animation, the frame that it stands at), or an array or tensor with
            one, three or four channels, first or last.
        input_data_format: `"channels_first"` or `"channels_last"`, where the sizes of an array do not tell.

    Raises:
        ValueError: for a picture with too many pixels or none, and for one that cannot be decoded.
        TypeError: for what is no picture.
    """
    if not isinstance(image, Image.Image):
        try:
            channels = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
            image = to_pil_image(image, input_data_format=channels)
        except (ValueError, TypeError, AttributeError) as error:
            raise TypeError(f"A picture must be one of Pillow, an array or a tensor: {error}") from error
    check_before_decoding(image)
    if image.mode == "F":
        raise ValueError("A picture of floats has no known range: turn it into whole numbers from 0 to 255 first.")
    try:
        if image.mode == "RGB":
            image.load()
            return image
        # Pillow cuts off what has more than 8 bits.
        if image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.uint32) >> 8
            return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except DECODING_ERRORS as error:
        width, height = image.size
        raise ValueError(f"A picture of {width} × {height} pixels cannot be decoded: {error}") from error


def resize_passes(width: int, height: int, size: SizeDict) -> list[tuple[int, int]]:
    """The widths and heights that a picture has behind each pass of its resizing, in the order that Pillow 13 has."""
    is_tall = height > size.height and height - size.height > 2 * (width - size.width)
    return [(width, size.height) if is_tall else (size.width, height), (size.width, size.height)]


class ChatGLMImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # mypy does not see the base
    """
    patch_size (`int`):
        Width of the patches that the tower sees, which tells how many vectors a picture becomes.
    """

    patch_size: int


class PictureSteps:
    """What both image processors do: what they read, what they are set to, and what they save."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 1120, "width": 1120}
    patch_size = 14
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    model_input_names = ["pixel_values"]
    valid_kwargs = ChatGLMImageProcessorKwargs

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open what is named by a path, an address or base64, in lists too; see [`open_picture`]."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        is_name = isinstance(image_url_or_urls, (str, os.PathLike))
        if not is_name and not isinstance(image_url_or_urls, (Image.Image, np.ndarray, torch.Tensor)):
            raise TypeError(
                "A picture must be one of Pillow, an array, a tensor, a path, an address or base64, got "
                f"{reprlib.repr(image_url_or_urls)}."
            )
        return open_picture(image_url_or_urls) if is_name else image_url_or_urls

    def num_patch_vectors(self, image_size: int) -> int:
        """How many vectors the decoder gets for a picture of `image_size` pixels a side, begin and end left out."""
        return VisionSettings(image_size=image_size, patch_size=self.patch_size).num_patch_vectors

    def to_dict(self) -> dict[str, Any]:
        """What is saved, with the places where the Auto classes find this one and the whole processor."""
        settings = super().to_dict()  # type: ignore[misc]  # this is a part of a class
        return {**settings, "auto_map": {**settings.get("auto_map", {}), **PREPROCESSOR_AUTO_MAP}}


class ChatGLMImageProcessorPil(PictureSteps, PilBackend):
    """GLM-4V's image processor on Pillow: `pixel_values`, float32 `[pictures, 3, size, size]`, the published numbers.

    Pictures are those of Pillow, arrays, tensors, paths, addresses, base64.
    """

    def process_image(
        self,
        image: Any,
        *args: Any,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        input_data_format: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One picture as RGB in its size here, uint8 `[3, height, width]`; see [`as_rgb`].

        It is resized here already, so that no other copy of a large picture is made.
        """
        picture = as_rgb(image, input_data_format)
        if do_resize:
            for width_and_height in resize_passes(*picture.size, size):
                picture = picture.resize(width_and_height, resample)
        return np.asarray(picture).transpose(2, 0, 1)

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        processed = []
        for pixels in images:
            values = pixels.astype(np.float32)
            if do_rescale:
                # Dividing by 255 is what was published; multiplying by its inverse rounds otherwise.
                values = values / np.float32(1 / rescale_factor)
            if do_normalize:
                mean, std = (np.array(part, dtype=np.float32)[:, None, None] for part in (image_mean, image_std))
                values = (values - mean) / std
            processed.append(values)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


class ChatGLMImageProcessor(PictureSteps, TorchvisionBackend):
    """The same on torchvision, which also runs where `device` says: the numbers of [`ChatGLMImageProcessorPil`] but for
    a few, by two of 255 levels at most."""

    def process_image(
        self, image: Any, *args: Any, device: Any = None, input_data_format: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """One picture as RGB, uint8 `[3, height, width]`; see [`as_rgb`]."""
        pixels = torch.from_numpy(np.array(as_rgb(image, input_data_format)))
        return pixels.permute(2, 0, 1).contiguous().to(device)

    def resize(self, image: torch.Tensor, size: SizeDict, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Resize as the library does, one pass after the other."""
        for width, height in resize_passes(image.shape[-1], image.shape[-2], size):
            image = super().resize(image, SizeDict(height=height, width=width), *args, **kwargs)
        return image


__all__ = ["ChatGLMImageProcessor", "ChatGLMImageProcessorPil", "as_rgb", "open_picture", "read_upright"]
