"""Greedy accuracy on held-out prompts, with the interval that its sample size allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.driver import Endpoint
from tandem.numerics.interval import wilson_interval
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.group import summarise
from tandem.rollout.program import Episodes
from tandem.rollout.rollout import Rollouts
from tandem.trace import Trace
from tandem.types import Group, Prompt

PORTION = 256  # prompts that share rollout.deadline_s: a whole file takes longer than a step


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy with its Wilson 95 % interval.

    >>> Evaluation(0.5, 0.3, 0.7, 20, 0, 0.5, 8.0).accuracy
    0.5
    """

    accuracy: float  # share of the graded prompts with a reward of 1 or more; 0.0 where none could be graded
    low: float
    high: float
    prompts: int  # graded
    failed: int  # not graded, and not in the accuracy
    reward: float | None  # mean over the graded
    length: float | None  # mean sampled tokens
    failures: tuple[str, ...] = ()  # "3 x where: reason", most frequent first


def evaluate(
    driver: Endpoint,
    renderer: Renderer,
    environments: Episodes,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    step: int = 0,
    trace: Trace | None = None,
) -> tuple[Evaluation, list[Group]]:
    """The accuracy of the most likely answer to each prompt, and the groups of one that it comes from.

    Turns, lengths, stop strings and the deadline of each portion are `config`'s; its sampling is not used.
    """
    greedy = dataclasses.replace(config, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, samples_per_prompt=1)
    rollouts = Rollouts(driver, renderer, environments, greedy, run_seed=0, trace=trace)
    portions = [prompts[start : start + PORTION] for start in range(0, len(prompts), PORTION)]
    groups = [group for portion in portions for group in rollouts.collect(step, portion)]
    summary = summarise(groups)
    graded = summary.trajectories - summary.failed
    right = sum(p[0].reward >= 1 for group in groups for p in group.programs if p[0].failure is None)
    low, high = wilson_interval(right, graded)
    accuracy = right / graded if graded else 0.0
    means = (summary.reward, summary.length)
    return Evaluation(accuracy, low, high, graded, summary.failed, *means, summary.reasons), groups
