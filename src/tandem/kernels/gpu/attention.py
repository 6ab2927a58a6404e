"""Causal attention over tables of slots: keys in order, in blocks of 64 absolute positions, for pages and packs alike.

A program holds TILE rows, the tokens of one segment times the query heads that share a key head. A block of keys that a
row does not see leaves the row's maximum, sum and accumulator as they are, so its neighbours in the tile do not count.
The keys are never split among programs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from tandem.kernels.attention import Paths
from tandem.kernels.gpu.rotary import row_stride

TILE, BLOCK = 64, 64  # rows of a program; keys reduced at a time, by absolute position
WARPS, STAGES = 4, 2
BACKWARD_ROWS = 256  # queries whose scores against all keys are held at once


@triton.jit(do_not_specialize=["query_stride", "key_stride", "value_stride", "table_stride", "page_tokens", "scale"])
def attention_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    out,
    lse,
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
    scale,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    window: tl.constexpr,
    sinks: tl.constexpr,
    group_block: tl.constexpr,
    size_block: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
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
    end = (keys + block - 1) // block
    start = 0
    if window > 0:
        start = tl.maximum(first + offset - window + 1, 0) // block
    leading: tl.constexpr = (sinks + block - 1) // block if window > 0 else 0
    start = tl.maximum(start, leading)
    tables = table + segment.to(tl.int64) * table_stride

    maximum = tl.full((tile,), float("-inf"), tl.float32)
    total = tl.zeros((tile,), tl.float32)
    accumulator = tl.zeros((tile, size_block), tl.float32)
    for turn in range(tl.minimum(end, leading) + tl.maximum(end - start, 0)):
        number = tl.where(turn < leading, turn, start + turn - leading)
        at = number * block + tl.arange(0, block)
        real = at < keys
        slot = tl.load(tables + at // page_tokens, real, 0).to(tl.int64) * page_tokens + at % page_tokens
        k_tile = tl.load(
            key + ((slot * key_stride + kv_head) * size)[None, :] + d[:, None], real[None, :] & (d < size)[:, None], 0.0
        )
        scores = tl.dot(q_tile, k_tile.to(q_tile.dtype), input_precision="ieee") * scale
        seen = at[None, :] <= position[:, None]
        if window > 0:
            near = at[None, :] > (position - window)[:, None]
            if sinks > 0:
                near = near | (at < sinks)[None, :]
            seen = seen & near
        scores = tl.where(seen & real[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp(maximum - base)
        weights = tl.exp(scores - base[:, None])
        total = total * decay + tl.sum(weights, 1)
        v_tile = tl.load(
            value + ((slot * value_stride + kv_head) * size)[:, None] + d[None, :],
            real[:, None] & (d < size)[None, :],
            0.0,
        ).to(q_tile.dtype)
        accumulator = tl.dot(weights.to(q_tile.dtype), v_tile, accumulator * decay[:, None], input_precision="ieee")
        maximum = higher
    safe = tl.where(total == 0.0, 1.0, total)
    result = accumulator / safe[:, None]
    place = out + ((row * heads + head) * size)[:, None] + d[None, :]
    tl.store(place, result.to(out.dtype.element_ty), live[:, None] & (d < size)[None, :])
    tl.store(lse + row * heads + head, maximum + tl.log(safe), live)


_last: tuple[Paths, int, torch.Tensor, torch.Tensor] | None = None


def _tiles(paths: Paths, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment and first row of each tile of `tokens` rows, -1 where there is none; one answer serves all layers."""
    global _last
    last = _last
    if last is not None and last[0] is paths and last[1] == tokens:
        return last[2:]
    start_S = paths.row_start_S.long()
    ends_S = ((start_S.diff() + tokens - 1) // tokens).cumsum(0)
    segments = ends_S.shape[0]
    number = torch.arange(triton.cdiv(rows, tokens) + segments, device=start_S.device)
    segment = torch.searchsorted(ends_S, number, right=True)
    inside = segment.clamp(max=segments - 1)
    before = torch.where(inside > 0, ends_S[inside - 1], 0)
    first_row = start_S[inside] + (number - before) * tokens
    tiles = (torch.where(segment < segments, segment, -1).to(torch.int32), first_row.to(torch.int32))
    _last = (paths, tokens, *tiles)
    return tiles


def attention(
    query_THD: torch.Tensor,
    key_CKD: torch.Tensor,
    value_CKD: torch.Tensor,
    paths: Paths,
    window: int | None = None,
    lse_TH: torch.Tensor | None = None,
    sinks: int = 0,
) -> torch.Tensor:
    """[T, H, D]. C slots of keys and values; rows may be strided. Fills `lse_TH` (fp32) where it is given."""
    rows, heads, size = query_THD.shape
    kv_heads = key_CKD.shape[1]
    group_block = triton.next_power_of_2(heads // kv_heads)
    assert group_block <= TILE and size % 8 == 0, (heads, kv_heads, size)
    out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
    if lse_TH is None:  # always written: with or without it, one binary
        lse_TH = torch.empty(rows, heads, device=query_THD.device)
    segment, first_row = _tiles(paths, rows, TILE // group_block)
    attention_kernel[(segment.shape[0], kv_heads)](
        query_THD,
        key_CKD,
        value_CKD,
        out_THD,
        lse_TH,
        paths.row_start_S,
        paths.first_position_S,
        paths.table_SP,
        segment,
        first_row,
        row_stride(query_THD),
        row_stride(key_CKD),
        row_stride(value_CKD),
        paths.table_SP.stride(0),
        paths.page_tokens,
        1.0 / math.sqrt(size),
        heads,
        kv_heads,
        size,
        window or 0,
        sinks,
        group_block,
        max(triton.next_power_of_2(size), 16),
        TILE,
        BLOCK,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out_THD


def attention_backward(
    dout_THD: torch.Tensor,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    paths: Paths,
    window: int | None = None,
) -> None:
    """Write the gradients of query [T, H, D], key and value [T, K, D] into `grads` (rows may be strided).

    Slots are rows (pages of one token). Torch operations in fp32, a segment at a time, BACKWARD_ROWS queries at once.
    """
    query_THD, key_TKD, value_TKD = qkv
    assert paths.page_tokens == 1
    heads, size = query_THD.shape[1:]
    kv_heads = key_TKD.shape[1]
    scale = 1.0 / math.sqrt(size)
    dkey, dvalue = (torch.zeros(key_TKD.shape, device=key_TKD.device) for _ in range(2))
    starts, firsts = paths.row_start_S.tolist(), paths.first_position_S.tolist()
    for segment, first in enumerate(firsts):
        for start in range(starts[segment], starts[segment + 1], BACKWARD_ROWS):
            stop = min(start + BACKWARD_ROWS, starts[segment + 1])
            q_position = torch.arange(start, stop, device=key_TKD.device) - starts[segment] + first
            keys = stop - starts[segment] + first
            slots = paths.table_SP[segment, :keys].long()
            shape = (stop - start, kv_heads, heads // kv_heads)
            query, dout, out = (x[start:stop].float().view(*shape, size) for x in (query_THD, dout_THD, out_THD))
            lse = lse_TH[start:stop].view(shape).permute(1, 2, 0)
            key, value = key_TKD[slots].float(), value_TKD[slots].float()
            k_position = torch.arange(keys, device=key_TKD.device)
            hidden = k_position > q_position[:, None]
            if window:
                hidden |= k_position <= q_position[:, None] - window
            scores = torch.einsum("qkgd,nkd->kgqn", query, key) * scale
            weight = (scores - lse[..., None]).exp().masked_fill(hidden, 0.0)
            delta = (dout * out).sum(-1).permute(1, 2, 0)
            dscores = weight * (torch.einsum("qkgd,nkd->kgqn", dout, value) - delta[..., None]) * scale
            # The slots of a path are distinct, so no two sums meet in one place and the order stays that of the loop.
            dvalue.index_add_(0, slots, torch.einsum("kgqn,qkgd->nkd", weight, dout))
            dkey.index_add_(0, slots, torch.einsum("kgqn,qkgd->nkd", dscores, query))
            grads[0][start:stop] = torch.einsum("kgqn,nkd->qkgd", dscores, key).reshape(stop - start, heads, size)
    grads[1].copy_(dkey)
    grads[2].copy_(dvalue)
