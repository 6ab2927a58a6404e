"""AdamW on fp32 master weights, fused with the rounding to the compute dtype (Loshchilov and Hutter, 1711.05101)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.kernels.address import address
from tandem.kernels.build.load import function, kernel
from tandem.kernels.choice import backend


@dataclass(frozen=True, slots=True)
class Hyper:
    """One update's constants.

    >>> Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1).bias1
    0.09999999999999998
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int  # 1 for the first update
    grad_scale: float = 1.0  # gradients are multiplied by this first (clipping)

    @property
    def bias1(self) -> float:
        return 1.0 - self.beta1**self.step

    @property
    def bias2(self) -> float:
        return 1.0 - self.beta2**self.step


def adamw_reference(master: Tensor, first: Tensor, second: Tensor, grad: Tensor, hyper: Hyper) -> None:
    """In place: w <- w (1 - lr wd) - lr mhat / (sqrt(vhat) + eps)."""
    grad = grad * hyper.grad_scale
    first.mul_(hyper.beta1).add_(grad, alpha=1 - hyper.beta1)
    second.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    denominator = (second / hyper.bias2).sqrt() + hyper.eps
    master.mul_(1 - hyper.lr * hyper.weight_decay).addcdiv_(first / hyper.bias1, denominator, value=-hyper.lr)


def adamw(master: Tensor, first: Tensor, second: Tensor, grad: Tensor, value: Tensor, hyper: Hyper) -> None:
    """Update master (fp32) and moments in place and round the result into `value` (compute dtype)."""
    run = kernel("adamw", "adamw", value.dtype, "pppppiffffffff")
    if run is None or backend(value) == "triton":
        adamw_reference(master, first, second, grad, hyper)
        value.copy_(master)
        return
    constants = (hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay)
    state = (address(t, torch.float32, *value.shape) for t in (master, first, second, grad))
    rounded = address(value, value.dtype, *value.shape)
    run(*state, rounded, master.numel(), *constants, hyper.bias1, hyper.bias2, hyper.grad_scale)


def grad_norm(grads: list[Tensor]) -> float:
    """Euclidean norm over all gradients, summed in fp64 in a fixed order. NaN or infinity where one is not finite."""
    if grads and backend(grads[0]) == "triton":
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        return float(torch.linalg.vector_norm(torch.stack(norms)))
    run = function("adamw", "squared_norm_fp32", "pip")
    total = 0.0
    for grad in grads:
        if run is None:
            total += float(grad.double().square().sum())
            continue
        out = torch.zeros(1, dtype=torch.float64)
        run(address(grad, torch.float32, *grad.shape), grad.numel(), out.data_ptr())
        total += float(out)
    return math.sqrt(total) if total >= 0 else math.nan
