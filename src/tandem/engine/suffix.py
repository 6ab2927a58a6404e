"""Drafts from what was written before: of the context itself, its siblings, and answers that have ended.

What followed the longest ending of a context that was seen before, by votes of the places where it was: a place counts
for as many tokens as it has in common with the context's end. So the walk is that of a suffix tree with counts
(Oliaro et al., SuffixDecoding, 2411.04975; of one problem's earlier rollouts, DAS, 2511.13841), by an index of the
endings of four lengths. Old answers are drafts and never samples: a draft stands where the model draws it now.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from tandem.engine.draft import Drafter

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence

ENDINGS = (16, 8, 4, 2)  # tokens of an ending that is looked for, the longest first
PLACES = 32  # of an ending that are looked at: the latest
LONGEST = 64  # tokens that a place is compared by
LEAST = 0.1  # share of the votes that a draft and all before it have


class History:
    """Texts of one tenant, and where their endings are.

    >>> history = History(100)
    >>> history.follow(0, [5, 6, 7, 8, 9, 6, 7]), history.drafts(0, 2)
    (None, [8, 9])
    """

    def __init__(self, kept: int) -> None:
        """kept: tokens of ended texts; the oldest go first."""
        self.kept = kept
        self._texts: OrderedDict[int, array[int]] = OrderedDict()
        self._places: dict[int, list[tuple[int, int]]] = {}  # ending, hashed -> texts, and where in them it ends
        self._prompts: dict[int, int] = {}  # prompt, hashed -> the text that it was read in
        self._ended: OrderedDict[int, int] = OrderedDict()  # texts -> their tokens, the oldest first
        self._kept = self._gone = 0

    def follow(self, name: int, tokens: list[int], prompt: int = 0) -> None:
        """A text is now these tokens: what it was, and more. Of a prompt that another begins with too, `prompt` tokens
        long, endings are noted once."""
        text = self._texts.get(name)
        start = 0
        if text is None:
            text = self._texts[name] = array("i")
            if prompt and self._prompts.setdefault(hash(tuple(tokens[:prompt])), name) != name:
                start = prompt
        known = len(text)
        text.extend(tokens[known:])
        places = self._places
        for end in range(max(known, start) + 1, len(tokens) + 1):
            place = name, end
            for size in ENDINGS:
                if size <= end:
                    found = places.setdefault(hash(tuple(tokens[end - size : end])), [])
                    found.append(place)
                    if len(found) == 2 * PLACES:
                        del found[:PLACES]

    def end(self, name: int) -> None:
        """A text grows no more, and may be forgotten."""
        if name not in self._texts:
            return
        self._ended[name] = len(self._texts[name])
        self._kept += self._ended[name]
        while self._kept > self.kept:
            oldest, tokens = self._ended.popitem(last=False)
            del self._texts[oldest]
            self._kept -= tokens
            self._gone += tokens
        if self._gone > self.kept:
            self._forget()

    def _forget(self) -> None:
        """What names texts that are gone."""
        self._gone = 0
        texts = self._texts
        self._prompts = {key: name for key, name in self._prompts.items() if name in texts}
        left = ((key, [place for place in found if place[0] in texts]) for key, found in self._places.items())
        self._places = {key: found for key, found in left if found}

    def drafts(self, name: int, most: int) -> list[int]:
        """At most so many tokens that may follow a text."""
        text, drafts = self._texts[name], list[int]()
        voters, sure = self._alike(text), 1.0
        while voters and len(drafts) < most:
            votes: dict[int, int] = {}
            for other, end, weight in voters:
                if end < len(other):
                    votes[other[end]] = votes.get(other[end], 0) + weight
            if not votes:
                break
            best = max(votes, key=votes.__getitem__)  # of several the one of the latest place
            sure *= votes[best] / sum(votes.values())
            if sure < LEAST:
                break
            drafts.append(best)
            voters = [(other, end + 1, w) for other, end, w in voters if end < len(other) and other[end] == best]
        return drafts

    def _alike(self, text: array[int]) -> list[tuple[array[int], int, int]]:
        """Places that a text's longest known ending has, the latest first: text, where it goes on, tokens in common."""
        length, texts = len(text), self._texts
        for size in ENDINGS:
            if size > length:
                continue
            ending, found = text[-size:], []
            for name, end in reversed(self._places.get(hash(tuple(ending)), [])[-PLACES:]):
                other = texts.get(name)
                if other is None or end == len(other) or other[end - size : end] != ending:
                    continue
                same, most = size, min(LONGEST, end, length)
                while same < most and other[end - same - 1] == text[length - same - 1]:
                    same += 1
                found.append((other, end, same))
            if found:
                return found
        return []


class SuffixLookup(Drafter):
    """Of each tenant its own history: nobody is drafted what another wrote, and so learns nothing of it by time."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._tenants: dict[str, History] = {}

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        for sequence in sequences:  # siblings know of each other's latest tokens
            self._history(sequence).follow(sequence.arrival, sequence.tokens, len(sequence.request.tokens))
        pairs = zip(sequences, most, strict=True)
        return [self._history(sequence).drafts(sequence.arrival, count) if count else [] for sequence, count in pairs]

    def ended(self, sequence: Sequence) -> None:
        history = self._history(sequence)
        history.follow(sequence.arrival, sequence.tokens, len(sequence.request.tokens))
        history.end(sequence.arrival)

    def _history(self, sequence: Sequence) -> History:
        return self._tenants.setdefault(sequence.request.tenant, History(self.kept))
