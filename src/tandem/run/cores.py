"""Turns on the cores of one machine, where what samples and what learns compute on the same.

Each then has all of them for a step of the engine, or for a microbatch: no thread of a kernel waits for one that the
other's keep from running.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tandem.engine.share import Terms
from tandem.engine.space import Space
from tandem.trace import Trace
from tandem.types import Completion, Request

LOOK_S = 1.0  # between two looks of who waits


class Cores:
    """Whose turn it is to compute: first come, first served."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._serving = 0
        self._gone = set[int]()  # turns of those who did not wait for them
        self._holder: int | None = None  # the thread that has them
        self.since_s = time.monotonic()  # the present turn began then
        self.engine_s = 0.0  # that engines waited

    def take(self, look: Callable[[], None] = lambda: None) -> None:
        """look: called while another has them, and raises where that takes too long."""
        with self._changed:
            mine = self._next
            self._next += 1
            try:
                while not self._changed.wait_for(lambda: self._serving == mine, LOOK_S):
                    look()
            except BaseException:
                self._gone.add(mine)
                self._pass()
                raise
            self._holder, self.since_s = threading.get_ident(), time.monotonic()

    def leave(self) -> None:
        """By who has them; by another it is nothing."""
        with self._changed:
            if self._holder == threading.get_ident():
                self._holder = None
                self._serving += 1
                self._pass()

    def _pass(self) -> None:
        while self._serving in self._gone:
            self._gone.remove(self._serving)
            self._serving += 1
        self._changed.notify_all()

    def give_way(self, look: Callable[[], None]) -> None:
        """Who holds them lets those go first who wait."""
        with self._changed:
            if self._next == self._serving + 1:
                return
        self.leave()
        self.take(look)


class Taking:
    """An engine that takes the cores for a step. Trace span "cores": until it has them."""

    def __init__(self, engine: Any, cores: Cores, trace: Trace) -> None:
        self.engine = engine
        self.cores = cores
        self.trace = trace

    @property
    def has_work(self) -> bool:
        return bool(self.engine.has_work)

    def check(self, request: Request, /) -> None:
        self.engine.check(request)

    def submit(self, request: Request, /) -> None:
        self.engine.submit(request)

    def abort(self, request_id: str, /) -> Completion | None:
        return self.engine.abort(request_id)  # type: ignore[no-any-return]

    def finish_program(self, program_id: str, tenant: str = "", /) -> None:
        self.engine.finish_program(program_id, tenant)

    def on_restoring(self, told: Callable[[str], None], /) -> None:
        self.engine.on_restoring(told)

    def space(self) -> Space | None:
        return self.engine.space()  # type: ignore[no-any-return]

    def loads(self) -> Mapping[str, float]:
        return self.engine.loads()  # type: ignore[no-any-return]

    def promise(self, terms: Mapping[str, Terms], /) -> None:
        self.engine.promise(terms)

    def drawn(self, request_id: str, first: int, /) -> Any:
        return self.engine.drawn(request_id, first)

    def step(self) -> list[Completion]:
        began_s = time.monotonic()
        with self.trace.span("cores"):
            self.cores.take()
        self.cores.engine_s += time.monotonic() - began_s
        try:
            return self.engine.step()  # type: ignore[no-any-return]
        finally:
            self.cores.leave()
