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
"""GLM-4V's processor: messages, or texts and pictures, become what the model is given."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel, pipeline

# At its top level, 5.17.0 has none without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor


pytestmark = pytest.mark.floor

BEGIN, PLACEHOLDER, END = 490, 480, 491
PICTURE = "<|begin_of_image|><|endoftext|><|end_of_image|>"
Named = Callable[[str], Any]


@pytest.fixture(scope="module")
def recorded(case: Named) -> Any:
    return case("glm4v")


@pytest.fixture(scope="module")
def model(case_model: Named) -> PreTrainedModel:
    return case_model("glm4v")


@pytest.fixture(scope="module")
def processor(source: Named, case_tokenizer: Named) -> Any:
    """A processor whose numbers are the published ones. Not to be changed."""
    pictures = source("image_processing_chatglm").ChatGLMImageProcessorPil(
        size={"height": 32, "width": 32}, patch_size=4
    )
    return source("processing_chatglm").ChatGLMProcessor(pictures, case_tokenizer("glm4v"))


@pytest.fixture(scope="module")
def folder(
    processor: Any, model: PreTrainedModel, case_folder: Named, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint whose files name all classes. Not to be written to."""
    target = tmp_path_factory.mktemp("glm4v")
    for path in case_folder("glm4v").iterdir():
        if path.is_file() and path.name != "config.json":
            (target / path.name).symlink_to(path)
    model.config.save_pretrained(target)
    processor.image_processor.save_pretrained(target)
    return target


def picture(recorded: Any, name: str) -> Image.Image:
    return Image.open(recorded.files / recorded.expected["preprocess"][name]["file"])


def with_pictures(recorded: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**message, "image": picture(recorded, message["image"])} if "image" in message else message
        for message in messages
    ]


def expanded(ids: list[int]) -> list[int]:
    """The published ids with a placeholder for each of the 16 vectors."""
    if BEGIN not in ids:
        return ids
    place = ids.index(BEGIN) + 1
    return ids[:place] + [PLACEHOLDER] * 16 + ids[place + 1 :]


def encode(processor: Any, messages: Any, **options: Any) -> Any:
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


def recorded_conversations(recorded: Any) -> list[dict[str, Any]]:
    return [item for item in recorded.expected["conversations"] if "error" not in item]


def test_conversations_have_the_recorded_ids(processor: Any, recorded: Any) -> None:
    for conversation in recorded_conversations(recorded):
        messages = with_pictures(recorded, conversation["messages"])
        encoded = encode(processor, messages, return_tensors="pt", **conversation["arguments"])
        ids = expanded(conversation["input_ids"])
        assert encoded["input_ids"].tolist() == [ids], conversation["name"]
        assert encoded["attention_mask"].tolist() == [[1] * len(ids)]
        assert ("pixel_values" in encoded) == conversation["has_images"]
        positions = encoded["position_ids"][0]
        is_vector = torch.tensor(ids).eq(PLACEHOLDER)
        assert positions[~is_vector].tolist() == [
            position
            for position, index in zip(conversation["position_ids"], conversation["input_ids"])
            if index != 480
        ]
        for name in [message["image"] for message in conversation["messages"] if "image" in message]:
            assert encoded["pixel_values"].equal(recorded.tensors[f"pixels.{name}"][None])
            assert positions[is_vector].unique().tolist() == [ids.index(BEGIN) + 1]


def test_the_text_is_read_back(processor: Any, recorded: Any) -> None:
    for conversation in recorded_conversations(recorded):
        messages = with_pictures(recorded, conversation["messages"])
        images = [message["image"] for message in messages if "image" in message] or None
        text = processor.apply_chat_template(messages, **conversation["arguments"])
        encoded = processor(text=text, images=images)
        if "add_special_tokens" not in conversation["arguments"]:
            assert encoded["input_ids"] == [expanded(conversation["input_ids"])], conversation["name"]
        expected = conversation["published_text_rendering"]
        if "literal" not in conversation["name"] and "add_special_tokens" not in conversation["arguments"]:
            assert text.replace(PICTURE, "") == expected


def test_a_picture_may_come_later(processor: Any, recorded: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == f"[gMASK]<sop><|user|>\n{PICTURE}Hi<|assistant|>"
    wide = picture(recorded, "wide")
    given = [{"role": "user", "image": wide, "content": "Hi"}]
    encoded = processor(text=[text], images=[wide], return_tensors="pt")
    assert encoded["input_ids"].equal(
        encode(processor, given, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    )
    with pytest.raises(TypeError, match="A picture must be .* got True"):
        encode(processor, messages)


def test_every_way_of_giving_a_picture(processor: Any, recorded: Any) -> None:
    file = recorded.files / recorded.expected["preprocess"]["wide"]["file"]
    encoded = base64.b64encode(file.read_bytes()).decode()
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": Image.open(file)},
        {"type": "image", "path": str(file)},
        {"type": "image", "path": file},
        {"type": "image", "url": f"data:image/png;base64,{encoded}"},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    ]
    expected = encode(processor, [{"role": "user", "image": Image.open(file), "content": "Hi"}])
    for part in parts:
        found = encode(processor, [{"role": "user", "content": [part, {"type": "text", "text": "Hi"}]}])
        assert found["input_ids"] == expected["input_ids"]
        assert found["pixel_values"].equal(expected["pixel_values"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_with_and_without_pictures(processor: Any, model: PreTrainedModel, recorded: Any, side: str) -> None:
    """Every row of a padded batch has the logits that it has alone."""
    chats = [with_pictures(recorded, recorded.expected[name]["messages"]) for name in ("single", "text", "history")]
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    batch = encode(processor, chats, padding=True, padding_side=side, **options)
    assert batch["pixel_values"].shape[0] == 2
    assert len({batch[name].shape for name in ("input_ids", "attention_mask", "position_ids")}) == 1
    with torch.no_grad():
        logits = model(**batch).logits
        for row, name in enumerate(("single", "text", "history")):
            found = logits[row, batch["attention_mask"][row].bool()]
            assert (found - recorded.tensors[f"{name}.logits"][0]).abs().max() < 1e-4


def test_generating_from_what_it_gives(processor: Any, model: PreTrainedModel, recorded: Any) -> None:
    chats = [with_pictures(recorded, recorded.expected[name]["messages"]) for name in ("single", "text")]
    batch = encode(processor, chats, add_generation_prompt=True, padding=True, return_tensors="pt")
    output = model.generate(
        **batch, do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=[480, 487, 489]
    )
    new_ids = output[:, batch["input_ids"].shape[1] :].tolist()
    assert new_ids == [recorded.expected[name]["greedy_new_ids"] for name in ("single", "text")]


def test_masks_of_answers(processor: Any, model: PreTrainedModel, recorded: Any) -> None:
    question = {"role": "user", "image": picture(recorded, "tall"), "content": "Hi"}
    answer = {"role": "assistant", "content": "ab"}
    encoded = encode(processor, [question, answer], return_assistant_tokens_mask=True, return_tensors="pt")
    learnt = encoded["input_ids"][encoded.pop("assistant_masks").bool()]
    assert processor.decode(learnt) == "\nab<|user|>"
    labels = torch.where(torch.isin(encoded["input_ids"], learnt), encoded["input_ids"], -100)
    assert model(**encoded, labels=labels).loss.isfinite()
    again = processor(text=processor.apply_chat_template([question, answer]), images=question["image"])
    assert again["input_ids"] == encoded["input_ids"].tolist()


def test_truncation_keeps_the_picture_or_says_so(processor: Any, recorded: Any) -> None:
    chat = [{"role": "user", "image": picture(recorded, "wide"), "content": "a b c d e f g h"}]
    whole = encode(processor, chat)["input_ids"][0]
    cut = encode(processor, chat, processor_kwargs={"truncation": True, "max_length": 24})
    assert cut["input_ids"] == [whole[:24]]
    with pytest.raises(ValueError, match="Truncation to 20 places would cut the picture, which takes 18"):
        encode(processor, chat, processor_kwargs={"truncation": True, "max_length": 20})


def test_texts_and_pictures(processor: Any, case_tokenizer: Named, recorded: Any) -> None:
    wide, tall = picture(recorded, "wide"), picture(recorded, "tall")
    tokenizer = case_tokenizer("glm4v")
    plain = processor(text=["Hi", "Hello there"], padding=True, return_tensors="pt")
    assert plain["input_ids"].equal(tokenizer(["Hi", "Hello there"], padding=True, return_tensors="pt")["input_ids"])
    assert processor(images=wide, return_tensors="pt")["pixel_values"].equal(recorded.tensors["pixels.wide"][None])
    # A text with the three tokens of a picture anywhere.
    ids = processor(text=f"a{PICTURE}b", images=wide)["input_ids"][0]
    assert ids == expanded(tokenizer(f"a{PICTURE}b")["input_ids"])
    # Without a place for it, a question about it.
    asked = encode(processor, [{"role": "user", "image": wide, "content": "Hi"}], add_generation_prompt=True)
    assert processor(text="Hi", images=wide)["input_ids"] == asked["input_ids"]
    assert processor(text=["Hi"], images=[[wide]])["input_ids"] == asked["input_ids"]
    # Pictures go to the texts that have a place for one, in their order.
    mixed = processor(text=["Hi", f"{PICTURE}Hi"], images=[[], [tall]], padding=True, return_tensors="pt")
    assert mixed["pixel_values"].equal(recorded.tensors["pixels.tall"][None])
    assert mixed["attention_mask"].sum(1).tolist() == [4, 22]


def test_options_of_the_library(processor: Any, recorded: Any) -> None:
    wide = picture(recorded, "wide")
    chat = [{"role": "user", "content": [{"type": "image", "image": wide}, {"type": "text", "text": "Hi"}]}]
    short = [{"role": "user", "content": "Hi"}]
    options = {"padding": True, "pad_to_multiple_of": 32, "padding_side": "right"}
    for given in (options, {"processor_kwargs": options}, {"processor_kwargs": {"text_kwargs": options}}):
        batch = encode(processor, [chat, short], return_tensors="np", **given)
        assert batch["input_ids"].shape == batch["position_ids"].shape == (2, 32)
        assert batch["attention_mask"][1].tolist() == [1] * 6 + [0] * 26
    text = processor.apply_chat_template(chat)
    filled = processor(text=text, images=wide, padding="max_length", max_length=40, return_tensors="pt")
    assert filled["input_ids"].shape == (1, 40)
    marked = processor(text=text, images=wide, return_special_tokens_mask=True, return_offsets_mapping=True)
    assert {len(values[0]) for name, values in marked.items() if name != "pixel_values"} == {24}
    # An answer that is begun, and a template of somebody's own.
    begun = [*short, {"role": "assistant", "content": "a"}]
    ids = encode(processor, begun, continue_final_message=True)["input_ids"][0]
    assert processor.decode(ids).endswith("<|assistant|>\na")
    own = f"{{% for message in messages %}}{{% for part in message.content %}}{{{{ part.text or '{PICTURE}' }}}}{{% endfor %}}{{% endfor %}}"
    assert processor.apply_chat_template(chat, chat_template=own) == f"{PICTURE}Hi"
    written = encode(processor, chat, chat_template=own)
    assert (
        written["input_ids"][0]
        == processor(text=f"{PICTURE}Hi", images=wide, add_special_tokens=False)["input_ids"][0]
    )
    assert written["pixel_values"].shape == (1, 3, 32, 32)
    assert processor.apply_chat_template(chat, tokenize=True) == encode(processor, chat)["input_ids"]


def test_what_does_not_fit_is_named(processor: Any, case_tokenizer: Named, recorded: Any) -> None:
    wide = picture(recorded, "wide")
    for images, text, message in (
        ([wide, wide], "Hi", "each of the 1 texts needs one picture; got 2"),
        ([[], [wide, wide]], ["a", "b"], "each of the 2 texts needs one picture"),
        (None, f"{PICTURE}Hi", "0 pictures were given, and 1 texts have a place"),
        ([wide, wide], [f"{PICTURE}Hi"], "2 pictures were given, and 1 texts"),
        ([wide, wide], f"{PICTURE}{PICTURE}", "may hold one picture, as the model was trained; got 2"),
        (None, None, "nothing to process"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(images=images, text=text)
    with pytest.raises(TypeError, match="must be a string or a list of strings, got 3"):
        processor(text=3)
    with pytest.raises(ValueError, match="cannot encode with return_overflowing_tokens"):
        processor(text="Hi", return_overflowing_tokens=True)
    message = {"role": "user", "image": wide, "content": "Hi"}
    with pytest.raises(ValueError, match="may hold one picture, as the model was trained; got 2"):
        encode(processor, [message, message])
    with pytest.raises(ValueError, match="reads text alone and needs no processor"):
        type(processor)(processor.image_processor, case_tokenizer("chatglm3"))


def test_saved_and_found_by_the_auto_classes(folder: Path, recorded: Any, copy_code: Named, tmp_path: Path) -> None:
    messages = with_pictures(recorded, recorded.expected["single"]["messages"])
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    expected = encode(processor, messages, return_tensors="pt")
    for name in ("once", "twice"):
        processor.save_pretrained(tmp_path / name)
        copy_code(tmp_path / name)
        processor = AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert processor.image_processor.patch_size == 4
        found = encode(processor, messages, return_tensors="pt")
        assert all(found[key].equal(value) for key, value in expected.items())
        pictures = AutoImageProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert type(pictures) is type(processor.image_processor)


def test_the_pipeline(folder: Path, recorded: Any) -> None:
    answer = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    wide = picture(recorded, "wide")
    single = recorded.expected["single"]
    (message,) = with_pictures(recorded, single["messages"])
    chat = [
        {"role": "user", "content": [{"type": "image", "image": wide}, {"type": "text", "text": message["content"]}]}
    ]
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": [480, 487, 489]}
    new_ids = single["greedy_new_ids"][:5]
    (found,) = answer(text=chat, generate_kwargs=options, return_tensors=True)
    assert found["generated_token_ids"][-5:].tolist() == new_ids
    (found,) = answer(text=chat, generate_kwargs=options)
    assert found["generated_text"][-1]["role"] == "assistant"
    both = answer(text=[chat, chat], generate_kwargs=options, return_tensors=True, batch_size=2)
    assert [item[0]["generated_token_ids"][-5:].tolist() for item in both] == [new_ids] * 2
    (found,) = answer(images=wide, text=message["content"], generate_kwargs=options, return_full_text=False)
    assert found["generated_text"] == answer.tokenizer.decode(new_ids)
    (found,) = answer(text="Hi", generate_kwargs=options)
    assert found["generated_text"].startswith("Hi")
