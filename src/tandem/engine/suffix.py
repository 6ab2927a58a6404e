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
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from tandem.engine.draft import Drafter

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence

ENDINGS = (16, 8, 4, 2)  # tokens of an ending that is looked for, the longest first
LONGER = (64, 32)  # than the longest: a place that has so many in common counts for as many
PLACES = 8  # of an ending that are looked at: the latest
LEAST = 0.1  # share of the votes that a draft and all before it have
Following = list["tuple[array[int], int]"]  # tokens that followed, and their weight


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
            votes = _votes(following, len(drafts))
            if not votes:
                return drafts
            best = max(votes, key=votes.__getitem__)  # of several the one of the latest place
            sure *= votes[best] / sum(votes.values())
            if sure < LEAST:
                return drafts
            following = _after(following, len(drafts), best)
            drafts.append(best)
        return drafts + following[0][0][len(drafts) :].tolist() if following else drafts

    def paths(self, name: int, most: int, width: int) -> list[list[int]]:
        """At most `width` such drafts, none the beginning of another: at each fork the branches with most of the votes,
        of all that are left open the likeliest first."""
        if width == 1 or not most:
            drafts = self.drafts(name, most) if most else []
            return [drafts] if drafts else []
        found: list[list[int]] = []
        # Less the share of the votes, order of arrival, tokens, who votes on.
        forks: list[tuple[float, int, list[int], Following]] = [(-1.0, 0, [], self._following(self._texts[name], most))]
        met = 0
        while forks and len(found) < width:
            share, _, drafts, following = heappop(forks)
            sure = -share
            while len(drafts) < most and (votes := _votes(following, len(drafts))):
                best, total = max(votes, key=votes.__getitem__), sum(votes.values())
                for token, count in votes.items():
                    if token != best and sure * count / total >= LEAST:
                        met += 1
                        after = _after(following, len(drafts), token)
                        heappush(forks, (-sure * count / total, met, [*drafts, token], after))
                sure *= votes[best] / total
                if sure < LEAST:
                    break
                following = _after(following, len(drafts), best)
                drafts.append(best)
            if drafts:
                found.append(drafts)
        return found

    def _following(self, text: array[int], most: int) -> Following:
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


def _votes(following: Following, place: int) -> dict[int, int]:
    """For each token that may come there, in the order of the latest places."""
    votes = dict[int, int]()
    for tokens, weight in following:
        if place < len(tokens):
            votes[tokens[place]] = votes.get(tokens[place], 0) + weight
    return votes


def _after(following: Following, place: int, token: int) -> Following:
    """Those that have the token there."""
    return [one for one in following if place < len(one[0]) and one[0][place] == token]


class SuffixLookup(Drafter):
    """Of each tenant its own history: nobody is drafted what another wrote, and so learns nothing of it by time."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self._tenants: dict[str, History] = {}

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        return [next(iter(paths), []) for paths in self.branches(sequences, most, [1] * len(sequences))]

    def branches(self, sequences: list[Sequence], most: list[int], width: list[int]) -> list[list[list[int]]]:
        for sequence in sequences:  # siblings know of each other's latest tokens
            self._history(sequence).follow(sequence.arrival, sequence.tokens, len(sequence.request.tokens))
        asked = zip(sequences, most, width, strict=True)
        return [self._history(sequence).paths(sequence.arrival, count, wide) for sequence, count, wide in asked]

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
