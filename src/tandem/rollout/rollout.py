"""A step's rollouts: prompts in, groups of trajectories out as they end, on one engine's driver.

Programs alternate between the engine and their environments. Both answer with futures into one queue; the engine steps
while any request is in it, and nobody waits for an environment but where no program can run. A program is graded as it
ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any, Literal, Protocol

from tandem.columns import Columns
from tandem.engine.driver import GRACE_S, Driver, OnTokens
from tandem.errors import CapacityError, EngineError, ModelError
from tandem.numerics.random import derive_seed
from tandem.program.environment import Fold
from tandem.program.episode import Observed
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.first import End, First
from tandem.rollout.group import program_id
from tandem.rollout.history import split_cause
from tandem.rollout.trajectory import flatten
from tandem.trace import Trace
from tandem.types import Completion, Failure, Group, Message, Prompt, Request, StopReason, Trajectory, Turn

AHEAD = 4096  # programs that the engine has to choose from and to share prompts among; others are made as these end


class Playing(Protocol):
    """What rollouts need of an episode: program/pool.py has the one that runs elsewhere."""

    said: list[Message]  # since the prompt; `observe` adds what it observes

    @property
    def counts(self) -> Mapping[str, int]: ...  # of what happened so far

    def observe(self, last: bool = False, /) -> Future[Observed | Failure]: ...

    def score(self, unheard: int = 0, /) -> Future[float | Failure]: ...

    def teardown(self) -> None: ...


class Episodes(Protocol):
    """What rollouts need of an EnvironmentPool. `until_s` is on time.monotonic's clock."""

    def episode(self, prompt: Prompt, until_s: float, /) -> Playing: ...


@dataclass(slots=True)
class _Segment:
    """A context that only grows, and its turns."""

    start: tuple[int, ...]
    seed: int
    messages: Sequence[Message]  # that `start` renders
    begun: int = 0  # of what was said since the prompt: before it
    cause: str = ""  # see Trajectory
    turns: list[Turn] = field(default_factory=list)

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens of the next request: all of it, token for token."""
        parts = ((*turn.completion.tokens, *turn.observation_tokens) for turn in self.turns)
        return (*self.start, *(token for part in parts for token in part))

    @property
    def starts(self) -> list[int]:
        """Where in its context each turn begins."""
        lengths = (len(turn.completion.columns) + len(turn.observation_tokens) for turn in self.turns[:-1])
        return [*accumulate(lengths, initial=len(self.start))]


@dataclass(slots=True, eq=False)
class _Program:
    """One program while it runs."""

    id: str
    place: int  # of its prompt
    prompt: Prompt
    episode: Playing
    segments: list[_Segment]
    requests: int = 0
    sampled: int = 0  # tokens, in all turns that have ended
    drawn: int = 0  # in the one that has not, where somebody counts
    last: str = ""  # the limit for which no turn follows
    limits: dict[str, int] = field(default_factory=dict)  # that ended it, as counts
    outcome: float | Failure | None = None  # None while it runs

    @property
    def request_id(self) -> str:
        """Of its last request."""
        return f"{self.id}/{self.requests - 1}"

    def count(self, new: Columns) -> None:
        self.drawn += len(new)

    @property
    def turns(self) -> list[Turn]:
        return self.segments[-1].turns

    @property
    def trajectories(self) -> list[Trajectory]:
        assert self.outcome is not None, self.id
        observations = sum(bool(turn.observation_tokens) for segment in self.segments for turn in segment.turns)
        seen = {"tool_calls": 0} if self.prompt.tools else {"observations": observations}
        counts = Counter({**seen, **self.episode.counts, **self.limits})
        if unreadable := sum(len(message.faults) for message in self.episode.said):
            counts["unreadable_calls"] = unreadable
        counts.update(f"split_{segment.cause}" for segment in self.segments if segment.cause not in ("", "fold"))
        found, first_turn = list[Trajectory](), 0
        ends = [*(segment.begun for segment in self.segments[1:]), None]
        for number, (segment, end) in enumerate(zip(self.segments, ends, strict=True)):
            known = (segment.start, segment.turns, self.outcome, number, {} if number else counts, first_turn)
            flat = flatten(self.id, self.prompt.id, *known)
            said = tuple(self.episode.said[segment.begun : end])
            found.append(dataclasses.replace(flat, cause=segment.cause, said=said))
            first_turn += len(segment.turns)
        return found


Asked = Literal["engine", "environment", "reward"]


class _Waits:
    """The answers that programs wait for, of the engine and of environments."""

    def __init__(self, driver: Driver, trace: Trace) -> None:
        self.driver = driver
        self.trace = trace
        self.requests: dict[str, _Program] = {}  # in the engine, by request id
        self.asked: dict[_Program, Asked] = {}
        self._seen = 0
        self._ended: queue.SimpleQueue[tuple[_Program, str, Future[Any]]] = queue.SimpleQueue()

    def ask(self, program: _Program, asked: Asked, future: Future[Any]) -> None:
        """Wait for an environment."""
        self.asked[program] = asked
        future.add_done_callback(lambda ended: self._answered(program, ended))

    def submit(self, program: _Program, request: Request, on_tokens: OnTokens | None = None) -> None:
        """Wait for the engine."""
        future = self.driver.submit(request, on_tokens)
        self.requests[request.id] = program
        self.asked[program] = "engine"
        future.add_done_callback(lambda ended: self._ended.put((program, request.id, ended)))

    def _answered(self, program: _Program, ended: Future[Any]) -> None:
        self._ended.put((program, "", ended))
        if self.requests:
            with contextlib.suppress(EngineError):  # it stopped: its requests end with the reason
                self.driver.call(_nothing)  # an end for which `progress` waits where the driver has a thread

    def ended(self, wait_s: float) -> list[tuple[_Program, Asked, Future[Any]]]:
        """Those that ended since the last call. A step of the engine, or a wait of at most wait_s where it is idle."""
        if self._ended.empty():
            if self.requests:
                self._seen = self.driver.progress(self._seen, wait_s)
            else:
                acts = "environment" in self.asked.values()
                with self.trace.span("environment" if acts else "reward"):
                    self._wait(wait_s)
        found = []
        while not self._ended.empty():
            program, request_id, future = self._ended.get()
            self.requests.pop(request_id, None)
            if (asked := self.asked.pop(program, None)) is not None:
                found.append((program, asked, future))
        return found

    def drop(self, program: _Program) -> bool:
        """Wait for its environment no more, or have the engine answer soon; whether nothing comes any more."""
        if self.asked[program] != "engine":
            del self.asked[program]
            return True
        self.driver.abort(program.request_id)
        return False

    def _wait(self, wait_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._ended.put(self._ended.get(timeout=min(wait_s, 1e6)))

    def withdraw(self) -> list[tuple[_Program, Asked, Future[Any] | None]]:
        """Ends all that is left, with what the engine has; None where an answer does not come in GRACE_S."""
        for request_id in self.requests:
            self.driver.abort(request_id)
        found: dict[_Program, Future[Any]] = {}
        until_s = time.monotonic() + GRACE_S
        while len(found) < len(self.asked) and (left_s := until_s - time.monotonic()) > 0:
            if self._ended.empty():
                if any(program not in found for program in self.requests.values()):
                    self._seen = self.driver.progress(self._seen, left_s)
                else:
                    self._wait(left_s)
            while not self._ended.empty():
                program, _, future = self._ended.get()
                if program in self.asked:  # not dropped
                    found[program] = future
        left, self.asked, self.requests = self.asked, {}, {}
        return [(program, asked, found.get(program)) for program, asked in left.items()]


class Rollouts:
    """Runs the programs of a step to their ends.

    A program's tokens depend on (run_seed, step, prompt id, sibling) and the weights, not on what runs beside it or on
    the order in which environments answer.
    Trace spans: "rollout" for all of it, inside it "environment" and "reward" for waits in which the engine had nothing
    to do.
    """

    def __init__(
        self,
        driver: Driver,
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

    def collect(self, step: int, prompts: Sequence[Prompt], first: First | None = None) -> list[Group]:
        """All groups of a step, or the first, in the prompts' order."""
        groups = {group.prompt.id: group for group in self.run(step, prompts, first)}
        return [groups[prompt.id] for prompt in prompts if prompt.id in groups]

    def run(self, step: int, prompts: Sequence[Prompt], first: First | None = None) -> Iterator[Group]:
        """One group of samples_per_prompt programs for each prompt, as they end; closed early, it withdraws the rest.

        Where the `first` make a batch, they come when it is full; the others are withdrawn, and counted in the trace.
        Whatever goes wrong in one program is its trajectories' Failure. CapacityError where a prompt does not fit the
        engine; nothing of this step is then left in it.
        """
        assert len({prompt.id for prompt in prompts}) == len(prompts), "prompt ids repeat within a step"
        running = _Step(self, step, prompts, first)
        try:
            while running.left:
                with self.trace.span("rollout"):
                    groups = running.advance()
                yield from groups
        finally:
            running.withdraw()


class _Step:
    """The programs of one step."""

    def __init__(self, rollouts: Rollouts, step: int, prompts: Sequence[Prompt], first: First | None) -> None:
        self.by = rollouts
        self.step = step
        self.prompts = prompts
        self.size = rollouts.config.samples_per_prompt
        self.until_s = rollouts.clock() + rollouts.config.deadline_s
        self.left = len(prompts)  # groups
        self._waits = _Waits(rollouts.driver, rollouts.trace)
        self._programs = self._made()
        self._ended: dict[int, list[_Program]] = {}  # of groups that have not ended, by place
        self._groups: list[Group] = []  # that have, and were not given
        self._first = first
        self._running: dict[int, list[_Program]] = {}  # where the first make the batch: of groups that have not ended
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
        waiting = sum(asked != "reward" for asked in self._waits.asked.values())
        for program in islice(self._programs, AHEAD - waiting):
            self._submit(program)
        for program, asked, future in self._waits.ended(self.until_s - self.by.clock()):
            self._take(program, asked, future.result(0))

    def withdraw(self) -> None:
        """Nothing of this step stays in the engine or with environments."""
        for program, _, future in self._waits.withdraw():
            self._leave(program, _known(future))
        if self._first is not None:
            for name, number in self._extra.items():
                self.by.trace.count(name, number)

    def _made(self) -> Iterator[_Program]:
        """Programs in order, siblings together."""
        for place, prompt in enumerate(self.prompts):
            tokens = self.by.renderer.prompt_tokens(prompt.messages, prompt.tools)
            for sibling in range(self.size):
                if place in self._late:
                    break
                seed = derive_seed(self.by.run_seed, self.step, prompt.id, sibling)
                episode = self.by.environments.episode(prompt, self.until_s)
                segments = [_Segment(tokens, seed, prompt.messages)]
                program = _Program(program_id(prompt.id, self.step, sibling), place, prompt, episode, segments)
                if self._first is not None:
                    self._running.setdefault(place, []).append(program)
                yield program

    def _submit(self, program: _Program) -> None:
        # One seed for all turns: noise is keyed by absolute position, and no position of a segment is sampled twice.
        segment = program.segments[-1]
        sampling, most = self.by.sampling, self.by.config.max_program_tokens
        if most and most - program.sampled < sampling.max_new_tokens:
            sampling = dataclasses.replace(sampling, max_new_tokens=most - program.sampled)
        program.requests += 1
        given = (program.request_id, program.id, segment.context, sampling, segment.seed)
        priority = int(program.requests > 1 and self.by.config.returning_first)
        request = Request(*given, priority=priority, group=f"{program.prompt.id}/{self.step}")
        self._waits.submit(program, request, program.count if self._first is not None else None)

    def _take(self, program: _Program, asked: Asked, answer: Any) -> None:
        """What came back for a program."""
        if program.place in self._late:
            self._leave(program, answer)
            return
        if asked == "engine":
            program.turns.append(Turn(answer))
            self._say(program, answer.tokens)
            self._limit(program, answer)
            if answer.stop_reason is StopReason.ABORTED:
                self._end(program, Failure("engine", "its request was withdrawn"))
            elif answer.stop_reason is StopReason.FAILED:
                self._end(program, Failure("engine", answer.failure))
            elif self.by.config.max_turns > 1 or program.prompt.tools:
                last = bool(program.last)  # it acts on that one too, and is heard no more
                self._waits.ask(program, "environment", program.episode.observe(last))
            else:
                self._grade(program)
        elif asked == "reward" or isinstance(answer, Failure):
            self._end(program, answer)
        else:
            program.turns[-1] = dataclasses.replace(program.turns[-1], reward=answer.reward, state=answer.state)
            if answer.messages is None:
                self._grade(program)
            elif program.last:
                program.limits[program.last] = 1
                self._grade(program)
            else:
                self._continue(program, answer.messages)

    def _limit(self, program: _Program, answer: Completion) -> None:
        """Whether it has reached a limit: with this turn it ends."""
        config, first = self.by.config, program.segments[0].turns[0].completion
        program.sampled, program.drawn = program.sampled + len(answer.columns), 0
        if config.max_program_tokens and program.sampled >= config.max_program_tokens:
            program.last = "token_limit"
            if answer.stop_reason is StopReason.LENGTH:  # in the middle of the turn
                program.limits[program.last] = 1
        elif program.requests >= config.max_turns:
            program.last = "turn_limit"
        elif config.max_program_s and self.by.clock() - first.started_s >= config.max_program_s:
            program.last = "time_limit"

    def _say(self, program: _Program, tokens: Sequence[int]) -> None:
        """A completion, as the message that the environment reads."""
        tools, said = program.prompt.tools, program.episode.said
        parsed = self.by.config.history == "render"
        said.append(self.by.renderer.message(tokens, tools, len(said), parsed=parsed))

    def _grade(self, program: _Program, unheard: int = 0) -> None:
        with self.by.trace.span("reward"):  # those of linear cost are computed here
            future = program.episode.score(unheard)
        self._waits.ask(program, "reward", future)

    def _continue(self, program: _Program, observed: tuple[Message, ...] | Fold) -> None:
        try:
            self._append(program, observed)
        except ModelError as error:  # the template does not take what this environment said
            self._end(program, Failure("environment", str(error)))
            return
        try:
            self._submit(program)
        except CapacityError:  # the prompt did fit: this conversation has outgrown the engine, and is graded as it is
            if not program.turns:
                program.segments.pop()
            program.limits["context_limit"] = 1
            self._grade(program, len(observed.messages if isinstance(observed, Fold) else observed))

    def _append(self, program: _Program, observed: tuple[Message, ...] | Fold) -> None:
        """Tokens of an observation, behind the last turn or as the start of a segment."""
        renderer, segment, prompt = self.by.renderer, program.segments[-1], program.prompt
        if isinstance(observed, Fold):
            start = renderer.prompt_tokens(observed.messages, prompt.tools)
            self._begin(program, start, tuple(observed.messages), "fold")
            return
        if self.by.config.history == "render":
            self._render(program, observed)
            return
        completion = segment.turns[-1].completion
        said = program.episode.said[segment.begun : len(program.episode.said) - len(observed) - 1]
        tokens = renderer.observation_tokens(completion.tokens, observed, (*segment.messages, *said), prompt.tools)
        segment.turns[-1] = dataclasses.replace(segment.turns[-1], observation_tokens=tokens)

    def _render(self, program: _Program, observed: Sequence[Message]) -> None:
        """The whole conversation, behind the last turn where it goes on from there, else as the start of a segment."""
        renderer, segment = self.by.renderer, program.segments[-1]
        messages = (*segment.messages, *program.episode.said[segment.begun :])
        whole, context = renderer.conversation_tokens(messages, program.prompt.tools, observed), segment.context
        said = [message for message in program.episode.said[segment.begun :] if message.role == "assistant"]
        if cause := split_cause(renderer, context, whole, segment.starts, said):
            self._begin(program, whole, messages, cause)
        else:
            segment.turns[-1] = dataclasses.replace(segment.turns[-1], observation_tokens=whole[len(context) :])

    def _begin(self, program: _Program, start: tuple[int, ...], messages: tuple[Message, ...], cause: str) -> None:
        """A segment of a program's own noise."""
        seed = derive_seed(program.segments[-1].seed, len(program.segments), program.prompt.id, 0)
        program.segments.append(_Segment(start, seed, messages, len(program.episode.said), cause))

    def _end(self, program: _Program, outcome: float | Failure) -> None:
        program.outcome = outcome
        program.episode.teardown()
        ended = self._ended.setdefault(program.place, [])
        ended.append(program)
        if len(ended) == self.size:
            ended = sorted(self._ended.pop(program.place), key=lambda one: int(one.id.rpartition("/")[2]))
            group = Group(program.prompt, tuple(t for one in ended for t in one.trajectories))
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
                self._late.add(place)
                self.left -= 1
                self._extra.update(extra_programs=self.size, extra_tokens=sum(one.sampled for one in siblings))
                for program in siblings:
                    if program.outcome is None and self._waits.drop(program):
                        program.episode.teardown()
        if not self.left:
            self._groups, beyond = first.split()
            for group in beyond:
                tokens = sum(trajectory.num_sampled for trajectory in group.trajectories)
                self._extra.update(extra_programs=self.size, extra_tokens=tokens)

    def _leave(self, program: _Program, answer: Any) -> None:
        """A program that is withdrawn, with what the engine had of its last turn."""
        if program.place in self._late and isinstance(answer, Completion):
            self._extra["extra_tokens"] += len(answer.columns)
        program.episode.teardown()

    def _expire(self) -> None:
        """The deadline has passed: what is left is withdrawn, or not started, and fails; what was graded stays."""
        late = Failure("deadline", f"generation took longer than {self.by.config.deadline_s:g} s (rollout.deadline_s)")
        for program, asked, future in self._waits.withdraw():
            known = _known(future)
            if program.place in self._late:
                self._leave(program, known)
                continue
            if asked == "engine" and known is not None and known.tokens:
                program.turns.append(Turn(known))
            self._end(program, known if asked == "reward" and known is not None else late)
        for program in self._programs:
            self._end(program, late)


def _end_of(siblings: Sequence[_Program]) -> End:
    """When they end, at the earliest."""
    return End(max(one.sampled + one.drawn for one in siblings), siblings[0].place)


def _known(future: Future[Any] | None) -> Any:
    """What has come, if it has."""
    return None if future is None or future.exception(0) is not None else future.result(0)


def _nothing() -> None:
    """Asked of a driver to wake who waits for it."""
