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
"""GLM-4V and what is put around a model: integers, devices, adapters, prefixes, processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from waiting import run_in_two_processes


Named = Callable[[str], Any]
Inputs = dict[str, torch.Tensor]
EYES_ON_DISK = {"transformer.vision": "disk", "transformer.embedding": "cpu", "transformer.encoder": "cpu"}
REST_ON_DISK = {"transformer.vision": "cpu", "transformer.embedding": "disk", "transformer.encoder": "disk"}
LIMIT = 1e-5


@pytest.fixture(scope="module")
def model(case_model: Named) -> PreTrainedModel:
    return case_model("glm4v")


@pytest.fixture(scope="module")
def inputs(case: Named) -> Inputs:
    """A row with a picture and one without, of different lengths."""
    tensors = case("glm4v").tensors
    rows = [tensors["single.input_ids"][0], tensors["text.input_ids"][0]]
    length = max(map(len, rows))
    return {
        "input_ids": torch.stack([F.pad(row, (length - len(row), 0), value=480) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows]),
        "images": tensors["pixels.wide"][None],
    }


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def last_logits(model: PreTrainedModel, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def answer(model: PreTrainedModel, inputs: Inputs, **options: Any) -> list[list[int]]:
    output = model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6, **options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    assert (actual - expected).abs().max().item() <= limit


SETTINGS: dict[str, dict[str, Any]] = {
    "eyes-as-they-are": {"bits": 4},
    "eyes-too": {"bits": 8, "vision_bits": 4, "output_layer_bits": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_quantized_saved_and_loaded(
    case_folder: Named, inputs: Inputs, copy_code: Callable, tmp_path: Path, name: str
) -> None:
    settings = SETTINGS[name]
    model = load(case_folder("glm4v")).quantize(**settings)
    vision = model.transformer.vision
    linears = [vision.transformer.layers[1].mlp.fc1, vision.transformer.layers[0].attention.query_key_value]
    linears += [vision.linear_proj.gate_proj, vision.linear_proj.linear_proj]
    assert [getattr(linear, "bits", None) for linear in linears] == [settings.get("vision_bits")] * 4
    expected = last_logits(model, inputs)
    model.save_pretrained(tmp_path)
    copy_code(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    # As published where the published format can say it.
    assert config.get("quantization_bit", 0) == (0 if "vision_bits" in settings else settings["bits"])
    loaded = load(tmp_path)
    assert last_logits(loaded, inputs).equal(expected)
    waiting = load(case_folder("glm4v"), quantization_config={"quant_method": "chatglm", **settings})
    assert last_logits(waiting, inputs).equal(expected)
    state = model.state_dict()
    assert all(weight.equal(state[weight_name]) for weight_name, weight in waiting.state_dict().items())
    assert answer(loaded, inputs) == answer(model, inputs)
    loaded.dequantize()
    assert_near(last_logits(loaded, inputs), expected, 1e-4)


def test_settings_that_do_not_fit(case_folder: Named, case_model: Named, copy_code: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`vision_bits=8` is for GLM-4V, and this model reads text alone"):
        case_model("glm4").quantize(4, vision_bits=8)
    load(case_folder("glm4v")).quantize(4, vision_bits=8).save_pretrained(tmp_path)
    copy_code(tmp_path)
    with pytest.raises(ValueError, match="quantized already.*'vision_bits': 8.*'vision_bits': None"):
        load(tmp_path, quantization_config={"quant_method": "chatglm", "bits": 4})
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for bits, message in (
        (None, 'holds int8 codes.*Set `"vision_bits": 8`'),
        (4, 'holds int8 codes.*"vision_bits": 8'),
    ):
        config["quantization_config"]["vision_bits"] = bits
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize(
    ("device_map", "quantized"),
    [(EYES_ON_DISK, True), (REST_ON_DISK, False), ("auto", True)],
    ids=["eyes", "rest", "auto"],
)
def test_offloading(
    case_folder: Named, model: PreTrainedModel, inputs: Inputs, tmp_path: Path, device_map: Any, quantized: bool
) -> None:
    options: dict[str, Any] = {"offload_folder": tmp_path / "disk"}
    twin = model
    if quantized:
        options["quantization_config"] = {"quant_method": "chatglm", "bits": 4, "vision_bits": 8}
        twin = load(case_folder("glm4v"), quantization_config=options["quantization_config"])
    if device_map == "auto":
        # Less than half of it fits.
        size = sum(weight.nbytes for weight in twin.parameters())
        options |= {"device_map": "auto", "max_memory": {"cpu": int(0.4 * size)}}
    else:
        options["device_map"] = {**device_map, "transformer.output_layer": "cpu", "transformer.rotary_pos_emb": "cpu"}
    other = load(case_folder("glm4v"), **options)
    assert any(weight.is_meta for weight in other.parameters())
    assert_near(last_logits(other, inputs), last_logits(twin, inputs))
    assert answer(other, inputs) == answer(twin, inputs)


def test_lora_on_the_text_part(case_folder: Named, inputs: Inputs, case: Named) -> None:
    model = get_peft_model(
        load(case_folder("glm4v")),
        LoraConfig(target_modules=["query_key_value"], exclude_modules=r".*\.vision\..*", init_lora_weights=False),
    )
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 3 and not any("vision" in name for name in trained)
    model.train()
    model.gradient_checkpointing_enable()
    ids, labels = (case("glm4v").tensors[f"loss.{name}"] for name in ("input_ids", "labels"))
    model(input_ids=ids, labels=labels, images=inputs["images"]).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for name, weight in model.named_parameters() if name in trained)
    assert all(weight.grad is None for name, weight in model.named_parameters() if name not in trained)
    model.eval()
    expected, adapted = answer(model, inputs), last_logits(model, inputs)
    merged = model.merge_and_unload()
    assert_near(last_logits(merged, inputs), adapted, 1e-4)
    assert answer(merged, inputs) == expected


def test_soft_prompts_of_peft_are_refused(
    case_folder: Named, case_tokenizer: Named, model: PreTrainedModel, inputs: Inputs
) -> None:
    text = {"input_ids": inputs["input_ids"][1:, -5:], "attention_mask": inputs["attention_mask"][1:, -5:]}
    adapted = get_peft_model(
        load(case_folder("glm4v")), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    assert adapted.generate(**text, do_sample=False, max_new_tokens=2, min_new_tokens=2).shape == (1, 7)
    with pytest.raises(ValueError, match="A soft prompt of PEFT does not go with pictures"):
        adapted.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="Pictures go with `input_ids`"):
        adapted(**inputs)
    with pytest.raises(ValueError, match="A soft prompt of PEFT does not go with pictures"):
        adapted.chat(case_tokenizer("glm4v"), "Look", image=Image.new("RGB", (4, 4)))
    assert answer(adapted.get_base_model(), inputs) == answer(model, inputs)


def test_a_prefix_stands_before_pictures(
    case_folder: Named, case_tokenizer: Named, inputs: Inputs, case: Named
) -> None:
    """The prefix is longer than the rest of a picture's positions, and counts none; padding, caches and parts agree."""
    model = load(case_folder("glm4v"), pre_seq_len=5)
    expected = answer(model, inputs)
    alone = {name: inputs[name][:1, -26:] for name in ("input_ids", "attention_mask")} | {"images": inputs["images"]}
    assert answer(model, alone)[0] == expected[0]
    assert answer(model, inputs, use_cache=False) == expected
    assert answer(model, inputs, cache_implementation="static", disable_compile=True) == expected
    assert answer(model, alone, prefill_chunk_size=7)[0] == expected[0]
    assert answer(load(case_folder("glm4v")), inputs) != expected
    tokenizer, greedy = case_tokenizer("glm4v"), {"do_sample": False, "max_new_tokens": 6}
    response, history, cache = model.chat(
        tokenizer, "Look", image=Image.new("RGB", (4, 4)), return_past_key_values=True, **greedy
    )
    cached = model.chat(tokenizer, "Well?", history, past_key_values=cache, **greedy)
    assert cached[0] == model.chat(tokenizer, "Well?", history, **greedy)[0]
    model.train()
    ids, labels = (case("glm4v").tensors[f"loss.{name}"] for name in ("input_ids", "labels"))
    model(input_ids=ids, labels=labels, images=inputs["images"]).loss.backward()
    assert model.transformer.prefix_encoder.embedding.weight.grad.abs().sum() > 0
    assert model.transformer.vision.conv.weight.grad is None


def test_classification_reads_pictures(case_folder: Named, inputs: Inputs) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        case_folder("glm4v"), trust_remote_code=True, num_labels=3
    ).eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        alone = model(inputs["input_ids"][:1, -26:], images=inputs["images"]).logits
        other = model(**inputs | {"images": inputs["images"].flip(-1)}).logits
    assert_near(logits[:1], alone)
    assert (other[0] - logits[0]).abs().max() > 1e-4
    assert other[1].equal(logits[1])
    loss = model(**inputs, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert loss.isfinite() and model.transformer.vision.boi.grad.abs().sum() > 0


def test_continuous_batching_is_for_text(model: PreTrainedModel, inputs: Inputs) -> None:
    with pytest.raises(ValueError, match="`generate_batch` reads no pictures"):
        model.generate_batch(inputs["input_ids"].tolist())
    with pytest.raises(ValueError, match="`generate_batch` reads no pictures"):
        model.generate_batch([[5, 6]], images=inputs["images"])


@pytest.mark.grid
def test_tensor_parallel_equals_one_process(case_folder: Named, case: Named, tmp_path: Path) -> None:
    """The text part is divided; every process has the eyes as a whole."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoModel\n"
        "torch.set_num_threads(1)\n"
        "folder, tensors = sys.argv[1], load_file(sys.argv[2])\n"
        "inputs = {'input_ids': tensors['single.input_ids'], 'images': tensors['pixels.wide'][None]}\n"
        "model = AutoModel.from_pretrained(folder, trust_remote_code=True, tp_plan='auto')\n"
        "with torch.no_grad():\n"
        "    logits = model(**inputs).logits\n"
        "logits = getattr(logits, 'full_tensor', lambda: logits)()\n"
        "torch.testing.assert_close(logits, tensors['single.logits'], atol=1e-4, rtol=1e-5)\n"
        "weight = model.transformer.encoder.layers[0].mlp.dense_h_to_4h.weight\n"
        "assert 2 * weight.to_local().shape[0] == weight.shape[0]\n"
        "new_ids = model.generate(**inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5)[0, -5:]\n"
        "assert new_ids.tolist() == [int(number) for number in sys.argv[3:]]\n",
        encoding="utf-8",
    )
    expected = case("glm4v").expected["single"]["greedy_new_ids"][:5]
    tensors = case("glm4v").files / "expected.safetensors"
    run_in_two_processes(script, case_folder("glm4v"), tensors, *map(str, expected))
