"""Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * w, in fp32, rounded once (Zhang and Sennrich, 1910.07467)."""

from __future__ import annotations

import torch

from tandem.kernels.address import address, rows_address
from tandem.kernels.build.load import kernel
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


def unit_norm_reference(x_THD: torch.Tensor, eps: float) -> torch.Tensor:
    """Each head divided by its root mean square: a norm without weights."""
    return rms_norm_reference(x_THD, torch.ones(x_THD.shape[-1], device=x_THD.device), eps)


def _forward(x_TM: torch.Tensor, weight: Weight, eps: float, rstd_T: torch.Tensor | None) -> torch.Tensor:
    if backend(x_TM) == "triton":
        from tandem.kernels.gpu import norm as gpu

        return gpu.rms_norm(x_TM, weight.value, eps)
    run = kernel("layer", "norm", x_TM.dtype, "pippipiif")
    if run is None:
        return rms_norm_reference(x_TM, weight.value, eps)
    (rows, width), dtype = x_TM.shape, x_TM.dtype
    x, factors = rows_address(x_TM, dtype, rows, width), address(weight.value, dtype, width)
    out, rstd = torch.empty(rows, width, dtype=dtype), address(rstd_T, torch.float32, rows)
    run(x, x_TM.stride(0), factors, out.data_ptr(), width, rstd, rows, width, eps)
    return out


def _backward(
    dy_TM: torch.Tensor, x_TM: torch.Tensor, weight_M: torch.Tensor, eps: float, rstd_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend(x_TM) == "triton":
        from tandem.kernels.gpu import norm as gpu

        return gpu.rms_norm_backward(dy_TM, x_TM, weight_M, eps)
    run = kernel("layer", "norm_backward", x_TM.dtype, "ppppppii")
    if run is None:
        return rms_norm_backward_reference(dy_TM, x_TM, weight_M, eps)
    (rows, width), dtype = x_TM.shape, x_TM.dtype
    dx_TM, dweight_M = torch.empty_like(x_TM), torch.zeros(width)
    rows_of = (address(t, dtype, rows, width) for t in (dy_TM, x_TM))
    factors, rstd = address(weight_M, dtype, width), address(rstd_T, torch.float32, rows)
    run(*rows_of, factors, rstd, dx_TM.data_ptr(), dweight_M.data_ptr(), rows, width)
    return dx_TM, dweight_M


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TM, weight, eps):  # type: ignore[no-untyped-def]
        x_TM = x_TM.contiguous()
        rstd_T = torch.empty(x_TM.shape[0])  # filled by the C++, for its own backward pass
        ctx.weight, ctx.eps = weight, eps
        out = _forward(x_TM, weight, eps, rstd_T)
        ctx.save_for_backward(x_TM, rstd_T)
        return out

    @staticmethod
    def backward(ctx, dy_TM):  # type: ignore[no-untyped-def]
        x_TM, rstd_T = ctx.saved_tensors
        dx_TM, dweight_M = _backward(dy_TM.contiguous(), x_TM, ctx.weight.value, ctx.eps, rstd_T)
        if ctx.weight.grad is not None:
            ctx.weight.grad += dweight_M
        return dx_TM, None, None


def rms_norm(x_TM: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
    """[T, M] -> [T, M]; differentiable, the weight's gradient goes to `weight.grad`."""
    if torch.is_grad_enabled() and x_TM.requires_grad:
        return _Norm.apply(x_TM, weight, eps)
    return _forward(x_TM, weight, eps, None)


def unit_norm_(x_THD: torch.Tensor, eps: float) -> torch.Tensor:
    """`unit_norm_reference` in place; gives 1 / root mean square, [T, H, 1] in fp32, for `unit_norm_backward_`."""
    rstd_TH1 = torch.rsqrt(x_THD.float().square().mean(-1, keepdim=True) + eps)
    size = x_THD.shape[-1]
    ones = Weight(torch.ones(size, dtype=x_THD.dtype, device=x_THD.device), matrix=False)
    x_THD.copy_(rms_norm(x_THD.reshape(-1, size), ones, eps).view(x_THD.shape))
    return rstd_TH1


def unit_norm_backward_(dy_THD: torch.Tensor, y_THD: torch.Tensor, rstd_TH1: torch.Tensor) -> None:
    """Turn the gradient of the normed heads y into that of the heads before, in place."""
    dy, y = dy_THD.float(), y_THD.float()
    dy_THD.copy_(rstd_TH1 * (dy - y * (dy * y).mean(-1, keepdim=True)))
