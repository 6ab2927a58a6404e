"""Policy losses of a microbatch. The losses of a batch's microbatches add up to the batch's loss.

    loss = sum over predictions n of  coefficient_n * weight_n * (policy_n + kl_weight * kl_n)

`coefficient_n` is the aggregation's, from the batch's global denominators, which masks leave as they are. `weight_n`
(the correction's, no gradient) turns an expectation under the behaviour policy into one under the
learner, so it multiplies both terms; so does the column selection_weights, where a batch has it, which turns one over
what was kept into one over what was dispatched. The ratio is learner over `old_N`: behaviour in the bypass form of the
correction, proximal in the decoupled form. Everything is fp64, so the split into microbatches meets rounding only where
the gradient is cast back to the log-probs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from tandem.algo.config import Aggregation, AlgoConfig, CorrectionConfig, Kl, Loss
from tandem.algo.correct import Correction, correct, rare_factor, ratio, sample_sum
from tandem.algo.tensors import MicrobatchTensors
from tandem.types import Denominators


class Old(NamedTuple):
    """What a policy loss compares the learner with."""

    logprobs_N: Tensor  # fp64: the ratio's denominator
    advantages_N: Tensor
    sample_N: Tensor
    sample_tokens: Tensor


class Terms(NamedTuple):
    """What a policy loss gives for each prediction."""

    loss_N: Tensor  # before weight and aggregation
    clipped_N: Tensor  # bool: where clipping changed the gradient or the weight


class LossResult(NamedTuple):
    """One microbatch's share of the batch."""

    loss: Tensor  # scalar, differentiable; sums over microbatches to the batch's loss
    sums: dict[str, Tensor]  # detached scalars that add over microbatches; "tokens" counts the predictions
    maxima: dict[str, Tensor]  # detached scalars whose maximum over microbatches is the batch's
    correction: Correction | None  # of its predictions, where the objective has one
    clipped_N: Tensor | None = None  # bool: of its predictions, where the loss clips


def ppo(logprobs_N: Tensor, old: Old, low: float, high: float) -> Terms:
    """loss_n = -min(r_n A_n, clip(r_n, 1 - low, 1 + high) A_n).

    PPO, arXiv 1707.06347, equation 7; low != high is DAPO's clip-higher, arXiv 2503.14476, section 3.1.
    """
    ratio_N = ratio(logprobs_N - old.logprobs_N)
    return _clipped_surrogate(ratio_N, old.advantages_N, low, high)


def gspo(logprobs_N: Tensor, old: Old, low: float, high: float) -> Terms:
    """loss_n = -min(s_n A_n, clip(s_n, 1 - low, 1 + high) A_n), s_n = sg(s_i) r_n / sg(r_n),
    s_i = exp(mean over the sample's predictions of log r).

    The GSPO-token form of GSPO, arXiv 2507.18071. With one advantage a sample and `sequence_mean`, value and
    gradient are those of GSPO itself (equation 5).
    """
    log_ratio_N = logprobs_N - old.logprobs_N
    mean = sample_sum(log_ratio_N.detach(), old.sample_tokens) / old.sample_tokens
    ratio_N = ratio(mean[old.sample_N] + (logprobs_N - logprobs_N.detach()))
    return _clipped_surrogate(ratio_N, old.advantages_N, low, high)


def cispo(logprobs_N: Tensor, old: Old, low: float, high: float) -> Terms:
    """loss_n = -sg(clip(r_n, 1 - low, 1 + high)) A_n log pi_theta(a_n).

    CISPO, MiniMax-M1, arXiv 2506.13585, equations 4 and 5: every token keeps a gradient.
    """
    ratio_N = ratio((logprobs_N - old.logprobs_N).detach())
    weight_N = ratio_N.clamp(1.0 - low, 1.0 + high)
    return Terms(-weight_N * old.advantages_N * logprobs_N, weight_N != ratio_N)


LOSSES: dict[str, Callable[[Tensor, Old, float, float], Terms]] = {
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}
assert {*LOSSES} == {*get_args(Loss)}, f"config.Loss names {get_args(Loss)}, LOSSES has {[*LOSSES]}"


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
    KL(ref || pi). Beyond LOG_RATIO_LIMIT both go on along `ratio`'s tangent.
    """
    difference_N = reference_N - logprobs_N
    return ratio(difference_N) - 1.0 - difference_N


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
assert {"none", *KL_ESTIMATORS} == {*get_args(Kl)}, f"config.Kl names {get_args(Kl)}, KL_ESTIMATORS {[*KL_ESTIMATORS]}"


def divisor(aggregation: Aggregation, totals: Denominators) -> int:
    """The whole batch's part of `coefficients`: what the sum over its samples, or predictions, is divided by."""
    if aggregation == "token_mean":
        return totals.tokens
    return totals.prompts if aggregation == "prompt_mean" else totals.samples


def coefficients(aggregation: Aggregation, batch: MicrobatchTensors, constant_tokens: int | None = None) -> Tensor:
    """(N,) weight of each prediction in the batch's loss, with B, P: samples and prompts of the whole batch.

    token_mean      1 / tokens of the batch                      DAPO, arXiv 2503.14476, section 3.3
    sequence_mean   1 / (B * tokens of the sample)               GRPO, arXiv 2402.03300, equation 3
    prompt_mean     1 / (P * tokens of the prompt's samples)     ScaleRL, arXiv 2510.13786
    constant_mean   1 / (B * constant_tokens)                    Dr. GRPO, arXiv 2503.20783
    """
    of_batch = divisor(aggregation, batch.denominators)
    if aggregation == "token_mean":
        per_sample = torch.full_like(batch.sample_tokens, of_batch)
    elif aggregation == "sequence_mean":
        per_sample = of_batch * batch.sample_tokens
    elif aggregation == "prompt_mean":
        per_sample = of_batch * batch.prompt_tokens
    else:
        assert constant_tokens, f"{aggregation} with constant_tokens {constant_tokens}"
        per_sample = torch.full_like(batch.sample_tokens, of_batch * constant_tokens)
    return per_sample.double().reciprocal()[batch.sample_N]


def policy_loss(
    config: AlgoConfig,
    logprobs_N: Tensor,
    batch: MicrobatchTensors,
    entropy_N: Tensor | None = None,
    correction: CorrectionConfig | None = None,
) -> LossResult:
    """A microbatch's share of the batch's loss, and its metrics.

    `logprobs_N` are the learner's, nats, floating, finite, any device that `batch` is on; they stand in for the
    proximal ones where `batch` has none. `entropy_N` is measured, not trained. `correction`: config's own where None.
    """
    assert logprobs_N.shape == batch.rows_N.shape, f"{tuple(logprobs_N.shape)} != {tuple(batch.rows_N.shape)}"
    chosen = config.correction if correction is None else correction
    learner_N = logprobs_N.double()
    scored_N = batch.get("proximal_logprobs")
    proximal_N = learner_N.detach() if scored_N is None else scored_N
    corrected = correct(chosen, proximal_N, batch["logprobs"], batch.sample_tokens)
    behaviour_N = torch.where(corrected.finite_N, batch["logprobs"], learner_N.detach())
    old_N = behaviour_N if chosen.form == "bypass" else proximal_N
    advantages_N = batch["advantages"]
    if config.rare_weight:
        advantages_N = advantages_N * rare_factor(learner_N, config.rare_weight)
    coefficients_N = coefficients(config.aggregation, batch, config.constant_tokens)
    old = Old(old_N, advantages_N, batch.sample_N, batch.sample_tokens)
    terms = LOSSES[config.loss](learner_N, old, *config.clip_range)
    per_token_N = terms.loss_N
    clipped_N = terms.clipped_N & corrected.kept_N
    sums: dict[str, Tensor] = {"clipped": clipped_N.sum()}
    if config.kl != "none":
        kl_N = KL_ESTIMATORS[config.kl](learner_N, batch["reference_logprobs"])
        if not config.kl_in_reward:
            per_token_N = per_token_N + config.kl_weight * kl_N
        sums["kl_reference"] = kl_N.detach().sum()
    if entropy_N is not None:
        sums["entropy"] = entropy_N.detach().double().sum()
    weight_N, selection_N = corrected.weight_N, batch.get("selection_weights")
    if selection_N is not None:
        weight_N = weight_N * selection_N
    loss = (coefficients_N * weight_N * per_token_N).sum()
    log_ratio_N, drift_N = learner_N.detach() - old_N, learner_N.detach() - behaviour_N
    ratio_N = log_ratio_N.exp()
    sums |= {"tokens": torch.ones_like(ratio_N).sum(), "ratio": ratio_N.sum()}
    sums["kl_k3"] = (torch.expm1(drift_N) - drift_N).sum()
    sums["taken_out"] = (~corrected.kept_N & (batch["advantages"] != 0.0)).sum()
    maxima = {
        "ratio_max": ratio_N.amax(),
        "ratio_error": (ratio_N - 1.0).abs().amax(),
        "mismatch": drift_N.abs().amax(),
    }
    return LossResult(loss, {"loss": loss.detach(), **sums}, maxima, corrected, clipped_N)


def clipped_value_loss(value_N: Tensor, before_N: Tensor, returns_N: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """loss_n = max((V_n - R_n)^2, (V_old,n + clip(V_n - V_old,n, -c, c) - R_n)^2) / 2, and where the clip acts on it.

    PPO's value clipping as in OpenAI's baselines (ppo2) and Engstrom et al., arXiv 2005.12729, section 3.
    """
    free_N = (value_N - returns_N).square()
    bound_N = (before_N + (value_N - before_N).clamp(-clip, clip) - returns_N).square()
    return torch.maximum(free_N, bound_N) / 2.0, (bound_N > free_N).detach()


def summarise(results: Iterable[LossResult]) -> dict[str, float]:
    """The batch's metrics from its microbatches' results: means over the trained predictions, and maxima.

    "loss" is the batch's loss, "ratio*" the ratio that is clipped. "kl" (k3) and "mismatch" (largest |log ratio|) are
    of learner against behaviour, unclamped; "kl_reference", "entropy" and a critic's where measured. "taken_out" counts
    the predictions with an advantage that the correction took out.
    """
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for result in results:
        for name, value in result.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in result.maxima.items():
            maxima[name] = max(maxima.get(name, float("-inf")), float(value))
    loss, tokens = sums.pop("loss"), sums.pop("tokens")
    totals = {"loss": loss, "tokens": tokens} | {name: sums.pop(name) for name in ("taken_out",) if name in sums}
    names = {"kl_k3": "kl", "clipped": "clip_fraction"}
    means = {names.get(name, name): value / tokens for name, value in sums.items()}
    return totals | means | maxima
