"""Keep probabilities and weights: by enumeration where that can be, and in drawn runs of each policy with losses."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from tandem.algo.lengths import Dispatched, Race
from tandem.algo.propensity import LEAST, Estimate, Keep, Law, in_race, inverse, keep_probabilities

Policy = Callable[[np.random.Generator, int], list[Dispatched]]  # of a step


def lone(name: str, end: int, fate: str = "trained", **known: object) -> Dispatched:
    """A group of one program."""
    return replace(Dispatched(name, (f"{name}/0",), (end,), (fate,), keep=None), **known)  # type: ignore[arg-type]


def of_shares(shares: dict[int, float]) -> Law:
    """The law of ends that has these shares, in hundredths."""
    ends = [end for end, share in shares.items() for _ in range(round(100 * share))]
    return Law([lone(str(i), end) for i, end in enumerate(ends)])


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_the_law_is_kaplans_and_meiers(seen: list[tuple[int, bool]]) -> None:
    """A distribution of ends that takes a group's tokens so far for its end, or leaves out what was cut."""
    law = Law([lone(str(i), end, ended=ended) for i, (end, ended) in enumerate(seen)])
    known = [end for end, ended in seen if ended]
    if not known:
        assert law.until(100) == 0.0
        return
    censored = stats.CensoredData(uncensored=known, right=[end for end, ended in seen if not ended])
    survival = stats.ecdf(censored).sf
    for end in range(11):
        assert law.until(end) == pytest.approx(1.0 - float(survival.evaluate(end)), abs=1e-12)
        assert law.below(end) == pytest.approx(1.0 - float(survival.evaluate(end - 0.5)), abs=1e-12)


def test_the_law_counts_what_a_cut_hides() -> None:
    """An interval as narrow as if nothing had been cut, or none at all; its variance is Greenwood's."""
    ends = [(end, end % 3 > 0) for end in range(1, 31)]
    law = Law([lone(str(i), end, ended=ended) for i, (end, ended) in enumerate(ends)])
    for at in (4, 11, 20):
        survival, variance = 1.0, 0.0
        for end, ended in ends[:at]:
            risk = sum(other >= end for other, _ in ends)
            if ended:
                survival, variance = survival * (1 - 1 / risk), variance + 1 / (risk * (risk - 1))
        assert law.count(at) == pytest.approx((1 - survival) / survival / variance)
        assert law.count(at) < 30


def test_unusable_groups_compete() -> None:
    """A group of equal rewards that fills the batch in the reckoning, though a race goes on past it."""
    law = Law([lone("a", 2), lone("b", 3, usable=False), lone("c", 4), lone("d", 5, ended=False)])
    assert [law.until(end) for end in (1, 2, 3, 4, 9)] == [0.0, 0.25, 0.25, 0.5, 0.5]


SHARES = {3: 0.4, 5: 0.25, 8: 0.25, 20: 0.1}


def winners(ends: Sequence[int], enough: int) -> set[int]:
    return set(sorted(range(len(ends)), key=lambda place: (ends[place], place))[:enough])


@pytest.mark.parametrize("enough", [1, 2, 3])
def test_a_race_by_enumeration(enough: int) -> None:
    """A keep probability other than the sum over all outcomes of a race, where groups that end at once are many."""
    law, places = of_shares(SHARES), 4
    won = dict.fromkeys(SHARES, 0.0)
    for ends in itertools.product(SHARES, repeat=places):
        for place in winners(ends, enough):
            others = math.prod(SHARES[end] for other, end in enumerate(ends) if other != place)
            won[ends[place]] += others / places
    for end, share in won.items():
        found = in_race(law, end, Race(places - 1, enough))
        assert found.probability == pytest.approx(share, abs=1e-12)
        assert found.low <= found.probability <= found.high
    assert won[3] > won[8] > won[20] > 0.0


@pytest.mark.parametrize("enough", [1, 2, 3])
def test_weighing_a_race_is_unbiased(enough: int) -> None:
    """A weighted sum over the winners whose mean over all outcomes isn't that over all that ran, as no plain one is."""
    law, places, expected, plain = of_shares(SHARES), 4, 0.0, 0.0
    for ends in itertools.product(SHARES, repeat=places):
        chance = math.prod(SHARES[end] for end in ends)
        for place in winners(ends, enough):
            keep = in_race(law, ends[place], Race(places - 1, enough)).probability
            expected += chance * ends[place] ** 2 / keep / places
            plain += chance * ends[place] ** 2 / enough
    truth = sum(share * end**2 for end, share in SHARES.items())
    assert expected == pytest.approx(truth, rel=1e-12)
    assert plain < 0.75 * truth


def ends_of(random: np.random.Generator, number: int) -> list[int]:
    """A heavy tail: half of the groups end by 60 tokens, one in a hundred beyond 600."""
    return [int(end) + 1 for end in 60 * np.exp(random.normal(0.0, 1.0, number))]


def race_of(ends: Sequence[int], enough: int, most: int, name: str = "") -> list[Dispatched]:
    """Over-sampling as rollout/first.py tells of it: the first to end make the batch, of the others that is all."""
    number, first = len(ends), winners(ends, enough)
    last = max(first, key=lambda place: (ends[place], place))
    found = []
    for place, end in enumerate(ends):
        known = place in first or ends[last] == most
        end, turn = (end, place) if known else (ends[last], last)
        fate = "trained" if place in first else "late"
        race = Race(number - 1, enough)
        found.append(lone(f"{name}/{place}", end, fate, ended=known, race=race, turn=(turn + 0.5) / number))
    return found


def raced(random: np.random.Generator, step: int) -> list[Dispatched]:
    return race_of(ends_of(random, 22), 16, 10**9, str(step))


@pytest.mark.parametrize("shares", [SHARES, {3: 0.3, 5: 0.2, 8: 0.5}])
def test_a_law_of_races_in_which_many_end_at_once(shares: dict[int, float]) -> None:
    """A group that lost by its place alone, taken for longer, or for as long as those that won: off by up to a half."""
    random = np.random.default_rng(8)
    drawn = [random.choice([*shares], p=[*shares.values()], size=9).tolist() for _ in range(1500)]
    law, share = Law([one for ends in drawn for one in race_of(ends, 6, max(shares))]), 0.0
    for end, of in shares.items():
        assert law.below(end) == pytest.approx(share, abs=0.03)
        share += of
        if end < 20:  # which next to none of the winners was, nor were the last of those that end with 8
            assert law.until(end) == pytest.approx(share, abs=0.03)


class Flow:
    """An asynchronous run: `capacity` groups at a time, a batch of the first to end, an update for each; what is older
    than the lag when its turn comes is dropped and dispatched anew."""

    def __init__(self, random: np.random.Generator, prompts: int, lag: int | None) -> None:
        self.random, self.prompts, self.lag = random, prompts, lag
        self.version, self.number = 0, 0
        self.running: list[tuple[float, int, int, int]] = []  # when it ends, its number, its end in tokens, version
        self.ends: list[int] = []  # of all that were dispatched
        for _ in range(3 * prompts):
            self.begin(0.0)

    def begin(self, now: float) -> None:
        (end,) = ends_of(self.random, 1)
        self.ends.append(end)
        pace = self.random.uniform(0.7, 1.3)  # the engine is not always as fast
        heapq.heappush(self.running, (now + end * pace, self.number, end, self.version))
        self.number += 1

    def step(self, _: np.random.Generator, __: int) -> list[Dispatched]:
        settled, kept = list[Dispatched](), 0
        while kept < self.prompts:
            now, number, end, version = heapq.heappop(self.running)
            fresh = self.lag is None or self.version - version <= self.lag
            settled.append(lone(str(number), end, "trained" if fresh else "stale"))
            kept += fresh
            self.begin(now)
        self.version += 1
        return settled


def means(past: Sequence[Sequence[Dispatched]], limit: int) -> tuple[float, float]:
    """Mean end of what was kept, up to a limit beyond which next to nothing is: plain, and weighed."""
    every = [one for step in past for one in step]
    keep = keep_probabilities(every, past)
    ends = [one for one in every if one.kept and one.end <= limit]
    weights = [1.0 / keep[one.id].probability for one in ends]
    weighed = sum(w * one.end for w, one in zip(weights, ends, strict=True)) / sum(weights)
    return sum(one.end for one in ends) / len(ends), weighed


def steps_of(policy: str, random: np.random.Generator, steps: int, lag: int = 2) -> list[list[Dispatched]]:
    take: Policy = raced if policy == "race" else Flow(random, 16, lag).step
    for step in range(8):  # in the first of a flow nothing can be old
        take(random, step)
    return [take(random, step) for step in range(steps)]


@pytest.mark.parametrize(("policy", "limit"), [("race", 150), ("drop", 120)])
def test_weights_undo_what_a_policy_prefers(policy: str, limit: int) -> None:
    """Weights under which the mean of what was kept isn't that of what was dispatched, within the error of both, or a
    policy whose unweighted mean would have been right anyway."""
    plain, weighed = zip(
        *(means(steps_of(policy, np.random.default_rng(n), 64), limit) for n in range(12)), strict=True
    )
    truth = float(np.mean([end for end in ends_of(np.random.default_rng(99), 400_000) if end <= limit]))
    error = float(np.std(weighed, ddof=1)) / math.sqrt(len(weighed))
    assert abs(np.mean(weighed) - truth) < 3 * error + 0.01 * truth, (np.mean(weighed), truth, error)
    assert truth - np.mean(plain) > 0.05 * truth, (np.mean(plain), truth)


@pytest.mark.parametrize("end", [80, 110, 150])
def test_intervals_hold_the_true_probability(end: int) -> None:
    """An interval that takes the groups of a step for independent, whose fates depend on what runs beside them."""
    long_run = [one for step in steps_of("drop", np.random.default_rng(1), 2500) for one in step]
    truth = float(np.mean([one.kept for one in long_run if abs(one.end - end) <= 2]))
    inside = 0
    for seed in range(60):
        found = Estimate(steps_of("drop", np.random.default_rng(1000 + seed), 32)).at(end)
        inside += found.low <= truth <= found.high
    assert stats.binomtest(inside, 60, 0.95, "less").pvalue > 0.01, (truth, inside)


def test_an_estimate_is_the_isotonic_regression() -> None:
    """Bins whose pooled shares are not the closest falling ones, or that forget how many groups each is of."""
    random = np.random.default_rng(4)
    ends = np.repeat(np.arange(1, 13), LEAST + np.arange(12))
    kept = random.uniform(size=len(ends)) < 1.2 - ends / 14
    groups = [
        lone(str(i), int(end), "trained" if fate else "stale")
        for i, (end, fate) in enumerate(zip(ends, kept, strict=True))
    ]
    shares = [kept[ends == end].mean() for end in range(1, 13)]
    expected = optimize.isotonic_regression(shares, weights=LEAST + np.arange(12), increasing=False).x
    found = Estimate([groups])
    assert [found.at(end).probability for end in range(1, 13)] == pytest.approx(expected)
    assert found.at(0) == found.at(1) and found.at(99) == found.at(12)


def test_what_was_cut_counts_for_the_longer() -> None:
    """A keep probability of 1 where nothing that ended was lost, though long groups were withdrawn before they did."""
    steps = [
        [lone(f"{s}/{n}", n % 10 + 1) for n in range(60)]
        + [
            lone(f"{s}/{n}", n % 10 + 1) if n % 10 < 5 else lone(f"{s}/{n}", 5, "late", ended=False)
            for n in range(60, 100)
        ]
        for s in range(4)
    ]
    found = Estimate(steps)
    assert found.at(3).probability == 1.0
    assert found.at(8).probability == pytest.approx(0.6)  # of 40 among 100 that would have been so long, 16 were cut


def test_known_probabilities_are_exact() -> None:
    """An estimate where who chooses knows, or an interval about what is known."""
    known = lone("known", 9, keep=0.25)
    found = keep_probabilities([known, lone("lost", 9, "stale", keep=None)], [[known]])
    assert found == {"known": Keep(0.25, 0.25, 0.25)}


def test_weights_by_hand() -> None:
    """Weights whose mean over the batch's tokens isn't 1, a bound that isn't kept, or a group outside the batch."""
    keep = {"a": Keep(1.0, 1.0, 1.0), "b": Keep(0.5, 0.4, 0.6), "c": Keep(0.01, 0.0, 0.1), "d": Keep(0.1, 0.1, 0.1)}
    found = inverse(keep, {"a": 10, "b": 20, "c": 10, "d": 0}, most=4.0)
    assert found.of == pytest.approx({"a": 0.4444444, "b": 0.8888889, "c": 1.7777778})
    assert (found.largest, found.clipped) == (100.0, pytest.approx(1 / 3))
    assert found.effective == pytest.approx(49 / (3 * 21))
    assert inverse({}, {}, 4.0).of == {}
