"""What matrices are rounded to where they are multiplied, and the rows that they multiply, by the names of configs.

`w8a8` and `w4a8` have products of their own (eights.py, fours.py). Other formats are rounded by their rules, in bf16
or fp32 where the product reads them: the numbers are the format's, the product is the one of model.dtype.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tandem.errors import ConfigError
from tandem.kernels.blocks import rounded, rounded_rows
from tandem.kernels.choice import backend
from tandem.kernels.quantise import dequantise, quantise
from tandem.kernels.sizes import GROUP
from tandem.numerics.blocks import WHOLE_ROW, Format, format_of
from tandem.numerics.elements import Fixed
from tandem.numerics.quantise import Quantised

EIGHTS = Format("int8_row", Fixed("int8", 8, 0), WHOLE_ROW, "fp32", each_row=True)  # rows of w8a8, as they read back
BITS = {"int8": 8, "int4": 4}
PRODUCTS = {"w8a8": (8, 0), "w4a8": (4, GROUP)}  # bits of matrices, and inputs of a group


class Rounding(NamedTuple):
    """Of the matrices of layers, and of the rows that they multiply; embedding, head and norms keep their precision."""

    bits: int = 0  # of integers; 0: a format
    group: int = 0  # inputs that share an integer's scale; 0: all of a row
    products: bool = False  # w8a8, w4a8: rows are integers of 8 bits too, and so are the products
    form: Format | None = None
    rows: Format | None = None  # of the rows that are multiplied; None: as they are

    def __bool__(self) -> bool:
        return bool(self.bits or self.form or self.rows)

    def codes(self, matrix_NK: Tensor) -> Quantised:
        """A matrix as integers."""
        assert self.bits, self
        return quantise(matrix_NK, self.bits, self.group or matrix_NK.shape[1])

    def matrix(self, matrix_NK: Tensor) -> Tensor:
        """A matrix as it reads back, in its dtype. NonFiniteError where it has what the format has not."""
        if self.bits:
            return dequantise(self.codes(matrix_NK), matrix_NK.dtype)
        return matrix_NK if self.form is None else rounded(matrix_NK, self.form)

    def multiplied(self, x_TK: Tensor) -> Tensor:
        """Rows as they are multiplied, in their dtype. A row with a NaN or an infinity is all NaN."""
        if self.products:
            if backend(x_TK) == "triton":
                from tandem.kernels.gpu.eights import rounded_rows as gpu

                return gpu(x_TK)
            return rounded_rows(x_TK, EIGHTS)
        return x_TK if self.rows is None else rounded_rows(x_TK, self.rows)


NOT_ROUNDED = Rounding()


def rounding_of(name: str, group: int = 64) -> Rounding:
    """By a setting: same, int8 and int4 (in groups of `group` inputs), w8a8, w4a8, or a format of numerics/blocks.py
    and behind a + one for the rows: nvfp4, fp8_128x128+fp8_1x128, same+mxfp8_e4m3. ConfigError for others.

    >>> rounding_of("mxfp4+mxfp8_e4m3").rows.bits, rounding_of("w8a8").products, bool(rounding_of("same"))
    (8.25, True, False)
    """
    if name in BITS:
        return Rounding(BITS[name], group)
    if name in PRODUCTS:
        return Rounding(*PRODUCTS[name], products=True)
    matrices, _, rows = name.partition("+")
    try:
        form, own = (None if part in ("", "same") else format_of(part) for part in (matrices, rows))
        return Rounding(form=form, rows=None if own is None else own.by_row())
    except ConfigError as error:
        raise ConfigError(
            f"{name!r} rounds nothing that is known: {error} Give such a format, same, int8, int4, w8a8 or w4a8, "
            "and behind a + what rows are rounded to where they are multiplied."
        ) from error
