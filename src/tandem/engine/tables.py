"""The page tables of a running sequence: which pages it holds now.

Between a batch's commit and the next plan, a group holds a page for block b if and only if b is allocated and the next
query, or a later one, sees some of it (sinks included). Elsewhere its table says NULL.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from tandem.engine.layout import pages_for
from tandem.engine.prefix import NULL, PrefixIndex

NEVER = 1 << 62  # a position that no context reaches


class PageTables:
    """One table a group, all of `blocks` blocks. `tables` is handed to runners: it grows, and its pages turn NULL.

    hits: tables that PrefixIndex.match gave; their pages are now held once more.
    """

    __slots__ = ("_first", "_index", "blocks", "frees_at", "tables")

    def __init__(self, index: PrefixIndex, hits: Sequence[Sequence[int]]) -> None:
        self._index = index
        self.tables = tuple(array("i", table) for table in hits)
        self.blocks = len(hits[0])
        for table in hits:
            index.hit(page for page in table if page != NULL)
        size = index.pool.page_tokens
        self._first = [group.first_block(self.blocks * size, size) for group in index.layout.groups]
        self.frees_at = self._next_free()

    def _next_free(self) -> int:
        """The count of computed tokens at which the first held block of some group is seen no more."""
        size, groups = self._index.pool.page_tokens, self._index.layout.groups
        ends = [g.unseen_from((f + 1) * size) for g, f in zip(groups, self._first, strict=True) if g.limited]
        return min(ends, default=NEVER)

    def extend(self, blocks: int) -> None:
        """That many more blocks, each a page of every group. The pages must be available."""
        for _ in range(blocks):
            for table in self.tables:
                page = self._index.take()
                assert page is not None, f"a page was promised, and all {self._index.pool.num_pages} are held"
                table.append(page)
        self.blocks += blocks

    def room(self) -> int:
        """Tokens that it could hold with all pages that are available."""
        pool = self._index.pool
        return (self.blocks + pool.num_available // len(self.tables)) * pool.page_tokens

    def room_for_drafts(self, known: int) -> int:
        """Drafts that it could hold behind so many tokens. A page that is rounded as it is full (KvLayout.rounds_full)
        is filled by no draft, which may not stand."""
        size, room = self._index.pool.page_tokens, self.room() - known
        return min(room, size - 1 - known % size) if self._index.layout.rounds_full else room

    def cover(self, tokens: int) -> None:
        """Takes the pages that so many tokens need and it does not hold yet."""
        self.extend(max(0, pages_for(tokens, self._index.pool.page_tokens) - self.blocks))

    def free_unseen(self, computed: int) -> None:
        """Lets go of the blocks that no query from position `computed` on sees."""
        size = self._index.pool.page_tokens
        for which, (group, table) in enumerate(zip(self._index.layout.groups, self.tables, strict=True)):
            if group.limited:
                seen = max(self._first[which], group.first_block(computed, size))
                for block in range(self._first[which], min(seen, self.blocks)):
                    self._index.release(table[block])
                    table[block] = NULL
                self._first[which] = seen
        self.frees_at = self._next_free()

    def truncate(self, blocks: int) -> None:
        """Lets go of all blocks but the first so many, the last one first. No query has seen them."""
        for table in self.tables:
            for page in reversed(table[blocks:]):
                self._index.release(page)
            del table[blocks:]
        self.blocks = len(self.tables[0])

    def swap(self, tables: Sequence[array[int]], first: int) -> None:
        """Its blocks from `first` on for those that other tables have there, whose pages are held once. Each is still
        seen."""
        for table, other in zip(self.tables, tables, strict=True):
            assert NULL not in table[first:] and NULL not in other[first:], (first, table, other)
            table[first:], other[first:] = other[first:], table[first:]
        self.blocks = len(self.tables[0])

    def release(self) -> None:
        """Lets go of all, the last block first. The tables themselves stay as they are: a batch may still hold them."""
        for table in self.tables:
            for page in reversed(table):
                if page != NULL:
                    self._index.release(page)

    def pages(self) -> Iterator[int]:
        """All pages held."""
        return (page for table in self.tables for page in table if page != NULL)

    @property
    def num_held(self) -> int:
        """Pages held. O(groups)."""
        sinks = (pages_for(group.sinks, self._index.pool.page_tokens) for group in self._index.layout.groups)
        unseen = (max(0, min(first, self.blocks) - sink) for first, sink in zip(self._first, sinks, strict=True))
        return self.blocks * len(self.tables) - sum(unseen)

    def shared(self) -> tuple[int, int]:
        """(blocks of the longest hit on pages that others hold too, pages that are held for this sequence alone).

        The second takes a chain's pages to be shared from its beginning, as prefix hits share them.
        """
        refs, tables, layout = self._index.pool.refs, self.tables, self._index.layout

        def kept(group: int, block: int) -> bool:
            page = tables[group][block]
            return page != NULL and refs[page] > 1

        blocks = layout.longest_hit(self.blocks, self._index.pool.page_tokens, kept)
        return blocks, self.num_held - sum(max(0, blocks - first) for first in self._first)

    def check_integrity(self, computed: int) -> None:
        """AssertionError unless the tables hold what a query from position `computed` on sees, and nothing else."""
        size = self._index.pool.page_tokens
        assert pages_for(computed, size) <= self.blocks, (computed, self.blocks)
        for group, table in zip(self._index.layout.groups, self.tables, strict=True):
            first, sinks = group.first_block(computed, size), pages_for(group.sinks, size)
            wrong = [b for b in range(self.blocks) if (table[b] == NULL) != (sinks <= b < first)]
            assert len(table) == self.blocks and not wrong, f"blocks {wrong} of {self.blocks} at {computed}, {group}"
