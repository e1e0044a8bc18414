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
"""GLM-large, GLM-2B and GLM-10B: text to ids and back, in two vocabularies, and what a model is given to fill blanks.

What is unusual here:

- The Chinese checkpoints have a SentencePiece model, which stays with the `sentencepiece` package, as ChatGLM-6B's does;
  what it does not know is id 0. The English ones have GPT-2's byte-pair encoding, on the Rust backend.
- White space on both sides of a special token goes, as the library did it when these files were published. Whoever gives
  a token as an `AddedToken` that strips one side alone is obeyed: GLM's own training stripped the left of mask tokens.
- A text is `[CLS] text <|endoftext|>`. Padding is on the right, truncation on the left.
- There is no conversation and no pair of texts. `build_inputs_for_generation` and `build_inputs_for_multiple_choice` make
  what the model reads: positions in two rows, and a mask that says who sees whom.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers.tokenization_python import PythonBackend
from transformers.tokenization_utils_base import BatchEncoding, PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from .tokenization_conversation import take_extra_tokens


START, END = "<|startofpiece|>", "<|endofpiece|>"
BLANKS = ("[MASK]", "[sMASK]", "[gMASK]")
IGNORED = -100
# What the published files name, where they are silent.
NAMED_TOKENS = {
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "unk_token": "[UNK]",
}
SPECIAL_TOKENS = (START, END, "[gMASK]", "[sMASK]")


def searched_token(token: str | AddedToken, special: bool) -> AddedToken:
    """A token that text is searched for; white space around it goes, unless the token says on which side."""
    given = token if isinstance(token, AddedToken) else AddedToken(token)
    is_plain = not (given.lstrip or given.rstrip)
    return AddedToken(
        given.content,
        lstrip=given.lstrip or is_plain,
        rstrip=given.rstrip or is_plain,
        normalized=False,
        special=special,
    )


class GLMTokenizerMixin(PreTrainedTokenizerBase):
    """What the tokenizers of both vocabularies share. A class adds how its vocabulary is read, and pieces to text."""

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    truncation_side = "left"
    # Names of the ids behind the vocabulary, for folders that do not list them.
    tokens_behind: tuple[str, ...] = ()

    def _settings(self, kwargs: dict[str, Any], num_pieces: int) -> dict[int, AddedToken]:
        """Fill in what tokenizer_config.json leaves out, and take the added tokens, by id, out of it."""
        for name, token in NAMED_TOKENS.items():
            kwargs[name] = kwargs.get(name) or token
        kwargs["extra_special_tokens"] = list(dict.fromkeys((*SPECIAL_TOKENS, *take_extra_tokens(kwargs))))
        # The published classes rely on what was the library's default then.
        kwargs.setdefault("clean_up_tokenization_spaces", True)
        named = {str(kwargs[name]): kwargs[name] for name in NAMED_TOKENS}
        found: dict[int, AddedToken] = dict(kwargs.pop("added_tokens_decoder", None) or {})
        if not any(index >= num_pieces for index in found):
            found |= {num_pieces + index: AddedToken(token) for index, token in enumerate(self.tokens_behind) if token}
        special = {*named, *kwargs["extra_special_tokens"]}
        tokens = {index: named.get(token.content, token) for index, token in found.items()}
        return {index: searched_token(token, str(token) in special) for index, token in sorted(tokens.items())}

    def __call__(self, text: Any = None, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Encode texts. The arguments are the library's.

        Raises:
            ValueError: for a pair of texts, which GLM has no form for.
        """
        if text_pair is not None:
            raise ValueError("GLM has no form for a pair of texts: write both into one text, as its patterns do.")
        return super().__call__(text, *args, **kwargs)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs: Any,
    ) -> str:
        # A private hook (Transformers 5.17 to 5.23), the only place that sees every way of decoding.
        # As the library did it then: added tokens and the text between them are joined with spaces.
        dropped = {*self.all_special_ids} if skip_special_tokens else set()
        ids = [index for index in ([token_ids] if isinstance(token_ids, int) else token_ids) if index not in dropped]
        texts: list[str] = []
        for is_piece, run in groupby(ids, key=lambda index: index < self.vocab_size):
            texts += [self._pieces_to_text(list(run))] if is_piece else self.convert_ids_to_tokens(list(run))
        text = (" " if spaces_between_special_tokens else "").join(texts)
        cleans_up = clean_up_tokenization_spaces
        cleans_up = self.clean_up_tokenization_spaces if cleans_up is None else cleans_up
        return self.clean_up_tokenization(text) if cleans_up else text

    def _pieces_to_text(self, ids: list[int]) -> str:
        raise NotImplementedError

    @property
    def sop_token(self) -> str:
        """What an answer starts from."""
        return START

    @property
    def eop_token(self) -> str:
        """What an answer ends with."""
        return END

    @property
    def sop_token_id(self) -> int:
        """The id of `sop_token`."""
        return self.convert_tokens_to_ids(START)

    @property
    def eop_token_id(self) -> int:
        """The id of `eop_token`."""
        return self.convert_tokens_to_ids(END)

    @property
    def gmask_token_id(self) -> int:
        """The id of `[gMASK]`, a blank at the end of a document."""
        return self.convert_tokens_to_ids("[gMASK]")

    @property
    def smask_token_id(self) -> int:
        """The id of `[sMASK]`, a blank of whole sentences."""
        return self.convert_tokens_to_ids("[sMASK]")

    @property
    def mask_token_ids(self) -> list[int]:
        """The ids of all blanks."""
        return [self.convert_tokens_to_ids(token) for token in BLANKS]

    def stop_token_ids(self) -> list[int]:
        """What ends an answer."""
        return [self.eop_token_id, self.eos_token_id]

    def build_inputs_for_generation(
        self,
        model_input: Mapping[str, torch.Tensor],
        max_gen_length: int = 512,
        targets: Any = None,
        padding: bool = False,
    ) -> BatchEncoding:
        """What a model reads to fill the first blank of each row, or with `targets` to learn it.

        Args:
            model_input: `input_ids` and `attention_mask`, `[batch, context]`, as the tokenizer returns them.
            max_gen_length: the longest answer; targets are cut to it.
            targets: the answers, texts or ids, one for each row.
            padding: with targets, make all answers `max_gen_length` long instead of as long as the longest.

        Returns:
            `input_ids`, `[batch, context + 1]`, `position_ids`, `[batch, 2, whole]`, and `generation_attention_mask`,
            `[batch, 1, whole, whole]`, 1 = visible, where `whole` is the context and the longest answer. With targets
            `input_ids` and `labels`, -100 where nothing is learnt and not to be shifted, are `[batch, whole]`, and the
            mask is called `attention_mask`.

        Raises:
            ValueError: if a row has no blank.
        """
        context, mask, device = _read_context(model_input)
        columns = self._blank_columns(context, self.mask_token_ids)
        answers = None if targets is None else [self._answer_ids(one)[:max_gen_length] for one in _as_batch(targets)]
        if answers is not None and len(answers) != len(context):
            raise ValueError(f"Got {len(context)} rows and {len(answers)} targets; give one for each row.")
        length = max(map(len, answers)) if answers and not padding else max_gen_length
        position_ids = _positions(columns, context.shape[1], torch.arange(1, length + 1).expand(len(context), -1))
        visible = _make_mask(mask, torch.ones(length, length, dtype=mask.dtype).tril().expand(len(mask), -1, -1))
        start = torch.full((len(context), 1), self.sop_token_id)
        if answers is None:
            ids = torch.cat((context, start), dim=1)
            named = {"position_ids": position_ids, "generation_attention_mask": visible}
            return BatchEncoding({"input_ids": ids, **named}).to(device)
        padded = torch.tensor([[*one, *[self.pad_token_id] * (length - len(one))] for one in answers])
        labels = torch.tensor([[*one, *[IGNORED] * (length - len(one))] for one in answers])
        return BatchEncoding(
            {
                "input_ids": torch.cat((context, start, padded[:, :-1]), dim=1),
                "position_ids": position_ids,
                "attention_mask": visible,
                "labels": F.pad(labels, (context.shape[1], 0), value=IGNORED),
            }
        ).to(device)

    def build_inputs_for_multiple_choice(
        self, model_input: Mapping[str, torch.Tensor], choices: Sequence[Sequence[Any]], max_length: int | None = None
    ) -> BatchEncoding:
        """What a model reads to score several answers to the `[MASK]` of each row: they do not see each other.

        Args:
            model_input: `input_ids` and `attention_mask`, `[batch, context]`, as the tokenizer returns them.
            choices: for each row its answers, texts or ids.
            max_length: answers are cut to it.

        Returns:
            `input_ids`, `[batch, whole]`, `position_ids`, `[batch, 2, whole]`, `attention_mask`,
            `[batch, 1, whole, whole]`, 1 = visible, and for each row and choice the ids (`choice_ids`) and the columns
            where they are predicted (`choice_indices`). Rows are padded on the right with id 0.

        Raises:
            ValueError: if a row has no `[MASK]`, or no choices, or an empty one.
        """
        context, mask, device = _read_context(model_input)
        if len(choices) != len(context) or not all(choices):
            raise ValueError(f"Give at least one choice for each of {len(context)} rows, got {[*map(len, choices)]}.")
        if not all(len(answer) for answers in choices for answer in answers):
            raise ValueError("A choice has no text, so nothing tells how likely it is.")
        columns = self._blank_columns(context, [self.mask_token_id])
        length = context.shape[1]
        rows: list[tuple[torch.Tensor, ...]] = []
        choice_ids, choice_indices = [], []
        for index, answers in enumerate(choices):
            ids = [torch.tensor(self._text_ids(answer)[:max_length], dtype=torch.long) for answer in answers]
            blocks = torch.cat([torch.arange(1, len(one) + 1) for one in ids])
            starts = [length + sum(map(len, ids[:number])) for number in range(len(ids))]
            fed = [F.pad(one[:-1], (1, 0), value=self.sop_token_id) for one in ids]
            visible = torch.block_diag(*(torch.ones(len(one), len(one)).tril() for one in ids)).to(mask.dtype)
            rows.append(
                (
                    torch.cat((context[index], *fed)),
                    _positions(columns[index : index + 1], length, blocks[None])[0],
                    _make_mask(mask[index : index + 1], visible[None])[0, 0],
                )
            )
            choice_ids.append(ids)
            choice_indices.append([torch.arange(start, start + len(one)) for start, one in zip(starts, ids)])
        whole = max(len(ids) for ids, _, _ in rows)
        padding = [whole - len(ids) for ids, _, _ in rows]
        named = [
            torch.stack([F.pad(row[0], (0, more)) for row, more in zip(rows, padding)]),
            # Positions of padding repeat those of the last column.
            torch.stack([torch.cat((row[1], row[1][:, -1:].expand(-1, n)), 1) for row, n in zip(rows, padding)]),
            torch.stack([F.pad(row[2], (0, more, 0, more)) for row, more in zip(rows, padding)])[:, None],
        ]
        tensors = dict(zip(("input_ids", "position_ids", "attention_mask"), named))
        return BatchEncoding({**tensors, "choice_ids": choice_ids, "choice_indices": choice_indices}).to(device)

    def _blank_columns(self, ids: torch.Tensor, blank_ids: list[int]) -> torch.Tensor:
        """Where the first blank of each row stands, `[batch]`."""
        is_blank = torch.isin(ids, torch.tensor(blank_ids))
        if not is_blank.any(-1).all():
            names = ", ".join(self.convert_ids_to_tokens(blank_ids))
            row = is_blank.any(-1).int().argmin().item()
            raise ValueError(f"Row {row} has no blank to fill: write one of {names} into the text.")
        return is_blank.int().argmax(-1)

    def _text_ids(self, text: Any) -> list[int]:
        return self.encode(text, add_special_tokens=False) if isinstance(text, str) else list(text)

    def _answer_ids(self, text: Any) -> list[int]:
        return [*self._text_ids(text), self.eop_token_id]


def _read_context(model_input: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.device]:
    """Ids and mask, each `[batch, context]`, on the CPU, where the rest is built, and the device they came from."""
    ids, mask = torch.as_tensor(model_input["input_ids"]), torch.as_tensor(model_input["attention_mask"])
    return ids.cpu(), mask.cpu(), ids.device


def _as_batch(targets: Any) -> list[Any]:
    """Answers as a list: one text, or the ids of one, stand for a batch of one."""
    is_one = isinstance(targets, str) or (len(targets) > 0 and isinstance(targets[0], int))
    return [targets] if is_one else list(targets)


def _positions(columns: torch.Tensor, context_length: int, blocks: torch.Tensor) -> torch.Tensor:
    """Both rows of positions, `[batch, 2, whole]`: the context counts, and answers stand at their blank and count on.

    Args:
        columns: of the blank, `[batch]`.
        context_length: padding counts too.
        blocks: positions in the answer, `[batch, answer]`.
    """
    counted = torch.arange(context_length).expand(len(columns), -1)
    first = torch.cat((counted, columns[:, None].expand(-1, blocks.shape[1])), dim=1)
    return torch.stack((first, F.pad(blocks, (context_length, 0))), dim=1)


def _make_mask(context_mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The whole mask, `[batch, 1, whole, whole]`: every query sees the real context, and no context an answer.

    Args:
        context_mask: `[batch, context]`, 1 for real tokens.
        visible: `[batch, answer, answer]`, 1 = visible.
    """
    length = context_mask.shape[1]
    whole = length + visible.shape[1]
    seen = context_mask[:, None].expand(-1, whole, -1)
    return torch.cat((seen, F.pad(visible, (0, 0, length, 0))), dim=2)[:, None]


class GLMChineseTokenizer(GLMTokenizerMixin, PythonBackend):
    """
    Tokenizer of glm-large-chinese and glm-10b-chinese, with the ids of the published one.

    Args:
        vocab_file (`str`):
            Path of `cog-pretrain.model`.
    """

    vocab_files_names = {"vocab_file": "cog-pretrain.model"}
    tokens_behind = (
        *("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]"),
        *(START, END, "[sMASK]", "[gMASK]"),
    )

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        if vocab_file is None:
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'The folder'} holds no `cog-pretrain.model`. Copy it from the published "
                "checkpoint; the tokenizer is made from it."
            )
        self.vocab_file = vocab_file
        self.sp_model = SentencePieceProcessor()
        self.sp_model.Load(vocab_file)
        self._vocab = {self.sp_model.IdToPiece(index): index for index in range(len(self.sp_model))}
        tokens = self._settings(kwargs, len(self._vocab))
        # Its name in text stands for what the vocabulary does not know.
        tokens[self.sp_model.unk_id()] = searched_token(kwargs["unk_token"], special=True)
        super().__init__(added_tokens_decoder=tokens, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sp_model": self.sp_model.serialized_model_proto()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sp_model = SentencePieceProcessor(model_proto=state["sp_model"])

    @property
    def vocab_size(self) -> int:
        """The number of ids without added tokens."""
        return len(self._vocab)

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return self._vocab | {token: i for token, i in self._added_tokens_encoder.items() if i >= len(self._vocab)}

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[CLS] text <|endoftext|>`."""
        if token_ids_1 is not None:
            raise ValueError("GLM has no form for a pair of texts: write both into one text, as its patterns do.")
        return [self.cls_token_id, *token_ids_0, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mark what `build_inputs_with_special_tokens` adds, or the special tokens among ids that have them."""
        if already_has_special_tokens:
            return [int(index in self.all_special_ids) for index in token_ids_0]
        return [1, *[0] * len(token_ids_0), 1]

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `cog-pretrain.model`."""
        name = self.vocab_files_names["vocab_file"]
        file = Path(save_directory) / (f"{filename_prefix}-{name}" if filename_prefix else name)
        file.write_bytes(self.sp_model.serialized_model_proto())
        return (str(file),)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.sp_model.EncodeAsPieces(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.PieceToId(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.IdToPiece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces into the text they stand for."""
        return self.sp_model.decode(tokens)

    def _pieces_to_text(self, ids: list[int]) -> str:
        return self.sp_model.decode(ids)


class GLMGPT2Tokenizer(GLMTokenizerMixin, TokenizersBackend):
    """
    Tokenizer of glm-2b, glm-10b and glm-large, with the ids of the published one.

    Args:
        vocab_file, merges_file (`str`):
            Paths of `vocab.json` and `merges.txt`.
        tokenizer_file (`str`, *optional*):
            Path of a `tokenizer.json` that this class saved; used where the others are missing.
    """

    vocab_files_names = {
        "vocab_file": "vocab.json",
        "merges_file": "merges.txt",
        "tokenizer_file": "tokenizer.json",
    }
    model = BPE
    tokens_behind = (START, END, "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]")

    def __init__(
        self,
        vocab_file: str | None = None,
        merges_file: str | None = None,
        tokenizer_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        if vocab_file is not None and merges_file is not None:
            model = BPE.from_file(vocab_file, merges_file)
        elif tokenizer_file is not None:
            model = Tokenizer.from_file(str(tokenizer_file)).model
        else:
            raise ValueError(
                f"{kwargs.get('name_or_path') or 'The folder'} holds no `vocab.json` and `merges.txt`. Copy them from "
                "the published checkpoint; the tokenizer is made from them."
            )
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        kwargs["unk_token"] = kwargs.get("unk_token") or "<|endoftext|>"
        for index, token in self._settings(kwargs, self._tokenizer.get_vocab_size()).items():
            self._tokenizer.add_tokens([token])
            if (found := self._tokenizer.token_to_id(token.content)) != index:
                raise ValueError(f"The id of {token.content!r} would be {found}, and the folder's files say {index}.")
        super().__init__(vocab_file=vocab_file, merges_file=merges_file, **kwargs)
        self.update_post_processor()

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to `__init__`."""
        return kwargs

    def update_post_processor(self) -> None:
        """`[CLS] text <|endoftext|>`."""
        tokens = (self.cls_token, self.eos_token)
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[0]}:0 $A:0 {tokens[1]}:0",
            special_tokens=[(token, self._tokenizer.token_to_id(token)) for token in tokens],
        )

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Cut a text into the names of tokens, without the white space that special ones took with them."""
        encoded = self(text, pair, add_special_tokens=add_special_tokens, **kwargs)
        return self.convert_ids_to_tokens(encoded["input_ids"])

    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write `vocab.json` and `merges.txt`."""
        return tuple(self._tokenizer.model.save(str(save_directory), filename_prefix))

    def _pieces_to_text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


__all__ = ["GLMChineseTokenizer", "GLMGPT2Tokenizer"]
