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
"""The web page in a real browser: `make test-browser` sets up what it needs, except for Chromium.

The program runs as it is, on the bundled model. The model's answers wait for the test where it asks them to, so nothing
here depends on how fast the machine is.
"""

import importlib
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import auto_classes_left_alone


REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"
BUNDLED = EXAMPLES / "tiny-chatglm3"

sys.path.insert(0, str(EXAMPLES))

pytestmark = [
    pytest.mark.browser,
    # Gradio 6.31 calls pandas 3 as it called pandas 2.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'", "ignore:The copy keyword is deprecated"),
]

HELLO = "你好！我是一个很小的演示模型，很高兴见到你。有什么可以帮你的吗？"
FINE = "I am fine, thank you. And you?"
WEATHER_TOOL = (
    '[{"name": "get_weather", "description": "Get the current weather in a city", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string", "description": "The name of the city"}}, "required": ["city"]}}]'
)
MARKDOWN = """Run this:

```python
print("<b>1</b>")
```

It shows $E=mc^2$ and ![a picture](http://example.invalid/picture.png) <img src="http://example.invalid/2.png">"""


class PacedModel:
    """The bundled model, whose answers to some questions wait for the test before every token.

    Attributes:
        pace: for a question, how many tokens of its answer may come; more by `release()`.
        scripts: for a question, an answer that the model was not taught.
        ended: the questions whose streams have been closed.
        shown: what came with each question, the picture in the history or its own, if there was one.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.chat_format = model.chat_format
        self.pace: dict[str, threading.Semaphore] = {}
        self.scripts: dict[str, str] = {}
        self.ended: list[str] = []
        self.shown: list[Any] = []

    def stream_chat(
        self, tokenizer: Any, query: str, history: list[dict[str, str]], *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        self.shown += [*(message["image"] for message in history if "image" in message), kwargs.get("image")][:1]
        if query in self.scripts:
            answer = {"role": "assistant", "content": self.scripts[query]}
            yield answer["content"], [*history, {"role": "user", "content": query}, answer]
            return
        with closing(self.model.stream_chat(tokenizer, query, history, *args, **kwargs)) as stream:
            try:
                for step in stream:
                    # It stays a model that writes: a page can stop it at any time.
                    while query in self.pace and not self.pace[query].acquire(timeout=0.05):
                        yield step
                    yield step
            finally:
                self.ended.append(query)


class Visitor:
    """A window of a browser with the page in it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.chat = page.locator("#chat")
        self.box = page.locator("#message textarea")
        page.goto(address)

    def wait_until_ready(self) -> None:
        self.page.locator("#message textarea:enabled").wait_for()

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def wait_for(self, text: str) -> None:
        self.chat.get_by_text(text).first.wait_for()

    def ask(self, text: str, answer: str) -> None:
        self.say(text)
        self.wait_for(answer)
        self.wait_until_ready()

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).last.click()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something outside of the browser."""
        for _ in range(600):
            if condition():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError("this did not come about")

    def wait_for_titles(self, *titles: str) -> None:
        """Wait until the page lists these conversations and the browser has written them down."""
        shown = self.page.locator("#chats label")
        self.wait_until(lambda: shown.all_inner_texts() == list(titles) and self.num_saved == len(titles))

    @property
    def num_saved(self) -> int:
        saved: str | None = self.page.evaluate(f"localStorage.getItem({load_part('web_page').KEY!r})")
        return len(json.loads(saved or "[]"))

    @property
    def bubbles(self) -> list[str]:
        return self.page.locator("#chat [data-testid=user], #chat [data-testid=bot]").all_inner_texts()


def load_part(name: str) -> Any:
    """A file of examples/serving; other environments than this test's lack what it imports."""
    return importlib.import_module(f"serving.{name}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Site:
    """The program, a browser, and every host that anybody asked."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.model: Any = None
        self.asked_hosts: set[str] = set()
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}/"
        sys.addaudithook(self.note_host)

    def note_host(self, event: str, args: tuple[Any, ...]) -> None:
        """What this process connects to; the browser is a process of its own."""
        if event == "socket.getaddrinfo":
            self.asked_hosts.add(str(args[0]))
        elif event == "socket.connect" and isinstance(args[1], tuple):
            self.asked_hosts.add(str(args[1][0]))

    def new_browser(self, **settings: Any) -> Any:
        """A browser that has never been here."""
        context = self.browser.new_context(
            **{"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **settings}
        )
        context.set_default_timeout(60_000)
        context.on("requestfinished", self.note_request)
        context.on("requestfailed", self.note_request)
        return context

    def note_request(self, request: Any) -> None:
        """What a browser asked for, unless the page's policy kept it from asking."""
        if request.failure != "csp":
            self.asked_hosts.add(urlsplit(request.url).hostname or "")

    def visit(self, context: Any | None = None, **settings: Any) -> Visitor:
        """Open the page, in a new browser or in another window of one."""
        return Visitor((context or self.new_browser(**settings)).new_page(), self.address)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    with importlib.import_module("playwright.sync_api").sync_playwright() as playwright:
        # The sandbox of Chromium refuses to run for root.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def site(chromium: Any) -> Iterator[Site]:
    """The program as the command line starts it."""
    with pytest.MonkeyPatch.context() as patch, auto_classes_left_alone():
        site = Site(chromium)
        program, loading_model = importlib.import_module("web_demo"), load_part("web_loading").LoadingModel
        finish = loading_model.finish

        def finish_paced(loading: Any, model: Any, tokenizer: Any) -> None:
            if site.model is None:
                model = site.model = PacedModel(model)
            finish(loading, model, tokenizer)

        patch.setattr(loading_model, "finish", finish_paced)
        words = ["--port", str(site.port), "--dtype", "float32", "--tools", str(EXAMPLES / "demo_tools.py")]
        patch.setattr(sys, "argv", ["web_demo.py", str(BUNDLED), *words])
        threading.Thread(target=program.main, daemon=True).start()
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", site.port)) == 0:
                    break
            threading.Event().wait(0.1)
        yield site


@pytest.fixture(scope="module")
def used_browser(site: Site) -> Any:
    """A browser that has the files of the page from an earlier visit."""
    return site.new_browser()


@pytest.fixture
def visitor(site: Site, used_browser: Any) -> Iterator[Visitor]:
    visitor = site.visit(used_browser)
    visitor.wait_until_ready()
    yield visitor
    site.model.pace.clear()
    visitor.page.evaluate("localStorage.clear()")
    for page in used_browser.pages:
        page.close()


def test_the_page_is_there_before_the_model(site: Site) -> None:
    loading = load_part("web_loading").LoadingModel()
    settings = load_part("web_page").PageSettings.of_folder(BUNDLED, {}, concurrency=1)
    blocks, address = load_part("web_page").start(settings, loading, "127.0.0.1", free_port())
    try:
        visitor = Visitor(site.new_browser().new_page(), address)
        visitor.page.locator("progress[value='0']").wait_for()
        assert visitor.box.is_disabled()
        loading.fraction = 0.5
        visitor.page.locator("progress[value='50']").wait_for()
        loading.fail("no <memory> left")
        visitor.page.get_by_text("The model could not be loaded: no <memory> left").wait_for()
        assert visitor.box.is_disabled()
        visitor.page.context.close()
    finally:
        blocks.close()


def test_stream_stop_retry_edit_and_undo(site: Site, visitor: Visitor) -> None:
    pace = site.model.pace["How are you?"] = threading.Semaphore(2)
    visitor.say("How are you?")
    visitor.wait_for("I am")
    first = visitor.bubbles[-1]
    assert FINE.startswith(first) and first != FINE
    pace.release(2)
    visitor.wait_until(lambda: len(visitor.bubbles[-1]) > len(first))
    assert visitor.box.is_disabled()
    visitor.click("Stop")
    visitor.wait_until_ready()
    stopped = visitor.bubbles[-1]
    assert FINE.startswith(stopped) and stopped != FINE
    assert site.model.ended[-1:] == ["How are you?"]

    del site.model.pace["How are you?"]
    visitor.click("Retry")
    visitor.wait_for(FINE)
    visitor.wait_until_ready()
    assert visitor.bubbles == ["How are you?", FINE]

    visitor.ask("Hello!", "Hello! I am a tiny demonstration model.")
    visitor.page.get_by_role("button", name="Edit", exact=True).first.click()
    visitor.chat.locator("textarea").fill("Good evening!")
    visitor.click("Submit")
    visitor.wait_for("Good evening! How can I help you today?")
    visitor.wait_until_ready()
    assert visitor.bubbles == ["Good evening!", "Good evening! How can I help you today?"]

    visitor.click("Undo")
    visitor.chat.get_by_text("What would you like to know?").wait_for()
    assert visitor.box.input_value() == "Good evening!"

    # Thrown away while it is written.
    site.model.pace["How are you?"] = threading.Semaphore(1)
    visitor.say("How are you?")
    visitor.wait_for("I")
    count = len(site.model.ended)
    visitor.click("Clear")
    visitor.wait_until(lambda: site.model.ended[count:] == ["How are you?"])
    visitor.wait_until_ready()
    visitor.chat.get_by_text("What would you like to know?").wait_for()
    visitor.wait_for_titles()


def test_a_conversation_in_chinese_on_a_phone_in_the_dark(site: Site) -> None:
    phone = site.visit(viewport={"width": 390, "height": 844}, locale="zh-CN", color_scheme="dark")
    phone.wait_until_ready()
    phone.ask("你好", HELLO)
    phone.ask("法国的首都是哪里？", "法国的首都是巴黎")
    assert phone.box.get_attribute("placeholder") == "请输入问题"
    is_dark, width = phone.page.evaluate(
        "[document.body.classList.contains('dark'), document.documentElement.scrollWidth]"
    )
    assert (is_dark, width) == (True, 390)
    for name in ("#name h2", "#language", "#theme", "#message textarea"):
        box = phone.page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    # The old conversations are behind a button here.
    phone.click("Toggle Sidebar")
    phone.page.get_by_text("历史对话").wait_for()
    phone.page.context.close()


def test_language_and_theme_are_kept(site: Site, visitor: Visitor) -> None:
    visitor.page.get_by_text("Chats", exact=True).wait_for()
    visitor.click("中文")
    visitor.page.get_by_text("历史对话").wait_for()
    visitor.page.get_by_text("设置").wait_for()
    visitor.page.locator("#theme").click()
    again = site.visit(visitor.page.context)
    again.page.get_by_text("历史对话").wait_for()
    assert again.page.evaluate("document.body.classList.contains('dark')")
    again.click("English")
    again.page.get_by_text("Chats", exact=True).wait_for()


def test_markdown_is_rendered_and_no_other_host_is_asked(site: Site, visitor: Visitor) -> None:
    blocked: list[str] = []
    visitor.page.on("console", lambda message: blocked.append(message.text))
    site.model.scripts["Write Markdown."] = MARKDOWN
    visitor.ask("Write Markdown.", "Run this:")
    assert visitor.chat.locator("pre code").inner_text().strip() == 'print("<b>1</b>")'
    assert visitor.chat.locator(".katex").count() == 1
    visitor.wait_until(lambda: sum("example.invalid" in text for text in blocked) >= 2)
    assert site.asked_hosts <= {"127.0.0.1", "localhost"}


def test_old_conversations_are_kept(site: Site, visitor: Visitor) -> None:
    visitor.ask("How are you?", FINE)
    visitor.page.reload()
    visitor.wait_for(FINE)
    visitor.wait_until_ready()
    other_window = site.visit(visitor.page.context)
    other_window.wait_for(FINE)
    other_window.wait_until_ready()
    other_window.click("New chat")
    other_window.ask("Hello!", "Hello! I am")
    # The first window has not seen what the other one did, and must not undo it.
    visitor.ask("I am fine, too.", "I am glad to hear that.")
    visitor.wait_for_titles("How are you?", "Hello!")
    visitor.page.locator("#chats label").last.click()
    visitor.wait_for("Hello! I am")
    visitor.click("Clear")
    visitor.wait_for_titles("How are you?")
    visitor.page.reload()
    visitor.wait_for("I am glad to hear that.")
    visitor.wait_for_titles("How are you?")


def test_tools_are_called_and_given_results(site: Site, visitor: Visitor) -> None:
    visitor.click("Tools ▼")
    visitor.page.locator("#descriptions textarea").fill("no list")
    visitor.say("What is the weather like in Paris?")
    visitor.page.get_by_text("The tools must be a JSON list of descriptions").wait_for()
    visitor.wait_until_ready()
    assert visitor.box.input_value() == "What is the weather like in Paris?"
    visitor.page.locator("#descriptions textarea").fill(WEATHER_TOOL)
    visitor.ask("What is the weather like in Paris?", "Call of get_weather")
    assert visitor.box.get_attribute("placeholder") == "The result of get_weather"
    visitor.ask(
        '{"temperature": 18, "condition": "cloudy"}', "It is cloudy in Paris, and the temperature is 18 degrees."
    )
    visitor.wait_for("Result of get_weather")
    assert visitor.chat.locator("pre code").first.inner_text().split() == ["{", '"city":', '"Paris"', "}"]

    # A function of the page runs by itself.
    visitor.page.locator("#descriptions textarea").fill("")
    visitor.page.get_by_label("get_weather").check()
    visitor.click("New chat")
    visitor.ask("What is the weather like in Rome?", "It is sunny in Rome, and the temperature is 29 degrees.")
    assert visitor.chat.locator("pre code").last.inner_text().split() == [
        '{"temperature":',
        "29,",
        '"condition":',
        '"sunny"}',
    ]


@pytest.fixture
def seer(site: Site, visitor: Visitor, reference_dir: Path) -> Iterator[tuple[Visitor, PacedModel]]:
    """The page of a model that sees."""
    page, folder = load_part("web_page"), reference_dir / "glm4v"
    loading = load_part("web_loading").LoadingModel()
    loading.load(load_part("models").LoadSettings(folder=folder, device="cpu", dtype="float32"))
    model, tokenizer = loading.get()
    paced = PacedModel(model)
    paced.scripts = {"What is it?": "A red circle.", "And its colour?": "It is red."}
    loading.finish(paced, tokenizer)
    blocks, address = page.start(page.PageSettings.of_folder(folder, {}, 1), loading, "127.0.0.1", free_port())
    seer = Visitor(site.new_browser().new_page(), address)
    seer.wait_until_ready()
    yield seer, paced
    seer.page.context.close()
    blocks.close()


def test_a_picture_is_attached_shown_and_kept(
    visitor: Visitor, seer: tuple[Visitor, PacedModel], tmp_path: Path
) -> None:
    # The bundled model reads text alone.
    assert not visitor.page.locator("#attach").is_visible()
    window, model = seer
    upload, preview = window.page.locator("#picture input[type=file]"), window.page.locator("#preview img")
    picture = importlib.import_module("PIL.Image").new("RGB", (48, 24), "red")
    # A browser takes no file twice in a row.
    for name in ("red.png", "red2.png", "red3.png"):
        picture.save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    upload.set_input_files(tmp_path / "broken.png")
    window.page.get_by_text("The picture cannot be read").first.wait_for()
    upload.set_input_files(tmp_path / "red.png")
    preview.wait_for()
    window.page.locator("#detach").click()
    preview.wait_for(state="hidden")
    upload.set_input_files(tmp_path / "red2.png")
    preview.wait_for()
    window.ask("What is it?", "A red circle.")
    # As large as the model sees it.
    assert (model.shown[-1].size, model.shown[-1].getpixel((0, 0))) == ((32, 16), (255, 0, 0))
    in_chat = window.chat.locator("img[alt=Picture]")
    in_chat.wait_for()
    window.wait_until(lambda: bool(in_chat.evaluate("image => image.complete && image.naturalWidth == 32")))
    preview.wait_for(state="hidden")
    window.wait_for_titles("What is it?")
    # No file of it is left.
    left = list(Path(importlib.import_module("gradio.utils").get_upload_folder()).rglob("red*.png"))
    assert left == []

    window.page.reload()
    in_chat.wait_for()
    window.wait_until_ready()
    window.ask("And its colour?", "It is red.")
    assert model.shown[-1].size == (32, 16)
    upload.set_input_files(tmp_path / "red3.png")
    window.page.get_by_text("A conversation can have one picture.").first.wait_for()
    assert not preview.is_visible()
    window.click("Undo")
    window.wait_until(lambda: len(window.bubbles) == 3 or len(window.bubbles) == 2)
    window.click("Undo")
    preview.wait_for()
    assert window.box.input_value() == "What is it?"
    window.page.locator("#detach").click()
    preview.wait_for(state="hidden")
    window.ask("What is it?", "A red circle.")
    assert model.shown[-1] is None and in_chat.count() == 0


def test_users_at_the_same_time_see_their_own_answers(site: Site, visitor: Visitor) -> None:
    for question in ("How are you?", "你好"):
        site.model.pace[question] = threading.Semaphore(0)
    other = site.visit()
    other.wait_until_ready()
    visitor.say("How are you?")
    other.say("你好")
    for _ in range(4):
        for question in ("How are you?", "你好"):
            site.model.pace[question].release(2)
        visitor.page.wait_for_timeout(50)
        assert FINE.startswith(visitor.bubbles[1] if len(visitor.bubbles) > 1 else "")
        assert HELLO.startswith(other.bubbles[1] if len(other.bubbles) > 1 else "")
    for question in ("How are you?", "你好"):
        site.model.pace.pop(question).release(99)
    visitor.wait_for(FINE)
    other.wait_for(HELLO)
    visitor.wait_until_ready()
    assert visitor.bubbles == ["How are you?", FINE]
    assert other.bubbles == ["你好", HELLO]

    # Who leaves stops the answer.
    site.model.pace["Good night!"] = threading.Semaphore(1)
    other.wait_until_ready()
    other.say("Good night!")
    other.wait_for("Good")
    other.page.context.close()
    visitor.wait_until(lambda: "Good night!" in site.model.ended)


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4"])
def test_every_generation_has_its_page(site: Site, reference_dir: Path, name: str) -> None:
    models, page = load_part("models"), load_part("web_page")
    settings = page.PageSettings.of_folder(reference_dir / name, {"f": print}, concurrency=1)
    assert (settings.functions is not None) == (name in ("chatglm3", "glm4"))
    most, length = settings.max_length
    assert 0 < length <= most and 0 <= settings.generation["temperature"] <= 2
    for bits in (4, 8):
        loading = load_part("web_loading").LoadingModel()
        loading.load(models.LoadSettings(folder=reference_dir / name, device="cpu", bits=bits))
        model, _ = loading.get()
        assert model.config.quantization_bit == bits and loading.fraction == 1
    assert page.Page(settings, loading).build().fns


def test_a_folder_that_cannot_be_loaded(site: Site, tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLED, tmp_path / "folder")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    loading = load_part("web_loading").LoadingModel()
    with pytest.raises(ValueError, match="folder cannot be loaded: .*header"):
        loading.load(load_part("models").LoadSettings(folder=folder, device="cpu"))
    assert loading.wait(0) and "header" in loading.error
    with pytest.raises(ValueError, match="header"):
        loading.get()


def test_a_wrong_folder_ends_in_one_line(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    program = importlib.import_module("web_demo")
    monkeypatch.setattr(sys, "argv", ["web_demo.py", str(tmp_path)])
    assert program.main() == 1
    # A port that is taken.
    monkeypatch.setattr(sys, "argv", ["web_demo.py", str(BUNDLED), "--port", str(site.port)])
    assert program.main() == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
