"""What a format costs a model in its work: accuracy on a task's held-out prompts, and reward after steps of RL."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError
from tandem.models.config import Dtype
from tandem.report.evaluation import compare, figures
from tandem.run.config import RunConfig
from tandem.run.evaluate import evaluate_tasks
from tandem.study.result import measured, paired, runs_of

PLAIN: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16"}
SETTINGS = ("model.weights", "engine.weights")  # of a study's arms, that say a format


@dataclass(frozen=True, slots=True)
class Task:
    """Held-out prompts, and how they are asked (`tandem eval`)."""

    name: str
    config: RunConfig  # its model is the one that is rounded
    settings: Mapping[str, str]  # that say what is asked and how

    def __post_init__(self) -> None:
        if self.config.model.weights != "same":
            raise ConfigError(f"--formats says what is rounded: leave model.weights={self.config.model.weights} out.")

    def rounded(self, form: str) -> RunConfig:
        """The same, asked of the model in a format; "": as it is, in model.dtype."""
        model = self.config.model
        if form in PLAIN:
            return replace(self.config, model=replace(model, dtype=PLAIN[form]))
        return replace(self.config, model=replace(model, weights=form or "same"))


@dataclass(frozen=True, slots=True)
class Asked:
    """Qualities beside KL and perplexity."""

    task: Task | None = None
    study: Path | None = None  # its result.json


def accuracies(task: Task, forms: Sequence[str], note: Callable[[str], None]) -> dict[str, Any]:
    """ "before", of the model as it is in model.dtype, and under "rows" of each format: accuracy on the same prompts
    with its 95 % interval, and how much more it is than before, with a paired one (report/evaluation.py: compare).

    ConfigError where nothing can be graded.
    """
    own = task.config.model
    answered = {"": _answers(task, "", note)}
    rows = {}
    for form in forms:
        name = "" if PLAIN.get(form) == own.dtype else form
        if name not in answered:
            answered[name] = _answers(task, name, note)
        one = figures(answered[name])
        first, second = (
            {"tasks": {task.name: {"settings": task.settings, "prompts": answered[of]}}} for of in ("", name)
        )
        more = compare(first, second)[task.name]["measures"]["accuracy"]
        rows[form] = {
            "accuracy": one["accuracy"], "low": one["low"], "high": one["high"], "failed": one["failed"],
            "more": more["difference"], "more_low": more["low"], "more_high": more["high"], "p": more["p"],
        }  # fmt: skip
    before = figures(answered[""])
    return {
        "name": task.name, "prompts": before["prompts"], "samples": before["samples"], "dtype": own.dtype,
        "before": before["accuracy"], "rows": rows,
    }  # fmt: skip


def _answers(task: Task, form: str, note: Callable[[str], None]) -> list[Any]:
    note(f"{task.name}, {form or task.config.model.dtype}")
    (one,) = evaluate_tasks({task.name: task.rounded(form)})
    return one.rows


def rewards(path: Path, forms: Sequence[str]) -> dict[str, Any]:
    """Reward of a study's last steps by format: of each of its arms whose model.weights or engine.weights is one, and
    of its baseline (under bf16); means over seeds with their 95 % Student interval, and paired with the baseline's.

    path: result.json, or the study's folder. ConfigError where it is none, or has no arm in one of the formats.
    """
    path = path / "result.json" if path.is_dir() else path
    result = _read(path)
    against = {
        one["arm"]: one
        for one in result["comparisons"]
        if one["against"] == result["baseline"] and one["measure"] == "reward"
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    for arm in result["arms"]:
        overrides = {**result["common"], **arm["overrides"]}
        named = next((overrides[name] for name in SETTINGS if overrides.get(name, "same") != "same"), None)
        form = named or ("bf16" if arm["name"] == result["baseline"] else None)
        known = [measured(result, run, "reward") for run in runs_of(result, arm["name"])]
        values = [value for value in known if value is not None]
        if form not in forms or form is None or not values:
            continue
        spread, compared = paired(values), against.get(arm["name"])
        rows.setdefault(form, []).append(
            {"arm": arm["name"], "label": arm["label"], "seeds": len(values), "reward": statistics.fmean(values)}
            | {"low": spread["low"], "high": spread["high"], "failed": len(known) - len(values)}
            | {
                f"more{end}": compared and compared[key]
                for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))
            }
        )
    if not rows:
        told = sorted({value for arm in result["arms"] for name, value in arm["overrides"].items() if name in SETTINGS})
        raise ConfigError(
            f"--study {path}: no arm that ended is of {', '.join(forms)}; its formats are {', '.join(told) or 'none'}. "
            "Give --formats of it, or leave --study out."
        )
    return {
        "study": result["study"], "steps": result["steps"], "last_steps": result["last_steps"], "rows": rows,
        "recipe": result["recipe"], "baseline": result["baseline"],
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--study {path} cannot be read: {error}. Give a study's result.json, or its folder."
        ) from error
    wanted = {"study", "arms", "runs", "comparisons", "common", "baseline", "last_steps", "steps", "recipe"}
    if not isinstance(result, dict) or wanted - result.keys():
        raise ConfigError(f"--study {path} is no result of a study. Give the result.json that `tandem study` wrote.")
    return result
