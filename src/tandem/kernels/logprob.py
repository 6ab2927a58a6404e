"""Log-probs and entropies of given tokens from hidden states, never holding fp32 logits of all rows x vocabulary.

Forward: a block of 256 logits lives in the cache (head.h), with the reduction that the sampler uses, so that the
learner's log-prob of a sampled token has the engine's bits. Backward: from e^(x - m) of every row and token, m the
maximum of its block, which the forward keeps, rounded to the compute dtype: the logits are computed once. Where that
would take more than KEPT_BYTES it is computed again, SLAB rows at a time.

Where the sampler chose among a kept set (top-k, top-p, min-p), so does the distribution scored here: the logits outside
the set become -infinity before any reduction, as in the sampler, and their gradient is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.kernels.address import address, check_range, rows_address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.gradient import accumulate_reference, wide_product
from tandem.kernels.large import large
from tandem.kernels.linear import logits, narrowed
from tandem.kernels.mask import mask_table
from tandem.kernels.sample import statistics
from tandem.kernels.sizes import KEPT_BYTES, SLAB
from tandem.kernels.weight import Weight, matrix_addresses, padded
from tandem.types import is_mask, kept_ids

BLOCK = 256  # tokens, as in sample.h
ROWS, COLUMNS = 128, 4096  # of the logits at once where no kernel is compiled
GPU_ROWS, GPU_COLUMNS = 512, 8192  # 512 rows x 151,936 fp32 logits = 311 MB
_SCORE = "pippiii" + "ppppppi" + "ppppp" + "i"


@dataclass(frozen=True, slots=True, eq=False)
class KeptSets:
    """The sets that N targets were drawn from, as E pairs (row, id) in ascending order; those that are masks, as these.

    Rows with the same mask share it, so that a text of one constraint costs a number a token.

    >>> sets = KeptSets.build((b"", np.array([0, 2], np.uint32).tobytes()), torch.tensor([1, 2]))
    >>> sets.restrict(torch.zeros(2, 3), 0, 0).tolist()
    [[0.0, 0.0, 0.0], [0.0, -inf, 0.0]]
    """

    filters_N: Tensor  # bool: the row has pairs; the others have a mask or keep every token
    starts_N: tuple[int, ...]  # N + 1 boundaries of the rows' pairs
    rows_E: Tensor  # int32
    ids_E: Tensor  # int32
    numbers_N: Tensor  # int32: which mask a row has; -1: none
    masks_UW: Tensor  # int32: the bits of 32 tokens, the lowest first

    @classmethod
    def build(cls, kept: Sequence[bytes], targets_N: Tensor) -> KeptSets:
        """From `types.kept_ids` bytes, b"" for a row without a set. AssertionError: a target lies outside its set."""
        assert len(kept) == len(targets_N), f"{len(kept)} kept sets for {len(targets_N)} targets"
        masks = [ids if is_mask(ids) else b"" for ids in kept]
        vocab = max([8 * (len(mask) - 1) for mask in masks], default=0)
        table = mask_table(masks, vocab) if vocab > 0 else None
        kept = [b"" if is_mask(ids) else ids for ids in kept]
        sizes_N = np.array([len(ids) // 4 for ids in kept], dtype=np.int64)
        ids_E = np.frombuffer(b"".join(kept), dtype=np.uint32).astype(np.int32)
        rows_E = np.repeat(np.arange(len(kept), dtype=np.int32), sizes_N)
        targets = targets_N.cpu().numpy()
        ascending_E = (np.diff(ids_E) > 0) | (np.diff(rows_E) > 0)
        assert ascending_E.all(), f"the kept set of row {rows_E[:-1][~ascending_E][0]} is not in ascending order"
        lost_N = sizes_N > 0
        lost_N[rows_E[ids_E == targets[rows_E]]] = False
        lost = np.flatnonzero(lost_N)
        assert not len(lost), (
            f"row {lost[0]}: target {targets[lost[0]]} is not among the {sizes_N[lost[0]]} tokens it was drawn from"
        )
        place = targets_N.device
        starts_N = (0, *np.cumsum(sizes_N).tolist())
        numbers_N, masks_UW = np.full(len(kept), -1, np.int32), np.zeros((0, 0), np.int32)
        if table is not None:
            numbers_N, masks_UW = table.numbers_S, table.words_UW.view(np.int32)
            rows = np.flatnonzero(numbers_N >= 0)
            lost = rows[masks_UW[numbers_N[rows], targets[rows] // 32] >> targets[rows] % 32 & 1 == 0]
            assert not len(lost), f"row {lost[0]}: target {targets[lost[0]]} is not in the mask that it was drawn from"
        arrays = (sizes_N > 0, rows_E, ids_E, numbers_N, masks_UW)
        filters_N, *others = (torch.from_numpy(array).to(place) for array in arrays)
        return cls(filters_N, starts_N, *others)

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
        if len(self.masks_UW):
            masked_R = (self.numbers_N[row : row + rows] >= 0).nonzero()[:, 0]
            tokens_V = torch.arange(first, first + columns, device=logits_SV.device)
            words_RV = self.masks_UW[self.numbers_N[row + masked_R].long()][:, tokens_V // 32]
            logits_SV[masked_R] = logits_SV[masked_R].masked_fill(words_RV >> tokens_V % 32 & 1 == 0, -torch.inf)
        return logits_SV

    def rows(self, chosen: slice) -> KeptSets:
        """The sets of a run of rows."""
        starts_N = self.starts_N[chosen.start : chosen.stop + 1]
        first, last = starts_N[0], starts_N[-1]
        rows_E, ids_E = self.rows_E[first:last] - chosen.start, self.ids_E[first:last]
        starts = tuple(start - first for start in starts_N)
        return KeptSets(self.filters_N[chosen], starts, rows_E, ids_E, self.numbers_N[chosen], self.masks_UW)


def logprob_reference(
    hidden_NM: Tensor,
    weight_VM: Tensor,
    targets_N: Tensor,
    temperature: float,
    kept: Sequence[bytes] | None = None,
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


class Scores(NamedTuple):
    """Of N rows, in fp32; NaN where a row is not finite."""

    logprobs_N: Tensor
    entropy_N: Tensor
    lse_N: Tensor


class Terms(NamedTuple):
    """e^(x - m) of every row and token, x the logit over the temperature and m the largest of its block of tokens."""

    terms_CNB: Tensor  # C blocks of B tokens, the last one filled up with zeros; in the compute dtype
    maxima_CN: Tensor  # fp32

    @classmethod
    def room(cls, rows: int, weight: Weight) -> Terms:
        blocks, dtype = -(-weight.value.shape[0] // BLOCK), weight.value.dtype
        return cls(large(blocks * rows * BLOCK, dtype=dtype).view(blocks, rows, BLOCK), torch.empty(blocks, rows))


def kept_rows(rows: int, vocab: int, itemsize: int) -> int:
    """Rows whose terms are in memory at once in the backward pass: all, or SLAB where they would exceed KEPT_BYTES."""
    return rows if rows * vocab * itemsize <= KEPT_BYTES else min(rows, SLAB)


def _compiled(weight: Weight) -> bool:
    ready = backend(weight.value) != "triton" and (weight.packed is not None or weight.codes is not None)
    return ready and kernel("logprob", "logprob", weight.value.dtype, _SCORE) is not None


def _score(
    hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float, kept: KeptSets | None, terms: Terms | None
) -> Scores:
    """Fills `terms` where it is given."""
    if not _compiled(weight):
        return _reference_scores(hidden_NM, weight, targets_N, temperature, kept)
    run = kernel("logprob", "logprob", hidden_NM.dtype, _SCORE)
    assert run is not None
    if hidden_NM.shape[1] % 2 and hidden_NM.dtype == torch.bfloat16:
        hidden_NM = torch.nn.functional.pad(hidden_NM, (0, 1))
    rows, (vocab, width), dtype = len(hidden_NM), weight.value.shape, weight.value.dtype
    depth, blocks = padded(width, dtype), -(-vocab // BLOCK)
    check_range(targets_N, vocab, "targets")
    scores = Scores(*(torch.empty(rows) for _ in Scores._fields))
    maxima_CN = terms.maxima_CN if terms is not None else torch.empty(blocks, rows)
    temperature_N = torch.full((rows,), temperature, dtype=torch.float32)
    starts_N, ids_E = (None, None) if kept is None else (torch.tensor(kept.starts_N), kept.ids_E)
    numbers_N, masks_UW = (None, None) if kept is None else (kept.numbers_N, kept.masks_UW)
    if ids_E is not None:
        check_range(ids_E, vocab, "ids of kept sets")
    count, words = (0, 0) if masks_UW is None else masks_UW.shape
    assert not count or words == -(-vocab // 32), f"masks of {words} words for {vocab} tokens"
    run(
        rows_address(hidden_NM, dtype, rows, depth),
        hidden_NM.stride(0),
        *matrix_addresses(weight),
        *(rows, vocab, depth),
        temperature_N.data_ptr(),
        address(targets_N, torch.int64, rows),
        address(starts_N, torch.int64, rows + 1),
        address(ids_E, torch.int32, 0 if kept is None else kept.starts_N[-1]),
        address(numbers_N, torch.int32, rows),
        address(masks_UW, torch.int32, count, words),
        words,
        address(terms and terms.terms_CNB, dtype, blocks, rows, BLOCK),
        address(maxima_CN, torch.float32, blocks, rows),
        *(score_N.data_ptr() for score_N in scores),
        int(weight.narrow),
    )
    return scores


def _reference_scores(
    hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float, kept: KeptSets | None
) -> Scores:
    """By the products and the reductions of the sampler, GPU or CPU."""
    parts, step = [], GPU_ROWS if hidden_NM.is_cuda else ROWS
    for start in range(0, max(1, len(hidden_NM)), step):
        rows = slice(start, start + step)
        logits_SV = logits(hidden_NM[rows], weight)
        if kept is not None:
            logits_SV = kept.restrict(logits_SV, start, 0)
        temperature_S = torch.full((logits_SV.shape[0],), temperature, dtype=torch.float32, device=logits_SV.device)
        lse_S, entropy_S = statistics(logits_SV, temperature_S)
        target_S = logits_SV.gather(1, targets_N[rows, None])[:, 0] / temperature_S
        parts.append((target_S - lse_S, entropy_S, lse_S))
    return Scores(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NM, weight, targets_N, temperature, kept):  # type: ignore[no-untyped-def]
        (rows, _), (vocab, _) = hidden_NM.shape, weight.value.shape
        whole = _compiled(weight) and kept_rows(rows, vocab, hidden_NM.element_size()) == rows
        terms = Terms.room(rows, weight) if whole else None
        scores = _score(hidden_NM, weight, targets_N, temperature, kept, terms)
        ctx.save_for_backward(hidden_NM, targets_N, scores.logprobs_N, scores.lse_N, *(terms or ()))
        ctx.weight, ctx.temperature, ctx.kept = weight, temperature, kept
        ctx.mark_non_differentiable(scores.entropy_N)
        return scores.logprobs_N, scores.entropy_N

    @staticmethod
    def backward(ctx, grad_N, _entropy):  # type: ignore[no-untyped-def]
        hidden_NM, targets_N, logprobs_N, lse_N, *terms = ctx.saved_tensors
        weight, temperature = ctx.weight, ctx.temperature
        dhidden_NM = torch.zeros(hidden_NM.shape, device=hidden_NM.device)
        rows_N = (targets_N, logprobs_N.detach(), lse_N, grad_N.float().contiguous())
        if not _compiled(weight):
            _reference_backward(dhidden_NM, hidden_NM, weight, rows_N, temperature, ctx.kept)
        elif terms:
            _backward(dhidden_NM, hidden_NM, weight, Terms(*terms), rows_N, temperature)
        else:
            for start in range(0, len(hidden_NM), SLAB):
                slab = slice(start, start + SLAB)
                hidden, kept = hidden_NM[slab], ctx.kept and ctx.kept.rows(slab)
                again = Terms.room(len(hidden), weight)
                _score(hidden, weight, targets_N[slab], temperature, kept, again)
                _backward(dhidden_NM[slab], hidden, weight, again, [x[slab] for x in rows_N], temperature)
        return dhidden_NM.to(hidden_NM.dtype), None, None, None, None


def _backward(
    dhidden_NM: Tensor, hidden_NM: Tensor, weight: Weight, terms: Terms, rows_N: Sequence[Tensor], temperature: float
) -> None:
    """Add the gradient of the hidden states, and of the weight to `weight.grad`.

    `rows_N`: targets, log-probs, log-sum-exps and the gradient of the log-probs.
    """
    run = kernel("logprob", "logprob_backward", hidden_NM.dtype, "pppppppppp" + "iiif")
    assert run is not None
    rows, (vocab, width), dtype = len(hidden_NM), weight.value.shape, weight.value.dtype
    blocks = -(-vocab // BLOCK)
    run(
        address(terms.terms_CNB, dtype, blocks, rows, BLOCK),
        address(terms.maxima_CN, torch.float32, blocks, rows),
        address(rows_N[0], torch.int64, rows),
        *(address(row_N, torch.float32, rows) for row_N in rows_N[1:]),
        address(hidden_NM, dtype, rows, width),
        address(weight.value, dtype, vocab, width),
        address(dhidden_NM, torch.float32, rows, width),
        address(weight.grad, torch.float32, vocab, width),
        *(rows, vocab, width, temperature),
    )


def _reference_backward(
    dhidden_NM: Tensor,
    hidden_NM: Tensor,
    weight: Weight,
    rows_N: Sequence[Tensor],
    temperature: float,
    kept: KeptSets | None,
) -> None:
    """`_backward` by torch's products with the logits again, some columns of the vocabulary at a time."""
    (targets_N, _, lse_N, grad_N), step = rows_N, GPU_COLUMNS if hidden_NM.is_cuda else COLUMNS
    for first in range(0, weight.value.shape[0], step):
        block_VM = weight.value[first : first + step]
        logits_NV = narrowed(wide_product(hidden_NM, block_VM.T), weight) / temperature
        if kept is not None:
            kept.restrict(logits_NV, 0, first)
        hot_NV = torch.arange(first, first + len(block_VM), device=targets_N.device) == targets_N[:, None]
        grad_NV = grad_N[:, None] / temperature * (hot_NV.float() - (logits_NV - lse_N[:, None]).exp())
        dlogits_NV = grad_NV.to(hidden_NM.dtype)
        dhidden_NM += wide_product(dlogits_NV, block_VM)
        if weight.grad is not None:
            accumulate_reference(weight.grad[first : first + step], dlogits_NV, hidden_NM)


def token_logprobs(
    hidden_NM: Tensor, weight: Weight, targets_N: Tensor, temperature: float, kept: Sequence[bytes] | None = None
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature)[target] and the entropy, each [N] fp32, nats.

    `kept`: of each row the ids that its target was drawn from (`types.kept_ids`; b"": all); the softmax and the entropy
    are over these alone, with the bits of a sampler that filtered. AssertionError: a target outside its set.
    The log-probs are differentiable (the weight's gradient goes to `weight.grad`); the entropies are measured only.
    """
    hidden_NM = hidden_NM.contiguous()
    sets = None if kept is None else KeptSets.build(kept, targets_N)
    if torch.is_grad_enabled() and hidden_NM.requires_grad:
        return _LogProb.apply(hidden_NM, weight, targets_N, temperature, sets)
    return _score(hidden_NM, weight, targets_N, temperature, sets, None)[:2]
