"""The interval of a share, and of means whose observations come in clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z_95 = 1.959963984540054  # normal quantile at 0.975
ENOUGH_CLUSTERS = 8  # on the rarer side (not all 0, or not all 1), for their spread alone to say what a sample counts


def wilson_interval(right: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """The score interval of a proportion: where |p - right/trials| = z sqrt(p (1 - p) / trials).

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    (0, 1) for no trials. Counts need not be whole: an effective number of trials is one.

    >>> [round(bound, 3) for bound in wilson_interval(5, 10)]
    [0.237, 0.763]
    """
    assert 0 <= right <= trials, (right, trials)
    if trials == 0:
        return 0.0, 1.0
    share, spread = right / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    # At 0 and all right the bound is exactly 0 or 1; rounding must not leave it a hair inside or outside.
    return (0.0 if right == 0 else centre - half), (1.0 if right == trials else centre + half)


def clustered_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """The standard error of the mean of observations that come in G independent clusters; None for fewer than two.

    sums, counts [G]: of each cluster's observations. sqrt(G / (G - 1) sum_g (sums_g - mean counts_g)^2) / sum counts:
    the sandwich of a regression on a constant alone (Liang and Zeger, "Longitudinal data analysis using generalized
    linear models", Biometrika 73, 1986). With one observation a cluster it is the standard deviation over sqrt(G).

    >>> round(clustered_error([2, 0, 1], [2, 2, 2]), 4)
    0.2887
    """
    total, clusters = sum(counts), len(counts)
    if clusters < 2:
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((one - mean * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return math.sqrt(squares * clusters / (clusters - 1)) / total


def clustered_interval(sums: Sequence[float], counts: Sequence[int], trials: int = 0) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of values in [0, 1] that come in clusters (`clustered_error`).

    It takes as many trials as would give the mean's standard error were they independent: sum(counts) over the design
    effect (Kish, "Survey Sampling", 1965), at most `trials` (0: sum(counts)). Where all values are 0 or all are 1 no
    spread is seen, and a cluster counts once; where h < ENOUGH_CLUSTERS clusters have another value the effect is
    between that and the one seen, in proportion to h, so that one success more does not halve the interval.
    (0, 1) for no values.

    >>> clustered_interval([1, 0, 1], [1, 1, 1]) == wilson_interval(2, 3)
    True
    >>> clustered_interval([4, 4], [4, 4]) == wilson_interval(2, 2)
    True
    """
    total, clusters = sum(counts), len(counts)
    if not total:
        return 0.0, 1.0
    most = trials or total
    mean = min(1.0, max(0.0, math.fsum(sums) / total))
    error = clustered_error(sums, counts)
    if total == most == clusters:  # values in [0, 1] spread no more than zeros and ones, so the effect is 1 at most
        return wilson_interval(math.fsum(sums), total)
    if error is None or mean in (0.0, 1.0):
        return wilson_interval(mean * clusters, clusters)
    effective = float(most)
    if error:
        effective = min(effective, total * mean * (1 - mean) / ((total - 1) * error**2))
    pairs = list(zip(sums, counts, strict=True))
    rarer = min(sum(one > 0 for one, _ in pairs), sum(one < count for one, count in pairs))
    seen = min(1.0, rarer / ENOUGH_CLUSTERS)
    effective = min(effective, 1 / ((1 - seen) / clusters + seen / effective))
    return wilson_interval(mean * effective, effective)
