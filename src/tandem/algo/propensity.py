"""How likely a group of some length is to be kept, and the weights that undo it.

All lengths here are a group's end: the tokens of its longest program. Where who chooses knows the probability it is
exact (`Dispatched.keep`); of a race it is exact given the law of the ends; else it is estimated from the groups of the
run's last steps, under the one assumption that it never grows with length. Formulas and sources: docs/fairness.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tandem.algo.lengths import Dispatched, Race
from tandem.numerics.interval import wilson_interval

Array = np.ndarray

LEAST = 25  # groups of a bin whose share of kept ones is taken
ROUNDING = 1e-9  # of a sum of masses
PARTS = 8  # of the steps, each left out once


class Ending(Protocol):
    """What is looked at of a group that ran: a Dispatched, or what is left of one in a memory of many."""

    @property
    def end(self) -> int: ...
    @property
    def clock(self) -> float: ...
    @property
    def ended(self) -> bool: ...
    @property
    def usable(self) -> bool: ...
    @property
    def kept(self) -> bool: ...


class Keep(NamedTuple):
    """A keep probability and its 95 % interval, which is the probability alone where it is known."""

    probability: float
    low: float
    high: float


class Law:
    """The distribution of the ends of groups, of which some were cut before: Kaplan's and Meier's.

    What a race cuts it cuts at a turn between those that end at once, so ends are taken with their turns (`clock`).
    `usable` ends alone are counted by `below` and `until`; the others compete with them (Aalen and Johansen 1978).

    >>> law = Law([Dispatched(str(end), (str(end),), (end,), ("trained",)) for end in (3, 5, 5, 9)])
    >>> law.below(5), law.until(5), law.until(100)
    (0.25, 0.75, 1.0)
    """

    def __init__(self, groups: Sequence[Ending]) -> None:
        ends = np.array([group.clock for group in groups], float)
        ended = np.array([group.ended for group in groups], bool)
        self.points, place = np.unique(ends, return_inverse=True)
        events = np.bincount(place, ended, len(self.points))
        at_risk = len(ends) - np.searchsorted(np.sort(ends), self.points, "left")
        left = at_risk - events  # one cut at a point would have ended after it
        after = np.cumprod(left / at_risk)
        before = np.concatenate([[1.0], after[:-1]])
        self.masses = np.where(ended, (before / at_risk)[place], 0.0)  # of each group; what is lacking to 1 lies beyond
        usable = np.array([group.usable for group in groups], bool)
        self._usable = np.bincount(place, np.where(usable, self.masses, 0.0), len(self.points)).cumsum()
        with np.errstate(divide="ignore", invalid="ignore"):
            greenwood = np.nan_to_num(events / (at_risk * left), nan=0.0, posinf=0.0).cumsum()
            counts = (1.0 - after) / (after * greenwood)  # whose binomial variance is Greenwood's
        self._counts = np.where(np.isfinite(counts), np.minimum(counts, len(ends)), len(ends))

    def until(self, end: int) -> float:
        """Probability that a group has ended, and is usable, with at most so many tokens."""
        return self.below(end + 1)

    def below(self, end: int) -> float:
        """The same with fewer."""
        index = int(np.searchsorted(self.points, end, "left"))
        return min(1.0, float(self._usable[index - 1])) if index else 0.0

    def count(self, end: int) -> float:
        """How many groups that nobody cuts would tell as much of `until`."""
        return float(self._counts[max(0, int(np.searchsorted(self.points, end + 1, "left")) - 1)])


def in_race(law: Law, end: int, race: Race) -> Keep:
    """P(the usable others that end before, and those of the same end whose turn is before, are fewer than `enough`).

    With b and t the law's shares that end before and at once, K ~ Bin(others, b) and J ~ Bin(others - K, t / (1 - b)):
    E[min(1, (enough - K)+ / (J + 1))]. Exact where the law is; its interval is that of the law's shares.
    """
    count = law.count(end)
    shares = [wilson_interval(share * count, count) for share in (law.below(end), law.until(end))]
    (low, high), (low_until, high_until) = shares
    of = race.others, race.enough
    return Keep(_won(*of, law.below(end), law.until(end)), _won(*of, high, high_until), _won(*of, low, low_until))


def _won(others: int, enough: int, before: float, until: float) -> float:
    tied = min(1.0, (until - before) / (1.0 - before)) if before < 1.0 else 0.0
    ways, wins = _ways(others), _wins(others, enough)
    ahead = _powers(before, ways[0], np.arange(others + 1), others - np.arange(others + 1))
    number = np.arange(others + 1)[:enough, None]
    at_once = _powers(
        tied, ways[:enough], np.arange(others + 1), np.maximum(0, others - number - np.arange(others + 1))
    )
    return min(1.0, float(ahead[:enough] @ (at_once * wins).sum(1)))


def _powers(share: float, ways: Array, yes: Array, no: Array) -> Array:
    """Binomial probabilities: exp(ways) share^yes (1 - share)^no, and 0^0 is 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_yes = np.where(yes == 0, 0.0, yes * np.log(share))
        log_no = np.where(no == 0, 0.0, no * np.log1p(-share))
    return np.exp(ways + log_yes + log_no)


@functools.cache
def _ways(of: int) -> Array:
    """[k, j] logarithm of (of - k over j); -inf where there is none."""

    def ways(n: int, j: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) if j <= n else -math.inf

    return np.array([[ways(of - k, j) for j in range(of + 1)] for k in range(of + 1)])


@functools.cache
def _wins(others: int, enough: int) -> Array:
    """[k, j] chance to be among the first where k ended before and j at once."""
    places = np.arange(1, others + 2)
    return np.minimum(1.0, (enough - np.arange(min(enough, others + 1)))[:, None] / places)


class Estimate:
    """Keep probabilities by length from the groups of some steps, of which it is known whether they were kept.

    The share of kept groups among those dispatched, in bins of at least LEAST of them, made to fall with length by
    pooling neighbours (isotonic regression, Ayer et al. 1955: the likelihood's maximum where a deadline is seen only by
    who met it). A group that was cut stands for the longer ones, by the law's masses. The interval is Wilson's for as
    many groups as would vary as much as the estimate does where a part of the steps is left out (jackknife): what is
    kept in a step, and in the next, depends on what runs beside it.
    """

    def __init__(self, steps: Sequence[Sequence[Ending]]) -> None:
        self.ends, self.shares, self.counts = _falling([one for step in steps for one in step])
        parts = [part for part in np.array_split(np.arange(len(steps)), PARTS) if len(part)]
        self.others = [
            _falling([one for at, step in enumerate(steps) if at not in part for one in step])
            for part in (parts if len(parts) > 1 else ())
        ]

    def at(self, end: int) -> Keep:
        """Of a group that ends then."""
        share, count = _at(self.ends, self.shares, end), _at(self.ends, self.counts, end)
        without = np.array([_at(ends, shares, end) for ends, shares, _ in self.others if len(ends)])
        variance = (len(without) - 1) * float(without.var()) if len(without) else 0.0
        if 0.0 < share < 1.0 and variance > 0.0:
            count = min(count, max(1.0, share * (1.0 - share) / variance))
        return Keep(share, *wilson_interval(share * count, count))


def _at(ends: Array, values: Array, end: int) -> float:
    return float(values[min(int(np.searchsorted(ends, end, "left")), len(values) - 1)])


def _falling(groups: Sequence[Ending]) -> tuple[Array, Array, Array]:
    """The longest end of each bin, its share of kept groups, and how many it is of."""
    law = Law(groups)
    found: list[tuple[int, float, float]] = []  # longest end, groups dispatched, of them kept
    for index in sorted((i for i, group in enumerate(groups) if group.ended), key=lambda i: groups[i].clock):
        end, number, kept = groups[index].end, float(law.masses[index]) * len(groups), float(groups[index].kept)
        if found and (found[-1][0] == end or found[-1][1] < LEAST):
            _, before, before_kept = found.pop()
            number, kept = before + number, before_kept + kept
        found.append((end, number, kept))
    pooled: list[tuple[int, float, float]] = []
    for block in found:
        pooled.append(block)
        while len(pooled) > 1 and pooled[-1][2] * pooled[-2][1] >= pooled[-2][2] * pooled[-1][1]:
            (_, one, one_kept), (end, other, other_kept) = pooled[-2:]
            pooled[-2:] = [(end, one + other, one_kept + other_kept)]
    shares = np.array([kept / number for _, number, kept in pooled])
    shares = np.where(shares > 1.0 - ROUNDING, 1.0, shares)
    return np.array([end for end, _, _ in pooled]), shares, np.array([number for _, number, _ in pooled])


def keep_probabilities(groups: Sequence[Dispatched], past: Sequence[Sequence[Ending]]) -> dict[str, Keep]:
    """Of each of `groups` that was kept; `past` are those of the steps to estimate from, the present one among them."""
    known = {group.id: Keep(group.keep, group.keep, group.keep) for group in groups if group.keep is not None}
    unknown = [group for group in groups if group.keep is None and group.kept]
    if not unknown:
        return known
    law = Law([one for step in past for one in step])
    estimate = Estimate(past) if any(group.race is None for group in unknown) else None
    for group in unknown:
        if estimate is None or group.race is not None:
            assert group.race is not None
            known[group.id] = in_race(law, group.end, group.race)
        else:
            known[group.id] = estimate.at(group.end)
    return known


class Weights(NamedTuple):
    """Of the groups of a batch."""

    of: dict[str, float]  # by id: their mean over the batch's units is 1
    largest: float  # before they are made so, and before they are clipped
    clipped: float  # share of the groups
    effective: float  # share of the groups that equal weights would need for the same variance


def inverse(keep: Mapping[str, Keep], units: Mapping[str, int], most: float) -> Weights:
    """w = min(1 / keep, most), times sum(n) / sum(w n) over the batch's groups of n units each: Hajek's estimate of the
    mean over all that was dispatched, in place of the batch's own mean."""
    chosen = [group for group in keep if units.get(group)]
    free = np.array([1.0 / max(keep[group].probability, 1e-12) for group in chosen])
    bound, number = np.minimum(free, most), np.array([units[group] for group in chosen], float)
    if not chosen:
        return Weights({}, 1.0, 0.0, 1.0)
    weights = bound * (number.sum() / (bound * number).sum())
    return Weights(
        dict(zip(chosen, weights.tolist(), strict=True)),
        float(free.max()),
        float((free > most).mean()),
        float(bound.sum() ** 2 / (len(bound) * np.square(bound).sum())),
    )
