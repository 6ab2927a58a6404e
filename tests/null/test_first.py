"""Over-sampling: a batch of the first groups to end, which must be the same groups in each run."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tandem.algo.lengths import Dispatched, Race
from tandem.columns import Columns
from tandem.engine.driver import Driver
from tandem.program.render import Renderer
from tandem.rollout import rollout
from tandem.rollout.config import RolloutConfig
from tandem.rollout.first import End, First
from tandem.rollout.rollout import Rollouts
from tandem.trace import Totals, Trace
from tandem.types import Completion, Failure, Group, Prompt, Request, StopReason, Trajectory
from tests.null.test_rollout import Counted, Counting, FakeEngine, Letters, noise, prompts, spell


class Drawing(FakeEngine):
    """Draws a token a step for each request, from some steps after it came."""

    def __init__(self, speak: Any, waits: Any = lambda request: 0) -> None:
        super().__init__(speak, lambda request: waits(request) + len(speak(request)))

    def drawn(self, request_id: str, first: int, /) -> Columns:
        request, due = self.live[request_id]
        tokens = self.speak(request)
        done = max(0, len(tokens) - (due - self.now))
        return Columns.of(tokens=tokens[first:done])

    def abort(self, request_id: str, /) -> Completion | None:
        if request_id not in self.live:
            return None
        tokens = self.drawn(request_id, 0)["tokens"].tolist()
        request, _ = self.live.pop(request_id)
        return self.completion(request, tokens, StopReason.ABORTED)


class Slow(Counting):
    """Its observations take milliseconds, in an order of their own."""

    def __init__(self, more: int, seed: int) -> None:
        super().__init__(more)
        self.random = Random(seed)
        self.opened = 0

    def episode(self, prompt, until_s, /):
        by = self
        by.opened += 1

        class Waits(Counted):
            def observe(self, last=False):
                answer = super().observe(last)
                later: Future[Any] = Future()
                threading.Timer(by.random.random() / 300, later.set_result, [answer.result()]).start()
                return later

        return Waits(self)


def long(request: Request) -> list[int]:
    """1 to 30 tokens, most of them few; some that fail to be graded."""
    number = noise(request)
    return spell("abcdx"[number % 5] * (1 + (number // 5 % 6) ** 2 // (1 + number % 2)))


def usable(group: Group) -> bool:
    return any(trajectory.failure is None for trajectory in group.trajectories)


def by_hand(groups: list[Group], enough: int) -> list[str]:
    """Prompts of the batch: in the order of the longest program, until enough are usable."""
    ends = {}
    for place, group in enumerate(groups):
        ends[place] = max(sum(t.num_sampled for t in program) for program in group.programs), place
    kept: list[int] = []
    for place in sorted(ends, key=lambda place: ends[place]):
        if sum(usable(groups[one]) for one in kept) < enough:
            kept.append(place)
    return [groups[place].prompt.id for place in sorted(kept)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 8),
    enough=st.integers(1, 4),
    samples=st.integers(1, 3),
    turns=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    ahead=st.sampled_from([2, 5, 4096]),
    threaded=st.booleans(),
)
@example(count=7, enough=1, samples=3, turns=2, seed=283, ahead=2, threaded=False)  # late before its last sibling began
def test_the_batch_is_the_first_by_the_clock_of_tokens(
    count: int, enough: int, samples: int, turns: int, seed: int, ahead: int, threaded: bool
) -> None:
    """A batch that depends on how long tools and the engine take, whose groups have other tokens than alone, or a
    program of another group that is left in the engine, with its environment, or out of the counts."""
    config = RolloutConfig(samples_per_prompt=samples, max_turns=turns, max_new_tokens=40)
    alone = Rollouts(Driver(FakeEngine(long)), Renderer(Letters()), Counting(2), config, run_seed=seed)
    everything = alone.collect(3, prompts(count))
    totals, environment = Totals(), Slow(2, seed)
    engine = Drawing(long, lambda request: noise(request) % 4)
    driver = Driver(engine).start() if threaded else Driver(engine)
    racing = Rollouts(driver, Renderer(Letters()), environment, config, run_seed=seed, trace=Trace([totals]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "AHEAD", ahead)
        groups = racing.collect(3, prompts(count), First(enough, usable))
    driver.close(30.0)
    assert [group.prompt.id for group in groups] == by_hand(everything, enough)
    assert groups == [group for group in everything if group in groups]
    assert not engine.live and environment.opened == environment.closed
    extra = totals.counts
    assert extra["extra_programs"] == samples * (count - len(groups))
    sampled = [sum(t.num_sampled for t in g.trajectories) for g in everything if g not in groups]
    assert 0 <= extra["extra_tokens"] <= sum(sampled)


def test_a_long_group_is_withdrawn_as_soon_as_it_is_late() -> None:
    """Groups beyond the batch run to their ends, so that nothing is saved; or are begun after the batch is full."""
    lengths = {"p0": 3, "p1": 1000, "p2": 5, "p3": 4}
    engine = Drawing(lambda request: spell("a" * (lengths[request.group.partition("/")[0]] - 1)))
    totals = Totals()
    config = RolloutConfig(samples_per_prompt=2, max_new_tokens=2000)
    racing = Rollouts(Driver(engine), Renderer(Letters()), Counting(), config, run_seed=1, trace=Trace([totals]))
    groups = racing.collect(0, prompts(4), First(2, usable))
    assert [group.prompt.id for group in groups] == ["p0", "p3"]
    assert engine.now <= 6 and totals.counts["extra_programs"] == 4
    assert totals.counts["extra_tokens"] <= 4 * 6


def test_at_the_deadline_what_has_ended_is_the_batch() -> None:
    """A step whose time is over waits for a full batch, or loses what it has."""
    lengths = {"p0": 3, "p1": 1000, "p2": 1000}
    engine = Drawing(lambda request: spell("a" * (lengths[request.group.partition("/")[0]] - 1)))
    config = RolloutConfig(samples_per_prompt=1, max_new_tokens=2000, deadline_s=30.0)
    racing = Rollouts(
        Driver(engine), Renderer(Letters()), Counting(), config, run_seed=1, clock=lambda: float(engine.now)
    )
    first, *late = racing.collect(0, prompts(3), First(2, usable))
    assert first.trajectories[0].reward == 2.0
    assert all(isinstance(group.trajectories[0].failure, Failure) for group in late) and not engine.live


def test_equal_ends_go_by_the_prompts() -> None:
    """Of groups that end at once, those that the scheduler happens to end first."""
    for slow in range(3):
        engine = Drawing(lambda request: spell("aa"), lambda request: 3 * (request.group == f"p{slow}/0"))  # noqa: B023
        config = replace(RolloutConfig(), samples_per_prompt=2)
        racing = Rollouts(Driver(engine), Renderer(Letters()), Counting(), config, run_seed=1)
        groups = racing.collect(0, prompts(3), First(2, usable))
        assert [group.prompt.id for group in groups] == ["p0", "p1"]


@given(st.lists(st.integers(1, 6), min_size=3, max_size=7), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_told_of_a_race_is_no_matter_of_time(ends: list[int], enough: int, drawn: st.DataObject) -> None:
    """Lengths and ends of groups beyond the batch that differ with how far they came until they were withdrawn."""

    def told(late_end: bool) -> list[Dispatched]:
        first = First(enough, lambda group: True)
        order = sorted(range(len(ends)), key=lambda place: (ends[place], place))
        for place in order[:enough] + (order[enough:] if late_end else []):
            known = Columns.of(tokens=[0] * (ends[place] + 1), loss_mask=[False] + [True] * ends[place])
            part = Trajectory(f"{place}/0/0", str(place), known)
            first.end(End(ends[place], place), Group(Prompt(str(place), ()), (part,)))
        for place in [] if late_end else order[enough:]:
            assert first.until is not None
            so_far = drawn.draw(st.integers(first.until.tokens, ends[place]))
            first.withdrawn.append((place, {f"{place}/0/0": so_far}))
        fates = {f"{place}/0/0/0": "trained" for place in order[:enough]}
        return sorted(first.dispatched(fates, most=6), key=lambda one: one.id)

    found = told(late_end=False)
    assert found == told(late_end=True) and len(found) == len(ends)
    last = max(one.clock for one in found if one.kept)
    limit = max(one.end for one in found if one.kept)
    for one in found:
        assert one.race == Race(len(ends) - 1, min(enough, len(ends))) or enough > len(ends)
        assert one.kept == (one.fates == ("trained",)) and (one.kept or one.ended == (limit == 6))
        assert one.kept or (one.clock == last) != (limit == 6)
