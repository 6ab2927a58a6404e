"""A sitting's side of the ledger: its clock, its engines' counts, and what earlier sittings left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tandem.engine.engine import Engine
from tandem.plan.roofline import machine_name
from tandem.rollout.group import program_id
from tandem.run.clock import WallClock
from tandem.run.counted import PASSES
from tandem.run.ledger import Ledger, split_rollout
from tandem.run.meter import Meter, Reading, last_reading
from tandem.types import Prompt


class Account:
    """What the one worker of a run in one process, "main", tells its ledger. Open from `begin` on."""

    def __init__(self, ledger: Ledger, clock: WallClock, engines: Iterable[Engine], folder: Path) -> None:
        self.ledger = ledger
        self.clock = clock
        self.engines = {f"engine {number}": engine for number, engine in enumerate(dict.fromkeys(engines), start=1)}
        self.folder = folder
        self.meter: Meter | None = None

    def __enter__(self) -> Account:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.meter is not None:
            self.meter.close()

    def resume(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The ledger and the clock are a checkpoint's, or new; these rows came after it, and were set aside."""
        last = last_reading(self.folder) or Reading(0, 0.0)
        since_s = last.wall_s - self.clock.earlier_s - self.ledger.lost_s()
        self.ledger.discard(rows, last.sampled - self.ledger.sampled, since_s)

    def begin(self) -> float:
        """All is ready: what came before was start-up. Returns the time, of the clock that rows have."""
        now = time.perf_counter()
        self.ledger.spend({"startup": now - self.clock.started_s})
        self.meter = Meter(self.folder, self.reading)
        return now

    def reading(self) -> Reading:
        """From any thread."""
        stats = {name: engine.stats for name, engine in self.engines.items()}
        return Reading(self.ledger.sampled_with(stats), self.clock.seconds() + self.ledger.lost_s())

    def dispatch(self, step: int, prompts: Sequence[Prompt], siblings: int) -> None:
        """Programs are about to begin."""
        self.ledger.dispatch(program_id(prompt.id, step, one) for prompt in prompts for one in range(siblings))

    def settle(self, seconds: Mapping[str, float], counts: Mapping[str, float]) -> int:
        """At a row, by the trace's totals since the last. Returns the tokens that engines sampled since then."""
        self.ledger.spend(split_rollout(seconds, {name.removesuffix("_s"): counts.get(name, 0.0) for name in PASSES}))
        withdrawn = [*self.ledger.open] if "extra_programs" in counts else []
        self.ledger.lose("surplus", int(counts.get("extra_tokens", 0)), withdrawn)
        self.ledger.check_ended()
        before = self.ledger.sampled
        for name, engine in self.engines.items():
            self.ledger.meter(name, engine.stats)
        return self.ledger.sampled - before

    def close(self, seconds: Mapping[str, float]) -> dict[str, Any]:
        """The ledger, closed."""
        self.settle(seconds, {})
        closed = self.ledger.close({"main": self.clock.seconds() + self.ledger.lost_s()})
        return closed | {"machine": machine_name()}
