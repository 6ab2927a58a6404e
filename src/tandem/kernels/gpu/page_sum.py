"""Sums of pages of keys and values as `kernels.page_sum`, all layers in one launch and left on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels.page_sum import GOLDEN

BLOCK = 1024  # words of 8 bytes


@triton.jit
def page_sum_kernel(  # type: ignore[no-untyped-def]
    addresses, starts, pages, found, pools: tl.constexpr, block: tl.constexpr, golden: tl.constexpr
):
    which = tl.program_id(1)
    page = tl.load(pages + tl.program_id(0))
    before = tl.load(starts + which)  # words of the pools before
    words = tl.load(starts + which + 1) - before
    start = tl.load(addresses + which).to(tl.pointer_type(tl.int64)) + page * words
    total = tl.zeros((block,), tl.int64)
    for first in range(0, words, block):
        w = first + tl.arange(0, block)
        odd = 2 * (before + w) + 1
        total += tl.load(start + w, w < words, 0) * (odd * golden)
    tl.store(found + tl.program_id(0) * pools + which, tl.sum(total, 0))


class PageSums:
    """Remembers the sum of each named page of one set of pools. Nothing here waits for the device."""

    def __init__(self, pools: Sequence[Tensor]) -> None:
        """`pools`: contiguous [pages, elements], the keys, values and scales of all layers in a fixed order."""
        page_bytes = [pool[0].nbytes for pool in pools]
        assert all(pool.is_contiguous() for pool in pools) and not any(size % 8 for size in page_bytes), page_bytes
        starts = itertools.accumulate((size // 8 for size in page_bytes), initial=0)
        self._starts = torch.tensor(list(starts), dtype=torch.int64).to(pools[0].device)
        self._pools = tuple(pools)  # held for their addresses
        self._addresses = torch.tensor([pool.data_ptr() for pool in pools], dtype=torch.int64).to(pools[0].device)
        self._named = torch.zeros(pools[0].shape[0], dtype=torch.int64, device=pools[0].device)

    def sums(self, pages_N: Tensor) -> Tensor:
        """[N] int64 of pages (int64), in no fixed order of addition, which modulo 2^64 has one result."""
        parts = torch.empty(len(pages_N), len(self._pools), dtype=torch.int64, device=pages_N.device)
        if len(pages_N):
            page_sum_kernel[parts.shape](self._addresses, self._starts, pages_N, parts, len(self._pools), BLOCK, GOLDEN)
        return parts.sum(1)

    def name(self, pages_N: Tensor) -> None:
        """Sum these pages as they are now."""
        self._named[pages_N] = self.sums(pages_N)

    def wrong(self, pages_N: Tensor) -> Tensor:
        """[N] bool: what changed since it was named."""
        return self._named[pages_N] != self.sums(pages_N)
