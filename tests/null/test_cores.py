"""Turns on the cores of a machine: who waits, who gives up waiting, and who comes next."""

from __future__ import annotations

import threading
import time

import pytest

from tandem.run import cores
from tandem.run.cores import Cores

MOST_S = 30.0


class Others:
    """Threads that take the cores, each until it is told to leave them."""

    def __init__(self, of: Cores) -> None:
        self.of, self.order, self.frees = of, list[str](), dict[str, threading.Event]()
        self.threads: list[threading.Thread] = []

    def come(self, name: str) -> None:
        """One more, which waits or has them when this returns."""
        self.frees[name], before = threading.Event(), self.of._next
        self.threads.append(threading.Thread(target=self._run, args=(name,), daemon=True))
        self.threads[-1].start()
        until_s = time.monotonic() + MOST_S
        while self.of._next == before:
            assert time.monotonic() < until_s
            time.sleep(0.001)

    def _run(self, name: str) -> None:
        self.of.take()
        self.order.append(name)
        self.frees[name].wait(MOST_S)
        self.order.append(f"{name} left")
        self.of.leave()

    def end(self) -> list[str]:
        for name in self.frees:
            self.frees[name].set()
        for thread in self.threads:
            thread.join(MOST_S)
            assert not thread.is_alive()
        return self.order


def give_up() -> None:
    raise TimeoutError


def test_who_gives_up_waiting_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that is stopped while it waits, and leaves a turn for which what samples waits for ever."""
    monkeypatch.setattr(cores, "LOOK_S", 0.01)
    of = Cores()
    others = Others(of)
    others.come("one")
    with pytest.raises(TimeoutError):
        of.take(give_up)
    others.come("two")
    assert others.end() == ["one", "one left", "two", "two left"]


def test_who_gave_way_and_gave_up_gives_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn that is given back by who has none: two compute at once, and the next waits for ever."""
    monkeypatch.setattr(cores, "LOOK_S", 0.01)
    of = Cores()
    others = Others(of)
    of.take()
    others.come("one")
    with pytest.raises(TimeoutError):
        of.give_way(give_up)
    of.leave()
    others.come("two")
    assert others.end() == ["one", "one left", "two", "two left"]
