"""Who holds each page of keys and values.

A page is free (nobody holds it, its contents are worthless), cached (nobody holds it, its contents may serve a
later request) or held (by one or more sequences). free + cached + held = total, at every moment.

A cached page has a worth, 1 to MOST_WORTH. Eviction is GreedyDual (Young, 1994; with frequencies, Cherkasova's GDSF):
a page released with worth w is due at clock + w, the page due first is evicted, of these the one released longest ago,
and the clock then stands at what it was due. So a page of worth w outlives w - 1 turnovers of those of worth 1, and no
page that nobody asks for stays for ever.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

MOST_WORTH = 8


class PagePool:
    """References to `num_pages` pages of `page_tokens` tokens each. What a page contains is not known here.

    >>> pool = PagePool(num_pages=2, page_tokens=16)
    >>> page = pool.take()
    >>> pool.share(page)
    >>> pool.release(page, worth=None); pool.release(page, worth=1)
    >>> pool.num_free, pool.cached == [page]
    (1, True)
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        assert num_pages >= 1 and page_tokens >= 1, (num_pages, page_tokens)
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.refs = [0] * num_pages  # P: holders of each page
        self.num_available = num_pages  # pages that could be taken now, were every cached one evicted
        # [w]: pages due in w ticks of the clock, by release
        self._due: deque[OrderedDict[int, None]] = deque(OrderedDict() for _ in range(MOST_WORTH + 1))
        self._bucket: dict[int, OrderedDict[int, None]] = {}  # of each cached page
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is the warmest

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> list[int]:
        """The cached pages in the order in which they would be evicted."""
        return [page for bucket in self._due for page in bucket]

    def take(self) -> int | None:
        """A free page, now held once; None where there is none (the caller may evict)."""
        if not self._free:
            return None
        page = self._free.pop()
        self.refs[page] = 1
        self.num_available -= 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a held or cached page."""
        refs = self.refs
        if refs[page] == 0:
            del self._bucket.pop(page)[page]  # KeyError: the page is free, and its contents are nobody's
            self.num_available -= 1
        refs[page] += 1

    def release(self, page: int, worth: int | None) -> None:
        """One holder fewer. The last one leaves the page cached with `worth`, or free where None."""
        refs = self.refs
        assert refs[page] > 0, f"page {page} released with {refs[page]} holders"
        refs[page] -= 1
        if refs[page] == 0:
            self.num_available += 1
            if worth is None:
                self._free.append(page)
            else:
                self._bucket[page] = bucket = self._due[worth]
                bucket[page] = None

    def evict(self) -> int | None:
        """Frees the cached page that is due first and returns it; None where nothing is cached. O(1)."""
        if not self._bucket:
            return None
        while not self._due[0]:
            self._due.rotate(-1)
        page, _ = self._due[0].popitem(last=False)
        del self._bucket[page]
        self._free.append(page)
        return page

    def forget(self, page: int) -> None:
        """What a page contains is worthless: it is free where it was cached."""
        bucket = self._bucket.pop(page, None)
        if bucket is not None:
            del bucket[page]
            self._free.append(page)

    def devalue(self) -> None:
        """All that is cached is due at once, in the order that it was. O(cached pages)."""
        first = OrderedDict.fromkeys(self.cached)
        self._due = deque([first, *(OrderedDict() for _ in range(MOST_WORTH))])
        self._bucket = dict.fromkeys(first, first)

    def empty(self) -> None:
        """Nothing is held: every page is free, and the first are taken first. O(pages)."""
        assert not any(self.refs), "pages are held"
        for bucket in self._due:
            bucket.clear()
        self._bucket.clear()
        self._free = list(range(self.num_pages - 1, -1, -1))

    def check_idle(self) -> None:
        """AssertionError where no sequence runs and a page is held, or is neither free nor cached. O(1)."""
        assert self.num_available == self.num_pages, f"{self.num_pages - self.num_available} pages held by nobody"
        counts = (len(self._free), len(self._bucket))
        assert sum(counts) == self.num_pages, f"free, cached {counts} of {self.num_pages} pages"

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
        assert cached == set(self._bucket) and len(cached) == len(self.cached), "a page is cached twice, or lost"
        assert not (free & cached or free & held or cached & held), (free & cached, free & held, cached & held)
        counts = (len(free), len(cached), len(held))
        assert sum(counts) == self.num_pages, f"free, cached, held {counts} of {self.num_pages} pages"
        assert self.num_available == self.num_pages - len(held), (self.num_available, counts)
