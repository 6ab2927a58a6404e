"""Several drafts of one sequence in one step: a tree of drafts as its paths, each a work with page tables of its own.

A branch runs the sequence's next token again, and its own drafts after it. Its tables name the sequence's pages up to
the block of that token, a copy of that block where it is begun, and new pages from there on. Noise depends on seed,
position and token id, so of all paths one at most is what the model draws: where a branch stands longer than the
sequence's own drafts, the sequence takes its pages over, and all others are let go. No mask is needed, and a row has
the bits that it has in any other company.

Branches live from a plan to its resolve. Nobody else holds their pages, and none of those has a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tandem.engine.batch import Batch, Sampled, Work
from tandem.engine.layout import pages_for

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence as LiveSequence
    from tandem.engine.prefix import PrefixIndex


class Branches:
    """The branches of the batch that is planned or advanced."""

    def __init__(self, index: PrefixIndex) -> None:
        self.works: list[Work] = []
        self.copies: dict[int, int] = {}  # page of a branch -> page of its sequence to copy it from
        self._index = index

    def add(self, decode: Work, drafts: Sequence[int]) -> bool:
        """One more work of a decode's sequence, with other drafts; False where there are too few pages for it."""
        pool, size, start = self._index.pool, self._index.pool.page_tokens, decode.start
        shared = start // size
        blocks = pages_for(start + 1 + len(drafts), size) - shared
        if pool.num_available < blocks * len(decode.tables):
            return False
        tables = tuple(table[:shared] for table in decode.tables)
        for table, own in zip(tables, decode.tables, strict=True):
            for _ in range(blocks):
                page = self._index.take()
                assert page is not None, "pages were available"
                table.append(page)
            if start % size:
                self.copies[table[shared]] = own[shared]
        tokens = [decode.tokens[0], *drafts]
        self.works.append(Work(decode.sequence, start, tokens, tables, len(tokens), decode.request))
        return True

    def standing(self, batch: Batch, sampled: Sampled) -> dict[int, tuple[Work, int]]:
        """Sequence -> the branch that stands longer than its own drafts, and where among the draws its draws begin."""
        draw, most = 0, dict[int, int]()
        found = dict[int, tuple[Work, int]]()
        branching = {work.sequence for work in batch.branches}
        for work in batch.all_works:
            if work.sequence in branching and work.draws:
                stands = _stands(work, sampled, draw)
                if work.sequence not in most:
                    most[work.sequence] = stands
                elif stands > most[work.sequence]:
                    most[work.sequence], found[work.sequence] = stands, (work, draw)
            draw += work.draws
        return found

    def adopt(self, sequence: LiveSequence, branch: Work) -> None:
        """A sequence goes on with the pages of a branch; the branch is left with those that the sequence had."""
        assert sequence.pages is not None, sequence.arrival
        # Of a block that the branch's first token filled the sequence's own page has a name already.
        first = (branch.start + 1) // self._index.pool.page_tokens
        sequence.pages.swap(branch.tables, first)

    def pages(self) -> Iterator[list[int]]:
        """Those that each holds."""
        size = self._index.pool.page_tokens
        for work in self.works:
            yield [page for table in work.tables for page in table[work.start // size :]]

    def clear(self) -> None:
        """They end: what they still hold is let go."""
        for pages in self.pages():
            for page in reversed(pages):
                self._index.release(page)
        self.works, self.copies = [], {}


def _stands(work: Work, sampled: Sampled, draw: int) -> int:
    """How many of a work's drafts are what was drawn, one after the other; a row that failed fails in each branch."""
    drafts = work.tokens[len(work.tokens) - work.draws + 1 :]
    for place, draft in enumerate(drafts):
        if sampled.tokens[draw + place] != draft:
            return place
    return len(drafts)


def apart(drafts: list[list[int]], most: int) -> list[list[int]]:
    """Of several drafts of one sequence, cut to `most` tokens, those that are not the beginning of an earlier one.

    >>> apart([[1, 2, 3], [1, 2], [4], [1, 2, 5]], 2)
    [[1, 2], [4]]
    """
    kept: list[list[int]] = []
    for one in drafts:
        cut = one[:most]
        if cut and not any(earlier[: len(cut)] == cut for earlier in kept):
            kept.append(cut)
    return kept
