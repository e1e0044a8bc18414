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
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL import __version__ as pillow_version
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


@pytest.mark.skipif(int(pillow_version.split(".")[0]) < 13, reason="an older Pillow has another order")
def test_passes_are_those_of_pillow_13(processor: Any, processing: Any) -> None:
    rng = np.random.default_rng(0)
    sizes = [(9, 50), (43, 60), (60, 66), (92, 127), (70, 112), (64, 64), (200, 40), (1, 300)]
    for width, height in [*sizes, *rng.integers(1, 160, (40, 2)).tolist()]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        resized = image
        for size in processing.resize_passes(width, height, processor.size):
            resized = resized.resize(size, Image.Resampling.BICUBIC)
        assert resized == image.resize((32, 32), Image.Resampling.BICUBIC), (width, height)


def test_every_way_of_giving_a_picture(processor: Any, recorded: Any) -> None:
    file = recorded.files / recorded.expected["preprocess"]["wide"]["file"]
    array = np.asarray(Image.open(file))
    encoded = base64.b64encode(file.read_bytes()).decode()
    for image in (str(file), encoded, f"data:image/png;base64,{encoded}", array, torch.tensor(array).permute(2, 0, 1)):
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        assert pixels.equal(recorded.tensors["pixels.wide"][None])
    assert processor([array, array], return_tensors="pt")["pixel_values"].shape == (2, 3, 32, 32)
    # Four channels, and sizes that do not tell.
    rgba = np.dstack((array, array[:, :, :1]))
    assert processor(rgba, return_tensors="pt")["pixel_values"].equal(recorded.tensors["pixels.wide"][None])
    thin = processor(array[:3], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert thin.equal(processor(Image.fromarray(array[:3]), return_tensors="pt")["pixel_values"])


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


def test_odd_files(processor: Any, processing: Any, tmp_path: Path) -> None:
    """What a file says beyond its colours is kept: 16 bits, and which way is up."""
    Image.new("I;16", (4, 4), 100 << 8).save(tmp_path / "sixteen.png")
    assert processing.open_picture(tmp_path / "sixteen.png").getpixel((0, 0)) == (100, 100, 100)
    turned = Image.new("RGB", (4, 8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert processing.open_picture(tmp_path / "turned.jpg").size == (8, 4)
    assert processing.as_rgb(Image.open(tmp_path / "turned.jpg")).size == (4, 8), (
        "a picture of the caller's is as it is"
    )
    with Image.new("CMYK", (4, 4), (0, 255, 255, 0)) as image:
        image.save(tmp_path / "cmyk.jpg")
    assert processing.open_picture(tmp_path / "cmyk.jpg").mode == "RGB"


def test_addresses_go_to_the_librarys_loader(
    processor: Any, processing: Any, recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recorded.files / recorded.expected["preprocess"]["wide"]["file"]
    asked: list[str] = []

    def load_image(address: str) -> Image.Image:
        asked.append(address)
        if "missing" in address:
            raise ConnectionError("no such host")
        return Image.open(file)

    monkeypatch.setattr(processing, "load_image", load_image)
    pixels = processor("https://example.org/wide.png", return_tensors="pt")["pixel_values"]
    assert pixels.equal(recorded.tensors["pixels.wide"][None])
    with pytest.raises(ValueError, match="'https://example.org/missing.png' cannot be loaded: no such host"):
        processor("https://example.org/missing.png")
    assert len(asked) == 2


def test_small_files_of_large_pictures_are_not_decoded(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.new("1", (10_001, 10_000))
    image.save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    for name in ("load", "convert"):
        monkeypatch.setattr(Image.Image, name, lambda *args: pytest.fail("this picture must not be decoded"))
    encoded = base64.b64encode((tmp_path / "bomb.png").read_bytes()).decode()
    for source in (str(tmp_path / "bomb.png"), f"data:image/png;base64,{encoded}"):
        with pytest.raises(
            ValueError, match="10001 × 10000 pixels; there must be one at least, and 100,000,000 at most"
        ):
            processor(source)


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
    for source, message in (
        (str(tmp_path / "text.png"), "text.png' cannot be read: this file is no picture"),
        (str(tmp_path / "nowhere.png"), "nowhere.png' cannot be read: this is no file, no address"),
        (str(tmp_path), "cannot be read: this is no file"),
        ("data:image/png;base64,AAAA", "cannot be read: this is no file"),
        ("data:image/png;base64,A", "cannot be read: this is no file"),
        ("", "'' cannot be read"),
        ("a\0b", "cannot be read"),
        ("猫.png", "'猫.png' cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(source)
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    with pytest.raises(ValueError, match="PostScript, which another program would have to run"):
        processor(str(tmp_path / "drawing.eps"))
    with pytest.raises(TypeError, match="A picture must be .* got 3"):
        processor(3)
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


WITHOUT_PILLOW = """
import sys

sys.modules.update(PIL=None, torchvision=None)

import torch
from transformers import AutoModel, AutoTokenizer

folder = sys.argv[1]
model, tokenizer = (auto.from_pretrained(folder, trust_remote_code=True) for auto in (AutoModel, AutoTokenizer))
message = {"role": "user", "content": "Hi"}
inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True, return_tensors="pt")
assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
assert model.get_image_features(torch.zeros(1, 3, 32, 32)) is not None
try:
    tokenizer.apply_chat_template([{**message, "image": "picture.png"}])
except ImportError as error:
    print(error)
"""


@pytest.mark.grid
def test_texts_need_no_pillow(case_folder: Callable[[str], Path]) -> None:
    command = [sys.executable, "-c", WITHOUT_PILLOW, str(case_folder("glm4v"))]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "Pictures are read by Pillow: pip install pillow"


# Run beside torchvision. What the wheel asks for while it is imported is declared, and never called: it resizes by operators
# of torch itself.
BESIDE_TORCHVISION = """
import sys
import torch

declared = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    declared.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

folder, *pictures = sys.argv[1:]
fast = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
exact = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil")
assert (type(fast).__name__, fast.backend) == ("ChatGLMImageProcessor", "torchvision")
assert (type(exact).__name__, exact.backend) == ("ChatGLMImageProcessorPil", "pil")
assert AutoProcessor.from_pretrained(folder, trust_remote_code=True).image_processor.backend == "torchvision"
assert AutoProcessor.from_pretrained(folder, trust_remote_code=True, backend="pil").image_processor.backend == "pil"
noise = np.random.default_rng(0)
sizes = [(10, 300), (64, 64), (1, 1), (500, 700)]
given = [*pictures, *(Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes)]
for picture in given:
    ours, published = (part(picture, return_tensors="pt")["pixel_values"] for part in (fast, exact))
    assert ours.shape == published.shape and ours.dtype == published.dtype
    levels = (ours - published).abs() * torch.tensor(exact.image_std)[:, None, None] * 255
    print(levels.max().item(), (levels > 0.5).float().mean().item())
fast.save_pretrained(folder)
"""


@pytest.mark.programs
def test_torchvision_is_within_two_levels(
    processor: Any,
    recorded: Any,
    case_folder: Callable[[str], Path],
    copy_code: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    torchvision = Path(sys.prefix) / "torchvision"
    if not torchvision.is_dir():
        pytest.skip(f"needs torchvision in {torchvision}, where `make test-programs` puts it")
    processor.save_pretrained(tmp_path)
    copy_code(tmp_path)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(case_folder("glm4v") / name)
    names = ["square", "wide", "tall", "exact", "rgba", "gray", "tiny", "palette"]
    files = [str(recorded.files / recorded.expected["preprocess"][name]["file"]) for name in names]
    environment = {**os.environ, "PYTHONPATH": str(torchvision), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BESIDE_TORCHVISION, str(tmp_path), *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [[float(value) for value in line.split()] for line in run.stdout.splitlines()]
    assert len(found) == len(files) + 4
    assert max(levels for levels, _ in found) < 2.01
    assert max(share for _, share in found) < 0.011
    # What it saved is for everybody, with torchvision and without.
    loaded = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "ChatGLMImageProcessorPil"
