"""The scheduler's rules, one at a time, on cases worked by hand. Pages hold 4 tokens unless said otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.columns import Columns
from tandem.engine.admit import Lengths, count_pages
from tandem.engine.batch import Batch, Sampled, Sequence
from tandem.engine.config import EngineConfig
from tandem.engine.integrity import check_integrity
from tandem.engine.layout import KvLayout
from tandem.engine.schedule import Scheduler
from tandem.errors import CapacityError, ConfigError
from tandem.types import Completion, Reach, Request, Sampling, StopReason, WeightVersion


def scheduler(num_pages: int = 100, max_context: int | None = None, **settings: Any) -> Scheduler:
    config = EngineConfig(
        **{"page_tokens": 4, "batch_tokens": 16, "max_sequences": 8, "lookahead_tokens": 0} | settings
    )
    return Scheduler(config, num_pages, max_context)


def request(
    name: str, tokens: range | list[int], max_new_tokens: int = 4, stop: tuple[int, ...] = (), **more: Any
) -> Request:
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=stop)
    return Request(name, name, tuple(tokens), sampling, seed=0, **more)


def commit(s: Scheduler, batch: Batch, token: int = 99) -> list[Completion]:
    finished = s.commit(batch, Sampled([token] * batch.num_draws, {"logprobs": [-1.0] * batch.num_draws}), now=1.0)
    check_integrity(s)
    return finished


def table_of(sequence: Sequence) -> list[int]:
    assert sequence.pages is not None
    return list(sequence.pages.tables[0])


def shape(batch: Batch) -> list[tuple[str, int, int, bool]]:
    """(request, first position, tokens, samples) of each work."""
    return [(work.request.id, work.start, len(work.tokens), work.draws) for work in batch.works]


def step(s: Scheduler) -> list[tuple[str, int, int, bool]]:
    batch = s.plan(now=0.0)
    commit(s, batch)
    return shape(batch)


def test_decodes_come_first_and_chunks_fill_the_budget() -> None:
    """A long prompt that stalls the decodes, a step over its budget, or a chunk that samples too early."""
    s = scheduler(batch_tokens=8)
    s.submit(request("a", range(3)), 0.0)
    assert step(s) == [("a", 0, 3, True)]
    s.submit(request("b", range(100, 118)), 0.0)
    s.submit(request("c", range(200, 202)), 0.0)
    assert step(s) == [("a", 3, 1, True), ("b", 0, 7, False)]
    assert step(s) == [("a", 4, 1, True), ("b", 7, 7, False)]
    batch = s.plan(0.0)
    assert shape(batch) == [("a", 5, 1, True), ("b", 14, 4, True), ("c", 0, 2, True)]
    assert (batch.num_tokens, batch.num_draws) == (7, 3)
    assert batch.works[1].tokens == [114, 115, 116, 117]
    (done,) = commit(s, batch)
    assert (done.request_id, done.tokens, done.stop_reason) == ("a", (99,) * 4, StopReason.LENGTH)


def test_siblings_wait_for_the_shared_blocks_and_run_only_the_rest() -> None:
    """A group's prompt prefilled once a sibling."""
    s = scheduler(batch_tokens=8)
    for name in ("a", "b", "c"):
        s.submit(request(name, range(10)), 0.0)
    assert step(s) == [("a", 0, 8, False)]
    assert step(s) == [("a", 8, 2, True)]
    batch = s.plan(0.0)
    assert shape(batch) == [("a", 10, 1, True), ("b", 9, 1, True), ("c", 9, 1, True)]
    tables = [table_of(sequence) for sequence in s.running]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2] and len({table[2] for table in tables}) == 3
    assert batch.copies == {tables[1][2]: tables[0][2], tables[2][2]: tables[0][2]}
    commit(s, batch)
    assert s.stats.cached_tokens == 18 and s.stats.run_tokens == 13 and s.plan(0.0).copies == {}


def test_the_last_token_of_an_aligned_prompt_is_run() -> None:
    """A prompt found whole in the index leaves nothing to run, so no logits and no first token."""
    s = scheduler()
    s.submit(request("a", range(8)), 0.0)
    step(s)
    s.abort("a", 0.0)  # nobody is left to copy the last block from
    s.submit(request("b", range(8)), 0.0)
    assert step(s)[-1] == ("b", 4, 4, True)


def test_a_waiting_sibling_does_not_hold_up_others() -> None:
    """Head-of-line blocking: everything queued behind a group waits for the group's prompt."""
    s = scheduler(batch_tokens=12)
    for name, tokens in (("a", range(8)), ("b", range(8)), ("c", range(50, 54))):
        s.submit(request(name, tokens), 0.0)
    assert step(s) == [("a", 0, 8, True), ("c", 0, 4, True)]
    assert [sequence.request.id for sequence in s.waiting] == ["b"]
    assert step(s)[-1] == ("b", 7, 1, True)
    assert [sequence.request.id for sequence in s.running] == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["abort", "receive"])
def test_a_promise_ends_with_its_maker(how: str) -> None:
    """A sibling waits for ever for a block whose maker was aborted, or will now make it of other weights."""
    s = scheduler(batch_tokens=8)
    s.submit(request("a", range(20)), 0.0)
    s.submit(request("b", range(20)), 0.0)
    assert step(s) == [("a", 0, 8, False)]
    if how == "abort":
        aborted = s.abort("a", 5.0)
        assert aborted is not None and aborted.tokens == () and aborted.stop_reason is StopReason.ABORTED
        assert step(s) == [("b", 8, 8, False)]  # what a had finished is still there
    else:
        s.receive(WeightVersion(1, "new"))
        assert step(s) == [("a", 8, 8, False)]
        assert step(s) == [("a", 16, 4, True), ("b", 0, 4, False)]


def test_the_latest_arrival_is_preempted_keeps_its_tokens_and_resumes() -> None:
    """Preemption of an early sequence, lost generated tokens, or a victim readmitted in the step that evicted it."""
    s = scheduler(num_pages=4)
    s.submit(request("a", range(7), max_new_tokens=6), 0.0)
    s.submit(request("b", range(50, 57), max_new_tokens=6), 0.0)
    step(s)
    step(s)  # both now need a third page, and there is none
    assert step(s) == [("a", 8, 1, True)]
    assert [sequence.request.id for sequence in s.waiting] == ["b"] and s.stats.preemptions == 1
    assert s.live["b"].tokens[7:] == [99, 99] and s.live["b"].pages is None
    while "a" in s.live:
        assert all(work[0] == "a" for work in step(s))
    assert step(s)[0][0] == "b"
    while s.live:
        batch = s.plan(0.0)
        finished = commit(s, batch)
    assert finished[0].tokens == (99,) * 6 and finished[0].columns["versions"].tolist() == [0] * 6
    assert finished[0].recomputed_tokens == s.stats.recomputed_tokens
    assert s.stats.run_tokens == 7 + 7 + 2 * 5 + s.stats.recomputed_tokens
    assert s.pool.num_available == 4


def test_a_sequence_whose_last_token_is_being_drawn_waits_for_it() -> None:
    """A block is named after a token that nobody knows yet, and another with the same name is taken for it."""
    s = scheduler(8, batch_tokens=64)
    s.submit(request("short", range(300, 303)), 0.0)  # one page, not full: the cheapest to run again
    for number in range(3):
        s.submit(request(f"full {number}", range(10 * number, 10 * number + 4)), 0.0)
    s.submit(request("long", range(400, 413)), 0.0)
    s.running.reverse()
    first = s.plan(0.0)
    assert first.num_draws == 5 and s.pool.num_available == 0
    s.running.sort(key=lambda sequence: (sequence.request.id == "short", sequence.arrival))  # it is not the first
    s.advance(first)
    second = s.plan(0.0)
    assert shape(second) == [(f"full {number}", 4, 1, True) for number in range(3)] and s.pool.num_available == 2
    assert [work.tokens for work in second.works] == [[-2], [-3], [-4]]
    s.resolve(first, Sampled([99] * 5, {"logprobs": [-1.0] * 5}), 1.0)
    assert s.waiting[0].tokens == [300, 301, 302, 99]
    assert shape(s.plan(0.0))[3] == ("short", 0, 4, True)


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    """Preemption that throws away finished blocks nobody else wants: recompute costs the whole context."""
    s = scheduler(num_pages=5, batch_tokens=32)
    s.submit(request("a", range(7), max_new_tokens=3), 0.0)
    s.submit(request("b", range(50, 61), max_new_tokens=3), 0.0)
    step(s)
    step(s)
    assert step(s) == [("a", 8, 1, True)]  # takes b's last block; a ends
    assert step(s) == [("b", 8, 5, True)]
    assert s.live == {} and s.stats.recomputed_tokens == 4


def test_a_request_that_can_never_fit_is_refused_at_submit() -> None:
    """A request that is preempted by itself for ever, or one that would just fit refused."""
    s = scheduler(num_pages=3, kv_memory_bytes=3000)
    s.submit(request("fits", range(9), max_new_tokens=4), 0.0)  # 12 slots: the 13th token is never run
    with pytest.raises(
        CapacityError, match=r"prompt of 9 tokens.*13 tokens.*engine.kv_memory_bytes 3000 holds 12.*4000"
    ):
        s.submit(request("b", range(9), max_new_tokens=5), 0.0)
    assert list(s.live) == ["fits"]
    while s.live:
        step(s)


def test_the_models_positions_bound_a_context() -> None:
    """A token run at a position that the model does not have."""
    s = scheduler(max_context=10)
    with pytest.raises(CapacityError, match="10 positions"):
        s.submit(request("a", range(10)), 0.0)
    s.submit(request("b", range(8), max_new_tokens=100), 0.0)
    assert step(s) == [("b", 0, 8, True)]
    (done,) = commit(s, s.plan(0.0))
    assert len(done.tokens) == 2 and done.stop_reason is StopReason.LENGTH


@pytest.mark.parametrize(
    ("bad", "match"),
    [(request("a", []), "empty prompt"), (request("a", [1], 0), "max_new_tokens 0"), (request("live", [1]), "in use")],
)
def test_malformed_requests_are_refused(bad: Request, match: str) -> None:
    """An empty prompt, a request for nothing or a second owner of an id corrupts the queues."""
    s = scheduler()
    s.submit(request("live", [1]), 0.0)
    with pytest.raises(ConfigError, match=match):
        s.submit(bad, 0.0)
    assert list(s.live) == ["live"]
    check_integrity(s)


def test_stop_token_is_kept_and_beats_length() -> None:
    """A stop token dropped from the completion, or reported as LENGTH when it is also the last one allowed."""
    s = scheduler()
    s.submit(request("a", range(3), max_new_tokens=1, stop=(99,)), 0.0)
    (done,) = commit(s, s.plan(0.0))
    assert done.tokens == (99,) and done.stop_reason is StopReason.STOP_TOKEN


def test_blocks_of_two_versions_never_enter_the_index() -> None:
    """Keys and values computed over another version's served to a request of the new weights."""
    old, new = WeightVersion(0, ""), WeightVersion(1, "new")
    s = scheduler(batch_tokens=8)
    s.submit(request("a", range(19), max_new_tokens=9), 0.0)
    step(s)
    s.receive(new)
    while s.live:
        finished = commit(s, s.plan(0.0))
    assert len(s.index) == 2 and finished[0].columns["versions"].tolist() == [1] * 9
    s.submit(request("b", range(19), max_new_tokens=1), 0.0)
    assert step(s)[0] == ("b", 0, 8, False)
    s.abort("b", 0.0)
    s.receive(old)  # the blocks of the old weights were not flushed
    s.submit(request("c", range(19), max_new_tokens=1), 0.0)
    assert step(s)[0] == ("c", 8, 8, False)


def test_versions_are_of_each_token() -> None:
    """A token attributed to weights that did not sample it."""
    s = scheduler()
    s.submit(request("a", range(3), max_new_tokens=5), 0.0)
    for version in (0, 0, 2, 3):
        s.receive(WeightVersion(version, "" if version == 0 else "x"))
        step(s)
    (done,) = commit(s, s.plan(0.0))
    assert done.columns["versions"].tolist() == [0, 0, 2, 3, 3]


@pytest.mark.parametrize("values", [{"logprobs": []}, {"logprobs": [-1.0], "kept": [b"", b""]}])
def test_a_runner_gives_a_value_for_each_draw(values: dict[str, list[Any]]) -> None:
    """A column that is too short or too long is booked on the wrong requests."""
    s = scheduler()
    s.submit(request("a", range(3)), 0.0)
    with pytest.raises(AssertionError, match="for 1 draws"):
        s.commit(s.plan(0.0), Sampled([7], values), 1.0)


def test_values_follow_their_tokens() -> None:
    """A value is booked for a neighbour in the batch, or a request that has none of a column gets an empty one."""
    s = scheduler()
    for number in range(3):
        s.submit(request(f"r{number}", range(10 * number, 10 * number + 3), max_new_tokens=2), 0.0)
    finished = []
    for step in range(2):
        values = {
            "logprobs": [-1.0 - step, -2.0 - step, -3.0 - step],
            "kept": [None, b"%d" % step, None],
            "unfiltered_logprobs": [None, -8.0 - step, None],
        }
        finished += s.commit(s.plan(0.0), Sampled([7, 8, 9], values), 1.0)
    done = {completion.request_id: completion.columns for completion in finished}
    plain = {"versions": (0, 0)}
    assert done["r0"] == Columns.of(tokens=(7, 7), logprobs=(-1.0, -2.0), **plain)
    filters = {"kept": (b"0", b"1"), "unfiltered_logprobs": (-8.0, -9.0)}
    assert done["r1"] == Columns.of(tokens=(8, 8), logprobs=(-2.0, -3.0), **plain, **filters)
    assert done["r2"] == Columns.of(tokens=(9, 9), logprobs=(-3.0, -4.0), **plain)


def test_a_plan_that_was_not_run_is_planned_again_or_withdrawn() -> None:
    """A runner that fails once loses a token, or a batch is committed to a sequence that was aborted under it."""
    s = scheduler()
    s.submit(request("a", range(6)), 0.0)
    s.submit(request("b", range(50, 56)), 0.0)
    first = s.plan(0.0)
    second = s.plan(0.0)
    assert shape(first) == shape(second) == [("a", 0, 6, True), ("b", 0, 6, True)]
    check_integrity(s)
    s.abort("b", 0.0)
    assert [len(work.tables[0]) for work in second.works] == [2, 2]  # a runner may still be reading
    with pytest.raises(AssertionError):
        commit(s, second)
    assert step(s) == [("a", 0, 6, True)]


def test_admission_leaves_room_to_grow_and_keeps_order() -> None:
    """Requests admitted only to be preempted at once, or a large request starved by small ones behind it."""
    s = scheduler(num_pages=6, lookahead_tokens=8)
    s.submit(request("a", range(4), max_new_tokens=9), 0.0)  # 1 page, 2 more ahead
    s.submit(request("b", range(50, 58), max_new_tokens=9), 0.0)  # 2 pages, 2 more ahead: one too many
    s.submit(request("c", range(90, 92), max_new_tokens=1), 0.0)  # would fit, but b is first
    assert step(s) == [("a", 0, 4, True)]
    while "a" in s.live:
        assert [work[0] for work in step(s)] == ["a"]
    assert [work[0] for work in step(s)] == ["b", "c"]
    assert s.stats.preemptions == 0


def test_the_cheapest_to_compute_again_is_preempted() -> None:
    """The latest arrival is preempted whatever it cost, or one that frees nothing."""
    s = scheduler(num_pages=10, batch_tokens=64)
    for name, tokens in (("a", range(8)), ("b", range(20, 29)), ("c", range(40, 56))):
        s.submit(request(name, tokens, max_new_tokens=6), 0.0)
    step(s)  # 2, 3 and 4 pages; a and c take the tenth page and one more, so b, of 9 tokens in 3 pages, makes room
    s.submit(request("d", range(90, 94)), 0.0)
    assert [work[0] for work in step(s)] == ["a", "c"]
    assert s.stats.preemptions == 1 and [sequence.request.id for sequence in s.waiting] == ["b", "d"]


def test_the_oldest_running_is_not_preempted_and_moves_in_every_step() -> None:
    """The cheapest victim is the one whose progress keeps the rest from going round for ever, or it waits for pages."""
    s = scheduler(num_pages=5, batch_tokens=64)
    s.submit(request("a", range(5), max_new_tokens=8), 0.0)  # 2 pages for 5 tokens: the cheapest
    s.submit(request("b", range(20, 32), max_new_tokens=4), 0.0)
    step(s)
    assert [work[0] for work in step(s)] == ["a"]
    preempted = 0
    for length in range(1, 9):
        s = scheduler(num_pages=8, batch_tokens=3, max_sequences=2, order="longest")
        s.submit(request("a", range(24), max_new_tokens=1), 0.0)
        s.submit(request("b", range(50, 50 + length), max_new_tokens=24), 0.0)
        while "a" not in [sequence.request.id for sequence in s.running]:
            step(s)
        while "a" in s.live:
            assert "a" in [work[0] for work in step(s)]
        preempted += s.stats.preemptions
    assert preempted


def test_pages_that_siblings_hold_are_not_worth_a_preemption() -> None:
    """A sequence whose blocks others keep alive is priced as if they were lost, or one that frees nothing is taken."""
    s = scheduler(num_pages=8, batch_tokens=64)
    for name in ("a", "b"):
        s.submit(request(name, range(17), max_new_tokens=8), 0.0)
    step(s)
    step(s)
    a, b = s.running
    assert a.pages is not None and b.pages is not None
    assert (a.pages.num_held, b.pages.num_held) == (5, 5) and a.pages.shared() == (4, 1)
    assert s._price(b) == (18 - 16 if b.computed == 18 else b.computed - 16, -1)


def play(s: Scheduler, most: int = 10_000) -> list[str]:
    """Request ids in the order in which they start."""
    started: list[str] = []
    for _ in range(most):
        if not s.live:
            break
        batch = s.plan(0.0)
        started += [work.request.id for work in batch.works if work.request.id not in started]
        commit(s, batch)
    return started


def test_longest_first_by_limit_and_by_siblings_that_ended() -> None:
    """The longest rollout of a step starts last, or siblings' lengths are not learnt."""
    s = scheduler(max_sequences=1, order="longest")
    for name, asked in (("x/0", 3), ("y/0", 9), ("z/0", 6)):
        s.submit(request(name, [1, 2], asked, group=name[:1]), 0.0)
    assert play(s) == ["y/0", "z/0", "x/0"]
    s.submit(request("short", [1, 2], 2), 0.0)  # of no group
    assert play(s) == ["short"]
    for name in ("x/1", "y/1", "new/0"):  # all may have 20; y's had 9, x's had 3
        s.submit(request(name, [1, 2], 20, group=name[:1]), 0.0)
    s.submit(request("alone", [1, 2], 20), 0.0)
    assert play(s) == ["new/0", "alone", "y/1", "x/1"]


def test_fair_order_starts_the_program_that_had_least() -> None:
    """One program's flood of requests holds up another's single one."""
    s = scheduler(max_sequences=1, order="fair", share_prefixes=False)
    for number in range(4):
        s.submit(Request(f"flood{number}", "flood", (1, 2, 3), Sampling(max_new_tokens=4), 0), 0.0)
    s.submit(Request("one", "other", (1, 2, 3), Sampling(max_new_tokens=4), 0), 0.0)
    s.submit(Request("two", "other", (1, 2, 3), Sampling(max_new_tokens=1), 0), 0.0)
    assert play(s) == ["flood0", "one", "flood1", "two", "flood2", "flood3"]


@pytest.mark.parametrize("order", ["arrival", "longest", "fair"])
def test_the_higher_priority_starts_first(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user waits behind a batch job, equals overtake each other, or the lowest waits for ever."""
    s = scheduler(max_sequences=1, order=order)
    for name, priority in (("job", -1), ("a", 0), ("urgent", 5), ("b", 0), ("also", 5)):
        s.submit(request(name, [1, 2], 4, priority=priority), 0.0)
    assert play(s) == ["urgent", "also", "a", "b", "job"]
    monkeypatch.setattr("tandem.engine.order.PATIENCE", 20)
    s.submit(request("job", [1, 2], 4, priority=-1), 0.0)
    for number in range(40):
        s.submit(request(f"urgent{number}", [5, number], 6, priority=5), 0.0)
        for _ in range(6):
            step(s)
        if "job" not in s.live:
            break
    assert 2 <= number <= 5


def test_adapters_and_tenants_find_no_prefix_of_each_others() -> None:
    """Keys and values of another adapter are attended to, or a tenant can time what another asked."""
    s = scheduler(batch_tokens=64)
    found = []
    for number, whose in enumerate([{}, {"adapter": "a"}, {"tenant": "a"}, {"adapter": "a", "tenant": "a"}] * 2):
        s.submit(request(f"r{number}", range(10), 1, **whose), 0.0)
        (done,) = commit(s, s.plan(0.0))
        found.append(done.cached_tokens)
    assert found == [0] * 4 + [9] * 4


@pytest.mark.parametrize("order", ["longest", "fair"])
def test_nobody_starves(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short request, or one of a program that had much, waits as long as others keep coming."""
    monkeypatch.setattr("tandem.engine.order.PATIENCE", 20)
    s = scheduler(max_sequences=1, order=order)
    s.submit(Request("had", "had", tuple(range(12)), Sampling(max_new_tokens=4), 0), 0.0)
    assert play(s) == ["had"]
    s.submit(Request("short", "had", (1, 2), Sampling(max_new_tokens=1), 0), 0.0)
    for number in range(40):
        s.submit(request(f"long{number}", [5, number], 6), 0.0)
        for _ in range(6):
            step(s)
        if "short" not in s.live:
            break
    assert 2 <= number <= 5


def test_admission_expects_what_others_took() -> None:
    """Room is left for a constant growth where all requests are known to end at once, or to go on for long."""

    def running(tokens_each: int) -> int:
        s = scheduler(num_pages=24, lookahead_tokens=8, batch_tokens=64)
        for _ in range(Lengths.ENOUGH):
            s.admission.lengths.record(tokens_each)
        for number in range(8):
            s.submit(request(f"r{number}", [number, 1, 2, 3], max_new_tokens=80), 0.0)
        step(s)
        return len(s.running)

    # beside the page of the prompt, none, 1 or 3 each; the first token is drawn in the same step
    assert [running(1), running(32), running(96)] == [8, 8, 6]
    lengths = Lengths()
    for tokens in range(Lengths.KEPT + 40):
        assert (lengths.remaining(0) is None) == (tokens < Lengths.ENOUGH)
        lengths.record(tokens)
    assert lengths.remaining(Lengths.KEPT + 37) == 2 and lengths.remaining(Lengths.KEPT + 39) is None
    assert lengths.remaining(0) == 40 + (Lengths.KEPT - 1) // 2 + 1


def test_sharing_switched_off_computes_every_prompt() -> None:
    """A parity study that compares a prefix hit with a prefix hit."""
    s = scheduler(share_prefixes=False, batch_tokens=64)
    for name in ("a", "b"):
        s.submit(request(name, range(10)), 0.0)
    assert step(s) == [("a", 0, 10, True), ("b", 0, 10, True)]
    assert len(s.index) == 0


def test_config_refuses_what_cannot_run() -> None:
    """A budget under which prompts starve, or a page of no tokens, accepted at start."""
    with pytest.raises(ConfigError, match="engine.batch_tokens is 4, less than engine.max_sequences 8"):
        EngineConfig(batch_tokens=4, max_sequences=8)
    for page_tokens in (0, 1, 12):
        with pytest.raises(ConfigError, match=f"engine.page_tokens is {page_tokens}; it must be a power of two"):
            EngineConfig(page_tokens=page_tokens)
    layout = KvLayout.of((Reach(),), 0, (10,))
    assert count_pages(layout, EngineConfig(kv_memory_bytes=1000)) == 6
    with pytest.raises(CapacityError, match="engine.kv_memory_bytes is 100, but one page of 16 tokens takes 160 bytes"):
        count_pages(layout, EngineConfig(kv_memory_bytes=100))
