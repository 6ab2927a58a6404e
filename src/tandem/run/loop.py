"""The loop: prompt to engine, one stage an arrow. Features enter as stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.algo.advantage import Selection
from tandem.train.step import LearnerReport
from tandem.types import Group, Prompt, WeightVersion


@dataclass(frozen=True, slots=True)
class Stages:
    """What a run is made of; `run/local.py` builds them from a config."""

    prompts: Callable[[int], Sequence[Prompt]]  # step -> prompts
    rollout: Callable[[int, Sequence[Prompt]], Sequence[Group]]  # prompt .. trajectory
    credit: Callable[[Sequence[Group]], Selection]  # trajectory -> batch
    learn: Callable[[int, Sequence[Group], Selection], LearnerReport | None]  # batch -> loss -> weights
    publish: Callable[[int], WeightVersion]  # weights -> engine
    record: Callable[[int, Sequence[Group], Selection, LearnerReport | None, WeightVersion], None]
    stop: Callable[[], bool]  # asked after each step


def run_loop(stages: Stages, first_step: int, last_step: int) -> int:
    """Run steps first_step .. last_step, counted from 1; returns the last step finished."""
    for step in range(first_step, last_step + 1):
        prompts = stages.prompts(step)
        groups = stages.rollout(step, prompts)
        batch = stages.credit(groups)
        report = stages.learn(step, groups, batch)
        version = stages.publish(step)
        stages.record(step, groups, batch, report, version)
        if stages.stop():
            return step
    return last_step
