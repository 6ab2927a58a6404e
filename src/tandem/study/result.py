"""A study's runs -> result.json -> its table, paired intervals and README.md.

Everything after result.json reads result.json alone, so that page and figure can be drawn again without the runs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.report.metrics import evaluations, training
from tandem.report.units import BLANK, decimal, percent

if TYPE_CHECKING:
    from tandem.study.study import Study

Result = Mapping[str, Any]
Run = Mapping[str, Any]

DRIFT = (
    "k3",
    "mult_prob_error",
    "chi_square",
    "ess",
    "rare_share",
    "mismatch",
    "masked",
    "weight_clipped",
    "grad_norm",
    "entropy",
)
MAX_BYTES = 290_000  # of result.json; series beside the reward are averaged over more steps until it fits
MEASURES = {"reward": "reward, last steps", "accuracy": "held-out accuracy"}
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of paired differences with its two-sided 95 % Student interval.

    >>> Interval(0.1, -0.2, 0.4).verdict
    'no difference shown'
    """

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 0.0:
            return "higher"
        return "lower" if self.high < 0.0 else NO_DIFFERENCE


def t_probability(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with whole degrees of freedom; Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    if freedom == 1:
        total = 0.0
    for k in range(2 if odd else 1, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * k / (k + 1)
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def t_quantile(freedom: int) -> float:
    """t with P(|T| <= t) = 0.95.

    >>> [round(t_quantile(freedom), 3) for freedom in (1, 2, 9)]
    [12.706, 4.303, 2.262]
    """
    low, high = 0.0, 16.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < 0.95 else (low, middle)
    return (low + high) / 2


def paired(differences: Sequence[float]) -> Interval | None:
    """The interval of differences within a seed; None for fewer than two.

    >>> paired([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)
    """
    count = len(differences)
    if count < 2:
        return None
    mean = statistics.fmean(differences)
    half = t_quantile(count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)


def last_steps(steps: int) -> int:
    """How many steps at the end the reward is averaged over."""
    return max(5, steps // 10)


def _rounded(value: Any) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _accuracy(evaluation: Mapping[str, Any]) -> float | None:
    return _rounded(evaluation["accuracy"]) if evaluation.get("prompts") != 0 else None  # 0 where none was graded


def run_entry(arm: str, seed: int, outcome: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What result.json holds of one run."""
    trained = training(rows)
    evaluated = evaluations(rows)
    after = evaluated[-1] if len(evaluated) > 1 and outcome["status"] == "finished" else None
    series: dict[str, list[float | None]] = {name: [_rounded(row.get(name)) for row in trained] for name in DRIFT}
    budgets = [row.get("error_budget") or {} for row in trained]
    for name in dict.fromkeys(name for budget in budgets for name in budget):
        series[f"error_budget.{name}"] = [_rounded(budget.get(name)) for budget in budgets]
    series["seconds"] = [
        _rounded(sum(s for phase, s in row["seconds"].items() if phase not in ("evaluate", "checkpoint")))
        for row in trained
    ]
    return {
        "arm": arm,
        "seed": seed,
        **{name: outcome[name] for name in ("status", "reason", "steps")},
        "before": _accuracy(evaluated[0]) if evaluated else None,
        "after": _accuracy(after) if after else None,
        "heldout_prompts": evaluated[0]["prompts"] if evaluated else 0,
        "seconds_per_step": _median(series["seconds"]),
        "reward": [_rounded(row.get("reward")) for row in trained],
        "series": {name: values for name, values in series.items() if any(value is not None for value in values)},
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(statistics.median(known)) if known else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def make_result(facts: Mapping[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole of result.json, small enough to be committed."""
    result = {**facts, "last_steps": last_steps(facts["steps"]), "series_stride": 1, "runs": list(runs)}
    result["comparisons"] = comparisons(result)
    stride = 1
    while len(dumps(result)) > MAX_BYTES and stride < facts["steps"]:
        stride *= 2
        result["series_stride"] = stride
        result["runs"] = [
            {**run, "series": {name: _thinned(values, stride) for name, values in run["series"].items()}}
            for run in runs
        ]
    return result


def _thinned(values: Sequence[float | None], stride: int) -> list[float | None]:
    return [_rounded(_mean(values[i : i + stride])) for i in range(0, len(values), stride)]


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
    return run["after"] if measure == "accuracy" else _mean(run["reward"][-result["last_steps"] :])


def comparisons(result: Result) -> list[dict[str, Any]]:
    """Of each pair and measure the differences by seed, and their interval over the seeds that finished in both."""
    found = []
    for arm, against in result["compare"]:
        other = {run["seed"]: run for run in runs_of(result, against)}
        for measure in MEASURES:
            differences = {}
            for run in runs_of(result, arm):
                mine = measured(result, run, measure)
                theirs = measured(result, other[run["seed"]], measure) if run["seed"] in other else None
                if mine is not None and theirs is not None:
                    differences[str(run["seed"])] = _rounded(mine - theirs)
            if not differences and measure == "accuracy" and not any(run["heldout_prompts"] for run in result["runs"]):
                continue
            interval = paired([value for value in differences.values() if value is not None])
            found.append(
                {
                    "arm": arm,
                    "against": against,
                    "measure": measure,
                    "differences": differences,
                    "mean": _rounded(interval.mean) if interval else None,
                    "low": _rounded(interval.low) if interval else None,
                    "high": _rounded(interval.high) if interval else None,
                    "verdict": interval.verdict if interval else "too few seeds finished",
                }
            )
    return found


def step_seconds(result: Result, arm: Mapping[str, Any]) -> float | None:
    """Seconds a step of an arm: measured alone where that was done for every arm, else the median of its runs."""
    if all("quiet_seconds_per_step" in other for other in result["arms"]):
        return float(arm["quiet_seconds_per_step"])
    return _median(run["seconds_per_step"] for run in runs_of(result, arm["name"]))


def title(arm: Mapping[str, Any]) -> str:
    return f"{arm['panel']}, {arm['label']}" if arm["panel"] else str(arm["label"])


def _spread(values: Iterable[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return BLANK
    mean = decimal(statistics.fmean(known), digits)
    return f"{mean} ({decimal(min(known), digits)} to {decimal(max(known), digits)})" if len(known) > 1 else mean


def arm_rows(result: Result) -> list[dict[str, str]]:
    """The table of arms as text, column -> cell."""
    rows = []
    for arm in result["arms"]:
        runs = runs_of(result, arm["name"])
        finished = [run for run in runs if run["status"] == "finished"]
        failed = len(runs) - len(finished)
        rows.append(
            {
                "arm": title(arm),
                "seeds": f"{len(finished)} of {len(result['seeds'])}" + (f", {failed} failed" if failed else ""),
                f"reward, last {result['last_steps']} steps": _spread(measured(result, run, "reward") for run in runs),
                "held-out before": percent(_mean(run["before"] for run in runs), 1),
                "held-out after": percent(_mean(run["after"] for run in runs), 1),
                "s a step": decimal(step_seconds(result, arm), 2),
                **{
                    name: decimal(_mean(value for run in runs for value in run["series"].get(name, ())))
                    for name in ("k3", "ess", "masked")
                },
            }
        )
    return rows


def comparison_rows(result: Result) -> list[dict[str, str]]:
    """The table of paired comparisons as text."""
    titles = {arm["name"]: title(arm) for arm in result["arms"]}
    rows = []
    for found in result["comparisons"]:
        interval = BLANK
        if found["mean"] is not None:
            interval = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        differences = ", ".join(f"{value:+.3f}" for value in found["differences"].values())
        rows.append(
            {
                "arm": titles[found["arm"]],
                "minus": titles[found["against"]],
                "measure": MEASURES[found["measure"]],
                "difference of each seed": differences or BLANK,
                "mean, 95 % interval": interval,
                "reading": found["verdict"],
            }
        )
    return rows


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return "Nothing to show yet.\n"
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _settings(overrides: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in overrides.items()) or "nothing"


def chance_note(result: Result) -> str:
    """How many intervals would leave 0 out if no arm differed."""
    decided = [found for found in result["comparisons"] if found["mean"] is not None]
    if not decided:
        return "No pair has two seeds that finished, so there is no interval yet."
    outside = sum(found["verdict"] != NO_DIFFERENCE for found in decided)
    return (
        f"{outside} of {len(decided)} intervals leave 0 out; if nothing differed at all, about "
        f"{0.05 * len(decided):.1f} would. No interval is corrected for their number."
    )


def failures(result: Result) -> list[str]:
    return [
        f"`{run['arm']}`, seed {run['seed']}: failed after {run['steps']} steps. {run['reason']}"
        for run in result["runs"]
        if run["status"] == "failed"
    ]


def time_note(result: Result) -> str:
    """Where the time axis comes from."""
    if all("quiet_seconds_per_step" in arm for arm in result["arms"]):
        return "Time is the step's number times the arm's seconds a step, measured with nothing else running."
    return (
        "Time is the step's number times the median seconds a step of the arm's runs. The runs may have shared the "
        "machine with others, so times compare only roughly."
    )


def readme(result: Result, reading: str) -> str:
    """The study's page."""
    arms = [{"arm": f"`{arm['name']}`", "sets": _settings(arm["overrides"])} for arm in result["arms"]]
    seeds = ", ".join(map(str, result["seeds"]))
    wanted = len(result["arms"]) * len(result["seeds"])
    missing = wanted - len(result["runs"])
    failed = failures(result)
    prompts = max((run["heldout_prompts"] for run in result["runs"]), default=0)
    threads = "/".join(map(str, result["threads"])) or "?"
    missing_note = f" **{missing} of {wanted} runs are missing.**" if missing else ""
    written = "*Written by `tandem study` from [result.json](result.json); the reading is in [study.py](study.py).*"
    means = (
        f"Reward is the mean over the last {result['last_steps']} of {result['steps']} steps, then over seeds "
        f"(least to most); held-out accuracy is greedy, on {prompts} prompts. k3, ess and masked are means over all "
        "steps."
    )
    intervals = f"Within a seed, then a two-sided 95 % Student interval over seeds. {chance_note(result)}"
    ran = (
        f"Recipe `{result['recipe']}` with {_settings(result['common'])}; {result['steps']} steps; seeds {seeds}. "
        f"Every arm has the same steps, prompts and samples.{missing_note}"
    )
    where = f"{result['date'] or 'No run yet'}, {result['machine']}, {threads} threads a run. {time_note(result)}"
    parts = [
        f"# {result['study']}",
        written,
        f"**Question.** {result['question']}",
        "![Reward of each arm by step and by time, and the paired differences](figure.png)",
        "## Reading",
        reading.strip() or "None yet: the numbers below stand for themselves.",
        "## What it does not show",
        result["shows_not"].strip(),
        "## Arms",
        means,
        _markdown(arm_rows(result)),
        "## Paired differences",
        intervals,
        _markdown(comparison_rows(result)),
        *(["## Failed runs", "\n".join(f"- {line}" for line in failed)] if failed else []),
        "## What was run",
        ran,
        _markdown(arms),
        where,
        f"    {result['command']}",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def write(result: Result, folder: Path, reading: str) -> None:
    """result.json, figure.png and README.md into `folder`."""
    from tandem.study.figure import study_png

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(dumps(result), encoding="utf-8")
    (folder / "figure.png").write_bytes(study_png(result))
    (folder / "README.md").write_text(readme(result, reading), encoding="utf-8")


def redrawn(result: Result, study: Study) -> dict[str, Any]:
    """`result` under the study's present words and pairs; the runs stay as they were."""
    arms = {arm.name: arm for arm in study.arms}
    known = {arm["name"] for arm in result["arms"]}
    new = {
        **result,
        "question": study.question,
        "shows_not": study.shows_not,
        "compare": [list(pair) for pair in study.pairs if known.issuperset(pair)],
        "arms": [
            {**arm, "label": arms[arm["name"]].label, "panel": arms[arm["name"]].panel} if arm["name"] in arms else arm
            for arm in result["arms"]
        ],
    }
    return {**new, "comparisons": comparisons(new)}
