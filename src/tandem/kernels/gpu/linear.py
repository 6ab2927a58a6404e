"""y = x W^T (+ bias) (+ residual): one tile for every number of rows, the depth in order, fp32 accumulators."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tandem.kernels.weight import Weight

# Measured on no GPU yet. Any other choice gives other bits, the same for all rows.
BLOCK_T, BLOCK_N, BLOCK_K = 64, 64, 64
WARPS, STAGES = 4, 4


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    residual,
    out,
    rows,
    columns: tl.constexpr,
    depth: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    n = tl.program_id(1) * block_n + tl.arange(0, block_n)
    row = t.to(tl.int64)[:, None]
    column = n.to(tl.int64)[None, :]
    accumulator = tl.zeros((block_t, block_n), dtype=tl.float32)
    for first in range(0, depth, block_k):
        k = first + tl.arange(0, block_k)
        x_tile = tl.load(x + row * depth + k[None, :], (t < rows)[:, None] & (k < depth)[None, :], 0.0)
        w_tile = tl.load(weight + column * depth + k[:, None], (n < columns)[None, :] & (k < depth)[:, None], 0.0)
        accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision="ieee")
    if has_bias:
        accumulator += tl.load(bias + n, n < columns, 0.0).to(tl.float32)[None, :]
    mask = (t < rows)[:, None] & (n < columns)[None, :]
    place = row * columns + column
    if has_residual:
        accumulator = accumulator.to(x.dtype.element_ty).to(tl.float32)
        accumulator += tl.load(residual + place, mask, 0.0).to(tl.float32)
    tl.store(out + place, accumulator.to(out.dtype.element_ty), mask)


def product(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    residual_TN: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[T, N]; rounded once, and once more before a residual is added. `weight_NK` is contiguous."""
    assert weight_NK.is_contiguous() and weight_NK.dtype == x_TK.dtype, (weight_NK.stride(), weight_NK.dtype)
    x_TK = x_TK.contiguous()
    (rows, depth), columns = x_TK.shape, weight_NK.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype or x_TK.dtype, device=x_TK.device)
    if rows == 0:
        return out
    residual = out if residual_TN is None else residual_TN.contiguous()
    linear_kernel[(triton.cdiv(rows, BLOCK_T), triton.cdiv(columns, BLOCK_N))](
        x_TK,
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        residual,
        out,
        rows,
        columns,
        depth,
        bias_N is not None,
        residual_TN is not None,
        BLOCK_T,
        BLOCK_N,
        BLOCK_K,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in fp32, for backward passes."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def accumulate(grad_NK: torch.Tensor, dy_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    """grad += dy^T x, in fp32."""
    grad_NK += wide_product(dy_TN.T, x_TK)


def input_gradient(dy_TN: torch.Tensor, weight: Weight) -> torch.Tensor:
    """dx = dy W: [T, K]."""
    return wide_product(dy_TN, weight.value).to(dy_TN.dtype)


def _forward(x_TK: torch.Tensor, weight: Weight, bias: Weight | None, residual_TN: torch.Tensor | None) -> torch.Tensor:
    return product(x_TK, weight.value, bias.value if bias is not None else None, residual_TN)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight, bias, residual_TN):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.bias, ctx.has_residual = weight, bias, residual_TN is not None
        ctx.save_for_backward(x_TK)
        return _forward(x_TK, weight, bias, residual_TN)

    @staticmethod
    def backward(ctx, dy_TN):  # type: ignore[no-untyped-def]
        (x_TK,) = ctx.saved_tensors
        if ctx.weight.grad is not None:
            accumulate(ctx.weight.grad, dy_TN, x_TK)
        if ctx.bias is not None and ctx.bias.grad is not None:
            ctx.bias.grad += dy_TN.float().sum(0)
        return input_gradient(dy_TN, ctx.weight), None, None, dy_TN if ctx.has_residual else None


def linear(
    x_TK: torch.Tensor, weight: Weight, bias: Weight | None = None, residual_TN: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias + residual: [T, N] in x's dtype. Differentiable; the weight's gradient goes to `weight.grad`."""
    if torch.is_grad_enabled() and x_TK.requires_grad:
        return _Linear.apply(x_TK, weight, bias, residual_TN)
    return _forward(x_TK, weight, bias, residual_TN)


def logits(x_TM: torch.Tensor, weight: Weight) -> torch.Tensor:
    """The output head: [T, V] in fp32, rounded nowhere in between."""
    return product(x_TM, weight.value, out_dtype=torch.float32)
