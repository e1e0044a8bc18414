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

pytestmark = pytest.mark.browser

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
        ended: the questions whose streams have been closed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.chat_format = model.chat_format
        self.pace: dict[str, threading.Semaphore] = {}
        self.ended: list[str] = []

    def stream_chat(self, tokenizer: Any, query: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with closing(self.model.stream_chat(tokenizer, query, *args, **kwargs)) as stream:
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

    @property
    def bubbles(self) -> list[str]:
        return [text.strip() for text in self.page.locator("#chat .message").all_inner_texts()]


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
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **settings})
        context.set_default_timeout(60_000)
        context.on("request", lambda request: self.asked_hosts.add(urlsplit(request.url).hostname or ""))
        return context

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
        program = importlib.import_module("web_demo")
        finish = program.LoadingModel.finish

        def finish_paced(loading: Any, model: Any, tokenizer: Any) -> None:
            site.model = PacedModel(model)
            finish(loading, site.model, tokenizer)

        patch.setattr(program.LoadingModel, "finish", finish_paced)
        patch.setattr(sys, "argv", ["web_demo.py", str(BUNDLED), "--port", str(site.port), "--dtype", "float32"])
        threading.Thread(target=program.main, daemon=True).start()
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", site.port)) == 0:
                    break
            threading.Event().wait(0.1)
        yield site


@pytest.fixture
def visitor(site: Site) -> Iterator[Visitor]:
    visitor = site.visit()
    visitor.wait_until_ready()
    yield visitor
    visitor.page.context.close()


def test_the_page_is_there_before_the_model(site: Site) -> None:
    program = importlib.import_module("web_demo")
    loading = program.LoadingModel()
    settings = program.describe_page(BUNDLED, 1)
    blocks, address = program.start(settings, loading, "127.0.0.1", free_port())
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
