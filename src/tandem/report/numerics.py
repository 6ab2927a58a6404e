"""Pictures of number formats: what each matrix of a model loses, formats by bits and time against quality, and the page
of a format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from tandem.report import plots

FLOOR = 1e-9  # of a KL that is drawn: below it fp32 is what is seen


def sensitivity_figure(found: Mapping[str, Any]) -> Figure:
    """Layers by matrices: decibels, and KL where only that one is rounded."""
    columns = list(dict.fromkeys(cell["tensor"] for cell in found["cells"]))
    layers = found["layers"]
    decibels, kl = (np.full((layers, len(columns)), np.nan) for _ in range(2))
    for cell in found["cells"]:
        at = cell["layer"], columns.index(cell["tensor"])
        decibels[at] = math.nan if cell["sqnr_db"] is None else cell["sqnr_db"]
        kl[at] = max(FLOOR, cell["kl"])
    figure = Figure(figsize=(7.2, min(9.0, 2.0 + 0.155 * layers)))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    low, high = float(np.nanmin(kl)), float(np.nanmax(kl))
    drawn = [
        (left, decibels, "SQNR of the matrix, dB", Normalize(np.nanmin(decibels), np.nanmax(decibels)), "viridis"),
        (right, kl, "KL of the model, nats a token", LogNorm(low, max(high, 1.01 * low)), "magma_r"),
    ]
    for axes, values, title, norm, colours in drawn:
        picture = axes.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(columns)), columns)
        axes.grid(False)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        bar = figure.colorbar(picture, ax=axes, fraction=0.06, pad=0.03)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(labelsize=8)
    step = 1 if layers <= 16 else 5
    left.set_yticks(range(0, layers, step))
    left.set_ylabel("layer")
    _entitle(figure, f"{found['format']}, one matrix at a time: dark is worse", found)
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


def pareto_figure(found: Mapping[str, Any]) -> Figure:
    """Formats by bits a parameter, and by predicted time, against KL; a line through those that none dominates."""
    rows = found["rows"]
    figure = Figure(figsize=(8.4, 4.2))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    seconds = max(row["seconds"] for row in rows)
    unit, scale = ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    work = f"{found['phase']} {found['batch']} x {found['context']:,}"
    _scatter(left, rows, [row["bits_a_parameter"] for row in rows], "bits a parameter, the whole model")
    _scatter(right, rows, [scale * row["seconds"] for row in rows], f"{unit}, {work} on {found['device']}, predicted")
    left.set_ylabel("KL(original || rounded), nats a token")
    _entitle(figure, "What formats save, and what they cost in KL", found, "; bars: 95 % over texts")
    return figure


def _scatter(axes: Axes, rows: Sequence[Mapping[str, Any]], across: Sequence[float], label: str) -> None:
    up = [max(FLOOR, row["kl"]) for row in rows]
    best = [
        place
        for place in range(len(rows))
        if not any(
            across[other] <= across[place]
            and up[other] <= up[place]
            and (across[other], up[other]) != (across[place], up[place])
            for other in range(len(rows))
        )
    ]
    best.sort(key=lambda place: across[place])
    axes.plot(
        [across[place] for place in best], [up[place] for place in best], color=plots.GREY, linewidth=1.2, zorder=1
    )
    for place, row in enumerate(rows):
        colour = plots.BLUE if place in best else plots.GREY
        if row["kl_low"] is not None:
            ends = max(FLOOR, row["kl_low"]), max(FLOOR, row["kl_high"])
            axes.plot([across[place]] * 2, ends, color=colour, linewidth=1.2, zorder=2)
        axes.plot([across[place]], [up[place]], marker="o", markersize=5, color=colour, linestyle="none", zorder=3)
    axes.set_yscale("log")
    axes.set_xlabel(label)
    axes.set_xlim(0, 1.12 * max(across))
    axes.margins(y=0.12)
    _label(axes, [row["format"] for row in rows], across, up)


def _label(axes: Axes, names: Sequence[str], across: Sequence[float], up: Sequence[float]) -> None:
    """Names beside points, each a line above or below where it would cover one that is there already."""
    axes.figure.canvas.draw()  # where points are is known once the axes are laid out
    to_points = 72.0 / axes.figure.dpi
    places = axes.transData.transform(list(zip(across, up, strict=True))) * to_points
    box = axes.get_window_extent()
    ends = box.x0 * to_points, box.x1 * to_points
    taken = [(x - 4, x + 4, y) for x, y in places]  # left, right, middle of its height
    for place in sorted(range(len(names)), key=lambda one: -places[one][1]):
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
