"""Turns on the cores of one machine, where what samples and what learns compute on the same.

Each then has all of them for a step of the engine, or for a microbatch: no thread of a kernel waits for one that the
other's keep from running.
"""

from __future__ import annotations

import threading
from typing import Any

from tandem.trace import Trace
from tandem.types import Completion, Request


class Cores:
    """Whose turn it is to compute: first come, first served."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = self._serving = 0

    def __enter__(self) -> None:
        with self._changed:
            mine = self._next
            self._next += 1
            self._changed.wait_for(lambda: self._serving == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._serving += 1
            self._changed.notify_all()

    def give_way(self) -> None:
        """Who holds them lets those go first who wait."""
        with self._changed:
            if self._next == self._serving + 1:
                return
        self.__exit__()
        self.__enter__()


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

    def drawn(self, request_id: str, first: int, /) -> Any:
        return self.engine.drawn(request_id, first)

    def step(self) -> list[Completion]:
        with self.trace.span("cores"):
            self.cores.__enter__()
        try:
            return self.engine.step()  # type: ignore[no-any-return]
        finally:
            self.cores.__exit__()
