"""Shares over the engines behind one router: each promises what engine/cluster.py makes of the loads that all have."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tandem.engine.cluster import Splits
from tandem.errors import EngineError

if TYPE_CHECKING:
    from tandem.engine.share import Terms
    from tandem.rollout.router import Replica

SYNC_S = 1.0  # between two askings
LATE_S = 10.0  # after which what an engine has not told is done without


class Balance:
    """`terms`: of the tree, by path. Called by who waits at the router; asks engines between their steps."""

    def __init__(self, terms: Mapping[str, Terms], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._splits = Splits(terms)
        self._asked: dict[Replica, Future[Mapping[str, float]]] = {}
        self._asked_s = -float("inf")

    def look(self, replicas: Sequence[Replica]) -> None:
        now = self.clock()
        if self._asked:
            if (
                all(future.done() or not _driven(one) for one, future in self._asked.items())
                or now - self._asked_s > LATE_S
            ):
                self._tell(now)
        elif now - self._asked_s >= SYNC_S:
            self._asked_s = now
            for replica in replicas:
                if _driven(replica):
                    with suppress(EngineError):  # it stopped
                        self._asked[replica] = replica.driver.call(replica.driver.engine.loads)

    def _tell(self, now: float) -> None:
        asked, self._asked = self._asked, {}
        told = {one: future.result() for one, future in asked.items() if future.done() and not future.exception()}
        for replica, terms in self._splits.told(told, now).items():
            with suppress(EngineError):
                replica.driver.call(partial(replica.driver.engine.promise, terms))


def _driven(replica: Replica) -> bool:
    """Whether it answers: one without a thread does as it is driven."""
    return bool(replica.open) or replica.driver.threaded
