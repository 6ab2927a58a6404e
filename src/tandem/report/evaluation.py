"""What kept answers say: the figures of an evaluation, its table, and two models beside each other.

docs/evaluation.md has the formulas and the keys of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from tandem.errors import ConfigError, WorldError
from tandem.numerics.estimate import majority_at, pass_at
from tandem.numerics.interval import Z_95, clustered_error, clustered_interval
from tandem.numerics.paired import bootstrap, holm, mcnemar
from tandem.report.units import BLANK, decimal, percent

Row = Mapping[str, Any]  # a prompt with its samples, as rollout/answers.py writes it
VERSION = 1  # of the file; another is not read
GRADING = ("task.environment", "task.name", "task.reward", "task.reward_on_error")  # what makes a score another score


class _Sample(msgspec.Struct):
    reward: float | None
    right: bool
    vote: str | None
    tokens: Annotated[int, msgspec.Meta(ge=0)]
    stop: str | None
    failure: str | None

    def __post_init__(self) -> None:
        if self.failure is None and (self.reward is None or not math.isfinite(self.reward)):
            raise ValueError(f"a sample that did not fail has the reward {self.reward}")


class _Row(msgspec.Struct):
    id: str
    hash: str
    samples: Annotated[list[_Sample], msgspec.Meta(min_length=1)]


class _Task(msgspec.Struct):
    settings: dict[str, str]
    prompts: Annotated[list[_Row], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        name, count = Counter(row.id for row in self.prompts).most_common(1)[0]
        if count > 1:
            raise ValueError(f"{count} rows have the id {name}")


class _File(msgspec.Struct):
    """What is read of a file: figures are those of its rows."""

    tasks: dict[str, _Task]
    target: str = ""
    model: str = ""
    weights: str = ""
    unfinished: list[str] = []
    begun: dict[str, _Task] = {}  # of the unfinished: what is answered so far


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one task's answers. Samples that could not be graded are counted, and in no other figure.

    `pass_at` and `majority_at` have, for k = 2, 4, 8 ... and the most samples of a prompt, [value, low, high] over the
    prompts with k graded samples; there is no majority where prompts have no gold answer.
    """
    graded = [found for row in rows if (found := _graded(row))]
    every = [sample for row in rows for sample in row["samples"]]
    sums, counts = [sum(sample["right"] for sample in found) for found in graded], [len(found) for found in graded]
    rewards = [math.fsum(sample["reward"] for sample in found) for found in graded]
    total = sum(counts)
    low, high = clustered_interval(sums, counts)
    failures = Counter(sample["failure"] for sample in every if sample["failure"])
    shown: dict[str, Any] = {
        "prompts": len(graded),
        "samples": max(counts, default=0),
        "failed": len(every) - total,
        "failures": [f"{count} x {reason}" for reason, count in failures.most_common()],
        "accuracy": sum(sums) / total if total else 0.0,
        "low": low,
        "high": high,
        "pass_at": {},
        "majority_at": {},
        "reward": math.fsum(rewards) / total if total else None,
        "reward_error": clustered_error(rewards, counts),
        "length": _mean([sample["tokens"] for sample in every]),
        "cut": _mean([float(sample["stop"] == "length") for sample in every]),
    }
    for name in _curves_of(rows):
        drawn = list(map(CURVES[name], graded))
        for k in sizes(shown["samples"]):
            values, trials = [curve[k - 1] for curve in drawn if len(curve) >= k], sum(n for n in counts if n >= k)
            shown[name][str(k)] = [
                math.fsum(values) / len(values),
                *clustered_interval(values, [1] * len(values), trials),
            ]
    return shown


def _curves_of(rows: Sequence[Row]) -> list[str]:
    """Without gold answers nobody knows what a text answers, and so there is no vote."""
    return [name for name in CURVES if name == "pass_at" or any(row.get("answer") is not None for row in rows)]


def sizes(samples: int) -> list[int]:
    """The k of which figures are shown.

    >>> sizes(1), sizes(8), sizes(6)
    ([], [2, 4, 8], [2, 4, 6])
    """
    return sorted({k for power in range(1, samples.bit_length()) if (k := 2**power) <= samples} | {samples} - {0, 1})


def pass_curve(graded: Sequence[Row]) -> list[float]:
    """pass@k of one prompt, for k = 1 ... its samples."""
    right = sum(sample["right"] for sample in graded)
    return [pass_at(len(graded), right, k) for k in range(1, len(graded) + 1)]


def majority_curve(graded: Sequence[Row]) -> list[float]:
    """maj@k of one prompt, for k = 1 ... its samples. Samples that give one answer count together, as right as they are
    on average."""
    votes: dict[str, list[bool]] = {}
    for sample in graded:
        if sample["vote"] is not None:
            votes.setdefault(sample["vote"], []).append(sample["right"])
    silent = len(graded) - sum(map(len, votes.values()))
    return majority_at([(len(marks), sum(marks) / len(marks)) for marks in votes.values()], silent)


CURVES = {"pass_at": pass_curve, "majority_at": majority_curve}
SHORT = {"pass_at": "pass", "majority_at": "maj"}


def table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures of each task, a line each, below a line of headings."""
    lines = [["task", "prompts x samples", "measure", "value", "95 %"]]
    for name, of in tasks.items():
        shares = {"accuracy": [of["accuracy"], of["low"], of["high"]]} if of["prompts"] else {}
        for curve, short in SHORT.items():
            shares |= {f"{short}@{k}": found for k, found in of[curve].items()}
        found = [[measure, percent(one[0], 1), _within(100, 1, *one[1:])] for measure, one in shares.items()]
        if of["reward"] is not None:
            half = None if of["reward_error"] is None else Z_95 * of["reward_error"]
            bounds = BLANK if half is None else _within(1, 3, of["reward"] - half, of["reward"] + half)
            found.append(["reward", decimal(of["reward"]), bounds])
        if of["length"] is not None:
            found.append(["length", decimal(of["length"], 1), f"{percent(of['cut'])} cut"])
        if of["failed"]:
            found.append(["failed", str(of["failed"]), of["failures"][0]])
        first = [name, f"{of['prompts']} x {of['samples']}"]
        lines += [[*(first if place == 0 else ["", ""]), *line] for place, line in enumerate(found)]
    return _aligned(lines)


def compare(first: Mapping[str, Any], second: Mapping[str, Any], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Two evaluations on the same prompts: for each task that both have, how much more the second gets.

    `measures`: of accuracy, pass_at, majority_at and reward, both values, the difference, its paired bootstrap interval
    and p. `mcnemar`: where both have one sample of each prompt. `p`: McNemar's, else that of the accuracy;
    `p_adjusted`: Holm's, over the tasks. Prompts without a graded sample on both sides are left out, and counted.
    ConfigError where they were asked other prompts, or scored otherwise.
    """
    shared = [name for name in first["tasks"] if name in second["tasks"]]
    if not shared:
        names = [", ".join(sorted(of["tasks"])) for of in (first, second)]
        raise ConfigError(f"the evaluations share no task: one has {names[0]}, the other {names[1]}.")
    found = {name: _compared(name, first["tasks"][name], second["tasks"][name], seed) for name in shared}
    for one, adjusted in zip(found.values(), holm([one["p"] for one in found.values()]), strict=True):
        one["p_adjusted"] = adjusted
    return found


def compared_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A comparison as a table, and what it leaves out."""
    lines = [["task", "measure", "against", "this", "difference, 95 %", "p"]]
    notes = []
    for name, of in found.items():
        for measure, one in of["measures"].items():
            is_share = measure != "reward"
            first, second = (percent(v, 1) if is_share else decimal(v) for v in (one["first"], one["second"]))
            scale, digits = (100, 1) if is_share else (1, 3)
            moved = f"{scale * one['difference']:+.{digits}f} {_within(scale, digits, one['low'], one['high'])}"
            lines.append([name, measure, first, second, moved, decimal(one["p"])])
        if of["mcnemar"]:
            one = of["mcnemar"]
            notes.append(
                f"{name}: {one['second_only']} prompts right here alone, {one['first_only']} there alone: McNemar's "
                f"exact p {decimal(one['p'])}"
            )
        if len(found) > 1:
            notes.append(f"{name}: p over {len(found)} tasks (Holm) {decimal(of['p_adjusted'])}")
        if of["left_out"]:
            notes.append(f"{name}: {of['left_out']} prompts left out, which one of the two has no grade of")
        if of["differing"]:
            told = (f"{key} {pair[0]} there and {pair[1]} here" for key, pair in of["differing"].items())
            notes.append(f"{name}: asked otherwise: {'; '.join(told)}")
    return [*_aligned(lines), *notes]


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write an evaluation, whole or not at all. WorldError where the disk does not take it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({"version": VERSION} | dict(results), indent=1) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise WorldError(f"the answers could not be written to {path}: {error.strerror}.") from error


def read_results(path: Path) -> dict[str, Any]:
    """An evaluation that `write_results` wrote. ConfigError where the file is none, or cannot be read."""
    try:
        results = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error}). Give a file of tandem eval --out.") from error
    tasks = results.get("tasks") if isinstance(results, dict) else None
    if not isinstance(tasks, dict) or not (tasks or results.get("begun")):
        raise ConfigError(f"{path} holds no evaluation. Give a file of tandem eval --out.")
    if results.get("version") != VERSION:
        raise ConfigError(
            f"{path} is of version {results.get('version')}, and this tandem reads {VERSION}. Evaluate again."
        )
    try:
        msgspec.convert(results, _File)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path} is damaged: {error}. Evaluate it again with --out.") from error
    return results


def _compared(name: str, first: Mapping[str, Any], second: Mapping[str, Any], seed: int) -> dict[str, Any]:
    pairs = _paired(name, first, second)
    both = [(one, other) for one, other in pairs if one and other]
    if not both:
        raise ConfigError(f"task {name}: no prompt has a graded sample in both evaluations: nothing can be compared.")
    ks = sizes(min(len(found) for pair in both for found in pair))
    names = _curves_of(first["prompts"]) if ks else []
    of = ["accuracy", *(f"{SHORT[name]}@{k}" for name in names for k in ks), "reward"]
    values_2PM = np.array([[_measured(pair[side], names, ks) for pair in both] for side in (0, 1)])
    differences = bootstrap(values_2PM[1] - values_2PM[0], seed)
    means_2M = values_2PM.mean(1)
    measures = {
        measure: {
            "first": float(means_2M[0, place]),
            "second": float(means_2M[1, place]),
            "difference": one.mean,
            "low": one.low,
            "high": one.high,
            "p": one.p,
        }
        for place, (measure, one) in enumerate(zip(of, differences, strict=True))
    }
    test, settings = None, [one["settings"] for one in (first, second)]
    if all(len(found) == 1 for pair in both for found in pair):
        only = Counter((one[0]["right"], other[0]["right"]) for one, other in both)
        first_only, second_only = only[True, False], only[False, True]
        test = {"first_only": first_only, "second_only": second_only, "p": mcnemar(first_only, second_only)}
    told = sorted(settings[0].keys() | settings[1].keys())
    return {
        "prompts": len(both),
        "left_out": len(pairs) - len(both),
        "measures": measures,
        "mcnemar": test,
        "p": test["p"] if test else measures["accuracy"]["p"],
        "differing": {key: pair for key in told if (pair := [one.get(key) for one in settings])[0] != pair[1]},
    }


def _measured(graded: Sequence[Row], names: Sequence[str], ks: Sequence[int]) -> list[float]:
    curves = [CURVES[name](graded) for name in names]
    right, reward = (math.fsum(sample[key] for sample in graded) / len(graded) for key in ("right", "reward"))
    return [right, *(curve[k - 1] for curve in curves for k in ks), reward]


def _paired(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[list[Row], list[Row]]]:
    """The graded samples of each prompt in both."""
    check_same(name, first, second)
    other = {row["id"]: row for row in second["prompts"]}
    return [(_graded(row), _graded(other[row["id"]])) for row in first["prompts"]]


def check_same(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """ConfigError where a task's prompts, or their scoring, are not the same in two evaluations. Their samples are not
    looked at, so that it can be asked before any is drawn."""
    for key in GRADING:
        one, other = first["settings"].get(key), second["settings"].get(key)
        if one != other:
            raise ConfigError(
                f"task {name} has {key} {one!r} in one evaluation and {other!r} in the other, which makes scores of "
                "another kind. Evaluate both with the same."
            )
    rows = [{row["id"]: row for row in of["prompts"]} for of in (first, second)]
    if rows[0].keys() != rows[1].keys():
        alone = [sorted(rows[side].keys() - rows[1 - side].keys()) for side in (0, 1)]
        told = " and ".join(f"{len(ids)} of the {'other' if side else 'one'}" for side, ids in enumerate(alone))
        example = (alone[0] or alone[1])[0]
        raise ConfigError(
            f"task {name}: the evaluations were asked other prompts: {told} are not in both, {example} among them. "
            "Evaluate both with the same task.*, task.heldout_size and evaluation.prompts."
        )
    for one, row in rows[0].items():
        if row["hash"] != rows[1][one]["hash"]:
            raise ConfigError(
                f"task {name}: prompt {one} has other messages, tools or another gold answer in one evaluation than in "
                "the other. Evaluate both with the same task.*"
            )


def _graded(row: Row) -> list[Row]:
    return [sample for sample in row["samples"] if sample["failure"] is None]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _within(scale: float, digits: int, low: float, high: float) -> str:
    """
    >>> _within(100, 1, 0.55, 0.685)
    '[55.0, 68.5]'
    """
    return f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, without spaces at the ends."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
