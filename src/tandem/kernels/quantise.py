"""Integer rounding of matrices by the rules of `numerics/quantise.py`, to the same bits, in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.address import address
from tandem.kernels.build.load import kernel
from tandem.numerics import quantise as reference
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
