"""Draw tokens from logits, and the log-prob of what was drawn.

The token of a row is the argmax of x + Gumbel noise, which draws from softmax(x); the noise is keyed by (request seed,
position, token id, stream), see `numerics/random.py`, and added in fp64; ties go to the lowest id. x is made from the
logits in the order of Transformers (temperature, top-k, top-p, min-p; vLLM applies min-p before top-k):

- A mask comes first: the logit of a token that it lacks is -infinity, as if the model had given that. A row that is not
  finite is refused whatever its mask.
- temperature: x = logits / temperature in fp32. 0 is greedy: the lowest id of the largest logit; the behaviour
  distribution is one-hot, so the log-prob is 0.0.
- Tokens are ordered by x, then by lower id. top-k keeps the first k, exactly.
- top-p keeps the shortest run of them whose mass reaches top_p of the mass that top-k left. A mass is
  rint(2^40 exp(x - max x)) with the exponential in fp64: an integer, so that no order of summation can matter.
- min-p keeps x - max x >= log(min_p), in fp64.
- What is dropped becomes -infinity. log-prob = x[token] - log_sum_exp(x), in fp32: of the distribution sampled from.

`log_sum_exp` and `token_logprobs` are what the learner uses to get the same bits. The C++ (sample.h) fixes the order of
reduction and handles a row in one thread, so a row's result depends on that row alone. Without a compiler the NumPy
reference runs, on both sides: equal to itself, but not to the bits of the C++.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.kernels.build.load import library, remembered
from tandem.kernels.choice import backend
from tandem.kernels.finite import raise_if_bad
from tandem.kernels.mask import MaskTable, mask_table, masked
from tandem.numerics import random
from tandem.numerics.random import Stream
from tandem.types import kept_of, likely_of

if TYPE_CHECKING:
    from tandem.types import Sampling


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """How each of S rows is sampled, as plain arrays.

    >>> from tandem.types import Sampling
    >>> SamplingBatch.stack([Sampling(temperature=0.5)], seeds=[7], positions=[12]).temperature_S
    array([0.5], dtype=float32)
    """

    temperature_S: NDArray[np.float32]  # 0: greedy
    top_k_S: NDArray[np.int32]  # 0: all
    top_p_S: NDArray[np.float64]  # 1: all
    min_p_S: NDArray[np.float64]  # 0: all
    seeds_S: NDArray[np.uint64]
    positions_S: NDArray[np.uint32]  # absolute position of the token being drawn
    masks_S: NDArray[np.object_]  # bytes: a kept set (types.kept_ids) that the token is one of; b"": all are
    likely_S: NDArray[np.int32]  # how many of the most likely tokens are told (`likeliest`)

    def __post_init__(self) -> None:
        dtypes = (np.float32, np.int32, np.float64, np.float64, np.uint64, np.uint32, np.object_, np.int32)
        for name, dtype in zip(self.__slots__, dtypes, strict=True):
            array = getattr(self, name)
            assert array.dtype == dtype and array.shape == (len(self),) and array.flags.c_contiguous, array
        assert (self.temperature_S >= 0).all() and (self.top_k_S >= 0).all(), (self.temperature_S, self.top_k_S)
        assert (self.top_p_S >= 0).all() and (self.min_p_S >= 0).all() and (self.min_p_S <= 1).all(), self

    def __len__(self) -> int:
        return len(self.temperature_S)

    @property
    def filters_S(self) -> NDArray[np.bool_]:
        """Rows that choose among fewer tokens by top-k, top-p or min-p; a greedy row chooses among one and does not."""
        return (self.temperature_S > 0) & ((self.top_k_S > 0) | (self.top_p_S < 1) | (self.min_p_S > 0))

    @property
    def masked_S(self) -> NDArray[np.bool_]:
        """Rows with a mask, greedy ones too."""
        return self.masks_S.astype(np.bool_)

    @property
    def plain(self) -> bool:
        """Whether every row draws from all of its logits."""
        return not (self.masked_S.any() or self.filters_S.any())

    def rows(self, rows_N: NDArray[np.int64]) -> SamplingBatch:
        """The rows of these numbers, in their order."""
        return SamplingBatch(*(getattr(self, name)[rows_N] for name in self.__slots__))

    @classmethod
    def stack(
        cls,
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        positions: Sequence[int],
        masks: Sequence[bytes] = (),
        likely: Sequence[int] = (),
    ) -> SamplingBatch:
        """One row for each of `samplings`; seeds are unsigned 64-bit, positions below 2^32. masks and likely: none, or
        all."""
        return cls(
            np.array([s.temperature for s in samplings], dtype=np.float32),
            np.array([s.top_k for s in samplings], dtype=np.int32),
            np.array([s.top_p for s in samplings], dtype=np.float64),
            np.array([s.min_p for s in samplings], dtype=np.float64),
            np.array(seeds, dtype=np.uint64),
            np.array(positions, dtype=np.uint32),
            np.array(masks or [b""] * len(samplings), dtype=np.object_),
            np.array(likely or [0] * len(samplings), dtype=np.int32),
        )


def sample(logits_SV: Tensor, batch: SamplingBatch, stream: int = Stream.TARGET) -> tuple[Tensor, Tensor]:
    """Token ids [S] (int64) and log-probs [S] (fp32, nats) of the processed distribution; logits are fp32 on the CPU.

    NonFiniteError names the first row with a NaN, +infinity (also after the division) or nothing but -infinity.
    """
    if backend(logits_SV) == "triton":
        from tandem.kernels.gpu import sample as gpu

        return gpu.sample(logits_SV, batch, stream)
    _check(logits_SV, len(batch))
    compiled = _compiled()
    if compiled is None:
        return sample_reference(logits_SV, batch, stream)
    rows, table = len(batch), mask_table(batch.masks_S, logits_SV.shape[1])
    tokens_S, logprobs_S = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.float32)
    bad = compiled.tandem_sample(
        *_rows(logits_SV),
        *_filters(batch, table),
        batch.seeds_S.ctypes.data,
        batch.positions_S.ctypes.data,
        int(stream),
        tokens_S.data_ptr(),
        logprobs_S.data_ptr(),
        torch.get_num_threads(),
    )
    raise_if_bad(logits_SV, bad)
    return tokens_S, logprobs_S


def processed_logits(logits_SV: Tensor, batch: SamplingBatch) -> Tensor:
    """x [S, V] fp32: logits after mask, temperature and filters, -infinity where dropped; greedy rows hold one 0.

    Raises as `sample`. The learner uses it to score under a truncated distribution.
    """
    if backend(logits_SV) == "triton":
        from tandem.kernels.gpu import sample as gpu

        return gpu.processed_logits(logits_SV, batch)
    _check(logits_SV, len(batch))
    compiled, out_SV = _compiled(), torch.empty(logits_SV.shape, dtype=torch.float32)
    if compiled is None:
        allowed_SV = masked(logits_SV, batch.masks_S)
        for s in range(len(batch)):
            out_SV[s] = torch.from_numpy(_filtered_row(allowed_SV, batch, s))
        return out_SV
    table = mask_table(batch.masks_S, logits_SV.shape[1])
    bad = compiled.tandem_processed_logits(
        *_rows(logits_SV), *_filters(batch, table), out_SV.data_ptr(), torch.get_num_threads()
    )
    raise_if_bad(logits_SV, bad)
    return out_SV


def kept_sets(
    logits_SV: Tensor, tokens_S: Tensor, batch: SamplingBatch
) -> tuple[list[bytes | None], list[float | None]]:
    """What `sample` chose among where a row filters or has a mask, and the log-prob of its token before both.

    Kept sets [S], as `types.kept_ids` reads them, the drawn token among them; that of a row with a mask alone is the
    mask, the same object. Unfiltered log-probs [S], nats: log softmax(logits / temperature)[token]. None in both for a
    row without either, and for a greedy one. `tokens_S` is what `sample` drew from the same logits and batch.
    """
    kept: list[bytes | None] = [None] * len(batch)
    unfiltered: list[float | None] = [None] * len(batch)
    filters_S, masked_S = batch.filters_S, batch.masked_S
    rows_N = np.flatnonzero((filters_S | masked_S) & (batch.temperature_S > 0))
    if not len(rows_N):
        return kept, unfiltered
    picked = torch.from_numpy(rows_N).to(logits_SV.device)
    logits_NV, tokens_N, filtering = logits_SV[picked], tokens_S[picked], batch.rows(rows_N)
    temperature_N = torch.from_numpy(filtering.temperature_S).to(logits_SV.device)
    logprobs = token_logprobs(logits_NV, tokens_N, temperature_N).tolist()
    for row, logprob in zip(rows_N.tolist(), logprobs, strict=True):
        unfiltered[row] = logprob
        if not filters_S[row]:
            kept[row] = batch.masks_S[row]
    chosen_F = np.flatnonzero(filters_S[rows_N])
    if not len(chosen_F):
        return kept, unfiltered
    some = torch.from_numpy(chosen_F).to(logits_SV.device)
    kept_FV = (processed_logits(logits_NV[some], filtering.rows(chosen_F)) > -torch.inf).cpu().numpy()
    for place, kept_V in zip(chosen_F.tolist(), kept_FV, strict=True):
        row, token = int(rows_N[place]), int(tokens_N[place])
        assert kept_V[token], f"row {row} drew token {token}, which its filters drop"
        kept[row] = np.flatnonzero(kept_V).astype(np.uint32).tobytes()
        if masked_S[row]:
            kept[row] = kept_of(np.packbits(np.pad(kept_V, (0, -len(kept_V) % 32)), bitorder="little").view(np.uint32))
    return kept, unfiltered


def likeliest(logits_SV: Tensor, batch: SamplingBatch) -> list[bytes]:
    """Of each row its `likely_S` most likely tokens, ties by lower id, with their log-probs, as `types.likely_of` has
    them: of the distribution that `sample` draws from, with fewer tokens where filters leave fewer. Of a row that can
    draw one token alone, by temperature 0 or top-k 1: of that before filters and mask, at temperature 1 instead of 0.
    """
    alone_S = (batch.temperature_S == 0) | (batch.top_k_S == 1)
    temperature_S = torch.from_numpy(np.where(batch.temperature_S > 0, batch.temperature_S, np.float32(1)))
    x_SV = logits_SV / temperature_S.to(logits_SV.device)[:, None]
    several_N = torch.from_numpy(np.flatnonzero(~alone_S)).to(logits_SV.device)
    if len(several_N):
        x_SV[several_N] = processed_logits(logits_SV[several_N], batch.rows(np.flatnonzero(~alone_S)))
    return top_tokens(x_SV, batch.likely_S.tolist())


def top_tokens(x_SV: Tensor, counts: Sequence[int]) -> list[bytes]:
    """Of each row the so many likeliest under softmax(x), as `likeliest` has them."""
    found, total_S = [], log_sum_exp(x_SV)
    for x_V, total, count in zip(x_SV, total_S, counts, strict=True):
        least = torch.topk(x_V, min(count, len(x_V))).values[-1:].clamp_min(torch.finfo(torch.float32).min)
        ids = torch.nonzero(x_V >= least)[:, 0] if count else torch.empty(0, dtype=torch.int64)
        ids = ids[torch.sort(x_V[ids], descending=True, stable=True).indices[:count]]
        found.append(likely_of(ids.cpu().numpy(), (x_V[ids] - total).cpu().numpy()))
    return found


def log_sum_exp(logits_SV: Tensor, temperature_S: Tensor | None = None) -> Tensor:
    """log sum exp(logits / temperature) [S] in fp32, reduced in the order of `sample`; NaN if a row is not finite."""
    if backend(logits_SV) == "triton":
        from tandem.kernels.gpu import sample as gpu

        return gpu.statistics(logits_SV, temperature_S)[0]
    return _reduce("tandem_log_sum_exp", _log_sum_exp_row, logits_SV, temperature_S)


def entropy(logits_SV: Tensor, temperature_S: Tensor | None = None) -> Tensor:
    """Entropy [S] (fp32, nats) of softmax(logits / temperature). NaN where a row is not finite."""
    if backend(logits_SV) == "triton":
        from tandem.kernels.gpu import sample as gpu

        return gpu.statistics(logits_SV, temperature_S)[1]
    return _reduce("tandem_entropy", _entropy_row, logits_SV, temperature_S)


def statistics(logits_SV: Tensor, temperature_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`log_sum_exp` and `entropy`, which a GPU reduces at once."""
    if backend(logits_SV) == "triton":
        from tandem.kernels.gpu import sample as gpu

        return gpu.statistics(logits_SV, temperature_S)
    return log_sum_exp(logits_SV, temperature_S), entropy(logits_SV, temperature_S)


def token_logprobs(logits_SV: Tensor, tokens_S: Tensor, temperature_S: Tensor | None = None) -> Tensor:
    """log-probs [S] (fp32) of given tokens: bit for bit what `sample` reports without top-k, top-p and min-p.

    Without a temperature it is the raw log-prob; on `processed_logits` the log-prob of any filtered distribution.
    """
    x_S = logits_SV.gather(1, tokens_S[:, None].to(logits_SV.device, torch.int64))[:, 0]
    if temperature_S is not None:
        x_S = x_S / temperature_S.to(x_S)
    return x_S - log_sum_exp(logits_SV, temperature_S)


def sample_reference(logits_SV: Tensor, batch: SamplingBatch, stream: int = Stream.TARGET) -> tuple[Tensor, Tensor]:
    """`sample`, slow and obvious: full sorts, noise for every token, the log-sum-exp in fp64."""
    vocab, logits_SV = logits_SV.shape[1], masked(logits_SV, batch.masks_S)
    tokens, logprobs = [], []
    for s in range(len(batch)):
        x_V = _filtered_row(logits_SV, batch, s)
        word_V = random.words(int(batch.seeds_S[s]), int(batch.positions_S[s]), np.arange(vocab), stream)
        score_V = x_V.astype(np.float64) + random.gumbel(word_V).astype(np.float64)
        token = int(np.argmax(score_V))
        tokens.append(token)
        logprobs.append(x_V[token] - _log_sum_exp_row(x_V))
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(np.array(logprobs, dtype=np.float32))


def _filtered_row(logits_SV: Tensor, batch: SamplingBatch, row: int) -> NDArray[np.float32]:
    """Row `row` of `processed_logits`, in NumPy."""
    logits_V = logits_SV[row].numpy()
    temperature = batch.temperature_S[row]
    with np.errstate(over="ignore"):
        x_V = logits_V if temperature == 0 else logits_V / temperature
    if np.isnan(x_V).any() or not np.isfinite(x_V.max()):
        raise_if_bad(logits_SV, row)
    if temperature == 0:
        one_hot_V = np.full_like(x_V, -np.inf)
        one_hot_V[np.argmax(x_V)] = 0.0
        return one_hot_V
    order = np.argsort(-x_V, kind="stable")
    gap = x_V[order].astype(np.float64) - float(x_V.max())
    count = int(np.isfinite(gap).sum())
    if batch.top_k_S[row] > 0:
        count = min(count, int(batch.top_k_S[row]))
    if batch.top_p_S[row] < 1:
        mass = np.cumsum(np.rint(np.exp(gap[:count]) * 2.0**40).astype(np.int64))
        count = int(np.argmax(mass.astype(np.float64) >= batch.top_p_S[row] * float(mass[-1]))) + 1
    if batch.min_p_S[row] > 0:
        count = int((gap[:count] >= np.log(batch.min_p_S[row])).sum())
    kept_V = np.full_like(x_V, -np.inf)
    kept_V[order[:count]] = x_V[order[:count]]
    return kept_V


def _log_sum_exp_row(x_V: NDArray[np.float32]) -> np.float32:
    top = np.float64(x_V.max())
    return np.float32(top + np.log(np.exp(x_V.astype(np.float64) - top).sum()))


def _entropy_row(x_V: NDArray[np.float32]) -> np.float32:
    gap = x_V.astype(np.float64) - np.float64(x_V.max())
    term = np.exp(gap)
    weighted = np.where(term > 0, term * np.where(term > 0, gap, 0.0), 0.0)
    return np.float32(np.log(term.sum()) - weighted.sum() / term.sum())


def _reduce(name: str, reference: Callable[..., Any], logits_SV: Tensor, temperature_S: Tensor | None) -> Tensor:
    _check(logits_SV, logits_SV.shape[0])
    rows = logits_SV.shape[0]
    if temperature_S is not None:
        assert temperature_S.shape == (rows,) and bool((temperature_S > 0).all()), temperature_S
        temperature_S = temperature_S.to(torch.float32).contiguous()
    compiled = _compiled()
    if compiled is None:
        x_SV = logits_SV if temperature_S is None else logits_SV / temperature_S[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            return torch.tensor(np.array([reference(x_V) for x_V in x_SV.numpy()], dtype=np.float32))
    out_S = torch.empty(rows, dtype=torch.float32)
    pointer = None if temperature_S is None else temperature_S.data_ptr()
    getattr(compiled, name)(*_rows(logits_SV), pointer, out_S.data_ptr(), torch.get_num_threads())
    return out_S


def _check(logits_SV: Tensor, rows: int) -> None:
    assert logits_SV.dtype == torch.float32 and logits_SV.device.type == "cpu", (logits_SV.dtype, logits_SV.device)
    assert logits_SV.ndim == 2 and logits_SV.shape[0] == rows and logits_SV.shape[1] > 0, (logits_SV.shape, rows)
    assert logits_SV.stride(1) == 1 and logits_SV.shape[1] < 2**32, logits_SV.stride()


def _rows(logits_SV: Tensor) -> tuple[int, int, int, int]:
    return logits_SV.data_ptr(), logits_SV.stride(0), logits_SV.shape[0], logits_SV.shape[1]


def _filters(batch: SamplingBatch, table: MaskTable | None) -> tuple[int | None, ...]:
    """Addresses; the table is to be held during the call."""
    arrays = (batch.temperature_S, batch.top_k_S, batch.top_p_S, batch.min_p_S)
    masks = (None, None, 0) if table is None else (*(x.ctypes.data for x in table), table.words_UW.shape[1])
    return (*(array.ctypes.data for array in arrays), *masks)


@remembered
def _compiled() -> ctypes.CDLL | None:
    compiled = library("sample")
    return None if compiled is None else declare(compiled)


def declare(compiled: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of sample.cpp their argument types."""
    pointer, size, word, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_int
    rows: list[Any] = [pointer, size, size, size]
    filters: list[Any] = [*[pointer] * 6, size]
    compiled.tandem_sample.argtypes = [*rows, *filters, pointer, pointer, word, pointer, pointer, threads]
    compiled.tandem_processed_logits.argtypes = [*rows, *filters, pointer, threads]
    for name in ("tandem_log_sum_exp", "tandem_entropy"):
        getattr(compiled, name).argtypes = [*rows, pointer, pointer, threads]
    for name in ("tandem_sample", "tandem_processed_logits", "tandem_log_sum_exp", "tandem_entropy"):
        getattr(compiled, name).restype = size
    compiled.tandem_vector.argtypes = [ctypes.c_int, pointer, pointer, size]
    compiled.tandem_noise.argtypes = [ctypes.c_uint64, word, word, size, pointer, pointer]
    compiled.tandem_vector.restype = compiled.tandem_noise.restype = None
    return compiled
