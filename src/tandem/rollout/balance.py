"""Shares over the engines behind one router: each is given weights by the loads that all have (engine/cluster.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from tandem.engine.cluster import Demand, local_weights
from tandem.engine.deal import Deals
from tandem.errors import EngineError

if TYPE_CHECKING:
    from tandem.rollout.router import Replica

SYNC_S = 1.0  # between two askings
LATE_S = 10.0  # after which what an engine has not told is done without


class Balance:
    """`weights`: of the tree, by path. Called by who waits at the router; asks engines between their steps."""

    def __init__(self, weights: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.weights, self.clock = weights, clock
        self._asked: dict[Replica, Future[dict[str, float]]] = {}
        self._asked_s = -float("inf")
        self._demand: dict[Replica, Demand] = {}

    def look(self, replicas: Sequence[Replica]) -> None:
        now = self.clock()
        if self._asked:
            if all(future.done() for future in self._asked.values()) or now - self._asked_s > LATE_S:
                self._tell(now)
        elif now - self._asked_s >= SYNC_S:
            self._asked_s = now
            for replica in replicas:
                if replica.open or replica.driver.threaded:  # one without a thread answers as it is driven
                    with suppress(EngineError):  # it stopped
                        self._asked[replica] = replica.driver.call(partial(_loads, replica.driver.engine))

    def _tell(self, now: float) -> None:
        asked, self._asked = self._asked, {}
        told = {one: future.result() for one, future in asked.items() if future.done() and not future.exception()}
        loads = [self._demand.setdefault(one, Demand()).told(load, now) for one, load in told.items()]
        for replica, local in zip(told, local_weights(self.weights, loads), strict=True):
            with suppress(EngineError):
                replica.driver.call(partial(_weigh, replica.driver.engine, local))


def _loads(engine: Any) -> dict[str, float]:
    order = engine.scheduler.order
    return order.tree.loads() if isinstance(order, Deals) else {}


def _weigh(engine: Any, weights: Mapping[str, float]) -> None:
    order = engine.scheduler.order
    if isinstance(order, Deals):
        order.tree.weigh(weights)
