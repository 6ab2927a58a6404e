"""Tokens, masks, log-probs or versions that slip against each other when turns are flattened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tandem.rollout.evaluate import wilson_interval
from tandem.rollout.group import summarise
from tandem.rollout.trajectory import flatten
from tandem.types import Completion, Failure, Group, Prompt, StopReason, Trajectory, Turn, VersionSpan


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    size = draw(st.integers(0, 8))
    tokens = tuple(draw(st.lists(st.integers(0, 99), min_size=size, max_size=size)))
    logprobs = tuple(draw(st.lists(st.floats(-9, 0), min_size=size, max_size=size)))
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else []
    edges = [0, *cuts, size]
    spans = tuple(VersionSpan(draw(st.integers(0, 5)), a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a)
    completion = Completion("r", tokens, logprobs, spans, draw(st.sampled_from(StopReason)))
    return Turn(completion, tuple(draw(st.lists(st.integers(0, 99), max_size=4))))


@given(st.lists(st.integers(0, 99), max_size=5), st.lists(turns(), max_size=4))
def test_flatten_keeps_every_token(prompt: list[int], played: list[Turn]) -> None:
    """A token is dropped, moved, or carries another token's mask, log-prob or version."""
    flat = flatten("p/0/0", "p", prompt, played, 0.5)
    expected: list[tuple[int, bool, float, int]] = [(token, False, 0.0, -1) for token in prompt]
    for turn in played:
        said = turn.completion
        for place, token in enumerate(said.tokens):
            (version,) = [span.step for span in said.versions if span.start <= place < span.end]
            expected.append((token, True, said.logprobs[place], version))
        expected += [(token, False, 0.0, -1) for token in turn.observation_tokens]
    assert list(zip(flat.tokens, flat.loss_mask, flat.logprobs, flat.versions, strict=True)) == expected
    assert flat.num_sampled == sum(len(turn.completion.tokens) for turn in played)
    assert flat.stop_reason == (played[-1].completion.stop_reason if played else None)
    assert flat.reward == 0.5 and flat.failure is None


def test_flatten_by_hand() -> None:
    """Two turns with an observation between them, weights that change in the middle of the second."""
    first = Turn(Completion("a", (5, 2), (-0.1, -0.2), (VersionSpan(3, 0, 2),), StopReason.STOP_TOKEN), (8, 9))
    spans = (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3))
    second = Turn(Completion("b", (6, 7, 2), (-0.3, -0.4, -0.5), spans, StopReason.LENGTH))
    flat = flatten("p/1/0", "p", (1, 1), (first, second), Failure("reward", "returned nan"))
    assert flat.tokens == (1, 1, 5, 2, 8, 9, 6, 7, 2)
    assert flat.loss_mask == (False, False, True, True, False, False, True, True, True)
    assert flat.logprobs == (0.0, 0.0, -0.1, -0.2, 0.0, 0.0, -0.3, -0.4, -0.5)
    assert flat.versions == (-1, -1, 3, 3, -1, -1, 3, 4, 4)
    assert flat.failure == Failure("reward", "returned nan") and flat.stop_reason is StopReason.LENGTH


def test_flatten_refuses_uncovered_tokens() -> None:
    """A completion whose version spans leave tokens out shifts the versions of all later tokens."""
    for spans in ((VersionSpan(0, 0, 1),), (VersionSpan(0, 0, 3),)):
        with pytest.raises(AssertionError):
            flatten("p", "p", (1,), (Turn(Completion("r", (5, 2), (0.0, 0.0), spans, StopReason.LENGTH)),), 1.0)


def trajectory(reward: float | None, sampled: int, stop: StopReason = StopReason.STOP_TOKEN) -> Trajectory:
    size = (sampled,)
    failure = Failure("reward", "returned nan") if reward is None else None
    masks, zeros, versions = (True,) * size[0], (0.0,) * size[0], (0,) * size[0]
    return Trajectory("p/0", "p", (1,) * sampled, masks, zeros, versions, reward or 0.0, (), stop, failure)


def test_summary_by_hand() -> None:
    """A failed trajectory counts as a reward of zero, or an all-failed group as one without variance."""
    groups = [
        Group(Prompt("a", ()), (trajectory(1.0, 4), trajectory(0.0, 2), trajectory(None, 6))),
        Group(Prompt("b", ()), (trajectory(1.0, 4, StopReason.LENGTH), trajectory(1.0, 4))),
        Group(Prompt("c", ()), (trajectory(None, 0), trajectory(None, 0))),
    ]
    summary = summarise(groups)
    assert (summary.trajectories, summary.failed, summary.tokens, summary.length_max) == (7, 3, 20, 6)
    assert summary.reward == 0.75 and summary.reward_std == pytest.approx(3**0.5 / 4)
    assert summary.zero_variance == 0.5 and summary.truncated == pytest.approx(1 / 7)
    assert summary.failures == (("reward: returned nan", 3),)
    nothing = summarise([groups[2]])
    assert nothing.reward is None and nothing.reward_std is None and nothing.zero_variance is None


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_against_scipy(trials: int, share: float) -> None:
    """The interval differs from scipy's Wilson interval, or leaves [0, 1]."""
    right = round(share * trials)
    expected = binomtest(right, trials).proportion_ci(0.95, method="wilson")
    low, high = wilson_interval(right, trials)
    assert low == pytest.approx(expected.low, abs=1e-12) and high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= low <= right / trials <= high <= 1


def test_wilson_without_trials() -> None:
    """An evaluation in which nothing could be graded divides by zero or claims an accuracy."""
    assert wilson_interval(0, 0) == (0.0, 1.0)
