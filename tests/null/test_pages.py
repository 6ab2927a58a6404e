"""The page pool against a plain model of who holds what."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.engine.pages import MOST_WORTH, PagePool


class PoolAgainstModel(RuleBasedStateMachine):
    """A page handed out while somebody holds it, lost, or evicted before one that was due before."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(num_pages=5, page_tokens=4)
        self.tables: list[list[int]] = [[], [], []]  # three holders
        self.cached: dict[int, tuple[int, int]] = {}  # page -> (due, number of its release)
        self.clock = 0
        self.releases = 0

    def held(self) -> set[int]:
        return {page for table in self.tables for page in table}

    @rule(holder=st.integers(0, 2))
    def take(self, holder: int) -> None:
        page = self.pool.take()
        free = 5 - len(self.held()) - len(self.cached)
        assert (page is None) == (free == 0)
        if page is not None:
            assert page not in self.held() and page not in self.cached
            self.tables[holder].append(page)

    @rule(holder=st.integers(0, 2), which=st.integers(0, 4))
    def share(self, holder: int, which: int) -> None:
        known = sorted((self.held() | set(self.cached)) - set(self.tables[holder]))
        if known:
            page = known[which % len(known)]
            self.pool.share(page)
            self.tables[holder].append(page)
            self.cached.pop(page, None)

    @precondition(lambda self: any(self.tables))
    @rule(holder=st.integers(0, 2), worth=st.sampled_from([None, 1, 1, 2, 3, MOST_WORTH]))
    def release(self, holder: int, worth: int | None) -> None:
        if self.tables[holder]:
            page = self.tables[holder].pop()
            self.pool.release(page, worth)
            self.releases += 1
            if page not in self.held() and worth is not None:
                self.cached[page] = (self.clock + worth, self.releases)

    @rule()
    def evict(self) -> None:
        first = min(self.cached, key=lambda page: self.cached[page], default=None)
        assert self.pool.evict() == first
        if first is not None:
            self.clock, _ = self.cached.pop(first)

    @rule()
    def devalue(self) -> None:
        self.pool.devalue()
        order = self.in_order()
        self.cached = {page: (self.clock, number - len(order)) for number, page in enumerate(order)}

    def in_order(self) -> list[int]:
        return sorted(self.cached, key=lambda page: self.cached[page])

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.cached == self.in_order()
        assert self.pool.num_free == 5 - len(self.held()) - len(self.cached)
        assert self.pool.num_available == 5 - len(self.held())


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_sharing_a_free_page_is_refused() -> None:
    """A stale page number, once freed, silently joins a sequence to somebody else's keys and values."""
    pool = PagePool(2, 4)
    page = pool.take()
    assert page is not None
    pool.release(page, worth=None)
    with pytest.raises(KeyError):
        pool.share(page)
    with pytest.raises(AssertionError):
        pool.release(page, worth=None)


def test_integrity_finds_a_leak_and_a_double_entry() -> None:
    """check_integrity passes over a reference nobody owns, or a table with one page at two places."""
    pool = PagePool(3, 4)
    page = pool.take()
    assert page is not None
    pool.check_integrity([[page]])
    for tables in ([], [[page, page]], [[page], [page]]):
        with pytest.raises(AssertionError):
            pool.check_integrity(tables)
