"""Rollouts that lose a program, mix two up, never end, or depend on what runs beside them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.engine.driver import Driver
from tandem.errors import CapacityError, ConfigError
from tandem.program.config import TaskConfig
from tandem.program.episode import Observed
from tandem.program.pool import EnvironmentPool
from tandem.program.render import Renderer
from tandem.rollout import rollout
from tandem.rollout.config import RolloutConfig
from tandem.rollout.evaluate import evaluate
from tandem.rollout.rollout import Rollouts
from tandem.rollout.waits import Waits
from tandem.trace import Totals, Trace
from tandem.types import Completion, Failure, Message, Prompt, Request, StopReason
from tests.samples import column, ended, trained

STOP, USER, ANSWER, END = 0, 1, 2, 3  # what the chat template of Letters writes around contents
NAMES = {STOP: "", USER: "<u>", ANSWER: "<a>", END: "\n"}
DOCS = Path(__file__).parents[2] / "docs" / "write_an_environment.md"


class Letters:
    """One token a letter. <u>content\\n for who asks, <a>content STOP\\n for who answers."""

    stop_token_ids = (STOP,)

    def decode(self, tokens: Sequence[int], /) -> str:
        return "".join(NAMES.get(token) or chr(token) for token in tokens)

    def spelt(self, messages, /) -> int:
        return 0

    def render_messages(self, messages, add_generation_prompt, /, *, tools=()) -> list[int]:
        tokens: list[int] = []
        for message in messages:
            said = message.role == "assistant"
            tokens += [ANSWER if said else USER, *map(ord, message.content), *([STOP] if said else []), END]
        return [*tokens, ANSWER] if add_generation_prompt else tokens


class FakeEngine:
    """Answers by `speak(request) -> tokens`, `ticks(request)` steps after its submission."""

    def __init__(
        self,
        speak: Callable[[Request], list[int]],
        ticks: Callable[[Request], int] = lambda request: 1,
        capacity: int = 10_000,
    ) -> None:
        self.speak, self.ticks, self.capacity = speak, ticks, capacity
        self.live: dict[str, tuple[Request, int]] = {}
        self.seen: list[Request] = []
        self.finished: set[tuple[str, str]] = set()
        self.now = 0

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def check(self, request: Request, /) -> None:
        if len(request.tokens) > self.capacity:
            raise CapacityError(
                f"request {request.id} needs {len(request.tokens)} tokens; raise engine.kv_memory_bytes"
            )

    def drawn(self, request_id: str, first: int, /) -> Columns:
        return Columns({})

    def submit(self, request: Request, /) -> None:
        assert request.id not in self.live
        self.live[request.id] = (request, self.now + self.ticks(request))
        self.seen.append(request)

    def loads(self) -> dict[str, float]:
        return {}

    def promise(self, terms: object, /) -> None: ...

    def finish_program(self, program_id: str, tenant: str = "", /) -> None:
        self.finished.add((tenant, program_id))

    def on_restoring(self, told, /) -> None:
        """Pauses none."""

    def abort(self, request_id: str, /) -> Completion | None:
        if request_id not in self.live:
            return None
        request, _ = self.live.pop(request_id)
        return self.completion(request, self.speak(request)[:1], StopReason.ABORTED)

    def step(self) -> list[Completion]:
        self.now += 1
        done = [request for request, due in self.live.values() if due <= self.now]
        for request in done:
            del self.live[request.id]
        return [self.completion(request, self.speak(request)) for request in done]

    def completion(self, request: Request, tokens: list[int], reason: StopReason | None = None) -> Completion:
        ended = StopReason.STOP_TOKEN if tokens[-1:] == [STOP] else StopReason.LENGTH
        columns = Columns.of(tokens=tokens, logprobs=(-0.5,) * len(tokens), versions=(5,) * len(tokens))
        return Completion(request.id, columns, reason or ended)


class Counted:
    """An episode of Counting."""

    def __init__(self, by: Counting) -> None:
        self.by = by
        self.said: list[Message] = []
        self.counts: dict[str, int] = {}

    def score(self, unheard=0):
        text = self.said[len(self.said) - 1 - unheard].content
        return ended(Failure("reward", "returned nan") if "x" in text else float(len(text)))

    def recall(self, said, counts, earned, /):
        self.said.extend(said)

    def observe(self, last=False):
        if "y" in self.said[-1].content:
            return ended(Failure("environment", "raised"))
        if len(self.said) >= 2 * self.by.more:
            return ended(Observed(None))
        if not last:
            self.said.append(Message("user", "go"))
        return ended(Observed((Message("user", "go"),)))

    def teardown(self) -> None:
        self.by.closed += 1


class Counting:
    """Pays the length of the last answer; asks `more` times for more."""

    def __init__(self, more: int = 0) -> None:
        self.more = more
        self.closed = 0

    def episode(self, prompt, until_s, /):
        return Counted(self)


def spell(text: str) -> list[int]:
    return [*map(ord, text), STOP]


def noise(request: Request) -> int:
    text = f"{request.seed} {request.tokens}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest())


def babble(request: Request) -> list[int]:
    """An answer that depends on the seed and the whole context, as sampling does."""
    number = noise(request)
    return spell("abcxy"[number % 5] * (number % 4 + 1))[: 4 if number % 3 else 9]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{n}", (Message("user", f"q{n}"),), {"answer": str(n)}) for n in range(count)]


CONFIG = RolloutConfig(samples_per_prompt=3, max_new_tokens=8)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 5),
    samples=st.integers(1, 4),
    turns=st.integers(1, 3),
    slowness=st.integers(1, 6),
    threaded=st.booleans(),
)
def test_rollouts_equal_each_alone(count: int, samples: int, turns: int, slowness: int, threaded: bool) -> None:
    """A program gets another's tokens, or its result depends on the order in which the engine finishes, or on who
    drives it."""
    config = RolloutConfig(samples_per_prompt=samples, max_turns=turns, max_new_tokens=8)
    engine = FakeEngine(babble, lambda request: noise(request) % slowness + 1)
    driver = Driver(engine).start() if threaded else Driver(engine)
    groups = Rollouts(driver, Renderer(Letters()), Counting(2), config, run_seed=1).collect(7, prompts(count))
    driver.close(30.0)
    assert [group.prompt.id for group in groups] == [f"p{n}" for n in range(count)]
    for prompt, group in zip(prompts(count), groups, strict=True):
        alone = Rollouts(Driver(FakeEngine(babble)), Renderer(Letters()), Counting(2), config, run_seed=1).collect(
            7, [prompt]
        )
        assert alone == [group]
        assert len({t.program_id for t in group.trajectories}) == samples
        for trajectory in group.trajectories:
            logprobs, versions = column(trajectory, "logprobs"), column(trajectory, "versions")
            sampled = trained(trajectory)
            assert sampled and [p for p, value in enumerate(logprobs) if value == -0.5] == sampled
            assert [p for p, version in enumerate(versions) if version == 5] == sampled
    assert not engine.live


def test_single_turn_by_hand() -> None:
    """Prompt, answer, mask, reward or ids of the simplest case are wrong."""
    engine = FakeEngine(lambda request: spell("abc"))
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), Counting(), CONFIG, run_seed=1).collect(2, prompts(1))
    first = group.trajectories[0]
    assert column(first, "tokens") == [USER, ord("q"), ord("0"), END, ANSWER, *spell("abc")]
    assert column(first, "loss_mask") == [False] * 5 + [True] * 4
    assert (first.reward, first.failure, first.stop_reason) == (3.0, None, StopReason.STOP_TOKEN)
    assert [request.id for request in engine.seen] == ["p0/2/0/0", "p0/2/1/0", "p0/2/2/0"]
    assert len({request.seed for request in engine.seen}) == 3
    assert {request.group for request in engine.seen} == {"p0/2"}
    assert engine.seen[0].sampling.stop_token_ids == (STOP,)


def test_rollouts_are_of_the_tenant_that_the_config_names() -> None:
    """Rollouts take the share of requests without a tenant, nobody can weigh them, or what is kept for them stays."""
    engine = FakeEngine(lambda request: spell("ab") if request.id.endswith("/0") else [ord("c")])
    config = replace(CONFIG, max_turns=2, tenant="training/rollouts")
    driver = Driver(engine)
    Rollouts(driver, Renderer(Letters()), Counting(5), config, run_seed=1).collect(2, prompts(1))
    driver.progress(-1, 0.0)  # what the last of them said is heard with the next step
    assert {request.tenant for request in engine.seen} == {"training/rollouts"} and len(engine.seen) > 3
    assert engine.finished == {(request.tenant, request.program_id) for request in engine.seen}


def test_turns_keep_tokens() -> None:
    """A second turn's request does not begin with what the first one saw and said, or observations are trained on."""
    engine = FakeEngine(lambda request: spell("ab") if request.id.endswith("/0") else [ord("c")])
    config = replace(CONFIG, samples_per_prompt=1, max_turns=3)
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), Counting(5), config, run_seed=1).collect(2, prompts(1))
    (trajectory,) = group.trajectories
    first, second, third = engine.seen
    go = (END, USER, ord("g"), ord("o"), END, ANSWER)
    assert second.tokens == (*first.tokens, *spell("ab"), *go)
    assert third.tokens == (*second.tokens, ord("c"), STOP, *go)
    assert first.seed == second.seed == third.seed and third.program_id == "p0/2/0"
    assert column(trajectory, "tokens") == [*third.tokens, ord("c")]
    sampled = [column(trajectory, "tokens")[position] for position in trained(trajectory)]
    assert sampled == [*spell("ab"), ord("c"), ord("c")]
    assert trajectory.reward == 1.0


def test_failures_stay_with_their_program() -> None:
    """A bad reward or observation fails its siblings, or its own tokens are lost."""
    words = {0: "ab", 1: "xx", 2: "yy"}
    engine = FakeEngine(lambda request: spell(words[int(request.id.split("/")[2])]))
    config = replace(CONFIG, max_turns=2)
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), Counting(0), config, run_seed=1).collect(0, prompts(1))
    good, bad_reward, bad_observation = group.trajectories
    assert good.failure is None and good.reward == 2.0
    assert bad_reward.failure == Failure("reward", "returned nan") and bad_reward.num_sampled == 3
    assert bad_observation.failure == Failure("environment", "raised") and bad_observation.num_sampled == 3


def test_a_draw_that_fails_is_its_programs_failure() -> None:
    """A request that the engine gave up is graded as an answer, asked to go on, or ends its siblings."""

    class Failing(FakeEngine):
        def completion(self, request: Request, tokens: list[int], reason: StopReason | None = None) -> Completion:
            done = super().completion(request, tokens, reason)
            broken = "/1/" in request.id
            return replace(done, stop_reason=StopReason.FAILED, failure="3 NaN") if broken else done

    engine = Failing(lambda request: spell("ab"))
    config = replace(CONFIG, max_turns=2)
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), Counting(5), config, run_seed=1).collect(0, prompts(1))
    first, failed, third = group.trajectories
    assert (first.failure, third.failure) == (None, None) and [r.id for r in engine.seen].count("p0/0/1/1") == 0
    assert failed.failure == Failure("engine", "3 NaN") and failed.num_sampled == 3


def test_deadline_withdraws_the_rest() -> None:
    """A request that never ends holds the step for ever, or stays in the engine after it."""
    engine = FakeEngine(lambda request: spell("ab"), lambda request: 1 if request.id.startswith("p0") else 10**9)
    config = replace(CONFIG, deadline_s=50.0)
    clock = iter(range(10**6))
    rollouts = Rollouts(
        Driver(engine), Renderer(Letters()), Counting(), config, run_seed=1, clock=lambda: float(next(clock))
    )
    first, second = rollouts.collect(0, prompts(2))
    assert [t.reward for t in first.trajectories] == [2.0] * 3
    for trajectory in second.trajectories:
        assert trajectory.failure == Failure("deadline", "generation took longer than 50 s (rollout.deadline_s)")
        assert trajectory.num_sampled == 1 and trajectory.stop_reason is StopReason.ABORTED
    assert not engine.live


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), samples=st.integers(1, 5), turns=st.integers(1, 3), ahead=st.integers(1, 12))
def test_programs_are_made_as_they_start(count: int, samples: int, turns: int, ahead: int) -> None:
    """All programs and requests of a step exist at once; or one that waited gets other tokens, or another's place."""
    config = RolloutConfig(samples_per_prompt=samples, max_turns=turns, max_new_tokens=8)
    wanted = Rollouts(Driver(FakeEngine(babble)), Renderer(Letters()), Counting(2), config, run_seed=1).collect(
        7, prompts(count)
    )
    engine = FakeEngine(babble, lambda request: noise(request) % 4 + 1)
    submit, most = engine.submit, []

    def counted(request: Request, /) -> None:
        submit(request)
        most.append(len(engine.live))

    engine.submit = counted  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "AHEAD", ahead)
        assert (
            Rollouts(Driver(engine), Renderer(Letters()), Counting(2), config, run_seed=1).collect(7, prompts(count))
            == wanted
        )
    assert max(most) <= ahead
    first = [request.id for request in engine.seen if request.id.endswith("/0")]
    assert first == [f"p{n}/7/{s}/0" for n in range(count) for s in range(samples)]  # siblings together, in order


def test_deadline_before_a_program_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that the deadline finds unstarted are missing from their groups, or are started after it."""
    monkeypatch.setattr(rollout, "AHEAD", 4)
    engine = FakeEngine(lambda request: spell("ab"), lambda request: 10**9)
    config = replace(CONFIG, deadline_s=50.0)
    clock = iter(range(10**6))
    rollouts = Rollouts(
        Driver(engine), Renderer(Letters()), Counting(), config, run_seed=1, clock=lambda: float(next(clock))
    )
    groups = rollouts.collect(0, prompts(5))
    assert [len(group.trajectories) for group in groups] == [3] * 5 and len(engine.seen) == 4 and not engine.live
    for place, trajectory in enumerate(t for group in groups for t in group.trajectories):
        assert trajectory.failure is not None and "rollout.deadline_s" in trajectory.failure.reason
        assert trajectory.num_sampled == (1 if place < 4 else 0)


def test_capacity() -> None:
    """A prompt that does not fit leaves its siblings in the engine; one that outgrows it stops the run, or escapes."""
    engine = FakeEngine(lambda request: spell("abc"), capacity=5)
    long = Prompt("long", (Message("user", "much too long"),))
    with pytest.raises(CapacityError, match="engine.kv_memory_bytes"):
        Rollouts(Driver(engine), Renderer(Letters()), Counting(), CONFIG, run_seed=1).collect(0, [*prompts(1), long])
    assert not engine.live
    config = replace(CONFIG, max_turns=2)
    (group,) = Rollouts(Driver(engine), Renderer(Letters()), Counting(9), config, run_seed=1).collect(0, prompts(1))
    first = group.trajectories[0]
    assert first.failure is None and first.counts == {"observations": 1, "context_limit": 1}
    assert first.reward == 3.0  # of what the model said, not of the "go" that it could not read
    assert column(group.trajectories[0], "loss_mask")[5:9] == [True] * 4


def test_an_evaluation_of_unfit_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A held-out prompt that does not fit ends the evaluation; where none fits, it waits for its deadline."""
    engine = FakeEngine(lambda request: spell("abc"), capacity=5)
    long = [Prompt(f"long{n}", (Message("user", "much too long"),)) for n in range(2)]
    ask = (Driver(engine), Renderer(Letters()), Counting())
    found, (fits, *others) = evaluate(*ask, [*prompts(1), *long], CONFIG)
    assert (found.prompts, found.failed) == (1, 2) and fits.trajectories[0].failure is None
    assert [group.trajectories[0].failure.where for group in others] == ["prompt", "prompt"]
    assert "engine.kv_memory_bytes" in found.failures[0] and not engine.live

    def waits(self: object, wait_s: float) -> None:
        raise AssertionError(f"waits {wait_s} s for nothing")

    monkeypatch.setattr(Waits, "_wait", waits)
    assert evaluate(*ask, long, CONFIG)[0].failed == 2


def test_lost_request_is_noticed() -> None:
    """An engine that loses a request makes the step wait for nothing."""
    engine = FakeEngine(lambda request: spell("a"))
    engine.step = lambda: engine.live.clear() or []  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(AssertionError, match="no work, but 3 requests have not come back"):
        Rollouts(Driver(engine), Renderer(Letters()), Counting(), CONFIG, run_seed=1).collect(0, prompts(1))


def test_seconds_are_told_apart() -> None:
    """Time in rewards is counted as generation."""
    totals = Totals()
    ticks = iter(range(10**6))
    trace = Trace([totals], clock=lambda: float(next(ticks)))
    engine = FakeEngine(lambda request: spell("a"))
    config = replace(CONFIG, max_turns=2)
    Rollouts(Driver(engine), Renderer(Letters()), Counting(1), config, run_seed=1, trace=trace).collect(0, prompts(1))
    assert totals.seconds == {"reward": 3.0, "rollout": 4.0}  # a reward each; nobody waited for what was observed


def test_evaluation_by_hand() -> None:
    """Evaluation samples, counts failures as wrong or as right, or takes several samples a prompt."""
    words = {"p0": "a", "p1": "", "p2": "ab", "p3": "x"}
    engine = FakeEngine(lambda request: spell(words[request.program_id.split("/")[0]]))
    config = RolloutConfig(temperature=0.7, top_p=0.9, samples_per_prompt=8)
    result, groups = evaluate(Driver(engine), Renderer(Letters()), Counting(), prompts(4), config, step=3)
    assert (result.prompts, result.failed, result.accuracy) == (3, 1, pytest.approx(2 / 3))
    assert (result.reward, result.length) == (1.0, 2.0) and len(groups) == 4
    assert 0.2 < result.low < 2 / 3 < result.high < 0.95
    assert all(request.sampling.greedy and request.sampling.top_p == 1.0 for request in engine.seen)
    failing = FakeEngine(lambda request: spell("x"))
    nothing, _ = evaluate(Driver(failing), Renderer(Letters()), Counting(), prompts(2), config)
    assert (nothing.prompts, nothing.failed, nothing.low, nothing.high) == (0, 2, 0.0, 1.0)


def test_documented_environment(tmp_path: Path) -> None:
    """The example that users copy from docs/write_an_environment.md does not run, or is longer than 20 lines."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "reverse.py").write_text(code)
    task = EnvironmentPool(TaskConfig(f"{tmp_path}/reverse.py:Reverse", parameters=(("length", 3),), heldout_size=4))

    def speak(request: Request) -> list[int]:
        """Wrong at first; after the hint right where the seed is even."""
        word = re.findall(r"Write (\w+) backwards", Letters().decode(request.tokens))[0]
        return spell(word[::-1] if request.id.endswith("/1") and request.seed % 2 == 0 else "no")

    config = RolloutConfig(samples_per_prompt=6, max_turns=2)
    engine = FakeEngine(speak)
    groups = Rollouts(Driver(engine), Renderer(Letters()), task, config, run_seed=0).collect(0, task.batch(0, 2))
    outcomes = {t.program_id: (t.reward, t.failure) for group in groups for t in group.trajectories}
    assert outcomes == {r.program_id: (float(r.seed % 2 == 0), None) for r in engine.seen}
    assert len(engine.seen) == 24 and len(set(outcomes.values())) == 2
    result, _ = evaluate(Driver(engine), Renderer(Letters()), task, task.heldout, replace(config, max_turns=1))
    assert (result.prompts, result.accuracy) == (4, 0.0)
    task.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"prompts_per_step": 0},
        {"samples_per_prompt": 0},
        {"max_new_tokens": 0},
        {"max_turns": 0},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"stop_strings": ("a", "")},
        {"deadline_s": 0.0},
    ],
)
def test_config_refuses(fields: dict[str, object]) -> None:
    """A setting that cannot work is found only in the middle of a run."""
    with pytest.raises(ConfigError, match=f"rollout.{next(iter(fields))}"):
        RolloutConfig(**fields)  # type: ignore[arg-type]


def test_no_torch() -> None:
    """Tasks and rollouts come to load torch, and every worker process with them."""
    code = "import sys, tandem.program.worker, tandem.rollout.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]).returncode == 0
