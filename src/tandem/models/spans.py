"""Where spans of tokens lie whose keys and values are rounded at once (numerics/kv.py: `SpanRule`).

A query at position p sees the sinks and the tokens from p - p % span on as they were made, and those between as they
are rounded. So what it sees hangs on its own context alone. Segments are cut where spans begin; the queries of a part
then see the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.columns import Array, ranges
from tandem.kernels.page_pool import KvPool
from tandem.kernels.paths import Paths
from tandem.kernels.span_pool import SpanPool
from tandem.numerics.kv import SpanRule


@dataclass(frozen=True, slots=True, eq=False)
class PackSpans:
    """Of a pack: slots [0, T) are its rows, and the span of copy n lies in [T + n * span, T + (n + 1) * span).

    >>> paths = Paths.of_segments(np.array([0, 5]), np.array([0]), np.array([-1]))
    >>> PackSpans.of(paths, 2).paths.table_SP[-1].tolist()
    [5, 6, 7, 8, 4]
    """

    paths: Paths
    source_C: Tensor  # int64: the row that each slot behind the rows is a copy of
    first_N: Tensor  # int64: position of the first token of each copy

    @classmethod
    def of(cls, paths: Paths, span: int) -> PackSpans:
        """Of paths whose slots are rows. A span that several segments see has one copy."""
        starts, firsts = paths.row_start_S.tolist(), paths.first_position_S.tolist()
        tables = paths.table_SP.numpy()
        assert paths.page_tokens == 1 and paths.component_start is not None, paths.page_tokens
        rows, copies, copied = starts[-1], dict[bytes, int](), list[np.ndarray]()
        first_N, bounds, first_P, table_PS, parts_S = list[int](), [0], list[int](), list[np.ndarray](), [0]
        for start, end, first, table in zip(starts[:-1], starts[1:], firsts, tables, strict=True):
            last = first + end - start - 1
            seen = table.copy()
            for begin in range(0, last // span * span if end > start else 0, span):
                source = table[begin : begin + span]
                slot = copies.setdefault(source.tobytes(), rows + len(copied) * span)
                if slot == rows + len(copied) * span:
                    copied.append(source)
                    first_N.append(begin)
                seen[begin : begin + span] = np.arange(slot, slot + span)
            for begin in range(first // span * span, last + 1, span) if end > start else ():
                low, high = max(first, begin), min(last + 1, begin + span)
                bounds.append(bounds[-1] + high - low)
                first_P.append(low)
                table_PS.append(np.concatenate([seen[:begin], table[begin:]]))
            parts_S.append(len(first_P))
        component = [parts_S[s] for s in paths.component_start.tolist()]
        table_PP = np.array(table_PS, dtype=np.int32).reshape(len(first_P), tables.shape[1])
        int32 = [torch.tensor(x, dtype=torch.int32) for x in (bounds, first_P, component)]
        cut = Paths(int32[0], int32[1], torch.from_numpy(table_PP), 1, int32[2])
        source_C = np.concatenate([np.zeros(0, np.int64), *copied]).astype(np.int64)
        return cls(cut, torch.from_numpy(source_C), torch.tensor(first_N, dtype=torch.int64))

    def with_copies(self, key_TKD: Tensor, value_TKD: Tensor, rule: SpanRule) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, [T + C, K, D] each."""
        if not len(self.source_C):
            return key_TKD, value_TKD
        full = [x[self.source_C].unflatten(0, (-1, rule.tokens)) for x in (key_TKD, value_TKD)]
        made = rule.rounded(full[0], full[1], self.first_N)
        key, value = (torch.cat([x, y.flatten(0, 1)]) for x, y in zip((key_TKD, value_TKD), made, strict=True))
        return key, value


class Wave(NamedTuple):
    """Parts of a step's segments that may run at once: of each segment the next one."""

    rows_N: Tensor | None  # int64: its rows among the step's; None: all, as they are
    paths: Paths
    pages_N: Tensor  # int64: that its rows fill; to be rounded behind it, before the next
    first_N: Tensor  # int64: positions of their first tokens
    open_N: Tensor  # int64: pages in which those are filled, where they lie apart
    slots_N: Tensor  # int64: of its rows there


def waves_of(paths: Paths, open_S: Array | None = None, num_pages: int = 0) -> list[Wave]:
    """Of a step's rows over pages of a span each. What later waves see of a page is what it is rounded to.

    open_S: of each segment, the page in which its pages are filled, of a SpanPool of `num_pages` full ones.
    """
    span, made = paths.page_tokens, list[Wave]()
    starts, first_S = paths.row_start_S.numpy().astype(np.int64), paths.first_position_S.numpy().astype(np.int64)
    end_S = first_S + np.diff(starts)
    block_S, most = first_S // span, int(((end_S - 1) // span - first_S // span).max(initial=-1)) + 1
    for turn in range(most):
        low_S = np.maximum(first_S, (block_S + turn) * span)
        high_S = np.minimum(end_S, (block_S + turn + 1) * span)
        some = np.flatnonzero(low_S < high_S)
        low, high, block = low_S[some], high_S[some], block_S[some] + turn
        rows_N = ranges(starts[some] + low - first_S[some], high - low)
        full = np.flatnonzero(high == (block + 1) * span)
        own = torch.from_numpy(block[full])
        table = paths.table_SP[torch.from_numpy(some)]
        pages_N, opened = table[torch.from_numpy(full), own].long(), np.zeros(len(some), np.int64)
        if open_S is not None:
            opened = open_S[some]
            table[torch.arange(len(some)), torch.from_numpy(block)] = torch.from_numpy(opened + num_pages).int()
        places = ranges(low - block * span, high - low) + np.repeat(opened * span, high - low)
        bounds = torch.from_numpy(np.concatenate([[0], np.cumsum(high - low)]).astype(np.int32))
        cut = Paths(bounds, torch.from_numpy(low.astype(np.int32)), table, span)
        rows = None if len(rows_N) == paths.num_rows else torch.from_numpy(rows_N)
        filled = torch.from_numpy(block[full] * span), torch.from_numpy(opened[full])
        made.append(Wave(rows, cut, pages_N, *filled, torch.from_numpy(places)))
    return made


def fill_pages_(pool: SpanPool, pages_N: Tensor, open_N: Tensor) -> None:
    """Round full pages, all different, from where they were filled."""
    if len(pages_N):
        slots_N = (open_N[:, None] * pool.page_tokens + torch.arange(pool.page_tokens)).flatten()
        pool.fill_(pages_N, *(x.unflatten(0, (-1, pool.page_tokens)) for x in pool.open.rows(slots_N)))


def round_pages_(pool: KvPool, pages_N: Tensor, first_N: Tensor, rule: SpanRule) -> None:
    """Round full pages, all different, where they lie; what is behind a sink is of the first span."""
    if not len(pages_N):
        return
    slots_N = (pages_N[:, None] * rule.tokens + torch.arange(rule.tokens)).flatten()
    key, value = (x.unflatten(0, (-1, rule.tokens)) for x in pool.rows(slots_N))
    key, value = rule.rounded(key, value, first_N)
    pool.store_(key.flatten(0, 1), value.flatten(0, 1), slots_N)
