"""What a drafter is trained by: of each row the target's distribution p, which may have tokens that the drafter lacks,
and the drafter's q, both at one temperature.

p is normalised over the target's whole vocabulary, so over the drafter's own it sums to what that covers. A draft
stands where both draw the same token from the same Gumbel noise (docs/speculation.md), so of a text's token y:

    P(the draft is y | the target draws y) = 1 / sum over v of max(p_v, q_v p_y / q_y)

(an exponential race: y comes first in both). It is 0 where the drafter lacks y. Its mean over y is at least
(1 - TV) / (1 + TV) (Daliri, Musco, Suresh, arXiv 2408.07978), TV = 1 - sum min(p, q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from tandem.kernels.gradient import add_gradient, input_gradient
from tandem.kernels.linear import logits
from tandem.kernels.weight import Weight
from tandem.models.recompute import recompute
from tandem.speculate.config import DraftLoss

ROWS = 256  # whose logits and gradients are in memory at once
SHARPNESS = 3.0  # of the hybrid's weight: exp(-3 alpha), arXiv 2602.23881
LEAST = 1e-12  # of an overlap whose logarithm is taken


class Pair(NamedTuple):
    """n rows. Log-probs are fp32 nats over the drafter's V tokens."""

    logp_nV: Tensor  # the target's, which sum to at most 1
    logq_nV: Tensor  # the drafter's
    place_n: Tensor  # int64: of the text's token among the V; -1: the drafter lacks it

    @property
    def known_n(self) -> Tensor:
        return self.place_n >= 0

    def of_text(self, log_nV: Tensor) -> Tensor:
        """[n], of the text's tokens; of another one where the drafter lacks them."""
        return log_nV.gather(1, self.place_n.clamp_min(0)[:, None])[:, 0]


def overlap(pair: Pair) -> Tensor:
    """sum over v of min(p_v, q_v), [n]: the chance that a draft of q stands under p/q rejection."""
    return torch.minimum(pair.logp_nV, pair.logq_nV).exp().sum(-1)


def log_match(pair: Pair) -> Tensor:
    """log of P(the draft is y | the target draws y), [n]; of rows whose y the drafter lacks a number without meaning.

    What the drafter lacks has q 0, so of max(p, q p_y / q_y) it adds p.
    """
    ratio_n1 = (pair.of_text(pair.logp_nV) - pair.of_text(pair.logq_nV))[:, None]
    inside_n = torch.maximum(pair.logp_nV, pair.logq_nV + ratio_n1).logsumexp(-1)
    outside_n = (1.0 - pair.logp_nV.exp().sum(-1)).clamp_min(LEAST).log()
    return -torch.logaddexp(inside_n, outside_n)


def cross_entropy(pair: Pair) -> Tensor:
    """-log q(y)."""
    return -pair.of_text(pair.logq_nV) * pair.known_n


def kl(pair: Pair) -> Tensor:
    """m KL(p / m, q), m what the drafter's tokens cover: sum of p log(p / q), less m log m: 0 at best."""
    p_nV = pair.logp_nV.exp()
    covered_n = p_nV.sum(-1).clamp_min(LEAST)
    return (p_nV * (pair.logp_nV - pair.logq_nV)).sum(-1) - covered_n * covered_n.log()


def total_variation(pair: Pair) -> Tensor:
    """1 - sum min(p, q). Where nothing overlaps it has no gradient."""
    return 1.0 - overlap(pair)


def likelihood(pair: Pair) -> Tensor:
    """-log sum min(p, q): LK's alpha (arXiv 2602.23881)."""
    return -overlap(pair).clamp_min(LEAST).log()


def hybrid(pair: Pair) -> Tensor:
    """w KL + (1 - w)(1 - alpha), w = exp(-3 alpha) without a gradient: LK's lambda (arXiv 2602.23881)."""
    alpha_n = overlap(pair)
    weight_n = (-SHARPNESS * alpha_n.detach()).exp()
    return weight_n * kl(pair) + (1.0 - weight_n) * (1.0 - alpha_n)


def matched(pair: Pair) -> Tensor:
    """-log P(the draft is y | the target draws y): of what an engine here does with drafts."""
    return -log_match(pair) * pair.known_n


LOSSES: Mapping[str, Callable[[Pair], Tensor]] = {
    "ce": cross_entropy,
    "kl": kl,
    "tv": total_variation,
    "lk": likelihood,
    "lk_hybrid": hybrid,
    "match": matched,
}
assert {*LOSSES} == {*get_args(DraftLoss)}, f"config.DraftLoss names {get_args(DraftLoss)}, here: {[*LOSSES]}"


class _HeadLogits(torch.autograd.Function):
    """[n, V] in fp32, differentiable."""

    @staticmethod
    def forward(ctx, hidden_nM, weight):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        ctx.save_for_backward(hidden_nM)
        return logits(hidden_nM, weight)

    @staticmethod
    def backward(ctx, dlogits_nV):  # type: ignore[no-untyped-def]
        (hidden_nM,) = ctx.saved_tensors
        narrow_nV = dlogits_nV.to(hidden_nM.dtype).contiguous()
        add_gradient(ctx.weight, narrow_nV, hidden_nM)
        return input_gradient(narrow_nV, ctx.weight), None


class Teacher(NamedTuple):
    """The target's word on N rows."""

    logp_NV: Tensor  # fp32 nats over the drafter's tokens, normalised over all of the target's
    place_N: Tensor  # int64: of each text's token; -1: the drafter lacks it
    temperature: float

    @property
    def covered_N(self) -> Tensor:
        """Of the target's probability, what the drafter's tokens have."""
        return self.logp_NV.exp().sum(-1)


def teacher_of(hidden_NM: Tensor, head: Weight, targets_N: Tensor, ids_V: Tensor | None, temperature: float) -> Teacher:
    """hidden_NM: what the target's head reads; ids_V: the drafter's tokens, ascending, None: all."""
    vocab = len(head.value)
    place_of = torch.full((vocab,), -1) if ids_V is not None else torch.arange(vocab)
    if ids_V is not None:
        place_of[ids_V] = torch.arange(len(ids_V))
    parts = list[Tensor]()
    with torch.no_grad():
        for rows_nM in hidden_NM.split(ROWS):
            x_nV = logits(rows_nM, head).div_(temperature)
            total_n1 = x_nV.logsumexp(-1, keepdim=True)
            parts.append((x_nV if ids_V is None else x_nV[:, ids_V]).sub_(total_n1))
    logp_NV = torch.cat(parts) if parts else torch.empty(0, vocab if ids_V is None else len(ids_V))
    return Teacher(logp_NV, place_of[targets_N], temperature)


class Rows(NamedTuple):
    """Of n rows."""

    loss_n: Tensor  # nats, or without a unit; has a gradient
    overlap_n: Tensor
    match_n: Tensor  # P(the draft stands | the text's token), 0 where the drafter lacks that


def head_loss(kind: str, hidden_nM: Tensor, head: Weight, teacher: Teacher, own_n: Tensor) -> Rows:
    """A loss of LOSSES between what the drafter's head reads and the target's word on the rows `own_n`. No logits are
    kept: the backward pass computes them again."""

    def of(rows_nM: Tensor, own_n: Tensor) -> Tensor:
        logq_nV = (_HeadLogits.apply(rows_nM, head) / teacher.temperature).log_softmax(-1)
        pair = Pair(teacher.logp_NV[own_n], logq_nV, teacher.place_N[own_n])
        told = overlap(pair).detach(), log_match(pair).detach().exp() * pair.known_n
        return torch.stack([LOSSES[kind](pair), *told], 1)

    parts = zip(hidden_nM.split(ROWS), own_n.split(ROWS), strict=True)
    found = [recompute(partial(of, own_n=some_n), rows_nM) for rows_nM, some_n in parts]
    return Rows(*(torch.cat(found) if found else torch.empty(0, 3)).unbind(1))
