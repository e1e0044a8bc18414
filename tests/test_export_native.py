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
"""`scripts/export_native.py` writes a folder that loads without this repository's code and gives its results."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from generations import RECORDED
from safetensors.torch import save_file
from test_conversation_rendering import JOINER, hostile_chats, hostile_text
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM, PreTrainedTokenizerBase


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import export_native  # noqa: E402
import native_tokenizer  # noqa: E402
from recognise_checkpoint import recognise  # noqa: E402


CASES = [name for name, case in RECORDED.items() if case.is_causal and not case.is_quantized]
FIRST_CASES = [name for name in CASES if RECORDED[name].is_first]


def names_the_case(name: str) -> list[str]:
    """What the folder of a case alone may not tell: ChatGLM2 from ChatGLM3."""
    return ["--model-version", RECORDED[name].model_version]


@pytest.mark.parametrize("name", CASES)
def test_the_library_loads_it_and_gives_the_recorded_results(
    case: Callable[[str], Any], reference_dir: Path, tmp_path: Path, name: str
) -> None:
    out, expected = tmp_path / "native", case(name)
    words = [str(reference_dir / name), str(out), *names_the_case(name), "--max-shard-size", "100KB"]
    assert export_native.main(words) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    # Read by mlx-lm alone, whose own class gives other answers: `test_mlx.py`.
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert [file.name for file in out.glob("*.py")] == [config["model_file"]]
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model) is GlmForCausalLM
    tensors = expected.tensors
    with torch.no_grad():
        logits = model(tensors["single.input_ids"]).logits
        torch.testing.assert_close(logits, tensors["single.logits"], atol=1e-4, rtol=0)
        ids, mask = tensors["batch.input_ids"], tensors["batch.attention_mask"]
        # The recorded answers may hold role tokens, and no other end tokens.
        forbidden = json.loads((reference_dir / name / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
        forbidden = forbidden if isinstance(forbidden, list) else [forbidden]
        greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "suppress_tokens": forbidden}
        answers = model.generate(ids, attention_mask=mask, **greedy)[:, ids.shape[1] :]
    assert answers.tolist() == expected.expected["batch"]["greedy_new_ids"]


def test_quantized_weights_become_floats_on_request(
    case: Callable[[str], Any], case_folder: Callable[[str], Path], reference_dir: Path, tmp_path: Path
) -> None:
    name, out = "chatglm2-int4", tmp_path / "native"
    assert export_native.main([str(reference_dir / name), str(out), *names_the_case(name), "--dequantize"]) == 0
    ours = AutoModel.from_pretrained(case_folder(name), trust_remote_code=True)
    native = AutoModelForCausalLM.from_pretrained(out)
    assert native.dtype == torch.float16 and not hasattr(native.config, "quantization_config")
    ids = case(name).tensors["single.input_ids"]
    with torch.no_grad():
        expected = ours.dequantize(torch.float16).float()(ids).logits
        torch.testing.assert_close(native.float()(ids).logits, expected, atol=1e-4, rtol=0)


def our_tokenizer(folder: Path, version: str) -> Any:
    return native_tokenizer.load_tokenizer(recognise(folder, version))


def plain_text(rng: random.Random) -> str:
    """A text without joiners, which the normalizer takes out before what looks like a control token."""
    return hostile_text(rng).replace(JOINER, "")


def compare_tokenizers(ours: Any, native: PreTrainedTokenizerBase, texts: list[str]) -> None:
    is_sentencepiece = ours.always_splits
    for text in texts:
        split = {"split_special_tokens": True} if is_sentencepiece else {}
        assert native(text, **split)["input_ids"] == ours(text)["input_ids"], text
        assert native(text, "b", **split)["input_ids"] == ours(text, "b")["input_ids"], text
        ids = ours.encode(text, add_special_tokens=False)
        if "\ufffd" not in ours.decode(ids):
            assert native.decode(ids, skip_special_tokens=True) == ours.decode(ids, skip_special_tokens=True), text


def compare_conversations(ours: Any, native: PreTrainedTokenizerBase, count: int) -> None:
    uses_pairs, is_sentencepiece = ours.chat_format.uses_pairs, ours.always_splits
    compared = 0
    for chat in hostile_chats(random.Random(0), not uses_pairs, count):
        ends_with_answer = chat[-1]["role"] == "assistant"
        if not is_sentencepiece:
            # See the module: a line break at the beginning of a message.
            for message in chat:
                message["content"] = message["content"].lstrip()
        for is_open in {False, not (ends_with_answer and uses_pairs)}:
            options = {"add_generation_prompt": is_open, "return_dict": False}
            ids = ours.apply_chat_template(chat, **options)
            assert native.apply_chat_template(chat, **options) == ids, (chat, is_open)
            compared += 1
    assert compared > count


@pytest.mark.parametrize("name", FIRST_CASES)
def test_the_tokenizer_gives_our_ids(reference_dir: Path, tmp_path: Path, name: str) -> None:
    ours = our_tokenizer(reference_dir / name, RECORDED[name].model_version)
    native_tokenizer.save_native_tokenizer(native_tokenizer.native_tokenizer(ours), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "glm"}', encoding="utf-8")
    native = AutoTokenizer.from_pretrained(tmp_path)
    assert len(native) == len(ours) and native.padding_side == "left"
    assert native.eos_token_id == ours.eos_token_id and native.pad_token_id == ours.pad_token_id
    rng = random.Random(0)
    compare_tokenizers(ours, native, ["", "你好", "  sop eop", *(plain_text(rng) for _ in range(300))])
    compare_conversations(ours, native, 200)


@pytest.mark.grid
@pytest.mark.parametrize("name", FIRST_CASES)
def test_the_published_vocabulary(real_tokenizers: Path, reference_dir: Path, tmp_path: Path, name: str) -> None:
    version = RECORDED[name].model_version
    shutil.copytree(real_tokenizers / version, tmp_path, dirs_exist_ok=True)
    shutil.copyfile(reference_dir / name / "config.json", tmp_path / "config.json")
    ours = our_tokenizer(tmp_path, version)
    compare_conversations(ours, native_tokenizer.native_tokenizer(ours), 100)


def test_tools_and_calls(reference_dir: Path) -> None:
    function = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    chat = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"celsius": 18}'},
        {"role": "assistant", "content": "It is 18 degrees."},
    ]
    for name in ("chatglm3", "glm4"):
        ours = our_tokenizer(reference_dir / name, RECORDED[name].model_version)
        native = native_tokenizer.native_tokenizer(ours)
        for messages in (chat[:1], chat[:3], chat, [{"role": "system", "content": ""}, *chat]):
            options = {"tools": [{"type": "function", "function": function}], "return_dict": False}
            expected = ours.apply_chat_template(messages, add_generation_prompt=True, **options)
            assert native.apply_chat_template(messages, add_generation_prompt=True, **options) == expected
        text = ours.decode(ours.encode("weather\n{}", add_special_tokens=False))
        assert native.parse_response(text, prefix="") == ours.parse_response(text, prefix="")


def test_a_template_of_ones_own_stays(reference_dir: Path) -> None:
    ours = our_tokenizer(reference_dir / "glm4", "glm4")
    ours.chat_template = "{{ messages }}"
    assert native_tokenizer.native_tokenizer(ours).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("chatglm1", "chatglm", "context sees itself both ways; its positions have two rows"),
        ("glm-gpt2", "glm", "its positions are embeddings"),
        ("glm-130b", "glm130b", "the gate is the second half"),
        ("glm4v", "glm4", "it has eyes"),
        ("chatglm2-int4", "chatglm2", "the weights are quantized"),
    ],
)
def test_what_is_refused(
    reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, version: str, reason: str
) -> None:
    assert export_native.main([str(reference_dir / name), str(tmp_path / "out"), "--model-version", version]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_or_left_behind(
    reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(reference_dir / "glm4"), str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    assert export_native.main(words) == 1 and "exists" in capsys.readouterr().err
    (tmp_path / "out").rmdir()

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(native_tokenizer, "save_native_tokenizer", fail)
    assert export_native.main(words) == 1 and "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"pre_seq_len": 5}}, "prefix of P-tuning"),
        ({"settings": {"fp32_residual_connection": True}}, "kept in float32"),
        ({"settings": {"kv_channels": 16}}, "config.json does not say"),
        ({"settings": {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, "quantized by 'gptq'"),
        ({"weights": {"score.weight": torch.ones(1)}}, "no place for 1 weights, such as score.weight"),
        ({"removed": "transformer.encoder.final_layernorm.weight"}, "1 weights are missing"),
        ({"removed": None}, "has no weights"),
    ],
)
def test_folders_that_do_not_fit(
    reference_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "folder"
    weights = torch.load(reference_dir / "glm4" / "pytorch_model.bin", weights_only=True)
    shutil.copytree(reference_dir / "glm4", folder, ignore=shutil.ignore_patterns("*.bin", "expected.*"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change.get("settings", {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights |= change.get("weights", {})
    if "removed" in change:
        weights.pop(change["removed"], None)
    if change.get("removed", "") is not None:
        save_file(weights, folder / "model.safetensors")
    assert export_native.main([str(folder), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_what_is_read_is_in_memory(reference_dir: Path) -> None:
    checkpoint = recognise(reference_dir / "glm4", "glm4")
    config = export_native.read_config(checkpoint)
    weights = export_native.native_weights(config, export_native.read_checkpoint(checkpoint.folder), False)
    assert {tensor.device.type for tensor in weights.values()} == {"meta"}
