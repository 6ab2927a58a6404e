"""Two views of keys and values under one forward: the learner's pack and the engine's pages.

Both rotate the fused query-key-value rows in place and call the same attention; they differ in where keys lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tandem.columns import Array
from tandem.kernels.attention import attention, attention_backward, attention_reference, paged_attention
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.norm import unit_norm_, unit_norm_backward_, unit_norm_reference
from tandem.kernels.page_pool import KvPool, rotate_store_
from tandem.kernels.paths import Paths
from tandem.kernels.rotary import rotate_, rotate_reference
from tandem.kernels.rounding import Kept, through
from tandem.kernels.span_pool import SpanPool, coded_attention
from tandem.models.spans import PackSpans, Wave, fill_pages_, round_pages_, waves_of
from tandem.numerics.kv import SpanRule
from tandem.types import Reach


@dataclass(frozen=True, slots=True)
class Heads:
    """A layer's rows of the fused projection: H query heads, K key heads, K value heads of D, and how they attend.

    >>> Heads(9, 3, 64).width
    960
    """

    heads: int
    kv_heads: int
    size: int
    reach: Reach = Reach()
    rotary: bool = True
    norm_eps: float | None = None  # after rotation: heads of q and k are divided by their root mean square
    factor_P: torch.Tensor | None = None  # fp32, by position: what a query is multiplied by, where nothing is rotated
    kept: Kept | None = None  # what keys, turned, and values are rounded to; None: they stay as they are

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.size

    def cut(self, qkv_TW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Strided views [T, H, D], [T, K, D], [T, K, D]."""
        rows = qkv_TW.shape[0]
        ends = (self.heads, self.heads + self.kv_heads, self.heads + 2 * self.kv_heads)
        all_heads = qkv_TW.view(rows, -1, self.size)
        return all_heads[:, : ends[0]], all_heads[:, ends[0] : ends[1]], all_heads[:, ends[1] :]


Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [positions, D / 2]


def turn_(qkv_TW: torch.Tensor, positions_T: torch.Tensor, heads: Heads, tables: Tables) -> tuple[torch.Tensor, ...]:
    """Rotate queries and keys in place, then norm them; or multiply the queries of a layer without rotation.

    Gives what `turn_backward_` needs of the norms, none where the layer has none.
    """
    query, key, _ = heads.cut(qkv_TW)
    if heads.rotary:
        for rotated in (query, key):
            rotate_(rotated, positions_T, tables[0], tables[1])
    elif heads.factor_P is not None:
        query.copy_(query.float() * heads.factor_P[positions_T][:, None, None])
    return () if heads.norm_eps is None else (unit_norm_(query, heads.norm_eps), unit_norm_(key, heads.norm_eps))


def turn_backward_(
    dqkv_TW: torch.Tensor,
    qkv_TW: torch.Tensor,
    scales: Sequence[torch.Tensor],
    positions_T: torch.Tensor,
    heads: Heads,
    tables: Tables,
) -> None:
    """Turn the gradient of what `turn_` left in `qkv_TW` into that of what it was given, in place."""
    dquery, dkey, _ = heads.cut(dqkv_TW)
    query, key, _ = heads.cut(qkv_TW)
    for gradient, normed, scale in zip((dquery, dkey), (query, key), scales, strict=False):
        unit_norm_backward_(gradient, normed, scale)
    if heads.rotary:
        for rotated in (dquery, dkey):
            rotate_(rotated, positions_T, tables[0], tables[1], sign=-1.0)
    elif heads.factor_P is not None:
        dquery.copy_(dquery.float() * heads.factor_P[positions_T][:, None, None])


def turn_reference(
    qkv_TW: torch.Tensor, positions_T: torch.Tensor, heads: Heads, tables: Tables
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as `turn_` leaves them, in copies; differentiable."""
    query, key, _ = heads.cut(qkv_TW)
    if heads.rotary:
        query, key = (rotate_reference(x, positions_T, tables[0], tables[1]) for x in (query, key))
    elif heads.factor_P is not None:
        wide = query.dtype if query.dtype == torch.float64 else torch.float32
        query = (query.to(wide) * heads.factor_P[positions_T][:, None, None]).to(query.dtype)
    if heads.norm_eps is not None:
        query, key = (unit_norm_reference(x, heads.norm_eps) for x in (query, key))
    return query, key


def keep_(qkv_TW: torch.Tensor, heads: Heads, kept: Kept, positions_T: torch.Tensor) -> None:
    """Round keys that are turned, and values, in place."""
    for x_TKD in heads.cut(qkv_TW)[1:]:
        x_TKD.copy_(kept.rounded(x_TKD, positions_T))


class View(Protocol):
    """Where a forward pass finds keys and values."""

    positions_T: torch.Tensor  # int64

    def attend(
        self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Rotate, remember the keys and values, and attend: [T, H * D]. May overwrite qkv."""
        ...


class _PackAttention(torch.autograd.Function):
    """Rotation in place is safe: no producer of qkv reads it in its own backward pass."""

    @staticmethod
    def forward(ctx, qkv_TW, view, heads, tables):  # type: ignore[no-untyped-def]
        qkv_TW = qkv_TW.contiguous()
        query, key, value = heads.cut(qkv_TW)
        scales = turn_(qkv_TW, view.positions_T, heads, tables)
        spans, keys_values = view.spans(heads), (key, value)
        ctx.normed_TKD = heads.cut(qkv_TW)[1].clone() if heads.kept is not None and not spans and scales else None
        if spans:
            keys_values = spans.with_copies(key, value, heads.kept.span)
        elif heads.kept is not None:  # gradients pass straight through
            keep_(qkv_TW, heads, heads.kept, view.positions_T)
        lse_TH = torch.empty(query.shape[:2], device=query.device)
        out = attention(query, *keys_values, spans.paths if spans else view.paths, heads.reach, lse_TH)
        ctx.save_for_backward(qkv_TW, out, lse_TH, *scales)
        ctx.view, ctx.heads, ctx.tables = view, heads, tables
        return out.view(out.shape[0], -1)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        qkv_TW, out, lse_TH, *scales = ctx.saved_tensors
        dqkv_TW = torch.empty_like(qkv_TW)
        grads = ctx.heads.cut(dqkv_TW)
        dout_THD = dout.contiguous().view(out.shape)
        query, key, value = ctx.heads.cut(qkv_TW)
        if spans := ctx.view.spans(ctx.heads):
            qkv = query, *spans.with_copies(key, value, ctx.heads.kept.span)
            attention_backward(dout_THD, out, lse_TH, qkv, grads, spans.paths, ctx.heads.reach, spans.source_C)
        else:
            attention_backward(dout_THD, out, lse_TH, (query, key, value), grads, ctx.view.paths, ctx.heads.reach)
        if ctx.normed_TKD is not None:  # the norm's is of what it gave
            qkv_TW = qkv_TW.clone()
            ctx.heads.cut(qkv_TW)[1].copy_(ctx.normed_TKD)
        turn_backward_(dqkv_TW, qkv_TW, scales, ctx.view.positions_T, ctx.heads, ctx.tables)
        return dqkv_TW, None, None, None


class PackView:
    """The learner's: slots are the rows of the pack, so a path may run through rows that several samples share.

    Segment s owns rows [segments_S[s], segments_S[s + 1]), at positions from first_S[s] on; what it sees before them is
    the path of parent_S[s], a segment before it, up to there. No parents: every segment begins at position 0.
    """

    def __init__(
        self,
        segments_S: Array | Sequence[int],
        first_S: Array | Sequence[int] | None = None,
        parent_S: Array | Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        bounds = np.asarray(segments_S, dtype=np.int32)
        first = np.zeros(len(bounds) - 1, np.int32) if first_S is None else np.asarray(first_S, dtype=np.int32)
        parent = np.full(len(first), -1) if parent_S is None else np.asarray(parent_S)
        positions_T = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], np.diff(bounds))
        self.positions_T = torch.from_numpy(positions_T.astype(np.int64)).to(device)
        self.paths = Paths.of_segments(bounds, first, parent).to(self.positions_T.device)
        self._spans: dict[int, PackSpans] = {}

    def spans(self, heads: Heads) -> PackSpans | None:
        """Where what is rounded a span at a time lies; None where the layer has no such rule."""
        rule = None if heads.kept is None else heads.kept.span
        if rule is None:
            return None
        if rule.tokens not in self._spans:
            self._spans[rule.tokens] = PackSpans.of(self.paths, rule.tokens)
        return self._spans[rule.tokens]

    def attend(
        self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        triton = backend(qkv_TW) == "triton"
        if triton or kernel("attention", "attention_backward", qkv_TW.dtype, "pp") is not None:
            return _PackAttention.apply(qkv_TW, self, heads, tables)
        query, key = turn_reference(qkv_TW, self.positions_T, heads, tables)
        value = heads.cut(qkv_TW)[2]
        if spans := self.spans(heads):
            assert heads.kept is not None and heads.kept.span is not None
            made = spans.with_copies(key.detach(), value.detach(), heads.kept.span)
            rows = torch.cat([torch.arange(len(key)), spans.source_C])
            key, value = (through(x[rows], all_CKD) for x, all_CKD in zip((key, value), made, strict=True))
            return attention_reference(query, key, value, spans.paths, heads.reach).flatten(1)
        if heads.kept is not None:
            key, value = (through(x, heads.kept.rounded(x.detach(), self.positions_T)) for x in (key, value))
        return attention_reference(query, key, value, self.paths, heads.reach).flatten(1)


class PagedView:
    """The engine's: slots are tokens of the KV pages of a layer. One view serves one step.

    What is attended to is what the pages hold, the rows of this step included: where pages are of a narrower dtype, a
    row's result does not depend on which keys came in its own step.
    """

    places_S: Array | None = None  # int64: of each segment, where it fills pages that lie apart until they are full

    def __init__(
        self,
        positions_T: torch.Tensor,
        slots_G: Sequence[torch.Tensor],
        paths_G: Sequence[Paths],
        group_L: Sequence[int],
        pools: Sequence[KvPool | SpanPool],
        window: int = 0,
        sinks: int = 0,
        kept: Kept | None = None,
    ) -> None:
        self.positions_T = positions_T
        self.slots_G = slots_G  # int64 [T], of each group of layers: where each row's key and value go
        self.paths_G = paths_G
        self.paths = paths_G[0]  # whose rows and first positions are those of every group
        self.group_L = group_L
        self.pools = pools  # of each layer; layers of several groups may have one pool, and never one page
        self.window = window  # 0: the model's own; else latest positions that a query sees, and the leading `sinks`
        self.sinks = sinks
        self.kept = kept  # None: the layers' own; else what the engine alone rounds keys and values to
        self._waves_G: dict[int, list[Wave]] = {}

    def attend(
        self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        cut, tables_or_none = heads.cut(qkv_TW), tables if heads.rotary else None
        pool, group = self.pools[layer], self.group_L[layer]
        kept = self.kept or heads.kept
        reach, sinks = Reach(window=self.window) if self.window else heads.reach, self.sinks if self.window else 0
        if isinstance(pool, SpanPool):
            turn_(qkv_TW, self.positions_T, heads, tables)
            return self._attend_coded(qkv_TW, heads, pool, group, reach, sinks)
        if pool.holds(kept):
            kept = None
        if heads.norm_eps is not None or heads.factor_P is not None or kept is not None:
            turn_(qkv_TW, self.positions_T, heads, tables)
            tables_or_none = None
        if kept is not None and kept.span is None:
            keep_(qkv_TW, heads, kept, self.positions_T)
        rotate_store_(cut, self.positions_T, tables_or_none, self.slots_G[group], pool)
        if kept is not None and kept.span is not None:
            return self._attend_spans(cut[0], pool, group, kept.span, reach, sinks)
        return paged_attention(cut[0], pool, self.paths_G[group], reach, sinks).flatten(1)

    def _attend_coded(
        self, qkv_TW: torch.Tensor, heads: Heads, pool: SpanPool, group: int, reach: Reach, sinks: int
    ) -> torch.Tensor:
        """Over pages of codes, and of each segment the one that it fills."""
        if group not in self._waves_G:
            assert self.places_S is not None, "pages that are filled lie apart"
            open_S = self.places_S * len(self.paths_G) + group
            self._waves_G[group] = waves_of(self.paths_G[group], open_S, pool.num_pages)
        out_THD = torch.empty(len(qkv_TW), heads.heads, heads.size, dtype=qkv_TW.dtype)
        for wave in self._waves_G[group]:
            part_NW = qkv_TW if wave.rows_N is None else qkv_TW[wave.rows_N]
            positions_N = self.positions_T if wave.rows_N is None else self.positions_T[wave.rows_N]
            cut = heads.cut(part_NW)
            rotate_store_(cut, positions_N, None, wave.slots_N, pool.open)
            found = coded_attention(cut[0], pool, wave.paths, reach, sinks)
            if wave.rows_N is None:
                out_THD = found
            else:
                out_THD[wave.rows_N] = found
            fill_pages_(pool, wave.pages_N, wave.open_N)
        return out_THD.flatten(1)

    def _attend_spans(
        self, query_THD: torch.Tensor, pool: KvPool, group: int, rule: SpanRule, reach: Reach, sinks: int
    ) -> torch.Tensor:
        """Over pages that hold this step's keys and values as they were made, those before as they are rounded; pages
        that it fills are rounded."""
        if group not in self._waves_G:
            self._waves_G[group] = waves_of(self.paths_G[group])
        out_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype)
        for wave in self._waves_G[group]:
            if wave.rows_N is None:
                out_THD = paged_attention(query_THD, pool, wave.paths, reach, sinks)
            else:
                out_THD[wave.rows_N] = paged_attention(query_THD[wave.rows_N], pool, wave.paths, reach, sinks)
            round_pages_(pool, wave.pages_N, wave.first_N, rule)
        return out_THD.flatten(1)
