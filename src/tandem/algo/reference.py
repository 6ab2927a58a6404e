"""The batch's loss, slow and obvious: loops over prompts, samples and tokens, no packing, no denominators.

Used by tests only. Every sample of the batch takes part, those with zero advantage included, and each aggregation
is the mean that its name says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.algo.config import AlgoConfig
from tandem.types import Sample


def reference_loss(config: AlgoConfig, samples: Sequence[Sample], logprobs: Sequence[Tensor]) -> Tensor:
    """`logprobs[i]` is fp64 with one entry a token of `samples[i]`; entries off the loss mask are not read."""
    by_prompt: dict[str, list[list[Tensor]]] = {}
    for sample, learner in zip(samples, logprobs, strict=True):
        by_prompt.setdefault(sample.prompt_id, []).append(_token_losses(config, sample, learner))
    sequences = [tokens for group in by_prompt.values() for tokens in group]
    if config.aggregation == "token_mean":
        return _mean([token for tokens in sequences for token in tokens])
    if config.aggregation == "sequence_mean":
        return _mean([_mean(tokens) for tokens in sequences])
    if config.aggregation == "prompt_mean":
        return _mean([_mean([token for tokens in group for token in tokens]) for group in by_prompt.values()])
    assert config.constant_tokens is not None
    return _mean([sum(tokens, torch.zeros(())) / config.constant_tokens for tokens in sequences])


def _mean(values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for value in values:
        total = total + value
    return total / len(values)


def _token_losses(config: AlgoConfig, sample: Sample, learner: Tensor) -> list[Tensor]:
    positions = [position for position, mask in enumerate(sample.loss_mask) if mask]
    log_ratios = [learner[p] - sample.logprobs[p] for p in positions]
    sequence_ratio = torch.exp(_mean(log_ratios))
    losses = []
    for position, log_ratio in zip(positions, log_ratios, strict=True):
        loss = _policy(config, log_ratio, sequence_ratio, sample.advantages[position], learner[position])
        if config.kl != "none":
            assert sample.reference_logprobs is not None
            loss = loss + config.kl_weight * _kl(config.kl, learner[position], sample.reference_logprobs[position])
        losses.append(sample.weights[position] * loss)
    return losses


def _policy(config: AlgoConfig, log_ratio: Tensor, sequence_ratio: Tensor, advantage: float, learner: Tensor) -> Tensor:
    low, high = config.clip_range
    if config.loss == "cispo":
        weight = min(max(math.exp(float(log_ratio.detach())), 1.0 - low), 1.0 + high)
        return -weight * advantage * learner
    ratio = torch.exp(log_ratio) if config.loss == "ppo" else sequence_ratio
    value = float(ratio.detach())
    if advantage > 0.0 and value > 1.0 + high:
        return torch.tensor(-(1.0 + high) * advantage, dtype=torch.float64)
    if advantage < 0.0 and value < 1.0 - low:
        return torch.tensor(-(1.0 - low) * advantage, dtype=torch.float64)
    return -ratio * advantage


def _kl(name: str, learner: Tensor, reference: float) -> Tensor:
    if name == "k1":
        score = float(learner.detach()) - reference
        return score + score * (learner - learner.detach())
    if name == "k2":
        return (learner - reference) ** 2 / 2.0
    return torch.exp(reference - learner) - 1.0 - (reference - learner)
