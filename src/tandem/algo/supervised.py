"""Likelihood of what is written: which of it is trained, what each token counts, and the loss.

    loss = sum over trained tokens n of  weight_n * -log p_n          where weight_n >= 0
                                        |weight_n| * -log(1 - p_n)    where it is below 0: made less likely

`loss_weights` are made of the whole batch, before it is packed, and have its denominator in them. So the loss is a sum
of terms of single tokens, and its gradient is the same however they are divided among microbatches and workers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from tandem.algo.advantage import Selection
from tandem.algo.config import Reduction, SupervisedConfig
from tandem.algo.loss import LossResult, summarise
from tandem.algo.objective import Measured, Outputs, Score
from tandem.algo.pack import count_prompts
from tandem.algo.tensors import MicrobatchTensors
from tandem.errors import ConfigError
from tandem.types import Denominators, Group, Sample, Trajectory

PLAIN = SupervisedConfig()
ALL = "written"  # the prompt of all sequences: rows that they begin with, as a system message's, run once a microbatch
SURE = math.log1p(-0.01)  # log p from which -log(1 - p) goes on along its tangent: a slope of 99, and no infinity

# Of a batch's sequences, by their trained tokens and their program's: what a token of each counts.
Counts = Sequence[int]
Programs = Sequence[str]


def token_mean(tokens: Counts, programs: Programs) -> list[float]:
    """1 / tokens of the batch."""
    return [1.0 / sum(tokens)] * len(tokens)


def sequence_mean(tokens: Counts, programs: Programs) -> list[float]:
    """1 / (sequences * tokens of the sequence)."""
    return [1.0 / (len(tokens) * count) for count in tokens]


def trajectory_mean(tokens: Counts, programs: Programs) -> list[float]:
    """1 / (trajectories * tokens of the trajectory), all its sequences together: long loops count no more."""
    whole = Counter[str]()
    for program, count in zip(programs, tokens, strict=True):
        whole[program] += count
    return [1.0 / (len(whole) * whole[program]) for program in programs]


def sqrt_mean(tokens: Counts, programs: Programs) -> list[float]:
    """tokens of the sequence ^ -1/2 / sum over the batch's sequences of tokens ^ 1/2: between the first two.

    Square averaging of InternVL 2.5, arXiv 2412.05271.
    """
    total = math.fsum(math.sqrt(count) for count in tokens)
    return [1.0 / (math.sqrt(count) * total) for count in tokens]


REDUCTIONS: Mapping[str, Callable[[Counts, Programs], list[float]]] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "trajectory_mean": trajectory_mean,
    "sqrt_mean": sqrt_mean,
}
assert {*REDUCTIONS} == {*get_args(Reduction)}, f"config.Reduction names {get_args(Reduction)}, here: {[*REDUCTIONS]}"


def select(groups: Sequence[Group], config: SupervisedConfig = PLAIN) -> Selection:
    """What of written groups is trained, each with its `loss_weights`.

    A marked token (`failed`) is out of the loss, denominators included, or under `unlikelihood` in it: a trajectory of
    which nothing is left is "masked". One with a weight of 0 is in the denominators and is not run. ConfigError where a
    weight is asked for that a trajectory does not have.
    """
    samples, weights, fates = list[Sample](), list[float](), dict[str, str]()
    for trajectory in (one for group in groups for one in group.trajectories):
        columns = trajectory.columns
        failed = columns.get("failed")
        if failed is not None and not config.unlikelihood:
            columns = columns.having(loss_mask=columns["loss_mask"] & ~failed)
        fates[trajectory.id] = "masked"
        if columns["loss_mask"].any():
            fates[trajectory.id] = "trained"
            samples.append(Sample(trajectory.id, ALL, columns))
            weights.append(_weight(config, trajectory))
    tokens = [int(sample.columns["loss_mask"].sum()) for sample in samples]
    programs = [sample.id.rpartition("/")[0] for sample in samples]
    each = REDUCTIONS[config.reduction](tokens, programs) if samples else []
    weighed = []
    for sample, weight, share in zip(samples, weights, each, strict=True):
        columns, mask = sample.columns, sample.columns["loss_mask"]
        weight_T = np.where(mask, share * weight, 0.0)
        if (failed := columns.get("failed")) is not None:
            weight_T = np.where(mask & failed, -share * config.unlikelihood, weight_T)
        if not weight_T.any():
            fates[sample.id] = "zero_advantage"
            continue
        left = columns.without(*{"failed", "advantages"} & columns.arrays.keys())
        weighed.append(replace(sample, columns=left.having(loss_weights=weight_T)))
    return Selection(tuple(weighed), count_prompts(samples), fates)


def _weight(config: SupervisedConfig, trajectory: Trajectory) -> float:
    """Of a trajectory's tokens that did not fail."""
    if config.weights == "none":
        return 1.0
    if config.weights == "reward":
        if not 0.0 <= trajectory.reward < math.inf:
            raise ConfigError(
                f"supervised.weights is reward, and the reward is {trajectory.reward:g}: what counts is 0 or more. "
                "Leave such rows out with corpus.reward_at_least=0, or give rewards of 0 and more; of a run's programs "
                "supervised.weights=advantage takes any."
            )
        return trajectory.reward
    advantages = trajectory.columns.get("advantages")
    if advantages is None:
        raise ConfigError(
            "supervised.weights is advantage, and there is none: only programs of a run are compared with others of "
            "their prompt. Name run folders alone in corpus.sources; for files set supervised.weights=reward, and give "
            "their rows a reward."
        )
    advantage = float(advantages[trajectory.columns["loss_mask"]][0])
    return math.exp(min(advantage / config.beta, math.log(config.weight_max)))


def unlikely(logprobs_N: Tensor) -> Tensor:
    """-log(1 - p), and beyond SURE its tangent.

    Welleck et al., arXiv 1908.04319, equation 4, for one token that is to be avoided.
    """
    below_N = logprobs_N.clamp(max=SURE)
    value_N = -torch.log1p(-below_N.exp())
    slope = math.exp(SURE) / -math.expm1(SURE)
    return value_N + slope * (logprobs_N - below_N)


class NextToken:
    """Likelihood of the tokens in the loss mask as `select` weighs them: pre-training, and supervised fine-tuning."""

    temperature = 1.0
    updates_per_step = 1
    samples = False
    columns = frozenset({"tokens", "loss_mask", "loss_weights"})

    def begin(self) -> NextToken:
        return self

    def divisor(self, totals: Denominators) -> int:
        return 1  # it is in the weights

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        return samples

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        """sum w -log p, and of the tokens with a weight below 0 sum |w| -log(1 - p)."""
        logprobs_N, weights_N = outputs.logprobs_N.double(), batch["loss_weights"]
        avoided_N = weights_N < 0.0
        terms_N = -logprobs_N
        if bool(avoided_N.any()):
            terms_N = torch.where(avoided_N, unlikely(logprobs_N), terms_N)
        loss = (weights_N.abs() * terms_N).sum()
        sums = {
            "loss": loss.detach(),
            "tokens": torch.ones_like(weights_N).sum(),
            "nll": -logprobs_N.detach().sum(),
            "entropy": outputs.entropy_N.detach().double().sum(),
        }
        return LossResult(loss, sums, {}, None)

    def observe(self, *given: Any) -> None: ...

    def accept(self, results: Sequence[LossResult], observed: Sequence[Any]) -> bool:
        return True

    def measured(self, results: Sequence[LossResult]) -> Measured:
        return Measured(summarise(results))
