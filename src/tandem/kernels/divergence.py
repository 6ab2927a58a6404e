"""How far a student's next-token distribution is from a teacher's, over the whole vocabulary or over given tokens; and
a distribution's most likely tokens.

The logits of both models are in memory for COMPARED_ROWS rows at a time; beyond that the forward pass keeps the
gradient at the student's logits, in the compute dtype, as logprob.py keeps its terms: of one model, N x V once. Where
that would take more than KEPT_BYTES it is computed again in the backward pass, SLAB rows at a time.

With p the student's probabilities, q the teacher's, both at the temperature T, m a mixture of share a:

    forward          sum q log(q / p)                              Hinton et al., arXiv 1503.02531
    reverse          sum p log(p / q)                              MiniLLM, arXiv 2306.08543
    jensen_shannon   a sum q log(q / m) + (1 - a) sum p log(p / m), m = a q + (1 - a) p      GKD, arXiv 2306.13649
    skewed_forward   sum q log(q / m), m = a q + (1 - a) p         DistiLLM, arXiv 2402.03898
    skewed_reverse   sum p log(p / m), m = a p + (1 - a) q         the same
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.kernels.address import address, check_range, rows_address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.gradient import accumulate_reference, wide_product
from tandem.kernels.large import large
from tandem.kernels.linear import logits
from tandem.kernels.logprob import BLOCK, kept_rows
from tandem.kernels.sizes import COMPARED_ROWS as ROWS
from tandem.kernels.sizes import SLAB
from tandem.kernels.weight import Weight, matrix_addresses, padded

KINDS = ("forward", "reverse", "jensen_shannon", "skewed_forward", "skewed_reverse")  # numbered as in divergence.cpp
LEAST = 1e-37  # of a mixture, whose parts are 0 where it is less
_RUN = "pipp" + "pipp" + "iiiii" + "fff" + "ppp" + "ii" + "pppp"
_TOP = "pipp" + "iii" + "f" + "i" + "ppp"


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which one, and of what.

    >>> Divergence("jensen_shannon").mix
    0.5
    """

    kind: str = "forward"  # of KINDS
    mix: float = 0.5  # a, of those that mix
    temperature: float = 1.0  # T, which divides both models' logits
    text: float = 0.0  # in the loss beside it, so much of -log p of the targets, at T


class Head(NamedTuple):
    """What a model's distributions are made of."""

    hidden_NM: Tensor  # normed
    weight: Weight


class Divergences(NamedTuple):
    """Of N rows, fp32, nats, at the temperature."""

    loss_N: Tensor  # differentiable: the divergence and how.text times -log p of the targets
    divergence_N: Tensor
    logprobs_N: Tensor  # the student's, of the targets
    teacher_logprobs_N: Tensor
    entropy_N: Tensor  # the student's

    @classmethod
    def of(
        cls, how: Divergence, divergence_N: Tensor, logprobs_N: Tensor, teacher_N: Tensor, entropy_N: Tensor
    ) -> Divergences:
        loss_N = divergence_N - how.text * logprobs_N if how.text else divergence_N.clone()
        return cls(loss_N, divergence_N, logprobs_N, teacher_N, entropy_N)


def shares(how: Divergence, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's share of the divergence, and u = p times its derivative by p up to a constant times p.

    The gradient at the student's logits (over T) is u - p sum(u). Differentiable in `logp`, of a distribution.
    """
    p, q, a = logp.exp(), logq.exp(), how.mix
    if how.kind == "forward":
        return q * (logq - logp), -q
    if how.kind == "reverse":
        own = p * (logp - logq)
        return own, own
    m = (a * p + (1 - a) * q if how.kind == "skewed_reverse" else a * q + (1 - a) * p).clamp_min(LEAST)
    if how.kind == "jensen_shannon":
        own = (1 - a) * p * (logp - m.log())
        return a * q * (logq - m.log()) + own, own
    if how.kind == "skewed_forward":
        return q * (logq - m.log()), -(1 - a) * p * q / m
    gap = logp - m.log()
    return p * gap, p * (gap - a * p / m)


def divergence_reference(student_NV: Tensor, teacher_NV: Tensor, how: Divergence) -> Tensor:
    """[N], of logits; differentiable in the student's."""
    logp, logq = ((x / how.temperature).log_softmax(-1) for x in (student_NV, teacher_NV))
    return shares(how, logp, logq)[0].sum(-1)


class _Given(NamedTuple):
    """A head as a compiled function takes it."""

    given: tuple[int | None, ...]  # address and stride of the rows, the matrix's addresses
    depth: int
    held_NM: Tensor  # for as long as its address is used


def _addresses(head: Head) -> _Given:
    (rows, width), dtype = head.hidden_NM.shape, head.hidden_NM.dtype
    depth = padded(width, dtype)
    even_NM = head.hidden_NM if depth == width else torch.nn.functional.pad(head.hidden_NM, (0, depth - width))
    return _Given(
        (rows_address(even_NM, dtype, rows, depth), even_NM.stride(0), *matrix_addresses(head.weight)), depth, even_NM
    )


def _ready(weight: Weight) -> bool:
    """Whether compiled functions can read a head."""
    return backend(weight.value) != "triton" and (weight.packed is not None or weight.codes is not None)


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """Rows of a student and of its teacher. Over the ids that both have, where one head is padded further."""

    student: Head
    teacher: Head
    targets_N: Tensor
    how: Divergence

    @property
    def vocab(self) -> int:
        return min(len(self.student.weight.value), len(self.teacher.weight.value))

    def rows(self, chosen: slice) -> _Pair:
        own, other = (Head(head.hidden_NM[chosen], head.weight) for head in (self.student, self.teacher))
        return _Pair(own, other, self.targets_N[chosen], self.how)

    def __len__(self) -> int:
        return len(self.targets_N)

    @property
    def compiled(self) -> bool:
        ready = _ready(self.student.weight) and _ready(self.teacher.weight)
        same = self.student.hidden_NM.dtype == self.teacher.hidden_NM.dtype
        return same and ready and kernel("divergence", "divergence", self.student.hidden_NM.dtype, _RUN) is not None

    def chunks(self) -> Iterator[tuple[slice, _Pair]]:
        for start in range(0, len(self), ROWS):
            chosen = slice(start, min(len(self), start + ROWS))
            yield chosen, self.rows(chosen)

    def logprobs(self) -> tuple[Tensor, Tensor]:
        """Of student and teacher, [N, V] fp32."""
        wide = (logits(head.hidden_NM, head.weight)[:, : self.vocab] for head in (self.student, self.teacher))
        logp, logq = ((x / self.how.temperature).log_softmax(-1) for x in wide)
        return logp, logq

    def run(self, dlogits: Tensor | None) -> Divergences:
        """`dlogits` [C, N, B] is filled with the gradients at the student's logits over T, where it is given."""
        if not self.compiled:
            return self._reference()
        for head in (self.student, self.teacher):
            given, wanted = tuple(head.hidden_NM.shape), (len(self), head.weight.value.shape[1])
            assert given == wanted, (given, wanted)
        found = [torch.empty(len(self)) for _ in Divergences._fields[1:]]
        check_range(self.targets_N, self.vocab, "targets")
        blocks = -(-self.vocab // BLOCK)
        room = large(2 * blocks * min(ROWS, len(self)) * BLOCK, dtype=torch.float32)
        for chosen, chunk in self.chunks():
            chunk._compute(chosen.start, len(self), self.targets_N, room, dlogits, found)
        return Divergences.of(self.how, *found)

    def _compute(
        self,
        first: int,
        every: int,
        targets_N: Tensor,
        room: Tensor,
        dlogits: Tensor | None,
        found: Sequence[Tensor],
    ) -> None:
        """The rows from `first` on of `every`; `found` as Divergences.of takes them."""
        dtype, rows, blocks = self.student.hidden_NM.dtype, len(self), -(-self.vocab // BLOCK)
        run = kernel("divergence", "divergence", dtype, _RUN)
        assert run is not None
        own, others = _addresses(self.student), _addresses(self.teacher)
        run(
            *own.given,
            *others.given,
            *(rows, self.vocab, own.depth, others.depth),
            *(KINDS.index(self.how.kind), self.how.mix, self.how.temperature, self.how.text),
            address(targets_N, torch.int64, every),
            room.data_ptr(),
            address(dlogits, dtype, blocks, every, BLOCK),
            *(first, every),
            *(address(one_N, torch.float32, every) for one_N in found),
        )

    def _reference(self) -> Divergences:
        parts = []
        for _, chunk in self.chunks():
            logp, logq = chunk.logprobs()
            target = chunk.targets_N[:, None]
            divergence_N = shares(self.how, logp, logq)[0].sum(-1)
            own, other = (x.gather(1, target)[:, 0] for x in (logp, logq))
            parts.append((divergence_N, own, other, -(logp.exp() * logp).sum(-1)))
        if not parts:
            return Divergences(*(torch.empty(0, device=self.targets_N.device) for _ in Divergences._fields))
        return Divergences.of(self.how, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def room(self) -> Tensor:
        """For the gradients at the logits."""
        blocks = -(-self.vocab // BLOCK)
        rows, dtype = len(self), self.student.hidden_NM.dtype
        return large(blocks * rows * BLOCK, dtype=dtype).view(blocks, rows, BLOCK)

    def backward(self, dlogits: Tensor, factors_N: Tensor, dhidden_NM: Tensor) -> None:
        """Add the gradients of the hidden states, and of the weight to `weight.grad`."""
        hidden_NM, weight = self.student
        dtype, (rows, width), vocab = hidden_NM.dtype, hidden_NM.shape, self.vocab
        run = kernel("divergence", "divergence_backward", dtype, "pppppp" + "iii")
        assert run is not None
        run(
            address(dlogits, dtype, -(-vocab // BLOCK), rows, BLOCK),
            address(factors_N, torch.float32, rows),
            address(hidden_NM, dtype, rows, width),
            address(weight.value[:vocab], dtype, vocab, width),
            address(dhidden_NM, torch.float32, rows, width),
            address(None if weight.grad is None else weight.grad[:vocab], torch.float32, vocab, width),
            *(rows, vocab, width),
        )

    def reference_backward(self, factors_N: Tensor, dhidden_NM: Tensor) -> None:
        """As `backward`, by torch's products, from the logits again."""
        weight, vocab = self.student.weight, self.vocab
        for chosen, chunk in self.chunks():
            logp, logq = chunk.logprobs()
            drift = shares(self.how, logp, logq)[1]
            drift.scatter_add_(1, chunk.targets_N[:, None], torch.full_like(drift[:, :1], -self.how.text))
            dlogits = factors_N[chosen, None] * (drift - logp.exp() * drift.sum(-1, keepdim=True))
            dlogits = dlogits.to(chunk.student.hidden_NM.dtype)
            dhidden_NM[chosen] += wide_product(dlogits, weight.value[:vocab])
            if weight.grad is not None:
                accumulate_reference(weight.grad[:vocab], dlogits, chunk.student.hidden_NM)


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NM, pair):  # type: ignore[no-untyped-def]
        whole = kept_rows(len(pair), pair.vocab, hidden_NM.element_size()) == len(pair)
        dlogits = pair.room() if pair.compiled and whole else None
        found = pair.run(dlogits)
        ctx.pair, ctx.dlogits = pair, dlogits
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    def backward(ctx, grad_N, *_others):  # type: ignore[no-untyped-def]
        pair, dlogits = ctx.pair, ctx.dlogits
        hidden_NM = pair.student.hidden_NM
        dhidden_NM = torch.zeros(hidden_NM.shape, device=hidden_NM.device)
        factors_N = (grad_N.float() / pair.how.temperature).contiguous()
        if not pair.compiled:
            pair.reference_backward(factors_N, dhidden_NM)
        elif dlogits is not None:
            pair.backward(dlogits, factors_N, dhidden_NM)
        else:
            for start in range(0, len(pair), SLAB):
                slab = slice(start, start + SLAB)
                part = pair.rows(slab)
                again = part.room()
                part.run(again)
                part.backward(again, factors_N[slab], dhidden_NM[slab])
        ctx.dlogits = None
        return dhidden_NM.to(hidden_NM.dtype), None


def head_divergence(student: Head, teacher: Head, targets_N: Tensor, how: Divergence) -> Divergences:
    """Each row's divergence [N], fp32 nats, over the ids that both heads have; with log-probs of the targets among
    these.

    Differentiable in the student's hidden states; its head's gradient goes to `weight.grad`. The teacher gets none.
    AssertionError: a target that one of the two does not have.
    """
    rows = len(student.hidden_NM), len(teacher.hidden_NM), len(targets_N)
    assert len(set(rows)) == 1, f"{rows[0]} rows of the student, {rows[1]} of the teacher, {rows[2]} targets"
    student = Head(student.hidden_NM.contiguous(), student.weight)
    detached = Head(student.hidden_NM.detach(), student.weight)
    pair = _Pair(detached, Head(teacher.hidden_NM.detach().contiguous(), teacher.weight), targets_N, how)
    if torch.is_grad_enabled() and student.hidden_NM.requires_grad:
        return Divergences(*_HeadDivergence.apply(student.hidden_NM, pair))
    with torch.no_grad():
        return pair.run(None)


def top_logprobs(head: Head, count: int, temperature: float, vocab: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely ids of each row, the likeliest first and of equals that of the lower id, and their
    log-probs: [N, K] int64, [N, K] fp32.

    The distribution is over the first `vocab` ids. Without gradients.
    """
    hidden_NM, weight = head.hidden_NM.detach().contiguous(), head.weight
    assert 0 < count <= vocab <= len(weight.value), (count, vocab, weight.value.shape)
    rows, device = len(hidden_NM), hidden_NM.device
    ids_NK = torch.empty(rows, count, dtype=torch.int64, device=device)
    logprobs_NK = torch.empty(rows, count, device=device)
    run = kernel("divergence", "top_tokens", hidden_NM.dtype, _TOP) if _ready(weight) else None
    room = large(-(-vocab // BLOCK) * min(ROWS, max(rows, 1)) * BLOCK, dtype=torch.float32) if run else None
    for start in range(0, rows, ROWS):
        some = slice(start, start + ROWS)
        chunk = Head(hidden_NM[some], weight)
        if run is None:
            ids_NK[some], logprobs_NK[some] = _top_reference(chunk, count, temperature, vocab)
            continue
        assert room is not None
        own, to = _addresses(chunk), (ids_NK[some], logprobs_NK[some])
        places = (one.data_ptr() for one in (room, *to))
        run(*own.given, len(chunk.hidden_NM), vocab, own.depth, temperature, count, *places)
    return ids_NK, logprobs_NK


def _top_reference(head: Head, count: int, temperature: float, vocab: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        x = logits(*head)[:, :vocab] / temperature
        top, at = x.sort(dim=-1, descending=True, stable=True)
        return at[:, :count], top[:, :count] - x.logsumexp(-1, keepdim=True)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NM, weight, ids_NK):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(hidden_NM, ids_NK)
        ctx.weight = weight
        out_NK = torch.empty(ids_NK.shape, device=hidden_NM.device)
        for start in range(0, len(ids_NK), ROWS):
            rows = slice(start, start + ROWS)
            out_NK[rows] = torch.bmm(weight.value[ids_NK[rows]].float(), hidden_NM[rows].float()[:, :, None])[..., 0]
        return out_NK

    @staticmethod
    def backward(ctx, grad_NK):  # type: ignore[no-untyped-def]
        hidden_NM, ids_NK = ctx.saved_tensors
        weight, dhidden_NM = ctx.weight, torch.empty(hidden_NM.shape, device=hidden_NM.device)
        for start in range(0, len(ids_NK), ROWS):
            rows = slice(start, start + ROWS)
            ids, hidden, grad = ids_NK[rows], hidden_NM[rows].float(), grad_NK[rows].float()
            dhidden_NM[rows] = torch.bmm(grad[:, None], weight.value[ids].float())[:, 0]
            if weight.grad is not None:
                own = (grad[:, :, None] * hidden[:, None]).flatten(0, 1)
                if hidden.is_cuda:  # index_add_ would add in another order each time
                    weight.grad.index_put_((ids.flatten(),), own, accumulate=True)
                else:
                    weight.grad.index_add_(0, ids.flatten(), own)
        return dhidden_NM.to(hidden_NM.dtype), None, None


def chosen_logits(hidden_NM: Tensor, weight: Weight, ids_NK: Tensor) -> Tensor:
    """hidden W^T at `ids_NK` alone, [N, K] fp32. Differentiable; the weight's gradient goes to `weight.grad`."""
    logits_NK: Tensor = _Gathered.apply(hidden_NM.contiguous(), weight, ids_NK)
    return logits_NK
