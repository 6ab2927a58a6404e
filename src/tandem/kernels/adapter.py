"""y += f ((s x A^T) B^T), what an adapter adds: the same bits for a row whatever rows and adapters ride along.

s x A^T is rounded once, the second product times f once, and its sum with y once more, in place. adapter.h is what the
learner's products and the engine's pass in one call (forward.cpp) both run. The gradients are those of plain products
(gradient.py); with DoRA the norm of W + s B A counts as a constant (Liu et al., 2402.09353, section 4.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.address import address, rows_address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.gradient import accumulate_reference, wide_product
from tandem.kernels.weight import Adapter, Weight


def adapt_reference_(y_TN: Tensor, x_TK: Tensor, adapter: Adapter) -> Tensor:
    """`adapt_` by torch's products."""
    lowered_TR = ((x_TK.float() @ adapter.down.value.float().T) * adapter.scales_R).to(x_TK.dtype)
    for piece in adapter.pieces:
        added = lowered_TR[:, piece.ranks].float() @ piece.up.value.float().T
        if adapter.factor is not None:
            added = added * adapter.factor.value[piece.rows]
        y_TN[:, piece.rows] += added.to(y_TN.dtype)
    return lowered_TR


def adapt_(y_TN: Tensor, x_TK: Tensor, adapter: Adapter) -> Tensor:
    """Add to y, of all rows; returns s x A^T, [T, R], which the gradients need."""
    assert backend(x_TK) != "triton", "adapters have no Triton kernel"
    run = kernel("adapter", "adapt", x_TK.dtype, "pippp" + "iii")
    if run is None:
        return adapt_reference_(y_TN, x_TK, adapter)
    rows, depth = x_TK.shape
    assert depth == adapter.down.value.shape[1], (x_TK.shape, adapter.down.value.shape)
    assert adapter.pieces[-1].rows.stop <= y_TN.shape[1], (y_TN.shape, adapter.pieces[-1].rows)
    if depth % 2 and x_TK.dtype == torch.bfloat16:
        x_TK, depth = torch.nn.functional.pad(x_TK, (0, 1)), depth + 1
    lowered_TR = torch.zeros(rows, adapter.down.value.shape[0], dtype=x_TK.dtype)
    run(
        rows_address(x_TK, x_TK.dtype, rows, depth),
        x_TK.stride(0),
        adapter.words.data_ptr(),
        lowered_TR.data_ptr(),
        address(y_TN, x_TK.dtype, rows, y_TN.shape[1]),
        *(rows, y_TN.shape[1], depth),
    )
    return lowered_TR


def factored(dy_TN: Tensor, adapter: Adapter) -> Tensor:
    """A gradient of y as the products before f have it."""
    return dy_TN if adapter.factor is None else (dy_TN.float() * adapter.factor.value).to(dy_TN.dtype)


def adapted_input_gradient_reference(dy_TN: Tensor, weight: Weight, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """`adapted_input_gradient` by torch's products."""
    dlow_TR = torch.zeros(len(dy_TN), adapter.down.value.shape[0], dtype=dy_TN.dtype)
    for piece in adapter.pieces:
        dlow_TR[:, piece.ranks] = (wide_product(dy_TN[:, piece.rows], piece.up.value) * piece.scale).to(dy_TN.dtype)
    dx_TK = wide_product(dy_TN, weight.served_value()) + wide_product(dlow_TR, adapter.down.value)
    return dx_TK.to(dy_TN.dtype), dlow_TR


def adapted_input_gradient(dy_TN: Tensor, weight: Weight, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """dx [T, K] of the matrix and its adapter together, and the gradient of x A^T, [T, R]. `dy` is `factored`.

    The latter is rounded; the sum of both products is, once.
    """
    run = kernel("adapter", "adapted_input_gradient", dy_TN.dtype, "pipppppp" + "iii")
    odd = dy_TN.dtype == torch.bfloat16 and any(piece.up.value.shape[0] % 2 for piece in adapter.pieces)
    if run is None or odd:
        return adapted_input_gradient_reference(dy_TN, weight, adapter)
    (count, rows), dtype = dy_TN.shape, dy_TN.dtype
    value_NK, (ranks, columns) = weight.served_value(), adapter.down.value.shape
    if rows % 2:
        dy_TN = torch.nn.functional.pad(dy_TN, (0, 1))
    dlow_TR, dx_TK = torch.zeros(count, ranks, dtype=dtype), torch.empty(count, columns, dtype=dtype)
    pieces = _piece_values(adapter)
    run(
        rows_address(dy_TN, dtype, count, rows + rows % 2),
        dy_TN.stride(0),
        address(value_NK, dtype, rows, columns),
        address(adapter.down.value, dtype, ranks, columns),
        adapter.words.data_ptr(),
        pieces.data_ptr(),
        *(dlow_TR.data_ptr(), dx_TK.data_ptr()),
        *(count, rows, columns),
    )
    return dx_TK, dlow_TR


def _piece_values(adapter: Adapter) -> Tensor:
    """Struct PieceValues of adapter.cpp, of each piece: to be held during the call."""
    words = []
    for piece in adapter.pieces:
        rows, rank = piece.up.value.shape
        grad = address(piece.up.grad, torch.float32, rows, rank)
        words.append([address(piece.up.value, piece.up.value.dtype, rows, rank), grad or 0, rank])
    return torch.tensor(words, dtype=torch.int64)


def add_gradients_reference(adapter: Adapter, dy_TN: Tensor, dlow_TR: Tensor, x_TK: Tensor, lowered_TR: Tensor) -> None:
    """`add_gradients` by torch's products."""
    if adapter.down.grad is not None:
        accumulate_reference(adapter.down.grad, dlow_TR, x_TK)
    for piece in adapter.pieces:
        if piece.up.grad is not None:
            accumulate_reference(piece.up.grad, dy_TN[:, piece.rows], lowered_TR[:, piece.ranks])


def add_gradients(adapter: Adapter, dy_TN: Tensor, dlow_TR: Tensor, x_TK: Tensor, lowered_TR: Tensor) -> None:
    """To those of A and B, in fp32, in order of the rows. `dy` is `factored`."""
    run = kernel("adapter", "adapter_gradients", x_TK.dtype, "pipippppp" + "iii")
    if run is None:
        return add_gradients_reference(adapter, dy_TN, dlow_TR, x_TK, lowered_TR)
    (count, rows), dtype, (ranks, columns) = dy_TN.shape, dy_TN.dtype, adapter.down.value.shape
    pieces = _piece_values(adapter)
    run(
        rows_address(dy_TN, dtype, count, rows),
        dy_TN.stride(0),
        rows_address(x_TK, dtype, count, columns),
        x_TK.stride(0),
        address(lowered_TR, dtype, count, ranks),
        address(dlow_TR, dtype, count, ranks),
        adapter.words.data_ptr(),
        pieces.data_ptr(),
        address(adapter.down.grad, torch.float32, ranks, columns),
        *(count, rows, columns),
    )
    return None


def learns_magnitude(adapter: Adapter | None) -> bool:
    """Whether `add_magnitude_gradients` is due."""
    return adapter is not None and any(p.magnitude is not None and p.magnitude.grad is not None for p in adapter.pieces)


def add_magnitude_gradients(adapter: Adapter, dy_TN: Tensor, y_TN: Tensor) -> None:
    """y is the product that f is in, and nothing else: of its magnitude m it is m times what does not hang on m."""
    for piece in adapter.pieces:
        magnitude = piece.magnitude
        if magnitude is not None and magnitude.grad is not None:
            sums = (dy_TN[:, piece.rows].float() * y_TN[:, piece.rows].float()).sum(0)
            magnitude.grad += sums / magnitude.value
