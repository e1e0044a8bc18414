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
"""Folders that carry a chat template, as later revisions of the published ones do, read conversations like those without.

The published templates are not part of this repository: the tests on them read
`$CHATGLM_REFERENCE_DIR/reference/templates/`, and the others make a template known that they made up.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from generations import GENERATION_CASES, RECORDED
from transformers import AutoTokenizer, PreTrainedTokenizerBase


pytestmark = pytest.mark.floor

# The published texts, and the generation that has them.
REVISIONS = {"chatglm3-6b-103caa4": "chatglm3", "glm-4-9b-chat": "glm4", "glm-4-9b-chat-later": "glm4"}
RECORDED_CONVERSATIONS = {"chatglm3": "tokenizer-chatglm3", "glm4": "tokenizer-glm4-synthetic"}
MADE_UP = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
every_revision = pytest.mark.parametrize("revision", REVISIONS)


@pytest.fixture
def published() -> Callable[[str], str]:
    folder = os.environ.get("CHATGLM_REFERENCE_DIR")
    if not folder:
        pytest.skip(
            "needs the published templates: set CHATGLM_REFERENCE_DIR to the folder above reference/templates/"
        )
    return lambda name: (Path(folder) / "reference" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture
def load(
    source: Callable[[str], ModuleType], reference_dir: Path, tmp_path: Path
) -> Callable[..., PreTrainedTokenizerBase]:
    """The tokenizer of a small checkpoint with these keys in tokenizer_config.json and these files beside it."""

    def tokenizer(case: str, files: dict[str, str] | None = None, **settings: Any) -> PreTrainedTokenizerBase:
        folder = tmp_path / f"{case}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in [*(reference_dir / case).glob("*.model"), *(reference_dir / case).glob("*config.json")]:
            shutil.copyfile(path, folder / path.name)
        for name, text in (files or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}), encoding="utf-8")
        name = {"glm4": "ChatGLM4Tokenizer"}.get(case, "ChatGLMTokenizer")
        return getattr(source("tokenization_chatglm"), name).from_pretrained(folder)

    return tokenizer


@every_revision
def test_the_published_templates_are_known(
    source: Callable[[str], ModuleType], published: Callable[[str], str], revision: str
) -> None:
    text = published(revision)
    chat_format = source("conversation_chatglm").CONVERSATION_FORMATS[REVISIONS[revision]]
    for same in (text, text.replace("\n", "\r\n"), text.replace(" ", "") + "\n", f"  {text}"):
        assert chat_format.current_template(same) == chat_format.chat_template
    assert chat_format.current_template(text + "x") == text + "x"


@every_revision
@pytest.mark.parametrize("place", ["setting", "file", "names", "folder"])
def test_ids_of_late_folders_are_those_of_early_ones(
    load: Callable[..., Any],
    published: Callable[[str], str],
    reference_dir: Path,
    caplog: pytest.LogCaptureFixture,
    revision: str,
    place: str,
) -> None:
    text, case = published(revision), REVISIONS[revision]
    late = {
        "setting": lambda: load(case, chat_template=text),
        "file": lambda: load(case, {"chat_template.jinja": text}),
        "folder": lambda: load(case, {"chat_template.jinja": text, "additional_chat_templates/rag.jinja": text}),
        "names": lambda: load(
            case, chat_template=[{"name": name, "template": text} for name in ("default", "tool_use")]
        ),
    }[place]()
    early = load(case)
    assert caplog.text == ""
    assert late.chat_template == early.chat_template
    recorded = json.loads((reference_dir / RECORDED_CONVERSATIONS[case] / "tokenizer_cases.json").read_text("utf-8"))
    conversations = [item for item in recorded["conversations"] if "error" not in item]
    assert len(conversations) >= 8
    for item in conversations:
        history, query = item["history"], {"role": item["role"], "content": item["query"]}
        encoded = late.build_chat_input(item["query"], history, role=item["role"])
        assert encoded["input_ids"].equal(
            early.build_chat_input(item["query"], history, role=item["role"])["input_ids"]
        )
        ids = late.apply_chat_template([*(history or []), query], add_generation_prompt=True, return_dict=False)
        assert [ids] == encoded["input_ids"].tolist()
        training = [
            *(history or []),
            query,
            CALL,
            {"role": "tool", "content": "o"},
            {"role": "assistant", "content": "a"},
        ]
        options: dict[str, Any] = {"return_assistant_tokens_mask": True}
        if not any("tools" in message for message in training):
            options["tools"] = [WEATHER]
        assert late.apply_chat_template(training, **options) == early.apply_chat_template(training, **options)
        assert sum(late.apply_chat_template(training, **options)["assistant_masks"]) > 0


@pytest.mark.parametrize("case", GENERATION_CASES)
@pytest.mark.parametrize("known", ["PUBLISHED_TEMPLATES", "EARLIER_TEMPLATES"])
def test_a_known_template_is_replaced_without_a_word(
    load: Callable[..., Any],
    source: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    case: str,
    known: str,
) -> None:
    digest = hashlib.sha256("".join(MADE_UP.split()).encode()).hexdigest()
    monkeypatch.setattr(source("conversation_chatglm"), known, (digest,))
    ours = source("conversation_chatglm").CONVERSATION_FORMATS[RECORDED[case].model_version].chat_template
    names = [{"name": "default", "template": MADE_UP}, {"name": "own", "template": "{{ 1 }}"}]
    assert load(case, chat_template=f"\n{MADE_UP} ").chat_template == ours
    assert load(case, {"chat_template.jinja": MADE_UP}).chat_template == ours
    # What a version of these files saved for another generation is not the user's own either.
    for other in source("conversation_chatglm").CONVERSATION_FORMATS.values():
        assert load(case, chat_template=other.chat_template).chat_template == ours
    assert caplog.text == ""
    mixed = load(case, chat_template=names)
    assert mixed.chat_template == {"default": ours, "own": "{{ 1 }}"}
    assert caplog.text.count("a chat template of its own") == 1
    chat = [{"role": "user", "content": "<|user|> q"}]
    ids = mixed.build_chat_input("<|user|> q")["input_ids"][0].tolist()
    assert mixed.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ids
    assert mixed.apply_chat_template(chat, chat_template="own", tokenize=False) == "1"


@pytest.mark.parametrize("case", GENERATION_CASES)
def test_a_template_of_ones_own_is_kept_and_said_once(
    load: Callable[..., Any],
    case_model: Callable[[str], Any],
    case_tokenizer: Callable[[str], Any],
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    own = load(case, chat_template=MADE_UP)
    assert own.chat_template == MADE_UP
    assert caplog.text.count("a chat template of its own") == 1
    for told in ("control tokens", "mask for training", "delete `chat_template`", "`chat` does not"):
        assert told in caplog.text
    caplog.clear()
    chat = [{"role": "user", "content": "q"}]
    assert own.apply_chat_template(chat, tokenize=False) == "<|user|>q"
    options = {"max_new_tokens": 3, "do_sample": False}
    answer = case_model(case).chat(own, "q", **options)
    assert answer == case_model(case).chat(case_tokenizer(case), "q", **options)
    own.chat_template = own.chat_format.chat_template
    ids = own.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert [ids] == case_tokenizer(case).build_chat_input("q")["input_ids"].tolist()
    assert caplog.text == ""


def test_a_template_of_ones_own_is_saved(load: Callable[..., Any], tmp_path: Path) -> None:
    load("chatglm3", chat_template=MADE_UP).save_pretrained(tmp_path / "saved")
    assert type(load("chatglm3")).from_pretrained(tmp_path / "saved").chat_template == MADE_UP


def test_the_auto_class_says_it_once(
    case_folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(case_folder("chatglm3"), tmp_path / "own", ignore=shutil.ignore_patterns("*.bin")))
    (folder / "chat_template.jinja").write_text(MADE_UP, encoding="utf-8")
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).chat_template == MADE_UP
    assert caplog.text.count("a chat template of its own") == 1
