"""The batch's loss, slow and obvious: loops over prompts, samples and tokens, no packing, no denominators.

Every sample of the batch takes part, those with zero advantage included, and each aggregation
is the mean that its name says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.algo.config import AlgoConfig, CorrectionConfig, SupervisedConfig
from tandem.types import Sample, Trajectory


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
    positions = sample.columns["loss_mask"].nonzero()[0].tolist()
    behaviour, advantages = sample.columns["logprobs"].tolist(), sample.columns["advantages"].tolist()
    reference = sample.columns.get("reference_logprobs")
    weights = reference_weights(config.correction, *_rho_pairs(sample, learner))
    selection = sample.columns.get("selection_weights")
    if selection is not None:
        weights = [weight * float(selection[p]) for weight, p in zip(weights, positions, strict=True)]
    broken = not all(math.isfinite(behaviour[p]) for p in positions)
    old = [behaviour[p] for p in positions]
    if config.correction.form == "decoupled":
        old, _ = _rho_pairs(sample, learner)
    if broken:  # every weight is 0: anything finite serves
        old = [float(learner[p].detach()) for p in positions]
    log_ratios = [learner[p] - before for p, before in zip(positions, old, strict=True)]
    sequence_ratio = _ratio(_mean(log_ratios))
    losses = []
    for position, log_ratio, weight in zip(positions, log_ratios, weights, strict=True):
        advantage = advantages[position]
        if config.rare_weight:
            advantage *= 1.0 - config.rare_weight + config.rare_weight * math.exp(float(learner[position].detach()))
        loss = _policy(config, log_ratio, sequence_ratio, advantage, learner[position])
        if config.kl != "none":
            assert reference is not None
            loss = loss + config.kl_weight * _kl(config.kl, learner[position], float(reference[position]))
        losses.append(weight * loss)
    return losses


def _rho_pairs(sample: Sample, learner: Tensor) -> tuple[list[float], list[float]]:
    """Proximal and behaviour log-probs of the trained tokens."""
    positions = sample.columns["loss_mask"].nonzero()[0]
    scored = sample.columns.get("proximal_logprobs")
    proximal = learner.detach().numpy() if scored is None else scored
    return proximal[positions].tolist(), sample.columns["logprobs"][positions].tolist()


def reference_weights(config: CorrectionConfig, proximal: Sequence[float], behaviour: Sequence[float]) -> list[float]:
    """The correction's weight of each token of one sample; 0 where it is masked."""
    if not all(math.isfinite(value) for value in behaviour):
        return [0.0] * len(behaviour)
    gaps = [new - old for new, old in zip(proximal, behaviour, strict=True)]
    rhos = [_exp(gap) for gap in gaps]
    low, high = config.weight_range
    product = _exp(math.fsum(gaps))
    by_weight = {
        "none": [1.0 for _ in rhos],
        "token_tis": [min(rho, high) for rho in rhos],
        "sequence_tis": [min(product, high) for _ in rhos],
        "icepop": [rho if low <= rho <= high else 0.0 for rho in rhos],
        "sequence_mis": [product if product <= high else 0.0 for _ in rhos],
    }
    weights = by_weight[config.weight]
    geometric_mean = _exp(math.fsum(gaps) / len(rhos))
    k3 = math.fsum(rho - 1.0 - gap for rho, gap in zip(rhos, gaps, strict=True)) / len(rhos)
    dropped = {
        "geometric": abs(geometric_mean - 1.0) > config.geometric_width,
        "k3": k3 > config.k3_limit,
        "veto": min(rhos) < config.veto_ratio,
    }
    if any(dropped.get(name, False) for name in config.reject):
        return [0.0] * len(rhos)
    if "probability" in config.reject:
        for index, (new, old) in enumerate(zip(proximal, behaviour, strict=True)):
            if abs(math.exp(new) - math.exp(old)) > config.probability_limit:
                weights[index] = 0.0
    return weights


def _exp(exponent: float) -> float:
    return math.exp(exponent) if exponent < 700.0 else math.inf


def _ratio(log_ratio: Tensor) -> Tensor:
    """exp, and from 20 on the straight line that touches it there."""
    if float(log_ratio.detach()) > 20.0:
        return math.exp(20.0) * (1.0 + log_ratio - 20.0)
    return torch.exp(log_ratio)


def _policy(config: AlgoConfig, log_ratio: Tensor, sequence_ratio: Tensor, advantage: float, learner: Tensor) -> Tensor:
    low, high = config.clip_range
    if config.loss == "cispo":
        weight = min(max(_exp(float(log_ratio.detach())), 1.0 - low), 1.0 + high)
        return -weight * advantage * learner
    ratio = _ratio(log_ratio) if config.loss == "ppo" else sequence_ratio
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
    return _ratio(reference - learner) - 1.0 - (reference - learner)


def reference_likelihood(
    config: SupervisedConfig, trajectories: Sequence[Trajectory], logprobs: Sequence[Tensor]
) -> Tensor:
    """The loss of written trajectories, each with its own log-probs, one a token: the mean that the reduction names."""
    sequences: list[tuple[str, list[Tensor]]] = []
    for trajectory, learner in zip(trajectories, logprobs, strict=True):
        terms = _likelihoods(config, trajectory, learner)
        if terms:
            sequences.append((trajectory.program_id, terms))
    if config.reduction == "token_mean":
        return _mean([term for _, terms in sequences for term in terms])
    if config.reduction == "sequence_mean":
        return _mean([_mean(terms) for _, terms in sequences])
    if config.reduction == "sqrt_mean":
        roots = [math.sqrt(len(terms)) for _, terms in sequences]
        weighed = [root * _mean(terms) for root, (_, terms) in zip(roots, sequences, strict=True)]
        return sum(weighed, torch.zeros((), dtype=torch.float64)) / sum(roots)
    programs: dict[str, list[Tensor]] = {}
    for program, terms in sequences:
        programs.setdefault(program, []).extend(terms)
    return _mean([_mean(terms) for terms in programs.values()])


def _likelihoods(config: SupervisedConfig, trajectory: Trajectory, learner: Tensor) -> list[Tensor]:
    """Of each token that is in the loss, times its weight."""
    columns, terms = trajectory.columns, []
    failed = columns.get("failed")
    for position in columns["loss_mask"].nonzero()[0].tolist():
        if failed is not None and failed[position]:
            if config.unlikelihood:
                terms.append(-config.unlikelihood * torch.log(1.0 - torch.exp(learner[position])))
            continue
        weight = 1.0
        if config.weights == "reward":
            weight = trajectory.reward
        if config.weights == "advantage":
            weight = min(math.exp(float(columns["advantages"][position]) / config.beta), config.weight_max)
        terms.append(-weight * learner[position])
    return terms
