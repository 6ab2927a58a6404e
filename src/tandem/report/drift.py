"""The drift between the policy that sampled and the policy that was trained, as a report shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.algo.alarm import BELOW, METRICS
from tandem.algo.drift import MEANINGS
from tandem.report import units
from tandem.report.metrics import Row, series, training


def drift_table(rows: Sequence[Row], thresholds: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line a metric: what it is, the last and the worst value, the step of the worst, and its threshold."""
    table = []
    for name in METRICS:
        steps, values = series(training(rows), name)
        if not values:
            continue
        worst = min(values) if name in BELOW else max(values, key=abs)
        threshold = thresholds.get(name)
        table.append(
            {
                "name": name,
                "what": MEANINGS[name][1],
                "last": units.decimal(values[-1]),
                "worst": units.decimal(worst),
                "step": str(steps[values.index(worst)]),
                "threshold": "off" if threshold is None else f"{'<' if name in BELOW else '>'} {threshold:g}",
            }
        )
    return table


def by_length(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """The last step's drift by length decile."""
    trained = [row for row in training(rows) if row.get("by_length")]
    return list(trained[-1]["by_length"]) if trained else []
