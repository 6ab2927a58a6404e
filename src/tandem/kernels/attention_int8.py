"""Attention to keys and values in int8, multiplied as integers: the reference of attention_eights.h, with its bits.

A code of a key or a value has the scale of its token and head (`numerics.quantise.to_int8`). A query of a head is
rounded to 15 bits, its largest size 16,319; a score is fp32(sum of codes) (s_k s_q). In a block of 64 positions the
weights e^(score - largest so far) s_v are rounded to 8 bits of the largest of them; their sum with the codes of the
values is exact, and joins what came before in one fused step. Blocks, splits and folds are those of `attention`.

On a GPU, codes are widened to the dtype of the query instead: the same but for the rounding of query and weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tandem.kernels.paths import EVERYTHING, Paths
from tandem.types import Reach

BLOCK, SPLIT = 64, 512  # positions
# Divided as tensors: torch makes number / tensor a product with the reciprocal.
QUERY_LARGEST, WEIGHT_LARGEST, NOTHING = 16319.0, 255.0, 2.0**-100
_LOG2E, _LN2_HIGH, _LN2_LOW = (torch.tensor(x) for x in (1.44269504088896341, -0.693359375, 2.12194440e-4))
_POLYNOMIAL = [
    torch.tensor(x)
    for x in (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
]


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c, fp32, rounded once (but where fp64 makes a tie)."""
    return (a.double() * b.double() + c.double()).float()


def _exp(x: Tensor) -> Tensor:
    """vector.h's e^x of fp32 not above 0."""
    magic = torch.tensor(12582912.0)
    t = _fma(x, _LOG2E, magic)
    n = t - magic
    r = _fma(n, _LN2_LOW, _fma(n, _LN2_HIGH, x))
    p = _POLYNOMIAL[0]
    for term in _POLYNOMIAL[1:]:
        p = _fma(p, r, term)
    p = _fma(p, r * r, r) + 1.0
    y = (p.view(torch.int32) + (t.view(torch.int32) << 23)).view(torch.float32)
    return torch.where(x.isnan(), x, torch.where(x < -87.0, 0.0, y))


def _sum(terms: Tensor) -> Tensor:
    """Of a block's 64 terms, in the order of the lanes."""
    a, b, c, d = terms.view(*terms.shape[:-1], 4, 16).unbind(-2)
    lanes = (a + b) + (c + d)
    while lanes.shape[-1] > 1:
        lanes = lanes[..., : lanes.shape[-1] // 2] + lanes[..., lanes.shape[-1] // 2 :]
    return lanes[..., 0]


def _fold(state: tuple[Tensor, ...], part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Adds what a later split saw; each is (largest score, sum of weights, weighted sum of values)."""
    (top, total, out), (part_top, part_total, part_out) = state, part
    best = torch.maximum(top, part_top)
    before, now = (_exp(torch.where(best == -math.inf, 0.0, x - best)) for x in (top, part_top))
    folded = best, total * before + part_total * now, out * before[..., None] + part_out * now[..., None]

    def chosen(old: Tensor, new: Tensor, both: Tensor) -> Tensor:
        nothing, first = part_total == 0.0, total == 0.0
        if old.ndim > total.ndim:
            nothing, first = nothing[..., None], first[..., None]
        return torch.where(nothing, old, torch.where(first, new, both))

    return tuple(map(chosen, state, part, folded))


def _round_query(query_THD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [T, H, D] (fp64) and scales [T, H], softmax's 1 / sqrt(D) included."""
    wide = query_THD.float()
    amax = wide.abs().amax(-1)
    by = torch.where((amax > NOTHING) & amax.isfinite(), amax.new_full((), QUERY_LARGEST) / amax, 0.0)
    codes = torch.where(by[..., None] > 0, wide * by[..., None], 0.0).round().double()
    scale = amax / QUERY_LARGEST * torch.tensor(1.0 / math.sqrt(query_THD.shape[-1]))
    return codes, scale.where(amax.isfinite(), torch.nan)


def int8_attention_reference(
    query_THD: Tensor,
    key: tuple[Tensor, Tensor],
    value: tuple[Tensor, Tensor],
    paths: Paths,
    reach: Reach = EVERYTHING,
    sinks: int = 0,
) -> Tensor:
    """[T, H, D] of query (bf16, fp16 or fp32) over slots of codes [C, K, D] with scales [C, K]; as `attention`."""
    codes_THD, scale_TH = _round_query(query_THD)
    group, leading = query_THD.shape[1] // key[0].shape[1], sinks if reach.window else 0
    outs = [query_THD[:0].float()]
    for s in range(len(paths.first_position_S)):
        start, stop = int(paths.row_start_S[s]), int(paths.row_start_S[s + 1])
        first = int(paths.first_position_S[s])
        q_T = torch.arange(first, first + stop - start)
        from_T = torch.tensor([reach.first_seen(position) for position in q_T.tolist()])
        own, own_scale = codes_THD[start:stop].transpose(0, 1), scale_TH[start:stop].T
        shape = own_scale.shape
        empty: tuple[Tensor, ...] = (
            own_scale.new_full(shape, -math.inf),
            own_scale.new_zeros(shape),
            own_scale.new_zeros(own.shape),
        )
        folded = state = empty
        for block in range(0, first + stop - start, BLOCK):
            if block and block % SPLIT == 0:
                folded, state = _fold(folded, state), empty
            k_J = torch.arange(block, block + BLOCK)
            seen_TJ = (k_J <= q_T[:, None]) & ((k_J >= from_T[:, None]) | (k_J < leading))
            read_J = seen_TJ.any(0)
            if not bool(read_J.any()):
                continue
            position_J = k_J[read_J]
            slots_J = paths.table_SP[s].long()[position_J // paths.page_tokens] * paths.page_tokens
            slots_J += position_J % paths.page_tokens
            parts = []
            for codes, scales in (key, value):
                codes_JKD = torch.zeros(BLOCK, *codes.shape[1:], dtype=torch.float64)
                scales_JK = torch.zeros(BLOCK, codes.shape[1])
                codes_JKD[read_J], scales_JK[read_J] = codes[slots_J].double(), scales[slots_J]
                parts.append((codes_JKD.repeat_interleave(group, 1), scales_JK.repeat_interleave(group, 1).T[:, None]))
            state = _add_block(state, own, own_scale[..., None], parts, seen_TJ)
        top, total, out = _fold(folded, state)
        outs.append((out * (1.0 / total)[..., None] + 0.0).transpose(0, 1))
    return torch.cat(outs).to(query_THD.dtype)


def _add_block(
    state: tuple[Tensor, ...],
    query_HTD: Tensor,
    scale_HT1: Tensor,
    parts: list[tuple[Tensor, Tensor]],
    seen_TJ: Tensor,
) -> tuple[Tensor, ...]:
    """`_fold`'s state behind one more block; parts: of keys and values codes [J, H, D] (fp64), scales [H, 1, J]."""
    (keys_JHD, key_scales), (values_JHD, value_scales) = parts
    top, total, out = state
    sums_HTJ = torch.einsum("htd,jhd->htj", query_HTD, keys_JHD).float()
    scores = torch.where(seen_TJ, sums_HTJ * (key_scales * scale_HT1), -math.inf)
    best = torch.maximum(top, scores.amax(-1))
    factor = _exp(torch.where(best == -math.inf, 0.0, top - best))
    terms = torch.where(seen_TJ, _exp(scores - best[..., None]), 0.0)
    weights = torch.where(seen_TJ, terms * value_scales, 0.0)
    largest, broken = weights.nan_to_num().amax(-1), weights.isnan().any(-1)
    by = torch.where(largest > NOTHING, largest.new_full((), WEIGHT_LARGEST) / largest, 0.0)
    codes = (weights.nan_to_num() * by[..., None]).round().double()
    scale = torch.where(broken, torch.nan, torch.where(largest > NOTHING, largest / WEIGHT_LARGEST, 0.0))
    added = torch.einsum("htj,jhd->htd", codes, values_JHD).float()
    out = _fma(added, scale[..., None].expand_as(added), out * factor[..., None])
    return best, total * factor + _sum(terms), out
