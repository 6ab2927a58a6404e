"""Over-sampling: more groups run than a batch takes, and the first to end make it, by a clock of tokens.

By this clock a group ends when its longest program has sampled its last token, over all its turns; of two that end at
once, the one whose prompt came first. So it tells the same time in each run, whatever tools and machines take. A group
that has not ended is late once one of its programs has sampled more than the last of a full batch.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from tandem.algo.lengths import Dispatched, Race, of_group
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
        self.withdrawn: list[tuple[int, dict[str, int]]] = []  # place; the group's programs, and what each has sampled

    def end(self, at: End, group: Group) -> None:
        """A group that has ended."""
        insort(self.ended, (at, self.usable(group), group), key=lambda one: one[0])
        usable = [at for at, usable, _ in self.ended if usable]
        self.until = usable[self.enough - 1] if len(usable) >= self.enough else None

    def late(self, at: End) -> bool:
        """Whether a group that ends then, or after, is not of the batch."""
        return self.until is not None and at > self.until

    def dispatched(self, fates: Mapping[str, str], most: int) -> list[Dispatched]:
        """All groups that ran; `fates` are those of the trajectories of the batch, `most` the tokens of any program.

        Of a group beyond the batch no more is told than that it ends after the batch is full, which is so in each run.
        What was seen of it until it was withdrawn depends on the machine.
        """
        late = [*self.withdrawn]
        number = len(self.ended) + len(late)
        race = Race(number - 1, self.enough)
        found = []
        for at, usable, group in self.ended:
            if self.late(at):
                one = of_group(group)
                late.append((at.place, dict(zip(one.programs, one.tokens, strict=True))))
            else:
                turn = (at.place + 0.5) / number
                found.append(replace(of_group(group, fates), usable=usable, turn=turn, keep=None, race=race))
        for place, tokens in late:
            assert self.until is not None
            ended = self.until.tokens >= most  # then it ends there too, at its own turn
            found.append(
                Dispatched(
                    next(iter(tokens)).rpartition("/")[0],
                    tuple(tokens),
                    tuple(min(n, self.until.tokens) for n in tokens.values()),
                    ("late",) * len(tokens),
                    ended,
                    turn=((place if ended else self.until.place) + 0.5) / number,
                    keep=None,
                    race=race,
                )
            )
        return found

    def split(self) -> tuple[list[Group], list[Group]]:
        """The batch, and the groups that ended beyond it."""
        kept = [group for at, _, group in self.ended if not self.late(at)]
        return kept, [group for _, _, group in self.ended[len(kept) :]]
