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
"""The web page: what is on it, and what happens when a visitor does something.

What is unusual here:

- Every visitor has a session of Gradio's with a conversation in it; nothing is shared but the model. So many answers
  as the page allows are written at the same time, and the other questions wait in a queue.
- Old conversations are kept in the visitor's browser (`localStorage`) and nowhere else. They are read from there right
  before they are changed and written right behind, so that two windows do not overwrite each other's.
- The words are set anew when the language changes: `Page.words` lists each component with the word it shows.
- A picture is read from the upload into the visitor's session, and its file deleted. Messages hold it as a data address.
- `OwnHostOnly` tells the browser to ask no other host for anything, whatever a model writes (a picture, a script).
"""

import html
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from agent_tools import Tool
from local_code import check_model_type, load_module, register
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import AutoConfig, GenerationConfig

from . import web_conversation as conversations
from .picture_files import read_address, read_picture, write_address
from .web_answers import Settings, answer
from .web_conversation import Conversation
from .web_loading import LoadingModel
from .web_texts import TEXTS, pick_language


MAX_MESSAGE_LENGTH = 20_000
MAX_WAITING = 64
# Of a picture before it is made smaller.
MAX_UPLOAD = "16mb"
# Pixels of a picture in a bubble.
SHOWN_SIDE = 240
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]
# Fonts that are on the visitor's machine: none is fetched.
FONTS = ("system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif")
MONO_FONTS = ("ui-monospace", "Consolas", "Menlo", "DejaVu Sans Mono", "Noto Sans Mono CJK SC", "monospace")

KEY = "chatglm-web-demo"
# `saved` is the first input of every event that needs the old conversations.
READ_SAVED = f"(saved, ...others) => [JSON.parse(localStorage.getItem('{KEY}') ?? '[]'), ...others]"
WRITE_SAVED = f"(saved) => localStorage.setItem('{KEY}', JSON.stringify(saved))"
ON_LOAD = f"""() => {{
  const theme = localStorage.getItem('{KEY}-theme');
  if (theme) document.body.classList.toggle('dark', theme === 'dark');
  document.querySelector('#theme').ariaLabel = 'Light / dark, 浅色 / 深色';
  const saved = JSON.parse(localStorage.getItem('{KEY}') ?? '[]');
  return [null, saved, localStorage.getItem('{KEY}-language') ?? navigator.language, innerWidth >= 1000];
}}"""
WRITE_LANGUAGE = f"(language) => localStorage.setItem('{KEY}-language', language)"
SWITCH_THEME = f"""() => {{
  const is_dark = document.body.classList.toggle('dark');
  localStorage.setItem('{KEY}-theme', is_dark ? 'dark' : 'light');
}}"""
# Of events that take no time: they wait for nobody, and only the page may call them.
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# One conversation in a line of the list, with an ellipsis where its title does not fit.
CSS = """
#chats .wrap { flex-direction: column; gap: 2px; max-height: 40vh; overflow-y: auto; flex-wrap: nowrap; }
#chats label { width: 100%; overflow: hidden; box-shadow: none; flex-shrink: 0; }
#chats label span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#chats label input { display: none; }
#chats label.selected { background: var(--color-accent-soft); }
#top button { height: 32px; }
#theme { font-size: var(--text-xl); padding: 0; line-height: 1; }
#chat pre { padding-right: 36px; }
#chat .token.punctuation { color: inherit; }
.dark #chat .token { filter: brightness(1.4); }
#name h2 { overflow-wrap: anywhere; }
#top, #picture { align-items: center; }
#preview img { max-height: 80px; }
#progress progress { width: 100%; height: 12px; display: block; }
#progress .error { color: var(--error-text-color); }
@media (max-width: 768px) { #top { padding-left: 28px; } #name h2 { font-size: var(--text-lg); }
  #chat pre code { white-space: pre-wrap; overflow-wrap: anywhere; } }
"""


class OwnHostOnly:
    """Middleware that forbids the browser to ask any other host than the one the page comes from."""

    POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'"

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = self.POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy)


@dataclass(frozen=True)
class PageSettings:
    """What the page offers.

    Attributes:
        name: the model's, above the conversation.
        max_length: what the slider may reach, and where it stands at first, in tokens.
        generation: where the sliders for `temperature` and `top_p` stand at first.
        functions: tools that run by themselves, by name; `None` for a model that knows no tools.
        concurrency: how many answers are written at the same time.
        picture_side: pixels of a picture's side as the model is shown it; 0 for one that reads text alone.
    """

    name: str
    max_length: tuple[int, int]
    generation: Mapping[str, float]
    functions: Mapping[str, Tool] | None
    concurrency: int
    picture_side: int = 0

    @classmethod
    def of_folder(cls, folder: Path, functions: Mapping[str, Tool], concurrency: int) -> "PageSettings":
        """What the page offers for a checkpoint folder, before its weights are there.

        Raises:
            OSError, ValueError: if the folder is not a ChatGLM checkpoint.
        """
        check_model_type(folder)
        register()
        config = AutoConfig.from_pretrained(folder)
        chat_format = load_module("conversation_chatglm").conversation_format(config.model_version)
        positions = config.max_position_embeddings
        defaults = {"max_length": positions, **chat_format.chat_defaults}
        has_settings = (folder / "generation_config.json").is_file()
        is_greedy = has_settings and GenerationConfig.from_pretrained(folder).do_sample is False
        return cls(
            name=folder.resolve().name,
            max_length=(positions, min(positions, defaults["max_length"])),
            generation={"temperature": 0 if is_greedy else defaults["temperature"], "top_p": defaults["top_p"]},
            # CODEPATH: chatglm-6b and chatglm2-6b answer with text alone; chatglm3-6b and glm-4-9b call tools.
            functions=None if chat_format.response_template is None else functions,
            concurrency=concurrency,
            # CODEPATH: glm-4v-9b; the others read text alone.
            picture_side=config.vision_config["image_size"] if config.vision_config else 0,
        )


@dataclass
class Session:
    """What one visitor is doing.

    Attributes:
        conversation: the one that is open.
        turn: the answer that is being written to it; another object, or none, tells an answer that it is not wanted.
        picture: the data address of a picture that the next question is about, or an empty string.
    """

    conversation: Conversation = field(default_factory=lambda: {"id": "", "messages": []})
    turn: object = None
    picture: str = ""


@dataclass
class Page:
    """The page under construction: its components and events."""

    settings: PageSettings
    loading: LoadingModel
    words: list[tuple[gr.blocks.Block, str, str]] = field(default_factory=list)

    def build(self) -> gr.Blocks:
        """Make the page."""
        with gr.Blocks(title=self.settings.name, analytics_enabled=False, fill_height=True, fill_width=True) as blocks:
            # A component, not a `gr.State`: the browser remembers it.
            self.language = gr.Textbox("en", visible=False)
            # Copied for every visitor, whose events then share one object.
            self.session = gr.State(Session())
            self.saved = gr.JSON([], visible=False)
            self.is_wide = gr.Checkbox(visible=False)
            self.add_sidebar()
            self.add_chat()
            self.add_answers()
            self.add_commands()
            self.add_start(blocks)
        return blocks

    def word(self, component: Any, **properties: str) -> Any:
        """Note the words that a component shows: `label="settings"` is `TEXTS[language]["settings"]`."""
        self.words += [(component, name, key) for name, key in properties.items()]
        return component

    def add_sidebar(self) -> None:
        """Old conversations and settings."""
        texts, settings = TEXTS["en"], self.settings
        with gr.Sidebar(open=False, elem_id="sidebar") as self.sidebar:
            self.new_chat = self.word(gr.Button(texts["new_chat"], variant="primary"), value="new_chat")
            self.chats = self.word(gr.Radio([], label=texts["chats"], elem_id="chats"), label="chats")
            with self.word(gr.Accordion(texts["settings"], open=False, elem_id="settings"), label="settings"):
                self.system = self.word(
                    gr.Textbox(lines=2, max_length=MAX_MESSAGE_LENGTH), label="system", placeholder="system_hint"
                )
                most, length = settings.max_length
                self.max_length = self.word(gr.Slider(min(64, most), most, length, step=1), label="max_length")
                temperature, top_p = settings.generation["temperature"], settings.generation["top_p"]
                self.temperature = self.word(gr.Slider(0, 2, temperature, step=0.05), label="temperature")
                self.top_p = self.word(gr.Slider(0.05, 1, top_p, step=0.05), label="top_p")
            # CODEPATH: chatglm-6b and chatglm2-6b know no tools.
            with self.word(
                gr.Accordion(texts["tools"], open=False, elem_id="tools", visible=settings.functions is not None),
                label="tools",
            ):
                self.functions = self.word(
                    gr.CheckboxGroup(list(settings.functions or ()), visible=bool(settings.functions)),
                    label="functions",
                    info="functions_info",
                )
                self.tools = self.word(
                    gr.Textbox(lines=6, max_lines=12, max_length=MAX_MESSAGE_LENGTH, elem_id="descriptions"),
                    label="descriptions",
                    info="descriptions_info",
                )

    def add_chat(self) -> None:
        """The conversation, and where the next message is typed."""
        texts = TEXTS["en"]
        with gr.Row(elem_id="top"):
            gr.Markdown(f"## {self.settings.name}", elem_id="name")
            self.other_language = self.word(
                gr.Button(texts["other_language"], scale=0, min_width=72, size="sm", elem_id="language"),
                value="other_language",
            )
            self.theme = gr.Button("◐", scale=0, min_width=44, size="sm", elem_id="theme")
        self.progress = gr.HTML(visible=False, elem_id="progress")
        self.chatbot = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            scale=1,
            min_height=200,
            editable="user",
            latex_delimiters=LATEX,
            buttons=["copy", "copy_all"],
            feedback_options=None,
            layout="bubble",
            placeholder=texts["welcome"].format(model=self.settings.name),
        )
        # CODEPATH: glm-4v-9b is shown pictures.
        with gr.Row(visible=bool(self.settings.picture_side), elem_id="picture"):
            self.attach = self.word(
                gr.UploadButton(
                    texts["attach"], file_types=["image"], scale=0, min_width=160, size="sm", elem_id="attach"
                ),
                label="attach",
            )
            self.preview = gr.HTML(visible=False, elem_id="preview")
            self.detach = gr.Button("✕", visible=False, scale=0, min_width=44, size="sm", elem_id="detach")
        self.textbox = gr.Textbox(
            show_label=False,
            lines=1,
            max_lines=8,
            max_length=MAX_MESSAGE_LENGTH,
            submit_btn=True,
            interactive=False,
            autofocus=True,
            elem_id="message",
        )

    @property
    def talk(self) -> list[Any]:
        """What shows the conversation and what may come next; see `show`."""
        return [self.chatbot, self.textbox, self.preview, self.detach]

    def add_answers(self) -> None:
        """What is answered by the model, and the button that stops it."""
        question = {"outputs": self.talk, **QUIET}
        # In the queue: without it, warnings are not shown (Gradio 6.31).
        self.attach.upload(
            self.take_picture,
            [self.session, self.language, self.attach],
            self.talk,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        self.detach.click(self.drop_picture, [self.session, self.language], self.talk, **QUIET)
        asked = self.textbox.submit(self.ask, [self.session, self.language, self.textbox], **question)
        retried = self.chatbot.retry(self.retry, [self.session, self.language], **question)
        edited = self.chatbot.edit(self.edit, [self.session, self.language], **question)
        self.answers = [self.then_answer(event) for event in (asked, retried, edited)]
        self.textbox.stop(None, None, None, cancels=self.answers, **QUIET)

    def then_answer(self, event: gr.events.Dependency) -> gr.events.Dependency:
        """Answer the question of an event, and save the conversation whether the answer was stopped or not."""
        settings = [self.system, self.max_length, self.temperature, self.top_p, self.functions, self.tools]
        answered = event.success(
            self.answer,
            [self.session, self.language, *settings],
            self.chatbot,
            concurrency_limit=self.settings.concurrency,
            concurrency_id="answers",
            show_progress="minimal",
            api_visibility="private",
        )
        # A failure is not among what `then` follows (Gradio 6.31).
        for ended in (answered.then, answered.failure):
            inputs = [self.saved, self.session, self.language]
            outputs = [self.saved, self.chats, *self.talk]
            self.then_save(ended(self.finish, inputs, outputs, js=READ_SAVED, **QUIET))
        return answered

    def then_save(self, event: gr.events.Dependency) -> None:
        """Keep the old conversations in the browser after an event that changed them."""
        event.success(None, [self.saved], None, js=WRITE_SAVED, **QUIET)

    def add_commands(self) -> None:
        """What goes without the model."""
        inputs = [self.saved, self.session, self.language]
        outputs = [self.saved, self.chats, *self.talk]
        kwargs = {"js": READ_SAVED, "cancels": self.answers, **QUIET}
        self.then_save(self.chatbot.undo(self.undo, inputs, outputs, **kwargs))
        self.then_save(self.chatbot.clear(self.clear, inputs, outputs, **kwargs))
        self.then_save(self.new_chat.click(self.start_new, inputs, outputs, **kwargs))
        self.then_save(self.chats.input(self.open, [*inputs, self.chats], outputs, **kwargs))
        self.other_language.click(
            lambda language: "en" if language == "zh" else "zh", self.language, self.language, **QUIET
        ).then(
            self.show_words,
            [self.language, self.session],
            [*self.talk, *self.components_with_words()],
            **QUIET,
        ).then(None, self.language, None, js=WRITE_LANGUAGE, **QUIET)
        self.theme.click(None, None, None, js=SWITCH_THEME, **QUIET)

    def add_start(self, blocks: gr.Blocks) -> None:
        """What happens when a browser has loaded the page: the old conversations, the language, and the model."""
        blocks.load(
            self.restore,
            [self.session, self.saved, self.language, self.is_wide],
            [self.saved, self.chats, self.language, self.sidebar],
            js=ON_LOAD,
            **QUIET,
        ).then(
            self.show_words,
            [self.language, self.session],
            [*self.talk, *self.components_with_words()],
            **QUIET,
        ).then(
            self.watch_loading,
            self.language,
            [self.progress, self.textbox],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )

    def components_with_words(self) -> list[Any]:
        """The components of `words`, once each."""
        return list(dict.fromkeys(component for component, _, _ in self.words))

    # The handlers: what they get are the inputs above, what they return goes to the outputs.

    def show(self, session: Session, language: str) -> tuple[Any, ...]:
        """The open conversation, what the box below it asks for, and the picture that is to come, for `talk`."""
        texts, messages = TEXTS[pick_language(language)], session.conversation["messages"]
        tool = conversations.called_tool(messages)
        return (
            gr.update(
                value=bubbles(messages, texts),
                placeholder=texts["welcome"].format(model=self.settings.name),
            ),
            gr.update(placeholder=texts["result"].format(name=tool) if tool else texts["question"]),
            gr.update(value=as_html(session.picture, texts), visible=bool(session.picture)),
            gr.update(visible=bool(session.picture)),
        )

    def show_words(self, language: str, session: Session) -> list[Any]:
        """Everything in another language."""
        texts = TEXTS[pick_language(language)]
        updates: dict[Any, dict[str, str]] = {}
        for component, name, key in self.words:
            updates.setdefault(component, {})[name] = texts[key]
        return [*self.show(session, language), *(gr.update(**properties) for properties in updates.values())]

    def list_chats(self, saved: list[Conversation], session: Session) -> Any:
        """The old conversations by their titles, with the one that is open."""
        choices = [(conversations.title(chat), chat["id"]) for chat in saved]
        opened = session.conversation["id"]
        return gr.update(choices=choices, value=opened if opened in (chat["id"] for chat in saved) else None)

    def restore(self, session: Session, saved: Any, language: str, is_wide: bool) -> tuple[Any, ...]:
        saved = conversations.read_saved(saved)
        session.conversation = saved[0] if saved else conversations.new_conversation()
        return saved, self.list_chats(saved, session), pick_language(language), gr.update(open=is_wide)

    def watch_loading(self, language: str) -> Iterator[tuple[Any, Any]]:
        texts = TEXTS[pick_language(language)]
        while not self.loading.wait(seconds=0.2):
            percent = round(100 * self.loading.fraction)
            bar = f"<label>{texts['loading']}… {percent} %<progress max=100 value={percent}></progress></label>"
            yield gr.update(value=bar, visible=True), gr.skip()
        if self.loading.error:
            message = html.escape(texts["failed"].format(error=self.loading.error))
            yield gr.update(value=f"<p class=error>{message}</p>", visible=True), gr.skip()
        else:
            yield gr.update(value="", visible=False), gr.update(interactive=True)

    def take_picture(self, session: Session, language: str, path: str) -> tuple[Any, ...]:
        """Keep an uploaded picture for the next question, and no file of it."""
        texts = TEXTS[pick_language(language)]
        file = Path(path)
        try:
            content = file.read_bytes()
            file.unlink()
            if not self.settings.picture_side or conversations.has_picture(session.conversation):
                raise ValueError(texts["one_picture"])
            session.picture = write_address(read_picture(content), self.settings.picture_side)
        except (OSError, ValueError) as error:
            # Gradio would lay an error over everything that is shown anew.
            gr.Warning(str(error))
        return self.show(session, language)

    def drop_picture(self, session: Session, language: str) -> tuple[Any, ...]:
        session.picture = ""
        return self.show(session, language)

    def ask(self, session: Session, language: str, text: str | None) -> tuple[Any, ...]:
        text, texts = text or "", TEXTS[pick_language(language)]
        if len(text) > MAX_MESSAGE_LENGTH:
            raise as_error(texts["too_long"].format(limit=MAX_MESSAGE_LENGTH))
        if not text.strip():
            return tuple(gr.skip() for _ in self.talk)
        conversation = conversations.with_question(session.conversation, text, session.picture)
        session.picture = ""
        return self.begin(session, conversation, language)

    def retry(self, session: Session, language: str) -> tuple[Any, ...]:
        return self.begin(session, conversations.without_last_answer(session.conversation), language)

    def edit(self, session: Session, language: str, event: gr.EditData) -> tuple[Any, ...]:
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        edited = conversations.with_edited(session.conversation, index, str(event.value))
        return self.begin(session, edited, language)

    def begin(self, session: Session, conversation: Conversation, language: str) -> tuple[Any, ...]:
        """The page while it is busy: nothing can be typed, and the button stops."""
        session.conversation = conversation
        chat, _, *picture = self.show(session, language)
        stop = TEXTS[pick_language(language)]["stop"]
        return chat, gr.update(value="", interactive=False, submit_btn=False, stop_btn=stop), *picture

    def answer(
        self,
        session: Session,
        language: str,
        system: str | None,
        max_length: int,
        temperature: float,
        top_p: float,
        functions: list[str],
        tools: str | None,
    ) -> Iterator[Any]:
        texts = TEXTS[pick_language(language)]
        if not conversations.without_open_question(session.conversation)[1]:
            return
        try:
            described = conversations.read_tools(tools or "") if self.settings.functions is not None else []
        except ValueError as error:
            raise as_error(texts["bad_descriptions"].format(error=error)) from error
        known = self.settings.functions or {}
        settings = Settings(
            system=system or "",
            generation={"max_length": int(max_length), "temperature": temperature, "top_p": top_p},
            tools=described,
            functions={name: known[name] for name in functions},
            sees=bool(self.settings.picture_side),
        )
        turn = session.turn = object()
        try:
            for conversation in answer(*self.loading.get(), session.conversation, settings):
                if session.turn is not turn:
                    return
                session.conversation = conversation
                yield bubbles(conversation["messages"], texts)
        except (TypeError, ValueError) as error:
            raise as_error(str(error)) from error

    def finish(self, saved: Any, session: Session, language: str) -> tuple[Any, ...]:
        """The page after an answer. A question without one goes back to where it was typed."""
        asked = session.conversation
        session.conversation, question = conversations.without_open_question(asked)
        session.picture = conversations.picture_taken_back(asked, session.conversation) or session.picture
        saved = conversations.with_saved(conversations.read_saved(saved), session.conversation)
        chat, box, *picture = self.show(session, language)
        box = {**box, "interactive": True, "submit_btn": True, "stop_btn": False}
        box = {**box, "value": question} if question else box
        return saved, self.list_chats(saved, session), chat, box, *picture

    def undo(self, saved: Any, session: Session, language: str) -> tuple[Any, ...]:
        conversation, question = conversations.without_last_question(session.conversation)
        session.picture = conversations.picture_taken_back(session.conversation, conversation) or session.picture
        # Otherwise the question would stay in the list of old conversations.
        saved = conversations.without(conversations.read_saved(saved), conversation["id"])
        saved, chats, chat, box, *picture = self.go_to(
            conversation, conversations.with_saved(saved, conversation), session, language
        )
        return saved, chats, chat, {**box, "value": question}, *picture

    def clear(self, saved: Any, session: Session, language: str) -> tuple[Any, ...]:
        saved = conversations.without(conversations.read_saved(saved), session.conversation["id"])
        return self.go_to(conversations.new_conversation(), saved, session, language)

    def start_new(self, saved: Any, session: Session, language: str) -> tuple[Any, ...]:
        return self.go_to(conversations.new_conversation(), self.save(saved, session), session, language)

    def open(self, saved: Any, session: Session, language: str, wanted: str) -> tuple[Any, ...]:
        saved = self.save(saved, session)
        chats = {chat["id"]: chat for chat in saved}
        return self.go_to(chats.get(wanted, session.conversation), saved, session, language)

    def save(self, saved: Any, session: Session) -> list[Conversation]:
        """The old conversations and the one that is open, as far as it was answered."""
        conversation, _ = conversations.without_open_question(session.conversation)
        return conversations.with_saved(conversations.read_saved(saved), conversation)

    def go_to(
        self, conversation: Conversation, saved: list[Conversation], session: Session, language: str
    ) -> tuple[Any, ...]:
        """Open another conversation. An answer to this one is not wanted any more."""
        session.turn, session.conversation = None, conversation
        if conversations.has_picture(conversation):
            session.picture = ""
        return saved, self.list_chats(saved, session), *self.show(session, language)


def bubbles(messages: list[dict[str, Any]], texts: dict[str, str]) -> list[dict[str, Any]]:
    """The bubbles of a conversation, with pictures above what is said of them."""
    made = []
    for bubble in conversations.shown(messages, texts):
        address = bubble.pop("image", "")
        content = [gr.HTML(as_html(address, texts)), bubble["content"]] if address else bubble["content"]
        made.append({**bubble, "content": content})
    return made


@lru_cache(maxsize=64)
def smaller(address: str) -> str:
    """A picture as bubbles show it, which are sent again with every token; empty if there is none in the address."""
    with suppress(ValueError):
        return write_address(read_picture(read_address(address)), SHOWN_SIDE)
    return ""


def as_html(address: str, texts: dict[str, str]) -> str:
    """An element that shows a picture; what comes from a browser is read and written anew."""
    return f'<img src="{smaller(address)}" alt="{texts["picture"]}">' if address else ""


def as_error(message: str) -> gr.Error:
    """An error that a visitor sees, and the terminal does not."""
    return gr.Error(message, print_exception=False)


def start(settings: PageSettings, loading: LoadingModel, host: str, port: int) -> tuple[gr.Blocks, str]:
    """Serve the page in the background.

    Returns:
        Gradio's blocks, to be closed at the end, and the address of the page.
    """
    blocks = Page(settings, loading).build()
    blocks.queue(max_size=MAX_WAITING)
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=MAX_UPLOAD if settings.picture_side else 0,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO_FONTS),
        css=CSS,
        app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
    )
    return blocks, address


__all__ = ["Page", "PageSettings", "start"]
