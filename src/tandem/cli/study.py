"""`tandem study`: run the arms of a question over seeds, and compare them."""

from __future__ import annotations

import json as jsonlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tandem
from tandem import env
from tandem.env import MOST_THREADS
from tandem.errors import ConfigError, RunFolderError, nearest

if TYPE_CHECKING:
    from tandem.study.study import Study

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
    from tandem.study import simulated

    if name in (exact := simulated.simulations(FOLDER)):
        others = {"--arm": arm or None, "--seeds": seeds, "--steps": steps, "--time": time or None}
        if odd := [flag for flag, value in others.items() if value is not None]:
            raise ConfigError(f"{name} is a simulation, which has no arms, seeds or steps. Drop {', '.join(odd)}.")
        folder = out or (exact[name].parent if FOLDER.is_symlink() else Path("runs") / f"study-{name}")
        found = simulated.read(exact[name]).write(folder)
        print(jsonlib.dumps({**found, "written": str(folder)}, indent=1) if json else f"written: {folder}/README.md")
        return 0
    if find_spec("scipy") is None:
        raise ConfigError("a study's intervals need scipy, not installed here: pip install 'tandem-rl[study]'.")
    chosen, home = find_study(name)
    if seeds == 0:
        folder = out or home
        _write(chosen, _saved(chosen, folder), [folder], json)
        return 0
    if threads is not None:
        env.set_threads(threads)
    from tandem.cli.recipes import find_recipe
    from tandem.study import runs
    from tandem.study.result import collect
    from tandem.study.study import plan

    given = [f"--arm {one}" for one in arm or []]
    given += [f"--{flag} {value}" for flag, value in (("seeds", seeds), ("steps", steps)) if value is not None]
    folder = out or Path("runs") / f"study-{chosen.name}"
    base = (find_recipe(chosen.recipe) if isinstance(chosen.recipe, str) else chosen.recipe)()
    everything = plan(chosen, base, folder, chosen.arms, chosen.first_seeds(seeds), steps or chosen.steps)
    names = {one.name for one in chosen.choose(arm or [])}
    wanted = [one for one in everything if one.arm.name in names]
    done = runs.time_all(wanted, folder, _say) if time else runs.run_all(wanted, _say)
    ended = {one.arm.name for one in everything if one.outcome() is not None}
    shown = [one for one in everything if one.arm.name in names | ended]
    result = collect(chosen, base.name, shown, folder, " ".join(["tandem study", name, *given]))
    own = home.parent == FOLDER and FOLDER.is_symlink()  # a checkout's, whose results are kept with it
    whole = own and not given and all(one.outcome() for one in everything)
    _write(chosen, result, [folder, *([home] if whole else [])], json)
    if not done:
        _say("stopped; the same command goes on from here")
    return 0 if done else 130


def study_names(folder: Path = FOLDER) -> dict[str, Path]:
    """Study -> its file."""
    return {path.parent.name: path for path in sorted(folder.glob("*/study.py"))}


def find_study(name: str, folder: Path = FOLDER) -> tuple[Study, Path]:
    """A study and the folder it lies in. Raises ConfigError."""
    import importlib.util

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


def _saved(chosen: Study, folder: Path) -> dict[str, Any]:
    """A folder's result under the study's present words. Raises RunFolderError."""
    from tandem.study.result import complete

    try:
        result = jsonlib.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder} holds no result.json that can be drawn ({error}). Run the study.") from error
    return complete(result, chosen, result["runs"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list(json: bool) -> int:
    from tandem.study import simulated

    found = [find_study(name)[0] for name in study_names()]
    exact = [simulated.read(path) for path in simulated.simulations(FOLDER).values()]
    if json:
        rows = [{name: getattr(s, name) for name in ("question", "seeds", "steps")} for s in found]
        arms = [{"study": s.name, "arms": [arm.name for arm in s.arms]} for s in found]
        more = [{"study": s.name, "question": s.question} for s in exact]
        print(jsonlib.dumps([*({**one, **row} for one, row in zip(arms, rows, strict=True)), *more], indent=1))
        return 0
    for s in found:
        print(f"{s.name}: {s.question}\n    {len(s.arms)} arms x {len(s.seeds)} seeds x {s.steps} steps")
    for one in exact:
        print(f"{one.name}: {one.question}\n    a simulation")
    return 0


def _write(chosen: Study, result: dict[str, Any], folders: list[Path], json: bool) -> None:
    """result.json, figure.png and README.md into each folder, and the tables to the reader."""
    from tandem.study import page
    from tandem.study.figure import compact, study_png
    from tandem.study.result import dumps, failures

    section = chosen.section(result) if chosen.section is not None else None
    pictures = {"figure.png": study_png(result)}
    if section is not None:
        pictures |= {name: compact(draw) for name, draw in section.pictures.items()}
    text = page.readme(result, chosen.reading, section.text if section is not None else "")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(dumps(result), encoding="utf-8")
        for picture, content in pictures.items():
            (folder / picture).write_bytes(content)
        (folder / "README.md").write_text(text, encoding="utf-8")
    if json:
        runs = [{key: value for key, value in run.items() if key != "series"} for run in result["runs"]]
        print(jsonlib.dumps({**result, "runs": runs, "written": [str(folder) for folder in folders]}, indent=1))
        return
    from rich.console import Console
    from rich.markdown import Markdown

    for table in (page.arms_table(result), page.differences_table(result)):
        Console().print(Markdown(table))
    print("\n".join([page.chance_note(result), *failures(result)]))
    print("written: " + ", ".join(f"{folder}/README.md" for folder in folders))
