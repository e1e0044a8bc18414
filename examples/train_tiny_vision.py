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
"""Trains a small GLM-4V to tell shapes and colours on the pictures of `drawings.py`.

`python examples/train_tiny_vision.py` takes ten to twenty minutes on one core. All of it is learnt from nothing: the eyes, the
adapter and the text part. No drawing is seen twice. At the end the model is asked about drawings it has not seen, those
of the pairs of shape and colour that it was taught and those of the pairs that were held out, and
`accuracy.json` says how often it was right along the way.

The eyes learn first, as those of GLM-4V did: a linear layer names shape and colour by the mean of a picture's vectors, and is
thrown away. Then all of it learns to answer.

The training itself is that of `train_tiny.py`; here are the vocabulary, the sizes and the pictures.
"""

import argparse
import json
import random
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from drawings import (
    ANSWERS,
    COLORS,
    HELD_OUT,
    KINDS,
    NOTHING_TO_SEE,
    QUESTIONS,
    SHAPES,
    TAUGHT,
    Drawing,
    conversation,
    random_drawing,
)
from local_code import load_module, load_tokenizer, register
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch.nn.functional import cross_entropy
from train_tiny import as_batch, train
from transformers import AutoModel, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


# Bytes, and what is joined of them; the control tokens come behind.
NUM_RANKS = 480
VOCAB_SIZE = 496
IMAGE_SIZE, PATCH_SIZE = 56, 7
BATCHES_PER_EPOCH, ROWS_PER_BATCH = 20, 32
# Conversations without a picture, where there is nothing to see.
BLIND_SHARE = 0.06
# Pictures without colours where only the shape is asked for. Otherwise a model learns what shapes a colour never has.
GRAY_SHARE = 0.5


def train_vocabulary(folder: Path) -> None:
    """Rank strings as GLM-4's `tokenizer.model` does, and write them with a configuration file."""
    vocabulary = load_module("tokenization_vocabulary")
    tokenizer = vocabulary.ranks_tokenizer(BPE())
    texts = [text for texts in QUESTIONS.values() for text in texts]
    texts += [*SHAPES, *COLORS, *SHAPES.values(), *(name for name, _ in COLORS.values())]
    texts += [*NOTHING_TO_SEE.values(), *ANSWERS.values()]
    trainer = BpeTrainer(vocab_size=NUM_RANKS, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ranked = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    strings = [token.translate(vocabulary.BYTE_OF_CHARACTER).encode("latin-1") for token in ranked]
    lines = [f"{b64encode(string).decode()} {rank}\n" for rank, string in enumerate(strings)]
    (folder / "tokenizer.model").write_text("".join(lines), encoding="utf-8")
    config = {
        "model_version": "glm4v",
        "tokenizer_class": "ChatGLM4Tokenizer",
        "image_size": IMAGE_SIZE,
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model that is laid out as GLM-4V-9B, except for the sizes."""
    begin, end = tokenizer.convert_tokens_to_ids(["<|begin_of_image|>", "<|end_of_image|>"])
    config = load_module("configuration_chatglm").ChatGLMConfig(
        model_version="glm4v",
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        kv_channels=16,
        multi_query_attention=True,
        multi_query_group_num=2,
        ffn_hidden_size=128,
        # Wider than published: in matrices as small as these, signals would fade on their way from the pixels.
        initializer_range=0.1,
        padded_vocab_size=VOCAB_SIZE,
        seq_length=512,
        layernorm_epsilon=1.5625e-07,
        eos_token_id=tokenizer.stop_token_ids(),
        pad_token_id=tokenizer.pad_token_id,
        boi_token_id=begin,
        eoi_token_id=end,
        vision_config={
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "num_positions": (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1,
            "hidden_size": 64,
            "num_heads": 4,
            "num_hidden_layers": 3,
            "intermediate_size": 128,
            "in_channels": 3,
            "hidden_act": "gelu",
            "dropout_prob": 0.0,
            "layer_norm_eps": 1e-6,
            "scaling_factor": 8,
        },
    )
    model = AutoModel.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.stop_token_ids(), pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def batches(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], rng: random.Random
) -> Iterator[dict[str, torch.Tensor]]:
    """Conversations about new drawings, of one or two questions."""
    for _ in range(BATCHES_PER_EPOCH):
        chats = []
        for _ in range(ROWS_PER_BATCH):
            drawing = random_drawing(rng, pairs)
            kinds = rng.sample(KINDS, rng.randint(1, 2))
            image = None if rng.random() < BLIND_SHARE else drawing.draw(IMAGE_SIZE)
            if image is not None and {name for name, _ in kinds} == {"shape"} and rng.random() < GRAY_SHARE:
                image = image.convert("L").convert("RGB")
            chats.append(conversation(drawing, kinds, rng, image))
        encoded = tokenizer.apply_chat_template(chats, return_dict=True, return_assistant_tokens_mask=True)
        rows = list(zip(encoded["input_ids"], encoded["assistant_masks"]))
        yield {**as_batch(rows, tokenizer), "images": encoded["images"]}


class Naming(torch.nn.Module):
    """What the eyes learn on: to name shape and colour by the mean of a picture's vectors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.shape = torch.nn.Linear(model.config.hidden_size, len(SHAPES))
        self.color = torch.nn.Linear(model.config.hidden_size, len(COLORS))

    def forward(self, images: torch.Tensor, shapes: torch.Tensor, colors: torch.Tensor) -> SimpleNamespace:
        scale = self.model.config.vision_config["scaling_factor"]
        vectors = scale * self.model.get_image_features(images).pooler_output.mean(1)
        losses = (cross_entropy(self.shape(vectors), shapes), cross_entropy(self.color(vectors), colors))
        return SimpleNamespace(loss=losses[0] + losses[1])


def named_batches(pairs: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[dict[str, torch.Tensor]]:
    """New drawings, with the numbers of their shapes and colours."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = load_module("image_processing_chatglm").ChatGLMImageProcessorPil(size=size)
    for _ in range(BATCHES_PER_EPOCH):
        drawings = [random_drawing(rng, pairs) for _ in range(ROWS_PER_BATCH)]
        images = [drawing.draw(IMAGE_SIZE) for drawing in drawings]
        colors = [list(COLORS).index(drawing.color) for drawing in drawings]
        for index in range(round(GRAY_SHARE * ROWS_PER_BATCH)):
            # What has no colour says nothing of it.
            images[index], colors[index] = images[index].convert("L").convert("RGB"), -100
        yield {
            "images": processor(images, return_tensors="pt")["pixel_values"],
            "shapes": torch.tensor([list(SHAPES).index(drawing.shape) for drawing in drawings]),
            "colors": torch.tensor(colors),
        }


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drawings: Sequence[Drawing], batch_size: int = 96
) -> dict[str, float]:
    """Ask every question about every drawing; the share of right answers by what was asked for."""
    rng = random.Random(0)
    asked = [(drawing, kind) for drawing in drawings for kind in KINDS]
    right: dict[str, list[bool]] = {}
    for start in range(0, len(asked), batch_size):
        some = asked[start : start + batch_size]
        chats = [conversation(drawing, [kind], rng, drawing.draw())[:1] for drawing, kind in some]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, padding=True, return_tensors="pt"
        )
        outputs = model.generate(**inputs, max_new_tokens=32)
        for (drawing, kind), ids in zip(some, outputs[:, inputs["input_ids"].shape[1] :]):
            is_right = tokenizer.decode(ids, skip_special_tokens=True).strip() == drawing.answer(kind)
            right.setdefault(kind[0], []).append(is_right)
    return {name: sum(marks) / len(marks) for name, marks in right.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/tiny-glm4v"))
    parser.add_argument("--seeing-epochs", type=int, default=110, help="for the eyes alone (%(default)s)")
    parser.add_argument("--epochs", type=int, default=35, help="for all of it (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--drawings", type=int, default=200, help="to be asked about at the end, of either kind of pairs"
    )
    arguments = parser.parse_args()
    register()
    logging.disable_progress_bar()
    # As in `train_tiny.py`.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_vocabulary(arguments.output)
    tokenizer = load_tokenizer(arguments.output)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters", flush=True)
    rng = random.Random(1)
    unseen = {
        name: [random_drawing(rng, pairs) for _ in range(arguments.drawings)]
        for name, pairs in (("taught_pairs", TAUGHT), ("held_out_pairs", HELD_OUT))
    }
    curve: list[dict[str, Any]] = []

    def measure(epoch: int, loss: float) -> None:
        if epoch % 5 and epoch != arguments.epochs:
            return
        model.eval()
        few = {name: accuracy(model, tokenizer, drawings[:24]) for name, drawings in unseen.items()}
        model.train()
        num_seen = epoch * BATCHES_PER_EPOCH * ROWS_PER_BATCH
        curve.append({"drawings": num_seen, "loss": round(loss, 4), **few})
        print("  ", json.dumps(few), flush=True)

    train(Naming(model), partial(named_batches, TAUGHT), arguments.seeing_epochs, arguments.learning_rate)
    train(model, partial(batches, tokenizer, TAUGHT), arguments.epochs, arguments.learning_rate, measure)
    model.to(torch.float16).save_pretrained(arguments.output)
    model = AutoModel.from_pretrained(arguments.output, dtype=torch.float32)
    final = {name: accuracy(model, tokenizer, drawings) for name, drawings in unseen.items()}
    report = {"drawings_asked_about": arguments.drawings, "at_the_end": final, "on_the_way": curve}
    (arguments.output / "accuracy.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(final, indent=1))
    return 0 if min(min(shares.values()) for shares in final.values()) > 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
