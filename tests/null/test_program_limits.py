"""Limits of a program: turns, tokens and time, after which it is graded as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from tandem.engine.driver import Driver
from tandem.errors import ConfigError
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.rollout import Rollouts
from tandem.types import Completion, Request, StopReason, Trajectory
from tests.null.test_rollout import Counted, Counting, FakeEngine, Letters, prompts, spell


class Cutting(FakeEngine):
    """Cuts what it says as an engine does; its clock goes on by 10 s a step."""

    def completion(self, request: Request, tokens: list[int], reason: StopReason | None = None) -> Completion:
        done = super().completion(request, tokens[: request.sampling.max_new_tokens], reason)
        return replace(done, started_s=10.0 * self.now)


class Heard(Counting):
    """Keeps whether each observation was the last."""

    def __init__(self, more: int) -> None:
        super().__init__(more)
        self.last: list[bool] = []

    def episode(self, prompt, until_s, /):
        by = self

        class Hears(Counted):
            def observe(self, last=False):
                by.last.append(last)
                return super().observe(last)

        return Hears(self)


def run(engine: Cutting, environment: Heard, **changes: object) -> Sequence[Trajectory]:
    asked = {"samples_per_prompt": 1, "max_turns": 5, "max_new_tokens": 4, **changes}
    config = RolloutConfig(**asked)  # type: ignore[arg-type]
    (group,) = Rollouts(
        Driver(engine), Renderer(Letters()), environment, config, run_seed=1, clock=lambda: 10.0 * engine.now
    ).collect(0, prompts(1))
    assert not engine.live and environment.closed == config.samples_per_prompt
    return group.trajectories


@pytest.mark.parametrize(
    ("said", "limit", "allowed", "sampled", "reason"),
    [
        ("aaa", 0, [4, 4, 4, 4, 4], 20, StopReason.STOP_TOKEN),
        ("aaa", 8, [4, 4], 8, StopReason.STOP_TOKEN),  # at the end of a turn
        ("aaa", 9, [4, 4, 1], 9, StopReason.LENGTH),  # in the middle of one
        ("aaa", 20, [4, 4, 4, 4, 4], 20, StopReason.STOP_TOKEN),
        ("aaa", 2, [2], 2, StopReason.LENGTH),
        ("aaaaaaa", 6, [4, 2], 6, StopReason.LENGTH),
    ],
)
def test_tokens_of_a_program(said: str, limit: int, allowed: list[int], sampled: int, reason: StopReason) -> None:
    """A program that samples more than its limit, is not told of its last turn, or ends without a grade or a count."""
    engine, environment = Cutting(lambda request: spell(said)), Heard(9)
    (found,) = run(engine, environment, max_program_tokens=limit)
    assert [request.sampling.max_new_tokens for request in engine.seen] == allowed
    assert (found.num_sampled, found.stop_reason, found.failure) == (sampled, reason, None)
    assert environment.last == [False] * (len(allowed) - 1) + [True]
    ended = "token_limit" if limit else "turn_limit"
    assert found.counts == {"observations": len(allowed) - 1, ended: 1}
    assert found.reward == float(min(len(said), allowed[-1]))  # graded as it stands


def test_tokens_of_a_program_of_one_turn() -> None:
    """A single turn that the limit cuts is not counted, or one that ends by itself is."""
    for said, counted in (("aaaaaaa", {"token_limit": 1}), ("a", {})):
        engine, environment = Cutting(lambda request: spell(said)), Heard(9)  # noqa: B023
        (found,) = run(engine, environment, max_turns=1, max_program_tokens=3)
        assert found.counts == {"observations": 0, **counted} and environment.last == []


def test_tokens_of_a_program_that_ends_by_itself() -> None:
    """A program that ended at the end of its tokens of its own will is counted as one that was ended."""
    engine, environment = Cutting(lambda request: spell("aaa")), Heard(1)
    (found,) = run(engine, environment, max_program_tokens=8)
    assert found.counts == {"observations": 1} and environment.last == [False, True]


def test_seconds_of_a_program() -> None:
    """A program that goes on after its time, that waits for its first step counted, or that fails for it."""
    engine, environment = Cutting(lambda request: spell("a"), lambda request: 3), Heard(9)
    (found,) = run(engine, environment, max_program_s=50.0)
    # Each turn is begun and ends at 30, 60, 90 s on the fake engine's clock: the third is 60 s after the first began.
    assert [request.id for request in engine.seen] == ["p0/0/0/0", "p0/0/0/1", "p0/0/0/2"]
    assert found.counts == {"observations": 2, "time_limit": 1} and found.failure is None and found.reward == 1.0
    assert environment.last == [False, False, True]


def test_limits_are_checked() -> None:
    """A limit below 0 ends each program at once, or never."""
    for name, value in (("max_program_tokens", -1), ("max_program_s", -0.5), ("max_program_s", float("inf"))):
        with pytest.raises(ConfigError, match=f"rollout.{name}"):
            RolloutConfig(**{name: value})  # type: ignore[arg-type]
