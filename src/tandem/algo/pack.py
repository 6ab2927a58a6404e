"""Samples to microbatches under a token budget, the rows of a common prompt shared.

A position needs a row of the decoder only where its output predicts a trained token or where a later row attends
to it, so a sample's rows are the positions before its last trained token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tandem.columns import COLUMNS, Array, Columns, ranges
from tandem.types import Denominators, Microbatch, Sample

CONTEXT = 3072  # positions whose attention costs what the products of a row do: 2 P / (4 H D layers), SmolLM2-135M

UNUSED = ("loss_mask", "versions")  # of a prediction: all are trained, and no loss asks for the version


@dataclass(frozen=True, slots=True)
class PromptTotal:
    """What a prompt brings to the denominators, whether or not its samples are trained.

    >>> denominators((PromptTotal("p", tokens=30, samples=8), PromptTotal("q", tokens=12, samples=4)))
    Denominators(tokens=42, samples=12, prompts=2)
    """

    prompt_id: str
    tokens: int  # predictions of its samples
    samples: int


def count_predictions(columns: Columns) -> int:
    """Trained tokens. The first token of a sequence has no row that predicts it."""
    loss_mask = columns["loss_mask"]
    assert not loss_mask[:1].any(), "loss_mask[0] is True: nothing predicts the first token of a sequence"
    return int(np.count_nonzero(loss_mask))


def count_prompts(samples: Iterable[Sample]) -> tuple[PromptTotal, ...]:
    """Totals of a batch that consists of `samples` alone, prompts in order of first appearance."""
    return merge_totals(PromptTotal(sample.prompt_id, count_predictions(sample.columns), 1) for sample in samples)


def merge_totals(totals: Iterable[PromptTotal]) -> tuple[PromptTotal, ...]:
    """One total a prompt id, in order of first appearance."""
    merged: dict[str, PromptTotal] = {}
    for total in totals:
        before = merged.get(total.prompt_id, PromptTotal(total.prompt_id, 0, 0))
        merged[total.prompt_id] = PromptTotal(
            total.prompt_id, before.tokens + total.tokens, before.samples + total.samples
        )
    return tuple(merged.values())


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts ids as people count: runs of digits by their number.

    >>> sorted(["p/3/10", "p/3/9", "p/20/0"], key=natural_key)
    ['p/3/9', 'p/3/10', 'p/20/0']
    """
    # re.split puts texts at even and digits at odd places, so two keys never compare a text with a number.
    parts = re.split("([0-9]+)", name)
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def canonical(
    samples: Iterable[Sample], prompts: Iterable[PromptTotal]
) -> tuple[tuple[Sample, ...], tuple[PromptTotal, ...]]:
    """A batch in the order of its ids, so that nothing depends on the order in which groups came."""
    return (
        tuple(sorted(samples, key=lambda sample: (natural_key(sample.prompt_id), natural_key(sample.id)))),
        tuple(sorted(prompts, key=lambda total: natural_key(total.prompt_id))),
    )


def denominators(prompts: Sequence[PromptTotal]) -> Denominators:
    """The batch's counts."""
    return Denominators(
        tokens=sum(total.tokens for total in prompts),
        samples=sum(total.samples for total in prompts),
        prompts=len(prompts),
    )


def split_updates(
    samples: Sequence[Sample], prompts: Sequence[PromptTotal], updates: int
) -> list[tuple[tuple[Sample, ...], tuple[PromptTotal, ...]]]:
    """Deal a batch out into at most `updates` batches of whole prompts, one optimiser update each.

    Prompt i goes to batch i mod `updates`; each batch has its own denominators. A batch without a sample to train
    is left out.
    """
    parts = []
    for start in range(updates):
        mine = tuple(prompts[start::updates])
        ids = {total.prompt_id for total in mine}
        members = tuple(sample for sample in samples if sample.prompt_id in ids)
        if members:
            parts.append((members, mine))
    return parts


def pack(
    samples: Sequence[Sample], prompts: Sequence[PromptTotal], budget_tokens: int, share_prefix: bool = True
) -> list[Microbatch]:
    """Pack into as few microbatches as first-fit-decreasing does, of at most `budget_tokens` rows, of about equal cost.

    `prompts` are the totals of the whole batch, samples that are not trained included; they give the global
    denominators. With `share_prefix` the samples of a prompt stay together where the budget allows, and the rows
    of the tokens they begin with are run once: one segment for the prefix, one for each sample's own rows (none
    where a sample has no row of its own). A sample is never split; one longer than the budget gets a microbatch
    of its own. The predictions of a sample are contiguous in N, in order of position. The result depends only on
    the arguments and keeps the samples' order inside a microbatch.
    """
    assert budget_tokens >= 1, f"budget_tokens is {budget_tokens}"
    if not samples:
        return []
    batch = _Batch.of(samples)
    if share_prefix:
        units = _units(samples, batch, budget_tokens)
    else:
        units = [(size, [index]) for index, size in enumerate(batch.rows)]
    costs = [_cost(size, [batch.rows[i] for i in members]) for size, members in units]
    of_prompt = {total.prompt_id: total.tokens for total in prompts}
    totals = denominators(prompts)
    microbatches = []
    for chosen in _balanced([size for size, _ in units], costs, budget_tokens):
        blocks = sorted(units[index][1] for index in chosen)
        members = [index for block in blocks for index in block]
        microbatches.append(
            Microbatch(
                **_lay_out(batch, blocks),
                members=np.array(members, dtype=np.int32),
                sample_ids=tuple(samples[index].id for index in members),
                prompt_tokens=np.array([of_prompt[samples[index].prompt_id] for index in members], dtype=np.int32),
                denominators=totals,
            )
        )
    return microbatches


class _Batch(NamedTuple):
    """The samples one after another."""

    columns: Columns
    start_B: Array  # where each begins
    trained: Array  # places of the trained tokens
    first_B: Array  # [B + 1] where each sample's begin in `trained`
    rows: list[int]  # of each: positions 0 .. (last trained position - 1)

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> _Batch:
        columns = Columns.concat([sample.columns for sample in samples])
        lengths_B = np.array([len(sample.columns) for sample in samples])
        end_B = lengths_B.cumsum()
        start_B = end_B - lengths_B
        trained = np.flatnonzero(columns["loss_mask"])
        first_B = np.searchsorted(trained, [*start_B, end_B[-1]])
        empty = np.flatnonzero(first_B[1:] == first_B[:-1])
        assert not len(empty), f"sample {samples[empty[0]].id} has no token to train on"
        begun = np.flatnonzero(columns["loss_mask"][start_B])
        assert not len(begun), f"sample {samples[begun[0]].id}: nothing predicts the first token of a sequence"
        return cls(columns, start_B, trained, first_B, (trained[first_B[1:] - 1] - start_B).tolist())

    def common_prefix(self, members: Sequence[int]) -> int:
        """Tokens that all of some samples begin with, at most the rows of each."""
        limit = min(self.rows[index] for index in members)
        tokens, first = self.columns["tokens"], self.start_B[members[0]]
        for index in members[1:]:
            start = self.start_B[index]
            apart = tokens[first : first + limit] != tokens[start : start + limit]
            limit = int(apart.argmax()) if apart.any() else limit
        return limit


def _lay_out(batch: _Batch, blocks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Rows, segments and predictions of a microbatch; the members of a block share the rows of what they begin with."""
    segments: list[tuple[int, int, int, int]] = []  # place of the first token, rows, first position, parent
    shared: list[tuple[int, int, int]] = []  # of each sample: row of the prefix, its length, row of the rest
    row = 0
    for members in blocks:
        prefix = batch.common_prefix(members) if len(members) > 1 else 0
        parent, prefix_row = -1, row
        if prefix:
            parent = len(segments)
            segments.append((int(batch.start_B[members[0]]), prefix, 0, -1))
            row += prefix
        for index in members:
            shared.append((prefix_row, prefix, row))
            if own := batch.rows[index] - prefix:
                segments.append((int(batch.start_B[index]) + prefix, own, prefix, parent))
                row += own
    start_S, rows_S, first_S, parent_S = np.array(segments, dtype=np.int64).T
    members_B = np.array([index for members in blocks for index in members])
    counts_B = np.diff(batch.first_B)[members_B]
    predicted = batch.trained[ranges(batch.first_B[:-1][members_B], counts_B)]
    prefix_row_N, prefix_N, own_row_N = np.repeat(np.array(shared, dtype=np.int64), counts_B, axis=0).T
    position_N = predicted - np.repeat(batch.start_B[members_B], counts_B) - 1
    rows_N = np.where(position_N < prefix_N, prefix_row_N + position_N, own_row_N + position_N - prefix_N)
    places_T = ranges(start_S, rows_S)
    named = [name for name in batch.columns.arrays if COLUMNS[name].rows]
    at_rows = Columns({name: batch.columns[name] for name in named})
    return {
        "tokens_T": batch.columns["tokens"][places_T],
        "row_columns": at_rows.take(places_T),
        "segments_S": np.concatenate([[0], rows_S.cumsum()]).astype(np.int32),
        "first_S": first_S.astype(np.int32),
        "parent_S": parent_S.astype(np.int32),
        "rows_N": rows_N.astype(np.int32),
        "predictions": batch.columns.without(*UNUSED, *named).take(predicted),
        "sample_tokens": counts_B.astype(np.int32),
    }


def _units(samples: Sequence[Sample], batch: _Batch, budget_tokens: int) -> list[tuple[int, list[int]]]:
    """(rows, indices of samples of one prompt) that are placed together."""
    rows = batch.rows
    by_prompt: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_prompt.setdefault(sample.prompt_id, []).append(index)
    units: list[tuple[int, list[int]]] = []
    for members in by_prompt.values():
        prefix = batch.common_prefix(members)
        if prefix == 0 or len(members) == 1:
            units.extend((rows[i], [i]) for i in members)
            continue
        own = [rows[i] - prefix for i in members]
        for chosen in _first_fit(own, budget_tokens - prefix):
            units.append((prefix + sum(own[j] for j in chosen), sorted(members[j] for j in chosen)))
    return units


def _cost(size: int, lengths: Sequence[int]) -> float:
    """Of a unit of `size` rows, in rows: samples of `lengths` rows each, of which they share what exceeds `size`.

    A row that attends to CONTEXT positions costs twice a row that attends to none.
    """
    prefix = 0 if len(lengths) == 1 else (sum(lengths) - size) // (len(lengths) - 1)
    attended = sum(length * (length + 1) - prefix * (prefix + 1) for length in lengths) + prefix * (prefix + 1)
    return size + attended / 2 / CONTEXT


def _balanced(sizes: Sequence[int], costs: Sequence[float], capacity: int) -> list[list[int]]:
    """Bins of indices into `sizes`, as many as first-fit takes, the dearest first to the cheapest bin with room for it.

    First-fit's own bins where these have no room for all (longest processing time first: Graham, 1969).
    """
    packed = _first_fit(sizes, capacity)
    bins: list[list[int]] = [[] for _ in packed]
    spent, room = [0.0] * len(bins), [capacity] * len(bins)
    for index in sorted(range(len(sizes)), key=lambda i: (-costs[i], i)):
        fits = [b for b in range(len(bins)) if room[b] >= sizes[index] or (sizes[index] > capacity and not bins[b])]
        if not fits:
            return packed
        target = min(fits, key=lambda b: (spent[b], b))
        bins[target].append(index)
        spent[target] += costs[index]
        room[target] -= sizes[index]
    return bins


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `sizes`, largest first, ties by index. What exceeds `capacity` is alone in its bin."""
    bins: list[list[int]] = []
    room = np.zeros(len(sizes), dtype=np.int64)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = room[: len(bins)] >= sizes[index]
        target = int(fits.argmax()) if fits.any() else len(bins)
        if target == len(bins):
            bins.append([])
            room[target] = capacity
        bins[target].append(index)
        room[target] -= sizes[index]
    return bins
