"""Advantages and the selection of what is trained."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.algo.advantage import (
    ADVANTAGES,
    FATES,
    Selection,
    samples_from_groups,
)
from tandem.algo.config import AlgoConfig, check_group_size
from tandem.algo.credit import STD_FLOOR, GroupedCounts, GroupedValues
from tandem.algo.pack import PromptTotal
from tandem.algo.price import PriceConfig
from tandem.columns import Columns
from tandem.errors import ConfigError, NonFiniteError
from tandem.types import Failure, Group, Prompt, StopReason, Trajectory
from tests.samples import column, having, trained


def reference_advantages(name: str, rewards: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """Slow and obvious: each formula as its paper writes it, in exact rational statistics."""
    result: list[list[float]] = []
    everything: list[float] = []
    for group, counts in zip(rewards, tokens, strict=True):
        for reward, count in zip(group, counts, strict=True):
            baseline = statistics.mean(group) if name == "reinforce_pp_baseline" else 0.0
            everything += [reward - baseline] * count
    for group in rewards:
        row = []
        for i, reward in enumerate(group):
            others = [other for j, other in enumerate(group) if j != i]
            if name == "rloo":
                row.append(reward - statistics.mean(others) if others else 0.0)
            elif name == "dr_grpo":
                row.append(reward - statistics.mean(group))
            elif name == "best":
                row.append(1.0 if reward == max(group) and any(other < reward for other in group) else 0.0)
            elif name == "grpo":
                std = statistics.stdev(group) if others else 0.0
                row.append((reward - statistics.mean(group)) / (std + STD_FLOOR))
            else:
                baseline = statistics.mean(group) if name == "reinforce_pp_baseline" else 0.0
                centred = reward - baseline - statistics.mean(everything)
                row.append(centred / (statistics.pstdev(everything) + STD_FLOOR))
        result.append(row)
    return result


def trajectory(prompt: str, number: int, reward: float, sampled: int = 2, failed: bool = False) -> Trajectory:
    mask = (False,) * 3 + (True,) * sampled
    return Trajectory(
        f"{prompt}/{number}",
        prompt,
        Columns.of(
            tokens=range(3 + sampled),
            loss_mask=mask,
            logprobs=[-0.5 if m else 0.0 for m in mask],
            versions=[0 if m else -1 for m in mask],
        ),
        reward=reward,
        failure=Failure("reward", "returned nan") if failed else None,
    )


def group(prompt: str, rewards: list[float], lengths: list[int] | None = None, failed: tuple[int, ...] = ()) -> Group:
    lengths = lengths or [2] * len(rewards)
    return Group(
        Prompt(prompt, ()),
        tuple(
            trajectory(prompt, i, reward, length, i in failed)
            for i, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
        ),
    )


def fates(selection: Selection) -> dict[str, int]:
    """Trajectories by what became of them."""
    return dict(Counter(selection.fates.values()))


def token_fates(selection: Selection, groups: Sequence[Group]) -> dict[str, int]:
    """Sampled tokens by what became of their trajectory."""
    found: Counter[str] = Counter()
    for t in (t for one in groups for t in one.trajectories):
        found[selection.fates[t.id]] += t.num_sampled
    return dict(found)


HAND_WORKED = {
    # Group (1, 0, 0, 0): mean 1/4, squared deviations 9/16 + 3/16 = 3/4, sample std sqrt(3/4 / 3) = 1/2.
    # Group (2, 1): mean 3/2, sample std sqrt(1/2).
    "grpo": [[1.5, -0.5, -0.5, -0.5], [math.sqrt(0.5), -math.sqrt(0.5)]],
    "dr_grpo": [[0.75, -0.25, -0.25, -0.25], [0.5, -0.5]],
    "best": [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0]],
    "rloo": [[1.0, -1 / 3, -1 / 3, -1 / 3], [1.0, -1.0]],
    # Tokens 1, 1, 1, 1 and 3, 1: values 1, 0, 0, 0, 2, 2, 2, 1: mean 1, population variance 6/8.
    "reinforce_pp": [
        [0.0, -math.sqrt(4 / 3), -math.sqrt(4 / 3), -math.sqrt(4 / 3)],
        [math.sqrt(4 / 3), 0.0],
    ],
    # Centred 3/4, -1/4 x 3, 1/2 x 3, -1/2: mean 1/8, mean square (9 + 3 + 12 + 4) / 16 / 8 = 7/32, variance 13/64.
    "reinforce_pp_baseline": [
        [5 / math.sqrt(13), -3 / math.sqrt(13), -3 / math.sqrt(13), -3 / math.sqrt(13)],
        [3 / math.sqrt(13), -5 / math.sqrt(13)],
    ],
}


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_hand_worked_advantages(name: str) -> None:
    """An estimator uses another baseline, another standard deviation, or counts samples where it should tokens."""
    found = ADVANTAGES[name]([[1.0, 0.0, 0.0, 0.0], [2.0, 1.0]], [[1, 1, 1, 1], [3, 1]])
    for row, expected in zip(found, HAND_WORKED[name], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(
        st.lists(st.floats(-1e9, 1e9) | st.sampled_from([-1e9, 1e9, 0.0, 1.0]), min_size=1, max_size=6),
        min_size=1,
        max_size=4,
    )
)
def test_advantages_of_the_largest_rewards(name: str, groups: list[list[float]]) -> None:
    """A spread as large as rewards may have overflows a statistic, or loses what the exact one keeps."""
    tokens = [[place % 3 + 1 for place in range(len(group))] for group in groups]
    found = ADVANTAGES[name](groups, tokens)
    exact = reference_advantages(name, groups, tokens)
    size = max(abs(reward) for group in groups for reward in group)
    for row, expected in zip(found, exact, strict=True):
        for value, right in zip(row, expected, strict=True):
            assert math.isfinite(value)
            if size >= 1.0 and name in ("dr_grpo", "rloo"):  # the others divide by what may be rounding alone
                assert value == pytest.approx(right, rel=1e-9, abs=1e-11 * size)


@pytest.mark.parametrize(("reward", "price"), [(1e308, 0.0), (1.0, 1e308), (1.0, math.inf), (math.nan, 0.0)])
def test_reward_or_price_beyond_all_statistics(reward: float, price: float) -> None:
    """A reward or a price of 1e308 ends in an overflow's traceback."""
    config = AlgoConfig(price=PriceConfig(budget=1.0))
    with pytest.raises(NonFiniteError, match="prompt p: a reward after its price .* lower algo.price.rate"):
        samples_from_groups(config, [group("p", [reward, 0.0])], price=price)


REWARDS = st.lists(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0, 7.25]), st.integers(1, 4)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@settings(max_examples=50, deadline=None)
@given(groups=REWARDS)
def test_advantages_equal_reference(name: str, groups: list[list[tuple[float, int]]]) -> None:
    """The closed forms drift from the formulas as the papers write them."""
    rewards = [[reward for reward, _ in row] for row in groups]
    tokens = [[count for _, count in row] for row in groups]
    found, expected = ADVANTAGES[name](rewards, tokens), reference_advantages(name, rewards, tokens)
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_give_exactly_zero(name: str) -> None:
    """Rounding of the mean of equal rewards (0.1 x 6) leaves 1e-17, which the std floor turns into a trained sample."""
    assert ADVANTAGES[name]([[0.1] * 6, [0.7] * 3], [[1] * 6, [1] * 3]) == [[0.0] * 6, [0.0] * 3]
    assert ADVANTAGES[name]([[0.1, 0.1, 0.1, 0.4, -0.2]], [[1] * 5])[0][:3] == [0.0] * 3


def test_failed_trajectories_are_in_no_statistic() -> None:
    """A failed trajectory's reward shifts its group's mean, or its tokens the denominators."""
    groups = [group("p", [1.0, 0.0, 50.0], lengths=[2, 4, 7], failed=(2,))]
    selection = samples_from_groups(AlgoConfig(advantage="dr_grpo"), groups)
    assert [column(sample, "advantages")[-1] for sample in selection.samples] == [0.5, -0.5]
    assert selection.prompts == (PromptTotal("p", tokens=6, samples=2),)
    assert fates(selection) == {"trained": 2, "failed": 1}
    assert token_fates(selection, groups) == {"trained": 6, "failed": 7}


def test_zero_advantage_samples_count_in_the_denominators() -> None:
    """Dropping zero-advantage samples also drops them from the denominators, which scales the gradient."""
    groups = [group("p", [1.0, 0.5, 0.0]), group("q", [1.0, 1.0], lengths=[5, 6])]
    selection = samples_from_groups(AlgoConfig(), groups)
    assert [sample.id for sample in selection.samples] == ["p/0/0", "p/2/0"]
    assert selection.prompts == (PromptTotal("p", 6, 3), PromptTotal("q", 11, 2))
    assert fates(selection) == {"trained": 2, "zero_advantage": 3}
    assert token_fates(selection, groups) == {"trained": 4, "zero_advantage": 13}


def test_kl_keeps_zero_advantage_samples() -> None:
    """With a KL term a zero-advantage sample has a gradient, and leaving it out biases the penalty."""
    config = AlgoConfig(kl="k2", kl_weight=0.1)
    selection = samples_from_groups(config, [group("p", [1.0, 0.5, 0.0]), group("q", [1.0, 1.0])])
    assert len(selection.samples) == 5
    assert fates(selection) == {"trained": 5}


def test_filter_takes_zero_variance_groups_out_of_the_batch() -> None:
    """The filter leaves a zero-variance group in the denominators or in the batch statistics."""
    config = AlgoConfig(advantage="reinforce_pp", filter_zero_variance=True)
    selection = samples_from_groups(config, [group("p", [1.0, 0.0]), group("q", [9.0, 9.0])])
    assert [column(sample, "advantages")[-1] for sample in selection.samples] == pytest.approx([1.0, -1.0], rel=1e-5)
    assert selection.prompts == (PromptTotal("p", 4, 2),)
    assert fates(selection) == {"trained": 2, "filtered": 2}


def test_filter_takes_truncated_programs_out_of_the_denominators_alone() -> None:
    """A cut program is trained on, or its reward is lost to its group's statistics, or it still scales the gradient."""
    one = group("p", [1.0, 0.0, 0.0])
    cut = [replace(one.trajectories[0], stop_reason=StopReason.LENGTH), *one.trajectories[1:]]
    config = AlgoConfig(advantage="dr_grpo", filter_truncated=True)
    selection = samples_from_groups(config, [replace(one, trajectories=tuple(cut))])
    assert fates(selection) == {"truncated": 1, "trained": 2}
    assert [column(sample, "advantages")[-1] for sample in selection.samples] == pytest.approx([-1 / 3] * 2)
    assert selection.prompts == (PromptTotal("p", 4, 2),)


def test_best_keeps_the_best_of_each_group() -> None:
    """Rejection sampling trains on what it rejected, or on a group in which nothing was better."""
    groups = [group("p", [0.2, 0.9, 0.9]), group("q", [0.0, 0.0])]
    selection = samples_from_groups(AlgoConfig(advantage="best"), groups)
    assert [(sample.id, column(sample, "advantages")[-1]) for sample in selection.samples] == [
        ("p/1/0", 1.0),
        ("p/2/0", 1.0),
    ]
    assert fates(selection) == {"trained": 2, "zero_advantage": 3}


def test_empty_and_lone_trajectories() -> None:
    """A trajectory without a sampled token reaches the learner, or a lone survivor divides by zero."""
    selection = samples_from_groups(
        AlgoConfig(advantage="rloo"),
        [group("p", [1.0, 0.0], lengths=[0, 2]), group("q", [1.0, 0.0], failed=(1,)), group("r", [1.0], failed=(0,))],
    )
    assert [sample.id for sample in selection.samples] == ["p/1/0"]
    assert fates(selection) == {"trained": 1, "zero_advantage": 1, "masked": 1, "failed": 2}
    assert [total.prompt_id for total in selection.prompts] == ["p", "q"]
    assert samples_from_groups(AlgoConfig(advantage="reinforce_pp"), []).samples == ()


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(ADVANTAGES)),
    filtered=st.booleans(),
    kl=st.booleans(),
    rows=st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.3]), st.integers(0, 3), st.booleans()), max_size=4), max_size=4
    ),
)
def test_every_trajectory_and_token_has_one_fate(name: str, filtered: bool, kl: bool, rows: list) -> None:
    """A trajectory is lost or counted twice between rollout and learner."""
    groups = [
        group(
            f"p{g}",
            [reward for reward, _, _ in row],
            [length for _, length, _ in row],
            tuple(i for i, (_, _, failed) in enumerate(row) if failed),
        )
        for g, row in enumerate(rows)
    ]
    config = AlgoConfig(
        advantage=name, filter_zero_variance=filtered, kl="k3" if kl else "none", kl_weight=0.1 if kl else 0.0
    )
    selection = samples_from_groups(config, groups)
    members = [t for one in groups for t in one.trajectories]
    assert sorted(selection.fates) == sorted(t.id for t in members) and set(fates(selection)) <= set(FATES)
    assert fates(selection).get("trained", 0) == len(selection.samples)
    assert token_fates(selection, groups).get("trained", 0) == sum(len(trained(s)) for s in selection.samples)


def test_sample_copies_the_trajectory() -> None:
    """Advantages land on prompt tokens, or behaviour log-probs are not passed on as sampled."""
    selection = samples_from_groups(AlgoConfig(advantage="dr_grpo"), [group("p", [1.0, 0.0])])
    sample = selection.samples[0]
    assert column(sample, "advantages") == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert column(sample, "logprobs") == [0.0, 0.0, 0.0, -0.5, -0.5]
    assert column(sample, "loss_mask") == [False, False, False, True, True]
    assert column(sample, "tokens") == [0, 1, 2, 3, 4]


def test_what_the_sampler_kept_reaches_the_sample() -> None:
    """Kept sets, unfiltered log-probs or versions are lost, so the learner scores another distribution."""
    (first, *others) = group("p", [1.0, 0.0]).trajectories
    fields = {
        "versions": [-1, -1, -1, 4, 5],
        "kept": [b"", b"", b"", b"abcd", b"efgh"],
        "unfiltered_logprobs": [0.0, 0.0, 0.0, -1.0, -2.0],
    }
    chosen = replace(group("p", [1.0, 0.0]), trajectories=(having(first, **fields), *others))
    sample = samples_from_groups(AlgoConfig(), [chosen]).samples[0]
    for name, value in fields.items():
        assert column(sample, name) == value, name


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "best"])
def test_one_sample_a_group_is_refused(name: str) -> None:
    """GRPO with one sample a group runs for hours with every advantage zero."""
    with pytest.raises(ConfigError, match="samples_per_prompt"):
        check_group_size(AlgoConfig(advantage=name), 1)
    check_group_size(AlgoConfig(advantage=name), 2)


def test_group_size_of_batch_estimators() -> None:
    """REINFORCE++ needs no group, but the zero-variance filter would drop all of its batch."""
    check_group_size(AlgoConfig(advantage="reinforce_pp"), 1)
    check_group_size(AlgoConfig(advantage="gae"), 1)
    with pytest.raises(ConfigError, match="filter_zero_variance"):
        check_group_size(AlgoConfig(advantage="reinforce_pp", filter_zero_variance=True), 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"advantage": "grpoo"}, "Did you mean grpo"),
        ({"loss": "pposs"}, "algo.loss"),
        ({"clip_low": 1.5}, "algo.clip_low is 1.5"),
        ({"clip_high": float("nan")}, "algo.clip_high"),
        ({"clip_high": float("inf")}, "algo.clip_high"),
        ({"kl_weight": 0.1}, "algo.kl is 'none'"),
        ({"kl": "k3"}, "algo.kl_weight is 0"),
        ({"kl": "k3", "kl_weight": -1.0}, "algo.kl_weight is -1.0"),
        ({"aggregation": "constant_mean"}, "constant_tokens"),
        ({"constant_tokens": 64}, "constant_tokens"),
        ({"aggregation": "constant_mean", "constant_tokens": 0}, "1 or more"),
        ({"updates_per_step": 0}, "updates_per_step"),
        ({"advantage": "gae", "credit": "step"}, "algo.credit is 'step'"),
        ({"advantage": "reinforce_pp", "credit": "gigpo"}, "compares no group"),
        ({"discount": 0.9}, "algo.discount is 0.9, but only"),
        ({"credit": "step", "step_weight": 0.5}, "algo.step_weight"),
        ({"gae_lambda": 0.9}, "algo.gae_lambda"),
        ({"gae_step": "turn"}, "algo.gae_step is turn"),
        ({"kl": "k1", "kl_weight": 0.1, "kl_in_reward": True}, "algo.kl_in_reward is on with algo.advantage 'grpo'"),
        ({"advantage": "gae", "kl_in_reward": True}, "algo.kl 'none'"),
        ({"advantage": "gae", "discount": 1.5}, "algo.discount is 1.5"),
    ],
)
def test_wrong_config_is_refused(fields: dict, says: str) -> None:
    """A wrong value of the algorithm reaches the run, or its message does not name the setting."""
    with pytest.raises(ConfigError, match=says):
        AlgoConfig(**fields)


def test_clip_defaults_follow_the_loss() -> None:
    """GSPO runs with PPO's clip range, a thousand times its own."""
    assert AlgoConfig().clip_range == (0.2, 0.28)
    assert AlgoConfig(loss="gspo").clip_range == (3e-4, 4e-4)
    assert AlgoConfig(loss="cispo").clip_range == (1.0, 4.0)
    assert AlgoConfig(loss="gspo", clip_high=0.1).clip_range == (3e-4, 0.1)
