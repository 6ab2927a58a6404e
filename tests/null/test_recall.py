"""Episodes that keep nothing beside what was said go on in another process, with what they counted and earned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool, RunningEpisode
from tandem.rollout.program import Paused, Program, Segment
from tandem.types import Failure, Message, Prompt

TASK = """
from tandem.program.environment import Environment, Episode, Step
from tandem.types import Message, Prompt


class Doubles(Episode):
    has_state = HAS_STATE

    async def observe(self, turns):
        self.counts["doubled"] += 1
        return Step([Message("user", str(2 * int(turns[-1].content)))], 0.25)


class Asks(Environment):
    episodes = Doubles

    def prompt(self, split, index):
        return Prompt(f"{split}/{index}", (Message("user", f"{split} {index}"),))
"""


@pytest.fixture
def pools(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[EnvironmentPool]]:
    (tmp_path / "asks.py").write_text(TASK.replace("HAS_STATE", str(request.param)))
    made = [EnvironmentPool(TaskConfig(f"{tmp_path / 'asks.py'}:Asks", heldout_size=1)) for _ in range(2)]
    yield made
    for pool in made:
        pool.close()


def says(episode: RunningEpisode, text: str) -> Any:
    episode.said.append(Message("assistant", text, sampled=True))
    return episode.observe().result(60)


@pytest.mark.parametrize("pools", [False], indirect=True)
def test_it_goes_on_in_another_run(pools: list[EnvironmentPool]) -> None:
    """A program that was kept and begins anew though nothing of it was lost, or that has forgotten what it counted and
    what its turns earned."""
    first, second = (pool.episode(Prompt("p", ())) for pool in pools)
    program = Program("p/1/0", 0, Prompt("p", ()), first, [Segment((1,), 0, ())])
    program.observed = [says(first, "3"), says(first, "4")]
    kept = Paused.of(program, "engine")
    assert not kept.anew and kept.program(second).episode is second
    assert [message.content for message in second.said] == ["3", "6", "4", "8"]
    assert says(second, "5").messages[0].content == "10" and dict(second.counts) == {"doubled": 3}
    assert second.score().result(60) == 0.75


@pytest.mark.parametrize("pools", [False, True], indirect=True)
def test_its_process_ends(pools: list[EnvironmentPool], request: pytest.FixtureRequest) -> None:
    """One that has lost nothing and fails with its process, or one that has and goes on as if it had not."""
    has_state = request.node.callspec.params["pools"]
    episode = pools[0].episode(Prompt("p", ()))
    says(episode, "3")
    assert episode.home is not None and episode.lasts == has_state
    episode.home.kill()
    until_s = time.monotonic() + 60
    while episode.home in pools[0]._workers.children and time.monotonic() < until_s:
        time.sleep(0.01)  # a call that is under way as its process ends fails
    found = says(episode, "4")
    assert isinstance(found, Failure) == has_state
    assert has_state or (found.messages[0].content, dict(episode.counts)) == ("8", {"doubled": 2})
