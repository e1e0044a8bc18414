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
"""The drawings are what they are said to be, and a small model begins to learn from them."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

drawings = pytest.importorskip("drawings", reason="needs Pillow")
import train_tiny  # noqa: E402
import train_tiny_vision  # noqa: E402


pytestmark = pytest.mark.usefixtures("leave_the_auto_classes_alone")


def test_drawings_are_what_they_are_said_to_be() -> None:
    assert len(drawings.PAIRS) == 48 and not set(drawings.TAUGHT) & set(drawings.HELD_OUT)
    assert {color for _, color in drawings.HELD_OUT} == set(drawings.COLORS)
    assert {shape for shape, _ in drawings.HELD_OUT} == set(drawings.SHAPES)
    rng = random.Random(0)
    for pair in drawings.PAIRS:
        drawing = drawings.random_drawing(rng, [pair])
        picture = drawing.draw(64)
        assert (picture.mode, picture.size) == ("RGB", (64, 64)) and (drawing.shape, drawing.color) == pair
        counts = {color: count for count, color in picture.getcolors(64 * 64)}
        assert max(counts, key=counts.__getitem__) in (drawing.background, drawing.shade)
        assert counts[drawing.shade] > 100
        assert picture.tobytes() == drawing.draw(64).tobytes()
    assert drawing.answer(("both", "en")) == "A pink ring." and drawing.answer(("both", "zh")) == "一个粉色的圆环。"


def test_files_are_what_finetuning_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["drawings.py", str(tmp_path), "--count", "3", "--eval-count", "2"])
    drawings.main()
    for name, count in (("train", 3), ("eval", 2)):
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == count
        for line in lines:
            question, answer = json.loads(line)["messages"]
            assert (tmp_path / question["image"]).is_file() and answer["content"]


def test_a_model_begins_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps only: the whole training takes minutes."""
    monkeypatch.setattr(train_tiny_vision, "BATCHES_PER_EPOCH", 6)
    words = ["--output", str(tmp_path), "--seeing-epochs", "3", "--epochs", "1", "--drawings", "1"]
    monkeypatch.setattr(sys, "argv", ["train_tiny_vision.py", *words])
    losses: list[float] = []
    train = train_tiny.train

    def noted(model: torch.nn.Module, make_batches: object, epochs: int, rate: float, *after: object) -> None:
        train(model, make_batches, epochs, rate, lambda epoch, loss: losses.append(loss))  # type: ignore[arg-type]
        for measure in after:
            measure(epochs, losses[-1])  # type: ignore[operator]

    monkeypatch.setattr(train_tiny_vision, "train", noted)
    assert train_tiny_vision.main() == 1
    # Of shapes and colours, then of what is written.
    assert losses[2] < losses[0] and len(losses) == 4
    report = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    assert report["drawings_asked_about"] == 1 and len(report["on_the_way"]) == 1
    assert set(report["at_the_end"]["held_out_pairs"]) == {"shape", "color", "both"}
    assert (tmp_path / "model.safetensors").stat().st_size < 1_500_000
