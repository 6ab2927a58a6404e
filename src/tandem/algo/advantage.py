"""Groups to samples: rewards become advantages, and what carries no gradient is left out and counted.

A group's statistics count its programs, however many segments they have. Which of a program's tokens get what of its
advantage says credit.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import numpy as np

from tandem.algo.config import Advantage, AlgoConfig
from tandem.algo.credit import (
    CREDITS,
    OF_TURNS,
    ROUNDING,
    STD_FLOOR,
    Batch,
    Estimator,
    GroupedCounts,
    GroupedValues,
    Turns,
    at_tokens,
    with_rewards,
)
from tandem.algo.pack import PromptTotal, count_predictions, merge_totals
from tandem.algo.price import charged_reward
from tandem.columns import Columns
from tandem.errors import NonFiniteError
from tandem.types import Group, Sample, StopReason, Trajectory

MAX_CHARGED = 1e12  # a reward less its price; its square, summed over a batch, stays far inside a float


FATES = {
    "trained": "reached the learner",
    "zero_advantage": "no gradient: its advantage is 0, and there is no KL term",
    "decided": "no gradient: its group was stopped, since the rest would hardly have differed (select.first_samples)",
    "filtered": "its group left the batch: all rewards were equal (algo.filter_zero_variance)",
    "truncated": "cut at rollout.max_new_tokens, and left out (algo.filter_truncated)",
    "masked": "no sampled token",
    "failed": "Trajectory.failure is set",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """What a step's groups give the learner.

    >>> Selection(()).count("trained")
    0
    """

    samples: tuple[Sample, ...]  # to train, in the groups' order
    prompts: tuple[PromptTotal, ...] = ()  # of the whole batch, untrained zero-advantage samples included
    fates: Mapping[str, str] = field(default_factory=dict)  # of each trajectory by its id: what became of it, FATES

    def count(self, fate: str) -> int:
        """Trajectories that met it."""
        return sum(met == fate for met in self.fates.values())


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


def best(rewards: GroupedValues, tokens: GroupedCounts) -> list[list[float]]:
    """A_i = 1 for the best of the group, equals included, 0 for the others and where all are equal.

    Rejection sampling: the policy is fitted to what is kept of n. RAFT, Dong et al., arXiv 2304.06767; with rewards of
    0 and 1 what RAFT++ keeps of mixed groups, Xiong et al., arXiv 2504.11343.
    """
    return [[float(value == max(group) > min(group)) for value in group] for group in rewards]


ADVANTAGES: dict[str, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "best": best,
}
LEARNED = {"gae"}  # by a critic, after it has scored the batch: credit.with_gae
assert {*ADVANTAGES} | LEARNED == {*get_args(Advantage)}, f"config.Advantage names {get_args(Advantage)}"


def has_spread(config: AlgoConfig, group: Group, price: float) -> bool:
    """Whether its programs that did not fail earned different rewards, what they cost taken off."""
    return len({charged_reward(config.price, p, price) for p in group.programs if p[0].failure is None}) > 1


def samples_from_groups(config: AlgoConfig, groups: Sequence[Group], price: float = 0.0) -> Selection:
    """Advantages over the trajectories that did not fail, and the samples worth running.

    Rewards are charged `price` (the multiplier of algo/price.py) for what a trajectory cost before anything else, so
    equal rewards at unequal costs are not equal.
    Failed trajectories are in no statistic and no denominator. A zero-advantage sample adds nothing to the policy
    term, so it is not run, but it counts in the denominators: the gradient is that of the whole batch. With a KL
    term it has a gradient and is run. `filter_zero_variance` takes groups whose rewards are all equal out of the
    batch, statistics and denominators included, whatever the terms; `filter_truncated` takes programs out of the
    denominators alone. Where a critic gives the advantages (`gae`) all are run, with what their turns earned.
    """
    fates: dict[str, str] = {}
    survivors: list[list[tuple[Trajectory, ...]]] = []  # programs, each by its segments
    stopped: set[str] = set()  # trajectories of groups that were
    rewards_by_group: list[list[float]] = []
    for group in groups:
        kept = [program for program in group.programs if program[0].failure is None]
        fates |= {trajectory.id: "failed" for trajectory in group.trajectories if trajectory.failure is not None}
        rewards = [charged_reward(config.price, program, price) for program in kept]
        largest = max(map(abs, rewards), default=0.0)
        if not largest <= MAX_CHARGED:  # NaN too
            raise NonFiniteError(
                f"prompt {group.prompt.id}: a reward after its price is {largest:g} in size; beyond {MAX_CHARGED:g} no "
                f"statistic holds. Its price is {price:g}: lower algo.price.rate or raise algo.price.budget."
            )
        if group.stopped:
            stopped |= {trajectory.id for trajectory in group.trajectories}
        if config.filter_zero_variance and len(set(rewards)) <= 1:
            left = "decided" if group.stopped else "filtered"
            fates |= {t.id: left if t.num_sampled else "masked" for t in itertools.chain.from_iterable(kept)}
            continue
        survivors.append(kept)
        rewards_by_group.append(rewards)
    credited = _credited(config, survivors, rewards_by_group)
    samples, totals = list[Sample](), list[PromptTotal]()
    for program, columns in zip(itertools.chain.from_iterable(survivors), credited, strict=True):
        cut = config.filter_truncated and program[-1].stop_reason is StopReason.LENGTH
        for trajectory, known in zip(program, columns, strict=True):
            fate = _fate(config, trajectory, known, cut)
            fates[trajectory.id] = fate = "decided" if fate == "zero_advantage" and trajectory.id in stopped else fate
            if fate == "trained":
                samples.append(Sample(trajectory.id, trajectory.prompt_id, known))
            if fate != "truncated":
                totals.append(PromptTotal(trajectory.prompt_id, count_predictions(known), 1))
    return Selection(tuple(samples), merge_totals(totals), fates)


def weighed(batch: Selection, weight: Callable[[str], float]) -> Selection:
    """The batch with each sample's terms of the loss times the weight of its prompt id. Denominators stay."""
    samples = []
    for sample in batch.samples:
        before, own = sample.columns.get("selection_weights"), np.full(len(sample.columns), weight(sample.prompt_id))
        columns = sample.columns.having(selection_weights=own if before is None else own * before)
        samples.append(dataclasses.replace(sample, columns=columns))
    return dataclasses.replace(batch, samples=tuple(samples))


def _credited(
    config: AlgoConfig, survivors: Sequence[Sequence[tuple[Trajectory, ...]]], rewards: GroupedValues
) -> Iterable[list[Columns]]:
    """Columns of each program's segments, with advantages, or with rewards for the critic to make them of."""
    counts = [[sum(count_predictions(t.columns) for t in program) for program in kept] for kept in survivors]
    turned = [
        [Turns.of(program, reward) for program, reward in zip(kept, values, strict=True)]
        for kept, values in zip(survivors, rewards, strict=True)
    ]
    programs = zip(itertools.chain.from_iterable(survivors), itertools.chain.from_iterable(turned), strict=True)
    if config.needs_critic:
        return [[with_rewards(t.columns, turns) for t in program] for program, turns in programs]
    batch = Batch(ADVANTAGES[config.advantage], rewards, counts, turned)
    advantages = itertools.chain.from_iterable(CREDITS[config.credit](config, batch))
    return [
        [
            t.columns.without(*OF_TURNS).having(
                advantages=at_tokens(t.columns, dict(zip(turns.numbers, values, strict=True)))
            )
            for t in program
        ]
        for (program, turns), values in zip(programs, advantages, strict=True)
    ]


def _fate(config: AlgoConfig, trajectory: Trajectory, columns: Columns, cut: bool) -> str:
    if trajectory.num_sampled == 0:
        return "masked"
    if cut:
        return "truncated"
    moved = config.needs_critic or config.kl != "none" or columns["advantages"].any()
    return "trained" if moved else "zero_advantage"


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
