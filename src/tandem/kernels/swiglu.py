"""SwiGLU: silu(gate) * up in fp32, rounded once (Shazeer, 2002.05202)."""

from __future__ import annotations

import torch

from tandem.kernels.adapter import (
    adapted_input_gradient,
    add_gradients,
    add_magnitude_gradients,
    factored,
    learns_magnitude,
)
from tandem.kernels.address import address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.kernels.gradient import add_gradient, input_gradient
from tandem.kernels.linear import linear, product_of
from tandem.kernels.weight import Weight


def swiglu_reference(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """[T, 2F] (gate, then up) -> [T, F]."""
    wide = gate_up_TF.dtype if gate_up_TF.dtype == torch.float64 else torch.float32
    gate, up = gate_up_TF.to(wide).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_TF.dtype)


def swiglu(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """[T, 2F] (gate, then up) -> [T, F], contiguous input."""
    if backend(gate_up_TF) == "triton":
        from tandem.kernels.gpu import swiglu as gpu

        return gpu.swiglu(gate_up_TF)
    run = kernel("layer", "swiglu", gate_up_TF.dtype, "ppii")
    if run is None:
        return swiglu_reference(gate_up_TF)
    rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up_TF.dtype)
    run(address(gate_up_TF, gate_up_TF.dtype, rows, 2 * width), out.data_ptr(), rows, width)
    return out


def swiglu_backward_reference(dy_TF: torch.Tensor, gate_up_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient [T, 2F] by autograd, and the output [T, F] again."""
    with torch.enable_grad():
        gate_up = gate_up_TF.detach().float().requires_grad_()
        (dgate_up_TF,) = torch.autograd.grad(swiglu_reference(gate_up), gate_up, dy_TF.float())
    return dgate_up_TF.to(gate_up_TF.dtype), swiglu_reference(gate_up_TF)


def _backward(dy_TF: torch.Tensor, gate_up_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if backend(gate_up_TF) == "triton":
        from tandem.kernels.gpu import swiglu as gpu

        return gpu.swiglu_backward(dy_TF, gate_up_TF)
    run = kernel("layer", "swiglu_backward", gate_up_TF.dtype, "ppppii")
    if run is None:
        return swiglu_backward_reference(dy_TF, gate_up_TF)
    (rows, width), dtype = dy_TF.shape, gate_up_TF.dtype
    given = address(dy_TF, dtype, rows, width), address(gate_up_TF, dtype, rows, 2 * width)
    dgate_up_TF, act_TF = torch.empty_like(gate_up_TF), torch.empty_like(dy_TF)
    run(*given, dgate_up_TF.data_ptr(), act_TF.data_ptr(), rows, width)
    return dgate_up_TF, act_TF


class _Down(torch.autograd.Function):
    """down(swiglu(gate_up)) + residual; keeps gate_up alone and computes the product of gate and up again."""

    @staticmethod
    def forward(ctx, gate_up_TF, weight, residual_TM):  # type: ignore[no-untyped-def]
        ctx.weight, ctx.adapter = weight, weight.adapter
        out_TM, lowered_TR = product_of(swiglu(gate_up_TF), weight, None, residual_TM)
        ctx.save_for_backward(gate_up_TF, lowered_TR)
        return out_TM

    @staticmethod
    def backward(ctx, dy_TM):  # type: ignore[no-untyped-def]
        gate_up_TF, lowered_TR = ctx.saved_tensors
        dy_TM = dresidual_TM = dy_TM.contiguous()
        adapter = ctx.adapter
        if adapter is None:
            dact_TF = input_gradient(dy_TM, ctx.weight)
        else:
            assert adapter is ctx.weight.adapter, "another adapter was put on between the two passes"
            dy_TM = factored(dy_TM, adapter)
            dact_TF, dlow_TR = adapted_input_gradient(dy_TM, ctx.weight, adapter)
        dgate_up_TF, act_TF = _backward(dact_TF, gate_up_TF)
        if adapter is not None:
            add_gradients(adapter, dy_TM, dlow_TR, act_TF, lowered_TR)
            if learns_magnitude(adapter):
                add_magnitude_gradients(adapter, dresidual_TM, product_of(act_TF, ctx.weight)[0])
        add_gradient(ctx.weight, dy_TM, act_TF)
        return dgate_up_TF, None, dresidual_TM


def swiglu_down(gate_up_TF: torch.Tensor, weight: Weight, residual_TM: torch.Tensor) -> torch.Tensor:
    """The second half of the feed-forward layer with its residual: [T, 2F] -> [T, M]. Differentiable."""
    if not (torch.is_grad_enabled() and gate_up_TF.requires_grad):
        return linear(swiglu(gate_up_TF), weight, None, residual_TM)
    return _Down.apply(gate_up_TF, weight, residual_TM)
