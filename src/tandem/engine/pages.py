"""Who holds each page of keys and values.

A page is free (nobody holds it, its contents are worthless), cached (nobody holds it, its contents may serve a
later request) or held (by one or more sequences). free + cached + held = total, at every moment.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PagePool:
    """References to `num_pages` pages of `page_tokens` tokens each. What a page contains is not known here.

    >>> pool = PagePool(num_pages=2, page_tokens=16)
    >>> page = pool.take()
    >>> pool.share(page)
    >>> pool.release(page, keep=False); pool.release(page, keep=True)
    >>> pool.num_free, list(pool.cached) == [page]
    (1, True)
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages >= 1 and page_tokens >= 1, (num_pages, page_tokens)
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.refs = [0] * num_pages  # P: holders of each page
        self.cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the warmest

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that could be taken now, were every cached one evicted."""
        return len(self._free) + len(self.cached)

    def take(self) -> int | None:
        """A free page, now held once; None where there is none (the caller may evict)."""
        if not self._free:
            return None
        page = self._free.pop()
        self.refs[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a held or cached page."""
        refs = self.refs
        if refs[page] == 0:
            del self.cached[page]  # KeyError: the page is free, and its contents are nobody's
        refs[page] += 1

    def release(self, page: int, keep: bool) -> None:
        """One holder fewer. The last one leaves the page cached where `keep`, else free."""
        refs = self.refs
        assert refs[page] > 0, f"page {page} released with {refs[page]} holders"
        refs[page] -= 1
        if refs[page] == 0:
            if keep:
                self.cached[page] = None
            else:
                self._free.append(page)

    def evict(self) -> int | None:
        """Frees the cached page released longest ago and returns it; None where nothing is cached."""
        if not self.cached:
            return None
        page, _ = self.cached.popitem(last=False)
        self._free.append(page)
        return page

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """AssertionError unless the page tables given account for every reference. O(pages + table entries)."""
        counted = [0] * self.num_pages
        for table in tables:
            assert len(set(table)) == len(table), f"a page table holds a page twice: {list(table)}"
            for page in table:
                counted[page] += 1
        pairs = enumerate(zip(self.refs, counted, strict=True))
        wrong = [(page, refs, holders) for page, (refs, holders) in pairs if refs != holders]
        assert not wrong, f"(page, references, holders found): {wrong[:8]}"
        free, cached = set(self._free), set(self.cached)
        held = {page for page, refs in enumerate(self.refs) if refs}
        assert len(free) == len(self._free), "a page is free twice"
        assert not (free & cached or free & held or cached & held), (free & cached, free & held, cached & held)
        counts = (len(free), len(cached), len(held))
        assert sum(counts) == self.num_pages, f"free, cached, held {counts} of {self.num_pages} pages"
