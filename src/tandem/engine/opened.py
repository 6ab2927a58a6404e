"""Which place each sequence has for the page that it is filling, where full pages are rounded and lie elsewhere
(kernels/span_pool.py). A sequence fills one page of each group of layers at a time, so it has one place.

A place is known by the page that is being filled, of the first group. Nobody says that a sequence is gone: its place is
taken back when there are none left, by who is still `held`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


class OpenPages:
    """`places` of them, as many as run at once, for pages of `page_tokens`.

    >>> opened = OpenPages(2, 8)
    >>> opened.fill([(0, 5, [3, 4])]), opened.fill([(5, 12, [3, 4])]), opened.copies({6: 4}), opened.fill([(3, 4, [6])])
    ([1], [1], [(0, 1)], [0])
    """

    def __init__(self, places: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.held: Callable[[], set[int]] | None = None  # pages that sequences fill that run; None: all that are known
        self._place: dict[int, int] = {}
        self._free = [*range(places)]
        self._fresh = set[int]()  # pages of this step

    def begin(self) -> None:
        """Of a step."""
        self._fresh.clear()

    def copies(self, copies: Mapping[int, int]) -> list[tuple[int, int]]:
        """(place, place to copy it from) for pages of all groups that are to be copied from others."""
        made = []
        for page, source in copies.items():
            if source in self._place:
                made.append((self._renew(page), self._place[source]))
        return made

    def fill(self, works: Sequence[tuple[int, int, Sequence[int]]]) -> list[int]:
        """The place of each work, which writes positions [start, end) onto the pages of a table."""
        found, size = [], self.page_tokens
        for start, _, table in works:
            page = table[start // size]
            if page not in self._place:
                assert start % size == 0, f"page {page} is filled from {start % size} on, and was never begun"
                self._renew(page)
            self._fresh.add(page)
            found.append(self._place[page])
        for (start, end, table), place in zip(works, found, strict=True):
            del self._place[table[start // size]]
            if end % size:
                page = table[end // size]
                if (stale := self._place.pop(page, None)) is not None:
                    self._free.append(stale)
                self._place[page] = place
                self._fresh.add(page)
            else:
                self._free.append(place)
        return found

    def _renew(self, page: int) -> int:
        """A place for a page that is begun; what was known by its number is over."""
        if page not in self._place:
            if not self._free:
                kept = self._fresh | (set(self._place) if self.held is None else self.held())
                gone = [known for known in self._place if known not in kept]
                assert gone, f"{len(self._place)} pages are filled at once, and there is no place for another"
                self._free += [self._place.pop(known) for known in gone]
            self._place[page] = self._free.pop()
        self._fresh.add(page)
        return self._place[page]
