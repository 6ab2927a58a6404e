"""A run's side of the ledger: the clocks of its workers, its engines' counts, and what earlier sittings left."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tandem.plan.roofline import machine_name
from tandem.rollout.group import program_id
from tandem.run.clock import WallClock
from tandem.run.counted import PASSES, by_part
from tandem.run.ledger import MAIN, Counts, Ledger, split_rollout
from tandem.run.meter import Meter, Reading, last_reading
from tandem.trace import Totals, Trace
from tandem.types import Prompt


class Metered(Protocol):
    """What an account needs of an engine."""

    @property
    def stats(self) -> Counts: ...


@dataclass(frozen=True, slots=True)
class Settled:
    """Since the last time."""

    seconds: dict[str, float]  # of MAIN, by span
    counts: dict[str, Any]  # of all workers' traces, those of one part as an object
    drawn_tokens: int  # by all engines
    workers: dict[str, dict[str, float]]  # of the others: seconds by phase


class Account:
    """What the workers of a run tell its ledger. Open from `begin` on.

    `trace` has the spans of MAIN. Every other worker of this process has `worker` around all that it does. A span that
    is open when a checkpoint is written is not in it, so spans of other workers are short: a wait is one of many.
    """

    def __init__(self, ledger: Ledger, clock: WallClock, folder: Path) -> None:
        self.ledger = ledger
        self.clock = clock
        self.folder = folder
        self.engines: dict[str, Metered] = {}
        self.meter: Meter | None = None
        self.begun_s = clock.started_s
        self._totals = {MAIN: Totals()}
        self.trace = Trace([self._totals[MAIN]], clock.now)
        self._earlier_s = {MAIN: 0.0}  # worker -> its wall in earlier sittings, with what was set aside of them
        self._told: dict[str, Any] = {}  # what a checkpoint has of the row that came after it, as a row
        self._row_s = self.begun_s  # the last row's moment
        self._main_s: dict[str, float] = {}  # since the last row, of what the ledger was told: MAIN's by span,
        self._workers: dict[str, dict[str, float]] = {}  # the others' by phase,
        self._counts: dict[str, float] = {}  # all workers' counts,
        self._drawn = 0  # and tokens
        self._lock = threading.Lock()
        self._left: dict[str, float | None] = {}  # worker of this sitting -> when it left; None: it is at work

    def __enter__(self) -> Account:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.meter is not None:
            self.meter.close()

    # Sittings.

    def state(self) -> dict[str, Any]:
        """With what engines have drawn by now, for programs that are kept with it."""
        self._pass_absent()
        self._spend()  # walls run to now, so phases have to
        self._meter_engines()
        with self._lock:
            main = {"": self.clock.now() - self._row_s}
            told = {"drawn_tokens": self._drawn, "seconds": main, "workers": copy.deepcopy(self._workers)}
        return self.ledger.state() | {"walls": self.walls(), "told": told}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.ledger.restore(state)
        self._earlier_s = dict(state.get("walls") or {})
        self._told = dict(state.get("told") or {})

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The ledger and the clock are a checkpoint's, or new; these rows came after it, and were set aside."""
        if MAIN not in self._earlier_s:  # of a version that knew one worker
            lost = self.ledger.nanoseconds.get(MAIN, {}).get("discarded", 0)
            self._earlier_s[MAIN] = self.clock.earlier_s + lost / 1e9
        last = last_reading(self.folder) or Reading(0, 0.0)
        since_s = last.wall_s - self._earlier_s[MAIN]
        sampled = last.sampled - self.ledger.sampled
        known = self._told if rows and _began_s(rows[0]) <= self.clock.earlier_s else {}
        lost_s = self.ledger.discard(rows, sampled, since_s, self._earlier_s, known)
        self._earlier_s = {worker: wall_s + lost_s[worker] for worker, wall_s in self._earlier_s.items()}

    def begin(self, engines: Mapping[str, Metered]) -> float:
        """All is ready: what came before was start-up. Returns the time, of the clock that rows have."""
        self.engines |= engines
        self.begun_s = self.clock.now()
        self.ledger.spend({"startup": self.begun_s - self.clock.started_s})
        self.meter = Meter(self.folder, self.reading)
        self._row_s = self.begun_s
        return self.begun_s

    def walls(self) -> dict[str, float]:
        """Seconds of each worker, all sittings. One that came or went has all of a sitting that it was in."""
        sitting_s = self.clock.now() - self.clock.started_s
        here = {MAIN, *self._left}
        return {
            worker: self._earlier_s.get(worker, 0.0) + (sitting_s if worker in here else 0.0)
            for worker in {**self._earlier_s, **dict.fromkeys(here)}
        }

    def reading(self) -> Reading:
        """From any thread."""
        stats = {name: engine.stats for name, engine in self.engines.copy().items()}
        return Reading(self.ledger.sampled_with(stats), self.walls()[MAIN])

    # Workers.

    @contextmanager
    def worker(self, name: str) -> Iterator[Trace]:
        """A worker is at work; its seconds are the spans of the trace, or what the ledger is told."""
        assert self._left.get(name, 0.0) is not None and name != MAIN, f"two workers are called {name}"
        self._pass_absent()
        with self._lock:
            if name not in self._left:
                seconds = self.begun_s - self.clock.started_s, self.clock.now() - self.begun_s
                self.ledger.spend(dict(zip(("startup", "down"), seconds, strict=True)), name)
            totals = self._totals.setdefault(name, Totals())
            self._left[name] = None
        try:
            yield Trace([totals], self.clock.now)
        finally:
            with self._lock:
                self._left[name] = self.clock.now()

    def dispatch(self, step: int, prompts: Sequence[Prompt], siblings: int) -> None:
        """Programs are about to begin."""
        self.ledger.dispatch(program_id(prompt.id, step, one) for prompt in prompts for one in range(siblings))

    def interrupt(self) -> None:
        """Nobody goes on with what runs or waits."""
        self._meter_engines()
        self.ledger.interrupt()

    def engine_died(self, name: str, returned: int) -> None:
        """An engine that draws no more: of what it had drawn, `returned` tokens came back in completions.

        Its programs ask elsewhere. An engine in its place has another name.
        """
        self._meter_engines()
        with self._lock:
            stats = self.engines.pop(name).stats
        self.ledger.lose("crashed", stats.sampled_tokens - returned)

    def settle(self) -> Settled:
        """At a row."""
        self._spend()
        self._meter_engines()
        with self._lock:
            workers, counts, main_s = self._workers, self._counts, self._main_s
            self._workers, self._counts, self._main_s = {}, {}, {}
            drawn, self._drawn, self._row_s = self._drawn, 0, self.clock.now()
        return Settled(main_s, by_part(counts), drawn, workers)

    def _spend(self) -> None:
        """Tell the ledger of all spans that have ended; the next row has them too."""
        for worker, totals in self._totals.copy().items():
            seconds, counts = totals.take()
            passes = {name.removesuffix("_s"): counts.get(name, 0.0) for name in PASSES}
            phases = split_rollout(seconds, passes)
            self.ledger.spend(phases, worker)
            with self._lock:
                _add(self._counts, counts)
                _add(*((self._main_s, seconds) if worker == MAIN else (self._workers.setdefault(worker, {}), phases)))

    def _meter_engines(self) -> None:
        with self._lock:  # an engine may die in another thread
            before = self.ledger.sampled
            for name, engine in self.engines.items():
                self.ledger.meter(name, engine.stats)
            self._drawn += self.ledger.sampled - before

    def _pass_absent(self) -> None:
        with self._lock:
            now = self.clock.now()
            for worker, left in self._left.items():
                if left is not None:
                    self.ledger.spend({"down": now - left}, worker)
                    self._left[worker] = now

    def close(self, live_tokens: int = 0) -> dict[str, Any]:
        """The ledger, closed. live_tokens: drawn of programs that have not ended; they count as in flight."""
        working = [worker for worker, left in self._left.items() if left is None]
        assert not working, f"at work: {working}"
        self.settle()
        self._pass_absent()
        return self.ledger.close(self.walls(), live_tokens) | {"machine": machine_name()}


def _began_s(row: Mapping[str, Any]) -> float:
    """When a row's time began, of the run's own clock: before the checkpoint that it came after, or in a later
    sitting."""
    return float(row["time_s"]) - sum((row.get("seconds") or {}).values())


def _add(to: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        to[name] = to.get(name, 0) + value
