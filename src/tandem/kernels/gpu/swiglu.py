"""SwiGLU: silu(gate) * up in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(gate_up, out, rows, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    t, f = place // width, place % width
    gate = tl.load(gate_up + 2 * t * width + f, t < rows, 0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * t + 1) * width + f, t < rows, 0.0).to(tl.float32)
    tl.store(out + place, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), t < rows)


def swiglu(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """[T, 2F] (gate, then up) -> [T, F]."""
    gate_up_TF = gate_up_TF.contiguous()
    rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up_TF.dtype, device=gate_up_TF.device)
    if rows:
        swiglu_kernel[(triton.cdiv(rows * width, BLOCK),)](gate_up_TF, out, rows, width, BLOCK)
    return out


def swiglu_backward(dy_TF: torch.Tensor, gate_up_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient [T, 2F], and the output [T, F] again."""
    gate, up = gate_up_TF.float().chunk(2, -1)
    share = gate.sigmoid()
    active, dy = gate * share, dy_TF.float()
    dgate = dy * up * (share + active * (1 - share))
    return torch.cat((dgate, dy * active), -1).to(gate_up_TF.dtype), (active * up).to(dy_TF.dtype)
