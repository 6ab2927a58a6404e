"""Steps of the Triton kernels: a step's integers in one copy to the device, what was drawn back, one wait at the end.

A step is started behind the one before and may run tokens that this one draws: they stay on the device, and its tokens
name them as -1 - (place among the draws).

A step in which every sequence runs one token and draws one without filters or masks is padded to a bucket, of sequences
and of the width of page tables, and replayed as a CUDA graph, captured when its bucket is first needed. Padding has no
tile of attention, writes no key and no value (slot -1), and what it draws is dropped; the kernels give a row the same
bits whatever rows ride along. An update leaves the graphs as they are: weights and pages are changed in place. Steps
whose rows PyTorch rounds (kernels/gpu/held.py has no kernel for the format) wait for the device: none is captured.

Tested under the interpreter, where a plain call takes the place of a graph; run on no GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.engine.batch import Batch, Sampled
from tandem.engine.rows import A, Here, StepRows, changed, sampling_of
from tandem.errors import NonFiniteError
from tandem.kernels.eights import Eights
from tandem.kernels.finite import raise_if_bad
from tandem.kernels.gpu.attention import SPAN, TiledPaths, lay_tiles, tile_tokens
from tandem.kernels.gpu.page_sum import PageSums
from tandem.kernels.gpu.sample import pick
from tandem.kernels.sample import SamplingBatch
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


class Step(NamedTuple, Generic[A]):
    """A step's arrays, here or on the device."""

    rows: StepRows[A]
    temperature_N: A
    seeds_N: A
    tile_segment: A  # of attention
    tile_row: A

    @property
    def arrays(self) -> list[A]:
        return [*self.rows, *self[1:]]


def sent(step: Step[Here], staging: Staging) -> Step[Tensor]:
    there = staging.send(step.arrays)
    return Step(StepRows(*there[: len(step.rows)]), *there[len(step.rows) :])


def padded(step: Step[Here], count: int, blocks: int) -> Step[Here]:
    """A step of one token a sequence, made one of `count` sequences and tables of `blocks` pages."""
    rows = step.rows
    more, wider = count - len(rows.tokens_T), blocks - rows.table_GSP.shape[2]

    def pad(array: Here, value: float = 0) -> Here:
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, more)], constant_values=value)

    rows = StepRows(
        tokens_T=pad(rows.tokens_T),
        positions_T=pad(rows.positions_T),
        slots_GT=pad(rows.slots_GT, -1),
        row_start_S=np.arange(count + 1, dtype=np.int32),
        first_S=pad(rows.first_S),
        table_GSP=np.pad(rows.table_GSP, ((0, 0), (0, more), (0, wider))),
        rows_N=np.arange(count),
    )
    return Step(rows, pad(step.temperature_N, 1), pad(step.seeds_N), pad(step.tile_segment, -1), pad(step.tile_row))


class _Graph:
    """A captured step of one bucket."""

    def __init__(
        self,
        run: Callable[[Step[Tensor]], tuple[Tensor, ...]],
        step: Step[Here],
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._staging = Staging(device)
        self._step = sent(step, self._staging)
        self._results: tuple[Tensor, ...] = ()
        self._replay = capture(lambda: self._keep(run(self._step)))

    def _keep(self, results: tuple[Tensor, ...]) -> None:
        self._results = results

    def __call__(self, step: Step[Here]) -> tuple[Tensor, ...]:
        """What the step gives; valid until the next graph runs."""
        for there, array in zip(self._staging.send(step.arrays), self._step.arrays, strict=True):
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
        self._drawn = torch.zeros(runner.config.most_draws, dtype=torch.int64, device=self._device)  # by the last step
        self._captured_at: list[int] = []
        weights = [weight for _, weight in runner.decoder.weights()]
        self._waits = any(one.rounding.rows and not isinstance(one.codes, Eights) for one in weights)

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Sequences and pages of a table, of each graph."""
        return list(self._graphs)

    def _addresses(self) -> list[int]:
        pools = [tensor for pool in self._runner.pools for tensor in pool.tensors()]
        read = [address for _, weight in self._runner.decoder.weights() for address in weight.addresses]
        return read + [tensor.data_ptr() for tensor in pools]

    @torch.inference_mode()
    def start(self, batch: Batch) -> Callable[[], Sampled]:
        """Queue a batch; to be called for what it drew. Draws with noise, filters or masks are waited for at
        once, and so is what tells more than its draws.

        DeliveryError comes in place of what a step drew from shared pages that were wrong.
        """
        runner = self._runner
        wrong = self._check_pages(batch)
        if not (batch.num_draws or batch.scores):
            self._hidden(self._sent(batch, SamplingBatch.stack([], [], [])))
            found = fetch(*wrong)
            return lambda: self._checked(Sampled([], {"logprobs": []}), batch, *found())
        sampling = sampling_of(batch)
        judges = any(work.proposals is not None for work in batch.works)
        if runner.config.noise or not sampling.plain or sampling.likely_S.any() or batch.scores or judges:
            sampled = runner.taken(self._hidden(self._sent(batch, sampling)), batch, sampling)
            self._drawn[: len(sampling)] = torch.tensor(sampled.tokens, device=self._device)
            found = fetch(*wrong)
            return lambda: self._checked(sampled, batch, *found())
        if batch.num_tokens == len(batch.works) == batch.num_draws and not self._waits:
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

    def _host(self, batch: Batch, sampling: SamplingBatch) -> Step[Here]:
        rows = StepRows.of(batch.all_works, self._runner.page_tokens)
        drawing = (sampling.temperature_S, sampling.seeds_S.view(np.int64))
        return Step(rows, *drawing, *lay_tiles(rows.row_start_S, self._tile))

    def _sent(self, batch: Batch, sampling: SamplingBatch) -> Step[Tensor]:
        return sent(self._host(batch, sampling), self._staging)

    def _hidden(self, step: Step[Tensor]) -> Tensor:
        runner, rows = self._runner, step.rows
        tiles = {"tile_segment": step.tile_segment, "tile_row": step.tile_row}
        where = (rows.row_start_S, rows.first_S)
        paths_G = [TiledPaths(*where, table_SP, runner.page_tokens, **tiles) for table_SP in rows.table_GSP]
        view = PagedView(
            rows.positions_T,
            list(rows.slots_GT),
            paths_G,
            runner.group_L,
            runner.pools_L,
            runner.config.kv_window,
            runner.config.kv_sinks,
        )
        places_T = (-1 - rows.tokens_T).clamp_min(0)
        tokens_T = torch.where(rows.tokens_T < 0, self._drawn[places_T], rows.tokens_T)
        return runner.decoder.forward(tokens_T, view, rows.rows_N)

    def _step(self, step: Step[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and log-probs [N], NaN where a row cannot be drawn from, and logits [N, V]."""
        logits_NV = self._runner.decoder.logits(self._hidden(step))
        places_N = step.rows.positions_T[step.rows.rows_N] + 1
        tokens_N, logprobs_N = pick(logits_NV, step.temperature_N, step.seeds_N, places_N)
        self._drawn[: len(tokens_N)] = tokens_N
        return tokens_N, logprobs_N, logits_NV

    def _replayed(self, batch: Batch, sampling: SamplingBatch) -> tuple[Tensor, ...]:
        if not self._graphs:
            self._captured_at = self._addresses()
        assert self._addresses() == self._captured_at, "weights or pages have moved; captured steps would read the old"
        step = self._host(batch, sampling)
        count = next(bucket for bucket in self._buckets if bucket >= len(batch.works))
        blocks = max(SPAN // self._runner.page_tokens, 1 << (step.rows.table_GSP.shape[2] - 1).bit_length())
        step = padded(step, count, blocks)
        if (count, blocks) not in self._graphs:
            drawn = self._drawn.clone()  # a capture may run the step
            self._graphs[count, blocks] = _Graph(self._step, step, self._device, self._capture)
            self._drawn.copy_(drawn)
        return self._graphs[count, blocks](step)
