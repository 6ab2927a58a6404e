"""Which prompts a step asks: probabilities that are not those of the draw, and beliefs that are not the rewards'."""

from __future__ import annotations

import json
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tandem.rollout.belief import LEAST, MOST, Belief, Beliefs, _Moments
from tandem.rollout.choose import Choice, choose, probabilities, systematic
from tandem.types import Group, Message, Prompt
from tests.null.test_advantage import trajectory

rates = st.floats(0.05, 20.0)


def sums(index: int, answer: str = "30") -> Prompt:
    return Prompt(f"p{index}", (Message("user", f"{index} + 7 ="),), {"answer": answer})


def group(prompt: Prompt, rewards: list[float]) -> Group:
    """NaN stands for a program that failed."""
    return Group(prompt, tuple(trajectory(prompt.id, n, r, failed=math.isnan(r)) for n, r in enumerate(rewards)))


@given(right=rates, wrong=rates, count=st.integers(0, 12))
def test_a_belief_is_a_beta(right: float, wrong: float, count: int) -> None:
    """A predicted variance, or a probability of unequal rewards, that is not the beta-binomial's."""
    belief, law = Belief(right, wrong), stats.betabinom(count, right, wrong)
    assert belief.all_right(count) == pytest.approx(law.pmf(count))
    assert belief.differs(count) == pytest.approx(1 - law.pmf(count) - law.pmf(0) if count else -1.0, abs=1e-9)
    beta = stats.beta(right, wrong)
    assert belief.mean == pytest.approx(beta.mean())
    assert belief.variance == pytest.approx(beta.mean() - beta.moment(2))


@pytest.mark.parametrize(("right", "wrong"), [(0.3, 0.6), (2.0, 1.0), (8.0, 8.0)])
def test_moments_find_the_beta_that_rates_were_drawn_from(right: float, wrong: float) -> None:
    """A shape whose prompts are all right or all wrong taken for one in which each is half right."""
    drawn, moments = random.Random(5), _Moments()
    for _ in range(20_000):
        rate = drawn.betavariate(right, wrong)
        moments.add([float(drawn.random() < rate) for _ in range(4)])
    found = moments.belief(Belief(1.0, 1.0))
    assert found.mean == pytest.approx(right / (right + wrong), abs=0.01)
    assert sum(found) == pytest.approx(right + wrong, rel=0.1)


def test_extreme_moments_stay_a_beta() -> None:
    """A division by zero where all groups were right, or more alike than chance."""
    solved, alike = _Moments(), _Moments()
    for _ in range(200):
        solved.add([1.0] * 8)
        alike.add([1.0, 0.0] * 4)
    for moments in (solved, alike, _Moments()):
        right, wrong = moments.belief(Belief(1.0, 1.0))
        assert right > 0 < wrong and LEAST <= right + wrong <= MOST
    assert solved.belief(Belief(1.0, 1.0)).variance < 0.01
    assert sum(alike.belief(Belief(1.0, 1.0))) == pytest.approx(MOST)


def test_a_prompt_is_believed_to_be_as_its_shape_and_as_itself() -> None:
    """A new prompt of a solved shape that is expected to teach; one whose own answers are not remembered."""
    beliefs = Beliefs(half_life=10.0)
    easy, hard = [sums(n) for n in range(9)], [sums(n, "130") for n in range(10, 19)]
    beliefs.learn([*(group(prompt, [1.0] * 8) for prompt in easy), *(group(p, [0.0] * 4 + [1.0] * 4) for p in hard)], 8)
    new_easy, new_hard = beliefs.of(sums(77, "84")), beliefs.of(sums(77, "184"))
    assert beliefs.shape(sums(77, "84")) == "00 + 0 = | 00" != beliefs.shape(easy[0])
    assert beliefs.of(sums(5)).variance < 0.02 < 0.2 < new_hard.variance
    assert beliefs.of(hard[0]).variance == pytest.approx(0.25, abs=0.02) and beliefs.knows(hard[0])
    assert not beliefs.knows(sums(78)) and 0.02 < new_easy.variance
    assert json.loads(json.dumps(beliefs.state())) == json.loads(json.dumps(restored(beliefs).state()))
    assert restored(beliefs).of(hard[3]) == beliefs.of(hard[3])


def restored(beliefs: Beliefs) -> Beliefs:
    other = Beliefs(beliefs.half_life)
    other.restore(json.loads(json.dumps(beliefs.state())))
    return other


def test_old_rewards_are_forgotten() -> None:
    """A prompt that stays solved for ever after the policy lost it; memory that grows with the steps."""
    beliefs = Beliefs(half_life=1.0)
    beliefs.learn([group(sums(1), [1.0] * 8)], 8)
    before = beliefs.of(sums(1)).mean
    beliefs.learn([group(sums(2), [0.0, 1.0])], 2)
    assert beliefs.prompts[next(iter(beliefs.prompts))] == (4.0, 0.0) and beliefs.of(sums(1)).mean < before
    for _ in range(12):
        beliefs.learn([], 8)
    assert not beliefs.prompts and not beliefs.shapes


def test_a_failed_program_says_nothing() -> None:
    """A failure believed to be a wrong answer."""
    prompt = sums(1)
    beliefs = Beliefs(half_life=10.0)
    beliefs.learn([group(prompt, [1.0, float("nan"), 1.0])], 3)
    assert list(beliefs.prompts.values()) == [(2.0, 0.0)]


@given(scores=st.lists(st.floats(0, 1), min_size=1, max_size=30), count=st.integers(0, 30), floor=st.floats(0.01, 1.0))
def test_probabilities_go_by_the_scores_above_a_floor(scores: list[float], count: int, floor: float) -> None:
    """A prompt that is never asked, or with a probability that is not recorded; batches of another size."""
    chances = probabilities(scores, count, floor)
    if count >= len(scores):
        assert chances.tolist() == [1.0] * len(scores)
        return
    even = floor * count / len(scores)
    assert chances.sum() == pytest.approx(count) and chances.max(initial=0.0) <= 1.0
    assert chances.min() >= min(1.0, even) * (1 - 1e-12)
    by_score = [(score, chance - even) for score, chance in zip(scores, chances, strict=True) if chance < 1.0]
    for score, above in by_score:
        for other, beyond in by_score:
            assert above * other == pytest.approx(beyond * score, abs=1e-9)


@settings(max_examples=50)
@given(scores=st.lists(st.floats(0.001, 1), min_size=2, max_size=12), count=st.integers(1, 6), seed=st.integers(0, 99))
def test_each_is_drawn_with_its_probability(scores: list[float], count: int, seed: int) -> None:
    """A recorded probability that is not that of the draw, so that weights by it correct nothing."""
    count = min(count, len(scores))
    chances, order = probabilities(scores, count, 0.1), np.random.default_rng(seed).random(len(scores))
    hits, grid = np.zeros(len(scores)), 2000
    for start in (np.arange(grid) + 0.5) / grid:
        places = systematic(chances, order, start)
        assert len(places) == count == len(set(places))
        hits[places] += 1
    assert hits / grid == pytest.approx(chances, abs=2 / grid)


def test_weights_undo_the_choice() -> None:
    """A mean over chosen prompts that stays that of the hard ones, weighed or not; an estimate with a bias."""
    drawn = random.Random(3)
    prompts = [sums(n) for n in range(40)]
    known = [(prompt, Belief(drawn.uniform(0.1, 5), drawn.uniform(0.1, 5)), False) for prompt in prompts]
    worth = {prompt.id: drawn.random() + belief.variance for prompt, belief, _ in known}
    plain, weighed, estimated = [], [], []
    for seed in range(4000):
        choice = choose(known, 6, 0.3, 1.0, seed)
        assert len(choice.prompts) == 6
        plain.append(statistics.fmean(worth[prompt.id] for prompt in choice.prompts))
        weighed.append(statistics.fmean(choice.weight(p.id) * worth[p.id] for p in choice.prompts))
        estimated.append(choice.mean({prompt.id: worth[prompt.id] for prompt in choice.prompts}))
    whole = statistics.fmean(worth.values())
    for found in (weighed, estimated):
        assert abs(statistics.fmean(found) - whole) < 4 * statistics.stdev(found) / len(found) ** 0.5
    assert abs(statistics.fmean(plain) - whole) > 4 * statistics.stdev(plain) / len(plain) ** 0.5
    assert max(choice.weight(prompt.id) for prompt in choice.prompts) <= 1 / 0.3 + 1e-9


def test_what_was_not_measured_is_not_estimated() -> None:
    """A mean without the groups that the first to end pushed out, taken for the task's."""
    choice = choose([(sums(n), Belief(1.0, 1.0), False) for n in range(9)], 2, 0.2, 1.0, 1)
    assert choice.mean({choice.prompts[0].id: 1.0}) is None
    assert Choice((), {}, {}, {}).mean({}) is None
    assert choice.mean({prompt.id: 0.5 for prompt in choice.prompts}) == pytest.approx(0.5)
