"""Rollouts without steps: groups begin one by one, go on over updates of the weights, and come as they end.

An update comes between `hold` and `go_on`: each token was drawn by one version, over keys and values of that version
alone. So the log-prob that the learner gives it under that version is the engine's to the bit, and which tokens came of
which version is all that a repetition has to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tandem.rollout.program import Program
from tandem.rollout.turns import Turns
from tandem.types import Failure, Group, Prompt

if TYPE_CHECKING:
    from tandem.rollout.rollout import Rollouts


class Flow:
    """The groups that run. One thread's own; what the engine of `by` has beside them is somebody else's."""

    def __init__(self, by: Rollouts) -> None:
        self.by = by
        self._turns = Turns(by, self._end)
        self._until_s: dict[Program, float] = {}  # of those that run, in the order in which they began
        self._siblings: dict[str, list[Program]] = {}  # of groups that run
        self._ended: list[Group] = []

    def __len__(self) -> int:
        """Groups that run."""
        return len(self._siblings)

    def begin(self, step: int, prompt: Prompt) -> None:
        """A group; its seeds are those of a step. CapacityError where the prompt does not fit the engine."""
        until_s = self.by.clock() + self.by.config.deadline_s
        siblings = list(self._turns.made(step, 0, prompt, until_s))
        self._siblings[siblings[0].group] = siblings
        for program in siblings:
            self._until_s[program] = until_s
            self._turns.submit(program)

    def advance(self, wait_s: float) -> list[Group]:
        """Groups that have ended. A step of the engine, or a wait of at most wait_s where it has nothing to do."""
        if self._until_s and not self._ended:
            first = next(iter(self._until_s.values()))
            if first <= self.by.clock():
                self._expire()
            else:
                for program, asked, future in self._turns.waits.ended(min(wait_s, first - self.by.clock())):
                    self._turns.take(program, asked, future.result(0))
        ended, self._ended = self._ended, []
        return ended

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine has nothing of these groups meanwhile."""
        self._turns.hold()
        try:
            yield
        finally:
            self._turns.go_on()

    def withdraw(self) -> None:
        """Nothing of them stays in the engine or with environments."""
        for program, _, _ in self._turns.waits.withdraw():
            program.episode.teardown()
        self._until_s, self._siblings = {}, {}

    def _expire(self) -> None:
        """What has run for its time is withdrawn, and fails."""
        reason = f"generation took longer than {self.by.config.deadline_s:g} s (rollout.deadline_s)"
        with self.held():
            for program, until_s in list(self._until_s.items()):
                if until_s <= self.by.clock():
                    self._turns.drop(program)
                    self._end(program, Failure("deadline", reason))

    def _end(self, program: Program, outcome: float | Failure) -> None:
        program.outcome = outcome
        program.episode.teardown()
        del self._until_s[program]
        siblings = self._siblings[program.group]
        if all(one.outcome is not None for one in siblings):
            del self._siblings[program.group]
            self._ended.append(Group(program.prompt, tuple(t for one in siblings for t in one.trajectories)))
