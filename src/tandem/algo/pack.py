"""Samples to microbatches under a token budget, the rows of a common prompt shared.

A position needs a row of the decoder only where its output predicts a trained token or where a later row attends
to it, so a sample's rows are the positions before its last trained token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.types import Denominators, Microbatch, Sample

CONTEXT = 3072  # positions whose attention costs what the products of a row do: 2 P / (4 H D layers), SmolLM2-135M

# Fields of Sample that a forward pass fills in: all samples of a batch have one, or none has.
SCORED = ("reference_logprobs", "proximal_logprobs", "source_logprobs")


@dataclass(frozen=True, slots=True)
class PromptTotal:
    """What a prompt brings to the denominators, whether or not its samples are trained.

    >>> denominators((PromptTotal("p", tokens=30, samples=8), PromptTotal("q", tokens=12, samples=4)))
    Denominators(tokens=42, samples=12, prompts=2)
    """

    prompt_id: str
    tokens: int  # predictions of its samples
    samples: int


def count_predictions(loss_mask: Sequence[bool]) -> int:
    """Trained tokens. The first token of a sequence has no row that predicts it."""
    assert not any(loss_mask[:1]), "loss_mask[0] is True: nothing predicts the first token of a sequence"
    return sum(loss_mask)


def count_prompts(samples: Iterable[Sample]) -> tuple[PromptTotal, ...]:
    """Totals of a batch that consists of `samples` alone, prompts in order of first appearance."""
    return merge_totals(PromptTotal(sample.prompt_id, count_predictions(sample.loss_mask), 1) for sample in samples)


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
    rows = [_num_rows(sample) for sample in samples]
    units = _units(samples, rows, budget_tokens) if share_prefix else [(size, [i]) for i, size in enumerate(rows)]
    costs = [_cost(size, [rows[i] for i in members]) for size, members in units]
    prompt_index = {total.prompt_id: index for index, total in enumerate(prompts)}
    totals = denominators(prompts)
    microbatches = []
    for chosen in _balanced([size for size, _ in units], costs, budget_tokens):
        blocks = sorted(units[index][1] for index in chosen)
        layout = _Layout(prompts, prompt_index)
        for members in blocks:
            layout.add([samples[i] for i in members])
        microbatches.append(layout.finish(totals))
    return microbatches


def _num_rows(sample: Sample) -> int:
    """Positions 0 .. (last trained position - 1)."""
    length = len(sample.tokens)
    lengths = {len(sample.loss_mask), len(sample.advantages), len(sample.logprobs), len(sample.weights)}
    optional = (*(getattr(sample, name) for name in SCORED), sample.kept, sample.unfiltered_logprobs)
    lengths |= {len(values) for values in optional if values}
    assert lengths == {length}, f"sample {sample.id}: {length} tokens but fields of {sorted(lengths)}"
    assert count_predictions(sample.loss_mask), f"sample {sample.id} has no token to train on"
    return length - 1 - sample.loss_mask[::-1].index(True)


def _units(samples: Sequence[Sample], rows: Sequence[int], budget_tokens: int) -> list[tuple[int, list[int]]]:
    """(rows, indices of samples of one prompt) that are placed together."""
    by_prompt: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_prompt.setdefault(sample.prompt_id, []).append(index)
    units: list[tuple[int, list[int]]] = []
    for members in by_prompt.values():
        prefix = _common_prefix([samples[i] for i in members], min(rows[i] for i in members))
        own = [rows[i] - prefix for i in members]
        if prefix == 0:
            units.extend((rows[i], [i]) for i in members)
            continue
        for chosen in _first_fit(own, budget_tokens - prefix):
            units.append((prefix + sum(own[j] for j in chosen), sorted(members[j] for j in chosen)))
    return units


def _common_prefix(samples: Sequence[Sample], limit: int) -> int:
    """Tokens, at most `limit`, that all samples begin with. The first and last in order bound all others."""
    first, last = min(sample.tokens for sample in samples), max(sample.tokens for sample in samples)
    length = 0
    while length < limit and first[length] == last[length]:
        length += 1
    return length


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


class _Layout:
    """A microbatch being filled."""

    def __init__(self, prompts: Sequence[PromptTotal], prompt_index: dict[str, int]) -> None:
        self.prompts = prompts
        self.prompt_index = prompt_index
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.segments: list[int] = [0]
        self.paths: list[tuple[int, ...]] = []
        self.predictions: list[tuple[int, int, int, int, float, float, float]] = []
        self.scored: dict[str, list[float]] = {name: [] for name in SCORED}
        self.kept: list[bytes] = []  # of a filtered batch; b"" where a sample of it was not filtered
        self.unfiltered: list[float] = []
        self.samples: list[Sample] = []

    def add(self, members: Sequence[Sample]) -> None:
        """Samples of one prompt, their common rows once."""
        rows = [_num_rows(sample) for sample in members]
        shared: tuple[int, ...] = ()
        if len(members) > 1:
            prefix = _common_prefix(members, min(rows))
            shared = self._segment(members[0], 0, prefix, ()) if prefix else ()
        for sample, count in zip(members, rows, strict=True):
            path = self._segment(sample, len(shared), count, shared) if count > len(shared) else shared
            self._predict(sample, path)

    def _segment(self, sample: Sample, start: int, end: int, before: tuple[int, ...]) -> tuple[int, ...]:
        """Rows for positions [start, end) of a sample, after the rows `before`; returns the path through both."""
        row = len(self.tokens)
        path = (*before, *range(row, row + end - start))
        self.tokens.extend(sample.tokens[start:end])
        self.positions.extend(range(start, end))
        self.segments.append(len(self.tokens))
        self.paths.append(path)
        return path

    def _predict(self, sample: Sample, path: tuple[int, ...]) -> None:
        index, prompt = len(self.samples), self.prompt_index[sample.prompt_id]
        trained = [position for position, mask in enumerate(sample.loss_mask) if mask]
        self.predictions.extend(
            (path[p - 1], sample.tokens[p], index, prompt, sample.advantages[p], sample.logprobs[p], sample.weights[p])
            for p in trained
        )
        for name, values in self.scored.items():
            logprobs = getattr(sample, name)
            if logprobs is not None:
                values.extend(logprobs[p] for p in trained)
        self.kept.extend(sample.kept[p] if sample.kept else b"" for p in trained)
        self.unfiltered.extend((sample.unfiltered_logprobs or sample.logprobs)[p] for p in trained)
        self.samples.append(sample)

    def finish(self, totals: Denominators) -> Microbatch:
        rows, targets, sample, prompt, advantages, logprobs, weights = zip(*self.predictions, strict=True)
        for name, values in self.scored.items():
            assert len(values) in (0, len(rows)), f"some samples of the batch lack {name}"
        of_sample = [self.prompts[self.prompt_index[sample.prompt_id]] for sample in self.samples]
        return Microbatch(
            tokens_T=tuple(self.tokens),
            positions_T=tuple(self.positions),
            segments_S=tuple(self.segments),
            paths_S=tuple(self.paths),
            rows_N=rows,
            targets_N=targets,
            sample_N=sample,
            prompt_N=prompt,
            advantages_N=advantages,
            logprobs_N=logprobs,
            weights_N=weights,
            reference_logprobs_N=tuple(self.scored["reference_logprobs"]) or None,
            sample_ids=tuple(sample.id for sample in self.samples),
            denominators=totals,
            sample_tokens=tuple(sum(sample.loss_mask) for sample in self.samples),
            prompt_tokens=tuple(total.tokens for total in of_sample),
            prompt_samples=tuple(total.samples for total in of_sample),
            proximal_logprobs_N=tuple(self.scored["proximal_logprobs"]) or None,
            source_logprobs_N=tuple(self.scored["source_logprobs"]) or None,
            unfiltered_logprobs_N=tuple(self.unfiltered) if self._any("unfiltered_logprobs") else None,
            kept_N=tuple(self.kept) if self._any("kept") else None,
        )

    def _any(self, name: str) -> bool:
        return any(getattr(sample, name) for sample in self.samples)
