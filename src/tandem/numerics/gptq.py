"""GPTQ (Frantar et al., 2210.17323): a matrix rounded input by input, each error made up for by the inputs to come.

Of the inputs x of a matrix W, H = sum of x^T x says what an error costs: the output's squared error is tr(E H E^T).
With U the upper Cholesky factor of H^-1, inputs are rounded in order; an error e = (w_j - q_j) / U_jj is taken off what
follows, w_k -= e U_jk. Inputs of more weight in H go first. Scales are those of the matrix as it is given, so the order
of the inputs in a file stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.errors import NonFiniteError
from tandem.numerics.blocks import WHOLE, WHOLE_ROW, Blocks, Format, block_scales, quantise
from tandem.numerics.elements import Fixed
from tandem.numerics.snap import codes_of, snap

DAMP = 0.01  # of the mean of H's diagonal, added to it
RAISED = 10.0  # times, where H is not positive definite with it; at most up to MOST_DAMP
MOST_DAMP = 10.0
LAZY = 128  # inputs after which the rest of the matrix is brought up to date


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """What GPTQ needs of the inputs."""

    lower_KK: Tensor  # U transposed, fp32
    order_K: Tensor  # input that is rounded first, second, ...
    damp: float  # that it took


def factor(hessian_KK: Tensor, *, act_order: bool = True, damp: float = DAMP) -> Factor:
    """Of H [K, K] (any scale). An input that is always 0 is rounded to nearest: it is nobody's neighbour.

    NonFiniteError where H has a NaN, or is not positive definite however much is added to its diagonal.
    """
    if not bool(hessian_KK.isfinite().all()):
        raise NonFiniteError("the inputs' second moments are not finite.")
    hessian_KK = hessian_KK.float()
    diagonal_K = hessian_KK.diagonal().clone()
    order_K = torch.argsort(diagonal_K, descending=True, stable=True) if act_order else torch.arange(len(diagonal_K))
    ordered = hessian_KK[order_K][:, order_K]
    dead_K = diagonal_K[order_K] <= 0
    ordered[dead_K] = 0.0
    ordered[:, dead_K] = 0.0
    mean = float(diagonal_K.mean()) or 1.0
    while damp <= MOST_DAMP:
        damped = ordered.clone()
        damped.diagonal().add_(damp * mean)
        damped.diagonal()[dead_K] = mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(upper.isfinite().all()):
                return Factor(upper.T.contiguous(), order_K, damp)
        damp *= RAISED
    raise NonFiniteError(
        f"the inputs' second moments are not positive definite, with {damp / RAISED:g} times their mean added either."
    )


def gptq(weight_NK: Tensor, found: Factor, form: Format) -> Blocks:
    """The matrix in a format: its scales those of `quantise`, its codes by GPTQ. NonFiniteError as `quantise`'s."""
    blocks = quantise(weight_NK, form)
    rows, width = weight_NK.shape
    scales_GN, zeros_GN = by_input(blocks, form, rows)
    divisors_GN = scales_GN.where(scales_GN > 0, torch.inf)

    def near(column: int, row_N: Tensor) -> tuple[Tensor, Tensor]:
        group = 0 if form.block <= 0 else column // form.block
        value_N = _near(row_N / divisors_GN[group], form, None if zeros_GN is None else zeros_GN[group])
        return value_N, torch.addcmul(row_N, value_N, scales_GN[group], value=-1)

    values_NK = by_columns(weight_NK, found, near)
    if zeros_GN is None:
        return blocks._replace(codes=codes_of(values_NK, form.element))
    zeros_NK = zeros_GN.T.repeat_interleave(width if form.block <= 0 else form.block, 1)[:, :width]
    return blocks._replace(codes=(values_NK + zeros_NK).to(torch.uint8))


def by_columns(weight_NK: Tensor, found: Factor, near: Callable[[int, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Elements [N, K]: `near` gives, of a column and what became of its numbers, elements and what these leave."""
    (rows, width), order_K = weight_NK.shape, found.order_K
    columns = order_K.tolist()
    left_KN = weight_NK.float().T[order_K].contiguous()
    values_KN = torch.empty_like(left_KN)
    for first in range(0, width, LAZY):
        last = min(width, first + LAZY)
        lower = found.lower_KK[first:last, first:last]
        errors = torch.empty(last - first, rows)
        for place in range(last - first):
            row_N = left_KN[first + place]
            if place:
                row_N = torch.addmv(row_N, errors[:place].T, lower[place, :place], alpha=-1)
            values_KN[first + place], left_N = near(columns[first + place], row_N)
            torch.div(left_N, lower[place, place], out=errors[place])
        if last < width:
            left_KN[last:].addmm_(found.lower_KK[last:, first:last], errors, alpha=-1)
    return torch.empty_like(values_KN).index_copy_(0, order_K, values_KN).T.contiguous()


def by_input(blocks: Blocks, form: Format, rows: int) -> tuple[Tensor, Tensor | None]:
    """Scales [groups of inputs, rows], and zero points, fp32: one group where a scale is a row's or the tensor's."""
    scales = block_scales(blocks, form)
    zeros = None if blocks.zeros is None else blocks.zeros.float()
    if form.block in (WHOLE, WHOLE_ROW):
        return scales.reshape(-1, 1).expand(rows, 1).T.contiguous(), None if zeros is None else zeros.T.contiguous()
    if form.rows > 1:
        scales = scales.repeat_interleave(form.rows, 0)[:rows]
    return scales.T.contiguous(), None if zeros is None else zeros.T.contiguous()


def _near(x_N: Tensor, form: Format, zeros_N: Tensor | None) -> Tensor:
    """Elements, or with zero points codes less these."""
    if zeros_N is None:
        return snap(x_N, form.element)
    assert isinstance(form.element, Fixed)
    return torch.minimum(torch.maximum(x_N.round(), -zeros_N), ((1 << form.element.bits) - 1) - zeros_N)
