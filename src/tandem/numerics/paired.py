"""Two models on the same prompts: is the difference more than chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tandem.numerics.random import Stream, word_rows

RESAMPLES = 10_000
_WORDS = 1 << 20  # that are made at once


def mcnemar(first: int, second: int) -> float:
    """The two-sided p-value of McNemar's exact test: of `first` prompts that the first model alone has right, and
    `second` that the second alone has, if each were either's with probability 1/2.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (1947). Twice the binomial tail, at most 1; 1 where no prompt tells them apart.

    >>> mcnemar(0, 5), mcnemar(3, 3)
    (0.0625, 1.0)
    """
    trials = first + second
    tail = sum(math.comb(trials, one) for one in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**trials)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that one of them is below a level by chance no more often than that.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, most = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1.0, ps[place] * (len(ps) - rank)))
        adjusted[place] = most
    return adjusted


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference, its 95 % interval, and the two-sided p-value of none.

    >>> Difference(0.25, 0.0, 0.5, 0.1).mean
    0.25
    """

    mean: float
    low: float
    high: float
    p: float


def bootstrap(differences_PM: NDArray[np.float64], seed: int = 0, resamples: int = RESAMPLES) -> list[Difference]:
    """Of M measures' differences on P prompts: the means, with percentile intervals over resampled prompts.

    Prompts are drawn with replacement, the same for all measures (Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993). p is twice the share of resampled means on the far side of 0, or on it, with the observed one
    counted among them (Davison and Hinkley, "Bootstrap Methods and their Application", 1997, 4.2), at most 1. A
    function of its arguments: the noise is from the counter.

    >>> bootstrap(np.array([[1.0], [1.0], [1.0]]), resamples=999)
    [Difference(mean=1.0, low=1.0, high=1.0, p=0.002)]
    """
    prompts = len(differences_PM)
    assert prompts, "no prompt to compare on"
    at_once = max(1, _WORDS // prompts)
    means = []
    for start in range(0, resamples, at_once):
        rows = np.arange(start, min(start + at_once, resamples))
        drawn_RP = word_rows(np.full(len(rows), seed, np.uint64), rows, prompts, Stream.RESAMPLE).astype(np.uint64)
        places_RP = (drawn_RP * np.uint64(prompts)) >> np.uint64(32)
        # Counts of each prompt in a resample: a product with the differences then costs no gather of M columns.
        flat = (places_RP + np.arange(len(rows), dtype=np.uint64)[:, None] * np.uint64(prompts)).ravel()
        counts_RP = np.bincount(flat.astype(np.int64), minlength=len(rows) * prompts).reshape(len(rows), prompts)
        means.append(counts_RP @ differences_PM / prompts)
    means_RM = np.concatenate(means)
    low_M, high_M = np.quantile(means_RM, [0.025, 0.975], axis=0)
    found = []
    for place, mean in enumerate(differences_PM.mean(0).tolist()):
        drawn = means_RM[:, place]
        far = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
        p = min(1.0, 2 * (1 + far) / (1 + resamples))
        found.append(Difference(mean, float(low_M[place]), float(high_M[place]), p))
    return found
