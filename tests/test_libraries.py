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
"""The libraries around Transformers work on these models: PEFT, Trainer, accelerate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)


GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 98}
SOFT_PROMPTS = {
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def prompt(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int = 12) -> list[float]:
    """The losses of a few steps on one batch."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["query_key_value", "all-linear"])
def test_lora_trains_merges_and_reloads(
    case_folder: Callable[[str], Path], tmp_path: Path, targets: str, checkpointing: bool
) -> None:
    folder, ids = case_folder("chatglm3"), prompt()
    load = {"trust_remote_code": True, "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(folder, **load)
    targets = [targets] if targets == "query_key_value" else targets
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    losses = train(model, ids)
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids).logits
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, **load)
        torch.testing.assert_close(again(ids).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", SOFT_PROMPTS.values(), ids=SOFT_PROMPTS)
def test_soft_prompts_train_and_generate(tiny_model: Callable[..., PreTrainedModel], settings: PeftConfig) -> None:
    ids = prompt()
    model = get_peft_model(tiny_model(), settings).train()
    losses = train(model, ids, steps=30)
    assert losses[-1] < losses[0]
    model.eval()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        alone = model(input_ids=ids[1:, 3:], attention_mask=mask[1:, 3:]).logits[:, -8:]
        torch.testing.assert_close(logits[1:, 3:], alone, atol=1e-4, rtol=1e-4)
        first = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, ids.shape[1]]
        assert torch.equal(first, logits[:, -1].argmax(-1))


def test_embeddings_resized_before_an_adapter_is_loaded(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, load = case_folder("chatglm3"), {"trust_remote_code": True, "dtype": torch.float32}
    base = AutoModelForCausalLM.from_pretrained(folder, **load)
    base.resize_token_embeddings(530)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules=["query_key_value"],
        modules_to_save=["word_embeddings", "output_layer"],
    )
    model = get_peft_model(base, settings)
    train(model, torch.tensor([[5, 520, 7]]), steps=2)
    model.eval().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, **load)
    base.resize_token_embeddings(530)
    base.load_adapter(tmp_path)
    with torch.no_grad():
        ids = torch.tensor([[5, 520, 7]])
        torch.testing.assert_close(base(ids).logits, model(ids).logits)


def test_trainer_trains_saves_and_evaluates(
    case_folder: Callable[[str], Path], case_tokenizer: Callable[[str], PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    tokenizer = case_tokenizer("chatglm3")
    model = AutoModelForCausalLM.from_pretrained(case_folder("chatglm3"), trust_remote_code=True, dtype=torch.float32)
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "我是"}]
    rows = []
    for _ in range(8):
        row = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
        labels = [token if kept else -100 for token, kept in zip(row["input_ids"], row["assistant_masks"])]
        rows.append({"input_ids": row["input_ids"], "attention_mask": [1] * len(labels), "labels": labels})
    arguments = TrainingArguments(
        tmp_path,
        max_steps=20,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        gradient_checkpointing=True,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 * before
    trainer.save_model(tmp_path / "saved")
    # The folder is complete: weights, tokenizer and code.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert (tmp_path / "saved" / "tokenizer.model").is_file()
    assert again.eval().chat(tokenizer, "你好", do_sample=False, max_new_tokens=8)[0] == "我是"


def test_accelerate_dispatches_a_checkpoint(case_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, ids = case_folder("chatglm3"), prompt()
    reference = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    reference.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert next(model.parameters()).device.type == "meta"
    model = load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    torch.testing.assert_close(model.eval()(ids).logits, reference(ids).logits)
