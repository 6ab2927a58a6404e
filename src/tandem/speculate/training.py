"""A drafter that learns what the model says, and how far an engine would follow it: the objective `drafter`.

Of a microbatch the model runs first, without gradients; the drafter reads its states and is compared with its
distributions, at the first step on the model's states and at those behind it on its own (speculate/steps.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tandem.algo.loss import LossResult, summarise
from tandem.algo.objective import Measured, Outputs, Own, Score, Watch
from tandem.algo.tensors import MicrobatchTensors
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.speculate.config import DrafterConfig
from tandem.speculate.losses import head_loss, teacher_of
from tandem.types import Denominators, Microbatch, Sample

NORMAL_95 = 1.959964  # half the width of a 95 % interval, in standard errors


class Module(Protocol):
    """A drafter on the target's states: eagle.py's, or block.py's."""

    ids_V: Tensor | None

    @property
    def head(self) -> Weight: ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the target, whose states it reads."""
        ...

    def weights(self) -> Iterator[tuple[str, Weight]]: ...

    def repack(self) -> None: ...

    def steps(self, microbatch: Microbatch, count: int) -> Any:
        """Its rows, for `unroll`; `begins_N` of them, bool: predictions that begin as many in a row."""
        ...

    def unroll(self, steps: Any, tapped_TLM: Tensor, tokens_T: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each step what the head reads of the predictions that it makes, [n, M], and which those are, [n]."""
        ...


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the learner trains and saves."""

    module: Module
    files: Callable[[Path, Any], None]

    def weights(self) -> Iterator[tuple[str, Weight]]:
        return self.module.weights()

    def repack(self) -> None:
        self.module.repack()

    def save(self, folder: Path) -> None:
        self.files(folder, self.module)


class DrafterObjective:
    """Trains a drafter's weights; the model's stay."""

    columns = frozenset({"tokens", "loss_mask"})

    def __init__(
        self, config: DrafterConfig, make: Callable[[Decoder], Module], save: Callable[[Path, Any], None]
    ) -> None:
        """make: the drafter of a model, called once the model is there. save: into a folder."""
        self.config, self._make, self._save = config, make, save
        self.temperature, self.samples, self.updates_per_step = config.temperature, config.on_policy, config.updates
        self.module: Module | None = None

    def beside(self, decoder: Decoder) -> Own:
        """The drafter of this model, which is this objective's from now on."""
        self.module = self._make(decoder)
        return _Saved(self.module, self._save)

    def begin(self) -> DrafterStep:
        return DrafterStep(self)

    def divisor(self, totals: Denominators) -> int:
        return totals.tokens


class _Lengths(NamedTuple):
    """Of one sample: drafts that stand of those that a chain of all steps makes, added up over where one can begin."""

    stood: float
    begun: int


class DrafterStep:
    """A step of it."""

    def __init__(self, objective: DrafterObjective) -> None:
        assert objective.module is not None, "no model has this drafter"
        self.module, self.config = objective.module, objective.config
        self._lengths: list[_Lengths] = []
        self._tapped: list[Tensor] = []
        self._steps: Any = None

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        return samples

    def meet(self, microbatch: Microbatch, batch: MicrobatchTensors) -> Watch:
        self._tapped, self._steps = [], self.module.steps(microbatch, self.config.steps)
        return self._see

    def _see(self, layer: int, hidden_TM: Tensor) -> None:
        if layer in self.module.layers:
            self._tapped.append(hidden_TM.detach())

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        """sum over steps k and the predictions that they make of decay^k loss, / tokens."""
        config, module = self.config, self.module
        teacher = teacher_of(outputs.hidden_NM, outputs.head, batch.targets_N, module.ids_V, config.temperature)
        total = torch.zeros((), dtype=torch.float64)
        match_KN = torch.zeros(config.steps, len(batch.targets_N), dtype=torch.float64)
        sums: dict[str, Tensor] = {"tokens": torch.tensor(float(len(batch.targets_N)), dtype=torch.float64)}
        tapped_TLM, self._tapped = torch.stack(self._tapped, 1), []
        for step, (hidden_nM, own_n) in enumerate(module.unroll(self._steps, tapped_TLM, batch.tokens_T)):
            rows = head_loss(config.loss, hidden_nM, module.head, teacher, own_n)
            total = total + config.decay**step * rows.loss_n.double().sum()
            match_KN[step, own_n] = rows.match_n.detach().double()
            if step == 0:
                sums["overlap"] = rows.overlap_n.detach().double().sum()
            sums[f"made_{step + 1}"] = torch.tensor(float(len(own_n)))
            sums[f"accept_{step + 1}"] = match_KN[step].sum()
        sums["coverage"] = teacher.covered_N.double().sum()
        self._lengths += _lengths(match_KN, self._steps.begins_N, batch)
        sums["total"], loss = total.detach(), total / batch.denominators.tokens
        return LossResult(loss, {"loss": loss.detach()} | sums, {}, None)

    def observe(self, *given: object) -> None: ...

    def accept(self, results: Sequence[LossResult], observed: Sequence[object]) -> bool:
        return True

    def measured(self, results: Sequence[LossResult]) -> Measured:
        """Means over the predictions of all updates; of acceptance over those that a step makes."""
        found = summarise(results)
        found["loss"] = found.pop("total")
        for step in range(1, self.config.steps + 1):
            made = found.pop(f"made_{step}", 0.0)
            value = found.pop(f"accept_{step}", 0.0)
            if made:
                found[f"accept_{step}"] = value / made
        return Measured(found | _told(self._lengths))


def _lengths(match_KN: Tensor, whole_N: Tensor, batch: MicrobatchTensors) -> list[_Lengths]:
    """Of each sample, over the chains that begin at `whole_N`. Noise is of its own at each position, so of one text the
    chance that drafts 1 to k stand is the product of theirs."""
    steps, count = match_KN.shape
    sample_N = batch.sample_N
    chain_N, stood_N = torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for step in range(steps):
        chain_N[: max(count - step, 0)] *= match_KN[step, step:]
        stood_N += chain_N
    samples = len(batch.sample_ids)
    stood_S = torch.zeros(samples, dtype=torch.float64).index_add_(0, sample_N, stood_N * whole_N)
    begun_S = torch.zeros(samples, dtype=torch.float64).index_add_(0, sample_N, whole_N.double())
    both = zip(stood_S.tolist(), begun_S.tolist(), strict=True)
    return [_Lengths(stood, int(begun)) for stood, begun in both if begun]


def _told(lengths: Sequence[_Lengths]) -> dict[str, float]:
    """`accepted_length`: tokens a step of the target gives, its own included, and its 95 % interval, by samples."""
    begun = sum(one.begun for one in lengths)
    if not begun:
        return {}
    mean, count = sum(one.stood for one in lengths) / begun, len(lengths)
    found = {"accepted_length": 1.0 + mean}
    if count > 1:
        squares = math.fsum((one.stood - mean * one.begun) ** 2 for one in lengths)
        error = NORMAL_95 * math.sqrt(squares * count / (count - 1)) / begun
        found |= {"accepted_length_low": 1.0 + mean - error, "accepted_length_high": 1.0 + mean + error}
    return found
