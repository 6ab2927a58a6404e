"""Terms of tenants that a router told an engine: what it knows of them."""

from __future__ import annotations

import asyncio

from tandem.engine.cluster import Demand


class Lease:
    """Until `ends`, `told` have terms that are not the tree's own."""

    def __init__(self) -> None:
        self.demand = Demand()
        self.ends: asyncio.TimerHandle | None = None
        self.told: set[str] = set()
