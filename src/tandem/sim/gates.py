"""Whether predictions are good enough to act on: from a record, with each program judged by what all others taught.

Gates: of each target the pinball loss is below that of the constant (all that was seen, whatever the tool and the
turn); the share that lies below a quantile is within 3 points of its level; and what keeping pages costs by the policy
is less than by the best fixed time, with a bootstrap interval of the difference below 0.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tandem.engine.policies import LEVELS, TurnEnd, keep
from tandem.engine.predict import THREE, Predictor
from tandem.errors import ConfigError

FOLDS = 64  # programs are left out one by one up to so many, and else in so many parts
POINTS = 0.03
RESAMPLES, INTERVAL = 2000, (0.025, 0.975)
TARGETS = ("tool_s", "growth", "output")


@dataclass(slots=True)
class Step:
    """A turn and what followed it."""

    tenant: str
    turn: int
    output: float
    tool: str = ""
    tool_s: float | None = None  # none: nothing followed
    growth: float = 0.0
    asked: TurnEnd | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate: a value that must be below a limit."""

    what: str
    value: float
    limit: float
    passed: bool
    more: str = ""


def steps_of(lines: Iterable[dict[str, Any]]) -> list[list[Step]]:
    """Of each program, its turns in order."""
    programs: dict[tuple[str, str], list[Step]] = {}
    for line in lines:
        key = line["by"], line.get("program", "")
        if line["at"] == "turn":
            programs.setdefault(key, []).append(Step(line["tenant"], line["turn"], line["output"], line["tool"]))
        elif line["at"] == "keep" and programs.get(key):
            programs[key][-1].asked = msgspec.convert(line["asked"], TurnEnd)
        elif line["at"] == "back" and programs.get(key):
            programs[key][-1].tool_s, programs[key][-1].growth = line["tool_s"], line["growth"]
    return list(programs.values())


def pinball(actual: float, guess: float, level: float) -> float:
    """
    >>> pinball(3.0, 1.0, 0.9), pinball(1.0, 3.0, 0.9)
    (1.8, 0.2)
    """
    return round((level if actual >= guess else level - 1.0) * (actual - guess), 12)


def _taught(programs: Iterable[Sequence[Step]], named: bool) -> Predictor:
    """By turns; without names, the constant."""
    predictor = Predictor()
    for steps in programs:
        for step in steps:
            predictor.said(step.tenant if named else "", int(step.output))
            if step.tool_s is not None:
                predictor.came_back(step.tool if named else "", step.tool_s, int(step.growth))
        for step in steps:
            predictor.turned(step.turn if named else 0, step is steps[-1] and step.tool_s is None)
    return predictor


def _folds(programs: list[list[Step]]) -> Iterable[tuple[list[list[Step]], list[list[Step]]]]:
    """(the others, those that are judged by them)."""
    count = min(FOLDS, len(programs))
    for fold in range(count):
        yield [p for n, p in enumerate(programs) if n % count != fold], programs[fold::count]


def judge(lines: Iterable[dict[str, Any]]) -> list[Gate]:
    """All gates of a record. ConfigError where it holds too few programs to leave one out."""
    programs = [steps for steps in steps_of(lines) if steps]
    if len(programs) < 3:
        raise ConfigError(f"the record holds {len(programs)} programs; gates leave one out, and want 3 or more.")
    losses: dict[tuple[str, bool], list[float]] = {}
    below: dict[tuple[str, float], list[tuple[bool, bool]]] = {}
    kept: list[tuple[float, float, float]] = []  # of a program: by the policy, by the best fixed time, by the oracle
    for others, judged in _folds(programs):
        learned, constant = _taught(others, True), _taught(others, False)
        fixed = _best_fixed(others)
        for steps in judged:
            for step in steps:
                for named, predictor in ((True, learned), (False, constant)):
                    _score(step, named, predictor, losses, below)
            kept.append(_kept(steps, learned, fixed))
    gates = [_better(what, losses) for what in (*TARGETS, "last") if (what, True) in losses]
    return [*gates, *(_calibrated(what, below) for what in TARGETS if (what, 0.5) in below), *_regret(kept)]


def _score(
    step: Step,
    named: bool,
    predictor: Predictor,
    losses: dict[tuple[str, bool], list[float]],
    below: dict[tuple[str, float], list[tuple[bool, bool]]],
) -> None:
    guess = predictor.predict(step.tenant if named else "", step.tool if named else "", step.turn if named else 0)
    last = float(step.tool_s is None)
    losses.setdefault(("last", named), []).append((guess.last - last) ** 2)
    tool_s = tuple(guess.tool_s[LEVELS.index(level)] for level in THREE) if guess.tool_s else ()
    for what, actual, quantiles in (
        ("tool_s", step.tool_s, tool_s),
        ("growth", step.growth if step.tool_s is not None else None, guess.growth),
        ("output", step.output, guess.output),
    ):
        if actual is None:
            continue
        for level, value in zip(THREE, quantiles, strict=False):
            losses.setdefault((what, named), []).append(pinball(actual, value, level))
            if named:
                below.setdefault((what, level), []).append((actual < value, actual <= value))


def _better(what: str, losses: dict[tuple[str, bool], list[float]]) -> Gate:
    ours, constant = (sum(losses[what, named]) / len(losses[what, named]) for named in (True, False))
    name = f"{what}: squared error" if what == "last" else f"{what}: pinball loss"
    return Gate(name, ours, constant, ours < constant, "of a constant")


def _calibrated(what: str, below: dict[tuple[str, float], list[tuple[bool, bool]]]) -> Gate:
    """How far the share below a quantile is from its level, at most; a step of equal values may straddle it."""
    worst = 0.0
    for level in THREE:
        pairs = below[what, level]
        least, most = (sum(pair[end] for pair in pairs) / len(pairs) for end in (0, 1))
        worst = max(worst, least - level, level - most)
    return Gate(f"{what}: calibration", worst, POINTS, worst <= POINTS)


def cost_s(turn: TurnEnd, kept_s: float, tool_s: float | None) -> float:
    """Device-seconds of keeping pages for so long: their share of the device meanwhile, or computing them again."""
    if tool_s is None:
        return turn.share * min(kept_s, NEVER_S)
    return turn.share * min(kept_s, tool_s) + (turn.reload_s if tool_s > kept_s else 0.0)


NEVER_S = 600.0  # for which pages that nobody asks for again are kept, where nothing else ends it


def _asked(programs: Iterable[Sequence[Step]]) -> list[tuple[TurnEnd, float | None]]:
    return [(step.asked, step.tool_s) for steps in programs for step in steps if step.asked is not None]


def _best_fixed(programs: Sequence[Sequence[Step]]) -> float:
    asked = _asked(programs)
    times = sorted({tool_s for _, tool_s in asked if tool_s is not None})
    grid = [0.0, *times[:: max(1, len(times) // 40)], NEVER_S]
    return min(grid, key=lambda tau: sum(cost_s(turn, tau, tool_s) for turn, tool_s in asked))


def _kept(steps: Sequence[Step], learned: Predictor, fixed: float) -> tuple[float, float, float]:
    policy = constant = oracle = 0.0
    for step in steps:
        if step.asked is None:
            continue
        guess = learned.predict("", step.tool, step.turn)
        turn = msgspec.structs.replace(step.asked, tool_s=guess.tool_s)
        policy += cost_s(turn, keep(turn).keep_s, step.tool_s)
        constant += cost_s(turn, fixed, step.tool_s)
        if step.tool_s is not None:
            oracle += min(turn.share * step.tool_s, turn.reload_s)
    return policy, constant, oracle


def _regret(kept: Sequence[tuple[float, float, float]]) -> list[Gate]:
    """Of the policy against the oracle, shown, and against the best fixed time, which it has to beat."""
    if not any(any(one) for one in kept):
        return []
    policy, constant, oracle = (sum(one[side] for one in kept) / len(kept) for side in range(3))
    low, high = interval([one[0] - one[1] for one in kept])
    beyond = f"beyond the oracle a fixed time {constant - oracle:.4g}, the policy {policy - oracle:.4g}"
    said = f"interval {low:+.4g} to {high:+.4g}; {beyond}"
    return [Gate("keeping: seconds a program beyond the best fixed time", policy - constant, 0.0, high < 0.0, said)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the mean, 95 %, by resampling programs.

    >>> low, high = interval([1.0, 2.0, 3.0] * 20)
    >>> low < 2.0 < high, high - low < 0.6
    (True, True)
    """
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
    return means[int(INTERVAL[0] * RESAMPLES)], means[int(INTERVAL[1] * RESAMPLES) - 1]
