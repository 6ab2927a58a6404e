"""Groups in parts: a group that goes on where nothing is left to learn, or a batch that hangs on who answered first."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.driver import Driver
from tandem.program.render import Renderer
from tandem.rollout.belief import Belief
from tandem.rollout.config import RolloutConfig
from tandem.rollout.early import Early
from tandem.rollout.first import First
from tandem.rollout.rollout import Rollouts
from tandem.types import Group, Prompt
from tests.null.test_choose import group, sums
from tests.null.test_first import Drawing, Slow, usable
from tests.null.test_rollout import Counting, FakeEngine, Letters, noise, prompts, spell

EXTREME = Belief(0.2, 0.2)  # rates near 0 and 1


def differ(one: Group) -> bool:
    return len({t.reward for t in one.trajectories if t.failure is None}) > 1


def early(part: int, size: int, error: float = 0.2, belief: Belief = EXTREME, audit: bool = False) -> Early:
    return Early(part, size, error, lambda prompt: belief, differ, lambda prompt: audit)


def test_a_group_goes_on_while_it_may_differ() -> None:
    """A group that is stopped though the test has not decided, or that runs on though it has."""
    flat, mixed = group(sums(1), [0.0] * 4), group(sums(2), [0.0, 1.0, 0.0, 0.0])
    assert early(4, 8).next(mixed) == 4 and early(4, 8).next(flat) == 0
    # Beta(0.2, 4.2) after four wrong: the other four are wrong too with 4.2 5.2 6.2 7.2 / (4.4 5.4 6.4 7.4) = 0.867
    assert early(4, 8, error=0.14).next(flat) == 0 and early(4, 8, error=0.13).next(flat) == 4
    assert early(4, 16, error=0.13).next(flat) == 4 and early(4, 16, error=0.9).next(flat) == 0
    assert early(2, 16).next(group(sums(2), [0.0, 1.0])) == 14
    assert early(4, 8).next(group(sums(3), [0.0] * 8)) == 0 == early(4, 8).next(group(sums(3), [1.0] * 8))
    assert early(4, 8).next(group(sums(4), [float("nan")] * 4)) == 4  # nothing is known of it
    test = early(4, 8, audit=True)
    assert test.next(flat) == 4 and test.audited == {"p1"} and not test.stopped


@pytest.mark.parametrize("error", [0.05, 0.1, 0.3])
def test_few_of_the_stopped_would_have_differed(error: float) -> None:
    """A test whose error is not the one that was declared."""
    drawn, law = random.Random(7), Belief(0.3, 0.5)
    wrong, stopped = [], 0
    for index in range(6000):
        rate = drawn.betavariate(*law)
        answers = [float(drawn.random() < rate) for _ in range(16)]
        test, begun = early(2, 16, error, law), 2
        while more := test.next(group(Prompt(f"p{index}", ()), answers[:begun])):
            begun += more
        if begun < 16:
            stopped += 1
            wrong.append(len(set(answers)) > 1)
    assert stopped > 500 and statistics.fmean(wrong) <= error + 3 * (error / stopped) ** 0.5


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 6),
    part=st.integers(1, 3),
    size=st.integers(4, 6),
    turns=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    threaded=st.booleans(),
    extra=st.booleans(),
)
def test_parts_are_those_of_the_whole_group(
    count: int, part: int, size: int, turns: int, seed: int, threaded: bool, extra: bool
) -> None:
    """Programs with other tokens than in a group that begins at once; a batch that depends on how long tools take; an
    episode that is opened for a program that never runs, or left open."""

    def speak(request):
        return spell("a" * (1 + (noise(request) % 5 == 0)))

    config = RolloutConfig(samples_per_prompt=size, max_turns=turns, max_new_tokens=40)
    alone = Rollouts(Driver(FakeEngine(speak)), Renderer(Letters()), Counting(2), config, run_seed=seed)
    whole = {one.prompt.id: one for one in alone.collect(3, prompts(count))}
    found = []
    for slow in (False, True):
        environment = Slow(2, seed) if slow else Counting(2)
        engine = Drawing(speak, (lambda request: noise(request) % 4) if slow else (lambda request: 0))
        driver = Driver(engine).start() if threaded else Driver(engine)
        racing = Rollouts(driver, Renderer(Letters()), environment, config, run_seed=seed)
        test = early(part, size, error=0.3)
        groups = racing.collect(3, prompts(count), First(2, usable) if extra else None, test)
        driver.close(30.0)
        assert not engine.live and (not slow or environment.opened == environment.closed)
        found.append([(one.prompt.id, len(one.programs), one.stopped) for one in groups])
        for one in groups:
            begun = len(one.programs)
            assert one.trajectories == whole[one.prompt.id].trajectories[:begun]
            assert one.stopped == (begun < size) and (one.prompt.id in test.stopped) >= one.stopped
            assert begun == size or not differ(one)
        if not extra:
            assert len(engine.seen) == len({request.id for request in engine.seen})
            assert {request.program_id for request in engine.seen} == {
                t.program_id for one in groups for t in one.trajectories
            }
    assert found[0] == found[1]


def test_at_the_deadline_no_part_follows() -> None:
    """A group that waits for a part which is never begun, or a stop by the clock that is taken for the test's."""
    engine = Drawing(lambda request: spell("a" * 1000))
    config = RolloutConfig(samples_per_prompt=4, max_new_tokens=2000, deadline_s=30.0)
    racing = Rollouts(
        Driver(engine), Renderer(Letters()), Counting(), config, run_seed=1, clock=lambda: float(engine.now)
    )
    groups = racing.collect(0, prompts(3), early=early(2, 4))
    assert [len(one.programs) for one in groups] == [2, 2, 2] and not any(one.stopped for one in groups)
    assert all(t.failure is not None for one in groups for t in one.trajectories) and not engine.live
