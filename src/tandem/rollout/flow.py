"""Rollouts without steps: groups begin one by one, go on over updates of the weights, and come as they end.

An update comes between `hold` and `go_on`: each token was drawn by one version, over keys and values of that version
alone. So the log-prob that the learner gives it under that version is the engine's to the bit, and which tokens came of
which version is all that a repetition has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.rollout.program import Paused, Played, Program
from tandem.rollout.turns import Turns
from tandem.types import Failure, Group, Prompt

STOOD_S = 0.05  # that a deadline is put off by at least

if TYPE_CHECKING:
    from tandem.rollout.rollout import Rollouts


@dataclass(frozen=True, slots=True)
class Ended:
    """A group that has ended, and what is needed to have it again."""

    id: str  # of the group: prompt and step
    group: Group
    played: tuple[Played, ...]

    @property
    def first_version(self) -> int | None:
        """The oldest that drew a token of it; None where nothing was drawn."""
        return min((span[0] for one in self.played for span in one.spans), default=None)


class Flow:
    """The groups that run. One thread's own; what the engine of `by` has beside them is somebody else's.

    waited_s: seconds, so far, in which the engine had to wait for the learner.
    """

    def __init__(
        self,
        by: Rollouts,
        turns: Callable[[Rollouts, Callable[..., None]], Turns] = Turns,
        waited_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.by = by
        self.waited_s = waited_s
        self.turns = turns(by, self._end)
        self._until_s: dict[Program, float] = {}  # of those that run, in the order in which they began
        self._siblings: dict[str, list[Program]] = {}  # of groups that run
        self._ended: list[Ended] = []
        self._left_s = by.clock()  # nothing was drawn since
        self._waited_s = waited_s()  # of that, known when it was left

    def __len__(self) -> int:
        """Groups that run."""
        return len(self._siblings)

    @property
    def stalled(self) -> bool:
        """Whether nothing is waited for: what runs has drawn what it may."""
        return not (self.turns.waits.asked or self._ended)

    @property
    def requests(self) -> int:
        """That the engine has of them; a program that waits for its environment has none."""
        return len(self.turns.waits.requests)

    @property
    def drawn_tokens(self) -> int:
        """By the programs of groups that run."""
        return sum(program.drawn_tokens for siblings in self._siblings.values() for program in siblings)

    @property
    def program_ids(self) -> list[str]:
        """Of groups that run."""
        return [program.id for siblings in self._siblings.values() for program in siblings]

    def begin(self, step: int, prompt: Prompt) -> str:
        """A group; its seeds are those of a step. CapacityError where the prompt does not fit the engine."""
        self._put_off()
        until_s = self.by.clock() + self.by.config.deadline_s
        siblings = list(self.turns.made(step, 0, prompt, until_s))
        for program in siblings:
            self._until_s[program] = until_s
            self.turns.submit(program)
        self._siblings[siblings[0].group] = siblings
        return siblings[0].group

    def advance(self, wait_s: float) -> list[Ended]:
        """Groups that have ended. A step of the engine, or a wait of at most wait_s where it has nothing to do.

        Deadlines do not run while nothing is drawn. Between two calls weights change, held-out prompts are answered, a
        checkpoint is written; within one the engine waits for the learner.
        """
        self._put_off()
        if self._until_s and not self._ended:
            first = next(iter(self._until_s.values()))
            if first <= self.by.clock():
                self._expire()
            else:
                for program, asked, future in self.turns.waits.ended(min(wait_s, first - self.by.clock())):
                    if asked == "engine" and future.exception(0) is not None:
                        self.turns.unanswered(program)
                    self.turns.take(program, asked, future.result(0))
        self._left_s = self.by.clock()
        return self.ended()

    def _put_off(self) -> None:
        """All deadlines, by what passed since it was left, where that is anything."""
        now_s, waited_s = self.by.clock(), self.waited_s()
        stood_s, self._left_s = now_s - self._left_s + waited_s - self._waited_s, now_s
        self._waited_s = waited_s
        for program in self._until_s if stood_s > STOOD_S else ():
            self._until_s[program] += stood_s
            program.episode.until_s = self._until_s[program]

    def ended(self) -> list[Ended]:
        """Groups that have, where nothing is to go on."""
        ended, self._ended = self._ended, []
        return ended

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine has nothing of these groups meanwhile."""
        self.turns.hold()
        try:
            yield
        finally:
            self.turns.go_on()

    def pause(self) -> list[tuple[str, list[Paused]]]:
        """While held: the groups that run, as they are kept."""
        waiting = self.turns.waits.asked
        return [
            (name, [Paused.of(one, waiting.get(one, "" if one.outcome is not None else "engine")) for one in siblings])
            for name, siblings in self._siblings.items()
        ]

    def resume(self, groups: Sequence[tuple[str, Sequence[Paused]]]) -> None:
        """What `pause` gave, in another process: each program goes on with its next token."""
        until_s = self.by.clock() + self.by.config.deadline_s
        for name, paused in groups:
            programs = [one.program(self.by.environments.episode(one.prompt, until_s)) for one in paused]
            self._siblings[name] = programs
            for one, program in zip(paused, programs, strict=True):
                if program.outcome is None:
                    self._until_s[program] = until_s
                    self.turns.again(program, "engine" if one.anew else one.asked)

    def restart(self) -> int:
        """While held: what runs begins anew, with the same seeds; returns how many tokens it had drawn."""
        lost = 0
        for siblings in self._siblings.values():
            for place, program in enumerate(siblings):
                if program.outcome is not None:
                    continue
                drawn = program.drawn_tokens
                lost += drawn
                self.turns.drop(program)
                program.episode.teardown()
                until_s = self._until_s.pop(program)
                first = program.segments[0]
                first.turns.clear()
                episode = self.by.environments.episode(program.prompt, until_s)
                siblings[place] = anew = Program(program.id, 0, program.prompt, episode, [first], ran=drawn > 0)
                self._until_s[anew] = until_s
                self.turns.submit(anew)
        return lost

    def withdraw(self) -> None:
        """Nothing of them stays in the engine or with environments."""
        for program, _, _ in self.turns.waits.withdraw():
            program.episode.teardown()
        self._until_s, self._siblings = {}, {}

    def _expire(self) -> None:
        """What has run for its time is withdrawn, and fails."""
        reason = f"generation took longer than {self.by.config.deadline_s:g} s (rollout.deadline_s)"
        with self.held():
            for program, until_s in list(self._until_s.items()):
                if until_s <= self.by.clock():
                    self.turns.drop(program)
                    self._end(program, Failure("deadline", reason))

    def fail(self, program: Program, failure: Failure) -> None:
        """End one that has drawn what it may."""
        self.turns.later.remove(program)
        if program.carried is not None:
            self.turns.keep(program)
        self._end(program, failure)

    def _end(self, program: Program, outcome: float | Failure) -> None:
        program.outcome = outcome
        self.by.over(program)
        program.episode.teardown()
        del self._until_s[program]
        siblings = self._siblings[program.group]
        if all(one.outcome is not None for one in siblings):
            del self._siblings[program.group]
            group = Group(program.prompt, tuple(t for one in siblings for t in one.trajectories))
            self._ended.append(Ended(program.group, group, tuple(map(Played.of, siblings))))
