"""Drafts from what was written before: of the context itself, its siblings, and answers that have ended.

What followed the longest ending of a context that was seen before, by votes of the places where it was: a place counts
for as many tokens as it has in common with the context's end (2, 4, 8, 16, 32 or 64). So the walk is that of a suffix
tree with counts (Oliaro et al., SuffixDecoding, 2411.04975; of one problem's earlier rollouts, DAS, 2511.13841), by an
index of the endings of four lengths. Old answers are drafts and never samples: a draft stands where the model draws it
now.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import TYPE_CHECKING

from tandem.engine.draft import Drafter

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence

ENDINGS = (16, 8, 4, 2)  # tokens of an ending that is looked for, the longest first
LONGER = (64, 32)  # than the longest: a place that has so many in common counts for as many
PLACES = 8  # of an ending that are looked at: the latest
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
        self._texts: dict[int, array[int]] = {}
        self._places: dict[int, list[tuple[int, int]]] = {}  # ending -> texts, and where in them it ends
        self._prompts: dict[int, int] = {}  # prompt, hashed -> the text that it was read in
        self._ended: OrderedDict[int, int] = OrderedDict()  # texts -> their tokens, the oldest first
        self._kept = self._gone = 0

    def follow(self, name: int, tokens: list[int], prompt: int = 0) -> None:
        """A text is now these tokens: what it was, and more. Of a prompt that another begins with too, `prompt` tokens
        long, endings are noted once."""
        text, start = self._texts.get(name), 0
        if text is None:
            text = self._texts[name] = array("i")
            if prompt and self._prompts.setdefault(hash(tuple(tokens[:prompt])), name) != name:
                start = prompt
        known, places = len(text), self._places
        if known == len(tokens):
            return
        text.extend(tokens[known:])
        for end in range(max(known, start) + 1, len(tokens) + 1):
            place = name, end
            for size in ENDINGS:
                if size <= end:
                    ending = hash(tuple(tokens[end - size : end]))  # another that has it would be a bad draft
                    found = places.get(ending)
                    if found is None:
                        places[ending] = [place]
                        continue
                    found.append(place)
                    if len(found) == 4 * PLACES:
                        del found[: 3 * PLACES]

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
        following = self._following(self._texts[name], most)
        drafts, sure = list[int](), 1.0
        while len(following) > 1 and len(drafts) < most:
            place, votes = len(drafts), dict[int, int]()
            for tokens, weight in following:
                if place < len(tokens):
                    votes[tokens[place]] = votes.get(tokens[place], 0) + weight
            if not votes:
                return drafts
            best = max(votes, key=votes.__getitem__)  # of several the one of the latest place
            sure *= votes[best] / sum(votes.values())
            if sure < LEAST:
                return drafts
            drafts.append(best)
            following = [one for one in following if place < len(one[0]) and one[0][place] == best]
        return drafts + following[0][0][len(drafts) :].tolist() if following else drafts

    def _following(self, text: array[int], most: int) -> list[tuple[array[int], int]]:
        """What follows a text's longest known ending, at most so many tokens, that of the latest place first; and what
        it has in common with those places, added up."""
        length, texts, weights = len(text), self._texts, dict[bytes, int]()
        last = text[-ENDINGS[0] :].tolist()
        for size in ENDINGS:
            if size > length:
                continue
            for name, end in self._places.get(hash(tuple(last[-size:])), ())[: -PLACES - 1 : -1]:
                other = texts.get(name)
                if other is None or end == len(other):
                    continue
                weight = size
                if size == ENDINGS[0]:
                    for more in LONGER:
                        if more <= end and more <= length and other[end - more : end] == text[-more:]:
                            weight = more
                            break
                tokens = other[end : end + most].tobytes()
                weights[tokens] = weights.get(tokens, 0) + weight
            if weights:
                return [(array("i", tokens), weight) for tokens, weight in weights.items()]
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
        tenant = sequence.request.tenant
        history = self._tenants.get(tenant)
        if history is None:
            history = self._tenants[tenant] = History(self.kept)
        return history
