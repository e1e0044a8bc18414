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
"""Pictures in requests: which are taken, what is answered to them, and what is refused.

A server runs in threads of this process, on the small recorded GLM-4V, whose weights are random.
"""

import base64
import concurrent.futures
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REFERENCE, auto_classes_left_alone
from PIL import Image
from serving_help import Limits, serving_folder


httpx = pytest.importorskip("httpx", reason="needs requirements/serving.txt: make test-programs")
openai = pytest.importorskip("openai", reason="needs requirements/serving.txt: make test-programs")

from serving import picture_files, pictures  # noqa: E402
from serving.engines import SeeingEngine  # noqa: E402
from serving.errors import RequestError  # noqa: E402


pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("leave_the_auto_classes_alone")]

IMAGES = REFERENCE / "glm4v" / "images"
GREEDY = {"temperature": 0, "max_tokens": 12}
HTTP = httpx.Client(timeout=120)


def data_address(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def about(address: str | None, text: str) -> list[dict[str, Any]]:
    """A question, with a picture if there is one."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if address is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": address, "detail": "auto"}})
    return [{"role": "user", "content": parts}]


PICTURES = sorted(IMAGES.glob("*.png"))[:3]
QUESTIONS = [about(data_address(path), "What is it?") for path in PICTURES]
QUESTIONS += [about(None, "What is it?"), about(data_address(PICTURES[0]), "你好"), about(None, "你好")]


@pytest.fixture(scope="module")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    shutil.copyfile(PICTURES[0], folder / "a picture.png")
    (folder / "words.png").write_text("no picture", encoding="utf-8")
    (folder / "out.png").symlink_to(PICTURES[1])
    return folder


@pytest.fixture(scope="module")
def server(leave_the_auto_classes_alone: None, media_folder: Path) -> Iterator[tuple[str, Any]]:
    with serving_folder(REFERENCE / "glm4v", Limits(body_bytes=1 << 24)) as (url, models):
        models.default.media_folder = media_folder
        yield url, models.default


def client_of(url: str) -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(url: str, messages: list[dict[str, Any]]) -> str:
    answer = client_of(url).chat.completions.create(model="glm4v", messages=messages, **GREEDY)
    return answer.choices[0].message.content or ""


def stream(url: str, messages: list[dict[str, Any]]) -> str:
    chunks = client_of(url).chat.completions.create(model="glm4v", messages=messages, stream=True, **GREEDY)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def by_hand(served: Any, picture: Path, text: str) -> str:
    messages = [{"role": "user", "content": text, "image": Image.open(picture)}]
    inputs = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        output = served.engine.pictures.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return served.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lstrip("\n")


def test_answers_are_about_the_picture(server: tuple[str, Any]) -> None:
    url, served = server
    assert isinstance(served.engine, SeeingEngine)
    answers = [ask(url, messages) for messages in QUESTIONS]
    assert answers[:3] == [by_hand(served, path, "What is it?") for path in PICTURES]
    assert len(set(answers)) == len(answers)
    assert [stream(url, messages) for messages in QUESTIONS] == answers


def test_four_clients_at_once_get_what_each_gets_alone(server: tuple[str, Any]) -> None:
    url, _ = server
    alone = [ask(url, messages) for messages in QUESTIONS]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda messages: ask(url, messages), QUESTIONS * 2)) == alone * 2
        assert list(pool.map(lambda messages: stream(url, messages), QUESTIONS)) == alone


def test_a_picture_stays_in_the_conversation(server: tuple[str, Any]) -> None:
    url, served = server
    answer = ask(url, QUESTIONS[0])
    history = [*QUESTIONS[0], {"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    without = [{"role": "user", "content": "What is it?"}, *history[1:]]
    assert ask(url, history) != ask(url, without)
    # The tutorials' door keeps it in what it returns.
    body = {"prompt": "What is it?", "image": data_address(PICTURES[0]), "temperature": 0, "max_length": 40}
    first = HTTP.post(url, json=body).json()
    assert first["status"] == 200 and first["history"][0]["image"] == body["image"]
    prompt = served.tokenizer.encode_conversation(served.model.chat_format.normalize_messages(history))
    more = {"prompt": "Why?", "history": first["history"], "temperature": 0, "max_length": len(prompt) + 40}
    assert HTTP.post(url, json=more).json()["status"] == 200
    assert HTTP.post(url, json=more).json() != HTTP.post(url, json={**more, "history": []}).json()


def test_local_files_of_one_folder(server: tuple[str, Any], media_folder: Path) -> None:
    url, served = server
    expected = ask(url, QUESTIONS[0])
    address = f"file://{media_folder}/a%20picture.png"
    assert ask(url, about(address, "What is it?")) == expected
    refused = {
        f"file://{PICTURES[0]}": "--allowed-local-media-path",
        f"file://{media_folder}/../words.png": "--allowed-local-media-path",
        f"file://{media_folder}/%2e%2e/words.png": "--allowed-local-media-path",
        f"file://{media_folder}/out.png": "--allowed-local-media-path",
        f"file://elsewhere{media_folder}/a%20picture.png": "--allowed-local-media-path",
        "file:///nowhere/at-all.png": "--allowed-local-media-path",
        f"file://{media_folder}/missing.png": "There is no picture",
        f"file://{media_folder}": "There is no picture",
        f"file://{media_folder}/words.png": "cannot be read",
    }
    for wrong, reason in refused.items():
        with pytest.raises(openai.BadRequestError, match=reason):
            ask(url, about(wrong, "What is it?"))
    with pytest.raises(RequestError, match="allowed-local-media-path"):
        pictures.open_picture(address)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}, "Nothing is fetched"),
        ({"type": "image_url", "image_url": {"url": "https://example.invalid/x.png"}}, "Nothing is fetched"),
        ({"type": "image_url", "image_url": {"url": str(PICTURES[0])}}, "no data address"),
        ({"type": "image_url", "image_url": {"url": "data:text/html;base64,AAAA"}}, "no data address"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}, "base64 is wrong"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "cannot be read"),
        ({"type": "image_url", "image_url": {}}, "A picture is a part"),
        ({"type": "image_url", "image_url": 5}, "A picture is a part"),
        ({"type": "image", "path": str(PICTURES[0])}, "A picture is a part"),
        ({"type": "image", "url": "http://127.0.0.1:1/x.png"}, "A picture is a part"),
        ({"type": "image", "image": str(PICTURES[0])}, "A picture is a part"),
        ({"type": "input_audio", "input_audio": {}}, "may hold parts"),
    ],
)
def test_what_is_no_picture_here(server: tuple[str, Any], part: dict[str, Any], reason: str) -> None:
    url, _ = server
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}
    answer = HTTP.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    assert reason in answer.json()["error"]["message"]


def test_other_ways_to_name_a_file_are_refused(server: tuple[str, Any]) -> None:
    url, _ = server
    for image in (str(PICTURES[0]), "http://127.0.0.1:1/x.png", ["x"], 5):
        message = {"role": "user", "content": "x", "image": image}
        assert HTTP.post(f"{url}/v1/chat/completions", json={"messages": [message]}).status_code == 400
        assert HTTP.post(url, json={"prompt": "x", "image": image}).status_code == 400
        history = [message, {"role": "assistant", "content": "y"}]
        assert HTTP.post(url, json={"prompt": "x", "history": history}).status_code == 400
    two = [*QUESTIONS[0], {"role": "assistant", "content": "y"}, *QUESTIONS[1]]
    with pytest.raises(openai.BadRequestError, match="may hold one picture; this one has 2"):
        ask(url, two)


def written(image: Image.Image, kind: str, **settings: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def test_kinds_of_files() -> None:
    image = Image.new("RGB", (3, 2), (250, 10, 10))
    for kind in picture_files.FORMATS:
        opened = pictures.open_picture(written(image, kind))
        assert (opened.mode, opened.size) == ("RGB", (3, 2))
    turned = Image.Exif()
    turned[0x0112] = 6
    assert pictures.open_picture(written(image, "JPEG", exif=turned)).size == (2, 3)
    # It would be handed to another program.
    with pytest.raises(RequestError, match="cannot be read"):
        pictures.open_picture(written(image, "EPS"))
    bomb = written(Image.new("1", (20_000, 6_000)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(RequestError, match="20000 × 6000 pixels"):
        pictures.open_picture(bomb)
    with pytest.raises(RequestError, match="cannot be read"):
        pictures.open_picture(written(Image.effect_noise((64, 64), 50), "PNG")[:-2000])


@pytest.mark.parametrize("name", ["glm4", "chatglm3", "chatglm1"])
def test_models_that_read_text_alone_say_so(name: str) -> None:
    with auto_classes_left_alone(), serving_folder(REFERENCE / name) as (url, _):
        for messages in (QUESTIONS[0], [{"role": "user", "content": "x", "image": data_address(PICTURES[0])}]):
            answer = HTTP.post(f"{url}/v1/chat/completions", json={"messages": messages})
            assert answer.status_code == 400 and f"{name} reads text alone" in answer.json()["error"]["message"]
        answer = HTTP.post(url, json={"prompt": "x", "image": data_address(PICTURES[0])})
        assert answer.status_code == 400 and "reads text alone" in answer.json()["error"]
