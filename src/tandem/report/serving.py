"""What `tandem bench serve` found, as Markdown tables, and the picture of its sweep over streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tandem.report.plots import BLUE, VERMILLION, png

Found = Mapping[str, Any]
OUTCOMES = ("asked", "answered", "refused", "withdrawn", "failed", "lost")  # of the calls of a soak
FAULTS = {"step": "steps that raised", "engine": "engines killed"}  # that a soak makes


def names_of(found: Found) -> list[str]:
    """Tandem, then the peer where there is one."""
    return ["tandem", *([found["peer"]] if found.get("peer") else [])]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), f"|{'---|' * len(cells)}"]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms"


def starts(found: Found) -> list[str]:
    start, peer = found["start"], found.get("peer")
    told = f"{start['tandem']:.1f} s"
    if peer:
        told += f"; {peer} {start[peer]:.1f} s: **{start['ratio']:.1f} x**"
    what = "from the command to the end of a first answer of 8 tokens, kernels built; the best of the rounds"
    return [*_head("what", "found", "wanted"), _row(what, told, f"{found['wanted']['start']:g} x")]


def overheads(found: Found) -> list[str]:
    over, wanted = found["overhead"], found["wanted"]["overhead"]
    what = f"{over['streams']} seeded streams, {over['prompt']} tokens in, {over['new']} out: over the engine alone"
    spread = f"{over['least']:+.1%} to {over['most']:+.1%} in {over['pairs']} pairs"
    told = f"{over['http_s']:.2f} s over {over['alone_s']:.2f} s: **{over['overhead']:+.1%}** ({spread})"
    cpu = f"{over['server_cpu_s']:.1f} s; client {over['client_cpu_s']:.2f} s"
    return [*_head("what", "found", "wanted", "processor time"), _row(what, told, f"at most {wanted:.0%}", cpu)]


def loads(found: Found) -> list[str]:
    told, wanted, peer = found["load"], found["wanted"], found.get("peer")
    lines = []
    if peer:
        ours, theirs = (told["sides"][name] for name in names_of(found))
        rates = f"{ours['saturation']['tok_s']:,.0f} tok/s; {peer} {theirs['saturation']['tok_s']:,.0f} tok/s"
        first = [_ms(side["arrivals"]["ttft_s"]["p99"]) for side in (ours, theirs)]
        late = f"{first[0]}; {peer} {first[1]}: **{told['first_ratio']:.2f} x**"
        lines = [
            *_head("what", "found", "wanted"),
            _row("output at saturation", f"{rates}: **{told['ratio']:.2f} x**", f"{wanted['saturation']:g} x"),
            _row(f"p99 to the first token at half of {peer}'s saturation", late, "1 x"),
            "",
        ]
    means = f"{told['mean_in']:.0f} in and {told['mean_out']:.0f} out"
    lines += [
        f"Tokens in: {told['in']}; out: {told['out']}. Of what was asked at once the means were {means}.",
        "",
        *_head(
            "load",
            "server",
            "tok/s",
            "first token p50, p99",
            "between events p50, p99",
            "whole p50, p99",
            "processor s",
        ),
    ]
    works = {
        "saturation": "{calls} calls, all at once",
        "arrivals": f"{{calls}} calls, Poisson, {told['call_s']:.2f} a second",
    }
    for work, spelt in works.items():
        for name in names_of(found):
            side = told["sides"][name][work]
            calls = spelt.format(calls=side["calls"] // found["rounds"])
            times = (f"{_ms(side[key]['p50'])}, {_ms(side[key]['p99'])}" for key in ("ttft_s", "itl_s", "e2e_s"))
            cpu = f"{side['server_cpu_s']:.1f}; client {side['client_cpu_s']:.2f}"
            lines.append(_row(calls, name, f"{side['tok_s']:,.0f}", *times, cpu))
    return lines


def sweeps(found: Found) -> list[str]:
    points = found["sweep"]
    lines = _head("streams", "server", "tok/s", "tok/s of one stream", "first token p50, p99")
    for point in points:
        for name in names_of(found):
            side = point[name]
            first = f"{_ms(side['ttft_s']['p50'])}, {_ms(side['ttft_s']['p99'])}"
            lines.append(
                _row(str(point["streams"]), name, f"{side['tok_s']:,.0f}", f"{side['user_tok_s']:,.1f}", first)
            )
    return lines


TABLES: Mapping[str, Callable[[Found], list[str]]] = {
    "start": starts,
    "overhead": overheads,
    "load": loads,
    "sweep": sweeps,
}


def tables(found: Found) -> dict[str, str]:
    """The tables of what was measured by part, as Markdown."""
    return {part: "\n".join(told(found)) for part, told in TABLES.items() if part in found}


def written(page: str, found: Found) -> str:
    """A page with the tables of what was measured between the marks of their parts. ValueError where marks are missing.

    >>> written("no marks", {})
    Traceback (most recent call last):
    ValueError: it has no <!-- serve/start: written by tandem bench serve --> with <!-- end of serve/start --> behind it
    """
    told = tables(found)
    for part in TABLES:
        begin, end = f"<!-- serve/{part}: written by tandem bench serve -->", f"<!-- end of serve/{part} -->"
        before, begins, rest = page.partition(begin)
        _, ends, after = rest.partition(end)
        if not (begins and ends):
            raise ValueError(f"it has no {begin} with {end} behind it")
        if part in told:
            page = f"{before}{begin}\n\n{told[part]}\n\n{end}{after}"
    return page


def soaked(found: Found) -> str:
    """What a soak found, a table."""
    rows = [_row(kind, *(f"{counts[name]:,}" for name in OUTCOMES)) for kind, counts in found["calls"].items()]
    rows.append(_row("**all**", *(f"{found['total'][name]:,}" for name in OUTCOMES)))
    again = f"{found['repeated']:,} seeded answers were asked again, {found['differed']:,} of them differed"
    grown = f"{found['slope_mb_h']:+,.1f} MB an hour (allowed: {found['allowed_mb_h']:,.0f})"
    held = f"{found['resident_mb']:,.0f} MB after its warm-up"
    made = ", ".join(f"{count} {FAULTS.get(name, name)}" for name, count in found["faults"].items())
    tools = ", ".join(f"{count:,} {name}" for name, count in found["tools"].items())
    told = f"In {found['seconds']:,.0f} s: {again}. The server had {held}, and grew by {grown}."
    told += f" Faults that were made: {made or 'none'}." + (f" Tools: {tools}." if tools else "")
    return "\n".join([*_head("call", *OUTCOMES), *rows, "", told])


def _label(value: float, _place: object = None) -> str:
    return f"{value:,.0f}"


def _axes(axes: Axes, at: Sequence[int], title: str, unit: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(at)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_label))
    axes.yaxis.set_major_formatter(FuncFormatter(_label))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams at once")
    axes.set_title(title)
    axes.set_ylabel(unit)


def serving_figure(found: Found) -> Figure:
    """Over the number of streams: all tokens a second, those of one stream, and the time to a first token."""
    figure = Figure(figsize=(10.4, 3.4))
    FigureCanvasAgg(figure)
    points, plots = found["sweep"], figure.subplots(1, 3)
    at = [point["streams"] for point in points]
    values = (
        ("All streams", "output (tokens/s)", lambda side: side["tok_s"]),
        ("One stream", "output of one (tokens/s)", lambda side: side["user_tok_s"]),
        ("First token, median", "time (ms)", lambda side: 1e3 * side["ttft_s"]["p50"]),
    )
    for axes, (title, unit, value) in zip(plots, values, strict=True):
        for name, colour, marker in zip(names_of(found), (BLUE, VERMILLION), "os", strict=False):
            axes.plot(
                at, [value(point[name]) for point in points], color=colour, marker=marker, markersize=4, label=name
            )
        _axes(axes, at, title, unit)
    lines, labels = plots[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper right", ncols=2)
    return figure


def serving_png(found: Found) -> bytes:
    """The sweep of a result as a PNG."""
    return png(lambda: serving_figure(found))
