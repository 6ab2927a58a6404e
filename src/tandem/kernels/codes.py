"""y = x W^T (+ bias) (+ residual) over a matrix kept as codes of 4 or 8 bits: a way to store it, and no approximation.

A product has the bits of `linear.product` with the values that the codes stand for, `numerics.quantise.dequantise` in
bf16: the C++ (codes.h) makes the same values, rounded in the same steps, and reduces in the same order.

The products of a decode step of SmolLM2-135M from its Q4_1 file, 96 MB, two Zen 5 cores: 2.1 ms for a row, where
reading the file alone takes 1.9 ms; 2.9 ms for four rows. From 7 rows on, about as fast as packed bf16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.address import address, rows_address
from tandem.kernels.build.load import function
from tandem.kernels.large import large
from tandem.kernels.sizes import PANEL
from tandem.numerics.quantise import Quantised

UNIT = 8  # inputs that the layout keeps together
_TINY = torch.finfo(torch.float32).tiny


class Codes:
    """A packed matrix [N, K]: `packed` in the layout of codes.h, and `words`, its struct Codes as eight int64."""

    __slots__ = ("bits", "packed", "shape", "words")

    def __init__(self, quantised: Quantised) -> None:
        pack = function("codes", "pack_codes", "ppppp")
        assert pack is not None and fits(quantised), quantised
        codes_NK, scales_NG, minima_NG = quantised.codes_NK, quantised.scales_NG, quantised.minima_NG
        self.bits, self.shape = quantised.bits, codes_NK.shape
        (rows, depth), groups = codes_NK.shape, scales_NG.shape[1]
        half, minimum = scales_NG.dtype == torch.float16, minima_NG is not None
        header = PANEL * scales_NG.element_size() * (1 + minimum)
        panel = groups * header + depth * PANEL * quantised.bits // 8
        self.packed = large(-(-rows // PANEL) * panel, dtype=torch.uint8)
        form = (rows, depth, quantised.group, quantised.bits, half, minimum, _is_normal(quantised))
        self.words = torch.tensor([self.packed.data_ptr(), *form], dtype=torch.int64)
        codes_NK, scales_NG = codes_NK.contiguous(), scales_NG.contiguous()
        minima_NG = None if minima_NG is None else minima_NG.contiguous()
        codes, shape = address(codes_NK, torch.int8, rows, depth), (rows, -(-depth // quantised.group))
        of_groups = [address(x, scales_NG.dtype, *shape) for x in (scales_NG, minima_NG)]
        pack(self.words.data_ptr(), codes, *of_groups, self.packed.data_ptr())

    def values(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What the products multiply by: [N, K] in bf16."""
        assert dtype == torch.bfloat16, dtype
        run = function("codes", "dequantise_codes", "pp")
        assert run is not None
        out = torch.empty(self.shape, dtype=torch.bfloat16)
        run(self.words.data_ptr(), out.data_ptr())
        return out

    def product(
        self,
        x_TK: Tensor,
        bias_N: Tensor | None = None,
        residual_TN: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        factor_N: Tensor | None = None,
    ) -> Tensor:
        """x [T, K], bf16, times the transposed matrix, times `factor_N`: [T, N], bf16 or fp32. Both vectors are fp32;
        x's rows may be strided."""
        name = "codes_bf16_fp32" if out_dtype == torch.float32 else "codes_bf16"
        run = function("codes", name, "pipppppi")
        assert run is not None and out_dtype in (None, torch.bfloat16, torch.float32), out_dtype
        rows, (columns, depth) = len(x_TK), self.shape
        x = rows_address(x_TK, torch.bfloat16, rows, depth)
        bias, residual = address(bias_N, torch.float32, columns), address(residual_TN, torch.bfloat16, rows, columns)
        out = torch.empty(rows, columns, dtype=out_dtype or x_TK.dtype)
        factor = address(factor_N, torch.float32, columns)
        run(x, x_TK.stride(0), self.words.data_ptr(), bias, residual, factor, out.data_ptr(), rows)
        return out


def fits(quantised: Quantised) -> bool:
    """Whether there is a packed form: whole units of inputs and groups, and minima only as GGUF's Q4_1 has them."""
    depth, minima_NG = quantised.codes_NK.shape[1], quantised.minima_NG
    if depth % UNIT or quantised.group % UNIT or quantised.scales_NG.dtype not in (torch.float16, torch.float32):
        return False
    return minima_NG is None or (quantised.bits == 4 and minima_NG.dtype == quantised.scales_NG.dtype == torch.float16)


def _is_normal(quantised: Quantised) -> bool:
    """Whether every value is zero or a normal number. Sums and products of fp16 scales are multiples of 2^-24."""
    minima_NG = quantised.minima_NG
    if minima_NG is not None and not bool(minima_NG.isfinite().all()):
        return False
    sizes_NG = quantised.scales_NG.abs()
    normal = (sizes_NG == 0) | (sizes_NG >= (0 if sizes_NG.dtype == torch.float16 else _TINY))
    return bool((normal & sizes_NG.isfinite()).all())
