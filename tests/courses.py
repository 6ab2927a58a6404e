"""Rows of drawn runs, for tests of what is seen in a run's course."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


class Noise:
    """A healthy run in which nothing changes: every measure at a usual level, in noise that remembers its past."""

    def __init__(self, seed: int, phi: float = 0.3) -> None:
        self.random = random.Random(seed)
        self.phi = phi
        self.last: dict[str, float] = {}
        self.dropped = random.Random(f"dropped {seed}")
        self.lengths = random.Random(f"lengths {seed}")  # whose tests have no memory, whatever lengths have

    def __call__(self, name: str, level: float, deviation: float) -> float:
        fresh = self.random.gauss(0.0, math.sqrt(1.0 - self.phi**2))
        self.last[name] = self.phi * self.last.get(name, 0.0) + fresh
        return level + deviation * self.last[name]

    def share(self, name: str, level: float, of: int) -> int:
        """How many of `of`, a binomial with a memory."""
        return min(of, max(0, round(self(name, level * of, math.sqrt(level * (1 - level) * of)))))

    def row(self, step: int) -> Row:
        tokens = int(128 * self("length", 60.0, 6.0))
        rollout = 2.0 * math.exp(self("speed", 0.0, 0.2))
        calls, z = self.share("calls", 0.9, 256), self.lengths.gauss(0.0, 1.0)
        return {
            "stale_share": abs(self.dropped.gauss(0.05, 0.05)),
            "fairness": {"z": z, "longer": 0.5 + 0.1 * z},
            "step": step, "reward": self.share("reward", 0.5, 128) / 128, "reward_std": self("std", 0.45, 0.03),
            "entropy": math.exp(self("entropy", -0.7, 0.3)), "length": tokens / 128, "tokens": tokens,
            "truncated": self.share("truncated", 0.05, 128) / 128, "trajectories": 128,
            "failed": self.share("failed", 0.01, 128), "failures": ["2 x reward: TimeoutError: late"],
            "zero_variance": self.share("zero_variance", 0.4, 16) / 16, "rare_share": abs(self("rare", 0.08, 0.05)),
            "clip_fraction": abs(self("clip", 0.03, 0.02)), "grad_norm": math.exp(self("grad", 0.3, 0.35)),
            "ess": 1.0 - abs(self("ess", 0.03, 0.02)), "explained_variance": self("critic", 0.5, 0.15),
            "error_budget": {
                "staleness": abs(self("stale", 0.03, 0.01)),
                "mismatch": abs(self("arithmetic", 2e-3, 5e-4)),
            },
            "happened": {
                "tool_calls": calls, "malformed_calls": self.share("malformed", 0.03, calls),
                "tool_errors": self.share("errors", 0.08, calls),
            },
            "spelt_tokens": self.share("spelt", 0.01, 128), "recomputed_tokens": abs(self("again", 0.0, 0.01)) * tokens,
            "seconds": {"rollout": rollout, "learner": 1.5 * math.exp(self("learner", 0.0, 0.2))},
            "learner_rows": tokens,
            "peak_memory_bytes": self.peak(), "alarms": ["k3 0.02 > 0.01"] if self.random.random() < 0.05 else [],
        }  # fmt: skip

    def peak(self) -> float:
        self.last["most"] = max(self.last.get("most", 0.0), self("memory", 2e9, 2e7))
        return self.last["most"]

    def run(self, rows: int = 200, every: int = 20) -> Iterator[Row]:
        for step in range(1, rows + 1):
            row = self.row(step)
            if every and step % every == 0:
                row["evaluation"] = {"accuracy": self.share("held out", 0.6, 128) / 128, "prompts": 128}
            yield row
