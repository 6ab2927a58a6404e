"""The loop: prompt to engine, one stage an arrow. Features enter as stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.algo.advantage import Selection
from tandem.train.step import LearnerReport
from tandem.types import Group, Prompt, WeightVersion


@dataclass(frozen=True, slots=True)
class Stages:
    """What a run is made of; `run/local.py` builds them from a config. An interface, since more loops than this one run
    over the same stages: one that samples while it learns takes `rest` out."""

    prompts: Callable[[int], Sequence[Prompt]]  # step -> prompts
    rollout: Callable[[int, Sequence[Prompt]], Sequence[Group]]  # prompt .. trajectory
    keep: Callable[[int, Sequence[Group]], None]  # trajectories, on disk before anything is learned of them
    credit: Callable[[Sequence[Group]], Selection]  # trajectory -> batch
    rest: Callable[[], None]  # nothing is in flight: the engine's memory is the learner's until `publish`
    score: Callable[[Selection], Selection]  # the batch under the other policies that the loss or the drift asks for
    learn: Callable[[int, Selection], LearnerReport | None]  # batch -> loss -> weights
    publish: Callable[[int], WeightVersion]  # weights -> engine
    record: Callable[[int, Sequence[Group], Selection, LearnerReport | None, WeightVersion], None]
    stop: Callable[[], bool]  # asked after each step


def run_loop(stages: Stages, first_step: int, last_step: int) -> int:
    """Run steps first_step .. last_step, counted from 1; returns the last step finished."""
    for step in range(first_step, last_step + 1):
        prompts = stages.prompts(step)
        groups = stages.rollout(step, prompts)
        stages.keep(step, groups)
        batch = stages.credit(groups)
        stages.rest()
        batch = stages.score(batch)
        report = stages.learn(step, batch)
        version = stages.publish(step)
        stages.record(step, groups, batch, report, version)
        if stages.stop():
            return step
    return last_step
