"""The learner's step: samples to microbatches to gradients to updates, by an objective (algo/objective.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tandem.algo.alarm import AlarmConfig
from tandem.algo.loss import LossResult
from tandem.algo.objective import (
    Beside,
    Measured,
    Meets,
    Objective,
    ObjectiveStep,
    Outputs,
    PolicyGradient,
    Score,
    Widened,
)
from tandem.algo.pack import PromptTotal, canonical, denominators, pack, split_updates
from tandem.algo.preference import HEAD, RewardModel
from tandem.algo.tensors import MicrobatchTensors, to_tensors
from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels.rounded_gradient import operands_of
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.models.tokenizer import Tokenizer
from tandem.trace import Trace
from tandem.train import checkpoint, reward
from tandem.train.checkpoint import RunState
from tandem.train.config import LearnerConfig
from tandem.train.critic import Critic, judged
from tandem.train.optimiser import Optimiser, Trained
from tandem.train.score import forward, with_logprobs
from tandem.train.score import score as score
from tandem.types import Denominators, Microbatch, Sample

ONE = Denominators(1, 1, 1)  # of a part of a batch, whose own are not known yet


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


@dataclass(slots=True)
class Parts:
    """A batch whose parts are learned of as they come: the gradients in the weights are of sums, not of means."""

    by: ObjectiveStep
    results: list[LossResult] = field(default_factory=list)
    observed: list[Any] = field(default_factory=list)
    rows: int = 0
    samples: list[Sample] = field(default_factory=list)


def learn_rounded(decoder: Decoder, gradients: str) -> None:
    """Round what the backward pass multiplies, as learner.gradients says. ConfigError where that cannot be."""
    operands = None if gradients == "int8" else operands_of(gradients)
    for layer in decoder.layers:
        for slot, weight in layer.weights():
            if slot.columns is None:
                continue
            if operands is None:
                weight.learn_in_8_bits()
            elif weight.library:
                raise ConfigError(
                    f"learner.gradients is {gradients} and model.kernels library, whose products round nothing. Set "
                    "model.kernels to exact, or leave learner.gradients out."
                )
            else:
                weight.operands = operands


class Learner:
    """Owns the optimiser of a decoder, or of the adapter that it wears; `step` leaves those weights updated."""

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
        self.head = objective.over(decoder) if isinstance(objective, RewardModel) else None
        self.own = objective.beside(decoder) if isinstance(objective, Beside) else None
        trained = self.own or self.head or decoder.adapter or decoder
        self.optimiser = Optimiser(_Both(trained, objective) if isinstance(objective, Widened) else trained, config)
        self.critic = critic
        if config.gradients != "same":
            learn_rounded(decoder, config.gradients)
        self.between: Callable[[], None] = _nothing  # called before each microbatch

    @property
    def updates(self) -> int:
        """Of the optimiser."""
        return self.optimiser.updates

    @property
    def _optimisers(self) -> dict[str, Optimiser]:
        """By their files in a checkpoint."""
        own = {"optimiser": self.optimiser}
        return own if self.critic is None else own | {"critic": self.critic.optimiser}

    def save(self, directory: Path, tokenizer: Tokenizer, state: RunState) -> None:
        """Weights and optimisers, with where the run stands, into a checkpoint."""
        checkpoint.save(directory, self.own or self.decoder, self._optimisers, tokenizer, state)
        if self.head is not None:
            reward.save(directory, self.head)

    def load(self, directory: Path) -> RunState:
        """Go on from a checkpoint."""
        return checkpoint.load(directory, self.decoder, self._optimisers)

    def backward(self, microbatch: Microbatch) -> LossResult:
        """Add a microbatch's gradients. NonFiniteError, naming the samples, where its loss is not finite."""
        return self._backward(microbatch, self.objective.begin())[0]

    def _backward(self, microbatch: Microbatch, by: ObjectiveStep) -> tuple[LossResult, Any]:
        self.between()
        batch, outputs = self._forward(microbatch, by)
        result = by.loss(outputs, batch)
        loss = result.loss
        if self.critic is not None:
            valued = self.critic.loss(microbatch, batch, outputs.hidden_NM)
            loss, result = loss + valued.loss, result._replace(sums=result.sums | valued.sums)
        value = float(loss.detach())
        ids = microbatch.sample_ids
        if outputs.asked is not None and not bool((finite_N := outputs.asked.isfinite()).all()):
            value = math.nan  # which a mask can hide
            ids = tuple(ids[place] for place in batch.sample_N[~finite_N].unique().tolist())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of a microbatch is {value}; its samples: {', '.join(ids)}. "
                "No update was made. Lower learner.lr, or look at these trajectories."
            )
        loss.backward()
        return result, by.observe(outputs.asked, batch, result, microbatch.sample_ids)

    def _forward(self, microbatch: Microbatch, by: ObjectiveStep) -> tuple[MicrobatchTensors, Outputs]:
        """What the loss is of."""
        checkpointing = self.config.activation_checkpointing == "on"
        batch = to_tensors(microbatch, self.decoder.device)
        watch = by.meet(microbatch, batch) if isinstance(by, Meets) else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.own is None):
            return batch, forward(self.decoder, microbatch, batch, self.objective.temperature, checkpointing, watch)

    def _gradients(self, microbatches: Sequence[Microbatch], by: ObjectiveStep) -> _Gradients:
        self._zero_grad()
        results, observed = zip(*(self._backward(microbatch, by) for microbatch in microbatches), strict=True)
        return _Gradients(list(results), list(observed), sum(len(m.tokens_T) for m in microbatches))

    def _zero_grad(self) -> None:
        self.optimiser.zero_grad()
        if self.critic is not None:
            self.critic.optimiser.zero_grad()

    def _pack(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> list[Microbatch]:
        whole = "preferred" in self.objective.columns
        return pack(samples, prompts, self.config.microbatch_tokens, self.config.share_prefix, whole)

    def _apply(self, samples: Sequence[Sample], unit: float = 1.0) -> tuple[float, float]:
        """An update with `unit` times the gradients."""
        with self.trace.span("update"):
            norm = unit * self.optimiser.grad_norm()
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
            others = {}
            if isinstance(self.objective, RewardModel):
                peak = replace(self.config, lr=self.objective.config.head_lr)
                others[HEAD] = peak.rate(self.optimiser.updates, self.total_updates)
            self.optimiser.step(lr, norm, others, unit=unit)
            return norm, lr

    def begin(self) -> Parts:
        """A step whose batch comes in parts: `add` each, then `finish`."""
        assert self.critic is None and self.objective.updates_per_step == 1
        self._zero_grad()
        return Parts(self.objective.begin())

    def add(self, parts: Parts, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> None:
        """The gradients of some samples. `prompts` are the totals of all that their prompts bring to the batch.

        A prompt's share of the loss hangs on the rest of the batch by a factor alone, the same for all
        (Objective.divisor), which `finish` applies.
        """
        samples, prompts = canonical(samples, prompts)
        self._check(samples)
        for microbatch in self._pack(samples, prompts):
            result, observed = self._backward(replace(microbatch, denominators=ONE), parts.by)
            parts.results.append(result)
            parts.observed.append(observed)
            parts.rows += len(microbatch.tokens_T)
        parts.samples += samples

    def finish(self, parts: Parts, prompts: Sequence[PromptTotal]) -> LearnerReport | None:
        """The update; None where nothing has a gradient. `prompts` are the totals of the whole batch."""
        if not parts.samples:
            return None
        unit = 1.0 / self.objective.divisor(denominators(prompts))
        results = [one._replace(sums=one.sums | {"loss": unit * one.sums["loss"]}) for one in parts.results]
        accepted = parts.by.accept(results, parts.observed)
        assert accepted, "gradients of parts are not computed again"
        norm, lr = self._apply(parts.samples, unit)
        self._zero_grad()
        return LearnerReport(parts.by.measured(results), norm, lr, len(results), parts.rows)

    def _check(self, samples: Sequence[Sample]) -> None:
        """ConfigError where one lacks a column."""
        for sample in samples:
            if lacking := sorted(self.objective.columns - sample.columns.arrays.keys()):
                raise ConfigError(
                    f"{type(self.objective).__name__} learns from what sample {sample.id} lacks: {', '.join(lacking)}. "
                    "Put them in where the samples are made (Columns.having)."
                )

    def _scorer(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> Score:
        """By the present weights."""
        budget, temperature = self.config.microbatch_tokens, self.objective.temperature

        def scored(name: str, chosen: Sequence[Sample] = samples) -> tuple[Sample, ...]:
            return with_logprobs(name, self.decoder, chosen, prompts, budget, temperature)

        return scored

    def measure(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> dict[str, float]:
        """What the objective measures of samples that are not learned from, as `step` takes them."""
        samples, prompts = canonical(samples, prompts)
        self._check(samples)
        by, results = self.objective.begin(), list[LossResult]()
        samples = by.prepare(samples, self._scorer(samples, prompts))
        with torch.no_grad():
            for microbatch in self._pack(samples, prompts):
                batch, outputs = self._forward(microbatch, by)
                results.append(by.loss(outputs, batch))
        return by.measured(results).metrics

    def under(self, total_updates: int, alarms: AlarmConfig) -> None:
        """Other settings than its own, from the next step on."""
        self.total_updates = total_updates
        if isinstance(self.objective, PolicyGradient):
            self.objective.alarms = alarms

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
        self._check(samples)
        prepared = by.prepare(samples, self._scorer(samples, prompts))
        parts = split_updates(prepared, prompts, objective.updates_per_step)
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


class _Both:
    """What is trained of a model and what its objective has of weights, as one model that is trained."""

    def __init__(self, model: Trained, objective: Widened) -> None:
        self._model, self._objective = model, objective

    def weights(self) -> Iterator[tuple[str, Weight]]:
        yield from self._model.weights()
        yield from self._objective.weights()

    def repack(self) -> None:
        self._model.repack()
        for _, weight in self._objective.weights():
            weight.repack()


def _nothing() -> None:
    """Between two microbatches, where nobody waits."""
