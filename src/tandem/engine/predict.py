"""What decisions need to know of a program's next turn, from turns that ended: distributions, not means.

Each is of what was seen last under one name (a tool, a tenant), or of all where that is too little to tell. `Constant`
is what is hard to beat: all that was seen, whatever the tool and the turn. sim/gates.py compares them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

from msgspec import Struct

from tandem.engine.admit import Latest
from tandem.engine.policies import LEVELS

THREE = (0.1, 0.5, 0.9)


class Prediction(Struct, frozen=True):
    """Of a turn that ended or begins. Quantiles; () where too little is known."""

    tool_s: tuple[float, ...] = ()  # at LEVELS: how long the tool takes yet
    growth: tuple[float, ...] = ()  # at 0.1, 0.5, 0.9: tokens that the next prompt has beyond this context
    output: tuple[float, ...] = ()  # at 0.1, 0.5, 0.9: tokens of the next completion
    last: float = 0.0  # probability that the turn is the program's last


def quantile(ordered: Sequence[float], level: float) -> float:
    """The least value that at least a share `level` of them do not exceed: it is one of them.

    >>> quantile([1.0, 2.0, 3.0, 4.0], 0.5), quantile([1.0, 2.0, 3.0, 4.0], 0.51)
    (2.0, 3.0)
    """
    return ordered[max(0, math.ceil(level * len(ordered) - 1e-9) - 1)]


class Spread(Latest):
    """How values lie."""

    def quantiles(self, levels: Sequence[float], beyond: float = 0.0) -> tuple[float, ...]:
        """Of what is left of those that went beyond `beyond`; () where fewer than ENOUGH did."""
        left = self.ordered[bisect_right(self.ordered, beyond) :] if beyond > 0 else self.ordered
        return tuple(quantile(left, level) - beyond for level in levels) if len(left) >= self.ENOUGH else ()


class Predictor:
    """Learns from turns as they end and as their programs come back."""

    MOST = 4096  # names

    def __init__(self) -> None:
        self._tools: dict[str, Spread] = {"": Spread()}
        self._growth: dict[str, Spread] = {"": Spread()}
        self._output: dict[str, Spread] = {"": Spread()}
        self._ended: dict[int, list[int]] = {}  # turn -> [programs that reached it, that ended with it]

    @staticmethod
    def _add(table: dict[str, Spread], name: str, value: float) -> None:
        table[""].add(value)
        if name:
            if name not in table and len(table) > Predictor.MOST:
                return
            table.setdefault(name, Spread()).add(value)

    @staticmethod
    def _of(table: dict[str, Spread], name: str, levels: Sequence[float], beyond: float = 0.0) -> tuple[float, ...]:
        named = table.get(name)
        found = named.quantiles(levels, beyond) if named is not None else ()
        return found or table[""].quantiles(levels, beyond)

    def came_back(self, tool: str, tool_s: float, growth: int) -> None:
        """A program's next request came, so long behind its last turn and with so many tokens more than that had."""
        self._add(self._tools, tool, tool_s)
        self._add(self._growth, tool, growth)

    def said(self, tenant: str, output: int) -> None:
        self._add(self._output, tenant, output)

    def turned(self, turn: int, last: bool) -> None:
        """A program's turn, from 1 on, turned out to be its last, or not."""
        if turn <= self.MOST:
            counts = self._ended.setdefault(turn, [0, 0])
            counts[0] += 1
            counts[1] += last

    def last(self, turn: int) -> float:
        """The probability that a turn is the last, by those of its number; a third of one is assumed to have been."""
        reached, ended = self._ended.get(turn, (0, 0))
        return (ended + 1 / 3) / (reached + 1)

    def predict(self, tenant: str, tool: str, turn: int, acting_s: float = 0.0) -> Prediction:
        return Prediction(
            self._of(self._tools, tool, LEVELS, acting_s),
            self._of(self._growth, tool, THREE),
            self._of(self._output, tenant, THREE),
            self.last(turn),
        )
