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
"""The text of an answer that is still growing, at the same cost for every token of it.

What is unusual here:

- The text of ids is more than the texts of each put together: characters are made of several byte tokens, the first space
  of a text is dropped, and ChatGLM-6B cleans up spaces. So the last ids are decoded together until what stands before
  them can no longer change; the one before them, which has a text, is decoded with them each time, so that they do not
  begin a text.
"""

from collections.abc import Callable, Sequence


# So many ids are decoded for a token at least, and about twice as many at most.
NUM_OPEN_IDS = 8


class GrowingText:
    """What `decode` makes of all ids so far, for ids that come one after another.

    Args:
        decode: gives the text of ids.
        is_settled: whether the ids that end with the first one, whose text is given, keep it when the second one follows.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], is_settled: Callable[[str, int, int], bool]) -> None:
        self._decode = decode
        self._is_settled = is_settled
        self._settled = ""
        # Their text so far, of which the beginning belongs to what is settled.
        self._open_ids: list[int] = []
        self._open_text = ""
        self._num_settled = 0

    def add(self, token_id: int) -> str:
        """The text of all ids, with one more."""
        ids = self._open_ids
        if len(ids) >= NUM_OPEN_IDS and self._is_settled(self._open_text, ids[-1], token_id):
            # Ids that are not in the vocabulary have no text.
            if last_text := self._decode(ids[-1:]):
                self._settled += self._open_text[self._num_settled :]
                del ids[:-1]
                self._num_settled = len(last_text)
        ids.append(token_id)
        self._open_text = self._decode(ids)
        return self._settled + self._open_text[self._num_settled :]


__all__ = ["GrowingText"]
