"""Drafts over the fake memory (paged_memory.py): what is drawn, who gets pages for them, and what keeps a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Batch, Sampled, Sequence
from tandem.engine.config import DraftConfig, EngineConfig
from tandem.engine.draft import LONGEST, SHORTEST, lookup
from tandem.engine.integrity import check_integrity
from tandem.engine.layout import KvLayout
from tandem.engine.schedule import Scheduler
from tandem.engine.suffix import SuffixLookup
from tandem.errors import TandemWarning
from tandem.numerics.interval import wilson_interval
from tandem.types import Reach, Request, Sampling, StopReason
from tests.drafting import Told, at_most
from tests.null.paged_memory import Device, PagedMemory, check, group, guesses, make


def drafting(drafts: list[int], num_pages: int = 100, **settings: Any) -> Scheduler:
    """Pages of 4 tokens; a sequence is drafted these as far as it may be."""
    given = {
        "page_tokens": 4,
        "batch_tokens": 16,
        "max_sequences": 8,
        "lookahead_tokens": 0,
        "draft": at_most(9),
    } | settings

    def drafter(sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        return [drafts[:count] for count in most]

    return Scheduler(EngineConfig(**given), num_pages, drafter=Told(drafter))


def ask(s: Scheduler, name: str, prompt: int, new: int, stop: tuple[int, ...] = ()) -> Sequence:
    tokens = tuple(range(100 * len(s.live), 100 * len(s.live) + prompt))
    s.submit(Request(name, name, tokens, Sampling(max_new_tokens=new, stop_token_ids=stop), 0), 0.0)
    return s.live[name]


def step(
    s: Scheduler, tokens: list[int], failed: dict[int, str] | None = None
) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Works as (start, tokens, draws), and the completions."""
    batch = s.plan(0.0)
    done = s.commit(batch, Sampled(tokens, {"logprobs": [-float(t) for t in tokens]}, failed or {}), 1.0)
    check_integrity(s)
    return [(work.start, *work.tokens, work.draws) for work in batch.works], done


def test_what_follows_a_wrong_draft_is_dropped() -> None:
    """A token drawn after a wrong draft is kept, a right one is lost, a page for what was dropped stays held, or a
    block with a draft that does not stand is found by a later prompt."""
    s = drafting([70, 71, 72, 73, 74, 75])
    a = ask(s, "a", 3, 40)
    assert step(s, [60]) == ([(0, 0, 1, 2, 1)], [])
    works, _ = step(s, [70, 71, 99, 98, 97, 96, 95])
    assert works == [(3, 60, 70, 71, 72, 73, 74, 75, 7)]
    assert a.tokens == [0, 1, 2, 60, 70, 71, 99] and a.computed == 6
    assert a.values["logprobs"] == [-60.0, -70.0, -71.0, -99.0]
    assert a.pages is not None and a.pages.blocks == 2 and s.pool.num_available == 98 and len(s.index) == 1
    assert (s.stats.drafted_tokens, s.stats.accepted_tokens, s.stats.sampled_tokens) == (6, 2, 4)
    step(s, [70, 71, 72, 73, 74, 75, 76])  # all of them stand
    assert a.tokens[6:] == [99, 70, 71, 72, 73, 74, 75, 76] and a.computed == 13 and len(s.index) == 3
    assert s.plan(0.0).named == [a.pages.tables[0][1], a.pages.tables[0][2]]


@pytest.mark.parametrize("end", ["stop", "limit", "failed", "failed first"])
def test_an_end_among_drafts_is_the_end(end: str) -> None:
    """A stop token, a limit or a row that fails among accepted drafts is passed over, or ends another token."""
    s = drafting([70, 71, 72])
    ask(s, "a", 3, 4 if end == "limit" else 40, (71,) if end == "stop" else ())
    step(s, [60])
    drawn = [70, 71, 72, 73][: 3 if end == "limit" else 4]
    failed = {"failed": {1: "NaN", 2: "NaN too"}, "failed first": {0: "NaN"}}
    works, (done,) = step(s, drawn, failed.get(end))
    assert works == [(3, 60, 70, 71, *([] if end == "limit" else [72]), len(drawn))]
    wanted = {
        "stop": (StopReason.STOP_TOKEN, (60, 70, 71), ""),
        "limit": (StopReason.LENGTH, (60, 70, 71, 72), ""),
        "failed": (StopReason.FAILED, (60, 70), "NaN"),
        "failed first": (StopReason.FAILED, (60,), "NaN"),
    }
    assert (done.stop_reason, done.tokens, done.failure) == wanted[end]
    assert len(done.logprobs) == len(done.tokens) and s.pool.num_available == s.pool.num_pages
    # A last token that was drafted is not run; of one that fails, the drafts before it are.
    assert s.stats.accepted_tokens == {"stop": 1, "limit": 2, "failed": 1}.get(end, 0)
    assert s.stats.drafted_tokens == len(drawn) - 1


def test_drafts_take_what_is_left() -> None:
    """A draft takes a decode's row or its page, a prompt's chunk, or gets somebody preempted."""
    s = drafting([70] * 9, batch_tokens=9)
    ask(s, "a", 2, 40)
    ask(s, "b", 2, 40)
    step(s, [60, 60])
    ask(s, "c", 4, 40)
    works, _ = step(s, [61, 62, 63, 64, 65, 61])
    assert [(start, len(rest) - 1, rest[-1]) for start, *rest in works] == [(2, 4, 4), (2, 1, 1), (0, 4, 1)]
    s = drafting([70] * 9, num_pages=3)
    ask(s, "a", 3, 8)
    ask(s, "b", 3, 5)
    step(s, [60, 60])
    works, _ = step(s, [61] * 6)
    assert [(start, len(rest) - 1) for start, *rest in works] == [(3, 5), (3, 1)]
    assert s.stats.preemptions == 0


def test_what_follows_drafts_is_planned_when_they_are_resolved() -> None:
    """A batch planned while drafts are on a device runs tokens that may be dropped."""
    s = drafting([70])
    ask(s, "a", 3, 9)
    batch = s.plan(0.0)
    s.advance(batch)
    with pytest.raises(AssertionError, match="planned when they are resolved"):
        s.plan(0.0)


def test_an_engine_that_drafts_waits_for_its_device() -> None:
    """Drafts made of what a device has not drawn yet, or an engine that cannot draft on one."""
    engine, device = make(memory=Device, drafter=guesses([4]), draft=at_most(4))
    (request,) = group("a", [1, 2, 3], 1, 26, stop=())
    engine.submit(request)
    done, steps = [], 0
    while engine.has_work:
        done += engine.step()
        steps += 1
    check(done[0], request, device)
    assert steps == 1 + 5 and engine.stats.accepted_tokens == 20  # 1 + 5 x 5 tokens


@given(
    rights=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    reach=st.sampled_from([Reach(), Reach(window=3), Reach(window=9), Reach(chunk=6)]),
    sinks=st.sampled_from([0, 3]),
    spare=st.sampled_from([0, 4, 40]),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    draft_tokens=st.integers(1, 6),
)
@settings(max_examples=200, deadline=None)
def test_a_later_turn_finds_what_drafts_computed(
    rights: list[int], reach: Reach, sinks: int, spare: int, prompt: list[int], draft_tokens: int
) -> None:
    """An accepted draft's block has no name, a rejected one's has, or hits hang on what was drafted."""
    layout = KvLayout.of([reach, Reach()], sinks)
    requests = group("a", prompt, 3, 12)
    pages = layout.most_pages(60, 1, 4) + spare
    made = [
        make(pages, layout=layout, drafter=guesses(rights), draft=at_most(most), batch_tokens=24, max_sequences=3)
        for most in (0, draft_tokens)
    ]
    found = []
    for engine, runner in made:
        done = [engine.generate([request])[0] for request in requests]
        for completion, request in zip(done, requests, strict=True):
            check(completion, request, runner)
        context = [*prompt, *done[-1].tokens]
        (again,) = engine.generate(group("b", [*context, 3], 1, 1))
        found.append((again.cached_tokens, [completion.stop_reason for completion in done]))
        engine.check_integrity()
    plain, drafted = (engine.stats for engine, _ in made)
    assert found[0][1] == found[1][1]
    if not plain.evicted_pages and not drafted.evicted_pages:  # else drafts' pages may have taken a cached one's place
        assert found[0] == found[1]
        assert drafted.run_tokens - plain.run_tokens == drafted.drafted_tokens - drafted.accepted_tokens
        assert drafted.batches == plain.batches - drafted.accepted_tokens


@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40), most=st.integers(0, 6), big=st.booleans())
@settings(max_examples=400, deadline=None)
def test_lookup_finds_the_latest_of_the_longest(tokens: list[int], most: int, big: bool) -> None:
    """Half of one id and half of the next taken for an id, the context's own end taken for an earlier time, or a
    shorter or older match before a longer or later one."""
    tokens = [token * 65793 for token in tokens] if big else tokens  # all bytes of an id are the same
    wanted: list[int] = []
    for count in range(LONGEST, SHORTEST - 1, -1):
        ends = [e for e in range(count, len(tokens)) if tokens[e - count : e] == tokens[len(tokens) - count :]]
        if ends:
            wanted = tokens[ends[-1] : ends[-1] + most]
            break
    assert lookup(tokens, most) == wanted


@pytest.mark.parametrize("fault", ["raises", "short"])
def test_a_drafter_that_raises_is_switched_off(fault: str) -> None:
    """A drafter's error ends the step or the run, is said in every step, or the texts are others."""
    asked: list[int] = []

    def drafter(sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        asked.append(len(sequences))
        if len(asked) < 3:
            return [[] for _ in sequences]
        if fault == "short":
            return []
        raise ValueError("no weights")

    (plain,) = make()[0].generate(group("a", [1, 2, 3], 1, 26, stop=()))
    engine, _ = make(draft=at_most(4), drafter=Told(drafter))
    with pytest.warns(TandemWarning, match="switched off") as told:
        (done,) = engine.generate(group("a", [1, 2, 3], 1, 26, stop=()))
    assert done.tokens == plain.tokens and len(asked) == 3 and len(told) == 1
    renewed = engine.renewed()
    assert renewed.scheduler.drafting.off == engine.scheduler.drafting.off != ""


def test_numbers_of_sequences_never_come_again() -> None:
    """An engine that is renewed numbers its sequences from 0: a drafter takes another text for one that it knows."""
    engine, _ = make(draft=DraftConfig("suffix", 4, lengths="fixed"), drafter=None)
    (first,) = engine.generate(group("a", [1, 2, 3], 1, 26, stop=()))
    engine = engine.renewed()
    engine.generate(group("b", [9, 8, 7], 1, 12, stop=()))
    drafter = engine.scheduler.drafting.drafter
    assert isinstance(drafter, SuffixLookup)
    (history,) = drafter._tenants.values()
    assert [list(text)[:3] for text in history._texts.values()] == [[1, 2, 3], [9, 8, 7]]
    assert list(history._texts.values())[0].tolist() == [1, 2, 3, *first.tokens]


def test_ids_of_no_token_are_dropped_and_counted() -> None:
    """An id outside the vocabulary reaches the model, or takes the right drafts before it along."""
    engine, runner = make(draft=at_most(4), drafter=Told(lambda _, most: [[4, 1 << 16, 4, 4][:n] for n in most]))
    request = group("a", [1, 2, 3], 1, 12, stop=())[0]
    check(engine.generate([request])[0], request, runner)
    stats = engine.stats
    assert stats.drafted_at == (stats.drafts,) and stats.invalid_drafts > 2 * stats.drafts > 0
    assert stats.offered_tokens == stats.drafted_tokens
    engine, runner = make(draft=at_most(4), drafter=Told(lambda _, most: [[-1][:n] for n in most]))
    check(engine.generate([request])[0], request, runner)
    assert engine.stats.invalid_drafts == 10 and not engine.stats.drafts
    assert engine.stats.undrafted == (0, 0, 10, 1, 0)  # the last step has no room


def test_counts_of_drafts_by_position_and_by_hit() -> None:
    """A position is counted from elsewhere, a draft is counted as another request's, or counts do not add up."""
    s = drafting([70, 71, 72])
    ask(s, "a", 3, 40)
    ask(s, "b", 3, 40)
    step(s, [60, 60])
    s.live["b"].cached_tokens = 64
    step(s, [70, 99, 0, 0, 70, 71, 99, 0])
    assert (s.stats.drafted_at, s.stats.accepted_at) == ((2, 2, 2), (2, 1, 0))
    assert (s.stats.drafted_found, s.stats.accepted_found) == ((3, 0, 3, 0, 0), (1, 0, 2, 0, 0))
    step(s, [70, 71, 72, 73, 99, 0, 0, 0])
    assert (s.stats.drafted_at, s.stats.accepted_at) == ((4, 4, 4), (3, 2, 1))
    assert s.stats.drafts == 4 and s.stats.accepted_tokens == sum(s.stats.accepted_at) == 6
    assert not s.stats.undrafted  # the first step ran prompts


def test_synthetic_drafts_stand_at_their_rate() -> None:
    """A rate that is another's, drafts that are all right or all wrong, or drafts of a request that nobody knows."""
    requests = group("a", [1, 2, 3], 8, 40, stop=())
    for rate in (0.0, 0.6, 1.0):
        config = DraftConfig("synthetic", 4, lengths="fixed", acceptance=rate)
        engine, runner = make(400, draft=config, drafter=None, batch_tokens=64)
        for request, done in zip(requests, engine.generate(requests), strict=True):
            check(done, request, runner)
        assert not engine.stats.drafts
        again = [replace(request, id=f"again {request.id}") for request in requests]
        for request, done in zip(again, engine.generate(again), strict=True):
            check(done, request, runner)
        tried, stood = engine.stats.drafted_at[0], engine.stats.accepted_at
        low, high = wilson_interval(stood[0], tried, z=4)
        assert low <= rate <= high and tried > 60
        if rate == 0.6:
            low, high = wilson_interval(stood[1], stood[0], z=4)
            assert low <= rate <= high


class Timed(PagedMemory):
    """Its steps take ten seconds, and one more a row."""

    now_s = 0.0

    def run(self, batch: Batch) -> Sampled:
        self.now_s += 10 + batch.num_tokens
        return super().run(batch)


class TimedDevice(Device):
    """The same on a device; `most_out`: batches that were on it at once."""

    now_s, most_out = 0.0, 0

    def run(self, batch: Batch) -> Sampled:
        self.now_s += 10 + batch.num_tokens
        return super().run(batch)

    def start(self, batch: Batch) -> Callable[[], Sampled]:
        wait = super().start(batch)
        self.most_out = max(self.most_out, len(self.out))
        return wait


def test_a_device_runs_ahead_while_drafting_sleeps() -> None:
    """A device waits for its host though nothing is drafted, or drafts are made of what it has not drawn yet."""
    config = DraftConfig("lookup", 4)
    rights = [0] * 20 + [4] * 400
    engine, device = make(600, draft=config, drafter=guesses(rights), batch_tokens=64, memory=TimedDevice)
    assert isinstance(device, TimedDevice)
    engine.clock = lambda: device.now_s
    engine.scheduler.drafting.clock = lambda: 0.0
    requests = group("a", [1, 2, 3], 1, 300, stop=()) + group("b", [1, 2, 3, 4], 1, 300, stop=())
    steps = []
    for request in requests:
        before = engine.stats.batches
        check(engine.generate([request])[0], request, device)
        steps.append(engine.stats.batches - before)
        engine.check_integrity()
    assert device.most_out == 2 and max(steps) < 150


def test_lengths_sleep_and_wake_in_an_engine() -> None:
    """An engine that no draft pays in asks its drafter in every step, or never again; or its texts are others."""
    asked: list[int] = []
    ends = {"right": 0}

    def drafter(sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        asked.append(sum(most))
        return guesses([ends["right"]]).draft(sequences, most)

    config = DraftConfig("lookup", 4)
    engine, runner = make(600, draft=config, drafter=Told(drafter), batch_tokens=64, memory=Timed)
    assert isinstance(runner, Timed)
    engine.clock = lambda: runner.now_s
    engine.scheduler.drafting.clock = lambda: 0.0
    (request,) = group("a", [1, 2, 3], 1, 400, stop=())
    check(engine.generate([request])[0], request, runner)
    assert 0 < len(asked) < 60 and engine.stats.undrafted[1] > 300
    ends["right"] = 4
    before = engine.stats.batches
    (request,) = group("b", [1, 2, 3, 4], 1, 400, stop=())
    check(engine.generate([request])[0], request, runner)
    assert engine.stats.batches - before < 130
