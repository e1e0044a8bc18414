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
"""What is GLM's objective? Autoregressive blank infilling: cutting out spans, and the rows that a model learns from.

Spans of a text are replaced by mask tokens and written one after the other behind it (Du et al., "GLM: General Language
Model Pretraining with Autoregressive Blank Infilling", ACL 2022; Zeng et al., "GLM-130B", ICLR 2023). The text with its
blanks, Part A, is read both ways; the spans, Part B, from left to right.

What is unusual here:

- A token has two positions. In Part A the first counts and the second is 0; in Part B the first is that of the mask
  token, and the second counts from 1 in every span.
- Spans come in random order and see the spans before them, so that later ones may depend on earlier ones.
- What is drawn for a batch depends on a seed and on what is in the batch, and on nothing else: it is the same in any
  process, in any worker, and after a run was resumed.
- Labels of GLM and GLM-130B are aligned with the inputs: `<sop>` stands where the first token of a span is predicted.
  Labels of ChatGLM-6B are shifted by the library.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn


IGNORED = -100
# The longest span, and the characters that end a sentence in the published sampler.
MAX_SPAN_LENGTH = 39
SENTENCE_ENDS = ".?!;:。？！；…\n"
# Pieces of short sequences are this long at least.
MIN_SHORT_LENGTH = 32

Span = tuple[int, int]


@dataclass(frozen=True)
class BlankObjective:
    """What is cut out of a text, and how often. The defaults are those of GLM-base and GLM-large."""

    # Shares of batches that lose short spans or whole sentences; the others lose one long piece of a document.
    token_share: float = 1.0
    sentence_share: float = 0.0
    # Share of batches that lose one short span for each text.
    single_span_share: float = 0.0
    # How much of a text short spans and sentences are, and the mean of the Poisson distribution of short spans' lengths.
    masked_share: float = 0.15
    mean_span_length: float = 3.0
    # The shortest long piece, as a share of its text, and how often it goes to the end of the text.
    shortest_document_share: float = 0.25
    prefix_share: float = 0.5
    # Share of the tokens of short spans that the model does not get to see when it predicts the next ones.
    hidden_share: float = 0.0
    # Share of batches that are cut into shorter texts.
    short_share: float = 0.0
    # Whether sentences and documents have mask tokens of their own.
    has_task_masks: bool = True
    shuffles_spans: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_share") and not 0 <= value <= 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {value}.")
        if self.token_share + self.sentence_share > 1:
            raise ValueError(f"Shares of batches add up to more than 1: {self.token_share} + {self.sentence_share}.")
        if self.mean_span_length <= 0:
            raise ValueError(f"`mean_span_length` must be more than 0, got {self.mean_span_length}.")

    @property
    def length_weights(self) -> list[float]:
        """Weights of the lengths 1, 2, ...: a Poisson distribution without 0."""
        mean = self.mean_span_length
        return [math.exp(-mean) * mean**k / math.factorial(k) for k in range(1, MAX_SPAN_LENGTH + 1)]


# The published mixtures; GLM-130B's is that of its paper, section 2.2.
OBJECTIVES = {
    "glm-large": BlankObjective(has_task_masks=False),
    "glm-roberta-large": BlankObjective(),
    "glm-large-chinese": BlankObjective(token_share=0.4, sentence_share=0.3, hidden_share=0.1, short_share=0.02),
    "glm-10b": BlankObjective(token_share=0.5, sentence_share=0.3, hidden_share=0.1, short_share=0.02),
    "glm-10b-second-stage": BlankObjective(
        token_share=0.4, sentence_share=0.3, single_span_share=0.05, hidden_share=0.1, short_share=0.5
    ),
    "glm-130b": BlankObjective(token_share=0.3, shortest_document_share=0.0, prefix_share=1.0),
    # ChatGLM-6B's own is not published. It answers one blank, short or long.
    "chatglm-6b": BlankObjective(
        token_share=0.0, single_span_share=0.3, shortest_document_share=0.0, prefix_share=1.0
    ),
}


def find_token(tokenizer: Any, *names: str) -> int | None:
    """The id of the first of these tokens that a tokenizer has."""
    for name in names:
        index = tokenizer.convert_tokens_to_ids(name)
        if index is not None and tokenizer.convert_ids_to_tokens(index) == name:
            return index
    return None


@dataclass(frozen=True)
class BlankTokens:
    """The ids that the objective needs of a vocabulary."""

    start_of_piece: int
    end_of_piece: int
    mask: int
    sentence_mask: int
    document_mask: int
    # What a document begins and ends with, where it does.
    start_of_text: int | None = None
    end_of_text: int | None = None
    # What stands for hidden tokens (`[dBLOCK]`).
    hidden: int | None = None
    pad: int = 0
    sentence_ends: frozenset[int] = field(default_factory=frozenset, repr=False)

    @classmethod
    def of(cls, tokenizer: Any, hidden: int | None = None) -> "BlankTokens":
        """Find them in a tokenizer of GLM, GLM-130B or ChatGLM-6B; `hidden` has no name in most of them.

        Raises:
            ValueError: if it has no mask token or no token that starts a piece.
        """
        start, end = (
            find_token(tokenizer, "<|startofpiece|>", "<sop>"),
            find_token(tokenizer, "<|endofpiece|>", "<eop>"),
        )
        mask, document_mask = find_token(tokenizer, "[MASK]"), find_token(tokenizer, "[gMASK]")
        if start is None or end is None or mask is None or document_mask is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no tokens for blanks: [MASK], [gMASK] and those of pieces."
            )
        # CODEPATH: glm-large to glm-10b begin a text with `[CLS]` and end it with `<|endoftext|>`; the others do neither.
        first, sentence_mask = find_token(tokenizer, "[CLS]"), find_token(tokenizer, "[sMASK]")
        return cls(
            start_of_piece=start,
            end_of_piece=end,
            mask=mask,
            sentence_mask=mask if sentence_mask is None else sentence_mask,
            document_mask=document_mask,
            start_of_text=first,
            end_of_text=None if first is None else find_token(tokenizer, "<|endoftext|>"),
            hidden=hidden,
            pad=tokenizer.pad_token_id or 0,
            sentence_ends=frozenset(
                index
                for token, index in tokenizer.get_vocab().items()
                # `<n>` and `Ċ` are new lines in SentencePiece and in GPT-2's bytes.
                if token in ("<n>", "Ċ") or (index != first and any(mark in token for mark in SENTENCE_ENDS))
            ),
        )


@dataclass(frozen=True)
class BlankSample:
    """One text with blanks and their answers. Everything but `num_context` has one entry for each input token."""

    input_ids: list[int]
    # What each position predicts, and whether that counts.
    targets: list[int]
    is_learnt: list[int]
    # Position in the text, and in the span.
    positions: list[int]
    block_positions: list[int]
    # Tokens of Part A, which see each other both ways.
    num_context: int


def make_sample(
    tokens: Sequence[int], spans: Sequence[Span], mask_id: int, ids: BlankTokens, counts_blocks: bool = True
) -> BlankSample:
    """Cut spans out of a text and write them behind it.

    Args:
        tokens: of the text.
        spans: (start, end) of each, in the order in which they are to be written; they do not overlap.
        mask_id: what stands in their place.
        counts_blocks: whether positions count within a span; otherwise they are all 1.

    Raises:
        ValueError: for spans that overlap, reach beyond the text, or hold the end of a text.
    """
    in_text = sorted(spans)
    if any(start < before[1] for before, (start, _) in zip(in_text, in_text[1:])) or any(
        not 0 <= start < end <= len(tokens) for start, end in in_text
    ):
        raise ValueError(f"Spans must not overlap and lie within the {len(tokens)} tokens of the text, got {in_text}.")
    context: list[int] = []
    mask_position, last = {}, 0
    for start, end in in_text:
        context += tokens[last:start]
        mask_position[start] = len(context)
        context.append(mask_id)
        last = end
    context += tokens[last:]
    sample = BlankSample(
        context, list(context), [0] * len(context), list(range(len(context))), [0] * len(context), len(context)
    )
    for start, end in spans:
        piece = list(tokens[start:end])
        if ids.end_of_text is not None and ids.end_of_text in piece:
            raise ValueError(f"The span {(start, end)} holds the end of a text.")
        count = len(piece) + 1
        sample.input_ids.extend([ids.start_of_piece, *piece])
        sample.targets.extend([*piece, ids.end_of_piece])
        sample.is_learnt.extend([1] * count)
        sample.positions.extend([mask_position[start]] * count)
        sample.block_positions.extend(range(1, count + 1) if counts_blocks else [1] * count)
    return sample


def make_prefix_sample(
    tokens: Sequence[int], num_masked: int, ids: BlankTokens, has_task_masks: bool = True
) -> BlankSample:
    """Cut the last tokens off a text and write them behind the rest, without an end of piece of their own.

    A text that does not end with a token of its own gets the end of piece. Starts of later documents are not learnt.

    Raises:
        ValueError: if nothing is left or nothing is cut off.
    """
    if not 0 < num_masked < len(tokens):
        raise ValueError(f"Of {len(tokens)} tokens, {num_masked} cannot be cut off with something left.")
    cut = len(tokens) - num_masked
    context = [*tokens[:cut], ids.document_mask if has_task_masks else ids.mask]
    rest = list(tokens[cut:]) + ([ids.end_of_piece] if ids.end_of_text is None else [])
    return BlankSample(
        input_ids=[*context, ids.start_of_piece, *rest[:-1]],
        targets=[*context, *rest],
        is_learnt=[0] * len(context) + [int(token != ids.start_of_text) for token in rest],
        positions=[*range(len(context)), *[cut] * len(rest)],
        block_positions=[0] * len(context) + list(range(1, len(rest) + 1)),
        num_context=len(context),
    )


def hide_inputs(sample: BlankSample, indices: Sequence[int], ids: BlankTokens) -> BlankSample:
    """Replace inputs of Part B by the token that hides them; what is to be predicted stays."""
    input_ids = list(sample.input_ids)
    for index in indices:
        if ids.hidden is None or index < sample.num_context or input_ids[index] == ids.start_of_piece:
            raise ValueError(
                f"The input {index} cannot be hidden: {'no token hides' if ids.hidden is None else 'it is none of a span'}."
            )
        input_ids[index] = ids.hidden
    return replace(sample, input_ids=input_ids)


def maskable_ranges(tokens: Sequence[int], ids: BlankTokens) -> list[Span]:
    """(offset, length) of what may be cut out of each document: all but its own start and end, and the last token."""
    ranges, start = [], 0
    for index, token in enumerate(tokens):
        is_last = index == len(tokens) - 1
        if token == ids.end_of_text or is_last:
            first = start + (tokens[start] == ids.start_of_text)
            if index > first:
                ranges.append((first, index - first))
            start = index + 1
    return ranges


def share_lengths(
    ranges: Sequence[Span], lengths: Sequence[int], masked_share: float
) -> tuple[list[tuple[Span, list[int]]], int]:
    """Give lengths of spans to documents, the shortest first; the longest document takes what is left.

    Returns:
        The lengths for each document that got some, and how many were given away.
    """
    given, taken = [], 0
    by_length = sorted(ranges, key=lambda one: one[1])
    for index, (offset, length) in enumerate(by_length):
        own: list[int] = []
        is_longest = index == len(by_length) - 1
        room = length if is_longest else int(length * masked_share)
        while taken < len(lengths) and sum(own) + lengths[taken] + (len(own) if is_longest else 0) <= room:
            own.append(lengths[taken])
            taken += 1
        if own:
            given.append(((offset, length), own))
    return given, taken


def place_spans(lengths: Sequence[int], places: Sequence[int], offset: int) -> list[Span]:
    """Spans from sorted places: how many tokens stand before each, besides earlier spans and one token behind each."""
    spans, start = [], offset
    for length, place, before in zip(lengths, places, [0, *places]):
        start += place - before
        spans.append((start, start + length))
        start += length + 1
    return spans


def draw_places(lengths: Sequence[int], total: int, rng: random.Random) -> list[int]:
    """Sorted places for spans in a range of `total` tokens, so that no two spans touch."""
    most = total - sum(lengths) - len(lengths) + 1
    return sorted(rng.randint(0, most) for _ in lengths)


def draw_token_spans(
    tokens: Sequence[int], rng: random.Random, objective: BlankObjective, ids: BlankTokens, is_single: bool = False
) -> list[Span] | None:
    """Short spans of a text from left to right within its documents; `None` if they do not fit."""
    wanted = int(objective.masked_share * len(tokens))
    weights, every = objective.length_weights, range(1, MAX_SPAN_LENGTH + 1)
    lengths = rng.choices(every, weights)
    while not is_single and sum(lengths) < wanted:
        lengths += rng.choices(every, weights)
    rng.shuffle(lengths)
    given, num_given = share_lengths(maskable_ranges(tokens, ids), lengths, objective.masked_share)
    if num_given < len(lengths):
        return None
    return [span for (offset, total), own in given for span in place_spans(own, draw_places(own, total, rng), offset)]


def find_sentences(tokens: Sequence[int], ids: BlankTokens) -> list[Span]:
    """Sentences of a text; what an end of text cuts off is none, what the end of the sequence cuts off is."""
    sentences, start = [], 0
    for index, token in enumerate(tokens):
        if token == ids.start_of_text or token == ids.end_of_text:
            start = index + 1
        elif token in ids.sentence_ends:
            sentences.append((start, index + 1))
            start = index + 1
    if start < len(tokens):
        sentences.append((start, len(tokens)))
    return sentences


def draw_sentence_spans(
    tokens: Sequence[int], rng: random.Random, objective: BlankObjective, ids: BlankTokens
) -> list[Span] | None:
    """Sentences of a text in random order, as many as make up the share that is masked; `None` if there are none."""
    sentences = find_sentences(tokens, ids)
    rng.shuffle(sentences)
    chosen: list[Span] = []
    while sentences and sum(end - start for start, end in chosen) < int(objective.masked_share * len(tokens)):
        chosen.append(sentences.pop())
    return chosen or None


def draw_document_sample(
    tokens: Sequence[int], num_masked: int, rng: random.Random, objective: BlankObjective, ids: BlankTokens
) -> BlankSample | None:
    """One long piece, at the end of a text or anywhere in its only document; `None` if it does not fit."""
    is_prefix = tokens.count(ids.start_of_text) > 1 or rng.random() < objective.prefix_share
    if is_prefix:
        return make_prefix_sample(tokens, num_masked, ids, objective.has_task_masks)
    ranges = maskable_ranges(tokens, ids)
    longest = max(ranges, key=lambda one: one[1], default=(0, 0))
    if num_masked > longest[1]:
        return None
    spans = place_spans([num_masked], draw_places([num_masked], longest[1], rng), longest[0])
    return make_sample(tokens, spans, ids.document_mask if objective.has_task_masks else ids.mask, ids)


def draw_spans_sample(
    tokens: Sequence[int], task: str, rng: random.Random, objective: BlankObjective, ids: BlankTokens
) -> BlankSample | None:
    """Short spans (`"token"`, `"single"`) or sentences (`"sentence"`) of one text; `None` if they do not fit."""
    if task == "sentence":
        spans = draw_sentence_spans(tokens, rng, objective, ids)
    else:
        spans = draw_token_spans(tokens, rng, objective, ids, is_single=task == "single")
    if not spans:
        return None
    if objective.shuffles_spans:
        rng.shuffle(spans)
    else:
        spans.sort()
    is_sentence = task == "sentence" and objective.has_task_masks
    sample = make_sample(tokens, spans, ids.sentence_mask if is_sentence else ids.mask, ids)
    if objective.hidden_share == 0 or task == "sentence" or ids.hidden is None:
        return sample
    inputs = range(sample.num_context, len(sample.input_ids))
    chosen = [index for index in inputs if sample.block_positions[index] > 1 and rng.random() < objective.hidden_share]
    return hide_inputs(sample, chosen, ids)


def draw_task(rng: random.Random, objective: BlankObjective) -> str:
    """What a batch is for: `"single"`, `"token"`, `"sentence"` or `"document"`."""
    if rng.random() < objective.single_span_share:
        return "single"
    number = rng.random()
    if number < objective.token_share:
        return "token"
    return "sentence" if number < objective.token_share + objective.sentence_share else "document"


def draw_samples(
    batch: Sequence[Sequence[int]], rng: random.Random, objective: BlankObjective, ids: BlankTokens
) -> list[BlankSample]:
    """Blanks for a batch of texts, all for the same task; texts in which they do not fit are left out."""
    task = draw_task(rng, objective)
    if task != "document":
        samples = [draw_spans_sample(tokens, task, rng, objective, ids) for tokens in batch]
        return [sample for sample in samples if sample is not None]
    lengths = [len(tokens) for tokens in batch]
    shortest = max(1, int(objective.shortest_document_share * min(lengths)))
    num_masked = rng.randint(shortest, max(shortest, max(lengths) - 2))
    drawn = [draw_document_sample(tokens, min(num_masked, len(tokens) - 2), rng, objective, ids) for tokens in batch]
    return [sample for sample in drawn if sample is not None]


def cut_short(
    batch: Sequence[Sequence[int]], max_length: int, rng: random.Random, ids: BlankTokens
) -> list[list[int]]:
    """Cut texts into shorter ones, which begin and end with a sentence where they can."""
    if max_length <= MIN_SHORT_LENGTH + 2:
        return [list(tokens) for tokens in batch]
    length = rng.randint(MIN_SHORT_LENGTH, max_length - 2)
    boundaries = ids.sentence_ends | {ids.end_of_text}
    pieces = []
    for tokens in batch:
        has_start = tokens[0] == ids.start_of_text
        body = list(tokens[has_start:])
        for _ in range((max_length - 1) // length):
            start = rng.randrange(len(body) - length) if len(body) > length else 0
            while start > 0 and (body[start - 1] not in boundaries or body[start] == ids.end_of_text):
                start -= 1
            end = min(start + length, len(body))
            while end > start and end < len(body) and body[end - 1] not in boundaries:
                end -= 1
            if end - start < length // 2:
                end = min(start + length, len(body))
            pieces.append([*tokens[:has_start], *body[start:end]])
    return pieces


@dataclass(frozen=True)
class BlankFormat:
    """In which form a generation reads a row. The defaults are those of GLM-large to GLM-10B."""

    # Labels are those of the next token, which the library's loss shifts; otherwise they are aligned with the inputs.
    shifts_labels: bool = False
    # Whether the second row of positions, that in the span, is there; where it is not, positions of an answer to `[gMASK]`
    # count on.
    has_block_positions: bool = True
    # A mask of rows with one sample each is 1 for real tokens; otherwise it is how many tokens see each other both ways.
    masks_padding: bool = False

    @classmethod
    def of(cls, config: Any) -> "BlankFormat":
        """Find it in the configuration of a model.

        Raises:
            ValueError: for a generation that knows no blanks.
        """
        if not config.is_bidirectional:
            raise ValueError(f"{config.model_version} reads from left to right, and was never taught to fill blanks.")
        return cls(not config.aligned_labels, config.has_block_positions, not config.mask_tells_who_sees_whom)


def see_each_other(sample_index: torch.Tensor, is_context: torch.Tensor) -> torch.Tensor:
    """The mask of rows with several samples: bytes `[rows, 1, seq, seq]`, 1 where a query (second to last) sees a key.

    Args:
        sample_index: `[rows, seq]`, which sample of its row a token belongs to, -1 for padding.
        is_context: `[rows, seq]`, whether it is in Part A.
    """
    length = sample_index.shape[1]
    # Narrow numbers: the mask is the largest tensor of a batch.
    sample_index = sample_index.to(torch.int16)
    is_same = sample_index[:, :, None] == sample_index[:, None, :]
    is_earlier = torch.ones(length, length, dtype=torch.bool).tril()
    return is_same.logical_and_(is_context[:, None, :] | is_earlier)[:, None].view(torch.uint8)


def lay_out(sample: BlankSample, form: BlankFormat, ids: BlankTokens) -> dict[str, list[int]]:
    """A sample as columns of a row, in the form of a generation; see [`BlankInfillingCollator`]."""
    labels = [target if counts else IGNORED for target, counts in zip(sample.targets, sample.is_learnt)]
    input_ids, positions, blocks = list(sample.input_ids), list(sample.positions), list(sample.block_positions)
    # CODEPATH: glm-130b, whose answers to `[gMASK]` count on; one span is all that they have.
    if not form.has_block_positions and ids.document_mask in input_ids[: sample.num_context]:
        positions = list(range(len(positions)))
    # CODEPATH: chatglm-6b, whose labels the library shifts: the last token is there to be predicted.
    if form.shifts_labels:
        labels = [IGNORED, *labels]
        input_ids.append(sample.targets[-1])
        positions.append(positions[-1] + int(positions[-1] != positions[-2]))
        blocks.append(blocks[-1] + 1)
    return {"input_ids": input_ids, "labels": labels, "positions": positions, "blocks": blocks}


@dataclass
class BlankInfillingCollator:
    """Makes batches with blanks of texts, for `Trainer`.

    A row of the data set has the `input_ids` of a text, with what its generation begins and ends texts with, and may
    have a `number` (see [`number_rows`]). What is cut out depends on `seed` and on the rows of the batch alone.

    A batch has `input_ids`, `labels` `[rows, seq]`, `position_ids` `[rows, 2, seq]` (GLM-130B `[rows, seq]`) and
    `attention_mask`: the number of tokens in Part A `[rows]` (GLM), 1 for real tokens `[rows, seq]` (ChatGLM-6B), or, with
    `row_length`, a whole mask `[rows, 1, seq, seq]`.

    Args:
        tokens: the ids; `BlankTokens.of(tokenizer)`.
        objective: what is cut out.
        form: `BlankFormat.of(model.config)`.
        seed: of everything that is drawn.
        row_length: put as many samples into a row as this many tokens hold, and pad to it. No sample sees another one.
        max_length: of a text, from which the lengths of shorter ones are drawn; by default the longest of the batch.
        pad_to_multiple_of: for rows of one sample each.
    """

    tokens: BlankTokens
    objective: BlankObjective = field(default_factory=BlankObjective)
    form: BlankFormat = field(default_factory=BlankFormat)
    seed: int = 0
    row_length: int | None = None
    max_length: int | None = None
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Draw blanks for a batch of texts and make tensors of them.

        Raises:
            ValueError: for texts of fewer than three tokens, or samples longer than `row_length`.
        """
        rng = self.make_generator(rows)
        return self.make_tensors(self.draw([list(row["input_ids"]) for row in rows], rng))

    def make_generator(self, rows: Sequence[dict[str, Any]]) -> random.Random:
        """What everything in a batch is drawn from."""
        digest = hashlib.blake2b(str(self.seed).encode(), digest_size=16)
        for row in rows:
            digest.update(repr((row.get("number"), list(row["input_ids"]))).encode())
        return random.Random(digest.digest())

    def draw(self, texts: Sequence[list[int]], rng: random.Random) -> list[BlankSample]:
        """Draw blanks until at least one text has some; texts in which they do not fit are left out."""
        if not texts or min(map(len, texts)) < 3:
            raise ValueError(f"Texts must have three tokens at least, got lengths {sorted(map(len, texts))[:3]}.")
        if rng.random() < self.objective.short_share:
            texts = cut_short(texts, self.max_length or max(map(len, texts)), rng, self.tokens)
            texts = [text for text in texts if len(text) >= 3]
        for _ in range(100):
            if samples := draw_samples(texts, rng, self.objective, self.tokens):
                return samples
        raise ValueError(f"No blank fits into texts of {sorted(map(len, texts))} tokens; use longer ones.")

    def make_tensors(self, samples: Sequence[BlankSample]) -> dict[str, torch.Tensor]:
        """Put samples into rows; see the class."""
        columns = [lay_out(sample, self.form, self.tokens) for sample in samples]
        groups = self.share_rows([len(column["input_ids"]) for column in columns])
        if self.row_length is None:
            multiple = self.pad_to_multiple_of
            length = -(-max(len(column["input_ids"]) for column in columns) // multiple) * multiple
        else:
            length = self.row_length

        def join(name: str, padding: int) -> torch.Tensor:
            rows = [[value for index in group for value in columns[index][name]] for group in groups]
            return torch.tensor([row + [padding] * (length - len(row)) for row in rows])

        positions = join("positions", 0)
        if self.form.has_block_positions:
            positions = torch.stack((positions, join("blocks", 0)), dim=1)
        batch = {
            "input_ids": join("input_ids", self.tokens.pad),
            "labels": join("labels", IGNORED),
            "position_ids": positions,
        }
        if self.row_length is not None:
            for place, column in enumerate(columns):
                width = len(column["input_ids"])
                column["sample"] = [place] * width
                column["context"] = [1] * samples[place].num_context + [0] * (width - samples[place].num_context)
            batch["attention_mask"] = see_each_other(join("sample", -1), join("context", 0).bool())
        elif not self.form.masks_padding:
            batch["attention_mask"] = torch.tensor([sample.num_context for sample in samples])
        else:
            lengths = torch.tensor([len(column["input_ids"]) for column in columns])
            batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        return batch

    def share_rows(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which samples go into which row: each into the first that has room for it."""
        if self.row_length is None:
            return [[index] for index in range(len(lengths))]
        groups: list[list[int]] = []
        rooms: list[int] = []
        for index, length in enumerate(lengths):
            if length > self.row_length:
                raise ValueError(f"A sample of {length} tokens does not fit into `row_length={self.row_length}`.")
            place = next((place for place, room in enumerate(rooms) if length <= room), len(rooms))
            if place == len(rooms):
                groups.append([])
                rooms.append(self.row_length)
            groups[place].append(index)
            rooms[place] -= length
        return groups


def number_rows(dataset: Any) -> Any:
    """Number the rows of a `datasets` data set or stream, so that texts that come again get other blanks.

    For a stream of several epochs: `number_rows(dataset.repeat(None))`.
    """
    return dataset.map(lambda row, index: {"number": index}, with_indices=True)


def shrink_embedding_gradients(model: nn.Module, share: float = 0.1) -> Any:
    """Train the input embedding with a share of its gradient, which keeps large models from diverging (GLM-130B, α = 0.1).

    Only what comes through the inputs is made smaller; an output layer that is tied keeps its own. Outputs are as before.

    Returns:
        A handle whose `remove()` ends it.

    Raises:
        ValueError: if `share` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` must be above 0 and at most 1, got {share}.")

    def shrink(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * share)

    get_embeddings: Callable[[], nn.Module] = model.get_input_embeddings  # type: ignore[assignment]
    return get_embeddings().register_forward_hook(shrink)


__all__ = [
    "BlankFormat",
    "BlankInfillingCollator",
    "BlankObjective",
    "BlankSample",
    "BlankTokens",
    "OBJECTIVES",
    "find_token",
    "make_prefix_sample",
    "make_sample",
    "number_rows",
    "see_each_other",
    "shrink_embedding_gradients",
]
