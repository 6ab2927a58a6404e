"""`engine.order=shares` on the real scheduler with a logical clock, against fluid sharing worked out by brute force."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.costs import PICO, StepCost
from tandem.engine.hand import Hand
from tandem.engine.share import UNIT, Node, Shares, Terms, Tree
from tandem.engine.table import Start
from tandem.engine.yields import held_below, who_yields
from tandem.sim.tenants import COST, Loads
from tandem.types import Request, Sampling

LEAVES = ["a/x", "a/y", "b/x", "b/y", "c"]
NODES = ["a", "b", *LEAVES]
weights = st.fixed_dictionaries({node: st.sampled_from([0.5, 1.0, 2.0, 4.0]) for node in NODES})


def fluid(terms: dict[str, float], leaves: set[str], seconds: float) -> dict[str, float]:
    """What each node is due of so many seconds, where these leaves could use all of it."""
    due: dict[str, float] = defaultdict(float, {"": seconds})
    active = sorted({leaf.rpartition("/")[0] for leaf in leaves} | leaves - {""}, key=lambda path: path.count("/"))
    for node in filter(None, active):
        parent = node.rpartition("/")[0]
        siblings = [other for other in active if other and other.rpartition("/")[0] == parent]
        due[node] = due[parent] * terms[node] / sum(terms[other] for other in siblings)
    return due


class Watch:
    """Who had rows that a step left out, and what each has had, step by step."""

    def __init__(self, load: Loads) -> None:
        self.load, self.steps = load, list[tuple[set[Node], dict[Node, int]]]()
        self.pick = 0.0  # a base, the largest quantum and a row, in seconds
        load.after = self.note

    def note(self) -> None:
        deals = self.load.deals
        left = [leaf for leaf in deals._leaves if leaf.place < len(leaf.rows) or leaf.chunks]
        had = {node: node.had for node in deals.tree.nodes() if node.live}
        self.steps.append(({node for leaf in left for node in leaf.way}, had))
        cost = self.load.deals.cost
        row = max(cost.decode_token_s + cost.context_token_s * 256, cost.prefill(256, 1))
        self.pick = max(self.pick, cost.base_s + deals._quantum / PICO + row)

    def widest(self, one: Node, other: Node) -> float:
        """Of any stretch in which both wanted more: the difference of what they had over their weights."""
        widest, low, high = 0.0, None, None
        for wanting, had in self.steps:
            if one not in wanting or other not in wanting:
                low = high = None
                continue
            apart = had[one] * UNIT / one.weight / PICO - had[other] * UNIT / other.weight / PICO
            low, high = min(apart, low or apart), max(apart, high or apart)
            widest = max(widest, high - low)
        return widest


@given(weights, st.lists(st.integers(1, 60), min_size=5, max_size=5), st.sampled_from([12, 200]))
@settings(max_examples=8, deadline=None)
def test_siblings_that_want_more_are_apart_by_two_picks_each(
    terms: dict[str, float], flights: list[int], prompt: int
) -> None:
    """A tenant is served by the number of its requests, its programs or its siblings, and not by its weight."""
    named = {node: Terms(weight) for node, weight in terms.items()}
    load = Loads(dict(zip(LEAVES, flights, strict=True)), named, max_sequences=300, new=12, prompt=prompt, credit_s=0.0)
    watch = Watch(load)
    load.run(2.5, checked=True)
    for one, other in combinations([load.node(node) for node in NODES], 2):
        if one.parent is other.parent:
            bound = 2 * watch.pick * (UNIT / one.weight + UNIT / other.weight)
            assert watch.widest(one, other) <= bound, (one.path, other.path)


TREES = {
    "flat": ({"a": 4.0, "b": 2.0, "c": 1.0, "d": 1.0}, {"a": 60, "b": 60, "c": 60, "d": 60}),
    "deep": (
        {"a": 1.0, "b": 1.0, "a/x": 3.0, "a/y": 1.0, "a/x/u": 1.0, "a/x/v": 1.0, "b/x": 1.0},
        {"a/x/u": 50, "a/x/v": 50, "a/y": 50, "b/x": 90},
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_who_wants_more_has_what_fluid_sharing_gives(name: str) -> None:
    """Weights hold among siblings and not down the tree, or what is said of picks adds up over time."""
    terms, flights = TREES[name]
    load = Loads(flights, {node: Terms(weight) for node, weight in terms.items()}, max_sequences=300)
    load.run(2.0)
    since, before = load.engine.busy_s, {node: load.had(node) for node in terms}
    load.run(10.0)
    due = fluid(terms, set(flights), load.engine.busy_s - since)
    for node in terms:
        assert load.had(node) - before[node] == pytest.approx(due[node], rel=0.05), node


def test_shares_hold_in_every_window_in_which_both_wait() -> None:
    """Shares are off in the first seconds, as prompts start; or where memory is charged, or one asks for more."""
    cost = StepCost(base_s=8e-3, prefill_token_s=3e-4, context_token_s=2e-7, decode_token_s=1.1e-3)
    given: dict[str, Any] = {"cost": cost, "prompt": 24, "new": 32, "pages": 700, "held_token_s": 1 / 22_400}
    for flights in ({"few": 150, "crowd": 200}, {"few": 200, "crowd": 400}):
        load = Loads(flights, **given)
        for _ in range(2):  # of 10 s, the first included
            before = {name: load.had(name) for name in flights}
            load.run(10.0)
            had = {name: load.had(name) - before[name] for name in flights}
            assert load.node("few").waiting and load.node("crowd").waiting
            assert had["few"] / sum(had.values()) == pytest.approx(0.5, rel=0.02)
    load = Loads({"few": 100, "crowd": 200}, **given).run(5.0)
    waited = list[int]()
    load.after = lambda: waited.append(load.node("few").waiting)
    load.run(5.0)
    assert sum(count > 0 for count in waited) < 0.2 * len(waited), "of 256 places it is due 128: it has all it wants"


def test_a_row_that_tells_a_log_prob_of_its_prompt_is_charged_as_one_that_draws() -> None:
    """Log-probs of prompts, with a product with the output head for each, are free; or charged to somebody else."""
    had = []
    for scored in (False, True):
        load = Loads({}, {"t": Terms()})
        sampling, tokens = Sampling(max_new_tokens=1), tuple(range(900, 1100))
        load.engine.submit(Request("t#1", "p", tokens, sampling, seed=0, tenant="t", scored=scored), load.now)
        load.born["t#1"] = 0.0
        load.step()
        assert load.tokens["t"] == 1
        assert load.had("t") == pytest.approx(load.engine.busy_s)
        had.append(load.had("t"))
    more = 199 * (COST.decode_token_s - COST.prefill_token_s)  # of the last row the next token is drawn
    assert had[1] - had[0] == pytest.approx(more)


def test_a_draw_that_tells_the_likeliest_tokens_is_charged_for_the_head_twice() -> None:
    """The likeliest tokens beside each, another product with the output head, are free; or charged to somebody else."""
    had = []
    for likely in (0, 5):
        load = Loads({}, {"t": Terms()})
        for number, new in enumerate((8, 3)):
            drawn, tokens = Sampling(max_new_tokens=new), tuple(range(900 + number, 940))
            one = Request(f"t#{number}", "p", tokens, drawn, seed=0, tenant="t", likely=likely if number == 0 else 0)
            load.engine.submit(one, load.now)
            load.born[one.id] = 0.0
            load.open["t"] += 1
        while load.engine.has_work:
            load.step()
        assert load.had("t") == pytest.approx(load.engine.busy_s)
        had.append(load.had("t"))
    assert had[1] - had[0] == pytest.approx(8 * (COST.decode_token_s - COST.prefill_token_s))


def test_who_gives_way_is_left_with_no_less_than_who_takes() -> None:
    """Two tenants of equal parts preempt each other's requests in circles, and compute them again."""
    for held, gives in ((6, False), (7, False), (8, True)):
        tree = Tree(Shares({"a": Terms(), "b": Terms()}))
        leaves = [tree.leaf(tenant, f"{tenant}{number}") for tenant in "ab" for number in range(2)]
        blocks = (4, 0, held - 2, 2)
        pairs = zip(leaves, blocks, strict=True)
        runs: Any = [SimpleNamespace(leaf=leaf, pages=SimpleNamespace(blocks=count)) for leaf, count in pairs]
        waits: Any = SimpleNamespace(leaf=tree.leaf("a", "waits"))
        found = who_yields(tree.root, waits, 2, held_below(runs), runs, lambda one: (one.pages.blocks, 0))
        assert (found is runs[3]) is gives and (found is None) is not gives  # 4 + 2 <= held - 2


def test_two_requests_beside_two_hundred_are_as_quick_as_on_half_an_engine() -> None:
    """A tenant's tokens wait for the steps of another's fan-out; or short steps waste what the other was due."""
    alone, crowd = Loads({"S": 2}, slow=2.0).run(8.0), Loads({"B": 200}, slow=2.0).run(40.0)
    first = Loads({"S": 2, "B": 200}, order="arrival").run(30.0)
    both = Loads({"S": 2, "B": 200}).run(40.0)
    assert first.median_s("S") > 4 * alone.median_s("S")
    assert both.median_s("S") <= 1.05 * alone.median_s("S")
    assert both.tokens["B"] >= 0.98 * crowd.tokens["B"]
    assert both.had("S") / both.engine.busy_s == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("fan_out", [1, 150])
def test_a_fan_out_takes_nothing_from_another_team(fan_out: int) -> None:
    """A team's share grows with the requests or the programs of its users."""
    flights = {"a/x": 20, "a/y": fan_out, "b": 60}
    load = Loads(flights, {"a": Terms(), "b": Terms()}, max_sequences=300).run(20.0)
    assert load.had("b") / load.engine.busy_s == pytest.approx(0.5, rel=0.05 if fan_out > 1 else 0.3)


@given(st.dictionaries(st.sampled_from(LEAVES), st.integers(1, 40), min_size=1))
@settings(max_examples=20, deadline=None)
def test_a_step_ends_where_a_tenants_part_does_and_not_before(flights: dict[str, int]) -> None:
    """An engine that idles while there is work: rows are left out of steps that had room for them."""
    load = Loads(flights, new=400, max_sequences=300, credit_s=0.0)
    for _ in range(60):
        load.step()
    assert not load.scheduler.waiting and all(len(one.tokens) - one.computed == 1 for one in load.scheduler.running)
    for _ in range(8):
        costs = {leaf: COST.decode_token_s * count for leaf, count in flights.items()}
        longest = COST.base_s + sum(costs.values())
        for tenant in set().union(*map(prefixes, costs)):
            below = sum(cost for leaf, cost in costs.items() if tenant in prefixes(leaf))
            longest = min(longest, (COST.base_s + below) / part(tenant, set(costs)))
        began = load.engine.busy_s
        load.step()
        assert longest - COST.decode_token_s < load.engine.busy_s - began <= longest + 1e-9


def prefixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def part(tenant: str, live: set[str]) -> float:
    """Of the engine, where all weigh alike."""
    share, nodes = 1.0, {node for one in live for node in prefixes(one)}
    for node in prefixes(tenant):
        share /= sum(1 for other in nodes if other.rpartition("/")[0] == node.rpartition("/")[0])
    return share


def test_who_comes_back_runs_in_the_next_step() -> None:
    """A tenant that was away waits for a slot, or for pages, until a request of the one that took all has ended."""
    load = Loads({"B": 300}, {"S": Terms(), "B": Terms()}, max_sequences=200, pages=310, new=200, prompt=20)
    load.run(2.0)
    assert load.scheduler.waiting
    load.in_flight["S"] = 1
    load.ask("S")
    load.step()
    running = [one.request.tenant for one in load.scheduler.running]
    assert "S" in running and load.scheduler.stats.preemptions >= 1


def test_preemption_begins_in_the_subtree_that_holds_most_for_its_weight() -> None:
    """Who has little gives way to who has much, since its pages are the cheapest to compute again."""
    load = Loads({"a": 2, "b/x": 30, "b/y": 2}, max_sequences=300, pages=60, new=100, prompt=40)
    gave = set[str]()
    for _ in range(200):
        before = {one.request.id for one in load.scheduler.running}
        load.step()
        waits = {one.request.id for one in load.scheduler.waiting}
        gave |= {name.partition("#")[0] for name in before & waits}
    assert gave == {"b/x"}


@pytest.mark.parametrize("hold", [4, 60])
def test_places_go_round_by_weight_where_all_that_runs_fits_in_a_step(hold: int) -> None:
    """Who came first has all places until its requests end: a tenant waits for them though it holds nothing."""
    load = Loads({"a": hold, "b": 60}, {"a": Terms(3.0)}, max_sequences=32, new=400, credit_s=1.0)
    load.run(3.0)
    holds = Counter(one.request.tenant for one in load.scheduler.running)
    assert holds == ({"a": 4, "b": 28} if hold == 4 else {"a": 24, "b": 8})


def test_a_tenant_takes_room_within_its_subtree_where_the_subtree_has_its_part() -> None:
    """Teams of one organisation starve: the other organisation's part is even, so nobody is asked to give way."""
    flights = {"a/x": 60, "b/x": 60}
    load = Loads(flights, {"b/y": Terms()}, max_sequences=32, new=400, credit_s=1.0).run(2.0)
    load.in_flight["b/y"] = 20
    for _ in range(20):
        load.ask("b/y")
    load.run(1.0)
    holds = Counter(one.request.tenant for one in load.scheduler.running)
    assert holds["a/x"] >= 16 and holds["b/y"] >= 6 and holds["b/x"]


def test_who_can_have_no_room_does_not_keep_it_from_others() -> None:
    """A tenant that is owed most holds too much to be given more, and others wait behind it for nothing."""
    load = Loads({"crowd": 60, "long": 20}, {"short": Terms()}, pages=200, new=400, max_sequences=60, credit_s=0.0)
    load.prompt = 1500
    for _ in range(20):
        load.ask("long")
    load.prompt = 20
    load.run(4.0)
    long = load.node("long")
    assert all(one.request.tenant != "short" for one in load.scheduler.running) and long.waiting
    load.deals.tree.pay(load.deals.tree.leaf("long", "long#1"), -PICO)  # it is owed a second
    load.in_flight["short"] = 3
    for _ in range(3):
        load.ask("short")
    load.step()
    assert "short" in {one.request.tenant for one in load.scheduler.running}


def test_a_cap_holds_while_nobody_else_wants_anything() -> None:
    """A capped tenant takes what is idle, or the engine stops with work that a cap holds back."""
    load = Loads({"a": 20}, {"a": Terms(cap=0.25)}).run(40.0)
    assert load.had("a") / load.now == pytest.approx(0.25, rel=0.05)
    assert load.engine.busy_s < 0.3 * load.now


def test_a_guarantee_holds_beside_many() -> None:
    """A tenant with a guarantee has its weight's part alone."""
    flights = {"g": 60, **{f"t{number}": 20 for number in range(9)}}
    load = Loads(flights, {"g": Terms(0.01, guarantee=0.3)}, max_sequences=300).run(20.0)
    assert load.had("g") / load.engine.busy_s == pytest.approx(0.3, rel=0.05)


def test_rollouts_take_what_is_idle_and_give_way_within_a_step() -> None:
    """Who serves waits for rollouts to end, or training stops while anybody is served."""
    terms = {"rollouts": Terms(0.01, guarantee=0.2), "serving": Terms()}
    load = Loads({"rollouts": 200}, terms, pages=500, new=100, prompt=60).run(5.0)
    assert load.had("rollouts") == pytest.approx(load.engine.busy_s)
    load.in_flight["serving"] = 100
    for _ in range(100):
        load.ask("serving")
    load.step()
    assert "serving" in {one.request.tenant for one in load.scheduler.running}
    load.run(2.0)
    since, before = load.engine.busy_s, load.had("rollouts")
    load.run(10.0)
    assert (load.had("rollouts") - before) / (load.engine.busy_s - since) == pytest.approx(0.2, rel=0.1)


def test_memory_is_charged_to_who_holds_it() -> None:
    """Keys and values cost nothing, and who fills the memory with long contexts pays like who does not."""
    flights = {"long": 40, "short": 40}
    free = Loads(flights, prompt=20, new=64).run(5.0)
    assert free.had("long") == pytest.approx(free.had("short"), rel=0.1)
    load = Loads(flights, held_token_s=1e-4, prompt=20, new=64)
    load.deals.hold("long", "acting", 10_000, 2.0)
    assert load.had("long") == pytest.approx(2.0)
    load.run(3.0)
    held = sum(one.pages.blocks * 32 for one in load.scheduler.running if one.pages is not None)
    before = load.deals.tree.root.had
    load.scheduler.plan(load.now + 1.0)
    load.step()
    assert load.deals.tree.root.had - before > 0.5e12 * 1e-4 * held


def test_a_step_that_gave_nothing_is_paid_back() -> None:
    """A device fails, and its tenants pay for what they never got."""
    load = Loads({"a": 3, "b": 2})
    load.run(1.0)
    before = {name: load.node(name).had for name in "ab"}
    batch = load.scheduler.plan(load.now)
    load.scheduler.advance(batch)
    assert load.node("a").had > before["a"]
    load.scheduler.forget(batch)
    assert {name: load.node(name).had for name in "ab"} == pytest.approx(before, abs=1e6)


@pytest.mark.parametrize(
    ("slack_s", "ahead_s", "first"), [(0.05, 0.0, "warm"), (0.05, 1.0, "cold"), (0.0, 0.0, "cold")]
)
def test_a_program_near_its_turn_goes_first_for_its_prefix(slack_s: float, ahead_s: float, first: str) -> None:
    """Each program's context is computed anew in turn, where another's lay in the cache; or those go first for ever."""
    load = Loads({}, slack_s=slack_s, max_sequences=1)

    def play(*requests: Request) -> None:
        for request in requests:
            load.engine.submit(request, load.now)
        while load.engine.has_work:
            load.now += load.engine.step(load.now)[0]

    play(asked("warm", "warm", 0, 2))
    if ahead_s:
        load.deals.tree.pay(load.deals.tree.leaf("t", "warm"), int(ahead_s * PICO))
    busy = asked("busy", "busy", 9000, 2)
    load.engine.submit(busy, load.now)
    load.engine.step(load.now)
    load.engine.submit(asked("cold", "cold", 7000, 2), load.now)
    load.engine.submit(asked("warm again", "warm", 0, 2), load.now)
    while "busy" in load.scheduler.live:
        load.engine.step(load.now)
    load.engine.step(load.now)
    assert [one.request.program_id for one in load.scheduler.running] == [first]


def asked(name: str, program: str, start: int, new: int) -> Request:
    return Request(name, program, tuple(range(start, start + 100)), Sampling(max_new_tokens=new), seed=1, tenant="t")


def test_a_paused_program_does_not_start_under_shares() -> None:
    """The tree starts what a policy of programs has paused, and the memory that it made room in is full again."""
    load = Loads({"a": 4}, new=200, max_sequences=2)
    load.run(0.5)
    running = {one.request.id for one in load.scheduler.running}
    kept = {one.request.id for one in load.scheduler.waiting}
    gate = SimpleNamespace(mode="enforce", allowed=lambda sequence: sequence.request.id not in kept)
    load.scheduler.programs = cast(Any, gate)
    hand = Hand(load.scheduler, 1000, load.now)
    assert len(kept) == len(running) == 2
    assert [hand.start(one) for one in load.scheduler.waiting] == [Start.WAITS, Start.WAITS]
