"""Weights of tenants over several engines, so that shares hold for all of them together.

Linux gives a group on a processor the part of its weight that its load there is of its load everywhere,
w_gi = w_g d_gi / sum_j d_gj, clamped between a floor and w_g (calc_group_shares). With loads that lie otherwise on each
processor that is not the group's share of the machine: where tenants of weight 4 and 1 have four fifths of their
requests on different engines, they get 72 and 28 %. So it is carried on here: parts of engines are scaled by group to
what the groups are due, and by engine to what the engine has, in turn, until both hold (Deming and Stephan, 1940;
Sinkhorn, 1967). The first half of the first turn is Linux's rule.

What a group is due of all engines: its weight's part, and no more than it could use; what is left over is the others'.
Level by level: what a node has of each engine is what its children divide.

All of it is a function of the loads that engines report: no clock, no memory but `Demand`, which decays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TURNS = 64
FLOOR = 1e-3  # of a weight, on an engine on which a tenant has nothing now: it may begin there before loads are told
HALF_LIFE_S = 5.0  # of the memory of a load

Loads = Mapping[str, float]  # by tenant path: requests that it has there


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
        faded = {path: load * fade for path, load in self._loads.items() if load * fade > 1e-6}
        self._loads = {path: max(loads.get(path, 0.0), faded.get(path, 0.0)) for path in {**faded, **loads}}
        return dict(self._loads)


def local_weights(weights: Loads, loads: Sequence[Loads]) -> list[dict[str, float]]:
    """The weight of each tenant on each engine, of its own weight (1 where none is named) and what engines report.

    >>> of = local_weights({"a": 4, "b": 1}, [{"a": 8, "b": 2}, {"a": 2, "b": 8}])
    >>> [round(sum(one[name] / (one["a"] + one["b"]) for one in of) / 2, 3) for name in ("a", "b")]
    [0.8, 0.2]
    """
    total: list[dict[str, float]] = []  # with what is below each node
    for one in loads:
        summed: dict[str, float] = {}
        for path, load in one.items():
            for node in _above(path):
                summed[node] = summed.get(node, 0.0) + load
        total.append(summed)
    paths = sorted({path for one in total for path in one}, key=lambda path: (path.count("/"), path))
    parts: dict[str | None, list[float]] = {None: [1.0] * len(loads)}  # of each engine, by node; None is all of it
    found: list[dict[str, float]] = [{} for _ in loads]
    for parent in [None, *paths]:
        children = [path for path in paths if _parent(path) == parent]
        own = [weights.get(path, 1.0) for path in children]
        shares = balanced(own, [[one.get(path, 0.0) for one in total] for path in children], parts[parent])
        for path, weight, share in zip(children, own, shares, strict=True):
            parts[path] = share
            for engine, part in enumerate(share):
                sums = sum(other[engine] for other in shares)
                found[engine][path] = max(FLOOR * weight, sum(own) * part / sums if sums else weight)
    return found


def balanced(weights: Sequence[float], demand: Sequence[Sequence[float]], room: Sequence[float]) -> list[list[float]]:
    """Parts x[g][i] of engines of this much room, 0 where a group has no demand.

    By group they add up to its weight's part of all the room where that can be, by engine to its room.
    """
    due = _due(weights, demand, room)
    parts = [[float(load > 0) * max(load, 1e-9) for load in loads] for loads in demand]
    for _ in range(TURNS):
        for group, most in enumerate(due):
            sums = sum(parts[group])
            if sums:
                parts[group] = [part * most / sums for part in parts[group]]
        for engine, most in enumerate(room):
            sums = sum(row[engine] for row in parts)
            if sums:
                for row in parts:
                    row[engine] *= most / sums
    return parts


def _due(weights: Sequence[float], demand: Sequence[Sequence[float]], room: Sequence[float]) -> list[float]:
    """What each group is due of all the room: by weight, at most that of the engines on which it has something."""
    most = [sum(space for load, space in zip(loads, room, strict=True) if load > 0) for loads in demand]
    due, left = [0.0] * len(weights), sum(room)
    open_ = [group for group in range(len(weights)) if most[group] > 0]
    while open_:
        total = sum(weights[group] for group in open_)
        full = [group for group in open_ if most[group] <= left * weights[group] / total]
        if not full:
            for group in open_:
                due[group] = left * weights[group] / total
            break
        for group in full:
            due[group] = most[group]
        left -= sum(due[group] for group in full)
        open_ = [group for group in open_ if group not in full]
    return due


def _parent(path: str) -> str | None:
    return path.rpartition("/")[0] if "/" in path else None


def _above(path: str) -> list[str]:
    """A node and all above it."""
    parts = path.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
