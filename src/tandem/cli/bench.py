"""`tandem bench`: speed, always as a ratio to a peer or to the machine's limit."""

from __future__ import annotations

import json as jsonlib
from enum import Enum
from typing import Annotated, Any

import typer


class Work(str, Enum):
    ENGINE = "engine"
    LEARNER = "learner"
    STEP = "step"
    PARITY = "parity"


def bench(
    work: Annotated[
        Work,
        typer.Argument(metavar="{engine|learner|step|parity}", help="What to measure; parity: the price of exactness."),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="CMD", help="A command that does the same work and prints its figures as JSON lines."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of tandem and every peer; medians count.")] = 3,
) -> int:
    """Measure the engine, the learner, a whole step or the price of exactness beside its peers, in one sitting."""
    from tandem.run.bench import bench as run

    result = run(work.value, peer or [], rounds)
    if json:
        print(jsonlib.dumps(result, indent=1))
    else:
        _show(result)
    return 0


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tandem bench {result['bench']}: medians of {result['rounds']} rounds")
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["peers"]))
    priced = any("price" in row for row in result["rows"])
    columns = ("work", "tandem", *(f"{name} (ratio)" for name in names), "share of the limit")
    for column in (*columns, "price") if priced else columns:
        table.add_column(column, justify="left" if column == "work" else "right")
    for row in result["rows"]:
        unit = row["unit"]
        cells = [f"{row['tandem']:,.1f} {unit}"]
        for name in names:
            other = row["peers"].get(name)
            cells.append(f"{other[unit]:,.1f} {unit} ({other['ratio']:.2f} x)" if other else "")
        share = row["share_of_limit"]
        price = [f"{row['price']:.3f}" if "price" in row else ""] if priced else []
        table.add_row(row["work"], *cells, f"{share:.0%}" if share is not None else "", *price)
    Console().print(table)
    limits = result["limits"]
    if priced:
        print("price: time of the exact kernels over the library's; 1.05 is 5% for the same bits")
    print(f"limits: {limits['matrix FLOP/s'] / 1e12:.2f} TFLOP/s bf16, {limits['memory bytes/s'] / 1e9:.1f} GB/s read")
