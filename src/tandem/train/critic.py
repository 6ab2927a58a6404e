"""A critic: what a state is worth, told from a hidden state by a linear head that learns beside the policy.

The head reads the policy's own trunk, or that of a model of its own. It has its own optimiser, and its own part of a
checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.algo.config import AlgoConfig
from tandem.algo.credit import with_gae
from tandem.algo.loss import KL_ESTIMATORS, clipped_value_loss
from tandem.algo.pack import PromptTotal
from tandem.algo.tensors import MicrobatchTensors, to_tensors
from tandem.errors import NonFiniteError
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.train.config import CriticConfig, LearnerConfig
from tandem.train.optimiser import Optimiser
from tandem.train.score import hidden_states, with_column
from tandem.types import Microbatch, Sample

HEAD = "value"  # the head's name among the weights


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, scale):  # type: ignore[no-untyped-def]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        return dx * ctx.scale, None


class ValueModel:
    """V = w . h / |h| + b in fp64, of a hidden state h: zero at first, and of one size whatever the model's norms."""

    def __init__(self, trunk: Decoder, *, own: bool) -> None:
        self.trunk = trunk
        self.own = own  # the trunk is the critic's, and learns with it
        self.head = Weight(torch.zeros(trunk.spec.width + 1, device=trunk.device), matrix=False)

    def __call__(self, hidden_NM: Tensor) -> Tensor:
        """[N]. The head's gradient goes to its `grad`."""
        head = self.head.value.detach().double()
        if torch.is_grad_enabled():
            head = head.requires_grad_()
            head.register_hook(self._take)
        wide_NM = hidden_NM.double()
        # A product's sums would depend on how many rows there are: a value would have other bits in another pack.
        return (wide_NM * head[:-1]).sum(dim=1) / wide_NM.norm(dim=1) + head[-1]

    def _take(self, gradient: Tensor) -> None:
        assert self.head.grad is not None
        self.head.grad += gradient.float()

    def weights(self) -> Iterator[tuple[str, Weight]]:
        if self.own:
            yield from self.trunk.weights()
        yield HEAD, self.head

    def repack(self) -> None:
        if self.own:
            self.trunk.repack()


class ValueLoss(NamedTuple):
    """A microbatch's share of the batch's value loss."""

    loss: Tensor
    sums: dict[str, Tensor]  # means over the batch's trained tokens once summed, as LossResult's


class Critic:
    """Fills `values` before a step, learns from `returns` in it. A part of a run's checkpoint."""

    def __init__(self, trunk: Decoder, config: CriticConfig, learner: LearnerConfig, *, own: bool) -> None:
        self.config = config
        self.learner = learner
        self.model = ValueModel(trunk, own=own)
        self.optimiser = Optimiser(self.model, learner)
        self.rate = learner.lr if config.model_lr is None else config.model_lr
        self.steps = 0  # in which it has learned

    @property
    def warm(self) -> bool:
        """Whether the policy may learn from it."""
        return self.steps >= self.config.warmup_steps

    def credit(self, algo: AlgoConfig, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> tuple[Sample, ...]:
        """The samples with `values`, `returns` and `advantages` of their trained tokens."""
        if not samples:
            return ()

        def score(microbatch: Microbatch) -> Tensor:
            with torch.no_grad():
                batch = to_tensors(microbatch, self.model.trunk.device)
                return self.model(hidden_states(self.model.trunk, microbatch, batch))

        if algo.kl_in_reward:
            samples = [_charged(algo, sample) for sample in samples]
        return with_gae(algo, with_column("values", score, samples, prompts, self.learner.microbatch_tokens))

    def loss(self, microbatch: Microbatch, batch: MicrobatchTensors, hidden_NM: Tensor) -> ValueLoss:
        """`hidden_NM` are the policy's."""
        if self.model.own:
            hidden_NM = hidden_states(self.model.trunk, microbatch, batch, self._checkpointing)
        elif self.config.trunk_gradient == 0.0:
            hidden_NM = hidden_NM.detach()
        else:
            hidden_NM = _Scaled.apply(hidden_NM, self.config.trunk_gradient)
        value_N = self.model(hidden_NM)
        loss_N, clipped_N = clipped_value_loss(value_N, batch["values"], batch["returns"], self.config.clip)
        sums = {"value_loss": loss_N.detach().sum(), "value_clip_fraction": clipped_N.sum()}
        return ValueLoss(loss_N.sum() / batch.denominators.tokens, sums)

    @property
    def _checkpointing(self) -> bool:
        return self.learner.activation_checkpointing == "on"

    def apply(self) -> float:
        """One update; the gradient's norm before clipping."""
        norm = self.optimiser.grad_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm of the critic is {norm} at its update {self.optimiser.updates}; the loss was "
                "finite. The critic was not updated. Lower critic.lr"
                f"{' or critic.model_lr' if self.model.own else ''}."
            )
        self.optimiser.step(self.rate, norm, {HEAD: self.config.lr})
        return norm

    def state(self) -> dict[str, Any]:
        return {"updates": self.optimiser.updates, "steps": self.steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Counts; the tensors come from files of their own (train/checkpoint.py)."""
        self.optimiser.updates, self.steps = int(state["updates"]), int(state["steps"])


def _charged(algo: AlgoConfig, sample: Sample) -> Sample:
    """r_t - kl_weight KL(behaviour, reference)_t at each trained token; 0 of a token whose behaviour is not known."""
    columns = sample.columns
    mask = columns["loss_mask"]
    behaviour_N, reference_N = (torch.tensor(columns[name][mask]) for name in ("logprobs", "reference_logprobs"))
    kl_N = KL_ESTIMATORS[algo.kl](behaviour_N, reference_N)
    rewards = columns["step_rewards"].copy()
    rewards[mask] -= algo.kl_weight * torch.where(behaviour_N.isfinite(), kl_N, 0.0).numpy()
    return dataclasses.replace(sample, columns=columns.having(step_rewards=rewards))


def judged(samples: Sequence[Sample]) -> dict[str, float]:
    """Means of values and returns over the trained tokens, and 1 - Var(returns - values) / Var(returns), which is 0
    where the returns do not vary.

    1: the critic knew them; 0: no better than their mean; below: worse.
    """
    values, returns = (
        np.concatenate([sample.columns[name][sample.columns["loss_mask"]] for sample in samples])
        for name in ("values", "returns")
    )
    spread = float(np.var(returns))
    explained = 1.0 - float(np.var(returns - values)) / spread if spread > 0.0 else 0.0
    return {
        "explained_variance": explained,
        "values_mean": float(np.mean(values)),
        "returns_mean": float(np.mean(returns)),
    }
