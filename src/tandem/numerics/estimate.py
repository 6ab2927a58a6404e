"""What some samples of a prompt say of k of them: pass@k, and the majority of k. Expectations over all subsets, exact.

Sums of subsets without replacement are unbiased for k independent samples: each subset of k is k such samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

MOST_SAMPLES = 1000  # of a prompt: binomials of it are counted in fp64, whose largest is 1.8e308


def pass_at(samples: int, right: int, k: int) -> float:
    """The probability that k of `samples` samples, of which `right` are right, hold a right one.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of Chen et al., "Evaluating large language models trained on
    code" (2021, arXiv 2107.03374). Integers of any size, rounded once.

    >>> pass_at(4, 1, 1), pass_at(4, 1, 2), pass_at(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    assert 0 <= right <= samples and 1 <= k <= samples, (samples, right, k)
    total = math.comb(samples, k)
    return (total - math.comb(samples - right, k)) / total


def majority_at(votes: Sequence[tuple[int, float]], silent: int = 0) -> list[float]:
    """For k = 1 ... n: how right the most frequent answer of k samples is, in expectation over all C(n, k) subsets.

    votes: for each distinct answer, the samples that gave it and the share of them that is right (1 or 0 where a
    reward looks at the answer alone). silent: samples without an answer, which have no vote; n counts them. Answers
    that are equally frequent are drawn evenly from; a subset without a vote is wrong. At k = 1 it is the share of right
    samples among all. Wang et al., "Self-consistency improves chain of thought reasoning in language models"
    (2022, arXiv 2203.11171), is the vote over n.

    Of k samples the answer wins with j votes where every other has at most j: the coefficient of x^(k - j) in the
    product over the other answers, of c samples, of sum_(a < j) C(c, a) x^a + C(c, j) x^j y, times (1 + x)^silent;
    the power of y counts the ties.

    >>> majority_at([(2, 1.0), (1, 0.0)])
    [0.6666666666666666, 0.6666666666666666, 1.0]
    >>> majority_at([(1, 1.0)], silent=1)
    [0.5, 1.0]
    """
    n = sum(count for count, _ in votes) + silent
    assert n <= MOST_SAMPLES, n
    sizes = Counter(count for count, _ in votes)
    rights: dict[int, float] = {}  # answers of one frequency win as often: their shares add
    for count, share in votes:
        rights[count] = rights.get(count, 0.0) + share
    won = np.zeros(n + 1)
    for count, share in rights.items():
        for j in range(1, count + 1) if share else ():
            ways = _ways(sizes - Counter([count]), silent, j, n)
            split = ways @ (1 / np.arange(1, ways.shape[1] + 1))
            won[j:] += share * math.comb(count, j) * split[: n + 1 - j]
    return [min(1.0, float(won[k]) / math.comb(n, k)) for k in range(1, n + 1)]


def _ways(sizes: Counter[int], silent: int, j: int, n: int) -> np.ndarray:
    """[n + 1, ties + 1]: ways to take so many samples of answers of these frequencies and of the silent ones, so that
    no answer is taken more than j times and so many are taken j times."""
    ties = min(n // j, sum(number for size, number in sizes.items() if size >= j))
    ways = np.zeros((n + 1, ties + 1))
    ways[0, 0] = 1.0
    for size, number in sizes.items():
        for _ in range(number):
            more = np.zeros_like(ways)
            for taken in range(min(j - 1, size) + 1):
                more[taken:] += math.comb(size, taken) * ways[: n + 1 - taken]
            if size >= j:
                more[j:, 1:] += math.comb(size, j) * ways[: n + 1 - j, :-1]
            ways = more
    total = np.zeros_like(ways)
    for taken in range(silent + 1):
        total[taken:] += math.comb(silent, taken) * ways[: n + 1 - taken]
    return total
