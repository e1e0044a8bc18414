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
"""A chat in the terminal: `python examples/chat.py [MODEL]`, with the small checkpoint of this folder by default.

`clear` forgets the conversation, `stop` ends the program, Ctrl-C stops an answer. Questions can also come through a
pipe, one on each line; then only the answers are printed.
"""

import argparse
import json
import os
import sys
from contextlib import closing, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from local_code import load_tokenizer, read_json_object, register
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


# Gives `input` line editing, and Ctrl-C at once. Windows does without.
with suppress(ImportError):
    import readline  # noqa: F401

BUNDLED = Path(__file__).resolve().parent / "tiny-chatglm3"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "ice_text.model")
DTYPES = ("auto", "bfloat16", "float16", "float32")


class Conversation:
    """What was said so far, and what the model computed for it.

    Args:
        generate_kwargs: further arguments of `stream_chat`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **generate_kwargs: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.generate_kwargs = generate_kwargs
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.history: list[Any] = []
        self.cache: Any = None

    def say(self, query: str) -> None:
        """Print the answer as it comes. Ctrl-C stops it; what was printed until then counts as the answer."""
        settings = {"past_key_values": self.cache, "return_past_key_values": True, **self.generate_kwargs}
        shown = ""
        with (
            suppress(KeyboardInterrupt),
            closing(self.model.stream_chat(self.tokenizer, query, self.history, **settings)) as stream,
        ):
            for response, self.history, self.cache in stream:
                text = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
                # A tool call is recognised late, and its JSON does not begin with the text shown so far.
                print(text[len(shown) :] if text.startswith(shown) else f"\n{text}", end="", flush=True)
                shown = text
        print(flush=True)


def pick_device(name: str) -> str:
    """Replace `auto` by the best device there is, and refuse one that is not there."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {error}") from error
    return name


def load(folder: Path, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a checkpoint folder with this repository's code; nothing in the folder is changed or run.

    Raises:
        ValueError, OSError: if the folder is not a ChatGLM checkpoint, or a file of it cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json")
    model_type = read_json_object(folder / "config.json").get("model_type")
    if model_type != "chatglm":
        raise ValueError(f"{folder} is not a ChatGLM checkpoint: the model_type in its config.json is {model_type!r}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer file ({' or '.join(TOKENIZER_FILES)})")
    register()
    if dtype == "auto":
        dtype = AutoConfig.from_pretrained(folder).dtype or "float32"
        # Processors compute slowly in float16, or not at all.
        dtype = "bfloat16" if device == "cpu" and dtype == torch.float16 else dtype
    tokenizer = load_tokenizer(folder)
    return AutoModel.from_pretrained(folder, dtype=dtype, device_map=device).eval(), tokenizer


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED, help="a checkpoint folder")
    parser.add_argument("--once", metavar="TEXT", help="print the answer to TEXT and end")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--max-length", type=int, help="tokens of a conversation at most, the question included")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float)
    return parser.parse_args()


def generation_arguments(arguments: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """What was asked for; a checkpoint that does not sample by itself does not sample here."""
    given = {name: getattr(arguments, name) for name in ("max_length", "temperature", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    return {"temperature": 0, **given} if model.generation_config.do_sample is False else given


def converse(conversation: Conversation) -> None:
    """Answer line after line until `stop` or the end of the input."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Say something. clear: forget the conversation, stop: end, Ctrl-C: stop an answer.")
    while True:
        try:
            query = input("\n> " if is_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if query == "stop":
            return
        if query == "clear":
            conversation.clear()
        elif query:
            try:
                conversation.say(query)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)


def main() -> int:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    arguments = read_arguments()
    if arguments.once is not None or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, tokenizer = load(arguments.model, pick_device(arguments.device), arguments.dtype)
        conversation = Conversation(model, tokenizer, **generation_arguments(arguments, model))
        if arguments.once is None:
            converse(conversation)
        else:
            conversation.say(os.fsencode(arguments.once).decode("utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
