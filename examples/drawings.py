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
"""Drawings of shapes in colours, with questions and answers in English and Chinese: pictures that nobody has to fetch.

A drawing has a shape, a colour, a size, a place, an angle and a background. Of the pairs of a shape and a colour, one of
each colour is held out (`HELD_OUT`): a model that never saw it has to know both by themselves to name it.

`python examples/drawings.py FOLDER` writes the pictures with `train.jsonl` and `eval.jsonl`, which `finetune.py` reads;
the drawings of `eval.jsonl` are of the pairs that are held out.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw


SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "五角星",
    "cross": "十字形",
    "ring": "圆环",
}
COLORS = {
    "red": ("红色", (214, 40, 40)),
    "orange": ("橙色", (247, 140, 20)),
    "yellow": ("黄色", (246, 220, 40)),
    "green": ("绿色", (40, 160, 60)),
    "cyan": ("青色", (50, 200, 215)),
    "blue": ("蓝色", (40, 70, 205)),
    "purple": ("紫色", (130, 50, 165)),
    "pink": ("粉色", (245, 150, 190)),
}
# None of them is one of the colours.
BACKGROUNDS = ((255, 255, 255), (20, 20, 20), (128, 128, 128), (210, 205, 195))
PAIRS = list(product(SHAPES, COLORS))
HELD_OUT = [(list(SHAPES)[index % len(SHAPES)], color) for index, color in enumerate(COLORS)]
TAUGHT = [pair for pair in PAIRS if pair not in HELD_OUT]
# Drawn larger, so that edges are smooth.
ENLARGEMENT = 3

# What may be asked, by kind and language, and the answer.
QUESTIONS = {
    ("shape", "en"): ("What shape is it?", "Which shape do you see?"),
    ("color", "en"): ("What colour is it?", "Which colour does it have?"),
    ("both", "en"): ("Describe the picture.", "What is in the picture?"),
    ("shape", "zh"): ("它是什么形状？", "你看到什么形状？"),
    ("color", "zh"): ("它是什么颜色？", "图形是什么颜色的？"),
    ("both", "zh"): ("描述这张图片。", "图片里有什么？"),
}
ANSWERS = {
    ("shape", "en"): "It is a {shape}.",
    ("color", "en"): "It is {color}.",
    ("both", "en"): "A {color} {shape}.",
    ("shape", "zh"): "它是{shape}。",
    ("color", "zh"): "它是{color}的。",
    ("both", "zh"): "一个{color}的{shape}。",
}
KINDS = tuple(QUESTIONS)
# Without a picture, whatever is asked about it.
NOTHING_TO_SEE = {"en": "I see no picture.", "zh": "我没有看到图片。"}

Kind = tuple[str, str]


@dataclass(frozen=True)
class Drawing:
    """One shape; places and sizes are shares of the picture's side, the angle is in degrees."""

    shape: str
    color: str
    size: float
    center: tuple[float, float]
    angle: float
    shade: tuple[int, int, int]
    background: tuple[int, int, int]

    def draw(self, side: int = 112) -> Image.Image:
        """The picture, RGB, `side` × `side` pixels."""
        scale = side * ENLARGEMENT
        picture = Image.new("RGB", (scale, scale), self.background)
        pen = ImageDraw.Draw(picture)
        radius = self.size / 2
        points = [
            tuple(scale * (middle + radius * part) for middle, part in zip(self.center, point))
            for point in outline(self.shape, math.radians(self.angle))
        ]
        if points:
            pen.polygon(points, fill=self.shade)
        else:
            corners = [scale * (middle + sign * radius) for sign in (-1, 1) for middle in self.center]
            pen.ellipse(corners, fill=self.shade)
            if self.shape == "ring":
                corners = [scale * (middle + sign * radius * 0.55) for sign in (-1, 1) for middle in self.center]
                pen.ellipse(corners, fill=self.background)
        return picture.resize((side, side), Image.Resampling.BOX)

    def answer(self, kind: Kind) -> str:
        """What is right to say."""
        shape, color = self.shape, self.color
        if kind[1] == "zh":
            shape, color = SHAPES[shape], COLORS[color][0]
        elif kind[0] == "both" and color[0] in "aeiou":
            return f"An {color} {shape}."
        return ANSWERS[kind].format(shape=shape, color=color)


def outline(shape: str, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape around (0, 0), the farthest at a distance of 1; none for round ones."""
    if shape in ("circle", "ring"):
        return []
    # As (distance, angle in parts of a full turn).
    corners = {
        "square": [(1.0, (2 * index + 1) / 8) for index in range(4)],
        "triangle": [(1.0, index / 3) for index in range(3)],
        "star": [(0.42 if index % 2 else 1.0, index / 10) for index in range(10)],
    }.get(shape)
    if corners is None:
        arm = math.atan(1 / 3) / math.tau
        notch = math.hypot(1 / 3, 1 / 3) / math.hypot(1, 1 / 3)
        corners = []
        for index in range(4):
            corners += [(1.0, index / 4 - arm), (1.0, index / 4 + arm), (notch, index / 4 + 1 / 8)]
    angles = [(distance, math.tau * part + turn - math.pi / 2) for distance, part in corners]
    return [(distance * math.cos(angle), distance * math.sin(angle)) for distance, angle in angles]


def random_drawing(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Drawing:
    """A drawing of one of some pairs of a shape and a colour; the rest is drawn by lot."""
    shape, color = rng.choice(pairs)
    size = rng.uniform(0.6, 0.9)
    room = (1 - size) / 2
    return Drawing(
        shape,
        color,
        size,
        (0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room)),
        rng.uniform(-10, 10),
        tuple(min(max(part + rng.randint(-12, 12), 0), 255) for part in COLORS[color][1]),  # type: ignore[arg-type]
        rng.choice(BACKGROUNDS),
    )


def conversation(drawing: Drawing, kinds: Sequence[Kind], rng: random.Random, image: Any) -> list[dict[str, Any]]:
    """Questions about a drawing and their answers; the picture comes with the first. Without one, there is nothing to see."""
    messages: list[dict[str, Any]] = []
    for kind in kinds:
        answer = NOTHING_TO_SEE[kind[1]] if image is None else drawing.answer(kind)
        messages.append({"role": "user", "content": rng.choice(QUESTIONS[kind])})
        messages.append({"role": "assistant", "content": answer})
    if image is not None:
        messages[0]["image"] = image
    return messages


def write_file(path: Path, pairs: Sequence[tuple[str, str]], count: int, side: int, rng: random.Random) -> None:
    """Draw pictures beside a file that says what is asked of each, a conversation in a line."""
    lines = []
    for number in range(count):
        drawing = random_drawing(rng, pairs)
        name = f"{path.stem}-{number:05}.png"
        drawing.draw(side).save(path.with_name(name))
        kinds = rng.sample(KINDS, 1)
        lines.append(json.dumps({"messages": conversation(drawing, kinds, rng, name)}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="pictures to train on (%(default)s)")
    parser.add_argument("--eval-count", type=int, default=100, help="pictures to evaluate on (%(default)s)")
    parser.add_argument("--side", type=int, default=112, help="pixels (%(default)s)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    write_file(arguments.folder / "train.jsonl", TAUGHT, arguments.count, arguments.side, rng)
    write_file(arguments.folder / "eval.jsonl", HELD_OUT, arguments.eval_count, arguments.side, rng)


if __name__ == "__main__":
    main()
