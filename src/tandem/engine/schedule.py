"""Which tokens run in the next forward pass, on which pages.

`plan` makes a batch, a runner runs it, `commit` takes what was sampled. Time comes as an argument and the runner is not
known here, so an engine and a simulator use the same scheduler.

The rules, all of them:

* A step holds at most `batch_tokens` tokens: first one for each decoding sequence, then chunks of prompts, then the
  first chunks of requests admitted now.
* A sequence holds pages for its whole context from admission on, so only decoding can run out of pages.
* `running` is in order of arrival. When pages run out, its last sequence is preempted: it gives up its pages, keeps its
  tokens, and waits in its place by arrival to be run again. The first in `running` is never preempted and moves in
  every step, so everything finishes.
* A prompt's full blocks are taken from the prefix index where it has them. A block that a running sequence is about
  to compute is *promised*; a waiting request whose next block is promised waits for it. A promise ends when the block
  is indexed, or when its maker stops or is preempted, or when the weights change; it cannot outlive its maker.
* The last token of a context is always run, for its logits. So siblings share floor((prompt - 1) / page_tokens) blocks
  and run the rest, at most page_tokens tokens, each on its own page; nothing is copied on write.
* A sequence is *pure* while all its keys and values come from the current weights. Only pure sequences index blocks.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tandem.engine.admit import admits, growth, length_limit, pages_for
from tandem.engine.config import EngineConfig
from tandem.engine.pages import PagePool
from tandem.engine.prefix import PrefixIndex, extend_keys, root_key
from tandem.errors import ConfigError
from tandem.types import Completion, Request, StopReason, VersionSpan, WeightVersion

INITIAL = WeightVersion(0, "")  # of an engine that was told of no other
MIXED = b""  # root of a sequence whose keys and values have no name: of several versions, or sharing is off


@dataclass(slots=True)
class Work:
    """Tokens of one sequence to run at absolute positions [start, start + len(tokens)).

    Slot of position p: pages[p // page_tokens] * page_tokens + p % page_tokens. `pages` is the scheduler's own list,
    covers at least start + len(tokens) positions, and only grows; read it, never keep or change it.
    """

    sequence: int  # number of the sequence: one a submit, in order, never used again
    start: int
    tokens: list[int]
    pages: list[int]
    samples: bool  # draw the token of position start + len(tokens) from the last row's logits
    request: Request  # sampling parameters and seed


@dataclass(slots=True)
class Batch:
    """One forward pass: decodes first, then chunks of prompts. Each sequence appears at most once."""

    works: list[Work]
    version: WeightVersion  # the weights it is to be run with
    num_decodes: int  # works[:num_decodes] have one token each (a chunk may have one too)
    num_tokens: int
    named: list[int] = field(default_factory=list)  # pages that entered the prefix index since the last commit's batch
    shared: list[int] = field(default_factory=list)  # pages taken from the index since then, by sequences that start

    @property
    def num_samples(self) -> int:
        return sum(work.samples for work in self.works)


@dataclass(slots=True)
class Sampled:
    """What a runner drew for the works with `samples`, in their order."""

    tokens: list[int]
    logprobs: list[float]  # nats, of the distribution really sampled from
    kept: list[bytes] = field(default_factory=list)  # see `types.kept_ids`; b"" without filters; empty: none filters
    unfiltered_logprobs: list[float] = field(default_factory=list)  # with `kept`: nats, before the filters


@dataclass(slots=True)
class Stats:
    """Counts since the start. run_tokens - recomputed_tokens were run for the first time."""

    batches: int = 0
    run_tokens: int = 0  # rows of all forward passes
    sampled_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the index at first admission
    recomputed_tokens: int = 0  # run again after a preemption
    preemptions: int = 0
    evicted_pages: int = 0
    finished: int = 0
    aborted: int = 0
    most_running: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request. `tokens` and `pages` only grow; what has been run is tokens[:computed]."""

    request: Request
    arrival: int  # its place in every queue, and its number
    limit: int  # context length at which it ends by LENGTH
    submitted_s: float
    tokens: list[int]  # prompt and generated
    started_s: float | None = None
    computed: int = 0  # leading tokens whose keys and values lie in `pages`
    pages: list[int] = field(default_factory=list)
    root: bytes = MIXED  # weights of all computed tokens; MIXED where there is no single one
    keys: list[bytes] = field(default_factory=list)  # names of leading full blocks, under `root`
    awaits: bytes | None = None  # the promised block it was last found waiting for
    logprobs: list[float] = field(default_factory=list)
    kept: list[bytes] = field(default_factory=list)  # one a generated token where the request filters; else empty
    unfiltered_logprobs: list[float] = field(default_factory=list)  # with `kept`
    spans: list[tuple[int, int]] = field(default_factory=list)  # (weight step, first generated token it sampled)
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    reached: int = 0  # most tokens ever computed before a preemption

    def completion(self, reason: StopReason, now: float) -> Completion:
        """What the caller gets. A request that never ran counts its whole life as waiting."""
        ends = [start for _, start in self.spans[1:]] + [len(self.logprobs)]
        return Completion(
            request_id=self.request.id,
            tokens=tuple(self.tokens[len(self.request.tokens) :]),
            logprobs=tuple(self.logprobs),
            versions=tuple(VersionSpan(step, start, end) for (step, start), end in zip(self.spans, ends, strict=False)),
            stop_reason=reason,
            submitted_s=self.submitted_s,
            started_s=now if self.started_s is None else self.started_s,
            finished_s=now,
            cached_tokens=self.cached_tokens,
            recomputed_tokens=self.recomputed_tokens,
            kept=tuple(self.kept),
            unfiltered_logprobs=tuple(self.unfiltered_logprobs),
        )


def stops_by_token(sequence: Sequence) -> StopReason | None:
    """STOP_TOKEN where the last token is one of the request's stop tokens."""
    return StopReason.STOP_TOKEN if sequence.tokens[-1] in sequence.request.sampling.stop_token_ids else None


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Scheduler:
    """Queues, pages and prefix index of one engine.

    max_context: positions the model has, or None. stops: asked after every sampled token whether it was the last; the
    engine adds stop strings, a simulator its own lengths; LENGTH is decided here. At most one batch is out: an abort or
    a new version withdraws it.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        max_context: int | None = None,
        stops: Callable[[Sequence], StopReason | None] = stops_by_token,
        version: WeightVersion = INITIAL,
    ) -> None:
        self.config = config
        self.max_context = max_context
        self.stops = stops
        self.pool = PagePool(num_pages, config.page_tokens)
        self.index = PrefixIndex(self.pool)
        self.version = version
        self.root = root_key(version) if config.share_prefixes else MIXED
        self.live: dict[str, Sequence] = {}  # by request id
        self.running: list[Sequence] = []  # by arrival
        self.waiting: list[Sequence] = []  # by arrival
        self.promised: dict[bytes, Sequence] = {}  # name of a block -> the running sequence that will compute it
        self.planned: Batch | None = None
        self._named: list[int] = []  # for the next batch; a batch that is planned again keeps them
        self._shared: list[int] = []
        self._stats = Stats()
        self._arrivals = 0

    @property
    def stats(self) -> Stats:
        return replace(self._stats, evicted_pages=self.index.num_evicted)

    def submit(self, request: Request, now: float) -> None:
        """Queues a request. ConfigError: empty prompt, no token asked, id in use. CapacityError: it can never fit."""
        if request.id in self.live:
            raise ConfigError(f"request id {request.id!r} is in use by a live request; ids must be unique.")
        config = self.config
        limit = length_limit(request, self.pool.num_pages, config.page_tokens, config.kv_memory_bytes, self.max_context)
        sequence = Sequence(request, self._arrivals, limit, now, list(request.tokens))
        self._arrivals += 1
        self.live[request.id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str, now: float) -> Completion | None:
        """Ends a request at once and returns what it has; None where no live request has that id."""
        sequence = self.live.pop(request_id, None)
        if sequence is None:
            return None
        self.planned = None
        if sequence.pages:
            self.running.remove(sequence)
            self._give_up_pages(sequence)
        else:
            self.waiting.remove(sequence)
        self._stats.aborted += 1
        return sequence.completion(StopReason.ABORTED, now)

    def receive(self, version: WeightVersion) -> None:
        """Other weights from the next plan on. Running sequences go on over their old keys and values, unnamed."""
        if version == self.version:
            return
        self.planned = None
        self.version = version
        if self.config.share_prefixes:
            self.root = root_key(version)
        self.promised.clear()
        for sequence in self.running:
            sequence.root, sequence.keys = MIXED, []

    def plan(self, now: float) -> Batch:
        """The next batch; empty only where nothing is live. A batch never committed is simply planned again."""
        works, prefills = self._decodes()
        num_decodes = len(works)
        budget = self.config.batch_tokens - num_decodes
        for sequence in prefills:
            if budget == 0:
                break
            budget -= self._chunk(works, sequence, budget)
        if self.waiting:
            budget = self._admit(works, budget, now)
        num_tokens = self.config.batch_tokens - budget
        self.planned = Batch(works, self.version, num_decodes, num_tokens, self._named, self._shared)
        return self.planned

    def _decodes(self) -> tuple[list[Work], list[Sequence]]:
        """A work for each running sequence that has one token to run, and the sequences that have more."""
        works: list[Work] = []
        prefills: list[Sequence] = []
        page_tokens = self.config.page_tokens
        for sequence in self.running:  # preemption pops from the end, which this walk has not reached
            start, tokens, pages = sequence.computed, sequence.tokens, sequence.pages
            if len(tokens) - start > 1:
                prefills.append(sequence)
                continue
            if start == len(pages) * page_tokens:
                page = self._page_for(sequence)
                if page is None:
                    break
                pages.append(page)
            works.append(Work(sequence.arrival, start, [tokens[-1]], pages, True, sequence.request))
        return works, prefills

    def _page_for(self, sequence: Sequence) -> int | None:
        """One more page for a running sequence, at the cost of the latest; None where that is itself."""
        while (page := self.index.take()) is None:
            victim = self.running.pop()
            victim.reached = max(victim.reached, victim.computed)
            self._give_up_pages(victim)
            insort(self.waiting, victim, key=_arrival)
            self._stats.preemptions += 1
            if victim is sequence:
                return None
        return page

    def _chunk(self, works: list[Work], sequence: Sequence, budget: int) -> int:
        """Adds a work of at most `budget` tokens of a running sequence; returns how many."""
        start, tokens = sequence.computed, sequence.tokens
        end = min(len(tokens), start + budget)
        works.append(
            Work(sequence.arrival, start, tokens[start:end], sequence.pages, end == len(tokens), sequence.request)
        )
        return end - start

    def _admit(self, works: list[Work], budget: int, now: float) -> int:
        """Starts waiting requests in order of arrival until tokens, places or pages run out; returns the tokens left.

        Only those that wait for a promised block are passed over.
        """
        config, waiting, running = self.config, self.waiting, self.running
        ahead = -1  # pages the running sequences will take soon; counted when first needed
        passed: list[Sequence] = []
        seen = 0
        for sequence in waiting:
            if budget == 0 or len(running) >= config.max_sequences:
                break
            hits = self._hits(sequence)
            if hits is None:
                passed.append(sequence)
                seen += 1
                continue
            if ahead < 0:
                ahead = sum(self._growth(other) for other in running)
            ahead += self._growth(sequence)
            need = pages_for(len(sequence.tokens), config.page_tokens) - len(hits)
            available = self.pool.num_available - sum(self.pool.refs[page] == 0 for page in hits)
            if not admits(need, ahead, available, len(running)):
                break
            seen += 1
            self._start(sequence, hits, need, now)
            budget -= self._chunk(works, sequence, budget)
        waiting[:seen] = passed
        self._stats.most_running = max(self._stats.most_running, len(running))
        return budget

    def _hits(self, sequence: Sequence) -> list[int] | None:
        """Indexed pages of the leading blocks of a waiting sequence; None where it had better wait for the next one."""
        if sequence.awaits in self.promised:
            return None
        if sequence.root != self.root:
            sequence.root, sequence.keys = self.root, []
        if self.root == MIXED:
            return []
        page_tokens = self.config.page_tokens
        extend_keys(sequence.keys, self.root, sequence.tokens, page_tokens)
        most = (len(sequence.tokens) - 1) // page_tokens  # the last token is always run
        hits = self.index.match(sequence.keys, most)
        if len(hits) < most and sequence.keys[len(hits)] in self.promised:
            sequence.awaits = sequence.keys[len(hits)]
            return None
        return hits

    def _growth(self, sequence: Sequence) -> int:
        config = self.config
        return growth(len(sequence.tokens), sequence.limit, config.lookahead_tokens, config.page_tokens)

    def _start(self, sequence: Sequence, hits: list[int], need: int, now: float) -> None:
        """Moves a waiting sequence to running, with `hits` shared and `need` pages of its own; promises its blocks."""
        for page in hits:
            self.pool.share(page)  # all before the first take, which may evict
        self._shared += hits
        fresh = [self.index.take() for _ in range(need)]
        sequence.pages = hits + [page for page in fresh if page is not None]
        assert len(sequence.pages) == len(hits) + need, f"{need} pages were promised to sequence {sequence.arrival}"
        sequence.computed = len(hits) * self.config.page_tokens
        if sequence.started_s is None:
            sequence.started_s = now
            sequence.cached_tokens = sequence.computed
            self._stats.cached_tokens += sequence.computed
        for key in sequence.keys[len(hits) :]:
            self.promised.setdefault(key, sequence)
        insort(self.running, sequence, key=_arrival)

    def commit(self, batch: Batch, sampled: Sampled, now: float) -> list[Completion]:
        """Takes what a planned batch gave; returns the requests it finished."""
        assert batch is self.planned, "a batch is committed once, with nothing between its plan and its commit"
        assert len(sampled.tokens) == len(sampled.logprobs) == batch.num_samples, (
            f"the runner gave {len(sampled.tokens)} tokens and {len(sampled.logprobs)} logprobs "
            f"for {batch.num_samples} samples"
        )
        assert len(sampled.kept) == len(sampled.unfiltered_logprobs) and len(sampled.kept) in (0, batch.num_samples), (
            f"{len(sampled.kept)} kept sets, {len(sampled.unfiltered_logprobs)} unfiltered logprobs "
            f"for {batch.num_samples} samples"
        )
        self.planned = None
        self._named, self._shared = [], []
        live, page_tokens, step, stats = self.live, self.config.page_tokens, batch.version.step, self._stats
        finished: list[Completion] = []
        draws = enumerate(zip(sampled.tokens, sampled.logprobs, strict=True))
        for work in batch.works:
            sequence = live[work.request.id]
            start = sequence.computed
            sequence.computed = end = start + len(work.tokens)
            if start < sequence.reached:
                again = min(end, sequence.reached) - start
                sequence.recomputed_tokens += again
                stats.recomputed_tokens += again
            if start // page_tokens != end // page_tokens and sequence.root != MIXED:
                self._index_blocks(sequence, start // page_tokens)
            if work.samples:
                draw, (token, logprob) = next(draws)
                if not sequence.spans or sequence.spans[-1][0] != step:
                    sequence.spans.append((step, len(sequence.logprobs)))
                sequence.tokens.append(token)
                sequence.logprobs.append(logprob)
                if sampled.kept and sampled.kept[draw]:
                    sequence.kept.append(sampled.kept[draw])
                    sequence.unfiltered_logprobs.append(sampled.unfiltered_logprobs[draw])
                reason = self.stops(sequence)
                if reason is None and len(sequence.tokens) >= sequence.limit:
                    reason = StopReason.LENGTH
                if reason is not None:
                    finished.append(sequence.completion(reason, now))
                    self._give_up_pages(sequence)
                    del live[work.request.id]
        if finished:
            self.running = [sequence for sequence in self.running if sequence.pages]
        stats.batches += 1
        stats.run_tokens += batch.num_tokens
        stats.sampled_tokens += len(sampled.tokens)
        stats.finished += len(finished)
        return finished

    def _index_blocks(self, sequence: Sequence, first: int) -> None:
        """Names the blocks from `first` on that have just been filled, and keeps the promises for them."""
        page_tokens = self.config.page_tokens
        if len(sequence.keys) * page_tokens < sequence.computed:
            extend_keys(sequence.keys, sequence.root, sequence.tokens, page_tokens)
        for block in range(first, sequence.computed // page_tokens):
            if self.index.insert(sequence.keys[block], sequence.pages[block]):
                self._named.append(sequence.pages[block])
            self.promised.pop(sequence.keys[block], None)

    def _give_up_pages(self, sequence: Sequence) -> None:
        """A sequence stops running: its unkept promises are withdrawn, its pages released. It keeps its tokens."""
        for key in sequence.keys[sequence.computed // self.config.page_tokens :]:
            if self.promised.get(key) is sequence:
                del self.promised[key]
        self.index.release(sequence.pages)
        sequence.pages = []  # a new list: a batch still out may hold the old one
        sequence.computed = 0

    def check_integrity(self) -> None:
        """AssertionError unless pages, names, queues and promises agree. O(pages + live tokens / page_tokens)."""
        page_tokens = self.config.page_tokens
        self.index.check_integrity([sequence.pages for sequence in self.running])
        assert {id(s) for s in self.running} | {id(s) for s in self.waiting} == {id(s) for s in self.live.values()}
        assert len(self.running) + len(self.waiting) == len(self.live), "a sequence is queued twice"
        assert len(self.running) <= self.config.max_sequences, len(self.running)
        for queue in (self.running, self.waiting):
            assert all(a.arrival < b.arrival for a, b in zip(queue, queue[1:], strict=False)), "a queue lost its order"
        for sequence in self.waiting:
            assert not sequence.pages and sequence.computed == 0, f"waiting sequence {sequence.arrival} holds pages"
        for sequence in self.running:
            assert pages_for(len(sequence.tokens) - 1, page_tokens) <= len(sequence.pages), sequence.arrival
            assert sequence.computed < len(sequence.tokens) < sequence.limit, (sequence.computed, sequence.limit)
            assert sequence.root in (MIXED, self.root), f"sequence {sequence.arrival} is pure under other weights"
        for key, maker in self.promised.items():
            assert maker.pages and key in maker.keys[maker.computed // page_tokens :], "a promise nobody will keep"
