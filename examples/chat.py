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

`/help` lists the commands, Ctrl-C stops an answer. Questions can also come through a pipe, one on each line; then only
the answers are printed, and what else there is to say goes to the standard error.
"""

import argparse
import json
import os
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from arguments import add_terminal_arguments
from chat_commands import run_command
from local_code import load_tokenizer, pick_device, pick_dtype, read_json_object, register
from terminal import LineReader, default_history_file, harmless, note, use_utf8
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging


TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "ice_text.model")


class TokenClock(StoppingCriteria):
    """Stops nothing: it sees every token, and counts and times them."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.prompt_tokens = self.tokens = 0
        self.first_seconds = self.seconds = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        self.seconds = time.perf_counter() - self.start
        if self.tokens == 0:
            self.prompt_tokens, self.first_seconds = input_ids.shape[1] - 1, self.seconds
        self.tokens = input_ids.shape[1] - self.prompt_tokens
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def __str__(self) -> str:
        later = self.seconds - self.first_seconds
        speed = f", {(self.tokens - 1) / later:.1f} tokens a second after it" if self.tokens > 1 else ""
        return (
            f"{self.prompt_tokens} tokens to read, {self.tokens} written; "
            f"the first came after {self.first_seconds:.2f} s{speed}"
        )


@dataclass
class Conversation:
    """What was said so far, and what the model computed for it.

    Attributes:
        generate_kwargs: further arguments of `stream_chat`.
        system: what is said before the conversation; empty for nothing.
        tools: descriptions of tools that are offered; `None` for none.
        history: the messages after that, as dicts.
        is_call: whether the last answer is a call, so that what is said next is its result.
        image: the file of a picture that goes with the next question.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generate_kwargs: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    tools: list[Any] | dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    is_call: bool = False
    image: str | None = None
    cache: Any = None
    clock: TokenClock | None = None

    def clear(self) -> None:
        """Forget what was said. The system message and the tools stay."""
        self.history, self.cache, self.is_call, self.image = [], None, False, None

    def beginning(self) -> list[dict[str, Any]]:
        """The message before the conversation, if there is one.

        Raises:
            ValueError, TypeError: for tools, if the generation knows none or cannot read these.
        """
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages = self.model.chat_format.add_tools(messages, self.tools)
        # Descriptions may also be such that only writing them down fails.
        self.model.chat_format.segments([*messages, {"role": "user", "content": ""}])
        return messages

    def replace(self, **changes: Any) -> None:
        """Change attributes, if the result is a conversation that the generation can go on with.

        Raises:
            ValueError, TypeError: if it is not; nothing has changed then.
        """
        changed = Conversation(
            self.model,
            self.tokenizer,
            **{"system": self.system, "tools": self.tools, "history": self.history} | changes,
        )
        chat_format = self.model.chat_format
        changed.history = chat_format.normalize_messages(changed.history)
        if changed.history and changed.history[-1]["role"] != "assistant":
            raise ValueError("the last message of a conversation must be an answer")
        before = changed.beginning() + changed.history
        chat_format.segments([*before, {"role": "user", "content": ""}])
        last = changed.history[-1] if changed.history else {"content": ""}
        response, _ = chat_format.read_answer(f"{last.get('metadata', '')}\n{last['content']}", before)
        self.is_call = self._wants_result(response)
        self.system, self.tools, self.history = changed.system, changed.tools, changed.history

    def say(self, query: str) -> None:
        """Print the answer as it comes. Ctrl-C stops it; what was printed until then counts as the answer."""
        before = self.beginning()
        self.clock = TokenClock()
        settings = {"past_key_values": self.cache, "return_past_key_values": True, **self.generate_kwargs}
        settings |= {"image": self.image} if self.image else {}
        self.image = None
        settings |= {"role": "observation" if self.is_call else "user", "stopping_criteria": [self.clock]}
        shown = ""
        with (
            suppress(KeyboardInterrupt),
            closing(self.model.stream_chat(self.tokenizer, query, before + self.history, **settings)) as stream,
        ):
            for response, messages, self.cache in stream:
                # ChatGLM-6B and ChatGLM2 give pairs, which could not hold everything that may come.
                self.history = self.model.chat_format.normalize_messages(messages)[len(before) :]
                self.is_call = self._wants_result(response)
                text = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)
                # A tool call is recognised late, and its JSON does not begin with the text shown so far.
                new = text[len(shown) :] if text.startswith(shown) else f"\n{text}"
                print(harmless(new), end="", flush=True)
                shown = text
        print(flush=True)

    def _wants_result(self, response: str | dict[str, Any]) -> bool:
        """Whether an answer is a call. Without tools, any first line could be the name of ChatGLM3's code interpreter."""
        if isinstance(response, str) or "parameters" in response:
            return not isinstance(response, str)
        return response["name"] in ("interpreter", *getattr(self.model.chat_format, "builtin_tools", ()))

    def retry(self) -> None:
        """Ask the last question once more.

        Raises:
            ValueError: if there is none.
        """
        history = list(self.history)
        while history and history[-1]["role"] == "assistant":
            history.pop()
        if not history:
            raise ValueError("nothing was said yet")
        question = history.pop()
        kept = self.history, self.is_call
        self.history, self.is_call, self.image = history, question["role"] == "observation", question.get("image")
        try:
            self.say(question["content"])
        finally:
            if self.history is history:
                self.history, self.is_call = kept


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
    tokenizer = load_tokenizer(folder)
    model = AutoModel.from_pretrained(folder, dtype=pick_dtype(dtype, folder, device), device_map=device)
    return model.eval(), tokenizer


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_terminal_arguments(parser, default_history_file())
    return parser.parse_args()


def generation_arguments(arguments: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """What was asked for; a checkpoint that does not sample by itself does not sample here."""
    given = {name: getattr(arguments, name) for name in ("max_length", "temperature", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    return {"temperature": 0, **given} if model.generation_config.do_sample is False else given


def converse(conversation: Conversation, reader: LineReader) -> None:
    """Answer until `stop` or the end of the input; Ctrl-C ends what is being done, and nothing else."""
    if reader.is_terminal:
        note("Say something. /help: what else there is, Ctrl-C: stop an answer, Ctrl-D: end.")
    while True:
        try:
            line = reader.read("\nresult> " if conversation.is_call else "\n> ")
            if line in ("stop", "/stop"):
                return
            if not run_command(line, conversation) and line:
                conversation.say(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        except (OSError, ValueError, TypeError) as error:
            note(f"error: {error}")


def main() -> int:
    use_utf8()
    arguments = read_arguments()
    if arguments.once is not None or not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, tokenizer = load(arguments.model, pick_device(arguments.device), arguments.dtype)
        conversation = Conversation(model, tokenizer, generation_arguments(arguments, model))
        if arguments.once is None:
            converse(conversation, LineReader(arguments.history_file))
        else:
            conversation.say(os.fsencode(arguments.once).decode("utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        note(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
