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
"""GLM-4V's pictures as numbers: those of the published code, and what becomes of odd and broken files."""

import base64
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor


@pytest.fixture(scope="module")
def processing(source: Callable[[str], Any]) -> Any:
    return source("image_processing_chatglm")


@pytest.fixture(scope="module")
def processor(processing: Any) -> Any:
    return processing.ChatGLMImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def recorded(case: Callable[[str], Any]) -> Any:
    return case("glm4v")


@pytest.mark.parametrize("name", ["square", "wide", "tall", "exact", "rgba", "gray", "tiny", "palette"])
def test_pixels_are_the_recorded_ones(processor: Any, recorded: Any, name: str) -> None:
    expected = recorded.expected["preprocess"][name]
    pixels = processor(Image.open(recorded.files / expected["file"]), return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32
    assert pixels.equal(recorded.tensors[f"pixels.{name}"][None])
    assert hashlib.sha256(pixels[0].numpy().tobytes()).hexdigest() == expected["sha256_of_float32"]


def test_every_way_of_giving_a_picture(processor: Any, recorded: Any) -> None:
    file = recorded.files / recorded.expected["preprocess"]["wide"]["file"]
    array = np.asarray(Image.open(file))
    encoded = base64.b64encode(file.read_bytes()).decode()
    for image in (str(file), encoded, f"data:image/png;base64,{encoded}", array, torch.tensor(array).permute(2, 0, 1)):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.equal(recorded.tensors["pixels.wide"][None])
    assert processor([array, array], return_tensors="pt")["pixel_values"].shape == (2, 3, 32, 32)


def test_odd_pictures(processor: Any) -> None:
    def first_value(image: Image.Image) -> float:
        pixels = processor(image, return_tensors="np")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        return float(pixels[0, 0, 0, 0] * 0.26862954 + 0.48145466) * 255

    assert first_value(Image.new("RGB", (1, 1), (200, 0, 0))) == pytest.approx(200, abs=1e-3)
    assert first_value(Image.new("RGB", (30000, 10), (200, 0, 0))) == pytest.approx(200, abs=1e-3)
    assert first_value(Image.new("CMYK", (4, 4), (0, 255, 255, 0))) == pytest.approx(255, abs=1e-3)
    assert first_value(Image.new("1", (4, 4), 1)) == pytest.approx(255, abs=1e-3)
    assert first_value(Image.new("I;16", (4, 4), 100 << 8)) == pytest.approx(100, abs=1e-3)
    assert first_value(Image.new("LA", (4, 4), (100, 0))) == pytest.approx(100, abs=1e-3)
    frames = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 0, 0)).save(
        frames, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), (0, 200, 0))]
    )
    assert first_value(Image.open(frames)) == pytest.approx(200, abs=1e-3)


def test_broken_pictures_are_named(processor: Any, processing: Any, tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(file.getvalue()[:2000])
    with pytest.raises(ValueError, match="cannot be read|cannot be decoded"):
        processor(str(truncated))
    with pytest.raises(ValueError, match="64 × 64 pixels cannot be decoded"):
        processor(Image.open(truncated))
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        processor(str(tmp_path / "text.png"))
    with pytest.raises(ValueError, match="no known range"):
        processor(Image.new("F", (4, 4)))
    with pytest.raises(TypeError, match="A picture must be"):
        processing.as_rgb({"no": "picture"})

    class Bomb(Image.Image):
        size = (40_000, 40_000)

        def convert(self, *args: Any) -> Any:
            pytest.fail("a picture of this size must not be decoded")

    with pytest.raises(ValueError, match="40000 × 40000 pixels"):
        processing.as_rgb(Bomb())


def test_saved_and_found_by_its_auto_class(
    processor: Any, recorded: Any, tmp_path: Path, copy_code: Callable[[Path], None]
) -> None:
    processor.save_pretrained(tmp_path)
    copy_code(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    file = recorded.files / recorded.expected["preprocess"]["tall"]["file"]
    pixels = loaded(Image.open(file), return_tensors="pt")["pixel_values"]
    assert pixels.equal(recorded.tensors["pixels.tall"][None])
