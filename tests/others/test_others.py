"""Adapters against the real packages, each in a virtual environment of its own, which `make test-others` makes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.errors import TaskError
from tandem.program.config import TaskConfig
from tandem.program.pool import EnvironmentPool
from tandem.types import Failure, Message, ToolCall

HERE = Path(__file__).parent
VENVS = HERE.parents[1] / ".venv-others"
CLASSES = {"gym": "GymText", "textarena": "TextArena", "verifiers": "Verifiers", "openenv": "OpenEnv"}


@pytest.fixture
def pools() -> Iterator[Any]:
    """A function that opens a task of an adapter in its package's virtual environment."""
    opened: list[EnvironmentPool] = []

    def pool(adapter: str, heldout: int = 0, **parameters: Any) -> EnvironmentPool:
        python = VENVS / adapter / "bin" / "python"
        if not (VENVS / adapter / "installed").exists():
            pytest.skip(f"no {python}: `make test-others` installs {(HERE / f'{adapter}.txt').read_text().strip()}")
        task = TaskConfig(
            f"tandem.program.adapters.{adapter}:{CLASSES[adapter]}",
            parameters=tuple(parameters.items()),
            heldout_size=heldout,
            python=str(python),
            workers=1,
            reward_deadline_s=30.0,
        )
        opened.append(EnvironmentPool(task))
        return opened[-1]

    yield pool
    for one in opened:
        one.close()


def talk(pool: EnvironmentPool, prompt: Any, *said: str | Message) -> tuple[list[Any], Any, dict[str, int]]:
    """What a program observes after each text, its reward, and its counts."""
    episode = pool.episode(prompt)
    seen = []
    for text in said:
        episode.said.append(Message("assistant", text, sampled=True) if isinstance(text, str) else text)
        seen.append(episode.observe().result(60))
        assert not isinstance(seen[-1], Failure), seen[-1]
    reward = episode.score().result(60)
    episode.teardown()
    return seen, reward, {name: count for name, count in episode.counts.items() if count}


def shown(observed: Any) -> str | None:
    return None if observed.messages is None else observed.messages[-1].content


@pytest.mark.parametrize("adapter", CLASSES)
def test_the_pins_are_those_of_the_adapters(adapter: str) -> None:
    """The tests run another version than the adapter tells its users to install."""
    module = importlib.import_module(f"tandem.program.adapters.{adapter}")
    assert (HERE / f"{adapter}.txt").read_text().split() == [module.PIN]


def test_gymnasium_taxi(pools: Any) -> None:
    """A taxi's passenger or destination, which its drawing tells by colour alone, is lost."""
    pool = pools("gym", 8, id="Taxi-v4", render_mode="ansi", actions="south/north/east/west/pickup/dropoff")
    assert len({prompt.messages[0].content for prompt in pool.heldout}) == 8
    prompt = pool.prompt(0)
    drawn = prompt.record["first"]
    assert drawn.count("[magenta") == drawn.count("[blue") == 1 and "yellow" in drawn and "\x1b" not in drawn
    seen, reward, counts = talk(pool, prompt, "pickup", "fly", "<action>south</action>", "north")
    place = drawn.index("yellow")
    assert [one.reward for one in seen] == [-10.0 if "[blue yellow" not in drawn else -1.0, 0.0, -1.0, -1.0]
    assert counts == {"bad_actions": 1} and reward == sum(one.reward for one in seen)
    assert shown(seen[1]).startswith("'fly' is no action.") and seen[0].state == drawn and place
    assert shown(seen[2]).endswith("(South)") and shown(seen[3]).endswith("(North)")
    again, _, _ = talk(pool, prompt, "pickup", "fly", "<action>south</action>", "north")
    assert [shown(one) for one in again] == [shown(one) for one in seen]


def test_gymnasium_cut_and_numbers(pools: Any) -> None:
    """The time limit of gymnasium's wrapper passes for an end, or observations of numbers for texts."""
    pool = pools("gym", id="FrozenLake-v1", render_mode="ansi", actions="left/down/right/up", max_episode_steps=2)
    seen, reward, counts = talk(pool, pool.prompt(0), "left", "left")
    assert seen[0].messages and seen[1].messages is None and counts == {"cut_by_environment": 1} and reward == 0.0
    pool = pools(
        "gym", 4, id="Blackjack-v1", instructions="[yours, the dealer's, an ace]: 0 stays, 1 draws.", hidden=True
    )
    prompt = pool.prompt(0)
    total, dealer, ace = eval(prompt.record["first"])
    assert 4 <= total <= 21 and 1 <= dealer <= 10 and ace in (0, 1)
    seen, reward, _ = talk(pool, prompt, "0")
    assert seen[0].messages is None and reward in (-1.0, 0.0, 1.0)


def test_gymnasium_does_not_have_it(pools: Any) -> None:
    """A wrong id is a traceback, or is found in the middle of a step."""
    with pytest.raises(TaskError, match="NoSuch-v1"):
        pools("gym", id="NoSuch-v1").ready()


def test_textarena_guess_the_number(pools: Any) -> None:
    """A game's hints, its rule for invalid moves or its reward are lost; a seed gives another number."""
    pool = pools("textarena", 4, id="GuessTheNumber-v0")
    assert len({prompt.record["seed"] for prompt in pool.heldout}) == 4
    prompt = pool.prompt(3)
    assert "between 1 and 20" in prompt.messages[0].content
    low, high, path = 1, 20, []
    while True:  # by halves, from the hints alone, each time from the start
        path.append((low + high) // 2)
        seen, reward, counts = talk(pool, prompt, *(f"I say [{guess}]" for guess in path))
        if seen[-1].messages is None:
            break
        low, high = (path[-1] + 1, high) if "higher" in shown(seen[-1]) else (low, path[-1] - 1)
    assert reward == 1.0 and len(path) <= 5 and not counts
    seen, reward, counts = talk(pool, prompt, "six", "six")
    assert "attempted an invalid move" in shown(seen[0]) and seen[1].messages is None
    assert counts == {"bad_actions": 1, "lost_by_bad_action": 1} and reward == 0.0  # the game pays by the last guess


def test_textarena_two_players(pools: Any) -> None:
    """The other seat is not played, plays otherwise each time, or is paid in place of the model's."""
    pool = pools("textarena", id="TicTacToe-v0", players=2, seat=-1)
    prompts = pool.batch(0, 8)
    assert {prompt.record["seat"] for prompt in prompts} == {0, 1}
    rewards = []
    for prompt in prompts:
        first = talk(pool, prompt, *(f"[{cell}]" for cell in (4,)))
        assert shown(first[0][0]) == shown(talk(pool, prompt, "[4]")[0][0])
        said, seen = [], []
        while not seen or seen[-1].messages is not None:
            board = shown(seen[-1]) if seen else prompt.messages[-1].content
            said.append(board.rsplit("Available Moves: ", 1)[1].split("'")[1])
            seen, reward, counts = talk(pool, prompt, *said)
        rewards.append(reward)
        assert not counts and reward == seen[-1].reward
    assert set(rewards) <= {-1.0, 0.0, 1.0} and len(set(rewards)) > 1


def test_textarena_dice_of_games_side_by_side(pools: Any) -> None:
    """A game's draws depend on the games that are played beside it in the process."""
    pool = pools("textarena", id="PigDice-v0", players=2)
    prompt = pool.prompt(0)
    alone = [shown(one) for one in talk(pool, prompt, "[roll]", "[hold]", "[roll]")[0]]
    runs = [pool.episode(prompt) for _ in range(3)]
    beside: list[list[Any]] = [[], [], []]
    for text in ("[roll]", "[hold]", "[roll]"):
        for run, seen in zip(runs, beside, strict=True):
            run.said.append(Message("assistant", text, sampled=True))
            seen.append(shown(run.observe().result(60)))
    assert beside == [alone] * 3


def test_openenv_echo(pools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that `openenv init` writes: sessions mixed up or not given back, rewards lost."""
    if not (VENVS / "openenv" / "installed").exists():
        pools("openenv")
    subprocess.run([VENVS / "openenv/bin/openenv", "init", "word_echo"], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = pools("openenv", 2, app="word_echo.server.app:app", field="echoed_message")
    prompt = pool.prompt(0)
    assert prompt.messages == (Message("user", "Word Echo environment ready!"),)
    said = ["hello", "<think>x</think><action>left</action>", '{"message": "abc"}', '{"message": 3}']
    seen, reward, counts = talk(pool, prompt, *said)
    assert [shown(one) for one in seen[:3]] == ["hello", "left", "abc"] and shown(seen[3]).startswith(
        "That is no action."
    )
    assert [one.reward for one in seen] == pytest.approx([0.5, 0.4, 0.3, 0.0]) and reward == pytest.approx(1.2)
    assert counts == {"bad_actions": 1}
    first, other = pool.episode(prompt), pool.episode(prompt)  # the template's server has one session
    for episode in (first, other):
        episode.said.append(Message("assistant", "x", sampled=True))
    assert shown(first.observe().result(60)) == "x"
    assert "max_concurrent_envs" in other.observe().result(60).reason
    first.teardown()
    assert shown(talk(pool, prompt, "y")[0][0]) == "y"


def test_openenv_tools(pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools that an environment has over MCP are not the prompt's, or their answers not what the model sees."""
    monkeypatch.syspath_prepend(str(HERE))
    pool = pools("openenv", app="openenv_tools:app", instructions="Raise the counter to 3.")
    prompt = pool.prompt(0)
    (schema,) = prompt.tools
    assert schema["function"]["name"] == "raise_by" and schema["function"]["parameters"]["required"] == ["step"]
    calls = [Message("assistant", "", (ToolCall("raise_by", {"step": step}, "c"),), sampled=True) for step in (1, 2)]
    wrong = Message("assistant", "", (ToolCall("lower", {}),), faults=("no JSON",), sampled=True)
    seen, reward, counts = talk(pool, prompt, calls[0], wrong, calls[1])
    assert seen[0].messages == (Message("tool", "at 1", call_id="c", more={"name": "raise_by"}),)
    assert [one.content.split(":")[0] for one in seen[1].messages] == ["error", "error"]
    assert seen[2].messages is None and reward == 1.0
    assert counts == {"tool_calls": 3, "tool_errors": 1, "malformed_calls": 1}


def test_verifiers_single_agent(pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A taskset's system message, weights of rewards or size are lost; a program that is cut is not scored."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "tasksets"))
    pool = pools("verifiers", 4, taskset="sums-v1", **{"taskset.size": 12})
    assert {prompt.messages[1].content for prompt in pool.heldout} == {f"What is {n} + 1?" for n in (8, 9, 10, 11)}
    prompt = pool.prompt(3)
    assert [(one.role, one.content) for one in prompt.messages] == [("system", "Sums."), ("user", "What is 3 + 1?")]
    seen, reward, _ = talk(pool, prompt, "4")
    assert seen[0].messages is None and reward == 1.5
    assert talk(pool, prompt, "5")[1] == 0.5
    episode = pool.episode(prompt)
    episode.said.append(Message("assistant", "4", sampled=True))
    assert episode.score().result(60) == 1.5  # not observed: cut at rollout.max_turns
    episode.teardown()


def test_verifiers_tools(pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task's tool server is not started, or a call and its answer are not one turn of verifiers' trace."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "tasksets"))
    pool = pools("verifiers", taskset="sums-v1", **{"taskset.task.tools": True})
    prompt = pool.prompt(3)
    assert [schema["function"]["name"] for schema in prompt.tools] == ["add"]
    call = Message("assistant", "I add.", (ToolCall("add", {"a": 3, "b": 1}),), sampled=True)
    none = Message("assistant", "", (ToolCall("subtract", {}),), sampled=True)
    unread = Message("assistant", "", faults=("no JSON",), sampled=True)
    seen, reward, counts = talk(pool, prompt, call, none, unread, "4")
    assert [shown(one) for one in seen[:1]] == ["4"] and seen[0].messages[0].more == {"name": "add"}
    assert shown(seen[1]).startswith("error: there is no tool 'subtract'") and shown(seen[2]) == "error: no JSON"
    assert seen[3].messages is None and reward == 1.0 + 0.5 * 3
    assert counts == {"tool_calls": 2, "malformed_calls": 1}
    assert talk(pool, prompt, call)[1] == 0.5  # cut: the call is its only turn


def test_verifiers_env_that_opens_the_conversation(pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task without a prompt has none here, or what the Env says between turns is lost."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "tasksets"))
    pool = pools("verifiers", 2, taskset="asks-twice")
    prompt = pool.prompt(2)
    number = prompt.record["position"]
    assert prompt.messages == (Message("user", f"Say {number}."),) and number == 4
    seen, reward, _ = talk(pool, prompt, "4", "six")
    assert shown(seen[0]) == "You said 4. Again?" and seen[1].messages is None and reward == 1.0


def test_verifiers_best_of_n(pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts of one agent in one episode run into each other, or only one of them is paid."""
    monkeypatch.setenv("PYTHONPATH", str(HERE / "tasksets"))
    pool = pools("verifiers", taskset="sums-v1", env="best-of-n", n=2)
    seen, reward, _ = talk(pool, pool.prompt(3), "4", "9")
    assert [message.content for message in seen[0].messages.messages] == ["Sums.", "What is 3 + 1?"]
    assert seen[1].messages is None and reward == (1.5 + 0.5) / 2
    with pytest.raises(TaskError, match="agents assistant have no client|agents assistant, user have no client"):
        pools("verifiers", taskset="sums-v1", env="user-sim").ready()


def test_the_python_that_tests_run() -> None:
    """The other environments were made with another Python, so that all tests above say so and none runs."""
    for made in VENVS.glob("*/bin/python") if VENVS.exists() else ():
        tag = "import sys; print(sys.implementation.cache_tag)"
        said = subprocess.run([made, "-c", tag], capture_output=True, text=True, check=True).stdout.strip()
        assert said == sys.implementation.cache_tag, f"{made}: remove {VENVS}"
