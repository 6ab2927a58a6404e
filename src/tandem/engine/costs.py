"""What a step costs: device-seconds by a profile, the one currency in which service is charged, sold and simulated.

A step costs `base_s`, and for each of its works what its rows cost: a row of a prompt or one that draws, and each
token of context that a row reads. Keys and values that are held cost by token and second, whether their owner runs or
waits for a tool. The coefficients are fitted to an engine's own steps once, and frozen: the same work costs the same
in every run of one profile, and a decision that depends on a cost is a function of the config.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from annotated_types import Gt
from numpy.typing import NDArray

from tandem.config import Amount, section
from tandem.errors import ConfigError

if TYPE_CHECKING:
    from tandem.engine.batch import Work

PICO = 10**12  # charges are whole picoseconds: sums are exact, in whatever order


class Rows(NamedTuple):
    """What a step ran, as its cost sees it."""

    prefill: int = 0  # rows of works of more than one, without those that tell a log-prob of the prompt
    context: int = 0  # tokens that all rows read, themselves among them
    decode: int = 0  # works of one row, and those that tell: both go through the output head. A draw that tells the
    # likeliest tokens goes through it once more: one of these more, and a row of a prompt less

    @staticmethod
    def of(works: Iterable[Work]) -> Rows:
        prefill = context = decode = 0
        for work in works:
            count = len(work.tokens)
            context += count * work.start + count * (count + 1) // 2
            if count == 1:
                decode += 1
            else:
                scored = work.scores
                prefill += count - scored
                decode += scored
            prefill -= work.told
            decode += work.told
        return Rows(prefill, context, decode)


@dataclass(frozen=True, slots=True)
@section("cost")
class StepCost:
    """Seconds of the device.

    >>> StepCost(base_s=1.0, prefill_token_s=0.5, context_token_s=0.0, decode_token_s=0.25).of(Rows(4, 0, 2))
    3.5
    """

    base_s: Annotated[float, Gt(0)] = 1e-3  # of a step, whatever is in it
    prefill_token_s: Annotated[float, Gt(0)] = 1e-5  # of a row of a prompt
    context_token_s: Amount = 0.0  # of a token that a row reads
    decode_token_s: Annotated[float, Gt(0)] = 1e-4  # of a row that runs alone, or tells a log-prob of its prompt
    held_token_s: Amount = 0.0  # of a token's keys and values, a second

    def of(self, rows: Rows) -> float:
        """Of a step with these rows."""
        return self.base_s + self.rows(rows)

    def rows(self, rows: Rows) -> float:
        """What these rows add to a step."""
        prefill, context, decode = rows
        return self.prefill_token_s * prefill + self.context_token_s * context + self.decode_token_s * decode

    def prefill(self, start: int, tokens: int) -> float:
        """What it takes to compute these tokens (again), in a step that runs anyway."""
        context = tokens * start + tokens * (tokens + 1) // 2
        return self.prefill_token_s * tokens + self.context_token_s * context

    def priced(self, capacity_tokens: int) -> StepCost:
        """With the price of memory where it has none: a device's whole memory is worth as much as the device."""
        return self if self.held_token_s else replace(self, held_token_s=1.0 / capacity_tokens)

    @staticmethod
    def fit(steps: Sequence[tuple[Rows, float]]) -> StepCost:
        """The least squares of what steps took, relative to it; a coefficient that would fall below 0 is left out.

        ConfigError where the steps do not tell the coefficients apart. Memory has no price yet.
        """
        table = np.array([[1.0, *rows] for rows, _ in steps], dtype=np.float64).reshape(len(steps), 4)
        took = np.array([seconds for _, seconds in steps], dtype=np.float64)
        if len(steps) < 4 or np.linalg.matrix_rank(table[:, [0, 1, 3]]) < 3 or not (took > 0).all():
            raise ConfigError(
                f"the cost of a step cannot be fitted to {len(steps)} steps: they must differ in rows of prompts and "
                "in rows that draw, and each must take time. Give more steps, or name the coefficients."
            )
        return StepCost.fitted(*nonnegative(table / took[:, None], np.ones(len(steps))))

    @staticmethod
    def fitted(base: float, prefill: float, context: float, decode: float) -> StepCost:
        """Of coefficients that were fitted: what was not told apart from nothing still counts as something."""
        least = 1e-9
        return StepCost(max(base, least), max(prefill, least), context, max(decode, least))


def nonnegative(table: NDArray[np.float64], target: NDArray[np.float64]) -> list[float]:
    """Least squares of `table @ coefficients = target`: the one that would fall furthest below 0 is left out (is 0),
    until none does."""
    scale = table.max(axis=0)
    kept = [column for column in range(table.shape[1]) if scale[column] > 0]
    coefficients = np.zeros(table.shape[1])
    while kept:
        found = np.linalg.lstsq(table[:, kept] / scale[kept], target, rcond=None)[0]
        if (found >= 0).all():
            coefficients[kept] = found / scale[kept]
            break
        kept.pop(int(np.argmin(found)))
    return coefficients.tolist()


class Prices(NamedTuple):
    """StepCost in whole picoseconds."""

    base: int
    prefill: int
    context: int
    decode: int
    held: float  # picoseconds a token and second

    @staticmethod
    def of(cost: StepCost) -> Prices:
        row = (cost.base_s, cost.prefill_token_s, cost.context_token_s, cost.decode_token_s)
        base, prefill, context, decode = (round(seconds * PICO) for seconds in row)
        return Prices(max(1, base), max(1, prefill), context, max(1, decode), cost.held_token_s * PICO)

    @property
    def head(self) -> int:
        """Of a row's product with the output head."""
        return max(0, self.decode - self.prefill)

    def rows(self, start: int, count: int, scored: int = 0, told: int = 0) -> int:
        """So many rows of one sequence from a position on, of which some tell a log-prob of its prompt, and some the
        likeliest tokens beside the one drawn."""
        context = self.context * (count * start + count * (count + 1) // 2) + self.head * told
        return context + (self.decode if count == 1 else self.prefill * (count - scored) + self.decode * scored)
