"""Ids of texts that begin alike, as renderings of a growing conversation do: what was encoded is not encoded again.

A tokeniser looks for its control tokens before all else, and encodes what is between them piece by piece. So the ids up
to the end of one, in a text, are those in any other text that begins so; what follows it is encoded behind it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from tandem.models.spelt import encoded

if TYPE_CHECKING:
    import tokenizers


class _Known(NamedTuple):
    """A text that was encoded. Of its control tokens: the place in the text, and in the ids, behind each."""

    text: str
    ids: list[int]
    ends: list[int]
    counts: list[int]


_NOTHING = _Known("", [], [], [])


class Regrown:
    """The ids of the tokeniser, to the last one; remembers one text. From any thread."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend
        self._last = _NOTHING

    @cached_property
    def apart(self) -> dict[int, str]:
        """Control tokens by id that are found as they are wherever they stand: they take no white space beside them,
        and are a part of no other."""
        added = self.backend.get_added_tokens_decoder()
        names = [token.content for token in added.values()]
        return {
            token_id: token.content
            for token_id, token in added.items()
            if token.content
            and not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            and sum(token.content in name for name in names) == 1
        }

    @cached_property
    def _found(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.apart.values())) or "(?!)")

    def encode(self, text: str, yields: bool) -> list[int]:
        """As `backend.encode(text, add_special_tokens=False).ids`; `yields`: see `spelt.encoded`."""
        backend, last = self.backend, self._last
        if backend.encode_special_tokens or backend.truncation or backend.padding:
            return encoded(backend, text, False, yields).ids
        alike = bisect_left(last.ends, True, key=lambda end: not text.startswith(last.text[:end]))
        begun = last.ends[alike - 1] if alike else 0
        ids = last.ids[: last.counts[alike - 1]] if alike else []
        anchor = self.apart[ids[-1]] if alike else ""  # what follows is not taken for the beginning of a text
        rest = encoded(backend, anchor + text[begun:], False, yields).ids[bool(anchor) :]
        ends = [found.end() for found in self._found.finditer(text, begun)]
        counts = [len(ids) + at for at, token in enumerate(rest, start=1) if token in self.apart]
        ids += rest
        if len(ends) == len(counts):
            self._last = _Known(text, ids, last.ends[:alike] + ends, last.counts[:alike] + counts)
        return list(ids)
