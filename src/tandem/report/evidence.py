"""What an advisory is founded on: numbers, and the sentence that has them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Literal

from tandem.report.history import MEASURES, History, written
from tandem.report.trend import LATEST, LEAST, LIKELY, Trend

FULL_MARKS = 0.95  # of a reward whose most is 1
RISEN = 0.25  # of the rewards' spread: a rise that counts, however noisy


@dataclass(frozen=True, slots=True)
class Evidence:
    """From step `first` to `last` a measure went from `start` to `end`; `low` and `high` bound what `of` says, at 95 %.

    `size` says how bad it is against the least that is an advisory, which is 1.
    """

    measure: str
    first: int
    last: int
    start: float
    end: float
    low: float
    high: float
    of: Literal["change", "level"]  # end - start, or end
    text: str
    size: float


def moved(
    history: History,
    name: str,
    direction: Literal["up", "down"],
    by: float,
    *,
    ratio: bool = False,
    to: float | None = None,
    flat: bool = False,
) -> Evidence | None:
    """A trend that is sure and large enough: a change of at least `by`, or `by` times as much under `ratio`, that ends
    at `to` or beyond. `flat`: only where the reward didn't rise meanwhile.
    """
    up = direction == "up"

    def enough(found: Trend) -> bool:
        beyond = to is None or (found.end >= to if up else found.end <= to)
        return beyond and size_of(found) >= 1.0 and not (flat and rising(history, found.first))

    def size_of(found: Trend) -> float:
        if not ratio:
            return (found.change if up else -found.change) / by
        large, small = (found.end, found.start) if up else (found.start, found.end)
        return large / max(small, 1e-300) / by

    found = history.moved(name, up, math.log(by) if ratio else by, enough, log=ratio)
    return None if found is None else of_trend(name, found, size_of(found), meanwhile(history, found) if flat else "")


def of_trend(name: str, found: Trend, size: float, more: str = "") -> Evidence:
    """The sentence of a trend."""
    start, end, low, high = (written(name, value) for value in (found.start, found.end, found.low, found.high))
    text = (
        f"{MEASURES[name].label} went from {start} at step {found.first} to {end} at step {found.last}, "
        f"a change within [{low}, {high}]{more}"
    )
    return Evidence(name, found.first, found.last, found.start, found.end, found.low, found.high, "change", text, size)


def kept(history: History, name: str, level: float, *, below: bool = False) -> Evidence | None:
    """A level that was kept in nearly all of the last rows."""
    found = history.kept(name, level, below)
    if found is None:
        return None
    side = "at most" if below else "at least"
    median, low, high, began, wanted = (
        written(name, value) for value in (found.median, found.low, found.high, found.began, level)
    )
    text = (
        f"{MEASURES[name].label} was {side} {wanted} in {found.beyond} of {LATEST} steps ({found.first} to "
        f"{found.last}): median {median} [{low}, {high}], {began} in the first steps"
    )
    share = level / max(found.median, 1e-300) if below else found.median / level if level else 1.0
    size = max(1.0, share)
    return Evidence(
        name, found.first, found.last, found.began, found.median, found.low, found.high, "level", text, size
    )


def with_text(evidence: Evidence, text: str) -> Evidence:
    """The same, in other words."""
    return replace(evidence, text=text)


def rising(history: History, first: int) -> bool:
    """Whether the mean reward has risen since step `first`: a trend at 95 %, or a last third well above the first."""
    found = history.within("reward", first)
    if found is None:
        return False
    values = [value for step, value in zip(*history.series("reward"), strict=True) if step >= found.first]
    third = len(values) // 3
    risen = statistics.median(values[-third:]) - statistics.median(values[:third])
    return found.z > LIKELY or risen > RISEN * spread(history)


def lately_rising(history: History) -> bool:
    """The same of the last 48 rows."""
    steps = history.steps["reward"][-2 * LEAST :]
    return bool(steps) and rising(history, steps[0])


def spread(history: History) -> float:
    """The usual standard deviation of the rewards within a step."""
    spreads = history.values["reward_std"]
    return statistics.median(spreads) if spreads else 0.0


def meanwhile(history: History, found: Trend) -> str:
    """What the reward did in the same steps."""
    reward = history.within("reward", found.first)
    if reward is None:
        return ""
    return f"; the mean reward did not rise: {_change(reward)}"


def _change(found: Trend) -> str:
    start, end, low, high = (written("reward", value) for value in (found.start, found.end, found.low, found.high))
    return f"{start} to {end} in steps {found.first}-{found.last}, a change within [{low}, {high}]"


def lately(history: History) -> str:
    """What the reward did in the last 48 rows, for the end of a sentence."""
    steps = history.steps["reward"][-2 * LEAST :]
    found = history.within("reward", steps[0]) if steps else None
    return f"; the mean reward did not rise: {_change(found)}" if found else ""


def solved(history: History) -> bool:
    """Whether the last rows' mean reward is full marks."""
    reward = history.latest("reward")
    return reward is not None and reward >= FULL_MARKS
