"""Weights of tenants over several engines, so that shares hold for all of them together.

Linux gives a group on a processor the part of its weight that its load there is of its load everywhere,
w_gi = w_g d_gi / sum_j d_gj, clamped between a floor and w_g (calc_group_shares). With loads that lie otherwise on each
processor that is not the group's share of the machine: where tenants of weight 4 and 1 have four fifths of their
requests on different engines, they get 72 and 28 %. So it is carried on here: parts of engines are scaled by group to
what the groups are due, and by engine to what the engine has, in turn, until both hold (Deming and Stephan, 1940;
Sinkhorn, 1967). The first half of the first turn is Linux's rule.

What a group is due of all engines: its weight's part, no less than its guarantee, and no more than it could use or its
cap allows; the rest is the others'. Level by level: what a node has of each engine is what its children divide.
A guarantee and a cap are split over the engines as what the group is due of them is, and add up to what was promised.

All of it is a function of the loads that engines report: no clock, no memory but `Demand`, which decays.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from tandem.engine.share import Terms

TURNS = 64
FLOOR = 1e-3  # of a weight, on an engine on which a tenant has nothing now: it may begin there before loads are told
HALF_LIFE_S = 5.0  # of the memory of a load
LEAST = 0.5  # requests: less than that is nothing; a part of an engine is not held for it

Loads = Mapping[str, float]  # by tenant path: requests that it has there
Key = TypeVar("Key", bound=Hashable)


class Demand:
    """Loads of one engine as they are told: what is there now, or what decays of what was.

    >>> demand = Demand()
    >>> demand.told({"a": 8.0}, 0.0)["a"], demand.told({}, 5.0)["a"], demand.told({"a": 6.0}, 10.0)["a"]
    (8.0, 4.0, 6.0)
    """

    def __init__(self) -> None:
        self._loads: dict[str, float] = {}
        self._now_s = 0.0

    def told(self, loads: Loads, now_s: float) -> dict[str, float]:
        """A load that rises counts at once, so that who comes back has its share at once; one that falls, slowly."""
        fade = 0.5 ** (max(0.0, now_s - self._now_s) / HALF_LIFE_S)
        self._now_s = now_s
        faded = {path: load * fade for path, load in self._loads.items() if load * fade >= LEAST}
        self._loads = {path: max(loads.get(path, 0.0), faded.get(path, 0.0)) for path in {**faded, **loads}}
        return dict(self._loads)


class Splits:
    """What several engines tell of their loads, and what each is told. terms: of the tree, by path."""

    def __init__(self, terms: Mapping[str, Terms]) -> None:
        self.terms = terms
        self._demand: dict[Hashable, Demand] = {}

    def told(self, loads: Mapping[Key, Loads], now_s: float) -> dict[Key, dict[str, Terms]]:
        """Of the engines that told something, what each promises from now on (Tree.weigh)."""
        known = [self._demand.setdefault(engine, Demand()).told(load, now_s) for engine, load in loads.items()]
        return dict(zip(loads, local_terms(self.terms, known), strict=True))


def local_terms(terms: Mapping[str, Terms], loads: Sequence[Loads]) -> list[dict[str, Terms]]:
    """What each tenant is promised on each engine, of what it is promised of all and what engines report.

    >>> of = local_terms({"a": Terms(4), "b": Terms(1)}, [{"a": 8, "b": 2}, {"a": 2, "b": 8}])
    >>> [round(sum(one[name].weight / (one["a"].weight + one["b"].weight) for one in of) / 2, 3) for name in "ab"]
    [0.8, 0.2]
    """
    below: dict[str | None, list[str]] = {}
    for node in sorted({node for one in loads for path in one for node in _above(path)}):
        below.setdefault(_parent(node), []).append(node)
    order: list[str | None] = [None]
    for above in order:  # those above first
        order += below.get(above, [])
    wants = _wants(terms, loads, below, order)
    most = _most(terms, loads, below, order)
    parts: dict[str | None, list[float]] = {None: [float(any(one.values())) for one in loads]}
    # of each engine, by node; None is all of it, and nothing of one that nobody uses
    found: list[dict[str, Terms]] = [{} for _ in loads]
    for parent in order:
        children, room = below.get(parent, []), parts[parent]
        own = [terms.get(path, Terms()) for path in children]
        demand = [wants[path] for path in children]
        weights = [one.weight for one in own]
        least = [one.guarantee * sum(room) for one in own]
        shares = balanced(weights, demand, room, least, [most[path] for path in children])
        for path, one, share in zip(children, own, shares, strict=True):
            parts[path] = share
            caps = _split(one.cap * len(loads), share) if one.cap < 1 else [1.0] * len(loads)
            for engine, part in enumerate(share):
                sums = sum(other[engine] for other in shares)
                weight = max(FLOOR * one.weight, sum(weights) * part / sums if sums else one.weight)
                weight = min(max(weight, 1e-3), 1e6)
                if part:
                    split = part / sum(share)
                    guarantee = min(1.0, one.guarantee * split * sum(room) / room[engine])
                    found[engine][path] = Terms(weight, guarantee, max(caps[engine], 1e-9))
                else:  # until the next telling it may have what it might of one engine alone
                    found[engine][path] = Terms(weight, one.guarantee, one.cap)
    return found


def _split(whole: float, parts: Sequence[float]) -> list[float]:
    """So much of engines, as these parts, and at most all of one.

    >>> _split(1.5, [0.5, 0.25, 0.25]), _split(1.5, [1.0, 0.0, 0.0])
    ([0.75, 0.375, 0.375], [1.0, 0.0, 0.0])
    """
    found = [0.0] * len(parts)
    open_ = [engine for engine, part in enumerate(parts) if part > 0]
    while open_ and whole > 0:
        each = whole / sum(parts[engine] for engine in open_)
        full = [engine for engine in open_ if parts[engine] * each >= 1]
        for engine in full or open_:
            found[engine] = min(1.0, parts[engine] * each)
        if not full:
            break
        whole -= len(full)
        open_ = [engine for engine in open_ if engine not in full]
    return found


def _wants(
    terms: Mapping[str, Terms],
    loads: Sequence[Loads],
    below: Mapping[str | None, Sequence[str]],
    order: Sequence[str | None],
) -> dict[str, list[float]]:
    """Where each node has work, as parts of 1: that of those below it, each for its weight; a request of its own is a
    program, which weighs 1."""
    found: dict[str, list[float]] = {}
    for path in reversed(order[1:]):
        assert path is not None
        where = [one.get(path, 0.0) for one in loads]
        for child in below.get(path, ()):
            weight = terms[child].weight if child in terms else 1.0
            where = [sums + weight * part for sums, part in zip(where, found[child], strict=True)]
        found[path] = [part / (sum(where) or 1.0) for part in where]
    return found


def _most(
    terms: Mapping[str, Terms],
    loads: Sequence[Loads],
    below: Mapping[str | None, Sequence[str]],
    order: Sequence[str | None],
) -> dict[str, float]:
    """Engines that each node may have at most, by its cap and by those of all below it."""
    own = {path for one in loads for path, load in one.items() if load > 0}  # with programs of their own
    found: dict[str, float] = {}
    for path in reversed(order[1:]):
        assert path is not None
        cap = terms[path].cap if path in terms else 1.0
        children = float("inf") if path in own else sum(found[child] for child in below[path])
        found[path] = min(cap * len(loads), children)
    return found


def balanced(
    weights: Sequence[float],
    demand: Sequence[Sequence[float]],
    room: Sequence[float],
    least: Sequence[float] = (),
    most: Sequence[float] = (),
) -> list[list[float]]:
    """Parts x[g][i] of engines of this much room, 0 where a group has no demand.

    By group they add up to its weight's part of all the room where that can be, no less than `least` and no more than
    `most`; by engine to its room, as far as those allow.
    """
    spaces = [sum(space for load, space in zip(loads, room, strict=True) if load > 0) for loads in demand]
    highest = [min(one, bound) for one, bound in zip(spaces, most, strict=True)] if most else spaces
    due = _due(weights, least or [0.0] * len(weights), highest, sum(room))
    parts = [[float(load > 0) * max(load, 1e-9) for load in loads] for loads in demand]
    wanted = [space if any(row[engine] for row in parts) else 0.0 for engine, space in enumerate(room)]
    idle = sum(wanted) - sum(due)  # what caps leave to nobody, of whichever engine
    if idle > 1e-9 and any(bound < space for bound, space in zip(highest, spaces, strict=True)):
        parts.append([float(space > 0) for space in wanted])
        due.append(idle)
    for _ in range(TURNS):
        for group, whole in enumerate(due):
            sums = sum(parts[group])
            if sums:
                parts[group] = [part * whole / sums for part in parts[group]]
        for engine, space in enumerate(room):
            sums = sum(row[engine] for row in parts)
            if sums:
                for row in parts:
                    row[engine] *= space / sums
    return parts[: len(weights)]


def _due(weights: Sequence[float], least: Sequence[float], most: Sequence[float], room: float) -> list[float]:
    """What each group is due of all the room: by weight, no less than `least`, and no more than `most` in any case."""
    if sum(most) <= room:
        return list(most)
    low, high = 0.0, 1.0  # of the room for a unit of weight: what all are due then grows with it
    bounds = list(zip(weights, least, most, strict=True))

    def at(rate: float) -> list[float]:
        return [min(max(rate * weight, fewest), bound) for weight, fewest, bound in bounds]

    while sum(at(high)) < room:
        high *= 2
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < room else (low, middle)
    return at(high)


def _parent(path: str) -> str | None:
    return path.rpartition("/")[0] if "/" in path else None


def _above(path: str) -> list[str]:
    """A node and all above it."""
    parts = path.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
