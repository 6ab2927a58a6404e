"""Which of a program's turns earned its reward: credit by trajectory, by turn, by state, or by a critic.

A turn's reward is what its environment gave for it (the column step_rewards); what the program's charged reward has
beyond their sum falls to its last turn, so that the rewards of all turns add up to the program's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from tandem.algo.config import AlgoConfig, Credit
from tandem.columns import Array, Columns
from tandem.types import Sample, Trajectory

STD_FLOOR = 1e-6  # added to every standard deviation that divides
ROUNDING = 1e-12  # a deviation below this share of the largest value is the mean's rounding, and is 0

GroupedValues = Sequence[Sequence[float]]  # one row a group, one value a program that did not fail
GroupedCounts = Sequence[Sequence[int]]  # trained tokens of each
Estimator = Callable[[GroupedValues, GroupedCounts], list[list[float]]]

OF_TURNS = ("turns", "step_rewards", "states")  # columns that only credit reads


@dataclass(frozen=True, slots=True)
class Turns:
    """The turns of a program that sampled a token, in order.

    >>> Turns((0, 1), (0.5, 1.0), ("", ""), (3, 2)).returns(0.5)
    [1.0, 1.0]
    """

    numbers: tuple[int, ...]  # of each within its program
    rewards: tuple[float, ...]  # add up to the program's
    states: tuple[str, ...]  # that each was taken in; "" is not known
    tokens: tuple[int, ...]  # sampled

    @classmethod
    def of(cls, program: Sequence[Trajectory], reward: float) -> Turns:
        """Of a program's segments; `reward` is all that it is paid."""
        parts = [sampled_turns(segment.columns) for segment in program]
        numbers, tokens = (np.concatenate([part[k] for part in parts]) for k in (0, 1))
        earned, states = list[float](), list[str]()
        for segment, (_, counts) in zip(program, parts, strict=True):
            last = np.flatnonzero(segment.columns["loss_mask"])[counts.cumsum() - 1]
            given, known = segment.columns.get("step_rewards"), segment.columns.get("states")
            earned += [0.0] * len(last) if given is None else given[last].tolist()
            states += [""] * len(last) if known is None else known[last].tolist()
        if earned and any(earned):
            earned[-1] += reward - math.fsum(earned)
        elif earned:
            earned[-1] = reward
        return cls(tuple(numbers.tolist()), tuple(earned), tuple(states), tuple(tokens.tolist()))

    def returns(self, discount: float) -> list[float]:
        """G_t = r_t + discount G_(t+1)."""
        following, found = 0.0, list[float]()
        for reward in reversed(self.rewards):
            following = reward + discount * following
            found.append(following)
        return found[::-1]


Turned = Sequence[Sequence[Turns]]  # a group's programs, for each group
ByTurn = list[list[list[float]]]  # group, program, turn


def sampled_turns(columns: Columns) -> tuple[Array, Array]:
    """Numbers of the turns that sampled a token of a segment, in order, and how many tokens each."""
    sampled, turns = columns["loss_mask"], columns.get("turns")
    if turns is not None:
        return np.unique(turns[sampled], return_counts=True)
    count = int(np.count_nonzero(sampled))
    return np.zeros(min(count, 1), np.int32), np.full(min(count, 1), count)


@dataclass(frozen=True, slots=True)
class Batch:
    """What credit is given by: the estimator (advantage.py), and the programs of each group that did not fail."""

    estimate: Estimator
    rewards: GroupedValues
    counts: GroupedCounts
    turned: Turned


def by_trajectory(config: AlgoConfig, batch: Batch) -> ByTurn:
    """All of a program's turns have the advantage of its whole reward."""
    advantages = batch.estimate(batch.rewards, batch.counts)
    return [
        [[value] * len(turns.rewards) for value, turns in zip(values, programs, strict=True)]
        for values, programs in zip(advantages, batch.turned, strict=True)
    ]


def by_step(config: AlgoConfig, batch: Batch) -> ByTurn:
    """The estimator over G_t = sum_k discount^k r_(t+k) of the turns t of a group's programs, turn number by number.

    Returns to go in place of outcomes, as "process supervision" of DeepSeekMath, arXiv 2402.03300, section 4.1.3, has
    them; statistics by turn number, since what is still to come differs from turn to turn.
    """
    return _compared(config, batch, lambda turns: turns.numbers)


def gigpo(config: AlgoConfig, batch: Batch) -> ByTurn:
    """A(t) = A_E + step_weight A_S(t): the estimator over whole rewards, and over the discounted returns of all turns
    of a group that were taken in one state (0 where the state is not known, or seen once).

    GiGPO, Feng et al., arXiv 2505.10978, equations 3 to 8; F_norm is the estimator's: grpo's deviation, dr_grpo's 1.
    """
    whole = by_trajectory(config, batch)
    step = _compared(config, batch, lambda turns: turns.states)
    return [
        [
            [of_program + config.step_weight * of_turn for of_program, of_turn in zip(*pair, strict=True)]
            for pair in zip(*of_group, strict=True)
        ]
        for of_group in zip(whole, step, strict=True)
    ]


def _compared(config: AlgoConfig, batch: Batch, key: Callable[[Turns], Sequence[int | str]]) -> ByTurn:
    """The estimator over the returns of the turns of a group that have the same key."""
    turned = batch.turned
    rows: dict[tuple[int, int | str], list[tuple[int, int]]] = {}  # group and key -> program and place of each turn
    returns = [[turns.returns(config.discount) for turns in programs] for programs in turned]
    for g, programs in enumerate(turned):
        for i, turns in enumerate(programs):
            for t, name in enumerate(key(turns)):
                if name == "":
                    continue
                rows.setdefault((g, name), []).append((i, t))
    values = [[returns[g][i][t] for i, t in members] for (g, _), members in rows.items()]
    counts = [[turned[g][i].tokens[t] for i, t in members] for (g, _), members in rows.items()]
    found: ByTurn = [[[0.0] * len(turns.rewards) for turns in programs] for programs in turned]
    for ((g, _), members), advantages in zip(rows.items(), batch.estimate(values, counts), strict=True):
        for (i, t), advantage in zip(members, advantages, strict=True):
            found[g][i][t] = advantage
    return found


CREDITS: Mapping[str, Callable[[AlgoConfig, Batch], ByTurn]] = {
    "trajectory": by_trajectory,
    "step": by_step,
    "gigpo": gigpo,
}
assert {*CREDITS} == {*get_args(Credit)}, f"config.Credit names {get_args(Credit)}, here: {[*CREDITS]}"


def at_tokens(columns: Columns, advantages: Mapping[int, float]) -> Array:
    """[T] the advantage of the turn that sampled each token, 0.0 where none did."""
    numbers, counts = sampled_turns(columns)
    values = np.zeros(len(columns))
    values[columns["loss_mask"]] = np.repeat([advantages[number] for number in numbers.tolist()], counts)
    return values


def with_rewards(columns: Columns, turns: Turns) -> Columns:
    """A segment's columns with what each of its turns earned at the turn's last token, for `with_gae`."""
    numbers, counts = sampled_turns(columns)
    earned, rewards = dict(zip(turns.numbers, turns.rewards, strict=True)), np.zeros(len(columns))
    rewards[np.flatnonzero(columns["loss_mask"])[counts.cumsum() - 1]] = [earned[n] for n in numbers.tolist()]
    return columns.having(step_rewards=rewards)


def gae(rewards: Sequence[float], values: Sequence[float], discount: float, decay: float) -> list[float]:
    """A_t = delta_t + discount decay A_(t+1), delta_t = r_t + discount V_(t+1) - V_t, and V = A = 0 behind the last.

    Generalised advantage estimation, Schulman et al., arXiv 1506.02438, equation 16.

    >>> gae([0.0, 1.0], [0.5, 0.5], discount=1.0, decay=0.5)
    [0.25, 0.5]
    """
    found, advantage, following = list[float](), 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + discount * following - value + discount * decay * advantage
        following = value
        found.append(advantage)
    return found[::-1]


def with_gae(config: AlgoConfig, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Samples that have "values" and "step_rewards" with "returns" and "advantages", each program over its segments.

    A step is a token, or with `gae_step` "turn" a turn, whose state is that before its first token. returns = A + V;
    advantages are then normalised over all trained tokens (zero mean, unit population deviation), as PPO's are.
    """
    programs: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        programs.setdefault(sample.id.rpartition("/")[0], []).append(index)
    found: list[tuple[Array, Array]] = [(np.zeros(0), np.zeros(0))] * len(samples)  # advantages, returns of trained
    for members in programs.values():
        members.sort(key=lambda index: int(samples[index].id.rpartition("/")[2]))
        lengths = [int(samples[index].columns["loss_mask"].sum()) for index in members]
        advantages, returns = _of_program(config, [samples[index].columns for index in members])
        for index, *parts in zip(
            members, *(np.split(x, np.cumsum(lengths)[:-1]) for x in (advantages, returns)), strict=True
        ):
            found[index] = parts[0], parts[1]
    if not samples:
        return ()
    normal = _normal(np.concatenate([advantages for advantages, _ in found]))
    credited = []
    for sample, (advantages, returns) in zip(samples, found, strict=True):
        mask = sample.columns["loss_mask"]
        columns = sample.columns.without(*OF_TURNS)
        for name, values in (("advantages", normal(advantages)), ("returns", returns)):
            whole = np.zeros(len(mask))
            whole[mask] = values
            columns = columns.having(**{name: whole})
        credited.append(Sample(sample.id, sample.prompt_id, columns))
    return tuple(credited)


def _of_program(config: AlgoConfig, segments: Sequence[Columns]) -> tuple[Array, Array]:
    """Advantages and returns of its trained tokens, one segment after another."""
    rewards, values = (
        np.concatenate([columns[name][columns["loss_mask"]] for columns in segments])
        for name in ("step_rewards", "values")
    )
    if config.gae_step == "token":
        advantages = np.array(gae(rewards.tolist(), values.tolist(), config.discount, config.gae_lambda))
        return advantages, advantages + values
    counts = np.concatenate([sampled_turns(columns)[1] for columns in segments])
    first = counts.cumsum() - counts
    earned, known = np.add.reduceat(rewards, first), values[first]
    advantages = np.array(gae(earned.tolist(), known.tolist(), config.discount, config.gae_lambda))
    return np.repeat(advantages, counts), np.repeat(advantages + known, counts)


def _normal(advantages: Array) -> Callable[[Array], Array]:
    """To zero mean and unit deviation, both taken of all of them."""
    mean = math.fsum(advantages) / len(advantages)
    std = math.sqrt(math.fsum((advantages - mean) ** 2) / len(advantages))
    threshold = ROUNDING * float(np.abs(advantages).max())
    return lambda part: np.where(np.abs(part - mean) <= threshold, 0.0, (part - mean) / (std + STD_FLOOR))
