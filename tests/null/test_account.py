"""The account of a run's workers: whatever they do, and whoever dies, each of their seconds has one cause."""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.engine.batch import Stats
from tandem.run.account import Account
from tandem.run.clock import WallClock
from tandem.run.ledger import MAIN, PHASES, UNACCOUNTED, Ledger
from tandem.run.meter import EVERY_S, NAME, Meter, Reading, last_reading
from tandem.trace import Trace
from tandem.types import Group, Prompt, StopReason, Trajectory

WORKERS = ("rollout 1", "rollout 2")
BUSY = {MAIN: ("learner", "update", "publish", "buffer", "rows"), "": ("decode", "full_buffer", "weights")}


@dataclass
class Sitting:
    """Workers that are always in some span, on a clock that a test moves; their seconds are summed here too."""

    folder: Path
    at_s: float = 100.0
    account: Account = field(init=False)
    expected: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    saved: tuple[dict[str, Any], ...] | None = None  # ledger, clock, what was expected then and at the row before
    rows: list[dict[str, Any]] = field(default_factory=list)  # since then
    drawn: int = 0  # in all sittings
    row_drawn: int = 0
    has_fate: int = 0
    overlaps: bool = False  # the first of the rows began before what was saved

    def begin(self, startup_s: float) -> None:
        self.clock = WallClock(lambda: self.at_s)
        self.account = Account(Ledger(), self.clock, self.folder)
        if self.saved is not None:
            self.account.restore(json.loads(json.dumps(self.saved[0])))
            self.clock.restore(self.saved[1])
        self.account.resume(self.rows)
        self.rows = []
        self.engine = SimpleNamespace(stats=Stats())
        self.at_s += startup_s
        self.expected[MAIN]["startup"] += startup_s
        self.since = {MAIN: self.clock.started_s}  # when each worker's span began, or that it is not at work
        self.left: dict[str, float | None] = {}
        self.spans: dict[str, tuple[Trace, ExitStack, ExitStack, str]] = {}
        self.row_s = self.account.begin({"engine 1": self.engine})
        self.spans[MAIN] = self.account.trace, ExitStack(), ExitStack(), ""
        self.at_row = json.loads(json.dumps(self.expected))
        self.switch(MAIN, 0)

    def switch(self, worker: str, choice: int) -> None:
        """Another span."""
        trace, life, span, phase = self.spans[worker]
        span.close()
        if phase:
            self.expected[worker][phase] += self.at_s - self.since[worker]
        phase = (phases := BUSY.get(worker, BUSY[""]))[choice % len(phases)]
        span = ExitStack()
        span.enter_context(trace.span(phase))
        self.spans[worker], self.since[worker] = (trace, life, span, phase), self.at_s

    def comes(self, worker: str) -> None:
        if worker not in self.left:
            self.expected[worker]["startup"] += self.row_s - self.clock.started_s
            self.expected[worker]["down"] += self.at_s - self.row_s
        self.absent()
        life, self.left[worker] = ExitStack(), None
        self.spans[worker] = life.enter_context(self.account.worker(worker)), life, ExitStack(), ""
        self.switch(worker, 0)

    def goes(self, worker: str) -> None:
        """It ends, or dies."""
        self.switch(worker, 0)
        _, life, span, _ = self.spans.pop(worker)
        span.close()
        life.close()
        self.left[worker] = self.at_s

    def absent(self) -> None:
        for worker, left in self.left.items():
            if left is not None:
                self.expected[worker]["down"] += self.at_s - left
                self.left[worker] = self.at_s

    def row(self) -> None:
        self.switch(MAIN, 4)
        settled = self.account.settle()
        assert settled.drawn_tokens == self.drawn - self.row_drawn
        self.fated()
        self.row_drawn, self.at_row = self.drawn, json.loads(json.dumps(self.expected))
        named = {"seconds": settled.seconds, "workers": settled.workers, "time_s": self.clock.seconds()}
        self.rows.append({**named, "drawn_tokens": settled.drawn_tokens})

    def fated(self) -> None:
        self.account.ledger.lose("trained", self.drawn - self.has_fate)
        self.has_fate = self.drawn

    def save(self, number: int) -> None:
        """After a row, or between two."""
        for worker in self.spans:
            self.switch(worker, 1)
        self.absent()
        if number % 2:
            self.row()
        self.fated()
        state = self.account.state(), self.clock.state()
        self.rows = []
        self.saved = *state, json.loads(json.dumps(self.expected)), self.at_row
        self.overlaps = True

    def saved_of_row(self, worker: str, phase: str) -> float:
        """Seconds of the first row after a checkpoint that the checkpoint has."""
        assert self.saved is not None
        then, before = (moment.get(worker, {}) for moment in self.saved[2:])
        phases = then if worker == MAIN else {phase}
        return sum(then.get(name, 0.0) - before.get(name, 0.0) for name in phases)

    def kill(self) -> None:
        """The whole run, at once; then it resumes, from what was saved."""
        before = self.saved[2] if self.saved else {}
        self.expected = defaultdict(lambda: defaultdict(float))
        for worker, phases in before.items():
            self.expected[worker] |= phases
        self.account.__exit__(None, None, None)  # the meter's last line
        was_s = json.loads((self.folder / NAME).read_text())["wall_s"]
        known = self.saved[0]["walls"] if self.saved else {MAIN: 0.0}
        for worker in known:
            rest_s = was_s - known[MAIN]
            for number, row in enumerate(self.rows):
                main = {"discarded": sum(row["seconds"].values())}
                for phase, seconds in (main if worker == MAIN else row["workers"].get(worker, {})).items():
                    seconds -= self.saved_of_row(worker, phase) if self.overlaps and number == 0 else 0.0
                    self.expected[worker][phase] = self.expected[worker].get(phase, 0.0) + seconds
                    rest_s -= seconds
            self.expected[worker]["interrupted"] = self.expected[worker].get("interrupted", 0.0) + rest_s
        self.at_s += 1000.0  # nobody's
        self.row_drawn = self.has_fate = self.drawn
        self.overlaps = False
        self.begin(0.5)


EVENT = st.tuples(
    st.sampled_from(["wait", *3 * ["switch"], *4 * ["come or go"], *2 * ["row", "save"], "kill"]),
    st.sampled_from(WORKERS),
    st.integers(0, 9),
    st.floats(0.0, 20.0),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(EVENT, max_size=40))
@example([("save", "rollout 1", 2, 0.0), ("row", "rollout 1", 0, 0.0), ("kill", "rollout 1", 0, 0.0)])
def test_every_second_of_every_worker_has_a_cause(tmp_path_factory: pytest.TempPathFactory, events: Any) -> None:
    """Workers that wait, die, come back and are killed with the run: a second of one that has no phase, or two."""
    run = Sitting(tmp_path_factory.mktemp("run"))
    run.begin(2.5)
    for event, worker, number, seconds in events:
        run.at_s += seconds
        run.drawn += number
        run.engine.stats = Stats(sampled_tokens=run.engine.stats.sampled_tokens + number)
        if event == "switch":
            name = worker if worker in run.spans else MAIN
            run.switch(name, number)
        elif event == "come or go":
            (run.goes if worker in run.spans else run.comes)(worker)
        elif event == "save":
            run.save(number)
        elif event in ("row", "kill"):
            getattr(run, event)()
    for worker in [*run.spans]:
        if worker != MAIN:
            run.goes(worker)
    run.at_s += 1.0
    run.row()
    run.spans[MAIN][2].close()
    closed = run.account.close()
    run.account.__exit__(None, None, None)
    run.absent()
    assert set(closed["seconds"]) == {worker for worker, phases in run.expected.items() if phases}
    for worker, phases in closed["nanoseconds"].items():
        rest = {name: ns for name, ns in phases.items() if name not in ("wall", UNACCOUNTED)}
        assert phases["wall"] == sum(rest.values()) + phases[UNACCOUNTED]
        assert set(rest) <= set(PHASES)
        wanted = run.expected[worker]
        for phase in {*rest, *wanted}:
            assert rest.get(phase, 0) / 1e9 == pytest.approx(wanted.get(phase, 0.0), abs=1e-5), phase
        assert phases[UNACCOUNTED] <= 1e5
    assert closed["tokens"]["total"] == run.drawn and UNACCOUNTED not in closed["tokens"]


def test_workers_of_several_threads_share_a_ledger(tmp_path: Path) -> None:
    """A token or a second lost between two threads."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        account = Account(ledger := Ledger(), WallClock(), tmp_path)
        engines = {f"engine {n}": SimpleNamespace(stats=Stats()) for n in range(4)}
        account.begin(engines)

        def roll(name: str) -> None:
            engine = engines[name]
            with account.worker(name) as trace:
                for number in range(40):
                    with trace.span("rollout"):
                        program = f"{name}/{number}"
                        ledger.dispatch([program])
                        engine.stats = Stats(sampled_tokens=engine.stats.sampled_tokens + 3, run_tokens=1)
                        columns = Columns.of(tokens=(1, 1, 1), loss_mask=(True,) * 3, versions=(0, 0, 1))
                        ended = Trajectory(program, "p", columns, 1.0, StopReason.LENGTH, None)
                        ledger.arrive(groups := [Group(Prompt("p", ()), (ended,))])
                    ledger.record(groups, [], {ended.id: "stale"}, version=2)

        threads = [threading.Thread(target=roll, args=(name,)) for name in engines]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            account.settle()
            account.state()
            assert account.reading().sampled <= 4 * 40 * 3
        for thread in threads:
            thread.join()
        ledger.check()
        with account:
            closed = account.close()
    finally:
        sys.setswitchinterval(before_s)
    assert closed["tokens"]["stale"] == closed["tokens"]["total"] == 4 * 40 * 3 and UNACCOUNTED not in closed["tokens"]
    assert closed["ages"] == {"stale": {1: 160, 2: 320}} and closed["audit"]["ended"] == 160
    assert set(closed["nanoseconds"]) == {MAIN, *engines}
    for phases in closed["nanoseconds"].values():
        assert phases.pop("wall") == sum(phases.values()) and min(phases.values()) >= 0


def test_a_sitting_that_is_killed_at_once_keeps_the_count_of_the_last(tmp_path: Path) -> None:
    """A meter that empties its file as it begins: a kill before its first line, and the next resume has lost tokens."""
    first = Reading(12, 3.5)
    Meter(tmp_path, lambda: first).close()
    begun, goes_on = threading.Event(), threading.Event()

    def read() -> Reading:
        begun.set()
        goes_on.wait()
        return Reading(20, 7.0)

    second = Meter(tmp_path, read)
    assert begun.wait(100 * EVERY_S), "the meter never read"
    assert last_reading(tmp_path) == first
    goes_on.set()
    second.close()
    assert last_reading(tmp_path) == Reading(20, 7.0)
