"""The stage between credit and learner: what of a step's groups was kept, and its weights (docs/fairness.md)."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tandem.algo.advantage import Selection
from tandem.algo.lengths import LOST, Dispatched, by_tenths, compare, of_group
from tandem.algo.propensity import Keep, Weights, inverse, keep_probabilities
from tandem.rollout.first import First
from tandem.run.config import RunConfig
from tandem.train.step import LearnerReport
from tandem.types import Group, Sample

NO_UNITS = LOST | {"filtered"}  # fates of programs that are in no denominator of the loss


class Ended(NamedTuple):
    """What is kept of a group of an earlier step."""

    clock: float
    ended: bool
    usable: bool
    kept: bool

    @property
    def end(self) -> int:
        return int(self.clock)


class Fairness:
    """Takes each step's groups, whatever became of them; knows what the loss makes of it and what the row says."""

    def __init__(self, run: RunConfig) -> None:
        self.config, rollout = run.algo, run.rollout
        self.drops = run.asynchrony.mode == "full" and run.asynchrony.order == "drop"
        self.lasts = bool(rollout.extra_prompts) or self.drops  # else nothing is estimated from earlier steps
        self.most = rollout.max_program_tokens or rollout.max_turns * rollout.max_new_tokens  # tokens of a program
        self.past: deque[list[Ended]] = deque(maxlen=self.config.fairness.steps)
        self.present: list[Ended] | None = None  # of the step that is learned
        self.races: list[First] = []  # of this step
        self.stale: list[Dispatched] = []  # dropped since the step before
        self.groups: Sequence[Dispatched] = ()  # settled in this step
        self.keep: Mapping[str, Keep] = {}
        self.weights: Weights | None = None
        self.samples: Sequence[Sample] = ()

    def race(self, first: First) -> First:
        """The groups of this step are, beside those of other races, what makes a batch of it."""
        self.races.append(first)
        return first

    def drop(self, groups: Sequence[Group]) -> None:
        """Groups that nothing is learned of, since they are older than the lag allows."""
        self.stale += [of_group(group, late="stale") for group in groups]

    def weigh(self, groups: Sequence[Group], batch: Selection, again: Collection[str] = ()) -> Selection:
        """The batch made of `groups`, beside what else was settled in this step; `again` are trajectories that were in
        a batch before, whose groups were settled then."""
        raced = [one for race in self.races for one in race.dispatched(batch.fates, self.most)]
        kept = raced or [of_group(group, batch.fates) for group in groups]
        every = [dataclasses.replace(one, keep=None) if self.drops else one for one in (*kept, *self.stale)]
        before = {one.rpartition("/")[0].rpartition("/")[0] for one in again}
        self.groups = [one for one in every if one.id not in before]
        self.races = []
        self.samples, self.weights = batch.samples, None
        self.present = [Ended(one.clock, one.ended, one.usable, one.kept) for one in self.groups]
        self.keep = keep_probabilities(every, [*self.past, self.present][-self.config.fairness.steps :])
        if self.config.fairness.weights == "none":
            return batch
        units = {one.id: self._units(one) for one in every}
        self.weights = inverse(self.keep, units, self.config.fairness.most)
        return dataclasses.replace(batch, samples=tuple(self._weighed(sample) for sample in batch.samples))

    def _units(self, group: Dispatched) -> int:
        """What the loss averages over: its tokens, programs or prompts, of those that are in the denominators."""
        gone = NO_UNITS | ({"decided"} if self.config.filter_zero_variance else set())
        counted = [n for n, fate in zip(group.tokens, group.fates, strict=True) if fate not in gone]
        if self.config.aggregation == "token_mean":
            return sum(counted)
        return int(bool(counted)) if self.config.aggregation == "prompt_mean" else len(counted)

    def _weighed(self, sample: Sample) -> Sample:
        assert self.weights is not None
        weight = self.weights.of[sample.id.rpartition("/")[0].rpartition("/")[0]]
        columns = sample.columns.having(selection_weights=np.full(len(sample.columns), weight))
        return dataclasses.replace(sample, columns=columns)

    def row(self, step: int, report: LearnerReport | None) -> dict[str, Any]:
        """Of the step that `weigh` saw last."""
        clipped = report.measured.clipped if report is not None else {}
        ages = _by_program(
            (s, step - 1 - float(s.columns["versions"][s.columns["loss_mask"]].mean())) for s in self.samples
        )
        shares = _by_program((sample, clipped[sample.id]) for sample in self.samples if sample.id in clipped)
        every = [pair for one in self.groups for pair in zip(one.tokens, one.fates, strict=True)]
        known: dict[str, Any] = {
            "dispatched_length": _mean([n for n, _ in every]),
            "kept_length": _mean([n for n, fate in every if fate not in LOST]),
            "trained_length": _mean([n for n, fate in every if fate == "trained"]),
            "cut": sum(len(one.tokens) for one in self.groups if not one.ended),
        }
        if (found := compare(self.groups)) is not None:
            known |= found._asdict()
        if self.weights is not None:
            known |= {
                "weight_max": self.weights.largest,
                "weight_clipped": self.weights.clipped,
                "weight_ess": self.weights.effective,
                "weighted_length": self._weighted_length(),
            }
        return {"fairness": known, "lengths": by_tenths(self.groups, self.keep, ages, shares)}

    def _weighted_length(self) -> float | None:
        """The mean length of the programs that were kept, weighed: an estimate of that of all dispatched ones."""
        assert self.weights is not None
        pairs = [
            (min(1.0 / self.keep[one.id].probability, self.config.fairness.most), tokens)
            for one in self.groups
            for tokens, fate in zip(one.tokens, one.fates, strict=True)
            if fate not in LOST
        ]
        total = math.fsum(weight for weight, _ in pairs)
        return math.fsum(weight * tokens for weight, tokens in pairs) / total if total else None

    def settle(self) -> None:
        """The step has met its fate; one that did not is weighed again, with what it had dropped."""
        if self.present is not None:
            self.past.append(self.present)
            self.present, self.stale = None, []

    def state(self) -> dict[str, Any]:
        stale = [dataclasses.asdict(one) for one in self.stale]
        return {"past": [[list(one) for one in step] for step in self.past], "stale": stale}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.past.clear()
        self.past.extend([Ended(float(n), *map(bool, rest)) for n, *rest in step] for step in state["past"])
        self.stale = [_dropped(one) for one in state.get("stale", ())]


def _dropped(saved: Mapping[str, Any]) -> Dispatched:
    lists = {name: tuple(saved[name]) for name in ("programs", "tokens", "fates")}
    return Dispatched(**{**saved, **lists})


def _by_program(values: Iterable[tuple[Sample, float]]) -> dict[str, float]:
    """Mean over the tokens of a program's samples."""
    sums: dict[str, list[float]] = {}
    for sample, value in values:
        tokens, of = int(sample.columns["loss_mask"].sum()), sums.setdefault(sample.id.rpartition("/")[0], [0.0, 0.0])
        of[0], of[1] = of[0] + tokens * value, of[1] + tokens
    return {program: total / tokens for program, (total, tokens) in sums.items()}


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None
