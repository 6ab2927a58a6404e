"""A step's rollouts: prompts in, groups of trajectories out, on one engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from tandem.errors import CapacityError
from tandem.numerics.random import derive_seed
from tandem.program.render import Renderer
from tandem.program.task import Conversation
from tandem.rollout.config import RolloutConfig
from tandem.rollout.trajectory import flatten
from tandem.trace import Trace
from tandem.types import Completion, Failure, Group, Message, Prompt, Request, StopReason, Trajectory, Turn

AHEAD = 4096  # requests that the engine has to choose from and to share prompts among; others are made as these end


class GenerationEngine(Protocol):
    """What rollouts need of engine/engine.py."""

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: Request, /) -> None: ...

    def abort(self, request_id: str, /) -> Completion | None: ...

    def step(self) -> list[Completion]: ...


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


class Rollouts:
    """Runs the programs of a step to their ends.

    A program's tokens depend on (run_seed, step, prompt id, sibling) and the weights, not on what runs beside it.
    Trace spans: "rollout" for generation, inside it "environment" for observations and "reward" for grading.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        renderer: Renderer,
        environment: Grader,
        config: RolloutConfig,
        run_seed: int,
        trace: Trace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
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
            live: dict[str, _Rollout] = {}
            try:
                rollouts = self._generate(self._programs(step, prompts), live, until_s)
            finally:
                for request_id in live:
                    self.engine.abort(request_id)
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
                yield _Rollout(f"{prompt.id}/{step}/{sibling}", prompt, tokens, seed, context=tokens)

    def _submit(self, rollout: _Rollout, live: dict[str, _Rollout]) -> None:
        number = len(rollout.turns)
        request_id = f"{rollout.id}/{number}"
        # One seed for all turns: noise is keyed by absolute position, and no position is sampled twice.
        self.engine.submit(Request(request_id, rollout.id, rollout.context, self.sampling, rollout.seed))
        live[request_id] = rollout

    def _generate(self, programs: Iterator[_Rollout], live: dict[str, _Rollout], until_s: float) -> list[_Rollout]:
        """Run programs to their ends and return them; at the deadline the rest is withdrawn, or not started, and fails.

        At most AHEAD are live.
        """
        made: list[_Rollout] = []
        while True:
            if self.clock() >= until_s:
                rest = list(programs)
                self._expire(live, rest)
                return made + rest
            for program in islice(programs, AHEAD - len(live)):
                made.append(program)
                self._submit(program, live)
            if not live:
                return made
            assert self.engine.has_work, f"the engine has no work, but {len(live)} requests have not come back"
            ended = []
            for completion in self.engine.step():
                rollout = live.pop(completion.request_id, None)
                if rollout is not None:  # else it ended in the step in which an earlier run gave it up
                    ended.append((rollout, completion))
            if ended:
                self._take(ended, live, until_s)

    def _take(self, ended: Sequence[tuple[_Rollout, Completion]], live: dict[str, _Rollout], until_s: float) -> None:
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

    def _continue(self, rollout: _Rollout, messages: tuple[Message, ...], live: dict[str, _Rollout]) -> None:
        completion = rollout.turns[-1].completion
        observed = self.renderer.observation_tokens(completion.tokens, messages)
        rollout.turns[-1] = Turn(completion, observed)
        rollout.said.extend(messages)
        rollout.context = (*rollout.context, *completion.tokens, *observed)
        try:
            self._submit(rollout, live)
        except CapacityError as error:  # the prompt did fit: this conversation has outgrown the engine
            rollout.failure = Failure("engine", f"turn {len(rollout.turns) + 1} does not fit: {error}")

    def _expire(self, live: dict[str, _Rollout], rest: Sequence[_Rollout]) -> None:
        reason = f"generation took longer than {self.config.deadline_s:g} s (rollout.deadline_s)"
        for rollout in rest:
            rollout.failure = Failure("deadline", reason)
        for request_id, rollout in live.items():
            completion = self.engine.abort(request_id)
            if completion is not None and completion.tokens:
                rollout.turns.append(Turn(completion))
            rollout.failure = Failure("deadline", reason)
        live.clear()

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
