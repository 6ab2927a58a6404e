"""Lengths of what was asked for beside those of what was trained, as a report shows them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.report.metrics import Row, training
from tandem.report.units import decimal, percent

LAST = 20  # steps that are added up


def lengths_section(rows: Sequence[Row]) -> dict[str, Any] | None:
    """`steps`, `text`, and a line each tenth of the programs by length; None where no row has lengths."""
    last = [row for row in training(rows) if row.get("lengths")][-LAST:]
    if not last:
        return None
    tenths = [[row["lengths"][k] for row in last if k < len(row["lengths"])] for k in range(10)]
    totals = {name: sum(line[name] for tenth in tenths for line in tenth) for name in ("dispatched", "kept", "trained")}
    lines = [_line(tenth, totals) for tenth in tenths if tenth]
    shown = {name for name in ("age", "clipped") if any(line[name] for line in lines)}
    shown |= {"keep"} if any((line["keep"] or 1.0) < 1.0 for line in lines) else set()
    top = max(line["shares"][name] for line in lines for name in line["shares"])
    for line in lines:
        line["bars"] = {name: 100 * share / top for name, share in line["shares"].items()}
    steps = f"step {last[0]['step']}" if len(last) == 1 else f"steps {last[0]['step']} to {last[-1]['step']}"
    return {"steps": steps, "text": _text(last), "lines": lines, "shown": shown}


def _line(tenth: Sequence[Mapping[str, Any]], totals: Mapping[str, int]) -> dict[str, Any]:
    def sums(name: str) -> int:
        return sum(line[name] for line in tenth)

    def mean(name: str, of: str) -> float | None:
        known = [(line[name], line[of]) for line in tenth if line[name] is not None and line[of]]
        number = sum(count for _, count in known)
        return math.fsum(value * count for value, count in known) / number if number else None

    low, high = (statistics.median(line[name] for line in tenth) for name in ("shortest", "longest"))
    keep = [mean(name, "dispatched") for name in ("keep", "keep_low", "keep_high")]
    known = keep[0] is not None and keep[1] == keep[2]
    return {
        "lengths": f"{low:.0f} to {high:.0f}",
        "shares": {name: sums(name) / total if total else 0.0 for name, total in totals.items()},
        "kept": percent(sums("kept") / sums("dispatched")),
        "keep": keep[0],
        "interval": "" if keep[0] is None or known else f"[{decimal(keep[1], 2)}, {decimal(keep[2], 2)}]",
        "age": mean("age", "trained"),
        "clipped": mean("clipped", "trained"),
    }


def _text(rows: Sequence[Row]) -> str:
    """Mean lengths, and what the tests of these steps say together."""

    def figures(name: str) -> list[float]:
        return [row["fairness"][name] for row in rows if row["fairness"].get(name) is not None]

    said = {"dispatched": "asked for", "kept": "kept", "trained": "trained"}
    means = {word: statistics.fmean(of) for name, word in said.items() if (of := figures(f"{name}_length"))}
    text = "Mean tokens a program: " + ", ".join(f"{decimal(value, 1)} {word}" for word, value in means.items())
    if weighted := figures("weighted_length"):
        text += f", {decimal(statistics.fmean(weighted), 1)} of the kept under their weights"
    if not (z := figures("z")):
        return text + ". No program was left out for its length: nothing was late, stale, cut or failed."
    longer = statistics.fmean(figures("longer"))
    return text + (
        f". Of one left out and one kept in a step, the one left out is the longer in {percent(longer)} of pairs; by "
        f"chance it would be 50 %, from which this is {decimal(math.fsum(z) / math.sqrt(len(z)), 1)} standard "
        "deviations (rank-sum test by group)."
    )
