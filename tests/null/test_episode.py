"""Episodes that lose their state, wait for each other, or hold the engine up while they answer."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tandem.algo.advantage import samples_from_groups
from tandem.algo.config import AlgoConfig
from tandem.engine.driver import Driver
from tandem.errors import ModelError
from tandem.program.config import TaskConfig
from tandem.program.environment import Fold, Step
from tandem.program.episode import checked_step
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.group import summarise
from tandem.rollout.rollout import Rollouts
from tandem.types import Completion, Failure, Message, Request, StopReason, ToolCall, Trajectory
from tests.null.test_rollout import DOCS, FakeEngine, Letters, spell
from tests.samples import column, trained

USER = """
import time
from pathlib import Path
from tandem.program.environment import Environment, Episode, Fold
from tandem.types import Message, Prompt

class Counter(Episode):
    def __init__(self, prompt, folder):
        self.prompt, self.folder, self.seen = prompt, folder, 0

    def observe(self, turns):
        self.seen += 1
        text = turns[-1].content
        if text == "hang":
            time.sleep(60)
        if text == "wait":
            (self.folder / "waits").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.005)
        if text == "fold":
            return Fold([Message("user", f"seen {self.seen}")])
        return None if self.seen == 3 else [Message("tool", f"n{self.seen}")]

    def score(self, turns):
        return 10.0 * self.seen + sum(turn.role == "assistant" for turn in turns)

    def teardown(self):
        with (self.folder / "closed").open("a") as file:
            file.write(self.prompt.id + "\\n")

class Counts(Environment):
    def __init__(self, folder):
        self.folder = Path(folder)

    def prompt(self, split, index):
        return Prompt(f"{split}{index}", (Message("user", f"{split}{index}"),), {})

    def episode(self, prompt):
        return Counter(prompt, self.folder)
"""


@pytest.fixture
def pool(tmp_path: Path, request: pytest.FixtureRequest):
    (tmp_path / "counts.py").write_text(USER)
    workers = getattr(request, "param", 2)
    task = TaskConfig(
        f"{tmp_path}/counts.py:Counts", parameters=(("folder", str(tmp_path)),), heldout_size=0, workers=workers
    )
    made = EnvironmentPool(dataclasses.replace(task, reward_deadline_s=20.0))
    yield made
    made.close()


CONFIG = RolloutConfig(samples_per_prompt=3, max_turns=8, max_new_tokens=8, deadline_s=60.0)


def run(engine: FakeEngine, pool: EnvironmentPool, threaded: bool = False) -> list[list[Trajectory]]:
    driver = Driver(engine).start() if threaded else Driver(engine)
    groups = Rollouts(driver, Renderer(Letters()), pool, CONFIG, run_seed=1).collect(0, pool.batch(0, 2))
    driver.close(10.0)
    return [list(group.trajectories) for group in groups]


@pytest.mark.parametrize("pool", [1, 3], indirect=True)
def test_state_lives_in_one_child(pool: EnvironmentPool, tmp_path: Path) -> None:
    """An episode forgets what it held between calls, is asked in another process, or is never closed."""
    groups = run(FakeEngine(lambda request: spell("a")), pool)
    assert [[t.reward for t in group] for group in groups] == [[33.0] * 3] * 2
    text = Letters().decode(column(groups[0][0], "tokens")).replace("\0", "")
    assert text == "<u>train0\n<a>a\n<u>n1\n<a>a\n<u>n2\n<a>a"
    pool.close()
    assert sorted((tmp_path / "closed").read_text().split()) == ["Counts/train/0"] * 3 + ["Counts/train/1"] * 3


@pytest.mark.parametrize("threaded", [False, True])
def test_the_engine_never_waits_for_a_tool(pool: EnvironmentPool, tmp_path: Path, threaded: bool) -> None:
    """The engine stands still while a tool runs: this one ends only when the other programs have gone on without it."""
    slow = "Counts/train/0/0/0"

    class Engine(FakeEngine):
        def completion(self, request: Request, tokens: list[int], reason: StopReason | None = None) -> Completion:
            if request.program_id != slow and request.id.endswith("/2") and (tmp_path / "waits").exists():
                (tmp_path / "go").touch()  # another's third turn, sampled while the tool waits
            return super().completion(request, tokens, reason)

    def ticks(request: Request) -> int:
        return 1

    def speak(request: Request) -> list[int]:
        return spell("wait" if request.id == f"{slow}/0" else "a")

    groups = run(Engine(speak, ticks), pool, threaded)
    assert [t.failure for group in groups for t in group] == [None] * 6
    assert (tmp_path / "go").exists() and groups[0][0].reward == 33.0


@pytest.mark.parametrize("pool", [1], indirect=True)
def test_an_overrun_takes_only_its_own_child(pool: EnvironmentPool) -> None:
    """A tool that hangs ends the step, or leaves an episode whose state went with it to go on as if nothing were."""
    pool.config = dataclasses.replace(pool.config, reward_deadline_s=0.5)
    pool._workers.config, pool._workers._waiting.deadline_s = pool.config, 0.5
    stuck, beside, after = (pool.episode(prompt, 1e12) for prompt in pool.batch(0, 3))
    beside.said.append(Message("assistant", "a", sampled=True))
    assert beside.observe().result(30).messages == (Message("tool", "n1"),)
    stuck.said.append(Message("assistant", "hang", sampled=True))
    found = stuck.observe().result(30)
    assert found == Failure("deadline", "environment took longer than 0.5 s (task.reward_deadline_s)")
    beside.said.append(Message("assistant", "a", sampled=True))
    assert beside.observe().result(30) == Failure("environment", f"its process ended with it: {found.reason}")
    after.said.append(Message("assistant", "a", sampled=True))
    assert after.score().result(30) == 1.0


def test_a_context_that_starts_anew_is_a_sample_more(pool: EnvironmentPool) -> None:
    """A folded program loses its first context, is credited twice in its group's mean, or one of its samples takes the
    other's place."""
    engine = FakeEngine(lambda request: spell("fold" if request.id == "Counts/train/0/0/1/1" else "a"))
    first, second = Rollouts(Driver(engine), Renderer(Letters()), pool, CONFIG, run_seed=1).collect(0, pool.batch(0, 2))
    ids = [t.id for t in first.trajectories]
    assert ids == ["Counts/train/0/0/0/0", "Counts/train/0/0/1/0", "Counts/train/0/0/1/1", "Counts/train/0/0/2/0"]
    assert [len(program) for program in first.programs] == [1, 2, 1]
    told = [Letters().decode(column(t, "tokens")).replace("\0", "") for t in first.trajectories]
    assert told[1:3] == ["<u>train0\n<a>a\n<u>n1\n<a>fold", "<u>seen 2\n<a>a"]
    seeds = [r.seed for r in engine.seen if r.program_id == "Counts/train/0/0/1"]
    assert seeds[0] == seeds[1] != seeds[2]
    changed = [dataclasses.replace(t, reward=float("/1/" in t.id[-4:])) for t in first.trajectories]
    batch = samples_from_groups(
        AlgoConfig(advantage="dr_grpo"), [dataclasses.replace(first, trajectories=tuple(changed))]
    )
    assert [sample.id for sample in batch.samples] == ids
    credit = [column(sample, "advantages")[trained(sample)[0]] for sample in batch.samples]
    assert credit == pytest.approx([-1 / 3, 2 / 3, 2 / 3, -1 / 3])
    assert summarise([first]).trajectories == 3


def test_groups_come_as_they_end(pool: EnvironmentPool) -> None:
    """Groups wait for the slowest, come out of their order in a step, or go on in the engine when nobody wants them."""
    ticks = {"Counts/train/0/0": 9, "Counts/train/1/0": 1, "Counts/train/2/0": 10**9}
    engine = FakeEngine(lambda request: spell("a"), lambda request: ticks[request.group])
    config = dataclasses.replace(CONFIG, max_turns=1)
    groups = Rollouts(Driver(engine), Renderer(Letters()), pool, config, run_seed=1).run(0, pool.batch(0, 3))
    assert [next(groups).prompt.id, next(groups).prompt.id] == ["Counts/train/1", "Counts/train/0"]
    assert len(engine.live) == 3
    groups.close()
    assert not engine.live


def test_documented_episode(tmp_path: Path) -> None:
    """The environment with tools that users copy from the page does not run, or its tools do not reach the
    template."""
    (tmp_path / "ledger_task.py").write_text(re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])
    pool = EnvironmentPool(TaskConfig(f"{tmp_path}/ledger_task.py:Spend", heldout_size=2))

    class Told(Letters):
        def render_messages(self, messages, add_generation_prompt, /, *, tools=()):
            named = "".join(tool["function"]["name"] for tool in tools)
            return [*map(ord, named), *super().render_messages(messages, add_generation_prompt)]

    three, two = (f"```python\npay(amount={amount})\n```" for amount in (3, 2))
    answers = {"0": three, "1": two}
    engine = FakeEngine(lambda request: spell(answers.get(request.id[-1], "done")))
    (group, other) = Rollouts(Driver(engine), Renderer(Told()), pool, CONFIG, run_seed=1).collect(0, pool.batch(0, 2))
    assert [t.reward for t in group.trajectories] == [1.0] * 3 and {t.reward for t in other.trajectories} == {0.0}
    told = Letters().decode(column(group.trajectories[0], "tokens")).replace("\0", "")
    assert told == f"pay<u>Spend 5.\n<a>{three}\n<u>2 left\n<a>{two}\n<u>0 left\n<a>done"
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), pool, CONFIG, run_seed=1).collect(0, pool.batch(0, 1))
    told = Letters().decode(column(group.trajectories[0], "tokens"))
    assert told.startswith("<u>You can call these functions:\n\ndef pay(amount: int):") and "<u>Spend 5." in told
    pool.close()


class Watched(Renderer):
    """Refuses "n2" after an answer of "odd", as a template does that does not know a role; keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(Letters())
        self.told: list[tuple[list[str], list[str]]] = []

    def observation_tokens(self, completion, messages, before=None, tools=()):
        self.told.append(([message.content for message in before], [message.content for message in messages]))
        if messages[0].content == "n2" and before[-1].content == "n1" and "odd" in before[1].content:
            raise ModelError("the chat template knows no such role")
        return super().observation_tokens(completion, messages, before, tools)


def test_an_observation_that_the_template_refuses_ends_its_own_program(pool: EnvironmentPool) -> None:
    """What one environment says to one program ends the whole run, and the trajectories of the others are lost."""
    odd = "Counts/train/0/0/1"
    engine = FakeEngine(lambda request: spell("odd" if request.id == f"{odd}/0" else "a"))
    first, second = Rollouts(Driver(engine), Watched(), pool, CONFIG, run_seed=1).collect(0, pool.batch(0, 2))
    found = {t.program_id: t.failure for t in (*first.trajectories, *second.trajectories)}
    assert found.pop(odd) == Failure("environment", "the chat template knows no such role")
    assert len(found) == 5 and set(found.values()) == {None} and not engine.live


def test_what_follows_a_fold_is_rendered_after_it(pool: EnvironmentPool) -> None:
    """After a context started anew, observations are rendered as if nothing had been said, or after what was folded."""
    engine = FakeEngine(lambda request: spell("fold" if request.id == "Counts/train/0/0/0/0" else "a"))
    watched = Watched()
    Rollouts(Driver(engine), watched, pool, CONFIG, run_seed=1).collect(0, pool.batch(0, 1))
    assert (["seen 1"], ["n2"]) in watched.told and (["train0", "a", "n1"], ["n2"]) in watched.told
    assert [told for told in watched.told if told[0][0] == "seen 1"] == [(["seen 1"], ["n2"])]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([Message(None, "x")], "has role None; text is needed"),
        ([Message("user", 5)], "has content 5; text is needed"),
        ([Message("ipython", "4")], "has role 'ipython'. Allowed: system, developer, user, assistant, tool"),
        ([Message("tool", "4", call_id=7)], "has call_id 7"),
        ([Message("assistant", "", calls=("add",))], "a tuple of tandem.types.ToolCall is needed"),
        ([Message("user", "x", more={"content": "y"})], "has 'content' among its further keys"),
        ([Message("user", "x", more={1: "y"})], "a dict with texts as keys"),
        ([Message("user", "x", more={"tags": {1}})], "has in its further keys what JSON has not: Object of type set"),
        ([Message("assistant", "", calls=(ToolCall("f", {"a": object}),))], "has in its call of f what JSON has not"),
        (Step([Message("user", "x")], state="\ud800"), "the state of a Step holds \\ud800"),
        (Fold((Message("user", "\udfff"),)), "udfff"),
        ([Message("user", "x")] * 1001, "1,001 messages; allowed are 1000"),
        ([Message("user", "x" * (1 << 20)), Message("user", "y")], "1,048,577 characters; allowed are 1,048,576"),
    ],
)
def test_messages_that_no_template_takes_are_named(value: object, says: str) -> None:
    """A message of the wrong make reaches the template, which raises far from who wrote it, or lets it overwrite."""
    with pytest.raises(ValueError, match=re.escape(says)):
        checked_step(value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("more", "observe returned 'more'; a list of tandem.types.Message or None is needed. Write [Message("),
        (Fold("more"), "observe returned 'more'; a list of"),
        (Step("more"), "observe returned 'more'; a list of"),
        (7, "observe returned 7; a list of tandem.types.Message or None is needed"),
        (True, "observe returned True; a list of"),
        ({"role": "user"}, "observe returned {'role': 'user'}; a list of"),
        ([{"role": "user", "content": "x"}], "observe returned ({'role': 'user', 'content': 'x'},); a list of"),
    ],
)
def test_what_is_no_messages_is_named_as_it_was_returned(value: object, says: str) -> None:
    """A text that comes back in letters, a number that is "not iterable": nothing that says what to return."""
    with pytest.raises(TypeError, match=re.escape(says)):
        checked_step(value)
