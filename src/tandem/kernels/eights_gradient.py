"""The two products of a matrix's backward pass in integers of 8 bits.

dx = dy W has a scale a row of dy and one a column of W; dW = dy^T x one a column of dy and one a column of x: amax over
127. W and x are rounded to the nearest, dy up by the probability of what is lost, by a byte a number: floor(dy / scale
+ (byte + 1/2) / 256). The bytes are those of Philox's words (numerics/random.py), keyed by the largest size in dy, so
that a gradient is a function of what it is made of. Sums are exact. A departure of the gradient, not of the policy.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tandem.kernels.address import address, rows_address
from tandem.kernels.build.load import kernel
from tandem.kernels.eights import QUAD, Eights
from tandem.numerics.quantise import LARGEST
from tandem.numerics.random import Stream, word_rows

BYTE = 256


def turned(value_NK: Tensor, into: Eights | None = None) -> Eights:
    """W^T with a scale a column of W, as `input_gradient` reads it; where `into` lies, if that is given."""
    rows, columns = value_NK.shape
    made = into or Eights(torch.zeros(columns, rows, dtype=value_NK.dtype))
    run = kernel("eights_gradient", "turn_eights", value_NK.dtype, "ppppiii")
    assert run is not None and made.shape == (columns, rows), (value_NK.dtype, made.shape)
    held = (made.packed.data_ptr(), made.scales.data_ptr(), made.sums.data_ptr())
    run(address(value_NK, value_NK.dtype, rows, columns), *held, rows, columns, int(made.words[4]))
    return made


def input_gradient(dy_TN: Tensor, matrix: Eights) -> Tensor:
    """dx = dy W: [T, K], bf16 or fp32; `matrix` is W `turned`."""
    (count, rows), (columns, inputs) = dy_TN.shape, matrix.shape
    run = kernel("eights_gradient", "input_gradient_eights", dy_TN.dtype, "pippii")
    assert run is not None and inputs == rows, (dy_TN.shape, matrix.shape)
    dx_TK = torch.empty(count, columns, dtype=dy_TN.dtype)
    dy = rows_address(dy_TN, dy_TN.dtype, count, rows)
    run(dy, dy_TN.stride(0), matrix.words.data_ptr(), dx_TK.data_ptr(), count, rows)
    return dx_TK


def accumulate(grad_NK: Tensor, dy_TN: Tensor, x_TK: Tensor) -> None:
    """grad += dy^T x, in fp32."""
    run = kernel("eights_gradient", "accumulate_eights", x_TK.dtype, "pipipiii")
    assert run is not None, x_TK.dtype
    count, (rows, columns), dtype = len(x_TK), grad_NK.shape, x_TK.dtype
    dy, x = rows_address(dy_TN, dtype, count, rows), rows_address(x_TK, dtype, count, columns)
    run(dy, dy_TN.stride(0), x, x_TK.stride(0), address(grad_NK, torch.float32, rows, columns), count, rows, columns)


def _nearest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of columns, and their scales."""
    scales = x.float().abs().amax(0) / LARGEST[8]
    codes = (x.float() / scales.where(scales > 0, torch.inf)).round()
    return codes.clamp(-LARGEST[8], LARGEST[8]), scales


def _drawn(dy: Tensor, words: np.ndarray, use: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes of rows (dim 1) or columns (dim 0), and their scales; `words`: of each four numbers along `dim`."""
    scales = dy.float().abs().amax(dim, keepdim=True) / LARGEST[8]
    noise = np.stack([words >> 8 * byte & 255 for byte in range(QUAD)], -1)
    noise = noise.reshape(len(noise), -1) if dim == 1 else noise.transpose(0, 2, 1).reshape(-1, noise.shape[1])
    lost = (torch.from_numpy(noise[: dy.shape[0], : dy.shape[1]].astype(np.float32)) + 0.5) / BYTE
    codes = (dy.float() / scales.where(scales > 0, torch.inf) + lost).floor()
    return codes.clamp(-LARGEST[8], LARGEST[8]), scales.flatten()


def _words(dy: Tensor, use: int, positions: int, count: int) -> np.ndarray:
    most = int(dy.float().abs().max().view(torch.int32))
    return word_rows(np.full(positions, most << 32 | use, np.uint64), np.arange(positions), count, Stream.ROUNDING)


def input_gradient_reference(dy_TN: Tensor, value_NK: Tensor) -> Tensor:
    """By exact sums."""
    rows, columns = dy_TN.shape
    codes_TN, scales_T = _drawn(dy_TN, _words(dy_TN, 0, rows, -(-columns // QUAD)), 0, 1)
    matrix, scales_K = _nearest(value_NK)
    sums = (codes_TN.double() @ matrix.double()).float() + 0.0  # a zero has no sign
    return (sums * (scales_T[:, None] * scales_K)).to(dy_TN.dtype)


def accumulate_reference(grad_NK: Tensor, dy_TN: Tensor, x_TK: Tensor) -> None:
    rows, columns = dy_TN.shape
    codes_TN, scales_N = _drawn(dy_TN, _words(dy_TN, 1, -(-rows // QUAD), columns), 1, 0)
    codes_TK, scales_K = _nearest(x_TK)
    sums = (codes_TN.double().T @ codes_TK.double()).float() + 0.0
    grad_NK += sums * (scales_N[:, None] * scales_K)
