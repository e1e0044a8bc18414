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
"""Writes our tokenizers on the Rust backend as a `PreTrainedTokenizerFast`, which needs no code of this repository.

Its ids are ours for texts, pairs and conversations. What is otherwise:

- Control tokens are found in a text, as in every tokenizer of the library. In ours that is so for GLM-4 alone; with
  `split_special_tokens=True` a text stays text there too. In messages they stay text: the template marks them with a
  word joiner as ours does, and here the normalizer takes the joiners out again, in front of such names alone.
- `sop` and `eop` of ChatGLM2 and ChatGLM3, which are words that a text may hold, are called `<sop>` and `<eop>`.
- The template is encoded as one text, where ours encodes piece by piece. For ChatGLM2 and ChatGLM3 it writes the space
  that SentencePiece puts before each piece. For GLM-4 a message that begins with an empty line has that one token with
  the line break before it.
- `decode` writes the names of all control tokens, which `skip_special_tokens=True` leaves out, and one `�` for each byte
  of a character that is not whole. There are no `position_ids`, `build_chat_input` or `chat`.
"""

import json
import re
from pathlib import Path
from typing import Any

from folder_switch import UpgradeError
from recognise_checkpoint import Checkpoint, load_code
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


# Words that cannot be told from text, by the names that they have in the native tokenizer.
RENAMED = {"sop": "<sop>", "eop": "<eop>"}
# The macro that marks, from its beginning to its end.
PLAIN_MACRO = re.compile(r"\{#- What looks like.*?endmacro -%\}\n", re.DOTALL)
METADATA_MARKS = re.compile(r"plain\(metadata \|[^\n]*\) \}\}")
# What SentencePiece begins a text with has to be written, and the mark of an answer's heading is of no use.
ANSWER_MARKS = re.compile(r" +\{%- set content = content \|[^\n]*%\}\n")
SPACED = "(' ' + content if content else '')"
CHANGES: dict[str, tuple[tuple[re.Pattern | str, str], ...]] = {
    "chatglm2": (
        ("[gMASK]sop", "[gMASK]<sop>"),
        (ANSWER_MARKS, ""),
        ("{{ content + '</s>' }}", f"{{{{ {SPACED} + '</s>' }}}}"),
    ),
    "chatglm3": (
        ("[gMASK]sop", "[gMASK]<sop>"),
        (METADATA_MARKS, "plain(metadata) }}"),
        ("{{- '<|system|>\\n", "{{- '<|system|>\\n "),
        (
            "metadata + '\\n' + content }}\n        {{- listed",
            "metadata + '\\n' + (' ' if content or (role == 'system' and offered is not none) else '') + content }}\n"
            "        {{- listed",
        ),
        ("{{ metadata + '\\n' + content }}", f"{{{{ metadata + '\\n' + {SPACED} }}}}"),
        ("'\\n```python", "'\\n ```python"),
    ),
    "glm4": ((METADATA_MARKS, "plain(metadata) }}"),),
}


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Our tokenizer of a checkpoint, with this repository's code."""
    tokenizer_class = getattr(load_code(checkpoint.tokenizer_module), checkpoint.tokenizer_class)
    tokenizer = tokenizer_class.from_pretrained(checkpoint.folder, model_version=checkpoint.generation)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UpgradeError(f"{checkpoint.folder} has a tokenizer without a Rust backend, which cannot be exported.")
    return tokenizer


def marked_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The names in messages that the native template marks."""
    return *tokenizer.chat_format.marked_tokens, *(
        new for old, new in RENAMED.items() if old in tokenizer.vocabulary.control_tokens
    )


def native_template(tokenizer: Any) -> str | dict[str, str]:
    """Our template, so that its text encoded as a whole has the ids of its pieces; one of the user's own stays.

    Raises:
        ValueError: if our template has changed, and `CHANGES` with it should.
    """
    chat_format = tokenizer.chat_format
    template: str = tokenizer.chat_template
    if template != chat_format.chat_template:
        return template
    plain_macro = load_code("conversation_templates").plain_macro(marked_tokens(tokenizer))
    for old, new in ((PLAIN_MACRO, plain_macro), *CHANGES[chat_format.name]):
        pattern = re.compile(re.escape(old)) if isinstance(old, str) else old
        template, count = pattern.subn(lambda _: new, template)
        if count != 1:
            raise ValueError(f"{old!r} is in the template of {chat_format.name} {count} times instead of once.")
    return template


def native_settings(tokenizer: Any) -> dict[str, Any]:
    """What `tokenizer.json` holds: our Rust tokenizer, whose control tokens are found in text and can be skipped."""
    settings: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    control = tokenizer.vocabulary.control_tokens
    names = {old: new for old, new in RENAMED.items() if old in control}
    special = {*control, *tokenizer.all_special_tokens}
    for token in settings["added_tokens"]:
        token["special"] = token["content"] in special
        if token["content"] in names:
            token |= {"content": names[token["content"]], "single_word": False}
    vocab = settings["model"]["vocab"]
    settings["model"]["vocab"] = {names.get(token, token): index for token, index in vocab.items()}
    processor = json.dumps(settings["post_processor"])
    for old, new in names.items():
        processor = processor.replace(f'"{old}"', f'"{new}"')
    settings["post_processor"] = json.loads(processor)
    rests = "|".join(re.escape(token[1:]) for token in marked_tokens(tokenizer))
    joiner = load_code("conversation_templates").JOINER
    unmark = {"type": "Replace", "pattern": {"Regex": f"{joiner}(?={rests})"}, "content": ""}
    others = settings["normalizer"]
    others = [] if others is None else others["normalizers"] if others["type"] == "Sequence" else [others]
    settings["normalizer"] = {"type": "Sequence", "normalizers": [unmark, *others]}
    return {**settings, "truncation": None, "padding": None}


def native_tokenizer(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The same vocabulary and conversation as our tokenizer in the library's own class."""
    named = {name: getattr(tokenizer, name) for name in tokenizer.vocabulary.named_tokens}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(native_settings(tokenizer))),
        **named,
        extra_special_tokens=[RENAMED.get(token, token) for token in tokenizer.extra_special_tokens],
        chat_template=native_template(tokenizer),
        response_template=tokenizer.response_template,
        padding_side="left",
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_native_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write it, under the class name that older versions of the library know too."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = PreTrainedTokenizerFast.__name__
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["load_tokenizer", "native_tokenizer", "save_native_tokenizer"]
