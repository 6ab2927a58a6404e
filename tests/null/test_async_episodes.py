"""Asynchronous episodes: many in one child, each call with a deadline of its own."""

from __future__ import annotations

import dataclasses
import re
import threading
import time
from pathlib import Path

import pytest

from tandem.engine.driver import Driver
from tandem.errors import TaskError
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.group import summarise
from tandem.rollout.rollout import Rollouts
from tandem.types import Failure, Message, ToolCall
from tests.null.test_rollout import FakeEngine, Letters, spell

USER = '''
import asyncio
import os
import time
from pathlib import Path
from tandem.program.environment import Environment, Episode, Step, tool
from tandem.errors import SandboxError
from tandem.types import Message, Prompt

class Shop(Episode):
    open = 0

    async def setup(self):
        Shop.open += 1
        self.held = 0
        if self.prompt.record["index"] == 7:
            raise RuntimeError("no shop")

    @tool
    async def take(self, count: int, seconds: float = 0.0) -> int:
        """Takes."""
        await asyncio.sleep(seconds)
        self.held += count
        return self.held

    @tool
    def block(self, seconds: float) -> None:
        time.sleep(seconds)

    @tool
    def die(self) -> None:
        os._exit(3)

    @tool
    async def cling(self) -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except BaseException:
                pass

    @tool
    async def leave(self, how: str) -> None:
        async def leaves():
            raise KeyboardInterrupt if how == "interrupt" else SystemExit(4)
        if how == "task":
            await asyncio.create_task(leaves())
        if how == "unawaited":
            self.left = asyncio.create_task(leaves())
            await asyncio.sleep(0.05)
            return
        await leaves()

    async def observe(self, turns):
        if not turns[-1].calls:
            return Step(None, reward=0.25, state=str(self.held))
        step = await self.respond(turns[-1])
        return Step(step.messages, reward=self.held, state="counter")

    async def score(self, turns):
        if turns[-1].content == "box":
            raise SandboxError("no box")
        if turns[-1].content == "stuck":
            await asyncio.sleep(60)
        return self.earned if turns[-1].content != "bad" else float("nan")

    async def teardown(self):
        with Path(self.prompt.record["log"]).open("a") as file:
            file.write(f"{self.prompt.id} {self.held} {Shop.open}\\\\n")

class Shops(Environment):
    episodes = Shop

    def __init__(self, log):
        self.log = log

    def prompt(self, split, index):
        return Prompt(f"{split}{index}", (Message("user", f"{split}{index}"),), {"log": self.log, "index": index})

class Slow(Episode):
    async def respond(self, message):
        await asyncio.sleep(0.3)
        return Step(None, reward=1.0)

class Slows(Shops):
    episodes = Slow

class Unnamed(Shops):
    episodes = None

    def episode(self, prompt):
        return Shop(prompt)
'''


def make(folder: Path, name: str = "Shops", **changes) -> EnvironmentPool:
    (folder / "shops.py").write_text(USER.replace("\\\\", "\\"))
    task = TaskConfig(f"{folder}/shops.py:{name}", parameters=(("log", str(folder / "log")),), heldout_size=0)
    return EnvironmentPool(dataclasses.replace(task, **changes))


@pytest.fixture
def pool(tmp_path: Path):
    made = make(tmp_path, workers=1)
    yield made
    made.close()


def calls(name: str, **arguments) -> Message:
    return Message("assistant", "", (ToolCall(name, arguments),), sampled=True)


def test_waits_overlap_in_one_child(pool: EnvironmentPool, tmp_path: Path) -> None:
    """A hundred tools that sleep for a quarter of a second are answered one after the other, or by a process each."""
    prompts = pool.batch(0, 100)
    began_s = time.monotonic()
    episodes = [pool.episode(dataclasses.replace(p, record={**p.record, "index": 0}), 1e12) for p in prompts]
    for episode in episodes:
        episode.said.append(calls("take", count=2, seconds=0.25))
    found = [future.result(60) for future in [episode.observe() for episode in episodes]]
    assert [one.messages[0].content for one in found] == ["2"] * 100
    assert time.monotonic() - began_s < 20.0  # 25 s one after the other
    assert [(one.reward, one.state, one.counts) for one in found] == [(2.0, "counter", {"tool_calls": 1})] * 100
    assert len(pool._workers.children) == 1
    for episode in episodes:
        episode.said.append(Message("assistant", "done", sampled=True))
    assert {future.result(60).messages for future in [episode.observe() for episode in episodes]} == {None}
    assert {future.result(60) for future in [episode.score() for episode in episodes]} == {2.25}
    for episode in episodes:
        episode.teardown()
    pool.close()
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len({line[0] for line in log}) == 100 and {line[1] for line in log} == {"2"} and log[-1][2] == "100"


def test_a_respond_of_its_own_may_wait(tmp_path: Path) -> None:
    """An `async def respond` that is run to its end without a loop: its first `await` of a sleep fails the program."""
    made = make(tmp_path, "Slows", workers=1)
    try:
        episodes = [made.episode(made.prompt(index)) for index in range(64)]
        began_s = time.monotonic()
        for episode in episodes:
            episode.said.append(Message("assistant", "go", sampled=True))
        heard = [asked.result(30.0) for asked in [episode.observe() for episode in episodes]]
        assert [getattr(one, "reward", one) for one in heard] == [1.0] * 64
        assert time.monotonic() - began_s < 64 * 0.3
    finally:
        made.close()


def test_a_call_past_its_deadline_is_cancelled_alone(tmp_path: Path) -> None:
    """A tool that hangs takes its neighbours with it, or is waited for by its own program for ever."""
    pool = make(tmp_path, workers=1, reward_deadline_s=0.5)
    slow, beside = (pool.episode(prompt, 1e12) for prompt in pool.batch(0, 2))
    beside.said.append(calls("take", count=1))
    assert beside.observe().result(30).messages[0].content == "1"
    slow.said.append(calls("take", count=1, seconds=60.0))
    late = slow.observe()
    assert late.result(30) == Failure("deadline", "environment took longer than 0.5 s (task.reward_deadline_s)")
    beside.said.append(calls("take", count=1))
    assert beside.observe().result(30).messages[0].content == "2"  # it kept its state
    beside.said.append(Message("assistant", "stuck", sampled=True))
    assert beside.score().result(30) == Failure("deadline", "reward took longer than 0.5 s (task.reward_deadline_s)")
    pool.close()


@pytest.mark.parametrize("how", ["block", "die"])
def test_a_child_that_is_held_up_or_dies(tmp_path: Path, how: str) -> None:
    """A plain function that blocks the event loop, or the end of its process, leaves other programs waiting."""
    pool = make(tmp_path, workers=1, reward_deadline_s=0.5)
    bad, beside, after = (pool.episode(prompt, 1e12) for prompt in pool.batch(0, 3))
    beside.said.append(calls("take", count=1, seconds=0.4))
    bad.said.append(calls(how, **({"seconds": 60.0} if how == "block" else {})))
    futures = beside.observe(), bad.observe()
    found = [future.result(30) for future in futures]
    if how == "block":
        late = Failure("deadline", "environment took longer than 0.5 s (task.reward_deadline_s)")
        assert found[1] == late and found[0] in (late, Failure("environment", f"its process ended: {late.reason}"))
    else:
        assert found == [Failure("environment", "its process ended: it died (exit code 3)")] * 2
    beside.said.append(calls("take", count=1))
    assert isinstance(beside.observe().result(30), Failure)
    after.said.append(calls("take", count=4))
    assert after.observe().result(30).messages[0].content == "4"
    assert [*pool._workers._flights] == pool._workers.children  # nothing is kept of the one that died
    pool.close()


def test_a_call_that_swallows_its_cancellation_is_left_behind(tmp_path: Path) -> None:
    """A bare `except` around an await ends its process at the deadline, and a hundred other programs with it."""
    pool = make(tmp_path, workers=1, reward_deadline_s=0.5)
    clings, beside, after = (pool.episode(prompt, 1e12) for prompt in pool.batch(0, 3))
    beside.said.append(calls("take", count=1))
    assert beside.observe().result(30).messages[0].content == "1"
    (child,) = pool._workers.children
    clings.said.append(calls("cling"))
    reason = "environment took longer than 0.5 s (task.reward_deadline_s), and swallowed its cancellation"
    assert clings.observe().result(30) == Failure("deadline", reason)
    clings.said.append(calls("take", count=1))  # its state is in the hands of the call that runs on
    found = Failure("environment", "an earlier call of it runs on: it swallowed its cancellation")
    assert clings.observe().result(30) == found
    clings.teardown()
    for episode, held in ((beside, "2"), (after, "1")):
        episode.said.append(calls("take", count=1))
        assert episode.observe().result(30).messages[0].content == held
    assert pool._workers.children == [child] and child.alive()
    pool.close()
    assert (tmp_path / "log").read_text().startswith("Shops/train/0 0")  # what it held is given back all the same


@pytest.mark.parametrize("how", ["exit", "interrupt", "task", "unawaited"])
def test_who_leaves_leaves_alone(tmp_path: Path, how: str) -> None:
    """sys.exit() in a tool, or in a task that it started, ends the process and with it the other programs."""
    pool = make(tmp_path, workers=1)
    leaves, beside = (pool.episode(prompt, 1e12) for prompt in pool.batch(0, 2))
    beside.said.append(calls("take", count=1, seconds=0.3))
    late = beside.observe()
    leaves.said.append(calls("leave", how=how))
    found = leaves.observe().result(30)
    reason = "raised KeyboardInterrupt" if how == "interrupt" else "raised SystemExit: 4"
    if how == "unawaited":
        assert found.messages[0].content == "null"
    else:
        assert found == Failure("environment", reason)
    assert late.result(30).messages[0].content == "1"
    pool.close()


def test_a_program_that_is_withdrawn_ends_its_call_first(pool: EnvironmentPool, tmp_path: Path) -> None:
    """Teardown runs while a tool still changes what it gives back, or waits for it to end."""
    episode = pool.episode(pool.prompt(0), 1e12)
    episode.said.append(calls("take", count=5, seconds=60.0))
    future = episode.observe()
    other = pool.episode(pool.prompt(1), 1e12)
    other.said.append(calls("take", count=1))
    assert other.observe().result(30).messages[0].content == "1"  # the first is in its tool by now
    episode.teardown()
    assert future.result(30) == Failure("environment", "it was withdrawn")
    pool.close()
    assert (tmp_path / "log").read_text().split()[:2] == ["Shops/train/0", "0"]


def test_a_grader_that_breaks_pays_what_the_task_says(tmp_path: Path) -> None:
    """An answer that breaks its grader escapes its lesson: it is left out of the batch."""
    for paid in (None, -1.0):
        pool = make(tmp_path, workers=1, reward_on_error=paid, reward_deadline_s=0.5)
        for said, reason in (("bad", "returned nan"), ("stuck", "took longer than 0.5 s")):
            episode = pool.episode(pool.prompt(0), 1e12)
            episode.said.append(Message("assistant", said, sampled=True))
            found = episode.score().result(30)
            if paid is None:
                assert isinstance(found, Failure) and reason in found.reason and not episode.counts
            else:
                assert found == -1.0 and episode.counts == {"scorer_errors": 1}
        pool.close()


def test_a_setup_that_fails_is_its_own_programs(pool: EnvironmentPool) -> None:
    """A sandbox that does not come up for one program ends the run, or passes for an answer."""
    episode = pool.episode(pool.prompt(7), 1e12)
    episode.said.append(calls("take", count=1))
    assert episode.observe().result(30) == Failure("environment", "raised RuntimeError: no shop")


def test_async_methods_must_be_announced(tmp_path: Path) -> None:
    """An environment whose coroutines nobody runs, for want of a line in its class."""
    pool = make(tmp_path, "Unnamed", workers=1)
    episode = pool.episode(pool.prompt(0), 1e12)
    episode.said.append(Message("assistant", "a", sampled=True))
    with pytest.raises(TaskError, match="write `episodes = Shop` in the environment's class"):
        episode.observe().result(30)
    pool.close()


NAMES = ["take", "block", "die", "cling", "leave"]


class Calling(Renderer):
    """Its tools are those of the episode."""

    def prompt_tokens(self, messages, tools=()):
        assert [schema["function"]["name"] for schema in tools] == NAMES
        return super().prompt_tokens(messages)


def test_a_step_of_programs_with_tools(pool: EnvironmentPool) -> None:
    """Rewards of turns, states or counts that are lost between the environment and the trajectory."""
    called = "```python\ntake(count=3)\n```"
    engine = FakeEngine(lambda request: spell(called if request.id.endswith("/0") else "done"))
    config = RolloutConfig(samples_per_prompt=2, max_turns=4, max_new_tokens=40, deadline_s=60.0)
    groups = Rollouts(Driver(engine), Calling(Letters()), pool, config, run_seed=1).collect(0, pool.batch(0, 2))
    everyone = [t for group in groups for t in group.trajectories]
    assert [t.reward for t in everyone] == [3.25] * 4 and [dict(t.counts) for t in everyone] == [{"tool_calls": 1}] * 4
    summary = summarise(groups)
    assert (summary.turns, summary.counts) == (2.0, {"tool_calls": 4})
    assert [request.priority for request in engine.seen[:4]] == [0] * 4 and engine.seen[-1].priority == 1


def test_a_thousand_programs_are_open_at_once(pool: EnvironmentPool) -> None:
    """A process, a thread or a megabyte for each program that waits for its tool: a thousand take a machine."""
    episodes = [pool.episode(dataclasses.replace(pool.prompt(0), id=f"p{n}"), 1e12) for n in range(1000)]
    threads = threading.active_count()
    for episode in episodes:
        episode.said.append(calls("take", count=1, seconds=3.0))
    futures = [episode.observe() for episode in episodes]
    (child,) = pool._workers.children
    watched = pool.episode(pool.prompt(1), 1e12)
    watched.said.append(calls("take", count=1))
    assert watched.observe().result(30).messages[0].content == "1"  # all before it are in their tools by now
    assert not any(future.done() for future in futures) and threading.active_count() <= threads + 2
    resident = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{child.popen.pid}/status").read_text())
    assert int(resident[0]) < 250_000  # of 1 GB for all
    assert {future.result(60).messages[0].content for future in futures} == {"1"}


def test_a_setup_that_fails_is_no_wrong_answer(tmp_path: Path) -> None:
    """Where a program's first call is for its reward, a sandbox that does not come up is paid as a wrong answer."""
    pool = make(tmp_path, workers=1, reward_on_error=0.0)
    episode = pool.episode(pool.prompt(7), 1e12)
    episode.said.append(Message("assistant", "a", sampled=True))
    assert episode.score().result(30) == Failure("environment", "raised RuntimeError: no shop") and not episode.counts
    episode = pool.episode(pool.prompt(1), 1e12)
    episode.said.append(Message("assistant", "box", sampled=True))
    assert episode.score().result(30) == Failure("environment", "no box") and not episode.counts
    pool.close()


def test_the_last_turn_acts(pool: EnvironmentPool) -> None:
    """A tool called in the last turn that is allowed never runs, and what it earned is lost."""
    engine = FakeEngine(lambda request: spell("```python\ntake(count=3)\n```"))
    config = RolloutConfig(samples_per_prompt=2, max_turns=1, max_new_tokens=40, deadline_s=60.0)
    (group,) = Rollouts(Driver(engine), Calling(Letters()), pool, config, run_seed=1).collect(0, pool.batch(0, 1))
    for trajectory in group.trajectories:
        assert trajectory.reward == 3.0 and dict(trajectory.counts) == {"tool_calls": 1, "turn_limit": 1}
        assert trajectory.num_turns == 1 and bool(trajectory.columns["loss_mask"][-1])  # nobody heard what it said
