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
"""The ids of plain texts, in which no token is searched for, faster than the Rust backend gives them.

What is unusual here:

- Half of the time that Rust takes for a text goes into where each token comes from, which few callers ask for. So the ids
  are made without it, and the Rust encodings when they are asked for (`PlainEncoding`).
- ChatGLM2 and ChatGLM3: by SentencePiece itself, which is faster on a whole text than the same rules in Rust.
- GLM-4: words are cut by Python's `re`, where a text has no characters but those whose kind no version of Unicode has
  changed, and their ids are remembered.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor
from tokenizers import Encoding, Tokenizer
from transformers.tokenization_utils_base import (
    BatchEncoding,
    PaddingStrategy,
    PreTrainedTokenizerBase,
    TruncationStrategy,
)

from .conversation_chatglm import check_text
from .tokenization_vocabulary import CHARACTER_OF_BYTE, GLM4_PATTERN


# What `GLM4_PATTERN` calls letters, digits and white space, within `COMMON_TEXT`.
LETTERS = "A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5"
DIGITS = "0-9"
SPACES = " \t\n\x0b\x0c\r\u3000"
COMMON_TEXT = re.compile(f"[\x00-\x7f\u2010-\u2027\u3000-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20{LETTERS}]*")
COMMON_WORD = re.compile(
    GLM4_PATTERN.replace(r"[^\r\n\p{L}\p{N}]", f"[^\r\n{LETTERS}{DIGITS}]")
    .replace(r"[^\s\p{L}\p{N}]", f"[^{SPACES}{LETTERS}{DIGITS}]")
    .replace(r"\p{L}", f"[{LETTERS}]")
    .replace(r"\p{N}", f"[{DIGITS}]")
    .replace(r"\s", f"[{SPACES}]")
    .replace(r"\S", f"[^{SPACES}]")
)

# No word goes on from a line break to what is neither white space nor another one.
LINE_START = re.compile(f"(?<=\n)(?=[!-~{LETTERS}])")

# Words that are remembered; some megabytes.
MOST_WORDS = 50_000

# Arguments that ask for more than ids and masks, or change what a text is; the library's own way has them.
FURTHER_ARGUMENTS = (
    "is_split_into_words",
    "return_token_type_ids",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
    "sanitize_control_tokens",
)

# Those of padding, besides how.
PADDING_ARGUMENTS = ("max_length", "pad_to_multiple_of", "padding_side")

# Stands where the ids of a text will.
NO_ID = -1

TextsEncoder = Callable[[Sequence[str]], list[list[int]]]


class PlainEncoding(BatchEncoding):
    """Ids, and the Rust encodings when something asks for them: offsets, words, `char_to_token` and the like.

    Args:
        data: the columns.
        make_encodings: gives the Rust encodings, one for each row of ids.
        tensor_type: as for `BatchEncoding`.
    """

    def __init__(
        self, data: dict[str, Any], make_encodings: Callable[[], list[Encoding]], tensor_type: str | None = None
    ) -> None:
        self._make_encodings = make_encodings
        self._made_encodings: list[Encoding] | None = None
        super().__init__(data, tensor_type=tensor_type, n_sequences=1)

    # The library's methods read this private attribute (Transformers 5.17 to 5.23), and the constructor sets it.
    @property
    def _encodings(self) -> list[Encoding]:
        if self._made_encodings is None:
            self._made_encodings = self._make_encodings()
        return self._made_encodings

    @_encodings.setter
    def _encodings(self, value: list[Encoding] | None) -> None:
        self._made_encodings = value

    @property
    def is_fast(self) -> bool:
        """Whether there are Rust encodings."""
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        # Where it is unpickled or copied to, it is the library's own.
        return BatchEncoding, (self.data, self._encodings)


class SentencePieceEncoder:
    """The ids of texts by the SentencePiece model of ChatGLM2 or ChatGLM3."""

    def __init__(self, model: SentencePieceProcessor) -> None:
        self._model = model

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_text(text)
        # A batch starts threads, which one text does not need.
        return self._model.encode(list(texts)) if len(texts) > 1 else [self._model.encode(text) for text in texts]


class RustEncoder:
    """The ids of texts by a Rust tokenizer, without the offsets."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


class WordEncoder(RustEncoder):
    """The ids of texts by the words of GLM-4, most of which are tokens or were seen before."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        lines = [LINE_START.split(text) for text in texts]
        ids = iter(self._ids_of_lines(list(chain.from_iterable(lines))))
        return [list(chain.from_iterable(islice(ids, len(parts)))) for parts in lines]

    def _ids_of_lines(self, texts: Sequence[str]) -> list[list[int]]:
        words = {text: COMMON_WORD.findall(text) for text in texts if COMMON_TEXT.fullmatch(text)}
        # Another thread may put an empty one in its place, but nothing is taken out.
        known = self._known = self._known if len(self._known) < MOST_WORDS else {}
        self._learn_tokens(set(chain.from_iterable(words.values())).difference(known), known)
        others = []
        new_words: set[str] = set()
        for text in dict.fromkeys(texts):
            new = set(words.get(text, [text])).difference(known)
            # Rust takes a whole text faster than most of its parts one by one, and Chinese has few words twice.
            if text not in words or sum(map(len, new)) * 2 > len(text):
                others.append(text)
            else:
                new_words |= new
        ids = dict(zip(others, super().__call__(others) if others else ()))
        known.update(zip(new_words, super().__call__(list(new_words)) if new_words else ()))
        return [
            ids[text] if text in ids else list(chain.from_iterable(map(known.__getitem__, words[text])))
            for text in texts
        ]

    def _learn_tokens(self, words: Collection[str], known: dict[str, list[int]]) -> None:
        """Make those words known that are tokens as they are."""
        for word in words:
            token = self._tokenizer.token_to_id(word.encode().decode("latin-1").translate(CHARACTER_OF_BYTE))
            if token is not None:
                known[word] = [token]


class TokenInText(NamedTuple):
    """An added token: its id, whether it is special, and whether it takes itself from a text, anywhere, and no more."""

    token_id: int
    special: bool
    is_taken_as_it_is: bool


# What is known of the added tokens of Rust tokenizers, by the `id` of each, for the size of its vocabulary.
KnownTokens = dict[int, tuple[Tokenizer, int, dict[str, TokenInText]]]


class PlainTexts(PreTrainedTokenizerBase):
    """Calls of a tokenizer that ask for no more than the ids of whole texts, and leave the others to the library."""

    def _encode_plus(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        # A private hook (Transformers 5.17 to 5.23): what comes before it reads the arguments, what comes behind it makes
        # more than the ids.
        if return_attention_mask is None:
            return_attention_mask = self._default_mask(padding_strategy, return_tensors)

        def by_the_library() -> BatchEncoding:
            return super(PlainTexts, self)._encode_plus(
                text,
                text_pair,
                add_special_tokens=add_special_tokens,
                padding_strategy=padding_strategy,
                truncation_strategy=truncation_strategy,
                return_tensors=return_tensors,
                return_attention_mask=return_attention_mask,
                **kwargs,
            )

        texts = [text] if isinstance(text, str) else text
        is_whole = text_pair is None and truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE
        if not is_whole or any(kwargs.get(name) for name in FURTHER_ARGUMENTS) or not are_texts(texts):
            return by_the_library()
        is_split = kwargs.get("split_special_tokens")
        rows = self._ids_of_texts(texts, self.split_special_tokens if is_split is None else is_split)
        if rows is None:
            return by_the_library()
        if add_special_tokens:
            # What stands around a text, once for all of them.
            framed = self.build_inputs_with_special_tokens([NO_ID])
            place = framed.index(NO_ID)
            rows = [framed[:place] + ids + framed[place + 1 :] for ids in rows]
        for row in rows:
            self._eventual_warn_about_too_long_sequence(row, kwargs.get("max_length"), kwargs.get("verbose", True))
        columns = self._columns(rows, padding_strategy, return_attention_mask, kwargs)
        is_row = isinstance(text, str) and return_tensors is None
        data = {name: values[0] for name, values in columns.items()} if is_row else columns
        return self._make_encoding(data, columns["input_ids"], by_the_library, return_tensors)

    def _default_mask(self, padding_strategy: PaddingStrategy, return_tensors: str | None) -> bool | None:
        """Whether there is an attention mask where the caller does not say; None as the library has it."""
        return None

    def _ids_of_texts(self, texts: Sequence[str], is_split: bool) -> list[list[int]] | None:
        """The ids of texts, in which special tokens are not searched for if `is_split`; None to leave them to the library."""
        raise NotImplementedError

    def _columns(
        self,
        rows: list[list[int]],
        padding_strategy: PaddingStrategy,
        return_attention_mask: bool | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The columns of an encoding, padded."""
        raise NotImplementedError

    def _make_encoding(
        self,
        data: dict[str, Any],
        rows: list[list[int]],
        by_the_library: Callable[[], BatchEncoding],
        return_tensors: str | None,
    ) -> BatchEncoding:
        """What a call returns: the columns, or those of one text, whose ids are `rows`."""
        return BatchEncoding(data, tensor_type=return_tensors)


class PlainTextsInRust(PlainTexts):
    """The same of a tokenizer on the Rust backend, whose own encodings are made when they are asked for."""

    _tokenizer: Tokenizer
    _texts_encoder: TextsEncoder | None
    _known_tokens: KnownTokens

    def _ids_of_texts(self, texts: Sequence[str], is_split: bool) -> list[list[int]] | None:
        return self._plain_ids(texts, self._tokenizer, is_split)

    def _make_encoding(
        self,
        data: dict[str, Any],
        rows: list[list[int]],
        by_the_library: Callable[[], BatchEncoding],
        return_tensors: str | None,
    ) -> BatchEncoding:
        def make_encodings() -> list[Encoding]:
            encodings = by_the_library().encodings or []
            if [encoding.ids for encoding in encodings] != rows:
                raise ValueError("The tokenizer was changed after it encoded this text; encode the text again.")
            return encodings

        return PlainEncoding(data, make_encodings, return_tensors)

    def _columns(
        self,
        rows: list[list[int]],
        padding_strategy: PaddingStrategy,
        return_attention_mask: bool | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        columns: dict[str, Any] = {"input_ids": rows}
        if return_attention_mask or (return_attention_mask is None and "attention_mask" in self.model_input_names):
            columns["attention_mask"] = [[1] * len(row) for row in rows]
        if padding_strategy != PaddingStrategy.DO_NOT_PAD:
            options = {name: kwargs.get(name) for name in PADDING_ARGUMENTS}
            has_mask = "attention_mask" in columns
            return dict(self.pad(columns, padding=padding_strategy, return_attention_mask=has_mask, **options))
        if "position_ids" in self.model_input_names:
            columns["position_ids"] = [list(range(len(row))) for row in rows]
        return columns

    def _plain_ids(self, texts: Sequence[str], tokenizer: Tokenizer, is_split: bool) -> list[list[int]] | None:
        """The ids of texts in which `tokenizer` finds its added tokens, the special ones unless `is_split`.

        None if a token is among them that takes more than itself from a text, or is not taken everywhere.
        """
        searched = {
            content: token
            for content, token in self._tokens_in_text(tokenizer).items()
            if not (is_split and token.special) and any(content in text for text in texts)
        }
        if not all(token.is_taken_as_it_is for token in searched.values()):
            return None
        if self._texts_encoder is None:
            self._texts_encoder = self._make_texts_encoder()
        if not searched:
            return self._texts_encoder(texts)
        pattern = re.compile(f"({'|'.join(map(re.escape, sorted(searched, key=len, reverse=True)))})")
        split = [pattern.split(text) for text in texts]
        ids = iter(self._texts_encoder([part for parts in split for part in parts[::2]]))
        rows = []
        for parts in split:
            row = next(ids)
            for token in parts[1::2]:
                row = [*row, searched[token].token_id, *next(ids)]
            rows.append(row)
        return rows

    def _tokens_in_text(self, tokenizer: Tokenizer) -> Mapping[str, "TokenInText"]:
        size = tokenizer.get_vocab_size()
        known = self._known_tokens.get(id(tokenizer))
        if known is None or known[:2] != (tokenizer, size):
            tokens = {
                token.content: TokenInText(
                    index, token.special, not (token.normalized or token.single_word or token.lstrip or token.rstrip)
                )
                for index, token in tokenizer.get_added_tokens_decoder().items()
            }
            known = self._known_tokens[id(tokenizer)] = (tokenizer, size, tokens)
        return known[2]

    def _make_texts_encoder(self) -> TextsEncoder:
        """What gives the ids of texts in which no token is searched for."""
        raise NotImplementedError


def are_texts(texts: Any) -> bool:
    """Whether this is a list of texts, and not empty."""
    return isinstance(texts, (list, tuple)) and bool(texts) and all(isinstance(text, str) for text in texts)


__all__ = [
    "PADDING_ARGUMENTS",
    "KnownTokens",
    "PlainEncoding",
    "PlainTexts",
    "PlainTextsInRust",
    "RustEncoder",
    "SentencePieceEncoder",
    "TextsEncoder",
    "WordEncoder",
]
