"""Programs in the scheduler: what is kept, who pauses, who goes on; over a runner that knows only its pages."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Sampled, Stats
from tandem.engine.config import ProgramsConfig
from tandem.engine.costs import StepCost
from tandem.engine.engine import Engine
from tandem.engine.measure import measure, price
from tandem.engine.policies import GATED, KEEPING
from tandem.engine.record import read
from tandem.errors import ConfigError, TandemWarning
from tandem.types import Completion, Hints, Request, Sampling, WeightVersion
from tests.null.paged_memory import VOCAB, Device, PagedMemory, check, make

POLICIES = ("fcfs", "plas", "ttl", "continuum", "thunder", "oracle")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Life:
    """A program outside of the engine: its turns, and the time for which its tools run."""

    name: str
    turns: int
    tool_s: float
    start: tuple[int, ...]
    said: int
    says: bool = False  # how many turns are left
    asked: int = 0
    context: tuple[int, ...] = ()
    back_s: float = 0.0  # its next request
    live: bool = False
    request: Request | None = None

    def ask(self) -> Request:
        self.asked += 1
        left = self.turns - self.asked if self.says else None
        hints = Hints(("tool",), left, self.tool_s)
        sampling = Sampling(max_new_tokens=self.said)
        self.live = True
        self.request = Request(
            f"{self.name}/{self.asked}", self.name, self.context or self.start, sampling, 7, hints=hints
        )
        return self.request

    def heard(self, completion: Completion, now: float) -> None:
        assert self.request is not None
        self.live = False
        self.context = (*self.request.tokens, *completion.tokens, *(self.asked % VOCAB,) * 3)
        self.back_s = now + self.tool_s


@dataclass
class World:
    """Programs over an engine, closed loop, on a clock of steps."""

    engine: Engine
    runner: PagedMemory
    clock: Clock
    lives: list[Life]
    step_s: float = 0.05
    sent: dict[str, Request] = field(default_factory=dict)
    done: list[Completion] = field(default_factory=list)
    updates: bool = False

    def step(self) -> None:
        now = self.clock.now
        for life in self.lives:
            if not life.live and life.asked < life.turns and life.back_s <= now:
                request = life.ask()
                self.engine.submit(request)
                self.sent[request.id] = request
        ended = self.engine.step() if self.engine.has_work else []
        self.clock.now += self.step_s
        self.engine.check_integrity()
        for completion in ended:
            self.take(completion)

    def take(self, completion: Completion) -> None:
        request = self.sent[completion.request_id]
        if not self.updates:
            check(completion, request, self.runner)
        next(life for life in self.lives if life.name == request.program_id).heard(completion, self.clock.now)
        self.done.append(completion)

    @property
    def over(self) -> bool:
        return all(life.asked == life.turns and not life.live for life in self.lives)

    def run(self, most: int = 4000) -> int:
        for steps in range(most):
            if self.over:
                return steps
            self.step()
        raise AssertionError(f"{[(one.name, one.asked, one.live) for one in self.lives]} after {most} steps")


def world(
    lives: list[Life],
    num_pages: int = 40,
    memory: type[PagedMemory] = PagedMemory,
    order: str = "arrival",
    **programs: Any,
) -> World:
    asked = {"mode": "enforce", "tick_s": 0.1, "half_life_s": 0.5, "ttl_s": 0.4, "done_s": 1e6}
    clock = Clock()
    config = ProgramsConfig(**asked | programs)
    engine, runner = make(num_pages, memory=memory, programs=config, batch_tokens=32, max_sequences=8, order=order)
    engine.clock = clock
    if engine.scheduler.programs is not None:
        engine.scheduler.programs.reload_s = lambda tokens: 1e-3 * max(0, tokens)
    return World(engine, runner, clock, lives)


def lives(count: int, turns: int = 4, tool_s: float = 0.3, start: int = 20, said: int = 6) -> list[Life]:
    """Programs without anything in common."""
    return [
        Life(f"p{n}", turns, tool_s, tuple((n * 3 + i * i) % VOCAB + 10 * n for i in range(start)), said)
        for n in range(count)
    ]


@given(
    st.sampled_from(POLICIES),
    st.sampled_from(["shadow", "advisory", "enforce", "enforce"]),
    st.sampled_from([PagedMemory, Device]),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_nothing_leaks_or_starves_under_any_policy(policy: str, mode: str, memory: type, seed: int) -> None:
    """Kept pages that are lost or never given back, a paused program that is forgotten, a plan that runs nothing."""
    rng = random.Random(seed)
    made = [
        Life(
            f"p{n}",
            rng.randint(1, 4),
            rng.choice([0.0, 0.1, 1.0, 5.0]),
            tuple(rng.randrange(2) for _ in range(rng.randint(1, 30))),
            rng.randint(1, 9),
            rng.random() < 0.3,
        )
        for n in range(rng.randint(1, 9))
    ]
    most = max(len(one.start) + one.turns * (one.said + 3) for one in made)
    w = world(made, most // 4 + 1 + rng.randint(0, 20), memory, mode=mode, policy=policy, share=rng.choice([1.0, 0.5]))
    w.engine.scheduler.programs.restoring = lambda name: None
    w.updates = rng.random() < 0.5
    version = 0
    for _ in range(rng.randint(0, 60)):
        w.step()
        act = rng.random()
        if act < 0.05 and w.engine.scheduler.live:
            completion = w.engine.abort(rng.choice(list(w.engine.scheduler.live)))
            if completion is not None:
                w.take(completion)
        elif act < 0.1 and w.updates:
            version += 1
            w.engine.receive(WeightVersion(version, f"{version}"))
        elif act < 0.14:
            w.engine.finish_program(rng.choice(made).name)
        elif act < 0.17:
            w.engine.scheduler.programs.set_mode(rng.choice(["shadow", "enforce"]), w.clock.now)
        w.engine.check_integrity()
    w.run()
    for one in made:
        w.engine.finish_program(one.name)
    w.engine.check_integrity()
    assert not w.engine.scheduler.programs.by_name
    w.engine.scheduler.pool.check_idle()


def test_what_an_acting_program_has_is_not_evicted_until_its_time_is_up() -> None:
    """Kept pages that others take while there are others, that are kept for ever, or a hit that finds them gone."""
    w = world(lives(1, turns=2, tool_s=0.6, start=40), 30, policy="ttl", ttl_s=1.0)
    while w.lives[0].live or not w.done:
        w.step()
    followed, pool = w.engine.scheduler.programs, w.engine.scheduler.pool
    kept = followed.by_name["p0"].kept
    assert len(kept) == 12 and all(pool.refs[page] == 1 for page in kept)  # 45 of 46 tokens were run
    w.lives += lives(4, turns=1, start=40)[1:]
    while len(w.done) < 5:
        w.step()
    again = next(one for one in w.done if one.request_id == "p0/2")
    assert again.cached_tokens == 45 and w.engine.stats.evicted_pages > 0
    late = world(lives(1, turns=2, tool_s=5.0, start=40), 30, policy="ttl", ttl_s=1.0)
    while not late.done:
        late.step()
    ended = late.clock.now
    late.engine.scheduler.programs.plan(ended + 0.8)
    assert late.engine.scheduler.programs.by_name["p0"].kept
    late.engine.scheduler.programs.plan(ended + 1.1)
    assert not late.engine.scheduler.programs.by_name["p0"].kept and late.engine.scheduler.pool.num_available == 30


def test_who_runs_takes_kept_pages_before_anybody_is_preempted() -> None:
    """A running sequence that gives up its pages for what an idle program keeps."""
    w = world(lives(1, turns=2, tool_s=99.0, start=40), 24, policy="ttl", ttl_s=99.0)
    while not w.done:
        w.step()
    w.lives += [Life("b", 1, 0.0, tuple(range(100, 140)), 44)]  # 21 pages at its end, 12 are kept
    while len(w.done) < 2:
        w.step()
    assert w.engine.stats.preemptions == 0 and w.engine.scheduler.programs.counts["yielded"] == 1


def test_new_weights_let_go_of_all_that_is_kept() -> None:
    """Keys and values of old weights that hold memory for a program which cannot use them."""
    w = world(lives(3, turns=2, tool_s=9.0), 60, policy="thunder")
    while len(w.done) < 3:
        w.step()
    assert len(w.engine.scheduler.programs.tables) == 3
    w.engine.receive(WeightVersion(1, "1"))
    assert w.engine.scheduler.programs.tables == [] and w.engine.scheduler.pool.num_available == 60


def test_a_program_pauses_for_others_and_is_restored() -> None:
    """Too many programs under way at once, each of which finds nothing; a paused one whose request starts anyway."""
    w = world(lives(6, turns=5, tool_s=0.2, start=60, said=8), 48, policy="thunder")
    asking = []
    while not w.over:
        w.step()
        followed = w.engine.scheduler.programs
        for sequence in w.engine.scheduler.running:
            assert followed.by_name[sequence.request.program_id].phase == "reasoning"
        asking.append(sum(one.phase == "paused" and bool(one.live) for one in followed.by_name.values()))
    assert max(asking) >= 3 and followed.counts["paused"] and followed.counts["restored"] > 6
    off = world(lives(6, turns=5, tool_s=0.2, start=60, said=8), 48, mode="off")
    off.run()
    assert w.engine.stats.run_tokens < 0.7 * off.engine.stats.run_tokens


@pytest.mark.parametrize("policy", POLICIES)
def test_shadow_changes_nothing(policy: str, tmp_path: Path) -> None:
    """A decision that is carried out though it was only asked for; a record without it."""
    told = {}
    for mode in ("off", "shadow"):
        w = world(lives(6, turns=4, start=40), 48, mode=mode, policy=policy, record=str(tmp_path / f"{mode}.jsonl"))
        w.run()
        told[mode] = [(c.request_id, c.tokens, c.cached_tokens, c.finished_s) for c in w.done], w.engine.stats
    assert told["off"] == told["shadow"]
    w.engine.scheduler.programs.record.flush()
    seen = Counter(line["at"] for line in read(tmp_path / "shadow.jsonl"))
    assert seen["turn"] == 24 and seen["back"] == 18 and seen["head"] == 1
    assert seen["keep"] == (24 if policy in KEEPING else 0) and (seen["balance"] > 0) == (policy in GATED)


def test_names_from_outside_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each conversation that never comes back is followed for ten minutes: memory grows with what is asked."""
    monkeypatch.setattr("tandem.engine.programs.MOST", 5)
    w = world([], 200, policy="ttl")
    followed = w.engine.scheduler.programs
    for number in range(20):
        w.engine.submit(Request(f"r{number}", f"p{number}", (1, 2, 3, number), Sampling(max_new_tokens=2), number))
        while w.engine.has_work:
            w.engine.step()
    assert [*followed.by_name] == [f"p{number}" for number in range(15, 20)]
    followed.check_integrity([])


@pytest.mark.parametrize(
    ("mode", "policy", "cause"),
    [("shadow", "thunder", "cache"), ("enforce", "thunder", ""), ("enforce", "ttl", "time")],
)
def test_a_turn_says_what_drew_it_and_why_it_found_less(tmp_path: Path, mode: str, policy: str, cause: str) -> None:
    """A record from which nobody can tell why a program's context was computed again, or by which weights."""
    w = world(lives(6, turns=4, tool_s=3.0, start=40), 48, mode=mode, policy=policy, record=str(tmp_path / "record"))
    for step in range(10_000):
        if w.over:
            break
        if step == 40:
            w.engine.receive(WeightVersion(7, "seven"))
        w.step()
    w.engine.scheduler.programs.record.flush()
    lines = list(read(tmp_path / "record"))
    turns = [line for line in lines if line["at"] == "turn"]
    seeds = {one.request_id: one for one in w.done}
    assert {line["request"] for line in turns} == set(seeds) and {tuple(line["weights"]) for line in turns} >= {
        (0,),
        (7,),
    }
    for line in turns:
        assert bool(line["lost"]) == (line["cached"] < line["known"]), line
        assert line["weights"] == list(dict.fromkeys(seeds[line["request"]].columns["versions"].tolist()))
    causes = {line["lost"] for line in turns} - {""}
    assert "weights" in causes and (not cause or cause in causes), causes
    assert all(line["t"] > 0 for line in lines if line["at"] == "let_go")


def test_advice_only_moves_what_the_cache_forgets_first() -> None:
    """Advice that withholds pages or delays a request, or that changes nothing."""
    runs = {}
    for mode in ("off", "advisory"):
        others = [replace(one, name=f"x{one.name}") for one in lives(9, 1)[2:]]
        made = [*lives(2, turns=6, tool_s=0.1, start=40), *others]
        w = world(made, 40, mode=mode, policy="ttl")
        w.run()
        runs[mode] = w.engine
    assert runs["advisory"].stats.cached_tokens > runs["off"].stats.cached_tokens
    assert runs["advisory"].scheduler.programs.counts["kept"] == 0


def test_a_share_of_programs_and_of_one_tenants() -> None:
    """Decisions carried out for programs that are left to the engine's own order."""
    w = world(lives(30, turns=2, start=8), 400, policy="ttl", ttl_s=50.0, share=0.0, tenants=(("t", 1.0),))
    w.run()
    assert w.engine.scheduler.programs.counts["kept"] == 0
    request = Request("r", "p", tuple(range(30)), Sampling(max_new_tokens=3), 0, tenant="t")
    w.engine.generate([request])
    assert w.engine.scheduler.programs.counts["kept"] == 1
    assert list(w.engine.scheduler.programs._keepers) == ["t\x1fp"]
    w.engine.finish_program("p", "t")
    w.engine.scheduler.pool.check_idle()


def test_a_program_that_says_it_is_done_keeps_nothing() -> None:
    """Pages of programs that never come back, until time lets go of them."""
    made = lives(4, turns=2, tool_s=0.1)
    for one in made:
        one.says = True
    w = world(made, 100, policy="thunder")
    w.run()
    assert w.engine.scheduler.programs.by_name == {}
    w.engine.scheduler.pool.check_idle()
    silent = world(lives(4, turns=1), 100, policy="thunder", done_s=2.0)
    silent.run()
    silent.clock.now += 1.0
    silent.engine.scheduler.programs.plan(silent.clock.now)
    assert len(silent.engine.scheduler.programs.by_name) == 4
    silent.engine.scheduler.programs.plan(silent.clock.now + 1.5)
    assert silent.engine.scheduler.programs.by_name == {}


def test_a_guard_falls_back_to_shadow() -> None:
    """Programs that wait too long, or find too little, for as long as the policy stands."""
    w = world(lives(12, turns=7, tool_s=0.5, start=30), 40, policy="thunder", guard_first_s=0.3)
    with pytest.warns(TandemWarning, match="scheduled as before: .* s to the first token"):
        w.run()
    followed = w.engine.scheduler.programs
    assert followed.mode == "shadow" and not followed.tables
    calm = world(lives(12, turns=7, tool_s=0.5, start=30), 400, policy="thunder", guard_first_s=9.0, guard_cached=0.9)
    calm.run()
    assert calm.engine.scheduler.programs.mode == "enforce"
    cold = world(lives(12, turns=7, tool_s=0.5, start=30), 40, policy="plas", guard_cached=0.9)
    with pytest.warns(TandemWarning, match="found"):
        cold.run()
    assert cold.engine.scheduler.programs.mode == "shadow"


def test_the_kill_switch_lets_all_go_at_once() -> None:
    """Paused programs that stay so though nobody decides any more."""
    w = world(lives(8, turns=4, tool_s=0.2, start=60), 48, policy="thunder")
    while not any(one.phase == "paused" and one.live for one in w.engine.scheduler.programs.by_name.values()):
        w.step()
    w.engine.set_programs_mode("shadow")
    assert not w.engine.scheduler.programs.tables
    assert all(w.engine.scheduler.programs.allowed(sequence) for sequence in w.engine.scheduler.waiting)
    w.run()


def test_tools_are_made_ready_before_a_program_is_restored() -> None:
    """A callback that comes after the restore, twice for one pause, or for programs whose turn is far."""
    w = world(lives(8, turns=3, tool_s=0.2, start=60), 48, policy="thunder")
    told: list[tuple[str, bool]] = []
    followed = w.engine.scheduler.programs
    followed.restoring = lambda name: told.append((name, followed.by_name[name].placed))
    w.run()
    assert told and not any(placed for _, placed in told)
    assert len(told) <= followed.counts["restored"]


def test_least_attained_service_goes_first() -> None:
    """Programs in the order of their requests where the one that had least should start."""
    made = [Life("long", 4, 0.0, tuple(range(60, 90)), 40), *lives(3, turns=2, tool_s=0.0, start=12)]
    made[1:] = [replace(one, back_s=1.0) for one in made[1:]]
    w = world(made, 60, policy="plas")
    w.engine.scheduler.config = replace(w.engine.scheduler.config, max_sequences=1)
    w.run()
    order = [completion.request_id for completion in w.done]
    assert order.index("long/2") > max(order.index(f"p{n}/2") for n in range(3))


def test_a_record_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A run that finds out at its end that nothing was recorded."""
    with pytest.raises(ConfigError, match="engine.programs.record"):
        world(lives(1), record=str(tmp_path / "none" / "record.jsonl"))
    with pytest.raises(ConfigError, match="engine.programs.tenants gives a 2"):
        ProgramsConfig(tenants=(("a", 2.0),))
    with pytest.raises(ConfigError, match="engine.programs.policy"):
        ProgramsConfig(policy="best")  # type: ignore[arg-type]


@given(st.sampled_from(["ttl", "continuum", "thunder", "oracle"]), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_programs_and_tenants_together(policy: str, seed: int) -> None:
    """A paused program that its tenant's turn starts, kept pages that lock the engine or that nobody pays for."""
    rng = random.Random(seed)
    made = [
        Life(f"p{n}", rng.randint(1, 3), rng.choice([0.1, 1.0]), tuple(rng.choices(range(2), k=rng.randint(1, 30))), 6)
        for n in range(rng.randint(1, 9))
    ]
    most = max(len(one.start) + one.turns * (one.said + 3) for one in made)
    w = world(made, most // 4 + 1 + rng.randint(0, 20), policy=policy, order="shares")
    followed, order = w.engine.scheduler.programs, w.engine.scheduler.order
    charged: list[tuple[str, str, int, float]] = []
    followed.charge = lambda *paid: (charged.append(paid), order.hold(*paid))[0]
    while not w.over:
        w.step()
        for sequence in w.engine.scheduler.running:
            assert followed.by_name[sequence.request.program_id].phase == "reasoning"
    for one in made:
        w.engine.finish_program(one.name)
    w.engine.scheduler.pool.check_idle()
    names = {one.name for one in made}
    assert all(seconds >= 0 and tokens > 0 and name in names for _, name, tokens, seconds in charged)
    assert bool(charged) == (followed.counts["kept"] > 0)


def test_measuring_an_engine_leaves_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was run to learn the price of a step taken for programs that may come back, and pages kept for them."""
    w = world([], 200, policy="thunder", order="shares")
    monkeypatch.setattr("tandem.engine.measure.StepCost.fit", lambda steps: StepCost())
    drawn = lambda batch: Sampled([0] * batch.num_draws, {"logprobs": [0.0] * batch.num_draws})  # noqa: E731
    monkeypatch.setattr(w.runner, "run", drawn)
    monkeypatch.setattr(w.runner, "release_memory", lambda: None, raising=False)
    followed = w.engine.scheduler.programs
    price(w.engine)
    assert w.engine.scheduler.programs is followed and not followed.by_name
    assert followed.predictor.predict("", "", 1).output == () and not w.engine.scheduler.live


def test_computing_again_costs_what_prompts_take_after_measuring_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs read the counts of before the measurement for ever, and price what is lost by its prompts alone."""
    w = world([], 200, policy="thunder", order="arrival")
    drawn = lambda batch: Sampled([0] * batch.num_draws, {"logprobs": [0.0] * batch.num_draws})  # noqa: E731
    monkeypatch.setattr(w.runner, "run", drawn)
    monkeypatch.setattr(w.runner, "release_memory", lambda: None, raising=False)
    monkeypatch.setattr("tandem.engine.measure.StepCost.fit", lambda steps: StepCost())
    measure(w.engine)
    followed, stats = w.engine.scheduler.programs, w.engine.scheduler._stats
    assert w.engine.stats == Stats()
    stats.prefill_s, stats.prefilled_tokens = 6.0, 3
    assert followed._reload_s(5) == 10.0
