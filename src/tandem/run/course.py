"""How far a run has come: whether it has reached its target, and which evaluated step was best.

A function of the run's rows alone, so that a resumed run knows what the one before it knew.
"""

from __future__ import annotations

import math
import os
import statistics
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.errors import CheckpointError
from tandem.run.config import EvaluationConfig

STEPS = 5  # whose mean reward is held against evaluation.stop_reward, as the report's figures are


class Course:
    """Takes each step's reward, then its evaluation.

    >>> course = Course(EvaluationConfig(stop_reward=0.5))
    >>> for step in range(1, 6):
    ...     course.sampled(0.75)
    >>> course.reached
    'the mean reward of 5 steps is 0.75, the target 0.5'
    """

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        self.rewards: deque[float] = deque(maxlen=STEPS)
        self.best: tuple[float, float] = (-math.inf, -math.inf)  # held-out accuracy, then mean reward where it is equal
        self.reached = ""  # in words; empty until a target is reached

    def take(self, row: Mapping[str, Any]) -> None:
        """A row that is written already."""
        self.sampled(row.get("reward"))
        self.evaluated(int(row["step"]), row.get("evaluation"))

    def sampled(self, reward: float | None) -> None:
        """A step's mean reward; None where every trajectory failed, which is no reward of 0."""
        target = self.config.stop_reward
        if reward is None:
            return
        self.rewards.append(reward)
        if target is not None and len(self.rewards) == STEPS and (mean := statistics.fmean(self.rewards)) >= target:
            self.reached = f"the mean reward of {STEPS} steps is {mean:.4g}, the target {target:.4g}"

    def evaluated(self, step: int, evaluation: Mapping[str, Any] | None) -> bool:
        """Whether a trained step's evaluation is better than all before it."""
        if not evaluation or not evaluation["prompts"] or step == 0:
            return False
        accuracy, target = evaluation["accuracy"], self.config.stop_accuracy
        if target is not None and accuracy >= target:
            self.reached = f"held-out accuracy is {accuracy:.4g}, the target {target:.4g}"
        reward = evaluation.get("reward")
        score = (accuracy, -math.inf if reward is None else reward)
        better = score > self.best
        self.best = max(self.best, score)
        return better


def mark_best(root: Path, step: int) -> None:
    """Let `root`/best lead to the checkpoint of `step`. The link is the old one or the new one, never none."""
    aside = root / ".best.tmp"
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(f"step-{step}")
        aside.replace(root / "best")
    except OSError as error:
        raise CheckpointError(f"{root / 'best'} could not be made a link to step-{step}: {error.strerror}.") from error


def marked_best(root: Path) -> str:
    """The name of the checkpoint that `mark_best` marked last; empty for none."""
    best = root / "best"
    return os.readlink(best) if best.is_symlink() else ""
