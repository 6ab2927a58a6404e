"""`tandem report`: what a run did."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Write report.html and the plots into a run folder and print its figures."""
    from tandem import env
    from tandem.report.html import write_report
    from tandem.report.metrics import alarms, read_metrics, summary

    page = write_report(run_dir)
    rows = read_metrics(run_dir / "metrics.jsonl")
    figures, warnings = summary(rows), alarms(rows)
    if json:
        print(jsonlib.dumps({**figures, "alarms": warnings, "report": str(page)}, indent=1))
        return 0

    from rich.console import Console

    console = Console(no_color=env.no_color())
    console.print(_table(figures))
    for warning in warnings:
        console.print(f"alarm: {warning}", markup=False, style="yellow")
    console.print(f"wrote {page}", markup=False)
    return 0


def _table(figures: dict[str, Any]) -> Table:
    from rich.table import Table

    from tandem.report import units
    from tandem.report.live import held_out

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in (
        ("steps", units.count(figures["steps"])),
        (
            "reward",
            f"{units.decimal(figures['reward_first'])} -> {units.decimal(figures['reward_last'])} (five-step means)",
        ),
        ("held out, before", held_out(figures["evaluation_before"]) if figures["evaluation_before"] else "–"),
        ("held out, after", held_out(figures["evaluation_after"]) if figures["evaluation_after"] else "–"),
        (
            "sampled tokens",
            f"{units.count(figures['tokens'])}, {units.count(figures['tokens_per_s'])} a rollout second",
        ),
        ("failed trajectories", units.count(figures["failed"])),
        ("time", units.duration(figures["wall_s"])),
        ("by phase", ", ".join(f"{phase} {units.percent(share)}" for phase, share in figures["shares"].items())),
        ("peak memory", units.gigabytes(figures["peak_memory_bytes"])),
        ("weights", str(figures["weights"] or "–")),
    ):
        table.add_row(name, text)
    return table
