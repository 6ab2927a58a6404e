"""Groups between rollouts and the learner: which may begin, which a step takes, and what becomes of the others.

No thread, no clock: what is chosen is a function of the order in which groups began and ended. P is the groups of a
step, S the most updates that a group may trail, W the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tandem.numerics.random import derive_seed
from tandem.rollout.config import AsyncConfig
from tandem.rollout.flow import Ended
from tandem.types import Group


@dataclass(slots=True)
class Waiting:
    """A group that has ended.

    >>> from tandem.types import Prompt
    >>> Waiting(3, Ended("p/1", Group(Prompt("p", ()), ()), ()), 0).uses
    0
    """

    number: int  # in the order in which groups began
    ended: Ended
    begun_at: int  # version of the engine when it began
    uses: int = 0  # batches that it was in

    @property
    def version(self) -> int:
        """The oldest that drew of it."""
        first = self.ended.first_version
        return self.begun_at if first is None else first


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step takes, by number.

    >>> Choice(1, (0, 1)).numbers
    (0, 1)
    """

    step: int
    numbers: tuple[int, ...]  # of the batch, or of the part of it that is there (asynchrony.stream)
    again: tuple[int, ...] = ()  # of the batch too: groups that were in one before
    stale: tuple[int, ...] = ()  # dropped: too old
    unusable: tuple[int, ...] = ()  # ended since the last step, and replaced by others: their rewards are equal


class Queue:
    """Bounded: (S + 1) P groups run, wait or are learned at most, and `replay_groups` are kept for another use."""

    def __init__(self, size: int, config: AsyncConfig, run_seed: int = 0, redraws: int = 0) -> None:
        self.size = size
        self.config = config
        self.run_seed = run_seed
        self.redraws = redraws
        self.begun = 0  # groups, ever; the next one's number
        self.replaced = 0  # of these, stale or unusable: others began in their place
        self.running: dict[int, int] = {}  # number -> version of the engine when it began
        self.waiting: dict[int, Waiting] = {}  # in the order in which they ended
        self.unusable: dict[int, Waiting] = {}
        self.parts: list[tuple[Waiting, ...]] = []  # of the present step's batch: what each choice took
        self.due: list[tuple[Waiting, ...]] = []  # parts of it that an earlier sitting took
        self.kept: dict[int, Waiting] = {}  # for another use, in the order of their last
        self.redrawn = 0  # in the present step

    @property
    def chosen(self) -> list[int]:
        """Groups that are learned for the first time, until the update."""
        return [one.number for one in self.taken if one.uses == 1]

    @property
    def taken(self) -> list[Waiting]:
        """These, and what was replaced: all that was in no batch before, and has no fate until the update."""
        return [one for part in (*self.parts, *self.due) for one in part if one.uses <= 1]

    @property
    def had(self) -> int:
        """Groups that the present step's batch has so far."""
        return sum(one.uses > 0 for part in self.parts for one in part)

    @property
    def whole(self) -> bool:
        """Whether the present step has its batch: where it is not streamed, by one choice."""
        return self.had >= self.size if self.config.stream else bool(self.parts)

    @property
    def step(self) -> int:
        """Of the next group to begin: its seeds are those that a loop in steps would give it."""
        return 1 + (self.begun - self.replaced) // self.size

    @property
    def fresh(self) -> int:
        """Groups of a batch that were in none before, where enough are kept for the others."""
        return math.ceil(self.size / self.config.replay_uses)

    @property
    def capacity(self) -> int:
        """Groups that run, wait or are learned at most: (S + 1) P, of P those that are used for the first time."""
        return max(self.size, (self.config.most_lag + 1) * self.fresh)

    def __len__(self) -> int:
        """Groups that run, wait or are being learned."""
        return len(self.running) + len(self.waiting) + len(self.chosen)

    @property
    def room(self) -> int:
        """Groups that may begin."""
        return self.capacity - len(self)

    def begin(self, version: int) -> int:
        """The number of a group that begins."""
        number = self.begun
        self.begun += 1
        self.running[number] = version
        return number

    def end(self, number: int, ended: Ended, usable: bool = True) -> Waiting:
        """A group has ended. Not usable: another begins in its place, `redraws` times P in a step at most."""
        entry = Waiting(number, ended, self.running.pop(number))
        if not usable and self.redrawn < self.redraws * self.size:
            self.redrawn += 1
            self.replaced += 1
            self.unusable[number] = entry
        else:
            self.waiting[number] = entry
        return entry

    def choose(self, step: int) -> Choice | None:
        """What step `step` takes, where there is enough: a batch, or the groups of it that are there, and in the first
        part those that it takes again. It learns on version step - 1."""
        stale = [n for n, one in self.waiting.items() if self._lag(step, one) > self.config.most_lag]
        stale = stale if self.config.order == "drop" else []
        fresh = [number for number in self.waiting if number not in stale]
        if self.parts:
            numbers = self._fresh(fresh, self.size - self.had)
            if not (numbers or stale):
                return None
            return Choice(step, tuple(numbers), stale=tuple(stale), unusable=tuple(self.unusable) if numbers else ())
        kept = [one for one in self.kept.values() if self._lag(step, one) <= self.config.replay_lag]
        again = self._again(step, kept, self.size - self.fresh)
        count = self.size - len(again)  # of the batch
        numbers = self._fresh(fresh, count)
        if not (numbers or again) if self.config.stream else len(numbers) < count:
            return Choice(step, (), stale=tuple(stale)) if stale else None
        return Choice(step, tuple(numbers), tuple(again), tuple(stale), tuple(self.unusable))

    def take(self, choice: Choice) -> list[Waiting]:
        """The groups of a choice, which they leave the queue for; empty where it only drops."""
        for number in choice.stale:
            del self.waiting[number]
        self.replaced += len(choice.stale)
        if not (choice.numbers or choice.again):
            return []
        assert not self.whole, f"step {choice.step} takes more before {self.chosen} were learned"
        again = [self.kept.pop(number) for number in choice.again]
        fresh = [self.waiting.pop(number) for number in choice.numbers]
        unusable = [self.unusable.pop(number) for number in choice.unusable]
        if self.config.order in ("fifo", "window"):
            for one in fresh:
                lag = self._lag(choice.step, one)
                assert lag <= self.bound, f"group {one.number} trails step {choice.step} by {lag} > {self.bound}"
        for one in [*again, *fresh]:
            one.uses += 1
            if one.uses < self.config.replay_uses:
                self.kept[one.number] = one
        self._evict(choice.step)
        self.parts.append((*fresh, *again, *unusable))
        if self.whole:
            self.redrawn = 0
        return [*self.parts[-1]]

    def _evict(self, step: int) -> None:
        """Let go what is kept and is too old, and the oldest of what is beyond `replay_groups`."""
        for number in [one.number for one in self.kept.values() if self._lag(step, one) > self.config.replay_lag]:
            del self.kept[number]
        for number in [*self.kept][: -self.config.replay_groups] if self.config.replay_groups else ():
            del self.kept[number]

    def take_due(self) -> None:
        """The next part that an earlier sitting took, and did not come to update on."""
        self.parts.append(self.due.pop(0))

    def learned(self) -> None:
        """The update of what was chosen is published: as many may begin."""
        self.parts = []

    @property
    def bound(self) -> int:
        """Updates that a group trails at most when it is first learned, in fifo order and in a window.

        S + ceil((W - 1) / P), where each is learned once.
        """
        window = self.config.window if self.config.order == "window" else 1
        return math.ceil(self.capacity / self.fresh) - 1 + math.ceil((window - 1) / self.fresh)

    def _lag(self, step: int, one: Waiting) -> int:
        return step - 1 - one.version

    def _fresh(self, ended: Sequence[int], count: int) -> list[int]:
        """`count` of those that ended, in the order of the config; fewer where it has no more."""
        if self.config.order in ("completion", "drop"):
            return list(ended[:count])
        open_ = sorted([*self.running, *ended])
        window = self.config.window if self.config.order == "window" else 1
        found: list[int] = []
        while len(found) < count:
            # From the oldest that nothing was learned of, which those behind it can't pass by more than the window.
            allowed = {number for number in open_ if number < open_[0] + window}
            first = next((number for number in ended if number in allowed and number not in found), None)
            if first is None:
                break
            found.append(first)
            open_.remove(first)
        return found

    def _again(self, step: int, kept: Sequence[Waiting], most: int) -> list[int]:
        order = list(kept)
        if self.config.replay_order == "newest":
            order.reverse()
        elif self.config.replay_order == "random":
            Random(derive_seed(self.run_seed, step, "replay", 0)).shuffle(order)
        elif self.config.replay_order == "spread":
            order.sort(key=lambda one: -spread(one.ended.group))
        return [one.number for one in order[:most]]


def spread(group: Group) -> float:
    """Variance of its programs' rewards.

    >>> from tandem.types import Prompt
    >>> spread(Group(Prompt("p", ()), ()))
    0.0
    """
    rewards = [program[0].reward for program in group.programs if program[0].failure is None]
    mean = math.fsum(rewards) / len(rewards) if rewards else 0.0
    return math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards) if rewards else 0.0
