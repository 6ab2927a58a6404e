"""A test of lengths that chance passes too often, or too rarely: it must know that siblings are alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tandem.algo.lengths import LOST, Dispatched, by_tenths, compare, largest_gap, of_group
from tandem.columns import Columns
from tandem.types import Group, Prompt, Trajectory


def group(name: str, tokens: Sequence[int], lost: Sequence[bool] | bool, ended: bool = True) -> Dispatched:
    """With programs lost one by one, or all of it late."""
    whole = [lost] * len(tokens) if isinstance(lost, bool) else lost
    word = "late" if isinstance(lost, bool) else "truncated"
    fates = tuple(word if one else "trained" for one in whole)
    return Dispatched(name, tuple(f"{name}/{i}" for i in range(len(tokens))), tuple(tokens), fates, ended)


def beaten(lengths: Sequence[Sequence[int]], lost: Sequence[Sequence[bool]]) -> int:
    """Pairs in which the one left out is longer, less those in which it is shorter."""
    pairs = [pair for both in zip(lengths, lost, strict=True) for pair in zip(*both, strict=True)]
    kept, left = [n for n, out in pairs if not out], [n for n, out in pairs if out]
    return sum((a > b) - (a < b) for a in left for b in kept)


def deals(lengths: Sequence[Sequence[int]], lost: Sequence[Sequence[bool]]) -> Iterator[list[list[bool]]]:
    """All ways to deal the fates out anew among groups of a size, and within each."""
    sizes = sorted({len(one) for one in lengths})
    places = {size: [g for g, one in enumerate(lengths) if len(one) == size] for size in sizes}
    for chosen in itertools.product(*(itertools.permutations(places[size]) for size in sizes)):
        source = {
            to: of
            for size, order in zip(sizes, chosen, strict=True)
            for to, of in zip(places[size], order, strict=True)
        }
        for inner in itertools.product(*(itertools.permutations(lost[source[g]]) for g in range(len(lengths)))):
            yield [list(one) for one in inner]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_moments_and_p_value_are_those_of_all_permutations(given_by: st.DataObject) -> None:
    """A mean, variance or p-value of the statistic that is not that of dealing fates out anew by group and within."""
    whole = given_by.draw(st.booleans())
    sizes = given_by.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=2, max_size=4))
    lengths = [given_by.draw(st.lists(st.integers(1, 6), min_size=n, max_size=n)) for n in sizes]
    if whole:
        lost = [[given_by.draw(st.booleans())] * n for n in sizes]
    else:
        lost = [given_by.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in sizes]
    groups = [group(str(g), n, out) for g, (n, out) in enumerate(zip(lengths, lost, strict=True))]
    found = compare(groups)
    flat = [one for out in lost for one in out]
    if all(flat) or not any(flat):
        assert found is None
        return
    every = np.array([beaten(lengths, dealt) for dealt in deals(lengths, lost)], float)
    statistic = beaten(lengths, lost)
    if every.std() < 1e-9:
        assert found is None
        return
    assert found is not None
    assert found.longer == pytest.approx(0.5 + statistic / 2 / sum(flat) / (len(flat) - sum(flat)), abs=1e-12)
    assert found.z == pytest.approx((statistic - every.mean()) / every.std(), abs=1e-9)
    if all(len({*out}) == 1 for out in lost):
        exact = min(1.0, 2 * min((every <= statistic + 1e-9).mean(), (every >= statistic - 1e-9).mean()))
        assert found.p_value == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("left", [1, 4, 9])
def test_lone_programs_are_mann_and_whitney(left: int) -> None:
    """A statistic or an exact p-value that differs from Mann-Whitney's where a group is one program."""
    lengths = np.random.default_rng(left).permutation(40)[:14]
    found = compare([group(str(g), [int(n)], g < left) for g, n in enumerate(lengths)])
    known = stats.mannwhitneyu(lengths[:left], lengths[left:], method="exact")
    assert found is not None and found.longer == pytest.approx(known.statistic / left / (14 - left))
    assert found.p_value == pytest.approx(known.pvalue, abs=1e-12)


def test_distance_is_kolmogorovs() -> None:
    """A distance between two distributions other than scipy's."""
    random = np.random.default_rng(5)
    for size in (1, 3, 40):
        one, other = random.integers(0, 12, 30), random.integers(0, 9, size)
        assert largest_gap(one, other) == pytest.approx(stats.ks_2samp(one, other).statistic)


def test_many_groups_are_taken_for_normal() -> None:
    """A p-value of so many groups that the exact one would take seconds, which isn't that of the normal law."""
    random = np.random.default_rng(1)
    found = compare([group(str(g), random.integers(1, 400, 16).tolist(), g < 20) for g in range(120)])
    assert found is not None and found.p_value == math.erfc(abs(found.z) / math.sqrt(2))


def drawn(random: np.random.Generator, groups: int = 20, size: int = 8) -> list[list[int]]:
    """Lengths with a heavy tail, most of whose spread is the prompt's."""
    usual = np.exp(random.normal(4.0, 1.0, groups))
    return [[int(n) + 1 for n in one * np.exp(random.normal(0.0, 0.3, size))] for one in usual]


def test_siblings_are_not_independent() -> None:
    """A test that takes the programs of a group for independent: it alarms in a third of the steps of fair runs."""
    random, naive, by_group = np.random.default_rng(0), [], []
    for _ in range(400):
        lengths, out = drawn(random), random.permutation(20) < 4
        found = compare([group(str(g), n, bool(out[g])) for g, n in enumerate(lengths)])
        assert found is not None
        by_group.append(found.p_value)
        flat = np.array(lengths)
        naive.append(stats.mannwhitneyu(flat[out].ravel(), flat[~out].ravel()).pvalue)
    assert stats.binomtest(sum(p <= 0.05 for p in by_group), 400, 0.05, "greater").pvalue > 0.01
    assert np.mean(np.array(naive) <= 0.05) > 0.25
    z = stats.binomtest(sum(p <= 0.5 for p in by_group), 400, 0.5)
    assert z.pvalue > 0.01


def test_what_was_cut_raises_no_alarm_by_itself() -> None:
    """Groups withdrawn at random, with fewer tokens so far than they would have had, taken for a dislike of short."""
    random, high = np.random.default_rng(3), 0
    for _ in range(400):
        groups = []
        for g, (lengths, out) in enumerate(zip(drawn(random), random.permutation(20) < 5, strict=True)):
            seen = [max(1, int(n * random.uniform())) for n in lengths] if out else lengths
            groups.append(group(str(g), seen, bool(out), ended=not out))
        found = compare(groups)
        high += found is not None and found.z > 1.645
    assert high <= 20


def test_the_longest_withdrawn_are_seen() -> None:
    """A step that leaves the longest groups out, and whose statistic is what chance gives."""
    lengths = drawn(np.random.default_rng(2))
    limit = sorted(max(one) for one in lengths)[15]
    groups = [group(str(g), [min(limit, n) for n in one], max(one) > limit) for g, one in enumerate(lengths)]
    found = compare(groups)
    assert found is not None and found.longer > 0.7 and found.p_value < 1e-3 and found.z > 3


def test_of_group_sums_the_segments_of_a_program() -> None:
    """A program of two segments that counts as two, or whose gradient is forgotten for that of its first."""

    def part(program: str, segment: int, tokens: int) -> Trajectory:
        known = Columns.of(tokens=[0] * (tokens + 1), loss_mask=[False] + [True] * tokens)
        return Trajectory(program, "p", known, segment=segment)

    parts = part("p/7/0", 0, 3), part("p/7/0", 1, 4), part("p/7/1", 0, 5)
    fates = {"p/7/0/0": "zero_advantage", "p/7/0/1": "trained", "p/7/1/0": "failed"}
    found = of_group(Group(Prompt("p", ()), parts), fates)
    assert found == Dispatched("p/7", ("p/7/0", "p/7/1"), (7, 5), ("trained", "failed"))
    assert found.kept and found.end == 7 and not of_group(Group(Prompt("p", ()), parts)).kept


def test_tenths_by_hand() -> None:
    """A tenth whose counts, ages or clipped shares are another's, or a mean over programs that have no such value."""
    groups = [group(str(g), [2 * g + 1, 2 * g + 2], g == 9) for g in range(10)]
    keep = {str(g): (1.0 - g / 10, 0.5 - g / 20, 1.0) for g in range(9)}
    rows = by_tenths(groups, keep, {"0/0": 2.0, "0/1": 4.0}, {"0/1": 0.5})
    assert len(rows) == 10 and sum(int(row["dispatched"] or 0) for row in rows) == 20
    assert rows[0] == {
        "shortest": 1, "longest": 2, "dispatched": 2, "kept": 2, "trained": 2,
        "keep": 1.0, "keep_low": 0.5, "keep_high": 1.0, "age": 3.0, "clipped": 0.5,
    }  # fmt: skip
    assert rows[9] == {
        "shortest": 19, "longest": 20, "dispatched": 2, "kept": 0, "trained": 0,
        "keep": None, "keep_low": None, "keep_high": None, "age": None, "clipped": None,
    }  # fmt: skip
    assert len(by_tenths(groups[:2], keep, {}, {})) == 4 and not by_tenths([], keep, {}, {})
    assert {"late", "stale", "truncated", "failed"} == LOST
