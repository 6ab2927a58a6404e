"""Runs a batch of the scheduler on the decoder: page memory, one forward pass, one draw a row that draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tandem.engine.batch import Batch, Sampled, Work
from tandem.engine.config import EngineConfig
from tandem.engine.layout import KvLayout
from tandem.engine.opened import OpenPages
from tandem.engine.reject import Trials, judged
from tandem.engine.rows import Here, StepRows, changed, sampling_of, scored_rows
from tandem.errors import ConfigError, NonFiniteError
from tandem.kernels.choice import backend
from tandem.kernels.head import draw
from tandem.kernels.large import release_memory
from tandem.kernels.linear import logits
from tandem.kernels.page_pool import INT4, KvPool
from tandem.kernels.page_sum import page_sums
from tandem.kernels.paths import Paths
from tandem.kernels.rounding import Kept, kept_of
from tandem.kernels.sample import SamplingBatch, kept_sets, likeliest, sample, token_logprobs, top_tokens
from tandem.kernels.span_pool import SpanPool
from tandem.kernels.weight import Weight
from tandem.models.adapter import AdapterSet
from tandem.models.decoder import Decoder
from tandem.models.fused import FusedForward, RowAdapters, fits
from tandem.models.taps import Taps
from tandem.models.view import PagedView
from tandem.numerics import random
from tandem.numerics.names import PAGES, stored_kv
from tandem.numerics.random import Stream
from tandem.types import Reach

if TYPE_CHECKING:
    from tandem.engine.draft import Drafter
    from tandem.engine.graph import DeviceSteps


SCORED = 64  # rows of prompts whose logits are in memory at once


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


POOL_DTYPES = {"float8_e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": INT4}


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


def apart(drawn: Callable[[NDArray[np.int64]], Sampled], rows: int) -> Sampled:
    """What is drawn of each row alone, by its number; `failed` names the rows that raise NonFiniteError."""
    parts: list[Sampled] = []
    for row in range(rows):
        try:
            parts.append(drawn(np.array([row])))
        except NonFiniteError as error:
            parts.append(Sampled([0], {}, {row: str(error)}))
    names = {name: None for part in parts for name in part.values}
    return Sampled(
        [part.tokens[0] for part in parts],
        {name: [part.values[name][0] if name in part.values else None for part in parts] for name in names},
        {row: reason for part in parts for row, reason in part.failed.items()},
    )


class DecoderRunner:
    """Owns the keys and values of all pages. Memory is committed by the system as pages are first written.

    A page holds page_tokens tokens of the layers of one group of `layout`: pools[i] is that of the i-th of them.

    `config` declares in what it departs from the learner's forward: kv_dtype, kv_window with kv_sinks, and noise; None
    declares nothing. Its weights and dtype are those of `decoder`.
    """

    def __init__(self, decoder: Decoder, num_pages: int, page_tokens: int, config: EngineConfig | None = None) -> None:
        self.decoder = decoder
        self.config = config or EngineConfig(page_tokens=page_tokens)
        assert self.config.page_tokens == page_tokens, (self.config.page_tokens, page_tokens)
        self.page_tokens = page_tokens
        spec = decoder.spec
        assert not self.config.kv_window or set(spec.reaches) == {Reach()}, (self.config.kv_window, spec.reaches)
        kept = decoder.kept.name if decoder.kept is not None else "same"
        self.layout = KvLayout.for_engine(spec, self.config, dtype_name(decoder.dtype), kept)
        assert len({group.token_bytes for group in self.layout.groups}) == 1, "one pool serves all groups"
        stored = POOL_DTYPES.get(stored_kv(self.config.kv_dtype, kept), decoder.dtype)
        shape = (num_pages, page_tokens, spec.kv_heads, spec.head_size)
        self.kept = None if self.config.kv_dtype in PAGES else kept_of(self.config.kv_dtype)  # beside the decoder's
        self.opened: OpenPages | None = None
        self.pools: list[KvPool | SpanPool]
        rule = (self.kept or decoder.kept or Kept("same", None)).span
        assert rule is None or rule.tokens == page_tokens, (rule, page_tokens)
        if self.layout.rounds_full and self.config.draft.branches > 1:
            raise ConfigError(
                f"engine.draft.branches is {self.config.draft.branches} and full pages are rounded (engine.kv_dtype "
                "or model.kv): a sequence fills one page at a time there. Set engine.draft.branches to 1."
            )
        if self.layout.open_bytes:
            assert rule is not None, self.config.kv_dtype
            groups = len(self.layout.groups)
            places = max(1, min(self.config.max_sequences, num_pages // groups))
            self.opened = OpenPages(places, page_tokens)
            sizes = num_pages, places * groups, spec.kv_heads, spec.head_size
            self.pools = [SpanPool(*sizes, decoder.dtype, rule) for _ in range(self.layout.depth)]
        else:
            self.pools = [KvPool(*shape, decoder.dtype, stored, decoder.device) for _ in range(self.layout.depth)]
        self.pools_L = [self.pools[pool] for _, pool in self.layout.place_L]
        self.group_L = [group for group, _ in self.layout.place_L]
        plain = [pool for pool in self.pools_L if isinstance(pool, KvPool)]
        fused = self.kept is None and self.opened is None and fits(decoder, plain)
        self.forward = FusedForward(decoder, plain) if fused else decoder.forward
        self.adapters: dict[str, AdapterSet] = {}  # that requests may name; of `decoder`
        self._page_tensors = [tensor for pool in self.pools for tensor in pool.tensors()]
        self._attached: list[torch.Tensor] = []
        self._tapped: tuple[int, torch.Tensor, torch.Tensor] | None = None
        self.drafter: Drafter | None = None  # that has weights, and keeps what it knows beside these pages
        self._sums: dict[int, int] = {}  # of the pages in the prefix index, as they were when they got their name
        self.device_steps: DeviceSteps | None = None
        if backend(decoder.embed.value) == "triton":
            from tandem.engine.graph import DeviceSteps

            self.device_steps = DeviceSteps(self)

    @property
    def vocab_size(self) -> int:
        return self.decoder.spec.vocab_size

    @property
    def start(self) -> Callable[[Batch], Callable[[], Sampled]] | None:
        """See `Runner`; None where the device is the host."""
        return self.device_steps.start if self.device_steps is not None else None

    @property
    def head(self) -> Weight:
        """The output head, as this engine has it."""
        head = self.decoder.head
        if self.config.logits == "same" or head.narrow:
            return head
        own = copy(head)  # the same tensors
        own.narrow = True
        return own

    @property
    def page_bytes(self) -> int:
        """Of one page, in all pools."""
        return sum(tensor[0].nbytes for tensor in self._page_tensors)

    def read_pages(self, pages: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """What pages hold, a row of bytes each, and their sums. On the host."""
        rows = torch.cat([tensor.view(torch.uint8)[list(pages)] for tensor in self._page_tensors], 1)
        return rows.numpy(), page_sums(self._page_tensors, pages)

    def write_pages(self, pages: Sequence[int], rows: np.ndarray) -> list[int]:
        """What `read_pages` gave, onto other pages; their sums now. On the host."""
        first = 0
        for tensor in self._page_tensors:
            memory = tensor.view(torch.uint8)
            memory[list(pages)] = torch.from_numpy(np.ascontiguousarray(rows[:, first : first + memory.shape[1]]))
            first += memory.shape[1]
        return page_sums(self._page_tensors, pages)

    def release_memory(self) -> None:
        """What the pages hold is lost; on the host their memory is the system's until they are written again."""
        if self.decoder.device.type == "cpu":
            opened = [tensor for pool in self.pools if isinstance(pool, SpanPool) for tensor in pool.open.tensors()]
            release_memory([*self._page_tensors, *opened])
            if self.drafter is not None:
                self.drafter.release_memory()

    def attach(self, pages_PX: torch.Tensor) -> None:
        """A page holds this row too, which is copied, summed and parked with it. Before anything runs; on the host."""
        assert len(pages_PX) == len(self._page_tensors[0]), (len(pages_PX), len(self._page_tensors[0]))
        self._attached.append(pages_PX)
        self._page_tensors.append(pages_PX)

    def tap(self, group: int, layers_L: torch.Tensor, slab: torch.Tensor) -> None:
        """Every row that runs writes its states into `slab` (models/taps.py), at its slots on the pages of that group
        of layers. Before anything runs; on the host."""
        assert self.device_steps is None, "states are tapped on the host alone"
        self._tapped = group, layers_L, slab

    def _taps(self, rows: StepRows[Here]) -> Taps | None:
        if self._tapped is None:
            return None
        group, layers_L, slab = self._tapped
        return Taps(layers_L, slab, torch.from_numpy(rows.slots_GT[group]))

    def _check_pages(self, batch: Batch) -> None:
        """Sum the pages that got a name; DeliveryError where a page that is shared again is not what was named."""
        if batch.named:
            self._sums.update(zip(batch.named, page_sums(self._page_tensors, batch.named), strict=True))
        if batch.shared:
            found = page_sums(self._page_tensors, batch.shared)
            wrong = [p for p, total in zip(batch.shared, found, strict=True) if self._sums[p] != total]
            if wrong:
                raise changed(wrong)

    def _view(self, rows: StepRows[Here]) -> PagedView:
        starts, firsts = torch.from_numpy(rows.row_start_S), torch.from_numpy(rows.first_S)
        paths_G = [Paths(starts, firsts, torch.from_numpy(table), self.page_tokens) for table in rows.table_GSP]
        slots_G = [torch.from_numpy(slots_T) for slots_T in rows.slots_GT]
        places = (torch.from_numpy(rows.positions_T), slots_G, paths_G)
        limits = self.config.kv_window, self.config.kv_sinks
        view = PagedView(*places, self.group_L, self.pools_L, *limits, self.kept)
        view.places_S = self._places(rows)
        return view

    def _places(self, rows: StepRows[Here]) -> np.ndarray | None:
        """Where each work fills its page, where these lie apart."""
        if self.opened is None:
            return None
        ends_S = rows.first_S + np.diff(rows.row_start_S)
        works = zip(rows.first_S.tolist(), ends_S.tolist(), rows.table_GSP[0].tolist(), strict=True)
        return np.array(self.opened.fill([*works]), dtype=np.int64)

    def _copy(self, copies: dict[int, int]) -> None:
        """Ends of contexts that others ran, onto pages of those that start."""
        for pool in self.pools:
            if isinstance(pool, KvPool):
                pool.copy_(list(copies.values()), list(copies))
        for memory in self._attached:
            memory[list(copies)] = memory[list(copies.values())]
        if self.opened is None:
            return
        groups, pairs = range(len(self.layout.groups)), self.opened.copies(copies)
        targets, sources = ([pair[i] * len(groups) + g for pair in pairs for g in groups] for i in (0, 1))
        for pool in self.pools:
            if isinstance(pool, SpanPool):
                pool.open.copy_(sources, targets)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Sampled:
        """Write the keys and values of the batch's tokens and draw the tokens that its works ask for."""
        if self.start is not None:
            return self.start(batch)()
        works = batch.all_works
        self._check_pages(batch)
        if self.opened is not None:
            self.opened.begin()
        if batch.copies:
            self._copy(batch.copies)
            batch.copies.clear()
        return self.taken(self._hidden(works), batch, sampling_of(batch))

    def _hidden(self, works: Sequence[Work]) -> torch.Tensor:
        """Final hidden states of the rows that draw or score; each work's rows with its adapter."""
        rows = StepRows.of(works, self.page_tokens)
        names, taps = list(dict.fromkeys(work.request.adapter for work in works)), self._taps(rows)
        fused = self.forward if isinstance(self.forward, FusedForward) else None
        tapped: dict[str, Any] = {} if taps is None else {"taps": taps} if fused is not None else {"watch": taps.see}
        if names == [""] or fused is not None:
            given = torch.from_numpy(rows.tokens_T), self._view(rows), torch.from_numpy(rows.rows_N)
        if names == [""]:
            return self.forward(*given, **tapped)
        sets = [self.adapters[name] if name else self.decoder.adapter for name in names]
        place = {name: index for index, name in enumerate(names)}
        place_T = np.repeat([place[work.request.adapter] for work in works], [len(work.tokens) for work in works])
        if fused is not None:
            served = [one for one in sets if one is not None]
            numbers = np.array([-1 if one is None else served.index(one) for one in sets])
            return fused(*given, RowAdapters(served, torch.from_numpy(numbers[place_T])), taps)
        hidden_NM = torch.empty(len(rows.rows_N), self.decoder.spec.width, dtype=self.decoder.dtype)
        for name, one in zip(names, sets, strict=True):  # a row has the same bits in any company
            own = StepRows.of([work for work in works if work.request.adapter == name], self.page_tokens)
            drawn = np.flatnonzero(place_T == place[name])[own.rows_N]
            seen = self._taps(own)
            with self.decoder.wearing(one):
                own_NM = self.decoder.forward(
                    torch.from_numpy(own.tokens_T),
                    self._view(own),
                    torch.from_numpy(own.rows_N),
                    watch=None if seen is None else seen.see,
                )
            hidden_NM[torch.from_numpy(np.searchsorted(rows.rows_N, drawn))] = own_NM
        return hidden_NM

    def taken(self, hidden_NM: torch.Tensor, batch: Batch, sampling: SamplingBatch) -> Sampled:
        """What the rows of a step that draw or score give."""
        trials = Trials.of(batch)
        if not batch.scores:
            return self.drawn(hidden_NM, sampling, trials) if len(sampling) else Sampled([], {"logprobs": []})
        works = batch.all_works
        scores = scored_rows(works)
        ends = np.cumsum([len(work.tokens) for work in works])
        draws = np.concatenate(
            [np.arange(end - work.draws, end) for work, end in zip(works, ends.tolist(), strict=True)]
        )
        rows = np.union1d(draws, scores)
        drawing, scoring = (torch.from_numpy(np.searchsorted(rows, some)) for some in (draws, scores))
        sampled = Sampled([], {"logprobs": []})
        if len(draws):
            sampled = self.drawn(hidden_NM[drawing.to(hidden_NM.device)], sampling, trials)
        sampled.scores = self._scored(hidden_NM[scoring.to(hidden_NM.device)], batch)
        return sampled

    def _scored(self, hidden_RM: torch.Tensor, batch: Batch) -> dict[int, tuple[list[float], list[bytes]]]:
        """The model's own log-probs of prompts' next tokens, NaN where a row is not finite, and the likeliest ones."""
        found, first = dict[int, tuple[list[float], list[bytes]]](), 0
        for place, work in enumerate(batch.works):
            logprobs, likely, last = list[float](), list[bytes](), first + work.scores
            told = torch.tensor(work.request.tokens[work.start + 1 : work.start + 1 + work.scores])
            for begin in range(first, last, SCORED):
                logits_RV = logits(hidden_RM[begin : min(begin + SCORED, last)], self.head)
                next_R = told[begin - first : begin - first + len(logits_RV)]
                logprobs += token_logprobs(logits_RV, next_R).tolist()
                if work.request.likely:
                    likely += top_tokens(logits_RV, [work.request.likely] * len(logits_RV))
            if work.scores:
                found[place] = logprobs, likely
            first = last
        return found

    def drawn(self, hidden_SM: torch.Tensor, sampling: SamplingBatch, trials: Trials | None = None) -> Sampled:
        """A token for each row of the final hidden states, or why it has none. trials: drafts that rows judge."""
        if self.config.noise:
            hidden_SM = with_noise(hidden_SM, sampling, self.config.noise)
        try:
            return self._drawn(hidden_SM, sampling, trials)
        except NonFiniteError:  # a row has the same bits alone

            def drawn(rows_N: NDArray[np.int64]) -> Sampled:
                some = trials.rows(rows_N) if trials is not None else None
                return self._drawn(hidden_SM[torch.from_numpy(rows_N)], sampling.rows(rows_N), some)

            return apart(drawn, len(sampling))

    def _drawn(self, hidden_SM: torch.Tensor, sampling: SamplingBatch, trials: Trials | None) -> Sampled:
        sampled, told_N = self._tokens(hidden_SM, sampling, trials), np.flatnonzero(sampling.likely_S)
        if len(told_N):
            logits_NV = logits(hidden_SM[torch.from_numpy(told_N).to(hidden_SM.device)], self.head)
            likely: list[bytes | None] = [None] * len(sampling)
            for row, tokens in zip(told_N.tolist(), likeliest(logits_NV, sampling.rows(told_N)), strict=True):
                likely[row] = tokens
            sampled.values["likely"] = likely
        return sampled

    def _tokens(self, hidden_SM: torch.Tensor, sampling: SamplingBatch, trials: Trials | None) -> Sampled:
        if sampling.plain and trials is None:
            tokens_S, logprobs_S = draw(hidden_SM, self.head, sampling)
            return Sampled(tokens_S.tolist(), {"logprobs": logprobs_S.tolist()})
        logits_SV = logits(hidden_SM, self.head)
        tokens_S, logprobs_S = sample(logits_SV, sampling) if trials is None else judged(logits_SV, sampling, trials)
        kept, unfiltered = kept_sets(logits_SV, tokens_S, sampling)
        values = {"logprobs": logprobs_S.tolist(), "kept": kept, "unfiltered_logprobs": unfiltered}
        return Sampled(tokens_S.tolist(), values)
