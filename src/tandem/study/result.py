"""A study's runs -> result.json, with the paired intervals. Page and figure are drawn from it alone."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tandem import env
from tandem.errors import RunFolderError
from tandem.kernels.build.toolchain import processor_name
from tandem.plan import roofline
from tandem.report.ledger import goodput
from tandem.report.metrics import evaluations, training
from tandem.run.ledger import MAIN
from tandem.study.runs import rows_of, step_s, timed_s, working_s
from tandem.study.study import Planned, Study

Result = Mapping[str, Any]
Run = Mapping[str, Any]

DRIFT = "k3 mult_prob_error chi_square ess rare_share mismatch masked weight_clipped grad_norm entropy".split()
MAX_BYTES = 290_000  # of result.json; series beside the reward are averaged over more steps until it fits
MEASURES = {"reward": "reward, last steps", "accuracy": "held-out accuracy"}
NO_DIFFERENCE = "no difference shown"


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean of differences within a seed, its two-sided 95 % Student interval, and how that reads.

    >>> paired([1.0, 1.0, 1.0])
    {'mean': 1.0, 'low': 1.0, 'high': 1.0, 'verdict': 'higher'}
    """
    if len(differences) < 2:
        return {"mean": None, "low": None, "high": None, "verdict": "too few seeds finished"}
    from scipy import stats

    mean = statistics.fmean(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    verdict = "higher" if mean - half > 0.0 else "lower" if mean + half < 0.0 else NO_DIFFERENCE
    return {"mean": _rounded(mean), "low": _rounded(mean - half), "high": _rounded(mean + half), "verdict": verdict}


def last_steps(steps: int) -> int:
    """How many steps at the end the reward is averaged over."""
    return max(5, steps // 10)


def _rounded(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None


def mean_of(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _accuracy(evaluation: Mapping[str, Any]) -> float | None:
    return _rounded(evaluation["accuracy"]) if evaluation.get("prompts") != 0 else None  # 0 where none was graded


def run_entry(
    arm: str,
    seed: int,
    outcome: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    machine: roofline.Machine | None = None,
    *,
    written: bool | None = None,
) -> dict[str, Any]:
    """What result.json holds of one run; where a machine is given also its workers' seconds by phase, means of the
    steps behind the first, and what was useful of each step at the machine's roofline. written: whether a run of the
    study learns from what is written, and so has no reward; None: whether this one does."""
    trained, evaluated = training(rows), evaluations(rows)
    finished = len(evaluated) > 1 and outcome["status"] == "finished"
    budgets = [row.get("error_budget") or {} for row in trained]
    series = {name: [row.get(name) for row in trained] for name in DRIFT}
    for name in dict.fromkeys(name for budget in budgets for name in budget):
        series[f"error_budget.{name}"] = [budget.get(name) for budget in budgets]
    series["seconds"] = [working_s(row) for row in trained]
    drawn = sum(row.get("tokens", 0) + row.get("extra_tokens", 0) for row in trained)
    rewards = [row.get("reward") if row.get("task_reward") is None else row["task_reward"] for row in trained]
    # Where one learns from what is written the course of all is that of the held-out accuracy.
    course: dict[str, Any] = {"reward": list(map(_rounded, rewards))}
    if is_written(rows) if written is None else written:
        tokens = sum(row.get("trained_tokens", 0) for row in trained)
        course = {
            "reward": [],
            "held_out": [[one["step"], _accuracy(one)] for one in evaluated],
            "trained_tokens": tokens,
        }
    if machine is not None:
        series["useful_s"] = [goodput([row], machine, 1.0).share for row in trained]
    rounded = {name: list(map(_rounded, values)) for name, values in series.items()}
    return {
        "arm": arm,
        "seed": seed,
        **{name: outcome[name] for name in ("status", "reason", "steps")},
        "before": _accuracy(evaluated[0]) if evaluated else None,
        "after": _accuracy(evaluated[-1]) if finished else None,
        "heldout_prompts": evaluated[0]["prompts"] if evaluated else 0,
        "seconds_per_step": _rounded(step_s(trained)),
        "trained_share": _rounded(sum(row.get("trained_tokens", 0) for row in trained) / drawn) if drawn else None,
        **course,
        **({} if machine is None else {"phases": _phases(trained[1:])}),
        "series": {name: values for name, values in rounded.items() if any(value is not None for value in values)},
    }


def is_written(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a run learns from what is written: no row has a reward."""
    trained = training(rows)
    return bool(trained) and not any("reward" in row for row in trained)


def _phases(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Worker -> phase -> mean seconds a step."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        for worker, spent in {MAIN: row["seconds"], **row.get("workers", {})}.items():
            found.setdefault(worker, Counter()).update(spent)
    return {
        worker: {phase: _rounded(whole / len(rows)) for phase, whole in spent.most_common()}
        for worker, spent in found.items()
    }


def collect(study: Study, recipe: str, planned: Sequence[Planned], out: Path, command: str) -> dict[str, Any]:
    """The result of the runs that have ended."""
    if not planned:
        raise RunFolderError(f"study {study.name}: no run was asked for.")
    ended = [(one, outcome) for one in planned if (outcome := one.outcome()) is not None]
    arms = []
    for arm in dict.fromkeys(one.arm.name for one in planned):
        alone_s = timed_s(out, arm)
        timed = {} if alone_s is None else {"quiet_seconds_per_step": float(f"{alone_s:.4g}")}
        overrides = next(one.arm.overrides for one in planned if one.arm.name == arm)
        steps = next(one.config.steps for one in planned if one.arm.name == arm)
        arms.append({"name": arm, "label": arm, "panel": "", "overrides": dict(overrides), "steps": steps, **timed})
    facts = {
        "study": study.name,
        "question": study.question,
        "recipe": recipe,
        "common": dict(study.common),
        "steps": max(one.config.steps for one in planned),
        "seeds": list(dict.fromkeys(one.seed for one in planned)),
        "baseline": study.baseline,
        "command": command,
        "date": max((outcome["date"] for _, outcome in ended), default=None),
        "threads": sorted({outcome["threads"] for _, outcome in ended}),
        "machine": f"{env.num_cores()} cores of {processor_name()}, torch {version('torch')}, "
        f"Python {platform.python_version()}",
        "arms": arms,
    }
    machine = roofline.measure() if study.section is not None and ended else None
    rows = [rows_of(one.folder) for one, _ in ended]
    written = any(map(is_written, rows))
    entries = [
        run_entry(one.arm.name, one.seed, what, own, machine, written=written)
        for (one, what), own in zip(ended, rows, strict=True)
    ]
    return complete(facts, study, entries)


def complete(facts: Result, study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """The whole of result.json under the study's present words and pairs, small enough to be committed."""
    names = {arm["name"] for arm in facts["arms"]}
    words = {arm.name: {"label": arm.label, "panel": arm.panel} for arm in study.arms}
    result = {
        **facts,
        "question": study.question,
        "shows_not": study.shows_not,
        "compare": [list(pair) for pair in study.pairs if names.issuperset(pair)],
        "arms": [{**arm, **words.get(arm["name"], {})} for arm in facts["arms"]],
        "last_steps": last_steps(facts["steps"]),
        "series_stride": facts.get("series_stride", 1),
        "runs": list(runs),
    }
    result["comparisons"] = comparisons(result)
    while len(dumps(result)) > MAX_BYTES and result["series_stride"] < facts["steps"]:
        result["series_stride"] *= 2
        result["runs"] = [
            {**run, "series": {name: _halved(values) for name, values in run["series"].items()}}
            for run in result["runs"]
        ]
    return result


def _halved(values: Sequence[float | None]) -> list[float | None]:
    return [_rounded(mean_of(values[i : i + 2])) for i in range(0, len(values), 2)]


def dumps(result: Result) -> str:
    """JSON with a line for each arm, run and comparison, so that a changed run is a changed line."""
    parts = []
    for name, value in result.items():
        if name in ("arms", "runs", "comparisons"):
            lines = ",\n".join("  " + json.dumps(entry, separators=(",", ":"), allow_nan=False) for entry in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]" if value else f" {json.dumps(name)}: []")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def runs_of(result: Result, arm: str) -> list[Run]:
    return [run for run in result["runs"] if run["arm"] == arm]


def measured(result: Result, run: Run, measure: str) -> float | None:
    """What is compared of a run; None for one that failed, which has no last steps."""
    if run["status"] != "finished":
        return None
    return run["after"] if measure == "accuracy" else mean_of(run["reward"][-result["last_steps"] :])


def rewarded(result: Result) -> bool:
    """Whether arms are compared by their reward; else one learns from what is written, and by held-out accuracy."""
    return not any("held_out" in run for run in result["runs"])


def comparisons(result: Result) -> list[dict[str, Any]]:
    """Of each pair and measure the differences by seed, and their interval over the seeds that finished in both."""
    held_out = any(run["heldout_prompts"] for run in result["runs"])
    found = []
    for arm, against in result["compare"]:
        others = {run["seed"]: run for run in runs_of(result, against)}
        both = [(run, others[run["seed"]]) for run in runs_of(result, arm) if run["seed"] in others]
        measures = [name for name in MEASURES if (rewarded(result) if name == "reward" else held_out)]
        for measure in measures:
            differences = {}
            for run, other in both:
                mine, theirs = (measured(result, one, measure) for one in (run, other))
                if mine is not None and theirs is not None:
                    differences[str(run["seed"])] = float(f"{mine - theirs:.6g}")
            sides = {"arm": arm, "against": against, "measure": measure, "differences": differences}
            found.append({**sides, **paired(list(differences.values()))})
    return found


def timed_alone(result: Result) -> bool:
    """Whether every arm's seconds a step were measured with nothing else running."""
    return all("quiet_seconds_per_step" in arm for arm in result["arms"])


def step_seconds(result: Result, arm: Mapping[str, Any]) -> float | None:
    """Seconds a step of an arm: measured alone where that was done for every arm, else the median of its runs."""
    if timed_alone(result):
        return float(arm["quiet_seconds_per_step"])
    known = [run["seconds_per_step"] for run in runs_of(result, arm["name"]) if run["seconds_per_step"] is not None]
    return statistics.median(known) if known else None


def same_steps(result: Result) -> bool:
    """Whether every arm has as many steps; else they are to take as many seconds."""
    return len({arm.get("steps") for arm in result["arms"]}) < 2


def failures(result: Result) -> list[str]:
    return [
        f"`{run['arm']}`, seed {run['seed']}: failed after {run['steps']} steps. {run['reason']}"
        for run in result["runs"]
        if run["status"] == "failed"
    ]
