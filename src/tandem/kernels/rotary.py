"""Rotary position embedding on halves: (a, b) -> (a cos - b sin, b cos + a sin), in fp32 (Su et al., 2104.09864)."""

from __future__ import annotations

import torch

from tandem.kernels.build import kernel
from tandem.kernels.choice import backend
from tandem.numerics.quantise import E4M3_MAX, to_e4m3


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
    assert x_THD.stride(1) == size and x_THD.stride(2) == 1 and positions_T.dtype == torch.int64
    pointers = (positions_T.data_ptr(), cos_PD.data_ptr(), sin_PD.data_ptr())
    run(x_THD.data_ptr(), x_THD.stride(0), *pointers, rows, heads, size, sign)


def store_(x_THD: torch.Tensor, slots_T: torch.Tensor, pool_CHD: torch.Tensor) -> None:
    """pool[slots[t]] = x[t]: write keys or values into their row-major pages. Slots are int64.

    The pool has the dtype of x, or float8_e4m3fn: then rounded as `numerics.quantise.to_e4m3`.
    """
    narrow = pool_CHD.dtype == torch.float8_e4m3fn
    assert narrow or pool_CHD.dtype == x_THD.dtype, (pool_CHD.dtype, x_THD.dtype)
    if backend(x_THD) == "triton":
        from tandem.kernels.gpu import rotary as gpu

        return gpu.store_(x_THD.clamp(-E4M3_MAX, E4M3_MAX) if narrow else x_THD, slots_T, pool_CHD)
    pool_CHD[slots_T] = to_e4m3(x_THD) if narrow else x_THD
