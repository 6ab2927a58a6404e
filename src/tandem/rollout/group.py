"""What a step's groups amount to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.types import Group, StopReason


def group_id(prompt_id: str, step: int) -> str:
    """Unique within a run."""
    return f"{prompt_id}/{step}"


def program_id(prompt_id: str, step: int, sibling: int) -> str:
    """Of a group's."""
    return f"{group_id(prompt_id, step)}/{sibling}"


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """Figures of a step's groups. Means are None where there is nothing to average.

    >>> summarise([]).trajectories
    0
    """

    trajectories: int
    failed: int
    reward: float | None  # mean of the trajectories that did not fail
    reward_std: float | None  # of the same, population form
    length: float | None  # mean sampled tokens, all trajectories
    length_max: int
    tokens: int  # sampled, all trajectories
    truncated: float | None  # share of all trajectories cut at rollout.max_new_tokens
    zero_variance: float | None  # share of the groups with a graded trajectory whose rewards are all equal
    turns: float | None  # mean completions a program
    counts: dict[str, int]  # of what happened in all programs: tool_calls, malformed_calls, tool_errors, ...
    failures: tuple[tuple[str, int], ...]  # ("where: reason", count), most frequent first

    @property
    def reasons(self) -> tuple[str, ...]:
        """Failures as rows and people have them: "3 x where: reason"."""
        return tuple(f"{count} x {reason}" for reason, count in self.failures)


def summarise(groups: Sequence[Group]) -> RolloutSummary:
    """Figures of `groups`; failed programs count as failed, never as a reward of zero.

    Rewards, failures and `trajectories` are a program's, however many segments it has; lengths are a segment's.
    """
    everything = [trajectory for group in groups for trajectory in group.trajectories]
    programs = [program[0] for group in groups for program in group.programs]
    rewards = [program.reward for program in programs if program.failure is None]
    lengths = [trajectory.num_sampled for trajectory in everything]
    reward = _mean(rewards)
    graded = [{t.reward for t in group.trajectories if t.failure is None} for group in groups]
    spreads = [float(len(distinct) == 1) for distinct in graded if distinct]
    reasons = Counter(f"{t.failure.where}: {t.failure.reason}" for t in programs if t.failure is not None)
    counts = Counter[str]()
    for trajectory in everything:
        counts.update(trajectory.counts)
    return RolloutSummary(
        trajectories=len(programs),
        failed=len(programs) - len(rewards),
        reward=reward,
        reward_std=None if reward is None else math.sqrt(math.fsum((r - reward) ** 2 for r in rewards) / len(rewards)),
        length=_mean(lengths),
        length_max=max(lengths, default=0),
        tokens=sum(lengths),
        truncated=_mean([float(t.stop_reason is StopReason.LENGTH) for t in everything]),
        zero_variance=_mean(spreads),
        turns=_mean([float(sum(t.num_turns for t in program)) for group in groups for program in group.programs]),
        counts=dict(counts),
        failures=tuple(reasons.most_common()),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
