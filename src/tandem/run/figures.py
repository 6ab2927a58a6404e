"""A step's figures, as its row has them."""

from __future__ import annotations

from typing import Any

from tandem.rollout.group import RolloutSummary
from tandem.run.config import RunConfig
from tandem.train.step import LearnerReport


def figures(config: RunConfig, summary: RolloutSummary, report: LearnerReport | None) -> dict[str, Any]:
    """A row of what was sampled, and of what was learned of it."""
    row: dict[str, Any] = {
        "reward": summary.reward,
        "reward_std": summary.reward_std,
        "trajectories": summary.trajectories,
        "failed": summary.failed,
        "failures": list(summary.reasons),
        "length": summary.length,
        "length_max": summary.length_max,
        "truncated": summary.truncated,
        "tokens": summary.tokens,
        "zero_variance": summary.zero_variance,
    }
    if config.rollout.max_turns > 1 or any(summary.counts.values()):
        row |= {"turns": summary.turns, "happened": summary.counts}
    if report is not None:
        found = report.measured
        row |= {name: value for name, value in found.metrics.items() if name != "tokens"}
        row |= {"trained_tokens": int(found.metrics["tokens"]), "learner_rows": report.rows}
        row |= {"grad_norm": report.grad_norm, "lr": report.lr, "microbatches": report.microbatches}
        row |= {"error_budget": found.error_budget, "by_length": found.by_length}
        row["alarms"] = [alarm.text() for alarm in found.alarms]
        if config.supervised.unit:
            row["loss_unit"] = config.supervised.unit
    return row
