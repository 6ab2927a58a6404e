"""Environments that are set up while their programs wait for a place in the engine."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path

import pytest

from tandem.engine.config import ProgramsConfig
from tandem.engine.driver import Driver
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.rollout import Rollouts
from tandem.types import Failure, Message
from tests.null.paged_memory import make
from tests.null.test_rollout import Letters

WHAT = ("setup", "observe", "teardown")
USER = """
import time
from pathlib import Path
from tandem.program.environment import Environment, Episode
from tandem.types import Message, Prompt

class Desk(Episode):
    {maybe}def setup(self):
        self.note("setup")
        if self.prompt.record["index"] == 7:
            raise RuntimeError("no desk")

    {maybe}def observe(self, turns):
        self.note("observe")
        return None if len(turns) > 2 else [Message("user", "a")]

    def score(self, turns):
        return 1.0

    def teardown(self):
        self.note("teardown")

    def note(self, what):
        with Path(self.prompt.record["log"]).open("a") as file:
            file.write("train" + str(self.prompt.record["index"]) + " " + what + "\\n")

class Desks(Environment):
    episodes = Desk

    def __init__(self, log):
        self.log = log

    def prompt(self, split, index):
        return Prompt(split + str(index), (Message("user", "aabb"),), {{"log": self.log, "index": index}})
"""


@pytest.fixture(params=["async ", ""])
def pool(tmp_path: Path, request: pytest.FixtureRequest):
    (tmp_path / "desks.py").write_text(USER.format(maybe=request.param).replace("\\\\", "\\"))
    task = TaskConfig(f"{tmp_path}/desks.py:Desks", parameters=(("log", str(tmp_path / "log")),), heldout_size=0)
    made = EnvironmentPool(dataclasses.replace(task, workers=1))
    yield made
    made.close()


def logged(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_an_episode_is_set_up_once_and_before_it_is_asked(pool: EnvironmentPool, tmp_path: Path) -> None:
    """An episode that is opened again by its first call, or a call that overtakes its setup."""
    episode = pool.episode(pool.prompt(0), 1e12)
    episode.prepare()
    episode.prepare()
    episode.said.append(Message("assistant", "b", sampled=True))
    answer = episode.observe().result(20)
    assert not isinstance(answer, Failure) and answer.messages[0].content == "a"
    assert episode.score().result(20) == 1.0
    episode.teardown()
    pool.close()
    assert logged(tmp_path) == ["train0 setup", "train0 observe", "train0 teardown"]


def test_what_was_set_up_for_nothing_is_given_back(pool: EnvironmentPool, tmp_path: Path) -> None:
    """A sandbox that stays open for a program which was withdrawn before its first turn ended."""
    episode = pool.episode(pool.prompt(0), 1e12)
    episode.prepare()
    episode.teardown()
    until_s = time.monotonic() + 20
    while len(logged(tmp_path)) < 2 and time.monotonic() < until_s:
        time.sleep(0.02)
    assert logged(tmp_path) == ["train0 setup", "train0 teardown"]


def test_a_setup_that_fails_is_the_first_calls_answer(pool: EnvironmentPool) -> None:
    """A program that plays on in an environment which was never set up."""
    episode = pool.episode(pool.prompt(7), 1e12)
    episode.prepare()
    episode.said.append(Message("assistant", "b", sampled=True))
    answer = episode.observe().result(20)
    assert isinstance(answer, Failure) and "no desk" in answer.reason


def test_rollouts_set_environments_up_while_programs_wait(pool: EnvironmentPool, tmp_path: Path) -> None:
    """Programs that wait for a place and then for their sandbox, one behind the other."""
    engine, _ = make(14, programs=ProgramsConfig("enforce", "thunder", tick_s=1e-6), batch_tokens=16)
    engine.clock = time.monotonic
    config = RolloutConfig(samples_per_prompt=1, max_turns=2, max_new_tokens=12)
    rollouts = Rollouts(Driver(engine), Renderer(Letters()), pool, config, run_seed=0)
    prepared = []
    episodes = pool.episode

    def episode(prompt, until_s=1e12):
        made = episodes(prompt, until_s)
        prepare = made.prepare
        made.prepare = lambda: (prepared.append(prompt.id), prepare())
        return made

    pool.episode = episode
    groups = rollouts.collect(0, pool.batch(0, 6))
    assert all(one.failure is None for group in groups for one in group.trajectories)
    assert len(set(prepared)) >= 3
    pool.close()
    counts = Counter(logged(tmp_path))
    assert counts == Counter({f"train{n} {what}": 1 + (what == "observe") for n in range(6) for what in WHAT})
    assert not engine.scheduler.programs.by_name
