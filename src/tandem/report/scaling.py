"""Rows of runs -> what more cost would buy: the sigmoid in tokens, seconds and FLOP, and whether to go on.

Runs whose configs differ by the seed alone are fitted together. docs/scaling.md says what each figure means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tandem.report import metrics, units
from tandem.report.compare import Compared
from tandem.report.kept import read_object
from tandem.report.metrics import Row
from tandem.report.sigmoid import PARAMETERS, Array, Fit, Points, fit, interval

Advice = Literal["continue", "stop", "cannot tell"]
Flop = Callable[[Row], float]  # operations of a step, by its row
FlopOf = Callable[[Path], Flop | None]  # of a run's folder: report/scaling_page.py

LEAST_ROWS = 12  # three a parameter; of rows that say something new, and of evaluations, else the rewards are fitted
BACKTEST = 0.3  # of the cost, from which the rest is foretold
MORE = (0.1, 0.5, 1.0)  # of the cost so far
WORTH, WORTH_SHARE = 0.01, 0.05  # doubling the cost should bring this, and this share of the gain so far
KNOWN = 0.25  # an asymptote is known where its interval is narrower than this share of the way to it
NEAR = 0.99  # of the way from R0 to A
RISES = 5.0  # F of the curve over a constant; 1 % of flat runs of independent rows have more
FALLS = 3.0  # standard errors
WRITERS: dict[str, Callable[[float | None], str]] = {
    "tokens": units.count,
    "seconds": units.duration,
    "FLOP": lambda number: units.BLANK if number is None else f"{number:.3g}",
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median of the draws and the ends of its interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Array) -> Estimate:
        low, high = interval(draws)
        return cls(float(np.median(draws)), float(low), float(high))

    def text(self, write: Callable[[float], str] = units.decimal) -> str:
        return f"{write(self.value)} ({write(self.low)} to {write(self.high)})"


@dataclass(frozen=True, slots=True)
class BackTest:
    """What a fit to the first BACKTEST of the cost foretold of the rest."""

    rows: int  # that were fitted
    later: int
    share: float  # of the later rows, in the band
    width: float  # of the band, mean


@dataclass(frozen=True, slots=True)
class InUnit:
    """A fit over one kind of cost."""

    unit: str
    fit: Fit
    now: float  # cost so far, of the run that went furthest
    parameters: dict[str, Estimate]  # R0, A, Cmid, B
    known: bool  # whether A is
    gains: dict[float, Estimate]  # of reward, for so much more of the cost
    near: Estimate | None  # cost at which NEAR of the way is done; None where A is not known
    backtest: BackTest | None
    advice: Advice
    because: str


@dataclass(frozen=True, slots=True)
class Course:
    """What was measured of one run, and what had been spent by then."""

    name: str
    value: Array
    spread: Array
    count: Array
    cost: dict[str, Array]  # unit -> a cost a value
    unmeasured: int  # steps without a finite value


@dataclass(frozen=True, slots=True)
class Scaling:
    """Runs of one config, fitted together."""

    name: str
    runs: tuple[str, ...]
    measure: str
    courses: tuple[Course, ...]
    fits: dict[str, InUnit]
    advice: Advice
    because: str
    notes: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "runs": list(self.runs),
            "measure": self.measure,
            "rows": sum(len(course.value) for course in self.courses),
            "advice": self.advice,
            "because": self.because,
            "units": {unit: _record(one) for unit, one in self.fits.items()},
            "notes": self.notes,
        }


def _record(one: InUnit) -> dict[str, Any]:
    def entry(estimate: Estimate | None) -> dict[str, float | None] | None:
        if estimate is None:
            return None
        ends = (("value", estimate.value), ("low", estimate.low), ("high", estimate.high))
        return {name: value if math.isfinite(value) else None for name, value in ends}

    tested = one.backtest
    return {
        "now": one.now,
        **{name: entry(estimate) for name, estimate in one.parameters.items()},
        "asymptote_known": one.known,
        "gains": {f"{more:.0%}": entry(gain) for more, gain in one.gains.items()},
        "near_asymptote": entry(one.near),
        "backtest": None if tested is None else {name: getattr(tested, name) for name in tested.__slots__},
        "autocorrelation": one.fit.autocorrelation,
        "advice": one.advice,
        "because": one.because,
    }


def spent(rows: Sequence[Row], flop: Flop | None) -> dict[str, Array]:
    """Unit -> what had been spent after each row. Only units that every row with samples tells."""
    steps = [row for row in rows if row.get("tokens") is not None]
    costs = {}
    if steps:
        costs["tokens"] = np.cumsum([_sampled(row) for row in rows])
    if all(row.get("time_s") is not None for row in rows):
        at = np.array([0.0, *(float(row["time_s"]) for row in rows)])
        ends = np.where(np.diff(at) < 0, at[:-1], 0.0)  # of sittings whose clock the next began anew
        costs["seconds"] = at[1:] + np.cumsum(ends)
    if steps and flop is not None:
        costs["FLOP"] = np.cumsum([flop(row) if row.get("tokens") is not None else 0.0 for row in rows])
    return costs


def _sampled(row: Row) -> float:
    """Tokens that a row's step cost: what engines drew by then, whatever became of it, without held-out answers. Rows
    of older runs have those of the step's own groups alone."""
    if "drawn_tokens" not in row:
        return float(row.get("tokens") or 0)
    held_out = row.get("evaluation") or {}
    answers = int(held_out.get("prompts") or 0) + int(held_out.get("failed") or 0)
    return max(0.0, float(row["drawn_tokens"]) - answers * float(held_out.get("length") or 0.0))


def course(name: str, rows: Sequence[Row], held_out: bool, flop: Flop | None) -> Course:
    """A run's values with their costs. A step's reward is that of the weights before its update, so what had been spent
    is what the steps before it spent; an evaluation is of the weights after."""
    costs, kept, unmeasured = spent(rows, flop), [], 0
    for place, row in enumerate(rows):
        found = _held_out(row) if held_out else _reward(row)
        if found is not None and math.isfinite(found[0]):
            kept.append((place if held_out else place - 1, *found))
        elif not held_out and "reward" in row:
            unmeasured += 1
    places, value, spread, count = (
        (np.array(column, dtype=float) for column in zip(*kept, strict=True)) if kept else (np.empty(0),) * 4
    )
    before = {unit: np.concatenate([cost, [0.0]])[places.astype(int)] for unit, cost in costs.items()}  # -1: nothing
    return Course(name, value, spread, count, before, unmeasured)


def _reward(row: Row) -> tuple[float, float, float] | None:
    if not isinstance(row.get("reward"), int | float):
        return None
    count = (row.get("trajectories") or 0) - (row.get("failed") or 0)
    deviation = row.get("reward_std")
    return float(row["reward"]), math.nan if deviation is None else float(deviation) ** 2, count or math.nan


def _held_out(row: Row) -> tuple[float, float, float] | None:
    found = metrics.graded([row])
    if not found:
        return None
    accuracy = float(found[0]["accuracy"])
    return accuracy, accuracy * (1 - accuracy), found[0].get("prompts") or math.nan


def pooled(courses: Sequence[Course], unit: str) -> Points:
    """The rows of several runs, over one kind of cost."""
    columns = [np.concatenate([getattr(one, name) for one in courses]) for name in ("value", "spread", "count")]
    run = np.repeat(np.arange(len(courses)), [len(one.value) for one in courses])
    return Points(np.concatenate([one.cost[unit] for one in courses]), columns[0], run, *columns[1:])


def scaled(
    name: str, runs: Mapping[str, Sequence[Row]], flops: Mapping[str, Flop | None], notes: Sequence[str] = ()
) -> Scaling:
    """The fits of runs of one config, and what they say together."""
    held_out = all(len(metrics.graded(rows)) >= LEAST_ROWS for rows in runs.values())
    courses = [course(run, rows, held_out, flops.get(run)) for run, rows in runs.items()]
    measure = "held-out accuracy" if held_out else "training reward"
    told = [*_notes(courses, runs, held_out), *notes]
    measured = [one for one in courses if len(one.value)]
    shared = [unit for unit in WRITERS if measured and all(unit in one.cost for one in measured)]
    fits, lacking = {}, ""
    for unit in shared:
        points = pooled(measured, unit)
        lacking = _lacking(points)
        if not lacking:
            fits[unit] = in_unit(unit, points)
    if not fits:
        lacking = lacking or f"no row has a {measure}"
        return Scaling(name, tuple(runs), measure, tuple(courses), {}, "cannot tell", lacking, told)
    said = {one.advice for one in fits.values()}
    first = next(iter(fits.values()))
    if len(said) == 1:
        advice, because = first.advice, first.because
    else:
        advice, because = "cannot tell", "; ".join(f"by {one.unit}: {one.advice}" for one in fits.values())
    return Scaling(name, tuple(runs), measure, tuple(courses), fits, advice, because, told)


def _notes(courses: Sequence[Course], runs: Mapping[str, Sequence[Row]], held_out: bool) -> list[str]:
    numbers = [len(metrics.graded(rows)) for rows in runs.values()]
    least = min(numbers, default=0)
    told = (
        [] if held_out else [f"fitted to the training reward: {least} held-out evaluations are fewer than {LEAST_ROWS}"]
    )
    for one in courses:
        if one.unmeasured:
            told.append(
                f"{one.name}: {one.unmeasured} steps have no finite reward; their cost counts, they are not fitted"
            )
    return told


def _lacking(points: Points) -> str:
    """Why nothing can be fitted; empty where it can."""
    fewest = min(int((points.run == run).sum()) for run in np.unique(points.run))
    if fewest < LEAST_ROWS:
        return f"{fewest} rows of a run are too few: a fit needs {LEAST_ROWS}"
    return "" if points.cost.max() > 0 else "nothing was spent"


def in_unit(unit: str, points: Points) -> InUnit:
    """A fit over one kind of cost, what it foretells, and what it would have foretold before."""
    fitted = fit(points)
    now, draws = float(points.cost.max()), fitted.draws
    here = draws.at(now)[:, 0]
    gains = {more: Estimate.of(draws.at((1 + more) * now)[:, 0] - here) for more in MORE}
    asymptote = Estimate.of(draws.asymptote)
    known = asymptote.high - asymptote.low <= KNOWN * abs(asymptote.value - float(np.median(draws.start)))
    parameters = {
        "R0": Estimate.of(draws.start),
        "A": asymptote,
        "Cmid": Estimate.of(np.exp(draws.log_cmid)),
        "B": Estimate.of(np.exp(draws.log_b)),
    }
    so_far = float(np.median(here - draws.start))
    advice, because, known = advise(fitted, gains, so_far, known)
    near = Estimate.of(draws.cost_of(NEAR)) if known else None
    return InUnit(unit, fitted, now, parameters, known, gains, near, backtest(points), advice, because)


def advise(fitted: Fit, gains: Mapping[float, Estimate], so_far: float, known: bool) -> tuple[Advice, str, bool]:
    """What to do, why, and whether the asymptote is known after all that speaks against it."""
    points, rows, fallen = fitted.points, independent(fitted), drop(fitted)
    bounded, number = points.limits == (0.0, 1.0), len(points.value)
    worth = max(WORTH if bounded else 0.0, WORTH_SHARE * so_far)
    if fallen is not None:
        what = f"the last fifth of a run lies {fallen.text()} below the best fifth before it"
        return "cannot tell", f"{what}, and the curve is of runs that rise", False
    if rows < LEAST_ROWS:
        alike = f"neighbouring rows are so alike (correlation {fitted.autocorrelation:.2f})"
        return "cannot tell", f"{alike} that {number} say as much as {rows:.0f}, and {LEAST_ROWS} are needed", False
    if rise(fitted) < RISES:
        level = float(points.value.mean())
        if bounded and 1 - level < worth:
            return "stop", f"flat at {units.decimal(level)}, and no reward is above 1", False
        where = "what rise there was came before them, or is still to come"
        return "cannot tell", f"flat at {units.decimal(level)}: {number} rows show no rise; {where}", False
    double = gains[MORE[-1]]
    expected = f"doubling the cost is expected to bring {gain_text(double)}; {units.decimal(worth)} would be worth it"
    if double.low > worth:
        return "continue", expected + ("" if known else ", and where it ends is not known yet"), known
    if double.high < worth and known:
        return "stop", expected, known
    return "cannot tell", expected + ("" if known else ", and where it ends is not known"), known


def gain_text(gain: Estimate) -> str:
    return gain.text("{:+.3f}".format)


def independent(fitted: Fit) -> float:
    """How many rows without memory say as much as these."""
    rho = max(0.0, fitted.autocorrelation)
    return len(fitted.residuals) * (1 - rho) / (1 + rho)


def rise(fitted: Fit) -> float:
    """F of the curve over a constant, in rows without memory."""
    points = fitted.points
    left = float(((points.value - fitted.best.at(points.cost)[0]) ** 2).sum())
    flat = float(((points.value - points.value.mean()) ** 2).sum())
    freedom = max(1.0, independent(fitted) - PARAMETERS)
    return (flat - left) / (PARAMETERS - 1) / max(left / freedom, 1e-12)


def drop(fitted: Fit) -> Estimate | None:
    """By how much the last fifth of a run lies below the best fifth before it, where that is beyond FALLS standard
    errors. A row's deviation is that of neighbours' differences, which a trend does not widen.
    """
    points, rho = fitted.points, min(0.9, max(0.0, fitted.autocorrelation))
    worst = None
    for run in np.unique(points.run):
        value = points.value[points.run == run]
        length = max(3, len(value) // 5)
        before = [value[i : i + length].mean() for i in range(len(value) - 2 * length + 1)]
        fallen = max(before, default=-math.inf) - value[-length:].mean()
        deviation = float(np.sqrt(np.mean(np.diff(value) ** 2) / 2))
        error = deviation * math.sqrt(2 / length * (1 + rho) / (1 - rho))
        if fallen > max(FALLS * error, WORTH_SHARE * np.ptp(value)) and (worst is None or fallen > worst.value):
            worst = Estimate(float(fallen), float(fallen - 2 * error), float(fallen + 2 * error))
    return worst


def backtest(points: Points) -> BackTest | None:
    """What the first part of the cost foretold of the rest; None where it has too few rows."""
    early = points.cost <= BACKTEST * points.cost.max()
    first, rest = points.take(early), points.take(~early)
    if not len(rest.value) or not set(points.run) <= set(first.run) or _lacking(first):
        return None
    low, high = fit(first).band(rest.cost)
    inside = (rest.value >= low) & (rest.value <= high)
    return BackTest(len(first.value), len(rest.value), float(inside.mean()), float((high - low).mean()))


def fits_of(compared: Compared, flop_of: FlopOf) -> list[Scaling]:
    """The fits of runs, those of one config (but for its seed) together."""
    together: dict[str, list[int]] = {}
    folders = compared.folders
    for place, folder in enumerate(folders):
        config = {name: value for name, value in read_object(folder / "config.json").items() if name != "seed"}
        together.setdefault(json.dumps(config, sort_keys=True) if config else str(place), []).append(place)
    found = []
    for places in together.values():
        runs = {compared.names[place]: compared.rows[place] for place in places}
        flops = {compared.names[place]: flop_of(folders[place]) for place in places}
        notes = [note for place in places for note in _folder_notes(compared.names[place], folders[place])]
        if any(flop is None for flop in flops.values()):
            notes.append("no FLOP: the folder keeps no config of the model")
        elif not all("run_tokens" in row for rows in runs.values() for row in rows if row.get("tokens") is not None):
            notes.append("FLOP leave out prompts: rows of older runs hold no run_tokens")
        names = list(runs)
        found.append(
            scaled(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more", runs, flops, notes)
        )
    return found


def _folder_notes(name: str, folder: Path) -> list[str]:
    """What a resume set aside: paid for, and not on the curve."""
    rows = [
        row for path in sorted((folder / "set_aside").glob("*/metrics.jsonl")) for row in metrics.read_metrics(path)
    ]
    if not rows:
        return []
    tokens = sum(float(row.get("tokens") or 0) for row in rows)
    seconds = sum(metrics.step_s(row) or 0.0 for row in rows)
    what = f"{len(rows)} steps that resumes set aside ({units.count(tokens)} tokens, {units.duration(seconds)})"
    return [f"{name}: {what} were paid for beside the cost shown"]
