"""A drafter on the target's hidden states in an engine: its keys and values lie beside the target's pages, and so do
the states that it reads, which the target's own pass writes for every row (models/taps.py).

So a hit finds what a miss has written: the same states, at the same slots, to the same bits. Slots of drafts are made
of the drafter's own states; those that stand are made anew, of the target's, before it drafts again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tandem.engine.draft import Drafter
from tandem.kernels.large import release_memory
from tandem.kernels.page_pool import KvPool
from tandem.kernels.paths import Paths
from tandem.kernels.sample import SamplingBatch
from tandem.models.taps import layers_of
from tandem.models.view import PagedView
from tandem.speculate.pages import DraftPages, FeatureSlab, Span, SpanRows
from tandem.speculate.vocabulary import DraftHead

if TYPE_CHECKING:
    from tandem.engine.batch import Sequence
    from tandem.engine.config import EngineConfig
    from tandem.engine.runner import DecoderRunner
    from tandem.speculate.eagle import Eagle


class _Draft(NamedTuple):
    """A sequence that is drafted for."""

    place: int
    span: Span  # its last row is drafted from


class EagleDrafter(Drafter):
    """Drafts of an `Eagle`, one token of all sequences at a time."""

    def __init__(
        self, module: Eagle, head: DraftHead, runner: DecoderRunner, num_pages: int, config: EngineConfig
    ) -> None:
        """num_pages: of the engine. ConfigError where its layers are not the target's, or no layer sees all."""
        self.module, self.head, self.budget = module, head, config.batch_tokens
        own = module.spec.model
        self.most_position = own.max_position
        self.page_tokens = config.page_tokens
        self.pages = DraftPages(runner.layout, num_pages, config.page_tokens, config.max_sequences, config.draft.most)
        layers_L = layers_of(runner.decoder.spec, module.layers)
        self.states = FeatureSlab(num_pages, config.page_tokens, len(layers_L) * own.width, runner.decoder.dtype)
        runner.attach(self.states.pages)
        runner.tap(self.pages.group, layers_L, self.states.pages.view(-1, len(layers_L), own.width))
        shape = self.pages.num_pages, config.page_tokens, own.kv_heads, own.head_size
        self.pool = KvPool(*shape, module.dtype, module.dtype, runner.decoder.device)
        self.ran_tokens = 0  # rows of its own passes, drafts included

    @torch.inference_mode()
    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in sequences]
        wanted = [i for i, one in enumerate(sequences) if most[i] > 0 and len(one.tokens) <= self.most_position]
        spans = self.pages.missing([sequences[i] for i in wanted], self.budget)
        begun = [_Draft(i, span) for i, span in zip(wanted, spans, strict=True) if span.tokens]
        if not begun:
            return drafts
        rows = SpanRows.of([one.span for one in begun], self.page_tokens)
        state_TM = self._run(rows, self._features(rows))
        whole = torch.tensor([one.span.end == len(sequences[one.place].tokens) for one in begun])
        running = [one for one, drawn in zip(begun, whole.tolist(), strict=True) if drawn]
        state_NM = state_TM[(rows.row_start_S[1:].long() - 1)[whole]]
        while running:
            sampling = SamplingBatch.stack(
                [sequences[one.place].request.sampling for one in running],
                [sequences[one.place].request.seed for one in running],
                [one.span.end for one in running],
            )
            for one, token in zip(running, self.head.draw(self.module.read(state_NM), sampling), strict=True):
                drafts[one.place].append(token)
            goes_on = [
                n
                for n, one in enumerate(running)
                if len(drafts[one.place]) < most[one.place]
                and one.span.end < self.most_position
                and drafts[one.place][-1] not in sequences[one.place].request.sampling.stop_token_ids
            ]
            running = [
                _Draft(one.place, Span(one.span.end, drafts[one.place][-1:], one.span.table))
                for one in (running[n] for n in goes_on)
            ]
            if running:
                state_NM = self._run(SpanRows.of([one.span for one in running], self.page_tokens), state_NM[goes_on])
        return drafts

    def _features(self, rows: SpanRows) -> Tensor:
        """Of the position before each row's, [T, M]."""
        count_S = rows.row_start_S.diff().long()
        before_T = (rows.positions_T - 1).clamp_min(0)
        span_T = torch.repeat_interleave(torch.arange(len(count_S)), count_S)
        slots_T = rows.table_SP[span_T, before_T // self.page_tokens].long() * self.page_tokens
        slots_T += before_T % self.page_tokens
        tapped_TLM = self.states.read(slots_T).view(len(slots_T), len(self.module.layers), -1)
        return self.module.fused(tapped_TLM).masked_fill_((rows.positions_T == 0)[:, None], 0.0)

    def _run(self, rows: SpanRows, feature_TM: Tensor) -> Tensor:
        self.ran_tokens += len(rows.tokens_T)
        paths = Paths(rows.row_start_S, rows.first_S, rows.table_SP, self.page_tokens)
        view = PagedView(rows.positions_T, [rows.slots_T], [paths], [0], [self.pool])
        return self.module.step(feature_TM, rows.tokens_T, view)

    def ended(self, sequence: Sequence) -> None:
        self.head.drawn(sequence.tokens[len(sequence.request.tokens) :])

    def release_memory(self) -> None:
        self.pages.forget()
        if self.pool.packed:
            release_memory(self.pool.tensors())
