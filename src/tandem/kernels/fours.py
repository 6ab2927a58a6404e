"""y = x W^T (+ bias) (+ residual), rows rounded to integers of 8 bits, over a matrix of codes of 4 bits (W4A8).

A matrix has a scale a group of inputs (a file's perhaps a minimum too), a row of x one of its own: code = x / (amax /
127), to the nearest even, by the rule of `numerics.quantise`. Sums of products of codes within a group are exact; in
fp32, each operation rounded, group after group,

    total = total + fp32(sum of products) s_group (then + fp32(sum of the row's codes) m_group), and y = total s_x

at the end, then as `linear`. So the bits are those of the reference on every processor, whatever rows ride along. The
matrix lies as codes.h has it, so that a file's codes can be multiplied either way.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tandem.errors import NonFiniteError
from tandem.kernels.address import address
from tandem.kernels.build.load import kernel
from tandem.kernels.codes import UNIT, Codes
from tandem.kernels.codes import fits as has_codes
from tandem.kernels.eights import rounded_product
from tandem.kernels.quantise import quantise
from tandem.kernels.sizes import GROUP
from tandem.numerics.compare import same_bits
from tandem.numerics.quantise import Quantised, to_int8


class Fours(Codes):
    """A packed matrix [N, K], as `Codes`, whose depth is whole units; products round their rows."""

    __slots__ = ()

    def __init__(self, matrix: Quantised | Tensor) -> None:
        """Of codes, or of a matrix in bf16 or fp32, which is rounded in groups of GROUP. NonFiniteError where it is not
        finite."""
        quantised = quantise(matrix, 4, GROUP) if isinstance(matrix, Tensor) else matrix
        assert fits(quantised), quantised
        super().__init__(_padded(quantised))
        self.shape = quantised.codes_NK.shape

    @property
    def is_rounded(self) -> bool:
        """Whether another matrix can be rounded where this one lies: the codes are of a file's form where not."""
        _, _, _, group, _, half, minimum, _ = self.words.tolist()
        return (group, half, minimum) == (GROUP, 0, 0)

    def round(self, value_NK: Tensor) -> None:
        """Hold another matrix of the same shape where this one lies, which was rounded in groups of GROUP."""
        if not self._round(value_NK, None):
            count = int((~value_NK.isfinite()).sum())
            raise NonFiniteError(f"{count} of {value_NK.numel()} weights are not finite.")

    def is_of(self, value_NK: Tensor) -> bool:
        """Whether the codes are those of this matrix, or of a file's form and stand for it."""
        if not self.is_rounded:
            return same_bits(self.values(value_NK.dtype), value_NK)
        different = torch.zeros(1, dtype=torch.int64)
        return self._round(value_NK, different) and not int(different)

    def _round(self, value_NK: Tensor, different: Tensor | None) -> bool:
        run = kernel("fours", "round_fours", value_NK.dtype, "ppppi")
        assert run is not None and value_NK.shape == self.shape, (value_NK.dtype, value_NK.shape)
        assert self.is_rounded, self.words
        finite = torch.zeros(1, dtype=torch.int64)
        value = address(value_NK, value_NK.dtype, *self.shape)
        found = None if different is None else different.data_ptr()
        run(self.words.data_ptr(), value, found, finite.data_ptr(), self.shape[1])
        return bool(finite)

    def values(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What the codes of the matrix stand for: [N, K], bf16 or fp32."""
        unpack = kernel("fours", "unpack_fours", dtype, "ppi")
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
        return rounded_product("fours", self.words, self.shape, x_TK, (bias_N, residual_TN, factor_N), out_dtype)


def _padded(quantised: Quantised) -> Quantised:
    """With codes of 0 up to whole units of inputs."""
    codes_NK = quantised.codes_NK
    more = -codes_NK.shape[1] % UNIT
    return replace(quantised, codes_NK=functional.pad(codes_NK, (0, more))) if more else quantised


def fits(quantised: Quantised) -> bool:
    """Whether there is a packed form: 4 bits, whole units of inputs in a group, minima only as GGUF's Q4_1 has them."""
    return quantised.bits == 4 and has_codes(_padded(quantised))


def product_reference(
    x_TK: Tensor,
    quantised: Quantised,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`Fours.product` by exact sums."""
    codes_TK, scales_T = to_int8(x_TK)
    y_TN = torch.zeros(len(x_TK), len(quantised.codes_NK))
    for g, scales_N in enumerate(quantised.scales_NG.float().T):
        part = slice(g * quantised.group, (g + 1) * quantised.group)
        own_TK = codes_TK[:, part].double()
        sums_TN = (own_TK @ quantised.codes_NK[:, part].double().T).float()  # exact, then rounded once
        y_TN = y_TN + sums_TN * scales_N
        if quantised.minima_NG is not None:
            y_TN = y_TN + own_TK.sum(1).float()[:, None] * quantised.minima_NG[:, g].float()
    y_TN = y_TN * scales_T[:, None]
    if bias_N is not None:
        y_TN = y_TN + bias_N.float()
    if residual_TN is not None:
        y_TN = y_TN.to(x_TK.dtype).float() + residual_TN.float()
    return y_TN.to(out_dtype or x_TK.dtype)
