"""The price of a trajectory: a Lagrange multiplier that holds the mean cost at a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.config import AboveZero, Amount, section
from tandem.errors import ConfigError
from tandem.types import Group, Trajectory

Unit = Literal["tokens", "seconds", "tool_calls"]


@dataclass(frozen=True, slots=True)
@section("algo.price")
class PriceConfig:
    """What a trajectory may cost in the mean. Under "seconds" the advantages depend on the clock, so such a run does
    not repeat bit for bit.

    >>> PriceConfig("tokens", budget=200.0).initial
    0.0
    """

    unit: Unit = "tokens"  # sampled tokens, seconds of generation, or calls of tools
    budget: AboveZero | None = None  # mean cost of a trajectory, in units; None: trajectories cost nothing
    initial: Amount = 0.0  # multiplier of the first step: reward lost by a trajectory that costs the budget
    rate: Amount = 0.1  # change of the multiplier a step, at a mean cost of twice the budget

    def __post_init__(self) -> None:
        if self.budget is None and self.initial != 0.0:
            raise ConfigError(
                f"algo.price.initial is {self.initial} but algo.price.budget is none, so nothing is charged. "
                "Set algo.price.budget, or algo.price.initial to 0."
            )


def cost(unit: Unit, trajectory: Trajectory) -> float:
    """What a trajectory cost.

    >>> from tandem.columns import Columns
    >>> cost("tokens", Trajectory("p/0", "p", Columns.of(tokens=(1, 2, 7), loss_mask=(False, False, True))))
    1.0
    """
    if unit == "tokens":
        return float(trajectory.num_sampled)
    calls = trajectory.counts.get("tool_calls", trajectory.counts.get("observations", 0))  # of a task without tools
    return trajectory.seconds if unit == "seconds" else float(calls)


def charged_reward(config: PriceConfig, program: Sequence[Trajectory], price: float) -> float:
    """reward - price * cost / budget of a program, given its segments; the reward itself, to the bit, without a budget
    or at price 0."""
    if config.budget is None or price == 0.0:
        return program[0].reward
    return program[0].reward - price * sum(cost(config.unit, segment) for segment in program) / config.budget


def mean_cost(unit: Unit, groups: Sequence[Group]) -> float | None:
    """Mean over the programs that did not fail; None where all failed."""
    programs = [program for group in groups for program in group.programs if program[0].failure is None]
    costs = [sum(cost(unit, segment) for segment in program) for program in programs]
    return math.fsum(costs) / len(costs) if costs else None


class Lagrangian:
    """The multiplier: price <- max(0, price + rate * (mean cost / budget - 1)) after each step.

    Dual ascent on  max E[reward]  subject to  E[cost] <= budget. Without a budget it stays at 0.
    """

    def __init__(self, config: PriceConfig) -> None:
        self.config = config
        self.price = config.initial

    def update(self, groups: Sequence[Group]) -> float | None:
        """Move the price by a step's trajectories; returns their mean cost, None where all failed."""
        spent = mean_cost(self.config.unit, groups)
        if self.config.budget is not None and spent is not None:
            self.price = max(0.0, self.price + self.config.rate * (spent / self.config.budget - 1.0))
        return spent

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"price": self.price}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's state."""
        price = float(state["price"])
        assert math.isfinite(price) and price >= 0.0, f"price {price}"
        self.price = price
