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
"""How are blanks filled, and choices scored?

`infill` answers every `[MASK]`, `[sMASK]` and `[gMASK]` of a text on top of `generate`; `score_choices` says how likely
given answers are (cloze questions, as in pattern-exploiting training, https://arxiv.org/abs/2001.07676).

What is unusual here:

- GLM writes its answers behind the text, one after the other, and sees the earlier ones there. ChatGLM-6B and GLM-130B
  know one blank at a time: an answer is written into the text, and the next blank is filled in the new text.
- What is scored is the context once, and behind it all choices, of which none sees another. Generations without blanks
  are asked how likely a choice is behind the text: each choice begins with a copy of the text's last token.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from .blank_infilling import find_token
from .configuration_generations import GENERATION_FEATURES, InfillFormat


@dataclass(frozen=True)
class Infilled:
    """A text whose blanks are filled: the whole text, and what was written into each blank, from left to right."""

    text: str
    spans: list[str]
    span_ids: list[list[int]] = field(repr=False)


@dataclass
class Blanks:
    """A text while its blanks are being filled."""

    # The text as it was given, and its mask tokens.
    parts: list[str]
    masks: list[str]
    # The ids between the mask tokens, and of the mask tokens.
    runs: list[list[int]]
    mask_ids: list[int]
    # The order in which blanks are filled; what was written, and how much of it was read again (see `read_answer`).
    order: list[int]
    answers: dict[int, list[int]] = field(default_factory=dict)
    num_read: dict[int, int] = field(default_factory=dict)

    @property
    def next_blank(self) -> int | None:
        """The blank to be filled next, if any is left."""
        return next((blank for blank in self.order if blank not in self.answers), None)

    def token_ids(self, with_answers: bool) -> list[int]:
        """The ids of the text, with answers in the places of their blanks, or without any."""
        ids = list(self.runs[0])
        for blank, mask_id in enumerate(self.mask_ids):
            answer = self.answers.get(blank) if with_answers else None
            ids += [mask_id] if answer is None else answer
            ids += self.runs[blank + 1]
        return ids

    def mask_position(self, blank: int) -> int:
        """Where a blank stands in the text without answers."""
        return sum(map(len, self.runs[: blank + 1])) + blank

    def append_answers(self, start: int | None) -> tuple[list[Any], tuple[list[int], list[int]], int]:
        """What GLM reads for the next blank.

        Returns:
            The ids of the text, of the pieces so far and the start of the next; two rows of positions; and how many
            tokens the text has.
        """
        ids: list[Any] = self.token_ids(with_answers=False)
        num_context = len(ids)
        positions, blocks = list(range(num_context)), [0] * num_context
        for blank in [*self.answers, self.next_blank]:
            if blank is not None:
                piece = [start, *self.answers.get(blank, [])[: self.num_read.get(blank, 0)]]
                ids += piece
                positions += [self.mask_position(blank)] * len(piece)
                blocks += range(1, len(piece) + 1)
        return ids, (positions, blocks), num_context

    def read_answer(self, new_ids: Sequence[int], stop_ids: Sequence[int]) -> None:
        """Take what was generated for the next blank, up to an end. Without one, the last token was never read."""
        end = next((index for index, token_id in enumerate(new_ids) if token_id in stop_ids), None)
        blank = self.next_blank
        if blank is not None:
            self.answers[blank] = list(new_ids[:end])
            self.num_read[blank] = len(new_ids) - 1 if end is None else end

    def write(self, tokenizer: PreTrainedTokenizerBase) -> Infilled:
        """The text with what was written so far; blanks that are left stay as they are."""
        text, spans = self.parts[0], []
        for blank, (mask, part) in enumerate(zip(self.masks, self.parts[1:])):
            span = mask
            if blank in self.answers:
                span = tokenizer.decode(self.answers[blank], skip_special_tokens=True).strip()
            spans.append(span)
            text = join_words(join_words(text, span), part)
        return Infilled(text, spans, [self.answers.get(blank, []) for blank in range(len(self.masks))])


def infill_format(config: Any) -> InfillFormat:
    """How a generation is asked to fill blanks.

    Raises:
        ValueError: for one that knows none.
    """
    form: InfillFormat | None = config.features.infill_format
    if form is None:
        known = (name for name, features in GENERATION_FEATURES.items() if features.infill_format)
        raise ValueError(
            f"{config.model_version} reads from left to right, and was never taught to fill blanks; "
            f"{', '.join(known)} are."
        )
    return form


def find_blanks(form: InfillFormat, tokenizer: PreTrainedTokenizerBase, text: str, has_end: bool = True) -> Blanks:
    """Encode a text with its blanks; one without any gets `[gMASK]` at its end.

    Raises:
        TypeError: for anything but a text.
        ValueError: if the tokenizer does not know the mask tokens.
    """
    if not isinstance(text, str):
        raise TypeError(f"A text must be a string, got {type(text).__name__}: {text!r}.")
    parts, masks = split_at_masks(text, form.masks)
    if not masks:
        parts, masks = [text, ""], ["[gMASK]"]
    known = {mask: find_token(tokenizer, mask) for mask in masks}
    if missing := [mask for mask, token_id in known.items() if token_id is None]:
        raise ValueError(f"{type(tokenizer).__name__} does not know {', '.join(missing)}.")
    # One part after the other: ChatGLM-6B's tokenizer finds `[MASK]` in a text, and not the others. White space beside a
    # mask token goes, as in the published tokenizers.
    runs = []
    for index, part in enumerate(parts):
        part = part.lstrip() if index > 0 else part
        part = part.rstrip() if index < len(masks) else part
        runs.append(list(tokenizer.encode(part, add_special_tokens=False)) if part else [])
    mask_ids = [known[mask] for mask in masks]
    is_open = not runs[-1] and masks[-1] in form.open_ends
    first, last = (name and find_token(tokenizer, name) for name in (form.start_of_text, form.end_of_text))
    if isinstance(first, int):
        runs[0].insert(0, first)
    if isinstance(last, int) and has_end and not is_open:
        runs[-1].append(last)
    groups = {name: rank for rank, group in enumerate(form.mask_groups) for name in group}
    order = sorted(range(len(masks)), key=lambda blank: groups[masks[blank]])
    return Blanks(parts, masks, runs, mask_ids, order)


def join_words(left: str, right: str) -> str:
    """Put two pieces of text together, with a space between words of letters that are written with spaces."""
    needs_space = left[-1:].isalnum() and left[-1:].isascii() and right[:1].isalnum() and right[:1].isascii()
    return f"{left} {right}" if needs_space else left + right


def split_at_masks(text: str, masks: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parts of a text between its mask tokens, and the mask tokens."""
    parts, found = [""], []
    while text:
        mask = next((mask for mask in masks if text.startswith(mask)), None)
        if mask is None:
            end = min((place for mask in masks if (place := text.find(mask)) >= 0), default=len(text))
            parts[-1] += text[:end]
            text = text[end:]
        else:
            found.append(mask)
            parts.append("")
            text = text[len(mask) :]
    return parts, found


def check_lengths(max_new_tokens: int | None, settings: Mapping[str, Any]) -> None:
    """Refuse to fill blanks without a limit: an end token need not come."""
    if max_new_tokens is None and settings.get("max_length") is None:
        raise ValueError("`max_new_tokens` is None: give `max_length`, which then says where an answer ends at last.")


def pad_left(rows: Sequence[Sequence[int]], padding: int) -> torch.Tensor:
    """`[batch, longest]`."""
    length = max(map(len, rows))
    return torch.tensor([[padding] * (length - len(row)) + list(row) for row in rows])


@dataclass(frozen=True)
class ChoiceRow:
    """A context and its choices in one row."""

    input_ids: list[int]
    # Rows of positions: one, or those in the text and in the answer.
    positions: list[list[int]]
    num_context: int
    # Whether the context sees itself both ways.
    is_bidirectional: bool
    # For each choice, where it stands, and what is predicted there.
    starts: list[int]
    targets: list[list[int]]


def make_choice_rows(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    choices: Sequence[Any],
    with_end: bool = False,
) -> list[ChoiceRow]:
    """Encode texts and their choices; see `BlankFillingMixin.score_choices`, also for what is raised."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"`texts` must be a list of at least one text, got {texts!r}.")
    if isinstance(choices, str):
        raise ValueError(f"`choices` must be a list, got {choices!r}, whose letters would be the choices.")
    is_shared = not choices or isinstance(choices[0], str) or (choices[0] and isinstance(choices[0][0], int))
    by_text = [choices] * len(texts) if is_shared else choices
    if len(by_text) != len(texts):
        raise ValueError(
            f"Got {len(texts)} texts but choices for {len(by_text)}; give one list for each, or one for all."
        )
    end = None
    if with_end:
        end = find_token(tokenizer, "<|endofpiece|>", "<eop>")
        if end is None:
            raise ValueError(f"{type(tokenizer).__name__} has no end of a piece: leave `with_end` out.")
    rows = []
    for text, own in zip(texts, by_text):
        encoded = [
            tokenizer.encode(choice, add_special_tokens=False) if isinstance(choice, str) else list(choice)
            for choice in own
        ]
        if not encoded or not all(encoded):
            raise ValueError(f"Every text needs choices of at least one token, got {own!r}.")
        rows.append(make_choice_row(config, tokenizer, text, [ids if end is None else [*ids, end] for ids in encoded]))
    return rows


def make_choice_row(config: Any, tokenizer: PreTrainedTokenizerBase, text: str, targets: list[list[int]]) -> ChoiceRow:
    """Put a context and its choices, each with what comes before its first token, into a row."""
    # CODEPATH: chatglm2, chatglm3 and glm4 continue the text; chatglm-6b, glm and glm-130b fill its blank.
    if not config.is_bidirectional:
        context = tokenizer.encode(text)
        start, first, counts_on = context.pop(), len(context), True
    else:
        form = infill_format(config)
        blanks = find_blanks(form, tokenizer, text, form.ends_scored_text)
        if len(blanks.masks) != 1:
            raise ValueError(f"A choice is for one blank, and {text!r} has {len(blanks.masks)}.")
        context = blanks.token_ids(with_answers=False)
        start = find_token(tokenizer, "<|startofpiece|>", "<sop>")
        first = blanks.mask_position(0)
        # CODEPATH: glm-130b, whose answers to `[gMASK]` count on behind the context.
        counts_on = not config.has_block_positions and blanks.masks == ["[gMASK]"]
        first = len(context) if counts_on else first
    ids, positions, blocks, starts = list(context), list(range(len(context))), [0] * len(context), []
    for target in targets:
        starts.append(len(ids))
        ids += [start, *target[:-1]]
        positions += range(first, first + len(target)) if counts_on else [first] * len(target)
        blocks += range(1, len(target) + 1)
    rows = [positions, blocks] if config.has_block_positions else [positions]
    return ChoiceRow(ids, rows, len(context), config.is_bidirectional, starts, targets)


def score_rows(model: Any, rows: Sequence[ChoiceRow], length_penalty: float = 0.0) -> torch.Tensor:
    """Scores of the choices of some rows, `[rows, choices]`, minus infinity where there is none; with gradients.

    Args:
        model: any of ours, or one of PEFT around it.
        rows: what `make_choice_rows` returned.
        length_penalty: see `BlankFillingMixin.score_choices`.
    """
    length, width = max(len(row.input_ids) for row in rows), max(len(row.starts) for row in rows)
    input_ids = torch.tensor([row.input_ids + [0] * (length - len(row.input_ids)) for row in rows])
    positions = torch.tensor([[axis + [0] * (length - len(axis)) for axis in row.positions] for row in rows])
    # Which choice a token belongs to: 0 is the context, -1 padding.
    group = torch.full((len(rows), length), -1)
    for index, row in enumerate(rows):
        group[index, : row.num_context] = 0
        for choice, (start, target) in enumerate(zip(row.starts, row.targets)):
            group[index, start : start + len(target)] = choice + 1
    is_earlier = torch.ones(length, length, dtype=torch.bool).tril()
    both_ways = torch.tensor([row.is_bidirectional for row in rows])[:, None, None]
    query, key = group[:, :, None], group[:, None, :]
    visible = ((key == 0) & (query >= 0) & (both_ways | is_earlier)) | ((key == query) & is_earlier)
    places = [
        (index, choice, start + step, token)
        for index, row in enumerate(rows)
        for choice, (start, target) in enumerate(zip(row.starts, row.targets))
        for step, token in enumerate(target)
    ]
    row_of, choice_of, column, token = torch.tensor(places, device=model.device).T
    num_kept = length - min(row.num_context for row in rows)
    logits = model(
        input_ids=input_ids.to(model.device),
        position_ids=(positions if positions.shape[1] > 1 else positions[:, 0]).to(model.device),
        # As integers, of which 1 means visible to every generation.
        attention_mask=visible[:, None].long().to(model.device),
        logits_to_keep=num_kept,
        use_cache=False,
    ).logits
    scores = logits[row_of, column - (length - num_kept)].float().log_softmax(-1).gather(1, token[:, None])[:, 0]
    totals = torch.zeros(len(rows), width, device=scores.device).index_put(
        (row_of, choice_of), scores, accumulate=True
    )
    counts = torch.tensor([[len(target) for target in row.targets] + [0] * (width - len(row.targets)) for row in rows])
    counts = counts.to(scores.device)
    return (totals / counts.clamp(min=1) ** length_penalty).masked_fill(counts == 0, -torch.inf)


class BlankFillingMixin:
    """`infill`, `stream_infill` and `score_choices`."""

    config: Any
    device: torch.device
    generate: Any
    stream_generate: Any

    def infill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | Sequence[str],
        max_new_tokens: int | None = 128,
        **kwargs: Any,
    ) -> Any:
        """Fill the blanks of a text, or of several in one batch: every `[MASK]`, `[sMASK]` and `[gMASK]`.

        A text without any gets `[gMASK]` at its end. Of ChatGLM-6B, which was taught two, `[gMASK]` is filled first.

        Args:
            tokenizer: of the model.
            text: one text, or a list of them.
            max_new_tokens: for each blank; `None` leaves it to `max_length`, of everything that is read and written.
            kwargs: anything `generate` takes, such as `do_sample` and `num_beams`. Greedy search by default.

        Returns:
            An [`Infilled`], or a list of them.

        Raises:
            ValueError: for no text at all, a model that knows no blanks, neither length, or `num_return_sequences`.
            TypeError: for anything but texts.
        """
        texts = [text] if isinstance(text, str) else list(text)
        batch = [find_blanks(infill_format(self.config), tokenizer, one) for one in texts]
        if not batch:
            raise ValueError("`text` must be a text or a list of at least one, got none.")
        check_lengths(max_new_tokens, kwargs)
        if (num_answers := kwargs.get("num_return_sequences")) not in (None, 1):
            raise ValueError(f"A blank has one answer: `num_return_sequences` is {num_answers}.")
        while waiting := [blanks for blanks in batch if blanks.next_blank is not None]:
            inputs = self._infill_inputs(tokenizer, waiting, max_new_tokens, kwargs)
            output = self.generate(**inputs)
            for blanks, new_ids in zip(waiting, output[:, inputs["input_ids"].shape[1] :].tolist()):
                blanks.read_answer(new_ids, inputs["eos_token_id"])
        filled = [blanks.write(tokenizer) for blanks in batch]
        return filled[0] if isinstance(text, str) else filled

    def stream_infill(
        self, tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int | None = 128, **kwargs: Any
    ) -> Generator[Infilled, None, None]:
        """Fill the blanks of one text, yielding it after every token; see [`infill`]. The last yield equals its result."""
        if not isinstance(text, str):
            raise TypeError(f"One text can be streamed, got {type(text).__name__}.")
        check_lengths(max_new_tokens, kwargs)
        return self._stream_blanks(
            tokenizer, find_blanks(infill_format(self.config), tokenizer, text), max_new_tokens, kwargs
        )

    def _stream_blanks(
        self, tokenizer: PreTrainedTokenizerBase, blanks: Blanks, max_new_tokens: int | None, kwargs: dict[str, Any]
    ) -> Generator[Infilled, None, None]:
        while (blank := blanks.next_blank) is not None:
            inputs = self._infill_inputs(tokenizer, [blanks], max_new_tokens, kwargs)
            start = inputs["input_ids"].shape[1]
            for output in self.stream_generate(**inputs):
                blanks.answers.pop(blank, None)
                blanks.read_answer(output[0, start:].tolist(), inputs["eos_token_id"])
                yield blanks.write(tokenizer)

    def _infill_inputs(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch: Sequence[Blanks],
        max_new_tokens: int | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The arguments for `generate` that fill the next blank of each text."""
        form = infill_format(self.config)
        start = find_token(tokenizer, "<|startofpiece|>", "<sop>")
        ends = [
            find_token(tokenizer, "<|endofpiece|>", "<eop>"),
            form.end_of_text and find_token(tokenizer, form.end_of_text),
        ]
        stop_ids = [token_id for token_id in ends if token_id is not None]
        inputs: dict[str, Any] = {}
        # CODEPATH: chatglm-6b and glm-130b read positions and context off the ids, of which a blank must stay one.
        if form.writes_into_text:
            rows = [[*blanks.token_ids(with_answers=True), start] for blanks in batch]
            inputs["attention_mask"] = pad_left([[1] * len(row) for row in rows], 0)
            mask_ids = [find_token(tokenizer, mask) for mask in form.masks]
            inputs["suppress_tokens"] = [*(kwargs.get("suppress_tokens") or []), *mask_ids]
        else:
            appended = [blanks.append_answers(start) for blanks in batch]
            rows = [row for row, _, _ in appended]
            length = max(map(len, rows))
            room = max_new_tokens or max(kwargs["max_length"] - length, 1)
            positions = torch.stack([pad_left([row[axis] for _, row, _ in appended], 0) for axis in (0, 1)], dim=1)
            # The last token that is generated is not read again.
            count = torch.arange(1, room)
            further = torch.stack((positions[:, 0, -1:] + 0 * count, positions[:, 1, -1:] + count), dim=1)
            inputs["position_ids"] = torch.cat((positions, further), dim=-1)
            if room > self.config.max_prompt_length - 1:
                raise ValueError(
                    f"An answer of {room} tokens has more than the {self.config.max_prompt_length - 1} positions of this "
                    "model: give less `max_new_tokens`."
                )
            place = torch.arange(length + room - 1)
            first = torch.tensor([length - len(row) for row in rows])[:, None, None]
            behind = first + torch.tensor([num_context for _, _, num_context in appended])[:, None, None]
            seen = (place >= first) & ((place < behind) | (place <= place[:, None]))
            inputs["generation_attention_mask"] = seen[:, None].long()
        inputs["input_ids"] = pad_left(rows, stop_ids[0])
        inputs = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        settings = {
            "do_sample": False,
            "max_new_tokens": max_new_tokens,
            "max_length": None,
            "pad_token_id": stop_ids[0],
        }
        fixed = {"eos_token_id": stop_ids, "return_dict_in_generate": False}
        return settings | kwargs | inputs | fixed

    @torch.no_grad()
    def score_choices(
        self,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        choices: Sequence[Any],
        with_end: bool = False,
        length_penalty: float = 0.0,
        batch_size: int = 8,
    ) -> torch.Tensor:
        """How likely each choice is in the blank of its text: sums of log-probabilities of its tokens.

        Args:
            tokenizer: of the model.
            texts: each with one mask token; without any, `[gMASK]` is put at the end. Generations that know no blanks
                read what the choice comes behind.
            choices: texts or ids, the same for all, or a list of them for each text.
            with_end: whether the end of the piece counts too, as in the published cloze tasks with several tokens.
            length_penalty: sums are divided by the number of tokens to this power.
            batch_size: how many texts are read at a time.

        Returns:
            Float32 `[texts, choices]`, minus infinity where a text has fewer choices.

        Raises:
            ValueError: for no texts, no choices, an empty choice, several blanks, or numbers that do not fit together.
        """
        rows = make_choice_rows(self.config, tokenizer, texts, choices, with_end)
        was_training = self.training  # type: ignore[attr-defined]
        self.eval()  # type: ignore[attr-defined]
        try:
            scores = [
                score_rows(self, rows[start : start + batch_size], length_penalty)
                for start in range(0, len(rows), batch_size)
            ]
        finally:
            self.train(was_training)  # type: ignore[attr-defined]
        width = max(score.shape[1] for score in scores)
        return torch.cat([F.pad(score, (0, width - score.shape[1]), value=-torch.inf) for score in scores])


__all__ = [
    "BlankFillingMixin",
    "Infilled",
    "infill_format",
    "make_choice_rows",
    "score_rows",
]
