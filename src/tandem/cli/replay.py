"""`tandem replay`: a run once more, from its journal."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tandem.run.replay import Repeated


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder. It is not changed.")],
    workers: Annotated[int, typer.Option(help="Engines that share the groups; the weights are the same.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON row a step.")] = False,
) -> int:
    """Repeat a run from its journal and compare the weights after each step; exits with 1 where they part."""
    from tandem.errors import ConfigError

    if workers < 1:
        raise ConfigError(f"--workers is {workers}. Give 1 or more.")

    from tandem.run.replay import replay as repeat

    def show(one: Repeated) -> None:
        if json:
            row = {"step": one.step, "recorded": one.recorded, "found": one.found, "other_groups": one.other_groups}
            print(jsonlib.dumps(row), flush=True)
        else:
            said = "same" if one.same else f"PARTS: {one.found[:12]}"
            others = f", {one.other_groups} groups of other tokens" if one.other_groups else ""
            print(f"step {one.step}  {one.recorded[:12]}  {said}{others}", flush=True)

    found = repeat(run, workers=workers, on_step=show, note=lambda text: print(text, file=sys.stderr))
    parted = [one.step for one in found if not one.same]
    if not json:
        print(
            f"{len(found)} steps repeated; " + (f"the weights part at step {parted[0]}" if parted else "all the same")
        )
    return 1 if parted else 0
