"""`tandem study`: run the arms of a question over seeds, and compare them."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tandem
from tandem.env import MOST_THREADS

if TYPE_CHECKING:
    from tandem.study.study import Planned, Study

FOLDER = Path(tandem.__file__).parent / "studies"


def study(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A study's name or path/to/study.py; without it: the list.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; by default runs/study-NAME.")] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this arm only; may be repeated.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=0, help="Run the first so many seeds; 0 runs nothing and draws the result anew.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run, in place of the study's.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads to compute with; by default all cores.")
    ] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Run nothing but a few steps of each arm, for its seconds a step.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Run what a study still lacks, then write its table, figure and page; Ctrl-C keeps what is done."""
    if name is None:
        return _list(json)
    chosen, home = find_study(name)
    if seeds == 0:
        _redraw(chosen, out or home, json)
        return 0
    from tandem import env

    given = [f"--arm {one}" for one in arm or []]
    given += [f"--{flag} {value}" for flag, value in (("seeds", seeds), ("steps", steps)) if value is not None]
    folder = out or Path("runs") / f"study-{chosen.name}"
    if threads is not None and threads != env.num_threads():
        words = ["study", name, "--out", str(folder), *" ".join(given).split(), *["--time"] * time, *["--json"] * json]
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tandem", *words, "--threads", str(threads)],
            env.child(TANDEM_THREADS=str(threads)),
        )
    from tandem.study import study as running

    base = _recipe(chosen)
    everything = running.plan(
        chosen, base, folder, chosen.arms, chosen.first_seeds(seeds), chosen.steps if steps is None else steps
    )
    names = {one.name for one in chosen.choose(arm or [])}
    wanted = [one for one in everything if one.arm.name in names]
    done = running.measure_quiet(wanted, folder, _say) if time else running.run_all(wanted, _say)
    shown = names | {one.arm.name for one in everything if one.outcome() is not None}
    planned = [one for one in everything if one.arm.name in shown]
    facts = running.facts(chosen, base, planned, folder, " ".join(["tandem study", name, *given]))
    own = home.parent == FOLDER and FOLDER.is_symlink()  # a checkout's, whose results are kept with it
    whole = own and not given and all(one.outcome() for one in everything)
    _write(facts, planned, [folder, *([home] if whole else [])], chosen.reading, json)
    if not done:
        _say("stopped; the same command goes on from here")
    return 0 if done else 130


def study_names(folder: Path = FOLDER) -> dict[str, Path]:
    """Study -> its file."""
    return {path.parent.name: path for path in sorted(folder.glob("*/study.py"))}


def find_study(name: str, folder: Path = FOLDER) -> tuple[Study, Path]:
    """A study and the folder it lies in. Raises ConfigError."""
    import importlib.util

    from tandem.errors import ConfigError, nearest
    from tandem.study.study import Study

    known = study_names(folder)
    path = known.get(name) or Path(name).expanduser()
    if name not in known and not (path.suffix == ".py" and path.is_file()):
        raise ConfigError(f"no study is named {name}.{nearest(name, known)} One of your own is given as its file.")
    spec = importlib.util.spec_from_file_location(f"tandem_study_{path.parent.name}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.study() if hasattr(module, "study") else None
    if not isinstance(made, Study):
        raise ConfigError(f"{path} has no study: write a function study() that returns a tandem.study.study.Study.")
    return made, path.parent


def _recipe(chosen: Study) -> Any:
    from tandem.cli.recipes import find_recipe

    return (find_recipe(chosen.recipe) if isinstance(chosen.recipe, str) else chosen.recipe)()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list(json: bool) -> int:
    found = [find_study(name)[0] for name in study_names()]
    if json:
        rows = [
            {
                "study": s.name,
                "question": s.question,
                "arms": [a.name for a in s.arms],
                "seeds": s.seeds,
                "steps": s.steps,
            }
            for s in found
        ]
        print(jsonlib.dumps(rows, indent=1))
        return 0
    for s in found:
        print(f"{s.name}: {s.question}\n    {len(s.arms)} arms x {len(s.seeds)} seeds x {s.steps} steps")
    return 0


def _write(facts: dict[str, Any], planned: list[Planned], folders: list[Path], reading: str, json: bool) -> None:
    from tandem.report.metrics import read_metrics
    from tandem.study.result import make_result, run_entry, write

    entries = []
    for one in planned:
        outcome = one.outcome()
        if outcome is not None:
            rows = read_metrics(one.folder) if (one.folder / "metrics.jsonl").is_file() else []
            entries.append(run_entry(one.arm.name, one.seed, outcome, rows))
    result = make_result(facts, entries)
    for folder in folders:
        write(result, folder, reading)
    _show(result, folders, json)


def _redraw(chosen: Study, folder: Path, json: bool) -> None:
    from tandem.errors import RunFolderError
    from tandem.study.result import redrawn, write

    try:
        result = jsonlib.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder} holds no result.json that can be drawn ({error}). Run the study.") from error
    result = redrawn(result, chosen)
    write(result, folder, chosen.reading)
    _show(result, [folder], json)


def _show(result: dict[str, Any], folders: list[Path], json: bool) -> None:
    from tandem.study.result import arm_rows, chance_note, comparison_rows, failures

    if json:
        runs = [{key: value for key, value in run.items() if key != "series"} for run in result["runs"]]
        print(jsonlib.dumps({**result, "runs": runs, "written": [str(folder) for folder in folders]}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for rows in (arm_rows(result), comparison_rows(result)):
        table = Table()
        for column in rows[0] if rows else ():
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
    print(chance_note(result))
    for line in failures(result):
        print(line)
    print("written: " + ", ".join(f"{folder}/README.md" for folder in folders))
