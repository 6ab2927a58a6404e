"""Pictures of number formats: what each matrix of a model loses, formats by bits and time against quality, and the page
of a format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tandem.report import plots

FLOOR = 1e-9  # of a KL that is drawn: below it fp32 is what is seen
LEAST_DB, LEAST_FACTOR = 6.0, 10.0  # that colours span at least: less is no difference to look at
STEPS = 24  # of a colour bar: a PNG's palette has them all, so they are alike


def sensitivity_figure(found: Mapping[str, Any]) -> Figure:
    """Layers by tensors, last what is of no layer: decibels, and KL where only that one is rounded."""
    cells = found["cells"]
    drawn = [
        ("SQNR of the tensor, dB", [cell["sqnr_db"] for cell in cells], False, "viridis"),
        ("KL of the model, nats a token", [cell["kl"] for cell in cells], True, "magma_r"),
    ]
    return _heat(found, drawn, f"{found['format']}, one tensor at a time: dark is worse")


def gradient_figure(found: Mapping[str, Any]) -> Figure:
    """Layers by matrices: decibels of gradients, and one less their cosine to the exact ones."""
    cells = found["cells"]
    apart = [1.0 - (cell["cosine"] if cell["cosine"] is not None else 1.0) for cell in cells]
    drawn = [
        ("SQNR of the gradient, dB", [cell["sqnr_db"] for cell in cells], False, "viridis"),
        ("1 - cosine to the exact one", apart, True, "magma_r"),
    ]
    return _heat(found, drawn, f"gradients in {found['format']}: dark is worse")


Drawn = tuple[str, Sequence[float | None], bool, str]  # title, a value a cell, whether its logarithm, colours


def _norm(values: Sequence[float], log: bool) -> Normalize:
    """Over the values; around their middle over LEAST_DB or LEAST_FACTOR where they are closer together."""
    low, high = (min(values), max(values)) if values else (FLOOR, FLOOR) if log else (0.0, 0.0)
    if log:
        spread = max(1.0, LEAST_FACTOR / (high / low)) ** 0.5
        return LogNorm(low / spread, high * spread)
    spread = max(0.0, LEAST_DB - (high - low)) / 2
    return Normalize(low - spread, high + spread)


def _heat(found: Mapping[str, Any], drawn: Sequence[Drawn], title: str) -> Figure:
    cells, layers = found["cells"], found["layers"]
    columns = list(dict.fromkeys(cell["tensor"] for cell in cells))
    out = any(cell["layer"] is None for cell in cells)
    wide = len(columns) > 8  # names beside each other would overlap
    height = max(3.4, min(10.5, 2.0 + 0.155 * (layers + out) + (0.6 if wide else 0.0)))
    figure = Figure(figsize=(min(12.0, max(7.2, 1.6 + 0.72 * len(columns))), height))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    below = False
    for axes, (name, values, log, colours) in zip((left, right), drawn, strict=True):
        grid = np.full((layers + out, len(columns)), np.nan)
        for cell, value in zip(cells, values, strict=True):
            row, column = layers if cell["layer"] is None else cell["layer"], columns.index(cell["tensor"])
            if log and value is not None and value < FLOOR:
                below, value = True, FLOOR
                axes.text(column, row, "<", ha="center", va="center", fontsize=7, color=plots.GREY)
            grid[row, column] = math.nan if value is None else value
        norm = _norm(grid[np.isfinite(grid)].tolist(), log)
        shades = colormaps[colours].resampled(STEPS)
        picture = axes.imshow(grid, aspect="auto", cmap=shades, norm=norm, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=90 if wide else 0)
        axes.grid(False)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        bar = figure.colorbar(picture, ax=axes, fraction=0.06, pad=0.03)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(labelsize=8)
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
    step = 1 if layers <= 16 else 5
    places = list(range(0, layers, step))
    left.set_yticks([*places, *[layers] * out], [*map(str, places), *["out"] * out])
    left.set_ylabel("layer")
    _entitle(figure, title, found, "; <: below 1e-9" if below else "")
    return figure


def _entitle(figure: Figure, title: str, found: Mapping[str, Any], more: str = "") -> None:
    """A title above all plots, and below them of what model and texts they are."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    of = f"{_named(found['model'])}; {found['texts']} texts, {found['tokens']:,} tokens{more}"
    figure.supxlabel(of, x=0.98, ha="right", fontsize=8.5)


def _named(model: str) -> str:
    if model.startswith("new:"):
        return "a model of random weights"
    return model.removeprefix("package:").rstrip("/").rsplit("/", 1)[-1][-40:]


@dataclass(frozen=True, slots=True)
class _Points:
    """A quality of formats: a point each, or several of one format, each of its own kind."""

    label: str
    log: bool
    down: bool  # less is better
    names: list[str]
    rows: list[Mapping[str, Any]]  # of the format: its bits and seconds
    values: list[float]
    ends: list[tuple[float, float] | None]
    kinds: list[str]
    before: float | None = None  # of the model as it was
    below: frozenset[int] = frozenset()  # places of points that lie below what is drawn: hollow


MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def pareto_figure(found: Mapping[str, Any]) -> Figure:
    """Formats by bits a parameter, and by predicted time, against KL, a task's accuracy and a study's reward as far as
    they are there; a line through those that none dominates."""
    rows = found["rows"]
    points = [_of_kl(rows), *_of_task(found), *_of_study(found)]
    figure = Figure(figsize=(8.4, 0.8 + 3.4 * len(points)))
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(points), 2, sharey="row", squeeze=False)
    seconds = max(row["seconds"] for row in rows)
    unit, scale = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    work = f"{found['phase']} {found['batch']} x {found['context']:,}"
    for place, (line, one) in enumerate(zip(grid, points, strict=True)):
        last = place + 1 == len(points)
        labels = (
            ("bits a parameter, the whole model", f"{unit}, {work} on {found['device']}, predicted")
            if last
            else ("", "")
        )
        _scatter(line[0], one, [row["bits_a_parameter"] for row in one.rows], labels[0])
        _scatter(line[1], one, [scale * row["seconds"] for row in one.rows], labels[1])
        line[0].set_ylabel(one.label)
        if len(set(one.kinds)) > 1:
            plots.draw_legend(line[1], columns=2)
    _entitle(figure, "What formats save, and what they cost", found, "; bars: 95 %")
    return figure


def _of_kl(rows: Sequence[Mapping[str, Any]]) -> _Points:
    ends = [None if row["kl_low"] is None else (max(FLOOR, row["kl_low"]), max(FLOOR, row["kl_high"])) for row in rows]
    values = [max(FLOOR, row["kl"]) for row in rows]
    names = [row["format"] for row in rows]
    below = frozenset(place for place, row in enumerate(rows) if row["kl"] < FLOOR)
    label = "KL(original || rounded), nats a token" + ("\n(hollow: below 1e-9)" if below else "")
    kinds = [""] * len(rows)
    return _Points(label, True, True, names, list(rows), values, list(ends), kinds, below=below)


def _of_task(found: Mapping[str, Any]) -> list[_Points]:
    if "task" not in found:
        return []
    of, rows = found["task"], found["rows"]
    label = f"accuracy on {of['name']}, {of['prompts']} prompts"
    own = [of["rows"][row["format"]] for row in rows]
    ends: list[tuple[float, float] | None] = [(one["low"], one["high"]) for one in own]
    names, values = [row["format"] for row in rows], [one["accuracy"] for one in own]
    return [_Points(label, False, False, names, list(rows), values, ends, [""] * len(rows), of["before"])]


def _of_study(found: Mapping[str, Any]) -> list[_Points]:
    if "study" not in found:
        return []
    of = found["study"]
    made = _Points(f"reward after {of['steps']} steps of RL", False, False, [], [], [], [], [])
    for row in found["rows"]:
        for arm in of["rows"].get(row["format"], ()):
            made.names.append(row["format"])
            made.rows.append(row)
            made.values.append(arm["reward"])
            made.ends.append(None if arm["low"] is None else (arm["low"], arm["high"]))
            made.kinds.append(arm["label"])
    return [made]


def _scatter(axes: Axes, of: _Points, across: Sequence[float], label: str) -> None:
    up, sign = of.values, 1.0 if of.down else -1.0
    best = [
        place
        for place in range(len(up))
        if not any(
            across[other] <= across[place]
            and sign * up[other] <= sign * up[place]
            and (across[other], up[other]) != (across[place], up[place])
            for other in range(len(up))
        )
    ]
    best.sort(key=lambda place: across[place])
    axes.plot(
        [across[place] for place in best], [up[place] for place in best], color=plots.GREY, linewidth=1.2, zorder=1
    )
    kinds = list(dict.fromkeys(of.kinds))
    for place, kind in enumerate(of.kinds):
        colour = plots.BLUE if place in best else plots.GREY
        ends = of.ends[place]
        if ends is not None:
            axes.plot([across[place]] * 2, ends, color=colour, linewidth=1.2, zorder=2)
        marker = MARKERS[kinds.index(kind) % len(MARKERS)]
        look: dict[str, Any] = {"color": colour, "markerfacecolor": "white" if place in of.below else colour}
        axes.plot([across[place]], [up[place]], marker=marker, markersize=5, linestyle="none", zorder=3, **look)
    for kind in kinds if len(kinds) > 1 else ():
        marker = MARKERS[kinds.index(kind) % len(MARKERS)]
        axes.plot([], [], marker=marker, markersize=5, color=plots.GREY, linestyle="none", label=kind)
    if of.before is not None:
        axes.axhline(of.before, color=plots.GREY, linewidth=0.8, linestyle=":", zorder=0)
    if of.log:
        axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_xlim(0, 1.12 * max(across))
    axes.margins(y=0.12)
    shown = [of.names.index(name) for name in dict.fromkeys(of.names)]  # once: its points lie one above the other
    highest = [
        max((at for at, one in enumerate(of.names) if one == of.names[place]), key=up.__getitem__) for place in shown
    ]
    _label(axes, of.names, across, up, highest)


def _label(
    axes: Axes, names: Sequence[str], across: Sequence[float], up: Sequence[float], shown: Sequence[int]
) -> None:
    """Names beside the points that are `shown`, each a line above or below where it would cover one that is there."""
    axes.figure.canvas.draw()  # where points are is known once the axes are laid out
    to_points = 72.0 / axes.figure.dpi
    places = axes.transData.transform(list(zip(across, up, strict=True))) * to_points
    box = axes.get_window_extent()
    ends = box.x0 * to_points, box.x1 * to_points
    taken = [(x - 4, x + 4, y) for x, y in places]  # left, right, middle of its height
    for place in sorted(shown, key=lambda one: -places[one][1]):
        x, y = places[place]
        wide = 4.7 * len(names[place])
        for shift, left in [(9.0 * step, side) for step in (0, 1, -1, 2, -2, 3, -3) for side in (False, True)]:
            start = x - 6 - wide if left else x + 6
            inside = ends[0] <= start and start + wide <= ends[1] + 4
            if inside and all(abs(y + shift - at) >= 8 or start + wide < a or b < start for a, b, at in taken):
                break
        taken.append((start, start + wide, y + shift))
        axes.annotate(
            names[place], (across[place], up[place]), xytext=(-6 if left else 6, shift - 2.5),
            textcoords="offset points", ha="right" if left else "left", fontsize=7.5,
        )  # fmt: skip
