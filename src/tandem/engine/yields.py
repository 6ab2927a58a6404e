"""Who gives up its pages, by what the tenants of engine/share.py hold: see engine/deal.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence
    from tandem.engine.share import Node

Price = Callable[["Sequence"], tuple[float, int]]  # of a preemption: the least is preempted


def held_below(running: list[Sequence], places: bool = False) -> dict[Node, int]:
    """Blocks that are held below each node; or places, one by each that runs."""
    held: dict[Node, int] = {}
    for sequence in running:
        assert sequence.pages is not None
        size = 1 if places else sequence.pages.blocks
        for node in _way(sequence):
            held[node] = held.get(node, 0) + size
    return held


def within(node: Node, held: dict[Node, int], running: list[Sequence]) -> list[Sequence]:
    """Of those below a node, the ones in the tenant that holds most for its weight, at each level."""
    while True:
        below = {child for one in running for child in _way(one) if child.parent is node and child.children}
        if not below:
            return running
        node = max(below, key=lambda child: (held[child] / child.weight, -child.number))
        running = [one for one in running if node in _way(one)]


def who_yields(
    root: Node, sequence: Sequence, needed: int, held: dict[Node, int], spare: list[Sequence], price: Price
) -> Sequence | None:
    """Who of the spare ones gives its room to a request that needs so many blocks; or a place, where `needed` is 0.

    Of the first node on the request's way that has a sibling which may give: one that has no less for its weight than
    the node afterwards. Those that hold most for their weight are asked first, of what is below them the cheapest
    within who holds most.
    """
    way = _way(sequence)
    for node, own in zip([root, *way], way, strict=False):
        needs = held.get(own, 0) + (needed or 1)
        siblings = [child for child in node.children.values() if child in held and child is not own]
        for most in sorted(siblings, key=lambda child: (-held[child] / child.weight, child.number)):
            if needs * most.weight > held[most] * own.weight:
                break
            found = within(most, held, [one for one in spare if most in _way(one)])
            if not found:
                continue
            victim = min(found, key=price)
            assert victim.pages is not None
            if needs * most.weight <= (held[most] - (victim.pages.blocks if needed else 1)) * own.weight:
                return victim
    return None


def _way(sequence: Sequence) -> tuple[Node, ...]:
    assert sequence.leaf is not None
    return sequence.leaf.way
