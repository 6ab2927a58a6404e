"""Runs a batch of the scheduler on the decoder: page memory, one forward pass, one draw a sampling row."""

from __future__ import annotations

import numpy as np
import torch

from tandem.engine.config import EngineConfig, KvDtype
from tandem.engine.schedule import Batch, Sampled, Work
from tandem.errors import DeliveryError
from tandem.kernels.attention import Paths
from tandem.kernels.head import draw
from tandem.kernels.page_sum import page_sums
from tandem.kernels.sample import SamplingBatch, kept_sets, sample
from tandem.models.decoder import Decoder
from tandem.models.spec import ModelSpec
from tandem.models.view import PagedView
from tandem.numerics import random
from tandem.numerics.random import Stream


def pool_dtype(dtype: torch.dtype, kv_dtype: KvDtype) -> torch.dtype:
    """What keys and values are stored in by an engine that computes in `dtype`."""
    return dtype if kv_dtype == "same" else torch.float8_e4m3fn


def token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers, stored in `dtype` (see `pool_dtype`)."""
    return 2 * spec.layers * spec.kv_heads * spec.head_size * dtype.itemsize


def with_noise(hidden_SM: torch.Tensor, sampling: SamplingBatch, sigma: float) -> torch.Tensor:
    """hidden + sigma rms(hidden) eps, eps standard normal, evaluated in fp64 and rounded to the dtype of `hidden`.

    eps is drawn by (request seed, position of the token drawn, channel): a row's noise depends on its request and
    position alone, and so do the bits of its rms, whose squares are added in halves, element by element.
    64 rows of 576 channels take 1.3 ms on a Zen 5 core.
    """
    width = hidden_SM.shape[1]
    words_SM = random.word_rows(sampling.seeds_S, sampling.positions_S, width + width % 2, Stream.NOISE)
    wide_SM = hidden_SM.double().cpu().numpy()
    squares = np.pad(wide_SM * wide_SM, ((0, 0), (0, (1 << (width - 1).bit_length()) - width)))
    while squares.shape[1] > 1:
        low, high = np.split(squares, 2, axis=1)
        squares = low + high
    noisy_SM = wide_SM + sigma * np.sqrt(squares / width) * random.normal(words_SM)[:, :width]
    return torch.from_numpy(noisy_SM).to(hidden_SM)


class DecoderRunner:
    """Owns the keys and values of all pages. Memory is committed by the system as pages are first written.

    `config` declares in what it departs from the learner's forward: kv_dtype, kv_window with kv_sinks, and noise; None
    declares nothing. Its weights and dtype are those of `decoder`.
    """

    def __init__(self, decoder: Decoder, num_pages: int, page_tokens: int, config: EngineConfig | None = None) -> None:
        self.decoder = decoder
        self.config = config or EngineConfig(page_tokens=page_tokens)
        assert self.config.page_tokens == page_tokens, (self.config.page_tokens, page_tokens)
        self.page_tokens = page_tokens
        spec = decoder.spec
        shape = (2, num_pages * page_tokens, spec.kv_heads, spec.head_size)
        assert not (self.config.kv_window and spec.sliding_window), (self.config.kv_window, spec.sliding_window)
        dtype = pool_dtype(decoder.dtype, self.config.kv_dtype)
        pools = [torch.empty(shape, dtype=dtype, device=decoder.device) for _ in range(spec.layers)]
        self.pools = [(pool[0], pool[1]) for pool in pools]
        self._sums: dict[int, int] = {}  # of the pages in the prefix index, as they were when they got their name

    def _check_pages(self, batch: Batch) -> None:
        """Sum the pages that got a name; DeliveryError where a page that is shared again is not what was named."""
        pools = [pool for pair in self.pools for pool in pair]
        if batch.named:
            self._sums.update(zip(batch.named, page_sums(pools, self.page_tokens, batch.named), strict=True))
        if batch.shared:
            found = page_sums(pools, self.page_tokens, batch.shared)
            wrong = [p for p, total in zip(batch.shared, found, strict=True) if self._sums[p] != total]
            if wrong:
                raise DeliveryError(
                    f"{len(wrong)} shared pages of keys and values changed after they were computed, page {wrong[0]} "
                    "first; nothing was sampled from them. Resume from the last checkpoint; if it happens again, set "
                    "engine.share_prefixes=false and test this machine's memory."
                )

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
        device = self.decoder.device
        slots = torch.from_numpy(slots_T).to(device)
        config = self.config
        places = (torch.from_numpy(positions_T).to(device), slots, paths.to(device))
        return PagedView(*places, self.pools, config.kv_window, config.kv_sinks)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Sampled:
        """Write the keys and values of the batch's tokens and draw a token for each work that samples."""
        works = batch.works
        self._check_pages(batch)
        tokens_T = torch.tensor([token for work in works for token in work.tokens], dtype=torch.int64)
        tokens_T = tokens_T.to(self.decoder.device)
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
        if self.config.noise:
            hidden_SM = with_noise(hidden_SM, sampling, self.config.noise)
        if not sampling.filters_S.any():
            tokens_S, logprobs_S = draw(hidden_SM, self.decoder.head, sampling)
            return Sampled(tokens_S.tolist(), logprobs_S.tolist())
        logits_SV = self.decoder.logits(hidden_SM)
        tokens_S, logprobs_S = sample(logits_SV, sampling)
        return Sampled(tokens_S.tolist(), logprobs_S.tolist(), *kept_sets(logits_SV, tokens_S, sampling))
