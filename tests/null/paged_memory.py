"""A runner that has nothing but the paged memory to know a context by, and a device of the same.

Each slot holds a group of layers, a token, its position, and a chain: a hash of the token, of the weight version that
ran it and of the chain before. Every slot that a query sees in some group is read back through the page tables. So a
wrong page table, a page given away too early, a shared page written to or a stale hit trips an assertion, and so does a
name for a page that holds a draft which does not stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count, cycle
from typing import Any

from tandem.engine.batch import Batch, Sampled, Sequence, Work
from tandem.engine.config import EngineConfig
from tandem.engine.draft import Drafter
from tandem.engine.engine import Engine
from tandem.engine.layout import WHOLE, KvLayout
from tandem.errors import WorldError
from tandem.types import Completion, Request, Sampling, StopReason
from tests.drafting import Told

VOCAB = 7
STOP = 6
BROKEN = 1 << 32


def draw(seed: int, context: list[int]) -> tuple[int, float]:
    """The next token after a context and its log-prob; depends on every token and on the position."""
    value = hash((seed, len(context), tuple(context)))
    return value % VOCAB, -(value % 1000) / 100.0


def breaks(request: Request) -> int | None:
    """Tokens that a request gets before a draw of it fails, which its seed says."""
    return request.seed // BROKEN - 1 if request.seed >= BROKEN else None


def alone(request: Request) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """What a request generates by itself, with no engine."""
    context, logprobs = list(request.tokens), []
    for got in range(request.sampling.max_new_tokens):
        if got == breaks(request):
            break
        token, logprob = draw(request.seed, context)
        context.append(token)
        logprobs.append(logprob)
        if token in request.sampling.stop_token_ids:
            break
    return tuple(context[len(request.tokens) :]), tuple(logprobs)


@dataclass
class PagedMemory:
    """A runner. `history` is what each sequence's slots must hold, kept apart from the scheduler's own account."""

    config: EngineConfig
    num_pages: int
    layout: KvLayout = WHOLE
    slots: dict[int, tuple[int, int, int, int]] = field(default_factory=dict)  # slot -> group, token, position, chain
    contexts: dict[str, list[int]] = field(default_factory=dict)  # request -> its prompt and what was drawn for it
    history: dict[int, list[int]] = field(default_factory=dict)  # sequence -> version that ran each position
    tables: dict[int, Any] = field(default_factory=dict)  # sequence -> the page tables it was admitted with
    sampled_by: dict[str, list[int]] = field(default_factory=dict)  # request -> version step of each generated token
    run_tokens: int = 0
    prompt_tokens_run: int = 0
    reached: dict[int, int] = field(default_factory=dict)  # sequence -> its tokens that were ever run, or found
    prefilled: int = 0  # of prompts, for the first time
    repeated: int = 0
    recomputed: int = 0
    copied: int = 0  # pages
    stands: set[int] = field(default_factory=set)  # chains of tokens that are no draft, or were drawn
    summed: set[int] = field(default_factory=set)  # pages as they got a name
    wrong_drafts: int = 0  # beyond the first wrong one of a work, too
    most_pages: int = 0  # that a work's tables named
    vocab_size: int = 1 << 16  # prompts may hold what is never drawn

    def slot(self, work: Work, group: int, position: int) -> int:
        page_tokens = self.config.page_tokens
        page = work.tables[group][position // page_tokens]
        assert 0 <= page < self.num_pages
        return page * page_tokens + position % page_tokens

    def chains(self, work: Work, length: int) -> list[int]:
        chain, chains, past = 0, [], self.history[work.sequence]
        past = [*past[:length], *past[-1:] * (length - len(past))]  # a branch may be longer than its sequence
        for token, version in zip(self.context(work), past, strict=False):
            chain = hash((chain, token, version))
            chains.append(chain)
        return chains

    def admitted(self, sequence: int, tables: Any, found: int, version: int) -> None:
        """A sequence started on this many tokens of the weights that serve now; it need not have a row in that step."""
        if self.tables.get(sequence) is not tables:
            self.tables[sequence] = tables
            self.history[sequence] = [version] * found
            self.reached[sequence] = max(self.reached.get(sequence, 0), found)

    def read(self, work: Work, length: int, query: int) -> None:
        """Every slot before `length` that a query at `query` sees in some group must be this sequence's own past."""
        context, chains = self.context(work), self.chains(work, length)
        for group, kind in enumerate(self.layout.groups):
            for position in range(length):
                if position >= kind.reach.first_seen(query) or position < kind.sinks:
                    found = self.slots.get(self.slot(work, group, position))
                    wanted = (group, context[position], position, chains[position])
                    assert found == wanted, f"{work.request.id}, group {group}, at {position}: {found}, not {wanted}"

    def spoil(self, work: Work) -> None:
        """What was written before a draw failed is not to be read by anybody."""
        for position in range(work.start, work.start + len(work.tokens)):
            for group in range(len(self.layout.groups)):
                del self.slots[self.slot(work, group, position)]

    def run(self, batch: Batch) -> Sampled:
        assert 0 < batch.num_tokens == sum(len(work.tokens) for work in batch.all_works) <= self.config.batch_tokens
        assert len({work.sequence for work in batch.works}) == len(batch.works) <= self.config.max_sequences
        for page in batch.named:
            slots = range(page * self.config.page_tokens, (page + 1) * self.config.page_tokens)
            stands = [slot not in self.slots or self.slots[slot][3] in self.stands for slot in slots]  # not in: spoiled
            # An end's page may go on with drafts; that nobody takes them for their own, `read` sees.
            assert all(stands) or self.config.draft.most and stands[0], f"page {page} got a name for a draft"
        self.summed.update(batch.named)
        assert self.summed.issuperset(batch.shared), "a page is shared that no batch named"
        version = batch.version.step
        for target, source in batch.copies.items():
            for offset in range(self.config.page_tokens):
                found = self.slots.get(source * self.config.page_tokens + offset)
                self.slots.pop(target * self.config.page_tokens + offset, None)
                if found is not None:
                    self.slots[target * self.config.page_tokens + offset] = found
        self.copied += len(batch.copies)
        batch.copies.clear()
        for work in batch.works:  # all contexts are read before anything is written: no work may lean on another
            past = self.history.setdefault(work.sequence, [])
            context = self.contexts.setdefault(work.request.id, list(work.request.tokens))
            if self.tables.get(work.sequence) is not work.tables:  # admitted: hits are of the weights that serve now
                self.tables[work.sequence] = work.tables
                past[:] = [version] * work.start
            assert len(past) == work.start, f"{work.request.id} ran {len(past)} tokens and goes on at {work.start}"
            end = work.start + len(work.tokens) - max(0, work.draws - 1)
            assert work.tokens[: end - work.start] == context[work.start : end] and (work.draws == 0) == (
                end < len(context)
            )
            before, prompt = self.reached.get(work.sequence, 0), len(work.request.tokens)
            self.recomputed += max(0, min(end, before) - work.start)
            for position in range(max(work.start, before), min(end, prompt)):
                self.prefilled += position >= work.request.ran
                self.repeated += position < work.request.ran
            self.reached[work.sequence] = max(before, end)
            context += work.tokens[end - work.start :]
            self.read(work, work.start, work.start)
            self.most_pages = max(self.most_pages, sum(page >= 0 for table in work.tables for page in table))
        written: set[int] = set()
        self.read_branches(batch)
        for work in batch.works:
            self.history[work.sequence] += [version] * len(work.tokens)
        for work in batch.all_works:
            end = work.start + len(work.tokens)
            chains = self.chains(work, end)
            for position, token in enumerate(work.tokens, start=work.start):
                for group in range(len(self.layout.groups)):
                    slot = self.slot(work, group, position)
                    assert slot not in written, "two sequences write one slot"
                    written.add(slot)
                    self.slots[slot] = (group, token, position, chains[position])
                self.prompt_tokens_run += position < len(work.request.tokens)
        self.run_tokens += batch.num_tokens
        sampled = Sampled([], {"logprobs": []})
        going: dict[int, tuple[int, list[int]]] = {}  # sequence -> where what was drawn ends, and its context then
        for work in batch.all_works:
            end = work.start + len(work.tokens)
            for query in range(work.start, end):
                self.read(work, query + 1, query)
            self.stands.update(self.chains(work, end - max(0, work.draws - 1)))
            if work.draws:
                last, following = self.draw(work, sampled)
                if last > going.get(work.sequence, (0, []))[0]:
                    going[work.sequence] = last, [*self.context(work)[:last], following]
        for work in batch.works:
            if work.sequence in going:
                last, self.contexts[work.request.id] = going[work.sequence]
                self.sampled_by.setdefault(work.request.id, []).extend(
                    [version] * (last - (work.start + len(work.tokens) - work.draws))
                )
                self.reached[work.sequence] = max(self.reached[work.sequence], last)
                del self.history[work.sequence][last:]
                self.history[work.sequence] += [version] * (last - len(self.history[work.sequence]))
                self.wrong_drafts += work.start + len(work.tokens) - last
        self.wrong_drafts += sum(len(work.tokens) for work in batch.branches)
        return sampled

    def read_branches(self, batch: Batch) -> None:
        """Each is its sequence's next token, and other drafts than that has."""
        own = {work.sequence: work for work in batch.works}
        for work in batch.branches:
            decode = own[work.sequence]
            assert decode.draws > 1 and work.draws == len(work.tokens) > 1 and work.start == decode.start
            assert work.tokens[0] == decode.tokens[0] and work.tokens != decode.tokens[: len(work.tokens)]
            self.read(work, work.start, work.start)

    def context(self, work: Work) -> list[int]:
        """Of its sequence, with its own drafts."""
        return [*self.contexts[work.request.id][: work.start], *work.tokens]

    def draw(self, work: Work, sampled: Sampled) -> tuple[int, int]:
        """The token after each of a work's last rows; how long the context is that stands, and the token after it."""
        context, end = self.context(work), work.start + len(work.tokens)
        stands, ended, last, following = True, False, 0, 0
        for length in range(end - work.draws + 1, end + 1):
            token, logprob = draw(work.request.seed, context[:length])
            if length - len(work.request.tokens) == breaks(work.request):
                sampled.failed[len(sampled.tokens)] = f"{work.request.id} broke"
                if stands and not ended:
                    self.spoil(work)
            sampled.tokens.append(token)
            sampled.values["logprobs"].append(logprob)
            if stands:
                self.stands.update(self.chains(work, length))
                last, following = length, token
                ended |= token in work.request.sampling.stop_token_ids
                stands = length < end and context[length] == token
        return last, following


class DeviceFailed(WorldError):
    pass


@dataclass
class Device(PagedMemory):
    """The same, on a device: a batch is started behind others, names their draws by place, and is waited for later."""

    fails: bool = False  # the next wait
    drawn: list[int] = field(default_factory=list)  # by the last batch started
    out: list[tuple[Batch, list[int]]] = field(default_factory=list)  # slots; nobody has waited for it

    def spoil(self, work: Work) -> None:
        """The next batch was planned before this one's draws were known: it may share."""

    def start(self, batch: Batch) -> Callable[[], Sampled]:
        def known(tokens: list[int]) -> list[int]:
            assert all(token >= 0 for token in tokens[:-1])
            return [token if token >= 0 else self.drawn[-1 - token] for token in tokens]

        works = [replace(work, tokens=known(work.tokens)) for work in batch.works]
        sampled = self.run(replace(batch, works=works))
        self.drawn = sampled.tokens
        written = [
            self.slot(work, group, position)
            for work in batch.all_works
            for group in range(len(self.layout.groups))
            for position in range(work.start, work.start + len(work.tokens))
        ]
        self.out.append((batch, written))
        assert len(self.out) <= 2

        def wait() -> Sampled:
            if self.fails:
                self.fails = False
                for failed, slots in self.out:
                    for slot in slots:
                        self.slots.pop(slot, None)
                    for request_id in [work.request.id for work in failed.works if work.draws]:
                        self.contexts[request_id].pop()
                        self.sampled_by[request_id].pop()
                self.out.clear()
                raise DeviceFailed
            del self.out[0]
            return sampled

        return wait


def make(
    num_pages: int = 64,
    decode: object = None,
    layout: KvLayout = WHOLE,
    memory: type[PagedMemory] = PagedMemory,
    drafter: Drafter | None = None,
    **settings: Any,
) -> tuple[Engine, PagedMemory]:
    config = EngineConfig(
        **{"page_tokens": 4, "batch_tokens": 16, "max_sequences": 8, "lookahead_tokens": 4} | settings
    )
    runner = memory(config, num_pages, layout)
    ticks = count()
    clock = lambda: float(next(ticks))  # noqa: E731
    return Engine(runner, config, num_pages, clock=clock, decode=decode, drafter=drafter), runner  # type: ignore[arg-type]


def guesses(rights: list[int]) -> Drafter:
    """Drafts of which the first rights[i] of each turn are those that will be drawn, and the others are not; of several
    side by side each has a turn."""
    turns = cycle(rights)

    def guessed(sequence: Sequence, many: int, off: int) -> list[int]:
        context, right = sequence.tokens.copy(), next(turns)
        for place in range(many):
            token, _ = draw(sequence.request.seed, context)
            context.append(token if place < right else (token + off) % VOCAB)
        return context[len(sequence.tokens) :]

    def drafts(sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        return [guessed(sequence, many, 1) for sequence, many in zip(sequences, most, strict=True)]

    def paths(sequences: list[Sequence], most: list[int], width: list[int]) -> list[list[list[int]]]:
        asked = zip(sequences, most, width, strict=True)
        return [[guessed(sequence, many, 1 + path) for path in range(wide)] for sequence, many, wide in asked]

    return Told(drafts, paths)


def group(
    name: str,
    prompt: list[int],
    copies: int,
    max_new: int,
    stop: tuple[int, ...] = (STOP,),
    broken: int | None = None,
) -> list[Request]:
    """Siblings; a draw of the first fails after `broken` tokens."""
    sampling = Sampling(max_new_tokens=max_new, stop_token_ids=stop)
    seeds = [k + BROKEN * (broken + 1) if broken is not None and k == 0 else k for k in range(copies)]
    return [Request(f"{name}/{k}", name, tuple(prompt), sampling, seed) for k, seed in enumerate(seeds)]


def check(completion: Completion, request: Request, runner: PagedMemory) -> None:
    tokens, logprobs = alone(request)
    n = len(completion.tokens)
    if completion.stop_reason is StopReason.ABORTED:
        tokens, logprobs = tokens[:n], logprobs[:n]
    elif tokens and tokens[-1] in request.sampling.stop_token_ids:
        assert completion.stop_reason is StopReason.STOP_TOKEN
    elif n < request.sampling.max_new_tokens:
        assert n == breaks(request) and completion.stop_reason is StopReason.FAILED
        assert completion.failure == f"{request.id} broke"
    else:
        assert completion.stop_reason is StopReason.LENGTH
    assert (completion.tokens, completion.logprobs) == (tokens, logprobs)
    sampled_by = runner.sampled_by.get(request.id, [])
    # A device runs on until it is told, drafts run past an end, and a draw that fails gives nothing.
    drafting = runner.config.draft.most > 0
    more = isinstance(runner, Device) or drafting or completion.stop_reason is StopReason.FAILED
    wanted = sampled_by[:n] if more else sampled_by
    assert completion.columns["versions"].tolist() == wanted and len(wanted) == n
    assert completion.submitted_s <= completion.started_s <= completion.finished_s
