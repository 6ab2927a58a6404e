"""What goes between a scheduler and a runner, and what is known of a live request."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from tandem.columns import Columns
from tandem.engine.tables import PageTables
from tandem.engine.tally import Tally
from tandem.types import Completion, Request, StopReason, WeightVersion

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.engine.constraint import Matcher
    from tandem.engine.share import Node

INITIAL = WeightVersion(0, "")  # of an engine that was told of no other
MIXED = b""  # root of a sequence whose keys and values have no name: of several versions, or sharing is off


def scores(request: Request, start: int, count: int) -> int:
    """How many of so many rows from a position on tell the log-prob of the prompt's next token."""
    return max(0, min(count, len(request.tokens) - 1 - start)) if request.scored else 0


@dataclass(slots=True)
class Work:
    """Tokens of one sequence to run at absolute positions [start, start + len(tokens)).

    Slot of position p in group g: tables[g][p // page_tokens] * page_tokens + p % page_tokens. The tables are the
    scheduler's own, cover at least start + len(tokens) positions, and are NULL (-1) for blocks that no query from
    `start` on sees in that group. They change after the step; read them, never keep or change them.
    """

    sequence: int  # number of the sequence: one a submit, in order, never used again
    start: int
    tokens: list[int]  # known ones, then drafts: as many as it draws beyond one
    tables: tuple[array[int], ...]  # a page table (int32) for each group of layers
    draws: int  # the last rows, each of which draws the token of the next position; 0 where more is known
    request: Request  # sampling parameters and seed
    # Under engine.draft.verify=reject: what its drafts were drawn from, [drafts, V] fp32; () where each was sure. None:
    # a draft stands where it is what is drawn.
    proposals: Tensor | tuple[()] | None = None

    @property
    def scores(self) -> int:
        """Its first so many rows tell the log-prob of the prompt's next token."""
        return scores(self.request, self.start, len(self.tokens))

    @property
    def told(self) -> int:
        """Its draws whose likeliest tokens are told: each another product with the output head."""
        return self.draws if self.request.likely else 0


@dataclass(slots=True)
class Batch:
    """One forward pass: decodes first, then chunks of prompts, each of another sequence; then `branches`."""

    works: list[Work]
    version: WeightVersion  # the weights it is to be run with
    num_tokens: int
    named: list[int] = field(default_factory=list)  # pages that entered the prefix index since the last commit's batch
    shared: list[int] = field(default_factory=list)  # pages taken from the index since then, by sequences that start
    copies: dict[int, int] = field(default_factory=dict)  # page -> page to copy it from first; emptied by the runner
    planned_s: float = 0.0
    prefilled: int = 0  # rows of prompts that run for the first time; these three are known once it is advanced
    recomputed: int = 0  # rows that ran before a preemption
    repeated: int = 0  # rows of prompts that an earlier request had run
    masks: dict[int, bytes] = field(default_factory=dict)  # draw -> the kept set that it is made from (types.kept_ids)
    barred: dict[int, str] = field(default_factory=dict)  # draw of a constraint -> why no token can be its
    leaves: list[Node] = field(default_factory=list)  # under shares: who is charged for each work
    charges: list[tuple[Node, int]] = field(default_factory=list)  # under shares: what was charged for it
    branches: list[Work] = field(default_factory=list)  # other drafts of decodes among `works` (engine/branches.py)

    def tell(self, sequence: Sequence, start: int, end: int) -> None:
        """What the rows of a sequence are that do not just follow a draw."""
        again = max(0, min(end, sequence.reached) - start)
        sequence.recomputed_tokens += again
        self.recomputed += again
        end, known = min(end, len(sequence.request.tokens)), min(end, sequence.request.ran)
        fresh = max(start, sequence.reached)
        self.repeated += max(0, known - fresh)
        self.prefilled += max(0, end - max(fresh, known))

    @property
    def all_works(self) -> list[Work]:
        """What a runner runs, in the order of its draws."""
        return [*self.works, *self.branches] if self.branches else self.works

    @property
    def num_draws(self) -> int:
        return sum([work.draws for work in self.all_works])

    @property
    def scores(self) -> bool:
        """Whether some row tells of a prompt."""
        return any(work.request.scored and work.scores for work in self.works)


@dataclass(slots=True)
class Sampled:
    """What a runner drew, by work and row. What follows a draft that is not what was drawn is worthless."""

    tokens: list[int]  # of a draw that failed, any
    values: dict[str, list[Any]]  # column (tandem.columns) -> one a token; None where the token has none
    failed: dict[int, str] = field(default_factory=dict)  # draw -> why it has no token
    scores: dict[int, tuple[list[float], list[bytes]]] = field(default_factory=dict)  # work -> of what it scores


@dataclass(slots=True)
class Stats:
    """Counts since the start. Of run_tokens, those that are not prefilled, recomputed, repeated, dropped or of a
    rejected draft were sampled, and ran to draw the next. The time of a batch, from its plan or the end of the last one
    to its draws, is divided by rows."""

    batches: int = 0
    run_tokens: int = 0  # rows of all forward passes
    sampled_tokens: int = 0
    drafted_tokens: int = 0  # run before they were drawn
    accepted_tokens: int = 0  # of those, drawn
    drafts: int = 0  # works that ran some
    drafted_at: Tally = Tally()  # the same by position after the last token that was drawn
    accepted_at: Tally = Tally()
    drafted_found: Tally = Tally()  # by how much of their prompt was found (tally.HIT_NAMES)
    accepted_found: Tally = Tally()
    offered_tokens: int = 0  # by the drafter, run or not
    invalid_drafts: int = 0  # of no id of the vocabulary, or after one: dropped
    undrafted: Tally = Tally()  # steps that drew and had no draft, by why (tally.UNDRAFTED)
    draft_s: float = 0.0  # in the drafter
    draft_found_tokens: int = 0  # of contexts, that a drafter with pages found there
    draft_ingested_tokens: int = 0  # of contexts, that it ran
    draft_seen_tokens: int = 0  # of ended answers, while the drafter had a part of the vocabulary alone
    draft_covered_tokens: int = 0  # of those, that are in that part
    cached_tokens: int = 0  # prompt tokens found in the index at first admission
    prefilled_tokens: int = 0  # prompt tokens run for the first time
    recomputed_tokens: int = 0  # run again after a preemption
    repeated_tokens: int = 0  # run again for a program: the cache had them no more, or the weights changed
    dropped_tokens: int = 0  # run for a request that had ended
    preemptions: int = 0
    evicted_pages: int = 0
    finished: int = 0
    failed: int = 0  # of those finished
    aborted: int = 0
    most_running: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    recomputed_s: float = 0.0
    resolved_s: float = 0.0  # when the last batch was

    def clear(self) -> None:
        """All begin again."""
        for one in fields(self):
            setattr(self, one.name, one.default)

    def count(self, batch: Batch) -> None:
        """A batch was advanced."""
        self.batches += 1
        self.run_tokens += batch.num_tokens
        self.prefilled_tokens += batch.prefilled
        self.recomputed_tokens += batch.recomputed
        self.repeated_tokens += batch.repeated

    def took(self, batch: Batch, now: float) -> float:
        """It was resolved; returns its seconds."""
        seconds = max(0.0, now - max(batch.planned_s, self.resolved_s))
        row_s = seconds / max(1, batch.num_tokens)
        self.resolved_s = now
        self.prefill_s += row_s * batch.prefilled
        again = batch.recomputed + batch.repeated
        self.recomputed_s += row_s * again
        self.decode_s += row_s * (batch.num_tokens - batch.prefilled - again)
        return seconds


@dataclass(slots=True, eq=False)
class Sequence:
    """A live request. `tokens` only grow, and hold no draft; what has been run is tokens[:computed]."""

    request: Request
    arrival: int  # its place in every queue, and its number
    limit: int  # context length at which it ends by LENGTH
    submitted_s: float
    tokens: list[int]  # prompt and generated
    started_s: float | None = None
    first_s: float | None = None  # its first token
    computed: int = 0  # leading tokens whose keys and values were written, and lie in `pages` where they are still seen
    pages: PageTables | None = None  # while it runs
    root: bytes = MIXED  # weights of all computed tokens; MIXED where there is no single one
    keys: list[bytes] = field(default_factory=list)  # names of leading full blocks, under `root`
    tail: bytes | None = None  # name of what the prompt ends in (engine/tails.py), under `root`
    awaits: bytes | None = None  # the promised block it was last found waiting for
    num_drawn: int = 0  # generated tokens
    values: dict[str, list[Any]] = field(default_factory=dict)  # column -> one a generated token
    spans: list[tuple[int, int]] = field(default_factory=list)  # (weight step, first generated token it sampled)
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    reached: int = 0  # most tokens ever computed before a preemption
    submitted_batch: int = 0  # batches run before it was submitted
    charged: int = 0  # tokens that were charged to its program, see engine/order.py
    matcher: Matcher | None = None  # of its constraint, from its first draw on
    leaf: Node | None = None  # under shares: who is charged for it
    prompt: dict[str, list[Any]] = field(default_factory=dict)  # column -> one a token of a scored prompt
    found: int = 0  # under shares: its leading blocks that another held when it started, and pays for

    def score(self, start: int, logprobs: list[float], likely: list[bytes]) -> None:
        """Of its prompt's tokens from `start` on."""
        tokens = len(self.request.tokens)
        for name, values, absent in (("logprobs", logprobs, float("nan")), ("likely", likely, b"")):
            self.prompt.setdefault(name, [absent] * tokens)[start : start + len(values)] = values

    def drawn(self, first: int) -> Columns:
        """The generated tokens from the first-th on, and what is known of them."""
        prompt, spans = len(self.request.tokens), self.spans
        if spans and spans[-1][1] <= first:  # of one version, as nearly all pieces of a stream: half of the time
            versions = np.full(self.num_drawn - first, spans[-1][0], dtype=np.int32)
        else:
            steps = np.array([step for step, _ in spans], dtype=np.int32)
            versions = np.repeat(steps, np.diff(np.maximum([*(start for _, start in spans), self.num_drawn], first)))
        return Columns.of(
            tokens=self.tokens[prompt + first : prompt + self.num_drawn],
            versions=versions,
            **({"logprobs": (), **{name: values[first:] for name, values in self.values.items()}}),
        )

    def completion(self, reason: StopReason, now: float, failure: str = "") -> Completion:
        """What the caller gets. A request that never ran counts its whole life as waiting."""
        return Completion(
            request_id=self.request.id,
            columns=self.drawn(0),
            stop_reason=reason,
            submitted_s=self.submitted_s,
            started_s=now if self.started_s is None else self.started_s,
            finished_s=now,
            first_s=now if self.first_s is None else self.first_s,
            cached_tokens=self.cached_tokens,
            recomputed_tokens=self.recomputed_tokens,
            failure=failure,
            prompt=Columns.of(tokens=self.request.tokens, **self.prompt) if self.request.scored else None,
        )


def stops_by_token(sequence: Sequence) -> StopReason | None:
    """STOP_TOKEN where the last token is one of the request's stop tokens."""
    return StopReason.STOP_TOKEN if sequence.tokens[-1] in sequence.request.sampling.stop_token_ids else None
