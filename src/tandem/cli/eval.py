"""`tandem eval`: held-out greedy accuracy of a recipe's model, of a run or of any model."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tandem.cli.options import Assignments, ConfigFiles

if TYPE_CHECKING:
    from tandem.program.config import TaskConfig
    from tandem.run.config import RunConfig

GSM8K_TEMPLATE = "{question}\nThink step by step, then end with the answer as a number."
GSM8K_NEW_TOKENS = 256  # room for the steps; a recipe for sums has less. Of a model without a recipe too

USED = ("model.", "task.", "engine.", "rollout.", "evaluation.prompts", "remote.")
OF_TRAINING = ("prompts_per_step", "samples_per_prompt", "redraws", "extra_prompts", "keep_tokens")
OF_DRAWING = ("temperature", "top_k", "top_p", "min_p")
OF_ENGINES = ("replicas", "answer_s", "dtype", "weights", "weight_group", "kv_dtype", "kv_window", "kv_sinks", "noise")
UNUSED = (*(f"rollout.{name}" for name in (*OF_TRAINING, *OF_DRAWING)), *(f"engine.{name}" for name in OF_ENGINES))
WHY = "it takes the most likely answer to each held-out prompt, by the model's own weights, and learns nothing"


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN_DIR|MODEL", help="A recipe (before training), a run folder, or a model as of generate."
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="The task, or another than the recipe's: gsm8k, jsonl, or a reasoning-gym name.")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="The questions and answers (jsonl) of gsm8k or jsonl.")] = None,
    files: ConfigFiles = None,
    settings: Assignments = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> int:
    """Measure greedy accuracy on held-out prompts, with a 95 % confidence interval."""
    from tandem.cli.settings import assignments, say_unused
    from tandem.config import override
    from tandem.errors import ConfigError

    read, is_model = _read(target)
    assigned = assignments(read, files or [], settings or [])
    if is_model and task is None and path is None and not any(name.startswith("task.") for name in assigned):
        from tandem.models.checkpoint import open_checkpoint
        from tandem.run.parts import resolve_source

        open_checkpoint(resolve_source(target))  # where there is no such model, that is what is wrong
        raise ConfigError(
            f"{target} is a model: say what to ask it. Give --task NAME (a reasoning-gym data set), --task gsm8k or "
            "jsonl with --path FILE.jsonl, or --set task.environment=..."
        )
    config = override(_with_task(read, task, path), assigned)
    say_unused("eval", assigned, USED, UNUSED, WHY)
    asked: dict[str, int] = {}
    if path is not None and config.task.heldout_path == str(path):
        config, asked = _distinct(config)
        repeats = f", {asked['lines'] - asked['questions']} repeated" if asked["lines"] > asked["questions"] else ""
        taken = f"{config.evaluation.prompts:,} of {asked['questions']:,} distinct questions"
        fewer = "" if "evaluation.prompts" in assigned else " --set evaluation.prompts=N takes fewer."
        typer.echo(f"{path}: {taken}{repeats}.{fewer}", err=True)
    if not config.evaluation.prompts:
        raise ConfigError("evaluation.prompts is 0: nothing would be asked. Set evaluation.prompts to 1 or more.")

    from tandem.report.live import failed, held_out
    from tandem.run.local import evaluate_model

    result = asdict(evaluate_model(config))
    if json:
        print(
            jsonlib.dumps(
                {"target": target, "model": config.model.source, "task": config.task.label, **asked, **result}
            )
        )
    else:
        shown = ", ".join(filter(None, (held_out(result), failed(result))))
        print(f"{config.model.source} on {config.task.label}: {shown}")
    return 0 if result["prompts"] else 1


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
    if task in ("gsm8k", "jsonl", None):
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


def _distinct(config: RunConfig) -> tuple[RunConfig, dict[str, int]]:
    """`config` with no more held-out questions than its file has distinct ones, and how many lines and questions."""
    from tandem.program.prompts import question_key, read_questions

    prompts = read_questions(config.task, config.task.heldout_path)
    questions = len(set(map(question_key, prompts)))
    taken = min(config.evaluation.prompts, questions)
    task = replace(config.task, heldout_size=max(taken, min(config.task.heldout_size, questions)))
    evaluation = replace(config.evaluation, prompts=taken)
    return replace(config, task=task, evaluation=evaluation), {"lines": len(prompts), "questions": questions}
