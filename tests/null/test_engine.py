"""The engine over a fake runner that has nothing but the paged memory to know a context by (paged_memory.py)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Batch
from tandem.engine.deal import Deals
from tandem.engine.engine import Engine
from tandem.engine.layout import WHOLE, KvLayout
from tandem.errors import CapacityError, ConfigError, NonFiniteError
from tandem.types import Completion, Reach, Request, Sampling, StopReason, WeightVersion
from tests.drafting import at_most
from tests.null.paged_memory import STOP, VOCAB, Device, DeviceFailed, PagedMemory, alone, check, group, guesses, make

prompts = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.integers(1, 14).map(lambda length: [0, 1, 2, 3] * 3 + [5, 5] if length == 14 else ([0, 1, 2, 3] * 3)[:length]),
)
stops, broken = st.sampled_from([(), (STOP,)]), st.sampled_from([None, None, None, 0, 2, 5])
submits = st.tuples(st.just("submit"), prompts, st.integers(1, 4), st.integers(1, 12), stops, broken)
actions = st.one_of(
    submits,
    submits,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("receive"), st.integers(0, 2)),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("fail")),
    st.tuples(st.just("follow"), st.integers(0, 9), st.integers(0, 9), st.lists(st.integers(0, 1), max_size=3)),
)


reaches = st.one_of(
    st.just(Reach()), st.integers(1, 7).map(lambda n: Reach(window=n)), st.integers(1, 7).map(lambda n: Reach(chunk=n))
)
layouts = st.one_of(
    st.just(WHOLE), st.builds(KvLayout.of, st.lists(reaches, min_size=1, max_size=3), st.sampled_from([0, 0, 3]))
)


@st.composite
def engines(pick: st.DrawFn) -> tuple[Engine, PagedMemory]:
    """Of any size, order and layout, over a memory or a device."""
    size, most = pick(st.sampled_from([2, 4, 8])), pick(st.integers(1, 6))
    layout = pick(layouts)
    drafter = pick(st.one_of(st.none(), st.lists(st.integers(0, 5), min_size=1, max_size=7).map(guesses)))
    order = pick(st.sampled_from(["arrival", "longest", "fair", "shares"]))
    branches = 1 if order == "shares" else pick(st.sampled_from([1, 2, 3]))
    return make(
        layout.most_pages(12, 1, size) + pick(st.integers(0, 6)),  # a few requests never fit, and two often don't
        layout=layout,
        memory=pick(st.sampled_from([PagedMemory, Device])),
        drafter=drafter,
        draft=at_most(pick(st.sampled_from([0, 0, 1, 4, 9])), branches),
        order=order,
        page_tokens=size,
        batch_tokens=most + pick(st.integers(0, 12)),
        max_sequences=most,
        lookahead_tokens=pick(st.sampled_from([0, 0, 1, 5])),
        share_prefixes=pick(st.sampled_from([True, True, True, False])),
    )


TENANTS = ("", "a", "a/b", "c")


@dataclass
class Play:
    """Plays a script of actions on an engine, and keeps what was asked and what came."""

    engine: Engine
    runner: PagedMemory
    requests: dict[str, Request] = field(default_factory=dict)
    done: dict[str, Completion] = field(default_factory=dict)

    def step(self) -> None:
        try:
            completions = self.engine.step()
        except DeviceFailed:
            completions = []
        for completion in completions:
            assert completion.request_id not in self.done
            self.done[completion.request_id] = completion
        for one in self.engine.scheduler.running:
            if one.pages is not None:
                self.runner.admitted(one.arrival, one.pages.tables, one.computed, self.engine.version.step)
        self.engine.check_integrity()
        if isinstance(self.engine.scheduler.order, Deals):
            self.engine.scheduler.order.tree.check_integrity()

    def lands(self) -> None:
        """What aborts and updates do before all else; it may fail too."""
        with suppress(DeviceFailed):
            self.engine._land()

    def submit(self, request: Request) -> None:
        tokens = len(request.tokens) + request.sampling.max_new_tokens - 1
        if self.runner.layout.most_pages(tokens, 1, self.runner.config.page_tokens) > self.runner.num_pages:
            with pytest.raises(CapacityError):
                self.engine.submit(request)
        else:
            self.engine.submit(request)
            self.requests[request.id] = request

    def act(self, action: tuple, name: str) -> None:  # type: ignore[type-arg]
        verb, *rest = action
        if verb == "submit":
            shared = self.runner.config.order == "shares"
            for request in group(name, *rest):
                self.submit(replace(request, tenant=TENANTS[int(name[1:]) % len(TENANTS)]) if shared else request)
        elif verb == "follow":
            which, most, said = rest
            if self.done:  # another turn, or another way on from the midst of one
                completion = list(self.done.values())[which % len(self.done)]
                context = [*self.requests[completion.request_id].tokens, *completion.tokens[:most], *said]
                ran = len(context) - len(said) - 1
                tenant = self.requests[completion.request_id].tenant
                self.submit(replace(group(name, context, 1, 3)[0], ran=max(0, ran), tenant=tenant))
        elif verb == "abort":
            self.lands()
            if live := list(self.engine.scheduler.live):
                completion = self.engine.abort(live[rest[0] % len(live)])
                assert completion is not None and completion.stop_reason is StopReason.ABORTED
                self.done[completion.request_id] = completion
        elif verb == "fail":
            if isinstance(self.runner, Device):
                self.runner.fails = True
        elif verb == "receive":
            self.lands()
            self.engine.receive(WeightVersion(rest[0], f"digest {rest[0]}"))
        else:
            for _ in range(rest[0]):
                self.step()
        self.engine.check_integrity()


@given(made=engines(), script=st.lists(actions, min_size=8, max_size=24))
@settings(max_examples=600, deadline=None)
def test_every_request_gives_what_it_gives_alone(made: tuple[Engine, PagedMemory], script: list[tuple]) -> None:  # type: ignore[type-arg]
    """A wrong output, a stale hit, a leak or a livelock under some arrivals, aborts, updates, failures of devices and
    of draws, sizes and capacities."""
    engine, runner = made
    engine._checked = lambda sampled, batch: sampled  # type: ignore[method-assign]  # a first draw may fail alone
    play = Play(engine, runner)
    for number, action in enumerate(script):
        play.act(action, f"p{number}")
    if isinstance(runner, Device):
        runner.fails = False
    # The first running sequence moves in every step and is preempted by nobody. Else an older one that starts takes its
    # place; twice is for what displaced ones run again. A device is waited for once more.
    bound = 1 + 2 * sum(len(r.tokens) + r.sampling.max_new_tokens for r in play.requests.values())
    for _ in range(bound):
        if not engine.has_work:
            break
        play.step()
    assert not engine.has_work, f"still busy after {bound} steps"
    assert play.done.keys() == play.requests.keys()
    for request_id, completion in play.done.items():
        check(completion, play.requests[request_id], runner)
    pool, stats = engine.scheduler.pool, engine.stats
    assert pool.num_available == pool.num_pages and not engine.scheduler.promised
    lost = runner.run_tokens - stats.run_tokens
    assert lost >= 0 if isinstance(runner, Device) else lost == 0
    assert stats.finished + stats.aborted == len(play.requests)
    assert stats.failed == sum(completion.stop_reason is StopReason.FAILED for completion in play.done.values())
    assert stats.sampled_tokens == sum(len(completion.tokens) for completion in play.done.values())
    if type(runner) is PagedMemory or not any(action[0] == "fail" for action in script):
        assert stats.prefilled_tokens == runner.prefilled and stats.repeated_tokens == runner.repeated
        assert stats.recomputed_tokens == runner.recomputed
        undrawn = [len(one.tokens) - (one.stop_reason is not StopReason.FAILED) for one in play.done.values()]
        rejected = stats.drafted_tokens - stats.accepted_tokens
        named = runner.prefilled + runner.repeated + runner.recomputed + rejected + stats.dropped_tokens
        assert stats.run_tokens - named == sum(max(0, rows) for rows in undrawn)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    copies=st.integers(1, 6),
    page_tokens=st.sampled_from([2, 4, 8]),
    spare_tokens=st.integers(0, 20),
    late=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_a_groups_prompt_is_prefilled_once(
    lengths: list[int], copies: int, page_tokens: int, spare_tokens: int, late: int
) -> None:
    """Siblings submitted together, or while the first one's prompt is still running, compute it again."""
    engine, runner = make(
        400, page_tokens=page_tokens, batch_tokens=16 + spare_tokens, max_sequences=16, lookahead_tokens=0
    )
    groups = [group(f"g{k}", [k, *range(length - 1)], copies, 5, stop=()) for k, length in enumerate(lengths)]
    for siblings in groups:
        engine.submit(siblings[0])
    for _ in range(late):
        engine.step()
    for siblings in groups:
        for request in siblings[1:]:
            engine.submit(request)
    while engine.has_work:
        engine.step()
    assert runner.prompt_tokens_run == sum(length + copies - 1 for length in lengths)
    assert engine.stats.cached_tokens == (copies - 1) * sum(length - 1 for length in lengths)
    assert engine.stats.recomputed_tokens == 0


def test_a_later_turn_finds_the_earlier_one() -> None:
    """Generated blocks left out of the index: every turn of a program prefills its whole past."""
    engine, _ = make()
    (first,) = engine.generate(group("a", [1, 2, 3, 4, 5], 1, 8, stop=()))
    (second,) = engine.generate(group("b", [1, 2, 3, 4, 5, *first.tokens, 0, 0], 1, 2, stop=()))
    assert second.cached_tokens == 12  # of 5 + 8 - 1 tokens whose keys and values exist


def test_a_batch_is_started_before_the_last_is_waited_for() -> None:
    """The device idles while the host plans, or a length that is known beforehand is found out a token too late."""
    engine, device = make(memory=Device)
    assert isinstance(device, Device)
    (one, two) = group("a", [1, 2, 3, 4, 5], 2, 4, stop=())
    engine.submit(one)
    engine.submit(two)
    out = []
    while engine.has_work:
        engine.step()
        out.append(len(device.out))
    assert out == [1] * 5 + [0]  # of batches on the device after each step
    assert device.run_tokens == engine.stats.run_tokens == 5 + 1 + 2 * 3


@pytest.mark.parametrize("memory", [PagedMemory, Device])
def test_a_draw_that_fails_ends_its_request_alone(memory: type[PagedMemory]) -> None:
    """One row's NaN ends everybody's step, is sampled from, or is found again by who shares its prompt."""
    engine, runner = make(memory=memory)
    requests = group("a", [1, 2, 3, 4, 5], 3, 9, stop=(), broken=3)
    done = engine.generate(requests)
    assert [completion.stop_reason.value for completion in done] == ["failed", "length", "length"]
    for completion, request in zip(done, requests, strict=True):
        check(completion, request, runner)
    engine.check_integrity()
    context = [*requests[0].tokens, *done[0].tokens]  # 8: the step that failed filled the second block
    (again,) = engine.generate(group("b", [*context, 0], 1, 1, stop=()))
    assert len(context) == 8 and again.cached_tokens == 4


@pytest.mark.parametrize("memory", [PagedMemory, Device])
def test_weights_are_at_fault_where_nothing_was_ever_drawn_with_them(memory: type[PagedMemory]) -> None:
    """Every request of a run fails, one by one, for weights that are not finite; or a last row's NaN ends a run."""
    engine, runner = make(memory=memory)
    one, two, three, four = (group(name, [1, 2, 3], 1, 3, stop=(), broken=0) for name in "abcd")
    for bad in (one, two):
        with pytest.raises(NonFiniteError, match="/0 broke"):
            engine.generate(bad)
        assert not engine.has_work
        engine.check_integrity()
        if isinstance(runner, Device):
            runner.out.clear()  # the batch behind the one that failed: nobody waits for it
    assert engine.generate(group("good", [1, 2, 3], 1, 3, stop=()))[0].stop_reason is StopReason.LENGTH
    assert engine.generate(three)[0].stop_reason is StopReason.FAILED
    engine.receive(WeightVersion(1, "other"))
    with pytest.raises(NonFiniteError, match="d/0 broke"):
        engine.generate(four)


def test_generate_keeps_order_and_leaves_others_to_step() -> None:
    """Completions in order of finishing, or somebody else's completion swallowed by a generate()."""
    engine, runner = make()
    (other,) = group("other", [3, 3], 1, 2, stop=())
    engine.submit(other)
    requests = group("a", [1, 2], 1, 9, stop=()) + group("b", [2, 1], 1, 1, stop=())
    done = engine.generate(requests)
    assert [completion.request_id for completion in done] == ["a/0", "b/0"]
    for completion, request in zip(done, requests, strict=True):
        check(completion, request, runner)
    assert engine.has_work
    assert [completion.request_id for completion in engine.step()] == ["other/0"]
    assert not engine.has_work and engine.step() == []
    assert engine.generate([]) == []


def test_generate_that_fails_leaves_nothing_behind() -> None:
    """A refused request, or a runner that raises, leaves its companions running and their ids taken."""
    engine, runner = make(num_pages=4)
    requests = group("a", [1, 2], 2, 9, stop=())
    with pytest.raises(CapacityError):
        engine.generate([*requests, *group("big", [1] * 30, 1, 9)])
    assert not engine.has_work
    run, runner.run = runner.run, None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        engine.generate(requests)
    assert not engine.has_work
    engine.check_integrity()
    runner.run = run  # type: ignore[method-assign]
    for completion, request in zip(engine.generate(requests), requests, strict=True):
        check(completion, request, runner)


def test_a_step_whose_runner_raised_may_be_tried_again() -> None:
    """A token lost or run twice, or a finished completion dropped, when a device fails once."""
    engine, runner = make()
    requests = group("a", [1, 2, 3], 3, 4, stop=())
    for request in requests:
        engine.submit(request)
    run, done = runner.run, []
    while engine.has_work:
        runner.run = None  # type: ignore[method-assign,assignment]
        with pytest.raises(TypeError):
            engine.step()
        runner.run = run  # type: ignore[method-assign]
        done += engine.step()
    for completion in done:
        check(completion, requests[int(completion.request_id[-1])], runner)
    assert len(done) == 3 and engine.stats.run_tokens == runner.run_tokens == 3 + 2 + 9
    assert runner.copied == 2


def test_abort_returns_what_there_is_once() -> None:
    """An aborted request whose tokens are lost, that is returned twice, or whose pages stay held."""
    engine, runner = make(num_pages=4, max_sequences=1)
    running, waiting = group("a", [1, 2, 3], 2, 9, stop=())
    engine.submit(running)
    engine.submit(waiting)
    engine.step()
    engine.step()
    aborted = engine.abort("a/0")
    assert aborted is not None and len(aborted.tokens) == 2
    assert aborted.columns["versions"].tolist() == [0, 0]
    check(aborted, running, runner)
    never_ran = engine.abort("a/1")
    assert never_ran is not None and never_ran.tokens == () and never_ran.started_s == never_ran.finished_s
    assert engine.abort("a/0") is None and engine.abort("nobody") is None
    assert not engine.has_work and engine.step() == []
    engine.check_integrity()


def test_no_progress_raises_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that plans nothing while requests are live spins for ever."""
    engine, _ = make()
    monkeypatch.setattr(engine.scheduler, "plan", lambda now: Batch([], engine.version, 0))
    with pytest.raises(AssertionError, match="no progress: 0 running, 1 waiting"):
        engine.generate(group("a", [1], 1, 1))


PIECES = {0: b"", 1: b"a", 2: b"b", 3: b"\xc3", 4: b"\xa9", 5: b"ab", 6: b" "}


def decode(tokens: list[int]) -> str:
    return b"".join(PIECES[token] for token in tokens).decode(errors="replace")


@given(
    strings=st.lists(st.text("ab é", min_size=1, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
    empty=st.integers(0, 6),
    rights=st.lists(st.integers(0, 6), max_size=3),
)
@settings(max_examples=150, deadline=None)
def test_stop_strings_end_where_the_whole_text_first_holds_one(
    strings: list[str], seed: int, empty: int, rights: list[int]
) -> None:
    """A stop string missed across tokens, split characters, tokens without text or drafts, or found in the prompt."""

    def patchy(tokens: list[int]) -> str:  # the first `empty` ids decode to nothing
        return decode([token for token in tokens if token >= empty])

    engine, _ = make(decode=patchy, drafter=guesses(rights or [0]), draft=at_most(5 * bool(rights)))
    sampling = Sampling(max_new_tokens=40, stop_strings=tuple(strings))
    (completion,) = engine.generate([Request("r", "r", (1, 2, 5, 6, 3, 4), sampling, seed)])
    whole, _ = alone(Request("r", "r", (1, 2, 5, 6, 3, 4), Sampling(max_new_tokens=40), seed))
    ends = [n for n in range(1, 41) if any(string in patchy(list(whole[:n])) for string in strings)]
    assert completion.tokens == whole[: ends[0] if ends else 40]
    assert completion.stop_reason is (StopReason.STOP_STRING if ends else StopReason.LENGTH)


def test_stop_strings_need_a_decoder_and_a_text() -> None:
    """Stop strings silently ignored, or an empty one that ends every request at its first token."""
    engine, _ = make()
    with pytest.raises(ConfigError, match="no decode function"):
        engine.submit(Request("r", "r", (1,), Sampling(stop_strings=("x",)), 0))
    engine, _ = make(decode=decode)
    with pytest.raises(ConfigError, match="empty stop string"):
        engine.submit(Request("r", "r", (1,), Sampling(stop_strings=("x", "")), 0))
    assert not engine.has_work


def test_an_adapter_that_is_not_served_is_refused() -> None:
    """The weights without it answer in its name."""
    engine, _ = make()
    with pytest.raises(ConfigError, match="request 'r' asks for adapter 'mine', and this engine serves none"):
        engine.submit(Request("r", "r", (1,), Sampling(), 0, adapter="mine"))
    assert not engine.has_work


def test_a_long_stop_string_and_one_spread_over_empty_tokens_are_found() -> None:
    """A tail cut to the shortest of several stop strings, or to as many tokens as characters."""
    for decode_as, string in ((lambda token: "x", "x" * 12), (lambda token: "x" * (token == 6), "xxx")):
        engine, _ = make(decode=lambda tokens, f=decode_as: "".join(map(f, tokens)))
        sampling = Sampling(max_new_tokens=60, stop_strings=("y", string))
        (completion,) = engine.generate([Request("r", "r", (1,), sampling, 0)])
        text = "".join(map(decode_as, completion.tokens))
        assert completion.stop_reason is StopReason.STOP_STRING and text == string
        assert len(completion.tokens) >= 12


def test_a_stop_token_beats_a_stop_string() -> None:
    """The reason depends on the order of two checks: a program that waits for its stop token sees a stop string."""
    engine, _ = make(decode=lambda tokens: "x" * len(tokens))
    sampling = Sampling(stop_token_ids=tuple(range(VOCAB)), stop_strings=("x",))
    (completion,) = engine.generate([Request("r", "r", (1,), sampling, 0)])
    assert completion.stop_reason is StopReason.STOP_TOKEN


def test_the_decoder_sees_only_a_tail() -> None:
    """The whole text decoded again for every token: quadratic in the length."""
    seen: list[int] = []

    def counting(tokens: list[int]) -> str:
        seen.append(len(tokens))
        return "x" * len(tokens)

    engine, _ = make(decode=counting)
    engine.generate([Request("r", "r", (1,), Sampling(max_new_tokens=60, stop_strings=("abc",)), 0)])
    assert max(seen) <= 2 * (3 + 4) and len(seen) == 60


def test_idle_engine_finds_a_leaked_page() -> None:
    """A page that no sequence holds goes unnoticed until memory runs out."""
    engine, _ = make()
    engine.scheduler.pool.take()
    with pytest.raises(AssertionError, match="1 pages held by nobody"):
        engine.generate(group("a", [1], 1, 1))
    engine, _ = make()
    engine.scheduler.pool._free.pop()
    with pytest.raises(AssertionError, match="of 64 pages"):
        engine.generate(group("a", [1], 1, 1))


def test_falling_idle_costs_nothing_that_grows_with_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer to a single user waits for a walk over all pages."""

    def walk(*args: object) -> None:
        raise AssertionError("walked over all pages")

    engine, runner = make()
    for owner in (engine, engine.scheduler.pool, engine.scheduler.index):
        monkeypatch.setattr(owner, "check_integrity", walk)
    (request,) = group("a", [1, 2, 3], 1, 3)
    check(engine.generate([request])[0], request, runner)


@settings(deadline=None)
@given(
    vocab=st.integers(1, 1000),
    tokens=st.lists(st.integers(-(2**70), 2**70) | st.integers(-3, 1003), min_size=1, max_size=9),
    stops=st.lists(st.integers(-3, 1003), max_size=3),
)
def test_ids_outside_the_vocabulary_are_refused(vocab, tokens, stops) -> None:
    """An id that the embedding has no row for is queued and read from what lies beyond it, or its place is misnamed."""
    engine, _ = make()
    engine.vocab_size = vocab
    request = Request("r", "r", tuple(tokens), Sampling(max_new_tokens=1, stop_token_ids=tuple(stops)), 0)
    named = [("token", tokens), ("stop_token_ids", stops)]
    wrong = [(what, i, t, len(ids)) for what, ids in named for i, t in enumerate(ids) if t not in range(vocab)]
    if not wrong:
        engine.submit(request)
        return
    what, place, token, count = wrong[0]
    said = f"request 'r': {what} {token}, in place {place} of {count}, is outside the vocabulary of this model."
    with pytest.raises(ConfigError) as refused:
        engine.generate([request])
    assert str(refused.value).startswith(f"{said} Allowed: 0 to {vocab - 1}.") and not engine.has_work


@pytest.mark.parametrize(
    ("seed", "filters", "said"),
    [
        (2**64, {}, "seed is 18446744073709551616. Allowed: 0 to"),
        (-1, {}, "seed is -1"),
        (0, {"top_k": 2**31}, "top_k is 2147483648. Allowed: 0"),
        (0, {"top_k": -1}, "top_k is -1"),
        (0, {"top_p": 1.5}, "top_p is 1.5"),
        (0, {"min_p": -0.1}, "min_p is -0.1"),
        (0, {"temperature": -1.0}, "temperature is -1.0"),
        (0, {"temperature": float("nan")}, "temperature is nan"),
        (0, {"temperature": 1e300}, r"temperature is 1e\+300"),
    ],
)
def test_numbers_that_the_sampler_does_not_have_are_refused(seed, filters, said) -> None:
    """A seed beyond 64 bits, or a filter out of its range, ends all that runs in a traceback at its first draw."""
    engine, _ = make()
    with pytest.raises(ConfigError, match=f"request 'r': {said}"):
        engine.submit(Request("r", "r", (1,), Sampling(**filters), seed))
    engine.submit(Request("r", "r", (1,), Sampling(top_k=2**31 - 1, top_p=0.0, min_p=1.0), 2**64 - 1))
