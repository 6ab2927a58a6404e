"""The picture of a study: reward at equal steps, at equal time, and the paired differences."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tandem.report.plots import GREY, SERIES, png, smoothed
from tandem.study.result import Result, rewarded, runs_of, step_seconds, timed_alone

Arm = Mapping[str, Any]
Look = dict[str, Any]

BASELINE = "#1F2328"
DPI = 160
COLOURS = 128  # of the PNG's palette: half the bytes, and no difference to the eye
MAX_BANDS = 6  # with more curves in a panel only the first two have a band
SMALL_MULTIPLES = 6  # more arms than this are cut into panels, where the study names some
LINES = ("-", (0, (4, 1.2)), (0, (1.2, 1.2)))


def _panels(result: Result) -> dict[str, dict[str, Arm]]:
    """Panel -> label -> arm, a row of plots each; arms without a panel are in all."""
    arms: Sequence[Arm] = result["arms"]
    names = dict.fromkeys(arm["panel"] for arm in arms if arm["panel"])
    if not names or (len(arms) <= SMALL_MULTIPLES and len(_baselines(result)) == 1):
        return {"": {", ".join(filter(None, (arm["panel"], arm["label"]))): arm for arm in arms}}
    return {name: {arm["label"]: arm for arm in arms if arm["panel"] in ("", name)} for name in names}


def _baselines(result: Result) -> set[str]:
    """The study's, and what is compared with no other and others are with it: a panel may have its own."""
    pairs = result["compare"]
    return {result["baseline"]} | {against for _, against in pairs} - {arm for arm, _ in pairs}


def _looks(result: Result, panels: Mapping[str, Mapping[str, Arm]]) -> dict[str, Look]:
    """Label -> colour and line, the same in every panel."""
    cycle = ((SERIES[i % len(SERIES)], LINES[(i - 1) // len(SERIES) % len(LINES)]) for i in itertools.count(1))
    looks: dict[str, Look] = {}
    baselines = _baselines(result)
    for label, arm in ((label, arm) for arms in panels.values() for label, arm in arms.items()):
        if label not in looks and arm["name"] in baselines:
            looks[label] = {"color": BASELINE, "linestyle": "-", "linewidth": 2.2, "zorder": 4}
        elif label not in looks:
            colour, line = next(cycle)
            looks[label] = {"color": colour, "linestyle": line, "linewidth": 1.6, "zorder": 3}
    return looks


def _draw_curves(axes: Sequence[Axes], result: Result, arm: Arm, look: Look, band: bool) -> None:
    """The seeds' mean at equal steps and at equal time, of smoothed rewards or of held-out accuracies; a cross where a
    seed failed."""
    runs = runs_of(result, arm["name"])
    curves = [smoothed([math.nan if reward is None else reward for reward in run["reward"]]) for run in runs]
    steps: Sequence[int] = range(1, max(map(len, curves), default=0) + 1)
    if not rewarded(result):
        steps = max(([step for step, _ in run.get("held_out", ())] for run in runs), key=len, default=[])
        curves = [[math.nan if y is None else y for _, y in run.get("held_out", ())] for run in runs]
    columns = [
        [y for y in at if not math.isnan(y)] or [math.nan] for at in itertools.zip_longest(*curves, fillvalue=math.nan)
    ]
    mean = [statistics.fmean(column) for column in columns]
    for plot, scale in ((axes[0], 1.0), (axes[1], (step_seconds(result, arm) or math.nan) / 60)):
        at = [scale * step for step in steps]
        if band:
            plot.fill_between(
                at, [*map(min, columns)], [*map(max, columns)], color=look["color"], alpha=0.13, linewidth=0
            )
        plot.plot(at, mean, **look)
        ends = [run["steps"] - 1 for run in runs if run["status"] == "failed" and run["steps"]]
        ends = [end if rewarded(result) else len(mean) - 1 for end in ends if mean]
        crosses = [at[end] for end in ends], [mean[end] for end in ends]
        plot.plot(*crosses, color=look["color"], linestyle="none", marker="X", markersize=7, zorder=6)


def _draw_differences(axes: Axes, result: Result, arms: Mapping[str, Arm], looks: Mapping[str, Look]) -> None:
    """Each arm's reward, or accuracy, minus its baseline's: a dot a seed, the mean with its interval."""
    baselines, measure = _baselines(result), "reward" if rewarded(result) else "accuracy"
    found = {
        one["arm"]: one
        for one in result["comparisons"]
        if one["measure"] == measure and one["against"] in baselines and one["differences"]
    }
    compared = {arm for arm, against in result["compare"] if against in baselines}
    left = {arm["name"] for arm in arms.values()} - baselines
    shown = [
        label
        for label, arm in arms.items()
        if arm["name"] in left and (arm["name"] in compared or not runs_of(result, arm["name"]))
    ]
    for place, label in enumerate(shown):
        name, colour = arms[label]["name"], looks[label]["color"]
        if name not in found:
            axes.text(0.0, place, "failed" if runs_of(result, name) else "not run", va="center", fontsize=8.5)
            continue
        one = found[name]
        dots = list(one["differences"].values())
        axes.plot(dots, [place] * len(dots), color=colour, linestyle="none", marker="o", markersize=3.5, alpha=0.6)
        if one["mean"] is not None:
            axes.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=1.4)
            axes.plot([one["mean"]], [place], color=colour, marker="D", markersize=5, zorder=5)
    dots = [0.0, *(dot for one in found.values() for dot in one["differences"].values())]
    margin = 0.35 * max(max(dots) - min(dots), 0.04)
    axes.set_xlim(min(dots) - margin, max(dots) + margin)  # the same in every panel; wide intervals run out
    axes.axvline(0.0, color=BASELINE, linewidth=1.0, zorder=1)
    axes.set_yticks(range(len(shown)), shown)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))


def study_figure(result: Result) -> Figure:
    """A row for each panel: by step, by time, differences from the baseline."""
    panels = _panels(result)
    looks = _looks(result, panels)
    height = max(2.5, 0.9 + 0.2 * max(map(len, panels.values())))
    figure = Figure(figsize=(9.6, 0.75 + height * len(panels)), dpi=DPI)
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 3, squeeze=False, width_ratios=(1.0, 1.0, 0.8))
    for (panel, arms), axes in zip(panels.items(), rows, strict=True):
        for plot in axes[:2]:
            plot.sharey(rows[0][0]) if plot is not rows[0][0] else None
        for place, (label, arm) in enumerate(arms.items()):
            _draw_curves(axes, result, arm, looks[label], band=len(arms) <= MAX_BANDS or place < 2)
        _draw_differences(axes[2], result, arms, looks)
        axes[1].set_xlim(left=0.0)
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes[0].set_ylabel("mean reward" if rewarded(result) else "held-out accuracy")
        titles = (f"{panel}: equal steps" if panel else "equal steps", "equal time", "minus the baseline")
        for plot, title in zip(axes, titles, strict=True):
            plot.set_title(title)
    minutes = "minutes" if timed_alone(result) else "minutes (on a shared machine: rough)"
    last = f"reward, last {result['last_steps']} steps" if rewarded(result) else "held-out accuracy"
    for plot, label in zip(rows[-1], ("step", minutes, f"{last}; 95 %"), strict=True):
        plot.set_xlabel(label)
    if any(run["status"] == "failed" for run in result["runs"]):
        looks["a run failed"] = {"color": GREY, "linestyle": "none", "marker": "X", "markersize": 7}
    lines = [rows[0][0].plot([], [], **look)[0] for look in looks.values()]
    columns = min(len(looks), 4 if max(map(len, looks)) > 22 else 6)
    figure.legend(lines, list(looks), loc="outside upper left", ncols=columns, fontsize=9.5, columnspacing=1.4)
    return figure


def study_png(result: Result) -> bytes:
    """The figure, small enough to be committed."""
    return compact(lambda: study_figure(result))


def compact(draw: Callable[[], Figure]) -> bytes:
    """A picture of few colours."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png(draw))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
