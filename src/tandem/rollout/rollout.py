"""A step's rollouts: prompts in, groups of trajectories out, on one engine's driver."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from tandem.engine.driver import GRACE_S, Driver
from tandem.errors import CapacityError
from tandem.numerics.random import derive_seed
from tandem.program.render import Renderer
from tandem.program.task import Conversation
from tandem.rollout.config import RolloutConfig
from tandem.rollout.trajectory import flatten
from tandem.trace import Trace
from tandem.types import Completion, Failure, Group, Message, Prompt, Request, StopReason, Trajectory, Turn

AHEAD = 4096  # requests that the engine has to choose from and to share prompts among; others are made as these end


class Grader(Protocol):
    """What rollouts need of program/task.py. `until_s` is on time.monotonic's clock."""

    def grade(self, conversations: Sequence[Conversation], until_s: float, /) -> list[float | Failure]: ...

    def observe(
        self, conversations: Sequence[Conversation], until_s: float, /
    ) -> list[tuple[Message, ...] | None | Failure]: ...


@dataclass(slots=True)
class _Rollout:
    """One program while it runs."""

    id: str
    group: str
    prompt: Prompt
    prompt_tokens: tuple[int, ...]
    seed: int
    context: tuple[int, ...]  # the tokens of the next request: prompt and all turns, token for token
    turns: list[Turn] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)  # since the prompt
    failure: Failure | None = None

    @property
    def conversation(self) -> Conversation:
        return self.prompt, tuple(self.said)


class _Live:
    """The requests that rollouts wait for."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.rollouts: dict[str, _Rollout] = {}  # by request id
        self._seen = 0
        self._ended: deque[tuple[str, Future[Completion]]] = deque()  # in the order in which they ended

    def submit(self, rollout: _Rollout, request: Request) -> None:
        future = self.driver.submit(request)
        self.rollouts[request.id] = rollout
        future.add_done_callback(lambda ended: self._ended.append((request.id, ended)))

    def ended(self, wait_s: float) -> list[tuple[_Rollout, Completion]]:
        """Those that ended since the last call; waits at most wait_s for one."""
        self._seen = self.driver.progress(self._seen, wait_s)
        found = []
        while self._ended:
            request_id, future = self._ended.popleft()
            found.append((self.rollouts.pop(request_id), future.result(0)))
        return found

    def withdraw(self) -> list[tuple[_Rollout, Completion | None]]:
        """Ends all that are left, with what they have; None where the engine does not give it in GRACE_S."""
        for request_id in self.rollouts:
            self.driver.abort(request_id)
        left, found = self.rollouts, dict[str, Completion | None]()
        until_s = time.monotonic() + GRACE_S
        while left.keys() - found.keys() and time.monotonic() < until_s:
            self._seen = self.driver.progress(self._seen, until_s - time.monotonic())
            while self._ended:
                request_id, future = self._ended.popleft()
                found[request_id] = None if future.exception(0) else future.result(0)
        self.rollouts = {}
        return [(rollout, found.get(request_id)) for request_id, rollout in left.items()]


class Rollouts:
    """Runs the programs of a step to their ends.

    A program's tokens depend on (run_seed, step, prompt id, sibling) and the weights, not on what runs beside it.
    Trace spans: "rollout" for generation, inside it "environment" for observations and "reward" for grading.
    """

    def __init__(
        self,
        driver: Driver,
        renderer: Renderer,
        environment: Grader,
        config: RolloutConfig,
        run_seed: int,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.driver = driver
        self.renderer = renderer
        self.environment = environment
        self.config = config
        self.run_seed = run_seed
        self.trace = trace or Trace()
        self.clock = clock
        self.sampling = config.sampling(renderer.stop_token_ids)

    def run(self, step: int, prompts: Sequence[Prompt]) -> list[Group]:
        """One group of samples_per_prompt trajectories for each prompt, in order.

        Whatever goes wrong in one program is its trajectory's Failure. CapacityError where a prompt does not fit the
        engine; nothing of this step is then left in it.
        """
        assert len({prompt.id for prompt in prompts}) == len(prompts), "prompt ids repeat within a step"
        until_s = self.clock() + self.config.deadline_s
        with self.trace.span("rollout"):
            live = _Live(self.driver)
            try:
                rollouts = self._generate(self._programs(step, prompts), live, until_s)
            finally:
                live.withdraw()
            with self.trace.span("reward"):
                trajectories = self._graded(rollouts, until_s)
        size = self.config.samples_per_prompt
        return [
            Group(prompt, tuple(trajectories[place * size : (place + 1) * size]))
            for place, prompt in enumerate(prompts)
        ]

    def _programs(self, step: int, prompts: Iterable[Prompt]) -> Iterator[_Rollout]:
        """Programs in order, siblings together."""
        for prompt in prompts:
            tokens = self.renderer.prompt_tokens(prompt.messages)
            for sibling in range(self.config.samples_per_prompt):
                seed = derive_seed(self.run_seed, step, prompt.id, sibling)
                group = f"{prompt.id}/{step}"
                yield _Rollout(f"{group}/{sibling}", group, prompt, tokens, seed, context=tokens)

    def _submit(self, rollout: _Rollout, live: _Live) -> None:
        number = len(rollout.turns)
        # One seed for all turns: noise is keyed by absolute position, and no position is sampled twice.
        given = (f"{rollout.id}/{number}", rollout.id, rollout.context, self.sampling, rollout.seed)
        live.submit(rollout, Request(*given, group=rollout.group))

    def _generate(self, programs: Iterator[_Rollout], live: _Live, until_s: float) -> list[_Rollout]:
        """Run programs to their ends and return them; at the deadline the rest is withdrawn, or not started, and fails.

        At most AHEAD are live.
        """
        made: list[_Rollout] = []
        while True:
            if self.clock() >= until_s:
                rest = list(programs)
                self._expire(live, rest)
                return made + rest
            for program in islice(programs, AHEAD - len(live.rollouts)):
                made.append(program)
                self._submit(program, live)
            if not live.rollouts:
                return made
            ended = live.ended(until_s - self.clock())
            if ended:
                self._take(ended, live, until_s)

    def _take(self, ended: Sequence[tuple[_Rollout, Completion]], live: _Live, until_s: float) -> None:
        """Record completions; programs that go on observe and ask again."""
        asking = []
        for rollout, completion in ended:
            rollout.turns.append(Turn(completion))
            rollout.said.append(Message("assistant", self.renderer.text(completion.tokens)))
            if completion.stop_reason is StopReason.ABORTED:
                rollout.failure = Failure("engine", "its request was withdrawn")
            elif completion.stop_reason is StopReason.FAILED:
                rollout.failure = Failure("engine", completion.failure)
            elif len(rollout.turns) < self.config.max_turns:
                asking.append(rollout)
        if not asking:
            return
        with self.trace.span("environment"):
            answers = self.environment.observe([rollout.conversation for rollout in asking], until_s)
        for rollout, messages in zip(asking, answers, strict=True):
            if isinstance(messages, Failure):
                rollout.failure = messages
            elif messages is not None:
                self._continue(rollout, messages, live)

    def _continue(self, rollout: _Rollout, messages: tuple[Message, ...], live: _Live) -> None:
        completion = rollout.turns[-1].completion
        observed = self.renderer.observation_tokens(completion.tokens, messages)
        rollout.turns[-1] = Turn(completion, observed)
        rollout.said.extend(messages)
        rollout.context = (*rollout.context, *completion.tokens, *observed)
        try:
            self._submit(rollout, live)
        except CapacityError as error:  # the prompt did fit: this conversation has outgrown the engine
            rollout.failure = Failure("engine", f"turn {len(rollout.turns) + 1} does not fit: {error}")

    def _expire(self, live: _Live, rest: Sequence[_Rollout]) -> None:
        reason = f"generation took longer than {self.config.deadline_s:g} s (rollout.deadline_s)"
        for rollout in rest:
            rollout.failure = Failure("deadline", reason)
        for rollout, completion in live.withdraw():
            if completion is not None and completion.tokens:
                rollout.turns.append(Turn(completion))
            rollout.failure = Failure("deadline", reason)

    def _graded(self, rollouts: Sequence[_Rollout], until_s: float) -> list[Trajectory]:
        whole = [rollout for rollout in rollouts if rollout.failure is None]
        rewards = self.environment.grade([rollout.conversation for rollout in whole], until_s)
        outcomes: dict[str, float | Failure] = {
            rollout.id: reward for rollout, reward in zip(whole, rewards, strict=True)
        }
        trajectories = []
        for rollout in rollouts:
            outcome = rollout.failure if rollout.failure is not None else outcomes[rollout.id]
            trajectories.append(flatten(rollout.id, rollout.prompt.id, rollout.prompt_tokens, rollout.turns, outcome))
        return trajectories
