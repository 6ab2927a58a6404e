"""A small model as drafter: any checkpoint of the target's vocabulary, on pages beside the target's.

A draft is drawn as the target draws, by the same noise of (seed, position, token id) and the same temperature and
filters. So the more alike two distributions are, the more often both draw one token, at any temperature; a drafter
that is the target has every draft stand (Daliri et al., 2408.07978).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.engine.draft import Drafter
from tandem.kernels.sample import SamplingBatch
from tandem.speculate.pages import DraftPages, PagedDecoder, Span
from tandem.speculate.vocabulary import DraftHead

if TYPE_CHECKING:
    from torch import Tensor

    from tandem.engine.batch import Sequence
    from tandem.engine.config import EngineConfig
    from tandem.engine.layout import KvLayout
    from tandem.models.decoder import Decoder


class ModelDrafter(Drafter):
    """Drafts of a decoder that knows nothing of the target but its tokens.

    What it has not run of a sequence yet, it runs as the sequence is first drafted for: of a prompt the blocks that
    nobody's drafts needed before, of an answer what stood since. At most engine.batch_tokens in a step; who has to wait
    for the rest is drafted nothing.
    """

    def __init__(
        self, decoder: Decoder, head: DraftHead, layout: KvLayout, num_pages: int, config: EngineConfig
    ) -> None:
        """layout, num_pages: of the engine's pages. ConfigError where none is of a layer that sees all."""
        self.head, self.budget = head, config.batch_tokens
        self.most_position = decoder.spec.max_position
        self.pages = DraftPages(layout, num_pages, config.page_tokens, config.max_sequences, config.draft.most)
        self.paged = PagedDecoder(decoder, self.pages.num_pages, config.page_tokens)

    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in sequences]
        wanted = [i for i, one in enumerate(sequences) if most[i] > 0 and len(one.tokens) <= self.most_position]
        spans = self.pages.missing([sequences[i] for i in wanted], self.budget)
        self.found_tokens, self.ingested_tokens = self.pages.found_tokens, self.pages.ingested_tokens
        rows = [(i, span) for i, span in zip(wanted, spans, strict=True) if span.tokens]
        drawing = [(i, span) for i, span in rows if span.end == len(sequences[i].tokens)]
        behind = {i: 0 for i, _ in drawing}  # drafts that were run
        while rows:
            hidden_NM = self.paged.hidden([span for _, span in rows], [i in behind for i, _ in rows])
            tokens = self._drawn([(sequences[i], span.end) for i, span in drawing], hidden_NM)
            rows = []
            for (i, span), token in zip(drawing, tokens, strict=True):
                if token in sequences[i].request.sampling.stop_token_ids:
                    continue  # if the target draws it, then without having run it
                drafts[i].append(token)
                if len(drafts[i]) < most[i] and span.end < self.most_position:
                    rows.append((i, Span(span.end, [token], span.table)))
                    behind[i] += 1
            drawing = rows
        for i, count in behind.items():
            self.pages.drafted(sequences[i], drafts[i][:count])
        return drafts

    def _drawn(self, rows: list[tuple[Sequence, int]], hidden_NM: Tensor) -> list[int]:
        """The tokens that these sequences have at these positions, were the drafter the target."""
        if not rows:
            return []
        sampling = SamplingBatch.stack(
            [sequence.request.sampling for sequence, _ in rows],
            [sequence.request.seed for sequence, _ in rows],
            [position for _, position in rows],
        )
        return self.head.draw(hidden_NM, sampling)

    def ended(self, sequence: Sequence) -> None:
        self.head.drawn(sequence.tokens[len(sequence.request.tokens) :])
        self.seen_tokens, self.covered_tokens = self.head.seen, self.head.covered

    def release_memory(self) -> None:
        self.pages.forget()
        self.paged.release_memory()
