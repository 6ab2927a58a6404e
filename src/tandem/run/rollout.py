"""Programs without training: a task is tried, and its trajectories are kept as a run keeps those of a step."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from tandem.errors import ConfigError
from tandem.plan.memory import check_counts, peak_bytes
from tandem.program.child import child_of
from tandem.program.pool import EnvironmentPool
from tandem.rollout.config import AsyncConfig
from tandem.rollout.group import summarise
from tandem.rollout.pieces import Pieces
from tandem.rollout.rollout import Rollouts
from tandem.rollout.rows import trajectory_rows
from tandem.rollout.watch import Progress, Watched
from tandem.run.backends import backend_of
from tandem.run.clock import started
from tandem.run.config import RunConfig, check_remote
from tandem.run.counted import counted
from tandem.run.engines import sampled_by
from tandem.run.figures import figures
from tandem.run.folder import RunFolder, check_new
from tandem.run.parts import build_parts
from tandem.sync.config import SyncConfig
from tandem.sync.departures import declaration
from tandem.trace import Totals, Trace
from tandem.types import Group

STEP = 0  # of the row and the trajectories: no update was made
STOPPED = 130  # the exit code of Ctrl-C

Split = Literal["train", "heldout"]


def sized(config: RunConfig, programs: int | None, split: Split) -> RunConfig:
    """`config` with a step of `programs` programs: whole groups, or a part of one. ConfigError where that can't be.

    Nothing is updated, so no weights are older than others: what it says of that is left out.
    """
    config = replace(config, sync=SyncConfig(), asynchrony=AsyncConfig())
    group = config.rollout.samples_per_prompt
    if programs is not None:
        if programs < 1:
            raise ConfigError(f"--programs is {programs}. Give 1 or more.")
        if programs > group and programs % group:
            raise ConfigError(
                f"--programs is {programs}, and a group has {group} (rollout.samples_per_prompt). Give "
                f"{programs - programs % group} or {programs - programs % group + group}, or another group with "
                "--set rollout.samples_per_prompt=1."
            )
        prompts, group = max(1, programs // group), min(group, programs)
        config = replace(config, rollout=replace(config.rollout, prompts_per_step=prompts, samples_per_prompt=group))
    asked, there = config.rollout.prompts_per_step, config.task.heldout_size
    if split == "heldout" and asked > there:
        raise ConfigError(
            f"{asked} held-out prompts are asked for, and task.heldout_size is {there}. Lower --programs, or raise it."
        )
    return config


def roll_out(config: RunConfig, split: Split, out: Path, progress: Progress) -> tuple[int, dict[str, Any] | None]:
    """Run the programs of a step; returns the exit code and the row, None where it was stopped before a group ended.

    Ctrl-C keeps the groups that have ended.
    """
    check_counts(config)
    check_remote(config)
    check_new(out)
    totals, began_s = Totals(), time.perf_counter()
    trace = Trace([totals])
    with ExitStack() as leaving:
        workers = backend_of(config)
        if workers is not None:
            leaving.callback(workers.close)
        pool = EnvironmentPool(config.task, born=child_of if workers is None else workers.home)
        leaving.callback(pool.close)
        built = config.model, config.engine
        parts = build_parts(*built, learns=False, task=config.task, workers=workers, remote=config.remote)
        leaving.callback(parts.close)
        pool.ready()
        folder = leaving.enter_context(RunFolder.create(out, config))
        now = parts.tokenizer.now = started(folder.path) or parts.tokenizer.now
        folder.write_plan(parts.plan | {"numerics": declaration(config), "started": now.isoformat()})
        count = config.rollout.prompts_per_step
        prompts = pool.batch(0, count) if split == "train" else list(pool.heldout[:count])
        progress.sampled = lambda: sum(engine.stats.sampled_tokens for engine in parts.sampling)
        watched, asked = Watched(pool, progress), sampled_by(parts, config.rollout.temperature)
        rollouts = Rollouts(asked, parts.renderer, watched, config.rollout, config.seed, trace)
        groups: list[Group] = []
        stopped = False
        leaving.enter_context(parts.memory.foreseen())
        running = cast(Generator[Group, None, None], rollouts.run(STEP, prompts))
        leaving.callback(running.close)  # before the pool: what runs is withdrawn
        with counted(parts, trace, bool(config.engine.draft.most)):
            try:
                for group in running:
                    groups.append(group)
            except KeyboardInterrupt:
                stopped = True
        if not groups:
            return STOPPED, None
        places = {prompt.id: place for place, prompt in enumerate(prompts)}
        groups.sort(key=lambda group: places[group.prompt.id])
        kept = trajectory_rows(groups, Pieces(parts.tokenizer.decode), config.rollout.keep_tokens)
        folder.write_trajectories(STEP, kept)
        summary = summarise(groups)
        row = {"step": STEP, **figures(config, summary, None), "weights": parts.engine.version.digest}
        seconds, counts = totals.take()
        spent, sampling = time.perf_counter() - began_s, seconds.get("rollout", 0.0)
        row |= counts
        row["tokens_per_s"] = row["tokens"] / sampling if sampling else None
        row["seconds"] = seconds | {"other": max(0.0, spent - sum(seconds.values()))}
        row |= {"time_s": spent, "peak_memory_bytes": peak_bytes()}
        folder.append_metrics(row)
    return STOPPED if stopped else int(summary.failed == summary.trajectories), row
