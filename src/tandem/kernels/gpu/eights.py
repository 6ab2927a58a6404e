"""y = x W^T (+ bias) (+ residual), rows and matrix rounded to 8 bits first, int8 or e4m3, with a scale a row of each.

int8 has the bits of `kernels/eights.py` on every device and by every tile: its sums are exact. e4m3's are fp32, of
IMPRECISE products in the instruction's own precision (14 bits on compute capability 9.0) each: a row's bits hang on
nothing that rides along where tiles agree, which they are tried for. y = round(sum (s_x s_w) + bias) + residual, where
no product is contracted with a sum.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tandem.kernels import eights
from tandem.kernels.gpu.linear import SUPER, kept, store_tile, tile_at, trial
from tandem.kernels.gpu.tiles import Tile, choose, multiprocessors, tiles_of
from tandem.kernels.gpu.vectors import scaled, to_integers
from tandem.numerics.quantise import E4M3_MAX, LARGEST, check_scales

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)
TOP = {torch.int8: float(LARGEST[8]), FP8: E4M3_MAX}
DEPTH = 128  # bytes of a row at a time
IMPRECISE = 128
LANES = 2048  # elements of a program that rounds, by whole rows
MOST = (1 << 31) // LARGEST[8] ** 2  # products of codes whose sum fits 32 bits


@triton.jit(do_not_specialize=["rows", "stride"])
def round_rows_kernel(  # type: ignore[no-untyped-def]
    x,
    codes,
    scales,
    rows,
    stride,
    width: tl.constexpr,
    largest: tl.constexpr,
    block_t: tl.constexpr,
    block_m: tl.constexpr,
):
    m = tl.arange(0, block_m)
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    row = t.to(tl.int64)[:, None]
    mask = (t < rows)[:, None] & (m < width)[None, :]
    code, scale = scaled(tl.load(x + row * stride + m[None, :], mask, 0.0).to(tl.float32), largest)
    if codes.dtype.element_ty == tl.int8:
        code = to_integers(code)
    tl.store(codes + row * width + m[None, :], code.to(codes.dtype.element_ty), mask)
    tl.store(scales + t, scale, t < rows)


@triton.jit(do_not_specialize=["rows"])
def eights_kernel(  # type: ignore[no-untyped-def]
    codes,
    scales,
    weight,
    weight_scales,
    bias,
    residual,
    out,
    rows,
    columns: tl.constexpr,
    depth: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    imprecise: tl.constexpr,  # 0: integers
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    super_t: tl.constexpr,
):
    t, n = tile_at(rows, columns, block_t, block_n, super_t)
    row = t.to(tl.int64)[:, None]
    column = n.to(tl.int64)[None, :]
    accumulator = tl.zeros((block_t, block_n), dtype=tl.float32 if imprecise else tl.int32)
    for first in range(0, depth, block_k):
        k = first + tl.arange(0, block_k)
        x_mask, w_mask = (t < rows)[:, None], (n < columns)[None, :]
        if depth % block_k != 0:
            x_mask, w_mask = x_mask & (k < depth)[None, :], w_mask & (k < depth)[:, None]
        x_tile = tl.load(codes + row * depth + k[None, :], x_mask, 0.0)
        w_tile = tl.load(weight + column * depth + k[:, None], w_mask, 0.0)
        if imprecise:
            accumulator = tl.dot(x_tile, w_tile, accumulator, max_num_imprecise_acc=imprecise)
        else:
            accumulator = tl.dot(x_tile, w_tile, accumulator, out_dtype=tl.int32)
    x_scale = tl.load(scales + t, t < rows, 0.0)[:, None]
    w_scale = tl.load(weight_scales + n, n < columns, 0.0)[None, :]
    sums = accumulator.to(tl.float32) * (x_scale * w_scale)
    store_tile(sums, bias, residual, out, t, n, rows, columns, has_bias, has_residual)


def round_rows(x_TK: Tensor, kind: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Codes [T, K] and scales [T] in fp32; NaN and codes 0 for a row with a NaN or an infinity. Rows may be strided."""
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    rows, width = x_TK.shape
    codes = torch.empty(rows, width, dtype=kind, device=x_TK.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x_TK.device)
    block_m = triton.next_power_of_2(width)
    block_t = max(1, LANES // block_m)
    if rows:
        warps = min(16, max(4, block_m // LANES))
        round_rows_kernel[(triton.cdiv(rows, block_t),)](
            x_TK, codes, scales, rows, x_TK.stride(0), width, TOP[kind], block_t, block_m, num_warps=warps
        )
    return codes, scales


def values_of(codes_TK: Tensor, scales_T: Tensor, dtype: torch.dtype) -> Tensor:
    """What they stand for, rounded once from fp32."""
    return (codes_TK.float() * scales_T[:, None]).to(dtype)


def rounded_rows(x_TK: Tensor) -> Tensor:
    """`kernels.blocks.rounded_rows` of rows of int8."""
    return values_of(*round_rows(x_TK), x_TK.dtype)


def tiled_product(
    rows: tuple[Tensor, Tensor],
    matrix: tuple[Tensor, Tensor],
    bias_N: Tensor | None,
    residual_TN: Tensor | None,
    out: Tensor,
    tile: Tile,
) -> Tensor:
    """Of codes with scales, into `out` [T, N]. All contiguous."""
    (count, depth), columns = rows[0].shape, len(matrix[0])
    eights_kernel[(triton.cdiv(count, tile.rows) * triton.cdiv(columns, tile.columns),)](
        *rows,
        *matrix,
        matrix[1] if bias_N is None else bias_N,
        out if residual_TN is None else residual_TN,
        out,
        count,
        columns,
        depth,
        bias_N is not None,
        residual_TN is not None,
        0 if rows[0].dtype == torch.int8 else IMPRECISE,
        tile.rows,
        tile.columns,
        tile.depth,
        SUPER,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )
    return out


def eights_tiles(device: torch.device) -> tuple[Tile, ...]:
    """Those of bf16, as many bytes deep."""
    return tuple(replace(tile, depth=DEPTH) for tile in tiles_of(device, torch.bfloat16))


@functools.cache
def agreed(device: torch.device, kind: torch.dtype) -> tuple[Tile, ...]:
    """The tiles that products take; of e4m3 tried as linear.agreed tries them."""
    tiles = eights_tiles(device)
    if kind == torch.int8 or len(tiles) == 1:
        return tiles
    x, weight = (round_rows(one, kind) for one in trial(device, torch.bfloat16))
    found = [tiled_product(x, weight, None, None, torch.empty(130, 264, device=device), tile) for tile in tiles]
    wrong = [tile for tile, product in zip(tiles, found, strict=True) if not torch.equal(product, found[-1])]
    return kept(tiles, wrong, device)


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies e4m3; the interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


class DeviceEights(eights.Eights):
    """A matrix [N, K] rounded to 8 bits: `packed` row by row, int8 or e4m3, and `scales` [N]. Changed in place."""

    __slots__ = ()

    def __init__(self, value_NK: Tensor, kind: torch.dtype = torch.int8) -> None:
        """Of a matrix on the device. NonFiniteError where it is not finite."""
        self.is_rounded = True
        self.packed, self.scales = round_rows(value_NK, kind)
        check_scales(self.scales, value_NK)
        self.shape = self.packed.shape
        assert self.shape[1] <= MOST, self.shape

    def round(self, value_NK: Tensor) -> None:
        codes, scales = round_rows(value_NK.to(self.packed.device), self.packed.dtype)
        check_scales(scales, value_NK)
        self.packed.copy_(codes)
        self.scales.copy_(scales)

    def is_of(self, value_NK: Tensor) -> bool:
        codes, scales = round_rows(value_NK.to(self.packed.device), self.packed.dtype)
        same = torch.equal(codes.view(torch.uint8), self.packed.view(torch.uint8))
        return same and torch.equal(scales, self.scales)

    def values(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return values_of(self.packed, self.scales, dtype)

    def product(
        self,
        x_TK: Tensor,
        bias_N: Tensor | None = None,
        residual_TN: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        factor_N: Tensor | None = None,
    ) -> Tensor:
        """x [T, K] times the transposed matrix: [T, N]. `factor_N`, of adapters, has no kernel."""
        assert factor_N is None and x_TK.shape[1] == self.shape[1], (factor_N, x_TK.shape, self.shape)
        count, columns, device = len(x_TK), self.shape[0], x_TK.device
        out = torch.empty(count, columns, dtype=out_dtype or x_TK.dtype, device=device)
        if count == 0:
            return out
        tile = choose(agreed(device, self.packed.dtype), count, columns, multiprocessors(device))
        residual_TN = None if residual_TN is None else residual_TN.contiguous()
        rows = round_rows(x_TK, self.packed.dtype)
        return tiled_product(rows, (self.packed, self.scales), bias_N, residual_TN, out, tile)
