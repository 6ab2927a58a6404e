"""SwiGLU: silu(gate) * up in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tandem.kernels.gpu.linear import accumulate, input_gradient, linear
from tandem.kernels.weight import Weight

BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(gate_up, out, rows, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    t, f = place // width, place % width
    gate = tl.load(gate_up + 2 * t * width + f, t < rows, 0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * t + 1) * width + f, t < rows, 0.0).to(tl.float32)
    tl.store(out + place, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), t < rows)


def swiglu(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """[T, 2F] (gate, then up) -> [T, F]."""
    gate_up_TF = gate_up_TF.contiguous()
    rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    if rows:
        swiglu_kernel[(triton.cdiv(rows * width, BLOCK),)](gate_up_TF, out, rows, width, BLOCK)
    return out


class _Down(torch.autograd.Function):
    """down(swiglu(gate_up)) + residual; keeps gate_up alone and computes the product of gate and up again."""

    @staticmethod
    def forward(ctx, gate_up_TF, weight, residual_TM):  # type: ignore[no-untyped-def]
        ctx.weight = weight
        ctx.save_for_backward(gate_up_TF)
        return linear(swiglu(gate_up_TF), weight, None, residual_TM)

    @staticmethod
    def backward(ctx, dy_TM):  # type: ignore[no-untyped-def]
        (gate_up_TF,) = ctx.saved_tensors
        gate, up = gate_up_TF.float().chunk(2, -1)
        share = gate.sigmoid()
        active = gate * share
        if ctx.weight.grad is not None:
            accumulate(ctx.weight.grad, dy_TM, (active * up).to(dy_TM.dtype))
        dact = input_gradient(dy_TM, ctx.weight).float()
        dgate = dact * up * (share + active * (1 - share))
        return torch.cat((dgate, dact * active), -1).to(gate_up_TF.dtype), None, dy_TM


def swiglu_down(gate_up_TF: torch.Tensor, weight: Weight, residual_TM: torch.Tensor) -> torch.Tensor:
    """The second half of the feed-forward layer with its residual: [T, 2F] -> [T, M]. Differentiable."""
    if torch.is_grad_enabled() and gate_up_TF.requires_grad:
        return _Down.apply(gate_up_TF, weight, residual_TM)
    return linear(swiglu(gate_up_TF), weight, None, residual_TM)
