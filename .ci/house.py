"""Draws the house: its rooms in the rows of the import order, and who imports whom, read from the files.

python .ci/house.py     writes docs/pictures/house.svg; `make check` says when its arrows are no longer the imports
"""

from __future__ import annotations

import html
import sys
from collections import Counter
from pathlib import Path

import check

PICTURE = Path("docs", "pictures", "house.svg")
WIDTH, ROW, BOX_W, BOX_H, GAP = 920, 92, 150, 58, 30

# Its column, its place in a token's life, and what it holds, in the words of docs/map.md.
ROOMS: dict[str, tuple[int, str, str]] = {
    "nouns": (2, "", "types, columns, errors"),
    "numerics": (2, "", "noise, hashes, rounding"),
    "sandbox": (4, "", "code that may do harm"),
    "kernels": (2, "", "C++, Triton, references"),
    "models": (2, "", "one decoder, its families"),
    "program": (4, "1", "prompts, environments"),
    "engine": (2, "2", "requests to tokens"),
    "server": (4, "", "the wire: OpenAI's protocols"),
    "rollout": (3, "3", "tokens to trajectories"),
    "algo": (0, "4", "credit, packs, losses"),
    "corpus": (0, "", "what is written already"),
    "surgery": (2, "", "a model out of another"),
    "train": (1, "5", "losses to weights"),
    "speculate": (2, "", "tokens before they are drawn"),
    "sync": (2, "6", "weights to the engine"),
    "plan": (1, "", "memory before a run"),
    "run": (3, "", "the loop and its folder"),
    "sim": (1, "", "the scheduler without a device"),
    "report": (0, "", "pages, pictures, tables"),
    "bench": (3, "", "speed beside peers"),
    "study": (1, "", "arms and seeds"),
    "cli": (2, "", "a verb a file"),
    "recipes": (4, "", "settings with a name"),
    "studies": (0, "", "questions with a name"),
}


def rows_of(rooms: set[str]) -> list[list[str]]:
    """The rooms that there are, row by row, those below first."""
    below = [["nouns"], *[list(row) for row in check.ROWS[1:]]]
    return [kept for row in below if (kept := [room for room in row if room in rooms])]


def reduced(arrows: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The arrows that no chain of others implies."""
    aims: dict[str, set[str]] = {}
    for start, aim in arrows:
        aims.setdefault(start, set()).add(aim)

    def reached(start: str, seen: set[str]) -> set[str]:
        for aim in aims.get(start, set()) - seen:
            seen.add(aim)
            reached(aim, seen)
        return seen

    return {
        (start, aim): count
        for (start, aim), count in arrows.items()
        if not any(aim in reached(other, set()) for other in aims[start] - {aim})
    }


def draw(arrows: Counter[tuple[str, str]], sizes: dict[str, tuple[int, int]]) -> str:
    """The picture as SVG; its `desc` lists every arrow, those that are left out of the drawing too."""
    rows = rows_of(set(sizes))
    height = ROW * len(rows) + 6
    places = {}
    for number, row in enumerate(rows):
        for room in row:
            places[room] = 25 + ROOMS[room][0] * (BOX_W + GAP), height - 20 - ROW * number - BOX_H
    lines = []
    for (start, aim), count in sorted(reduced(arrows).items()):
        (x1, y1), (x2, y2) = places[start], places[aim]
        aside = max(-60.0, min(60.0, (x1 - x2) / 6))  # arrows from the left end on the left
        x1, y1, x2 = x1 + BOX_W / 2 - aside / 2, y1 + BOX_H, x2 + BOX_W / 2 + aside
        bend = (y2 - y1) / 2
        path = f"M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2 - 5:.0f}"
        lines.append(f'<path d="{path}" stroke-width="{min(5.0, 0.8 + count / 8):.1f}" marker-end="url(#tip)"/>')
    boxes = []
    for room, (x, y) in places.items():
        _, number, holds = ROOMS[room]
        files, count = sizes[room]
        kind = "apart" if room in check.APART_LINES else "life" if number else "room"
        title, middle = f"{number} {room}".strip(), x + BOX_W / 2
        boxes += [
            f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{BOX_W}" height="{BOX_H}" rx="6"/>',
            f'<text class="name" x="{middle:.0f}" y="{y + 20:.0f}">{title}</text>',
            f'<text x="{middle:.0f}" y="{y + 36:.0f}">{html.escape(holds)}</text>',
            f'<text class="size" x="{middle:.0f}" y="{y + 50:.0f}">{files} files, {count:,} lines</text>',
        ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
            "<title>The rooms of src/tandem and who imports whom</title>",
            f"<desc>{described(arrows)}</desc>",
            (
                "<style>text{font-size:11px;text-anchor:middle;fill:#222}.name{font-size:15px;font-weight:bold}"
                ".size{fill:#777;font-size:10px}rect{stroke:#555}.room{fill:#f2f2f2}.life{fill:#dcebfa}"
                ".apart{fill:#fff;stroke-dasharray:4 3}path{fill:none;stroke:#8899aa}</style>"
            ),
            (
                '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="9" markerHeight="9" '
                'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" style="fill:#8899aa;stroke:none"/>'
                "</marker></defs>"
            ),
            f'<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>',
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


def described(arrows: Counter[tuple[str, str]]) -> str:
    return "; ".join(f"{start} imports {aim}" for start, aim in sorted(arrows))


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    files = check.tracked(root)
    arrows = check.arrows(check.parse(root, files))
    (root / PICTURE).write_text(draw(arrows, check.room_sizes(root, files)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
