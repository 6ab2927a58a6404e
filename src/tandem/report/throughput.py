"""The picture of `tandem bench sweep`: decode rate over sequences and over context, beside the machine's limit."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tandem.report.metrics import Row
from tandem.report.plots import BLUE, VERMILLION, png

TICKS = tuple(mantissa * 10**power for power in range(7) for mantissa in (1, 2, 5))


def _label(value: float, _place: object = None) -> str:
    """
    >>> _label(500.0), _label(8160.0)
    ('500', '8,160')
    """
    return f"{value:,.0f}"


def _draw(axes: Axes, rows: Sequence[Row], axis: str, title: str) -> None:
    """One axis: the rate with its share of the limit beneath every other point from the last, and the limit."""
    at = [row[axis] for row in rows]
    axes.plot(at, [row["limit_tok_s"] for row in rows], color=VERMILLION, linestyle="--", label="limit of the machine")
    label = "tandem, and its share of the limit"
    axes.plot(at, [row["tok_s"] for row in rows], color=BLUE, marker="o", markersize=4, label=label)
    for row in rows[::-2]:
        share = f"{100 * row['share_of_limit']:.0f} %"
        place = (7 if axis == "sequences" else -7, -14)  # on the side where no line runs
        at_point = (row[axis], row["tok_s"])
        axes.annotate(share, at_point, xytext=place, textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(at))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_label))
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.09)
    axes.set_title(title)
    axes.set_xlabel("sequences at once" if axis == "sequences" else "context (tokens)")


def throughput_figure(rows: Sequence[Row]) -> Figure:
    """A plot an axis, sharing the rate; both axes are logarithmic."""
    figure = Figure(figsize=(8.4, 3.6))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    by_axis = {axis: [row for row in rows if row["axis"] == axis] for axis in ("sequences", "context")}
    context, sequences = by_axis["sequences"][0]["context"], by_axis["context"][0]["sequences"]
    _draw(left, by_axis["sequences"], "sequences", f"Sequences, {context} tokens of context")
    _draw(right, by_axis["context"], "context", f"Context, {sequences} sequences")
    rates = [rate for row in rows for rate in (row["tok_s"], row["limit_tok_s"])]
    left.set_ylim(min(rates) / 1.5, max(rates) * 1.3)
    left.yaxis.set_major_locator(FixedLocator(TICKS))
    left.yaxis.set_minor_locator(NullLocator())
    left.yaxis.set_major_formatter(FuncFormatter(_label))
    left.set_ylabel("decode (tokens/s)")
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines[::-1], labels[::-1], loc="outside upper right", ncols=2)
    return figure


def throughput_png(rows: Sequence[Row]) -> bytes:
    """The rows of a sweep as a PNG."""
    return png(lambda: throughput_figure(rows))
