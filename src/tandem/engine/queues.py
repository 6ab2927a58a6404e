"""Live requests: who waits, who runs, on which pages; and the moves between the two. What is done when: schedule.py."""

from __future__ import annotations

from bisect import insort
from dataclasses import replace
from operator import attrgetter

from tandem.engine.admit import Admission, length_limit
from tandem.engine.batch import MIXED, Sequence, Stats, Work
from tandem.engine.branches import Branches
from tandem.engine.config import EngineConfig
from tandem.engine.layout import KvLayout, pages_for
from tandem.engine.order import Order
from tandem.engine.pages import PagePool
from tandem.engine.prefix import NULL, PrefixIndex, extend_keys, root_key
from tandem.engine.programs import Programs
from tandem.engine.tables import PageTables
from tandem.engine.tails import Ends, Tails, tail_key
from tandem.types import Request, WeightVersion

BY_ARRIVAL = attrgetter("arrival")


class Queues:
    """Queues, pages, promises and prefix index of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        max_context: int | None,
        version: WeightVersion,
        layout: KvLayout,
        order: Order,
    ) -> None:
        self.config = config
        self.max_context = max_context
        self.layout = layout
        self.pool = PagePool(num_pages, config.page_tokens)
        self.index = PrefixIndex(self.pool, layout)
        self.version = version
        self.adapters: dict[str, WeightVersion] = {}  # that requests may name, as they are now
        self.live: dict[str, Sequence] = {}  # by request id
        self.running: list[Sequence] = []  # by arrival
        self.waiting: list[Sequence] = []  # by arrival
        self.promised: dict[bytes, Sequence] = {}  # name of a block -> the running sequence that will compute it
        self.order = order
        self.admission = Admission(config, layout, self.pool)
        self._named: list[int] = []  # for the next batch; a batch that is planned again keeps them
        self._shared: list[int] = []
        self._copies: dict[int, int] = {}
        self.tails = Tails()
        self.ends = Ends(self.index)
        self.branches = Branches(self.index)
        self._stats = Stats()
        self.programs = Programs(config, self.index, self._stats) if config.programs.mode != "off" else None

    @property
    def stats(self) -> Stats:
        return replace(self._stats, evicted_pages=self.index.num_evicted)

    def root(self, request: Request) -> bytes:
        """What its blocks are named under, while its keys and values all come from the current weights."""
        if not self.config.share_prefixes or request.scored:
            return MIXED
        adapter = self.adapters.get(request.adapter)
        named = request.adapter if adapter is None else repr((adapter.adapter, adapter.step, adapter.digest))
        return root_key(self.version, named, request.tenant)

    def limit(self, request: Request) -> int:
        """Context length at which it ends. Raises as `submit`."""
        config, pages = self.config, self.pool.num_pages
        return length_limit(request, self.layout, pages, config.page_tokens, config.kv_memory_bytes, self.max_context)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.reached = max(sequence.reached, sequence.computed)
        self._give_up_pages(sequence)
        insort(self.waiting, sequence, key=BY_ARRIVAL)
        self.order.waits(sequence)
        self._stats.preemptions += 1

    def _price(self, sequence: Sequence) -> tuple[float, int]:
        """Tokens to compute again for each page that preempting it frees; then the latest arrival."""
        assert sequence.pages is not None
        kept, freed = sequence.pages.shared()
        again = max(0, sequence.computed - kept * self.config.page_tokens)
        return again / freed if freed else float("inf"), -sequence.arrival

    def filled_pages(self) -> set[int]:
        """Of the first group, that are not full and that running sequences go on to fill."""
        size = self.config.page_tokens
        parts = [(one.pages, one.computed) for one in self.running if one.computed % size]
        return {pages.tables[0][computed // size] for pages, computed in parts if pages is not None}

    def _hits(self, sequence: Sequence) -> list[list[int]] | None:
        """Tables of the indexed leading blocks of a waiting sequence; None where it had better wait for the next."""
        if sequence.awaits in self.promised:
            return None
        root = self.root(sequence.request)
        if sequence.root != root:
            sequence.root, sequence.keys, sequence.tail = root, [], None
        if root == MIXED:
            return [[] for _ in self.layout.groups]
        page_tokens = self.config.page_tokens
        extend_keys(sequence.keys, root, sequence.tokens, page_tokens)
        most = (len(sequence.tokens) - 1) // page_tokens  # the last token is always run
        hits = self.index.match(sequence.keys, most)
        blocks = len(hits[0])
        if blocks < most and sequence.keys[blocks] in self.promised:
            sequence.awaits = sequence.keys[blocks]
            return None
        sequence.tail = tail_key(sequence, page_tokens, self.layout.rounds_full)
        if blocks == most and sequence.tail in self.promised:
            sequence.awaits = sequence.tail
            return None
        return hits

    def _start(self, sequence: Sequence, hits: list[list[int]], now: float) -> None:
        """Moves a waiting sequence to running on the blocks it hits; promises those it will compute."""
        self._shared += [page for table in hits for page in table if page != NULL]
        self.order.starts(sequence)
        sequence.pages = PageTables(self.index, hits)
        sequence.computed = sequence.pages.blocks * self.config.page_tokens
        most = (len(sequence.tokens) - 1) // self.config.page_tokens
        source = self.tails.pages(sequence.tail, most) if sequence.pages.blocks == most else []
        same = len(sequence.tokens) - 1 - sequence.computed
        if not source or self.pool.num_available < len(source):
            rest = same
            same, source = self.ends.borrow(sequence)
            self._shared += source
            if sequence.tail is not None and same < rest:  # else siblings find it where this one did
                self.promised.setdefault(sequence.tail, sequence)
        if source:
            sequence.pages.extend(1)
            self._copies.update(zip((table[-1] for table in sequence.pages.tables), source, strict=True))
            sequence.computed += same
        self.order.charge(sequence, sequence.computed)
        if sequence.started_s is None:
            sequence.started_s = now
            sequence.cached_tokens = sequence.computed
            self._stats.cached_tokens += sequence.computed
        for key in sequence.keys[sequence.pages.blocks :]:
            self.promised.setdefault(key, sequence)
        insort(self.running, sequence, key=BY_ARRIVAL)
        if self.programs is not None:
            self.programs.started(sequence, now)

    def allows(self, sequence: Sequence) -> bool:
        """Whether a waiting request may start: its program is not paused."""
        return self.programs is None or self.programs.allowed(sequence)

    def _reach(self, pages: PageTables, end: int) -> int:
        """How far up to `end` there are pages for a running sequence: what is kept for programs makes way."""
        if self.programs is not None and end > pages.room():
            wanted = (pages_for(end, self.config.page_tokens) - pages.blocks) * len(self.layout.groups)
            self.programs.let_go(wanted - self.pool.num_available)
        return min(end, pages.room())

    def _yielded(self, sequence: Sequence) -> bool:
        """Whether what is kept for programs makes way for a waiting request that there are too few pages for."""
        if self.programs is None:
            return False
        freed = self.programs.let_go(self.admission.lacking, sequence, alone=not self.running)
        return self.admission.gained(freed)

    def check_idle(self) -> None:
        """AssertionError where nothing runs and a page is held by anybody but a program that acts."""
        if self.programs is None or not self.programs.tables:
            self.pool.check_idle()

    def _end(self, sequence: Sequence) -> None:
        """A request ended by itself, perhaps preempted while its last token was drawn."""
        self.order.gone(sequence, waited=sequence.pages is None)
        if sequence.pages is None:
            self.waiting.remove(sequence)
        else:
            self._give_up_pages(sequence)
        self.admission.lengths.record(sequence.num_drawn)
        self.order.ended(sequence)
        del self.live[sequence.request.id]

    def _index_blocks(self, sequence: Sequence, first: int) -> None:
        """Names the blocks from `first` on that have just been filled, and keeps the promises for them."""
        assert sequence.pages is not None
        page_tokens, tables = self.config.page_tokens, sequence.pages.tables
        if len(sequence.keys) * page_tokens < sequence.computed:
            extend_keys(sequence.keys, sequence.root, sequence.tokens, page_tokens)
        for block in range(first, sequence.computed // page_tokens):
            key, prompt = sequence.keys[block], (block + 1) * page_tokens <= len(sequence.request.tokens)
            for group, table in enumerate(tables):
                if self.index.insert(key, group, table[block], prompt):
                    self._named.append(table[block])
            self.promised.pop(key, None)

    def _keep_drafts(self, sequence: Sequence, work: Work) -> None:
        """Names the blocks that drafts filled which stand now, and lets go of the pages of those that do not."""
        pages, size, first = sequence.pages, self.config.page_tokens, sequence.computed // self.config.page_tokens
        assert pages is not None
        sequence.computed = end = len(sequence.tokens) - 1  # the last was drawn and not run
        if first != end // size and sequence.root != MIXED:
            self._index_blocks(sequence, first)
        if end >= pages.frees_at:
            pages.free_unseen(end)
        pages.truncate(pages_for(end, size))

    def _unname(self, sequence: Sequence, work: Work) -> None:
        """Nothing could be drawn from what a work wrote: nobody else is to find it."""
        size = self.config.page_tokens
        for key in sequence.keys[work.start // size : (work.start + len(work.tokens)) // size]:
            self.index.unname(key)

    def _give_up_pages(self, sequence: Sequence) -> None:
        """A sequence stops running: its unkept promises are withdrawn, its pages released. It keeps its tokens."""
        assert sequence.pages is not None
        for key in (*sequence.keys[sequence.computed // self.config.page_tokens :], sequence.tail):
            if key is not None and self.promised.get(key) is sequence:
                del self.promised[key]
        self.tails.withdraw(sequence)
        self.ends.give_back(sequence)
        self.order.charge(sequence, 0)
        sequence.pages.release()
        sequence.pages = None
        sequence.computed = 0
