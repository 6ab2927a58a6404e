"""Counts by place that add up as numbers do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

HITS = (1, 64, 256, 1024)  # tokens of a prompt that were found in the cache, from which on it is of the next bucket
HIT_NAMES = ("0", "1-63", "64-255", "256-1023", "1024+")
UNDRAFTED = ("untimed", "unpaid", "unoffered", "room", "raised")  # why a step that drew had no drafts


class Tally(tuple[int, ...]):
    """A count a place; places that one lacks are 0.

    >>> Tally((3, 2)) + Tally((1, 1, 1)), sum([Tally((1,)), Tally((0, 2))]), Tally((3, 2)) - Tally((1,))
    ((4, 3, 1), (1, 2), (2, 2))
    """

    __slots__ = ()

    def __add__(self, other: object) -> Tally:  # type: ignore[override]
        if other == 0:
            return self
        assert isinstance(other, tuple), other
        return Tally(a + b for a, b in zip_longest(self, other, fillvalue=0))

    __radd__ = __add__

    def __sub__(self, other: Iterable[int]) -> Tally:
        return Tally(a - b for a, b in zip_longest(self, other, fillvalue=0))


def by_position(lengths: Sequence[int], places: int) -> Tally:
    """How many are longer than 0, than 1, ..., of so many places.

    >>> by_position([3, 1, 0], 4)
    (2, 1, 1, 0)
    """
    counts = np.bincount(lengths, minlength=places + 1)
    return Tally(counts[::-1].cumsum()[-2::-1].tolist())


def by_hit(found: Sequence[int], counts: Sequence[int]) -> Tally:
    """Sums of counts by how many tokens of a prompt were found.

    >>> by_hit([0, 63, 64, 5000], [1, 2, 3, 4])
    (1, 2, 3, 0, 4)
    """
    buckets = np.searchsorted(HITS, found, side="right")
    return Tally(np.bincount(buckets, counts, len(HITS) + 1).astype(int).tolist())
