"""Over-sampling: more groups run than a batch takes, and the first to end make it, by a clock of tokens.

By this clock a group ends when its longest program has sampled its last token, over all its turns; of two that end at
once, the one whose prompt came first. So it tells the same time in each run, whatever tools and machines take. A group
that has not ended is late once one of its programs has sampled more than the last of a full batch.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from typing import NamedTuple

from tandem.types import Group


class End(NamedTuple):
    """When a group ends."""

    tokens: int  # of its longest program
    place: int  # of its prompt


class First:
    """The groups until `enough` of them are `usable`; those before that are not are kept beside them.

    >>> from tandem.types import Prompt
    >>> first = First(1, lambda group: True)
    >>> first.end(End(9, 0), Group(Prompt("slow", ()), ())); first.late(End(8, 1)), first.late(End(9, 1))
    (False, True)
    >>> first.end(End(7, 1), Group(Prompt("quick", ()), ())); [part[0].prompt.id for part in first.split()]
    ['quick', 'slow']
    """

    def __init__(self, enough: int, usable: Callable[[Group], bool]) -> None:
        self.enough = enough
        self.usable = usable
        self.ended: list[tuple[End, bool, Group]] = []  # in this order; whether it is usable
        self.until: End | None = None  # the batch is full then, or before

    def end(self, at: End, group: Group) -> None:
        """A group that has ended."""
        insort(self.ended, (at, self.usable(group), group), key=lambda one: one[0])
        usable = [at for at, usable, _ in self.ended if usable]
        self.until = usable[self.enough - 1] if len(usable) >= self.enough else None

    def late(self, at: End) -> bool:
        """Whether a group that ends then, or after, is not of the batch."""
        return self.until is not None and at > self.until

    def split(self) -> tuple[list[Group], list[Group]]:
        """The batch, and the groups that ended beyond it."""
        kept = [group for at, _, group in self.ended if not self.late(at)]
        return kept, [group for _, _, group in self.ended[len(kept) :]]
