"""What several tests make of the nouns, and a microbatch read row by row in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.types import Completion, Microbatch, Request, Sample, Trajectory

SCORED = ("reference_logprobs", "proximal_logprobs", "source_logprobs")  # columns that a forward pass fills in

Held = TypeVar("Held", Sample, Trajectory)


def ended(value: Any) -> Future[Any]:
    """A future that has."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def having(noun: Held, **values: Sequence[Any]) -> Held:
    """The same with other columns, or others in place of them."""
    return replace(noun, columns=noun.columns.having(**values))


def without(noun: Held, *names: str) -> Held:
    return replace(noun, columns=noun.columns.without(*names))


def column(noun: Held, name: str) -> list[Any]:
    """As plain values."""
    return noun.columns[name].tolist()


def trained(noun: Held) -> list[int]:
    """Positions in the loss mask."""
    return [position for position, mask in enumerate(column(noun, "loss_mask")) if mask]


def sample_of(request: Request, completion: Completion, advantages: Sequence[float]) -> Sample:
    """What the learner takes of a generation, with the engine's log-probs; `advantages` are the generated tokens'."""
    before, count = (0.0,) * len(request.tokens), len(completion.tokens)
    columns = Columns.of(
        tokens=request.tokens + completion.tokens,
        loss_mask=(False,) * len(before) + (True,) * count,
        advantages=(*before, *advantages),
        logprobs=before + completion.logprobs,
    )
    return Sample(request.id, request.program_id, columns)


def paths_of(microbatch: Microbatch) -> list[list[int]]:
    """Of each row: the rows that it attends to, in order of position, itself last."""
    paths: list[list[int]] = []
    bounds = list(pairwise(microbatch.segments_S.tolist()))
    for (start, stop), first, parent in zip(
        bounds, microbatch.first_S.tolist(), microbatch.parent_S.tolist(), strict=True
    ):
        before = paths[bounds[parent][1] - 1][:first] if parent >= 0 else []
        for row in range(start, stop):
            paths.append([*before, *range(start, row + 1)])
    return paths


def owners_of(microbatch: Microbatch) -> list[str]:
    """Of each prediction: the sample that it is of."""
    counts = zip(microbatch.sample_ids, microbatch.sample_tokens.tolist(), strict=True)
    return [name for name, count in counts for _ in range(count)]


Forest = tuple[list[int], list[int], list[int], list[list[int]]]


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """Trees of segments: boundaries, first positions, parents, and every path written out.

    A segment goes on from any position of any one before it in its tree; a plain sample is a tree of one.
    """
    row_start, first, parents, tables = [0], list[int](), list[int](), list[list[int]]()
    for _ in range(draw(st.integers(1, 3))):
        root = len(tables)
        for own in [draw(st.integers(1, 90)), *draw(st.lists(st.integers(1, 40), max_size=4))]:
            parent = draw(st.integers(root, len(tables) - 1)) if len(tables) > root else -1
            before = tables[parent][: draw(st.integers(1, len(tables[parent])))] if parent >= 0 else []
            tables.append([*before, *range(row_start[-1], row_start[-1] + own)])
            first.append(len(before))
            parents.append(parent)
            row_start.append(row_start[-1] + own)
    return row_start, first, parents, tables
