"""`tandem eval`: how a recipe's model, a run or any model does on held-out prompts, alone and beside another."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tandem.cli.options import Assignments, ConfigFiles

if TYPE_CHECKING:
    from tandem.program.config import TaskConfig
    from tandem.run.config import RunConfig
    from tandem.run.evaluate import Evaluated
    from tandem.types import Prompt

GSM8K_TEMPLATE = "{question}\nThink step by step, then end with the answer as a number."
GSM8K_NEW_TOKENS = 256  # room for the steps; a recipe for sums has less. Of a model without a recipe too

FILE_TASKS = ("gsm8k", "jsonl")
OF_TASKS = ("task.", "rollout.", "evaluation.")

DRAWN = ("evaluation.samples", "evaluation.temperature", "evaluation.top_k", "evaluation.top_p")
USED = ("model.", "task.", "engine.", "rollout.", "evaluation.prompts", *DRAWN, "remote.")
OF_TRAINING = ("prompts_per_step", "samples_per_prompt", "redraws", "extra_prompts", "keep_tokens")
OF_DRAWING = ("temperature", "top_k", "top_p", "min_p")
OF_ENGINES = (
    "replicas",
    "answer_s",
    "dtype",
    "weights",
    "weight_group",
    "kv_dtype",
    "logits",
    "kv_window",
    "kv_sinks",
    "noise",
)
UNUSED = (*(f"rollout.{name}" for name in (*OF_TRAINING, *OF_DRAWING)), *(f"engine.{name}" for name in OF_ENGINES))
WHY = "it answers held-out prompts as evaluation.* says, by the model's own weights, and learns nothing"
# Settings that say what was asked and how, for whoever compares: of a file of answers.
TOLD = ("rollout.max_new_tokens", "rollout.max_turns", "rollout.stop_strings", "rollout.history", *DRAWN, "seed")
WRITE_SHARE = 50  # answers are written after this many times what the last writing took: 2 % of an evaluation
UNTOLD = ("task.workers", "task.python", "task.memory_bytes", "task.sandbox.", "task.path", "task.heldout_path")


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN_DIR|MODEL|FILE.json",
            help="A recipe (before training), a run folder, a model as of generate, or answers that --out kept.",
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task, or another than the recipe's: gsm8k, jsonl, or a reasoning-gym name. Again for more."
        ),
    ] = None,
    path: Annotated[Path | None, typer.Option(help="The questions and answers (jsonl) of gsm8k or jsonl.")] = None,
    suite: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tasks: a .toml or .yaml file with a table of settings for each."),
    ] = None,
    files: ConfigFiles = None,
    settings: Assignments = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Keep all answers and figures there, to be compared.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Compare, prompt by prompt, with answers that --out kept.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, a line a task.")] = False,
) -> int:
    """Measure accuracy, pass@k and maj@k on held-out prompts, with 95 % intervals."""
    from tandem.errors import ConfigError
    from tandem.report.evaluation import check_same, read_results

    other = read_results(against) if against is not None else None
    _say_unfinished(other, str(against))
    if target.endswith(".json") and Path(target).expanduser().is_file():
        if task or path or suite or files or settings or out:
            raise ConfigError(f"{target} holds answers, and nothing is asked anew: give --against and --json alone.")
        results = read_results(Path(target))
        _say_unfinished(results, target)
        code = _show(results, json, {})
        _show_compared(other, results, str(against), json)
        return code
    kept = _kept(out)
    tasks = tasks_of(target, (task or [], path, suite), (files or [], settings or []))
    results = _begun(out, kept, target, tasks)
    if other is not None and not tasks.keys() & other["tasks"].keys():
        raise ConfigError(
            f"--against {against} has {', '.join(other['tasks'])}, and none of {', '.join(tasks)}, which are asked "
            "here. Ask the same tasks, under the same names."
        )
    from tandem.run.evaluate import evaluate_tasks

    theirs = other["tasks"] if other is not None else {}
    for name in theirs.keys() & results["tasks"].keys():
        check_same(name, theirs[name], results["tasks"][name])

    def check(name: str, prompts: Sequence[Prompt]) -> None:
        if name in theirs:
            check_same(name, theirs[name], tasks[name].beforehand(prompts))

    left = {name: asked.config for name, asked in tasks.items() if name not in results["tasks"]}
    with _Keeping(out, results, tasks) as keeping:
        for one in evaluate_tasks(left, check, results.get("weights", ""), keeping.rows(), keeping.add):
            keeping.end(one)
            if len(tasks) > 1:
                typer.echo(f"{one.name}: {_line(results['tasks'][one.name]['figures'])}", err=True)
    code = _show(results, json, {name: asked.counts for name, asked in tasks.items()})
    _show_compared(other, results, str(against), json)
    return code


def _kept(out: Path | None) -> dict[str, Any] | None:
    """What `out` has, where its last tasks were not asked. ConfigError where it is there, and nothing is missing."""
    from tandem.errors import ConfigError
    from tandem.report.evaluation import read_results

    if out is None or not out.expanduser().exists():
        return None
    there = f"--out {out} is there already. Give another name, or remove it."
    try:
        kept = read_results(out)
    except ConfigError as error:
        raise ConfigError(there) from error
    if not kept.get("unfinished"):
        raise ConfigError(there)
    return kept


def _begun(out: Path | None, kept: dict[str, Any] | None, target: str, tasks: Mapping[str, Asked]) -> dict[str, Any]:
    """The results so far. ConfigError where those that are kept are of another target, model or settings."""
    from tandem.errors import ConfigError
    from tandem.run.source import rounded_by

    model = next(iter(tasks.values())).config.model
    results = {"target": target, "model": model.source, "rounded": rounded_by(model), "tasks": {}}
    results["unfinished"] = list(tasks)
    if kept is None:
        return results
    known: dict[str, tuple[Any, Any]] = {"its target": (kept.get("target"), target)}
    known["its model"] = (kept.get("model"), results["model"])
    known["how it is rounded"] = (kept.get("rounded", {}), results["rounded"])
    known["the tasks"] = (sorted([*kept["tasks"], *kept["unfinished"]]), sorted(tasks))
    begun = kept.get("begun", {})
    for name, of in {**kept["tasks"], **begun}.items() if known["the tasks"][0] == known["the tasks"][1] else ():
        told = tasks[name].told()
        known |= {f"{key} of {name}": (of["settings"].get(key), told.get(key)) for key in of["settings"].keys() | told}
    if differing := [f"{key} {pair[0]} there and {pair[1]} here" for key, pair in known.items() if pair[0] != pair[1]]:
        raise ConfigError(
            f"--out {out} is there already, unfinished, and not of this command: {'; '.join(sorted(differing))}. Give "
            "another name, or remove it."
        )
    has = [*kept["tasks"], *(f"{len(of['prompts'])} prompts of {name}" for name, of in begun.items())]
    typer.echo(f"{out} has {', '.join(has)}; going on with {', '.join(kept['unfinished'])}.", err=True)
    return kept


def _say_unfinished(results: Mapping[str, Any] | None, path: str) -> None:
    from tandem.errors import ConfigError

    if results is not None and not results["tasks"]:
        raise ConfigError(f"{path} is unfinished: none of its tasks has ended. Go on with the command that began it.")
    if results is not None and (names := results.get("unfinished")):
        typer.echo(f"{path} is unfinished: {', '.join(names)} not asked yet, and not in the figures.", err=True)


@dataclass(frozen=True, slots=True)
class Asked:
    """A task to be asked."""

    config: RunConfig
    counts: dict[str, int]  # of a file's lines and questions

    def told(self) -> dict[str, str]:
        """The settings that say what is asked and how."""
        from tandem.config import flatten, render

        return {
            name: render(value)
            for name, value in flatten(self.config).items()
            if name in TOLD or (name.startswith("task.") and not name.startswith(UNTOLD))
        }

    def beforehand(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What is known of its result before a sample is drawn."""
        from tandem.rollout.answers import prompt_hash

        rows = [{"id": prompt.id, "hash": prompt_hash(prompt)} for prompt in prompts]
        return {"settings": self.told(), "prompts": rows}

    def result(self, one: Evaluated) -> dict[str, Any]:
        """What is kept of it."""
        from tandem.report.evaluation import figures

        return {"settings": self.told(), "figures": figures(one.rows), "prompts": one.rows}


class _Keeping:
    """What has been answered, in `results` and, where `out` is given, in its file: written as answers come, seldom
    enough that it takes little of the time, and in any case when a task or the evaluation ends."""

    def __init__(self, out: Path | None, results: dict[str, Any], tasks: Mapping[str, Asked]) -> None:
        self.out, self.results, self.tasks = out, results, tasks
        self.next_s, self.unwritten = 0.0, False

    def __enter__(self) -> _Keeping:
        return self

    def __exit__(self, *_: object) -> None:
        if self.unwritten:
            self._write()

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Of tasks that were begun, by their names."""
        return {name: list(of["prompts"]) for name, of in self.results.get("begun", {}).items()}

    def add(self, name: str, row: Mapping[str, Any], weights: str) -> None:
        """The answers to one prompt."""
        begun = self.results.setdefault("begun", {})
        begun.setdefault(name, {"settings": self.tasks[name].told(), "prompts": []})["prompts"].append(row)
        self.results["weights"], self.unwritten = weights, True
        if time.monotonic() >= self.next_s:
            self._write()

    def end(self, one: Evaluated) -> None:
        """All answers to a task."""
        self.results.get("begun", {}).pop(one.name, None)
        self.results["tasks"][one.name] = self.tasks[one.name].result(one)
        self.results["weights"] = one.weights
        self.results["unfinished"] = [name for name in self.tasks if name not in self.results["tasks"]]
        for key in ("begun", "unfinished"):
            if not self.results.get(key):
                self.results.pop(key, None)
        self._write()

    def _write(self) -> None:
        from tandem.report.evaluation import write_results

        started_s, self.unwritten = time.monotonic(), False
        if self.out is not None:
            write_results(self.out.expanduser(), self.results)
        ended_s = time.monotonic()
        self.next_s = ended_s + WRITE_SHARE * (ended_s - started_s)


def _line(found: Mapping[str, Any]) -> str:
    from tandem.report.live import failed, held_out

    return ", ".join(filter(None, (held_out(found), failed(found))))


def _show(results: Mapping[str, Any], json: bool, counts: Mapping[str, Mapping[str, int]]) -> int:
    """A line of JSON a task; a line for one task with one sample a prompt, else a table. The exit code: 1 where no
    sample of a task could be graded."""
    from tandem.report.evaluation import figures, table
    from tandem.report.live import failed, held_out

    found = {name: figures(of["prompts"]) for name, of in results["tasks"].items()}
    target, model = results.get("target"), results.get("model")
    code = 0 if all(of["prompts"] for of in found.values()) else 1
    if json:
        for name, of in found.items():
            print(jsonlib.dumps({"target": target, "model": model, "task": name, **counts.get(name, {}), **of}))
        return code
    if len(found) == 1 and (of := next(iter(found.values())))["samples"] <= 1:
        shown = ", ".join(filter(None, (held_out(of), failed(of))))
        print(f"{model} on {next(iter(found))}: {shown}")
        return code
    print("\n".join([str(model), *table(found)]))
    return code


def _show_compared(first: Mapping[str, Any] | None, second: Mapping[str, Any], against: str, json: bool) -> None:
    from tandem.report.evaluation import compare, compared_lines

    if first is None:
        return
    found = compare(first, second)
    if json:
        print(jsonlib.dumps({"against": against, "comparison": found}))
    else:
        print("\n".join([f"against {first.get('model')} ({against})", *compared_lines(found)]))


def tasks_of(
    target: str, named: tuple[list[str], Path | None, Path | None], given: tuple[list[Path], list[str]]
) -> dict[str, Asked]:
    """Every task to be asked, by its name. ConfigError where there is none, or two of one name."""
    from tandem.cli.settings import assignments, say_unused
    from tandem.config import override
    from tandem.errors import ConfigError
    from tandem.run.source import say_trained_as

    (names, path, suite), (read, is_model) = named, _read(target)
    assigned = assignments(read, *given)
    read = override(read, say_trained_as(target, assigned, taken="eval"))
    if is_model and not names and path is suite is None and not any(name.startswith("task.") for name in assigned):
        from tandem.models.checkpoint import open_checkpoint
        from tandem.run.source import origin_of

        open_checkpoint(origin_of(target)[0])  # where there is no such model, that is what is wrong
        raise ConfigError(
            f"{target} is a model: say what to ask it. Give --task NAME (a reasoning-gym data set), --task gsm8k or "
            "jsonl with --path FILE.jsonl, --suite FILE.toml, or --set task.environment=..."
        )
    found: dict[str, Asked] = {}
    all_names = set(assigned)
    if suite is not None and (names or path):
        raise ConfigError("--suite names all tasks. Leave --task and --path out, or write them into it.")
    for name, config, its_own in _by_suite(read, suite, assigned, is_model) if suite is not None else ():
        whole = "task.heldout_path" in its_own and "task.heldout_size" not in its_own
        found[name] = _of_file(config, its_own) if whole else Asked(config, {})
        all_names |= its_own
    for said, config in _by_flags(read, names, path) if suite is None else ():
        config = override(config, assigned)
        if (name := said or config.task.label) in found:
            raise ConfigError(f"two tasks are named {name}. Drop one, or give each a name of its own in a --suite.")
        whole = path is not None and config.task.heldout_path == str(path)
        found[name] = _of_file(config, assigned) if whole else Asked(config, {})
    drawn = any(asked.config.evaluation.temperature for asked in found.values())
    say_unused("eval", all_names, (*USED, "seed") if drawn else USED, UNUSED, WHY)
    if not all(asked.config.evaluation.prompts for asked in found.values()):
        raise ConfigError("evaluation.prompts is 0: nothing would be asked. Set evaluation.prompts to 1 or more.")
    return found


def _by_suite(
    read: RunConfig, suite: Path, assigned: Mapping[str, str], is_model: bool
) -> Iterator[tuple[str, RunConfig, set[str]]]:
    """(Name, config, names of its settings) of each table; one that names a task begins with that one's defaults, and
    all lines of a file are asked where it does not say how many."""
    from tandem.cli.settings import read_tables
    from tandem.config import override
    from tandem.errors import ConfigError
    from tandem.program.config import TaskConfig
    from tandem.program.prompts import lines_of

    for name, table in read_tables(suite, read, "--suite").items():
        where = f"--suite {suite} [{name}]"
        if other := [key for key in table if key != "seed" and not key.startswith(OF_TASKS)]:
            raise ConfigError(
                f"{where} sets {other[0]}. A task has a seed and settings of {', '.join(OF_TASKS)}; all tasks share "
                "the model and its engine, which --set changes."
            )
        base, settings = read, {**table, **assigned}
        if not {"task.environment", "task.name"}.isdisjoint(settings):
            base = replace(read, task=TaskConfig())
            settings = {"task.format": read.task.format} | settings  # how the model is asked, whatever the task
        elif is_model:
            raise ConfigError(f"{where} names no task. Set task.name (reasoning-gym's), or task.environment.")
        path = settings.get("task.heldout_path")
        if path and "task.heldout_size" not in settings:
            lines = str(sum(1 for line in lines_of(path) if line.strip()))
            settings = {"evaluation.prompts": lines} | settings | {"task.heldout_size": lines}
        yield name, override(base, settings), {*table, *assigned}


def _by_flags(read: RunConfig, names: list[str], path: Path | None) -> Iterator[tuple[str | None, RunConfig]]:
    """(Its name, the config) of each --task, or of the recipe's own, which was given none."""
    from tandem.errors import ConfigError

    of_files = [name for name in names if name in FILE_TASKS]
    if len(names) > 1 and path is not None and len(of_files) != 1:
        raise ConfigError(
            f"--path is for one task of a file, and --task names {', '.join(of_files) or 'none'}. Write several into a "
            "--suite, each with its task.heldout_path."
        )
    every: list[str | None] = [*names] or [None]
    for name in every:
        yield name, _with_task(read, name, path if len(names) < 2 or name in FILE_TASKS else None)


def _read(target: str) -> tuple[RunConfig, bool]:
    """(The config of a run folder, its model the run's newest checkpoint; or a recipe's; or one around a model, whether
    it is that)."""
    from tandem.cli.recipes import find_recipe, recipe_names
    from tandem.config import load
    from tandem.errors import RunFolderError
    from tandem.models.config import ModelConfig
    from tandem.rollout.config import RolloutConfig
    from tandem.run.config import RunConfig

    folder = Path(target).expanduser()
    bare = RunConfig("eval", 1, ModelConfig(target), rollout=RolloutConfig(max_new_tokens=GSM8K_NEW_TOKENS))
    if not folder.is_dir():
        named = target in recipe_names() or ".py" in target
        model = not named and (target.startswith("package:") or target.endswith(".gguf") or "/" in target)
        return (bare, True) if model else (find_recipe(target)(), False)
    if not (folder / "checkpoints").is_dir():
        return bare, True
    try:
        written = jsonlib.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder} is no run folder: its config.json cannot be read ({error}).") from error
    config = load(RunConfig, written)
    return replace(config, model=replace(config.model, source=str(folder))), False


def _with_task(config: RunConfig, task: str | None, path: Path | None) -> RunConfig:
    """`config` evaluated on another task; questions of a file are all held out."""
    from tandem.errors import ConfigError
    from tandem.program.config import TaskConfig
    from tandem.program.prompts import lines_of

    if task is None and path is None:
        return config
    prompts = config.evaluation.prompts or 128
    if task in (*FILE_TASKS, None):
        if path is None:
            raise ConfigError(f"--task {task} needs its file: --path FILE.jsonl.")
        prompts = sum(1 for line in lines_of(str(path)) if line.strip())
        chosen: TaskConfig = replace(
            TaskConfig("jsonl", heldout_path=str(path), reward="last_number" if task == "gsm8k" else "score"),
            heldout_size=prompts,
        )
        if task == "gsm8k":
            longer = max(config.rollout.max_new_tokens, GSM8K_NEW_TOKENS)
            config = replace(config, rollout=replace(config.rollout, max_new_tokens=longer))
            chosen = replace(chosen, template=GSM8K_TEMPLATE)
    elif path is not None:
        raise ConfigError(f"--path is for --task gsm8k and jsonl, not for the reasoning-gym task {task}. Drop one.")
    else:
        chosen = TaskConfig("reasoning_gym", name=task, heldout_size=prompts)
    chosen = replace(chosen, format=config.task.format)  # how the model is asked, whatever the task
    return replace(config, task=chosen, evaluation=replace(config.evaluation, prompts=prompts))


def _of_file(config: RunConfig, given: Collection[str]) -> Asked:
    """`config` with no more held-out questions than its file has distinct ones, which is said on stderr."""
    from tandem.program.prompts import question_key, read_questions

    path = config.task.heldout_path
    prompts = read_questions(config.task, path)
    questions = len(set(map(question_key, prompts)))
    taken = min(config.evaluation.prompts, questions)
    task = replace(config.task, heldout_size=max(taken, min(config.task.heldout_size, questions)))
    config = replace(config, task=task, evaluation=replace(config.evaluation, prompts=taken))
    repeats = f", {len(prompts) - questions} repeated" if len(prompts) > questions else ""
    fewer = "" if "evaluation.prompts" in given else " --set evaluation.prompts=N takes fewer."
    typer.echo(f"{path}: {taken:,} of {questions:,} distinct questions{repeats}.{fewer}", err=True)
    return Asked(config, {"lines": len(prompts), "questions": questions})
