"""Drafts from history: what followed the longest ending before, in whose texts, and what is forgotten."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine import suffix
from tandem.engine.config import DraftConfig
from tandem.engine.suffix import ENDINGS, LEAST, LONGER, PLACES, History, SuffixLookup
from tandem.types import Request, Sampling
from tests.null.paged_memory import group, make

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=5)


def slowly(texts: list[list[int]], asked: int, most: int) -> list[int]:
    """All places are looked at, an ending at a time."""
    text = texts[asked]
    for size in ENDINGS:
        places = [
            (name, end)
            for name, other in enumerate(texts)
            for end in range(size, len(other))
            if size <= len(text) and other[end - size : end] == text[-size:]
        ]
        if places:
            break
    else:
        return []
    weights = {}
    for name, end in places:
        other, same = texts[name], 0
        while same < min(end, len(text)) and other[end - same - 1] == text[len(text) - same - 1]:
            same += 1
        weights[name, end] = max(size for size in (*LONGER, *ENDINGS) if size <= same)
    drafts: list[int] = []
    sure = 1.0
    while len(drafts) < most:
        votes: Counter[int] = Counter()
        for (name, end), weight in weights.items():
            following = texts[name][end : end + len(drafts) + 1]
            if following[:-1] == drafts and len(following) > len(drafts):
                votes[following[-1]] += weight
        if not votes:
            break
        best, count = votes.most_common(1)[0]
        sure *= count / sum(votes.values())
        if sure < LEAST or list(votes.values()).count(count) > 1:
            break
        drafts.append(best)
    return drafts


@given(texts=TEXTS, most=st.integers(0, 9), cut=st.integers(0, 39))
def test_drafts_are_those_of_a_search_through_all(texts: list[list[int]], most: int, cut: int) -> None:
    """A place that is passed over, counted twice as a text grows, or weighed by another's tokens."""
    history = History(1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "PLACES", sum(map(len, texts)))
        for part in (cut, None):
            for name, text in enumerate(texts):
                history.follow(name, text[:part])
        wanted = slowly(texts, 0, most)
        assert history.drafts(0, most)[: len(wanted)] == wanted


def test_the_latest_places_are_looked_at() -> None:
    """An ending that was seen often takes a step's time, or it is the oldest places that are looked at."""
    history = History(10_000)
    for name in range(20 * PLACES):
        history.follow(name, [1, 2, 3, 4, 5, 6 + name // (19 * PLACES)])
    assert history.drafts(0, 1) == []
    history.follow(9999, [1, 2, 3, 4, 5])
    assert history.drafts(9999, 2) == [7] and max(map(len, history._places.values())) < 4 * PLACES


def test_a_place_counts_for_what_it_has_in_common() -> None:
    """Two places that have 16 tokens in common outvote one that has 64."""
    history, text = History(1000), list(range(100, 170))
    history.follow(0, [*text, 1])
    history.follow(1, [*text[-20:], 2])
    history.follow(2, [*text[-20:], 2])
    history.follow(3, text)
    assert history.drafts(3, 1) == [1]
    history.follow(4, [*text[-40:], 2])
    history.follow(5, [*text[-40:], 2])
    assert history.drafts(3, 1) == [2]


def test_a_prompt_is_noted_once_and_read_in_each() -> None:
    """A sibling's prompt takes memory again, or an ending that lies across its end is not found."""
    history = History(1000)
    history.follow(0, [*range(30), 77, 78, 79], 30)
    noted = sum(map(len, history._places.values()))
    history.follow(1, [*range(30), 77], 30)
    assert sum(map(len, history._places.values())) == noted + len(ENDINGS)
    assert history.drafts(1, 5) == [78, 79]


def test_the_oldest_is_forgotten() -> None:
    """Memory grows with every answer, or a living text is forgotten."""
    history = History(200)
    history.follow(0, [1, 2, 3, 4, 5, 6])
    for name in range(1, 100):
        history.follow(name, [1000 * name + i for i in range(50)])
        history.end(name)
    assert len(history._texts) == 5 and len(history._places) < 3 * 450 * len(ENDINGS)
    history.follow(0, [1, 2, 3, 4, 5, 6, 1, 2])
    assert history.drafts(0, 3) == [3, 4, 5]
    history.follow(200, [7000, 7001])
    assert history.drafts(200, 3) == []


def test_a_tenant_learns_of_its_own_texts_alone() -> None:
    """Drafts of what another tenant wrote: what it wrote shows in the time that it takes."""
    engine, _ = make(draft=DraftConfig("suffix", 4, lengths="fixed"), drafter=None)
    drafter = engine.scheduler.drafting.drafter
    assert isinstance(drafter, SuffixLookup)
    for number, tenant in enumerate("aab"):
        before = engine.stats.accepted_tokens
        requests = [Request(f"r{number}", "r", (1, 2, 3), Sampling(max_new_tokens=20), 5, tenant=tenant)]
        (done,) = engine.generate(requests)
        assert len(done.tokens) == 20
        accepted = engine.stats.accepted_tokens - before
        assert accepted > 12 if number == 1 else accepted < 6, (tenant, accepted)
    assert set(drafter._tenants) == {"a", "b"}


def test_siblings_draft_for_each_other() -> None:
    """Texts of siblings that grow are not seen, or drafts change what is drawn."""
    (alone,) = make()[0].generate(group("a", [1, 2, 3], 1, 26, stop=()))
    engine, _ = make(draft=DraftConfig("suffix", 4, lengths="fixed"), max_sequences=1, drafter=None)
    first, second = (engine.generate(group(name, [1, 2, 3], 1, 26, stop=()))[0] for name in "ab")
    assert first.tokens == second.tokens == alone.tokens
    assert engine.stats.accepted_tokens >= 18
