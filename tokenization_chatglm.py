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
"""The tokenizers of the four generations, each made from the checkpoint's own vocabulary file.

What is unusual here:

- `ice_text.model` (ChatGLM-6B) is a SentencePiece unigram model, and stays with the `sentencepiece` package: the Rust
  one differs in ties. `tokenizer.model` is a SentencePiece BPE with byte fallback (ChatGLM2, ChatGLM3) or a list of
  ranked byte strings (GLM-4); both become a Rust BPE that gives the same ids for any text. `tokenizer.json` is written
  for other programs and read only where `tokenizer.model` is missing.
- ChatGLM-6B, ChatGLM2 and ChatGLM3 publish one class name, so `ChatGLMTokenizer.from_pretrained` gives the class of the
  vocabulary file it finds.
- Whether a text can become a control token is as published: `tokenizer("<|user|>")` is text for ChatGLM2 and ChatGLM3,
  an id for GLM-4. What is in a message is text in every generation. In the Rust tokenizer of ChatGLM2 and ChatGLM3 the
  flag `special` stands for "not found in text"; a token which a user adds does not have it there.
- Every encoding starts with `[gMASK] sop`, or ends with it (ChatGLM-6B). Padding is on the left, and position ids are
  among the outputs. ChatGLM-6B's have two rows, and its attention mask has two dimensions for each text, true where
  attention is blocked: the text up to `<sop>` is seen from both sides.
- A conversation is encoded piece by piece (`encode_conversation`), which no rendered string can reproduce. So
  `apply_chat_template` makes ids by that method, as `build_chat_input` does; the Jinja templates give the text.
- The library sets padding, truncation and the reading of special tokens on the shared Rust tokenizer at every call.
  Messages are encoded by a second Rust tokenizer that nobody changes, so threads can do it at the same time.
"""

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers.tokenization_python import PythonBackend
from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import cached_file, get_json_schema, logging, to_py_obj

from .configuration_chatglm import infer_model_version
from .conversation_chatglm import (
    CHAT_TEMPLATES,
    RESPONSE_TEMPLATES,
    STOP_TOKENS,
    Segment,
    add_tools,
    conversation_segments,
    normalize_messages,
)


logger = logging.get_logger(__name__)

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

# The control tokens of each generation, in the order of their ids. ChatGLM-6B's are pieces of its vocabulary; those of
# the others follow the vocabulary.
CONTROL_TOKENS = {
    "chatglm": ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
    "chatglm2": ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    "chatglm3": ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLE_TOKENS),
    "glm4": (
        "<|endoftext|>",
        *("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
        *ROLE_TOKENS,
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    ),
}
# What every conversation starts with. ChatGLM-6B's segments hold the same tokens, before the answer.
PREFIX_TOKENS = {
    "chatglm": (),
    "chatglm2": ("[gMASK]", "sop"),
    "chatglm3": ("[gMASK]", "sop"),
    "glm4": ("[gMASK]", "<sop>"),
}

# The library's named special tokens.
CHATGLM_6B_NAMED_TOKENS = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
}
NAMED_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
GLM4_NAMED_TOKENS = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

# Image tokens before the text of ChatGLM-6B's first vocabulary (150528 ids), whose files do not name their number.
DEFAULT_NUM_IMAGE_TOKENS = 20000

# How GLM-4 cuts a text into the pieces that are merged on their own.
GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# The characters that stand for bytes in a byte-level BPE.
PRINTABLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHER_BYTES = [byte for byte in range(0x100) if byte not in PRINTABLE_BYTES]
CHARACTER_OF_BYTE = {byte: byte for byte in PRINTABLE_BYTES} | {byte: 0x100 + i for i, byte in enumerate(OTHER_BYTES)}
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
BLANKS = re.compile(" {2,80}")
BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")

IMAGE_TOKEN = re.compile(r"<image_([0-9]+)>")

DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def bpe_from_sentencepiece(vocab_file: str, control_tokens: Sequence[str]) -> BPE:
    """Build the Rust BPE that encodes like a SentencePiece BPE model.

    SentencePiece merges the neighbours whose union is the piece of the highest score, the leftmost ones first. Rust
    ranks pairs instead, so each piece contributes one merge for each of its splits into two pieces, in the order of
    the scores.

    Args:
        vocab_file: the `tokenizer.model`.
        control_tokens: names that get the ids behind the pieces. Nothing merges into them.

    Raises:
        ValueError: if the file is not a SentencePiece model.
    """
    try:
        model = SentencePieceProcessor(model_file=vocab_file)
    except RuntimeError as error:
        raise ValueError(f"{vocab_file} is not the SentencePiece model of ChatGLM2 or ChatGLM3: {error}") from error
    ids = list(range(model.get_piece_size()))
    pieces = model.id_to_piece(ids)
    flags = zip(model.is_unknown(ids), model.is_control(ids), model.is_byte(ids))
    scores = {piece: score for piece, score, flag in zip(pieces, model.get_score(ids), flags) if not any(flag)}
    merges = [
        (piece[:index], piece[index:])
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for index in range(1, len(piece))
        if piece[:index] in scores and piece[index:] in scores
    ]
    vocab = {token: index for index, token in enumerate([*pieces, *control_tokens])}
    return BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def bpe_from_ranks(
    vocab_file: str, control_tokens: Sequence[str], more_tokens: Mapping[str, int] | None = None
) -> BPE:
    """Build the Rust BPE that encodes like a list of ranked byte strings.

    There the neighbours merge whose union has the lowest rank, the leftmost ones first, and a piece of text that is
    itself in the list is taken whole. Rust ranks pairs, so each string contributes one merge for each of its splits.

    Args:
        vocab_file: the `tokenizer.model`: on each line a string in base64 and its rank, which is its id.
        control_tokens: names that get the ids behind the strings. Nothing merges into them.
        more_tokens: further names, with their ids.

    Raises:
        ValueError: if the file is not such a list.
    """
    try:
        lines = [line.split() for line in Path(vocab_file).read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(string, validate=True): int(rank) for string, rank in lines}
    except ValueError as error:
        raise ValueError(f"{vocab_file} is not the vocabulary of GLM-4, a list of ranked strings: {error}") from error
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"{vocab_file} is not a complete list of ranked strings: ranks are missing or occur twice.")
    tokens = {string.decode("latin-1").translate(CHARACTER_OF_BYTE): rank for string, rank in ranks.items()}
    merges = [
        (token[:index], token[index:])
        for token in sorted(tokens, key=tokens.__getitem__)
        for index in range(1, len(token))
        if token[:index] in tokens and token[index:] in tokens
    ]
    vocab = tokens | {token: len(tokens) + index for index, token in enumerate(control_tokens)}
    return BPE({**(more_tokens or {}), **vocab}, merges, ignore_merges=True)


def position_ids_from_mask(attention_mask: Sequence[int]) -> list[int]:
    """Count the real tokens from 0; padding has position 0."""
    return [mask * (count - 1) for mask, count in zip(attention_mask, accumulate(attention_mask))]


class ConversationMixin:
    """What the tokenizers of all generations share: conversations, and the calls of published examples.

    A class brings `model_versions`, `_control_ids`, `_special_ids`, `_message_encoding`, `_decode_ids` and
    `_save_published_files`.
    """

    # The generations that have this kind of vocabulary.
    model_versions: tuple[str, ...]
    model_version: str
    # What `get_command` knows beside the control tokens.
    command_names: dict[str, str] = {}

    def stop_token_ids(self, model_version: str | None = None) -> list[int]:
        """The ids that end an answer, for the tokenizer's own generation or another one."""
        model_version = self._check_model_version(model_version)
        return [self._special_ids(model_version)[token] for token in STOP_TOKENS[model_version]]

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the control tokens, and of `<s>`, `</s>` and `<unk>` under their published names."""
        named = {name: self.convert_tokens_to_ids(token) for name, token in self.command_names.items()}
        return self._control_ids(self.model_version) | named

    def get_command(self, token: str) -> int:
        """The id of a control token, or of `<bos>`, `<eos>` or `<pad>`.

        Raises:
            ValueError: for any other token.
        """
        commands = self.special_tokens
        if token not in commands:
            raise ValueError(
                f"{token!r} is not a control token of {self.model_version}; they are {', '.join(commands)}."
            )
        return commands[token]

    def build_prompt(self, query: str, history: Sequence[Any] | None = None, model_version: str | None = None) -> str:
        """The text of a conversation that asks for an answer. For ChatGLM3 and GLM-4 it is for reading only."""
        model_version = self._check_model_version(model_version)
        messages = self._with_query(query, history, "user", model_version)
        segments = conversation_segments(messages, model_version)
        # CODEPATH: chatglm's tokenizer adds the control tokens behind a text itself; the others have them in the text.
        return segments[0].text if model_version == "chatglm" else "".join(segment.text for segment in segments)

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """The ids of one message of ChatGLM3 or GLM-4: the role token, the metadata with a newline, the content.

        Raises:
            ValueError: for an unknown role, and in the other generations.
        """
        model_version = self.model_versions[-1]
        # CODEPATH: chatglm has no role tokens; a tokenizer of chatglm2 can write those of chatglm3.
        if model_version == "chatglm":
            raise ValueError("ChatGLM-6B has no form for a single message; use `build_chat_input`.")
        messages = normalize_messages([{"role": role, "metadata": metadata, "content": message}], model_version)
        segments = conversation_segments(messages, model_version, add_generation_prompt=False)[:3]
        return self._encode_segments(segments, model_version)[0]

    def build_chat_input(
        self, query: str, history: Sequence[Any] | None = None, role: str = "user", model_version: str | None = None
    ) -> BatchEncoding:
        """Encode a conversation that asks for an answer.

        Args:
            query: the content of the last message.
            history: what comes before it: message dicts or `(question, answer)` pairs; not changed.
            role: the role of the last message.
            model_version: the generation to encode for, if not the tokenizer's own.

        Returns:
            `input_ids`, `attention_mask` and `position_ids`, tensors with a batch of one.

        Raises:
            TypeError, ValueError: for a history or a role that has no form in this generation.
        """
        model_version = self._check_model_version(model_version)
        messages = self._with_query(query, history, role, model_version)
        ids = self.encode_conversation(messages, model_version=model_version)
        return self.pad({"input_ids": [ids]}, return_tensors="pt")

    def encode_conversation(
        self, messages: Sequence[Any] | None, add_generation_prompt: bool = True, model_version: str | None = None
    ) -> list[int]:
        """The ids of a conversation, `[gMASK] sop` included: the one place where conversations become ids.

        Args:
            messages: message dicts of any form `normalize_messages` takes.
            add_generation_prompt: ask for an answer. Otherwise an answer at the end is closed by the end token.
            model_version: the generation to encode for, if not the tokenizer's own.
        """
        return self.encode_conversation_with_mask(messages, add_generation_prompt, model_version)[0]

    def encode_conversation_with_mask(
        self, messages: Sequence[Any] | None, add_generation_prompt: bool = True, model_version: str | None = None
    ) -> tuple[list[int], list[int]]:
        """As `encode_conversation`, with a mask of the same length: 1 for what the assistant writes.

        That is all behind what asks for an answer, up to the token that closes it, included.
        """
        model_version = self._check_model_version(model_version)
        messages = normalize_messages(messages, model_version)
        segments = conversation_segments(messages, model_version, add_generation_prompt)
        prefix = [Segment(token, True) for token in PREFIX_TOKENS[model_version]]
        return self._encode_segments([*prefix, *segments], model_version)

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[dict[str, Any] | Callable] | None = None,
        documents: Any = None,
        chat_template: str | None = None,
        *,
        tokenize: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        model_version: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write or encode one conversation or a batch of them, with the ids of `build_chat_input`.

        As the library's; `tokenize=False` renders the Jinja template of the generation. A template of the user's own
        (an argument, or put in place of `chat_template`) goes to the library.

        Args:
            conversation: a list of messages, or a list of such lists.
            tools: functions or their descriptions, for the system message.
            model_version: the generation to write for, if not the tokenizer's own.

        Raises:
            TypeError, ValueError: for a conversation that has no form in this generation.
        """
        tokenizer_kwargs = tokenizer_kwargs or {}
        if (self.chat_template if chat_template is None else chat_template) not in CHAT_TEMPLATES.values():
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                tokenize=tokenize,
                # Such a template writes control tokens as text, which is nothing but text to this class otherwise.
                tokenizer_kwargs={"split_special_tokens": False, **tokenizer_kwargs},
                **kwargs,
            )
        conversation = getattr(conversation, "messages", conversation)
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError(f"A conversation is a list with at least one message, got {conversation!r}.")
        model_version = self._check_model_version(model_version)
        is_batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        if isinstance(tools, (list, tuple)):
            tools = [tool if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools]
        chats = [
            add_tools(normalize_messages(getattr(chat, "messages", chat), model_version), tools or None, model_version)
            for chat in (conversation if is_batched else [conversation])
        ]
        if not tokenize:
            conversation = chats if is_batched else chats[0]
            template = CHAT_TEMPLATES[model_version]
            return super().apply_chat_template(conversation, chat_template=template, tokenize=False, **kwargs)
        encoded = self._encode_chats(chats, model_version, **tokenizer_kwargs, **kwargs)
        if not is_batched and kwargs.get("return_tensors") is None:
            encoded = BatchEncoding({key: value[0] for key, value in encoded.items()})
        return encoded if kwargs.get("return_dict", True) else encoded["input_ids"]

    def _encode_chats(
        self,
        chats: list[list[dict[str, Any]]],
        model_version: str,
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
            ids, mask = self.encode_conversation_with_mask(chat, add_generation_prompt, model_version)
            kept = range(len(ids))
            if continue_final_message:
                if add_generation_prompt or chat[-1]["role"] != "assistant":
                    raise ValueError(
                        "`continue_final_message` leaves an answer at the end open: it needs a last message of the "
                        "assistant, and no `add_generation_prompt`."
                    )
                kept = kept[:-1]
            if truncation and truncation != "do_not_truncate":
                limit = self.model_max_length if max_length is None else max_length
                kept = self._kept_positions(ids[: len(kept)], limit)
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

    def _kept_positions(self, ids: list[int], limit: int) -> list[int]:
        """Which tokens of a conversation stay when it is truncated; what it starts with is among them."""
        if self.truncation_side == "right" or len(ids) <= limit:
            return list(range(len(ids)))[:limit]
        start = min(len(PREFIX_TOKENS[self.model_version]), limit)
        return [*range(start), *range(len(ids) - limit + start, len(ids))]

    def _encode_segments(self, segments: Sequence[Segment], model_version: str) -> tuple[list[int], list[int]]:
        special_ids = self._special_ids(model_version)
        ids, mask = [], []
        for segment in segments:
            if segment.is_special:
                ids.append(special_ids[segment.text])
                mask.append(int(segment.is_answer))
                continue
            text_ids, offsets = self._message_encoding(segment.text)
            ids += text_ids
            for start, end in offsets:
                is_inside = any(start < last and end > first for first, last in segment.answer_spans)
                mask.append(int(segment.is_answer or is_inside))
        return ids, mask

    def _with_query(self, query: str, history: Any, role: str, model_version: str) -> list[dict[str, Any]]:
        query_message = {"role": role, "content": query}
        return normalize_messages(history, model_version) + normalize_messages([query_message], model_version)

    def _check_model_version(self, model_version: str | None) -> str:
        model_version = model_version or self.model_version
        if model_version not in self.model_versions:
            raise ValueError(
                f"`model_version` must be one of {self.model_versions} for this tokenizer, got {model_version!r}."
            )
        return model_version

    @classmethod
    def _resolve_model_version(cls, model_version: str | None, vocab_file: str) -> str:
        """The generation: the caller's word, then that of the config.json beside the vocabulary, then what is left."""
        config = Path(vocab_file).with_name("config.json")
        place = "`model_version`"
        if model_version is None and len(cls.model_versions) > 1 and config.is_file():
            model_version = infer_model_version(json.loads(config.read_text(encoding="utf-8")))
            place = str(config)
        if model_version is None:
            model_version = cls.model_versions[-1]
            if len(cls.model_versions) > 1:
                logger.warning_once(
                    f"Nothing beside the tokenizer tells ChatGLM2 from ChatGLM3, so {model_version} is assumed. "
                    'Set `"model_version": "chatglm2"` or `"chatglm3"` in tokenizer_config.json to settle it.'
                )
        if model_version not in cls.model_versions:
            raise ValueError(
                f"{vocab_file} is a vocabulary of {' or '.join(cls.model_versions)}, but {place} says "
                f"{model_version!r}."
            )
        return model_version

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, model_version: str | None = None, **kwargs: Any
    ) -> str | list[str]:
        """Turn ids into text as the published tokenizer does.

        Args:
            token_ids: an id, a sequence of ids, or a batch of sequences (lists, arrays, tensors, an encoding).
            skip_special_tokens: drop all special tokens. Otherwise the control tokens of ChatGLM3 and GLM-4 give their
                names, and those of ChatGLM-6B and ChatGLM2 give nothing, as published. `<s>` and `</s>` never give
                anything, and `<unk>` does for ChatGLM-6B only.
            model_version: the generation to decode for, if not the tokenizer's own.

        Returns:
            One string, or a list of strings for a batch. Ids that are not in the vocabulary (the embedding has more
            rows) give nothing; bytes that are not UTF-8 give U+FFFD.
        """
        token_ids = to_py_obj(token_ids["input_ids"] if isinstance(token_ids, (dict, BatchEncoding)) else token_ids)
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        if token_ids and isinstance(token_ids[0], (list, tuple)):
            return [self.decode(ids, skip_special_tokens, model_version, **kwargs) for ids in token_ids]
        return self._decode_ids(token_ids, skip_special_tokens, self._check_model_version(model_version), **kwargs)

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> str | list[str]:
        """Turn ids into the names of tokens; ids that are not in the vocabulary have the name `""`, as published."""
        tokens = super().convert_ids_to_tokens(ids, skip_special_tokens)
        return (tokens or "") if isinstance(ids, int) else [token or "" for token in tokens]

    def encode(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> list[int]:
        """Encode one text or pair into ids; see `__call__`."""
        return self(text, text_pair, None, None, *args, **kwargs)["input_ids"]

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **kwargs: Any) -> BatchEncoding:
        """Encode a batch; the library dropped this name, which published examples use."""
        return self(batch_text_or_text_pairs, **kwargs)

    def encode_plus(self, text: str, text_pair: str | None = None, **kwargs: Any) -> BatchEncoding:
        """Encode a text or a pair; the library dropped this name, which published examples use."""
        return self(text, text_pair, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Save as the library does, and what the published class and other programs load as well."""
        if push_to_hub:
            # It saves to a folder of its own, by this method, and uploads all that is there.
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), token=kwargs.pop("token", None))
        files = super().save_pretrained(save_directory, *args, filename_prefix=filename_prefix, **kwargs)
        return files + self._save_published_files(save_directory, filename_prefix)


class ChatGLMTokenizersBackend(ConversationMixin, TokenizersBackend):
    """What the tokenizers on the Rust backend share. A class brings what tells its vocabulary from the other's."""

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"

    named_tokens: dict[str, str]
    # What closes the second text of a pair.
    pair_token: str

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        model_version: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        source = vocab_file or tokenizer_file
        if source is None:
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'The folder'} holds no `tokenizer.model`. Copy it from the published "
                "checkpoint; the tokenizer is made from it."
            )
        self.model_version = self._resolve_model_version(model_version, source)
        self.encode_special_tokens = encode_special_tokens
        if vocab_file is not None:
            model = self._load_model(vocab_file, kwargs.get("added_tokens_decoder") or {})
        else:
            model = Tokenizer.from_file(tokenizer_file).model
        self._tokenizer = self._rust_tokenizer(model)
        self._message_tokenizer: Tokenizer | None = None
        for name, token in self.named_tokens.items():
            kwargs[name] = kwargs.get(name) or token
        kwargs["chat_template"] = kwargs.get("chat_template") or CHAT_TEMPLATES[self.model_version]
        kwargs["response_template"] = kwargs.get("response_template") or RESPONSE_TEMPLATES.get(self.model_version)
        super().__init__(
            vocab_file=vocab_file,
            model_version=self.model_version,
            encode_special_tokens=encode_special_tokens,
            extra_special_tokens=_extra_tokens(kwargs),
            **kwargs,
        )
        self._register_control_tokens()

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`: the library's own conversion of a SentencePiece model needs protobuf."""
        return kwargs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_message_tokenizer": None}

    @property
    def tokenizer(self) -> "PieceTokenizer":
        """The vocabulary without `[gMASK] sop`, under the name it has in the published class."""
        return PieceTokenizer(self)

    def update_post_processor(self) -> None:
        """Put `[gMASK] sop` before every encoding and the end token behind a pair."""
        tokens = PREFIX_TOKENS[self.model_version]
        prefix = " ".join(f"{token}:0" for token in tokens)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A:0",
            pair=f"{prefix} $A:0 $B:1 {self.pair_token}:1",
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in (*tokens, self.pair_token)],
        )

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens behind the vocabulary; text is searched for them, the content of messages for the others only.

        Args:
            new_tokens: one token or several. The control tokens of the generation are there already and stay.
            special_tokens: whether `decode(skip_special_tokens=True)` drops them and messages do not match them.

        Returns:
            How many were new.
        """
        tokens = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        tokens = [token for token in tokens if str(token) not in self._control_flags()]
        for token in tokens:
            is_special = special_tokens or getattr(token, "special", False)
            if is_special and str(token) not in self.all_special_tokens:
                self.extra_special_tokens = [*self.extra_special_tokens, str(token)]
        added = super().add_tokens([_added_token(token, special=False) for token in tokens])
        self._register_control_tokens()
        return added

    def __call__(
        self, text: Any = None, text_pair: Any = None, *args: Any, return_tensors: Any = None, **kwargs: Any
    ) -> BatchEncoding:
        """Encode texts or pairs of texts. The arguments are the library's; the result has `position_ids` as well."""
        if isinstance(text, str) and text_pair == "":
            # The library drops an empty second text of a single pair, and the `</s>` behind it.
            encoded = self([text], [text_pair], *args, return_tensors=return_tensors, **kwargs)
            if return_tensors is not None or "overflow_to_sample_mapping" in encoded:
                return encoded
            return BatchEncoding({key: value[0] for key, value in encoded.items()}, encoded.encodings)
        encoded = super().__call__(text, text_pair, *args, return_tensors=return_tensors, **kwargs)
        if "position_ids" in self.model_input_names and "position_ids" not in encoded and encoded.encodings:
            positions = [position_ids_from_mask(encoding.attention_mask) for encoding in encoded.encodings]
            is_batch = return_tensors is not None or isinstance(next(iter(encoded["input_ids"]), None), list)
            columns = {"position_ids": positions if is_batch else positions[0]}
            encoded.update(BatchEncoding(columns, tensor_type=return_tensors))
        return encoded

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> "ChatGLMTokenizersBackend":
        """Train another vocabulary, as the library does; `tokenizer.json` is then the only file that has it."""
        trained = super().train_new_from_iterator(*args, **kwargs)
        trained.vocab_file = trained.init_kwargs["vocab_file"] = None
        return trained

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy `tokenizer.model`, if it is still where the tokenizer was made from it."""
        return super().save_vocabulary(str(save_directory), filename_prefix) if self.can_save_slow_tokenizer else ()

    def _save_published_files(self, save_directory: str | Path, filename_prefix: str | None) -> tuple[str, ...]:
        return self.save_vocabulary(save_directory, filename_prefix)

    def _pad(
        self,
        encoded_inputs: dict[str, Any] | BatchEncoding,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        length = len(encoded_inputs["input_ids"])
        if "position_ids" in self.model_input_names and "position_ids" not in encoded_inputs:
            mask = encoded_inputs.get("attention_mask", [1] * length)
            encoded_inputs["position_ids"] = position_ids_from_mask(mask)
        padded = super()._pad(
            encoded_inputs,
            max_length=max_length,
            padding_strategy=padding_strategy,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        padding = [0] * (len(padded["input_ids"]) - length)
        for name in ("position_ids", "assistant_masks"):
            if name in padded and padding:
                is_left = (padding_side or self.padding_side) == "left"
                padded[name] = padding + padded[name] if is_left else padded[name] + padding
        return padded

    def _control_ids(self, model_version: str) -> dict[str, int]:
        first = self._tokenizer.token_to_id(CONTROL_TOKENS[model_version][0])
        return {token: first + index for index, token in enumerate(CONTROL_TOKENS[model_version])}

    def _special_ids(self, model_version: str) -> dict[str, int]:
        return {**self._control_ids(model_version), self.pair_token: self._tokenizer.token_to_id(self.pair_token)}

    def _control_flags(self) -> dict[str, bool]:
        """The special tokens of the published vocabulary, and whether they are kept out of text."""
        readable = ROLE_TOKENS if self.encode_special_tokens else ()
        tokens = dict.fromkeys((*self.named_tokens.values(), *CONTROL_TOKENS[self.model_version]))
        return {token: token not in readable for token in tokens}

    def _register_control_tokens(self) -> None:
        tokens = [_added_token(token, special) for token, special in self._control_flags().items()]
        self._tokenizer.add_tokens(tokens)
        control_tokens = CONTROL_TOKENS[self.model_version]
        # `add_special_tokens` replaces this list by default, but these tokens do not go away.
        self.extra_special_tokens = list(dict.fromkeys((*control_tokens, *self.extra_special_tokens)))
        self._message_tokenizer = None

    def _text_tokenizer(self) -> Tokenizer:
        """A Rust tokenizer for the text of messages. It shares the vocabulary, but none of the per-call settings."""
        tokenizer = self._message_tokenizer
        if tokenizer is None:
            special = {*self.all_special_tokens, *self._control_flags()}
            added_tokens = [token for _, token in sorted(self.added_tokens_decoder.items())]
            tokenizer = self._rust_tokenizer(self._tokenizer.model)
            tokenizer.add_tokens([_added_token(token, token.content in special) for token in added_tokens])
            tokenizer.encode_special_tokens = True
            self._message_tokenizer = tokenizer
        return tokenizer

    def _message_encoding(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._text_tokenizer().encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _special_texts(self, skip_special_tokens: bool, model_version: str) -> dict[int, str]:
        """What ids give when decoded that are no pieces."""
        control_ids = self._control_ids(model_version)
        texts = {index: token.content for index, token in self.added_tokens_decoder.items()}
        texts |= {index: token for token, index in control_ids.items()}
        silent = self._silent_ids(model_version)
        if skip_special_tokens:
            silent = [*silent, *control_ids.values(), *self.all_special_ids]
        return texts | dict.fromkeys(silent, "")


class ChatGLMTokenizer(ChatGLMTokenizersBackend):
    """
    Tokenizer of ChatGLM2-6B and ChatGLM3-6B, with the ids of the published one.

    `from_pretrained` gives a `ChatGLM6BTokenizer` where it finds the vocabulary of ChatGLM-6B, `ice_text.model`.

    Args:
        vocab_file (`str`, *optional*):
            Path of `tokenizer.model`.
        tokenizer_file (`str`, *optional*):
            Path of a `tokenizer.json` that this class saved; used where there is no `vocab_file`.
        model_version (`str`, *optional*):
            `"chatglm2"` or `"chatglm3"`. When absent: what the `config.json` beside the file tells, else ChatGLM3.
        encode_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether ChatGLM3's four role tokens become ids where they stand in a text given to the tokenizer. For
            training scripts; the content of messages stays text.

    Raises:
        ValueError: if there is no vocabulary file, or an unknown `model_version`.
    """

    model_versions = ("chatglm2", "chatglm3")
    named_tokens = NAMED_TOKENS
    pair_token = "</s>"
    command_names = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<unk>"}

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        model_version: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        # Earlier versions of the library saved `False`, which was of no consequence for the published class.
        kwargs["split_special_tokens"] = True
        super().__init__(vocab_file, tokenizer_file, model_version, encode_special_tokens, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a tokenizer as the library does, in the class that its vocabulary file needs."""
        download = {key: kwargs[key] for key in DOWNLOAD_ARGUMENTS if kwargs.get(key) is not None}

        def has_file(name: str) -> bool:
            file = cached_file(
                pretrained_model_name_or_path,
                name,
                **download,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_connection_errors=False,
            )
            return file is not None

        if has_file("tokenizer.model") or not has_file("ice_text.model"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if cls._auto_class is not None:
            ChatGLM6BTokenizer.register_for_auto_class(cls._auto_class)
        return ChatGLM6BTokenizer.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _load_model(self, vocab_file: str, added_tokens: Mapping[int, AddedToken]) -> BPE:
        return bpe_from_sentencepiece(vocab_file, CONTROL_TOKENS[self.model_version])

    @staticmethod
    def _rust_tokenizer(model: BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # For programs that decode with the Rust tokenizer itself; `decode` is the exact way.
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        return tokenizer

    def _silent_ids(self, model_version: str) -> list[int]:
        silent = [self._tokenizer.token_to_id(token) for token in self.named_tokens.values()]
        # CODEPATH: chatglm2 writes none of its control tokens; chatglm3 writes their names.
        return silent + (list(self._control_ids(model_version).values()) if model_version == "chatglm2" else [])

    def _decode_ids(
        self, token_ids: Sequence[int], skip_special_tokens: bool, model_version: str, **kwargs: Any
    ) -> str:
        special_texts = self._special_texts(skip_special_tokens, model_version)
        chunks: list[bytes] = []
        for index in token_ids:
            text = special_texts.get(index)
            if text is None:
                piece = self._tokenizer.id_to_token(index) if index >= 0 else None
                if piece and (match := BYTE_PIECE.fullmatch(piece)):
                    chunks.append(bytes.fromhex(match[1]))
                elif piece:
                    # The space that SentencePiece puts before a text goes again.
                    chunks.append((piece if chunks else piece.removeprefix("▁")).replace("▁", " ").encode())
            elif text:
                chunks.append(text.encode())
        return ESCAPED_BYTE.sub("\ufffd", b"".join(chunks).decode(errors="surrogateescape"))


class ChatGLM4Tokenizer(ChatGLMTokenizersBackend):
    """
    Tokenizer of GLM-4-9B, with the ids of the published one.

    Args:
        vocab_file (`str`, *optional*):
            Path of `tokenizer.model`, a list of ranked byte strings.
        tokenizer_file (`str`, *optional*):
            Path of a `tokenizer.json` that this class saved; used where there is no `vocab_file`.
        model_version (`str`, *optional*):
            `"glm4"`, the only generation with this vocabulary.
        split_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether the control tokens stay text where they stand in a text given to the tokenizer. They always do in
            the content of messages.

    Raises:
        ValueError: if there is no vocabulary file, or it is another generation's.
    """

    model_versions = ("glm4",)
    named_tokens = GLM4_NAMED_TOKENS
    pair_token = "<|endoftext|>"

    def _load_model(self, vocab_file: str, added_tokens: Mapping[int, AddedToken]) -> BPE:
        more_tokens = {token.content: index for index, token in added_tokens.items()}
        # The library gives the tokens of a file the next ids, which is right where the file leaves no ids out.
        if not more_tokens or max(added_tokens) - min(added_tokens) < len(added_tokens):
            more_tokens = {}
        return bpe_from_ranks(vocab_file, CONTROL_TOKENS[self.model_version], more_tokens)

    @staticmethod
    def _rust_tokenizer(model: BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GLM4_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _silent_ids(self, model_version: str) -> list[int]:
        return []

    def _decode_ids(
        self, token_ids: Sequence[int], skip_special_tokens: bool, model_version: str, **kwargs: Any
    ) -> str:
        special_texts = self._special_texts(skip_special_tokens, model_version)
        chunks: list[bytes] = []
        for index in token_ids:
            text = special_texts.get(index)
            if text is None:
                token = (self._tokenizer.id_to_token(index) or "") if index >= 0 else ""
                chunks.append(token.translate(BYTE_OF_CHARACTER).encode("latin-1"))
            else:
                chunks.append(text.encode())
        return b"".join(chunks).decode(errors="replace")


class ChatGLM6BTokenizer(ConversationMixin, PythonBackend):
    """
    Tokenizer of ChatGLM-6B, with the ids of the published one. `ChatGLMTokenizer.from_pretrained` gives it too.

    Args:
        vocab_file (`str`, *optional*):
            Path of `ice_text.model`.
        model_version (`str`, *optional*):
            `"chatglm"`, the only generation with this vocabulary.
        num_image_tokens (`int`, *optional*):
            How many ids come before those of the text. When absent: what the `config.json` beside the file tells,
            else 20000, the number of the first published vocabulary (150528 ids), whose files do not hold it.
        do_lower_case, remove_space (`bool`, *optional*, defaults to `False`):
            Make a text lower-case, or write one space for every run of white space, before it is encoded.

    Raises:
        ValueError: if there is no vocabulary file, or it is one that the published code does not read either.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    model_versions = ("chatglm",)

    def __init__(
        self,
        vocab_file: str | None = None,
        model_version: str | None = None,
        num_image_tokens: int | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'The folder'} holds no `ice_text.model`. Copy it from the published "
                "checkpoint; the tokenizer is made from it."
            )
        self.model_version = self._resolve_model_version(model_version, vocab_file)
        self.vocab_file = vocab_file
        self.sp_tokenizer = SPTokenizer(vocab_file, num_image_tokens)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        # The library takes every other argument that is named a token for a special one, and searches text for it.
        names = {name: kwargs.pop(name) for name in ("gmask_token", "end_token", "eop_token") if name in kwargs}
        names |= kwargs.pop("model_specific_special_tokens", None) or {}
        self.gmask_token = str(names.get("gmask_token", "[gMASK]"))
        self.end_token = str(names.get("end_token", "</s>"))
        # The first files call `</s>` the end of a sequence, and name apart what ends an answer.
        kwargs["eos_token"] = names.get("eop_token") or kwargs.get("eos_token")
        for name, token in CHATGLM_6B_NAMED_TOKENS.items():
            kwargs[name] = str(kwargs.get(name) or token)
        kwargs["added_tokens_decoder"] = (kwargs.get("added_tokens_decoder") or {}) | self._searched_tokens(kwargs)
        kwargs["chat_template"] = kwargs.get("chat_template") or CHAT_TEMPLATES[self.model_version]
        # The published class decodes with what was the library's default.
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        super().__init__(extra_special_tokens=_extra_tokens(kwargs), **kwargs)
        saved = ("model_version", "num_image_tokens", "gmask_token", "end_token", "do_lower_case", "remove_space")
        self.init_kwargs |= {name: getattr(self, name) for name in saved}

    def _searched_tokens(self, names: Mapping[str, Any]) -> dict[int, AddedToken]:
        """The named special tokens, which text is searched for; white space around them goes, as published."""
        tokens = [names[name] for name in CHATGLM_6B_NAMED_TOKENS]
        return {
            self.sp_tokenizer[token]: AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
            for token in tokens
            if token in self.sp_tokenizer.vocab
        }

    @property
    def vocab_size(self) -> int:
        """The number of ids without added tokens; the embedding has more rows."""
        return self.sp_tokenizer.num_tokens

    @property
    def num_image_tokens(self) -> int:
        """How many ids come before those of the text."""
        return self.sp_tokenizer.num_image_tokens

    @property
    def gmask_token_id(self) -> int:
        """The id of `gmask_token`."""
        return self.convert_tokens_to_ids(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """The id of `end_token`."""
        return self.convert_tokens_to_ids(self.end_token)

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return self.sp_tokenizer.vocab | self._added_tokens_encoder

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put `[gMASK] <sop>` behind a text, and behind them the second one of a pair and `<eop>`."""
        control_ids = self._control_ids(self.model_version)
        ids = [*token_ids_0, self.gmask_token_id, control_ids["<sop>"]]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, control_ids["<eop>"]]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mark what `build_inputs_with_special_tokens` adds, or the special tokens among ids that have them."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        mask = [0] * len(token_ids_0) + [1, 1]
        return mask if token_ids_1 is None else [*mask, *([0] * len(token_ids_1)), 1]

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Pad as the library does. Attention masks of one or two dimensions are extended, and made where none are."""
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs:
            encoded_inputs = {key: [example[key] for example in encoded_inputs] for key in encoded_inputs[0]}
        # The library sets masks of two dimensions aside, unpadded, if they come in a list.
        tuples = {key: tuple(value) for key, value in encoded_inputs.items() if key == "attention_mask"}
        return super().pad({**encoded_inputs, **tuples}, *args, **kwargs)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `ice_text.model`."""
        name = self.vocab_files_names["vocab_file"]
        file = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        file.write_bytes(self.sp_tokenizer.text_tokenizer.serialized_model_proto())
        return (str(file),)

    def _save_published_files(self, save_directory: str | Path, filename_prefix: str | None) -> tuple[str, ...]:
        """Name the published class in the settings, which is the one that other code knows."""
        name = "tokenizer_config.json"
        file = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        settings = file.read_text(encoding="utf-8")
        file.write_text(settings.replace(type(self).__name__, ChatGLMTokenizer.__name__), encoding="utf-8")
        return ()

    def _encode_plus(
        self,
        *args: Any,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        # A private hook (Transformers 5.17 to 5.23): the public call has no say once a default mask is made. That mask
        # grows with the square of a text, so lists that nothing pads come without one, as published.
        if return_attention_mask is None:
            return_attention_mask = return_tensors is not None or padding_strategy != PaddingStrategy.DO_NOT_PAD
        return super()._encode_plus(
            *args,
            padding_strategy=padding_strategy,
            return_tensors=return_tensors,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )

    def _pad(
        self,
        encoded_inputs: dict[str, Any] | BatchEncoding,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        is_padded = padding_strategy != PaddingStrategy.DO_NOT_PAD
        inputs = dict(encoded_inputs)
        ids = inputs["input_ids"]
        mask, positions = inputs.pop("attention_mask", None), inputs.pop("position_ids", None)
        padded = super()._pad(
            inputs,
            max_length=max_length,
            padding_strategy=padding_strategy,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=False,
            **kwargs,
        )
        difference = len(padded["input_ids"]) - len(ids)
        sides = (difference, 0) if (padding_side or self.padding_side) == "left" else (0, difference)
        if "assistant_masks" in padded:
            padded["assistant_masks"] = [0] * sides[0] + padded["assistant_masks"] + [0] * sides[1]
        if return_attention_mask is not False and (is_padded or return_attention_mask or mask is not None):
            blocked = self._blocked(ids, mask)
            padded["attention_mask"] = np.pad(blocked, ((0, 0), sides, sides), constant_values=True)
        if is_padded or return_attention_mask or positions is not None:
            positions = self._positions(ids, mask) if positions is None else np.asarray(positions)
            padded["position_ids"] = np.pad(positions, ((0, 0), sides))
        return padded

    def _blocked(self, ids: Sequence[int], mask: Any) -> np.ndarray:
        """What each token may not attend to, `[1, length, length]`: the context is seen from both sides."""
        length = len(ids)
        if mask is not None and np.ndim(mask) > 1:
            return np.asarray(mask, dtype=bool).reshape(1, length, length)
        start, end = _real_range(mask, length)
        blocked = np.ones((1, length, length), dtype=bool)
        blocked[0, start:end, start:end] = np.triu(blocked[0, start:end, start:end], 1)
        blocked[0, start:end, start : start + self._context_length(ids[start:end])] = False
        return blocked

    def _positions(self, ids: Sequence[int], mask: Any) -> np.ndarray:
        """The position of each token, constant from `<sop>` on, and below it the position behind the context."""
        positions = np.zeros((2, len(ids)), dtype=np.int64)
        if mask is not None and np.ndim(mask) > 1:
            mask = ~np.asarray(mask, dtype=bool).reshape(len(ids), len(ids)).all(axis=0)
        start, end = _real_range(mask, len(ids))
        ids = list(ids[start:end])
        context = self._context_length(ids)
        positions[0, start:end] = np.arange(len(ids))
        # With both in a text, `[MASK]` gives the position here, and `[gMASK]` in the model, as published.
        mask_tokens = [token for token in (self.mask_token_id, self.gmask_token_id) if token in ids]
        if mask_tokens:
            positions[0, start + context : end] = ids.index(mask_tokens[0])
        positions[1, start + context : end] = np.arange(1, len(ids) - context + 1)
        return positions

    def _context_length(self, ids: Sequence[int]) -> int:
        start_id = self._control_ids(self.model_version)["<sop>"]
        return list(ids).index(start_id) if start_id in ids else len(ids)

    def _control_ids(self, model_version: str) -> dict[str, int]:
        return {token: self.sp_tokenizer[token] for token in CONTROL_TOKENS[model_version]}

    def _special_ids(self, model_version: str) -> dict[str, int]:
        return self._control_ids(model_version)

    def _kept_positions(self, ids: list[int], limit: int) -> list[int]:
        """Which tokens of a conversation stay when it is truncated; the context gives way to what follows it."""
        start = ids.index(self.gmask_token_id) if self.gmask_token_id in ids else len(ids)
        room = max(limit - (len(ids) - start), 0)
        context = list(range(start))
        context = context[:room] if self.truncation_side == "right" else context[max(start - room, 0) :]
        return [*context, *range(start, len(ids))][:limit]

    def _preprocess(self, text: str) -> str:
        if self.remove_space:
            text = " ".join(text.split())
        return text.lower() if self.do_lower_case else text

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_tokenizer.tokenize(self._preprocess(text))

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_tokenizer[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_tokenizer[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces into the text they stand for."""
        return self.sp_tokenizer.decode_tokens(tokens)

    def _message_encoding(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        words = [token.content for token in self.added_tokens_decoder.values() if not token.special]
        words.sort(key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, words))})", text) if words else [text]
        ids: list[int] = []
        for part in parts:
            if part in words:
                ids.append(self._added_tokens_encoder[part])
            else:
                ids += self.sp_tokenizer.encode(self._preprocess(part))
        # Answers are segments of their own, so nobody asks where in the text an id comes from.
        return ids, [(0, 0)] * len(ids)

    def _decode_ids(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool,
        model_version: str,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        text, run = "", []
        for index in token_ids:
            if 0 <= index < self.vocab_size and index not in skipped:
                run.append(index)
            elif index in self._added_tokens_decoder and index not in skipped:
                text += self.sp_tokenizer.decode(run) + self._added_tokens_decoder[index].content
                run = []
        text += self.sp_tokenizer.decode(run)
        is_clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if is_clean else text


class SPTokenizer:
    """The vocabulary of ChatGLM-6B: rewritten white space, then SentencePiece, then ids behind those of images.

    A tokenizer has it as `sp_tokenizer`, which published code uses.

    Args:
        vocab_file: the `ice_text.model`.
        num_image_tokens: how many ids come before those of the text; see `ChatGLM6BTokenizer`.

    Raises:
        ValueError: if the file is no such vocabulary.
    """

    def __init__(self, vocab_file: str, num_image_tokens: int | None = None) -> None:
        try:
            self.text_tokenizer = SentencePieceProcessor(model_file=vocab_file)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{vocab_file} is not `ice_text.model`, the vocabulary of ChatGLM-6B: {error}") from error
        start_id = self.text_tokenizer.piece_to_id("<sop>")
        if start_id == self.text_tokenizer.unk_id():
            raise ValueError(
                f"{vocab_file} has no control tokens: it is the very first `ice_text.model`, which needed another "
                "package to add them. Download the current file of THUDM/chatglm-6b; the weights are the same."
            )
        if num_image_tokens is None:
            config = Path(vocab_file).with_name("config.json")
            settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
            num_image_tokens = settings.get("bos_token_id", DEFAULT_NUM_IMAGE_TOKENS + start_id) - start_id
        self.num_image_tokens = num_image_tokens

    @property
    def num_tokens(self) -> int:
        """The number of ids."""
        return self.num_image_tokens + self.text_tokenizer.get_piece_size()

    @cached_property
    def vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return {self[index]: index for index in range(self.num_tokens)}

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, key: int | str) -> Any:
        """The token of an id, `""` for an unknown one; or the id of a token, that of `<unk>` for an unknown one."""
        if isinstance(key, str):
            image = IMAGE_TOKEN.fullmatch(key)
            if image and int(image[1]) < self.num_image_tokens:
                return int(image[1])
            return self.num_image_tokens + self.text_tokenizer.piece_to_id(key)
        if 0 <= key < self.num_image_tokens:
            return f"<image_{key}>"
        if 0 <= key < self.num_tokens:
            return self.text_tokenizer.id_to_piece(key - self.num_image_tokens)
        return ""

    def tokenize(self, text: str) -> list[str]:
        """Cut a text into pieces."""
        return self.text_tokenizer.encode(self._rewrite(text), out_type=str)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return [self.num_image_tokens + index for index in self.text_tokenizer.encode(self._rewrite(text))]

    def decode(self, text_ids: Sequence[int]) -> str:
        """The text of ids."""
        return self.decode_tokens([self[index] for index in text_ids])

    def decode_tokens(self, tokens: Sequence[str]) -> str:
        """The text of pieces."""
        text = self.text_tokenizer.decode_pieces(list(tokens))
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return BLANK_PIECE.sub(lambda match: " " * int(match[1]), text)

    @staticmethod
    def _rewrite(text: str) -> str:
        """SentencePiece drops white space at the ends and in runs, so pieces of their own stand for it."""
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        return BLANKS.sub(lambda match: f"<|blank_{len(match[0])}|>", text)


class PieceTokenizer:
    """What published code finds as `tokenizer.tokenizer`: the vocabulary, where nothing is added to a text.

    All else is the tokenizer's own, because libraries take the attribute `tokenizer` of a processor for the tokenizer.
    """

    def __init__(self, owner: ChatGLMTokenizersBackend) -> None:
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        if name == "_owner":
            raise AttributeError(name)
        return getattr(self._owner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        return self._owner(*args, **kwargs)

    @property
    def n_words(self) -> int:
        """The number of ids."""
        return self._owner.vocab_size

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, with `<s>` before and `</s>` behind it if asked for."""
        first, last = [self._owner.bos_token_id] * bos, [self._owner.eos_token_id] * eos
        return first + self._owner.encode(text, add_special_tokens=False) + last


def _real_range(mask: Any, length: int) -> tuple[int, int]:
    """Where the tokens that are no padding start and end, by a mask that has 1 for them."""
    real = np.arange(length) if mask is None else np.flatnonzero(mask)
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)


def _extra_tokens(kwargs: dict[str, Any]) -> list[str]:
    """The special tokens in what any version of the library saved; taken out of `kwargs`."""
    saved = [*(kwargs.pop("extra_special_tokens", None) or ()), *(kwargs.pop("additional_special_tokens", None) or ())]
    return [token["content"] if isinstance(token, dict) else str(token) for token in saved]


def _added_token(token: str | AddedToken, special: bool) -> AddedToken:
    token = AddedToken(token) if isinstance(token, str) else token
    return AddedToken(
        token.content,
        # `sop` and `eop` are names that also occur inside words.
        single_word=token.single_word or token.content in ("sop", "eop"),
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        # A normalized one would begin with SentencePiece's leading space, and be found where a word begins only.
        normalized=False,
        special=special,
    )


__all__ = ["ChatGLM4Tokenizer", "ChatGLM6BTokenizer", "ChatGLMTokenizer"]
