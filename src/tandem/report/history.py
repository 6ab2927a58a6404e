"""A run's rows as series, taken as they come: what advisories (report/advice.py) are found in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tandem.report import trend as tests
from tandem.report.metrics import sampling
from tandem.report.trend import Trend
from tandem.report.units import decimal, percent

Row = Mapping[str, Any]

BEGINNING = 10  # first rows, whose median is where a series began


def _part(name: str, key: str) -> Callable[[Row], Any]:
    return lambda row: (row.get(name) or {}).get(key)


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _calls(*names: str) -> Callable[[Row], Any]:
    """Counts of these names, of all calls of tools."""

    def share(row: Row) -> float | None:
        counts = row.get("happened") or {}
        wrong = sum(counts.get(name, 0) for name in names)
        return _over(wrong, max(wrong, counts.get("tool_calls", 0)))

    return share


class Measure(NamedTuple):
    """A series of a history: how it is called, how a value of it is written, and its value in a row."""

    label: str
    write: Callable[[float], str]
    of: Callable[[Row], Any]


def _decimal(value: float) -> str:
    return decimal(value, 2 if abs(value) >= 10 else 3)


def _share(value: float) -> str:
    return percent(value, 1)


def _key(name: str, label: str = "", write: Callable[[float], str] = _decimal) -> Measure:
    return Measure(label or name.replace("_", " "), write, lambda row: row.get(name))


MEASURES: dict[str, Measure] = {
    "evaluation": Measure("held-out accuracy", _share, _part("evaluation", "accuracy")),
    "reward": _key("reward", "mean reward"),
    "reward_std": _key("reward_std", "spread of rewards"),
    "entropy": _key("entropy"),
    "length": _key("length", "mean length"),
    "truncated": _key("truncated", "truncated share", _share),
    "left_out_longer": Measure("pairs in which the program left out is longer", _share, _part("fairness", "longer")),
    "left_out_z": Measure("z of the lengths left out", _decimal, _part("fairness", "z")),
    "zero_variance": _key("zero_variance", "share of groups with equal rewards", _share),
    "stale_share": _key("stale_share", "share of groups dropped as too old", _share),
    "rare_share": _key("rare_share", "share of the gradient from rare tokens", _share),
    "clip_fraction": _key("clip_fraction", "clipped share", _share),
    "grad_norm": _key("grad_norm", "gradient norm"),
    "ess": _key("ess", "effective share of the tokens", _share),
    "explained_variance": _key("explained_variance", "explained variance"),
    "peak_memory_bytes": _key("peak_memory_bytes", "peak memory", lambda value: f"{value / 1e9:.2f} GB"),
    "staleness": Measure("|Δ log p| from older weights", _decimal, _part("error_budget", "staleness")),
    "arithmetic": Measure("|Δ log p| from other arithmetic", _decimal, _part("error_budget", "mismatch")),
    "failed": Measure("failed share", _share, lambda row: _over(row.get("failed"), row.get("trajectories"))),
    "recomputed": Measure(
        "tokens computed again, over those sampled",
        _share,
        lambda row: _over(row.get("recomputed_tokens"), row.get("tokens")),
    ),
    "spelt": Measure(
        "control tokens spelt a trajectory",
        _decimal,
        lambda row: _over(row.get("spelt_tokens"), row.get("trajectories")),
    ),
    "calls": Measure(
        "tool calls a trajectory",
        _decimal,
        lambda row: _over((row.get("happened") or {}).get("tool_calls"), row.get("trajectories")),
    ),
    "malformed": Measure("share of calls that fit no tool", _share, _calls("malformed_calls", "unreadable_calls")),
    "tool_errors": Measure("share of calls that failed", _share, _calls("tool_errors", "tool_timeouts")),
    "rollout": Measure("seconds of rollout", _decimal, lambda row: sampling(row)[1] or None),
    "learner": Measure("seconds of the learner", _decimal, _part("seconds", "learner")),
    "a_token": Measure(
        "milliseconds of rollout a sampled token",
        _decimal,
        lambda row: _over(1e3 * sampling(row)[1], sampling(row)[0]),
    ),
    "a_row": Measure(
        "milliseconds of the learner a row",
        _decimal,
        lambda row: _over(1e3 * (_part("seconds", "learner")(row) or 0.0), row.get("learner_rows")),
    ),
}


class Kept(NamedTuple):
    """A series that has stayed beyond a level in nearly all of its last rows."""

    first: int  # step of the oldest of them
    last: int
    began: float  # median of the first rows
    median: float  # of the last
    low: float  # 95.9 % interval of the median, by the sign test: the 6th and the 15th of 20
    high: float
    beyond: int  # how many of LATEST


class History:
    """The series of a run so far.

    >>> history = History()
    >>> history.take({"step": 1, "reward": 0.5, "failed": 2, "trajectories": 8})
    >>> history.values["reward"], history.values["failed"], history.values["entropy"]
    ([0.5], [0.25], [])
    """

    def __init__(self) -> None:
        self.rows = 0
        self.values: dict[str, list[float]] = {name: [] for name in MEASURES}
        self.steps: dict[str, list[int]] = {name: [] for name in MEASURES}
        self.evaluations: list[tuple[int, float, int]] = []  # step, right answers, graded prompts; where there are any
        self.alarms: list[tuple[int, tuple[str, ...]]] = []  # step, their texts, where drift was measured
        self.failure = ""  # the most frequent reason of the last row that had one
        self._logarithms: dict[str, tuple[list[int], list[int], list[float]]] = {}  # of how many values
        self._found: dict[tuple[str, bool], list[Trend]] = {}

    def take(self, row: Row) -> None:
        """A row, later than those before it."""
        step = int(row["step"])
        if evaluation := row.get("evaluation"):
            prompts, right = evaluation.get("prompts") or 0, evaluation["accuracy"]
            if prompts:
                self.evaluations.append((step, right * prompts, prompts))
                self.steps["evaluation"].append(step)
                self.values["evaluation"].append(right)
        if "reward" not in row and "loss" not in row:
            return
        self.rows += 1
        self._found.clear()
        for name, measure in MEASURES.items():
            value = None if name == "evaluation" else measure.of(row)
            if isinstance(value, int | float) and math.isfinite(value):
                self.steps[name].append(step)
                self.values[name].append(float(value))
        if row.get("failures"):
            self.failure = row["failures"][0]
        if row.get("alarms") is not None:
            self.alarms.append((step, tuple(row["alarms"])))

    def _windows(self, name: str, log: bool) -> Iterator[tuple[list[int], list[float], list[float]]]:
        """Steps, values and the values before of each window of a series."""
        steps, values = self._logs(name) if log else self.series(name)
        for window in tests.windows(len(values)):
            yield steps[-window:], values[-window:], values[-window - tests.HISTORY : -window]

    def _logs(self, name: str) -> tuple[list[int], list[float]]:
        """A series' values above 0, as logarithms."""
        steps, values = self.series(name)
        done, of_steps, logs = self._logarithms.setdefault(name, ([0], [], []))
        for at in range(done[0], len(values)):
            if values[at] > 0.0:
                of_steps.append(steps[at])
                logs.append(math.log(values[at]))
        done[0] = len(values)
        return of_steps, logs

    def trends(self, name: str, log: bool = False) -> list[Trend]:
        """Of each window of a series, shortest first; of logarithms, those of values above 0."""
        if (name, log) not in self._found:
            found = [tests.trend(*window) for window in self._windows(name, log)]
            self._found[name, log] = [one.exp() if log else one for one in found if one is not None]
        return self._found[name, log]

    def moved(self, name: str, up: bool, by: float, enough: Callable[[Trend], bool], log: bool = False) -> Trend | None:
        """The surest trend in a direction among those that are sure and `enough`. Of a change of `by` (of a ratio's,
        its logarithm's) the medians of the first and the last third have two thirds between them: less than half of
        that is not looked into.
        """
        sign, sure = (1.0 if up else -1.0), []
        for steps, values, before in self._windows(name, log):
            third = len(values) // 3
            between = sign * (statistics.median(values[-third:]) - statistics.median(values[:third]))
            if between > 0.0 and between >= by / 3.0 and sign * tests.sureness(values, before) > tests.CRITICAL:
                found = tests.trend(steps, values, before)
                assert found is not None
                sure.append(found.exp() if log else found)
        return max((one for one in sure if enough(one)), key=lambda one: abs(one.z), default=None)

    def within(self, name: str, first: int) -> Trend | None:
        """The trend of the shortest window that goes back to step `first`, or of all."""
        found = self.trends(name)
        return next((one for one in found if one.first <= first), found[-1] if found else None)

    def kept(self, name: str, level: float, below: bool = False) -> Kept | None:
        """Whether a series has stayed at a level or beyond it in NEARLY_ALL of its LATEST rows, after its beginning."""
        values = self.values[name]
        if len(values) < tests.LEAST or not tests.stays(values, level, below):
            return None
        latest = sorted(values[-tests.LATEST :])
        beyond = sum(value <= level if below else value >= level for value in latest)
        return Kept(
            self.steps[name][-tests.LATEST],
            self.steps[name][-1],
            self.began(name),
            statistics.median(latest),
            latest[5],
            latest[14],
            beyond,
        )

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of a measure; empty of other names."""
        return self.steps.get(name, []), self.values.get(name, [])

    def began(self, name: str) -> float:
        return statistics.median(self.values[name][:BEGINNING])

    def latest(self, name: str) -> float | None:
        """Median of the last rows."""
        values = self.values[name][-tests.LATEST :]
        return statistics.median(values) if values else None


def written(name: str, value: float) -> str:
    """A value of a series, as people read it.

    >>> written("failed", 0.25), written("entropy", 0.5)
    ('25.0 %', '0.500')
    """
    return MEASURES[name].write(value)
