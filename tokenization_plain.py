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
  changed, and their ids are remembered. Where `tiktoken` is installed, the published tokenizer's package, it takes over
  from there once so much was encoded that it is worth getting it ready.
- A call with one text and no settings does not go through the library's reading of settings.
"""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
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


# What `GLM4_PATTERN` calls letters, digits and white space, within `COMMON_TEXT`: Latin but for the long s, which folds to
# an s, Greek, Cyrillic, kana, Chinese, Hangul.
LETTERS = (
    "A-Za-z\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\u017e\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
DIGITS = "0-9\xb2\xb3\xb9\xbc-\xbe"
SPACES = " \t\n\x0b\x0c\r\x85\xa0\u3000"
# Punctuation, arrows, mathematics, boxes, pictures.
SYMBOLS = (
    "\x00-\x7f\x80-\xbf\xd7\xf7\u200b-\u200d\u2010-\u2027\u2030-\u205e\u2190-\u245f\u2500-\u2775\u2794-\u2bff"
    "\u3001-\u3003\u3008-\u3011\ufe0f\uff01-\uff0f\uff1a-\uff20\U0001f300-\U0001faff"
)
COMMON_TEXT = re.compile(f"[{LETTERS}{DIGITS}{SPACES}{SYMBOLS}]*")
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

# A word that ends in a letter ends with the last of its letters, and these are none.
WORD_END = re.compile(f"(?<=[{LETTERS}])(?=[\x00-@，。])")

# Texts are searched for so many tokens by Python's `re`, which tries one after another.
MOST_SEARCHED_TOKENS = 100

# Words that are remembered; some megabytes.
MOST_WORDS = 50_000

# After so many characters `tiktoken` has saved the time it takes to get it ready, a third of a second.
WORTHWHILE_CHARACTERS = 1_000_000

# It takes texts in parts of about this length: before 0.10, its time grew with the square of a word's length, and in a
# million blanks it panics.
PART_CHARACTERS = 5_000

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
        rows: their ids, as lists of lists.
        by_the_library: encodes the same texts the library's way.
        tensor_type: as for `BatchEncoding`.
    """

    def __init__(
        self,
        data: dict[str, Any],
        rows: list[list[int]],
        by_the_library: Callable[[], BatchEncoding],
        tensor_type: str | None = None,
    ) -> None:
        self._rows = rows
        self._by_the_library = by_the_library
        self._made_encodings: list[Encoding] | None = None
        super().__init__(data, tensor_type=tensor_type, n_sequences=1)

    # The library's methods read this private attribute (Transformers 5.17 to 5.23), and the constructor sets it.
    @property
    def _encodings(self) -> list[Encoding]:
        if self._made_encodings is None:
            encodings = self._by_the_library().encodings or []
            if [encoding.ids for encoding in encodings] != self._rows:
                raise ValueError("The tokenizer was changed after it encoded this text; encode the text again.")
            self._made_encodings = encodings
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


class RanksEncoder(WordEncoder):
    """The ids of texts by `tiktoken`, where it is installed, and by the words of GLM-4 until that is worthwhile.

    Args:
        tokenizer: the Rust tokenizer, for texts with uncommon characters.
        read_ranks: gives the byte strings of the vocabulary and their ids.
    """

    def __init__(self, tokenizer: Tokenizer, read_ranks: Callable[[], dict[bytes, int]]) -> None:
        super().__init__(tokenizer)
        self._read_ranks = read_ranks
        self._num_characters = 0.0
        self._encoding: Any = None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if self._encoding is None:
            self._num_characters += sum(map(len, texts))
            if self._num_characters >= WORTHWHILE_CHARACTERS:
                self._get_ready()
        if self._encoding is None:
            return super().__call__(texts)
        return list(map(self._ids_of_text, texts))

    def _ids_of_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in cut_into_parts(text):
            is_common = len(part) < 2 * PART_CHARACTERS and COMMON_TEXT.fullmatch(part)
            ids += self._encoding.encode_ordinary(part) if is_common else super().__call__([part])[0]
        return ids

    def _get_ready(self) -> None:
        # Here, because few programs encode so much.
        try:
            import tiktoken
        except ImportError:
            self._num_characters = -math.inf
        else:
            ranks = self._read_ranks()
            self._encoding = tiktoken.Encoding("glm4", pat_str=GLM4_PATTERN, mergeable_ranks=ranks, special_tokens={})


class TokenInText(NamedTuple):
    """An added token: its id, and whether it takes itself from a text, anywhere, and no more."""

    token_id: int
    is_taken_as_it_is: bool


class SearchedTokens(NamedTuple):
    """The added tokens that text is searched for, by their names, and what finds any of them.

    They hold for a Rust tokenizer with a vocabulary of this size.
    """

    tokenizer: Tokenizer
    size: int
    tokens: dict[str, TokenInText]
    pattern: re.Pattern[str]


# By the `id` of a Rust tokenizer, and whether special tokens are left out.
KnownTokens = dict[tuple[int, bool], SearchedTokens]


class PlainTexts(PreTrainedTokenizerBase):
    """Calls of a tokenizer that ask for no more than the ids of whole texts, and leave the others to the library."""

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        *args: Any,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encode texts, as the library does, which describes the arguments; texts alone without reading the others."""
        is_alone = text_pair is text_target is text_pair_target is None and not (args or kwargs)
        if is_alone and (isinstance(text, str) or are_texts(text)):
            return self._encode_plus(
                text,
                add_special_tokens=add_special_tokens,
                return_tensors=return_tensors,
                split_special_tokens=self.split_special_tokens,
            )
        return super().__call__(
            text,
            text_pair,
            text_target,
            text_pair_target,
            add_special_tokens,
            *args,
            return_tensors=return_tensors,
            **kwargs,
        )

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

        by_the_library = partial(
            super()._encode_plus,
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
        if not is_whole or any(map(kwargs.get, FURTHER_ARGUMENTS)) or not are_texts(texts):
            return by_the_library()
        is_split = kwargs.get("split_special_tokens")
        rows = self._ids_of_texts(texts, self.split_special_tokens if is_split is None else is_split)
        if rows is None:
            return by_the_library()
        if add_special_tokens:
            # What stands around a text, once for all of them.
            framed = self.build_inputs_with_special_tokens([NO_ID])
            place = framed.index(NO_ID)
            before, behind = framed[:place], framed[place + 1 :]
            rows = [[*before, *ids, *behind] for ids in rows]
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
        return PlainEncoding(data, rows, by_the_library, return_tensors)

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

        None if a token is among them that takes more than itself from a text, or is not taken everywhere, or if there are
        many tokens: Rust searches for all of them at once.
        """
        known = self._searched_tokens(tokenizer, is_split)
        if len(known.tokens) > MOST_SEARCHED_TOKENS:
            return None
        if self._texts_encoder is None:
            self._texts_encoder = self._make_texts_encoder()
        if not (known.tokens and any(map(known.pattern.search, texts))):
            return self._texts_encoder(texts)
        found = [content for content in known.tokens if any(content in text for text in texts)]
        if not all(known.tokens[content].is_taken_as_it_is for content in found):
            return None
        split = [known.pattern.split(text) for text in texts]
        ids = iter(self._texts_encoder([part for parts in split for part in parts[::2]]))
        rows = []
        for parts in split:
            row = next(ids)
            for token in parts[1::2]:
                row = [*row, known.tokens[token].token_id, *next(ids)]
            rows.append(row)
        return rows

    def _searched_tokens(self, tokenizer: Tokenizer, is_split: bool) -> SearchedTokens:
        size = tokenizer.get_vocab_size()
        known = self._known_tokens.get((id(tokenizer), is_split))
        if known is None or known.tokenizer is not tokenizer or known.size != size:
            tokens = {
                token.content: TokenInText(
                    index, not (token.normalized or token.single_word or token.lstrip or token.rstrip)
                )
                for index, token in tokenizer.get_added_tokens_decoder().items()
                if not (is_split and token.special)
            }
            names = sorted(tokens, key=len, reverse=True)[: MOST_SEARCHED_TOKENS + 1]
            known = SearchedTokens(tokenizer, size, tokens, re.compile(f"({'|'.join(map(re.escape, names))})"))
            self._known_tokens[id(tokenizer), is_split] = known
        return known

    def _make_texts_encoder(self) -> TextsEncoder:
        """What gives the ids of texts in which no token is searched for."""
        raise NotImplementedError


def cut_into_parts(text: str) -> Iterator[str]:
    """Cut a text of `COMMON_TEXT` behind words, as soon as a part has `PART_CHARACTERS`."""
    start = 0
    while len(text) - start > PART_CHARACTERS and (end := WORD_END.search(text, start + PART_CHARACTERS)):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def are_texts(texts: Any) -> bool:
    """Whether this is a list of texts, and not empty."""
    return isinstance(texts, (list, tuple)) and bool(texts) and all(isinstance(text, str) for text in texts)


__all__ = [
    "PADDING_ARGUMENTS",
    "KnownTokens",
    "PlainEncoding",
    "PlainTexts",
    "PlainTextsInRust",
    "RanksEncoder",
    "RustEncoder",
    "SentencePieceEncoder",
    "TextsEncoder",
]
