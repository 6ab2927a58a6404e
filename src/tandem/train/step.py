"""The learner's step: samples to microbatches to gradients to one update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.algo.config import AlgoConfig
from tandem.algo.loss import LossResult, policy_loss, summarise
from tandem.algo.pack import PromptTotal, pack, split_updates
from tandem.algo.tensors import to_tensors
from tandem.errors import NonFiniteError
from tandem.kernels.logprob import token_logprobs
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.trace import Trace
from tandem.train.config import LearnerConfig
from tandem.train.optimiser import Optimiser
from tandem.types import Microbatch, Sample


@dataclass(frozen=True, slots=True)
class LearnerReport:
    """What a step's updates measured.

    >>> LearnerReport({"loss": 0.0}, 0.0, 0.0, 0, 0).microbatches
    0
    """

    metrics: dict[str, float]  # means over trained predictions and maxima, see algo.loss.summarise
    grad_norm: float  # before clipping; of the last update
    lr: float
    microbatches: int
    rows: int  # run forward and backward


def score(decoder: Decoder, microbatch: Microbatch, temperature: float) -> torch.Tensor:
    """Log-probs [N] of a microbatch's targets, without gradients."""
    with torch.no_grad():
        return _forward(decoder, microbatch, temperature, checkpointing=False)[0]


def _forward(
    decoder: Decoder, microbatch: Microbatch, temperature: float, checkpointing: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    view = PackView(microbatch.positions_T, microbatch.segments_S, microbatch.paths_S)
    tokens_T = torch.tensor(microbatch.tokens_T, dtype=torch.int64)
    rows_N = torch.tensor(microbatch.rows_N, dtype=torch.int64)
    targets_N = torch.tensor(microbatch.targets_N, dtype=torch.int64)
    hidden_NM = decoder.forward(tokens_T, view, rows_N, checkpointing=checkpointing)
    return token_logprobs(hidden_NM, decoder.head, targets_N, temperature)


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
    ) -> None:
        self.decoder = decoder
        self.config = config
        self.algo = algo
        self.temperature = temperature  # of the rollouts: the policy that is trained is the one sampled from
        self.total_updates = total_updates
        self.trace = trace or Trace()  # span "update": norm, clipping, AdamW and packing of the weights
        self.optimiser = Optimiser(decoder, config)

    def backward(self, microbatch: Microbatch) -> LossResult:
        """Add a microbatch's gradients. NonFiniteError, naming the samples, where its loss is not finite."""
        logprobs_N, entropy_N = _forward(
            self.decoder, microbatch, self.temperature, self.config.activation_checkpointing
        )
        result = policy_loss(self.algo, logprobs_N, to_tensors(microbatch), entropy_N)
        value = float(result.loss.detach())
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of a microbatch is {value}; its samples: {', '.join(microbatch.sample_ids)}. "
                "No update was made. Lower learner.lr, or look at these trajectories."
            )
        result.loss.backward()
        return result

    def _update(
        self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]
    ) -> tuple[list[LossResult], int, float, float]:
        microbatches = pack(samples, prompts, self.config.microbatch_tokens, self.config.share_prefix)
        self.optimiser.zero_grad()
        results = [self.backward(microbatch) for microbatch in microbatches]
        with self.trace.span("update"):
            norm, lr = self._apply(samples)
        return results, sum(len(microbatch.tokens_T) for microbatch in microbatches), norm, lr

    def _apply(self, samples: Sequence[Sample]) -> tuple[float, float]:
        norm = self.optimiser.grad_norm()
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm is {norm} at update {self.optimiser.updates}; the loss was finite. Samples: "
                f"{', '.join(sample.id for sample in samples)}. No update was made. Lower learner.lr, or compute in "
                "float32 with model.dtype."
            )
        lr = self.config.rate(self.optimiser.updates, self.total_updates)
        self.optimiser.step(lr, norm)
        return norm, lr

    def step(self, samples: Sequence[Sample], prompts: Sequence[PromptTotal]) -> LearnerReport | None:
        """`updates_per_step` updates on a batch; None where nothing has a gradient.

        `prompts` are the totals of the whole batch, untrained samples included. NonFiniteError leaves weights and
        optimiser as the last update left them.
        """
        results: list[LossResult] = []
        rows, norm, lr = 0, 0.0, 0.0
        for members, totals in split_updates(samples, prompts, self.algo.updates_per_step):
            part, some_rows, norm, lr = self._update(members, totals)
            results += part
            rows += some_rows
        return LearnerReport(summarise(results), norm, lr, len(results), rows) if results else None
