"""The table of docs/numerics.md; `pytest tests/cpu/test_numerics_page.py --write-docs` writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.numerics.blocks import FORMATS, properties

PAGE = Path(__file__).parents[2] / "docs/numerics.md"
FIRST, LAST = "--write-docs -->\n", "<!-- end of formats -->"


def table() -> str:
    rows = [properties(form) for form in FORMATS.values()]
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        form = FORMATS[str(row["format"])]
        ends = [f"{value:.6g}" for value in (form.bits, form.shown.largest, form.shown.smallest)]
        lines.append(
            [
                f"`{form.name}`",
                form.shown.name,
                ends[0],
                str(row["block"]),
                form.scale,
                *ends[1:],
                f"{row['sqnr_db']:.1f}",
            ]
        )
    lines[0] = ["format", "element", "bits", "block", "scale", "largest", "smallest", "dB"]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def test_the_table_is_the_formats(pytestconfig: pytest.Config) -> None:
    """A format that is added, or changed, and that the page does not know."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(FIRST, 1)
    after = rest.split(LAST, 1)[1]
    wanted = before + FIRST + table() + LAST + after
    if pytestconfig.getoption("--write-docs"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "run pytest tests/cpu/test_numerics_page.py --write-docs"
