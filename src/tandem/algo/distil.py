"""A student that learns a teacher's distributions or hidden states: the objective `distil` (docs/distillation.md).

Of a microbatch the teacher runs first, over the same pack: prompts' rows are shared, and its states belong to the rows
that the student predicts from. All terms are sums over the trained tokens, divided by those of the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from tandem.algo.advantage import Selection
from tandem.algo.config import DistilConfig, Taught
from tandem.algo.credit import OF_TURNS
from tandem.algo.loss import LossResult, summarise
from tandem.algo.objective import Measured, Outputs, Score, Watch
from tandem.algo.pack import PromptTotal, count_predictions, merge_totals
from tandem.algo.spans import span_sums
from tandem.algo.tensors import MicrobatchTensors
from tandem.errors import CapacityError
from tandem.kernels.divergence import (
    KINDS,
    Divergence,
    Head,
    chosen_logits,
    head_divergence,
    shares,
    top_logprobs,
)
from tandem.kernels.linear import linear
from tandem.kernels.logprob import token_logprobs
from tandem.kernels.norm import rms_norm
from tandem.kernels.weight import Weight
from tandem.models.decoder import Decoder
from tandem.models.view import PackView
from tandem.types import Denominators, Group, Microbatch, Sample

LEAST_REST = 1e-6  # of the probability outside the top k: less is the rounding of a sum
SIGNS = ("positive", "negative")  # of distil_weights


def k1(logprobs_N: Tensor, teacher_N: Tensor) -> Tensor:
    """log p - log q. Its own gradient has expectation zero under p: as a loss it would do nothing."""
    return logprobs_N - teacher_N


def k2(logprobs_N: Tensor, teacher_N: Tensor) -> Tensor:
    """(log p - log q)^2 / 2, whose gradient is that of KL(p, q) under p."""
    return 0.5 * (logprobs_N - teacher_N).square()


def k3(logprobs_N: Tensor, teacher_N: Tensor) -> Tensor:
    """e^d - d - 1, d = log q - log p within [-20, 20], the value within [-10, 10], as verl's and XoRL's."""
    d_N = (teacher_N - logprobs_N).clamp(-20.0, 20.0)
    return (d_N.exp() - d_N - 1.0).clamp(-10.0, 10.0)


def straight_through(estimator: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Its value with the gradient of k2."""

    def estimate(logprobs_N: Tensor, teacher_N: Tensor) -> Tensor:
        moving_N = k2(logprobs_N, teacher_N)
        return estimator(logprobs_N, teacher_N).detach() + moving_N - moving_N.detach()

    return estimate


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1+": straight_through(k1),
    "k2": k2,
    "k3": k3,
    "k3+": straight_through(k3),
}
assert {*KINDS, *ESTIMATORS} == {*get_args(Taught)}, f"config.Taught names {get_args(Taught)}"


class _Distance(torch.autograd.Function):
    """Keeps the gradient of each row and not what it is made of."""

    @staticmethod
    def forward(ctx, own_NM, other_NM, kind):  # type: ignore[no-untyped-def]
        s, t = own_NM.float(), other_NM.float()
        if kind == "mse":
            gap = s - t
            value_N, unit = gap.square().mean(-1), 2.0 / s.shape[1] * gap
        else:
            size, other = s.norm(dim=-1, keepdim=True).clamp_min(1e-12), t.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            cosine = (s * t).sum(-1, keepdim=True) / (size * other)
            value_N, unit = 1.0 - cosine[:, 0], (cosine * s / size - t / other) / size
        ctx.save_for_backward(unit.to(own_NM.dtype))
        return value_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        (unit,) = ctx.saved_tensors
        return (grad_N[:, None].float() * unit.float()).to(unit.dtype), None, None


def distance(kind: str, own_NM: Tensor, other_NM: Tensor) -> Tensor:
    """Of each row, [N] fp32: 1 - cos(own, other), or the mean of their squared differences. Differentiable in own."""
    distance_N: Tensor = _Distance.apply(own_NM, other_NM.detach(), kind)
    return distance_N


def matched(layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Of each layer, the teacher's whose states it is drawn to: as deep by share; the last to the last.

    >>> matched(3, 6), matched(4, 2)
    ((1, 3, 5), (0, 0, 1, 1))
    """
    return tuple(-(-(index + 1) * teacher_layers // layers) - 1 for index in range(layers))


class _Lockstep:
    """A teacher's layers, run as far as the student's have come and `at_once` further; no more states are held."""

    def __init__(self, teacher: Decoder, batch: MicrobatchTensors, view: PackView, at_once: int) -> None:
        self._teacher, self._rows_N, self._view, self._at_once = teacher, batch.rows_N, view, at_once
        teacher.check_ids(batch.tokens_T, view)
        self._hidden_TM = teacher.embed.value[batch.tokens_T]
        self._done = 0  # layers
        self._held: dict[int, Tensor] = {}

    def _run(self) -> None:
        layers = self._teacher.layers[self._done : self._done + self._at_once]
        self._held = {}
        with torch.no_grad():
            for layer in layers:
                self._hidden_TM = layer.forward(self._hidden_TM, self._view, self._teacher.tables)
                self._held[layer.index] = self._hidden_TM[self._rows_N]
        self._done += len(layers)

    def state(self, layer: int) -> Tensor:
        """[N, M] behind a layer. Layers are asked for in their order."""
        assert self._done < len(self._teacher.layers) or layer in self._held, layer
        while layer not in self._held:
            self._run()
        return self._held[layer]

    def last(self) -> Tensor:
        """[N, M], what the head reads."""
        while self._done < len(self._teacher.layers):
            self._run()
        self._held = {}
        with torch.no_grad():
            return rms_norm(self._hidden_TM[self._rows_N], self._teacher.norm, self._teacher.spec.norm_eps)


class Kept(Protocol):
    """A teacher's log-probs that were stored (corpus/teacher.py)."""

    def filled(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """With `teacher_ids` and `teacher_logprobs`."""
        ...


class Distil:
    """A divergence from the teacher's distributions, a distance from its hidden states, and the texts themselves."""

    updates_per_step = 1

    def __init__(
        self,
        config: DistilConfig,
        load: Callable[[], Decoder | Kept],
        projectors: Sequence[Weight] = (),
        layers: Sequence[int] = (),
    ) -> None:
        """load: the teacher, or what was stored of one, when it is first needed. projectors: of the student's hidden
        states to the teacher's width, one (hidden=last) or one a layer; none where both are as wide. layers: the
        teacher's that each of the student's is drawn to (`matched`)."""
        self.config = config
        self.columns = frozenset({"tokens", "loss_mask"} | ({"spans", "span_logprobs"} if config.spans else set()))
        self.temperature = config.temperature
        self.samples = config.on_policy
        self.layers = tuple(layers)
        self.projectors = tuple(projectors)
        self._load = load

    @cached_property
    def source(self) -> Decoder | Kept:
        """The teacher, or what is stored of it."""
        return self._load()

    def weights(self) -> Iterator[tuple[str, Weight]]:
        yield from ((f"projector.{index}", weight) for index, weight in enumerate(self.projectors))

    def begin(self) -> DistilStep:
        return DistilStep(self)

    def divisor(self, totals: Denominators) -> int:
        return totals.tokens


class DistilStep:
    """A step of it."""

    def __init__(self, objective: Distil) -> None:
        self.objective, self.config = objective, objective.config
        source = None if objective.config.spans else objective.source  # that one has scored before the step
        self.teacher = source if isinstance(source, Decoder) else None
        self.kept = None if isinstance(source, Decoder) else source
        config = self.config
        kind = "forward" if config.of_tokens else config.divergence
        self.how = Divergence(kind, config.share, config.temperature)
        self._states: _Lockstep | None = None
        self._distances: list[Tensor] = []
        self._hidden_NM: Tensor | None = None  # the teacher's last, of the present microbatch

    def prepare(self, samples: tuple[Sample, ...], score: Score) -> tuple[Sample, ...]:
        return samples if self.kept is None else self.kept.filled(samples)

    def meet(self, microbatch: Microbatch, batch: MicrobatchTensors) -> Watch | None:
        """Run the teacher, or have it keep up with the student where its layers are wanted."""
        if self.teacher is None:
            return None
        view = PackView(microbatch.segments_S, microbatch.first_S, microbatch.parent_S, self.teacher.device)
        longest, most = int(view.positions_T.max()) + 1, self.teacher.spec.max_position
        if longest > most:
            raise CapacityError(
                f"one of {', '.join(microbatch.sample_ids)} has {longest} tokens and the teacher {most} positions. "
                "Leave such texts out, or choose a teacher of more positions."
            )
        if self.config.hidden == "layers":
            self._states = _Lockstep(self.teacher, batch, view, self.config.layers_at_once)
            self._distances = []
            return lambda layer, hidden_TM: self._see(layer, hidden_TM[batch.rows_N])
        with torch.no_grad():
            self._hidden_NM = self.teacher.forward(batch.tokens_T, view, batch.rows_N)
        return None

    def _see(self, layer: int, hidden_NM: Tensor) -> None:
        """A layer of the student's."""
        assert self._states is not None
        others_NM = self._states.state(self.objective.layers[layer])
        own_NM = self._projected(layer, hidden_NM)
        self._distances.append(distance(self.config.hidden_loss, own_NM, others_NM))

    def _projected(self, index: int, hidden_NM: Tensor) -> Tensor:
        projectors = self.objective.projectors
        return linear(hidden_NM.contiguous(), projectors[index]) if projectors else hidden_NM

    def _head(self) -> Head:
        """The teacher's, of the present microbatch."""
        assert self.teacher is not None
        if self._states is not None:
            self._hidden_NM, self._states = self._states.last(), None
        assert self._hidden_NM is not None
        return Head(self._hidden_NM, self.teacher.head)

    def loss(self, outputs: Outputs, batch: MicrobatchTensors) -> LossResult:
        """sum over tokens of weight x divergence + text_weight x -log p + hidden_weight x w x distance, / tokens."""
        config, tokens = self.config, batch.denominators.tokens
        count = torch.tensor(float(len(batch.targets_N)), dtype=torch.float64)
        sums: dict[str, Tensor] = {"tokens": count}
        total_N = torch.zeros(len(batch.targets_N), dtype=torch.float64, device=batch.targets_N.device)
        if self._joins(outputs):
            total_N = total_N + config.weight * self._whole(outputs, batch, sums, config.text_weight / config.weight)
            sums["text_loss"] = sums["nll"]
        else:
            if config.weight:
                divergence_N = self._divergence(outputs, batch, sums)
                sums["divergence"] = divergence_N.detach().sum()
                scale = 1.0 if config.of_tokens else config.temperature**2
                total_N = total_N + config.weight * scale * divergence_N
            if config.text_weight:
                texts_N = self._text_logprobs(outputs, batch).double()
                sums["text_loss"] = -texts_N.detach().sum()
                total_N = total_N - config.text_weight * texts_N
        if config.hidden != "none":
            total_N = total_N + config.hidden_weight * self._hidden(outputs, batch, sums)
        self._hidden_NM, self._states, self._distances = None, None, []
        loss = total_N.sum() / tokens
        return LossResult(loss, {"loss": loss.detach()} | sums, {}, None)

    def _joins(self, outputs: Outputs) -> bool:
        """Whether the texts' own term comes of the divergence's pass over the logits: of the same distribution."""
        config = self.config
        if self.teacher is None or config.of_tokens or config.top_k or not (config.weight and config.text_weight):
            return False
        return config.temperature == 1.0 and len(outputs.head.value) <= len(self.teacher.head.value)

    def _text_logprobs(self, outputs: Outputs, batch: MicrobatchTensors) -> Tensor:
        if self.config.temperature == 1.0:
            return outputs.logprobs_N
        return token_logprobs(outputs.hidden_NM, outputs.head, batch.targets_N, 1.0)[0]

    def _divergence(self, outputs: Outputs, batch: MicrobatchTensors, sums: dict[str, Tensor]) -> Tensor:
        """[N] fp64 nats, differentiable."""
        config = self.config
        if self.kept is not None:
            ids, logq = batch["teacher_ids"].long(), batch["teacher_logprobs"].double()
            return self._of_top(outputs, batch, ids, logq[:, :-1], logq[:, -1:])
        if config.spans:
            return self._of_spans(outputs, batch, sums)
        if not config.of_tokens and not config.top_k:
            return self._whole(outputs, batch, sums)
        head = self._head()
        if config.of_tokens:
            with torch.no_grad():
                teacher_N, _ = token_logprobs(head.hidden_NM, head.weight, batch.targets_N, config.temperature)
            sums |= {"nll": -outputs.logprobs_N.detach().double().sum(), "teacher_nll": -teacher_N.double().sum()}
            return ESTIMATORS[config.divergence](outputs.logprobs_N.double(), teacher_N.double())
        vocab = min(len(head.weight.value), len(outputs.head.value))
        ids, logq = top_logprobs(head, config.top_k, config.temperature, vocab)
        return self._of_top(outputs, batch, ids, logq.double(), rest_of(logq.double()))

    def _whole(self, outputs: Outputs, batch: MicrobatchTensors, sums: dict[str, Tensor], text: float = 0.0) -> Tensor:
        """The divergence over the whole vocabulary, and `text` times -log p of the targets."""
        how, own = dataclasses.replace(self.how, text=text), Head(outputs.hidden_NM, outputs.head)
        found = head_divergence(own, self._head(), batch.targets_N, how)
        divergence, logprobs, teacher, entropy = (one.double().sum() for one in found[1:])
        sums |= {"divergence": divergence, "nll": -logprobs, "teacher_nll": -teacher, "entropy": entropy}
        return found.loss_N.double()

    def _of_spans(self, outputs: Outputs, batch: MicrobatchTensors, sums: dict[str, Tensor]) -> Tensor:
        """An estimate of each span, at its last token."""
        own_S, places_S = span_sums(outputs.logprobs_N.double(), batch["spans"], batch.sample_N)
        teacher_S = batch["span_logprobs"][places_S]
        sums |= {"nll": -own_S.detach().sum(), "teacher_nll": -teacher_S.sum()}
        sums["spanned"] = (batch["spans"] >= 0).sum()
        divergence_S = ESTIMATORS[self.config.divergence](own_S, teacher_S)
        return torch.zeros_like(batch["span_logprobs"]).index_put((places_S,), divergence_S)

    def _of_top(
        self, outputs: Outputs, batch: MicrobatchTensors, ids_NK: Tensor, logq_NK: Tensor, rest_N1: Tensor
    ) -> Tensor:
        """Over the given tokens, and one that stands for all others; or over these renormalised."""
        targets_N1 = batch.targets_N[:, None]
        bucket = self.config.rest == "bucket"
        asked = torch.cat([targets_N1, ids_NK], 1) if bucket else ids_NK
        x = chosen_logits(outputs.hidden_NM, outputs.head, asked).double() / self.config.temperature
        if not bucket:
            return shares(self.how, x.log_softmax(-1), logq_NK.log_softmax(-1))[0].sum(-1)
        logp_NK = x[:, 1:] - x[:, :1] + outputs.logprobs_N.double()[:, None]
        logp = torch.cat([logp_NK, rest_of(logp_NK)], 1)
        return shares(self.how, logp, torch.cat([logq_NK, rest_N1], 1).log_softmax(-1))[0].sum(-1)

    def _hidden(self, outputs: Outputs, batch: MicrobatchTensors, sums: dict[str, Tensor]) -> Tensor:
        """w times the distance, [N] fp64."""
        if self.config.hidden == "layers":
            distance_N = torch.stack(self._distances).mean(0).double()
        else:
            own_NM = self._projected(0, outputs.hidden_NM)
            distance_N = distance(self.config.hidden_loss, own_NM, self._head().hidden_NM).double()
        weights_N = batch.get("distil_weights")
        weights_N = torch.ones_like(distance_N) if weights_N is None else weights_N
        for sign, chosen in zip(SIGNS, (weights_N > 0, weights_N < 0), strict=True):
            sums[f"hidden_{sign}"] = distance_N.detach()[chosen].sum()
            sums[f"share_{sign}"] = chosen.sum()
        return weights_N * distance_N

    def observe(self, *given: object) -> None: ...

    def accept(self, results: Sequence[LossResult], observed: Sequence[object]) -> bool:
        return True

    def measured(self, results: Sequence[LossResult]) -> Measured:
        """Means over the trained tokens; of hidden states, over those of positive and those of negative weight."""
        found = summarise(results)
        for sign in SIGNS:
            share, value = found.pop(f"share_{sign}", 0.0), found.pop(f"hidden_{sign}", 0.0)
            if share:
                found[f"hidden_{sign}"] = value / share
        return Measured(found)


def rest_of(logprobs_NK: Tensor) -> Tensor:
    """[N, 1]: the log of what these leave of 1."""
    return (1.0 - logprobs_NK.exp().sum(-1, keepdim=True)).clamp_min(LEAST_REST).log()


def taught(config: DistilConfig, groups: Sequence[Group]) -> Selection:
    """All sampled trajectories that did not fail, whatever they earned, with `distil_weights` where those differ."""
    samples, totals, fates = list[Sample](), list[PromptTotal](), dict[str, str]()
    for trajectory in (one for group in groups for one in group.trajectories):
        fate = "failed" if trajectory.failure is not None else "trained" if trajectory.num_sampled else "masked"
        fates[trajectory.id] = fate
        if fate != "trained":
            continue
        columns = trajectory.columns.without(*OF_TURNS)
        columns = columns.having(advantages=columns["loss_mask"].astype(np.float64))  # by which the ledger counts
        if config.bad_weight != 1.0:
            weight = 1.0 if trajectory.reward >= config.good_reward else config.bad_weight
            columns = columns.having(distil_weights=np.full(len(columns), weight))
        samples.append(Sample(trajectory.id, trajectory.prompt_id, columns))
        totals.append(PromptTotal(trajectory.prompt_id, count_predictions(columns), 1))
    return Selection(tuple(samples), merge_totals(totals), fates)
