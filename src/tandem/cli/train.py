"""`tandem train`: run a recipe."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tandem.cli.options import Assignments, ConfigFiles


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe's name, or path/to/file.py:function. A resumed run needs none.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to make; by default runs/NAME-TIME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with: its config, its last state.")] = None,
    files: ConfigFiles = None,
    settings: Assignments = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON row a step instead of the live table.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the memory that it would take, and read no weight.")
    ] = False,
) -> int:
    """Train a model by a recipe; Ctrl-C or a closed terminal finishes the step, saves and exits with 130 or 129."""
    from tandem.cli.recipes import find_recipe
    from tandem.cli.settings import assignments, say_unread
    from tandem.config import diff, override
    from tandem.errors import ConfigError

    if out is not None and resume is not None:
        raise ConfigError("--out and --resume were both given: a resumed run goes on in its own folder. Drop --out.")
    if recipe is None and resume is None:
        raise ConfigError("there is nothing to run: name a RECIPE (tandem recipes lists them), or give --resume DIR.")
    written = find_recipe(recipe)() if recipe is not None else _of_folder(Path(str(resume)))
    assigned = assignments(written, files or [], settings or [])
    started = written if resume is None else _saved(resume, written, assigned)
    config = override(started, assigned)
    if brought := [line for line in diff(written, started) if line.split(":")[0] not in assigned]:
        print(f"resuming with the config of {resume} (recipe -> run):", *brought, sep="\n  ", file=sys.stderr)

    from tandem.plan.memory import check_counts

    check_counts(config)
    say_unread(config, assigned)
    if plan:
        from tandem.run.local import plan as plan_run

        memory = plan_run(config)
        print(jsonlib.dumps(memory.record(), indent=1) if json else memory.table())
        memory.check()
        return 0

    code, folder, page = start(config, out=out, resume=resume, json=json, changed=diff(written, config))
    print(f"run folder {folder}, report {page}", file=sys.stderr if json else sys.stdout)
    return code


def train_recipe(
    recipe: str | Callable[[], Any],
    settings: Mapping[str, Any] | None = None,
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
) -> Path:
    """Train by a recipe (its name, path/to/file.py:function, or the function), with `settings` as of --set, or as
    values of Python.

    Returns the run folder. Shows the rows on stdout, as `tandem train` does; Ctrl-C finishes the step, saves and raises
    KeyboardInterrupt.
    """
    from tandem.cli.recipes import find_recipe
    from tandem.cli.settings import say_unread
    from tandem.config import diff, override
    from tandem.errors import ConfigError, WorldError
    from tandem.run.config import RunConfig

    if out is not None and resume is not None:
        raise ConfigError("out and resume were both given: a resumed run goes on in its own folder. Drop out.")
    if not isinstance(recipe, str) and not callable(recipe):
        raise ConfigError(f"the recipe is {recipe!r}. Give its name, path/to/file.py:function, or the function.")
    written = find_recipe(recipe)() if isinstance(recipe, str) else recipe()
    if not isinstance(written, RunConfig):
        raise ConfigError(f"the recipe {recipe!r} returned {written!r}; it must return a RunConfig.")
    if not isinstance(out, str | Path | None) or not isinstance(resume, str | Path | None):
        raise ConfigError(f"out is {out!r} and resume {resume!r}; a path or None is needed.")
    started = written if resume is None else _saved(Path(resume), written, settings or {})
    config = override(started, settings or {})
    say_unread(config, settings or {})
    code, folder, _ = start(
        config,
        out=None if out is None else Path(out),
        resume=None if resume is None else Path(resume),
        changed=diff(written, config),
    )
    if code > 128:  # stopped by a signal
        raise KeyboardInterrupt
    if code:
        raise WorldError(f"the run in {folder} failed; its last lines say why.")
    return folder


def start(
    config: Any, *, out: Path | None, resume: Path | None, json: bool = False, changed: Sequence[str] = ()
) -> tuple[int, Path, Path]:
    """Run a config with its display and trackers, and write its report; (exit code, run folder, report)."""
    from tandem.plan.memory import check_counts
    from tandem.report.track import Display, Tracked, check_sinks

    check_sinks(config.track.to)
    check_counts(config)

    from tandem.config import flatten, render
    from tandem.report.html import write_report
    from tandem.report.live import LiveTable
    from tandem.report.metrics import read_metrics
    from tandem.run.folder import latest_checkpoint
    from tandem.run.local import train as run
    from tandem.sync.departures import declaration

    earlier = []
    if resume is not None and (saved := latest_checkpoint(resume)) and (resume / "metrics.jsonl").is_file():
        earlier = [row for row in read_metrics(resume) if row["step"] <= saved.step]
    title = f"{config.name}  {declaration(config)}"
    display: Display = LiveTable(config.steps, title=title, as_json=json, rows=earlier)
    if config.track.to:
        out = out or (None if resume else Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        texts = {name: render(value) for name, value in flatten(config).items()}
        track, place = config.track, resume or out
        assert place is not None
        display = Tracked(display, track.to, place, track.project, track.name, texts)
    code, folder = run(config, out=out, resume=resume, display=display)
    return code, folder, write_report(folder, changed)


def _of_folder(folder: Path) -> Any:
    """The config of the run there."""
    from tandem.run.config import RunConfig
    from tandem.run.folder import saved_config

    return saved_config(folder, RunConfig)


def _saved(folder: Path, written: Any, assigned: Mapping[str, Any]) -> Any:
    """The config of the run in `folder`; RunFolderError where its name is not the recipe's, or the one assigned."""
    from tandem.errors import RunFolderError
    from tandem.run.folder import saved_config

    saved, name = saved_config(folder, type(written)), assigned.get("name", written.name)
    if saved.name != name:
        raise RunFolderError(
            f"{folder} holds the run {saved.name}, and the recipe is {name}. Give the recipe that it was started with, "
            f"and --set name={saved.name} if it was renamed."
        )
    return saved
