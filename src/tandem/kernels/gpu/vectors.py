"""Vectors over their largest size: what codes with a scale each are made of (`numerics.quantise.to_int8`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled(values, largest: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vectors [V, D] in fp32 over amax / largest, not yet rounded; those scales, NaN of a vector that is not finite,
    whose numbers are 0."""
    top = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # as sizes compare; infinity, then NaN above all
    finite = top < 0x7F800000
    amax = tl.where(finite, top, 0).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, largest, tl.float32))
    divisor = tl.broadcast_to(tl.where(scale > 0, scale, float("inf"))[:, None], values.shape)
    code = tl.div_rn(tl.where(finite[:, None], values, 0.0), divisor)
    code = tl.minimum(tl.maximum(code, -largest), largest)
    return code, tl.where(finite, scale, float("nan"))


@triton.jit
def to_integers(code):  # type: ignore[no-untyped-def]
    """The nearest, ties to even; below 2^22."""
    return (code + 12582912.0) - 12582912.0  # 1.5 * 2^23
