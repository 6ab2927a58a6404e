"""Tables of text, of any width."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(headings: tuple[str, ...], rows: Sequence[Sequence[str]], left: tuple[str, ...]) -> None:
    """A table of any width."""
    widths = [max(len(row[place]) for row in [list(headings), *rows]) for place in range(len(headings))]
    for row in [list(headings), *rows]:
        cells = zip(row, widths, headings, strict=True)
        print("  ".join(f"{one:<{wide}}" if of in left else f"{one:>{wide}}" for one, wide, of in cells).rstrip())
