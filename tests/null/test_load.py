"""How many groups begin at once, by load."""

from __future__ import annotations

import pytest

from tandem.rollout.config import AsyncConfig
from tandem.rollout.flow import Ended
from tandem.rollout.load import Load
from tandem.rollout.queue import Queue
from tandem.types import Group, Prompt


def learning(config: AsyncConfig) -> Queue:
    """A queue of two groups a step, whose first batch is being learned."""
    queue = Queue(2, config)
    for number in range(2):
        queue.begin(0)
        queue.end(number, Ended(f"p{number}/1", Group(Prompt(f"p{number}", ()), ()), ()))
    choice = queue.choose(1)
    assert choice is not None and len(queue.take(choice)) == 2
    return queue


@pytest.mark.parametrize(
    ("config", "shares", "begins"),
    [
        (AsyncConfig("full", lag=2), True, False),
        (AsyncConfig("full", lag=2), False, True),
        (AsyncConfig("one_off"), True, True),
    ],
)
def test_what_begins_while_a_batch_is_learned(config: AsyncConfig, shares: bool, begins: bool) -> None:
    """Groups that begin on the learner's cores, to be prefilled again under the weights that it is making; an engine
    of its own that stands still meanwhile; a batch of one_off whose versions hang on the clock."""
    queue = learning(config)
    load = Load(queue, shares, 0.0)
    assert load.may_begin(1.0) is begins
    load.idle(0.1)  # programs wait for their environments: one more fills the gap
    assert load.may_begin(1.0)
    load.adapt(False, 1.0)
    assert load.may_begin(2.0)  # for the batch after, too
    load.adapt(False, 2.0)
    assert load.may_begin(3.0) is begins
    queue.learned()
    assert load.may_begin(3.0)


def test_a_batch_of_groups_that_are_learned_again() -> None:
    """Groups that begin beside a batch of which few are new, so that few are counted as learned."""
    queue = learning(AsyncConfig("full", lag=2, replay_uses=2))
    load = Load(queue, True, 0.0)
    queue.learned()
    queue.begin(1)
    queue.end(2, Ended("p2/2", Group(Prompt("p2", ()), ()), ()))
    choice = queue.choose(2)
    assert choice is not None and len(choice.again) == 1 and len(queue.take(choice)) == 2
    assert len(queue) == 1 and not load.may_begin(1.0)


def test_no_more_than_a_batch_on_shared_cores() -> None:
    """Groups of the next batch that share the cores of this one's, so that all end late and run over more updates."""
    queue = Queue(2, AsyncConfig("full", lag=2))
    loads = [Load(queue, shares, 0.0) for shares in (True, False)]
    begun = []
    for _ in range(4):
        begun.append([load.may_begin(1.0) for load in loads])
        queue.begin(0)
    assert begun == [[True, True], [True, True], [False, True], [False, True]]


def test_a_tool_that_answers_at_once_starves_nobody() -> None:
    """The moment in which the last program of a batch is with its environment, taken for a starved engine."""
    load = Load(learning(AsyncConfig("full", lag=2)), True, 0.0)
    load.idle(0.001)
    assert not load.may_begin(1.0)
    load.idle(0.1)
    assert load.may_begin(1.0) and not load.may_begin(100.0)


def test_the_limit_follows_the_engine_not_the_learner_alone() -> None:
    """A limit that grows where the engine is what is slow: more groups then end no sooner."""
    load = Load(Queue(4, AsyncConfig("full", lag=3)), True, 0.0)
    load.adapt(True, 1.0)
    assert load.limit == load.least == 8
    load.idle(0.5)
    load.adapt(True, 2.0)
    assert load.limit == 10
    load.adapt(True, 3.0)  # the engine has had work since
    assert load.limit == 9
