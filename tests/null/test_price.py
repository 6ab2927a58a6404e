"""The price of a trajectory: what is charged, and where the multiplier settles."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.algo.advantage import samples_from_groups
from tandem.algo.config import AlgoConfig
from tandem.algo.price import Lagrangian, PriceConfig, charged_reward, cost, mean_cost
from tandem.columns import Columns
from tandem.errors import ConfigError
from tandem.types import Failure, Group, Prompt, Trajectory
from tests.samples import column


def trajectory(name: str, reward: float, tokens: int = 1, seconds: float = 0.0, calls: int = 0, failed: bool = False):
    columns = Columns.of(
        tokens=range(tokens + 1),
        loss_mask=(False,) + (True,) * tokens,
        logprobs=(0.0,) + (-1.0,) * tokens,
        versions=(-1,) + (0,) * tokens,
    )
    return Trajectory(
        name,
        "p",
        columns,
        reward,
        failure=Failure("reward", "none") if failed else None,
        seconds=seconds,
        counts={"tool_calls": calls},
    )


def group(*trajectories: Trajectory) -> Group:
    return Group(Prompt("p", ()), trajectories)


@pytest.mark.parametrize(("unit", "wanted"), [("tokens", 4.0), ("seconds", 2.5), ("tool_calls", 3.0)])
def test_units(unit, wanted) -> None:
    """The prompt's tokens are charged for, or a unit reads another's field."""
    assert cost(unit, trajectory("p/0", 1.0, tokens=4, seconds=2.5, calls=3)) == wanted


def test_reward_by_hand() -> None:
    """The price is per token instead of per budget, or is added. 1 - 0.5 * 30 / 20 = 0.25."""
    one = trajectory("p/0", 1.0, tokens=30)
    assert charged_reward(PriceConfig(budget=20.0), (one,), 0.5) == pytest.approx(0.25)
    assert charged_reward(PriceConfig(budget=20.0), (one,), 0.0) == 1.0
    assert charged_reward(PriceConfig(), (one,), 0.5) == 1.0


def test_multiplier_by_hand() -> None:
    """A failed trajectory moves the price, it moves the wrong way, or falls below 0.

    Costs 10 and 20 with budget 10: mean 15, price 0.1 + 0.2 * 0.5 = 0.2; then cost 0: max(0, 0.2 - 0.2) = 0.
    """
    lagrangian = Lagrangian(PriceConfig(budget=10.0, initial=0.1, rate=0.2))
    some = [group(trajectory("p/0", 1.0, 10), trajectory("p/1", 0.0, 20), trajectory("p/2", 0.0, 99, failed=True))]
    assert lagrangian.update(some) == 15.0
    assert lagrangian.price == pytest.approx(0.2)
    free = [group(trajectory("p/0", 1.0, 0))]
    lagrangian.update(free)
    lagrangian.update(free)
    assert lagrangian.price == 0.0
    assert mean_cost("tokens", [group(trajectory("p/0", 1.0, failed=True))]) is None
    assert lagrangian.update([group(trajectory("p/0", 1.0, failed=True))]) is None and lagrangian.price == 0.0


def test_no_budget_is_no_price() -> None:
    """A run without a budget starts to charge."""
    lagrangian = Lagrangian(PriceConfig())
    assert lagrangian.update([group(trajectory("p/0", 1.0, 100))]) == 100.0
    assert lagrangian.price == 0.0


@settings(max_examples=40, deadline=None)
@given(longest=st.floats(5.0, 500.0), share=st.floats(0.1, 2.0), rate=st.floats(0.02, 0.5))
def test_the_mean_cost_comes_to_the_budget(longest: float, share: float, rate: float) -> None:
    """The multiplier drifts off, or settles where the budget is broken.

    A toy policy whose trajectories cost longest * exp(-price) in the mean: the price settles at log(longest / budget),
    and at 0 where the budget is never reached.
    """
    budget = share * longest
    lagrangian = Lagrangian(PriceConfig("seconds", budget=budget, rate=rate))
    for _ in range(2000):
        mean = longest * math.exp(-lagrangian.price)
        lagrangian.update(
            [group(*(trajectory(f"p/{g}", 0.0, seconds=mean * scale) for g, scale in enumerate((0.5, 1.5))))]
        )
    assert longest * math.exp(-lagrangian.price) == pytest.approx(min(budget, longest), rel=1e-6)


def test_the_price_goes_on_from_a_checkpoint() -> None:
    """A resumed run begins again at the initial price."""
    config = PriceConfig(budget=10.0, rate=0.3)
    first = Lagrangian(config)
    some = [group(trajectory("p/0", 1.0, 25))]
    first.update(some)
    second = Lagrangian(config)
    second.restore(first.state())
    first.update(some)
    second.update(some)
    assert first.price == second.price > 0.4


def test_samples_are_charged_before_advantages() -> None:
    """Equal rewards at unequal costs carry no gradient, or the zero-variance filter drops them."""
    config = AlgoConfig(advantage="dr_grpo", filter_zero_variance=True, price=PriceConfig(budget=10.0))
    groups = [group(trajectory("p/0", 1.0, 10), trajectory("p/1", 1.0, 20))]
    assert samples_from_groups(config, groups).samples == ()
    cheap, dear = samples_from_groups(config, groups, price=0.5).samples
    assert tuple(column(sample, "advantages")[-1] for sample in (cheap, dear)) == pytest.approx((0.25, -0.25))


def test_price_zero_is_the_identity() -> None:
    """A budget that is kept changes the advantages."""
    groups = [group(trajectory("p/0", 0.1, 10), trajectory("p/1", 0.7, 20), trajectory("p/2", 0.3, 7))]
    plain = samples_from_groups(AlgoConfig(), groups)
    assert samples_from_groups(AlgoConfig(price=PriceConfig(budget=10.0)), groups, price=0.0) == plain


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"unit": "token"}, "Did you mean"),
        ({"budget": 0.0}, "algo.price.budget is 0.0"),
        ({"budget": math.inf}, "algo.price.budget is inf"),
        ({"budget": 1.0, "initial": -0.1}, "algo.price.initial is -0.1"),
        ({"rate": math.nan}, "algo.price.rate is nan"),
        ({"initial": 0.5}, "nothing is charged"),
    ],
)
def test_wrong_price_is_refused(fields: dict, says: str) -> None:
    """A wrong price reaches the run, or its message does not name the setting."""
    with pytest.raises(ConfigError, match=says):
        PriceConfig(**fields)
