"""y = x W^T (+ bias) (+ residual) over a matrix kept as codes of 4 or 8 bits, opened in the tile: a way to store it.

A product has the bits of `linear.product` with the values that the codes stand for, in bf16. Elements are integers of 4
and 8 bits and e2m1, scales fp32, fp16, e8m0 (MXFP4), and e4m3 times or over a scale of the row (NVFP4). Whether a tile
has linear's bits is tried on the device (`agreed`); no number is made of a denormal that a device flushes, and no
product is contracted with a sum.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels import codes as packed
from tandem.kernels.gpu import linear
from tandem.kernels.gpu.linear import SUPER, store_tile, tile_at, trial
from tandem.kernels.gpu.tiles import Tile, choose, multiprocessors
from tandem.numerics import blocks as formats
from tandem.numerics.blocks import Blocks, Format, Fp4
from tandem.numerics.elements import E2M1
from tandem.numerics.packing import pack_nibbles, unpack_nibbles
from tandem.numerics.quantise import Quantised, dequantise, quantise

INT8, INT4, UINT4, FP4 = (tl.constexpr(number) for number in range(4))  # elements
PLAIN, E8M0, TIMES, OVER = (tl.constexpr(number) for number in range(4))  # scales; the last two e4m3


@triton.jit
def e4m3_value(byte):  # type: ignore[no-untyped-def]
    """fp32 of e4m3's code in an int32."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = ((exponent + 120) << 23 | mantissa << 20).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    size = tl.where((byte & 127) == 127, float("nan"), size)
    return tl.where(byte > 127, -size, size)


@triton.jit
def load_scales(scales, whole, at, known, n, columns: tl.constexpr, scaled: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of [block_n, groups], fp32."""
    if scaled == PLAIN:
        return tl.load(scales + at, known, 0.0).to(tl.float32)
    byte = tl.load(scales + at, known, 0).to(tl.int32)
    if scaled == E8M0:
        bits = tl.where(byte == 0, 1 << 22, byte << 23)  # 2^-127 is a denormal
        return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    own = tl.broadcast_to(tl.load(whole + n, n < columns, 1.0)[:, None], byte.shape)
    return e4m3_value(byte) * own if scaled == TIMES else tl.div_rn(e4m3_value(byte), own)


@triton.jit
def open_tile(  # type: ignore[no-untyped-def]
    codes,
    scales,
    minima,
    whole,
    n,
    first,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    element: tl.constexpr,
    scaled: tl.constexpr,
    has_minima: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    unit: tl.constexpr,  # inputs of one scale, that divide the block
):
    """Rows n of the matrix, inputs [first, first + block_k), fp32; 0 outside."""
    column = n.to(tl.int64)[:, None]
    inside = (n < columns)[:, None]
    if element == INT8:
        k = first + tl.arange(0, block_k)[None, :]
        code = tl.load(codes + column * depth + k, inside & (k < depth), 0).to(tl.float32)
    else:
        half = first // 2 + tl.arange(0, block_k // 2)[None, :]
        byte = tl.load(codes + column * (depth // 2) + half, inside & (half < depth // 2), 0).to(tl.int32)
        nibble = tl.interleave(byte & 15, byte >> 4)
        if element == FP4:
            size = nibble & 7
            twice = tl.where(size < 2, size, (size & 1 | 2) << (tl.maximum(size >> 1, 1) - 1))
            code = tl.where(nibble > 7, -twice, twice).to(tl.float32) * 0.5
        elif element == INT4:
            code = ((nibble ^ 8) - 8).to(tl.float32)
        else:
            code = nibble.to(tl.float32)
    parts: tl.constexpr = block_k // unit
    groups: tl.constexpr = (depth + group - 1) // group
    g = (first // unit + tl.arange(0, parts)) * unit // group
    at, known = column * groups + g[None, :], inside & (g < groups)[None, :]
    scale = load_scales(scales, whole, at, known, n, columns, scaled)
    value = tl.reshape(code, (block_n, parts, unit)) * scale[:, :, None]
    if has_minima:
        value += tl.load(minima + at, known, 0.0).to(tl.float32)[:, :, None]
    value = tl.reshape(value, (block_n, block_k))
    if depth % block_k != 0:  # a last group may have a minimum, or a NaN, beyond its inputs
        value = tl.where((first + tl.arange(0, block_k) < depth)[None, :], value, 0.0)
    return value


@triton.jit(do_not_specialize=["rows"])
def codes_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    minima,
    whole,
    bias,
    residual,
    out,
    rows,
    columns: tl.constexpr,
    depth: tl.constexpr,
    group: tl.constexpr,
    element: tl.constexpr,
    scaled: tl.constexpr,
    has_minima: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    unit: tl.constexpr,
    super_t: tl.constexpr,
):
    t, n = tile_at(rows, columns, block_t, block_n, super_t)
    row = t.to(tl.int64)[:, None]
    accumulator = tl.zeros((block_t, block_n), dtype=tl.float32)
    for first in range(0, depth, block_k):
        k = first + tl.arange(0, block_k)
        x_mask = (t < rows)[:, None]
        if depth % block_k != 0:
            x_mask = x_mask & (k < depth)[None, :]
        x_tile = tl.load(x + row * depth + k[None, :], x_mask, 0.0)
        w_tile = open_tile(
            codes,
            scales,
            minima,
            whole,
            n,
            first,
            columns,
            depth,
            group,
            element,
            scaled,
            has_minima,
            block_n,
            block_k,
            unit,
        )
        w_tile = tl.trans(w_tile.to(x.dtype.element_ty))
        accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision="ieee")
    store_tile(accumulator, bias, residual, out, t, n, rows, columns, has_bias, has_residual)


class _Parts(NamedTuple):
    """A matrix as it lies on the device."""

    codes: Tensor  # row by row, two codes of 4 bits a byte, the first in the low half
    scales: Tensor
    minima: Tensor | None
    whole_N: Tensor | None  # that scales of e4m3 are multiplied by, or divided
    kind: tuple[Format | None, int, int, int, int]  # bits, group, element, scale

    @property
    def tensors(self) -> list[Tensor]:
        return [one for one in self[:4] if isinstance(one, Tensor)]


def _parts(matrix: Quantised | Fp4) -> _Parts:
    if isinstance(matrix, Fp4):
        form, (codes_NK, scales_NG, whole, _) = matrix.form, matrix.blocks
        whole_N = None if whole is None else whole.float().reshape(-1).expand(len(codes_NK)).contiguous()
        scale = E8M0 if form.scale == "e8m0" else OVER if form.chain == "divided" else TIMES
        kind = (form, 4, form.block, FP4, scale)
        return _Parts(pack_nibbles(codes_NK), scales_NG.contiguous(), None, whole_N, kind)
    codes_NK, minima_NG, bits = matrix.codes_NK, matrix.minima_NG, matrix.bits
    codes_NK = pack_nibbles(codes_NK & 15) if bits == 4 else codes_NK.contiguous()
    element = INT8 if bits == 8 else INT4 if minima_NG is None else UINT4
    minima_NG = None if minima_NG is None else minima_NG.contiguous()
    return _Parts(codes_NK, matrix.scales_NG.contiguous(), minima_NG, None, (None, bits, matrix.group, element, PLAIN))


class DeviceCodes(packed.Codes):
    """A matrix [N, K] as its codes. Changed in place."""

    __slots__ = ("_parts",)

    def __init__(self, matrix: Quantised | Fp4) -> None:
        assert _known(matrix), matrix
        self._parts = _parts(matrix)
        self.packed, self.bits = self._parts.codes, self._parts.kind[1]
        self.shape = matrix.blocks.codes.shape if isinstance(matrix, Fp4) else matrix.codes_NK.shape

    def take(self, matrix: Quantised | Fp4) -> bool:
        """Hold another matrix where this one lies; False, and nothing changed, where it has another form."""
        parts = _parts(matrix)
        pairs = list(zip(self._parts.tensors, parts.tensors, strict=False))
        alike = all(one.shape == other.shape and one.dtype == other.dtype for one, other in pairs)
        if self._parts.kind != parts.kind or len(parts.tensors) != len(self._parts.tensors) or not alike:
            return False
        for target, source in pairs:
            target.copy_(source)
        return True

    def values(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        codes_NK, scales_NG, minima_NG, whole_N, (form, bits, group, element, _) = self._parts
        codes_NK = codes_NK if bits == 8 else unpack_nibbles(codes_NK)
        if form is not None:
            whole_N1 = None if whole_N is None else whole_N[:, None]
            return formats.dequantise(Blocks(codes_NK, scales_NG, whole_N1), form, dtype)
        if bits == 4:
            codes_NK = codes_NK.view(torch.int8) if element == UINT4 else (codes_NK.view(torch.int8) ^ 8) - 8
        return dequantise(Quantised(codes_NK, scales_NG, bits, group, minima_NG), dtype)

    def product(
        self,
        x_TK: Tensor,
        bias_N: Tensor | None = None,
        residual_TN: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        factor_N: Tensor | None = None,
    ) -> Tensor:
        """x [T, K], bf16, times the transposed matrix: [T, N]. `factor_N`, of adapters, has no kernel."""
        assert factor_N is None and x_TK.dtype == torch.bfloat16 and x_TK.shape[1] == self.shape[1], x_TK
        count, columns, device = len(x_TK), self.shape[0], x_TK.device
        out = torch.empty(count, columns, dtype=out_dtype or x_TK.dtype, device=device)
        if count == 0:
            return out
        tile = choose(agreed(device), count, columns, multiprocessors(device))
        residual_TN = None if residual_TN is None else residual_TN.contiguous()
        return self.tiled_product(x_TK.contiguous(), bias_N, residual_TN, out, tile)

    def tiled_product(
        self, x_TK: Tensor, bias_N: Tensor | None, residual_TN: Tensor | None, out: Tensor, tile: Tile
    ) -> Tensor:
        """Into `out` [T, N]. All contiguous."""
        rows, (columns, depth) = len(x_TK), self.shape
        codes, scales, minima, whole, (_, _, group, element, scaled) = self._parts
        codes_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
            x_TK,
            codes,
            scales,
            scales if minima is None else minima,
            scales if whole is None else whole,
            x_TK if bias_N is None else bias_N,
            out if residual_TN is None else residual_TN,
            out,
            rows,
            columns,
            depth,
            group,
            element,
            scaled,
            minima is not None,
            bias_N is not None,
            residual_TN is not None,
            tile.rows,
            tile.columns,
            tile.depth,
            math.gcd(group, tile.depth),
            SUPER,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )
        return out


def _known(matrix: Quantised | Fp4) -> bool:
    if isinstance(matrix, Fp4):
        form, inputs = matrix.form, matrix.blocks.codes.shape[1]
        return (
            form.element == E2M1
            and form.scale in ("e8m0", "e4m3")
            and form.block > 0
            and form.rows == 1
            and inputs % 2 == 0
        )
    whole = matrix.bits == 8 or matrix.codes_NK.shape[1] % 2 == 0
    return whole and (matrix.minima_NG is None or matrix.bits == 4)


def fits(matrix: Quantised | Fp4) -> bool:
    """Whether there is such a form here, and this device opens it to the bits of its values."""
    codes = matrix.blocks.codes if isinstance(matrix, Fp4) else matrix.codes_NK
    return _known(matrix) and bool(agreed(codes.device))


@functools.cache
def agreed(device: torch.device) -> tuple[Tile, ...]:
    """Those of linear's tiles whose products by codes have linear's bits, tried once a process; a warning names others.

    Compiles, runs and waits: the first product must not be one that is captured.
    """
    tiles = linear.agreed(device, torch.bfloat16)
    x, weight = trial(device, torch.bfloat16, depth=256)
    held = DeviceCodes(quantise(weight, 4, 64))
    outs = [torch.empty(len(x), len(weight), device=device) for _ in "of"]
    linear.tiled_product(x, held.values(), None, None, outs[0], tiles[-1])
    right = tuple(t for t in tiles if torch.equal(held.tiled_product(x, None, None, outs[1], t), outs[0]))
    right = right if any(tile.rows <= 64 for tile in right) else ()  # some tile has to take few rows
    if right != tiles:
        wrong = [tile for tile in tiles if tile not in right]
        text = f"on {device} products by codes have other bits than those by their values, by tiles {wrong}"
        warnings.warn(text if right else f"{text}; codes are opened when they are loaded", stacklevel=2)
    return right
