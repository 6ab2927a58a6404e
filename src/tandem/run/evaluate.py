"""A model asked the held-out prompts of one task after another, its weights read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.driver import Driver
from tandem.errors import ConfigError
from tandem.plan.memory import check_counts
from tandem.program.pool import EnvironmentPool
from tandem.program.render import renderer_of
from tandem.rollout.answers import answer_row, prompt_hash
from tandem.rollout.evaluate import Evaluation, evaluate
from tandem.run.clock import started
from tandem.run.config import RunConfig, check_remote
from tandem.run.engines import sampled_by
from tandem.run.parts import build_parts
from tandem.types import Group, Prompt

Row = Mapping[str, Any]  # rollout/answers.py
Rows = Mapping[str, Sequence[Row]]
SHARED = ("model", "engine", "remote")  # parts of a config that tasks evaluated together have in common


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What came of one task.

    >>> Evaluated("sums", Evaluation(0.5, 0.3, 0.7, 20, 0, 0.5, 8.0), [], "9f2c").name
    'sums'
    """

    name: str
    evaluation: Evaluation  # of what was asked now
    rows: list[Row]  # of all its prompts, in their order
    weights: str  # hexadecimal hash of what answered


def evaluate_tasks(
    configs: Mapping[str, RunConfig],
    check: Callable[[str, Sequence[Prompt]], None] | None = None,
    weights: str = "",
    kept: Rows | None = None,
    ended: Callable[[str, Row, str], None] = lambda name, row, weights: None,
) -> Iterator[Evaluated]:
    """Each task by its name, as it ends: accuracy on its held-out prompts, drawn as its `evaluation` says; by the
    servers of config.remote, where it names some.

    All tasks are built, and wrong ones refused, before the model is read; `check` gets each one's name and prompts
    then. Prompts whose rows are `kept`, by their task's name, are not asked again; `ended` is told a task's name, a row
    and the weights' hash as the answers to a prompt are there. ConfigError where tasks differ in the model, its engine
    or its servers, the weights' hash is not `weights`, if that is given, or a kept row is of another prompt.
    """
    kept = kept or {}
    for config in configs.values():
        if not isinstance(config, RunConfig):
            raise ConfigError(
                f"the config is {config!r}; wanted a RunConfig, such as RunConfig('ask', 1, ModelConfig(MODEL))."
            )
        check_counts(config)
        check_remote(config)
    first = next(iter(configs.values()))
    for name, config in configs.items():
        for part in SHARED:
            if getattr(config, part) != getattr(first, part):
                raise ConfigError(f"task {name} has its own {part}.*: tasks evaluated together share it. Take it out.")
    with ExitStack() as leaving:
        pools: dict[str, EnvironmentPool] = {}
        for name, config in configs.items():
            pools[name] = EnvironmentPool(config.task)
            leaving.callback(pools[name].close)
            if check is not None:
                check(name, pools[name].heldout[: config.evaluation.prompts])
            _check_kept(name, pools[name].heldout[: config.evaluation.prompts], kept.get(name, ()))
        parts = build_parts(first.model, first.engine, learns=False, task=first.task, remote=first.remote)
        leaving.callback(parts.close)
        hashed = str(parts.plan["weights"])
        if weights not in ("", hashed):
            raise ConfigError(
                f"the weights of {first.model.source} are {hashed}, and what is kept came from {weights}. Ask all "
                "tasks again, with another --out."
            )
        parts.tokenizer.now = started(Path(first.model.source)) or parts.tokenizer.now
        for name, config in configs.items():
            pools[name].ready()
            renderer_of(parts.tokenizer, config.task)
        leaving.enter_context(parts.memory.foreseen())
        for name, config in configs.items():
            pool, renderer = pools[name], renderer_of(parts.tokenizer, config.task)
            prompts = pool.heldout[: config.evaluation.prompts]
            drawing = config.evaluation.drawing(config.seed)
            asked = sampled_by(parts, drawing.temperature) if config.remote.servers else Driver(parts.exact_engine)
            rows = {str(row["id"]): row for row in kept.get(name, ())}

            def keep(group: Group, rows=rows, name=name, text=renderer.text) -> None:  # type: ignore[no-untyped-def]
                rows[group.prompt.id] = answer_row(group, text)
                ended(name, rows[group.prompt.id], hashed)

            left = [prompt for prompt in prompts if prompt.id not in rows]
            evaluation, _ = evaluate(asked, renderer, pool, left, config.rollout, drawing, ended=keep)
            yield Evaluated(name, evaluation, [rows[prompt.id] for prompt in prompts], hashed)
            pool.close()


def _check_kept(name: str, prompts: Sequence[Prompt], rows: Sequence[Row]) -> None:
    """ConfigError where a row is of none of the prompts."""
    asked = {prompt.id: prompt_hash(prompt) for prompt in prompts}
    for row in rows:
        if asked.get(row["id"]) != row["hash"]:
            raise ConfigError(
                f"task {name}: what is kept answers a prompt {row['id']} that is another now: its file or its "
                "environment was changed. Ask all tasks again, with another --out."
            )
