"""Fewer bits a number: integers in groups or vectors that share a scale, and e4m3. Pure functions, on any device.

`kernels/quantise.py` has the integers in C++, with the same bits.

Own integers are symmetric: of a group of inputs, scale = amax / L in fp32 with L = 127 (8 bits) or 7 (4 bits), and
code = w / scale in fp32, rounded to nearest even and clamped to [-L, L]. A value is code * scale, evaluated in fp32 and
rounded to the dtype asked for. Scales are kept in fp32, so 8 bits in groups of g cost 8 + 32 / g bits a weight.
Codes read from a file may have fp16 scales, widened first, and a minimum a group: code * scale + minimum, product and
sum rounded to fp32 each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tandem.errors import NonFiniteError
from tandem.numerics import blocks

LARGEST = {8: 127, 4: 7}  # bits -> largest code
E4M3_MAX = 448.0
INT4 = blocks.format_of("int4_g32_asym")  # of keys and values in pages


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix as integers. The last group of a row may hold fewer than `group` inputs.

    >>> quantise(torch.tensor([[7.0, -3.5, 0.4]]), 4, 2).codes_NK.tolist()
    [[7, -4, 7]]
    """

    codes_NK: Tensor  # int8, within [-127, 127] or [-7, 7]; of files [-128, 127], [-8, 7] or, with minima, [0, 15]
    scales_NG: Tensor  # fp32, of inputs [g * group, (g + 1) * group); 0 where they are all zero. Of files fp16
    bits: int
    group: int
    minima_NG: Tensor | None = None  # in the dtype of the scales


def quantise(weight_NK: Tensor, bits: int, group: int) -> Quantised:
    """Round a matrix (bf16, fp16 or fp32) in groups of `group` inputs, along its last axis. Bits: 8 or 4.

    A group whose scale underflows fp32 counts as zero. NonFiniteError where a weight is NaN or infinite.
    """
    assert weight_NK.ndim == 2 and bits in LARGEST and group > 0, (weight_NK.shape, bits, group)
    rows, inputs = weight_NK.shape
    groups = -(-inputs // group)
    grouped = functional.pad(weight_NK.float(), (0, groups * group - inputs)).view(rows, groups, group)
    scales_NG = torch.linalg.vector_norm(grouped, torch.inf, -1).div_(LARGEST[bits])
    check_scales(scales_NG, weight_NK)
    codes = _codes(grouped, scales_NG, LARGEST[bits])
    return Quantised(codes.view(rows, groups * group)[:, :inputs].contiguous(), scales_NG, bits, group)


def _codes(x: Tensor, scales: Tensor, largest: int) -> Tensor:
    """Of the vectors along the last axis, one scale each."""
    divisors = scales.where(scales > 0, torch.inf)[..., None]
    # The clamp matters where a scale is subnormal, and so far below amax / L that the largest code would exceed L.
    return (x / divisors).round_().clamp_(-largest, largest).to(torch.int8)


def check_scales(scales_NG: Tensor, weight_NK: Tensor) -> None:
    """NonFiniteError unless all scales are finite, which they are where all weights are."""
    if not bool(scales_NG.isfinite().all()):
        raise NonFiniteError(f"{int((~weight_NK.isfinite()).sum())} of {weight_NK.numel()} weights are not finite.")


def dequantise(quantised: Quantised, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] that the codes stand for, in `dtype`."""
    codes_NK, scales_NG, group = quantised.codes_NK, quantised.scales_NG, quantised.group
    (rows, inputs), groups = codes_NK.shape, scales_NG.shape[1]
    padded = functional.pad(codes_NK, (0, groups * group - inputs))
    grouped = padded.view(rows, groups, group) * scales_NG.float()[..., None]
    if quantised.minima_NG is not None:
        grouped += quantised.minima_NG.float()[..., None]
    return grouped.to(dtype).view(padded.shape)[:, :inputs].contiguous()


def to_e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn of x (bf16, fp16 or fp32; any shape): nearest, ties to even; beyond 448 it saturates; NaN stays.

    Clamped here, since what torch's own cast makes of values beyond 448 changed between its versions.

    >>> to_e4m3(torch.tensor([1.0, -500.0, 0.0625])).float().tolist()
    [1.0, -448.0, 0.0625]
    """
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype  # fp64 would be rounded twice
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def from_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of float8_e4m3fn numbers; exact in bf16, fp16 and fp32."""
    assert codes.dtype == torch.float8_e4m3fn, codes.dtype
    return codes.to(dtype)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [.., D] and fp32 scales [..] of vectors x [.., D] (bf16, fp16 or fp32), each a group of `quantise`.

    A vector with a NaN or an infinity has scale NaN and codes 0: all of it reads back as NaN.

    >>> [part.tolist() for part in to_int8(torch.tensor([[127.0, -2.5, 0.0], [torch.inf, 1.0, 0.0]]))]
    [[[127, -2, 0], [0, 0, 0]], [1.0, nan]]
    """
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype
    wide = x.float()
    amax = wide.abs().amax(-1)
    # A divisor on the device: CUDA multiplies by the reciprocal of a Python number.
    scales = (amax / amax.new_full((), LARGEST[8])).where(amax.isfinite(), torch.nan)
    return _codes(wide.where((scales > 0)[..., None], 0.0), scales, LARGEST[8]), scales


def from_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes [.., D] with scales [..] stand for: scale * code in fp32, rounded to `dtype`."""
    assert codes.dtype == torch.int8 and scales.dtype == torch.float32, (codes.dtype, scales.dtype)
    return (codes * scales[..., None]).to(dtype)


def int4_bytes(size: int) -> tuple[int, int]:
    """Of a vector of `size` numbers: bytes of codes and zero points, and groups, each with a scale.

    >>> int4_bytes(64)
    (34, 2)
    """
    groups = -(-size // INT4.block)
    return size // 2 + groups, groups


def to_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x [.., D] (bf16, fp16 or fp32; D even) as `INT4`: bytes [.., D / 2 + G] of two codes each, the lower one
    in the lower half, and of each group's zero point; and fp32 scales [.., G].

    A vector with a NaN or an infinity has scales NaN: all of it reads back as NaN.

    >>> [part.tolist() for part in to_int4(torch.tensor([-5.0, 10.0, 0.4, 2.6]))]
    [[240, 133, 5], [1.0]]
    """
    finite = x.isfinite().all(-1, keepdim=True)
    made = blocks.quantise(x.where(finite, 0.0), INT4)
    assert made.zeros is not None and x.shape[-1] % 2 == 0, x.shape
    codes = made.codes[..., ::2] | made.codes[..., 1::2] << 4
    return torch.cat([codes, made.zeros], -1), made.scales.where(finite, torch.nan)


def from_int4(held: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `to_int4` gave, read back: (code - zero point) * scale in fp32, rounded to `dtype`."""
    assert held.dtype == torch.uint8 and scales.dtype == torch.float32, (held.dtype, scales.dtype)
    half = held.shape[-1] - scales.shape[-1]
    codes = torch.stack([held[..., :half] & 15, held[..., :half] >> 4], -1).flatten(-2)
    return blocks.dequantise(blocks.Blocks(codes, scales, None, held[..., half:]), INT4, dtype)
