"""y = x W^T (+ bias) (+ residual): the depth in order, one fp32 accumulator an element, tiles as in tiles.py."""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl

from tandem.kernels.gpu.tiles import Tile, choose, multiprocessors, tiles_of

SUPER = 8  # row tiles that take a column tile in turn, so that both operands are read from the L2 cache


@triton.jit
def tile_at(rows, columns: tl.constexpr, block_t: tl.constexpr, block_n: tl.constexpr, super_t: tl.constexpr):  # type: ignore[no-untyped-def]
    """The rows and the columns of y that this program computes."""
    tiles_t = (rows + block_t - 1) // block_t
    tiles_n: tl.constexpr = (columns + block_n - 1) // block_n
    first_t = tl.program_id(0) // (super_t * tiles_n) * super_t
    height = tl.minimum(tiles_t - first_t, super_t)
    place = tl.program_id(0) % (super_t * tiles_n)
    t = (first_t + place % height) * block_t + tl.arange(0, block_t)
    n = place // height * block_n + tl.arange(0, block_n)
    return t, n


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    sums,
    bias,
    residual,
    out,
    t,
    n,
    rows,
    columns: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
):
    """Round once; with a residual once more, after it is added."""
    if has_bias:
        sums += tl.load(bias + n, n < columns, 0.0).to(tl.float32)[None, :]
    mask = (t < rows)[:, None] & (n < columns)[None, :]
    at = t.to(tl.int64)[:, None] * columns + n.to(tl.int64)[None, :]
    if has_residual:
        sums = sums.to(residual.dtype.element_ty).to(tl.float32)
        sums += tl.load(residual + at, mask, 0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    residual,
    out,
    rows,
    columns: tl.constexpr,
    depth: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    block_t: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    super_t: tl.constexpr,
):
    t, n = tile_at(rows, columns, block_t, block_n, super_t)
    row = t.to(tl.int64)[:, None]
    column = n.to(tl.int64)[None, :]
    accumulator = tl.zeros((block_t, block_n), dtype=tl.float32)
    for first in range(0, depth, block_k):
        k = first + tl.arange(0, block_k)
        x_mask, w_mask = (t < rows)[:, None], (n < columns)[None, :]
        if depth % block_k != 0:
            x_mask, w_mask = x_mask & (k < depth)[None, :], w_mask & (k < depth)[:, None]
        x_tile = tl.load(x + row * depth + k[None, :], x_mask, 0.0)
        w_tile = tl.load(weight + column * depth + k[:, None], w_mask, 0.0)
        accumulator = tl.dot(x_tile, w_tile, accumulator, input_precision="ieee")
    store_tile(accumulator, bias, residual, out, t, n, rows, columns, has_bias, has_residual)


def tiled_product(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None,
    residual_TN: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
) -> torch.Tensor:
    """Into `out` [T, N]. All contiguous."""
    (rows, depth), columns = x_TK.shape, weight_NK.shape[0]
    linear_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        x_TK,
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        out if residual_TN is None else residual_TN,
        out,
        rows,
        columns,
        depth,
        bias_N is not None,
        residual_TN is not None,
        tile.rows,
        tile.columns,
        tile.depth,
        SUPER,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def trial(device: torch.device, dtype: torch.dtype, rows: int = 130, depth: int = 1024) -> tuple[torch.Tensor, ...]:
    """Operands [rows, depth] and [264, depth] of a product of random numbers whose sums nearly cancel."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, depth, generator=generator) * 4 for count in (rows, 264))
    x[:, 1::2], weight[:, 1::2] = -x[:, ::2] * (1 + 1e-2 * x[:, 1::2]), weight[:, ::2]  # each pair nearly cancels
    return x.to(device, dtype), weight.to(device, dtype)


def disagreeing(tiles: tuple[Tile, ...], device: torch.device, dtype: torch.dtype) -> list[Tile]:
    """The tiles whose products have other bits than the last one's: of random numbers, and with cancellation."""
    x, weight = trial(device, dtype)
    found = [tiled_product(x, weight, None, None, torch.empty(130, 264, device=device), tile) for tile in tiles]
    return [tile for tile, product in zip(tiles, found, strict=True) if not torch.equal(product, found[-1])]


@functools.cache
def agreed(device: torch.device, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles that products take, tried against each other once a process; with a warning, one where they differ.

    Compiles, runs and waits: the first product must not be one that is captured.
    """
    tiles = tiles_of(device, dtype)
    return kept(tiles, disagreeing(tiles, device, dtype) if len(tiles) > 1 else [], device)


def kept(tiles: tuple[Tile, ...], wrong: list[Tile], device: torch.device) -> tuple[Tile, ...]:
    """Of tiles that were tried: all, or where some are wrong, with a warning, the last."""
    if not wrong:
        return tiles
    warnings.warn(
        f"on {device} products of other tiles have other bits: {wrong}; {tiles[-1]} alone is used", stacklevel=3
    )
    return tiles[-1:]


def product(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    residual_TN: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[T, N]; rounded once, and once more before a residual is added. `weight_NK` is contiguous."""
    assert weight_NK.is_contiguous() and weight_NK.dtype == x_TK.dtype, (weight_NK.stride(), weight_NK.dtype)
    rows, columns, device = x_TK.shape[0], weight_NK.shape[0], x_TK.device
    out = torch.empty(rows, columns, dtype=out_dtype or x_TK.dtype, device=device)
    if rows == 0:
        return out
    tile = choose(agreed(device, x_TK.dtype), rows, columns, multiprocessors(device))
    residual_TN = None if residual_TN is None else residual_TN.contiguous()
    return tiled_product(x_TK.contiguous(), weight_NK, bias_N, residual_TN, out, tile)
