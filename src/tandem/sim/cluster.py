"""Several simulated engines, each with the real scheduler, under one clock and one tree of tenants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from tandem.engine.cluster import Splits
from tandem.engine.deal import Deals

if TYPE_CHECKING:
    from tandem.engine.share import Terms
    from tandem.sim.engine import SimEngine
    from tandem.types import Completion

SYNC_S = 1.0  # between two tellings of loads
IDLE_S = 0.01  # after which an engine that has nothing to run looks again


class Cluster:
    """Steps whichever engine is free first. `terms`: of the tree, by path; None: each engine by its own.

    came: told of each completion, when it is and of which engine; it may submit more.
    """

    def __init__(self, engines: list[SimEngine], terms: Mapping[str, Terms] | None = None) -> None:
        self.engines = engines
        self.splits = Splits(terms) if terms is not None else None
        self.now = 0.0
        self.came: Callable[[Completion, int], None] = lambda completion, engine: None
        self._free = [(0.0, number) for number in range(len(engines))]
        heapify(self._free)
        self._ended: list[tuple[float, int, list[Completion]]] = []
        self._told_s = -SYNC_S

    def had(self, tenant: str) -> float:
        """Device-seconds that a tenant had on all of them."""
        return sum(order.tree.tenant(tenant).had for order in self._orders()) / 1e12

    def run(self, until_s: float) -> None:
        while self._free[0][0] < until_s:
            self.now, number = heappop(self._free)
            while self._ended and self._ended[0][0] <= self.now:
                _, engine, completions = heappop(self._ended)
                for completion in completions:
                    self.came(completion, engine)
            if self.splits is not None and self.now - self._told_s >= SYNC_S:
                self._told_s = self.now
                told = self.splits.told({order: order.tree.loads() for order in self._orders()}, self.now)
                for order, terms in told.items():
                    order.tree.promise(terms)
            seconds, completions = self.engines[number].step(self.now)
            free_s = self.now + (seconds or IDLE_S)
            if completions:
                heappush(self._ended, (free_s, number, completions))
            heappush(self._free, (free_s, number))

    def _orders(self) -> list[Deals]:
        orders = [engine.scheduler.order for engine in self.engines]
        return [order for order in orders if isinstance(order, Deals)]
