"""The rows of a step, as arrays beside the CPU: where each is in its context, where its key and value go; who draws."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tandem.columns import ranges
from tandem.errors import DeliveryError
from tandem.kernels.sample import SamplingBatch

if TYPE_CHECKING:
    from tandem.engine.batch import Batch, Work


A = TypeVar("A")  # an array here, or a tensor of a device
Here = NDArray[Any]


class StepRows(NamedTuple, Generic[A]):
    """T rows of S works over G groups of layers, N draws. A table is NULL where no query looks: here, page 0."""

    tokens_T: A  # int64
    positions_T: A
    slots_GT: A
    row_start_S: A  # [S + 1] int32
    first_S: A  # int32: position of each work's first row
    table_GSP: A  # int32
    rows_N: A  # int64, ascending: that draw, and that score

    @staticmethod
    def of(works: Sequence[Work], page_tokens: int) -> StepRows[Here]:
        """No Python loop over tokens. 64 works of one token take 23 us on a Zen 5 core."""
        count_S = np.array([len(work.tokens) for work in works], dtype=np.int32)
        first_S = np.array([work.start for work in works], dtype=np.int32)
        row_start_S = np.zeros(len(works) + 1, dtype=np.int32)
        np.cumsum(count_S, out=row_start_S[1:])
        num_tokens = int(row_start_S[-1])
        each = chain.from_iterable([work.tokens for work in works])
        tokens_T = np.fromiter(each, dtype=np.int64, count=num_tokens)
        work_T = np.repeat(np.arange(len(works)), count_S)
        positions_T = np.arange(num_tokens) + (first_S - row_start_S[:-1])[work_T]
        groups, blocks = len(works[0].tables), max([len(work.tables[0]) for work in works])
        rows = [work.tables[group].tobytes().ljust(4 * blocks, b"\0") for group in range(groups) for work in works]
        table = np.frombuffer(b"".join(rows), dtype=np.int32).reshape(groups, len(works), blocks)
        table_GSP = np.maximum(table, 0)
        pages_GT = table_GSP[:, work_T, positions_T // page_tokens].astype(np.int64, order="C")
        slots_GT = pages_GT * page_tokens + positions_T % page_tokens
        draws_S = np.array([work.draws for work in works], dtype=np.int64)
        ahead_S = row_start_S[1:].astype(np.int64) - np.cumsum(
            draws_S
        )  # of a work's draws among all, its rows among all
        rows_N = np.repeat(ahead_S, draws_S) + np.arange(draws_S.sum())
        if any(work.request.scored for work in works):
            rows_N = np.union1d(rows_N, scored_rows(works))
        return StepRows(tokens_T, positions_T, slots_GT, row_start_S, first_S, table_GSP, rows_N)


def scored_rows(works: Sequence[Work]) -> Here:
    """Rows of a step that score, by work."""
    starts_S = np.cumsum([0, *(len(work.tokens) for work in works[:-1])])
    return ranges(starts_S, np.array([work.scores for work in works]))


def sampling_of(batch: Batch) -> SamplingBatch:
    """How each row that draws does so."""
    works = batch.all_works
    each = [(work, work.start + len(work.tokens) - more) for work in works for more in range(work.draws - 1, -1, -1)]
    masks = {"masks": [batch.masks.get(draw, b"") for draw in range(len(each))]} if batch.masks else {}
    return SamplingBatch.stack(
        [work.request.sampling for work, _ in each],
        [work.request.seed for work, _ in each],
        [position for _, position in each],
        **masks,
        likely=[work.request.likely for work, _ in each],
    )


def changed(pages: list[int]) -> DeliveryError:
    """What to raise where these shared pages are not what was named."""
    return DeliveryError(
        f"{len(pages)} shared pages of keys and values changed after they were computed, page {pages[0]} "
        "first; nothing was sampled from them. Resume from the last checkpoint; if it happens again, set "
        "engine.share_prefixes=false and test this machine's memory."
    )
