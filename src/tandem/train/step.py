"""The learner's step: samples to microbatches to gradients to one update, and the drift measured before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from tandem.algo.alarm import NAMED_TRAJECTORIES, Alarm, AlarmConfig, check, check_correctable
from tandem.algo.config import NAIVE, AlgoConfig, CorrectionConfig
from tandem.algo.drift import Drift, Observations, join, measure
from tandem.algo.loss import LossResult, policy_loss, summarise
from tandem.algo.pack import PromptTotal, canonical, pack, split_updates
from tandem.algo.tensors import MicrobatchTensors, to_tensors
from tandem.errors import AlarmError, NonFiniteError, ParityError
from tandem.models.decoder import Decoder
from tandem.trace import Trace
from tandem.train.config import LearnerConfig
from tandem.train.optimiser import Optimiser
from tandem.train.reference import forward, with_logprobs
from tandem.train.reference import score as score
from tandem.types import Microbatch, Sample


@dataclass(frozen=True, slots=True)
class LearnerReport:
    """What a step's updates measured.

    >>> LearnerReport({"loss": 0.0}, 0.0, 0.0, 0, 0).microbatches
    0
    """

    metrics: dict[str, float]  # of all updates (algo.loss.summarise), and the drift of the first (algo.drift)
    grad_norm: float  # before clipping; of the last update
    lr: float
    microbatches: int
    rows: int  # run forward and backward
    error_budget: dict[str, float] = field(default_factory=dict)  # of the first update, by cause
    by_length: tuple[dict[str, float], ...] = ()  # drift by length decile, of the first update
    alarms: tuple[Alarm, ...] = ()

    @property
    def alarm_texts(self) -> list[str]:
        """A line an alarm."""
        return [alarm.text() for alarm in self.alarms]


class _Gradients(NamedTuple):
    """What the microbatches of one update gave; the gradients are in the weights."""

    results: list[LossResult]
    seen: Observations
    rows: int


class Learner:
    """Owns the optimiser of a decoder; `step` leaves the decoder's weights updated."""

    def __init__(
        self,
        decoder: Decoder,
        config: LearnerConfig,
        algo: AlgoConfig,
        temperature: float,
        total_updates: int,
        trace: Trace | None = None,
        *,
        alarms: AlarmConfig | None = None,
        exact: bool = False,
    ) -> None:
        self.decoder = decoder
        self.config = config
        self.algo = algo
        self.temperature = temperature  # of the rollouts: the policy that is trained is the one sampled from
        self.total_updates = total_updates
        self.trace = trace or Trace()  # span "update": norm, clipping, AdamW and packing of the weights
        self.alarms = alarms or AlarmConfig()
        self.exact = exact  # nothing is declared to differ: a difference is an error
        self.optimiser = Optimiser(decoder, config)
        check_correctable(self.alarms, algo.correction)

    def backward(self, microbatch: Microbatch, correction: CorrectionConfig | None = None) -> LossResult:
        """Add a microbatch's gradients. NonFiniteError, naming the samples, where its loss is not finite.

        `correction`: the algorithm's own where None.
        """
        return self._backward(microbatch, correction or self.algo.correction)[0]

    def _backward(self, microbatch: Microbatch, correction: CorrectionConfig) -> tuple[LossResult, Observations]:
        checkpointing = self.config.activation_checkpointing == "on"
        batch = to_tensors(microbatch, self.decoder.device)
        logprobs_N, entropy_N = forward(self.decoder, microbatch, batch, self.temperature, checkpointing)
        logprobs_N.retain_grad()
        result = policy_loss(self.algo, logprobs_N, batch, entropy_N, correction)
        value = float(result.loss.detach())
        if not bool(logprobs_N.isfinite().all()):
            value = math.nan  # which a mask can hide
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of a microbatch is {value}; its samples: {', '.join(microbatch.sample_ids)}. "
                "No update was made. Lower learner.lr, or look at these trajectories."
            )
        result.loss.backward()
        return result, _observations(logprobs_N, batch, result, microbatch.sample_ids)

    def _gradients(self, microbatches: Sequence[Microbatch], correction: CorrectionConfig) -> _Gradients:
        self.optimiser.zero_grad()
        results, seen = zip(*(self._backward(microbatch, correction) for microbatch in microbatches), strict=True)
        rows = sum(len(microbatch.tokens_T) for microbatch in microbatches)
        return _Gradients(list(results), join(seen), rows)

    def _pack(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> list[Microbatch]:
        return pack(samples, prompts, self.config.microbatch_tokens, self.config.share_prefix)

    def _apply(self, samples: Sequence[Sample]) -> tuple[float, float]:
        with self.trace.span("update"):
            norm = self.optimiser.grad_norm()
            if not math.isfinite(norm):
                raise NonFiniteError(
                    f"the gradient norm is {norm} at update {self.optimiser.updates}; the loss was finite. Samples: "
                    f"{', '.join(sample.id for sample in samples)}. No update was made. Lower learner.lr, or compute "
                    "in float32 with model.dtype."
                )
            lr = self.config.rate(self.optimiser.updates, self.total_updates)
            self.optimiser.step(lr, norm)
            return norm, lr

    def step(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> LearnerReport | None:
        """`updates_per_step` updates on a batch; None where nothing has a gradient.

        `prompts` are the totals of the whole batch, untrained samples included. The order of both does not matter.
        NonFiniteError leaves weights and optimiser as the last update left them; ParityError and AlarmError come
        before the first. Under alarms.action "correct" a step begins without correction; where an alarm fires, its
        first update is computed again with algo.correction, and its other updates have it too.
        """
        samples, prompts = canonical(samples, prompts)
        held = self.alarms.action == "correct"
        correction = NAIVE if held else self.algo.correction
        if self.algo.updates_per_step > 1 and (held or self.algo.correction.needs_proximal):
            budget = self.config.microbatch_tokens
            samples = with_logprobs("proximal_logprobs", self.decoder, samples, prompts, budget, self.temperature)
        parts = split_updates(samples, prompts, self.algo.updates_per_step)
        if not parts:
            return None
        first = self._pack(*parts[0])
        found = self._gradients(first, correction)
        rows, drift = found.rows, measure(found.seen)
        if self.exact:
            _check_parity(found)
        alarms = check(self.alarms, drift.metrics, drift.per_sample)
        if alarms and self.alarms.action == "stop":
            raise AlarmError(
                f"{len(alarms)} of the drift metrics are beyond their thresholds: "
                f"{'. '.join(alarm.text() for alarm in alarms)}. No update was made. Choose algo.correction, raise the "
                "threshold under alarms, or set alarms.action to warn."
            )
        if alarms and held:
            correction = self.algo.correction
            found = self._gradients(first, correction)
            rows, drift = rows + found.rows, measure(found.seen)
        norm, lr = self._apply(parts[0][0])
        results = found.results
        for members, totals in parts[1:]:
            found = self._gradients(self._pack(members, totals), correction)
            norm, lr = self._apply(members)
            rows, results = rows + found.rows, results + found.results
        self.optimiser.zero_grad()
        metrics = _metrics(results, drift) | ({"corrected": float(bool(alarms))} if held else {})
        return LearnerReport(
            metrics, norm, lr, len(results), rows, drift.error_budget, drift.by_length, alarms=tuple(alarms)
        )


def _metrics(results: Sequence[LossResult], drift: Drift) -> dict[str, float]:
    """Means and maxima of all updates; drift, "kl" (k3) and "mismatch" (abs_max) of the first."""
    first = {"kl": drift.metrics["k3"], "mismatch": drift.metrics["abs_max"]}
    return {**summarise(results), **drift.metrics, **first}


def _observations(
    logprobs_N: torch.Tensor, batch: MicrobatchTensors, result: LossResult, sample_ids: tuple[str, ...]
) -> Observations:
    assert logprobs_N.grad is not None

    def array(tensor: torch.Tensor | None, otherwise: torch.Tensor) -> np.ndarray:
        return (otherwise if tensor is None else tensor).detach().double().cpu().numpy()

    return Observations(
        learner_N=array(logprobs_N, logprobs_N),
        behaviour_N=array(batch["logprobs"], logprobs_N),
        source_N=array(batch.get("source_logprobs"), logprobs_N),
        unfiltered_N=array(batch.get("unfiltered_logprobs"), batch["logprobs"]),
        gradient_N=np.abs(array(logprobs_N.grad, logprobs_N)),
        masked_N=~result.correction.kept_N.cpu().numpy(),
        truncated_N=result.correction.truncated_N.cpu().numpy(),
        sample_N=batch.sample_N.cpu().numpy(),
        sample_ids=sample_ids,
    )


def _check_parity(found: _Gradients) -> None:
    """ParityError unless log-probs agree to the last bit and every ratio is exactly 1."""
    seen = found.seen
    gap_N = np.abs(seen.learner_N - seen.behaviour_N)
    apart = np.flatnonzero(~(gap_N == 0.0))  # nan is apart
    off = max(float(result.maxima["ratio_error"]) for result in found.results)
    if not len(apart) and off == 0.0:
        return
    worst = apart[np.argsort(-gap_N[apart], kind="stable")]
    named = list(dict.fromkeys(seen.sample_ids[seen.sample_N[n]] for n in worst))
    more = f" and {len(named) - NAMED_TRAJECTORIES} more" if len(named) > NAMED_TRAJECTORIES else ""
    largest = float(gap_N.max()) if np.isfinite(gap_N).all() else math.inf
    raise ParityError(
        f"the config declares no difference between engine and learner, yet {len(apart)} of {len(gap_N)} tokens have "
        f"another log-prob (largest |d| {largest:.3g} nats, ratio off 1 by {off:.3g}); "
        f"trajectories: {', '.join(named[:NAMED_TRAJECTORIES]) or 'none'}{more}. Nothing was updated. "
        "Run `tandem doctor`, or declare what differs under engine, rollout, sync or model."
    )
