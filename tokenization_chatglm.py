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
"""The tokenizers of ChatGLM2, ChatGLM3 and GLM-4, on the Rust backend, made from the checkpoint's `tokenizer.model`.

What is unusual here:

- ChatGLM-6B, ChatGLM2 and ChatGLM3 publish one class name, so `ChatGLMTokenizer.from_pretrained` gives the class of the
  vocabulary file it finds.
- `tokenizer.json` is written for other programs and read only where `tokenizer.model` is missing.
- Whether a text can become a control token is as published: `tokenizer("<|user|>")` is text for ChatGLM2 and ChatGLM3,
  an id for GLM-4. What is in a message is text in every generation. In the Rust tokenizer of ChatGLM2 and ChatGLM3 the
  flag `special` stands for "not found in text"; a token that a user adds does not have it there.
- Every encoding starts with `[gMASK] sop`. Padding is on the left, and position ids are among the outputs.
- The library sets padding, truncation and the reading of special tokens on the shared Rust tokenizer at every call.
  Messages are encoded by a second Rust tokenizer that nobody changes, so threads can do it at the same time.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors
from tokenizers.models import BPE
from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import cached_file, logging

from .configuration_chatglm import infer_model_version
from .conversation_chatglm import ConversationFormat, check_text
from .conversation_messages import may_have_picture
from .tokenization_chatglm_6b import ChatGLM6BTokenizer
from .tokenization_conversation import is_possible_id, take_extra_tokens
from .tokenization_plain import (
    KnownTokens,
    PlainTextsInRust,
    RanksEncoder,
    RustEncoder,
    SentencePieceEncoder,
    TextsEncoder,
)
from .tokenization_published import PublishedCalls, RanksView, SentencePieceView, ready_ids
from .tokenization_vocabulary import (
    BYTE_OF_CHARACTER,
    Vocabulary,
    bpe_from_ranks,
    bpe_from_sentencepiece,
    ranks_tokenizer,
    read_added_tokens,
    sentencepiece_tokenizer,
)


logger = logging.get_logger(__name__)

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHATGLM2_CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
# What the vocabularies of ChatGLM2 and ChatGLM3 have in common.
SENTENCEPIECE_TOKENS: dict[str, Any] = {
    "named_tokens": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"},
    "pair_token": "</s>",
    "command_aliases": {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<unk>"},
}

GLM4_VOCABULARY = Vocabulary(
    control_tokens=(
        "<|endoftext|>",
        *("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
        *ROLE_TOKENS,
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    ),
    named_tokens={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    pair_token="<|endoftext|>",
    trainer_tokens=ROLE_TOKENS,
)

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")

DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def position_ids_from_mask(attention_mask: Sequence[int]) -> list[int]:
    """Count the real tokens from 0; padding has position 0."""
    return [mask * (count - 1) for mask, count in zip(attention_mask, accumulate(attention_mask))]


class ChatGLMTokenizersBackend(PublishedCalls, PlainTextsInRust, TokenizersBackend):
    """What the tokenizers on the Rust backend share. A class adds how its `tokenizer.model` is read and decoded."""

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    extra_special_tokens: list[str]
    _message_tokenizer: Tokenizer | None
    _known_tokens: KnownTokens

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        encode_special_tokens: bool = False,
        **kwargs: Any,
    ) -> None:
        source = vocab_file or tokenizer_file
        if source is None:
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'The folder'} holds no `tokenizer.model`. Copy it from the published "
                "checkpoint; the tokenizer is made from it."
            )
        told = [name for name, vocabulary in self.vocabularies.items() if vocabulary.own_setting in kwargs]
        self.chat_format = self._find_format(kwargs.get("model_version") or next(iter(told), None), source)
        kwargs["model_version"] = self.chat_format.name
        self._encode_special_tokens = encode_special_tokens
        self.forget_derived_state()
        if vocab_file is not None:
            model = self._load_model(vocab_file, kwargs.get("added_tokens_decoder") or {})
        else:
            model = Tokenizer.from_file(str(tokenizer_file)).model
        self._tokenizer = self._rust_tokenizer(model)
        for name, token in self.vocabulary.named_tokens.items():
            kwargs[name] = kwargs.get(name) or token
        kwargs["chat_template"] = self._template_to_use(kwargs.get("chat_template"))
        kwargs["response_template"] = self.chat_format.current_response_template(kwargs.get("response_template"))
        super().__init__(
            vocab_file=vocab_file,
            encode_special_tokens=encode_special_tokens,
            extra_special_tokens=take_extra_tokens(kwargs),
            **kwargs,
        )
        self._register_control_tokens()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load a tokenizer as the library does, which would read all of `tokenizer.json` for the added tokens in it."""
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        config, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
        older_files = [folder / name for name in ("added_tokens.json", "special_tokens_map.json")]
        if config.is_file() and file.is_file() and not any(older.exists() for older in older_files):
            settings = {**json.loads(config.read_text(encoding="utf-8")), **kwargs}
            is_told = "added_tokens_decoder" in settings or "fast_tokenizer_files" in settings
            if not is_told and (added_tokens := read_added_tokens(file)) is not None:
                kwargs["added_tokens_decoder"] = added_tokens
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`: the library's own conversion of a SentencePiece model needs protobuf."""
        return kwargs

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget_derived_state()

    @property
    def encode_special_tokens(self) -> bool:
        """Whether role tokens become ids where they stand in a text given to the tokenizer."""
        return self._encode_special_tokens

    @encode_special_tokens.setter
    def encode_special_tokens(self, value: bool) -> None:
        self._encode_special_tokens = self.init_kwargs["encode_special_tokens"] = bool(value)
        # What Rust knows of a token stays, so the tokens are added anew, to another one with the same vocabulary.
        added_tokens = [token for _, token in sorted(self.added_tokens_decoder.items())]
        kept = self._tokens_kept_from_text()
        tokens = [_added_token(token, kept.get(token.content, token.special)) for token in added_tokens]
        self._tokenizer = self._rust_tokenizer(self._tokenizer.model)
        self._tokenizer.add_tokens(tokens)
        self._known_tokens = {}
        self.update_post_processor()

    def update_post_processor(self) -> None:
        """Put `[gMASK] sop` before every encoding and the end token behind a pair."""
        tokens, pair_token = self.chat_format.opening_tokens, self.vocabulary.pair_token
        opening = " ".join(f"{token}:0" for token in tokens)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A:0",
            pair=f"{opening} $A:0 $B:1 {pair_token}:1",
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in (*tokens, pair_token)],
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
        given = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else new_tokens
        tokens = [token for token in given if str(token) not in self._tokens_kept_from_text()]
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
        """Encode texts or pairs of texts, or their ids. The arguments are the library's, `position_ids` is added."""
        if isinstance(text, str) and text_pair == "":
            # The library drops an empty second text of a single pair, and the `</s>` behind it.
            encoded = self([text], [text_pair], *args, return_tensors=return_tensors, **kwargs)
            if return_tensors is not None or "overflow_to_sample_mapping" in encoded:
                return encoded
            return BatchEncoding({key: value[0] for key, value in encoded.items()}, encoded.encodings)
        if ready := ready_ids(text, text_pair):
            return self.encode_ready_ids(*ready, *args, return_tensors=return_tensors, **kwargs)
        try:
            encoded = super().__call__(text, text_pair, *args, return_tensors=return_tensors, **kwargs)
        except (TypeError, UnicodeEncodeError):
            # Rust takes half a character for something that is no text.
            for given in (text, text_pair, *args, *kwargs.values()):
                _check_texts(given)
            raise
        if "position_ids" in self.model_input_names and "position_ids" not in encoded and encoded.encodings:
            positions = [position_ids_from_mask(encoding.attention_mask) for encoding in encoded.encodings]
            is_batch = return_tensors is not None or isinstance(next(iter(encoded["input_ids"]), None), list)
            columns = {"position_ids": positions if is_batch else positions[0]}
            encoded.update(BatchEncoding(columns, tensor_type=return_tensors))
        return encoded

    def tokenize(self, text: str, pair: str | None = None, **kwargs: Any) -> list[str]:
        """Cut a text into the names of tokens."""
        for given in (text, pair):
            _check_texts(given)
        return super().tokenize(text, pair, **kwargs)

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

    def _load_model(self, vocab_file: str, added_tokens: Mapping[int, AddedToken]) -> BPE:
        """Read `tokenizer.model`; `added_tokens` are those that tokenizer_config.json lists."""
        raise NotImplementedError

    @staticmethod
    def _rust_tokenizer(model: BPE) -> Tokenizer:
        """A Rust tokenizer around `model` that treats text as the generation does."""
        raise NotImplementedError

    def _control_ids(self, chat_format: ConversationFormat) -> dict[str, int]:
        tokens = self.vocabularies[chat_format.name].control_tokens
        first: int = self.convert_tokens_to_ids(tokens[0])
        return {token: first + index for index, token in enumerate(tokens)}

    def _special_ids(self, chat_format: ConversationFormat) -> dict[str, int]:
        pair_token = self.vocabularies[chat_format.name].pair_token
        return {**self._control_ids(chat_format), pair_token: self.convert_tokens_to_ids(pair_token)}

    def _tokens_kept_from_text(self) -> dict[str, bool]:
        """The special tokens of the published vocabulary, and whether they are kept out of text."""
        vocabulary = self.vocabulary
        readable = vocabulary.trainer_tokens if self.encode_special_tokens else ()
        tokens = dict.fromkeys((*vocabulary.named_tokens.values(), *vocabulary.control_tokens))
        return {token: token not in readable for token in tokens}

    def _register_control_tokens(self) -> None:
        tokens = [_added_token(token, special) for token, special in self._tokens_kept_from_text().items()]
        self._tokenizer.add_tokens(tokens)
        control_tokens = self.vocabulary.control_tokens
        # `add_special_tokens` replaces this list by default, but these tokens do not go away.
        self.extra_special_tokens = list(dict.fromkeys((*control_tokens, *self.extra_special_tokens)))
        self._message_tokenizer = None
        self._texts_encoder = None
        self._known_tokens = {}

    def _text_tokenizer(self) -> Tokenizer:
        """A Rust tokenizer for the text of messages. It shares the vocabulary, but none of the per-call settings."""
        tokenizer = self._message_tokenizer
        if tokenizer is None:
            special = {*self.all_special_tokens, *self._tokens_kept_from_text()}
            added_tokens = [token for _, token in sorted(self.added_tokens_decoder.items())]
            tokenizer = self._rust_tokenizer(self._tokenizer.model)
            tokenizer.add_tokens([_added_token(token, token.content in special) for token in added_tokens])
            tokenizer.encode_special_tokens = True
            self._message_tokenizer = tokenizer
        return tokenizer

    def _message_ids(self, text: str) -> list[int]:
        tokenizer = self._text_tokenizer()
        rows = self._plain_ids([text], tokenizer, is_split=True)
        return RustEncoder(tokenizer)([text])[0] if rows is None else rows[0]

    def _message_encoding(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._text_tokenizer().encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _special_texts(self, skip_special_tokens: bool | None, chat_format: ConversationFormat) -> dict[int, str]:
        """The text of every id that is no piece of the vocabulary file; see `decode`."""
        control_ids = self._control_ids(chat_format)
        texts = {index: token.content for index, token in self.added_tokens_decoder.items()}
        texts |= {index: token for token, index in control_ids.items()}
        silent = self.vocabularies[chat_format.name].silent_tokens
        silent_ids = [self._tokenizer.token_to_id(token) for token in silent if skip_special_tokens is None]
        if skip_special_tokens:
            silent_ids += [*control_ids.values(), *self.all_special_ids]
        return texts | dict.fromkeys(silent_ids, "")

    def _text_decoder(
        self, skip_special_tokens: bool | None, chat_format: ConversationFormat, **kwargs: Any
    ) -> Callable[[Sequence[int]], str]:
        return partial(self._decode_ids, self._special_texts(skip_special_tokens, chat_format))

    def _decode_ids(self, special_texts: Mapping[int, str], token_ids: Sequence[int]) -> str:
        """The text of ids, of which some have a text of their own."""
        raise NotImplementedError


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
        ValueError: if there is no vocabulary file, or it is another generation's.
    """

    always_splits = True
    vocabularies: Mapping[str, Vocabulary] = {
        # ChatGLM2 writes none of its control tokens, ChatGLM3 writes their names.
        "chatglm2": Vocabulary(
            **SENTENCEPIECE_TOKENS,
            control_tokens=CHATGLM2_CONTROL_TOKENS,
            silent_tokens=("<unk>", "<s>", "</s>", *CHATGLM2_CONTROL_TOKENS),
        ),
        "chatglm3": Vocabulary(
            **SENTENCEPIECE_TOKENS,
            control_tokens=(*CHATGLM2_CONTROL_TOKENS, *ROLE_TOKENS),
            silent_tokens=("<unk>", "<s>", "</s>"),
            trainer_tokens=ROLE_TOKENS,
        ),
    }

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Earlier versions of the library saved `False`, which the published class ignored.
        kwargs["split_special_tokens"] = True
        super().__init__(vocab_file, tokenizer_file, **kwargs)

    @property
    def tokenizer(self) -> SentencePieceView:
        """The vocabulary without `[gMASK] sop`, under the name it has in the published class."""
        return SentencePieceView(self)

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

    @classmethod
    def _find_format(cls, name: str | None, vocab_file: str) -> ConversationFormat:
        """What the settings say, then the config.json beside the vocabulary, then the last one, with a warning."""
        config = Path(vocab_file).with_name("config.json")
        if name is None and config.is_file():
            name = infer_model_version(json.loads(config.read_text(encoding="utf-8")))
        chat_format = super()._find_format(name, vocab_file)
        if name is None:
            logger.warning_once(
                f"Nothing beside the tokenizer tells ChatGLM2 from ChatGLM3, so {chat_format.name} is assumed. "
                'Set `"model_version": "chatglm2"` or `"chatglm3"` in tokenizer_config.json to settle it.'
            )
        return chat_format

    def _load_model(self, vocab_file: str, added_tokens: Mapping[int, AddedToken]) -> BPE:
        return bpe_from_sentencepiece(vocab_file, self.vocabulary.control_tokens)

    def _make_texts_encoder(self) -> TextsEncoder:
        try:
            return SentencePieceEncoder(self.tokenizer.sp_model)
        except ValueError:  # There is a tokenizer.json only.
            return RustEncoder(self._text_tokenizer())

    @staticmethod
    def _rust_tokenizer(model: BPE) -> Tokenizer:
        return sentencepiece_tokenizer(model)

    def _decode_ids(self, special_texts: Mapping[int, str], token_ids: Sequence[int]) -> str:
        chunks: list[bytes] = []
        for index in token_ids:
            text = special_texts.get(index)
            if text is None:
                piece = self._tokenizer.id_to_token(index) if is_possible_id(index) else None
                if piece and (match := BYTE_PIECE.fullmatch(piece)):
                    chunks.append(bytes.fromhex(match[1]))
                elif piece:
                    # Drop the space that SentencePiece puts before a text.
                    chunks.append((piece if chunks else piece.removeprefix("▁")).replace("▁", " ").encode())
            elif text:
                chunks.append(text.encode())
        return ESCAPED_BYTE.sub("\ufffd", b"".join(chunks).decode(errors="surrogateescape"))


class ChatGLM4Tokenizer(ChatGLMTokenizersBackend):
    """
    Tokenizer of GLM-4-9B and GLM-4V-9B, with the ids of the published one.

    Args:
        vocab_file (`str`, *optional*):
            Path of `tokenizer.model`, a list of ranked byte strings.
        tokenizer_file (`str`, *optional*):
            Path of a `tokenizer.json` that this class saved; used where there is no `vocab_file`.
        split_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether the control tokens stay text where they stand in a text given to the tokenizer. They always do in
            the content of messages.

    Raises:
        ValueError: if there is no vocabulary file, or it is another generation's.
    """

    vocabularies: Mapping[str, Vocabulary] = {
        "glm4v": replace(GLM4_VOCABULARY, own_setting="image_size"),
        "glm4": GLM4_VOCABULARY,
    }

    @property
    def tokenizer(self) -> RanksView:
        """The vocabulary without `[gMASK] <sop>`, under the name it has in the published class."""
        return RanksView(self)

    @property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """The ranked byte strings of `tokenizer.model`, as converters of other engines read them."""
        end: int = self.convert_tokens_to_ids(self.vocabulary.control_tokens[0])
        return {
            token.translate(BYTE_OF_CHARACTER).encode("latin-1"): rank
            for token, rank in sorted(self._tokenizer.get_vocab(False).items(), key=lambda item: item[1])
            if rank < end
        }

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[dict[str, Any] | Callable] | Mapping[str, Any] | None = None,
        documents: Any = None,
        chat_template: str | None = None,
        *,
        add_special_tokens: bool = True,
        tokenize: bool = True,
        chat_format: ConversationFormat | None = None,
        image_processor: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Write or encode conversations; `add_special_tokens=False` leaves `[gMASK] <sop>` out, as published.

        Where a message has a picture (`{"role": "user", "image": ..., "content": ...}`, or a part of its content), what
        is returned has `images`, float32 `[pictures, 3, image_size, image_size]`, for `model.generate`. They are those
        of `image_processor`, or of the published steps.
        """
        chat_format = self._known_format(chat_format)
        pictures = _pictures(conversation, chat_format)
        opening = "" if add_special_tokens else "".join(chat_format.opening_tokens)
        if not add_special_tokens:
            chat_format = replace(chat_format, opening_tokens=())
        written = super().apply_chat_template(
            conversation, tools, documents, chat_template, tokenize=tokenize, chat_format=chat_format, **kwargs
        )
        if pictures and isinstance(written, MutableMapping):
            written["images"] = self.encode_pictures(pictures, image_processor)
        if isinstance(written, str):
            return written.removeprefix(opening)
        return written if tokenize else [text.removeprefix(opening) for text in written]

    def encode_pictures(self, pictures: Sequence[Any], image_processor: Callable[..., Any] | None = None) -> Any:
        """Pictures as the model reads them, a tensor of float32, `[pictures, 3, image_size, image_size]`.

        Args:
            pictures: of Pillow, arrays, tensors, or what names them: a path, an address, base64.
            image_processor: what turns them into numbers, if not the published steps.

        Raises:
            ImportError: without Pillow.
            TypeError, ValueError: for what is no picture, or cannot be read as one.
        """
        if image_processor is None:
            # Here, because those who read text alone may not have Pillow.
            from .image_processing_chatglm import ChatGLMImageProcessorPil

            size = self.init_kwargs.get("image_size", ChatGLMImageProcessorPil.size["height"])
            image_processor = ChatGLMImageProcessorPil(size={"height": size, "width": size})
        return image_processor(list(pictures), return_tensors="pt")["pixel_values"]

    def _load_model(self, vocab_file: str, added_tokens: Mapping[int, AddedToken]) -> BPE:
        more_tokens = {token.content: index for index, token in added_tokens.items()}
        # The library gives the tokens of a file the next ids, which is right where the file leaves no ids out.
        if not more_tokens or max(added_tokens) - min(added_tokens) < len(added_tokens):
            more_tokens = {}
        return bpe_from_ranks(vocab_file, self.vocabulary.control_tokens, more_tokens)

    def _make_texts_encoder(self) -> TextsEncoder:
        return RanksEncoder(self._text_tokenizer(), lambda: self.mergeable_ranks)

    @staticmethod
    def _rust_tokenizer(model: BPE) -> Tokenizer:
        return ranks_tokenizer(model)

    def _decode_ids(self, special_texts: Mapping[int, str], token_ids: Sequence[int]) -> str:
        chunks: list[bytes] = []
        for index in token_ids:
            text = special_texts.get(index)
            if text is None:
                token = (self._tokenizer.id_to_token(index) or "") if is_possible_id(index) else ""
                chunks.append(token.translate(BYTE_OF_CHARACTER).encode("latin-1"))
            else:
                chunks.append(text.encode())
        return b"".join(chunks).decode(errors="replace")


def _pictures(conversation: Any, chat_format: ConversationFormat) -> list[Any]:
    """The pictures in the messages of one conversation or of a batch of them, in their order."""
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)):
        return []
    is_batched = len(conversation) > 0 and not isinstance(conversation[0], Mapping)
    chats = [getattr(chat, "messages", chat) for chat in conversation] if is_batched else [conversation]
    messages = [message for chat in chats if isinstance(chat, (list, tuple)) for message in chat]
    pictures: list[Any] = []
    for message in messages:
        if may_have_picture(message):
            pictures += [known["image"] for known in chat_format.normalize_messages([message]) if "image" in known]
    return pictures


def _check_texts(given: Any, depth: int = 0) -> None:
    if isinstance(given, str):
        check_text(given)
    # A batch of pairs of lists of words is the deepest there is.
    elif isinstance(given, (list, tuple)) and depth < 3:
        for item in given:
            _check_texts(item, depth + 1)


def _added_token(token: str | AddedToken, special: bool) -> AddedToken:
    token = AddedToken(token) if isinstance(token, str) else token
    return AddedToken(
        token.content,
        # `sop` and `eop` are names that also occur inside words.
        single_word=token.single_word or token.content in ("sop", "eop"),
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        # A normalized one would begin with SentencePiece's leading space, and be found only where a word begins.
        normalized=False,
        special=special,
    )


# The published files name this module for ChatGLM-6B too, and `save_pretrained` writes and copies what a class names.
ChatGLM6BTokenizer.__module__ = __name__

# The library loads this file without making it an attribute of its package. `datasets` looks for the classes there to
# take a fingerprint of a tokenizer, and where they are missing it pickles whole classes until Python's stack is full.
setattr(sys.modules[__package__], __name__.rpartition(".")[2], sys.modules[__name__])


__all__ = ["ChatGLM4Tokenizer", "ChatGLM6BTokenizer", "ChatGLMTokenizer"]
