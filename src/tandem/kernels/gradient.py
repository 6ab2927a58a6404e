"""Products of the backward pass, on the micro-kernel of the forward's: gradients of a weight and of its input.

The backward pass need not be batch-invariant. It still does not depend on the number of threads: every element is
summed by one thread, in order of the rows, in fp32.
"""

from __future__ import annotations

import torch

from tandem.kernels import eights_gradient, library
from tandem.kernels.address import address, rows_address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.weight import Weight


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in fp32, by torch."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def accumulate_reference(grad_NK: torch.Tensor, dy_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    grad_NK += wide_product(dy_TN.T, x_TK)


def accumulate(grad_NK: torch.Tensor, dy_TN: torch.Tensor, x_TK: torch.Tensor, by_library: bool = False) -> None:
    """grad += dy^T x, in fp32; by the library the product is rounded to x's dtype before it is added."""
    if by_library:
        ways = (lambda grad: accumulate(grad, dy_TN, x_TK), lambda grad: grad.add_(dy_TN.T @ x_TK))
        trial = torch.empty_like(grad_NK)
        library.fastest("weight gradient", grad_NK, dy_TN.shape[0], ways, trial)(grad_NK)
        return
    run = None if backend(x_TK) == "triton" else kernel("gradient", "accumulate", x_TK.dtype, "pipipiii")
    if run is None:
        accumulate_reference(grad_NK, dy_TN, x_TK)
        return
    count, (rows, columns), dtype = len(x_TK), grad_NK.shape, x_TK.dtype
    dy, x = rows_address(dy_TN, dtype, count, rows), rows_address(x_TK, dtype, count, columns)
    grad = address(grad_NK, torch.float32, rows, columns)
    run(dy, dy_TN.stride(0), x, x_TK.stride(0), grad, count, rows, columns)


def add_gradient(weight: Weight, dy_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    """grad += dy^T x, by the rows that were multiplied; nothing where the weight is frozen."""
    if weight.grad is None:
        return
    if weight.turned is not None:
        eights_gradient.accumulate(weight.grad, dy_TN, x_TK)
        return
    x_TK = weight.rounding.multiplied(x_TK)
    if weight.operands is not None:
        dy_TN, x_TK = weight.operands.of_weight(dy_TN, x_TK)
    accumulate(weight.grad, dy_TN, x_TK, weight.library)


def input_gradient_reference(dy_TN: torch.Tensor, value_NK: torch.Tensor) -> torch.Tensor:
    return wide_product(dy_TN, value_NK).to(dy_TN.dtype)


def input_gradient(dy_TN: torch.Tensor, weight: Weight) -> torch.Tensor:
    """dx = dy W: [T, K], by the values that the product read."""
    if weight.turned is not None:
        return eights_gradient.input_gradient(dy_TN, weight.turned)
    value = weight.served_value()
    if weight.operands is not None:
        dy_TN, value = weight.operands.of_input(dy_TN, value)
    if weight.library:
        ways = (lambda dy: _input_gradient(dy, value), lambda dy: dy @ value)
        return library.fastest("input gradient", value, dy_TN.shape[0], ways, dy_TN)(dy_TN)
    return _input_gradient(dy_TN, value)


def _input_gradient(dy_TN: torch.Tensor, value_NK: torch.Tensor) -> torch.Tensor:
    run = None if backend(dy_TN) == "triton" else kernel("gradient", "input_gradient", dy_TN.dtype, "pippiii")
    if run is None:
        return input_gradient_reference(dy_TN, value_NK)
    (count, rows), columns, dtype = dy_TN.shape, value_NK.shape[1], dy_TN.dtype
    value = address(value_NK, dtype, rows, columns)
    if rows % 2:
        dy_TN = torch.nn.functional.pad(dy_TN, (0, 1))
    dx_TK = torch.empty(count, columns, dtype=dtype)
    dy = rows_address(dy_TN, dtype, count, rows + rows % 2)
    run(dy, dy_TN.stride(0), value, dx_TK.data_ptr(), count, rows, columns)
    return dx_TK
