"""Numbers of few bits, bit for bit: what a code stands for, and which code a number becomes.

Codes are made from the bits of fp32 by integer operations alone: no flushing of denormals, no rounding mode and no
contraction can change one. `encode_reference` is the other writing, by the nearest of a format's values.

Formats as OCP's Microscaling Formats v1.0 (section 5.3) and IEEE 754 have them; others by name, `floating`.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tandem.errors import ConfigError, NonFiniteError

Rounding = Literal["nearest", "zero", "stochastic"]
Special = Literal["none", "nan", "ieee"]
MOST_BITS = 16
_FIELD = 0x7F800000  # the exponent of fp32
_FAR = 62  # more places than any sum of a shift is right by: the rest is lost in any case


@dataclass(frozen=True, slots=True)
class Floating:
    """A sign, an exponent, a mantissa; denormals always. Zeros have a sign.

    >>> E2M1.values().tolist()[:8], E2M1.largest, E4M3.largest, E5M2.smallest == 2.0**-16
    ([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], 6.0, 448.0, True)
    """

    name: str
    exponent: int  # bits
    mantissa: int
    bias: int
    special: Special = "none"  # "nan": the last code of either sign; "ieee": the last exponent has infinities and NaN

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def last(self) -> int:
        """Code of the largest finite number."""
        codes = 1 << (self.exponent + self.mantissa)
        return codes - {"none": 1, "nan": 2, "ieee": 1 + (1 << self.mantissa)}[self.special]

    @property
    def least(self) -> int:
        """Exponent of the smallest normal number, a power of two."""
        return 1 - self.bias

    @property
    def most(self) -> int:
        """Of the largest number's power of two."""
        return (self.last >> self.mantissa) - self.bias

    @property
    def largest(self) -> float:
        return float(_magnitude(self, self.last))

    @property
    def smallest(self) -> float:
        """Above zero."""
        return float(_magnitude(self, 1))

    @property
    def has_nan(self) -> bool:
        return self.special != "none"

    def values(self) -> Tensor:
        """Of each code, fp32: [2^bits]."""
        return _values(self)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Integers of two's complement times 2^-fraction; the least one stands for itself and is never written.

    >>> INT8.largest, INT8.smallest, INT8.values().tolist()[255]
    (1.984375, 0.015625, -0.015625)
    """

    name: str
    bits: int
    fraction: int

    @property
    def last(self) -> int:
        return (1 << (self.bits - 1)) - 1

    @property
    def mantissa(self) -> int:
        """Bits behind the first one of the largest number."""
        return self.bits - 2

    @property
    def most(self) -> int:
        return self.bits - 2 - self.fraction

    @property
    def largest(self) -> float:
        return float(self.last * 2.0**-self.fraction)

    @property
    def smallest(self) -> float:
        return float(2.0**-self.fraction)

    @property
    def has_nan(self) -> bool:
        return False

    def values(self) -> Tensor:
        """Of each code, fp32: [2^bits]."""
        return _values(self)


Element = Floating | Fixed

E2M1 = Floating("e2m1", 2, 1, 1)
E2M3 = Floating("e2m3", 2, 3, 1)
E3M2 = Floating("e3m2", 3, 2, 3)
E4M3 = Floating("e4m3", 4, 3, 7, "nan")
E5M2 = Floating("e5m2", 5, 2, 15, "ieee")
INT8 = Fixed("int8", 8, 6)
ELEMENTS: dict[str, Element] = {one.name: one for one in (E2M1, E2M3, E3M2, E4M3, E5M2, INT8)}
E8M0_BIAS, E8M0_NAN = 127, 255


def floating(name: str) -> Element:
    """One of ELEMENTS, or a format of your own: e<exponent>m<mantissa>[b<bias>][nan|ieee]. ConfigError for others.

    >>> floating("e3m4b5").largest, floating("e5m10ieee").largest
    (7.75, 65504.0)
    """
    if name in ELEMENTS:
        return ELEMENTS[name]
    found = re.fullmatch(r"e(\d+)m(\d+)(?:b(-?\d+))?(nan|ieee)?", name)
    if found is None:
        raise ConfigError(
            f"{name!r} is no number format. Known are {', '.join(ELEMENTS)}; one of your own is written as "
            "e<exponent bits>m<mantissa bits>, then b<bias> and nan or ieee where they are wanted: e3m4b5."
        )
    exponent, mantissa = int(found[1]), int(found[2])
    bias = int(found[3]) if found[3] else (1 << (exponent - 1)) - 1 if exponent else 0
    special: Special = {"nan": "nan", "ieee": "ieee"}.get(found[4] or "", "none")  # type: ignore[assignment]
    if not (1 <= exponent <= 8 and 0 <= mantissa <= 10 and exponent + mantissa < MOST_BITS):
        raise ConfigError(f"{name}: give 1 to 8 bits of exponent and 0 to 10 of mantissa, {MOST_BITS} with the sign.")
    if special == "ieee" and exponent == 1 or special == "nan" and exponent + mantissa == 1:
        raise ConfigError(f"{name} has no number beside what is special. Give it more bits.")
    made = Floating(name, exponent, mantissa, bias, special)
    if not (made.most <= 127 and made.least - mantissa >= -149):
        raise ConfigError(f"{name} has numbers that fp32 has not: {made.smallest} to {made.largest}. Change its bias.")
    return made


def _magnitude(element: Floating, code: int) -> float:
    field, rest = code >> element.mantissa, code & ((1 << element.mantissa) - 1)
    if field == 0:
        return float(rest * 2.0 ** (element.least - element.mantissa))
    return float((rest + (1 << element.mantissa)) * 2.0 ** (field - element.bias - element.mantissa))


@functools.cache
def _values(element: Element) -> Tensor:
    codes = range(1 << element.bits)
    if isinstance(element, Fixed):
        half = 1 << (element.bits - 1)
        return torch.tensor([(code - 2 * half * (code >= half)) * 2.0**-element.fraction for code in codes])
    half = 1 << (element.bits - 1)
    sizes = [_magnitude(element, code) for code in range(half)]
    for code in range(element.last + 1, half):
        sizes[code] = torch.nan
    if element.special == "ieee":
        sizes[element.last + 1] = torch.inf
    return torch.tensor([*sizes, *(-size for size in sizes)], dtype=torch.float64).float()


def decode(codes: Tensor, element: Element) -> Tensor:
    """What codes stand for, in fp32."""
    return element.values().to(codes.device)[codes.long()]


def words_of(x: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """Uniform words of 32 bits for stochastic rounding, one for each of x, int64."""
    return torch.randint(0, 1 << 32, x.shape, generator=draw, dtype=torch.int64, device=x.device)


def encode(
    x: Tensor,
    element: Element,
    rounding: Rounding = "nearest",
    *,
    power: Tensor | int = 0,
    words: Tensor | None = None,
    saturate: bool = True,
) -> Tensor:
    """Codes of x 2^-power (bf16, fp16 or fp32, any shape), rounded once: uint8, or int32 where they are wider.

    nearest: ties to the even code. stochastic: away from zero where `words` (uint32 as int64, x's shape) say so, by
    the probability of the lost part. Beyond the largest number it saturates; else it is infinite, or NaN where there
    is no infinity. NonFiniteError for NaN where the format has none; infinities are the largest then.
    """
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32), x.dtype  # fp64 would be rounded twice
    assert (rounding == "stochastic") == (words is not None), rounding
    bits = x.float().view(torch.int32).long()
    size = bits & 0x7FFFFFFF
    isnan = size > _FIELD
    if not element.has_nan and bool(isnan.any()):
        raise NonFiniteError(f"{int(isnan.sum())} of {x.numel()} numbers are NaN, and {element.name} has none.")
    field = size >> 23
    whole = torch.where(field > 0, (size & 0x7FFFFF) | 0x800000, size)  # x = whole 2^unit
    unit = field.clamp_min(1) - 150 - power
    if isinstance(element, Fixed):
        lowest = torch.full_like(unit, -element.fraction)
        first = torch.zeros_like(unit)
    else:
        own = torch.frexp(whole.double())[1].long() - 1 + unit  # exponent of the number
        place = torch.where(whole > 0, own, element.least).clamp_min(element.least) - element.least
        lowest = place + element.least - element.mantissa
        first = place << element.mantissa
    code = _rounded(first, whole, lowest - unit, rounding, words)
    beyond = (code > element.last) | (size == _FIELD)
    over = element.last if saturate or rounding == "zero" else _overflow(element)
    code = torch.where(beyond, over, code)
    if not saturate:
        code = torch.where(size == _FIELD, _overflow(element), code)
    half = 1 << (element.bits - 1)
    if isinstance(element, Fixed):
        code = torch.where(bits < 0, -code, code) & (2 * half - 1)
    else:
        code = torch.where(isnan, _nan(element), code) | torch.where(bits < 0, half, 0)
    return code.to(torch.uint8 if element.bits <= 8 else torch.int32)


def _rounded(first: Tensor, whole: Tensor, shift: Tensor, rounding: Rounding, words: Tensor | None) -> Tensor:
    """first + whole 2^-shift as an integer; what is far too large is large."""
    right = shift.clamp(0, _FAR)
    code = first + torch.where(shift > 0, whole >> right, whole << (-shift).clamp(0, 30))
    if rounding == "zero":
        return code
    lost = whole & ((1 << right) - 1)
    if rounding == "nearest":
        half = (1 << right) >> 1
        up = (lost > half) | ((lost == half) & (code & 1 == 1) & (right > 0))
    else:
        assert words is not None
        up = lost > torch.where(right <= 32, words >> (32 - right).clamp_min(0), words << (right - 32).clamp_min(0))
    return code + up.long()


def _overflow(element: Element) -> int:
    """Code of what is beyond the largest number: infinity, else NaN, else the largest."""
    return element.last + (isinstance(element, Floating) and element.special != "none")


def _nan(element: Floating) -> int:
    return (
        (1 << (element.bits - 1)) - 1 if element.special == "nan" else element.last + 1 + ((1 << element.mantissa) >> 1)
    )


def encode_reference(x: Tensor, element: Element) -> Tensor:
    """`encode` to the nearest, saturating: by the two values around each number, in fp64, of which ties take the even
    code. NaN stays."""
    codes = torch.arange(element.last + 1)
    values = element.values()[: element.last + 1].double()
    size = x.double().abs().nan_to_num(0.0, torch.inf).clamp_max(element.largest)
    above = torch.searchsorted(values, size).clamp_max(element.last)
    below = (above - 1).clamp_min(0)
    to_above, to_below = values[above] - size, size - values[below]
    nearer = (to_above < to_below) | ((to_above == to_below) & (codes[above] % 2 == 0)) | (values[above] == size)
    code = torch.where(nearer, above, below)
    negative, half = torch.signbit(x), 1 << (element.bits - 1)
    if isinstance(element, Fixed):
        return (torch.where(negative, -code, code) & (2 * half - 1)).to(torch.uint8)
    code = torch.where(x.isnan(), _nan(element), code) if element.has_nan else code
    return (code | torch.where(negative, half, 0)).to(torch.uint8 if element.bits <= 8 else torch.int32)
