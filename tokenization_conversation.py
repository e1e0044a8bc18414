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
"""What the tokenizers of all generations do with a conversation: chat input, templates, masks for training.

What is unusual here:

- A conversation is encoded piece by piece (`encode_conversation`), which no rendered string can reproduce. So
  `apply_chat_template` makes ids by that method, as `build_chat_input` does; the Jinja templates give the text.
- Other programs have a conversation rendered to text and encode that text with `add_special_tokens=False`. It is
  recognised and encoded piece by piece, too; see `conversation_rendering`.
- ChatGLM2 and ChatGLM3 share a vocabulary, so a tokenizer may have guessed the wrong one. The methods therefore take
  the `ConversationFormat` of the model, of any generation in `vocabularies`.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy, PreTrainedTokenizerBase
from transformers.utils import get_json_schema, logging, to_py_obj

from .conversation_chatglm import CONVERSATION_FORMATS, ConversationFormat, Message, Segment, conversation_format
from .conversation_rendering import Piece, leave_answer_open, read_rendered, spans_in_rendered
from .tokenization_streaming import GrowingText
from .tokenization_vocabulary import Vocabulary


logger = logging.get_logger(__name__)

# Rust counts ids with 32 bits.
LAST_ID = 2**32 - 1

# What `save_pretrained(push_to_hub=True)` is told about the repository.
UPLOAD_ARGUMENTS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


class ConversationTokenizer(PreTrainedTokenizerBase):
    """What the tokenizers of all generations share: conversations, and the calls of published examples.

    A class brings `vocabularies` and the methods below that raise `NotImplementedError`.
    """

    # The generations that have this kind of vocabulary file, by name; the last one is assumed where nothing tells.
    vocabularies: Mapping[str, Vocabulary]
    chat_format: ConversationFormat
    # Whether `split_special_tokens` is set although nobody asked for it.
    always_splits = False

    @property
    def model_version(self) -> str:
        """The name of the generation, which is saved under this name."""
        return self.chat_format.name

    @property
    def vocabulary(self) -> Vocabulary:
        """What the generation adds to its vocabulary file."""
        return self.vocabularies[self.chat_format.name]

    def stop_token_ids(self, chat_format: ConversationFormat | None = None) -> list[int]:
        """The ids that end an answer, for the tokenizer's own generation or another one."""
        chat_format = self._known_format(chat_format)
        special_ids = self._special_ids(chat_format)
        return [special_ids[token] for token in chat_format.stop_tokens]

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the control tokens, and of `<s>`, `</s>` and `<unk>` under their published names."""
        aliases = self.vocabulary.command_aliases
        ids: list[int] = self.convert_tokens_to_ids(list(aliases.values()))
        return self._control_ids(self.chat_format) | dict(zip(aliases, ids))

    def get_command(self, token: str) -> int:
        """The id of a control token, or of `<bos>`, `<eos>` or `<pad>`.

        Raises:
            ValueError: for any other token.
        """
        commands = self.special_tokens
        if token not in commands:
            raise ValueError(
                f"{reprlib.repr(token)} is not a control token of {self.chat_format.name}; they are {', '.join(commands)}."
            )
        return commands[token]

    def build_prompt(
        self, query: str, history: Sequence[Any] | None = None, chat_format: ConversationFormat | None = None
    ) -> str:
        """The text of a conversation that asks for an answer. For ChatGLM3 and GLM-4 it is for reading only."""
        chat_format = self._known_format(chat_format)
        return chat_format.prompt_text(self._with_query(query, history, "user", chat_format))

    def build_single_message(
        self, role: str, metadata: str, message: str, tokenize: bool = True, message_prefix: list[int] | None = None
    ) -> list[int] | str:
        """The ids of one message of ChatGLM3 or GLM-4: the role token, the metadata with a newline, the content.

        Args:
            role, metadata, message: what the message says.
            tokenize: give ids. Otherwise the text.
            message_prefix: ids that come before those of the content.

        Raises:
            ValueError: for an unknown role, and in the other generations.
        """
        # CODEPATH: a tokenizer of chatglm2 can write the role tokens of chatglm3; chatglm has none.
        chat_format = conversation_format(list(self.vocabularies)[-1])
        if chat_format.uses_pairs:
            raise ValueError("ChatGLM-6B has no form for a single message; use `build_chat_input`.")
        messages = chat_format.normalize_messages([{"role": role, "metadata": metadata, "content": message}])
        segments = chat_format.segments(messages, add_generation_prompt=False)[:3]
        if not tokenize:
            return "".join(segment.text for segment in segments)
        if message_prefix is None:
            return self._encode_segments(segments, chat_format)[0]
        head, content = segments[:2], segments[2:]
        return [
            *self._encode_segments(head, chat_format)[0],
            *message_prefix,
            *self._encode_segments(content, chat_format)[0],
        ]

    def build_chat_input(
        self,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        chat_format: ConversationFormat | None = None,
    ) -> BatchEncoding:
        """Encode a conversation that asks for an answer.

        Args:
            query: the content of the last message.
            history: what comes before it: message dicts or `(question, answer)` pairs; not changed.
            role: the role of the last message.
            chat_format: the generation to encode for, if not the tokenizer's own.

        Returns:
            `input_ids`, `attention_mask` and `position_ids`, tensors with a batch of one.

        Raises:
            TypeError, ValueError: for a history or a role that has no form in this generation.
        """
        chat_format = self._known_format(chat_format)
        messages = self._with_query(query, history, role, chat_format)
        ids = self.encode_conversation(messages, chat_format=chat_format)
        return self.pad({"input_ids": [ids]}, return_tensors="pt")

    def encode_conversation(
        self,
        messages: Sequence[Any] | None,
        add_generation_prompt: bool = True,
        chat_format: ConversationFormat | None = None,
    ) -> list[int]:
        """The ids of a conversation, `[gMASK] sop` included: the one place where conversations become ids.

        Args:
            messages: message dicts of any form `normalize_messages` takes.
            add_generation_prompt: ask for an answer. Otherwise an answer at the end is closed, unless it stands alone.
            chat_format: the generation to encode for, if not the tokenizer's own.
        """
        return self.encode_conversation_with_mask(messages, add_generation_prompt, chat_format)[0]

    def encode_conversation_with_mask(
        self,
        messages: Sequence[Any] | None,
        add_generation_prompt: bool = True,
        chat_format: ConversationFormat | None = None,
    ) -> tuple[list[int], list[int]]:
        """As `encode_conversation`, with a mask of the same length: 1 for an answer and the token that closes it."""
        chat_format = self._known_format(chat_format)
        segments = chat_format.segments(chat_format.normalize_messages(messages), add_generation_prompt)
        opening = [Segment(token, True) for token in chat_format.opening_tokens]
        return self._encode_segments([*opening, *segments], chat_format)

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encode texts or pairs of texts, as the library does; it describes the arguments.

        With `add_special_tokens=False`, a conversation that the chat template rendered to text, alone or in a list,
        gets the ids of `apply_chat_template`. An explicit `split_special_tokens` takes every text for a plain one, and so
        does a tokenizer that was loaded with it.
        """
        if isinstance(text, (list, tuple)) and not text and not kwargs.get("is_split_into_words"):
            raise ValueError("There is nothing to encode: the batch of texts is empty.")
        is_plain = "split_special_tokens" in kwargs or (self.split_special_tokens and not self.always_splits)
        if not add_special_tokens and not is_plain and text_pair is None and text_target is None:
            texts = text if isinstance(text, (list, tuple)) else [text]
            read = [read_rendered(item, self.chat_format) if isinstance(item, str) else None for item in texts]
            if any(read) and not kwargs.get("is_split_into_words"):
                return self._encode_rendered(texts, read, texts is text, *args, **kwargs)
        try:
            return super().__call__(
                text, text_pair, text_target, text_pair_target, add_special_tokens, *args, **kwargs
            )
        except RecursionError:
            raise ValueError(f"Texts come in lists of texts or of pairs, got {reprlib.repr(text)}.") from None

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> list[str]:
        """Cut a text into the names of tokens."""
        if not isinstance(text, str):
            raise TypeError(f"`tokenize` takes one text, got {reprlib.repr(text)}.")
        return super().tokenize(text, *args, **kwargs)

    def _encode_rendered(
        self,
        texts: Sequence[Any],
        read: Sequence[list[Piece] | None],
        is_batched: bool,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        *,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        return_overflowing_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encode texts of which some are rendered conversations; `read` has their pieces. The rest is the library's."""
        if return_overflowing_tokens:
            raise ValueError(
                "A rendered conversation cannot be cut into overlapping parts: leave out `return_overflowing_tokens`, "
                "or pass split_special_tokens=True for the ids of a plain text."
            )
        if truncation is None:
            # As the library takes it.
            truncation = max_length is not None and padding is False
        has_mask = "attention_mask" in self.model_input_names
        if kwargs.get("return_attention_mask") is None and return_tensors is not None and has_mask:
            kwargs["return_attention_mask"] = True
        rows = [
            self._plain_row(text, truncation, max_length, return_offsets_mapping)
            if pieces is None
            else self._rendered_row(text, pieces, truncation, max_length, return_offsets_mapping)
            for text, pieces in zip(texts, read)
        ]
        encoded = self._pad_rows(rows, padding=padding, max_length=max_length, **kwargs)
        if return_offsets_mapping and self.is_fast:
            is_left = (kwargs.get("padding_side") or self.padding_side) == "left"
            encoded["offset_mapping"] = []
            for row, ids in zip(rows, encoded["input_ids"]):
                offsets, blank = row["offset_mapping"], [(0, 0)] * (len(ids) - len(row["input_ids"]))
                encoded["offset_mapping"].append(blank + offsets if is_left else offsets + blank)
        if not is_batched and return_tensors is None:
            encoded = {key: value[0] for key, value in encoded.items()}
        return BatchEncoding(encoded, tensor_type=return_tensors)

    def _pad_rows(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        padding: bool | str | PaddingStrategy,
        max_length: int | None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        columns = {"input_ids": [row["input_ids"] for row in rows]}
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = [row["special_tokens_mask"] for row in rows]
        if return_token_type_ids:
            columns["token_type_ids"] = [row.get("token_type_ids") or [0] * len(row["input_ids"]) for row in rows]
        encoded = self.pad(
            columns,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        lengths = {"length": list(map(len, encoded["input_ids"]))} if return_length else {}
        return {**encoded, **lengths}

    def _plain_row(
        self, text: Any, truncation: bool | str, max_length: int | None, return_offsets_mapping: bool
    ) -> dict[str, Any]:
        """A text that is no rendered conversation, among others that are."""
        row = self(
            [text],
            add_special_tokens=False,
            split_special_tokens=self.split_special_tokens,
            truncation=truncation,
            max_length=max_length,
            return_attention_mask=False,
            return_special_tokens_mask=True,
            return_offsets_mapping=return_offsets_mapping,
        )
        return {key: value[0] for key, value in row.items()}

    def _rendered_row(
        self,
        text: str,
        pieces: Sequence[Piece],
        truncation: bool | str,
        max_length: int | None,
        return_offsets_mapping: bool,
    ) -> dict[str, Any]:
        """A rendered conversation; truncation keeps what it keeps of a conversation."""
        columns = ["input_ids", "special_tokens_mask"] + ["offset_mapping"] * return_offsets_mapping
        row: dict[str, list[Any]] = {name: [] for name in columns}
        segments = [piece.segment for piece in pieces]
        for piece, (ids, spans) in zip(pieces, self._encodings(segments, self.chat_format)):
            row["input_ids"] += ids
            row["special_tokens_mask"] += [int(piece.segment.is_special)] * len(ids)
            if return_offsets_mapping:
                row["offset_mapping"] += spans_in_rendered(text, piece, spans)
        kept = self.kept_if_truncated(row["input_ids"], truncation, max_length)
        return {key: [values[index] for index in kept] for key, values in row.items()}

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[dict[str, Any] | Callable] | Mapping[str, Any] | None = None,
        documents: Any = None,
        chat_template: str | None = None,
        *,
        tokenize: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        chat_format: ConversationFormat | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write or encode one conversation or a batch of them, with the ids of `build_chat_input`.

        As the library's; `tokenize=False` renders the Jinja template of the generation. A template of the user's own
        (an argument, or put in place of `chat_template`) goes to the library.

        Args:
            conversation: a list of messages, or a list of such lists.
            tools: functions or their descriptions, for the system message; GLM-4's built-in tools as `{"type": ...}`.
            chat_format: the generation to write for, if not the tokenizer's own.

        Raises:
            TypeError, ValueError: for a conversation that has no form in this generation.
        """
        tokenizer_kwargs = tokenizer_kwargs or {}
        # One of several templates may be asked for by its name.
        chat_template = self.get_chat_template(chat_template, tools)
        if chat_template not in [known.chat_template for known in CONVERSATION_FORMATS.values()]:
            # Such a template writes control tokens as text, and this class does not look for them in text.
            tokenizer_kwargs = {"split_special_tokens": False, **tokenizer_kwargs}
            inputs = (conversation, tools, documents, chat_template)
            return super().apply_chat_template(*inputs, tokenize=tokenize, tokenizer_kwargs=tokenizer_kwargs, **kwargs)
        conversation = getattr(conversation, "messages", conversation)
        chat_format = self._known_format(chat_format)
        is_batched = isinstance(conversation, (list, tuple)) and len(conversation) > 0 and _is_chat(conversation[0])
        chats = [
            _checked_chat(getattr(chat, "messages", chat), tools, chat_format, **kwargs)
            for chat in (conversation if is_batched else [conversation])
        ]
        if not tokenize:
            texts = self._render_chats(chats, chat_format, **kwargs)
            return texts if is_batched else texts[0]
        encoded = self._encode_chats(chats, chat_format, **tokenizer_kwargs, **kwargs)
        if not is_batched and kwargs.get("return_tensors") is None:
            encoded = BatchEncoding({key: value[0] for key, value in encoded.items()})
        return encoded if kwargs.get("return_dict", True) else encoded["input_ids"]

    def _template_to_use(self, saved: Any) -> Any:
        """What to render with: ours, in the place of every template that is known; somebody's own is kept and told of."""
        template = self.chat_format.current_template(saved)
        if template != self.chat_format.chat_template:
            logger.warning(
                "This folder has a chat template of its own, which `apply_chat_template` uses and `chat` does not. By "
                "such a template, text in a message can become control tokens, and there is no mask for training unless "
                "it marks answers with {% generation %}. To be rid of it, delete `chat_template` from "
                "tokenizer_config.json (or chat_template.jinja), or set "
                "`tokenizer.chat_template = tokenizer.chat_format.chat_template`."
            )
        return template

    def _render_chats(
        self,
        chats: list[list[dict[str, Any]]],
        chat_format: ConversationFormat,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> list[str]:
        texts: list[str] = super().apply_chat_template(
            chats, None, None, chat_format.chat_template, tokenize=False, **kwargs
        )
        if continue_final_message:
            closing_tokens = [chat_format.closing_token * chat_format.is_complete(chat) for chat in chats]
            texts = [leave_answer_open(text, token, chat_format) for text, token in zip(texts, closing_tokens)]
        return texts

    def _encode_chats(
        self,
        chats: list[list[dict[str, Any]]],
        chat_format: ConversationFormat,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_assistant_tokens_mask: bool = False,
        padding: bool | str | PaddingStrategy = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        columns: dict[str, list[list[int]]] = {"input_ids": [], "assistant_masks": []}
        for chat in chats:
            ids, mask = self.encode_conversation_with_mask(chat, add_generation_prompt, chat_format)
            if continue_final_message and chat_format.is_complete(chat):
                ids.pop()
            kept = self.kept_if_truncated(ids, truncation, max_length)
            columns["input_ids"].append([ids[index] for index in kept])
            columns["assistant_masks"].append([mask[index] for index in kept])
        if not return_assistant_tokens_mask:
            del columns["assistant_masks"]
        return self.pad(
            columns,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )

    def kept_if_truncated(self, ids: list[int], truncation: bool | str | None, max_length: int | None) -> list[int]:
        """Which tokens of a conversation stay; the opening tokens always do."""
        if not truncation or truncation == "do_not_truncate":
            return list(range(len(ids)))
        return self._kept_positions(ids, self.model_max_length if max_length is None else max_length)

    def _kept_positions(self, ids: list[int], limit: int) -> list[int]:
        if self.truncation_side == "right" or len(ids) <= limit:
            return list(range(len(ids)))[:limit]
        start = min(len(self.chat_format.opening_tokens), limit)
        return [*range(start), *range(len(ids) - limit + start, len(ids))]

    def _encode_segments(
        self, segments: Sequence[Segment], chat_format: ConversationFormat
    ) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        mask: list[int] = []
        special_ids = self._special_ids(chat_format)
        for segment in segments:
            if segment.answer_spans:
                segment_ids, spans = self._message_encoding(segment.text)
                mask += [
                    int(segment.is_answer or any(start < last and end > first for first, last in segment.answer_spans))
                    for start, end in spans
                ]
            else:
                segment_ids = [special_ids[segment.text]] if segment.is_special else self._message_ids(segment.text)
                mask += [int(segment.is_answer)] * len(segment_ids)
            ids += segment_ids
        return ids, mask

    def _encodings(
        self, segments: Sequence[Segment], chat_format: ConversationFormat
    ) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """The ids of each segment, and where in its text they come from."""
        special_ids = self._special_ids(chat_format)
        for segment in segments:
            if segment.is_special:
                yield [special_ids[segment.text]], [(0, len(segment.text))]
            else:
                yield self._message_encoding(segment.text)

    @staticmethod
    def _with_query(query: str, history: Any, role: str, chat_format: ConversationFormat) -> list[Message]:
        query_message = {"role": role, "content": query}
        return chat_format.normalize_messages(history) + chat_format.normalize_messages([query_message])

    def _known_format(self, chat_format: ConversationFormat | None) -> ConversationFormat:
        """The tokenizer's own format, or another one that its vocabulary can write."""
        if chat_format is None:
            return self.chat_format
        name = getattr(chat_format, "name", chat_format)
        if name not in self.vocabularies or name is chat_format:
            raise ValueError(
                f"`chat_format` must be the ConversationFormat of {' or '.join(self.vocabularies)} for this tokenizer, "
                f"got {name!r}. A model has its own as `model.chat_format`."
            )
        return chat_format

    @classmethod
    def _find_format(cls, name: str | None, vocab_file: str) -> ConversationFormat:
        """The format of a generation; where none is named, that of the last of the `vocabularies`."""
        name = name or list(cls.vocabularies)[-1]
        if name not in cls.vocabularies:
            raise ValueError(
                f"{vocab_file} is a vocabulary of {' or '.join(cls.vocabularies)}, but `model_version` says "
                f"{name!r}. Correct it in tokenizer_config.json or config.json."
            )
        return conversation_format(name)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool | None = None,
        chat_format: ConversationFormat | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Turn ids into text as the published tokenizer does.

        Args:
            token_ids: an id, a sequence of ids, or a batch of sequences (lists, arrays, tensors, an encoding).
            skip_special_tokens: drop all special tokens (True), or write the name of each (False). When not given, it
                is as published: the control tokens of ChatGLM3 and GLM-4 give their names, and those of ChatGLM-6B
                and ChatGLM2 give nothing. `<s>` and `</s>` give nothing, and `<unk>` does for ChatGLM-6B only.
            chat_format: the generation to decode for, if not the tokenizer's own.

        Returns:
            One string, or a list of strings for a batch. Ids that are not in the vocabulary (the embedding has more
            rows) give nothing; bytes that are not UTF-8 give U+FFFD.

        Raises:
            TypeError: for anything but ids, with the value.
        """
        chat_format = self._known_format(chat_format)
        given = checked_ids(token_ids)
        ids = given if isinstance(given, list) else [given]
        decode = self._text_decoder(skip_special_tokens, chat_format, **kwargs)
        if ids and isinstance(ids[0], list):
            return [decode(row) for row in ids]
        return decode(ids)

    def growing_text(self, chat_format: ConversationFormat | None = None) -> GrowingText:
        """Decode ids that come one after another: `add(token_id)` gives what `decode` makes of all of them so far."""
        chat_format = self._known_format(chat_format)
        return GrowingText(self._text_decoder(None, chat_format), self._is_settled)

    def _is_settled(self, text: str, last_id: int, next_id: int) -> bool:
        """Whether a text that ends with the token `last_id` stays as it is when `next_id` follows."""
        # Bytes that are no character yet are U+FFFD.
        return bool(text) and not text.endswith("\ufffd")

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Turn a batch of ids into texts; see `decode`. The library's would always say what is to be skipped."""
        texts = self.decode(
            sequences, skip_special_tokens, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs
        )
        return [texts] if isinstance(texts, str) else texts

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        """Turn ids into the names of tokens; ids that are not in the vocabulary have the name `""`, as published."""
        ids = checked_ids(ids)
        if isinstance(ids, int):
            return super().convert_ids_to_tokens(ids) or "" if is_possible_id(ids) else ""
        # Rust refuses what is no 32-bit number; the last of them stands for it, which no vocabulary reaches.
        possible = [index if is_possible_id(index) else LAST_ID for index in ids]
        return [token or "" for token in super().convert_ids_to_tokens(possible, skip_special_tokens)]

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """Encode one text or pair into ids; see `__call__`."""
        return self(text, text_pair, None, None, *args, **kwargs)["input_ids"]

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **kwargs: Any) -> BatchEncoding:
        """Encode a batch of texts or ids; the library dropped this name, which published examples use."""
        return self(batch_text_or_text_pairs, **kwargs)

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """Encode a text or a pair, or ids; the library dropped this name, which published examples use."""
        return self(text, text_pair, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Save as the library does, with the files that the published class and other programs read."""
        if push_to_hub:
            # It saves to a temporary folder with this method, and uploads all of that folder.
            options = {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **options)
        files = super().save_pretrained(save_directory, *args, filename_prefix=filename_prefix, **kwargs)
        return files + self._save_published_files(save_directory, filename_prefix)

    def _control_ids(self, chat_format: ConversationFormat) -> dict[str, int]:
        """The ids of the control tokens of a generation."""
        raise NotImplementedError

    def _special_ids(self, chat_format: ConversationFormat) -> dict[str, int]:
        """The ids of all special tokens that segments may name."""
        raise NotImplementedError

    def _message_ids(self, text: str) -> list[int]:
        """The ids of a text in which no control token is read."""
        raise NotImplementedError

    def _message_encoding(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and where in the text they come from."""
        raise NotImplementedError

    def _text_decoder(
        self, skip_special_tokens: bool | None, chat_format: ConversationFormat, **kwargs: Any
    ) -> Callable[[Sequence[int]], str]:
        """What gives the text of a sequence of ids; see `decode`."""
        raise NotImplementedError

    def _save_published_files(self, save_directory: str | Path, filename_prefix: str | None) -> tuple[str, ...]:
        """Write what the published class needs beyond what the library saves; the paths of new files."""
        raise NotImplementedError


def checked_ids(given: Any) -> Any:
    """Ids as plain numbers: an id, a list of ids, or a list of such lists, of arrays, tensors or an encoding.

    Raises:
        TypeError: if there is anything else among them.
    """
    held = given.get("input_ids") if isinstance(given, Mapping) else given
    try:
        ids = to_py_obj(list(held) if isinstance(held, range) else held)
    except RecursionError:
        ids = None
    is_batch = isinstance(ids, list) and bool(ids) and isinstance(ids[0], list)
    rows = ids if is_batch else [ids if isinstance(ids, list) else [ids]]
    if not all(isinstance(row, list) and all(isinstance(index, Integral) for index in row) for row in rows):
        raise TypeError(f"Ids are whole numbers, alone, in a list or in a list of lists, got {reprlib.repr(given)}.")
    return ids


def is_possible_id(index: int) -> bool:
    """Whether the Rust backend takes a number for an id at all."""
    return 0 <= index <= LAST_ID


def _is_chat(item: Any) -> bool:
    """Whether an item of a conversation is itself one, so that there is a batch; a pair of texts is two messages."""
    if not isinstance(item, (list, tuple)):
        return hasattr(item, "messages")
    return len(item) != 2 or not all(isinstance(text, str) for text in item)


def _checked_chat(
    messages: Any,
    tools: Any,
    chat_format: ConversationFormat,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    **kwargs: Any,
) -> list[Message]:
    """The messages in normalized form, with the tools; refused where this generation has no form for them."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"A conversation is a list with at least one message, got {reprlib.repr(messages)}.")
    if isinstance(tools, (list, tuple)):
        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
    chat = chat_format.normalize_messages(messages)
    chat = chat_format.add_tools(chat, None if isinstance(tools, (list, tuple, Mapping)) and not tools else tools)
    # A template leaves out what it does not know. The segments, which ids are made of, refuse it.
    chat_format.segments(chat, add_generation_prompt)
    if continue_final_message and (add_generation_prompt or chat[-1]["role"] != "assistant"):
        raise ValueError(
            "`continue_final_message` leaves an answer at the end open: it needs a last message of the assistant, and "
            "no `add_generation_prompt`."
        )
    return chat


def take_extra_tokens(kwargs: dict[str, Any]) -> list[str]:
    """The special tokens in what any version of the library saved; taken out of `kwargs`."""
    saved = [*(kwargs.pop("extra_special_tokens", None) or ()), *(kwargs.pop("additional_special_tokens", None) or ())]
    return [token["content"] if isinstance(token, dict) else str(token) for token in saved]


__all__ = ["ConversationTokenizer", "take_extra_tokens", "is_possible_id"]
