"""What a run's course says that no single row does: named advisories, each with its evidence and what to try.

Pure functions of rows. Alarms (algo/alarm.py) hold a row against a threshold; an advisory needs a trend, or a level
that was kept (report/trend.py). RULES is the list of them, docs/advisories.md the table of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tandem.report.evidence import Evidence
from tandem.report.history import History
from tandem.report.rules import RULES
from tandem.report.trend import next_look

Row = Mapping[str, Any]

LINGERS = 10  # steps that an advisory stands without being seen
WORSE = 2.0  # said again once its evidence is this many times what it was when it was said last


@dataclass(frozen=True, slots=True)
class Advisory:
    """Something in a run's course that a person should know of.

    >>> [advisory.name for advisory in advise([{"step": step, "reward": 0.5} for step in range(1, 50)])]
    []
    """

    name: str
    since: int  # the step at which it was first seen
    until: int | None  # the step at which it was seen last, None where it was at the last look
    evidence: Evidence  # of the last look that saw it
    means: str
    tries: str

    def line(self) -> str:
        """What was seen, and since when."""
        gone = "" if self.until is None else f", not since step {self.until}"
        return f"{self.name} (step {self.since}{gone}): {self.evidence.text}"

    def advice(self) -> str:
        """The same, and what to try, as plain text."""
        return f"{self.line()}. Try: {self.tries.replace('`', '')}"

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Advisor:
    """Takes a run's rows one by one, and looks at their course every few of them (`next_look`)."""

    def __init__(self) -> None:
        self.history = History()
        self.found: dict[str, Advisory] = {}  # by name, in the order in which they were seen first
        self._look_at = next_look(0)
        self._looked = 0  # rows at the last look
        self._said: dict[str, float] = {}  # name -> size of the evidence when it was said

    def take(self, row: Row) -> list[Advisory]:
        """A row; gives the advisories that are new with it, or that have become much worse since they were said."""
        self.history.take(row)
        if self.history.rows < self._look_at:
            return []
        self._look_at = next_look(self.history.rows)
        return self.look(int(row["step"]))

    def look(self, step: int) -> list[Advisory]:
        """Look now, at the course up to `step`."""
        self._looked = self.history.rows
        news = []
        for rule in RULES:
            known, evidence = self.found.get(rule.name), rule.look(self.history)
            if evidence is None:
                if known is not None and known.until is None and step - known.evidence.last >= LINGERS:
                    self.found[rule.name] = Advisory(
                        rule.name, known.since, known.evidence.last, known.evidence, rule.means, rule.tries
                    )
                continue
            since = step if known is None else known.since
            self.found[rule.name] = Advisory(rule.name, since, None, evidence, rule.means, rule.tries)
            if evidence.size >= WORSE * self._said.get(rule.name, 0.0):
                self._said[rule.name] = evidence.size
                news.append(self.found[rule.name])
        return news

    @property
    def standing(self) -> list[Advisory]:
        """Those that the last look saw."""
        return [advisory for advisory in self.found.values() if advisory.until is None]

    @property
    def advisories(self) -> list[Advisory]:
        """All, those that stand first."""
        return self.standing + [advisory for advisory in self.found.values() if advisory.until is not None]

    @property
    def behind(self) -> bool:
        """Whether rows have come since the last look."""
        return self.history.rows > self._looked


def follow(rows: Iterable[Row]) -> Advisor:
    """An advisor that has taken all rows, and looked at the course up to the last."""
    advisor, step = Advisor(), 0
    for row in rows:
        advisor.take(row)
        step = int(row["step"])
    if advisor.behind:
        advisor.look(step)
    return advisor


def advise(rows: Iterable[Row]) -> list[Advisory]:
    """The advisories of a course, those that stand at its end first."""
    return follow(rows).advisories
