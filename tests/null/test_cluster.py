"""Shares over several engines: the weights that each is given, and what tenants get of all of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.batch import INITIAL
from tandem.engine.cluster import HALF_LIFE_S, Demand, balanced, local_terms
from tandem.engine.config import EngineConfig
from tandem.engine.costs import StepCost
from tandem.engine.deal import Deals
from tandem.engine.driver import Driver
from tandem.engine.schedule import Scheduler
from tandem.engine.share import Shares, Terms
from tandem.rollout.balance import Balance
from tandem.rollout.router import Replica, Router
from tandem.sim.cluster import Cluster
from tandem.sim.engine import SimEngine
from tandem.types import Completion, Request, Sampling
from tests.grid import crossed
from tests.null.paged_memory import group, make

COST = StepCost(base_s=2e-3, prefill_token_s=5e-5, context_token_s=0.0, decode_token_s=1e-3, held_token_s=1e-15)


class Fleet:
    """Tenants that keep so many requests on each engine."""

    def __init__(self, terms: dict[str, Terms], flights: list[dict[str, int]], told: bool = True) -> None:
        config = EngineConfig(page_tokens=32, batch_tokens=2048, max_sequences=256, order="shares")
        shares = Shares(terms, COST)
        engines = [SimEngine(Scheduler(config, 4000, shares=shares), COST) for _ in flights]
        self.cluster = Cluster(engines, shares.tenants if told else None)
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
    """Weights are split by load alone, as Linux does, and who asks where few others do gets more than its share."""
    one, other = skew
    flights, terms = [{"a": one, "b": other}, {"a": other, "b": one}], {"a": Terms(4.0), "b": Terms(1.0)}
    parts = Fleet(terms, flights).parts(["a", "b"], 3.0, 23.0)
    assert parts == pytest.approx({"a": 0.8, "b": 0.2}, rel=0.05)


class Doors:
    """Two routers before two engines, each of which both ask in turn; tenants whose requests come by either in parts.

    turns: each router has half of all places, and hands on what waits there by turns, of each tenant as many as its
    weight is; engines take what comes first. Else all is handed on as it comes, and engines have a tree.
    """

    def __init__(self, by_first: dict[str, float], places: int, turns: bool) -> None:
        order, weights = "arrival" if turns else "shares", {"a": 4, "b": 1}
        config = EngineConfig(page_tokens=32, batch_tokens=2048, max_sequences=places, order=order)  # type: ignore[arg-type]
        terms = {name: Terms(float(weight)) for name, weight in weights.items()}
        shares = None if turns else Shares(terms, COST)
        engines = [SimEngine(Scheduler(config, 4000, shares=shares), COST) for _ in range(2)]
        self.cluster = Cluster(engines, None if turns else terms)
        self.cluster.came = self.came
        self.cycle = [name for name, weight in weights.items() for _ in range(weight)]
        self.next, self.door_of, self.served = [0, 0], dict[str, int](), Counter[str]()
        rng = random.Random(3)
        self.waiting = [Counter[str](), Counter[str]()]
        for name in (name for _ in range(4000) for name in "ab"):
            self.waiting[rng.random() >= by_first[name]][name] += 1
        for door in range(2):
            for _ in range(places if turns else sum(self.waiting[door].values())):
                self.hand_on(door)

    def hand_on(self, door: int) -> None:
        while self.waiting[door].total():
            name = self.cycle[self.next[door] % len(self.cycle)]
            self.next[door] += 1
            if self.waiting[door][name]:
                self.waiting[door][name] -= 1
                number = len(self.door_of)
                tokens = tuple(range(7 * number, 7 * number + 16))
                request = Request(f"{name}#{number}", str(number), tokens, Sampling(max_new_tokens=8), 0, name)
                self.door_of[request.id] = door
                self.cluster.engines[self.next[door] % 2].submit(request, self.cluster.now)
                return

    def came(self, completion: Completion, engine: int) -> None:
        self.served[completion.request_id[0]] += 1
        self.hand_on(self.door_of[completion.request_id])


@pytest.mark.parametrize(
    ("by_first", "places"),  # of each engine
    crossed([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.9, "b": 0.1}], [32, 128]),
)
def test_two_routers_give_four_to_one_where_turns_at_each_give_one_to_one(
    by_first: dict[str, float], places: int
) -> None:
    """Weights hold at each router, and a tenant that comes by another than all others has as much as they together."""
    turns, shares = Doors(by_first, places, turns=True), Doors(by_first, places, turns=False)
    served, had = list[Counter[str]](), dict[str, float]()
    for doors in (turns, shares):
        doors.cluster.run(2.0)
        before = doors.served.copy()
        had = {} if doors is turns else {name: doors.cluster.had(name) for name in "ab"}
        doors.cluster.run(14.0)
        assert all(doors.served[name] < 3500 for name in "ab"), "it ran dry"
        served.append(doors.served - before)
    ratio = served[0]["a"] / served[0]["b"]
    assert ratio == pytest.approx(1.0, rel=0.05) if by_first["a"] in (0.0, 1.0) else ratio < 2.0
    had = {name: doors.cluster.had(name) - seconds for name, seconds in had.items()}
    assert had["a"] / had["b"] == pytest.approx(4.0, rel=0.05)
    assert served[1]["a"] / served[1]["b"] == pytest.approx(4.0, rel=0.15)  # waves and places are whole


def test_where_a_tenant_has_nothing_it_is_given_nothing() -> None:
    """A tenant is paid on one engine for what it could not have on another; or loses what is its own there."""
    flights, terms = [{"a": 100}, {"a": 100, "b": 100}], {"a": Terms(), "b": Terms()}
    parts = Fleet(terms, flights).parts(["a", "b"], 3.0, 13.0)
    assert parts == pytest.approx({"a": 0.5, "b": 0.5}, rel=0.05)  # a on its own engine, b on the other
    apart = Fleet(terms, flights, told=False).parts(["a", "b"], 3.0, 13.0)
    assert apart["b"] == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize(("flights", "apart"), [([(100, 100), (0, 100)], 0.2), ([(90, 100), (10, 100)], 0.4)])
def test_a_guarantee_is_of_all_engines(flights: list[tuple[int, int]], apart: float) -> None:
    """A tenant with work on one of two engines has half of what it was guaranteed; or has it twice."""
    terms = {"a": Terms(0.01, guarantee=0.4), "b": Terms(1.0)}
    loads = [{"a": one, "b": other} for one, other in flights]
    assert Fleet(terms, loads).parts(["a", "b"], 3.0, 13.0)["a"] == pytest.approx(0.4, rel=0.05)
    alone = Fleet(terms, loads, told=False).parts(["a", "b"], 3.0, 8.0)["a"]
    assert alone == pytest.approx(apart, rel=0.1)  # each engine by itself


@pytest.mark.parametrize("others", [0, 100])
@pytest.mark.parametrize("flights", [(100, 0), (90, 10), (50, 50)])
def test_a_cap_is_of_all_engines(flights: tuple[int, int], others: int) -> None:
    """A tenant with work on one of two engines has half of what its cap allows; or has on each what it has of all."""
    terms = {"a": Terms(4.0, cap=0.25), "b": Terms(1.0)}
    fleet = Fleet(terms, [{"a": one, "b": others} for one in flights])
    fleet.cluster.run(5.0)
    before = fleet.cluster.had("a")
    fleet.cluster.run(25.0)
    assert (fleet.cluster.had("a") - before) / 2 / 20.0 == pytest.approx(0.25, rel=0.05)


def test_three_levels_twenty_tenants_and_four_engines_under_bursts() -> None:
    """Shares hold inside an engine or at the top of the tree, and not at each level of the cluster, under bursts."""
    rng = random.Random(14)
    users = [f"o{n % 2}/t{n % 5}/u{n}" for n in range(19)]
    terms = {"o0": Terms(2.0), "o1": Terms(1.0)} | {f"o{o}/t{t}": Terms(1.0 + t % 3) for o in (0, 1) for t in range(5)}
    terms |= {user: Terms(1.0 + n // 10) for n, user in enumerate(users)}
    wanted = list(terms)
    terms["few"] = Terms(1.0)  # whose rows all run in every step: it says how long one is, and the others want more
    flights = [{"few": 4} | {user: rng.choice([4, 8, 16]) for user in users} for _ in range(4)]
    fleet = Fleet(terms, flights)
    fleet.cluster.run(2.0)
    before, steps = {node: fleet.cluster.had(node) for node in wanted}, Counter[str]()
    for engine in fleet.cluster.engines:
        watch(engine, steps)
    for burst in range(5):
        for _ in range(10):  # some tenants crowd an engine, others leave it but for a few
            engine, user = rng.randrange(4), rng.choice(users)
            flights[engine][user] = rng.choice([4, 8, 16, 32])
        for place in range(4):
            fleet.fill(place)
        fleet.cluster.run(4.0 + 2.0 * burst)
    had = {node: fleet.cluster.had(node) - before[node] for node in wanted}
    for node in wanted:
        siblings = [other for other in wanted if other.rpartition("/")[0] == node.rpartition("/")[0]]
        due = terms[node].weight / sum(terms[other].weight for other in siblings)
        assert steps[node] > 0.95 * steps[""], f"{node} is not backlogged"
        assert had[node] / sum(had[other] for other in siblings) == pytest.approx(due, rel=0.05), node


def watch(engine: SimEngine, steps: Counter[str]) -> None:
    """Counts steps, under "", and for each tenant those that left a row of it out."""
    step, deals = engine.step, engine.scheduler.order
    assert isinstance(deals, Deals)

    def watched(now: float) -> tuple[float, list[Completion]]:
        told = step(now)
        left = [one for one in deals._leaves if one.waits or one.chunks or one.place < len(one.rows)]
        waits = [one.leaf for one in engine.scheduler.waiting if one.leaf is not None]
        steps.update({node.path for leaf in (*left, *waits) for node in leaf.way[:-1]})
        steps[""] += 1
        return told

    engine.step = watched  # type: ignore[method-assign]


def test_an_engine_that_nobody_uses_changes_nothing() -> None:
    """An idle engine beside a busy one makes all tenants there alike."""
    busy = {"a": 30.0, "b": 30.0}
    of = local_terms({"a": Terms(4.0), "b": Terms(1.0)}, [{}, busy])[1]
    assert {path: one.weight for path, one in of.items()} == pytest.approx({"a": 4.0, "b": 1.0})


def test_who_left_an_engine_is_forgotten_there() -> None:
    """Parts of an engine are held for minutes for who has left it, and all have the wrong shares elsewhere."""
    demand = [Demand(), Demand()]
    for one in demand:
        one.told({"a": 24.0, "b": 6.0}, 0.0)
    told = [demand[0].told({}, 30.0), demand[1].told({"a": 6.0, "b": 24.0}, 30.0)]
    of = local_terms({"a": Terms(4.0), "b": Terms(1.0)}, told)[1]
    assert {path: one.weight for path, one in of.items()} == pytest.approx({"a": 4.0, "b": 1.0})


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
    terms = {"a": Terms(4.0, cap=0.9), "b": Terms(1.0), "a/x": Terms(3.0, guarantee=0.2, cap=0.8), "a/y": Terms(1.0)}
    (found,) = local_terms(terms, [{"a/x": 5, "a/y": 50, "b": 7, "": 2}])
    assert {path: one.weight for path, one in found.items()} == pytest.approx(
        {"a": 4.0, "b": 1.0, "": 1.0, "a/x": 3.0, "a/y": 1.0}
    )
    assert found["a/x"].guarantee == pytest.approx(0.2) and found["a/x"].cap == pytest.approx(0.8)
    assert found["a"].cap == pytest.approx(0.9) and found["b"] == Terms(found["b"].weight)


@given(
    loads, st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4), st.lists(st.floats(0, 0.25), min_size=4, max_size=4)
)
def test_what_is_split_adds_up_to_what_was_promised(
    demand: list[list[int]], caps: list[float], guarantees: list[float]
) -> None:
    """Several engines promise a tenant more than one did, or together allow it more than its cap."""
    terms = {str(n): Terms(1.0, min(guarantees[n], caps[n]), caps[n]) for n in range(len(demand))}
    told = [{str(n): float(row[engine]) for n, row in enumerate(demand) if row[engine]} for engine in range(3)]
    found = local_terms(terms, told)
    for name, one in terms.items():
        there = [engine for engine in range(3) if name in told[engine]]
        if there:
            allowed = sum(found[engine][name].cap for engine in there)
            assert allowed == pytest.approx(min(3 * one.cap, len(there)) if one.cap < 1 else len(there), rel=1e-6)
            promised = sum(found[engine][name].guarantee for engine in there)
            assert promised <= 3 * one.guarantee + 1e-9


def test_a_splitting_by_hand() -> None:
    """A cap is split by engines and not by loads; or the idle time that it leaves is nobody's."""
    terms = {"a": Terms(1.0, cap=0.25), "b": Terms(1.0, cap=0.5)}
    one, other = local_terms(terms, [{"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.0}])
    # a may have half an engine, b one, and half an engine is nobody's: x_ai / idle_i is 3 : 1, x_bi / idle_i 1 : 1
    assert one["a"].cap + other["a"].cap == pytest.approx(0.5) and one["b"].cap + other["b"].cap == pytest.approx(1.0)
    odds = one["a"].cap / other["a"].cap / (one["b"].cap / other["b"].cap)
    assert odds == pytest.approx(3.0, rel=1e-3)


def test_a_load_counts_at_once_and_fades() -> None:
    """A tenant that comes back is starved by the memory of its absence, or one that pauses loses its share at once."""
    demand = Demand()
    assert demand.told({"a": 8.0}, 0.0) == {"a": 8.0}
    assert demand.told({}, HALF_LIFE_S) == {"a": 4.0}
    assert demand.told({"a": 8.0, "b": 1.0}, 2 * HALF_LIFE_S) == {"a": 8.0, "b": 1.0}
    assert demand.told({}, 60 * HALF_LIFE_S) == {}


def test_a_router_tells_its_engines_their_weights() -> None:
    """The engines of one router divide by weight each for itself, and a tenant on two has twice its share of one."""
    now, terms = [0.0], {"a": Terms(4.0), "b": Terms(1.0)}
    settings = {"order": "shares", "num_pages": 400, "max_sequences": 8}
    engines = [make(**settings)[0] for _ in range(2)]  # type: ignore[arg-type]
    replicas = [Replica(f"e{n}", Driver(one), lambda: INITIAL, 1600, 4) for n, one in enumerate(engines)]
    router = Router(replicas, balance=Balance(terms, lambda: now[0]))
    requests = [replace(one, tenant="ab"[n in (0, 1, 6)]) for n, one in enumerate(group("p", [1, 2, 3], 12, 40, ()))]
    for number, request in enumerate(requests):
        router.submit(replace(request, group=str(number)))
    trees = [engine.scheduler.order.tree for engine in engines]
    for _ in range(6):
        router.progress(0, 0.0)
        now[0] += 1.0
    wanted = local_terms(terms, [tree.loads() for tree in trees])
    assert all(tree.loads().keys() == {"a", "b"} for tree in trees)
    for tree, local in zip(trees, wanted, strict=True):
        weights = {name: tree.tenant(name).weight / 1000 for name in "ab"}
        assert weights == pytest.approx({name: local[name].weight for name in "ab"}, rel=0.01) and weights["a"] < 5
