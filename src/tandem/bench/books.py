"""What it costs to keep account: the seconds in the methods of the ledger, as a share of a run's steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Spent:
    """Seconds in calls from outside; those of one thread within another call count once.

    >>> spent = Spent()
    >>> spent.timing(lambda: spent.timing(sum)([1, 2]))()
    3
    >>> spent.calls, 0.0 < spent.seconds < 60.0
    (1, True)
    """

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self._within = threading.local()
        self._lock = threading.Lock()

    def timing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **named: Any) -> Any:
            if getattr(self._within, "any", False):
                return method(*args, **named)
            self._within.any = True
            started_s = time.perf_counter()
            try:
                return method(*args, **named)
            finally:
                with self._lock:
                    self.seconds += time.perf_counter() - started_s
                    self.calls += 1
                self._within.any = False

        return call


@contextmanager
def spent_in(*kinds: type) -> Iterator[Spent]:
    """Seconds in the public methods of classes, meanwhile."""
    spent = Spent()
    own = {
        kind: {name: method for name, method in vars(kind).items() if name[0] != "_" and callable(method)}
        for kind in kinds
    }
    for kind, methods in own.items():
        for name, method in methods.items():
            setattr(kind, name, spent.timing(method))
    try:
        yield spent
    finally:
        for kind, methods in own.items():
            for name, method in methods.items():
                setattr(kind, name, method)
