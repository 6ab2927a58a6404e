"""Two views of keys and values under one forward: the learner's pack and the engine's pages.

Both rotate the fused query-key-value rows in place and call the same attention; they differ in where keys lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tandem.kernels.attention import Paths, attention, attention_backward, attention_reference
from tandem.kernels.build import kernel
from tandem.kernels.choice import backend
from tandem.kernels.rotary import rotate_, rotate_reference, store_


@dataclass(frozen=True, slots=True)
class Heads:
    """How a row of the fused projection is cut: H query heads, K key heads, K value heads of D.

    >>> Heads(9, 3, 64, None).width
    960
    """

    heads: int
    kv_heads: int
    size: int
    window: int | None

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.size

    def cut(self, qkv_TW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Strided views [T, H, D], [T, K, D], [T, K, D]."""
        rows = qkv_TW.shape[0]
        ends = (self.heads, self.heads + self.kv_heads, self.heads + 2 * self.kv_heads)
        all_heads = qkv_TW.view(rows, -1, self.size)
        return all_heads[:, : ends[0]], all_heads[:, ends[0] : ends[1]], all_heads[:, ends[1] :]


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
        for rotated in (query, key):
            rotate_(rotated, view.positions_T, tables[0], tables[1])
        lse_TH = torch.empty(query.shape[:2], device=query.device)
        out = attention(query, key, value, view.paths, heads.window, lse_TH)
        ctx.save_for_backward(qkv_TW, out, lse_TH)
        ctx.view, ctx.heads, ctx.tables = view, heads, tables
        return out.view(out.shape[0], -1)

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        qkv_TW, out, lse_TH = ctx.saved_tensors
        dqkv_TW = torch.empty_like(qkv_TW)
        grads = ctx.heads.cut(dqkv_TW)
        dout_THD = dout.contiguous().view(out.shape)
        attention_backward(dout_THD, out, lse_TH, ctx.heads.cut(qkv_TW), grads, ctx.view.paths, ctx.heads.window)
        for rotated in grads[:2]:
            rotate_(rotated, ctx.view.positions_T, ctx.tables[0], ctx.tables[1], sign=-1.0)
        return dqkv_TW, None, None, None


class PackView:
    """The learner's: slots are the rows of the pack, so a path may run through rows that several samples share."""

    def __init__(
        self,
        positions: Sequence[int],
        segments: Sequence[int],
        paths: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.positions_T = torch.tensor(positions, dtype=torch.int64, device=device)
        first = [positions[start] for start in segments[:-1]]
        self.paths = Paths.build(list(segments), first, [list(path) for path in paths], page_tokens=1)
        self.paths = self.paths.to(self.positions_T.device)

    def attend(
        self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        triton = backend(qkv_TW) == "triton"
        if triton or kernel("attention", "attention_backward", qkv_TW.dtype, "pp") is not None:
            return _PackAttention.apply(qkv_TW, self, heads, tables)
        query, key, value = heads.cut(qkv_TW)
        query, key = (rotate_reference(x, self.positions_T, tables[0], tables[1]) for x in (query, key))
        return attention_reference(query, key, value, self.paths, heads.window).flatten(1)


class PagedView:
    """The engine's: slots are tokens of the KV pages of a layer. One view serves one step.

    What is attended to is what the pages hold, the rows of this step included: where pages are of a narrower dtype, a
    row's result does not depend on which keys came in its own step.
    """

    def __init__(
        self,
        positions_T: torch.Tensor,
        slots_T: torch.Tensor,
        paths: Paths,
        pools: Sequence[tuple[torch.Tensor, torch.Tensor]],
        window: int = 0,
        sinks: int = 0,
    ) -> None:
        self.positions_T = positions_T
        self.slots_T = slots_T  # int64: where each row's key and value go
        self.paths = paths
        self.pools = pools  # of each layer: keys and values [slots, K, D]
        self.window = window  # 0: the model's own; else latest positions that a query sees, and the leading `sinks`
        self.sinks = sinks

    def attend(
        self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        query, key, value = heads.cut(qkv_TW)
        for rotated in (query, key):
            rotate_(rotated, self.positions_T, tables[0], tables[1])
        keys, values = self.pools[layer]
        store_(key, self.slots_T, keys)
        store_(value, self.slots_T, values)
        if self.window:
            return attention(query, keys, values, self.paths, self.window, sinks=self.sinks).flatten(1)
        return attention(query, keys, values, self.paths, heads.window).flatten(1)
