"""What report/scaling.py found, as lines of a table and as a picture; in pages, as JSON and in a terminal."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tandem.models.hf_config import from_hf_config
from tandem.plan.roofline import step_flop
from tandem.report import plots, units
from tandem.report.compare import Compared
from tandem.report.html import inlined
from tandem.report.kept import read_object, write_file
from tandem.report.scaling import BACKTEST, MORE, NEAR, WRITERS, FlopOf, InUnit, Scaling, fits_of, gain_text

AHEAD = 1 + MORE[-1]  # of the cost so far, how far curves are drawn
_CURVE_POINTS = 160


def table(scaling: Scaling) -> list[list[str]]:
    """A line of headings, then a line a figure with a text a unit; empty where nothing was fitted."""
    fits = list(scaling.fits.values())
    if not fits:
        return []
    lines = [["", *(f"by {one.unit}" for one in fits)]]
    lines.append(["cost so far", *(WRITERS[one.unit](one.now) for one in fits)])
    for name, what in (
        ("R0", "R0, at no cost"),
        ("A", "A, where it ends"),
        ("Cmid", "Cmid, half of the way"),
        ("B", "B, steepness"),
    ):
        lines.append([what, *(_parameter(one, name) for one in fits)])
    for more in MORE:
        lines.append([f"gain for {more:.0%} more".replace("%", " %"), *(gain_text(one.gains[more]) for one in fits)])
    lines.append([f"{NEAR:.0%} of the way at".replace("%", " %"), *(_near(one) for one in fits)])
    lines.append([f"foretold at {BACKTEST:.0%}".replace("%", " %"), *(_backtest(one) for one in fits)])
    lines.append(["advice", *(one.advice for one in fits)])
    return lines


def _parameter(one: InUnit, name: str) -> str:
    write = WRITERS[one.unit] if name == "Cmid" else units.decimal
    text = one.parameters[name].text(write)
    return text if one.known or name != "A" else f"not known: {text}"


def _near(one: InUnit) -> str:
    return units.BLANK if one.near is None else one.near.text(WRITERS[one.unit])


def _backtest(one: InUnit) -> str:
    tested = one.backtest
    if tested is None:
        return "too few rows"
    return f"{units.percent(tested.share)} of {tested.later} rows in the band, {units.decimal(tested.width, 2)} wide"


def headline(scaling: Scaling) -> str:
    """The advice in a sentence."""
    return f"{scaling.name}: {scaling.advice}. {scaling.because[:1].upper()}{scaling.because[1:]}."


def section(found: Sequence[Scaling]) -> dict[str, Any]:
    """What the pages show of it."""
    draw = partial(scaling_figure, found)
    entries = [
        {"headline": headline(one), "measure": one.measure, "runs": one.runs, "table": table(one), "notes": one.notes}
        for one in found
    ]
    return {
        "entries": entries,
        "picture": inlined("Reward by cost with its curve, band and asymptote", *plots.both(draw)),
    }


def scaling_figure(found: Sequence[Scaling]) -> Figure:
    """A plot a unit: rows, curve and band up to twice the cost so far, and the asymptote with its interval."""
    shown = [unit for unit in WRITERS if any(unit in one.fits for one in found)]
    shown = (
        shown or [unit for unit in WRITERS if any(unit in course.cost for one in found for course in one.courses)][:1]
    )
    figure = Figure(figsize=(3.6 * max(2, len(shown)), 3.7))
    FigureCanvasAgg(figure)
    drawn_on = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)[0]
    for axes, unit in zip(drawn_on, shown, strict=False):
        for place, one in enumerate(found):
            _draw(axes, unit, one, place)
        axes.set_xscale("log")
        axes.set_xlabel({"tokens": "sampled tokens", "seconds": "seconds", "FLOP": "FLOP"}[unit])
    measures = dict.fromkeys(one.measure for one in found)
    drawn_on[0].set_ylabel(", ".join(measures))
    values = [value for one in found for course in one.courses for value in course.value]
    if values and min(values) >= 0 and max(values) <= 1:
        drawn_on[0].set_ylim(-0.02, 1.03)
    handles, labels = drawn_on[0].get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    names, columns = plots.fitted([*kept], 4, figure.get_figwidth())
    figure.legend(kept.values(), names, loc="outside upper right", ncols=columns)
    return figure


def _draw(axes: Axes, unit: str, one: Scaling, place: int) -> None:
    colour = plots.SERIES[place % len(plots.SERIES)]
    courses = [course for course in one.courses if unit in course.cost and len(course.value)]
    spent = np.concatenate([course.cost[unit] for course in courses]) if courses else np.empty(0)
    if not (spent > 0).any():
        return
    least = float(spent[spent > 0].min())
    for course in courses:
        for free in (True, False):  # what cost nothing stands at the left end, hollow
            at = course.cost[unit] <= 0 if free else course.cost[unit] > 0
            cost = np.full(at.sum(), least / 2) if free else course.cost[unit][at]
            look: dict[str, Any] = {"markerfacecolor": "none"} if free else {"alpha": 0.55, "markeredgewidth": 0}
            axes.plot(cost, course.value[at], linestyle="none", marker="o", markersize=3, color=colour, **look)
    fitted = one.fits.get(unit)
    if fitted is None:
        return
    name = one.name if len(one.runs) == 1 else f"{one.name} ({len(one.runs)} runs)"
    cost = np.geomspace(least / 2, AHEAD * fitted.now, _CURVE_POINTS)
    low, high = fitted.fit.band(cost)
    axes.fill_between(cost, low, high, color=colour, alpha=0.14, linewidth=0, label="band of rows, 95 %")
    curve, past = fitted.fit.best.at(cost)[0], cost <= fitted.now
    axes.plot(cost[past], curve[past], color=colour, label=name)
    axes.plot(cost[~past], curve[~past], color=colour, linestyle=":", label="foretold")
    if fitted.known:
        end = fitted.parameters["A"]
        axes.axhline(end.value, color=colour, linewidth=1.0, linestyle="--", label="asymptote A, 95 %")
        axes.axhspan(end.low, end.high, color=colour, alpha=0.10, linewidth=0)
    axes.axvline(fitted.now, color=plots.GREY, linewidth=0.8)


@dataclass(frozen=True, slots=True)
class Fits:
    """The fits of runs: for a page, as JSON, and in a terminal."""

    found: Sequence[Scaling]
    section: dict[str, Any]
    picture: Path

    def record(self) -> dict[str, Any]:
        return {"scaling": [one.record() for one in self.found], "scaling_picture": str(self.picture)}

    def print(self, console: Console) -> None:
        for entry in self.section["entries"]:
            console.print(f"\n{entry['headline']}", markup=False, style="bold", soft_wrap=True)
            headings, *lines = entry["table"] or [[]]
            shown = Table(*headings, box=None, padding=(0, 2, 0, 0))
            for line in lines:
                shown.add_row(*line)
            if lines:
                console.print(shown)
            for note in entry["notes"]:
                console.print(note, markup=False, style="dim", soft_wrap=True)
        console.print(f"wrote {self.picture}", markup=False, soft_wrap=True)


def write_fits(compared: Compared, picture: Path, flop_of: FlopOf) -> Fits:
    """Fit runs, and write the picture."""
    found = fits_of(compared, flop_of)
    shown = section(found)
    write_file(picture, b64decode(shown["picture"]["light"]), "Make room, or free the place.")
    return Fits(found, shown, picture)


def flop_of(folder: Path) -> Callable[[Mapping[str, Any]], float] | None:
    """The operations of a step of the run in `folder`, by its row; None where nothing there says what its model is."""
    model = read_object(folder / "plan.json").get("model")
    saved = next(iter((folder / "checkpoints").glob("step-*/config.json")), None)
    if model is None and saved is not None:  # a run of before plan.json said it
        model = read_object(saved)
    return None if model is None else partial(step_flop, from_hf_config(model))
