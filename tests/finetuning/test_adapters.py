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
"""Fine-tuning: the result of an earlier run is trained on, if it fits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .short_runs import finetune, losses, prepare


def test_an_adapter_is_trained_on(
    finished: dict[str, tuple[finetune.Job, str]],
    make_settings: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    for method in ("lora", "ptuning"):
        job, out = finished[method][0], tmp_path / method
        settings = make_settings(
            method,
            adapter=job.trainer.args.output_dir,
            train_file=job.data.train_file,
            max_steps=2,
            output_dir=str(out),
        )
        assert finetune.main(settings) == 0
        # It begins where the other run ended.
        assert losses(out)[0] < 1.5 * losses(Path(job.trainer.args.output_dir))[-1]


def test_adapters_of_other_models(
    finished: dict[str, tuple[finetune.Job, str]],
    make_settings: Callable[..., list[str]],
    reference_dir: Path,
    tmp_path: Path,
) -> None:
    adapter = finished["lora"][0].trainer.args.output_dir
    with pytest.raises(ValueError, match="was made for chatglm3, and .* is glm4"):
        prepare(make_settings(model=str(reference_dir / "glm4"), adapter=adapter))
    with pytest.raises(ValueError, match=r"is of another model: .* is \d+ wide there, \d+ here"):
        prepare(make_settings(model=str(reference_dir / "chatglm3"), adapter=adapter))
    adapter = finished["adalora"][0].trainer.args.output_dir
    with pytest.raises(ValueError, match="was made by adalora, and the method is lora"):
        prepare(make_settings(adapter=adapter))
    with pytest.raises(ValueError, match="merge it into the checkpoint first"):
        prepare(make_settings("adalora", adapter=adapter))


CHANGES = {
    "lora_rank": ("lora", {"lora_rank": 4}, "lora_rank: .* was made with 8, not 4; leave lora_rank out"),
    "lora_alpha": ("lora", {"lora_alpha": 8}, "lora_alpha: .* was made with 32, not 8"),
    "lora_dropout": ("lora", {"lora_dropout": 0.5}, "lora_dropout: .* was made with 0.0, not 0.5"),
    "fewer layers": (
        "lora",
        {"target_modules": ["query_key_value"]},
        r"target_modules: .* adapts 16 layers .* names 4;",
    ),
    "pre_seq_len": ("ptuning", {"pre_seq_len": 16}, "pre_seq_len: .* was made with 8, not 16"),
    "projection": ("ptuning", {"prefix_projection": True}, "prefix_projection: .* was made with False, not True"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_with_other_settings(
    finished: dict[str, tuple[finetune.Job, str]], make_settings: Callable[..., list[str]], name: str
) -> None:
    method, changes, message = CHANGES[name]
    with pytest.raises(ValueError, match=message):
        prepare(make_settings(method, adapter=finished[method][0].trainer.args.output_dir, **changes))


def test_an_adapter_brings_its_own_sizes(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    made_with = {
        "lora": {
            "lora_rank": 3,
            "lora_alpha": 6,
            "lora_dropout": 0.25,
            "target_modules": ["query_key_value", "dense"],
        },
        "ptuning": {"pre_seq_len": 5, "prefix_projection": True},
    }
    for method, settings in made_with.items():
        first, second = tmp_path / f"{method}1", tmp_path / f"{method}2"
        assert finetune.main(make_settings(method, max_steps=1, output_dir=str(first), **settings)) == 0
        unsaid = dict.fromkeys(settings)
        job = prepare(make_settings(method, adapter=str(first), output_dir=str(second), **unsaid))
        for name, value in settings.items():
            found = getattr(job.model, name)
            assert (sorted(found), sorted(value)) if name == "target_modules" else found == value
        # Saying the same again is no contradiction.
        job = prepare(make_settings(method, adapter=str(first), output_dir=str(second), **settings))
        sizes = {weight.shape for name, weight in job.trainer.model.named_parameters() if weight.requires_grad}
        assert any({3, 5} & set(size) for size in sizes)


def test_damaged_adapters(
    finished: dict[str, tuple[finetune.Job, str]],
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    files = {"lora": ("adapter_model.safetensors", "adapter_config.json"), "ptuning": ("prefix_encoder.safetensors",)}
    for method, names in files.items():
        for name in names:
            folder = tmp_path / name
            shutil.copytree(finished[method][0].trainer.args.output_dir, folder)
            for content in (b"", b"[]", (folder / name).read_bytes()[:100]):
                (folder / name).write_bytes(content)
                assert finetune.main(make_settings(method, adapter=str(folder))) == 2
                (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
                assert error.startswith("error: adapter: ")
                assert name in error
