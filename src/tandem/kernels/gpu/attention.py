"""Causal attention over tables of slots: keys in order of absolute position, for pages and packs alike.

Keys are reduced in blocks of 64 positions, online, within spans of 512; spans are folded in order, by their maxima and
sums. A program holds TILE rows, the tokens of one segment times the query heads that share a key head. A block that a
row does not see leaves the row's maximum, sum and accumulator as they are, so its neighbours in the tile do not count.

Where few programs would leave the device idle, each takes one span and a second kernel folds them. The same binary
reduces a span either way, and a fold is element by element, with its one fused multiplication spelled out, so that
prefill and decode have the same bits however the spans are shared out. Run under the interpreter, on no GPU yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from tandem.kernels.gpu.rotary import row_stride
from tandem.kernels.gpu.tiles import multiprocessors
from tandem.kernels.paths import EVERYTHING, Paths
from tandem.types import Reach

TILE, BLOCK, SPAN = 64, 64, 512  # rows of a program; keys reduced at a time and folded at a time, by absolute position
WARPS, STAGES = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledPaths(Paths):
    """Paths whose tiles were laid out beside the CPU, by `lay_tiles`."""

    tile_segment: torch.Tensor  # int32; -1: no tile
    tile_row: torch.Tensor  # int32, its first


@triton.jit
def fold(maximum, total, accumulator, span_maximum, span_total, span_accumulator):  # type: ignore[no-untyped-def]
    """One more span; one without keys changes nothing. Two compilers of this line have no choice to make."""
    higher = tl.maximum(maximum, span_maximum)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    decay, share = tl.exp(maximum - base), tl.exp(span_maximum - base)
    total = tl.fma(total, decay, span_total * share)
    accumulator = tl.fma(
        accumulator,
        tl.broadcast_to(decay[:, None], accumulator.shape),
        span_accumulator * share[:, None],
    )
    return higher, total, accumulator


@triton.jit
def finish(total, accumulator):  # type: ignore[no-untyped-def]
    return tl.div_rn(accumulator, tl.broadcast_to(tl.where(total == 0.0, 1.0, total)[:, None], accumulator.shape))


NUMBERS = ["query_stride", "key_stride", "value_stride", "table_stride", "page_tokens", "rows", "apart", "scale"]


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=["table"])
def attention_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    out,
    lse,
    sums,  # [spans, 2, rows, H], [spans, rows, H, D]: maxima, totals and accumulators of spans apart
    accumulators,
    scales,  # [pages, 2, K, page_tokens] of codes in int8
    row_start,
    first_position,
    table,
    tile_segment,
    tile_row,
    query_stride,  # of a row, in heads; and so on
    key_stride,
    value_stride,
    table_stride,
    page_tokens,
    rows,
    apart,  # 0: a program takes all spans, and writes `out` and `lse`
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,  # 0: none
    chunk: tl.constexpr,  # 0: none
    sinks: tl.constexpr,
    scaled: tl.constexpr,  # 1: keys and values are codes
    group_block: tl.constexpr,
    size_block: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    span: tl.constexpr,
):
    segment = tl.load(tile_segment + tl.program_id(0))
    if segment < 0:
        return
    kv_head = tl.program_id(1)
    group: tl.constexpr = heads // kv_heads
    tokens: tl.constexpr = tile // group_block
    first_row = tl.load(row_start + segment)
    offset = tl.load(tile_row + tl.program_id(0)) - first_row
    count = tl.load(row_start + segment + 1) - first_row
    first = tl.load(first_position + segment)

    lane = tl.arange(0, tile)
    token = offset + lane // group_block
    member = lane % group_block
    live = (token < count) & (member < group)
    position = first + token
    head = kv_head * group + member
    row = (first_row + token).to(tl.int64)
    d = tl.arange(0, size_block)
    q_tile = tl.load(
        query + ((row * query_stride + head) * size)[:, None] + d[None, :], live[:, None] & (d < size)[None, :], 0.0
    )

    keys = first + tl.minimum(offset + tokens, count)  # positions that any row of the tile may see
    seen_from = 0  # by the tile's first row
    if window > 0:
        seen_from = tl.maximum(first + offset - window + 1, 0)
    if chunk > 0:
        seen_from = (first + offset) // chunk * chunk
    leading: tl.constexpr = (sinks + span - 1) // span if window > 0 else 0
    start, end = tl.maximum(seen_from // span, leading), (keys + span - 1) // span
    turns = tl.minimum(end, leading) + tl.maximum(end - start, 0)
    turn_from = tl.program_id(2)
    turn_to = tl.where(apart > 0, tl.minimum(turn_from + 1, turns), turns)
    tables = table + segment.to(tl.int64) * table_stride

    maximum = tl.full((tile,), float("-inf"), tl.float32)
    total = tl.zeros((tile,), tl.float32)
    accumulator = tl.zeros((tile, size_block), tl.float32)
    for turn in range(turn_from, turn_to):
        number_of_span = tl.where(turn < leading, turn, start + turn - leading)
        lowest = number_of_span * (span // block)
        highest = tl.minimum(lowest + span // block, (keys + block - 1) // block)
        lowest = tl.where(turn < leading, lowest, tl.maximum(lowest, seen_from // block))
        span_maximum = tl.full((tile,), float("-inf"), tl.float32)
        span_total = tl.zeros((tile,), tl.float32)
        span_accumulator = tl.zeros((tile, size_block), tl.float32)
        for number in range(lowest, highest):
            at = number * block + tl.arange(0, block)
            real = (at < keys) & ((at >= seen_from) | (at < sinks))  # else the table may name any page
            page = tl.load(tables + at // page_tokens, real, 0).to(tl.int64)
            slot = page * page_tokens + at % page_tokens
            scale_at = scales + (page * 2 * kv_heads + kv_head) * page_tokens + at % page_tokens
            k_tile = tl.load(
                key + ((slot * key_stride + kv_head) * size)[None, :] + d[:, None],
                real[None, :] & (d < size)[:, None],
                0.0,
            )
            if scaled:
                k_tile = k_tile.to(tl.float32) * tl.load(scale_at, real, 0.0)[None, :]
            scores = tl.dot(q_tile, k_tile.to(q_tile.dtype), input_precision="ieee") * scale
            seen = at[None, :] <= position[:, None]
            if window > 0:
                near = at[None, :] > (position - window)[:, None]
                if sinks > 0:
                    near = near | (at < sinks)[None, :]
                seen = seen & near
            if chunk > 0:
                seen = seen & (at[None, :] >= (position // chunk * chunk)[:, None])
            scores = tl.where(seen & real[None, :], scores, float("-inf"))
            higher = tl.maximum(span_maximum, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            decay = tl.exp(span_maximum - base)
            weights = tl.exp(scores - base[:, None])
            span_total = span_total * decay + tl.sum(weights, 1)
            v_tile = tl.load(
                value + ((slot * value_stride + kv_head) * size)[:, None] + d[None, :],
                real[:, None] & (d < size)[None, :],
                0.0,
            )
            if scaled:
                v_tile = v_tile.to(tl.float32) * tl.load(scale_at + kv_heads * page_tokens, real, 0.0)[:, None]
            v_tile = v_tile.to(q_tile.dtype)
            span_accumulator = tl.dot(
                weights.to(q_tile.dtype), v_tile, span_accumulator * decay[:, None], input_precision="ieee"
            )
            span_maximum = higher
        maximum, total, accumulator = fold(maximum, total, accumulator, span_maximum, span_total, span_accumulator)
    mask = live[:, None] & (d < size)[None, :]
    place = (row * heads + head)[:, None] * size + d[None, :]
    if apart > 0:
        part = tl.program_id(2).to(tl.int64) * rows * heads
        tl.store(sums + 2 * part + row * heads + head, maximum, live)
        tl.store(sums + 2 * part + (rows + row) * heads + head, total, live)
        tl.store(accumulators + part * size + place, accumulator, mask)
    else:
        tl.store(out + place, finish(total, accumulator).to(out.dtype.element_ty), mask)
        tl.store(lse + row * heads + head, maximum + tl.log(tl.where(total == 0.0, 1.0, total)), live)


@triton.jit(do_not_specialize=["rows", "spans"])
def fold_kernel(  # type: ignore[no-untyped-def]
    sums, accumulators, out, rows, spans, heads: tl.constexpr, size: tl.constexpr, size_block: tl.constexpr
):
    one, d = tl.arange(0, 1), tl.arange(0, size_block)
    at = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1) + one
    mask = (d < size)[None, :]
    place = at[:, None] * size + d[None, :]
    maximum = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    accumulator = tl.zeros((1, size_block), tl.float32)
    for number in tl.range(0, spans, num_stages=4):
        part = tl.cast(number, tl.int64) * rows * heads
        span_maximum = tl.load(sums + 2 * part + at)
        span_total = tl.load(sums + 2 * part + rows * heads + at)
        span_accumulator = tl.load(accumulators + part * size + place, mask, 0.0)
        maximum, total, accumulator = fold(maximum, total, accumulator, span_maximum, span_total, span_accumulator)
    tl.store(out + place, finish(total, accumulator).to(out.dtype.element_ty), mask)


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens of a tile."""
    return TILE // triton.next_power_of_2(heads // kv_heads)


def lay_tiles(row_start_S: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment and first row (int32) of each tile of `tokens` rows.

    >>> [tile.tolist() for tile in lay_tiles(np.array([0, 1, 6]), 4)]
    [[0, 1, 1], [0, 1, 5]]
    """
    count_S = -(-np.diff(row_start_S) // tokens)
    segment = np.repeat(np.arange(len(count_S), dtype=np.int32), count_S)
    place = np.arange(len(segment)) - (np.cumsum(count_S) - count_S)[segment]
    return segment, (row_start_S[segment] + place * tokens).astype(np.int32)


_last: tuple[Paths, int, torch.Tensor, torch.Tensor] | None = None


def _tiles(paths: Paths, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`lay_tiles` on the device; one answer serves all layers. Waits for the device where `paths` has no tiles."""
    global _last
    if isinstance(paths, TiledPaths):
        return paths.tile_segment, paths.tile_row
    last = _last
    if last is None or last[0] is not paths or last[1] != tokens:
        segment, row = (torch.from_numpy(x) for x in lay_tiles(paths.row_start_S.cpu().numpy(), tokens))
        device = paths.row_start_S.device
        last = _last = (paths, tokens, segment.to(device), row.to(device))
    return last[2:]


def _spans(paths: Paths, programs: int, reach: Reach, sinks: int) -> int:
    """How many spans to take apart; 0: none, where there are programs enough or one span is all.

    Decided by shapes alone, which a captured graph fixes: the table's width is the longest context there can be.
    """
    spans = triton.cdiv(paths.table_SP.shape[1] * paths.page_tokens, SPAN)
    if reach.window:
        spans = min(spans, triton.cdiv(reach.window - 1, SPAN) + 1 + triton.cdiv(sinks, SPAN))
    elif reach.chunk:
        spans = min(spans, triton.cdiv(reach.chunk - 1, SPAN) + 1)
    enough = programs >= 2 * multiprocessors(paths.table_SP.device)
    return 0 if enough or spans < 2 else spans


def attention(
    query_THD: torch.Tensor,
    key_CKD: torch.Tensor,
    value_CKD: torch.Tensor,
    paths: Paths,
    reach: Reach = EVERYTHING,
    lse_TH: torch.Tensor | None = None,
    sinks: int = 0,
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[T, H, D]. C slots of keys and values; rows may be strided. Fills `lse_TH` (fp32) where it is given."""
    rows, heads, size = query_THD.shape
    kv_heads = key_CKD.shape[1]
    group_block = triton.next_power_of_2(heads // kv_heads)
    assert group_block <= TILE and size % 8 == 0, (heads, kv_heads, size)
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
    if lse_TH is None:  # always written: with or without it, one binary
        lse_TH = torch.empty(rows, heads, device=query_THD.device)
    segment, first_row = _tiles(paths, TILE // group_block)
    decodes = rows == paths.first_position_S.shape[0]  # a row a segment: a window is of one position, partials are few
    spans = _spans(paths, segment.shape[0] * kv_heads, reach, sinks) if decodes else 0
    sums = torch.empty(spans, 2, rows, heads, device=query_THD.device) if spans else lse_TH
    accumulators = torch.empty(spans, *query_THD.shape, device=query_THD.device) if spans else lse_TH
    tensors = (query_THD, key_CKD, value_CKD, out_THD, lse_TH, sums, accumulators, lse_TH if scales is None else scales)
    where = (paths.row_start_S, paths.first_position_S, paths.table_SP, segment, first_row)
    strides = (row_stride(query_THD), row_stride(key_CKD), row_stride(value_CKD), paths.table_SP.stride(0))
    numbers = (paths.page_tokens, rows, int(spans > 0), 1.0 / math.sqrt(size))
    limits = (reach.window or 0, reach.chunk or 0, sinks if reach.window else 0, int(scales is not None))
    blocks = (group_block, max(triton.next_power_of_2(size), 16), TILE, BLOCK, SPAN)
    attention_kernel[(segment.shape[0], kv_heads, max(spans, 1))](
        *tensors,
        *where,
        *strides,
        *numbers,
        *(heads, kv_heads, size),
        *limits,
        *blocks,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    if spans:
        size_block = triton.next_power_of_2(size)
        fold_kernel[(rows, heads)](sums, accumulators, out_THD, rows, spans, heads, size, size_block, num_warps=1)
    return out_THD
