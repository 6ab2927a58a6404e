"""Drafters on the target's hidden states in an engine: their keys and values lie beside the target's pages, and so do
the states that they read, which the target's own pass writes for every row (models/taps.py).

So a hit finds what a miss has written: the same states, at the same slots, to the same bits. Slots of drafts are made
of the drafter's own words; those that stand are made anew, of the target's states, before it drafts again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.engine.draft import Drafter
from tandem.kernels.large import release_memory
from tandem.kernels.page_pool import KvPool, rotate_store_
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
    from tandem.speculate.block import Block
    from tandem.speculate.eagle import Eagle


class _Draft(NamedTuple):
    """A sequence that is drafted for."""

    place: int
    span: Span  # its last row is drafted from


class StateDrafter(Drafter):
    """What drafters of all kinds keep: pages, the target's states, pools of their own."""

    def __init__(self, module: Eagle | Block, runner: DecoderRunner, num_pages: int, config: EngineConfig) -> None:
        """num_pages: of the engine. ConfigError where its layers are not the target's, or no layer sees all."""
        own, layout = module.spec.model, runner.layout
        self.head = head_of(module)
        self.budget, self.page_tokens, self.most_position = config.batch_tokens, config.page_tokens, own.max_position
        behind = self._behind(config.draft.most)
        self.pages = DraftPages(layout, num_pages, config.page_tokens, config.max_sequences, behind)
        layers_L = layers_of(runner.decoder.spec, module.layers)
        self._num_layers = len(layers_L)
        self.states = FeatureSlab(num_pages, config.page_tokens, len(layers_L) * own.width, runner.decoder.dtype)
        runner.attach(self.states.pages)
        runner.tap(self.pages.group, layers_L, self.states.pages.view(-1, len(layers_L), own.width))
        shape = self.pages.num_pages, config.page_tokens, own.kv_heads, own.head_size
        self.pools = [
            KvPool(*shape, module.dtype, module.dtype, runner.decoder.device) for _ in range(module.spec.kept_layers)
        ]
        self.ran_tokens = 0  # rows of its own passes, drafts included

    def _behind(self, most: int) -> int:
        """Slots behind a sequence's tokens that its drafts take."""
        return most

    def _begun(self, sequences: list[Sequence], most: list[int]) -> tuple[list[_Draft], SpanRows | None]:
        """Who has tokens to run, and these as rows."""
        wanted = [i for i, one in enumerate(sequences) if most[i] > 0 and len(one.tokens) <= self.most_position]
        chosen = [sequences[i] for i in wanted]
        spans = self._from(chosen, self.pages.missing(chosen, self.budget))
        self.found_tokens, self.ingested_tokens = self.pages.found_tokens, self.pages.ingested_tokens
        begun = [_Draft(i, span) for i, span in zip(wanted, spans, strict=True) if span.tokens]
        rows = SpanRows.of([one.span for one in begun], self.page_tokens) if begun else None
        self.ran_tokens += 0 if rows is None else len(rows.tokens_T)
        return begun, rows

    def _from(self, sequences: list[Sequence], spans: list[Span]) -> list[Span]:
        """What is run of these to have what the pages are short of."""
        return spans

    def _tapped(self, rows: SpanRows) -> tuple[Tensor, Tensor]:
        """The target's states of the position before each row's, [T, L, M]; and where there is none, [T, 1]."""
        count_S = rows.row_start_S.diff().long()
        before_T = (rows.positions_T - 1).clamp_min(0)
        span_T = torch.repeat_interleave(torch.arange(len(count_S)), count_S)
        slots_T = rows.table_SP[span_T, before_T // self.page_tokens].long() * self.page_tokens
        slots_T += before_T % self.page_tokens
        tapped_TLM = self.states.read(slots_T).view(len(slots_T), self._num_layers, -1)
        return tapped_TLM, (rows.positions_T == 0)[:, None]

    @staticmethod
    def _sampling(sequences: list[Sequence], positions: list[int]) -> SamplingBatch:
        """How each draws the token of a position: with the noise that the target has for it."""
        return SamplingBatch.stack(
            [one.request.sampling for one in sequences], [one.request.seed for one in sequences], positions
        )

    def ended(self, sequence: Sequence) -> None:
        self.head.drawn(sequence.tokens[len(sequence.request.tokens) :])
        self.seen_tokens, self.covered_tokens = self.head.seen, self.head.covered

    def release_memory(self) -> None:
        self.pages.forget()
        if all(pool.packed for pool in self.pools):
            release_memory([tensor for pool in self.pools for tensor in pool.tensors()])


class EagleDrafter(StateDrafter):
    """Drafts of an `Eagle`, one token of all sequences at a time."""

    def __init__(self, module: Eagle, runner: DecoderRunner, num_pages: int, config: EngineConfig) -> None:
        super().__init__(module, runner, num_pages, config)
        self.module = module

    @torch.inference_mode()
    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in sequences]
        begun, rows = self._begun(sequences, most)
        if rows is None:
            return drafts
        tapped_TLM, first_T1 = self._tapped(rows)
        state_TM = self._run(rows, self.module.fused(tapped_TLM).masked_fill_(first_T1, 0.0))
        whole = [one.span.end == len(sequences[one.place].tokens) for one in begun]
        running = [one.place for one, drawn in zip(begun, whole, strict=True) if drawn]
        if not running:
            return drafts
        self._chosen(torch.tensor(whole))
        state_NM = state_TM[(rows.row_start_S[1:].long() - 1)[torch.tensor(whole)]]
        ends = [len(sequences[place].tokens) for place in running]
        sampling = self._sampling([sequences[place] for place in running], ends)
        table_NP, positions_N = rows.table_SP[torch.tensor(whole)], torch.tensor(ends)
        while True:
            drawn = self.head.draw(self.module.read(state_NM), sampling)
            for place, token in zip(running, drawn, strict=True):
                drafts[place].append(token)
            goes_on = [
                n for n, place in enumerate(running) if self._goes_on(sequences[place], drafts[place], most[place])
            ]
            if not goes_on:
                return drafts
            if len(goes_on) < len(running):
                self._chosen(torch.tensor(goes_on))
                running, state_NM = [running[n] for n in goes_on], state_NM[goes_on]
                table_NP, positions_N = table_NP[goes_on], positions_N[goes_on]
                sampling = sampling.rows(np.array(goes_on))
            tokens_N = torch.tensor([drafts[place][-1] for place in running])
            self.ran_tokens += len(running)
            state_NM = self._run(self._single(tokens_N, positions_N, table_NP), state_NM)
            positions_N = positions_N + 1
            sampling = replace(sampling, positions_S=sampling.positions_S + np.uint32(1))

    def _goes_on(self, sequence: Sequence, drafts: list[int], most: int) -> bool:
        ended = drafts[-1] in sequence.request.sampling.stop_token_ids
        return len(drafts) < most and not ended and len(sequence.tokens) + len(drafts) <= self.most_position

    def _single(self, tokens_N: Tensor, positions_N: Tensor, table_NP: Tensor) -> SpanRows:
        """A row a sequence."""
        pages_N = table_NP.gather(1, (positions_N // self.page_tokens)[:, None])[:, 0].long()
        slots_N = pages_N * self.page_tokens + positions_N % self.page_tokens
        starts = torch.arange(len(tokens_N) + 1, dtype=torch.int32)
        return SpanRows(tokens_N, positions_N, slots_N, starts, positions_N.int(), table_NP)

    def _run(self, rows: SpanRows, feature_TM: Tensor) -> Tensor:
        return self.module.step(feature_TM, rows.tokens_T, self._view(rows))

    def _view(self, rows: SpanRows) -> PagedView:
        paths = Paths(rows.row_start_S, rows.first_S, rows.table_SP, self.page_tokens)
        return PagedView(rows.positions_T, [rows.slots_T], [paths], [0] * len(self.pools), self.pools)

    def _chosen(self, which_S: Tensor) -> None:
        """Of the sequences of the last pass these go on."""


class BlockDrafter(StateDrafter):
    """Drafts of a `Block`, those of all sequences at once."""

    def __init__(
        self, module: Block, runner: DecoderRunner, num_pages: int, config: EngineConfig, head: DraftHead | None = None
    ) -> None:
        """head: in place of the module's own, which is the target's."""
        self._block = module.spec.block
        super().__init__(module, runner, num_pages, config)
        self.module, self.head = module, head or self.head

    def _behind(self, most: int) -> int:
        return self._block

    @torch.inference_mode()
    def draft(self, sequences: list[Sequence], most: list[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in sequences]
        begun, rows = self._begun(sequences, most)
        if rows is None:
            return drafts
        self._keep(rows)
        running = [one for one in begun if one.span.end == len(sequences[one.place].tokens)]
        if not running:
            return drafts
        read_ABM = self.module.run(torch.tensor([one.span.tokens[-1] for one in running]), self._view(running))
        self.ran_tokens += len(running) * self._block
        each = [min(most[one.place], self._block - 1) for one in running]
        places = [(n, place) for n, count in enumerate(each) for place in range(1, count + 1)]
        asked = [sequences[running[n].place] for n, _ in places]
        positions = [running[n].span.end + place - 1 for n, place in places]
        read_NM = torch.stack([read_ABM[n, place] for n, place in places])
        drawn = self.head.draw(read_NM, self._sampling(asked, positions))
        for (n, _), one, token in zip(places, asked, drawn, strict=True):
            found = drafts[running[n].place]
            if not found or found[-1] not in one.request.sampling.stop_token_ids:
                found.append(token)
        return drafts

    def _keep(self, rows: SpanRows) -> None:
        """Every layer's keys and values of the context."""
        module, (tapped_TLM, first_T1) = self.module, self._tapped(rows)
        context_TM = module.fused(tapped_TLM).masked_fill_(first_T1, 0.0)
        for index, pool in enumerate(self.pools):
            cut = module.heads.cut(module.context(index, context_TM))
            rotate_store_(cut, rows.positions_T, module.tables, rows.slots_T, pool)

    def _view(self, running: list[_Draft]) -> PagedView:
        """Of one block a sequence: every row sees the context and the whole block."""
        spans = [Span(one.span.end, [0] * self._block, one.span.table) for one in running]
        rows = SpanRows.of(spans, self.page_tokens)
        total = len(rows.positions_T)
        table_TP = rows.table_SP.repeat_interleave(self._block, 0)
        last_T = (rows.first_S + self._block - 1).repeat_interleave(self._block)
        paths = Paths(torch.arange(total + 1, dtype=torch.int32), last_T, table_TP, self.page_tokens)
        layers = len(self.pools)
        return PagedView(rows.positions_T, [rows.slots_T], [paths], [0] * layers, self.pools)


def head_of(module: Eagle | Block) -> DraftHead:
    """That draws its drafts."""
    vocab = module.spec.model.vocab_size
    if module.ids_V is None:
        return DraftHead(module.head, vocab)
    return DraftHead.of_rows(module.head, module.ids_V, vocab)
