"""Spans and counters. A Trace measures and emits; the sinks that it was handed keep.

>>> totals = Totals()
>>> trace = Trace([totals])
>>> with trace.span("step"):
...     with trace.span("rollout"):
...         trace.count("tokens", 128)
>>> sorted(totals.seconds), totals.counts
(['rollout', 'step'], {'tokens': 128})
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
ROLLOUT = ("host", "prefill", "decode", "recomputed")  # what the ledger splits a worker's span "rollout" into


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """A span that ended.

    >>> SpanEvent("step/rollout", 0.5, 2.0, 1.5).name
    'rollout'
    """

    path: str  # names of the open spans of its thread, outermost first, joined by "/"
    start_s: float  # of the trace's clock
    end_s: float
    self_s: float  # seconds not spent in spans inside it
    failed: bool = False  # it was left by an exception
    thread: int = 0

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class CountEvent:
    """A number to add up.

    >>> CountEvent("tokens", 128, "step/rollout").value
    128
    """

    name: str
    value: float
    path: str = ""  # the open spans when it was counted


Event = SpanEvent | CountEvent
Sink = Callable[[Event], None]


class _Open:
    """A span that has not ended."""

    __slots__ = ("children_s", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.children_s = 0.0


class Trace:
    """Where the time goes. Each thread has its own stack of open spans; sinks are called on the thread that emits."""

    def __init__(self, sinks: Iterable[Sink] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self.sinks: list[Sink] = list(sinks)
        self.clock = clock
        self._local = threading.local()

    def _stack(self) -> list[_Open]:
        try:
            return self._local.stack  # type: ignore[no-any-return]
        except AttributeError:
            self._local.stack = []
            return self._local.stack  # type: ignore[no-any-return]

    def _emit(self, event: Event) -> None:
        for sink in self.sinks:
            sink(event)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time the block under `name`, which holds no "/"; the event comes when the block ends, however it ends."""
        assert "/" not in name, f"span name {name!r} holds '/'"
        stack = self._stack()
        opened = _Open(f"{stack[-1].path}/{name}" if stack else name)
        stack.append(opened)
        failed = True
        start_s = self.clock()
        try:
            yield
            failed = False
        finally:
            end_s = self.clock()
            popped = stack.pop()
            assert popped is opened, f"span {popped.path} ended inside {opened.path}"
            if stack:
                stack[-1].children_s += end_s - start_s
            self_s = end_s - start_s - opened.children_s
            self._emit(SpanEvent(opened.path, start_s, end_s, self_s, failed, threading.get_ident()))

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """`function`, each call of it a span."""

        @wraps(function)
        def call(*args: P.args, **named: P.kwargs) -> T:
            with self.span(name):
                return function(*args, **named)

        return call

    def count(self, name: str, value: float = 1) -> None:
        """Add `value` to the counter `name`."""
        if self.sinks:
            stack = self._stack()
            self._emit(CountEvent(name, value, stack[-1].path if stack else ""))


class Totals:
    """A sink that sums: seconds by span name, without what its children took, and counters by name.

    The seconds of all names of one thread add up to the time its outermost spans took: none is counted twice.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, float] = {}
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, SpanEvent):
                self.seconds[event.name] = self.seconds.get(event.name, 0.0) + event.self_s
            else:
                self.counts[event.name] = self.counts.get(event.name, 0) + event.value

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(seconds, counts) since the last take; both start anew."""
        with self._lock:
            taken = self.seconds, self.counts
            self.seconds, self.counts = {}, {}
            return taken
