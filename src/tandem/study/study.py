"""A study: one question, arms that differ in named settings, and the runs that answer it.

Runs of a study lie in OUT/ARM/seed-S. `outcome.json` stands in those that ended, in success or in a failure that is
itself a result; a run without it is gone on with. Seeds are outermost, so that what is done at any time is balanced.
"""

from __future__ import annotations

import gc
import json
import platform
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tandem import env
from tandem.config import diff, dump, load, override
from tandem.errors import (
    AlarmError,
    ConfigError,
    EnvironmentFailure,
    NonFiniteError,
    ParityError,
    RunFolderError,
    nearest,
)
from tandem.run.config import RunConfig, check_training
from tandem.run.lock import FolderLock

Say = Callable[[str], None]
FAILURES = (NonFiniteError, AlarmError, ParityError)  # of the method under study; any other error is of the machine
OWN = ("steps", "seed")  # what the study itself sets
TIMED_STEPS = 4  # of a quiet measurement; the first warms up and does not count
TIMED_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the recipe.

    >>> Arm("int4_naive", "naive", {"engine.weights": "int4"}, panel="int4 rollouts").title
    'int4 rollouts, naive'
    """

    name: str  # also a folder's
    label: str  # in the figure; within a panel where there is one
    overrides: Mapping[str, str] = field(default_factory=dict)  # dotted name -> text, as --set takes them
    panel: str = ""  # of the figure, for studies of many arms; empty: in every panel

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ConfigError(f"the arm {self.name!r} cannot name a folder. Use letters, digits, _, . and -.")

    @property
    def title(self) -> str:
        return f"{self.panel}, {self.label}" if self.panel else self.label


@dataclass(frozen=True, slots=True)
class Study:
    """A claim about learning, put as a question.

    >>> arms = (Arm("a", "a"), Arm("b", "b", {"learner.lr": "1e-5"}))
    >>> Study("rate", "Does it matter?", "demo", arms, baseline="a", steps=20, shows_not="Anything else.").pairs
    (('b', 'a'),)
    """

    name: str
    question: str
    recipe: str | Callable[[], RunConfig]
    arms: tuple[Arm, ...]
    baseline: str  # name of an arm
    steps: int
    shows_not: str  # what a reader might take from it, and should not
    common: Mapping[str, str] = field(default_factory=dict)  # overrides of every arm; an arm's own come later
    seeds: tuple[int, ...] = (0, 1, 2)
    compare: tuple[tuple[str, str], ...] = ()  # arms to test against each other; empty: each against the baseline
    reading: str = ""  # by hand, once there is a result

    def __post_init__(self) -> None:
        known = [arm.name for arm in self.arms]
        repeated = sorted({name for name in known if known.count(name) > 1})
        if repeated:
            raise ConfigError(f"study {self.name}: arms are named twice: {', '.join(repeated)}.")
        for name in (self.baseline, *(name for pair in self.compare for name in pair)):
            if name not in known:
                raise ConfigError(f"study {self.name} has no arm {name}.{nearest(name, known)}")
        if len(set(self.seeds)) < 3 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study {self.name}: seeds are {self.seeds}; a study has at least three, all different.")
        if not self.shows_not.strip():
            raise ConfigError(f"study {self.name}: shows_not is empty; say what the study does not show.")
        for where, overrides in (("common", self.common), *((arm.name, arm.overrides) for arm in self.arms)):
            for name in OWN:
                if name in overrides:
                    raise ConfigError(f"study {self.name}, {where}: {name} is set by the study itself. Drop it.")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(arm, the arm it is compared with)."""
        return self.compare or tuple((arm.name, self.baseline) for arm in self.arms if arm.name != self.baseline)

    def choose(self, names: Sequence[str]) -> tuple[Arm, ...]:
        """The arms of these names in the study's order; all where none is given. Raises ConfigError."""
        known = [arm.name for arm in self.arms]
        for name in names:
            if name not in known:
                raise ConfigError(f"study {self.name} has no arm {name}.{nearest(name, known)}")
        return tuple(arm for arm in self.arms if arm.name in names or not names)

    def first_seeds(self, count: int | None) -> tuple[int, ...]:
        """The first `count` seeds, gone on with by whole numbers where the study has fewer."""
        if count is None:
            return self.seeds
        more = (seed for seed in range(max(self.seeds) + 1, max(self.seeds) + 1 + count))
        return (*self.seeds, *more)[:count]


@dataclass(frozen=True, slots=True)
class Planned:
    """One run of a study."""

    arm: Arm
    seed: int
    config: RunConfig
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    def outcome(self) -> dict[str, Any] | None:
        """What the run came to, where it ended and was of this config: status, reason, steps, date, threads."""
        if _saved_config(self.folder) != dump(self.config):
            return None
        found = _read_json(self.folder / "outcome.json")
        return found if isinstance(found, dict) else None


def plan(
    study: Study, base: RunConfig, out: Path, arms: Sequence[Arm], seeds: Sequence[int], steps: int
) -> list[Planned]:
    """Every run, in order. Each config is made and checked now: a wrong one stops the study before the first run."""
    planned = []
    for seed in seeds:
        for arm in arms:
            settings = {**study.common, **arm.overrides, "steps": str(steps), "seed": str(seed)}
            try:
                config = override(base, settings)
                check_training(config)
            except ConfigError as error:
                raise ConfigError(f"study {study.name}, arm {arm.name}: {error}") from error
            planned.append(Planned(arm, seed, config, out / arm.name / f"seed-{seed}"))
    return planned


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
        place = f"{number} of {len(planned)}: {one.title}"
        if one.outcome() is not None:
            shutil.rmtree(one.folder / "checkpoints", ignore_errors=True)
            continue
        if not _run_one(one, place, say):
            return False
        gc.collect()  # a run's parts refer to each other; 48 of them uncollected once filled 24 GiB
    return True


def _run_one(one: Planned, place: str, say: Say) -> bool:
    """Go on with a run, or start it; False where it was stopped."""
    from tandem.run.local import train

    _set_aside_another(one, say)
    begun = (one.folder / "config.json").exists()
    say(f"{place}: {'going on with it' if begun else 'started'}")
    display, reason = Quiet(say), None
    try:
        code, _ = train(
            one.config, out=None if begun else one.folder, resume=one.folder if begun else None, display=display
        )
    except FAILURES as error:
        code, reason = 0, f"{type(error).__name__}: {error}".replace(str(one.folder), "RUN")
    _check_graded(code, place)
    if code:
        return False
    steps = sum(1 for _ in _trained_rows(one.folder))
    outcome = {
        "status": "failed" if reason else "finished",
        "reason": reason,
        "steps": steps,
        "date": time.strftime("%Y-%m-%d"),
        "threads": env.num_threads(),
    }
    aside = one.folder / ".outcome.json.tmp"
    aside.write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    aside.replace(one.folder / "outcome.json")
    shutil.rmtree(one.folder / "checkpoints", ignore_errors=True)  # gigabytes; no figure of a study reads them
    rewards = [row["reward"] for row in _trained_rows(one.folder)][-5:]
    ended = f"failed after {steps} steps, {reason}" if reason else f"{steps} steps"
    mean = [reward for reward in rewards if reward is not None]
    say(f"{place}: {ended}" + (f", reward {statistics.fmean(mean):.3f} over the last {len(mean)}" if mean else ""))
    return True


def _check_graded(code: int, place: str) -> None:
    if code == 1:  # its note has the reasons
        raise EnvironmentFailure(f"{place}: no trajectory could be graded, so there is nothing to compare.")


def _set_aside_another(one: Planned, say: Say) -> None:
    """Move a run of another config away, and say in which settings it differs. Its rows stay readable."""
    if not (one.folder / "config.json").exists():
        return
    saved = _saved_config(one.folder)
    if saved == dump(one.config):
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


def _saved_config(folder: Path) -> Any:
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> Any:
    """What a file holds, or None where it is absent or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _trained_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "reward" in row]


def working_s(row: Mapping[str, Any]) -> float:
    """Seconds that a step trained: without evaluation and checkpoint, which a study's arms have alike.

    >>> working_s({"seconds": {"rollout": 2.0, "learner": 1.0, "evaluate": 7.0}})
    3.0
    """
    return sum(seconds for phase, seconds in row["seconds"].items() if phase not in ("evaluate", "checkpoint"))


def measure_quiet(planned: Sequence[Planned], out: Path, say: Say) -> bool:
    """Median seconds of a step of each arm, a few steps of one after the other, into OUT/quiet.json; False if stopped.

    The arms take turns, so that a machine that slows down slows all of them.
    """
    from tandem.run.local import train

    arms: dict[str, Planned] = {}
    for one in planned:
        arms.setdefault(one.arm.name, one)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    out.mkdir(parents=True, exist_ok=True)
    for turn in range(1, TIMED_ROUNDS + 1):
        for name, one in arms.items():
            few = {"steps": str(TIMED_STEPS), "evaluation.prompts": "0"}
            display = Quiet(say)
            with tempfile.TemporaryDirectory(dir=out, prefix=".time-") as folder:
                try:
                    code, _ = train(override(one.config, few), out=Path(folder), resume=None, display=display)
                except FAILURES as error:
                    say(f"{name}: not timed, {type(error).__name__}: {error}")
                    continue
            _check_graded(code, name)
            if code:
                return False
            seconds[name] += [working_s(row) for row in display.rows if "reward" in row][1:]
            say(f"turn {turn} of {TIMED_ROUNDS}, {name}: {statistics.median(seconds[name]):.2f} s a step")
    kept = _read_json(out / "quiet.json") or {}
    measured = {name: statistics.median(values) for name, values in seconds.items() if values}
    (out / "quiet.json").write_text(json.dumps({**kept, **measured}, indent=1) + "\n", encoding="utf-8")
    return True


def facts(study: Study, base: RunConfig, planned: Sequence[Planned], out: Path, command: str) -> dict[str, Any]:
    """What result.json says of a study beside its runs."""
    seeds = tuple(dict.fromkeys(one.seed for one in planned))
    arms = {one.arm.name: one.arm for one in planned}
    ended = [outcome for one in planned if (outcome := one.outcome()) is not None]
    quiet = _read_json(out / "quiet.json") or {}
    if not planned:
        raise RunFolderError(f"study {study.name}: no run was asked for.")
    return {
        "study": study.name,
        "question": study.question,
        "recipe": base.name,
        "common": dict(study.common),
        "steps": planned[0].config.steps,
        "seeds": list(seeds),
        "baseline": study.baseline,
        "compare": [list(pair) for pair in study.pairs if pair[0] in arms and pair[1] in arms],
        "shows_not": study.shows_not,
        "command": command,
        "date": max((outcome["date"] for outcome in ended), default=None),
        "threads": sorted({outcome["threads"] for outcome in ended}),
        "machine": machine(),
        "arms": [
            {
                "name": arm.name,
                "label": arm.label,
                "panel": arm.panel,
                "overrides": dict(arm.overrides),
                **({"quiet_seconds_per_step": float(f"{quiet[arm.name]:.4g}")} if arm.name in quiet else {}),
            }
            for arm in arms.values()
        ],
    }


def machine(root: Path = Path("/")) -> str:
    """The processor, how many of its cores, and the versions that compute."""
    from importlib.metadata import version

    model = platform.machine()
    try:
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{env.num_cores()} cores of {model}, torch {version('torch')}, Python {platform.python_version()}"
