"""Runs a batch of the scheduler on the decoder: page memory, one forward pass, one draw a sampling row."""

from __future__ import annotations

import numpy as np
import torch

from tandem.engine.schedule import Batch, Sampled, Work
from tandem.kernels.attention import Paths
from tandem.kernels.sample import SamplingBatch, sample
from tandem.models.decoder import Decoder
from tandem.models.spec import ModelSpec
from tandem.models.view import PagedView


def token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    return 2 * spec.layers * spec.kv_heads * spec.head_size * dtype.itemsize


class DecoderRunner:
    """Owns the keys and values of all pages. Memory is committed by the system as pages are first written."""

    def __init__(self, decoder: Decoder, num_pages: int, page_tokens: int) -> None:
        self.decoder = decoder
        self.page_tokens = page_tokens
        spec = decoder.spec
        shape = (2, num_pages * page_tokens, spec.kv_heads, spec.head_size)
        pools = [torch.empty(shape, dtype=decoder.dtype) for _ in range(spec.layers)]
        self.pools = [(pool[0], pool[1]) for pool in pools]

    def _view(self, works: list[Work], num_tokens: int) -> PagedView:
        """Positions, slots and page tables of the batch's rows, filled work by work."""
        positions_T = np.empty(num_tokens, dtype=np.int64)
        slots_T = np.empty(num_tokens, dtype=np.int64)
        row_start_S = np.zeros(len(works) + 1, dtype=np.int32)
        first_S = np.empty(len(works), dtype=np.int32)
        table_SP = np.zeros((len(works), max(len(work.pages) for work in works)), dtype=np.int32)
        size, row = self.page_tokens, 0
        for index, work in enumerate(works):
            count, start, pages = len(work.tokens), work.start, work.pages
            table_SP[index, : len(pages)] = pages
            first_S[index] = start
            if count == 1:
                positions_T[row] = start
                slots_T[row] = pages[start // size] * size + start % size
            else:
                positions = np.arange(start, start + count)
                positions_T[row : row + count] = positions
                slots_T[row : row + count] = (
                    table_SP[index, positions // size].astype(np.int64) * size + positions % size
                )
            row += count
            row_start_S[index + 1] = row
        paths = Paths(torch.from_numpy(row_start_S), torch.from_numpy(first_S), torch.from_numpy(table_SP), size)
        return PagedView(torch.from_numpy(positions_T), torch.from_numpy(slots_T), paths, self.pools)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Sampled:
        """Write the keys and values of the batch's tokens and draw a token for each work that samples."""
        works = batch.works
        tokens_T = torch.tensor([token for work in works for token in work.tokens], dtype=torch.int64)
        view = self._view(works, batch.num_tokens)
        drawing = [index for index, work in enumerate(works) if work.samples]
        last_rows = view.paths.row_start_S[1:].to(torch.int64) - 1
        hidden_SM = self.decoder.forward(tokens_T, view, last_rows[drawing])
        if not drawing:
            return Sampled([], [])
        chosen = [works[index] for index in drawing]
        sampling = SamplingBatch.stack(
            [work.request.sampling for work in chosen],
            [work.request.seed for work in chosen],
            [work.start + len(work.tokens) for work in chosen],
        )
        tokens_S, logprobs_S = sample(self.decoder.logits(hidden_SM), sampling)
        return Sampled(tokens_S.tolist(), logprobs_S.tolist())
