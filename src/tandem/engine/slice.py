"""How long a step by shares may be, and who of those that wait was served least: see engine/deal.py."""

from __future__ import annotations

from heapq import heappop, heapreplace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.engine.costs import Prices
    from tandem.engine.share import Node


def longest(root: Node, prices: Prices, stamp: int) -> int:
    """Picoseconds that a step may take: the least of (base + what a tenant has) / (its part), over all that have rows.

    stamp: of those nodes for which this step's demand is noted. The base is given to the tenant that it is the step of.
    """
    base = prices.base
    most: float = base + root.demand if not root.waiting else float("inf")
    whose: Node | None = None
    stack = [(root, 1.0)]
    while stack:
        node, share = stack.pop()
        waiting = first(node)
        inner = [*node.inner, waiting] if waiting is not None and waiting.stamp != stamp else node.inner
        for child in inner:
            if not child.children:  # a program that waits
                continue
            part = share * child.weight / node.total
            demand = child.demand if child.stamp == stamp else 0
            length = (base + demand + prices.prefill * child.wait_tokens) / part
            if part < 1 and length < most:
                most, whose = length, child
            if child.stamp == stamp:
                stack.append((child, part))
    if whose is not None:  # the base is its: what it may run is what is left of its part
        for above in whose.way:
            if above.stamp == stamp:
                above.given += base
    return int(min(most, float(1 << 62)))


def first(node: Node) -> Node | None:
    """The child with requests that wait that was served least; it stays in its queue."""
    queue = node.queue
    while queue:
        time, number, child = queue[0]
        if not child.waiting:
            heappop(queue)
            child.queued = False
        elif child.time != time:
            heapreplace(queue, (child.time, number, child))
        else:
            return child
    return None
