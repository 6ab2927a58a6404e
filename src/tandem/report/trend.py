"""Whether a series of a run has a trend, and whether it has stayed beyond a level: tests that noise rarely passes.

A trend: Theil and Sen's slope with Kendall's S against its normal tail, the variance of S made larger for noise that
depends on its past (an AR(1) part, from winsorised differences, which neither a trend nor a single jump moves).
CRITICAL is Z where looks and windows of 200 rows share a false-alarm rate of 0.1 % by the union bound: 41 looks (see
`next_look`) of at most 5 windows each, 205 x 5.4e-6. docs/advisories.md has the rates that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

Array = np.ndarray

LEAST = 24  # rows that a trend is sought in at least
BLOCKS = 48  # more rows are averaged into as many equal parts
CRITICAL = 4.4  # of |z|; one-sided 5.4e-6
LIKELY = 1.96  # of |z|: 95 %, of intervals and of what only goes along
MOST = 0.75  # that noise is taken to depend on the row before: more, and no smooth rise could be told from it
HISTORY = 96  # last rows from which a shorter window's dependence is estimated
LATEST, NEARLY_ALL = 20, 18  # a series stays beyond a level where 18 of its last 20 rows are: 2.0e-4 where half are
_WINSOR = 2.5  # of the differences' robust standard deviation
_EXPECTED, _EXPECTED_ROWS = 0.4, 30  # what a few rows say of their dependence is taken with as much of this


@dataclass(frozen=True, slots=True)
class Trend:
    """A line through a window of a series, by Theil and Sen.

    >>> found = trend(range(1, 31), [2.0 * step for step in range(1, 31)])
    >>> found.start, found.end, found.z > CRITICAL
    (2.0, 60.0, True)
    """

    first: int  # step
    last: int
    start: float  # the line at `first`
    end: float
    low: float  # 95 % interval of end - start
    high: float
    z: float  # above 0: upward

    @property
    def change(self) -> float:
        return self.end - self.start

    def exp(self) -> Trend:
        """Of a series of logarithms, in its own unit: the interval is that of the change from `start` on."""
        start, end = math.exp(self.start), math.exp(self.end)
        low, high = (start * (math.exp(change) - 1.0) for change in (self.low, self.high))
        return Trend(self.first, self.last, start, end, low, high, self.z)


def windows(rows: int) -> Iterator[int]:
    """The last 24 rows, 48, 96 and so on, and all."""
    window = LEAST
    while window < rows:
        yield window
        window *= 2
    if rows >= LEAST:
        yield rows


def next_look(rows: int) -> int:
    """At how many rows a course is looked at after it was at `rows`: each five, later each 2.5 %.

    >>> next_look(0), next_look(24), next_look(1000)
    (24, 29, 1025)
    """
    return LEAST if rows < LEAST else max(rows + 5, math.ceil(rows * 1.025))


def trend(steps: Sequence[float], values: Sequence[float], before: Sequence[float] = ()) -> Trend | None:
    """The trend of a window, or None of fewer than LEAST rows. `before`: values ahead of it, of which only noise is
    learned.
    """
    if len(values) < LEAST:
        return None
    x_P, y_P = _blocks(np.asarray(steps, dtype=np.float64)), _blocks(np.asarray(values, dtype=np.float64))
    left, right = _pairs(len(y_P))
    rises = y_P[right] - y_P[left]
    score, deviation = _score(rises), _deviation(y_P, rises, values, before)
    slopes = np.sort(rises / (x_P[right] - x_P[left]))
    slope = float(np.median(slopes))
    middle = float(np.median(y_P - slope * x_P))
    aside = int((len(slopes) - LIKELY * deviation) / 2.0)  # Sen's interval
    low, high = (float(slopes[min(len(slopes) - 1, max(0, at))]) for at in (aside, len(slopes) - 1 - aside))
    first, last = steps[0], steps[-1]
    start, end, z = middle + slope * first, middle + slope * last, _z(score, deviation)
    return Trend(int(first), int(last), start, end, low * (last - first), high * (last - first), z)


def sureness(values: Sequence[float], before: Sequence[float] = ()) -> float:
    """z of the same trend; where independent noise would already give no CRITICAL z, that of independent noise."""
    if len(values) < LEAST:
        return 0.0
    y_P = _blocks(np.asarray(values, dtype=np.float64))
    left, right = _pairs(len(y_P))
    rises = y_P[right] - y_P[left]
    score = _score(rises)
    alone = _z(score, math.sqrt(_independent(y_P, rises)))
    return _z(score, _deviation(y_P, rises, values, before)) if abs(alone) > CRITICAL else alone


def _score(rises: Array) -> float:
    """Kendall's S: pairs that rise less those that fall."""
    return float(np.count_nonzero(rises > 0.0) - np.count_nonzero(rises < 0.0))


def _z(score: float, deviation: float) -> float:
    """With the correction for continuity; 0 where all values are equal."""
    return (score - math.copysign(min(1.0, abs(score)), score)) / deviation if deviation else 0.0


def _independent(y_P: Array, rises: Array) -> float:
    """Variance of Kendall's S over independent values, ties among them."""
    points = len(y_P)
    tied = 0.0
    if not rises.all():
        ties = np.unique(y_P, return_counts=True)[1]
        tied = float((ties * (ties - 1) * (2 * ties + 5)).sum())
    return (points * (points - 1) * (2 * points + 5) - tied) / 18.0


def _deviation(y_P: Array, rises: Array, values: Sequence[float], before: Sequence[float]) -> float:
    """Standard deviation of S. A window that is not averaged learns its noise from the rows before it too."""
    more = HISTORY - len(values) if len(values) <= BLOCKS else 0
    of_P = np.concatenate([before[max(0, len(before) - more) :], y_P]) if more and len(before) else y_P
    past = (dependence(of_P) * len(of_P) + _EXPECTED * _EXPECTED_ROWS) / (len(of_P) + _EXPECTED_ROWS)
    return math.sqrt(_independent(y_P, rises) * (1.0 + past) / (1.0 - past))


def dependence(values: Array) -> float:
    """phi of an AR(1) series, from 0 to MOST: the correlation of its successive differences is -(1 - phi) / 2."""
    differences = np.diff(values)
    sizes = np.abs(differences)
    if not sizes.any():
        return 0.0
    limit = _WINSOR * 1.4826 * float(np.median(sizes[sizes > 0.0]))
    differences = np.clip(differences, -limit, limit)
    differences = differences - np.median(differences)
    squares = float((differences**2).sum())
    if not squares:
        return 0.0
    return min(MOST, max(0.0, 1.0 + 2.0 * float((differences[1:] * differences[:-1]).sum()) / squares))


def stays(values: Sequence[float], level: float, below: bool = False) -> bool:
    """Whether NEARLY_ALL of the LATEST values lie at the level or beyond it."""
    latest = values[-LATEST:]
    return sum([value <= level if below else value >= level for value in latest]) >= NEARLY_ALL


def _blocks(values_N: Array) -> Array:
    """Means of BLOCKS parts as equal as can be; of fewer values, themselves."""
    if len(values_N) <= BLOCKS:
        return values_N
    edges, counts = _edges(len(values_N))
    return np.add.reduceat(values_N, edges) / counts


@lru_cache(maxsize=64)
def _edges(rows: int) -> tuple[Array, Array]:
    edges = np.linspace(0, rows, BLOCKS + 1).round().astype(np.int64)
    return edges[:-1], np.diff(edges)


@cache
def _pairs(points: int) -> tuple[Array, Array]:
    left, right = np.triu_indices(points, 1)
    return left, right
