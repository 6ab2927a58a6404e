"""`tandem report`: what a run did."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tandem.report.scaling import Scaling


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
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Write report.html and the plots into a run folder and print its figures; of several runs, one page over all."""
    from tandem import env
    from tandem.errors import ConfigError
    from tandem.report.advice import advise
    from tandem.report.html import write_report
    from tandem.report.metrics import alarms, read_metrics, summary
    from tandem.report.trajectories import write_trajectories_page

    if steps and not trajectories:
        raise ConfigError(f"--steps {steps} is of the page of trajectories. Add --trajectories, or drop --steps.")
    if len(run_dirs) > 1 and trajectories:
        raise ConfigError("--trajectories is of one run, and several are given. Give one.")
    if len(run_dirs) > 1:
        return _compare(run_dirs, out or Path("comparison.html"), scaling, json)
    if out is not None:
        raise ConfigError(f"--out {out} is for several runs; the report of one is written into its folder. Drop --out.")
    run_dir = run_dirs[0]
    programs = write_trajectories_page(run_dir, steps) if trajectories else None
    fits = _scaling(run_dirs, run_dir / "scaling.png") if scaling else None
    page = write_report(run_dir, scaling=fits.section if fits else None)
    rows = read_metrics(run_dir / "metrics.jsonl")
    figures, warnings, advisories = summary(rows), alarms(rows), advise(rows)
    if json:
        pages = {"report": str(page)} | ({"trajectories": str(programs.path)} if programs else {})
        seen = {"alarms": warnings, "advisories": [advisory.record() for advisory in advisories]}
        print(jsonlib.dumps({**figures, **seen, **(fits.record() if fits else {}), **pages}, indent=1))
        return 0

    from rich.console import Console

    console = Console(no_color=env.no_color())
    console.print(_table(figures))
    for warning in warnings:
        console.print(f"alarm: {warning}", markup=False, style="yellow")
    for advisory in advisories:
        console.print(f"advisory {advisory.advice()}", markup=False, style="yellow")
    if fits:
        fits.print(console)
    console.print(f"wrote {page}", markup=False)
    if programs:
        console.print(f"wrote {programs.path}", markup=False)
        if programs.note:
            console.print(programs.note, markup=False)
    return 0


def _table(figures: dict[str, Any]) -> Table:
    from rich.table import Table

    from tandem.report.compare import lines

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, (text,) in lines([figures]):
        table.add_row(name, text)
    return table


@dataclass(frozen=True)
class _Fits:
    """What `--scaling` found: for the pages, as JSON, and in the terminal."""

    found: list[Scaling]
    section: dict[str, Any]
    picture: Path

    def record(self) -> dict[str, Any]:
        return {"scaling": [one.record() for one in self.found], "scaling_picture": str(self.picture)}

    def print(self, console: Console) -> None:
        from rich.table import Table

        for entry in self.section["entries"]:
            console.print(f"\n{entry['headline']}", markup=False, style="bold")
            headings, *lines = entry["table"] or [[]]
            table = Table(*headings, box=None, padding=(0, 2, 0, 0))
            for line in lines:
                table.add_row(*line)
            if lines:
                console.print(table)
            for note in entry["notes"]:
                console.print(note, markup=False, style="dim")
        console.print(f"wrote {self.picture}", markup=False)


def _scaling(folders: list[Path], picture: Path) -> _Fits:
    """Fit the runs, and write the picture."""
    from base64 import b64decode

    from tandem.errors import WorldError
    from tandem.report.compare import compare
    from tandem.report.scaling import fits_of
    from tandem.report.scaling_page import section

    found = fits_of(compare(folders), _flop)
    shown = section(found)
    try:
        picture.write_bytes(b64decode(shown["picture"]["light"]))
    except OSError as error:
        raise WorldError(f"{picture} could not be written: {error.strerror}. Make room, or free the place.") from error
    return _Fits(found, shown, picture)


def _flop(folder: Path) -> Callable[[Mapping[str, Any]], float] | None:
    """The operations of a step of the run in `folder`, by its row; None where nothing there says what its model is."""
    from functools import partial

    from tandem.bench.roofline import step_flop
    from tandem.models.hf_config import from_hf_config

    plan = folder / "plan.json"
    model = jsonlib.loads(plan.read_text(encoding="utf-8")).get("model") if plan.exists() else None
    saved = next(iter((folder / "checkpoints").glob("step-*/config.json")), None)
    if model is None and saved is not None:  # a run of before plan.json said it
        model = jsonlib.loads(saved.read_text(encoding="utf-8"))
    return None if model is None else partial(step_flop, from_hf_config(model))


def _compare(folders: list[Path], out: Path, scaling: bool, json: bool) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from tandem import env
    from tandem.report.compare import compare, write_page

    compared = compare(folders)
    fits = _scaling(folders, out.with_name(f"{out.stem}-scaling.png")) if scaling else None
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
    console.print(f"wrote {out}", markup=False)
    return 0
