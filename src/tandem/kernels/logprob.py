"""Log-probs and entropies of given tokens from hidden states, never holding all rows x vocabulary of logits.

Forward: ROWS rows at a time against the whole vocabulary, with the reduction that the sampler uses, so that the
learner's log-prob of a sampled token has the engine's bits. Backward: the logits again, COLUMNS of the
vocabulary at a time.

Where the sampler chose among a kept set (top-k, top-p, min-p), so does the distribution scored here: the logits outside
the set become -infinity before any reduction, as in the sampler, and their gradient is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.kernels.build import kernel
from tandem.kernels.choice import backend
from tandem.kernels.linear import accumulate, linear_reference, logits, pack_transposed, product
from tandem.kernels.sample import entropy, log_sum_exp
from tandem.kernels.weight import PANEL, Weight, padded
from tandem.types import kept_ids

ROWS = 128  # x 49,152 fp32 logits = 25 MB
COLUMNS = 4096  # of the vocabulary; a multiple of PANEL


@dataclass(frozen=True, slots=True, eq=False)
class KeptSets:
    """The sets that N targets were drawn from, as E pairs (row, id) in ascending order.

    >>> sets = KeptSets.build((b"", np.array([0, 2], np.uint32).tobytes()), torch.tensor([1, 2]))
    >>> sets.restrict(torch.zeros(2, 3), 0, 0).tolist()
    [[0.0, 0.0, 0.0], [0.0, -inf, 0.0]]
    """

    filters_N: Tensor  # bool: the row has a set; the others keep every token
    starts_N: tuple[int, ...]  # N + 1 boundaries of the rows' pairs
    rows_E: Tensor  # int32
    ids_E: Tensor  # int32

    @classmethod
    def build(cls, kept: tuple[bytes, ...], targets_N: Tensor) -> KeptSets:
        """From `types.kept_ids` bytes, b"" for a row without a set. AssertionError: a target lies outside its set."""
        assert len(kept) == len(targets_N), f"{len(kept)} kept sets for {len(targets_N)} targets"
        sizes_N = np.array([len(ids) // 4 for ids in kept], dtype=np.int64)
        ids_E = np.frombuffer(b"".join(kept), dtype=np.uint32).astype(np.int32)
        rows_E = np.repeat(np.arange(len(kept), dtype=np.int32), sizes_N)
        targets = targets_N.cpu().numpy()
        lost_N = sizes_N > 0
        lost_N[rows_E[ids_E == targets[rows_E]]] = False
        lost = np.flatnonzero(lost_N)
        assert not len(lost), (
            f"row {lost[0]}: target {targets[lost[0]]} is not among the {sizes_N[lost[0]]} tokens it was drawn from"
        )
        place = targets_N.device
        starts_N = (0, *np.cumsum(sizes_N).tolist())
        filters_N = torch.from_numpy(sizes_N > 0).to(place)
        return cls(filters_N, starts_N, torch.from_numpy(rows_E).to(place), torch.from_numpy(ids_E).to(place))

    def restrict(self, logits_SV: Tensor, row: int, first: int) -> Tensor:
        """-infinity, in place, outside the sets; `logits_SV` begins at row `row` and at token `first`."""
        rows, columns = logits_SV.shape
        pairs = slice(self.starts_N[row], self.starts_N[row + rows])
        rows_E, ids_E = self.rows_E[pairs] - row, self.ids_E[pairs] - first
        here_E = (ids_E >= 0) & (ids_E < columns)
        rows_E, ids_E = rows_E[here_E], ids_E[here_E]
        kept_E = logits_SV[rows_E, ids_E]
        logits_SV.masked_fill_(self.filters_N[row : row + rows, None], -torch.inf)
        logits_SV[rows_E, ids_E] = kept_E
        return logits_SV


def logprob_reference(
    hidden_NM: Tensor,
    weight_VM: Tensor,
    targets_N: Tensor,
    temperature: float,
    kept: tuple[bytes, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """All logits at once; differentiable in both inputs. Returns log-probs and entropies [N]."""
    wide = hidden_NM.dtype if hidden_NM.dtype == torch.float64 else torch.float32
    x_NV = hidden_NM.to(wide) @ weight_VM.to(wide).T / temperature
    dropped_NV = torch.zeros_like(x_NV, dtype=torch.bool)
    for row, ids in enumerate(kept or ()):
        if ids:
            dropped_NV[row] = True
            dropped_NV[row, list(kept_ids(ids))] = False
    logprobs_NV = x_NV.masked_fill(dropped_NV, -torch.inf).log_softmax(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV.masked_fill(dropped_NV, 0.0)).sum(-1)
    return logprobs_NV.gather(1, targets_N[:, None])[:, 0], entropy_N


def _forward(
    hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float, kept: KeptSets | None
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for start in range(0, hidden_NM.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        logits_SV = logits(hidden_NM[rows], weight)
        if kept is not None:
            logits_SV = kept.restrict(logits_SV, start, 0)
        temperature_S = torch.full((logits_SV.shape[0],), temperature)
        lse_S = log_sum_exp(logits_SV, temperature_S)
        target_S = logits_SV.gather(1, targets_N[rows, None])[:, 0] / temperature_S
        parts.append((target_S - lse_S, entropy(logits_SV, temperature_S), lse_S))
    logprobs, entropies, lse = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return logprobs, entropies, lse


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NM, weight, targets_N, temperature, kept):  # type: ignore[no-untyped-def]
        logprobs_N, entropy_N, lse_N = _forward(hidden_NM, weight, targets_N, temperature, kept)
        ctx.save_for_backward(hidden_NM, targets_N, lse_N)
        ctx.weight, ctx.temperature, ctx.kept = weight, temperature, kept
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx, grad_N, _entropy):  # type: ignore[no-untyped-def]
        hidden_NM, targets_N, lse_N = ctx.saved_tensors
        weight, dhidden_NM = ctx.weight, torch.zeros(hidden_NM.shape)
        grad_N = grad_N.float().contiguous()
        for first in range(0, weight.value.shape[0], COLUMNS):
            block_VM = weight.value[first : first + COLUMNS]
            dlogits_NV = _dlogits(hidden_NM, weight, first, (targets_N, lse_N, grad_N), ctx.temperature, ctx.kept)
            if weight.packed is None:
                dhidden_NM += dlogits_NV.float() @ block_VM.float()
            else:
                width = hidden_NM.shape[1]
                dhidden_NM += product(dlogits_NV, pack_transposed(block_VM), width, out_dtype=torch.float32)
            if weight.grad is not None:
                accumulate(weight.grad[first : first + COLUMNS], dlogits_NV, hidden_NM, weight.library)
        return dhidden_NM.to(hidden_NM.dtype), None, None, None, None


def _dlogits(
    hidden_NM: Tensor,
    weight: Weight,
    first: int,
    saved: tuple[Tensor, Tensor, Tensor],
    temperature: float,
    kept: KeptSets | None,
) -> Tensor:
    """Gradient at logits [first, first + COLUMNS), in hidden's dtype."""
    targets_N, lse_N, grad_N = saved
    block_VM = weight.value[first : first + COLUMNS]
    columns = block_VM.shape[0]
    run = kernel("logprob", "logprob_backward", hidden_NM.dtype, "pppppiiif")
    if run is None or weight.packed is None:
        logits_NV = linear_reference(hidden_NM, block_VM, out_dtype=torch.float32) / temperature
        if kept is not None:
            kept.restrict(logits_NV, 0, first)
        hot_NV = torch.arange(first, first + columns) == targets_N[:, None]
        grad_NV = grad_N[:, None] / temperature * (hot_NV.float() - (logits_NV - lse_N[:, None]).exp())
        return grad_NV.to(hidden_NM.dtype)
    start = first // PANEL * PANEL * padded(weight.value.shape[1], hidden_NM.dtype)
    logits_NV = product(hidden_NM, weight.packed[start:], columns, out_dtype=torch.float32)
    if kept is not None:
        kept.restrict(logits_NV, 0, first)
    out_NV = torch.empty(logits_NV.shape, dtype=hidden_NM.dtype)
    pointers = (t.data_ptr() for t in (logits_NV, lse_N, grad_N, targets_N, out_NV))
    run(*pointers, logits_NV.shape[0], columns, first, temperature)
    return out_NV


def token_logprobs(
    hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float, kept: tuple[bytes, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature)[target] and the entropy, each [N] fp32, nats.

    `kept`: of each row the ids that its target was drawn from (`types.kept_ids`; b"": all); the softmax and the entropy
    are over these alone, with the bits of a sampler that filtered. AssertionError: a target outside its set.
    The log-probs are differentiable (the weight's gradient goes to `weight.grad`); the entropies are measured only.
    """
    hidden_NM = hidden_NM.contiguous()
    sets = None if kept is None else KeptSets.build(kept, targets_N)
    if backend(hidden_NM) == "triton":
        from tandem.kernels.gpu import logprob as gpu

        return gpu.token_logprobs(hidden_NM, weight, targets_N, temperature, sets)
    if torch.is_grad_enabled() and hidden_NM.requires_grad:
        return _LogProb.apply(hidden_NM, weight, targets_N, temperature, sets)
    return _forward(hidden_NM, weight, targets_N, temperature, sets)[:2]
