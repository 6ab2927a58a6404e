"""Rotary position embedding on halves: (a, b) -> (a cos - b sin, b cos + a sin), in fp32 (Su et al., 2104.09864)."""

from __future__ import annotations

import torch

from tandem.kernels.address import address, check_range, rows_address
from tandem.kernels.build.load import kernel
from tandem.kernels.choice import backend
from tandem.numerics.quantise import E4M3_MAX, to_e4m3, to_int8


def rotate_reference(
    x_THD: torch.Tensor, positions_T: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, sign: float = 1.0
) -> torch.Tensor:
    """A rotated copy. Tables are [positions, D / 2]."""
    wide = x_THD.dtype if x_THD.dtype == torch.float64 else torch.float32
    low, high = x_THD.to(wide).chunk(2, -1)
    cos, sin = cos_PD[positions_T][:, None].to(wide), sign * sin_PD[positions_T][:, None].to(wide)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(x_THD.dtype)


def rotate_(
    x_THD: torch.Tensor, positions_T: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor, sign: float = 1.0
) -> None:
    """Rotate in place; sign -1 undoes it. Rows may be strided; positions are int64."""
    if backend(x_THD) == "triton":
        from tandem.kernels.gpu import rotary as gpu

        return gpu.rotate_(x_THD, positions_T, cos_PD, sin_PD, sign)
    run = kernel("layer", "rotate", x_THD.dtype, "pipppiiif")
    if run is None:
        x_THD.copy_(rotate_reference(x_THD, positions_T, cos_PD, sin_PD, sign))
        return
    rows, heads, size = x_THD.shape
    check_range(positions_T, len(cos_PD), "positions")
    x, positions = rows_address(x_THD, x_THD.dtype, rows, heads, size), address(positions_T, torch.int64, rows)
    tables = (address(table, torch.float32, len(cos_PD), size // 2) for table in (cos_PD, sin_PD))
    run(x, x_THD.stride(0), positions, *tables, rows, heads, size, sign)


def store_(
    x_THD: torch.Tensor, slots_T: torch.Tensor, pool_CHD: torch.Tensor, scales_PHO: torch.Tensor | None = None
) -> None:
    """pool[slots[t]] = x[t]: write keys or values into their row-major pages. Slots are int64.

    The pool has the dtype of x, or float8_e4m3fn: then rounded as `numerics.quantise.to_e4m3`; or int8: then as
    `to_int8`, with the scales of each page, head and offset in `scales_PHO`.
    """
    narrow = pool_CHD.dtype == torch.float8_e4m3fn
    assert (pool_CHD.dtype == torch.int8) == (scales_PHO is not None), pool_CHD.dtype
    assert narrow or scales_PHO is not None or pool_CHD.dtype == x_THD.dtype, (pool_CHD.dtype, x_THD.dtype)
    if backend(x_THD) == "triton":
        from tandem.kernels.gpu import rotary as gpu

        if scales_PHO is not None:
            return gpu.store_codes_(x_THD, slots_T, pool_CHD, scales_PHO)
        return gpu.store_(x_THD.clamp(-E4M3_MAX, E4M3_MAX) if narrow else x_THD, slots_T, pool_CHD)
    if scales_PHO is None:
        pool_CHD[slots_T] = to_e4m3(x_THD) if narrow else x_THD
        return
    page_tokens = scales_PHO.shape[2]
    pool_CHD[slots_T], scales_PHO[slots_T // page_tokens, :, slots_T % page_tokens] = to_int8(x_THD)
