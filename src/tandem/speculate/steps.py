"""The rows that a drafter runs in training: a pack's, and then again and again on what it said itself.

At step 0 every row of the pack runs, on what the target gave. At step k a row stands for a draft k tokens ahead of the
last true one: it is made of what step k - 1 gave at the row before it, and it sees the keys of step 0 up to k rows
before it, and its own path's of steps 1 to k (EAGLE-3's training-time test, arXiv 2503.01840).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tandem.columns import Array
from tandem.kernels.attention import attention, attention_backward, attention_reference
from tandem.kernels.build.load import kernel
from tandem.kernels.paths import Paths
from tandem.models.view import Heads, Tables, turn_, turn_backward_, turn_reference
from tandem.types import Microbatch


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one step, n of them."""

    paths: Paths  # over the keys of all steps so far
    rows_n: torch.Tensor  # int64: of the pack
    positions_n: torch.Tensor  # int64
    before_n: torch.Tensor  # int64: place of the row before, among those of the last step; of the pack's rows at step 0
    first_n: torch.Tensor  # bool: there is none, at the first position of step 0
    own_N: torch.Tensor  # int64: predictions that this step makes
    places_N: torch.Tensor  # int64: their places among its rows


def steps_of(microbatch: Microbatch, count: int) -> list[Step]:
    """The steps 0 to count - 1. A prediction whose row lies at position p is made by the steps up to p."""
    bounds, first_S, parent_S = microbatch.segments_S, microbatch.first_S, microbatch.parent_S
    table_SP = Paths.of_segments(*(np.asarray(x, np.int32) for x in (bounds, first_S, parent_S))).table_SP.numpy()
    rows, sizes = int(bounds[-1]), np.diff(bounds)
    segment_T = np.repeat(np.arange(len(sizes)), sizes)
    position_T = np.arange(rows) + (np.asarray(first_S) - bounds[:-1])[segment_T]
    before_T = np.where(position_T > 0, table_SP[segment_T, np.maximum(position_T - 1, 0)], -1)
    predicted_N = microbatch.rows_N.astype(np.int64)
    wanted = [np.arange(rows)]
    needed = np.zeros(0, np.int64)
    for step in range(count - 1, 0, -1):  # what a later step is made of runs in the one before
        needed = np.union1d(before_T[needed], predicted_N[position_T[predicted_N] >= step]).astype(np.int64)
        wanted.insert(1, needed)
    found, start, places = list[Step](), 0, list[Array]()
    for step, chosen in enumerate(wanted):
        place_T = np.full(rows, -1, np.int64)
        place_T[chosen] = np.arange(len(chosen))
        places.append(place_T + np.where(place_T >= 0, start, 0))
        start += len(chosen)
        if step == 0:
            paths = Paths.of_segments(*(np.asarray(x, np.int32) for x in (bounds, first_S, parent_S)))
            before_n = before_T
        else:
            paths = _own_paths(table_SP[segment_T[chosen]], position_T[chosen], places, step)
            before_n = places[step - 1][before_T[chosen]] - (start - len(chosen) - len(wanted[step - 1]))
        own_N = np.flatnonzero(position_T[predicted_N] >= step)
        at_n, first_n, place_N = position_T[chosen], before_n < 0, place_T[predicted_N[own_N]]
        arrays = (torch.from_numpy(x) for x in (chosen, at_n, np.maximum(before_n, 0), first_n, own_N, place_N))
        found.append(Step(paths, *arrays))
    return found


class Steps(NamedTuple):
    """Of a pack."""

    each: list[Step]
    begins_N: torch.Tensor  # bool: predictions that begin as many in a row, of one text, as there are steps

    @staticmethod
    def of(microbatch: Microbatch, count: int) -> Steps:
        """The steps 0 to count - 1."""
        each = steps_of(microbatch, count)
        return Steps(each, torch.from_numpy(chains(follows(microbatch, each[0]), count)))


def follows(microbatch: Microbatch, first: Step) -> Array:
    """bool [N]: a prediction that comes right behind the one before it, in one text."""
    rows_N, sample_N = microbatch.rows_N, np.repeat(np.arange(len(microbatch.sample_ids)), microbatch.sample_tokens)
    before_T, found_N = np.where(first.first_n.numpy(), -1, first.before_n.numpy()), np.zeros(len(rows_N), dtype=bool)
    found_N[1:] = (before_T[rows_N[1:]] == rows_N[:-1]) & (sample_N[1:] == sample_N[:-1])
    return found_N


def chains(follows_N: Array, count: int) -> Array:
    """bool [N]: a prediction that is the first of `count` in a row.

    >>> chains(np.array([False, True, True, False]), 2).tolist()
    [True, True, False, False]
    """
    whole_N = np.ones(len(follows_N), dtype=bool)
    for step in range(1, count):
        whole_N[max(len(whole_N) - step, 0) :] = False
        whole_N[: max(len(whole_N) - step, 0)] &= follows_N[step:]
    return whole_N


def _own_paths(table_nP: Array, position_n: Array, places: list[Array], step: int) -> Paths:
    """A segment a row: its path's slots of step 0, but for the last `step`, which are those of steps 1 to `step`."""
    table_nP, index_n = table_nP.astype(np.int64), np.arange(len(table_nP))
    for own in range(1, step + 1):
        at_n = position_n - step + own
        table_nP[index_n, at_n] = places[own][table_nP[index_n, at_n]]
    table_nP[np.arange(table_nP.shape[1]) > position_n[:, None]] = 0
    starts = torch.arange(len(table_nP) + 1, dtype=torch.int32)
    component = torch.tensor([0, len(table_nP)], dtype=torch.int32)  # all see keys of step 0
    first_n = torch.from_numpy(position_n.astype(np.int32))
    return Paths(starts, first_n, torch.from_numpy(table_nP.astype(np.int32)), 1, component)


class _StepAttention(torch.autograd.Function):
    """Of a step's rows over the keys and values of the steps before, which are turned, and its own."""

    @staticmethod
    def forward(ctx, qkv_nW, before_CW, step, heads, tables):  # type: ignore[no-untyped-def]
        qkv_nW, queries = qkv_nW.contiguous(), heads.heads * heads.size
        turn_(qkv_nW, step.positions_n, heads, tables)
        held_CW = torch.cat([before_CW, qkv_nW[:, queries:]])
        key, value = _halves(held_CW, heads)
        query = heads.cut(qkv_nW)[0]
        lse = torch.empty(query.shape[:2])
        out = attention(query, key, value, step.paths, lse_TH=lse)
        ctx.save_for_backward(qkv_nW, held_CW, out, lse)
        ctx.step, ctx.heads, ctx.tables = step, heads, tables
        return out.flatten(1), qkv_nW[:, queries:].clone()

    @staticmethod
    def backward(ctx, dout, dnew):  # type: ignore[no-untyped-def]
        qkv_nW, held_CW, out, lse = ctx.saved_tensors
        heads, queries = ctx.heads, ctx.heads.heads * ctx.heads.size
        dqkv_nW, dheld_CW = torch.empty_like(qkv_nW), torch.empty_like(held_CW)
        given = heads.cut(qkv_nW)[0], *_halves(held_CW, heads)
        grads = heads.cut(dqkv_nW)[0], *_halves(dheld_CW, heads)
        attention_backward(dout.contiguous().view(out.shape), out, lse, given, grads, ctx.step.paths)
        own = len(held_CW) - len(qkv_nW)
        dqkv_nW[:, queries:] = dheld_CW[own:] + dnew
        turn_backward_(dqkv_nW, qkv_nW, (), ctx.step.positions_n, heads, ctx.tables)
        return dqkv_nW, dheld_CW[:own], None, None, None


def _halves(held_CW: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [C, K, D] each."""
    both = held_CW.view(len(held_CW), 2, heads.kv_heads, heads.size)
    return both[:, 0], both[:, 1]


class StepView:
    """Where the rows of the steps find keys and values: a view of models/view.py, of one layer. Differentiable through
    all steps."""

    def __init__(self, heads: Heads, dtype: torch.dtype) -> None:
        self._held_CW = torch.empty(0, 2 * heads.kv_heads * heads.size, dtype=dtype)
        self._step: Step | None = None
        self.positions_T = torch.empty(0, dtype=torch.int64)

    def begin(self, step: Step) -> None:
        """The next pass is of this one."""
        self._step, self.positions_T = step, step.positions_n

    def attend(self, layer: int, qkv_TW: torch.Tensor, heads: Heads, tables: Tables) -> torch.Tensor:
        step = self._step
        assert step is not None
        if kernel("attention", "attention_backward", qkv_TW.dtype, "pp") is not None:
            out: torch.Tensor
            out, new = _StepAttention.apply(qkv_TW, self._held_CW, step, heads, tables)
            self._held_CW = torch.cat([self._held_CW, new])
            return out
        query, key = turn_reference(qkv_TW, step.positions_n, heads, tables)
        new = torch.cat([key.flatten(1), heads.cut(qkv_TW)[2].flatten(1)], 1)
        self._held_CW = torch.cat([self._held_CW, new])
        return attention_reference(query, *_halves(self._held_CW, heads), step.paths).flatten(1)
