"""Scales of a matrix's inputs that a rounding errs less with, and ends of its blocks: AWQ and SmoothQuant.

y = (x / s) (W s)^T is y: s is folded into what gives x. AWQ (Lin et al., 2306.00978) takes s = (mean |x|)^a with the a
whose rounded matrix errs least on the inputs, then brings in each block's ends where that errs less still. What an
error E costs is tr(E H E^T), with H the inputs' second moments: the squared error of the outputs, over all texts,
without running one.
SmoothQuant (Xiao et al., 2211.10438) takes s_j = max|x_j|^a / max|w_j|^(1 - a), so that inputs are easy to round too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tandem.numerics.blocks import WHOLE, WHOLE_ROW, Format, block_scales, quantise, rounded
from tandem.numerics.elements import Fixed
from tandem.numerics.snap import snap

STEPS = 20  # of AWQ's a, in [0, 1)
ENDS = tuple(1.0 - step / 20 for step in range(10))  # shares of a block's largest that are tried as its end
SMOOTH = 0.5  # SmoothQuant's a
LEAST = 1e-4  # of a scale


def tried(x_NK: Tensor, form: Format) -> Tensor:
    """`blocks.rounded` of fp32 without its codes, for searches: of nvfp4, ties may fall to the other side."""
    if form.block == WHOLE or form.rows > 1 or form.chain == "four_six":
        return rounded(x_NK, form)
    (rows, width), size = x_NK.shape, x_NK.shape[1] if form.block == WHOLE_ROW else form.block
    wide = functional.pad(x_NK, (0, -width % size)).view(rows, -1, size)
    # A block's scale hangs on its ends alone: those are a block.
    ends = quantise(torch.stack(wide.aminmax(dim=-1), -1).flatten(1), replace(form, block=2), "nearest")
    scales = block_scales(ends, replace(form, block=2))[..., None]
    divided = wide / scales.where(scales > 0, torch.inf)
    if ends.zeros is None:
        values = snap(divided, form.element)
    else:
        assert isinstance(form.element, Fixed)
        zeros = ends.zeros[..., None].float()
        values = divided.round_().add_(zeros).clamp_(0, (1 << form.element.bits) - 1).sub_(zeros)
    return values.mul_(scales).flatten(1)[:, :width]


def cost(error_NK: Tensor, hessian_KK: Tensor) -> float:
    """tr(E H E^T): squared error of the outputs."""
    return float((error_NK @ hessian_KK).mul_(error_NK).sum(dtype=torch.float64))


def awq_scales(weight_NK: Tensor, hessian_KK: Tensor, mean_K: Tensor, form: Format) -> tuple[Tensor, float]:
    """s [K], fp32, of mean_K, the mean of |x|; and its a. 1 where nothing errs less."""
    weight_NK, least, found, exponent = weight_NK.float(), math.inf, torch.ones_like(mean_K), 0.0
    level_K = mean_K.clamp_min(LEAST)
    for step in range(STEPS):
        s_K = level_K.pow(step / STEPS)
        s_K = (s_K / (s_K.max() * s_K.min()).sqrt()).clamp_min(LEAST)
        error_NK = tried(weight_NK * s_K, form).div_(s_K).sub_(weight_NK)
        one = cost(error_NK, hessian_KK)
        if one < least:
            least, found, exponent = one, s_K, step / STEPS
    return found, exponent


def clipped(weight_NK: Tensor, hessian_KK: Tensor, form: Format) -> Tensor:
    """The matrix with the ends of each block brought in by the share of ENDS that errs least when it is rounded.

    A block's inputs are looked at alone, as AWQ does. Formats whose scale is a tensor's or a tile's: as it is.
    """
    if form.block == WHOLE or form.rows > 1:
        return weight_NK
    width = weight_NK.shape[1]
    size = form.block if form.block > 0 else width
    groups = -(-width // size)
    spare = groups * size - width

    def blocked(x: Tensor) -> Tensor:  # [N, G, B]
        return functional.pad(x, (0, spare)).unflatten(1, (groups, size))

    wide, padded = blocked(weight_NK.float()), functional.pad(hessian_KK, (0, spare, 0, spare))
    index = torch.arange(groups)
    own_GBB = padded.view(groups, size, groups, size)[index, :, index]
    low, high = wide.amin(-1, keepdim=True).clamp_max(0.0), wide.amax(-1, keepdim=True).clamp_min(0.0)
    if not form.zero_point:
        high = torch.maximum(high, -low)
        low = -high
    # Where blocks share a scale of the tensor, its largest number stays, and so does that scale.
    held = high == high.max() if form.scale == "e4m3" else torch.zeros_like(high, dtype=torch.bool)
    best, least = wide, None
    for share in ENDS:
        narrow = torch.where(held, wide, wide.clamp(low * share, high * share))
        error_GNB = (blocked(tried(narrow.flatten(1)[:, :width], form)) - wide).transpose(0, 1)
        one_NG = (error_GNB @ own_GBB).mul_(error_GNB).sum(-1).T
        if least is None:
            best, least = narrow, one_NG
            continue
        better = one_NG < least
        best, least = torch.where(better[..., None], narrow, best), torch.where(better, one_NG, least)
    return best.flatten(1)[:, :width].contiguous()


def smooth_scales(weight_NK: Tensor, largest_K: Tensor, a: float = SMOOTH) -> Tensor:
    """s [K] of SmoothQuant; 1 for an input, or a column, that is all zeros. largest_K: of |x|."""
    column_K = weight_NK.float().abs().amax(0)
    s_K = largest_K.clamp_min(LEAST).pow(a) / column_K.clamp_min(LEAST).pow(1 - a)
    return torch.where((largest_K > 0) & (column_K > 0), s_K.clamp_min(LEAST), 1.0)
