"""An assistant's message that an environment says, an example or a turn said again, taken for the model's own turn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tandem.columns import Columns
from tandem.engine.driver import Driver
from tandem.program.adapters import verifiers
from tandem.program.config import TaskConfig
from tandem.program.environment import Environment, Fold
from tandem.program.episode import checked_step, last_text
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.group import summarise
from tandem.rollout.pieces import Pieces
from tandem.rollout.program import Paused, Program, Segment
from tandem.rollout.rollout import Rollouts
from tandem.rollout.rows import trajectory_rows
from tandem.rollout.trajectory import flatten
from tandem.rollout.watch import Progress, Watched
from tandem.types import Completion, Group, Message, Prompt, StopReason, ToolCall, Turn
from tests.null.test_history import CALL, CALLED, TOOL, chatml, played
from tests.null.test_rollout import FakeEngine, Letters, spell

EXAMPLE = Message("assistant", "For 2 + 2 I say 4.")
QUOTES = """
from tandem.program.environment import Environment, Step
from tandem.types import Message, Prompt

class Quotes(Environment):
    def prompt(self, split, index):
        return Prompt(f"{split}{index}", (Message("user", "q"),), {"answer": "7"})

    def observe(self, prompt, turns):
        if len(turns) > 1:
            return None
        return [turns[0], Message("user", "Again?"), Message("assistant", "7")]

    def reward(self, prompt, text):
        return float(text == "7")
"""


class Echo(Environment):
    """Pays what it is given, to see what that is."""

    def reward(self, prompt: Prompt, text: str) -> float:
        return text  # type: ignore[return-value]


@pytest.mark.parametrize("reward", ["score", "last_number", "exact", "math_verify"])
def test_what_the_environment_quotes_is_not_graded(tmp_path: Path, reward: str) -> None:
    """The right answer that an environment quotes is paid as the model's, which no longer fits into the engine."""
    (tmp_path / "quotes.py").write_text(QUOTES)
    task = TaskConfig(f"{tmp_path}/quotes.py:Quotes", reward=reward, heldout_size=0, workers=1)  # type: ignore[arg-type]
    pool = EnvironmentPool(task)
    engine = FakeEngine(lambda request: spell("5"), capacity=8)
    config = RolloutConfig(samples_per_prompt=1, max_turns=2, max_new_tokens=8, deadline_s=60.0)
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), pool, config, run_seed=1).collect(0, pool.batch(0, 1))
    pool.close()
    (one,) = group.trajectories
    assert one.counts["context_limit"] == 1 and one.failure is None
    assert [message.sampled for message in one.said] == [True, False, False, False]
    assert one.reward == 0.0


def test_a_turn_said_again_is_no_turn() -> None:
    """An environment that gives back a message it was given makes it a turn of the model's."""
    mine = Message("assistant", "5", sampled=True)
    for given in ([mine, TOOL], Fold([mine, TOOL])):
        messages = checked_step(given).messages
        messages = messages.messages if isinstance(messages, Fold) else messages
        assert messages == (dataclasses.replace(mine, sampled=False), TOOL)
    assert last_text((mine, EXAMPLE)) == "5" == Echo().score(Prompt("p", ()), (mine, EXAMPLE))
    assert verifiers.spoken((mine, EXAMPLE, TOOL)) == 1


def test_the_cause_of_a_split_is_of_the_turn_that_changed() -> None:
    """A turn's message is looked for among those that the environment quotes: `calls` of a turn that has none."""
    called = Message("assistant", "", (ToolCall("add", {"a": 1, "b": 2}),))
    _, group, _ = played(chatml(CALLED, "{{ m.content | trim }}"), [CALL, "Three  ", "4"], [called, TOOL])
    assert [one.cause for one in group.trajectories] == ["", "content"]


def test_faults_of_a_quoted_turn_are_not_counted() -> None:
    """A malformed call that the environment quotes counts as another of the model's."""
    wrong = "<tool_call>{</tool_call>"
    quoted = Message("assistant", wrong, faults=("its JSON is broken",))
    _, group, _ = played(chatml(CALLED), [wrong, "3"], [quoted], "append")
    assert summarise([group]).counts["unreadable_calls"] == 1


def test_the_reward_of_a_turn_stands_at_the_models_message() -> None:
    """What a turn earned stands at an example; a page takes the example for the turn."""
    turns = []
    for number, earned in enumerate((0.5, -1.0)):
        columns = Columns.of(tokens=(number, 7), logprobs=(0.0, 0.0), versions=(0, 0))
        turns.append(Turn(Completion("r", columns, StopReason.LENGTH), (9,), reward=earned))
    said = (Message("assistant", "a", sampled=True), EXAMPLE, TOOL, Message("assistant", "b", sampled=True))
    flat = dataclasses.replace(flatten("p/0/0", "p", (1,), turns, 1.0), said=said)
    group = Group(Prompt("p", (Message("user", "?"),)), (flat,))
    (row,) = trajectory_rows([group], Pieces(lambda ids: "".join(map(str, ids))))
    assert row["said"] == [
        {"role": "assistant", "reward": 0.5},
        {"role": "assistant", "sampled": False},
        {"role": "tool"},
        {"role": "assistant", "reward": -1.0},
    ]


class Quoting:
    """An episode whose environment quotes after each turn."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        self.counts: dict[str, int] = {}

    def teardown(self) -> None:
        """It holds nothing."""


def test_the_table_counts_turns_of_the_model() -> None:
    """`tandem rollout` shows examples as turns."""
    pool = type("Pool", (), {"episode": lambda self, prompt, until_s: Quoting()})()
    progress = Progress(1)
    running = Watched(pool, progress).episode(Prompt("p", ()), 0.0)
    running.said.extend([Message("assistant", "a", sampled=True), EXAMPLE])
    running.teardown()
    assert progress.turns == 1


def test_a_kept_program_asks_again_from_its_turn() -> None:
    """What an environment has answered and nobody took is kept up to an example in it, and asked for a second time."""
    episode = Quoting()
    episode.said.extend([Message("assistant", "a", sampled=True), TOOL, EXAMPLE])
    program = Program("p/0/0", 0, Prompt("p", ()), episode, [Segment((1,), 0, ())])  # type: ignore[arg-type]
    assert Paused.of(program, "environment").said == (episode.said[0],)
    assert Paused.of(program, "engine").said == tuple(episode.said)
