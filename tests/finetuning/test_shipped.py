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
"""Fine-tuning: the settings in `examples/configs`, and another library's trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from .short_runs import BUNDLED, CONFIGS, METHODS, REPOSITORY, ask, finetune, read_arguments


@pytest.mark.parametrize("method", METHODS)
def test_shipped_settings_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = [f"examples/configs/{method}.yaml", f"--output_dir={tmp_path / 'out'}", "--max_steps=2", "--use_cpu=true"]
    assert finetune.main(words) == 0
    assert read_arguments([words[0]])[0].method == method


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_accelerate_reads_the_shipped_settings(chatglm: Any, name: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    known = {name for action in launch_command_parser()._actions for name in action.option_strings}
    for key in [*config.fsdp_config, *config.deepspeed_config]:
        assert f"--{key}" in known
    layer = config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap")
    assert layer in (None, *chatglm.ChatGLMForConditionalGeneration._no_split_modules)
    assert (layer is not None) == (name == "fsdp")


def test_deepspeed_settings_fit_the_trainer(make_settings: Callable[..., list[str]], chatglm: Any) -> None:
    launcher = load_config_from_file(str(CONFIGS / "zero3.yaml")).deepspeed_config
    # The library's checks stand on Accelerate's class, but are out of reach without the package deepspeed.
    checks = {name: value for name, value in vars(HfTrainerDeepSpeedConfig).items() if not name.startswith("__")}
    config = type("Config", (HfDeepSpeedConfig,), checks)(str(REPOSITORY / launcher["deepspeed_config_file"]))
    config._dtype, config.mismatches = None, []
    assert config.is_zero3()
    _, _, arguments = read_arguments(make_settings("full"))
    config.trainer_config_process(arguments)
    config.trainer_config_finalize(arguments, chatglm.ChatGLMForConditionalGeneration.from_pretrained(BUNDLED), 10)
    # Nothing is left to a guess, and nothing contradicts the Trainer.
    assert "auto" not in json.dumps(config.config)
    assert config.get_value("train_micro_batch_size_per_gpu") == 4


# Other trainers.


@pytest.mark.slow
def test_sft_trainer_of_trl(
    case_folder: Callable[[str], Path], case_tokenizer: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    # Here, because it takes seconds to import, and is pinned for the newest Transformers only.
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = case_tokenizer("chatglm3")
    model = AutoModelForCausalLM.from_pretrained(case_folder("chatglm3"), trust_remote_code=True, dtype=torch.float32)
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        assistant_only_loss=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    dataset = Dataset.from_list([ask("你好", "我是")] * 8)
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < 0.1 * history[0]
    assert model.eval().chat(tokenizer, "你好", temperature=0, max_new_tokens=8)[0] == "我是"
