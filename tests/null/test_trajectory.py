"""Tokens, masks, log-probs or versions that slip against each other when turns are flattened."""

from __future__ import annotations

import dataclasses
import math
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tandem.columns import Columns
from tandem.numerics.interval import wilson_interval
from tandem.rollout.group import summarise
from tandem.rollout.pieces import Pieces
from tandem.rollout.rows import credits, trajectory_rows
from tandem.rollout.trajectory import flatten
from tandem.types import (
    Completion,
    Failure,
    Group,
    Message,
    Prompt,
    Sample,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)
from tests.samples import column

PROGRAMS = count()


@st.composite
def turns(draw: st.DrawFn) -> Turn:
    size = draw(st.integers(0, 8))
    kinds = {"tokens": st.integers(0, 99), "logprobs": st.floats(-9, 0), "versions": st.integers(0, 5)}
    columns = Columns.of(**{name: draw(st.lists(k, min_size=size, max_size=size)) for name, k in kinds.items()})
    completion = Completion("r", columns, draw(st.sampled_from(StopReason)))
    return Turn(completion, tuple(draw(st.lists(st.integers(0, 99), max_size=4))))


@given(st.lists(st.integers(0, 99), max_size=5), st.lists(turns(), max_size=4))
def test_flatten_keeps_every_token(prompt: list[int], played: list[Turn]) -> None:
    """A token is dropped, moved, or carries another token's mask, log-prob or version."""
    flat = flatten("p/0/0", "p", prompt, played, 0.5)
    expected: list[tuple[int, bool, float, int]] = [(token, False, 0.0, -1) for token in prompt]
    for turn in played:
        said = turn.completion.columns.arrays
        for token, logprob, version in zip(
            *(said[n].tolist() for n in ("tokens", "logprobs", "versions")), strict=True
        ):
            expected.append((token, True, logprob, version))
        expected += [(token, False, 0.0, -1) for token in turn.observation_tokens]
    names = ("tokens", "loss_mask", "logprobs", "versions")
    assert set(flat.columns.arrays) - {"turns"} == set(names) and ("turns" in flat.columns) == (len(played) > 1)
    assert list(zip(*(column(flat, name) for name in names), strict=True)) == expected
    assert flat.num_sampled == sum(len(turn.completion.tokens) for turn in played)
    assert flat.stop_reason == (played[-1].completion.stop_reason if played else None)
    assert flat.reward == 0.5 and flat.failure is None


def test_flatten_by_hand() -> None:
    """Two turns with an observation between them, weights that change in the middle of the second."""
    said = Columns.of(tokens=(5, 2), logprobs=(-0.1, -0.2), versions=(3, 3))
    first = Turn(Completion("a", said, StopReason.STOP_TOKEN), (8, 9))
    said = Columns.of(tokens=(6, 7, 2), logprobs=(-0.3, -0.4, -0.5), versions=(3, 4, 4))
    second = Turn(Completion("b", said, StopReason.LENGTH))
    flat = flatten("p/1/0", "p", (1, 1), (first, second), Failure("reward", "returned nan"))
    assert column(flat, "tokens") == [1, 1, 5, 2, 8, 9, 6, 7, 2]
    assert column(flat, "loss_mask") == [False, False, True, True, False, False, True, True, True]
    assert column(flat, "logprobs") == [0.0, 0.0, -0.1, -0.2, 0.0, 0.0, -0.3, -0.4, -0.5]
    assert column(flat, "versions") == [-1, -1, 3, 3, -1, -1, 3, 4, 4]
    assert column(flat, "turns") == [-1, -1, 0, 0, -1, -1, 1, 1, 1]
    assert flat.failure == Failure("reward", "returned nan") and flat.stop_reason is StopReason.LENGTH


@pytest.mark.parametrize("missing", ["logprobs", "versions"])
def test_flatten_refuses_tokens_that_nothing_is_known_of(missing: str) -> None:
    """A completion without log-probs or versions is filled up as if nobody had sampled it: p = 1, version -1."""
    said = Columns.of(tokens=(5, 2), logprobs=(-1.0, -1.0), versions=(0, 0)).without(missing)
    with pytest.raises(AssertionError, match="r has tokens"):
        flatten("p", "p", (1,), (Turn(Completion("r", said, StopReason.LENGTH)),), 1.0)


def trajectory(reward: float | None, sampled: int, stop: StopReason = StopReason.STOP_TOKEN) -> Trajectory:
    failure = Failure("reward", "returned nan") if reward is None else None
    columns = Columns.of(tokens=(1,) * sampled, loss_mask=(True,) * sampled)
    return Trajectory(f"p/{next(PROGRAMS)}", "p", columns, reward or 0.0, stop, failure)


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


def spelt(ids: list[int]) -> str:
    return "".join(chr(i) for i in ids)


def test_trajectory_rows_decode_what_was_sampled():
    """The prompt shown as the model's answer, or a failure with a reward of zero."""
    prompt = Prompt("p", (Message("user", "1 + 2?"),), {"answer": "3"})
    said = Columns.of(tokens=(9, 8, 51, 7, 52), loss_mask=(False, False, True, False, True))
    good = Trajectory("p/0", "p", said, reward=1.0, stop_reason=StopReason.STOP_TOKEN)
    nothing = Columns.of(tokens=(9, 8), loss_mask=(False, False))
    bad = Trajectory("p/1", "p", nothing, failure=Failure("reward", "nan"))
    folded = dataclasses.replace(good, segment=1)
    pieces = Pieces(spelt)
    plain, failed, later = trajectory_rows([Group(prompt, (good, bad, folded))], pieces, keep_tokens=False)
    assert plain == {
        "program_id": "p/0", "segment": 0, "prompt_id": "p", "prompt": [{"role": "user", "content": "1 + 2?"}],
        "answer": "3",
        "text": "3\x074", "reward": 1.0, "sampled_tokens": 2, "stop_reason": "stop_token", "failure": None,
    }  # fmt: skip
    assert (failed["reward"], failed["text"], failed["failure"]) == (None, "", {"where": "reward", "reason": "nan"})
    assert (later["segment"], later["context"], later["text"]) == (1, "\t\x08", "3\x074")
    kept, failed, later = trajectory_rows([Group(prompt, (good, bad, folded))], pieces)
    tokens = {"ids": [9, 8, 51, 7, 52], "chars": [1] * 5, "sampled": [2, 1, 1, 1]}
    assert kept == plain | {"context": "\t\x08", "tokens": tokens}
    assert failed["tokens"] == {"ids": [9, 8], "chars": [1, 1], "sampled": [2]}
    assert later == kept | {"segment": 1, "cause": ""}


def test_rows_of_tokens_by_hand() -> None:
    """Log-probs, versions or credit of other tokens; an advantage for what was not trained."""
    call = ToolCall("add", {"a": 1})
    said = (
        Message("assistant", "34", (call,), sampled=True),
        Message("tool", "!", call_id="c1"),
        Message("assistant", "5", sampled=True),
    )
    columns = Columns.of(tokens=(51, 52), logprobs=(-0.12345, -0.0), versions=(3, 4))
    again = Columns.of(tokens=(53,), logprobs=(-2.0,), versions=(4,))
    turns = (
        Turn(Completion("r", columns, StopReason.STOP_TOKEN), (33,)),
        Turn(Completion("r", again, StopReason.LENGTH)),
    )
    flat = dataclasses.replace(flatten("p/0/0", "p", (), turns, 1.0), said=said)
    rows = list(trajectory_rows([Group(Prompt("p", ()), (flat,))], Pieces(spelt)))
    assert rows[0]["tokens"] == {
        "ids": [51, 52, 33, 53], "chars": [1, 1, 1, 1], "sampled": [0, 2, 1, 1],
        "logprobs": [-0.123, 0.0, -2.0], "versions": [3, 1, 4, 2],
    }  # fmt: skip
    assert math.copysign(1, rows[0]["tokens"]["logprobs"][1]) == 1  # "-0.0" is a byte more
    assert rows[0]["said"] == [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "tool_call_id": "c1"},
        {"role": "assistant"},
    ]
    advantages = Columns.of(
        tokens=(51, 52, 33, 53), loss_mask=(True, True, False, True), advantages=(0.5, 0.5, 0.0, -1.00049)
    )
    found = credits(["p/0/0/0", "p/0/1/0"], [Sample("p/0/0/0", "p", advantages)])
    assert found == [{"advantages": [0.5, 2, -1.0, 1]}, {}]


def test_what_a_turn_earned_stands_at_its_message() -> None:
    """A step's reward shown at another turn, or at none: the page colours what the model did by it."""
    turns = []
    for number, (earned, observation) in enumerate([(0.5, (9,)), (0.0, ()), (-1.0, (9, 9))]):
        columns = Columns.of(tokens=(number, 7), logprobs=(0.0, 0.0), versions=(0, 0))
        turns.append(Turn(Completion("r", columns, StopReason.LENGTH), observation, reward=earned))
    flat = flatten("p/0/0", "p", (1,), turns, 1.0)
    roles = ("assistant", "tool", "assistant", "assistant", "tool")
    said = tuple(Message(role, "x", sampled=role == "assistant") for role in roles)
    group = Group(Prompt("p", (Message("user", "?"),)), (dataclasses.replace(flat, said=said),))
    (row,) = trajectory_rows([group], Pieces(lambda ids: "".join(map(str, ids))))
    assert [one.get("reward") for one in row["said"]] == [0.5, None, None, -1.0, None]
