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
"""`chat` through PEFT's model: adapters inside of the layers, and soft prompts, which PEFT keeps outside of the model."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from generations import CAUSAL_CASES, GENERATION_CASES
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase


CASES = [name for name in GENERATION_CASES if name in CAUSAL_CASES]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
KINDS = ["prompt tuning", "prefix tuning", "p-tuning"]

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture
def make_pair(case_folder: Callable[[str], Path], case_tokenizer: Callable[[str], Any]) -> Callable[[str], Pair]:
    """A model that a test may change, and its tokenizer. A copy of a used one may have hooks that no pickle takes."""
    return lambda name: (
        AutoModel.from_pretrained(case_folder(name), trust_remote_code=True, dtype=torch.float32),
        case_tokenizer(name),
    )


def add_soft_prompt(model: PreTrainedModel, kind: str) -> Any:
    """PEFT's model with a soft prompt that has an effect."""
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    if kind == "prefix tuning":
        heads = model.config.num_key_value_heads
        settings |= {"num_attention_heads": heads, "token_dim": heads * model.config.head_dim}
        config: Any = peft.PrefixTuningConfig(**settings)
    else:
        config = (peft.PromptTuningConfig if kind == "prompt tuning" else peft.PromptEncoderConfig)(**settings)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.normal_(std=3.0)
    return adapted


def read(tokenizer: PreTrainedTokenizerBase, new_ids: torch.Tensor) -> str:
    ids = new_ids.tolist()
    return tokenizer.decode(ids[:-1] if ids[-1] in tokenizer.stop_token_ids() else ids).strip()


def answer_by_hand(adapted: Any, tokenizer: PreTrainedTokenizerBase, query: str) -> str:
    """The most likely tokens, one forward pass of PEFT's model after the other."""
    ids = tokenizer.build_chat_input(query)["input_ids"]
    start = ids.shape[1]
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            logits = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1] in tokenizer.stop_token_ids():
            break
    return read(tokenizer, ids[0, start:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_soft_prompts_have_their_effect_in_every_kind_of_chat(
    make_pair: Callable[[str], Pair], name: str, kind: str
) -> None:
    model, tokenizer = make_pair(name)
    plain = model.chat(tokenizer, "你好", **GREEDY)
    adapted = add_soft_prompt(model, kind)
    expected = adapted.chat(tokenizer, "你好", **GREEDY)
    assert expected[0].strip() == answer_by_hand(adapted, tokenizer, "你好")
    assert expected != plain
    assert list(adapted.stream_chat(tokenizer, "你好", **GREEDY))[-1] == expected
    assert adapted.batch_chat(tokenizer, ["你好", "a longer message"], **GREEDY)[0][0] == expected[0]
    ids = tokenizer.build_chat_input("你好")["input_ids"]
    streamed = list(adapted.stream_generate(ids, eos_token_id=tokenizer.stop_token_ids(), **GREEDY))
    assert read(tokenizer, streamed[-1][0, ids.shape[1] :]) == expected[0].strip()
    # The model inside knows nothing of it.
    assert model.chat(tokenizer, "你好", **GREEDY) == plain
    with adapted.disable_adapter():
        assert adapted.chat(tokenizer, "你好", **GREEDY) == plain
    assert adapted.chat(tokenizer, "你好", **GREEDY) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_soft_prompts_change_nothing(make_pair: Callable[[str], Pair], kind: str) -> None:
    model, tokenizer = make_pair("chatglm3")
    _, history, plain_cache = model.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    adapted = add_soft_prompt(model, kind)
    *_, cache = adapted.chat(tokenizer, "你好", return_past_key_values=True, **GREEDY)
    expected = adapted.chat(tokenizer, "再见", history=history, **GREEDY)
    for reused in (cache, plain_cache):
        assert adapted.chat(tokenizer, "再见", history=history, past_key_values=reused, **GREEDY) == expected
        stream = adapted.stream_chat(tokenizer, "再见", history, past_key_values=reused, **GREEDY)
        assert list(stream)[-1] == expected
    expected = model.chat(tokenizer, "再见", history=history, **GREEDY)
    for reused in (cache, plain_cache):
        assert model.chat(tokenizer, "再见", history=history, past_key_values=reused, **GREEDY) == expected
    with pytest.raises(ValueError, match="return_past_key_values"):
        adapted.stream_generate(torch.tensor([[5, 6]]), return_past_key_values=True)


def test_a_loaded_and_a_copied_soft_prompt_work(make_pair: Callable[[str], Pair], tmp_path: Any) -> None:
    model, tokenizer = make_pair("chatglm3")
    plain = model.chat(tokenizer, "你好", **GREEDY)
    adapted = add_soft_prompt(copy.deepcopy(model), "prompt tuning")
    expected = adapted.chat(tokenizer, "你好", **GREEDY)
    assert expected != plain
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    assert again.chat(tokenizer, "你好", **GREEDY) == expected
    for copied in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        with torch.no_grad():
            adapted.prompt_encoder["default"].embedding.weight.zero_()
        assert copied.chat(tokenizer, "你好", **GREEDY) == expected


def test_what_soft_prompts_cannot_do_is_refused(make_pair: Callable[[str], Pair]) -> None:
    model, tokenizer = make_pair("chatglm1")
    adapted = add_soft_prompt(model, "prompt tuning")
    for method in (adapted.chat, adapted.stream_chat, adapted.batch_chat):
        with pytest.raises(ValueError, match="ChatGLM-6B.*LoRA"):
            method(tokenizer, "你好")
    assert model.chat(tokenizer, "你好", **GREEDY)[0]
    model, tokenizer = make_pair("chatglm3")
    adapted = add_soft_prompt(model, "prompt tuning")
    with pytest.raises(ValueError, match="ignore the soft prompt.*batch_chat"):
        adapted.generate_batch([[5, 6]])


@pytest.mark.parametrize("name", ["chatglm1", *CASES])
def test_lora_chats(make_pair: Callable[[str], Pair], name: str) -> None:
    model, tokenizer = make_pair(name)
    plain = model.chat(tokenizer, "你好", **GREEDY)
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=64, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings).eval()
    expected = adapted.chat(tokenizer, "你好", **GREEDY)
    assert expected != plain
    inputs = tokenizer.build_chat_input("你好")
    output = adapted.generate(**inputs, eos_token_id=tokenizer.stop_token_ids(), **GREEDY)
    assert read(tokenizer, output[0, inputs["input_ids"].shape[1] :]) == expected[0].strip()
    assert list(adapted.stream_chat(tokenizer, "你好", **GREEDY))[-1] == expected
    with adapted.disable_adapter():
        assert adapted.chat(tokenizer, "你好", **GREEDY) == plain
    assert adapted.chat(tokenizer, "你好", **GREEDY) == expected
