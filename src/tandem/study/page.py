"""A study's page, README.md, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem.report.units import BLANK, decimal, percent
from tandem.study.result import (
    MEASURES,
    NO_DIFFERENCE,
    Result,
    failures,
    mean_of,
    measured,
    rewarded,
    runs_of,
    same_steps,
    step_seconds,
    timed_alone,
)


def _spread(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    ends = f" ({decimal(min(known))} to {decimal(max(known))})" if len(known) > 1 else ""
    return decimal(mean_of(known)) + ends


DRIFT = {"k3": "k3", "ess": "ess", "rare_share": "rare", "masked": "masked"}  # series, and their columns


def _titles(result: Result) -> dict[str, str]:
    return {arm["name"]: ", ".join(filter(None, (arm["panel"], arm["label"]))) for arm in result["arms"]}


def arms_table(result: Result) -> str:
    rows = []
    for arm in result["arms"]:
        runs = runs_of(result, arm["name"])
        failed = sum(run["status"] == "failed" for run in runs)
        rows.append(
            {
                "arm": _titles(result)[arm["name"]],
                "seeds": f"{len(runs) - failed} of {len(result['seeds'])}" + (f", {failed} failed" if failed else ""),
                **_reward(result, runs),
                "held-out before": percent(mean_of(run["before"] for run in runs), 1),
                "held-out after": percent(mean_of(run["after"] for run in runs), 1),
                "s a step": decimal(step_seconds(result, arm), 2),
                **_spent(result, arm, runs),
                **{
                    said: decimal(mean_of(value for run in runs for value in run["series"].get(name, ())))
                    for name, said in (DRIFT.items() if rewarded(result) else ())
                },
            }
        )
    return _markdown(rows)


def _reward(result: Result, runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not rewarded(result):
        return {}
    return {f"reward, last {result['last_steps']} steps": _spread(measured(result, run, "reward") for run in runs)}


def _spent(result: Result, arm: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a run took, where arms have other steps, and what share of its tokens reached a gradient, where known."""
    shares = [run.get("trained_share") for run in runs]
    known = any(run.get("trained_share") is not None for run in result["runs"])
    steps = {} if same_steps(result) else {"steps": str(arm["steps"]), "seconds": _seconds(runs)}
    tokens = [run["trained_tokens"] for run in runs if "trained_tokens" in run]
    trained = {"trained tokens": f"{mean_of(tokens):,.0f}"} if tokens else {}
    return steps | trained | ({"tokens with a gradient": percent(mean_of(shares))} if known else {})


def _seconds(runs: Sequence[Mapping[str, Any]]) -> str:
    """Mean of the runs' seconds of work; a series may hold means of several steps."""
    found = [run["steps"] * mean for run in runs if (mean := mean_of(run["series"].get("seconds", ()))) is not None]
    return decimal(mean_of(found), 0)


def differences_table(result: Result) -> str:
    titles = _titles(result)
    return _markdown(
        [
            {
                "arm": titles[found["arm"]],
                "minus": titles[found["against"]],
                "measure": MEASURES[found["measure"]],
                "difference of each seed": ", ".join(f"{dot:+.3f}" for dot in found["differences"].values()) or BLANK,
                "mean, 95 % interval": BLANK
                if found["mean"] is None
                else f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]",
                "reading": found["verdict"],
            }
            for found in result["comparisons"]
        ]
    )


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return "Nothing to show yet."
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _settings(overrides: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in overrides.items()) or "nothing"


def _equal(result: Result) -> str:
    if same_steps(result):
        return "Every arm has the same steps, prompts and samples."
    return "Arms have other steps, so that their runs take as many seconds: see the table."


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


def _drawn(result: Result) -> str:
    """How held-out prompts are answered."""
    temperature = result["common"].get("evaluation.temperature", "0")
    if float(temperature) == 0:
        return "greedy"
    samples = result["common"].get("evaluation.samples", "1")
    return f"of {samples} answers to each at temperature {temperature}"


def readme(result: Result, reading: str, section: str = "") -> str:
    """The study's page; section: a part that is its own."""
    arms = [{"arm": f"`{arm['name']}`", "sets": _settings(arm["overrides"])} for arm in result["arms"]]
    wanted = len(result["arms"]) * len(result["seeds"])
    missing = wanted - len(result["runs"])
    lacking = f" **{missing} of {wanted} runs are missing.**" if missing else ""
    failed = "\n".join(f"- {line}" for line in failures(result))
    prompts = max((run["heldout_prompts"] for run in result["runs"]), default=0)
    measure = "Reward" if rewarded(result) else "Held-out accuracy"
    seconds = "Time is the step's number times the "
    seconds += (
        "arm's seconds a step, measured with nothing else running."
        if timed_alone(result)
        else "median seconds a step of the arm's runs. The runs may have shared the machine with others, so times "
        "compare only roughly."
    )
    parts = [
        f"# {result['study']}",
        "*Written by `tandem study` from [result.json](result.json); the reading is in [study.py](study.py).*",
        f"**Question.** {result['question']}",
        f"![{measure} of each arm by step and by time, and the paired differences](figure.png)",
        "## Reading",
        reading.strip() or "None yet: the numbers below stand for themselves.",
        "## What it does not show",
        result["shows_not"].strip(),
        "## Arms",
        (
            f"Reward is the mean over the last {result['last_steps']} of {result['steps']} steps, then over seeds "
            f"(least to most); held-out accuracy is {_drawn(result)}, on {prompts} prompts. k3, ess, the share of "
            "the gradient that tokens with p < 0.001 have, and masked are means over all steps."
            if rewarded(result)
            else f"Held-out accuracy is {_drawn(result)}, on {prompts} prompts: some arms sample nothing to learn from."
        ),
        arms_table(result),
        "## Paired differences",
        f"Within a seed, then a two-sided 95 % Student interval over seeds. {chance_note(result)}",
        differences_table(result),
        *([section] if section else []),
        *(["## Failed runs", failed] if failed else []),
        "## What was run",
        (
            f"Recipe `{result['recipe']}` with {_settings(result['common'])}; {result['steps']} steps; seeds "
            f"{', '.join(map(str, result['seeds']))}. {_equal(result)}{lacking}"
        ),
        _markdown(arms),
        (
            f"{result['date'] or 'No run yet'}, {result['machine']}, {'/'.join(map(str, result['threads'])) or '?'} "
            f"threads a run. {seconds}"
        ),
        f"    {result['command']}",
    ]
    return "\n\n".join(parts) + "\n"
