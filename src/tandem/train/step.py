"""The learner's step: samples to microbatches to gradients to updates, by an objective (algo/objective.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tandem.algo.loss import LossResult
from tandem.algo.objective import Measured, Objective, ObjectiveStep
from tandem.algo.pack import PromptTotal, canonical, pack, split_updates
from tandem.algo.tensors import to_tensors
from tandem.errors import ConfigError, NonFiniteError
from tandem.models.decoder import Decoder
from tandem.trace import Trace
from tandem.train.config import LearnerConfig
from tandem.train.critic import Critic, judged
from tandem.train.optimiser import Optimiser
from tandem.train.score import forward, with_logprobs
from tandem.train.score import score as score
from tandem.types import Microbatch, Sample


@dataclass(frozen=True, slots=True)
class LearnerReport:
    """What a step's updates came to.

    >>> LearnerReport(Measured({"loss": 0.0}), 0.0, 0.0, 0, 0).microbatches
    0
    """

    measured: Measured  # by the objective
    grad_norm: float  # before clipping; of the last update
    lr: float
    microbatches: int
    rows: int  # run forward and backward


class _Gradients(NamedTuple):
    """What the microbatches of one update gave; the gradients are in the weights."""

    results: list[LossResult]
    observed: list[Any]
    rows: int


class Learner:
    """Owns the optimiser of a decoder; `step` leaves the decoder's weights updated."""

    def __init__(
        self,
        decoder: Decoder,
        config: LearnerConfig,
        objective: Objective,
        total_updates: int,
        trace: Trace | None = None,
        critic: Critic | None = None,
    ) -> None:
        self.decoder = decoder
        self.config = config
        self.objective = objective
        self.total_updates = total_updates
        self.trace = trace or Trace()  # span "update": norm, clipping, AdamW and packing of the weights
        self.optimiser = Optimiser(decoder, config)
        self.critic = critic
        self.between: Callable[[], None] = _nothing  # called before each microbatch

    def backward(self, microbatch: Microbatch) -> LossResult:
        """Add a microbatch's gradients. NonFiniteError, naming the samples, where its loss is not finite."""
        return self._backward(microbatch, self.objective.begin())[0]

    def _backward(self, microbatch: Microbatch, by: ObjectiveStep) -> tuple[LossResult, Any]:
        self.between()
        checkpointing = self.config.activation_checkpointing == "on"
        batch = to_tensors(microbatch, self.decoder.device)
        outputs = forward(self.decoder, microbatch, batch, self.objective.temperature, checkpointing)
        logprobs_N = outputs.logprobs_N
        logprobs_N.retain_grad()
        result = by.loss(outputs, batch)
        loss = result.loss
        if self.critic is not None:
            valued = self.critic.loss(microbatch, batch, outputs.hidden_NM)
            loss, result = loss + valued.loss, result._replace(sums=result.sums | valued.sums)
        value = float(loss.detach())
        if not bool(logprobs_N.isfinite().all()):
            value = math.nan  # which a mask can hide
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of a microbatch is {value}; its samples: {', '.join(microbatch.sample_ids)}. "
                "No update was made. Lower learner.lr, or look at these trajectories."
            )
        loss.backward()
        return result, by.observe(logprobs_N, batch, result, microbatch.sample_ids)

    def _gradients(self, microbatches: Sequence[Microbatch], by: ObjectiveStep) -> _Gradients:
        self._zero_grad()
        results, observed = zip(*(self._backward(microbatch, by) for microbatch in microbatches), strict=True)
        return _Gradients(list(results), list(observed), sum(len(m.tokens_T) for m in microbatches))

    def _zero_grad(self) -> None:
        self.optimiser.zero_grad()
        if self.critic is not None:
            self.critic.optimiser.zero_grad()

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
            if self.critic is not None:
                self.critic_norm = self.critic.apply()
                if not self.critic.warm:
                    return norm, 0.0
            lr = self.config.rate(self.optimiser.updates, self.total_updates)
            self.optimiser.step(lr, norm)
            return norm, lr

    def step(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> LearnerReport | None:
        """The objective's `updates_per_step` updates on a batch; None where nothing has a gradient.

        `prompts` are the totals of the whole batch, untrained samples included. The order of both does not matter.
        NonFiniteError leaves weights and optimiser as the last update left them; what the objective raises comes before
        the first.
        """
        samples, prompts = canonical(samples, prompts)
        by, objective = self.objective.begin(), self.objective
        if not samples:
            return None
        for sample in samples:
            if lacking := sorted(objective.columns - sample.columns.arrays.keys()):
                raise ConfigError(
                    f"{type(objective).__name__} learns from what sample {sample.id} lacks: {', '.join(lacking)}. "
                    "Put them in where the samples are made (Columns.having)."
                )
        budget = self.config.microbatch_tokens

        def scored(name: str) -> tuple[Sample, ...]:
            return with_logprobs(name, self.decoder, samples, prompts, budget, objective.temperature)

        parts = split_updates(by.prepare(samples, scored), prompts, objective.updates_per_step)
        first = self._pack(*parts[0])
        found = self._gradients(first, by)
        rows = found.rows
        if not by.accept(found.results, found.observed):
            found = self._gradients(first, by)
            rows += found.rows
            by.accept(found.results, found.observed)
        norm, lr = self._apply(parts[0][0])
        results = found.results
        for members, totals in parts[1:]:
            found = self._gradients(self._pack(members, totals), by)
            norm, lr = self._apply(members)
            rows, results = rows + found.rows, results + found.results
        self._zero_grad()
        measured = by.measured(results)
        if self.critic is not None:
            self.critic.steps += 1
            known = judged(samples) | {"critic_grad_norm": self.critic_norm}
            measured = replace(measured, metrics=measured.metrics | known)
        return LearnerReport(measured, norm, lr, len(results), rows)


def _nothing() -> None:
    """Between two microbatches, where nobody waits."""
