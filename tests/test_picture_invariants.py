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
"""One picture, one answer: the same by every way of computing it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, CompileConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache


pytestmark = pytest.mark.floor

Named = Callable[[str], Any]
LIMIT = 1e-4
N = 16


@pytest.fixture(scope="module")
def model(case_model: Named) -> PreTrainedModel:
    return case_model("glm4v")


@pytest.fixture(scope="module")
def recorded(case: Named) -> Any:
    return case("glm4v")


@pytest.fixture(scope="module")
def prompt(recorded: Any) -> dict[str, torch.Tensor]:
    """A row with a picture, in the published form of the ids."""
    return {"input_ids": recorded.tensors["single.input_ids"], "images": recorded.tensors["pixels.wide"][None]}


@pytest.fixture(scope="module")
def mixed(prompt: dict[str, torch.Tensor], recorded: Any) -> dict[str, torch.Tensor]:
    """That row, a longer one without a picture, and one with another picture, padded on the left."""
    names = ("single", "text", "later")
    rows = [recorded.tensors[f"{name}.input_ids"][0] for name in names]
    length = max(map(len, rows))
    images = [
        recorded.tensors[f"pixels.{message['image']}"]
        for name in names
        for message in recorded.expected[name]["messages"]
        if "image" in message
    ]
    return {
        "input_ids": torch.stack([F.pad(row, (length - len(row), 0), value=480) for row in rows]),
        "attention_mask": torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows]),
        "images": torch.stack(images),
    }


def expanded(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with all placeholders, as a processor writes them."""
    ids = inputs["input_ids"][0].tolist()
    begin = ids.index(490)
    ids[begin + 1 : begin + 2] = [480] * N
    return {**inputs, "input_ids": torch.tensor([ids])}


def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    settings = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10} | options
    output = model.generate(**inputs, **settings)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def logits_of(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_near(actual: torch.Tensor, expected: torch.Tensor, limit: float = LIMIT) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= limit


WAYS: dict[str, dict[str, Any]] = {
    "no-cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "lookup": {"prompt_lookup_num_tokens": 4},
} | {f"parts-of-{size}": {"prefill_chunk_size": size} for size in (1, 5, 40)}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_answer(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], mixed: dict[str, torch.Tensor], way: str
) -> None:
    expected = answer(model, prompt)
    assert answer(model, prompt, **WAYS[way]) == answer(model, expanded(prompt), **WAYS[way]) == expected
    if way != "lookup":
        assert answer(model, mixed, **WAYS[way]) == answer(model, mixed)
        assert answer(model, mixed)[0] == expected[0]


def test_beams_of_rows_with_and_without_pictures(model: PreTrainedModel, mixed: dict[str, torch.Tensor]) -> None:
    beams = answer(model, mixed, num_beams=3)
    assert beams == answer(model, mixed, num_beams=3, use_cache=False)
    assert beams == answer(model, mixed, num_beams=3, prefill_chunk_size=7)
    assert beams[1:2] == answer(model, {"input_ids": mixed["input_ids"][1:2, -count_real(mixed, 1) :]}, num_beams=3)


def count_real(inputs: dict[str, torch.Tensor], row: int) -> int:
    return int(inputs["attention_mask"][row].sum())


@pytest.mark.parametrize("name", ["glm4v", "glm4"])
def test_an_assistant_drafts_without_the_picture(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], chatglm: Any, case_folder: Named, name: str
) -> None:
    config = copy.deepcopy(model.config)
    if name == "glm4":
        config.vision_config = None
    torch.manual_seed(1)
    assistant = type(model)(config).eval()
    assert answer(model, prompt, assistant_model=assistant) == answer(model, prompt)


def test_a_cache_that_holds_the_picture(
    model: PreTrainedModel, prompt: dict[str, torch.Tensor], looks: list[int]
) -> None:
    """Whole ids or new ones, with the picture or without it; it is looked at once."""
    first = torch.tensor(answer(model, prompt, max_new_tokens=4, min_new_tokens=4))
    more = torch.tensor([[488, 65, 66, 67]])
    ids = torch.cat((prompt["input_ids"], first, more), dim=1)
    expected = answer(model, {"input_ids": ids, "images": prompt["images"]})
    for is_whole in (True, False):
        for pictures in ({}, {"images": prompt["images"]} if is_whole else {}):
            cache = DynamicCache(config=model.config)
            answer(model, prompt, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
            del looks[:]
            inputs = {"input_ids": ids if is_whole else torch.cat((first[:, -1:], more), dim=1), **pictures}
            if not is_whole:
                inputs["attention_mask"] = torch.ones(1, cache.get_seq_length() + 5, dtype=torch.long)
            assert answer(model, inputs, past_key_values=cache) == expected
            assert looks == []
            assert cache.picture_surplus.tolist() == [[N - 1]]


def test_a_picture_behind_a_cache(model: PreTrainedModel, recorded: Any, looks: list[int]) -> None:
    ids, images = recorded.tensors["later.input_ids"], recorded.tensors["pixels.wide"][None]
    expected = answer(model, {"input_ids": ids, "images": images})
    begin = ids[0].tolist().index(490)
    for length in (begin - 1, begin + 1 + N // 2):  # Of the second, the end is in the middle of the picture.
        cache = DynamicCache(config=model.config)
        model.generate(ids, images=images, past_key_values=cache, do_sample=False, max_new_tokens=1)
        cache.crop(length - cache.get_seq_length())
        assert answer(model, {"input_ids": ids, "images": images}, past_key_values=cache) == expected


def test_a_picture_among_the_new_ids(model: PreTrainedModel, recorded: Any) -> None:
    """The text before it is in the cache, and not given again but for the mask."""
    ids, images = recorded.tensors["later.input_ids"], recorded.tensors["pixels.wide"][None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
    inputs = {"input_ids": ids[:, 20:], "images": images, "attention_mask": torch.ones_like(ids)}
    assert answer(model, inputs, past_key_values=cache) == answer(model, {"input_ids": ids, "images": images})


def test_what_generate_refuses(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="1 rows of the ids have room for a picture .*, and none was given"):
        model.generate(prompt["input_ids"])
    with pytest.raises(ValueError, match="1 pictures were given, and 0 rows"):
        model.generate(torch.tensor([[5, 6, 7]]), images=prompt["images"])
    with pytest.raises(ValueError, match="not with `inputs_embeds`"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32), images=prompt["images"])


def test_padding_on_either_side(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    ids, images = prompt["input_ids"], prompt["images"]
    expected = logits_of(model, **prompt)
    mask = torch.ones_like(ids)
    for padding, places in (((3, 0), slice(3, None)), ((0, 3), slice(None, -3))):
        logits = logits_of(
            model, input_ids=F.pad(ids, padding, value=480), attention_mask=F.pad(mask, padding), images=images
        )
        assert_near(logits[:, places], expected)


def test_parts_of_the_logits_and_embeddings(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    expected = logits_of(model, **prompt)
    assert_near(logits_of(model, **prompt, logits_to_keep=3), expected[:, -3:])
    assert_near(logits_of(model, **prompt, logits_to_keep=torch.tensor([0, 20])), expected[:, [0, 20]])
    assert_near(logits_of(model, **expanded(prompt)), expected)
    ids = expanded(prompt)["input_ids"]
    begin = ids[0].tolist().index(490)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        embeds[:, begin : begin + N + 2] = model.get_image_features(prompt["images"]).pooler_output
    features = model.get_image_features(prompt["images"]).pooler_output.detach()
    assert answer(model, {"input_ids": ids, "image_features": features}) == answer(model, prompt)
    positions = torch.arange(ids.shape[1])[None]
    positions = positions - (positions - begin - 1).clamp(0, N - 1)
    by_hand = {"inputs_embeds": embeds, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    assert_near(logits_of(model, **by_hand), expected)
    assert answer(model, {"input_ids": ids[:, :0], **by_hand}) == answer(model, prompt)


def test_static_cache_by_hand(model: PreTrainedModel, mixed: dict[str, torch.Tensor]) -> None:
    expected = logits_of(model, **mixed)
    cache = StaticCache(config=model.config, max_cache_len=expected.shape[1] + 8)
    assert_near(logits_of(model, **mixed, past_key_values=cache, use_cache=True)[:, -1], expected[:, -1])


@pytest.mark.grid
def test_compiled_steps_follow_a_picture(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    """One graph without a break for all steps behind the prompt."""
    graphs = []

    def keep(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    options = CompileConfig(backend=keep, fullgraph=True, mode=None, dynamic=False)
    static = {"cache_implementation": "static", "compile_config": options}
    assert answer(model, prompt, **static) == answer(model, prompt)
    assert len(graphs) == 1
    compiled = torch.compile(model.transformer.vision, fullgraph=True, backend="eager")
    with torch.no_grad():
        features = model.get_image_features(prompt["images"]).pooler_output
        assert_near(compiled(prompt["images"]).pooler_output, features)


def test_eager_equals_sdpa(case_folder: Named, model: PreTrainedModel, mixed: dict[str, torch.Tensor]) -> None:
    eager = AutoModel.from_pretrained(case_folder("glm4v"), trust_remote_code=True, attn_implementation="eager")
    with torch.no_grad():
        assert_near(
            eager.get_image_features(mixed["images"]).pooler_output,
            model.get_image_features(mixed["images"]).pooler_output,
        )
    assert_near(logits_of(eager, **mixed)[:, -1], logits_of(model, **mixed)[:, -1])


@pytest.mark.compiler
@pytest.mark.grid
def test_flex_equals_sdpa(model: PreTrainedModel, mixed: dict[str, torch.Tensor]) -> None:
    config = copy.deepcopy(model.config)
    # Flex attention on a CPU wants heads of 16 channels at least.
    config.head_dim, config.vision_config = 16, {**config.vision_config, "hidden_size": 48}
    other = type(model)(config).eval()
    with torch.no_grad():
        features, expected = other.get_image_features(mixed["images"]).pooler_output, logits_of(other, **mixed)[:, -1]
        other.set_attn_implementation("flex_attention")
        assert_near(other.get_image_features(mixed["images"]).pooler_output, features)
        assert_near(logits_of(other, **mixed)[:, -1], expected)
