"""What a learner learns by: which columns a batch must have, its loss, what is measured and what may stop an update.

An objective says what is wanted of all steps; `begin` gives one step's, which the learner drives:

    fill the columns -> each microbatch: loss, backward, observe -> accept (or once more) -> update ... -> measured
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from tandem.algo.alarm import NAMED_TRAJECTORIES, Alarm, AlarmConfig, check, check_correctable
from tandem.algo.config import NAIVE, AlgoConfig
from tandem.algo.correct import sample_sum
from tandem.algo.drift import Drift, Observations, join, measure
from tandem.algo.loss import LossResult, divisor, policy_loss, summarise
from tandem.algo.tensors import MicrobatchTensors
from tandem.errors import AlarmError, ParityError
from tandem.kernels.linear import linear
from tandem.kernels.weight import Weight
from tandem.types import Denominators, Microbatch, Sample

if TYPE_CHECKING:
    from tandem.models.decoder import Decoder

# (column, samples; the step's where none are given) -> them with it, by the learner's present weights
Score = Callable[..., tuple[Sample, ...]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step found out.

    >>> Measured({"loss": 0.0}).alarms
    ()
    """

    metrics: dict[str, float]  # of all updates (algo.loss.summarise), and what the objective measures of the first
    error_budget: dict[str, float] = field(default_factory=dict)  # by cause
    by_length: tuple[dict[str, float], ...] = ()  # by length decile
    alarms: tuple[Alarm, ...] = ()
    clipped: dict[str, float] = field(default_factory=dict)  # sample id -> share of its tokens, where the loss clips


class Outputs:
    """What the learner's forward pass gives of a microbatch's N trained tokens. Log-probs cost the head's product where
    the objective asks for them, and nothing where it does not."""

    def __init__(
        self, hidden_NM: torch.Tensor, head: Weight, score: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.hidden_NM = hidden_NM  # normed, what the head reads
        self.head = head
        self.asked: torch.Tensor | None = None  # log-probs, once somebody did
        self._score = score

    @cached_property
    def _scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_N, entropy_N = self._score()
        if logprobs_N.requires_grad:
            logprobs_N.retain_grad()
        self.asked = logprobs_N
        return logprobs_N, entropy_N

    @property
    def logprobs_N(self) -> torch.Tensor:
        """Nats, at the objective's temperature, among the tokens that the sampler had kept."""
        return self._scores[0]

    @property
    def entropy_N(self) -> torch.Tensor:
        """Of the same distribution; has no gradient."""
        return self._scores[1]

    def logits(self) -> torch.Tensor:
        """[N, V] in the compute dtype, differentiable, for losses over whole distributions: another product."""
        return linear(self.hidden_NM, self.head)


class ObjectiveStep(Protocol):
    """An objective in one step of the learner."""

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        """The samples with every column that the loss reads."""
        ...

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        """A microbatch's share of the batch's loss. Its sums need "loss" and "tokens"."""
        ...

    def observe(
        self,
        logprobs_N: torch.Tensor | None,
        batch: MicrobatchTensors,
        result: LossResult,
        sample_ids: tuple[str, ...],
    ) -> Any:
        """After the backward pass: what `accept` is to see of the microbatch. No log-probs where `loss` asked for
        none."""
        ...

    def accept(self, results: Sequence[LossResult], observed: Sequence[Any]) -> bool:
        """Whether the first update's gradients may be applied; if not they are computed again, with the loss as it is
        now. May raise in place of the update."""
        ...

    def measured(self, results: Sequence[LossResult]) -> Measured:
        """Of all updates of the step."""
        ...


Watch = Callable[[int, torch.Tensor], None]  # sees (layer, hidden states behind it), differentiable


@runtime_checkable
class Meets(Protocol):
    """An objective's step that looks at each microbatch before the learner's forward pass, and may watch that."""

    def meet(self, microbatch: Microbatch, batch: MicrobatchTensors) -> Watch | None: ...


@runtime_checkable
class Widened(Protocol):
    """An objective with weights of its own, which the learner's optimiser trains and a checkpoint keeps."""

    def weights(self) -> Iterator[tuple[str, Weight]]:
        """Each once, by a name that no decoder has, always in this order."""
        ...


class Own(Protocol):
    """Weights beside a model, trained in its place."""

    def weights(self) -> Iterator[tuple[str, Weight]]: ...

    def repack(self) -> None: ...

    def save(self, folder: Path) -> None:
        """Into a checkpoint that is being written."""
        ...


@runtime_checkable
class Beside(Protocol):
    """An objective that trains weights of its own, which are what a checkpoint has; the model stays as it is."""

    def beside(self, decoder: Decoder) -> Own:
        """What is trained beside this model. Called once."""
        ...


class Objective(Protocol):
    """What is learned."""

    temperature: float  # that logits are divided by: the policy that is trained is the one sampled from
    updates_per_step: int
    samples: bool  # from rollouts of the engine; else from the solutions that the task writes
    # That a batch must bring. "reference_logprobs" among them asks for the first weights; "preferred" for the samples
    # of a prompt in one microbatch.
    columns: frozenset[str]

    def begin(self) -> ObjectiveStep: ...

    def divisor(self, totals: Denominators) -> int:
        """What the loss of microbatches whose denominators are all 1 is to be divided by, once the batch is known."""
        ...


class PolicyGradient:
    """The policy losses of algo/loss.py over rollouts, with parity, drift and alarms.

    `exact`: nothing is declared to differ between engine and learner, so a difference is an error.
    """

    samples = True

    def __init__(
        self, algo: AlgoConfig, temperature: float, alarms: AlarmConfig | None = None, *, exact: bool = False
    ) -> None:
        self.algo = algo
        self.temperature = temperature
        self.updates_per_step = algo.updates_per_step
        self.columns = frozenset({"tokens", "loss_mask", "logprobs", "advantages"})
        if algo.needs_reference:
            self.columns |= {"reference_logprobs"}
        if algo.needs_critic:
            self.columns |= {"values", "returns"}
        self.alarms = alarms or AlarmConfig()
        self.exact = exact
        check_correctable(self.alarms, algo.correction)

    def begin(self) -> PolicyStep:
        return PolicyStep(self)

    def divisor(self, totals: Denominators) -> int:
        return divisor(self.algo.aggregation, totals)


class PolicyStep:
    """A step: under alarms.action "correct" it begins without correction; where an alarm fires, the first update's
    gradients are computed again with algo.correction, and the other updates have it too."""

    def __init__(self, objective: PolicyGradient) -> None:
        self.algo, self.alarms, self.exact = objective.algo, objective.alarms, objective.exact
        self.held = self.alarms.action == "correct"
        self.correction = NAIVE if self.held else self.algo.correction
        self.fired: tuple[Alarm, ...] = ()
        self.drift: Drift | None = None
        self.clipped: dict[str, float] = {}

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        if self.algo.updates_per_step > 1 and (self.held or self.algo.correction.needs_proximal):
            return score("proximal_logprobs")
        return samples

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        return policy_loss(self.algo, outputs.logprobs_N, batch, outputs.entropy_N, self.correction)

    def observe(
        self,
        logprobs_N: torch.Tensor | None,
        batch: MicrobatchTensors,
        result: LossResult,
        sample_ids: tuple[str, ...],
    ) -> Observations:
        assert (
            logprobs_N is not None
            and logprobs_N.grad is not None
            and result.correction is not None
            and result.clipped_N is not None
        )
        numbers = sample_sum(result.clipped_N.double(), batch.sample_tokens) / batch.sample_tokens
        self.clipped |= zip(sample_ids, numbers.tolist(), strict=True)

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

    def accept(self, results: Sequence[LossResult], observed: Sequence[Observations]) -> bool:
        seen, again = join(observed), self.drift is not None
        self.drift = measure(seen)
        if again:
            return True
        if self.exact:
            check_parity(seen, results)
        self.fired = tuple(check(self.alarms, self.drift.metrics, self.drift.per_sample))
        if self.fired and self.alarms.action == "stop":
            raise AlarmError(
                f"{len(self.fired)} of the drift metrics are beyond their thresholds: "
                f"{'. '.join(alarm.text() for alarm in self.fired)}. No update was made. Choose algo.correction, raise "
                "the threshold under alarms, or set alarms.action to warn."
            )
        if self.fired and self.held:
            self.correction = self.algo.correction
            return False
        return True

    def measured(self, results: Sequence[LossResult]) -> Measured:
        """Means and maxima of all updates; drift, "kl" (k3) and "mismatch" (abs_max) of the first."""
        assert self.drift is not None
        drift = self.drift.metrics
        metrics = {**summarise(results), **drift, "kl": drift["k3"], "mismatch": drift["abs_max"]}
        if self.held:
            metrics["corrected"] = float(bool(self.fired))
        return Measured(metrics, self.drift.error_budget, self.drift.by_length, self.fired, self.clipped)


def check_parity(seen: Observations, results: Sequence[LossResult]) -> None:
    """ParityError unless log-probs agree to the last bit and every ratio is exactly 1."""
    gap_N = np.abs(seen.learner_N - seen.behaviour_N)
    apart = np.flatnonzero(~(gap_N == 0.0))  # nan is apart
    off = max(float(result.maxima["ratio_error"]) for result in results)
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
