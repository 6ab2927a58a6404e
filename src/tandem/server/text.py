"""Token ids to text as they come: whole characters, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tandem.types import StopReason

HALF = "�"  # that bytes decode to which are no whole character yet


class Text:
    """What is fed and finished, joined, is `decode` of all tokens but the one that ended the turn, up to a stop string.

    ends: token ids that end a turn, which are not text.

    >>> text = Text(lambda ids: "".join(map(chr, ids)), ("lo",), frozenset([10]))
    >>> text.feed([72, 101, 108]), text.feed([108, 33, 10]), text.finish(StopReason.STOP_TOKEN)
    ('He', 'll!', '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], ends: frozenset[int]) -> None:
        self._decode = decode
        self._stops = stops
        self._ends = ends
        self._tokens: list[int] = []
        self._start = 0  # of the tokens that are decoded again, for what decoding does to a first one
        self._read = 0  # tokens whose text is out, or held for a stop string
        self._held = ""
        self._given: list[str] = []
        self._stopped = False

    @property
    def given(self) -> str:
        """All of it so far."""
        return "".join(self._given)

    def feed(self, tokens: Sequence[int]) -> str:
        """Text that can't change any more."""
        self._tokens += [token for token in tokens if token not in self._ends]
        if self._stopped or self._read == len(self._tokens):
            return ""
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or after.endswith(HALF):
            return ""
        self._held += after[len(before) :]
        self._start, self._read = self._read, len(self._tokens)
        place = self._first(self._held)
        if place >= 0:
            self._stopped = True
            return self._give(self._held[:place])
        kept = max((overlap(self._held, stop) for stop in self._stops), default=0)
        return self._give(self._held[: len(self._held) - kept])

    def finish(self, reason: StopReason) -> str:
        """What is left when no more comes."""
        whole, given = self._decode(self._tokens), self.given
        place = self._first(whole) if reason is StopReason.STOP_STRING else -1
        whole = whole[:place] if place >= 0 else whole
        return self._give(whole[len(given) :]) if whole.startswith(given) else ""

    def _give(self, text: str) -> str:
        self._held = self._held[len(text) :]
        self._given.append(text)
        return text

    def _first(self, text: str) -> int:
        return min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=-1)


def overlap(text: str, stop: str) -> int:
    """Characters of the longest end of `text` that `stop` begins with.

    >>> overlap("a<|e", "<|end|>"), overlap("a", "b")
    (3, 0)
    """
    most = min(len(text), len(stop) - 1)
    return next((count for count in range(most, 0, -1) if stop.startswith(text[-count:])), 0)
