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
"""GLM-4V: the numbers of the published code, and the invariants that it broke."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, BatchEncoding, PreTrainedModel
from transformers.utils.chat_template_utils import render_jinja_template


pytestmark = pytest.mark.floor

LOGITS_LIMIT = 1e-4
RELATIVE_LIMIT = 5e-5  # of the greatest value
Named = Callable[[str], Any]


def assert_within(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).abs().max().item() <= limit


def assert_relative(actual: torch.Tensor, expected: torch.Tensor, limit: float = RELATIVE_LIMIT) -> None:
    assert_within(actual, expected, limit * expected.abs().max().item())


@pytest.fixture(scope="module")
def model(case_model: Named) -> PreTrainedModel:
    return case_model("glm4v")


@pytest.fixture(scope="module")
def recorded(case: Named) -> Any:
    return case("glm4v")


def pixels(recorded: Any, messages: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [recorded.tensors[f"pixels.{message['image']}"] for message in messages if "image" in message]


def inputs_of(recorded: Any, prompt: str) -> dict[str, torch.Tensor]:
    """What the published tokenizer gave for a prompt, or for a batch of them."""
    messages = recorded.expected[prompt]["messages"]
    rows = messages if isinstance(messages[0], list) else [messages]
    pictures = [picture for row in rows for picture in pixels(recorded, row)]
    names = ("input_ids", "attention_mask", "position_ids")
    inputs = {name: recorded.tensors[f"{prompt}.{name}"] for name in names}
    return inputs | ({"images": torch.stack(pictures)} if pictures else {})


def greedy(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=[480, 487, 489], **options
    )
    assert output[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"])
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def with_vectors(inputs: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """One row with the placeholder written for every vector, as a processor does."""
    ids = inputs["input_ids"][0].tolist()
    begin = ids.index(490)
    ids[begin + 1 : begin + 2] = [ids[begin + 1]] * count
    return {"input_ids": torch.tensor([ids]), "pixel_values": inputs["images"]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tower_and_adapter(case_folder: Named, recorded: Any, attention: str) -> None:
    folder = case_folder("glm4v")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation=attention)
    vision, tensors, seen = model.transformer.vision, recorded.tensors, {}
    modules = {"patch_embedding": vision.patch_embedding, "adapter": vision.linear_proj}
    modules |= {f"layers.{index}": layer for index, layer in enumerate(vision.transformer.layers)}
    modules |= {"layers.0.attention": vision.transformer.layers[0].attention, "adapter.norm": vision.linear_proj.norm1}
    modules |= {"layers.0.mlp": vision.transformer.layers[0].mlp}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        seen_by_model = model.get_image_features(tensors["pixels.wide"][None], output_hidden_states=True)
    assert_relative(seen_by_model.pooler_output, tensors["vision.features"])
    assert seen_by_model.last_hidden_state is seen_by_model.hidden_states[-1]
    for name, output in seen.items():
        assert_relative(output[0] if isinstance(output, tuple) else output, tensors[f"vision.{name}"])


@pytest.mark.parametrize("prompt", ["single", "text", "history", "later"])
def test_logits_and_answers(model: PreTrainedModel, recorded: Any, prompt: str) -> None:
    inputs, expected = inputs_of(recorded, prompt), recorded.expected[prompt]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=prompt == "single")
        counted = model(**{name: value for name, value in inputs.items() if name in ("input_ids", "images")})
    assert output.logits.shape[1] == expected["expanded_length"]
    assert_within(output.logits, recorded.tensors[f"{prompt}.logits"], LOGITS_LIMIT)
    assert_within(counted.logits, recorded.tensors[f"{prompt}.logits"], LOGITS_LIMIT)
    for index, hidden_states in enumerate(output.hidden_states or ()):
        assert_relative(hidden_states, recorded.tensors[f"single.hidden_states.{index}"])
    assert greedy(model, inputs) == [expected["greedy_new_ids"]]
    assert greedy(model, inputs, use_cache=False) == [expected["greedy_new_ids"]]


def test_ids_of_a_processor_are_taken_as_they_are(model: PreTrainedModel, recorded: Any) -> None:
    inputs = with_vectors(inputs_of(recorded, "single"), 16)
    with torch.no_grad():
        assert_within(model(**inputs).logits, recorded.tensors["single.logits"], LOGITS_LIMIT)
    assert greedy(model, inputs) == [recorded.expected["single"]["greedy_new_ids"]]


def test_a_cache_continued_by_hand(model: PreTrainedModel, recorded: Any) -> None:
    """Positions go on behind the picture as if it were one token; the cache holds all its vectors."""
    inputs, expected = inputs_of(recorded, "single"), recorded.expected["single"]
    new_ids = torch.tensor([expected["greedy_new_ids"]])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert cache.get_seq_length() == expected["expanded_length"]
        for index in range(new_ids.shape[1]):
            logits = model(new_ids[:, index : index + 1], past_key_values=cache).logits
    assert_within(logits, recorded.tensors["single.last_token_uncached_logits"], LOGITS_LIMIT)


def test_a_picture_behind_cached_text(model: PreTrainedModel, recorded: Any) -> None:
    inputs = inputs_of(recorded, "later")
    with torch.no_grad():
        cache = model(inputs["input_ids"][:, :30], use_cache=True).past_key_values
        logits = model(inputs["input_ids"][:, 30:], images=inputs["images"], past_key_values=cache).logits
    assert_within(logits, recorded.tensors["later.logits"][:, 30:], LOGITS_LIMIT)


@pytest.mark.parametrize("prompt", ["batch", "text_batch"])
def test_padded_rows_are_as_alone(model: PreTrainedModel, recorded: Any, prompt: str) -> None:
    inputs, expected = inputs_of(recorded, prompt), recorded.expected[prompt]
    with torch.no_grad():
        logits = model(**inputs).logits
        model.train()
        trained = model(**inputs).logits
        model.eval()
    for row, start in enumerate(expected["real_from"]):
        assert_within(logits[row, start:], recorded.tensors[f"{prompt}.logits"][row, start:], LOGITS_LIMIT)
        assert_within(trained[row, start:], recorded.tensors[f"{prompt}.logits"][row, start:], LOGITS_LIMIT)
    assert greedy(model, inputs) == expected["greedy_new_ids"]


def test_rows_with_and_without_a_picture(model: PreTrainedModel, recorded: Any) -> None:
    alone = [inputs_of(recorded, name) for name in recorded.expected["mixed"]["rows_alone"]]
    rows = [inputs["input_ids"][0] for inputs in alone]
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=480) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, "images": alone[0]["images"]}
    with torch.no_grad():
        logits = model(**inputs).logits
    for row, name in enumerate(recorded.expected["mixed"]["rows_alone"]):
        expected = recorded.tensors[f"{name}.logits"][0]
        assert_within(logits[row, -len(expected) :], expected, LOGITS_LIMIT)
    assert greedy(model, inputs) == recorded.expected["mixed"]["greedy_new_ids"]


def test_beams(model: PreTrainedModel, recorded: Any) -> None:
    inputs, expected = inputs_of(recorded, "single"), recorded.expected["single"]
    output = model.generate(
        BatchEncoding(inputs),
        do_sample=False,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        min_new_tokens=12,
        length_penalty=0.0,
        eos_token_id=[480, 487, 489],
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, 26:].tolist() == expected["beam3_new_ids"]
    scores = torch.tensor(expected["beam3_sum_logprobs_over_length"])
    assert_within(output.sequences_scores / 12, scores, LOGITS_LIMIT)


def test_max_length_counts_the_ids_as_given(model: PreTrainedModel, recorded: Any) -> None:
    output = model.generate(**inputs_of(recorded, "single"), do_sample=False, max_length=29)
    assert output[0, 26:].tolist() == recorded.expected["single"]["greedy_new_ids"][:3]


def test_loss_and_gradients(model: PreTrainedModel, recorded: Any) -> None:
    ids, labels = recorded.tensors["loss.input_ids"], recorded.tensors["loss.labels"]
    images = recorded.tensors["pixels.wide"][None]
    loss = model(ids, labels=labels, images=images).loss
    assert_within(loss, torch.tensor(recorded.expected["loss"]["value"]), 2e-5)
    names = [name.removeprefix("grad.") for name in recorded.tensors if name.startswith("grad.")]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        assert_relative(gradient, recorded.tensors[f"grad.{name}"], 1e-4)


def test_labels_of_text_and_checkpointing(case_folder: Named, recorded: Any) -> None:
    model = AutoModel.from_pretrained(case_folder("glm4v"), trust_remote_code=True)
    assert model(recorded.tensors["text.input_ids"], labels=recorded.tensors["text.input_ids"]).loss.isfinite()
    model.train()
    model.gradient_checkpointing_enable()
    images, ids, labels = (recorded.tensors[name] for name in ("pixels.wide", "loss.input_ids", "loss.labels"))
    loss = model(ids, labels=labels, pixel_values=images[None]).loss
    loss.backward()
    assert_within(loss.detach(), torch.tensor(recorded.expected["loss"]["value"]), 2e-5)
    expected = recorded.tensors["grad.transformer.vision.transformer.layers.1.mlp.fc1.bias"]
    assert_relative(model.transformer.vision.transformer.layers[1].mlp.fc1.bias.grad, expected, 1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.9), ("float16", 0.15)])
def test_half_precision(case_folder: Named, recorded: Any, dtype: str, limit: float) -> None:
    model = AutoModel.from_pretrained(case_folder("glm4v"), trust_remote_code=True, dtype=getattr(torch, dtype))
    with torch.no_grad():
        logits = model(**inputs_of(recorded, "single")).logits[:, -16:]
    assert_within(logits, recorded.tensors[f"{dtype}.logits"], limit)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_text_part(case_folder: Named, recorded: Any, bits: int) -> None:
    model = AutoModel.from_pretrained(case_folder("glm4v"), trust_remote_code=True).quantize(bits)
    with torch.no_grad():
        logits = model(**inputs_of(recorded, "single")).logits[:, -8:]
    assert_within(logits, recorded.tensors[f"quant.fp32.int{bits}.logits"], 1e-3)


def test_saved_and_loaded(model: PreTrainedModel, recorded: Any, tmp_path: Path, copy_code: Callable) -> None:
    model.save_pretrained(tmp_path)
    copy_code(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values())
    assert all(value.equal(loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert_within(loaded(**inputs_of(recorded, "single")).logits, recorded.tensors["single.logits"], LOGITS_LIMIT)


def test_what_does_not_fit_is_named(model: PreTrainedModel, case_model: Named, recorded: Any) -> None:
    inputs = inputs_of(recorded, "single")
    ids, images = inputs["input_ids"], inputs["images"]
    with pytest.raises(ValueError, match="may hold one picture, and a row of the ids holds 2"):
        model(torch.cat((ids, ids), dim=1), images=images)
    with pytest.raises(ValueError, match="2 pictures were given, and 1 rows"):
        model.generate(ids, images=torch.cat((images, images)))
    with pytest.raises(ValueError, match="1 pictures were given, and 0 rows"):
        model(recorded.tensors["text.input_ids"], images=images)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, images=images, pixel_values=images)
    with pytest.raises(ValueError, match=r"must be a tensor \[pictures, 3, 32, 32\]"):
        model(ids, images=images[:, :, :16])
    with pytest.raises(ValueError, match="not with `inputs_embeds`"):
        model(inputs_embeds=torch.zeros(1, 3, 32), images=images)
    with pytest.raises(ValueError, match="reads text alone"):
        case_model("glm4").generate(ids % 60, images=images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boi_token_id": None}, "needs `boi_token_id` and `eoi_token_id`"),
        ({"vision_config": {"image_size": 32}}, "num_positions` must be 5 "),
        ({"vision_config": {"patch_size": 0}}, "patch_size` must be a positive whole number, got 0"),
        ({"vision_config": {"num_heads": 5}}, "must be a multiple of `num_heads`"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act` must be"),
        ({"vision_config": {"dropout_prob": 1.0}}, r"dropout_prob` must lie in \[0, 1\)"),
    ],
)
def test_sizes_that_no_eyes_have(chatglm: Any, changes: dict[str, Any], message: str) -> None:
    settings = {"boi_token_id": 5, "eoi_token_id": 6, "vision_config": {}, **changes}
    with pytest.raises(ValueError, match=message):
        chatglm.ChatGLMConfig(**settings)


def with_pictures(recorded: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    files = recorded.expected["preprocess"]
    return [
        {**message, "image": Image.open(recorded.files / files[message["image"]]["file"])}
        if "image" in message
        else message
        for message in messages
    ]


def test_conversations_have_the_recorded_ids(case_tokenizer: Named, recorded: Any) -> None:
    tokenizer = case_tokenizer("glm4v")
    for conversation in recorded.expected["conversations"]:
        if "error" in conversation:
            continue
        messages = with_pictures(recorded, conversation["messages"])
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", **conversation["arguments"]
        )
        assert encoded["input_ids"].tolist() == [conversation["input_ids"]], conversation["name"]
        assert encoded["position_ids"].tolist() == [conversation["position_ids"]]
        assert ("images" in encoded) == conversation["has_images"]
        if conversation["has_images"]:
            assert encoded["images"].equal(torch.stack(pixels(recorded, conversation["messages"])))


def test_tools_beside_the_messages(case_tokenizer: Named, recorded: Any) -> None:
    """They are the tools of the system message, by the ids and by the template alone."""
    tokenizer = case_tokenizer("glm4v")
    (conversation,) = [item for item in recorded.expected["conversations"] if item["name"] == "tools_and_system_text"]
    (system, user), options = conversation["messages"], conversation["arguments"]
    tools = system["tools"]
    chat = [{"role": "system", "content": system["content"]}, user, {"role": "user", "content": ""}]
    assert tokenizer.apply_chat_template(chat, tools, **options)["input_ids"] == conversation["input_ids"]
    (rendered,), _ = render_jinja_template([chat], tools=tools, chat_template=tokenizer.chat_template, **options)
    assert rendered == conversation["published_text_rendering"]
    assert tokenizer.apply_chat_template([user], tools, tokenize=False).endswith("调用的参数。<|user|>\n天气")
    # What is left out is no answer that would have to be closed.
    chat = [user, {"role": "assistant", "content": ""}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[gMASK]<sop><|user|>\n天气"
    assert tokenizer.apply_chat_template(chat)["input_ids"] == tokenizer.apply_chat_template([user])["input_ids"]


def test_the_published_call(model: PreTrainedModel, case_tokenizer: Named, recorded: Any) -> None:
    expected, options = recorded.expected["single"], {"add_generation_prompt": True, "return_tensors": "pt"}
    inputs = case_tokenizer("glm4v").apply_chat_template(
        with_pictures(recorded, expected["messages"]), tokenize=True, return_dict=True, **options
    )
    assert greedy(model, inputs) == [expected["greedy_new_ids"]]
    batch = recorded.expected["batch"]
    inputs = case_tokenizer("glm4v").apply_chat_template(
        [with_pictures(recorded, messages) for messages in batch["messages"]],
        padding=True,
        return_dict=True,
        **options,
    )
    assert greedy(model, inputs) == batch["greedy_new_ids"]


def test_parts_of_a_message(case_tokenizer: Named, recorded: Any) -> None:
    tokenizer = case_tokenizer("glm4v")
    file = str(recorded.files / recorded.expected["preprocess"]["wide"]["file"])
    text = {"type": "text", "text": "Hi"}
    parts = [{"type": "image", "path": file}, {"type": "image_url", "image_url": {"url": file}}]
    expected = tokenizer.apply_chat_template([{"role": "user", "image": Image.open(file), "content": "Hi"}])
    for part in parts:
        encoded = tokenizer.apply_chat_template([{"role": "user", "content": [text, part]}])
        assert encoded["input_ids"] == expected["input_ids"]
        assert encoded["images"].equal(expected["images"])


def test_pictures_that_have_no_place(case_tokenizer: Named) -> None:
    message = {"role": "user", "image": Image.new("RGB", (4, 4)), "content": "Hi"}
    with pytest.raises(ValueError, match="may hold one picture, as the model was trained; got 2"):
        case_tokenizer("glm4v").apply_chat_template([message, message])
    with pytest.raises(ValueError, match="reads text alone"):
        case_tokenizer("chatglm3").apply_chat_template([message])
