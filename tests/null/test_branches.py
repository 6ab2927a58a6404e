"""Several drafts of one sequence side by side, over the fake memory (paged_memory.py): who stands, on which pages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import Sampled, Sequence
from tandem.engine.branches import apart
from tandem.engine.config import EngineConfig
from tandem.engine.draft import lookup, lookups
from tandem.engine.integrity import check_integrity
from tandem.engine.layout import KvLayout
from tandem.engine.schedule import Scheduler
from tandem.engine.suffix import History
from tandem.types import Reach, Request, Sampling
from tests.drafting import Told, at_most
from tests.null.paged_memory import PagedMemory, check, group, guesses, make


def branching(paths: list[list[int]], num_pages: int = 100, **settings: Any) -> Scheduler:
    """Pages of 4 tokens; a sequence is drafted these paths as far as it may be."""
    given = {
        "page_tokens": 4,
        "batch_tokens": 30,
        "max_sequences": 8,
        "lookahead_tokens": 0,
        "draft": at_most(5, len(paths)),
    } | settings
    return Scheduler(
        EngineConfig(**given),
        num_pages,
        drafter=Told(
            lambda sequences, most: pytest.fail("one path was asked for"),
            lambda sequences, most, width: [paths[:wide] for wide in width],
        ),
    )


def begin(s: Scheduler, prompt: int, new: int = 40) -> Sequence:
    s.submit(Request("a", "a", tuple(range(prompt)), Sampling(max_new_tokens=new), 0), 0.0)
    step(s, [60])
    return s.live["a"]


def step(s: Scheduler, tokens: list[int], failed: dict[int, str] | None = None) -> list[tuple[int, ...]]:
    """Works as (start, tokens), those of branches last."""
    batch = s.plan(0.0)
    check_integrity(s)
    s.commit(batch, Sampled(tokens, {"logprobs": [-float(t) for t in tokens]}, failed or {}), 1.0)
    check_integrity(s)
    return [(work.start, *work.tokens) for work in batch.all_works]


def test_the_branch_that_stands_longest_goes_on() -> None:
    """A branch that stands is lost, one that stands less far is taken, tokens come twice, or pages stay held."""
    s = branching([[70, 71, 72], [70, 80, 81, 82, 83], [90]])
    a = begin(s, 3)
    works = step(s, [70, 80, 1, 1, 70, 80, 81, 82, 99, 5, 70, 6])
    assert works == [(3, 60, 70, 71, 72), (3, 60, 70, 80, 81, 82, 83), (3, 60, 90)]
    assert a.tokens == [0, 1, 2, 60, 70, 80, 81, 82, 99] and a.computed == 8
    assert a.values["logprobs"] == [-60.0, -70.0, -80.0, -81.0, -82.0, -99.0]
    stats = s.stats
    assert (stats.sampled_tokens, stats.accepted_tokens, stats.drafted_tokens) == (6, 4, 11)
    assert stats.run_tokens == 3 + 12 == 3 + stats.drafted_tokens + 1
    assert a.pages is not None and a.pages.blocks == 2 and s.pool.num_available == 98 and not s.branches.works
    step(s, [70, 71, 72, 73, 70, 80, 1, 1, 1, 1, 90, 5])  # its own stand as far as any
    assert a.tokens[8:] == [99, 70, 71, 72, 73] and s.pool.num_available == 97


def test_pages_of_a_branch_are_a_copy_and_new_ones() -> None:
    """A branch writes on its sequence's page, or reads one that was not copied; a full block's page loses its name."""
    s = branching([[70, 71], [80, 81]])
    a = begin(s, 5)
    assert a.pages is not None
    batch = s.plan(0.0)
    (branch,) = batch.branches
    (own,), (other,) = a.pages.tables, branch.tables
    assert own[0] == other[0] and own[1] != other[1] and batch.copies == {other[1]: own[1]}
    assert len(own) == len(other) == 2
    taken = other[1]
    s.commit(batch, Sampled([80, 1, 1, 80, 81, 9], {}), 0.0)
    assert own[1] == taken and a.pages.blocks == 2 and a.tokens[5:] == [60, 80, 81, 9]
    # The next token is a block's last: its page has its name before a branch is taken for what follows.
    a = begin(t := branching([[70, 71], [80, 81]]), 3)
    assert a.pages is not None
    first = a.pages.tables[0][0]
    step(t, [80, 1, 1, 80, 81, 9])
    assert a.pages.tables[0][0] == first and t.index.pages(a.keys[0]) == [first]
    # And one that begins a block has nothing to copy.
    begin(u := branching([[70, 71], [80, 81]]), 4)
    assert u.plan(0.0).copies == {}


@pytest.mark.parametrize("how", ["planned again", "aborted", "failed", "retracted", "new weights"])
def test_branches_that_never_ran_are_let_go(how: str) -> None:
    """A page of a branch is held for ever, or copied to in a later step, where another wrote since."""
    s = branching([[70, 71], [80, 81]])
    begin(s, 5)
    batch = s.plan(0.0)
    assert batch.branches and s.pool.num_available == 97
    if how == "aborted":
        s.abort("a", 0.0)
        s.check_idle()
        return
    if how == "failed":
        s.advance(batch)
        s.forget(batch)
    elif how == "retracted":
        s.retract()
    elif how == "new weights":
        s.receive(type(s.version)(1, "x"))
    s.drafting.off = "no more"
    again = s.plan(0.0)
    assert not again.branches and again.copies == {} and not s.branches.copies
    check_integrity(s)
    assert s.pool.num_available == 98


def test_a_branch_of_a_copy_that_is_not_made_yet() -> None:
    """A step that is tried again copies to a branch what its sequence's page held before it was copied to itself."""
    s = branching([[70, 71], [80, 81]])
    a = begin(s, 6)
    s.submit(Request("b", "b", tuple(range(6)), Sampling(max_new_tokens=40), 1), 0.0)
    first = s.plan(0.0)
    assert a.pages is not None and [work.request.id for work in first.works] == ["a", "b"]
    b, source = s.live["b"], a.pages.tables[0][1]
    assert b.pages is not None and first.copies[b.pages.tables[0][1]] == source
    again = s.plan(0.0)  # the first never ran
    assert [work.request.id for work in again.branches] == ["a", "b"]
    assert set(again.copies.values()) == {source} and len(again.copies) == 3


def test_branches_take_what_is_left() -> None:
    """A branch takes a page or a row that a decode, a prompt or another's draft needs."""
    s = branching([[70, 71], [80, 81], [90, 91]], batch_tokens=9)
    begin(s, 5)
    assert [len(work.tokens) for work in s.plan(0.0).all_works] == [3, 3, 3]
    s = branching([[70, 71], [80, 81], [90, 91]], batch_tokens=8)
    begin(s, 5)
    assert [len(work.tokens) for work in s.plan(0.0).all_works] == [3, 3]
    s = branching([[70, 71, 72], [80, 81, 82]], num_pages=4)  # own drafts take two more pages, a branch three
    begin(s, 6, 8)
    assert [len(work.tokens) for work in s.plan(0.0).all_works] == [4]


def test_a_row_that_fails_ends_a_branch() -> None:
    """A branch is taken beyond a row that could not be drawn from."""
    s = branching([[70, 71], [80, 81]])
    a = begin(s, 5)
    step(s, [80, 1, 1, 80, 81, 9], {4: "NaN"})
    assert "a" not in s.live and a.tokens[5:] == [60, 80] and s.stats.failed == 1


@given(
    rights=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    reaches=st.lists(
        st.sampled_from([Reach(), Reach(window=3), Reach(window=9), Reach(chunk=6)]), min_size=1, max_size=3
    ),
    sinks=st.sampled_from([0, 3]),
    spare=st.integers(0, 30),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    draft_tokens=st.integers(1, 9),
    branches=st.integers(2, 4),
)
@settings(max_examples=60, deadline=None)
def test_texts_and_what_is_found_again(
    rights: list[int],
    reaches: list[Reach],
    sinks: int,
    spare: int,
    prompt: list[int],
    draft_tokens: int,
    branches: int,
) -> None:
    """A page leaks, one is read that another branch wrote, or a branch's block is found that did not stand; of any
    groups of layers."""
    layout = KvLayout.of(reaches, sinks)
    pages = layout.most_pages(40, 1, 4) + spare
    engine, runner = make(
        pages, layout=layout, drafter=guesses(rights), draft=at_most(draft_tokens, branches), batch_tokens=60
    )
    requests = group("a", prompt, 3, 14)
    done = engine.generate(requests)
    for completion, request in zip(done, requests, strict=True):
        check(completion, request, runner)
    engine.check_integrity()
    again = group("b", [*prompt, *done[-1].tokens, 3], 1, 5)
    check(engine.generate(again)[0], again[0], runner)
    engine.check_integrity()
    assert engine.stats.run_tokens == runner.run_tokens


def test_a_tree_stands_longer_than_its_likeliest_path() -> None:
    """Branches are run and none is ever taken."""
    request = group("a", [1, 2, 3], 1, 26, stop=())

    def batches(branches: int, rights: list[int]) -> tuple[int, PagedMemory]:
        engine, runner = make(drafter=guesses(rights), draft=at_most(4, branches), batch_tokens=32)
        check(engine.generate(request)[0], request[0], runner)
        return engine.stats.batches, runner

    assert batches(1, [0])[0] == 26 and batches(3, [0, 1, 4])[0] == 1 + 5


@given(drafts=st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=5), most=st.integers(0, 4))
def test_paths_that_are_run_differ(drafts: list[list[int]], most: int) -> None:
    """A path is run twice, or one that is another's beginning; or one is lost."""
    kept = apart(drafts, most)
    assert all(one and len(one) <= most for one in kept)
    for i, one in enumerate(kept):
        assert not any(earlier[: len(one)] == one for earlier in kept[:i])
    for one in drafts:
        assert not one[:most] or any(other[: len(one[:most])] == one[:most] for other in kept)


TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=4)


@given(texts=TEXTS, most=st.integers(1, 6), width=st.integers(1, 4))
def test_paths_of_a_history(texts: list[list[int]], most: int, width: int) -> None:
    """The likeliest path is another with runners-up beside it, a path was never written, or one is an other's
    beginning."""
    history = History(1000)
    for name, text in enumerate(texts):
        history.follow(name, text)
    paths = history.paths(0, most, width)
    assert len(paths) <= width and paths == apart(paths, most)
    assert history.drafts(0, most) == (paths[0] if paths else [])
    for path in paths:
        seen = [t[i : i + 2 + len(path)] == [*texts[0][-2:], *path] for t in texts for i in range(len(t))]
        assert any(seen)


def test_runners_up_are_taken_by_their_votes() -> None:
    """A fork of few votes goes before one of more, or the fork of a fork is never met."""
    history = History(10_000)
    begun = [50, 51, 52, 53]
    ways = [[1, 2, 3]] * 4 + [[1, 7, 8]] * 2 + [[4, 5, 6]] * 2
    for name, way in enumerate(ways, 1):
        history.follow(name, [100 + name, *begun, *way])
    history.follow(0, [99, *begun])
    found = [
        [1, 2, 3],
        [4, 5, 6],
        [1, 7, 8],
    ]  # of 7 votes (the oldest has none) 3, 2 and 2; the first fork is met first
    assert [history.paths(0, 3, wide) for wide in (1, 2, 3, 5)] == [found[:1], found[:2], found, found]
    assert history.paths(0, 1, 5) == [[1], [4]]


@given(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40), most=st.integers(0, 6), width=st.integers(1, 4))
@settings(max_examples=100)
def test_lookups_of_earlier_times(tokens: list[int], most: int, width: int) -> None:
    """A time that is passed over, met twice, or of a shorter ending before a longer one."""
    found = lookups(tokens, most, width)
    assert found[:1] == [one for one in [lookup(tokens, most)] if one] and len(found) <= width
    wanted: list[list[int]] = []
    for count in (4, 3, 2):
        ends = [e for e in range(count, len(tokens)) if tokens[e - count : e] == tokens[len(tokens) - count :]]
        if ends and most:
            for end in reversed(ends):
                if (one := tokens[end : end + most]) not in wanted:
                    wanted.append(one)
    assert found == wanted[:width]
