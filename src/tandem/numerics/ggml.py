"""llama.cpp's block formats: matrices as their codes and scales, and those as the bytes of a GGUF file.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have the scales and codes of llama.cpp's reference, to the bit. Of the K formats and
IQ4_NL each group's scale, and what is added to it, is the least squared error of some that are tried, as llama.cpp
tries them but with all numbers alike; then the integers that the file keeps of them are tried one up and one down.
MXFP4 and NVFP4 are `numerics/blocks.py`'s mxfp4 and nvfp4; a file has NVFP4's scale of the tensor beside the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from tandem.errors import NonFiniteError
from tandem.numerics import blocks as formats
from tandem.numerics import ggml_bytes
from tandem.numerics.blocks import block_scales
from tandem.numerics.elements import E2M1
from tandem.numerics.gptq import Factor, by_columns
from tandem.numerics.snap import codes_of, snap

CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # IQ4_NL's levels
MINUS_ZERO = 8  # of e2m1
LEAST = 1e-15  # a group whose largest number is below is all zeros
CHUNK = 1 << 20  # numbers that are searched at once


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A block format by its name in llama.cpp.

    >>> TYPES["Q4_K"].bits, TYPES["Q6_K"].bits
    (4.5, 6.5625)
    """

    name: str
    block: int  # numbers that lie together in the file
    size_bytes: int  # of a block
    group: int  # numbers that share a scale
    low: int  # codes are levels less this
    high: int
    like: str  # the format of numerics/blocks.py that searches for scales of inputs and rotations round to

    @property
    def bits(self) -> float:
        return 8 * self.size_bytes / self.block


TYPES: dict[str, GgmlType] = {
    one.name: one
    for one in (
        GgmlType("Q4_0", 32, 18, 32, -8, 7, "int4_g32"),
        GgmlType("Q4_1", 32, 20, 32, 0, 15, "int4_g32_asym"),
        GgmlType("Q5_0", 32, 22, 32, -16, 15, "int5_g32"),
        GgmlType("Q5_1", 32, 24, 32, 0, 31, "int5_g32_asym"),
        GgmlType("Q8_0", 32, 34, 32, -127, 127, "int8_g32"),
        GgmlType("Q2_K", 256, 84, 16, 0, 3, "int2_g16_asym"),
        GgmlType("Q3_K", 256, 110, 16, -4, 3, "int3_g16"),
        GgmlType("Q4_K", 256, 144, 32, 0, 15, "int4_g32_asym"),
        GgmlType("Q5_K", 256, 176, 32, 0, 31, "int5_g32_asym"),
        GgmlType("Q6_K", 256, 210, 16, -32, 31, "int6_g16"),
        GgmlType("IQ4_NL", 32, 18, 32, -127, 113, "int4_g32"),
        GgmlType("MXFP4", 32, 17, 32, 0, 15, "mxfp4"),
        GgmlType("NVFP4", 64, 36, 16, 0, 15, "nvfp4"),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A matrix [N, K] in a format: a value is scale x level + low, product and sum rounded to fp32 each."""

    type: GgmlType
    codes_NK: Tensor  # uint8: of levels from the lowest, IQ4_NL's by number, e2m1's bits
    scales_NG: Tensor  # fp32, of each group
    lows_NG: Tensor | None  # fp32
    heads: tuple[Tensor, ...]  # [N, B, bytes] of each block: what the file keeps of the scales
    whole: Tensor | None = None  # NVFP4's scale of the tensor, in scales_NG too

    def values(self) -> Tensor:
        """What is read back, fp32."""
        grouped = self._grouped(_levels(self.codes_NK, self.type)) * self.scales_NG[..., None]
        if self.lows_NG is not None:
            grouped += self.lows_NG[..., None]
        return grouped.flatten(1)

    def rows(self, rows: slice) -> Coded:
        lows_NG = None if self.lows_NG is None else self.lows_NG[rows]
        heads = tuple(one[rows] for one in self.heads)
        return replace(self, codes_NK=self.codes_NK[rows], scales_NG=self.scales_NG[rows], lows_NG=lows_NG, heads=heads)

    def packed(self) -> Tensor:
        """Bytes [N, bytes of a row]."""
        return ggml_bytes.packed(self.type.name, self.codes_NK.unflatten(1, (-1, self.type.block)), self.heads)

    def of(self, x_NK: Tensor) -> Coded:
        """Other numbers, by these scales."""
        lows = 0.0 if self.lows_NG is None else self.lows_NG[..., None]
        level = _near((self._grouped(x_NK) - lows) / _divisor(self.scales_NG)[..., None], self.type)
        return replace(self, codes_NK=_codes(level, self.type).flatten(1))

    def _grouped(self, x_NK: Tensor) -> Tensor:
        return x_NK.unflatten(1, (-1, self.type.group))


def encode(weight_NK: Tensor, kind: GgmlType) -> Coded:
    """A matrix whose width the format's block divides. NonFiniteError for a NaN or an infinity, and for scales that
    fp16 does not have."""
    assert weight_NK.ndim == 2 and weight_NK.shape[1] % kind.block == 0, (weight_NK.shape, kind.name)
    weight_NK = weight_NK.float()
    if not bool(weight_NK.isfinite().all()):
        raise NonFiniteError(
            f"{int((~weight_NK.isfinite()).sum())} of {weight_NK.numel()} numbers are not finite: {kind.name} has none."
        )
    if kind.name in ("MXFP4", "NVFP4"):
        return _of_blocks(weight_NK, kind)
    rows = max(1, CHUNK // weight_NK.shape[1])
    made = [_ENCODERS[kind.name](part, kind) for part in weight_NK.split(rows)]
    if not all(bool(one.scales_NG.isfinite().all()) for one in made):
        raise NonFiniteError(f"scales of {kind.name} are fp16, which ends at 65504: the numbers are too large for it.")
    lows = [one.lows_NG for one in made if one.lows_NG is not None]
    return Coded(
        kind,
        torch.cat([one.codes_NK for one in made]),
        torch.cat([one.scales_NG for one in made]),
        torch.cat(lows) if lows else None,
        tuple(torch.cat(parts) for parts in zip(*(one.heads for one in made), strict=True)),
    )


def gptq(weight_NK: Tensor, found: Factor, kind: GgmlType) -> Coded:
    """By GPTQ, the scales those of `encode`."""
    coded = encode(weight_NK, kind)
    divisors_GN = _divisor(coded.scales_NG).T.contiguous()
    scales_GN = coded.scales_NG.T.contiguous()
    lows_GN = None if coded.lows_NG is None else coded.lows_NG.T.contiguous()

    def near(column: int, row_N: Tensor) -> tuple[Tensor, Tensor]:
        group = column // kind.group
        if lows_GN is None:
            level_N = _near(row_N / divisors_GN[group], kind)
            return level_N, row_N - level_N * scales_GN[group]
        level_N = _near((row_N - lows_GN[group]) / divisors_GN[group], kind)
        return level_N, row_N - (level_N * scales_GN[group] + lows_GN[group])

    return replace(coded, codes_NK=_codes(by_columns(weight_NK, found, near), kind))


def _near(x: Tensor, kind: GgmlType) -> Tensor:
    """The nearest level, fp32."""
    if kind.name in ("MXFP4", "NVFP4"):
        return snap(x, E2M1)
    if kind.name == "IQ4_NL":
        return _curve()[_place(x)]
    return x.round().clamp_(kind.low, kind.high)


def _codes(levels: Tensor, kind: GgmlType) -> Tensor:
    if kind.name in ("MXFP4", "NVFP4"):
        return codes_of(levels + 0.0, E2M1)  # -0 is 0
    if kind.name == "IQ4_NL":
        return _place(levels).to(torch.uint8)
    return (levels - kind.low).to(torch.uint8)


def _levels(codes: Tensor, kind: GgmlType) -> Tensor:
    if kind.name in ("MXFP4", "NVFP4"):
        return E2M1.values()[codes.long()]
    if kind.name == "IQ4_NL":
        return _curve()[codes.long()]
    return codes.float() + kind.low


def _curve() -> Tensor:
    return torch.tensor(CURVE, dtype=torch.float32)


def _place(x: Tensor) -> Tensor:
    """Of the nearest of CURVE, the upper one of two."""
    curve = _curve()
    return torch.bucketize(x, (curve[1:] + curve[:-1]) / 2, right=True)


def _divisor(scales: Tensor) -> Tensor:
    return scales.where(scales != 0, torch.inf)


def _half(x: Tensor) -> Tensor:
    """[.., ] -> bytes [.., 2] of fp16."""
    return x.to(torch.float16)[..., None].view(torch.uint8)


def _of_blocks(weight_NK: Tensor, kind: GgmlType) -> Coded:
    form = formats.FORMATS[kind.like]
    made = formats.quantise(weight_NK, form)
    heads = made.scales.unflatten(1, (-1, kind.block // kind.group))
    codes = torch.where(made.codes == MINUS_ZERO, 0, made.codes)  # as llama.cpp, whose -0 is 0 too
    return Coded(kind, codes, block_scales(made, form), None, (heads,), made.whole)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1.0 / x)


def _plain(weight_NK: Tensor, kind: GgmlType) -> Coded:
    """ggml-quants.c's quantize_row_q4_0_ref and its kin: codes by the scale before it is fp16."""
    x = weight_NK.unflatten(1, (-1, 32))
    if kind.low == 0:
        low = x.amin(-1)
        scale = (x.amax(-1) - low) / kind.high
        codes = ((x - low[..., None]) * _inverse(scale)[..., None] + 0.5).trunc_().clamp_(0, kind.high)
        return _with_halves(kind, codes, scale, low)
    if kind.name == "Q8_0":
        scale = x.abs().amax(-1) / kind.high
        scaled = x * _inverse(scale)[..., None]
        size = scaled.abs()
        whole = size.floor()  # half away from zero
        codes = torch.copysign(whole + (2 * (size - whole)).floor(), scaled) + kind.high
        return _with_halves(kind, codes, scale)
    scale = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0] / kind.low
    codes = (x * _inverse(scale)[..., None] + (0.5 - kind.low)).trunc_().clamp_(0, kind.high - kind.low)
    return _with_halves(kind, codes, scale)


def _with_halves(kind: GgmlType, codes: Tensor, scale: Tensor, low: Tensor | None = None) -> Coded:
    halves = [scale, *([] if low is None else [low])]
    kept = [one.to(torch.float16).float() for one in halves]
    heads = tuple(_half(one) for one in halves)
    return Coded(kind, codes.to(torch.uint8).flatten(1), kept[0], kept[1] if low is not None else None, heads)


def _curved(weight_NK: Tensor, kind: GgmlType) -> Coded:
    x = weight_NK.unflatten(1, (-1, 32))
    scale = _scaled(x, kind, [float(CURVE[0] + step) for step in range(-7, 8)])
    coded = _with_halves(kind, torch.zeros_like(x), scale)
    return coded.of(weight_NK)


def _scaled(x: Tensor, kind: GgmlType, ends: list[float]) -> Tensor:
    """The scale [..] of groups [.., n] with the least squared error: of the levels that a group has when its largest
    becomes one of `ends`, by least squares."""
    top = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    inverse = torch.where(top.abs() < LEAST, 0.0, 1.0 / top)
    best, scale = torch.zeros_like(x[..., 0]), torch.zeros_like(x[..., 0])
    for end in ends:
        level = _near(x * (inverse * end), kind)
        along, size = (x * level).sum(-1), level.square().sum(-1)
        one = along * along * _inverse(size)
        better = one > best
        best = torch.where(better, one, best)
        scale = torch.where(better, along * _inverse(size), scale)
    return scale


def _symmetric(weight_NK: Tensor, kind: GgmlType, least: int) -> Coded:
    """Q3_K and Q6_K: a group's scale is an integer from `least` to -least - 1, times one of the super-block."""
    x = weight_NK.unflatten(1, (-1, 256 // kind.group, kind.group))  # [N, B, g, n]
    scale = _scaled(x, kind, [kind.low - step / 10 for step in range(-9, 10)])
    whole = scale.gather(-1, scale.abs().argmax(-1, keepdim=True)) / least
    kept = whole.to(torch.float16).float()
    start = (scale / _divisor(kept)).round_().clamp_(least, -least - 1)
    best, integers = None, start
    for step in (0, -1, 1):
        tried = (start + step).clamp(least, -least - 1)
        own = (kept * tried)[..., None]
        error = (_near(x / _divisor(own), kind) * own - x).square().sum(-1)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.where(better, error, best)
        integers = torch.where(better, tried, integers)
    heads = (integers.to(torch.int8).view(torch.uint8), _half(whole[..., 0]))
    made = Coded(kind, torch.empty(0), (kept * integers).flatten(1), None, heads)
    return made.of(weight_NK)


def _affine(weight_NK: Tensor, kind: GgmlType, most: int) -> Coded:
    """Q2_K, Q4_K and Q5_K: a group's scale and what is taken off are integers from 0 to `most`, each times one of the
    super-block."""
    x = weight_NK.unflatten(1, (-1, 256 // kind.group, kind.group))
    scale, low = _lined(x, kind)
    wholes = [one.amax(-1, keepdim=True) / most for one in (scale, low)]
    kept = [one.to(torch.float16).float() for one in wholes]
    start = [(one / _divisor(unit)).round_().clamp_(0, most) for one, unit in zip((scale, low), kept, strict=True)]
    best, found = None, start
    for step, other in ((a, b) for a in (0, -1, 1) for b in (0, -1, 1)):
        tried = [(one + by).clamp(0, most) for one, by in zip(start, (step, other), strict=True)]
        own, off = ((unit * one)[..., None] for unit, one in zip(kept, tried, strict=True))
        error = (_near((x + off) / _divisor(own), kind) * own - off - x).square().sum(-1)
        better = torch.ones_like(error, dtype=torch.bool) if best is None else error < best
        best = error if best is None else torch.where(better, error, best)
        found = [torch.where(better, new, old) for new, old in zip(tried, found, strict=True)]
    heads = (*(one.to(torch.uint8) for one in found), *(_half(one[..., 0]) for one in wholes))
    scales, lows = ((unit * one).flatten(1) for unit, one in zip(kept, found, strict=True))
    return Coded(kind, torch.empty(0), scales, -lows, heads).of(weight_NK)


def _lined(x: Tensor, kind: GgmlType) -> tuple[Tensor, Tensor]:
    """Scale, and what is taken off (0 or more), of groups [.., n]: the line through (level, number) with the least
    squared error, of the levels that a group has at some scales."""
    count, last = x.shape[-1], kind.high
    bottom = x.amin(-1, keepdim=True).clamp_max(0.0)
    span = x.amax(-1, keepdim=True) - bottom
    inverse = torch.where(span < LEAST, 0.0, 1.0 / span)
    scale, low = (span / last)[..., 0], -bottom[..., 0]
    best = (_near((x - bottom) * (inverse * last), kind) * (span / last) + bottom - x).square().sum(-1)
    sum_x = x.sum(-1)
    steps = [step / 10 for step in (range(-5, 11) if last == 3 else range(-10, 11))]
    for step in steps:
        level = _near((x - bottom) * (inverse * (last + step)), kind)
        sum_l, sum_ll, sum_xl = level.sum(-1), level.square().sum(-1), (x * level).sum(-1)
        over = _inverse(count * sum_ll - sum_l * sum_l)
        slope, start = (count * sum_xl - sum_x * sum_l) * over, (sum_ll * sum_x - sum_l * sum_xl) * over
        above = start > 0
        slope, start = torch.where(above, sum_xl * _inverse(sum_ll), slope), torch.where(above, 0.0, start)
        error = (level * slope[..., None] + start[..., None] - x).square().sum(-1)
        better = (error < best) & (over > 0)
        best = torch.where(better, error, best)
        scale, low = torch.where(better, slope, scale), torch.where(better, -start, low)
    return scale.clamp_min(0.0), low


_ENCODERS: dict[str, Callable[[Tensor, GgmlType], Coded]] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), _plain),
    "IQ4_NL": _curved,
    "Q3_K": partial(_symmetric, least=-32),
    "Q6_K": partial(_symmetric, least=-128),
    "Q2_K": partial(_affine, most=15),
    "Q4_K": partial(_affine, most=63),
    "Q5_K": partial(_affine, most=63),
}
