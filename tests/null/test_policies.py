"""Policies of programs as functions, against brute force and cases worked by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.policies import (
    EXACT,
    LEVELS,
    Room,
    Seen,
    TurnEnd,
    balance,
    carried_out,
    continuum_ttl,
    cover,
    keep,
    rank,
    yield_order,
)
from tandem.engine.predict import Predictor

sizes = st.lists(st.integers(1, 40), min_size=0, max_size=9)


def seen(name: str, phase: str, pages: int, **more: Any) -> Seen:
    given = {"reload_s": float(pages * pages), "first_s": 0.0, "since_s": 0.0} | more
    return Seen(name, phase, pages, **given)  # type: ignore[arg-type]


def room(capacity: int, *programs: Seen, now: float = 0.0, policy: str = "thunder", patience: float = 100.0) -> Room:
    return Room(policy, now, capacity, programs, 1.0, patience)  # type: ignore[arg-type]


@given(sizes, st.integers(-3, 200))
@settings(deadline=None)
def test_a_cover_is_the_cheapest_of_all_sets(given: list[int], need: int) -> None:
    """The smallest first where one larger program costs less, a set that frees too little, one too many in it."""
    costs = [size * size for size in given]
    found = cover(given, costs, need)
    every = [pick for n in range(len(given) + 1) for pick in itertools.combinations(range(len(given)), n)]
    enough = [pick for pick in every if sum(given[i] for i in pick) >= need]
    assert len(set(found)) == len(found)
    if not enough:
        assert sorted(found) == list(range(len(given)))
    else:
        assert sum(given[i] for i in found) >= need
        assert sum(costs[i] for i in found) == min(sum(costs[i] for i in pick) for pick in enough)


@given(st.lists(st.integers(1, 50), min_size=EXACT + 1, max_size=40), st.integers(1, 600))
@settings(deadline=None)
def test_many_are_covered_without_one_too_many(given: list[int], need: int) -> None:
    """A greedy set that falls short, or that has a member which could be left out."""
    costs = [size * size for size in given]
    found = cover(given, costs, need)
    total = sum(given[i] for i in found)
    if sum(given) >= need:
        assert total >= need and all(total - given[i] < need for i in found)
    else:
        assert len(found) == len(given)


def test_acting_programs_pause_first_and_only_as_many_as_it_takes() -> None:
    """A program paused while it reasons though an idle one would do, or the wrong one of three."""
    programs = (seen("r", "reasoning", 10), *(seen(f"a{n}", "acting", n) for n in (6, 5)), seen("b", "acting", 5))
    assert balance(room(20, *programs)).pause == ("a6",)
    assert balance(room(20, *programs)).used == 26
    assert balance(room(26, *programs)).pause == ()
    assert balance(room(4, *programs)) == balance(room(4, *programs))
    assert set(balance(room(4, *programs)).pause) == {"a6", "a5", "b"} and not balance(room(4, *programs)).mark


def test_reasoning_programs_are_marked_the_smallest_first_and_never_the_first_to_come() -> None:
    """All that run are stopped, so that nobody finishes; or the largest is, which is the dearest to compute again."""
    programs = [
        seen(name, "reasoning", pages, first_s=n) for n, (name, pages) in enumerate((("a", 1), ("b", 5), ("c", 3)))
    ]
    assert balance(room(8, *programs)).mark == ("c",)
    assert balance(room(1, *programs)).mark == ("c", "b")
    assert balance(room(9, *programs)).mark == ()


def test_who_acts_counts_half_as_much_after_each_half_life() -> None:
    """Room that a long tool's program would have kept from others for ever, or decay counted from the wrong time."""
    acting, asks = seen("a", "acting", 16, since_s=0.0), seen("p", "paused", 9, asks=True, turns=1)
    running = seen("r", "reasoning", 1)
    assert balance(room(20, acting, running, asks, now=0.0)).restore == ()
    assert balance(room(20, acting, running, asks, now=0.6)).restore == ()  # 16 / 2^0.6 = 10.6
    assert balance(room(20, acting, running, asks, now=1.0)).used == 9.0
    assert balance(room(20, acting, running, asks, now=1.0)).restore == ("p",)


def test_restored_are_those_that_waited_too_long_then_old_ones_then_new_ones() -> None:
    """A large program that smaller ones overtake for ever; new ones that take the room of those under way."""
    asking = [
        seen("new", "paused", 1, asks=True),
        seen("large", "paused", 9, asks=True, turns=3, since_s=50.0),
        seen("small", "paused", 2, asks=True, turns=1, since_s=50.0),
        seen("silent", "paused", 1, turns=1),
        seen("late", "paused", 30, asks=True, turns=1, since_s=-60.0),
    ]
    running = seen("r", "reasoning", 5)
    assert balance(room(10, running, *asking[:4], now=60.0)).restore == ("small", "new")
    assert balance(room(100, running, *asking, now=60.0)).restore == ("late", "small", "large", "new")
    assert balance(room(10, running, *asking, now=60.0)).restore == ("late",)


def test_one_goes_on_where_nobody_does() -> None:
    """Everybody is paused, nobody fits by the count, and nothing ever runs again."""
    assert balance(room(1, seen("a", "paused", 5, asks=True), seen("b", "paused", 3, asks=True))).restore == ("b",)
    assert balance(room(4, seen("x", "acting", 4), seen("a", "paused", 5, asks=True, turns=1))).restore == ("a",)


@given(
    st.lists(st.tuples(st.sampled_from(["reasoning", "acting", "paused"]), st.integers(1, 30), st.booleans())),
    st.integers(1, 60),
    st.floats(0, 5),
)
@settings(deadline=None)
def test_what_goes_on_fits_or_is_the_first(given: list[tuple[str, int, bool]], capacity: int, now: float) -> None:
    """Programs restored beyond what there is, paused and restored at once, or none where some could go on."""
    programs = [
        seen(f"{n}", phase, pages, asks=asks and phase == "paused") for n, (phase, pages, asks) in enumerate(given)
    ]
    answer = balance(room(capacity, *programs, now=now))
    by_name = {one.id: one for one in programs}
    counts = {
        one.id: one.pages * (2.0**-now if one.phase == "acting" else 1.0) for one in programs if one.phase != "paused"
    }
    assert answer.used == pytest.approx(sum(counts.values()))
    left = sum(count for name, count in counts.items() if name not in answer.pause)
    if answer.used > capacity:
        assert left <= capacity + 1e-9 or all(one.id in answer.pause for one in programs if one.phase == "acting")
    more = sum(by_name[name].pages for name in answer.restore)
    asking = [one for one in programs if one.asks]
    if answer.restore:
        busy = any(one.phase == "reasoning" for one in programs)
        first = by_name[answer.restore[0]]
        assert left + more <= capacity + 1e-9 or (not busy and left + more - first.pages <= capacity + 1e-9)
    elif asking:
        assert left + min(one.pages for one in asking) > capacity


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=19), st.floats(0, 50))
@settings(deadline=None)
def test_continuums_ttl_is_the_best_of_a_fine_grid(given: list[float], saved: float) -> None:
    """A time to keep pages that some other time beats, or one that costs more than it brings."""
    times = sorted(given)
    levels = [(n + 1) / len(times) for n in range(len(times))]

    def worth(tau: float) -> float:
        return sum(t <= tau for t in times) / len(times) * saved - tau

    found = continuum_ttl(times, saved, levels)
    best = max(worth(tau) for tau in (0.0, *times, *(k * 0.5 for k in range(220))))
    assert worth(found.keep_s) == pytest.approx(best, abs=1e-9) and best >= 0
    assert found.worth[0] == (0.0, 0.0)


def test_how_long_each_policy_keeps_pages() -> None:
    """One policy's rule in the place of another's."""
    turn = TurnEnd("ttl", 2.0, tuple(0.1 * n for n in range(1, 20)), 1.0, 0.5, 0.1, 0.25, None)
    every = {
        policy: keep(TurnEnd(policy, 2.0, turn.tool_s, 1.0, 0.5, 0.1, 0.25, 3.0)).keep_s  # type: ignore[arg-type]
        for policy in ("fcfs", "plas", "ttl", "continuum", "thunder", "oracle")
    }
    assert every == {"fcfs": 0, "plas": 0, "ttl": 2.0, "continuum": 0.0, "thunder": math.inf, "oracle": math.inf}
    # 0.75 * (queue + reload) = 15 s saved by a hit: the 19th quantile brings 0.95 * 15 - 1.9
    long = keep(TurnEnd("continuum", 2.0, turn.tool_s, 19.0, 1.0, 0.1, 0.25))
    assert long.keep_s == pytest.approx(1.9) and long.worth[-1][1] == pytest.approx(0.95 * 15 - 1.9)
    assert keep(TurnEnd("oracle", 2.0, (), 0.0, 0.29, 0.1, 0.0, 3.0)).keep_s == 0.0  # 3 s of a tenth of all: 0.3 s


def test_kept_pages_go_in_each_policys_order() -> None:
    """The pages that are asked for first go first, where the oracle knows better; or those of who came first."""
    acting = [
        seen("a", "acting", 4, first_s=1.0, since_s=0.0, due_s=9.0),
        seen("b", "acting", 4, first_s=2.0, since_s=2.0, due_s=5.0),
        seen("c", "acting", 8, first_s=3.0, since_s=0.0, due_s=7.0),
    ]
    order = {
        policy: [one.id for one in yield_order(policy, acting, 3.0, 1.0)] for policy in ("oracle", "ttl", "thunder")
    }
    assert order == {"oracle": ["a", "c", "b"], "ttl": ["c", "b", "a"], "thunder": ["a", "c", "b"]}


def test_ranks() -> None:
    """Least attained service and coming first taken for each other; a kept program behind one that is not."""
    assert rank("plas", 5.0, 1.0, False) < rank("plas", 1.0, 2.0, True)
    assert rank("fcfs", 1.0, 9.0, False) < rank("fcfs", 2.0, 0.0, False)
    assert rank("continuum", 9.0, 0.0, True) < rank("continuum", 1.0, 0.0, False)


@given(st.floats(0, 1))
@settings(deadline=None)
def test_a_share_is_that_of_its_programs_and_grows_by_adding(share: float) -> None:
    """Another arm for a program each time it is asked, or programs that leave it as the share grows."""
    inside = {n for n in range(400) if carried_out(f"p{n}", share)}
    more = {n for n in range(400) if carried_out(f"p{n}", min(1.0, share + 0.1))}
    assert inside <= more and abs(len(inside) / 400 - share) < 0.12
    assert not share or len(inside) == 400 or share < 1


@given(st.lists(st.floats(0, 10), min_size=16, max_size=60), st.floats(0, 9))
@settings(deadline=None)
def test_quantiles_of_what_is_left_of_a_tool(given: list[float], acting: float) -> None:
    """The distribution from the start for a tool that has already run long."""
    predictor = Predictor()
    for value in given:
        predictor.came_back("t", value, 1)
    found = predictor.predict("", "t", 1, acting).tool_s
    left = sorted(value for value in given if value > acting or acting == 0)
    if len(left) < 16:
        assert found == ()
        return
    for level, value in zip(LEVELS, found, strict=True):
        wanted = min(one for one in left if sum(other <= one for other in left) >= round(level * len(left), 9))
        assert value == wanted - acting


def test_a_tool_that_few_have_seen_is_told_by_all() -> None:
    """One call's time taken for a distribution, and a common tool's for another's."""
    predictor = Predictor()
    for n in range(40):
        predictor.came_back("fast", 0.1, 5)
        predictor.came_back("slow", 10.0 + n, 5)
    predictor.came_back("rare", 500.0, 5)
    assert predictor.predict("", "slow", 1).tool_s[9] == 29.0
    assert predictor.predict("", "rare", 1).tool_s == predictor.predict("", "", 1).tool_s
    assert predictor.predict("", "fast", 1).tool_s == (0.1,) * 19


def test_the_last_turn_is_told_by_its_number() -> None:
    """A program that always ends at its third turn, whose pages are kept behind it."""
    predictor = Predictor()
    for _ in range(30):
        for turn in (1, 2, 3):
            predictor.turned(turn, turn == 3)
    assert predictor.last(1) < 0.02 and predictor.last(3) > 0.95 and predictor.last(9) == pytest.approx(1 / 3)
