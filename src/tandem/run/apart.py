"""An engine in a worker's process (run/workers.py), as the loop knows it: asked, stepped and told of weights like one
that is here, and giving the same tokens, which depend on requests and weights alone.

So a worker that died or stalled is no loss: another takes its place, has the newest weights from where they are
published, and is asked for all that had not come back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.columns import Columns
from tandem.engine.admit import count_pages
from tandem.engine.batch import INITIAL, Batch, Sampled, Stats
from tandem.engine.config import EngineConfig
from tandem.engine.engine import Decode, Engine
from tandem.engine.layout import KvLayout
from tandem.engine.share import Terms
from tandem.engine.space import Space
from tandem.errors import DeliveryError, WorkerError, WorkerLied
from tandem.models.config import AdapterConfig, ModelConfig
from tandem.models.spec import ModelSpec
from tandem.run.workers import START, Backend, Pending, Seat, Spec
from tandem.sync.ways import Way
from tandem.types import Completion, Request, Sample, StopReason, WeightVersion

if TYPE_CHECKING:
    from tandem.algo.pack import PromptTotal

SLICE_S = 0.025  # of the engine's steps, between looks at what is asked of it meanwhile, where nothing ends earlier


@dataclass(frozen=True, slots=True)
class EngineGiven:
    """What an engine's worker is made of."""

    source: str  # of the model, resolved
    model: ModelConfig
    engine: EngineConfig  # with the memory that the plan decided
    adapter: AdapterConfig | None = None  # that what is published is of; the weights are the source's then


class Elsewhere:
    """What an engine's checks ask of a runner, where none is here."""

    def __init__(self, layout: KvLayout, vocab_size: int) -> None:
        self.layout, self.vocab_size = layout, vocab_size

    def run(self, batch: Batch) -> Sampled:
        raise AssertionError("its engine runs in another process")

    def release_memory(self) -> None: ...


class RemoteEngine(Engine):
    """Checks requests here, and has them run by a worker; a worker that fails is replaced.

    The worker has its next slice to run while what the last one ended is read here, so that several engines which one
    thread steps in turn run at once.
    """

    def __init__(
        self,
        backend: Backend,
        given: EngineGiven,
        spec: ModelSpec,
        decode: Decode,
        way: Way,
        name: str = "engine",
    ) -> None:
        dtype = given.model.dtype if given.engine.dtype == "same" else given.engine.dtype
        layout, engine = KvLayout.for_engine(spec, given.engine, dtype, given.model.kv), given.engine
        num_pages = count_pages(layout, engine)
        runner = Elsewhere(layout, spec.vocab_size)
        super().__init__(runner, engine, num_pages, max_context=spec.max_position, decode=decode)
        self.seat = Seat(backend, Spec(name, "tandem.run.roles:EngineWorker", given))
        self.way = way  # that its weights come by
        self.crashed: Callable[[int], None] = _nobody  # told of tokens that a worker took with it
        self._live: dict[str, Request] = {}
        self._new: list[Request] = []  # of these, what the worker was not asked for
        self._finished: list[tuple[str, str]] = []  # programs, and their tenants, that the worker was not told of
        self._terms: dict[str, Terms] = {}  # that tenants were promised, whichever worker it is
        self._promised = True  # the worker knows them
        self._heard: dict[str, int] = {}  # requests whose tokens are asked for on their way: from which one on
        self._drawn: dict[str, tuple[int, Columns]] = {}  # of these, what came, and from which one on
        self._space: Space | None = None
        self._slice: Pending | None = None  # that it runs; none where nothing is live
        self._counts, self._earlier = Stats(), Stats()  # of this worker, and of those before it
        self._returned = 0  # tokens that this worker handed over
        self._lost: WorkerError | None = None  # why there is no worker
        self._begin()

    def _begin(self) -> None:
        """Have a new worker serve what is served."""
        before_s = time.monotonic()
        there_s = self.seat.ask(START, "clock").result()
        self._ahead_s = there_s - (before_s + time.monotonic()) / 2  # another machine's clock is another
        self._join(self.version)

    def _join(self, version: WeightVersion) -> None:
        """Another reader of the worker's, and by it the version whole, where there is one."""
        name, wait_s = self.seat.spec.name, self.seat.config.deadline_s / 2
        opened = self.seat.ask("publish", "open", self.way.address(name), wait_s)
        _both(lambda: self.way.meet(name), opened)
        if version != INITIAL:
            self._taken(version, _both(lambda: self.way.again(name), self._asked_for(version)))

    def _asked_for(self, version: WeightVersion) -> Pending:
        return self.seat.ask("publish", "receive", version, self.seat.config.deadline_s / 2)

    def _replace(self, error: WorkerError) -> None:
        """Another worker, asked for all that had not come back. Raises the last error where none may come."""
        if taken := self._counts.sampled_tokens - self._returned:
            self.crashed(taken)
        self._earlier, self._counts = _summed(self._earlier, self._counts), Stats()
        self._returned, self._slice, self._space = 0, None, None
        again = f", and asked again for {len(self._live)} requests" if self._live else ""
        try:
            while True:
                if error.worker != self.seat.spec.name:  # the learner, whose part it is to send
                    raise error
                self.seat.replace(error, again)
                try:
                    self._begin()
                    break
                except WorkerError as failed:
                    error = failed
        except WorkerError as last:
            self._lost = last
            raise
        self._new, self._promised = list(self._live.values()), not self._terms

    def taking(self, version: WeightVersion) -> Callable[[], None]:
        """As sync/transport.py's Peer says. `receive` of this process's engine is what follows."""
        asked = self._asked_for(version) if self._lost is None else None

        def taken() -> None:
            try:
                try:
                    if asked is not None:
                        self._taken(version, asked.result())
                except DeliveryError:  # damaged on its way: whole, this time
                    self._join(version)
                super(RemoteEngine, self).receive(version)
            except WorkerError as error:
                super(RemoteEngine, self).receive(version)
                self._replace(error)
            if self._lost is not None:
                raise self._lost

        return taken

    def _taken(self, version: WeightVersion, serves: WeightVersion) -> None:
        if serves != version:
            raise WorkerLied(
                self.seat.spec.name,
                "publish",
                f"it serves version {serves.step} ({serves.digest[:8]}), where {version.step} ({version.digest[:8]}) "
                "was published. Nothing was sampled from it.",
            )

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._undelivered)

    @property
    def stats(self) -> Stats:
        return _summed(self._earlier, self._counts)

    def submit(self, request: Request) -> None:
        """As Engine's; the worker hears of it with the next step."""
        self.check(request)
        assert request.id not in self._live, request.id
        self._live[request.id] = request
        self._new.append(request)

    def finish_program(self, program_id: str, tenant: str = "") -> None:
        """As Engine's; the worker hears of it with the next step."""
        if self.scheduler.programs is not None:
            self._finished.append((program_id, tenant))

    def space(self) -> Space | None:
        """As Engine's, as it was a slice ago."""
        if self._space is not None and not self._live:
            pool, size = self.scheduler.pool, self.scheduler.config.page_tokens
            self._space.tokens = self.runner.layout.capacity_tokens(pool.num_pages, size)
        return self._space

    def loads(self) -> dict[str, float]:
        """As Engine's: of what has not come back."""
        shares = self.scheduler.config.order == "shares"
        return dict(Counter(request.tenant for request in self._live.values())) if shares else {}

    def promise(self, terms: Mapping[str, Terms]) -> None:
        """As Engine's; the worker hears of it with the next step."""
        self._terms |= terms
        self._promised = False

    def drawn(self, request_id: str, first: int) -> Columns:
        """As Engine's, of a request that was asked for here before: as it was a slice ago."""
        if request_id in self._live:
            self._heard[request_id] = first
        begin, columns = self._drawn.get(request_id, (0, Columns({})))
        return columns.slice(first - begin) if 0 <= first - begin < len(columns) else Columns({})

    def abort(self, request_id: str) -> Completion | None:
        """As Engine's. Raises nothing of a worker's: where none is left, the next step says why."""
        if (request := self._live.get(request_id)) is None:
            return None
        if request in self._new:
            self._new.remove(request)
        elif self._lost is None:
            try:
                self._undelivered += self._advanced()  # first: what is drawn of it by then is counted there
                if request_id not in self._live:
                    return None  # it has ended, and comes with the next step
                completion, self._counts = self.seat.ask("rollout", "abort", request_id).result()
                if completion is None:
                    return None
                del self._live[request_id]
                return self._here(completion)
            except WorkerError as error:
                self._live.pop(request_id, None)
                with contextlib.suppress(WorkerError):
                    self._replace(error)
        self._live.pop(request_id, None)
        now, nothing = self.clock(), Columns.of(tokens=(), logprobs=(), versions=())
        return Completion(request_id, nothing, StopReason.ABORTED, now, now, now)

    def step(self) -> list[Completion]:
        """Completions as they come, or none after SLICE_S. WorkerError where no worker is left to ask."""
        done, self._undelivered = self._undelivered, []
        while self._live:
            if self._lost is not None:
                raise self._lost
            try:
                if self._slice is None:
                    self._advance()
                done += self._advanced()
                if self._live:
                    self._advance()
                break
            except WorkerError as error:
                self._replace(error)
        return done

    def _advance(self) -> None:
        """Have it run a slice, with what is new."""
        asked, self._new = tuple(self._new), []
        finished, self._finished = tuple(self._finished), []
        terms = {} if self._promised else self._terms
        self._promised = True
        heard, self._heard = {name: first for name, first in self._heard.items() if name in self._live}, {}
        self._slice = self.seat.ask("rollout", "advance", asked, SLICE_S, finished, terms, heard)

    def _advanced(self) -> list[Completion]:
        """What ended in the slice that it runs."""
        if self._slice is None:
            return []
        asked, self._slice = self._slice, None
        ended, counts, drawn, space = asked.result()
        done = self._known(ended)
        self._counts, self._drawn, self._space = counts, drawn, space
        return done

    def _known(self, ended: Sequence[Completion]) -> list[Completion]:
        """Taken off what is live. WorkerLied, and nothing taken, where one never was."""
        names = [completion.request_id for completion in ended]
        if odd := [name for name in names if name not in self._live or names.count(name) > 1]:
            raise WorkerLied(
                self.seat.spec.name,
                "rollout",
                f"it gave tokens for {odd[0]!r}, which was not asked of it, or came before.",
            )
        for name in names:
            del self._live[name]
        return [self._here(completion) for completion in ended]

    def _here(self, completion: Completion) -> Completion:
        """With times of this process's clock."""
        self._returned += len(completion.columns)
        return dataclasses.replace(
            completion,
            submitted_s=completion.submitted_s - self._ahead_s,
            started_s=completion.started_s - self._ahead_s,
            finished_s=completion.finished_s - self._ahead_s,
        )

    def release_memory(self) -> None:
        """As Engine's; where no worker is left, its memory went with it, and whatever is asked of it next says so."""
        if self._lost is None:
            assert not self._live, f"{len(self._live)} requests are live"
            try:
                self.seat.ask("release", "release_memory").result()
            except WorkerError as error:
                with contextlib.suppress(WorkerError):
                    self._replace(error)

    def give_up(self) -> None:
        """As Engine's."""
        self.dead = True
        self.seat.worker.end()
        self._live, self._new, self._slice = {}, [], None

    def check_integrity(self) -> None:
        """Of the worker's engine."""
        self.seat.ask("release", "check_integrity").result()


def _both(ours: Callable[[], None], theirs: Pending) -> Any:
    """What a worker answers, where this process has a part in it. Where both fail, the worker says why."""
    try:
        ours()
    except DeliveryError:
        theirs.result()
        raise
    return theirs.result()


def _nobody(tokens: int) -> None:
    """Where no ledger is kept."""


def _summed(first: Stats, then: Stats) -> Stats:
    """Counts of two engines, one after the other.

    >>> _summed(Stats(finished=2, most_running=3), Stats(finished=1, most_running=2)).finished
    3
    """
    both = {name.name: getattr(first, name.name) + getattr(then, name.name) for name in dataclasses.fields(Stats)}
    latest = {name: max(getattr(first, name), getattr(then, name)) for name in ("most_running", "resolved_s")}
    return Stats(**both | latest)


class RemoteReference:
    """The reference policy in a process of its own."""

    def __init__(self, backend: Backend, source: str, model: ModelConfig) -> None:
        self.seat = Seat(backend, Spec("reference", "tandem.run.roles:ReferenceWorker", (source, model)))

    def score(
        self, samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget_tokens: int, temperature: float
    ) -> tuple[Sample, ...]:
        """The samples with their `reference_logprobs`. A deadline for each microbatch."""
        rows = sum(len(sample.columns) for sample in samples)
        while True:
            try:
                times = 1 + rows // budget_tokens
                asked = self.seat.ask("score", "score", samples, prompts, budget_tokens, temperature, times=times)
                scored: tuple[Sample, ...] = asked.result()
                if [one.id for one in scored] != [one.id for one in samples]:
                    raise WorkerLied("reference", "score", "it scored other samples than were sent.")
                return scored
            except WorkerError as error:
                self.seat.replace(error, f", and asked again for {len(samples)} samples")
