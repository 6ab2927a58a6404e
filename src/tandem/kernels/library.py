"""Matrix products by torch's own library (oneDNN, MKL) where it is faster: `model.kernels = "library"`.

The library picks its algorithm by the shape, so the bits of a row depend on the rows that ride along: this is what
exactness is priced against (`tandem bench parity`). Each product of a layer (forward, input gradient, weight gradient)
runs by the faster of the library and ours, timed when its shape is first met; two runs may choose, and round,
differently.

Microseconds of one thread of an AMD EPYC (AVX-512 BF16, no AMX), torch 2.13, bf16, ours / library:

    forward 576 -> 3072     1 row 39 / 109     64 rows 455 / 519     1024 rows 7,360 / 7,625
    forward 576 -> 49,152   1 row 1,250 / 3,460     16 rows 2,820 / 5,040     64 rows 7,970 / 11,120
    input gradient          1024 rows 7,200 / 7,630     4096 rows 31,700 / 31,700
    weight gradient         1024 rows 8,370 / 9,050     4096 rows 32,400 / 36,800
    attention, forward      16 x 256 rows 8,400 / 31,500     4 x 1024 rows 22,500 / 85,200
    attention, both passes  16 x 256 rows 31,100 / 100,300     4 x 1024 rows 79,300 / 215,800

So attention (scaled_dot_product_attention) and the output head stay ours: the library rounds the head's
logits to bf16 besides. Weights laid out beforehand (`mkldnn._reorder_linear_weight`, private to torch) take 53, 458
and 7,550 for the first line, 9,500 for 64 rows of the second: still not faster than ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

TRIALS = 4  # calls of each way in turn; the best counts

T = TypeVar("T")

_chosen: dict[tuple[object, ...], int] = {}


def fastest(
    operation: str, matrix: torch.Tensor, rows: int, ways: Sequence[Callable[[torch.Tensor], T]], trial: torch.Tensor
) -> Callable[[torch.Tensor], T]:
    """The fastest of `ways` for an operation on a matrix with so many rows beside it (to a power of two).

    Timed with `trial` as the argument where such an operation is met for the first time.
    """
    key = (operation, tuple(matrix.shape), matrix.dtype, rows.bit_length(), torch.get_num_threads())
    if key not in _chosen:
        best = [float("inf")] * len(ways)
        for _ in range(TRIALS):
            for index, way in enumerate(ways):
                start = time.perf_counter()
                way(trial)
                best[index] = min(best[index], time.perf_counter() - start)
        _chosen[key] = best.index(min(best))
    return ways[_chosen[key]]


def product(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, residual_TN: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + bias + residual: [T, N] in x's dtype, rounded before the residual is added. Not differentiable."""
    out = torch.nn.functional.linear(x_TK, weight_NK, bias_N)
    return out if residual_TN is None else out.add_(residual_TN)
