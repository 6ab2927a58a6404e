"""The section of a report in which lengths asked for and lengths trained stand side by side."""

from __future__ import annotations

import re

from tandem.report.html import render_report
from tandem.report.lengths import lengths_section
from tests.null.test_report import Page, run_folder, run_rows


def tenth(k: int, keep: float, interval: float, trained: int) -> dict[str, float | None]:
    kept = round(4 * keep)
    return {
        "shortest": 10 * k + 1, "longest": 10 * k + 10, "dispatched": 4, "kept": kept, "trained": trained,
        "keep": keep if kept else None, "keep_low": keep - interval if kept else None,
        "keep_high": keep + interval if kept else None, "age": k / 2 if trained else None,
        "clipped": 0.25 if trained else None,
    }  # fmt: skip


def rows_with(weights: bool = False) -> list[dict]:
    rows = run_rows()
    for row in rows[1:]:
        lengths = {"dispatched_length": 50.0, "kept_length": 40.0, "trained_length": 30.0, "cut": 4}
        row["fairness"] = lengths | {"longer": 0.8, "z": 2.0, "p_value": 0.04, "distance": 0.3}
        row["fairness"] |= {"weighted_length": 48.0} if weights else {}
        row["lengths"] = [tenth(k, 1.0 if k < 8 else 0.5, 0.0 if k < 8 else 0.25, 2 if k < 9 else 0) for k in range(10)]
    return rows


def test_the_distributions_stand_side_by_side(tmp_path):
    """Shares, keep probabilities, ages or clipped shares of another tenth; a step's z in place of that of all."""
    found = lengths_section(rows_with())
    assert found is not None and found["shown"] == {"age", "clipped", "keep"} and len(found["lines"]) == 10
    first, last = found["lines"][0], found["lines"][9]
    assert first["lengths"] == "1 to 10" and last["lengths"] == "91 to 100"
    assert first["shares"] == {"dispatched": 0.1, "kept": 4 / 36, "trained": 2 / 18}
    assert last["shares"] == {"dispatched": 0.1, "kept": 2 / 36, "trained": 0.0}
    assert (last["keep"], last["interval"], last["age"], first["interval"]) == (0.5, "[0.25, 0.75]", None, "")
    assert found["lines"][4]["age"] == 2.0 and found["lines"][4]["clipped"] == 0.25
    assert max(found["lines"][k]["bars"]["kept"] for k in range(10)) == 100.0
    assert "80 % of pairs" in found["text"] and "this is 6.9 standard deviations" in found["text"]  # 2 x sqrt(12)
    weighed = lengths_section(rows_with(weights=True))
    assert weighed is not None and "48.0 of the kept under their weights" in weighed["text"]
    text = re.sub(r"\s+", " ", " ".join(Page(render_report(run_folder(tmp_path / "run"), rows_with())).words))
    assert "Lengths asked for, and lengths trained Mean tokens a program: 50.0 asked for, 40.0 kept, 30.0" in text
    assert "91 to 100 50 % 0.50 [0.25, 0.75] – –" in text and "41 to 50 100 % 1.00 2.00 25.0 %" in text


def test_a_run_that_loses_nothing_says_so():
    """A section that speaks of pairs where nothing was left out, or columns of nothing but dashes."""
    rows = rows_with()
    for row in rows[1:]:
        row["fairness"] = {"dispatched_length": 50.0, "kept_length": 50.0, "trained_length": 30.0, "cut": 0}
        row["lengths"] = [tenth(k, 1.0, 0.0, 2) | {"age": 0.0, "clipped": 0.0} for k in range(10)]
    found = lengths_section(rows)
    assert found is not None and found["shown"] == set() and "No program was left out" in found["text"]
    assert lengths_section(run_rows()) is None
