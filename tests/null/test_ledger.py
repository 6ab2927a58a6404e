"""Regression caught: a ledger that loses a token or a second."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.columns import Columns
from tandem.engine.batch import Stats
from tandem.errors import LedgerWarning
from tandem.run.ledger import FATES, UNACCOUNTED, Ledger
from tandem.types import Failure, Group, Prompt, Sample, StopReason, Trajectory

SHAPES = ("trained", "zero_advantage", "filtered", "truncated", "failed", "aborted", "masked", "stale", "surplus")


def trajectory(program: str, fate: str, sampled: int, segment: int = 0) -> Trajectory:
    """One that is to meet `fate`, of so many tokens."""
    reason = StopReason.ABORTED if fate == "aborted" else StopReason.LENGTH
    failure = Failure("reward", "nan") if fate == "failed" else None
    columns = Columns.of(tokens=(1,) * (sampled + 2), loss_mask=(False, False) + (True,) * sampled)
    return Trajectory(program, "p", columns, 1.0, reason, failure, segment=segment)


def sample(of: Trajectory, advantage: float = 1.0) -> Sample:
    return Sample(of.id, "p", of.columns.having(advantages=(advantage,) * len(of.columns)))


def group(*trajectories: Trajectory) -> list[Group]:
    return [Group(Prompt("p", ()), trajectories)]


def selected(fate: str, of: Trajectory) -> tuple[list[Sample], dict[str, str]]:
    """What the learner took, and what algo.advantage says of it."""
    known = {"aborted": "failed", "masked": "trained"}.get(fate, fate)
    return [sample(of, float(fate == "trained"))] if fate in ("trained", "masked") else [], {of.id: known}


@dataclass
class Run:
    """A run of made-up events, whose tokens are counted here too, in the plainest way: by the engine and by fate."""

    ledger: Ledger
    engine: Stats
    fates: dict[str, int]
    numbers: Iterator[int]
    waiting: list[tuple[str, Trajectory]]  # that arrived, with the fate that they are to meet
    again: list[Sample]  # that a replay queue may give again
    saved: tuple[Any, ...] = ()
    since: int = 0  # tokens of finished steps since it was saved

    def program(self) -> str:
        name = f"p/{next(self.numbers)}"
        self.ledger.dispatch([name])
        return name

    def sample(self, tokens: int, fate: str) -> None:
        self.engine = replace(self.engine, sampled_tokens=self.engine.sampled_tokens + tokens)
        self.ledger.meter("engine", self.engine)
        self.fates[fate] += tokens

    def act(self, event: str, tokens: int) -> None:
        if event in SHAPES:  # sampled and learned of at once
            made = trajectory(self.program(), event, tokens)
            self.sample(tokens, event)
            self.ledger.record(group(made), *selected(event, made))
        elif event.startswith("buffer "):
            fate = event.removeprefix("buffer ")
            made = trajectory(self.program(), fate, tokens)
            self.sample(tokens, "in_flight")
            self.ledger.arrive(group(made))
            self.waiting.append((fate, made))
        elif event == "draw" and self.waiting:
            fate, made = self.waiting.pop(0)
            samples, fates = selected(fate, made)
            self.ledger.record(group(made), samples, fates)
            self.fates["in_flight"] -= made.num_sampled
            self.fates[fate] += made.num_sampled
            if fate == "trained":
                self.again += samples
        elif event == "reuse" and self.again:
            self.ledger.reuse([self.again.pop(0)])
        elif event == "masked by a correction":
            made = trajectory(self.program(), "trained", tokens)
            self.sample(tokens - tokens // 3, "trained")
            self.sample(tokens // 3, "masked")
            self.ledger.record(group(made), [sample(made)], {made.id: "trained"}, tokens // 3)
        elif event == "engine dies":
            name = self.program()
            self.sample(tokens, "crashed")
            self.ledger.lose("crashed", tokens, [name])
            self.ledger.dispatch([name])  # again, and it fails to begin
            self.ledger.lose("failed", 0, [name])
        elif event == "evaluate":
            self.sample(tokens, "evaluated")
            self.ledger.lose("evaluated", tokens)
        elif event == "save":
            state = json.loads(json.dumps(self.ledger.state()))
            self.saved = state, dict(self.fates), list(self.waiting), list(self.again)
        elif event.startswith("kill") and self.saved:
            state, fates, waiting, again = self.saved
            total, before = self.ledger.sampled, state["sampled"]
            self.ledger, self.engine = Ledger(uses=2), Stats()
            self.ledger.restore(state)
            in_rows = min(tokens, total - before)  # of finished steps; the rest was in no row
            self.ledger.discard([{"step": 1, "tokens": in_rows}], total - before)
            self.fates, self.waiting, self.again = dict(fates), list(waiting), list(again)
            self.fates["discarded"] += in_rows
            self.fates["interrupted"] += total - before - in_rows
            if event == "kill, with a journal":  # which may know of more than the meter had come to
                back = trajectory(self.program(), "trained", tokens * 2)
                self.ledger.found(back.num_sampled)
                self.ledger.record(group(back), [sample(back)], {back.id: "trained"})
                self.fates["trained"] += back.num_sampled
                self.fates["discarded"] -= (first := min(back.num_sampled, in_rows))
                self.fates["interrupted"] -= min(back.num_sampled - first, total - before - in_rows)
            self.saved = json.loads(json.dumps(self.ledger.state())), dict(self.fates), list(waiting), list(again)


EVENTS = st.sampled_from(
    [*SHAPES, *(f"buffer {fate}" for fate in SHAPES), "draw", "draw", "draw", "reuse", "masked by a correction",
     "engine dies", "evaluate", "save", "kill", "kill, with a journal"]
)  # fmt: skip


def begun() -> Run:
    run = Run(Ledger(uses=2), Stats(), dict.fromkeys(FATES, 0), iter(range(10**6)), [], [])
    run.ledger.meter("engine", run.engine)
    return run


@settings(deadline=None)
@given(st.lists(st.tuples(EVENTS, st.integers(0, 40)), max_size=60), st.integers(0, 9))
def test_every_token_has_one_fate_whatever_happens(events, live):
    """Drops, aborts, failures, dead engines, replays, kills and resumes: a token counted twice, or not at all."""
    run = begun()
    for event, tokens in events:
        run.act(event, tokens)
    run.sample(live, "in_flight")  # of requests that the engine still has
    closed = run.ledger.close({}, live)
    assert closed["tokens"] == run.fates | {"total": sum(run.fates.values())}
    assert UNACCOUNTED not in closed["tokens"] and closed["tokens"]["total"] == run.ledger.sampled
    assert closed["audit"]["waiting"] == len(run.waiting) and closed["audit"]["open"] == 0


@settings(deadline=None)
@given(st.lists(st.tuples(EVENTS, st.integers(1, 40)), max_size=20), st.integers(1, 40), st.booleans())
def test_a_lost_token_is_caught(events, lost, twice):
    """A remainder that is hidden in a fate, in the total, or in "in flight"."""
    run = begun()
    for event, tokens in events:
        run.act(event, tokens)
    if twice:
        run.ledger.lose("stale", lost)
    else:
        run.sample(lost, "trained")
    with pytest.warns(LedgerWarning, match=f"{-lost if twice else lost} are unaccounted for"):
        closed = run.ledger.close({})
    total = closed["tokens"].pop("total")
    assert sum(closed["tokens"].values()) == total and closed["tokens"][UNACCOUNTED] == (-lost if twice else lost)


def test_the_remainder_is_an_error_in_tests():
    """A ledger that does not close, and a suite that stays green."""
    ledger = Ledger()
    ledger.meter("engine", Stats(sampled_tokens=1))
    with pytest.raises(LedgerWarning, match="1 are unaccounted for"):
        ledger.close({})


PHASE = st.sampled_from(["prefill", "decode", "learner", "update", "full_buffer"])


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["rollout", "learner", "environment 1"]),
        st.tuples(st.lists(st.dictionaries(PHASE, st.floats(0, 1e4)), max_size=20), st.floats(0, 1)),
    )
)
def test_every_second_of_every_worker_has_one_phase(workers):
    """Seconds that do not sum to the wall clock, or that go to another worker's."""
    ledger, walls = Ledger(), {}
    for worker, (spans, spare_s) in workers.items():
        for seconds in spans:
            ledger.spend(seconds, worker)
        walls[worker] = sum(sum(seconds.values()) for seconds in spans) + spare_s
    resumed = Ledger()
    resumed.restore(json.loads(json.dumps(ledger.state())))
    closed = resumed.close(walls)["nanoseconds"]
    assert set(closed) == set(workers)
    for worker, (spans, spare_s) in workers.items():
        phases = dict(closed[worker])
        assert phases.pop("wall") == sum(phases.values()) == int(walls[worker] * 1e9)
        assert min(phases.values()) >= 0
        assert phases[UNACCOUNTED] == pytest.approx(spare_s * 1e9, abs=2e3 + 5 * len(spans), rel=1e-9)


@pytest.mark.parametrize(("wall_s", "rest"), [(4.0, "-1.000"), (6.1, "1.100"), (5.9, "")])
def test_seconds_without_a_cause_are_told(wall_s: float, rest: str):
    """Spans that overlap, or a phase that no span has, hidden in a remainder."""
    ledger = Ledger()
    ledger.spend({"decode": 3.0, "learner": 2.0})
    if not rest:
        assert ledger.close({"main": wall_s})["seconds"]["main"][UNACCOUNTED] == pytest.approx(0.9)
        return
    with pytest.warns(LedgerWarning, match=f"main: phases claim 5.000 s .*, so {rest} s are unaccounted for"):
        closed = ledger.close({"main": wall_s})["nanoseconds"]["main"]
    assert closed.pop("wall") == sum(closed.values()) == int(wall_s * 1e9)


ONE, OTHER = trajectory("p/1", "trained", 3), trajectory("p/2", "zero_advantage", 3)
FATED = {ONE.id: "trained", OTHER.id: "zero_advantage"}


def with_three(uses: int) -> Ledger:
    """Programs 1, 2 and 3 were dispatched; 1 was trained, 2 was not, 3 runs."""
    ledger = Ledger(uses)
    ledger.dispatch(["p/1", "p/2", "p/3"])
    ledger.record(group(ONE, OTHER), [sample(ONE)], FATED)
    return ledger


WRONG: list[tuple[str, int, str, str, Callable[[Ledger], Any]]] = [
    ("strange", 1, "p/1 ended, which was not on its way", "", lambda known: known.arrive(group(ONE))),
    ("strange", 1, "p/9 ended", "", lambda known: known.arrive(group(trajectory("p/9", "trained", 3)))),
    ("strange", 1, "p/9 ended", "", lambda known: known.lose("aborted", 0, ["p/9"])),
    ("strange", 1, "p/3 dispatched twice", "", lambda known: known.dispatch(["p/3"])),
    ("strange", 1, "p/7 dispatched twice", "", lambda known: known.dispatch(["p/7", "p/7"])),
    ("strange", 1, "p/2/0 at work on", "", lambda known: known.check(["p/3"], [OTHER.id])),
    ("lost", 1, "p/3 lost: dispatched or arrived", "", lambda known: known.check()),
    ("beyond", 1, "p/1/0 reused, which 1 updates have trained", "", lambda known: known.reuse([sample(ONE)])),
    ("beyond", 3, "p/2/0 reused, which 3 updates", "", lambda known: known.reuse([sample(OTHER)])),
    ("beyond", 3, "p/1/0 reused", "used up", lambda known: known.reuse([sample(ONE)])),
    ("beyond", 1, "p/1/0 trained again", "dispatched again", lambda known: known.record(group(ONE), [sample(ONE)], {})),
]


@pytest.mark.parametrize(("count", "uses", "text", "before", "act"), WRONG)
def test_no_sample_has_two_fates_or_none(count: str, uses: int, text: str, before: str, act: Callable[[Ledger], Any]):
    """A sample trained by two updates, one that ended twice or that nobody has any more: it raises here, in use it
    warns, and both sums close all the same."""
    for use in (False, True):
        ledger = with_three(uses)
        ledger.meter("engine", Stats(sampled_tokens=6))
        if before == "used up":
            ledger.reuse([sample(ONE)])
            ledger.reuse([sample(ONE)])
            assert ledger.tokens["trained"] == 3 and ledger.reused == 6 and ledger.audit["reused"] == 2
        elif before == "dispatched again":
            ledger.dispatch(["p/1"])
            ledger.meter("engine", Stats(sampled_tokens=9))
        with pytest.warns(LedgerWarning, match=text) if use else pytest.raises(LedgerWarning, match=text):
            act(ledger)
        assert ledger.audit[count] == 1
        if use:
            with warnings.catch_warnings(action="ignore"):
                tokens = ledger.close({})["tokens"]
            assert tokens.pop("total") == sum(tokens.values())
    fine = with_three(uses)
    fine.check(["p/3"])
    fine.lose("failed", 0, ["p/3"])
    fine.check()
    names = ("dispatched", "ended", "trained", "reused", "lost", "strange", "beyond")
    assert fine.audit == dict(zip(names, (3, 3, 1, 0, 0, 0, 0), strict=True))


def test_a_trajectory_that_waits_and_that_nobody_has_is_lost():
    """A buffer that drops a group: its tokens counted as in flight for ever."""
    ledger = Ledger()
    ledger.dispatch(["p/1", "p/2"])
    ledger.meter("engine", Stats(sampled_tokens=6))
    ledger.arrive(group(ONE, OTHER))
    ledger.check(waiting=[ONE.id, OTHER.id])
    with pytest.warns(LedgerWarning, match="p/2/0 lost"):
        ledger.check(waiting=[ONE.id])
    with pytest.warns(LedgerWarning, match="3 are unaccounted for"):
        closed = ledger.close({})
    assert closed["tokens"]["in_flight"] == 3 and closed["tokens"][UNACCOUNTED] == 3 and closed["audit"]["lost"] == 1


def test_ids_are_remembered_for_a_while_only(monkeypatch: pytest.MonkeyPatch):
    """A ledger, and so a checkpoint, that grows with the run."""
    monkeypatch.setattr("tandem.run.ledger.KNOWN", 2)
    ledger = Ledger()
    for number in range(5):
        made = trajectory(f"p/{number}", "trained", 1)
        ledger.dispatch([made.program_id])
        ledger.record(group(made), [sample(made)], {})
    assert [*ledger.trained] == ["p/3/0", "p/4/0"]


def test_tokens_have_ages_by_the_version_that_drew_each():
    """A sequence that went on over an update, all of whose tokens have the age of its first or last."""
    ledger = Ledger()

    def drawn(program: str, *versions: int) -> Trajectory:
        made = trajectory(program, "trained", len(versions))
        return replace(made, columns=made.columns.having(versions=(-1, -1, *versions)))

    trained, dropped = drawn("p/1", 3, 3, 4), drawn("p/2", 1, 2, 2)
    ledger.dispatch(["p/1", "p/2"])
    half = Sample(trained.id, "p", trained.columns.having(advantages=(0.0, 0.0, 0.0, 1.0, 1.0)))
    ledger.record(group(trained, dropped), [half], {dropped.id: "stale"}, version=5)
    expected = {"stale": {3: 2, 4: 1}, "trained": {1: 1, 2: 1}, "masked": {2: 1}}
    assert ledger.ages == expected
    resumed = Ledger()
    resumed.restore(json.loads(json.dumps(ledger.state())))
    assert resumed.close({})["ages"] == expected


def test_segments_of_a_program_have_fates_of_their_own():
    """A program's second segment is lost where its first was drawn from the queue before it."""
    ledger = Ledger()
    ledger.dispatch(["p/1"])
    first, second = trajectory("p/1", "trained", 3), trajectory("p/1", "stale", 5, segment=1)
    ledger.arrive(group(first, second))
    ledger.record(group(first), [sample(first)], {first.id: "trained"})
    assert ledger.close({})["tokens"]["in_flight"] == 5
    ledger.record(group(second), [], {second.id: "stale"})
    assert ledger.tokens["trained"] == 3 and ledger.tokens["stale"] == 5 and not ledger.held
    with pytest.raises(LedgerWarning, match="p/1 ended, which was not on its way"):
        ledger.record(group(second), [], {second.id: "stale"})


def test_ledger_refuses_what_cannot_be():
    """A failed trajectory trained on, a sample from nowhere, more taken out than trained, a nameless phase."""
    ledger = Ledger()
    made = trajectory("p/1", "trained", 1)
    with pytest.raises(AssertionError, match="without a trajectory"):
        ledger.record([], [sample(made)], {})
    ledger.dispatch(["p/1", "p/2"])
    bad = trajectory("p/1", "failed", 1)
    with pytest.raises(AssertionError, match="failed, yet it was trained"):
        ledger.record(group(bad), [sample(bad)], {bad.id: "trained"})
    fine = trajectory("p/2", "trained", 1)
    with pytest.raises(AssertionError, match="2 masked of 1 tokens"):
        ledger.record(group(fine), [sample(fine)], {fine.id: "trained"}, masked=2)
    with pytest.raises(AssertionError, match="'dreaming', which PHASES does not name"):
        ledger.spend({"dreaming": 1.0})


def test_ledger_counts_what_an_interruption_cost():
    """Steps thrown away by a resume, and the one that a kill cut off, vanish from the bill."""
    ledger = Ledger()
    rows: list[dict[str, Any]] = [
        {"step": step, "tokens": 1600, "seconds": {"rollout": 2.5, "learner": 1.5}} for step in (4, 5)
    ]
    rows[1]["workers"] = {"rollout": {"decode": 3.0}, "unknown": {"decode": 9.0}}
    lost_s = ledger.discard(rows, sampled=4000, wall_s=8.5, workers=("main", "rollout"))
    assert lost_s == {"main": 8.5, "rollout": 8.5}
    closed = ledger.close({"main": 9.0, "rollout": 8.5})
    assert closed["seconds"]["rollout"] == {"interrupted": 5.5, "decode": 3.0, UNACCOUNTED: 0.0, "wall": 8.5}
    assert closed["tokens"]["discarded"] == 3200 and closed["tokens"]["interrupted"] == 800
    assert closed["tokens"]["total"] == 4000
    assert closed["seconds"]["main"] == {"discarded": 8.0, "interrupted": 0.5, UNACCOUNTED: 0.5, "wall": 9.0}
    unmetered = Ledger()  # of a run of a version that kept no count
    unmetered.discard([row | {"drawn_tokens": 1700} for row in rows])
    assert unmetered.tokens["discarded"] == unmetered.close({"main": 8.0})["tokens"]["total"] == 3400


def test_an_engine_s_rows_close_too():
    """Rows that engines ran and that are called neither context, token, recomputed, rejected nor dropped."""
    ledger = Ledger()
    stats = Stats(
        run_tokens=100, sampled_tokens=40, cached_tokens=7, prefilled_tokens=30, recomputed_tokens=12,
        drafted_tokens=20, accepted_tokens=11, dropped_tokens=3, repeated_tokens=2,
    )  # fmt: skip
    ledger.meter("first", stats)
    ledger.meter("first", replace(stats, run_tokens=105, sampled_tokens=45))
    ledger.meter("second", stats)
    rows: Mapping[str, int] = ledger.engine
    assert rows == {
        "prefilled": 60, "decoded": 93, "recomputed": 24, "repeated": 4, "rejected_draft": 18, "dropped": 6,
        "cached": 14,
    }  # fmt: skip
    assert sum(rows.values()) - rows["cached"] == 205 and ledger.sampled == 85
    assert ledger.sampled_with({"first": replace(stats, sampled_tokens=47)}) == 87
