"""Adapters of other packages' environments, against fakes of the same protocols.

tests/others has the real ones.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.engine.driver import Driver
from tandem.errors import TaskError
from tandem.program.adapters import gym, openenv, textarena, verifiers
from tandem.program.config import TaskConfig
from tandem.program.environment import Fold
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.rollout import Rollouts
from tandem.types import Message, Prompt, ToolCall
from tests.null.test_rollout import FakeEngine, Letters, spell
from tests.samples import column


class Discrete:
    start = 0

    def __init__(self, n: int) -> None:
        self.n = n

    def contains(self, value: Any) -> bool:
        return isinstance(value, int) and 0 <= value < self.n


class Line:
    """Walk to the end of a line; a step costs 1, its end pays 10, and after six it is cut."""

    action_space = Discrete(2)
    render_mode = "ansi"

    def __init__(self, length: int = 4, seed: int | None = None) -> None:
        self.length, self.made_by, self.closed = length, seed, 0

    def reset(self, *, seed: int):
        self.at, self.steps = seed % (self.length - 1), 0
        return self.at, {}

    def step(self, action: int):
        self.at, self.steps = max(0, self.at + (1 if action else -1)), self.steps + 1
        done = self.at == self.length - 1
        return self.at, 10.0 if done else -1.0, done, self.steps == 6, {}

    def render(self) -> str:
        return "\n" + "".join("\x1b[41m.\x1b[0m" if at == self.at else "." for at in range(self.length)) + "\n"

    def close(self) -> None:
        self.closed += 1


class Old:
    """As before Gymnasium: four values, no information at reset, texts."""

    def reset(self, seed: int):
        return f"hello {seed % 7}"

    def step(self, action: str):
        return f"you said {action}", len(action), action == "bye", {}


class Drifts(Line):
    resets = 0

    def reset(self, *, seed: int):
        Drifts.resets += 1
        return super().reset(seed=Drifts.resets)


def played(episode: Any, words: list[str]) -> list[Any]:
    """What each text is answered with."""
    episode.setup()
    return [episode.observe((Message("assistant", word, sampled=True),)) for word in words]


def test_a_gym_style_environment_is_stepped_by_names() -> None:
    """An action that is stepped though the model named none, a colour that is lost, an end that is not one."""
    task = gym.GymText(make="tests.null.test_adapters:Line", actions="left/ right", patience=2, length=3, seed=5)
    prompt = next(p for p in (task.prompt("train", i) for i in range(9)) if p.record["first"] == "[red .]..")
    assert prompt.messages[0].content.startswith("Answer with one action on the last line. Actions: left, right.\n\n")
    run = task.episode(prompt)
    steps = played(run, ["I think\nRight.", "<action>up</action>", "left", "<action>right</action>\nDone", "'right'"])
    assert [step.reward for step in steps] == [-1.0, 0.0, -1.0, -1.0, 10.0]
    assert [step.state for step in steps] == ["[red .]..", ".[red .].", ".[red .].", "[red .]..", ".[red .]."]
    assert [step.messages and step.messages[0].content for step in steps] == [
        ".[red .].", "'up' is no action. Actions: left, right.", "[red .]..", ".[red .].", None,
    ]  # fmt: skip
    assert dict(run.counts) == {"bad_actions": 1, "cut_by_environment": 0}
    run.teardown()
    assert run.made.closed == 1 and run.made.made_by == prompt.record["seed"]
    steps = played(task.episode(prompt), ["x", "left", "y", "z"])
    assert [step.messages is None for step in steps] == [False, False, False, True]
    run = task.episode(prompt)
    assert [step.messages is None for step in played(run, ["left"] * 6)] == [False] * 5 + [True]
    assert run.counts["cut_by_environment"] == 1


def test_texts_and_four_values() -> None:
    """An older environment of texts, without an action space, is refused."""
    task = gym.GymText(make="tests.null.test_adapters:Old", instructions="Talk.")
    prompt = task.prompt("heldout", 3)
    assert prompt.messages[0].content == f"Talk.\n\nhello {prompt.record['seed'] % 7}"
    steps = played(task.episode(prompt), ["hm", "bye"])
    assert [(step.messages and step.messages[0].content, step.reward) for step in steps] == [
        ("you said hm", 2.0),
        (None, 3.0),
    ]


def test_numbers_where_no_names_are_given() -> None:
    """True passes for action 1, or a number past the last for an action."""
    task = gym.GymText(make="tests.null.test_adapters:Line")
    assert "Actions: 0 to 1." in task.prompt("train", 0).messages[0].content
    made = Line()
    assert [gym.chosen(made, word, []) for word in ("0", "1")] == [0, 1]
    for word in ("2", "true", "1.0", "right", "", "[1]", "[" * 9999):
        with pytest.raises(ValueError, match="is no action"):
            gym.chosen(made, word, [])


def test_a_run_starts_where_its_prompt_does() -> None:
    """A program is graded on another state than the one it was shown, since the seed does not decide."""
    task = gym.GymText(make="tests.null.test_adapters:Drifts")
    with pytest.raises(ValueError, match="does not give what the prompt shows"):
        task.episode(task.prompt("train", 0)).setup()


def test_questions_by_text_or_by_seed() -> None:
    """A start that the model was trained on is held out, or games that hide what the seed draws cannot be."""
    for hidden, same in ((False, True), (True, False)):
        task = gym.GymText(make="tests.null.test_adapters:Line", hidden=hidden)
        one, other = (Prompt("a", (Message("user", "..."),), {"seed": seed}) for seed in (1, 2))
        assert (task.key(one) == task.key(other)) is same
    config = TaskConfig("tests.null.test_adapters:gym_of_lines", heldout_size=8, workers=1)
    with pytest.raises(TaskError, match="16 draws hold only 3 distinct questions"):
        EnvironmentPool(config).ready()
    pool = EnvironmentPool(TaskConfig(config.environment, parameters=(("hidden", True),), heldout_size=8, workers=1))
    assert len({prompt.record["seed"] for prompt in (*pool.heldout, *pool.batch(0, 8))}) == 16
    pool.close()


def gym_of_lines(**parameters: Any) -> gym.GymText:
    return gym.GymText(make="tests.null.test_adapters:Line", **parameters)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "give id=ENVIRONMENT or make="),
        ({"id": "A-v1", "make": "a:b"}, "one of them"),
        ({"make": "tests.null.test_adapters"}, "Write package.module:name"),
        ({"make": "tests.null.test_adapters:Nothing"}, "Write package.module:name"),
        ({"make": "tests.null.test_adapters:Line", "actions": "a/b/c"}, "actions names 3, and the action space is"),
    ],
)
def test_wrong_parameters_are_told(parameters: dict[str, str], said: str) -> None:
    """A mistake in task.parameters shows as a traceback of the package."""
    with pytest.raises(TaskError, match=said):
        gym.GymText(**parameters)  # type: ignore[arg-type]


def test_a_step_of_programs_in_a_gym() -> None:
    """What the environment said is trained on, or its rewards do not reach the trajectory."""
    parameters = (("actions", "left/right"), ("length", 3))
    config = TaskConfig("tests.null.test_adapters:gym_of_lines", parameters=parameters, heldout_size=0, workers=1)
    pool = EnvironmentPool(config)
    prompts = [prompt for prompt in pool.batch(0, 9) if prompt.record["first"] == "[red .].."][:1]
    engine = FakeEngine(lambda request: spell("right"))
    rollouts = RolloutConfig(samples_per_prompt=2, max_turns=9, max_new_tokens=9, deadline_s=60.0)
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), pool, rollouts, run_seed=1).collect(0, prompts)
    pool.close()
    for trajectory in group.trajectories:
        text = Letters().decode(column(trajectory, "tokens")).replace("\0", "")
        assert text.endswith("[red .]..\n<a>right\n<u>.[red .].\n<a>right") and trajectory.reward == 9.0
        kept = [
            token
            for token, ours in zip(*(column(trajectory, name) for name in ("tokens", "loss_mask")), strict=True)
            if ours
        ]
        assert kept == spell("right") * 2


TEXTARENA = '''
import random
from enum import Enum
from types import SimpleNamespace

GAME_ID = -1
ObservationType = Enum("ObservationType", "PROMPT PLAYER_ACTION GAME_BOARD GAME_ADMIN GAME_MESSAGE")

class Wrapper:
    def __init__(self, env):
        self.env = env
    def __getattr__(self, name):
        return getattr(self.env, name)
    def step(self, action):
        return self.env.step(action if "[" in action else f"[{action}]")

class Dice:
    """Seats name a number in turn; who names what the die shows wins. The die is the process's."""
    def __init__(self, sides=6):
        self.sides = sides
    def reset(self, num_players, seed=None):
        random.seed(seed)
        self.seats = num_players
        self.state = SimpleNamespace(role_mapping={GAME_ID: "GAME"}, error_allowance=1, game_info={})
        self.errors, self.turn, self.done, self.rewards = 0, 0, False, None
        self.seen = {seat: [(GAME_ID, f"You are {seat}.", ObservationType.PROMPT)] for seat in range(num_players)}
        self.told("Moves: [1], [2]", ObservationType.GAME_BOARD)
    def told(self, text, kind, sender=GAME_ID):
        for seen in self.seen.values():
            seen.append((sender, text, kind))
    def get_observation(self):
        seen, self.seen[self.turn] = self.seen[self.turn], []
        return self.turn, seen
    def step(self, action):
        self.told(action, ObservationType.PLAYER_ACTION, self.turn)
        number = action.strip("[]")
        if not number.isdigit():
            if self.errors < self.state.error_allowance:
                self.errors += 1
                self.told("an invalid move, again", ObservationType.GAME_ADMIN)
            else:
                self.done, self.rewards = True, {seat: -1 if seat == self.turn else 1 for seat in self.seen}
                self.state.game_info = {self.turn: {"invalid_move": True}}
            return self.done, {}
        die = random.randint(1, self.sides)
        self.told(f"It shows {die}.", ObservationType.GAME_MESSAGE)
        if int(number) == die:
            self.done, self.rewards = True, {seat: 1 if seat == self.turn else -1 for seat in self.seen}
        self.turn, self.errors = (self.turn + 1) % self.seats, 0
        return self.done, {}
    def close(self):
        return self.rewards, self.state.game_info

def make(id, **options):
    return Wrapper(Dice(**options))

envs = SimpleNamespace(registration=SimpleNamespace(ENV_REGISTRY={"Dice-v0": Dice}))
'''


@pytest.fixture
def arena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "textarena.py").write_text(TEXTARENA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(importlib.sys.modules, "textarena", raising=False)  # type: ignore[attr-defined]


def stubborn(shown: str, others: random.Random) -> str:
    return "no"


def one(shown: str, others: random.Random) -> str:
    return f"[{1 + shown.count('You are') + others.randrange(0, 1)}]"


def shows(seed: int, sides: int = 6) -> list[int]:
    """What the die of Dice will show."""
    own = random.Random(seed)
    return [own.randint(1, sides) for _ in range(9)]


def test_a_seat_in_a_game(arena: None) -> None:
    """The model is shown its own words again, plays for another seat, or is paid for it."""
    task = textarena.TextArena("Dice-v0", players=2, seat=1, opponent="tests.null.test_adapters:one", seed=3)
    prompt = next(p for p in (task.prompt("train", i) for i in range(20)) if shows(p.record["seed"])[0] != 2)
    dice = shows(prompt.record["seed"])
    assert (
        prompt.messages[0].content
        == f"[GAME] You are 1.\n[GAME] Moves: [1], [2]\n[Player 0] [2]\n[GAME] It shows {dice[0]}."
    )
    run = task.episode(prompt)
    (step,) = played(run, ["<think>[3]</think>well"])  # the game's own wrapper puts it in brackets
    assert step.messages[0].content == "[GAME] an invalid move, again" and run.counts["bad_actions"] == 1
    assert step.state == "Moves: [1], [2]"
    last = run.observe((Message("assistant", f"It is <action>[{dice[1]}]</action>", sampled=True),))
    assert (last.messages, last.reward) == (None, 1.0)
    run = task.episode(prompt)
    steps = played(run, ["a", "b"])
    assert steps[1].reward == -1.0 and run.counts["lost_by_bad_action"] == 1
    patient = textarena.TextArena("Dice-v0", players=2, seat=1, opponent="tests.null.test_adapters:one", bad_moves=3)
    assert [step.messages is None for step in played(patient.episode(prompt), ["a"] * 4)] == [False] * 3 + [True]


def test_games_side_by_side_draw_for_themselves(arena: None) -> None:
    """A game's dice change with what is played beside it, for all of them are the process's."""
    task = textarena.TextArena("Dice-v0")
    prompt = task.prompt("train", 0)
    dice = shows(prompt.record["seed"])
    before = random.getstate()
    runs = [task.episode(prompt) for _ in range(3)]
    for run in runs:
        run.setup()
    for die in dice[:3]:
        for run in runs:
            step = run.observe((Message("assistant", "[0]", sampled=True),))
            assert step.messages[0].content == f"[GAME] It shows {die}."
    assert random.getstate() == before


def test_opponents_and_seats(arena: None) -> None:
    """A game that the opponent loses by a fault of its own pays the model, or a wrong seat ends in a traceback."""
    for parameters, said in (
        ({"id": "Dice"}, "id is 'Dice', which textarena does not have. Did you mean Dice-v0"),
        ({"id": "Dice-v0", "seat": 1}, "seat is 1. Allowed: 0 to 0, or -1"),
    ):
        with pytest.raises(TaskError, match=said):
            textarena.TextArena(**parameters)  # type: ignore[arg-type]
    task = textarena.TextArena("Dice-v0", players=2, opponent="tests.null.test_adapters:stubborn")
    prompt = next(p for p in (task.prompt("train", i) for i in range(20)) if shows(p.record["seed"])[0] != 2)
    with pytest.raises(ValueError, match="the opponent in seat 1 lost by an invalid move"):
        played(task.episode(prompt), ["[2]"])
    drawn = textarena.TextArena("Dice-v0", players=2, seat=-1)
    assert {drawn.prompt("train", index).record["seat"] for index in range(20)} == {0, 1}
    assert len({drawn.key(drawn.prompt("train", index)) for index in range(20)}) == 20
    with pytest.raises(ValueError, match=r"lists no \[moves\]"):
        textarena.random_move("[GAME] Say something.", random.Random(0))


def test_actions_of_an_openenv_schema() -> None:
    """A text that is an action in JSON is sent as text, or JSON that is none as an action."""
    task: Any = openenv.OpenEnv.__new__(openenv.OpenEnv)
    task.fields, task.field = {"message": {"type": "string"}}, ""
    task.schema = {"required": ["message"]}
    assert task.action("left") == {"message": "left"} and task.action('{"message": "a"}') == {"message": "a"}
    assert task.action('{"other": 1}') == {"message": '{"other": 1}'} and task.action("3") == {"message": "3"}
    task.fields, task.schema = {"x": {"type": "integer"}, "y": {"type": "integer"}}, {"required": ["x", "y"]}
    assert task.action('So\n```json\n{"x": 1, "y": 2}\n```') == {"x": 1, "y": 2}
    for text in ("left", "[1, 2]", '{"z": 1}', "[" * 99999):
        with pytest.raises(ValueError, match="no JSON object with the fields x, y"):
            task.action(text)
    assert (
        task.text({"board": "..", "metadata": {"a": 1}}) == ".."
        and task.text({"a": 1, "b": "é"}) == '{"a": 1, "b": "é"}'
    )
    task.field = "b"
    assert task.text({"a": 1, "b": "c"}) == "c"
    with pytest.raises(ValueError, match="field=b is not in the observation, which has a"):
        task.text({"a": 1})


def test_what_an_openenv_tool_says() -> None:
    """An error of a tool passes for its answer, or the model is shown the envelope."""
    content = {"content": [{"type": "text", "text": "3"}, {"type": "text", "text": "4"}], "is_error": False}
    assert openenv.told({"tool_name": "a", "result": content, "error": None}) == ("3\n4", False)
    assert openenv.told({"result": None, "error": {"message": "no such tool"}}) == ("error: no such tool", True)
    assert openenv.told({"result": {"a": 1}}) == ('{"a": 1}', False)
    with pytest.raises(TaskError, match="is no OpenEnv server"):
        openenv.schema_of("http://127.0.0.1:1")


class Asks:
    """An Env of verifiers as far as the adapter sees it: runs itself, and asks where it wants a turn."""

    def __init__(self, plot: Any) -> None:
        self.plot, self.plays, self.role, self.context = plot, {}, "agent", None
        self.thread = verifiers._Thread()
        self.env = self

    def task(self, position: int) -> str:
        return f"task {position}"

    async def run_episode(self, task: Any, context: Any, on_trace: Any) -> Any:
        self.traces: list[Any] = []

        def minted(name: str, agent: str = "agent") -> Any:
            trace = SimpleNamespace(
                id=name, ok=True, errors=[], reward=0.0, agent=SimpleNamespace(name=agent), stops=[]
            )
            trace.stop = trace.stops.append
            self.traces.append(trace)
            on_trace(trace)
            return trace

        async def ask(trace: Any, *messages: dict[str, Any]) -> Any:
            answer = asyncio.get_running_loop().create_future()
            self.plays[trace.id].questions.put_nowait(verifiers._Question(trace, {"messages": messages}, answer))
            return await answer

        await self.plot(minted, ask)
        return SimpleNamespace(errors=[], traces=self.traces)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def verifiers_run(plot: Any, said: list[Message], scored: bool = True) -> tuple[list[Any], Any, Any]:
    """What the program observes after each turn, its reward, and the fake."""
    hub: Any = Asks(plot)
    body = {"messages": [user("Go.")]}
    prompt = Prompt("p", (Message("user", "Go."),), {"position": 1, "first": verifiers.digest(body)})

    async def run() -> tuple[list[Any], Any]:
        episode = verifiers._Run(prompt, hub)
        await episode.setup()
        turns: tuple[Message, ...] = ()
        steps = []
        for place, message in enumerate(said):
            turns = (*turns, message)
            if place == len(said) - 1 and not scored:
                break
            steps.append((await episode.observe(turns)).messages)
        try:
            return steps, await episode.score(turns)
        finally:
            await episode.teardown()
            assert hub.plays == {}

    return *asyncio.run(run()), hub


def test_a_conversation_of_verifiers_goes_on_or_starts_anew() -> None:
    """What the model has said is said to it again, a rewritten context is taken for its continuation, or the reward is
    another agent's."""

    async def plot(minted: Any, ask: Any) -> None:
        trace, judge = minted("one"), minted("two", "judge")
        first = await ask(trace, user("Go."))
        call = first["tool_calls"][0]
        assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
        answered = {"role": "tool", "tool_call_id": call["id"], "content": [{"type": "text", "text": "2"}]}
        second = await ask(trace, user("Go."), first, answered)
        assert second == {"role": "assistant", "content": "two"}
        third = await ask(trace, user("So far: two."))
        trace.reward, judge.reward = float(third["content"] == "three"), 7.0

    said = [
        Message("assistant", "", (ToolCall("add", {"a": 1}),), sampled=True),
        Message("assistant", "", faults=("no JSON",), sampled=True),
        Message("assistant", "two", sampled=True),
        Message("assistant", "three", sampled=True),
    ]
    steps, reward, _ = verifiers_run(plot, said)
    assert steps[0] == [Message("tool", "2", call_id="call_0_0")]
    assert steps[1] == [Message("tool", "error: no JSON", more={"name": "unreadable"})]
    assert steps[2] == Fold([Message("user", "So far: two.")]) and steps[3] is None
    assert reward == 1.0


def test_a_rollout_of_verifiers_that_is_cut_is_scored() -> None:
    """A program at rollout.max_turns is never scored, hangs, or its last turn is not seen by the scorer."""

    async def plot(minted: Any, ask: Any) -> None:
        trace = minted("one")
        messages = [user("Go.")]
        while (answer := await ask(trace, *messages)) is not None:
            messages += [answer, user("More.")]
        trace.reward = len(messages)

    said = [Message("assistant", "a", sampled=True), Message("assistant", "b", sampled=True)]
    for scored in (True, False):
        steps, reward, hub = verifiers_run(plot, said, scored)
        assert steps[0] == [Message("user", "More.")] and reward == 5
        assert hub.traces[0].stops == ["max_turns"]


def test_an_error_of_verifiers_is_no_reward_of_zero() -> None:
    """A rollout that broke in verifiers is trained on as if its answer were wrong."""

    async def plot(minted: Any, ask: Any) -> None:
        trace = minted("one")
        await ask(trace, user("Go."))
        trace.ok, trace.errors = False, [SimpleNamespace(type="TaskError", message="no scorer")]

    with pytest.raises(ValueError, match="verifiers: TaskError: no scorer"):
        verifiers_run(plot, [Message("assistant", "a", sampled=True)])


def test_messages_of_verifiers() -> None:
    """A picture is dropped without a word, or a call loses its arguments on the way."""
    row = {"role": "assistant", "content": None, "tool_calls": [verifiers.called(ToolCall("f", {"a": [1]}), "c1")]}
    assert verifiers.message_of(verifiers.plain(row)) == Message("assistant", "", (ToolCall("f", {"a": [1]}, "c1"),))
    with pytest.raises(ValueError, match="a user message holds image_url; only text is supported"):
        verifiers.plain(user([{"type": "image_url"}]))
    assert json.dumps(verifiers.wire({"messages": [user("a")]})) == '[{"role": "user", "content": "a"}]'
