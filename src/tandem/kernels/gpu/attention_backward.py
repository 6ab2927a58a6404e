"""Gradients of attention over the rows of a pack: scores again from the log-sum-exp, no matrix of them in memory.

One kernel takes a tile of queries past their keys, another a block of keys past the queries of one segment. Segments
that share rows are added one after the other, so that a sum has the same order each time: no atomics. Run under the
interpreter, on no GPU yet.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from tandem.kernels.gpu.attention import BLOCK, TILE, lay_tiles, tile_tokens
from tandem.kernels.gpu.rotary import row_stride
from tandem.kernels.paths import EVERYTHING, Paths
from tandem.types import Reach

WARPS, STAGES = 4, 2
NUMBERS = ["query_stride", "key_stride", "grad_stride", "table_stride", "scale"]


@triton.jit
def tile_of(  # type: ignore[no-untyped-def]
    query,
    dout,
    lse,
    delta,
    first_row,
    offset,
    count,
    kv_head,
    query_stride,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    group_block: tl.constexpr,
    tile: tl.constexpr,
    d,
):
    """Queries, gradients of the output, log-sum-exps and deltas of the tokens from `offset` on; zeros beyond."""
    lane = tl.arange(0, tile)
    token, member = offset + lane // group_block, lane % group_block
    live = (token < count) & (member < heads // kv_heads)
    head = kv_head * (heads // kv_heads) + member
    row = (first_row + token).to(tl.int64)
    mask = live[:, None] & (d < size)[None, :]
    q_tile = tl.load(query + ((row * query_stride + head) * size)[:, None] + d[None, :], mask, 0.0)
    dout_tile = tl.load(dout + ((row * heads + head) * size)[:, None] + d[None, :], mask, 0.0)
    lse_tile = tl.load(lse + row * heads + head, live, 0.0)
    delta_tile = tl.load(delta + row * heads + head, live, 0.0)
    return q_tile, dout_tile, lse_tile, delta_tile, token, live, row, head, mask


@triton.jit
def weights_of(scores, lse, position, at, live, real, window: tl.constexpr, chunk: tl.constexpr):  # type: ignore[no-untyped-def]
    """Softmax weights; 0 where a query does not see a key. Arguments broadcast against the scores."""
    seen = live & real & (at <= position)
    if window > 0:
        seen = seen & (at > position - window)
    if chunk > 0:
        seen = seen & (at >= position // chunk * chunk)
    return tl.where(seen, tl.exp(tl.where(seen, scores - lse, 0.0)), 0.0)


@triton.jit(do_not_specialize=NUMBERS)
def query_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    dout,
    lse,
    delta,
    dquery,
    row_start,
    first_position,
    table,
    tile_segment,
    tile_row,
    query_stride,
    key_stride,
    grad_stride,
    table_stride,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    group_block: tl.constexpr,
    size_block: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    segment, kv_head = tl.load(tile_segment + tl.program_id(0)), tl.program_id(1)
    first_row = tl.load(row_start + segment)
    offset = tl.load(tile_row + tl.program_id(0)) - first_row
    count = tl.load(row_start + segment + 1) - first_row
    first = tl.load(first_position + segment)
    d = tl.arange(0, size_block)
    q_tile, dout_tile, lse_tile, delta_tile, token, live, row, head, mask = tile_of(
        query,
        dout,
        lse,
        delta,
        first_row,
        offset,
        count,
        kv_head,
        query_stride,
        heads,
        kv_heads,
        size,
        group_block,
        tile,
        d,
    )
    position = first + token
    keys = first + tl.minimum(offset + tile // group_block, count)
    seen_from = 0
    if window > 0:
        seen_from = tl.maximum(first + offset - window + 1, 0)
    if chunk > 0:
        seen_from = (first + offset) // chunk * chunk
    gradient = tl.zeros((tile, size_block), tl.float32)
    for number in range(seen_from // block, (keys + block - 1) // block):
        at = number * block + tl.arange(0, block)
        real = (at < keys) & (at >= seen_from)
        slot = tl.load(table + segment.to(tl.int64) * table_stride + at, real, 0).to(tl.int64)
        place = ((slot * key_stride + kv_head) * size)[:, None] + d[None, :]
        within = real[:, None] & (d < size)[None, :]
        k_tile = tl.load(key + place, within, 0.0)
        v_tile = tl.load(value + place, within, 0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        weight = weights_of(
            scores, lse_tile[:, None], position[:, None], at[None, :], live[:, None], real[None, :], window, chunk
        )
        dweight = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        dscores = weight * (dweight - delta_tile[:, None]) * scale
        gradient = tl.dot(dscores.to(k_tile.dtype), k_tile, gradient, input_precision="ieee")
    tl.store(
        dquery + ((row * grad_stride + head) * size)[:, None] + d[None, :], gradient.to(dquery.dtype.element_ty), mask
    )


@triton.jit(do_not_specialize=NUMBERS)
def key_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    dout,
    lse,
    delta,
    dkey,
    dvalue,
    row_start,
    first_position,
    table,
    block_segment,
    block_at,
    block_part,
    query_stride,
    key_stride,
    table_stride,
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    chunk: tl.constexpr,
    group_block: tl.constexpr,
    size_block: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
):
    segment, kv_head = tl.load(block_segment + tl.program_id(0)), tl.program_id(1)
    start = tl.load(block_at + tl.program_id(0))
    first_row = tl.load(row_start + segment)
    count = tl.load(row_start + segment + 1) - first_row
    first = tl.load(first_position + segment)
    tokens: tl.constexpr = tile // group_block
    d = tl.arange(0, size_block)
    at = start + tl.arange(0, block)
    real = at < first + count
    slot = tl.load(table + segment.to(tl.int64) * table_stride + at, real, 0).to(tl.int64)
    within = real[:, None] & (d < size)[None, :]
    place = ((slot * key_stride + kv_head) * size)[:, None] + d[None, :]
    k_tile = tl.load(key + place, within, 0.0)
    v_tile = tl.load(value + place, within, 0.0)
    last = count  # the first token that sees none of these keys
    if window > 0:
        last = tl.minimum(last, tl.maximum(start + block - 1 + window - first, 0))
    if chunk > 0:
        last = tl.minimum(last, tl.maximum((start + block - 1) // chunk * chunk + chunk - first, 0))
    dk_tile = tl.zeros((block, size_block), tl.float32)
    dv_tile = tl.zeros((block, size_block), tl.float32)
    for number in range(tl.maximum(start - first, 0) // tokens, (last + tokens - 1) // tokens):
        q_tile, dout_tile, lse_tile, delta_tile, token, live, row, head, mask = tile_of(
            query,
            dout,
            lse,
            delta,
            first_row,
            number * tokens,
            count,
            kv_head,
            query_stride,
            heads,
            kv_heads,
            size,
            group_block,
            tile,
            d,
        )
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
        weight = weights_of(
            scores,
            lse_tile[None, :],
            (first + token)[None, :],
            at[:, None],
            live[None, :],
            real[:, None],
            window,
            chunk,
        )
        dv_tile = tl.dot(weight.to(dout_tile.dtype), dout_tile, dv_tile, input_precision="ieee")
        dweight = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
        dscores = weight * (dweight - delta_tile[None, :]) * scale
        dk_tile = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
    part = (tl.load(block_part + tl.program_id(0)) + tl.arange(0, block)).to(tl.int64)
    target = ((part * kv_heads + kv_head) * size)[:, None] + d[None, :]
    tl.store(dkey + target, dk_tile, within)
    tl.store(dvalue + target, dv_tile, within)


class _Walk(NamedTuple):
    """What the kernels of a pack are laid out by, on the device; int32 but `slots`."""

    paths: Paths
    tile_segment: torch.Tensor
    tile_row: torch.Tensor
    block_segment: torch.Tensor  # of each block of BLOCK keys
    block_at: torch.Tensor  # position of its first
    block_part: torch.Tensor  # row of its first among the keys of all paths, one path after the other
    slots: torch.Tensor  # int64, of these keys
    ends: list[int]  # of the paths among them
    shared: bool  # whether a slot is of several paths


_last: _Walk | None = None


def _walk(paths: Paths, tokens: int) -> _Walk:
    """Waits for the device; one answer serves all layers."""
    global _last
    if _last is not None and _last.paths is paths:
        return _last
    starts, firsts, table = (x.cpu().numpy() for x in (paths.row_start_S, paths.first_position_S, paths.table_SP))
    lengths = firsts + np.diff(starts)
    ends = np.cumsum(lengths)
    blocks = -(-lengths // BLOCK)
    segment = np.repeat(np.arange(len(lengths)), blocks)
    at = (np.arange(len(segment)) - (np.cumsum(blocks) - blocks)[segment]) * BLOCK
    slots = np.concatenate([row[:length] for row, length in zip(table, lengths, strict=True)]).astype(np.int64)
    laid = (*lay_tiles(starts, tokens), segment, at, (ends - lengths)[segment] + at)
    place = paths.table_SP.device
    tiles, rows, segments, starting, parts = (torch.from_numpy(x.astype(np.int32)).to(place) for x in laid)
    shared, keys = len(slots) != starts[-1], torch.from_numpy(slots).to(place)
    _last = _Walk(paths, tiles, rows, segments, starting, parts, keys, ends.tolist(), shared)
    return _last


def attention_backward(
    dout_THD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    paths: Paths,
    reach: Reach = EVERYTHING,
) -> None:
    """Write the gradients of query [T, H, D], key and value [T, K, D] into `grads` (rows may be strided).

    Slots are rows (pages of one token). Sums in fp32; weights and their gradients meet the other factor in its dtype.
    """
    query, key, value = qkv
    assert paths.page_tokens == 1 and row_stride(key) == row_stride(value), (paths.page_tokens, value.stride())
    (_, heads, size), kv_heads = query.shape, key.shape[1]
    walk = _walk(paths, tile_tokens(heads, kv_heads))
    dout_THD = dout_THD.contiguous()
    delta_TH = (dout_THD.float() * out_THD.float()).sum(-1)
    where = (paths.row_start_S, paths.first_position_S, paths.table_SP)
    strides, table_stride = (row_stride(query), row_stride(key)), paths.table_SP.stride(0)
    scale, group_block = 1.0 / math.sqrt(size), triton.next_power_of_2(heads // kv_heads)
    limits = (reach.window or 0, reach.chunk or 0)
    shape = (heads, kv_heads, size, *limits, group_block, max(triton.next_power_of_2(size), 16), TILE, BLOCK)
    given, options = (*qkv, dout_THD, lse_TH, delta_TH), {"num_warps": WARPS, "num_stages": STAGES}
    tiles, query_strides = (walk.tile_segment, walk.tile_row), (*strides, row_stride(grads[0]))
    query_kernel[(len(walk.tile_segment), kv_heads)](
        *given, grads[0], *where, *tiles, *query_strides, table_stride, scale, *shape, **options
    )
    dkey, dvalue = (torch.empty(len(walk.slots), kv_heads, size, device=key.device) for _ in "kv")
    blocks = (walk.block_segment, walk.block_at, walk.block_part)
    key_kernel[(len(walk.block_segment), kv_heads)](
        *given, dkey, dvalue, *where, *blocks, *strides, table_stride, scale, *shape, **options
    )
    for grad, parts in zip(grads[1:], (dkey, dvalue), strict=True):
        if not walk.shared:
            grad[walk.slots] = parts.to(grad.dtype)
            continue
        total = torch.zeros(grad.shape, device=grad.device)
        for start, end in zip([0, *walk.ends], walk.ends, strict=False):
            total.index_add_(0, walk.slots[start:end], parts[start:end])  # the slots of a path are distinct
        grad.copy_(total)
