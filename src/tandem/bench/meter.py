"""Seconds, operations and bytes of the functions that a piece of work calls, taken from outside.

`Meter.over(probes, run)` puts a stopwatch around each probe's function for as long as `run` lasts and takes it away
again, so nothing is paid where nothing is measured. Time is exclusive: a call's is its own without that of the probed
calls inside it. What no probe saw is the row `REST`, what the stopwatches took is `OWN`: the rows add up to the wall
time.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from tandem.bench.roofline import Cost, timed

REST = "the rest: Python, torch"
OWN = "the stopwatches"
FREE = Cost(0.0, 0.0)

Kind = Literal["kernel", "host"]


class Part(NamedTuple):
    """An operation inside a call, whose seconds the call measured itself."""

    label: str
    seconds: float
    calls: int
    cost: Cost = FREE


class Reading(NamedTuple):
    """What a call was. The seconds of its parts are rows of their own; what is left stands under `label`."""

    label: str
    cost: Cost = FREE
    parts: Sequence[Part] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """A function to time. `read(result, *arguments)` says what a call was; a text is the label of every call.

    >>> Probe("tandem.bench.roofline:pairs", "pairs").kind
    'kernel'
    """

    target: str  # "module:name" or "module:Class.name"
    read: str | Callable[..., Reading]
    kind: Kind = "kernel"
    before: Callable[..., None] | None = None  # called with the arguments before the stopwatch starts


@dataclass(slots=True)
class Row:
    """Sums over the calls of one label."""

    kind: Kind
    seconds: float = 0.0
    calls: int = 0
    flop: float = 0.0
    bytes: float = 0.0


class Meter:
    """Rows by label. Not for several threads at once.

    >>> meter = Meter()
    >>> meter.over([Probe("tandem.bench.roofline:pairs", "pairs")], lambda: None)
    >>> sorted(meter.rows) == sorted([REST, OWN])
    True
    """

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.wall_s = 0.0
        self._own_s = 0.0
        self._inner: list[float] = []  # of each open call: seconds of the probed calls inside it

    def over(self, probes: Sequence[Probe], run: Callable[[], object]) -> None:
        """Measure one call of `run`; more calls add up."""
        with _in_place(probes, self._wrap):
            self._inner, self._own_s = [0.0], 0.0
            wall_s = timed(run)
        self._add(OWN, "host", self._own_s, 1, FREE)
        self._add(REST, "host", wall_s - self._inner.pop(), 1, FREE)
        self.wall_s += wall_s

    def _add(self, label: str, kind: Kind, seconds: float, calls: int, cost: Cost) -> None:
        row = self.rows.setdefault(label, Row(kind))
        row.seconds += seconds
        row.calls += calls
        row.flop += cost.flop
        row.bytes += cost.bytes

    def _wrap(self, probe: Probe, function: Callable[..., Any]) -> Callable[..., Any]:
        clock, read = time.perf_counter, probe.read

        @functools.wraps(function)
        def measured(*arguments: Any, **named: Any) -> Any:
            stack = self._inner
            stack.append(0.0)
            begin = clock()
            if probe.before is not None:
                probe.before(*arguments, **named)
            start = clock()
            try:
                result = function(*arguments, **named)
            finally:
                stop = clock()
                nested = stack.pop()
            reading = Reading(read) if isinstance(read, str) else read(result, *arguments, **named)
            for part in reading.parts:
                self._add(part.label, "kernel", part.seconds, part.calls, part.cost)
                nested += part.seconds
            self._add(reading.label, probe.kind, stop - start - nested, 1, reading.cost)
            end = clock()
            self._own_s += end - stop + start - begin
            stack[-1] += end - begin
            return result

        return measured


@contextmanager
def _in_place(probes: Sequence[Probe], wrap: Callable[[Probe, Callable[..., Any]], Any]) -> Iterator[None]:
    """Every name in the package's modules under which a probe's function is known leads to its wrapper."""
    for probe in probes:
        importlib.import_module(probe.target.partition(":")[0])
    undo: list[Callable[[], None]] = []
    try:
        for probe in probes:
            module_name, _, path = probe.target.partition(":")
            *outer, name = path.split(".")
            owner = functools.reduce(getattr, outer, sys.modules[module_name])
            held = vars(owner).get(name)
            if held is None:
                raise AttributeError(f"{probe.target} is gone; bench/profile.py probes it.")
            wrapper = wrap(probe, held.__func__ if isinstance(held, staticmethod) else held)
            if outer:
                undo.append(functools.partial(setattr, owner, name, held))
                setattr(owner, name, staticmethod(wrapper) if isinstance(held, staticmethod) else wrapper)
            else:  # a module that is imported meanwhile takes the wrapper, so that all are looked through again
                undo.append(functools.partial(_replace, module_name.partition(".")[0], wrapper, held))
                _replace(module_name.partition(".")[0], held, wrapper)
        yield
    finally:
        for step in reversed(undo):
            step()


def _replace(package: str, known: object, other: object) -> None:
    """`other` in place of `known` under every name of every module of a package."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            for alias, held in list(vars(module).items()):
                if held is known:
                    setattr(module, alias, other)
