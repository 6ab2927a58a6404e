"""Which tokens run in the next forward pass, on which pages.

`plan` makes a batch, a runner runs it, `commit` takes what was sampled. Time comes as an argument and the runner is not
known here, so an engine and a simulator use the same scheduler. `commit` is `advance`, what holds whatever is drawn,
and `resolve`, the draws; between the two the next batch may be planned, so that a device need not wait for the host.

The rules, all of them:

* A step holds at most `batch_tokens` tokens: first one for each decoding sequence, then chunks of prompts, then the
  first chunks of requests admitted now.
* Layers come in groups by what their queries see (engine/layout.py); a sequence has a page table a group, all of the
  same number of blocks. A block's pages are taken when its first token is about to run, and a group's page of a block
  that no later query sees is let go when the token before has run (engine/tables.py).
* `running` is in order of arrival; its first sequence is never preempted and moves in every step, so everything
  finishes: submit refuses what the whole pool could not carry one token at a time.
* When the decodes, or the first of `running`, cannot take their next pages, the sequence that is cheapest to compute
  again is preempted, by tokens for each page that this frees, the latest of several: it gives up its pages, keeps its
  tokens, and waits in its place by arrival. Room is made before works are, so none is of a sequence without pages.
* A chunk runs as far as there are pages, and not at all where there is none: nobody is preempted for it.
* Drafts (engine/draft.py) follow a decode's token as far as tokens and pages are left when all else is planned. What is
  drawn after a draft that was drawn itself stands; the rest is dropped, and its pages are let go. A block is named when
  all its tokens stand. What follows is drafted when the draws are known, so no batch is planned before.
* Beside them other drafts of the same sequence may run, on pages of their own (engine/branches.py), after everybody's.
* A waiting request starts, in the order of engine/order.py, if there are pages for what it and all that run are
  expected to take soon (engine/admit.py). Alone it always starts.
* A prompt's full blocks are taken from the prefix index as far as all groups have what the rest sees. A block that a
  running sequence is about to compute is *promised*; a waiting request whose next block is promised waits for it. A
  promise ends when the block is indexed, its maker stops or is preempted, or the weights change.
* The last token of a context is always run, for its logits. So siblings share floor((prompt - 1) / page_tokens) blocks;
  what lies between is promised like a block, and copied from a sibling that ran it and still runs (engine/tails.py),
  or, as far as it is the same, from where another ended behind the same blocks, such as the turn before.
* Under engine.order shares, which rows run, who starts and who gives way is what engine/deal.py says; the first of
  `running` is still never preempted, and moves as its tenant's turn comes.
* A sequence is *pure* while all its keys and values come from the current weights. Only pure sequences index blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tandem.engine.batch import INITIAL, MIXED, Batch, Sampled, Sequence, Work, stops_by_token
from tandem.engine.config import EngineConfig
from tandem.engine.costs import PICO
from tandem.engine.deal import Deals
from tandem.engine.draft import Drafter
from tandem.engine.drafting import Drafting
from tandem.engine.hand import Hand
from tandem.engine.layout import WHOLE, KvLayout
from tandem.engine.order import Order
from tandem.engine.queues import Queues
from tandem.engine.share import Shares, read_shares
from tandem.errors import ConfigError
from tandem.types import Completion, Request, StopReason, WeightVersion


class Scheduler(Queues):
    """What the requests of one engine do next.

    layout: the groups of layers that the runner's pages are of. max_context: positions the model has, or None. stops:
    asked after every sampled token whether it was the last; the engine adds stop strings, a simulator its own lengths;
    LENGTH is decided here. shares: the tree in place of that in the file that engine.shares names. At most one batch is
    planned and not advanced: an abort or a new version withdraws it. At most one is advanced and not resolved: they
    wait for it.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        max_context: int | None = None,
        stops: Callable[[Sequence], StopReason | None] = stops_by_token,
        version: WeightVersion = INITIAL,
        layout: KvLayout = WHOLE,
        drafter: Drafter | None = None,
        shares: Shares | None = None,
    ) -> None:
        order = Order(config)
        if config.order == "shares":
            capacity = layout.capacity_tokens(num_pages, config.page_tokens)
            order = Deals(config, shares or read_shares(config.shares), capacity)
        super().__init__(config, num_pages, max_context, version, layout, order)
        if self.programs is not None and isinstance(order, Deals):
            self.programs.charge = order.hold
            self.programs.reload_s = lambda tokens: order.prices.rows(0, max(2, tokens)) / PICO
        self.stops = stops
        self.drafting = Drafting(config.draft, self._stats, drafter)
        self.planned: Batch | None = None
        self.advanced: Batch | None = None
        self.arrivals = 0  # sequences so far

    def submit(self, request: Request, now: float) -> None:
        """Queues a request. ConfigError: empty prompt, no token asked, id in use. CapacityError: it can never fit."""
        if request.id in self.live:
            raise ConfigError(f"request id {request.id!r} is in use by a live request; ids must be unique.")
        sequence = Sequence(request, self.arrivals, self.limit(request), now, list(request.tokens))
        sequence.submitted_batch = self._stats.batches
        self.arrivals += 1
        self.live[request.id] = sequence
        self.waiting.append(sequence)
        self.order.submitted(sequence)
        if self.programs is not None:
            self.programs.submitted(sequence, now)

    def abort(self, request_id: str, now: float) -> Completion | None:
        """Ends a request at once and returns what it has; None where no live request has that id."""
        assert self.advanced is None, "what was drawn is to be resolved first"
        sequence = self.live.pop(request_id, None)
        if sequence is None:
            return None
        self.planned = None
        self.branches.clear()
        if self.programs is not None:
            self.programs.ended(sequence, StopReason.ABORTED, now)
        self.order.gone(sequence, waited=sequence.pages is None)
        if sequence.pages is not None:
            self.running.remove(sequence)
            self._give_up_pages(sequence)
        else:
            self.waiting.remove(sequence)
        self.drafting.ended(sequence)
        self._stats.aborted += 1
        return sequence.completion(StopReason.ABORTED, now)

    def receive(self, version: WeightVersion) -> None:
        """Other weights from the next plan on. Running sequences go on over their old keys and values, unnamed."""
        assert self.advanced is None, "what was drawn is to be resolved first"
        if version == self.version:
            return
        self.planned = None
        self.version = version
        if self.programs is not None:
            self.programs.drop("weights")
        self.index.retire()
        self.promised.clear()
        for sequence in self.running:
            sequence.root, sequence.keys, sequence.tail = MIXED, [], None
        self.tails.clear()
        self.ends.clear()

    def receive_adapter(self, version: WeightVersion) -> None:
        """What `version.adapter` names from the next plan on; as `receive`, for the sequences that run with it."""
        assert self.advanced is None, "what was drawn is to be resolved first"
        if self.adapters.get(version.adapter) == version:
            return
        self.planned = None
        self.adapters[version.adapter] = version
        if self.programs is not None:
            self.programs.drop("weights")
        for sequence in self.running:
            if sequence.request.adapter == version.adapter:
                self.promised = {key: maker for key, maker in self.promised.items() if maker is not sequence}
                self.tails.withdraw(sequence)
                sequence.root, sequence.keys, sequence.tail = MIXED, [], None

    def empty(self) -> None:
        """Nothing is live: what pages hold is lost, and none of it is found again."""
        assert not self.live, f"{len(self.live)} requests are live"
        if self.programs is not None:
            self.programs.drop("emptied")
        self.index.empty()
        self._named = []

    def plan(self, now: float) -> Batch:
        """The next batch; empty only where nothing is live or one is advanced. If never advanced, it is planned again.

        While a batch is advanced, what it draws stands as -1 - (its place among the draws) in the works that run it.
        """
        drafting = self.drafting.on
        assert not drafting or self.advanced is None, "what follows drafts is planned when they are resolved"
        self.branches.clear()
        if self.programs is not None:
            self._named += self.programs.plan(now)
        self._make_room()
        if isinstance(self.order, Deals):
            return self._dealt(self.order, drafting, now)
        works, prefills = self._decodes()
        decodes = works.copy() if drafting else []
        budget = self.config.batch_tokens - len(works)
        if prefills:
            for sequence in self.order.chunks(prefills, self.running[0], self._stats.batches):
                budget -= self._chunk(works, sequence, budget)
        if self.waiting:
            budget = self._admit(works, budget, now)
        if decodes:
            rows = self.config.batch_tokens - budget
            budget = self.drafting.add(decodes, self.live, budget, rows, self.branches)
        num_tokens, branches = self.config.batch_tokens - budget, self.branches
        copies = self._copies
        if branches.copies:  # all are made at once: what is itself copied to is not copied from
            copies = copies | {page: copies.get(source, source) for page, source in branches.copies.items()}
        self.planned = Batch(works, self.version, num_tokens, self._named.copy(), self._shared, copies, now)
        self.planned.branches = branches.works
        return self.planned

    @property
    def wakes_s(self) -> float:
        """Seconds until something that is held back may run; 0 where nothing is."""
        return self.order.wakes_s

    def _dealt(self, order: Deals, drafting: bool, now: float) -> Batch:
        """The next batch by shares. A row that could run has its page, whether it runs in this step or not."""
        draws: list[Sequence] = []
        prompts: list[Sequence] = []
        page_tokens = self.config.page_tokens
        for sequence in self.running:
            pages, known = sequence.pages, len(sequence.tokens)
            assert pages is not None
            if known - sequence.computed > 1:
                prompts.append(sequence)
            elif known < sequence.limit:
                if sequence.computed == pages.blocks * page_tokens:
                    pages.extend(1)
                draws.append(sequence)
        hand = Hand(self, self.config.batch_tokens - len(draws), now)
        order.deal(hand, draws, prompts, now)
        works = hand.works
        budget = self.config.batch_tokens - sum([len(work.tokens) for work in works])
        if drafting and hand.draws:
            rows = self.config.batch_tokens - budget
            budget = self.drafting.add(hand.draws, self.live, budget, rows, self.branches)
        num_tokens = self.config.batch_tokens - budget
        self.planned = Batch(works, self.version, num_tokens, self._named.copy(), self._shared, self._copies, now)
        self.planned.leaves = hand.leaves
        return self.planned

    def _make_room(self) -> None:
        """Preempts until each decode, and the first running sequence, can take the pages that its next token needs."""
        pool, running, num_groups, size = self.pool, self.running, len(self.layout.groups), self.config.page_tokens
        if pool.num_available >= len(running) * num_groups:
            return
        needy = {
            sequence.arrival
            for sequence in running
            if sequence.pages is not None
            and sequence.computed == sequence.pages.blocks * size
            and len(sequence.tokens) < sequence.limit
            and (len(sequence.tokens) - sequence.computed == 1 or sequence is running[0])
        }
        if self.programs is not None:
            self.programs.let_go(len(needy) * num_groups - pool.num_available)
        while len(needy) * num_groups > pool.num_available:
            assert len(running) > 1, f"sequence {running[0].arrival} outgrew a pool of {pool.num_pages} pages alone"
            victim = self.order.gives_way(running[1:], self._price)
            needy.discard(victim.arrival)
            self._preempt(victim)

    def _decodes(self) -> tuple[list[Work], list[Sequence]]:
        """A work for each running sequence that has one token to run, and the sequences that have more."""
        works: list[Work] = []
        prefills: list[Sequence] = []
        page_tokens = self.config.page_tokens
        for sequence in self.running:
            start, tokens, pages = sequence.computed, sequence.tokens, sequence.pages
            assert pages is not None
            known = len(tokens)
            if known - start > 1:
                prefills.append(sequence)
                continue
            if known >= sequence.limit:  # ends as it is resolved
                continue
            if start == pages.blocks * page_tokens:
                pages.extend(1)
            works.append(Work(sequence.arrival, start, [tokens[-1]], pages.tables, 1, sequence.request))
        return works, prefills

    def _chunk(self, works: list[Work], sequence: Sequence, budget: int) -> int:
        """Adds a work of as many tokens of a running sequence as `budget` and pages allow; returns how many."""
        start, tokens, pages = sequence.computed, sequence.tokens, sequence.pages
        assert pages is not None
        end = self._reach(pages, min(len(tokens), start + budget))
        if end <= start:
            return 0
        pages.cover(end)
        draws = int(end == len(tokens))
        works.append(Work(sequence.arrival, start, tokens[start:end], pages.tables, draws, sequence.request))
        return end - start

    def _admit(self, works: list[Work], budget: int, now: float) -> int:
        """Starts waiting requests in their order until tokens, places or pages run out; returns the tokens left.

        Only those that wait for a promised block are passed over.
        """
        running, num_running = self.running, len(self.running)
        if budget == 0 or num_running >= self.config.max_sequences:
            return budget
        begun = False
        for sequence in self._queue():
            if budget == 0 or len(running) >= self.config.max_sequences:
                break
            hits = None if sequence.tokens[-1] < 0 else self._hits(sequence)
            if hits is None:
                continue
            if not begun:
                begun = True
                self.admission.begin(running)
            if not self.admission.admits(sequence, hits) and not self._yielded(sequence) and running:
                break
            self._start(sequence, hits, now)
            budget -= self._chunk(works, sequence, budget)
        if len(running) > num_running:
            self.waiting = [sequence for sequence in self.waiting if sequence.pages is None]
            self._stats.most_running = max(self._stats.most_running, len(running))
        return budget

    def _queue(self) -> Iterable[Sequence]:
        """Waiting requests that may start, the first to start first."""
        queue, programs = self.order.queue(self.waiting, self._stats.batches), self.programs
        if programs is None:
            return queue
        if self.config.order == "arrival":
            return programs.queue(self.waiting, self._stats.batches)
        return programs.filtered(queue)

    def commit(self, batch: Batch, sampled: Sampled, now: float) -> list[Completion]:
        """Takes what a planned batch gave; returns the requests it finished."""
        self.advance(batch)
        return self.resolve(batch, sampled, now)

    def advance(self, batch: Batch) -> None:
        """Takes that a planned batch runs; what it draws is pending until `resolve`."""
        assert batch is self.planned, "a batch is advanced once, with nothing between its plan and that"
        assert self.advanced is None, "the batch before is to be resolved first"
        self.planned, self.advanced = None, batch
        self._named, self._shared, self._copies = self._named[len(batch.named) :], [], {}
        self.ends.give_back()
        live, page_tokens, stats = self.live, self.config.page_tokens, self._stats
        draws = 0
        for work in batch.works:
            sequence = live.get(work.request.id)
            if sequence is None or sequence.arrival != work.sequence:  # it ended as the batch before was resolved
                draws += work.draws
                stats.dropped_tokens += len(work.tokens)
                continue
            pages, start = sequence.pages, sequence.computed
            assert pages is not None
            sequence.computed = end = start + len(work.tokens) - (work.draws - 1 if work.draws > 1 else 0)  # drafts
            if start < sequence.reached or start < len(work.request.tokens):
                batch.tell(sequence, start, end)
            if start // page_tokens != end // page_tokens and sequence.root != MIXED:
                self._index_blocks(sequence, start // page_tokens)
            if self.layout.rounds_full and start // page_tokens != end // page_tokens:
                self.tails.withdraw(sequence)
            if sequence.tail is not None and start < len(sequence.request.tokens) <= end:
                if self.promised.get(sequence.tail) is sequence:
                    del self.promised[sequence.tail]
                self.tails.offer(sequence)
            if end >= pages.frees_at:
                pages.free_unseen(end)
            if work.draws:
                sequence.tokens.append(-1 - draws)
                draws += work.draws
        stats.count(batch)
        self.order.ran(batch)

    def resolve(self, batch: Batch, sampled: Sampled, now: float) -> list[Completion]:
        """Takes what an advanced batch drew; returns the requests that end by it."""
        assert batch is self.advanced, "a batch is resolved once, after it was advanced"
        lengths = {name: len(column) for name, column in (("tokens", sampled.tokens), *sampled.values.items())}
        assert set(lengths.values()) == {batch.num_draws}, f"{lengths} for {batch.num_draws} draws"
        self.advanced = None
        took_s = self._stats.took(batch, now)
        live, stops, stats, step = self.live, self.stops, self._stats, batch.version.step
        columns, drawn, failed = list(sampled.values.items()), sampled.tokens, sampled.failed
        finished, past = list[Completion](), 0
        longer = self.branches.standing(batch, sampled) if batch.branches else {}
        beside = sum([work.draws for work in batch.branches])  # rows of drafts that others stood longer than
        for place, (logprobs, likely) in sampled.scores.items():
            work = batch.works[place]
            sequence = live.get(work.request.id)
            if sequence is not None and sequence.arrival == work.sequence:
                sequence.score(work.start + 1, logprobs, likely)
        for work in batch.works:
            if not work.draws:
                continue
            draw, past = past, past + work.draws
            sequence = live.get(work.request.id)
            if sequence is None or sequence.arrival != work.sequence:
                continue
            tokens = sequence.tokens
            assert tokens[-1] == -1 - draw, (tokens[-1], draw)
            if work.sequence in longer:
                beside += work.draws - longer[work.sequence][0].draws
                work, draw = longer[work.sequence]
                self.branches.adopt(sequence, work)
            end = draw + work.draws
            while True:
                if draw in failed:
                    tokens.pop()
                    reason: StopReason | None = StopReason.FAILED
                    break
                tokens[-1] = token = drawn[draw]
                spans = sequence.spans
                if not spans or spans[-1][0] != step:
                    if not spans:
                        sequence.first_s = now
                    spans.append((step, sequence.num_drawn))
                sequence.num_drawn += 1
                for name, column in columns:
                    value = column[draw]
                    if value is not None:
                        sequence.values.setdefault(name, []).append(value)
                stats.sampled_tokens += 1
                reason = stops(sequence)
                if reason is None and len(tokens) >= sequence.limit:
                    reason = StopReason.LENGTH
                draw += 1
                if draw == end or reason is not None or token != work.tokens[draw - end]:
                    break
                tokens.append(-1 - draw)
            if work.draws > 1:
                accepted = len(tokens) - (reason is not StopReason.FAILED) - work.start - 1
                self.drafting.stood(sequence, work.draws - 1, accepted, reason is not None)
                if reason is not StopReason.FAILED:
                    self._keep_drafts(sequence, work)
            if reason is not None:
                failure = ""
                if reason is StopReason.FAILED:
                    failure = failed[draw]
                    self._unname(sequence, work)
                    stats.failed += 1
                else:
                    self._named += self.ends.leave(sequence)
                finished.append(sequence.completion(reason, now, failure))
                if self.programs is not None:
                    self.programs.ended(sequence, reason, now)
                self.drafting.ended(sequence)
                self._end(sequence)
        stats.drafted_tokens += beside
        self.branches.clear()
        self.drafting.took(batch, took_s)
        if finished:
            self.running = [sequence for sequence in self.running if sequence.pages is not None]
        self._stats.finished += len(finished)
        return finished

    def retract(self) -> None:
        """All that runs is preempted."""
        assert self.advanced is None, "what was drawn is to be resolved first"
        self.planned = None
        for sequence in self.running.copy():
            self._preempt(sequence)

    def forget(self, batch: Batch) -> None:
        """An advanced batch failed: it drew nothing, and what it wrote may be wrong. All that runs starts again."""
        assert batch is self.advanced, "a batch is forgotten in place of its resolve"
        self.planned = self.advanced = None
        self.order.failed(batch)
        self._named, self._shared, self._copies = [], [], {}
        self.branches.clear()
        for work in batch.works:
            sequence = self.live.get(work.request.id)
            if work.draws and sequence is not None and sequence.arrival == work.sequence:
                sequence.tokens.pop()
        for sequence in self.running.copy():
            self._preempt(sequence)
        if self.programs is not None:
            self.programs.drop("failed")
        self.index.empty()
