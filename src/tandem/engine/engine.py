"""Requests in, completions out: a scheduler, a runner and a clock.

engine = Engine(runner, config, num_pages)
engine.submit(request)
while engine.has_work:
    for completion in engine.step():
        ...
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tandem.columns import Columns
from tandem.engine.admit import check_request
from tandem.engine.batch import INITIAL, Batch, Sampled, Stats, stops_by_token
from tandem.engine.batch import Sequence as LiveSequence
from tandem.engine.config import EngineConfig, Mode, ProgramsConfig
from tandem.engine.constraint import Grammars
from tandem.engine.deal import Deals
from tandem.engine.draft import Drafter
from tandem.engine.integrity import check_integrity
from tandem.engine.layout import KvLayout
from tandem.engine.park import Parking
from tandem.engine.schedule import Scheduler
from tandem.engine.share import Terms
from tandem.engine.space import Space, Spaces
from tandem.errors import ConfigError, NonFiniteError
from tandem.types import Completion, Request, StopReason, WeightVersion

Decode = Callable[[Sequence[int]], str]


class Runner(Protocol):
    """Runs a batch on a device: writes keys and values to the pages, draws the tokens that works ask for.

    A row that cannot be drawn from is named in `Sampled.failed`, and the others are drawn as ever.

    A device that works on its own has `start(batch) -> wait` too: start returns as the batch is queued, behind what was
    started before, whose draws it may hold as -1 - place; wait() returns the draws. It is waited for in order.
    """

    @property
    def layout(self) -> KvLayout:
        """The groups of layers that pages are of."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids that its model has, from 0 on."""
        ...

    def run(self, batch: Batch) -> Sampled: ...

    def release_memory(self) -> None:
        """What pages hold is lost, and their memory with it where the device can do so."""


class Flight(NamedTuple):
    """A batch that is on the device, and advanced."""

    batch: Batch
    wait: Callable[[], Sampled]


def decoded_tail(decode: Decode, tokens: Sequence[int], first: int, chars: int) -> str:
    """Text of the last of tokens[first:], at least `chars` characters of it where there are so many.

    Twice as many tokens are taken until the text is long enough, since a token may decode to nothing. A few more than
    needed keep what decoding does to a first token (a space stripped, half a character) out of the part searched.
    """
    count = chars + 4
    while True:
        text = decode(tokens[max(first, len(tokens) - count) :])
        if len(text) >= chars + 4 or count >= len(tokens) - first:
            return text
        count *= 2


class Engine:
    """Continuous batching of requests over one runner. Not thread-safe: one caller submits, aborts and steps.

    Where the runner starts batches without waiting, the next one is planned and started before the draws of the last
    are asked for: the device does not wait for the host. A request that a token or a string stops runs one token more,
    which is dropped; tokens and their log-probs are the same. Where it drafts (and they pay) it waits: what is drafted
    next depends on what was drawn; and so while a request with a constraint is live, whose masks do.

    num_pages: what the runner's page memory holds (admit.count_pages). max_context: positions of the model.
    decode: token ids -> text; needed only by requests with stop strings.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        num_pages: int,
        max_context: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        decode: Decode | None = None,
        version: WeightVersion = INITIAL,
        drafter: Drafter | None = None,
    ) -> None:
        self.runner = runner
        self.vocab_size = runner.vocab_size
        self.clock = clock
        self.decode = decode
        drafter = drafter or getattr(runner, "drafter", None)  # one with weights, where the runner has one
        self.scheduler = Scheduler(config, num_pages, max_context, self._stops, version, runner.layout, drafter)
        if (opened := getattr(runner, "opened", None)) is not None:
            opened.held = self.scheduler.filled_pages
        self.scheduler.drafting.vocab_size, self.scheduler.drafting.clock = runner.vocab_size, clock
        if config.programs.park:
            self._park(config.programs)
        programs = self.scheduler.programs
        self._spaces = Spaces(programs) if programs is not None else None
        self._undelivered: list[Completion] = []  # finished while nobody who wants them asked
        self._flight: Flight | None = None
        self.dead = False  # see give_up
        self.wakes_s = 0.0  # for how long the last step ran nothing, since caps hold back all that is live; else 0
        self._sound: WeightVersion | None = None  # the last weights that something was drawn with
        self.grammars: Grammars | None = None  # of its tokeniser, by whoever builds it; none: it takes no constraint
        self._bound = set[str]()  # live requests with a constraint

    def _park(self, config: ProgramsConfig) -> None:
        """Gives paused programs a folder, where pages can be read between steps."""
        assert self.scheduler.programs is not None
        memory: Any = self.runner
        if not hasattr(memory, "read_pages") or getattr(memory, "start", None) is not None:
            raise ConfigError("engine.programs.park is set, and pages of this device are not parked. Leave it empty.")
        self.scheduler.programs.parking = Parking(config.park, config.park_bytes, memory)

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to run or to return."""
        return bool(self.scheduler.live or self._undelivered)

    @property
    def version(self) -> WeightVersion:
        return self.scheduler.version

    @property
    def adapters(self) -> Mapping[str, WeightVersion]:
        """That requests may name, beside the weights themselves, and which version of each."""
        return self.scheduler.adapters

    @property
    def stats(self) -> Stats:
        """A copy of the counts since the start."""
        return self.scheduler.stats

    def check(self, request: Request) -> None:
        """Raises what `submit` would, but for an id in use. From any thread.

        ConfigError: empty prompt, max_new_tokens < 1, stop strings that are empty or cannot be decoded, a token or stop
        token outside the vocabulary, a seed or filter that the sampler does not have, an unknown adapter, a constraint
        that cannot be held.
        CapacityError: it could not run even alone.
        """
        strings = request.sampling.stop_strings
        if strings and self.decode is None:
            raise ConfigError(f"request {request.id!r} has stop strings, but this engine was given no decode function.")
        if "" in strings:
            raise ConfigError(f"request {request.id!r} has an empty stop string, which would stop it at once.")
        if request.adapter and request.adapter not in self.adapters:
            served = ", ".join(sorted(self.adapters))
            raise ConfigError(
                f"request {request.id!r} asks for adapter {request.adapter!r}, and this engine serves "
                f'{served or "none"}. Allowed: {f"{served}, and " if served else ""}"", the weights themselves.'
            )
        if request.constraint is not None and self.grammars is None:
            raise ConfigError(f"request {request.id!r} has a constraint, but this engine was given no tokeniser.")
        check_request(request, self.vocab_size)
        if request.constraint is not None and self.grammars is not None:
            self.grammars.check(request)
        self.scheduler.limit(request)

    def submit(self, request: Request) -> None:
        """Queues a request; it runs in later steps. Raises as `check`, and ConfigError for an id in use."""
        self.check(request)
        self.scheduler.submit(request, self.clock())
        if request.constraint is not None:
            self._bound.add(request.id)

    def drawn(self, request_id: str, first: int) -> Columns:
        """What a live request has generated so far, from the first-th token on; nothing where none is live."""
        sequence = self.scheduler.live.get(request_id)
        return Columns({}) if sequence is None else sequence.drawn(first)

    def abort(self, request_id: str) -> Completion | None:
        """Withdraws a request, waiting or running, and returns what it has so far; step() will not return it again.

        None where no such request is live: it has finished, and step() has returned it or will.
        """
        self._land()
        return self.scheduler.abort(request_id, self.clock())

    def finish_program(self, program_id: str, tenant: str = "") -> None:
        """A program asks for nothing more: what is kept for it may go (engine/programs.py)."""
        if self.scheduler.programs is not None:
            self.scheduler.programs.done(program_id, self.clock(), tenant)

    def on_restoring(self, told: Callable[[str], None]) -> None:
        """told: called in a step with the name of a paused program that is soon to go on; it must not wait."""
        if self.scheduler.programs is not None:
            self.scheduler.programs.restoring = told

    def space(self) -> Space | None:
        """What it has room for of programs that are paused; None where it gives them no places."""
        return self._spaces.space(self.clock()) if self._spaces is not None else None

    def loads(self) -> dict[str, float]:
        """Live requests, by tenant, where engine.order is shares (engine/cluster.py)."""
        order = self.scheduler.order
        return order.tree.loads() if isinstance(order, Deals) else {}

    def promise(self, terms: Mapping[str, Terms]) -> None:
        """What tenants are promised of this engine from the next step on, by path; others keep what they were."""
        order = self.scheduler.order
        if isinstance(order, Deals):
            order.tree.promise(terms)

    def set_programs_mode(self, mode: Mode) -> None:
        """engine.programs.mode from now on, where it was not "off": "shadow" undoes at once all that "enforce" does."""
        if self.scheduler.programs is None:
            raise ConfigError('engine.programs.mode is "off": this engine follows no programs. Start it with another.')
        if mode == "off":
            raise ConfigError('the mode of a running engine can be "shadow", "advisory" or "enforce", not "off".')
        self.scheduler.programs.set_mode(mode, self.clock())

    def receive(self, version: WeightVersion) -> None:
        """Says that the runner's weights are now `version`. Between steps only.

        Running sequences continue: their later tokens get the new version, and what they compute from here on is
        not shared. Cached blocks stay, findable again only under the version that computed them.
        """
        self._land()
        self.scheduler.receive(version)

    def receive_adapter(self, version: WeightVersion) -> None:
        """Says that the runner's adapter of this name is now `version`. Between steps only, as `receive`."""
        self._land()
        self.scheduler.receive_adapter(version)

    def drop_adapter(self, name: str) -> None:
        """Requests may name it no more. Between steps only. ConfigError where none may, or a live request does."""
        self._land()
        if name not in self.adapters:
            raise ConfigError(
                f"no adapter {name!r} is served. There are: {', '.join(sorted(self.adapters)) or 'none'}."
            )
        live = sum(one.request.adapter == name for one in self.scheduler.live.values())
        if live:
            raise ConfigError(f"{live} requests for adapter {name!r} are on their way. Wait for them, or abort them.")
        del self.scheduler.adapters[name]

    def release_memory(self) -> None:
        """Between phases, with nothing live: the memory of all pages is the system's until they are written again."""
        self._land()
        self.scheduler.drafting.keep()
        self.scheduler.empty()
        self.runner.release_memory()

    def retract(self) -> None:
        """All that runs gives up its pages and waits, with what it drew: it is computed again when it goes on."""
        self._land()
        self.scheduler.retract()

    def renewed(self) -> Engine:
        """Another on the same runner, which knows nothing of what was live here: this one is in no known state.

        Tenants keep what they had, owe and were promised.
        """
        old = self.scheduler
        known = (old.config, old.pool.num_pages, old.max_context, self.clock, self.decode, old.version)
        new = Engine(self.runner, *known)
        new.grammars = self.grammars
        new.scheduler.drafting = old.drafting.into(new.scheduler._stats)
        new.scheduler.arrivals = old.arrivals  # numbers never come again
        new.scheduler.adapters |= self.adapters
        if isinstance(new.scheduler.order, Deals) and isinstance(old.order, Deals):
            new.scheduler.order.inherit(old.order)
        if new.scheduler.programs is not None and old.programs is not None:
            new.scheduler.programs.mode = old.programs.mode  # what a guard or somebody turned off stays off
            new.scheduler.programs.restoring = old.programs.restoring
        return new

    def give_up(self) -> None:
        """It failed, and is in no known state: nothing more is asked of it, no weights reach it, it holds no memory."""
        self.dead = True
        self._flight, self._undelivered = None, []
        self.runner.release_memory()

    def step(self) -> list[Completion]:
        """Runs one batch; returns the requests that ended. If the runner raises, the step may be tried again.

        A row that cannot be drawn from ends its request, as FAILED. NonFiniteError where all rows are such, and weights
        are at fault: none was ever drawn with them.
        """
        done: list[Completion] = []
        if self.scheduler.live and self.scheduler.drafting.on:
            self._land()
        if self.scheduler.live:
            batch = self.scheduler.plan(self.clock())
            self.wakes_s = 0.0 if batch.works or self._flight else self.scheduler.wakes_s
            assert batch.works or self._flight or self.wakes_s, (
                f"no progress: {len(self.scheduler.running)} running, {len(self.scheduler.waiting)} waiting, "
                f"{self.scheduler.pool.num_available} of {self.scheduler.pool.num_pages} pages available"
            )
            start: Callable[[Batch], Callable[[], Sampled]] | None = getattr(self.runner, "start", None)
            waits = start is None or self.scheduler.drafting.on
            if self._bound:
                if not waits:
                    self._land()  # what may be drawn next hangs on what was drawn
                self._mask(batch)
            if self.wakes_s:
                pass
            elif start is None or waits:
                sampled = self._checked(self.runner.run(batch), batch)
                done = self.scheduler.commit(batch, sampled, self.clock())
            else:
                wait = start(batch) if batch.works else None
                done = self._resolve()
                if wait is not None:
                    self.scheduler.advance(batch)
                    self._flight = Flight(batch, wait)
            if not self.scheduler.live:
                self._land()
                self.scheduler.check_idle()
        done, self._undelivered = self._undelivered + done, []
        return done

    def _mask(self, batch: Batch) -> None:
        self._bound.intersection_update(self.scheduler.live)
        if self._bound and self.grammars is not None:
            self.grammars.fill(batch, self.scheduler.live)

    def _resolve(self) -> list[Completion]:
        """Waits for what is on the device and takes what it drew."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        try:
            sampled = self._checked(flight.wait(), flight.batch)
        except BaseException:
            self.scheduler.forget(flight.batch)
            raise
        return self.scheduler.resolve(flight.batch, sampled, self.clock())

    def _checked(self, sampled: Sampled, batch: Batch) -> Sampled:
        if len(sampled.failed) < len(sampled.tokens):
            self._sound = batch.version
        elif sampled.failed and self._sound != batch.version:
            raise NonFiniteError(sampled.failed[0])
        sampled.failed |= batch.barred
        return sampled

    def _land(self) -> None:
        self._undelivered += self._resolve()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Runs requests to their ends and returns their completions in the order given.

        Others that are live run along; step() returns them. If anything is raised, these requests are aborted.
        """
        done: dict[str, Completion] = {}
        others: list[Completion] = []
        asked: set[str] = set()
        try:
            for request in requests:
                self.submit(request)
                asked.add(request.id)
            others, self._undelivered = self._undelivered, []
            while len(done) < len(asked):
                for completion in self.step():
                    if completion.request_id in asked:
                        done[completion.request_id] = completion
                    else:
                        others.append(completion)
        finally:
            self._undelivered = others + self._undelivered
            for request_id in asked - done.keys():
                self.abort(request_id)
        return [done[request.id] for request in requests]

    def check_integrity(self) -> None:
        """AssertionError unless every page and promise is accounted for; when idle, unless none is held. O(pages)."""
        check_integrity(self.scheduler)
        if not self.scheduler.live:
            self.scheduler.check_idle()

    def _stops(self, sequence: LiveSequence) -> StopReason | None:
        """A stop token, else a stop string in the generated text."""
        reason = stops_by_token(sequence)
        strings = sequence.request.sampling.stop_strings
        if reason is None and strings and self.decode is not None:
            longest = max(map(len, strings))
            drawn_from = len(sequence.request.tokens) - sequence.request.carried
            text = decoded_tail(self.decode, sequence.tokens, drawn_from, longest)
            if any(string in text for string in strings):
                return StopReason.STOP_STRING
        return reason
