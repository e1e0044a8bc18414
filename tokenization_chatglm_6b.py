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
"""The tokenizer of ChatGLM-6B, on SentencePiece, made from the checkpoint's `ice_text.model`.

What is unusual here:

- The vocabulary is a SentencePiece unigram model and stays with the `sentencepiece` package: the Rust one differs in
  ties. White space is rewritten before and after it, and the ids of image tokens may come before those of the text.
- `[gMASK] <sop>` follows a text instead of opening it. Padding is on the left.
- Position ids have two rows, and the attention mask has two dimensions for each text, true where attention is blocked:
  the text up to `<sop>` is seen from both sides.
- The published files call the class `tokenization_chatglm.ChatGLMTokenizer`, which gives this one when it loads.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers.tokenization_python import PythonBackend
from transformers.tokenization_utils_base import BatchEncoding, PaddingStrategy

from .conversation_chatglm import ConversationFormat, check_text
from .tokenization_conversation import ConversationTokenizer, take_extra_tokens
from .tokenization_plain import PADDING_ARGUMENTS, PlainTexts
from .tokenization_vocabulary import Vocabulary


# Image tokens before the text of ChatGLM-6B's first vocabulary (150528 ids), whose files do not say how many there are.
DEFAULT_NUM_IMAGE_TOKENS = 20000

# Two and up to 78 more: `re` looks for a fixed beginning faster.
BLANKS = re.compile("(   {0,78})")
PIECE_OF_BLANKS = {" " * length: f"<|blank_{length}|>" for length in range(2, 81)}
BLANK_PIECE = re.compile(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>")
# Zeros before the number change nothing, as in the published tokenizer.
IMAGE_TOKEN = re.compile(r"<image_0*([0-9]+)>")


class ChatGLM6BTokenizer(ConversationTokenizer, PlainTexts, PythonBackend):
    """
    Tokenizer of ChatGLM-6B, with the ids of the published one. `ChatGLMTokenizer.from_pretrained` gives it too.

    Args:
        vocab_file (`str`, *optional*):
            Path of `ice_text.model`.
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
    vocabularies: Mapping[str, Vocabulary] = {
        "chatglm": Vocabulary(
            control_tokens=("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
            named_tokens={
                "bos_token": "<sop>",
                "eos_token": "<eop>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "mask_token": "[MASK]",
            },
            pair_token="<eop>",
        )
    }

    def __init__(
        self,
        vocab_file: str | None = None,
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
        self.chat_format = self._find_format(kwargs.pop("model_version", None), vocab_file)
        self.vocab_file = vocab_file
        self.sp_tokenizer = SPTokenizer(vocab_file, num_image_tokens)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        # The library takes every other argument whose name ends in `_token` for a special token, and looks for that
        # token in text.
        names = {name: kwargs.pop(name) for name in ("gmask_token", "end_token", "eop_token") if name in kwargs}
        names |= kwargs.pop("model_specific_special_tokens", None) or {}
        self.gmask_token = str(names.get("gmask_token", "[gMASK]"))
        self.end_token = str(names.get("end_token", "</s>"))
        # The first published files call `</s>` the eos token, and have `eop_token` for the end of an answer.
        kwargs["eos_token"] = names.get("eop_token") or kwargs.get("eos_token")
        for name, token in self.vocabulary.named_tokens.items():
            kwargs[name] = str(kwargs.get(name) or token)
        kwargs["added_tokens_decoder"] = (kwargs.get("added_tokens_decoder") or {}) | self._searched_tokens(kwargs)
        kwargs["chat_template"] = self._template_to_use(kwargs.get("chat_template"))
        # The published class relies on what was the library's default then.
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        super().__init__(extra_special_tokens=take_extra_tokens(kwargs), **kwargs)
        saved = ("model_version", "num_image_tokens", "gmask_token", "end_token", "do_lower_case", "remove_space")
        self.init_kwargs |= {name: getattr(self, name) for name in saved}

    def _searched_tokens(self, names: Mapping[str, Any]) -> dict[int, AddedToken]:
        """The named special tokens, which text is searched for; white space around them goes, as published."""
        tokens = [names[name] for name in self.vocabulary.named_tokens]
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
        ids = [*token_ids_0, self.gmask_token_id, self.sp_tokenizer["<sop>"]]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.sp_tokenizer[self.vocabulary.pair_token]]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mark what `build_inputs_with_special_tokens` adds, or the special tokens among ids that have them."""
        if already_has_special_tokens:
            # `all_special_ids` lacks `[gMASK]`, as published.
            special_ids = {*self.all_special_ids, *self._control_ids(self.chat_format).values(), self.end_token_id}
            return [int(index in special_ids) for index in token_ids_0]
        mask = [0] * len(token_ids_0) + [1, 1]
        return mask if token_ids_1 is None else [*mask, *([0] * len(token_ids_1)), 1]

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Pad as the library does. Attention masks of one or two dimensions are extended, and made where none are."""
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs:
            encoded_inputs = {key: [example[key] for example in encoded_inputs] for key in encoded_inputs[0]}
        # The library would leave masks of two dimensions unpadded if they came in a list.
        tuples = {key: tuple(value) for key, value in encoded_inputs.items() if key == "attention_mask"}
        return super().pad({**encoded_inputs, **tuples}, *args, **kwargs)

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `ice_text.model`."""
        name = self.vocab_files_names["vocab_file"]
        file = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        file.write_bytes(self.sp_tokenizer.text_tokenizer.serialized_model_proto())
        return (str(file),)

    def _save_published_files(self, save_directory: str | Path, filename_prefix: str | None) -> tuple[str, ...]:
        """Name the class in the settings as the published files do, which is the name that other code knows."""
        name = "tokenizer_config.json"
        file = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        settings = file.read_text(encoding="utf-8")
        file.write_text(settings.replace(type(self).__name__, "ChatGLMTokenizer"), encoding="utf-8")
        return ()

    def _default_mask(self, padding_strategy: PaddingStrategy, return_tensors: str | None) -> bool:
        # The mask grows with the square of a text's length, so lists without padding come without it, as published.
        return return_tensors is not None or padding_strategy != PaddingStrategy.DO_NOT_PAD

    def _columns(
        self,
        rows: list[list[int]],
        padding_strategy: PaddingStrategy,
        return_attention_mask: bool | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        columns: dict[str, Any] = {"input_ids": rows}
        if not return_attention_mask and padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return columns
        options = {name: kwargs.get(name) for name in PADDING_ARGUMENTS}
        return dict(
            self.pad(columns, padding=padding_strategy, return_attention_mask=return_attention_mask, **options)
        )

    def _ids_of_texts(self, texts: Sequence[str], is_split: bool) -> list[list[int]]:
        tokens = self._added_tokens_encoder
        has_own_ids = max(tokens.values()) >= self.vocab_size
        # Few texts have a token in them; the library looks for one at every character.
        is_plain = [not has_own_ids and (is_split or not any(token in text for token in tokens)) for text in texts]
        plain_texts = [self._preprocess(text) for text, plain in zip(texts, is_plain) if plain]
        ids = iter(self.sp_tokenizer.encode_batch(plain_texts))
        return [
            next(ids) if plain else self.convert_tokens_to_ids(self.tokenize(text, split_special_tokens=is_split))
            for text, plain in zip(texts, is_plain)
        ]

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
        """The two rows of positions: in the context, constant from `<sop>` on; and in the answer, 0 before it."""
        positions = np.zeros((2, len(ids)), dtype=np.int64)
        if mask is not None and np.ndim(mask) > 1:
            mask = ~np.asarray(mask, dtype=bool).reshape(len(ids), len(ids)).all(axis=0)
        start, end = _real_range(mask, len(ids))
        ids = list(ids[start:end])
        context = self._context_length(ids)
        positions[0, start:end] = np.arange(len(ids))
        # Where a text has both, `[MASK]` decides here and `[gMASK]` in the model, as published.
        mask_tokens = [token for token in (self.mask_token_id, self.gmask_token_id) if token in ids]
        if mask_tokens:
            positions[0, start + context : end] = ids.index(mask_tokens[0])
        positions[1, start + context : end] = np.arange(1, len(ids) - context + 1)
        return positions

    def _context_length(self, ids: Sequence[int]) -> int:
        start_id = self._control_ids(self.chat_format)["<sop>"]
        return list(ids).index(start_id) if start_id in ids else len(ids)

    def _control_ids(self, chat_format: ConversationFormat) -> dict[str, int]:
        tokens = self.vocabularies[chat_format.name].control_tokens
        return {token: self.sp_tokenizer[token] for token in tokens}

    def _special_ids(self, chat_format: ConversationFormat) -> dict[str, int]:
        return self._control_ids(chat_format)

    def _special_names(self) -> dict[int, str]:
        """What every special token of the vocabulary is called."""
        tokens = [*self.vocabulary.named_tokens.values(), self.end_token, *self.vocabulary.control_tokens]
        return {self.sp_tokenizer[token]: token for token in tokens}

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

    def _message_ids(self, text: str) -> list[int]:
        words = [token.content for token in self.added_tokens_decoder.values() if not token.special]
        words.sort(key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, words))})", text) if words else [text]
        ids: list[int] = []
        for part in parts:
            if part in words:
                ids.append(self._added_tokens_encoder[part])
            else:
                ids += self.sp_tokenizer.encode(self._preprocess(part))
        return ids

    def _message_encoding(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # Answers are segments of their own, so nobody asks where in the text an id comes from.
        ids = self._message_ids(text)
        return ids, [(0, 0)] * len(ids)

    def _text_decoder(
        self,
        skip_special_tokens: bool | None,
        chat_format: ConversationFormat,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> Callable[[Sequence[int]], str]:
        is_clean = clean_up_tokenization_spaces
        return partial(
            self._decode_ids,
            set(self.all_special_ids) if skip_special_tokens else set(),
            self._special_names() if skip_special_tokens is False else {},
            self.clean_up_tokenization_spaces if is_clean is None else is_clean,
        )

    def _decode_ids(
        self, skipped: Collection[int], names: Mapping[int, str], is_clean: bool, token_ids: Sequence[int]
    ) -> str:
        text = ""
        run: list[int] = []
        for index in token_ids:
            if index in names:
                text += self.sp_tokenizer.decode(run) + names[index]
                run = []
            elif 0 <= index < self.vocab_size and index not in skipped:
                run.append(index)
            elif index in self._added_tokens_decoder and index not in skipped:
                text += self.sp_tokenizer.decode(run) + self._added_tokens_decoder[index].content
                run = []
        text += self.sp_tokenizer.decode(run)
        return self.clean_up_tokenization(text) if is_clean else text

    def _is_settled(self, text: str, last_id: int, next_id: int) -> bool:
        # What is rewritten in a decoded text (pieces for white space, spaces that are cleaned up) is ASCII, begins with
        # a space or `<`, and ends before a space. Other characters, and words that a space follows, stay as they are.
        last, following = self.sp_tokenizer.plain_piece(last_id), self.sp_tokenizer.plain_piece(next_id)
        if last == "<n>" or not last[-1:].isascii():
            return last[-1:] != "▁"
        is_word = following[:1] == "▁" and following[1:2].isalnum()
        is_rewritten = following[:1].isascii() or following[:1] == "▁"
        return last[-1:].isalnum() and (is_word or not is_rewritten)


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
        pieces = self.text_tokenizer.id_to_piece(list(range(self.text_tokenizer.get_piece_size())))
        tokens = [f"<image_{index}>" for index in range(self.num_image_tokens)] + pieces
        return {token: index for index, token in enumerate(tokens)}

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, key: int | str) -> Any:
        """The token of an id (`""` if there is none), or the id of a token (that of `<unk>` if there is none)."""
        if isinstance(key, str):
            index = self.vocab.get(key)
            if index is None and (image := IMAGE_TOKEN.fullmatch(key)):
                index = self.vocab.get(f"<image_{image[1]}>")
            return self.num_image_tokens + self.text_tokenizer.unk_id() if index is None else index
        if 0 <= key < self.num_image_tokens:
            return f"<image_{key}>"
        if 0 <= key < self.num_tokens:
            return self.text_tokenizer.id_to_piece(key - self.num_image_tokens)
        return ""

    def plain_piece(self, token_id: int) -> str:
        """The piece of an id that stands for nothing but its characters, `""` for any other id."""
        index, model = token_id - self.num_image_tokens, self.text_tokenizer
        if not 0 <= index < model.get_piece_size():
            return ""
        is_other = model.is_control(index) or model.is_unknown(index) or model.is_byte(index) or model.is_unused(index)
        return "" if is_other else str(model.id_to_piece(index))

    def tokenize(self, text: str) -> list[str]:
        """Cut a text into pieces."""
        return self.text_tokenizer.encode(self._rewrite(text), out_type=str)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, without special tokens."""
        rewritten = [self._rewrite(text) for text in texts]
        # A batch starts threads, which one text does not need.
        encode = self.text_tokenizer.encode
        rows: list[list[int]] = encode(rewritten) if len(texts) > 1 else [encode(text) for text in rewritten]
        first = self.num_image_tokens
        return [[first + index for index in row] for row in rows] if first else rows

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
        check_text(text)
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        parts = BLANKS.split(text)
        parts[1::2] = map(PIECE_OF_BLANKS.__getitem__, parts[1::2])
        return "".join(parts)


def _real_range(mask: Any, length: int) -> tuple[int, int]:
    """Where the real tokens start and end, by a mask that has 1 for them."""
    real = np.arange(length) if mask is None else np.flatnonzero(mask)
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)


__all__ = ["ChatGLM6BTokenizer", "SPTokenizer"]
