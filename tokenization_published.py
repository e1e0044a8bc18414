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
"""What programs written for the published tokenizers call, and the library no longer has.

What is unusual here:

- `tokenizer.tokenizer` is a view: the vocabulary without `[gMASK] sop`, with the attributes of the published inner class.
  It holds nothing, so that tokenizers pickle and copy as before; what needs the vocabulary file reads it when asked.
- Ready ids are taken in the place of text, alone or in a batch, as the library's tokenizers in Python do. The official
  programs make a batch of a conversation's ids that way.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy, TruncationStrategy

from .tokenization_conversation import ConversationTokenizer
from .tokenization_plain import KnownTokens, TextsEncoder


# A text and the second one of a pair, as ids.
IdsPair = tuple[list[int], list[int] | None]


class DerivedState:
    """Holds what is made when it is needed, outside `__dict__`, which pickles, copies and fingerprints are taken of."""

    __slots__ = ("_message_tokenizer", "_sentencepiece_model", "_texts_encoder", "_known_tokens")

    _message_tokenizer: Tokenizer | None
    _texts_encoder: TextsEncoder | None
    _known_tokens: KnownTokens
    _sentencepiece_model: SentencePieceProcessor | None

    def forget_derived_state(self) -> None:
        """Make everything anew when it is needed next."""
        self._message_tokenizer = None
        self._sentencepiece_model = None
        self._texts_encoder = None
        self._known_tokens = {}


class PublishedCalls(DerivedState, ConversationTokenizer):
    """The published calls of ChatGLM2, ChatGLM3 and GLM-4 that the library's Rust-backed tokenizers do not have."""

    def get_prefix_tokens(self) -> list[int]:
        """The ids of `[gMASK] sop`, which open every text."""
        ids: list[int] = self.convert_tokens_to_ids(list(self.chat_format.opening_tokens))
        return ids

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put `[gMASK] sop` before a text, and the end token behind the second one of a pair."""
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        if token_ids_1 is None:
            return ids
        return [*ids, *token_ids_1, self._special_ids(self.chat_format)[self.vocabulary.pair_token]]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mark what `build_inputs_with_special_tokens` adds, or the special tokens among ids that have them."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens)
        mask = [1] * len(self.get_prefix_tokens()) + [0] * len(token_ids_0)
        return mask if token_ids_1 is None else [*mask, *([0] * len(token_ids_1)), 1]

    def prepare_for_model(self, ids: list[int], pair_ids: list[int] | None = None, **kwargs: Any) -> BatchEncoding:
        """Add special tokens to ready ids, truncate and pad them; see `encode_ready_ids`."""
        return self.encode_ready_ids([(ids, pair_ids)], False, **kwargs)

    def encode_ready_ids(
        self,
        batch: Sequence[IdsPair],
        is_batch: bool = True,
        text_target: None = None,
        text_pair_target: None = None,
        add_special_tokens: bool = True,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str | TruncationStrategy | None = None,
        max_length: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        is_split_into_words: bool = True,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encode what is ids already, as a batch or alone. The others are the library's arguments, in its order.

        `is_split_into_words` and `verbose` change nothing here, and a target cannot be given with ids.
        """
        if text_target is not None or text_pair_target is not None:
            raise ValueError("Ids and a `text_target` cannot be encoded in one call; encode the target on its own.")
        strategy = str(getattr(truncation, "value", truncation or "do_not_truncate"))
        limit = self.model_max_length if max_length is None else max_length
        rows = []
        for ids, pair_ids in batch:
            if strategy != "do_not_truncate":
                added = self.num_special_tokens_to_add(pair_ids is not None) if add_special_tokens else 0
                ids, pair_ids = self._truncated(ids, pair_ids, max(limit - added, 0), strategy)
            rows.append(self._ready_row(ids, pair_ids, add_special_tokens))
        encoded = self._pad_rows(
            rows,
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_token_type_ids=return_token_type_ids,
            return_special_tokens_mask=return_special_tokens_mask,
            return_length=return_length,
        )
        if not is_batch and return_tensors is None:
            encoded = {key: value[0] for key, value in encoded.items()}
        return BatchEncoding(encoded, tensor_type=return_tensors)

    def _ready_row(self, ids: list[int], pair_ids: list[int] | None, add_special_tokens: bool) -> dict[str, list[int]]:
        if add_special_tokens:
            row = self.build_inputs_with_special_tokens(ids, pair_ids)
            special = self.get_special_tokens_mask(ids, pair_ids)
        else:
            row = [*ids, *(pair_ids or ())]
            special = [0] * len(row)
        # The end token belongs to the second text.
        num_second = 0 if pair_ids is None else len(pair_ids) + add_special_tokens
        types = [0] * (len(row) - num_second) + [1] * num_second
        return {"input_ids": row, "special_tokens_mask": special, "token_type_ids": types}

    def _truncated(self, ids: list[int], pair_ids: list[int] | None, limit: int, strategy: str) -> IdsPair:
        """At most `limit` ids in all, on the side that is not cut; the longer text gives way first."""
        lengths = [len(ids), len(pair_ids or ())]
        for _ in range(max(sum(lengths) - limit, 0)):
            shortened = {"only_first": 0, "only_second": 1}.get(strategy, int(lengths[1] >= lengths[0]))
            if not lengths[shortened]:
                raise ValueError(f"`truncation={strategy!r}` cannot make the other text fit in {limit} tokens.")
            lengths[shortened] -= 1
        is_left = self.truncation_side == "left"
        kept = [
            list(text)[len(text) - length :] if is_left else list(text)[:length]
            for text, length in zip((ids, pair_ids or ()), lengths)
        ]
        return kept[0], None if pair_ids is None else kept[1]

    def _convert_token_to_id(self, token: str) -> int:
        """The id of a token; converters of other engines use this name of the published class."""
        index: int = self.convert_tokens_to_ids(token)
        return index

    def _convert_id_to_token(self, index: int) -> str:
        """The name of an id, `""` where there is none; converters of other engines use this name."""
        return str(self.convert_ids_to_tokens(int(index)))


class InnerTokenizer:
    """What published code finds as `tokenizer.tokenizer`: the vocabulary, where nothing is added to a text.

    Everything else is passed on to the tokenizer, because libraries take an attribute of this name for the tokenizer.
    """

    _owner: PublishedCalls

    def __init__(self, owner: PublishedCalls) -> None:
        vars(self)["_owner"] = owner

    def __getattr__(self, name: str) -> Any:
        if name == "_owner":
            raise AttributeError(name)
        return getattr(self._owner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._owner, name, value)

    def __len__(self) -> int:
        return len(self._owner)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        return self._owner(*args, **kwargs)

    @property
    def n_words(self) -> int:
        """The number of ids."""
        return self._owner.vocab_size


class SentencePieceView(InnerTokenizer):
    """`tokenizer.tokenizer` of ChatGLM2 and ChatGLM3."""

    @property
    def sp_model(self) -> SentencePieceProcessor:
        """The SentencePiece model of the checkpoint's `tokenizer.model`, read when it is first asked for."""
        owner = self._owner
        if owner._sentencepiece_model is None:
            # A tokenizer that was made from tokenizer.json has no such attribute.
            vocab_file = getattr(owner, "vocab_file", None)
            try:
                owner._sentencepiece_model = SentencePieceProcessor(model_file=str(vocab_file))
            except (RuntimeError, OSError) as error:
                raise ValueError(
                    f"`sp_model` is read from `tokenizer.model`, and {vocab_file} is no such file. Copy it from "
                    "the published checkpoint into the folder the tokenizer is loaded from."
                ) from error
        return owner._sentencepiece_model

    @property
    def bos_id(self) -> int:
        """The id of `<s>`."""
        return self._owner.get_command("<bos>")

    @property
    def eos_id(self) -> int:
        """The id of `</s>`."""
        return self._owner.get_command("<eos>")

    @property
    def pad_id(self) -> int:
        """The id of `<unk>`, which also pads."""
        return self._owner.get_command("<pad>")

    @property
    def index_special_tokens(self) -> dict[int, str]:
        """The control tokens by their ids."""
        return {index: token for token, index in self._owner._control_ids(self._owner.chat_format).items()}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, in which no control token is read, with `<s>` before and `</s>` behind if asked for."""
        return [self.bos_id] * bos + self._owner._message_encoding(text)[0] + [self.eos_id] * eos

    def decode_tokens(self, tokens: Sequence[str]) -> str:
        """The text of pieces."""
        return str(self._owner.decode([self.convert_token_to_id(token) for token in tokens]))

    def convert_token_to_id(self, token: str) -> int:
        """The id of a piece or of a control token; that of `<unk>` for anything else."""
        return self._owner._convert_token_to_id(token)

    def convert_id_to_token(self, index: int) -> str:
        """The piece or control token of an id, `""` where there is none."""
        return self._owner._convert_id_to_token(index)


class RanksView(InnerTokenizer):
    """`tokenizer.tokenizer` of GLM-4, with the names of the package that the published class uses."""

    @property
    def n_vocab(self) -> int:
        """The number of ids."""
        return self._owner.vocab_size

    def encode(self, text: str, *, allowed_special: Any = (), disallowed_special: Any = ()) -> list[int]:
        """The ids of a text, in which no control token is read, whatever is allowed: it has none, as published."""
        return self._owner._message_encoding(text)[0]

    def encode_ordinary(self, text: str) -> list[int]:
        """As `encode`."""
        return self.encode(text)


def ready_ids(text: Any, text_pair: Any) -> tuple[list[IdsPair], bool] | None:
    """What is ids already in the arguments of a call, and whether it is a batch; None where they are text."""
    if _is_ids(text):
        return [(list(text), list(text_pair) if text_pair is not None else None)], False
    if not isinstance(text, (list, tuple)) or not text:
        return None
    if text_pair is not None:
        pairs = list(zip(text, text_pair, strict=True)) if isinstance(text_pair, (list, tuple)) else []
    else:
        pairs = [item if _is_pair(item) else (item, None) for item in text]
    if not pairs or not all(isinstance(ids, (list, tuple)) for ids, _ in pairs):
        return None
    # An empty text may be among them.
    if not all(_is_ids(ids) or not ids for pair in pairs for ids in pair) or not any(ids for ids, _ in pairs):
        return None
    return [(list(ids), None if pair_ids is None else list(pair_ids)) for ids, pair_ids in pairs], True


def _is_ids(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and bool(item) and isinstance(item[0], Integral)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(ids, (list, tuple)) for ids in item)


__all__ = ["DerivedState", "PublishedCalls", "RanksView", "SentencePieceView"]
