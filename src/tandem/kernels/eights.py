"""y = x W^T (+ bias) (+ residual), rows and matrix rounded to integers of 8 bits first (W8A8).

A matrix has a scale a column (a row of W), a row of x one of its own: code = x / (amax / 127), to the nearest even, by
the rule of `numerics.quantise`. Sums of products of codes are exact integers; y = fp32(sum) (s_x s_w), both products
rounded to fp32, then as `linear`. So the bits are those of the reference on every processor, whatever rows ride along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kernels.address import address, rows_address
from tandem.kernels.build.load import function, kernel
from tandem.kernels.large import large
from tandem.kernels.sizes import PANEL
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import Quantised, check_scales, to_int8

QUAD = 4  # inputs of a word
_NAMES = {
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "bf16_fp32",
    (torch.float32, torch.float32): "fp32",
}


class Eights:
    """A packed matrix [N, K]: `packed` in the layout of eights.h, and `words`, its struct Eights as five int64."""

    __slots__ = ("is_rounded", "packed", "scales", "shape", "sums", "words")
    bits = 8

    def __init__(self, matrix: Quantised | Tensor) -> None:
        """Of codes, or of a matrix in bf16 or fp32, which is rounded. NonFiniteError where it is not finite."""
        self.is_rounded = isinstance(matrix, Tensor)  # and not codes of a file's, which stand for a matrix
        self.shape = rows, inputs = matrix.shape if isinstance(matrix, Tensor) else matrix.codes_NK.shape
        depth, panels = -(-inputs // QUAD) * QUAD, -(-rows // PANEL)
        self.packed = large(panels * depth * PANEL, dtype=torch.int8)
        self.sums = torch.empty(panels * PANEL, dtype=torch.int32)
        self.scales = torch.zeros(panels * PANEL)
        pointers = (self.packed.data_ptr(), self.scales.data_ptr(), self.sums.data_ptr())
        self.words = torch.tensor([*pointers, rows, depth], dtype=torch.int64)
        if isinstance(matrix, Tensor):
            self.round(matrix)
        else:
            self._fill(matrix)

    def round(self, value_NK: Tensor) -> None:
        """Hold another matrix of the same shape where this one lies: the codes of `numerics.quantise.quantise`."""
        self._round(value_NK, None)
        check_scales(self.scales, value_NK)

    def is_of(self, value_NK: Tensor) -> bool:
        """Whether the codes are those of this matrix, or a file's and stand for it."""
        if not self.is_rounded:
            return same_bits(self.values(value_NK.dtype), value_NK)
        different = torch.zeros(1, dtype=torch.int64)
        self._round(value_NK, different)
        return not int(different)

    def _round(self, value_NK: Tensor, different: Tensor | None) -> None:
        run = kernel("eights", "round_eights", value_NK.dtype, "pppppiii")
        assert run is not None and value_NK.shape == self.shape, (value_NK.dtype, value_NK.shape)
        held = (self.packed.data_ptr(), self.scales.data_ptr(), self.sums.data_ptr())
        value = address(value_NK, value_NK.dtype, *self.shape)
        run(value, *held, None if different is None else different.data_ptr(), *self.shape, int(self.words[4]))

    def _fill(self, quantised: Quantised) -> None:
        pack = function("eights", "pack_eights", "pppiii")
        assert pack is not None and fits(quantised) and quantised.codes_NK.shape == self.shape, quantised
        rows, inputs = self.shape
        self.scales[:rows] = quantised.scales_NG[:, 0].float()
        codes = address(quantised.codes_NK.contiguous(), torch.int8, rows, inputs)
        pack(codes, self.packed.data_ptr(), self.sums.data_ptr(), rows, inputs, int(self.words[4]))

    def values(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What the codes of the matrix stand for: [N, K], bf16 or fp32."""
        unpack = kernel("eights", "unpack_eights", dtype, "ppi")
        assert unpack is not None, dtype
        value_NK = torch.empty(self.shape, dtype=dtype)
        unpack(self.words.data_ptr(), value_NK.data_ptr(), self.shape[1])
        return value_NK

    def product(
        self,
        x_TK: Tensor,
        bias_N: Tensor | None = None,
        residual_TN: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        factor_N: Tensor | None = None,
    ) -> Tensor:
        """x [T, K], bf16 or fp32, times the transposed matrix, times `factor_N`: [T, N]. Vectors are fp32; x's rows
        may be strided."""
        return rounded_product("eights", self.words, self.shape, x_TK, (bias_N, residual_TN, factor_N), out_dtype)


def rounded_product(
    library: str,
    words: Tensor,
    shape: torch.Size,
    x_TK: Tensor,
    added: tuple[Tensor | None, Tensor | None, Tensor | None],
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The product of a library, eights or fours, with its matrix [N, K]. added: bias, residual and factor."""
    out_dtype = out_dtype or x_TK.dtype
    run = function(library, f"{library}_{_NAMES[x_TK.dtype, out_dtype]}", "pipppppii")
    assert run is not None
    (columns, inputs), rows, (bias_N, residual_TN, factor_N) = shape, len(x_TK), added
    y_TN = torch.empty(rows, columns, dtype=out_dtype)
    run(
        rows_address(x_TK, x_TK.dtype, rows, inputs),
        x_TK.stride(0),
        words.data_ptr(),
        address(bias_N, torch.float32, columns),
        address(residual_TN, x_TK.dtype, rows, columns),
        address(factor_N, torch.float32, columns),
        y_TN.data_ptr(),
        *(rows, inputs),
    )
    return y_TN


def fits(quantised: Quantised) -> bool:
    """Whether there is a packed form: 8 bits, and one scale a row of the matrix."""
    return quantised.bits == 8 and quantised.minima_NG is None and quantised.scales_NG.shape[1] == 1


def product_reference(
    x_TK: Tensor,
    quantised: Quantised,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`Eights.product` by exact sums."""
    codes_TK, scales_T = to_int8(x_TK)
    sums_TN = (codes_TK.double() @ quantised.codes_NK.double().T).float()  # exact, then rounded once, as an integer is
    y_TN = sums_TN * (scales_T[:, None] * quantised.scales_NG[:, 0].float())
    if bias_N is not None:
        y_TN = y_TN + bias_N.float()
    if residual_TN is not None:
        y_TN = y_TN.to(x_TK.dtype).float() + residual_TN.float()
    return y_TN.to(out_dtype or x_TK.dtype)
