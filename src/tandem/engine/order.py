"""Who starts next, and whose prompt runs first: by priority, the higher first, then by engine.order.

arrival: who came first. longest: who is expected to generate most yet, so that the longest rollout of a step does not
start last; those of its group that have ended tell its length, or else its limit does. fair: whose program has had
least, in prompt tokens run and tokens generated. shares: engine/deal.py.

Nobody starves: a request that was submitted PATIENCE batches ago goes before all that were not, by arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tandem.engine.batch import Batch, Sequence
    from tandem.engine.config import EngineConfig

PATIENCE = 4096
REMEMBERED = 1 << 16  # programs, and prompts: those that have gone longest without an event are forgotten

Key = tuple[int, int, int, int]
T = TypeVar("T")


def _renew(table: dict[str, T], key: str, value: T) -> None:
    """table[key] = value, as its latest entry, in a table of at most REMEMBERED."""
    table.pop(key, None)
    table[key] = value
    if len(table) > REMEMBERED:
        del table[next(iter(table))]


class Order:
    """The order of one engine's queue. Deterministic: it knows counts, no time."""

    def __init__(self, config: EngineConfig) -> None:
        self.rule = config.order
        self._had: dict[str, int] = {}  # tokens, by program
        self._ended: dict[str, tuple[int, int]] = {}  # requests ended and the tokens they generated, by group
        self._ranked = False  # some request came with a priority

    @property
    def _by_arrival(self) -> bool:
        return self.rule == "arrival" and not self._ranked

    def submitted(self, sequence: Sequence) -> None:
        """A request waits from now on."""
        self._ranked = self._ranked or sequence.request.priority != 0

    def key(self, sequence: Sequence, batches: int) -> Key:
        """Sorts sequences, the first to go first; `batches` have been run so far."""
        if batches - sequence.submitted_batch >= PATIENCE:
            return 0, 0, 0, sequence.arrival
        rank = -sequence.request.priority
        if self.rule == "arrival":
            return 1, rank, 0, sequence.arrival
        if self.rule == "fair":
            return 1, rank, self._had.get(sequence.request.program_id, 0), sequence.arrival
        most = sequence.limit - len(sequence.tokens)
        count, total = self._ended.get(sequence.request.group, (0, 0))
        likely = max(1, total // count - sequence.num_drawn) if count else most
        return 1, rank, -min(most, likely), sequence.arrival

    def queue(self, waiting: list[Sequence], batches: int) -> Iterator[Sequence]:
        """Waiting sequences, given by arrival, first to last; a key may grow as others start."""
        if self._by_arrival:
            yield from waiting
            return
        heap = [(self.key(sequence, batches), sequence) for sequence in waiting]
        heapify(heap)
        while heap:
            key, sequence = heap[0]
            present = self.key(sequence, batches)
            if present > key:
                heapreplace(heap, (present, sequence))
            else:
                heappop(heap)
                yield sequence

    def chunks(self, prefills: list[Sequence], oldest: Sequence, batches: int) -> list[Sequence]:
        """Running sequences with more than one token to run, given by arrival; the oldest running one stays first."""
        if self._by_arrival or len(prefills) < 2:
            return prefills
        return sorted(prefills, key=lambda sequence: (sequence is not oldest, self.key(sequence, batches)))

    def charge(self, sequence: Sequence, cached: int) -> None:
        """A sequence starts or stops: its program had the tokens that are new since, `cached` of them for nothing."""
        if self.rule == "fair":
            program = sequence.request.program_id
            had = max(0, len(sequence.tokens) - sequence.charged - cached)
            sequence.charged = len(sequence.tokens)
            _renew(self._had, program, self._had.get(program, 0) + had)

    def waits(self, sequence: Sequence) -> None:
        """It was preempted, and waits again."""

    def starts(self, sequence: Sequence) -> None:
        """A request that waited runs."""

    def gone(self, sequence: Sequence, waited: bool) -> None:
        """A request is live no more; whether it waited."""

    def gives_way(self, running: list[Sequence], price: Callable[[Sequence], tuple[float, int]]) -> Sequence:
        """The one to preempt where those that run need pages."""
        return min(running, key=price)

    def ran(self, batch: Batch) -> None:
        """A batch was advanced."""

    def failed(self, batch: Batch) -> None:
        """An advanced batch gave nothing."""

    @property
    def wakes_s(self) -> float:
        """Seconds until somebody who is held back may run; 0 where nobody is."""
        return 0.0

    def ended(self, sequence: Sequence) -> None:
        """A request ended by itself."""
        group = sequence.request.group
        if self.rule == "longest" and group:
            count, total = self._ended.get(group, (0, 0))
            _renew(self._ended, group, (count + 1, total + sequence.num_drawn))
