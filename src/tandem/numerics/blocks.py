"""Numbers of few bits that share scales: MX, NVFP4, and codes with fp32 scales, bit for bit.

A tensor is quantised along its last axis (`tile` formats: along both). Every step is fp32 in the order written here, or
integers: another order moves ties. Sources of the rules:

    mx       OCP Microscaling Formats v1.0, section 6.3 (floor); the others are named as torchao names them
    nvfp4    the chain of NVIDIA's Transformer Engine, which trains
    nvfp4_inference   torchao's `nvfp4_quantize` with a scale of the tensor, which serves
    nvfp4_four_six    Cook et al., 2512.02010: blocks whose largest becomes 4 or 6, whichever errs less
    nvfp4_divided     compressed-tensors' quantiser, whose scale of the tensor divides

`quantise` gives codes and scales, `dequantise` what they stand for; both on any device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tandem.errors import ConfigError, NonFiniteError, nearest
from tandem.numerics.elements import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0_BIAS,
    E8M0_NAN,
    INT8,
    Element,
    Fixed,
    Rounding,
    decode,
    floating,
    words_of,
)
from tandem.numerics.snap import encode

Rule = Literal["floor", "rceil", "ceil", "even"]  # of a power of two
Scales = Literal["e8m0", "e4m3", "fp32", "fp16", "bf16"]
Chain = Literal["training", "inference", "four_six", "divided"]
RULES: tuple[Rule, ...] = ("floor", "rceil", "ceil", "even")
SCALE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLT_MAX = torch.finfo(torch.float32).max
E4M3_EIGHTH = 0x20  # 0.125, which `nvfp4_divided` writes in place of 0
E4M3_EPS = 2.0**-6  # the least scale that `nvfp4_inference` writes: e4m3's smallest normal number
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)  # of NVFP4's random Hadamard transform
WHOLE_ROW, WHOLE = -1, 0  # blocks that are a row, and the tensor


@dataclass(frozen=True, slots=True)
class Format:
    """Elements and how they are scaled.

    >>> FORMATS["mxfp4"].bits, FORMATS["nvfp4"].bits, FORMATS["mxfp8_e4m3"].element.largest
    (4.25, 4.5, 448.0)
    """

    name: str
    element: Element
    block: int = 32  # elements of a row that share a scale; WHOLE_ROW, WHOLE
    scale: Scales = "e8m0"
    rule: Rule = "floor"  # of e8m0
    chain: Chain = "training"  # of e4m3
    rows: int = 1  # of a block: a tile where there are more
    zero_point: bool = False  # of fixed-point elements: a block's least and largest are the ends of the range
    each_row: bool = False  # what it has of a whole tensor is of each row, so that no row hangs on another

    @property
    def bits(self) -> float:
        """An element's, its share of a block's scale among them; scales of whole rows and tensors are not counted."""
        if self.block <= 0:
            return float(self.element.bits)
        own = {"e8m0": 8, "e4m3": 8, "fp32": 32}.get(self.scale, 16) + (self.element.bits if self.zero_point else 0)
        return self.element.bits + own / (self.block * self.rows)

    @property
    def shown(self) -> Element:
        """What its codes stand for in steps of a scale. With a zero point they begin at 0, and it is taken off them.

        >>> FORMATS["int4_g32"].shown.last, FORMATS["int4_g32_asym"].shown.last
        (7, 15)
        """
        own = self.element
        return Fixed(f"u{own.name}", own.bits + 1, 0) if self.zero_point else own

    def by_row(self) -> Format:
        """The same of each row for itself. ConfigError where a block is a tile of several."""
        if self.rows > 1:
            raise ConfigError(f"{self.name} rounds tiles of {self.rows} rows; rows that ride along would change a row.")
        return replace(self, block=WHOLE_ROW if self.block == WHOLE else self.block, each_row=True)


class Blocks(NamedTuple):
    """A quantised tensor."""

    codes: Tensor  # as the tensor: uint8 (int32 for elements of more than 8 bits)
    scales: Tensor  # one a block: uint8 codes of e8m0 and e4m3, or of the format's dtype
    whole: Tensor | None = None  # of the tensor or of each row, fp32, that block scales are multiplied by, or divided
    zeros: Tensor | None = None  # zero points, uint8, one a block


class Fp4(NamedTuple):
    """A matrix [N, K] of e2m1 with scales of e8m0 or e4m3 in bytes, as files have it. `whole` is of all or [N, 1].

    >>> Fp4(quantise(torch.ones(2, 32), FORMATS["mxfp4"]), FORMATS["mxfp4"]).values().sum().item()
    64.0
    """

    blocks: Blocks
    form: Format

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return dequantise(self.blocks, self.form, dtype)


def _mx(name: str, element: Element) -> dict[str, Format]:
    return {
        f"{name}{'' if rule == 'floor' else f'_{rule}'}": Format(
            f"{name}{'' if rule == 'floor' else f'_{rule}'}", element, rule=rule
        )
        for rule in RULES
    }


def _integers(bits: int, group: int) -> dict[str, Format]:
    own = Fixed(f"int{bits}", bits, 0)
    name = f"int{bits}_{'row' if group == WHOLE_ROW else f'g{group}'}"
    return {
        name + suffix: Format(name + suffix, own, group, "fp32", zero_point=bool(suffix)) for suffix in ("", "_asym")
    }


FORMATS: dict[str, Format] = {
    **_mx("mxfp8_e4m3", E4M3),
    **_mx("mxfp8_e5m2", E5M2),
    **_mx("mxfp6_e2m3", E2M3),
    **_mx("mxfp6_e3m2", E3M2),
    **_mx("mxfp4", E2M1),
    **_mx("mxint8", INT8),
    "nvfp4": Format("nvfp4", E2M1, 16, "e4m3"),
    "nvfp4_inference": Format("nvfp4_inference", E2M1, 16, "e4m3", chain="inference"),
    "nvfp4_four_six": Format("nvfp4_four_six", E2M1, 16, "e4m3", chain="four_six"),
    "nvfp4_divided": Format("nvfp4_divided", E2M1, 16, "e4m3", chain="divided"),
    "fp8_tensor": Format("fp8_tensor", E4M3, WHOLE, "fp32"),
    "fp8_row": Format("fp8_row", E4M3, WHOLE_ROW, "fp32"),
    "fp8_1x128": Format("fp8_1x128", E4M3, 128, "fp32"),
    "fp8_128x128": Format("fp8_128x128", E4M3, 128, "fp32", rows=128),
    **_integers(8, 128),
    **_integers(4, 128),
    **_integers(4, 32),
}


def format_of(name: str) -> Format:
    """One of FORMATS, int<bits>_g<group> or int<bits>_row with or without _asym, or one of your own:
    <element>/<block>:<scale>[:<rule>], as e3m4/32:e8m0:even. Blocks are of so many inputs, tiles (16x64), a row or the
    tensor; scales e8m0, fp32, fp16, bf16, and of e2m1 e4m3, by the training chain. ConfigError for others.

    >>> format_of("e3m3/16:fp32").bits, format_of("e2m1/32:e8m0:even") == replace(FORMATS["mxfp4_even"], name="x")
    (9.0, False)
    >>> format_of("e4m3/64x32:bf16").rows, format_of("int8/row:e8m0").block == WHOLE_ROW
    (64, True)
    """
    if name in FORMATS:
        return FORMATS[name]
    integers = re.fullmatch(r"int([2-8])_(?:g([1-9]\d{0,5})|row)(_asym)?", name)
    if integers:
        group = int(integers[2]) if integers[2] else WHOLE_ROW
        return _integers(int(integers[1]), group)[name]
    element, _, rest = name.partition("/")
    block, _, scaled = rest.partition(":")
    scale, _, rule = scaled.partition(":")
    sizes = re.fullmatch(r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})|row|tensor", block)
    known = scale in ("e8m0", "e4m3", *SCALE_DTYPES) and (not rule or scale == "e8m0" and rule in RULES)
    if not (sizes and known) or scale == "e4m3" and element != E2M1.name:
        raise ConfigError(
            f"{name!r} is no format.{nearest(name, FORMATS)} One of your own is int<2 to 8>_g<group> or "
            "int<2 to 8>_row, with _asym for a zero point, or <element>/<block>:<scale>, as e3m4/32:e8m0:even: a block "
            "is a number of inputs, <rows>x<inputs>, row or tensor; a scale is e8m0[:floor|rceil|ceil|even], fp32, "
            "fp16, bf16, or of e2m1 e4m3."
        )
    rows, inputs = int(sizes[1] or 1), int(sizes[2] or {"row": WHOLE_ROW, "tensor": WHOLE}[block])
    made = Format(name, floating(element), inputs, scale, rows=rows)  # type: ignore[arg-type]
    return replace(made, rule=rule) if rule in RULES else made  # type: ignore[arg-type]


def quantise(
    x: Tensor,
    form: Format,
    rounding: Rounding = "nearest",
    *,
    draw: torch.Generator | None = None,
    words: Tensor | None = None,
) -> Blocks:
    """Round a tensor (bf16, fp16 or fp32, at least one axis). The last block of a row may hold fewer elements.

    A block of an e8m0 format with a NaN or an infinity has scale NaN and codes 0: all of it reads back as NaN. With
    other scales that is a NonFiniteError. stochastic: by `words` (uint32 as int64, one for each of x), else by words
    drawn from `draw`.
    """
    assert x.dtype in (torch.bfloat16, torch.float16, torch.float32) and x.ndim, (x.dtype, x.shape)
    if not x.numel():
        return _empty(x, form)
    wide = x.float()
    if form.scale != "e8m0" and not bool(wide.isfinite().all()):
        raise NonFiniteError(
            f"{int((~wide.isfinite()).sum())} of {x.numel()} numbers are not finite: {form.name} has none."
        )
    blocked, shape = _split(wide, form)
    if rounding == "stochastic":
        words = words_of(blocked, draw) if words is None else _split(words, form)[0]
    whole = zeros = None
    if form.scale == "e8m0":
        codes, scales = _mx_codes(blocked, form, rounding, words)
    elif form.scale == "e4m3":
        codes, scales, whole = _nv_codes(blocked, form, rounding, words)
    else:
        codes, scales, zeros = _scaled_codes(blocked, form, rounding, words)
    return Blocks(_joined(codes, form, shape), scales, whole, zeros)


def dequantise(blocks: Blocks, form: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """What they stand for, rounded once from fp32 to `dtype`."""
    if not blocks.codes.numel():
        return blocks.codes.to(dtype)
    blocked, shape = _split(blocks.codes, form)
    if blocks.zeros is not None:
        values = (blocked.float() - blocks.zeros[..., None].float()) * blocks.scales[..., None].float()
    else:
        values = decode(blocked, form.element) * block_scales(blocks, form)[..., None]
    return _joined(values, form, shape).to(dtype)


def block_scales(blocks: Blocks, form: Format) -> Tensor:
    """What each block's elements are multiplied by, fp32."""
    if form.scale == "e8m0":
        return from_e8m0(blocks.scales)
    if form.scale != "e4m3":
        return blocks.scales.float()
    assert blocks.whole is not None
    scales = decode(blocks.scales, E4M3)
    return scales / blocks.whole if form.chain == "divided" else scales * blocks.whole


def rounded(x: Tensor, form: Format, rounding: Rounding = "nearest", *, draw: torch.Generator | None = None) -> Tensor:
    """x as it reads back, in its dtype: fake quantisation."""
    return dequantise(quantise(x, form, rounding, draw=draw), form, x.dtype)


def from_e8m0(codes: Tensor) -> Tensor:
    """Powers of two, fp32: 2^(code - 127), by their bits, so that 2^-127, a denormal, is never flushed; 255 is NaN."""
    bits = torch.where(codes == 0, 1 << 22, codes.int() << 23)
    return torch.where(codes == E8M0_NAN, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def exponent_of(amax: Tensor, element: Element, rule: Rule) -> Tensor:
    """e8m0's exponent of blocks by their largest size (fp32, finite), within [-127, 127]; of zeros -127.

    floor: floor(log2 amax) - emax. ceil: ceil(log2 amax) - emax. rceil: ceil(log2(amax / largest)), the quotient in
    fp32. even: amax's mantissa rounded to the element's, halves up, then floor.
    """
    if rule == "rceil":
        amax = amax / amax.new_full((), element.largest)  # a tensor: CUDA multiplies by the reciprocal of a number
    bits = amax.view(torch.int32)
    if rule == "even":
        bits = bits + (1 << (22 - element.mantissa))
    exponent = (bits >> 23) - 127
    if rule in ("ceil", "rceil"):
        exponent = exponent + (((bits & 0x7FFFFF) > 0) & (bits > 0x400000)).int()  # that is 2^-127
    if rule != "rceil":
        exponent = exponent - element.most
    return exponent.clamp(-E8M0_BIAS, E8M0_BIAS)


def _mx_codes(x: Tensor, form: Format, rounding: Rounding, words: Tensor | None) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(-1)
    finite = amax.isfinite()
    exponent = exponent_of(amax.where(finite, 0.0), form.element, form.rule)
    scales = torch.where(finite, exponent + E8M0_BIAS, E8M0_NAN).to(torch.uint8)
    inside = x.where(finite[..., None], 0.0)
    return encode(inside, form.element, rounding, power=exponent[..., None].long(), words=words), scales


def _nv_codes(x: Tensor, form: Format, rounding: Rounding, words: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    amax = x.abs().amax(-1)
    top = amax.amax(-1, keepdim=True) if form.each_row else amax.amax()
    if form.chain == "inference":
        return _nv_inference(x, amax, top, rounding, words)
    if form.chain == "divided":
        return _nv_divided(x, amax, top, rounding, words)
    most = 256.0 if form.chain == "four_six" else E4M3.largest  # so that 1.5 times a scale is one, too
    enc = (top.new_full((), most * E2M1.largest) / top).clamp_max(FLT_MAX)
    enc = torch.where((top == 0) | (enc == 0), 1.0, enc)
    whole = 1.0 / enc
    sixth = enc * torch.tensor(1.0 / 6.0, dtype=torch.float32)

    def with_largest(share: float) -> tuple[Tensor, Tensor]:
        scales = encode((amax * sixth * share).clamp_max(E4M3.largest), E4M3)
        factor = (1.0 / (decode(scales, E4M3) * whole)).clamp_max(FLT_MAX)
        return encode((x * factor[..., None]).clamp(-6.0, 6.0), E2M1, rounding, words=words), scales

    codes, scales = with_largest(1.0)
    if form.chain == "four_six":
        others = with_largest(1.5)
        error, other = (
            (decode(one, E2M1) * (decode(its, E4M3) * whole)[..., None] - x).square().sum(-1)
            for one, its in ((codes, scales), others)
        )
        better = other < error
        codes, scales = torch.where(better[..., None], others[0], codes), torch.where(better, others[1], scales)
    return codes, scales, whole


def _nv_inference(
    x: Tensor, amax: Tensor, top: Tensor, rounding: Rounding, words: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    whole = top / top.new_full((), E4M3.largest * E2M1.largest)
    whole = torch.where(whole == 0, 1.0, whole)
    scales = encode((amax / amax.new_full((), 6.0) / whole).clamp(E4M3_EPS, E4M3.largest), E4M3)
    factor = ((1.0 / whole) / decode(scales, E4M3)).clamp_max(FLT_MAX)  # of a tensor of denormals, say
    return encode((x * factor[..., None]).clamp(-6.0, 6.0), E2M1, rounding, words=words), scales, whole


def _nv_divided(
    x: Tensor, amax: Tensor, top: Tensor, rounding: Rounding, words: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    whole = top.new_full((), E4M3.largest * E2M1.largest) / top
    whole = torch.where(whole.isfinite(), whole, 1.0)
    scales = encode((whole * (amax / amax.new_full((), E2M1.largest))).clamp_max(E4M3.largest), E4M3)
    scales = torch.where(scales == 0, E4M3_EIGHTH, scales).to(torch.uint8)
    factor = decode(scales, E4M3) / whole
    return encode((x / factor[..., None]).clamp(-6.0, 6.0), E2M1, rounding, words=words), scales, whole


def _scaled_codes(
    x: Tensor, form: Format, rounding: Rounding, words: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    element = form.element
    if form.zero_point:
        assert isinstance(element, Fixed) and rounding == "nearest", (form, rounding)
        last = (1 << element.bits) - 1
        low, high = x.amin(-1).clamp_max(0.0), x.amax(-1).clamp_min(0.0)  # zero is a code
        span, steps = high - low, low.new_full((), last)
        scales = _in_dtype(torch.where(span.isinf(), high / steps - low / steps, span / steps), form)
        divisor = scales.where(scales > 0, torch.inf).float()
        zeros = (-low / divisor).round_().clamp_(0, last)
        codes = ((x / divisor[..., None]).round_() + zeros[..., None]).clamp_(0, last)
        return codes.to(torch.uint8), scales, zeros.to(torch.uint8)
    amax = x.abs().amax(-1)
    scales = _in_dtype(amax / amax.new_full((), element.largest), form)
    divisor = scales.where(scales > 0, torch.inf).float()
    return encode(x / divisor[..., None], element, rounding, words=words), scales, None


def _empty(x: Tensor, form: Format) -> Blocks:
    """Of no numbers, with the scales of no blocks."""
    codes = x.new_empty(x.shape, dtype=torch.uint8 if form.element.bits <= 8 else torch.int32)
    columns = x.shape[-1]
    across = -(-columns // form.block) if form.block > 0 else min(1, columns)
    down = -(-math.prod(x.shape[:-1]) // form.rows)
    shape = (0,) if form.block == WHOLE else (down, across) if form.rows > 1 else (*x.shape[:-1], across)
    scales = x.new_empty(shape, dtype=SCALE_DTYPES.get(form.scale, torch.uint8))
    zeros = scales.to(torch.uint8) if form.zero_point else None
    if form.scale != "e4m3":
        return Blocks(codes, scales, None, zeros)
    return Blocks(codes, scales, torch.ones((len(x), 1) if form.each_row else (), device=x.device))


def _in_dtype(scales: Tensor, form: Format) -> Tensor:
    """Scales as they are kept, before a code is chosen by them."""
    kept = scales.to(SCALE_DTYPES[form.scale])
    if form.scale != "fp32" and not bool(kept.isfinite().all()):
        raise NonFiniteError(
            f"{form.name} has scales up to {float(scales.max()):g}, which {form.scale} does not have. Choose a format "
            "whose scales are bf16 or fp32."
        )
    return kept


def _split(x: Tensor, form: Format) -> tuple[Tensor, torch.Size]:
    """[..., blocks, elements of a block], zeros behind the last; and the shape."""
    shape, columns = x.shape, x.shape[-1]
    if form.block == WHOLE:
        return x.reshape(1, -1), shape
    block = max(1, columns) if form.block == WHOLE_ROW else form.block
    padded = functional.pad(x, (0, -columns % block))
    if form.rows == 1:
        return padded.unflatten(-1, (-1, block)), shape
    rows = padded.reshape(-1, padded.shape[-1])
    rows = functional.pad(rows, (0, 0, 0, -len(rows) % form.rows))
    tiles = rows.view(len(rows) // form.rows, form.rows, -1, block).transpose(1, 2)
    return tiles.reshape(tiles.shape[0], tiles.shape[1], -1), shape


def _joined(blocked: Tensor, form: Format, shape: torch.Size) -> Tensor:
    """`_split` back."""
    columns = shape[-1]
    if form.block == WHOLE:
        return blocked.reshape(shape)
    if form.rows == 1:
        return blocked.flatten(-2)[..., :columns].reshape(shape).contiguous()
    down, across, _ = blocked.shape
    block = form.block
    rows = blocked.view(down, across, form.rows, block).transpose(1, 2).reshape(down * form.rows, across * block)
    return rows[: math.prod(shape[:-1]), :columns].reshape(shape).contiguous()


def hadamard(x: Tensor, signs: tuple[int, ...] = SIGNS) -> Tensor:
    """NVFP4's step before rounding of what a weight's gradient is made of: each 16 inputs times signs, times a
    16 x 16 Hadamard matrix / 4, in fp32, rounded to bf16. The last axis is a multiple of 16."""
    size = len(signs)
    if x.shape[-1] % size:
        raise ConfigError(f"a Hadamard transform of {size} inputs does not divide a width of {x.shape[-1]}.")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    turned = torch.tensor(signs, dtype=torch.float32)[:, None] * matrix / size**0.5
    return (x.float().unflatten(-1, (-1, size)) @ turned.to(x.device)).flatten(-2).to(torch.bfloat16)


def sqnr_db(x: Tensor, back: Tensor) -> float:
    """Signal to quantisation noise, 10 log10(sum x^2 / sum (x - back)^2), in fp64; infinite where nothing is lost."""
    signal, noise = x.double().square().sum(), (x.double() - back.double()).square().sum()
    return float(10 * torch.log10(signal / noise)) if float(noise) else math.inf


def shared(form: Format) -> int | str:
    """What has a scale: so many numbers of a row, or a tile, a row, the tensor.

    >>> shared(FORMATS["mxfp4"]), shared(FORMATS["fp8_row"]), shared(FORMATS["fp8_128x128"])
    (32, 'row', '128 x 128')
    """
    if form.block <= 0:
        return "tensor" if form.block == WHOLE else "row"
    return f"{form.rows} x {form.block}" if form.rows > 1 else form.block


def properties(form: Format) -> Mapping[str, object]:
    """For tables: bits, scale, largest and smallest element, and decibels on normal numbers."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    return {
        "format": form.name,
        "element": form.shown.name,
        "bits": form.bits,
        "block": shared(form),
        "scale": form.scale,
        "largest": form.shown.largest,
        "smallest": form.shown.smallest,
        "sqnr_db": round(sqnr_db(x, rounded(x, form)), 2),
    }
