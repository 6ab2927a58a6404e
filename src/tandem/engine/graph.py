"""Steps of the Triton kernels: a step's integers in one copy to the device, what was drawn back, one wait at the end.

A step is started behind the one before and may run tokens that this one draws: they stay on the device, and its tokens
name them as -1 - (place among the draws).

A step in which every sequence runs one token and draws one without filters is padded to a bucket, of sequences and of
the width of page tables, and replayed as a CUDA graph, captured when its bucket is first needed. Padding has no tile
of attention, writes no key and no value (slot -1), and what it draws is dropped; the kernels give a row the same bits
whatever rows ride along. An update leaves the graphs as they are: weights and pages are changed in place.

Tested under the interpreter, where a plain call takes the place of a graph; run on no GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.engine.batch import Batch, Sampled
from tandem.engine.rows import StepRows
from tandem.engine.runner import changed, sampling_of
from tandem.errors import NonFiniteError
from tandem.kernels.gpu.attention import SPAN, TiledPaths, lay_tiles, tile_tokens
from tandem.kernels.gpu.page_sum import PageSums
from tandem.kernels.gpu.sample import pick
from tandem.kernels.sample import SamplingBatch, raise_if_bad
from tandem.models.view import PagedView

if TYPE_CHECKING:
    from tandem.engine.runner import DecoderRunner

Run = Callable[[], None]
Capture = Callable[[Run], Run]  # what a run does, to be done again on the same memory
ALIGNMENT = 64  # bytes; kernels are compiled for addresses that are multiples of 16


def buckets(most: int) -> list[int]:
    """Numbers of sequences that steps are padded to.

    >>> buckets(100)
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]
    """
    found = [1, 2, 4, 8]
    while found[-1] < most:
        power = 1 << (found[-1].bit_length() - 1)
        found.append(power * 3 // 2 if found[-1] == power >= 16 else 2 * power)
    return [count for count in found if count < most] + [most]


def captures() -> Capture:
    """Capture as CUDA graphs that share one pool: each writes all that it reads of it, and one runs at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Run) -> Run:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()  # compiles what is not compiled
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            run()
        return graph.replay

    return capture


class Staging:
    """Arrays to the device in one copy from pinned memory; arrays of the same sizes go where the last ones went."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cuda"
        self._here = self._there = torch.empty(0, dtype=torch.uint8)
        self._copied = torch.cuda.Event() if self._pinned else None

    def send(self, arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
        """Valid until the next call. Waits for the last call's copy, and not for what uses it."""
        starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
        if self._copied is not None:
            self._copied.synchronize()
        if starts[-1] > len(self._here):
            self._here = torch.empty(2 * starts[-1], dtype=torch.uint8, pin_memory=self._pinned)
            self._there = torch.empty(2 * starts[-1], dtype=torch.uint8, device=self._device)
        here, sent = self._here.numpy(), []
        for start, array in zip(starts, arrays, strict=False):
            here[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
            sent.append(self._there[start : start + array.nbytes].view(kind).view(array.shape))
        self._there[: starts[-1]].copy_(self._here[: starts[-1]], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return sent


def fetch(*tensors: Tensor) -> Callable[[], list[NDArray[Any]]]:
    """Queues copies beside the CPU, of what the tensors hold at this point of the stream; to be called for them."""
    if not tensors or tensors[0].device.type != "cuda":
        copies = [tensor.numpy().copy() for tensor in tensors]
        return lambda: copies
    here = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for target, tensor in zip(here, tensors, strict=True):
        target.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[NDArray[Any]]:
        copied.synchronize()
        return [target.numpy() for target in here]

    return wait


class Fields(NamedTuple):
    """A step's arrays, here or on the device: T rows, S sequences, G groups of layers, N draws."""

    tokens_T: Any
    positions_T: Any
    slots_GT: Any
    row_start_S: Any  # [S + 1]
    first_S: Any
    table_GSP: Any
    tile_segment: Any
    tile_row: Any
    rows_N: Any  # that draw
    temperature_N: Any
    seeds_N: Any
    places_N: Any  # positions of the tokens drawn

    @classmethod
    def of(cls, rows: StepRows, rows_N: NDArray[np.int64], sampling: SamplingBatch, tile: int) -> Fields:
        """`tile`: tokens of a tile of attention."""
        drawing = (sampling.temperature_S, sampling.seeds_S.view(np.int64), sampling.positions_S.astype(np.int64))
        places = (rows.tokens_T, rows.positions_T, rows.slots_GT, rows.row_start_S, rows.first_S, rows.table_GSP)
        return cls(*places, *lay_tiles(rows.row_start_S, tile), rows_N, *drawing)

    def padded(self, count: int, blocks: int) -> Fields:
        """Of a step of one token a sequence: for `count` sequences and tables of `blocks` pages."""
        more, wider = count - len(self.tokens_T), blocks - self.table_GSP.shape[2]

        def pad(array: NDArray[Any], value: float = 0) -> NDArray[Any]:
            return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)], constant_values=value)

        return self._replace(
            tokens_T=pad(self.tokens_T),
            positions_T=pad(self.positions_T),
            slots_GT=pad(self.slots_GT, -1),
            row_start_S=np.arange(count + 1, dtype=np.int32),
            first_S=pad(self.first_S),
            table_GSP=np.pad(self.table_GSP, ((0, 0), (0, more), (0, wider))),
            tile_segment=pad(self.tile_segment, -1),
            tile_row=pad(self.tile_row),
            rows_N=np.arange(count),
            temperature_N=pad(self.temperature_N, 1),
            seeds_N=pad(self.seeds_N),
            places_N=pad(self.places_N),
        )


class _Graph:
    """A captured step of one bucket."""

    def __init__(
        self, step: Callable[[Fields], tuple[Tensor, ...]], fields: Fields, device: torch.device, capture: Capture
    ) -> None:
        self._staging = Staging(device)
        self._fields = Fields(*self._staging.send(fields))
        self._results: tuple[Tensor, ...] = ()
        self._replay = capture(lambda: self._keep(step(self._fields)))

    def _keep(self, results: tuple[Tensor, ...]) -> None:
        self._results = results

    def __call__(self, fields: Fields) -> tuple[Tensor, ...]:
        """What the step gives; valid until the next graph runs."""
        for there, array in zip(self._staging.send(fields), self._fields, strict=True):
            assert (there.data_ptr(), there.shape) == (array.data_ptr(), array.shape), "a captured array has moved"
        self._replay()
        return self._results


def why(logits_NV: Tensor, row: int) -> str:
    """Why a row could not be drawn from; a step that was started since may have written others in its place."""
    try:
        raise_if_bad(logits_NV, row)
    except NonFiniteError as error:
        return str(error)
    return f"logits row {row} of {len(logits_NV)} was not finite."


class DeviceSteps:
    """Runs the batches of one DecoderRunner, whose pages, weights and sampling they are."""

    def __init__(self, runner: DecoderRunner, capture: Capture | None = None) -> None:
        self._runner = runner
        self._device = runner.decoder.device
        self._capture = capture or (captures() if self._device.type == "cuda" else lambda run: run)
        self._staging, self._pages = Staging(self._device), Staging(self._device)
        self._sums = PageSums([tensor for pool in runner.pools for tensor in pool.tensors()])
        self._tile = tile_tokens(runner.decoder.spec.heads, runner.decoder.spec.kv_heads)
        self._buckets = buckets(runner.config.max_sequences)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._drawn = torch.zeros(self._buckets[-1], dtype=torch.int64, device=self._device)  # by the last step
        self._captured_at = self._addresses()

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Sequences and pages of a table, of each graph."""
        return list(self._graphs)

    def _addresses(self) -> list[int]:
        pools = [tensor for pool in self._runner.pools for tensor in pool.tensors()]
        return [tensor.data_ptr() for tensor in (*(w.value for _, w in self._runner.decoder.weights()), *pools)]

    @torch.inference_mode()
    def start(self, batch: Batch) -> Callable[[], Sampled]:
        """Queue a batch; to be called for what it drew. Draws with noise or filters are waited for at once.

        DeliveryError comes in place of what a step drew from shared pages that were wrong.
        """
        runner = self._runner
        wrong = self._check_pages(batch)
        if not batch.num_samples:
            self._hidden(self._sent(batch, SamplingBatch.stack([], [], [])))
            found = fetch(*wrong)
            return lambda: self._checked(Sampled([], {"logprobs": []}), batch, *found())
        sampling = sampling_of(batch)
        if runner.config.noise or sampling.filters_S.any():
            sampled = runner.drawn(self._hidden(self._sent(batch, sampling)), sampling)
            self._drawn[: len(sampling)] = torch.tensor(sampled.tokens, device=self._device)
            found = fetch(*wrong)
            return lambda: self._checked(sampled, batch, *found())
        if batch.num_tokens == len(batch.works) == batch.num_samples:
            tokens_N, logprobs_N, logits_NV = self._replayed(batch, sampling)
        else:
            tokens_N, logprobs_N, logits_NV = self._step(self._sent(batch, sampling))
        count = len(sampling)
        drawn = fetch(tokens_N[:count], logprobs_N[:count], *wrong)

        def wait() -> Sampled:
            tokens, logprobs, *found = drawn()
            bad = np.flatnonzero(np.isnan(logprobs)).tolist()
            failed = {row: why(logits_NV[:count], row) for row in bad}
            return self._checked(Sampled(tokens.tolist(), {"logprobs": logprobs.tolist()}, failed), batch, *found)

        return wait

    def _check_pages(self, batch: Batch) -> list[Tensor]:
        """Sum the pages that got a name, copy, and compare the pages that are shared again: [N] bool, or nothing."""
        lists = (batch.named, batch.shared, list(batch.copies.values()), list(batch.copies))
        if not any(lists):
            return []
        named, shared, sources, targets = self._pages.send([np.array(pages, dtype=np.int64) for pages in lists])
        if batch.named:
            self._sums.name(named)
        wrong = [self._sums.wrong(shared)] if batch.shared else []
        if batch.copies:
            for pool in self._runner.pools:
                for pages in pool.tensors():
                    raw = pages.view(torch.uint8)
                    raw[targets] = raw[sources]
            batch.copies.clear()
        return wrong

    def _checked(self, sampled: Sampled, batch: Batch, *wrong: NDArray[np.bool_]) -> Sampled:
        pages = [batch.shared[index] for index in np.flatnonzero(wrong)] if wrong else []
        if pages:
            raise changed(pages)
        return sampled

    def _fields(self, batch: Batch, sampling: SamplingBatch) -> Fields:
        rows = StepRows.of(batch.works, self._runner.page_tokens)
        drawing = np.array([work.samples for work in batch.works])
        return Fields.of(rows, rows.row_start_S[1:][drawing].astype(np.int64) - 1, sampling, self._tile)

    def _sent(self, batch: Batch, sampling: SamplingBatch) -> Fields:
        return Fields(*self._staging.send(self._fields(batch, sampling)))

    def _hidden(self, fields: Fields) -> Tensor:
        runner = self._runner
        tiles = {"tile_segment": fields.tile_segment, "tile_row": fields.tile_row}
        where = (fields.row_start_S, fields.first_S)
        paths_G = [TiledPaths(*where, table_SP, runner.page_tokens, **tiles) for table_SP in fields.table_GSP]
        view = PagedView(
            fields.positions_T,
            list(fields.slots_GT),
            paths_G,
            runner.group_L,
            runner.pools_L,
            runner.config.kv_window,
            runner.config.kv_sinks,
        )
        places_T = (-1 - fields.tokens_T).clamp_min(0)
        tokens_T = torch.where(fields.tokens_T < 0, self._drawn[places_T], fields.tokens_T)
        return runner.decoder.forward(tokens_T, view, fields.rows_N)

    def _step(self, fields: Fields) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and log-probs [N], NaN where a row cannot be drawn from, and logits [N, V]."""
        logits_NV = self._runner.decoder.logits(self._hidden(fields))
        tokens_N, logprobs_N = pick(logits_NV, fields.temperature_N, fields.seeds_N, fields.places_N)
        self._drawn[: len(tokens_N)] = tokens_N
        return tokens_N, logprobs_N, logits_NV

    def _replayed(self, batch: Batch, sampling: SamplingBatch) -> tuple[Tensor, ...]:
        assert self._addresses() == self._captured_at, "weights or pages have moved; captured steps would read the old"
        fields = self._fields(batch, sampling)
        count = next(bucket for bucket in self._buckets if bucket >= len(batch.works))
        blocks = max(SPAN // self._runner.page_tokens, 1 << (fields.table_GSP.shape[2] - 1).bit_length())
        fields = fields.padded(count, blocks)
        if (count, blocks) not in self._graphs:
            drawn = self._drawn.clone()  # a capture may run the step
            self._graphs[count, blocks] = _Graph(self._step, fields, self._device, self._capture)
            self._drawn.copy_(drawn)
        return self._graphs[count, blocks](fields)
