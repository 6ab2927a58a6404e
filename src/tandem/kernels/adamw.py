"""AdamW on fp32 master weights, fused with the rounding to the compute dtype (Loshchilov and Hutter, 1711.05101).

`adamw_few` keeps less: moments in 8 bits with a scale a block, as Dettmers et al. (2110.02861), but in e4m3, the second
as its root, so that both have its range of 2^17; weights in bf16 alone. Both are rounded stochastically: by rounding to
the nearest a moment that decays by less than half a code stands still, and so does a weight. A second moment above 0
keeps the least code above it: over 0, an update would be a moment over eps (the zero point of Li et al., 2309.01507).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tandem.kernels.address import address
from tandem.kernels.build.load import function, kernel
from tandem.kernels.choice import backend
from tandem.numerics.quantise import E4M3_MAX
from tandem.numerics.random import Stream, words

SHARED = 1024  # numbers of a moment that share a scale


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


class Few(NamedTuple):
    """AdamW's state of a tensor of n numbers, of which some are kept in fewer bits."""

    master: Tensor  # fp32; or the compute weights themselves, bf16, which are then all there is
    first: Tensor  # fp32, or uint8: codes of e4m3
    second: Tensor
    first_scales: Tensor | None = None  # fp32, of each SHARED numbers, which e4m3's 448 stands for the largest of
    second_scales: Tensor | None = None  # of the roots


def few_of(value: Tensor, *, eights: bool, masters: bool) -> Few:
    """The state before the first update. eights: moments in 8 bits; masters: weights in fp32 beside `value`."""
    blocks = -(-value.numel() // SHARED)
    master = value.float() if masters else value
    if not eights:
        return Few(master, torch.zeros(value.shape), torch.zeros(value.shape))
    first, second = (torch.zeros(value.shape, dtype=torch.uint8) for _ in range(2))
    return Few(master, first, second, torch.zeros(blocks), torch.zeros(blocks))


def adamw_few(state: Few, grad: Tensor, value: Tensor, hyper: Hyper, seed: int) -> None:
    """One update in place. seed: of the tensor; its words are those of (seed, update, place)."""
    narrow = value.dtype == torch.bfloat16
    run = kernel("adamw", "adamw_few", value.dtype, "p" * 7 + "i" * 3 + "f" * 8) if narrow else None
    if run is None:
        adamw_few_reference(state, grad, value, hyper, seed)
        return
    kind = torch.float32 if state.first_scales is None else torch.uint8
    own = state.master is value
    scales = (None if t is None else t.data_ptr() for t in (state.first_scales, state.second_scales))
    run(
        None if own else address(state.master, torch.float32, *value.shape),
        *(address(t, kind, *value.shape) for t in (state.first, state.second)),
        *scales,
        address(grad, torch.float32, *value.shape),
        address(value, value.dtype, *value.shape),
        *(value.numel(), seed, hyper.step),
        *(hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay),
        *(hyper.bias1, hyper.bias2, hyper.grad_scale),
    )


def adamw_few_reference(state: Few, grad: Tensor, value: Tensor, hyper: Hyper, seed: int) -> None:
    """`adamw_few` by torch, a step at a time."""
    drawn = torch.from_numpy(words(seed, hyper.step, np.arange(value.numel()), Stream.ROUNDING).astype(np.int64))
    master, first, second = state.master.float().view(-1), state.first.view(-1), state.second.view(-1)
    if state.first_scales is not None and state.second_scales is not None:
        codes, roots = first, second
        first = codes.view(torch.float8_e4m3fn).float() * _each(state.first_scales, codes)
        second = (roots.view(torch.float8_e4m3fn).float() * _each(state.second_scales, roots)).square()
    adamw_reference(master, first, second, grad.view(-1), hyper)
    if state.first_scales is not None and state.second_scales is not None:
        codes.copy_(_drawn_codes(first, state.first_scales, (drawn & 1023) << 10 | 512))
        found = _drawn_codes(second.sqrt(), state.second_scales, (drawn >> 10 & 1023) << 10 | 512)
        roots.copy_(found.maximum((second > 0).to(torch.uint8)))
    if state.master is value:
        up = (master.view(torch.int32).long() + ((drawn >> 20) << 4 | 8)) >> 16
        value.view(-1).copy_(torch.where(master.isfinite(), (up << 16).int().view(torch.float32), master))
    else:
        state.master.view(-1).copy_(master)
        value.view(-1).copy_(master)


def _each(scales: Tensor, codes: Tensor) -> Tensor:
    return scales.repeat_interleave(SHARED)[: len(codes)]


def _drawn_codes(x: Tensor, scales: Tensor, below: Tensor) -> Tensor:
    """Codes of e4m3, and in `scales` what they are multiplied by; up where what is lost and `below` (20 bits) carry."""
    padded = torch.nn.functional.pad(x, (0, -len(x) % SHARED)).view(-1, SHARED)
    scales.copy_(padded.abs().amax(1) / E4M3_MAX)
    size = x.abs() / _each(scales.where(scales > 0, torch.inf), x)
    bits = (size * 2.0**-120).view(torch.int32).long() + below
    return ((bits >> 20).clamp_max(126) | torch.where(torch.signbit(x), 128, 0)).to(torch.uint8)


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
