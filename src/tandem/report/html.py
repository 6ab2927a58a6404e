"""A run folder -> report.html: one file, no script, no network, light and dark."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from tandem.errors import RunFolderError
from tandem.report import drift, metrics, plots, units
from tandem.report.advice import follow
from tandem.report.evidence import Evidence
from tandem.report.history import MEASURES, History
from tandem.report.kept import read_object, read_trajectories, trajectory_files, write_file
from tandem.report.ledger import Section, section
from tandem.report.lengths import lengths_section
from tandem.report.live import held_out
from tandem.report.metrics import Row

READER = "trajectories.html"  # the page of report/trajectories.py
_LAST_STEPS = 12
_SHOWN_TRAJECTORIES = 3  # of the best, and of the worst
_CURVE_POINTS = 240  # of an advisory's drawing
_TEXT_LIMIT = 2_000  # characters of a prompt or an answer shown
_ALTERNATIVES = {
    "reward": "Mean reward of each step and held-out accuracy",
    "loss": "Loss by step",
    "lengths": "Mean and longest response by step",
    "entropy": "Entropy of the policy by step",
    "time": "Seconds of each step by phase",
    "update": "Gradient norm, learning rate and clipped share by step",
    "critic": "A critic's loss, explained variance, and the means of values and returns, by step",
    "preference": "Right pairs, reward margin and log-probs of chosen and rejected answers, by step",
    "teacher": "A student's divergence from its teacher, -log p of both, and distance of hidden states, by step",
    "agents": "Turns, tool calls and what else happened in programs, by step",
    "ahead": "Lag of the learned groups, and groups that run, wait or were dropped, by step",
    "limits": "KL, truncated share and peak memory by step",
    "budget": "Error budget by step: staleness, mismatch and sampling",
}


def write_report(
    folder: Path | str,
    config_diff: Sequence[str] = (),
    scaling: Mapping[str, Any] | None = None,
    ledger: Section | None = None,
) -> Path:
    """Write the PNGs and report.html of the run in `folder`; returns the path of report.html.

    `config_diff`: lines of tandem.config.diff(recipe, config), shown as what this run changed. `scaling`: the section
    of scaling_page. `ledger`: that of report/ledger.py, where it was read already. Raises RunFolderError where the
    folder holds no metrics. Needs no lock: a running run can be reported on.
    """
    folder = Path(folder)
    if folder.is_file():
        raise RunFolderError(f"{folder} is a file. Give the run's folder, which `tandem train` made.")
    rows = metrics.read_metrics(folder)
    pictures, of_ledger = [], []
    if metrics.training(rows):
        pictures = [inlined(_ALTERNATIVES[name], *drawn) for name, drawn in plots.save_plots(rows, folder).items()]
    if ledger is None and (folder / "ledger.json").is_file():
        ledger = section(folder)
    for name, (title, draw) in ledger.pictures.items() if ledger else ():
        light, dark = plots.both(draw)
        write_file(folder / f"{name}.png", light)
        of_ledger.append(inlined(title, light, dark))
    page = render_report(folder, rows, pictures, config_diff, scaling, ledger, of_ledger)
    return write_file(folder / "report.html", page)


def render_report(
    folder: Path,
    rows: Sequence[Row],
    pictures: Sequence[Mapping[str, str]] = (),
    config_diff: Sequence[str] = (),
    scaling: Mapping[str, Any] | None = None,
    ledger: Section | None = None,
    of_ledger: Sequence[Mapping[str, str]] = (),
) -> str:
    """The page as text with `pictures`, and the ledger's, as `inlined` gives them. The template escapes all that the
    model wrote."""
    template = page_template("report.html.jinja")
    config, plan = read_object(folder / "config.json"), read_object(folder / "plan.json")
    sampled_step, best, worst = _sampled(folder)
    advisor = follow(rows)
    return template.render(
        name=config.get("name") or folder.resolve().name,
        beside="; the pictures lie beside it as PNG",
        folder=folder.resolve().name,
        finished=_finished(folder),
        planned=config.get("steps"),
        summary=metrics.summary(rows),
        tiles=tiles(metrics.summary(rows), plan.get("memory", {}).get("peak_bytes")),
        declared=plan.get("numerics"),
        agreement=agreement(rows),
        drift=drift.drift_table(rows, config.get("alarms") or {}),
        by_length=drift.by_length(rows),
        lengths=lengths_section(rows),
        alarms=metrics.alarms(rows),
        scaling=scaling,
        advisories=[(one, curve(advisor.history, one.evidence)) for one in advisor.advisories],
        figures=pictures,
        steps=last_steps(rows),
        sampled=metrics.measure(rows) == "reward",
        failures=failures(folder),
        sampled_step=sampled_step,
        reader=READER if (folder / READER).exists() else None,
        best=best,
        worst=worst,
        ledger=ledger,
        ledger_figures=of_ledger,
        config=flattened(config),
        config_diff=list(config_diff),
    )


def page_template(name: str) -> Template:
    """A template of this folder; whatever is put into it is escaped."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda file: resources.files("tandem.report").joinpath(file).read_text()),
    )
    environment.filters.update(
        duration=units.duration, gigabytes=units.gigabytes, percent=units.percent, count=units.count,
        decimal=units.decimal, held_out=held_out,
    )  # fmt: skip
    return environment.get_template(name)


def tiles(summary: Mapping[str, Any], planned_bytes: int | None) -> list[tuple[str, str, str]]:
    """(label, figure, what it means) of each headline."""
    before, after = summary["evaluation_before"], summary["evaluation_after"]
    foreseen = f"; planned: {units.gigabytes(planned_bytes)}" if planned_bytes else ""
    rate = units.count(summary["tokens_per_s"])
    measured, sampled = summary["measure"], summary["measure"] == "reward"
    first, last = (units.decimal(summary[f"{measured}_{end}"]) for end in ("first", "last"))
    none = sampled and summary["reward_last"] is None and summary["steps"] > 0
    means = "none could be graded" if none else f"mean of the last 5 steps; first 5: {first}"
    shown = [(measured.capitalize(), last, means if sampled else f"{summary['loss_unit']}, {means}")]
    if summary["preference_accuracy_last"] is not None:
        before_it = units.percent(summary["preference_accuracy_first"])
        right = units.percent(summary["preference_accuracy_last"], 1)
        shown.append(("Right pairs", right, f"chosen above rejected, of the last 5 steps; first 5: {before_it}"))
        margins = (units.decimal(summary[f"reward_margin_{end}"]) for end in ("last", "first"))
        shown.append(("Margin", next(margins), f"of rewards, mean of the last 5 steps; first 5: {next(margins)}"))
    if before:
        latest = after or before
        accuracy, said = (None, [held_out(latest)]) if latest.get("prompts") == 0 else (latest["accuracy"], [])
        if accuracy is not None and latest.get("low") is not None:
            said.append(f"95 %: {100 * latest['low']:.1f} to {100 * latest['high']:.1f}")
        if accuracy is not None and latest.get("reward") is not None:
            said.append(f"mean reward {units.decimal(latest['reward'])}")
        said.append(f"before: {held_out(before)}" if after else "not evaluated again")
        shown.append(("Held-out accuracy", units.percent(accuracy, 1), "; ".join(said)))
    if losses := summary["heldout_loss"]:
        begun = f"before: {units.decimal(losses[0])}" if len(losses) > 1 else "not measured again"
        shown.append(("Held-out loss", units.decimal(losses[-1]), begun))
    shown.append(("Steps", units.count(summary["steps"]), f"in {units.duration(summary['wall_s'])}"))
    if sampled:
        shown.append(("Sampled tokens", units.count(summary["tokens"]), f"{rate} a second of rollout"))
    shown.append(("Peak memory", units.gigabytes(summary["peak_memory_bytes"]), f"of the run's process{foreseen}"))
    trained = f"{summary['trained_samples']:,} samples trained"
    if sampled:
        shown.append(("Failed trajectories", units.count(summary["failed"]), trained))
    else:
        fast = f"; {rate} tokens a second of learning, prompts too" if summary["tokens_per_s"] else ""
        shown.append(("Trained tokens", units.count(summary["trained_tokens"]), f"{trained}{fast}"))
    return shown


def curve(history: History, evidence: Evidence) -> dict[str, Any] | None:
    """A measure over the run, for a drawing of 100 x 100: its points, and where the evidence begins and ends.

    None where the evidence is of no series.
    """
    steps, values = history.series(evidence.measure)
    low, high = min(values, default=0.0), max(values, default=0.0)
    if len(values) < 2:
        return None
    thin = range(0, len(values), math.ceil(len(values) / _CURVE_POINTS))

    def across(step: int) -> float:
        return 100 * (step - steps[0]) / (steps[-1] - steps[0])

    up = [95 - 90 * (values[at] - low) / (high - low) if high > low else 50.0 for at in thin]
    points = " ".join(f"{across(steps[at]):.1f},{y:.1f}" for at, y in zip(thin, up, strict=True))
    written = {name: MEASURES[evidence.measure].write(value) for name, value in (("low", low), ("high", high))}
    left = max(0.0, across(evidence.first))
    spoken = {"label": MEASURES[evidence.measure].label, "steps": f"{steps[0]} to {steps[-1]}"}
    return {"points": points, "left": left, "width": across(evidence.last) - left, **written, **spoken}


_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (  # heading, key, how its value is written
    ("step", "step", str),
    ("reward", "reward", units.decimal),
    ("± spread", "reward_std", units.decimal),
    ("loss", "loss", units.decimal),
    ("length", "length", partial(units.decimal, digits=1)),
    ("longest", "length_max", units.count),
    ("turns", "turns", partial(units.decimal, digits=1)),
    ("entropy", "entropy", units.decimal),
    ("KL", "kl", units.decimal),
    ("gradient", "grad_norm", partial(units.decimal, digits=2)),
    ("critic", "explained_variance", units.percent),
    ("right pairs", "preference_accuracy", units.percent),
    ("margin", "reward_margin", partial(units.decimal, digits=2)),
    ("divergence", "divergence", units.decimal),
    ("equal groups", "zero_variance", units.percent),
    ("trained", "trained_samples", units.count),
    ("failed", "failed", units.count),
    ("tokens/s", "tokens_per_s", units.count),
    ("cached tokens", "cached_tokens", units.count),
    ("recomputed tokens", "recomputed_tokens", units.count),
    ("preemptions", "preemptions", units.count),
    ("evicted pages", "evicted_pages", units.count),
)


def last_steps(rows: Sequence[Row]) -> list[list[str]]:
    """The last steps, newest first, under a line of headings; a column that no run of this kind fills is left out."""
    last = metrics.training(rows)[-_LAST_STEPS:][::-1]
    others = ["loss"] if metrics.measure(rows) == "reward" else ["failed"]
    if not any(row.get("tokens_per_s") for row in last):
        others.append("tokens_per_s")
    columns = [column for column in _COLUMNS if column[1] not in others and any(column[1] in row for row in last)]
    lines = [[write(row.get(key)) for _, key, write in columns] + [units.duration(metrics.step_s(row))] for row in last]
    return [[heading for heading, _, _ in columns] + ["time"], *lines] if last else []


def agreement(rows: Sequence[Row]) -> str | None:
    """Whether the policy that sampled is the one that was trained, in a sentence; None where it was not measured."""
    steps, apart = metrics.series(rows, "mismatch")
    if not steps:
        return None
    if max(apart) == 0.0:
        return f"Engine and learner log-probs were equal to the last bit for every trained token of {len(steps)} steps."
    worst = max(range(len(steps)), key=apart.__getitem__)
    differing = sum(value > 0 for value in apart)
    return (
        f"Engine and learner log-probs differ by at most {apart[worst]:.3g} nats (step {steps[worst]}), "
        f"in {differing} of {len(steps)} steps."
    )


def failures(folder: Path) -> list[tuple[str, str, int]]:
    """(where, reason, how many) over all steps, most frequent first."""
    counted: Counter[tuple[str, str]] = Counter()
    for path in trajectory_files(folder).values():
        for row in read_trajectories(path):
            if failure := row.get("failure"):
                counted[failure["where"], failure["reason"]] += 1
    return [(where, reason, number) for (where, reason), number in counted.most_common()]


def flattened(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """
    >>> flattened({"seed": 1, "learner": {"lr": 2e-05}})
    [('seed', '1'), ('learner.lr', '2e-05')]
    """
    lines = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            lines += flattened(value, f"{prefix}{name}.")
        else:
            lines.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return lines


def _sampled(folder: Path) -> tuple[int | None, list[dict[str, Any]], list[dict[str, Any]]]:
    """(step, best, worst) trajectories of the last step that kept any; none is in both lists."""
    paths = trajectory_files(folder)
    if not paths:
        return None, [], []
    step = max(paths)
    scored = [row for row in read_trajectories(paths[step]) if row.get("reward") is not None]
    if any("side" in row for row in scored):
        return step, *_sides(scored)
    scored.sort(key=lambda row: (-row["reward"], row["program_id"]))
    best = _spread(scored, _SHOWN_TRAJECTORIES)
    chosen = {row["program_id"] for row in best}
    worst = _spread([row for row in reversed(scored) if row["program_id"] not in chosen], _SHOWN_TRAJECTORIES)
    return step, [_shown(row) for row in best], [_shown(row) for row in worst]


def _sides(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Chosen answers, and rejected ones, beside each other where they are of one prompt."""
    chosen = _spread([row for row in rows if row.get("side") == "chosen"], _SHOWN_TRAJECTORIES)
    asked = {row["prompt_id"]: place for place, row in enumerate(chosen)}
    rejected = [row for row in rows if row.get("side") == "rejected"]
    rejected.sort(key=lambda row: asked.get(row["prompt_id"], len(asked)))
    others = _spread(rejected, _SHOWN_TRAJECTORIES)
    return [_shown(row) for row in chosen], [_shown(row) for row in others]


def _spread(rows: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The first rows in order, of prompts not shown yet where the reward is the same."""
    chosen: list[dict[str, Any]] = []
    rest = list(rows)
    while rest and len(chosen) < number:
        seen = {row["prompt_id"] for row in chosen}
        fresh = (row for row in rest if row["reward"] == rest[0]["reward"] and row["prompt_id"] not in seen)
        chosen.append(next(fresh, rest[0]))
        rest.remove(chosen[-1])
    return chosen


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = row.get("prompt") or []
    prompt = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return {"side": None, **row, "prompt": _shortened(prompt), "text": _shortened(row["text"])}


def _shortened(text: str) -> str:
    return text if len(text) <= _TEXT_LIMIT else f"{text[:_TEXT_LIMIT]} … ({len(text) - _TEXT_LIMIT:,} more characters)"


def inlined(alternative: str, light: bytes, dark: bytes) -> dict[str, str]:
    """A picture as a page's template takes it."""
    texts = {"light": base64.b64encode(light).decode(), "dark": base64.b64encode(dark).decode()}
    return {"alternative": alternative, **texts}


def _finished(folder: Path) -> str:
    try:
        changed = (folder / "metrics.jsonl").stat().st_mtime
    except OSError as error:  # it was there a moment ago
        raise RunFolderError(f"{folder} cannot be read: {error.strerror}. Was it moved meanwhile?") from error
    return datetime.fromtimestamp(changed).strftime("%Y-%m-%d %H:%M")
