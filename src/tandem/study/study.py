"""A study: one question, arms that differ in named settings, and the runs that are to answer it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.config import dump, override
from tandem.errors import ConfigError, nearest
from tandem.run.config import RunConfig, check_training

if TYPE_CHECKING:
    from tandem.study.step_time import Section

OWN = ("steps", "seed")  # what the study itself sets


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the recipe."""

    name: str  # also a folder's
    label: str  # in the figure; within a panel where there is one
    overrides: Mapping[str, str] = field(default_factory=dict)  # dotted name -> text, as --set takes them
    panel: str = ""  # of the figure, for studies of many arms; empty: in every panel
    steps: int | None = None  # where arms take as many seconds and not as many steps: of this one; None: the study's

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise ConfigError(f"the arm {self.name!r} cannot name a folder. Use letters, digits, _, . and -.")


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
    seeded: tuple[str, ...] = ()  # further settings that are the seed: without task.seed written texts are always alike
    compare: tuple[tuple[str, str], ...] = ()  # arms to test against each other; empty: each against the baseline
    reading: str = ""  # by hand, once there is a result
    section: Callable[[Mapping[str, Any]], Section] | None = None  # of the page, drawn from the result

    def __post_init__(self) -> None:
        known = [arm.name for arm in self.arms]
        repeated = sorted({name for name in known if known.count(name) > 1})
        if repeated:
            raise ConfigError(f"study {self.name}: arms are named twice: {', '.join(repeated)}.")
        self.choose((self.baseline, *(name for pair in self.compare for name in pair)))
        if len(set(self.seeds)) < 3 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"study {self.name}: seeds are {self.seeds}; a study has at least three, all different.")
        if not self.shows_not.strip():
            raise ConfigError(f"study {self.name}: shows_not is empty; say what the study does not show.")
        for where, overrides in (("common", self.common), *((arm.name, arm.overrides) for arm in self.arms)):
            for name in (*OWN, *self.seeded):
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
        found = read_json(self.folder / "outcome.json")
        return found if isinstance(found, dict) and self.saved_config() == dump(self.config) else None

    def saved_config(self) -> Any:
        return read_json(self.folder / "config.json")


def read_json(path: Path) -> Any:
    """What a file holds, or None where it is absent or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def plan(
    study: Study, base: RunConfig, out: Path, arms: Sequence[Arm], seeds: Sequence[int], steps: int
) -> list[Planned]:
    """Every run, in order. Each config is made and checked now: a wrong one stops the study before the first run."""
    planned = []
    for seed in seeds:
        for arm in arms:
            own = steps if arm.steps is None else max(1, round(arm.steps * steps / study.steps))
            settings = {**study.common, **arm.overrides, "steps": str(own)}
            settings |= dict.fromkeys(("seed", *study.seeded), str(seed))
            try:
                config = override(base, settings)
                check_training(config)
            except ConfigError as error:
                raise ConfigError(f"study {study.name}, arm {arm.name}: {error}") from error
            planned.append(Planned(arm, seed, config, out / arm.name / f"seed-{seed}"))
    return planned
