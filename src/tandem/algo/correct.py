"""Corrections for a behaviour policy that is not the learner's: weights and masks, a function each.

rho_n = proximal(a_n) / behaviour(a_n). The predictions of a sample are contiguous in N and `sample_tokens` counts them.
Every function takes log rho [N], fp64, finite, without gradient; where it is 0 everywhere, weights are exactly 1 and
nothing is masked. Formulas and sources: docs/algorithms.md; the looped twin: reference.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from tandem.algo.config import WEIGHT_RANGES, CorrectionConfig, CorrectionWeight

LOG_RATIO_LIMIT = (
    20.0  # beyond it a ratio with a gradient is a straight line; weights, masks and metrics take exp itself
)


class Correction(NamedTuple):
    """What multiplies each prediction's loss. The denominators stay those of all predictions."""

    weight_N: Tensor  # fp64, no gradient; 1 where nothing differs, 0 where masked
    kept_N: Tensor  # bool: False where a mask, a rejection or a behaviour log-prob that is not finite took it out
    truncated_N: Tensor  # bool: the weight was cut to its upper bound
    finite_N: Tensor  # bool: False throughout a sample with a behaviour log-prob that is not finite
    nonfinite_samples: Tensor  # int64 scalar: such samples


def sample_sum(values_N: Tensor, sample_tokens: Tensor) -> Tensor:
    """Sum over the predictions of each sample, in order of position."""
    return torch.segment_reduce(values_N, "sum", lengths=sample_tokens)


def spread(values: Tensor, sample_tokens: Tensor) -> Tensor:
    """One value a sample to one a prediction."""
    return values.repeat_interleave(sample_tokens)


def ratio(log_rho: Tensor) -> Tensor:
    """exp up to LOG_RATIO_LIMIT and its tangent beyond: finite, and its gradient is positive at any distance."""
    beyond = (log_rho - LOG_RATIO_LIMIT).relu()  # whose gradient at 0 is 0, where that of clamp(min=0) is 1
    return log_rho.clamp(max=LOG_RATIO_LIMIT).exp() + math.exp(LOG_RATIO_LIMIT) * beyond


def token_tis(log_rho_N: Tensor, sample_tokens: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(rho, high). Truncated importance sampling by token."""
    rho_N = log_rho_N.exp()
    return rho_N.clamp(max=high), rho_N > high


def sequence_tis(log_rho_N: Tensor, sample_tokens: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(product of rho over the sample, high). Unbiased without truncation; its variance grows with the length."""
    product = sample_sum(log_rho_N, sample_tokens).exp()
    return spread(product.clamp(max=high), sample_tokens), spread(product > high, sample_tokens)


def icepop(log_rho_N: Tensor, sample_tokens: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """rho where low <= rho <= high, else 0. With low 0: masked importance sampling by token."""
    rho_N = log_rho_N.exp()
    inside_N = (rho_N >= low) & (rho_N <= high)
    return torch.where(inside_N, rho_N, 0.0), torch.zeros_like(inside_N)


def sequence_mis(log_rho_N: Tensor, sample_tokens: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The product of rho over the sample where it is at most high, else 0."""
    product = sample_sum(log_rho_N, sample_tokens).exp()
    weight_N = spread(torch.where(product <= high, product, 0.0), sample_tokens)
    return weight_N, torch.zeros_like(weight_N, dtype=torch.bool)


WEIGHTS = {"token_tis": token_tis, "sequence_tis": sequence_tis, "icepop": icepop, "sequence_mis": sequence_mis}
assert {"none", *WEIGHTS} == {*WEIGHT_RANGES} == {*get_args(CorrectionWeight)}, ([*WEIGHTS], [*WEIGHT_RANGES])


def geometric(log_rho_N: Tensor, sample_tokens: Tensor, width: float) -> Tensor:
    """Keep a sample if |exp(mean log rho) - 1| <= width."""
    mean = sample_sum(log_rho_N, sample_tokens) / sample_tokens
    return spread(torch.expm1(mean).abs() <= width, sample_tokens)


def k3(log_rho_N: Tensor, sample_tokens: Tensor, limit: float) -> Tensor:
    """Keep a sample if mean(rho - 1 - log rho) <= limit, nats."""
    mean = sample_sum(torch.expm1(log_rho_N) - log_rho_N, sample_tokens) / sample_tokens
    return spread(mean <= limit, sample_tokens)


def veto(log_rho_N: Tensor, sample_tokens: Tensor, least: float) -> Tensor:
    """Drop a sample that has any rho < least."""
    below = sample_sum((log_rho_N.exp() < least).double(), sample_tokens)
    return spread(below == 0, sample_tokens)


def probability(learner_N: Tensor, behaviour_N: Tensor, limit: float) -> Tensor:
    """Keep a token if |p_learner - p_behaviour| <= limit; arguments are log-probs."""
    return (learner_N.exp() - behaviour_N.exp()).abs() <= limit


def correct(config: CorrectionConfig, proximal_N: Tensor, behaviour_N: Tensor, sample_tokens: Tensor) -> Correction:
    """The weight of each prediction. Log-probs are fp64 and detached; those of `proximal_N` are finite."""
    broken = sample_sum((~behaviour_N.isfinite()).double(), sample_tokens) > 0
    finite_N = ~spread(broken, sample_tokens)
    behaviour_N = torch.where(finite_N, behaviour_N, proximal_N)
    log_rho_N = proximal_N - behaviour_N
    kept_N = finite_N
    for name in config.reject:
        if name == "geometric":
            kept_N = kept_N & geometric(log_rho_N, sample_tokens, config.geometric_width)
        elif name == "k3":
            kept_N = kept_N & k3(log_rho_N, sample_tokens, config.k3_limit)
        elif name == "veto":
            kept_N = kept_N & veto(log_rho_N, sample_tokens, config.veto_ratio)
        else:
            kept_N = kept_N & probability(proximal_N, behaviour_N, config.probability_limit)
    weight_N = torch.ones_like(log_rho_N)
    truncated_N = torch.zeros_like(kept_N)
    if config.weight != "none":
        low, high = config.weight_range
        assert math.isfinite(high), f"{config.weight} with upper bound {high}"
        weight_N, truncated_N = WEIGHTS[config.weight](log_rho_N, sample_tokens, low, high)
        if config.weight in ("icepop", "sequence_mis"):
            kept_N = kept_N & (weight_N > 0)
    return Correction(torch.where(kept_N, weight_N, 0.0), kept_N, truncated_N & kept_N, finite_N, broken.sum())


def rare_factor(learner_N: Tensor, amount: float) -> Tensor:
    """1 - amount + amount * pi(a_n), no gradient: advantages of unlikely tokens count less.

    Advantage Reweighting, Yang et al. 2025, arXiv 2505.12929: the gradient of an unlikely token is the larger one,
    about 1 - pi, and would drown the others'.
    """
    return 1.0 - amount + amount * learner_N.detach().exp()
