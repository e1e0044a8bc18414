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
"""What a conversation that was rendered to text looks like, and how it is cut into its pieces again.

Other programs render a conversation by the Jinja template and have the text encoded later. A conversation is encoded
piece by piece, though, so such a text is recognised and cut where `ConversationFormat.segments` had put it together.

What is unusual here:

- Messages may hold anything. The templates mark what looks like a control token in them with a word joiner, so what
  stands here without one was written by the template. The pieces have their joiners taken out: rendering and reading
  together change nothing.
- `[gMASK]sop` and a role token open a conversation of ChatGLM3 and GLM-4. Behind a role token, the first newline ends
  the metadata; a newline within the metadata has an odd number of joiners before it. There stands a picture of GLM-4V.
- ChatGLM2 writes `[gMASK]sop` and one text, in which control tokens are text. An answer at its end is a piece of its
  own, behind the last `答：`; it is marked where it holds that heading, too.
- A conversation of ChatGLM-6B is a text with `[gMASK]<sop>` behind it, and maybe the answer.

Nothing here needs torch or transformers.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .conversation_chatglm import ROLES, ConversationFormat, RoleFormat, RoundFormat, Segment
from .conversation_templates import JOINER


class Piece(NamedTuple):
    """A piece of a rendered conversation, and where it stands in the rendered text."""

    segment: Segment
    start: int
    end: int


def read_rendered(text: str, chat_format: ConversationFormat) -> list[Piece] | None:
    """Cut a rendered conversation into pieces that are encoded on their own.

    Args:
        text: any text.
        chat_format: the generation to read it for.

    Returns:
        The pieces in order, which cover the text; `None` where it is no rendered conversation.
    """
    opening = "".join(chat_format.opening_tokens)
    if not text.startswith(opening):
        return None
    pieces: list[Piece] = []
    # CODEPATH: chatglm3 and glm4 have role tokens; chatglm and chatglm2 have not.
    if isinstance(chat_format, RoleFormat):
        pieces += _cut_roles(text, len(opening), chat_format)
    elif isinstance(chat_format, RoundFormat):
        pieces += _cut_rounds(text, len(opening), chat_format)
    return [*_special_pieces(chat_format.opening_tokens, 0), *pieces] if pieces else None


def leave_answer_open(text: str, closing_token: str, chat_format: ConversationFormat) -> str:
    """Take the closing token, if there is one, from the end of a rendered conversation.

    An open answer of ChatGLM2 that ends as a question does is marked there.
    """
    text = text.removesuffix(closing_token)
    if isinstance(chat_format, RoundFormat) and not chat_format.answer_opening:
        newline = chat_format.newline
        text = re.sub(rf"{newline[0]}({JOINER}*{newline[1:]})\Z", rf"{newline[0]}{JOINER}\1", text)
    return text


def spans_in_rendered(rendered: str, piece: Piece, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where in the rendered text the `spans` of a piece stand; joiners at their ends are not among them."""
    places = []
    place = piece.start
    for character in piece.segment.text:
        while rendered[place] != character:
            place += 1
        places.append(place)
        place += 1
    # An empty span has no last character; where it stands says nothing.
    return [
        (places[start], places[end - 1] + 1) if start < end else (piece.start, piece.start) for start, end in spans
    ]


def _cut_roles(text: str, start: int, chat_format: RoleFormat) -> Iterator[Piece]:
    role_tokens = tuple(f"<|{role}|>" for role in ROLES)
    if not text.startswith(role_tokens, start):
        return
    picture = "".join(chat_format.picture_tokens)
    # A picture first: one of its tokens ends answers, too.
    known = (*([picture] if picture else []), *role_tokens, *chat_format.stop_tokens, chat_format.closing_token)
    matches = list(re.compile("|".join(map(re.escape, known))).finditer(text, start))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    for match, end in zip(matches, ends):
        yield from _special_pieces(chat_format.picture_tokens if match[0] == picture else [match[0]], match.start())
        start = match.end()
        newline = _end_of_metadata(text, start, end) if match[0] in role_tokens else -1
        if newline >= 0:
            metadata = _unmarked(text[start:newline], chat_format.marked_tokens)
            metadata = metadata.replace(f"{JOINER}\n", "\n").replace(2 * JOINER, JOINER)
            yield Piece(Segment(f"{metadata}\n", False), start, newline + 1)
            start = newline + 1
        yield from _text_piece(text, start, end, chat_format.marked_tokens)


def _end_of_metadata(text: str, start: int, end: int) -> int:
    """The first newline that no odd number of joiners marks; -1 where there is none."""
    newline = text.find("\n", start, end)
    while newline >= 0:
        line = text[start:newline]
        if (len(line) - len(line.rstrip(JOINER))) % 2 == 0:
            break
        start = newline + 1
        newline = text.find("\n", start, end)
    return newline


def _cut_rounds(text: str, start: int, chat_format: RoundFormat) -> Iterator[Piece]:
    closing = chat_format.closing_token
    is_closed = text.endswith(closing, start)
    end = len(text) - len(closing) if is_closed else len(text)
    # CODEPATH: chatglm has control tokens before an answer; chatglm2 has not.
    opening = "".join(chat_format.answer_opening)
    if opening:
        prompt_end = text.rfind(opening, start, end)
        if prompt_end < 0:
            return
        yield from _text_piece(text, start, prompt_end, chat_format.marked_tokens)
        yield from _special_pieces(chat_format.answer_opening, prompt_end)
        yield from _text_piece(text, prompt_end + len(opening), end, chat_format.marked_tokens)
    else:
        yield from _cut_one_text(text, start, end, chat_format)
    if is_closed:
        yield from _special_pieces([closing], end)


def _cut_one_text(text: str, start: int, end: int, chat_format: RoundFormat) -> Iterator[Piece]:
    newline = chat_format.newline
    heading = f"{newline}答："
    answer_start = text.rfind(heading, start, end) + len(heading)
    is_open_question = end == len(text) and text.endswith(newline)
    if is_open_question or answer_start < len(heading):
        answer_start = end
    yield from _text_piece(text, start, answer_start, chat_format.marked_tokens)
    answer = text[answer_start:end]
    if end == len(text):
        answer = re.sub(rf"{newline[0]}{JOINER}({JOINER}*{newline[1:]})\Z", rf"{newline[0]}\1", answer)
    if answer:
        yield Piece(Segment(_unmarked(answer, (*chat_format.marked_tokens, heading)), False), answer_start, end)


def _text_piece(text: str, start: int, end: int, tokens: Sequence[str]) -> Iterator[Piece]:
    if start < end:
        yield Piece(Segment(_unmarked(text[start:end], tokens), False), start, end)


def _special_pieces(tokens: Sequence[str], start: int) -> Iterator[Piece]:
    for token in tokens:
        yield Piece(Segment(token, True), start, start + len(token))
        start += len(token)


def _unmarked(text: str, tokens: Sequence[str]) -> str:
    """Undo what the templates do to text: they mark one token after the other."""
    if JOINER in text:
        for token in reversed(tokens):
            text = text.replace(JOINER + token[1:], token[1:])
    return text


__all__ = ["Piece", "leave_answer_open", "read_rendered", "spans_in_rendered"]
