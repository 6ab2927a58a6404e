"""Runs what a study still lacks.

Runs lie in OUT/ARM/seed-S. `outcome.json` stands in those that ended, in success or in a failure that is itself a
result; a run without it is gone on with. Seeds are outermost, so that what is done at any time is balanced.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tandem import env
from tandem.config import diff, dump, load, override
from tandem.errors import AlarmError, ConfigError, EnvironmentFailure, NonFiniteError, ParityError
from tandem.report.metrics import read_metrics, series, training
from tandem.report.units import decimal
from tandem.run.config import RunConfig
from tandem.run.lock import FolderLock
from tandem.study.study import Planned

Say = Callable[[str], None]
FAILURES = (NonFiniteError, AlarmError, ParityError)  # of the method under study; any other error is of the machine
TIMED_STEPS = 4  # of a run that is only timed; the first warms up and does not count
TIMED_ROUNDS = 2


class Quiet:
    """A display that shows nothing of the rows, and passes notes on."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.rows: list[Mapping[str, Any]] = []

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def update(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        self._say(text)


def run_all(planned: Sequence[Planned], say: Say) -> bool:
    """Run what has no outcome yet; False where Ctrl-C stopped it. A run that fails is recorded, and the next begins."""
    for number, one in enumerate(planned, 1):
        if one.outcome() is None and not _run_one(one, f"{number} of {len(planned)}: {one.title}", say):
            return False
        shutil.rmtree(one.folder / "checkpoints", ignore_errors=True)  # gigabytes; no figure of a study reads them
        gc.collect()  # a run's parts refer to each other; 48 of them uncollected once filled 24 GiB
    return True


def _run_one(one: Planned, place: str, say: Say) -> bool:
    """Go on with a run, or start it; False where it was stopped."""
    from tandem.run.local import train

    _set_aside_another(one, say)
    begun, reason = (one.folder / "config.json").exists(), None
    say(f"{place}: {'going on with it' if begun else 'started'}")
    out, resume = (None, one.folder) if begun else (one.folder, None)
    try:
        code, _ = train(one.config, out=out, resume=resume, display=Quiet(say))
    except FAILURES as error:
        code, reason = 0, f"{type(error).__name__}: {error}".replace(str(one.folder), "RUN")
    if code == 1:  # its note has the reasons
        raise EnvironmentFailure(f"{place}: no trajectory could be graded, so there is nothing to compare.")
    if code:
        return False
    rows = training(rows_of(one.folder))
    outcome = {
        "status": "failed" if reason else "finished",
        "reason": reason,
        "steps": len(rows),
        "date": time.strftime("%Y-%m-%d"),
        "threads": env.num_threads(),
    }
    aside = one.folder / ".outcome.json.tmp"
    aside.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    aside.replace(one.folder / "outcome.json")
    rewards = series(rows, "reward")[1][-5:]
    mean = f", reward {statistics.fmean(rewards):.3f} over the last {len(rewards)}" if rewards else ""
    ended = f"failed after {len(rows)} steps, {reason}" if reason else f"{len(rows)} steps"
    say(f"{place}: {ended}{mean}, {decimal(step_s(rows), 2)} s a step")
    return True


def _set_aside_another(one: Planned, say: Say) -> None:
    """Move a run of another config away, and say in which settings it differs. Its rows stay readable."""
    saved = one.saved_config()
    if not (one.folder / "config.json").exists() or saved == dump(one.config):
        return
    try:
        lines = diff(load(RunConfig, saved or {}), one.config)
    except ConfigError:
        lines = ["its config is of another version of tandem, or damaged"]
    number = 1
    while (away := one.folder.with_name(f"{one.folder.name}.replaced-{number}")).exists():
        number += 1
    FolderLock(one.folder).release()  # RunFolderError where it is being written
    shutil.rmtree(one.folder / "checkpoints", ignore_errors=True)
    one.folder.rename(away)
    say(f"{one.title}: the config changed ({'; '.join(lines)}). The run is made anew; the old one is {away}")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A run's rows; none where it ended before its first."""
    return read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []


def working_s(row: Mapping[str, Any]) -> float:
    """Seconds that a step trained: without evaluation and checkpoint, which a study's arms have alike.

    >>> working_s({"seconds": {"rollout": 2.0, "learner": 1.0, "evaluate": 7.0}})
    3.0
    """
    return sum(seconds for phase, seconds in row["seconds"].items() if phase not in ("evaluate", "checkpoint"))


def step_s(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds of a step; None where no step was done. The median, which the machine's other work moves little; of a run
    that samples while it learns the mean, since its batches come in bursts.

    >>> [step_s([{"seconds": {"buffer": s}, **beside} for s in (1.0, 1.0, 4.0)]) for beside in ({}, {"workers": {}})]
    [1.0, 2.0]
    """
    if not rows:
        return None
    seconds = [working_s(row) for row in rows]
    return statistics.fmean(seconds) if "workers" in rows[0] else statistics.median(seconds)


def time_all(planned: Sequence[Planned], out: Path, say: Say) -> bool:
    """A few steps of each arm for its seconds a step, anew where all were timed before; False where it was stopped.

    The arms take turns, so that a machine that slows down slows all of them.
    """
    few = {"steps": str(TIMED_STEPS), "evaluation.prompts": "0"}
    arms = [replace(one, config=override(one.config, few)) for one in planned if one.seed == planned[0].seed]
    turns = zip(*(_timed_folders(out, one.arm.name) for one in arms), strict=True)
    runs = [replace(one, folder=folder) for turn in turns for one, folder in zip(arms, turn, strict=True)]
    if all(run.outcome() for run in runs):
        for run in runs:
            shutil.rmtree(run.folder)
    return run_all(runs, say)


def timed_s(out: Path, arm: str) -> float | None:
    """Seconds of a step where an arm was timed alone; None where it was not."""
    return step_s([row for folder in _timed_folders(out, arm) for row in training(rows_of(folder))[1:]])


def _timed_folders(out: Path, arm: str) -> list[Path]:
    return [out / ".time" / arm / f"turn-{turn}" for turn in range(1, TIMED_ROUNDS + 1)]
