"""The engine over a fake runner that has nothing but the paged memory to know a context by.

Each slot holds a group of layers, a token, its position, and a chain: a hash of the token, of the weight version that
ran it and of the chain before. Every slot that a query sees in some group is read back through the page tables. So a
wrong page table, a page given away too early, a shared page written to or a stale hit trips an assertion.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.config import EngineConfig
from tandem.engine.engine import Engine
from tandem.engine.layout import WHOLE, KvLayout
from tandem.engine.schedule import Batch, Sampled, Work
from tandem.errors import CapacityError, ConfigError
from tandem.types import Completion, Reach, Request, Sampling, StopReason, VersionSpan, WeightVersion

VOCAB = 7
STOP = 6


def draw(seed: int, context: list[int]) -> tuple[int, float]:
    """The next token after a context and its log-prob; depends on every token and on the position."""
    value = hash((seed, len(context), tuple(context)))
    return value % VOCAB, -(value % 1000) / 100.0


def alone(request: Request) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """What a request generates by itself, with no engine."""
    context, logprobs = list(request.tokens), []
    for _ in range(request.sampling.max_new_tokens):
        token, logprob = draw(request.seed, context)
        context.append(token)
        logprobs.append(logprob)
        if token in request.sampling.stop_token_ids:
            break
    return tuple(context[len(request.tokens) :]), tuple(logprobs)


@dataclass
class PagedMemory:
    """A runner. `history` is what each sequence's slots must hold, kept apart from the scheduler's own account."""

    config: EngineConfig
    num_pages: int
    layout: KvLayout = WHOLE
    slots: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)  # slot -> group, token, position, chain
    contexts: dict[str, list[int]] = field(default_factory=dict)  # request -> its prompt and what was drawn for it
    history: dict[int, list[int]] = field(default_factory=dict)  # sequence -> version that ran each position
    tables: dict[int, Any] = field(default_factory=dict)  # sequence -> the page tables it was admitted with
    sampled_by: dict[str, list[int]] = field(default_factory=dict)  # request -> version step of each generated token
    run_tokens: int = 0
    prompt_tokens_run: int = 0
    copied: int = 0  # pages
    most_pages: int = 0  # that a work's tables named

    def slot(self, work: Work, group: int, position: int) -> int:
        page_tokens = self.config.page_tokens
        page = work.tables[group][position // page_tokens]
        assert 0 <= page < self.num_pages
        return page * page_tokens + position % page_tokens

    def chains(self, work: Work, length: int) -> list[int]:
        chain, chains = 0, []
        for token, version in zip(self.contexts[work.request.id], self.history[work.sequence][:length], strict=False):
            chain = hash((chain, token, version))
            chains.append(chain)
        return chains

    def read(self, work: Work, length: int, query: int) -> None:
        """Every slot before `length` that a query at `query` sees in some group must be this sequence's own past."""
        context, chains = self.contexts[work.request.id], self.chains(work, length)
        for group, kind in enumerate(self.layout.groups):
            for position in range(length):
                if position >= kind.reach.first_seen(query) or position < kind.sinks:
                    found = self.slots.get(self.slot(work, group, position))
                    wanted = (group, context[position], position, chains[position])
                    assert found == wanted, f"{work.request.id}, group {group}, at {position}: {found}, not {wanted}"

    def run(self, batch: Batch) -> Sampled:
        assert 0 < batch.num_tokens == sum(len(work.tokens) for work in batch.works) <= self.config.batch_tokens
        assert len({work.sequence for work in batch.works}) == len(batch.works) <= self.config.max_sequences
        assert all(len(work.tokens) == 1 for work in batch.works[: batch.num_decodes])
        version = batch.version.step
        for target, source in batch.copies.items():
            for offset in range(self.config.page_tokens):
                found = self.slots.get(source * self.config.page_tokens + offset)
                self.slots.pop(target * self.config.page_tokens + offset, None)
                if found is not None:
                    self.slots[target * self.config.page_tokens + offset] = found
        self.copied += len(batch.copies)
        batch.copies.clear()
        for work in batch.works:  # all contexts are read before anything is written: no work may lean on another
            past = self.history.setdefault(work.sequence, [])
            context = self.contexts.setdefault(work.request.id, list(work.request.tokens))
            if self.tables.get(work.sequence) is not work.tables:  # admitted: hits are of the weights that serve now
                self.tables[work.sequence] = work.tables
                past[:] = [version] * work.start
            assert len(past) == work.start, f"{work.request.id} ran {len(past)} tokens and goes on at {work.start}"
            assert work.tokens == context[work.start : work.start + len(work.tokens)]
            self.read(work, work.start, work.start)
            self.most_pages = max(self.most_pages, sum(page >= 0 for table in work.tables for page in table))
        written: set[int] = set()
        for work in batch.works:
            end = work.start + len(work.tokens)
            self.history[work.sequence] += [version] * len(work.tokens)
            chains = self.chains(work, end)
            for position, token in enumerate(work.tokens, start=work.start):
                for group in range(len(self.layout.groups)):
                    slot = self.slot(work, group, position)
                    assert slot not in written, "two sequences write one slot"
                    written.add(slot)
                    self.slots[slot] = (group, token, position, chains[position])
                self.prompt_tokens_run += position < len(work.request.tokens)
        self.run_tokens += batch.num_tokens
        sampled = Sampled([], [])
        for work in batch.works:
            end = work.start + len(work.tokens)
            for query in range(work.start, end):
                self.read(work, query + 1, query)
            if work.samples:
                context = self.contexts[work.request.id]
                token, logprob = draw(work.request.seed, context)
                context.append(token)
                sampled.tokens.append(token)
                sampled.logprobs.append(logprob)
                self.sampled_by.setdefault(work.request.id, []).append(version)
        return sampled


def make(
    num_pages: int = 64, decode: object = None, layout: KvLayout = WHOLE, **settings: Any
) -> tuple[Engine, PagedMemory]:
    config = EngineConfig(
        **{"page_tokens": 4, "batch_tokens": 16, "max_sequences": 8, "lookahead_tokens": 4} | settings
    )
    runner = PagedMemory(config, num_pages, layout)
    ticks = count()
    return Engine(runner, config, num_pages, clock=lambda: float(next(ticks)), decode=decode), runner  # type: ignore[arg-type]


def group(name: str, prompt: list[int], copies: int, max_new: int, stop: tuple[int, ...] = (STOP,)) -> list[Request]:
    sampling = Sampling(max_new_tokens=max_new, stop_token_ids=stop)
    return [Request(f"{name}/{k}", name, tuple(prompt), sampling, seed=k) for k in range(copies)]


def check(completion: Completion, request: Request, runner: PagedMemory) -> None:
    tokens, logprobs = alone(request)
    n = len(completion.tokens)
    if completion.stop_reason is StopReason.ABORTED:
        tokens, logprobs = tokens[:n], logprobs[:n]
    elif tokens[-1] in request.sampling.stop_token_ids:
        assert completion.stop_reason is StopReason.STOP_TOKEN
    else:
        assert completion.stop_reason is StopReason.LENGTH
    assert (completion.tokens, completion.logprobs) == (tokens, logprobs)
    by_span = [span.step for span in completion.versions for _ in range(span.start, span.end)]
    assert by_span == runner.sampled_by.get(request.id, [])
    assert [span.start for span in completion.versions] == [0, *(s.end for s in completion.versions)][
        : len(completion.versions)
    ]
    assert completion.submitted_s <= completion.started_s <= completion.finished_s


prompts = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=14),
    st.integers(1, 14).map(lambda length: [0, 1, 2, 3] * 3 + [5, 5] if length == 14 else ([0, 1, 2, 3] * 3)[:length]),
)
submits = st.tuples(st.just("submit"), prompts, st.integers(1, 4), st.integers(1, 12), st.sampled_from([(), (STOP,)]))
actions = st.one_of(
    submits,
    submits,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("receive"), st.integers(0, 2)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


reaches = st.one_of(
    st.just(Reach()), st.integers(1, 7).map(lambda n: Reach(window=n)), st.integers(1, 7).map(lambda n: Reach(chunk=n))
)
layouts = st.one_of(
    st.just(WHOLE), st.builds(KvLayout.of, st.lists(reaches, min_size=1, max_size=3), st.sampled_from([0, 0, 3]))
)


@given(
    page_tokens=st.sampled_from([2, 4, 8]),
    spare_tokens=st.integers(0, 12),
    max_sequences=st.integers(1, 6),
    kind=st.tuples(layouts, st.sampled_from(["arrival", "longest", "fair"])),
    lookahead=st.sampled_from([0, 0, 1, 5]),
    share=st.sampled_from([True, True, True, False]),
    slack=st.integers(0, 6),
    script=st.lists(actions, min_size=8, max_size=24),
)
@settings(max_examples=400, deadline=None)
def test_every_request_gives_what_it_gives_alone(
    page_tokens: int,
    spare_tokens: int,
    max_sequences: int,
    kind: tuple[KvLayout, str],
    lookahead: int,
    share: bool,
    slack: int,
    script: list[tuple],  # type: ignore[type-arg]
) -> None:
    """A wrong output, a stale hit, a leak or a livelock under some arrivals, aborts, updates, sizes and capacities."""
    layout, order = kind
    num_pages = layout.most_pages(12, 1, page_tokens) + slack  # a few of the requests never fit, and two often don't
    engine, runner = make(
        num_pages,
        layout=layout,
        order=order,
        page_tokens=page_tokens,
        batch_tokens=max_sequences + spare_tokens,
        max_sequences=max_sequences,
        lookahead_tokens=lookahead,
        share_prefixes=share,
    )
    requests: dict[str, Request] = {}
    done: dict[str, Completion] = {}

    def step() -> None:
        for completion in engine.step():
            assert completion.request_id not in done
            done[completion.request_id] = completion
        engine.check_integrity()

    def act(action: tuple, name: str) -> None:  # type: ignore[type-arg]
        verb, *rest = action
        if verb == "submit":
            prompt, copies, max_new, stop = rest
            for request in group(name, prompt, copies, max_new, stop):
                if layout.most_pages(len(prompt) + max_new - 1, 1, page_tokens) > num_pages:
                    with pytest.raises(CapacityError):
                        engine.submit(request)
                else:
                    engine.submit(request)
                    requests[request.id] = request
        elif verb == "abort":
            live = [request_id for request_id in requests if request_id not in done]
            if live:
                completion = engine.abort(live[rest[0] % len(live)])
                assert completion is not None and completion.stop_reason is StopReason.ABORTED
                done[completion.request_id] = completion
        elif verb == "receive":
            engine.receive(WeightVersion(rest[0], f"digest {rest[0]}"))
        else:
            for _ in range(rest[0]):
                step()
        engine.check_integrity()

    for number, action in enumerate(script):
        act(action, f"p{number}")
    # The first running sequence moves in every step and is preempted by nobody. Else an older one that starts takes its
    # place; twice is for what displaced ones run again.
    bound = 2 * sum(len(request.tokens) + request.sampling.max_new_tokens for request in requests.values())
    for _ in range(bound):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work, f"still busy after {bound} steps"
    assert done.keys() == requests.keys()
    for request_id, completion in done.items():
        check(completion, requests[request_id], runner)
    pool, stats = engine.scheduler.pool, engine.stats
    assert pool.num_available == num_pages and not engine.scheduler.promised
    assert stats.run_tokens == runner.run_tokens
    assert stats.finished + stats.aborted == len(requests)
    assert stats.sampled_tokens == sum(len(completion.tokens) for completion in done.values())


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
    assert aborted.versions == (VersionSpan(0, 0, 2),)
    check(aborted, running, runner)
    never_ran = engine.abort("a/1")
    assert never_ran is not None and never_ran.tokens == () and never_ran.started_s == never_ran.finished_s
    assert engine.abort("a/0") is None and engine.abort("nobody") is None
    assert not engine.has_work and engine.step() == []
    engine.check_integrity()


def test_no_progress_raises_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that plans nothing while requests are live spins for ever."""
    engine, _ = make()
    monkeypatch.setattr(engine.scheduler, "plan", lambda now: Batch([], engine.version, 0, 0))
    with pytest.raises(AssertionError, match="no progress: 0 running, 1 waiting"):
        engine.generate(group("a", [1], 1, 1))


PIECES = {0: b"", 1: b"a", 2: b"b", 3: b"\xc3", 4: b"\xa9", 5: b"ab", 6: b" "}


def decode(tokens: list[int]) -> str:
    return b"".join(PIECES[token] for token in tokens).decode(errors="replace")


@given(
    strings=st.lists(st.text("ab é", min_size=1, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
    empty=st.integers(0, 6),
)
@settings(max_examples=150, deadline=None)
def test_stop_strings_end_where_the_whole_text_first_holds_one(strings: list[str], seed: int, empty: int) -> None:
    """A stop string missed across tokens, split characters or tokens without text, or found in the prompt."""

    def patchy(tokens: list[int]) -> str:  # the first `empty` ids decode to nothing
        return decode([token for token in tokens if token >= empty])

    engine, _ = make(decode=patchy)
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
    with pytest.raises(AssertionError):
        engine.generate(group("a", [1], 1, 1))
