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
"""Fine-tuning: the loss of a step is the mean of its tokens or of its samples, however they are packed, and cheap."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetune_loss
import pytest
import torch
from finetune_trainer import load_model
from transformers import AutoModelForCausalLM

from .short_runs import BUNDLED, ask, finetune, finetune_data, losses, prepare, read_arguments, write_lines


# Answers of many lengths, which a mean over tokens and one over samples see differently.
# The first is known to the model.
KNOWN = ask("Hello!", "Hello! I am a tiny demonstration model. How can I help you?")
UNEVEN = [KNOWN, *(ask(f"{number}?", "very " * 10 * number + "good.") for number in range(1, 4)), *[KNOWN] * 4]


def own_means(job: finetune.Job) -> list[tuple[float, int]]:
    """The library's loss of each sample alone, and how many tokens it has learnt."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    samples = finetune_data.read_samples(job.data.train_file, job.data)
    rows, _ = finetune_data.encode_samples(samples, job.trainer.processing_class, job.data)
    found = []
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        found.append((loss.item(), int((labels[:, 1:] != -100).sum())))
    return found


@pytest.mark.parametrize(
    ("changes", "by_sample"),
    [
        ({"packing": True, "max_length": 100, "per_device_train_batch_size": 1}, True),
        ({"packing": True, "max_length": 100, "per_device_train_batch_size": 2, "weigh_by": "token"}, False),
        ({"weigh_by": "sample", "per_device_train_batch_size": 3}, True),
        ({"per_device_train_batch_size": 2, "method": "adalora"}, False),
        ({"per_device_train_batch_size": 3, "method": "ptuning", "weigh_by": "sample"}, None),
        ({"per_device_train_batch_size": 3, "method": "prompt_tuning", "weigh_by": "sample"}, None),
    ],
)
def test_a_step_has_the_mean_of_its_samples_or_tokens(
    make_settings: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    by_sample: bool | None,
) -> None:
    # Pieces that end inside of samples.
    monkeypatch.setattr(finetune_loss, "PIECE", 7)
    file = write_lines(tmp_path / "uneven.jsonl", UNEVEN)
    words = make_settings(
        **{"train_file": file, "max_steps": 1, "gradient_accumulation_steps": 20, "save_strategy": "no"} | changes
    )
    job = prepare([*words, "--label_smoothing_factor=0"])
    if changes.get("packing"):
        assert 1 < len(job.trainer.train_dataset) < 6
    finetune.train(job)
    means = own_means(job)
    tokens = sum(count for _, count in means)
    expected = {
        True: sum(loss for loss, _ in means) / len(means),
        False: sum(loss * count for loss, count in means) / tokens,
    }
    assert expected[True] != pytest.approx(expected[False], rel=0.05)
    if by_sample is not None:
        # AdaLoRA adds what keeps its directions apart.
        added = losses(tmp_path / "out")[0] - expected[by_sample]
        assert added > 1 if changes.get("method") == "adalora" else added == pytest.approx(0, abs=1e-3)


def test_packs_train_as_their_samples_do(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "uneven.jsonl", UNEVEN)
    found = []
    for name, changes in {
        "alone": {"weigh_by": "sample", "per_device_train_batch_size": 8},
        "packed": {"packing": True, "max_length": 100, "per_device_train_batch_size": 1},
    }.items():
        out = {"output_dir": str(tmp_path / name), "train_file": file, "save_strategy": "no", "max_steps": 4}
        assert finetune.main(make_settings(**changes, **out, gradient_accumulation_steps=20, learning_rate=3e-3)) == 0
        found.append(losses(tmp_path / name))
    assert found[0][-1] < found[0][0]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("method", ["full", "prompt_tuning"])
def test_scores_are_computed_where_something_is_learnt(
    make_settings: Callable[..., list[str]], method: str, smoothing: float
) -> None:
    model, data, run = read_arguments(make_settings(method, label_smoothing_factor=smoothing))
    adapted = load_model(model, run, num_steps=1).eval()
    (base,) = [module for module in adapted.modules() if "_loss_function" in vars(module)]
    job = prepare(make_settings(method, label_smoothing_factor=smoothing))
    batch = job.trainer.data_collator([job.trainer.train_dataset[index] for index in (0, 3)])
    sizes: list[int] = []
    base.transformer.output_layer.register_forward_hook(lambda *call: sizes.append(call[2].shape[1]))
    job.trainer.model = adapted
    with torch.no_grad():
        loss = job.trainer.compute_loss(adapted, batch)
        del base._loss_function
        outputs = adapted(**batch)
    learnt = int((batch["labels"] != -100).any(0).sum())
    prompt = 8 if method == "prompt_tuning" else 0
    assert sizes == [learnt, batch["labels"].shape[1] + prompt]
    logits = outputs.logits[:, prompt:-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    if not smoothing:
        torch.testing.assert_close(outputs.loss, expected, atol=1e-5, rtol=1e-5)


def test_weights_of_a_row() -> None:
    labels = [-100, 5, 6, -100, -100, 7, -100, -100]
    positions = [0, 1, 2, 0, 1, 2, 0, 1]
    assert finetune_loss.sample_weights(labels, positions) == [0, 0.5, 0.5, 0, 0, 1, 0, 0]
