"""The sigmoid of cost and quality, R0 + (A - R0) / (1 + (Cmid / C)^B), fitted to rows, with what they leave open.

Source: Khatri et al., "The Art of Scaling Reinforcement Learning Compute for LLMs", arXiv 2510.13786.

For a given Cmid and B the curve is linear in R0 and A, which are solved for under their bounds, so that the search is
over (log Cmid, log B) alone, and can be made for all draws of the bootstrap at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PARAMETERS = 4
DRAWS = 300  # of the bootstrap
ROUNDS = 3  # of curve -> noise -> weights
B_BOUNDS = (0.25, 12.0)
CMID_PAST = 10.0  # Cmid at most, over the largest cost: beyond it what was seen is a power of C, whatever A is
GRID = (28, 14)  # of log Cmid and of log B
ZOOMS, SHRINK = 9, 0.5  # grids of 5 x 5 about the best so far
MOST_POINTS = 400
ROWS_A_DRAW = 8  # of a band
LEVEL = 0.95


class Curve(NamedTuple):
    """Parameters of one sigmoid, or of many, one a place of the arrays."""

    start: Array  # R0
    asymptote: Array  # A
    log_cmid: Array
    log_b: Array

    def at(self, cost: Array | float) -> Array:
        """Values: a row a curve, a column a cost."""
        share = shape(np.atleast_1d(np.asarray(cost, dtype=float)), self.log_cmid[..., None], self.log_b[..., None])
        return self.start[..., None] + (self.asymptote - self.start)[..., None] * share

    def cost_of(self, share: float) -> Array:
        """The cost at which `share` of the way from R0 to A is done."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_cmid + math.log(share / (1 - share)) / np.exp(self.log_b))


def shape(cost: Array, log_cmid: Array | float, log_b: Array | float) -> Array:
    """1 / (1 + (Cmid / C)^B).

    >>> shape(np.array([0.0, 2.0]), np.log(2.0), 0.0).tolist()
    [0.0, 0.5]
    """
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / (1 + np.exp(-np.exp(log_b) * (np.log(cost) - log_cmid)))


@dataclass(frozen=True, slots=True)
class Points:
    """What is fitted: values and the costs they were reached at, by run and, within it, by cost."""

    cost: Array
    value: Array
    run: NDArray[np.int64]
    spread: Array  # variance of the rewards behind a value, NaN where it is not known
    count: Array  # how many they are, NaN where that is not known

    @property
    def limits(self) -> tuple[float, float]:
        """What R0 and A may be: [0, 1] where all values lie there, else four times their range beyond them."""
        low, high = float(self.value.min()), float(self.value.max())
        if low >= 0 and high <= 1:
            return 0.0, 1.0
        beyond = 4 * (high - low) or 1.0
        return low - beyond, high + beyond

    def take(self, kept: NDArray[np.bool_]) -> Points:
        cost, value, run, spread, count = self.cost, self.value, self.run, self.spread, self.count
        return Points(cost[kept], value[kept], run[kept], spread[kept], count[kept])


@dataclass(frozen=True, slots=True)
class Noise:
    """Variance of a row about the curve: `sampling` times the variance of a mean of `count` rewards, and `drift`.

    A single reward's variance is `kappa` x level x (1 - level) where rewards lie in [0, 1] (1 where each is right or
    wrong), else `spread`.
    """

    sampling: float
    drift: float
    kappa: float | None
    spread: float
    count: float  # of the last rows

    def variance(self, level: Array, count: Array | float | None = None) -> Array:
        each = np.full_like(level, self.spread) if self.kappa is None else self.kappa * level * (1 - level)
        known = self.count if count is None or not self.sampling else count
        return self.sampling * np.maximum(each, 0) / known + self.drift


@dataclass(frozen=True, slots=True)
class Fit:
    """A curve through points, the curves of the bootstrap's draws, and the rows' noise about them."""

    points: Points
    best: Curve  # of one
    draws: Curve
    own: Curve  # one a run
    noise: Noise
    residuals: Array  # in standard deviations
    autocorrelation: float  # of a residual and the next one
    block: int  # rows that are drawn together

    def band(self, cost: Array, seed: int = 0) -> tuple[Array, Array]:
        """Where a further row lies at each cost: the draws' curves, each with what a run and a row are apart."""
        rng, limits = np.random.default_rng([seed, 1]), self.points.limits
        run = rng.integers(len(self.own.start), size=len(self.draws.start))
        curves = np.clip(self.draws.at(cost) + deviations(self.own, cost)[run], *limits)
        noise = rng.choice(self.residuals, (ROWS_A_DRAW, len(curves), 1))  # alike at all costs: a smooth band
        rows = np.clip(curves + noise * np.sqrt(self.noise.variance(curves)), *limits)
        return interval(rows.reshape(-1, rows.shape[-1]))


def interval(draws: Array) -> tuple[Array, Array]:
    """Percentiles of the first axis that hold LEVEL of it."""
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def levels(share: Array, weight: Array, values: Array, limits: tuple[float, float]) -> tuple[Array, Array, Array]:
    """R0, A and weighted squared error of the best fits with limits[0] <= R0 <= A <= limits[1].

    share: (sets or 1, curves, points); values: (sets, points); what is returned: (sets, curves). The error is a convex
    quadratic of two unknowns: its least within the triangle lies inside, or on one of the three edges.
    """
    low, high = limits
    rest, weighted = 1 - share, weight * values
    ss, sr, rr = (left * right @ weight for left, right in ((share, share), (share, rest), (rest, rest)))
    sy, ry = ((side @ weighted[:, :, None])[..., 0] for side in (share, rest))
    yy, total = (values * weighted).sum(axis=1)[:, None], weight.sum()
    tiny = 1e-12 * total
    determinant = np.maximum(ss * rr - sr**2, tiny**2)
    flat = np.clip((sy + ry) / total, low, high)
    found = [((ry * ss - sy * sr) / determinant, (sy * rr - ry * sr) / determinant), (flat, flat)]
    found.append((np.full_like(sy, low), np.clip((sy - low * sr) / np.maximum(ss, tiny), low, high)))
    found.append((np.clip((ry - high * sr) / np.maximum(rr, tiny), low, high), np.full_like(sy, high)))
    start, end = (np.stack(sides) for sides in zip(*found, strict=True))
    error = yy - 2 * (start * ry + end * sy) + start**2 * rr + 2 * start * end * sr + end**2 * ss
    allowed = (start >= low - 1e-12) & (end <= high + 1e-12) & (start <= end + 1e-12)
    error = np.where(allowed, error, np.inf)
    best = error.argmin(axis=0)[None]
    return tuple(np.take_along_axis(one, best, axis=0)[0] for one in (start, end, error))  # type: ignore[return-value]


def search(cost: Array, weight: Array, values: Array, limits: tuple[float, float]) -> Curve:
    """The best curve through each row of `values`: the best of a grid over (log Cmid, log B), then of ever finer ones
    about it."""
    cost, weight, values = thinned(cost, weight, values)
    least, most = float(cost[cost > 0].min()), float(cost.max())
    low = np.array([math.log(least), math.log(B_BOUNDS[0])])
    high = np.array([math.log(CMID_PAST * most), math.log(B_BOUNDS[1])])
    axes = [np.linspace(low[i], high[i], GRID[i]) for i in (0, 1)]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    share = shape(cost, grid[None, :, :1], grid[None, :, 1:])
    at = np.concatenate([grid[levels(share, weight, part, limits)[2].argmin(axis=1)] for part in parts(values)])
    step = (high - low) / (np.array(GRID) - 1)
    window = np.stack([axis.ravel() for axis in np.meshgrid(*[np.linspace(-1, 1, 5)] * 2, indexing="ij")], axis=1)
    ends = np.empty((len(values), 2))
    for _ in range(ZOOMS):
        for rows in parts(np.arange(len(values))):
            tried = np.clip(at[rows, None, :] + step * window, low, high)
            share = shape(cost, tried[..., :1], tried[..., 1:])
            start, end, error = levels(share, weight, values[rows], limits)
            best = error.argmin(axis=1)[:, None]
            at[rows] = np.take_along_axis(tried, best[..., None], axis=1)[:, 0]
            ends[rows] = np.concatenate([np.take_along_axis(side, best, axis=1) for side in (start, end)], axis=1)
        step = step * SHRINK
    return Curve(ends[:, 0], ends[:, 1], at[:, 0], at[:, 1])


def parts(rows: Any) -> Iterator[Any]:
    """Some at a time, so that the arrays of a search stay small."""
    return (rows[i : i + 64] for i in range(0, len(rows), 64))


def thinned(cost: Array, weight: Array, values: Array) -> tuple[Array, Array, Array]:
    """At most MOST_POINTS points: weighted means of neighbours in cost."""
    order = np.argsort(cost, kind="stable")
    cost, weight, values = cost[order], weight[order], values[:, order]
    if len(cost) <= MOST_POINTS:
        return cost, weight, values
    first = np.unique(np.linspace(0, len(cost), MOST_POINTS, endpoint=False).astype(int))
    total = np.add.reduceat(weight, first)
    means = (np.add.reduceat(weight * one, first, axis=-1) / total for one in (cost, values))
    cost, values = means
    return cost, total, values


def measured_noise(points: Points, level: Array, lost: int) -> Noise:
    """The variance of rows about their curve, of whose parameters `lost` were fitted to them."""
    low, high = points.limits
    squares = (points.value - level) ** 2 * len(level) / max(1, len(level) - lost)
    least = (1e-4 * (high - low)) ** 2
    known = np.isfinite(points.spread) & (points.count > 0)
    if not known.all():
        return Noise(0.0, max(float(squares.mean()), least), None, 0.0, 1.0)
    last = slice(-max(1, len(level) // 3), None)
    spread, count = float(points.spread[last].mean()), float(points.count[last].mean())
    kappa = None
    each = np.full_like(level, points.spread.mean())
    if (low, high) == (0.0, 1.0):
        room = level * (1 - level)
        kappa = float(points.spread.sum() / max(room.sum(), 1e-12))
        each = kappa * room
    mean = each / points.count
    sampling, drift = 1.0, float(squares.mean())
    for _ in range(ROUNDS):  # squares are spread by their own size
        weight = (sampling * mean + drift + least) ** -2
        sampling, drift = nonnegative(mean, weight, squares)
    return Noise(sampling, max(drift, least), kappa, spread, count)


def nonnegative(slope: Array, weight: Array, value: Array) -> tuple[float, float]:
    """a, b >= 0 with the least weighted squared error of value - a slope - b."""
    xx, x1, xy = ((weight * slope * other).sum() for other in (slope, 1.0, value))
    total, y1 = weight.sum(), (weight * value).sum()
    determinant = xx * total - x1**2
    if determinant > 1e-9 * xx * total:
        a, b = (xy * total - y1 * x1) / determinant, (y1 * xx - xy * x1) / determinant
        if a >= 0 and b >= 0:
            return float(a), float(b)
    edges = [(xy / xx if xx else 0.0, 0.0), (0.0, y1 / total)]
    return min(edges, key=lambda edge: float((weight * (value - edge[0] * slope - edge[1]) ** 2).sum()))


def fit(points: Points, seed: int = 0, draws: int = DRAWS) -> Fit:
    """The sigmoid through `points`, with a bootstrap of blocks of residuals and, where there are several, of runs."""
    limits, cost = points.limits, points.cost
    runs = [np.flatnonzero(points.run == run) for run in np.unique(points.run)]
    weight, level, lost = np.ones_like(cost), np.empty_like(cost), PARAMETERS * len(runs)
    for _ in range(ROUNDS):
        curves = [search(cost[at], weight[at], points.value[None, at], limits) for at in runs]
        for at, curve in zip(runs, curves, strict=True):
            level[at] = curve.at(cost[at])[0]
        noise = measured_noise(points, level, lost)
        weight = 1 / noise.variance(level, points.count)
    own = Curve(*np.concatenate(curves, axis=1))
    best = search(cost, weight, points.value[None], limits)
    residuals = (points.value - level) * np.sqrt(weight * len(cost) / max(1, len(cost) - lost))
    correlation = neighbours(residuals, runs)
    rng = np.random.default_rng([seed, 0])
    values, apart = np.repeat(best.at(cost), draws, axis=0), deviations(own, cost)
    for at in runs:
        values[:, at] += apart[rng.integers(len(runs), size=draws)][:, at]
        block = block_length(correlation, len(at))
        wider = (residuals * kept_deviation(correlation, block))[at]
        values[:, at] += wider[blocks(rng, len(at), block, draws)] / np.sqrt(weight[at])
    drawn = search(cost, weight, values, limits)
    return Fit(points, best, drawn, own, noise, residuals, correlation, block)


def deviations(own: Curve, cost: Array) -> Array:
    """How far each run's own curve is from their mean; wider by what the mean of a few takes away."""
    curves = own.at(cost)
    number = len(curves)
    return (curves - curves.mean(axis=0)) * math.sqrt(number / max(1, number - 1))


def neighbours(residuals: Array, runs: Sequence[NDArray[np.int64]]) -> float:
    """Correlation of a residual and the next one of its run, without the bias that a fit gives that of few."""
    pairs = [(residuals[at][:-1] * residuals[at][1:]).sum() for at in runs]
    found = sum(pairs) / max(float((residuals**2).sum()), 1e-12)
    return float(np.clip(found + (1 + PARAMETERS) * len(runs) / len(residuals), -1, 1)) if len(residuals) else 0.0


def block_length(correlation: float, rows: int) -> int:
    """Of blocks that keep what neighbours of an AR(1) series have in common (Carlstein, Ann. Statist. 14, 1986).

    >>> block_length(0.0, 100), block_length(0.5, 100), block_length(0.99, 100)
    (1, 7, 25)
    """
    rho = min(max(correlation, 0.0), 0.99)
    wanted = (math.sqrt(6) * rho / (1 - rho**2)) ** (2 / 3) * rows ** (1 / 3)
    return max(1, min(math.ceil(wanted), rows // 4))


def kept_deviation(correlation: float, block: int) -> float:
    """How much wider a mean of an AR(1) series is than one of its blocks laid end to end in any order.

    >>> kept_deviation(0.0, 1), round(kept_deviation(0.5, 7), 3)
    (1.0, 1.11)
    """
    rho = min(max(correlation, 0.0), 0.9)
    whole = (1 + rho) / (1 - rho)
    kept = 1 + 2 * sum((1 - lag / block) * rho**lag for lag in range(1, block))
    return math.sqrt(whole / kept)


def blocks(rng: np.random.Generator, rows: int, block: int, draws: int) -> NDArray[np.int64]:
    """Indices of rows, drawn in blocks that go on at the beginning; a row a draw."""
    first = rng.integers(rows, size=(draws, -(-rows // block), 1))
    return ((first + np.arange(block)) % rows).reshape(draws, -1)[:, :rows]
