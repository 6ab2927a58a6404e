"""`tandem report`: what a run did."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tandem.report.ledger import Section


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="A run folder; several to compare.")],
    out: Annotated[
        Path | None, typer.Option(metavar="HTML", help="The page that compares several runs; comparison.html here.")
    ] = None,
    trajectories: Annotated[
        bool, typer.Option("--trajectories", help="Write trajectories.html too: the run's programs, turn by turn.")
    ] = False,
    steps: Annotated[
        str, typer.Option(metavar="A-B", help="Steps of that page; all, or as many of the last ones as it holds.")
    ] = "",
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Fit reward by cost, foretell more of it, and say whether to go on.")
    ] = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Say what became of each token and each second, and the goodput.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Write report.html and the plots into a run folder and print its figures; of several runs, one page over all."""
    from tandem import env
    from tandem.errors import ConfigError
    from tandem.report.advice import advise
    from tandem.report.compare import compare
    from tandem.report.html import write_report
    from tandem.report.ledger import section
    from tandem.report.metrics import alarms, read_metrics, summary
    from tandem.report.scaling_page import flop_of, write_fits
    from tandem.report.trajectories import write_trajectories_page

    if steps and not trajectories:
        raise ConfigError(f"--steps {steps} is of the page of trajectories. Add --trajectories, or drop --steps.")
    if len(run_dirs) > 1 and (trajectories or ledger):
        raise ConfigError(f"--{'ledger' if ledger else 'trajectories'} is of one run, and several are given. Give one.")
    if len(run_dirs) > 1:
        return _compare(run_dirs, out or Path("comparison.html"), scaling, json)
    if out is not None:
        raise ConfigError(f"--out {out} is for several runs; the report of one is written into its folder. Drop --out.")
    run_dir = run_dirs[0]
    programs = write_trajectories_page(run_dir, steps) if trajectories else None
    fits = write_fits(compare(run_dirs), run_dir / "scaling.png", flop_of) if scaling else None
    fates = section(run_dir, measures=True) if ledger else None
    page = write_report(run_dir, scaling=fits.section if fits else None, ledger=fates)
    rows = read_metrics(run_dir / "metrics.jsonl")
    figures, warnings, advisories = summary(rows), alarms(rows), advise(rows)
    if json:
        pages = {"report": str(page)} | ({"trajectories": str(programs.path)} if programs else {})
        seen = {"alarms": warnings, "advisories": [advisory.record() for advisory in advisories]}
        asked = (fits.record() if fits else {}) | ({"ledger": fates.record()} if fates else {})
        print(jsonlib.dumps({**figures, **seen, **asked, **pages}, indent=1))
        return 0

    from rich.console import Console

    console = Console(no_color=env.no_color())
    console.print(_table(figures))
    for warning in warnings:
        console.print(f"alarm: {warning}", markup=False, style="yellow", soft_wrap=True)
    for advisory in advisories:
        console.print(f"advisory {advisory.advice()}", markup=False, style="yellow", soft_wrap=True)
    if fits:
        fits.print(console)
    if fates:
        _print_ledger(console, fates)
    console.print(f"wrote {page}", markup=False, soft_wrap=True)
    if programs:
        console.print(f"wrote {programs.path}", markup=False, soft_wrap=True)
        if programs.note:
            console.print(programs.note, markup=False, soft_wrap=True)
    return 0


def _print_ledger(console: Console, found: Section) -> None:
    from rich.table import Table

    for title, lines in found.tables.items():
        name = "tokens" if title == "tokens" else f"seconds of {title}"
        table = Table(name, "", "share", "", box=None, padding=(0, 2, 0, 0))
        for column in table.columns[1:3]:
            column.justify = "right"
        for line in lines:
            amount = f"{line.amount:,}" if title == "tokens" else f"{line.amount:,.1f}"
            table.add_row(line.name, amount, f"{100 * line.share:.1f} %", line.meaning)
        console.print(table)
    console.print(found.headline(), markup=False, style="bold", soft_wrap=True)


def _table(figures: dict[str, Any]) -> Table:
    from rich.table import Table

    from tandem.report.compare import lines

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, (text,) in lines([figures]):
        table.add_row(name, text)
    return table


def _compare(folders: list[Path], out: Path, scaling: bool, json: bool) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tandem import env
    from tandem.report.compare import compare, write_page
    from tandem.report.scaling_page import flop_of, write_fits

    compared = compare(folders)
    fits = write_fits(compared, out.with_name(f"{out.stem}-scaling.png"), flop_of) if scaling else None
    write_page(compared, out, fits.section if fits else None)
    if json:
        print(jsonlib.dumps({**compared.record(), **(fits.record() if fits else {}), "report": str(out)}, indent=1))
        return 0
    console = Console(no_color=env.no_color())
    for rows in (compared.figures, compared.settings):
        table = Table(box=None, padding=(0, 2, 0, 0))
        for column in ("", *compared.names):
            table.add_column(escape(column), overflow="fold")
        for name, texts in rows:
            table.add_row(*(escape(text) for text in (name, *texts)))
        if rows:
            console.print(table)
    if fits:
        fits.print(console)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)
    return 0
