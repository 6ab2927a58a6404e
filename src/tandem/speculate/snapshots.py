"""States of recurrent layers beside the target's pages, so that a prefix hit, a resume and a rollback find them.

A page has one state a layer: that behind the last token which was run on it. On a full page that is the state at its
end, from which whoever hits it goes on; on the page that a sequence is writing, that at its last committed token.
Drafts go on from copies, so what did not stand is gone with them, and what stood is run again with the target's states.
Where a page's state is of another position than the one that is wanted (two sequences wrote the same block to different
ends), the block is run again from its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.kernels.large import large, release_memory
from tandem.models.view import Heads, PagedView, Tables
from tandem.speculate.mixed import Mixed
from tandem.speculate.pages import Span, SpanRows
from tandem.speculate.recurrent import Rule
from tandem.speculate.states import EagleDrafter

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence as Live
    from tandem.engine.config import EngineConfig
    from tandem.engine.runner import DecoderRunner


class _Begin(NamedTuple):
    """Where a span's state is taken from."""

    page: int  # -1: nothing is before it
    after: int  # the span of this pass that writes it, whose end of that page this one waits for; -1: it is there
    level: int  # in which the span's first row is run


class _Level(NamedTuple):
    """Rows of a pass that are run together, n of them: one each of n spans."""

    spans_n: Tensor
    rows_n: Tensor
    begun: tuple[Tensor, Tensor]  # spans that begin with what a level before wrote, and on which pages
    kept: tuple[Tensor, Tensor]  # of the n those whose state is a page's, and which


class Scan:
    """A pass over spans, in levels."""

    def __init__(self, slabs: list[Tensor], spans: list[Span], begins: list[_Begin], kept: dict[int, tuple[int, int]]):
        """kept: of each page the span and the position behind which its state stands."""
        self._slabs, self._begins = slabs, begins
        self.ended: dict[int, Tensor] = {}  # by layer: the state [S, X] behind each span
        start_S = np.array([span.start for span in spans])
        first_S = np.cumsum([0, *(len(span.tokens) for span in spans)])[:-1]
        level_S = np.array([one.level for one in begins])
        end_S = level_S + np.array([len(span.tokens) for span in spans])
        page_of = {(span, end): page for page, (end, span) in kept.items()}
        self._levels = list[_Level]()
        for level in range(int(end_S.max())):
            spans_n = np.flatnonzero((level_S <= level) & (level < end_S))
            late = [n for n in spans_n.tolist() if level_S[n] == level and begins[n].after >= 0]
            place_n = level - level_S[spans_n]
            ends = zip(spans_n.tolist(), (start_S[spans_n] + place_n + 1).tolist(), strict=True)
            pages = [page_of.get(one, -1) for one in ends]
            which = [n for n, page in enumerate(pages) if page >= 0]
            parts = (late, [begins[n].page for n in late], which, [pages[n] for n in which])
            a, b, c, d = (torch.tensor(one, dtype=torch.int64) for one in parts)
            rows_n = torch.from_numpy(first_S[spans_n] + place_n)
            self._levels.append(_Level(torch.from_numpy(spans_n), rows_n, (a, b), (c, d)))

    def recur(self, layer: int, entered_TW: Tensor, rule: Rule) -> Tensor:
        slab, count = self._slabs[layer], len(self._begins)
        state_SX, read_TY = torch.zeros(count, rule.numbers), None
        there = [n for n, one in enumerate(self._begins) if one.page >= 0 and one.after < 0]
        state_SX[there] = slab[[self._begins[n].page for n in there]]
        for level in self._levels:
            if len(level.begun[0]):
                state_SX[level.begun[0]] = slab[level.begun[1]]
            state_nX, read_nY = rule.advance(state_SX[level.spans_n], entered_TW[level.rows_n])
            state_SX[level.spans_n] = state_nX
            if read_TY is None:
                read_TY = torch.empty(len(entered_TW), read_nY.shape[1], dtype=entered_TW.dtype)
            read_TY[level.rows_n] = read_nY.to(entered_TW.dtype)
            if len(level.kept[0]):
                slab[level.kept[1]] = state_nX[level.kept[0]]
        self.ended[layer] = state_SX
        assert read_TY is not None
        return read_TY


class Copies:
    """Of sequences that are drafted for, a row each a pass."""

    def __init__(self, states: dict[int, Tensor], which_S: Tensor) -> None:
        self.ended = {layer: state_SX[which_S] for layer, state_SX in states.items()}

    def recur(self, layer: int, entered_TW: Tensor, rule: Rule) -> Tensor:
        self.ended[layer], read_TY = rule.advance(self.ended[layer], entered_TW)
        return read_TY.to(entered_TW.dtype)


class Snapshots:
    """The states of pages, and up to where each is.

    >>> kept = Snapshots(4, 2, [3])
    >>> spans = [Span(0, [5, 6, 7], [2, 1])]
    >>> scan = kept.scan(spans, [[5, 6, 7]])[1]; kept.end_P.tolist()
    [-1, 3, 2, -1]
    """

    def __init__(self, num_pages: int, page_tokens: int, numbers: Sequence[int]) -> None:
        """numbers: of each layer's state."""
        self.page_tokens = page_tokens
        self.slabs = [large(num_pages, one, dtype=torch.float32) for one in numbers]
        self.end_P = np.full(num_pages, -1)  # tokens that a page's state has seen

    def forget(self) -> None:
        """Other weights draft, or the memory is gone."""
        self.end_P[:] = -1
        release_memory(self.slabs)

    def scan(self, spans: Sequence[Span], texts: Sequence[Sequence[int]]) -> tuple[list[Span], Scan | None]:
        """Spans of texts that are to be run in one pass, in that order, each from where a state is; and the pass over
        those that have tokens. From here on its states are taken for written."""
        found, run, begins = list[Span](), list[Span](), list[_Begin]()
        kept: dict[int, tuple[int, int]] = {}
        for span, text in zip(spans, texts, strict=True):
            if span.tokens:
                begin, start = self._begin(span, kept, begins, run)
                span = Span(start, [*text[start : span.end]], span.table)
                self._keep(span, len(run), kept)
                begins.append(begin)
                run.append(span)
            found.append(span)
        scan = Scan(self.slabs, run, begins, kept) if run else None
        for page, (end, _) in kept.items():
            self.end_P[page] = end
        return found, scan

    def _begin(
        self, span: Span, kept: dict[int, tuple[int, int]], begins: list[_Begin], run: list[Span]
    ) -> tuple[_Begin, int]:
        start, size = span.start, self.page_tokens
        while start:
            page = span.table[(start - 1) // size]
            end, after = kept.get(page, (-1, -1))
            if end == start and start % size == 0:  # this pass writes what the page's name says, whatever is there
                return _Begin(page, after, begins[after].level + start - run[after].start), start
            if self.end_P[page] == start:
                return _Begin(page, -1, 0), start
            start = (start - 1) // size * size
        return _Begin(-1, -1, 0), 0

    def _keep(self, span: Span, number: int, kept: dict[int, tuple[int, int]]) -> None:
        for block in range(span.start // self.page_tokens, -(-span.end // self.page_tokens)):
            page, end = span.table[block], min(span.end, (block + 1) * self.page_tokens)
            if end > kept.get(page, (-1, -1))[0]:
                kept[page] = end, number


class _View:
    """Of pages and of states."""

    def __init__(self, paged: PagedView, states: Scan | Copies) -> None:
        self.positions_T, self._paged, self.recur = paged.positions_T, paged, states.recur

    def attend(self, layer: int, qkv_TW: Tensor, heads: Heads, tables: Tables) -> Tensor:
        return self._paged.attend(layer, qkv_TW, heads, tables)


class MixedDrafter(EagleDrafter):
    """Drafts of a `Mixed`."""

    module: Mixed

    def __init__(self, module: Mixed, runner: DecoderRunner, num_pages: int, config: EngineConfig) -> None:
        super().__init__(module, runner, num_pages, config)
        self.snapshots = Snapshots(num_pages, config.page_tokens, module.spec.state_numbers)
        self._states: Scan | Copies | None = None

    def _from(self, sequences: list[Live], spans: list[Span]) -> list[Span]:
        found, self._states = self.snapshots.scan(spans, [one.tokens for one in sequences])
        self.pages.ingested_tokens += sum(one.start - new.start for one, new in zip(spans, found, strict=True))
        return found

    def _run(self, rows: SpanRows, feature_TM: Tensor) -> Tensor:
        assert self._states is not None
        return self.module.step(feature_TM, rows.tokens_T, _View(self._view(rows), self._states))

    def _chosen(self, which_S: Tensor) -> None:
        assert self._states is not None
        self._states = Copies(self._states.ended, which_S)

    def release_memory(self) -> None:
        super().release_memory()
        self.snapshots.forget()
