"""The picture of `tandem bench speculate`: speed over sequences by drafter, and what stands by position."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tandem.report.plots import GREY, png

Found = dict[str, Any]


def _label(value: float, _place: object = None) -> str:
    return f"{value:,.0f}"


def speculation_figure(found: Found) -> Figure:
    """Speed over that without drafts: of code edits, and of drafts that stand at a given rate; then shares by position
    with their 95 % intervals, of one sequence."""
    figure = Figure(figsize=(10.4, 3.4))
    FigureCanvasAgg(figure)
    edits, synthetic, shares = figure.subplots(1, 3)
    for axes, work, title in (
        (edits, "code edit", "Code written again"),
        (synthetic, "synthetic", "Drafts that stand at a rate"),
    ):
        rows = [row for row in found["rows"] if row["work"] == work]
        for name in dict.fromkeys(row["drafter"] for row in rows):
            own = [row for row in rows if row["drafter"] == name]
            at, ratios = [row["sequences"] for row in own], [row["ratio"] for row in own]
            axes.plot(at, ratios, marker="o", markersize=4, label=name)
        axes.axhline(1, color=GREY, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted({row["sequences"] for row in rows})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_label))
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel("sequences at once")
        axes.set_ylabel("speed (without drafts: 1)")
        axes.legend()
    for row in found["rows"]:
        if row["work"] == "code edit" and row["sequences"] == 1 and row["at"]:
            stood = [one["accepted"] / one["drafted"] for one in row["at"]]
            low = [share - one["low"] for share, one in zip(stood, row["at"], strict=True)]
            high = [one["high"] - share for share, one in zip(stood, row["at"], strict=True)]
            places = range(1, 1 + len(stood))
            shares.errorbar(places, stood, (low, high), marker="o", markersize=4, capsize=2, label=row["drafter"])
    shares.set_ylim(0, 1)
    shares.set_title("Drafts that stand")
    shares.set_xlabel("position, of one sequence's code edits")
    shares.set_ylabel("share of those run there")
    if shares.containers:
        shares.legend()
    return figure


def speculation_png(found: Found) -> bytes:
    """The figures as a PNG."""
    return png(lambda: speculation_figure(found))
