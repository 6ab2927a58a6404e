"""Root-mean-square norm: a row's whole width at once, in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tandem.kernels.weight import Weight

WARPS = 4
TILE = 2048  # elements of a program, by whole rows


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(x, weight, out, rows, eps, width: tl.constexpr, block_m: tl.constexpr, block_t: tl.constexpr):  # type: ignore[no-untyped-def]
    m = tl.arange(0, block_m)
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    place = t.to(tl.int64)[:, None] * width + m[None, :]
    mask = (t < rows)[:, None] & (m < width)[None, :]
    values = tl.load(x + place, mask, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) / width + eps)
    scale = tl.load(weight + m, m < width, 0.0).to(tl.float32)
    tl.store(out + place, (values * rstd[:, None] * scale[None, :]).to(out.dtype.element_ty), mask)


def _forward(x_TM: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
    x_TM = x_TM.contiguous()
    rows, width = x_TM.shape
    out = torch.empty_like(x_TM)
    block_m = triton.next_power_of_2(width)
    block_t = max(1, TILE // block_m)
    if rows:
        norm_kernel[(triton.cdiv(rows, block_t),)](
            x_TM, weight.value, out, rows, eps, width, block_m, block_t, num_warps=WARPS
        )
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TM, weight, eps):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.eps = weight, eps
        ctx.save_for_backward(x_TM)
        return _forward(x_TM, weight, eps)

    @staticmethod
    def backward(ctx, dy_TM):  # type: ignore[no-untyped-def]
        (x_TM,) = ctx.saved_tensors
        x, dy = x_TM.float(), dy_TM.float()
        rstd_T = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        unit = x * rstd_T
        if ctx.weight.grad is not None:
            ctx.weight.grad += (dy * unit).sum(0)
        dunit = dy * ctx.weight.value.float()
        dx_TM = rstd_T * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
        return dx_TM.to(x_TM.dtype), None, None


def rms_norm(x_TM: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
    """[T, M] -> [T, M]; differentiable, the weight's gradient goes to `weight.grad`."""
    if torch.is_grad_enabled() and x_TM.requires_grad:
        return _Norm.apply(x_TM, weight, eps)
    return _forward(x_TM, weight, eps)
