"""`tandem rollout`: the programs of a recipe, with no training."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.options import Assignments, ConfigFiles

# Other programs than these run where a batch is to be learned of; said of a recipe's too.
OF_A_STEP = ("rollout.redraws", "rollout.extra_prompts", "select.window", "select.first_samples")
USED = ("name", "seed", "model.", "task.", "engine.", "rollout.", "workers.", "remote.")
UNUSED = (*OF_A_STEP, "engine.replicas", "engine.answer_s", "workers.learner")
WHY = "it runs the programs of a step once, keeps them all, and learns nothing"


class Split(str, Enum):
    """Whose prompts are asked."""

    TRAIN = "train"
    HELDOUT = "heldout"


def rollout(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or path/to/file.py:function.")],
    programs: Annotated[
        int | None, typer.Option(metavar="N", help="Programs to run, in groups as in training; a step's by default.")
    ] = None,
    split: Annotated[Split, typer.Option(help="The prompts: those of training, or the held-out ones.")] = Split.TRAIN,
    out: Annotated[Path | None, typer.Option(help="Folder to make; by default runs/NAME-rollout-TIME.")] = None,
    files: ConfigFiles = None,
    settings: Assignments = None,
    json: Annotated[bool, typer.Option("--json", help="Print the row as JSON instead of the live table.")] = False,
) -> int:
    """Run a task's programs without training, and write the page in which they are read: trajectories.html."""
    from tandem.cli.recipes import find_recipe
    from tandem.cli.settings import assignments, say_unused
    from tandem.config import flatten, override

    written = find_recipe(recipe)()
    assigned = assignments(written, files or [], settings or [])
    config = override(written, assigned)
    of_step = [name for name in OF_A_STEP if flatten(config)[name]]
    say_unused("rollout", [*assigned, *of_step], USED, UNUSED, WHY)

    from tandem.report.html import write_report
    from tandem.report.live import failed
    from tandem.report.programs import ProgramsTable
    from tandem.report.trajectories import write_trajectories_page
    from tandem.report.units import count, decimal
    from tandem.rollout.watch import Progress
    from tandem.run.counted import COUNTED
    from tandem.run.rollout import roll_out, sized
    from tandem.sync.departures import declaration

    config = sized(config, programs, split.value)
    prompts, group = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    folder = out or Path("runs") / f"{config.name}-rollout-{time.strftime('%Y%m%d-%H%M%S')}"
    title = f"{config.name}  {prompts} {split.value} prompts x {group} programs, no training  {declaration(config)}"
    progress = Progress(prompts * group)
    with ProgramsTable(progress, title, quiet=json):
        code, row = roll_out(config, split.value, folder, progress)
    if row is None:
        print(f"tandem: stopped before a group had ended; {folder} keeps no program", file=sys.stderr)
        return code
    page = write_trajectories_page(folder)
    write_report(folder)
    if json:
        print(jsonlib.dumps({**row, "run": str(folder), "page": str(page.path)}))
        return code
    facts = [f"reward {decimal(row['reward'])}", f"length {decimal(row['length'], 1)}", failed(row)]
    print("  ".join(filter(None, facts)))
    for reason in row["failures"][1:]:
        print(f"  {reason}")
    print("  ".join(f"{name} {count(row[name])}" for name in COUNTED if name in row))
    if happened := row.get("happened"):
        print("  ".join(f"{name} {count(number)}" for name, number in happened.items()))
    print(f"run folder {folder}, page {page.path}")
    return code
