"""Whether what is trained is as long as what was asked for: records, a test, and a step's lengths by tenths.

A group is kept or lost as a whole where it comes too late, and its programs share a prompt, so their lengths depend on
each other: everything here that is compared by chance is compared by group. Formulas and sources: docs/fairness.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tandem.types import Group

Array = np.ndarray

LATE = frozenset({"late", "stale"})  # fates of a whole group, by when it ended: beyond the batch, or beyond the lag
LOST = LATE | {"truncated", "failed"}  # fates that keep a program out of the batch whatever its gradient would be
TENTHS = 10
EXACT = 4_000_000  # additions that the exact distribution of the statistic may take; beyond, it is taken for normal


class Race(NamedTuple):
    """The first `enough` groups to end that are usable make the batch, of one that ran beside `others`; of those that
    end at once the order of their prompts decides, which has nothing to do with lengths."""

    others: int
    enough: int


@dataclass(frozen=True, slots=True)
class Dispatched:
    """A group that was asked for, and what became of its programs.

    >>> Dispatched("p/1", ("p/1/0", "p/1/1"), (9, 4), ("trained", "failed")).end, LATE & {"late"} == {"late"}
    (9, True)
    """

    id: str
    programs: tuple[str, ...]  # their ids
    tokens: tuple[int, ...]  # sampled by each; so far where the group was cut
    fates: tuple[str, ...]  # of each: those of algo.advantage.FATES, or one of LATE
    ended: bool = True  # False: it was withdrawn before, and would have been longer
    usable: bool = True  # it counted towards the batch, or would have
    keep: float | None = 1.0  # probability that a group of its length is kept, where who chooses knows it
    race: Race | None = None  # where that has a form, given how long groups are
    turn: float = (
        0.0  # in a race: its place among the prompts, from 0 to 1, which decides between those that end at once
    )

    @property
    def end(self) -> int:
        """Tokens of its longest program: by the clock of tokens, when it ends."""
        return max(self.tokens, default=0)

    @property
    def clock(self) -> float:
        """When it ends, or was cut, on a clock on which no two of a race end at once."""
        return self.end + self.turn

    @property
    def kept(self) -> bool:
        """Not lost for when it ended."""
        return not LATE.intersection(self.fates)


def of_group(group: Group, fates: Mapping[str, str] | None = None, late: str = "late") -> Dispatched:
    """Of a group that ended: `fates` are those of its trajectories, or it was lost as a whole, as `late` says."""
    programs = group.programs
    ids = tuple(program[0].program_id for program in programs)
    found = [late if fates is None else _foremost([fates[part.id] for part in program]) for program in programs]
    tokens = tuple(sum(part.num_sampled for part in program) for program in programs)
    return Dispatched(ids[0].rpartition("/")[0], ids, tokens, tuple(found))


def _foremost(fates: Sequence[str]) -> str:
    """Of a program's segments, one of which may have a gradient where another has none."""
    return "trained" if "trained" in fates else fates[0]


class Difference(NamedTuple):
    """How the programs that were left out differ in length from those that are in the batch."""

    longer: float  # probability that one left out is the longer of a pair; equal ones count half
    z: float  # its distance from a half, in standard deviations of the permutation by group
    p_value: float  # two-sided
    distance: float  # largest between the distributions of what was dispatched and what is in the batch


def compare(groups: Sequence[Dispatched]) -> Difference | None:
    """The rank-sum test of clustered data; None where nothing, or all, was left out, or no permutation differs.

    Wilcoxon's statistic W over the programs left out; under the hypothesis that what becomes of a group, and which of
    its programs are left out of it, has nothing to do with length, fates may be dealt out anew among groups of the same
    size, and among the programs of a group. Mean and variance of W are those of all such permutations: Rosner, Glynn
    and Lee, Biometrics 2003 (59, 1089) where a group is lost as a whole, 2006 (62, 1251) where programs are. Where all
    are lost as a whole and it is not too much, the p-value is exact. A group that was cut counts with the
    tokens that it had: less than its length, so `longer` and `z` are too low, never too high.
    """
    lengths = np.array([tokens for group in groups for tokens in group.tokens], np.int64)
    lost = np.array([fate in LOST for group in groups for fate in group.fates], bool)
    left, kept = int(lost.sum()), int((~lost).sum())
    if not left or not kept:
        return None
    order = np.sort(lengths)
    shorter = np.searchsorted(order, lengths, "left")
    ranks = (
        shorter + np.searchsorted(order, lengths, "right") - len(lengths)
    )  # twice a midrank, centred: a whole number
    statistic = int(ranks[lost].sum())  # those left out beat those kept so many times more than the reverse
    strata = _strata([len(group.tokens) for group in groups], ranks, lost)
    mean, variance = (math.fsum(values) for values in zip(*(stratum.moments() for stratum in strata), strict=True))
    if variance <= 0.0:
        return None
    z = (statistic - mean) / math.sqrt(variance)
    exact = _exact(strata, statistic)
    p_value = math.erfc(abs(z) / math.sqrt(2.0)) if exact is None else exact
    return Difference(0.5 + statistic / (2 * left * kept), z, p_value, largest_gap(lengths, lengths[~lost]))


class _Stratum(NamedTuple):
    """Groups of one size."""

    ranks: Array  # groups x size
    left: Array  # of each group, how many programs were left out

    def moments(self) -> tuple[float, float]:
        """Mean and variance of the sum of the ranks left out, over all ways to deal the fates out."""
        groups, size = self.ranks.shape
        sums, left = self.ranks.sum(1) / size, self.left.astype(float)
        variance = 0.0
        if groups > 1:  # a sum of products of two lists, one permuted (Hoeffding 1951)
            variance += ((left - left.mean()) ** 2).sum() * ((sums - sums.mean()) ** 2).sum() / (groups - 1)
        if size > 1:  # drawing `left` of a group's without putting back
            inside = ((self.ranks - sums[:, None]) ** 2).sum()
            variance += float((left * (size - left)).mean()) / (size * (size - 1)) * inside
        return float(left.mean() * sums.sum()), float(variance)


def _strata(sizes: Sequence[int], ranks: Array, lost: Array) -> list[_Stratum]:
    first = np.cumsum([0, *sizes])
    members: dict[int, list[int]] = {}
    for group, size in enumerate(sizes):
        if size:
            members.setdefault(size, []).append(group)
    return [
        _Stratum(
            np.array([ranks[first[g] : first[g] + size] for g in chosen]),
            np.array([int(lost[first[g] : first[g] + size].sum()) for g in chosen]),
        )
        for size, chosen in sorted(members.items())
    ]


def _exact(strata: Sequence[_Stratum], statistic: int) -> float | None:
    """Two-sided p-value from the distribution of all ways to choose the groups that are lost; None where programs were
    lost one by one, or where there are too many sums to count."""
    if any((stratum.left % stratum.ranks.shape[1]).any() for stratum in strata):
        return None
    sums = [stratum.ranks.sum(1) for stratum in strata]
    chosen = [int((stratum.left > 0).sum()) for stratum in strata]
    span = sum(int(np.abs(of).sum()) for of in sums)
    if sum(len(of) * (m + 1) * (2 * span + 1) for of, m in zip(sums, chosen, strict=True)) > EXACT:
        return None
    whole = np.zeros(2 * span + 1)
    whole[span] = 1.0
    for of, m in zip(sums, chosen, strict=True):
        ways = np.zeros((m + 1, 2 * span + 1))  # [groups chosen so far, sum + span]
        ways[0] = whole
        for value in of.tolist():
            for k in range(m, 0, -1):
                ways[k] += _shifted(ways[k - 1], value)
        whole = ways[m] / math.comb(len(of), m)
    at = statistic + span
    return float(min(1.0, 2.0 * min(whole[: at + 1].sum(), whole[at:].sum())))


def _shifted(values: Array, by: int) -> Array:
    moved = np.zeros_like(values)
    if by >= 0:
        moved[by:] = values[: len(values) - by]
    else:
        moved[:by] = values[-by:]
    return moved


def largest_gap(one: Array, other: Array) -> float:
    """Kolmogorov's and Smirnov's distance of two samples.

    >>> largest_gap(np.array([1, 2, 3, 4]), np.array([1, 2]))
    0.5
    """
    points = np.unique(np.concatenate([one, other]))
    below = (np.searchsorted(np.sort(of), points, "right") / len(of) for of in (one, other))
    return float(np.abs(np.subtract(*below)).max())


def by_tenths(
    groups: Sequence[Dispatched], keep: Mapping[str, tuple[float, float, float]], ages: Mapping[str, float],
    clipped: Mapping[str, float],
) -> list[dict[str, float | None]]:  # fmt: skip
    """Programs in order of length, cut into ten parts as equal as can be; none is empty.

    `keep` has the keep probability of each group and its interval, `ages` the mean age of each trained program's
    tokens, `clipped` the share of them that was clipped.
    """
    each = [
        (tokens, program, fate, group.id)
        for group in groups
        for program, tokens, fate in zip(group.programs, group.tokens, group.fates, strict=True)
    ]
    order = sorted(range(len(each)), key=lambda index: each[index][0])
    rows = []
    for part in np.array_split(np.array(order, np.int64), TENTHS):
        chosen = [each[index] for index in part.tolist()]
        if not chosen:
            continue
        trained = [program for _, program, fate, _ in chosen if fate == "trained"]
        probability, low, high = (
            _mean([keep[group][k] for _, _, _, group in chosen if group in keep]) for k in range(3)
        )
        rows.append(
            {
                "shortest": chosen[0][0],
                "longest": chosen[-1][0],
                "dispatched": len(chosen),
                "kept": sum(fate not in LOST for _, _, fate, _ in chosen),
                "trained": len(trained),
                "keep": probability,
                "keep_low": low,
                "keep_high": high,
                "age": _mean([ages[program] for program in trained if program in ages]),
                "clipped": _mean([clipped[program] for program in trained if program in clipped]),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
