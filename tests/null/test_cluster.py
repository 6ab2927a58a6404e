"""Shares over several engines: the weights that each is given, and what tenants get of all of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.batch import INITIAL
from tandem.engine.cluster import HALF_LIFE_S, Demand, balanced, local_weights
from tandem.engine.config import EngineConfig
from tandem.engine.costs import StepCost
from tandem.engine.driver import Driver
from tandem.engine.schedule import Scheduler
from tandem.engine.share import Shares, Terms
from tandem.rollout.balance import Balance
from tandem.rollout.router import Replica, Router
from tandem.sim.cluster import Cluster
from tandem.sim.engine import SimEngine
from tandem.types import Completion, Request, Sampling
from tests.null.paged_memory import group, make

COST = StepCost(base_s=2e-3, prefill_token_s=5e-5, context_token_s=0.0, decode_token_s=1e-3, held_token_s=1e-15)


class Fleet:
    """Tenants that keep so many requests on each engine."""

    def __init__(self, weights: dict[str, float], flights: list[dict[str, int]], told: bool = True) -> None:
        config = EngineConfig(page_tokens=32, batch_tokens=2048, max_sequences=256, order="shares")
        shares = Shares({path: Terms(weight) for path, weight in weights.items()}, COST)
        engines = [SimEngine(Scheduler(config, 4000, shares=shares), COST) for _ in flights]
        self.cluster = Cluster(engines, weights if told else None)
        self.cluster.came = self.came
        self.flights, self.asked, self.open = flights, 0, Counter[tuple[int, str]]()
        for engine in range(len(flights)):
            self.fill(engine)

    def fill(self, engine: int) -> None:
        for tenant, count in self.flights[engine].items():
            while self.open[engine, tenant] < count:
                self.asked += 1
                tokens = tuple(range(7 * self.asked, 7 * self.asked + 16))
                name = f"{tenant}#{self.asked}"
                self.open[engine, tenant] += 1
                request = Request(name, name, tokens, Sampling(max_new_tokens=24), seed=0, tenant=tenant)
                self.cluster.engines[engine].submit(request, self.cluster.now)

    def came(self, completion: Completion, engine: int) -> None:
        self.open[engine, completion.request_id.partition("#")[0]] -= 1
        self.fill(engine)

    def parts(self, tenants: list[str], begin_s: float, end_s: float) -> dict[str, float]:
        """Of what these tenants have together in that time."""
        self.cluster.run(begin_s)
        before = {tenant: self.cluster.had(tenant) for tenant in tenants}
        self.cluster.run(end_s)
        had = {tenant: self.cluster.had(tenant) - before[tenant] for tenant in tenants}
        return {tenant: seconds / sum(had.values()) for tenant, seconds in had.items()}


@pytest.mark.parametrize("skew", [(80, 20), (20, 80), (50, 50)])
def test_two_engines_give_four_to_one_however_arrivals_lie(skew: tuple[int, int]) -> None:
    """Each engine divides by weight alone, and who asks where few others do gets more than its share."""
    one, other = skew
    flights = [{"a": one, "b": other}, {"a": other, "b": one}]
    parts = Fleet({"a": 4.0, "b": 1.0}, flights).parts(["a", "b"], 3.0, 23.0)
    assert parts == pytest.approx({"a": 0.8, "b": 0.2}, rel=0.05)


def test_where_a_tenant_has_nothing_it_is_given_nothing() -> None:
    """A tenant is paid on one engine for what it could not have on another; or loses what is its own there."""
    flights = [{"a": 100}, {"a": 100, "b": 100}]
    parts = Fleet({"a": 1.0, "b": 1.0}, flights).parts(["a", "b"], 3.0, 13.0)
    assert parts == pytest.approx({"a": 0.5, "b": 0.5}, rel=0.05)  # a on its own engine, b on the other
    apart = Fleet({"a": 1.0, "b": 1.0}, flights, told=False).parts(["a", "b"], 3.0, 13.0)
    assert apart["b"] == pytest.approx(0.25, rel=0.05)


def test_three_levels_twenty_tenants_and_four_engines_under_bursts() -> None:
    """Shares hold inside an engine or at the top of the tree, and not for the cluster, or while loads come and go."""
    rng = random.Random(14)
    users = [f"o{n % 2}/t{n % 5}/u{n}" for n in range(20)]
    weights = {"o0": 2.0, "o1": 1.0} | {f"o{o}/t{t}": 1.0 + t % 3 for o in (0, 1) for t in range(5)}
    weights |= {user: 1.0 + n % 2 for n, user in enumerate(users)}
    flights = [{user: rng.choice([8, 16, 24]) for user in users} for _ in range(4)]
    fleet = Fleet(weights, flights)
    fleet.cluster.run(4.0)
    orgs, teams = ["o0", "o1"], [f"o0/t{t}" for t in range(5)]
    seen: dict[str, list[float]] = {node: [] for node in [*orgs, *teams]}
    for burst in range(6):
        for _ in range(8):  # some tenants crowd an engine, others leave one, and none leaves all of them
            engine, user = rng.randrange(4), rng.choice(users)
            flights[engine][user] = rng.choice([4, 8, 16, 32])
        for engine in range(4):
            fleet.fill(engine)
        began = 4.0 + 4.0 * burst
        before = {node: fleet.cluster.had(node) for node in seen}
        fleet.cluster.run(began + 4.0)
        for siblings in (orgs, teams):
            had = {node: fleet.cluster.had(node) - before[node] for node in siblings}
            for node, seconds in had.items():
                seen[node].append(seconds / sum(had.values()))
    for siblings in (orgs, teams):
        for node in siblings:
            due = weights[node] / sum(weights[other] for other in siblings)
            assert sum(seen[node]) / len(seen[node]) == pytest.approx(due, rel=0.05), node


loads = st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=2, max_size=4)


@given(loads, st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_parts_fill_engines_that_have_work_and_no_others(demand: list[list[int]], weights: list[int]) -> None:
    """An engine is given away twice, or a tenant is given a part of one on which it has nothing."""
    parts = balanced(weights[: len(demand)], demand, [1.0, 1.0, 1.0])
    for engine in range(3):
        working = any(row[engine] for row in demand)
        assert sum(row[engine] for row in parts) == pytest.approx(1.0 if working else 0.0)
    for row, load in zip(parts, demand, strict=True):
        assert all((part > 0) <= (there > 0) for part, there in zip(row, load, strict=True))


@given(st.lists(st.lists(st.integers(1, 50), min_size=3, max_size=3), min_size=2, max_size=4))
def test_where_all_have_work_everywhere_parts_add_up_to_weights(demand: list[list[int]]) -> None:
    """Loads that lie askew change what a tenant gets of all engines."""
    weights = [4.0, 1.0, 2.0, 1.0][: len(demand)]
    parts = balanced(weights, demand, [1.0, 1.0, 1.0])
    for weight, row in zip(weights, parts, strict=True):
        assert sum(row) == pytest.approx(3.0 * weight / sum(weights), rel=1e-3)


def test_one_engine_has_the_weights_as_they_are() -> None:
    """What is split over engines changes the shares where there is one."""
    weights = {"a": 4.0, "b": 1.0, "a/x": 3.0, "a/y": 1.0}
    (found,) = local_weights(weights, [{"a/x": 5, "a/y": 50, "b": 7, "": 2}])
    assert found == pytest.approx({"a": 4.0, "b": 1.0, "": 1.0, "a/x": 3.0, "a/y": 1.0})


def test_a_load_counts_at_once_and_fades() -> None:
    """A tenant that comes back is starved by the memory of its absence, or one that pauses loses its share at once."""
    demand = Demand()
    assert demand.told({"a": 8.0}, 0.0) == {"a": 8.0}
    assert demand.told({}, HALF_LIFE_S) == {"a": 4.0}
    assert demand.told({"a": 8.0, "b": 1.0}, 2 * HALF_LIFE_S) == {"a": 8.0, "b": 1.0}
    assert demand.told({}, 60 * HALF_LIFE_S) == {}


def test_a_router_tells_its_engines_their_weights() -> None:
    """The engines of one router divide by weight each for itself, and a tenant on two has twice its share of one."""
    now = [0.0]
    settings = {"order": "shares", "num_pages": 400, "max_sequences": 8}
    engines = [make(**settings)[0] for _ in range(2)]  # type: ignore[arg-type]
    replicas = [Replica(f"e{n}", Driver(one), lambda: INITIAL, 1600, 4) for n, one in enumerate(engines)]
    router = Router(replicas, balance=Balance({"a": 4.0, "b": 1.0}, lambda: now[0]))
    requests = [replace(one, tenant="ab"[n in (0, 1, 6)]) for n, one in enumerate(group("p", [1, 2, 3], 12, 40, ()))]
    for number, request in enumerate(requests):
        router.submit(replace(request, group=str(number)))
    trees = [engine.scheduler.order.tree for engine in engines]
    for _ in range(6):
        router.progress(0, 0.0)
        now[0] += 1.0
    wanted = local_weights({"a": 4.0, "b": 1.0}, [tree.loads() for tree in trees])
    assert all(tree.loads().keys() == {"a", "b"} for tree in trees)
    for tree, local in zip(trees, wanted, strict=True):
        weights = {name: tree.tenant(name).weight / 1000 for name in "ab"}
        assert weights == pytest.approx(local, rel=0.01) and weights["a"] < 5
