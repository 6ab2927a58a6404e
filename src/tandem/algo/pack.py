"""Samples to microbatches under a token budget, the rows that samples of a prompt begin with shared: a tree.

A position needs a row of the decoder only where its output predicts a trained token or where a later row attends
to it, so a sample's rows are the positions before its last trained token.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tandem.columns import COLUMNS, Array, Columns, ranges
from tandem.errors import ConfigError
from tandem.types import Denominators, Microbatch, Sample

CONTEXT = 3072  # positions whose attention costs what the products of a row do: 2 P / (4 H D layers), SmolLM2-135M

BRANCH = 16  # rows that a branch below what all samples of a prompt share must save; a segment more is not free
DEEPEST = 100  # branches below one another

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
    samples: Sequence[Sample],
    prompts: Sequence[PromptTotal],
    budget_tokens: int,
    share_prefix: bool = True,
    whole: bool = False,
) -> list[Microbatch]:
    """Pack into as few microbatches as first-fit-decreasing does, of at most `budget_tokens` rows, of about equal cost.

    `prompts` are the totals of the whole batch, samples that are not trained included; they give the global
    denominators. With `share_prefix` the samples of a prompt stay together where the budget allows, and the rows
    of the tokens they begin with are run once: one segment for what all of them share, one for what some of them share
    beyond it (at least BRANCH rows saved), and so on, and one for each sample's own rows (none where a sample has no
    row of its own). A sample is never split; one longer than the budget gets a microbatch
    of its own. `whole`: the samples of a prompt are never parted, ConfigError where the budget has no room for them.
    The predictions of a sample are contiguous in N, in order of position. The result depends only on
    the arguments; samples are in the order of the tree, which is theirs where only what all share is shared.
    """
    assert budget_tokens >= 1, f"budget_tokens is {budget_tokens}"
    if not samples:
        return []
    batch = _Batch.of(samples)
    if whole:
        units = _whole(samples, batch, budget_tokens, share_prefix)
    elif share_prefix:
        units = _units(samples, batch, budget_tokens)
    else:
        units = [_Branch.leaf(index, 0, rows) for index, rows in enumerate(batch.rows)]
    sizes = [unit.rows for unit in units]
    of_prompt = {total.prompt_id: total.tokens for total in prompts}
    totals = denominators(prompts)
    microbatches = []
    for chosen in _balanced(sizes, [unit.cost for unit in units], budget_tokens):
        trees = sorted((units[index] for index in chosen), key=lambda tree: tree.members)
        members = [index for tree in trees for index in tree.members]
        microbatches.append(
            Microbatch(
                **_lay_out(batch, trees, members),
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

    def rows_of(self, index: int) -> Array:
        """Tokens at the rows of a sample."""
        start = self.start_B[index]
        return self.columns["tokens"][start : start + self.rows[index]]

    def in_common(self, one: int, other: int) -> int:
        """Rows that two samples begin with."""
        limit = min(self.rows[one], self.rows[other])
        apart = self.rows_of(one)[:limit] != self.rows_of(other)[:limit]
        return int(apart.argmax()) if apart.any() else limit


class _Branch(NamedTuple):
    """Rows [first, end) of what its samples have in common, and what goes on from there; a leaf is a sample's own."""

    members: list[int]  # samples, in the order of the tree
    first: int
    end: int
    parts: tuple[_Branch, ...]

    @classmethod
    def leaf(cls, index: int, first: int, end: int) -> _Branch:
        return cls([index], first, end, ())

    @classmethod
    def over(cls, parts: Iterable[_Branch], first: int, end: int) -> _Branch:
        """The one of which `parts`, each from `end` on, go on."""
        ordered = tuple(sorted(parts))  # by their samples
        if len(ordered) == 1:
            return ordered[0]._replace(first=first)
        return cls([index for part in ordered for index in part.members], first, end, ordered)

    @property
    def rows(self) -> int:
        return self.end - self.first + sum(part.rows for part in self.parts)

    @property
    def _attended(self) -> int:
        """Twice the positions that its rows attend to, themselves included."""
        return self.end * (self.end + 1) - self.first * (self.first + 1) + sum(part._attended for part in self.parts)

    @property
    def cost(self) -> float:
        """In rows: a row that attends to CONTEXT positions costs twice a row that attends to none."""
        return self.rows + self._attended / 2 / CONTEXT


def _tree(batch: _Batch, members: Sequence[int]) -> _Branch:
    """The samples of a prompt over the rows that all begin with, and below it over those that some begin with."""
    # Whoever begins alike is side by side in the order of the bytes: equal tokens have equal ones.
    order = sorted(members, key=lambda index: (batch.rows_of(index).tobytes(), index))
    common = [batch.in_common(one, other) for one, other in itertools.pairwise(order)]

    def parts(start: int, stop: int, end: int, depth: int) -> list[_Branch]:
        """What goes on after `end` rows that samples order[start : stop] share."""
        if stop - start == 1 or depth == DEEPEST:
            return [_Branch.leaf(index, end, batch.rows[index]) for index in order[start:stop]]
        least = min(common[start : stop - 1])
        saves = depth == 0 or (stop - start - 1) * (least - end) >= BRANCH
        cuts = [start, *(i + 1 for i in range(start, stop - 1) if common[i] == least), stop]
        at = least if saves else end
        below = [part for one, other in itertools.pairwise(cuts) for part in parts(one, other, at, depth + 1)]
        return [_Branch.over(below, end, at)] if saves else below

    (tree,) = parts(0, len(order), 0, 0)
    return tree


def _by_prompt(samples: Sequence[Sample]) -> dict[str, list[int]]:
    by_prompt: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_prompt.setdefault(sample.prompt_id, []).append(index)
    return by_prompt


def _units(samples: Sequence[Sample], batch: _Batch, budget_tokens: int) -> list[_Branch]:
    """Trees of samples of one prompt, each placed as a whole."""
    members = _by_prompt(samples).values()
    return [unit for of_prompt in members for unit in _pieces(_tree(batch, of_prompt), budget_tokens)]


def _whole(samples: Sequence[Sample], batch: _Batch, budget_tokens: int, share_prefix: bool) -> list[_Branch]:
    """One tree a prompt, over rows of their own where they share none."""
    units = []
    for prompt_id, members in _by_prompt(samples).items():
        if share_prefix:
            unit = _tree(batch, members)
        else:
            unit = _Branch.over((_Branch.leaf(index, 0, batch.rows[index]) for index in members), 0, 0)
        if len(members) > 1 and unit.rows > budget_tokens:
            raise ConfigError(
                f"the {len(members)} answers to {prompt_id} are compared, so they have to be in one microbatch, and "
                f"take {unit.rows} rows of the {budget_tokens} that it may have. Raise learner.microbatch_tokens to "
                f"{unit.rows} or more, or leave this prompt out."
            )
        units.append(unit)
    return units


def _pieces(tree: _Branch, capacity: int) -> list[_Branch]:
    """A tree in parts of at most `capacity` rows, each over a copy of what it goes on from."""
    if not tree.parts:
        return [tree]
    own = tree.end - tree.first
    parts = [piece for part in tree.parts for piece in _pieces(part, capacity - own)]
    if not own:
        return parts
    chosen = _first_fit([part.rows for part in parts], capacity - own)
    return [_Branch.over((parts[i] for i in members), tree.first, tree.end) for members in chosen]


def _lay_out(batch: _Batch, trees: Sequence[_Branch], members: Sequence[int]) -> dict[str, Any]:
    """Rows, segments and predictions of a microbatch."""
    segments: list[tuple[int, int, int, int]] = []  # place of the first token, rows, first position, parent
    runs: list[tuple[int, int, int]] = []  # of each sample in turn: its place, a run's first position, the row there
    leaves = itertools.count()

    def lay(branch: _Branch, parent: int, row: int, above: tuple[tuple[int, int], ...]) -> int:
        """Rows so far, after those of a branch."""
        first, own = branch.first, branch.end - branch.first
        if own:
            above, parent_of = (*above, (first, row)), parent
            parent = len(segments)
            segments.append((int(batch.start_B[branch.members[0]]) + first, own, first, parent_of))
        if not branch.parts:
            place = next(leaves)
            runs.extend((place, *run) for run in above)
        return functools.reduce(lambda end, part: lay(part, parent, end, above), branch.parts, row + own)

    functools.reduce(lambda row, tree: lay(tree, -1, row, ()), trees, 0)
    start_S, rows_S, first_S, parent_S = np.array(segments, dtype=np.int64).T
    members_B = np.array(members)
    counts_B = np.diff(batch.first_B)[members_B]
    predicted = batch.trained[ranges(batch.first_B[:-1][members_B], counts_B)]
    place_N = np.repeat(np.arange(len(members)), counts_B)
    position_N = predicted - batch.start_B[members_B][place_N] - 1
    place_R, first_R, row_R = np.array(runs, dtype=np.int64).T
    longest = int(position_N.max()) + 1
    run_N = np.searchsorted(place_R * longest + first_R, place_N * longest + position_N, side="right") - 1
    rows_N = row_R[run_N] + position_N - first_R[run_N]
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
