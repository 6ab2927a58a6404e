"""Accuracy on held-out prompts, with the interval that its sample size allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.engine.driver import Endpoint
from tandem.numerics.interval import clustered_interval
from tandem.program.render import Renderer
from tandem.rollout.config import Drawing, RolloutConfig
from tandem.rollout.group import summarise
from tandem.rollout.program import Episodes
from tandem.rollout.rollout import Rollouts
from tandem.types import Group, Prompt, Trajectory

PORTION = 256  # programs, at least one prompt's, that share rollout.deadline_s: a whole file takes longer than a step
GREEDY = Drawing()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy with its Wilson 95 % interval; several samples of a prompt count as one cluster (numerics/interval.py).

    >>> Evaluation(0.5, 0.3, 0.7, 20, 0, 0.5, 8.0).accuracy
    0.5
    """

    accuracy: float  # share of the graded samples with a reward of 1 or more; 0.0 where none could be graded
    low: float
    high: float
    prompts: int  # with a graded sample
    failed: int  # samples that were not graded, and are not in the accuracy
    reward: float | None  # mean over the graded
    length: float | None  # mean sampled tokens
    failures: tuple[str, ...] = ()  # "3 x where: reason", most frequent first


def evaluate(
    driver: Endpoint,
    renderer: Renderer,
    environments: Episodes,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    drawing: Drawing = GREEDY,
    step: int = 0,
    ended: Callable[[Group], None] = lambda group: None,
) -> tuple[Evaluation, list[Group]]:
    """The accuracy of answers to each prompt, drawn as `drawing` says, and the groups that it comes from.

    `ended` is told each group as it ends. Turns, lengths, stop strings and the deadline of each portion are `config`'s;
    its sampling is not used. Samples of a prompt that does not fit the engine are failed ones.
    """
    rollouts = Rollouts(driver, renderer, environments, drawing.of(config), run_seed=drawing.seed)
    rollouts.unfit_fail = True
    size = max(1, PORTION // drawing.samples)
    portions = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    groups = list[Group]()
    for portion in portions:
        found = dict[str, Group]()
        for group in rollouts.run(step, portion):
            found[group.prompt.id] = group
            ended(group)
        groups += [found[prompt.id] for prompt in portion]
    summary = summarise(groups)
    graded = [marks for group in groups if (marks := [right(t) for t in graded_of(group)])]
    sums, counts = [sum(marks) for marks in graded], [len(marks) for marks in graded]
    low, high = clustered_interval(sums, counts)
    accuracy = math.fsum(sums) / sum(counts) if counts else 0.0
    means = (summary.reward, summary.length)
    return Evaluation(accuracy, low, high, len(graded), summary.failed, *means, summary.reasons), groups


def graded_of(group: Group) -> list[Trajectory]:
    """The first segment of each program that has a reward."""
    return [program[0] for program in group.programs if program[0].failure is None]


def right(trajectory: Trajectory) -> bool:
    """Whether its program counts as right in an accuracy."""
    return trajectory.reward >= 1
