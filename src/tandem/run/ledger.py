"""The ledger: one fate for each sampled token, one phase for each second of each worker, and no remainder.

Tokens are integers and seconds are kept as integer nanoseconds, so that both sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.types import Group, Sample, StopReason, Trajectory

FATES = {
    "trained": "reached a gradient",
    "masked": "in a trained sample, without advantage",
    "zero_advantage": "an advantage of 0: the whole group scored the same, or others of it were kept",
    "filtered": "of a group whose rewards were equal, which left the batch",
    "truncated": "cut at rollout.max_new_tokens, and left out",
    "failed": "the environment, the reward or the deadline gave no score",
    "aborted": "withdrawn before the end, or of a group beyond the batch (rollout.extra_prompts)",
    "discarded": "of steps after the checkpoint that a resumed run started from",
    "in_flight": "sampled, but in no trajectory when the run ended",
}
IDLE = "idle/other"  # the part of the wall clock that no phase claimed
_SLACK_NS = 1_000  # float seconds of one clock may exceed its wall by their rounding


@dataclass(slots=True)
class Ledger:
    """Tokens and seconds as they happen; `close` makes both sum to their totals.

    >>> ledger = Ledger()
    >>> ledger.spend({"rollout": 2.0, "learner": 1.5})
    >>> ledger.close(wall_s={"main": 4.0})["seconds"]["main"]
    {'rollout': 2.0, 'learner': 1.5, 'idle/other': 0.5, 'wall': 4.0}
    """

    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FATES, 0))
    nanoseconds: dict[str, dict[str, int]] = field(default_factory=dict)  # worker -> phase -> ns

    def record(self, groups: Iterable[Group], samples: Iterable[Sample], fates: Mapping[str, str]) -> dict[str, int]:
        """Give each sampled token of a step's groups its fate; `samples` are those that the learner took, `fates` those
        of all trajectories (algo.advantage.FATES).

        Returns this step's counts by fate. A sample whose id is in no group is an error of the caller.
        """
        trained = {sample.id: sample for sample in samples}
        counts = dict.fromkeys(FATES, 0)
        for group in groups:
            for trajectory in group.trajectories:
                sampled = trajectory.num_sampled
                sample = trained.pop(trajectory.id, None)
                if sample is None:
                    counts[_fate(trajectory, fates)] += sampled
                    continue
                assert trajectory.failure is None, f"{trajectory.id} failed, yet it was trained"
                reached = int((sample.columns["loss_mask"] & (sample.columns["advantages"] != 0.0)).sum())
                assert reached <= sampled, f"{sample.id}: {reached} trained of {sampled} sampled tokens"
                counts["trained"] += reached
                counts["masked"] += sampled - reached
        assert not trained, f"trained samples without a trajectory: {sorted(trained)[:5]}"
        for fate, number in counts.items():
            self.tokens[fate] += number
        return counts

    def spend(self, seconds: Mapping[str, float], worker: str = "main") -> None:
        """Add a worker's exclusive seconds by phase. Phases named "other" or "idle" are left to the remainder."""
        phases = self.nanoseconds.setdefault(worker, {})
        for phase, value in seconds.items():
            assert value >= 0, f"{worker}: {value} s of {phase}"
            if phase not in ("other", "idle", IDLE):
                phases[phase] = phases.get(phase, 0) + int(value * 1e9)

    def discard(self, rows: Iterable[Mapping[str, Any]], worker: str = "main") -> None:
        """Count what `RunFolder.rewind` dropped: its tokens and seconds were paid for and led nowhere.

        Only for a ledger that does not hold those steps already (one restored from the checkpoint).
        """
        for row in rows:
            self.tokens["discarded"] += int(row.get("tokens") or 0)
            spent = int(sum((row.get("seconds") or {}).values()) * 1e9)
            phases = self.nanoseconds.setdefault(worker, {})
            phases["discarded"] = phases.get("discarded", 0) + spent

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `restore` gives the ledger back."""
        return {"tokens": dict(self.tokens), "nanoseconds": {w: dict(p) for w, p in self.nanoseconds.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.tokens = dict.fromkeys(FATES, 0) | dict(state["tokens"])
        self.nanoseconds = {worker: dict(phases) for worker, phases in state["nanoseconds"].items()}

    def close(self, wall_s: Mapping[str, float], sampled_tokens: int | None = None) -> dict[str, Any]:
        """The ledger as ledger.json holds it; "nanoseconds" sum exactly, "seconds" are the same for reading.

        wall_s: seconds of each worker over all sittings, discarded steps included; what no phase claimed is
        "idle/other". sampled_tokens: how many tokens the engines sampled over all sittings; those without a fate are
        "in_flight" (None: there are none). Fails where more was recorded than there was.
        """
        tokens = dict(self.tokens)
        accounted = sum(tokens.values())
        total = accounted if sampled_tokens is None else sampled_tokens
        assert accounted <= total, f"{accounted} tokens have a fate, but only {total} were sampled"
        tokens["in_flight"] += total - accounted
        assert set(self.nanoseconds) <= set(wall_s), f"no wall time for {set(self.nanoseconds) - set(wall_s)}"
        nanoseconds = {}
        for worker, wall in wall_s.items():
            phases = _closed(worker, self.nanoseconds.get(worker, {}), int(wall * 1e9))
            nanoseconds[worker] = phases | {"wall": sum(phases.values())}
        return {
            "tokens": tokens | {"total": total},
            "trained_share": tokens["trained"] / total if total else None,
            "nanoseconds": nanoseconds,
            "seconds": {worker: {n: ns / 1e9 for n, ns in phases.items()} for worker, phases in nanoseconds.items()},
            "fates": FATES,
        }


def _fate(trajectory: Trajectory, fates: Mapping[str, str]) -> str:
    if trajectory.stop_reason is StopReason.ABORTED:
        return "aborted"
    return fates[trajectory.id]


def _closed(worker: str, phases: Mapping[str, int], wall_ns: int) -> dict[str, int]:
    """Phases and the remainder, in ns; they sum to `wall_ns` exactly."""
    closed = dict(phases)
    rest = wall_ns - sum(closed.values())
    if -_SLACK_NS * max(1, len(closed)) <= rest < 0:
        closed[max(closed, key=closed.__getitem__)] += rest
        rest = 0
    assert rest >= 0, f"{worker}: phases claim {-rest / 1e9} s more than its wall of {wall_ns / 1e9} s: {closed}"
    return dict(sorted(closed.items(), key=lambda entry: -entry[1])) | {IDLE: rest}
