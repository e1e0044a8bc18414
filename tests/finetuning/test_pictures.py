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
"""Fine-tuning with pictures: what a row and a batch hold, what is trained, and what is refused."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import REFERENCE
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .short_runs import ask, data_arguments, finetune, finetune_data, losses, prepare, write_lines


drawings = pytest.importorskip("drawings", reason="needs Pillow")

GLM4V = REFERENCE / "glm4v"
# 32 × 32 pixels in patches of 4, two by two of which make a vector.
NUM_VECTORS = 16


@pytest.fixture
def train_file(tmp_path: Path) -> str:
    """Six conversations with a picture, in every form, and two without."""
    rng = random.Random(0)
    records: list[Any] = []
    for index in range(6):
        drawing = drawings.random_drawing(rng, drawings.TAUGHT)
        drawing.draw(40).save(tmp_path / f"{index}.png")
        (question, answer) = drawings.conversation(drawing, [("shape", "en")], rng, None)
        answer["content"] = drawing.answer(("shape", "en"))
        parts: list[Any] = [{"type": "text", "text": question["content"]}]
        if index % 3 == 0:
            question["image"] = f"{index}.png"
        elif index % 3 == 1:
            question["content"] = [{"type": "image", "path": f"{index}.png"}, *parts]
        else:
            url = f"file://{tmp_path}/{index}.png"
            question["content"] = [*parts, {"type": "image_url", "image_url": {"url": url}}]
        records.append({"messages": [question, answer]})
    records[1:1] = [ask("What is red?", "A colour."), ask("?", "!")]
    return write_lines(tmp_path / "pictures.jsonl", records)


@pytest.fixture
def settings(make_settings: Callable[..., list[str]], train_file: str) -> Callable[..., list[str]]:
    def settings(**changes: Any) -> list[str]:
        values = {"model": str(GLM4V), "train_file": train_file, "max_steps": 12, "save_steps": 100, **changes}
        return make_settings(**values)

    return settings


def reader() -> Any:
    return finetune.PictureReader.of(finetune.load_config(str(GLM4V)))


def test_rows_and_batches(case_tokenizer: Callable[[str], PreTrainedTokenizerBase], train_file: str) -> None:
    tokenizer = case_tokenizer("glm4v")
    samples = finetune_data.read_samples(train_file, data_arguments())
    rows, num_truncated = finetune_data.encode_samples(samples, tokenizer, data_arguments(), reader())
    assert num_truncated == 0
    assert [bool(row["image"]) for row in rows] == [True, False, False, *[True] * 5]
    batch = finetune_data.PaddingCollator(tokenizer.pad_token_id, reader=reader())(rows)
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    # As if the published three ids of a picture were given.
    model = AutoModelForCausalLM.from_pretrained(GLM4V).eval()
    plain = [tokenizer.apply_chat_template(sample.messages, return_assistant_tokens_mask=True) for sample in samples]
    for index, (row, given) in enumerate(zip(rows, plain)):
        more = NUM_VECTORS - 1 if row["image"] else 0
        assert len(row["input_ids"]) == len(row["labels"]) == len(given["input_ids"]) + more
        labels = [
            token if is_answer else -100 for token, is_answer in zip(given["input_ids"], given["assistant_masks"])
        ]
        pictures = {"images": given["images"]} if "images" in given else {}
        ids = torch.tensor([given["input_ids"]])
        expected = model(ids, labels=torch.tensor([labels]), **pictures).loss
        alone = finetune_data.PaddingCollator(tokenizer.pad_token_id, reader=reader())([row])
        assert torch.allclose(model(**alone).loss, expected, atol=1e-5), index
    shown = finetune_data.show_row(rows[0], tokenizer)
    assert f"<|begin_of_image|><|endoftext|>×{NUM_VECTORS}<|end_of_image|>" in shown and "⟦" in shown


@pytest.mark.parametrize("target_modules", ["all-linear", "query_key_value", "query,value"])
def test_adapters_of_the_text_part(settings: Callable[..., list[str]], tmp_path: Path, target_modules: str) -> None:
    is_long = target_modules == "all-linear"
    changes = {"eval_file": str(tmp_path / "pictures.jsonl"), "generate_samples": 3, "max_new_tokens": 4}
    job = prepare(
        settings(
            target_modules=[target_modules],
            learning_rate=2e-2,
            per_device_train_batch_size=8,
            gradient_checkpointing=not is_long,
            **(changes if is_long else {"max_steps": 2}),
        )
    )
    trained = {name for name, weight in job.trainer.model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name and "vision" not in name for name in trained)
    finetune.train(job)
    base = AutoModelForCausalLM.from_pretrained(GLM4V)
    untouched = dict(base.named_parameters())
    tower = dict(job.trainer.model.get_base_model().transformer.vision.named_parameters())
    assert tower and all(weight.equal(untouched[f"transformer.vision.{name}"]) for name, weight in tower.items())
    if not is_long:
        return
    fallen = losses(tmp_path / "out")
    assert fallen[-1] < 0.7 * fallen[0]
    assert len((tmp_path / "out" / "samples.md").read_text(encoding="utf-8").splitlines()) == 2 + 3
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    batch = job.trainer.data_collator([job.trainer.train_dataset[0]])
    with torch.no_grad():
        expected = job.trainer.model.eval()(**batch).logits
        assert loaded(**batch).logits.equal(expected)
        assert not loaded(**{**batch, "pixel_values": batch["pixel_values"].flip(3)}).logits.equal(expected)
    # It goes on from there.
    again = prepare(settings(adapter=str(tmp_path / "out"), output_dir=str(tmp_path / "on"), target_modules=None))
    assert {name for name, weight in again.trainer.model.named_parameters() if weight.requires_grad} == trained


@pytest.mark.parametrize("method", ["full", "freeze", "lora", "ptuning"])
def test_what_is_trained(settings: Callable[..., list[str]], tmp_path: Path, method: str) -> None:
    for freeze_vision in (True, False):
        output = str(tmp_path / f"out-{freeze_vision}")
        job = prepare(settings(method=method, freeze_vision=freeze_vision, output_dir=output, max_steps=1))
        weights = job.trainer.model.named_parameters()
        sees = [name for name, weight in weights if weight.requires_grad and ".vision." in name]
        assert bool(sees) == (not freeze_vision and method != "ptuning")
        if method == "ptuning" and freeze_vision:
            job.trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": str(REFERENCE / "glm4")}, r"pictures.jsonl:1: there is a picture, and this model reads text alone"),
        ({"model": str(REFERENCE / "chatglm3")}, "has a picture, and this generation reads text alone"),
        ({"max_length": 8}, "nothing to learn, since max_length=8"),
        ({"packing": True}, "packing: a row may hold one picture"),
        ({"method": "prompt_tuning"}, "method: a prompt of PEFT"),
        ({"freeze_vision": False, "target_modules": ["query"]}, "freeze_vision: query, key and value"),
    ],
)
def test_what_does_not_go_with_pictures(
    settings: Callable[..., list[str]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(settings(**changes))


def test_pictures_that_cannot_be_read(settings: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match=r"pictures.jsonl:1: the picture .*0.png cannot be read: .*No such file"):
        prepare(settings())
    (tmp_path / "0.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    job = prepare(settings())
    with pytest.raises(ValueError, match="0.png: "):
        job.trainer.data_collator([job.trainer.train_dataset[0]])
