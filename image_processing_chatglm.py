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
- It is resized by Pillow on whole numbers, and everything behind that is float32, in the published order. So the numbers
  are those of the published code bit for bit.
- Transparency is dropped, as the published programs do, not blended with a background.
- A picture is refused by its size before it is decoded, so that a small file cannot fill the memory.
"""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict


try:
    from PIL import Image, UnidentifiedImageError
except ImportError as error:
    raise ImportError("Pictures are read by Pillow: pip install pillow") from error

# As many as a picture of 10,000 × 10,000 has. As RGB that is 300 MB.
MOST_PIXELS = 100_000_000


def as_rgb(image: Any) -> Image.Image:
    """A picture of any kind as RGB.

    Args:
        image: of Pillow, in any mode (of an animation, the frame that it stands at), or an array or tensor with
            channels first or last.

    Raises:
        ValueError: for a picture with too many pixels or none, and for one that cannot be decoded.
        TypeError: for what is no picture.
    """
    if not isinstance(image, Image.Image):
        try:
            image = to_pil_image(image)
        except (ValueError, TypeError, AttributeError) as error:
            raise TypeError(f"A picture must be one of Pillow, an array or a tensor: {error}") from error
    width, height = image.size
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(
            f"A picture has {width} × {height} pixels; there must be one at least, and {MOST_PIXELS:,} at most. Make it "
            "smaller first."
        )
    try:
        # Pillow cuts off what has more than 8 bits.
        if image.mode.startswith("I"):
            return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert(
                "RGB"
            )
        if image.mode == "F":
            raise ValueError("A picture of floats has no known range: turn it into whole numbers from 0 to 255 first.")
        return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"A picture of {width} × {height} pixels cannot be decoded: {error}") from error


class ChatGLMImageProcessor(PilBackend):
    """GLM-4V's image processor: `pixel_values`, float32 `[pictures, 3, size, size]`.

    Pictures are those of Pillow, arrays, tensors, or what the library loads: paths, addresses, base64.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 1120, "width": 1120}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    model_input_names = ["pixel_values"]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load what is named by a path, an address or base64.

        Raises:
            ValueError: for what cannot be read as a picture.
        """
        try:
            return super().fetch_images(image_url_or_urls)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise ValueError(f"A picture cannot be read: {error}") from error

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """One picture as RGB, uint8 `[3, height, width]`; see [`as_rgb`]."""
        return np.asarray(as_rgb(image)).transpose(2, 0, 1)

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
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
            if do_resize:
                picture = Image.fromarray(pixels.transpose(1, 2, 0))
                pixels = np.asarray(picture.resize((size.width, size.height), resample)).transpose(2, 0, 1)
            values = pixels.astype(np.float32)
            if do_rescale:
                # Dividing by 255 is what was published; multiplying by its inverse rounds otherwise.
                values = values / np.float32(1 / rescale_factor)
            if do_normalize:
                mean, std = (np.array(part, dtype=np.float32)[:, None, None] for part in (image_mean, image_std))
                values = (values - mean) / std
            processed.append(values)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What is saved, with the place where the Auto class finds this one."""
        auto_map = {"AutoImageProcessor": "image_processing_chatglm.ChatGLMImageProcessor"}
        return {**super().to_dict(), "auto_map": auto_map}


__all__ = ["ChatGLMImageProcessor", "as_rgb"]
