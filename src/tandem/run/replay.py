"""A run once more, from its journal: the same tokens under the same weights, the same batches, and so the same weights.

Nothing is drawn by a clock here. Each program draws under each version as many tokens as the journal says, reads the
observations and gets the rewards that it says (as long as it says what it said then), and each step takes the groups
that the journal chose. A fact that is changed changes what follows from it, and nothing before.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tandem.algo.advantage import Selection
from tandem.engine.driver import Driver
from tandem.errors import RunFolderError
from tandem.program.episode import Observed
from tandem.program.pool import EnvironmentPool
from tandem.rollout.flow import Ended, Flow
from tandem.rollout.program import Episodes, Played, Playing, Program
from tandem.rollout.queue import Queue
from tandem.rollout.rollout import Rollouts
from tandem.run import local
from tandem.run.clock import WallClock, started
from tandem.run.config import CheckpointConfig, EvaluationConfig, RunConfig, TrackConfig
from tandem.run.folder import RunFolder, saved_config
from tandem.run.journal import FACTS, Fact, Read
from tandem.run.loop import Stages, run_loop
from tandem.run.parted import PartedSession
from tandem.run.parts import build_parts
from tandem.types import Failure, Group, Message, Prompt, WeightVersion


@dataclass(frozen=True, slots=True)
class Repeated:
    """A step that was repeated.

    >>> Repeated(3, "9f2c", "9f2c", 0).same
    True
    """

    step: int
    recorded: str  # hash of the weights after it
    found: str
    other_groups: int  # that ended since the step before with other tokens than the journal has

    @property
    def same(self) -> bool:
        return self.recorded == self.found


OnStep = Callable[[Repeated], None]


class _Recorded:
    """Environments that say again what they said, to a program that says again what it said."""

    def __init__(self, pool: Episodes, group_size: int) -> None:
        self.pool = pool
        self.group_size = group_size
        self.played: dict[str, list[Played]] = {}  # by prompt, of its siblings
        self._opened: Counter[str] = Counter()

    def episode(self, prompt: Prompt, until_s: float) -> Playing:
        sibling = self._opened[prompt.id] % self.group_size
        self._opened[prompt.id] += 1
        return _Episode(self.pool, prompt, self.played[prompt.id][sibling], until_s)


class _Episode:
    """Asks the environment itself from where its program said something else."""

    def __init__(self, pool: Episodes, prompt: Prompt, played: Played, until_s: float) -> None:
        self.said: list[Message] = []
        self.until_s = until_s
        self._open = lambda: pool.episode(prompt, until_s)
        self._played = played
        self._heard = 0
        self._real: Playing | None = None

    @property
    def counts(self) -> Mapping[str, int]:
        return self._played.counts if self._real is None else self._real.counts

    def recall(self, said: Sequence[Message], counts: Mapping[str, int], earned: float) -> None:
        raise AssertionError("a run that is repeated begins at its first step")

    def prepare(self) -> None:
        """The environment itself may not be asked at all."""

    def observe(self, last: bool = False) -> Future[Observed | Failure]:
        place, played = self._heard, self._played
        self._heard += 1
        if self._real is None and self._as_then():
            if place < len(played.observed):
                observed = played.observed[place]
                if observed.messages is not None and not last:
                    messages = observed.messages
                    self.said.extend(messages if isinstance(messages, tuple) else messages.messages)
                return _done(observed)
            if isinstance(played.outcome, Failure):
                return _done(played.outcome)
        return self._asked().observe(last)

    def score(self, unheard: int = 0) -> Future[float | Failure]:
        if self._real is None and tuple(self.said) == self._played.said:
            return _done(self._played.outcome)
        return self._asked().score(unheard)

    def teardown(self) -> None:
        if self._real is not None:
            self._real.teardown()

    def _as_then(self) -> bool:
        return tuple(self.said) == self._played.said[: len(self.said)]

    def _asked(self) -> Playing:
        if self._real is None:
            self._real = self._open()
            self._real.said = self.said
        return self._real


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class ReplaySession(PartedSession):
    """The stages of a run, over a journal. `workers` engines share the groups."""

    def __init__(self, *parts: Any, read: Read, workers: int, on_step: OnStep) -> None:
        super().__init__(*parts)
        self.source = read
        self.on_step = on_step
        asked = self.config.rollout
        self.under, _ = read.settings()
        self.queue = Queue(asked.prompts_per_step, self.config.asynchrony, self.config.seed, asked.redraws)
        self.ended = {fact["number"]: read.ended(fact) for fact in read.facts if fact.kind == "end"}
        self.played = {one.id: one for ended in self.ended.values() for one in ended.played}
        recorded = _Recorded(self.pool, asked.samples_per_prompt)
        for ended in self.ended.values():
            recorded.played[ended.group.prompt.id] = list(ended.played)
        engines = [self.parts.engine, *(self.parts.another() for _ in range(workers - 1))]
        self.engines = engines
        timeless = dataclasses.replace(asked, deadline_s=1e12)
        given = (self.parts.renderer, recorded, timeless, self.config.seed, self.trace)
        self.flows = [Flow(Rollouts(Driver(engine), *given, clock=lambda: 0.0)) for engine in engines]
        for flow in self.flows:
            flow.turns.allowed = self._allowed
            flow.turns.overtime = self._overtime
        self.facts: Iterator[Fact] = iter([fact for fact in read.facts if fact.kind != "start"])
        self.hand: dict[str, Ended] = {}  # ended here, by group
        self.version = 0
        self.others = 0

    def stages(self) -> Stages:
        return dataclasses.replace(super().stages(), stop=lambda: False)

    def _left(self, program: Program) -> dict[int, int]:
        """Version -> tokens that it has yet to draw, by the journal."""
        drawn = dict(program.spans)
        return {version: count - drawn.get(version, 0) for version, count in self.played[program.id].spans}

    def _allowed(self, program: Program) -> int | None:
        """To its natural end under the version that drew its last token; before, as many as were drawn."""
        played = self.played[program.id]
        last = max((version for version, _ in played.spans), default=-1)
        if last >= 0 and self.version >= last and not _cut_off(played):
            return None
        return self._left(program).get(self.version, 0)

    def _overtime(self, program: Program) -> bool:
        played = self.played[program.id]
        return "time_limit" in played.limits and program.requests >= played.requests

    def part(self, step: int) -> list[Group]:
        with self.trace.span("rollout"):
            for fact in self.facts:
                if fact.kind == "choose":
                    choice = self.chosen(self.source.folder / FACTS, fact, step)
                    self.fairness.drop([self.queue.waiting[number].ended.group for number in choice.stale])
                    if self.queue.take(choice):
                        return self.given()
                else:
                    self._follow(fact)
        raise RunFolderError(f"{self.source.folder / FACTS} ends before step {step} is chosen.")

    def _follow(self, fact: Fact) -> None:
        self.follows(self.source.folder / FACTS, fact)
        if fact.kind == "begin":
            number = self.queue.begin(fact["version"])
            if number in self.ended:  # else nothing was learned of it
                prompt = self.pool.prompt(fact["prompt"])
                group = self._flow(number).begin(fact["step"], prompt)
                if group != fact["group"]:
                    raise RunFolderError(
                        f"{self.source.folder / FACTS} begins group {fact['group']} with the prompt of {group}: it was "
                        "changed, or the task was. Restore it."
                    )
        elif fact.kind == "end":
            ended = self._await(fact["number"], fact["group"])
            self.others += _tokens(ended.group) != _tokens(self.ended[fact["number"]].group)
            self.queue.end(fact["number"], ended, fact["usable"])

    def _flow(self, number: int) -> Flow:
        return self.flows[number % len(self.flows)]

    def _await(self, number: int, group: str) -> Ended:
        flow = self._flow(number)
        while group not in self.hand:
            if flow.stalled:
                self._fail(flow)
            before = len(self.hand)
            self._advance(flow)
            if group not in self.hand and flow.stalled and len(self.hand) == before:
                raise RunFolderError(
                    f"group {number} ({group}) does not end where {self.source.folder / FACTS} says that it did: what "
                    "it draws parted from the journal before. Compare the steps above."
                )
        return self.hand.pop(group)

    def _advance(self, flow: Flow) -> None:
        for ended in flow.advance(0.05):
            self.hand[ended.id] = ended

    def _fail(self, flow: Flow) -> None:
        """Programs that were cut off, where they were."""
        for program in list(flow.turns.later):
            played = self.played[program.id]
            if _cut_off(played) and not any(self._left(program).values()):
                assert isinstance(played.outcome, Failure)
                flow.fail(program, played.outcome)

    def publish(self, step: int) -> WeightVersion:
        with self.trace.span("rollout"):
            for fact in self.facts:
                if fact.kind in ("update", "choose"):
                    break
                self._follow(fact)
            else:
                raise RunFolderError(f"{self.source.folder / FACTS} ends before step {step} was learned.")
            if (fact.kind, fact["step"]) != ("update", step):
                raise RunFolderError(
                    f"{self.source.folder / FACTS} has a {fact.kind} of step {fact['step']} where the update of step "
                    f"{step} is due: it was changed. Restore it."
                )
            for flow in self.flows:
                while not flow.stalled:
                    self._advance(flow)
        with self.trace.span("publish"), ExitStack() as held:
            for flow in self.flows:
                held.enter_context(flow.held())
            version = self.parts.publisher.publish(step)
            for engine in self.engines:
                if engine.version != version:
                    engine.receive(version)
            self.version = step
            self.queue.learned()
        self.on_step(Repeated(step, fact["weights"], version.digest, self.others))
        self.others = 0
        return version

    def account_for(self, groups: Sequence[Group], batch: Selection, taken_out: int) -> None:
        """The run's own ledger has it."""

    def check_ledger(self) -> None:
        """As above."""

    def close(self) -> None:
        for flow in self.flows:
            flow.withdraw()


def _cut_off(played: Played) -> bool:
    """Whether a clock ended it, in the midst of a turn or of a call."""
    return isinstance(played.outcome, Failure) and played.outcome.where == "deadline"


def _tokens(group: Group) -> list[bytes]:
    return [trajectory.columns["tokens"].tobytes() for trajectory in group.trajectories]


class Quiet:
    """A display that shows nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        return

    def update(self, row: Mapping[str, Any]) -> None:
        return

    def note(self, text: str) -> None:
        return


def replay(run: Path, *, workers: int = 1, on_step: OnStep, note: Callable[[str], None]) -> list[Repeated]:
    """Repeat a run; the run itself is not changed. RunFolderError where it can't be."""
    config = saved_config(run, RunConfig)
    found: list[Repeated] = []

    def seen(one: Repeated) -> None:
        found.append(one)
        on_step(one)

    quiet = dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, replicas=1),
        evaluation=EvaluationConfig(prompts=0),
        checkpoint=CheckpointConfig(minutes=0.0),
        track=TrackConfig(),
    )
    with tempfile.TemporaryDirectory(prefix="replay-") as aside:
        if config.asynchrony.mode == "sync":
            _in_steps(run, quiet, Path(aside) / "run", seen)
        else:
            _by_journal(run, quiet, Path(aside) / "run", workers, seen, note)
    return found


def _in_steps(run: Path, config: RunConfig, aside: Path, on_step: OnStep) -> None:
    """A run in steps is a function of its config."""
    with RunFolder.open(run) as folder:
        rows = {row["step"]: row["weights"] for row in folder.rows() if row["step"]}

    class Comparing(Quiet):
        def update(self, row: Mapping[str, Any]) -> None:
            if row["step"] in rows:
                on_step(Repeated(row["step"], rows[row["step"]], row["weights"], 0))

    local.train(config, out=aside, resume=None, display=Comparing(), last=max(rows, default=0))


def _by_journal(
    run: Path, config: RunConfig, aside: Path, workers: int, on_step: OnStep, note: Callable[[str], None]
) -> None:
    if config.asynchrony.at_update == "keep":
        raise RunFolderError(
            f"{run} kept keys and values over updates (asynchrony.at_update=keep): which weights computed which of "
            "them is not in the journal, so it can't be repeated. Runs with carry, restart or finish can."
        )
    read = Read(run)
    if read.facts and (since := read.facts[0].values.get("step", 0) if read.facts[0].kind == "start" else 0):
        raise RunFolderError(
            f"{run / FACTS} begins behind step {since}: what came before is gone, and can't be repeated."
        )
    last = max((fact["step"] for fact in read.facts if fact.kind == "update"), default=0)
    if read.cut:
        note(f"the journal was cut: {read.cut}; it is repeated up to step {last}")
    with ExitStack() as leaving:
        pool = EnvironmentPool(config.task)
        leaving.callback(pool.close)
        parts = build_parts(config.model, config.engine, 0, config, task=config.task)
        pool.ready()
        parts.tokenizer.now = started(run) or parts.tokenizer.now
        folder = leaving.enter_context(RunFolder.create(aside, config))
        session = ReplaySession(
            config, folder, pool, parts, Quiet(), WallClock(), read=read, workers=workers, on_step=on_step
        )
        leaving.callback(session.close)
        run_loop(session.stages(), 1, last)
