"""Activation checkpointing: what a layer computed is dropped and computed again in the backward pass.

torch.utils.checkpoint does the same, and loads torch's compiler on its first call: 126 MiB and seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TM, layer):  # type: ignore[no-untyped-def]
        ctx.layer = layer
        ctx.save_for_backward(hidden_TM)
        return layer(hidden_TM)

    @staticmethod
    def backward(ctx, dout_TM):  # type: ignore[no-untyped-def]
        hidden_TM = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out_TM = ctx.layer(hidden_TM)
        torch.autograd.backward(out_TM, dout_TM)
        return hidden_TM.grad, None


def recompute(layer: Callable[[torch.Tensor], torch.Tensor], hidden_TM: torch.Tensor) -> torch.Tensor:
    """layer(hidden): [T, M], of which only `hidden` is kept. Gradients of weights are added as without."""
    out_TM: torch.Tensor = _Recompute.apply(hidden_TM, layer)
    return out_TM
