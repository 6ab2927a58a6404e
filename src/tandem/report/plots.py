"""PNGs of a run. Each `*_figure` returns a matplotlib Figure; `png` renders it. No global state, no display.

Widths are 6 inches at 200 dpi: shown at 600 px the smallest text is 11 px high. Colours are Okabe and Ito's,
told apart by colour-blind readers ("Color Universal Design", 2008); line styles and labels repeat what they say.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tandem.report.kept import write_file
from tandem.report.metrics import Row, graded, loss_unit, measure, seconds_by_phase, series, training

# Places in the colour cycle of the style, so that the dark style can brighten them.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, YELLOW = "C0", "C1", "C2", "C3", "C4", "C5", "C6"
SERIES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
PHASES = {
    "rollout": BLUE,
    "learner": ORANGE,
    "update": VERMILLION,
    "reward": GREEN,
    "evaluate": SKY,
    "publish": PURPLE,
    "checkpoint": YELLOW,
}
GREY = "#9AA0A6"
STEPS = "step (optimiser updates)"

STYLE: dict[Any, Any] = {
    "figure.figsize": (6.0, 3.4),
    "figure.dpi": 200,
    "figure.facecolor": "#FFFFFF",
    "savefig.facecolor": "#FFFFFF",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": "#1F2328",
    "axes.prop_cycle": cycler(color=["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442"]),
    "axes.facecolor": "#FFFFFF",
    "axes.edgecolor": "#8B949E",
    "axes.labelcolor": "#1F2328",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.xmargin": 0.02,
    "grid.color": "#D0D7DE",
    "grid.linewidth": 0.6,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "xtick.color": "#57606A",
    "ytick.color": "#57606A",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
}
DARK: dict[Any, Any] = {
    "figure.facecolor": "#161B22",
    "savefig.facecolor": "#161B22",
    "text.color": "#E6EDF3",
    "axes.prop_cycle": cycler(color=["#4C9FE6", "#EC7A2C", "#1FBF92", "#E69F00", "#DB93BA", "#A8DAF8", "#F0E442"]),
    "axes.facecolor": "#161B22",
    "axes.edgecolor": "#6E7681",
    "axes.labelcolor": "#E6EDF3",
    "grid.color": "#30363D",
    "xtick.color": "#9DA7B3",
    "ytick.color": "#9DA7B3",
}

_NAME, _LEGEND = 28, 70  # characters of a name in a legend, and of a line of them
_SMOOTHING = 5  # steps averaged in the bold reward line, the step and those before it


def smoothed(values: Sequence[float], window: int = _SMOOTHING) -> list[float]:
    """Mean of each value and up to window - 1 before it.

    >>> smoothed([0.0, 1.0, 2.0], window=2)
    [0.0, 0.5, 1.5]
    """
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def draw_axes(title: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one plot whose x axis counts steps."""
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(STEPS)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))
    return figure, axes


def fitted(labels: Sequence[str], columns: int, width: float = 6.0) -> tuple[list[str], int]:
    """The labels of a legend, long ones without their beginning, and in how many columns they fit that many inches."""
    labels = [label if len(label) <= _NAME else f"…{label[1 - _NAME :]}" for label in labels]
    return labels, max(1, min(columns, int(_LEGEND * width / 6.0) // max(map(len, labels), default=1)))


def draw_legend(axes: Axes, columns: int = 4, reverse: bool = False) -> None:
    """Above the plot, where no curve is hidden by it. Long names lose their beginning; many make the figure higher."""
    handles, labels = axes.get_legend_handles_labels()
    if reverse:
        handles, labels = handles[::-1], labels[::-1]
    labels, columns = fitted(labels, columns)
    lines = 1 + (len(labels) - 1) // columns
    figure = axes.get_figure(root=True)
    if figure is not None and lines > 2:
        figure.set_figheight(figure.get_figheight() + 0.2 * (lines - 2))
    axes.legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=columns, columnspacing=1.2)
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=10 + 14 * lines)


def reward_figure(rows: Sequence[Row]) -> Figure:
    """Mean reward of each step, its mean over five steps, and held-out accuracy with its 95 % interval."""
    both = measure(rows) == "reward"
    figure, axes = draw_axes(
        "Reward and held-out accuracy" if both else "Held-out accuracy", "mean reward, accuracy" if both else "accuracy"
    )
    steps, rewards = series(training(rows), "reward")
    if steps:
        axes.plot(
            steps, rewards, color=BLUE, linewidth=1.0, alpha=0.5, marker="o", markersize=2.2, label="reward, each step"
        )
        axes.plot(steps, smoothed(rewards), color=BLUE, label=f"mean of {_SMOOTHING} steps")
    held_out = graded(rows)
    if held_out:
        at, accuracy, means = _held_out(held_out)
        low = [entry.get("low", entry["accuracy"]) for entry in held_out]
        high = [entry.get("high", entry["accuracy"]) for entry in held_out]
        axes.fill_between(at, low, high, color=VERMILLION, alpha=0.16, linewidth=0)
        errors = [
            [a - b for a, b in zip(accuracy, low, strict=True)],
            [b - a for a, b in zip(accuracy, high, strict=True)],
        ]
        axes.errorbar(
            at, accuracy, yerr=errors, color=VERMILLION, marker="D", markersize=4.5, linewidth=1.4, linestyle="--",
            elinewidth=1.4, capsize=3, label="held-out accuracy, 95 %",
        )  # fmt: skip
        if means:
            axes.plot(at, means, color=VERMILLION, marker="s", markersize=4.0, linestyle=":", label="held-out reward")
        rewards = rewards + accuracy + means
    values = rewards
    if values and 0.0 <= min(values) and max(values) <= 1.0:
        axes.set_ylim(0.0, 1.0)
    draw_legend(axes, columns=3)
    return figure


def _held_out(entries: Sequence[Row]) -> tuple[list[int], list[float], list[float]]:
    """(steps, accuracies, mean rewards) of `graded`; no mean rewards where each is right or wrong."""
    accuracy = [entry["accuracy"] for entry in entries]
    means = [entry.get("reward", entry["accuracy"]) for entry in entries]
    return [entry["step"] for entry in entries], accuracy, means if means != accuracy else []


def loss_figure(rows: Sequence[Row]) -> Figure:
    """Loss of each step, where it is what a run goes by."""
    return loss_curves_figure([("", rows)], f"Loss, and its mean of {_SMOOTHING} steps")


def loss_curves_figure(curves: Sequence[tuple[str, Sequence[Row]]], title: str) -> Figure:
    """Smoothed loss of the runs that learn from texts, each step's faint behind it."""
    shown = [rows for _, rows in curves if measure(rows) == "loss"]
    figure, axes = draw_axes(title, " or ".join(dict.fromkeys(map(loss_unit, shown or [()]))))
    for place, (label, rows) in enumerate(curves):
        if measure(rows) == "loss":
            _draw_smoothed(axes, place, label, rows, "loss")
            held = [(row["step"], row["heldout"]["loss"]) for row in rows if row.get("heldout")]
            if held:
                at, losses = zip(*held, strict=True)
                colour, named = (_look(place)[0] if label else VERMILLION), f"{label} held out".strip()
                axes.plot(at, losses, color=colour, marker="D", markersize=4.5, linewidth=1.4, ls="--", label=named)
    if any(label for label, _ in curves) or axes.get_legend_handles_labels()[1]:
        draw_legend(axes)
    return figure


def _look(place: int) -> tuple[str, str]:
    """Colour and line of a run among others."""
    return SERIES[place % len(SERIES)], ("-", "--", "-.", ":")[place % 4]


def _draw_smoothed(axes: Axes, place: int, label: str, rows: Sequence[Row], name: str) -> list[float]:
    """A run's curve in the colour and line of its place, each step's value faint behind it; the steps' values."""
    colour, line = _look(place)
    steps, values = series(training(rows), name)
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smoothed(values), color=colour, linestyle=line, label=label)
    return values


def lengths_figure(rows: Sequence[Row]) -> Figure:
    """Mean and largest number of sampled tokens a trajectory."""
    titles = ("Response length", "sampled tokens") if measure(rows) == "reward" else ("Text length", "tokens")
    figure, axes = draw_axes(*titles)
    for name, label, colour, line in (("length_max", "longest", VERMILLION, "--"), ("length", "mean", BLUE, "-")):
        steps, values = series(rows, name)
        axes.plot(steps, values, color=colour, linestyle=line, label=label)
    axes.set_ylim(bottom=0)
    draw_legend(axes)
    return figure


def entropy_figure(rows: Sequence[Row]) -> Figure:
    """Mean entropy of the policy at the tokens it sampled."""
    figure, axes = draw_axes("Entropy of the policy", "nats per token")
    axes.plot(*series(rows, "entropy"), color=BLUE)
    axes.set_ylim(bottom=0)
    return figure


def time_figure(rows: Sequence[Row]) -> Figure:
    """Seconds of each step by phase, stacked; the legend gives each phase's share of the whole run."""
    figure, axes = draw_axes("Where the time went", "seconds per step")
    timed = [row for row in rows if row.get("seconds")]
    steps = [row["step"] for row in timed]
    totals = seconds_by_phase(timed)
    spent = sum(totals.values())
    floor = [0.0] * len(timed)
    spare = iter(colour for colour in SERIES if colour not in PHASES.values())
    for phase, total in totals.items():
        heights = [float(row["seconds"].get(phase, 0.0)) for row in timed]
        colour = PHASES.get(phase) or (GREY if phase == "other" else next(spare, GREY))
        share = f"{100 * total / spent:.0f} %" if spent else ""
        axes.bar(steps, heights, bottom=floor, width=0.86, color=colour, linewidth=0, label=f"{phase} {share}")
        floor = [below + height for below, height in zip(floor, heights, strict=True)]
    draw_legend(axes, columns=4)
    return figure


def reward_curves_figure(curves: Sequence[tuple[str, Sequence[Row]]], title: str = "Reward of each seed") -> Figure:
    """Smoothed reward of several runs, each step's reward faint behind it; held-out accuracy as marks, and held-out
    mean reward as others where rewards are more than right or wrong."""
    figure, axes = draw_axes(title, "mean reward, accuracy")
    values: list[float] = []
    marks = {"held-out accuracy": "D", "held-out reward": "s"}
    shown: set[str] = set()
    for place, (label, rows) in enumerate(curves):
        colour, _ = _look(place)
        values += _draw_smoothed(axes, place, label, rows, "reward")
        at, *held_out = _held_out(graded(rows))
        for (name, mark), means in zip(marks.items(), held_out, strict=True):
            if means:
                look: dict[str, Any] = {"marker": mark, "markersize": 5, "markeredgecolor": "white", "clip_on": False}
                axes.plot(at, means, color=colour, linestyle="none", **look)
                values += means
                shown.add(name)
    if all(0.0 <= value <= 1.0 for value in values):
        axes.set_ylim(0.0, 1.0)
    for name, mark in marks.items():
        if name in shown:
            axes.plot([], [], color=GREY, linestyle="none", marker=mark, markersize=5, label=name)
    draw_legend(axes)
    return figure


def budget_figure(rows: Sequence[Row]) -> Figure:
    """The lines of the error budget that are nats a token, by step."""
    figure, axes = draw_axes("Error budget", "mean |Δ log p|, nats per token")
    lines = [{"step": row["step"], **row["error_budget"]} for row in training(rows) if row.get("error_budget")]
    for name, colour, style in (("staleness", BLUE, "-"), ("mismatch", VERMILLION, "--"), ("sampling", GREEN, "-.")):
        axes.plot(*series(lines, name), color=colour, linestyle=style, label=name)
    axes.set_ylim(bottom=0)
    draw_legend(axes)
    return figure


Curve = tuple[str, str, float]  # a row's name, what it is with its unit, and what a unit is worth
UPDATE: tuple[Curve, ...] = (
    ("grad_norm", "gradient norm", 1.0),
    ("lr", "learning rate", 1.0),
    ("clip_fraction", "clipped, share", 1.0),
)
ANSWERS: tuple[Curve, ...] = (
    ("length", "mean length", 1.0),
    ("entropy", "entropy, nats", 1.0),
    ("tokens_per_s", "tokens/s", 1.0),
)
CRITIC: tuple[Curve, ...] = (
    ("value_loss", "value loss", 1.0),
    ("explained_variance", "explained var.", 1.0),
    ("returns_mean", "mean return", 1.0),
)
PREFERENCE: tuple[Curve, ...] = (
    ("preference_accuracy", "right, share", 1.0),
    ("reward_margin", "margin, reward", 1.0),
    ("chosen_logprob", "log p, nats", 1.0),
)
TEACHER: tuple[Curve, ...] = (
    ("divergence", "divergence, nats", 1.0),
    ("teacher_nll", "-log p, nats", 1.0),
    ("hidden_positive", "hidden states", 1.0),
)
LIMITS: tuple[Curve, ...] = (
    ("kl", "KL, nats", 1.0),
    ("truncated", "cut off, share", 1.0),
    ("peak_memory_bytes", "memory, GB", 1e9),
)


def strips_figure(title: str, curves: Sequence[Curve], runs: Sequence[tuple[str, Sequence[Row]]]) -> Figure:
    """Plots under each other over one axis of steps, a line a run; a legend where runs are told apart.

    One a curve that any run has: an axis without a curve would read as 0.
    """
    curves = [curve for curve in curves if any(series(training(rows), curve[0])[0] for _, rows in runs)] or curves
    figure = Figure(figsize=(6.0, 1.1 + 1.1 * len(curves)))
    FigureCanvasAgg(figure)
    drawn_on = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for place, (axes, (name, label, unit)) in enumerate(zip(drawn_on, curves, strict=True)):
        for number, (run, rows) in enumerate(runs):
            steps, values = series(training(rows), name)
            colour, line = _look(number)
            drawn = [value / unit for value in values]
            axes.plot(steps, drawn, color=colour, linestyle=line, linewidth=1.4, label=run)
            axes.update_datalim([(steps[0], 1.08 * max(drawn))] if drawn else [])
        axes.autoscale_view()
        axes.set_ylabel(label)
        axes.set_ylim(bottom=_floor(name, axes))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))
        if place == 0:
            axes.set_title(title)
            if any(run for run, _ in runs):
                draw_legend(axes, columns=3)
    drawn_on[-1].set_xlabel(STEPS)
    figure.align_ylabels()
    return figure


def _floor(name: str, axes: Axes) -> float:
    """0, or the lowest value below it; -1 for a share of a variance, which has no lower end."""
    low = min(0.0, axes.dataLim.y0)
    return max(-1.0, low) if name == "explained_variance" else low


def update_figure(rows: Sequence[Row]) -> Figure:
    """Gradient norm before clipping, learning rate, and the share of tokens whose ratio was clipped."""
    return strips_figure("The updates", UPDATE, [("", rows)])


def agents_figure(rows: Sequence[Row]) -> Figure:
    """What programs of several turns did: turns, and what happened in them by name, a program."""
    names = dict.fromkeys(name for row in rows for name in row.get("happened") or ())
    curves: list[Curve] = [("turns", "turns", 1.0), *((name, name.replace("_", " "), 1.0) for name in names)]
    counted = []
    for row in rows:
        programs = row.get("trajectories") or 1
        counted.append({**row, **{name: number / programs for name, number in (row.get("happened") or {}).items()}})
    return strips_figure("Programs of several turns: counts a program", curves, [("", counted)])


def critic_figure(rows: Sequence[Row]) -> Figure:
    """A critic's loss, what it knew of the returns' variance, and the mean of its values beside that of the returns."""
    figure = strips_figure("The critic", CRITIC, [("", rows)])
    _draw_beside(figure.axes[-1], rows, "returns", "values_mean", "values")
    figure.axes[-1].set_ylabel("mean, reward")
    return figure


def preference_figure(rows: Sequence[Row]) -> Figure:
    """Pairs whose chosen answer has the higher reward, by how much, and the log-probs of both sides."""
    figure = strips_figure("The preferences", PREFERENCE, [("", rows)])
    _draw_beside(figure.axes[-1], rows, "chosen", "rejected_logprob", "rejected")
    return figure


def teacher_figure(rows: Sequence[Row]) -> Figure:
    """How far a student is from its teacher: their distributions, what both make of the tokens, hidden states."""
    figure = strips_figure("The teacher", TEACHER, [("", rows)])
    for axes in figure.axes:
        if axes.get_ylabel() == "-log p, nats" and any("teacher_nll" in row for row in rows):
            _draw_beside(axes, rows, "teacher", "nll", "student")
    return figure


def _draw_beside(axes: Axes, rows: Sequence[Row], label: str, name: str, other: str) -> None:
    """Another key in the plot of one, where rows have it."""
    steps, values = series(training(rows), name)
    if steps:
        (line,) = axes.get_lines()
        line.set_label(label)
        axes.plot(steps, values, color=VERMILLION, linestyle="--", linewidth=1.4, label=other)
        axes.set_ylim(bottom=min(axes.get_ylim()[0], *values))
        axes.legend(loc="best", ncols=2)


AHEAD: list[Curve] = [
    ("lag", "lag, updates", 1.0),
    ("running_groups", "groups that run", 1.0),
    ("waiting_groups", "that wait", 1.0),
    ("stale_groups", "dropped", 1.0),
]


def ahead_figure(rows: Sequence[Row]) -> Figure:
    """How far rollouts ran ahead: updates between a group's first token and its step, and groups in each state."""
    return strips_figure("Ahead of the learner", AHEAD, [("", rows)])


def limits_figure(rows: Sequence[Row]) -> Figure:
    """What tells trouble: KL of learner against behaviour, answers cut at their longest, peak memory."""
    return strips_figure("Drift and limits", LIMITS, [("", rows)])


FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "reward": reward_figure,
    "loss": loss_figure,
    "lengths": lengths_figure,
    "entropy": entropy_figure,
    "time": time_figure,
    "update": update_figure,
    "critic": critic_figure,
    "preference": preference_figure,
    "teacher": teacher_figure,
    "agents": agents_figure,
    "ahead": ahead_figure,
    "limits": limits_figure,
    "budget": budget_figure,
}


def png(draw: Callable[[], Figure], dark: bool = False) -> bytes:
    """Draw in the house style and render.

    >>> png(lambda: entropy_figure([{"step": 1, "entropy": 0.5}]))[:4]
    b'\\x89PNG'
    """
    return _rendered(draw, dark)[0]


def both(draw: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """What `png` gives, light and dark. The dark one takes the light one's layout: finding it is half of a draw."""
    light, placed = _rendered(draw)
    return light, _rendered(draw, True, placed)[0]


def _rendered(draw: Callable[[], Figure], dark: bool = False, placed: Figure | None = None) -> tuple[bytes, Figure]:
    with mpl.rc_context({**STYLE, **(DARK if dark else {})}):
        buffer, figure = io.BytesIO(), draw()
        _show_points(figure)
        for axes, twin in zip(figure.axes, placed.axes, strict=True) if placed else ():
            figure.set_layout_engine("none")
            axes.set_position(twin.get_position())
        # No date in the file: the same rows give the same bytes. Not `savefig`, which draws all of it twice.
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue(), figure


def _show_points(figure: Figure) -> None:
    """A run of one step has no lines: its points are marked, on an axis of whole steps."""
    for axes in figure.axes:
        for line in axes.get_lines():
            if len(line.get_xdata()) == 1 and line.get_marker() == "None":  # type: ignore[arg-type]
                line.set(marker="o", markersize=5)
        if axes.get_xscale() == "linear" and axes.get_autoscalex_on() and 0.0 <= axes.dataLim.width < 1.0:
            middle = (axes.dataLim.x0 + axes.dataLim.x1) / 2
            axes.set_xlim(middle - 1.0, middle + 1.0)


def shows(figure: Figure) -> bool:
    """Whether anything is drawn: the axes of a figure without a value end at -0.04 and 0.04, and read as zeros."""
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return any(axes.patches for axes in figure.axes) or any(np.size(line.get_xdata()) for line in lines)


def save_plots(rows: Sequence[Row], folder: Path | str) -> dict[str, tuple[bytes, bytes]]:
    """Write a PNG a figure that shows anything into `folder` as NAME.png; name -> it, and it in dark. budget.png only
    where engine and learner ever differed."""
    folder = Path(folder)
    pictures = {}
    drifted = any(any((row.get("error_budget") or {}).values()) for row in rows)
    for name, figure in FIGURES.items():
        if (name == "budget" and not drifted) or not shows(figure(rows)):
            continue
        pictures[name] = both(partial(figure, rows))
        write_file(folder / f"{name}.png", pictures[name][0])
    return pictures
