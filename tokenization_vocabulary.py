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
"""A checkpoint's `tokenizer.model`, read into the Rust backend, and what a generation adds to it.

What is unusual here:

- `tokenizer.model` is a SentencePiece BPE with byte fallback (ChatGLM2, ChatGLM3) or a list of ranked byte strings
  (GLM-4). Both become a Rust BPE that gives the same ids for any text.
- Rust ranks pairs of neighbours, while both published formats rank what the pair becomes. So each token contributes one
  merge for each of its splits into two tokens, in the order of the published ranks.
"""

import re
from binascii import a2b_base64
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE


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

# How `tokenizer.json` begins: what stands before the added tokens is short, and the vocabulary comes behind them.
ADDED_TOKENS = re.compile(r'\s*\{\s*"version":.{,9999}?"added_tokens":\s*(?=\[)', re.DOTALL)
READ_CHARACTERS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a generation adds to its vocabulary file.

    Attributes:
        control_tokens: in the order of their ids. ChatGLM-6B's are pieces of the file; those of the others follow it.
        named_tokens: the library's named special tokens.
        pair_token: what closes the second text of a pair.
        silent_tokens: what gives no text when it is decoded, even where special tokens are not skipped.
        trainer_tokens: the control tokens that `encode_special_tokens=True` reads in a text.
        command_aliases: further names that `get_command` knows.
        own_setting: what the published tokenizer_config.json has in this generation alone, among those of its kind.
    """

    control_tokens: tuple[str, ...]
    named_tokens: Mapping[str, str]
    pair_token: str
    silent_tokens: tuple[str, ...] = ()
    trainer_tokens: tuple[str, ...] = ()
    command_aliases: Mapping[str, str] = field(default_factory=dict)
    own_setting: str | None = None


def list_merges(tokens: Iterable[str], known: Container[str]) -> list[tuple[str, str]]:
    """The pairs of known strings that each token is made of, in the order of the tokens."""
    merges = []
    for token in tokens:
        for index in range(1, len(token)):
            # Most beginnings are unknown; not to cut off their ends saves a quarter of a second for GLM-4.
            if (left := token[:index]) in known and (right := token[index:]) in known:
                merges.append((left, right))
    return merges


def bpe_from_sentencepiece(vocab_file: str, control_tokens: Sequence[str]) -> BPE:
    """Build the Rust BPE that encodes like a SentencePiece BPE model.

    SentencePiece merges the neighbours whose union is the piece of the highest score, the leftmost ones first.

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
    merges = list_merges(sorted(scores, key=scores.__getitem__, reverse=True), scores)
    vocab = {token: index for index, token in enumerate([*pieces, *control_tokens])}
    return BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def bpe_from_ranks(
    vocab_file: str, control_tokens: Sequence[str], more_tokens: Mapping[str, int] | None = None
) -> BPE:
    """Build the Rust BPE that encodes like a list of ranked byte strings.

    There the neighbours merge whose union has the lowest rank, the leftmost ones first, and a piece of text that is
    itself in the list is taken whole.

    Args:
        vocab_file: the `tokenizer.model`: on each line a string in base64 and its rank, which is its id.
        control_tokens: names that get the ids behind the strings. Nothing merges into them.
        more_tokens: further names, with their ids.

    Raises:
        ValueError: if the file is not such a list.
    """
    try:
        words = Path(vocab_file).read_bytes().split()
        lines = list(zip(words[0::2], words[1::2], strict=True))
        ranks = {a2b_base64(string, strict_mode=True): int(rank) for string, rank in lines}
    except ValueError as error:
        raise ValueError(f"{vocab_file} is not the vocabulary of GLM-4, a list of ranked strings: {error}") from error
    if sorted(ranks.values()) != list(range(len(lines))):
        raise ValueError(f"{vocab_file} is not a complete list of ranked strings: ranks are missing or occur twice.")
    tokens = {string.decode("latin-1").translate(CHARACTER_OF_BYTE): rank for string, rank in ranks.items()}
    merges = list_merges(sorted(tokens, key=tokens.__getitem__), tokens)
    vocab = tokens | {token: len(tokens) + index for index, token in enumerate(control_tokens)}
    return BPE({**(more_tokens or {}), **vocab}, merges, ignore_merges=True)


def read_added_tokens(tokenizer_file: Path) -> dict[int, dict[str, Any]] | None:
    """The added tokens of a `tokenizer.json` by their ids, without its vocabulary, which takes most of a load to read.

    Returns:
        The settings of each token as they stand there; None where the file does not begin as Rust writes it.
    """
    with tokenizer_file.open(encoding="utf-8") as file:
        head = file.read(READ_CHARACTERS)
        start = ADDED_TOKENS.match(head)
        while start is not None:
            try:
                tokens, _ = JSONDecoder().raw_decode(head, start.end())
                return {token.pop("id"): token for token in tokens}
            except JSONDecodeError:
                more = file.read(len(head))
                start, head = start if more else None, head + more
    return None


def sentencepiece_tokenizer(model: BPE) -> Tokenizer:
    """Put SentencePiece's treatment of spaces around the BPE of ChatGLM2 and ChatGLM3."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # For programs that decode with the Rust tokenizer itself; `ChatGLMTokenizer.decode` is the exact way.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def ranks_tokenizer(model: BPE) -> Tokenizer:
    """Put GLM-4's cutting of text and its bytes around the BPE of GLM-4."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GLM4_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


__all__ = [
    "Vocabulary",
    "BYTE_OF_CHARACTER",
    "bpe_from_ranks",
    "bpe_from_sentencepiece",
    "ranks_tokenizer",
    "read_added_tokens",
    "sentencepiece_tokenizer",
]
