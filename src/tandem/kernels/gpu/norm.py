"""Root-mean-square norm: a row's whole width at once, in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WARPS = 4
TILE = 2048  # elements of a program, by whole rows


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(x, weight, out, rows, eps, width: tl.constexpr, block_m: tl.constexpr, block_t: tl.constexpr):  # type: ignore[no-untyped-def]
    m = tl.arange(0, block_m)
    t = tl.program_id(0) * block_t + tl.arange(0, block_t)
    place = t.to(tl.int64)[:, None] * width + m[None, :]
    mask = (t < rows)[:, None] & (m < width)[None, :]
    values = tl.load(x + place, mask, 0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) / width + eps)
    scale = tl.load(weight + m, m < width, 0.0).to(tl.float32)
    tl.store(out + place, (values * rstd[:, None] * scale[None, :]).to(out.dtype.element_ty), mask)


def rms_norm(x_TM: torch.Tensor, weight_M: torch.Tensor, eps: float) -> torch.Tensor:
    x_TM = x_TM.contiguous()
    rows, width = x_TM.shape
    out = torch.empty_like(x_TM)
    block_m = triton.next_power_of_2(width)
    block_t = max(1, TILE // block_m)
    if rows:
        norm_kernel[(triton.cdiv(rows, block_t),)](
            x_TM, weight_M, out, rows, eps, width, block_m, block_t, num_warps=WARPS
        )
    return out


def rms_norm_backward(
    dy_TM: torch.Tensor, x_TM: torch.Tensor, weight_M: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows [T, M] and of the weight [M], the latter in fp32."""
    x, dy = x_TM.float(), dy_TM.float()
    rstd_T = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    unit = x * rstd_T
    dunit = dy * weight_M.float()
    dx_TM = rstd_T * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    return dx_TM.to(x_TM.dtype), (dy * unit).sum(0)
