"""metrics.jsonl -> rows -> the figures that head a report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tandem.errors import RunFolderError
from tandem.trace import ROLLOUT

Row = Mapping[str, Any]

FAILED_SHARE_ALARM = 0.10  # of a step's trajectories


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Rows of a run folder or of a metrics.jsonl, by step; rows of one step are merged, the later value winning.

    A torn last line (a run that was killed, or one that is writing now) is left out. Raises RunFolderError where
    the file is absent or a line before the last is no row.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        lines = path.read_text(errors="replace").rstrip("\n").split("\n")
    except FileNotFoundError as error:
        raise RunFolderError(
            f"{path} does not exist: no step was finished there. Give a folder made by `tandem train`."
        ) from error
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.") from error
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, LookupError) as error:
            if number == len(lines):  # no newline after it: torn
                break
            raise RunFolderError(
                f"{path} is damaged: line {number} is not the row of a step. Remove it to go on."
            ) from error
        rows.setdefault(step, {}).update(row)
    return [rows[step] for step in sorted(rows)]


def series(rows: Iterable[Row], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows where `name` is a finite number."""
    steps, values = [], []
    for row in rows:
        value = row.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(int(row["step"]))
            values.append(float(value))
    return steps, values


def evaluations(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Held-out accuracies {"step", "accuracy", "low", "high", "prompts"} in order of step."""
    return [{"step": row["step"], **row["evaluation"]} for row in rows if row.get("evaluation")]


def graded(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The evaluations in which anything could be graded: the others' accuracy is no measurement."""
    return [entry for entry in evaluations(rows) if entry.get("prompts") != 0]


def training(rows: Iterable[Row]) -> list[Row]:
    """Rows of steps that trained, without those that hold only an evaluation."""
    return [row for row in rows if "reward" in row or "loss" in row]


def measure(rows: Iterable[Row]) -> str:
    """What tells how a run goes: its reward, or the loss where it learns from texts (their rows have no reward)."""
    trained = training(rows)
    return "loss" if trained and not any("reward" in row for row in trained) else "reward"


def loss_unit(rows: Iterable[Row]) -> str:
    """Of what the loss is the mean.

    >>> loss_unit([{"step": 1, "loss": 0.69, "reward_margin": 0.0}])
    'mean over pairs'
    """
    rows = list(rows)
    names = set[str]().union(*rows)
    if told := dict.fromkeys(str(row.get("loss_unit", "nats per token")) for row in rows if "loss_unit" in names):
        return " or ".join(told)
    if "kl_mismatched" in names:
        return "mean over ratings"
    return "mean over pairs" if "reward_margin" in names else "nats per token"


def seconds_by_phase(rows: Iterable[Row]) -> dict[str, float]:
    """Seconds by phase over all rows, largest first, "other" last."""
    totals: dict[str, float] = {}
    for row in rows:
        for phase, seconds in (row.get("seconds") or {}).items():
            totals[phase] = totals.get(phase, 0.0) + float(seconds)
    return dict(sorted(totals.items(), key=lambda entry: (entry[0] == "other", -entry[1])))


def wall_s(rows: Iterable[Row]) -> float:
    """Seconds of all sittings: `time_s` starts again where a run was resumed by a clock that starts again."""
    total = sitting = 0.0
    for _, time_s in zip(*series(rows, "time_s"), strict=True):
        if time_s < sitting:
            total += sitting
        sitting = time_s
    return total + sitting


def step_s(row: Row) -> float | None:
    """Seconds of a step: the sum of its phases."""
    seconds = row.get("seconds")
    return sum(seconds.values()) if seconds else None


def time_left_s(rows: Sequence[Row], total_steps: int) -> float | None:
    """Median seconds of the last ten steps times the steps left, or None where no step has been timed."""
    trained = training(rows)
    timed = [seconds for row in trained[-10:] if (seconds := step_s(row)) is not None]
    if not timed:
        return None
    return statistics.median(timed) * max(0, total_steps - int(trained[-1]["step"]))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The headline figures of a run; None where the rows do not hold one.

    steps, last_step; measure ("reward" or "loss"); loss_unit; reward_first, reward_last, loss_first, loss_last:
    means over the first and last five steps that have one, the loss only where it is the measure;
    preference_accuracy_first, _last, reward_margin_first, _last: the same, where answers are compared;
    heldout_loss: on the held-out tasks of a corpus, in order;
    evaluation_before, evaluation_after: first and last held-out result (after is None with only one);
    tokens, tokens_per_s (all sampled tokens over the rollout seconds of all workers; of texts, all that the learner ran
    over its seconds), trained_samples, trained_tokens,
    failed;
    wall_s, seconds and shares by phase; peak_memory_bytes; kl_max, mismatch_max, ratio_max; weights (last digest).
    """
    trained = training(rows)
    measured = measure(rows)
    values = {name: series(trained, name)[1] if name == measured else [] for name in ("reward", "loss")}
    values |= {name: series(trained, name)[1] for name in ("preference_accuracy", "reward_margin")}
    evaluated = evaluations(rows)
    seconds = seconds_by_phase(rows)
    spent = sum(seconds.values())
    tokens = sum(series(rows, "tokens")[1]) if measured == "reward" else 0  # of texts, nothing was sampled
    rates = map(sampling if measured == "reward" else learning, rows)
    drawn, rollout_s = map(sum, zip(*rates, strict=True)) if tokens or measured == "loss" else (0.0, 0.0)
    return {
        "steps": len(trained),
        "last_step": trained[-1]["step"] if trained else None,
        "measure": measured,
        "loss_unit": loss_unit(trained),
        **{f"{name}_first": statistics.fmean(of[:5]) if of else None for name, of in values.items()},
        **{f"{name}_last": statistics.fmean(of[-5:]) if of else None for name, of in values.items()},
        "heldout_loss": [row["heldout"]["loss"] for row in rows if row.get("heldout")],
        "evaluation_before": evaluated[0] if evaluated else None,
        "evaluation_after": evaluated[-1] if len(evaluated) > 1 else None,
        "tokens": int(tokens),
        "tokens_per_s": drawn / rollout_s if rollout_s else None,
        "trained_samples": int(sum(series(rows, "trained_samples")[1])),
        "trained_tokens": int(sum(series(rows, "trained_tokens")[1])),
        "failed": int(sum(series(rows, "failed")[1])),
        "wall_s": wall_s(rows),
        "seconds": seconds,
        "shares": {phase: value / spent for phase, value in seconds.items()} if spent else {},
        "peak_memory_bytes": _largest(rows, "peak_memory_bytes"),
        "kl_max": _largest(rows, "kl"),
        "mismatch_max": _largest(rows, "mismatch"),
        "ratio_max": _largest(rows, "ratio_max"),
        "weights": next((row["weights"] for row in reversed(trained) if row.get("weights")), None),
    }


def sampling(row: Row) -> tuple[float, float]:
    """Tokens, and the seconds that their sampling took: of the main worker, else of the others."""
    if own := (row.get("seconds") or {}).get("rollout"):
        return float(row.get("tokens") or 0), float(own)
    others = [phases.get(name, 0.0) for phases in row.get("workers", {}).values() for name in ROLLOUT]
    return (float(row.get("drawn_tokens") or 0), sum(others)) if any(others) else (0.0, 0.0)


def learning(row: Row) -> tuple[float, float]:
    """Tokens that the learner ran, and the seconds that it took."""
    rows, seconds = row.get("learner_rows"), (row.get("seconds") or {}).get("learner")
    return (float(rows), float(seconds)) if rows and seconds else (0.0, 0.0)


def _largest(rows: Iterable[Row], name: str) -> float | None:
    return max(series(rows, name)[1], default=None)


def alarms(rows: Sequence[Row]) -> list[str]:
    """What a careful reader would stop at in a single step, one line each, with the metric, its value, its threshold
    and the step. What only the course says is an advisory (advice.py).

    Rows may bring their own lines under "alarms".
    """
    trained = training(rows)
    lines = _brought(rows)
    if lost := [row["step"] for row in trained if row.get("reward", 0.0) is None]:
        later = f" (and in {len(lost) - 1} later steps)" if len(lost) > 1 else ""
        lines.append(f"step {lost[0]}: reward is not a number; every trajectory of the step failed{later}")
    worst = max(trained, key=_failed_share, default=None)
    if worst is not None and _failed_share(worst) > FAILED_SHARE_ALARM:
        lines.append(
            f"step {worst['step']}: failed trajectories {_failed_share(worst):.0%} > {FAILED_SHARE_ALARM:.0%}; "
            "their reasons are listed under Failures"
        )
    return lines


def _brought(rows: Iterable[Row]) -> list[str]:
    """The rows' own alarms: of each metric (the first word) the first, and in how many more steps it fired."""
    fired: dict[str, list[str]] = {}
    for row in rows:
        for alarm in row.get("alarms") or ():
            fired.setdefault(alarm.split(maxsplit=1)[0], []).append(f"step {row['step']}: {alarm}")
    return [same[0] + (f" (and in {len(same) - 1} later steps)" if len(same) > 1 else "") for same in fired.values()]


def _failed_share(row: Row) -> float:
    """Failed over all; 0 where the row does not say how many "trajectories" it had."""
    total = row.get("trajectories") or 0
    return (row.get("failed") or 0) / total if total else 0.0
