"""Groups to samples: rewards become advantages, and what carries no gradient is left out and counted.

Only outcome rewards are read: every trained token of a program, in whichever segment, gets the program's advantage,
and a group's statistics count its programs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from tandem.algo.config import Advantage, AlgoConfig
from tandem.algo.pack import PromptTotal, count_predictions, merge_totals
from tandem.algo.price import charged_reward
from tandem.errors import NonFiniteError
from tandem.types import Group, Sample, Trajectory

STD_FLOOR = 1e-6  # added to every standard deviation that divides
MAX_CHARGED = 1e12  # a reward less its price; its square, summed over a batch, stays far inside a float
ROUNDING = 1e-12  # a deviation below this share of the largest value is the mean's rounding, and is 0

GroupedValues = Sequence[Sequence[float]]  # one row a group, one value a program that did not fail
GroupedCounts = Sequence[Sequence[int]]  # trained tokens of each
Estimator = Callable[[GroupedValues, GroupedCounts], list[list[float]]]


@dataclass(frozen=True, slots=True)
class Fates:
    """What became of trajectories, or of their sampled tokens. The fields sum to all there were.

    >>> Fates(trained=90, zero_advantage=30, failed=8).total
    128
    """

    trained: int = 0  # reached the learner
    zero_advantage: int = 0  # no gradient: advantage 0 without a KL term, or a filtered group
    masked: int = 0  # no sampled token
    failed: int = 0  # Trajectory.failure is set

    @property
    def total(self) -> int:
        return self.trained + self.zero_advantage + self.masked + self.failed


@dataclass(frozen=True, slots=True)
class Selection:
    """What a step's groups give the learner.

    >>> Selection((), (), Fates(), Fates()).samples
    ()
    """

    samples: tuple[Sample, ...]  # to train, in the groups' order
    prompts: tuple[PromptTotal, ...]  # of the whole batch, untrained zero-advantage samples included
    trajectories: Fates
    tokens: Fates


def grpo(rewards: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6), over the group.

    DeepSeekMath, arXiv 2402.03300, section 4.1.2. The paper does not say which standard deviation; this is the
    sample one (divisor G - 1), as torch.std gives it in TRL and verl.
    """
    return [_divide(_centre(group), _sample_std(group)) for group in rewards]


def dr_grpo(rewards: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """A_i = r_i - mean(r), over the group.

    Dr. GRPO, arXiv 2503.20783. Its other half, a constant in place of the sample's length, is
    `aggregation="constant_mean"`.
    """
    return [_centre(group) for group in rewards]


def rloo(rewards: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """A_i = r_i - mean of the others' rewards = G / (G - 1) (r_i - mean(r)). A lone survivor gets 0.

    RLOO, Ahmadian et al., arXiv 2402.14740.
    """
    return [[len(group) / max(len(group) - 1, 1) * value for value in _centre(group)] for group in rewards]


def reinforce_pp(rewards: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6), over all trained tokens of the batch (population std).

    REINFORCE++, arXiv 2501.03262v9, the k >= 1 variant, without its KL reward (a KL term belongs to the loss here).
    Statistics are of tokens, so a longer trajectory weighs more, as in the authors' OpenRLHF.
    """
    return _normalise_tokens(rewards, tokens)


def reinforce_pp_baseline(rewards: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """A'_i = r_i - group mean; A_i = (A'_i - mean(A')) / (std(A') + 1e-6) over all trained tokens of the batch.

    REINFORCE++ with baseline, arXiv 2501.03262v9, the k > 1 variant. The paper pairs it with a k2 KL term.
    """
    return _normalise_tokens([_centre(group) for group in rewards], tokens)


ADVANTAGES: dict[str, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
assert {*ADVANTAGES} == {*get_args(Advantage)}, f"config.Advantage names {get_args(Advantage)}, here: {[*ADVANTAGES]}"


def samples_from_groups(config: AlgoConfig, groups: Sequence[Group], price: float = 0.0) -> Selection:
    """Advantages over the trajectories that did not fail, and the samples worth running.

    Rewards are charged `price` (the multiplier of algo/price.py) for what a trajectory cost before anything else, so
    equal rewards at unequal costs are not equal.
    Failed trajectories are in no statistic and no denominator. A zero-advantage sample adds nothing to the policy
    term, so it is not run, but it counts in the denominators: the gradient is that of the whole batch. With a KL
    term it has a gradient and is run. `filter_zero_variance` takes groups whose rewards are all equal out of the
    batch, statistics and denominators included, whatever the terms.
    """
    fates: dict[str, list[Trajectory]] = {"trained": [], "zero_advantage": [], "masked": [], "failed": []}
    survivors: list[list[tuple[Trajectory, ...]]] = []  # programs, each by its segments
    rewards_by_group: list[list[float]] = []
    for group in groups:
        kept = [program for program in group.programs if program[0].failure is None]
        fates["failed"].extend(trajectory for trajectory in group.trajectories if trajectory.failure is not None)
        rewards = [charged_reward(config.price, program, price) for program in kept]
        largest = max(map(abs, rewards), default=0.0)
        if not largest <= MAX_CHARGED:  # NaN too
            raise NonFiniteError(
                f"prompt {group.prompt.id}: a reward after its price is {largest:g} in size; beyond {MAX_CHARGED:g} no "
                f"statistic holds. Its price is {price:g}: lower algo.price.rate or raise algo.price.budget."
            )
        if config.filter_zero_variance and len(set(rewards)) <= 1:
            for trajectory in itertools.chain.from_iterable(kept):
                fates["zero_advantage" if trajectory.num_sampled else "masked"].append(trajectory)
            continue
        survivors.append(kept)
        rewards_by_group.append(rewards)
    counts = [[[count_predictions(t.columns) for t in program] for program in kept] for kept in survivors]
    advantages = ADVANTAGES[config.advantage](rewards_by_group, [list(map(sum, numbers)) for numbers in counts])
    samples = []
    for kept, values in zip(survivors, advantages, strict=True):
        for program, value in zip(kept, values, strict=True):
            for trajectory in program:
                fate = _fate(config, trajectory, value)
                fates[fate].append(trajectory)
                if fate == "trained":
                    samples.append(_sample(trajectory, value))
    return Selection(
        samples=tuple(samples),
        prompts=merge_totals(
            PromptTotal(trajectory.prompt_id, count, 1)
            for kept, numbers in zip(survivors, counts, strict=True)
            for program, each in zip(kept, numbers, strict=True)
            for trajectory, count in zip(program, each, strict=True)
        ),
        trajectories=Fates(**{fate: len(members) for fate, members in fates.items()}),
        tokens=Fates(**{fate: sum(t.num_sampled for t in members) for fate, members in fates.items()}),
    )


def _fate(config: AlgoConfig, trajectory: Trajectory, advantage: float) -> str:
    if trajectory.num_sampled == 0:
        return "masked"
    return "trained" if advantage != 0.0 or config.kl != "none" else "zero_advantage"


def _sample(trajectory: Trajectory, advantage: float) -> Sample:
    columns = trajectory.columns
    credited = columns.having(advantages=np.where(columns["loss_mask"], advantage, 0.0))
    return Sample(trajectory.id, trajectory.prompt_id, credited)


def _centre(values: Sequence[float]) -> list[float]:
    """Deviations from the mean, exactly 0 where only rounding is left."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    threshold = ROUNDING * max(map(abs, values))
    return [0.0 if abs(value - mean) <= threshold else value - mean for value in values]


def _sample_std(values: Sequence[float]) -> float:
    """Square root of the sum of squared deviations over G - 1; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return math.sqrt(math.fsum(deviation * deviation for deviation in _centre(values)) / (len(values) - 1))


def _divide(deviations: Sequence[float], std: float) -> list[float]:
    return [deviation / (std + STD_FLOOR) for deviation in deviations]


def _normalise_tokens(values: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """Zero mean and unit population variance, each value weighted by its tokens."""
    total = sum(map(sum, tokens))
    if total == 0:
        return [[0.0] * len(group) for group in values]
    pairs = [
        (value, count)
        for group, counts in zip(values, tokens, strict=True)
        for value, count in zip(group, counts, strict=True)
    ]
    mean = math.fsum(value * count for value, count in pairs) / total
    std = math.sqrt(math.fsum((value - mean) ** 2 * count for value, count in pairs) / total)
    threshold = ROUNDING * max(abs(value) for value, _ in pairs)
    return [
        [0.0 if abs(value - mean) <= threshold else (value - mean) / (std + STD_FLOOR) for value in group]
        for group in values
    ]
