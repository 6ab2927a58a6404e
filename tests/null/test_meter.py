"""Regression caught: a profile whose rows do not add up to the step, or that leaves its stopwatches behind."""

from __future__ import annotations

import sys
import time
import types

import pytest

from tandem.bench.meter import OWN, REST, Meter, Part, Probe, Reading
from tandem.bench.roofline import Cost


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes only where a test says so."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> types.ModuleType:
    """outer (3 s of its own) calls inner (2 s) twice; a second module knows inner by another name."""
    module, other = types.ModuleType("toy.engine"), types.ModuleType("toy.other")

    def inner(size: int) -> int:
        clock[0] += 2.0
        return size

    def outer(size: int) -> int:
        clock[0] += 3.0
        return module.inner(size) + other.alias(size)

    class Model:
        def run(self, size: int) -> int:
            clock[0] += 1.0
            return module.outer(size)

        @staticmethod
        def back(size: int) -> int:
            clock[0] += 4.0
            return size

    module.inner, module.outer, module.Model = inner, outer, Model  # type: ignore[attr-defined]
    other.alias = inner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy.engine", module)
    monkeypatch.setitem(sys.modules, "toy.other", other)
    return module


def probes(clock: list[float], reading_s: float = 0.0) -> list[Probe]:
    def read(result: int, size: int) -> Reading:
        clock[0] += reading_s
        return Reading("inner", Cost(10.0 * size, 1.0))

    return [Probe("toy.engine:inner", read), Probe("toy.engine:outer", "outer"), Probe("toy.engine:Model.run", "run")]


def test_time_is_exclusive_and_the_rows_sum_to_the_wall(engine, clock):
    """A call's seconds counted again in its caller, or lost between them; a function missed under another name."""
    meter = Meter()

    def work() -> None:
        engine.Model().run(7)
        clock[0] += 0.5

    meter.over(probes(clock, reading_s=0.25), work)
    rows = {label: (row.seconds, row.calls) for label, row in meter.rows.items()}
    assert rows == {"inner": (4.0, 2), "outer": (3.0, 1), "run": (1.0, 1), OWN: (0.5, 1), REST: (0.5, 1)}
    assert (meter.rows["inner"].flop, meter.rows["inner"].bytes) == (140.0, 2.0)
    assert meter.wall_s == 9.0 == sum(row.seconds for row in meter.rows.values())
    meter.over(probes(clock), work)
    assert meter.rows["inner"].calls == 4 and meter.wall_s == 17.5


def test_parts_of_a_call_are_taken_from_it(engine, clock):
    """Seconds that a kernel measured itself, counted beside its own as well."""
    parts = [Part("product", 1.5, 30, Cost(5.0, 0.0)), Part("attention", 0.25, 30)]
    meter = Meter()
    meter.over([Probe("toy.engine:Model.back", lambda *_: Reading("back", parts=parts))], lambda: engine.Model.back(1))
    assert {label: row.seconds for label, row in meter.rows.items() if row.seconds} == {
        "product": 1.5, "attention": 0.25, "back": 2.25
    }  # fmt: skip
    assert meter.rows["product"].calls == 30 and meter.rows["product"].flop == 5.0


def test_functions_are_put_back_whatever_happens(engine, clock):
    """A stopwatch left behind after an error: every later step pays for it, and a second profile counts twice."""
    before = (engine.inner, engine.outer, vars(engine.Model)["run"], sys.modules["toy.other"].alias)
    with pytest.raises(ZeroDivisionError):
        Meter().over(probes(clock), lambda: 1 // 0)
    with pytest.raises(AttributeError, match="gone"):
        Meter().over([*probes(clock), Probe("toy.engine:gone", "gone")], lambda: None)
    assert before == (engine.inner, engine.outer, vars(engine.Model)["run"], sys.modules["toy.other"].alias)
