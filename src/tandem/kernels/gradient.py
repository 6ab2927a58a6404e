"""Products of the backward pass, on the micro-kernel of the forward's: gradients of a weight and of its input.

The backward pass need not be batch-invariant. It still does not depend on the number of threads: every element is
summed by one thread, in order of the rows, in fp32.
"""

from __future__ import annotations

import torch

from tandem.kernels import library
from tandem.kernels.build import kernel
from tandem.kernels.weight import Weight


def accumulate_reference(grad_NK: torch.Tensor, dy_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    grad_NK += dy_TN.float().T @ x_TK.float()


def accumulate(grad_NK: torch.Tensor, dy_TN: torch.Tensor, x_TK: torch.Tensor, by_library: bool = False) -> None:
    """grad += dy^T x, in fp32; by the library the product is rounded to x's dtype before it is added."""
    if by_library:
        ways = (lambda grad: accumulate(grad, dy_TN, x_TK), lambda grad: grad.add_(dy_TN.T @ x_TK))
        trial = torch.empty_like(grad_NK)
        library.fastest("weight gradient", grad_NK, dy_TN.shape[0], ways, trial)(grad_NK)
        return
    run = kernel("gradient", "accumulate", x_TK.dtype, "pipipiii")
    if run is None:
        accumulate_reference(grad_NK, dy_TN, x_TK)
        return
    assert (
        grad_NK.is_contiguous() and grad_NK.dtype == torch.float32 and grad_NK.shape == (dy_TN.shape[1], x_TK.shape[1])
    )
    assert dy_TN.stride(1) == x_TK.stride(1) == 1 and len(dy_TN) == len(x_TK), (dy_TN.stride(), x_TK.stride())
    rows, columns = grad_NK.shape
    given = (dy_TN.data_ptr(), dy_TN.stride(0), x_TK.data_ptr(), x_TK.stride(0))
    run(*given, grad_NK.data_ptr(), len(x_TK), rows, columns)


def input_gradient_reference(dy_TN: torch.Tensor, value_NK: torch.Tensor) -> torch.Tensor:
    return (dy_TN.float() @ value_NK.float()).to(dy_TN.dtype)


def input_gradient(dy_TN: torch.Tensor, weight: Weight) -> torch.Tensor:
    """dx = dy W: [T, K]."""
    value = weight.value
    if weight.library:
        ways = (lambda dy: _input_gradient(dy, value), lambda dy: dy @ value)
        return library.fastest("input gradient", value, dy_TN.shape[0], ways, dy_TN)(dy_TN)
    return _input_gradient(dy_TN, value)


def _input_gradient(dy_TN: torch.Tensor, value_NK: torch.Tensor) -> torch.Tensor:
    run = kernel("gradient", "input_gradient", dy_TN.dtype, "pippiii")
    if run is None:
        return input_gradient_reference(dy_TN, value_NK)
    if value_NK.shape[0] % 2:
        dy_TN = torch.nn.functional.pad(dy_TN, (0, 1))
    assert dy_TN.stride(1) == 1 and value_NK.is_contiguous(), (dy_TN.stride(), value_NK.stride())
    dx_TK = torch.empty(len(dy_TN), value_NK.shape[1], dtype=dy_TN.dtype)
    run(dy_TN.data_ptr(), dy_TN.stride(0), value_NK.data_ptr(), dx_TK.data_ptr(), len(dy_TN), *value_NK.shape)
    return dx_TK
