"""Policy losses of a microbatch. The losses of a batch's microbatches add up to the batch's loss.

    loss = sum over predictions n of  coefficient_n * weight_n * (policy_n + kl_weight * kl_n)

`coefficient_n` is the aggregation's, from the batch's global denominators. `weight_n` (Sample.weights, no gradient)
turns an expectation under the behaviour policy into one under the learner, so it multiplies both terms. The ratio is
learner over behaviour: pi_theta(a_n) / pi_behaviour(a_n). Everything is fp64, so the split into microbatches meets
rounding only where the gradient is cast back to the log-probs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.algo.config import Aggregation, AlgoConfig
from tandem.algo.tensors import MicrobatchTensors

LOG_RATIO_LIMIT = 20.0  # |log ratio| is clamped here before exp in the losses, never in the metrics


class Terms(NamedTuple):
    """What a policy loss gives for each prediction."""

    loss_N: Tensor  # before weight and aggregation
    clipped_N: Tensor  # bool: where clipping changed the gradient or the weight


class LossResult(NamedTuple):
    """One microbatch's share of the batch."""

    loss: Tensor  # scalar, differentiable; sums over microbatches to the batch's loss
    sums: dict[str, Tensor]  # detached scalars that add over microbatches; "tokens" counts the predictions
    maxima: dict[str, Tensor]  # detached scalars whose maximum over microbatches is the batch's


def ppo(logprobs_N: Tensor, batch: MicrobatchTensors, low: float, high: float) -> Terms:
    """loss_n = -min(r_n A_n, clip(r_n, 1 - low, 1 + high) A_n).

    PPO, arXiv 1707.06347, equation 7; low != high is DAPO's clip-higher, arXiv 2503.14476, section 3.1.
    """
    ratio_N = (logprobs_N - batch.logprobs_N).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    return _clipped_surrogate(ratio_N, batch.advantages_N, low, high)


def gspo(logprobs_N: Tensor, batch: MicrobatchTensors, low: float, high: float) -> Terms:
    """loss_n = -min(s_n A_n, clip(s_n, 1 - low, 1 + high) A_n), s_n = sg(s_i) r_n / sg(r_n),
    s_i = exp(mean over the sample's predictions of log r).

    The GSPO-token form of GSPO, arXiv 2507.18071. With one advantage a sample and `sequence_mean`, value and
    gradient are those of GSPO itself (equation 5).
    """
    log_ratio_N = logprobs_N - batch.logprobs_N
    sums = torch.segment_reduce(log_ratio_N.detach(), "sum", lengths=batch.sample_tokens)
    mean = (sums / batch.sample_tokens).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_N = mean.exp()[batch.sample_N] * (logprobs_N - logprobs_N.detach()).exp()
    return _clipped_surrogate(ratio_N, batch.advantages_N, low, high)


def cispo(logprobs_N: Tensor, batch: MicrobatchTensors, low: float, high: float) -> Terms:
    """loss_n = -sg(clip(r_n, 1 - low, 1 + high)) A_n log pi_theta(a_n).

    CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5: every token keeps a gradient.
    """
    ratio_N = (logprobs_N - batch.logprobs_N).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    weight_N = ratio_N.clamp(1.0 - low, 1.0 + high)
    return Terms(-weight_N * batch.advantages_N * logprobs_N, weight_N != ratio_N)


LOSSES: dict[str, Callable[[Tensor, MicrobatchTensors, float, float], Terms]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}


def _clipped_surrogate(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Terms:
    free_N = ratio_N * advantages_N
    bound_N = ratio_N.clamp(1.0 - low, 1.0 + high) * advantages_N
    return Terms(-torch.minimum(free_N, bound_N), (bound_N < free_N).detach())


def k1(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """log pi - log ref, with the gradient (log pi - log ref) grad log pi.

    The value is Schulman's k1 (joschu.net/blog/kl-approx.html). Its own gradient, grad log pi, has expectation zero
    under pi: as a loss it would do nothing. The one given here is the score-function gradient of the KL, that of k2
    (verl's "k1+").
    """
    difference_N = logprobs_N - reference_N
    return difference_N.detach() + k2(logprobs_N, reference_N) - k2(logprobs_N, reference_N).detach()


def k2(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2. Schulman's k2: a biased value with the KL's own gradient under pi."""
    return 0.5 * (logprobs_N - reference_N).square()


def k3(logprobs_N: Tensor, reference_N: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi). Schulman's k3, the KL term of DeepSeekMath, arXiv 2402.03300, equation 4.

    The value is unbiased and never negative; the gradient, (1 - ref / pi) grad log pi, is in expectation that of
    KL(ref || pi).
    """
    difference_N = reference_N - logprobs_N
    return difference_N.clamp(max=LOG_RATIO_LIMIT).exp() - 1.0 - difference_N


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def coefficients(aggregation: Aggregation, batch: MicrobatchTensors, constant_tokens: int | None = None) -> Tensor:
    """(N,) weight of each prediction in the batch's loss, with B, P: samples and prompts of the whole batch.

    token_mean      1 / tokens of the batch                      DAPO, arXiv 2503.14476, section 3.3
    sequence_mean   1 / (B * tokens of the sample)               GRPO, arXiv 2402.03300, equation 3
    prompt_mean     1 / (P * tokens of the prompt's samples)     ScaleRL, arXiv 2510.13786
    constant_mean   1 / (B * constant_tokens)                    Dr. GRPO, arXiv 2503.20783
    """
    totals = batch.denominators
    if aggregation == "token_mean":
        per_sample = torch.full_like(batch.sample_tokens, totals.tokens)
    elif aggregation == "sequence_mean":
        per_sample = totals.samples * batch.sample_tokens
    elif aggregation == "prompt_mean":
        per_sample = totals.prompts * batch.prompt_tokens
    else:
        assert constant_tokens, f"{aggregation} with constant_tokens {constant_tokens}"
        per_sample = torch.full_like(batch.sample_tokens, totals.samples * constant_tokens)
    return per_sample.double().reciprocal()[batch.sample_N]


def policy_loss(
    config: AlgoConfig, logprobs_N: Tensor, batch: MicrobatchTensors, entropy_N: Tensor | None = None
) -> LossResult:
    """A microbatch's share of the batch's loss, and its metrics.

    `logprobs_N` are the learner's, nats, floating, any device that `batch` is on; `entropy_N` is measured, not trained.
    """
    assert logprobs_N.shape == batch.logprobs_N.shape, f"{tuple(logprobs_N.shape)} != {tuple(batch.logprobs_N.shape)}"
    learner_N = logprobs_N.double()
    coefficients_N = coefficients(config.aggregation, batch, config.constant_tokens) * batch.weights_N
    terms = LOSSES[config.loss](learner_N, batch, *config.clip_range)
    per_token_N = terms.loss_N
    sums: dict[str, Tensor] = {"clipped": terms.clipped_N.sum()}
    if config.kl != "none":
        assert batch.reference_logprobs_N is not None, f"kl {config.kl} needs samples with reference_logprobs"
        kl_N = KL_ESTIMATORS[config.kl](learner_N, batch.reference_logprobs_N)
        per_token_N = per_token_N + config.kl_weight * kl_N
        sums["kl_reference"] = kl_N.detach().sum()
    if entropy_N is not None:
        sums["entropy"] = entropy_N.detach().double().sum()
    loss = (coefficients_N * per_token_N).sum()
    drift_sums, maxima = _drift(learner_N.detach() - batch.logprobs_N)
    return LossResult(loss, {"loss": loss.detach(), **sums, **drift_sums}, maxima)


def _drift(log_ratio_N: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Distance of learner and behaviour, unclamped. k1 and k3 estimate KL(behaviour || learner), nats."""
    ratio_N = log_ratio_N.exp()
    sums = {
        "tokens": torch.ones_like(ratio_N).sum(),
        "ratio": ratio_N.sum(),
        "kl_k1": -log_ratio_N.sum(),
        "kl_k3": (ratio_N - 1.0 - log_ratio_N).sum(),
    }
    maxima = {
        "ratio_max": ratio_N.amax(),
        "ratio_error": (ratio_N - 1.0).abs().amax(),
        "mismatch": log_ratio_N.abs().amax(),
    }
    return sums, maxima


def summarise(results: Iterable[LossResult]) -> dict[str, float]:
    """The batch's metrics from its microbatches' results: means over the trained predictions, and maxima.

    "loss" is the batch's loss. "kl" is k3 of learner against behaviour; "kl_reference" and "entropy" where measured.
    """
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for result in results:
        for name, value in result.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in result.maxima.items():
            maxima[name] = max(maxima.get(name, float("-inf")), float(value))
    loss, tokens = sums.pop("loss"), sums.pop("tokens")
    means = {name: value / tokens for name, value in sums.items()}
    means["kl"] = means.pop("kl_k3")
    means["clip_fraction"] = means.pop("clipped")
    return {"loss": loss, "tokens": tokens, **means, **maxima}
