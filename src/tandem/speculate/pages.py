"""What a drafter keeps of each token, in slots that are numbered as the target's own are.

The pages of the target's first group of full attention have a second half: a drafter's keys and values, or the features
that it reads. The scheduler decides who holds a page, shares it, copies it and lets it go, and knows of one half only.
What a drafter has to find out by itself is which of the second halves are written:

* A slot holds what is made of the tokens up to its own and of nothing behind it. So two sequences that share a block's
  page may share what a drafter keeps of it, and a block's name (engine/prefix.py) names that too.
* `names[page]` is the block all of whose slots hold what they should. Who writes another block to a page takes the name
  away first. A page that was let go and comes back under its old name needs nothing; under another it has no name here.
* What is on the page that is not full, and on pages of blocks without a name (of several versions of the weights), is
  known of the sequence that wrote it, while it holds the same tables: one that was preempted begins by names again.
* Slots of drafts lie behind the committed tokens, on the sequence's last page as far as that goes and then on pages of
  the drafter's own. They stand where the drafts were drawn, and are overwritten where they were not.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.engine.layout import KvLayout, pages_for
from tandem.errors import ConfigError
from tandem.kernels.large import large, release_memory
from tandem.kernels.page_pool import KvPool
from tandem.kernels.paths import Paths
from tandem.models.decoder import Decoder
from tandem.models.fused import FusedForward, fits
from tandem.models.view import PagedView

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence as Live
    from tandem.engine.tables import PageTables


class Span(NamedTuple):
    """Tokens of a sequence to run at positions [start, start + len(tokens)), which may lie anywhere in `table`."""

    start: int
    tokens: list[int]
    table: array[int]  # int32: the page of each block

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(slots=True)
class _Written:
    """Of one sequence: leading tokens whose slots hold what they should."""

    tables: PageTables  # that it held then
    end: int
    named: int  # leading blocks of those that have their name, or need none
    drafts: list[int] = field(default_factory=list)  # whose slots follow `end`


def whole_group(layout: KvLayout) -> int:
    """The first group of layers whose queries see all of a context. ConfigError where there is none."""
    found = next((group for group, one in enumerate(layout.groups) if not one.limited), None)
    if found is None:
        raise ConfigError(
            "a drafter with weights keeps what it knows on the pages of a layer that sees the whole context, and no "
            "layer of this engine does. Set engine.draft.by to suffix or none, or leave engine.kv_window out."
        )
    return found


class DraftPages:
    """Which slots beside the target's pages are written, and where drafts go.

    num_pages: of the target. Pages from there on are the drafter's own: `spare` for each of `most_sequences`, enough
    for `most_drafts` drafts that go beyond a sequence's last page.
    """

    def __init__(
        self, layout: KvLayout, num_pages: int, page_tokens: int, most_sequences: int, most_drafts: int
    ) -> None:
        """ConfigError as `whole_group`."""
        self.group = whole_group(layout)
        self.page_tokens = page_tokens
        self.spare = pages_for(most_drafts, page_tokens)
        self._own = num_pages
        self._most = most_sequences
        self.num_pages = num_pages + self.spare * most_sequences
        self.names: dict[int, bytes] = {}
        self.found_tokens = self.ingested_tokens = (
            0  # of contexts: whose slots were written, and that were given to run
        )
        self._written: OrderedDict[int, _Written] = OrderedDict()  # by arrival, those asked for last behind

    def forget(self) -> None:
        """Nothing is written: other weights draft, or the memory is gone."""
        self.names.clear()
        self._written.clear()

    def missing(self, sequences: Sequence[Live], most_tokens: int) -> list[Span]:
        """Of each running sequence the tokens to run, all of them in one pass and at most so many: those whose slots
        are not written, and the last one in any case, which is drafted from.

        A span ends before its sequence does, or is empty, where tokens ran out: nothing is drafted from it. From here
        on the slots of all spans are taken for written.
        """
        found: list[Span] = []
        for place, sequence in enumerate(sequences):
            assert sequence.pages is not None
            known, one = len(sequence.tokens), self._known(sequence)
            start = min(one.end, known - 1)
            end = min(known, start + most_tokens)
            most_tokens -= end - start
            self.ingested_tokens += end - start
            self._write(sequence, one, start, end)
            first = self._own + place * self.spare
            table = sequence.pages.tables[self.group] + array("i", range(first, first + self.spare))
            found.append(Span(start, sequence.tokens[start:end], table))
        return found

    def drafted(self, sequence: Live, drafts: Sequence[int]) -> None:
        """Drafts whose slots were written behind a sequence's tokens: those that stand need not be run again."""
        one, pages = self._written[sequence.arrival], sequence.pages
        assert pages is not None and one.end == len(sequence.tokens), (one.end, len(sequence.tokens))
        one.drafts = list(drafts[: pages.blocks * self.page_tokens - one.end])

    def _known(self, sequence: Live) -> _Written:
        """What is written of a sequence, as it is now."""
        tokens, pages, written = sequence.tokens, sequence.pages, self._written
        one = written.get(sequence.arrival)
        assert pages is not None
        if one is None or one.tables is not pages:
            table, keys, blocks = pages.tables[self.group], sequence.keys, 0
            while blocks < min(len(keys), len(table)) and self.names.get(table[blocks]) == keys[blocks]:
                blocks += 1
            self.found_tokens += blocks * self.page_tokens
            one = written[sequence.arrival] = _Written(pages, blocks * self.page_tokens, blocks)
        for draft in one.drafts:
            if one.end == len(tokens) or tokens[one.end] != draft:
                break
            one.end += 1
        one.drafts = []
        written.move_to_end(sequence.arrival)
        if len(written) > self._most:
            written.popitem(last=False)  # it does not run, or is run again from its names
        return one

    def _write(self, sequence: Live, one: _Written, start: int, end: int) -> None:
        """The slots of [start, end) are about to hold what they should, and those behind a sequence's tokens drafts."""
        assert sequence.pages is not None
        table, keys, size, names = sequence.pages.tables[self.group], sequence.keys, self.page_tokens, self.names
        for block in range(start // size, len(table)):
            if block >= len(keys) or names.get(table[block]) != keys[block]:
                names.pop(table[block], None)
        one.end = max(one.end, end)
        while one.named < min(len(keys), one.end // size):
            names[table[one.named]] = keys[one.named]
            one.named += 1


class PagedDecoder:
    """A decoder without gradients over keys and values of its own, in slots that are numbered as another's are."""

    def __init__(self, decoder: Decoder, num_pages: int, page_tokens: int) -> None:
        """Memory is committed by the system as pages are first written."""
        spec = decoder.spec
        assert decoder.kept is None, "keys and values of a drafter are as they are computed"
        shape = num_pages, page_tokens, spec.kv_heads, spec.head_size, decoder.dtype, None, decoder.device
        self.decoder, self.page_tokens = decoder, page_tokens
        self.pools = [KvPool(*shape) for _ in range(spec.layers)]
        reaches = list(dict.fromkeys(spec.reaches))  # groups of layers, with pages of the same numbers
        self._group_L = [reaches.index(reach) for reach in spec.reaches]
        self._groups = len(reaches)
        self._forward = FusedForward(decoder, self.pools) if fits(decoder, self.pools) else decoder.forward

    def release_memory(self) -> None:
        """What the pages hold is lost; on the host their memory is the system's until they are written again."""
        if self.decoder.device.type == "cpu":
            release_memory([tensor for pool in self.pools for tensor in pool.tensors()])

    @torch.inference_mode()
    def hidden(self, spans: Sequence[Span], last: Sequence[bool]) -> Tensor:
        """Writes the keys and values of all tokens; final hidden states [N, M] of the spans' last ones that are asked
        for. Every span has tokens; one may read what another writes in the same call."""
        rows = SpanRows.of(spans, self.page_tokens)
        paths = Paths(rows.row_start_S, rows.first_S, rows.table_SP, self.page_tokens)
        slots_G, paths_G = [rows.slots_T] * self._groups, [paths] * self._groups
        view = PagedView(rows.positions_T, slots_G, paths_G, self._group_L, self.pools)
        tokens_T = rows.tokens_T.clamp(max=self.decoder.spec.vocab_size - 1)  # the target's may have more, padded
        return self._forward(tokens_T, view, (rows.row_start_S[1:].long() - 1)[torch.tensor(last, dtype=torch.bool)])


class SpanRows(NamedTuple):
    """T rows of S spans, on the host."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64
    row_start_S: Tensor  # [S + 1] int32
    first_S: Tensor  # int32: the position of each span's first row
    table_SP: Tensor  # int32, page 0 behind a span's blocks

    @staticmethod
    def of(spans: Sequence[Span], page_tokens: int) -> SpanRows:
        count_S = np.array([len(span.tokens) for span in spans], dtype=np.int32)
        first_S = np.array([span.start for span in spans], dtype=np.int32)
        row_start_S = np.zeros(len(spans) + 1, dtype=np.int32)
        np.cumsum(count_S, out=row_start_S[1:])
        tokens_T = np.fromiter(chain.from_iterable(span.tokens for span in spans), np.int64, count=int(row_start_S[-1]))
        span_T = np.repeat(np.arange(len(spans)), count_S)
        positions_T = np.arange(len(tokens_T)) + (first_S - row_start_S[:-1])[span_T]
        table_SP = np.zeros((len(spans), max(len(span.table) for span in spans)), dtype=np.int32)
        for row_P, span in zip(table_SP, spans, strict=True):
            row_P[: len(span.table)] = span.table
        slots_T = table_SP[span_T, positions_T // page_tokens].astype(np.int64) * page_tokens
        slots_T += positions_T % page_tokens
        return SpanRows(*map(torch.from_numpy, (tokens_T, positions_T, slots_T, row_start_S, first_S, table_SP)))


class FeatureSlab:
    """Numbers of each token beside the target's pages, such as its hidden states: [pages, page_tokens, width].

    Written for every row that the target runs, so that they are wherever its keys and values are: a runner that was
    given the slab (`DecoderRunner.attach`) copies, sums and parks it with its pages.

    >>> slab = FeatureSlab(2, 4, 3, torch.float32)
    >>> slab.write(torch.tensor([5]), torch.ones(1, 3)); slab.read(torch.tensor([5])).tolist()
    [[1.0, 1.0, 1.0]]
    """

    def __init__(self, num_pages: int, page_tokens: int, width: int, dtype: torch.dtype) -> None:
        self._rows = large(num_pages * page_tokens, width, dtype=dtype)
        self._page_tokens = page_tokens

    def write(self, slots_T: Tensor, features_TX: Tensor) -> None:
        self._rows[slots_T] = features_TX

    def read(self, slots_T: Tensor) -> Tensor:
        """A copy, [T, width]. Slots that were never written may hold anything."""
        return self._rows[slots_T]

    @property
    def pages(self) -> Tensor:
        """The memory, a page a row."""
        return self._rows.view(-1, self._page_tokens * self._rows.shape[1])
