"""Rotary position embedding in place, and the store of keys and values into their pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tandem.kernels.gpu.vectors import scaled, to_integers

LARGEST = tl.constexpr(127.0)
LANES = 64  # heads of a program, of whole tokens where they fit
BLOCK = 1024  # elements that a program stores


@triton.jit(do_not_specialize=["rows", "stride", "sign"])
def rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    positions,
    cos,
    sin,
    rows,
    stride,  # of a row, in heads
    sign,
    heads: tl.constexpr,
    half: tl.constexpr,
    block_t: tl.constexpr,
    block_h: tl.constexpr,
    block_d: tl.constexpr,
):
    lane = tl.arange(0, block_t * block_h)
    t = tl.program_id(0).to(tl.int64) * block_t + lane // block_h
    h = lane % block_h
    d = tl.arange(0, block_d)
    mask = ((t < rows) & (h < heads))[:, None] & (d < half)[None, :]
    angle = tl.load(positions + t, t < rows, 0)[:, None] * half + d[None, :]
    c = tl.load(cos + angle, mask, 0.0)
    s = tl.load(sin + angle, mask, 0.0) * sign
    place = x + (t * stride + h)[:, None] * (2 * half) + d[None, :]
    low = tl.load(place, mask, 0.0).to(tl.float32)
    high = tl.load(place + half, mask, 0.0).to(tl.float32)
    tl.store(place, (low * c - high * s).to(x.dtype.element_ty), mask)
    tl.store(place + half, (high * c + low * s).to(x.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "stride"], do_not_specialize_on_alignment=["slots"])
def store_kernel(x, slots, pool, rows, stride, width: tl.constexpr, head: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    t, w = place // width, place % width
    slot = tl.load(slots + t, t < rows, -1)
    values = tl.load(x + t * stride * head + w, slot >= 0, 0.0)
    tl.store(pool + slot * width + w, values.to(pool.dtype.element_ty), slot >= 0)


@triton.jit(
    do_not_specialize=["rows", "stride", "page_stride", "page_tokens"], do_not_specialize_on_alignment=["slots"]
)
def store_codes_kernel(  # type: ignore[no-untyped-def]
    x,
    slots,
    pool,
    scales,
    rows,
    stride,
    page_stride,  # of the scales
    page_tokens,
    heads: tl.constexpr,
    size: tl.constexpr,
    block_h: tl.constexpr,  # heads of rows
    block_d: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * block_h + tl.arange(0, block_h)
    t, h = lane // heads, lane % heads
    slot = tl.load(slots + t, t < rows, -1)
    d = tl.arange(0, block_d)
    mask = (slot >= 0)[:, None] & (d < size)[None, :]
    values = tl.load(x + ((t * stride + h) * size)[:, None] + d[None, :], mask, 0.0).to(tl.float32)
    code, scale = scaled(values, LARGEST)
    code = to_integers(code)
    tl.store(pool + ((slot * heads + h) * size)[:, None] + d[None, :], code.to(tl.int8), mask)
    place = scales + slot // page_tokens * page_stride + h * page_tokens + slot % page_tokens
    tl.store(place, scale, slot >= 0)


def row_stride(x_THD: torch.Tensor) -> int:
    """Of a row, in heads; the heads of a row lie side by side."""
    size = x_THD.shape[2]
    assert x_THD.stride(2) == 1 and x_THD.stride(1) == size and x_THD.stride(0) % size == 0, x_THD.stride()
    return x_THD.stride(0) // size


def rotate_(
    x_THD: torch.Tensor, positions_T: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, sign: float = 1.0
) -> None:
    """Rotate in place; sign -1 undoes it. Rows may be strided; positions are int64."""
    rows, heads, size = x_THD.shape
    assert positions_T.dtype == torch.int64 and cos_PD.is_contiguous() and sin_PD.is_contiguous()
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
    block_t = max(1, LANES // block_h)
    if rows:
        stride, shape = row_stride(x_THD), (heads, size // 2, block_t, block_h, block_d)
        grid = (triton.cdiv(rows, block_t),)
        rotate_kernel[grid](x_THD, positions_T, cos_PD, sin_PD, rows, stride, float(sign), *shape)


def store_(x_THD: torch.Tensor, slots_T: torch.Tensor, pool_CHD: torch.Tensor) -> None:
    """pool[slots[t]] = x[t]: write keys or values into their pages. Slots are int64; a row of -1 is not written."""
    rows, heads, size = x_THD.shape
    assert pool_CHD.is_contiguous() and slots_T.dtype == torch.int64
    width = heads * size
    if rows:
        grid = (triton.cdiv(rows * width, BLOCK),)
        store_kernel[grid](x_THD, slots_T, pool_CHD, rows, row_stride(x_THD), width, size, BLOCK)


def store_codes_(x_THD: torch.Tensor, slots_T: torch.Tensor, pool_CHD: torch.Tensor, scales_PHO: torch.Tensor) -> None:
    """`store_` as codes in int8 (`numerics.quantise.to_int8`) and the scale of each page, head and offset."""
    rows, heads, size = x_THD.shape
    page_tokens = scales_PHO.shape[2]
    assert pool_CHD.is_contiguous() and slots_T.dtype == torch.int64 and scales_PHO.stride()[1:] == (page_tokens, 1)
    block_d = triton.next_power_of_2(size)
    block_h = max(1, 2 * BLOCK // block_d)
    if rows:
        grid, shape = (triton.cdiv(rows * heads, block_h),), (heads, size, block_h, block_d)
        numbers = (rows, row_stride(x_THD), scales_PHO.stride(0), page_tokens)
        store_codes_kernel[grid](x_THD, slots_T, pool_CHD, scales_PHO, *numbers, *shape)
