"""Programs that go on over updates: their tokens, the versions that drew them, and what is left behind."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.engine.driver import Driver
from tandem.errors import CapacityError, KernelError
from tandem.program.render import Renderer
from tandem.rollout.config import RolloutConfig
from tandem.rollout.flow import Ended, Flow
from tandem.rollout.program import Paused
from tandem.rollout.rollout import Rollouts
from tandem.run.journal import packed, unpacked
from tandem.types import Completion, Message, Prompt, Request, StopReason, ToolCall
from tests.null.test_rollout import STOP, Counting, Letters, prompts

LETTERS = "abcdefgh"


class Typing:
    """Draws a token a step for each live request, by its seed and whole context; says which version drew each."""

    def __init__(self, capacity: int = 10_000) -> None:
        self.live: dict[str, tuple[Request, list[int], list[int]]] = {}
        self.version = 0
        self.capacity = capacity
        self.seen: list[str] = []
        self.ran: dict[str, list[int]] = {}  # program -> the longest context that was run for it
        self.told = True  # whether each request said how much of it was

    @property
    def has_work(self) -> bool:
        return bool(self.live)

    def check(self, request: Request, /) -> None:
        if len(request.tokens) + request.sampling.max_new_tokens > self.capacity:
            raise CapacityError(f"{request.id} does not fit")

    def submit(self, request: Request, /) -> None:
        assert request.id not in self.live and request.sampling.max_new_tokens > 0
        ran = self.ran.setdefault(request.program_id, [])
        same = next((place for place, (a, b) in enumerate(zip(ran, request.tokens, strict=False)) if a != b), len(ran))
        assert request.ran <= same, f"{request.id}: {same} tokens were run, not {request.ran}"
        self.told = self.told and request.ran == same
        self.live[request.id] = request, [], []
        self.seen.append(request.id)

    def drawn(self, request_id: str, first: int, /) -> Columns:
        _, tokens, versions = self.live[request_id]
        return Columns.of(tokens=tokens[first:], versions=versions[first:])

    def _ended(self, request_id: str, reason: StopReason) -> Completion:
        request, tokens, versions = self.live.pop(request_id)
        if tokens:
            self.ran[request.program_id] = [*request.tokens, *tokens[:-1]]
        columns = Columns.of(tokens=tokens, versions=versions, logprobs=[-0.5] * len(tokens))
        return Completion(request_id, columns, reason)

    def loads(self) -> dict[str, float]:
        return {}

    def promise(self, terms: object, /) -> None: ...

    def finish_program(self, program_id: str, tenant: str = "", /) -> None:
        """Keeps nothing for programs."""

    def on_restoring(self, told, /) -> None:
        """Pauses none."""

    def abort(self, request_id: str, /) -> Completion | None:
        return self._ended(request_id, StopReason.ABORTED) if request_id in self.live else None

    def step(self) -> list[Completion]:
        done = []
        for request_id, (request, tokens, versions) in list(self.live.items()):
            number = hash((request.seed, *request.tokens, *tokens))
            tokens.append(STOP if number % 6 == 0 else ord(LETTERS[number % 8]))
            versions.append(self.version)
            if tokens[-1] == STOP:
                done.append(self._ended(request_id, StopReason.STOP_TOKEN))
            elif len(tokens) == request.sampling.max_new_tokens:
                done.append(self._ended(request_id, StopReason.LENGTH))
        return done


def through(flow: Flow, engine: Typing, count: int, random: Random) -> list[Ended]:
    """All groups, begun a few at a time, the version changed at drawn moments."""
    waiting, groups = prompts(count), list[Ended]()
    while waiting or len(flow):
        if waiting and (not len(flow) or random.random() < 0.3):
            flow.begin(3, waiting.pop(0))
        if random.random() < 0.3:
            with flow.held():
                assert not engine.live
                engine.version += 1
                if waiting and random.random() < 0.3:
                    flow.begin(3, waiting.pop(0))
        groups += flow.advance(0.0)
    return groups


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 6),
    samples=st.integers(1, 3),
    turns=st.integers(1, 3),
    most=st.sampled_from([0, 7]),
    capacity=st.sampled_from([60, 10_000]),
    seed=st.integers(0, 10**6),
)
def test_updates_change_nothing_but_the_versions(
    count: int, samples: int, turns: int, most: int, capacity: int, seed: int
) -> None:
    """A turn that loses or repeats tokens at an update, gets more of them than its limit, or tells no version apart."""
    config = RolloutConfig(samples_per_prompt=samples, max_turns=turns, max_new_tokens=9, max_program_tokens=most)
    made: list[Any] = []
    for _ in range(2):
        engine = Typing(capacity)
        made.append((engine, Rollouts(Driver(engine), Renderer(Letters()), Counting(2), config, run_seed=seed)))  # type: ignore[arg-type]
    (_, plain), (engine, updated) = made
    alone = {group.prompt.id: group for group in plain.collect(3, prompts(count))}
    flow = Flow(updated)
    groups = [ended.group for ended in through(flow, engine, count, Random(seed))]
    assert engine.told
    assert not engine.live and sorted(alone) == sorted(group.prompt.id for group in groups)
    assert updated.environments.closed == plain.environments.closed == count * samples  # type: ignore[attr-defined]
    changed = 0
    for group in groups:
        wanted = alone[group.prompt.id].trajectories
        assert len(wanted) == len(group.trajectories)
        for found, one in zip(group.trajectories, wanted, strict=True):
            columns, plainly = found.columns, one.columns
            assert columns["tokens"].tolist() == plainly["tokens"].tolist()
            assert columns["loss_mask"].tolist() == plainly["loss_mask"].tolist()
            assert (found.reward, found.stop_reason, found.failure) == (one.reward, one.stop_reason, one.failure)
            assert (found.counts, found.said) == (one.counts, one.said)
            versions = columns["versions"][columns["loss_mask"]].tolist()
            assert versions == sorted(versions)
            changed += len(set(versions)) > 1
    assert changed or engine.version < 12


def test_at_the_deadline_a_program_fails_alone() -> None:
    """A program that never ends keeps its group open for ever, or fails those that began later."""
    now = [0.0]
    engine = Typing()
    config = RolloutConfig(samples_per_prompt=2, max_new_tokens=1_000, deadline_s=10.0)
    flow = Flow(Rollouts(Driver(engine), Renderer(Letters()), Counting(), config, run_seed=0, clock=lambda: now[0]))  # type: ignore[arg-type]
    times = [8.0, 10.0, 10.0]

    def step() -> list[Completion]:
        now[0] = times.pop(0)
        return []

    engine.step = step  # type: ignore[method-assign]
    first, second = prompts(2)
    flow.begin(1, first)
    assert flow.advance(0.0) == []
    flow.begin(1, second)
    assert flow.advance(0.0) == []
    (group,) = [ended.group for ended in flow.advance(0.0)]
    assert group.prompt.id == "p0"
    assert {t.failure.where for t in group.trajectories if t.failure} == {"deadline"}
    assert len(flow) == 1 and flow.advance(0.0) == [] and len(engine.live) == 2
    flow.withdraw()
    assert not engine.live and not len(flow)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 4), turns=st.integers(1, 3), after=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_paused_it_goes_on_elsewhere(count: int, turns: int, after: int, seed: int) -> None:
    """What is kept of a program lacks a token, a turn, a message, or what it waits for: elsewhere it draws others."""
    config = RolloutConfig(samples_per_prompt=2, max_turns=turns, max_new_tokens=9)

    def rollouts() -> Rollouts:
        return Rollouts(Driver(Typing()), Renderer(Letters()), Counting(2), config, run_seed=seed)  # type: ignore[arg-type]

    alone = {group.prompt.id: group for group in rollouts().collect(3, prompts(count))}
    here, there = rollouts(), rollouts()
    there.driver.engine.ran = here.driver.engine.ran  # type: ignore[attr-defined]
    flow, found = Flow(here), list[Ended]()
    for prompt in prompts(count):
        flow.begin(3, prompt)
    for _ in range(after):
        found += flow.advance(0.0)
    flow.turns.hold()
    found += flow.ended()
    content, other = packed(flow.pause()), Flow(there)
    other.resume(unpacked(content, list[tuple[str, list[Paused]]]))
    while len(other):
        found += other.advance(0.0)
    assert sorted(ended.group.prompt.id for ended in found) == sorted(alone)
    for ended in found:
        for one, plain in zip(ended.group.trajectories, alone[ended.group.prompt.id].trajectories, strict=True):
            assert one.columns["tokens"].tolist() == plain.columns["tokens"].tolist()
            assert (one.reward, one.stop_reason, one.said) == (plain.reward, plain.stop_reason, plain.said)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 4), after=st.integers(0, 20), dies=st.booleans(), seed=st.integers(0, 10**6))
def test_of_an_engine_that_fails_what_runs_can_be_kept(count: int, after: int, dies: bool, seed: int) -> None:
    """A failed step of the engine after which no checkpoint is written, or one without an answer that had come."""
    config = RolloutConfig(samples_per_prompt=2, max_turns=3, max_new_tokens=9)

    def rollouts() -> Rollouts:
        return Rollouts(Driver(Typing()), Renderer(Letters()), Counting(2), config, run_seed=seed)  # type: ignore[arg-type]

    def fail() -> list[Completion]:
        raise ZeroDivisionError("died") if dies else KernelError("failed")

    alone = {group.prompt.id: group for group in rollouts().collect(3, prompts(count))}
    here, there = rollouts(), rollouts()
    there.driver.engine.ran = here.driver.engine.ran  # type: ignore[attr-defined]
    flow, found = Flow(here), list[Ended]()
    for prompt in prompts(count):
        flow.begin(3, prompt)
    for _ in range(after):
        found += flow.advance(0.0)
    here.driver.engine.step = fail  # type: ignore[attr-defined]
    failed = False
    while len(flow) and not failed:  # what had come back before may be the last of it
        try:
            found += flow.advance(0.0)
        except (ZeroDivisionError, KernelError):
            failed = True
    flow.turns.hold()
    found += flow.ended()
    other = Flow(there)
    other.resume(unpacked(packed(flow.pause()), list[tuple[str, list[Paused]]]))
    while len(other):
        found += other.advance(0.0)
    assert sorted(ended.group.prompt.id for ended in found) == sorted(alone)
    for ended in found:
        for one, plain in zip(ended.group.trajectories, alone[ended.group.prompt.id].trajectories, strict=True):
            assert one.columns["tokens"].tolist() == plain.columns["tokens"].tolist()
            assert (one.reward, one.stop_reason, one.said) == (plain.reward, plain.stop_reason, plain.said)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False)
    | st.text(st.characters(categories=["L", "Cs", "N"]), max_size=4) | st.floats(0, 1).map(np.float64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(record=st.dictionaries(st.text("ab", max_size=2), JSON, max_size=3))
def test_what_json_can_say_is_kept(record: dict[str, Any]) -> None:
    """A tool called with a number of twenty digits, or a task whose answer is one, that ends the run."""
    call = Message("assistant", "", calls=(ToolCall("add", record),), more=record)
    prompt = Prompt("p", (Message("user", "?"), call), record)
    assert unpacked(packed((prompt, Columns.of(tokens=(1, 2)))), tuple[Prompt, Columns])[0] == prompt


def test_deadlines_do_not_run_while_nothing_is_drawn() -> None:
    """Programs that fail, older than rollout.deadline_s, after an evaluation or a checkpoint of some minutes; or ones
    that never do, or an environment that keeps to the deadline of before."""
    now_s, engine = 100.0, Typing()

    def step() -> list[Completion]:
        nonlocal now_s
        now_s += 4.0
        return []

    engine.step = step  # type: ignore[method-assign]
    config = RolloutConfig(1, 1, max_new_tokens=500, deadline_s=10.0)
    flow = Flow(Rollouts(Driver(engine), Renderer(Letters()), Counting(), config, 3, clock=lambda: now_s))  # type: ignore[arg-type]
    first, second = prompts(2)
    flow.begin(1, first)
    (program,) = flow._until_s
    assert flow.advance(0.0) == []
    now_s += 3600.0
    flow.begin(1, second)
    assert [*flow._until_s.values()] == [3710.0, 3714.0] and program.episode.until_s == 3710.0
    assert flow.advance(0.0) == flow.advance(0.0) == []
    assert now_s == 3712.0 and [ended.group.prompt.id for ended in flow.advance(0.0)] == ["p0"] and len(flow) == 1


def test_deadlines_do_not_run_while_the_engine_waits_for_the_learner() -> None:
    """Programs that fail since a step of the engine waited for a long microbatch on the same cores."""
    now_s, waited_s, engine = 0.0, 0.0, Typing()

    def step() -> list[Completion]:
        nonlocal now_s, waited_s
        now_s, waited_s = now_s + 104.0, waited_s + 100.0
        return []

    engine.step = step  # type: ignore[method-assign]
    config = RolloutConfig(1, 1, max_new_tokens=500, deadline_s=10.0)
    by = Rollouts(Driver(engine), Renderer(Letters()), Counting(), config, 3, clock=lambda: now_s)  # type: ignore[arg-type]
    flow = Flow(by, waited_s=lambda: waited_s)
    flow.begin(1, *prompts(1))
    ended = [flow.advance(0.0) for _ in range(4)]
    assert [len(groups) for groups in ended] == [0, 0, 0, 1] and now_s == 312.0
