"""Integer rounding of matrices by the rules of `numerics/quantise.py`, to the same bits, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.address import address
from tandem.kernels.build.load import kernel
from tandem.numerics import blocks as formats
from tandem.numerics import quantise as reference
from tandem.numerics.blocks import WHOLE, WHOLE_ROW, Blocks, Format
from tandem.numerics.elements import Fixed
from tandem.numerics.quantise import LARGEST, Quantised, check_scales


def quantise(weight_NK: Tensor, bits: int, group: int) -> Quantised:
    """`numerics.quantise.quantise`, by the C++ where it can: bf16 and fp32 on the CPU."""
    run = kernel("quantise", "quantise", weight_NK.dtype, "pppiiif") if weight_NK.device.type == "cpu" else None
    if run is None:
        return reference.quantise(weight_NK, bits, group)
    assert weight_NK.ndim == 2 and bits in LARGEST and group > 0, (weight_NK.shape, bits, group)
    weight_NK = weight_NK.contiguous()
    rows, inputs = weight_NK.shape
    codes_NK = torch.empty(rows, inputs, dtype=torch.int8)
    scales_NG = torch.empty(rows, -(-inputs // group))
    run(weight_NK.data_ptr(), codes_NK.data_ptr(), scales_NG.data_ptr(), rows, inputs, group, float(LARGEST[bits]))
    check_scales(scales_NG, weight_NK)
    return Quantised(codes_NK, scales_NG, bits, group)


def dequantise(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """`numerics.quantise.dequantise`, by the C++ where it can: own integers, to bf16 and fp32 on the CPU."""
    codes_NK, scales_NG = quantised.codes_NK, quantised.scales_NG
    own = codes_NK.device.type == "cpu" and scales_NG.dtype == torch.float32 and quantised.minima_NG is None
    run = kernel("quantise", "dequantise", dtype, "pppiii") if own else None
    if run is None:
        return reference.dequantise(quantised, dtype)
    rows, inputs = codes_NK.shape
    scales = address(scales_NG, torch.float32, rows, -(-inputs // quantised.group))
    weight_NK = torch.empty(rows, inputs, dtype=dtype)
    run(address(codes_NK, torch.int8, rows, inputs), scales, weight_NK.data_ptr(), rows, inputs, quantised.group)
    return weight_NK


def nearest(weight_NK: Tensor, form: Format) -> Blocks:
    """`numerics.blocks.quantise` to the nearest, by the C++ where it has the format: own integers of 8 and 4 bits."""
    if not _own(form) or weight_NK.device.type != "cpu":
        return formats.quantise(weight_NK, form)
    made = quantise(weight_NK, form.element.bits, weight_NK.shape[1] if form.block == WHOLE_ROW else form.block)
    return Blocks(made.codes_NK.view(torch.uint8).bitwise_and_((1 << made.bits) - 1), made.scales_NG)


def values(blocks: Blocks, form: Format) -> Tensor:
    """`numerics.blocks.dequantise` to fp32, by the C++ where it has the format."""
    if not _own(form) or blocks.codes.device.type != "cpu":
        return formats.dequantise(blocks, form)
    bits, codes_NK = form.element.bits, blocks.codes
    signed = codes_NK.bitwise_left_shift(8 - bits).view(torch.int8).bitwise_right_shift_(8 - bits)
    group = codes_NK.shape[1] if form.block == WHOLE_ROW else form.block
    return dequantise(Quantised(signed, blocks.scales, bits, group), torch.float32)


def _own(form: Format) -> bool:
    """Whether a format is `numerics.quantise`'s."""
    plain = isinstance(form.element, Fixed) and form.element.fraction == 0 and form.element.bits in LARGEST
    return plain and form.scale == "fp32" and form.rows == 1 and form.block != WHOLE and not form.zero_point
