"""Codes and scales of llama.cpp's block formats into the bytes of their blocks.

`packed` gets codes [N, B, block] and what a block keeps of its scales, in the order in which `ggml.py` makes them.
Layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tandem.numerics.blocks import FORMATS, Blocks, dequantise
from tandem.numerics.elements import E8M0_NAN

# gguf dequantises 16 rows at a time whatever their length. Rows of 32768 weights took 0.20 s for SmolLM2's Q4_1 file,
# its own rows of 576 took 0.87 s, one row for the whole tensor 0.50 s (one core).
_ROW_WEIGHTS = 32768


def packed(name: str, codes: Tensor, heads: tuple[Tensor, ...]) -> Tensor:
    """Bytes [N, bytes of a row], of a format by its name."""
    if name in ("Q5_0", "Q5_1"):
        high = _planes((codes >> 4).unflatten(-1, (4, 8)).transpose(-1, -2), 1)  # a bit each of 32
        parts = [*heads, high, _nibbles(codes & 15, 16)]
    elif name == "Q8_0":
        parts = [*heads, codes - 127]  # int8, as bytes
    elif name == "NVFP4":
        parts = [*heads, _nibbles(codes, 8)]
    elif name == "Q2_K":
        scales, lows, *halves = heads
        parts = [scales | lows << 4, _pairs(codes), *halves]
    elif name == "Q3_K":
        parts = [_planes(codes.unflatten(-1, (8, 32)) >> 2, 1), _pairs(codes & 3), _scales_of_3(heads[0]), heads[1]]
    elif name in ("Q4_K", "Q5_K"):
        scales, lows, *halves = heads
        fifth = [_planes(codes.unflatten(-1, (8, 32)) >> 4, 1)] if name == "Q5_K" else []
        parts = [*halves, _scales_of_4(scales, lows), *fifth, _nibbles(codes & 15, 32)]
    elif name == "Q6_K":
        parts = [_nibbles(codes & 15, 64), _pairs(codes >> 4), *heads]
    else:  # Q4_0, Q4_1, IQ4_NL, MXFP4
        parts = [*heads, _nibbles(codes, 16)]
    return torch.cat(parts, -1).flatten(1)


def values(
    raw: np.ndarray, kind: int, block: tuple[int, int], shape: tuple[int, ...], whole: Tensor | None = None
) -> Tensor:
    """What bytes of a tensor of `shape` stand for, fp32. kind: ggml's number of a format; block: weights and bytes of
    one; whole: NVFP4's scale of the tensor, where it has one. A block of MXFP4 with the scale 255, and of NVFP4 with
    127, is NaN, as in these formats; gguf has 2^127 and 0."""
    from gguf import GGMLQuantizationType, dequantize

    if kind == GGMLQuantizationType.NVFP4:
        return scaled_nvfp4(torch.from_numpy(raw), shape[-1], torch.ones(()) if whole is None else whole.reshape(()))
    weights, size = block
    blocks = raw.size // size
    row_blocks = min(blocks, _ROW_WEIGHTS // weights)
    while blocks % row_blocks:
        row_blocks -= 1
    made = torch.from_numpy(dequantize(raw.reshape(-1, row_blocks * size), GGMLQuantizationType(kind)))
    if kind == GGMLQuantizationType.MXFP4:
        made.view(-1, weights)[torch.from_numpy(raw.reshape(-1, size)[:, 0] == E8M0_NAN)] = torch.nan
    return made.reshape(shape)


def scaled_nvfp4(raw: Tensor, width: int, whole: Tensor) -> Tensor:
    """What NVFP4's bytes stand for, fp32 [N, K], with a scale of the tensor: as `blocks.dequantise` has it."""
    blocks = raw.view(-1, width // 64, 36)
    halves = blocks[..., 4:].unflatten(-1, (4, 8))
    codes = torch.cat([halves & 15, halves >> 4], -1)
    return dequantise(Blocks(codes.flatten(1), blocks[..., :4].flatten(1), whole), FORMATS["nvfp4"])


def _nibbles(codes: Tensor, apart: int) -> Tensor:
    """Codes [.., n] of 4 bits: of each 2 x `apart` numbers the second half above the first."""
    halves = codes.unflatten(-1, (-1, 2, apart))
    return (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)


def _pairs(codes: Tensor) -> Tensor:
    """Codes [.., 256] of 2 bits: of each 128 numbers four times 32, one above the other."""
    return _planes(codes.unflatten(-1, (2, 4, 32)), 2).flatten(-2)


def _planes(codes: Tensor, bits: int) -> Tensor:
    """Codes [.., planes, n], each plane `bits` above the one before: [.., n]."""
    made = torch.zeros_like(codes[..., 0, :])
    for plane in range(codes.shape[-2]):
        made |= codes[..., plane, :] << bits * plane
    return made


def _scales_of_3(scales: Tensor) -> Tensor:
    """16 scales of 6 bits, from -32, in 12 bytes: low halves, then high pairs."""
    codes = scales + 32
    low = codes[..., :8] & 15 | (codes[..., 8:] & 15) << 4
    return torch.cat([low, _planes((codes >> 4 & 3).unflatten(-1, (4, 4)), 2)], -1)


def _scales_of_4(scales: Tensor, lows: Tensor) -> Tensor:
    """8 scales and 8 of what is taken off, of 6 bits, in 12 bytes."""
    first = [one[..., :4] | (one[..., 4:] >> 4) << 6 for one in (scales, lows)]
    return torch.cat([*first, scales[..., 4:] & 15 | (lows[..., 4:] & 15) << 4], -1)
