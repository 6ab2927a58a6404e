"""The interval of a share."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # normal quantile at 0.975


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
