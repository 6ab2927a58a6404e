"""The nearest number of a format by sums in fp32: what `elements.encode` gives, in a fifth of the time.

A sum with 1.5 x 2^23 units, taken away again, leaves whole units, ties to the even one, which is the even code. The
processor does the rounding, so the format's numbers must be far from fp32's own denormals, which it may flush.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.numerics import elements
from tandem.numerics.elements import Element, Fixed, Floating, Rounding

_EXPONENT = 0x7F800000
_FAR = 100  # powers of two that neither a number nor what divides it lies beyond


def encode(
    x: Tensor,
    element: Element,
    rounding: Rounding = "nearest",
    *,
    power: Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """`elements.encode`, saturating, of numbers that are not NaN: the same codes, by sums where they can be.

    power: one of each block along x's last axis, [.., 1]; none: 0.
    """
    odd = (
        isinstance(element, Floating) and element.mantissa == 0
    )  # a power of two is the even code, not the even number
    if rounding != "nearest" or odd or element.smallest < 2.0**-_FAR:
        return elements.encode(x, element, rounding, power=0 if power is None else power, words=words)
    if power is None:
        return codes_of(snap(x, element), element)
    if bool(((power.abs() <= _FAR) | (x == 0).all(-1, keepdim=True)).all()):
        bits = (127 - power.clamp(-_FAR, _FAR)).to(torch.int32) << 23
        return codes_of(snap(x * bits.view(torch.float32), element), element)
    return elements.encode(x, element, power=power)


def snap(x: Tensor, element: Element) -> Tensor:
    """The nearest number of a format, beyond the largest that one: fp32, as x. NaN stays; ties as `encode` has them,
    but for elements without a mantissa.

    >>> from tandem.numerics.elements import E2M1
    >>> snap(torch.tensor([0.25, 0.26, -2.5, 5.0, 9.0]), E2M1).tolist()
    [0.0, 0.5, -2.0, 4.0, 6.0]
    """
    if isinstance(element, Fixed):
        if element.fraction == 0:
            return x.round().clamp_(-element.largest, element.largest)
        return (x * 2.0**element.fraction).round_().mul_(element.smallest).clamp_(-element.largest, element.largest)
    inside = x.clamp(-element.largest, element.largest)
    power = (inside.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_min_(2.0**element.least)
    magic = power.mul_(1.5 * 2.0 ** (23 - element.mantissa))
    return torch.copysign(inside.add_(magic).sub_(magic), x)


def codes_of(values: Tensor, element: Element) -> Tensor:
    """Codes of numbers that the format has (fp32): uint8, or int32 where they are wider."""
    narrow = torch.uint8 if element.bits <= 8 else torch.int32
    half = 1 << (element.bits - 1)
    if isinstance(element, Fixed):
        whole = values * 2.0**element.fraction if element.fraction else values
        if element.bits <= 8:
            return whole.to(torch.int8).view(torch.uint8) & (2 * half - 1)
        return whole.to(torch.int32) & (2 * half - 1)
    bits = values.view(torch.int32)
    size, drop = bits & 0x7FFFFFFF, 23 - element.mantissa
    normal = (size >> drop) - ((127 - element.bias) << element.mantissa)
    below = (values.abs() * (2.0 ** (element.mantissa - element.least))).to(torch.int32)
    code = torch.where(size >= ((element.least + 127) << 23), normal, below)
    return (code | torch.where(bits < 0, half, 0)).to(narrow)
