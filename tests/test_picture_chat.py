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
"""Does `chat` see pictures, in any turn, alone or in a batch, with and without a cache?"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase


pytestmark = pytest.mark.floor

Named = Callable[[str], Any]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model(case_model: Named) -> PreTrainedModel:
    return case_model("glm4v")


@pytest.fixture(scope="module")
def tokenizer(case_tokenizer: Named) -> PreTrainedTokenizerBase:
    return case_tokenizer("glm4v")


@pytest.fixture(scope="module")
def pictures(case: Named) -> dict[str, Image.Image]:
    recorded = case("glm4v")
    return {
        name: Image.open(recorded.files / recorded.expected["preprocess"][name]["file"]) for name in ("wide", "square")
    }


def user(text: str, picture: Any = None) -> dict[str, Any]:
    return {"role": "user", "content": text} | ({} if picture is None else {"image": picture})


def generated(model: PreTrainedModel, tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The answer by the published call."""
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    settings = GREEDY | {"eos_token_id": tokenizer.stop_token_ids()} | options
    ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    is_stop = [int(token_id) in settings["eos_token_id"] for token_id in ids]
    return model.process_response(tokenizer.decode(ids[: is_stop.index(True) if any(is_stop) else None]))


def test_every_form_of_a_question(model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any]) -> None:
    picture = pictures["wide"]
    expected = generated(model, tokenizer, [user("What is it?", picture)])
    assert expected != generated(model, tokenizer, [user("What is it?", pictures["square"])])
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    for query in (user("What is it?", picture), parts, {"content": parts}):
        response, history = model.chat(tokenizer, query, **GREEDY)
        assert response == expected
        assert [message["role"] for message in history] == ["user", "assistant"]
        assert history[0]["image"].size == picture.size
    assert model.chat(tokenizer, "What is it?", image=picture, **GREEDY)[0] == expected
    *_, (response, _) = model.stream_chat(tokenizer, "What is it?", image=picture, **GREEDY)
    assert response == expected
    inputs = model.build_inputs(tokenizer, user("What is it?", picture))
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 12


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_a_picture_in_any_turn(
    model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any], looks: list[int], turn: int
) -> None:
    """With a cache that goes from turn to turn and without one; the cache saves the second look."""
    texts = ["Hello there", "And what is this?", "Are you sure?"]
    messages: list[dict[str, Any]] = []
    history, cached_history, cache = None, None, None
    for index, text in enumerate(texts):
        query = user(text, pictures["wide"] if index == turn else None)
        response, history = model.chat(tokenizer, query, history, **GREEDY)
        del looks[:]
        cached, cached_history, cache = model.chat(
            tokenizer, query, cached_history, past_key_values=cache, return_past_key_values=True, **GREEDY
        )
        assert looks == [1] * (index == turn)
        messages.append(query)
        assert response == cached == generated(model, tokenizer, messages)
        messages.append({"role": "assistant", "metadata": "", "content": history[-1]["content"]})
        assert "image" not in {key for message in history if message["role"] == "assistant" for key in message}
    assert cache.get_seq_length() == len(cache.token_ids)


def test_a_cache_knows_its_picture(
    model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any], looks: list[int]
) -> None:
    options = GREEDY | {"return_past_key_values": True}
    _, _, cache = model.chat(tokenizer, user("Well?", pictures["wide"]), **options)
    for name in ("square", "wide", None):
        query = user("Well?", name and pictures[name])
        expected = model.chat(tokenizer, query, **GREEDY)[0]
        del looks[:]
        assert model.chat(tokenizer, query, past_key_values=cache, **options)[0] == expected
        assert looks == [1] * (name is not None)
        assert (cache.picture_surplus is not None) == (name is not None)
    # A stream that is given up leaves a cache of use.
    stream = model.stream_chat(tokenizer, user("Well?", pictures["wide"]), past_key_values=cache, **options)
    next(stream)
    stream.close()
    assert model.chat(tokenizer, query, past_key_values=cache, **options)[0] == expected


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 7}])
def test_ways_to_decode(
    model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any], options: dict[str, Any]
) -> None:
    messages = [user("What is it?", pictures["wide"]), {"role": "assistant", "content": "A"}, user("What is it?")]
    response, _ = model.chat(tokenizer, "What is it?", messages[:2], **GREEDY, **options)
    assert response == generated(model, tokenizer, messages, **options)
    if "num_beams" not in options:
        assert response == generated(model, tokenizer, messages)


def test_sampling(model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any]) -> None:
    query, options = user("What is it?", pictures["wide"]), {"max_new_tokens": 12, "temperature": 5.0, "top_p": 1.0}
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(model.chat(tokenizer, query, **options)[0])
    assert answers[0] == answers[1] != model.chat(tokenizer, query, **GREEDY)[0]


def test_batches_with_and_without_pictures(
    model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any], looks: list[int]
) -> None:
    queries = ["Hi", user("What is it?", pictures["wide"]), "And now?", user("Another one", pictures["square"])]
    histories = [None, [("Good morning", "Good morning to you")], [user("Look", pictures["square"])] * 1, None]
    histories[2] = [*histories[2], {"role": "assistant", "content": "Yes"}]
    alone = [model.chat(tokenizer, query, history, **GREEDY) for query, history in zip(queries, histories)]
    del looks[:]
    responses, new_histories = model.batch_chat(tokenizer, queries, histories, **GREEDY)
    assert looks == [3]
    assert responses == [response for response, _ in alone]
    texts = [[message["content"] for message in history] for history in new_histories]
    assert texts == [[message["content"] for message in history] for _, history in alone]


def test_the_published_limit_counts_ids(model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any]) -> None:
    query = user("What is it?", pictures["wide"])
    length = model.build_inputs(tokenizer, query)["input_ids"].shape[1]
    expected, _ = model.chat(tokenizer, query, do_sample=False, max_new_tokens=3)
    assert model.chat(tokenizer, query, do_sample=False, max_length=length + 3)[0] == expected
    with pytest.raises(ValueError, match=f"whose {length} tokens leave no room"):
        model.chat(tokenizer, query, do_sample=False, max_length=length)


def test_what_chat_refuses(
    model: PreTrainedModel, tokenizer: Any, pictures: dict[str, Any], case_model: Named, case_tokenizer: Named
) -> None:
    picture = pictures["wide"]
    with pytest.raises(ValueError, match="may hold one picture, as the model was trained; got 2"):
        model.chat(
            tokenizer, user("And this?", picture), [user("Look", picture), {"role": "assistant", "content": ""}]
        )
    with pytest.raises(ValueError, match="The picture was given twice"):
        model.chat(tokenizer, user("Look", picture), image=picture)
    with pytest.raises(TypeError, match="`query` must be a string, parts or a message, got int"):
        model.chat(tokenizer, 3)
    with pytest.raises(ValueError, match="this generation reads text alone"):
        case_model("chatglm3").chat(case_tokenizer("chatglm3"), "Look", image=picture)
    with pytest.raises(ValueError, match="This model reads text alone"):
        case_model("glm4").chat(case_tokenizer("glm4"), "Look", image=picture)
