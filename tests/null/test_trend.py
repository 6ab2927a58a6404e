"""A trend seen in noise, missed in a series that has one, or with an interval that isn't its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tandem.report.trend import BLOCKS, CRITICAL, LEAST, dependence, next_look, stays, sureness, trend, windows


def drawn(rng: np.random.Generator, rows: int, phi: float = 0.0) -> np.ndarray:
    """AR(1), of variance 1."""
    noise, values = rng.normal(size=rows + 50) * math.sqrt(1.0 - phi * phi), np.zeros(rows + 50)
    for at in range(1, rows + 50):
        values[at] = phi * values[at - 1] + noise[at]
    return values[50:]


def test_slope_and_interval_are_scipys() -> None:
    """A slope, an intercept or an interval of another formula than Theil's and Sen's, or an S that miscounts ties."""
    rng = np.random.default_rng(3)
    for rows, ties in ((LEAST, False), (40, True), (BLOCKS, False)):
        values = drawn(rng, rows) + 0.05 * np.arange(rows)
        values = values.round(0) if ties else values
        steps = np.arange(10, 10 + rows)
        found = trend(steps.tolist(), values.tolist())
        assert found is not None
        slope = stats.theilslopes(values, steps).slope
        middle = np.median(values - slope * steps)
        assert (found.start, found.end) == pytest.approx((middle + slope * steps[0], middle + slope * steps[-1]))
        past = (dependence(values) * rows + 0.4 * 30) / (rows + 30)
        tau = stats.kendalltau(steps, values, method="asymptotic")
        wider = math.sqrt((1 + past) / (1 - past))
        alone = math.copysign(stats.norm.isf(tau.pvalue / 2), tau.statistic) / wider
        assert found.z == pytest.approx(alone, rel=0.03)  # scipy's has no correction for continuity
        assert sureness(values.tolist()) == pytest.approx(found.z if found.z * wider > CRITICAL else found.z * wider)
        pairs, s_wide = rows * (rows - 1) / 2, 1.96 * wider * math.sqrt(rows * (rows - 1) * (2 * rows + 5) / 18)
        if not ties:
            slopes = np.sort([(values[j] - values[i]) / (j - i) for i in range(rows) for j in range(i + 1, rows)])
            low = slopes[int((pairs - s_wide) / 2)] * (rows - 1)
            assert found.low == pytest.approx(low) and found.low < found.change < found.high


def test_a_long_window_is_averaged_and_logarithms_come_back() -> None:
    """A run of thousands of steps that costs more a look than a short one, or a ratio told as a difference of logs."""
    values = [math.log(2.0) * step / 2000 for step in range(2001)]
    found = trend(range(2001), values)
    assert found is not None and found.change == pytest.approx(math.log(2.0))
    of_values = found.exp()
    assert (of_values.start, of_values.end) == pytest.approx((1.0, 2.0))
    assert (of_values.low, of_values.high) == pytest.approx((1.0, 1.0), rel=1e-6)
    assert trend(range(LEAST - 1), values[: LEAST - 1]) is None and sureness(values[: LEAST - 1]) == 0.0
    flat = trend(range(30), [0.25] * 30)
    assert flat is not None and (flat.z, flat.change, flat.low, flat.high) == (0.0, 0.0, 0.0, 0.0)


def test_how_far_noise_depends_on_its_past() -> None:
    """Noise with a memory taken for independent, by a trend or a jump in it: trends would be seen everywhere."""
    rng = np.random.default_rng(0)
    for phi in (0.0, 0.4, 0.7):
        values = drawn(rng, 4000, phi)
        line = 3.0 * np.linspace(0, 1, 4000)
        jump = 3.0 * (np.arange(4000) >= 2000)
        for series in (values, values + line, values + jump):
            assert dependence(series) == pytest.approx(phi, abs=0.06)
    assert dependence(np.ones(30)) == 0.0


def seen(values: list[float], upward: bool = False) -> bool:
    """Whether a run's looks see a trend in a series."""
    rows = next_look(0)
    while rows <= len(values):
        for window in windows(rows):
            z = sureness(values[rows - window : rows], values[max(0, rows - window - 96) : rows - window])
            if (z if upward else abs(z)) > CRITICAL:
                return True
        rows = next_look(rows)
    return False


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_noise_passes_in_fewer_than_one_run_of_a_hundred(phi: float) -> None:
    """Looking at each five steps and in windows of each length until noise passes for a trend."""
    rng, runs = np.random.default_rng(1), 100
    assert sum(seen(drawn(rng, 200, phi).tolist()) for _ in range(runs)) <= 1


def test_a_slow_rise_is_seen_in_noise() -> None:
    """A test so careful that a rise of three standard deviations over sixty steps stays unseen for a hundred."""
    rng, rise = np.random.default_rng(2), 3.0 * np.clip((np.arange(160) - 40) / 60, 0, 1)
    assert sum(seen((drawn(rng, 160, 0.3) + rise).tolist(), upward=True) for _ in range(20)) >= 19


def test_a_level_is_kept_by_eighteen_of_twenty() -> None:
    """A level that a single quiet row breaks, or that half of the rows keep by chance."""
    kept = [0.0] * 30 + [1.0] * 18 + [0.0, 0.0]
    assert stays(kept, 1.0) and not stays([*kept, 0.0], 1.0) and not stays([1.0] * 17, 1.0)
    assert stays([-one for one in kept], -1.0, below=True)


def test_looks_grow_rare() -> None:
    """A look at each few steps of a run of a hundred thousand, which would take longer than its steps."""
    rows, looks = 0, []
    while rows < 100_000:
        rows = next_look(rows)
        looks.append(rows)
    assert looks[:3] == [24, 29, 34] and sum(look <= 200 for look in looks) == 36 and len(looks) < 300
    assert [len(list(windows(rows))) for rows in (23, 24, 30, 200)] == [0, 1, 2, 5]
