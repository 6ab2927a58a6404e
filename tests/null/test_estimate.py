"""Regression caught: a pass@k, a majority, an interval or a test of a difference that is not what its name says."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.numerics import interval, paired
from tandem.numerics.estimate import MOST_SAMPLES, majority_at, pass_at

Sample = tuple[str | None, bool]  # what it answers, and whether that is right


@given(n=st.integers(1, 9), share=st.floats(0, 1), k=st.integers(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, share: float, k: int) -> None:
    """The biased estimator 1 - (1 - c/n)^k, or subsets with replacement."""
    k, right = min(k, n), round(share * n)
    marks = [True] * right + [False] * (n - right)
    subsets = list(itertools.combinations(marks, k))
    assert pass_at(n, right, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over draws of n samples is not the probability of k: by the binomial, in full."""
    p, n, k = Fraction(1, 3), 6, 4
    mean = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * (1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
        for c in range(n + 1)
    )
    assert mean == 1 - (1 - p) ** k
    for c in range(n + 1):
        assert pass_at(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    assert 0 < pass_at(5000, 1, 7) == pytest.approx(7 / 5000, rel=1e-12)  # beyond what products of floats keep


def by_subsets(samples: Sequence[Sample], k: int) -> float:
    """maj@k as one would do it: each subset votes."""
    found = []
    for subset in itertools.combinations(samples, k):
        votes = Counter(answer for answer, _ in subset if answer is not None)
        top = [answer for answer, count in votes.items() if votes and count == max(votes.values())]
        shares = [[right for own, right in subset if own == answer] for answer in top]
        found.append(sum(sum(s) / len(s) for s in shares) / len(top) if top else 0.0)
    return math.fsum(found) / len(found)


def counted(samples: Sequence[Sample]) -> tuple[list[tuple[int, float]], int]:
    answers = dict.fromkeys(answer for answer, _ in samples if answer is not None)
    marks = [[right for own, right in samples if own == answer] for answer in answers]
    return [(len(m), sum(m) / len(m)) for m in marks], sum(answer is None for answer, _ in samples)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.booleans()), min_size=1, max_size=8))
def test_maj_at_k_is_the_mean_over_subsets(drawn: list[Sample]) -> None:
    """A tie that goes to the right answer or to the first, silent samples that vote or are left out of the subsets."""
    samples = [(answer, right and answer is not None) for answer, right in drawn]
    votes, silent = counted(samples)
    expected = [by_subsets(samples, k) for k in range(1, len(samples) + 1)]
    assert majority_at(votes, silent) == pytest.approx(expected, abs=1e-12)


def test_maj_at_k_by_hand() -> None:
    """Three samples say 7, two say 8, of which 7 is right; one says nothing."""
    found = majority_at([(3, 1.0), (2, 0.0)], 1)
    assert found[0] == 0.5  # 3 of 6
    # Pairs: 7 7 (3) and 7 silent (3) are right, 7 8 (6) half.
    assert found[1] == pytest.approx((3 + 3 + 6 / 2) / 15)
    assert found[5] == 1.0
    assert majority_at([], 3) == [0.0, 0.0, 0.0]
    assert majority_at([(2, 0.5)]) == [0.5, 0.5]  # one answer, paid once: its grader looks at more than the answer


def test_maj_at_k_of_many_samples_is_finite() -> None:
    """Binomials that overflow, or a probability above 1."""
    n = MOST_SAMPLES // 2
    found = majority_at([(n, 1.0), (n - 1, 0.0)], 1)
    assert len(found) == 2 * n and all(0 <= value <= 1 for value in found)
    assert found[0] == pytest.approx(1 / 2) and found[-1] == pytest.approx(1.0)


def test_clustered_error_by_hand_and_by_the_sandwich() -> None:
    """Samples of a prompt that count as independent, or a correction that is left out."""
    sums, counts = [3.0, 0.0, 1.0, 2.0], [3, 2, 2, 3]
    mean = 6 / 10
    by_hand = math.sqrt(4 / 3 * sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))) / 10
    assert interval.clustered_error(sums, counts) == pytest.approx(by_hand, rel=1e-14)
    # Of single observations it is the standard error of a mean.
    values = [0.5, 1.0, 0.0, 1.0, 0.25]
    assert interval.clustered_error(values, [1] * 5) == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert interval.clustered_error([2.0], [4]) is None

    rows = [
        (g, x) for g, (s, c) in enumerate(zip(sums, counts, strict=True)) for x in [1.0] * int(s) + [0.0] * (c - int(s))
    ]
    statsmodels = pytest.importorskip("statsmodels.api")
    y, groups = np.array([x for _, x in rows]), np.array([g for g, _ in rows])
    fit = statsmodels.OLS(y, np.ones((len(y), 1))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    assert interval.clustered_error(sums, counts) == pytest.approx(float(fit.bse[0]), rel=1e-12)


def test_clustered_interval() -> None:
    """Eight equal samples of a prompt that narrow its interval, or eight independent ones that do not."""
    one = interval.wilson_interval(6, 10)
    assert interval.clustered_interval([1] * 6 + [0] * 4, [1] * 10) == one
    alike = interval.clustered_interval([8] * 6 + [0] * 4, [8] * 10)
    assert alike == pytest.approx(one, abs=0.02) and alike[1] - alike[0] >= one[1] - one[0]
    spread = interval.clustered_interval([5, 5, 4, 5, 5, 5, 4, 5, 5, 5], [8] * 10)
    assert spread == pytest.approx(interval.wilson_interval(48, 80), abs=1e-12)  # no less than independent ones
    assert interval.clustered_interval([8] * 10, [8] * 10) == interval.wilson_interval(10, 10)
    assert interval.clustered_interval([3, 5], [8, 8])[0] > 0 and interval.clustered_interval([], []) == (0.0, 1.0)
    assert interval.clustered_interval([3], [8]) == interval.wilson_interval(3 / 8, 1)


@given(st.lists(st.tuples(st.integers(1, 6), st.floats(0, 1)), min_size=1, max_size=12))
def test_clustered_interval_holds_its_mean(drawn: list[tuple[int, float]]) -> None:
    """Bounds outside of [0, 1], in the wrong order or beside the mean, for any shares and cluster sizes."""
    counts = [count for count, _ in drawn]
    sums = [share * count for count, share in drawn]
    low, high = interval.clustered_interval(sums, counts)
    mean = min(1.0, math.fsum(sums) / sum(counts))
    assert 0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1


def test_clustered_interval_covers() -> None:
    """An interval that misses what it is of: 400 evaluations of 60 unlike prompts, 4 samples each."""
    drawn = np.random.default_rng(0)
    shares = drawn.beta(0.5, 0.5, size=(400, 60))
    right = drawn.binomial(4, shares)
    found = [interval.clustered_interval(row, [4] * 60) for row in right.tolist()]
    plain = [interval.wilson_interval(sum(row), 240) for row in right.tolist()]
    covered, naive = (sum(low <= 0.5 <= high for low, high in bounds) / 400 for bounds in (found, plain))
    assert 0.92 <= covered <= 0.98 and naive < 0.85


def test_clustered_interval_of_few_successes() -> None:
    """One success of 48 samples halves the interval of none; or few alike pass for independent."""
    bounds = [interval.clustered_interval([1] * hits + [0] * (12 - hits), [4] * 12) for hits in range(8)]
    assert all(one[0] < more[0] and one[1] < more[1] for one, more in itertools.pairwise(bounds))
    assert bounds[1][1] == pytest.approx(0.256, abs=0.001)
    drawn = np.random.default_rng(0)
    for clusters, a, b in ((60, 0.05, 0.95), (60, 0.1, 2.0), (12, 0.02, 0.98), (60, 20.0, 400.0)):
        right = drawn.binomial(4, drawn.beta(a, b, size=(2000, clusters)))
        found = [interval.clustered_interval(row, [4] * clusters) for row in right.tolist()]
        assert sum(low <= a / (a + b) <= high for low, high in found) / 2000 > 0.945


def test_mcnemar() -> None:
    """A one-sided tail, or a normal approximation of few discordant pairs."""
    stats = pytest.importorskip("scipy.stats")
    for first, second in itertools.product(range(12), repeat=2):
        expected = stats.binomtest(first, first + second).pvalue if first + second else 1.0
        assert paired.mcnemar(first, second) == pytest.approx(expected, rel=1e-12)
    assert paired.mcnemar(1, 9) == 2 * (1 + 10) / 2**10
    assert 0 < paired.mcnemar(2000, 2400) < 1e-8


def test_mcnemar_beside_statsmodels() -> None:
    """Counts taken from the diagonal of the table."""
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    assert paired.mcnemar(5, 14) == pytest.approx(tables.mcnemar([[30, 5], [14, 50]], exact=True).pvalue)


def test_bootstrap_is_that_of_all_resamples() -> None:
    """Prompts drawn without replacement, unevenly, or other ones for each measure: 5^5 resamples in full."""
    differences = np.array([[0.0, 1.0], [1.0, -1.0], [1.0, 0.0], [0.0, 0.5], [-1.0, 0.25]])
    every = np.array([differences[list(places)].mean(0) for places in itertools.product(range(5), repeat=5)])
    found = paired.bootstrap(differences, seed=3, resamples=40_000)
    for place, one in enumerate(found):
        assert one.mean == pytest.approx(differences[:, place].mean())
        low, high = np.quantile(every[:, place], [0.025, 0.975])
        assert (one.low, one.high) == pytest.approx((low, high), abs=0.11)  # a step of its grid
        far = min((every[:, place] <= 0).mean(), (every[:, place] >= 0).mean())
        assert one.p == pytest.approx(2 * far, abs=0.02)
    assert found == paired.bootstrap(differences, seed=3, resamples=40_000)
    assert found != paired.bootstrap(differences, seed=4, resamples=40_000)
    alone = paired.bootstrap(differences[:, :1], seed=3, resamples=40_000)
    assert alone == found[:1]


def test_bootstrap_beside_scipy() -> None:
    """An interval of another width than the percentile bootstrap's."""
    stats = pytest.importorskip("scipy.stats")
    drawn = np.random.default_rng(1)
    values = drawn.normal(0.1, 0.5, 200)
    (one,) = paired.bootstrap(values[:, None])
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=0).confidence_interval
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=0.01)


def test_holm_beside_statsmodels() -> None:
    """p-values of several tasks that are adjusted in the wrong order, or beyond 1."""
    assert paired.holm([0.5, 0.9]) == [1.0, 1.0] and paired.holm([]) == []
    assert paired.holm([0.01, 0.02, 0.03, 0.005]) == pytest.approx([0.03, 0.04, 0.04, 0.02])
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    drawn = np.random.default_rng(0).uniform(0, 0.3, 9).tolist()
    assert paired.holm(drawn) == pytest.approx(multitest.multipletests(drawn, method="holm")[1].tolist())
