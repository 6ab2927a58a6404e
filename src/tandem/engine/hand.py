"""A step under `engine.order=shares`: what a scheduler does with the rows that are dealt to it (engine/deal.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tandem.engine.batch import Sequence, Work
from tandem.engine.prefix import NULL
from tandem.engine.table import Start

if TYPE_CHECKING:
    from tandem.engine.deal import Deals
    from tandem.engine.queues import Queues
    from tandem.engine.share import Node


class Hand:
    """The works of a step as they are dealt; those that draw first."""

    def __init__(self, queues: Queues, tokens: int, now_s: float) -> None:
        self.tokens = tokens  # that chunks may have yet
        self.draws: list[Work] = []
        self.chunks: dict[int, Work] = {}  # by arrival
        self._queues, self._now_s = queues, now_s
        self._draw_leaves: list[Node] = []
        self._chunk_leaves: list[Node] = []
        self._rows = set[int]()  # arrivals of those that run
        self._begun = False
        self.allows: Callable[[Sequence], bool] = queues.allows

    @property
    def works(self) -> list[Work]:
        return [*self.draws, *self.chunks.values()]

    @property
    def leaves(self) -> list[Node]:
        """Who is charged for each."""
        return [*self._draw_leaves, *self._chunk_leaves]

    def draw(self, sequence: Sequence) -> None:
        assert sequence.pages is not None and sequence.leaf is not None
        self._rows.add(sequence.arrival)
        self._draw_leaves.append(sequence.leaf)
        tables, last = sequence.pages.tables, sequence.tokens[-1]
        self.draws.append(Work(sequence.arrival, sequence.computed, [last], tables, 1, sequence.request))

    def place(self, sequence: Sequence) -> int:
        """How far it has run when the step has."""
        work = self.chunks.get(sequence.arrival)
        return sequence.computed if work is None else work.start + len(work.tokens)

    def cached(self, sequence: Sequence) -> int:
        """Blocks that a request that waits would find."""
        hits = None if sequence.tokens[-1] < 0 else self._queues._hits(sequence)
        return 0 if hits is None else len(hits[0])

    def chunk(self, sequence: Sequence, tokens: int) -> int:
        start, pages, known = self.place(sequence), sequence.pages, sequence.tokens
        assert pages is not None
        end = self._queues._reach(pages, min(len(known), start + min(tokens, self.tokens)))
        if end <= start:
            return 0
        pages.cover(end)
        work = self.chunks.get(sequence.arrival)
        if work is None:
            work = Work(sequence.arrival, start, [], pages.tables, 0, sequence.request)
            self.chunks[sequence.arrival] = work
            assert sequence.leaf is not None
            self._chunk_leaves.append(sequence.leaf)
            self._rows.add(sequence.arrival)
        work.tokens += known[start:end]
        work.draws = int(end == len(known))
        self.tokens -= end - start
        return end - start

    def start(self, sequence: Sequence) -> Start:
        queues, running = self._queues, self._queues.running
        if not self.allows(sequence):
            return Start.WAITS
        hits = None if sequence.tokens[-1] < 0 else queues._hits(sequence)
        order: Deals = queues.order  # type: ignore[assignment]
        while hits is not None:
            full = len(running) >= queues.config.max_sequences
            if full and order.yields(sequence, 0, running, running[1:], queues._price) is None:
                return Start.FULL
            if not self._begun:
                queues.admission.begin(running)
                self._begun = True
            fits = queues.admission.admits(sequence, hits)
            if not full and (fits or queues._yielded(sequence) or not running):
                refs = queues.pool.refs  # who holds a page pays for it
                sequence.found = sum([page != NULL and refs[page] > 0 for page in hits[0]])
                queues._start(sequence, hits, self._now_s)
                queues.waiting.remove(sequence)
                queues._stats.most_running = max(queues._stats.most_running, len(running))
                return Start.BEGUN
            self._begun = False  # what was refused is not promised
            spare = [one for one in running[1:] if one.arrival not in self._rows]
            needed = 0 if full and fits else queues.admission.ahead(sequence, len(hits[0]), 0) + len(hits[0])
            victim = order.yields(sequence, needed, running, spare, queues._price)
            if victim is None:
                later = order.yields(sequence, needed, running, running[1:], queues._price) is not None
                return Start.LATER if later else Start.FULL
            queues._preempt(victim)
            hits = queues._hits(sequence)
        return Start.WAITS
