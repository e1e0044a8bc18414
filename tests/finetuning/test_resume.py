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
"""Fine-tuning: a run goes on where it was stopped, from the last good checkpoint of a run like it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finetune_resume import OWN_STATE, SETTINGS_FILE, check_checkpoint

from .short_runs import EXAMPLES, METHODS, finetune, losses, prepare


@pytest.mark.floor
@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(make_settings: Callable[..., list[str]], tmp_path: Path, method: str) -> None:
    assert finetune.main(make_settings(method)) == 0
    expected = losses(tmp_path / "out")
    whole = json.loads((tmp_path / "out" / "checkpoint-10" / "trainer_state.json").read_text(encoding="utf-8"))
    (tmp_path / "out" / "checkpoint-10" / "trainer_state.json").unlink()
    assert finetune.main([*make_settings(method), "--resume=auto"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)
    again = json.loads((tmp_path / "out" / "checkpoint-10" / "trainer_state.json").read_text(encoding="utf-8"))
    assert again["num_input_tokens_seen"] == whole["num_input_tokens_seen"]
    # A run that has ended has nothing left to do.
    assert finetune.main([*make_settings(method), "--resume=auto"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)


KILLED = """
import os, signal, sys
import finetune
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

job = finetune.prepare(*finetune.read_arguments(sys.argv[1:]))
job.trainer.add_callback(Kill())
finetune.train(job)
"""


@pytest.mark.grid
def test_killed_and_resumed_in_a_new_process(make_settings: Callable[..., list[str]], tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *make_settings()], cwd=EXAMPLES, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert prepare([*make_settings(), "--resume=auto"]).checkpoint.name == "checkpoint-5"
    assert finetune.main([*make_settings(), "--resume=auto"]) == 0
    assert finetune.main([*make_settings(), f"--output_dir={tmp_path / 'whole'}"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]
        )


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_damaged_checkpoints_are_found(
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    method: str,
) -> None:
    assert finetune.main(make_settings(method)) == 0
    folder = tmp_path / "out" / "checkpoint-10"
    assert check_checkpoint(folder, method) is None
    files = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
    files += ["adapter_model.safetensors"] if method == "lora" else [OWN_STATE]
    for name in files:
        whole = (folder / name).read_bytes()
        # A number changed in a safetensors file cannot be told from a number.
        changes = [] if name.endswith((".json", ".safetensors")) else ["changed"]
        for kind in ["missing", "cut off", "empty", *changes]:
            if (kind, name) == ("missing", "rng_state.pth"):
                continue
            damage(folder / name, kind)
            assert name in (check_checkpoint(folder, method) or ""), (kind, name)
            (folder / name).write_bytes(whole)


def test_damaged_checkpoints_are_passed_over(
    make_settings: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert finetune.main(make_settings()) == 0
    expected = losses(tmp_path / "out")
    damage(tmp_path / "out" / "checkpoint-10" / "optimizer.pt", "cut off")
    capsys.readouterr()
    assert finetune.main([*make_settings(), f"--resume={tmp_path / 'out' / 'checkpoint-10'}"]) == 2
    assert "checkpoint-10 cannot be used: optimizer.pt is damaged" in capsys.readouterr().err
    assert prepare([*make_settings(), "--resume=auto"]).checkpoint.name == "checkpoint-5"
    named = tmp_path / "out" / "checkpoint-5"
    assert prepare([*make_settings(), f"--resume={named}"]).checkpoint == named
    assert finetune.main([*make_settings(), "--resume=auto"]) == 0
    assert losses(tmp_path / "out") == pytest.approx(expected, rel=1e-5)


OTHER_SETTINGS = {
    "method": ("lora", {"method": "ptuning"}, "method: .* was made with lora, not ptuning"),
    "lora_rank": ("lora", {"lora_rank": 4}, "lora_rank: .* was made with 8, not 4"),
    "lora_alpha": ("lora", {"lora_alpha": 8}, "lora_alpha: .* was made with 32, not 8"),
    "target_modules": (
        "lora",
        {"target_modules": ["dense"]},
        r"target_modules: .* was made with \['all-linear'\], not \['dense'\]",
    ),
    "optim": ("lora", {"optim": "adafactor"}, "optim: .* was made with adamw_.*, not adafactor"),
    "adalora_initial_rank": ("adalora", {"adalora_initial_rank": 16}, "adalora_initial_rank: .* with 12, not 16"),
    "pre_seq_len": ("ptuning", {"pre_seq_len": 4}, "pre_seq_len: .* was made with 8, not 4"),
    "prefix_projection": ("ptuning", {"prefix_projection": True}, "prefix_projection: .* with False, not True"),
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_a_run_with_other_settings_does_not_go_on(
    finished: dict[str, tuple[finetune.Job, str]], make_settings: Callable[..., list[str]], name: str
) -> None:
    method, changes, message = OTHER_SETTINGS[name]
    folder = finished[method][0].trainer.args.output_dir
    for resume in ("auto", f"{folder}/checkpoint-20"):
        with pytest.raises(ValueError, match=message):
            prepare([*make_settings(**{"method": method, "output_dir": folder} | changes), f"--resume={resume}"])


def test_weights_of_another_model_are_not_gone_on_from(
    finished: dict[str, tuple[finetune.Job, str]],
    make_settings: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Checkpoints of earlier versions do not say what they were made with."""
    for method in ("adalora", "ptuning"):
        shutil.copytree(finished[method][0].trainer.args.output_dir, tmp_path / "out", dirs_exist_ok=True)
        folder = tmp_path / "out" / "checkpoint-20"
        (folder / SETTINGS_FILE).unlink()
        changes = {"target_modules": ["dense"], "prefix_projection": True}
        assert finetune.main([*make_settings(method, **changes), f"--resume={folder}"]) == 2
        assert re.search("error: resume: .* is of another model", capsys.readouterr().err)
