"""The picture of a study: reward at equal steps, at equal time, and the paired differences."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from tandem.report.plots import GREY, SERIES, png, smoothed
from tandem.study.result import Result, runs_of, step_seconds

Arm = Mapping[str, Any]
Look = dict[str, Any]

BASELINE = "#1F2328"
DPI = 160
COLOURS = 128  # of the PNG's palette: half the bytes, and no difference to the eye
MAX_BANDS = 6  # with more curves in a panel only the first two have a band
SMALL_MULTIPLES = 6  # more arms than this are cut into panels, where the study names some
LINES = ("-", (0, (4, 1.2)), (0, (1.2, 1.2)))


def _panels(result: Result) -> list[tuple[str, list[Arm]]]:
    """(name, arms) of each row of plots; arms without a panel are in all."""
    arms: Sequence[Arm] = result["arms"]
    names = list(dict.fromkeys(arm["panel"] for arm in arms if arm["panel"]))
    if len(arms) <= SMALL_MULTIPLES or not names:
        return [("", list(arms))]
    return [(name, [arm for arm in arms if arm["panel"] in ("", name)]) for name in names]


def _label(arm: Arm, panel: str) -> str:
    """An arm's name in a legend: its panel stands above the plot, where there are panels."""
    return f"{arm['panel']}, {arm['label']}" if arm["panel"] and not panel else str(arm["label"])


def _looks(result: Result, panels: Sequence[tuple[str, list[Arm]]]) -> dict[str, Look]:
    """Label -> colour and line, the same in every panel."""
    base = next((arm for arm in result["arms"] if arm["name"] == result["baseline"]), None)
    looks: dict[str, Look] = {}
    place = 0
    for panel, arms in panels:
        for arm in arms:
            label = _label(arm, panel)
            if label in looks:
                continue
            if arm is base:
                looks[label] = {"color": BASELINE, "linestyle": "-", "linewidth": 2.2, "zorder": 4}
                continue
            colour, line = SERIES[(place + 1) % len(SERIES)], LINES[place // len(SERIES) % len(LINES)]
            looks[label] = {"color": colour, "linestyle": line, "linewidth": 1.6, "zorder": 3}
            place += 1
    return looks


def _curves(result: Result, arm: Arm) -> tuple[list[float], list[float], list[float]]:
    """Mean, least and largest of the seeds' smoothed rewards, a step, over the seeds that have one there."""
    runs = [
        smoothed([math.nan if reward is None else reward for reward in run["reward"]])
        for run in runs_of(result, arm["name"])
    ]
    length = max(map(len, runs), default=0)
    columns = [[run[i] for run in runs if i < len(run) and not math.isnan(run[i])] or [math.nan] for i in range(length)]
    return [statistics.fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def _draw(axes: Sequence[Axes], result: Result, arm: Arm, look: Look, band: bool) -> None:
    """An arm's curve at equal steps and at equal time; a cross where a seed failed."""
    mean, low, high = _curves(result, arm)
    second_s = step_seconds(result, arm)
    for plot, scale in ((axes[0], 1.0), (axes[1], second_s / 60 if second_s else None)):
        if scale is None or not mean:
            continue
        at = [scale * step for step in range(1, len(mean) + 1)]
        if band:
            plot.fill_between(at, low, high, color=look["color"], alpha=0.13, linewidth=0)
        plot.plot(at, mean, **look)
        for run in runs_of(result, arm["name"]):
            if run["status"] == "failed" and run["steps"]:
                x = scale * run["steps"]
                plot.plot([x], [mean[run["steps"] - 1]], color=look["color"], marker="X", markersize=7, zorder=6)


def _differences(result: Result) -> dict[str, Mapping[str, Any]]:
    """Arm -> its reward compared with the baseline's, where a seed finished in both."""
    return {
        found["arm"]: found
        for found in result["comparisons"]
        if found["measure"] == "reward" and found["against"] == result["baseline"] and found["differences"]
    }


def _reach(result: Result) -> tuple[float, float]:
    """Ends of the axis of differences, the same in every panel: all dots are inside, wide intervals run out."""
    dots = [0.0, *(dot for found in _differences(result).values() for dot in found["differences"].values())]
    margin = 0.35 * max(max(dots) - min(dots), 0.04)
    return min(dots) - margin, max(dots) + margin


def _draw_differences(axes: Axes, result: Result, arms: Sequence[Arm], panel: str, looks: Mapping[str, Look]) -> None:
    """Each arm's reward minus the baseline's: a dot a seed, the mean with its interval; an arrow where it is cut."""
    shown = [arm for arm in arms if arm["name"] != result["baseline"]]
    found, ends = _differences(result), _reach(result)
    for place, arm in enumerate(shown):
        look, comparison = looks[_label(arm, panel)], found.get(arm["name"])
        if comparison is None:
            axes.text(0.0, place, "failed" if runs_of(result, arm["name"]) else "not run", va="center", fontsize=8.5)
            continue
        dots = list(comparison["differences"].values())
        colour = look["color"]
        axes.plot(dots, [place] * len(dots), color=colour, linestyle="none", marker="o", markersize=3.5, alpha=0.6)
        if comparison["mean"] is not None:
            low, high = max(comparison["low"], ends[0]), min(comparison["high"], ends[1])
            axes.plot([low, high], [place, place], color=colour, linewidth=1.4)
            axes.plot([comparison["mean"]], [place], color=colour, marker="D", markersize=5, zorder=5)
            for end, cut, marker in ((low, comparison["low"] < low, "<"), (high, comparison["high"] > high, ">")):
                if cut:
                    axes.plot([end], [place], color=colour, marker=marker, markersize=6, clip_on=False)
    axes.axvline(0.0, color=BASELINE, linewidth=1.0, zorder=1)
    axes.set_yticks(range(len(shown)), [_label(arm, panel) for arm in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(*ends)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))


def _limits(result: Result) -> tuple[float, float]:
    """Of the reward axis, common to all panels."""
    drawn = [value for arm in result["arms"] for curve in _curves(result, arm) for value in curve]
    values = [value for value in drawn if not math.isnan(value)] or [0.0, 1.0]
    margin = 0.05 * max(max(values) - min(values), 0.1)
    low, high = min(values) - margin, max(values) + margin
    return (max(low, -0.02), min(high, 1.02)) if min(values) >= 0.0 and max(values) <= 1.0 else (low, high)


def _legend(figure: Figure, result: Result, looks: Mapping[str, Look]) -> None:
    lines = [Line2D([], [], **look) for look in looks.values()]
    labels = list(looks)
    if any(run["status"] == "failed" for run in result["runs"]):
        lines.append(Line2D([], [], color=GREY, linestyle="none", marker="X", markersize=7))
        labels.append("a run failed")
    columns = min(len(labels), 4 if max(map(len, labels)) > 22 else 6)
    figure.legend(lines, labels, loc="outside upper left", ncols=columns, fontsize=9.5, columnspacing=1.4)


def study_figure(result: Result) -> Figure:
    """A row for each panel: by step, by time, differences from the baseline."""
    panels = _panels(result)
    looks = _looks(result, panels)
    most = max(len(arms) for _, arms in panels)
    height = max(2.5, 0.9 + 0.2 * most)
    figure = Figure(figsize=(9.6, 0.75 + height * len(panels)), dpi=DPI)
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(panels), 3, squeeze=False, width_ratios=(1.0, 1.0, 0.8))
    limits = _limits(result)
    for (panel, arms), axes in zip(panels, plots, strict=True):
        for place, arm in enumerate(arms):
            _draw(axes, result, arm, looks[_label(arm, panel)], band=len(arms) <= MAX_BANDS or place < 2)
        for plot in axes[:2]:
            plot.set_ylim(*limits)
        axes[1].set_xlim(left=0.0)
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _draw_differences(axes[2], result, arms, panel, looks)
        head = f"{panel}: " if panel else ""
        axes[0].set_title(f"{head}equal steps")
        axes[1].set_title("equal time")
        axes[2].set_title("minus the baseline")
        axes[0].set_ylabel("mean reward")
    quiet = all("quiet_seconds_per_step" in arm for arm in result["arms"])
    plots[-1][0].set_xlabel("step")
    plots[-1][1].set_xlabel("minutes" if quiet else "minutes (on a shared machine: rough)")
    plots[-1][2].set_xlabel(f"reward, last {result['last_steps']} steps; 95 %")
    _legend(figure, result, looks)
    return figure


def study_png(result: Result) -> bytes:
    """The figure, small enough to be committed."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png(lambda: study_figure(result)))).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
