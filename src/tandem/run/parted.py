"""A session whose batches come in parts, in the order of its queue: one that samples ahead, and its repetition.

Where asynchrony.stream is on the learner computes the gradients of a part as it comes, and updates once the batch is
whole. A part is what one choice took, so that what is computed together is a fact of the journal.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.algo.advantage import Selection, samples_from_groups
from tandem.algo.alarm import AlarmConfig
from tandem.config import dump, load
from tandem.errors import NonFiniteError, RunFolderError
from tandem.rollout.queue import Choice, Queue
from tandem.run.journal import Fact
from tandem.run.learned import total_updates
from tandem.run.loop import Stages
from tandem.run.session import Session
from tandem.train.step import Learner, LearnerReport, Parts
from tandem.types import Group, Prompt


class PartedSession(Session):
    """Stages over `part`."""

    queue: Queue
    parts_learned: Parts | None = None  # of the present step, where they are streamed
    under: Mapping[int, Mapping[str, Any]] = {}  # step -> the settings under which a journal says that it was learned
    learns_under: Mapping[str, Any] | None = None  # None: its own

    @property
    def here(self) -> Learner:
        """The learner, which is of this process where batches come in parts."""
        assert isinstance(self.learner, Learner), self.learner
        return self.learner

    def stages(self) -> Stages:
        stages = dataclasses.replace(super().stages(), prompts=lambda _: (), rollout=self.gather, rest=lambda: None)
        if not self.config.asynchrony.stream:
            return stages
        return dataclasses.replace(stages, score=lambda batch: batch, learn=self.update)

    @abstractmethod
    def part(self, step: int) -> list[Group]:
        """The next groups of a step's batch, as they were chosen before or as soon as there are enough."""

    def chosen(self, path: Path, fact: Fact, step: int) -> Choice:
        """What the journal in `path` says that a step takes. RunFolderError where it is for another step, or of groups
        that are not there."""
        numbers, again, stale = (tuple(fact[name]) for name in ("numbers", "again", "stale"))
        why = "was changed, or is of another run. Restore it"
        if (numbers or again) and fact["step"] != step:
            raise RunFolderError(f"{path} chooses for step {fact['step']} where step {step} is due: it {why}.")
        parts = ((Counter((*numbers, *stale)), self.queue.waiting), (Counter(again), self.queue.kept))
        absent = [n for named, there in parts for n, times in named.items() if times > 1 or n not in there]
        if absent:
            raise RunFolderError(
                f"{path} chooses group {absent[0]} for step {step}, which has not ended by then, or was chosen or "
                f"dropped before: it {why}."
            )
        return Choice(fact["step"], numbers, again, stale, tuple(self.queue.unusable))

    def follows(self, path: Path, fact: Fact) -> None:
        """RunFolderError where a group begins or ends that can't, by what the journal in `path` says before."""
        if fact.kind == "begin" and fact["number"] != self.queue.begun:
            why = f"begins group {fact['number']} where group {self.queue.begun} is due"
        elif fact.kind == "end" and fact["number"] not in self.queue.running:
            why = f"ends group {fact['number']}, which does not run"
        else:
            return
        raise RunFolderError(f"{path} {why}: facts before it are lost, or it was changed. Restore it.")

    def given(self) -> list[Group]:
        """The groups of the last part."""
        again = [one.ended.group for part in self.queue.parts for one in part if one.uses > 1]
        self.reused = {trajectory.id for group in again for trajectory in group.trajectories}
        return [one.ended.group for one in self.queue.parts[-1]]

    @property
    def settings(self) -> dict[str, Any]:
        """Of what a resume may change: all that weights hang on."""
        return {"updates": total_updates(self.config, self.learner.objective), "alarms": dump(self.config.alarms)}

    def _learn_under(self, settings: Mapping[str, Any]) -> None:
        if settings != (self.learns_under or self.settings):
            self.learner.under(settings["updates"], load(AlarmConfig, settings["alarms"]))
        self.learns_under = settings

    def gather(self, step: int, prompts: Sequence[Prompt]) -> list[Group]:
        """The groups of a step."""
        self._learn_under(self.under.get(step, self.settings))
        groups: list[Group] = []
        if self.config.asynchrony.stream:
            self.parts_learned = self.here.begin()
        while not self.queue.whole:
            part = self.part(step)
            groups += part
            if self.parts_learned is not None:
                self._add(step, self.parts_learned, part, groups)
        return groups

    def _add(self, step: int, parts: Parts, part: Sequence[Group], groups: Sequence[Group]) -> None:
        """The gradients of a part; `groups` are those of the step so far."""
        with self.trace.span("credit"):
            batch = samples_from_groups(self.config.algo, part, self.price.price)
        batch = self.score(batch)
        try:
            with self.learning(step):
                self.here.add(parts, batch.samples, batch.prompts)
        except NonFiniteError:
            self.keep(step, groups)  # the error says where they are
            raise

    def update(self, step: int, batch: Selection) -> LearnerReport | None:
        """What is left of a streamed step: the batch is whole."""
        parts, self.parts_learned = self.parts_learned, None
        assert parts is not None
        with self.learning(step):
            return self.here.finish(parts, batch.prompts)
