"""Gumbel-max sampling and the log-sum-exp of a row, in Triton; filters in torch operations on the device.

Noise is that of numerics/random.py to the last bit of its word; its logarithms are fp64, rounded to fp32. A row's sums
are taken of blocks of BLOCK tokens, each by a tree, and those are folded by another. The best score is exact in any
order: ties go to the lowest id. Nothing that `pick` does waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.finite import raise_if_bad
from tandem.kernels.mask import masked
from tandem.numerics.random import Stream

if TYPE_CHECKING:
    from tandem.kernels.sample import SamplingBatch

BLOCK = 2048  # of the vocabulary; a multiple of 4, the words of one counter
WARPS = 4


@triton.jit
def blocks_kernel(logits, temperature, parts, vocab: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a block: top, the largest x = logit / temperature; the sums of exp(x - top) and of (x - top) exp(x - top)."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * block + tl.arange(0, block)
    heat = tl.load(temperature + row)
    heat = tl.where(heat > 0.0, heat, 1.0)
    x = tl.load(logits + row * vocab + v, v < vocab, float("-inf"))
    x = tl.div_rn(x, tl.broadcast_to(heat, x.shape))
    top = tl.max(x, 0)
    gap = x - tl.where(top == float("-inf"), 0.0, top)
    term = tl.exp(gap)
    weighted = term * tl.where(term > 0.0, gap, 0.0)
    blocks: tl.constexpr = (vocab + block - 1) // block
    part = parts + (row * blocks + tl.program_id(1)) * 3
    tl.store(part, top)
    tl.store(part + 1, tl.sum(term, 0))
    tl.store(part + 2, tl.sum(weighted, 0))


@triton.jit
def statistics_kernel(parts, lse, entropy, blocks: tl.constexpr, block_b: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, block_b)
    part = parts + (row * blocks + b) * 3
    tops = tl.load(part, b < blocks, float("-inf"))
    totals = tl.load(part + 1, b < blocks, 0.0)
    weighted = tl.load(part + 2, b < blocks, 0.0)
    top = tl.max(tops, 0)
    gap = tops - top
    share = tl.exp(gap)
    mass = tl.sum(totals * share, 0)
    spread = tl.sum((weighted + totals * tl.where(share > 0.0, gap, 0.0)) * share, 0)
    wide = tl.log(mass.to(tl.float64))
    tl.store(lse + row, (top.to(tl.float64) + wide).to(tl.float32))
    tl.store(entropy + row, (wide - (spread / mass).to(tl.float64)).to(tl.float32))


@triton.jit
def philox_block(seed, position, stream, counter):  # type: ignore[no-untyped-def]
    """Words of the tokens 4 counter .. 4 counter + 3, in the order of the tokens: [4 x counters] uint32."""
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(seed, counter, position + zero, stream + zero, zero)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(4 * counter.shape[0])


@triton.jit(do_not_specialize=["stream"])
def draw_kernel(  # type: ignore[no-untyped-def]
    logits, temperature, seeds, positions, best, best_id, stream, vocab: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    counter = (part * (block // 4) + tl.arange(0, block // 4)).to(tl.uint32)
    seed = tl.load(seeds + row).to(tl.uint64)
    position = tl.load(positions + row).to(tl.uint32)
    heat = tl.load(temperature + row)
    word = philox_block(seed, position, stream.to(tl.uint32), counter)
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    gumbel = (-tl.log(-tl.log(uniform))).to(tl.float32)
    blocks: tl.constexpr = (vocab + block - 1) // block
    v = part * block + tl.arange(0, block)
    x = tl.load(logits + row * vocab + v, v < vocab, float("-inf"))
    x = tl.div_rn(x, tl.broadcast_to(tl.where(heat > 0.0, heat, 1.0), x.shape))
    score = x.to(tl.float64) + tl.where(heat > 0.0, gumbel, 0.0).to(tl.float64)  # 0: greedy
    highest = tl.max(score, 0)
    tl.store(best + row * blocks + part, highest)
    tl.store(best_id + row * blocks + part, tl.min(tl.where(score == highest, v, vocab), 0))


@triton.jit
def finish_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    lse,
    best,
    best_id,
    tokens,
    logprobs,
    vocab: tl.constexpr,
    blocks: tl.constexpr,
    block_b: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    b = tl.arange(0, block_b)
    score = tl.load(best + row * blocks + b, b < blocks, float("-inf"))
    ids = tl.load(best_id + row * blocks + b, b < blocks, vocab)
    token = tl.minimum(tl.min(tl.where(score == tl.max(score, 0), ids, vocab), 0), vocab - 1)
    heat = tl.load(temperature + row)
    x = tl.div_rn(tl.load(logits + row * vocab + token), tl.where(heat > 0.0, heat, 1.0))
    whole = tl.load(lse + row)
    tl.store(tokens + row, token)
    tl.store(logprobs + row, tl.where(heat > 0.0, x, whole) - whole)  # greedy: 0, or NaN


@triton.jit(do_not_specialize=["stream"])
def words_kernel(seeds, positions, stream, out, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    counter = tl.arange(0, block // 4).to(tl.uint32)
    seed = tl.load(seeds + row).to(tl.uint64)
    word = philox_block(seed, tl.load(positions + row).to(tl.uint32), stream.to(tl.uint32), counter)
    tl.store(out + row * block + tl.arange(0, block), word.to(tl.int64))


def words(seeds_S: Tensor, positions_S: Tensor, stream: int, count: int) -> Tensor:
    """The noise words [S, count] of tokens 0 .. count - 1, as int64; `count` is a power of two, 4 or more."""
    out = torch.empty(seeds_S.shape[0], count, dtype=torch.int64, device=seeds_S.device)
    words_kernel[(seeds_S.shape[0],)](seeds_S, positions_S, int(stream), out, count)
    return out


def statistics(logits_SV: Tensor, temperature_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and entropy [S] of logits / temperature in fp32; NaN where a row is not finite."""
    assert logits_SV.dtype == torch.float32, logits_SV.dtype
    logits_SV = logits_SV.contiguous()
    rows, vocab = logits_SV.shape
    if temperature_S is None:
        temperature_S = torch.ones(rows, device=logits_SV.device)
    temperature_S = temperature_S.to(logits_SV.device, torch.float32).contiguous()
    lse_S, entropy_S = (torch.empty(rows, device=logits_SV.device) for _ in range(2))
    if rows:
        blocks = triton.cdiv(vocab, BLOCK)
        parts = torch.empty(rows, blocks, 3, device=logits_SV.device)
        blocks_kernel[(rows, blocks)](logits_SV, temperature_S, parts, vocab, BLOCK, num_warps=WARPS)
        statistics_kernel[(rows,)](parts, lse_S, entropy_S, blocks, triton.next_power_of_2(blocks), num_warps=1)
    return lse_S, entropy_S


def pick(
    logits_SV: Tensor, temperature_S: Tensor, seeds_S: Tensor, positions_S: Tensor, stream: int = Stream.TARGET
) -> tuple[Tensor, Tensor]:
    """`sample` of rows without filters, given by tensors of the device: log-probs are NaN where it would raise.

    Temperatures are fp32; seeds and positions int64, of the same bits.
    """
    rows, vocab = logits_SV.shape
    blocks = triton.cdiv(vocab, BLOCK)
    best = torch.empty(rows, blocks, dtype=torch.float64, device=logits_SV.device)
    best_id, tokens_S = (torch.empty(shape, dtype=torch.int64, device=logits_SV.device) for shape in (best.shape, rows))
    logprobs_S = torch.empty(rows, device=logits_SV.device)
    draw_kernel[(rows, blocks)](
        logits_SV, temperature_S, seeds_S, positions_S, best, best_id, int(stream), vocab, BLOCK, num_warps=WARPS
    )
    lse_S = statistics(logits_SV, temperature_S)[0]
    block_b = triton.next_power_of_2(blocks)
    finish_kernel[(rows,)](
        logits_SV, temperature_S, lse_S, best, best_id, tokens_S, logprobs_S, vocab, blocks, block_b, num_warps=1
    )
    return tokens_S, logprobs_S


def _greedy(x_SV: Tensor) -> Tensor:
    """0 at the lowest of the best ids, -infinity elsewhere, and everywhere in a row that is not finite."""
    vocab, top_S = x_SV.shape[1], x_SV.amax(1, keepdim=True)
    ids_V = torch.arange(vocab, device=x_SV.device)
    best_S = torch.where((x_SV == top_S) & top_S.isfinite(), ids_V, vocab).amin(1)
    return torch.where(ids_V == best_S[:, None], 0.0, -torch.inf)


def _filter(x_SV: Tensor, batch: SamplingBatch, rows_N: np.ndarray) -> Tensor:
    """The rows with top-k, top-p or min-p, -infinity where dropped; the rules of `kernels.sample._filtered_row`."""

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array[rows_N]).to(x_SV.device)[:, None]

    ordered_NV, order_NV = x_SV.sort(dim=1, descending=True, stable=True)
    gap_NV = ordered_NV.double() - ordered_NV[:, :1].double()
    place_V = torch.arange(x_SV.shape[1], device=x_SV.device)
    top_k, top_p = on_device(batch.top_k_S), on_device(batch.top_p_S)
    with np.errstate(divide="ignore"):
        least = on_device(np.log(batch.min_p_S))
    count = gap_NV.isfinite().sum(1, keepdim=True)
    count = torch.where(top_k > 0, count.minimum(top_k), count)
    mass_NV = torch.where(place_V < count, (gap_NV.exp() * 2.0**40).round(), 0.0).long().cumsum(1)
    short_NV = mass_NV.double() < top_p * mass_NV[:, -1:].double()
    count = torch.where(top_p < 1, count.minimum(short_NV.sum(1, keepdim=True) + 1), count)
    kept_NV = (place_V < count) & (gap_NV >= least)
    return torch.full_like(x_SV, -torch.inf).scatter(1, order_NV, ordered_NV.masked_fill(~kept_NV, -torch.inf))


def _processed(logits_SV: Tensor, batch: SamplingBatch) -> Tensor:
    temperature_S = torch.from_numpy(batch.temperature_S).to(logits_SV.device)
    x_SV = masked(logits_SV, batch.masks_S) / torch.where(temperature_S > 0, temperature_S, 1.0)[:, None]
    greedy = batch.temperature_S == 0
    filtered = ~greedy & ((batch.top_k_S > 0) | (batch.top_p_S < 1) | (batch.min_p_S > 0))
    for rows, change in ((np.flatnonzero(greedy), None), (np.flatnonzero(filtered), _filter)):
        if len(rows):
            chosen = torch.from_numpy(rows).to(logits_SV.device)
            x_SV[chosen] = _greedy(x_SV[chosen]) if change is None else change(x_SV[chosen], batch, rows)
    return x_SV


def processed_logits(logits_SV: Tensor, batch: SamplingBatch) -> Tensor:
    """x [S, V] fp32: logits after mask, temperature and filters, -infinity where dropped; greedy rows hold one 0."""
    x_SV = _processed(logits_SV, batch)
    _raise_if_bad(logits_SV, ~x_SV.amax(1).isfinite())
    return x_SV


def _raise_if_bad(logits_SV: Tensor, bad_S: Tensor) -> None:
    raise_if_bad(logits_SV, int(bad_S.nonzero()[0, 0]) if bool(bad_S.any()) else -1)


def sample(logits_SV: Tensor, batch: SamplingBatch, stream: int = Stream.TARGET) -> tuple[Tensor, Tensor]:
    """Token ids [S] (int64) and log-probs [S] (fp32, nats) of the processed distribution, on the logits' device.

    NonFiniteError names the first row with a NaN, +infinity (also after the division) or nothing but -infinity.
    """
    if not len(batch):
        return torch.empty(0, dtype=torch.int64, device=logits_SV.device), torch.empty(0, device=logits_SV.device)
    temperature_S = torch.from_numpy(batch.temperature_S).to(logits_SV.device)
    x_SV = logits_SV.contiguous()
    if not batch.plain:
        x_SV, temperature_S = _processed(logits_SV, batch), torch.ones_like(temperature_S)
    seeds_S = torch.from_numpy(batch.seeds_S.view(np.int64)).to(logits_SV.device)
    positions_S = torch.from_numpy(batch.positions_S.astype(np.int64)).to(logits_SV.device)
    tokens_S, logprobs_S = pick(x_SV, temperature_S, seeds_S, positions_S, stream)
    _raise_if_bad(logits_SV, logprobs_S.isnan())
    return tokens_S, logprobs_S
