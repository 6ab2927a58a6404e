"""Preference losses, slow and obvious: plain torch in fp64, a loop over pairs or ratings, no packing, no sums that are
shared, each formula written as its paper has it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.algo.config import PreferenceConfig


def pair_loss(
    config: PreferenceConfig,
    policy: tuple[Sequence[Tensor], Sequence[Tensor]],
    reference: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """Of one pair: log-probs of the trained tokens of the chosen and of the rejected answer."""
    supervised = -torch.stack(list(policy[0])).mean()
    return _compared(config, policy, reference) + config.sft_weight * supervised


def _compared(
    config: PreferenceConfig,
    policy: tuple[Sequence[Tensor], Sequence[Tensor]],
    reference: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    beta, epsilon = config.scale, config.label_smoothing
    total_w, total_l = (sum(logprobs, torch.zeros((), dtype=torch.float64)) for logprobs in policy)
    len_w, len_l = len(policy[0]), len(policy[1])
    if config.loss == "simpo":
        return -log_sigmoid(beta / len_w * total_w - beta / len_l * total_l - config.gamma)
    if config.loss == "orpo":
        p_w, p_l = torch.exp(total_w / len_w), torch.exp(total_l / len_l)
        odds_ratio = (p_w / (1.0 - p_w)) / (p_l / (1.0 - p_l))
        return -torch.log(p_w) - beta * log_sigmoid(torch.log(odds_ratio))
    h_w, h_l = total_w - math.fsum(reference[0]), total_l - math.fsum(reference[1])
    if config.length_normalised:
        h_w, h_l = h_w / len_w, h_l / len_l
    if config.loss == "ipo":
        return (h_w - h_l - 1.0 / (2.0 * beta)) ** 2
    right, wrong = -log_sigmoid(beta * (h_w - h_l)), -log_sigmoid(-beta * (h_w - h_l))
    if config.loss == "dpo":
        return (1.0 - epsilon) * right + epsilon * wrong
    assert config.loss == "robust_dpo", config.loss
    return ((1.0 - epsilon) * right - epsilon * wrong) / (1.0 - 2.0 * epsilon)


def rating_loss(
    config: PreferenceConfig, policy: Sequence[Tensor], reference: Sequence[float], liked: bool, kl: float
) -> Tensor:
    """Of one rating under KTO."""
    h = sum(policy, torch.zeros((), dtype=torch.float64)) - math.fsum(reference)
    if liked:
        return config.desirable_weight * (1.0 - torch.sigmoid(config.scale * (h - kl)))
    return config.undesirable_weight * (1.0 - torch.sigmoid(config.scale * (kl - h)))


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(1.0 / (1.0 + torch.exp(-x)))
