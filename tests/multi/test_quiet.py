"""Advisories of runs in which nothing happens."""

from __future__ import annotations

from collections import Counter

from tandem.report.advice import advise
from tests.courses import Noise

RUNS = 400


def test_noise_is_quiet() -> None:
    """An advisory that noise raises, its rows independent or not, in one of a hundred runs of 200 steps or more."""
    passed = Counter[str]()
    for seed in range(RUNS):
        passed.update(advisory.name for advisory in advise(Noise(seed, (0.0, 0.3, 0.6)[seed % 3]).run()))
    assert all(number < RUNS / 100 for number in passed.values()), passed
