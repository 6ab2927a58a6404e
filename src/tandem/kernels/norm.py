"""Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * w, in fp32, rounded once (Zhang and Sennrich, 1910.07467)."""

from __future__ import annotations

import torch

from tandem.kernels.build import kernel
from tandem.kernels.choice import backend
from tandem.kernels.weight import Weight


def rms_norm_reference(x_TM: torch.Tensor, weight_M: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x_TM.dtype if x_TM.dtype == torch.float64 else torch.float32
    x = x_TM.to(wide)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_M.to(wide)).to(x_TM.dtype)


def rms_norm_backward_reference(
    dy_TM: torch.Tensor, x_TM: torch.Tensor, weight_M: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows [T, M] and of the weight [M], the latter in fp32, by autograd."""
    with torch.enable_grad():
        x = x_TM.detach().float().requires_grad_()
        weight = weight_M.detach().float().requires_grad_()
        dx, dweight = torch.autograd.grad(rms_norm_reference(x, weight, eps), (x, weight), dy_TM.float())
    return dx.to(x_TM.dtype), dweight


def _forward(x_TM: torch.Tensor, weight: Weight, eps: float, rstd_T: torch.Tensor | None) -> torch.Tensor:
    run = kernel("layer", "norm", x_TM.dtype, "pippipiif")
    if run is None:
        return rms_norm_reference(x_TM, weight.value, eps)
    rows, width = x_TM.shape
    out = torch.empty(rows, width, dtype=x_TM.dtype)
    rstd = rstd_T.data_ptr() if rstd_T is not None else None
    run(x_TM.data_ptr(), x_TM.stride(0), weight.value.data_ptr(), out.data_ptr(), width, rstd, rows, width, eps)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TM, weight, eps):  # type: ignore[no-untyped-def]
        x_TM = x_TM.contiguous()
        rstd_T = torch.empty(x_TM.shape[0])
        ctx.weight, ctx.eps = weight, eps
        out = _forward(x_TM, weight, eps, rstd_T)
        ctx.save_for_backward(x_TM, rstd_T)
        return out

    @staticmethod
    def backward(ctx, dy_TM):  # type: ignore[no-untyped-def]
        x_TM, rstd_T = ctx.saved_tensors
        dy_TM = dy_TM.contiguous()
        rows, width = x_TM.shape
        dx_TM = torch.empty_like(x_TM)
        dweight_M = torch.zeros(width)
        run = kernel("layer", "norm_backward", x_TM.dtype, "ppppppii")
        if run is None:
            dx_TM, dweight_M = rms_norm_backward_reference(dy_TM, x_TM, ctx.weight.value, ctx.eps)
        else:
            pointers = (t.data_ptr() for t in (dy_TM, x_TM, ctx.weight.value, rstd_T, dx_TM, dweight_M))
            run(*pointers, rows, width)
        if ctx.weight.grad is not None:
            ctx.weight.grad += dweight_M
        return dx_TM, None, None


def rms_norm(x_TM: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
    """[T, M] -> [T, M]; differentiable, the weight's gradient goes to `weight.grad`."""
    if backend(x_TM) == "triton":
        from tandem.kernels.gpu import norm as gpu

        return gpu.rms_norm(x_TM, weight, eps)
    if torch.is_grad_enabled() and x_TM.requires_grad:
        return _Norm.apply(x_TM, weight, eps)
    return _forward(x_TM, weight, eps, None)
