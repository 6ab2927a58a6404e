"""A step's rollouts: prompts in, groups of trajectories out as they end, on one engine's driver.

Programs alternate between the engine and their environments. Both answer with futures into one queue; the engine steps
while any request is in it, and nobody waits for an environment but where no program can run. A program is graded as it
ends.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from tandem.engine.driver import Endpoint
from tandem.errors import CapacityError
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.early import Early
from tandem.rollout.first import End, First
from tandem.rollout.program import Episodes, Program
from tandem.rollout.turns import Turns
from tandem.rollout.waits import known
from tandem.trace import Trace
from tandem.types import Completion, Failure, Group, Prompt, Turn

AHEAD = 4096  # programs that the engine has to choose from and to share prompts among; others are made as these end


class Rollouts:
    """Runs the programs of a step to their ends.

    A program's tokens depend on (run_seed, step, prompt id, sibling) and the weights, not on what runs beside it or on
    the order in which environments answer.
    Trace spans: "rollout" for all of it, inside it "environment" and "reward" for waits in which the engine had nothing
    to do.
    """

    def __init__(
        self,
        driver: Endpoint,
        renderer: Renderer,
        environments: Episodes,
        config: RolloutConfig,
        run_seed: int,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.driver = driver
        self.renderer = renderer
        self.environments = environments
        self.config = config
        self.run_seed = run_seed
        self.trace = trace or Trace()
        self.clock = clock
        self.sampling = config.sampling(renderer.stop_token_ids)
        self.unfit_fail = False  # prompts that do not fit the engine, in place of the step

    def over(self, program: Program) -> None:
        """It asks the engine for nothing more."""
        self.driver.finish(program.id, self.config.tenant)

    def collect(
        self, step: int, prompts: Sequence[Prompt], first: First | None = None, early: Early | None = None
    ) -> list[Group]:
        """All groups of a step, or the first, in the prompts' order."""
        groups = {group.prompt.id: group for group in self.run(step, prompts, first, early)}
        return [groups[prompt.id] for prompt in prompts if prompt.id in groups]

    def run(
        self, step: int, prompts: Sequence[Prompt], first: First | None = None, early: Early | None = None
    ) -> Iterator[Group]:
        """One group of samples_per_prompt programs for each prompt, as they end; closed early, it withdraws the rest.

        Where the `first` make a batch, they come when it is full; the others are withdrawn, and counted in the trace.
        With `early`, a group's programs begin in parts, and some never.
        Whatever goes wrong in one program is its trajectories' Failure. CapacityError where a prompt does not fit the
        engine, and `unfit_fail` does not make it one; nothing of this step is then left in it.
        """
        assert len({prompt.id for prompt in prompts}) == len(prompts), "prompt ids repeat within a step"
        running = _Step(self, step, prompts, first, early)
        try:
            while running.left:
                with self.trace.span("rollout"):
                    groups = running.advance()
                yield from groups
        finally:
            running.withdraw()


class _Step:
    """The programs of one step."""

    def __init__(
        self, rollouts: Rollouts, step: int, prompts: Sequence[Prompt], first: First | None, early: Early | None
    ) -> None:
        self.by = rollouts
        self.step = step
        self.prompts = prompts
        self.size = rollouts.config.samples_per_prompt
        self.until_s = rollouts.clock() + rollouts.config.deadline_s
        self.left = len(prompts)  # groups
        self._turns = Turns(rollouts, self._end, counts=first is not None)
        self._programs = self._made()
        self._early = early
        self._rest: dict[int, Iterator[Program]] = {}  # siblings that have not begun, by place
        self._begun = Counter[int]()  # siblings, by place
        self._expired = False
        self._ended: dict[int, list[Program]] = {}  # of groups that have not ended, by place
        self._groups: list[Group] = []  # that have, and were not given
        self._first = first
        self._running: dict[int, list[Program]] = {}  # where the first make the batch: of groups that have not ended
        self._late: set[int] = set()  # places of groups that were withdrawn
        self._extra = Counter(extra_programs=0, extra_tokens=0)

    def advance(self) -> list[Group]:
        """The groups that end next."""
        while self.left and not self._groups:
            if self.by.clock() >= self.until_s:
                self._expire()
            else:
                self._progress()
            if self._first is not None:
                self._race(self._first)
        given, self._groups = self._groups, []
        return given

    def _progress(self) -> None:
        """What is to be begun, and what comes back next."""
        waits = self._turns.waits
        waiting = sum(asked != "reward" for asked in waits.asked.values())
        for program in islice(self._programs, max(0, AHEAD - waiting)):
            try:
                self._turns.submit(program)
            except CapacityError as error:
                if not self.by.unfit_fail:
                    raise
                reason = str(error).removeprefix(f"request {program.request_id!r}: ")  # one of all siblings
                self._end(program, Failure("prompt", reason))
        if not waits.asked:  # none of them fits
            return
        for program, asked, future in waits.ended(self.until_s - self.by.clock()):
            if program.place in self._late:
                self._leave(program, future.result(0))
            else:
                self._turns.take(program, asked, future.result(0))

    def withdraw(self) -> None:
        """Nothing of this step stays in the engine or with environments."""
        for program, _, future in self._turns.waits.withdraw():
            self._leave(program, known(future))
        if self._first is not None:
            for name, number in self._extra.items():
                self.by.trace.count(name, number)

    def _made(self) -> Iterator[Program]:
        """Programs in order, siblings together."""
        for place, prompt in enumerate(self.prompts):
            self._rest[place] = self._turns.made(self.step, place, prompt, self.until_s)
            yield from self._part(place, self.size if self._early is None else self._early.part)

    def _part(self, place: int, count: int) -> Iterator[Program]:
        """The next siblings of a group."""
        self._begun[place] += count
        for _ in range(count):
            if place in self._late:
                break
            program = next(self._rest[place])
            if self._first is not None:
                self._running.setdefault(place, []).append(program)
            yield program

    def _end(self, program: Program, outcome: float | Failure) -> None:
        program.outcome = outcome
        self.by.over(program)
        program.episode.teardown()
        ended = self._ended.setdefault(program.place, [])
        ended.append(program)
        if len(ended) == self._begun[program.place]:
            ended = sorted(ended, key=lambda one: int(one.id.rpartition("/")[2]))
            stopped = len(ended) < self.size and not self._expired
            group = Group(program.prompt, tuple(t for one in ended for t in one.trajectories), stopped)
            if self._early is not None and not self._expired and (more := self._early.next(group)):
                for sibling in self._part(program.place, more):
                    self._turns.submit(sibling)
                return
            del self._ended[program.place], self._rest[program.place]
            self.left -= 1
            if self._first is None:
                self._groups.append(group)
            else:
                self._first.end(_end_of(self._running.pop(program.place)), group)

    def _race(self, first: First) -> None:
        """Withdraw the groups that will not be of the batch; where no other runs, give those that are."""
        for place, siblings in list(self._running.items()):
            if first.late(_end_of(siblings)):
                del self._running[place]
                self._late, self.left = self._late | {place}, self.left - 1
                self._extra.update(extra_programs=self.size, extra_tokens=sum(one.sampled for one in siblings))
                first.withdrawn.append((place, {one.id: one.sampled + one.drawn for one in siblings}))
                for program in siblings:
                    if program.outcome is None and self._turns.waits.drop(program):
                        program.episode.teardown()
        if not self.left:
            self._groups, beyond = first.split()
            for group in beyond:
                tokens = sum(trajectory.num_sampled for trajectory in group.trajectories)
                self._extra.update(extra_programs=self.size, extra_tokens=tokens)

    def _leave(self, program: Program, answer: Any) -> None:
        """A program that is withdrawn, with what the engine had of its last turn."""
        if program.place in self._late and isinstance(answer, Completion):
            self._extra["extra_tokens"] += len(answer.columns)
        self.by.over(program)
        program.episode.teardown()

    def _expire(self) -> None:
        """The deadline has passed: what is left is withdrawn, or not started, and fails; what was graded stays."""
        self._expired = True
        late = Failure("deadline", f"generation took longer than {self.by.config.deadline_s:g} s (rollout.deadline_s)")
        for program, asked, future in self._turns.waits.withdraw():
            came = known(future)
            if program.place in self._late:
                self._leave(program, came)
                continue
            if asked == "engine" and came is not None and came.tokens:
                program.turns.append(Turn(came))
            self._end(program, came if asked == "reward" and came is not None else late)
        for program in self._programs:
            self._end(program, late)


def _end_of(siblings: Sequence[Program]) -> End:
    """When they end, at the earliest."""
    return End(max(one.sampled + one.drawn for one in siblings), siblings[0].place)
