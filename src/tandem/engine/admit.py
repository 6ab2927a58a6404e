"""How many pages there are, who can ever fit, and who may start now. Values and arithmetic."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from tandem.engine.config import EngineConfig
from tandem.engine.layout import KvLayout, pages_for
from tandem.engine.pages import PagePool
from tandem.engine.prefix import NULL
from tandem.errors import CapacityError, ConfigError
from tandem.types import Request

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence as LiveSequence


MOST_LIKELY = 1024  # tokens that are told beside each that is drawn


def count_pages(layout: KvLayout, config: EngineConfig) -> int:
    """Pages that fit in engine.kv_memory_bytes. CapacityError where not even one fits.

    >>> from tandem.types import Reach
    >>> count_pages(KvLayout.of((Reach(),), 0, (2 * 30 * 3 * 64 * 2,)), EngineConfig(kv_memory_bytes=1 << 30))
    2912
    """
    kv_memory_bytes, page_tokens = config.kv_memory_bytes, config.page_tokens
    num_pages = layout.pages_in(kv_memory_bytes, page_tokens, config.max_sequences)
    if num_pages < 1:
        page = layout.groups[0].page_bytes(page_tokens) + layout.open_bytes * page_tokens
        raise CapacityError(
            f"engine.kv_memory_bytes is {kv_memory_bytes}, but one page of {page_tokens} tokens takes "
            f"{page} bytes for this model: raise engine.kv_memory_bytes."
        )
    return num_pages


def check_request(request: Request, vocab_size: int) -> None:
    """ConfigError where a kernel would read beyond its memory, or the sampler has no such number.

    A prompt of 2,048 tokens takes 50 us.
    """
    for what, ids in (("token", request.tokens), ("stop_token_ids", request.sampling.stop_token_ids)):
        if ids and not (0 <= min(ids) and max(ids) < vocab_size):
            place, wrong = next((i, token) for i, token in enumerate(ids) if not 0 <= token < vocab_size)
            raise ConfigError(
                f"request {request.id!r}: {what} {wrong}, in place {place} of {len(ids)}, is outside the vocabulary of "
                f"this model. Allowed: 0 to {vocab_size - 1}. Tokenise with the tokeniser that belongs to the model."
            )
    drawn = request.sampling
    for what, value, fine, allowed in (
        ("seed", request.seed, 0 <= request.seed < 2**64, "0 to 2^64 - 1"),
        ("temperature", drawn.temperature, 0 <= drawn.temperature < 2.0**128, "0 (greedy) to what fp32 holds"),
        ("top_k", drawn.top_k, 0 <= drawn.top_k < 2**31, "0 (all tokens) to 2^31 - 1"),
        ("top_p", drawn.top_p, 0 <= drawn.top_p <= 1, "0 to 1 (all tokens)"),
        ("likely", request.likely, 0 <= request.likely <= MOST_LIKELY, f"0 (none) to {MOST_LIKELY}"),
        ("min_p", drawn.min_p, 0 <= drawn.min_p <= 1, "0 (all tokens) to 1"),
    ):
        if not fine:
            raise ConfigError(f"request {request.id!r}: {what} is {value}. Allowed: {allowed}.")


def length_limit(
    request: Request,
    layout: KvLayout,
    num_pages: int,
    page_tokens: int,
    kv_memory_bytes: int,
    max_context: int | None,
) -> int:
    """Context length, prompt included, at which the request ends by LENGTH. Refuses a request that can never run.

    The last token generated is never run, so a context of `limit` tokens takes `limit - 1` slots.
    CapacityError: the model's positions (`max_context`) or the pool cannot hold it. ConfigError: nothing to run.
    """
    prompt, asked = len(request.tokens), request.sampling.max_new_tokens
    if prompt == 0:
        raise ConfigError(f"request {request.id!r} has an empty prompt; at least one token is needed.")
    if asked < 1:
        raise ConfigError(f"request {request.id!r} has max_new_tokens {asked}; it must be at least 1.")
    limit = prompt + asked
    if max_context is not None:
        if prompt >= max_context:
            raise CapacityError(
                f"request {request.id!r}: its prompt of {prompt} tokens leaves no room in the {max_context} positions "
                "of this model: shorten the prompt."
            )
        limit = min(limit, max_context)
    needed = layout.most_pages(limit - 1, 1, page_tokens)
    if needed > num_pages:
        raise CapacityError(
            f"request {request.id!r}: its prompt of {prompt} tokens and max_new_tokens {asked} need {limit - 1} tokens "
            f"of keys and values, {needed} pages at once, but engine.kv_memory_bytes {kv_memory_bytes} holds "
            f"{layout.capacity_tokens(num_pages, page_tokens)}, in {num_pages} pages: raise "
            f"engine.kv_memory_bytes to about {-(-kv_memory_bytes * needed // num_pages)}, shorten the prompt or lower "
            "max_new_tokens."
        )
    return limit


class Latest:
    """The last KEPT of some values, in order. Fewer than ENOUGH tell nothing."""

    KEPT, ENOUGH = 512, 16

    def __init__(self) -> None:
        self._last: deque[float] = deque()
        self.ordered: list[float] = []

    def add(self, value: float) -> None:
        self._last.append(value)
        insort(self.ordered, value)
        if len(self._last) > self.KEPT:
            del self.ordered[bisect_left(self.ordered, self._last.popleft())]


class Lengths(Latest):
    """How long generations are, from the last of them that ended.

    >>> lengths = Lengths()
    >>> for tokens in [10] * 8 + [30] * 8:
    ...     lengths.record(tokens)
    >>> lengths.remaining(0), lengths.remaining(12), lengths.remaining(30)
    (20, 18, None)
    """

    def __init__(self) -> None:
        super().__init__()
        self._tail: list[int] = []  # sums of the ordered ones from the i-th on; empty where it is to be made

    def record(self, generated: int) -> None:
        """A request ended by itself after so many tokens."""
        self.add(generated)
        self._tail = []

    def remaining(self, generated: int) -> int | None:
        """Mean of what those that went on beyond `generated` tokens had left there; None where too few are known."""
        lengths = self.ordered
        first = bisect_right(lengths, generated)
        if len(lengths) < self.ENOUGH or first == len(lengths):
            return None
        if not self._tail:
            self._tail = list(accumulate(map(int, reversed(lengths))))[::-1]
        more = len(lengths) - first
        return -(-self._tail[first] // more) - generated


class Admission:
    """Whether a request may start beside those that run. A round ends with the first that may not.

    Each is expected to take the pages of its context and of a part of the tokens that it is expected to generate yet,
    one in PORTION; of `lookahead_tokens` until enough requests have ended to tell. All would be too much, since others
    end meanwhile, and preempting is cheap, since most of what it gives up is found again: on a trace of 1,024
    generations of 224 tokens on average in a pool of 11,200 tokens, 1/8 takes 13 % fewer batches than 64 tokens each
    and runs 2.3 % of the tokens again. Room for the peak, with what is given back on the way, was no better.
    """

    PORTION = 8  # one of so many

    def __init__(self, config: EngineConfig, layout: KvLayout, pool: PagePool) -> None:
        self.lengths = Lengths()
        self._config = config
        self._pool = pool
        self._limited = [group for group in layout.groups if group.limited]
        self._whole_groups = len(layout.groups) - len(self._limited)
        self._promised = 0  # pages that those of this round hold or are expected to take

    def ahead(self, sequence: LiveSequence, hit_blocks: int = 0, hit_pages: int = 0) -> int:
        """Pages that a running sequence is expected to take, or a waiting one that starts with these hits."""
        size, pages, length = self._config.page_tokens, sequence.pages, len(sequence.tokens)
        likely = self.lengths.remaining(sequence.num_drawn)
        more = self._config.lookahead_tokens if likely is None else likely // self.PORTION
        context = min(length + more, sequence.limit - 1)
        blocks = hit_blocks if pages is None else pages.blocks
        taking = self._whole_groups * max(0, pages_for(context, size) - blocks)
        if self._limited:
            held = (hit_pages if pages is None else pages.num_held) - self._whole_groups * blocks
            batch = 1 if length - sequence.computed == 1 else self._config.batch_tokens
            taking += max(0, sum([group.most_pages(context, batch, size) for group in self._limited]) - held)
        return taking

    def begin(self, running: Sequence[LiveSequence]) -> None:
        """A round of admissions beside those that run; what `admits` lets in counts from then on."""
        held = self._pool.num_pages - self._pool.num_available
        self._promised = held + sum(map(self.ahead, running))

    def admits(self, sequence: LiveSequence, hits: list[list[int]]) -> bool:
        """Whether a waiting sequence may start on `hits` now."""
        pages = [page for table in hits for page in table if page != NULL]
        cached = sum([self._pool.refs[page] == 0 for page in pages])
        self._promised += cached + self.ahead(sequence, len(hits[0]), len(pages))
        return self.lacking <= 0

    @property
    def lacking(self) -> int:
        """Pages that there are too few for all that was let in, or asked about last."""
        return self._promised - self._pool.num_pages

    def gained(self, pages: int) -> bool:
        """Others let go of so many pages; whether there are enough now."""
        self._promised -= pages
        return self.lacking <= 0
