"""y = x W^T (+ bias) (+ residual), the same bits for a row whatever rows ride along.

The C++ kernel (linear.cpp) reduces over the inner dimension in order, one accumulator an element, in fp32; neither the
number of rows nor the number of threads enters. The backward products are gradient.py's; the weight's gradient is added
in fp32 to `Weight.grad`.
"""

from __future__ import annotations

import torch

from tandem.kernels import library
from tandem.kernels.adapter import (
    adapt_,
    adapted_input_gradient,
    add_gradients,
    add_magnitude_gradients,
    factored,
    learns_magnitude,
)
from tandem.kernels.address import address, rows_address
from tandem.kernels.build.load import function, kernel
from tandem.kernels.choice import backend
from tandem.kernels.eights import Eights
from tandem.kernels.gradient import add_gradient, input_gradient
from tandem.kernels.weight import Weight, packed_size

_LINEAR = "pippppp" + "iii"


def linear_reference(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    residual_TN: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    factor_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 product, times `factor_N`, rounded once; the residual is added after that rounding."""
    product = x_TK.float() @ weight_NK.float().T
    if factor_N is not None:
        product = product * factor_N
    if bias_N is not None:
        product = product + bias_N.float()
    if residual_TN is not None:
        product = product.to(x_TK.dtype).float() + residual_TN.float()
    return product.to(out_dtype or x_TK.dtype)


def product(
    x_TK: torch.Tensor,
    packed: torch.Tensor,
    columns: int,
    bias_N: torch.Tensor | None = None,
    residual_TN: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    factor_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] times the packed columns, times `factor_N`: [T, columns]. Vectors are fp32; x's rows may be strided."""
    out_dtype = out_dtype or x_TK.dtype
    if out_dtype == x_TK.dtype:
        run = kernel("linear", "linear", x_TK.dtype, _LINEAR)
    else:
        assert (x_TK.dtype, out_dtype) == (torch.bfloat16, torch.float32), (x_TK.dtype, out_dtype)
        run = function("linear", "linear_bf16_fp32", _LINEAR)
    assert run is not None, x_TK.dtype
    rows, depth = x_TK.shape
    if depth % 2 and x_TK.dtype == torch.bfloat16:
        x_TK, depth = torch.nn.functional.pad(x_TK, (0, 1)), depth + 1
    out = torch.empty(rows, columns, dtype=out_dtype)
    run(
        rows_address(x_TK, x_TK.dtype, rows, depth),
        x_TK.stride(0),
        address(packed, x_TK.dtype, packed_size(columns, depth)),
        address(bias_N, torch.float32, columns),
        address(residual_TN, x_TK.dtype, rows, columns),
        address(factor_N, torch.float32, columns),
        out.data_ptr(),
        rows,
        columns,
        depth,
    )
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight, bias, residual_TN):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.bias, ctx.adapter, ctx.has_residual = weight, bias, weight.adapter, residual_TN is not None
        out_TN, lowered_TR = product_of(x_TK, weight, bias, residual_TN)
        ctx.save_for_backward(x_TK, lowered_TR)
        return out_TN

    @staticmethod
    def backward(ctx, dy_TN):  # type: ignore[no-untyped-def]
        x_TK, lowered_TR = ctx.saved_tensors
        dy_TN = dy_TN.contiguous()
        dresidual_TN = dy_TN if ctx.has_residual else None
        if ctx.bias is not None and ctx.bias.grad is not None:
            ctx.bias.grad += dy_TN.float().sum(0)
        if ctx.adapter is None:
            dx_TK = input_gradient(dy_TN, ctx.weight)
        else:
            assert ctx.adapter is ctx.weight.adapter, "another adapter was put on between the two passes"
            if learns_magnitude(ctx.adapter):
                add_magnitude_gradients(ctx.adapter, dy_TN, product_of(x_TK, ctx.weight)[0])
            dy_TN = factored(dy_TN, ctx.adapter)
            dx_TK, dlow_TR = adapted_input_gradient(dy_TN, ctx.weight, ctx.adapter)
            add_gradients(ctx.adapter, dy_TN, dlow_TR, x_TK, lowered_TR)
        add_gradient(ctx.weight, dy_TN, x_TK)
        return dx_TK, None, None, dresidual_TN


def product_of(
    x_TK: torch.Tensor, weight: Weight, bias: Weight | None = None, residual_TN: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`linear` without gradients, and what those of an adapter need."""
    rows_TK = x_TK if weight.rounding.products or isinstance(weight.codes, Eights) else weight.rounding.multiplied(x_TK)
    out_TN = _forward(rows_TK, weight, bias, residual_TN)
    return out_TN, None if weight.adapter is None else adapt_(out_TN, x_TK, weight.adapter)


def _forward(x_TK: torch.Tensor, weight: Weight, bias: Weight | None, residual_TN: torch.Tensor | None) -> torch.Tensor:
    if backend(x_TK) == "triton":
        from tandem.kernels.gpu import linear as gpu

        bias_N = bias.value if bias is not None else None
        if weight.codes is not None:
            return weight.codes.product(x_TK, bias_N, residual_TN)
        return gpu.product(x_TK, weight.read, bias_N, residual_TN)
    if weight.library:
        ways = (
            lambda x: _own_forward(x, weight, bias, residual_TN),
            lambda x: library.product(x, weight.value, bias.value if bias is not None else None, residual_TN),
        )
        return library.fastest("forward", weight.value, x_TK.shape[0], ways, x_TK)(x_TK)
    return _own_forward(x_TK, weight, bias, residual_TN)


def _own_forward(
    x_TK: torch.Tensor, weight: Weight, bias: Weight | None, residual_TN: torch.Tensor | None
) -> torch.Tensor:
    assert x_TK.shape[1] == weight.value.shape[1], (x_TK.shape, weight.value.shape)
    bias_N = bias.value.float() if bias is not None else None
    factor = weight.adapter.factor if weight.adapter is not None else None
    factor_N = factor.value if factor is not None else None
    if weight.codes is not None:
        return weight.codes.product(x_TK, bias_N, residual_TN, factor_N=factor_N)
    if weight.packed is None:
        return linear_reference(x_TK, weight.read, bias_N, residual_TN, factor_N=factor_N)
    return product(x_TK, weight.packed, weight.value.shape[0], bias_N, residual_TN, factor_N=factor_N)


def linear(
    x_TK: torch.Tensor, weight: Weight, bias: Weight | None = None, residual_TN: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias + residual: [T, N] in x's dtype. Differentiable; the weight's gradient goes to `weight.grad`.

    What an adapter adds is added to what is then rounded, as another residual (adapter.py).
    """
    if torch.is_grad_enabled() and x_TK.requires_grad:
        return _Linear.apply(x_TK, weight, bias, residual_TN)
    return product_of(x_TK, weight, bias, residual_TN)[0]


def narrowed(logits_TV: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Logits in fp32 as the softmax has them: rounded to bf16 where the head says so (`model.logits`)."""
    return logits_TV.bfloat16().float() if weight.narrow else logits_TV


def logits(x_TM: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The output head: [T, V] in fp32, rounded nowhere in between, and at the end only where the head says so."""
    return narrowed(_logits(x_TM, weight), weight)


def _logits(x_TM: torch.Tensor, weight: Weight) -> torch.Tensor:
    if backend(x_TM) == "triton":
        from tandem.kernels.gpu import linear as gpu

        return gpu.product(x_TM, weight.value, out_dtype=torch.float32)
    assert x_TM.shape[1] == weight.value.shape[1], (x_TM.shape, weight.value.shape)
    if weight.codes is not None:
        return weight.codes.product(x_TM, out_dtype=torch.float32)
    if weight.packed is None:
        return linear_reference(x_TM, weight.value, out_dtype=torch.float32)
    return product(x_TM, weight.packed, weight.value.shape[0], out_dtype=torch.float32)
